//! How many threads of a kernel an M1 or M2 GPU core holds, predicted from the kernel's tile.
//!
//! The GPU (G13) and its register file are described by Mesa's `src/asahi` and by dougallj/applegpu. The constants were
//! fitted to attention kernels that Mesa's compiler compiled, not Apple's: classes are right within one, spills that
//! [`Occupancy::must_spill`] predicts are certain, and nothing is said about time. From the M3 on registers are
//! allocated while the kernel runs, which the model does not describe; there it only ranks.

use super::tile::{FRAGMENT, MetalTile, QueryHome};
use crate::{Dtype, Problem};

/// 16-bit registers that an instruction can address.
pub const MOST_HALVES: usize = 256;

/// `(most 16-bit registers of a thread, threads of a core)`, from Mesa's `agx_performance.c`.
pub const CLASSES: [(usize, usize); 10] = [
    (104, 1024),
    (112, 896),
    (128, 832),
    (136, 768),
    (144, 704),
    (160, 640),
    (184, 576),
    (208, 512),
    (232, 448),
    (MOST_HALVES, 384),
];

/// Most 16-bit registers of a thread where a core holds `threads`, as `max_threads_per_threadgroup` tells on an M1 or M2;
/// `None` for a number that no class has.
#[must_use]
pub fn registers_of(threads: usize) -> Option<usize> {
    CLASSES.iter().find(|&&(_, class)| class == threads).map(|&(halves, _)| halves)
}

/// Threadgroup memory that one threadgroup may have, in bytes.
pub const THREADGROUP_MEMORY: usize = 32 * 1024;
/// Threadgroup memory is handed out in units of this many bytes.
const THREADGROUP_UNIT: usize = 256;
/// Threadgroup memory of a core in bytes: published measurements say 60 to 64 KiB.
const CORE_MEMORY: usize = 60 * 1024;

/// Registers of a kernel beside fragments: addresses of small arrays, counters, thread and lane positions.
const BASE_HALVES: usize = 30;
/// 64-bit addresses and strides of K, V and the block that are live in the loop over the keys.
const ADDRESS_HALVES: usize = 22;
/// Running maximum and sum of one row fragment: a float each, for the row that a lane has a part of.
const STATE_HALVES: usize = 4;
/// Fragments of K that are loaded ahead where Q is not in registers: that loop is unrolled so many times only.
const UNROLLED: usize = 4;

/// What a kernel variant does beside the two products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools, reason = "features are on or off")]
pub struct Features {
    /// Causal or windowed.
    pub masked: bool,
    /// `softcap * tanh(score / softcap)`.
    pub softcap: bool,
    /// ALiBi slopes.
    pub alibi: bool,
    /// An additive bias or a boolean mask.
    pub bias: bool,
    /// Weights are dropped.
    pub dropout: bool,
}

impl Features {
    /// Registers that stay occupied during the loop: bounds; factors; a slope and a position for each row; a 64-bit
    /// address for each row, and a stride; four random words and the key that they come from. An estimate from the types
    /// involved: no such kernel was compiled.
    pub(super) const fn halves(self, row_fragments: usize) -> usize {
        let Self { masked, softcap, alibi, bias, dropout } = self;
        4 * masked as usize
            + 4 * softcap as usize
            + 4 * row_fragments * alibi as usize
            + (4 * row_fragments + 4) * bias as usize
            + 12 * dropout as usize
    }
}

/// What decides the registers of a kernel, beside its tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelShape {
    /// Type of Q, K, V and P.
    pub dtype: Dtype,
    /// Whether bfloat16 fragments are multiplied as they are; where not, they are widened to float32.
    pub has_bfloat: bool,
    /// Columns of Q and K.
    pub head_dim: usize,
    /// Columns of V and O.
    pub value_dim: usize,
    /// What else it does.
    pub features: Features,
}

impl KernelShape {
    /// The shape of the kernel that serves `problem`.
    #[must_use]
    pub fn of(problem: &Problem, has_bfloat: bool) -> Self {
        let features = Features {
            masked: !problem.mask.is_full(),
            softcap: problem.softcap != 0.0,
            alibi: problem.alibi.is_some(),
            bias: problem.bias.is_some(),
            dropout: problem.dropout.is_some(),
        };
        let Problem { dtype, head_dim, value_dim, .. } = *problem;
        Self { dtype, has_bfloat, head_dim, value_dim, features }
    }

    /// 16-bit registers of an operand fragment: a lane has 2 of its 64 elements.
    #[must_use]
    pub const fn operand_halves(&self) -> usize {
        match self.dtype {
            Dtype::F16 => 2,
            Dtype::Bf16 if self.has_bfloat => 2,
            Dtype::Bf16 | Dtype::F32 => ACCUMULATOR_HALVES,
        }
    }
}

