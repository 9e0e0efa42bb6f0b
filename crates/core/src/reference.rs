//! Attention in float64, forward and backward: plainly right, slow, and the judge of every tier.
//!
//! For query `i` and key `j` of a head, with `d = j - diagonal(i)` from [`Mask::diagonal`](crate::Mask::diagonal):
//!
//! ```text
//! x = scale * (q_i . k_j)
//! s = softcap * tanh(x / softcap) - slope * |d| + bias        (each term only where the problem has it)
//! lse = ln(exp(sink) + sum over visible j of exp(s))
//! out = sum over visible j of z_j * exp(s - lse) * v_j
//! ```
//!
//! Dropout makes `z_j` 0 or its [factor](crate::Dropout::factor), by the rule of [`dropout`](crate::dropout); without it
//! all are 1.
//!
//! A key is visible inside [`Mask::visible_keys`](crate::Mask::visible_keys) unless its bias is negative infinity. A
//! sink of negative infinity is no sink. Where there is neither a visible key nor a sink, and in rows of packed tensors
//! that belong to no sequence, `out` is 0 and `lse` is positive infinity, as in `flash_attn` 2.8.

mod append;
pub mod bounds;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::rc::Rc;

use crate::{CacheBuffers, CacheRow, Lengths, Problem};

pub use append::{AppendInputs, append};

/// The tensors of a problem as contiguous float64 values, whatever strides the problem has.
///
/// `tokens` stands for `batch * query_len` or `batch * key_len` of dense and for the total of packed problems; of keys in
/// a cache for its `blocks * block_len` rows.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceInputs<'a> {
    /// `[tokens, query_heads, head_dim]`.
    pub q: &'a [f64],
    /// `[tokens, key_heads, head_dim]`.
    pub k: &'a [f64],
    /// `[tokens, key_heads, value_dim]`.
    pub v: &'a [f64],
    /// `cu_seqlens_q` of a packed problem.
    pub query_offsets: &'a [i32],
    /// `cu_seqlens_k` of a packed problem without a cache.
    pub key_offsets: &'a [i32],
    /// What the cache of a problem consists of. New keys are in it already.
    pub cache: CacheBuffers<'a>,
    /// `[batch, query_heads]`, for a problem with ALiBi.
    pub alibi_slopes: Option<&'a [f64]>,
    /// `[batch, query_heads, query_len, key_len]`, for a dense problem with a bias; negative infinity hides a key.
    pub bias: Option<&'a [f64]>,
    /// `[query_heads]`, for a problem with sinks.
    pub sinks: Option<&'a [f64]>,
}

/// What the forward pass returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// `[tokens, query_heads, value_dim]`.
    pub out: Vec<f64>,
    /// `[batch, query_heads, query_len]` of a dense, `[query_heads, tokens]` of a packed problem.
    pub lse: Vec<f64>,
}

/// Gradients of a scalar with respect to the inputs, each in the layout of its input.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// With respect to q.
    pub q: Vec<f64>,
    /// With respect to k.
    pub k: Vec<f64>,
    /// With respect to v.
    pub v: Vec<f64>,
    /// With respect to every element of the bias before any broadcast; 0 where a key is hidden.
    pub bias: Option<Vec<f64>>,
    /// With respect to the sinks.
    pub sinks: Option<Vec<f64>>,
}

/// Computes the output and its LSE.
///
/// # Panics
/// When an input does not have the size that `problem` gives it.
#[must_use]
pub fn forward(problem: &Problem, inputs: &ReferenceInputs<'_>) -> Forward {
    forward_part(problem, inputs, 0, 1)
}

/// The same for every `parts`-th row from row `part` on, for threads that share a large problem. Of other rows the output is
/// 0 and the LSE infinite.
///
/// # Panics
/// As [`forward`], and when there are no `parts`.
#[must_use]
pub fn forward_part(problem: &Problem, inputs: &ReferenceInputs<'_>, part: usize, parts: usize) -> Forward {
    let mut result = Forward {
        out: vec![0.0; problem.lengths.query_rows() * problem.query_heads * problem.value_dim],
        lse: vec![f64::INFINITY; problem.lengths.query_rows() * problem.query_heads],
    };
    for row in rows(problem, inputs).into_iter().skip(part).step_by(parts) {
        let scores = row.scores(problem, inputs);
        let Some(softmax) = Softmax::new(&scores, row.sink(inputs)) else { continue };
        result.lse[row.lse_index(problem)] = softmax.lse;
        row.add_output(problem, inputs, &scores, &softmax, &mut result.out[row.out_range(problem)]);
    }
    result
}

