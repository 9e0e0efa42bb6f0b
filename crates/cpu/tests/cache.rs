//! Keys in a cache: laid out in slots or pages they give every bit that they give behind one another; new keys go where
//! they belong, rotated, and nowhere else.

mod common;

use common::cached::{Cached, Layout};
use common::cases::cases;
use common::{Case, Order, Run};
use mtlflashattn_core::{CpuPath, CpuTile, Pairs};
use mtlflashattn_cpu::Isa;
use proptest::prelude::*;

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        any::<bool>().prop_map(|padded| Layout::Slots { padded }),
        prop_oneof![Just(16), Just(48), Just(256)].prop_map(Layout::Pages),
    ]
}

fn orders() -> impl Strategy<Value = Order> {
    prop_oneof![Just(Order::RowMajor), Just(Order::HeadMajor), Just(Order::Sliced)]
}

fn bits(results: &common::Results) -> Vec<u64> {
    common::bits([&results.out, &results.lse])
}

/// Both paths, and splits.
fn tiles(run: &Run, isa: Isa) -> Vec<CpuTile> {
    let planned = run.tile(isa, 1);
    let rows = run.problem.lengths.max_query_len() * run.problem.group();
    let decode = CpuTile { path: CpuPath::Decode, task_rows: rows.max(1), split_keys: 128, ..planned };
    let panels = CpuTile { path: CpuPath::Panels, task_rows: isa.panel_rows(), split_keys: 256, ..planned };
    if rows <= 40 { vec![panels, decode] } else { vec![panels] }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn where_keys_lie_changes_no_bit(
        case in cases(),
        layout in layouts(),
        order in orders(),
        threads in 1usize..4,
    ) {
        let case = Case { packed: true, bias: common::BiasCase::None, top_left: false, ..case };
        let run = Run::new(&case);
        let cached = Cached::new(&run, &case, layout, order, 0);
        for isa in Isa::available() {
            for tile in tiles(&run, isa) {
                let expected = run.engine(isa, &tile, 1);
                let same = bits(&cached.engine(isa, &tile, threads)) == bits(&expected);
                prop_assert!(same, "{} {tile:?}", isa.name());
            }
        }
    }

    #[test]
    fn new_keys_go_where_they_belong(
        case in cases(),
        layout in layouts(),
        orders in [orders(), orders()],
        new_len in 1usize..40,
        threads in 1usize..4,
        rotary in prop_oneof![1 => Just(None), 3 => (1usize..40, any::<bool>()).prop_map(Some)],
    ) {
        let mut case = Case { packed: true, bias: common::BiasCase::None, top_left: false, spread: 1.0, ..case };
        for lengths in &mut case.lengths {
            lengths.1 += new_len;
        }
        let rotary = rotary.filter(|_| case.head_dim > 1).map(|(half, neighbours)| {
            let dim = 2 * half.min(case.head_dim / 2);
            (dim, if neighbours { Pairs::Neighbours } else { Pairs::Halves })
        });
        let run = Run::new(&case);
        for isa in Isa::available() {
            Cached::new(&run, &case, layout, orders[0], new_len).check_append(isa, threads, rotary, orders[1]);
        }
    }
}
