//! What `python -m metal_flash_attn doctor` asks about this machine; `_doctor.py` puts it into words.

use mtlflashattn_core::plan::{Candidate, TilePattern};
use mtlflashattn_core::settings::{VARIABLES, Variable};
use mtlflashattn_core::{Device, Dtype, Options, Planner, Problem, Settings, TensorMeta, Tier};
use mtlflashattn_cpu::Isa;
use pyo3::prelude::*;

use crate::cli::GpuAnswer;
use crate::environment::Environment;
use crate::error::{Result, guard};
use crate::execute::cpu_device;
use crate::metal::MetalDevice;
use crate::settings;
use crate::tensor::Place;
use crate::torch::Torch;

/// Calls that most programs make: long sequences at the head dimensions that most models have.
const HEAD_DIMS: [i64; 2] = [64, 128];
const HEADS: i64 = 16;
const LENGTH: i64 = 4096;

/// A variable, with what the environment says.
#[derive(IntoPyObject)]
pub struct SettingAnswer {
    name: &'static str,
    default: &'static str,
    allowed: &'static str,
    description: &'static str,
    /// The text in the environment; `None` when it is empty or absent.
    value: Option<String>,
    /// Why the value is not used.
    rejected: Option<String>,
}

/// Every setting. Needs no torch and gives no warnings.
#[pyfunction]
pub fn _settings() -> Vec<SettingAnswer> {
    let environment = Environment::read();
    let (_, warnings) = Settings::parse(|name| environment.get(name));
    let answer = |variable: &Variable| {
        let value = environment.get(variable.name).map(|value| value.trim().to_owned());
        let rejected = warnings.iter().find(|warning| warning.variable == *variable).map(ToString::to_string);
        SettingAnswer {
            name: variable.name,
            default: variable.default,
            allowed: variable.allowed,
            description: variable.description,
            value: value.filter(|value| !value.is_empty()),
            rejected,
        }
    };
    VARIABLES.iter().map(answer).collect()
}

/// Which tier serves a typical call, and what keeps the others from it.
#[derive(IntoPyObject)]
pub struct CallAnswer {
    /// "cpu", or the name of the device that takes Metal kernels.
    device: &'static str,
    dtype: &'static str,
    head_dim: i64,
    /// The tier that serves under the present settings; `None` when the call raises.
    tier: Option<&'static str>,
    /// What it raises then.
    error: Option<String>,
    /// The tile of a Metal kernel, as `MTLFLASHATTN_TILE` takes it.
    tile: Option<String>,
    unavailable: Vec<UnavailableAnswer>,
}

/// A tier that cannot serve a call.
#[derive(IntoPyObject)]
pub struct UnavailableAnswer {
    tier: &'static str,
    reason: String,
    /// What the user can do about it, if anything.
    remedy: Option<&'static str>,
}

/// What the planner makes of this machine.
#[derive(IntoPyObject)]
pub struct MachineAnswer {
    /// "mps", "simulator", or `None` where no device takes Metal kernels.
    metal: Option<&'static str>,
    gpu: Option<GpuAnswer>,
    /// The instruction set of the cpu tier; `None` when the one that the settings name is not there.
    isa: Option<&'static str>,
    isa_error: Option<String>,
    threads: usize,
    tiers: Vec<&'static str>,
    calls: Vec<CallAnswer>,
}

/// Asks the planner about typical calls on every device of this machine. A bad setting gives its usual warning.
#[pyfunction]
pub fn _machine(py: Python<'_>) -> PyResult<MachineAnswer> {
    guard(|| {
        let resolved = settings::current(py)?;
        let metal = metal_device(py, &resolved)?;
        let gpu = metal.map(|metal| metal.gpu(py)).transpose()?;
        let threads = Torch::get(py)?.num_threads(py)?;
        let isa = resolved.isa();
        let mut calls = Vec::new();
        for head_dim in HEAD_DIMS {
            for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
                let problem = problem(dtype, head_dim)?;
                let mut ask = |name, device| {
                    let planner = Planner::new(device, &resolved.values);
                    calls.push(call(name, &planner, &problem, head_dim));
                };
                if let (Some(metal), Some(gpu)) = (metal, gpu) {
                    ask(metal.name(), Device::Metal(gpu));
                }
                if let (Ok(isa), None) = (&isa, resolved.metal_device(Place::Cpu)) {
                    ask("cpu", cpu_device(*isa, threads));
                }
            }
        }
        let isa_error = isa.as_ref().err().map(ToString::to_string);
        Ok(MachineAnswer {
            metal: metal.map(MetalDevice::name),
            gpu: gpu.as_ref().map(GpuAnswer::new),
            isa: isa.ok().map(Isa::name),
            isa_error,
            threads,
            tiers: Tier::ALL.map(Tier::name).to_vec(),
            calls,
        })
    })
}

/// The device that takes Metal kernels: that of MPS tensors where there are any, else what stands in for it.
pub fn metal_device(py: Python<'_>, resolved: &settings::Resolved) -> Result<Option<MetalDevice>> {
    let mps = py.import("torch")?.getattr("backends")?.getattr("mps")?.call_method0("is_available")?;
    Ok(resolved.metal_device(if mps.is_truthy()? { Place::Mps } else { Place::Cpu }))
}

fn problem(dtype: Dtype, head_dim: i64) -> Result<Problem> {
    let shape = [1, LENGTH, HEADS, head_dim];
    let strides = [LENGTH * HEADS * head_dim, HEADS * head_dim, head_dim, 1];
    let meta = || TensorMeta { dtype, shape: &shape, strides: &strides };
    Ok(Problem::dense(meta(), meta(), meta(), &Options { window: (-1, -1), ..Options::default() })?)
}

fn call(device: &'static str, planner: &Planner<'_>, problem: &Problem, head_dim: i64) -> CallAnswer {
    let planned = planner.plan(problem);
    let unavailable = |tier: Tier| {
        let reason = planner.serve(problem, tier).err()?;
        Some(UnavailableAnswer { tier: tier.name(), reason: reason.to_string(), remedy: reason.remedy() })
    };
    CallAnswer {
        device,
        dtype: problem.dtype.name(),
        head_dim,
        tier: planned.as_ref().ok().map(|plan| plan.tier.name()),
        error: planned.as_ref().err().map(ToString::to_string),
        tile: planned
            .as_ref()
            .ok()
            .and_then(|plan| Some(TilePattern::of(&Candidate { tile: plan.metal?, matmul: plan.matmul }).to_string())),
        unavailable: Tier::ALL.into_iter().filter_map(unavailable).collect(),
    }
}
