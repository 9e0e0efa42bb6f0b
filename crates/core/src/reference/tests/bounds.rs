//! The bounds hold for online softmax in float32 with elementary functions as bad as allowed, and planted bugs are far
//! outside them.

use std::f32::consts::{LN_2, LOG2_E};

use proptest::prelude::*;

use super::case::{Case, Random, Spec, round, specs};
use crate::reference::bounds::{self, Bounds, error_bounds, error_bounds_of};
use crate::reference::{Forward, forward};
use crate::{Alignment, Dropout, Dtype, Lengths};

/// How a tier may do its float32 arithmetic.
#[derive(Clone, Copy, Debug)]
struct Arithmetic {
    /// Keys between rescalings.
    key_block: usize,
    /// Keys of a split.
    split: usize,
    /// Relative error of `exp2` and absolute error of `tanh` and `log2`, in units of 2^-21; random within it if so.
    error: f64,
    random: bool,
    /// As Metal kernels do it: `exp2` with errors that grow with its argument, in the units that Metal allows; a maximum
    /// that lags; weights rounded to the type of the problem.
    metal: bool,
}

struct Elementary {
    arithmetic: Arithmetic,
    random: Random,
}

impl Elementary {
    fn error(&mut self) -> f64 {
        let spread = if self.arithmetic.random { 2.0 * self.random.uniform() - 1.0 } else { 1.0 };
        // A little is left for rounding the result to float32.
        0.9 * self.arithmetic.error * spread / (1u64 << 21) as f64
    }

    fn exp2(&mut self, x: f32) -> f32 {
        // 3 + 2 |x| units in the last place are so many 2^-23, at most.
        let growth = if self.arithmetic.metal { (3.0 + 2.0 * f64::from(x.abs())) / 4.0 } else { 1.0 };
        let exact = f64::from(x).exp2();
        if exact == 0.0 { 0.0 } else { (exact * (1.0 + growth * self.error())) as f32 }
    }

    fn tanh(&mut self, x: f32) -> f32 {
        (f64::from(x).tanh() + self.error()) as f32
    }

    fn log2(&mut self, x: f32) -> f32 {
        (f64::from(x).log2() + self.error()) as f32
    }
}

/// The state of a row: maximum (in units of log2), sum of weights, weighted sum of values.
struct State {
    max: f32,
    sum: f32,
    out: Vec<f32>,
}

impl State {
    fn new(max: f32, sum: f32, value_dim: usize) -> Self {
        Self { max, sum, out: vec![0.0; value_dim] }
    }

    fn rescale(&mut self, max: f32, elementary: &mut Elementary) {
        let factor = elementary.exp2(self.max - max);
        self.max = max;
        self.sum *= factor;
        self.out.iter_mut().for_each(|out| *out *= factor);
    }

    fn merge(&mut self, mut other: Self, elementary: &mut Elementary) {
        let max = self.max.max(other.max);
        self.rescale(max, elementary);
        other.rescale(max, elementary);
        self.sum += other.sum;
        self.out.iter_mut().zip(other.out).for_each(|(out, other)| *out += other);
    }
}

/// Flash attention in float32.
fn float32(case: &Case, arithmetic: Arithmetic) -> Forward {
    let problem = &case.problem;
    let (heads, rows) = (problem.query_heads, problem.lengths.query_rows());
    let mut result =
        Forward { out: vec![0.0; rows * heads * problem.value_dim], lse: vec![f64::INFINITY; rows * heads] };
    let mut elementary = Elementary { arithmetic, random: Random(7) };
    for (batch, [(query_start, query_len), (key_start, key_len)]) in case.sequences().into_iter().enumerate() {
        for (head, query) in (0..heads).flat_map(|head| (0..query_len).map(move |query| (head, query))) {
            let row = Row { case, batch, head, query, query_start, query_len, key_start, key_len };
            let state = row.attend(&mut elementary);
            if state.sum == 0.0 {
                continue;
            }
            let token = query_start + query;
            let lse = if case.query_offsets.is_empty() {
                (batch * heads + head) * query_len + query
            } else {
                head * rows + token
            };
            result.lse[lse] = f64::from((state.max + elementary.log2(state.sum)) * LN_2);
            for (column, out) in state.out.iter().enumerate() {
                let value = f64::from(out * (1.0 / state.sum));
                result.out[(token * heads + head) * problem.value_dim + column] = round(problem.dtype, value);
            }
        }
    }
    result
}

