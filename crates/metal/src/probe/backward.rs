//! The small problems of a kernel of the backward pass.

use std::f64::consts::LOG2_E;

use mtlflashattn_core::plan::BackwardPass;
use mtlflashattn_core::reference::bounds::Bounds;
use mtlflashattn_core::reference::bounds::rounded_gradients::{Upstream, gradient_bounds_of};
use mtlflashattn_core::reference::{self, Forward};
use mtlflashattn_core::{Dtype, Error, Problem};

use super::Memory;
use super::cases::{CASES, Case, FLOAT, Given, Needs, Numbers};
use crate::{BackwardKernel, BackwardTensors, Features};

/// What the kernels take for the LSE of a row that sees nothing: `-LOWEST` in `common.metal`.
const SEES_NOTHING: f64 = (1u128 << 126) as f64;

/// A problem of the backward pass with its tensors and its answer. A kernel proves itself alone: what an earlier one writes
/// for it is given.
pub struct SmallBackward {
    /// The problem.
    pub problem: Problem,
    /// Inputs, and what the kernel writes full of NaN; gradients that it does not write are absent.
    pub tensors: BackwardTensors<Memory>,
    pass: BackwardPass,
    /// The answer and its bounds, in the order of [`BackwardTensors::written`].
    expected: Vec<Expected>,
}

/// Elements of a result.
struct Expected {
    exact: Vec<f64>,
    bounds: Vec<f64>,
}

impl SmallBackward {
    /// The small problems of `kernel`.
    ///
    /// # Errors
    /// Those of [`Problem`], for a kernel with features that no problem has together.
    pub fn all(kernel: &BackwardKernel) -> Result<Vec<Self>, Error> {
        CASES.iter().map(|case| Self::new(case, kernel)).collect()
    }

    fn new(case: &Case, kernel: &BackwardKernel) -> Result<Self, Error> {
        let BackwardKernel { pass, dtype, head_dim, value_dim, tile, features } = *kernel;
        let owns_keys = pass.owns_keys();
        let needs = Needs {
            dtype,
            head_dim,
            value_dim,
            features,
            rows: kernel.rows(),
            block: tile.block,
            owns_keys,
            least_keys: 0,
            aligned: features.aligned,
        };
        let mut numbers = Numbers(1);
        let given = Given::new(case, &needs, &mut numbers)?;
        let problem = given.problem;
        let has = Features { aligned: features.aligned, ..Features::of(&problem, features.lse) };
        debug_assert_eq!(has, features, "the kernel's features and no others");
        let heads = problem.query_heads;
        let results = given.queries.rows * heads * value_dim;
        let [out_values, d_out_values] = [0; 2].map(|_| numbers.take(dtype, results));
        let d_lse_values = features.lse.then(|| numbers.take(Dtype::F32, given.queries.rows * heads));
        let forward = reference::forward(&problem, &given.inputs());
        let lse: Vec<f64> = forward.lse.iter().map(|&lse| f64::from(lse as f32)).collect();
        let states = States { value_dim, heads, given: &given, lse: &lse, d_lse: d_lse_values.as_deref() };
        // No two tensors with the same strides.
        let [own, other] = [given.heads_first, !given.heads_first];
        let layouts =
            [given.layout(other, given.gap), given.layout(own, 2 * given.gap), given.layout(other, 3 * given.gap)];
        let nans = |count: usize| vec![f64::NAN; count];
        let key_heads = problem.key_heads;
        let [d_query, d_key, d_value] = [
            (pass == BackwardPass::Query, &given.queries, heads, head_dim),
            (owns_keys && pass.sums_head(), &given.keys, key_heads, head_dim),
            (pass.sums_value(), &given.keys, key_heads, value_dim),
        ]
        .map(|(wanted, sequences, heads, dim)| {
            let blank = nans(sequences.rows * heads * dim);
            wanted.then(|| sequences.lay_out(dtype, &blank, heads, dim, &layouts[2]))
        });
        let mut states_shape = given.lse_shape();
        states_shape.push(2);
        let exact_states;
        let expected;
        if pass == BackwardPass::Delta {
            let (exact, bounds) = states.of(&out_values, &d_out_values);
            exact_states = nans(exact.len());
            expected = vec![Expected { exact, bounds }];
        } else {
            let (exact, _) = states.of(&forward.out, &d_out_values);
            exact_states = exact.iter().map(|&state| f64::from(state as f32)).collect();
            expected = gradients(kernel, &given, &forward, &d_out_values);
        }
        let rows = |values: &[f64], layout| given.queries.lay_out(dtype, values, heads, value_dim, layout);
        let tensors = BackwardTensors {
            out: rows(&out_values, &layouts[0]),
            d_out: rows(&d_out_values, &layouts[1]),
            lse: Memory::contiguous(FLOAT, lse.clone(), given.lse_shape()),
            d_lse: d_lse_values.clone().map(|d_lse| Memory::contiguous(FLOAT, d_lse, given.lse_shape())),
            states: Memory::contiguous(FLOAT, exact_states, states_shape),
            d_query,
            d_key,
            d_value,
            q: given.q,
            k: given.k,
            v: given.v,
            offsets: given.offsets,
            alibi_slopes: given.alibi_slopes,
            bias: given.bias,
        };
        Ok(Self { problem, tensors, pass, expected })
    }

