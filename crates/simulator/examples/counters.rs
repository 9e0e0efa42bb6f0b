//! Prints what each kernel asks of the memory and the matrix units, beside the kernels of the older package, and what the
//! decode kernel and the kernel that merges its splits ask for 1, 4, 8 and 32 queries.
//!
//! `make counters`, or with `--decode` that table alone. With `PEER`, the path of the older package's `_kernel.py`, its `matmul2d` kernels run, too; v1 is
//! counted from its structure. Products are 8x8x8, those of `matmul2d` in this unit. Counts are exact and reproducible. Registers and
//! occupancy are predictions of a model of M1-class GPUs (`mtlflashattn_core::plan::occupancy`); nothing here is a time.
#![allow(clippy::print_stdout, reason = "prints a table")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::bench::Bench;
use common::peer::{self, PeerKernel, PeerShape};
use common::{Case, Run, decode};
use mtlflashattn_core::plan::occupancy::{KernelShape, Occupancy};
use mtlflashattn_core::plan::{Chip, Gpu, Matmul, QueryHome, Version};
use mtlflashattn_core::{Device, Dtype, MetalTile, Planner, Problem, Settings, Tier};
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::{Counters, Layer, Options, Registers, Simulator};

/// Counts of one launch, in the units of the table.
struct Counts {
    device_read: f64,
    threadgroup_read: f64,
    threadgroup_written: f64,
    products: u64,
    simdgroup_barriers: u64,
    threadgroup_barriers: u64,
}

impl Counts {
    fn of(counters: &Counters) -> Self {
        Self {
            device_read: counters.device_read_bytes as f64,
            threadgroup_read: counters.threadgroup_read_bytes as f64,
            threadgroup_written: counters.threadgroup_written_bytes as f64,
            products: counters.products(),
            simdgroup_barriers: counters.simdgroup_barriers,
            threadgroup_barriers: counters.threadgroup_barriers,
        }
    }

    /// The v1 kernel of mtlflashattn 0.2 (float16, one simdgroup for 8 queries, 32 keys a block), counted from its
    /// structure; for B1 H4 L512 D64 that gives the published counters to the byte.
    fn of_v1(shape: &Shape) -> Self {
        let row_blocks = shape.len.div_ceil(8);
        let simdgroups = (shape.heads * row_blocks) as f64;
        let key_blocks = |row: usize| {
            let seen = if shape.causal { (row * 8 + 8).min(shape.len) } else { shape.len };
            seen.div_ceil(32)
        };
        let blocks = (shape.heads * (0..row_blocks).map(key_blocks).sum::<usize>()) as f64;
        let dim = shape.dim as f64;
        // Each block: K and V from device memory; S, P and P V through threadgroup memory, and Q from it once for each
        // fragment of 8 keys.
        let query = 8.0 * dim * 2.0;
        let sizes = simdgroups * 32.0 * 52.0;
        Self {
            device_read: blocks * 2.0 * 32.0 * dim * 2.0 + simdgroups * query + sizes,
            threadgroup_read: blocks * (2.0 * 512.0 + 4.0 * query + query),
            threadgroup_written: blocks * (2.0 * 512.0 + query) + simdgroups * query,
            products: (blocks * 2.0 * 4.0 * dim / 8.0) as u64,
            simdgroup_barriers: (blocks * 4.0 + simdgroups) as u64,
            threadgroup_barriers: 0,
        }
    }
}

struct Shape {
    heads: usize,
    len: usize,
    dim: usize,
    causal: bool,
    dtype: Dtype,
}

const SHAPES: [Shape; 5] = [
    Shape { heads: 4, len: 512, dim: 64, causal: false, dtype: Dtype::F16 },
    Shape { heads: 4, len: 512, dim: 64, causal: true, dtype: Dtype::F16 },
    Shape { heads: 4, len: 512, dim: 128, causal: false, dtype: Dtype::F16 },
    Shape { heads: 2, len: 512, dim: 128, causal: true, dtype: Dtype::Bf16 },
    Shape { heads: 1, len: 256, dim: 256, causal: false, dtype: Dtype::F16 },
];

fn print(name: &str, shape: &Shape, counts: &Counts, prediction: &str) {
    let scores = (shape.heads * shape.len * shape.len) as f64 * if shape.causal { 0.5 } else { 1.0 };
    let flops = 4.0 * scores * shape.dim as f64;
    let mega = |bytes: f64| bytes / 1e6;
    println!(
        "  {name:<46} {:>8.2} {:>8.2} {:>8.2} {:>9} {:>8} {:>8} {:>8.1}  {prediction}",
        mega(counts.device_read),
        mega(counts.threadgroup_read),
        mega(counts.threadgroup_written),
        counts.products,
        counts.simdgroup_barriers,
        counts.threadgroup_barriers,
        flops / counts.device_read,
    );
}

