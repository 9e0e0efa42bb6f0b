//! What the tensorops kernels ask of memory and matrix units, exact, for B1 H4 L512 float16 without a mask, beside v2 and
//! v2r of mtlflashattn 0.2, whose counts are those that the simulator gives their texts.
#![allow(clippy::print_stdout, reason = "says that there was nothing to run")]

mod common;

use common::bench::Bench;
use common::peer::{PeerKernel, PeerShape, read};
use common::{Case, Run};
use mtlflashattn_core::plan::{Chip, Gpu, Matmul, Operands, Planner, QueryHome, Version};
use mtlflashattn_core::{Device, Dtype, MetalTile, Settings, Tier};
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::{Counters, Layer, Options, Report, Simulator};

const LEN: u64 = 512;
const HEADS: u64 = 4;
/// Rows of a simdgroup, keys of a block, rows of a threadgroup.
const ROWS: u64 = 16;
const KEYS: u64 = 32;
const GROUP: u64 = 64;

/// Bytes of each of q, k, v and out.
const fn tensor(dim: u64) -> u64 {
    HEADS * LEN * dim * 2
}

fn run(dim: u64, window: (i64, i64)) -> Run {
    Run::new(&Case {
        dtype: Dtype::F16,
        lengths: vec![(LEN as usize, LEN as usize)],
        key_heads: HEADS as usize,
        head_dim: dim as usize,
        value_dim: dim as usize,
        window,
        lse: false,
        ..Case::default()
    })
}

/// What the planner takes on an M5.
fn planned(run: &Run, tier: Tier) -> (MetalTile, Matmul) {
    let chip = Chip::from_name("m5-max");
    let gpu = Gpu { chip, cores: chip.most_cores(), macos: Version::new(26, 2), ..Gpu::SIMULATED };
    let settings = Settings::default();
    let plan = Planner::new(Device::Metal(gpu), &settings).serve(&run.problem, tier).unwrap();
    (plan.metal.unwrap(), plan.matmul.unwrap())
}

fn count(run: &Run, (tile, matmul): (MetalTile, Matmul)) -> Report {
    let kernel = Kernel::tensorops(&run.problem, tile, matmul, false);
    Bench::new(Options::new(Layer::Check)).count(&kernel, run).expect("a right result")
}

fn read_bytes(report: &Report, index: u32) -> u64 {
    report.buffer(index).expect("a bound buffer").read_bytes
}

/// What v2 and v2r ask for: head dimension, device bytes read, threadgroup bytes read and written, barriers of the
/// threadgroup and of a simdgroup.
struct Peer {
    kernel: PeerKernel,
    dim: u64,
    device: u64,
    threadgroup: [u64; 2],
    barriers: [u64; 2],
}

const fn peer(kernel: PeerKernel, dim: u64, device: u64, threadgroup: [u64; 2], barriers: [u64; 2]) -> Peer {
    Peer { kernel, dim, device, threadgroup, barriers }
}

const PEERS: [Peer; 4] = [
    peer(PeerKernel::V2, 64, 12_910_592, [15_204_352, 14_688_256], [4160, 0]),
    peer(PeerKernel::V2r, 64, 21_151_744, [13_762_560, 1_458_176], [0, 8448]),
    peer(PeerKernel::V2, 128, 25_493_504, [24_117_248, 14_688_256], [4160, 0]),
    peer(PeerKernel::V2r, 128, 42_123_264, [22_675_456, 1_458_176], [0, 8448]),
];

fn of_peer(kernel: PeerKernel, dim: u64) -> &'static Peer {
    PEERS.iter().find(|peer| peer.kernel == kernel && peer.dim == dim).unwrap()
}

fn threadgroup_bytes(counters: &Counters) -> [u64; 2] {
    [counters.threadgroup_read_bytes, counters.threadgroup_written_bytes]
}

#[test]
fn the_peers_counts_are_these() {
    let Some(python) = read() else {
        println!("PEER is not set: nothing was run");
        return;
    };
    let simulator = Simulator::new(Options::new(Layer::Check));
    let (len, heads) = (LEN as usize, HEADS as usize);
    for peer in &PEERS {
        let dim = peer.dim as usize;
        let shape = PeerShape { heads, key_heads: heads, query_len: len, key_len: len, dim, causal: false };
        let bytes = vec![0; tensor(peer.dim) as usize];
        let source = peer.kernel.source(&python, dim, Dtype::F16);
        let (_, report) = peer.kernel.run(&simulator, &source, &shape, 2, [&bytes, &bytes, &bytes]).unwrap();
        let counters = &report.counters;
        assert_eq!(counters.device_read_bytes, peer.device);
        assert_eq!(threadgroup_bytes(counters), peer.threadgroup);
        assert_eq!([counters.threadgroup_barriers, counters.simdgroup_barriers], peer.barriers);
    }
}

