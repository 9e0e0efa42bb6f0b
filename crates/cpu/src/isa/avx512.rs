//! AVX-512: thirty-two registers of sixteen lanes. The compiler keeps the 8 x 32 tile in them, but once inlined into a
//! kernel it reads the distances between key rows from the stack at every step, so both products are assembly.

use std::arch::{asm, x86_64::*};

use super::{Job, Simd, call, tile};

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// One row of the tile: two vectors times one broadcast scalar.
macro_rules! row {
    ($acc0:literal, $acc1:literal, $scalar:literal, $address:expr) => {
        concat!(
            concat!("vbroadcastss zmm", $scalar, ", dword ptr [", $address, "]\n"),
            concat!("vfmadd231ps zmm", $acc0, ", zmm", $scalar, ", zmm16\n"),
            concat!("vfmadd231ps zmm", $acc1, ", zmm", $scalar, ", zmm17\n"),
        )
    };
}

/// One rank-1 update of the 8 x 32 tile: two vectors of `{b}` times eight broadcast scalars.
macro_rules! rank_one_update {
    ($b_offset:literal, [$a0:expr, $a1:expr, $a2:expr, $a3:expr, $a4:expr, $a5:expr, $a6:expr, $a7:expr]) => {
        concat!(
            concat!("vmovaps zmm16, [{b} + ", $b_offset, "]\n"),
            concat!("vmovaps zmm17, [{b} + ", $b_offset, " + 64]\n"),
            row!(0, 1, 18, $a0),
            row!(2, 3, 19, $a1),
            row!(4, 5, 20, $a2),
            row!(6, 7, 21, $a3),
            row!(8, 9, 18, $a4),
            row!(10, 11, 19, $a5),
            row!(12, 13, 20, $a6),
            row!(14, 15, 21, $a7),
        )
    };
}

/// One depth of eight key rows that lie `{ld}` bytes apart; `{a4}` is the fifth.
macro_rules! scores_step {
    ($b_offset:literal, $a_offset:literal) => {
        rank_one_update!(
            $b_offset,
            [
                concat!("{a} + ", $a_offset),
                concat!("{a} + {ld} + ", $a_offset),
                concat!("{a} + 2 * {ld} + ", $a_offset),
                concat!("{a} + {ld3} + ", $a_offset),
                concat!("{a4} + ", $a_offset),
                concat!("{a4} + {ld} + ", $a_offset),
                concat!("{a4} + 2 * {ld} + ", $a_offset),
                concat!("{a4} + {ld3} + ", $a_offset)
            ]
        )
    };
}

/// Eight value columns of one key.
macro_rules! values_step {
    ($b_offset:literal, $a_offset:literal) => {
        rank_one_update!(
            $b_offset,
            [
                concat!("{a} + ", $a_offset),
                concat!("{a} + 4 + ", $a_offset),
                concat!("{a} + 8 + ", $a_offset),
                concat!("{a} + 12 + ", $a_offset),
                concat!("{a} + 16 + ", $a_offset),
                concat!("{a} + 20 + ", $a_offset),
                concat!("{a} + 24 + ", $a_offset),
                concat!("{a} + 28 + ", $a_offset)
            ]
        )
    };
}

/// Runs `$body` `{n}` times with the tile of accumulators pinned to `zmm0..zmm15`.
macro_rules! tile_loop {
    ($acc:ident, [$($body:expr),*], $($operand:tt)*) => {
        asm!(
            "2:",
            $($body,)*
            "dec {n}",
            "jnz 2b",
            $($operand)*
            inout("zmm0") $acc[0][0], inout("zmm1") $acc[0][1], inout("zmm2") $acc[1][0], inout("zmm3") $acc[1][1],
            inout("zmm4") $acc[2][0], inout("zmm5") $acc[2][1], inout("zmm6") $acc[3][0], inout("zmm7") $acc[3][1],
            inout("zmm8") $acc[4][0], inout("zmm9") $acc[4][1], inout("zmm10") $acc[5][0], inout("zmm11") $acc[5][1],
            inout("zmm12") $acc[6][0], inout("zmm13") $acc[6][1], inout("zmm14") $acc[7][0], inout("zmm15") $acc[7][1],
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
            options(nostack, readonly)
        )
    };
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scores_tile(
    keys: *const f32,
    key_stride: usize,
    queries: *const f32,
    depth: usize,
    acc: &mut [[__m512; 2]; 8],
) {
    tile_loop!(
        acc,
        [
            scores_step!("0", "0"),
            scores_step!("128", "4"),
            scores_step!("256", "8"),
            scores_step!("384", "12"),
            "add {b}, 512",
            "add {a}, 16",
            "add {a4}, 16"
        ],
        a = inout(reg) keys => _,
        a4 = inout(reg) keys.wrapping_add(4 * key_stride) => _,
        b = inout(reg) queries => _,
        n = inout(reg) depth / 4 => _,
        ld = in(reg) key_stride * 4,
        ld3 = in(reg) key_stride * 12,
    );
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn values_tile(values: *const f32, probabilities: *const f32, keys: usize, acc: &mut [[__m512; 2]; 8]) {
    tile_loop!(
        acc,
        [values_step!("0", "0"), values_step!("128", "32"), "add {b}, 256", "add {a}, 64"],
        a = inout(reg) values => _,
        b = inout(reg) probabilities => _,
        n = inout(reg) keys / 2 => _,
    );
}

/// The 4 x 4 transposes inside the 128-bit lanes of four registers.
#[inline(always)]
unsafe fn transpose_lanes([r0, r1, r2, r3]: [__m512; 4]) -> [__m512; 4] {
    let (a, b) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
    let (c, d) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
    [
        _mm512_shuffle_ps::<0x44>(a, c),
        _mm512_shuffle_ps::<0xee>(a, c),
        _mm512_shuffle_ps::<0x44>(b, d),
        _mm512_shuffle_ps::<0xee>(b, d),
    ]
}

/// [`Simd::apart`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn apart<J: Job>(job: J) {
    job.run::<Avx512>();
}

/// [`Simd::apart_bf16`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn apart_bf16<J: Job>(job: J) {
    job.run::<Avx512>();
}

