mod tuned;

use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::cpu::{MAX_PANELS, MIN_SPLIT_KEYS, TARGET_TASKS};
use super::*;
use crate::{Dtype, Options, Strides, TensorMeta};

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

fn planner(device: Device, settings: &Settings) -> Planner<'_> {
    Planner::new(device, settings)
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
    assert_eq!(plan, Plan { cpu: Some(CpuTile::new(&prefill(), 24, 8, 2)), ..Plan::of(Tier::Cpu) });
    assert_eq!(
        planner.passed_over(&prefill(), &plan),
        [
            (Tier::Decode, Reason::NeedsMetal),
            (Tier::Tensorops, Reason::NeedsMetal),
            (Tier::TensoropsStaged, Reason::NeedsMetal),
            (Tier::Simdgroup, Reason::NeedsMetal),
            (Tier::Torch, Reason::After(Tier::Cpu)),
            (Tier::Scalar, Reason::NeedsMetal),
        ]
    );
    let planner = Planner { device: Device::Torch, ..planner };
    let plan = planner.plan(&prefill()).unwrap();
    assert_eq!(plan, Plan::of(Tier::Torch));
    assert_eq!(planner.passed_over(&prefill(), &plan)[4], (Tier::Cpu, Reason::NeedsCpu));
}

#[test]
fn a_forced_tier_serves_or_the_error_says_why_not() {
    let settings = forced("pytorch");
    let planner_of_torch = planner(CPU, &settings);
    let plan = planner_of_torch.plan(&prefill()).unwrap();
    assert_eq!(plan, Plan::of(Tier::Torch));
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
    // As many splits as are asked for, where there is a block of keys for each.
    let asked = |key_len, splits| {
        let problem = Problem { splits: NonZeroUsize::new(splits), ..problem([8, 4096, 8, 64], [key_len, 8], false) };
        (key_len as usize).div_ceil(CpuTile::new(&problem, 24, 8, 2).split_keys)
    };
    assert_eq!([1, 4, 128].map(|splits| asked(65_536, splits)), [1, 4, 128]);
    assert_eq!([1, 2, 128].map(|splits| asked(300, splits)), [1, 2, 3]);
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

/// The tile for `[batch, query_len, query_heads, dim]` and `[key_len, key_heads]` on a GPU.
fn tile_of(gpu: &str, dtype: Dtype, sizes: [i64; 4], keys: [i64; 2]) -> (MetalTile, Explanation) {
    let chip = Chip::from_name(gpu);
    let gpu = Gpu { chip, cores: chip.most_cores(), ..M1 };
    let problem = Problem { dtype, ..problem(sizes, keys, false) };
    let tile = candidates(&problem, &gpu).unwrap()[0];
    (tile, explain(&problem, &gpu, &tile).unwrap())
}

fn long_tile(gpu: &str, dtype: Dtype, dim: i64) -> MetalTile {
    tile_of(gpu, dtype, [1, 8192, 16, dim], [8192, 16]).0
}

#[test]
fn long_half_sequences_have_these_tiles() {
    let tile = |simdgroups, row_fragments, keys, staged, value_chunk| MetalTile {
        simdgroups,
        row_fragments,
        keys,
        staged,
        value_chunk,
        query: QueryHome::Registers,
    };
    for chip in ["m1", "m2-ultra", "Apple Paravirtual device"] {
        assert_eq!(long_tile(chip, Dtype::F16, 64), tile(8, 2, 16, true, 64), "{chip}");
        assert_eq!(long_tile(chip, Dtype::F16, 96), tile(8, 1, 32, true, 96), "{chip}");
        assert_eq!(long_tile(chip, Dtype::F16, 128), tile(8, 1, 16, true, 128), "{chip}");
    }
    for chip in ["m3", "m4-pro", "m5-max"] {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            assert_eq!(long_tile(chip, dtype, 64), tile(4, 2, 32, false, 64), "{chip}");
            assert_eq!(long_tile(chip, dtype, 96), tile(4, 2, 16, false, 96), "{chip}");
            assert_eq!(long_tile(chip, dtype, 128), tile(4, 1, 32, false, 128), "{chip}");
        }
    }
    // Without bfloat16 units fragments are widened, and Q makes room for them.
    assert_eq!(long_tile("m1", Dtype::Bf16, 192).query, QueryHome::Threadgroup);
    assert_eq!(long_tile("m3", Dtype::Bf16, 192).query, QueryHome::Registers);
}

