//! The decode path: a few query rows against each key, at the rate of memory.
//!
//! Up to four rows share every load (and conversion) of K and V. Rows of K and V are read one after another from end to
//! end, the order that hardware prefetchers follow.

mod products;

use std::ops::Range;

use mtlflashattn_core::Strides;

use crate::call::{Call, Task, Work, normalizer};
use crate::element::{Element, narrow, widen};
use crate::interrupt::Ticker;
use crate::isa::Simd;
use crate::rows::Rows;
use crate::workspace::Carver;
use crate::{dropout, math, score};
use products::{accumulate, accumulate_one, dot};

/// Bytes of K and V of one block: half of a 32 KiB first-level cache.
const BLOCK_BYTES: usize = 16 * 1024;

/// Bytes of K or V that all heads read before the first goes on, where the rows of several heads lie side by side.
const PART_BYTES: usize = 16 * 1024;
/// Rows to ask for ahead where they lie apart.
const AHEAD_ROWS: usize = 16;
/// Bytes to ask for ahead where they follow one another.
const AHEAD_BYTES: usize = 8 * 1024;

/// Offsets of the pieces of a thread's scratch block, in float32 values.
#[derive(Clone, Copy)]
pub(crate) struct Scratch {
    /// Padded head dimensions.
    depth: usize,
    value_dim: usize,
    /// Keys of one block.
    block: usize,
    queries: usize,
    out: usize,
    /// Running maximum and sum, two values a row.
    state: usize,
    scores: usize,
    bias: usize,
    keys: usize,
    values: usize,
    len: usize,
}

impl Scratch {
    /// The layout for tasks of at most `rows` rows.
    pub(crate) fn new<S: Simd, T: Element>(call: &Call<'_>, rows: usize) -> Self {
        let problem = call.problem;
        let depth = problem.head_dim.next_multiple_of(S::LANES);
        let value_dim = problem.value_dim.next_multiple_of(S::LANES);
        let block = BLOCK_BYTES / ((depth + value_dim) * size_of::<T>());
        // Whole vectors for every instruction set, and a divisor of the panel path's block.
        let block = (block / 16 * 16).clamp(16, 128);
        let block = 1 << block.ilog2();
        let mut carver = Carver::default();
        let mut scratch = Self {
            depth,
            value_dim,
            block,
            queries: carver.take(rows * depth),
            out: carver.take(rows * value_dim),
            state: carver.take(rows * 2),
            scores: carver.take(rows * block),
            bias: carver.take(block),
            keys: carver.take(if depth == problem.head_dim { 0 } else { block * depth }),
            values: carver.take(if value_dim == problem.value_dim { 0 } else { block * value_dim }),
            len: 0,
        };
        scratch.len = carver.len();
        scratch
    }

    /// Float32 values in the block.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }
}

/// Runs `task` in the scratch memory `block`.
///
/// # Safety
/// `call` must hold valid buffers, `block` the floats that `scratch` asks for, and `S` must be available.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, T: Element>(
    call: &Call<'_>,
    task: &Task,
    scratch: Scratch,
    block: *mut f32,
    ticker: &mut Ticker<'_>,
) {
    let work = Work { call, task, scratch, block };
    work.start::<S, T>();
    for keys in call.blocks(task, scratch.block) {
        if ticker.should_stop() {
            return;
        }
        work.scores::<S, T>(&keys);
        work.softmax::<S>(&keys);
        work.values::<S, T>(&keys);
    }
    work.finish::<S, T>();
}

impl Work<'_, '_, Scratch> {
    /// Rows of one key head.
    const fn head_rows(&self) -> usize {
        self.task.rows.end - self.task.rows.start
    }

    /// Rows of all key heads.
    const fn rows(&self) -> usize {
        self.task.heads * self.head_rows()
    }

