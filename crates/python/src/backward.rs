//! Gradients: from the tensors of a forward call, its results and their gradients to gradients of the inputs.

use std::ptr;

use mtlflashattn_core::plan::Wanted;
use mtlflashattn_core::{self as core, Demotions, Device, Dtype, Planner, Problem, Strides, Tier};
use mtlflashattn_cpu::{self as cpu, Gradient, InputGradients, Inputs, OutputGradients, Outputs};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

use crate::call::{Described, Numbers, Slot, Tensors, describe, dtype_error};
use crate::differentiate::Operands;
use crate::error::{Error, Result, guard};
use crate::execute::{
    Offsets, SMALL_FLOPS, cpu_inputs, make_readable, planned_device, read_plain, run_cpu, torch_rules, unreadable,
};
use crate::form::Form;
use crate::metal::{self, Fault, MetalDevice, Operand, Work};
use crate::operator;
use crate::settings::Resolved;
use crate::tensor::{Element, Place, View};
use crate::torch::Torch;
use crate::{settings, trace};

/// Gradients in the order in which they are handed around: of q, k, v, the bias and the sinks.
const GRADIENTS: [(Slot, &str); 5] =
    [(Slot::Q, "dq"), (Slot::K, "dk"), (Slot::V, "dv"), (Slot::Bias, "dbias"), (Slot::Sinks, "dsinks")];
/// What a forward call returned, with the gradients of that.
const RESULTS: usize = 4;

/// One call for gradients.
struct Call<'py> {
    form: Form,
    numbers: Numbers,
    objects: Tensors<Bound<'py, PyAny>>,
    views: Tensors<View>,
    grad_out: Operand<'py>,
    grad_lse: Option<Operand<'py>>,
    out: Operand<'py>,
    lse: Operand<'py>,
    /// In the order of [`GRADIENTS`]; absent ones are not wanted.
    gradients: [Option<Operand<'py>>; 5],
}

/// The body of `torch.ops.mtlflashattn.backward`, for every device.
#[pyfunction]
#[pyo3(signature = (*arguments))]
pub fn execute_backward<'py>(py: Python<'py>, arguments: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
    static ALLOCATE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    guard(|| {
        let count = arguments.len().saturating_sub(1);
        let wanted: Vec<bool> = arguments.get_item(count)?.extract()?;
        let call = arguments.get_slice(0, count);
        let (_, _, tensors) = operator::from_python(&call.get_slice(RESULTS, count))?;
        let [q, k, v, bias, sinks] = GRADIENTS.map(|(slot, _)| tensors.get(slot));
        let allocate = ALLOCATE.import(py, "metal_flash_attn._ops", "allocate_gradients")?;
        let gradients =
            allocate.call1((q, k, v, bias, sinks, wanted.clone()))?.cast_into::<PyTuple>().map_err(PyErr::from)?;
        run(py, &call, [0, 1, 2, 3, 4].map(|i| gradients.get_item(i).ok().filter(|_| wanted.get(i) == Some(&true))))?;
        Ok(gradients.into_any())
    })
}

/// Writes gradients to the tensors that come first, `None` for those that are not wanted; the rest are the arguments of
/// `torch.ops.mtlflashattn.backward` without its last.
#[pyfunction]
#[pyo3(signature = (dq, dk, dv, dbias, dsinks, *arguments))]
pub fn backward_into<'py>(
    py: Python<'py>,
    dq: Option<Bound<'py, PyAny>>,
    dk: Option<Bound<'py, PyAny>>,
    dv: Option<Bound<'py, PyAny>>,
    dbias: Option<Bound<'py, PyAny>>,
    dsinks: Option<Bound<'py, PyAny>>,
    arguments: &Bound<'py, PyTuple>,
) -> PyResult<()> {
    guard(|| run(py, arguments, [dq, dk, dv, dbias, dsinks]))
}

