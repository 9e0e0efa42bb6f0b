//! Element types of Q, K, V and the output.

use std::fmt;

/// Element type of a tensor. Accumulation, softmax state and LSE are float32 whatever this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of binary32: 8 exponent bits, 7 mantissa bits.
    Bf16,
}

impl Dtype {
    /// Size of one element in bytes.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Largest relative error of rounding a real number in the normal range to this type.
    #[must_use]
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => 1.0 / (1u64 << 24) as f64,
            Self::F16 => 1.0 / (1u64 << 11) as f64,
            Self::Bf16 => 1.0 / (1u64 << 8) as f64,
        }
    }

    /// Name as torch writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_roundoff_is_half_the_distance_from_1_to_its_successor() {
        // The stored mantissa bits say where the successor of 1 lies.
        for (dtype, mantissa_bits) in [(Dtype::F32, 23), (Dtype::F16, 10), (Dtype::Bf16, 7)] {
            assert_eq!(dtype.unit_roundoff().to_bits(), (0.5 * 2f64.powi(-mantissa_bits)).to_bits(), "{dtype}");
        }
    }
}
