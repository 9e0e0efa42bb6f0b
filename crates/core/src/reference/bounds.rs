//! How far a right answer in float32 arithmetic may lie from the reference.
//!
//! # Assumptions about a tier
//! It reads the rounded inputs (the reference gets the same values), computes in float32 with unit roundoff `u = 2^-24`,
//! sums in any order, keeps probabilities in float32 and rounds once, at the end, to the output type. It folds factors
//! such as `scale * log2(e)` wherever it likes and works in units of `log2`. Its `exp2` has a relative error of at most
//! 2^-21 and may return 0 below 2^-126; its `tanh` and `log2` have an absolute error of at most 2^-21. It rescales what
//! it has accumulated at most once for every 16 keys. No other step under- or overflows.
//!
//! # Derivation
//! `gamma(n) = n u / (1 - n u)` bounds the relative error of a sum or product of `n` roundings in any order, and so that
//! of a dot product relative to the dot product of the absolute values (Higham, *Accuracy and Stability of Numerical
//! Algorithms*, 2nd ed., section 3.1). The worst case rather than the statistical `sqrt(n)` version: rounding errors of
//! equal addends are equal, so that the constant tensors that shrinking and users produce do reach it.
//!
//! 1. *Score.* With `A = |scale| sum |q| |k|`, the product is off by at most `gamma(head_dim + 4) A`: the dot product, two
//!    roundings of the folded factor, one of the factor into q and one spare. The softcap passes at most that on (the
//!    slope of `tanh` is at most 1) and adds `2^-21 softcap + 4 u |capped|`; ALiBi adds `4 u |term|` and the bias
//!    `2 u |term|`, each with `u |score|` for the addition. Call the sum `e`.
//! 2. *Weight.* `exp(s - max)` adds `u (max - s)` for the difference (the differences of successive maxima telescope)
//!    and 2^-21 for `exp2`, and again for each rescaling. The weight of key `j` is off by the relative error
//!    `t_j = exp(e_j + ...) - 1`. The same weights stand in the numerator and in the sum.
//! 3. *Output.* Perturbed weights move `out = sum p_j v_j` by at most
//!    `sum p_j t_j |v_j - out| / (1 - sum p_j t_j)`, and by no more than `max |v_j - out|` in any case. Summing `n`
//!    terms (with their rescalings, merging and the division) adds `gamma(n + n / 16 + 12) (sum p_j |v_j| + |out|)`.
//! 4. *Rounding* to the output type adds its unit roundoff times the magnitude.
//! 5. *LSE.* Perturbed weights move it by at most `-ln(1 - sum p_j t_j)`, and by no more than the largest `ln(1 + t_j)`;
//!    the sum adds `gamma`, the logarithm 2^-21, and the final products and additions `u` times their magnitudes.
//!
//! Dropout takes `z_j v_j` for the value of key `j`, and adds three roundings to the sum: of the factor, of its product with
//! a weight or a sum, and one spare.
//!
//! Products of errors are covered by a factor of 1.01.
//!
//! # Metal kernels
//! [`Arithmetic::metal`] replaces three of the assumptions; the rest of the derivation stands.
//!
//! - `fast::exp2` is off by at most `3 + 2 |x|` units in the last place, the bound of `OpenCL`'s relaxed mathematics
//!   that Metal's fast mathematics shares. The exponents of a weight and of its rescalings telescope, so that the second
//!   term grows with the distance of the score from the maximum and not with the number of rescalings.
//! - The running maximum lags behind the true one by at most 8 (a factor of 256), and the output is rescaled only when
//!   it catches up: a weight at distance `x` (in units of log2) is rescaled at most `1 + x / 8` times, and its exponents
//!   sum to at most `x + 16`.
//! - Weights are rounded to the type of v for the product with it, after they were summed. That adds the unit roundoff
//!   times `sum p_j |v_j|` to the output and nothing to the LSE, and in float16 half the smallest number for each key,
//!   relative to a largest weight of at least 1. Subnormal float16 numbers are assumed to be kept.
//!
//! The decode kernel ([`Arithmetic::decode`]) sums keys in parts and brings these under one maximum at the end. The
//! exponents of a weight still telescope: they fall to the maximum of its part and rise from there. Bringing two parts
//! together multiplies by `exp2` once more, at most [`MERGES`] times, and takes two more roundings each time.
//!
//! The tensorops kernels ([`Arithmetic::matmul2d`]) are Metal kernels in this sense: `matmul2d` accumulates in float32, and
//! weights are float32 operands of which at least the significant bits of v's type count. With TF32, operands in float32
//! keep 11 significant bits: a relative error of up to `c = 2^-10` each, so that `(2 c + c^2) A` is added to the error of
//! a score, and `(2 c + c^2) sum p_j |v_j|` to that of the output.
//!
//! # How tight
//! Losing one of `n` keys moves an output by about `1 / n`. In float32 that is more than ten times the bound up to about
//! a thousand visible keys of unit-variance inputs. In 16-bit types the final rounding of an output of size `1 / sqrt(n)`
//! dominates, `2^-8 / sqrt(n)` in bfloat16, which leaves a factor of `256 / sqrt(n)`. Longer sequences should be tested
//! with windows or skewed scores, so that some rows depend on few keys.

