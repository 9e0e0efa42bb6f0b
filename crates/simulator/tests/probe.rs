//! The small problems by which a kernel proves itself on a user's machine: right kernels pass, wrong ones do not.

#[path = "../examples/mutants/backward.rs"]
#[allow(dead_code, reason = "the mutants example uses all of it")]
mod backward_list;
#[path = "common/mod.rs"]
mod common;
#[path = "../examples/mutants/list.rs"]
#[allow(dead_code, reason = "the mutants example uses all of it")]
mod list;

use common::Run;
use common::backward::{self, BackwardRun};
use common::bench::Bench;
use common::small::{probe, probe_backward};
use common::variants::{self, Variant};
use list::MUTANTS;
use mtlflashattn_metal::{BackwardKernel, Kernel};
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

#[test]
fn kernels_of_the_backward_pass_pass_their_probes() {
    let bench = Bench::new(Options::new(Layer::Fast).with_seed(3));
    for variant in backward::variants() {
        for kernel in variant.kernels(&BackwardRun::new(&variant.case, variant.lse_gradient)) {
            probe_backward(&bench, &kernel, &kernel.source())
                .unwrap_or_else(|wrong| panic!("{}, {}: {wrong}", variant.name, kernel.pass.name()));
        }
    }
}

/// The same for the backward pass.
const BACKWARD_BUGS: [&str; 12] = [
    "gradient: delta misses a piece",
    "gradient: gradient of the lse is added",
    "gradient: lse in natural units",
    "gradient: lse of packed sequences starts at 0",
    "gradient: sign of the scale is lost",
    "gradient: softcap has no derivative",
    "gradient: bias of the first head",
    "gradient: keys see one query too early",
    "gradient: only the first head of a group counts",
    "gradient: dQ with the strides of q",
    "gradient: dV with the strides of dK",
    "gradient: a row past the end is stored",
];

#[test]
fn bugs_in_the_backward_pass_fail_the_probe() {
    let bench = Bench::new(Options::new(Layer::Fast));
    let variants = backward::variants();
    for what in BACKWARD_BUGS {
        let mutant = backward_list::MUTANTS.iter().find(|mutant| mutant.what == what).expect("a mutant");
        let variant = variants.iter().find(|variant| variant.name == mutant.variant).expect("a variant");
        let kernels = variant.kernels(&BackwardRun::new(&variant.case, variant.lse_gradient));
        let damaged: Vec<_> = kernels.iter().filter(|kernel| kernel.source().contains(mutant.from)).collect();
        assert!(!damaged.is_empty(), "{what}");
        let fails = |kernel: &&BackwardKernel| {
            probe_backward(&bench, kernel, &kernel.source().replace(mutant.from, mutant.to)).is_err()
        };
        assert!(damaged.iter().any(fails), "{what} [{}]", mutant.variant);
    }
}
