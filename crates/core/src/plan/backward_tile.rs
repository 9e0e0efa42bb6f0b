//! How the Metal kernels of the backward pass cut a problem, and how many threads of them a GPU core holds.

use std::cmp::Reverse;
use std::fmt;

use super::gpu::Gpu;
use super::occupancy::{KernelShape, MOST_HALVES, Occupancy, THREADGROUP_MEMORY};
use super::tile::{FRAGMENT, QueryHome, ROW_PADDING};
use crate::{Dtype, Problem};

/// A kernel of the backward pass, by what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackwardPass {
    /// LSE and delta of every query, for the others.
    Delta,
    /// dQ: three products for each query and key.
    Query,
    /// dK and dV: four products.
    KeysAndValues,
    /// dK alone: three products.
    Keys,
    /// dV alone: two products.
    Values,
}

impl BackwardPass {
    /// Name for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Delta => "delta",
            Self::Query => "dq",
            Self::KeysAndValues => "dk and dv",
            Self::Keys => "dk",
            Self::Values => "dv",
        }
    }

    /// Whether it sums columns of q or k.
    #[must_use]
    pub const fn sums_head(self) -> bool {
        matches!(self, Self::Query | Self::KeysAndValues | Self::Keys)
    }

    /// Whether it sums columns of v.
    #[must_use]
    pub const fn sums_value(self) -> bool {
        matches!(self, Self::KeysAndValues | Self::Values)
    }

    /// Whether its threadgroups own keys, and not queries.
    #[must_use]
    pub const fn owns_keys(self) -> bool {
        matches!(self, Self::KeysAndValues | Self::Keys | Self::Values)
    }

    /// Columns of the gradient that it computes; of the wider one where there are two.
    #[must_use]
    pub const fn columns(self, head_dim: usize, value_dim: usize) -> usize {
        match self {
            Self::Delta => 0,
            Self::Query | Self::Keys => head_dim,
            Self::KeysAndValues if head_dim > value_dim => head_dim,
            Self::Values | Self::KeysAndValues => value_dim,
        }
    }
}

/// The tile of a kernel of the backward pass.
///
/// A threadgroup has `simdgroups` simdgroups of 32 threads. Each simdgroup owns `row_fragments` times 8 rows (queries for
/// dQ, keys for dK and dV) and walks over blocks of `block` rows of the other kind. Its registers hold the scores and their
/// gradients for one block, and `chunk` columns of sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackwardTile {
    /// Simdgroups of a threadgroup; each has rows of its own.
    pub simdgroups: usize,
    /// 8-row fragments that a simdgroup owns.
    pub row_fragments: usize,
    /// Rows of a block; a multiple of 8.
    pub block: usize,
    /// Whether a block is copied to threadgroup memory for all simdgroups, or read by each from device memory.
    pub staged: bool,
    /// Columns of a gradient that one threadgroup sums; a multiple of 8. Where it is less than the gradient has, other
    /// threadgroups sum the others, and compute the scores anew.
    pub chunk: usize,
    /// Where the owned rows live.
    pub own: QueryHome,
}

/// 16-bit registers of an accumulator fragment: float32.
const ACCUMULATOR_HALVES: usize = 4;
/// Registers beside fragments, as in the forward pass, and 64-bit addresses of one tensor and of the LSE more.
const BASE_HALVES: usize = 60;
/// LSE and delta of a query; the position of a row.
const STATE_HALVES: usize = 6;
/// Fragments that are loaded ahead where the owned rows are not in registers.
const UNROLLED: usize = 4;
/// Columns of all four tensors' fragments that a lane keeps side by side in threadgroup memory.
const DEAL: usize = 4 * FRAGMENT;

impl BackwardTile {
    /// Threads of a threadgroup.
    #[must_use]
    pub const fn threads(&self) -> usize {
        self.simdgroups * 32
    }

