//! The planner and the kernels agree: on what a tile needs, and on which tiles there can be.

use mtlflashattn_core::plan::occupancy::{KernelShape, Occupancy};
use mtlflashattn_core::plan::{Chip, Gpu, Plan, Planner};
use mtlflashattn_core::{Device, Dtype, Options, Problem, Settings, TensorMeta, Tier};
use mtlflashattn_metal::{DecodeLaunch, Kernel, Launch, LseStrides, Outputs};

fn problem(dtype: Dtype, query_len: i64, [head_dim, value_dim]: [i64; 2]) -> Problem {
    let meta = |shape| TensorMeta { dtype, shape, strides: &[0, 0, 0, 1] };
    let [q, k, v] = [[2, query_len, 4, head_dim], [2, 500, 2, head_dim], [2, 500, 2, value_dim]];
    let options = Options { causal: true, window: (-1, -1), ..Options::default() };
    Problem::dense(meta(&q), meta(&k), meta(&v), &options).unwrap()
}

fn plan(problem: &Problem, gpu: Gpu) -> Plan {
    let settings = Settings::DEFAULT;
    let planner = Planner::new(Device::Metal(gpu), &settings);
    planner.plan(problem).unwrap()
}

#[test]
fn planned_tiles_of_few_queries_are_tiles_that_kernels_can_have() {
    for chip in ["m1", "m3", "m5-ultra"].map(Chip::from_name) {
        let gpu = Gpu { chip, cores: chip.most_cores(), ..Gpu::SIMULATED };
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for (head_dim, query_len) in (1..=512).step_by(7).zip([1, 3, 5, 9, 32].into_iter().cycle()) {
                let problem = problem(dtype, query_len, [head_dim, 513 - head_dim]);
                let plan = plan(&problem, gpu);
                let tile = plan.metal.unwrap();
                let kernel = Kernel::decode(&problem, tile, true);
                let text = format!("{chip} {dtype} {head_dim}, {query_len} queries: {tile}");
                assert_eq!(plan.tier, Tier::Decode, "{text}");
                assert!(kernel.fits(), "{text}");
                let outputs = Outputs { out: problem.q, lse: Some(LseStrides::contiguous(&problem)) };
                let launch = DecodeLaunch::new(&problem, &kernel, &outputs, plan.splits).unwrap();
                assert_eq!(launch.grid.group_threads() as usize, tile.threads(), "{text}");
                let rows = query_len as usize * 2;
                let row_groups = launch.grid.threadgroups[0] as usize / plan.splits;
                assert!((row_groups - 1) * kernel.rows() < rows && rows <= row_groups * kernel.rows(), "{text}");
                assert_eq!(launch.merge.is_some(), plan.splits > 1, "{text}");
            }
        }
    }
}

#[test]
fn planned_tiles_are_tiles_that_kernels_can_have() {
    for chip in ["m1", "m2-max", "m3", "m5-ultra"].map(Chip::from_name) {
        let gpu = Gpu { chip, cores: chip.most_cores(), ..Gpu::SIMULATED };
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for head_dim in (1..=512).step_by(7) {
                for (query_len, value_dim) in [(33, head_dim), (100, head_dim), (4096, 513 - head_dim)] {
                    let problem = problem(dtype, query_len, [head_dim, value_dim]);
                    let plan = plan(&problem, gpu);
                    let tile = plan.metal.unwrap();
                    let kernel = Kernel::simdgroup(&problem, tile, true);
                    let text = format!("{chip} {dtype} {head_dim}/{value_dim}: {tile}");
                    assert_eq!(plan.tier, Tier::Simdgroup);
                    assert!(kernel.fits(), "{text}");
                    let predicted = Occupancy::predict(&tile, &KernelShape::of(&problem, gpu.has_bfloat()));
                    // The prediction is in units of allocation.
                    let bytes = kernel.threadgroup_bytes();
                    assert_eq!(predicted.threadgroup_bytes, bytes.next_multiple_of(256), "{text}");
                    let outputs = Outputs { out: problem.q, lse: Some(LseStrides::contiguous(&problem)) };
                    let launch = Launch::new(&problem, &kernel, &outputs).unwrap();
                    assert_eq!(launch.grid.group_threads() as usize, tile.threads(), "{text}");
                    let threadgroups: u32 = launch.grid.threadgroups.iter().product();
                    let wanted = tile.threadgroups(&problem) * tile.passes(problem.value_dim);
                    assert_eq!(threadgroups as usize, wanted, "{text}");
                }
            }
        }
    }
}
