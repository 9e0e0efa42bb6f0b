//! What this machine can do at most: the yardstick beside every measured figure.

use std::hint::black_box;

use crate::Isa;
use crate::isa::{Simd, portable::Portable};

const STEPS: usize = 2_000_000;

/// CPU time of this thread in seconds, which other processes do not stretch.
fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid; the clock exists on every Unix that this builds for.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Runs `CHAINS` independent chains of multiply-adds that accumulate in place, as `fmla` does: enough to hide its
/// latency, but no more than there are registers.
#[inline(always)]
unsafe fn chains<S: Simd, const CHAINS: usize>() -> f32 {
    let mut acc = [S::splat(black_box(0.5)); CHAINS];
    let (x, y) = (S::splat(black_box(0.999)), S::splat(black_box(1e-3)));
    for _ in 0..STEPS {
        for acc in &mut acc {
            *acc = S::fma(x, y, *acc);
        }
    }
    acc.into_iter().map(|acc| S::sum(acc)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn chains_avx2() -> f32 {
    chains::<crate::isa::avx2::Avx2, 12>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn chains_avx512() -> f32 {
    chains::<crate::isa::avx512::Avx512, 24>()
}

/// Measures the multiply-add rate of one thread by its CPU time, in GFLOP/s.
///
/// # Panics
/// If this machine cannot run `isa`.
pub fn fma_peak(isa: Isa) -> f64 {
    assert!(isa.is_available(), "this machine cannot run {}", isa.name());
    let (flops, run): (usize, unsafe fn() -> f32) = match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (2 * 8 * 12, chains_avx2),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (2 * 16 * 24, chains_avx512),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => (2 * 4 * 24, chains::<crate::isa::neon::Neon, 24>),
        _ => (2 * Portable::LANES * 12, chains::<Portable, 12>),
    };
    let start = thread_seconds();
    // SAFETY: the instruction set was just checked.
    black_box(unsafe { run() });
    (STEPS * flops) as f64 / (thread_seconds() - start) / 1e9
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
