//! Rows, heads and sequences may lie farther apart than 32 bits count.
#![cfg(target_pointer_width = "64")]

mod common;

use common::bench::Bench;
use common::far::{Far, Form};
use mtlflashattn_simulator::{Layer, Options};

#[test]
fn offsets_have_64_bits() {
    let far = Far::new();
    let bench = Bench::new(Options::new(Layer::Fast));
    for form in [Form::Direct, Form::Staged, Form::Scalar, Form::Tensor, Form::TensorLoaded, Form::TensorStaged] {
        let kernel = far.kernel(form);
        far.judge(&bench, &kernel, &kernel.source()).unwrap_or_else(|error| panic!("{form:?}: {error}"));
    }
}
