//! Elementary functions over vectors.
#![allow(clippy::excessive_precision, reason = "coefficients as they are published")]
#![allow(clippy::approx_constant, reason = "a coefficient near ln 2 is not ln 2")]

use crate::isa::Simd;

/// `2^x` for `x <= 1`, relative error below 2^-22; exactly 0 below 2^-126.5 and for negative infinity, NaN for NaN.
#[inline(always)]
pub(crate) unsafe fn exp2<S: Simd>(x: S::Vector) -> S::Vector {
    // Adding 1.5 * 2^23 rounds to a whole number; the extra 127 is the exponent bias, so that the low bits of the sum
    // are the biased exponent of the power of two.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    // Minimax polynomial of degree 5 on [-0.5, 0.5] among those that are exactly 1 at 0: a maximum that does not move
    // must not rescale anything.
    const COEFFICIENTS: [f32; 5] = [0.009_671_513, 0.055_507_336, 0.240_222_42, 0.693_147, 1.0];
    let x = S::max(S::splat(-127.0), x);
    let rounded = S::add(x, S::splat(ROUND));
    let fraction = S::sub(x, S::sub(rounded, S::splat(ROUND)));
    let mut power = S::splat(0.001_326_472_7);
    for coefficient in COEFFICIENTS {
        power = S::fma(power, fraction, S::splat(coefficient));
    }
    S::mul(power, S::shift_to_exponent(rounded))
}

/// `tanh(x)` within 7 units in the last place: a rational minimax approximation (coefficients: Eigen's `ptanh_float`).
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S::Vector) -> S::Vector {
    // Beyond this the float32 result is 1.
    const LIMIT: f32 = 7.905_311_6;
    const ODD: [f32; 6] = [
        2.000_187_904_824_77e-13,
        -8.604_671_522_137_35e-11,
        5.122_297_090_371_14e-8,
        1.485_722_357_179_79e-5,
        6.372_619_288_754_36e-4,
        4.893_524_558_917_86e-3,
    ];
    const EVEN: [f32; 3] = [1.185_347_056_866_54e-4, 2.268_434_632_439_00e-3, 4.893_525_185_543_85e-3];
    let x = S::max(S::splat(-LIMIT), S::min(S::splat(LIMIT), x));
    let square = S::mul(x, x);
    let mut numerator = S::splat(-2.760_768_477_423_55e-16);
    for coefficient in ODD {
        numerator = S::fma(numerator, square, S::splat(coefficient));
    }
    let mut denominator = S::splat(1.198_258_394_667_02e-6);
    for coefficient in EVEN {
        denominator = S::fma(denominator, square, S::splat(coefficient));
    }
    S::div(S::mul(x, numerator), denominator)
}
