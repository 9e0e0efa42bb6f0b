//! Gradients from the engine against the float64 reference, on random problems over every feature and every instruction
//! set.

mod common;

use common::cases::cases;
use common::{Case, Gradients, Run, for_each_head_dim};
use mtlflashattn_core::{CpuBackwardTile, CpuTile};
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
    common::bits([q, k, v, sinks])
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
    let run = Run::new(&Case::large());
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
    for_each_head_dim((37, 5), |run, isa| run.check_gradients(&run.gradients(isa, &run.backward_tile(isa), 1, ALL)));
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
