//! `matmul2d` and cooperative tensors: small kernels with known answers under every behaviour.

#![allow(clippy::float_cmp, reason = "the values are chosen to be exact")]

mod mpp;

use mpp::*;
use mtlflashattn_simulator::{LaneLayout, Layer, Options, TensorOps};

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
