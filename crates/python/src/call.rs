//! One call of the API: its arguments as Rust values, and the problem they form.

use mtlflashattn_core as core;
use mtlflashattn_core::{Alignment, BiasKind, Dtype, Options, Problem};
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
}

impl Numbers {
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
        })
    }
}

/// The tensors of a call: Python objects, or what was read from them. Packed forms put qkv into `q`, and kv into `k`.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<T> {
    pub q: T,
    pub k: Option<T>,
    pub v: Option<T>,
    pub cu_seqlens_q: Option<T>,
    pub cu_seqlens_k: Option<T>,
    pub alibi_slopes: Option<T>,
    pub bias: Option<T>,
    pub sinks: Option<T>,
}

impl<T> Tensors<T> {
    /// Each tensor that is there, with its name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let optional = [
            ("k", &self.k),
            ("v", &self.v),
            ("cu_seqlens_q", &self.cu_seqlens_q),
            ("cu_seqlens_k", &self.cu_seqlens_k),
            ("alibi_slopes", &self.alibi_slopes),
            ("bias", &self.bias),
            ("sinks", &self.sinks),
        ];
        let present = optional.into_iter().filter_map(|(name, tensor)| Some((name, tensor.as_ref()?)));
        std::iter::once(("q", &self.q)).chain(present)
    }

    /// Visits each tensor together with its counterpart in `others`.
    pub fn zip_mut<U>(
        &mut self,
        others: &mut Tensors<U>,
        mut visit: impl FnMut(&'static str, &mut T, &mut U) -> Result<()>,
    ) -> Result<()> {
        visit("q", &mut self.q, &mut others.q)?;
        for (name, one, other) in [
            ("k", &mut self.k, &mut others.k),
            ("v", &mut self.v, &mut others.v),
            ("cu_seqlens_q", &mut self.cu_seqlens_q, &mut others.cu_seqlens_q),
            ("cu_seqlens_k", &mut self.cu_seqlens_k, &mut others.cu_seqlens_k),
            ("alibi_slopes", &mut self.alibi_slopes, &mut others.alibi_slopes),
            ("bias", &mut self.bias, &mut others.bias),
            ("sinks", &mut self.sinks, &mut others.sinks),
        ] {
            if let (Some(one), Some(other)) = (one, other) {
                visit(name, one, other)?;
            }
        }
        Ok(())
    }

    /// Applies `read` to every tensor; `None` as soon as it answers `None`.
    pub fn try_map<U>(
        &self,
        mut read: impl FnMut(&'static str, &T) -> Result<Option<U>>,
    ) -> Result<Option<Tensors<U>>> {
        macro_rules! optional {
            ($field:ident) => {
                match &self.$field {
                    None => None,
                    Some(tensor) => match read(stringify!($field), tensor)? {
                        None => return Ok(None),
                        read => read,
                    },
                }
            };
        }
        let Some(q) = read("q", &self.q)? else { return Ok(None) };
        Ok(Some(Tensors {
            q,
            k: optional!(k),
            v: optional!(v),
            cu_seqlens_q: optional!(cu_seqlens_q),
            cu_seqlens_k: optional!(cu_seqlens_k),
            alibi_slopes: optional!(alibi_slopes),
            bias: optional!(bias),
            sinks: optional!(sinks),
        }))
    }
}

impl Tensors<Bound<'_, PyAny>> {
    /// Requires a tensor (or something that stands in for one) wherever `form` needs it.
    pub fn check_types(&self, torch: &Torch, form: Form) -> Result<()> {
        for (name, tensor) in self.named() {
            if !torch.is_tensor_like(tensor)? {
                return Err(arguments::wrong_type(form.public_name(name), tensor, "torch.Tensor"));
            }
        }
        Ok(())
    }

    /// Refuses to drop a gradient.
    pub fn check_gradients(&self, torch: &Torch, form: Form) -> Result<()> {
        let py = self.q.py();
        if !torch.is_grad_enabled(py)? {
            return Ok(());
        }
        for (name, tensor) in self.named() {
            if tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
                return Err(Error::Problem(core::Error::Unsupported {
                    argument: form.public_name(name),
                    got: "a tensor that requires grad".into(),
                    instead: "call under torch.no_grad(), or pass tensor.detach()".into(),
                }));
            }
        }
        Ok(())
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
    let [q, k, v] = form.split(&views.q, views.k.as_ref(), views.v.as_ref())?;
    let k_object = objects.k.as_ref().unwrap_or(&objects.q);
    let q_meta = q.meta(float_dtype(form.public_name("q"), &q, &objects.q)?);
    let k_meta = k.meta(float_dtype(form.public_name("k"), &k, k_object)?);
    let v_meta = v.meta(float_dtype(form.public_name("v"), &v, objects.v.as_ref().unwrap_or(k_object))?);
    let slopes = float32("alibi_slopes", objects.alibi_slopes.as_ref(), views.alibi_slopes.as_ref())?;
    let sinks = float32("sinks", objects.sinks.as_ref(), views.sinks.as_ref())?;
    let bias = bias_kind(form, objects.bias.as_ref(), views.bias.as_ref())?;
    let options = Options {
        softmax_scale: numbers.softmax_scale,
        causal: numbers.causal,
        window: numbers.window,
        alignment: if numbers.top_left { Alignment::TopLeft } else { Alignment::BottomRight },
        softcap: numbers.softcap,
        alibi_slopes: slopes.map(|view| (view.shape(), view.strides())),
        bias: bias.map(|(kind, view)| (kind, view.shape(), view.strides())),
        sinks: sinks.map(|view| (view.shape(), view.strides())),
    };
    let problem = if form.varlen {
        let batch = sequences(form, objects, views)?;
        Problem::packed(q_meta, k_meta, v_meta, batch, numbers.max_seqlen, &options)
    } else {
        Problem::dense(q_meta, k_meta, v_meta, &options)
    };
    let problem = problem.map_err(|error| form.translate(error, &views.q, views.k.as_ref().unwrap_or(&views.q)))?;
    Ok(Described { q, k, v, problem })
}

