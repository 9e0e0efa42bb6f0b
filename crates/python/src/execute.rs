//! From tensors to results: allocate, plan, run.

use std::ptr;

use mtlflashattn_core::{
    self as core, CacheBuffers, Demotions, Device, Lengths, Planner, Problem, Settings, Strides, Tier,
};
use mtlflashattn_cpu::{self as cpu, Inputs, Isa, Outputs};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::call::{Described, Numbers, Slot, Tensors, describe};
use crate::error::{Error, Result};
use crate::form::{Form, HeadAxis, OutLayout, Packing};
use crate::metal::{Attention, CacheOperands, Fault, MetalDevice, Operand, Operands, Work};
use crate::settings::Resolved;
use crate::tensor::{Place, View};
use crate::torch::Torch;
use crate::{metal, settings, trace};

/// Below this a call takes about 20 microseconds: handing over the GIL and waking threads would dominate.
pub const SMALL_FLOPS: f64 = 5e5;

/// Results as torch tensors.
pub struct Results<'py> {
    pub out: Bound<'py, PyAny>,
    pub out_view: View,
    pub lse: Option<(Bound<'py, PyAny>, View)>,
}

/// Reads a CPU tensor in the quickest way that this torch has; `None` when it needs a closer look: another device, no
/// memory behind it, or memory that holds the negative of the values.
pub fn read_plain(torch: &Torch, tensor: &Bound<'_, PyAny>) -> Result<Option<View>> {
    let view = read_memory(torch, tensor);
    match view {
        Some(view) if may_be_negated(&view) && torch.is_negated(tensor)? => Ok(None),
        _ => Ok(view),
    }
}

/// Only `.imag` of a conjugate leaves a negation for later, and the strides of `.imag` are even: where rows are read as
/// they lie, neighbours show that nothing is left to do. Asking torch takes longer than reading the tensor.
fn may_be_negated(view: &View) -> bool {
    view.strides().last() != Some(&1)
}

fn read_memory(torch: &Torch, tensor: &Bound<'_, PyAny>) -> Option<View> {
    match torch.exchange {
        // SAFETY: callers pass instances of torch.Tensor, on which the function was found.
        Some(exchange) => unsafe { View::read_exchange(exchange, tensor) },
        None => View::read_attributes(tensor),
    }
}

/// What [`read_plain`] could not read although the call was checked.
pub fn unreadable(argument: &'static str) -> Error {
    Error::Problem(core::Error::Value {
        argument,
        got: "a tensor without memory of its own".into(),
        allowed: "tensors whose memory torch can hand out".into(),
    })
}

/// Replaces tensors that no engine reads where they lie by copies: rows of q, k and v that are not contiguous, and
/// memory that is not aligned.
pub fn make_readable(torch: &Torch, objects: &mut Tensors<Bound<'_, PyAny>>, views: &mut Tensors<View>) -> Result<()> {
    for slot in Slot::ALL {
        let (Some(object), Some(view)) = (objects.get(slot), views.get(slot)) else { continue };
        let copy = if slot.has_rows() && !view.has_contiguous_rows() {
            object.call_method0(intern!(object.py(), "contiguous"))?
        } else if !view.is_aligned() {
            object.call_method0(intern!(object.py(), "clone"))?
        } else {
            continue;
        };
        let view = if view.place == Place::Cpu { read_plain(torch, &copy)? } else { View::describe(&copy)? };
        views.set(slot, view.ok_or_else(|| unreadable(slot.name()))?);
        objects.set(slot, copy);
    }
    Ok(())
}

/// What the planner has to know about the CPU.
pub fn cpu_device(isa: Isa, threads: usize) -> Device {
    Device::Cpu { panel_rows: isa.panel_rows(), decode_rows: isa.decode_rows(), threads }
}

/// What the planner has to know about the device that holds tensors of `place`.
pub fn planned_device(py: Python<'_>, torch: &Torch, settings: &Resolved, place: Place) -> Result<Device> {
    Ok(match (settings.metal_device(place), place) {
        (Some(metal), _) => Device::Metal(metal.gpu(py)?),
        (None, Place::Cpu) => cpu_device(settings.isa()?, torch.num_threads(py)?),
        (None, _) => Device::Torch,
    })
}

