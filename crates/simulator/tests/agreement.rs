//! Every kernel variant agrees with the float64 reference on any problem, within the derived bounds.

mod common;

use common::bench::{self, Bench};
use common::variants::{self, Variant};
use common::{Case, Run};
use mtlflashattn_simulator::{LaneLayout, Layer, MemoryDestination, Options, TensorOps};

/// Runs `cases` random problems with lengths up to `most` on every variant of `list`, with each of the options.
fn agree(list: &[Variant], options: &[Options], cases: u32, most: usize) {
    agree_with(list, options, cases, most, |benches, _| benches.iter().collect());
}

/// The same with the options that `choose` takes for a problem.
fn agree_with(
    list: &[Variant],
    options: &[Options],
    cases: u32,
    most: usize,
    choose: for<'a> fn(&'a [Bench], &Case) -> Vec<&'a Bench>,
) {
    for variant in list {
        bench::agree(variant.name, variant.cases(most), options, cases, |benches, case| {
            let run = Run::new(case);
            let kernel = variant.kernel(&run);
            let source = kernel.source();
            choose(benches, case)
                .into_iter()
                .try_for_each(|bench| run.check(&kernel, &bench.run(&kernel, &source, &run)?))
        });
    }
}

fn one_of<'a>(benches: &'a [Bench], case: &Case) -> Vec<&'a Bench> {
    vec![&benches[case.seed as usize % benches.len()]]
}

fn fast() -> Options {
    Options::new(Layer::Fast)
}

#[test]
fn the_scalar_kernel_agrees() {
    agree(&variants::scalar(), &[fast()], 24, 60);
}

#[test]
fn the_simdgroup_kernel_agrees_in_any_schedule() {
    // Each problem in one of them, so that each variant meets both.
    agree_with(&variants::simdgroup(), &[fast(), fast().with_seed(11)], 16, 100, one_of);
}

#[test]
fn the_tensorops_kernels_agree_whoever_has_which_element() {
    let layouts = [
        LaneLayout::ContiguousQuads,
        LaneLayout::SplitPairs,
        LaneLayout::Shuffled(3),
        LaneLayout::Shuffled(4),
        LaneLayout::Scattered(5),
    ];
    let with = |layout, destination| fast().with_tensor_ops(TensorOps { layout, destination, ..TensorOps::default() });
    let options: Vec<Options> = layouts
        .into_iter()
        .map(|layout| with(layout, MemoryDestination::Overwritten))
        .chain([with(layouts[0], MemoryDestination::Accumulated), fast().with_seed(11)])
        .collect();
    // Each problem with one of them, so that each variant meets all.
    agree_with(&variants::tensorops(), &options, 14, 100, one_of);
}

#[test]
fn finite_math_changes_nothing() {
    let tensorops = variants::tensorops().into_iter().step_by(4);
    let list: Vec<Variant> = variants::scalar().into_iter().chain(variants::simdgroup()).chain(tensorops).collect();
    agree(&list, &[fast().with_finite_math(true)], 6, 60);
}

#[test]
fn every_access_is_right() {
    agree(&variants::all(), &[Options::new(Layer::Check)], 3, 40);
}
