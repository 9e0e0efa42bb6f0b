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
//! Products of errors are covered by a factor of 1.01.
//!
//! # How tight
//! Losing one of `n` keys moves an output by about `1 / n`. In float32 that is more than ten times the bound up to about
//! a thousand visible keys of unit-variance inputs. In 16-bit types the final rounding of an output of size `1 / sqrt(n)`
//! dominates, `2^-8 / sqrt(n)` in bfloat16, which leaves a factor of `256 / sqrt(n)`. Longer sequences should be tested
//! with windows or skewed scores, so that some rows depend on few keys.

use super::{Forward, ReferenceInputs, Row, Score, Softmax, forward, rows};
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

/// Bounds the error of every element of the output and of the LSE for these very inputs; see the
/// [module](self) for what is assumed and why it holds.
///
/// # Panics
/// When an input does not have the size that `problem` gives it.
#[must_use]
pub fn error_bounds(problem: &Problem, inputs: &ReferenceInputs<'_>) -> Bounds {
    let Forward { out: exact, lse } = forward(problem, inputs);
    let mut bounds = Bounds { out: vec![0.0; exact.len()], lse: vec![0.0; lse.len()] };
    for row in rows(problem, inputs) {
        let scores = row.scores(problem, inputs);
        let sink = row.sink(inputs);
        let Some(softmax) = Softmax::new(&scores, sink) else { continue };
        let weights = Weights::new(problem, inputs, &row, &scores, sink, &softmax);
        bounds.lse[row.lse_index(problem)] = weights.lse_bound(softmax.lse);
        let out = row.out_range(problem);
        for (column, (bound, exact)) in bounds.out[out.clone()].iter_mut().zip(&exact[out]).enumerate() {
            let value = |score: &Score| inputs.v[row.value_range(problem, score.key)][column];
            let values = scores.iter().map(value);
            *bound = round_to(problem.dtype, *exact, weights.out_bound(&softmax, values, *exact));
        }
    }
    bounds
}

/// The weights of a row and how far off they may be.
struct Weights {
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
        problem: &Problem,
        inputs: &ReferenceInputs<'_>,
        row: &Row,
        scores: &[Score],
        sink: f64,
        softmax: &Softmax,
    ) -> Self {
        let max = scores.iter().map(|score| score.value).fold(sink, f64::max);
        let rescalings = scores.len().div_ceil(RESCALE_KEYS) + 2;
        let relative = |score: f64, error: f64| {
            let exponent = error + UNIT * (max - score) + ELEMENTARY * (1 + rescalings) as f64;
            (SECOND_ORDER * exponent).exp_m1()
        };
        let keys: Vec<f64> =
            scores.iter().map(|score| relative(score.value, score_bound(problem, inputs, row, score))).collect();
        let sink = if softmax.sink > 0.0 { relative(sink, 2.0 * UNIT * sink.abs()) } else { 0.0 };
        let mean = softmax.sink * sink + keys.iter().zip(&softmax.probabilities).map(|(t, p)| t * p).sum::<f64>();
        let largest = keys.iter().copied().fold(sink, f64::max);
        Self { keys, sink, mean, largest, summation: gamma(scores.len() + rescalings + 10), max }
    }

    /// Bound of the float32 value of one output element.
    fn out_bound(&self, softmax: &Softmax, values: impl Iterator<Item = f64> + Clone, exact: f64) -> f64 {
        let sink_distance = if softmax.sink > 0.0 { exact.abs() } else { 0.0 };
        let (mut moved, mut farthest) = (softmax.sink * self.sink * sink_distance, sink_distance);
        let (mut magnitude, mut largest, mut flushed) = (0.0, 0.0f64, 0.0);
        for ((value, probability), error) in values.zip(&softmax.probabilities).zip(&self.keys) {
            let distance = (value - exact).abs();
            moved += probability * error * distance;
            farthest = farthest.max(distance);
            magnitude += probability * value.abs();
            largest = largest.max(value.abs());
            flushed += FLUSH * (value.abs() + exact.abs());
        }
        let rest = 1.0 - self.mean;
        let (moved, magnitude) = if rest > 0.0 {
            ((moved / rest).min(farthest), (magnitude * (1.0 + self.largest) / rest).min(largest))
        } else {
            (farthest, largest)
        };
        SECOND_ORDER * (moved + self.summation * (magnitude + exact.abs() + moved) + flushed)
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
fn score_bound(problem: &Problem, inputs: &ReferenceInputs<'_>, row: &Row, score: &Score) -> f64 {
    let (q, k) = (&inputs.q[row.query_range(problem)], &inputs.k[row.key_range(problem, score.key)]);
    let magnitude: f64 = q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum();
    let mut error = gamma(problem.head_dim + 4) * f64::from(problem.scale).abs() * magnitude;
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
    // Half the distance of the numbers below the normal range.
    let smallest = match dtype {
        Dtype::F32 => return bound,
        Dtype::F16 => 2f64.powi(-25),
        Dtype::Bf16 => 2f64.powi(-134),
    };
    bound + (dtype.unit_roundoff() * (exact.abs() + bound)).max(smallest)
}

fn gamma(roundings: usize) -> f64 {
    let error = roundings as f64 * UNIT;
    error / (1.0 - error)
}