/// Computes the gradients of `sum(out * d_out) + sum(lse * d_lse)`, with `d_out` and `d_lse` in the layouts of
/// [`Forward`]. Of an infinite LSE there is no gradient.
///
/// With `p = exp(s - lse)` and `delta = out . d_out - d_lse`: `dv_j += z p d_out`, `ds = p (z d_out . v_j - delta)`, which is
/// also the gradient of the bias; a sink has no value, so that its gradient is `-p delta`.
///
/// # Panics
/// When an input, `d_out` or `d_lse` does not have the size that `problem` gives it.
#[must_use]
pub fn backward(problem: &Problem, inputs: &ReferenceInputs<'_>, d_out: &[f64], d_lse: Option<&[f64]>) -> Gradients {
    let out_len = problem.lengths.query_rows() * problem.query_heads * problem.value_dim;
    assert!(d_out.len() == out_len, "d_out has {} elements, the problem wants {out_len}", d_out.len());
    let zeros = |values: &[f64]| vec![0.0; values.len()];
    let mut gradients = Gradients {
        q: zeros(inputs.q),
        k: zeros(inputs.k),
        v: zeros(inputs.v),
        bias: inputs.bias.map(zeros),
        sinks: inputs.sinks.map(zeros),
    };
    for row in rows(problem, inputs) {
        let scores = row.scores(problem, inputs);
        let Some(softmax) = Softmax::new(&scores, row.sink(inputs)) else { continue };
        let d_out = &d_out[row.out_range(problem)];
        let d_probability = |score: &Score| score.kept * dot(d_out, &inputs.v[row.value_range(problem, score.key)]);
        let weighted = scores.iter().zip(&softmax.probabilities);
        let d_lse = d_lse.map_or(0.0, |d_lse| d_lse[row.lse_index(problem)]);
        let delta: f64 =
            -d_lse + weighted.clone().map(|(score, probability)| probability * d_probability(score)).sum::<f64>();
        for (score, probability) in weighted {
            let d_score = probability * (d_probability(score) - delta);
            let d_product = d_score * score.slope * f64::from(problem.scale);
            let (query, key) = (row.query_range(problem), row.key_range(problem, score.key));
            add_scaled(&mut gradients.v[row.value_range(problem, score.key)], probability * score.kept, d_out);
            add_scaled(&mut gradients.q[query.clone()], d_product, &inputs.k[key.clone()]);
            add_scaled(&mut gradients.k[key], d_product, &inputs.q[query]);
            if let Some(bias) = &mut gradients.bias {
                bias[row.bias_index(problem, score.key)] += d_score;
            }
        }
        if let Some(sinks) = &mut gradients.sinks {
            sinks[row.head] -= softmax.sink * delta;
        }
    }
    gradients
}

/// One row of the score matrix: a query in a head.
struct Row {
    batch: usize,
    head: usize,
    /// Position in its sequence.
    query: usize,
    /// Position among all rows of q.
    query_token: usize,
    /// Row of k and v of each key.
    key_tokens: Rc<[usize]>,
    query_len: usize,
    key_len: usize,
}

/// A visible key of a row.
struct Score {
    /// Position in its sequence.
    key: usize,
    /// `scale * (q . k)`, after the softcap.
    capped: f64,
    /// Derivative of `capped` with respect to `scale * (q . k)`.
    slope: f64,
    /// What ALiBi adds.
    alibi: f64,
    /// What the bias adds.
    bias: f64,
    /// The score.
    value: f64,
    /// What dropout multiplies the weight by.
    kept: f64,
}

impl Row {
    fn query_range(&self, problem: &Problem) -> Range<usize> {
        block(self.query_token * problem.query_heads + self.head, problem.head_dim)
    }

