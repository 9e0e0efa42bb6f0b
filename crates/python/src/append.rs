//! New keys for a cache on a Metal device, and rotary embeddings.

use mtlflashattn_core::{Append, Problem, Settings, Strides};
use mtlflashattn_metal::{AppendKernel, AppendLaunch, AppendTensors};
use pyo3::prelude::*;

use crate::metal::{Fault, Home, MetalDevice, Objection, Operand, serve};
use crate::mps::Mps;
use crate::simulated::Simulated;
use crate::variant::AnyKernel;

/// The tensors of a call.
pub type Operands<'py> = AppendTensors<Operand<'py>>;

impl MetalDevice {
    /// Writes new keys and values into the cache of `problem`, rotated where `append` says so, and rotates queries. Nothing
    /// is waited for, but at the first use of a kernel; contents of buffers are read on the device alone.
    pub fn append<'py>(
        self,
        py: Python<'py>,
        problem: &Problem,
        append: &Append,
        operands: &Operands<'py>,
        settings: &Settings,
    ) -> Result<(), Fault> {
        match self {
            Self::Mps => run(&Mps::new(py), problem, append, operands, settings),
            Self::Simulator => run(&Simulated::new(py), problem, append, operands, settings),
        }
    }
}

fn run<'py, H: Home<'py>>(
    home: &H,
    problem: &Problem,
    append: &Append,
    operands: &Operands<'py>,
    settings: &Settings,
) -> Result<(), Fault> {
    let kernel = AppendKernel::new(problem, append);
    serve(home, AnyKernel::Append(kernel), &operands.new_keys.object, settings, |pipeline| {
        dispatch(home, problem, append, pipeline, operands)
    })
}

/// Launches the append kernel.
pub fn dispatch<'py, H: Home<'py>>(
    home: &H,
    problem: &Problem,
    append: &Append,
    pipeline: &H::Pipeline,
    operands: &Operands<'py>,
) -> Result<(), Objection> {
    let rotated = operands.rotary.as_ref().map(|rotary| Strides::of(&rotary.rotated.view.meta(problem.dtype)));
    let launch = AppendLaunch::new(problem, append, rotated.unwrap_or_default())
        .map_err(|error| Objection::Other(Fault::Failed(error.to_string())))?;
    let written = operands.written();
    let Some(&filler) = written.iter().find(|operand| !operand.view.is_empty()).filter(|_| !launch.is_empty()) else {
        return Ok(());
    };
    // A tensor without elements has no memory to bind, and nobody reads it.
    let buffers = operands.map(|operand| home.buffer(if operand.view.is_empty() { filler } else { operand }));
    let arguments = launch.arguments(&buffers.map(|buffer| buffer));
    home.dispatch(pipeline, &arguments, launch.grid).map_err(|error| Objection::new(home, error))
}
