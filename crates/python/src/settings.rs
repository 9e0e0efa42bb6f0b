//! The settings of this process.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mtlflashattn_core::plan::TunedTiles;
use mtlflashattn_core::{self as core, Settings, settings};
use mtlflashattn_cpu::Isa;
use pyo3::exceptions::{PyRuntimeError, PyRuntimeWarning};
use pyo3::prelude::*;

use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::metal::MetalDevice;
use crate::plans::Plans;
use crate::tensor::Place;
use crate::tune;

/// Settings, and what follows from them.
pub struct Resolved {
    pub values: Settings,
    isa: Option<Isa>,
    /// What computes CPU tensors in the place of the cpu tier.
    stand_in: Option<MetalDevice>,
    /// The plans for Metal devices.
    pub plans: Plans,
    /// The tiles that were measured on them, read when they are first asked for.
    tuned: [OnceLock<TunedTiles>; 2],
}

impl Resolved {
    fn new(values: Settings) -> Self {
        let stand_in = if PRETENDING.load(Ordering::Relaxed) {
            Some(MetalDevice::Mps)
        } else {
            (values.device == settings::Device::Simulator).then_some(MetalDevice::Simulator)
        };
        let isa = match Isa::from_name(values.cpu_isa.name()) {
            Some(isa) => isa.is_available().then_some(isa),
            None => Some(Isa::best()),
        };
        Self { values, isa, stand_in, plans: Plans::default(), tuned: Default::default() }
    }

    /// The device whose kernels compute tensors of `place`, if there is one.
    pub const fn metal_device(&self, place: Place) -> Option<MetalDevice> {
        match place {
            Place::Cpu => self.stand_in,
            Place::Mps => Some(MetalDevice::Mps),
            Place::Other => None,
        }
    }

    /// The tiles that were measured on `device`: none where the record cannot be read.
    pub fn tuned(&self, py: Python<'_>, device: MetalDevice) -> PyResult<&TunedTiles> {
        let tuned = &self.tuned[device as usize];
        if let Some(tuned) = tuned.get() {
            return Ok(tuned);
        }
        // Asking runs Python code, so that two threads may read the same record.
        let record = device.known(py, &self.values)?.record;
        let records = record.tiles.into_iter().map(|(name, tuned)| (name, tune::text_of(&tuned.tile)));
        Ok(tuned.get_or_init(|| TunedTiles::new(records)))
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

/// Whether CPU tensors are handed to torch's MPS stream, which must be a stand-in then.
static PRETENDING: AtomicBool = AtomicBool::new(false);

/// Lets CPU tensors take the way of MPS tensors, or ends that: for tests on machines without MPS, where a stand-in takes
/// the place of torch's compiled half.
#[pyfunction]
pub fn _pretend_mps(py: Python<'_>, on: bool) -> PyResult<()> {
    if on && py.import("torch")?.getattr("backends")?.getattr("mps")?.call_method0("is_available")?.is_truthy()? {
        return Err(PyRuntimeError::new_err("a real MPS device would read the memory of CPU tensors wrongly"));
    }
    PRETENDING.store(on, Ordering::Relaxed);
    forget();
    Ok(())
}

/// `MTLFLASHATTN_SDPA` and the thresholds of its gates: (auto, on or off; GiB of scores; lengths).
#[pyfunction]
pub fn sdpa_settings(py: Python<'_>) -> PyResult<(&'static str, f64, usize, usize)> {
    let resolved = current(py)?;
    let Settings { sdpa, sdpa_min_gb, sdpa_min_seq, sdpa_fast_min_seq, .. } = resolved.values;
    Ok((sdpa.name(), sdpa_min_gb, sdpa_min_seq, sdpa_fast_min_seq))
}

/// Forgets what follows from the settings, such as plans, when something else that it follows from has changed.
pub fn forget() {
    *CACHED.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
