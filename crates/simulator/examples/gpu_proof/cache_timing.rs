//! Speed of the decode kernel: bytes of unique keys and values in a second, beside what the same GPU reads and copies.

use std::fmt;

use mtlflashattn_core::Dtype;
use mtlflashattn_core::plan::{MetalTile, QueryHome, decode};
use mtlflashattn_metal::{Argument, DecodeTensors, DeviceError, Grid, Tensors};
use mtlflashattn_simulator::nvidia::{Gpu, Launch, Memory, Program};

use crate::Wanted;
use crate::caches::{Case, Form, Plan, case};
use crate::programs::{self, Programs};
use crate::random::{Normals, Random};

/// Calls that count, and calls before them.
const ROUNDS: usize = 15;
const WARM_UP: usize = 3;
/// Written before each call, so that no key is in the GPU's caches: several times as large as these.
const FLUSHED_BYTES: usize = 512 << 20;
/// What tensors repeat: more than the GPU's caches hold.
const REPEATED_BYTES: usize = 128 << 20;
/// Bytes that are read and copied for comparison.
const COMPARED_BYTES: usize = 4 << 30;
/// Cores that keys are split for: an M1, the largest Apple GPU, and twice this GPU's own.
const CORES: [usize; 3] = [8, 80, 264];

/// Two kernels that only read, or read and write, 16 bytes a thread at a time.
const STREAM: &str = "#include <metal_stdlib>
using namespace metal;

kernel void stream_read(
    device const uint4* from [[buffer(0)]],
    device uint* to [[buffer(1)]],
    constant long* count [[buffer(2)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
    const long thread_index = long(threadgroup_position.x) * 256 + long(simdgroup_index * 32 + lane_index);
    uint seen = 0;
#pragma clang loop unroll_count(8)
    for (long i = thread_index; i < count[0]; i += count[1]) {
        const uint4 four = from[i];
        seen |= four.x & four.y & four.z & four.w;
    }
    // Never true of what is read, which nobody else knows.
    if (seen == 1u) {
        to[thread_index] = seen;
    }
}

kernel void stream_copy(
    device const uint4* from [[buffer(0)]],
    device uint4* to [[buffer(1)]],
    constant long* count [[buffer(2)]],
    uint3 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]])
{
    const long thread_index = long(threadgroup_position.x) * 256 + long(simdgroup_index * 32 + lane_index);
#pragma clang loop unroll_count(8)
    for (long i = thread_index; i < count[0]; i += count[1]) {
        to[i] = from[i];
    }
}
";

/// A call that is timed.
#[derive(Clone)]
struct Shape {
    case: Case,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { dtype, queries, keys, key_heads, head_dim, form, .. } = &self.case;
        let heads = self.case.query_heads();
        write!(f, "B{} Q{queries} K{} H{heads}/{key_heads} D{head_dim} {dtype} {form:?}", keys.len(), keys[0])
    }
}

impl Shape {
    fn all() -> Vec<Self> {
        let shape = |dtype, batch, queries, keys, form| Self { case: case(dtype, queries, &vec![keys; batch], form) };
        let mut shapes = Vec::new();
        for batch in [1, 16] {
            for keys in [4096, 16_384, 65_536] {
                shapes.push(shape(Dtype::F16, batch, 1, keys, Form::Slots));
                shapes.push(shape(Dtype::F16, batch, 1, keys, Form::Pages(256)));
            }
        }
        for queries in [4, 8, 32] {
            shapes.push(shape(Dtype::F16, 16, queries, 16_384, Form::Slots));
        }
        for dtype in [Dtype::Bf16, Dtype::F32] {
            shapes.push(shape(dtype, 16, 1, 16_384, Form::Slots));
        }
        shapes
    }

    /// Bytes of the keys and values that the call attends to, each once.
    fn unique_bytes(&self) -> usize {
        let Case { keys, key_heads, head_dim, dtype, .. } = &self.case;
        2 * keys.iter().sum::<usize>() * key_heads * head_dim * dtype.size()
    }