/// The v1 kernel of mtlflashattn 0.2 for B1 H4 L512 D64 in float16 reads 34,242,560 bytes from device memory and
/// 25,165,824 from threadgroup memory.
#[test]
fn planned_tiles_read_less_than_the_kernel_they_replace() {
    const V1_READ: [usize; 2] = [34_242_560, 25_165_824];
    const QUERY_BYTES: usize = 512 * 4 * 64 * 2;
    let read = |chip| {
        let (tile, why) = tile_of(chip, Dtype::F16, [1, 512, 4, 64], [512, 4]);
        let Traffic { device, threadgroup } = why.traffic;
        // What is staged was read from device memory once and written once.
        let staged = if tile.staged { device } else { 0 };
        (tile.staged, [device, threadgroup - staged].map(|bytes| bytes * 512 * 512 * 4 / 1024))
    };
    let (staged, [device, threadgroup]) = read("m1");
    assert!(staged && 4 * (device + QUERY_BYTES) <= V1_READ[0]);
    assert!(2 * (device + QUERY_BYTES + threadgroup) <= V1_READ[0] + V1_READ[1]);
    let (staged, [device, threadgroup]) = read("m3");
    assert!(!staged && 2 * (device + QUERY_BYTES) <= V1_READ[0]);
    assert_eq!(threadgroup, 0);
}

#[test]
fn large_head_dimensions_move_q_before_they_repeat_s() {
    let tile = long_tile("m3", Dtype::F16, 256);
    assert_eq!((tile.passes(256), tile.query), (1, QueryHome::Threadgroup));
    let tile = long_tile("m3", Dtype::F32, 512);
    assert_eq!((tile.passes(512), tile.query), (2, QueryHome::Device));
}

#[test]
fn few_rows_take_few_simdgroups_and_few_threadgroups_small_ones() {
    let (decode, _) = tile_of("m1", Dtype::F16, [1, 1, 8, 64], [4096, 8]);
    assert_eq!((decode.simdgroups, decode.row_fragments, decode.staged), (1, 1, false));
    // 8 heads of 256 rows: threadgroups of 64 rows would be 32, fewer than two for each of 40 cores.
    let (small, _) = tile_of("m3-max", Dtype::F16, [1, 256, 8, 64], [256, 8]);
    assert!(small.rows() < 64, "{small}");
}

#[test]
fn an_explanation_says_what_decided() {
    let (tile, why) = tile_of("m1", Dtype::F16, [1, 8192, 16, 64], [8192, 16]);
    // Per row and key: 128 rows share 128 columns of 2 bytes, and 16 rows read them from threadgroup memory.
    assert_eq!(why.traffic, Traffic { device: 2 * 1024, threadgroup: 2 * 1024 + 16 * 1024 });
    assert_eq!(tile.occupancy(&why.shape), Ok(why.occupancy));
    let (rival, words) = why.rival.unwrap();
    assert!(!rival.staged);
    assert_eq!(words, "fewer bytes, weighed");
    assert_eq!((why.judged, why.spilling, why.oversized), (3 * 2 * 7, 0, 0));
    let (_, why) = tile_of("m3", Dtype::F32, [1, 8192, 16, 256], [8192, 16]);
    // Two fragments of rows alone spill; staged blocks of 16 keys have 16 * 2 * 1,040 bytes.
    assert_eq!((why.judged, why.spilling, why.oversized), (3 * 2 * 7, 3 * 7, 2 * 3));
    let impossible = MetalTile { row_fragments: 8, ..tile };
    assert_eq!(explain(&prefill(), &M1, &impossible), None);
}

