//! Small kernels that break one rule each, and the layers that must catch them; and right ones that must pass.

use std::time::Duration;

use half::f16;
use mtlflashattn_metal::{Argument, Device, DeviceError};
use mtlflashattn_simulator::{Buffer, Launch, Layer, Options, Report, Simulator};

const HEAD: &str = "#include <metal_stdlib>\nusing namespace metal;\n";

/// A kernel `k` with this body: 64 floats in, 64 floats out, 64 threads in one threadgroup.
fn kernel(body: &str) -> String {
    format!(
        "{HEAD}kernel void k(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],\n\
         uint tid [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],\n\
         uint sg [[simdgroup_index_in_threadgroup]]) {{\n{body}\n}}\n"
    )
}

fn one_group(threads: u32) -> Launch {
    Launch { threads: [threads, 1, 1], group: [threads, 1, 1], ..Launch::default() }
}

fn numbers() -> Vec<f32> {
    (0..64_u8).map(f32::from).collect()
}

/// Runs a kernel made by [`kernel`] on 0, 1, .. 63.
fn run(options: Options, source: &str) -> Result<(Vec<f32>, Report), DeviceError> {
    let simulator = Simulator::new(options);
    let pipeline = simulator.pipeline(source, "k")?;
    let (input, output) = (Buffer::from_slice(&numbers())?, Buffer::poisoned(64 * 4)?);
    let arguments = [Argument::Buffer(&input), Argument::Buffer(&output)];
    let report = simulator.run(&pipeline, &arguments, &one_group(64).with_must_write(&[1]))?;
    Ok((output.read(), report))
}

fn check() -> Options {
    Options::new(Layer::Check)
}

fn fast() -> Options {
    Options::new(Layer::Fast)
}