    /// The planner's tiles, and tiles that may suit this GPU better, each with splits for several GPUs.
    fn plans(&self) -> Vec<Plan> {
        let mut tiles: Vec<MetalTile> = ["M1", "M3"].map(|chip| Case { chip, ..self.case.clone() }.plan().tile).into();
        let fragments = (self.case.queries * self.case.group).div_ceil(8);
        let tile = |simdgroups, row_fragments, keys, staged| MetalTile {
            simdgroups,
            row_fragments,
            keys,
            staged,
            value_chunk: self.case.head_dim,
            query: QueryHome::Registers,
        };
        match fragments {
            1 | 2 => tiles.extend([(4, 16), (8, 16), (4, 32), (8, 8)].map(|(n, keys)| tile(n, fragments, keys, false))),
            _ => tiles.extend([16, 32].map(|keys| tile(fragments / 2, 2, keys, true))),
        }
        let problem = self.case.problem();
        let mut plans: Vec<Plan> = Vec::new();
        for tile in tiles {
            for cores in CORES {
                let plan = Plan { problem, tile, splits: decode::splits(&problem, &tile, cores) };
                let is_new = plans.iter().all(|other| (other.tile, other.splits) != (plan.tile, plan.splits));
                if is_new && plan.kernel().fits() {
                    plans.push(plan);
                }
            }
        }
        plans
    }
}

/// The tensors of a shape.
struct Data {
    q: Memory,
    k: Memory,
    v: Memory,
    out: Memory,
    lse: Memory,
    partials: Memory,
    cache: mtlflashattn_metal::CacheTensors<Memory>,
}

impl Data {
    fn new(gpu: &Gpu, shape: &Shape, plans: &[Plan]) -> Result<Self, DeviceError> {
        let Case { dtype, queries, keys, head_dim, .. } = &shape.case;
        let mut random = Random(1);
        let rows = keys.len() * queries * shape.case.query_heads();
        let q = Normals::new(*dtype, rows * head_dim, &mut random);
        let repeated = Normals::new(*dtype, REPEATED_BYTES / dtype.size(), &mut random);
        let cache_bytes = shape.case.cache_elements() * dtype.size();
        let partials = plans.iter().map(|plan| plan.launch().partial_floats).max().unwrap_or(0);
        Ok(Self {
            q: gpu.upload(&q.bytes)?,
            k: gpu.repeated(&repeated.bytes, cache_bytes)?,
            v: gpu.repeated(&repeated.bytes, cache_bytes)?,
            out: gpu.poisoned(q.bytes.len())?,
            lse: gpu.poisoned(4 * rows)?,
            partials: gpu.poisoned(4 * partials)?,
            cache: shape.case.buffers().upload(gpu)?,
        })
    }

    fn tensors(&self, plan: &Plan) -> DecodeTensors<&Memory> {
        let Self { q, k, v, out, lse, partials, cache } = self;
        let lse = Some(lse);
        DecodeTensors {
            forward: Tensors { q, k, v, out, lse, offsets: None, alibi_slopes: None, bias: None, sinks: None },
            partials: (plan.splits > 1).then_some(partials),
            cache: cache.map(|memory| memory),
        }
    }
}

