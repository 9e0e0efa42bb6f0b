//! The Metal tiers on a device: compile and prove a kernel once, dispatch it, and say what a later tier has to make good.

use std::borrow::Cow;
use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

use mtlflashattn_cache::Machine;
use mtlflashattn_core::plan::Gpu;
use mtlflashattn_core::{Plan, Problem, Settings, Strides, Tier};
use mtlflashattn_metal::{
    CacheTensors, Device, DeviceError, Kernel, Launch, LseStrides, Outputs, Tensors as LaunchTensors,
};
use pyo3::exceptions::PyRuntimeWarning;
use pyo3::intern;
use pyo3::prelude::*;

use crate::error::Error;
use crate::kernels::{Kernels, Refusal, Scope, State};
use crate::mps::{Mps, MpsPipeline};
use crate::simulated::Simulated;
use crate::tensor::View;
use crate::variant::AnyKernel;
use crate::verdicts::{Known, Verdicts};
use crate::{decode, first_use, gpu};

/// Which device computes by Metal kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetalDevice {
    /// torch's MPS stream.
    Mps,
    /// The simulator, over CPU tensors.
    Simulator,
}

impl MetalDevice {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mps => "mps",
            Self::Simulator => "simulator",
        }
    }

    pub fn gpu(self, py: Python<'_>) -> PyResult<Gpu> {
        match self {
            Self::Mps => gpu::of_torch(py),
            Self::Simulator => Ok(Gpu::SIMULATED),
        }
    }

    /// [`attend`] on this device.
    pub fn attend<'py>(self, py: Python<'py>, call: &Attention<'_, 'py>, settings: &Settings) -> Result<(), Fault> {
        match self {
            Self::Mps => attend(&Mps::new(py), call, settings),
            Self::Simulator => attend(&Simulated::new(py), call, settings),
        }
    }

    /// Bytes from an address that is a multiple of 16 to the first element of each of `operands`.
    pub fn starts<const N: usize>(self, operands: [&Operand<'_>; N]) -> PyResult<[usize; N]> {
        let mut starts = [0; N];
        for (start, operand) in starts.iter_mut().zip(operands) {
            *start = match self {
                // Metal's buffers begin at such addresses; what torch calls the pointer of a tensor on MPS is none.
                Self::Mps => {
                    let offset = operand.object.call_method0(intern!(operand.object.py(), "storage_offset"))?;
                    offset.extract::<usize>()? * operand.view.element.size()
                }
                Self::Simulator => operand.view.data.addr(),
            };
        }
        Ok(starts)
    }

    /// Why the device refuses `kernel`, as far as this or an earlier process knows.
    pub fn refusal(self, py: Python<'_>, kernel: &AnyKernel, settings: &Settings) -> PyResult<Option<Refusal>> {
        match self {
            Self::Mps => refusal_on(&Mps::new(py), kernel, settings),
            Self::Simulator => refusal_on(&Simulated::new(py), kernel, settings),
        }
    }

    /// What is known of the kernels of this device.
    pub fn known(self, py: Python<'_>, settings: &Settings) -> PyResult<Known> {
        match self {
            Self::Mps => Mps::verdicts().all(settings, || Mps::new(py).machine()),
            Self::Simulator => Simulated::verdicts().all(settings, || Simulated::new(py).machine()),
        }
    }
}

fn refusal_on<'py, H: Home<'py>>(home: &H, kernel: &AnyKernel, settings: &Settings) -> PyResult<Option<Refusal>> {
    match H::kernels().get(kernel, settings.probe) {
        Some(State::Refused(refusal)) => Ok(Some(refusal)),
        Some(State::Ready(_)) => Ok(None),
        None => first_use::known_refusal(home, kernel, settings),
    }
}

/// A device, with what it needs to know of torch tensors.
pub trait Home<'py>: Device<Pipeline: 'static> {
    /// Where its compiled kernels are kept.
    fn kernels() -> &'static Kernels<AnyKernel, Self::Pipeline>;

    /// What is known of its kernels.
    fn verdicts() -> &'static Verdicts;

    /// What verdicts on its kernels depend on.
    fn machine(&self) -> PyResult<Machine>;

    /// What a pipeline says of itself: on an M1 or M2 it tells how many registers its threads have.
    fn max_threads(&self, pipeline: &Self::Pipeline) -> Option<u32>;

    /// Waits for everything that was dispatched; raises what went wrong with it.
    fn finish(&self) -> PyResult<()>;

