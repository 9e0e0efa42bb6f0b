//! What `python -m metal_flash_attn` shows: plans and kernel texts for machines that need not be this one.

use mtlflashattn_core::plan::occupancy::{CLASSES, MOST_HALVES, THREADGROUP_MEMORY};
use mtlflashattn_core::plan::{
    Candidate, Chip, Explanation, Gpu, TileChoice, TileSource, Traffic, TunedTiles, Version, explain,
};
use mtlflashattn_core::{
    self as core, BiasKind, Device, Dtype, Lengths, MetalTile, Options, Planner, Problem, Settings, Strides,
    TensorMeta, Tier, settings,
};
use mtlflashattn_metal::{DecodeLaunch, Kernel, Launch, LseStrides, Outputs};
use pyo3::prelude::*;

use crate::error::{Result, guard};
use crate::metal::kernel_of;
use crate::{doctor, settings as process};

/// The options of the command line, by their names there.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
#[allow(clippy::struct_excessive_bools, reason = "options are given or not")]
pub struct Question {
    gpu: Option<String>,
    cores: Option<i64>,
    macos: Option<String>,
    torch: Option<String>,
    dtype: String,
    q: Option<String>,
    k: Option<String>,
    v: Option<String>,
    sequences: Option<i64>,
    head_dim: Option<i64>,
    value_dim: Option<i64>,
    causal: bool,
    window: Option<String>,
    softcap: f64,
    alibi: bool,
    bias: Option<String>,
    sinks: bool,
    lse: bool,
    tier: Option<String>,
}

const SHAPES: &str = "BATCHxLENGTHxHEADSxHEAD_DIM, or TOTALxHEADSxHEAD_DIM for packed sequences, such as 1x8192x16x64";

fn value_error(argument: &'static str, got: impl Into<String>, allowed: impl Into<String>) -> core::Error {
    core::Error::Value { argument, got: got.into(), allowed: allowed.into() }
}

fn shape(argument: &'static str, text: &str) -> core::Result<Vec<i64>> {
    let sizes: Option<Vec<i64>> = text.split(['x', 'X']).map(|size| size.trim().parse().ok()).collect();
    let sizes = sizes.filter(|sizes| (3..=4).contains(&sizes.len()) && sizes.iter().all(|&size| size >= 0));
    sizes.ok_or_else(|| value_error(argument, format!("{text:?}"), SHAPES))
}

fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1i64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis].max(1));
    }
    strides
}

fn dtype(text: &str) -> core::Result<Dtype> {
    match text.to_ascii_lowercase().as_str() {
        "f16" | "fp16" | "half" | "float16" => Ok(Dtype::F16),
        "bf16" | "bfloat16" => Ok(Dtype::Bf16),
        "f32" | "fp32" | "float" | "float32" => Ok(Dtype::F32),
        _ => Err(value_error("--dtype", format!("{text:?}"), "f16, bf16, f32")),
    }
}

fn bias_kind(text: &str) -> core::Result<BiasKind> {
    if matches!(text, "bool" | "mask") {
        return Ok(BiasKind::Boolean);
    }
    let kind = dtype(text).map(BiasKind::Additive);
    kind.map_err(|_| value_error("--bias", format!("{text:?}"), "bool, f16, bf16, f32"))
}

fn window(text: &str) -> core::Result<(i64, i64)> {
    let bounds: Option<Vec<i64>> = text.split(',').map(|bound| bound.trim().parse().ok()).collect();
    match bounds.as_deref() {
        Some(&[left, right]) => Ok((left, right)),
        _ => Err(value_error("--window", format!("{text:?}"), "LEFT,RIGHT such as 256,0; -1 is open")),
    }
}

