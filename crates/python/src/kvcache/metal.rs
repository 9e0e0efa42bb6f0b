//! Attention over a cache by Metal kernels: one launch that appends, then those of the decode tier. On MPS nothing is read
//! on the host: kernels bring what wrong contents claim back into the tensors.

use mtlflashattn_core::plan::decode;
use mtlflashattn_core::{CacheLengths, Demotions, Device, Planner, Problem, Strides, Tier};
use mtlflashattn_metal::{AppendTensors, CacheTensors, RotaryTensors, Tensors as LaunchTensors};
use pyo3::intern;
use pyo3::prelude::*;

use super::call::{CacheCall, Names};
use super::contents::Contents;
use super::{count_write, form};
use crate::call::{Slot, Tensors};
use crate::error::Result;
use crate::execute::{Results, allocate, read_result, unreadable};
use crate::metal::{Attention, CacheOperands, Fault, MetalDevice, Operand, Work, kernel_of, warn};
use crate::settings::Resolved;
use crate::tensor::View;
use crate::torch::Torch;
use crate::trace;

/// One call on a Metal device.
pub struct MetalCall<'a, 'py> {
    pub torch: &'a Torch,
    pub names: Names,
    pub objects: &'a Tensors<Bound<'py, PyAny>>,
    pub views: &'a Tensors<View>,
    pub cached: &'a CacheCall,
    pub device: MetalDevice,
    pub resolved: &'a Resolved,
    pub want_lse: bool,
}

