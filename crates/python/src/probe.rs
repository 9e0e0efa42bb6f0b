//! A small problem with a known answer: what a kernel has to get right on this device before it serves.

use mtlflashattn_core::problem::AlibiStrides;
use mtlflashattn_core::reference::{self, Forward, ReferenceInputs, bounds};
use mtlflashattn_core::{Bias, BiasKind, Dtype, Lengths, Problem, Strides};
use mtlflashattn_metal::Kernel;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

use crate::execute::unreadable;
use crate::metal::{Fault, Operand, Operands};
use crate::tensor::View;
use crate::torch::Torch;

const BATCH: usize = 2;
const KEY_HEADS: usize = 2;
/// Queries: more than the rows of most tiles, and no multiple of any.
const QUERY_LEN: usize = 37;
/// Keys beyond two blocks of a tile.
const KEY_TAIL: usize = 5;
/// Keys at most, where blocks are large.
const MAX_KEY_LEN: usize = 133;

/// Runs a small problem by `kernel` on the device of `like`; says by how much the results are off if they are wrong.
///
/// The small problem has every feature of `problem`, which the kernel was made for, and no other. Reading the results
/// waits for the device.
pub fn check<'py>(
    problem: &Problem,
    kernel: &Kernel,
    like: &Bound<'py, PyAny>,
    run: impl FnOnce(&Problem, &Operands<'py>) -> Result<(), Fault>,
) -> Result<Option<String>, Fault> {
    let small = Small::new(problem, kernel);
    let tensors = small.tensors(like, kernel.features.lse)?;
    run(&small.problem, &tensors)?;
    let inputs = small.inputs();
    let exact = reference::forward(&small.problem, &inputs);
    let got = match results(&tensors) {
        Ok((out, lse)) => Forward { out, lse: lse.unwrap_or_else(|| exact.lse.clone()) },
        // A kernel that the GPU stopped shows when somebody waits for it.
        Err(error) if error.is_instance_of::<PyException>(like.py()) => {
            return Ok(Some(format!("in the check before its first use no results came back: {error}")));
        }
        Err(error) => return Err(error.into()),
    };
    let (out, lse) = bounds::error_bounds_of(kernel.arithmetic(), &small.problem, &inputs).worst(&exact, &got);
    Ok((out > 1.0 || lse > 1.0).then(|| {
        format!(
            "its results were wrong in the check before its first use: off by {:.1} times what rounding explains",
            out.max(lse)
        )
    }))
}

/// out and lse, once the device has computed them.
fn results(tensors: &Operands<'_>) -> PyResult<(Vec<f64>, Option<Vec<f64>>)> {
    let lse = tensors.lse.as_ref().map(|lse| Torch::to_f64s(&lse.object)).transpose()?;
    Ok((Torch::to_f64s(&tensors.out.object)?, lse))
}

/// A problem with its inputs, which every dtype holds exactly.
struct Small {
    problem: Problem,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    query_offsets: Vec<i32>,
    key_offsets: Vec<i32>,
    alibi_slopes: Option<Vec<f64>>,
    /// 0 and negative infinity for a mask.
    bias: Option<Vec<f64>>,
    sinks: Option<Vec<f64>>,
}

impl Small {
    fn new(problem: &Problem, kernel: &Kernel) -> Self {
        let problem = shrink(problem, kernel);
        let Problem { query_heads, key_heads, head_dim, value_dim, lengths, .. } = problem;
        let (queries, keys) = (lengths.query_rows(), key_rows(lengths));
        let mut values = Values(1);
        let mut some = |count: usize| values.by_ref().take(count).collect::<Vec<f64>>();
        Self {
            q: some(queries * query_heads * head_dim),
            k: some(keys * key_heads * head_dim),
            v: some(keys * key_heads * value_dim),
            query_offsets: offsets(lengths.query_rows(), lengths.max_query_len()),
            key_offsets: offsets(keys, lengths.max_key_len()),
            alibi_slopes: problem.alibi.map(|_| some(lengths.batch() * query_heads)),
            bias: problem.bias.map(|bias| {
                let bias_values = some(queries * query_heads * lengths.max_key_len());
                let hidden = |x: f64| if x < -0.5 { f64::NEG_INFINITY } else { 0.0 };
                match bias.kind {
                    BiasKind::Additive(_) => bias_values,
                    BiasKind::Boolean => bias_values.into_iter().map(hidden).collect(),
                }
            }),
            sinks: problem.sinks.map(|_| some(query_heads)),
            problem,
        }
    }

