//! The backward pass on a Metal device: kernel after kernel.

use mtlflashattn_core::plan::{BackwardPass, BackwardTile};
use mtlflashattn_core::{Problem, Settings, Strides};
use mtlflashattn_metal::{BackwardKernel, BackwardLaunch, BackwardOutputs, BackwardTensors};
use pyo3::prelude::*;

use crate::kernels::Refusal;
use crate::metal::{Fault, Home, MetalDevice, Objection, Operand, serve};
use crate::mps::Mps;
use crate::simulated::Simulated;
use crate::variant::AnyKernel;

/// The tensors of a call.
pub type Operands<'py> = BackwardTensors<Operand<'py>>;

/// The kernels of a plan, in the order in which they run.
pub type Passes = [(BackwardPass, BackwardTile)];

impl MetalDevice {
    /// Computes gradients of `problem` by the kernels of `passes`, as [`MetalDevice::attend`] computes the problem.
    pub fn differentiate<'py>(
        self,
        py: Python<'py>,
        problem: &Problem,
        passes: &Passes,
        operands: &Operands<'py>,
        settings: &Settings,
    ) -> Result<(), Fault> {
        let Operands { q, k, v, out, d_out, .. } = operands;
        let starts = self.starts([q, k, v, out, d_out])?;
        match self {
            Self::Mps => run(&Mps::new(py), problem, passes, operands, starts, settings),
            Self::Simulator => run(&Simulated::new(py), problem, passes, operands, starts, settings),
        }
    }

    /// Why this device refuses a kernel of `passes`, aligned or not, with a gradient of the LSE or without, as far as this or
    /// an earlier process knows.
    pub fn backward_refusal(
        self,
        py: Python<'_>,
        problem: &Problem,
        passes: &Passes,
        settings: &Settings,
    ) -> PyResult<Option<Refusal>> {
        for &(pass, tile) in passes {
            for lse_gradient in [false, true] {
                let kernel = BackwardKernel::new(pass, problem, tile, lse_gradient);
                for aligned in [false, true] {
                    let mut kernel = kernel;
                    kernel.features.aligned = aligned;
                    if let Some(refusal) = self.refusal(py, &AnyKernel::Backward(kernel), settings)? {
                        return Ok(Some(refusal));
                    }
                }
            }
        }
        Ok(None)
    }
}

fn run<'py, H: Home<'py>>(
    home: &H,
    problem: &Problem,
    passes: &Passes,
    operands: &Operands<'py>,
    starts: [usize; 5],
    settings: &Settings,
) -> Result<(), Fault> {
    let outputs = outputs(problem, operands);
    for &(pass, tile) in passes {
        let kernel = BackwardKernel::new(pass, problem, tile, operands.d_lse.is_some());
        let kernel = kernel.aligned(problem, &outputs, starts);
        serve(home, AnyKernel::Backward(kernel), &operands.q.object, settings, |pipeline| {
            dispatch(home, problem, &kernel, pipeline, operands)
        })?;
    }
    Ok(())
}

fn outputs(problem: &Problem, operands: &Operands<'_>) -> BackwardOutputs {
    BackwardOutputs::of(&operands.map(|operand| Strides::of(&operand.view.meta(problem.dtype))))
}

/// Launches `kernel`.
pub fn dispatch<'py, H: Home<'py>>(
    home: &H,
    problem: &Problem,
    kernel: &BackwardKernel,
    pipeline: &H::Pipeline,
    operands: &Operands<'py>,
) -> Result<(), Objection> {
    let launch = BackwardLaunch::new(problem, kernel, &outputs(problem, operands))
        .map_err(|error| Objection::Other(Fault::Failed(error.to_string())))?;
    let written = operands.written(kernel.pass);
    let Some(&filler) = written.iter().find(|operand| !operand.view.is_empty()).filter(|_| !launch.is_empty()) else {
        return Ok(());
    };
    // A tensor without elements has no memory to bind, and nobody reads it.
    let buffers = operands.map(|operand| home.buffer(if operand.view.is_empty() { filler } else { operand }));
    let arguments = launch.arguments(&buffers.map(|buffer| buffer));
    home.dispatch(pipeline, &arguments, launch.grid).map_err(|error| Objection::new(home, error))
}
