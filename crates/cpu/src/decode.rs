//! The decode path: a few query rows against each key, at the rate of memory.
//!
//! Up to four rows share every load (and conversion) of K and V. Keys are read in the order in which they lie; while
//! the scores of a block are computed its values are prefetched, and while the values are used the next keys are.

use std::ops::Range;

use crate::call::{Call, Task, lse, normalizer};
use crate::element::{Element, narrow, widen};
use crate::interrupt::Ticker;
use crate::isa::Simd;
use crate::workspace::Carver;
use crate::{math, score};

/// Bytes of K and V of one block: half of a 32 KiB first-level cache.
const BLOCK_BYTES: usize = 16 * 1024;
const CACHE_LINE: usize = 64;

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

/// Rows of K or V in memory.
#[derive(Clone, Copy)]
struct Rows<T> {
    pointer: *const T,
    /// Elements from one row to the next.
    stride: isize,
    /// Elements that are read of each: a whole number of vectors.
    width: usize,
}

impl<T> Rows<T> {
    #[inline(always)]
    unsafe fn row(&self, index: usize) -> *const T {
        self.pointer.offset(index as isize * self.stride)
    }

    /// Asks for `count` rows from `first` on.
    #[inline(always)]
    unsafe fn prefetch<S: Simd>(&self, first: usize, count: usize) {
        for row in first..first + count {
            let pointer = self.row(row).cast::<u8>();
            for line in (0..self.width * size_of::<T>()).step_by(CACHE_LINE) {
                S::prefetch(pointer.wrapping_add(line));
            }
        }
    }
}

struct Work<'a, 'b> {
    call: &'a Call<'b>,
    task: &'a Task,
    scratch: Scratch,
    block: *mut f32,
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
    let visible = work.visible();
    // Blocks start at multiples of the block size, so that a row's rounding does not depend on its companions.
    let mut start = visible.start / scratch.block * scratch.block;
    while start < visible.end {
        if ticker.should_stop() {
            return;
        }
        let keys = start.max(task.keys.start)..(start + scratch.block).min(task.keys.end);
        start += scratch.block;
        let next = start..(start + scratch.block).min(visible.end).max(start);
        work.attend::<S, T>(&keys, &next);
    }
    work.finish::<S, T>();
}