    fn inputs(&self) -> ReferenceInputs<'_> {
        ReferenceInputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            query_offsets: &self.query_offsets,
            key_offsets: &self.key_offsets,
            alibi_slopes: self.alibi_slopes.as_deref(),
            bias: self.bias.as_deref(),
            sinks: self.sinks.as_deref(),
        }
    }

    /// The inputs, and outputs full of NaN, on the device of `like`.
    fn tensors<'py>(&self, like: &Bound<'py, PyAny>, want_lse: bool) -> Result<Operands<'py>, Fault> {
        let Problem { dtype, lengths, query_heads, key_heads, head_dim, value_dim, .. } = self.problem;
        let dims = |rows: usize, heads: usize, dim: usize| match lengths {
            Lengths::Dense { batch, .. } => vec![batch, rows / batch, heads, dim],
            Lengths::Packed { .. } => vec![rows, heads, dim],
        };
        let (queries, keys) = (lengths.query_rows(), key_rows(lengths));
        let tensor = |values: &[f64], dtype: &str, shape: &[usize]| operand(Torch::tensor(like, values, dtype, shape)?);
        let nans = |shape: Vec<usize>| vec![f64::NAN; shape.iter().product()];
        let lse_shape = match lengths {
            Lengths::Dense { batch, query_len, .. } => vec![batch, query_heads, query_len],
            Lengths::Packed { total_query, .. } => vec![query_heads, total_query],
        };
        let integers = |values: &[i32]| {
            let values: Vec<f64> = values.iter().copied().map(f64::from).collect();
            tensor(&values, "int32", &[values.len()])
        };
        let out_shape = dims(queries, query_heads, value_dim);
        let bias_shape = [lengths.batch(), query_heads, lengths.max_query_len(), lengths.max_key_len()];
        let float = |values: &Option<Vec<f64>>, shape: &[usize]| {
            values.as_ref().map(|values| tensor(values, Dtype::F32.name(), shape)).transpose()
        };
        Ok(Operands {
            q: tensor(&self.q, dtype.name(), &dims(queries, query_heads, head_dim))?,
            k: tensor(&self.k, dtype.name(), &dims(keys, key_heads, head_dim))?,
            v: tensor(&self.v, dtype.name(), &dims(keys, key_heads, value_dim))?,
            out: tensor(&nans(out_shape.clone()), dtype.name(), &out_shape)?,
            lse: want_lse.then(|| tensor(&nans(lse_shape.clone()), Dtype::F32.name(), &lse_shape)).transpose()?,
            offsets: match lengths {
                Lengths::Packed { .. } => Some((integers(&self.query_offsets)?, integers(&self.key_offsets)?)),
                Lengths::Dense { .. } => None,
            },
            alibi_slopes: float(&self.alibi_slopes, &[lengths.batch(), query_heads])?,
            bias: match (&self.bias, self.problem.bias) {
                (Some(values), Some(Bias { kind: BiasKind::Additive(dtype), .. })) => {
                    Some(tensor(values, dtype.name(), &bias_shape)?)
                }
                (Some(values), _) => {
                    let visible: Vec<f64> = values.iter().map(|&x| f64::from(u8::from(x == 0.0))).collect();
                    Some(tensor(&visible, "bool", &bias_shape)?)
                }
                (None, _) => None,
            },
            sinks: float(&self.sinks, &[query_heads])?,
        })
    }
}

fn operand(object: Bound<'_, PyAny>) -> Result<Operand<'_>, Fault> {
    let view = match View::read_attributes(&object) {
        Some(view) => view,
        None => View::describe(&object)?.ok_or_else(|| unreadable("q"))?,
    };
    Ok(Operand { object, view })
}

/// `problem` with other sizes and numbers, contiguous, for the same kernel.
fn shrink(problem: &Problem, kernel: &Kernel) -> Problem {
    let mut small = *problem;
    let (query_len, key_len) = (QUERY_LEN, (2 * kernel.tile.keys + KEY_TAIL).clamp(QUERY_LEN, MAX_KEY_LEN));
    small.lengths = match problem.lengths {
        Lengths::Dense { .. } => Lengths::Dense { batch: BATCH, query_len, key_len },
        // A long sequence, and a short one behind it.
        Lengths::Packed { .. } => Lengths::Packed {
            batch: BATCH,
            total_query: query_len + QUERY_LEN / 2,
            total_key: key_len + KEY_TAIL,
            max_query_len: query_len,
            max_key_len: key_len,
        },
    };
    small.key_heads = KEY_HEADS;
    small.query_heads = KEY_HEADS * problem.group().min(2);
    let strides = |rows: usize, heads: usize, dim: usize| {
        let batch = if matches!(problem.lengths, Lengths::Dense { .. }) { rows * heads * dim } else { 0 };
        Strides { batch: batch as i64, row: (heads * dim) as i64, head: dim as i64 }
    };
    small.q = strides(query_len, small.query_heads, small.head_dim);
    small.k = strides(key_len, small.key_heads, small.head_dim);
    small.v = strides(key_len, small.key_heads, small.value_dim);
    // Scores of a few units: neither all keys alike nor one alone.
    small.scale = 6.0 / (small.head_dim as f32).sqrt();
    small.softcap = if problem.softcap > 0.0 { 3.0 } else { 0.0 };
    small.mask.left = problem.mask.left.map(|_| key_len / 2);
    small.mask.right = problem.mask.right.map(|right| right.min(3));
    small.alibi = problem.alibi.map(|_| AlibiStrides { batch: small.query_heads as i64, head: 1 });
    small.sinks = problem.sinks.map(|_| 1);
    small.bias = problem.bias.map(|bias| Bias {
        kind: bias.kind,
        batch: (small.query_heads * query_len * key_len) as i64,
        head: (query_len * key_len) as i64,
        query: key_len as i64,
        key: 1,
    });
    small
}

fn key_rows(lengths: Lengths) -> usize {
    match lengths {
        Lengths::Dense { batch, key_len, .. } => batch * key_len,
        Lengths::Packed { total_key, .. } => total_key,
    }
}

/// Two sequences: the first has `first` rows.
fn offsets(total: usize, first: usize) -> Vec<i32> {
    [0, first, total].map(|offset| offset as i32).to_vec()
}

/// Multiples of 1/64 from -1 to 1 in no apparent order (a linear congruential generator; Knuth, The Art of Computer
/// Programming, volume 2, section 3.3.4, line 26): exact in every dtype.
struct Values(u64);

impl Iterator for Values {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some(((self.0 >> 33) % 129) as f64 / 64.0 - 1.0)
    }
}