mod gradients;
pub mod rounded_gradients;

use std::f64::consts::{LN_2, LOG2_E};

pub use gradients::gradient_bounds;

use super::{Forward, ReferenceInputs, Row, Score, Softmax, forward, row_at, rows};
use crate::{Dtype, Problem};

/// Unit roundoff of float32.
const UNIT: f64 = Dtype::F32.unit_roundoff();
/// Error of `exp2` (relative), `tanh` and `log2` (absolute).
const ELEMENTARY: f64 = 1.0 / (1u64 << 21) as f64;
/// Where a weight may become 0.
const FLUSH: f64 = f32::MIN_POSITIVE as f64;
/// Fewest keys between two rescalings of the accumulated output.
const RESCALE_KEYS: usize = 16;
/// Covers products of errors, which are far below a hundredth of the errors themselves.
const SECOND_ORDER: f64 = 1.01;

/// Relative error of an operand of which 11 significant bits are kept and the others cut off.
const TF32: f64 = 1.0 / (1u64 << 10) as f64;

/// How far the running maximum of a Metal kernel lags behind the true one, in units of log2.
const LAG: f64 = 8.0;

/// How often the decode kernel brings parts of a row together: simdgroups of a threadgroup by halves (up to 32 of them),
/// and splits.
const MERGES: usize = 6;

/// What a tier's arithmetic may do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arithmetic {
    /// Relative error of `exp2` near 0.
    exp2: f64,
    /// Its growth with the magnitude of the argument.
    exp2_growth: f64,
    /// Type that weights are rounded to for the product with v.
    weights: Dtype,
    /// Relative error of each operand of a product, beside the rounding of weights.
    operands: f64,
    /// How often parts of a row are brought under one maximum.
    merges: usize,
    /// Whether the maximum lags, so that rescalings are counted by distance rather than by keys.
    lags: bool,
}

impl Arithmetic {
    /// Float32 throughout: the CPU engine.
    pub const FLOAT32: Self =
        Self { exp2: ELEMENTARY, exp2_growth: 0.0, weights: Dtype::F32, operands: 0.0, merges: 0, lags: false };

    /// A Metal kernel that rounds weights to `weights`.
    #[must_use]
    pub const fn metal(weights: Dtype) -> Self {
        Self { exp2: 6.0 * UNIT, exp2_growth: 4.0 * UNIT, weights, operands: 0.0, merges: 0, lags: true }
    }

    /// The decode kernel, which rounds weights to `weights`.
    #[must_use]
    pub const fn decode(weights: Dtype) -> Self {
        Self { merges: MERGES, ..Self::metal(weights) }
    }

    /// A tensorops kernel for inputs of type `dtype`; `relaxed` says whether float32 operands may lose bits.
    #[must_use]
    pub const fn matmul2d(dtype: Dtype, relaxed: bool) -> Self {
        let operands = if relaxed && matches!(dtype, Dtype::F32) { TF32 } else { 0.0 };
        Self { operands, ..Self::metal(dtype) }
    }

