//! What a simulator checks, and where it keeps what it compiled.

use std::path::PathBuf;
use std::time::Duration;

use crate::tensor_ops::TensorOps;

/// How deep a kernel is examined. Every layer has the checks of the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layer {
    /// Compiles only: address spaces, `const`, element types, overloads. Nothing can be dispatched.
    Type,
    /// Runs: numbers, guard pages around buffers, red zones around threadgroup arrays, divergent barriers.
    Fast,
    /// Watches every access: exact bounds, data races, memory never written, overflow; counts bytes.
    Check,
}

/// Settings of a [`Simulator`](crate::Simulator).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Options {
    /// How deep kernels are examined.
    pub layer: Layer,
    /// 0: threads run in order until they must wait. Otherwise the seed of a random, reproducible schedule.
    pub seed: u64,
    /// Compile as Metal's fast math mode may: no NaN, no infinity, reassociation.
    pub finite_math: bool,
    /// Fill threadgroup memory and uninitialised variables with NaN; otherwise with 0.
    pub poison: bool,
    /// Processor time after which a dispatch is given up; `None` waits for ever. Works on Linux.
    pub time_limit: Option<Duration>,
    /// How `matmul2d` behaves where Apple leaves it open.
    pub tensor_ops: TensorOps,
    /// Where compiled kernels are kept; `None` is `MTLFLASHATTN_SIMULATOR_CACHE` or the user's cache folder.
    pub cache: Option<PathBuf>,
}

impl Options {
    /// Settings of a layer, in lane order, with poisoned memory.
    #[must_use]
    pub fn new(layer: Layer) -> Self {
        Options {
            layer,
            seed: 0,
            finite_math: false,
            poison: true,
            time_limit: None,
            tensor_ops: TensorOps::default(),
            cache: None,
        }
    }

    /// The same with another schedule.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Options { seed, ..self }
    }

    /// The same, compiled with finite math or without.
    #[must_use]
    pub fn with_finite_math(self, finite_math: bool) -> Self {
        Options { finite_math, ..self }
    }

    /// The same with memory poisoned or zeroed.
    #[must_use]
    pub fn with_poison(self, poison: bool) -> Self {
        Options { poison, ..self }
    }

    /// The same with another behaviour of `matmul2d`.
    #[must_use]
    pub fn with_tensor_ops(self, tensor_ops: TensorOps) -> Self {
        Options { tensor_ops, ..self }
    }

    /// The same with a limit on the processor time of a dispatch.
    #[must_use]
    pub fn with_time_limit(self, limit: Duration) -> Self {
        Options { time_limit: Some(limit), ..self }
    }
}
