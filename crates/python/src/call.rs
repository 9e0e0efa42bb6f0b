//! One call of the API: its arguments as Rust values, and the problem they form.

use mtlflashattn_core as core;
use mtlflashattn_core::{Alignment, BiasKind, Dropout, Dtype, Options, Problem};
use pyo3::intern;
use pyo3::prelude::*;

use crate::arguments;
use crate::error::{Error, Result};
use crate::form::Form;
use crate::tensor::{Element, View};
use crate::torch::Torch;

/// Everything of a call that is not a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    pub max_seqlen: (i64, i64),
    pub softmax_scale: Option<f64>,
    pub causal: bool,
    pub window: (i64, i64),
    pub softcap: f64,
    pub top_left: bool,
    pub dropout_p: f64,
    /// Seed and offset; without dropout they mean nothing.
    pub rng_state: [u64; 2],
}

impl Numbers {
    /// What is dropped.
    pub fn dropout(&self) -> core::Result<Option<Dropout>> {
        let [seed, offset] = self.rng_state;
        Dropout::new(self.dropout_p, seed, offset)
    }

    pub fn read(
        form: Form,
        max_seqlen: [&Bound<'_, PyAny>; 2],
        softmax_scale: &Bound<'_, PyAny>,
        causal: &Bound<'_, PyAny>,
        window_size: &Bound<'_, PyAny>,
        softcap: &Bound<'_, PyAny>,
        top_left: bool,
    ) -> Result<Self> {
        let length = |name, value| arguments::index(form.public_name(name), value, "an integer");
        Ok(Self {
            max_seqlen: if form.varlen {
                (length("max_seqlen_q", max_seqlen[0])?, length("max_seqlen_k", max_seqlen[1])?)
            } else {
                (0, 0)
            },
            softmax_scale: arguments::optional_float("softmax_scale", softmax_scale)?,
            causal: arguments::truth("causal", causal)?,
            window: arguments::window(window_size)?,
            softcap: arguments::float("softcap", softcap, "a real number")?,
            top_left,
            dropout_p: 0.0,
            rng_state: [0; 2],
        })
    }
}

/// A tensor argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// q, or qkv.
    Q,
    /// k, or kv.
    K,
    V,
    CuSeqlensQ,
    CuSeqlensK,
    AlibiSlopes,
    /// Additive bias or boolean mask.
    Bias,
    Sinks,
    /// Keys to append to a cache, which is `K` then.
    NewK,
    NewV,
    RotaryCos,
    RotarySin,
    CacheSeqlens,
    CacheBatchIdx,
    CacheLeftpad,
    BlockTable,
}

impl Slot {
    pub const ALL: [Self; 16] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::CuSeqlensQ,
        Self::CuSeqlensK,
        Self::AlibiSlopes,
        Self::Bias,
        Self::Sinks,
        Self::NewK,
        Self::NewV,
        Self::RotaryCos,
        Self::RotarySin,
        Self::CacheSeqlens,
        Self::CacheBatchIdx,
        Self::CacheLeftpad,
        Self::BlockTable,
    ];

    /// Whether engines need neighbours along the last dimension side by side.
    pub const fn has_rows(self) -> bool {
        matches!(
            self,
            Self::Q
                | Self::K
                | Self::V
                | Self::NewK
                | Self::NewV
                | Self::RotaryCos
                | Self::RotarySin
                | Self::CacheSeqlens
                | Self::CacheBatchIdx
                | Self::CacheLeftpad
                | Self::BlockTable
        )
    }

    /// Name in the functions that pack nothing.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::K | Self::NewK => "k",
            Self::V | Self::NewV => "v",
            Self::CuSeqlensQ => "cu_seqlens_q",
            Self::CuSeqlensK => "cu_seqlens_k",
            Self::AlibiSlopes => "alibi_slopes",
            Self::Bias => "bias",
            Self::Sinks => "sinks",
            Self::RotaryCos => "rotary_cos",
            Self::RotarySin => "rotary_sin",
            Self::CacheSeqlens => "cache_seqlens",
            Self::CacheBatchIdx => "cache_batch_idx",
            Self::CacheLeftpad => "cache_leftpad",
            Self::BlockTable => "block_table",
        }
    }
}