/// Computes attention of `objects`, whose gradients are nobody's concern any more.
pub fn execute<'py>(
    py: Python<'py>,
    torch: &Torch,
    form: Form,
    numbers: &Numbers,
    mut objects: Tensors<Bound<'py, PyAny>>,
    views: &mut Tensors<View>,
    want_lse: bool,
) -> Result<Bound<'py, PyAny>> {
    make_readable(torch, &mut objects, views)?;
    let described = describe(form, numbers, &objects, views)?;
    let settings = settings::current(py)?;
    if let Some(device) = settings.metal_device(views.q().place) {
        let call = Call { torch, form, numbers, objects: &objects, views, described: &described, want_lse };
        return execute_on_metal(py, &call, device, &settings);
    }
    let problem = &described.problem;
    let offsets = Offsets::read(torch, form, &objects, views, problem)?;
    let on_cpu = views.q().place == Place::Cpu;
    let isa = settings.isa()?;
    let small = problem.flops() < SMALL_FLOPS;
    let threads = if small || !on_cpu { 1 } else { torch.num_threads(py)? };
    let device = if on_cpu { cpu_device(isa, threads) } else { Device::Torch };
    let planner = Planner::new(device, &settings.values);
    let plan = planner.plan(problem)?;
    let results = allocate(torch, form, &objects, &described, want_lse)?;
    match (plan.tier, &plan.cpu) {
        (Tier::Cpu, Some(tile)) => {
            let pointers = Pointers::new(&described, views, &offsets, &results);
            run_cpu(py, small, |interrupted| {
                let Pointers { inputs, outputs } = &pointers;
                // SAFETY: shapes, strides, offsets and alignment were checked; the outputs are fresh.
                unsafe { cpu::forward(problem, tile, isa, threads, inputs, outputs, interrupted) }
            })?;
        }
        _ => run_torch(py, form, numbers, &objects, &offsets, problem, &settings.values, &results)?,
    }
    trace::record(py, &planner, problem, &plan)?;
    Ok(results.into_python(py)?)
}

/// One call whose arguments are checked.
struct Call<'a, 'py> {
    torch: &'a Torch,
    form: Form,
    numbers: &'a Numbers,
    objects: &'a Tensors<Bound<'py, PyAny>>,
    views: &'a Tensors<View>,
    described: &'a Described,
    want_lse: bool,
}

/// Serves a call by the best Metal tier that works on `device`, or by torch operations where none does.
fn execute_on_metal<'py>(
    py: Python<'py>,
    call: &Call<'_, 'py>,
    device: MetalDevice,
    resolved: &Resolved,
) -> Result<Bound<'py, PyAny>> {
    let Call { torch, form, numbers, objects, views, described, want_lse } = *call;
    let problem = &described.problem;
    if device == MetalDevice::Simulator {
        // Kernels trust the offsets. Reading those of CPU tensors costs nothing; on MPS it would wait for the GPU.
        Offsets::read(torch, form, objects, views, problem)?;
    }
    let results = allocate(torch, form, objects, described, want_lse)?;
    let settings = &resolved.values;
    let gpu = device.gpu(py)?;
    let mut operands = None;
    let mut demotions = Demotions::default();
    let mut plan = resolved.plans.get(problem, gpu, settings, resolved.tuned(py, device)?)?;
    loop {
        let Some(kernel) = metal::kernel_of(&plan, problem, want_lse) else {
            let offsets = Offsets::read(torch, form, objects, views, problem)?;
            run_torch(py, form, numbers, objects, &offsets, problem, settings, &results)?;
            break;
        };
        let operands = match &mut operands {
            Some(operands) => operands,
            none => none.insert(self::operands(call, &results)?),
        };
        let kernel = kernel.aligned(problem, device.starts([&operands.q, &operands.k, &operands.v])?);
        let attention =
            Attention { problem, kernel: &kernel, splits: plan.splits, operands, cache: &CacheOperands::NONE };
        match device.attend(py, &attention, settings) {
            Ok(()) => break,
            Err(Fault::Raised(error)) => return Err(error),
            Err(fault) => {
                let planner = Planner { demotions: &demotions, ..Planner::new(Device::Metal(gpu), settings) };
                let untuned = planner.plan(problem)?;
                // A tuned tile that fails says nothing about the planner's own.
                if untuned.tier == plan.tier && untuned != plan {
                    plan = untuned;
                    continue;
                }
                demotions.demote(plan.tier, fault.reason());
                let planner = Planner { demotions: &demotions, ..Planner::new(Device::Metal(gpu), settings) };
                let next = planner.plan(problem)?;
                metal::warn(py, problem, Work::Attention, plan.tier, &fault, next.tier)?;
                plan = next;
            }
        }
    }
    let planner = Planner { demotions: &demotions, ..Planner::new(Device::Metal(gpu), settings) };
    trace::record(py, &planner, problem, &plan)?;
    Ok(results.into_python(py)?)
}

