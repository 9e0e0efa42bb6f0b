//! AVX-512: thirty-two registers of sixteen lanes. The 8 x 32 tile needs nineteen of them, which the compiler keeps.

use std::arch::x86_64::*;

use super::{Simd, tile};

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

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

impl Simd for Avx512 {
    type Vector = __m512;
    type Row = [__m512; 2];
    const LANES: usize = 16;
    const PANEL: usize = 32;
    const TILE: usize = 8;

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
    unsafe fn scores(
        vectors: usize,
        keys: *const f32,
        key_stride: usize,
        queries: *const f32,
        depth: usize,
        scores: *mut f32,
        row_max: &mut Self::Row,
    ) {
        match vectors {
            1 => tile::scores::<Self, 8, 1>(keys, key_stride, queries, depth, scores, row_max),
            _ => tile::scores::<Self, 8, 2>(keys, key_stride, queries, depth, scores, row_max),
        }
    }

    #[inline(always)]
    unsafe fn values(
        vectors: usize,
        values: *const f32,
        probabilities: *const f32,
        keys: usize,
        out: *mut f32,
        rescale: &Self::Row,
    ) {
        match vectors {
            1 => tile::values::<Self, 8, 1>(values, probabilities, keys, out, rescale),
            _ => tile::values::<Self, 8, 2>(values, probabilities, keys, out, rescale),
        }
    }
}
