//! The one error type of this crate: each variant names the argument, what came and what is allowed.

use thiserror::Error;

/// Why a call cannot become a [`Problem`](crate::Problem) or a [`Plan`](crate::Plan).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong number of dimensions or a wrong size (`ValueError` in Python).
    #[error("{argument} has shape {got}; allowed: {allowed}")]
    Shape {
        /// Name of the argument in the public API.
        argument: &'static str,
        /// The shape that came.
        got: String,
        /// The shapes that are allowed.
        allowed: String,
    },
    /// A tensor has the wrong element type (`TypeError` in Python).
    #[error("{argument} has dtype {got}; allowed: {allowed}")]
    Dtype {
        /// Name of the argument in the public API.
        argument: &'static str,
        /// The dtype that came.
        got: String,
        /// The dtypes that are allowed.
        allowed: String,
    },
    /// A number is out of range (`ValueError` in Python).
    #[error("{argument} is {got}; allowed: {allowed}")]
    Value {
        /// Name of the argument in the public API.
        argument: &'static str,
        /// The value that came.
        got: String,
        /// The values that are allowed.
        allowed: String,
    },
    /// A meaningful request that nothing here can serve (`NotImplementedError` in Python).
    #[error("{argument}: {got} is not supported; {instead}")]
    Unsupported {
        /// Name of the argument or setting.
        argument: &'static str,
        /// What was asked for.
        got: String,
        /// What to do instead.
        instead: String,
    },
}

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
