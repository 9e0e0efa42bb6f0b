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
    Kernel::tensorops(problem, tile, matmul, lse)
}

/// The changes that were worth a try.
const TENSOROPS_CHANGES: [fn(&mut MetalTile, &mut Matmul); 14] = [
    |_, _| {},
    |_, matmul| matmul.keep_step = false,
    |tile, _| tile.query = QueryHome::Registers,
    |tile, matmul| (tile.query, matmul.keep_step) = (QueryHome::Registers, false),
    |tile, matmul| (tile.query, matmul.head_step, matmul.value_step) = (QueryHome::Registers, 16, 32),
    |tile, _| tile.keys = 16,
    |tile, _| tile.keys = 64,
    |tile, _| (tile.query, tile.keys) = (QueryHome::Registers, 64),
    |tile, _| tile.simdgroups = 2,
    |tile, _| tile.simdgroups = 8,
    |tile, matmul| {
        (tile.query, matmul.operands) = (QueryHome::Registers, Operands::Registers);
        (matmul.head_step, matmul.value_step) = (16, 32);
    },
    |tile, matmul| (tile.staged, matmul.keep_step) = (true, false),
    |tile, matmul| (tile.staged, tile.query, matmul.keep_step) = (true, QueryHome::Registers, false),
    |tile, matmul| (tile.staged, matmul.keep_step, matmul.weights) = (true, false, Weights::Threadgroup),
];

/// The kernels of the timing tables: the tiles that won on some shape when all of them were timed.
pub fn best(problem: &Problem) -> Vec<Kernel> {
    let dim = problem.head_dim;
    let tiles = [
        direct(4, 1, 16, dim),
        direct(4, 2, 16, dim),
        direct(4, 2, 32, dim),
        staged(8, 1, 32, dim),
        staged(8, 2, 32, dim),
    ];
    let mut kernels = vec![Kernel::scalar(problem, false)];
    kernels.extend(tiles.map(|tile| simdgroup(problem, tile)));
    kernels.extend([0, 1, 2, 3, 7, 11].map(|change: usize| tensorops(problem, false, TENSOROPS_CHANGES[change])));
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
    let tensorops = TENSOROPS_CHANGES.map(|change| tensorops(problem, false, change));
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
    let tensorops = [0, 2, 10, 11, 13].map(|change: usize| tensorops(problem, true, TENSOROPS_CHANGES[change]));
    tiles.into_iter().map(kernel).chain(tensorops.into_iter().filter(Kernel::fits)).collect()
}