    /// Rows of a threadgroup.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.simdgroups * self.row_fragments * FRAGMENT
    }

    /// Threadgroups that share the columns of a gradient of `pass`.
    #[must_use]
    pub const fn chunks(&self, pass: BackwardPass, head_dim: usize, value_dim: usize) -> usize {
        let columns = pass.columns(head_dim, value_dim);
        if columns == 0 { 1 } else { columns.div_ceil(self.chunk) }
    }

    /// Columns of q or k, and of v, that a threadgroup sums or, where it sums none, reads at once.
    #[must_use]
    pub const fn chunk_columns(&self, pass: BackwardPass, head_dim: usize, value_dim: usize) -> [usize; 2] {
        let (head, value) = (head_dim.next_multiple_of(FRAGMENT), value_dim.next_multiple_of(FRAGMENT));
        match pass {
            BackwardPass::Query | BackwardPass::Keys => [self.chunk, value],
            BackwardPass::Values => [head, self.chunk],
            BackwardPass::KeysAndValues | BackwardPass::Delta => [head, value],
        }
    }

    /// Threadgroup memory in bytes, as the kernel declares it.
    #[must_use]
    pub const fn threadgroup_bytes(
        &self,
        pass: BackwardPass,
        dtype: Dtype,
        head_dim: usize,
        value_dim: usize,
    ) -> usize {
        if matches!(pass, BackwardPass::Delta) {
            return 0;
        }
        let [head_chunk, value_chunk] = self.chunk_columns(pass, head_dim, value_dim);
        let columns = head_dim.next_multiple_of(head_chunk) + value_dim.next_multiple_of(value_chunk);
        let staged = if self.staged { self.block * (columns * dtype.size() + 2 * ROW_PADDING) } else { 0 };
        let owned_values = if matches!(pass, BackwardPass::Values) { 0 } else { value_dim.next_multiple_of(DEAL) };
        let owned = (head_dim.next_multiple_of(DEAL) + owned_values) * dtype.size() * self.rows();
        if matches!(self.own, QueryHome::Threadgroup) { staged + owned } else { staged }
    }

    /// Whether it is one that a kernel can have: whole fragments, threads and threadgroup memory within every Apple GPU's
    /// limits. Both gradients of keys at once take all columns.
    #[must_use]
    pub const fn fits(&self, pass: BackwardPass, dtype: Dtype, head_dim: usize, value_dim: usize) -> bool {
        let is_whole = self.block >= FRAGMENT
            && self.block.is_multiple_of(FRAGMENT)
            && self.chunk >= FRAGMENT
            && self.chunk.is_multiple_of(FRAGMENT)
            && (!matches!(pass, BackwardPass::KeysAndValues) || self.chunks(pass, head_dim, value_dim) == 1);
        1 <= self.simdgroups
            && self.simdgroups <= 32
            && self.row_fragments >= 1
            && is_whole
            && self.threadgroup_bytes(pass, dtype, head_dim, value_dim) <= THREADGROUP_MEMORY
    }

    /// Predicts the kernel for `pass` and `shape`, as [`Occupancy::predict`] does for the forward pass: the same model, with
    /// the fragments that these kernels keep. No such kernel was compiled for an Apple GPU.
    #[must_use]
    pub fn occupancy(&self, pass: BackwardPass, shape: &KernelShape) -> Occupancy {
        let halves = self.predict_halves(pass, shape);
        let bytes = self.threadgroup_bytes(pass, shape.dtype, shape.head_dim, shape.value_dim);
        Occupancy::of(halves, bytes, self.threads())
    }

    /// Accumulator fragments that live at once: sums, scores and, but for dV alone, their gradients.
    #[must_use]
    pub const fn accumulators(&self, pass: BackwardPass, head_dim: usize, value_dim: usize) -> usize {
        let [head, value] = self.chunk_columns(pass, head_dim, value_dim);
        let sums = pass.sums_head() as usize * head + pass.sums_value() as usize * value;
        let products = if matches!(pass, BackwardPass::Values) { 1 } else { 2 };
        self.row_fragments * (sums + products * self.block) / FRAGMENT
    }

    fn predict_halves(&self, pass: BackwardPass, shape: &KernelShape) -> usize {
        let operand = shape.operand_halves();
        let owned_columns = shape.head_dim + if pass == BackwardPass::Values { 0 } else { shape.value_dim };
        let owned = owned_columns.div_ceil(FRAGMENT);
        let (resident, unrolled) =
            if self.own == QueryHome::Registers { (owned, owned) } else { (1, owned.min(UNROLLED)) };
        let accumulators = self.accumulators(pass, shape.head_dim, shape.value_dim) * ACCUMULATOR_HALVES;
        let blocks = self.block / FRAGMENT;
        // Keys' kernels hold the states of a block's queries; the others those of their rows.
        let states = if pass == BackwardPass::Query { self.row_fragments } else { 2 * blocks };
        let ahead = blocks * unrolled * operand;
        BASE_HALVES
            + accumulators
            + self.row_fragments * resident * operand
            + states * STATE_HALVES
            + ahead
            + shape.features.halves(self.row_fragments)
    }
}

