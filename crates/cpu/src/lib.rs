//! Flash attention for CPU tensors.
//!
//! [`forward`] executes a [`CpuTile`] of a [`Problem`]: blocks of keys stream past panels of query rows that hold their
//! running maximum, sum and output, so that no score matrix is ever stored. Softmax state and accumulation are float32.
//! Results depend neither on the number of threads nor on how rows are grouped into tasks.
#![allow(unsafe_op_in_unsafe_fn, reason = "every line of a kernel is an intrinsic or a pointer access")]
#![allow(
    clippy::inline_always,
    reason = "generic kernels must end up inside a function that enables their instructions"
)]
#![allow(clippy::float_cmp, reason = "exact zeros and ones are states, not results of rounding")]
#![allow(clippy::cast_ptr_alignment, reason = "tensors are aligned to their elements, which the caller guarantees")]

mod append;
mod backward;
mod call;
mod decode;
mod dropout;
mod element;
mod interrupt;
mod isa;
mod math;
mod merge;
mod modify;
mod panels;
mod pool;
mod queue;
pub mod roofline;
mod rows;
mod run;
mod schedule;
mod score;
mod workspace;

use mtlflashattn_core::{CacheBuffers, CpuTile, Problem, Strides};
use thiserror::Error as ThisError;

pub use append::{AppendInputs, AppendOutputs, append};
pub use backward::{Gradient, InputGradients, OutputGradients, backward};
pub use isa::Isa;

/// Why a call did not finish.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The `interrupted` callback said so; the output is incomplete.
    #[error("interrupted")]
    Interrupted,
    /// Scratch memory could not be allocated.
    #[error("out of memory: {bytes} bytes of scratch memory")]
    OutOfMemory {
        /// Size of the allocation that failed.
        bytes: usize,
    },
}

/// Where the inputs of a call lie. Strides are those of the [`Problem`].
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// First element of q.
    pub q: *const u8,
    /// First element of k.
    pub k: *const u8,
    /// First element of v.
    pub v: *const u8,
    /// `cu_seqlens_q` of a packed problem, checked by [`mtlflashattn_core::Lengths::check_offsets`]; else empty.
    pub query_offsets: &'a [i32],
    /// `cu_seqlens_k` of a packed problem without a cache; else empty.
    pub key_offsets: &'a [i32],
    /// The buffers of the problem's cache, checked by [`Problem::check_cache`]; else empty.
    pub cache: CacheBuffers<'a>,
    /// First ALiBi slope; null when the problem has none.
    pub alibi_slopes: *const f32,
    /// First element of the bias or mask; null when the problem has none.
    pub bias: *const u8,
    /// First sink; null when the problem has none.
    pub sinks: *const f32,
}

/// Where the results go. Every row is written; rows outside all packed sequences get 0 and an LSE of +inf.
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    /// First element of the output, `[.., query_heads, value_dim]` with last stride 1.
    pub out: *mut u8,
    /// Strides of the output.
    pub out_strides: Strides,
    /// First element of the LSE, contiguous `[batch, query_heads, query_len]` or `[query_heads, total_query]`; null
    /// when it is not wanted.
    pub lse: *mut f32,
}

/// Computes attention.
///
/// `interrupted` is asked on the calling thread about every 50 ms; when it returns true the call ends early.
///
/// # Errors
/// [`Error::Interrupted`] and [`Error::OutOfMemory`]; the output is incomplete in both cases.
///
/// # Safety
/// All pointers must be valid for the shapes and strides of `problem` (reads for inputs, writes for outputs), the
/// outputs must overlap nothing else, and offsets and buffers of a cache must have been checked.
///
/// # Panics
/// If this machine cannot run `isa`.
pub unsafe fn forward(
    problem: &Problem,
    tile: &CpuTile,
    isa: Isa,
    threads: usize,
    inputs: &Inputs<'_>,
    outputs: &Outputs,
    interrupted: &mut dyn FnMut() -> bool,
) -> Result<(), Error> {
    assert!(isa.is_available(), "this machine cannot run {}", isa.name());
    // SAFETY: the caller's contract; the instruction set was just checked.
    unsafe { run::forward(&call::Call::new(problem, tile, inputs, outputs), isa, threads, interrupted) }
}