#[test]
fn tiles_are_refused_with_numbers() {
    let shape = occupancy::KernelShape::of(&prefill(), false);
    let tile = MetalTile {
        simdgroups: 4,
        row_fragments: 1,
        keys: 16,
        staged: true,
        value_chunk: 64,
        query: QueryHome::Registers,
    };
    let refusal = |tile: MetalTile| tile.occupancy(&shape).unwrap_err().to_string();
    assert!(tile.occupancy(&shape).is_ok());
    assert_eq!(refusal(MetalTile { row_fragments: 2, keys: 64, ..tile }), "284 16-bit registers of 256");
    assert_eq!(refusal(MetalTile { keys: 64, ..tile }), "34816 bytes of threadgroup memory of 32768");
    let crowd = MetalTile { simdgroups: 32, ..tile };
    assert_eq!(refusal(crowd), "1024 threads at once where 768 fit");
}

fn auto_on(gpu: Gpu, problem: &Problem, demotions: &Demotions) -> (Plan, Vec<(Tier, String)>) {
    let settings = Settings::DEFAULT;
    let planner = Planner { demotions, ..planner(Device::Metal(gpu), &settings) };
    let plan = planner.plan(problem).unwrap();
    let reasons = planner.passed_over(problem, &plan);
    (plan, reasons.into_iter().map(|(tier, reason)| (tier, reason.to_string())).collect())
}

#[test]
fn auto_on_metal_is_simdgroup_and_says_why_not_better() {
    let (plan, reasons) = auto_on(M1, &prefill(), Demotions::NONE);
    assert_eq!((plan.tier, plan.metal), (Tier::Simdgroup, candidates(&prefill(), &M1).ok().map(|tiles| tiles[0])));
    let text = |tier, text: &str| (tier, text.to_owned());
    assert_eq!(
        reasons,
        [
            text(Tier::Decode, "serves up to 32 queries of a sequence"),
            text(Tier::Tensorops, "needs an M5 or later; this is Apple M1"),
            text(Tier::TensoropsStaged, "needs an M5 or later; this is Apple M1"),
            text(Tier::Cpu, "needs CPU tensors"),
            text(Tier::Torch, "simdgroup comes before it and serves this call"),
            text(Tier::Scalar, "simdgroup comes before it and serves this call"),
        ]
    );
}

const M5: Gpu = Gpu { chip: Chip::M { generation: 5, size: Size::Max }, cores: 40, macos: Version::new(26, 2), ..M1 };

fn half(dim: i64, lengths: [i64; 2]) -> Problem {
    Problem { dtype: Dtype::F16, ..contiguous(dim, lengths) }
}

/// A problem with the strides of contiguous tensors.
fn contiguous(dim: i64, [query_len, key_len]: [i64; 2]) -> Problem {
    let strides = Strides { batch: key_len * 8 * dim, row: 8 * dim, head: dim };
    Problem { k: strides, v: strides, ..problem([2, query_len, 8, dim], [key_len, 8], false) }
}

fn tensorops_tile(problem: &Problem, tier: Tier, settings: &Settings) -> (MetalTile, Matmul) {
    let plan = planner(Device::Metal(M5), settings).serve(problem, tier).unwrap();
    assert_eq!(plan.tier, tier);
    (plan.metal.unwrap(), plan.matmul.unwrap())
}

