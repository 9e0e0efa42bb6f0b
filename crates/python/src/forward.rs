//! The functions behind every attention call: the direct lane for plain CPU and MPS tensors, the operator for the rest.

use mtlflashattn_core as core;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

use crate::arguments;
use crate::call::{Numbers, Slot, Tensors, describe};
use crate::error::{Error, Result, guard};
use crate::execute::{execute, read_plain, unreadable};
use crate::form::{Form, OutLayout};
use crate::operator;
use crate::tensor::{Element, Place, View};
use crate::torch::Torch;

/// Attention as the public functions ask for it. `packing` counts the tensors that came as one: 1 is q, k, v; 2 is q, kv;
/// 3 is qkv. Returns out, or (out, lse) when `return_lse`, with the random state behind them where something is dropped.
#[pyfunction]
#[pyo3(signature = (packing, varlen, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size, softcap, alibi_slopes, bias, mask, sinks, top_left, return_lse, /))]
#[allow(clippy::too_many_arguments, reason = "positional arguments are the quickest way into Rust")]
pub fn forward<'py>(
    py: Python<'py>,
    packing: u8,
    varlen: bool,
    q: Bound<'py, PyAny>,
    k: Bound<'py, PyAny>,
    v: Bound<'py, PyAny>,
    cu_seqlens_q: Bound<'py, PyAny>,
    cu_seqlens_k: Bound<'py, PyAny>,
    max_seqlen_q: &Bound<'py, PyAny>,
    max_seqlen_k: &Bound<'py, PyAny>,
    dropout_p: &Bound<'py, PyAny>,
    softmax_scale: &Bound<'py, PyAny>,
    causal: &Bound<'py, PyAny>,
    window_size: &Bound<'py, PyAny>,
    softcap: &Bound<'py, PyAny>,
    alibi_slopes: Option<Bound<'py, PyAny>>,
    bias: Option<Bound<'py, PyAny>>,
    mask: Option<Bound<'py, PyAny>>,
    sinks: Option<Bound<'py, PyAny>>,
    top_left: bool,
    return_lse: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    guard(|| {
        let torch = Torch::get(py)?;
        let form = Form::new(packing, varlen, mask.is_some());
        let mut numbers =
            Numbers::read(form, [max_seqlen_q, max_seqlen_k], softmax_scale, causal, window_size, softcap, top_left)?;
        numbers.dropout_p = arguments::float("dropout_p", dropout_p, "a real number")?;
        let drops = numbers.dropout()?.is_some();
        let want_lse = arguments::truth("return_attn_probs", return_lse)?;
        let tensors = Tensors::new([
            Some(q),
            (packing < 3).then_some(k),
            (packing < 2).then_some(v),
            varlen.then_some(cu_seqlens_q),
            varlen.then_some(cu_seqlens_k),
            alibi_slopes,
            mask.or(bias),
            sinks,
        ]);
        let mut views = Tensors::none();
        let is_direct = read_direct(py, torch, &tensors, &mut views)?;
        if !is_direct {
            tensors.check_types(torch, form)?;
        }
        let rng_state = if drops { Some(draw(tensors.q(), is_direct)?) } else { None };
        let rng = rng_state.as_ref();
        let results = if !is_direct {
            call_operator(py, form, &numbers, &tensors, rng, want_lse)?
        } else if tensors.need_gradients(torch)? {
            call_autograd(py, packing, form, &numbers, &tensors, rng, want_lse)?
        } else {
            numbers.rng_state = rng.map_or(Ok([0; 2]), operator::read_rng_state)?;
            execute(py, torch, form, &numbers, tensors, &mut views, want_lse)?
        };
        match rng_state {
            Some(state) if want_lse => {
                Ok((results.get_item(0)?, results.get_item(1)?, state).into_pyobject(py)?.into_any())
            }
            _ => Ok(results),
        }
    })
}