/// The scalar kernel, both forms of the simdgroup kernel with 16 rows, and what the planner takes for two GPUs.
fn kernels(run: &Run) -> Vec<Kernel> {
    let problem = &run.problem;
    let shape = KernelShape::of(problem, false);
    let direct = MetalTile {
        simdgroups: 4,
        row_fragments: 2,
        keys: 32,
        staged: false,
        value_chunk: problem.value_dim,
        query: QueryHome::Registers,
    };
    let fits = |tile: &MetalTile| tile.occupancy(&shape).is_ok();
    let fixed = [direct, MetalTile { staged: true, ..direct }].into_iter().filter(fits);
    let planned = ["m1", "m4-max"].into_iter().filter_map(|chip| {
        let chip = Chip::from_name(chip);
        let gpu = Gpu { chip, cores: chip.most_cores(), ..Gpu::SIMULATED };
        let settings = Settings::DEFAULT;
        let planner = Planner::new(Device::Metal(gpu), &settings);
        planner.serve(problem, Tier::Simdgroup).ok()?.metal
    });
    let mut tiles: Vec<MetalTile> = Vec::new();
    for tile in fixed.chain(planned) {
        if !tiles.contains(&tile) {
            tiles.push(tile);
        }
    }
    let simdgroup = tiles.into_iter().map(|tile| Kernel::simdgroup(problem, tile, true));
    std::iter::once(Kernel::scalar(problem, true)).chain(simdgroup).chain(tensorops(problem)).collect()
}

/// What the planner takes for an M5 in the two tiers that use `matmul2d`.
fn tensorops(problem: &Problem) -> impl Iterator<Item = Kernel> {
    let chip = Chip::from_name("m5-max");
    let gpu = Gpu { chip, cores: chip.most_cores(), macos: Version::new(26, 2), ..Gpu::SIMULATED };
    [Tier::Tensorops, Tier::TensoropsStaged].into_iter().filter_map(move |tier| {
        let plan = Planner::new(Device::Metal(gpu), &Settings::DEFAULT).serve(problem, tier);
        let plan = plan.unwrap_or_else(|reason| panic!("{tier}: {reason}"));
        Some(Kernel::tensorops(problem, plan.metal?, plan.matmul?, true))
    })
}

/// What the values that live at once need on an M1, where no tile says more.
fn registers(counters: &Counters) -> String {
    let Registers { halves, threads, .. } = counters.registers();
    format!("{halves} halves, {threads}")
}

fn describe(kernel: &Kernel, run: &Run, counters: &Counters) -> (String, String) {
    if kernel.tier == Tier::Scalar {
        return ("scalar".into(), String::new());
    }
    let tile = kernel.tile;
    if let Some(matmul) = kernel.matmul {
        let (rows, Matmul { head_step, value_step, .. }) = (tile.simdgroup_rows(), matmul);
        let name =
            format!("{} {}x{rows} rows {} keys, {head_step}/{value_step}", kernel.tier, tile.simdgroups, tile.keys);
        return (name, registers(counters));
    }
    let form = if tile.staged { "staged" } else { "direct" };
    let (rows, keys, chunk, query) = (tile.simdgroup_rows(), tile.keys, tile.value_chunk, tile.query.name());
    let name = format!("{form} {}x{rows} rows {keys} keys {chunk} columns q:{query}", tile.simdgroups);
    let Occupancy { halves, threads, .. } = Occupancy::predict(&tile, &KernelShape::of(&run.problem, false));
    (name, format!("{halves} halves, {threads}"))
}

/// The `matmul2d` kernels of the older package, on any numbers: what they do depends on sizes alone.
fn print_peer(python: &str, shape: &Shape, simulator: &Simulator) {
    let Shape { heads, len, dim, causal, dtype } = *shape;
    let numbers: Vec<u8> = (0..heads * len * dim).flat_map(|i| [(i % 200) as u8, 0x34]).collect();
    let peer_shape = PeerShape { heads, key_heads: heads, query_len: len, key_len: len, dim, causal };
    for (kernel, name) in [(PeerKernel::V2, "v2"), (PeerKernel::V2r, "v2r")] {
        let source = kernel.source(python, dim, dtype);
        let report = match kernel.run(simulator, &source, &peer_shape, 2, [&numbers; 3]) {
            Ok((_, report)) => report,
            Err(error) => panic!("{name}: {error}"),
        };
        let name = format!("{name} of mtlflashattn 0.2");
        print(&name, shape, &Counts::of(&report.counters), &registers(&report.counters));
    }
}

