//! A block of rows against blocks of keys: five products of the forward pass's kernels.
//!
//! Lanes are rows, as in the forward pass: `S^T = K Q^T` and `dP^T = V dO^T` come from [`Simd::scores`], and
//! `dQ^T += K^T dS^T` from [`Simd::values`]. `dV += P^T dO` and `dK += dS^T Q` sum over the lanes: there the columns of dO
//! and Q take the place of the lanes ([`Simd::accumulate`]), so that no matrix of scores is ever transposed.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use mtlflashattn_core::Problem;
use mtlflashattn_core::dropout::GROUP;

use super::Backward;
use super::schedule::{Columns, Head};
use crate::call::Task;
use crate::dropout::PanelDropout;
use crate::element::{Element, narrow, widen};
use crate::interrupt::Ticker;
use crate::isa::{Simd, load_row};
use crate::modify::PanelScores;
use crate::rows::{Rows, prefetch};
use crate::workspace::Carver;
use crate::{math, score};

/// Most panels of a block, as [`mtlflashattn_core::CpuBackwardTile`] has them.
const MAX_PANELS: usize = 16;

/// What one thread computes at once: some rows of a key head against all keys.
pub(super) struct Part {
    pub(super) task: Task,
    pub(super) head: Head,
    /// Where its sums lie among those of its head.
    pub(super) sums: usize,
    /// A value for each query head of the key head.
    pub(super) sinks: *mut f32,
}

/// Offsets of the pieces of a thread's scratch block, in float32 values.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    block_rows: usize,
    key_block: usize,
    /// Padded dimensions: what the tiles read and write.
    depth: usize,
    value_depth: usize,
    query_depth: usize,
    out_depth: usize,
    query_columns: usize,
    /// Values of a staged row.
    widest: usize,
    queries: usize,
    d_outs: usize,
    query_rows: usize,
    d_out_rows: usize,
    d_queries: usize,
    lse: usize,
    delta: usize,
    weights: usize,
    d_scores: usize,
    tanh: usize,
    keys: usize,
    packed_keys: usize,
    values: usize,
    staged: usize,
    lanes: usize,
    len: usize,
}

impl Scratch {
    pub(super) fn new<S: Simd>(backward: &Backward<'_>) -> Self {
        let (problem, tile): (&Problem, _) = (backward.call.problem, backward.call.tile);
        let block_rows = tile.task_rows.next_multiple_of(S::PANEL);
        let key_block = tile.key_block.next_multiple_of(S::TILE.max(S::LANES));
        let chunked = |dim: usize| dim.next_multiple_of(S::PANEL);
        let query_depth = problem.head_dim.next_multiple_of(S::LANES.max(4));
        let out_depth = problem.value_dim.next_multiple_of(S::LANES.max(4));
        let query_columns = problem.head_dim.next_multiple_of(S::LANES.max(S::TILE));
        let depth = problem.head_dim.next_multiple_of(4);
        let value_depth = problem.value_dim.next_multiple_of(4);
        let widest = query_columns.max(chunked(problem.head_dim)).max(chunked(problem.value_dim)).max(query_depth);
        let widest = widest.max(out_depth).max(if problem.bias.is_some() { key_block } else { 0 });
        let scores = block_rows * key_block;
        let mut carver = Carver::default();
        let mut scratch = Self {
            block_rows,
            key_block,
            depth,
            value_depth,
            query_depth,
            out_depth,
            query_columns,
            widest,
            queries: carver.take(block_rows * query_depth),
            d_outs: carver.take(block_rows * out_depth),
            query_rows: carver.take(block_rows * chunked(problem.head_dim)),
            d_out_rows: carver.take(block_rows * chunked(problem.value_dim)),
            d_queries: carver.take(block_rows * query_columns),
            lse: carver.take(block_rows),
            delta: carver.take(block_rows),
            weights: carver.take(scores),
            d_scores: carver.take(scores),
            tanh: carver.take(if problem.softcap > 0.0 { key_block * S::PANEL } else { 0 }),
            keys: carver.take(key_block * depth),
            packed_keys: carver.take(key_block * query_columns),
            values: carver.take(key_block * value_depth),
            staged: carver.take(2 * S::LANES.max(4) * widest),
            lanes: carver.take(4 * S::PANEL),
            len: 0,
        };
        scratch.len = carver.len();
        scratch
    }

