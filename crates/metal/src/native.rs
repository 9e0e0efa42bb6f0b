//! A Metal queue of our own, for programs without torch.
//!
//! [`NativeDevice`] compiles a text as `torch.mps.compile_shader` does, so that both run it the same way. Launches run
//! one after the other in the order of their dispatch. The caller goes on at once; [`Buffer::read_into`] and
//! [`NativeDevice::synchronize`] wait, and report what went wrong on the GPU until then.
//!
//! A kernel is native code of the GPU: its text alone decides which memory it touches. Dispatch only texts that are
//! trusted like the program itself.
#![cfg(target_vendor = "apple")]

mod buffer;
mod compiler;
mod queue;

pub use buffer::Buffer;
pub use compiler::Pipeline;

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use mtlflashattn_core::plan::{Chip, Gpu};
use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_metal::{
    MTLBuffer, MTLCommandBuffer, MTLCommandEncoder, MTLComputeCommandEncoder, MTLCreateSystemDefaultDevice, MTLDevice,
    MTLSize,
};

use crate::{Argument, Device, DeviceError, Grid};
use queue::{Launch, Queue};

// A command line tool gets no default device unless CoreGraphics is loaded (Apple's documentation of
// MTLCreateSystemDefaultDevice).
#[link(name = "CoreGraphics", kind = "framework")]
unsafe extern "C" {}

/// Bytes that `setBytes` takes; longer lists go through a buffer (Apple's documentation of `setBytes`).
const SET_BYTES_LIMIT: usize = 4096;

/// Entries of the buffer argument table (Metal feature set tables).
const BUFFER_ARGUMENTS: usize = 31;

/// A reference to an object that is known by its protocol.
type Object<Protocol> = Retained<ProtocolObject<Protocol>>;

/// The system's default GPU with a queue; clones share both.
#[derive(Clone)]
pub struct NativeDevice {
    device: Object<dyn MTLDevice>,
    queue: Arc<Queue>,
}

impl NativeDevice {
    /// The system's default GPU; none where Metal has none, or gives this process no queue on it.
    pub fn system_default() -> Option<Self> {
        autoreleasepool(|_| {
            let device = MTLCreateSystemDefaultDevice()?;
            let queue = Arc::new(Queue::new(device.newCommandQueue()?));
            Some(Self { device, queue })
        })
    }

    /// The GPU's name, such as "Apple M1".
    pub fn name(&self) -> String {
        autoreleasepool(|_| self.device.name().to_string())
    }

    /// What the planner needs to know. Metal does not tell the number of cores: it is that of the chip's largest
    /// configuration.
    pub fn gpu(&self) -> Gpu {
        let chip = Chip::from_name(&self.name());
        autoreleasepool(|_| Gpu { chip, cores: chip.most_cores(), macos: compiler::macos(), torch: None })
    }

    /// Waits until everything dispatched so far has run.
    ///
    /// # Errors
    /// [`DeviceError::Dispatch`] or [`DeviceError::Memory`]: the first failure since the last report.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.queue.lock().wait()
    }

    /// Why this geometry cannot be launched: Metal itself would end the process.
    fn refuse_grid(&self, pipeline: &Pipeline, grid: Grid) -> Option<String> {
        let limit = self.device.maxThreadsPerThreadgroup();
        let limits = [limit.width as u64, limit.height as u64, limit.depth as u64];
        let group = grid.group.map(u64::from);
        if group.contains(&0) || group.iter().zip(&limits).any(|(threads, limit)| threads > limit) {
            return Some(format!("a threadgroup of {group:?} threads; this GPU allows 1 to {limits:?}"));
        }
        let (threads, allowed) = (group.iter().product::<u64>(), pipeline.max_threads() as u64);
        (threads > allowed)
            .then(|| format!("a threadgroup of {group:?} = {threads} threads; this pipeline allows {allowed}"))
    }

    /// The arguments as the encoder takes them.
    fn bind<'a>(
        &self,
        pipeline: &Pipeline,
        arguments: &'a [Argument<'_, Buffer>],
    ) -> Result<Vec<Binding<'a>>, DeviceError> {
        if arguments.len() > BUFFER_ARGUMENTS {
            return Err(pipeline.failed(format!("{} arguments; Metal allows {BUFFER_ARGUMENTS}", arguments.len())));
        }
        let bind = |(index, argument): (usize, &'a Argument<'_, Buffer>)| {
            let bytes: &[u8] = match argument {
                Argument::Buffer(buffer) if buffer.is_of(&self.queue) => {
                    return Ok(Binding::Memory(buffer.object().clone()));
                }
                Argument::Buffer(_) => {
                    return Err(pipeline.failed(format!("argument {index} is a buffer of another device")));
                }
                Argument::Ints(list) => bytemuck::cast_slice(list),
                Argument::Floats(list) => bytemuck::cast_slice(list),
            };
            match bytes.len() {
                0 => Err(pipeline.failed(format!("argument {index} is an empty list; pass at least one number"))),
                1..=SET_BYTES_LIMIT => Ok(Binding::Bytes(bytes)),
                _ => Ok(Binding::Memory(Buffer::from_slice(self, bytes)?.object().clone())),
            }
        };
        arguments.iter().enumerate().map(bind).collect()
    }
}

