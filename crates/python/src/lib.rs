//! The extension module `metal_flash_attn._native`: torch tensors in, plans executed, torch tensors out.
#![allow(missing_docs, reason = "nobody links against this crate; its Python face is documented in _native.pyi")]

mod append;
mod arguments;
mod backward;
mod call;
mod cli;
mod decode;
mod differentiate;
mod dlpack;
mod doctor;
mod environment;
mod error;
mod execute;
mod first_use;
mod form;
mod forward;
mod gpu;
mod kernels;
mod kvcache;
mod machine;
mod metal;
mod mps;
mod operator;
mod plan;
mod plans;
mod probe;
mod probes;
mod settings;
mod shut;
mod simulated;
mod tensor;
mod torch;
mod trace;
mod tune;
mod variant;
mod verdicts;

use pyo3::prelude::*;

/// Rust engine and planner behind `metal_flash_attn`.
#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::backward::{backward_into, execute_backward};
    #[pymodule_export]
    use super::cli::{_kernel_text, _plan_elsewhere};
    #[pymodule_export]
    use super::doctor::{_machine, _settings};
    #[pymodule_export]
    use super::error::_panic;
    #[pymodule_export]
    use super::forward::{execute_operator, forward, sdpa};
    #[pymodule_export]
    use super::kvcache::{attend_cached, execute_cached_operator};
    #[pymodule_export]
    use super::machine::{fma_peak, instruction_sets, read_bandwidth};
    #[pymodule_export]
    use super::metal::_forget_kernels;
    #[pymodule_export]
    use super::plan::{Plan, plan};
    #[pymodule_export]
    use super::probes::_probes;
    #[pymodule_export]
    use super::settings::{_pretend_mps, sdpa_settings};
    #[pymodule_export]
    use super::shut::ShutForms;
    #[pymodule_export]
    use super::simulated::{SimulatedLibrary, SimulatedPipeline};
    #[pymodule_export]
    use super::trace::{TraceBlock, TraceEntry};
    #[pymodule_export]
    use super::tune::{_count_tile, _store_tiles, _tile_candidates};
}