fn run<'py>(py: Python<'py>, arguments: &Bound<'py, PyTuple>, gradients: [Option<Bound<'py, PyAny>>; 5]) -> Result<()> {
    let torch = Torch::get(py)?;
    if arguments.len() < RESULTS {
        return Err(PyTypeError::new_err("too few arguments").into());
    }
    let (form, numbers, mut objects) = operator::from_python(&arguments.get_slice(RESULTS, arguments.len()))?;
    let place = Place::of(objects.q())?;
    let mut views = Tensors::none();
    for (slot, tensor) in objects.present() {
        views.set(slot, read(torch, slot.name(), tensor, place)?);
    }
    make_readable(torch, &mut objects, &mut views)?;
    let described = describe(form, &numbers, &objects, &views)?;
    let input = |name, index| {
        let object = arguments.get_item(index)?;
        if object.is_none() { Ok(None) } else { readable(torch, name, object, place).map(Some) }
    };
    let present = |name, index| input(name, index)?.ok_or_else(|| unreadable(name));
    // Unlike rows of out, those of the LSE have no strides.
    let packed = |operand: Operand<'py>, name| {
        let object = operand.object.call_method0(intern!(py, "contiguous"))?;
        Ok::<_, Error>(Operand { view: read(torch, name, &object, place)?, object })
    };
    let mut call = Call {
        form,
        numbers,
        grad_out: present("dout", 0)?,
        grad_lse: input("dlse", 1)?.map(|operand| packed(operand, "dlse")).transpose()?,
        out: present("out", 2)?,
        lse: packed(present("softmax_lse", 3)?, "softmax_lse")?,
        objects,
        views,
        gradients: [const { None }; 5],
    };
    for ((to, from), (_, name)) in call.gradients.iter_mut().zip(gradients).zip(GRADIENTS) {
        let Some(object) = from else { continue };
        let view = read(torch, name, &object, place)?;
        *to = Some(Operand { object, view });
    }
    check(&call, &described)?;
    execute(py, torch, &call, &described)
}

fn read(torch: &Torch, name: &'static str, tensor: &Bound<'_, PyAny>, place: Place) -> Result<View> {
    let view = if place == Place::Cpu { read_plain(torch, tensor)? } else { View::describe(tensor)? };
    view.ok_or_else(|| unreadable(name))
}

/// `tensor`, or a copy whose rows are contiguous and aligned.
fn readable<'py>(
    torch: &Torch,
    name: &'static str,
    mut object: Bound<'py, PyAny>,
    place: Place,
) -> Result<Operand<'py>> {
    let mut view = read(torch, name, &object, place)?;
    if !view.has_contiguous_rows() || !view.is_aligned() {
        object =
            object.call_method0(intern!(object.py(), "clone"))?.call_method0(intern!(object.py(), "contiguous"))?;
        view = read(torch, name, &object, place)?;
    }
    Ok(Operand { object, view })
}

/// Requires the shapes and dtypes that the problem gives to its results and gradients.
fn check(call: &Call<'_>, described: &Described) -> Result<()> {
    let Described { q, k, v, problem } = described;
    let mut out_shape = q.shape().to_vec();
    *out_shape.last_mut().expect("q has three or four dimensions") = problem.value_dim as i64;
    let heads = problem.query_heads as i64;
    let lse_shape = match *q.shape() {
        [batch, query_len, _, _] => vec![batch, heads, query_len],
        _ => vec![heads, problem.lengths.query_rows() as i64],
    };
    expect("dout", &call.grad_out, &out_shape, problem.dtype)?;
    expect("out", &call.out, &out_shape, problem.dtype)?;
    expect("softmax_lse", &call.lse, &lse_shape, Dtype::F32)?;
    if let Some(grad_lse) = &call.grad_lse {
        expect("dlse", grad_lse, &lse_shape, Dtype::F32)?;
    }
    for (operand, (slot, name)) in call.gradients.iter().zip(GRADIENTS) {
        let Some(operand) = operand else { continue };
        let view = match slot {
            Slot::Q => Some(q),
            Slot::K => Some(k),
            Slot::V => Some(v),
            _ => call.views.get(slot),
        };
        let Some(view) = view else {
            return Err(value(name, "given".into(), format!("None, as there is no {}", slot.name())));
        };
        let Element::Float(dtype) = view.element else {
            return Err(value(name, "given".into(), "None, as a boolean mask has no gradient".into()));
        };
        expect(name, operand, view.shape(), dtype)?;
        if !operand.view.has_contiguous_rows() || !operand.view.is_aligned() {
            let got = format!("a tensor with last stride {}", operand.view.strides().last().copied().unwrap_or(1));
            return Err(value(name, got, "tensors whose last dimension is contiguous".into()));
        }
    }
    Ok(())
}

fn value(argument: &'static str, got: String, allowed: String) -> Error {
    Error::Problem(core::Error::Value { argument, got, allowed })
}

