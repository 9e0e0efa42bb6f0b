//! Counts of the calls that were served.

/// Counts calls.
#[derive(Clone, Debug, Default)]
pub struct Trace {}