impl Work<'_, '_> {
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        self.block.add(offset)
    }

    const fn rows(&self) -> usize {
        self.task.rows.end - self.task.rows.start
    }

    /// Keys of this split that at least one row may see.
    fn visible(&self) -> Range<usize> {
        let first = self.call.visible(&self.task.sequence, self.task.rows.start);
        let last = self.call.visible(&self.task.sequence, self.task.rows.end - 1);
        let start = first.start.max(self.task.keys.start);
        start..last.end.min(self.task.keys.end).max(start)
    }

    /// Converts and scales q; empties the softmax state.
    #[inline(always)]
    unsafe fn start<S: Simd, T: Element>(&self) {
        let factor = S::splat(score::query_factor(self.call.problem));
        for (i, row) in self.task.rows.clone().enumerate() {
            let to = self.at(self.scratch.queries + i * self.scratch.depth);
            let from = self.call.q_row::<T>(self.task, row);
            widen::<S, T>(from, self.call.problem.head_dim, self.scratch.depth, factor, to);
            let sink = if self.task.first_split { self.call.sink(self.task, row) } else { None };
            let (max, sum) = sink.map_or((f32::MIN, 0.0), |sink| (sink, 1.0));
            self.at(self.scratch.state + 2 * i).write(max);
            self.at(self.scratch.state + 2 * i + 1).write(sum);
        }
        self.at(self.scratch.out).write_bytes(0, self.rows() * self.scratch.value_dim);
    }

    /// All rows against the block `keys`; `next` is only prefetched.
    #[inline(always)]
    unsafe fn attend<S: Simd, T: Element>(&self, keys: &Range<usize>, next: &Range<usize>) {
        let problem = self.call.problem;
        let (k_base, v_base) = (self.call.k_base::<T>(self.task), self.call.v_base::<T>(self.task));
        let (k_row, v_row) = (problem.k.row as isize, problem.v.row as isize);
        let lie = |base: *const T, row: isize, first: usize, width: usize| Rows {
            pointer: base.wrapping_offset(first as isize * row),
            stride: row,
            width,
        };
        let k = lie(k_base, k_row, keys.start, problem.head_dim);
        let v = lie(v_base, v_row, keys.start, problem.value_dim);
        let k_next = lie(k_base, k_row, next.start, problem.head_dim);
        if self.scratch.depth == problem.head_dim {
            self.scores::<S, T, T>(k, v, keys.len());
        } else {
            let staged = self.stage::<S, T>(k, keys.len(), self.scratch.depth, self.scratch.keys);
            self.scores::<S, f32, T>(staged, v, keys.len());
        }
        self.softmax::<S>(keys);
        if self.scratch.value_dim == problem.value_dim {
            self.values::<S, T, T>(v, k_next, keys.len(), next.len());
        } else {
            let staged = self.stage::<S, T>(v, keys.len(), self.scratch.value_dim, self.scratch.values);
            self.values::<S, f32, T>(staged, k_next, keys.len(), next.len());
        }
    }

    /// Copies rows whose width is no whole number of vectors, padded with zeros.
    #[inline(always)]
    unsafe fn stage<S: Simd, T: Element>(&self, rows: Rows<T>, count: usize, width: usize, to: usize) -> Rows<f32> {
        let to = self.at(to);
        for row in 0..count {
            widen::<S, T>(rows.row(row), rows.width, width, S::splat(1.0), to.add(row * width));
        }
        Rows { pointer: to, stride: width as isize, width }
    }

    /// Scores of all rows; the values of the same keys are prefetched.
    #[inline(always)]
    unsafe fn scores<S: Simd, K: Element, V: Element>(&self, k: Rows<K>, v: Rows<V>, keys: usize) {
        let mut row = 0;
        while row < self.rows() {
            let prefetch = if row == 0 { Some(&v) } else { None };
            row += match self.rows() - row {
                4.. => self.scores_of::<S, K, V, 4, 2>(row, k, prefetch, keys),
                2.. => self.scores_of::<S, K, V, 2, 4>(row, k, prefetch, keys),
                _ => self.scores_of::<S, K, V, 1, 8>(row, k, prefetch, keys),
            };
        }
    }

    /// Scores of `R` rows, `N` keys at a time.
    #[inline(always)]
    unsafe fn scores_of<S: Simd, K: Element, V: Element, const R: usize, const N: usize>(
        &self,
        row: usize,
        k: Rows<K>,
        prefetch: Option<&Rows<V>>,
        keys: usize,
    ) -> usize {
        let queries = self.at(self.scratch.queries + row * self.scratch.depth);
        let scores = self.at(self.scratch.scores + row * self.scratch.block);
        let mut key = 0;
        while key + N <= keys {
            if let Some(v) = prefetch {
                v.prefetch::<S>(key, N);
            }
            dot::<S, K, R, N>(queries, self.scratch.depth, k, key, scores, self.scratch.block);
            key += N;
        }
        while key < keys {
            if let Some(v) = prefetch {
                v.prefetch::<S>(key, 1);
            }
            dot::<S, K, R, 1>(queries, self.scratch.depth, k, key, scores, self.scratch.block);
            key += 1;
        }
        R
    }

    /// Modifies the scores of every row, turns them into probabilities and rescales what was accumulated.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, keys: &Range<usize>) {
        let padded = keys.len().next_multiple_of(S::LANES);
        for i in 0..self.rows() {
            let scores = self.at(self.scratch.scores + i * self.scratch.block);
            for key in keys.len()..padded {
                scores.add(key).write(f32::NEG_INFINITY);
            }
            self.modify::<S>(self.task.rows.start + i, scores, keys, padded);
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
            let rescale = (old - new).exp2();
            state.write(new);
            state.add(1).write(sum * rescale + S::sum(total));
            if rescale != 1.0 {
                let out = self.at(self.scratch.out + i * self.scratch.value_dim);
                for column in (0..self.scratch.value_dim).step_by(S::LANES) {
                    S::store(out.add(column), S::mul(S::splat(rescale), S::load(out.add(column))));
                }
            }
        }
    }

    /// Softcap, ALiBi, bias and visibility of one row.
    #[inline(always)]
    unsafe fn modify<S: Simd>(&self, row: usize, scores: *mut f32, keys: &Range<usize>, padded: usize) {
        let (problem, sequence) = (self.call.problem, &self.task.sequence);
        if problem.softcap > 0.0 {
            score::softcap::<S>(scores, padded, problem.softcap);
            for key in keys.len()..padded {
                scores.add(key).write(f32::NEG_INFINITY);
            }
        }
        if let Some(slope) = self.call.alibi_slope(self.task, row) {
            let diagonal = problem.mask.diagonal(self.call.query(row), sequence.query_len, sequence.key_len);
            let slope = -slope * std::f32::consts::LOG2_E;
            for (i, key) in keys.clone().enumerate() {
                let p = scores.add(i);
                p.write(p.read() + slope * (key as i64 - diagonal).unsigned_abs() as f32);
            }
        }
        if let Some(bias) = score::BiasRow::of(self.call, self.task, row) {
            let staged = self.at(self.scratch.bias);
            bias.read(keys.clone(), staged);
            for i in 0..keys.len() {
                scores.add(i).write(scores.add(i).read() + staged.add(i).read());
            }
        }
        let visible = self.call.visible(sequence, row);
        for key in keys.start..visible.start.clamp(keys.start, keys.end) {
            scores.add(key - keys.start).write(f32::NEG_INFINITY);
        }
        for key in visible.end.clamp(keys.start, keys.end)..keys.end {
            scores.add(key - keys.start).write(f32::NEG_INFINITY);
        }
    }

    /// Accumulates the values of all rows; the keys of the next block are prefetched.
    #[inline(always)]
    unsafe fn values<S: Simd, V: Element, K: Element>(&self, v: Rows<V>, next: Rows<K>, keys: usize, next_keys: usize) {
        let mut row = 0;
        while row < self.rows() {
            let next_keys = if row == 0 { next_keys } else { 0 };
            row += match self.rows() - row {
                4.. => self.values_of::<S, V, K, 4, 2>(row, v, next, keys, next_keys),
                2.. => self.values_of::<S, V, K, 2, 4>(row, v, next, keys, next_keys),
                _ => self.values_of::<S, V, K, 1, 8>(row, v, next, keys, next_keys),
            };
        }
    }

    /// Values of `R` rows, `N` vectors of columns at a time.
    #[inline(always)]
    unsafe fn values_of<S: Simd, V: Element, K: Element, const R: usize, const N: usize>(
        &self,
        row: usize,
        v: Rows<V>,
        next: Rows<K>,
        keys: usize,
        next_keys: usize,
    ) -> usize {
        let probabilities = self.at(self.scratch.scores + row * self.scratch.block);
        let out = self.at(self.scratch.out + row * self.scratch.value_dim);
        let width = self.scratch.value_dim;
        let chunks = width.div_ceil(N * S::LANES);
        let mut prefetched = 0;
        let mut column = 0;
        while column < width {
            // The next keys are spread evenly over the passes, lest they queue up for the few fill buffers.
            let until = (prefetched + next_keys.div_ceil(chunks)).min(next_keys);
            let ahead = Ahead { rows: next, first: prefetched, count: until - prefetched };
            prefetched = until;
            let (p, o) = (probabilities, out.add(column));
            if column + N * S::LANES <= width {
                accumulate::<S, V, K, R, N>(p, self.scratch.block, v, column, keys, o, width, &ahead);
                column += N * S::LANES;
            } else {
                accumulate::<S, V, K, R, 1>(p, self.scratch.block, v, column, keys, o, width, &ahead);
                column += S::LANES;
            }
        }
        R
    }

    /// Normalises and writes every row, or leaves it unnormalised in the partial results.
    #[inline(always)]
    unsafe fn finish<S: Simd, T: Element>(&self) {
        let value_dim = self.call.problem.value_dim;
        for (i, row) in self.task.rows.clone().enumerate() {
            let out = self.at(self.scratch.out + i * self.scratch.value_dim);
            let state = self.at(self.scratch.state + 2 * i);
            let (max, sum) = (state.read(), state.add(1).read());
            if let Some(partial) = self.task.partial {
                let to = partial.add(i * (value_dim + 2));
                to.copy_from_nonoverlapping(out, value_dim);
                to.add(value_dim).write(max);
                to.add(value_dim + 1).write(sum);
                continue;
            }
            let factor = S::splat(normalizer(sum));
            for column in (0..self.scratch.value_dim).step_by(S::LANES) {
                S::store(out.add(column), S::mul(factor, S::load(out.add(column))));
            }
            narrow::<S, T>(out, value_dim, self.call.out_row(self.task, row));
            self.call.write_lse(self.task, row, lse(max, sum));
        }
    }
}

