//! Counts of the backward pass beside those on paper, exact, and the planner's tiles beside what their kernels do.

mod common;

use common::Case;
use common::backward::{BackwardRun, BackwardVariant};
use common::bench::Bench;
use mtlflashattn_core::Dtype;
use mtlflashattn_core::plan::occupancy::KernelShape;
use mtlflashattn_core::plan::{BackwardPass, BackwardTile, Chip, Gpu, QueryHome, Wanted, backward_passes};
use mtlflashattn_metal::BackwardKernel;
use mtlflashattn_simulator::{Layer, Options, Report};

const LEN: u64 = 128;
const HEADS: u64 = 2;
const DIM: u64 = 64;
/// Bytes of each of q, k, v, out and their gradients.
const TENSOR: u64 = HEADS * LEN * DIM * 2;
/// 8x8x8 products of one N x N x D product.
const PRODUCT: u64 = HEADS * LEN * LEN * DIM / 512;

const TILE: BackwardTile =
    BackwardTile { simdgroups: 4, row_fragments: 1, block: 16, staged: false, chunk: 64, own: QueryHome::Registers };

fn variant(window: (i64, i64), tiles: Vec<(BackwardPass, BackwardTile)>) -> BackwardVariant {
    let case = Case {
        dtype: Dtype::F16,
        lengths: vec![(LEN as usize, LEN as usize)],
        key_heads: 1,
        group: HEADS as usize,
        head_dim: DIM as usize,
        value_dim: DIM as usize,
        window,
        beside: 4,
        ..Case::default()
    };
    BackwardVariant { name: "counted", case, tiles, aligned: true, lse_gradient: false }
}

/// Runs the kernels, checks their results, and returns what each did.
fn count(variant: &BackwardVariant) -> Vec<Report> {
    let run = BackwardRun::new(&variant.case, false);
    let kernels = variant.kernels(&run);
    let bench = Bench::new(Options::new(Layer::Check));
    let (got, reports) = run.launch(&bench, &kernels, &BackwardKernel::source).expect("the kernels run");
    run.check(&got).expect("right gradients");
    reports
}

fn all(tile: BackwardTile) -> Vec<(BackwardPass, BackwardTile)> {
    [BackwardPass::Delta, BackwardPass::Query, BackwardPass::KeysAndValues].map(|pass| (pass, tile)).into()
}

fn read(report: &Report, index: u32) -> u64 {
    report.buffer(index).expect("a bound buffer").read_bytes
}

#[test]
fn seven_products_and_nothing_shared() {
    let [delta, query, keys] = count(&variant((-1, -1), all(TILE))).try_into().expect("three kernels");
    assert_eq!(delta.counters.matrix_multiplies, 0);
    assert_eq!(delta.counters.device_read_bytes, 2 * TENSOR + HEADS * LEN * 4);
    assert_eq!(query.counters.matrix_multiplies, 3 * PRODUCT);
    assert_eq!(keys.counters.matrix_multiplies, 4 * PRODUCT);
    for report in [&delta, &query, &keys] {
        let counters = &report.counters;
        let barriers = counters.simdgroup_barriers + counters.threadgroup_barriers;
        assert_eq!((counters.atomic_operations, barriers, counters.threadgroup_read_bytes), (0, 0, 0));
    }
    // Owned rows once; rows of blocks once for each 8 rows and use. Keys are shared by two heads.
    let times = LEN / 8;
    let key_tensor = TENSOR / HEADS;
    assert_eq!([0, 1, 2, 9].map(|index| read(&query, index)), [TENSOR, 2 * TENSOR * times, TENSOR * times, TENSOR]);
    assert_eq!(
        [0, 1, 2, 9].map(|index| read(&keys, index)),
        [2 * TENSOR * times, key_tensor, key_tensor, 2 * TENSOR * times]
    );
    assert_eq!(query.counters.device_written_bytes, TENSOR);
    assert_eq!(keys.counters.device_written_bytes, 2 * key_tensor);
}

#[test]
fn staged_blocks_are_read_once_for_a_threadgroup() {
    let tile = BackwardTile { staged: true, ..TILE };
    let [_, query, keys] = count(&variant((-1, -1), all(tile))).try_into().expect("three kernels");
    let times = LEN / 32;
    assert_eq!([1, 2].map(|index| read(&query, index)), [TENSOR * times; 2]);
    assert_eq!([0, 9].map(|index| read(&keys, index)), [TENSOR * times; 2]);
    // Two barriers a block; blocks of keys pass for both heads.
    let barriers = 2 * HEADS * times * (LEN / 16);
    assert_eq!(query.counters.threadgroup_barriers, barriers);
    assert_eq!(keys.counters.threadgroup_barriers, barriers);
    assert_eq!(query.counters.matrix_multiplies + keys.counters.matrix_multiplies, 7 * PRODUCT);
}

