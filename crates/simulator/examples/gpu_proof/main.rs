//! Metal kernels on an NVIDIA GPU: numbers against float64 on large problems, and speed against another package's
//! kernels that took the same way through clang and PTX. See `docs/gpu-proof.md`.
//!
//! `make gpu-proof`, or with arguments:
//! - `--programs FOLDER`: where translated kernels are kept (default `target/gpu-proof`)
//! - `--translate`: only fill that folder, which needs clang and no GPU; a machine with a GPU then needs no clang
//! - `--peer FILE`: the Python file of `mtlflashattn` 0.2.0 that holds its kernels
//! - `--numerics`, `--timing`, `--tiles`, `--smoke`: only this part; `--smoke` is small, for compute-sanitizer
#![allow(clippy::print_stdout, reason = "prints a report")]

mod numerics;
mod peer;
mod programs;
mod random;
mod timing;

use std::path::PathBuf;
use std::process::ExitCode;

use mtlflashattn_simulator::nvidia::Gpu;
use mtlflashattn_simulator::ptx::FloatProducts;

use crate::programs::Programs;

/// What the command line asks for.
#[derive(Debug, Default)]
struct Arguments {
    programs: Option<PathBuf>,
    peer: Option<PathBuf>,
    translate: bool,
    /// Names of parts; all of them if empty, but for the tiles and the smoke test.
    parts: Vec<String>,
}

impl Arguments {
    fn parse() -> Result<Self, String> {
        let mut arguments = Self::default();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut path = || words.next().map(PathBuf::from).ok_or_else(|| format!("{word} needs a path"));
            match word.as_str() {
                "--programs" => arguments.programs = Some(path()?),
                "--peer" => arguments.peer = Some(path()?),
                "--translate" => arguments.translate = true,
                "--numerics" | "--timing" | "--tiles" | "--smoke" => arguments.parts.push(word),
                _ => return Err(format!("unknown argument {word}")),
            }
        }
        Ok(arguments)
    }

    fn wants(&self, part: &str) -> bool {
        self.parts.iter().any(|wanted| wanted == part)
            || (self.parts.is_empty() && ["--numerics", "--timing"].contains(&part))
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            println!("{message}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything was right.
fn run() -> Result<bool, String> {
    let arguments = Arguments::parse()?;
    let gpu = if arguments.translate { None } else { Some(Gpu::open(FloatProducts::Split)) };
    let gpu = match gpu {
        Some(Ok(gpu)) => Some(gpu),
        Some(Err(reason)) => {
            println!("gpu-proof skipped: {reason}");
            return Ok(true);
        }
        None => None,
    };
    let folder = arguments.programs.clone().unwrap_or_else(|| PathBuf::from("target/gpu-proof"));
    let peer = arguments.peer.as_deref().map(peer::Peer::read).transpose()?;
    let programs = Programs::new(gpu.as_ref(), folder)?;
    let mut all_right = true;
    if arguments.wants("--smoke") {
        all_right &= numerics::run(&programs, &numerics::small_cases())?;
    }
    if arguments.wants("--numerics") {
        all_right &= numerics::run(&programs, &numerics::large_cases())?;
    }
    if arguments.wants("--timing") {
        timing::compare(&programs, peer.as_ref())?;
    }
    if arguments.wants("--tiles") {
        timing::tiles(&programs, peer.as_ref())?;
    }
    Ok(all_right)
}