    /// Float32 values in the block.
    pub(super) const fn len(&self) -> usize {
        self.len
    }
}

/// One part on one thread.
struct Work<'a, 'b> {
    backward: &'a Backward<'b>,
    part: &'a Part,
    sums: *mut f32,
    scratch: Scratch,
    block: *mut f32,
}

/// A block of keys, ready for the products.
struct KeyBlock {
    keys: Range<usize>,
    /// Their number, filled up to whole tiles.
    padded: usize,
    /// K and V as float32 rows, each with its stride.
    k: (*const f32, usize),
    v: (*const f32, usize),
}

/// Runs `part` in the scratch memory `block`. It adds to `sums`, which are laid out as the columns of its head say.
///
/// # Safety
/// `backward` must hold valid buffers, `sums` those of a part, `block` the floats that `scratch` asks for, and `S` must be available.
#[inline(always)]
pub(super) unsafe fn run<S: Simd, T: Element>(
    backward: &Backward<'_>,
    part: &Part,
    sums: *mut f32,
    scratch: Scratch,
    block: *mut f32,
    ticker: &mut Ticker<'_>,
) {
    let work = Work { backward, part, sums, scratch, block };
    let rows = &part.task.rows;
    for start in (rows.start..rows.end).step_by(scratch.block_rows) {
        let rows = start..(start + scratch.block_rows).min(rows.end);
        let panels = rows.len().div_ceil(S::PANEL);
        for panel in 0..panels {
            work.pack_rows::<S, T>(&rows, panel);
        }
        let visible = backward.call.visible_to(&part.task, &rows);
        let first =
            if visible.is_empty() { visible.end } else { visible.start / scratch.key_block * scratch.key_block };
        for key in (first..visible.end).step_by(scratch.key_block) {
            if ticker.should_stop() {
                return;
            }
            let keys = key..(key + scratch.key_block).min(part.task.keys.end);
            work.differentiate::<S, T>(&rows, panels, keys);
        }
        if !backward.wanted.q.data.is_null() {
            for panel in 0..panels {
                work.finish::<S, T>(&rows, panel);
            }
        }
    }
}

