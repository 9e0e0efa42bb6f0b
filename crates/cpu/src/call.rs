//! One call as the kernels see it: where a row of q, k, v, out or lse lies.

use std::ops::Range;

use mtlflashattn_core::{CacheRow, CpuTile, Lengths, Problem, Strides};

use crate::rows::Rows;
use crate::{Inputs, Outputs};

/// One sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    /// Its number in the batch.
    pub(crate) index: usize,
    /// Row of q where it starts (0 for dense problems, where the batch stride does that).
    pub(crate) query_start: usize,
    pub(crate) query_len: usize,
    /// Row of k and v where it starts (0 for dense problems and for keys in a cache).
    pub(crate) key_start: usize,
    pub(crate) key_len: usize,
}

/// The part of a sequence that one thread computes at once.
///
/// A row is one query of one head: row `r` is query `r / group` of query head `key_head * group + r % group`, so that
/// all rows of a task read the same keys and neighbouring rows see almost the same of them.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) sequence: Sequence,
    /// The first of `heads` key heads, each with all of `rows`. The panel path takes one at a time.
    pub(crate) key_head: usize,
    pub(crate) heads: usize,
    pub(crate) rows: Range<usize>,
    /// The keys of this split.
    pub(crate) keys: Range<usize>,
    /// Where unmerged results go; `None` when this task sees all keys and writes the output itself.
    pub(crate) partial: Option<*mut f32>,
    /// Whether this task accounts for the attention sink.
    pub(crate) first_split: bool,
}

/// One task on one thread, in the scratch memory `block` whose layout is `scratch`.
pub(crate) struct Work<'a, 'b, Scratch> {
    pub(crate) call: &'a Call<'b>,
    pub(crate) task: &'a Task,
    pub(crate) scratch: Scratch,
    pub(crate) block: *mut f32,
}

impl<Scratch> Work<'_, '_, Scratch> {
    /// The piece of the block at `offset`.
    pub(crate) unsafe fn at(&self, offset: usize) -> *mut f32 {
        self.block.add(offset)
    }
}

/// Problem, tile and buffers of one call.
pub(crate) struct Call<'a> {
    pub(crate) problem: &'a Problem,
    pub(crate) tile: &'a CpuTile,
    pub(crate) inputs: &'a Inputs<'a>,
    pub(crate) outputs: &'a Outputs,
    /// Query heads that share a key head.
    pub(crate) group: usize,
}

// SAFETY: inputs are only read, and tasks write disjoint rows of the outputs.
unsafe impl Sync for Call<'_> {}

impl<'a> Call<'a> {
    pub(crate) fn new(problem: &'a Problem, tile: &'a CpuTile, inputs: &'a Inputs<'a>, outputs: &'a Outputs) -> Self {
        Self { problem, tile, inputs, outputs, group: problem.group() }
    }

    /// The part of `task` that belongs to its key head number `head`.
    pub(crate) fn of_head(&self, task: &Task, head: usize) -> Task {
        let rows = task.sequence.query_len * self.group;
        let partial = task.partial.map(|first| first.wrapping_add(head * rows * (self.problem.value_dim + 2)));
        Task { key_head: task.key_head + head, heads: 1, partial, ..task.clone() }
    }

