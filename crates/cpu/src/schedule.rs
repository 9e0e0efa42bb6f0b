//! How a call is cut into tasks: over sequences, key heads, blocks of query rows and, where that is too little, keys.

use std::ops::Range;

use crate::Error;
use crate::call::{Call, Sequence, Task};
use crate::workspace::Block;

/// One sequence and its share of the task numbers.
struct Share {
    sequence: Sequence,
    first_task: usize,
    row_blocks: usize,
    splits: usize,
    /// Where the sequence's unmerged results start, in float32 values.
    partial: usize,
}

/// All tasks of a call, numbered so that tasks which read the same keys follow one another.
pub(crate) struct Schedule<'a> {
    call: &'a Call<'a>,
    shares: Vec<Share>,
    tasks: usize,
    partials: Option<Block>,
}

impl<'a> Schedule<'a> {
    pub(crate) fn new(call: &'a Call<'a>) -> Result<Self, Error> {
        let (mut tasks, mut partial) = (0, 0);
        let mut shares = Vec::with_capacity(call.problem.lengths.batch());
        for index in 0..call.problem.lengths.batch() {
            let sequence = call.sequence(index);
            let rows = sequence.query_len * call.group;
            let row_blocks = rows.div_ceil(call.tile.task_rows);
            let splits = sequence.key_len.div_ceil(call.tile.split_keys).max(1);
            if row_blocks > 0 {
                shares.push(Share { sequence, first_task: tasks, row_blocks, splits, partial });
            }
            tasks += call.problem.key_heads * row_blocks * splits;
            if splits > 1 {
                partial += call.problem.key_heads * rows * splits * (call.problem.value_dim + 2);
            }
        }
        let partials = if partial > 0 { Some(Block::new(partial)?) } else { None };
        Ok(Self { call, shares, tasks, partials })
    }

    /// Number of tasks.
    pub(crate) const fn tasks(&self) -> usize {
        self.tasks
    }

    /// Task number `index`.
    pub(crate) fn task(&self, index: usize) -> Task {
        let share = &self.shares[self.shares.partition_point(|share| share.first_task <= index) - 1];
        let (blocks, splits) = (share.row_blocks, share.splits);
        let local = index - share.first_task;
        let (key_head, rest) = (local / (blocks * splits), local % (blocks * splits));
        // Causal blocks grow towards the end: the longest come first, so that no thread starts one last.
        let (split, block) = (rest / blocks, blocks - 1 - rest % blocks);
        let rows = self.rows(&share.sequence);
        let start = block * self.call.tile.task_rows;
        let end = (start + self.call.tile.task_rows).min(rows);
        let first_key = split * self.call.tile.split_keys;
        Task {
            sequence: share.sequence,
            key_head,
            rows: start..end,
            keys: if splits == 1 {
                0..share.sequence.key_len
            } else {
                first_key..(first_key + self.call.tile.split_keys).min(share.sequence.key_len)
            },
            partial: (splits > 1).then(|| self.partial(share, key_head, split, start)),
            first_split: split == 0,
        }
    }

    /// Sequences and heads whose splits must be merged, numbered `0..merges()`.
    pub(crate) fn merges(&self) -> usize {
        let split = self.shares.iter().filter(|share| share.splits > 1).count();
        split * self.call.problem.key_heads
    }

    /// The rows of merge number `index` as one task, with the partial results of each split.
    pub(crate) fn merge(&self, index: usize) -> (Task, Vec<*const f32>) {
        let (nth, key_head) = (index / self.call.problem.key_heads, index % self.call.problem.key_heads);
        let share = self.shares.iter().filter(|share| share.splits > 1).nth(nth).expect("a numbered merge exists");
        let task = Task {
            sequence: share.sequence,
            key_head,
            rows: 0..self.rows(&share.sequence),
            keys: 0..share.sequence.key_len,
            partial: None,
            first_split: true,
        };
        let splits = (0..share.splits).map(|split| self.partial(share, key_head, split, 0).cast_const());
        (task, splits.collect())
    }

    fn rows(&self, sequence: &Sequence) -> usize {
        sequence.query_len * self.call.group
    }

    fn partial(&self, share: &Share, key_head: usize, split: usize, row: usize) -> *mut f32 {
        let row = (key_head * share.splits + split) * self.rows(&share.sequence) + row;
        let block = self.partials.as_ref().expect("split sequences have room for partial results");
        block.as_ptr().wrapping_add(share.partial + row * (self.call.problem.value_dim + 2))
    }

    /// Rows of a packed q that belong to no sequence.
    pub(crate) fn uncovered(&self, total: usize) -> Vec<Range<usize>> {
        let mut gaps = Vec::new();
        let mut next = 0;
        for share in &self.shares {
            if share.sequence.query_start > next {
                gaps.push(next..share.sequence.query_start);
            }
            next = share.sequence.query_start + share.sequence.query_len;
        }
        if next < total {
            gaps.push(next..total);
        }
        gaps
    }
}