    fn key_range(&self, problem: &Problem, key: usize) -> Range<usize> {
        block(self.key_tokens[key] * problem.key_heads + self.head / problem.group(), problem.head_dim)
    }

    fn value_range(&self, problem: &Problem, key: usize) -> Range<usize> {
        block(self.key_tokens[key] * problem.key_heads + self.head / problem.group(), problem.value_dim)
    }

    fn out_range(&self, problem: &Problem) -> Range<usize> {
        block(self.query_token * problem.query_heads + self.head, problem.value_dim)
    }

    fn lse_index(&self, problem: &Problem) -> usize {
        match problem.lengths {
            Lengths::Dense { query_len, .. } => (self.batch * problem.query_heads + self.head) * query_len + self.query,
            Lengths::Packed { total_query, .. } => self.head * total_query + self.query_token,
        }
    }

    fn bias_index(&self, problem: &Problem, key: usize) -> usize {
        ((self.batch * problem.query_heads + self.head) * self.query_len + self.query) * self.key_len + key
    }

    fn sink(&self, inputs: &ReferenceInputs<'_>) -> f64 {
        inputs.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[self.head])
    }

    /// The scores of the visible keys.
    fn scores(&self, problem: &Problem, inputs: &ReferenceInputs<'_>) -> Vec<Score> {
        let visible = problem.mask.visible_keys(self.query, self.query_len, self.key_len);
        visible.map(|key| self.score(problem, inputs, key)).filter(|score| score.bias != f64::NEG_INFINITY).collect()
    }

    /// Adds the weighted values to `out`.
    fn add_output(
        &self,
        problem: &Problem,
        inputs: &ReferenceInputs<'_>,
        scores: &[Score],
        softmax: &Softmax,
        out: &mut [f64],
    ) {
        for (score, probability) in scores.iter().zip(&softmax.probabilities) {
            add_scaled(out, probability * score.kept, &inputs.v[self.value_range(problem, score.key)]);
        }
    }

    fn score(&self, problem: &Problem, inputs: &ReferenceInputs<'_>, key: usize) -> Score {
        let (q, k) = (&inputs.q[self.query_range(problem)], &inputs.k[self.key_range(problem, key)]);
        let product = f64::from(problem.scale) * dot(q, k);
        let (capped, slope) = if problem.softcap > 0.0 {
            let cap = f64::from(problem.softcap);
            let tanh = (product / cap).tanh();
            (cap * tanh, 1.0 - tanh * tanh)
        } else {
            (product, 1.0)
        };
        let diagonal = problem.mask.diagonal(self.query, self.query_len, self.key_len);
        let distance = (key as i64 - diagonal).unsigned_abs() as f64;
        let alibi =
            inputs.alibi_slopes.map_or(0.0, |slopes| -slopes[self.batch * problem.query_heads + self.head] * distance);
        let bias = inputs.bias.map_or(0.0, |bias| bias[self.bias_index(problem, key)]);
        let kept = problem.dropout.map_or(1.0, |dropout| {
            let keeps = dropout.keeps(self.batch * problem.query_heads + self.head, self.query, key);
            if keeps { 1.0 / (1.0 - dropout.probability()) } else { 0.0 }
        });
        Score { key, capped, slope, alibi, bias, value: capped + alibi + bias, kept }
    }
}

/// The softmax of a row.
struct Softmax {
    /// One for each score.
    probabilities: Vec<f64>,
    /// What the sink takes.
    sink: f64,
    lse: f64,
}

impl Softmax {
    /// `None` when there is nothing to normalise.
    fn new(scores: &[Score], sink: f64) -> Option<Self> {
        if scores.is_empty() && sink == f64::NEG_INFINITY {
            return None;
        }
        let max = scores.iter().map(|score| score.value).fold(sink, f64::max);
        let sink = (sink - max).exp();
        let weights: Vec<f64> = scores.iter().map(|score| (score.value - max).exp()).collect();
        let sum = sink + weights.iter().sum::<f64>();
        let probabilities = weights.into_iter().map(|weight| weight / sum).collect();
        Some(Self { probabilities, sink: sink / sum, lse: max + sum.ln() })
    }
}