/// The message of the error that a body must cause.
#[track_caller]
fn caught(options: Options, body: &str) -> String {
    let described = format!("{options:?}");
    match run(options, &kernel(body)) {
        Ok((output, _)) => panic!("not caught in {described}: {output:?}"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn expect(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// The output of a body that must pass every layer and schedule.
#[track_caller]
fn passes(body: &str) -> (Vec<f32>, Report) {
    let source = kernel(body);
    Simulator::new(Options::new(Layer::Type)).pipeline(&source, "k").unwrap();
    let (expected, report) = run(check(), &source).unwrap();
    for options in [fast(), fast().with_seed(7), check().with_seed(99), fast().with_finite_math(true)] {
        let (output, _) = run(options.clone(), &source).unwrap();
        assert_eq!(output, expected, "{options:?}");
    }
    (expected, report)
}

const REVERSE: &str = "threadgroup float tile[64];
    tile[tid] = in[tid];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[tid] = tile[63 - tid];";

#[test]
fn a_right_kernel_passes_with_exact_counters() {
    let (output, report) = passes(REVERSE);
    let expected: Vec<f32> = numbers().into_iter().rev().collect();
    assert_eq!(output, expected);
    let counters = report.counters;
    assert_eq!((counters.device_read_bytes, counters.device_written_bytes), (256, 256));
    assert_eq!((counters.threadgroup_read_bytes, counters.threadgroup_written_bytes), (256, 256));
    assert_eq!((counters.threadgroup_barriers, counters.threadgroup_hints), (1, 0));
    assert_eq!((counters.threadgroup_memory_bytes, counters.threadgroups), (256, 1));
}

#[test]
fn a_missing_barrier_is_a_race_with_its_line() {
    let message = caught(check(), &REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""));
    // Lane 0 reads what thread 63 has not written yet: the schedule decides which of both mistakes shows first.
    expect(&message, &["kernel.metal:9", "threadgroup"]);
    let across = "threadgroup float tile[64];
        tile[tid] = 0.0f;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        tile[tid] = in[tid];
        out[tid] = tile[63 - tid];";
    for seed in 0..4 {
        expect(&caught(check().with_seed(seed), across), &["data race in threadgroup array 0"]);
    }
}

#[test]
fn a_missing_barrier_shows_as_poison_in_the_fast_layer() {
    let (output, _) =
        run(fast(), &kernel(&REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""))).unwrap();
    assert!(output.iter().any(|value| value.is_nan()));
    let unpoisoned = fast().with_poison(false);
    let (output, _) =
        run(unpoisoned, &kernel(&REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""))).unwrap();
    assert!(output.iter().all(|value| !value.is_nan()));
}

#[test]
fn a_barrier_must_order_the_memory_that_it_guards() {
    for flags in ["mem_none", "mem_device"] {
        let message = caught(check(), &REVERSE.replace("mem_threadgroup", flags));
        expect(&message, &["kernel.metal:9", "data race in threadgroup array 0", "read after write"]);
    }
    let (_, report) =
        passes(&REVERSE.replace("mem_flags::mem_threadgroup", "mem_flags::mem_device | mem_flags::mem_threadgroup"));
    assert_eq!(report.counters.threadgroup_barriers, 1);
}

#[test]
fn a_simdgroup_barrier_orders_its_simdgroup_only() {
    let within = "threadgroup float tile[64];
        tile[tid] = in[tid];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[tid] = tile[sg * 32 + 31 - lane];
        simdgroup_barrier(mem_flags::mem_none);";
    let (_, report) = passes(within);
    assert_eq!((report.counters.simdgroup_barriers, report.counters.simdgroup_hints), (2, 2));
    let across = within.replace("tile[sg * 32 + 31 - lane]", "tile[63 - tid]");
    for seed in 0..3 {
        expect(&caught(check().with_seed(seed), &across), &["threadgroup"]);
    }
}

#[test]
fn a_hint_orders_nothing() {
    let body = "threadgroup float tile[64];
        tile[tid] = in[tid];
        simdgroup_barrier(mem_flags::mem_none);
        out[tid] = tile[sg * 32 + 31 - lane];";
    caught(check(), body);
    let (output, _) = run(fast(), &kernel(body)).unwrap();
    assert!(output.iter().any(|value| value.is_nan()), "the fast layer shows it as poison");
}

#[test]
fn divergent_barriers_are_caught() {
    for options in [fast(), check(), fast().with_seed(5)] {
        let message = caught(
            options.clone(),
            "if (lane < 16) simdgroup_barrier(mem_flags::mem_threadgroup); out[tid] = simd_sum(in[tid]);",
        );
        expect(&message, &["divergence"]);
        let message = caught(
            options.clone(),
            "if (sg == 0) threadgroup_barrier(mem_flags::mem_threadgroup); out[tid] = in[tid];",
        );
        expect(&message, &["threadgroup_barrier after", "returned"]);
        let message =
            caught(options, "if (tid == 3) return; threadgroup_barrier(mem_flags::mem_none); out[tid] = in[tid];");
        expect(&message, &["threadgroup_barrier after", "returned"]);
    }
}

#[test]
fn a_matrix_operation_needs_all_lanes() {
    let body = "simdgroup_float8x8 a;
        if (lane != 7) simdgroup_load(a, in, 8);
        out[tid] = in[tid];";
    for options in [fast(), check()] {
        expect(&caught(options, body), &["simdgroup_load needs all 32 lanes"]);
    }
    let body = "simdgroup_float8x8 a; simdgroup_load(a, in + lane / 16, 8); out[tid] = a.thread_elements()[0];";
    expect(&caught(fast(), body), &["the arguments of simdgroup_load differ"]);
}

#[test]
fn a_step_out_of_bounds_is_caught_on_both_sides() {
    for (index, side) in [("tid + 1", "0 bytes past the end of"), ("int(tid) - 1", "4 bytes before")] {
        let message = caught(check(), &format!("out[tid] = in[{index}];"));
        expect(&message, &["kernel.metal:6", "out-of-bounds read of 4 bytes", side, "buffer 0"]);
        let message = caught(check(), &format!("out[{index}] = in[tid];"));
        expect(&message, &["out-of-bounds write of 4 bytes", side, "buffer 1"]);
    }
}

#[test]
fn the_fast_layer_guards_buffers_with_pages() {
    let message = caught(fast(), "out[tid] = in[tid + 1];");
    expect(&message, &["kernel.metal:6", "0 bytes past the end of buffer 0"]);
    expect(&caught(fast(), "out[tid] = in[int(tid) * 100000 - 100000];"), &["before buffer 0"]);
    // And the program lives on.
    assert_eq!(run(fast(), &kernel(REVERSE)).unwrap().0[0].to_bits(), 63.0_f32.to_bits());
}

#[test]
fn neighbouring_threadgroup_arrays_lie_apart() {
    let body = "threadgroup float first[64], second[64];
        first[tid] = in[tid];
        second[tid + 1] = in[tid];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[tid] = first[tid];";
    expect(&caught(check(), body), &["kernel.metal:8", "index 64 is out of range"]);
    expect(&caught(fast(), body), &["threadgroup array 1 was written past its end"]);
    let behind = body.replace("second[tid + 1]", "*(&second[0] + tid + 1)");
    expect(&caught(check(), &behind), &["kernel.metal:8", "0 bytes past the end of threadgroup array 1"]);
    let before = body.replace("second[tid + 1]", "*(&second[0] + int(tid) - 1)");
    expect(&caught(check(), &before), &["4 bytes before threadgroup array 1"]);
    expect(&caught(fast(), &before), &["threadgroup array 1 was written before its start"]);
}

#[test]
fn memory_that_nobody_wrote_is_caught() {
    let body = "threadgroup float tile[65]; tile[tid] = in[tid];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[tid] = tile[tid + 1];";
    expect(&caught(check(), body), &["has not written", "threadgroup array 0 at byte 256"]);
    expect(&caught(check(), "if (tid != 9) out[tid] = in[tid];"), &["4 bytes of buffer 1 were never written"]);
    let body = "simdgroup_float8x8 a, b; simdgroup_multiply(a, b, b); out[tid] = a.thread_elements()[0];";
    expect(&caught(fast(), body), &["simdgroup_matrix is used before anything was put into it"]);
}

#[test]
fn uninitialised_variables_are_poisoned() {
    let (output, _) =
        run(fast(), &kernel("float sum[2]; if (in[0] > 1.0f) sum[1] = 0.0f; out[tid] = sum[1] + in[tid];")).unwrap();
    assert!(output.iter().all(|value| value.is_nan()));
}

#[test]
fn overflow_is_caught() {
    let body = "int rows = 65536 + int(in[0]); out[tid] = in[tid] + float(rows * rows);";
    expect(&caught(check(), body), &["kernel.metal:6", "multiplication overflows"]);
    expect(&caught(check(), "int shift = 40 + int(in[0]); out[tid] = float(1 << shift);"), &["shift"]);
    expect(&caught(check(), "int zero = int(in[0]); out[tid] = float(int(tid) / zero);"), &["division by zero"]);
    expect(&caught(check(), "float a[4] = {0, 1, 2, 3}; out[tid] = a[tid];"), &["index 4 is out of range"]);
    passes("long rows = 65536 + long(in[0]); out[tid] = in[tid] + float(rows * rows);");
}

#[test]
fn unaligned_vectors_are_caught() {
    let body = "device const float4* v = (device const float4*)(in + tid % 4); float4 x = v[0]; out[tid] = x.x + x.w;";
    expect(&caught(check(), body), &["not aligned"]);
}

#[test]
fn half_and_bfloat_convert() {
    let (output, _) = passes(
        "bfloat b = bfloat(half(in[tid])); half h = half(b); bfloat2 pair = bfloat2(half2(h, half(1.5h)));
         out[tid] = float(h) + float(pair.y) + float((half)b);",
    );
    // 1 to 63 need 6 bits; a bfloat has 8.
    let expected: Vec<f32> = numbers().into_iter().map(|x| 2.0 * x + 1.5).collect();
    assert_eq!(output, expected);
}

#[test]
fn types_are_checked() {
    let wrong = [
        ("out[tid] = in[tid]; in[0] = 1.0f;", "not assignable"),
        ("device float* p = in; p[0] = 1.0f; out[tid] = 0.0f;", "const"),
        ("threadgroup float t[4]; device float* p = t; out[tid] = p[0];", "cannot initialize"),
        ("float x = 1.0f; device float* p = &x; out[tid] = p[0];", "cannot initialize"),
        ("float* p = out; out[tid] = p[0];", "cannot initialize"),
        ("simdgroup_half8x8 m; simdgroup_load(m, in, 8); out[tid] = 0.0f;", "no matching function"),
        ("simdgroup_matrix<float, 8, 4> m; out[tid] = 0.0f;", "8x8 is the only size"),
        ("out[tid] = max(in[tid], 1);", "ambiguous"),
        ("double x = in[tid]; out[tid] = float(x);", "MSL has no type double"),
        ("half4 h = half4(1.0h); float4 f = h; out[tid] = f.x;", "vec<half"),
        ("out[tid] = undeclared;", "undeclared"),
        (
            "threadgroup float t[64]; device float* p = (device float*)&t[0]; out[tid] = p[0];",
            "different address spaces",
        ),
        ("thread float* p = (thread float*)in; out[tid] = p[0];", "different address spaces"),
        ("float2 v = float2(1.0f, 2.0f, 3.0f); out[tid] = v.x;", "wrong number of components"),
    ];
    for (body, part) in wrong {
        let simulator = Simulator::new(Options::new(Layer::Type));
        match simulator.pipeline(&kernel(body), "k") {
            Err(DeviceError::Compile(message)) => expect(&message, &[part, "kernel.metal:6"]),
            other => panic!("{body}: {other:?}"),
        }
    }
    let missing_device =
        "#include <metal_stdlib>\nusing namespace metal;\nkernel void k(float* out [[buffer(0)]]) { out[0] = 1.0f; }";
    let error = Simulator::new(Options::new(Layer::Type)).pipeline(missing_device, "k").unwrap_err();
    assert!(matches!(error, DeviceError::Compile(_)), "{error}");
}

#[test]
fn limits_of_a_pipeline_hold() {
    let simulator = Simulator::new(fast());
    let source = kernel("threadgroup float t[8193]; t[tid] = 0.0f; out[tid] = t[tid];");
    match simulator.pipeline(&source, "k") {
        Err(DeviceError::Pipeline { reason, .. }) => expect(&reason, &["32772", "32768"]),
        other => panic!("{other:?}"),
    }
    let whole = kernel("threadgroup float t[8192]; t[tid] = in[tid]; out[tid] = t[tid];");
    assert_eq!(simulator.pipeline(&whole, "k").unwrap().threadgroup_memory_bytes(), 32768);
    assert!(matches!(simulator.pipeline(&whole, "other"), Err(DeviceError::Pipeline { .. })));

    let source = format!(
        "{HEAD}[[max_total_threads_per_threadgroup(16 * 2)]] kernel void k(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ out[i] = 1.0f; }}"
    );
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    assert_eq!(pipeline.max_threads_per_threadgroup(), 32);
    let output = Buffer::zeroed(64 * 4).unwrap();
    let error = simulator.run(&pipeline, &[Argument::Buffer(&output)], &one_group(64)).unwrap_err();
    expect(&error.to_string(), &["Threadgroup size (64) exceeds 32 limit"]);
    simulator.run(&pipeline, &[Argument::Buffer(&output)], &one_group(32)).unwrap();

    let unlimited = source.replace("[[max_total_threads_per_threadgroup(16 * 2)]]", "");
    let pipeline = simulator.pipeline(&unlimited, "k").unwrap();
    let output = Buffer::zeroed(2048 * 4).unwrap();
    assert!(simulator.run(&pipeline, &[Argument::Buffer(&output)], &one_group(1025)).is_err());
    simulator.run(&pipeline, &[Argument::Buffer(&output)], &one_group(1024)).unwrap();
}

#[test]
fn arguments_are_checked() {
    let source = format!(
        "{HEAD}kernel void k(device float* out [[buffer(1)]], constant long4& sizes [[buffer(0)]]) {{ out[0] = sizes.y; }}"
    );
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    let output = Buffer::zeroed(4).unwrap();
    let run = |arguments: &[Argument<'_, Buffer>]| simulator.run(&pipeline, arguments, &one_group(1));
    run(&[Argument::Ints(&[1, 7, 3, 4]), Argument::Buffer(&output)]).unwrap();
    assert_eq!(output.read::<f32>(), [7.0]);
    expect(
        &run(&[Argument::Ints(&[1, 2]), Argument::Buffer(&output)]).unwrap_err().to_string(),
        &["holds 16 bytes, the parameter needs 32"],
    );
    expect(&run(&[Argument::Ints(&[1, 2, 3, 4])]).unwrap_err().to_string(), &["[[buffer(1)]] is missing"]);
    expect(
        &run(&[Argument::Ints(&[1, 2, 3, 4]), Argument::Floats(&[0.0])]).unwrap_err().to_string(),
        &["no kernel may write"],
    );
    let memory = [0.0_f32; 1];
    // SAFETY: the array outlives the buffer, which is not writable.
    let read_only = unsafe { Buffer::from_raw(memory.as_ptr().cast_mut().cast(), 4, false) };
    expect(
        &run(&[Argument::Ints(&[1, 2, 3, 4]), Argument::Buffer(&read_only)]).unwrap_err().to_string(),
        &["read-only"],
    );
}

#[test]
fn atomics_count_and_do_not_race() {
    let source = format!(
        "{HEAD}kernel void k(device atomic_uint* total [[buffer(0)]], device atomic_float* sum [[buffer(1)]],\n\
         uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {{\n\
         threadgroup atomic_int local;\n\
         if (t == 0) atomic_store_explicit(&local, 0, memory_order_relaxed);\n\
         threadgroup_barrier(mem_flags::mem_threadgroup);\n\
         atomic_fetch_add_explicit(&local, int(t), memory_order_relaxed);\n\
         threadgroup_barrier(mem_flags::mem_threadgroup);\n\
         if (t == 0) atomic_fetch_add_explicit(total, uint(atomic_load_explicit(&local, memory_order_relaxed)), memory_order_relaxed);\n\
         atomic_fetch_add_explicit(sum, 0.5f, memory_order_relaxed);\n\
         atomic_fetch_max_explicit(total + 1, i, memory_order_relaxed); }}"
    );
    for options in [fast(), check(), check().with_seed(3)] {
        let simulator = Simulator::new(options);
        let pipeline = simulator.pipeline(&source, "k").unwrap();
        let (total, sum) = (Buffer::zeroed(8).unwrap(), Buffer::zeroed(4).unwrap());
        let launch = Launch { threads: [128, 1, 1], group: [64, 1, 1], ..Launch::default() };
        let report = simulator.run(&pipeline, &[Argument::Buffer(&total), Argument::Buffer(&sum)], &launch).unwrap();
        assert_eq!(total.read::<u32>(), [2 * (63 * 64 / 2), 127]);
        assert_eq!(sum.read::<f32>(), [64.0]);
        assert_eq!(report.counters.atomic_operations, 2 + 128 + 2 + 2 + 128 + 128);
    }
    let mixed = kernel(
        "device atomic_float* a = (device atomic_float*)out; out[0] = 1.0f;
        atomic_fetch_add_explicit(a, 1.0f, memory_order_relaxed); out[tid] = 0.0f;",
    );
    expect(&run(check(), &mixed).unwrap_err().to_string(), &["data race in buffer 1"]);
}

#[test]
fn threadgroups_do_not_wait_for_each_other() {
    let source = format!("{HEAD}kernel void k(device float* out [[buffer(0)]], uint g [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {{
        if (t == 0) out[g] = float(g);
        threadgroup_barrier(mem_flags::mem_device);
        if (g == 1 && t == 1) out[2] = out[0]; }}");
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    let output = Buffer::zeroed(16).unwrap();
    let launch = Launch { threads: [64, 1, 1], group: [32, 1, 1], ..Launch::default() };
    let error = simulator.run(&pipeline, &[Argument::Buffer(&output)], &launch).unwrap_err().to_string();
    expect(&error, &["kernel.metal:6", "data race in buffer 0", "threadgroup 0 "]);
}

#[test]
fn the_same_value_written_twice_is_counted() {
    let (_, report) = passes(
        "threadgroup float t[1]; t[0] = 2.0f; threadgroup_barrier(mem_flags::mem_threadgroup); out[tid] = t[0];",
    );
    assert_eq!(report.counters.same_value_races, 63);
    expect(
        &caught(
            check(),
            "threadgroup float t[1]; t[0] = in[tid]; threadgroup_barrier(mem_flags::mem_threadgroup); out[tid] = t[0];",
        ),
        &["another value is written after a write"],
    );
}

#[test]
fn simd_functions_compute() {
    let (output, report) = passes("float s = simd_sum(in[tid]), m = simd_max(in[tid]);
        float x = simd_shuffle_xor(in[tid], 1), d = simd_shuffle_down(in[tid], 31), b = simd_broadcast(in[tid], 5);
        uint votes = uint(simd_vote::vote_t(simd_ballot(lane % 2 == 0)));
        out[tid] = tid == 0 ? s : tid == 1 ? m : tid == 2 ? x : tid == 3 ? d : tid == 4 ? b : tid == 32 ? d : float(votes & 7);");
    assert_eq!(&output[..6], [496.0, 31.0, 3.0, 3.0, 5.0, 5.0]);
    assert_eq!(output[32].to_bits(), 63.0_f32.to_bits());
    assert_eq!(report.counters.simd_operations, 2 * 6);
}

/// An 8x8 product with every kind of load and store, in float64.
#[test]
fn matrices_multiply() {
    let source = format!(
        "{HEAD}kernel void k(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]], device float* c [[buffer(2)]]) {{
        threadgroup half tile[64];
        simdgroup_half8x8 x, y; simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
        simdgroup_load(x, a, 8); simdgroup_load(y, b, 8, ulong2(0, 0), true);
        simdgroup_store(y, tile, 8); simdgroup_barrier(mem_flags::mem_threadgroup); simdgroup_load(y, tile, 8);
        for (int i = 0; i < 3; ++i) simdgroup_multiply_accumulate(sum, x, y, sum);
        sum.thread_elements()[0] *= 2.0f; sum.thread_elements()[1] *= 2.0f;
        simdgroup_store(sum, c, 8, ulong2(0, 0), true); }}"
    );
    let a: Vec<f16> = (0..64).map(|i| f16::from_f64(f64::from(i % 11) - 4.0)).collect();
    let b: Vec<f16> = (0..64).map(|i| f16::from_f64(f64::from(i % 7) * 0.25)).collect();
    let expected = |row: usize, column: usize| {
        let dot: f64 = (0..8).map(|k| a[row * 8 + k].to_f64() * b[column * 8 + k].to_f64()).sum();
        (2.0 * (1.0 + 3.0 * dot)) as f32
    };
    for options in [fast(), check(), fast().with_seed(4), check().with_seed(5)] {
        let simulator = Simulator::new(options);
        let pipeline = simulator.pipeline(&source, "k").unwrap();
        let (x, y, z) =
            (Buffer::from_slice(&a).unwrap(), Buffer::from_slice(&b).unwrap(), Buffer::poisoned(256).unwrap());
        let arguments = [Argument::Buffer(&x), Argument::Buffer(&y), Argument::Buffer(&z)];
        let report = simulator.run(&pipeline, &arguments, &one_group(32)).unwrap();
        let output = z.read::<f32>();
        for row in 0..8 {
            for column in 0..8 {
                // Small multiples of 1/4: every sum is exact.
                assert_eq!(output[column * 8 + row].to_bits(), expected(row, column).to_bits());
            }
        }
        let counters = report.counters;
        assert_eq!((counters.matrix_multiplies, counters.matrix_loads, counters.matrix_stores), (3, 3, 2));
        if simulator.options().layer == Layer::Check {
            assert_eq!((counters.live_fragments_fp32, counters.live_fragments_16bit), (1, 2));
        }
    }
}