/// The tensors of a call as Metal kernels take them.
fn operands<'py>(call: &Call<'_, 'py>, results: &Results<'py>) -> Result<Operands<'py>> {
    let Call { form, objects, views, described, .. } = *call;
    let [q, k, v] = form.unpack(objects)?;
    let operand = |slot| {
        let (object, view) = (objects.get(slot)?.clone(), *views.get(slot)?);
        Some(Operand { object, view })
    };
    if form.varlen {
        // Kernels walk over sequences: rows in none of them are nobody's.
        results.out.call_method0("zero_")?;
        if let Some((lse, _)) = &results.lse {
            lse.call_method1("fill_", (f64::INFINITY,))?;
        }
    }
    Ok(Operands {
        q: Operand { object: q, view: described.q },
        k: Operand { object: k, view: described.k },
        v: Operand { object: v, view: described.v },
        out: Operand { object: form.tokens_first_tensor(&results.out)?, view: results.out_view },
        lse: results.lse.as_ref().map(|(object, view)| Operand { object: object.clone(), view: *view }),
        offsets: operand(Slot::CuSeqlensQ).zip(operand(Slot::CuSeqlensK)),
        alibi_slopes: operand(Slot::AlibiSlopes),
        bias: operand(Slot::Bias),
        sinks: operand(Slot::Sinks),
    })
}

/// `cu_seqlens_*` of a packed call: copied, so that no other thread can change them after the check.
#[derive(Debug, Default)]
pub struct Offsets {
    pub query: Vec<i32>,
    pub key: Vec<i32>,
}

impl Offsets {
    pub fn read(
        torch: &Torch,
        form: Form,
        objects: &Tensors<Bound<'_, PyAny>>,
        views: &Tensors<View>,
        problem: &Problem,
    ) -> Result<Self> {
        if !form.varlen {
            return Ok(Self::default());
        }
        let read = |slot| read_offsets(torch, objects.get(slot), views.get(slot));
        let (query, key) = (read(Slot::CuSeqlensQ)?, read(Slot::CuSeqlensK)?);
        let checked = problem.lengths.check_offsets(&query, &key);
        checked.map_err(|error| form.translate(error, views))?;
        Ok(Self { query, key })
    }
}

fn read_offsets(torch: &Torch, object: Option<&Bound<'_, PyAny>>, view: Option<&View>) -> Result<Vec<i32>> {
    let (Some(object), Some(view)) = (object, view) else { return Ok(Vec::new()) };
    if view.place != Place::Cpu {
        let here = object.call_method0(intern!(object.py(), "cpu"))?;
        let view = read_plain(torch, &here)?.ok_or_else(|| unreadable("cu_seqlens"))?;
        return read_offsets(torch, Some(&here), Some(&view));
    }
    let count = view.shape()[0] as usize;
    #[allow(clippy::cast_ptr_alignment, reason = "read unaligned")]
    let start = view.data.cast_const().cast::<i32>();
    // SAFETY: `describe` found `count` contiguous int32 in CPU memory; unaligned reads take any address.
    Ok((0..count).map(|i| unsafe { start.add(i).read_unaligned() }).collect())
}

