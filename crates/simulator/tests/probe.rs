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
    for variant in variants::all() {
        let kernel = kernel(&variant);
        for options in [Options::new(Layer::Fast), Options::new(Layer::Fast).with_seed(3)] {
            let result = probe(&Bench::new(options), &kernel, &kernel.source());
            result.unwrap_or_else(|wrong| panic!("{}: {wrong}", variant.name));
        }
    }
}

/// Bugs of different kinds, by the words that `make mutants` has for them.
const BUGS: [&str; 0] = [];

#[test]
fn planted_bugs_fail_the_probe() {
    let bench = Bench::new(Options::new(Layer::Fast));
    let variants = variants::all();
    let all = std::env::var("ALL").is_ok();
    let mut missed = 0;
    let mut seen = 0;
    let from: usize = std::env::var("FROM").map_or(0, |x| x.parse().unwrap());
    for (i, mutant) in MUTANTS.iter().enumerate().skip(from) {
        let Some(variant) = variants.iter().find(|variant| variant.name == mutant.variant) else { continue };
        if !all || mutant.equivalent.is_some() {
            continue;
        }
        println!("#{i} {}", mutant.what);
        let kernel = kernel(variant);
        let source = kernel.source().replace(mutant.from, mutant.to);
        seen += 1;
        match probe(&bench, &kernel, &source) {
            Ok(()) => {
                missed += 1;
                println!("MISSED {} [{}]", mutant.what, mutant.variant)
            }
            Err(how) => println!("caught {} [{}]: {how:.90}", mutant.what, mutant.variant),
        }
    }
    println!("{missed} of {seen} missed");
}
