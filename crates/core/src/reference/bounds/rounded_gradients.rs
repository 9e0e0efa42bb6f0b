//! How far right gradients may lie from the reference where weights are rounded to the type of the problem.
//!
//! # Assumptions about a tier
//! Those of the [parent module](super), for a tier that reads q, k, v, the output and its LSE, which are off by what the
//! caller says, and recomputes weights as `p = exp(s - lse)`: one `exp2` each, without a maximum and without rescaling.
//! `delta = out . d_out - d_lse`. Weights, and the gradients of scores, are rounded to the type that
//! [`Arithmetic::metal`] says for the products that sum them, and each gradient once more, to the type of the problem.
//!
//! # Derivation
//! With the names of [`backward`](crate::reference::backward), `n` terms in a sum, and `|x|` the sum of absolute values:
//!
//! 1. *Weight.* Its exponent is off by the error `e` of the score (step 1 of the parent module), by that of the LSE, by
//!    `2 u |lse|` for turning that into units of log2, and by `u |s - lse|` for the difference; `exp2` adds its own error.
//!    So `p` is off by `p t` with `t = exp(all of these) - 1`, and by 2^-126 where a small weight becomes 0.
//! 2. *Derivative of the softcap.* `1 - tanh^2` moves by at most 0.77 times the error of the argument, and by `2^-20` for
//!    `tanh`, squared; three roundings add `4 u`.
//! 3. *Differences.* `d_out . v` is off by `gamma(value_dim + 2) |d_out| |v|`; `delta` by `gamma(value_dim + 4) |d_out| |out|`,
//!    by `|d_out|` times the errors of `out`, and by roundings of `d_lse` and itself. Nothing is said about the size of the
//!    difference of the two, which may cancel: the errors are absolute.
//! 4. *Gradient of a score.* A product of the three: each one's error times the others' magnitudes and errors, and three
//!    roundings. Rounding to the operand type adds its unit roundoff, and in float16 half the smallest number.
//! 5. *Sums.* `dv = sum p d_out`, `dq = scale sum ds k`, `dk = scale sum ds q`: the errors of the weights times the
//!    magnitudes of the others, and `gamma(n + 4)` times the sum of the magnitudes of the terms.
//! 6. *Rounding* to the output type, as in the parent module.
//! 7. *Dropout* multiplies `d_out . v` in float32, and a rounded weight or what was summed of it, with three roundings.

mod single;

pub use single::{KeyGradients, QueryGradient, key_gradients_of, query_gradient_of};

use super::{
    Arithmetic, Bounds, ELEMENTARY, FLUSH, SECOND_ORDER, UNIT, dropout_roundings, gamma, round_to, score_bound,
    smallest_error, worst,
};
use crate::reference::{Forward, Gradients, ReferenceInputs, Row, Score, Softmax, backward, dot, forward, rows};
use crate::{Dtype, Problem};

/// Largest value of `|d/dx (1 - tanh(x)^2)|`, which is `4 / (3 sqrt(3))`.
const STEEPEST: f64 = 0.77;

impl Bounds {
    /// What is known of an output and an LSE that were rounded once from the exact ones.
    #[must_use]
    pub fn of_rounding(problem: &Problem, exact: &Forward) -> Self {
        let lse = exact.lse.iter().map(|lse| if lse.is_finite() { UNIT * lse.abs() } else { 0.0 });
        Self { out: exact.out.iter().map(|&out| round_to(problem.dtype, out, 0.0)).collect(), lse: lse.collect() }
    }
}

/// What the gradients come from, beside the inputs.
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'a> {
    /// Gradient of the output, in the layout of [`Forward::out`].
    pub d_out: &'a [f64],
    /// Gradient of the LSE, in the layout of [`Forward::lse`].
    pub d_lse: Option<&'a [f64]>,
    /// How far the output and the LSE that the tier reads may be off.
    pub forward: &'a Bounds,
}

