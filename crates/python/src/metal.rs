//! The Metal tiers on a device: compile and prove a kernel once, dispatch it, and say what a later tier has to make good.

use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use mtlflashattn_core::plan::Gpu;
use mtlflashattn_core::{Plan, Problem, Strides, Tier};
use mtlflashattn_metal::{Device, DeviceError, Kernel, Launch, LseStrides, Outputs, Tensors as LaunchTensors};
use pyo3::exceptions::PyRuntimeWarning;
use pyo3::intern;
use pyo3::prelude::*;

use crate::error::Error;
use crate::gpu;
use crate::kernels::{Kernels, State};
use crate::mps::{Mps, MpsPipeline};
use crate::probe;
use crate::simulated::Simulated;
use crate::tensor::View;

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
    pub fn attend<'py>(
        self,
        py: Python<'py>,
        problem: &Problem,
        kernel: &Kernel,
        operands: &Operands<'py>,
        check: bool,
    ) -> Result<(), Fault> {
        match self {
            Self::Mps => attend(&Mps::new(py), problem, kernel, operands, check),
            Self::Simulator => attend(&Simulated::new(py), problem, kernel, operands, check),
        }
    }

    /// Bytes from an address that is a multiple of 16 to the first elements of q, k and v.
    pub fn starts(self, operands: &Operands<'_>) -> PyResult<[usize; 3]> {
        let start = |operand: &Operand<'_>| -> PyResult<usize> {
            Ok(match self {
                // Metal's buffers begin at such addresses; what torch calls the pointer of a tensor on MPS is none.
                Self::Mps => {
                    let offset = operand.object.call_method0(intern!(operand.object.py(), "storage_offset"))?;
                    offset.extract::<usize>()? * operand.view.element.size()
                }
                Self::Simulator => operand.view.data.addr(),
            })
        };
        Ok([start(&operands.q)?, start(&operands.k)?, start(&operands.v)?])
    }

    /// Why the device refuses `kernel`, if it has done so before.
    pub fn refusal(self, kernel: &Kernel) -> Option<Arc<str>> {
        match self {
            Self::Mps => Mps::kernels().get(kernel)?.refusal(),
            Self::Simulator => Simulated::kernels().get(kernel)?.refusal(),
        }
    }
}

/// A device, with what it needs to know of torch tensors.
pub trait Home<'py>: Device<Pipeline: 'static> {
    /// Where its compiled kernels are kept.
    fn kernels() -> &'static Kernels<Kernel, Self::Pipeline>;

