use super::*;

/// Shape, strides and dtype of q, k and v; contiguous unless set otherwise.
#[derive(Clone)]
struct Call {
    dtypes: [Dtype; 3],
    shapes: [Vec<i64>; 3],
    strides: [Vec<i64>; 3],
    options: Options<'static>,
}

fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

impl Call {
    fn new(shapes: [&[i64]; 3]) -> Self {
        let options = Options { window: (-1, -1), ..Options::default() };
        Self { dtypes: [Dtype::F32; 3], shapes: shapes.map(<[i64]>::to_vec), strides: shapes.map(contiguous), options }
    }

    fn tensors(&self) -> [TensorMeta<'_>; 3] {
        std::array::from_fn(|index| TensorMeta {
            dtype: self.dtypes[index],
            shape: &self.shapes[index],
            strides: &self.strides[index],
        })
    }

    fn dense(&self) -> Result<Problem> {
        let [q, k, v] = self.tensors();
        Problem::dense(q, k, v, &self.options)
    }

    fn packed(&self, batch: usize, max_seqlen: (i64, i64)) -> Result<Problem> {
        let [q, k, v] = self.tensors();
        Problem::packed(q, k, v, batch, max_seqlen, &self.options)
    }
}

/// Two sequences of 5 queries and 7 keys, 6 heads over 3, head dimension 8.
fn valid() -> Call {
    Call::new([&[2, 5, 6, 8], &[2, 7, 3, 8], &[2, 7, 3, 8]])
}

fn valid_packed() -> Call {
    Call::new([&[10, 6, 8], &[14, 3, 8], &[14, 3, 8]])
}

#[test]
fn dense_reads_sizes_strides_and_options() {
    let mut call = valid();
    call.shapes[2][3] = 4;
    call.strides = [vec![999, 48, 8, 1], vec![168, -24, 8, 1], vec![0, 12, 4, 1]];
    call.options = Options { causal: true, softcap: 2.0, window: (3, -1), ..Options::default() };
    call.options.bias = Some((BiasKind::Boolean, &[5, 1], &[1, 77]));
    call.options.alibi_slopes = Some((&[2, 6], &[6, 1]));
    call.options.sinks = Some((&[6], &[2]));
    let problem = call.dense().unwrap();
    assert_eq!(problem.lengths, Lengths::Dense { batch: 2, query_len: 5, key_len: 7 });
    assert_eq!((problem.query_heads, problem.key_heads, problem.group()), (6, 3, 2));
    assert_eq!((problem.head_dim, problem.value_dim), (8, 4));
    assert_eq!(problem.q, Strides { batch: 999, row: 48, head: 8 });
    assert_eq!(problem.k, Strides { batch: 168, row: -24, head: 8 });
    assert_eq!(problem.v, Strides { batch: 0, row: 12, head: 4 });
    assert_eq!(problem.mask, Mask { left: Some(3), right: Some(0), alignment: Alignment::BottomRight });
    assert_eq!((problem.scale.to_bits(), problem.softcap.to_bits()), (8f32.powf(-0.5).to_bits(), 2f32.to_bits()));
    assert_eq!(problem.bias, Some(Bias { kind: BiasKind::Boolean, batch: 0, head: 0, query: 1, key: 0 }));
    assert_eq!(problem.alibi, Some(AlibiStrides { batch: 6, head: 1 }));
    assert_eq!(problem.sinks, Some(2));
}

#[test]
fn packed_reads_sizes_and_limits_the_longest_sequence_to_the_total() {
    let problem = valid_packed().packed(3, (4, i64::MAX)).unwrap();
    let lengths = Lengths::Packed { batch: 3, total_query: 10, total_key: 14, max_query_len: 4, max_key_len: 14 };
    assert_eq!(problem.lengths, lengths);
    assert_eq!(problem.q, Strides { batch: 0, row: 48, head: 8 });
}