    /// Converts and scales q; empties the softmax state.
    #[inline(always)]
    unsafe fn start<S: Simd, T: Element>(&self) {
        let factor = S::splat(score::query_factor(self.call.problem));
        for i in 0..self.rows() {
            let (task, row) = self.row(i);
            let to = self.at(self.scratch.queries + i * self.scratch.depth);
            let from = self.call.q_row::<T>(&task, row);
            widen::<S, T>(from, self.call.problem.head_dim, self.scratch.depth, to);
            for column in (0..self.scratch.depth).step_by(S::LANES) {
                S::store(to.add(column), S::mul(factor, S::load(to.add(column))));
            }
            let sink = if task.first_split { self.call.sink(&task, row) } else { None };
            let (max, sum) = sink.map_or((f32::MIN, 0.0), |sink| (sink, 1.0));
            self.at(self.scratch.state + 2 * i).write(max);
            self.at(self.scratch.state + 2 * i + 1).write(sum);
        }
        self.at(self.scratch.out).write_bytes(0, self.rows() * self.scratch.value_dim);
    }

    /// Row number `i` of all heads: the task of its head, and its number there.
    fn row(&self, i: usize) -> (Task, usize) {
        let rows = self.head_rows();
        (self.call.of_head(self.task, i / rows), self.task.rows.start + i % rows)
    }

    /// Parts of a block of `keys` that each head takes in turn: short ones where several heads lie side by side, so
    /// that memory is read about in the order in which it lies. The rows of a part lie at equal distances.
    fn parts<T>(&self, keys: &Range<usize>, width: usize) -> impl Iterator<Item = Range<usize>> {
        let size = match self.task.heads {
            1 => keys.len(),
            heads => (PART_BYTES / (heads * width * size_of::<T>())).clamp(1, keys.len()),
        };
        let parts = keys.clone().step_by(size).map(move |start| start..start + size);
        let end = keys.end;
        parts.flat_map(move |part| self.call.runs(&self.task.sequence, part.start..part.end.min(end)))
    }

    /// The rows of K or V of the task's first head from `key` on.
    fn rows_of<T>(&self, source: (*const u8, &Strides, usize), key: usize) -> Rows<T> {
        let row_bytes = source.2 * size_of::<T>();
        // Hardware prefetchers follow one row after the other by themselves, unless several queries make it slow.
        let ahead = match (source.1.row == source.2 as i64, self.head_rows()) {
            (true, 1) => 0,
            (true, _) => AHEAD_BYTES.div_ceil(row_bytes),
            (false, _) => AHEAD_ROWS,
        };
        self.call.rows(source, &self.task.sequence, key, self.task.key_head, ahead)
    }

    /// Scores of all rows against the block `keys`.
    #[inline(always)]
    unsafe fn scores<S: Simd, T: Element>(&self, keys: &Range<usize>) {
        let (head_dim, depth) = (self.call.problem.head_dim, self.scratch.depth);
        let source = (self.call.inputs.k, &self.call.problem.k, head_dim);
        for part in self.parts::<T>(keys, head_dim) {
            let place = part.start - keys.start..part.end - keys.start;
            let first = self.rows_of::<T>(source, part.start);
            for head in 0..self.task.heads {
                let k = first.shifted(head as isize * source.1.head as isize);
                if depth == head_dim {
                    self.dots::<S, T>(head, k, &place);
                } else {
                    let staged = self.stage::<S, T>(k, part.len(), depth, self.scratch.keys);
                    self.dots::<S, f32>(head, staged, &place);
                }
            }
        }
    }

    /// Accumulates the values of the block `keys` in all rows.
    #[inline(always)]
    unsafe fn values<S: Simd, T: Element>(&self, keys: &Range<usize>) {
        let (value_dim, width) = (self.call.problem.value_dim, self.scratch.value_dim);
        let source = (self.call.inputs.v, &self.call.problem.v, value_dim);
        for part in self.parts::<T>(keys, value_dim) {
            let place = part.start - keys.start..part.end - keys.start;
            let first = self.rows_of::<T>(source, part.start);
            for head in 0..self.task.heads {
                let v = first.shifted(head as isize * source.1.head as isize);
                if width == value_dim {
                    self.sums::<S, T>(head, v, &place);
                } else {
                    let staged = self.stage::<S, T>(v, part.len(), width, self.scratch.values);
                    self.sums::<S, f32>(head, staged, &place);
                }
            }
        }
    }