/// Times the kernels of each shape and prints tables; without a GPU they are only translated.
pub fn compare(programs: &Programs, wanted: &Wanted) -> Result<(), String> {
    let text = |error: DeviceError| error.to_string();
    let stream = |entry| programs::Kernel { source: STREAM.to_owned(), entry };
    let streams = programs.load(&[stream("stream_read"), stream("stream_copy")])?;
    let mut read = 0.0;
    if let (Some(gpu), Some(streams)) = (programs.gpu, &streams) {
        let speed = bandwidth(gpu, streams).map_err(text)?;
        println!("\n{}: reads {:.0} GB/s, copies {:.0} GB/s (bytes read and written)", gpu.name(), speed[0], speed[1]);
        read = speed[0];
    }
    let mut summary = Vec::new();
    for shape in Shape::all().into_iter().filter(|shape| wanted.includes(&shape.to_string())) {
        let plans = shape.plans();
        let texts: Vec<programs::Kernel> = plans.iter().flat_map(Plan::programs).collect();
        let (Some(loaded), Some(gpu)) = (programs.load(&texts)?, programs.gpu) else { continue };
        let times = measure(gpu, &shape, &plans, &loaded).map_err(text)?;
        println!("\n{shape}; medians of {ROUNDS} interleaved calls, no key cached\n");
        println!("| tile | splits | ms | GB/s of unique K and V | of reading |\n| --- | --- | --- | --- | --- |");
        let speed = |time: f64| shape.unique_bytes() as f64 / time / 1e6;
        for (Plan { tile, splits, .. }, &time) in plans.iter().zip(&times) {
            println!("| {tile} | {splits} | {time:.4} | {:.0} | {:.2} |", speed(time), speed(time) / read);
        }
        let best = times.iter().copied().fold(f64::INFINITY, f64::min);
        // The planner's tile for an M1, with splits for the largest Apple GPU.
        let planned = plans[0].tile;
        let splits = decode::splits(&shape.case.problem(), &planned, CORES[1]);
        let planned = plans.iter().zip(&times).find(|(plan, _)| (plan.tile, plan.splits) == (planned, splits));
        summary.push((shape.to_string(), planned.map(|(_, &time)| speed(time)), speed(best)));
    }
    if !summary.is_empty() {
        println!(
            "\n| call | GB/s, the planner's tile, splits for {} cores | of reading | best here | of reading |",
            CORES[1]
        );
        println!("| --- | --- | --- | --- | --- |");
        for (shape, planned, best) in summary {
            let planned = planned.unwrap_or(f64::NAN);
            println!("| {shape} | {planned:.0} | {:.2} | {best:.0} | {:.2} |", planned / read, best / read);
        }
    }
    Ok(())
}

/// GB/s of reading, and of copying with both sides counted.
fn bandwidth(gpu: &Gpu, programs: &[Program]) -> Result<[f64; 2], DeviceError> {
    const THREADGROUPS: u32 = 132 * 16;
    let normals = Normals::new(Dtype::F32, REPEATED_BYTES / 4, &mut Random(3));
    let (from, to) = (gpu.repeated(&normals.bytes, COMPARED_BYTES)?, gpu.poisoned(COMPARED_BYTES)?);
    let count = [(COMPARED_BYTES / 16) as i64, i64::from(THREADGROUPS) * 256];
    let arguments = [Argument::Buffer(&from), Argument::Buffer(&to), Argument::Ints(&count)];
    let grid = Grid { threadgroups: [THREADGROUPS, 1, 1], group: [32, 8, 1] };
    let mut speeds = [0.0; 2];
    for ((speed, program), bytes) in speeds.iter_mut().zip(programs).zip([COMPARED_BYTES, 2 * COMPARED_BYTES]) {
        let launch = gpu.prepare(program, &arguments, grid)?;
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            times.push(f64::from(gpu.time(|| launch.enqueue())?));
        }
        *speed = bytes as f64 / median(times) / 1e6;
    }
    Ok(speeds)
}

fn measure(gpu: &Gpu, shape: &Shape, plans: &[Plan], loaded: &[Program]) -> Result<Vec<f64>, DeviceError> {
    let data = Data::new(gpu, shape, plans)?;
    let flushed = gpu.poisoned(FLUSHED_BYTES)?;
    let mut loaded = loaded.iter();
    let mut calls: Vec<Vec<Launch<'_>>> = Vec::new();
    for plan in plans {
        let programs: Vec<&Program> = loaded.by_ref().take(plan.programs().len()).collect();
        calls.push(plan.prepare(gpu, &programs, &data.tensors(plan))?);
    }
    let mut times = vec![Vec::new(); calls.len()];
    for round in 0..WARM_UP + ROUNDS {
        for (call, times) in calls.iter().zip(&mut times) {
            flushed.poison()?;
            let milliseconds = gpu.time(|| call.iter().try_for_each(Launch::enqueue))?;
            if round >= WARM_UP {
                times.push(f64::from(milliseconds));
            }
        }
    }
    Ok(times.into_iter().map(median).collect())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
