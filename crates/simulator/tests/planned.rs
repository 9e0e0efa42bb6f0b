//! What the planner counts and predicts about a tile is what the simulator sees its kernel do.

mod common;

use std::sync::LazyLock;

use common::bench::Bench;
use common::{Case, Run};
use mtlflashattn_core::plan::occupancy::KernelShape;
use mtlflashattn_core::plan::{Chip, FRAGMENT, Gpu, Planner, QueryHome};
use mtlflashattn_core::{Device, Dtype, Lengths, MetalTile, Problem, Settings};
use mtlflashattn_metal::{Device as _, Kernel};
use mtlflashattn_simulator::{Layer, Options, Report, Simulator};

/// The tile for a long problem like this one.
fn planned(problem: &Problem, chip: &str) -> MetalTile {
    let chip = Chip::from_name(chip);
    let gpu = Gpu { chip, cores: chip.most_cores(), ..Gpu::SIMULATED };
    let mut long = *problem;
    long.lengths = Lengths::Dense { batch: 4, query_len: 8192, key_len: 8192 };
    let settings = Settings::DEFAULT;
    let planner = Planner::new(Device::Metal(gpu), &settings);
    planner.plan(&long).unwrap().metal.unwrap()
}

struct Count {
    name: String,
    tile: MetalTile,
    shape: KernelShape,
    report: Report,
}

/// Keys of each run: whole blocks of any tile.
const KEY_LEN: usize = 32;

/// Runs the planned tile over one threadgroup of rows.
fn count(chip: &str, dtype: Dtype, head_dim: usize, value_dim: usize) -> Count {
    let case = |query_len| Case { dtype, head_dim, value_dim, lengths: vec![(query_len, KEY_LEN)], ..Case::default() };
    let tile = planned(&Run::new(&case(1)).problem, chip);
    let run = Run::new(&case(tile.rows()));
    let kernel = Kernel::simdgroup(&run.problem, tile, true);
    let name = format!("{chip} {dtype} {head_dim}/{value_dim}: {tile}");
    let pipeline = Simulator::new(Options::new(Layer::Check)).pipeline(&kernel.source(), kernel.entry()).unwrap();
    // What the planner counts is what the text declares.
    assert_eq!(pipeline.threadgroup_memory_bytes(), kernel.threadgroup_bytes() as u64, "{name}");
    let report = Bench::new(Options::new(Layer::Check)).count(&kernel, &run).unwrap_or_else(|e| panic!("{name}: {e}"));
    let shape = KernelShape::of(&run.problem, Chip::from_name(chip).generation() >= 3);
    Count { name, tile, shape, report }
}

/// Direct and staged, one and several passes, Q in each of its homes.
fn counts() -> &'static [Count] {
    static COUNTS: LazyLock<Vec<Count>> = LazyLock::new(|| {
        let cases = [
            ("m1", Dtype::F16, 64, 64),
            ("m1", Dtype::Bf16, 160, 160),
            ("m1", Dtype::F16, 192, 192),
            ("m3", Dtype::F16, 64, 64),
            ("m3", Dtype::F32, 8, 360),
        ];
        cases.map(|(chip, dtype, head_dim, value_dim)| count(chip, dtype, head_dim, value_dim)).into()
    });
    &COUNTS
}

#[test]
fn counted_traffic_is_what_the_planner_ranks_by() {
    let has = |test: &dyn Fn(&Count) -> bool| counts().iter().any(test);
    assert!(has(&|count| count.tile.staged) && has(&|count| !count.tile.staged));
    for home in [QueryHome::Registers, QueryHome::Threadgroup, QueryHome::Device] {
        assert!(has(&|count| count.tile.query == home), "{home:?}");
    }
    assert!(has(&|count| count.tile.passes(count.shape.value_dim) > 1));
    for Count { name, tile, shape, report } in counts() {
        let query_len = tile.rows();
        let traffic = tile.traffic(shape, query_len);
        let of_run = |bytes: usize| (bytes * query_len * KEY_LEN / 1024) as u64;
        // Rows of Q are loaded once by each pass, and kept.
        let rows = (tile.passes(shape.value_dim) * query_len * shape.head_dim * shape.dtype.size()) as u64;
        let (loaded, parked) = match tile.query {
            QueryHome::Registers => (rows, 0),
            QueryHome::Threadgroup => (rows, rows),
            QueryHome::Device => (0, 0),
        };
        let read: u64 = [0, 1, 2].iter().map(|&index| report.buffer(index).unwrap().read_bytes).sum();
        assert_eq!(read, of_run(traffic.device) + loaded, "{name}");
        let moved = report.counters.threadgroup_read_bytes + report.counters.threadgroup_written_bytes;
        assert_eq!(moved, of_run(traffic.threadgroup) + parked, "{name}");
    }
}

#[test]
fn accumulators_that_live_at_once_are_those_of_the_model() {
    for Count { name, tile, shape, report } in counts() {
        if shape.dtype != Dtype::F32 {
            let modelled = tile.row_fragments * (tile.value_chunk + tile.keys) / FRAGMENT;
            assert_eq!(report.counters.live_fragments_fp32, modelled as u64, "{name}");
        }
    }
}
