//! Metal kernels on an NVIDIA GPU: numbers against float64 on large problems, and speed against another package's
//! kernels that took the same way through clang and PTX. See `docs/gpu-proof.md`.
//!
//! `make gpu-proof`, or with arguments:
//! - `--programs FOLDER`: where translated kernels are kept (default `target/gpu-proof`)
//! - `--translate`: only fill that folder, with the kernels of all parts; needs clang and no GPU, and a machine with a GPU
//!   then needs no clang
//! - `--peer FILE`: the Python file of `mtlflashattn` 0.2.0 that holds its kernels
//! - `--numerics`, `--timing`, `--tiles`, `--smoke`, `--profile`: only this part. `--smoke` is small, for
//!   compute-sanitizer; `--profile` launches each kernel of the timing table three times, for ncu
//! - `--backward-smoke`, `--backward-numerics`, `--backward-timing`: the same for the backward pass
//! - `--decode-smoke`, `--decode-numerics`, `--decode-timing`: the same for few queries over caches, and for what is written
//!   into caches
//! - `--masks`: the mask of dropout in every kernel, bit by bit
//! - `--only TEXT`: only kernels in whose line `TEXT` stands, the name of the shape included; several must all stand there
#![allow(clippy::print_stdout, reason = "prints a report")]

mod appends;
mod cache_timing;
mod caches;
mod gradient_timing;
mod gradients;
mod masks;
mod numerics;
mod parallel;
mod peer;
mod programs;
mod random;
mod shape;
mod tiles;
mod timing;

use std::path::PathBuf;
use std::process::ExitCode;

use mtlflashattn_simulator::nvidia::Gpu;

use crate::programs::Programs;

/// What the command line asks for.
#[derive(Debug, Default)]
struct Arguments {
    programs: Option<PathBuf>,
    peer: Option<PathBuf>,
    translate: bool,
    /// Names of parts; [`USUAL`] if empty.
    parts: Vec<String>,
    wanted: Wanted,
}

/// Which kernels are run.
#[derive(Debug, Default)]
struct Wanted(Vec<String>);

impl Wanted {
    fn includes(&self, line: &str) -> bool {
        self.0.iter().all(|text| line.contains(text))
    }
}

const PARTS: [&str; 12] = [
    "--smoke",
    "--numerics",
    "--timing",
    "--tiles",
    "--profile",
    "--backward-smoke",
    "--backward-numerics",
    "--backward-timing",
    "--masks",
    "--decode-smoke",
    "--decode-numerics",
    "--decode-timing",
];
/// What is run if nothing is asked for.
const USUAL: [&str; 7] = [
    "--numerics",
    "--timing",
    "--backward-numerics",
    "--backward-timing",
    "--masks",
    "--decode-numerics",
    "--decode-timing",
];

impl Arguments {
    fn parse() -> Result<Self, String> {
        let mut arguments = Self::default();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut next = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--programs" => arguments.programs = Some(next()?.into()),
                "--peer" => arguments.peer = Some(next()?.into()),
                "--only" => arguments.wanted.0.push(next()?),
                "--translate" => arguments.translate = true,
                part if PARTS.contains(&part) => arguments.parts.push(word),
                _ => return Err(format!("unknown argument {word}")),
            }
        }
        Ok(arguments)
    }

    fn wants(&self, part: &str) -> bool {
        if self.parts.is_empty() {
            self.translate || USUAL.contains(&part)
        } else {
            self.parts.iter().any(|wanted| wanted == part)
        }
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
    let gpu = if arguments.translate { None } else { Some(Gpu::open(programs::FLOAT_PRODUCTS)) };
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
    let (peer, wanted) = (peer.as_ref(), &arguments.wanted);
    let mut all_right = true;
    if arguments.wants("--smoke") {
        all_right &= numerics::run(&programs, &numerics::small_cases(), wanted)?;
    }
    if arguments.wants("--numerics") {
        all_right &= numerics::run(&programs, &numerics::large_cases(), wanted)?;
    }
    if arguments.wants("--timing") {
        timing::compare(&programs, peer, false, wanted)?;
    }
    if arguments.wants("--tiles") {
        timing::compare(&programs, peer, true, wanted)?;
    }
    if arguments.wants("--profile") {
        timing::profile(&programs, peer, wanted)?;
    }
    if arguments.wants("--backward-smoke") {
        all_right &= gradients::run(&programs, &gradients::small_cases(), wanted)?;
    }
    if arguments.wants("--backward-numerics") {
        all_right &= gradients::run(&programs, &gradients::large_cases(), wanted)?;
    }
    if arguments.wants("--backward-timing") {
        gradient_timing::compare(&programs, wanted)?;
    }
    if arguments.wants("--masks") {
        all_right &= masks::run(&programs, wanted)?;
    }
    if arguments.wants("--decode-smoke") {
        all_right &= caches::run(&programs, &caches::small_cases(), wanted)?;
        all_right &= appends::run(&programs, false, wanted)?;
    }
    if arguments.wants("--decode-numerics") {
        all_right &= caches::run(&programs, &caches::large_cases(), wanted)?;
        all_right &= appends::run(&programs, true, wanted)?;
    }
    if arguments.wants("--decode-timing") {
        cache_timing::compare(&programs, wanted)?;
    }
    Ok(all_right)
}
