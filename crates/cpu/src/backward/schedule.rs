//! How a call for gradients is cut: sequences, key heads and splits of their rows; then spans of keys.

use std::ops::Range;

use mtlflashattn_core::Problem;

use super::block::Part;
use crate::Error;
use crate::call::{Call, Sequence, Task};
use crate::isa::Simd;
use crate::workspace::{Block, Carver};

/// Keys whose splits one thread adds up at once.
const SPAN_KEYS: usize = 256;

/// How the sums of a split are laid out: `[chunk][keys][PANEL]` for k, then for v, where a chunk is `PANEL` columns.
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

    const fn len(self, key_len: usize) -> usize {
        (self.key_chunks + self.value_chunks) * self.chunk(key_len)
    }
}

/// One sequence and its share of the parts and spans.
struct Share {
    sequence: Sequence,
    first_part: usize,
    splits: usize,
    first_span: usize,
    spans: usize,
    /// Where the sums of its parts start.
    sums: usize,
    /// Values from one part to the next.
    part_len: usize,
}

/// All parts of a call, and the sums they leave.
pub(super) struct Schedule {
    shares: Vec<Share>,
    key_heads: usize,
    group: usize,
    split_rows: usize,
    columns: Columns,
    parts: usize,
    spans: usize,
    sums: Block,
    /// `[parts][group]`: what each part adds to the gradient of the sinks.
    sinks: Block,
}

impl Schedule {
    pub(super) fn new(call: &Call<'_>, split_rows: usize, columns: Columns) -> Result<Self, Error> {
        let key_heads = call.problem.key_heads;
        let (mut parts, mut spans, mut sums) = (0, 0, Carver::default());
        let mut shares = Vec::with_capacity(call.problem.lengths.batch());
        for index in 0..call.problem.lengths.batch() {
            let sequence = call.sequence(index);
            let splits = (sequence.query_len * call.group).div_ceil(split_rows);
            let own_spans = sequence.key_len.div_ceil(SPAN_KEYS);
            let part_len = columns.len(sequence.key_len).next_multiple_of(16);
            let start = sums.take(key_heads * splits * part_len);
            shares.push(Share {
                sequence,
                first_part: parts,
                splits,
                first_span: spans,
                spans: own_spans,
                sums: start,
                part_len,
            });
            parts += key_heads * splits;
            spans += key_heads * own_spans;
        }
        let sinks = Block::zeroed(parts * call.group)?;
        let sums = Block::zeroed(sums.len())?;
        Ok(Self { shares, key_heads, group: call.group, split_rows, columns, parts, spans, sums, sinks })
    }

    pub(super) const fn parts(&self) -> usize {
        self.parts
    }

    pub(super) const fn spans(&self) -> usize {
        self.spans
    }

    /// Sequences in their order.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.shares.iter().map(|share| &share.sequence)
    }

    /// Part number `index`.
    pub(super) fn part(&self, call: &Call<'_>, index: usize) -> Part {
        let share = &self.shares[self.shares.partition_point(|share| share.first_part <= index) - 1];
        let local = index - share.first_part;
        // Causal splits grow towards the end: the longest come first, so that no thread starts one last.
        let (key_head, split) = (local / share.splits, share.splits - 1 - local % share.splits);
        let rows = share.sequence.query_len * call.group;
        let start = split * self.split_rows;
        let task = Task { rows: start..(start + self.split_rows).min(rows), ..whole(share.sequence, key_head, rows) };
        let number = share.first_part + key_head * share.splits + split;
        Part { task, sums: self.sums(share, key_head, split), sinks: self.sinks(number), columns: self.columns }
    }

    /// Span number `index`, and the sums of the splits that it adds up.
    pub(super) fn span(&self, call: &Call<'_>, index: usize) -> (Span, Vec<*const f32>) {
        let share = &self.shares[self.shares.partition_point(|share| share.first_span <= index) - 1];
        let local = index - share.first_span;
        let (key_head, start) = (local / share.spans, local % share.spans * SPAN_KEYS);
        let rows = share.sequence.query_len * call.group;
        let keys = start..(start + SPAN_KEYS).min(share.sequence.key_len);
        let splits = (0..share.splits).map(|split| self.sums(share, key_head, split).cast_const());
        (Span { task: whole(share.sequence, key_head, rows), keys, columns: self.columns }, splits.collect())
    }

    fn sums(&self, share: &Share, key_head: usize, split: usize) -> *mut f32 {
        self.sums.as_ptr().wrapping_add(share.sums + (key_head * share.splits + split) * share.part_len)
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

/// Keys of a sequence and key head whose sums are complete.
pub(super) struct Span {
    pub(super) task: Task,
    pub(super) keys: Range<usize>,
    pub(super) columns: Columns,
}

/// All rows of a key head against all keys.
fn whole(sequence: Sequence, key_head: usize, rows: usize) -> Task {
    Task { sequence, key_head, heads: 1, rows: 0..rows, keys: 0..sequence.key_len, partial: None, first_split: true }
}
