//! `cu_seqlens` that nobody checked cannot make a kernel leave the tensors.

mod common;

use common::bench::Bench;
use common::{Case, Run};
use mtlflashattn_core::plan::{Matmul, Operands, QueryHome, Weights};
use mtlflashattn_core::{Dtype, MetalTile};
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::{Layer, Options};

const TILE: MetalTile = MetalTile {
    simdgroups: 2,
    row_fragments: 1,
    keys: 16,
    staged: false,
    value_chunk: 16,
    query: QueryHome::Registers,
};

const MATMUL: Matmul = Matmul {
    head_step: 16,
    value_step: 16,
    operands: Operands::Memory,
    weights: Weights::Registers,
    relaxed: true,
    keep_step: true,
};

#[test]
fn offsets_beyond_the_tensors_are_cut_off() {
    let case = Case {
        dtype: Dtype::F16,
        lengths: vec![(5, 7), (6, 9), (4, 4)],
        packed: true,
        window: (-1, 0),
        ..Case::default()
    };
    let bench = Bench::new(Options::new(Layer::Check));
    let staged = MetalTile { staged: true, ..TILE };
    for (query, key) in [
        ([0, 5, 1 << 30, i32::MAX], [0, 7, 1 << 30, i32::MAX]),
        ([0, -5, i32::MIN, 15], [i32::MIN, -1, 1 << 20, 3]),
        ([9, 3, 15, -7], [20, 1, -9, 20]),
    ] {
        let mut run = Run::new(&case);
        run.query_offsets = query.to_vec();
        run.key_offsets = key.to_vec();
        let problem = &run.problem;
        let tiles = [TILE, staged].map(|tile| Kernel::simdgroup(problem, tile, true));
        // Blocks that matmul2d reads itself, and staged ones.
        let tensorops = [TILE, staged].map(|tile| {
            let tile = MetalTile { row_fragments: 2, ..tile };
            Kernel::tensorops(problem, tile, MATMUL, true)
        });
        for kernel in tiles.into_iter().chain(tensorops).chain([Kernel::scalar(problem, true)]) {
            let result = bench.run(&kernel, &kernel.source(), &run);
            assert!(result.is_ok(), "{query:?} and {key:?} on {}: {result:?}", kernel.tier);
        }
    }
}
