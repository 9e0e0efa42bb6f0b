//! Bytes that the decode kernels ask for, exact, for B1 H8 Hk2 D64 float16 with the planner's tiles and splits for two cores
//! of an M1, which is to its eight as two key heads are to eight:
//! K and V once for all rows that share a key head, whatever the number of queries. `docs/kernels.md` has the table.

mod common;

use common::bench::Bench;
use common::decode::{Texts, check};
use common::{Case, Run};
use mtlflashattn_core::plan::{Gpu, Planner};
use mtlflashattn_core::{Device, Dtype, Settings, Tier};
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::{Layer, Options};

const KEY_HEADS: u64 = 2;
const GROUP: u64 = 4;
const DIM: u64 = 64;

/// What a case asks for and what it should.
struct Expected {
    queries: u64,
    keys: u64,
    /// Rows of a simdgroup, simdgroups of a threadgroup, splits.
    rows: u64,
    simdgroups: u64,
    splits: u64,
}

#[test]
fn keys_are_read_once_for_all_rows_of_a_group() {
    for Expected { queries, keys, rows, simdgroups, splits } in [
        Expected { queries: 1, keys: 4096, rows: 8, simdgroups: 4, splits: 4 },
        Expected { queries: 4, keys: 4096, rows: 16, simdgroups: 4, splits: 4 },
        Expected { queries: 8, keys: 4096, rows: 8, simdgroups: 4, splits: 4 },
        Expected { queries: 32, keys: 2048, rows: 8, simdgroups: 16, splits: 1 },
    ] {
        // Bytes of each of k and v.
        let key_bytes = KEY_HEADS * keys * DIM * 2;
        let run = Run::new(&Case {
            dtype: Dtype::F16,
            lengths: vec![(queries as usize, keys as usize)],
            key_heads: KEY_HEADS as usize,
            group: GROUP as usize,
            head_dim: DIM as usize,
            value_dim: DIM as usize,
            lse: false,
            ..Case::default()
        });
        let plan = Planner::new(Device::Metal(Gpu { cores: 2, ..Gpu::SIMULATED }), &Settings::DEFAULT)
            .plan(&run.problem)
            .unwrap();
        let tile = plan.metal.unwrap();
        assert_eq!(
            (plan.tier, tile.simdgroup_rows() as u64, tile.simdgroups as u64, plan.splits as u64),
            (Tier::Decode, rows, simdgroups, splits),
            "{queries} queries"
        );
        let kernel = Kernel::decode(&run.problem, tile, false);
        let bench = Bench::new(Options::new(Layer::Check));
        let reports = check(&bench, &kernel, &Texts::of(&kernel), &run, plan.splits).expect("a right result");
        let read = |index| reports.decode.buffer(index).map_or(0, |counts| counts.read_bytes);
        assert_eq!([read(1), read(2)], [key_bytes; 2], "{queries} queries");
        // Two products for each fragment of rows and of keys. Barriers: four add up what four simdgroups parked; two are for
        // each staged block.
        let (group_rows, barriers) = if tile.staged {
            (simdgroups * rows, 2 * keys / tile.keys as u64)
        } else {
            (rows, splits * 2 * u64::from(simdgroups.ilog2()))
        };
        let products = KEY_HEADS * 2 * (group_rows / 8) * (keys / 8) * (DIM / 8);
        let counted = &reports.decode.counters;
        assert_eq!((counted.products(), counted.threadgroup_barriers), (products, KEY_HEADS * barriers));
        // Every simdgroup reads its rows of Q once; those past the end read the last row again.
        let row = DIM * 2;
        let decode = &reports.decode.counters;
        let merge = &reports.merge.counters;
        let query_bytes = KEY_HEADS * splits * simdgroups * rows * row;
        assert_eq!(decode.device_read_bytes, query_bytes + 2 * key_bytes, "{queries} queries");
        let all_rows = KEY_HEADS * GROUP * queries;
        let partials = if splits > 1 { splits * all_rows * (DIM + 2) * 4 } else { 0 };
        let out = all_rows * row;
        assert_eq!(decode.device_written_bytes, if splits > 1 { partials } else { out });
        // Every lane reads the states, once for the maximum and once for the weights; values are read once.
        let states = splits * all_rows * 2 * 4;
        let (merge_read, merge_written) = if splits > 1 { (partials - states + 2 * 32 * states, out) } else { (0, 0) };
        assert_eq!([merge.device_read_bytes, merge.device_written_bytes], [merge_read, merge_written]);
        // Partial results apart, hardly more than the tensors.
        let least = 2 * key_bytes + 2 * all_rows * row;
        let asked = decode.device_read_bytes + out;
        assert!(100 * asked <= 105 * least, "{queries} queries: {asked} bytes of {least}");
    }
}
