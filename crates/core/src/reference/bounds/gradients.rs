//! How far a right gradient in float32 arithmetic may lie from the reference.
//!
//! # Assumptions about a tier
//! Those of the [parent](super). It has the output and the LSE of a forward pass within their bounds, the output rounded
//! to its type, and computes everything else anew: `p = exp(s - lse)`, `delta = dO . O - dLSE`,
//! `dS = p (dO . v - delta)`, the softcap's slope `1 - tanh^2`, and sums in any order, split in any way.
//!
//! # Derivation
//! With `u`, `gamma` and the error `e` of a score as there, and `E` the bound of the LSE:
//!
//! 1. *Weight.* `s - lse` is off by `e + E`, by `4 u (|s| + |lse| + 1)` for conversions to and from units of log2 and the
//!    difference, and `exp2` by 2^-21 relative: together the relative error `t`.
//! 2. *Delta.* Each element of the output is off by its bound `b`: `sum |dO| b`, and `gamma` of the sum's length times
//!    `sum |dO| (|O| + b) + |dLSE|` for the dot product and the difference.
//! 3. *Score gradient.* `dO . v` is off by `gamma(value_dim + 2) sum |dO| |v|`. Call that, the error of delta and
//!    `2 u |dO . v - delta|` together `d`: `dS` is off by `p (t |dO . v - delta| + (1 + t) d) + 4 u |dS|`, and by the
//!    whole of `dO . v - delta` times the smallest normal number where the weight may be flushed to 0.
//! 4. *Softcap.* The slope is off by twice the error of the `tanh`, which is that of its argument and 2^-21.
//! 5. *Sums.* `dQ`, `dK`, `dV` and the gradient of a sink are sums of `n` such products: the sum of their errors, and
//!    `gamma(n + 16)` times the sum of their magnitudes. Rounding to the type comes last.
//! 6. *Dropout* multiplies the weight in `dV`, and `dO . v`, by the same number, with three roundings.

use super::super::{Gradients, Row, Score, Softmax, add_scaled, backward, dot, rows};
use super::{
    Arithmetic, ELEMENTARY, FLUSH, SECOND_ORDER, UNIT, Weights, dropout_roundings, error_bounds_of, gamma, round_to,
    score_bound,
};
use crate::reference::{ReferenceInputs, forward};
use crate::{Dtype, Problem};

/// Bounds the error of every element of the gradients for these very inputs, from a forward pass and a backward pass in
/// float32 arithmetic; in the layouts of [`Gradients`]. That of a bias is for float32, before any broadcast is summed.
///
/// # Panics
/// When an input, `d_out` or `d_lse` does not have the size that `problem` gives it.
#[must_use]
pub fn gradient_bounds(
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    d_out: &[f64],
    d_lse: Option<&[f64]>,
) -> Gradients {
    let exact = backward(problem, inputs, d_out, d_lse);
    let forward = forward(problem, inputs);
    let out_bounds = error_bounds_of(Arithmetic::FLOAT32, problem, inputs).out;
    let zeros = |values: &[f64]| vec![0.0; values.len()];
    let mut bounds = Gradients {
        q: zeros(inputs.q),
        k: zeros(inputs.k),
        v: zeros(inputs.v),
        bias: inputs.bias.map(zeros),
        sinks: inputs.sinks.map(zeros),
    };
    for row in rows(problem, inputs) {
        let scores = row.scores(problem, inputs);
        let sink = row.sink(inputs);
        let Some(softmax) = Softmax::new(&scores, sink) else { continue };
        let weights = Weights::new(Arithmetic::FLOAT32, problem, inputs, &row, &scores, sink, &softmax);
        let out = row.out_range(problem);
        let d_lse = d_lse.map_or(0.0, |d_lse| d_lse[row.lse_index(problem)]);
        let errors = RowErrors {
            lse: softmax.lse,
            lse_bound: weights.lse_bound(softmax.lse),
            d_out: &d_out[out.clone()],
            delta: dot(&d_out[out.clone()], &forward.out[out.clone()]) - d_lse,
            delta_bound: delta_bound(&d_out[out.clone()], &forward.out[out.clone()], &out_bounds[out], d_lse),
        };
        let sequence_rows = row.query_len;
        let summed = gamma(sequence_rows * problem.group() + 16);
        for (score, probability) in scores.iter().zip(&softmax.probabilities) {
            errors.add_key(problem, inputs, &row, score, *probability, (gamma(scores.len() + 16), summed), &mut bounds);
        }
        if let (Some(bounds), true) = (&mut bounds.sinks, softmax.sink > 0.0) {
            let t = errors.weight_error(sink, 2.0 * UNIT * sink.abs());
            let all_rows = gamma(problem.lengths.query_rows() + 16);
            let delta = errors.delta.abs();
            bounds[row.head] +=
                softmax.sink * ((t + all_rows) * delta + (1.0 + t) * errors.delta_bound) + FLUSH * delta;
        }
    }
    let round = |bounds: &mut [f64], exact: &[f64], dtype: Dtype| {
        for (bound, exact) in bounds.iter_mut().zip(exact) {
            *bound = round_to(dtype, *exact, SECOND_ORDER * *bound);
        }
    };
    round(&mut bounds.q, &exact.q, problem.dtype);
    round(&mut bounds.k, &exact.k, problem.dtype);
    round(&mut bounds.v, &exact.v, problem.dtype);
    bounds
}

