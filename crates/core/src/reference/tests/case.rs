//! Random problems with their inputs.

use proptest::prelude::*;

use crate::reference::ReferenceInputs;
use crate::{Alignment, BiasKind, Dropout, Dtype, Options, Problem, TensorMeta};

/// What a random problem has. Sequences are packed when `sequences` says so.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "any combination is a problem")]
pub(super) struct Spec {
    pub(super) dtype: Dtype,
    pub(super) sequences: Sequences,
    pub(super) key_heads: usize,
    pub(super) group: usize,
    pub(super) head_dim: usize,
    pub(super) value_dim: usize,
    pub(super) causal: bool,
    pub(super) window: (i64, i64),
    pub(super) alignment: Alignment,
    pub(super) softcap: f64,
    pub(super) alibi: bool,
    pub(super) bias: bool,
    pub(super) sinks: bool,
    /// Probability of dropout; with a softcap it is left out.
    pub(super) dropout: f64,
    /// Standard deviation of q and k; 0 makes all tensors constant.
    pub(super) spread: f64,
    pub(super) seed: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Sequences {
    Dense {
        batch: usize,
        query_len: usize,
        key_len: usize,
    },
    /// Lengths of queries and keys, with `gap` rows of no sequence before the first and after the last one.
    Packed {
        lengths: Vec<(usize, usize)>,
        gap: usize,
    },
}

impl Spec {
    /// One dense float32 sequence without anything else, of unit variance.
    pub(super) fn plain(query_len: usize, key_len: usize, dim: usize) -> Self {
        Self {
            dtype: Dtype::F32,
            sequences: Sequences::Dense { batch: 1, query_len, key_len },
            key_heads: 1,
            group: 1,
            head_dim: dim,
            value_dim: dim,
            causal: false,
            window: (-1, -1),
            alignment: Alignment::BottomRight,
            softcap: 0.0,
            alibi: false,
            bias: false,
            sinks: false,
            dropout: 0.0,
            spread: 1.0,
            seed: 1,
        }
    }
}

/// Problems with any combination of features, of lengths below `max_len` and head dimensions of at most `max_dim`.
pub(super) fn specs(max_len: usize, max_dim: usize) -> impl Strategy<Value = Spec> {
    let dense = (1..3usize, 0..max_len, 0..max_len);
    let packed = (prop::collection::vec((0..max_len, 0..max_len), 1..4), 0..3usize);
    let sequences = prop_oneof![
        2 => dense.prop_map(|(batch, query_len, key_len)| Sequences::Dense { batch, query_len, key_len }),
        1 => packed.prop_map(|(lengths, gap)| Sequences::Packed { lengths, gap }),
    ];
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
    let dims = (1..=max_dim, 1..=max_dim, 1..3usize, 1..4usize);
    let edge = -2..max_len as i64;
    let mask = (any::<bool>(), edge.clone(), edge, any::<bool>());
    let extras = (prop_oneof![Just(0.0), 0.5..30.0f64], any::<[bool; 3]>());
    let dropout = prop_oneof![2 => Just(0.0), 1 => 0.01..0.9f64];
    let data = (prop_oneof![Just(0.0), Just(0.01), Just(1.0), Just(4.0)], dropout, any::<u64>());
    (sequences, dtype, dims, mask, extras, data).prop_map(
        |(sequences, dtype, dims, mask, extras, (spread, dropout, seed))| {
            let (head_dim, value_dim, key_heads, group) = dims;
            let (causal, left, right, top_left) = mask;
            let (softcap, [alibi, bias, sinks]) = extras;
            let alignment = if top_left { Alignment::TopLeft } else { Alignment::BottomRight };
            let bias = bias && matches!(sequences, Sequences::Dense { .. });
            Spec {
                dtype,
                sequences,
                key_heads,
                group,
                head_dim,
                value_dim,
                causal,
                window: (left, right),
                alignment,
                softcap,
                alibi,
                bias,
                sinks,
                dropout,
                spread,
                seed,
            }
        },
    )
}

/// A problem and its inputs, rounded to the dtype of the problem.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) problem: Problem,
    pub(super) q: Vec<f64>,
    pub(super) k: Vec<f64>,
    pub(super) v: Vec<f64>,
    pub(super) query_offsets: Vec<i32>,
    pub(super) key_offsets: Vec<i32>,
    pub(super) alibi_slopes: Option<Vec<f64>>,
    pub(super) bias: Option<Vec<f64>>,
    pub(super) sinks: Option<Vec<f64>>,
}

impl Case {
    pub(super) fn new(spec: &Spec) -> Self {
        let mut random = Random(spec.seed);
        let heads = spec.key_heads * spec.group;
        let problem = problem(spec);
        let (query_offsets, key_offsets) = offsets(&spec.sequences);
        let (query_rows, key_rows) = rows(&spec.sequences);
        let batch = problem.lengths.batch();
        let scores = batch * heads * problem.lengths.max_query_len() * problem.lengths.max_key_len();
        let (dtype, spread) = (spec.dtype, spec.spread);
        let mut tensor = |len: usize, spread: f64| {
            let constant = 0.1 + random.uniform();
            let mut value = || if spread > 0.0 { spread * random.normal() } else { constant };
            (0..len).map(|_| round(dtype, value())).collect::<Vec<f64>>()
        };
        let q = tensor(query_rows * heads * spec.head_dim, spread);
        let k = tensor(key_rows * spec.key_heads * spec.head_dim, spread);
        let v = tensor(key_rows * spec.key_heads * spec.value_dim, spread.min(1.0));
        let slopes = (0..batch * heads).map(|_| round(Dtype::F32, random.uniform())).collect();
        let sinks = (0..heads).map(|_| round(Dtype::F32, 2.0 * random.normal())).collect();
        let bias = (0..scores).map(|_| {
            let hidden = random.uniform() < 0.2;
            if hidden { f64::NEG_INFINITY } else { round(dtype, random.normal()) }
        });
        Self {
            problem,
            q,
            k,
            v,
            query_offsets,
            key_offsets,
            alibi_slopes: spec.alibi.then_some(slopes),
            bias: spec.bias.then(|| bias.collect()),
            sinks: spec.sinks.then_some(sinks),
        }
    }

