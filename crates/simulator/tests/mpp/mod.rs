//! Small kernels of `matmul2d`, their numbers, and the behaviours that Apple leaves open.
#![allow(dead_code, reason = "each test binary uses its part")]

use half::f16;
use mtlflashattn_metal::{Argument, Device, DeviceError};
use mtlflashattn_simulator::{
    Buffer, LaneLayout, Launch, Layer, MemoryDestination, Options, Report, Simulator, TensorOps,
};

/// Rows of A, columns of A and rows of B, rows of B.
pub const M: usize = 16;
pub const D: usize = 64;
pub const N: usize = 32;

/// A kernel `k` with this body. A is 16 x 64 half, B is 32 x 64 half, C has 64 x 64 floats; 32 threads.
pub fn kernel(body: &str) -> String {
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
pub fn values(count: usize, factor: usize) -> Vec<f16> {
    (0..count).map(|i| f16::from_f32(((i * factor) % 33) as f32 / 16.0 - 1.0)).collect()
}
pub fn a() -> Vec<f16> {
    values(M * D, 7)
}
pub fn b() -> Vec<f16> {
    values(N * D, 11)
}

pub fn run(options: Options, threads: u32, source: &str) -> Result<(Vec<f32>, Report), DeviceError> {
    let simulator = Simulator::new(options);
    let pipeline = simulator.pipeline(source, "k")?;
    let (a, b, c) = (Buffer::from_slice(&a())?, Buffer::from_slice(&b())?, Buffer::poisoned(64 * 64 * 4)?);
    let arguments = [Argument::Buffer(&a), Argument::Buffer(&b), Argument::Buffer(&c)];
    let launch = Launch { threads: [threads, 1, 1], group: [threads, 1, 1], ..Launch::default() };
    let report = simulator.run(&pipeline, &arguments, &launch)?;
    Ok((c.read(), report))
}

/// Every layout with every behaviour of destinations in memory, in both layers.
pub fn behaviours() -> Vec<Options> {
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
pub fn product() -> Vec<f64> {
    let (a, b) = (a(), b());
    let dot = |m: usize, n: usize| (0..D).map(|k| a[m * D + k].to_f64() * b[n * D + k].to_f64()).sum();
    (0..M * N).map(|i| dot(i / N, i % N)).collect()
}

pub const PRODUCT: &str = "
    constexpr auto descriptor = matmul2d_descriptor(16, 32, 64, false, true);
    matmul2d<descriptor, execution_simdgroup> op;
    auto a = tensor(A, sizes(64, 16));
    auto b = tensor(B, sizes(64, 32), array<int, 2>({1, 64}));
    auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
    op.run(a, b, c);";

pub fn check() -> Options {
    Options::new(Layer::Check)
}

pub fn with(tensor_ops: TensorOps) -> Options {
    check().with_tensor_ops(tensor_ops)
}

/// What the check layer says of a body that it must stop.
#[track_caller]
pub fn stopped(options: Options, threads: u32, body: &str, parts: &[&str]) {
    match run(options, threads, &kernel(body)) {
        Ok((output, _)) => panic!("not stopped: {body}\n{:?}", &output[..32]),
        Err(error) => {
            let message = error.to_string();
            for part in parts {
                assert!(message.contains(part), "{part:?} is not in {message:?}");
            }
        }
    }
}

/// The tensors and operations of most rules.
pub const SETUP: &str = "
    constexpr auto descriptor = matmul2d_descriptor(16, 32, 64, false, true);
    matmul2d<descriptor, execution_simdgroup> op;
    constexpr auto value_descriptor = matmul2d_descriptor(16, 64, 32, false, false, false, mode::multiply_accumulate);
    matmul2d<value_descriptor, execution_simdgroup> values;
    auto a = tensor(A, sizes(64, 16));
    auto b = tensor(B, sizes(64, 32));
    auto out = tensor(C, sizes(32, 16));
    auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
";

pub fn after_setup(body: &str) -> String {
    format!("{SETUP}{body}")
}

/// A, or a part of it, through threadgroup memory.
pub const STAGED: &str = "
    threadgroup half tile[16 * 64];
    for (uint i = lane; i < 16 * 64; i += 32) tile[i] = A[i];
    simdgroup_barrier(mem_flags::mem_threadgroup); // before
    auto t = tensor(tile, sizes(64, 16));
    op.run(t, b, c);
    simdgroup_barrier(mem_flags::mem_threadgroup); // after
    for (uint i = lane; i < 16 * 64; i += 32) tile[i] = 0.0h;
    c.store(out);";
