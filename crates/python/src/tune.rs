//! What `python -m metal_flash_attn tune` asks: the tiles that could serve, what they cost on the simulator, the record.

use mtlflashattn_cache::{Cache, Fields, TunedTile, unix_seconds};
use mtlflashattn_core::plan::{Candidate, Gpu, TilePattern, TuningKey, device_cost};
use mtlflashattn_core::{self as core, Device, Dtype, Planner, Problem, Settings, Strides};
use mtlflashattn_metal::{
    Argument, CacheTensors, DecodeLaunch, DecodeTensors, Device as _, DeviceError, Grid, Kernel, Launch, LaunchError,
    MergeKernel, Outputs, Tensors,
};
use mtlflashattn_simulator::{Buffer, Counters, Launch as Dispatch, Layer, Options, Simulator};
use pyo3::prelude::*;

use crate::cli::{GpuAnswer, Question, kernel_named};
use crate::error::{Error, Result, guard};
use crate::metal::kernel_of;
use crate::{doctor, settings};

/// A tile that could serve.
#[derive(IntoPyObject)]
pub struct CandidateAnswer {
    /// In words.
    text: String,
    /// As `MTLFLASHATTN_TILE` takes it.
    pattern: String,
}

/// The tiles that could serve a call.
#[derive(IntoPyObject)]
pub struct CandidatesAnswer {
    device: &'static str,
    gpu: GpuAnswer,
    tier: &'static str,
    /// The name of the record.
    key: String,
    /// The planner's own choice comes first.
    candidates: Vec<CandidateAnswer>,
}

fn unsupported(argument: &'static str, got: String, instead: &str) -> Error {
    core::Error::Unsupported { argument, got, instead: instead.into() }.into()
}

fn pattern(text: Option<&str>) -> Result<Option<TilePattern>> {
    let variable = "fields of a tile, as MTLFLASHATTN_TILE takes them (docs/settings.md)";
    let wrong =
        |text: &str| core::Error::Value { argument: "--tile", got: format!("{text:?}"), allowed: variable.into() };
    Ok(text.map(|text| TilePattern::parse(text).ok_or_else(|| wrong(text))).transpose()?)
}

/// The tiles of a tier for a call on the device of this machine: the planner's own choice, and those with the fields `tile`.
/// The tier is that of the question, or the one that would serve.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "arguments of Python functions are owned")]
pub fn _tile_candidates(py: Python<'_>, question: Question, tile: Option<String>) -> PyResult<CandidatesAnswer> {
    guard(|| {
        let resolved = settings::current(py)?;
        let Some(device) = doctor::metal_device(py, &resolved)? else {
            let instead = "tune on a Mac with Apple silicon, or pass --device simulator to rank tiles by counters";
            return Err(unsupported("--device", "tuning without a GPU that takes Metal kernels".into(), instead));
        };
        let problem = question.problem()?;
        let gpu = device.gpu(py)?;
        let mut settings = Settings { tile: None, ..resolved.values.clone() };
        let tier = match question.tier() {
            Some(name) => {
                let (kernel, tier) = kernel_named(name)?;
                settings.kernel = kernel;
                tier
            }
            None => Planner::new(Device::Metal(gpu), &settings).plan(&problem)?.tier,
        };
        let planner = Planner::new(Device::Metal(gpu), &settings);
        let refused =
            |reason: core::plan::Reason| unsupported("--tier", format!("tuning {tier}: {reason}"), "choose another");
        let tiles = planner.candidates(&problem, tier).map_err(refused)?;
        let wanted = pattern(tile.as_deref())?;
        // The default is what the others are compared with.
        let is_wanted =
            |tile: &&Candidate| wanted.as_ref().is_none_or(|wanted| wanted.matches(tile)) || **tile == tiles[0];
        let answer =
            |tile: &Candidate| CandidateAnswer { text: tile.to_string(), pattern: TilePattern::of(tile).to_string() };
        Ok(CandidatesAnswer {
            device: device.name(),
            gpu: GpuAnswer::new(&gpu),
            tier: tier.name(),
            key: TuningKey::of(tier, &problem).to_string(),
            candidates: tiles.iter().filter(is_wanted).map(answer).collect(),
        })
    })
}

