//! NEON: thirty-two registers of four lanes. Both products are assembly: the compiler keeps the 8 x 12 tile in registers,
//! but reads each scalar with `ld1r`, which takes a slot of the multiply-add pipes that `fmla` by element leaves free.

use std::arch::{aarch64::*, asm};

use super::{Job, Simd, call, tile};

#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// `acc += b * scalar[lane]`.
macro_rules! fmla {
    ($acc:literal, $b:literal, $scalar:literal, $lane:literal) => {
        concat!("fmla v", $acc, ".4s, v", $b, ".4s, v", $scalar, ".s[", $lane, "]\n")
    };
}

/// One row of the tile: three vectors times one scalar.
macro_rules! row {
    ([$acc0:tt, $acc1:tt, $acc2:tt], [$b0:tt, $b1:tt, $b2:tt], $scalar:tt, $lane:tt) => {
        concat!(fmla!($acc0, $b0, $scalar, $lane), fmla!($acc1, $b1, $scalar, $lane), fmla!($acc2, $b2, $scalar, $lane))
    };
}

/// Two scalars to the low half of a register.
macro_rules! load_pair {
    ($to:literal, $address:literal) => {
        concat!("ldr d", $to, ", [", $address, "]\n")
    };
}

/// Eight scalars to `v30` and `v31`.
macro_rules! load_eight {
    ($offset:literal) => {
        concat!("ldp q30, q31, [{a}, ", $offset, "]\n")
    };
}

/// One key row at two depths: both of its scalars come with one load.
macro_rules! key {
    ($acc:tt, $scalars:tt, $address:tt) => {
        concat!(
            load_pair!($scalars, $address),
            row!($acc, [24, 25, 26], $scalars, 0),
            row!($acc, [27, 28, 29], $scalars, 1),
        )
    };
}

/// All eight value columns of one key.
macro_rules! columns {
    ($a_offset:tt, $b:tt) => {
        concat!(
            load_eight!($a_offset),
            row!([0, 1, 2], $b, 30, 0),
            row!([3, 4, 5], $b, 30, 1),
            row!([6, 7, 8], $b, 30, 2),
            row!([9, 10, 11], $b, 30, 3),
            row!([12, 13, 14], $b, 31, 0),
            row!([15, 16, 17], $b, 31, 1),
            row!([18, 19, 20], $b, 31, 2),
            row!([21, 22, 23], $b, 31, 3),
        )
    };
}

/// Runs `$body` `{n}` times with the accumulators pinned to `v0..v23` and the next two rows of `{b}` in `v24..v29`.
macro_rules! tile_loop {
    ($acc:ident, [$($body:expr),*], $($operand:tt)*) => {
        asm!(
            "2:",
            "ldp q24, q25, [{b}]",
            "ldp q26, q27, [{b}, 32]",
            "ldp q28, q29, [{b}, 64]",
            $($body,)*
            "add {b}, {b}, 96",
            "subs {n}, {n}, 1",
            "b.ne 2b",
            $($operand)*
            inout("v0") $acc[0][0], inout("v1") $acc[0][1], inout("v2") $acc[0][2],
            inout("v3") $acc[1][0], inout("v4") $acc[1][1], inout("v5") $acc[1][2],
            inout("v6") $acc[2][0], inout("v7") $acc[2][1], inout("v8") $acc[2][2],
            inout("v9") $acc[3][0], inout("v10") $acc[3][1], inout("v11") $acc[3][2],
            inout("v12") $acc[4][0], inout("v13") $acc[4][1], inout("v14") $acc[4][2],
            inout("v15") $acc[5][0], inout("v16") $acc[5][1], inout("v17") $acc[5][2],
            inout("v18") $acc[6][0], inout("v19") $acc[6][1], inout("v20") $acc[6][2],
            inout("v21") $acc[7][0], inout("v22") $acc[7][1], inout("v23") $acc[7][2],
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            options(nostack, readonly)
        )
    };
}

#[inline]
unsafe fn scores_tile(
    keys: *const f32,
    key_stride: usize,
    queries: *const f32,
    depth: usize,
    acc: &mut [[float32x4_t; 3]; 8],
) {
    tile_loop!(
        acc,
        [
            key!([0, 1, 2], 30, "{a}"),
            key!([3, 4, 5], 31, "{a}, {ld}"),
            key!([6, 7, 8], 30, "{a}, {ld2}"),
            key!([9, 10, 11], 31, "{a}, {ld3}"),
            key!([12, 13, 14], 30, "{a4}"),
            key!([15, 16, 17], 31, "{a4}, {ld}"),
            key!([18, 19, 20], 30, "{a4}, {ld2}"),
            key!([21, 22, 23], 31, "{a4}, {ld3}"),
            "add {a}, {a}, 8",
            "add {a4}, {a4}, 8"
        ],
        a = inout(reg) keys => _,
        a4 = inout(reg) keys.wrapping_add(4 * key_stride) => _,
        b = inout(reg) queries => _,
        n = inout(reg) depth / 2 => _,
        ld = in(reg) key_stride * 4,
        ld2 = in(reg) key_stride * 8,
        ld3 = in(reg) key_stride * 12,
    );
}