/// The tensors of a call, as Python objects or as what was read from them. There always is a q.
#[derive(Debug)]
pub struct Tensors<T>([Option<T>; Slot::ALL.len()]);

impl<T> Tensors<T> {
    /// In the order of [`Slot::ALL`], of which the last ones may be left out.
    pub fn new<const N: usize>(tensors: [Option<T>; N]) -> Self {
        let mut all = Self::none();
        for (to, tensor) in all.0.iter_mut().zip(tensors) {
            *to = tensor;
        }
        all
    }

    pub const fn none() -> Self {
        Self([const { None }; Slot::ALL.len()])
    }

    pub const fn get(&self, slot: Slot) -> Option<&T> {
        self.0[slot as usize].as_ref()
    }

    pub fn set(&mut self, slot: Slot, tensor: T) {
        self.0[slot as usize] = Some(tensor);
    }

    pub fn q(&self) -> &T {
        self.get(Slot::Q).expect("every call has a q")
    }

    /// Each tensor that is there.
    pub fn present(&self) -> impl Iterator<Item = (Slot, &T)> {
        Slot::ALL.into_iter().zip(&self.0).filter_map(|(slot, tensor)| Some((slot, tensor.as_ref()?)))
    }
}

impl Tensors<Bound<'_, PyAny>> {
    /// Requires a tensor (or something that stands in for one) wherever `form` needs it.
    pub fn check_types(&self, torch: &Torch, form: Form) -> Result<()> {
        for (slot, tensor) in self.present() {
            if !torch.is_tensor_like(tensor)? {
                return Err(arguments::wrong_type(form.public_name(slot.name()), tensor, "torch.Tensor"));
            }
        }
        Ok(())
    }

    /// Whether a gradient is to be computed.
    pub fn need_gradients(&self, torch: &Torch) -> Result<bool> {
        let py = self.q().py();
        if !torch.is_grad_enabled(py)? {
            return Ok(false);
        }
        let mut needed = false;
        for (slot, tensor) in self.present() {
            if tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
                if slot == Slot::AlibiSlopes {
                    return Err(Error::Problem(core::Error::Unsupported {
                        argument: slot.name(),
                        got: "a tensor that requires grad".into(),
                        instead: "pass alibi_slopes.detach()".into(),
                    }));
                }
                needed = true;
            }
        }
        Ok(needed)
    }
}

/// q, k and v of a call, with the problem they form.
pub struct Described {
    pub q: View,
    pub k: View,
    pub v: View,
    pub problem: Problem,
}

/// Checks everything but the contents of tensors.
pub fn describe(
    form: Form,
    numbers: &Numbers,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &Tensors<View>,
) -> Result<Described> {
    let [q, k, v] = form.split(views)?;
    let k_object = objects.get(Slot::K).unwrap_or(objects.q());
    let v_object = objects.get(Slot::V).unwrap_or(k_object);
    let q_meta = q.meta(float_dtype(form.public_name("q"), &q, objects.q())?);
    let k_meta = k.meta(float_dtype(form.public_name("k"), &k, k_object)?);
    let v_meta = v.meta(float_dtype(form.public_name("v"), &v, v_object)?);
    let slopes = float32(Slot::AlibiSlopes, objects, views)?;
    let sinks = float32(Slot::Sinks, objects, views)?;
    let bias = bias_kind(form, objects, views)?;
    let options = Options {
        softmax_scale: numbers.softmax_scale,
        causal: numbers.causal,
        window: numbers.window,
        alignment: if numbers.top_left { Alignment::TopLeft } else { Alignment::BottomRight },
        softcap: numbers.softcap,
        alibi_slopes: slopes.map(|view| (view.shape(), view.strides())),
        bias: bias.map(|(kind, view)| (kind, view.shape(), view.strides())),
        sinks: sinks.map(|view| (view.shape(), view.strides())),
        dropout: numbers.dropout()?,
        splits: None,
    };
    let problem = if form.varlen {
        let batch = sequences(form, objects, views)?;
        Problem::packed(q_meta, k_meta, v_meta, batch, numbers.max_seqlen, &options)
    } else {
        Problem::dense(q_meta, k_meta, v_meta, &options)
    };
    let problem = problem.map_err(|error| form.translate(error, views))?;
    Ok(Described { q, k, v, problem })
}