struct Row<'a> {
    case: &'a Case,
    batch: usize,
    head: usize,
    query: usize,
    query_start: usize,
    query_len: usize,
    key_start: usize,
    key_len: usize,
}

impl Row<'_> {
    fn attend(&self, elementary: &mut Elementary) -> State {
        let value_dim = self.case.problem.value_dim;
        let mut state = match &self.case.sinks {
            Some(sinks) => State::new(sinks[self.head] as f32 * LOG2_E, 1.0, value_dim),
            None => State::new(f32::MIN, 0.0, value_dim),
        };
        let visible = self.case.problem.mask.visible_keys(self.query, self.query_len, self.key_len);
        let Arithmetic { key_block, split, .. } = elementary.arithmetic;
        for split_start in visible.clone().step_by(split) {
            let mut part = State::new(f32::MIN, 0.0, value_dim);
            let split_end = split_start.saturating_add(split).min(visible.end);
            for start in (split_start..split_end).step_by(key_block) {
                self.block(start..(start + key_block).min(split_end), &mut part, elementary);
            }
            state.merge(part, elementary);
        }
        state
    }

    fn block(&self, keys: std::ops::Range<usize>, state: &mut State, elementary: &mut Elementary) {
        let problem = &self.case.problem;
        let scores: Vec<f32> = keys.clone().map(|key| self.score(key, elementary)).collect();
        let Arithmetic { metal, .. } = elementary.arithmetic;
        let largest = scores.iter().copied().fold(state.max, f32::max);
        let max = if metal && largest <= state.max + 8.0 { state.max } else { largest };
        state.rescale(max, elementary);
        for (key, score) in keys.zip(scores) {
            let weight = elementary.exp2(score - max);
            state.sum += weight;
            let weight = if metal { round(problem.dtype, f64::from(weight)) as f32 } else { weight };
            let head = self.batch * problem.query_heads + self.head;
            let weight = match problem.dropout {
                Some(dropout) if dropout.keeps(head, self.query, key) => weight * dropout.factor(),
                Some(_) => 0.0,
                None => weight,
            };
            let value = ((self.key_start + key) * problem.key_heads + self.head / problem.group()) * problem.value_dim;
            for (column, out) in state.out.iter_mut().enumerate() {
                *out = weight.mul_add(self.case.v[value + column] as f32, *out);
            }
        }
    }

    /// In units of log2.
    fn score(&self, key: usize, elementary: &mut Elementary) -> f32 {
        let problem = &self.case.problem;
        let query = ((self.query_start + self.query) * problem.query_heads + self.head) * problem.head_dim;
        let key_row = ((self.key_start + key) * problem.key_heads + self.head / problem.group()) * problem.head_dim;
        let capped = problem.softcap > 0.0;
        let factor = if capped { problem.scale / problem.softcap } else { problem.scale * LOG2_E };
        let mut score = 0.0f32;
        for c in 0..problem.head_dim {
            score = (self.case.q[query + c] as f32 * factor).mul_add(self.case.k[key_row + c] as f32, score);
        }
        if capped {
            score = elementary.tanh(score) * (problem.softcap * LOG2_E);
        }
        if let Some(slopes) = &self.case.alibi_slopes {
            let distance = key as i64 - problem.mask.diagonal(self.query, self.query_len, self.key_len);
            let slope = slopes[self.batch * problem.query_heads + self.head] as f32 * LOG2_E;
            score -= slope * distance.unsigned_abs() as f32;
        }
        if let Some(bias) = &self.case.bias {
            let index = ((self.batch * problem.query_heads + self.head) * self.query_len + self.query) * self.key_len;
            score += bias[index + key] as f32 * LOG2_E;
        }
        score
    }
}

fn arithmetics() -> impl Strategy<Value = Arithmetic> {
    let split = prop_oneof![Just(usize::MAX), Just(32usize), Just(64)];
    (prop_oneof![Just(16usize), Just(128)], split, -1.0..=1.0f64, any::<bool>())
        .prop_map(|(key_block, split, error, random)| Arithmetic { key_block, split, error, random, metal: false })
}

