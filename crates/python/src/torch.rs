//! The torch objects that calls use, looked up once.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyByteArray, PyTuple, PyType};

use crate::dlpack::Exchange;

/// Handles on torch.
pub struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    empty_like: Py<PyAny>,
    is_neg: Py<PyAny>,
    float32: Py<PyAny>,
    get_num_threads: Py<PyAny>,
    is_grad_enabled: Py<PyAny>,
    is_any_autocast_enabled: Py<PyAny>,
    function_mode_enabled: Py<PyAny>,
    dispatch_mode_count: Py<PyAny>,
    tracing_state: Py<PyAny>,
    forward_ad: Py<PyAny>,
    /// Reads plain tensors; `None` before torch 2.10.
    pub exchange: Option<Exchange>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    /// The handles, looked up at the first call.
    pub fn get(py: Python<'_>) -> PyResult<&Self> {
        TORCH.get_or_try_init(py, || Self::new(py))
    }

    fn new(py: Python<'_>) -> PyResult<Self> {
        let torch = py.import("torch")?;
        let internals = torch.getattr("_C")?;
        let tensor = torch.getattr("Tensor")?;
        Ok(Self {
            exchange: Exchange::of(&tensor),
            is_neg: tensor.getattr("is_neg")?.unbind(),
            tensor: tensor.cast_into::<PyType>()?.unbind(),
            parameter: torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
            empty_like: torch.getattr("empty_like")?.unbind(),
            float32: torch.getattr("float32")?.unbind(),
            get_num_threads: torch.getattr("get_num_threads")?.unbind(),
            is_grad_enabled: torch.getattr("is_grad_enabled")?.unbind(),
            is_any_autocast_enabled: internals.getattr("_is_any_autocast_enabled")?.unbind(),
            function_mode_enabled: internals.getattr("_is_torch_function_mode_enabled")?.unbind(),
            dispatch_mode_count: internals.getattr("_len_torch_dispatch_stack")?.unbind(),
            tracing_state: internals.getattr("_get_tracing_state")?.unbind(),
            forward_ad: py.import("torch.autograd.forward_ad")?.into_any().unbind(),
        })
    }

    /// Whether `object` is a `torch.Tensor` or `Parameter` itself: no subclass may want to see the call.
    pub fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let object_type = object.get_type_ptr();
        object_type == self.tensor.as_ptr().cast() || object_type == self.parameter.as_ptr().cast()
    }

    /// Whether `object` is a `torch.Tensor` and of no subclass, not even a `Parameter`.
    pub fn is_tensor_itself(&self, object: &Bound<'_, PyAny>) -> bool {
        object.get_type_ptr() == self.tensor.as_ptr().cast()
    }

    /// Whether `object` is a tensor, or something that stands in for one (`__torch_function__`, as `torch.fx.Proxy`).
    pub fn is_tensor_like(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = object.py();
        Ok(object.is_instance(self.tensor.bind(py))? || object.get_type().hasattr(intern!(py, "__torch_function__"))?)
    }

    /// Whether a function or dispatch mode (`FakeTensorMode`, `make_fx`, a default device), `torch.jit.trace` or
    /// forward-mode differentiation wants to see every operation.
    pub fn is_watched(&self, py: Python<'_>) -> PyResult<bool> {
        let level = self.forward_ad.bind(py).getattr(intern!(py, "_current_level"))?;
        Ok(self.function_mode_enabled.bind(py).call0()?.is_truthy()?
            || self.dispatch_mode_count.bind(py).call0()?.is_truthy()?
            || !self.tracing_state.bind(py).call0()?.is_none()
            || level.extract::<i64>()? >= 0)
    }

    /// `torch.is_grad_enabled()`.
    pub fn is_grad_enabled(&self, py: Python<'_>) -> PyResult<bool> {
        self.is_grad_enabled.bind(py).call0()?.is_truthy()
    }

    /// Whether autocast is on for any device.
    pub fn is_any_autocast_enabled(&self, py: Python<'_>) -> PyResult<bool> {
        self.is_any_autocast_enabled.bind(py).call0()?.is_truthy()
    }

    /// `tensor.is_neg()`: whether memory holds the values with the wrong sign.
    pub fn is_negated(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.is_neg.bind(tensor.py()).call1((tensor,))?.is_truthy()
    }

    /// `torch.get_num_threads()`.
    pub fn num_threads(&self, py: Python<'_>) -> PyResult<usize> {
        self.get_num_threads.bind(py).call0()?.extract()
    }

    /// `torch.empty_like(tensor)`.
    pub fn empty_like<'py>(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.empty_like.bind(tensor.py()).call1((tensor,))
    }

    /// A contiguous tensor of `shape` with the dtype and device of `like`.
    pub fn new_empty<'py>(like: &Bound<'py, PyAny>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        like.call_method1(intern!(py, "new_empty"), (PyTuple::new(py, shape)?,))
    }

    /// A contiguous float32 tensor of `shape` on the device of `like`.
    pub fn new_empty_float32<'py>(&self, like: &Bound<'py, PyAny>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        let arguments = (PyTuple::new(py, shape)?,);
        let keywords = [(intern!(py, "dtype"), self.float32.bind(py))].into_py_dict(py)?;
        like.call_method(intern!(py, "new_empty"), arguments, Some(&keywords))
    }

    /// A tensor of `values`, which must not be empty, in `dtype` on the device of `like`, whatever the default device is.
    pub fn vector<'py>(like: &Bound<'py, PyAny>, values: &[f64], dtype: &str) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        let torch = py.import("torch")?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let keywords = [("dtype", torch.getattr("float64")?)].into_py_dict(py)?;
        let here = torch.call_method("frombuffer", (PyByteArray::new(py, &bytes),), Some(&keywords))?;
        // In this order: an Apple GPU has no float64.
        here.call_method1("to", (torch.getattr(dtype)?,))?.call_method1("to", (like.getattr("device")?,))
    }

    /// An int64 tensor of `values` on the device of `like`, whatever the default device is.
    pub fn indices<'py>(like: &Bound<'py, PyAny>, values: &[i64]) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        let torch = py.import("torch")?;
        let int64 = torch.getattr("int64")?;
        if values.is_empty() {
            let keywords = [("dtype", int64)].into_py_dict(py)?;
            return like.call_method("new_empty", ((0,),), Some(&keywords));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let keywords = [("dtype", int64)].into_py_dict(py)?;
        let here = torch.call_method("frombuffer", (PyByteArray::new(py, &bytes),), Some(&keywords))?;
        here.call_method1("to", (like.getattr("device")?,))
    }

    /// The elements of a tensor of any device.
    pub fn to_f64s(tensor: &Bound<'_, PyAny>) -> PyResult<Vec<f64>> {
        let float64 = tensor.py().import("torch")?.getattr("float64")?;
        // In this order: an Apple GPU has no float64.
        let here = tensor.call_method1("to", ("cpu",))?.call_method1("to", (float64,))?;
        here.call_method0("flatten")?.call_method0("tolist")?.extract()
    }
}
