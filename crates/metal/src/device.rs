//! What every home of a kernel can do: compile text, and dispatch what it compiled.

/// One argument of a kernel; the position in the list is the index of `[[buffer(n)]]`.
#[derive(Debug)]
pub enum Argument<'a, B> {
    /// Tensor memory from the tensor's first element on.
    Buffer(&'a B),
    /// A parameter block of sizes and strides: `constant long*`.
    Ints(&'a [i64]),
    /// A parameter block of factors: `constant float*`.
    Floats(&'a [f32]),
}

/// Launch geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Threadgroups along x, y and z.
    pub threadgroups: [u32; 3],
    /// Threads of one threadgroup along x, y and z.
    pub group: [u32; 3],
}

impl Grid {
    /// Threads along x, y and z, as `dispatchThreads` and `torch.mps.compile_shader` count them.
    #[must_use]
    pub fn threads(&self) -> [u64; 3] {
        std::array::from_fn(|axis| u64::from(self.threadgroups[axis]) * u64::from(self.group[axis]))
    }

    /// Threads of one threadgroup.
    #[must_use]
    pub fn group_threads(&self) -> u32 {
        self.group.iter().product()
    }
}

/// What can go wrong between a text and its results.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The compiler refused the text.
    #[error("the Metal compiler refused the kernel: {0}")]
    Compile(String),
    /// The text compiled, but no pipeline could be made of the entry point (registers, threadgroup memory).
    #[error("no pipeline could be made of kernel {entry}: {reason}")]
    Pipeline {
        /// Name of the entry point.
        entry: String,
        /// What the device said.
        reason: String,
    },
    /// The launch failed, or the kernel broke a rule while it ran.
    #[error("kernel {entry} failed: {reason}")]
    Dispatch {
        /// Name of the entry point.
        entry: String,
        /// What the device said.
        reason: String,
    },
    /// Memory ran out.
    #[error("out of memory: {0}")]
    Memory(String),
}

/// Something that compiles MSL text and dispatches it in order.
pub trait Device {
    /// Tensor memory as this device binds it.
    type Buffer;
    /// A compiled entry point.
    type Pipeline;

    /// Compiles `source` and makes a pipeline of its kernel `entry`.
    ///
    /// # Errors
    /// [`DeviceError::Compile`] with the compiler's log, or [`DeviceError::Pipeline`].
    fn pipeline(&self, source: &str, entry: &str) -> Result<Self::Pipeline, DeviceError>;

    /// Runs a kernel after everything dispatched before it.
    ///
    /// # Errors
    /// [`DeviceError::Dispatch`] or [`DeviceError::Memory`].
    fn dispatch(
        &self,
        pipeline: &Self::Pipeline,
        arguments: &[Argument<'_, Self::Buffer>],
        grid: Grid,
    ) -> Result<(), DeviceError>;
}