/// The option by which an argument of a problem came.
fn option_of(argument: &'static str) -> &'static str {
    match argument {
        "q" => "--q",
        "k" => "--k",
        "v" => "--v",
        "softcap" => "--softcap",
        "bias" => "--bias",
        other => other,
    }
}

fn with_option(error: core::Error) -> core::Error {
    match error {
        core::Error::Shape { argument, got, allowed } => {
            core::Error::Shape { argument: option_of(argument), got, allowed }
        }
        core::Error::Value { argument, got, allowed } => {
            core::Error::Value { argument: option_of(argument), got, allowed }
        }
        core::Error::Unsupported { argument, got, instead } => {
            core::Error::Unsupported { argument: option_of(argument), got, instead }
        }
        other => other,
    }
}

impl Question {
    /// Name of the tier that is asked about.
    pub fn tier(&self) -> Option<&str> {
        self.tier.as_deref()
    }

    /// The shapes of q, k and v; where none are given, one batch of 16 heads of 4096 rows.
    fn shapes(&self) -> core::Result<[Vec<i64>; 3]> {
        let head_dim = self.head_dim.unwrap_or(64);
        let q = self.q.as_deref().map_or_else(|| Ok(vec![1, 4096, 16, head_dim]), |text| shape("--q", text))?;
        let k = self.k.as_deref().map_or_else(|| Ok(q.clone()), |text| shape("--k", text))?;
        let mut v = self.v.as_deref().map_or_else(|| Ok(k.clone()), |text| shape("--v", text))?;
        if let (Some(value_dim), Some(last)) = (self.value_dim, v.last_mut()) {
            *last = value_dim;
        }
        for (argument, shape) in [("--k", &k), ("--v", &v)] {
            if shape.len() != q.len() {
                let allowed = format!("{} sizes, as in --q", q.len());
                return Err(value_error(argument, format!("{} sizes", shape.len()), allowed));
            }
        }
        for (argument, dim) in [("--head-dim", q.last()), ("--value-dim", v.last())] {
            if dim.is_some_and(|&dim| dim < 1) {
                return Err(value_error(argument, format!("{}", dim.unwrap_or(&0)), "a whole number of at least 1"));
            }
        }
        Ok([q, k, v])
    }

    pub fn problem(&self) -> core::Result<Problem> {
        let dtype = dtype(&self.dtype)?;
        let shapes = self.shapes()?;
        let strides = shapes.each_ref().map(|shape| contiguous(shape));
        let meta = |i: usize| TensorMeta { dtype, shape: &shapes[i], strides: &strides[i] };
        let heads = [shapes[0][shapes[0].len() - 2]];
        let one_each: (&[i64], &[i64]) = (&heads, &[1]);
        let bias = self.bias.as_deref().map(bias_kind).transpose()?;
        let options = Options {
            causal: self.causal,
            window: self.window.as_deref().map_or(Ok((-1, -1)), window)?,
            softcap: self.softcap,
            alibi_slopes: self.alibi.then_some(one_each),
            bias: bias.map(|kind| (kind, &[1i64, 1][..], &[1i64, 1][..])),
            sinks: self.sinks.then_some(one_each),
            ..Options::default()
        };
        let (q, k, v) = (meta(0), meta(1), meta(2));
        let problem = if shapes[0].len() == 4 {
            if self.sequences.is_some() {
                let allowed = "left out where --q has a batch size";
                return Err(value_error("--sequences", "given", allowed));
            }
            Problem::dense(q, k, v, &options)
        } else {
            let sequences = self.sequences.unwrap_or(1);
            let batch = usize::try_from(sequences).ok().filter(|&batch| batch > 0);
            let wrong = || value_error("--sequences", sequences.to_string(), "a whole number of at least 1");
            Problem::packed(q, k, v, batch.ok_or_else(wrong)?, (shapes[0][0], shapes[1][0]), &options)
        };
        problem.map_err(with_option)
    }

    /// Whether the question is about this machine, if it has a device that takes Metal kernels.
    const fn is_here(&self) -> bool {
        matches!(self, Self { gpu: None, cores: None, macos: None, torch: None, .. })
    }

    /// What was measured on the machine that is asked about: nothing where that is another one.
    fn tuned<'a>(&self, py: Python<'_>, resolved: &'a process::Resolved) -> Result<&'a TunedTiles> {
        match doctor::metal_device(py, resolved)? {
            Some(device) if self.is_here() => Ok(resolved.tuned(py, device)?),
            _ => Ok(TunedTiles::NONE),
        }
    }

    /// The GPU that is asked about: the named one, or this machine's, or that of the simulator where there is none.
    fn gpu(&self, py: Python<'_>) -> Result<Gpu> {
        let here = match doctor::metal_device(py, &*process::current(py)?)? {
            Some(device) if self.is_here() => return Ok(device.gpu(py)?),
            Some(device) => device.gpu(py)?,
            None => Gpu::SIMULATED,
        };
        let chip = self.gpu.as_deref().map_or(Ok(here.chip), chip)?;
        let same = chip == here.chip;
        let cores = match self.cores {
            None if same => here.cores,
            None => chip.most_cores(),
            Some(cores) => usize::try_from(cores)
                .ok()
                .filter(|&cores| cores > 0)
                .ok_or_else(|| value_error("--cores", cores.to_string(), "a whole number of at least 1"))?,
        };
        let macos = self.macos.as_deref().map_or(Ok(here.macos), |text| Version::parse("--macos", text))?;
        let torch = match self.torch.as_deref() {
            Some("none") => None,
            Some(text) => Some(Version::parse("--torch", text)?),
            None => {
                let installed = py.import("torch")?.getattr("__version__")?.str()?.to_string();
                Some(Version::parse("--torch", &installed)?)
            }
        };
        Ok(Gpu { chip, cores, macos, torch })
    }
}

fn chip(name: &str) -> core::Result<Chip> {
    let chip = Chip::from_name(name);
    let lower = name.to_ascii_lowercase();
    if chip == Chip::Unknown && lower != "unknown" && !lower.starts_with("apple ") {
        let allowed = "m1, m2, m3 and so on, each alone or with -pro, -max or -ultra; a name that Metal gives, such as \
                       \"Apple M3 Max\"; unknown";
        return Err(value_error("--gpu", format!("{name:?}"), allowed));
    }
    Ok(chip)
}

/// An Apple GPU, with the versions that decide about kernels.
#[derive(IntoPyObject)]
pub struct GpuAnswer {
    name: String,
    cores: usize,
    macos: String,
    torch: Option<String>,
}

impl GpuAnswer {
    pub fn new(gpu: &Gpu) -> Self {
        let Gpu { chip, cores, macos, torch } = gpu;
        let torch = torch.map(|torch| torch.to_string());
        Self { name: chip.to_string(), cores: *cores, macos: macos.to_string(), torch }
    }
}

#[derive(IntoPyObject)]
struct TileAnswer {
    text: String,
    simdgroups: usize,
    row_fragments: usize,
    keys: usize,
    staged: bool,
    value_chunk: usize,
    passes: usize,
    query: &'static str,
    /// How a tensorops kernel makes its products.
    products: Option<String>,
    /// "default", "tuned" or "forced".
    source: &'static str,
    /// Why a tuned tile was ignored.
    ignored: Option<String>,
}

impl TileAnswer {
    fn new(choice: TileChoice, problem: &Problem) -> Self {
        let TileChoice { candidate: Candidate { tile, matmul }, source, ignored } = choice;
        let MetalTile { simdgroups, row_fragments, keys, staged, value_chunk, query } = tile;
        let passes = tile.passes(problem.value_dim);
        let text = tile.to_string();
        let products = matmul.map(|matmul| matmul.to_string());
        let (query, source) = (query.name(), source.name());
        Self { text, simdgroups, row_fragments, keys, staged, value_chunk, passes, query, products, source, ignored }
    }
}

#[derive(IntoPyObject)]
struct LaunchAnswer {
    entry: &'static str,
    threadgroups: [u32; 3],
    group: [u32; 3],
    rows: usize,
    /// Parts that the keys of each sequence are split into.
    splits: usize,
    threadgroup_bytes: usize,
}

impl LaunchAnswer {
    fn new(kernel: &Kernel, problem: &Problem, splits: usize) -> Result<Self> {
        let sizes = [problem.lengths.max_query_len(), problem.query_heads, problem.value_dim];
        let [_, heads, dim] = sizes.map(|size| size as i64);
        let rows = match problem.lengths {
            Lengths::Dense { query_len, .. } => query_len,
            Lengths::Packed { .. } => 0,
        };
        let out = Strides { batch: rows as i64 * heads * dim, row: heads * dim, head: dim };
        let outputs = Outputs { out, lse: kernel.features.lse.then(|| LseStrides::contiguous(problem)) };
        let grid = if kernel.tier == Tier::Decode {
            DecodeLaunch::new(problem, kernel, &outputs, splits).map(|launch| launch.grid)
        } else {
            Launch::new(problem, kernel, &outputs).map(|launch| launch.grid)
        };
        let grid = grid.map_err(|error| core::Error::Unsupported {
            argument: "--q",
            got: error.to_string(),
            instead: "ask about smaller shapes".into(),
        })?;
        Ok(Self {
            entry: kernel.entry(),
            threadgroups: grid.threadgroups,
            group: grid.group,
            rows: kernel.rows(),
            splits,
            threadgroup_bytes: kernel.threadgroup_bytes(),
        })
    }
}

#[derive(IntoPyObject)]
struct Prediction {
    registers: usize,
    most_registers: usize,
    threads_of_core: usize,
    most_threads_of_core: usize,
    threadgroups_of_core: usize,
    threadgroup_bytes: usize,
    most_threadgroup_bytes: usize,
    device_bytes: f64,
    threadgroup_traffic_bytes: f64,
    flops_per_device_byte: f64,
    validity: &'static str,
    judged: usize,
    spilling: usize,
    oversized: usize,
    rival: Option<String>,
    decided_by: Option<&'static str>,
}

impl Prediction {
    fn new(why: &Explanation, gpu: &Gpu) -> Self {
        let Explanation { shape, occupancy, traffic: Traffic { device, threadgroup }, judged, spilling, .. } = *why;
        // A row and a key meet in head_dim and value_dim multiply-adds.
        let flops = 2 * (shape.head_dim + shape.value_dim);
        let validity = if gpu.has_dynamic_caching() {
            "outside the model, which is of the M1 and M2: this GPU gives out registers while a kernel runs; the \
             numbers only rank tiles"
        } else {
            "within a class of what another compiler than Apple's needs; certain only where it predicts a spill"
        };
        Self {
            registers: occupancy.halves,
            most_registers: MOST_HALVES,
            threads_of_core: occupancy.threads,
            most_threads_of_core: CLASSES[0].1,
            threadgroups_of_core: occupancy.threadgroups,
            threadgroup_bytes: occupancy.threadgroup_bytes,
            most_threadgroup_bytes: THREADGROUP_MEMORY,
            device_bytes: device as f64 / 1024.0,
            threadgroup_traffic_bytes: threadgroup as f64 / 1024.0,
            flops_per_device_byte: (1024 * flops) as f64 / device as f64,
            validity,
            judged,
            spilling,
            oversized: why.oversized,
            rival: why.rival.map(|(tile, _)| tile.to_string()),
            decided_by: why.rival.map(|(_, words)| words),
        }
    }
}

#[derive(IntoPyObject)]
struct PassedOver {
    tier: &'static str,
    reason: String,
}

/// The plan of a call.
#[derive(IntoPyObject)]
pub struct PlanAnswer {
    gpu: GpuAnswer,
    tier: &'static str,
    tile: Option<TileAnswer>,
    launch: Option<LaunchAnswer>,
    predicted: Option<Prediction>,
    passed_over: Vec<PassedOver>,
}

/// The settings that decide how the tensorops kernels are made, and no other.
fn of_tensorops(settings: &Settings) -> Settings {
    let Settings { v2_preuse, v2_fp32_min_seq, tf32, .. } = *settings;
    Settings { v2_preuse, v2_fp32_min_seq, tf32, ..Settings::DEFAULT }
}

/// Plans a call on a GPU that need not be here. Of the settings only `MTLFLASHATTN_KERNEL`, `MTLFLASHATTN_TILE` and those
/// of the tensorops tiers count.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "arguments of Python functions are owned")]
pub fn _plan_elsewhere(py: Python<'_>, question: Question) -> PyResult<PlanAnswer> {
    guard(|| {
        let problem = question.problem()?;
        let gpu = question.gpu(py)?;
        let resolved = process::current(py)?;
        let asked = &resolved.values;
        let settings = Settings { kernel: asked.kernel, tile: asked.tile.clone(), ..of_tensorops(asked) };
        let tuned = question.tuned(py, &resolved)?;
        let planner = Planner { tuned, ..Planner::new(Device::Metal(gpu), &settings) };
        let plan = planner.plan(&problem)?;
        // Tensors with memory of their own start where a page or a line of the cache does.
        let kernel = kernel_of(&plan, &problem, question.lse).map(|kernel| kernel.aligned(&problem, [0; 3]));
        let passed_over = planner.passed_over(&problem, &plan);
        // The model of registers is that of the simdgroup kernel.
        let why = plan.metal.filter(|_| plan.tier == Tier::Simdgroup).and_then(|tile| explain(&problem, &gpu, &tile));
        let choice = planner.tile_choice(&problem, plan.tier);
        // What was measured or asked for was not decided against its rivals by criteria.
        let by_criteria = choice.as_ref().is_some_and(|choice| choice.source == TileSource::Default);
        let why = why.map(|why| Explanation { rival: why.rival.filter(|_| by_criteria), ..why });
        Ok(PlanAnswer {
            gpu: GpuAnswer::new(&gpu),
            tier: plan.tier.name(),
            tile: choice.map(|choice| TileAnswer::new(choice, &problem)),
            launch: kernel.map(|kernel| LaunchAnswer::new(&kernel, &problem, plan.splits)).transpose()?,
            predicted: why.map(|why| Prediction::new(&why, &gpu)),
            passed_over: passed_over
                .into_iter()
                .map(|(tier, reason)| PassedOver { tier: tier.name(), reason: reason.to_string() })
                .collect(),
        })
    })
}

/// The text of a kernel and how it is launched.
#[derive(IntoPyObject)]
pub struct MslAnswer {
    gpu: GpuAnswer,
    tier: &'static str,
    tile: Option<TileAnswer>,
    launch: LaunchAnswer,
    source: String,
}

pub fn tier_named(name: &str) -> core::Result<Tier> {
    Ok(kernel_named(name)?.1)
}

/// The value of `MTLFLASHATTN_KERNEL` that forces a Metal tier, and the tier.
pub fn kernel_named(name: &str) -> core::Result<(settings::Kernel, Tier)> {
    let variable = settings::VARIABLES[0];
    let (settings, warnings) = Settings::parse(|asked| (asked == variable.name).then(|| name.to_owned()));
    match settings.kernel.tier() {
        Some(tier) if warnings.is_empty() && tier.is_metal() => Ok((settings.kernel, tier)),
        _ => Err(value_error(
            "--tier",
            format!("{name:?}"),
            "decode, tensorops (or v2r), tensorops-staged, simdgroup (or v1), scalar (or v0)",
        )),
    }
}

/// The text of a tier's kernel for a call, for a GPU that need not be here.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "arguments of Python functions are owned")]
pub fn _kernel_text(py: Python<'_>, question: Question) -> PyResult<MslAnswer> {
    guard(|| {
        let tier = tier_named(question.tier.as_deref().unwrap_or("simdgroup"))?;
        let problem = question.problem()?;
        let gpu = question.gpu(py)?;
        let resolved = process::current(py)?;
        let settings = Settings { tile: resolved.values.tile.clone(), ..of_tensorops(&resolved.values) };
        let tuned = question.tuned(py, &resolved)?;
        let planner = Planner { tuned, ..Planner::new(Device::Metal(gpu), &settings) };
        let refused = |reason: String| core::Error::Unsupported {
            argument: "--tier",
            got: format!("{tier} for this call"),
            instead: reason,
        };
        let plan = planner.serve(&problem, tier).map_err(|reason| refused(reason.to_string()))?;
        // Tensors with memory of their own start where a page or a line of the cache does.
        let kernel = kernel_of(&plan, &problem, question.lse).map(|kernel| kernel.aligned(&problem, [0; 3]));
        let kernel = kernel.ok_or_else(|| refused("it has no kernel text".into()))?;
        Ok(MslAnswer {
            gpu: GpuAnswer::new(&gpu),
            tier: tier.name(),
            tile: planner.tile_choice(&problem, tier).map(|choice| TileAnswer::new(choice, &problem)),
            launch: LaunchAnswer::new(&kernel, &problem, plan.splits)?,
            source: kernel.source(),
        })
    })
}
