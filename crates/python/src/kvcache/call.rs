//! One call over a cache: its arguments as Rust values, and the problem they form.

use std::num::NonZeroUsize;

use mtlflashattn_core as core;
use mtlflashattn_core::{Alignment, Append, CacheOptions, LengthsArgument, Options, Pairs, Problem, RotaryOptions};
use pyo3::prelude::*;

use crate::arguments;
use crate::call::{Described, Numbers, Slot, Tensors, dtype_error, float_dtype, float32};
use crate::error::{Error, Result};
use crate::tensor::{Element, View};
use crate::torch::Torch;

/// Everything of a call that is not a tensor.
#[derive(Clone, Copy, Debug)]
pub struct CacheNumbers {
    /// `max_seqlen.1` is not used.
    pub common: Numbers,
    /// The caller's bound on the longest key sequence, if there is one.
    pub max_key_len: Option<i64>,
    /// `cache_seqlens` as a number.
    pub cache_len: Option<i64>,
    /// `rotary_interleaved`.
    pub interleaved: bool,
    /// `num_splits`; 0 leaves it to the planner.
    pub splits: i64,
}

/// What callers of a function call the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// `k_cache` and `v_cache`; `k` and `v` are new.
    Caches,
    /// `k` and `v`.
    Keys,
}

impl Names {
    /// Name of an argument.
    pub const fn of(self, slot: Slot) -> &'static str {
        match (self, slot) {
            (Self::Caches, Slot::K) => "k_cache",
            (Self::Caches, Slot::V) => "v_cache",
            _ => slot.name(),
        }
    }

    /// `error` of the core, which speaks of caches, in the caller's words.
    pub fn translate(self, mut error: core::Error) -> Error {
        if self == Self::Keys
            && let core::Error::Shape { argument, .. }
            | core::Error::Dtype { argument, .. }
            | core::Error::Value { argument, .. }
            | core::Error::Unsupported { argument, .. } = &mut error
        {
            *argument = match *argument {
                "k_cache" => "k",
                "v_cache" => "v",
                other => other,
            };
            if let core::Error::Shape { allowed, .. } = &mut error {
                *allowed = allowed.replace("k_cache", "k");
            }
        }
        Error::Problem(error)
    }
}

/// `num_splits` as the core takes it.
fn splits(num_splits: i64) -> Result<Option<NonZeroUsize>> {
    const MAX_SPLITS: i64 = 128;
    match num_splits {
        0..=MAX_SPLITS => Ok(NonZeroUsize::new(num_splits as usize)),
        other => Err(Error::Problem(core::Error::Value {
            argument: "num_splits",
            got: other.to_string(),
            allowed: format!("0 to {MAX_SPLITS}"),
        })),
    }
}

/// A call's tensors, with the problem and what is appended.
pub struct CacheCall {
    /// k and v are the caches.
    pub described: Described,
    pub append: Option<Append>,
}

/// Requires tensors wherever there is something.
pub fn check_types(torch: &Torch, names: Names, objects: &Tensors<Bound<'_, PyAny>>) -> Result<()> {
    for (slot, object) in objects.present() {
        if !torch.is_tensor_like(object)? {
            return Err(arguments::wrong_type(names.of(slot), object, "torch.Tensor"));
        }
    }
    Ok(())
}

/// Checks everything but the contents of tensors.
pub fn describe(
    names: Names,
    numbers: &CacheNumbers,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &Tensors<View>,
) -> Result<CacheCall> {
    check_pairs(names, objects)?;
    let (q, k, v) = (*views.q(), required(names, Slot::K, views)?, required(names, Slot::V, views)?);
    let meta = |slot, view: &View| float_dtype(names.of(slot), view, objects.get(slot).expect("read"));
    let (q_dtype, k_dtype, v_dtype) = (meta(Slot::Q, &q)?, meta(Slot::K, &k)?, meta(Slot::V, &v)?);
    let common = &numbers.common;
    let slopes = float32(Slot::AlibiSlopes, objects, views)?;
    let sinks = float32(Slot::Sinks, objects, views)?;
    let options = Options {
        softmax_scale: common.softmax_scale,
        causal: common.causal,
        window: common.window,
        alignment: if common.top_left { Alignment::TopLeft } else { Alignment::BottomRight },
        softcap: common.softcap,
        alibi_slopes: slopes.map(|view| (view.shape(), view.strides())),
        sinks: sinks.map(|view| (view.shape(), view.strides())),
        splits: splits(numbers.splits)?,
        ..Options::default()
    };
    let cache = cache_options(names, numbers, objects, views)?;
    let (q_meta, k_meta, v_meta) = (q.meta(q_dtype), k.meta(k_dtype), v.meta(v_dtype));
    let problem = match int32_shape(names, Slot::CuSeqlensQ, objects, views)? {
        None => Problem::cached(q_meta, k_meta, v_meta, &cache, &options),
        Some(&[offsets]) if offsets > 0 => {
            let max_seqlen = (common.max_seqlen.0, numbers.max_key_len);
            Problem::packed_cached(q_meta, k_meta, v_meta, offsets as usize - 1, max_seqlen, &cache, &options)
        }
        Some(_) => {
            return Err(Error::Problem(core::Error::Shape {
                argument: "cu_seqlens_q",
                got: views.get(Slot::CuSeqlensQ).map_or_else(String::new, View::shape_text),
                allowed: "(batch + 1): where each sequence starts, and where the last one ends".into(),
            }));
        }
    };
    let problem = problem.map_err(|error| names.translate(error))?;
    let append = append(names, numbers, objects, views, &problem)?;
    Ok(CacheCall { described: Described { q, k, v, problem }, append })
}

