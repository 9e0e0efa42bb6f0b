//! The attention problem and the decision how to compute it.
//!
//! Every call becomes a [`Problem`]; a [`Plan`] says which [`Tier`] serves it and why the others do not.
//! Engines only execute plans. This crate knows no engine, reads no environment and holds no unsafe code.
#![forbid(unsafe_code)]

pub mod append;
pub mod cache;
pub mod dropout;
pub mod dtype;
pub mod error;
pub mod mask;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod settings;
pub mod tier;
pub mod trace;

pub use append::{Append, Pairs, Rotary, RotaryOptions};
pub use cache::{Cache, CacheBuffers, CacheLayout, CacheLengths, CacheOptions, CacheRow, LengthsArgument};
pub use dropout::Dropout;
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use mask::{Alignment, Mask};
pub use plan::{BackwardPlan, CpuBackwardTile, CpuPath, CpuTile, Demotions, Device, Gpu, MetalTile, Plan, Planner};
pub use problem::{Bias, BiasKind, Lengths, Options, Problem, Strides, TensorMeta};
pub use settings::Settings;
pub use tier::Tier;
pub use trace::Trace;
