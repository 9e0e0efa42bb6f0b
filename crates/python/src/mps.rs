//! Metal kernels on torch's MPS stream, through `torch.mps.compile_shader`.
//!
//! A kernel object is called with one positional argument for each `[[buffer(n)]]`: a tensor binds its storage from its
//! first element on, a list of ints becomes packed int64 and a list of floats packed float32. `threads` counts all threads
//! of the grid, and `group_size` must have as many numbers (torch/csrc/mps/Module.cpp). A call neither waits for the GPU
//! nor hands over the GIL.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

use mtlflashattn_metal::{Argument, Device, DeviceError, Grid};
use pyo3::exceptions::{PyException, PyMemoryError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyList, PyString, PyTuple};

/// torch's MPS stream, with the GIL held.
pub struct Mps<'py> {
    py: Python<'py>,
    /// What no error of a device is: Ctrl-C while the compiler ran, for example.
    interrupted: Cell<Option<PyErr>>,
}

/// A compiled entry point.
pub struct MpsPipeline {
    library: Py<PyAny>,
    entry: Py<PyString>,
    /// Kernel objects that nobody is calling. One object holds the encoder of its call, so that two threads must not
    /// share it.
    idle: Mutex<Vec<Py<PyAny>>>,
}

impl MpsPipeline {
    fn kernel<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match idle {
            Some(kernel) => Ok(kernel.into_bound(py)),
            // Each look-up makes a new object for the same pipeline.
            None => self.library.bind(py).getattr(self.entry.bind(py)),
        }
    }

    /// `max_threads_per_threadgroup` of the pipeline, where this torch tells it.
    pub fn max_threads(&self, py: Python<'_>) -> Option<u32> {
        let kernel = self.kernel(py).ok()?;
        let most = kernel.getattr(intern!(py, "max_threads_per_threadgroup")).and_then(|most| most.extract());
        self.give_back(kernel);
        most.ok()
    }

    fn give_back(&self, kernel: Bound<'_, PyAny>) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(kernel.unbind());
    }
}

impl<'py> Mps<'py> {
    pub const fn new(py: Python<'py>) -> Self {
        Self { py, interrupted: Cell::new(None) }
    }

    pub const fn py(&self) -> Python<'py> {
        self.py
    }

    /// The exception that interrupted the last operation, if one did.
    pub fn take_interruption(&self) -> Option<PyErr> {
        self.interrupted.take()
    }

    /// `error` as an error of the device.
    fn translate(&self, error: PyErr, kind: impl FnOnce(String) -> DeviceError) -> DeviceError {
        let text = error.value(self.py).str().map_or_else(|_| error.to_string(), |text| text.to_string());
        let is_memory = error.is_instance_of::<PyMemoryError>(self.py) || text.contains("out of memory");
        if !error.is_instance_of::<PyException>(self.py) {
            self.interrupted.set(Some(error));
        }
        if is_memory { DeviceError::Memory(text) } else { kind(text) }
    }

    fn compile(&self, source: &str) -> PyResult<Bound<'py, PyAny>> {
        static COMPILE_SHADER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        COMPILE_SHADER.import(self.py, "torch.mps", "compile_shader")?.call1((source,))
    }

    fn call(&self, pipeline: &MpsPipeline, arguments: &[Argument<'_, Bound<'py, PyAny>>], grid: Grid) -> PyResult<()> {
        let py = self.py;
        let mut values = Vec::with_capacity(arguments.len());
        for argument in arguments {
            values.push(match argument {
                Argument::Buffer(tensor) => (*tensor).clone(),
                Argument::Ints(ints) => PyList::new(py, *ints)?.into_any(),
                Argument::Floats(floats) => PyList::new(py, *floats)?.into_any(),
            });
        }
        let keywords = [
            (intern!(py, "threads"), PyTuple::new(py, grid.threads())?),
            (intern!(py, "group_size"), PyTuple::new(py, grid.group)?),
        ]
        .into_py_dict(py)?;
        let kernel = pipeline.kernel(py)?;
        let result = kernel.call(PyTuple::new(py, values)?, Some(&keywords));
        pipeline.give_back(kernel);
        result.map(|_| ())
    }
}

impl<'py> Device for Mps<'py> {
    /// A tensor; its first element is where the kernel starts to read.
    type Buffer = Bound<'py, PyAny>;
    type Pipeline = MpsPipeline;

    fn pipeline(&self, source: &str, entry: &str) -> Result<MpsPipeline, DeviceError> {
        let library = self.compile(source).map_err(|error| self.translate(error, DeviceError::Compile))?;
        let pipeline = MpsPipeline {
            library: library.unbind(),
            entry: PyString::intern(self.py, entry).unbind(),
            idle: Mutex::default(),
        };
        let refused = |reason| DeviceError::Pipeline { entry: entry.into(), reason };
        let kernel = pipeline.kernel(self.py).map_err(|error| self.translate(error, refused))?;
        pipeline.give_back(kernel);
        Ok(pipeline)
    }

    fn dispatch(
        &self,
        pipeline: &MpsPipeline,
        arguments: &[Argument<'_, Bound<'py, PyAny>>],
        grid: Grid,
    ) -> Result<(), DeviceError> {
        let failed = |reason| DeviceError::Dispatch { entry: pipeline.entry.to_string(), reason };
        self.call(pipeline, arguments, grid).map_err(|error| self.translate(error, failed))
    }
}