/// Key heads of the table of the decode kernel, and query heads of each.
const KEY_HEADS: usize = 2;
const GROUP: usize = 4;
/// Cores of the table: to those of an M1 as its key heads are to eight.
const CORES: usize = 2;

/// What a call of few queries asks for, with the planner's tiles and splits, for each key head and in KB.
fn print_decode(bench: &Bench) {
    println!("B1 H{}/{KEY_HEADS} float16, few queries; KB and counts for each key head", KEY_HEADS * GROUP);
    println!(
        "  {:<46} {:>6} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8} {:>8}",
        "queries, keys, tile",
        "splits",
        "read",
        "written",
        "of least",
        "products",
        "tg bars",
        "tg rd",
        "merge rd",
        "merge wr"
    );
    for dim in [64, 128] {
        for queries in [1, 4, 8, 32] {
            let keys = if queries == 32 { 2048 } else { 4096 };
            print_decode_line(bench, dim, queries, keys);
        }
    }
}

fn print_decode_line(bench: &Bench, dim: usize, queries: usize, keys: usize) {
    let run = Run::new(&Case {
        dtype: Dtype::F16,
        lengths: vec![(queries, keys)],
        key_heads: KEY_HEADS,
        group: GROUP,
        head_dim: dim,
        value_dim: dim,
        lse: false,
        ..Case::default()
    });
    let device = Device::Metal(Gpu { cores: CORES, ..Gpu::SIMULATED });
    let plan = Planner::new(device, &Settings::DEFAULT).serve(&run.problem, Tier::Decode);
    let plan = plan.unwrap_or_else(|reason| panic!("{reason}"));
    let tile = plan.metal.expect("a tile");
    let kernel = Kernel::decode(&run.problem, tile, false).aligned(&run.problem, [0; 3]);
    let launched = decode::launch(bench, &kernel, &decode::Texts::of(&kernel), &run, plan.splits);
    let (_, reports) = launched.unwrap_or_else(|error| panic!("{error}"));
    let (decode, merge) = (&reports.decode.counters, &reports.merge.counters);
    // K and V once, Q and O once.
    let least = KEY_HEADS * (2 * keys + 2 * queries * GROUP) * dim * 2;
    let out = (KEY_HEADS * queries * GROUP * dim * 2) as u64;
    let asked = (decode.device_read_bytes + out) as f64 / least as f64;
    let each = |count: u64| count as f64 / KEY_HEADS as f64;
    let kilo = |bytes: u64| each(bytes) / 1e3;
    let form = if tile.staged { "staged" } else { "direct" };
    let name = format!(
        "{queries}, {keys}, D{dim} {form} {}x{} rows {} keys",
        tile.simdgroups,
        tile.simdgroup_rows(),
        tile.keys
    );
    println!(
        "  {name:<46} {:>6} {:>8.1} {:>8.1} {asked:>8.3} {:>9} {:>8} {:>8.1} {:>8.1} {:>8.1}",
        plan.splits,
        kilo(decode.device_read_bytes),
        kilo(decode.device_written_bytes),
        each(decode.products()),
        each(decode.threadgroup_barriers),
        kilo(decode.threadgroup_read_bytes),
        kilo(merge.device_read_bytes),
        kilo(merge.device_written_bytes),
    );
}

fn main() {
    let python = peer::read();
    let bench = Bench::new(Options::new(Layer::Check));
    print_decode(&bench);
    if std::env::args().any(|argument| argument == "--decode") {
        return;
    }
    for shape in &SHAPES {
        let Shape { heads, len, dim, causal, dtype } = *shape;
        let window = (-1, if causal { 0 } else { -1 });
        let run = Run::new(&Case {
            dtype,
            lengths: vec![(len, len)],
            key_heads: heads,
            head_dim: dim,
            value_dim: dim,
            window,
            ..Case::default()
        });
        println!("B1 H{heads} L{len} D{dim} {dtype}{}", if causal { " causal" } else { "" });
        println!(
            "  {:<46} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8}  registers, threads a core (predicted)",
            "kernel", "read MB", "tg rd MB", "tg wr MB", "products", "sg bars", "tg bars", "FLOP/B"
        );
        if dtype == Dtype::F16 && dim <= 128 {
            print("v1 of mtlflashattn 0.2", shape, &Counts::of_v1(shape), "");
            if let Some(python) = &python {
                print_peer(python, shape, bench.simulator());
            }
        }
        for kernel in kernels(&run) {
            let counters = match bench.count(&kernel, &run) {
                Ok(report) => report.counters,
                Err(error) => panic!("{error}"),
            };
            let (name, prediction) = describe(&kernel, &run, &counters);
            print(&name, shape, &Counts::of(&counters), &prediction);
        }
    }
}