/// What a call asks of the simulator's GPU.
#[derive(IntoPyObject)]
pub struct CountAnswer {
    /// Bytes, those from and to device memory weighed as the planner weighs them.
    cost: u64,
    device_bytes: u64,
    threadgroup_bytes: u64,
    products: u64,
    barriers: u64,
}

impl CountAnswer {
    /// Of all kernels of a call.
    fn sum(kernels: &[Counters]) -> Self {
        let sum = |of: fn(&Counters) -> u64| kernels.iter().map(of).sum::<u64>();
        let device_bytes = sum(|counters| counters.device_read_bytes + counters.device_written_bytes);
        let threadgroup_bytes = sum(|counters| counters.threadgroup_read_bytes + counters.threadgroup_written_bytes);
        Self {
            cost: device_cost(&Gpu::SIMULATED) as u64 * device_bytes + threadgroup_bytes,
            device_bytes,
            threadgroup_bytes,
            products: sum(|counters| counters.matrix_multiplies),
            barriers: sum(|counters| counters.simdgroup_barriers + counters.threadgroup_barriers),
        }
    }
}

/// Runs a call with the tile `tile` on the simulator, and counts. The sizes are those of the question.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "arguments of Python functions are owned")]
pub fn _count_tile(py: Python<'_>, question: Question, tile: String) -> PyResult<CountAnswer> {
    guard(|| {
        let problem = question.problem()?;
        let (kernel, tier) = kernel_named(question.tier().unwrap_or("simdgroup"))?;
        let settings = Settings { kernel, tile: pattern(Some(&tile))?, ..settings::current(py)?.values.clone() };
        let planner = Planner::new(Device::Metal(Gpu::SIMULATED), &settings);
        let refused = |reason: core::plan::Reason| unsupported("--tile", reason.to_string(), "choose another");
        let plan = planner.serve(&problem, tier).map_err(refused)?;
        let kernel = kernel_of(&plan, &problem, false);
        let kernel = kernel.ok_or_else(|| unsupported("--tier", format!("tuning {tier}"), "choose another"))?;
        let counters = py.detach(|| count(&problem, &kernel, plan.splits));
        let failed = |error: DeviceError| unsupported("--tile", format!("{tile}: {error}"), "choose another");
        Ok(CountAnswer::sum(&counters.map_err(failed)?))
    })
}

/// What each kernel of a call did: one, but for a decode kernel whose `splits` are merged.
fn count(problem: &Problem, kernel: &Kernel, splits: usize) -> std::result::Result<Vec<Counters>, DeviceError> {
    let simulator = Simulator::new(Options::new(Layer::Check));
    let (queries, keys) = (problem.lengths.max_query_len(), problem.lengths.max_key_len());
    let batch = problem.lengths.batch();
    let [q, k, v] = [
        batch * queries * problem.query_heads * problem.head_dim,
        batch * keys * problem.key_heads * problem.head_dim,
        batch * keys * problem.key_heads * problem.value_dim,
    ]
    .map(|count| values(problem.dtype, count));
    let (q, k, v) = (q?, k?, v?);
    let out = batch * queries * problem.query_heads * problem.value_dim;
    let out = Buffer::poisoned(out * problem.dtype.size())?;
    let row = (problem.query_heads * problem.value_dim) as i64;
    let strides = Strides { batch: queries as i64 * row, row, head: problem.value_dim as i64 };
    let outputs = Outputs { out: strides, lse: None };
    let tensors = Tensors {
        q: &q,
        k: &k,
        v: &v,
        out: &out,
        lse: None,
        offsets: None,
        alibi_slopes: None,
        bias: None,
        sinks: None,
    };
    let run = |source: &str, entry: &str, arguments: &[Argument<'_, Buffer>], grid: Grid| {
        let pipeline = simulator.pipeline(source, entry)?;
        Ok(simulator.run(&pipeline, arguments, &Dispatch::from(grid))?.counters)
    };
    let too_large = |error: LaunchError| DeviceError::Memory(error.to_string());
    if kernel.tier != core::Tier::Decode {
        let launch = Launch::new(problem, kernel, &outputs).map_err(too_large)?;
        return Ok(vec![run(&kernel.source(), kernel.entry(), &launch.arguments(&tensors), launch.grid)?]);
    }
    let launch = DecodeLaunch::new(problem, kernel, &outputs, splits).map_err(too_large)?;
    let partials = Buffer::poisoned(launch.partial_floats * size_of::<f32>())?;
    let tensors =
        DecodeTensors { forward: tensors, partials: launch.merge.map(|_| &partials), cache: CacheTensors::NONE };
    let arguments = launch.arguments(&tensors);
    let mut counters = vec![run(&kernel.source(), kernel.entry(), &arguments, launch.grid)?];
    if let Some(grid) = launch.merge {
        let merge = MergeKernel::of(kernel);
        counters.push(run(&merge.source(), merge.entry(), &arguments, grid)?);
    }
    Ok(counters)
}

