//! Forms of `scaled_dot_product_attention` calls that are known to be torch's, asked at every call.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBoolMethods, PyDict, PyString, PyTuple};

use crate::execute::read_plain;
use crate::tensor::{Element, MAX_DIMS, Place, View};
use crate::torch::Torch;

/// Whatever decides whether shapes are served and a gate opens.
///
/// No gradient of a mask, dropout, scale, devices of k and v or surroundings: a decision that depends on them must not be kept.
#[derive(PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools, reason = "arguments are given or not")]
struct Form {
    place: Place,
    elements: [Element; 3],
    mask: Option<Element>,
    is_causal: bool,
    enable_gqa: bool,
    needs_gradient: bool,
    is_query_contiguous: bool,
    ranks: [usize; 3],
    shapes: [[i64; MAX_DIMS]; 3],
}

impl Form {
    /// The form of a call; `None` where it takes more to know it: autocast, subclasses, odd arguments, no memory.
    fn of(
        query: &Bound<'_, PyAny>,
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        options: &Bound<'_, PyTuple>,
        named: &Bound<'_, PyDict>,
    ) -> PyResult<Option<Self>> {
        let py = query.py();
        let torch = Torch::get(py)?;
        if torch.is_any_autocast_enabled(py)? {
            return Ok(None);
        }
        let read = |tensor: &Bound<'_, PyAny>| {
            if torch.is_tensor_itself(tensor) { Ok(read_plain(torch, tensor)?) } else { PyResult::Ok(None) }
        };
        let (Some(q), Some(k), Some(v)) = (read(query)?, read(key)?, read(value)?) else { return Ok(None) };
        let mask = match argument(options, 0, named, intern!(py, "attn_mask"))? {
            None => None,
            Some(mask) if mask.is_none() => None,
            Some(mask) => match read(&mask)? {
                Some(view) => Some(view.element),
                None => return Ok(None),
            },
        };
        let is_causal = flag(argument(options, 2, named, intern!(py, "is_causal"))?);
        let enable_gqa = flag(named.get_item(intern!(py, "enable_gqa"))?);
        let (Some(is_causal), Some(enable_gqa)) = (is_causal, enable_gqa) else { return Ok(None) };
        let mut needs_gradient = false;
        for tensor in [query, key, value] {
            needs_gradient |= tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()?;
        }
        // In this order: most calls need none, and every question counts.
        needs_gradient = needs_gradient && torch.is_grad_enabled(py)?;
        let views = [&q, &k, &v];
        Ok(Some(Self {
            place: q.place,
            elements: views.map(|view| view.element),
            mask,
            is_causal,
            enable_gqa,
            needs_gradient,
            is_query_contiguous: q.is_contiguous(),
            ranks: views.map(|view| view.shape().len()),
            shapes: views.map(View::padded_shape),
        }))
    }
}

/// An argument that may come by place or by name.
fn argument<'py>(
    options: &Bound<'py, PyTuple>,
    place: usize,
    named: &Bound<'py, PyDict>,
    name: &Bound<'py, PyString>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    if place < options.len() { options.get_item(place).map(Some) } else { named.get_item(name) }
}

/// A bool that is False by default; `None` for what is no bool.
fn flag(value: Option<Bound<'_, PyAny>>) -> Option<bool> {
    value.map_or(Some(false), |value| value.cast_exact::<PyBool>().ok().map(PyBoolMethods::is_true))
}

/// A bounded set of forms.
#[pyclass(frozen, module = "metal_flash_attn._native")]
pub struct ShutForms {
    forms: Mutex<HashSet<Form>>,
    most: usize,
}

#[pymethods]
impl ShutForms {
    #[new]
    fn new(most: usize) -> Self {
        Self { forms: Mutex::default(), most }
    }

    /// Whether the form of this call is among them; False for what has none. Never raises.
    fn holds(
        &self,
        query: &Bound<'_, PyAny>,
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        options: &Bound<'_, PyTuple>,
        named: &Bound<'_, PyDict>,
    ) -> bool {
        let Ok(Some(form)) = Form::of(query, key, value, options, named) else { return false };
        self.forms.lock().unwrap_or_else(PoisonError::into_inner).contains(&form)
    }

    /// Adds the form of a call, if it has one.
    fn add(
        &self,
        query: &Bound<'_, PyAny>,
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        options: &Bound<'_, PyTuple>,
        named: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        if let Some(form) = Form::of(query, key, value, options, named)? {
            let mut forms = self.forms.lock().unwrap_or_else(PoisonError::into_inner);
            // Lengths that never come again must not fill the memory.
            if forms.len() >= self.most {
                forms.clear();
            }
            forms.insert(form);
        }
        Ok(())
    }

    fn __len__(&self) -> usize {
        self.forms.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
