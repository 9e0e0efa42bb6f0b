//! The arguments of `torch.ops.mtlflashattn.forward` as a tuple, in the order of its schema in `_ops.py`.

use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::call::{Numbers, Slot, Tensors};
use crate::error::Result;
use crate::form::Form;

/// Writes a public call as arguments of the operator; packed tensors are taken apart. `rng_state` is there iff something is
/// dropped.
pub fn to_python<'py>(
    py: Python<'py>,
    form: Form,
    numbers: &Numbers,
    tensors: &Tensors<Bound<'py, PyAny>>,
    rng_state: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyTuple>> {
    let inputs = PyTuple::new(py, form.unpack(tensors)?)?;
    let rest = rest_to_python(py, numbers, tensors, rng_state)?;
    Ok(inputs.as_sequence().concat(rest.as_sequence())?.to_tuple()?)
}

/// The arguments behind q, k and v.
pub fn rest_to_python<'py>(
    py: Python<'py>,
    numbers: &Numbers,
    tensors: &Tensors<Bound<'py, PyAny>>,
    rng_state: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyTuple>> {
    let [cu_seqlens_q, cu_seqlens_k] = [Slot::CuSeqlensQ, Slot::CuSeqlensK].map(|slot| tensors.get(slot));
    let [alibi_slopes, bias, sinks] = [Slot::AlibiSlopes, Slot::Bias, Slot::Sinks].map(|slot| tensors.get(slot));
    let Numbers { max_seqlen, softmax_scale, causal, window, softcap, top_left, .. } = *numbers;
    let dropout_p = if rng_state.is_some() { numbers.dropout_p } else { 0.0 };
    let (max_q, max_k) = max_seqlen;
    let (left, right) = window;
    // Tuples convert up to 12 items.
    let first = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, softmax_scale).into_pyobject(py)?;
    let second =
        (causal, left, right, softcap, alibi_slopes, bias, sinks, top_left, dropout_p, rng_state).into_pyobject(py)?;
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
    let (top_left, dropout_p) = (next()?.extract()?, next()?.extract()?);
    let rng_state = present(next()?).map_or(Ok([0; 2]), |tensor| read_rng_state(&tensor))?;
    let numbers = Numbers { max_seqlen, softmax_scale, causal, window, softcap, top_left, dropout_p, rng_state };
    if numbers.dropout().is_ok_and(|dropout| dropout.is_some()) && arguments.get_item(RNG_STATE)?.is_none() {
        return Err(PyTypeError::new_err("rng_state is None; allowed: int64 (2), what the forward pass drew"));
    }
    let boolean_mask = bias.as_ref().map_or(Ok(false), is_boolean)?;
    let form = Form::new(1, cu_seqlens_q.is_some(), boolean_mask);
    let tensors = Tensors::new([q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks]);
    Ok((form, numbers, tensors))
}

/// Place of the random state among the arguments.
const RNG_STATE: usize = 17;

/// Seed and offset from an int64 tensor of two elements.
pub fn read_rng_state(tensor: &Bound<'_, PyAny>) -> PyResult<[u64; 2]> {
    let state: Vec<i64> = tensor.call_method0(intern!(tensor.py(), "tolist"))?.extract()?;
    match *state {
        [seed, offset] => Ok([seed.cast_unsigned(), offset.cast_unsigned()]),
        _ => Err(PyTypeError::new_err(format!("rng_state has {} elements; allowed: 2", state.len()))),
    }
}

fn present(object: Bound<'_, PyAny>) -> Option<Bound<'_, PyAny>> {
    (!object.is_none()).then_some(object)
}

fn is_boolean(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(tensor.getattr("dtype")?.str()?.to_string_lossy() == "torch.bool")
}
