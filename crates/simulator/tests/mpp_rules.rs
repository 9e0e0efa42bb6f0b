//! `matmul2d` and cooperative tensors: small kernels with known answers under every behaviour, and kernels that break one
//! rule each, with the message.

use half::f16;
use mtlflashattn_metal::{Argument, Device, DeviceError};
use mtlflashattn_simulator::{
    Buffer, LaneLayout, Launch, Layer, MemoryDestination, Options, Report, Simulator, TensorOps,
};

/// Rows of A, columns of A and rows of B, rows of B.
const M: usize = 16;
const D: usize = 64;
const N: usize = 32;

/// A kernel `k` with this body. A is 16 x 64 half, B is 32 x 64 half, C has 64 x 64 floats; 32 threads.
fn kernel(body: &str) -> String {
    format!(
        "#include <metal_stdlib>\n#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n\
         using namespace metal;\nusing namespace mpp::tensor_ops;\nusing mode = matmul2d_descriptor::mode;\n\
         using sizes = dextents<int32_t, 2>;\n\
         kernel void k(device half* A [[buffer(0)]], device half* B [[buffer(1)]], device float* C [[buffer(2)]],\n\
         uint tid [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],\n\
         uint sg [[simdgroup_index_in_threadgroup]]) {{\n{body}\n}}\n"
    )
}

/// Small multiples of 1/16, so that products and sums of a few are exact.
fn values(count: usize, factor: usize) -> Vec<f16> {
    (0..count).map(|i| f16::from_f32(((i * factor) % 33) as f32 / 16.0 - 1.0)).collect()
}
fn a() -> Vec<f16> {
    values(M * D, 7)
}
fn b() -> Vec<f16> {
    values(N * D, 11)
}

fn run(options: Options, threads: u32, source: &str) -> Result<(Vec<f32>, Report), DeviceError> {
    let simulator = Simulator::new(options);
    let pipeline = simulator.pipeline(source, "k")?;
    let (a, b, c) = (Buffer::from_slice(&a())?, Buffer::from_slice(&b())?, Buffer::poisoned(64 * 64 * 4)?);
    let arguments = [Argument::Buffer(&a), Argument::Buffer(&b), Argument::Buffer(&c)];
    let launch = Launch { threads: [threads, 1, 1], group: [threads, 1, 1], ..Launch::default() };
    let report = simulator.run(&pipeline, &arguments, &launch)?;
    Ok((c.read(), report))
}

/// Every layout with every behaviour of destinations in memory, in both layers.
fn behaviours() -> Vec<Options> {
    let layouts = [
        LaneLayout::ContiguousQuads,
        LaneLayout::SplitPairs,
        LaneLayout::Shuffled(1),
        LaneLayout::Shuffled(2),
        LaneLayout::Scattered(3),
    ];
    let destinations = [MemoryDestination::Overwritten, MemoryDestination::Accumulated];
    let mut all = Vec::new();
    for layer in [Layer::Fast, Layer::Check] {
        for layout in layouts {
            for destination in destinations {
                let tensor_ops = TensorOps { layout, destination, ..TensorOps::default() };
                all.push(Options::new(layer).with_tensor_ops(tensor_ops));
            }
        }
    }
    all.push(Options::new(Layer::Fast).with_seed(5));
    all
}

/// A B^T in float64.
fn product() -> Vec<f64> {
    let (a, b) = (a(), b());
    let dot = |m: usize, n: usize| (0..D).map(|k| a[m * D + k].to_f64() * b[n * D + k].to_f64()).sum();
    (0..M * N).map(|i| dot(i / N, i % N)).collect()
}

const PRODUCT: &str = "
    constexpr auto descriptor = matmul2d_descriptor(16, 32, 64, false, true);
    matmul2d<descriptor, execution_simdgroup> op;
    auto a = tensor(A, sizes(64, 16));
    auto b = tensor(B, sizes(64, 32), array<int, 2>({1, 64}));
    auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
    op.run(a, b, c);";

#[test]
fn coordinates_lead_to_every_element_in_every_layout() {
    let source = kernel(&format!(
        "{PRODUCT}
        for (ushort i = 0; i < c.get_capacity(); ++i) {{
            if (!c.is_valid_element(i)) continue;
            auto at = c.get_multidimensional_index(i);
            C[at[1] * 32 + at[0]] = c[i];
        }}"
    ));
    for options in behaviours() {
        let (got, _) = run(options.clone(), 32, &source).unwrap();
        for (i, expected) in product().iter().enumerate() {
            assert_eq!(f64::from(got[i]), *expected, "element {i}, {options:?}");
        }
    }
}

#[test]
fn attention_of_one_block() {
    let source = kernel(&format!(
        "threadgroup half tile[16 * 64];
        for (uint i = lane; i < 16 * 64; i += 32) tile[i] = A[i];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        constexpr auto qk = matmul2d_descriptor(16, 32, 64, false, true);
        matmul2d<qk, execution_simdgroup> scores;
        constexpr auto pv = matmul2d_descriptor(16, 64, 32, false, false, false, mode::multiply_accumulate);
        matmul2d<pv, execution_simdgroup> output;
        auto q = tensor(tile, sizes(64, 16));
        auto kv = tensor(B, sizes(64, 32));
        auto s = scores.get_destination_cooperative_tensor<decltype(q), decltype(kv), float>();
        scores.run(q, kv, s);
        auto m = scores.get_row_reduction_destination_cooperative_tensor<decltype(q), decltype(kv), float>();
        reduce_rows(s, m, reduction_operation::max, -FLT_MAX);
        for (ushort i = 0; i < s.get_capacity(); ++i)
            if (s.is_valid_element(i)) s[i] = exp2(s[i] - *m.map_iterator(s.begin() + i));
        auto p = output.get_left_input_cooperative_tensor<float, half, float>(s);
        auto o = output.get_destination_cooperative_tensor<decltype(p), decltype(kv), float>();
        for (auto it = o.begin(); it != o.end(); ++it) *it = 0.0f;
        output.run(p, kv, o);
        auto c = tensor(C, sizes(64, 16));
        o.store(c);"
    ));
    let (scores, b) = (product(), b());
    for options in behaviours() {
        let (got, _) = run(options.clone(), 32, &source).unwrap();
        for m in 0..M {
            let row = &scores[m * N..(m + 1) * N];
            let largest = row.iter().copied().fold(f64::MIN, f64::max);
            for d in 0..D {
                let expected: f64 = (0..N).map(|n| (row[n] - largest).exp2() * b[n * D + d].to_f64()).sum();
                let difference = (f64::from(got[m * D + d]) - expected).abs();
                // 32 products and sums of terms up to 1, and exp2 of float: a few units of 2^-24 each.
                assert!(difference <= 64.0 * f64::from(f32::EPSILON), "row {m} column {d}: {difference}, {options:?}");
            }
        }
    }
}