    /// The memory of a tensor that is not empty.
    fn buffer(&self, tensor: &Operand<'py>) -> Self::Buffer;

    /// The exception that interrupted the last operation, if one did.
    fn interruption(&self) -> Option<PyErr>;
}

impl<'py> Home<'py> for Mps<'py> {
    fn kernels() -> &'static Kernels<AnyKernel, MpsPipeline> {
        static KERNELS: Kernels<AnyKernel, MpsPipeline> = Kernels::new();
        &KERNELS
    }

    fn verdicts() -> &'static Verdicts {
        static VERDICTS: Verdicts = Verdicts::new();
        &VERDICTS
    }

    fn machine(&self) -> PyResult<Machine> {
        gpu::machine(self.py())
    }

    fn max_threads(&self, pipeline: &MpsPipeline) -> Option<u32> {
        pipeline.max_threads(self.py())
    }

    fn finish(&self) -> PyResult<()> {
        self.py().import("torch.mps")?.call_method0("synchronize")?;
        Ok(())
    }

    fn buffer(&self, tensor: &Operand<'py>) -> Bound<'py, PyAny> {
        tensor.object.clone()
    }

    fn interruption(&self) -> Option<PyErr> {
        self.take_interruption()
    }
}

/// A tensor that a kernel reads or writes.
#[derive(Clone, Debug)]
pub struct Operand<'py> {
    pub object: Bound<'py, PyAny>,
    pub view: View,
}

/// The tensors of a call.
pub type Operands<'py> = LaunchTensors<Operand<'py>>;

/// The buffers of a cache that a kernel reads.
pub type CacheOperands<'py> = CacheTensors<Operand<'py>>;

/// One call of a kernel.
#[derive(Clone, Copy)]
pub struct Attention<'a, 'py> {
    pub problem: &'a Problem,
    pub kernel: &'a Kernel,
    /// [`Plan::splits`].
    pub splits: usize,
    pub operands: &'a Operands<'py>,
    /// Those of the problem's cache, if it has one.
    pub cache: &'a CacheOperands<'py>,
}

/// Why a tier did not serve a call that was planned for it.
pub enum Fault {
    /// The device refuses the kernel, now and later.
    Refused(Refusal),
    /// This call failed; the next one may not.
    Failed(String),
    /// Python raised what no device means: Ctrl-C, for example.
    Raised(Error),
}

impl Fault {
    /// Why, in words; empty for what no device said.
    pub fn reason(&self) -> String {
        match self {
            Self::Refused(refusal) => refusal.to_string(),
            Self::Failed(reason) => reason.clone(),
            Self::Raised(_) => String::new(),
        }
    }
}

/// Why a device did not do what it was asked to.
pub enum Objection {
    /// It said something against the kernel.
    Kernel(String),
    /// Nothing that is the kernel's fault.
    Other(Fault),
}

impl Objection {
    /// Short memory may be there again at the next call; an exception that interrupted the device is handed on.
    pub fn new<'py, H: Home<'py>>(home: &H, error: DeviceError) -> Self {
        match (home.interruption(), error) {
            (Some(exception), _) => Self::Other(exception.into()),
            (None, DeviceError::Memory(reason)) => Self::Other(Fault::Failed(format!("out of memory: {reason}"))),
            (None, error) => Self::Kernel(error.to_string()),
        }
    }
}

impl From<PyErr> for Fault {
    fn from(exception: PyErr) -> Self {
        Self::Raised(exception.into())
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Raised(error)
    }
}

/// The kernel of `plan` for tensors that lie anywhere; `None` when its tier is none of Metal's.
pub fn kernel_of(plan: &Plan, problem: &Problem, want_lse: bool) -> Option<Kernel> {
    match (plan.tier, plan.metal, plan.matmul) {
        (Tier::Scalar, ..) => Some(Kernel::scalar(problem, want_lse)),
        (Tier::Decode, Some(tile), _) => Some(Kernel::decode(problem, tile, want_lse)),
        (Tier::Simdgroup, Some(tile), _) => Some(Kernel::simdgroup(problem, tile, want_lse)),
        (Tier::Tensorops | Tier::TensoropsStaged, Some(tile), Some(matmul)) => {
            Some(Kernel::tensorops(problem, tile, matmul, want_lse))
        }
        _ => None,
    }
}

/// Why `device` refuses a kernel of `plan`, with or without LSE, aligned or not, as far as this or an earlier process knows.
pub fn refusal(
    py: Python<'_>,
    device: MetalDevice,
    plan: &Plan,
    problem: &Problem,
    settings: &Settings,
) -> PyResult<Option<Refusal>> {
    for want_lse in [false, true] {
        let Some(kernel) = kernel_of(plan, problem, want_lse) else { return Ok(None) };
        for kernel in [kernel, kernel.aligned(problem, [0; 3])] {
            if let Some(refusal) = device.refusal(py, &AnyKernel::Forward(kernel), settings)? {
                return Ok(Some(refusal));
            }
        }
    }
    Ok(None)
}