/// What the model says about one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Occupancy {
    /// 16-bit registers of a thread.
    pub halves: usize,
    /// Threads of a core that the registers allow; 0 when the kernel must spill.
    pub threads: usize,
    /// Threadgroup memory in bytes, as allocated.
    pub threadgroup_bytes: usize,
    /// Whole threadgroups of a core that registers and threadgroup memory allow.
    pub threadgroups: usize,
}

/// 16-bit registers of an accumulator fragment: float32.
const ACCUMULATOR_HALVES: usize = 4;

impl Occupancy {
    /// Predicts the kernel of `tile` and `shape`.
    #[must_use]
    pub fn predict(tile: &MetalTile, shape: &KernelShape) -> Self {
        let halves = predict_halves(tile, shape);
        Self::of(halves, tile.threadgroup_bytes(shape.dtype, shape.head_dim), tile.threads())
    }

    /// That of a kernel whose threads have `halves` registers and whose threadgroups have `bytes` and `group_threads`.
    pub(super) fn of(halves: usize, bytes: usize, group_threads: usize) -> Self {
        let threads = threads_of_core(halves);
        let threadgroup_bytes = bytes.next_multiple_of(THREADGROUP_UNIT);
        let by_memory = CORE_MEMORY.checked_div(threadgroup_bytes).unwrap_or(usize::MAX);
        Self { halves, threads, threadgroup_bytes, threadgroups: by_memory.min(threads / group_threads) }
    }

    /// Whether the fragments that live at once need more registers than a thread has, whatever the compiler does.
    #[must_use]
    pub const fn must_spill(&self) -> bool {
        self.halves > MOST_HALVES
    }

    /// Whether the kernel is in the last class of registers: within the model's error of a spill.
    #[must_use]
    pub const fn is_near_spill(&self) -> bool {
        self.halves > CLASSES[CLASSES.len() - 2].0
    }
}

/// Threads of a core when each has `halves` 16-bit registers; 0 when no thread can.
#[must_use]
pub fn threads_of_core(halves: usize) -> usize {
    CLASSES.iter().find(|&&(most, _)| halves <= most).map_or(0, |&(_, threads)| threads)
}

