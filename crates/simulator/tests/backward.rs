//! The kernels of the backward pass agree with the float64 reference on any problem, within the derived bounds.

mod common;

use common::Case;
use common::backward::{BackwardRun, BackwardVariant, variants};
use common::bench::Bench;
use mtlflashattn_metal::BackwardKernel;
use mtlflashattn_simulator::{Layer, Options};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Runs `cases` random problems with lengths up to `most` on every variant.
fn agree(list: &[BackwardVariant], options: &[Options], cases: u32, most: usize) {
    for variant in list {
        let benches: Vec<Bench> = options.iter().map(|options| Bench::new(options.clone())).collect();
        let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
        let result = runner.run(&variant.cases(most), |case: Case| {
            let run = BackwardRun::new(&case, variant.lse_gradient);
            let kernels = variant.kernels(&run);
            for bench in &benches {
                let (got, _) = run.launch(bench, &kernels, &BackwardKernel::source).map_err(TestCaseError::fail)?;
                run.check(&got).map_err(TestCaseError::fail)?;
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
fn the_kernels_agree_in_any_schedule() {
    agree(&variants(), &[fast(), fast().with_seed(11)], 5, 60);
}

#[test]
fn finite_math_changes_nothing() {
    agree(&variants(), &[fast().with_finite_math(true)], 3, 50);
}

#[test]
fn every_access_is_right() {
    agree(&variants(), &[Options::new(Layer::Check)], 2, 30);
}
