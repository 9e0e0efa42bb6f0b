//! Attention over a cache of keys and values: `flash_attn_with_kvcache`, and packed queries with a block table.
//!
//! Nothing is written before every check has passed.

mod call;
mod contents;
mod engine;
mod metal;
mod operator;
mod overlap;

use mtlflashattn_core::{self as core, Demotions, Planner, Tier};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

use self::call::{CacheCall, CacheNumbers, Names, check_types, describe};
use self::contents::Contents;
use self::engine::Engine;
use self::metal::MetalCall;
use crate::arguments;
use crate::call::{Numbers, Slot, Tensors};
use crate::error::{Error, Result, guard};
use crate::execute::{Results, SMALL_FLOPS, allocate, cpu_device, make_readable, torch_rules};
use crate::form::Form;
use crate::forward::{check_tensors, read_any, read_direct, read_metadata};
use crate::tensor::{Place, View};
use crate::torch::Torch;
use crate::{settings, trace};

/// Attention over a cache as the public functions ask for it; `caches_named` if they call the caches `k_cache` and
/// `v_cache`. Returns out, or (out, lse) when `return_lse`.
#[pyfunction]
#[pyo3(signature = (caches_named, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
    cache_leftpad, block_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    window_size, softcap, rotary_interleaved, alibi_slopes, sinks, top_left, num_splits, return_lse, /))]
#[allow(clippy::too_many_arguments, reason = "positional arguments are the quickest way into Rust")]
pub fn attend_cached<'py>(
    py: Python<'py>,
    caches_named: bool,
    q: Bound<'py, PyAny>,
    k_cache: Bound<'py, PyAny>,
    v_cache: Bound<'py, PyAny>,
    k: Option<Bound<'py, PyAny>>,
    v: Option<Bound<'py, PyAny>>,
    rotary_cos: Option<Bound<'py, PyAny>>,
    rotary_sin: Option<Bound<'py, PyAny>>,
    cache_seqlens: Option<Bound<'py, PyAny>>,
    cache_batch_idx: Option<Bound<'py, PyAny>>,
    cache_leftpad: Option<Bound<'py, PyAny>>,
    block_table: Option<Bound<'py, PyAny>>,
    cu_seqlens_q: Option<Bound<'py, PyAny>>,
    cu_seqlens_k: Option<Bound<'py, PyAny>>,
    max_seqlen_q: &Bound<'py, PyAny>,
    max_seqlen_k: &Bound<'py, PyAny>,
    softmax_scale: &Bound<'py, PyAny>,
    causal: &Bound<'py, PyAny>,
    window_size: &Bound<'py, PyAny>,
    softcap: &Bound<'py, PyAny>,
    rotary_interleaved: &Bound<'py, PyAny>,
    alibi_slopes: Option<Bound<'py, PyAny>>,
    sinks: Option<Bound<'py, PyAny>>,
    top_left: bool,
    num_splits: &Bound<'py, PyAny>,
    return_lse: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    guard(|| {
        let torch = Torch::get(py)?;
        let names = if caches_named { Names::Caches } else { Names::Keys };
        let form = form(cu_seqlens_q.is_some());
        let common =
            Numbers::read(form, [max_seqlen_q, max_seqlen_q], softmax_scale, causal, window_size, softcap, top_left)?;
        let mut numbers = CacheNumbers {
            common,
            max_key_len: optional_index("max_seqlen_k", max_seqlen_k)?,
            cache_len: None,
            interleaved: arguments::truth("rotary_interleaved", rotary_interleaved)?,
            splits: arguments::index("num_splits", num_splits, "an integer from 0 to 128")?,
        };
        let want_lse = arguments::truth("return_softmax_lse", return_lse)?;
        let lengths = match cache_seqlens {
            Some(lengths) if !torch.is_tensor_like(&lengths)? => {
                let len = arguments::index("cache_seqlens", &lengths, "an integer, or an int32 tensor (batch)")?;
                numbers.cache_len = Some(len);
                None
            }
            lengths => lengths,
        };
        let objects = Tensors::new([
            Some(q),
            Some(k_cache),
            Some(v_cache),
            cu_seqlens_q,
            cu_seqlens_k,
            alibi_slopes,
            None,
            sinks,
            k,
            v,
            rotary_cos,
            rotary_sin,
            lengths,
            cache_batch_idx,
            cache_leftpad,
            block_table,
        ]);
        check_types(torch, names, &objects)?;
        refuse_gradients(torch, names, &objects)?;
        let mut views = Tensors::none();
        if !read_direct(py, torch, &objects, &mut views)? {
            return call_operator(py, names, &numbers, &objects, want_lse);
        }
        execute(py, torch, names, &numbers, objects, &mut views, want_lse)
    })
}