impl Simd for Avx512 {
    type Vector = __m512;
    type Row = [__m512; 2];
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const PANEL: usize = 32;
    const TILE: usize = 8;
    const BF16_DOT: bool = true;

    #[inline(always)]
    unsafe fn apart<J: Job>(job: J) {
        call(apart, job);
    }

    #[inline(always)]
    unsafe fn apart_bf16<J: Job>(job: J) {
        call(apart_bf16, job);
    }

    fn has_bf16_dot() -> bool {
        is_x86_feature_detected!("avx512bf16")
    }

    #[inline(always)]
    unsafe fn dot_bf16(a: *const u16, b: *const u16, c: __m512) -> __m512 {
        let (a, b) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
        _mm512_dpbf16_ps(c, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        _mm512_storeu_ps(p, x);
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }

    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const u16) -> [__m512; 2] {
        // Lower and upper halves of 32-bit words: no lane moves.
        let bits = _mm512_loadu_si512(p.cast());
        let upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(upper)]
    }

    #[inline(always)]
    unsafe fn bf16_pair_in_order([lower, upper]: [__m512; 2]) -> [__m512; 2] {
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        [_mm512_permutex2var_ps(lower, first, upper), _mm512_permutex2var_ps(lower, second, upper)]
    }

    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: __m512) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
    }

    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: __m512) {
        let bits = _mm512_castps_si512(x);
        // Half a unit in the last place, minus one for an even result: round to nearest even.
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        // The carry would turn some NaNs into infinities.
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x0040_0000));
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }

    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }

    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }

    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }

    #[inline(always)]
    unsafe fn shift_to_exponent(x: __m512) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(x)))
    }

    #[inline(always)]
    unsafe fn keep_between(x: __m512, key: __m512, low: __m512, high: __m512) -> __m512 {
        let keep = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(low, key) & _mm512_cmp_ps_mask::<_CMP_LT_OQ>(key, high);
        _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), keep, x)
    }

    #[inline(always)]
    unsafe fn sum(x: __m512) -> f32 {
        _mm512_reduce_add_ps(x)
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // Every step halves the lanes that belong to a sum and adds the halves of two operands.
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let abcd = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
        let half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps::<1>(abcd));
        let sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        std::mem::transmute::<__m128, [f32; 4]>(sums)
    }

    #[inline(always)]
    unsafe fn largest(x: __m512) -> f32 {
        _mm512_reduce_max_ps(x)
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: isize, factor: __m512, to: *mut f32, to_stride: isize) {
        // Quarters of rows r, r + 4, r + 8 and r + 12 share a register, so that the transposes inside lanes finish.
        let row = |row: isize| from.offset(row * from_stride);
        let factors = [
            _mm512_shuffle_f32x4::<0x00>(factor, factor),
            _mm512_shuffle_f32x4::<0x55>(factor, factor),
            _mm512_shuffle_f32x4::<0xaa>(factor, factor),
            _mm512_shuffle_f32x4::<0xff>(factor, factor),
        ];
        for (quarter, factor) in factors.into_iter().enumerate() {
            let column = 4 * quarter;
            let quarters = |r: isize| {
                let part = |block: isize| _mm_loadu_ps(row(r + 4 * block).add(column));
                let x = _mm512_castps128_ps512(part(0));
                let x = _mm512_insertf32x4::<1>(x, part(1));
                let x = _mm512_insertf32x4::<2>(x, part(2));
                _mm512_mul_ps(factor, _mm512_insertf32x4::<3>(x, part(3)))
            };
            let rows = [quarters(0), quarters(1), quarters(2), quarters(3)];
            for (i, x) in transpose_lanes(rows).into_iter().enumerate() {
                Self::store(to.offset((column + i) as isize * to_stride), x);
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }

    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }

    tile::products!(8 x 2, parts: [1], scores_tile, values_tile);
}
