//! The one check of what the buffers of a cache hold.

use super::{Cache, CacheBuffers, CacheLayout, CacheLengths};
use crate::problem::check_sequence_offsets;
use crate::{Error, Lengths, Problem, Result};

impl Problem {
    /// Checks the contents of the buffers of the problem's cache: lengths within the cache, sequences that start before
    /// they end, slots and pages that exist. When keys are appended, what is written belongs to one sequence alone.
    /// Entries of the block table behind the last key of a sequence may hold anything.
    ///
    /// A problem without a cache has nothing to check.
    ///
    /// # Errors
    /// [`Error::Value`] names the argument and the first offending entry.
    pub fn check_cache(&self, buffers: &CacheBuffers<'_>) -> Result<()> {
        let Some(cache) = &self.cache else { return Ok(()) };
        let batch = self.lengths.batch();
        cache.check_lengths(buffers, batch)?;
        cache.check_left_pad(buffers, batch)?;
        cache.check_bound(buffers, batch, self.lengths.max_key_len())?;
        match cache.layout {
            CacheLayout::Slots { count, indexed, .. } if indexed => cache.check_slots(buffers, batch, count),
            CacheLayout::Slots { .. } => Ok(()),
            CacheLayout::Pages { count, len, per_sequence, .. } => {
                let table = Table { cache, buffers, batch, count, len, per_sequence };
                table.check_range()?;
                table.check_written()
            }
        }
    }
}

impl Problem {
    /// The same problem with the lengths that the buffers, which must have been checked, say: the longest sequence of keys
    /// bounds them all. A plan for it suits what the cache holds and not what it could hold.
    #[must_use]
    pub fn with_longest_keys(&self, buffers: &CacheBuffers<'_>) -> Self {
        let Some(cache) = &self.cache else { return *self };
        let longest = (0..self.lengths.batch()).map(|sequence| cache.key_len(buffers, sequence)).max().unwrap_or(0);
        self.with_key_len(longest)
    }

    /// The same problem with sequences of keys that fill its cache: a plan for it suits the cache however full it is, but
    /// for how keys are split.
    #[must_use]
    pub fn with_full_cache(&self) -> Self {
        self.cache.map_or(*self, |cache| self.with_key_len(cache.capacity()))
    }

    fn with_key_len(&self, longest: usize) -> Self {
        let mut lengths = self.lengths;
        match &mut lengths {
            Lengths::Dense { key_len, .. } => *key_len = longest,
            Lengths::Packed { max_key_len, .. } => *max_key_len = longest,
        }
        Self { lengths, ..*self }
    }
}

impl Cache {
    fn check_lengths(&self, buffers: &CacheBuffers<'_>, batch: usize) -> Result<()> {
        let (argument, lengths) = match self.lengths {
            CacheLengths::Same(_) => return Ok(()),
            CacheLengths::Each => ("cache_seqlens", &buffers.lengths[..batch]),
            CacheLengths::Offsets => {
                // They count rows of no tensor, so that nothing but the cache bounds them.
                let unbounded = i32::MAX as usize;
                check_sequence_offsets("cu_seqlens_k", "", buffers.lengths, batch, unbounded, unbounded)?;
                ("cu_seqlens_k", &buffers.lengths[1..])
            }
        };
        for (sequence, &length) in lengths.iter().enumerate() {
            let fits = |len: usize| len <= self.allowed_filled() && self.new_len <= self.capacity();
            match self.lengths {
                _ if length >= 0 && fits(self.filled(buffers, sequence)) => {}
                CacheLengths::Offsets => {
                    let got = format!("{} keys of sequence {sequence}", self.filled(buffers, sequence));
                    return Err(self.length_error(argument, got));
                }
                _ => return Err(self.length_error(argument, at(length, &[sequence]))),
            }
        }
        Ok(())
    }

    fn check_left_pad(&self, buffers: &CacheBuffers<'_>, batch: usize) -> Result<()> {
        if !self.left_padded {
            return Ok(());
        }
        for (sequence, &pad) in buffers.left_pad[..batch].iter().enumerate() {
            let filled = self.filled(buffers, sequence);
            if usize::try_from(pad).is_ok_and(|pad| pad <= filled) {
                continue;
            }
            return Err(Error::Value {
                argument: "cache_leftpad",
                got: at(pad, &[sequence]),
                allowed: format!("0 to {filled}, the filled length of the sequence"),
            });
        }
        Ok(())
    }

