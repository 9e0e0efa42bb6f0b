//! Keys and values that lie in a cache: how many a sequence has, where each of them lies, and what the buffers that say
//! so may hold. [`Cache::row`] is the one addressing function, [`Problem::check_cache`](crate::Problem::check_cache) the
//! one check of contents.
//!
//! ```text
//! slots  k_cache [slots, slot_len, key_heads, head_dim]    position p of sequence b: row p of slot cache_batch_idx[b]
//! pages  k_cache [pages, page_len, key_heads, head_dim]    position p of sequence b: row p % page_len of page
//!                                                          block_table[b][p / page_len]
//! ```
//!
//! A *position* counts the rows of a sequence from the start of its slot or of its first page. Key 0 of a sequence lies at
//! position `cache_leftpad[b]`, so that key `j` lies at position `cache_leftpad[b] + j`. Masks and `ALiBi` count keys;
//! rotary embeddings and `cache_seqlens` count positions, as in `flash_attn` 2.8.

mod check;
#[cfg(test)]
mod tests;

use crate::problem::{check_extent, shape_error, shape_text};
use crate::{Error, Lengths, Result, TensorMeta};

/// How a cache is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheLayout {
    /// Each sequence has one slot of equal length.
    Slots {
        /// Number of slots.
        count: usize,
        /// Rows of each.
        len: usize,
        /// Whether a buffer says which slot a sequence has; else sequence `b` has slot `b`.
        indexed: bool,
    },
    /// Each sequence has pages, in the order of its row of the block table.
    Pages {
        /// Number of pages.
        count: usize,
        /// Rows of each.
        len: usize,
        /// Entries of the block table for each sequence.
        per_sequence: usize,
        /// Elements of the block table from one sequence to the next; neighbouring pages are neighbours there.
        table_stride: i64,
    },
}

/// How many positions of each sequence are filled before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheLengths {
    /// As many in every sequence; there is no buffer.
    Same(usize),
    /// `lengths[b]`: `cache_seqlens`.
    Each,
    /// `lengths[b + 1] - lengths[b]`: `cu_seqlens_k` of a packed call whose keys are paged.
    Offsets,
}

/// The cache of a problem, but for the contents of its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cache {
    /// How it is cut.
    pub layout: CacheLayout,
    /// How many positions are filled before the call.
    pub lengths: CacheLengths,
    /// Keys that the call appends to each sequence before it attends; they count as keys of the sequence.
    pub new_len: usize,
    /// Whether a buffer says at which position a sequence starts; else all start at 0.
    pub left_padded: bool,
}

/// The buffers of a cache on the host, copied from where the caller could change them; empty where the cache has none.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheBuffers<'a> {
    /// `[batch]` for [`CacheLengths::Each`], `[batch + 1]` for [`CacheLengths::Offsets`].
    pub lengths: &'a [i32],
    /// `[batch]`: the slot of each sequence, for slots that are `indexed`.
    pub slots: &'a [i32],
    /// `[batch]`: the position of key 0 of each sequence, for a cache that is `left_padded`.
    pub left_pad: &'a [i32],
    /// `[batch, per_sequence]`, contiguous whatever the stride of the caller's table: the pages of each sequence. Only
    /// entries that hold positions of the sequence mean anything.
    pub pages: &'a [i32],
}

/// Where a row of the cache lies, for k and v alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheRow {
    /// Slot or page; neighbours are [`Strides::batch`](crate::Strides::batch) apart.
    pub block: usize,
    /// Row in it; neighbours are [`Strides::row`](crate::Strides::row) apart.
    pub row: usize,
}

impl Cache {
    /// Positions that a sequence can have.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        match self.layout {
            CacheLayout::Slots { len, .. } => len,
            CacheLayout::Pages { len, per_sequence, .. } => len * per_sequence,
        }
    }

    /// Number of slots or pages.
    #[must_use]
    pub const fn blocks(&self) -> usize {
        match self.layout {
            CacheLayout::Slots { count, .. } | CacheLayout::Pages { count, .. } => count,
        }
    }

    /// Rows of a slot or page.
    #[must_use]
    pub const fn block_len(&self) -> usize {
        match self.layout {
            CacheLayout::Slots { len, .. } | CacheLayout::Pages { len, .. } => len,
        }
    }

    /// Positions of sequence `sequence` that are filled before the call: where its first new key goes.
    #[must_use]
    pub fn filled(&self, buffers: &CacheBuffers<'_>, sequence: usize) -> usize {
        match self.lengths {
            CacheLengths::Same(len) => len,
            CacheLengths::Each => buffers.lengths[sequence] as usize,
            CacheLengths::Offsets => (buffers.lengths[sequence + 1] - buffers.lengths[sequence]) as usize,
        }
    }

    /// The position of key 0 of sequence `sequence`.
    #[must_use]
    pub fn left_pad(&self, buffers: &CacheBuffers<'_>, sequence: usize) -> usize {
        if self.left_padded { buffers.left_pad[sequence] as usize } else { 0 }
    }

    /// Keys of sequence `sequence` that queries attend to, the new ones included. This is the `key_len` of
    /// [`Mask::visible_keys`](crate::Mask::visible_keys).
    #[must_use]
    pub fn key_len(&self, buffers: &CacheBuffers<'_>, sequence: usize) -> usize {
        self.filled(buffers, sequence) + self.new_len - self.left_pad(buffers, sequence)
    }

    /// Where key `key` of sequence `sequence` lies. New key `t` is key `key_len - new_len + t`.
    #[must_use]
    pub fn row(&self, buffers: &CacheBuffers<'_>, sequence: usize, key: usize) -> CacheRow {
        let position = self.left_pad(buffers, sequence) + key;
        match self.layout {
            CacheLayout::Slots { indexed: false, .. } => CacheRow { block: sequence, row: position },
            CacheLayout::Slots { indexed: true, .. } => {
                CacheRow { block: buffers.slots[sequence] as usize, row: position }
            }
            CacheLayout::Pages { len, per_sequence, .. } => {
                let page = buffers.pages[sequence * per_sequence + position / len];
                CacheRow { block: page as usize, row: position % len }
            }
        }
    }

    /// How many keys from key `key` on lie behind one another, row by row, as far as the layout alone tells.
    #[must_use]
    pub fn run(&self, buffers: &CacheBuffers<'_>, sequence: usize, key: usize) -> usize {
        let len = self.block_len();
        len - (self.left_pad(buffers, sequence) + key) % len
    }
}

