//! The decode kernel and the merge kernel agree with the float64 reference on any problem, within the derived bounds.

mod common;

use common::Case;
use common::bench::Bench;
use common::decode::{DecodeVariant, Texts, check, variants};
use common::small::probe_decode;
use mtlflashattn_simulator::{Layer, Options};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Runs `cases` random problems with up to `most` keys on every variant.
fn agree(list: &[DecodeVariant], options: &[Options], cases: u32, most: usize) {
    for variant in list {
        let benches: Vec<Bench> = options.iter().map(|options| Bench::new(options.clone())).collect();
        let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
        let result = runner.run(&variant.cases(most), |case: Case| {
            let run = variant.run(&case);
            let kernel = variant.kernel(&run);
            for bench in &benches {
                let result = check(bench, &kernel, &Texts::of(&kernel), &run, variant.splits);
                result.map_err(TestCaseError::fail)?;
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
    agree(&variants(), &[fast(), fast().with_seed(11)], 6, 400);
}

#[test]
fn every_access_is_right() {
    agree(&variants(), &[Options::new(Layer::Check)], 2, 120);
}

#[test]
fn every_variant_passes_its_probe() {
    let bench = Bench::new(fast().with_seed(3));
    for variant in variants() {
        let kernel = variant.kernel(&variant.run(&variant.case));
        probe_decode(&bench, &kernel, &Texts::of(&kernel)).unwrap_or_else(|wrong| panic!("{}: {wrong}", variant.name));
    }
}
