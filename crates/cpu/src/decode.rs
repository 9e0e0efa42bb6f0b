//! The decode path: a few query rows against each key, at the rate of memory.
//!
//! Up to four rows share every load (and conversion) of K and V. Rows of K and V are read one after another from end to
//! end, the order that hardware prefetchers follow.

use std::ops::Range;

use crate::call::{Call, Task, normalizer};
use crate::element::{Element, narrow, widen};
use crate::interrupt::Ticker;
use crate::isa::Simd;
use crate::rows::Rows;
use crate::workspace::Carver;
use crate::{math, score};

/// Bytes of K and V of one block: half of a 32 KiB first-level cache.
const BLOCK_BYTES: usize = 16 * 1024;

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
    for keys in call.blocks(task, scratch.block) {
        if ticker.should_stop() {
            return;
        }
        work.attend::<S, T>(&keys);
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

    /// Converts and scales q; empties the softmax state.
    #[inline(always)]
    unsafe fn start<S: Simd, T: Element>(&self) {
        let factor = S::splat(score::query_factor(self.call.problem));
        for (i, row) in self.task.rows.clone().enumerate() {
            let to = self.at(self.scratch.queries + i * self.scratch.depth);
            let from = self.call.q_row::<T>(self.task, row);
            widen::<S, T>(from, self.call.problem.head_dim, self.scratch.depth, to);
            for column in (0..self.scratch.depth).step_by(S::LANES) {
                S::store(to.add(column), S::mul(factor, S::load(to.add(column))));
            }
            let sink = if self.task.first_split { self.call.sink(self.task, row) } else { None };
            let (max, sum) = sink.map_or((f32::MIN, 0.0), |sink| (sink, 1.0));
            self.at(self.scratch.state + 2 * i).write(max);
            self.at(self.scratch.state + 2 * i + 1).write(sum);
        }
        self.at(self.scratch.out).write_bytes(0, self.rows() * self.scratch.value_dim);
    }

    /// All rows against the block `keys`.
    #[inline(always)]
    unsafe fn attend<S: Simd, T: Element>(&self, keys: &Range<usize>) {
        let problem = self.call.problem;
        let (k_row, v_row) = (problem.k.row as isize, problem.v.row as isize);
        let k_pointer = self.call.k_base::<T>(self.task).offset(keys.start as isize * k_row);
        let v_pointer = self.call.v_base::<T>(self.task).offset(keys.start as isize * v_row);
        let k = Rows::new(k_pointer, k_row, problem.head_dim);
        let v = Rows::new(v_pointer, v_row, problem.value_dim);
        if self.scratch.depth == problem.head_dim {
            self.scores::<S, T>(k, keys.len());
        } else {
            let staged = self.stage::<S, T>(k, keys.len(), self.scratch.depth, self.scratch.keys);
            self.scores::<S, f32>(staged, keys.len());
        }
        self.softmax::<S>(keys);
        if self.scratch.value_dim == problem.value_dim {
            self.values::<S, T>(v, keys.len());
        } else {
            let staged = self.stage::<S, T>(v, keys.len(), self.scratch.value_dim, self.scratch.values);
            self.values::<S, f32>(staged, keys.len());
        }
    }

    /// Copies rows whose width is no whole number of vectors, padded with zeros.
    #[inline(always)]
    unsafe fn stage<S: Simd, T: Element>(&self, rows: Rows<T>, count: usize, width: usize, to: usize) -> Rows<f32> {
        let to = self.at(to);
        for row in 0..count {
            rows.prefetch_behind::<S>(row);
            widen::<S, T>(rows.row(row), rows.width(), width, to.add(row * width));
        }
        Rows::new(to, width as isize, width)
    }

    /// Scores of all rows, up to four at a time.
    #[inline(always)]
    unsafe fn scores<S: Simd, K: Element>(&self, k: Rows<K>, keys: usize) {
        let mut row = 0;
        while row < self.rows() {
            let queries = self.at(self.scratch.queries + row * self.scratch.depth);
            let scores = self.at(self.scratch.scores + row * self.scratch.block);
            let (depth, stride) = (self.scratch.depth, self.scratch.block);
            // Eight accumulators hide the latency of the multiply-add, whatever the number of rows.
            row += match self.rows() - row {
                4.. => dot::<S, K, 4, 2>(queries, depth, k, keys, scores, stride),
                2.. => dot::<S, K, 2, 4>(queries, depth, k, keys, scores, stride),
                _ => dot::<S, K, 1, 8>(queries, depth, k, keys, scores, stride),
            };
        }
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

    /// Accumulates the values of all rows, up to four at a time.
    #[inline(always)]
    unsafe fn values<S: Simd, V: Element>(&self, v: Rows<V>, keys: usize) {
        let mut row = 0;
        while row < self.rows() {
            let probabilities = self.at(self.scratch.scores + row * self.scratch.block);
            let out = self.at(self.scratch.out + row * self.scratch.value_dim);
            let (stride, width) = (self.scratch.block, self.scratch.value_dim);
            // Up to eight probabilities stay in registers while the columns pass.
            row += match self.rows() - row {
                4.. => accumulate::<S, V, 4, 2>(probabilities, stride, v, keys, out, width),
                2.. => accumulate::<S, V, 2, 4>(probabilities, stride, v, keys, out, width),
                _ => accumulate_one::<S, V, 8>(probabilities, v, keys, out, width),
            };
        }
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
            self.call.write_lse(self.task, row, max, sum);
        }
    }
}