/// How q and out come.
fn form(packed: bool) -> Form {
    Form::new(1, packed, false)
}

fn optional_index(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<Option<i64>> {
    if value.is_none() { Ok(None) } else { arguments::index(argument, value, "None or an integer").map(Some) }
}

fn refuse_gradients(torch: &Torch, names: Names, objects: &Tensors<Bound<'_, PyAny>>) -> Result<()> {
    let py = objects.q().py();
    if !torch.is_grad_enabled(py)? {
        return Ok(());
    }
    for (slot, object) in objects.present() {
        if object.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
            return Err(Error::Problem(core::Error::Unsupported {
                argument: names.of(slot),
                got: "a tensor that requires grad, in attention over a cache,".into(),
                instead: "call under torch.no_grad(), or pass tensor.detach()".into(),
            }));
        }
    }
    Ok(())
}

/// Sends the call through an operator of torch.
fn call_operator<'py>(
    py: Python<'py>,
    names: Names,
    numbers: &CacheNumbers,
    objects: &Tensors<Bound<'py, PyAny>>,
    want_lse: bool,
) -> Result<Bound<'py, PyAny>> {
    static DISPATCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    check_tensors(py, objects, |slot| names.of(slot))?;
    // Caches are never copied.
    let copied = |slot: Slot| slot.has_rows() && !matches!(slot, Slot::K | Slot::V);
    if let Some(views) = read_metadata(objects, |slot| names.of(slot), copied)? {
        describe(names, numbers, objects, &views)?;
    }
    let dispatch = DISPATCH.import(py, "metal_flash_attn._cache_ops", "dispatch")?;
    let results = dispatch.call1(operator::to_python(py, numbers, objects)?)?;
    Ok(if want_lse { results } else { results.get_item(0)? })
}

/// The body of the operators, for every device.
#[pyfunction]
#[pyo3(signature = (*arguments))]
pub fn execute_cached_operator<'py>(py: Python<'py>, arguments: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
    guard(|| {
        let torch = Torch::get(py)?;
        let (numbers, objects) = operator::from_python(arguments)?;
        let mut views = read_any(torch, &objects)?;
        execute(py, torch, Names::Caches, &numbers, objects, &mut views, true)
    })
}

/// One call whose arguments are checked.
struct Call<'a, 'py> {
    numbers: &'a CacheNumbers,
    objects: &'a Tensors<Bound<'py, PyAny>>,
    cached: &'a CacheCall,
    contents: &'a Contents,
}

fn execute<'py>(
    py: Python<'py>,
    torch: &Torch,
    names: Names,
    numbers: &CacheNumbers,
    mut objects: Tensors<Bound<'py, PyAny>>,
    views: &mut Tensors<View>,
    want_lse: bool,
) -> Result<Bound<'py, PyAny>> {
    require_in_place(names, views)?;
    make_readable(torch, &mut objects, views)?;
    let cached = describe(names, numbers, &objects, views)?;
    if cached.append.is_some() {
        overlap::check(names, &objects, views)?;
    }
    let settings = settings::current(py)?;
    let mut demotions = Demotions::default();
    if let Some(device) = settings.metal_device(views.q().place) {
        let (objects, cached, resolved) = (&objects, &cached, &settings);
        let call = MetalCall { torch, names, objects, views, cached, device, resolved, want_lse };
        if let Some(results) = call.serve(py, &mut demotions)? {
            return Ok(results.into_python(py)?);
        }
    }
    let contents = Contents::read(torch, names, &objects, views, &cached)?;
    let problem = &cached.described.problem.with_longest_keys(&contents.buffers());
    let isa = settings.isa()?;
    let small = problem.flops() < SMALL_FLOPS;
    let threads = if small { 1 } else { torch.num_threads(py)? };
    let device = match (settings.metal_device(views.q().place), views.q().place) {
        (None, Place::Cpu) => cpu_device(isa, threads),
        _ => core::Device::Torch,
    };
    let planner = Planner { demotions: &demotions, ..Planner::new(device, &settings.values) };
    let plan = planner.plan(problem)?;
    let form = form(objects.get(Slot::CuSeqlensQ).is_some());
    let results = allocate(torch, form, &objects, &cached.described, want_lse)?;
    let call = Call { numbers, objects: &objects, cached: &cached, contents: &contents };
    match &plan.cpu {
        Some(tile) => {
            let engine = Engine { problem, tile, isa, threads, small };
            engine.run(py, torch, &call, views, &results)?;
        }
        None => run_torch(py, &call, settings.values.torch_chunk, &results)?,
    }
    // What torch itself wrote it has counted.
    if cached.append.is_some() && plan.tier != Tier::Torch {
        count_write(py, &objects)?;
    }
    trace::record(py, &planner, problem, &plan)?;
    Ok(results.into_python(py)?)
}