/// What the caller says about a cache: shapes of buffers, and lengths that it gives as numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheOptions<'a> {
    /// Filled positions before the call; `None` is the whole cache.
    pub lengths: Option<LengthsArgument<'a>>,
    /// Shape of `cache_batch_idx`, contiguous int32 `[batch]`.
    pub batch_index: Option<&'a [i64]>,
    /// Shape of `cache_leftpad`, contiguous int32 `[batch]`.
    pub left_pad: Option<&'a [i64]>,
    /// Shape and strides of `block_table`, int32 `[batch, max_pages]` whose rows are contiguous.
    pub block_table: Option<(&'a [i64], &'a [i64])>,
    /// Keys that each sequence gets.
    pub new_len: usize,
}

/// The argument that gives the lengths.
#[derive(Clone, Copy, Debug)]
pub enum LengthsArgument<'a> {
    /// `cache_seqlens` as a number.
    Same(i64),
    /// `cache_seqlens`, contiguous int32 of this shape.
    Each(&'a [i64]),
    /// `cu_seqlens_k`, contiguous int32 `[batch + 1]`.
    Offsets(&'a [i64]),
}

/// Pages hold a multiple of this many rows, so that a block of a kernel lies in one page.
pub const PAGE_MULTIPLE: usize = 16;

impl Cache {
    /// The cache whose blocks are `[blocks, block_len, ..]`, for `batch` sequences.
    ///
    /// # Errors
    /// Names the argument, what came and what is allowed.
    pub(crate) fn new(k_cache: &TensorMeta<'_>, batch: usize, options: &CacheOptions<'_>) -> Result<Self> {
        let one_each = |argument, shape: &[i64]| expect_shape(argument, shape, &[batch], "one for each sequence");
        if let Some(shape) = options.batch_index {
            one_each("cache_batch_idx", shape)?;
        }
        if let Some(shape) = options.left_pad {
            one_each("cache_leftpad", shape)?;
        }
        let layout = match options.block_table {
            Some(table) => pages(k_cache, batch, table, options),
            None => slots(k_cache, batch, options.batch_index.is_some()),
        }?;
        let mut cache = Self {
            layout,
            lengths: CacheLengths::Each,
            new_len: options.new_len,
            left_padded: options.left_pad.is_some(),
        };
        cache.lengths = match options.lengths {
            None => CacheLengths::Same(cache.capacity()),
            Some(LengthsArgument::Same(len)) => CacheLengths::Same(cache.checked_len(len)?),
            Some(LengthsArgument::Each(shape)) => {
                one_each("cache_seqlens", shape)?;
                CacheLengths::Each
            }
            Some(LengthsArgument::Offsets(shape)) => {
                expect_shape("cu_seqlens_k", shape, &[batch + 1], "one offset more than there are sequences")?;
                CacheLengths::Offsets
            }
        };
        if cache.new_len > 0 && options.lengths.is_none() {
            return Err(Error::Value {
                argument: "cache_seqlens",
                got: "None".into(),
                allowed: "the filled length of each sequence, behind which k and v go".into(),
            });
        }
        Ok(cache)
    }

    fn checked_len(&self, len: i64) -> Result<usize> {
        let allowed = self.allowed_filled();
        let within = usize::try_from(len).ok().filter(|&len| len <= allowed && self.new_len <= self.capacity());
        within.ok_or_else(|| self.length_error("cache_seqlens", len.to_string()))
    }

    /// Most positions that may be filled before the call.
    const fn allowed_filled(&self) -> usize {
        self.capacity().saturating_sub(self.new_len)
    }

    fn length_error(&self, argument: &'static str, got: String) -> Error {
        let (capacity, new_len) = (self.capacity(), self.new_len);
        let allowed = match self.new_len {
            0 => format!("0 to {capacity}, the positions that a sequence has in the cache"),
            _ if new_len > capacity => format!("fewer new keys: {new_len} do not fit in the {capacity} of a sequence"),
            _ => format!("0 to {}: {capacity} positions in the cache, less {new_len} new keys", capacity - new_len),
        };
        Error::Value { argument, got, allowed }
    }
}

fn slots(k_cache: &TensorMeta<'_>, batch: usize, indexed: bool) -> Result<CacheLayout> {
    let (count, len) = (k_cache.shape[0] as usize, k_cache.shape[1] as usize);
    if indexed || count == batch {
        return Ok(CacheLayout::Slots { count, len, indexed });
    }
    let allowed = format!("batch = {batch}, as in q, or cache_batch_idx to say which is whose");
    Err(shape_error("k_cache", k_cache, allowed))
}

fn pages(
    k_cache: &TensorMeta<'_>,
    batch: usize,
    (shape, strides): (&[i64], &[i64]),
    options: &CacheOptions<'_>,
) -> Result<CacheLayout> {
    let (count, len) = (k_cache.shape[0] as usize, k_cache.shape[1] as usize);
    for (argument, present, instead) in [
        ("cache_batch_idx", options.batch_index.is_some(), "select the rows of block_table instead"),
        ("cache_leftpad", options.left_pad.is_some(), "drop padded pages from block_table, or pad on the right"),
    ] {
        if present {
            return Err(Error::Unsupported {
                argument,
                got: "together with block_table".into(),
                instead: instead.into(),
            });
        }
    }
    if len == 0 || !len.is_multiple_of(PAGE_MULTIPLE) {
        return Err(shape_error(
            "k_cache",
            k_cache,
            format!("pages of a multiple of {PAGE_MULTIPLE} keys: (pages, page_size, heads, head_dim)"),
        ));
    }
    let ([rows, per_sequence], [table_stride, _]) = (shape, strides) else {
        return Err(table_error(shape, batch));
    };
    if *rows != batch as i64 || *per_sequence < 0 {
        return Err(table_error(shape, batch));
    }
    check_extent("block_table", shape, strides, size_of::<i32>())?;
    let per_sequence = *per_sequence as usize;
    if len.checked_mul(per_sequence).is_none_or(|capacity| capacity > i32::MAX as usize) {
        return Err(Error::Value {
            argument: "block_table",
            got: format!("{per_sequence} pages of {len} keys for each sequence"),
            allowed: "fewer than 2**31 keys for each sequence".into(),
        });
    }
    Ok(CacheLayout::Pages { count, len, per_sequence, table_stride: *table_stride })
}

fn table_error(shape: &[i64], batch: usize) -> Error {
    Error::Shape {
        argument: "block_table",
        got: shape_text(shape),
        allowed: format!("({batch}, max_pages): the pages of each sequence"),
    }
}

pub(crate) fn expect_shape(argument: &'static str, shape: &[i64], want: &[usize], meaning: &str) -> Result<()> {
    let want: Vec<i64> = want.iter().map(|&size| size as i64).collect();
    if *shape == *want {
        return Ok(());
    }
    Err(Error::Shape { argument, got: shape_text(shape), allowed: format!("{}: {meaning}", shape_text(&want)) })
}

/// The longest that a sequence can be: callers of packed queries may know better than the capacity.
pub(crate) fn bounded(cache: &Cache, max_key_len: Option<usize>) -> usize {
    let capacity = match cache.lengths {
        CacheLengths::Same(len) => len + cache.new_len,
        CacheLengths::Each | CacheLengths::Offsets => cache.capacity(),
    };
    max_key_len.map_or(capacity, |len| len.min(capacity))
}

/// Lengths of a problem with queries `[batch, query_len, ..]` or `[total_query, ..]` over `cache`.
pub(crate) fn lengths(cache: &Cache, queries: Queries) -> Lengths {
    match queries {
        Queries::Dense { batch, query_len } => Lengths::Dense { batch, query_len, key_len: bounded(cache, None) },
        Queries::Packed { batch, total_query, max_query_len, max_key_len } => Lengths::Packed {
            batch,
            total_query,
            total_key: cache.blocks() * cache.block_len(),
            max_query_len: max_query_len.min(total_query),
            max_key_len: bounded(cache, max_key_len),
        },
    }
}

/// How the queries of a cached problem come.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Queries {
    Dense { batch: usize, query_len: usize },
    Packed { batch: usize, total_query: usize, max_query_len: usize, max_key_len: Option<usize> },
}

/// `error` about k or v in the words of a caller that knows them as caches.
pub(crate) fn name_caches(mut error: Error) -> Error {
    let (Error::Shape { argument, .. }
    | Error::Dtype { argument, .. }
    | Error::Value { argument, .. }
    | Error::Unsupported { argument, .. }) = &mut error;
    *argument = match *argument {
        "k" => "k_cache",
        "v" => "v_cache",
        other => other,
    };
    error
}
