//! The `MTLFLASHATTN_*` variables of this process.

use std::ffi::{CString, OsString};
use std::sync::{Arc, Mutex, PoisonError};

use mtlflashattn_core::settings::VARIABLES;
use mtlflashattn_core::{Settings, Tier};
use pyo3::exceptions::PyRuntimeWarning;
use pyo3::prelude::*;

/// All that calls on CPU tensors obey: reading the others would only cost time.
const WATCHED: [&str; 3] = ["MTLFLASHATTN_KERNEL", "MTLFLASHATTN_CPU_ISA", "MTLFLASHATTN_TRACE"];

type Raw = Vec<Option<OsString>>;

struct Cached {
    watched: [Option<OsString>; WATCHED.len()],
    all: Raw,
    settings: Arc<Settings>,
}

static CACHED: Mutex<Option<Cached>> = Mutex::new(None);

/// The settings, parsed again only when the environment changed; each bad value gives a `RuntimeWarning` then.
/// Changes of variables that the cpu tier does not obey may be missed when `on_cpu`.
pub fn current(py: Python<'_>, on_cpu: bool) -> PyResult<Arc<Settings>> {
    let watched = WATCHED.map(std::env::var_os);
    {
        let cached = CACHED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = &*cached
            && cached.watched == watched
            && ((on_cpu && !forces_another_tier(&cached.settings)) || cached.all == read_all())
        {
            return Ok(Arc::clone(&cached.settings));
        }
    }
    // Warnings run Python code, so the lock must not be held.
    let all = read_all();
    let (settings, warnings) = Settings::parse(|name| {
        let index = VARIABLES.iter().position(|variable| variable.name == name)?;
        all[index].as_ref().map(|value| value.to_string_lossy().into_owned())
    });
    let settings = Arc::new(settings);
    *CACHED.lock().unwrap_or_else(PoisonError::into_inner) =
        Some(Cached { watched, all, settings: Arc::clone(&settings) });
    for warning in warnings {
        let text = CString::new(warning.to_string())?;
        PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &text, 1)?;
    }
    Ok(settings)
}

fn read_all() -> Raw {
    VARIABLES.iter().map(|variable| std::env::var_os(variable.name)).collect()
}

fn forces_another_tier(settings: &Settings) -> bool {
    settings.kernel.tier().is_some_and(|tier| tier != Tier::Cpu)
}
