//! AVX2 with FMA and F16C: sixteen registers of eight lanes. The 4 x 24 tile fills all of them, and the compiler then
//! spills an accumulator into the loop (a store-forward chain that halves the speed), so both products are assembly.

use std::arch::{asm, x86_64::*};

use super::{Job, Simd, call, tile};

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// One rank-1 update of the 4 x 24 tile: three vectors of `{b}` times four broadcast scalars.
macro_rules! rank_one_update {
    ($b_offset:literal, $a0:expr, $a1:expr, $a2:expr, $a3:expr) => {
        concat!(
            "vmovaps ymm12, [{b} + ",
            $b_offset,
            "]\n",
            "vmovaps ymm13, [{b} + ",
            $b_offset,
            " + 32]\n",
            "vmovaps ymm14, [{b} + ",
            $b_offset,
            " + 64]\n",
            "vbroadcastss ymm15, dword ptr [",
            $a0,
            "]\n",
            "vfmadd231ps ymm0, ymm15, ymm12\n",
            "vfmadd231ps ymm1, ymm15, ymm13\n",
            "vfmadd231ps ymm2, ymm15, ymm14\n",
            "vbroadcastss ymm15, dword ptr [",
            $a1,
            "]\n",
            "vfmadd231ps ymm3, ymm15, ymm12\n",
            "vfmadd231ps ymm4, ymm15, ymm13\n",
            "vfmadd231ps ymm5, ymm15, ymm14\n",
            "vbroadcastss ymm15, dword ptr [",
            $a2,
            "]\n",
            "vfmadd231ps ymm6, ymm15, ymm12\n",
            "vfmadd231ps ymm7, ymm15, ymm13\n",
            "vfmadd231ps ymm8, ymm15, ymm14\n",
            "vbroadcastss ymm15, dword ptr [",
            $a3,
            "]\n",
            "vfmadd231ps ymm9, ymm15, ymm12\n",
            "vfmadd231ps ymm10, ymm15, ymm13\n",
            "vfmadd231ps ymm11, ymm15, ymm14\n",
        )
    };
}

/// Four updates along the depth of four key rows that lie `{ld}` bytes apart.
macro_rules! scores_step {
    ($b_offset:literal, $a_offset:literal) => {
        rank_one_update!(
            $b_offset,
            concat!("{a} + ", $a_offset),
            concat!("{a} + {ld} + ", $a_offset),
            concat!("{a} + 2 * {ld} + ", $a_offset),
            concat!("{a} + {ld3} + ", $a_offset)
        )
    };
}

/// Runs `$body` `$count` times with the tile of accumulators pinned to `ymm0..ymm11`.
macro_rules! tile_loop {
    ($acc:ident, [$($body:expr),*], $($operand:tt)*) => {
        asm!(
            "2:",
            $($body,)*
            "dec {n}",
            "jnz 2b",
            $($operand)*
            inout("ymm0") $acc[0][0], inout("ymm1") $acc[0][1], inout("ymm2") $acc[0][2],
            inout("ymm3") $acc[1][0], inout("ymm4") $acc[1][1], inout("ymm5") $acc[1][2],
            inout("ymm6") $acc[2][0], inout("ymm7") $acc[2][1], inout("ymm8") $acc[2][2],
            inout("ymm9") $acc[3][0], inout("ymm10") $acc[3][1], inout("ymm11") $acc[3][2],
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack, readonly)
        )
    };
}

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn scores_tile(
    keys: *const f32,
    key_stride: usize,
    queries: *const f32,
    depth: usize,
    acc: &mut [[__m256; 3]; 4],
) {
    tile_loop!(
        acc,
        [
            scores_step!("0", "0"),
            scores_step!("96", "4"),
            scores_step!("192", "8"),
            scores_step!("288", "12"),
            "add {b}, 384",
            "add {a}, 16"
        ],
        a = inout(reg) keys => _,
        b = inout(reg) queries => _,
        n = inout(reg) depth / 4 => _,
        ld = in(reg) key_stride * 4,
        ld3 = in(reg) key_stride * 12,
    );
}

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn values_tile(values: *const f32, probabilities: *const f32, keys: usize, acc: &mut [[__m256; 3]; 4]) {
    tile_loop!(
        acc,
        [
            rank_one_update!("0", "{a}", "{a} + 4", "{a} + 8", "{a} + 12"),
            rank_one_update!("96", "{a} + 16", "{a} + 20", "{a} + 24", "{a} + 28"),
            rank_one_update!("192", "{a} + 32", "{a} + 36", "{a} + 40", "{a} + 44"),
            rank_one_update!("288", "{a} + 48", "{a} + 52", "{a} + 56", "{a} + 60"),
            "add {b}, 384",
            "add {a}, 64"
        ],
        a = inout(reg) values => _,
        b = inout(reg) probabilities => _,
        n = inout(reg) keys / 4 => _,
    );
}

