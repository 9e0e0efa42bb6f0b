//! The public functions differ in how they pack q, k and v; this is where those differences end.

use mtlflashattn_core as core;
use pyo3::intern;
use pyo3::prelude::*;

use crate::call::{Slot, Tensors};
use crate::error::{Error, Result};
use crate::tensor::View;

/// How q, k and v arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Three tensors.
    Separate,
    /// q and kv, which has a dimension of size 2 before the heads.
    KeyValue,
    /// qkv, which has a dimension of size 3 before the heads.
    All,
}

/// Where the heads stand in q, k, v and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadAxis {
    /// Behind the tokens, as in `flash_attn`: `[batch, seqlen, heads, head_dim]`.
    AfterTokens,
    /// Before them, as in torch's `scaled_dot_product_attention`: `[batch, heads, seqlen, head_dim]`. Not packed.
    BeforeTokens(OutLayout),
}

/// How out lies in memory where heads stand before tokens: torch has all three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutLayout {
    /// As `torch.empty_like(q)`.
    LikeQuery,
    /// In the order of its dimensions.
    Contiguous,
    /// With tokens before heads, as linear layers read it.
    TokensFirst,
}

impl OutLayout {
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "like_query" => Some(Self::LikeQuery),
            "contiguous" => Some(Self::Contiguous),
            "tokens_first" => Some(Self::TokensFirst),
            _ => None,
        }
    }
}

/// What kind of public function was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub packing: Packing,
    pub head_axis: HeadAxis,
    /// Ragged sequences behind one another, with `cu_seqlens`.
    pub varlen: bool,
    /// The bias is called `mask` by the caller.
    pub boolean_mask: bool,
}

impl Form {
    /// `packing` is the number of tensors among q, k and v that came packed into one: 1, 2 or 3.
    pub fn new(packing: u8, varlen: bool, boolean_mask: bool) -> Self {
        let packing = match packing {
            3 => Packing::All,
            2 => Packing::KeyValue,
            _ => Packing::Separate,
        };
        Self { packing, head_axis: HeadAxis::AfterTokens, varlen, boolean_mask }
    }

    /// `scaled_dot_product_attention`.
    pub const fn heads_first(out: OutLayout, boolean_mask: bool) -> Self {
        Self { packing: Packing::Separate, head_axis: HeadAxis::BeforeTokens(out), varlen: false, boolean_mask }
    }

    /// `view` with its heads behind its tokens, where engines look for them.
    pub const fn tokens_first(self, view: View) -> View {
        match self.head_axis {
            HeadAxis::AfterTokens => view,
            HeadAxis::BeforeTokens(_) => view.with_middle_swapped(),
        }
    }

    /// The same of a torch tensor.
    pub fn tokens_first_tensor<'py>(self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        match self.head_axis {
            HeadAxis::AfterTokens => Ok(tensor.clone()),
            HeadAxis::BeforeTokens(_) => tensor.call_method1(intern!(tensor.py(), "transpose"), (1, 2)),
        }
    }

    /// The name that the caller knows an argument by.
    pub fn public_name(self, argument: &'static str) -> &'static str {
        match (self.packing, argument) {
            (Packing::All, "q" | "k" | "v") => "qkv",
            (Packing::KeyValue, "k" | "v") => "kv",
            (Packing::All, "cu_seqlens_q" | "cu_seqlens_k") => "cu_seqlens",
            (Packing::All, "max_seqlen_q" | "max_seqlen_k") => "max_seqlen",
            (_, "bias") if self.boolean_mask => "mask",
            _ => argument,
        }
    }

    /// `error` in the caller's words: packed tensors are named and shown as they came.
    pub fn translate(self, error: core::Error, views: &Tensors<View>) -> Error {
        use core::Error as E;
        let name = |argument| self.public_name(argument);
        Error::Problem(match error {
            E::Shape { argument, got, allowed } => {
                let argument = name(argument);
                let got = match argument {
                    "qkv" => views.q().shape_text(),
                    "kv" => views.get(Slot::K).map_or(got, View::shape_text),
                    _ => got,
                };
                E::Shape { argument, got, allowed }
            }
            E::Dtype { argument, got, allowed } => E::Dtype { argument: name(argument), got, allowed },
            E::Value { argument, got, allowed } => E::Value { argument: name(argument), got, allowed },
            E::Unsupported { argument, got, instead } => E::Unsupported { argument: name(argument), got, instead },
            other => other,
        })
    }

    /// Splits what came into q, k and v.
    pub fn split(self, views: &Tensors<View>) -> Result<[View; 3]> {
        let q = views.q();
        match (self.packing, views.get(Slot::K), views.get(Slot::V)) {
            (Packing::Separate, Some(k), Some(v)) => Ok([*q, *k, *v].map(|view| self.tokens_first(view))),
            (Packing::KeyValue, Some(kv), _) => {
                let axis = self.packed_axis("kv", kv, 2)?;
                Ok([*q, kv.select(axis, 0), kv.select(axis, 1)])
            }
            _ => {
                let axis = self.packed_axis("qkv", q, 3)?;
                Ok([0, 1, 2].map(|index| q.select(axis, index)))
            }
        }
    }

    fn packed_axis(self, argument: &'static str, view: &View, parts: i64) -> Result<usize> {
        let (axis, first) = if self.varlen { (1, "total") } else { (2, "batch, seqlen") };
        if view.shape().len() == axis + 3 && view.shape()[axis] == parts {
            return Ok(axis);
        }
        Err(Error::Problem(core::Error::Shape {
            argument,
            got: view.shape_text(),
            allowed: format!("{} dimensions ({first}, {parts}, heads, head_dim)", axis + 3),
        }))
    }

    /// q, k and v as torch tensors: views of what came packed.
    pub fn unpack<'py>(self, tensors: &Tensors<Bound<'py, PyAny>>) -> Result<[Bound<'py, PyAny>; 3]> {
        let unbind = |packed: &Bound<'py, PyAny>| -> PyResult<Vec<Bound<'py, PyAny>>> {
            packed.call_method1("unbind", (-3,))?.try_iter()?.collect()
        };
        let parts = match (self.packing, tensors.get(Slot::K), tensors.get(Slot::V)) {
            (Packing::Separate, Some(k), Some(v)) => [tensors.q(), k, v]
                .map(|tensor| self.tokens_first_tensor(tensor))
                .into_iter()
                .collect::<PyResult<_>>()?,
            (Packing::KeyValue, Some(kv), _) => [vec![tensors.q().clone()], unbind(kv)?].concat(),
            _ => unbind(tensors.q())?,
        };
        parts.try_into().map_err(|_| self.wrong_parts(tensors))
    }

    fn wrong_parts(self, tensors: &Tensors<Bound<'_, PyAny>>) -> Error {
        let packed = tensors.get(Slot::K).unwrap_or(tensors.q());
        let (argument, parts) = if self.packing == Packing::All { ("qkv", 3) } else { ("kv", 2) };
        let shape = packed.getattr("shape").and_then(|shape| PyResult::Ok(shape.str()?.to_string()));
        Error::Problem(core::Error::Shape {
            argument,
            got: shape.unwrap_or_default(),
            allowed: format!("size {parts} in the third dimension from the end"),
        })
    }
}
