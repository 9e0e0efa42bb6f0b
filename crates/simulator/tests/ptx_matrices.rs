//! The simdgroup matrices of the NVIDIA headers, run on this processor.

mod nvidia;

use mtlflashattn_metal::{Argument, Device as _, Grid};
use mtlflashattn_simulator::{Buffer, Element, Layer, Options, Simulator};
use nvidia::{headers, numbers};

/// `D = A B + C`, with B read as it lies or transposed, and D written likewise.
const KERNEL: &str = r"
kernel void product(device const left_scalar* a [[buffer(0)]],
                    device const right_scalar* b [[buffer(1)]],
                    device const float* c [[buffer(2)]], device float* d [[buffer(3)]]) {
  nvidia::simdgroup_matrix<left_scalar, 8, 8> left;
  nvidia::simdgroup_matrix<right_scalar, 8, 8> right;
  nvidia::simdgroup_matrix<float, 8, 8> sum;
  nvidia::simdgroup_load(left, a);
  nvidia::simdgroup_load(right, b, 8, ulong2(0, 0), TRANSPOSED);
  nvidia::simdgroup_load(sum, c);
  nvidia::simdgroup_multiply_accumulate(sum, left, right, sum);
  nvidia::simdgroup_store(sum, d, 8, ulong2(0, 0), TRANSPOSED);
}
";

fn text(types: [&str; 2], transposed: bool, float_products: u8) -> String {
    format!(
        "{}typedef {} left_scalar;\ntypedef {} right_scalar;\n#define TRANSPOSED {transposed}\n{KERNEL}",
        headers(&[include_str!("../include/nvptx/simdgroup_matrix.h")], float_products),
        types[0],
        types[1],
    )
}

/// Runs the product of matrices that were rounded to their types and returns the largest error.
fn largest_error<A: Element, B: Element>(
    types: [&str; 2],
    transposed: bool,
    float_products: u8,
    left: impl Fn(f32) -> (A, f64),
    right: impl Fn(f32) -> (B, f64),
) -> f64 {
    let (a, exact_a): (Vec<A>, Vec<f64>) = numbers(1, 64).into_iter().map(left).unzip();
    let (b, exact_b): (Vec<B>, Vec<f64>) = numbers(2, 64).into_iter().map(right).unzip();
    let c = numbers(3, 64);
    let simulator = Simulator::new(Options::new(Layer::Fast));
    let pipeline = simulator.pipeline(&text(types, transposed, float_products), "product").unwrap();
    let buffers = (
        Buffer::from_slice(&a).unwrap(),
        Buffer::from_slice(&b).unwrap(),
        Buffer::from_slice(&c).unwrap(),
        Buffer::poisoned(64 * 4).unwrap(),
    );
    let arguments = [&buffers.0, &buffers.1, &buffers.2, &buffers.3].map(Argument::Buffer);
    let grid = Grid { threadgroups: [1, 1, 1], group: [32, 1, 1] };
    simulator.dispatch(&pipeline, &arguments, grid).unwrap();
    let got = buffers.3.read::<f32>();
    let at = |row: usize, column: usize| if transposed { column * 8 + row } else { row * 8 + column };
    (0..64)
        .map(|i| {
            let (row, column) = (i / 8, i % 8);
            let products = (0..8).map(|k| exact_a[row * 8 + k] * exact_b[at(k, column)]).sum::<f64>();
            (f64::from(got[at(row, column)]) - products - f64::from(c[i])).abs()
        })
        .fold(0.0, |largest, error| if error > largest || error.is_nan() { error } else { largest })
}

fn half(x: f32) -> (half::f16, f64) {
    let rounded = half::f16::from_f32(x);
    (rounded, rounded.to_f64())
}

fn bfloat(x: f32) -> (half::bf16, f64) {
    let rounded = half::bf16::from_f32(x);
    (rounded, rounded.to_f64())
}

fn float(x: f32) -> (f32, f64) {
    (x, f64::from(x))
}

/// Eight products below 1 and an addend, in float: each addition is off by half a unit at 8, which is 2^-21, at most.
const SUMMED: f64 = 9.0 / (1 << 21) as f64;
/// Each factor is off by 2^-23 of itself at most.
const SPLIT: f64 = SUMMED + 8.0 * 2.0 / (1 << 23) as f64;
/// Each factor is off by 2^-11 of itself at most.
const ROUNDED: f64 = SUMMED + 8.0 * 2.0 / (1 << 11) as f64;

#[test]
fn products_of_16_bit_matrices_are_exact() {
    for transposed in [false, true] {
        assert!(largest_error(["half", "half"], transposed, 2, half, half) <= SUMMED);
        assert!(largest_error(["bfloat", "bfloat"], transposed, 2, bfloat, bfloat) <= SUMMED);
        assert!(largest_error(["half", "bfloat"], transposed, 1, half, bfloat) <= SUMMED);
    }
}

#[test]
fn split_floats_keep_their_digits() {
    for transposed in [false, true] {
        assert!(largest_error(["float", "float"], transposed, 2, float, float) <= SPLIT);
        assert!(largest_error(["float", "half"], transposed, 2, float, half) <= SPLIT);
        assert!(largest_error(["half", "float"], transposed, 2, half, float) <= SPLIT);
    }
}

#[test]
fn rounded_floats_lose_what_tf32_has_not() {
    let error = largest_error(["float", "float"], false, 1, float, float);
    assert!(error <= ROUNDED && error > SPLIT, "{error:e}");
}
