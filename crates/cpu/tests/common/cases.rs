//! Random problems over every feature.

use mtlflashattn_core::Dtype;
use proptest::prelude::*;

use super::{BiasCase, Case, Order};

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)]
}

fn dims() -> impl Strategy<Value = usize> {
    prop_oneof![Just(64), Just(128), Just(8), Just(80), 1usize..40, 40usize..140, Just(256), 257usize..300]
}

fn lengths() -> impl Strategy<Value = (Vec<(usize, usize)>, bool, usize)> {
    let len = || prop_oneof![3 => 0usize..40, 2 => 40usize..300];
    let dense = (1usize..4, len(), len()).prop_map(|(batch, q, k)| (vec![(q, k); batch], false, 0));
    let decode = (1usize..3, 1usize..5, 1usize..700).prop_map(|(batch, q, k)| (vec![(q, k); batch], false, 0));
    let packed = (prop::collection::vec((len(), len()), 1..5), 0usize..3).prop_map(|(l, slack)| (l, true, slack));
    prop_oneof![3 => dense, 2 => decode, 3 => packed]
}

fn biases() -> impl Strategy<Value = BiasCase> {
    prop_oneof![
        4 => Just(BiasCase::None),
        1 => any::<[bool; 3]>().prop_map(BiasCase::Float32),
        1 => any::<[bool; 3]>().prop_map(BiasCase::SameDtype),
        1 => any::<[bool; 3]>().prop_map(BiasCase::Boolean),
    ]
}

prop_compose! {
    pub fn cases()(
        (lengths, packed, slack) in lengths(),
        dtype in dtypes(),
        (key_heads, group) in (1usize..4, prop_oneof![Just(1), 1usize..6]),
        (head_dim, value_dim) in prop_oneof![3 => dims().prop_map(|d| (d, d)), 1 => (dims(), dims())],
        (causal, top_left, sinks) in any::<(bool, bool, bool)>(),
        window in prop_oneof![2 => Just((-1, -1)), 1 => (-1i64..60, -1i64..60)],
        softcap in prop_oneof![2 => Just(0.0), 1 => 0.5f64..30.0],
        alibi in prop_oneof![3 => Just(0u8), 1 => Just(1u8), 1 => Just(2u8)],
        bias in biases(),
        dropout in prop_oneof![2 => Just(0.0), 1 => 0.01f64..0.9],
        order in prop_oneof![Just(Order::RowMajor), Just(Order::HeadMajor), Just(Order::Sliced)],
        spread in prop_oneof![Just(1.0), 0.1f64..8.0],
        seed: u64,
    ) -> Case {
        let bias = if packed { BiasCase::None } else { bias };
        let top_left = top_left && !packed;
        Case {
            dtype, lengths, packed, slack, key_heads, group, head_dim, value_dim, causal, window, top_left, softcap,
            alibi, bias, sinks, dropout, order, spread, seed,
        }
    }
}
