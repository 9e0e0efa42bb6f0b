//! The `matmul2d` kernels of `mtlflashattn` 0.2.0, which run on Macs, through the stand-in: it takes them, and they are
//! right. Needs `PEER`, the path of that package's `_kernel.py`; without it there is nothing to run.

#![allow(clippy::print_stdout, reason = "prints the errors that it found")]

mod common;

use common::Random;
use common::peer::{PeerKernel, PeerShape, read};
use half::{bf16, f16};
use mtlflashattn_core::Dtype;
use mtlflashattn_simulator::{LaneLayout, Layer, MemoryDestination, Options, Simulator, TensorOps};

const SHAPES: [PeerShape; 5] = [
    PeerShape { heads: 2, key_heads: 2, query_len: 64, key_len: 64, dim: 64, causal: false },
    PeerShape { heads: 2, key_heads: 1, query_len: 37, key_len: 53, dim: 64, causal: false },
    PeerShape { heads: 2, key_heads: 1, query_len: 33, key_len: 70, dim: 40, causal: true },
    PeerShape { heads: 1, key_heads: 1, query_len: 70, key_len: 33, dim: 80, causal: true },
    PeerShape { heads: 1, key_heads: 1, query_len: 50, key_len: 96, dim: 128, causal: false },
];

fn encode(values: &[f64], dtype: Dtype) -> Vec<u8> {
    let bytes = |value: f64| match dtype {
        Dtype::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(|&value| bytes(value)).collect()
}

fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f64> {
    match dtype {
        Dtype::F16 => bytes.chunks(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]]).to_f64()).collect(),
        Dtype::Bf16 => bytes.chunks(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f64()).collect(),
        Dtype::F32 => bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()).into()).collect(),
    }
}

/// Attention in float64, and the largest score and value.
fn reference(shape: &PeerShape, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, f64, f64) {
    let PeerShape { heads, key_heads, query_len, key_len, dim, causal } = *shape;
    let (mut out, mut largest) = (Vec::new(), 0.0_f64);
    for row in 0..heads * query_len {
        let (head, i) = (row / query_len, row % query_len);
        let base = head / (heads / key_heads) * key_len;
        let visible = if causal { (i + key_len + 1).saturating_sub(query_len).min(key_len) } else { key_len };
        let dot = |j: usize| (0..dim).map(|d| q[row * dim + d] * k[(base + j) * dim + d]).sum::<f64>();
        let scores: Vec<f64> = (0..visible).map(|j| dot(j) * (dim as f64).powf(-0.5)).collect();
        largest = scores.iter().fold(largest, |most, score| most.max(score.abs()));
        let most = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        out.extend((0..dim).map(|d| {
            let total: f64 = weights.iter().enumerate().map(|(j, weight)| weight * v[(base + j) * dim + d]).sum();
            if visible == 0 { 0.0 } else { total / sum }
        }));
    }
    (out, largest, v.iter().fold(0.0, |most, value| most.max(value.abs())))
}

/// A bound of the error. P is rounded to the dtype, and so is the output; those that keep S in registers also round each score twice, and the
/// sum of 32 weights after every step.
fn bound(kernel: PeerKernel, dtype: Dtype, shape: &PeerShape, largest_score: f64, largest_value: f64) -> f64 {
    let unit = match dtype {
        Dtype::F16 => 2.0_f64.powi(-11),
        Dtype::Bf16 => 2.0_f64.powi(-8),
        Dtype::F32 => 2.0_f64.powi(-24),
    };
    let single = 2.0_f64.powi(-24) * (2.0 * (shape.dim + shape.key_len) as f64 + 16.0) * (1.0 + largest_score);
    let half_scores = if kernel.keeps_scores() { 4.0 * largest_score + 32.0 } else { 0.0 };
    largest_value * (unit * (3.0 + half_scores) + single)
}

#[test]
fn kernels_that_macs_take() {
    let Some(python) = read() else {
        println!("PEER is not set: nothing was run");
        return;
    };
    let kernels = [
        (PeerKernel::V2, Dtype::F16),
        (PeerKernel::V2r, Dtype::F16),
        (PeerKernel::V2Dtype, Dtype::Bf16),
        (PeerKernel::V2Dtype, Dtype::F32),
        (PeerKernel::V2rDtype, Dtype::Bf16),
        (PeerKernel::V2rDtype, Dtype::F32),
    ];
    for shape in SHAPES {
        let mut random = Random::new(shape.dim as u64);
        let mut tensor = |heads: usize, rows: usize| -> Vec<f64> {
            (0..heads * rows * shape.dim).map(|_| 2.0 * random.uniform()).collect()
        };
        let [q, k, v] = [
            tensor(shape.heads, shape.query_len),
            tensor(shape.key_heads, shape.key_len),
            tensor(shape.key_heads, shape.key_len),
        ];
        for (kernel, dtype) in kernels {
            let bytes = [&q, &k, &v].map(|values| encode(values, dtype));
            let [q, k, v] = bytes.each_ref().map(|bytes| decode(bytes, dtype));
            let (expected, score, value) = reference(&shape, &q, &k, &v);
            let source = kernel.source(&python, shape.dim, dtype);
            for options in behaviours() {
                let simulator = Simulator::new(options.clone());
                let element_bytes = if dtype == Dtype::F32 { 4 } else { 2 };
                let tensors = [bytes[0].as_slice(), &bytes[1], &bytes[2]];
                let (out, _) = kernel
                    .run(&simulator, &source, &shape, element_bytes, tensors)
                    .unwrap_or_else(|error| panic!("{kernel:?} {shape:?} {options:?}: {error}"));
                let errors = decode(&out, dtype).into_iter().zip(&expected).map(|(got, want)| (got - want).abs());
                let error = errors.fold(0.0, |most: f64, error| if error.is_nan() { error } else { most.max(error) });
                let most = bound(kernel, dtype, &shape, score, value);
                println!("{kernel:?} {dtype} {shape:?} {:?}: {error:.1e} of {most:.1e}", options.tensor_ops.layout);
                assert!(error <= most, "{kernel:?} {dtype} {shape:?} {options:?}: {error:e}, bound {most:e}");
            }
        }
    }
}

fn behaviours() -> Vec<Options> {
    let mut all = Vec::new();
    for layout in
        [LaneLayout::ContiguousQuads, LaneLayout::SplitPairs, LaneLayout::Shuffled(3), LaneLayout::Scattered(4)]
    {
        for (layer, destination) in
            [(Layer::Check, MemoryDestination::Overwritten), (Layer::Fast, MemoryDestination::Accumulated)]
        {
            let tensor_ops = TensorOps { layout, destination, ..TensorOps::default() };
            all.push(Options::new(layer).with_tensor_ops(tensor_ops));
        }
    }
    all
}