/// Reads the tensors if they are plain tensors of one place that some engine reads directly, and nothing wants to see the
/// call (torch.compile is asked earlier, in Python); false sends the call to the operator.
pub fn read_direct(
    py: Python<'_>,
    torch: &Torch,
    tensors: &Tensors<Bound<'_, PyAny>>,
    views: &mut Tensors<View>,
) -> Result<bool> {
    if !tensors.present().all(|(_, tensor)| torch.is_plain(tensor)) || torch.is_watched(py)? {
        return Ok(false);
    }
    let mut first = None;
    for (slot, tensor) in tensors.present() {
        match read_plain(torch, tensor)? {
            Some(view) if *first.get_or_insert(view.place) == view.place => views.set(slot, view),
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// Takes a random state from the generator of a tensor's device.
fn draw<'py>(q: &Bound<'py, PyAny>, is_direct: bool) -> Result<Bound<'py, PyAny>> {
    static DRAW: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static OPERATOR: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = q.py();
    let draw = if is_direct {
        DRAW.import(py, "metal_flash_attn._dropout", "draw")?
    } else {
        OPERATOR.import(py, "metal_flash_attn._ops", "draw")?
    };
    Ok(draw.call1((q.getattr(intern!(py, "device"))?,))?)
}

/// Sends the call through `torch.ops.mtlflashattn.forward`.
fn call_operator<'py>(
    py: Python<'py>,
    form: Form,
    numbers: &Numbers,
    tensors: &Tensors<Bound<'py, PyAny>>,
    rng_state: Option<&Bound<'py, PyAny>>,
    want_lse: bool,
) -> Result<Bound<'py, PyAny>> {
    static DISPATCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    check_tensors(py, tensors, |slot| form.public_name(slot.name()))?;
    check_static(form, numbers, tensors)?;
    let dispatch = DISPATCH.import(py, "metal_flash_attn._ops", "dispatch")?;
    let arguments = operator::to_python(py, form, numbers, tensors, rng_state)?;
    let results = dispatch.call1(arguments)?;
    Ok(if want_lse { results } else { results.get_item(0)? })
}

/// Sends the call through `torch.autograd`, which calls back without gradients.
fn call_autograd<'py>(
    py: Python<'py>,
    packing: u8,
    form: Form,
    numbers: &Numbers,
    tensors: &Tensors<Bound<'py, PyAny>>,
    rng_state: Option<&Bound<'py, PyAny>>,
    want_lse: bool,
) -> Result<Bound<'py, PyAny>> {
    static ATTEND: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    check_static(form, numbers, tensors)?;
    let attend = ATTEND.import(py, "metal_flash_attn._autograd", "attend")?;
    let inputs = (packing, tensors.q(), tensors.get(Slot::K), tensors.get(Slot::V)).into_pyobject(py)?;
    let rest = operator::rest_to_python(py, numbers, tensors, rng_state)?;
    let results = attend.call1(inputs.as_sequence().concat(rest.as_sequence())?.to_tuple()?)?;
    Ok(if want_lse { results } else { results.get_item(0)? })
}

/// Checks the call by its metadata alone where that is at hand.
fn check_static(form: Form, numbers: &Numbers, tensors: &Tensors<Bound<'_, PyAny>>) -> Result<()> {
    match read_metadata(tensors, |slot| form.public_name(slot.name()), Slot::has_rows)? {
        Some(views) => describe(form, numbers, tensors, &views).map(|_| ()),
        None => Ok(()),
    }
}

/// Has torch's side check that operators would not misread the tensors of a call, which are called by `name`.
pub fn check_tensors(
    py: Python<'_>,
    tensors: &Tensors<Bound<'_, PyAny>>,
    name: impl Fn(Slot) -> &'static str,
) -> Result<()> {
    static CHECK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let check_tensor = CHECK.import(py, "metal_flash_attn._ops", "check_tensor")?;
    for (slot, tensor) in tensors.present() {
        check_tensor.call1((name(slot), tensor))?;
    }
    Ok(())
}

