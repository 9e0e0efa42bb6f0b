//! What this machine can do, measured: the yardsticks of the benchmarks.

use mtlflashattn_cpu::{Isa, roofline};
use pyo3::prelude::*;

use crate::error::guard;
use crate::settings;

/// Names of the instruction sets that this machine can run, best last.
#[pyfunction]
pub fn instruction_sets() -> Vec<&'static str> {
    Isa::available().map(Isa::name).collect()
}

/// Measures the fused multiply-adds of one thread, times two, in GFLOP/s.
#[pyfunction]
pub fn fma_peak(py: Python<'_>) -> PyResult<f64> {
    guard(|| {
        let isa = settings::current(py)?.isa()?;
        Ok(py.detach(|| roofline::fma_peak(isa)))
    })
}

/// Measures the read bandwidth of one thread over memory that no cache holds, in GB/s.
#[pyfunction]
pub fn read_bandwidth(py: Python<'_>) -> PyResult<f64> {
    guard(|| Ok(py.detach(roofline::read_bandwidth)))
}
