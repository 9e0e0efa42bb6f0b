//! NaN and infinity reach the rows that see them, and no others.

mod common;

use common::bench::Bench;
use common::{Case, Run};
use mtlflashattn_core::plan::{Matmul, Operands, QueryHome, Weights};
use mtlflashattn_core::{Dtype, MetalTile};
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::{Layer, Options};

const ROWS: usize = 40;
const TILE: MetalTile = MetalTile {
    simdgroups: 2,
    row_fragments: 1,
    keys: 16,
    staged: false,
    value_chunk: 16,
    query: QueryHome::Registers,
};

/// A causal problem of one head with a value planted in element 3 of a row.
fn planted(pick: fn(&mut Run) -> &mut common::Tensor, row: usize, value: f64) -> Run {
    let case = Case { dtype: Dtype::F16, lengths: vec![(ROWS, ROWS)], window: (-1, 0), ..Case::default() };
    let mut run = Run::new(&case);
    run.plant(pick, [0, row, 0, 3], value);
    run
}

/// Rows of the output that hold a NaN, and rows whose LSE is NaN.
fn nan_rows(run: &Run, kernel: &Kernel) -> (Vec<usize>, Vec<usize>) {
    let bench = Bench::new(Options::new(Layer::Fast));
    let got = bench.run(kernel, &kernel.source(), run).expect("the kernel runs");
    let rows = |values: &[f64], width: usize| {
        (0..ROWS).filter(|row| values[row * width..][..width].iter().any(|value| value.is_nan())).collect()
    };
    (rows(&got.out, run.problem.value_dim), rows(&got.lse, 1))
}

const MATMUL: Matmul = Matmul {
    head_step: 16,
    value_step: 16,
    operands: Operands::Memory,
    weights: Weights::Registers,
    relaxed: true,
    keep_step: false,
};

/// The scalar kernel, the one of fragments with 8 rows, and `matmul2d` with 16.
fn kernels(run: &Run) -> [Kernel; 3] {
    let tile = MetalTile { row_fragments: 2, query: QueryHome::Threadgroup, ..TILE };
    [
        Kernel::scalar(&run.problem, true),
        Kernel::simdgroup(&run.problem, TILE, true),
        Kernel::tensorops(&run.problem, tile, MATMUL, true),
    ]
}

#[test]
fn a_nan_in_q_reaches_its_row_alone() {
    let run = planted(|run| &mut run.q, 11, f64::NAN);
    for kernel in kernels(&run) {
        assert_eq!(nan_rows(&run, &kernel), (vec![11], vec![11]), "{}", kernel.tier);
    }
}

#[test]
fn a_nan_in_k_reaches_the_rows_that_see_the_key() {
    let run = planted(|run| &mut run.k, 11, f64::NAN);
    let seeing: Vec<usize> = (11..ROWS).collect();
    for kernel in kernels(&run) {
        assert_eq!(nan_rows(&run, &kernel), (seeing.clone(), seeing.clone()), "{}", kernel.tier);
    }
}

#[test]
fn a_nan_in_v_reaches_the_rows_that_see_the_key() {
    let run = planted(|run| &mut run.v, 19, f64::NAN);
    let [scalar, simdgroup, tensorops] = kernels(&run);
    assert_eq!(nan_rows(&run, &scalar), ((19..ROWS).collect(), vec![]));
    // Rows 16 to 18 share a fragment with rows that see the key, and 0 times NaN is NaN; docs/kernels.md says so.
    assert_eq!(nan_rows(&run, &simdgroup), ((16..ROWS).collect(), vec![]));
    assert_eq!(nan_rows(&run, &tensorops), ((16..ROWS).collect(), vec![]));
}

#[test]
fn an_infinite_score_is_nan_in_its_row_as_in_the_reference() {
    let mut run = planted(|run| &mut run.q, 11, f64::INFINITY);
    run.plant(|run| &mut run.k, [0, 5, 0, 3], 1.0);
    let exact = run.exact();
    assert!(exact.lse[11].is_nan());
    for kernel in kernels(&run) {
        let (out, lse) = nan_rows(&run, &kernel);
        assert_eq!((out, lse), (vec![11], vec![11]), "{}", kernel.tier);
    }
}
