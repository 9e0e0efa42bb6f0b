//! The ways to compute a problem.

use std::fmt;

/// A way to compute a problem; see the tier table in `docs/architecture.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// 8x8 `simdgroup_matrix`, keys split over threadgroups, for a few queries.
    Decode,
    /// `matmul2d`, P converted in registers.
    Tensorops,
    /// `matmul2d`, P through threadgroup memory.
    TensoropsStaged,
    /// 8x8 `simdgroup_matrix`.
    Simdgroup,
    /// Chunked float32 tensor operations, on any torch device.
    Torch,
    /// One thread a row, float32.
    Scalar,
    /// The Rust engine for CPU tensors.
    Cpu,
}

impl Tier {
    /// Every tier, in the order in which `auto` tries them.
    pub const ALL: [Self; 7] =
        [Self::Decode, Self::Tensorops, Self::TensoropsStaged, Self::Simdgroup, Self::Cpu, Self::Torch, Self::Scalar];

    /// Whether the tier is a Metal kernel.
    #[must_use]
    pub const fn is_metal(self) -> bool {
        match self {
            Self::Decode | Self::Tensorops | Self::TensoropsStaged | Self::Simdgroup | Self::Scalar => true,
            Self::Torch | Self::Cpu => false,
        }
    }

    /// The name that `plan` and `trace` print.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Tensorops => "tensorops",
            Self::TensoropsStaged => "tensorops-staged",
            Self::Simdgroup => "simdgroup",
            Self::Torch => "torch",
            Self::Scalar => "scalar",
            Self::Cpu => "cpu",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
