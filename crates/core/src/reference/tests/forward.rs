use proptest::prelude::*;

use super::case::{Case, Sequences, Spec, specs};
use crate::reference::{Forward, forward};
use crate::{Alignment, Dropout, Problem};

/// One query `[1]` against keys whose scores are their only element, with one-dimensional values.
fn one_query(scores: &[f64], values: &[f64], edit: impl FnOnce(&mut Case)) -> (f64, f64) {
    let mut case = Case::new(&Spec::plain(1, scores.len(), 1));
    (case.q, case.k, case.v) = (vec![1.0], scores.to_vec(), values.to_vec());
    edit(&mut case);
    let Forward { out, lse } = forward(&case.problem, &case.inputs());
    (out[0], lse[0])
}

#[track_caller]
fn assert_close((out, lse): (f64, f64), want_out: f64, want_lse: f64) {
    assert!((out - want_out).abs() < 1e-6 && (lse - want_lse).abs() < 1e-6, "{out} {lse}, not {want_out} {want_lse}");
}

fn with_sinks(case: &mut Case, sink: f64) {
    case.problem.sinks = Some(1);
    case.sinks = Some(vec![sink]);
}

#[test]
fn by_hand_two_keys_weigh_one_quarter_and_three_quarters() {
    assert_close(one_query(&[0.0, 3f64.ln()], &[8.0, 4.0], |_| ()), 5.0, 4f64.ln());
}

#[test]
fn by_hand_a_sink_takes_half() {
    let result = one_query(&[0.0, 3f64.ln()], &[8.0, 4.0], |case| with_sinks(case, 4f64.ln()));
    assert_close(result, 2.5, 8f64.ln());
}

#[test]
fn by_hand_softcap_squashes_before_alibi() {
    // 2 tanh(x / 2) = ln 3 for this x; then one key of distance means a factor of one half.
    let x = 2.0 * (3f64.ln() / 2.0).atanh();
    let result = one_query(&[0.0, x], &[8.0, 4.0], |case| {
        case.problem.softcap = 2.0;
        case.problem.alibi = Some(crate::problem::AlibiStrides { batch: 0, head: 1 });
        case.alibi_slopes = Some(vec![2f64.ln()]);
    });
    // Weights 1 / 2 (distance 1 from the last key) and 3.
    assert_close(result, (0.5 * 8.0 + 3.0 * 4.0) / 3.5, 3.5f64.ln());
}

#[test]
fn by_hand_the_scale_multiplies_the_product() {
    let result = one_query(&[0.0, 2.0 * 3f64.ln()], &[8.0, 4.0], |case| case.problem.scale = 0.5);
    assert_close(result, 5.0, 4f64.ln());
}

#[test]
fn by_hand_dropout_keeps_half_of_the_keys_and_doubles_them() {
    let dropout = Dropout::new(0.5, 1, 2).unwrap().unwrap();
    let (scores, values) = (vec![0.0; 32], (0..32).map(f64::from).collect::<Vec<_>>());
    let kept: f64 = (0..32).filter(|&key| dropout.keeps(0, 0, key)).map(|key| key as f64).sum();
    let result = one_query(&scores, &values, |case| case.problem.dropout = Some(dropout));
    assert_close(result, 2.0 * kept / 32.0, 32f64.ln());
}

#[test]
fn rows_without_keys_are_zero_with_infinite_lse() {
    let hidden = |case: &mut Case| {
        case.problem.bias = Case::new(&Spec { bias: true, ..Spec::plain(1, 2, 1) }).problem.bias;
        case.bias = Some(vec![f64::NEG_INFINITY; 2]);
    };
    assert_eq!(one_query(&[0.0, 1.0], &[8.0, 4.0], hidden), (0.0, f64::INFINITY));
    assert_eq!(one_query(&[], &[], |_| ()), (0.0, f64::INFINITY));
    assert_eq!(one_query(&[], &[], |case| with_sinks(case, f64::NEG_INFINITY)), (0.0, f64::INFINITY));
}

#[test]
fn a_sink_without_keys_is_the_lse() {
    assert_eq!(one_query(&[], &[], |case| with_sinks(case, -1.5)), (0.0, -1.5));
}

#[test]
fn scores_beyond_the_range_of_exp_are_harmless() {
    assert_close(one_query(&[5000.0, 5000.0], &[8.0, 4.0], |_| ()), 6.0, 5000.0 + 2f64.ln());
}

#[test]
#[should_panic(expected = "k has Some(5) elements, the problem wants Some(6)")]
fn inputs_of_the_wrong_size_are_refused() {
    let mut case = Case::new(&Spec::plain(2, 3, 2));
    case.k.pop();
    let _ = forward(&case.problem, &case.inputs());
}