    /// Relative error of a product of two operands.
    fn product_error(&self) -> f64 {
        self.operands * (2.0 + self.operands)
    }

    /// Relative error of a weight `distance` (in units of log2) below the maximum, by `exp2` and by subtracting.
    fn weight_error(&self, distance: f64, keys: usize) -> f64 {
        if self.lags {
            let exponents = distance + 2.0 * LAG;
            self.exp2 * (2.0 + self.merges as f64 + distance / LAG) + (self.exp2_growth + UNIT) * exponents
        } else {
            UNIT * distance * LN_2 + self.exp2 * (1 + rescalings(keys)) as f64
        }
    }

    /// Relative error of a weight that is one `exp2` of a number `distance` (in natural units) away from 0.
    fn single_weight_error(&self, distance: f64) -> f64 {
        self.exp2 + self.exp2_growth * distance.abs() * LOG2_E
    }

    /// Half the smallest weight.
    fn lost_weight(&self) -> f64 {
        match self.weights {
            Dtype::F16 => smallest_error(Dtype::F16),
            Dtype::F32 | Dtype::Bf16 => 0.0,
        }
    }

    /// Relative error of rounding a weight.
    fn rounded_weight(&self) -> f64 {
        if self.weights == Dtype::F32 { 0.0 } else { self.weights.unit_roundoff() }
    }
}

/// Roundings that dropout adds to a product or a sum.
const fn dropout_roundings(problem: &Problem) -> usize {
    if problem.dropout.is_some() { 3 } else { 0 }
}

fn rescalings(keys: usize) -> usize {
    keys.div_ceil(RESCALE_KEYS) + 2
}

/// Largest allowed distances from [`Forward`], in its layouts.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// Of each element of the output.
    pub out: Vec<f64>,
    /// Of each LSE; 0 where it must be infinite.
    pub lse: Vec<f64>,
}

impl Bounds {
    /// Largest errors of `got.out` and of `got.lse` in units of their bounds: a right answer has none above 1. Infinite
    /// for NaN, and where a value that must be exact is not.
    ///
    /// # Panics
    /// When `got` does not have the sizes of the bounds.
    #[must_use]
    pub fn worst(&self, exact: &Forward, got: &Forward) -> (f64, f64) {
        (worst(&self.out, &exact.out, &got.out), worst(&self.lse, &exact.lse, &got.lse))
    }
}

fn worst(bounds: &[f64], exact: &[f64], got: &[f64]) -> f64 {
    assert!(bounds.len() == exact.len() && exact.len() == got.len(), "results of different sizes");
    let ratio = |((bound, exact), got): ((&f64, &f64), &f64)| {
        let error = got - exact;
        let equal = error == 0.0 || got.total_cmp(exact).is_eq();
        let ratio = if equal { 0.0 } else { error.abs() / bound };
        if ratio.is_nan() { f64::INFINITY } else { ratio }
    };
    bounds.iter().zip(exact).zip(got).map(ratio).fold(0.0, f64::max)
}

/// Bounds the error of every element of the output and of the LSE for these very inputs in float32 arithmetic; see the
/// [module](self) for what is assumed and why it holds.
///
/// # Panics
/// When an input does not have the size that `problem` gives it.
#[must_use]
pub fn error_bounds(problem: &Problem, inputs: &ReferenceInputs<'_>) -> Bounds {
    error_bounds_of(Arithmetic::FLOAT32, problem, inputs)
}

/// The same for another arithmetic.
///
/// # Panics
/// When an input does not have the size that `problem` gives it.
#[must_use]
pub fn error_bounds_of(arithmetic: Arithmetic, problem: &Problem, inputs: &ReferenceInputs<'_>) -> Bounds {
    let Forward { out: exact, lse } = forward(problem, inputs);
    let mut bounds = Bounds { out: vec![0.0; exact.len()], lse: vec![0.0; lse.len()] };
    for row in rows(problem, inputs) {
        let scores = row.scores(problem, inputs);
        let Some(softmax) = Softmax::new(&scores, row.sink(inputs)) else { continue };
        let out = row.out_range(problem);
        let of_out = &mut bounds.out[out.clone()];
        bounds.lse[row.lse_index(problem)] =
            bound_row(arithmetic, problem, inputs, &row, &scores, &softmax, &exact[out], of_out);
    }
    bounds
}

