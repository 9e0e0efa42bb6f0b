use proptest::prelude::*;

use super::case::{Case, Random, Spec, specs};
use crate::reference::{backward, dot, forward};

/// Central difference of fourth order with step `h`: the error is of the order of `h^4` and of `2^-53 / h`, both far
/// below 1e-8 for inputs of order 1 and `h = 1e-3`.
fn derivative(f: impl Fn(f64) -> f64) -> f64 {
    const H: f64 = 1e-3;
    (8.0 * (f(H) - f(-H)) - (f(2.0 * H) - f(-2.0 * H))) / (12.0 * H)
}

type Tensor = fn(&mut Case) -> &mut [f64];

fn check(case: &Case, seed: u64) -> Result<(), TestCaseError> {
    let d_out =
        Random(seed).normals(case.problem.lengths.query_rows() * case.problem.query_heads * case.problem.value_dim);
    let d_lse = Random(seed ^ 1).normals(case.problem.lengths.query_rows() * case.problem.query_heads);
    let gradients = backward(&case.problem, &case.inputs(), &d_out, Some(&d_lse));
    let objective = |case: &Case| -> f64 {
        let results = forward(&case.problem, &case.inputs());
        let lse = results.lse.iter().zip(&d_lse).filter(|(lse, _)| lse.is_finite());
        dot(&results.out, &d_out) + lse.map(|(lse, d_lse)| lse * d_lse).sum::<f64>()
    };
    let tensors: [(&str, Tensor, &[f64]); 5] = [
        ("q", |case| &mut case.q, &gradients.q),
        ("k", |case| &mut case.k, &gradients.k),
        ("v", |case| &mut case.v, &gradients.v),
        ("bias", |case| case.bias.as_deref_mut().unwrap_or_default(), gradients.bias.as_deref().unwrap_or_default()),
        ("sinks", |case| case.sinks.as_deref_mut().unwrap_or_default(), gradients.sinks.as_deref().unwrap_or_default()),
    ];
    for (name, tensor, gradient) in tensors {
        prop_assert_eq!(tensor(&mut case.clone()).len(), gradient.len(), "{}", name);
        for (index, got) in gradient.iter().enumerate() {
            let want = derivative(|step| {
                let mut moved = case.clone();
                tensor(&mut moved)[index] += step;
                objective(&moved)
            });
            prop_assert!((got - want).abs() < 1e-8 * (1.0 + want.abs()), "{}[{}]: {} != {}", name, index, got, want);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn gradients_are_the_derivatives_of_the_forward_pass(spec in specs(6, 4), softcap in prop_oneof![Just(0.0), 2.0..9.0f64]) {
        // Tame enough for finite differences.
        let spec = Spec { spread: spec.spread.min(1.0), softcap, ..spec };
        check(&Case::new(&spec), spec.seed)?;
    }
}

#[test]
fn by_hand_two_equal_keys() {
    // p = 1/2 each, out = (v0 + v1) / 2; with d_out = 1: dv = 1/2, ds = p (v - out) = -1/2 and 1/2 for v = 3, 5.
    let mut case = Case::new(&Spec::plain(1, 2, 1));
    (case.q, case.k, case.v) = (vec![2.0], vec![7.0, 7.0], vec![3.0, 5.0]);
    let gradients = backward(&case.problem, &case.inputs(), &[1.0], None);
    assert_eq!(gradients.v, [0.5, 0.5]);
    assert_eq!(gradients.k, [-1.0, 1.0]);
    assert_eq!(gradients.q, [0.0]);
    assert_eq!((gradients.bias, gradients.sinks), (None, None));
}