/// `scores[r][key + n] = queries[r] . k[key + n]` for `R` rows and `N` keys.
#[inline(always)]
unsafe fn dot<S: Simd, K: Element, const R: usize, const N: usize>(
    queries: *const f32,
    depth: usize,
    k: Rows<K>,
    key: usize,
    scores: *mut f32,
    stride: usize,
) {
    let mut acc = [[S::splat(0.0); R]; N];
    let rows: [*const K; N] = std::array::from_fn(|n| k.row(key + n));
    for i in (0..depth).step_by(S::LANES) {
        for (n, acc) in acc.iter_mut().enumerate() {
            let x = K::load::<S>(rows[n].add(i));
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = S::fma(x, S::load(queries.add(r * depth + i)), *acc);
            }
        }
    }
    for (n, acc) in acc.iter().enumerate() {
        for (r, &acc) in acc.iter().enumerate() {
            scores.add(r * stride + key + n).write(S::sum(acc));
        }
    }
}

/// Rows to prefetch during a pass over a block.
struct Ahead<T> {
    rows: Rows<T>,
    first: usize,
    count: usize,
}

/// `out[r][..] += probabilities[r][key] * v[key][column..]` over `keys`, for `R` rows and `N` vectors of columns.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "two matrices, a result and what to prefetch")]
unsafe fn accumulate<S: Simd, V: Element, K: Element, const R: usize, const N: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    column: usize,
    keys: usize,
    out: *mut f32,
    out_stride: usize,
    ahead: &Ahead<K>,
) {
    let mut acc = [[S::splat(0.0); N]; R];
    for (r, acc) in acc.iter_mut().enumerate() {
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = S::load(out.add(r * out_stride + n * S::LANES));
        }
    }
    for key in 0..keys {
        if key < ahead.count {
            ahead.rows.prefetch::<S>(ahead.first + key, 1);
        }
        let from = v.row(key).add(column);
        let x: [S::Vector; N] = std::array::from_fn(|n| V::load::<S>(from.add(n * S::LANES)));
        for (r, acc) in acc.iter_mut().enumerate() {
            let p = S::splat(probabilities.add(r * stride + key).read());
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::fma(p, x[n], *acc);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        for (n, &acc) in acc.iter().enumerate() {
            S::store(out.add(r * out_stride + n * S::LANES), acc);
        }
    }
}
