//! Rates of the engine alone, against the measured FMA peak: `cargo run --release --example rate [isa]`.
#![allow(missing_docs, clippy::print_stdout)]

use mtlflashattn_core::{CpuTile, Dtype, Options, Problem, Strides, TensorMeta};
use mtlflashattn_cpu::{Inputs, Isa, Outputs, forward, roofline};

unsafe extern "C" {
    fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
}

/// CPU time of this thread, which other processes do not stretch.
fn cpu_time() -> f64 {
    let mut time = [0i64; 2];
    // SAFETY: on 64-bit Linux a timespec is two i64, and 3 is CLOCK_THREAD_CPUTIME_ID.
    unsafe { clock_gettime(3, &raw mut time) };
    time[0] as f64 + time[1] as f64 / 1e9
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Seconds of one dense call on `threads` threads.
#[allow(clippy::too_many_arguments)]
fn seconds(
    isa: Isa,
    dtype: Dtype,
    heads: (usize, usize),
    lens: (usize, usize),
    dim: usize,
    causal: bool,
    threads: usize,
    layout: bool,
) -> f64 {
    let elements = |h: usize, l: usize| h * l * dim;
    let make = |n: usize| vec![0x3c00_u16; n * dtype.size() / 2];
    let (q, k, v) = (make(elements(heads.0, lens.0)), make(elements(heads.1, lens.1)), make(elements(heads.1, lens.1)));
    let mut out = make(elements(heads.0, lens.0));
    let i = |x: usize| x as i64;
    let shape = |h: usize, l: usize| [1, i(l), i(h), i(dim)];
    let strides = |h: usize, l: usize| {
        if layout { [i(h * l * dim), i(h * dim), i(dim), 1] } else { [i(h * l * dim), i(dim), i(l * dim), 1] }
    };
    let (qs, ks) = (shape(heads.0, lens.0), shape(heads.1, lens.1));
    let (qt, kt) = (strides(heads.0, lens.0), strides(heads.1, lens.1));
    let query = TensorMeta { dtype, shape: &qs, strides: &qt };
    let key = TensorMeta { dtype, shape: &ks, strides: &kt };
    let options = Options { causal, window: (-1, -1), ..Options::default() };
    let problem = Problem::dense(query, key, key, &options).expect("a valid problem");
    let tile = CpuTile::new(&problem, isa.panel_rows(), isa.decode_rows(), threads);
    let inputs = Inputs {
        q: q.as_ptr().cast(),
        k: k.as_ptr().cast(),
        v: v.as_ptr().cast(),
        query_offsets: &[],
        key_offsets: &[],
        alibi_slopes: std::ptr::null(),
        bias: std::ptr::null(),
        sinks: std::ptr::null(),
    };
    let outputs = Outputs { out: out.as_mut_ptr().cast(), out_strides: Strides::of(&query), lse: std::ptr::null_mut() };
    let run = || unsafe { forward(&problem, &tile, isa, threads, &inputs, &outputs, &mut || false).expect("runs") };
    let repeats = if lens.0 * lens.1 <= 4096 { 500 } else { 1 };
    run();
    let n = if lens.0 == 1 { 40 } else { 9 };
    let times: Vec<f64> = (0..n)
        .map(|_| {
            let start = cpu_time();
            for _ in 0..repeats {
                run();
            }
            (cpu_time() - start) / f64::from(repeats)
        })
        .collect();
    if lens.0 == 1 {
        return times.into_iter().fold(f64::MAX, f64::min);
    }
    median(times)
}

fn main() {
    if let Some(n) = std::env::args().nth(3) {
        let isa = Isa::from_name(&std::env::args().nth(1).unwrap()).unwrap();
        let x: Vec<usize> = n.split(',').map(|v| v.parse().unwrap()).collect();
        for _ in 0..x[3] {
            let s = seconds(isa, Dtype::F32, (x[4], x[4]), (x[0], x[1]), x[2], false, 1, true);
            println!("{:.3} us {:.1}", s * 1e6, 4.0 * (x[4] * x[0] * x[1] * x[2]) as f64 / s / 1e9);
        }
        return;
    }
    let isa = std::env::args().nth(1).and_then(|name| Isa::from_name(&name)).unwrap_or(Isa::best());
    let peak = median((0..5).map(|_| roofline::fma_peak(isa)).collect());
    println!("{} FMA peak {peak:.1} GFLOP/s, read bandwidth {:.1} GB/s", isa.name(), roofline::read_bandwidth());
    let decode_only = std::env::args().nth(2).is_some();
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for (dim, len, causal) in [
            (64, 1024, false),
            (128, 1024, false),
            (64, 512, true),
            (64, 1024, true),
            (64, 2048, true),
            (8, 1024, false),
        ] {
            if decode_only {
                continue;
            }
            for layout in [false, true] {
                let s = seconds(isa, dtype, (8, 8), (len, len), dim, causal, 1, layout);
                let flops = 4.0 * 8.0 * (len * len * dim) as f64 / if causal { 2.0 } else { 1.0 };
                print!(
                    "{dtype} D{dim} L{len} causal={causal} {}: {:.1} GFLOP/s ({:.0}%)   ",
                    if layout { "BLHD" } else { "BHLD" },
                    flops / s / 1e9,
                    100.0 * flops / s / 1e9 / peak
                );
            }
            println!();
        }
        for heads in [(8, 8), (32, 8)] {
            let s = seconds(isa, dtype, heads, (1, 16384), 128, false, 1, false);
            let bytes = (2 * heads.1 * 16384 * 128 * dtype.size()) as f64;
            let s2 = seconds(isa, dtype, heads, (1, 16384), 128, false, 1, true);
            println!(
                "{dtype} decode {heads:?} 16k D128: BHLD {:.1} GB/s BLHD {:.1} GB/s",
                bytes / s / 1e9,
                bytes / s2 / 1e9
            );
        }
    }
    for (q, k) in [(4096, 5), (4096, 77)] {
        let s = seconds(isa, Dtype::F32, (8, 8), (q, k), 64, false, 1, false);
        println!("cross {q}x{k}: {:.1} GFLOP/s", 4.0 * 8.0 * (q * k * 64) as f64 / s / 1e9);
    }
}
