//! Attention in float64.
