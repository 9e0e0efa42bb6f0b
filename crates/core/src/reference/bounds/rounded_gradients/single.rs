//! Gradients of a single key or query of a problem too large to differentiate in float64 as a whole.

use super::{Arithmetic, RowErrors, Sum, Upstream};
use crate::Problem;
use crate::reference::{Forward, ReferenceInputs, Row, row_at, rows};

/// Gradients of one row of k and of v, and how far right ones may lie from them.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyGradients {
    /// Of the row of k.
    pub key: Vec<f64>,
    /// Its bounds.
    pub key_bounds: Vec<f64>,
    /// Of the row of v.
    pub value: Vec<f64>,
    /// Its bounds.
    pub value_bounds: Vec<f64>,
}

/// The part of [`backward`](crate::reference::backward) and of [`gradient_bounds_of`](super::gradient_bounds_of) that is
/// about key `key` of sequence `batch` in head `key_head`. `exact` holds the exact results of the forward pass.
///
/// # Panics
/// When an input does not have the size that `problem` gives it, and when there is no such key.
#[must_use]
pub fn key_gradients_of(
    arithmetic: Arithmetic,
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    upstream: &Upstream<'_>,
    exact: &Forward,
    (batch, key_head, key): (usize, usize, usize),
) -> KeyGradients {
    let scale = f64::from(problem.scale);
    let mut of_key = Gradient::new(problem.head_dim);
    let mut of_value = Gradient::new(problem.value_dim);
    let shares = |row: &Row| row.batch == batch && row.head / problem.group() == key_head;
    for row in rows(problem, inputs).into_iter().filter(shares) {
        if !problem.mask.visible_keys(row.query, row.query_len, row.key_len).contains(&key) {
            continue;
        }
        let score = row.score(problem, inputs, key);
        let lse = exact.lse[row.lse_index(problem)];
        let probability = (score.value - lse).exp();
        let d_out = &upstream.d_out[row.out_range(problem)];
        let errors = RowErrors::new(problem, &row, exact, lse, upstream);
        let (weight, d_score) = errors.of(arithmetic, problem, inputs, &row, &score, probability, d_out);
        of_value.add(weight.value, weight.error, d_out);
        of_key.add(scale * d_score.value, scale.abs() * d_score.error, &inputs.q[row.query_range(problem)]);
    }
    let (key, key_bounds) = of_key.finish(arithmetic, problem);
    let (value, value_bounds) = of_value.finish(arithmetic, problem);
    KeyGradients { key, key_bounds, value, value_bounds }
}

/// Gradient of one row of q, and how far a right one may lie from it.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryGradient {
    /// Of the row of q.
    pub query: Vec<f64>,
    /// Its bounds.
    pub bounds: Vec<f64>,
}

/// The part of [`backward`](crate::reference::backward) and of [`gradient_bounds_of`](super::gradient_bounds_of) that is
/// about query `query` of sequence `batch` in head `head`. `exact` holds the exact results of the forward pass.
///
/// # Panics
/// When an input does not have the size that `problem` gives it, and when there is no such query.
#[must_use]
pub fn query_gradient_of(
    arithmetic: Arithmetic,
    problem: &Problem,
    inputs: &ReferenceInputs<'_>,
    upstream: &Upstream<'_>,
    exact: &Forward,
    (batch, head, query): (usize, usize, usize),
) -> QueryGradient {
    let scale = f64::from(problem.scale);
    let row = row_at(problem, inputs, (batch, head, query));
    let d_out = &upstream.d_out[row.out_range(problem)];
    let lse = exact.lse[row.lse_index(problem)];
    let errors = RowErrors::new(problem, &row, exact, lse, upstream);
    let mut gradient = Gradient::new(problem.head_dim);
    for score in row.scores(problem, inputs) {
        let probability = (score.value - lse).exp();
        let (_, d_score) = errors.of(arithmetic, problem, inputs, &row, &score, probability, d_out);
        let key = &inputs.k[row.key_range(problem, score.key)];
        gradient.add(scale * d_score.value, scale.abs() * d_score.error, key);
    }
    let (query, bounds) = gradient.finish(arithmetic, problem);
    QueryGradient { query, bounds }
}

/// A row of a gradient with its errors.
struct Gradient {
    exact: Vec<f64>,
    sums: Vec<Sum>,
}

impl Gradient {
    fn new(columns: usize) -> Self {
        Self { exact: vec![0.0; columns], sums: vec![Sum::default(); columns] }
    }

    fn add(&mut self, weight: f64, error: f64, row: &[f64]) {
        for ((exact, sum), &factor) in self.exact.iter_mut().zip(&mut self.sums).zip(row) {
            *exact += weight * factor;
            sum.add(weight, error, factor);
        }
    }

