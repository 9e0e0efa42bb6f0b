use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::*;
use crate::plan::{Chip, Device, Planner};
use crate::{Options, Settings, TensorMeta, Tier};

fn problem(dtype: Dtype, [batch, query_len, query_heads, dim]: [i64; 4], [key_len, key_heads]: [i64; 2]) -> Problem {
    let strides = |len: i64, heads: i64| [len * heads * dim, heads * dim, dim, 1];
    let (query_shape, key_shape) = ([batch, query_len, query_heads, dim], [batch, key_len, key_heads, dim]);
    let (query_strides, key_strides) = (strides(query_len, query_heads), strides(key_len, key_heads));
    let q = TensorMeta { dtype, shape: &query_shape, strides: &query_strides };
    let k = TensorMeta { dtype, shape: &key_shape, strides: &key_strides };
    Problem::dense(q, k, k, &Options { window: (-1, -1), ..Options::default() }).unwrap()
}

fn gpu(name: &str) -> Gpu {
    let chip = Chip::from_name(name);
    Gpu { chip, cores: chip.most_cores(), ..Gpu::SIMULATED }
}

fn tile(gpu_name: &str, problem: &Problem) -> MetalTile {
    candidates(problem, &gpu(gpu_name)).unwrap()[0]
}

fn tier(gpu: Gpu, problem: &Problem) -> Tier {
    Planner::new(Device::Metal(gpu), &Settings::DEFAULT).plan(problem).unwrap().tier
}

#[test]
fn few_queries_take_the_decode_kernel_where_it_reads_less() {
    let of = |queries, keys, heads| problem(Dtype::F16, [1, queries, heads, 128], [keys, 8]);
    let m1 = gpu("m1");
    assert_eq!(tier(m1, &of(1, 4096, 32)), Tier::Decode);
    assert_eq!(tier(m1, &of(32, 4096, 64)), Tier::Decode);
    assert_eq!(tier(m1, &of(33, 4096, 8)), Tier::Simdgroup);
    assert_eq!(tier(m1, &of(1, 127, 32)), Tier::Simdgroup);
    // Matrix units take over where rows compute for longer than keys are read.
    let m5 = Gpu { macos: crate::plan::Version::new(26, 2), ..gpu("m5-max") };
    assert_eq!([tier(m5, &of(8, 4096, 32)), tier(m5, &of(9, 4096, 32))], [Tier::Decode, Tier::Tensorops]);
    let forced = Settings::parse(|name| (name == "MTLFLASHATTN_KERNEL").then(|| "decode".into())).0;
    let plan = |problem: &Problem| Planner::new(Device::Metal(m5), &forced).plan(problem);
    assert_eq!(plan(&of(32, 4, 32)).unwrap().tier, Tier::Decode);
    let error = plan(&of(33, 4, 32)).unwrap_err().to_string();
    assert!(error.contains("serves up to 32 queries"), "{error}");
}

#[test]
fn up_to_16_rows_share_blocks_among_simdgroups_and_more_rows_share_staged_keys() {
    let of = |rows| tile("m3", &problem(Dtype::F16, [1, 1, rows, 64], [4096, 1]));
    let direct = |row_fragments, keys| MetalTile {
        simdgroups: 4,
        row_fragments,
        keys,
        staged: false,
        value_chunk: 64,
        query: QueryHome::Registers,
    };
    assert_eq!([of(1), of(8)], [direct(1, 32), direct(1, 32)]);
    assert_eq!(of(16), direct(2, 32));
    for rows in [24, 32, 64, 100, 128] {
        let tile = of(rows);
        assert!(tile.staged && group_rows(&tile) >= rows as usize, "{rows}: {tile}");
    }
    // More rows than a threadgroup can have: a second one reads the keys again.
    assert_eq!(group_rows(&of(512)), 256);
}

