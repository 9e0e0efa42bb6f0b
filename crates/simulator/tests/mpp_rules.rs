//! `matmul2d` and cooperative tensors: kernels that break one rule each, with the message.

#![allow(clippy::float_cmp, reason = "the values are chosen to be exact")]

mod mpp;

use mpp::*;
use mtlflashattn_metal::Device;
use mtlflashattn_simulator::{Layer, MacOs, MemoryDestination, Options, OutsideExtents, Simulator, TensorOps};

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
