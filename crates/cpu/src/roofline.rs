//! What this machine can do at most: the yardstick beside every measured figure.

use std::hint::black_box;

use crate::Isa;
use crate::isa::{Simd, portable::Portable};

/// Independent chains that hide the latency of a fused multiply-add.
const CHAINS: usize = 12;
const STEPS: usize = 2_000_000;

/// CPU time of this thread in seconds, which other processes do not stretch.
fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid; the clock exists on every Unix that this builds for.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[inline(always)]
unsafe fn chains<S: Simd>() -> f32 {
    let mut acc = [S::splat(black_box(0.5)); CHAINS];
    let (x, y) = (S::splat(black_box(0.999)), S::splat(black_box(1e-3)));
    for _ in 0..STEPS {
        for acc in &mut acc {
            *acc = S::fma(*acc, x, y);
        }
    }
    acc.into_iter().map(|acc| S::sum(acc)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn chains_avx2() -> f32 {
    chains::<crate::isa::avx2::Avx2>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn chains_avx512() -> f32 {
    chains::<crate::isa::avx512::Avx512>()
}

/// Measures the multiply-add rate of one thread by its CPU time, in GFLOP/s.
///
/// # Panics
/// If this machine cannot run `isa`.
pub fn fma_peak(isa: Isa) -> f64 {
    assert!(isa.is_available(), "this machine cannot run {}", isa.name());
    let (lanes, run): (usize, unsafe fn() -> f32) = match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (8, chains_avx2),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (16, chains_avx512),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => (4, chains::<crate::isa::neon::Neon>),
        _ => (Portable::LANES, chains::<Portable>),
    };
    let start = thread_seconds();
    // SAFETY: the instruction set was just checked.
    black_box(unsafe { run() });
    (2 * STEPS * CHAINS * lanes) as f64 / (thread_seconds() - start) / 1e9
}

/// Measures how fast one thread reads memory that no cache holds, by its CPU time, in GB/s. Allocates
/// 256 MiB.
pub fn read_bandwidth() -> f64 {
    const LEN: usize = 32 << 20;
    let memory = vec![1u64; LEN];
    let start = thread_seconds();
    // Eight sums in flight, one per word of a cache line.
    let mut sums = [0u64; 8];
    for line in black_box(&memory).chunks_exact(8) {
        for (sum, word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*word);
        }
    }
    black_box(sums);
    (LEN * 8) as f64 / (thread_seconds() - start) / 1e9
}