#[inline]
unsafe fn values_tile(values: *const f32, probabilities: *const f32, keys: usize, acc: &mut [[float32x4_t; 3]; 8]) {
    tile_loop!(
        acc,
        [columns!(0, [24, 25, 26]), columns!(32, [27, 28, 29]), "add {a}, {a}, 64"],
        a = inout(reg) values => _,
        b = inout(reg) probabilities => _,
        n = inout(reg) keys / 2 => _,
    );
}

/// [`Simd::apart`].
#[target_feature(enable = "neon")]
unsafe fn apart<J: Job>(job: J) {
    job.run::<Neon>();
}

impl Simd for Neon {
    type Vector = float32x4_t;
    type Row = [float32x4_t; 3];
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    const PANEL: usize = 12;
    const TILE: usize = 8;

    #[inline(always)]
    unsafe fn apart<J: Job>(job: J) {
        call(apart, job);
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        vdupq_n_f32(x)
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        vld1q_f32(p)
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, x: float32x4_t) {
        vst1q_f32(p, x);
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> float32x4_t {
        let x: float32x4_t;
        // The intrinsic needs Rust 1.94.
        asm!("fcvtl {x:v}.4s, {h:v}.4h", x = lateout(vreg) x, h = in(vreg) vld1_u16(p),
            options(pure, nomem, nostack, preserves_flags));
        x
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> float32x4_t {
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p)))
    }

    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: float32x4_t) {
        let h: uint16x4_t;
        asm!("fcvtn {h:v}.4h, {x:v}.4s", h = lateout(vreg) h, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
        vst1_u16(p, h);
    }

    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: float32x4_t) {
        let bits = vreinterpretq_u32_f32(x);
        // Half a unit in the last place, minus one for an even result: round to nearest even.
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        // The carry would turn some NaNs into infinities.
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        let is_number = vceqq_f32(x, x);
        vst1_u16(p, vshrn_n_u32::<16>(vbslq_u32(is_number, rounded, quiet)));
    }

    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vaddq_f32(a, b)
    }

    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vsubq_f32(a, b)
    }

    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmulq_f32(a, b)
    }

    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vdivq_f32(a, b)
    }

    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        vfmaq_f32(c, a, b)
    }

    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmaxq_f32(a, b)
    }

    #[inline(always)]
    unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vminq_f32(a, b)
    }

    #[inline(always)]
    unsafe fn shift_to_exponent(x: float32x4_t) -> float32x4_t {
        vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(x)))
    }

    #[inline(always)]
    unsafe fn keep_between(x: float32x4_t, key: float32x4_t, low: float32x4_t, high: float32x4_t) -> float32x4_t {
        let keep = vandq_u32(vcleq_f32(low, key), vcltq_f32(key, high));
        vbslq_f32(keep, x, vdupq_n_f32(f32::NEG_INFINITY))
    }

    #[inline(always)]
    unsafe fn sum(x: float32x4_t) -> f32 {
        vaddvq_f32(x)
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [float32x4_t; 4]) -> [f32; 4] {
        std::mem::transmute(vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)))
    }

    #[inline(always)]
    unsafe fn largest(x: float32x4_t) -> f32 {
        vmaxvq_f32(x)
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: isize, factor: float32x4_t, to: *mut f32, to_stride: isize) {
        let row = |row: isize| vmulq_f32(factor, vld1q_f32(from.offset(row * from_stride)));
        // Rows 0 and 2, then 1 and 3, are interleaved; interleaving the results once more finishes.
        let (even, odd) = (vzipq_f32(row(0), row(2)), vzipq_f32(row(1), row(3)));
        let (low, high) = (vzipq_f32(even.0, odd.0), vzipq_f32(even.1, odd.1));
        for (column, x) in [low.0, low.1, high.0, high.1].into_iter().enumerate() {
            vst1q_f32(to.offset(column as isize * to_stride), x);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }

    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }

    tile::products!(8 x 3, parts: [1, 2], scores_tile, values_tile);
}
