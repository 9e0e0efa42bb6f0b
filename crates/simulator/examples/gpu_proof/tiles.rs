//! Which tiles of our kernels are run.

use mtlflashattn_core::plan::{Matmul, MetalTile, Operands, QueryHome, Weights};
use mtlflashattn_core::{Dtype, Problem, Tier};
use mtlflashattn_metal::Kernel;

/// A tile that reads K and V from device memory.
pub const fn direct(simdgroups: usize, row_fragments: usize, keys: usize, value_chunk: usize) -> MetalTile {
    MetalTile { simdgroups, row_fragments, keys, staged: false, value_chunk, query: QueryHome::Registers }
}

/// A tile that copies K and V to threadgroup memory.
pub const fn staged(simdgroups: usize, row_fragments: usize, keys: usize, value_chunk: usize) -> MetalTile {
    MetalTile { simdgroups, row_fragments, keys, staged: true, value_chunk, query: QueryHome::Registers }
}

/// The same with Q in threadgroup memory.
pub const fn parked(tile: MetalTile) -> MetalTile {
    MetalTile { query: QueryHome::Threadgroup, ..tile }
}

/// The tier and the tile.
pub fn name(kernel: &Kernel) -> String {
    let Kernel { tier, tile, matmul, .. } = kernel;
    match matmul {
        _ if *tier == Tier::Scalar => tier.to_string(),
        Some(matmul) => format!("{tier}: {tile}; {matmul}"),
        None if kernel.features.aligned => format!("{tier}: {tile}, aligned"),
        None => format!("{tier}: {tile}"),
    }
}

/// The simdgroup kernel for tensors of which each is an allocation of its own.
fn simdgroup(problem: &Problem, tile: MetalTile) -> Kernel {
    Kernel::simdgroup(problem, tile, false).aligned(problem, [0; 3])
}

/// A tensorops kernel: the tile and the products of the planner, changed.
fn tensorops(problem: &Problem, lse: bool, change: impl FnOnce(&mut MetalTile, &mut Matmul)) -> Kernel {
    let passes = problem.value_dim.div_ceil(128);
    let value_chunk = problem.value_dim.div_ceil(passes).next_multiple_of(16);
    let mut tile = parked(direct(4, 2, 32, value_chunk));
    let mut matmul = Matmul {
        head_step: problem.head_dim.next_multiple_of(16),
        value_step: value_chunk,
        operands: Operands::Memory,
        weights: Weights::Registers,
        relaxed: problem.dtype != Dtype::F32,
        keep_step: true,
    };
    change(&mut tile, &mut matmul);
    Kernel::tensorops(problem, tile, matmul, lse).aligned(problem, [0; 3])
}

/// A change of the planner's tile and products.
type Change = fn(&mut MetalTile, &mut Matmul);

/// Products whose simdgroups do not wait for one another, Q in registers, P in the type of V.
fn narrow(tile: &mut MetalTile, matmul: &mut Matmul) {
    (tile.query, matmul.keep_step, matmul.weights) = (QueryHome::Registers, false, Weights::Narrow);
}

/// The same with so many row fragments and keys.
fn narrow_tile(tile: &mut MetalTile, matmul: &mut Matmul, row_fragments: usize, keys: usize) {
    narrow(tile, matmul);
    (tile.row_fragments, tile.keys) = (row_fragments, keys);
}

/// K and V in threadgroup memory.
fn shared(tile: &mut MetalTile, matmul: &mut Matmul) {
    (tile.staged, matmul.keep_step) = (true, false);
}

/// What is timed beside the planner's own choice.
const TIMED: [Change; 9] = [
    |tile, matmul| (tile.query, matmul.keep_step) = (QueryHome::Registers, false),
    narrow,
    |tile, matmul| narrow_tile(tile, matmul, 2, 64),
    |tile, matmul| narrow_tile(tile, matmul, 4, 16),
    shared,
    |tile, matmul| {
        narrow(tile, matmul);
        shared(tile, matmul);
    },
    |tile, matmul| {
        narrow(tile, matmul);
        shared(tile, matmul);
        tile.simdgroups = 8;
    },
    |tile, matmul| {
        narrow_tile(tile, matmul, 4, 32);
        shared(tile, matmul);
    },
    |tile, matmul| {
        narrow_tile(tile, matmul, 2, 64);
        shared(tile, matmul);
    },
];

