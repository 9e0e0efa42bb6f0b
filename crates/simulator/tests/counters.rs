//! Counts of bytes, products and barriers, exact, for B1 H4 L512 D64 float16 without a mask.
//!
//! The v1 kernel of mtlflashattn 0.2 there: 34,242,560 bytes of device reads, 25,165,824 bytes read from and 8,650,752
//! written to threadgroup memory, 16,640 barriers of a simdgroup.

mod common;

use common::bench::Bench;
use common::{Case, Run};
use mtlflashattn_core::plan::QueryHome;
use mtlflashattn_core::{Dtype, MetalTile};
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::{Counters, Layer, Options, Report};

const V1_DEVICE_READ: u64 = 34_242_560;
const V1_THREADGROUP_READ: u64 = 25_165_824;
const V1_THREADGROUP_WRITTEN: u64 = 8_650_752;
const V1_BARRIERS: u64 = 16_640;

const LEN: u64 = 512;
const HEADS: u64 = 4;
const DIM: u64 = 64;
/// Bytes of each of q, k, v and out.
const TENSOR: u64 = HEADS * LEN * DIM * 2;

const TILE: MetalTile = MetalTile {
    simdgroups: 4,
    row_fragments: 2,
    keys: 32,
    staged: false,
    value_chunk: 64,
    query: QueryHome::Registers,
};

fn run(window: (i64, i64)) -> Run {
    Run::new(&Case {
        dtype: Dtype::F16,
        lengths: vec![(LEN as usize, LEN as usize)],
        key_heads: HEADS as usize,
        head_dim: DIM as usize,
        value_dim: DIM as usize,
        window,
        lse: false,
        ..Case::default()
    })
}

fn count(run: &Run, tile: MetalTile) -> Report {
    let kernel = Kernel::simdgroup(&run.problem, tile, false);
    Bench::new(Options::new(Layer::Check)).count(&kernel, run).expect("a right result")
}

fn read(report: &Report, index: u32) -> u64 {
    report.buffer(index).expect("a bound buffer").read_bytes
}

/// Barriers that order memory.
fn barriers(counters: &Counters) -> u64 {
    counters.simdgroup_barriers + counters.threadgroup_barriers
}

#[test]
fn the_direct_form_reads_keys_and_values_once_for_16_rows() {
    let report = count(&run((-1, -1)), TILE);
    let counters = &report.counters;
    assert_eq!([read(&report, 0), read(&report, 1), read(&report, 2)], [TENSOR, TENSOR * LEN / 16, TENSOR * LEN / 16]);
    assert_eq!(counters.device_read_bytes, TENSOR + 2 * TENSOR * LEN / 16);
    assert_eq!(counters.device_written_bytes, TENSOR);
    assert_eq!((counters.threadgroup_read_bytes, counters.threadgroup_written_bytes), (0, 0));
    assert_eq!((barriers(counters), counters.threadgroup_memory_bytes), (0, 0));
    assert_eq!(counters.matrix_multiplies, 2 * HEADS * LEN * LEN * DIM / 512);
    // Two shuffles a block and row fragment and one vote a block; two shuffles at the end.
    let (row_fragments, blocks) = (HEADS * LEN / 8, LEN / 32);
    assert_eq!(counters.simd_operations, row_fragments * (2 * blocks + 2) + row_fragments / 2 * blocks);

    assert!(2 * counters.device_read_bytes <= V1_DEVICE_READ);
    assert!(10 * counters.threadgroup_read_bytes <= V1_THREADGROUP_READ);
    assert!(10 * counters.threadgroup_written_bytes <= V1_THREADGROUP_WRITTEN);
    assert!(4 * barriers(counters) <= V1_BARRIERS);
}

#[test]
fn the_staged_form_reads_keys_and_values_once_for_64_rows() {
    let report = count(&run((-1, -1)), MetalTile { staged: true, ..TILE });
    let counters = &report.counters;
    assert_eq!([read(&report, 0), read(&report, 1), read(&report, 2)], [TENSOR, TENSOR * LEN / 64, TENSOR * LEN / 64]);
    // K and V and nothing else: written once for 64 rows, read once for 16.
    assert_eq!(counters.threadgroup_written_bytes, 2 * TENSOR * LEN / 64);
    assert_eq!(counters.threadgroup_read_bytes, 2 * TENSOR * LEN / 16);
    let (threadgroups, blocks) = (HEADS * LEN / 64, LEN / 32);
    assert_eq!(barriers(counters), 2 * threadgroups * blocks);
    // 72 elements a row, for bank conflicts.
    assert_eq!(counters.threadgroup_memory_bytes, 2 * 32 * 72 * 2);

    assert!(4 * counters.device_read_bytes <= V1_DEVICE_READ);
    let both = counters.device_read_bytes + counters.threadgroup_read_bytes;
    assert!(2 * both <= V1_DEVICE_READ + V1_THREADGROUP_READ);
    assert!(4 * barriers(counters) <= V1_BARRIERS);
}

/// Blocks of 32 keys that the rows of each simdgroup (16 rows) see, over all simdgroups of a head.
fn blocks(visible: impl Fn(u64) -> (u64, u64)) -> u64 {
    (0..LEN / 16)
        .map(|i| {
            let (start, end) = (visible(16 * i).0, visible(16 * i + 15).1);
            end.div_ceil(32) - start / 32
        })
        .sum()
}

#[test]
fn hidden_blocks_are_skipped_on_both_sides() {
    let causal = blocks(|row| (0, row + 1));
    let banded = blocks(|row| (row.saturating_sub(100), (row + 20 + 1).min(LEN)));
    for (window, blocks) in [((-1, 0), causal), ((100, 20), banded)] {
        let report = count(&run(window), TILE);
        let products = HEADS * blocks * 2 * (2 * 4 * 8);
        assert_eq!(report.counters.matrix_multiplies, products, "{window:?}");
        assert_eq!(read(&report, 1), HEADS * blocks * 32 * DIM * 2, "{window:?}");
        assert_eq!(read(&report, 2), HEADS * blocks * 32 * DIM * 2, "{window:?}");
    }
    // Less than 6 of 10 blocks, and less than 4 of 10.
    let all = LEN / 16 * LEN / 32;
    assert!(10 * causal < 6 * all && 10 * banded < 4 * all);
}

#[test]
fn fragments_fit_the_registers_that_the_tile_plans_for() {
    let counters = count(&run((-1, -1)), TILE).counters;
    // O, S, and what a product replaces: 2 x 8 and 2 x 4 float fragments; Q, P and fragments of K or V.
    assert!((16 + 8..=16 + 8 + 3).contains(&counters.live_fragments_fp32), "{}", counters.live_fragments_fp32);
    assert!(counters.live_fragments_16bit <= 16 + 8 + 3, "{}", counters.live_fragments_16bit);
}

#[test]
fn head_groups_share_keys_without_copies() {
    let shared = |key_heads: usize| {
        let run = Run::new(&Case {
            dtype: Dtype::F16,
            lengths: vec![(64, 96)],
            key_heads,
            group: 4 / key_heads,
            head_dim: 64,
            value_dim: 64,
            lse: false,
            ..Case::default()
        });
        count(&run, TILE).counters
    };
    // The same work, from smaller tensors.
    assert_eq!(shared(1), shared(4));
}