impl Work<'_, '_> {
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        self.block.add(offset)
    }

    /// Rows of panel `panel` of a block.
    fn panel_rows<S: Simd>(rows: &Range<usize>, panel: usize) -> Range<usize> {
        let start = rows.start + panel * S::PANEL;
        start..(start + S::PANEL).min(rows.end)
    }

    /// Q and dO of a panel in both orders, LSE and delta of its rows; clears dQ. Lanes without a row hold zeros, and an
    /// LSE that gives them no weight.
    #[inline(always)]
    unsafe fn pack_rows<S: Simd, T: Element>(&self, rows: &Range<usize>, panel: usize) {
        let (scratch, problem) = (&self.scratch, self.backward.call.problem);
        let panel_rows = Self::panel_rows::<S>(rows, panel);
        let (staged, out) = (self.at(scratch.staged), self.at(scratch.staged + S::LANES.max(4) * scratch.widest));
        let factor = S::splat(score::query_factor(problem));
        for lane in (0..S::PANEL).step_by(S::LANES) {
            let behind = panel_rows.start + lane + S::LANES;
            self.prefetch_rows::<S, T>(behind..(behind + S::LANES).min(rows.end));
            for i in 0..S::LANES {
                let row = panel_rows.start + lane + i;
                self.stage::<S, T>(
                    row,
                    row < rows.end,
                    problem.head_dim,
                    staged.add(i * scratch.widest),
                    |work, row| work.backward.call.q_row::<T>(&work.part.task, row),
                );
            }
            let packed = self.at(scratch.queries + panel * S::PANEL * scratch.query_depth + lane);
            self.transpose::<S>(staged, scratch.query_depth, factor, packed);
            self.split_columns::<S>(staged, problem.head_dim, panel * S::PANEL + lane, scratch.query_rows);
            for i in 0..S::LANES {
                let (row, to) = (panel_rows.start + lane + i, staged.add(i * scratch.widest));
                self.stage::<S, T>(row, row < rows.end, problem.value_dim, to, |work, row| work.d_out_row(row));
                let at = panel * S::PANEL + lane + i;
                if row < rows.end {
                    let from = self.backward.call.out_row::<T>(&self.part.task, row);
                    widen::<S, T>(from, problem.value_dim, scratch.widest, out);
                    self.prepare_row::<S>(row, at, to, out);
                } else {
                    self.at(scratch.lse + at).write(f32::INFINITY);
                    self.at(scratch.delta + at).write(0.0);
                }
            }
            let packed = self.at(scratch.d_outs + panel * S::PANEL * scratch.out_depth + lane);
            self.transpose::<S>(staged, scratch.out_depth, S::splat(1.0), packed);
            self.split_columns::<S>(staged, problem.value_dim, panel * S::PANEL + lane, scratch.d_out_rows);
        }
        let d_queries = self.at(scratch.d_queries + panel * S::PANEL * scratch.query_columns);
        d_queries.write_bytes(0, S::PANEL * scratch.query_columns);
    }

    /// Asks for rows of q, dO and O: where the rows of a head lie apart, each of them would cost a miss.
    #[inline(always)]
    unsafe fn prefetch_rows<S: Simd, T: Element>(&self, rows: Range<usize>) {
        let (call, task) = (&self.backward.call, &self.part.task);
        let (head_bytes, value_bytes) =
            (call.problem.head_dim * size_of::<T>(), call.problem.value_dim * size_of::<T>());
        for row in rows {
            prefetch::<S>(call.q_row::<T>(task, row).cast(), head_bytes);
            prefetch::<S>(self.d_out_row::<T>(row).cast(), value_bytes);
            prefetch::<S>(call.out_row::<T>(task, row).cast(), value_bytes);
        }
    }

    /// A row as float32 with zeros behind it, or only zeros.
    #[inline(always)]
    unsafe fn stage<S: Simd, T: Element>(
        &self,
        row: usize,
        exists: bool,
        width: usize,
        to: *mut f32,
        pointer: impl Fn(&Self, usize) -> *const T,
    ) {
        if exists {
            widen::<S, T>(pointer(self, row), width, self.scratch.widest, to);
        } else {
            to.write_bytes(0, self.scratch.widest);
        }
    }

    unsafe fn d_out_row<T>(&self, row: usize) -> *const T {
        let given = self.backward.given;
        self.backward.call.query_row(given.out.cast_mut().cast::<T>(), &given.out_strides, &self.part.task, row)
    }

    /// LSE in units of log2 and `delta = dO . O - dLSE` of a row, and what it adds to the gradient of its sink.
    #[inline(always)]
    unsafe fn prepare_row<S: Simd>(&self, row: usize, at: usize, d_out: *const f32, out: *const f32) {
        let (backward, task) = (self.backward, &self.part.task);
        let mut sum = S::splat(0.0);
        for column in (0..backward.call.problem.value_dim).step_by(S::LANES) {
            sum = S::fma(S::load(d_out.add(column)), S::load(out.add(column)), sum);
        }
        let mut delta = S::sum(sum);
        let index = backward.call.lse_index(task, row);
        if !backward.given.lse.is_null() {
            delta -= backward.given.lse.add(index).read();
        }
        let lse = backward.call.outputs.lse.add(index).read();
        // A row that saw no key has neither weights nor gradients.
        let lse = if lse.is_infinite() { f32::INFINITY } else { lse * LOG2_E };
        if lse == f32::INFINITY {
            delta = 0.0;
        }
        self.at(self.scratch.lse + at).write(lse);
        self.at(self.scratch.delta + at).write(delta);
        if let Some(sink) = backward.call.sink(task, row) {
            *self.part.sinks.add(row % backward.call.group) -= (sink - lse).exp2() * delta;
        }
    }

    /// Staged rows to `[depth][PANEL]`.
    #[inline(always)]
    unsafe fn transpose<S: Simd>(&self, staged: *const f32, depth: usize, factor: S::Vector, to: *mut f32) {
        for column in (0..depth).step_by(S::LANES) {
            let stride = self.scratch.widest as isize;
            S::transpose(staged.add(column), stride, factor, to.add(column * S::PANEL), S::PANEL as isize);
        }
    }

    /// Staged rows to `[chunk][rows][PANEL]`, `at` rows from the beginning.
    #[inline(always)]
    unsafe fn split_columns<S: Simd>(&self, staged: *const f32, width: usize, at: usize, to: usize) {
        for (chunk, columns) in Columns::of_width::<S>(width).enumerate() {
            let to = self.at(to + (chunk * self.scratch.block_rows + at) * S::PANEL);
            for i in 0..S::LANES {
                let from = staged.add(i * self.scratch.widest + columns.start);
                for n in (0..columns.len()).step_by(S::LANES) {
                    S::store(to.add(i * S::PANEL + n), S::load(from.add(n)));
                }
            }
        }
    }

    /// All panels of a block of rows against a block of keys.
    #[inline(always)]
    unsafe fn differentiate<S: Simd, T: Element>(&self, rows: &Range<usize>, panels: usize, keys: Range<usize>) {
        let (call, scratch) = (&self.backward.call, &self.scratch);
        let (task, problem) = (&self.part.task, call.problem);
        let padded = keys.len().next_multiple_of(S::TILE);
        let k = Rows::new(call.k_base::<T>(task), problem.k.row as isize, problem.head_dim);
        let v = Rows::new(call.v_base::<T>(task), problem.v.row as isize, problem.value_dim);
        let block = KeyBlock {
            k: self.stage_rows::<S, T>(&k, &keys, padded, scratch.depth, scratch.keys),
            v: self.stage_rows::<S, T>(&v, &keys, padded, scratch.value_depth, scratch.values),
            keys,
            padded,
        };
        self.pack_keys::<S>(&block);
        let mut tiles = [const { 0..0 }; MAX_PANELS];
        for (panel, tiles) in tiles[..panels].iter_mut().enumerate() {
            let visible = call.visible_to(task, &Self::panel_rows::<S>(rows, panel));
            let start = visible.start.max(block.keys.start);
            let end = visible.end.min(block.keys.end);
            if start < end {
                // Whole tiles, relative to the block.
                let start = (start - block.keys.start) / S::TILE * S::TILE;
                *tiles = start..(end - block.keys.start).next_multiple_of(S::TILE);
                self.differentiate_panel::<S>(rows, panel, &block, tiles);
            }
        }
        let columns = self.part.head.columns;
        let value_sums = self.sums.add(columns.key_chunks * columns.chunk(task.sequence.key_len));
        let (weights, d_scores) = (self.at(scratch.weights), self.at(scratch.d_scores));
        if columns.value_chunks > 0 {
            self.gather::<S>(&block, &tiles[..panels], weights, scratch.d_out_rows, problem.value_dim, value_sums);
        }
        if columns.key_chunks > 0 {
            self.gather::<S>(&block, &tiles[..panels], d_scores, scratch.query_rows, problem.head_dim, self.sums);
        }
    }

    /// Rows of K or V as float32, zeros up to `padded`: in place where that is what lies there. Returns the stride too.
    #[inline(always)]
    unsafe fn stage_rows<S: Simd, T: Element>(
        &self,
        rows: &Rows<T>,
        keys: &Range<usize>,
        padded: usize,
        depth: usize,
        to: usize,
    ) -> (*const f32, usize) {
        // Rows that lie apart would compete for few cache sets.
        if T::IS_F32 && rows.contiguous() && depth == rows.width() && padded == keys.len() {
            return (rows.row(keys.start).cast(), depth);
        }
        let to = self.at(to);
        for (i, key) in keys.clone().enumerate() {
            rows.prefetch_behind::<S>(key);
            widen::<S, T>(rows.row(key), rows.width(), depth, to.add(i * depth));
        }
        to.add(keys.len() * depth).write_bytes(0, (padded - keys.len()) * depth);
        (to, depth)
    }

    /// K of the block as `[columns / TILE][keys][TILE]`.
    #[inline(always)]
    unsafe fn pack_keys<S: Simd>(&self, block: &KeyBlock) {
        let (packed, (k, stride)) = (self.at(self.scratch.packed_keys), block.k);
        let head_dim = self.backward.call.problem.head_dim;
        for column in (0..head_dim).step_by(S::TILE) {
            let to = packed.add(column * block.padded);
            // Rows may end inside a tile; what is behind them belongs to columns that nobody reads, but must exist.
            let width = S::TILE.min(stride - column);
            for key in 0..block.padded {
                let (from, to) = (k.add(key * stride + column), to.add(key * S::TILE));
                if width == S::TILE {
                    from.copy_to_nonoverlapping(to, S::TILE);
                } else {
                    to.write_bytes(0, S::TILE);
                    from.copy_to_nonoverlapping(to, width);
                }
            }
        }
    }

    /// Weights and score gradients of one panel against `tiles`, a range of keys relative to the block; adds to dQ.
    #[inline(always)]
    unsafe fn differentiate_panel<S: Simd>(
        &self,
        rows: &Range<usize>,
        panel: usize,
        block: &KeyBlock,
        tiles: &Range<usize>,
    ) {
        let (scratch, problem) = (&self.scratch, self.backward.call.problem);
        let vectors = S::PANEL / S::LANES;
        let scores_at = panel * scratch.key_block * S::PANEL;
        let (weights, d_scores) = (self.at(scratch.weights + scores_at), self.at(scratch.d_scores + scores_at));
        self.multiply::<S>(
            block.k,
            scratch.depth,
            scratch.queries + panel * S::PANEL * scratch.query_depth,
            tiles,
            weights,
        );
        self.modify::<S>(&Self::panel_rows::<S>(rows, panel), block, tiles, weights);
        self.multiply::<S>(
            block.v,
            scratch.value_depth,
            scratch.d_outs + panel * S::PANEL * scratch.out_depth,
            tiles,
            d_scores,
        );
        let (lse, delta) = (self.at(scratch.lse + panel * S::PANEL), self.at(scratch.delta + panel * S::PANEL));
        let panel_rows = Self::panel_rows::<S>(rows, panel);
        if let Some(dropout) = PanelDropout::new::<S>(&self.backward.call, &self.part.task, &panel_rows) {
            for (group, in_group) in PanelDropout::groups(block.keys.start, tiles) {
                let factors = dropout.factors(group);
                for key in in_group {
                    let factors = factors[(block.keys.start + key) % GROUP].as_ptr();
                    for n in (0..S::PANEL).step_by(S::LANES) {
                        let (factor, at) = (S::load(factors.add(n)), key * S::PANEL + n);
                        let weight = math::exp2::<S>(S::sub(S::load(weights.add(at)), S::load(lse.add(n))));
                        S::store(weights.add(at), S::mul(factor, weight));
                        let difference = S::sub(S::mul(factor, S::load(d_scores.add(at))), S::load(delta.add(n)));
                        S::store(d_scores.add(at), S::mul(weight, difference));
                    }
                }
            }
        } else {
            for n in (0..S::PANEL).step_by(S::LANES) {
                let (lse, delta) = (S::load(lse.add(n)), S::load(delta.add(n)));
                for key in tiles.clone() {
                    let at = key * S::PANEL + n;
                    let weight = math::exp2::<S>(S::sub(S::load(weights.add(at)), lse));
                    S::store(weights.add(at), weight);
                    let d_score = S::mul(weight, S::sub(S::load(d_scores.add(at)), delta));
                    S::store(d_scores.add(at), d_score);
                }
            }
        }
        if problem.softcap > 0.0 {
            let tanh = self.at(scratch.tanh);
            for at in (tiles.start * S::PANEL..tiles.end * S::PANEL).step_by(S::LANES) {
                let (t, p) = (S::load(tanh.add(at)), d_scores.add(at));
                let slope = S::sub(S::splat(1.0), S::mul(t, t));
                S::store(p, S::mul(slope, S::load(p)));
            }
        }
        if self.backward.wanted.q.data.is_null() {
            return;
        }
        let mut ones = load_row::<S>(lse);
        ones.as_mut().fill(S::splat(1.0));
        let d_queries = self.at(scratch.d_queries + panel * S::PANEL * scratch.query_columns);
        for column in (0..problem.head_dim).step_by(S::TILE) {
            let keys = self.at(scratch.packed_keys + column * block.padded + tiles.start * S::TILE);
            let (d_scores, to) = (d_scores.add(tiles.start * S::PANEL), d_queries.add(column * S::PANEL));
            S::values(vectors, keys, d_scores, tiles.len(), to, Some(&ones));
        }
    }

    /// `to[keys][PANEL] = left[keys][depth] x right[depth][PANEL]` for the keys of `tiles`.
    #[inline(always)]
    unsafe fn multiply<S: Simd>(
        &self,
        (left, stride): (*const f32, usize),
        depth: usize,
        right: usize,
        tiles: &Range<usize>,
        to: *mut f32,
    ) {
        // The kernel also takes the maximum, which nobody needs here.
        let mut unused = load_row::<S>(self.at(self.scratch.lse));
        for key in tiles.clone().step_by(S::TILE) {
            let (left, to) = (left.add(key * stride), to.add(key * S::PANEL));
            S::scores(S::PANEL / S::LANES, left, stride, self.at(right), depth, to, &mut unused);
        }
    }

    /// Softcap, ALiBi, bias and visibility; keeps the softcap's tanh.
    #[inline(always)]
    unsafe fn modify<S: Simd>(
        &self,
        panel_rows: &Range<usize>,
        block: &KeyBlock,
        tiles: &Range<usize>,
        scores: *mut f32,
    ) {
        let (call, scratch) = (&self.backward.call, &self.scratch);
        let panel_scores = PanelScores {
            call,
            task: &self.part.task,
            rows: panel_rows,
            keys: &block.keys,
            scores,
            lanes: self.at(scratch.lanes),
            staged: self.at(scratch.staged),
        };
        if panel_scores.final_tiles::<S>(tiles) == *tiles {
            return;
        }
        let softcap = call.problem.softcap;
        if softcap > 0.0 {
            let factor = S::splat(softcap * LOG2_E);
            for at in (tiles.start * S::PANEL..tiles.end * S::PANEL).step_by(S::LANES) {
                let tanh = math::tanh::<S>(S::load(scores.add(at)));
                S::store(self.at(scratch.tanh + at), tanh);
                S::store(scores.add(at), S::mul(factor, tanh));
            }
        }
        panel_scores.shift::<S>(tiles);
    }

    /// `sums[keys][width] += weights^T x rows` over the panels that see each tile of keys. As rows advance their ranges of
    /// keys never move back, so that these panels follow one another.
    #[inline(always)]
    unsafe fn gather<S: Simd>(
        &self,
        block: &KeyBlock,
        tiles: &[Range<usize>],
        weights: *const f32,
        rows: usize,
        width: usize,
        sums: *mut f32,
    ) {
        let scratch = &self.scratch;
        let weights_stride = scratch.key_block * S::PANEL;
        let chunk_len = self.part.head.columns.chunk(self.part.task.sequence.key_len);
        for (chunk, columns) in Columns::of_width::<S>(width).enumerate() {
            let vectors = columns.len().div_ceil(S::LANES);
            let rows = self.at(rows + chunk * scratch.block_rows * S::PANEL);
            for key in (0..block.padded).step_by(S::TILE) {
                let sees = |tiles: &Range<usize>| tiles.contains(&key);
                let Some(first) = tiles.iter().position(sees) else { continue };
                let panels = tiles[first..].iter().take_while(|tiles| sees(tiles)).count();
                let from = weights.add(first * weights_stride + key * S::PANEL);
                let to = sums.add(chunk * chunk_len + (block.keys.start + key) * S::PANEL);
                // Sums of other keys have passed through the caches since; those of the next tile come while this one counts.
                prefetch::<S>(to.add(S::TILE * S::PANEL).cast(), S::TILE * S::PANEL * 4);
                S::accumulate(vectors, from, weights_stride, rows.add(first * S::PANEL * S::PANEL), panels, to);
            }
        }
    }

    /// Scales the gradients of a panel's rows of q and writes them.
    #[inline(always)]
    unsafe fn finish<S: Simd, T: Element>(&self, rows: &Range<usize>, panel: usize) {
        let (scratch, call, gradient) = (&self.scratch, &self.backward.call, &self.backward.wanted.q);
        let panel_rows = Self::panel_rows::<S>(rows, panel);
        let (staged, factor) = (self.at(scratch.staged), S::splat(call.problem.scale));
        for lane in (0..panel_rows.len()).step_by(S::LANES) {
            let from = self.at(scratch.d_queries + panel * S::PANEL * scratch.query_columns + lane);
            for column in (0..scratch.query_columns).step_by(S::LANES) {
                let to = staged.add(column);
                S::transpose(from.add(column * S::PANEL), S::PANEL as isize, factor, to, scratch.widest as isize);
            }
            for i in 0..S::LANES.min(panel_rows.len() - lane) {
                let row = panel_rows.start + lane + i;
                let to = call.query_row(gradient.data.cast::<T>(), &gradient.strides, &self.part.task, row);
                narrow::<S, T>(staged.add(i * scratch.widest), call.problem.head_dim, to);
            }
        }
    }
}