#[test]
fn live_fragments_are_what_registers_hold() {
    let body = "simdgroup_float8x8 acc[4], a, b;
        for (int i = 0; i < 4; ++i) acc[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (int k = 0; k < 5; ++k) {
            simdgroup_load(a, in, 8);
            for (int i = 0; i < 4; ++i) {
                simdgroup_load(b, in, 8);
                simdgroup_multiply_accumulate(acc[i], a, b, acc[i]);
            }
        }
        float sum = 0.0f;
        for (int i = 0; i < 4; ++i) sum += acc[i].thread_elements()[0];
        out[tid] = sum;";
    let (_, report) = passes(body);
    assert_eq!((report.counters.live_fragments_fp32, report.counters.live_fragments_16bit), (4 + 2, 0));
}

#[test]
fn references_to_elements_end_with_the_next_operation() {
    let body = "simdgroup_float8x8 a; simdgroup_load(a, in, 8);
        thread auto& old = a.thread_elements();
        simdgroup_multiply(a, a, a);
        old[0] = 1.0f;
        out[tid] = a.thread_elements()[0];";
    expect(&caught(fast(), body), &["older than the last operation"]);
}

#[test]
fn vectors_convert() {
    let (output, _) = passes(
        "float4 a = float4(1.0f, float2(2.0f, 3.0f), 4.0f); half4 h = half4(a); float4 b = (float4)h;
        vec<float, 3> c = vec<float, 3>(a.xy, 9.0f); bool4 m = a < b + 1.0f; int4 i = int4(h);
        uint2 u = uint2(7); short2 s = (short2)half2(3.0h, 4.0h);
        out[tid] = tid == 0 ? b.w : tid == 1 ? c.z : tid == 2 ? float(all(m)) : tid == 3 ? float(i.y + s.y + int(u.x)) : select(a, b, m).x;",
    );
    assert_eq!(&output[..5], [4.0, 9.0, 1.0, 13.0, 1.0]);
}

#[test]
fn a_cast_that_depends_on_a_template_converts() {
    let source = kernel("out[tid] = float(twice<short4>(half4(in[tid])).x) + widened<float4>(half4(2.0h)).x;").replace(
        "kernel void",
        "template <typename T, typename U> T twice(U x) { return (T)x + T(x); }
        template <typename T, typename U> T widened(U x) { using V = T; return V(x); }
        kernel void",
    );
    let (output, _) = run(check(), &source).unwrap();
    assert_eq!(output[5].to_bits(), 12.0_f32.to_bits());
}

#[test]
fn functions_overload_by_address_space() {
    let source = kernel(
        "threadgroup float t[64]; t[tid] = in[tid]; float own = 5.0f;
        out[tid] = get(in + tid) + get(t + tid) + get(&own);",
    )
    .replace(
        "kernel void",
        "float get(device const float* p) { return *p; }
        float get(threadgroup const float* p) { return *p * 100.0f; }
        float get(thread const float* p) { return *p * 10000.0f; }
        kernel void",
    );
    for options in [fast(), check()] {
        assert_eq!(run(options, &source).unwrap().0[2].to_bits(), 50202.0_f32.to_bits());
    }
}

#[test]
fn constants_are_counted_apart() {
    let source = format!("{HEAD}constant float table[2] = {{2.0f, 3.0f}};
        kernel void k(device const float* in [[buffer(0)]], device float* out [[buffer(1)]], constant float* factors [[buffer(2)]],
        uint i [[thread_position_in_grid]]) {{ out[i] = in[i] * factors[0] * table[i % 2]; }}");
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    let (input, output) = (Buffer::from_slice(&numbers()).unwrap(), Buffer::poisoned(256).unwrap());
    let arguments = [Argument::Buffer(&input), Argument::Buffer(&output), Argument::Floats(&[0.5])];
    let report = simulator.run(&pipeline, &arguments, &one_group(64)).unwrap();
    assert_eq!(output.read::<f32>()[3].to_bits(), 4.5_f32.to_bits());
    let counters = &report.counters;
    assert_eq!((counters.device_read_bytes, counters.constant_read_bytes), (256, 512));
    assert_eq!((report.buffer(0).unwrap().read_bytes, report.buffer(2).unwrap().read_bytes), (256, 256));
}

#[test]
fn templates_have_host_names() {
    let source = format!("{HEAD}template <typename T> kernel void fill(device T* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {{
        threadgroup T t[32]; t[i] = T(3.5f); out[i] = t[i]; }}
        template [[host_name(\"fill_half\")]] kernel void fill<half>(device half* out [[buffer(0)]], uint i [[thread_position_in_grid]]);
        template [[host_name(\"fill_int\")]] [[kernel]] decltype(fill<int>) fill<int>;");
    let simulator = Simulator::new(check());
    let output = Buffer::zeroed(32 * 4).unwrap();
    let pipeline = simulator.pipeline(&source, "fill_int").unwrap();
    simulator.run(&pipeline, &[Argument::Buffer(&output)], &one_group(32)).unwrap();
    assert_eq!(output.read::<i32>(), [3; 32]);
    let pipeline = simulator.pipeline(&source, "fill_half").unwrap();
    simulator.run(&pipeline, &[Argument::Buffer(&output)], &one_group(32)).unwrap();
    assert_eq!(output.read::<f16>()[..32], [f16::from_f32(3.5); 32]);
}

#[test]
fn threadgroup_memory_may_be_an_argument() {
    let source = format!("{HEAD}kernel void k(device float* out [[buffer(0)]], threadgroup float* t [[threadgroup(0)]], uint i [[thread_position_in_grid]]) {{
        t[i] = float(i); threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = t[31 - i]; }}");
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    let output = Buffer::zeroed(32 * 4).unwrap();
    let launch = |bytes| Launch { threadgroup_lengths: vec![bytes], ..one_group(32) };
    simulator.run(&pipeline, &[Argument::Buffer(&output)], &launch(128)).unwrap();
    assert_eq!(output.read::<f32>()[0].to_bits(), 31.0_f32.to_bits());
    let error = simulator.run(&pipeline, &[Argument::Buffer(&output)], &launch(112)).unwrap_err();
    expect(&error.to_string(), &["out-of-bounds write", "past the end of threadgroup array 0"]);
    assert!(simulator.run(&pipeline, &[Argument::Buffer(&output)], &one_group(32)).is_err());
    assert!(simulator.run(&pipeline, &[Argument::Buffer(&output)], &launch(40000)).is_err());
}

#[test]
fn switches_of_the_preprocessor_work_in_parameter_lists() {
    let source = format!("#define HAS_FACTOR 1\n#define TILE(n) threadgroup float tile[n]\n{HEAD}kernel void k(device float* out [[buffer(0)]],
        #if HAS_FACTOR
        constant float& factor [[buffer(1)]],
        #endif
        ushort2 i [[thread_position_in_grid]]) {{ TILE(32); tile[i.x] = factor; out[i.x] = tile[i.x + 100]; }}");
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    let output = Buffer::zeroed(32 * 4).unwrap();
    let error =
        simulator.run(&pipeline, &[Argument::Buffer(&output), Argument::Floats(&[1.5])], &one_group(32)).unwrap_err();
    expect(&error.to_string(), &["kernel.metal:9"]);
}

#[test]
fn edges_of_the_grid_are_smaller_threadgroups() {
    let source = format!("{HEAD}kernel void k(device uint* out [[buffer(0)]], uint2 i [[thread_position_in_grid]], uint2 n [[threads_per_grid]],
        uint2 size [[threads_per_threadgroup]], uint2 groups [[threadgroups_per_grid]]) {{
        out[i.y * n.x + i.x] = size.x + 10 * size.y + 100 * groups.x + 1000 * groups.y; }}");
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    let output = Buffer::zeroed(15 * 4).unwrap();
    let launch = Launch { threads: [5, 3, 1], group: [4, 2, 1], ..Launch::default() }.with_must_write(&[0]);
    simulator.run(&pipeline, &[Argument::Buffer(&output)], &launch).unwrap();
    let values = output.read::<u32>();
    assert_eq!((values[0], values[4], values[14]), (2224, 2221, 2211));
}

#[test]
fn foreign_memory_far_apart_is_bound_in_place() {
    // 8 GiB of address space, of which two pages are ever touched.
    let bytes = 8_usize << 30;
    // SAFETY: a fresh mapping, unmapped at the end of the test.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED);
    let source = format!(
        "{HEAD}kernel void k(device half* x [[buffer(0)]], constant long* at [[buffer(1)]], uint i [[thread_position_in_grid]]) {{ x[at[0] + i] = half(i); }}"
    );
    for options in [fast(), check()] {
        let simulator = Simulator::new(options.clone());
        let pipeline = simulator.pipeline(&source, "k").unwrap();
        // SAFETY: the mapping lives until the end of the test.
        let buffer = unsafe { Buffer::from_raw(memory.cast(), bytes, true) };
        let last = (bytes / 2 - 32) as i64;
        simulator.run(&pipeline, &[Argument::Buffer(&buffer), Argument::Ints(&[last])], &one_group(32)).unwrap();
        // SAFETY: inside of the mapping.
        let value = unsafe { memory.cast::<f16>().add(bytes / 2 - 1).read() };
        assert_eq!(value, f16::from_f32(31.0));
        if options.layer == Layer::Check {
            let error = simulator
                .run(&pipeline, &[Argument::Buffer(&buffer), Argument::Ints(&[last + 1])], &one_group(32))
                .unwrap_err();
            expect(&error.to_string(), &["0 bytes past the end of buffer 0"]);
        }
    }
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(memory, bytes) };
}

#[test]
fn schedules_are_reproducible_and_differ() {
    // The order in which lanes come to the counter is the schedule.
    let source = kernel(
        "device atomic_int* next = (device atomic_int*)out + 0; simd_sum(in[tid]);
        int turn = atomic_fetch_add_explicit(next, 1, memory_order_relaxed); if (tid > 0) out[tid] = float(turn);",
    );
    let order = |seed| run(fast().with_seed(seed), &source).unwrap().0[1..].to_vec();
    assert_eq!(order(3), order(3));
    assert_ne!(order(3), order(4));
}

#[test]
fn many_threads_may_dispatch_at_once() {
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&kernel(REVERSE), "k").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let (input, output) = (Buffer::from_slice(&numbers()).unwrap(), Buffer::poisoned(256).unwrap());
                    simulator
                        .run(&pipeline, &[Argument::Buffer(&input), Argument::Buffer(&output)], &one_group(64))
                        .unwrap();
                    assert_eq!(output.read::<f32>()[0].to_bits(), 63.0_f32.to_bits());
                }
            });
        }
    });
    assert_eq!(simulator.take_totals().threadgroups, 20);
}

