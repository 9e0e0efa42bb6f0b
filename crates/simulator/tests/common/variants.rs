//! Kernel variants that together have every feature, dtype, head-dimension class and tile, and random problems for them.

use mtlflashattn_core::plan::{Matmul, Operands, QueryHome, Weights};
use mtlflashattn_core::{BiasKind, Dtype, MetalTile};
use mtlflashattn_metal::Kernel;
use proptest::prelude::*;

use super::{Case, Order, Run};

/// A kernel variant: the features of a problem, its tile (`None` is the scalar kernel), and how its products are made
/// (`None` is the simdgroup kernel).
#[derive(Clone, Debug)]
pub struct Variant {
    pub name: &'static str,
    pub case: Case,
    pub tile: Option<MetalTile>,
    /// Whether the kernel reads four elements at once.
    pub aligned: bool,
    pub matmul: Option<Matmul>,
}

impl Variant {
    pub fn kernel(&self, run: &Run) -> Kernel {
        let kernel = match (self.tile, self.matmul) {
            (Some(tile), Some(matmul)) => {
                let kernel = Kernel::tensorops(&run.problem, tile, matmul, self.case.lse);
                if self.aligned { kernel.aligned(&run.problem, [0; 3]) } else { kernel }
            }
            (Some(tile), None) if self.aligned => {
                Kernel::simdgroup(&run.problem, tile, self.case.lse).aligned(&run.problem, [0; 3])
            }
            (Some(tile), None) => Kernel::simdgroup(&run.problem, tile, self.case.lse),
            (None, _) => Kernel::scalar(&run.problem, self.case.lse),
        };
        assert!(kernel.fits() && kernel.features.aligned == self.aligned, "{}", self.name);
        kernel
    }

    /// Problems that this variant serves, with lengths up to `most`.
    pub fn cases(&self, most: usize) -> impl Strategy<Value = Case> + use<> {
        let template = self.case.clone();
        // Blocks that matmul2d reads itself are whole, unless the kernel finds out.
        let (keys, matmul) = (self.tile.map_or(0, |tile| tile.keys), self.matmul);
        let from_memory = matmul.is_some_and(|matmul| matmul.operands == Operands::Memory);
        let whole = from_memory && !template.packed && !self.tile.is_some_and(|tile| tile.staged);
        let least = if whole { keys } else { 0 };
        let length = (1..=most, least..=most + most / 2);
        let lengths = if template.packed {
            // Sequences of about a block are where kernels take turns.
            let key_len = prop_oneof![3 => 0..=most + most / 2, 1 => keys.saturating_sub(1)..=keys + 1];
            prop::collection::vec((0..=most, key_len), 1..=3).boxed()
        } else {
            (length, 1..=2usize).prop_map(|(length, batch)| vec![length; batch]).boxed()
        };
        let order = prop_oneof![Just(Order::RowMajor), Just(Order::HeadMajor), Just(Order::Sliced)];
        let window = (0..=most as i64, 0..=most as i64);
        let shape = (lengths, 1..=2usize, 1..=3usize, order.clone(), order);
        let numbers = (
            any::<[bool; 4]>(),
            any::<bool>(),
            prop_oneof![4 => Just(1.0), 1 => Just(-1.5), 1 => Just(0.0)],
            prop_oneof![3 => Just(1.0), 1 => Just(12.0)],
            0..=3usize,
            any::<u64>(),
        );
        (shape, window, numbers).prop_map(move |(shape, window, numbers)| {
            let (lengths, key_heads, group, order, out_order) = shape;
            let (broadcast, top_left, scale, spread, slack, seed) = numbers;
            let bound = |template: i64, random: i64| if template > 0 { random } else { template };
            Case {
                lengths,
                key_heads,
                group,
                order,
                out_order,
                window: (bound(template.window.0, window.0), bound(template.window.1, window.1)),
                broadcast,
                top_left,
                scale,
                spread,
                slack: if template.packed { slack } else { 0 },
                loose: if template.packed { 5 * slack } else { 0 },
                seed,
                ..template.clone()
            }
        })
    }
}

const fn tile(simdgroups: usize, row_fragments: usize, keys: usize, value_chunk: usize) -> MetalTile {
    MetalTile { simdgroups, row_fragments, keys, staged: false, value_chunk, query: QueryHome::Registers }
}