fn expect(argument: &'static str, operand: &Operand<'_>, shape: &[i64], dtype: Dtype) -> Result<()> {
    if operand.view.element != Element::Float(dtype) {
        return Err(dtype_error(argument, &operand.object, dtype.name()));
    }
    if operand.view.shape() == shape {
        return Ok(());
    }
    let sizes: Vec<String> = shape.iter().map(ToString::to_string).collect();
    let allowed = format!("({})", sizes.join(", "));
    Err(Error::Problem(core::Error::Shape { argument, got: operand.view.shape_text(), allowed }))
}

fn execute<'py>(py: Python<'py>, torch: &Torch, call: &Call<'py>, described: &Described) -> Result<()> {
    let problem = &described.problem;
    let settings = settings::current(py)?;
    let place = call.views.q().place;
    if let Some(device) = settings.metal_device(place) {
        return execute_on_metal(py, torch, call, described, device, &settings);
    }
    let offsets = Offsets::read(torch, call.form, &call.objects, &call.views, problem)?;
    let device = planned_device(py, torch, &settings, place)?;
    let planner = Planner::new(device, &settings.values);
    let plan = planner.plan_backward(problem, call.wanted());
    match (plan.tier, &plan.cpu) {
        (Tier::Cpu, Some(tile)) => {
            let pointers = Pointers::new(call, described, &offsets);
            let small = problem.flops() < SMALL_FLOPS;
            let threads = if small { 1 } else { torch.num_threads(py)? };
            let isa = settings.isa()?;
            run_cpu(py, small, |interrupted| {
                let Pointers { inputs, outputs, given, wanted } = &pointers;
                // SAFETY: shapes, strides, offsets and alignment were checked. Gradients that share memory hold nonsense
                // afterwards, which is the caller's.
                unsafe { cpu::backward(problem, tile, isa, threads, inputs, outputs, given, wanted, interrupted) }
            })?;
        }
        _ => run_torch(py, call, problem, &offsets, settings.values.torch_chunk)?,
    }
    Ok(trace::record_backward(py, &planner, problem, &plan)?)
}

/// Computes gradients by the Metal kernels of `device`, or by torch operations where they cannot.
fn execute_on_metal<'py>(
    py: Python<'py>,
    torch: &Torch,
    call: &Call<'py>,
    described: &Described,
    device: MetalDevice,
    resolved: &Resolved,
) -> Result<()> {
    let problem = &described.problem;
    let settings = &resolved.values;
    let read_offsets = || Offsets::read(torch, call.form, &call.objects, &call.views, problem);
    if device == MetalDevice::Simulator {
        // As in the forward pass.
        read_offsets()?;
    }
    let gpu = device.gpu(py)?;
    let mut demotions = Demotions::default();
    let mut plan = resolved.plans.backward(problem, gpu, settings, call.wanted());
    if plan.tier == Tier::Simdgroup {
        let operands = call.operands(torch, described)?;
        match device.differentiate(py, problem, &plan.metal, &operands, settings) {
            Ok(()) => call.differentiate_sinks(py)?,
            Err(Fault::Raised(error)) => return Err(error),
            Err(fault) => {
                demotions.demote(plan.tier, fault.reason());
                let planner = Planner { demotions: &demotions, ..Planner::new(Device::Metal(gpu), settings) };
                let next = planner.plan_backward(problem, call.wanted());
                metal::warn(py, problem, Work::Gradients, plan.tier, &fault, next.tier)?;
                plan = next;
            }
        }
    }
    if plan.tier == Tier::Torch {
        run_torch(py, call, problem, &read_offsets()?, settings.torch_chunk)?;
    }
    let planner = Planner { demotions: &demotions, ..Planner::new(Device::Metal(gpu), settings) };
    Ok(trace::record_backward(py, &planner, problem, &plan)?)
}

impl<'py> Call<'py> {
    fn wanted(&self) -> Wanted {
        let [query, key, value, bias, _] = self.gradients.each_ref().map(Option::is_some);
        Wanted { query, key, value, bias }
    }

