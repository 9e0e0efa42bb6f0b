//! A kernel of any kind, as the caches of compiled kernels and of verdicts know it.

use std::fmt;

use mtlflashattn_cache::{Fingerprint, Variant};
use mtlflashattn_core::{Dtype, Tier};
use mtlflashattn_metal::{AppendKernel, BackwardKernel, Features, Kernel, MergeKernel};

/// A kernel of the forward or of the backward pass. Equal ones have equal texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnyKernel {
    Forward(Kernel),
    Backward(BackwardKernel),
    /// What merges the splits of a decode kernel.
    Merge(MergeKernel),
    Append(AppendKernel),
}

/// What the results of every kernel depend on beside its text: how it is launched, and how it is judged.
macro_rules! metal_files {
    ($($file:literal),*) => { [$(include_str!(concat!("../../metal/src/", $file))),*] };
}

impl AnyKernel {
    pub fn source(&self) -> String {
        match self {
            Self::Forward(kernel) => kernel.source(),
            Self::Backward(kernel) => kernel.source(),
            Self::Merge(kernel) => kernel.source(),
            Self::Append(kernel) => kernel.source(),
        }
    }

    pub const fn entry(&self) -> &'static str {
        match self {
            Self::Forward(kernel) => kernel.entry(),
            Self::Backward(kernel) => kernel.entry(),
            Self::Merge(kernel) => kernel.entry(),
            Self::Append(kernel) => kernel.entry(),
        }
    }

    /// The tier that it computes for.
    pub const fn tier(&self) -> Tier {
        match self {
            Self::Forward(kernel) => kernel.tier,
            Self::Backward(_) => Tier::Simdgroup,
            Self::Merge(_) | Self::Append(_) => Tier::Decode,
        }
    }

    /// Stands for `source`, which is its text, and whatever else its results depend on.
    pub fn fingerprint(&self, source: &str) -> Fingerprint {
        let shared = metal_files!("launch.rs", "probe.rs", "probe/cases.rs");
        let own: &[&str] = match self {
            Self::Forward(Kernel { tier: Tier::Decode, .. }) => {
                &metal_files!("decode.rs", "cache.rs", "probe/forward.rs", "probe/cached.rs")
            }
            Self::Forward(_) => &metal_files!("probe/forward.rs"),
            Self::Merge(_) => &[],
            Self::Append(_) => &metal_files!("append.rs", "cache.rs", "probe/append.rs", "probe/cached.rs"),
            Self::Backward(_) => &metal_files!("backward.rs", "probe/backward.rs"),
        };
        let merge = match self {
            Self::Forward(kernel) if kernel.tier == Tier::Decode => MergeKernel::of(kernel).source(),
            _ => String::new(),
        };
        let texts = [source, self.entry(), &merge];
        Fingerprint::of(texts.into_iter().chain(shared).chain(own.iter().copied()))
    }

    /// What it is specialised for, in words.
    pub fn variant(&self) -> Variant {
        let words = |dtype: Dtype, dims: [Option<usize>; 2], tile: &dyn fmt::Display, features: &Features| Variant {
            tier: self.tier().name().into(),
            dtype: dtype.name().into(),
            head_dim: dims[0],
            value_dim: dims[1],
            tile: tile.to_string(),
            features: features.names().into_iter().map(str::to_owned).collect(),
        };
        match self {
            Self::Forward(Kernel { dtype, head_dim, value_dim, tile, matmul, features, .. }) => {
                let dims = [*head_dim, *value_dim];
                match matmul {
                    None => words(*dtype, dims, tile, features),
                    Some(matmul) => words(*dtype, dims, &format_args!("{tile}, {matmul}"), features),
                }
            }
            Self::Merge(MergeKernel { dtype, packed, lse, .. }) => {
                let features = Features { packed: *packed, lse: *lse, ..Features::default() };
                words(*dtype, [None; 2], &"merge", &features)
            }
            Self::Append(AppendKernel { dtype, rotary, packed, paged, .. }) => {
                let features = Features { packed: *packed, paged: *paged, ..Features::default() };
                words(*dtype, [None; 2], if *rotary { &"append, rotary" } else { &"append" }, &features)
            }
            Self::Backward(BackwardKernel { pass, dtype, head_dim, value_dim, tile, features, .. }) => {
                let tile = format_args!("backward, {}: {tile}", pass.name());
                words(*dtype, [Some(*head_dim), Some(*value_dim)], &tile, features)
            }
        }
    }
}
