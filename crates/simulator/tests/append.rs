//! The append kernel writes what the float64 reference writes, and nothing else.

mod common;

use common::append::{AppendForm, AppendRun, forms};
use common::bench::Bench;
use common::small::probe_append;
use common::{Case, decode};
use mtlflashattn_simulator::{Layer, Options};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

fn agree(forms: &[(AppendForm, Case)], options: &[Options], cases: u32) {
    for (form, case) in forms {
        let benches: Vec<Bench> = options.iter().map(|options| Bench::new(options.clone())).collect();
        let variant = decode::DecodeVariant::without_tile(form.name, case);
        let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
        let result = runner.run(&variant.cases(70), |case: Case| {
            let run = AppendRun::new(&case, *form);
            for bench in &benches {
                let (got, _) = run.launch(bench, &run.kernel().source()).map_err(TestCaseError::fail)?;
                run.check(&got).map_err(TestCaseError::fail)?;
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("{}: {error}", form.name);
        }
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