const fn staged(tile: MetalTile) -> MetalTile {
    MetalTile { staged: true, ..tile }
}

const fn query_in(query: QueryHome, tile: MetalTile) -> MetalTile {
    MetalTile { query, ..tile }
}

fn dims(dtype: Dtype, head_dim: usize, value_dim: usize) -> Case {
    Case { dtype, head_dim, value_dim, ..Case::default() }
}

/// A window bound of the template that becomes a random one.
const RANDOM: i64 = i64::MAX;

/// Variants of the simdgroup kernel.
pub fn simdgroup() -> Vec<Variant> {
    use Dtype::{Bf16, F16, F32};
    let additive = |dtype| Some(BiasKind::Additive(dtype));
    let list = [
        ("f16 64 direct", dims(F16, 64, 64), tile(4, 2, 32, 64), true),
        (
            "f16 64 staged causal",
            Case { window: (-1, 0), dropout: 0.3, ..dims(F16, 64, 64) },
            staged(tile(4, 2, 32, 64)),
            true,
        ),
        (
            "bf16 128 packed window",
            Case { window: (RANDOM, RANDOM), packed: true, dropout: 0.3, ..dims(Bf16, 128, 128) },
            tile(4, 1, 16, 128),
            true,
        ),
        (
            "f32 32/48 softcap alibi",
            Case { softcap: 3.0, alibi: 1, window: (-1, RANDOM), ..dims(F32, 32, 48) },
            tile(2, 1, 32, 48),
            false,
        ),
        ("f16 80 bias", Case { bias: additive(F16), ..dims(F16, 80, 80) }, staged(tile(8, 1, 32, 80)), true),
        (
            "f16 72 boolean mask",
            Case { bias: Some(BiasKind::Boolean), window: (RANDOM, -1), sinks: true, ..dims(F16, 72, 72) },
            tile(4, 1, 32, 72),
            false,
        ),
        (
            "bf16 20/12 float bias",
            Case { bias: additive(F32), sinks: true, dropout: 0.6, ..dims(Bf16, 20, 12) },
            tile(1, 2, 16, 16),
            true,
        ),
        (
            "f32 61 parked in chunks",
            Case { window: (-1, 0), ..dims(F32, 61, 61) },
            query_in(QueryHome::Threadgroup, tile(4, 1, 8, 32)),
            false,
        ),
        ("f16 256 parked", dims(F16, 256, 256), query_in(QueryHome::Threadgroup, tile(4, 1, 16, 256)), true),
        ("bf16 256 in chunks", Case { window: (-1, 0), ..dims(Bf16, 256, 256) }, tile(4, 1, 16, 128), false),
        (
            "f16 320 from device",
            Case { window: (RANDOM, 0), packed: true, ..dims(F16, 320, 320) },
            query_in(QueryHome::Device, tile(2, 1, 16, 160)),
            true,
        ),
        ("f16 1", Case { window: (RANDOM, RANDOM), ..dims(F16, 1, 1) }, tile(2, 1, 8, 8), false),
        (
            "f16 40/24 everything packed",
            Case { packed: true, window: (RANDOM, RANDOM), softcap: 2.0, alibi: 2, sinks: true, ..dims(F16, 40, 24) },
            staged(tile(4, 1, 32, 24)),
            false,
        ),
        (
            "f32 64 staged parked",
            Case { lse: false, window: (-1, 0), ..dims(F32, 64, 64) },
            staged(query_in(QueryHome::Threadgroup, tile(2, 2, 16, 64))),
            false,
        ),
        (
            "bf16 96 bias softcap window",
            Case { bias: additive(Bf16), softcap: 4.0, window: (RANDOM, RANDOM), ..dims(Bf16, 96, 96) },
            tile(4, 1, 32, 96),
            false,
        ),
        ("f16 8/136 wide block", Case { sinks: true, ..dims(F16, 8, 136) }, tile(4, 1, 64, 72), true),
        (
            "f16 12/20 staged aligned",
            Case { window: (RANDOM, RANDOM), packed: true, sinks: true, dropout: 0.1, ..dims(F16, 12, 20) },
            staged(tile(2, 2, 16, 24)),
            true,
        ),
        (
            "bf16 44/28 staged parked",
            Case { bias: Some(BiasKind::Boolean), window: (-1, 0), ..dims(Bf16, 44, 28) },
            staged(query_in(QueryHome::Threadgroup, tile(2, 1, 16, 32))),
            true,
        ),
        (
            "f32 36/88 from device aligned",
            Case { softcap: 3.0, window: (RANDOM, -1), ..dims(F32, 36, 88) },
            query_in(QueryHome::Device, tile(2, 2, 16, 48)),
            true,
        ),
    ];
    list.into_iter()
        .map(|(name, case, tile, aligned)| Variant {
            name,
            case: Case { beside: if aligned { 4 } else { 5 }, ..case },
            tile: Some(tile),
            aligned,
            matmul: None,
        })
        .collect()
}