/// Whole matrices of weights, without a maximum, straight from the definition of the band.
fn naive(case: &Case) -> Forward {
    let problem = &case.problem;
    let (heads, key_heads) = (problem.query_heads, problem.key_heads);
    let rows = problem.lengths.query_rows();
    let mut result =
        Forward { out: vec![0.0; rows * heads * problem.value_dim], lse: vec![f64::INFINITY; rows * heads] };
    for (batch, [(query_start, query_len), (key_start, key_len)]) in case.sequences().into_iter().enumerate() {
        for head in 0..heads {
            let key_head = head * key_heads / heads;
            let mut weights = vec![vec![0.0; key_len]; query_len];
            for (i, weights) in weights.iter_mut().enumerate() {
                for (j, weight) in weights.iter_mut().enumerate() {
                    let mut score = 0.0;
                    for c in 0..problem.head_dim {
                        score += case.q[((query_start + i) * heads + head) * problem.head_dim + c]
                            * case.k[((key_start + j) * key_heads + key_head) * problem.head_dim + c];
                    }
                    score *= f64::from(problem.scale);
                    if problem.softcap != 0.0 {
                        score = f64::from(problem.softcap) * (score / f64::from(problem.softcap)).tanh();
                    }
                    let distance = band_distance(problem, (i, query_len), (j, key_len));
                    if let Some(slopes) = &case.alibi_slopes {
                        score -= slopes[batch * heads + head] * distance.abs() as f64;
                    }
                    if let Some(bias) = &case.bias {
                        score += bias[((batch * heads + head) * query_len + i) * key_len + j];
                    }
                    *weight = if in_band(problem, distance) { score.exp() } else { 0.0 };
                }
            }
            for (i, weights) in weights.iter().enumerate() {
                let sink = case.sinks.as_ref().map_or(0.0, |sinks| sinks[head].exp());
                let total = sink + weights.iter().sum::<f64>();
                if total == 0.0 {
                    continue;
                }
                let token = query_start + i;
                let lse = if case.query_offsets.is_empty() {
                    (batch * heads + head) * query_len + i
                } else {
                    head * rows + token
                };
                result.lse[lse] = total.ln();
                for c in 0..problem.value_dim {
                    result.out[(token * heads + head) * problem.value_dim + c] = (0..key_len)
                        .map(|j| {
                            let dropout = problem.dropout;
                            let kept = dropout.is_none_or(|dropout| dropout.keeps(batch * heads + head, i, j));
                            let factor = dropout.map_or(1.0, |dropout| 1.0 / (1.0 - dropout.probability()));
                            f64::from(u8::from(kept)) * factor * weights[j] / total
                                * case.v[((key_start + j) * key_heads + key_head) * problem.value_dim + c]
                        })
                        .sum();
                }
            }
        }
    }
    result
}

fn band_distance(problem: &Problem, (i, query_len): (usize, usize), (j, key_len): (usize, usize)) -> i64 {
    let offset = match problem.mask.alignment {
        Alignment::BottomRight => key_len as i64 - query_len as i64,
        Alignment::TopLeft => 0,
    };
    j as i64 - (i as i64 + offset)
}

fn in_band(problem: &Problem, distance: i64) -> bool {
    problem.mask.left.is_none_or(|left| distance >= -(left as i64))
        && problem.mask.right.is_none_or(|right| distance <= right as i64)
}

/// Whether the values agree to the last few digits, or are both infinite.
fn agree(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.total_cmp(b).is_eq() || (a - b).abs() < 1e-12)
}

proptest! {
    #[test]
    fn matches_whole_matrices(spec in specs(12, 8)) {
        let case = Case::new(&Spec { spread: spec.spread.min(1.0), ..spec });
        let (fast, slow) = (forward(&case.problem, &case.inputs()), naive(&case));
        prop_assert!(agree(&fast.out, &slow.out));
        prop_assert!(agree(&fast.lse, &slow.lse));
    }

    #[test]
    fn packing_a_batch_changes_only_the_layout_of_the_lse(spec in specs(10, 6), batch in 1..3usize, len in (0..10usize, 0..10usize)) {
        let (query_len, key_len) = len;
        let dense = Spec { sequences: Sequences::Dense { batch, query_len, key_len }, bias: false, ..spec };
        let packed = Spec { sequences: Sequences::Packed { lengths: vec![len; batch], gap: 0 }, ..dense.clone() };
        let (dense, packed) = (Case::new(&dense), Case::new(&packed));
        let dense_result = forward(&dense.problem, &dense.inputs());
        let packed_result = forward(&packed.problem, &packed.inputs());
        prop_assert_eq!(dense_result.out, packed_result.out);
        let heads = dense.problem.query_heads;
        for (index, lse) in dense_result.lse.iter().enumerate() {
            let (batch_index, head, query) = (index / query_len / heads, index / query_len % heads, index % query_len);
            let packed = packed_result.lse[(head * batch + batch_index) * query_len + query];
            prop_assert!(packed.total_cmp(lse).is_eq());
        }
    }

    #[test]
    fn a_constant_bias_moves_only_the_lse(spec in specs(10, 6), lens in (0..10usize, 0..10usize), shift in -3.0..3.0f64) {
        let sequences = Sequences::Dense { batch: 2, query_len: lens.0, key_len: lens.1 };
        let mut case = Case::new(&Spec { sequences, bias: true, sinks: false, ..spec });
        let before = forward(&case.problem, &case.inputs());
        case.bias.as_mut().unwrap().iter_mut().for_each(|bias| *bias += shift);
        let after = forward(&case.problem, &case.inputs());
        prop_assert!(agree(&before.out, &after.out));
        let moved: Vec<f64> = before.lse.iter().map(|lse| lse + shift).collect();
        prop_assert!(agree(&moved, &after.lse));
    }
}