#[test]
fn an_m5_takes_tensorops_and_reads_keys_where_they_lie() {
    let (plan, reasons) = auto_on(M5, &half(64, [1024, 1024]), Demotions::NONE);
    assert_eq!(plan.tier, Tier::Tensorops);
    assert_eq!(reasons[1].1, "tensorops comes before it and serves this call");
    for (dim, chunk, simdgroups) in [(64, 64, 4), (80, 80, 4), (96, 96, 4), (128, 128, 4), (192, 96, 4), (256, 128, 2)]
    {
        let (tile, matmul) = tensorops_tile(&half(dim, [1024, 1024]), Tier::Tensorops, &Settings::DEFAULT);
        let query = QueryHome::Threadgroup;
        let expected = MetalTile { simdgroups, row_fragments: 2, keys: 32, staged: false, value_chunk: chunk, query };
        assert_eq!(tile, expected, "D{dim}");
        let expected = Matmul {
            head_step: dim as usize,
            value_step: chunk,
            operands: Operands::Memory,
            weights: Weights::Registers,
            relaxed: true,
            keep_step: true,
        };
        assert_eq!(matmul, expected, "D{dim}");
    }
}

#[test]
fn what_matmul2d_cannot_read_is_loaded_by_lanes() {
    let auto = Settings::DEFAULT;
    let plain = half(64, [64, 64]);
    let odd = Strides { row: 8 * 64 + 1, ..plain.k };
    let far = Strides { row: 1 << 32, ..plain.k };
    let repeated = Strides { row: 0, ..plain.k };
    for problem in [
        half(72, [64, 64]),
        half(20, [64, 64]),
        half(64, [64, 31]),
        Problem { k: odd, ..plain },
        Problem { v: far, ..plain },
        Problem { v: repeated, ..plain },
    ] {
        let (tile, matmul) = tensorops_tile(&problem, Tier::Tensorops, &auto);
        assert_eq!((matmul.operands, matmul.head_step), (Operands::Registers, 16));
        assert_eq!((tile.query, tile.staged), (QueryHome::Registers, false));
        // Staged blocks are filled up.
        assert_eq!(tensorops_tile(&problem, Tier::TensoropsStaged, &auto).1.operands, Operands::Memory);
    }
    assert_eq!(tensorops_tile(&half(64, [64, 32]), Tier::Tensorops, &auto).1.operands, Operands::Memory);
}

#[test]
fn a_forced_tile_that_tensorops_does_not_have_is_left_to_simdgroup() {
    let tier = |tile: &str| {
        let settings = Settings { tile: TilePattern::parse(tile), ..Settings::DEFAULT };
        planner(Device::Metal(M5), &settings).plan(&half(64, [1024, 1024])).unwrap().tier
    };
    assert_eq!(
        [tier("keys=32"), tier("simdgroups=2"), tier("keys=8"), tier("row_fragments=1")],
        [Tier::Tensorops, Tier::Tensorops, Tier::Simdgroup, Tier::Simdgroup]
    );
}