#[test]
fn structs_are_copied_out_of_memory() {
    let source = format!(
        "{HEAD}struct Sizes {{ int rows; float scale; long stride[2]; }};
        struct Pair {{ float x, y; }};
        kernel void k(device const Sizes* all [[buffer(0)]], constant Sizes& one [[buffer(1)]], device float* out [[buffer(2)]]) {{
        Sizes a = all[1]; Sizes b = one; Pair p = {{2.0f, 3.0f}};
        b.rows += 1; out[0] = float(a.rows) + a.scale * float(a.stride[1]) + float(b.rows) + p.y; }}"
    );
    let simulator = Simulator::new(check());
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    // int rows and float scale share the first 8 bytes.
    let sizes = |rows: i64, scale: f32, stride: i64| [rows | i64::from(scale.to_bits()) << 32, 0, stride];
    let all = Buffer::from_slice(&[sizes(1, 1.0, 1), sizes(7, 2.0, 5)].concat()).unwrap();
    let output = Buffer::zeroed(4).unwrap();
    let one = sizes(3, 0.0, 0);
    let arguments = [Argument::Buffer(&all), Argument::Ints(&one), Argument::Buffer(&output)];
    let report = simulator.run(&pipeline, &arguments, &one_group(1)).unwrap();
    assert_eq!(output.read::<f32>(), [7.0 + 10.0 + 4.0 + 3.0]);
    assert!(report.counters.device_read_bytes <= 24 && report.counters.constant_read_bytes <= 24);
}