/// Views without memory of tensors on one device, with contiguous rows where they are `copied` otherwise; `None` where
/// there are symbolic sizes or stand-ins for tensors.
pub fn read_metadata(
    tensors: &Tensors<Bound<'_, PyAny>>,
    name: impl Fn(Slot) -> &'static str,
    copied: impl Fn(Slot) -> bool,
) -> Result<Option<Tensors<View>>> {
    let py = tensors.q().py();
    let Ok(device) = tensors.q().getattr(intern!(py, "device")) else { return Ok(None) };
    let mut views = Tensors::none();
    for (slot, tensor) in tensors.present() {
        // What stands in for a tensor has no numbers as sizes.
        let Some(view) = View::describe(tensor).ok().flatten() else { return Ok(None) };
        views.set(slot, if copied(slot) { view.with_contiguous_rows() } else { view });
        let other = tensor.getattr(intern!(py, "device"))?;
        if !other.eq(&device)? {
            return Err(Error::Problem(core::Error::Value {
                argument: name(slot),
                got: format!("on device {}", other.str()?.to_string_lossy()),
                allowed: format!("{}, the device of {}", device.str()?.to_string_lossy(), name(Slot::Q)),
            }));
        }
    }
    Ok(Some(views))
}

/// The body of `torch.ops.mtlflashattn.forward`, for every device; gradients are settled.
///
/// Torch calls it without a Python frame between, which torch.compile would try to trace after a graph break.
#[pyfunction]
#[pyo3(signature = (*arguments))]
pub fn execute_operator<'py>(py: Python<'py>, arguments: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
    guard(|| {
        let torch = Torch::get(py)?;
        let (form, numbers, tensors) = operator::from_python(arguments)?;
        let mut views = read_any(torch, &tensors)?;
        execute(py, torch, form, &numbers, tensors, &mut views, true)
    })
}

/// `scaled_dot_product_attention` without gradients, dropout and broadcasting of q, k and v:
/// q `[batch, heads, seqlen, head_dim]`, and so on. `out_layout` is a name of [`OutLayout`].
#[pyfunction]
#[pyo3(signature = (query, key, value, attn_mask, is_causal, scale, out_layout, /))]
#[allow(clippy::too_many_arguments, reason = "positional arguments are the quickest way into Rust")]
pub fn sdpa<'py>(
    py: Python<'py>,
    query: Bound<'py, PyAny>,
    key: Bound<'py, PyAny>,
    value: Bound<'py, PyAny>,
    attn_mask: Option<Bound<'py, PyAny>>,
    is_causal: bool,
    scale: Option<f64>,
    out_layout: &str,
) -> PyResult<Bound<'py, PyAny>> {
    guard(|| {
        let torch = Torch::get(py)?;
        let layout = OutLayout::from_name(out_layout).ok_or_else(|| {
            Error::Problem(core::Error::Value {
                argument: "out_layout",
                got: out_layout.into(),
                allowed: "like_query, contiguous or tokens_first".into(),
            })
        })?;
        let tensors = Tensors::new([Some(query), Some(key), Some(value), None, None, None, attn_mask, None]);
        let mut views = read_any(torch, &tensors)?;
        let boolean_mask = views.get(Slot::Bias).is_some_and(|view| view.element == Element::Bool);
        let form = Form::heads_first(layout, boolean_mask);
        if tensors.need_gradients(torch)? {
            // Such calls of the patch take `attention`.
            return Err(Error::Problem(core::Error::Unsupported {
                argument: "query, key, value",
                got: "a tensor that requires grad".into(),
                instead: "call under torch.no_grad(), or pass tensor.detach()".into(),
            }));
        }
        let numbers = Numbers {
            max_seqlen: (0, 0),
            softmax_scale: scale,
            causal: is_causal,
            window: (-1, -1),
            softcap: 0.0,
            top_left: true,
            dropout_p: 0.0,
            rng_state: [0; 2],
        };
        execute(py, torch, form, &numbers, tensors, &mut views, false)
    })
}

/// Reads tensors of one place, whichever it is.
pub fn read_any(torch: &Torch, tensors: &Tensors<Bound<'_, PyAny>>) -> Result<Tensors<View>> {
    let place = Place::of(tensors.q())?;
    let mut views = Tensors::none();
    for (slot, tensor) in tensors.present() {
        let view = if place == Place::Cpu { read_plain(torch, tensor)? } else { View::describe(tensor)? };
        let here = view.filter(|view| view.place == place);
        views.set(slot, here.ok_or_else(|| unreadable(slot.name()))?);
    }
    Ok(views)
}
