//! The panel path: many query rows against blocks of keys.
//!
//! A task holds up to sixteen panels of query rows. For each block of keys, K is staged and V repacked once, then every
//! panel that sees the block computes `S^T = K Q^T`, the softmax with rows as lanes, and `O^T += V^T P^T`.

use std::ops::Range;

use mtlflashattn_core::Strides;
use mtlflashattn_core::dropout::GROUP;

use crate::call::{Call, Task, Work, normalizer};
use crate::dropout::PanelDropout;
use crate::element::{Element, narrow, widen};
use crate::interrupt::Ticker;
use crate::isa::{Simd, load_row, store_row};
use crate::modify::PanelScores;
use crate::rows::{AHEAD, Rows, prefetch};
use crate::workspace::Carver;
use crate::{math, score};

/// Offsets of the pieces of a thread's scratch block, in float32 values.
#[derive(Clone, Copy)]
pub(crate) struct Scratch {
    /// Padded head dimensions: what the tiles read and write.
    depth: usize,
    query_depth: usize,
    value_dim: usize,
    queries: usize,
    out: usize,
    max: usize,
    sum: usize,
    scores: usize,
    keys: usize,
    values: usize,
    rows: usize,
    lanes: usize,
    len: usize,
}

impl Scratch {
    /// The layout for tasks of at most `task_rows` rows against blocks of at most `key_block` keys.
    pub(crate) fn new<S: Simd>(call: &Call<'_>, task_rows: usize, key_block: usize) -> Self {
        let problem = call.problem;
        let rows = task_rows.next_multiple_of(S::PANEL);
        let key_block = key_block.next_multiple_of(S::TILE.max(S::LANES));
        let depth = problem.head_dim.next_multiple_of(4);
        let query_depth = problem.head_dim.next_multiple_of(S::LANES.max(4));
        let value_dim = problem.value_dim.next_multiple_of(S::LANES.max(S::TILE));
        let widest = query_depth.max(value_dim).max(if problem.bias.is_some() { key_block } else { 0 });
        let mut carver = Carver::default();
        let mut scratch = Self {
            depth,
            query_depth,
            value_dim,
            queries: carver.take(rows * query_depth),
            out: carver.take(rows * value_dim),
            max: carver.take(rows),
            sum: carver.take(rows),
            scores: carver.take(key_block * S::PANEL),
            keys: carver.take(key_block * depth),
            values: carver.take(key_block * value_dim),
            rows: carver.take(S::LANES.max(4) * widest),
            lanes: carver.take(4 * S::PANEL),
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

/// One block of keys, ready for the products.
struct Block {
    keys: Range<usize>,
    /// Their number, filled up to whole tiles.
    padded: usize,
    /// K as float32 rows, `stride` values apart. V lies packed in the scratch memory.
    k: *const f32,
    stride: usize,
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
    let panels = task.rows.len().div_ceil(S::PANEL);
    for panel in 0..panels {
        work.pack_queries::<S, T>(panel);
        work.clear::<S>(panel);
    }
    for keys in call.blocks(task, call.tile.key_block) {
        if ticker.should_stop() {
            return;
        }
        work.attend_block::<S, T>(keys, panels);
    }
    for panel in 0..panels {
        work.finish::<S, T>(panel);
    }
}

impl Work<'_, '_, Scratch> {
    const fn queries<S: Simd>(&self, panel: usize) -> usize {
        self.scratch.queries + panel * S::PANEL * self.scratch.query_depth
    }

    const fn out<S: Simd>(&self, panel: usize) -> usize {
        self.scratch.out + panel * S::PANEL * self.scratch.value_dim
    }

    /// Rows of panel `panel`; none behind the last.
    fn panel_rows<S: Simd>(&self, panel: usize) -> Range<usize> {
        let start = (self.task.rows.start + panel * S::PANEL).min(self.task.rows.end);
        start..(start + S::PANEL).min(self.task.rows.end)
    }

    /// Vectors that hold the rows of a panel; the last panel of a task may need fewer than the others.
    fn vectors<S: Simd>(&self, panel: usize) -> usize {
        self.panel_rows::<S>(panel).len().div_ceil(S::LANES)
    }

    /// Whether `lanes` rows of q or out from `lane` on can be transposed where they lie: full vectors of float32 rows
    /// of equal distance.
    #[inline(always)]
    fn in_place<S: Simd, T: Element>(&self, lane: usize, rows: &Range<usize>, dim: usize) -> bool {
        T::IS_F32 && self.call.group == 1 && lane + S::LANES <= rows.len() && dim.is_multiple_of(S::LANES)
    }

    /// Transposes the panel's rows of q, scaled, to `[query_depth][PANEL]`.
    #[inline(always)]
    unsafe fn pack_queries<S: Simd, T: Element>(&self, panel: usize) {
        let (rows, depth) = (self.panel_rows::<S>(panel), self.scratch.query_depth);
        self.prefetch_queries::<S, T>(panel + 1);
        let factor = S::splat(score::query_factor(self.call.problem));
        for lane in (0..rows.len()).step_by(S::LANES) {
            let (from, stride) = if self.in_place::<S, T>(lane, &rows, self.call.problem.head_dim) {
                let from = self.call.q_row::<f32>(self.task, rows.start + lane);
                (from, self.call.problem.q.row as isize)
            } else {
                (self.stage_queries::<S, T>(lane, &rows), depth as isize)
            };
            let packed = self.at(self.queries::<S>(panel) + lane);
            for column in (0..depth).step_by(S::LANES) {
                let to = packed.add(column * S::PANEL);
                S::transpose(from.add(column), stride, factor, to, S::PANEL as isize);
            }
        }
    }

    /// Converts a vector's worth of rows of q; rows behind the last are zeros.
    #[inline(always)]
    unsafe fn stage_queries<S: Simd, T: Element>(&self, lane: usize, rows: &Range<usize>) -> *const f32 {
        let (staged, depth) = (self.at(self.scratch.rows), self.scratch.query_depth);
        for i in 0..S::LANES {
            let (row, to) = (rows.start + lane + i, staged.add(i * depth));
            if row < rows.end {
                let from = self.call.q_row::<T>(self.task, row);
                widen::<S, T>(from, self.call.problem.head_dim, depth, to);
            } else {
                to.write_bytes(0, depth);
            }
        }
        staged
    }

    /// Asks for a panel's rows of q where rows of one head lie apart.
    #[inline(always)]
    unsafe fn prefetch_queries<S: Simd, T: Element>(&self, panel: usize) {
        let width = self.call.problem.head_dim;
        if self.call.problem.q.row != width as i64 {
            for row in self.panel_rows::<S>(panel) {
                prefetch::<S>(self.call.q_row::<T>(self.task, row).cast(), width * size_of::<T>());
            }
        }
    }

    /// Empty softmax state: nothing accumulated, or only the sink. The first block of keys overwrites the output.
    #[inline(always)]
    unsafe fn clear<S: Simd>(&self, panel: usize) {
        if self.call.visible_to(self.task, &self.panel_rows::<S>(panel)).is_empty() {
            self.at(self.out::<S>(panel)).write_bytes(0, S::PANEL * self.scratch.value_dim);
        }
        let (max, sum) = (self.at(self.scratch.max + panel * S::PANEL), self.at(self.scratch.sum + panel * S::PANEL));
        for lane in 0..S::PANEL {
            max.add(lane).write(f32::MIN);
            sum.add(lane).write(0.0);
        }
        if self.call.problem.sinks.is_some() && self.task.first_split {
            for (lane, row) in self.panel_rows::<S>(panel).enumerate() {
                if let Some(sink) = self.call.sink(self.task, row) {
                    max.add(lane).write(sink);
                    sum.add(lane).write(1.0);
                }
            }
        }
    }

    /// All panels against the keys of one block.
    #[inline(always)]
    unsafe fn attend_block<S: Simd, T: Element>(&self, keys: Range<usize>, panels: usize) {
        let padded = keys.len().next_multiple_of(S::TILE);
        let (k, stride) = self.stage_keys::<S, T>(&keys, padded);
        self.pack_values::<S, T>(&keys, padded);
        let block = Block { keys, padded, k, stride };
        let keys = &block.keys;
        for panel in 0..panels {
            let visible = self.call.visible_to(self.task, &self.panel_rows::<S>(panel));
            let start = visible.start.max(keys.start);
            let end = visible.end.min(keys.end);
            if start < end {
                // Whole tiles, relative to the block.
                let start = (start - keys.start) / S::TILE * S::TILE;
                let end = (end - keys.start).next_multiple_of(S::TILE);
                let first = visible.start >= keys.start;
                self.attend::<S>(panel, &block, start..end, first);
            }
        }
    }

    /// K of the block as float32 rows: in place where that is what lies there, else copied. Returns the stride.
    #[inline(always)]
    unsafe fn stage_keys<S: Simd, T: Element>(&self, keys: &Range<usize>, padded: usize) -> (*const f32, usize) {
        let (head_dim, depth) = (self.call.problem.head_dim, self.scratch.depth);
        let source = (self.call.inputs.k, &self.call.problem.k, head_dim);
        let to = self.at(self.scratch.keys);
        for run in self.call.runs(&self.task.sequence, keys.clone()) {
            let rows = self.rows_of::<T>(source, run.start);
            // Rows that lie apart would compete for few cache sets.
            if T::IS_F32 && rows.contiguous() && depth == head_dim && padded == run.len() {
                return (rows.row(0).cast(), depth);
            }
            for (row, key) in run.enumerate() {
                rows.prefetch_behind::<S>(row);
                widen::<S, T>(rows.row(row), head_dim, depth, to.add((key - keys.start) * depth));
            }
        }
        to.add(keys.len() * depth).write_bytes(0, (padded - keys.len()) * depth);
        (to, depth)
    }

    /// Rows of K or V of the task's head from `key` on.
    fn rows_of<T>(&self, source: (*const u8, &Strides, usize), key: usize) -> Rows<T> {
        self.call.rows(source, &self.task.sequence, key, self.task.key_head, AHEAD)
    }

    /// V of the block as `[value_dim / TILE][keys][TILE]`, the order in which the values tile reads it.
    #[inline(always)]
    unsafe fn pack_values<S: Simd, T: Element>(&self, keys: &Range<usize>, padded: usize) {
        let source = (self.call.inputs.v, &self.call.problem.v, self.call.problem.value_dim);
        for run in self.call.runs(&self.task.sequence, keys.clone()) {
            // Rows behind the last key are zeros, up to whole tiles.
            let end = if run.end == keys.end { keys.start + padded } else { run.end };
            let place = run.start - keys.start..end - keys.start;
            self.pack_run::<S, T>(self.rows_of(source, run.start), run.len(), place, padded);
        }
    }

    /// `count` rows of V to `place` in the packed block, which ends with rows of zeros where it is longer.
    #[inline(always)]
    unsafe fn pack_run<S: Simd, T: Element>(&self, source: Rows<T>, count: usize, place: Range<usize>, padded: usize) {
        /// Rows moved together, so that stores fill whole cache lines.
        const ROWS: usize = 4;
        let value_dim = self.call.problem.value_dim;
        let columns = value_dim.next_multiple_of(S::TILE);
        debug_assert!(place.len().is_multiple_of(ROWS), "pages hold whole groups of rows");
        let (staged, packed) = (self.at(self.scratch.rows), self.at(self.scratch.values));
        let in_place = T::IS_F32 && columns == value_dim;
        for key in (0..place.len()).step_by(ROWS) {
            let rows: [*const f32; ROWS] = std::array::from_fn(|i| {
                let to = staged.add(i * self.scratch.value_dim);
                source.prefetch_behind::<S>(key + i);
                if key + i >= count {
                    to.write_bytes(0, columns);
                } else if in_place {
                    return source.row(key + i).cast();
                } else {
                    widen::<S, T>(source.row(key + i), value_dim, columns, to);
                }
                to.cast_const()
            });
            for column in (0..columns).step_by(S::TILE) {
                let to = packed.add(column * padded + (place.start + key) * S::TILE);
                for (i, row) in rows.iter().enumerate() {
                    row.add(column).copy_to_nonoverlapping(to.add(i * S::TILE), S::TILE);
                }
            }
        }
    }

    /// One panel against `tiles`, a range of keys relative to the block. The `first` keys of a panel find no output.
    #[inline(always)]
    unsafe fn attend<S: Simd>(&self, panel: usize, block: &Block, tiles: Range<usize>, first: bool) {
        let (keys, stride) = (&block.keys, block.stride);
        let vectors = self.vectors::<S>(panel);
        let scores = self.at(self.scratch.scores);
        let old = load_row::<S>(self.at(self.scratch.max + panel * S::PANEL));
        let (mut new, mut unknown) = (old, old);
        let rows = self.panel_rows::<S>(panel);
        let panel_scores = PanelScores {
            call: self.call,
            task: self.task,
            rows: &rows,
            keys,
            scores,
            lanes: self.at(self.scratch.lanes),
            staged: self.at(self.scratch.rows),
        };
        let inner = panel_scores.final_tiles::<S>(&tiles);
        let queries = self.at(self.queries::<S>(panel));
        for key in tiles.clone().step_by(S::TILE) {
            let to = scores.add(key * S::PANEL);
            // The maximum over scores that are still to be changed is of no use.
            let max = if inner.contains(&key) { &mut new } else { &mut unknown };
            S::scores(vectors, block.k.add(key * stride), stride, queries, self.scratch.depth, to, max);
        }
        if inner != tiles {
            panel_scores.modify::<S>(&tiles);
            for key in (tiles.start..inner.start).chain(inner.end..tiles.end) {
                for (n, max) in new.as_mut()[..vectors].iter_mut().enumerate() {
                    *max = S::max(S::load(scores.add(key * S::PANEL + n * S::LANES)), *max);
                }
            }
        }
        let rescale = self.softmax::<S>(panel, &tiles, old, new);
        if let Some(dropout) = PanelDropout::new::<S>(self.call, self.task, &rows) {
            for (group, in_group) in PanelDropout::groups(keys.start, &tiles) {
                let factors = dropout.factors(group);
                for key in in_group {
                    let factors = factors[(keys.start + key) % GROUP].as_ptr();
                    for n in (0..S::PANEL).step_by(S::LANES) {
                        let p = scores.add(key * S::PANEL + n);
                        S::store(p, S::mul(S::load(factors.add(n)), S::load(p)));
                    }
                }
            }
        }
        let rescale = if first { None } else { Some(&rescale) };
        let values = self.at(self.scratch.values);
        let out = self.at(self.out::<S>(panel));
        let probabilities = scores.add(tiles.start * S::PANEL);
        for column in (0..self.call.problem.value_dim).step_by(S::TILE) {
            let from = values.add(column * block.padded + tiles.start * S::TILE);
            S::values(vectors, from, probabilities, tiles.len(), out.add(column * S::PANEL), rescale);
        }
    }

    /// Scores become probabilities relative to the new maximum. Returns the factor for what was accumulated before.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, panel: usize, tiles: &Range<usize>, old: S::Row, new: S::Row) -> S::Row {
        let scores = self.at(self.scratch.scores);
        let (max, sum) = (self.at(self.scratch.max + panel * S::PANEL), self.at(self.scratch.sum + panel * S::PANEL));
        let (mut rescale, mut total) = (old, new);
        let vectors = self.vectors::<S>(panel);
        for n in 0..vectors {
            rescale.as_mut()[n] = math::exp2::<S>(S::sub(old.as_ref()[n], new.as_ref()[n]));
            total.as_mut()[n] = S::mul(rescale.as_ref()[n], S::load(sum.add(n * S::LANES)));
        }
        // One vector of rows after the other: their maxima, sums and the constants of exp2 fit in sixteen registers.
        for n in 0..vectors {
            let (max, mut sum) = (new.as_ref()[n], total.as_ref()[n]);
            for key in tiles.clone() {
                let p = scores.add(key * S::PANEL + n * S::LANES);
                let probability = math::exp2::<S>(S::sub(S::load(p), max));
                sum = S::add(sum, probability);
                S::store(p, probability);
            }
            total.as_mut()[n] = sum;
        }
        store_row::<S>(max, &new);
        store_row::<S>(sum, &total);
        rescale
    }

    /// Normalises the panel and writes its rows to the output, or unnormalised to the partial results.
    #[inline(always)]
    unsafe fn finish<S: Simd, T: Element>(&self, panel: usize) {
        let rows = self.panel_rows::<S>(panel);
        let (max, sum) = (self.at(self.scratch.max + panel * S::PANEL), self.at(self.scratch.sum + panel * S::PANEL));
        self.prefetch_out::<S, T>(panel + 1);
        if let Some(partial) = self.task.partial {
            return self.finish_partial::<S>(panel, &rows, partial);
        }
        let factors = self.at(self.scratch.lanes);
        for lane in 0..S::PANEL {
            factors.add(lane).write(normalizer(sum.add(lane).read()));
        }
        for lane in (0..rows.len()).step_by(S::LANES) {
            let (out, factor) = (self.at(self.out::<S>(panel) + lane), S::load(factors.add(lane)));
            if self.in_place::<S, T>(lane, &rows, self.call.problem.value_dim) {
                let to = self.call.out_row::<f32>(self.task, rows.start + lane);
                let stride = self.call.outputs.out_strides.row as isize;
                // Behind the last column lies the next row, or memory of somebody else: the padding stays out.
                transpose_out::<S>(out, factor, self.call.problem.value_dim, to, stride);
            } else {
                let (staged, stride) = (self.at(self.scratch.rows), self.scratch.value_dim);
                transpose_out::<S>(out, factor, stride, staged, stride as isize);
                for i in 0..S::LANES.min(rows.len() - lane) {
                    let to = self.call.out_row::<T>(self.task, rows.start + lane + i);
                    narrow::<S, T>(staged.add(i * stride), self.call.problem.value_dim, to);
                }
            }
        }
        for (lane, row) in rows.enumerate() {
            self.call.write_lse(self.task, row, max.add(lane).read(), sum.add(lane).read());
        }
    }

    /// Output, maximum and sum of each row for [`crate::merge`].
    #[inline(always)]
    unsafe fn finish_partial<S: Simd>(&self, panel: usize, rows: &Range<usize>, partial: *mut f32) {
        let value_dim = self.call.problem.value_dim;
        let (staged, stride) = (self.at(self.scratch.rows), self.scratch.value_dim);
        for (lane, row) in rows.clone().enumerate() {
            if lane % S::LANES == 0 {
                let out = self.at(self.out::<S>(panel) + lane);
                transpose_out::<S>(out, S::splat(1.0), stride, staged, stride as isize);
            }
            let to = partial.add((row - self.task.rows.start) * (value_dim + 2));
            to.copy_from_nonoverlapping(staged.add(lane % S::LANES * stride), value_dim);
            to.add(value_dim).write(self.at(self.scratch.max + panel * S::PANEL + lane).read());
            to.add(value_dim + 1).write(self.at(self.scratch.sum + panel * S::PANEL + lane).read());
        }
    }

    /// Asks for a panel's output rows where rows of one head lie apart.
    #[inline(always)]
    unsafe fn prefetch_out<S: Simd, T: Element>(&self, panel: usize) {
        let width = self.call.problem.value_dim;
        if self.task.partial.is_none() && self.call.outputs.out_strides.row != width as i64 {
            for row in self.panel_rows::<S>(panel) {
                prefetch::<S>(self.call.out_row::<T>(self.task, row).cast(), width * size_of::<T>());
            }
        }
    }
}

/// `[columns][PANEL]` times `factor` becomes rows; `columns` is a multiple of the lanes.
#[inline(always)]
unsafe fn transpose_out<S: Simd>(out: *const f32, factor: S::Vector, columns: usize, to: *mut f32, stride: isize) {
    for column in (0..columns).step_by(S::LANES) {
        S::transpose(out.add(column * S::PANEL), S::PANEL as isize, factor, to.add(column), stride);
    }
}