    /// The memory of a tensor that is not empty.
    fn buffer(&self, tensor: &Operand<'py>) -> Self::Buffer;

    /// The exception that interrupted the last operation, if one did.
    fn interruption(&self) -> Option<PyErr>;
}

impl<'py> Home<'py> for Mps<'py> {
    fn kernels() -> &'static Kernels<Kernel, MpsPipeline> {
        static KERNELS: Kernels<Kernel, MpsPipeline> = Kernels::new();
        &KERNELS
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

/// Why a tier did not serve a call that was planned for it.
pub enum Fault {
    /// The device refuses the kernel, now and later.
    Refused(Arc<str>),
    /// This call failed; the next one may not.
    Failed(String),
    /// Python raised what no device means: Ctrl-C, for example.
    Raised(Error),
}

impl Fault {
    /// What the device said; empty for what it did not say.
    pub fn reason(&self) -> &str {
        match self {
            Self::Refused(reason) => reason,
            Self::Failed(reason) => reason,
            Self::Raised(_) => "",
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
        (Tier::Simdgroup, Some(tile), _) => Some(Kernel::simdgroup(problem, tile, want_lse)),
        (Tier::Tensorops | Tier::TensoropsStaged, Some(tile), Some(matmul)) => {
            Some(Kernel::tensorops(problem, tile, matmul, want_lse))
        }
        _ => None,
    }
}

/// Why `device` refuses a kernel of `plan`, with or without LSE, aligned or not, if it has done so before.
pub fn refusal(device: MetalDevice, plan: &Plan, problem: &Problem) -> Option<Arc<str>> {
    [false, true].into_iter().find_map(|want_lse| {
        let kernel = kernel_of(plan, problem, want_lse)?;
        device.refusal(&kernel).or_else(|| device.refusal(&kernel.aligned(problem, [0; 3])))
    })
}

/// Computes `problem` by `kernel`. Nothing is copied and nothing is waited for, but at the first use of a kernel, which
/// proves itself where `check` asks for it.
pub fn attend<'py, H: Home<'py>>(
    home: &H,
    problem: &Problem,
    kernel: &Kernel,
    operands: &Operands<'py>,
    check: bool,
) -> Result<(), Fault> {
    let pipeline = match H::kernels().get(kernel) {
        Some(State::Ready(pipeline)) => pipeline,
        Some(State::Refused(reason)) => return Err(Fault::Refused(reason)),
        None => first_use(home, problem, kernel, operands, check)?,
    };
    dispatch(home, problem, kernel, &pipeline, operands)
}

fn first_use<'py, H: Home<'py>>(
    home: &H,
    problem: &Problem,
    kernel: &Kernel,
    operands: &Operands<'py>,
    check: bool,
) -> Result<Arc<H::Pipeline>, Fault> {
    let pipeline = home.pipeline(&kernel.source(), kernel.entry()).map_err(|error| fault(home, kernel, error))?;
    if check {
        let run = |problem: &Problem, operands: &Operands<'py>| dispatch(home, problem, kernel, &pipeline, operands);
        if let Some(wrong) = probe::check(problem, kernel, &operands.q.object, run)? {
            return Err(refuse::<H>(kernel, wrong));
        }
    }
    let pipeline = Arc::new(pipeline);
    H::kernels().insert(*kernel, State::Ready(Arc::clone(&pipeline)));
    Ok(pipeline)
}

fn dispatch<'py, H: Home<'py>>(
    home: &H,
    problem: &Problem,
    kernel: &Kernel,
    pipeline: &H::Pipeline,
    operands: &Operands<'py>,
) -> Result<(), Fault> {
    let outputs = Outputs {
        out: Strides::of(&operands.out.view.meta(problem.dtype)),
        lse: operands.lse.is_some().then(|| LseStrides::contiguous(problem)),
    };
    let launch = Launch::new(problem, kernel, &outputs).map_err(|error| Fault::Failed(error.to_string()))?;
    if launch.is_empty() {
        return Ok(());
    }
    // A tensor without elements has no memory to bind, and nobody reads it.
    let buffer = |operand: &Operand<'py>| home.buffer(if operand.view.is_empty() { &operands.out } else { operand });
    let buffers = map(operands, buffer);
    let arguments = launch.arguments(&map(&buffers, |buffer| buffer));
    home.dispatch(pipeline, &arguments, launch.grid).map_err(|error| fault(home, kernel, error))
}

fn map<'a, T, U>(tensors: &'a LaunchTensors<T>, each: impl Fn(&'a T) -> U) -> LaunchTensors<U> {
    let LaunchTensors { q, k, v, out, lse, offsets, alibi_slopes, bias, sinks } = tensors;
    LaunchTensors {
        q: each(q),
        k: each(k),
        v: each(v),
        out: each(out),
        lse: lse.as_ref().map(&each),
        offsets: offsets.as_ref().map(|(query, key)| (each(query), each(key))),
        alibi_slopes: alibi_slopes.as_ref().map(&each),
        bias: bias.as_ref().map(&each),
        sinks: sinks.as_ref().map(&each),
    }
}

/// What becomes of a kernel after `error`: it serves no more, but where memory was short, which may be there again at
/// the next call.
fn fault<'py, H: Home<'py>>(home: &H, kernel: &Kernel, error: DeviceError) -> Fault {
    match (home.interruption(), error) {
        (Some(exception), _) => exception.into(),
        (None, DeviceError::Memory(reason)) => Fault::Failed(format!("out of memory: {reason}")),
        (None, error) => refuse::<H>(kernel, error.to_string()),
    }
}

fn refuse<'py, H: Home<'py>>(kernel: &Kernel, reason: String) -> Fault {
    let reason: Arc<str> = reason.into();
    H::kernels().insert(*kernel, State::Refused(Arc::clone(&reason)));
    Fault::Refused(reason)
}

/// The tiers that somebody was warned about.
static WARNED: Mutex<Vec<Tier>> = Mutex::new(Vec::new());
/// Longest part of a compiler's log that a warning quotes.
const MAX_QUOTED: usize = 1000;

/// Warns, once for each tier, that `next` serves in its place.
pub fn warn(py: Python<'_>, problem: &Problem, tier: Tier, reason: &str, next: Tier) -> PyResult<()> {
    {
        let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.contains(&tier) {
            return Ok(());
        }
        warned.push(tier);
    }
    let reason = match reason.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{} [...]", &reason[..end]),
        None => reason.to_owned(),
    };
    let Problem { dtype, head_dim, .. } = problem;
    let text = format!(
        "the {tier} tier failed for {dtype} with head_dim {head_dim}, and the {next} tier serves instead: {reason} \
         (more failures of this tier are not reported; metal_flash_attn.plan names them)"
    );
    PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &CString::new(text.replace('\0', " "))?, 2)
}

/// Forgets every kernel, every refusal and what is known of the GPU: for tests that change the device.
#[pyfunction]
pub fn _forget_kernels() {
    Mps::kernels().clear();
    Simulated::kernels().clear();
    gpu::forget();
    WARNED.lock().unwrap_or_else(PoisonError::into_inner).clear();
}
