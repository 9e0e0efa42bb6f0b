//! Which tiles of our kernels are run.

use mtlflashattn_core::plan::{MetalTile, QueryHome};
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
    let Kernel { tier, tile, .. } = kernel;
    let aligned = if kernel.features.aligned { ", aligned" } else { "" };
    if *tier == Tier::Scalar { tier.to_string() } else { format!("{tier}: {tile}{aligned}") }
}

/// The simdgroup kernel for tensors of which each is an allocation of its own.
fn simdgroup(problem: &Problem, tile: MetalTile) -> Kernel {
    Kernel::simdgroup(problem, tile, false).aligned(problem, [0; 3])
}

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
    tiles.into_iter().map(|tile| simdgroup(problem, tile)).filter(Kernel::fits).collect()
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
    tiles.into_iter().map(kernel).collect()
}