fn delta_bound(d_out: &[f64], out: &[f64], out_bounds: &[f64], d_lse: f64) -> f64 {
    let moved = d_out.iter().zip(out_bounds).map(|(d, bound)| d.abs() * bound).sum::<f64>();
    let size = d_out.iter().zip(out).map(|(d, out)| (d * out).abs()).sum::<f64>() + moved + d_lse.abs();
    moved + gamma(out.len() + 3) * size
}

/// What the errors of one row's keys share.
struct RowErrors<'a> {
    lse: f64,
    lse_bound: f64,
    d_out: &'a [f64],
    delta: f64,
    delta_bound: f64,
}

impl RowErrors<'_> {
    /// Relative error of the weight of a score that is off by `error`.
    fn weight_error(&self, score: f64, error: f64) -> f64 {
        let sizes = score.abs() + self.lse.abs() + 1.0;
        (SECOND_ORDER * (error + self.lse_bound + 4.0 * UNIT * sizes + ELEMENTARY)).exp_m1()
    }

    /// Adds what a key contributes; `sums` are the errors of a sum over keys and over rows.
    #[allow(clippy::too_many_arguments, reason = "a key of a row of a problem, and where its errors go")]
    fn add_key(
        &self,
        problem: &Problem,
        inputs: &ReferenceInputs<'_>,
        row: &Row,
        score: &Score,
        probability: f64,
        sums: (f64, f64),
        bounds: &mut Gradients,
    ) {
        let absolute = |values: &[f64]| values.iter().map(|x| x.abs()).collect::<Vec<f64>>();
        let t = self.weight_error(score.value, score_bound(Arithmetic::FLOAT32, problem, inputs, row, score));
        let v = &inputs.v[row.value_range(problem, score.key)];
        let (d_out, d_out_size) = (self.d_out, absolute(self.d_out));
        let dropout = dropout_roundings(problem);
        let value_error = score.kept * (probability * (t + (sums.1 + gamma(dropout)) * (1.0 + t)) + FLUSH);
        add_scaled(&mut bounds.v[row.value_range(problem, score.key)], value_error, &d_out_size);

        let difference = score.kept * dot(d_out, v) - self.delta;
        let size = score.kept * d_out.iter().zip(v).map(|(d, v)| (d * v).abs()).sum::<f64>();
        let off = gamma(problem.value_dim + 2 + dropout) * size + self.delta_bound + 2.0 * UNIT * difference.abs();
        let d_score = probability * difference;
        let error = probability * (t * difference.abs() + (1.0 + t) * off) + 4.0 * UNIT * d_score.abs();
        let error = error + FLUSH * (difference.abs() + off);
        if let Some(bias) = &mut bounds.bias {
            bias[row.bias_index(problem, score.key)] += error;
        }

        let (query, key) = (row.query_range(problem), row.key_range(problem, score.key));
        let (q, k) = (absolute(&inputs.q[query.clone()]), absolute(&inputs.k[key.clone()]));
        let scale = f64::from(problem.scale).abs();
        let slope_error = if problem.softcap > 0.0 {
            let product_error = gamma(problem.head_dim + 4) * scale * dot(&q, &k);
            2.0 * (ELEMENTARY + product_error / f64::from(problem.softcap)) + 8.0 * UNIT
        } else {
            0.0
        };
        let error = error * (score.slope + slope_error) + d_score.abs() * (slope_error + 2.0 * UNIT);
        let magnitude = d_score.abs() * score.slope + error;
        add_scaled(&mut bounds.q[query], scale * (error + sums.0 * magnitude), &k);
        add_scaled(&mut bounds.k[key], scale * (error + sums.1 * magnitude), &q);
    }
}
