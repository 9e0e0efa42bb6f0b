//! The arguments of the operators over a cache as a tuple, in the order of their schema in `_cache_ops.py`.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::call::CacheNumbers;
use crate::call::{Numbers, Slot, Tensors};
use crate::error::Result;

/// The tensors, in their order.
const TENSORS: [Slot; 15] = [
    Slot::Q,
    Slot::K,
    Slot::V,
    Slot::NewK,
    Slot::NewV,
    Slot::RotaryCos,
    Slot::RotarySin,
    Slot::CacheSeqlens,
    Slot::CacheBatchIdx,
    Slot::CacheLeftpad,
    Slot::BlockTable,
    Slot::CuSeqlensQ,
    Slot::CuSeqlensK,
    Slot::AlibiSlopes,
    Slot::Sinks,
];

/// Writes a call as arguments.
pub fn to_python<'py>(
    py: Python<'py>,
    numbers: &CacheNumbers,
    tensors: &Tensors<Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyTuple>> {
    let CacheNumbers { common, max_key_len, cache_len, interleaved, splits } = *numbers;
    let Numbers { max_seqlen, softmax_scale, causal, window, softcap, top_left, .. } = common;
    let rest = (
        cache_len,
        max_seqlen.0,
        max_key_len,
        softmax_scale,
        causal,
        window.0,
        window.1,
        softcap,
        top_left,
        interleaved,
        splits,
    );
    let first = PyTuple::new(py, TENSORS.map(|slot| tensors.get(slot)))?;
    Ok(first.as_sequence().concat(rest.into_pyobject(py)?.as_sequence())?.to_tuple()?)
}

/// The inverse of [`to_python`].
pub fn from_python<'py>(arguments: &Bound<'py, PyTuple>) -> PyResult<(CacheNumbers, Tensors<Bound<'py, PyAny>>)> {
    let mut items = arguments.iter();
    let mut next = || items.next().ok_or_else(|| PyTypeError::new_err("too few arguments"));
    let mut tensors = Tensors::none();
    for slot in TENSORS {
        let item = next()?;
        if !item.is_none() {
            tensors.set(slot, item);
        }
    }
    let cache_len = next()?.extract()?;
    let max_seqlen = (next()?.extract()?, 0);
    let max_key_len = next()?.extract()?;
    let (softmax_scale, causal) = (next()?.extract()?, next()?.extract()?);
    let (window, softcap) = ((next()?.extract()?, next()?.extract()?), next()?.extract()?);
    let (top_left, interleaved, splits) = (next()?.extract()?, next()?.extract()?, next()?.extract()?);
    let common =
        Numbers { max_seqlen, softmax_scale, causal, window, softcap, top_left, dropout_p: 0.0, rng_state: [0; 2] };
    Ok((CacheNumbers { common, max_key_len, cache_len, interleaved, splits }, tensors))
}
