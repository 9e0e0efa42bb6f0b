//! From text to pipeline, with the options of `torch.mps.compile_shader`.

use mtlflashattn_core::plan::Version;
use objc2::rc::Retained;
use objc2::runtime::{NSObjectProtocol, ProtocolObject};
use objc2::sel;
use objc2_foundation::{NSError, NSProcessInfo, NSString};
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

/// What torch chooses from 2.11 on.
fn language_version() -> MTLLanguageVersion {
    let macos = macos();
    if macos >= Version::new(26, 0) {
        MTLLanguageVersion::Version4_0
    } else if macos >= Version::new(15, 0) {
        MTLLanguageVersion::Version3_2
    } else {
        MTLLanguageVersion::Version3_1
    }
}

/// The version of macOS. Other Apple systems count as the macOS of their year.
pub(super) fn macos() -> Version {
    let version = NSProcessInfo::processInfo().operatingSystemVersion();
    let part = |number| u16::try_from(number).unwrap_or(0);
    let major = match (std::env::consts::OS, part(version.majorVersion)) {
        // In programs that were linked with an older SDK (dotnet/runtime issue 116503).
        ("macos", 16) => 26,
        ("macos", major) | (_, major @ 26..) => major,
        ("visionos", major) => major + 13,
        (_, major) => major.saturating_sub(3),
    };
    Version::new(major, part(version.minorVersion))
}

/// The compiler's log or the driver's words.
pub(super) fn describe(error: &NSError) -> String {
    error.localizedDescription().to_string()
}
