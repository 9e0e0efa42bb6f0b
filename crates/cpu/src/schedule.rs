//! How a call is cut into tasks: over sequences, key heads, blocks of query rows and, where that is too little, keys.

use std::ops::Range;

use mtlflashattn_core::{CpuPath, Strides};

use crate::Error;
use crate::call::{Call, Sequence, Task};
use crate::workspace::Block;

/// Bytes that a run of heads should have: a page, which is what hardware prefetchers follow.
const RUN_BYTES: usize = 4096;

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
    /// The shares that are split.
    split: Vec<usize>,
    /// Key heads of a task.
    task_heads: usize,
    tasks: usize,
    partials: Option<Block>,
}

impl<'a> Schedule<'a> {
    pub(crate) fn new(call: &'a Call<'a>, threads: usize) -> Result<Self, Error> {
        let (mut tasks, mut partial) = (0, 0);
        let task_heads = task_heads(call, threads);
        let mut split = Vec::new();
        let mut shares = Vec::with_capacity(call.problem.lengths.batch());
        for index in 0..call.problem.lengths.batch() {
            let sequence = call.sequence(index);
            let rows = sequence.query_len * call.group;
            let row_blocks = rows.div_ceil(call.tile.task_rows);
            let splits = sequence.key_len.div_ceil(call.tile.split_keys).max(1);
            if row_blocks == 0 {
                continue;
            }
            if splits > 1 {
                split.push(shares.len());
            }
            shares.push(Share { sequence, first_task: tasks, row_blocks, splits, partial });
            tasks += call.problem.key_heads.div_ceil(task_heads) * row_blocks * splits;
            if splits > 1 {
                partial += call.problem.key_heads * rows * splits * (call.problem.value_dim + 2);
            }
        }
        let partials = if partial > 0 { Some(Block::new(partial)?) } else { None };
        Ok(Self { call, shares, split, task_heads, tasks, partials })
    }

    /// Number of tasks.
    pub(crate) const fn tasks(&self) -> usize {
        self.tasks
    }

    /// Most key heads of a task.
    pub(crate) const fn task_heads(&self) -> usize {
        self.task_heads
    }

    /// Task number `index`.
    pub(crate) fn task(&self, index: usize) -> Task {
        let share = &self.shares[self.shares.partition_point(|share| share.first_task <= index) - 1];
        let (blocks, splits) = (share.row_blocks, share.splits);
        let local = index - share.first_task;
        let (heads, rest) = (local / (blocks * splits), local % (blocks * splits));
        let key_head = heads * self.task_heads;
        // Causal blocks grow towards the end: the longest come first, so that no thread starts one last.
        let (split, block) = (rest / blocks, blocks - 1 - rest % blocks);
        let rows = self.rows(&share.sequence);
        let start = block * self.call.tile.task_rows;
        let end = (start + self.call.tile.task_rows).min(rows);
        let first_key = split * self.call.tile.split_keys;
        Task {
            sequence: share.sequence,
            key_head,
            heads: self.task_heads.min(self.call.problem.key_heads - key_head),
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
        self.split.len() * self.call.problem.key_heads
    }

    /// The rows of merge number `index` as one task, with the partial results of each split.
    pub(crate) fn merge(&self, index: usize) -> (Task, Vec<*const f32>) {
        let (nth, key_head) = (index / self.call.problem.key_heads, index % self.call.problem.key_heads);
        let share = &self.shares[self.split[nth]];
        let task = Task {
            sequence: share.sequence,
            key_head,
            heads: 1,
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

    /// Where the results of a split start: rows after rows, heads after heads.
    fn partial(&self, share: &Share, key_head: usize, split: usize, row: usize) -> *mut f32 {
        let row = (split * self.call.problem.key_heads + key_head) * self.rows(&share.sequence) + row;
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

/// Key heads that one task takes together: where those of K and V lie side by side, enough to read memory in long runs,
/// but not so many that one of `threads` has no task. No bit of a result depends on it.
fn task_heads(call: &Call<'_>, threads: usize) -> usize {
    let problem = call.problem;
    let side_by_side = |strides: &Strides| strides.head.abs() < strides.row.abs();
    if call.tile.path != CpuPath::Decode || !side_by_side(&problem.k) || !side_by_side(&problem.v) {
        return 1;
    }
    let row_bytes = problem.head_dim.min(problem.value_dim) * problem.dtype.size();
    let long_runs = problem.key_heads.div_ceil(RUN_BYTES.div_ceil(row_bytes));
    let splits = problem.lengths.max_key_len().div_ceil(call.tile.split_keys).max(1);
    let tasks = problem.lengths.batch() * splits;
    let groups = threads.div_ceil(tasks.max(1)).clamp(long_runs.max(1), problem.key_heads.max(1));
    problem.key_heads.div_ceil(groups)
}