/// Values of -1, -1/2, 1/4 and 1 in no apparent order (a linear congruential generator; Knuth, The Art of Computer
/// Programming, volume 2, section 3.3.4, line 26).
fn values(dtype: Dtype, count: usize) -> std::result::Result<Buffer, DeviceError> {
    let mut state = 1u64;
    let mut pick = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 62) as usize
    };
    let mut of_16_bits = |bits: [u16; 4]| Buffer::from_slice(&(0..count).map(|_| bits[pick()]).collect::<Vec<_>>());
    match dtype {
        Dtype::F16 => of_16_bits([0xBC00, 0xB800, 0x3400, 0x3C00]),
        Dtype::Bf16 => of_16_bits([0xBF80, 0xBF00, 0x3E80, 0x3F80]),
        Dtype::F32 => {
            let values: Vec<f32> = (0..count).map(|_| [-1.0, -0.5, 0.25, 1.0][pick()]).collect();
            Buffer::from_slice(&values)
        }
    }
}

/// What was measured for one kind of call.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Winner {
    key: String,
    pattern: String,
    cost: u64,
    default_cost: u64,
    unit: String,
}

/// Puts winners into the record of this machine, in the place of all others if `replace`, and returns its file.
#[pyfunction]
pub fn _store_tiles(py: Python<'_>, winners: Vec<Winner>, replace: bool) -> PyResult<String> {
    guard(|| {
        let resolved = settings::current(py)?;
        let device = doctor::metal_device(py, &resolved)?;
        let known = device.map(|device| device.known(py, &resolved.values)).transpose()?;
        let file = known.and_then(|known| Some((known.path?, known.machine)));
        let instead = "set MTLFLASHATTN_CACHE to a folder that can be written";
        let Some((path, machine)) = file else {
            return Err(unsupported("MTLFLASHATTN_CACHE", "a user without a folder for caches".into(), instead));
        };
        let mut tiles = Vec::new();
        for Winner { key, pattern: text, cost, default_cost, unit } in winners {
            let Some(pattern) = pattern(Some(&text))? else { continue };
            let tile: Fields = pattern.fields().map(|(name, value)| (name.to_owned(), value.into())).collect();
            tiles.push((key, TunedTile { tile, cost, default_cost, unit, tuned_at: unix_seconds() }));
        }
        let cache = Cache::new(path.parent().unwrap_or(&path), machine);
        // Writing may wait for a disk or for another process.
        let written = py.detach(|| {
            cache.update(|record| {
                if replace {
                    record.tiles.clear();
                }
                record.tiles.extend(tiles);
            })
        });
        written.map_err(|error| unsupported("MTLFLASHATTN_CACHE", error.to_string(), instead))?;
        settings::forget();
        Ok(path.display().to_string())
    })
}

/// The fields of a record as the text of a [`TilePattern`].
pub fn text_of(tile: &Fields) -> String {
    let value = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let pairs: Vec<String> = tile.iter().map(|(name, field)| format!("{name}={}", value(field))).collect();
    pairs.join(",")
}