/// Computes what `call` asks for. Nothing is copied and nothing is waited for, but at the first use of a kernel, which
/// proves itself as `settings` ask for.
pub fn attend<'py, H: Home<'py>>(home: &H, call: &Attention<'_, 'py>, settings: &Settings) -> Result<(), Fault> {
    serve(home, AnyKernel::Forward(*call.kernel), &call.operands.q.object, settings, |pipeline| {
        dispatch(home, call, pipeline)
    })
}

/// Gets `launch` the pipeline of `kernel`, and keeps what the launch says against the kernel. `like` is a tensor of the
/// call.
pub fn serve<'py, H: Home<'py>>(
    home: &H,
    kernel: AnyKernel,
    like: &Bound<'py, PyAny>,
    settings: &Settings,
    launch: impl FnOnce(&H::Pipeline) -> Result<(), Objection>,
) -> Result<(), Fault> {
    let pipeline = match H::kernels().get(&kernel, settings.probe) {
        Some(State::Ready(pipeline)) => pipeline,
        Some(State::Refused(refusal)) => return Err(Fault::Refused(refusal)),
        None => first_use::prepare(home, &kernel, like, settings)?,
    };
    launch(&pipeline).map_err(|objection| match objection {
        Objection::Kernel(reason) => {
            let refusal = Refusal { reason: reason.into(), scope: Scope::Process, is_news: true };
            H::kernels().insert(kernel, State::Refused(refusal.clone()), settings.probe);
            Fault::Refused(refusal)
        }
        Objection::Other(fault) => fault,
    })
}

/// Launches the kernel of `call`.
pub fn dispatch<'py, H: Home<'py>>(
    home: &H,
    call: &Attention<'_, 'py>,
    pipeline: &H::Pipeline,
) -> Result<(), Objection> {
    let Attention { problem, kernel, operands, .. } = *call;
    let outputs = Outputs {
        out: Strides::of(&operands.out.view.meta(problem.dtype)),
        lse: operands.lse.is_some().then(|| LseStrides::contiguous(problem)),
    };
    if kernel.tier == Tier::Decode {
        return decode::dispatch(home, call, &outputs, pipeline);
    }
    let launch =
        Launch::new(problem, kernel, &outputs).map_err(|error| Objection::Other(Fault::Failed(error.to_string())))?;
    if launch.is_empty() {
        return Ok(());
    }
    // A tensor without elements has no memory to bind, and nobody reads it.
    let buffer = |operand: &Operand<'py>| home.buffer(if operand.view.is_empty() { &operands.out } else { operand });
    let buffers = operands.map(buffer);
    let arguments = launch.arguments(&buffers.map(|buffer| buffer));
    home.dispatch(pipeline, &arguments, launch.grid).map_err(|error| Objection::new(home, error))
}

/// What a tier computes, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Attention,
    Gradients,
}

/// The tiers that somebody was warned about, and what they failed at.
static WARNED: Mutex<Vec<(Tier, Work)>> = Mutex::new(Vec::new());
/// Longest part of a compiler's log that a warning quotes.
const MAX_QUOTED: usize = 1000;

/// Warns, once for each tier and work, that `next` serves in its place. What an earlier process has found out, it has told.
pub fn warn(py: Python<'_>, problem: &Problem, work: Work, tier: Tier, fault: &Fault, next: Tier) -> PyResult<()> {
    if matches!(fault, Fault::Refused(Refusal { is_news: false, .. })) {
        return Ok(());
    }
    {
        let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.contains(&(tier, work)) {
            return Ok(());
        }
        warned.push((tier, work));
    }
    let reason = match fault {
        Fault::Refused(Refusal { reason, scope, .. }) => format!("{}; {scope}", beginning(reason, MAX_QUOTED)),
        fault => beginning(&fault.reason(), MAX_QUOTED).into_owned(),
    };
    let Problem { dtype, head_dim, .. } = problem;
    let gradients = if work == Work::Gradients { "gradients of " } else { "" };
    let text = format!(
        "the {tier} tier failed for {gradients}{dtype} with head_dim {head_dim}, and the {next} tier serves instead: {reason} \
         (more failures of this tier are not reported; metal_flash_attn.plan names them)"
    );
    PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &CString::new(text.replace('\0', " "))?, 2)
}

/// A text, or as much of it as `most` characters, marked where it was cut off.
pub fn beginning(text: &str, most: usize) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{} [...]", &text[..end]).into(),
        None => text.into(),
    }
}

/// Forgets every kernel, every verdict that no file holds, and what is known of the GPU: for tests that change the device.
#[pyfunction]
pub fn _forget_kernels() {
    Mps::kernels().clear();
    Mps::verdicts().clear();
    Simulated::kernels().clear();
    Simulated::verdicts().clear();
    gpu::forget();
    WARNED.lock().unwrap_or_else(PoisonError::into_inner).clear();
}