/// Checks `cu_seqlens_*` but for their contents, and counts the sequences.
fn sequences(form: Form, objects: &Tensors<Bound<'_, PyAny>>, views: &Tensors<View>) -> Result<usize> {
    let query = ("cu_seqlens_q", &objects.cu_seqlens_q, &views.cu_seqlens_q);
    let key = ("cu_seqlens_k", &objects.cu_seqlens_k, &views.cu_seqlens_k);
    let mut batch = [0; 2];
    for (batch, (name, object, view)) in batch.iter_mut().zip([query, key]) {
        let name = form.public_name(name);
        let (Some(object), Some(view)) = (object, view) else {
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

fn float_dtype(argument: &'static str, view: &View, object: &Bound<'_, PyAny>) -> Result<Dtype> {
    match view.element {
        Element::Float(dtype) => Ok(dtype),
        _ => Err(dtype_error(argument, object, "float32, float16 or bfloat16")),
    }
}

fn float32<'a>(
    argument: &'static str,
    object: Option<&Bound<'_, PyAny>>,
    view: Option<&'a View>,
) -> Result<Option<&'a View>> {
    match (object, view) {
        (Some(object), Some(view)) if view.element != Element::Float(Dtype::F32) => {
            Err(dtype_error(argument, object, "float32"))
        }
        _ => Ok(view),
    }
}

fn bias_kind<'a>(
    form: Form,
    object: Option<&Bound<'_, PyAny>>,
    view: Option<&'a View>,
) -> Result<Option<(BiasKind, &'a View)>> {
    let (Some(object), Some(view)) = (object, view) else { return Ok(None) };
    match view.element {
        Element::Bool if form.boolean_mask => Ok(Some((BiasKind::Boolean, view))),
        Element::Float(dtype) if !form.boolean_mask => Ok(Some((BiasKind::Additive(dtype), view))),
        _ if form.boolean_mask => Err(dtype_error("mask", object, "bool")),
        _ => Err(dtype_error("bias", object, "float32, float16 or bfloat16")),
    }
}

fn dtype_error(argument: &'static str, object: &Bound<'_, PyAny>, allowed: &str) -> Error {
    let name = object.getattr(intern!(object.py(), "dtype")).and_then(|dtype| dtype.str()?.extract::<String>());
    let got = name.unwrap_or_else(|_| "unknown".into()).trim_start_matches("torch.").to_owned();
    Error::Problem(core::Error::Dtype { argument, got, allowed: allowed.into() })
}
