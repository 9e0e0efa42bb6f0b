//! The settings of this process.

use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use mtlflashattn_core::{self as core, Settings};
use mtlflashattn_cpu::Isa;
use pyo3::exceptions::PyRuntimeWarning;
use pyo3::prelude::*;

use crate::environment::Environment;
use crate::error::{Error, Result};

/// Settings, and what follows from them.
pub struct Resolved {
    pub values: Settings,
    isa: Option<Isa>,
}

impl Resolved {
    fn new(values: Settings) -> Self {
        let isa = match Isa::from_name(values.cpu_isa.name()) {
            Some(isa) => isa.is_available().then_some(isa),
            None => Some(Isa::best()),
        };
        Self { values, isa }
    }

    /// Instruction set of the cpu tier.
    pub fn isa(&self) -> Result<Isa> {
        self.isa.ok_or_else(|| {
            let available: Vec<&str> = Isa::available().map(Isa::name).collect();
            Error::Problem(core::Error::Unsupported {
                argument: "MTLFLASHATTN_CPU_ISA",
                got: self.values.cpu_isa.name().into(),
                instead: format!("this machine can run {}", available.join(", ")),
            })
        })
    }
}

/// The environment that the settings were parsed from, and the settings.
static CACHED: Mutex<Option<(Environment, Arc<Resolved>)>> = Mutex::new(None);

/// The settings, parsed again only when the environment changed; each bad value gives a `RuntimeWarning` then.
pub fn current(py: Python<'_>) -> PyResult<Arc<Resolved>> {
    if let Some((environment, settings)) = &*CACHED.lock().unwrap_or_else(PoisonError::into_inner)
        && environment.is_current()
    {
        return Ok(Arc::clone(settings));
    }
    let environment = Environment::read();
    let (values, warnings) = Settings::parse(|name| environment.get(name));
    let settings = Arc::new(Resolved::new(values));
    *CACHED.lock().unwrap_or_else(PoisonError::into_inner) = Some((environment, Arc::clone(&settings)));
    // Warnings run Python code, so the lock must not be held.
    for warning in warnings {
        let text = CString::new(warning.to_string())?;
        PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &text, 2)?;
    }
    Ok(settings)
}