/// Largest allowed distances from [`Gradients`] of q, k and v, in its layouts.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientBounds {
    /// Of each element of the gradient of q.
    pub q: Vec<f64>,
    /// Of each element of the gradient of k.
    pub k: Vec<f64>,
    /// Of each element of the gradient of v.
    pub v: Vec<f64>,
}

impl GradientBounds {
    /// Largest errors of the gradients of q, k and v in units of their bounds: right ones have none above 1.
    ///
    /// # Panics
    /// When `got` does not have the sizes of the bounds.
    #[must_use]
    pub fn worst(&self, exact: &Gradients, got: &Gradients) -> [f64; 3] {
        [worst(&self.q, &exact.q, &got.q), worst(&self.k, &exact.k, &got.k), worst(&self.v, &exact.v, &got.v)]
    }
}

/// An element of a gradient: the errors of its terms, their magnitudes, and how many there are.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    error: f64,
    magnitude: f64,
    terms: usize,
}

impl Sum {
    fn add(&mut self, weight: f64, error: f64, factor: f64) {
        self.error += error * factor.abs();
        self.magnitude += (weight.abs() + error) * factor.abs();
        self.terms += 1;
    }

    fn bound(&self, arithmetic: Arithmetic, dtype: Dtype, exact: f64) -> f64 {
        let summed = (gamma(self.terms + 4) + arithmetic.product_error()) * self.magnitude;
        round_to(dtype, exact, SECOND_ORDER * (self.error + summed))
    }
}

/// Bounds the error of every element of the gradients of q, k and v for these very inputs.
///
/// # Panics
/// When an input does not have the size that `problem` gives it.
#[must_use]
pub fn gradient_bounds_of(
    arithmetic: Arithmetic,
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    upstream: &Upstream<'_>,
) -> GradientBounds {
    let exact = forward(problem, inputs);
    let gradients = backward(problem, inputs, upstream.d_out, upstream.d_lse);
    let [mut q, mut k, mut v] =
        [&gradients.q, &gradients.k, &gradients.v].map(|gradient| vec![Sum::default(); gradient.len()]);
    let scale = f64::from(problem.scale).abs();
    for row in rows(problem, inputs) {
        let scores = row.scores(problem, inputs);
        let Some(softmax) = Softmax::new(&scores, row.sink(inputs)) else { continue };
        let errors = RowErrors::new(problem, &row, &exact, softmax.lse, upstream);
        let d_out = &upstream.d_out[row.out_range(problem)];
        for (score, &probability) in scores.iter().zip(&softmax.probabilities) {
            let (weight, d_score) = errors.of(arithmetic, problem, inputs, &row, score, probability, d_out);
            let (query, key) = (row.query_range(problem), row.key_range(problem, score.key));
            for (sum, &factor) in v[row.value_range(problem, score.key)].iter_mut().zip(d_out) {
                sum.add(weight.value, weight.error, factor);
            }
            for (sum, &factor) in q[query.clone()].iter_mut().zip(&inputs.k[key.clone()]) {
                sum.add(scale * d_score.value, scale * d_score.error, factor);
            }
            for (sum, &factor) in k[key].iter_mut().zip(&inputs.q[query]) {
                sum.add(scale * d_score.value, scale * d_score.error, factor);
            }
        }
    }
    let bounds = |sums: &[Sum], exact: &[f64]| {
        sums.iter().zip(exact).map(|(sum, &exact)| sum.bound(arithmetic, problem.dtype, exact)).collect()
    };
    GradientBounds { q: bounds(&q, &gradients.q), k: bounds(&k, &gradients.k), v: bounds(&v, &gradients.v) }
}

/// A number and how far off it may be.
#[derive(Clone, Copy, Debug)]
struct Approximate {
    value: f64,
    error: f64,
}

impl Approximate {
    /// This, rounded to the type of weights.
    fn rounded(self, arithmetic: Arithmetic) -> Self {
        let rounding = arithmetic.rounded_weight() * (self.value.abs() + self.error) + arithmetic.lost_weight();
        Self { error: self.error + rounding, ..self }
    }
}

/// What is the same for all keys of a query.
struct RowErrors {
    lse: Approximate,
    delta: Approximate,
}