    /// Sequence number `index`.
    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        let between = |offsets: &[i32]| (offsets[index] as usize, (offsets[index + 1] - offsets[index]) as usize);
        let (query_start, query_len) = match self.problem.lengths {
            Lengths::Dense { query_len, .. } => (0, query_len),
            Lengths::Packed { .. } => between(self.inputs.query_offsets),
        };
        let (key_start, key_len) = match (&self.problem.cache, self.problem.lengths) {
            (Some(cache), _) => (0, cache.key_len(&self.inputs.cache, index)),
            (None, Lengths::Dense { key_len, .. }) => (0, key_len),
            (None, Lengths::Packed { .. }) => between(self.inputs.key_offsets),
        };
        Sequence { index, query_start, query_len, key_start, key_len }
    }

    /// Query head of row `row`.
    pub(crate) const fn head(&self, task: &Task, row: usize) -> usize {
        match self.group {
            1 => task.key_head,
            group => task.key_head * group + row % group,
        }
    }

    /// Query of row `row`.
    pub(crate) const fn query(&self, row: usize) -> usize {
        match self.group {
            1 => row,
            group => row / group,
        }
    }

    /// Keys that row `row` sees, of all keys of the sequence.
    pub(crate) fn visible(&self, sequence: &Sequence, row: usize) -> Range<usize> {
        self.problem.mask.visible_keys(self.query(row), sequence.query_len, sequence.key_len)
    }

    /// Keys of the task's split that at least one of `rows` may see. A row's range never moves back as rows advance.
    pub(crate) fn visible_to(&self, task: &Task, rows: &Range<usize>) -> Range<usize> {
        let first = self.visible(&task.sequence, rows.start);
        let last = self.visible(&task.sequence, rows.end - 1);
        let start = first.start.max(task.keys.start);
        start..last.end.min(task.keys.end).max(start)
    }

    /// The task's visible keys in blocks of `size`. They start at multiples of `size` whatever the task, so that the
    /// rounding of a row does not depend on the rows it shares a task with.
    pub(crate) fn blocks(&self, task: &Task, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let visible = self.visible_to(task, &task.rows);
        let keys = task.keys.clone();
        let first = if visible.is_empty() { visible.end } else { visible.start / size * size };
        (first..visible.end).step_by(size).map(move |start| start.max(keys.start)..(start + size).min(keys.end))
    }

    /// Element 0 of row `row` of q.
    pub(crate) unsafe fn q_row<T>(&self, task: &Task, row: usize) -> *const T {
        let token = task.sequence.query_start + self.query(row);
        self.inputs.q.cast::<T>().offset(offset(&self.problem.q, &task.sequence, token, self.head(task, row)))
    }

    /// Element 0 of the first row of k that the task's head and sequence own.
    pub(crate) unsafe fn k_base<T>(&self, task: &Task) -> *const T {
        let sequence = &task.sequence;
        self.inputs.k.cast::<T>().offset(offset(&self.problem.k, sequence, sequence.key_start, task.key_head))
    }

    /// Element 0 of the first row of v that the task's head and sequence own.
    pub(crate) unsafe fn v_base<T>(&self, task: &Task) -> *const T {
        let sequence = &task.sequence;
        self.inputs.v.cast::<T>().offset(offset(&self.problem.v, sequence, sequence.key_start, task.key_head))
    }

    /// The parts of `keys` whose rows lie at equal distances.
    pub(crate) fn runs(&self, sequence: &Sequence, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (sequence, mut next) = (sequence.index, keys.start);
        std::iter::from_fn(move || {
            let run = self.problem.cache.as_ref().map(|cache| cache.run(&self.inputs.cache, sequence, next));
            let start = next;
            next = run.map_or(keys.end, |len| keys.end.min(start + len));
            (start < keys.end).then_some(start..next)
        })
    }

    /// Rows of one head of k or v from `key` on, to the end of its run; each asks for the one `ahead` keys behind it, or
    /// with 0 for nothing.
    pub(crate) fn rows<T>(
        &self,
        (first, strides, width): (*const u8, &Strides, usize),
        sequence: &Sequence,
        key: usize,
        head: usize,
        ahead: usize,
    ) -> Rows<T> {
        let at = |key| first.cast::<T>().wrapping_offset(self.key_offset(strides, sequence, key, head));
        let rows = Rows::new(at(key), strides.row as isize, width);
        match self.problem.cache {
            _ if ahead == 0 => rows.with_ahead(std::ptr::null()),
            // Behind the last key of a tensor the next head or sequence begins; in a cache that may be anything.
            Some(_) if key + ahead >= sequence.key_len => rows.with_ahead(std::ptr::null()),
            _ => rows.with_ahead(at(key + ahead)),
        }
    }

    fn key_offset(&self, strides: &Strides, sequence: &Sequence, key: usize, head: usize) -> isize {
        let Some(cache) = &self.problem.cache else {
            return offset(strides, sequence, sequence.key_start + key, head);
        };
        let CacheRow { block, row } = cache.row(&self.inputs.cache, sequence.index, key);
        (block as i64 * strides.batch + row as i64 * strides.row + head as i64 * strides.head) as isize
    }

    /// Element 0 of row `row` of the output.
    pub(crate) unsafe fn out_row<T>(&self, task: &Task, row: usize) -> *mut T {
        self.query_row(self.outputs.out.cast(), &self.outputs.out_strides, task, row)
    }

    /// Element 0 of row `row` of a tensor with the dimensions of the output, but for the last.
    pub(crate) unsafe fn query_row<T>(&self, first: *mut T, strides: &Strides, task: &Task, row: usize) -> *mut T {
        let token = task.sequence.query_start + self.query(row);
        first.offset(offset(strides, &task.sequence, token, self.head(task, row)))
    }

    /// Writes the LSE of row `row`, when it is wanted, from the running maximum (in units of log2) and sum.
    pub(crate) unsafe fn write_lse(&self, task: &Task, row: usize, max: f32, sum: f32) {
        if !self.outputs.lse.is_null() {
            self.outputs.lse.add(self.lse_index(task, row)).write(lse(max, sum));
        }
    }

    /// Where the LSE of row `row` lies.
    pub(crate) fn lse_index(&self, task: &Task, row: usize) -> usize {
        let (head, query) = (self.head(task, row), self.query(row));
        match self.problem.lengths {
            Lengths::Dense { query_len, .. } => {
                (task.sequence.index * self.problem.query_heads + head) * query_len + query
            }
            Lengths::Packed { total_query, .. } => head * total_query + task.sequence.query_start + query,
        }
    }

    /// ALiBi slope of row `row`.
    pub(crate) unsafe fn alibi_slope(&self, task: &Task, row: usize) -> Option<f32> {
        let strides = self.problem.alibi?;
        let index = task.sequence.index as i64 * strides.batch + self.head(task, row) as i64 * strides.head;
        Some(self.inputs.alibi_slopes.offset(index as isize).read())
    }

    /// Sink of row `row` in units of log2; a sink of negative infinity is none.
    pub(crate) unsafe fn sink(&self, task: &Task, row: usize) -> Option<f32> {
        let stride = self.problem.sinks?;
        let sink = self.inputs.sinks.offset((self.head(task, row) as i64 * stride) as isize).read();
        (sink != f32::NEG_INFINITY).then_some(sink * std::f32::consts::LOG2_E)
    }
}

/// Natural logarithm of the sum of `exp` from a running maximum (in units of log2) and a sum relative to it.
fn lse(max: f32, sum: f32) -> f32 {
    if sum == 0.0 { f32::INFINITY } else { (max + sum.log2()) * std::f32::consts::LN_2 }
}

/// The factor that normalises an accumulated output.
pub(crate) fn normalizer(sum: f32) -> f32 {
    if sum == 0.0 { 0.0 } else { 1.0 / sum }
}

pub(crate) const fn offset(strides: &Strides, sequence: &Sequence, token: usize, head: usize) -> isize {
    (sequence.index as i64 * strides.batch + token as i64 * strides.row + head as i64 * strides.head) as isize
}