/// Requires caches that engines read and write where they lie.
fn require_in_place(names: Names, views: &Tensors<View>) -> Result<()> {
    for slot in [Slot::K, Slot::V] {
        let Some(view) = views.get(slot) else { continue };
        let got = if !view.has_contiguous_rows() {
            format!("a tensor with last stride {}", view.strides().last().copied().unwrap_or_default())
        } else if !view.is_aligned() {
            "a tensor whose elements do not lie at multiples of their size".into()
        } else {
            continue;
        };
        return Err(Error::Problem(core::Error::Value {
            argument: names.of(slot),
            got,
            allowed: "aligned tensors whose last dimension is contiguous, as caches are never copied".into(),
        }));
    }
    Ok(())
}

/// Lets autograd know that the caches were written, as torch's own in-place functions do.
fn count_write(py: Python<'_>, objects: &Tensors<Bound<'_, PyAny>>) -> Result<()> {
    static INCREMENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let increment = INCREMENT.import(py, "metal_flash_attn._cache_ops", "count_write")?;
    increment.call1((objects.get(Slot::K), objects.get(Slot::V)))?;
    Ok(())
}

/// Hands the call to the tensor operations of `metal_flash_attn._torch_cache`.
fn run_torch(py: Python<'_>, call: &Call<'_, '_>, chunk: usize, results: &Results<'_>) -> Result<()> {
    let Call { numbers, objects, cached, contents, .. } = *call;
    let problem = &cached.described.problem;
    let cache = problem.cache.as_ref().expect("a call over a cache");
    let buffers = contents.buffers();
    let batch = problem.lengths.batch();
    let keywords = PyDict::new(py);
    let rows = |sequence, keys: std::ops::Range<usize>| {
        keys.map(|key| cache.row(&buffers, sequence, key)).map(|row| (row.block as i64, row.row as i64)).unzip()
    };
    let keys = (0..batch).map(|sequence| {
        let (blocks, rows): (Vec<i64>, Vec<i64>) = rows(sequence, 0..cache.key_len(&buffers, sequence));
        Ok((Torch::indices(objects.q(), &blocks)?, Torch::indices(objects.q(), &rows)?))
    });
    let filled: Vec<i64> = (0..batch).map(|sequence| cache.filled(&buffers, sequence) as i64).collect();
    keywords.set_item("keys", keys.collect::<PyResult<Vec<_>>>()?)?;
    keywords.set_item("filled", Torch::indices(objects.q(), &filled)?)?;
    for (name, slot) in [
        ("new_keys", Slot::NewK),
        ("new_values", Slot::NewV),
        ("rotary_cos", Slot::RotaryCos),
        ("rotary_sin", Slot::RotarySin),
        ("alibi_slopes", Slot::AlibiSlopes),
    ] {
        keywords.set_item(name, objects.get(slot))?;
    }
    let rotary = cached.append.and_then(|append| append.rotary);
    keywords.set_item("interleaved", numbers.interleaved)?;
    keywords.set_item("queries_advance", rotary.is_some_and(|rotary| rotary.queries_advance))?;
    let packed = objects.get(Slot::CuSeqlensQ).is_some();
    keywords.set_item("query_offsets", packed.then_some(&contents.offsets.query))?;
    keywords.set_item("out", &results.out)?;
    keywords.set_item("lse", results.lse.as_ref().map(|(lse, _)| lse))?;
    keywords.set_item("rules", torch_rules(problem, &numbers.common, objects, chunk))?;
    let inputs = (objects.q(), objects.get(Slot::K), objects.get(Slot::V));
    py.import("metal_flash_attn._torch_cache")?.getattr("forward")?.call(inputs, Some(&keywords))?;
    Ok(())
}