impl Device for NativeDevice {
    type Buffer = Buffer;
    type Pipeline = Pipeline;

    fn pipeline(&self, source: &str, entry: &str) -> Result<Pipeline, DeviceError> {
        autoreleasepool(|_| Pipeline::compile(&self.device, source, entry))
    }

    /// A grid without threadgroups is done at once. An error of an earlier launch is not reported here.
    fn dispatch(&self, pipeline: &Pipeline, arguments: &[Argument<'_, Buffer>], grid: Grid) -> Result<(), DeviceError> {
        if let Some(reason) = self.refuse_grid(pipeline, grid) {
            return Err(pipeline.failed(reason));
        }
        let (Some(threads), Some(group)) = (size(grid.threads()), size(grid.group.map(u64::from))) else {
            return Err(pipeline.failed(format!("{grid:?} exceeds this platform's integers")));
        };
        autoreleasepool(|_| {
            // An encoder that is dropped before `endEncoding` ends the process: what can fail comes before it.
            let bindings = self.bind(pipeline, arguments)?;
            if grid.threadgroups.contains(&0) {
                return Ok(());
            }
            let mut in_flight = self.queue.lock();
            let commands = in_flight.command_buffer().ok_or_else(|| pipeline.failed("Metal gave no command buffer"))?;
            let encoder =
                commands.computeCommandEncoder().ok_or_else(|| pipeline.failed("Metal gave no command encoder"))?;
            encoder.setComputePipelineState(pipeline.state());
            for (index, binding) in bindings.iter().enumerate() {
                binding.encode(&encoder, index);
            }
            encoder.dispatchThreads_threadsPerThreadgroup(threads, group);
            encoder.endEncoding();
            in_flight.commit(Launch::new(commands, pipeline.entry()));
            Ok(())
        })
    }
}

/// An argument that can be encoded without fail.
enum Binding<'a> {
    Memory(Object<dyn MTLBuffer>),
    /// One to [`SET_BYTES_LIMIT`] bytes.
    Bytes(&'a [u8]),
}

impl Binding<'_> {
    /// Puts the argument at `[[buffer(index)]]`, where `index` is below [`BUFFER_ARGUMENTS`].
    fn encode(&self, encoder: &ProtocolObject<dyn MTLComputeCommandEncoder>, index: usize) {
        debug_assert!(index < BUFFER_ARGUMENTS);
        match self {
            // SAFETY: index and offset are in bounds. The command buffer keeps the memory alive, and reading it on the
            // CPU waits for the launch (`Buffer::read_into`).
            Self::Memory(object) => unsafe { encoder.setBuffer_offset_atIndex(Some(object), 0, index) },
            // SAFETY: the index is in bounds, and the call copies `bytes.len()` bytes, which `bytes` has.
            Self::Bytes(bytes) => unsafe {
                encoder.setBytes_length_atIndex(NonNull::from(*bytes).cast::<c_void>(), bytes.len(), index);
            },
        }
    }
}

/// The extent as Metal counts it.
fn size(extent: [u64; 3]) -> Option<MTLSize> {
    let [width, height, depth] = extent.map(|threads| usize::try_from(threads).ok());
    Some(MTLSize { width: width?, height: height?, depth: depth? })
}