/// out as `torch.empty_like(q)` lays it out, contiguous where v has another width or `empty_like` does not keep rows
/// contiguous (overlapping q); lse contiguous float32. The fake implementations of the operators mirror this.
pub fn allocate<'py>(
    torch: &Torch,
    form: Form,
    objects: &Tensors<Bound<'py, PyAny>>,
    described: &Described,
    want_lse: bool,
) -> Result<Results<'py>> {
    let py = objects.q().py();
    let problem = &described.problem;
    let mut shape: Vec<usize> = described.q.shape().iter().map(|&size| size as usize).collect();
    *shape.last_mut().expect("q has three or four dimensions") = problem.value_dim;
    let like_q = if let HeadAxis::BeforeTokens(layout) = form.head_axis {
        shape.swap(1, 2);
        heads_first_out(torch, layout, objects.q(), &shape)?
    } else if problem.value_dim != problem.head_dim {
        None
    } else if form.packing == Packing::All {
        Some(torch.empty_like(&objects.q().call_method1(intern!(py, "select"), (-3, 0))?)?)
    } else {
        Some(torch.empty_like(objects.q())?)
    };
    let (out, view) = match like_q.map(|out| read_result(torch, out)).transpose()? {
        Some((out, view)) if view.has_contiguous_rows() => (out, view),
        _ => read_result(torch, Torch::new_empty(objects.q(), &shape)?)?,
    };
    let lse_shape = match problem.lengths {
        Lengths::Dense { batch, query_len, .. } => vec![batch, problem.query_heads, query_len],
        Lengths::Packed { total_query, .. } => vec![problem.query_heads, total_query],
    };
    let lse = want_lse.then(|| read_result(torch, torch.new_empty_float32(objects.q(), &lse_shape)?)).transpose()?;
    Ok(Results { out, out_view: form.tokens_first(view), lse })
}

/// out `[batch, heads, seqlen, value_dim]` in `layout`; `None` where it shall be contiguous.
fn heads_first_out<'py>(
    torch: &Torch,
    layout: OutLayout,
    q: &Bound<'py, PyAny>,
    shape: &[usize],
) -> Result<Option<Bound<'py, PyAny>>> {
    let &[batch, heads, query_len, value_dim] = shape else { return Ok(None) };
    Ok(match layout {
        OutLayout::Contiguous => None,
        OutLayout::LikeQuery => Some(torch.empty_like(q)?),
        OutLayout::TokensFirst => {
            let out = Torch::new_empty(q, &[batch, query_len, heads, value_dim])?;
            Some(out.call_method1(intern!(q.py(), "transpose"), (1, 2))?)
        }
    })
}

pub fn read_result<'py>(torch: &Torch, tensor: Bound<'py, PyAny>) -> Result<(Bound<'py, PyAny>, View)> {
    let view = match read_memory(torch, &tensor) {
        Some(view) => view,
        None => View::describe(&tensor)?.ok_or_else(|| unreadable("out"))?,
    };
    Ok((tensor, view))
}

impl<'py> Results<'py> {
    /// `(out, lse)`, or out where no LSE was asked for.
    pub fn into_python(self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.lse {
            None => Ok(self.out),
            Some((lse, _)) => Ok((self.out, lse).into_pyobject(py)?.into_any()),
        }
    }
}

/// What the engine reads and writes.
pub struct Pointers<'a> {
    pub inputs: Inputs<'a>,
    pub outputs: Outputs,
}

// SAFETY: the tensors behind the pointers are kept alive by the arguments of the Python call, on whichever thread the
// GIL is released.
unsafe impl Send for Pointers<'_> {}
// SAFETY: as above; the engine divides the outputs among its threads.
unsafe impl Sync for Pointers<'_> {}

impl<'a> Pointers<'a> {
    pub fn new(described: &Described, views: &Tensors<View>, offsets: &'a Offsets, results: &Results<'_>) -> Self {
        let inputs = cpu_inputs(described, views, offsets);
        let out_strides = Strides::of(&results.out_view.meta(described.problem.dtype));
        let lse = results.lse.as_ref().map_or(ptr::null_mut(), |(_, view)| view.data.cast());
        Self { inputs, outputs: Outputs { out: results.out_view.data, out_strides, lse } }
    }
}