/// One row of the results, and the bounds of its errors for each of `arithmetics`: for problems too large to compute as a
/// whole. The row is that of query `place.2` of sequence `place.0` in head `place.1`; results and bounds are those of
/// [`forward`] and [`error_bounds_of`].
///
/// # Panics
/// When an input does not have the size that `problem` gives it, and when there is no such row.
#[must_use]
pub fn row_with_bounds(
    arithmetics: &[Arithmetic],
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    place: (usize, usize, usize),
) -> (Forward, Vec<Bounds>) {
    let row = row_at(problem, inputs, place);
    let scores = row.scores(problem, inputs);
    let zeros = vec![0.0; problem.value_dim];
    let mut exact = Forward { out: zeros.clone(), lse: vec![f64::INFINITY] };
    let mut bounds = vec![Bounds { out: zeros, lse: vec![0.0] }; arithmetics.len()];
    if let Some(softmax) = Softmax::new(&scores, row.sink(inputs)) {
        exact.lse[0] = softmax.lse;
        row.add_output(problem, inputs, &scores, &softmax, &mut exact.out);
        for (&arithmetic, bounds) in arithmetics.iter().zip(&mut bounds) {
            let of_out = &mut bounds.out;
            bounds.lse[0] = bound_row(arithmetic, problem, inputs, &row, &scores, &softmax, &exact.out, of_out);
        }
    }
    (exact, bounds)
}

/// Bounds the errors of a row whose output is `exact`: writes those of the output, and returns that of the LSE.
#[allow(clippy::too_many_arguments, reason = "a row with all that it comes from")]
fn bound_row(
    arithmetic: Arithmetic,
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    row: &Row,
    scores: &[Score],
    softmax: &Softmax,
    exact: &[f64],
    bounds: &mut [f64],
) -> f64 {
    let weights = Weights::new(arithmetic, problem, inputs, row, scores, row.sink(inputs), softmax);
    for (column, (bound, exact)) in bounds.iter_mut().zip(exact).enumerate() {
        let value = |score: &Score| score.kept * inputs.v[row.value_range(problem, score.key)][column];
        let values = scores.iter().map(value);
        *bound = round_to(problem.dtype, *exact, weights.out_bound(softmax, values, *exact));
    }
    weights.lse_bound(softmax.lse)
}

/// The weights of a row and how far off they may be.
struct Weights {
    arithmetic: Arithmetic,
    /// Relative error of each key's weight.
    keys: Vec<f64>,
    /// Relative error of the sink's weight.
    sink: f64,
    /// Sum of the relative errors weighted by the probabilities: relative error of the sum of the weights.
    mean: f64,
    /// Largest of the relative errors.
    largest: f64,
    /// Relative error of summing the weights, or the weighted values.
    summation: f64,
    /// Largest score, the sink included.
    max: f64,
}

impl Weights {
    fn new(
        arithmetic: Arithmetic,
        problem: &Problem,
        inputs: &ReferenceInputs<'_>,
        row: &Row,
        scores: &[Score],
        sink: f64,
        softmax: &Softmax,
    ) -> Self {
        let max = scores.iter().map(|score| score.value).fold(sink, f64::max);
        let relative = |score: f64, error: f64| {
            let exponent = error + arithmetic.weight_error((max - score) * LOG2_E, scores.len());
            (SECOND_ORDER * exponent).exp_m1()
        };
        let keys: Vec<f64> = scores
            .iter()
            .map(|score| relative(score.value, score_bound(arithmetic, problem, inputs, row, score)))
            .collect();
        let sink = if softmax.sink > 0.0 { relative(sink, 2.0 * UNIT * sink.abs()) } else { 0.0 };
        let mean = softmax.sink * sink + keys.iter().zip(&softmax.probabilities).map(|(t, p)| t * p).sum::<f64>();
        let largest = keys.iter().copied().fold(sink, f64::max);
        let merges = 2 * arithmetic.merges;
        let summation = gamma(scores.len() + rescalings(scores.len()) + 10 + merges + dropout_roundings(problem));
        Self { arithmetic, keys, sink, mean, largest, summation, max }
    }