    /// What is wrong with the memory that the kernel has written, in the order of [`BackwardTensors::written`]; `None` where
    /// nothing is.
    #[must_use]
    pub fn judge(&self, results: &[Vec<f64>]) -> Option<String> {
        let mut worst: f64 = 0.0;
        let mut stays_inside = true;
        for ((memory, expected), got) in self.tensors.written(self.pass).iter().zip(&self.expected).zip(results) {
            let (got, nothing_else) = memory.read(got);
            let missing = got.iter().filter(|value| value.is_nan()).count();
            if missing > 0 {
                return Some(format!("{missing} of {} results are NaN or were never written", got.len()));
            }
            worst = worst.max(expected.worst(&got));
            stays_inside &= nothing_else;
        }
        if worst > 1.0 {
            return Some(format!("results are off by {worst:.1} times what rounding explains"));
        }
        (!stays_inside).then(|| "the kernel wrote outside of its output".into())
    }
}

impl Expected {
    /// The largest error in units of its bound.
    fn worst(&self, got: &[f64]) -> f64 {
        let ratio = |((exact, bound), got): ((&f64, &f64), &f64)| {
            let error = (got - exact).abs();
            if error == 0.0 { 0.0 } else { error / bound }
        };
        self.exact.iter().zip(&self.bounds).zip(got).map(ratio).fold(0.0, f64::max)
    }
}

/// What the states of queries come from.
struct States<'a> {
    value_dim: usize,
    heads: usize,
    given: &'a Given,
    lse: &'a [f64],
    d_lse: Option<&'a [f64]>,
}

impl States<'_> {
    /// LSE in units of log2 and delta of every query, and how far a right kernel may be off: by the rounding of the factor
    /// and of the product; by those of a sum of `value_dim` products (Higham, "Accuracy and Stability of Numerical
    /// Algorithms", section 3.1), and of the difference.
    fn of(&self, out: &[f64], d_out: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let unit = Dtype::F32.unit_roundoff();
        let roundings = (self.value_dim + 4) as f64 * unit;
        let summing = roundings / (1.0 - roundings);
        let (mut exact, mut bounds) = (Vec::new(), Vec::new());
        for (at, &lse) in self.lse.iter().enumerate() {
            if lse == f64::INFINITY {
                exact.extend([SEES_NOTHING, 0.0]);
                bounds.extend([0.0; 2]);
                continue;
            }
            let row = self.row(at) * self.value_dim;
            let products = || out[row..].iter().zip(&d_out[row..]).take(self.value_dim).map(|(out, d_out)| out * d_out);
            let d_lse = self.d_lse.map_or(0.0, |d_lse| d_lse[at]);
            let delta = products().sum::<f64>() - d_lse;
            let size = products().map(f64::abs).sum::<f64>();
            exact.extend([lse * LOG2_E, delta]);
            bounds
                .extend([2.1 * unit * (lse * LOG2_E).abs(), summing * size + 2.1 * unit * (delta.abs() + d_lse.abs())]);
        }
        (exact, bounds)
    }

    /// The row of out, in the order of its elements, whose LSE is `at`: heads come after rows there.
    fn row(&self, at: usize) -> usize {
        let rows = if self.given.offsets.is_some() { self.given.queries.rows } else { self.given.queries.longest };
        let (head, row) = (at / rows, at % rows);
        let (batch, head) = (head / self.heads, head % self.heads);
        (batch * rows + row) * self.heads + head
    }
}

/// The gradients that `kernel` writes. It is given states that are exact but for one rounding, which the bounds of the
/// differences have in them.
fn gradients(kernel: &BackwardKernel, given: &Given, forward: &Forward, d_out: &[f64]) -> Vec<Expected> {
    let (problem, inputs) = (&given.problem, given.inputs());
    let exact_forward = Bounds { out: vec![0.0; forward.out.len()], lse: vec![0.0; forward.lse.len()] };
    let upstream = Upstream { d_out, d_lse: None, forward: &exact_forward };
    let bounds = gradient_bounds_of(kernel.arithmetic(), problem, &inputs, &upstream);
    let exact = reference::backward(problem, &inputs, d_out, None);
    let (of_query, of_key, of_value) = ((exact.q, bounds.q), (exact.k, bounds.k), (exact.v, bounds.v));
    let pairs = match kernel.pass {
        BackwardPass::Delta => vec![],
        BackwardPass::Query => vec![of_query],
        BackwardPass::KeysAndValues => vec![of_key, of_value],
        BackwardPass::Keys => vec![of_key],
        BackwardPass::Values => vec![of_value],
    };
    pairs.into_iter().map(|(exact, bounds)| Expected { exact, bounds }).collect()
}
