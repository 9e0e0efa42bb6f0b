//! The decode tier on a Metal device: one launch, and a second one that merges where keys are split.

use std::sync::Arc;

use mtlflashattn_core::Settings;
use mtlflashattn_core::settings::Probe;
use mtlflashattn_metal::{DecodeLaunch, DecodeTensors, Kernel, MergeKernel, Outputs};
use pyo3::prelude::*;

use crate::kernels::State;
use crate::metal::{Attention, Fault, Home, Objection, Operand};
use crate::tensor::View;
use crate::torch::Torch;
use crate::variant::AnyKernel;

/// Launches a decode kernel.
pub fn dispatch<'py, H: Home<'py>>(
    home: &H,
    call: &Attention<'_, 'py>,
    outputs: &Outputs,
    pipeline: &H::Pipeline,
) -> Result<(), Objection> {
    let Attention { problem, kernel, splits, operands, cache } = *call;
    let launch = DecodeLaunch::new(problem, kernel, outputs, splits)
        .map_err(|error| Objection::Other(Fault::Failed(error.to_string())))?;
    if launch.is_empty() {
        return Ok(());
    }
    let merge = launch.merge.map(|grid| Ok::<_, Objection>((merge_pipeline(home, kernel)?, grid))).transpose()?;
    let partials = scratch(&operands.q.object, launch.partial_floats)
        .map_err(|exception| Objection::Other(Fault::Failed(format!("no memory for partial results: {exception}"))))?;
    // A tensor without elements has no memory to bind, and nobody reads it.
    let buffer = |operand: &Operand<'py>| home.buffer(if operand.view.is_empty() { &operands.out } else { operand });
    let tensors = DecodeTensors {
        forward: operands.map(buffer),
        partials: partials.as_ref().map(buffer),
        cache: cache.map(buffer),
    };
    let borrowed = DecodeTensors {
        forward: tensors.forward.map(|buffer| buffer),
        partials: tensors.partials.as_ref(),
        cache: tensors.cache.map(|buffer| buffer),
    };
    let arguments = launch.arguments(&borrowed);
    home.dispatch(pipeline, &arguments, launch.grid).map_err(|error| Objection::new(home, error))?;
    let Some((merge, grid)) = merge else { return Ok(()) };
    home.dispatch(&merge, &arguments, grid).map_err(|error| Objection::new(home, error))
}

/// Uninitialised float32 values on the device of `like`.
fn scratch<'py>(like: &Bound<'py, PyAny>, count: usize) -> PyResult<Option<Operand<'py>>> {
    if count == 0 {
        return Ok(None);
    }
    let object = Torch::get(like.py())?.new_empty_float32(like, &[count])?;
    let view = match View::read_attributes(&object) {
        Some(view) => Some(view),
        None => View::describe(&object)?,
    };
    Ok(view.map(|view| Operand { object, view }))
}

/// The kernel that merges what `kernel` leaves. It has no verdict of its own: whoever proves `kernel` proves both.
fn merge_pipeline<'py, H: Home<'py>>(home: &H, kernel: &Kernel) -> Result<Arc<H::Pipeline>, Objection> {
    let merge = MergeKernel::of(kernel);
    let key = AnyKernel::Merge(merge);
    if let Some(State::Ready(pipeline)) = H::kernels().get(&key, Settings::DEFAULT.probe) {
        return Ok(pipeline);
    }
    let pipeline = home.pipeline(&merge.source(), merge.entry()).map_err(|error| Objection::new(home, error))?;
    let pipeline = Arc::new(pipeline);
    H::kernels().insert(key, State::Ready(Arc::clone(&pipeline)), Probe::Force);
    Ok(pipeline)
}
