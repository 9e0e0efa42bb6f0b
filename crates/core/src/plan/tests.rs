use proptest::prelude::*;

use super::cpu::{MAX_PANELS, MIN_SPLIT_KEYS, TARGET_TASKS};
use super::*;
use crate::{Dtype, Options, TensorMeta};

const CPU: Device = Device::Cpu { panel_rows: 24, decode_rows: 8, threads: 2 };

/// `[batch, query_len, query_heads, dim]` and `[batch, key_len, key_heads, dim]`.
fn problem([batch, query_len, query_heads, dim]: [i64; 4], [key_len, key_heads]: [i64; 2], causal: bool) -> Problem {
    let meta = |shape| TensorMeta { dtype: Dtype::F32, shape, strides: &[0, 0, 0, 1] };
    let (q, k) = ([batch, query_len, query_heads, dim], [batch, key_len, key_heads, dim]);
    let options = Options { causal, window: (-1, -1), ..Options::default() };
    Problem::dense(meta(&q), meta(&k), meta(&k), &options).unwrap()
}

fn prefill() -> Problem {
    problem([1, 1024, 8, 64], [1024, 8], false)
}

fn forced(kernel: &str) -> Settings {
    Settings::parse(|name| (name == "MTLFLASHATTN_KERNEL").then(|| kernel.to_owned())).0
}

fn planner<'a>(device: Device, settings: &'a Settings) -> Planner<'a> {
    Planner { device, settings, demotions: Demotions::NONE }
}

const M1: Gpu = Gpu {
    chip: Chip::M { generation: 1, size: Size::Base },
    cores: 8,
    macos: Version::new(15, 0),
    torch: Some(Version::new(2, 15)),
};

#[test]
fn auto_takes_the_engine_for_cpu_tensors_and_torch_elsewhere() {
    let auto = Settings::DEFAULT;
    let planner = planner(CPU, &auto);
    let plan = planner.plan(&prefill()).unwrap();
    assert_eq!(plan, Plan { tier: Tier::Cpu, cpu: Some(CpuTile::new(&prefill(), 24, 8, 2)), metal: None });
    assert_eq!(
        planner.passed_over(&prefill(), &plan),
        [
            (Tier::Tensorops, Reason::NeedsMetal),
            (Tier::TensoropsStaged, Reason::NeedsMetal),
            (Tier::Simdgroup, Reason::NeedsMetal),
            (Tier::Torch, Reason::After(Tier::Cpu)),
            (Tier::Scalar, Reason::NeedsMetal),
        ]
    );
    let planner = Planner { device: Device::Torch, ..planner };
    let plan = planner.plan(&prefill()).unwrap();
    assert_eq!(plan, Plan { tier: Tier::Torch, cpu: None, metal: None });
    assert_eq!(planner.passed_over(&prefill(), &plan)[3], (Tier::Cpu, Reason::NeedsCpu));
}

#[test]
fn a_forced_tier_serves_or_the_error_says_why_not() {
    let settings = forced("pytorch");
    let planner_of_torch = planner(CPU, &settings);
    let plan = planner_of_torch.plan(&prefill()).unwrap();
    assert_eq!(plan, Plan { tier: Tier::Torch, cpu: None, metal: None });
    assert!(planner_of_torch.passed_over(&prefill(), &plan).contains(&(Tier::Cpu, Reason::NotForced("pytorch"))));
    let m1 = Device::Metal(M1);
    for (kernel, device, tier_and_reason) in [
        ("v2_fp32", CPU, "tensorops: needs tensors on an MPS device"),
        ("v0", Device::Torch, "scalar: needs tensors on an MPS device"),
        ("cpu", Device::Torch, "cpu: needs CPU tensors"),
        ("cpu", m1, "cpu: needs CPU tensors"),
        ("v2r", m1, "tensorops: needs an M5 or later; this is Apple M1"),
    ] {
        assert_eq!(
            planner(device, &forced(kernel)).plan(&prefill()).unwrap_err().to_string(),
            format!(
                "MTLFLASHATTN_KERNEL: {kernel} for this call ({tier_and_reason}) is not supported; \
                 unset the variable, or set it to auto"
            )
        );
    }
}

