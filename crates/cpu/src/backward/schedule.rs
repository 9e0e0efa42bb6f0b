//! How a call for gradients is cut: sequences, key heads and splits of their rows.

use std::ops::Range;

use mtlflashattn_core::Problem;

use super::block::Part;
use super::sums::Sums;
use crate::Error;
use crate::call::{Call, Sequence, Task};
use crate::isa::Simd;
use crate::workspace::Block;

/// How the sums of a split are laid out: `[chunk][keys][PANEL]` for k, then for v, where a chunk is at most `PANEL`
/// columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    panel: usize,
    tile: usize,
    pub(super) key_chunks: usize,
    pub(super) value_chunks: usize,
}

impl Columns {
    pub(super) const fn of<S: Simd>(problem: &Problem) -> Self {
        Self {
            panel: S::PANEL,
            tile: S::TILE,
            key_chunks: problem.head_dim.div_ceil(S::PANEL),
            value_chunks: problem.value_dim.div_ceil(S::PANEL),
        }
    }

    /// Without what is not wanted.
    pub(super) const fn only(self, keys: bool, values: bool) -> Self {
        Self {
            key_chunks: if keys { self.key_chunks } else { 0 },
            value_chunks: if values { self.value_chunks } else { 0 },
            ..self
        }
    }

    /// Values from one chunk to the next, for `key_len` keys filled up to whole tiles.
    pub(super) const fn chunk(self, key_len: usize) -> usize {
        key_len.next_multiple_of(self.tile) * self.panel
    }

    /// The columns of each chunk of `width` columns: nearly equal numbers of whole vectors, because a tile that is one
    /// vector wide has too few accumulators to keep the units busy.
    pub(super) fn of_width<S: Simd>(width: usize) -> impl Iterator<Item = Range<usize>> {
        let (vectors, count) = (width.div_ceil(S::LANES), width.div_ceil(S::PANEL));
        let start = move |chunk: usize| (vectors * chunk).div_ceil(count) * S::LANES;
        (0..count).map(move |chunk| start(chunk)..start(chunk + 1).min(width))
    }

    const fn len(self, key_len: usize) -> usize {
        (self.key_chunks + self.value_chunks) * self.chunk(key_len)
    }
}

/// One sequence and its share of the parts and heads.
struct Share {
    sequence: Sequence,
    first_part: usize,
    splits: usize,
    first_head: usize,
    /// Sums of one part, in float32 values.
    part_len: usize,
}

/// All parts of a call. Those of a key head follow one another.
pub(super) struct Schedule {
    shares: Vec<Share>,
    key_heads: usize,
    group: usize,
    split_rows: usize,
    columns: Columns,
    parts: usize,
    /// `[parts][group]`: what each part adds to the gradient of the sinks.
    sinks: Block,
}

impl Schedule {
    pub(super) fn new(call: &Call<'_>, split_rows: usize, columns: Columns) -> Result<Self, Error> {
        let key_heads = call.problem.key_heads;
        let mut parts = 0;
        let mut shares = Vec::with_capacity(call.problem.lengths.batch());
        for index in 0..call.problem.lengths.batch() {
            let sequence = call.sequence(index);
            // Keys that no query sees have a part, too: it leaves zeros.
            let splits = (sequence.query_len * call.group).div_ceil(split_rows).max(1);
            let part_len = columns.len(sequence.key_len).next_multiple_of(16);
            shares.push(Share { sequence, first_part: parts, splits, first_head: index * key_heads, part_len });
            parts += key_heads * splits;
        }
        let sinks = Block::zeroed(parts * call.group)?;
        Ok(Self { shares, key_heads, group: call.group, split_rows, columns, parts, sinks })
    }

    pub(super) const fn parts(&self) -> usize {
        self.parts
    }

    /// Sequences in their order.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.shares.iter().map(|share| &share.sequence)
    }

    /// Room for the sums of the heads that are under way.
    pub(super) fn sums(&self) -> Sums {
        let heads = self.shares.iter().flat_map(|share| std::iter::repeat_n(share.splits, self.key_heads));
        let largest = self.shares.iter().map(|share| share.splits * share.part_len).max();
        Sums::new(heads, largest.unwrap_or(0))
    }

    /// Part number `index`.
    pub(super) fn part(&self, call: &Call<'_>, index: usize) -> Part {
        let share = &self.shares[self.shares.partition_point(|share| share.first_part <= index) - 1];
        let local = index - share.first_part;
        // Causal splits grow towards the end: the longest come first, so that no thread starts one last.
        let (key_head, split) = (local / share.splits, share.splits - 1 - local % share.splits);
        let rows = share.sequence.query_len * call.group;
        let start = split * self.split_rows;
        let head = Head {
            index: share.first_head + key_head,
            task: Task {
                sequence: share.sequence,
                key_head,
                heads: 1,
                rows: 0..rows,
                keys: 0..share.sequence.key_len,
                partial: None,
                first_split: true,
            },
            splits: share.splits,
            part_len: share.part_len,
            columns: self.columns,
        };
        let task = Task { rows: start..(start + self.split_rows).min(rows), ..head.task.clone() };
        Part {
            task,
            sums: split * share.part_len,
            sinks: self.sinks(share.first_part + key_head * share.splits + split),
            head,
        }
    }

    fn sinks(&self, part: usize) -> *mut f32 {
        self.sinks.as_ptr().wrapping_add(part * self.group)
    }

    /// What the parts add to the gradients of the sinks: query head and value, in a fixed order.
    pub(super) fn each_sink(&self, mut add: impl FnMut(usize, *const f32)) {
        for share in &self.shares {
            for key_head in 0..self.key_heads {
                for split in 0..share.splits {
                    let first = self.sinks(share.first_part + key_head * share.splits + split);
                    for head in 0..self.group {
                        add(key_head * self.group + head, first.wrapping_add(head));
                    }
                }
            }
        }
    }
}

/// A key head of a sequence: what its parts have in common.
pub(super) struct Head {
    /// Its number in the call.
    pub(super) index: usize,
    /// All of its rows and keys.
    pub(super) task: Task,
    /// Its parts, and the sums of one of them in float32 values.
    pub(super) splits: usize,
    pub(super) part_len: usize,
    pub(super) columns: Columns,
}
