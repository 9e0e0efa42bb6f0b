//! The engine against the float64 reference, on random problems over every feature and every instruction set.

mod common;

use common::cases::cases;
use common::{Case, Order, Run, for_each_head_dim};
use mtlflashattn_core::{CpuPath, CpuTile, Dtype};
use mtlflashattn_cpu::{Error, Isa};
use proptest::prelude::*;

/// The planned tile, the other path, and tiles that cut the problem finely.
fn tiles(run: &Run, isa: Isa) -> Vec<CpuTile> {
    let planned = run.tile(isa, 1);
    let fine = CpuTile { path: CpuPath::Panels, task_rows: isa.panel_rows(), split_keys: 128, ..planned };
    let mut tiles = vec![planned, CpuTile { path: CpuPath::Panels, ..fine }];
    if run.problem.lengths.max_query_len() * run.problem.group() <= 40 {
        let rows = (run.problem.lengths.max_query_len() * run.problem.group()).max(1);
        tiles.push(CpuTile { path: CpuPath::Decode, task_rows: rows, split_keys: 128, ..planned });
    }
    tiles
}

proptest! {
    #[test]
    fn agrees_with_the_reference(case in cases()) {
        let run = Run::new(&case);
        for isa in Isa::available() {
            for tile in tiles(&run, isa) {
                let results = run.engine(isa, &tile, 1);
                if let Err(message) = run.check(&results) {
                    prop_assert!(false, "{} {tile:?}: {message}", isa.name());
                }
            }
        }
    }

    #[test]
    fn neither_threads_nor_task_size_change_a_bit(case in cases(), rows in 1usize..4) {
        let run = Run::new(&case);
        for isa in Isa::available() {
            let planned = run.tile(isa, 1);
            let expected = run.engine(isa, &planned, 1);
            for threads in [1, 2, 5] {
                let mut tile = run.tile(isa, threads);
                let same = |tile: &CpuTile| bits(&run.engine(isa, tile, threads)) == bits(&expected);
                prop_assert!(same(&tile), "{} with {threads} threads", isa.name());
                if tile.path == CpuPath::Panels {
                    tile.task_rows = rows * isa.panel_rows();
                    prop_assert!(same(&tile), "{} with {} rows a task", isa.name(), tile.task_rows);
                }
            }
        }
    }
}

fn bits(results: &common::Results) -> Vec<u64> {
    common::bits([&results.out, &results.lse])
}

#[test]
fn many_threads_share_a_large_problem() {
    let run = Run::new(&Case::large());
    for isa in Isa::available() {
        let single = run.engine(isa, &run.tile(isa, 1), 1);
        run.check(&single).unwrap();
        let shared = run.engine(isa, &run.tile(isa, 8), 8);
        assert_eq!(bits(&single), bits(&shared), "{}", isa.name());
    }
}

#[test]
fn long_decode_is_split_and_merged() {
    let case = Case {
        lengths: vec![(1, 5000)],
        key_heads: 2,
        group: 4,
        head_dim: 64,
        value_dim: 64,
        spread: 4.0,
        ..Case::default()
    };
    let run = Run::new(&case);
    for isa in Isa::available() {
        let tile = run.tile(isa, 2);
        assert_eq!(tile.path, CpuPath::Decode);
        assert!(tile.split_keys < 5000, "{tile:?} does not split");
        run.check(&run.engine(isa, &tile, 2)).unwrap();
    }
}

#[test]
fn the_order_of_a_cache_changes_no_bit() {
    for (dtype, group, dims) in
        [(Dtype::F32, 1, (64, 64)), (Dtype::Bf16, 3, (72, 40)), (Dtype::Bf16, 7, (128, 64)), (Dtype::F16, 6, (8, 128))]
    {
        let ordered = |order| {
            let (lengths, (head_dim, value_dim)) = (vec![(1, 2300), (1, 2300)], dims);
            Run::new(&Case {
                dtype,
                lengths,
                key_heads: 3,
                group,
                head_dim,
                value_dim,
                alibi: 2,
                order,
                ..Case::default()
            })
        };
        let [heads_apart, side_by_side, sliced] = [Order::HeadMajor, Order::RowMajor, Order::Sliced].map(ordered);
        for isa in Isa::available() {
            let tile = heads_apart.tile(isa, 1);
            assert_eq!(tile.path, CpuPath::Decode);
            let expected = heads_apart.engine(isa, &tile, 1);
            heads_apart.check(&expected).unwrap();
            for (run, threads) in [(&side_by_side, 1), (&side_by_side, 20), (&sliced, 2)] {
                let same = bits(&run.engine(isa, &tile, threads)) == bits(&expected);
                assert!(same, "{} {dtype} with {threads} threads", isa.name());
            }
        }
    }
}

#[test]
fn no_head_dimension_writes_behind_its_rows() {
    // Full vectors of rows and a partial one.
    for_each_head_dim((37, 3), |run, isa| {
        let results = |tile: &CpuTile| run.check(&run.engine(isa, tile, 1)).map_err(|e| format!("{tile:?}: {e}"));
        tiles(run, isa).iter().try_for_each(results)
    });
}

#[test]
fn a_nan_in_any_input_reaches_the_output() {
    for path in [CpuPath::Panels, CpuPath::Decode] {
        for spread in [f64::NAN, f64::INFINITY] {
            let run = Run::new(&Case { lengths: vec![(4, 40)], spread, ..Case::default() });
            for isa in Isa::available() {
                let tile = CpuTile { path, task_rows: isa.panel_rows(), ..run.tile(isa, 1) };
                let results = run.engine(isa, &tile, 1);
                assert!(results.out.iter().all(|x| x.is_nan()), "{} {path:?}: {spread} was lost", isa.name());
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
        let result = run.interrupted(Isa::Portable, threads, &mut || {
            asked += 1;
            asked == 2
        });
        assert_eq!(result, Err(Error::Interrupted));
        assert_eq!(asked, 2, "asked after the answer");
    }
}