/// What else is tried when every tile is timed.
const TRIED: [Change; 7] = [
    |tile, _| tile.query = QueryHome::Registers,
    |_, matmul| matmul.keep_step = false,
    |tile, matmul| (tile.query, matmul.head_step, matmul.value_step) = (QueryHome::Registers, 16, 32),
    |tile, _| tile.keys = 64,
    |tile, _| tile.simdgroups = 8,
    |_, matmul| (matmul.keep_step, matmul.weights) = (false, Weights::Narrow),
    |tile, matmul| {
        shared(tile, matmul);
        tile.query = QueryHome::Registers;
    },
];

/// The other ways on which numbers come about: operands through registers, P in threadgroup memory.
const PROVED: [Change; 6] = [
    unchanged,
    narrow,
    |tile, matmul| {
        narrow_tile(tile, matmul, 4, 32);
        shared(tile, matmul);
    },
    |tile, matmul| narrow_tile(tile, matmul, 4, 16),
    |tile, matmul| {
        (tile.query, matmul.operands) = (QueryHome::Registers, Operands::Registers);
        (matmul.head_step, matmul.value_step) = (16, 32);
    },
    |tile, matmul| {
        shared(tile, matmul);
        matmul.weights = Weights::Threadgroup;
    },
];

fn unchanged(_: &mut MetalTile, _: &mut Matmul) {}

/// The planner's choice on an M5.
pub fn chosen(problem: &Problem) -> Kernel {
    tensorops(problem, false, unchanged)
}

/// The kernels of the timing tables: the planner's choice for the M5 first, then the tiles that won on some shape.
pub fn best(problem: &Problem) -> Vec<Kernel> {
    let dim = problem.head_dim;
    let tiles = [direct(4, 1, 16, dim), direct(4, 2, 16, dim), staged(8, 1, 32, dim), staged(8, 2, 32, dim)];
    let mut kernels: Vec<Kernel> =
        [unchanged as Change].into_iter().chain(TIMED).map(|change| tensorops(problem, false, change)).collect();
    kernels.extend(tiles.map(|tile| simdgroup(problem, tile)));
    kernels.push(Kernel::scalar(problem, false));
    kernels.retain(Kernel::fits);
    kernels
}

/// Every kernel that has a chance.
pub fn all(problem: &Problem) -> Vec<Kernel> {
    let dim = problem.head_dim;
    let mut tiles = Vec::new();
    for row_fragments in [1, 2] {
        for keys in [8, 16, 32, 64] {
            if keys * row_fragments <= 64 {
                tiles.push(direct(4, row_fragments, keys, dim));
                tiles.push(staged(4, row_fragments, keys, dim));
            }
        }
    }
    tiles.extend([1, 2, 8].map(|simdgroups| direct(simdgroups, 1, 16, dim)));
    tiles.extend([1, 2, 8].map(|simdgroups| staged(simdgroups, 1, 32, dim)));
    tiles.push(staged(8, 2, 32, dim));
    tiles.extend([direct(4, 1, 16, dim), staged(4, 1, 32, dim), staged(4, 2, 32, dim)].map(parked));
    let changes = [unchanged as Change].into_iter().chain(TIMED).chain(TRIED);
    let tensorops = changes.map(|change| tensorops(problem, false, change));
    tiles.into_iter().map(|tile| simdgroup(problem, tile)).chain(tensorops).filter(Kernel::fits).collect()
}

/// The kernels whose numbers are checked: every tier, direct and staged, Q in registers and in threadgroup memory.
/// Causal problems take the kernels for tensors that may lie anywhere, so that both forms run.
pub fn proved(problem: &Problem, causal: bool) -> Vec<Kernel> {
    let float = problem.dtype == Dtype::F32;
    let chunk = problem.value_dim.next_multiple_of(8);
    let tiles = if chunk > 128 {
        vec![direct(4, 1, 16, 128), parked(staged(2, 1, if float { 8 } else { 16 }, 128))]
    } else {
        vec![direct(4, 1, 32, chunk), parked(direct(2, 2, 16, chunk)), staged(4, 1, if float { 16 } else { 32 }, chunk)]
    };
    let kernel = |tile| {
        let kernel = Kernel::simdgroup(problem, tile, true);
        if causal { kernel } else { kernel.aligned(problem, [0; 3]) }
    };
    let tensorops = PROVED.map(|change| tensorops(problem, true, change));
    tiles.into_iter().map(kernel).chain(tensorops.into_iter().filter(Kernel::fits)).collect()
}
