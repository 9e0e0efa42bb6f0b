//! Writes the texts of the backward kernels to a folder: those of the planner's tiles, for Apple's compiler.
//!
//!     cargo run -p mtlflashattn-metal --example backward_texts -- target/kernels
#![expect(clippy::print_stdout, reason = "an example talks to its user")]

use std::collections::BTreeSet;
use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use mtlflashattn_core::plan::{Chip, Gpu, Wanted, backward_passes};
use mtlflashattn_core::{Dtype, Options, Problem, TensorMeta};
use mtlflashattn_metal::BackwardKernel;

/// Head dimensions of q and k, and of v.
const SHAPES: [[i64; 2]; 6] = [[40, 40], [64, 64], [80, 80], [128, 128], [128, 64], [256, 256]];

fn problems(dtype: Dtype, [head_dim, value_dim]: [i64; 2]) -> Result<Vec<Problem>, Box<dyn Error>> {
    let meta = |shape| TensorMeta { dtype, shape, strides: &[0, 0, 0, 1] };
    let [q, k, v] = [[1, 1000, 4, head_dim], [1, 1000, 2, head_dim], [1, 1000, 2, value_dim]];
    let options = [
        Options::default(),
        Options { causal: true, ..Options::default() },
        Options { window: (100, 0), softcap: 30.0, ..Options::default() },
    ];
    let problem = |options| Problem::dense(meta(&q), meta(&k), meta(&v), options);
    options.iter().map(|options| Ok(problem(options)?)).collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(env::args_os().nth(1).ok_or("name a folder for the texts")?);
    fs::create_dir_all(&folder)?;
    let mut texts = BTreeSet::new();
    for chip in ["m1", "m3", "m5"].map(Chip::from_name) {
        let gpu = Gpu { chip, cores: chip.most_cores(), ..Gpu::SIMULATED };
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for shape in SHAPES {
                for problem in problems(dtype, shape)? {
                    let passes = backward_passes(&problem, &gpu, Wanted::INPUTS).ok_or("no tile")?;
                    let kernels =
                        passes.into_iter().map(|(pass, tile)| BackwardKernel::new(pass, &problem, tile, true));
                    texts.extend(kernels.map(|kernel| (kernel.entry(), kernel.source())));
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
