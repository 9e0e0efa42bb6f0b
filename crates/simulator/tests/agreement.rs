//! Every kernel variant agrees with the float64 reference on any problem, within the derived bounds.

mod common;

use common::bench::Bench;
use common::variants::{self, Variant};
use common::{Case, Run};
use mtlflashattn_simulator::{Layer, Options};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Runs `cases` random problems with lengths up to `most` on every variant of `list`.
fn agree(list: &[Variant], options: &[Options], cases: u32, most: usize) {
    for variant in list {
        let benches: Vec<Bench> = options.iter().map(|options| Bench::new(options.clone())).collect();
        let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
        let result = runner.run(&variant.cases(most), |case: Case| {
            let run = Run::new(&case);
            let kernel = variant.kernel(&run);
            for bench in &benches {
                let got = bench.run(&kernel, &kernel.source(), &run).map_err(TestCaseError::fail)?;
                run.check(&kernel, &got).map_err(TestCaseError::fail)?;
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("{}: {error}", variant.name);
        }
    }
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
    agree(&variants::simdgroup(), &[fast(), fast().with_seed(11)], 16, 100);
}

#[test]
fn finite_math_changes_nothing() {
    agree(&variants::all(), &[fast().with_finite_math(true)], 6, 60);
}

#[test]
fn every_access_is_right() {
    agree(&variants::all(), &[Options::new(Layer::Check)], 3, 40);
}
