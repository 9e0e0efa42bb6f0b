//! The decode kernel and the merge kernel agree with the float64 reference on any problem, within the derived bounds.

mod common;

use common::bench::{self, Bench};
use common::decode::{DecodeVariant, Texts, check, variants};
use common::small::probe_decode;
use mtlflashattn_simulator::{Layer, Options};

/// Runs `cases` random problems with up to `most` keys on every variant.
fn agree(list: &[DecodeVariant], options: &[Options], cases: u32, most: usize) {
    for variant in list {
        bench::agree(variant.name, variant.cases(most), options, cases, |benches, case| {
            let run = variant.run(case);
            let kernel = variant.kernel(&run);
            let texts = Texts::of(&kernel);
            benches.iter().try_for_each(|bench| check(bench, &kernel, &texts, &run, variant.splits).map(|_| ()))
        });
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