impl fmt::Display for BackwardTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { simdgroups, row_fragments, block, staged, chunk, own } = self;
        let (source, own) = (if *staged { "staged" } else { "direct" }, own.name());
        write!(
            f,
            "{simdgroups} simdgroups of {row_fragments}x8 rows, blocks of {block} ({source}), {chunk} columns, own rows in \
             {own}"
        )
    }
}

/// Which gradients somebody wants; those of sinks come from the LSE and delta of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools, reason = "gradients are wanted or not")]
pub struct Wanted {
    /// Of q.
    pub query: bool,
    /// Of k.
    pub key: bool,
    /// Of v.
    pub value: bool,
    /// Of an additive bias.
    pub bias: bool,
}

impl Wanted {
    /// The gradients of q, k and v.
    pub const INPUTS: Self = Self { query: true, key: true, value: true, bias: false };
}

/// The kernels that compute the `wanted` gradients of q, k and v of `problem` on `gpu`, in the order in which they run, with
/// their tiles; `None` when the GPU can hold no tile of one of them.
///
/// dK and dV share their scores in one kernel where registers hold the sums of both, and have one each where not. Nothing
/// of this was measured: tiles are ranked by certain spills, repeated products, threads of a core and bytes moved.
#[must_use]
pub fn backward_passes(problem: &Problem, gpu: &Gpu, wanted: Wanted) -> Option<Vec<(BackwardPass, BackwardTile)>> {
    let search = Search { shape: KernelShape::of(problem, gpu.has_bfloat()), caches: gpu.has_dynamic_caching() };
    let mut passes = Vec::new();
    if wanted.query {
        passes.push(BackwardPass::Query);
    }
    if wanted.key
        && wanted.value
        && search.best(BackwardPass::KeysAndValues).is_some_and(|(score, _)| !score.near_spill)
    {
        passes.push(BackwardPass::KeysAndValues);
    } else {
        passes.extend(wanted.value.then_some(BackwardPass::Values));
        passes.extend(wanted.key.then_some(BackwardPass::Keys));
    }
    let delta = (!passes.is_empty()).then_some(Some((BackwardPass::Delta, DELTA_TILE)));
    let best = |pass| search.best(pass).map(|(_, tile)| (pass, tile));
    delta.into_iter().chain(passes.into_iter().map(best)).collect()
}

/// Four lanes a query; nothing but the number of simdgroups matters.
const DELTA_TILE: BackwardTile = BackwardTile {
    simdgroups: 4,
    row_fragments: 1,
    block: FRAGMENT,
    staged: false,
    chunk: FRAGMENT,
    own: QueryHome::Device,
};

/// The judgement on a tile; the order of the fields is the order of their weight, and less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    near_spill: bool,
    chunks: usize,
    /// Too few threads to hide loads.
    exposed: bool,
    /// Bytes moved for an owned row and a row of a block, times 1024, those from device memory weighed.
    traffic: usize,
    /// Wider blocks pay less often for barriers.
    block: Reverse<usize>,
    /// Place in [`SIMDGROUPS`].
    simdgroups: usize,
}