#[test]
fn empty_batches_and_sequences_are_problems() {
    for shapes in [
        [[0, 5, 6, 8], [0, 7, 3, 8], [0, 7, 3, 8]],
        [[2, 0, 6, 8], [2, 7, 3, 8], [2, 7, 3, 8]],
        [[2, 5, 6, 8], [2, 0, 3, 8], [2, 0, 3, 8]],
    ] {
        let shapes: [&[i64]; 3] = std::array::from_fn(|index| &shapes[index][..]);
        assert!(Call::new(shapes).dense().is_ok(), "{shapes:?}");
    }
    assert!(Call::new([&[0, 6, 8], &[0, 3, 8], &[0, 3, 8]]).packed(0, (0, 0)).is_ok());
}

#[test]
fn strides_of_single_elements_do_not_matter() {
    let mut call = Call::new([&[1, 5, 1, 1], &[1, 7, 1, 1], &[1, 7, 1, 8]]);
    call.strides[0] = vec![i64::MAX, 1, i64::MIN, 3];
    assert!(call.dense().is_ok());
}

#[track_caller]
fn expect_error(result: Result<Problem>, text: &str) {
    assert_eq!(result.unwrap_err().to_string(), text);
}

/// A change that makes the call wrong, and the message of the error or the argument that it names.
type Wrong = (fn(&mut Call), &'static str);

#[test]
fn wrong_tensors_are_named() {
    let table: &[Wrong] = &[
        (|c| c.shapes[0].truncate(3), "q has shape (2, 5, 6); allowed: 4 dimensions (batch, seqlen, heads, head_dim)"),
        (
            |c| c.shapes[1].push(1),
            "k has shape (2, 7, 3, 8, 1); allowed: 4 dimensions (batch, seqlen, heads, head_dim)",
        ),
        (|c| c.shapes[2].clear(), "v has shape (); allowed: 4 dimensions (batch, seqlen, heads, head_dim)"),
        (
            |c| c.strides[0].truncate(3),
            "q has shape (2, 5, 6, 8); allowed: 4 dimensions (batch, seqlen, heads, head_dim)",
        ),
        (|c| c.shapes[0][1] = -5, "q has shape (2, -5, 6, 8); allowed: 4 dimensions (batch, seqlen, heads, head_dim)"),
        (|c| c.shapes[1][0] = 1, "k has shape (1, 7, 3, 8); allowed: batch = 2, as in q"),
        (|c| c.shapes[2][0] = 3, "v has shape (3, 7, 3, 8); allowed: batch = 2, as in q"),
        (|c| c.shapes[2][1] = 5, "v has shape (2, 5, 3, 8); allowed: seqlen = 7, as in k"),
        (|c| c.shapes[2][2] = 6, "v has shape (2, 7, 6, 8); allowed: heads = 3, as in k"),
        (|c| c.shapes[1][3] = 4, "k has shape (2, 7, 3, 4); allowed: head_dim = 8, as in q"),
        (|c| c.shapes[1][2] = 4, "k has shape (2, 7, 4, 8); allowed: a number of heads that divides the 6 heads of q"),
        (|c| c.shapes[1][2] = 0, "k has shape (2, 7, 0, 8); allowed: a number of heads that divides the 6 heads of q"),
        (|c| c.shapes[0][2] = 0, "q has shape (2, 5, 0, 8); allowed: at least one head"),
        (|c| (c.shapes[0][3], c.shapes[1][3]) = (0, 0), "q has shape (2, 5, 6, 0); allowed: a head_dim of at least 1"),
        (|c| c.shapes[2][3] = 0, "v has shape (2, 7, 3, 0); allowed: a head_dim of at least 1"),
        (|c| c.dtypes[1] = Dtype::F16, "k has dtype float16; allowed: float32, the dtype of q"),
        (|c| c.dtypes[2] = Dtype::Bf16, "v has dtype bfloat16; allowed: float32, the dtype of q"),
        (
            |c| c.strides[2][3] = 2,
            "v is a tensor with last stride 2; allowed: tensors whose last dimension is contiguous",
        ),
    ];
    for (spoil, message) in table {
        let mut call = valid();
        spoil(&mut call);
        expect_error(call.dense(), message);
    }
    let mut packed = valid_packed();
    packed.shapes[2][0] = 13;
    expect_error(packed.packed(2, (5, 7)), "v has shape (13, 3, 8); allowed: total = 14, as in k");
    expect_error(valid().packed(2, (5, 7)), "q has shape (2, 5, 6, 8); allowed: 3 dimensions (total, heads, head_dim)");
}

#[test]
fn wrong_options_are_named() {
    let table: &[Wrong] = &[
        (|c| c.options.softmax_scale = Some(f64::NAN), "softmax_scale is NaN; allowed: a number from -8e37 to 8e37"),
        (
            |c| c.options.softmax_scale = Some(1e39),
            "softmax_scale is 1000000000000000000000000000000000000000; allowed: a number from -8e37 to 8e37",
        ),
        (|c| c.options.softcap = f64::INFINITY, "softcap is inf; allowed: a number from -8e37 to 8e37"),
        (|c| c.options.softcap = -1.0, "softcap is -1; allowed: 0 (off) or a positive number"),
        (
            |c| c.options.alibi_slopes = Some((&[3], &[1])),
            "alibi_slopes has shape (3); allowed: (6) or (2, 6): (heads) or (batch, heads) of q",
        ),
        (
            |c| c.options.alibi_slopes = Some((&[1, 6], &[6, 1])),
            "alibi_slopes has shape (1, 6); allowed: (6) or (2, 6): (heads) or (batch, heads) of q",
        ),
        (
            |c| c.options.alibi_slopes = Some((&[6], &[])),
            "alibi_slopes has shape (6); allowed: (6) or (2, 6): (heads) or (batch, heads) of q",
        ),
        (
            |c| c.options.bias = Some((BiasKind::Boolean, &[7, 5], &[5, 1])),
            "bias has shape (7, 5); allowed: a shape that broadcasts to (2, 6, 5, 7)",
        ),
        (
            |c| c.options.bias = Some((BiasKind::Boolean, &[1, 2, 6, 5, 7], &[0, 0, 0, 0, 1])),
            "bias has shape (1, 2, 6, 5, 7); allowed: a shape that broadcasts to (2, 6, 5, 7)",
        ),
        (
            |c| c.options.bias = Some((BiasKind::Boolean, &[3, 1, 1], &[1, 1, 1])),
            "bias has shape (3, 1, 1); allowed: a shape that broadcasts to (2, 6, 5, 7)",
        ),
        (|c| c.options.sinks = Some((&[3], &[1])), "sinks has shape (3); allowed: (6): one logit per head of q"),
        (
            |c| c.options.sinks = Some((&[6, 1], &[1, 1])),
            "sinks has shape (6, 1); allowed: (6): one logit per head of q",
        ),
    ];
    for (spoil, message) in table {
        let mut call = valid();
        spoil(&mut call);
        expect_error(call.dense(), message);
    }
    let mut packed = valid_packed();
    packed.options.bias = Some((BiasKind::Boolean, &[1], &[1]));
    let message = "bias: a bias over packed sequences is not supported; pad the sequences into a batch, or call once per sequence";
    expect_error(packed.packed(2, (5, 7)), message);
    let message = "max_seqlen_k is -1; allowed: the length of the longest sequence, at least 0";
    expect_error(valid_packed().packed(2, (5, -1)), message);
}

#[test]
fn sizes_and_strides_that_could_overflow_are_refused() {
    const HUGE: i64 = 1 << 55;
    let table: &[Wrong] = &[
        (|c| c.strides[0][0] = i64::MAX, "q"),
        (|c| c.strides[1] = vec![i64::MIN, i64::MIN, i64::MIN, 1], "k"),
        (|c| c.strides[2][1] = HUGE, "v"),
        (|c| (c.shapes[0], c.strides[0]) = (vec![2, i64::MAX, 6, 8], vec![0, 0, 0, 1]), "q"),
        (|c| c.options.alibi_slopes = Some((&[6], &[HUGE])), "alibi_slopes"),
        (|c| c.options.bias = Some((BiasKind::Boolean, &[5, 7], &[HUGE, 1])), "bias"),
        (|c| c.options.sinks = Some((&[6], &[i64::MIN])), "sinks"),
    ];
    for (spoil, argument) in table {
        let mut call = valid();
        spoil(&mut call);
        let error = call.dense().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{argument} is a tensor of shape")), "{error}");
    }
    // Each tensor alone is small enough, the output is not.
    let mut call = Call::new([&[1, 1 << 40, 1, 1], &[1, 1, 1, 1], &[1, 1, 1, 1 << 40]]);
    call.strides[0] = vec![0, 0, 0, 1];
    assert!(call.dense().unwrap_err().to_string().starts_with("out is a tensor of shape"));
}

#[test]
fn a_bias_is_read_with_stride_0_where_it_is_broadcast() {
    let cases: [(&[i64], &[i64], [i64; 4]); 5] = [
        (&[], &[], [0, 0, 0, 0]),
        (&[7], &[3], [0, 0, 0, 3]),
        (&[5, 7], &[7, 1], [0, 0, 7, 1]),
        (&[2, 1, 1, 7], &[7, 7, 7, 1], [7, 0, 0, 1]),
        (&[2, 6, 5, 7], &[210, 35, 7, 1], [210, 35, 7, 1]),
    ];
    for (shape, strides, [batch, head, query, key]) in cases {
        let kind = BiasKind::Additive(Dtype::F16);
        let lengths = Lengths::Dense { batch: 2, query_len: 5, key_len: 7 };
        assert_eq!(bias((kind, shape, strides), 6, &lengths), Ok(Bias { kind, batch, head, query, key }));
    }
}

#[test]
fn offsets_may_leave_rows_out_but_not_run_backwards_or_past_the_end() {
    let lengths = valid_packed().packed(2, (5, 9)).unwrap().lengths;
    for offsets in [[0, 5, 10], [0, 0, 0], [1, 1, 4], [3, 8, 8]] {
        assert_eq!(lengths.check_offsets(&offsets, &[0, 9, 14]), Ok(()), "{offsets:?}");
    }
    let table: [(&[i32], &[i32], &str); 6] = [
        (&[0, 5], &[0, 9, 14], "cu_seqlens_q has shape (2); allowed: (3): one offset more than there are sequences"),
        (
            &[0, 5, 4],
            &[0, 9, 14],
            "cu_seqlens_q is 4 at index 2; allowed: offsets that never decrease, from 0 to the 10 rows of the tensor",
        ),
        (
            &[-1, 2, 4],
            &[0, 9, 14],
            "cu_seqlens_q is -1 at index 0; allowed: offsets that never decrease, from 0 to the 10 rows of the tensor",
        ),
        (
            &[0, 5, 11],
            &[0, 9, 14],
            "cu_seqlens_q is 11 at index 2; allowed: offsets that never decrease, from 0 to the 10 rows of the tensor",
        ),
        (
            &[0, 5, 10],
            &[0, i32::MAX, i32::MAX],
            "cu_seqlens_k is 2147483647 at index 1; allowed: offsets that never decrease, from 0 to the 14 rows of the tensor",
        ),
        (&[0, 4, 10], &[0, 9, 14], "max_seqlen_q is 5; allowed: at least 6, the length of sequence 1 in cu_seqlens_q"),
    ];
    for (query_offsets, key_offsets, message) in table {
        assert_eq!(lengths.check_offsets(query_offsets, key_offsets).unwrap_err().to_string(), message);
    }
}