proptest! {
    #[test]
    fn float32_arithmetic_stays_inside(spec in specs(96, 40), arithmetic in arithmetics()) {
        let case = Case::new(&spec);
        let (got, want) = (float32(&case, arithmetic), forward(&case.problem, &case.inputs()));
        let bounds = error_bounds(&case.problem, &case.inputs());
        let (out, lse) = bounds.worst(&want, &got);
        prop_assert!(out <= 1.0 && lse <= 1.0, "{out} and {lse} times the bound");
        prop_assert!(bounds.out.iter().chain(&bounds.lse).all(|bound| bound.is_finite()));
    }

    #[test]
    fn metal_arithmetic_stays_inside(spec in specs(96, 40), arithmetic in arithmetics()) {
        let case = Case::new(&spec);
        let arithmetic = Arithmetic { split: usize::MAX, key_block: arithmetic.key_block / 4, metal: true, ..arithmetic };
        let (got, want) = (float32(&case, arithmetic), forward(&case.problem, &case.inputs()));
        let bounds = error_bounds_of(bounds::Arithmetic::metal(case.problem.dtype), &case.problem, &case.inputs());
        let (out, lse) = bounds.worst(&want, &got);
        prop_assert!(out <= 1.0 && lse <= 1.0, "{out} and {lse} times the bound");
    }
}

/// Exact functions, one block.
const PLAIN: Arithmetic = Arithmetic { key_block: 128, split: usize::MAX, error: 0.0, random: false, metal: false };

/// Largest errors over a few random inputs, with `edit` applied to each, in units of the bounds.
fn worst_of_many(spec: &Spec, edit: fn(&mut Case)) -> (f64, f64) {
    let ratios = (0..32).map(|seed| {
        let mut case = Case::new(&Spec { seed, ..spec.clone() });
        edit(&mut case);
        error_bounds(&case.problem, &case.inputs())
            .worst(&forward(&case.problem, &case.inputs()), &float32(&case, PLAIN))
    });
    ratios.fold((0.0, 0.0), |worst, (out, lse)| (f64::max(worst.0, out), f64::max(worst.1, lse)))
}

#[test]
fn each_part_of_a_score_is_covered_and_not_much_more() {
    // Equal addends round alike, which is why the bound of the dot product and of the sum is the worst case.
    let constant = Spec { spread: 0.0, ..Spec::plain(1, 1, 512) };
    let many_keys = Spec { spread: 0.0, ..Spec::plain(1, 4000, 1) };
    // Large terms that are nearly equal for all keys move weights without deciding them.
    let bias = Spec { bias: true, ..Spec::plain(4, 8, 1) };
    let alibi = Spec { alibi: true, ..Spec::plain(3000, 4, 1) };
    for (name, spec, edit) in [
        ("dot product", constant, (|_| ()) as fn(&mut Case)),
        ("sum", many_keys, |_| ()),
        ("bias", bias, |case| case.bias.as_mut().unwrap().iter_mut().for_each(|b| *b = round(Dtype::F32, *b + 3e3))),
        ("ALiBi", alibi, |_| ()),
    ] {
        let (out, lse) = worst_of_many(&spec, edit);
        assert!(out <= 1.0 && lse <= 1.0, "{name}: {out} and {lse} times the bound");
        assert!(out.max(lse) >= 0.05, "{name}: only {out} and {lse} of the bound");
    }
}

/// One way to be wrong, as the right answer to another problem.
struct Bug {
    name: &'static str,
    spec: Spec,
    plant: fn(&mut Case),
}

fn drop_last_key(case: &mut Case) {
    let Lengths::Dense { key_len, .. } = &mut case.problem.lengths else { unreachable!() };
    *key_len -= 1;
    case.problem.mask.alignment = Alignment::TopLeft;
    case.k.truncate(*key_len * case.problem.key_heads * case.problem.head_dim);
    case.v.truncate(*key_len * case.problem.key_heads * case.problem.value_dim);
}