fn predict_halves(tile: &MetalTile, shape: &KernelShape) -> usize {
    let operand = shape.operand_halves();
    let [query, keys, value] = [shape.head_dim, tile.keys, tile.value_chunk].map(|size| size.div_ceil(FRAGMENT));
    // P takes the place of S, fragment by fragment.
    let (resident, unrolled) =
        if tile.query == QueryHome::Registers { (query, query) } else { (1, query.min(UNROLLED)) };
    let row = resident * operand + (value + keys) * ACCUMULATOR_HALVES + STATE_HALVES;
    // Unrolled loads of K run ahead of the products: seen as a growth with keys times head_dim.
    let ahead = keys * unrolled * operand / 8;
    BASE_HALVES + ADDRESS_HALVES + tile.row_fragments * row + ahead + shape.features.halves(tile.row_fragments)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn threads_tell_the_class_of_registers() {
        assert_eq!(registers_of(1024), Some(104));
        assert_eq!(registers_of(384), Some(MOST_HALVES));
        assert_eq!(registers_of(1000), None);
    }

    fn class(threads: usize) -> usize {
        CLASSES.iter().position(|&(_, class)| class == threads).unwrap()
    }

    /// The compiled kernels: float16, K and V staged, Q in registers, 4 simdgroups.
    fn predict(head_dim: usize, row_fragments: usize, keys: usize) -> Occupancy {
        let query = QueryHome::Registers;
        let tile = MetalTile { simdgroups: 4, row_fragments, keys, staged: true, value_chunk: head_dim, query };
        Occupancy::predict(&tile, &half_shape(head_dim))
    }

    fn half_shape(head_dim: usize) -> KernelShape {
        let features = Features::default();
        KernelShape { dtype: Dtype::F16, has_bfloat: false, head_dim, value_dim: head_dim, features }
    }

    /// Kernels compiled by Mesa's compiler: head dimension, row fragments, keys, and the range of threads that variants of the
    /// kernel reached.
    const COMPILED: [(usize, usize, usize, [usize; 2]); 9] = [
        (64, 1, 32, [704, 832]),
        (64, 1, 64, [640, 640]),
        (64, 2, 32, [512, 512]),
        (80, 1, 32, [640, 640]),
        (96, 1, 32, [576, 576]),
        (128, 1, 8, [640, 640]),
        (128, 1, 16, [576, 640]),
        (128, 1, 32, [512, 576]),
        (128, 1, 64, [384, 448]),
    ];

    #[test]
    fn predicted_classes_are_within_one_of_the_compiled_ones() {
        for (head_dim, row_fragments, keys, [fewest, most]) in COMPILED {
            let occupancy = predict(head_dim, row_fragments, keys);
            assert!(!occupancy.must_spill());
            let got = class(occupancy.threads);
            let text = format!("D{head_dim}, {row_fragments} fragments, {keys} keys: {occupancy:?}");
            // Fewer threads are a higher class.
            assert!(got + 1 >= class(most) && got <= class(fewest) + 1, "{text}");
        }
    }

    #[test]
    fn tiles_whose_compilation_spilled_must_spill() {
        for (head_dim, row_fragments, keys) in [(64, 4, 32), (128, 2, 32), (256, 1, 16)] {
            let occupancy = predict(head_dim, row_fragments, keys);
            assert!(occupancy.must_spill() && occupancy.threads == 0, "D{head_dim}: {occupancy:?}");
            assert_eq!(occupancy.threadgroups, 0);
        }
    }

    #[test]
    fn the_document_has_these_predictions() {
        let document = include_str!("../../../../docs/planner.md");
        let has = |row: &str| assert!(document.contains(row), "{row}");
        for (head_dim, row_fragments, keys, [fewest, most]) in COMPILED {
            let Occupancy { halves, threads, .. } = predict(head_dim, row_fragments, keys);
            let compiled = if fewest == most { most.to_string() } else { format!("{fewest} to {most}") };
            has(&format!("| {head_dim}, {}, {keys} | {compiled} | {halves}, {threads} |", 8 * row_fragments));
        }
        let row = |values: Vec<usize>| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ");
        has(&format!("| registers, at most | {} |", row(CLASSES.map(|(halves, _)| halves).into())));
        has(&format!("| threads of a core | {} |", row(CLASSES.map(|(_, threads)| threads).into())));
    }

    #[test]
    fn threads_follow_the_table() {
        for pair in CLASSES.windows(2) {
            let [(most, threads), (_, next)] = [pair[0], pair[1]];
            assert_eq!([threads_of_core(most), threads_of_core(most + 1)], [threads, next]);
        }
        assert_eq!([threads_of_core(256), threads_of_core(257)], [384, 0]);
    }

    #[test]
    fn staged_blocks_are_counted_in_units() {
        // 32 keys of 64 + 64 halfs, each row 16 bytes longer: 32 * 2 * 144 = 9,216 bytes, which are 36 units.
        assert_eq!(predict(64, 1, 32).threadgroup_bytes, 9216);
        // 8 * 2 * (72 * 2 + 16) = 2,560: head_dim 65 takes nine fragments.
        assert_eq!(predict(65, 1, 8).threadgroup_bytes, 8 * (144 + 16) * 2);
        let direct = MetalTile {
            simdgroups: 4,
            row_fragments: 1,
            keys: 32,
            staged: false,
            value_chunk: 64,
            query: QueryHome::Registers,
        };
        let occupancy = Occupancy::predict(&direct, &half_shape(64));
        assert_eq!(occupancy.threadgroup_bytes, 0);
        // Whole threadgroups of 128 threads.
        assert_eq!(occupancy.threadgroups, occupancy.threads / 128);
        // 32 rows of 100 halfs, in groups of four fragments: 8,192 bytes.
        let parked = MetalTile { query: QueryHome::Threadgroup, ..direct };
        assert_eq!(Occupancy::predict(&parked, &half_shape(100)).threadgroup_bytes, 32 * 128 * 2);
    }

    proptest! {
        #[test]
        fn more_of_anything_never_needs_less(
            head_dim in 1..600usize,
            value_chunk in 1..600usize,
            row_fragments in 1..5usize,
            keys in 1..20usize,
            dtype in prop_oneof![Just(Dtype::F16), Just(Dtype::Bf16), Just(Dtype::F32)],
            has_bfloat: bool,
            query in prop_oneof![Just(QueryHome::Registers), Just(QueryHome::Threadgroup), Just(QueryHome::Device)],
        ) {
            let halves = |head_dim, value_chunk, row_fragments, keys, features| {
                let tile = MetalTile { simdgroups: 4, row_fragments, keys: 8 * keys, staged: false, value_chunk, query };
                let shape = KernelShape { dtype, has_bfloat, head_dim, value_dim: value_chunk, features };
                Occupancy::predict(&tile, &shape).halves
            };
            let none = Features::default();
            let all = Features { masked: true, softcap: true, alibi: true, bias: true, dropout: true };
            let least = halves(head_dim, value_chunk, row_fragments, keys, none);
            prop_assert!(halves(head_dim + 8, value_chunk, row_fragments, keys, none) >= least);
            prop_assert!(halves(head_dim, value_chunk + 8, row_fragments, keys, none) > least);
            prop_assert!(halves(head_dim, value_chunk, row_fragments + 1, keys, none) > least);
            prop_assert!(halves(head_dim, value_chunk, row_fragments, keys + 1, none) > least);
            prop_assert!(halves(head_dim, value_chunk, row_fragments, keys, all) > least);
        }
    }
}