    /// Requires the bound that the caller gave, on which plans rely.
    fn check_bound(&self, buffers: &CacheBuffers<'_>, batch: usize, max_key_len: usize) -> Result<()> {
        let longest = (0..batch).map(|sequence| self.key_len(buffers, sequence)).max();
        match longest {
            Some(len) if len > max_key_len => Err(Error::Value {
                argument: "max_seqlen_k",
                got: max_key_len.to_string(),
                allowed: format!("at least {len}, the length of the longest sequence"),
            }),
            _ => Ok(()),
        }
    }

    fn check_slots(&self, buffers: &CacheBuffers<'_>, batch: usize, count: usize) -> Result<()> {
        let mut owners = vec![None; if self.new_len > 0 { count } else { 0 }];
        for (sequence, &slot) in buffers.slots[..batch].iter().enumerate() {
            let Some(index) = usize::try_from(slot).ok().filter(|&slot| slot < count) else {
                return Err(Error::Value {
                    argument: "cache_batch_idx",
                    got: at(slot, &[sequence]),
                    allowed: format!("0 to {}, the slots of the cache", count.saturating_sub(1)),
                });
            };
            if let Some(owner) = owners.get_mut(index).and_then(|owner| owner.replace(sequence)) {
                return Err(Error::Value {
                    argument: "cache_batch_idx",
                    got: format!("{slot} at index {owner} and at index {sequence}"),
                    allowed: "a slot of its own for each sequence that gets new keys".into(),
                });
            }
        }
        Ok(())
    }
}

/// The block table of a call.
struct Table<'a> {
    cache: &'a Cache,
    buffers: &'a CacheBuffers<'a>,
    batch: usize,
    /// Pages of the cache.
    count: usize,
    /// Rows of a page.
    len: usize,
    per_sequence: usize,
}

impl Table<'_> {
    /// The entries of sequence `sequence` that hold its positions.
    fn used(&self, sequence: usize) -> &[i32] {
        let positions = self.cache.filled(self.buffers, sequence) + self.cache.new_len;
        &self.buffers.pages[sequence * self.per_sequence..][..positions.div_ceil(self.len)]
    }

    fn check_range(&self) -> Result<()> {
        for sequence in 0..self.batch {
            let bad = |&page: &i32| usize::try_from(page).is_err() || page as usize >= self.count;
            if let Some(index) = self.used(sequence).iter().position(bad) {
                return Err(Error::Value {
                    argument: "block_table",
                    got: at(self.used(sequence)[index], &[sequence, index]),
                    allowed: format!("0 to {}, the pages of the cache", self.count.saturating_sub(1)),
                });
            }
        }
        Ok(())
    }

    /// Requires that a page which gets new keys stands in the table once.
    fn check_written(&self) -> Result<()> {
        if self.cache.new_len == 0 {
            return Ok(());
        }
        let mut written = vec![None; self.count];
        for sequence in 0..self.batch {
            let first = self.cache.filled(self.buffers, sequence) / self.len;
            for (index, &page) in self.used(sequence).iter().enumerate().skip(first) {
                if let Some(other) = written[page as usize].replace((sequence, index)) {
                    return Err(shared(page, other, (sequence, index)));
                }
            }
        }
        for sequence in 0..self.batch {
            for (index, &page) in self.used(sequence).iter().enumerate() {
                match written[page as usize] {
                    Some(writer) if writer != (sequence, index) => return Err(shared(page, writer, (sequence, index))),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn shared(page: i32, writer: (usize, usize), other: (usize, usize)) -> Error {
    Error::Value {
        argument: "block_table",
        got: format!("{page} at index {writer:?} and at index {other:?}"),
        allowed: "pages that get new keys stand in it once".into(),
    }
}

fn at(value: i32, index: &[usize]) -> String {
    let places: Vec<String> = index.iter().map(ToString::to_string).collect();
    let places = places.join(", ");
    if index.len() == 1 { format!("{value} at index {places}") } else { format!("{value} at index ({places})") }
}
