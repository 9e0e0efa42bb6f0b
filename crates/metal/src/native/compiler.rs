//! From text to pipeline, with the options of `torch.mps.compile_shader`.

use objc2::rc::Retained;
use objc2::runtime::{NSObjectProtocol, ProtocolObject};
use objc2::{available, sel};
use objc2_foundation::{NSError, NSString};
use objc2_metal::{
    MTLCompileOptions, MTLComputePipelineState, MTLDevice, MTLFunction, MTLFunctionType, MTLLanguageVersion,
    MTLLibrary, MTLMathFloatingPointFunctions, MTLMathMode,
};

use super::Object;
use crate::DeviceError;

/// A compiled kernel.
pub struct Pipeline {
    state: Object<dyn MTLComputePipelineState>,
    entry: String,
}

impl Pipeline {
    pub(super) fn compile(
        device: &ProtocolObject<dyn MTLDevice>,
        source: &str,
        entry: &str,
    ) -> Result<Self, DeviceError> {
        let refused = |reason| DeviceError::Pipeline { entry: entry.to_owned(), reason };
        let library = device
            .newLibraryWithSource_options_error(&NSString::from_str(source), Some(&compile_options()))
            .map_err(|error| DeviceError::Compile(describe(&error)))?;
        let function = library.newFunctionWithName(&NSString::from_str(entry)).ok_or_else(|| {
            let names: Vec<_> = library.functionNames().iter().map(|name| name.to_string()).collect();
            refused(format!("the text has no function of this name; it has {names:?}"))
        })?;
        if function.functionType() != MTLFunctionType::Kernel {
            return Err(refused("the function is no kernel".to_owned()));
        }
        let state =
            device.newComputePipelineStateWithFunction_error(&function).map_err(|error| refused(describe(&error)))?;
        let (declared, allowed) = (state.staticThreadgroupMemoryLength(), device.maxThreadgroupMemoryLength());
        if declared > allowed {
            return Err(refused(format!("{declared} bytes of threadgroup memory; this GPU has {allowed}")));
        }
        Ok(Self { state, entry: entry.to_owned() })
    }

    /// Threads that a threadgroup may have: fewer than 1024 where a thread needs many registers.
    pub fn max_threads(&self) -> usize {
        self.state.maxTotalThreadsPerThreadgroup()
    }

    /// Threads of a simdgroup.
    pub fn simd_width(&self) -> usize {
        self.state.threadExecutionWidth()
    }

    /// Bytes of threadgroup memory that the kernel declares.
    pub fn threadgroup_memory(&self) -> usize {
        self.state.staticThreadgroupMemoryLength()
    }

    pub(super) fn entry(&self) -> &str {
        &self.entry
    }

    pub(super) fn state(&self) -> &ProtocolObject<dyn MTLComputePipelineState> {
        &self.state
    }

    /// A launch of this kernel failed.
    pub(super) fn failed(&self, reason: impl Into<String>) -> DeviceError {
        DeviceError::Dispatch { entry: self.entry.clone(), reason: reason.into() }
    }
}

/// Safe math and precise functions: what torch sets unless `PYTORCH_MPS_FAST_MATH` is set.
fn compile_options() -> Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    options.setLanguageVersion(language_version());
    // macOS 15 and iOS 18 brought the property; where it is missing, its setter would end the process.
    if options.respondsToSelector(sel!(setMathMode:)) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[expect(deprecated, reason = "the only way before macOS 15")]
        options.setFastMathEnabled(false);
    }
    options
}

/// What torch chooses from 2.11 on: 4.0 on macOS 26, 3.2 on macOS 15, else 3.1.
fn language_version() -> MTLLanguageVersion {
    // macOS 26 calls itself 16 in programs that were linked with an older SDK (dotnet/runtime issue 116503); there is
    // no macOS 16 to 25 and no iOS 19 to 25.
    if available!(macos = 16.0, ios = 19.0, tvos = 19.0, visionos = 3.0, ..) {
        MTLLanguageVersion::Version4_0
    } else if available!(macos = 15.0, ios = 18.0, tvos = 18.0, visionos = 2.0, ..) {
        MTLLanguageVersion::Version3_2
    } else {
        MTLLanguageVersion::Version3_1
    }
}

/// The compiler's log or the driver's words.
pub(super) fn describe(error: &NSError) -> String {
    error.localizedDescription().to_string()
}