fn bugs(dtype: Dtype) -> Vec<Bug> {
    let plain = Spec { dtype, group: 2, ..Spec::plain(64, 256, 64) };
    let bug = |name, spec, plant| Bug { name, spec, plant };
    let causal = Spec { causal: true, ..plain.clone() };
    let window = Spec { window: (100, 20), ..plain.clone() };
    vec![
        bug("the last key is missing", plain.clone(), drop_last_key),
        bug("the last of a thousand keys is missing", Spec { dtype, ..Spec::plain(64, 1000, 64) }, drop_last_key),
        bug("causal sees one key too many", causal.clone(), |case| case.problem.mask.right = Some(1)),
        bug("causal from the top left", causal.clone(), |case| case.problem.mask.alignment = Alignment::TopLeft),
        bug("window one too long on the left", window.clone(), |case| case.problem.mask.left = Some(101)),
        bug("window one too short on the right", window, |case| case.problem.mask.right = Some(19)),
        bug("softcap forgotten", Spec { softcap: 5.0, ..plain.clone() }, |case| case.problem.softcap = 0.0),
        bug("slope off by a hundredth", Spec { alibi: true, ..causal }, |case| {
            case.alibi_slopes.as_mut().unwrap().iter_mut().for_each(|slope| *slope *= 1.01);
        }),
        bug("bias in units of log2", Spec { bias: true, ..plain.clone() }, |case| {
            case.bias.as_mut().unwrap().iter_mut().for_each(|bias| *bias *= std::f64::consts::LN_2);
        }),
        bug("sink forgotten", Spec { sinks: true, ..plain.clone() }, |case| {
            (case.problem.sinks, case.sinks) = (None, None);
        }),
        bug("scale of a padded head dimension", plain, |case| case.problem.scale = 80f32.powf(-0.5)),
    ]
}

#[test]
fn planted_bugs_are_far_outside() {
    for (dtype, factor) in [(Dtype::F32, 20.0), (Dtype::F16, 20.0), (Dtype::Bf16, 5.0)] {
        for Bug { name, spec, plant } in bugs(dtype) {
            let case = Case::new(&spec);
            let right = forward(&case.problem, &case.inputs());
            let bounds = error_bounds(&case.problem, &case.inputs());
            let mut wrong = case.clone();
            plant(&mut wrong);
            let wrong = forward(&wrong.problem, &wrong.inputs());
            let (out, lse) = bounds.worst(&right, &wrong);
            assert!(out >= factor && lse >= factor, "{dtype}: {name}: {out:.1} and {lse:.1} times the bound");
        }
    }
}

/// Dropout leaves the LSE as it is, so that only outputs show what is wrong with it.
#[test]
fn wrong_dropout_is_far_outside() {
    for (dtype, factor) in [(Dtype::F32, 20.0), (Dtype::F16, 20.0), (Dtype::Bf16, 5.0)] {
        let case = Case::new(&Spec { dtype, group: 2, dropout: 0.2, ..Spec::plain(64, 256, 64) });
        let right = forward(&case.problem, &case.inputs());
        let bounds = error_bounds(&case.problem, &case.inputs());
        let dropout = case.problem.dropout.unwrap();
        for (name, wrong) in [
            ("none", None),
            ("another offset", Dropout::new(0.2, dropout.seed, dropout.offset + 1).unwrap()),
            ("another seed", Dropout::new(0.2, dropout.seed ^ (1 << 63), dropout.offset).unwrap()),
            ("another probability", Dropout::new(0.21, dropout.seed, dropout.offset).unwrap()),
        ] {
            let mut case = case.clone();
            case.problem.dropout = wrong;
            let (out, _) = bounds.worst(&right, &forward(&case.problem, &case.inputs()));
            assert!(out >= factor, "{dtype}: {name}: {out:.1} times the bound");
        }
    }
}

#[test]
fn nothing_but_right_answers_is_inside() {
    let bounds = Bounds { out: vec![0.1, 0.0], lse: vec![0.0] };
    let exact = Forward { out: vec![1.0, 0.0], lse: vec![f64::INFINITY] };
    let ratio = |first, second, lse| bounds.worst(&exact, &Forward { out: vec![first, second], lse: vec![lse] });
    assert_eq!(ratio(1.0, -0.0, f64::INFINITY), (0.0, 0.0));
    assert!((ratio(0.95, 0.0, f64::INFINITY).0 - 0.5).abs() < 1e-12);
    for (first, second) in [(f64::NAN, 0.0), (f64::INFINITY, 0.0), (1.0, 1e-300), (1.0, f64::NAN)] {
        assert!(ratio(first, second, f64::INFINITY).0.is_infinite());
    }
    for lse in [f64::NAN, f64::NEG_INFINITY, 88.0] {
        assert!(ratio(1.0, 0.0, lse).1.is_infinite());
    }
}
