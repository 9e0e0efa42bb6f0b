//! Rows, heads and sequences may lie farther apart than 32 bits count.
#![cfg(target_pointer_width = "64")]

mod common;

use common::bench::Bench;
use common::far::{Far, Form};
use common::far_backward::FarBackward;
use mtlflashattn_metal::BackwardKernel;
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

#[test]
fn offsets_of_gradients_have_64_bits() {
    let far = FarBackward::new();
    let bench = Bench::new(Options::new(Layer::Fast));
    for staged in [false, true] {
        let kernels = far.kernels(staged);
        far.judge(&bench, &kernels, &BackwardKernel::source).unwrap_or_else(|error| panic!("{staged}: {error}"));
    }
}
