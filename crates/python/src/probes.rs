//! What is known of this machine's kernels, for people: the cache of verdicts as `doctor` shows it.

use mtlflashattn_cache::{Machine, Outcome, Verdict};
use mtlflashattn_core::plan::occupancy;
use pyo3::prelude::*;

use crate::error::guard;
use crate::{doctor, settings};

/// The cache of the device that takes Metal kernels.
#[derive(IntoPyObject)]
pub struct ProbesAnswer {
    /// "mps" or "simulator".
    device: &'static str,
    machine: MachineAnswer,
    /// The file; `None` for a user without a folder for caches.
    path: Option<String>,
    /// Why the file was not read or not written at the last attempt.
    trouble: Option<String>,
    /// What the first uses of all kernels took together.
    first_use_seconds: f64,
    verdicts: Vec<VerdictAnswer>,
    /// How many tuned tiles the file holds.
    tuned_tiles: usize,
}

#[derive(IntoPyObject)]
pub struct MachineAnswer {
    gpu: String,
    os: String,
    torch: String,
    package: String,
}

#[derive(IntoPyObject)]
pub struct VerdictAnswer {
    tier: String,
    dtype: String,
    head_dim: Option<usize>,
    value_dim: Option<usize>,
    tile: String,
    features: Vec<String>,
    proved: bool,
    /// Why the kernel serves no more.
    failure: Option<String>,
    max_threads_per_threadgroup: Option<u32>,
    /// Most 16-bit registers of a thread that allow so many threads on an M1 or M2; `None` for a number that no class has.
    registers: Option<usize>,
    launches: u32,
    compile_seconds: f64,
    probe_seconds: f64,
    /// When, in seconds since 1970.
    checked_at: u64,
}

impl From<Machine> for MachineAnswer {
    fn from(Machine { gpu, os, torch, package }: Machine) -> Self {
        Self { gpu, os, torch, package }
    }
}

impl From<Verdict> for VerdictAnswer {
    fn from(verdict: Verdict) -> Self {
        let seconds = |micros: u64| micros as f64 / 1e6;
        let failure = verdict.failure().map(str::to_owned);
        let registers = verdict.max_threads_per_threadgroup.and_then(|most| occupancy::registers_of(most as usize));
        Self {
            tier: verdict.variant.tier,
            dtype: verdict.variant.dtype,
            head_dim: verdict.variant.head_dim,
            value_dim: verdict.variant.value_dim,
            tile: verdict.variant.tile,
            features: verdict.variant.features,
            proved: verdict.outcome == Outcome::Proved,
            failure,
            max_threads_per_threadgroup: verdict.max_threads_per_threadgroup,
            registers,
            launches: verdict.launches,
            compile_seconds: seconds(verdict.compile_micros),
            probe_seconds: seconds(verdict.probe_micros),
            checked_at: verdict.checked_at,
        }
    }
}

/// What is known of the kernels of the device that takes Metal kernels; `None` where there is no such device.
#[pyfunction]
pub fn _probes(py: Python<'_>) -> PyResult<Option<ProbesAnswer>> {
    guard(|| {
        let resolved = settings::current(py)?;
        let Some(device) = doctor::metal_device(py, &resolved)? else { return Ok(None) };
        let known = device.known(py, &resolved.values)?;
        Ok(Some(ProbesAnswer {
            device: device.name(),
            machine: known.machine.into(),
            path: known.path.map(|path| path.display().to_string()),
            trouble: known.trouble,
            first_use_seconds: known.record.first_use_cost().as_secs_f64(),
            tuned_tiles: known.record.tiles.len(),
            verdicts: known.record.verdicts.into_values().map(VerdictAnswer::from).collect(),
        }))
    })
}
