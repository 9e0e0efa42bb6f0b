//! The decode path: a few query rows against each key, at the rate of memory.
//!
//! Up to four rows share every load (and conversion) of K and V. Rows of K and V are read one after another from end to
//! end, the order that hardware prefetchers follow.

mod pairs;
mod products;

use std::ops::Range;

use mtlflashattn_core::Strides;

use crate::call::{Call, Task, Work, normalizer};
use crate::element::{Element, narrow, widen};
use crate::interrupt::Ticker;
use crate::isa::Simd;
use crate::rows::Rows;
use crate::schedule::Schedule;
use crate::workspace::Carver;
use crate::{dropout, math, score};
use pairs::{PairDots, Pairs};
use products::{Dots, ROW, Sums, dot_one, row_group, sum_one};

/// Bytes of K or V of one head that are read in one go: a quarter of a 32 KiB first-level cache.
const HEAD_BYTES: usize = 8 * 1024;

/// How K and V are read. Found by measuring; no bit depends on it but for the block.
#[derive(Clone, Copy)]
struct Pace {
    /// Keys of one block, whose scores are held: a divisor of the panel path's block.
    block: usize,
    /// Bytes of K or V that all heads read before the first goes on.
    turn: usize,
    /// How far ahead of them memory is asked for, in bytes.
    ahead: usize,
}

/// One query passes at about the rate of memory: short turns are what hardware prefetchers follow.
const FAST: Pace = Pace { block: 32, turn: 32 * 1024, ahead: 32 * 1024 };
/// Several queries make each key take longer. Larger blocks make light of their softmax.
const SLOW: Pace = Pace { block: ROW, turn: 64 * 1024, ahead: 64 * 1024 };