    /// Copies rows whose width is no whole number of vectors, padded with zeros.
    #[inline(always)]
    unsafe fn stage<S: Simd, T: Element>(&self, rows: Rows<T>, count: usize, width: usize, to: usize) -> Rows<f32> {
        let to = self.at(to);
        for row in 0..count {
            rows.prefetch_far::<S>(row);
            widen::<S, T>(rows.row(row), rows.width(), width, to.add(row * width));
        }
        Rows::new(to.cast_const(), width as isize, width).with_ahead(std::ptr::null())
    }

    /// Scores of one head's rows against the keys `part` of the block, up to four rows at a time.
    #[inline(always)]
    unsafe fn dots<S: Simd, K: Element>(&self, head: usize, k: Rows<K>, part: &Range<usize>) {
        let (first, rows) = (head * self.head_rows(), self.head_rows());
        let (depth, stride, keys) = (self.scratch.depth, self.scratch.block, part.len());
        let mut row = 0;
        while row < rows {
            let queries = self.at(self.scratch.queries + (first + row) * depth);
            let scores = self.at(self.scratch.scores + (first + row) * stride + part.start);
            // Eight accumulators hide the latency of the multiply-add, whatever the number of rows.
            row += match rows - row {
                4.. => dot::<S, K, 4, 2>(queries, depth, k, keys, scores, stride),
                2.. => dot::<S, K, 2, 4>(queries, depth, k, keys, scores, stride),
                _ => dot::<S, K, 1, 8>(queries, depth, k, keys, scores, stride),
            };
        }
    }

    /// Accumulates values in one head's rows, up to four rows at a time.
    #[inline(always)]
    unsafe fn sums<S: Simd, V: Element>(&self, head: usize, v: Rows<V>, part: &Range<usize>) {
        let (first, rows) = (head * self.head_rows(), self.head_rows());
        let (width, stride, keys) = (self.scratch.value_dim, self.scratch.block, part.len());
        let mut row = 0;
        while row < rows {
            let probabilities = self.at(self.scratch.scores + (first + row) * stride + part.start);
            let out = self.at(self.scratch.out + (first + row) * width);
            // Up to eight probabilities stay in registers while the columns pass.
            row += match rows - row {
                4.. => accumulate::<S, V, 4, 2>(probabilities, stride, v, keys, out, width),
                2.. => accumulate::<S, V, 2, 4>(probabilities, stride, v, keys, out, width),
                _ => accumulate_one::<S, V, 8>(probabilities, v, keys, out, width),
            };
        }
    }

