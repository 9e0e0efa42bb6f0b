//! The arguments of `torch.ops.mtlflashattn.forward` as a tuple, in the order of its schema in `_ops.py`.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::call::{Numbers, Slot, Tensors};
use crate::error::Result;
use crate::form::Form;

/// Writes a public call as arguments of the operator; packed tensors are taken apart.
pub fn to_python<'py>(
    py: Python<'py>,
    form: Form,
    numbers: &Numbers,
    tensors: &Tensors<Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyTuple>> {
    let inputs = PyTuple::new(py, form.unpack(tensors)?)?;
    let rest = rest_to_python(py, numbers, tensors)?;
    Ok(inputs.as_sequence().concat(rest.as_sequence())?.to_tuple()?)
}

/// The arguments behind q, k and v.
pub fn rest_to_python<'py>(
    py: Python<'py>,
    numbers: &Numbers,
    tensors: &Tensors<Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyTuple>> {
    let [cu_seqlens_q, cu_seqlens_k] = [Slot::CuSeqlensQ, Slot::CuSeqlensK].map(|slot| tensors.get(slot));
    let [alibi_slopes, bias, sinks] = [Slot::AlibiSlopes, Slot::Bias, Slot::Sinks].map(|slot| tensors.get(slot));
    let Numbers { max_seqlen, softmax_scale, causal, window, softcap, top_left } = *numbers;
    let (max_q, max_k) = max_seqlen;
    let (left, right) = window;
    // Tuples convert up to 12 items.
    let first = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, softmax_scale).into_pyobject(py)?;
    let second = (causal, left, right, softcap, alibi_slopes, bias, sinks, top_left).into_pyobject(py)?;
    Ok(first.as_sequence().concat(second.as_sequence())?.to_tuple()?)
}

/// The inverse of [`to_python`]; q, k and v stay apart.
pub fn from_python<'py>(arguments: &Bound<'py, PyTuple>) -> PyResult<(Form, Numbers, Tensors<Bound<'py, PyAny>>)> {
    let mut items = arguments.iter();
    let mut next = || items.next().ok_or_else(|| PyTypeError::new_err("too few arguments"));
    let [q, k, v] = [Some(next()?), Some(next()?), Some(next()?)];
    let (cu_seqlens_q, cu_seqlens_k) = (present(next()?), present(next()?));
    let max_seqlen = (next()?.extract()?, next()?.extract()?);
    let (softmax_scale, causal) = (next()?.extract()?, next()?.extract()?);
    let (window, softcap) = ((next()?.extract()?, next()?.extract()?), next()?.extract()?);
    let (alibi_slopes, bias, sinks) = (present(next()?), present(next()?), present(next()?));
    let top_left = next()?.extract()?;
    let numbers = Numbers { max_seqlen, softmax_scale, causal, window, softcap, top_left };
    let boolean_mask = bias.as_ref().map_or(Ok(false), is_boolean)?;
    let form = Form::new(1, cu_seqlens_q.is_some(), boolean_mask);
    let tensors = Tensors::new([q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks]);
    Ok((form, numbers, tensors))
}

fn present(object: Bound<'_, PyAny>) -> Option<Bound<'_, PyAny>> {
    (!object.is_none()).then_some(object)
}

fn is_boolean(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(tensor.getattr("dtype")?.str()?.to_string_lossy() == "torch.bool")
}
