//! The small problems by which a kernel proves itself on a user's machine: right kernels pass, wrong ones do not.

#[path = "common/mod.rs"]
mod common;
#[path = "../examples/mutants/list.rs"]
#[allow(dead_code, reason = "the mutants example uses all of it")]
mod list;

use common::Run;
use common::bench::Bench;
use common::small::probe;
use common::variants::{self, Variant};
use list::MUTANTS;
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::{Layer, Options};

fn kernel(variant: &Variant) -> Kernel {
    variant.kernel(&Run::new(&variant.case))
}

#[test]
fn every_variant_passes_its_probe() {
    let bench = Bench::new(Options::new(Layer::Fast).with_seed(3));
    for variant in variants::all() {
        let kernel = kernel(&variant);
        probe(&bench, &kernel, &kernel.source()).unwrap_or_else(|wrong| panic!("{}: {wrong}", variant.name));
    }
}

/// Bugs of different kinds, by the words that `make mutants` has for them.
const BUGS: [&str; 11] = [
    "one key too many",
    "out is written with the strides of q",
    "lse is written with the head stride of out",
    "lse of packed sequences starts at 0",
    "rows without keys have a finite lse",
    "slopes of the first sequence",
    "bias in the wrong units",
    "bias ignores its key stride",
    "a sink that is none counts",
    "sum is not rescaled",
    "lane map: columns",
];

#[test]
fn planted_bugs_fail_the_probe() {
    let bench = Bench::new(Options::new(Layer::Fast));
    let variants = variants::all();
    for what in BUGS {
        let mutant = MUTANTS.iter().find(|mutant| mutant.what == what).expect("a mutant");
        let kernel = kernel(variants.iter().find(|variant| variant.name == mutant.variant).expect("a variant"));
        let source = kernel.source();
        assert!(source.contains(mutant.from), "{what}");
        let result = probe(&bench, &kernel, &source.replace(mutant.from, mutant.to));
        assert!(result.is_err(), "{what} [{}]", mutant.variant);
    }
}