/// Pairs of 8 rows and blocks of 16 of which some row sees some.
fn pairs(visible: impl Fn(u64, u64) -> bool) -> u64 {
    let meet = |rows: u64, block: u64| {
        (8 * rows..8 * rows + 8).any(|row| (16 * block..16 * block + 16).any(|other| visible(row, other)))
    };
    (0..LEN / 8).map(|rows| (0..LEN / 16).filter(|&block| meet(rows, block)).count() as u64).sum()
}

#[test]
fn hidden_blocks_are_skipped_on_both_sides() {
    let sees = |window: (i64, i64), query: u64, key: u64| {
        let distance = key as i64 - query as i64;
        (window.0 < 0 || distance >= -window.0) && (window.1 < 0 || distance <= window.1)
    };
    // 16 x 8 products of 8 rows with a block of 16, along or summed into 64 columns.
    let products = |pairs: u64, count: u64| HEADS * pairs * count * 2 * (DIM / 8);
    for window in [(-1, 0), (20, 5)] {
        let [_, query, keys] = count(&variant(window, all(TILE))).try_into().expect("three kernels");
        let of_queries = products(pairs(|query, key| sees(window, query, key)), 3);
        let of_keys = products(pairs(|key, query| sees(window, query, key)), 4);
        assert_eq!(query.counters.matrix_multiplies, of_queries, "{window:?}");
        assert_eq!(keys.counters.matrix_multiplies, of_keys, "{window:?}");
    }
    // Less than 6 of 10, and less than 4 of 10.
    let all = (LEN / 8) * (LEN / 16);
    assert!(10 * pairs(|query, key| sees((-1, 0), query, key)) < 6 * all);
    assert!(10 * pairs(|query, key| sees((20, 5), query, key)) < 4 * all);
}

fn gpu(chip: &str) -> Gpu {
    let chip = Chip::from_name(chip);
    Gpu { chip, cores: chip.most_cores(), ..Gpu::SIMULATED }
}

#[test]
fn planned_tiles_do_not_spill_and_repeat_nothing_up_to_128() {
    for chip in ["m1", "m2", "m3", "m4"] {
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for dim in [8, 40, 64, 80, 96, 128, 160, 192, 256, 320, 512] {
                let case = Case { dtype, head_dim: dim, value_dim: dim, lengths: vec![(8, 8)], ..Case::default() };
                let problem = BackwardRun::new(&case, false).run.problem;
                let shape = KernelShape::of(&problem, gpu(chip).has_bfloat());
                let passes = backward_passes(&problem, &gpu(chip), Wanted::INPUTS).expect("tiles");
                let has = |wanted| passes.iter().any(|&(pass, _)| pass == wanted);
                let name = format!("{chip} {dtype} {dim}: {passes:?}");
                assert!(has(BackwardPass::Delta) && has(BackwardPass::Query), "{name}");
                assert!(has(BackwardPass::KeysAndValues) != has(BackwardPass::Keys), "{name}");
                assert_eq!(has(BackwardPass::Keys), has(BackwardPass::Values), "{name}");
                for &(pass, tile) in &passes[1..] {
                    let occupancy = tile.occupancy(pass, &shape);
                    assert!(tile.fits(pass, dtype, dim, dim), "{name}");
                    assert!(!occupancy.is_near_spill() && tile.threads() <= occupancy.threads, "{name}");
                    if dim <= 128 && dtype == Dtype::F16 {
                        assert_eq!(tile.chunks(pass, dim, dim), 1, "{name}");
                    }
                }
                if dim <= 128 && dtype == Dtype::F16 {
                    assert!(has(BackwardPass::KeysAndValues), "{name}");
                }
            }
        }
    }
}

#[test]
fn planned_kernels_do_what_the_planner_counts() {
    for (chip, dim) in [("m1", 64), ("m3", 128), ("m1", 256)] {
        let case = Case {
            dtype: Dtype::F16,
            head_dim: dim,
            value_dim: dim,
            lengths: vec![(40, 32)],
            beside: 4,
            ..Case::default()
        };
        let problem = BackwardRun::new(&case, false).run.problem;
        let tiles = backward_passes(&problem, &gpu(chip), Wanted::INPUTS).expect("tiles");
        let variant = BackwardVariant { name: "planned", case, tiles, aligned: true, lse_gradient: false };
        let reports = count(&variant);
        for (&(pass, tile), report) in variant.tiles.iter().zip(&reports).skip(1) {
            let name = format!("{chip} {dim} {}: {tile}", pass.name());
            let modelled = tile.accumulators(pass, dim, dim) as u64;
            assert_eq!(report.counters.live_fragments_fp32, modelled, "{name}");
            let bytes = tile.threadgroup_bytes(pass, Dtype::F16, dim, dim) as u64;
            assert_eq!(report.counters.threadgroup_memory_bytes, bytes, "{name}");
        }
    }
}