    /// The tensors as Metal kernels take them.
    fn operands(&self, torch: &Torch, described: &Described) -> Result<Operands<'py>> {
        let operand = |slot| Some(Operand { object: self.objects.get(slot)?.clone(), view: *self.views.get(slot)? });
        let given = |slot| operand(slot).ok_or_else(|| unreadable(slot.name()));
        let [d_query, d_key, d_value, ..] = self.gradients.clone();
        if self.form.varlen {
            // Kernels walk over sequences: rows in none of them are nobody's.
            for gradient in [&d_query, &d_key, &d_value].into_iter().flatten() {
                gradient.object.call_method0("zero_")?;
            }
        }
        let mut shape = self.lse.view.shape().iter().map(|&size| size as usize).collect::<Vec<_>>();
        shape.push(2);
        let states = torch.new_empty_float32(self.objects.q(), &shape)?;
        let view = read(torch, "softmax_lse", &states, described.q.place)?;
        Ok(Operands {
            q: given(Slot::Q)?,
            k: given(Slot::K)?,
            v: given(Slot::V)?,
            out: self.out.clone(),
            lse: self.lse.clone(),
            offsets: operand(Slot::CuSeqlensQ).zip(operand(Slot::CuSeqlensK)),
            alibi_slopes: operand(Slot::AlibiSlopes),
            bias: operand(Slot::Bias),
            d_out: self.grad_out.clone(),
            d_lse: self.grad_lse.clone(),
            states: Operand { object: states, view },
            d_query,
            d_key,
            d_value,
        })
    }

    /// Metal kernels leave the gradient of the sinks to torch: it is one sum over rows.
    fn differentiate_sinks(&self, py: Python<'py>) -> Result<()> {
        let (Some(to), Some(sinks)) = (&self.gradients[4], self.objects.get(Slot::Sinks)) else { return Ok(()) };
        let d_lse = self.grad_lse.as_ref().map(|operand| &operand.object);
        let arguments = (&to.object, sinks, &self.out.object, &self.lse.object, &self.grad_out.object, d_lse);
        py.import("metal_flash_attn._torch_tier")?.getattr("differentiate_sinks")?.call1(arguments)?;
        Ok(())
    }
}

/// What the engine reads and writes.
struct Pointers<'a> {
    inputs: Inputs<'a>,
    outputs: Outputs,
    given: OutputGradients,
    wanted: InputGradients,
}

// SAFETY: the tensors behind the pointers are kept alive by the arguments of the Python call, on whichever thread the
// GIL is released.
unsafe impl Send for Pointers<'_> {}
// SAFETY: as above; the engine divides the gradients among its threads.
unsafe impl Sync for Pointers<'_> {}

impl<'a> Pointers<'a> {
    fn new(call: &Call<'_>, described: &Described, offsets: &'a Offsets) -> Self {
        let dtype = described.problem.dtype;
        let gradient = |index: usize| match &call.gradients[index] {
            Some(Operand { view, .. }) => Gradient { data: view.data, strides: Strides::of(&view.meta(dtype)) },
            None => Gradient { data: ptr::null_mut(), strides: Strides::default() },
        };
        Self {
            inputs: cpu_inputs(described, &call.views, offsets),
            outputs: Outputs {
                out: call.out.view.data,
                out_strides: Strides::of(&call.out.view.meta(dtype)),
                lse: call.lse.view.data.cast(),
            },
            given: OutputGradients {
                out: call.grad_out.view.data,
                out_strides: Strides::of(&call.grad_out.view.meta(dtype)),
                lse: call.grad_lse.as_ref().map_or(ptr::null(), |operand| operand.view.data.cast_const().cast()),
            },
            wanted: InputGradients {
                q: gradient(0),
                k: gradient(1),
                v: gradient(2),
                sinks: call.gradients[4].as_ref().map_or(ptr::null_mut(), |operand| operand.view.data.cast()),
            },
        }
    }
}

/// Hands the call to the tensor operations of `metal_flash_attn._torch_tier`.
fn run_torch(py: Python<'_>, call: &Call<'_>, problem: &Problem, offsets: &Offsets, chunk: usize) -> Result<()> {
    let [q, k, v] = call.form.unpack(&call.objects)?;
    let object = |operand: &Option<Operand<'_>>| operand.as_ref().map(|operand| operand.object.clone().unbind());
    let keywords = PyDict::new(py);
    keywords.set_item("offsets", call.form.varlen.then_some((&offsets.query, &offsets.key)))?;
    keywords.set_item("alibi_slopes", call.objects.get(Slot::AlibiSlopes))?;
    keywords.set_item("bias", call.objects.get(Slot::Bias))?;
    keywords.set_item("results", (&call.out.object, &call.lse.object))?;
    keywords.set_item("result_gradients", (&call.grad_out.object, object(&call.grad_lse)))?;
    keywords.set_item("gradients", PyTuple::new(py, call.gradients.iter().map(object))?)?;
    keywords.set_item("rules", torch_rules(problem, &call.numbers, &call.objects, chunk).into_pyobject(py)?)?;
    py.import("metal_flash_attn._torch_tier")?.getattr("backward")?.call((q, k, v), Some(&keywords))?;
    Ok(())
}
