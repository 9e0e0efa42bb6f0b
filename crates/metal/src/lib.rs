//! Attention kernels in Metal Shading Language and how they are launched.
//!
//! The text of a kernel is a readable `.metal` file plus a short block of `#define`s. A [`Device`] compiles and
//! dispatches it: torch's MPS stream, a Metal queue of our own, or the simulator.

mod append;
mod backward;
mod cache;
mod decode;
mod device;
mod launch;
pub mod native;
pub mod probe;
mod source;

pub use append::{APPEND_TENSOR_COUNT, AppendKernel, AppendLaunch, AppendTensors, RotaryTensors};
pub use backward::{BACKWARD_TENSOR_COUNT, BackwardKernel, BackwardLaunch, BackwardOutputs, BackwardTensors};
pub use cache::CacheTensors;
pub use decode::{DECODE_TENSOR_COUNT, DecodeLaunch, DecodeTensors, MergeKernel};
pub use device::{Argument, Device, DeviceError, Grid};
pub use launch::{Launch, LaunchError, LseStrides, MAX_LEN, Outputs, TENSOR_COUNT, Tensors};
pub use source::{Features, Kernel};