#[test]
fn a_threadgroup_that_registers_cannot_hold_is_refused() {
    // 41 live fragments of fp32 are 164 registers of 16 bits, 194 with all else: the class of 512 threads.
    let body = "simdgroup_float8x8 acc[40], a; simdgroup_load(a, in, 8);
        for (int i = 0; i < 40; ++i) acc[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (int i = 0; i < 40; ++i) simdgroup_multiply_accumulate(acc[i], a, a, acc[i]);
        float sum = 0.0f; for (int i = 0; i < 40; ++i) sum += acc[i].thread_elements()[0];
        if (tid < 64) out[tid] = sum;";
    let simulator = Simulator::new(check());
    let (input, output) = (Buffer::from_slice(&numbers()).unwrap(), Buffer::poisoned(256).unwrap());
    let arguments = [Argument::Buffer(&input), Argument::Buffer(&output)];
    let source = kernel(body);
    let pipeline = simulator.pipeline(&source, "k").unwrap();
    let registers = simulator.run(&pipeline, &arguments, &one_group(128)).unwrap().counters.registers();
    assert_eq!((registers.halves, registers.threads, registers.must_spill), (30 + 4 * 41, 512, false));
    let error = simulator.run(&pipeline, &arguments, &one_group(640)).unwrap_err().to_string();
    expect(&error, &["Threadgroup size (640) exceeds 512 limit"]);
    let declared = source.replace("kernel void", "[[max_total_threads_per_threadgroup(640)]] kernel void");
    simulator.run(&simulator.pipeline(&declared, "k").unwrap(), &arguments, &one_group(640)).unwrap();
}

#[test]
fn a_kernel_that_does_not_end_is_given_up() {
    let endless = [
        "float x = in[tid]; while (x >= 0.0f) x += in[1]; out[tid] = x;",
        "while (simd_sum(in[tid]) >= 0.0f) {} out[tid] = 0.0f;",
    ];
    for options in [fast(), check()] {
        for body in endless {
            let message = caught(options.clone().with_time_limit(Duration::from_millis(200)), body);
            expect(&message, &["kernel.metal:6", "longer than its time limit"]);
        }
        // The limit is one of processor time, and this takes next to none.
        let limited = options.with_time_limit(Duration::from_secs(20));
        assert_eq!(run(limited, &kernel(REVERSE)).unwrap().0[0].to_bits(), 63.0_f32.to_bits());
    }
}

#[test]
fn too_much_stack_is_caught() {
    let body = "float big[100000]; for (int i = 0; i < 100000; ++i) big[i] = in[tid] + float(i);
        out[tid] = big[int(in[tid]) * 1000];";
    for options in [fast(), check()] {
        expect(&caught(options, body), &["need more than 256 KiB of stack"]);
    }
}

#[test]
fn a_text_is_compiled_once_per_build() {
    let cache = std::env::temp_dir().join(format!("simulator-cache-{}", std::process::id()));
    let options = |finite_math| Options { cache: Some(cache.clone()), ..fast().with_finite_math(finite_math) };
    let libraries = || {
        let names = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with("toolchain-")).count()
    };
    let pipeline = |finite_math, source: &str| Simulator::new(options(finite_math)).pipeline(source, "k").unwrap();
    let source = kernel(REVERSE);
    for (finite_math, text, expected) in
        [(false, &source, 1), (false, &source, 1), (true, &source, 2), (false, &source.replace("63", "62"), 3)]
    {
        pipeline(finite_math, text);
        assert_eq!(libraries(), expected);
    }
    std::fs::remove_dir_all(&cache).unwrap();
}

#[test]
fn a_text_must_be_ascii() {
    let error = Simulator::new(fast()).pipeline(&kernel("out[tid] = 0.0f; // \u{b7}"), "k").unwrap_err();
    expect(&error.to_string(), &["ASCII"]);
}
