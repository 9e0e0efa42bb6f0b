//! The append kernel writes what the float64 reference writes, and nothing else.

mod common;

use common::append::{AppendForm, AppendRun, forms};
use common::bench::{self, Bench};
use common::small::probe_append;
use common::{Case, decode};
use mtlflashattn_simulator::{Layer, Options};

fn agree(forms: &[(AppendForm, Case)], options: &[Options], cases: u32) {
    for (form, case) in forms {
        let variant = decode::DecodeVariant::without_tile(form.name, case);
        bench::agree(form.name, variant.cases(70), options, cases, |benches, case| {
            let run = AppendRun::new(case, *form);
            benches.iter().try_for_each(|bench| run.check(&run.launch(bench, &run.kernel().source())?.0))
        });
    }
}

#[test]
fn new_keys_go_where_the_reference_puts_them() {
    agree(&forms(), &[Options::new(Layer::Fast), Options::new(Layer::Check)], 24);
}

#[test]
fn every_variant_passes_its_probe() {
    let bench = Bench::new(Options::new(Layer::Fast));
    for (form, case) in forms() {
        let kernel = AppendRun::new(&case, form).kernel();
        probe_append(&bench, kernel, &kernel.source()).unwrap_or_else(|wrong| panic!("{}: {wrong}", form.name));
    }
}