#[test]
fn the_direct_kernel_moves_q_through_threadgroup_memory_and_neither_s_nor_p() {
    for dim in [64, 128] {
        let run = run(dim, (-1, -1));
        let (tile, matmul) = planned(&run, Tier::Tensorops);
        assert_eq!((tile.query, matmul.operands), (QueryHome::Threadgroup, Operands::Memory));
        let report = count(&run, (tile, matmul));
        let counters = &report.counters;
        // K and V once for the rows of each simdgroup.
        let shared = tensor(dim) * LEN / ROWS;
        assert_eq!([0, 1, 2].map(|index| read_bytes(&report, index)), [tensor(dim), shared, shared]);
        assert_eq!(counters.tensor_multiply_adds, 2 * HEADS * LEN * LEN * dim);

        // A float of each row, when O is rescaled (here once, in the first block) and at the end: written by one lane, read
        // for each element of O.
        let (simdgroups, blocks) = (HEADS * LEN / ROWS, LEN / KEYS);
        let rescalings = (counters.simdgroup_barriers - simdgroups) / (2 * simdgroups);
        assert_eq!((counters.simdgroup_barriers, rescalings), (5 * simdgroups, 2));
        let floats = [4 * simdgroups * ROWS * dim, 4 * simdgroups * ROWS].map(|bytes| rescalings * bytes);
        // Q is written once and read for each block. So nothing is left for S and P.
        let query = [tensor(dim) * blocks, tensor(dim)];
        assert_eq!(threadgroup_bytes(counters), [query[0] + floats[0], query[1] + floats[1]]);

        // One barrier that orders no memory for each block and threadgroup.
        let of_groups = HEADS * (LEN / GROUP) * blocks;
        assert_eq!((counters.threadgroup_barriers, counters.threadgroup_hints), (0, of_groups));

        for kernel in [PeerKernel::V2, PeerKernel::V2r] {
            let peer = of_peer(kernel, dim);
            let [read, written] = threadgroup_bytes(counters);
            assert!(2 * read <= peer.threadgroup[0] && 2 * written <= peer.threadgroup[1]);
            assert!(6 * counters.simdgroup_barriers <= peer.barriers[0] + peer.barriers[1]);
        }
        assert!(counters.device_read_bytes <= of_peer(PeerKernel::V2r, dim).device);
    }
}

#[test]
fn the_staged_kernel_reads_keys_and_values_once_for_64_rows() {
    for dim in [64, 128] {
        let run = run(dim, (-1, -1));
        let report = count(&run, planned(&run, Tier::TensoropsStaged));
        let shared = tensor(dim) * LEN / GROUP;
        assert_eq!([1, 2].map(|index| read_bytes(&report, index)), [shared, shared]);
        let blocks = HEADS * (LEN / GROUP) * (LEN / KEYS);
        assert_eq!(report.counters.threadgroup_barriers, 2 * blocks);
        assert!(2 * report.counters.device_read_bytes <= of_peer(PeerKernel::V2, dim).device);
    }
}

#[test]
fn hidden_blocks_are_skipped_on_both_sides() {
    let blocks = |visible: &dyn Fn(u64) -> [u64; 2]| -> u64 {
        (0..LEN / ROWS).map(|i| visible(ROWS * i + ROWS - 1)[1].div_ceil(KEYS) - visible(ROWS * i)[0] / KEYS).sum()
    };
    let causal = blocks(&|row| [0, row + 1]);
    let banded = blocks(&|row| [row.saturating_sub(100), (row + 21).min(LEN)]);
    for (window, blocks) in [((-1, 0), causal), ((100, 20), banded)] {
        let run = run(64, window);
        let report = count(&run, planned(&run, Tier::Tensorops));
        assert_eq!(report.counters.tensor_operations, HEADS * blocks * 2, "{window:?}");
        assert_eq!([1, 2].map(|index| read_bytes(&report, index)), [HEADS * blocks * KEYS * 64 * 2; 2], "{window:?}");
    }
    let all = LEN / ROWS * LEN / KEYS;
    assert!(10 * causal < 6 * all && 10 * banded < 4 * all);
}