const SIMDGROUPS: [usize; 3] = [4, 8, 2];
const BLOCKS: [usize; 3] = [32, 16, 8];
const CHUNKS: [usize; 8] = [1, 2, 3, 4, 6, 8, 16, 32];

struct Search {
    shape: KernelShape,
    /// Whether registers, threadgroup memory and cache are one pool.
    caches: bool,
}

impl Search {
    fn best(&self, pass: BackwardPass) -> Option<(Score, BackwardTile)> {
        let columns = pass.columns(self.shape.head_dim, self.shape.value_dim).div_ceil(FRAGMENT);
        let of_chunks = |chunks: usize| {
            let chunk = columns.div_ceil(chunks) * FRAGMENT;
            let judged = tiles(chunk).filter_map(move |tile| Some((self.score(pass, &tile)?, tile)));
            judged.min_by_key(|&(score, _)| score)
        };
        let counts = CHUNKS.into_iter().take_while(|&chunks| chunks <= columns);
        counts.filter_map(of_chunks).min_by_key(|&(score, _)| score)
    }

    /// `None` when no pipeline could be made of it.
    fn score(&self, pass: BackwardPass, tile: &BackwardTile) -> Option<Score> {
        let KernelShape { dtype, head_dim, value_dim, .. } = self.shape;
        let occupancy = tile.occupancy(pass, &self.shape);
        let runs = tile.fits(pass, dtype, head_dim, value_dim)
            && occupancy.halves <= MOST_HALVES
            && tile.threads() <= occupancy.threads;
        let most_halves = if self.caches { 232 } else { 208 };
        runs.then(|| Score {
            near_spill: occupancy.is_near_spill(),
            chunks: tile.chunks(pass, head_dim, value_dim),
            exposed: occupancy.halves > most_halves || (tile.staged && occupancy.threadgroups < 2),
            traffic: self.traffic(pass, tile),
            block: Reverse(tile.block),
            simdgroups: SIMDGROUPS.iter().position(|&count| count == tile.simdgroups).unwrap_or(SIMDGROUPS.len()),
        })
    }

    fn traffic(&self, pass: BackwardPass, tile: &BackwardTile) -> usize {
        let KernelShape { dtype, head_dim, value_dim, .. } = self.shape;
        let [head, value] = [head_dim, value_dim].map(|dim| 1024 * dim.next_multiple_of(FRAGMENT) * dtype.size());
        // A block's rows are read along the dimensions for scores, and along the rows for sums.
        let scores = head + if pass == BackwardPass::Values { 0 } else { value };
        let read = scores + usize::from(pass.sums_head()) * head + usize::from(pass.sums_value()) * value;
        let by_simdgroup = read / (tile.row_fragments * FRAGMENT);
        let device_cost = if self.caches { 1 } else { 4 };
        let own = match tile.own {
            QueryHome::Registers => 0,
            QueryHome::Threadgroup => scores / tile.block,
            QueryHome::Device => device_cost * scores / tile.block,
        };
        if tile.staged {
            by_simdgroup + (device_cost + 1) * (head + value) / tile.rows() + own
        } else {
            device_cost * by_simdgroup + own
        }
    }
}

fn tiles(chunk: usize) -> impl Iterator<Item = BackwardTile> {
    let homes = || QueryHome::ALL.into_iter();
    let sizes = || BLOCKS.into_iter().flat_map(|block| [1, 2].map(|row_fragments| (block, row_fragments)));
    SIMDGROUPS.into_iter().flat_map(move |simdgroups| {
        sizes().flat_map(move |(block, row_fragments)| {
            homes().flat_map(move |own| {
                [false, true].map(|staged| BackwardTile { simdgroups, row_fragments, block, staged, chunk, own })
            })
        })
    })
}