/// Requires that what comes in pairs comes in pairs.
fn check_pairs(names: Names, objects: &Tensors<Bound<'_, PyAny>>) -> Result<()> {
    let pairs = [(Slot::NewK, Slot::NewV), (Slot::RotaryCos, Slot::RotarySin)];
    let both_ways = pairs.into_iter().flat_map(|(first, second)| [(first, second), (second, first)]);
    for (there, missing) in both_ways.chain([(Slot::RotaryCos, Slot::NewK)]) {
        if objects.get(there).is_some() && objects.get(missing).is_none() {
            return Err(Error::Problem(core::Error::Value {
                argument: names.of(missing),
                got: "None".into(),
                allowed: format!("a tensor, as {} is one", names.of(there)),
            }));
        }
    }
    Ok(())
}

fn required(names: Names, slot: Slot, views: &Tensors<View>) -> Result<View> {
    let argument = names.of(slot);
    let none = || Error::WrongType { argument, got: "None".into(), allowed: "torch.Tensor".into() };
    views.get(slot).copied().ok_or_else(none)
}

/// The shape of a tensor of int32; `None` where there is no tensor.
fn int32_shape<'a>(
    names: Names,
    slot: Slot,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &'a Tensors<View>,
) -> Result<Option<&'a [i64]>> {
    let (Some(object), Some(view)) = (objects.get(slot), views.get(slot)) else { return Ok(None) };
    if view.element == Element::Int32 {
        Ok(Some(view.shape()))
    } else {
        Err(dtype_error(names.of(slot), object, "int32"))
    }
}

fn cache_options<'a>(
    names: Names,
    numbers: &CacheNumbers,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &'a Tensors<View>,
) -> Result<CacheOptions<'a>> {
    let shape = |slot| int32_shape(names, slot, objects, views);
    let lengths = match (numbers.cache_len, shape(Slot::CacheSeqlens)?, shape(Slot::CuSeqlensK)?) {
        (Some(len), ..) => Some(LengthsArgument::Same(len)),
        (None, Some(shape), _) => Some(LengthsArgument::Each(shape)),
        (None, None, offsets) => offsets.map(LengthsArgument::Offsets),
    };
    let table = shape(Slot::BlockTable)?;
    let new_keys = views.get(Slot::NewK).and_then(|view| view.shape().get(1)).copied();
    Ok(CacheOptions {
        lengths,
        batch_index: shape(Slot::CacheBatchIdx)?,
        left_pad: shape(Slot::CacheLeftpad)?,
        block_table: table.map(|shape| (shape, views.get(Slot::BlockTable).map_or(&[][..], View::strides))),
        new_len: new_keys.unwrap_or(0) as usize,
    })
}

fn append(
    names: Names,
    numbers: &CacheNumbers,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &Tensors<View>,
    problem: &Problem,
) -> Result<Option<Append>> {
    let dtype = |slot, view: &View| float_dtype(names.of(slot), view, objects.get(slot).expect("read"));
    let (Some(k), Some(v)) = (views.get(Slot::NewK), views.get(Slot::NewV)) else { return Ok(None) };
    let (k, v) = (k.meta(dtype(Slot::NewK, k)?), v.meta(dtype(Slot::NewV, v)?));
    let rotary = match (views.get(Slot::RotaryCos), views.get(Slot::RotarySin)) {
        (Some(cos), Some(sin)) => Some(RotaryOptions {
            cos: cos.meta(dtype(Slot::RotaryCos, cos)?),
            sin: sin.meta(dtype(Slot::RotarySin, sin)?),
            pairs: if numbers.interleaved { Pairs::Neighbours } else { Pairs::Halves },
        }),
        _ => None,
    };
    let append = Append::new(problem, k, v, rotary.as_ref());
    append.map(Some).map_err(|error| names.translate(error))
}
