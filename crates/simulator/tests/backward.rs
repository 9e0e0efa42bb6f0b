//! The kernels of the backward pass agree with the float64 reference on any problem, within the derived bounds.

mod common;

use common::backward::{BackwardRun, BackwardVariant, variants};
use common::bench;
use mtlflashattn_metal::BackwardKernel;
use mtlflashattn_simulator::{Layer, Options};

/// Runs `cases` random problems with lengths up to `most` on every variant.
fn agree(list: &[BackwardVariant], options: &[Options], cases: u32, most: usize) {
    for variant in list {
        bench::agree(variant.name, variant.cases(most), options, cases, |benches, case| {
            let run = BackwardRun::new(case, variant.lse_gradient);
            let kernels = variant.kernels(&run);
            benches.iter().try_for_each(|bench| {
                let (got, _) = run.launch(bench, &kernels, &BackwardKernel::source)?;
                run.check(&got)
            })
        });
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
