//! Runs the small problems of a kernel on a device, with torch tensors.

use mtlflashattn_metal::probe::{Element, Memory, SmallAppend, SmallBackward, SmallProblem};
use mtlflashattn_metal::{AppendKernel, BackwardKernel, Kernel};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::append;
use crate::differentiate;
use crate::execute::unreadable;
use crate::metal::{Attention, Fault, Home, Objection, Operand, dispatch};
use crate::tensor::View;
use crate::torch::Torch;
use crate::variant::AnyKernel;

/// Launches all small problems of `kernel` on the device of `like`, waits for them and judges the results. Returns how
/// many there were.
pub fn check<'py, H: Home<'py>>(
    home: &H,
    kernel: &AnyKernel,
    pipeline: &H::Pipeline,
    like: &Bound<'py, PyAny>,
) -> Result<u32, Objection> {
    match kernel {
        AnyKernel::Forward(kernel) => check_forward(home, kernel, pipeline, like),
        AnyKernel::Backward(kernel) => check_backward(home, kernel, pipeline, like),
        AnyKernel::Append(kernel) => check_append(home, *kernel, pipeline, like),
        // Whoever proves the kernel whose results it merges proves both.
        AnyKernel::Merge(_) => Ok(0),
    }
}

fn check_forward<'py, H: Home<'py>>(
    home: &H,
    kernel: &Kernel,
    pipeline: &H::Pipeline,
    like: &Bound<'py, PyAny>,
) -> Result<u32, Objection> {
    let problems = SmallProblem::all(kernel).map_err(no_problem)?;
    let mut runs = Vec::with_capacity(problems.len());
    for small in &problems {
        let operands = small.tensors.try_map(|memory| operand(memory, like));
        let cache = small.cache.try_map(|memory| operand(memory, like));
        let available = |error| unavailable(like.py(), error);
        runs.push((small, operands.map_err(available)?, cache.map_err(available)?));
    }
    // Nothing but launches from here on: whoever copies to the GPU may be told what went wrong there.
    for (small, operands, cache) in &runs {
        let SmallProblem { problem, splits, .. } = small;
        dispatch(home, &Attention { problem, kernel, splits: *splits, operands, cache }, pipeline)?;
    }
    for (small, operands, _) in &runs {
        let lse = operands.lse.as_ref().zip(small.tensors.lse.as_ref());
        let pairs = [(&operands.out, &small.tensors.out)].into_iter().chain(lse);
        judge(like.py(), pairs, |results| small.judge(&results[0], results.get(1).map(Vec::as_slice)))?;
    }
    Ok(runs.len() as u32)
}

fn check_backward<'py, H: Home<'py>>(
    home: &H,
    kernel: &BackwardKernel,
    pipeline: &H::Pipeline,
    like: &Bound<'py, PyAny>,
) -> Result<u32, Objection> {
    let problems = SmallBackward::all(kernel).map_err(no_problem)?;
    let mut runs = Vec::with_capacity(problems.len());
    for small in &problems {
        let operands = small.tensors.try_map(|memory| operand(memory, like));
        runs.push((small, operands.map_err(|error| unavailable(like.py(), error))?));
    }
    for (small, operands) in &runs {
        differentiate::dispatch(home, &small.problem, kernel, pipeline, operands)?;
    }
    for (small, operands) in &runs {
        let pairs = operands.written(kernel.pass).into_iter().zip(small.tensors.written(kernel.pass));
        judge(like.py(), pairs, |results| small.judge(results))?;
    }
    Ok(runs.len() as u32)
}

fn check_append<'py, H: Home<'py>>(
    home: &H,
    kernel: AppendKernel,
    pipeline: &H::Pipeline,
    like: &Bound<'py, PyAny>,
) -> Result<u32, Objection> {
    let problems = SmallAppend::all(&kernel).map_err(no_problem)?;
    let mut runs = Vec::with_capacity(problems.len());
    for small in &problems {
        let operands = small.tensors.try_map(|memory| operand(memory, like));
        runs.push((small, operands.map_err(|error| unavailable(like.py(), error))?));
    }
    for (small, operands) in &runs {
        append::dispatch(home, &small.problem, &small.append, pipeline, operands)?;
    }
    for (small, operands) in &runs {
        let pairs = operands.written().into_iter().zip(small.tensors.written());
        judge(like.py(), pairs, |results| small.judge(results))?;
    }
    Ok(runs.len() as u32)
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn no_problem(error: mtlflashattn_core::Error) -> Objection {
    Objection::Other(Fault::Failed(format!("there is no small problem for this kernel: {error}")))
}

/// Objects to the kernel where `judge` finds something wrong with the memory of its results.
fn judge<'a, 'py: 'a>(
    py: Python<'py>,
    results: impl Iterator<Item = (&'a Operand<'py>, &'a Memory)>,
    judge: impl FnOnce(&[Vec<f64>]) -> Option<String>,
) -> Result<(), Objection> {
    let read = |(operand, memory): (&Operand<'py>, &Memory)| {
        Torch::to_f64s(&operand.object.call_method1("as_strided", ((memory.values.len(),), (1,)))?)
    };
    let wrong = match results.map(read).collect::<PyResult<Vec<_>>>() {
        Ok(results) => judge(&results),
        // A kernel that the GPU stopped shows when somebody waits for it.
        Err(error) if error.is_instance_of::<PyException>(py) => Some(format!("no results came back: {error}")),
        Err(error) => return Err(Objection::Other(error.into())),
    };
    wrong.map_or(Ok(()), |wrong| Err(Objection::Kernel(format!("in the check before its first use, {wrong}"))))
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