#[test]
fn the_variables_of_v2_keep_their_meaning() {
    let set = |pairs: &'static [(&str, &str)]| {
        Settings::parse(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())).0
    };
    let auto = |settings: &Settings, problem: &Problem| {
        let planner = planner(Device::Metal(M5), settings);
        let plan = planner.plan(problem).unwrap();
        let reasons = planner.passed_over(problem, &plan);
        (plan.tier, reasons.into_iter().map(|(_, reason)| reason.to_string()).nth(1).unwrap())
    };
    // float32 from 2048 rows on, of queries or keys.
    let default = Settings::DEFAULT;
    let (tier, reason) = auto(&default, &contiguous(64, [2047, 2047]));
    assert_eq!(tier, Tier::Simdgroup);
    assert_eq!(reason, "2047 rows, and MTLFLASHATTN_V2_FP32_MIN_SEQ keeps it for float32 calls from 2048 on");
    assert_eq!(auto(&default, &contiguous(64, [33, 2048])).0, Tier::Tensorops);
    assert_eq!(auto(&default, &contiguous(64, [2048, 16])).0, Tier::Tensorops);
    assert_eq!(auto(&default, &half(64, [16, 16])).0, Tier::Tensorops);
    let always = set(&[("MTLFLASHATTN_V2_FP32_MIN_SEQ", "0")]);
    assert_eq!(auto(&always, &contiguous(64, [16, 16])).0, Tier::Tensorops);
    // Without P in registers.
    let without = set(&[("MTLFLASHATTN_V2_PREUSE", "0")]);
    let (tier, reason) = auto(&without, &half(64, [64, 64]));
    assert_eq!((tier, reason.as_str()), (Tier::TensoropsStaged, "MTLFLASHATTN_V2_PREUSE is off"));
    let weights = |settings: &Settings| tensorops_tile(&half(64, [64, 64]), Tier::TensoropsStaged, settings).1.weights;
    assert_eq!([weights(&without), weights(&default)], [Weights::Threadgroup, Weights::Registers]);
    let (tile, _) = tensorops_tile(&half(64, [64, 64]), Tier::TensoropsStaged, &without);
    assert_eq!(tile.query, QueryHome::Threadgroup);
    // Full precision for float32 unless TF32 is allowed.
    let relaxed = |settings: &Settings, problem: &Problem| tensorops_tile(problem, Tier::Tensorops, settings).1.relaxed;
    let tf32 = set(&[("MTLFLASHATTN_TF32", "1")]);
    let long = contiguous(64, [2048, 2048]);
    assert_eq!(
        [relaxed(&default, &long), relaxed(&tf32, &long), relaxed(&default, &half(64, [64, 64]))],
        [false, true, true]
    );
}

