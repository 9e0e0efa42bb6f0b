//! `matmul2d` and cooperative tensors: small kernels with known answers under every behaviour, and kernels that break one
//! rule each, with the message.

#![allow(clippy::float_cmp, reason = "the values are chosen to be exact")]

use half::f16;
use mtlflashattn_metal::{Argument, Device, DeviceError};
use mtlflashattn_simulator::{
    Buffer, LaneLayout, Launch, Layer, MacOs, MemoryDestination, Options, OutsideExtents, Report, Simulator, TensorOps,
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

/// Slots of a lane and their coordinates `[outer, inner]`, as MLX's `steel/attn/nax.h` and PyTorch's `MppAttention.h` have
/// them for the M5, for a 16x32x16 product.
fn m5_coordinates(operand: &str, lane: usize) -> Vec<[usize; 2]> {
    let quad = lane >> 2;
    let row = (quad & 4) | ((lane >> 1) & 3);
    let column = ((quad & 2) | (lane & 1)) * 4;
    let coordinates = |i: usize| match operand {
        "left" => [row + (i >> 2) * 8, column + (i & 3)],
        "right, transposed" => [row + ((i >> 2) & 1) * 8 + (i >> 3) * 16, column + (i & 3)],
        "right" | "destination" => [row + ((i >> 2) & 1) * 8, column + (i & 3) + (i >> 3) * 16],
        _ => panic!("{operand}"),
    };
    (0..if operand == "left" { 8 } else { 16 }).map(coordinates).collect()
}

#[test]
fn contiguous_quads_are_the_layout_of_an_m5() {
    let tensor = |call: &str, transposed: bool| {
        kernel(&format!(
            "constexpr auto d = matmul2d_descriptor(16, 32, 16, false, {transposed}); matmul2d<d, execution_simdgroup> op;
             auto t = op.{call};
             for (ushort i = 0; i < t.get_capacity(); ++i) {{
                 auto at = t.get_multidimensional_index(t.begin() + i);
                 C[(lane * 16 + i) * 2] = at[1]; C[(lane * 16 + i) * 2 + 1] = at[0];
             }}
             C[4095] = t.get_capacity();"
        ))
    };
    let right = "get_right_input_cooperative_tensor<half, half, float>()";
    for (operand, call, transposed) in [
        ("left", "get_left_input_cooperative_tensor<half, half, float>()", false),
        ("right", right, false),
        ("right, transposed", right, true),
        (
            "destination",
            "get_destination_cooperative_tensor<tensor<device half, sizes, tensor_inline>, \
          tensor<device half, sizes, tensor_inline>, float>()",
            false,
        ),
    ] {
        let (got, _) = run(Options::new(Layer::Fast), 32, &tensor(call, transposed)).unwrap();
        for lane in 0..32 {
            let expected = m5_coordinates(operand, lane);
            assert_eq!(got[4095], expected.len() as f32, "{operand}");
            for (i, [outer, inner]) in expected.into_iter().enumerate() {
                let at = (lane * 16 + i) * 2;
                assert_eq!([got[at], got[at + 1]], [outer as f32, inner as f32], "{operand} lane {lane} slot {i}");
            }
        }
    }
}

#[test]
fn attention_of_one_block() {
    let source = kernel(
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
        o.store(c);",
    );
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

fn check() -> Options {
    Options::new(Layer::Check)
}

fn with(tensor_ops: TensorOps) -> Options {
    check().with_tensor_ops(tensor_ops)
}

/// What the compiler says of a body that it must refuse.
#[track_caller]
fn refused_by(macos: MacOs, body: &str) -> String {
    let options = Options::new(Layer::Type).with_tensor_ops(TensorOps { macos, ..TensorOps::default() });
    match Simulator::new(options).pipeline(&kernel(body), "k") {
        Ok(_) => panic!("accepted: {body}"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn refuses(rules: &[(&str, &str)]) {
    for (body, part) in rules {
        let message = refused_by(MacOs::V26_2, body);
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// What the check layer says of a body that it must stop.
#[track_caller]
fn stopped(options: Options, threads: u32, body: &str, parts: &[&str]) {
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

const SETUP: &str = "
    constexpr auto descriptor = matmul2d_descriptor(16, 32, 64, false, true);
    matmul2d<descriptor, execution_simdgroup> op;
    constexpr auto value_descriptor = matmul2d_descriptor(16, 64, 32, false, false, false, mode::multiply_accumulate);
    matmul2d<value_descriptor, execution_simdgroup> values;
    auto a = tensor(A, sizes(64, 16));
    auto b = tensor(B, sizes(64, 32));
    auto out = tensor(C, sizes(32, 16));
    auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
";

fn after_setup(body: &str) -> String {
    format!("{SETUP}{body}")
}

#[track_caller]
fn refuses_after_setup(rules: &[(&str, &str)]) {
    for (body, part) in rules {
        refuses(&[(&after_setup(body), part)]);
    }
}

#[test]
fn the_setup_is_right() {
    let options = Options::new(Layer::Type);
    Simulator::new(options).pipeline(&kernel(&after_setup("op.run(a, b, c); c.store(out);")), "k").unwrap();
}

#[test]
fn operands_are_variables_with_elements_that_may_be_written() {
    refuses_after_setup(&[
        ("device const half* R = A; auto r = tensor(R, sizes(64, 16)); op.run(r, b, c);", "elements must not be const"),
        ("const auto r = tensor(A, sizes(64, 16)); op.run(r, b, c);", "an operand must not be const"),
        ("op.run(tensor(A, sizes(64, 16)), b, c);", "no matching member function"),
        ("op.run(a.slice(0, 0), b, c);", "no matching member function"),
        ("auto d = op.get_destination_cooperative_tensor<half, half, float>();", "a tensor or a cooperative_tensor"),
        (
            "using R = const decltype(a); op.get_destination_cooperative_tensor<R, R, float>();",
            "strip reference, const",
        ),
        ("float x; op.run(a, b, x);", "an operand's type is a tensor"),
        ("auto r = tensor(A, extents<int, 1024>()); op.run(r, b, c);", "a tensor has rank 2"),
        ("auto s = a.slice<64, 8>(0, 0); op.run(s, b, c);", "a static extent is smaller than the tile"),
    ]);
}

#[test]
fn address_spaces_are_part_of_a_tensor() {
    refuses_after_setup(&[
        ("tensor<threadgroup half, sizes, tensor_inline> t = a;", "no viable conversion"),
        (
            "threadgroup half tile[1024]; tensor<device half, sizes, tensor_inline> t(tile, sizes(64, 16));",
            "no matching",
        ),
        ("tensor<device half, sizes> t(A, sizes(64, 16));", "only tensor_inline is simulated"),
    ]);
}

#[test]
fn types_of_elements_must_fit() {
    refuses_after_setup(&[
        (
            "auto d = op.get_destination_cooperative_tensor<decltype(out), decltype(b), half>();",
            "combination of element types",
        ),
        (
            "auto d = op.get_destination_cooperative_tensor<decltype(a), decltype(b), bfloat>();",
            "combination of element types",
        ),
        ("auto l = values.get_left_input_cooperative_tensor<bfloat, half, float>();", "ollama#15862"),
        ("auto l = values.get_left_input_cooperative_tensor<device half, half, float>();", "without address space"),
        (
            "auto i = tensor((device int*)C, sizes(64, 32)); auto d = op.get_destination_cooperative_tensor<decltype(i), \
             decltype(i), int>();",
            "half, bfloat and float elements are simulated",
        ),
    ]);
    let bfloats = after_setup(
        "auto i = tensor((device bfloat*)C, sizes(64, 32));
         auto d = op.get_destination_cooperative_tensor<decltype(i), decltype(i), float>();",
    );
    assert!(refused_by(MacOs::V26_0, &bfloats).contains("bfloat needs macOS 26.1"));
    Simulator::new(Options::new(Layer::Type)).pipeline(&kernel(&bfloats), "k").unwrap();
}

#[test]
fn tiles_have_sizes_that_compile() {
    let tile = |descriptor: &str| {
        format!(
            "constexpr auto d = matmul2d_descriptor({descriptor}); matmul2d<d, execution_simdgroup> op;
             auto a = tensor(A, sizes(64, 16)); auto b = tensor(B, sizes(64, 32)); auto out = tensor(C, sizes(32, 16));
             op.run(a, b, out);"
        )
    };
    let sizes = "m and n are multiples of 8, and one of them of 16";
    for (descriptor, part) in [
        ("8, 8, 64, false, true", sizes),
        ("12, 32, 64, false, true", sizes),
        ("8, 24, 64, false, true", sizes),
        ("16, 32, 24, false, true", "a static k is a multiple of 16"),
    ] {
        refuses(&[(&tile(descriptor), part)]);
    }
    let sixteen = tile("16, 32, 16, false, true");
    assert!(refused_by(MacOs::V26_1, &sixteen).contains("before macOS 26.2 a static k is a multiple of 32"));
    Simulator::new(Options::new(Layer::Type)).pipeline(&kernel(&sixteen), "k").unwrap();
    let thread = tile("16, 32, 64, false, true").replace("execution_simdgroup", "execution_thread");
    refuses(&[(&thread, "execution_thread is not simulated")]);
}

#[test]
fn cooperative_inputs_have_rules_of_their_own() {
    refuses_after_setup(&[
        (
            "constexpr auto d = matmul2d_descriptor(16, 64); matmul2d<d, execution_simdgroup> o;
             auto l = o.get_left_input_cooperative_tensor<half, half, float>();",
            "Inner dimension cannot be dynamic",
        ),
        (
            "matmul2d<value_descriptor, execution_simdgroups<4>> o;
             auto l = o.get_left_input_cooperative_tensor<half, half, float>();",
            "Input cooperative tensors require a single SIMD group",
        ),
        (
            "matmul2d<value_descriptor, execution_simdgroups<4>> o;
             auto r = o.get_right_input_cooperative_tensor<half, half, float>();",
            "Input cooperative tensors require a single SIMD group",
        ),
        (
            "auto p = values.get_left_input_cooperative_tensor<half, half, float>(c);",
            "the source's element type must equal the left input's",
        ),
        ("auto p = op.get_left_input_cooperative_tensor<float, half, float>(c);", "must be m and k of this operation"),
        (
            "auto l = values.get_left_input_cooperative_tensor<float, half, float>();
             auto p = values.get_left_input_cooperative_tensor<float, half, float>(l);",
            "the source must be the destination of a matmul2d",
        ),
        (
            "constexpr auto d = matmul2d_descriptor(16, 64, 32, true); matmul2d<d, execution_simdgroup> o;
             auto p = o.get_left_input_cooperative_tensor<float, half, float>(c);",
            "must not be transposed",
        ),
        (
            "matmul2d<descriptor, execution_simdgroups<4>> o; auto s = o.get_destination_cooperative_tensor<decltype(a), \
             decltype(b), float>(); auto p = values.get_left_input_cooperative_tensor<float, half, float>(s);",
            "the source needs a single simdgroup",
        ),
        (
            "auto l = values.get_left_input_cooperative_tensor<half, half, float>(); op.run(l, b, c);",
            "the sizes of another operation",
        ),
        ("op.run(c, b, c);", "made for another operand"),
        (
            "auto l = op.get_left_input_cooperative_tensor<half, half, float>(); op.run(l, b, c);",
            "made for other kinds of operands",
        ),
        ("values.run(a, b, c);", "the sizes of another operation"),
    ]);
}

#[test]
fn cooperative_tensors_stand_alone() {
    refuses_after_setup(&[
        ("auto d = c;", "deleted"),
        ("decltype(c) all[2];", "an array of cooperative tensors"),
        ("struct Both { decltype(c) first; int second; }; Both both;", "has a cooperative tensor"),
        ("auto m = c.get_mask(0);", "no member named 'get_mask'"),
        ("auto t = a.static_slice<16, 16>(0, 0);", "no member named 'static_slice'"),
        ("constexpr int n = c.get_capacity();", "constant expression"),
        ("auto h = tensor((device half*)C, sizes(32, 16)); c.store(h);", "the element types must be equal"),
        ("c.load(c);", "load and store take a tensor"),
    ]);
}

#[test]
fn reductions_know_their_source() {
    let rows = "auto rows = op.get_row_reduction_destination_cooperative_tensor<decltype(a), decltype(b), float>();";
    let columns = rows.replace("rows", "columns").replace("row_", "column_");
    let cases = [
        (format!("{rows} reduce_columns(c, rows);"), "made for another reduction"),
        (format!("{columns} reduce_rows(c, columns);"), "made for another reduction"),
        (format!("{rows} reduce_rows(rows, rows);"), "a reduction's source is the destination"),
        (format!("{} reduce_rows(c, rows);", rows.replace("float>", "half>")), "no matching function"),
        (format!("{rows} auto x = c.map_iterator(rows.begin());"), "from a destination to a reduction"),
        (
            "matmul2d<descriptor, execution_simdgroups<2>> o; auto rows = \
             o.get_row_reduction_destination_cooperative_tensor<decltype(a), decltype(b), float>();"
                .to_owned(),
            "a reduction needs a single simdgroup",
        ),
    ];
    for (body, part) in cases {
        refuses(&[(&after_setup(&body), part)]);
    }
}

#[test]
fn all_lanes_run_together_and_with_the_same_operands() {
    stopped(check(), 32, &after_setup("if (lane < 16) op.run(a, b, c);"), &["matmul2d needs all 32 lanes"]);
    stopped(Options::new(Layer::Fast), 48, &after_setup("op.run(a, b, c);"), &["matmul2d needs all 32 lanes"]);
    let differs = "auto r = tensor(A + (lane == 7 ? 64 : 0), sizes(64, 15)); op.run(r, b, c);";
    stopped(check(), 32, &after_setup(differs), &["kernel.metal:", "the left operand of matmul2d differs"]);
    let differs = "auto r = tensor(B, sizes(64, lane == 7 ? 30 : 32)); op.run(a, r, c);";
    stopped(check(), 32, &after_setup(differs), &["the right operand of matmul2d differs"]);
    let differs = "if (lane < 16) op.run(a, b, c); else op.run(a, b, c);";
    stopped(check(), 32, &after_setup(&differs.replace("else", "\nelse")), &["divergence"]);
    let differs = "auto rows = op.get_row_reduction_destination_cooperative_tensor<decltype(a), decltype(b), float>();
        op.run(a, b, c); reduce_rows(c, rows, reduction_operation::max, float(lane));";
    stopped(check(), 32, &after_setup(differs), &["the arguments of a reduction differ"]);
}

#[test]
fn a_scope_of_several_simdgroups_is_the_whole_threadgroup() {
    let body =
        "constexpr auto d = matmul2d_descriptor(16, 32, 64, false, true); matmul2d<d, execution_simdgroups<2>> op;
        auto a = tensor(A, sizes(64, 16)); auto b = tensor(B, sizes(64, 32));
        auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
        op.run(a, b, c);
        auto out = tensor(C, sizes(32, 16));
        c.store(out);";
    for threads in [32, 128] {
        stopped(check(), threads, body, &["execution_simdgroups<2> in a threadgroup of"]);
    }
    stopped(check(), 64, &body.replace("op.run", "if (sg == 0) op.run"), &["divergence"]);
    for options in behaviours() {
        let (got, report) = run(options, 64, &kernel(body)).unwrap();
        assert!(product().iter().zip(&got).all(|(expected, got)| f64::from(*got) == *expected));
        assert_eq!(report.counters.tensor_operations, 1);
    }
}

#[test]
fn tensors_stay_inside_of_themselves() {
    let outside = [
        ("auto t = b.slice(0, 33); op.run(a, t, c);", "a slice begins outside of its tensor"),
        ("auto t = b.slice<64, 32>(0, 8); op.run(a, t, c);", "a slice of static size reaches beyond its tensor"),
        ("auto t = tensor(A, sizes(64, int(lane) - 40)); op.run(t, b, c);", "a negative extent"),
        (
            "auto t = tensor(A, sizes(32, 16), array<int, 2>{2, 64}); op.run(t, b, c);",
            "the first stride of a tensor must be 1",
        ),
        (
            "auto t = tensor(A, sizes(64, 1 << 30), array<int, 2>{1, 64}); auto s = t.slice(0, 1 << 29); op.run(s, b, c);",
            "does not fit the tensor's index type",
        ),
        (
            "auto t = tensor(A + 64, sizes(64, 16)); op.run(t, b, c);",
            "out-of-bounds read of 128 bytes, 0 bytes past the end of buffer 0",
        ),
        ("auto t = tensor(C + 4096 - 16, sizes(32, 16)); op.run(a, b, t);", "past the end of buffer 2"),
        ("c[c.get_capacity()] = 0.0f;", "element 16 of a cooperative tensor, of which a lane has 16"),
    ];
    for (body, part) in outside {
        stopped(check(), 32, &after_setup(body), &["kernel.metal:", part]);
    }
    let beyond = "auto t = tensor(A + 64, sizes(64, 16)); op.run(t, b, c);";
    stopped(
        Options::new(Layer::Fast),
        32,
        &after_setup(beyond),
        &["kernel.metal:", "0 bytes past the end of buffer 0"],
    );
}

/// A, or a part of it, through threadgroup memory.
const STAGED: &str = "
    threadgroup half tile[16 * 64];
    for (uint i = lane; i < 16 * 64; i += 32) tile[i] = A[i];
    simdgroup_barrier(mem_flags::mem_threadgroup); // before
    auto t = tensor(tile, sizes(64, 16));
    op.run(t, b, c);
    simdgroup_barrier(mem_flags::mem_threadgroup); // after
    for (uint i = lane; i < 16 * 64; i += 32) tile[i] = 0.0h;
    c.store(out);";

#[test]
fn memory_operands_need_barriers() {
    let staged = after_setup(STAGED);
    run(check(), 32, &kernel(&staged)).unwrap();
    let barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);";
    let without_first = staged.replace(&format!("{barrier} // before"), "");
    // Even though lane 0 wrote first, nobody knows which lane reads.
    stopped(check(), 32, &without_first, &["threadgroup"]);
    let without_second = staged.replace(&format!("{barrier} // after"), "");
    stopped(
        check(),
        32,
        &without_second,
        &["data race in threadgroup array 0", "write after read by an operation of simdgroup 0"],
    );
    stopped(
        check(),
        32,
        &staged.replace("i < 16 * 64; i += 32) tile[i] = A[i]", "i < 512; i += 32) tile[i] = A[i]"),
        &["has not written"],
    );
    // Two simdgroups: each orders itself only.
    stopped(check(), 64, &staged, &["threadgroup array 0"]);
}

#[test]
fn a_destination_in_memory_needs_a_barrier_and_may_accumulate() {
    let body = after_setup(
        "for (uint i = lane; i < 512; i += 32) C[i] = 1.0f;
         simdgroup_barrier(mem_flags::mem_device);
         op.run(a, b, out);
         simdgroup_barrier(mem_flags::mem_device); // after
         float x = C[lane];
         simdgroup_barrier(mem_flags::mem_device);
         C[lane + 512] = x;",
    );
    for (destination, more) in [(MemoryDestination::Overwritten, 0.0), (MemoryDestination::Accumulated, 1.0)] {
        let (got, _) = run(with(TensorOps { destination, ..TensorOps::default() }), 32, &kernel(&body)).unwrap();
        assert!(product().iter().zip(&got).all(|(expected, got)| f64::from(*got) == expected + more));
    }
    let accumulating = body.replace(
        "false, true);\n    matmul2d<descriptor",
        "false, true, false, mode::multiply_accumulate);\n    matmul2d<descriptor",
    );
    assert_ne!(accumulating, body);
    let (got, _) = run(check(), 32, &kernel(&accumulating)).unwrap();
    assert!(product().iter().zip(&got).all(|(expected, got)| f64::from(*got) == expected + 1.0));
    let racy = body.replace("simdgroup_barrier(mem_flags::mem_device); // after", "");
    stopped(check(), 32, &racy, &["data race in buffer 2", "read after write by an operation of simdgroup 0"]);
    let twice = body.replace("op.run(a, b, out);", "op.run(a, b, out); op.run(a, b, out);");
    stopped(check(), 32, &twice, &["data race in buffer 2"]);
}

#[test]
fn what_lies_outside_is_not_to_be_trusted() {
    let body = after_setup(
        "auto few = b.slice(0, 20);
         op.run(a, few, c);
         c.store(out);",
    );
    let zero = TensorOps { outside: OutsideExtents::Zero, ..TensorOps::default() };
    for (options, filled) in [(check(), f32::is_nan as fn(f32) -> bool), (with(zero), |value: f32| value == 0.0)] {
        let (got, _) = run(options, 32, &kernel(&body)).unwrap();
        for (i, expected) in product().iter().enumerate() {
            let (row, column) = (i / N, i % N);
            // Column n of the product is row 20 + n of B.
            if column < 12 {
                assert_eq!(f64::from(got[i]), product()[row * N + column + 20], "{expected}");
            } else {
                assert!(filled(got[i]), "row {row} column {column}: {}", got[i]);
            }
        }
    }
    // A static inner dimension longer than the operands: 0 times NaN is NaN.
    let inner =
        after_setup("auto less = a.slice(16, 0); auto few = b.slice(16, 0); op.run(less, few, c); c.store(out);");
    let (got, _) = run(check(), 32, &kernel(&inner)).unwrap();
    assert!(got[..512].iter().all(|value| value.is_nan()));
    // A dynamic one ends where the operands end.
    let dynamic = inner.replace("descriptor(16, 32, 64,", "descriptor(16, 32, dynamic_length_v<int>,");
    let (got, _) = run(check(), 32, &kernel(&dynamic)).unwrap();
    let (a, b) = (a(), b());
    let last: f64 = (16..D).map(|k| a[15 * D + k].to_f64() * b[31 * D + k].to_f64()).sum();
    assert_eq!(f64::from(got[511]), last);
}

#[test]
fn elements_that_nobody_owns_are_poison() {
    // 8 rows: half of a 16x16 fragment is nobody's.
    let body = "constexpr auto d = matmul2d_descriptor(8, 32, 64, false, true); matmul2d<d, execution_simdgroup> op;
        auto a = tensor(A, sizes(64, 8)); auto b = tensor(B, sizes(64, 32));
        auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
        for (ushort i = 0; i < c.get_capacity(); ++i) c[i] = 0.0f;
        op.run(a, b, c);
        float owned = 0.0f, other = 0.0f;
        for (ushort i = 0; i < c.get_capacity(); ++i) (c.is_valid_element(i) ? owned : other) += c[i];
        C[lane] = owned; C[lane + 32] = other;
        for (ushort i = 0; i < c.get_capacity(); ++i) if (!c.is_valid_element(i)) C[lane + 64] = c.get(i);";
    let (got, _) = run(check(), 32, &kernel(body)).unwrap();
    assert!(got[..32].iter().all(|value| !value.is_nan()) && got[32..64].iter().all(|value| value.is_nan()));
    let sum: f64 = product()[..8 * N].iter().sum();
    assert_eq!(got[..32].iter().map(|&value| f64::from(value)).sum::<f64>(), sum);
    assert!(got[64..96].iter().all(|&value| value == 0.0));
}

#[test]
fn relaxed_precision_cuts_float_operands() {
    let body = |relaxed: &str| {
        format!(
            "constexpr auto d = matmul2d_descriptor(16, 32, 16, false, false, {relaxed});
             matmul2d<d, execution_simdgroup> op;
             auto l = op.get_left_input_cooperative_tensor<float, half, float>();
             auto r = op.get_right_input_cooperative_tensor<float, half, float>();
             auto c = op.get_destination_cooperative_tensor<decltype(l), decltype(r), float>();
             for (ushort i = 0; i < l.get_capacity(); ++i) {{
                 auto at = l.get_multidimensional_index(i);
                 if (l.is_valid_element(i)) l[i] = at[0] == 0 ? 1.0f + 0x1p-11f : 0.0f;
             }}
             for (ushort i = 0; i < r.get_capacity(); ++i) if (r.is_valid_element(i)) r[i] = 1.0h;
             op.run(l, r, c);
             auto out = tensor(C, sizes(32, 16));
             c.store(out);"
        )
    };
    let (exact, _) = run(check(), 32, &kernel(&body("false"))).unwrap();
    assert!(exact[..512].iter().all(|&value| value == 1.0 + 2.0_f32.powi(-11)));
    let (cut, _) = run(check(), 32, &kernel(&body("true"))).unwrap();
    assert!(cut[..512].iter().all(|&value| value == 1.0));
}

#[test]
fn every_orientation_of_every_operand() {
    // A^T is 64 x 16 in memory, and so on: fill from coordinates and from memory.
    for (left, right) in [(false, false), (false, true), (true, false), (true, true)] {
        let body = format!(
            "constexpr auto d = matmul2d_descriptor(16, 32, 64, {left}, {right});
             matmul2d<d, execution_simdgroup> op;
             auto at = tensor(C + 1024, {a_sizes}); auto bt = tensor(C + 2048, {b_sizes});
             for (uint i = lane; i < 16 * 64; i += 32) C[1024 + {left_at}] = float(A[i]);
             for (uint i = lane; i < 32 * 64; i += 32) C[2048 + {right_at}] = float(B[i]);
             simdgroup_barrier(mem_flags::mem_device);
             auto c = op.get_destination_cooperative_tensor<decltype(at), decltype(bt), float>();
             op.run(at, bt, c);
             auto l = op.get_left_input_cooperative_tensor<float, float, float>();
             auto r = op.get_right_input_cooperative_tensor<float, float, float>();
             l.load(at); r.load(bt);
             auto e = op.get_destination_cooperative_tensor<decltype(l), decltype(r), float>();
             op.run(l, r, e);
             auto out = tensor(C, sizes(32, 16)); auto second = tensor(C + 512, sizes(32, 16));
             c.store(out); e.store(second);",
            a_sizes = if left { "sizes(16, 64)" } else { "sizes(64, 16)" },
            b_sizes = if right { "sizes(64, 32)" } else { "sizes(32, 64)" },
            left_at = if left { "i % 64 * 16 + i / 64" } else { "i" },
            right_at = if right { "i" } else { "i % 64 * 32 + i / 64" },
        );
        for layout in
            [LaneLayout::ContiguousQuads, LaneLayout::SplitPairs, LaneLayout::Shuffled(8), LaneLayout::Scattered(8)]
        {
            let (got, _) = run(with(TensorOps { layout, ..TensorOps::default() }), 32, &kernel(&body)).unwrap();
            for half in [&got[..512], &got[512..1024]] {
                assert!(
                    product().iter().zip(half).all(|(expected, got)| f64::from(*got) == *expected),
                    "{left} {right} {layout:?}"
                );
            }
        }
    }
}

#[test]
fn reductions_of_rows_and_columns() {
    let body = format!(
        "{PRODUCT}
        auto rows = op.get_row_reduction_destination_cooperative_tensor<decltype(a), decltype(b), float>();
        auto columns = op.get_column_reduction_destination_cooperative_tensor<decltype(a), decltype(b), float>();
        reduce_rows(c, rows);
        for (ushort i = 0; i < rows.get_capacity(); ++i)
            if (rows.is_valid_element(i)) C[rows.get_multidimensional_index(i)[0]] = rows[i];
        reduce_rows(c, rows, reduction_operation::max, reduction_operation_identity<float>::max_identity);
        for (ushort i = 0; i < rows.get_capacity(); ++i)
            if (rows.is_valid_element(i)) C[16 + rows.get_multidimensional_index(i)[0]] = rows[i];
        reduce_columns(c, columns, reduction_operation::min, FLT_MAX);
        for (ushort i = 0; i < columns.get_capacity(); ++i)
            if (columns.is_valid_element(i)) C[32 + columns.get_multidimensional_index(i)[0]] = columns[i];
        reduce_columns(c, columns, reduction_operation::max);
        for (ushort i = 0; i < columns.get_capacity(); ++i)
            if (columns.is_valid_element(i)) C[64 + columns.get_multidimensional_index(i)[0]] = columns[i];"
    );
    let scores = product();
    let row = |m: usize| scores[m * N..(m + 1) * N].iter().copied();
    let column = |n: usize| (0..M).map(|m| scores[m * N + n]).collect::<Vec<f64>>().into_iter();
    let expected: Vec<f64> = (0..M)
        .map(|m| row(m).sum())
        .chain((0..M).map(|m| row(m).fold(f64::MIN, f64::max)))
        .chain((0..N).map(|n| column(n).fold(f64::MAX, f64::min)))
        // The default identity is that of a sum.
        .chain((0..N).map(|n| column(n).fold(0.0, f64::max)))
        .collect();
    for options in behaviours() {
        let (got, _) = run(options.clone(), 32, &kernel(&body)).unwrap();
        for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
            assert_eq!(f64::from(*got), *expected, "{i} {options:?}");
        }
    }
}

#[test]
fn rows_are_found_again_where_a_kernel_asks_first() {
    let body = after_setup(
        "auto rows = op.get_row_reduction_destination_cooperative_tensor<decltype(a), decltype(b), float>();
         auto p = values.get_left_input_cooperative_tensor<float, half, float>(c);
         auto o = values.get_destination_cooperative_tensor<decltype(p), decltype(b), float>();
         for (ushort i = 0; i < rows.get_capacity(); ++i)
             if (rows.is_valid_element(i)) rows[i] = rows.get_multidimensional_index(i)[0];
         bool found = is_iterator_compatible(o, rows);
         int wrong = 0;
         for (ushort i = 0; FOUND && i < o.get_capacity(); ++i)
             if (o.is_valid_element(i)) wrong += *rows.map_iterator(o.begin() + i) != o.get_multidimensional_index(i)[1];
         C[lane] = found ? wrong : -1;",
    );
    for (layout, expected) in [
        (LaneLayout::ContiguousQuads, 0.0),
        (LaneLayout::SplitPairs, 0.0),
        (LaneLayout::Shuffled(2), 0.0),
        (LaneLayout::Scattered(2), -1.0),
    ] {
        let options = with(TensorOps { layout, ..TensorOps::default() });
        let (got, _) = run(options, 32, &kernel(&body.replace("FOUND", "found"))).unwrap();
        assert!(got[..32].iter().all(|&value| value == expected), "{layout:?}: {:?}", &got[..32]);
    }
    let scattered = with(TensorOps { layout: LaneLayout::Scattered(2), ..TensorOps::default() });
    stopped(scattered, 32, &body.replace("FOUND", "true"), &["ask is_iterator_compatible"]);
}

#[test]
fn iterators_slots_and_questions() {
    let body = after_setup(
        "auto few = b.slice(0, 4); auto tile = few.slice<64, 16>(0, 8);
         int wrong = 0;
         wrong += tile.get_extent(0) != 64 || tile.get_extent(1) != 16 || tile.get_static_extent(1) != 16;
         wrong += few.get_extent(1) != 28 || few.get_stride(1) != 64 || few.get_static_extent(1) != dynamic_extent;
         wrong += few.get_rank() != 2 || &tile[array<int, 2>{3, 1}] != B + 13 * 64 + 3;
         op.run(a, b, c);
         int count = 0;
         for (auto it = c.begin(); it != c.end(); it += 1, ++count) {
             wrong += c.is_valid_element(it) != c.is_valid_element(count) || it - c.begin() != count;
             auto at = c.get_multidimensional_index(it), same = c.get_multidimensional_index(count);
             wrong += at[0] != same[0] || at[1] != same[1];
             wrong += c.is_valid_element(it) && (*it != c.get(count) || *c.get_iterator(count) != *it);
         }
         wrong += count != c.get_capacity() || c.get_rank() != 2;
         c.set(1, 7.0f);
         wrong += c[1] != 7.0f || *(c.end() - (c.get_capacity() - 1)) != 7.0f;
         wrong += !values.is_compatible_as_left_input<float, half, float>(c);
         wrong += values.is_compatible_as_left_input<half, half, float>(c);
         wrong += op.is_compatible_as_left_input<float, half, float>(c);
         C[lane] = wrong;",
    );
    for layout in [LaneLayout::ContiguousQuads, LaneLayout::Scattered(6)] {
        let (got, _) = run(with(TensorOps { layout, ..TensorOps::default() }), 32, &kernel(&body)).unwrap();
        assert!(got[..32].iter().all(|&value| value == 0.0), "{layout:?}: {:?}", &got[..32]);
    }
}

#[test]
fn counters_count_what_an_operation_asks_for() {
    let (_, report) = run(check(), 32, &kernel(&after_setup(STAGED))).unwrap();
    let counters = report.counters;
    assert_eq!((counters.tensor_operations, counters.tensor_multiply_adds), (1, 16 * 32 * 64));
    assert_eq!(counters.products(), 2 * 4 * 8);
    // A once by the lanes, B once by the operation; A from threadgroup memory.
    assert_eq!(counters.device_read_bytes, (16 * 64 + 32 * 64) * 2);
    assert_eq!((counters.threadgroup_read_bytes, counters.threadgroup_written_bytes), (16 * 64 * 2, 2 * 16 * 64 * 2));
    assert_eq!(counters.device_written_bytes, 16 * 32 * 4);
    assert_eq!((counters.simdgroup_barriers, counters.simd_operations), (2, 0));
    // 16 floats a lane.
    assert_eq!(counters.live_cooperative_halves, 32);
}

#[test]
fn live_cooperative_tensors_are_counted_as_values() {
    let body = after_setup(
        "auto o = values.get_destination_cooperative_tensor<decltype(values.get_left_input_cooperative_tensor<float, \
         half, float>()), decltype(b), float>();
         for (auto it = o.begin(); it != o.end(); ++it) *it = 0.0f;
         for (int i = 0; i < 3; ++i) {
             op.run(a, b, c);
             auto p = values.get_left_input_cooperative_tensor<float, half, float>(c);
             values.run(p, b, o);
         }
         auto wide = tensor(C, sizes(64, 16));
         o.store(wide);",
    );
    let (_, report) = run(check(), 32, &kernel(&body)).unwrap();
    // O has 32 floats a lane; S and P have 16 each and are never live together.
    assert_eq!(report.counters.live_cooperative_halves, 2 * (32 + 16));
    let both = body.replace("values.run(p, b, o);", "values.run(p, b, o); if (c[0] == 1e30f) o[0] = 0.0f;");
    let (_, report) = run(check(), 32, &kernel(&both)).unwrap();
    assert_eq!(report.counters.live_cooperative_halves, 2 * (32 + 16 + 16));
}
