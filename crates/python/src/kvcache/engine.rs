//! A call over a cache on the engine for CPU tensors: append, then attend.

use std::ptr;

use mtlflashattn_core::{CpuTile, Problem, Strides};
use mtlflashattn_cpu::{self as cpu, AppendInputs, AppendOutputs, Inputs, Isa};
use pyo3::intern;
use pyo3::prelude::*;

use super::Call;
use crate::call::{Slot, Tensors};
use crate::error::Result;
use crate::execute::{Pointers, Results, read_result, run_cpu};
use crate::tensor::View;
use crate::torch::Torch;

/// The plan of a call.
pub struct Engine<'a> {
    pub problem: &'a Problem,
    pub tile: &'a CpuTile,
    pub isa: Isa,
    pub threads: usize,
    /// Too small for releasing the GIL.
    pub small: bool,
}

/// What the append reads and writes.
struct AppendPointers<'a> {
    inputs: AppendInputs<'a>,
    outputs: AppendOutputs,
}

// SAFETY: the tensors behind the pointers are kept alive by the arguments of the Python call, on whichever thread the
// GIL is released.
unsafe impl Send for AppendPointers<'_> {}
// SAFETY: as above; the engine divides the outputs among its threads.
unsafe impl Sync for AppendPointers<'_> {}

impl Engine<'_> {
    /// Appends what there is to append, and writes attention into `results`.
    pub fn run<'py>(
        &self,
        py: Python<'py>,
        torch: &Torch,
        call: &Call<'_, 'py>,
        views: &Tensors<View>,
        results: &Results<'py>,
    ) -> Result<()> {
        let Self { tile, isa, threads, small, .. } = *self;
        let rotary = call.cached.append.is_some_and(|append| append.rotary.is_some());
        let rotated =
            rotary.then(|| read_result(torch, Torch::new_empty(call.objects.q(), &sizes(views.q()))?)).transpose()?;
        let rotated_view = rotated.as_ref().map(|(_alive, view)| view);
        let append = match &call.cached.append {
            Some(append) => Some((append, self.append_pointers(call, views, rotated_view)?)),
            None => None,
        };
        let pointers = Pointers::new(&call.cached.described, views, &call.contents.offsets, results);
        let mut problem = *self.problem;
        let mut inputs = Inputs { cache: call.contents.buffers(), ..pointers.inputs };
        if let Some((_, append)) = &append {
            (inputs.k, inputs.v) = (append.outputs.k_cache.cast_const(), append.outputs.v_cache.cast_const());
        }
        if let Some(view) = rotated_view {
            inputs.q = view.data;
            problem.q = Strides::of(&view.meta(problem.dtype));
        }
        let pointers = Pointers { inputs, ..pointers };
        run_cpu(py, small, |interrupted| {
            let Pointers { inputs, outputs } = &pointers;
            if let Some((append, AppendPointers { inputs, outputs })) = &append {
                // SAFETY: shapes, strides, contents and alignment were checked; the caches overlap nothing that is read,
                // and the rotated queries are fresh.
                unsafe { cpu::append(self.problem, append, isa, threads, inputs, outputs)? };
            }
            // SAFETY: as above; the results are fresh.
            unsafe { cpu::forward(&problem, tile, isa, threads, inputs, outputs, interrupted) }
        })
    }

    fn append_pointers<'a>(
        &self,
        call: &Call<'a, '_>,
        views: &Tensors<View>,
        rotated: Option<&View>,
    ) -> Result<AppendPointers<'a>> {
        let first = |slot| views.get(slot).map_or(ptr::null(), |view| view.data.cast_const());
        let inputs = AppendInputs {
            k: first(Slot::NewK),
            v: first(Slot::NewV),
            cos: first(Slot::RotaryCos),
            sin: first(Slot::RotarySin),
            q: first(Slot::Q),
            query_offsets: &call.contents.offsets.query,
            cache: call.contents.buffers(),
        };
        let outputs = AppendOutputs {
            k_cache: writable(call.objects.get(Slot::K))?,
            v_cache: writable(call.objects.get(Slot::V))?,
            q: rotated.map_or(ptr::null_mut(), |view| view.data),
            q_strides: rotated.map_or_else(Strides::default, |view| Strides::of(&view.meta(self.problem.dtype))),
        };
        Ok(AppendPointers { inputs, outputs })
    }
}

/// The address to write a tensor at: torch makes a tensor that is a lazy copy real when it is asked for this.
fn writable(tensor: Option<&Bound<'_, PyAny>>) -> PyResult<*mut u8> {
    let Some(tensor) = tensor else { return Ok(ptr::null_mut()) };
    let address: usize = tensor.call_method0(intern!(tensor.py(), "data_ptr"))?.extract()?;
    Ok(ptr::with_exposed_provenance_mut(address))
}

fn sizes(view: &View) -> Vec<usize> {
    view.shape().iter().map(|&size| size as usize).collect()
}