#[test]
fn splits_fill_any_gpu_and_are_worth_merging() {
    let of = |batch, query_len, heads: [i64; 2], key_len| {
        problem(Dtype::F16, [batch, query_len, heads[0], 128], [key_len, heads[1]])
    };
    // Batch, queries, heads, keys; splits for 8, 10, 20, 40 and 80 cores. docs/planner.md has this table.
    for (batch, query_len, heads, key_len, expected) in [
        (1, 1, [32, 8], 4096, [4, 5, 10, 16, 16]),
        (1, 1, [32, 8], 16_384, [4, 5, 10, 20, 40]),
        (1, 1, [32, 8], 65_536, [4, 5, 10, 20, 40]),
        (8, 1, [32, 8], 4096, [1, 1, 2, 3, 5]),
        (64, 1, [32, 8], 4096, [1, 1, 1, 1, 1]),
        (1, 8, [32, 8], 16_384, [4, 5, 10, 20, 31]),
        (1, 32, [32, 8], 16_384, [1, 2, 3, 5, 7]),
        (1, 1, [16, 1], 65_536, [64, 80, 160, 240, 240]),
        (1, 1, [8, 8], 512, [2, 2, 2, 2, 2]),
        (1, 1, [8, 8], 300, [1, 1, 1, 1, 1]),
    ] {
        let problem = of(batch, query_len, heads, key_len);
        let tile = tile("m1", &problem);
        let got = [8, 10, 20, 40, 80].map(|cores| splits(&problem, &tile, cores));
        assert_eq!(got, expected, "batch {batch}, {query_len} queries, heads {heads:?}, {key_len} keys: {tile}");
    }
}

#[test]
fn hidden_keys_make_no_splits() {
    let mut problem = problem(Dtype::F16, [1, 1, 32, 128], [65_536, 8]);
    let tile = tile("m1", &problem);
    problem.mask.right = Some(0);
    assert_eq!(splits(&problem, &tile, 8), 4);
    problem.mask.left = Some(600);
    assert_eq!(splits(&problem, &tile, 8), 2);
}

#[test]
fn as_many_splits_as_asked_for_if_they_have_keys() {
    let split = |key_len, asked| {
        let problem = problem(Dtype::F16, [1, 1, 32, 128], [key_len, 8]);
        let tile = tile("m1", &problem);
        (splits(&Problem { splits: NonZeroUsize::new(asked), ..problem }, &tile, 8), tile.keys * tile.simdgroups)
    };
    assert_eq!([1, 3, 128, 1000].map(|asked| split(65_536, asked).0), [1, 3, 128, MOST_SPLITS]);
    let (most, turn) = split(300, 128);
    assert_eq!(most, 300usize.div_ceil(turn));
    assert_eq!(split(0, 5).0, 1);
}

proptest! {
    #[test]
    fn a_tile_exists_that_fits_and_splits_have_enough_keys(
        dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)],
        name in prop_oneof![Just("m1"), Just("m2-max"), Just("m3"), Just("m5-max")],
        (batch, query_len, key_heads, group) in (1..=40i64, 0..=32i64, 1..=8i64, 1..=16i64),
        (dim, key_len) in (1..=320i64, 0..=100_000i64),
        cores in 1..=100usize,
    ) {
        let problem = problem(dtype, [batch, query_len, key_heads * group, dim], [key_len, key_heads]);
        let tile = tile(name, &problem);
        let bytes = threadgroup_bytes(&tile, dtype, dim as usize);
        prop_assert!(bytes <= THREADGROUP_MEMORY);
        prop_assert!(tile.staged || tile.simdgroups.is_power_of_two());
        prop_assert!(tile.staged || group_rows(&tile) >= packed_rows(&problem));
        let splits = splits(&problem, &tile, cores);
        prop_assert!((1..=MOST_SPLITS).contains(&splits));
        prop_assert!(splits == 1 || key_len as usize / splits >= FEWEST_SPLIT_KEYS);
    }
}