    /// Modifies the scores of every row, turns them into probabilities and rescales what was accumulated.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, keys: &Range<usize>) {
        let padded = keys.len().next_multiple_of(S::LANES);
        let mut i = 0;
        for head in 0..self.task.heads {
            for row in self.task.rows.clone() {
                let scores = self.at(self.scratch.scores + i * self.scratch.block);
                for key in keys.len()..padded {
                    scores.add(key).write(f32::NEG_INFINITY);
                }
                self.modify::<S>(head, row, scores, keys, padded);
                self.normalize::<S>(i, scores, padded);
                if self.call.problem.dropout.is_some() {
                    dropout::drop_row(self.call, &self.call.of_head(self.task, head), row, keys, scores);
                }
                i += 1;
            }
        }
    }

    /// Scores of row number `i` become probabilities; what it accumulated is rescaled to the new maximum.
    #[inline(always)]
    unsafe fn normalize<S: Simd>(&self, i: usize, scores: *mut f32, padded: usize) {
        let state = self.at(self.scratch.state + 2 * i);
        let (old, sum) = (state.read(), state.add(1).read());
        let mut largest = S::splat(old);
        for key in (0..padded).step_by(S::LANES) {
            largest = S::max(S::load(scores.add(key)), largest);
        }
        let new = S::largest(largest);
        let max = S::splat(new);
        let mut total = S::splat(0.0);
        for key in (0..padded).step_by(S::LANES) {
            let probability = math::exp2::<S>(S::sub(S::load(scores.add(key)), max));
            total = S::add(total, probability);
            S::store(scores.add(key), probability);
        }
        let rescale = if old == new { 1.0 } else { (old - new).exp2() };
        state.write(new);
        state.add(1).write(sum * rescale + S::sum(total));
        if rescale != 1.0 {
            let out = self.at(self.scratch.out + i * self.scratch.value_dim);
            for column in (0..self.scratch.value_dim).step_by(S::LANES) {
                S::store(out.add(column), S::mul(S::splat(rescale), S::load(out.add(column))));
            }
        }
    }

    /// Softcap, ALiBi, bias and visibility of one row.
    #[inline(always)]
    unsafe fn modify<S: Simd>(&self, head: usize, row: usize, scores: *mut f32, keys: &Range<usize>, padded: usize) {
        let (problem, sequence) = (self.call.problem, &self.task.sequence);
        if problem.softcap > 0.0 {
            score::softcap::<S>(scores, padded, problem.softcap);
            for key in keys.len()..padded {
                scores.add(key).write(f32::NEG_INFINITY);
            }
        }
        if problem.alibi.is_some() || problem.bias.is_some() {
            self.add(&self.call.of_head(self.task, head), row, scores, keys);
        }
        let visible = self.call.visible(sequence, row);
        for key in keys.start..visible.start.clamp(keys.start, keys.end) {
            scores.add(key - keys.start).write(f32::NEG_INFINITY);
        }
        for key in visible.end.clamp(keys.start, keys.end)..keys.end {
            scores.add(key - keys.start).write(f32::NEG_INFINITY);
        }
    }

    /// Adds ALiBi and bias of one row.
    #[inline(always)]
    unsafe fn add(&self, task: &Task, row: usize, scores: *mut f32, keys: &Range<usize>) {
        let (mask, sequence) = (&self.call.problem.mask, &task.sequence);
        if let Some(slope) = self.call.alibi_slope(task, row) {
            let diagonal = mask.diagonal(self.call.query(row), sequence.query_len, sequence.key_len);
            let slope = -slope * std::f32::consts::LOG2_E;
            for (i, key) in keys.clone().enumerate() {
                let p = scores.add(i);
                p.write(p.read() + slope * (key as i64 - diagonal).unsigned_abs() as f32);
            }
        }
        if let Some(bias) = score::BiasRow::of(self.call, task, row) {
            let staged = self.at(self.scratch.bias);
            bias.read(keys.clone(), staged);
            for i in 0..keys.len() {
                scores.add(i).write(scores.add(i).read() + staged.add(i).read());
            }
        }
    }

    /// Normalises and writes every row, or leaves it unnormalised in the partial results.
    #[inline(always)]
    unsafe fn finish<S: Simd, T: Element>(&self) {
        let value_dim = self.call.problem.value_dim;
        for i in 0..self.rows() {
            let (task, row) = self.row(i);
            let out = self.at(self.scratch.out + i * self.scratch.value_dim);
            let state = self.at(self.scratch.state + 2 * i);
            let (max, sum) = (state.read(), state.add(1).read());
            if let Some(partial) = task.partial {
                let to = partial.add((row - task.rows.start) * (value_dim + 2));
                to.copy_from_nonoverlapping(out, value_dim);
                to.add(value_dim).write(max);
                to.add(value_dim + 1).write(sum);
                continue;
            }
            let factor = S::splat(normalizer(sum));
            for column in (0..self.scratch.value_dim).step_by(S::LANES) {
                S::store(out.add(column), S::mul(factor, S::load(out.add(column))));
            }
            narrow::<S, T>(out, value_dim, self.call.out_row(&task, row));
            self.call.write_lse(&task, row, max, sum);
        }
    }
}