/// Every row of every sequence and head.
fn rows(problem: &Problem, inputs: &ReferenceInputs<'_>) -> Vec<Row> {
    check(problem, inputs);
    let mut rows = Vec::new();
    for batch in 0..problem.lengths.batch() {
        let (queries, keys) = tokens(problem, inputs, batch);
        for head in 0..problem.query_heads {
            rows.extend(queries.clone().map(|query_token| Row {
                batch,
                head,
                query: query_token - queries.start,
                query_token,
                query_len: queries.len(),
                key_len: keys.len(),
                key_tokens: Rc::clone(&keys),
            }));
        }
    }
    rows
}

/// The row of query `query` of sequence `batch` in head `head`.
///
/// # Panics
/// When there is none.
fn row_at(problem: &Problem, inputs: &ReferenceInputs<'_>, (batch, head, query): (usize, usize, usize)) -> Row {
    let is_it = |row: &Row| (row.batch, row.head, row.query) == (batch, head, query);
    rows(problem, inputs).into_iter().find(is_it).expect("a row of the problem")
}

/// Rows of q that sequence `batch` occupies, and the row of k and v of each of its keys.
fn tokens(problem: &Problem, inputs: &ReferenceInputs<'_>, batch: usize) -> (Range<usize>, Rc<[usize]>) {
    let between = |offsets: &[i32]| offsets[batch] as usize..offsets[batch + 1] as usize;
    let queries = match problem.lengths {
        Lengths::Dense { query_len, .. } => block(batch, query_len),
        Lengths::Packed { .. } => between(inputs.query_offsets),
    };
    let keys = match (&problem.cache, problem.lengths) {
        (Some(cache), _) => {
            let token = |CacheRow { block, row }| block * cache.block_len() + row;
            (0..cache.key_len(&inputs.cache, batch)).map(|key| token(cache.row(&inputs.cache, batch, key))).collect()
        }
        (None, Lengths::Dense { key_len, .. }) => block(batch, key_len).collect(),
        (None, Lengths::Packed { .. }) => between(inputs.key_offsets).collect(),
    };
    (queries, keys)
}

fn check(problem: &Problem, inputs: &ReferenceInputs<'_>) {
    let (batch, heads) = (problem.lengths.batch(), problem.query_heads);
    let key_tokens = match (problem.cache, problem.lengths) {
        (Some(cache), _) => cache.blocks() * cache.block_len(),
        (None, Lengths::Dense { batch, key_len, .. }) => batch * key_len,
        (None, Lengths::Packed { total_key, .. }) => total_key,
    };
    let score_count = batch * heads * problem.lengths.max_query_len() * problem.lengths.max_key_len();
    let optional = |present: bool, size: usize| present.then_some(size);
    for (name, got, want) in [
        ("q", Some(inputs.q.len()), Some(problem.lengths.query_rows() * heads * problem.head_dim)),
        ("k", Some(inputs.k.len()), Some(key_tokens * problem.key_heads * problem.head_dim)),
        ("v", Some(inputs.v.len()), Some(key_tokens * problem.key_heads * problem.value_dim)),
        ("alibi_slopes", inputs.alibi_slopes.map(<[f64]>::len), optional(problem.alibi.is_some(), batch * heads)),
        ("bias", inputs.bias.map(<[f64]>::len), optional(problem.bias.is_some(), score_count)),
        ("sinks", inputs.sinks.map(<[f64]>::len), optional(problem.sinks.is_some(), heads)),
    ] {
        assert!(got == want, "{name} has {got:?} elements, the problem wants {want:?}");
    }
    if problem.cache.is_some() {
        problem.lengths.check_query_offsets(inputs.query_offsets).expect("valid offsets");
        problem.check_cache(&inputs.cache).expect("a valid cache");
    } else {
        problem.lengths.check_offsets(inputs.query_offsets, inputs.key_offsets).expect("valid offsets");
    }
}

/// Block number `index` of blocks of `len`.
fn block(index: usize, len: usize) -> Range<usize> {
    index * len..(index + 1) * len
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}