/// Products in one step over all columns of heads of `head_dim` and chunks of `value_chunk`, read from memory.
const fn large(head_dim: usize, value_chunk: usize) -> Matmul {
    Matmul {
        head_step: head_dim,
        value_step: value_chunk,
        operands: Operands::Memory,
        weights: Weights::Registers,
        relaxed: true,
        keep_step: false,
    }
}

/// Products of fragments whose operands lanes load.
const fn loaded(head_step: usize, value_step: usize) -> Matmul {
    Matmul { operands: Operands::Registers, ..large(head_step, value_step) }
}

const fn in_step(matmul: Matmul) -> Matmul {
    Matmul { keep_step: true, ..matmul }
}

const fn exact(matmul: Matmul) -> Matmul {
    Matmul { relaxed: false, ..matmul }
}

const fn narrow_weights(matmul: Matmul) -> Matmul {
    Matmul { weights: Weights::Narrow, ..matmul }
}

const fn parked_weights(matmul: Matmul) -> Matmul {
    Matmul { weights: Weights::Threadgroup, ..matmul }
}

/// Variants of the tensorops kernels.
#[allow(clippy::too_many_lines, reason = "a list")]
pub fn tensorops() -> Vec<Variant> {
    use Dtype::{Bf16, F16, F32};
    use QueryHome::{Device, Threadgroup};
    let additive = |dtype| Some(BiasKind::Additive(dtype));
    let parked = |tile| query_in(Threadgroup, tile);
    let everything =
        Case { packed: true, window: (RANDOM, RANDOM), softcap: 2.0, alibi: 2, sinks: true, ..Case::default() };
    let list = [
        ("tensor f16 64", dims(F16, 64, 64), parked(tile(4, 2, 32, 64)), large(64, 64)),
        (
            "tensor f16 128 causal in step",
            Case { window: (-1, 0), dropout: 0.3, ..dims(F16, 128, 128) },
            parked(tile(4, 2, 32, 128)),
            in_step(large(128, 128)),
        ),
        (
            "tensor bf16 96 packed window in steps",
            Case { window: (RANDOM, RANDOM), packed: true, dropout: 0.3, ..dims(Bf16, 96, 96) },
            parked(tile(2, 2, 32, 96)),
            large(48, 32),
        ),
        (
            "tensor f16 64 packed causal",
            Case { window: (-1, 0), packed: true, dropout: 0.6, ..dims(F16, 64, 64) },
            tile(4, 2, 32, 64),
            in_step(narrow_weights(large(16, 64))),
        ),
        (
            "tensor f32 32/48 softcap alibi",
            Case { softcap: 3.0, alibi: 1, window: (-1, RANDOM), ..dims(F32, 32, 48) },
            tile(2, 2, 16, 48),
            exact(large(16, 48)),
        ),
        ("tensor f32 64 tf32", dims(F32, 64, 64), tile(2, 2, 32, 64), large(64, 64)),
        (
            "tensor f16 80 bias loaded",
            Case { bias: additive(F16), ..dims(F16, 80, 80) },
            tile(4, 2, 32, 80),
            loaded(16, 16),
        ),
        (
            "tensor f16 72 boolean mask loaded",
            Case {
                bias: Some(BiasKind::Boolean),
                window: (RANDOM, -1),
                sinks: true,
                dropout: 0.3,
                ..dims(F16, 72, 72)
            },
            tile(4, 2, 32, 96),
            in_step(loaded(16, 32)),
        ),
        (
            "tensor bf16 20/12 float bias loaded",
            Case { bias: additive(F32), sinks: true, ..dims(Bf16, 20, 12) },
            parked(tile(1, 2, 16, 16)),
            loaded(16, 16),
        ),
        (
            "tensor f16 256 in chunks",
            Case { window: (RANDOM, 0), ..dims(F16, 256, 256) },
            parked(tile(2, 2, 32, 128)),
            large(256, 128),
        ),
        (
            "tensor f32 160/100 from device loaded",
            Case { window: (-1, 0), packed: true, ..dims(F32, 160, 100) },
            query_in(Device, tile(2, 2, 16, 64)),
            exact(loaded(32, 32)),
        ),
        (
            "tensor f16 40/24 everything loaded",
            Case { dtype: F16, head_dim: 40, value_dim: 24, ..everything.clone() },
            tile(4, 2, 32, 32),
            in_step(loaded(16, 32)),
        ),
        (
            "tensor bf16 64/32 everything",
            Case { dtype: Bf16, head_dim: 64, value_dim: 32, ..everything.clone() },
            parked(tile(2, 2, 32, 32)),
            large(32, 16),
        ),
        (
            "tensor f16 80 bias in registers",
            Case { bias: additive(Bf16), window: (-1, 0), lse: false, ..dims(F16, 80, 80) },
            tile(4, 2, 32, 80),
            in_step(parked_weights(large(80, 80))),
        ),
        (
            "staged f16 64 causal, aligned",
            Case { window: (-1, 0), dropout: 0.3, ..dims(F16, 64, 64) },
            staged(tile(4, 2, 32, 64)),
            large(64, 64),
        ),
        (
            "staged bf16 72 weights parked, aligned",
            Case { window: (RANDOM, RANDOM), bias: Some(BiasKind::Boolean), ..dims(Bf16, 72, 72) },
            staged(tile(4, 2, 16, 80)),
            parked_weights(large(80, 80)),
        ),
        (
            "staged f16 61/33 everything",
            Case { dtype: F16, head_dim: 61, value_dim: 33, ..everything.clone() },
            staged(parked(tile(4, 2, 16, 48))),
            large(32, 16),
        ),
        (
            "staged f32 weights parked packed",
            Case { window: (-1, 0), packed: true, dropout: 0.3, ..dims(F32, 40, 40) },
            staged(tile(2, 2, 32, 48)),
            exact(parked_weights(large(48, 48))),
        ),
        (
            "staged f16 320 from device in chunks, aligned",
            Case { window: (RANDOM, 0), sinks: true, ..dims(F16, 320, 320) },
            staged(query_in(Device, tile(2, 2, 16, 160))),
            large(80, 32),
        ),
    ];
    let variant = |(name, case, tile, matmul): (&'static str, Case, MetalTile, Matmul)| {
        let aligned = name.ends_with(", aligned");
        let case = if aligned { Case { beside: 4, ..case } } else { case };
        Variant { name, case, tile: Some(tile), aligned, matmul: Some(matmul) }
    };
    list.into_iter().map(variant).collect()
}

