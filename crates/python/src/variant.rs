//! A kernel of any kind, as the caches of compiled kernels and of verdicts know it.

use std::fmt;

use mtlflashattn_cache::{Fingerprint, Variant};
use mtlflashattn_core::{Dtype, Tier};
use mtlflashattn_metal::{BackwardKernel, Features, Kernel};

/// A kernel of the forward or of the backward pass. Equal ones have equal texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnyKernel {
    Forward(Kernel),
    Backward(BackwardKernel),
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
        }
    }

    pub const fn entry(&self) -> &'static str {
        match self {
            Self::Forward(kernel) => kernel.entry(),
            Self::Backward(kernel) => kernel.entry(),
        }
    }

    /// The tier that it computes for.
    pub const fn tier(&self) -> Tier {
        match self {
            Self::Forward(kernel) => kernel.tier,
            Self::Backward(_) => Tier::Simdgroup,
        }
    }

    /// Stands for `source`, which is its text, and whatever else its results depend on.
    pub fn fingerprint(&self, source: &str) -> Fingerprint {
        let shared = metal_files!("launch.rs", "probe.rs", "probe/cases.rs");
        let own: &[&str] = match self {
            Self::Forward(_) => &metal_files!("probe/forward.rs"),
            Self::Backward(_) => &metal_files!("backward.rs", "probe/backward.rs"),
        };
        Fingerprint::of([source, self.entry()].into_iter().chain(shared).chain(own.iter().copied()))
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
            Self::Backward(BackwardKernel { pass, dtype, head_dim, value_dim, tile, features, .. }) => {
                let tile = format_args!("backward, {}: {tile}", pass.name());
                words(*dtype, [Some(*head_dim), Some(*value_dim)], &tile, features)
            }
        }
    }
}
