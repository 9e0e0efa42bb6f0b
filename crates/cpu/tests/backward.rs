//! Gradients from the engine against the float64 reference, on random problems over every feature and every instruction
//! set.

mod common;

use common::cases::cases;
use common::{Case, Gradients, Run};
use mtlflashattn_core::{CpuBackwardTile, CpuTile, Dtype};
use mtlflashattn_cpu::{Error, Isa};
use proptest::prelude::*;

const ALL: common::Wanted = [true; 4];

/// The planned tile, and one that cuts rows and keys finely.
fn tiles(run: &Run, isa: Isa) -> [CpuBackwardTile; 2] {
    let planned = run.backward_tile(isa);
    let rows = isa.panel_rows();
    let block = CpuTile { task_rows: 2 * rows, key_block: 32, ..planned.block };
    [planned, CpuBackwardTile { block, split_rows: 2 * rows }]
}

fn bits(gradients: &Gradients) -> Vec<u64> {
    let Gradients { q, k, v, sinks } = gradients;
    [q, k, v, sinks].into_iter().flatten().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn agrees_with_the_reference(case in cases()) {
        let run = Run::new(&case);
        for isa in Isa::available() {
            for tile in tiles(&run, isa) {
                if let Err(message) = run.check_gradients(&run.gradients(isa, &tile, 1, ALL)) {
                    prop_assert!(false, "{} {tile:?}: {message}", isa.name());
                }
            }
        }
    }

    #[test]
    fn threads_change_no_bit(case in cases()) {
        let run = Run::new(&case);
        for isa in Isa::available() {
            for tile in tiles(&run, isa) {
                let expected = bits(&run.gradients(isa, &tile, 1, ALL));
                for threads in [2, 5] {
                    let same = bits(&run.gradients(isa, &tile, threads, ALL)) == expected;
                    prop_assert!(same, "{} with {threads} threads", isa.name());
                }
            }
        }
    }

    #[test]
    fn what_is_not_wanted_changes_no_bit(case in cases(), wanted: [bool; 4]) {
        let run = Run::new(&case);
        let isa = Isa::best();
        let tile = run.backward_tile(isa);
        let (all, some) = (run.gradients(isa, &tile, 1, ALL), run.gradients(isa, &tile, 1, wanted));
        for (wanted, all, some) in [
            (wanted[0], &all.q, &some.q),
            (wanted[1], &all.k, &some.k),
            (wanted[2], &all.v, &some.v),
            (wanted[3] && run.problem.sinks.is_some(), &all.sinks, &some.sinks),
        ] {
            if wanted {
                prop_assert_eq!(all, some);
            } else {
                prop_assert!(some.iter().all(|x| x.is_nan()), "written, though not wanted");
            }
        }
    }
}

#[test]
fn many_threads_share_a_large_problem() {
    let case = Case {
        lengths: vec![(700, 900)],
        key_heads: 2,
        group: 2,
        head_dim: 64,
        value_dim: 64,
        causal: true,
        ..Case::default()
    };
    let run = Run::new(&case);
    for isa in Isa::available() {
        let tile = run.backward_tile(isa);
        assert!(tile.split_rows < 1400, "{tile:?} does not split");
        let single = run.gradients(isa, &tile, 1, ALL);
        run.check_gradients(&single).unwrap();
        assert_eq!(bits(&single), bits(&run.gradients(isa, &tile, 8, ALL)), "{}", isa.name());
    }
}

#[test]
fn no_head_dimension_writes_behind_its_rows() {
    for head_dim in 1..72 {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let run =
                Run::new(&Case { dtype, lengths: vec![(37, 5)], head_dim, value_dim: head_dim, ..Case::default() });
            for isa in Isa::available() {
                let gradients = run.gradients(isa, &run.backward_tile(isa), 1, ALL);
                run.check_gradients(&gradients).unwrap_or_else(|e| panic!("{} D{head_dim}: {e}", isa.name()));
            }
        }
    }
}

#[test]
fn an_interrupt_ends_a_long_call() {
    let case = Case { lengths: vec![(6000, 6000)], key_heads: 4, head_dim: 64, value_dim: 64, ..Case::default() };
    let run = Run::new(&case);
    for threads in [1, 2] {
        let mut asked = 0;
        let result = run.interrupted_gradients(Isa::Portable, threads, &mut || {
            asked += 1;
            asked == 2
        });
        assert_eq!(result, Err(Error::Interrupted));
        assert_eq!(asked, 2, "asked after the answer");
    }
}