impl RowErrors {
    fn new(problem: &Problem, row: &Row, exact: &Forward, lse: f64, upstream: &Upstream<'_>) -> Self {
        let range = row.out_range(problem);
        let d_out = &upstream.d_out[range.clone()];
        let (out, out_errors) = (&exact.out[range.clone()], &upstream.forward.out[range]);
        let d_lse = upstream.d_lse.map_or(0.0, |d_lse| d_lse[row.lse_index(problem)]);
        let given: f64 = d_out.iter().zip(out_errors).map(|(d_out, error)| d_out.abs() * error).sum();
        let magnitude: f64 = d_out.iter().zip(out).map(|(d_out, out)| (d_out * out).abs()).sum();
        let delta = dot(d_out, out) - d_lse;
        let rounded = gamma(problem.value_dim + 4) * (magnitude + given) + 2.0 * UNIT * (d_lse.abs() + delta.abs());
        Self {
            lse: Approximate { value: lse, error: upstream.forward.lse[row.lse_index(problem)] },
            delta: Approximate { value: delta, error: SECOND_ORDER * (given + rounded) },
        }
    }

    /// The weight of a key and the gradient of its product, as the sums read them.
    #[allow(clippy::too_many_arguments, reason = "a score with all that it comes from")]
    fn of(
        &self,
        arithmetic: Arithmetic,
        problem: &Problem,
        inputs: &ReferenceInputs<'_>,
        row: &Row,
        score: &Score,
        probability: f64,
        d_out: &[f64],
    ) -> (Approximate, Approximate) {
        let distance = score.value - self.lse.value;
        let exponent = score_bound(arithmetic, problem, inputs, row, score)
            + self.lse.error
            + UNIT * (2.0 * self.lse.value.abs() + distance.abs());
        let relative = (SECOND_ORDER * (exponent + arithmetic.single_weight_error(distance))).exp_m1();
        let weight = Approximate { value: probability, error: probability * relative + FLUSH };
        let slope = slope(arithmetic, problem, inputs, row, score);
        let factor = product(weight, slope);
        let value = &inputs.v[row.value_range(problem, score.key)];
        let magnitude = score.kept * d_out.iter().zip(value).map(|(d_out, value)| (d_out * value).abs()).sum::<f64>();
        let d_weight = score.kept * dot(d_out, value);
        let dropout = dropout_roundings(problem);
        let dot_error = (gamma(problem.value_dim + 2 + dropout) + arithmetic.product_error()) * magnitude;
        let difference = d_weight - self.delta.value;
        let error = dot_error + self.delta.error + 2.0 * UNIT * difference.abs();
        let d_score = product(factor, Approximate { value: difference, error });
        let rounded = weight.rounded(arithmetic);
        let error = score.kept * (rounded.error + gamma(dropout) * (rounded.value.abs() + rounded.error));
        (Approximate { value: score.kept * rounded.value, error }, d_score.rounded(arithmetic))
    }
}

/// A product of two numbers, rounded.
fn product(a: Approximate, b: Approximate) -> Approximate {
    let value = a.value * b.value;
    let error = a.error * (b.value.abs() + b.error) + a.value.abs() * b.error;
    Approximate { value, error: error + 2.0 * UNIT * (value.abs() + error) + smallest_error(Dtype::F32) }
}

/// The derivative of the softcap.
fn slope(
    arithmetic: Arithmetic,
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    row: &Row,
    score: &Score,
) -> Approximate {
    if problem.softcap == 0.0 {
        return Approximate { value: 1.0, error: 0.0 };
    }
    let (q, k) = (&inputs.q[row.query_range(problem)], &inputs.k[row.key_range(problem, score.key)]);
    let magnitude: f64 = q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum();
    let relative = gamma(problem.head_dim + 4) + arithmetic.product_error();
    let argument = relative * f64::from(problem.scale).abs() * magnitude / f64::from(problem.softcap);
    Approximate { value: score.slope, error: STEEPEST * argument + 2.0 * ELEMENTARY + 4.0 * UNIT }
}