/// The inputs of a call where the engine reads them.
pub fn cpu_inputs<'a>(described: &Described, views: &Tensors<View>, offsets: &'a Offsets) -> Inputs<'a> {
    let first = |slot| views.get(slot).map_or(ptr::null(), |view| view.data.cast_const());
    Inputs {
        q: described.q.data,
        k: described.k.data,
        v: described.v.data,
        query_offsets: &offsets.query,
        key_offsets: &offsets.key,
        cache: CacheBuffers::default(),
        alibi_slopes: first(Slot::AlibiSlopes).cast(),
        bias: first(Slot::Bias),
        sinks: first(Slot::Sinks).cast(),
    }
}

/// Runs the engine: without the GIL, and looking for signals, unless the call is too `small` for that.
pub fn run_cpu(
    py: Python<'_>,
    small: bool,
    run: impl FnOnce(&mut dyn FnMut() -> bool) -> std::result::Result<(), cpu::Error> + Send,
) -> Result<()> {
    if small {
        return finished(run(&mut || false), None);
    }
    let mut raised = None;
    let result = py.detach(|| {
        run(&mut || {
            #[allow(clippy::redundant_closure_for_method_calls, reason = "the method alone has too few lifetimes")]
            let check = Python::attach(|py| py.check_signals());
            raised = check.err();
            raised.is_some()
        })
    });
    finished(result, raised)
}

fn finished(result: std::result::Result<(), cpu::Error>, raised: Option<PyErr>) -> Result<()> {
    match (result, raised) {
        (Ok(()), None) => Ok(()),
        (_, Some(exception)) => Err(Error::Python(exception)),
        (Err(cpu::Error::OutOfMemory { bytes }), None) => Err(Error::OutOfMemory { bytes }),
        (Err(error), None) => panic!("the engine stopped by itself: {error}"),
    }
}

/// Threshold, factor, seed and offset.
type TorchDropout = (u32, f32, u64, u64);
type TorchRules<'a, 'py> =
    (f32, f32, Option<usize>, Option<usize>, bool, Option<&'a Bound<'py, PyAny>>, usize, Option<TorchDropout>);

/// `Rules` of the torch tier.
pub fn torch_rules<'a, 'py>(
    problem: &Problem,
    numbers: &Numbers,
    objects: &'a Tensors<Bound<'py, PyAny>>,
    chunk: usize,
) -> TorchRules<'a, 'py> {
    let Problem { scale, softcap, mask, .. } = *problem;
    let sinks = objects.get(Slot::Sinks);
    let dropout = problem.dropout.map(|drop| (drop.threshold(), drop.factor(), drop.seed, drop.offset));
    (scale, softcap, mask.left, mask.right, numbers.top_left, sinks, chunk, dropout)
}

/// Hands the call to the tensor operations of `metal_flash_attn._torch_tier`.
#[allow(clippy::too_many_arguments, reason = "the parts of one call")]
fn run_torch(
    py: Python<'_>,
    form: Form,
    numbers: &Numbers,
    objects: &Tensors<Bound<'_, PyAny>>,
    offsets: &Offsets,
    problem: &Problem,
    settings: &Settings,
    results: &Results<'_>,
) -> Result<()> {
    let [q, k, v] = form.unpack(objects)?;
    let rules = torch_rules(problem, numbers, objects, settings.torch_chunk);
    let keywords = PyDict::new(py);
    keywords.set_item("offsets", form.varlen.then_some((&offsets.query, &offsets.key)))?;
    keywords.set_item("alibi_slopes", objects.get(Slot::AlibiSlopes))?;
    keywords.set_item("bias", objects.get(Slot::Bias))?;
    keywords.set_item("out", form.tokens_first_tensor(&results.out)?)?;
    keywords.set_item("lse", results.lse.as_ref().map(|(lse, _)| lse))?;
    keywords.set_item("rules", rules)?;
    py.import("metal_flash_attn._torch_tier")?.getattr("forward")?.call((q, k, v), Some(&keywords))?;
    Ok(())
}
