//! Executes Metal Shading Language kernels on a CPU and checks every access.
//!
//! The text of a kernel is compiled by clang with stand-in headers and run thread by thread. A [`Simulator`] is a
//! [`Device`](mtlflashattn_metal::Device); its [`Options`] choose how deep a kernel is examined ([`Layer`]).
//!
//! ```
//! use mtlflashattn_metal::{Argument, Device, Grid};
//! use mtlflashattn_simulator::{Buffer, Launch, Layer, Options, Simulator};
//!
//! let source = r#"
//!     #include <metal_stdlib>
//!     using namespace metal;
//!     kernel void scale(device const half* x [[buffer(0)]], device float* y [[buffer(1)]],
//!                       constant long* sizes [[buffer(2)]], constant float* factors [[buffer(3)]],
//!                       uint i [[thread_position_in_grid]]) {
//!         if (i < ulong(sizes[0])) y[i] = float(x[i]) * factors[0];
//!     }
//! "#;
//! let simulator = Simulator::new(Options::new(Layer::Check));
//! let pipeline = simulator.pipeline(source, "scale")?;
//! let x = Buffer::from_slice(&[half::f16::ONE; 100])?;
//! let y = Buffer::poisoned(100 * 4)?;
//! let arguments =
//!     [Argument::Buffer(&x), Argument::Buffer(&y), Argument::Ints(&[100]), Argument::Floats(&[2.5])];
//! let grid = Grid { threadgroups: [4, 1, 1], group: [32, 1, 1] };
//!
//! simulator.dispatch(&pipeline, &arguments, grid)?; // or, with counters and a demand on the output:
//! let report = simulator.run(&pipeline, &arguments, &Launch::from(grid).with_must_write(&[1]))?;
//!
//! assert_eq!(y.read::<f32>(), [2.5; 100]);
//! assert_eq!(report.counters.device_read_bytes, 100 * 2);
//! assert_eq!(report.buffer(1).unwrap().written_bytes, 100 * 4);
//! # Ok::<(), mtlflashattn_metal::DeviceError>(())
//! ```

mod buffer;
mod clang;
mod compile;
mod dispatch;
mod embedded;
mod fault;
mod library;
mod memory;
#[cfg(feature = "nvidia")]
pub mod nvidia;
mod options;
mod parallel;
pub mod ptx;
mod report;
mod rewrite;
mod stacks;
mod symbols;
mod tensor_ops;
mod token;

pub use buffer::{Buffer, Element};
pub use compile::identity;
pub use dispatch::{Launch, Pipeline, Simulator};
pub use options::{Layer, Options};
pub use parallel::run_many;
pub use report::{BufferTraffic, Counters, Registers, Report};
pub use tensor_ops::{LaneLayout, MacOs, MemoryDestination, OutsideExtents, TensorOps};