#[test]
fn forced_names_say_what_they_need() {
    let forced_on = |gpu: Gpu, kernel: &str, problem: &Problem| {
        let settings = forced(kernel);
        planner(Device::Metal(gpu), &settings).plan(problem).map(|plan| plan.tier)
    };
    let (single, half) = (contiguous(64, [64, 64]), half(64, [64, 64]));
    let bfloat = Problem { dtype: Dtype::Bf16, ..half };
    for (kernel, problem) in
        [("v2", &half), ("v2_fp32", &single), ("v2_bf16", &bfloat), ("v2_dtype", &single), ("v2_typed", &bfloat)]
    {
        assert_eq!(forced_on(M5, kernel, problem), Ok(Tier::Tensorops), "{kernel}");
    }
    for (kernel, problem, reason) in [
        ("v2", &single, "v2 for this call (tensorops: needs float16 tensors; these are float32) is not supported"),
        ("v2_fp32", &half, "tensorops: needs float32 tensors; these are float16"),
        ("v2_bf16", &half, "tensorops: needs bfloat16 tensors; these are float16"),
    ] {
        let error = forced_on(M5, kernel, problem).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let old = Gpu { macos: Version::new(26, 1), ..M5 };
    let error = forced_on(old, "v2_dtype", &half).unwrap_err().to_string();
    assert!(error.contains("needs macOS >= 26.2; this is macOS 26.1"), "{error}");
    let wide = Problem { head_dim: 4096, ..half };
    let error = forced_on(M5, "tensorops-staged", &wide).unwrap_err().to_string();
    assert!(error.contains("the smallest tile for head_dim 4096/64 in float16 needs "), "{error}");
    assert!(error.contains(" bytes of threadgroup memory of 32768"), "{error}");
    assert_eq!(forced_on(M5, "tensorops", &wide), Ok(Tier::Tensorops));
}

#[test]
fn the_simulator_stands_for_a_gpu_with_matmul2d_where_that_is_forced() {
    let simulator = |kernel: &str| Settings { device: settings::Device::Simulator, ..forced(kernel) };
    let plan = |settings: &Settings| planner(Device::Metal(Gpu::SIMULATED), settings).plan(&half(64, [64, 64]));
    assert_eq!(plan(&simulator("tensorops")).unwrap().tier, Tier::Tensorops);
    assert_eq!(plan(&simulator("tensorops-staged")).unwrap().tier, Tier::TensoropsStaged);
    assert_eq!(plan(&simulator("auto")).unwrap().tier, Tier::Simdgroup);
    assert!(plan(&forced("tensorops")).is_err());
}

#[test]
fn a_demoted_tier_makes_room_for_the_next() {
    let mut demotions = Demotions::default();
    assert!(demotions.demote(Tier::Simdgroup, "the compiler refused it"));
    assert!(!demotions.demote(Tier::Simdgroup, "again"));
    assert!(!demotions.demote(Tier::Torch, "never"));
    let (plan, reasons) = auto_on(M1, &prefill(), &demotions);
    assert_eq!(plan, Plan::of(Tier::Torch));
    assert_eq!(reasons[3], (Tier::Simdgroup, "failed here: the compiler refused it".to_owned()));
    let settings = forced("v1");
    let planner = Planner { demotions: &demotions, ..planner(Device::Metal(M1), &settings) };
    let error = planner.plan(&prefill()).unwrap_err().to_string();
    assert!(error.contains("v1 for this call (simdgroup: failed here: the compiler"), "{error}");
}

#[test]
fn what_no_kernel_takes_goes_to_torch() {
    let why = |gpu, problem: &Problem| {
        let (plan, reasons) = auto_on(gpu, problem, Demotions::NONE);
        assert_eq!(plan.tier, Tier::Torch);
        reasons.into_iter().find(|(tier, _)| *tier == Tier::Simdgroup).unwrap().1
    };
    let wide = problem([1, 64, 1, 64], [64, 1], false);
    let wide = Problem { value_dim: 20_000, ..wide };
    assert_eq!(why(M1, &wide), "the leanest tile for head_dim 64/20000 in float32 needs 382 16-bit registers of 256");
    let bfloat = Problem { dtype: Dtype::Bf16, ..prefill() };
    let old = Gpu { macos: Version::new(13, 6), ..M1 };
    assert_eq!(why(old, &bfloat), "needs macOS >= 14.0 for bfloat16, a type of Metal 3.1; this is macOS 13.6");
    let long = problem([1, 1, 1, 8], [(1 << 29) + 1, 1], false);
    let text = "a length or head dimension of 536870913, and Metal kernels take at most 536870912";
    assert_eq!(why(M1, &long), text);
    let wide = problem([1, 1, 1, (1 << 29) + 1], [1, 1], false);
    assert_eq!(why(M1, &wide), text);
    let widest = problem([1, 1, 1, 1 << 29], [1, 1], false);
    assert!(why(M1, &widest).starts_with("the leanest tile for head_dim 536870912 in float32 needs "));
}

#[test]
fn the_simulator_takes_cpu_tensors_from_the_engine() {
    let settings = Settings { device: settings::Device::Simulator, ..Settings::DEFAULT };
    let planner = planner(Device::Metal(Gpu::SIMULATED), &settings);
    let plan = planner.plan(&prefill()).unwrap();
    assert_eq!(plan.tier, Tier::Simdgroup);
    assert!(planner.passed_over(&prefill(), &plan).contains(&(Tier::Cpu, Reason::Simulated)));
}

fn any_gpu() -> impl Strategy<Value = Gpu> {
    const NAMES: [&str; 9] = ["m1", "m1-ultra", "m2-pro", "m3", "m3-max", "m4-max", "m5-pro", "m9-ultra", "?"];
    (prop::sample::select(&NAMES[..]), 0..100usize, 12..28u16, 0..20u16, any::<bool>()).prop_map(
        |(name, cores, macos, torch, with_torch)| Gpu {
            chip: Chip::from_name(name),
            cores,
            macos: Version::new(macos, 2),
            torch: with_torch.then_some(Version::new(2, torch)),
        },
    )
}

proptest! {
    #[test]
    fn tensorops_tiles_fit(
        dtype in prop_oneof![Just(Dtype::F16), Just(Dtype::Bf16), Just(Dtype::F32)],
        [head_dim, value_dim] in [1..=1100usize, 1..=1100usize],
        [query_len, key_len] in [0..300i64, 0..300i64],
        preuse: bool,
    ) {
        let dims = contiguous(8, [query_len, key_len]);
        let problem = Problem { dtype, head_dim, value_dim, ..dims };
        let v2_preuse = if preuse { settings::Switch::On } else { settings::Switch::Off };
        let settings = Settings { v2_preuse, v2_fp32_min_seq: 0, ..Settings::DEFAULT };
        for tier in [Tier::Tensorops, Tier::TensoropsStaged] {
            let (tile, matmul) = match matmul::candidates(&problem, tier, &settings) {
                Ok(tiles) => tiles[0],
                Err(reason) => {
                    prop_assert!(tier == Tier::TensoropsStaged && head_dim * dtype.size() > 1200, "{reason}");
                    continue;
                }
            };
            prop_assert!(matmul.fits(&tile, dtype, head_dim, value_dim), "{tile}, {matmul}");
            prop_assert_eq!(tile.staged, tier == Tier::TensoropsStaged);
            prop_assert!(tile.passes(value_dim) * tile.value_chunk >= value_dim && tile.value_chunk <= 128);
            let whole = tile.staged || matmul.operands == Operands::Registers;
            prop_assert!(whole || (key_len as usize >= tile.keys && has_plain_rows(&problem)));
        }
    }

    #[test]
    fn a_tile_exists_and_neither_spills_nor_overflows(
        gpu in any_gpu(),
        dtype in prop_oneof![Just(Dtype::F16), Just(Dtype::Bf16), Just(Dtype::F32)],
        [batch, query_len, group, key_heads] in [0..3i64, 0..5000i64, 1..5i64, 1..4i64],
        [head_dim, value_dim] in [1..=512usize, 1..=512usize],
        causal: bool,
        bias: bool,
    ) {
        let problem = problem([batch, query_len, group * key_heads, 8], [777, key_heads], causal);
        let kind = crate::BiasKind::Additive(dtype);
        let bias = bias.then_some(crate::Bias { kind, batch: 0, head: 0, query: 1, key: 1 });
        let problem = Problem { dtype, head_dim, value_dim, bias, ..problem };
        let tile = candidates(&problem, &gpu).unwrap()[0];
        let why = explain(&problem, &gpu, &tile).unwrap();
        prop_assert!(why.occupancy.halves <= 256 && why.occupancy.threads >= tile.threads(), "{tile}: {why:?}");
        prop_assert!(why.occupancy.threadgroup_bytes <= 32 * 1024);
        prop_assert!(tile.keys.is_multiple_of(8) && tile.value_chunk.is_multiple_of(8));
        prop_assert!(tile.passes(value_dim) * tile.value_chunk >= value_dim);
        prop_assert!(tile.value_chunk < value_dim + 8);
    }

    #[test]
    fn every_tier_serves_or_has_a_reason(gpu in any_gpu(), dim in 1..600i64, len in 0..9000i64) {
        let problem = problem([1, len, 2, dim], [len, 2], false);
        let (plan, reasons) = auto_on(gpu, &problem, Demotions::NONE);
        prop_assert_eq!(reasons.len(), Tier::ALL.len() - 1);
        for (tier, reason) in &reasons {
            prop_assert!(*tier != plan.tier && !reason.is_empty());
        }
        let tensorops = matches!(plan.tier, Tier::Tensorops | Tier::TensoropsStaged);
        prop_assert_eq!(plan.metal.is_some(), tensorops || plan.tier == Tier::Simdgroup);
        prop_assert_eq!(plan.matmul.is_some(), tensorops);
        prop_assert_eq!(plan.tier == Tier::Torch, gpu.lacks_for_kernels(Dtype::F32).is_some());
    }
}