/// Variants of the scalar kernel.
pub fn scalar() -> Vec<Variant> {
    use Dtype::{Bf16, F16, F32};
    let additive = |dtype| Some(BiasKind::Additive(dtype));
    let list = [
        ("f32", dims(F32, 24, 40)),
        (
            "f16 everything packed",
            Case { packed: true, window: (RANDOM, RANDOM), softcap: 2.0, alibi: 2, sinks: true, ..dims(F16, 17, 100) },
        ),
        (
            "bf16 boolean mask",
            Case { bias: Some(BiasKind::Boolean), window: (-1, 0), dropout: 0.3, ..dims(Bf16, 64, 64) },
        ),
        (
            "f32 half bias",
            Case { bias: additive(F16), window: (RANDOM, -1), dropout: 0.3, lse: false, ..dims(F32, 9, 9) },
        ),
        ("f16 bfloat bias", Case { bias: additive(Bf16), sinks: true, dropout: 0.3, alibi: 1, ..dims(F16, 32, 200) }),
        ("bf16 float bias", Case { bias: additive(F32), softcap: 5.0, ..dims(Bf16, 300, 8) }),
    ];
    list.into_iter().map(|(name, case)| Variant { name, case, tile: None, aligned: false, matmul: None }).collect()
}

pub fn all() -> Vec<Variant> {
    scalar().into_iter().chain(simdgroup()).chain(tensorops()).collect()
}