/// Offsets of the pieces of a thread's scratch block, in float32 values.
#[derive(Clone, Copy)]
pub(crate) struct Scratch {
    /// Padded head dimensions.
    depth: usize,
    value_dim: usize,
    pace: Pace,
    pairs: Option<Pairs>,
    queries: usize,
    /// One query in float32.
    query: usize,
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
    /// The layout for the tasks of `schedule`, of at most `rows` rows a key head.
    ///
    /// # Safety
    /// `call` must hold valid buffers.
    pub(crate) unsafe fn new<S: Simd>(call: &Call<'_>, schedule: &Schedule<'_>, rows: usize) -> Self {
        let rows = rows * schedule.task_heads();
        let problem = call.problem;
        let depth = problem.head_dim.next_multiple_of(S::LANES);
        let value_dim = problem.value_dim.next_multiple_of(S::LANES);
        let pace = if call.tile.task_rows == 1 { FAST } else { SLOW };
        let block = pace.block;
        let mut carver = Carver::default();
        let mut scratch = Self {
            depth,
            value_dim,
            pace,
            pairs: Pairs::of::<S>(call, schedule),
            queries: carver.take(rows * depth),
            query: carver.take(depth),
            out: carver.take(rows * value_dim),
            state: carver.take(rows * 2),
            scores: carver.take(rows * ROW),
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
    for keys in call.blocks(task, scratch.pace.block) {
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

    /// How scores are computed from bfloat16, if they are: known to be not where no machine with the set can do it.
    #[inline(always)]
    fn pairs<S: Simd>(&self) -> Option<Pairs> {
        self.scratch.pairs.filter(|_| S::BF16_DOT)
    }

    /// Packs q; empties the softmax state and the output.
    #[inline(always)]
    unsafe fn start<S: Simd, T: Element>(&self) {
        let mut i = 0;
        while i < self.rows() {
            let left = self.head_rows() - i % self.head_rows();
            let group = row_group(left);
            for r in 0..group {
                match self.pairs::<S>() {
                    Some(pairs) => self.pack_pairs::<S>(pairs, i + r, (r, group)),
                    None => self.pack_query::<S, T>(i + r, (r, group)),
                }
            }
            i += group;
        }
        for i in 0..self.rows() {
            let (task, row) = self.row(i);
            let sink = if task.first_split { self.call.sink(&task, row) } else { None };
            let (max, sum) = sink.map_or((f32::MIN, 0.0), |sink| (sink, 1.0));
            self.at(self.scratch.state + 2 * i).write(max);
            self.at(self.scratch.state + 2 * i + 1).write(sum);
        }
        self.at(self.scratch.out).write_bytes(0, self.rows() * self.scratch.value_dim);
    }

    /// Converts and scales row number `i` of q, number `r` of a group of rows that meet keys together: pairs of vectors in
    /// the order in which k is read, those of the group side by side.
    #[inline(always)]
    unsafe fn pack_query<S: Simd, T: Element>(&self, i: usize, (r, group): (usize, usize)) {
        let (head_dim, depth) = (self.call.problem.head_dim, self.scratch.depth);
        let (task, row) = self.row(i);
        let from = self.call.q_row::<T>(&task, row);
        let staged = self.at(self.scratch.query);
        widen::<S, T>(from, head_dim, depth, staged);
        let factor = S::splat(score::query_factor(self.call.problem));
        let to = self.at(self.scratch.queries + (i - r) * depth);
        let mut column = 0;
        while column + 2 * S::LANES <= depth {
            let [a, b] = if depth == head_dim {
                T::load_pair::<S>(from.add(column))
            } else {
                f32::load_pair::<S>(staged.add(column))
            };
            let to = to.add(group * column + 2 * r * S::LANES);
            S::store(to, S::mul(factor, a));
            S::store(to.add(S::LANES), S::mul(factor, b));
            column += 2 * S::LANES;
        }
        if column < depth {
            let to = to.add(group * column + r * S::LANES);
            S::store(to, S::mul(factor, S::load(staged.add(column))));
        }
    }

    /// Packs row number `i` of q, number `r` of a group, as bfloat16.
    unsafe fn pack_pairs<S: Simd>(&self, pairs: Pairs, i: usize, (r, group): (usize, usize)) {
        let (task, row) = self.row(i);
        let q = std::slice::from_raw_parts(self.call.q_row::<u16>(&task, row), self.scratch.depth);
        pairs.pack::<S>(q, (r, group), self.packed_pairs(i - r));
    }

    /// Queries from row number `i` on as [`Self::pack_pairs`] leaves them.
    unsafe fn packed_pairs(&self, i: usize) -> *mut u16 {
        self.at(self.scratch.queries).cast::<u16>().add(i * self.scratch.depth)
    }

    /// Puts a row of the output, whose columns are in the order in which v was read, in the order of memory.
    #[inline(always)]
    unsafe fn order_columns<S: Simd, T: Element>(&self, out: *mut f32) {
        let width = self.scratch.value_dim;
        if width == self.call.problem.value_dim {
            for column in (0..(width + 1).saturating_sub(2 * S::LANES)).step_by(2 * S::LANES) {
                let to = out.add(column);
                let [a, b] = T::in_order::<S>([S::load(to), S::load(to.add(S::LANES))]);
                S::store(to, a);
                S::store(to.add(S::LANES), b);
            }
        }
    }

    /// Row number `i` of all heads: the task of its head, and its number there.
    fn row(&self, i: usize) -> (Task, usize) {
        let rows = self.head_rows();
        (self.call.of_head(self.task, i / rows), self.task.rows.start + i % rows)
    }

    /// Parts of a block of `keys` that each head takes in turn: short ones where several heads lie side by side, so
    /// that memory is read about in the order in which it lies. The rows of a part lie at equal distances.
    fn parts<T>(&self, keys: &Range<usize>, width: usize) -> impl Iterator<Item = Range<usize>> {
        let bytes = (self.scratch.pace.turn / self.task.heads).min(HEAD_BYTES);
        let size = (bytes / (width * size_of::<T>())).clamp(1, keys.len());
        let parts = keys.clone().step_by(size).map(move |start| start..start + size);
        let end = keys.end;
        parts.flat_map(move |part| self.call.runs(&self.task.sequence, part.start..part.end.min(end)))
    }

    /// The rows of K or V of the task's first head from `key` on.
    fn rows_of<T>(&self, source: (*const u8, &Strides, usize), key: usize) -> Rows<T> {
        // Hardware prefetchers follow one row after the other by themselves, unless several queries make it slow.
        let ahead = if self.head_rows() == 1 && source.1.row == source.2 as i64 {
            0
        } else {
            self.scratch.pace.ahead.div_ceil(self.task.heads * source.2 * size_of::<T>())
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
                if let Some(pairs) = self.pairs::<S>() {
                    self.pair_dots::<S>(pairs.factor, head, k.cast(), &place);
                } else if depth == head_dim {
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

    /// Scores of one head's rows against the keys `part` of the block.
    #[inline(always)]
    unsafe fn dots<S: Simd, K: Element>(&self, head: usize, k: Rows<K>, part: &Range<usize>) {
        let (first, depth) = (head * self.head_rows(), self.scratch.depth);
        let queries = self.at(self.scratch.queries + first * depth);
        let scores = self.at(self.scratch.scores + first * ROW + part.start);
        // For a single row a call apart would take longer than it gains.
        if self.head_rows() == 1 {
            dot_one::<S, K>(queries, depth, k, part.len(), scores);
        } else {
            S::apart(Dots { rows: self.head_rows(), queries, depth, k, keys: part.len(), scores });
        }
    }

    /// The same from bfloat16 as it is.
    #[inline(always)]
    unsafe fn pair_dots<S: Simd>(&self, factor: f32, head: usize, k: Rows<u16>, part: &Range<usize>) {
        let (rows, depth) = (self.head_rows(), self.scratch.depth);
        let (first, keys) = (head * rows, part.len());
        let queries = self.packed_pairs(first).cast_const();
        let scores = self.at(self.scratch.scores + first * ROW + part.start);
        S::apart_bf16(PairDots { rows, queries, factor, depth, k, keys, scores });
    }

    /// Accumulates values in one head's rows.
    #[inline(always)]
    unsafe fn sums<S: Simd, V: Element>(&self, head: usize, v: Rows<V>, part: &Range<usize>) {
        let (first, width) = (head * self.head_rows(), self.scratch.value_dim);
        let probabilities = self.at(self.scratch.scores + first * ROW + part.start);
        let out = self.at(self.scratch.out + first * width);
        if self.head_rows() == 1 {
            sum_one::<S, V>(probabilities, v, part.len(), out, width);
        } else {
            S::apart(Sums { rows: self.head_rows(), probabilities, v, keys: part.len(), out, width });
        }
    }

    /// Modifies the scores of every row, turns them into probabilities and rescales what was accumulated.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, keys: &Range<usize>) {
        let padded = keys.len().next_multiple_of(S::LANES);
        let mut i = 0;
        for head in 0..self.task.heads {
            for row in self.task.rows.clone() {
                let scores = self.at(self.scratch.scores + i * ROW);
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
            self.order_columns::<S, T>(out);
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