/// `scores[r][key] = queries[r] . k[key]` for `R` rows, with `U` accumulators for each. Returns `R`.
#[inline(always)]
unsafe fn dot<S: Simd, K: Element, const R: usize, const U: usize>(
    queries: *const f32,
    depth: usize,
    k: Rows<K>,
    keys: usize,
    scores: *mut f32,
    stride: usize,
) -> usize {
    for key in 0..keys {
        let from = k.row(key);
        k.prefetch_behind::<S>(key);
        let mut acc = [[S::splat(0.0); U]; R];
        let mut i = 0;
        while i + U * S::LANES <= depth {
            for u in 0..U {
                let x = K::load::<S>(from.add(i + u * S::LANES));
                for (r, acc) in acc.iter_mut().enumerate() {
                    acc[u] = S::fma(x, S::load(queries.add(r * depth + i + u * S::LANES)), acc[u]);
                }
            }
            i += U * S::LANES;
        }
        while i < depth {
            let x = K::load::<S>(from.add(i));
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[0] = S::fma(x, S::load(queries.add(r * depth + i)), acc[0]);
            }
            i += S::LANES;
        }
        for (r, acc) in acc.iter().enumerate() {
            let mut total = acc[0];
            for &part in &acc[1..] {
                total = S::add(total, part);
            }
            scores.add(r * stride + key).write(S::sum(total));
        }
    }
    R
}

/// `out[r] += sum over keys of probabilities[r][key] * v[key]` for `R` rows, `N` keys at a time. Returns `R`.
#[inline(always)]
unsafe fn accumulate<S: Simd, V: Element, const R: usize, const N: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut key = 0;
    while key + N <= keys {
        accumulate_keys::<S, V, R, N>(probabilities.add(key), stride, v, key, out, width);
        key += N;
    }
    while key < keys {
        accumulate_keys::<S, V, R, 1>(probabilities.add(key), stride, v, key, out, width);
        key += 1;
    }
    R
}

/// [`accumulate`] for the `N` keys from `key` on.
#[inline(always)]
unsafe fn accumulate_keys<S: Simd, V: Element, const R: usize, const N: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    key: usize,
    out: *mut f32,
    width: usize,
) {
    let p: [[S::Vector; N]; R] =
        std::array::from_fn(|r| std::array::from_fn(|n| S::splat(probabilities.add(r * stride + n).read())));
    let rows: [*const V; N] = std::array::from_fn(|n| v.row(key + n));
    for n in 0..N {
        v.prefetch_behind::<S>(key + n);
    }
    for column in (0..width).step_by(S::LANES) {
        let x: [S::Vector; N] = std::array::from_fn(|n| V::load::<S>(rows[n].add(column)));
        for (r, p) in p.iter().enumerate() {
            let to = out.add(r * width + column);
            let mut sum = S::load(to);
            for (n, &p) in p.iter().enumerate() {
                sum = S::fma(p, x[n], sum);
            }
            S::store(to, sum);
        }
    }
}

/// [`accumulate`] for a single row, `N` vectors of columns at a time: with one probability a key, the sums fit in
/// registers and nothing but `v` is read.
#[inline(always)]
unsafe fn accumulate_one<S: Simd, V: Element, const N: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut column = 0;
    while column + N * S::LANES <= width {
        accumulate_columns::<S, V, N>(probabilities, v, column, keys, out.add(column));
        column += N * S::LANES;
    }
    while column < width {
        accumulate_columns::<S, V, 1>(probabilities, v, column, keys, out.add(column));
        column += S::LANES;
    }
    1
}

/// [`accumulate_one`] for the `N` vectors of columns from `column` on.
#[inline(always)]
unsafe fn accumulate_columns<S: Simd, V: Element, const N: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    column: usize,
    keys: usize,
    out: *mut f32,
) {
    let mut acc: [S::Vector; N] = std::array::from_fn(|n| S::load(out.add(n * S::LANES)));
    for key in 0..keys {
        if column == 0 {
            v.prefetch_behind::<S>(key);
        }
        let from = v.row(key).add(column);
        let p = S::splat(probabilities.add(key).read());
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = S::fma(p, V::load::<S>(from.add(n * S::LANES)), *acc);
        }
    }
    for (n, &acc) in acc.iter().enumerate() {
        S::store(out.add(n * S::LANES), acc);
    }
}