    /// Bound of the float32 value of one output element.
    fn out_bound(&self, softmax: &Softmax, values: impl Iterator<Item = f64> + Clone, exact: f64) -> f64 {
        let sink_distance = if softmax.sink > 0.0 { exact.abs() } else { 0.0 };
        let (mut moved, mut farthest) = (softmax.sink * self.sink * sink_distance, sink_distance);
        let (mut magnitude, mut largest, mut flushed, mut lost) = (0.0, 0.0f64, 0.0, 0.0);
        for ((value, probability), error) in values.zip(&softmax.probabilities).zip(&self.keys) {
            let distance = (value - exact).abs();
            moved += probability * error * distance;
            farthest = farthest.max(distance);
            magnitude += probability * value.abs();
            largest = largest.max(value.abs());
            flushed += FLUSH * (value.abs() + exact.abs());
            lost += self.arithmetic.lost_weight() * value.abs();
        }
        let rest = 1.0 - self.mean;
        let (moved, magnitude) = if rest > 0.0 {
            ((moved / rest).min(farthest), (magnitude * (1.0 + self.largest) / rest).min(largest))
        } else {
            (farthest, largest)
        };
        let rounded = (self.arithmetic.rounded_weight() + self.arithmetic.product_error()) * magnitude + lost;
        SECOND_ORDER * (moved + rounded + self.summation * (magnitude + exact.abs() + moved) + flushed)
    }

    fn lse_bound(&self, lse: f64) -> f64 {
        let worst = self.largest.ln_1p();
        let moved = if self.mean < 1.0 { worst.min(-(-self.mean).ln_1p()) } else { worst };
        let flushed = FLUSH * self.keys.len() as f64;
        let magnitudes = self.max.abs() + (lse - self.max).abs() + lse.abs();
        SECOND_ORDER * (moved + self.summation + flushed + ELEMENTARY + 3.0 * UNIT * magnitudes)
    }
}

/// Absolute error of a score.
fn score_bound(
    arithmetic: Arithmetic,
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    row: &Row,
    score: &Score,
) -> f64 {
    let (q, k) = (&inputs.q[row.query_range(problem)], &inputs.k[row.key_range(problem, score.key)]);
    let magnitude: f64 = q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum();
    let relative = gamma(problem.head_dim + 4) + arithmetic.product_error();
    let mut error = relative * f64::from(problem.scale).abs() * magnitude;
    if problem.softcap > 0.0 {
        error += ELEMENTARY * f64::from(problem.softcap) + 4.0 * UNIT * score.capped.abs();
    }
    if problem.alibi.is_some() {
        error += UNIT * (4.0 * score.alibi.abs() + (score.capped + score.alibi).abs());
    }
    if problem.bias.is_some() {
        error += UNIT * (2.0 * score.bias.abs() + score.value.abs());
    }
    error
}

/// Adds the error of rounding a value within `bound` of `exact` to `dtype`.
fn round_to(dtype: Dtype, exact: f64, bound: f64) -> f64 {
    if dtype == Dtype::F32 {
        return bound;
    }
    bound + (dtype.unit_roundoff() * (exact.abs() + bound)).max(smallest_error(dtype))
}

/// Half the distance of the numbers below the normal range.
fn smallest_error(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2f64.powi(-150),
        Dtype::F16 => 2f64.powi(-25),
        Dtype::Bf16 => 2f64.powi(-134),
    }
}

fn gamma(roundings: usize) -> f64 {
    let error = roundings as f64 * UNIT;
    error / (1.0 - error)
}