    pub(super) fn inputs(&self) -> ReferenceInputs<'_> {
        ReferenceInputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            query_offsets: &self.query_offsets,
            key_offsets: &self.key_offsets,
            alibi_slopes: self.alibi_slopes.as_deref(),
            bias: self.bias.as_deref(),
            sinks: self.sinks.as_deref(),
            ..ReferenceInputs::default()
        }
    }

    /// First row and number of rows of the queries and of the keys of each sequence.
    pub(super) fn sequences(&self) -> Vec<[(usize, usize); 2]> {
        let (batch, query_len, key_len) =
            (self.problem.lengths.batch(), self.problem.lengths.max_query_len(), self.problem.lengths.max_key_len());
        if self.query_offsets.is_empty() {
            return (0..batch).map(|b| [(b * query_len, query_len), (b * key_len, key_len)]).collect();
        }
        let span = |offsets: &[i32], b: usize| (offsets[b] as usize, (offsets[b + 1] - offsets[b]) as usize);
        (0..batch).map(|b| [span(&self.query_offsets, b), span(&self.key_offsets, b)]).collect()
    }
}

fn problem(spec: &Spec) -> Problem {
    let heads = (spec.key_heads * spec.group) as i64;
    let (query_rows, key_rows) = rows(&spec.sequences);
    let row = |rows: usize, heads: i64, dim: usize| (rows as i64, heads, dim as i64);
    let tensors = [
        row(query_rows, heads, spec.head_dim),
        row(key_rows, spec.key_heads as i64, spec.head_dim),
        row(key_rows, spec.key_heads as i64, spec.value_dim),
    ];
    let slopes = [heads];
    let bias_shape;
    let mut options = Options {
        causal: spec.causal,
        window: spec.window,
        alignment: spec.alignment,
        softcap: spec.softcap,
        alibi_slopes: spec.alibi.then_some((&slopes, &[1])),
        sinks: spec.sinks.then_some((&slopes, &[1])),
        dropout: if spec.softcap > 0.0 { None } else { Dropout::new(spec.dropout, spec.seed, 9).unwrap() },
        ..Options::default()
    };
    match spec.sequences {
        Sequences::Dense { batch, query_len, key_len } => {
            let batch = batch as i64;
            let shape = |(rows, heads, dim): (i64, i64, i64)| [batch, rows / batch, heads, dim];
            let [q, k, v] = tensors.map(shape);
            let meta = |shape| TensorMeta { dtype: spec.dtype, shape, strides: &[0, 0, 0, 1] };
            bias_shape = [batch, heads, query_len as i64, key_len as i64];
            if spec.bias {
                options.bias = Some((BiasKind::Additive(spec.dtype), &bias_shape, &[0, 0, 0, 1]));
            }
            Problem::dense(meta(&q), meta(&k), meta(&v), &options).unwrap()
        }
        Sequences::Packed { ref lengths, .. } => {
            let [q, k, v] = tensors.map(|(rows, heads, dim)| [rows, heads, dim]);
            let meta = |shape| TensorMeta { dtype: spec.dtype, shape, strides: &[0, 0, 1] };
            let longest = |len: fn(&(usize, usize)) -> usize| lengths.iter().map(len).max().unwrap_or(0) as i64;
            let longest = (longest(|lengths| lengths.0), longest(|lengths| lengths.1));
            Problem::packed(meta(&q), meta(&k), meta(&v), lengths.len(), longest, &options).unwrap()
        }
    }
}

/// Rows of q and of k.
fn rows(sequences: &Sequences) -> (usize, usize) {
    match *sequences {
        Sequences::Dense { batch, query_len, key_len } => (batch * query_len, batch * key_len),
        Sequences::Packed { ref lengths, gap } => {
            let queries: usize = lengths.iter().map(|lengths| lengths.0).sum();
            let keys: usize = lengths.iter().map(|lengths| lengths.1).sum();
            (queries + 2 * gap, keys + 2 * gap)
        }
    }
}

fn offsets(sequences: &Sequences) -> (Vec<i32>, Vec<i32>) {
    let Sequences::Packed { lengths, gap } = sequences else { return (Vec::new(), Vec::new()) };
    let (mut queries, mut keys) = (vec![*gap as i32], vec![*gap as i32]);
    for &(query_len, key_len) in lengths {
        queries.push(queries[queries.len() - 1] + query_len as i32);
        keys.push(keys[keys.len() - 1] + key_len as i32);
    }
    (queries, keys)
}

/// Rounds to nearest, ties to even.
pub(super) fn round(dtype: Dtype, x: f64) -> f64 {
    let (mantissa_bits, least_exponent) = match dtype {
        Dtype::F32 => return f64::from(x as f32),
        Dtype::F16 => (10, -14),
        Dtype::Bf16 => (7, -126),
    };
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = (x.abs().log2().floor() as i32).max(least_exponent);
    let unit = 2f64.powi(exponent - mantissa_bits);
    (x / unit).round_ties_even() * unit
}

/// `SplitMix64` (Steele, Lea, Flood 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    /// In `[0, 1)`.
    pub(super) fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean 0, variance 1, by the method of Box and Muller.
    pub(super) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub(super) fn normals(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| self.normal()).collect()
    }
}
