//! What the planner has to know about the Apple GPU of this machine, asked once.

use std::sync::Mutex;
use std::sync::PoisonError;

use mtlflashattn_cache::Machine;
use mtlflashattn_core::plan::{Chip, Gpu, Version};
use pyo3::prelude::*;

/// Stands for an unknown version of macOS: the least on which torch has MPS tensors that kernels can read.
const OLDEST_MACOS: Version = Version::new(13, 0);

static GPU: Mutex<Option<Gpu>> = Mutex::new(None);

/// The GPU behind torch's `mps` device. What cannot be found out counts as the least there is.
pub fn of_torch(py: Python<'_>) -> PyResult<Gpu> {
    if let Some(gpu) = *GPU.lock().unwrap_or_else(PoisonError::into_inner) {
        return Ok(gpu);
    }
    // Asking runs Python code, so the lock must not be held.
    let torch = py.import("torch")?;
    let mps = torch.getattr("backends")?.getattr("mps")?;
    let chip = name(&mps).map_or(Chip::Unknown, |name| Chip::from_name(&name));
    let cores = ask(&mps, "get_core_count").and_then(|count| count.parse().ok());
    let version = torch.getattr("__version__")?.str()?.to_string();
    let gpu = Gpu {
        chip,
        cores: cores.filter(|&cores| cores > 0).unwrap_or_else(|| chip.most_cores()),
        macos: macos(py)?,
        torch: Version::parse("torch", &version).ok(),
    };
    *GPU.lock().unwrap_or_else(PoisonError::into_inner) = Some(gpu);
    Ok(gpu)
}

/// Everything that verdicts on kernels depend on, to the last digit of each version.
pub fn machine(py: Python<'_>) -> PyResult<Machine> {
    let torch = py.import("torch")?;
    let mps = torch.getattr("backends")?.getattr("mps")?;
    let name = name(&mps).unwrap_or_else(|| "unknown GPU".into());
    let cores = ask(&mps, "get_core_count").map_or_else(String::new, |cores| format!(", {cores} cores"));
    // Builds of one version differ, in betas above all.
    let build = sysctl(c"kern.osversion").map_or_else(String::new, |build| format!(" ({build})"));
    Ok(Machine {
        gpu: format!("{name}{cores}"),
        os: format!("macOS {}{build}", macos_text(py)?),
        torch: torch.getattr("__version__")?.str()?.to_string(),
        package: env!("CARGO_PKG_VERSION").into(),
    })
}

/// Name of the GPU. torch tells it since 2.9, as it does the number of cores.
fn name(mps: &Bound<'_, PyAny>) -> Option<String> {
    ask(mps, "get_name").or_else(|| sysctl(c"machdep.cpu.brand_string"))
}

/// Asks again at the next call.
pub fn forget() {
    *GPU.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// What `module.function()` returns, as text; `None` where there is no such function or it does not know.
fn ask(module: &Bound<'_, PyAny>, function: &str) -> Option<String> {
    Some(module.getattr(function).ok()?.call0().ok()?.str().ok()?.to_string())
}

/// The version of macOS. `platform.mac_ver` tells programs that were built for an older macOS an older version.
fn macos(py: Python<'_>) -> PyResult<Version> {
    Ok(Version::parse("macos", &macos_text(py)?).unwrap_or(OLDEST_MACOS))
}

fn macos_text(py: Python<'_>) -> PyResult<String> {
    match sysctl(c"kern.osproductversion") {
        Some(text) => Ok(text),
        None => py.import("platform")?.getattr("mac_ver")?.call0()?.get_item(0)?.extract(),
    }
}

/// A text that the kernel of macOS knows under `name`.
#[cfg(target_vendor = "apple")]
fn sysctl(name: &std::ffi::CStr) -> Option<String> {
    let mut buffer = [0u8; 256];
    let mut len = buffer.len();
    // SAFETY: `name` ends with a zero byte, and at most `len` bytes are written to `buffer`; nothing is set.
    let failed =
        unsafe { libc::sysctlbyname(name.as_ptr(), buffer.as_mut_ptr().cast(), &raw mut len, std::ptr::null_mut(), 0) };
    let text = std::ffi::CStr::from_bytes_until_nul(&buffer[..len.min(buffer.len())]).ok()?;
    (failed == 0).then(|| text.to_string_lossy().into_owned())
}

#[cfg(not(target_vendor = "apple"))]
const fn sysctl(_name: &std::ffi::CStr) -> Option<String> {
    None
}
