//! Why a tier does not serve a call.

use std::fmt;

use super::decode::{FEWEST_KEYS, MOST_QUERIES};
use super::gpu::Missing;
use super::metal::MAX_LEN;
use super::occupancy::THREADGROUP_MEMORY;
use super::tile::Refusal;
use crate::{Dtype, Tier};

/// Why a tier does not serve a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The tier computes on an Apple GPU.
    NeedsMetal,
    /// The tier serves CPU tensors only.
    NeedsCpu,
    /// `MTLFLASHATTN_DEVICE` sends CPU tensors to the simulator.
    Simulated,
    /// The machine lacks something.
    Lacks(Missing),
    /// `MTLFLASHATTN_KERNEL` names a kernel of another element type.
    NeedsDtype {
        /// Its element type.
        needs: Dtype,
        /// That of the call.
        found: Dtype,
    },
    /// A float32 call that is shorter than `MTLFLASHATTN_V2_FP32_MIN_SEQ`.
    Short {
        /// Longest of its query and key length.
        longest: usize,
        /// The value of the variable.
        least: usize,
    },
    /// `MTLFLASHATTN_V2_PREUSE` is off.
    WithoutPreuse,
    /// More queries than the decode kernel takes.
    ManyQueries,
    /// Too few keys for the decode kernel to gain anything.
    FewKeys,
    /// So many rows share a key head that matrix units are faster; the most for which it is preferred.
    ManyRows(usize),
    /// No block of K and V fits in threadgroup memory.
    NoMatmulTile {
        /// Columns of Q and K.
        head_dim: usize,
        /// Columns of V and O.
        value_dim: usize,
        /// Element type.
        dtype: Dtype,
        /// Bytes of threadgroup memory of the smallest tile.
        bytes: usize,
    },
    /// No tile of the kernel fits the GPU.
    NoTile {
        /// Columns of Q and K.
        head_dim: usize,
        /// Columns of V and O.
        value_dim: usize,
        /// Element type.
        dtype: Dtype,
        /// What the leanest tile needs.
        refusal: Refusal,
    },
    /// No tile is what `MTLFLASHATTN_TILE` asks for.
    NoSuchTile {
        /// What it asks for.
        wanted: String,
        /// The values that tiles for this call have.
        offered: String,
    },
    /// The tier has no tiles to choose from.
    NoTiles,
    /// A sequence or a head dimension is longer than kernels can count.
    TooLong(usize),
    /// The tier failed on this machine.
    Demoted(String),
    /// The tier drops no weights.
    NoDropout,
    /// The tier reads no keys in a cache.
    NoCache,
    /// The tier computes no gradients.
    NoBackward,
    /// No tile of one of its kernels for gradients fits the GPU.
    NoBackwardTile {
        /// Columns of Q and K.
        head_dim: usize,
        /// Columns of V and O.
        value_dim: usize,
        /// Element type.
        dtype: Dtype,
    },
    /// The tier computes no gradient of an additive bias.
    NoBiasGradient,
    /// A tier before it in the order serves the call.
    After(Tier),
    /// `MTLFLASHATTN_KERNEL` names another tier; this is its value.
    NotForced(&'static str),
}

impl Reason {
    /// What the user can do so that the tier serves; `None` where nothing helps, or nothing is wrong.
    #[must_use]
    pub const fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Lacks(missing) => missing.remedy,
            Self::Simulated => Some("unset MTLFLASHATTN_DEVICE"),
            Self::NoSuchTile { .. } => Some("unset MTLFLASHATTN_TILE"),
            Self::NotForced(_) => Some("unset MTLFLASHATTN_KERNEL"),
            _ => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedsMetal => f.write_str("needs tensors on an MPS device"),
            Self::NeedsCpu => f.write_str("needs CPU tensors"),
            Self::Simulated => f.write_str("MTLFLASHATTN_DEVICE sends CPU tensors to the simulator"),
            Self::Lacks(missing) => missing.fmt(f),
            Self::NeedsDtype { needs, found } => write!(f, "needs {needs} tensors; these are {found}"),
            Self::Short { longest, least } => {
                write!(f, "{longest} rows, and MTLFLASHATTN_V2_FP32_MIN_SEQ keeps it for float32 calls from {least} on")
            }
            Self::WithoutPreuse => f.write_str("MTLFLASHATTN_V2_PREUSE is off"),
            Self::ManyQueries => write!(f, "serves up to {MOST_QUERIES} queries of a sequence"),
            Self::FewKeys => write!(f, "gains nothing with fewer than {FEWEST_KEYS} keys"),
            Self::ManyRows(most) => {
                write!(f, "more than {most} rows share a key head, and matrix units are expected to be faster")
            }
            Self::NoMatmulTile { head_dim, value_dim, dtype, bytes } => {
                let dims = if head_dim == value_dim { String::new() } else { format!("/{value_dim}") };
                write!(
                    f,
                    "the smallest tile for head_dim {head_dim}{dims} in {dtype} needs {bytes} bytes of threadgroup \
                     memory of {THREADGROUP_MEMORY}"
                )
            }
            Self::NoTile { head_dim, value_dim, dtype, refusal } => {
                let dims = if head_dim == value_dim { String::new() } else { format!("/{value_dim}") };
                write!(f, "the leanest tile for head_dim {head_dim}{dims} in {dtype} needs {refusal}")
            }
            Self::NoTiles => f.write_str("it has no tiles to choose from"),
            Self::NoSuchTile { wanted, offered } => {
                write!(f, "MTLFLASHATTN_TILE is {wanted}; tiles for this call have {offered}")
            }
            Self::TooLong(len) => {
                write!(f, "a length or head dimension of {len}, and Metal kernels take at most {MAX_LEN}")
            }
            Self::Demoted(failure) => write!(f, "failed here: {failure}"),
            Self::NoDropout => f.write_str("knows no dropout"),
            Self::NoCache => f.write_str("reads no keys in a cache"),
            Self::NoBackward => f.write_str("has no backward pass"),
            Self::NoBackwardTile { head_dim, value_dim, dtype } => {
                write!(f, "no tile of its backward pass for head_dim {head_dim}/{value_dim} in {dtype} fits the GPU")
            }
            Self::NoBiasGradient => f.write_str("computes no gradient of a bias"),
            Self::After(tier) => write!(f, "{tier} comes before it and serves this call"),
            Self::NotForced(name) => write!(f, "MTLFLASHATTN_KERNEL is {name}"),
        }
    }
}

/// The Metal tiers that failed on this machine, with what they failed of. A tier stays demoted until the process ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demotions(Vec<(Tier, String)>);

impl Demotions {
    /// No tier has failed.
    pub const NONE: &Self = &Self(Vec::new());

    /// Demotes `tier`; the first failure is the one that is kept. Returns whether it is the first, which is when to
    /// warn. The torch and cpu tiers compile nothing and are never demoted.
    pub fn demote(&mut self, tier: Tier, failure: impl Into<String>) -> bool {
        if !tier.is_metal() || self.failure(tier).is_some() {
            return false;
        }
        self.0.push((tier, failure.into()));
        true
    }

    /// What `tier` failed of.
    #[must_use]
    pub fn failure(&self, tier: Tier) -> Option<&str> {
        self.0.iter().find(|(demoted, _)| *demoted == tier).map(|(_, failure)| failure.as_str())
    }
}