    fn finish(self, arithmetic: Arithmetic, problem: &Problem) -> (Vec<f64>, Vec<f64>) {
        let sums = self.sums.iter().zip(&self.exact);
        let bounds = sums.map(|(sum, &exact)| sum.bound(arithmetic, problem.dtype, exact)).collect();
        (self.exact, bounds)
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradient_bounds_of;
    use super::*;
    use crate::reference::bounds::{Bounds, error_bounds_of, row_with_bounds};
    use crate::reference::{backward, forward};
    use crate::{Dropout, Dtype, Options, TensorMeta};

    /// Numbers from -1 to 1 in no apparent order.
    fn some(count: usize, seed: u32) -> Vec<f64> {
        (0..count).map(|i| (f64::from(seed) + 1.7 * i as f64).sin()).collect()
    }

    #[test]
    fn one_key_or_query_is_part_of_all() {
        let (heads, key_heads, dim, value_dim) = (4, 2, 5, 3);
        let (queries, keys) = ([0, 3, 10], [0, 6, 11]);
        let shape = |rows: i32, heads: i64, dim: i64| [i64::from(rows), heads, dim];
        let shapes = [shape(10, 4, 5), shape(11, 2, 5), shape(11, 2, 3)];
        let strides = shapes.map(|[_, heads, dim]| [heads * dim, dim, 1]);
        let meta = |at: usize| TensorMeta { dtype: Dtype::F16, shape: &shapes[at], strides: &strides[at] };
        let options = Options { window: (4, 1), softcap: 2.0, ..Options::default() };
        let mut problem = Problem::packed(meta(0), meta(1), meta(2), 2, (7, 6), &options).expect("a valid problem");
        problem.dropout = Dropout::new(0.3, 7, 11).expect("a probability");
        let (q, k, v) = (some(10 * heads * dim, 1), some(11 * key_heads * dim, 2), some(11 * key_heads * value_dim, 3));
        let inputs = ReferenceInputs {
            q: &q,
            k: &k,
            v: &v,
            query_offsets: &queries,
            key_offsets: &keys,
            ..ReferenceInputs::default()
        };
        let (d_out, d_lse) = (some(10 * heads * value_dim, 4), some(10 * heads, 5));
        let exact = forward(&problem, &inputs);
        let rounded = Bounds::of_rounding(&problem, &exact);
        let upstream = Upstream { d_out: &d_out, d_lse: Some(&d_lse), forward: &rounded };
        let arithmetic = Arithmetic::metal(Dtype::F16);
        let all = backward(&problem, &inputs, &d_out, Some(&d_lse));
        let bounds = gradient_bounds_of(arithmetic, &problem, &inputs, &upstream);
        let near = |one: &[f64], other: &[f64]| {
            assert!(one.iter().zip(other).all(|(one, other)| (one - other).abs() <= 1e-12), "{one:?} {other:?}");
        };
        for (batch, key_head, key) in [(0, 0, 0), (0, 1, 5), (1, 0, 4), (1, 1, 2)] {
            let one = key_gradients_of(arithmetic, &problem, &inputs, &upstream, &exact, (batch, key_head, key));
            let row = (keys[batch] as usize + key) * key_heads + key_head;
            let (of_key, of_value) = (row * dim..(row + 1) * dim, row * value_dim..(row + 1) * value_dim);
            near(&one.key, &all.k[of_key.clone()]);
            near(&one.key_bounds, &bounds.k[of_key]);
            near(&one.value, &all.v[of_value.clone()]);
            near(&one.value_bounds, &bounds.v[of_value]);
        }
        let all_bounds = error_bounds_of(arithmetic, &problem, &inputs);
        for (batch, head, query) in [(0, 0, 0), (0, 3, 2), (1, 1, 6), (1, 2, 3)] {
            let row = queries[batch] as usize + query;
            let of_query = (row * heads + head) * dim..(row * heads + head + 1) * dim;
            let of_out = (row * heads + head) * value_dim..(row * heads + head + 1) * value_dim;
            let of_lse = head * 10 + row..head * 10 + row + 1;
            let place = (batch, head, query);
            let one = query_gradient_of(arithmetic, &problem, &inputs, &upstream, &exact, place);
            near(&one.query, &all.q[of_query.clone()]);
            near(&one.bounds, &bounds.q[of_query]);
            let (row, row_bounds) = row_with_bounds(&[arithmetic], &problem, &inputs, place);
            near(&row.out, &exact.out[of_out.clone()]);
            near(&row.lse, &exact.lse[of_lse.clone()]);
            near(&row_bounds[0].out, &all_bounds.out[of_out]);
            near(&row_bounds[0].lse, &all_bounds.lse[of_lse]);
        }
    }
}