impl<'py> MetalCall<'_, 'py> {
    /// Serves the call; `None` where its kernels do not, which `demotions` remembers if they should have.
    pub fn serve(&self, py: Python<'py>, demotions: &mut Demotions) -> Result<Option<Results<'py>>> {
        let Self { torch, objects, cached, device, resolved, .. } = *self;
        let problem = &cached.described.problem;
        let gpu = device.gpu(py)?;
        // Kept plans would not be found again if they were made for caches that fill from call to call.
        let full = problem.with_full_cache();
        let mut plan = resolved.plans.get(&full, gpu, &resolved.values, resolved.tuned(py, device)?)?;
        let Some(kernel) = kernel_of(&plan, problem, self.want_lse).filter(|_| plan.tier == Tier::Decode) else {
            return Ok(None);
        };
        let mut known = *problem;
        if device == MetalDevice::Simulator {
            // Reading CPU tensors costs nothing.
            let contents = Contents::read(torch, self.names, objects, self.views, cached)?;
            known = problem.with_longest_keys(&contents.buffers());
        }
        plan.splits = decode::splits(&known, &kernel.tile, gpu.cores);
        let form = form(objects.get(Slot::CuSeqlensQ).is_some());
        let results = allocate(torch, form, objects, &cached.described, self.want_lse)?;
        let operands = self.operands(&results)?;
        let cache = self.cache()?;
        let settings = &resolved.values;
        let attended = self.append(py, &operands, &cache).and_then(|(q, problem)| {
            let operands = LaunchTensors { q, ..operands.clone() };
            let starts = device.starts([&operands.q, &operands.k, &operands.v])?;
            let kernel = kernel.aligned(&problem, starts);
            let call = Attention {
                problem: &problem,
                kernel: &kernel,
                splits: plan.splits,
                operands: &operands,
                cache: &cache,
            };
            device.attend(py, &call, settings)
        });
        match attended {
            Ok(()) => {}
            Err(Fault::Raised(error)) => return Err(error),
            // Whoever serves instead appends the same rows again.
            Err(fault) => {
                demotions.demote(plan.tier, fault.reason());
                let planner = Planner { demotions, ..Planner::new(Device::Metal(gpu), settings) };
                warn(py, problem, Work::Attention, plan.tier, &fault, planner.plan(problem)?.tier)?;
                return Ok(None);
            }
        }
        if cached.append.is_some() {
            count_write(py, objects)?;
        }
        trace::record(py, &Planner::new(Device::Metal(gpu), settings), problem, &plan)?;
        Ok(Some(results))
    }

    /// Appends what there is to append. Returns the queries to attend with, and the problem that has them.
    fn append(
        &self,
        py: Python<'py>,
        operands: &LaunchTensors<Operand<'py>>,
        cache: &CacheOperands<'py>,
    ) -> std::result::Result<(Operand<'py>, Problem), Fault> {
        let mut problem = self.cached.described.problem;
        let Some(append) = &self.cached.append else { return Ok((operands.q.clone(), problem)) };
        let rotary = if append.rotary.is_some() {
            let sizes: Vec<usize> = operands.q.view.shape().iter().map(|&size| size as usize).collect();
            let rotated = Torch::new_empty(&operands.q.object, &sizes)?;
            let (object, view) = read_result(self.torch, rotated)?;
            Some(RotaryTensors {
                q: operands.q.clone(),
                rotated: Operand { object, view },
                query_offsets: self.operand(Slot::CuSeqlensQ),
                cos: self.required(Slot::RotaryCos)?,
                sin: self.required(Slot::RotarySin)?,
            })
        } else {
            None
        };
        let tensors = AppendTensors {
            new_keys: self.required(Slot::NewK)?,
            new_values: self.required(Slot::NewV)?,
            key_cache: operands.k.clone(),
            value_cache: operands.v.clone(),
            rotary,
            cache: cache.clone(),
        };
        self.device.append(py, &problem, append, &tensors, &self.resolved.values)?;
        Ok(match tensors.rotary {
            Some(RotaryTensors { rotated, .. }) => {
                problem.q = Strides::of(&rotated.view.meta(problem.dtype));
                (rotated, problem)
            }
            None => (operands.q.clone(), problem),
        })
    }

    fn operand(&self, slot: Slot) -> Option<Operand<'py>> {
        Some(Operand { object: self.objects.get(slot)?.clone(), view: *self.views.get(slot)? })
    }

    fn required(&self, slot: Slot) -> Result<Operand<'py>> {
        self.operand(slot).ok_or_else(|| unreadable(slot.name()))
    }

    /// A cache, which is written where something is appended: torch makes a tensor that is a lazy copy real when it is
    /// asked for its address.
    fn cache_operand(&self, slot: Slot) -> Result<Operand<'py>> {
        let mut operand = self.required(slot)?;
        if self.cached.append.is_some() && self.device == MetalDevice::Simulator {
            let address: usize = operand.object.call_method0(intern!(operand.object.py(), "data_ptr"))?.extract()?;
            operand.view.data = operand.view.data.with_addr(address);
        }
        Ok(operand)
    }

    fn operands(&self, results: &Results<'py>) -> Result<LaunchTensors<Operand<'py>>> {
        let offsets = self.operand(Slot::CuSeqlensQ);
        if offsets.is_some() {
            // Kernels walk over sequences: rows in none of them are nobody's.
            results.out.call_method0("zero_")?;
            if let Some((lse, _)) = &results.lse {
                lse.call_method1("fill_", (f64::INFINITY,))?;
            }
        }
        Ok(LaunchTensors {
            q: self.required(Slot::Q)?,
            k: self.cache_operand(Slot::K)?,
            v: self.cache_operand(Slot::V)?,
            out: Operand { object: results.out.clone(), view: results.out_view },
            lse: results.lse.as_ref().map(|(object, view)| Operand { object: object.clone(), view: *view }),
            // Keys have none.
            offsets: offsets.clone().zip(offsets),
            alibi_slopes: self.operand(Slot::AlibiSlopes),
            bias: None,
            sinks: self.operand(Slot::Sinks),
        })
    }

    fn cache(&self) -> Result<CacheOperands<'py>> {
        let problem = &self.cached.described.problem;
        let lengths = match problem.cache.map(|cache| cache.lengths) {
            Some(CacheLengths::Each) => Some(self.required(Slot::CacheSeqlens)?),
            Some(CacheLengths::Offsets) => Some(self.required(Slot::CuSeqlensK)?),
            Some(CacheLengths::Same(_)) | None => None,
        };
        Ok(CacheTensors {
            lengths,
            slots: self.operand(Slot::CacheBatchIdx),
            left_pad: self.operand(Slot::CacheLeftpad),
            pages: self.operand(Slot::BlockTable),
        })
    }
}
