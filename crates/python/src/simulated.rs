//! The simulator as a device for CPU tensors, and as what a stand-in for torch's MPS half is made of.

use std::env;
use std::sync::LazyLock;

use mtlflashattn_cache::Machine;
use mtlflashattn_metal::{Argument, Device, DeviceError, Grid};
use mtlflashattn_simulator::{Buffer, Launch, Layer, Options, Pipeline, Simulator};
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PySyntaxError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::kernels::Kernels;
use crate::metal::{Home, Operand};
use crate::variant::AnyKernel;
use crate::verdicts::Verdicts;

static SIMULATOR: LazyLock<Simulator> = LazyLock::new(|| Simulator::new(Options::new(Layer::Fast)));

/// The simulator, over the memory of CPU tensors; it runs without the GIL.
pub struct Simulated<'py>(Python<'py>);

impl<'py> Simulated<'py> {
    pub const fn new(py: Python<'py>) -> Self {
        Self(py)
    }
}

/// CPU memory of a tensor that outlives the launch.
#[derive(Clone, Copy)]
pub struct Memory {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: only an address; the memory belongs to tensors that the caller of the launch keeps alive, on whichever thread
// the GIL is released.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// # Safety
    /// The memory must stay valid for reads and writes as long as the buffer lives, with nobody else writing to it.
    unsafe fn buffer(self) -> Buffer {
        // SAFETY: the caller's contract.
        unsafe { Buffer::from_raw(self.address, self.bytes, true) }
    }
}

impl Device for Simulated<'_> {
    type Buffer = Memory;
    type Pipeline = Pipeline;

    fn pipeline(&self, source: &str, entry: &str) -> Result<Pipeline, DeviceError> {
        self.0.detach(|| SIMULATOR.pipeline(source, entry))
    }

    fn dispatch(&self, pipeline: &Pipeline, arguments: &[Argument<'_, Memory>], grid: Grid) -> Result<(), DeviceError> {
        self.0.detach(|| {
            let buffers: Vec<Option<Buffer>> = arguments
                .iter()
                .map(|argument| match argument {
                    // SAFETY: the operands of the call hold the tensors.
                    Argument::Buffer(memory) => Some(unsafe { memory.buffer() }),
                    Argument::Ints(_) | Argument::Floats(_) => None,
                })
                .collect();
            let arguments: Vec<_> =
                arguments.iter().zip(&buffers).map(|(argument, buffer)| bind(argument, buffer.as_ref())).collect();
            SIMULATOR.dispatch(pipeline, &arguments, grid)
        })
    }
}

fn bind<'a>(argument: &Argument<'a, Memory>, buffer: Option<&'a Buffer>) -> Argument<'a, Buffer> {
    match (argument, buffer) {
        (_, Some(buffer)) => Argument::Buffer(buffer),
        (Argument::Ints(values), _) => Argument::Ints(values),
        (Argument::Floats(values), _) => Argument::Floats(values),
        (Argument::Buffer(_), None) => unreachable!("every tensor became a buffer"),
    }
}

impl<'py> Home<'py> for Simulated<'py> {
    fn kernels() -> &'static Kernels<AnyKernel, Pipeline> {
        static KERNELS: Kernels<AnyKernel, Pipeline> = Kernels::new();
        &KERNELS
    }

    fn verdicts() -> &'static Verdicts {
        static VERDICTS: Verdicts = Verdicts::new();
        &VERDICTS
    }

    fn machine(&self) -> PyResult<Machine> {
        let torch = self.0.import("torch")?.getattr("__version__")?.str()?.to_string();
        let os = format!("{} {}", env::consts::OS, env::consts::ARCH);
        let gpu = format!("simulator {}", mtlflashattn_simulator::identity());
        Ok(Machine { gpu, os, torch, package: env!("CARGO_PKG_VERSION").into() })
    }

    fn max_threads(&self, pipeline: &Pipeline) -> Option<u32> {
        Some(pipeline.max_threads_per_threadgroup())
    }

    /// Launches end before they return.
    fn finish(&self) -> PyResult<()> {
        Ok(())
    }

    fn buffer(&self, operand: &Operand<'py>) -> Memory {
        Memory { address: operand.view.data, bytes: operand.view.extent() }
    }

    fn interruption(&self) -> Option<PyErr> {
        None
    }
}

/// A compiled MSL text.
#[pyclass(frozen, module = "metal_flash_attn._native", name = "_SimulatedLibrary")]
pub struct SimulatedLibrary {
    source: String,
}

#[pymethods]
impl SimulatedLibrary {
    #[new]
    fn new(py: Python<'_>, source: String) -> PyResult<Self> {
        // No kernel has this name: a text that compiles ends in another error.
        match Simulated::new(py).pipeline(&source, "") {
            Err(error @ (DeviceError::Compile(_) | DeviceError::Memory(_))) => Err(raised(&error)),
            _ => Ok(Self { source }),
        }
    }

    fn pipeline(&self, py: Python<'_>, name: &str) -> PyResult<SimulatedPipeline> {
        let pipeline = Simulated::new(py).pipeline(&self.source, name);
        Ok(SimulatedPipeline { pipeline: pipeline.map_err(|error| raised(&error))? })
    }
}

/// A kernel of such a text.
#[pyclass(frozen, module = "metal_flash_attn._native", name = "_SimulatedPipeline")]
pub struct SimulatedPipeline {
    pipeline: Pipeline,
}

#[pymethods]
impl SimulatedPipeline {
    #[getter]
    fn max_threads(&self) -> u32 {
        self.pipeline.max_threads_per_threadgroup()
    }

    /// Argument n is `[[buffer(n)]]`: bytes, or the address and size of memory that stays.
    #[pyo3(signature = (arguments, threads, group, /))]
    fn dispatch(
        &self,
        py: Python<'_>,
        arguments: Vec<Bound<'_, PyAny>>,
        threads: [u32; 3],
        group: [u32; 3],
    ) -> PyResult<()> {
        let mut buffers = Vec::with_capacity(arguments.len());
        for argument in arguments {
            let buffer = if let Ok(bytes) = argument.cast::<PyBytes>() {
                Buffer::from_slice(bytes.as_bytes()).map_err(|error| raised(&error))?
            } else {
                let (address, bytes): (usize, usize) = argument.extract()?;
                let address = std::ptr::with_exposed_provenance_mut(address);
                // SAFETY: the caller's tensors are alive; this is the contract of the test that calls.
                unsafe { Memory { address, bytes }.buffer() }
            };
            buffers.push(buffer);
        }
        let launch = Launch { threads, group, ..Launch::default() };
        let pipeline = &self.pipeline;
        let run = move || {
            let arguments: Vec<Argument<'_, Buffer>> = buffers.iter().map(Argument::Buffer).collect();
            SIMULATOR.run(pipeline, &arguments, &launch).map(|_| ())
        };
        py.detach(run).map_err(|error| raised(&error))
    }
}

/// The exception that torch raises for `error`.
fn raised(error: &DeviceError) -> PyErr {
    let text = error.to_string();
    match error {
        DeviceError::Compile(log) => PySyntaxError::new_err(log.clone()),
        DeviceError::Memory(_) => PyMemoryError::new_err(text),
        DeviceError::Pipeline { .. } | DeviceError::Dispatch { .. } => PyRuntimeError::new_err(text),
    }
}