#[test]
fn few_rows_take_the_decode_path() {
    // Four query heads share a key head: two queries are eight rows.
    let path = |query_len| CpuTile::new(&problem([1, query_len, 8, 64], [512, 2], false), 24, 8, 1).path;
    assert_eq!([path(0), path(1), path(2), path(3)].map(|path| path == CpuPath::Decode), [true, true, true, false]);
    assert_eq!(CpuTile::new(&problem([1, 2, 8, 64], [512, 2], false), 24, 8, 1).task_rows, 8);
}

#[test]
fn keys_are_split_where_there_are_too_few_rows_to_share() {
    let split = |sizes, keys| CpuTile::new(&problem(sizes, keys, false), 24, 8, 2).split_keys;
    // One head of one row over 65,536 keys: as many splits as tasks are wanted.
    assert_eq!(split([1, 1, 1, 64], [65_536, 1]), 1024);
    // Below the fewest keys that repay a merge.
    assert!(split([1, 1, 1, 64], [1500, 1]) >= 1500);
    // Enough rows: nothing is split.
    assert!(split([8, 4096, 8, 64], [65_536, 8]) >= 65_536);
}

proptest! {
    #[test]
    fn tiles_are_whole_panels_and_the_split_does_not_depend_on_threads(
        sizes in [0..4i64, 0..5000i64, 1..4i64, 1..600i64],
        key_len in 0..100_000i64,
        key_heads in 1..4i64,
        causal: bool,
        panel_rows in prop_oneof![Just(12usize), Just(24), Just(48)],
        threads in 1..65usize,
    ) {
        let [batch, query_len, group, dim] = sizes;
        let problem = problem([batch, query_len, group * key_heads, dim], [key_len, key_heads], causal);
        let tile = CpuTile::new(&problem, panel_rows, 8, threads);
        let single = CpuTile::new(&problem, panel_rows, 8, 1);
        prop_assert_eq!(CpuTile { task_rows: 0, ..tile }, CpuTile { task_rows: 0, ..single });
        prop_assert!(tile.key_block > 0 && tile.split_keys.is_multiple_of(tile.key_block));
        let splits = (key_len as usize).div_ceil(tile.split_keys);
        prop_assert!(splits <= 1 || tile.split_keys >= MIN_SPLIT_KEYS);
        prop_assert!(splits <= TARGET_TASKS);
        match tile.path {
            CpuPath::Decode => prop_assert!(tile.task_rows >= (query_len * group) as usize),
            CpuPath::Panels => {
                prop_assert!(tile.task_rows.is_multiple_of(panel_rows));
                prop_assert!((1..=MAX_PANELS).contains(&(tile.task_rows / panel_rows)));
            }
        }
    }
}

#[test]
fn show() {
    for (name, cores) in [("m1", 8), ("m3-max", 40)] {
        let gpu = Gpu { chip: Chip::from_name(name), cores, ..M1 };
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for dim in [32, 40, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512, 576, 1024, 2048] {
                let meta = |shape| TensorMeta { dtype, shape, strides: &[0, 0, 0, 1] };
                let (q, k) = ([1, 8192, 16, dim], [1, 8192, 4, dim]);
                let options = Options { causal: true, window: (-1, -1), ..Options::default() };
                let problem = Problem::dense(meta(&q), meta(&k), meta(&k), &options).unwrap();
                match metal::choose(&problem, &gpu) {
                    Ok(tile) => {
                        let shape = occupancy::KernelShape::of(&problem, gpu.has_bfloat());
                        let o = tile.occupancy(&shape).unwrap();
                        println!(
                            "{name} {dtype} {dim}: {tile} | {} {} {}B {}",
                            o.halves, o.threads, o.threadgroup_bytes, o.threadgroups
                        );
                    }
                    Err(r) => println!("{name} {dtype} {dim}: {r}"),
                }
            }
        }
    }
}
