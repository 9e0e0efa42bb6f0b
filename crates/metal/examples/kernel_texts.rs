//! Writes texts of kernels to a folder, for Apple's compiler: those of the planner's tiles that `python -m metal_flash_attn
//! msl` does not print. These are the kernels of the backward pass, of dropout, and of caches.
//!
//!     cargo run -p mtlflashattn-metal --example kernel_texts -- target/kernels
#![expect(clippy::print_stdout, reason = "an example talks to its user")]

use std::collections::BTreeSet;
use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use mtlflashattn_core::plan::{Chip, Gpu, Version, Wanted, backward_passes};
use mtlflashattn_core::{
    Append, CacheOptions, Device, Dropout, Dtype, LengthsArgument, Options, Pairs, Planner, Problem, Rotary, Settings,
    Strides, TensorMeta, Tier,
};
use mtlflashattn_metal::{AppendKernel, BackwardKernel, Kernel, MergeKernel};

/// Head dimensions of q and k, and of v.
const SHAPES: [[i64; 2]; 6] = [[40, 40], [64, 64], [80, 80], [128, 128], [128, 64], [256, 256]];
/// Entry points and texts.
type Texts = BTreeSet<(&'static str, String)>;

fn problems(dtype: Dtype, [head_dim, value_dim]: [i64; 2]) -> Result<Vec<Problem>, Box<dyn Error>> {
    let meta = |shape| TensorMeta { dtype, shape, strides: &[0, 0, 0, 1] };
    let [q, k, v] = [[1, 1000, 4, head_dim], [1, 1000, 2, head_dim], [1, 1000, 2, value_dim]];
    let open = Options { window: (-1, -1), ..Options::default() };
    let options = [
        open,
        Options { causal: true, ..open },
        Options { window: (100, 0), softcap: 30.0, ..open },
        Options { causal: true, dropout: Dropout::new(0.1, 1, 2)?, ..open },
    ];
    let problem = |options| Problem::dense(meta(&q), meta(&k), meta(&v), options);
    options.iter().map(|options| Ok(problem(options)?)).collect()
}

/// Calls of a few queries over a cache: slots and pages, each with new keys.
fn cached_problems(dtype: Dtype, dim: i64) -> Result<[Problem; 2], Box<dyn Error>> {
    let meta = |shape| TensorMeta { dtype, shape, strides: &[0, 0, 0, 1] };
    let (q, k) = ([2, 4, 8, dim], [2, 4096, 2, dim]);
    let pages = [40, 256, 2, dim];
    let options = Options { causal: true, window: (-1, -1), ..Options::default() };
    let slots = CacheOptions { lengths: Some(LengthsArgument::Each(&[2])), new_len: 4, ..CacheOptions::default() };
    let paged = CacheOptions { block_table: Some((&[2, 16], &[16, 1])), ..slots };
    Ok([
        Problem::cached(meta(&q), meta(&k), meta(&k), &slots, &options)?,
        Problem::cached(meta(&q), meta(&pages), meta(&pages), &paged, &options)?,
    ])
}

fn add_backward(gpu: &Gpu, problem: &Problem, texts: &mut Texts) -> Result<(), Box<dyn Error>> {
    let passes = backward_passes(problem, gpu, Wanted::INPUTS).ok_or("no tile")?;
    let kernels = passes.into_iter().map(|(pass, tile)| BackwardKernel::new(pass, problem, tile, true));
    texts.extend(kernels.map(|kernel| (kernel.entry(), kernel.source())));
    Ok(())
}

/// The forward kernels of every tier that the GPU has.
fn add_forward(gpu: Gpu, problem: &Problem, texts: &mut Texts) {
    let settings = Settings::DEFAULT;
    let planner = Planner::new(Device::Metal(gpu), &settings);
    for tier in [Tier::Scalar, Tier::Simdgroup, Tier::Tensorops, Tier::TensoropsStaged] {
        let Ok(plan) = planner.serve(problem, tier) else { continue };
        let kernel = match (plan.metal, plan.matmul) {
            (Some(tile), Some(matmul)) => Kernel::tensorops(problem, tile, matmul, true),
            (Some(tile), None) => Kernel::simdgroup(problem, tile, true).aligned(problem, [0; 3]),
            (None, _) => Kernel::scalar(problem, true),
        };
        texts.insert((kernel.entry(), kernel.source()));
    }
}

/// The kernels of a call over a cache: what appends, what attends, what merges.
fn add_cached(gpu: Gpu, problem: &Problem, texts: &mut Texts) -> Result<(), Box<dyn Error>> {
    let settings = Settings::DEFAULT;
    let planner = Planner::new(Device::Metal(gpu), &settings);
    let tile = planner.serve(problem, Tier::Decode).map_err(|reason| reason.to_string())?.metal.ok_or("no tile")?;
    for lse in [false, true] {
        let kernel = Kernel::decode(problem, tile, lse);
        let merge = MergeKernel::of(&kernel);
        texts.extend([(kernel.entry(), kernel.source()), (merge.entry(), merge.source())]);
    }
    let rotary = Rotary {
        dim: 32,
        pairs: Pairs::Halves,
        positions: 8192,
        cos_stride: 16,
        sin_stride: 16,
        queries_advance: true,
    };
    for rotary in [None, Some(rotary)] {
        let kernel = AppendKernel::new(problem, &Append { k: Strides::default(), v: Strides::default(), rotary });
        texts.insert((kernel.entry(), kernel.source()));
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(env::args_os().nth(1).ok_or("name a folder for the texts")?);
    fs::create_dir_all(&folder)?;
    let mut texts = Texts::new();
    for chip in ["m1", "m3", "m5"].map(Chip::from_name) {
        let gpu = Gpu { chip, cores: chip.most_cores(), macos: Version::new(26, 2), ..Gpu::SIMULATED };
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for shape in SHAPES {
                for problem in problems(dtype, shape)? {
                    add_backward(&gpu, &problem, &mut texts)?;
                    if problem.dropout.is_some() {
                        add_forward(gpu, &problem, &mut texts);
                    }
                }
                for problem in cached_problems(dtype, shape[0])? {
                    add_cached(gpu, &problem, &mut texts)?;
                }
            }
        }
    }
    for (number, (entry, text)) in texts.iter().enumerate() {
        fs::write(folder.join(format!("{entry}-{number}.metal")), text)?;
    }
    println!("{} texts written", texts.len());
    Ok(())
}