/// [`Simd::apart`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn apart<J: Job>(job: J) {
    job.run::<Avx2>();
}

impl Simd for Avx2 {
    type Vector = __m256;
    type Row = [__m256; 3];
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const PANEL: usize = 24;
    const TILE: usize = 4;

    #[inline(always)]
    unsafe fn apart<J: Job>(job: J) {
        call(apart, job);
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        _mm256_loadu_ps(p)
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m256) {
        _mm256_storeu_ps(p, x);
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }

    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const u16) -> [__m256; 2] {
        // Lower and upper halves of 32-bit words: no lane moves.
        let bits = _mm256_loadu_si256(p.cast());
        let upper = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)), _mm256_castsi256_ps(upper)]
    }

    #[inline(always)]
    unsafe fn bf16_pair_in_order([lower, upper]: [__m256; 2]) -> [__m256; 2] {
        let (even, odd) = (_mm256_unpacklo_ps(lower, upper), _mm256_unpackhi_ps(lower, upper));
        [_mm256_permute2f128_ps::<0x20>(even, odd), _mm256_permute2f128_ps::<0x31>(even, odd)]
    }

    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: __m256) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
    }

    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: __m256) {
        let bits = _mm256_castps_si256(x);
        // Half a unit in the last place, minus one for an even result: round to nearest even.
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        // The carry would turn some NaNs into infinities.
        let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
        let packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high));
        _mm_storeu_si128(p.cast(), packed);
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }

    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        _mm256_sub_ps(a, b)
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }

    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        _mm256_div_ps(a, b)
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        _mm256_max_ps(a, b)
    }

    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        _mm256_min_ps(a, b)
    }

    #[inline(always)]
    unsafe fn shift_to_exponent(x: __m256) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(x)))
    }

    #[inline(always)]
    unsafe fn keep_between(x: __m256, key: __m256, low: __m256, high: __m256) -> __m256 {
        let keep = _mm256_and_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(low, key), _mm256_cmp_ps::<_CMP_LT_OQ>(key, high));
        _mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), x, keep)
    }

    #[inline(always)]
    unsafe fn sum(x: __m256) -> f32 {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        // Every step halves the lanes that belong to a sum and adds the halves of two operands.
        let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        let abcd = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
        let sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd));
        std::mem::transmute::<__m128, [f32; 4]>(sums)
    }

    #[inline(always)]
    unsafe fn largest(x: __m256) -> f32 {
        let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: isize, factor: __m256, to: *mut f32, to_stride: isize) {
        // Halves of rows r and r + 4 share a register, so that the 4 x 4 transposes inside lanes finish the job.
        let row = |row: isize| from.offset(row * from_stride);
        for column in [0, 4] {
            let factor = if column == 0 { _mm256_castps256_ps128(factor) } else { _mm256_extractf128_ps::<1>(factor) };
            let factor = _mm256_set_m128(factor, factor);
            let pair = |r: isize| {
                let low = _mm256_castps128_ps256(_mm_loadu_ps(row(r).add(column)));
                let both = _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(row(r + 4).add(column)));
                _mm256_mul_ps(both, factor)
            };
            let (r0, r1, r2, r3) = (pair(0), pair(1), pair(2), pair(3));
            let (a, b) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
            let (c, d) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
            let to = |i: isize| to.offset((column as isize + i) * to_stride);
            Self::store(to(0), _mm256_shuffle_ps::<0x44>(a, c));
            Self::store(to(1), _mm256_shuffle_ps::<0xee>(a, c));
            Self::store(to(2), _mm256_shuffle_ps::<0x44>(b, d));
            Self::store(to(3), _mm256_shuffle_ps::<0xee>(b, d));
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

    tile::products!(4 x 3, parts: [1, 2], scores_tile, values_tile);
}