/// Checks `cu_seqlens_*` but for their contents, and counts the sequences.
fn sequences(form: Form, objects: &Tensors<Bound<'_, PyAny>>, views: &Tensors<View>) -> Result<usize> {
    let mut batch = [0; 2];
    for (batch, slot) in batch.iter_mut().zip([Slot::CuSeqlensQ, Slot::CuSeqlensK]) {
        let name = form.public_name(slot.name());
        let (Some(object), Some(view)) = (objects.get(slot), views.get(slot)) else {
            return Err(Error::WrongType { argument: name, got: "None".into(), allowed: "torch.Tensor".into() });
        };
        if view.element != Element::Int32 {
            return Err(dtype_error(name, object, "int32"));
        }
        match *view.shape() {
            [offsets] if offsets > 0 && view.has_contiguous_rows() => *batch = offsets as usize - 1,
            [offsets] if offsets > 0 => {
                return Err(Error::Problem(core::Error::Value {
                    argument: name,
                    got: format!("a tensor with stride {}", view.strides()[0]),
                    allowed: "a contiguous tensor".into(),
                }));
            }
            _ => {
                return Err(Error::Problem(core::Error::Shape {
                    argument: name,
                    got: view.shape_text(),
                    allowed: "(batch + 1): where each sequence starts, and where the last one ends".into(),
                }));
            }
        }
    }
    if batch[0] != batch[1] {
        return Err(Error::Problem(core::Error::Shape {
            argument: "cu_seqlens_k",
            got: format!("({})", batch[1] + 1),
            allowed: format!("({}), as cu_seqlens_q", batch[0] + 1),
        }));
    }
    Ok(batch[0])
}

pub fn float_dtype(argument: &'static str, view: &View, object: &Bound<'_, PyAny>) -> Result<Dtype> {
    match view.element {
        Element::Float(dtype) => Ok(dtype),
        _ => Err(dtype_error(argument, object, "float32, float16 or bfloat16")),
    }
}

pub fn float32<'a>(
    slot: Slot,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &'a Tensors<View>,
) -> Result<Option<&'a View>> {
    match (objects.get(slot), views.get(slot)) {
        (Some(object), Some(view)) if view.element != Element::Float(Dtype::F32) => {
            Err(dtype_error(slot.name(), object, "float32"))
        }
        (_, view) => Ok(view),
    }
}

fn bias_kind<'a>(
    form: Form,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &'a Tensors<View>,
) -> Result<Option<(BiasKind, &'a View)>> {
    let (Some(object), Some(view)) = (objects.get(Slot::Bias), views.get(Slot::Bias)) else { return Ok(None) };
    match view.element {
        Element::Bool if form.boolean_mask => Ok(Some((BiasKind::Boolean, view))),
        Element::Float(dtype) if !form.boolean_mask => Ok(Some((BiasKind::Additive(dtype), view))),
        _ if form.boolean_mask => Err(dtype_error("mask", object, "bool")),
        _ => Err(dtype_error("bias", object, "float32, float16 or bfloat16")),
    }
}

pub fn dtype_error(argument: &'static str, object: &Bound<'_, PyAny>, allowed: &str) -> Error {
    let name = object.getattr(intern!(object.py(), "dtype")).and_then(|dtype| dtype.str()?.extract::<String>());
    let got = name.unwrap_or_else(|_| "unknown".into()).trim_start_matches("torch.").to_owned();
    Error::Problem(core::Error::Dtype { argument, got, allowed: allowed.into() })
}
