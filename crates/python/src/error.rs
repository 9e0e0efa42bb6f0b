//! What can go wrong in a call, and which Python exception says so.

use std::any::Any;
use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use mtlflashattn_core as core;
use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use thiserror::Error;

/// The one error type of this crate.
#[derive(Debug, Error)]
pub enum Error {
    /// The problem or the plan is not possible.
    #[error(transparent)]
    Problem(#[from] core::Error),
    /// A Python object of the wrong type (`TypeError`).
    #[error("{argument} is {got}; allowed: {allowed}")]
    WrongType {
        /// Name of the argument in the public API.
        argument: &'static str,
        /// What came.
        got: String,
        /// What is allowed.
        allowed: Cow<'static, str>,
    },
    /// The engine ran out of memory (`MemoryError`).
    #[error("attention needs {bytes} bytes of working memory, which cannot be allocated")]
    OutOfMemory {
        /// Size of the failed allocation.
        bytes: usize,
    },
    /// An exception that Python code raised; handed on as it is.
    #[error(transparent)]
    Python(#[from] PyErr),
}

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Python(exception) => exception,
            Error::WrongType { .. } | Error::Problem(core::Error::Dtype { .. }) => PyTypeError::new_err(text),
            Error::Problem(core::Error::Unsupported { .. }) => PyNotImplementedError::new_err(text),
            // The enum is open: what a later variant rejects is a value until it says otherwise.
            Error::Problem(_) => PyValueError::new_err(text),
            Error::OutOfMemory { .. } => PyMemoryError::new_err(text),
        }
    }
}

/// Runs the body of a Python function: errors and panics both become ordinary exceptions.
///
/// Left to itself, `PyO3` raises a panic as a `BaseException`, which `except Exception` does not stop.
pub fn guard<T>(body: impl FnOnce() -> Result<T>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result.map_err(PyErr::from),
        Err(payload) => Err(PyRuntimeError::new_err(format!(
            "internal error in mtlflashattn, please report it with the call that caused it: {}",
            panic_text(payload.as_ref())
        ))),
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let literal = payload.downcast_ref::<&str>().copied();
    literal.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic without a message")
}

/// Panics, so that tests can see what becomes of it.
#[pyfunction]
pub fn _panic() -> PyResult<()> {
    guard(|| panic!("asked to panic"))
}
