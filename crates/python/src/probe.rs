//! Runs the small problems of a kernel on a device, with torch tensors.

use mtlflashattn_metal::Kernel;
use mtlflashattn_metal::probe::{Element, Memory, SmallProblem};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::execute::unreadable;
use crate::metal::{Fault, Home, Objection, Operand, Operands, dispatch};
use crate::tensor::View;
use crate::torch::Torch;

/// Launches all small problems of `kernel` on the device of `like`, waits for them and judges the results. Returns how
/// many there were.
pub fn check<'py, H: Home<'py>>(
    home: &H,
    kernel: &Kernel,
    pipeline: &H::Pipeline,
    like: &Bound<'py, PyAny>,
) -> Result<u32, Objection> {
    let problems = SmallProblem::all(kernel).map_err(|error| {
        Objection::Other(Fault::Failed(format!("there is no small problem for this kernel: {error}")))
    })?;
    let mut runs = Vec::with_capacity(problems.len());
    for small in &problems {
        let operands = small.tensors.try_map(|memory| operand(memory, like));
        runs.push((small, operands.map_err(|error| unavailable(like.py(), error))?));
    }
    // Nothing but launches from here on: whoever copies to the GPU may be told what went wrong there.
    for (small, operands) in &runs {
        dispatch(home, &small.problem, kernel, pipeline, operands)?;
    }
    for (small, operands) in &runs {
        let wrong = match results(small, operands) {
            Ok((out, lse)) => small.judge(&out, lse.as_deref()),
            // A kernel that the GPU stopped shows when somebody waits for it.
            Err(error) if error.is_instance_of::<PyException>(like.py()) => {
                Some(format!("no results came back: {error}"))
            }
            Err(error) => return Err(Objection::Other(error.into())),
        };
        if let Some(wrong) = wrong {
            return Err(Objection::Kernel(format!("in the check before its first use, {wrong}")));
        }
    }
    Ok(runs.len() as u32)
}

/// What keeps small tensors from being made: nothing that the kernel has done.
fn unavailable(py: Python<'_>, error: PyErr) -> Objection {
    if error.is_instance_of::<PyException>(py) {
        Objection::Other(Fault::Failed(format!("no memory for the check before its first use: {error}")))
    } else {
        Objection::Other(error.into())
    }
}

fn operand<'py>(memory: &Memory, like: &Bound<'py, PyAny>) -> PyResult<Operand<'py>> {
    let dtype = match memory.element {
        Element::Float(dtype) => dtype.name(),
        Element::Int32 => "int32",
        Element::Bool => "bool",
    };
    let py = like.py();
    let sizes = (PyTuple::new(py, &memory.shape)?, PyTuple::new(py, &memory.strides)?);
    let object = Torch::vector(like, &memory.values, dtype)?.call_method1("as_strided", sizes)?;
    let view = match View::read_attributes(&object) {
        Some(view) => view,
        None => View::describe(&object)?.ok_or_else(|| unreadable("q"))?,
    };
    Ok(Operand { object, view })
}

/// The memory of out and lse, once the device has computed them.
fn results(small: &SmallProblem, operands: &Operands<'_>) -> PyResult<(Vec<f64>, Option<Vec<f64>>)> {
    let read = |operand: &Operand<'_>, memory: &Memory| {
        Torch::to_f64s(&operand.object.call_method1("as_strided", ((memory.values.len(),), (1,)))?)
    };
    let lse = operands.lse.as_ref().zip(small.tensors.lse.as_ref());
    let lse = lse.map(|(operand, memory)| read(operand, memory)).transpose()?;
    Ok((read(&operands.out, &small.tensors.out)?, lse))
}
