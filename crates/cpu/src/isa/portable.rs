//! Plain Rust: eight lanes in an array, vectorised by the compiler. No fused multiply-add: without hardware support
//! `f32::mul_add` is a library call.

use half::{bf16, f16};

use super::{Job, Simd, call, tile};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

/// [`Simd::apart`].
unsafe fn apart<J: Job>(job: J) {
    job.run::<Portable>();
}

impl Simd for Portable {
    type Vector = [f32; LANES];
    type Row = [[f32; LANES]; 1];
    const LANES: usize = LANES;
    const REGISTERS: usize = 16;
    const PANEL: usize = LANES;
    const TILE: usize = 4;

    #[inline(always)]
    unsafe fn apart<J: Job>(job: J) {
        call(apart, job);
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Vector {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::Vector {
        p.cast::<[f32; LANES]>().read_unaligned()
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::Vector) {
        p.cast::<[f32; LANES]>().write_unaligned(x);
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::Vector {
        std::array::from_fn(|lane| f16::from_bits(p.add(lane).read()).to_f32())
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::Vector {
        std::array::from_fn(|lane| f32::from_bits(u32::from(p.add(lane).read()) << 16))
    }

    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::Vector) {
        for (lane, &x) in x.iter().enumerate() {
            p.add(lane).write(f16::from_f32(x).to_bits());
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, x: Self::Vector) {
        for (lane, &x) in x.iter().enumerate() {
            p.add(lane).write(bf16::from_f32(x).to_bits());
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn fma(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn shift_to_exponent(x: Self::Vector) -> Self::Vector {
        x.map(|x| f32::from_bits(x.to_bits() << 23))
    }

    #[inline(always)]
    unsafe fn keep_between(x: Self::Vector, key: Self::Vector, low: Self::Vector, high: Self::Vector) -> Self::Vector {
        std::array::from_fn(
            |lane| {
                if low[lane] <= key[lane] && key[lane] < high[lane] { x[lane] } else { f32::NEG_INFINITY }
            },
        )
    }

    #[inline(always)]
    unsafe fn sum(x: Self::Vector) -> f32 {
        ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]))
    }

    #[inline(always)]
    unsafe fn sums(x: [Self::Vector; 4]) -> [f32; 4] {
        x.map(|x| Self::sum(x))
    }

    #[inline(always)]
    unsafe fn largest(x: Self::Vector) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_stride: isize, factor: Self::Vector, to: *mut f32, to_stride: isize) {
        for row in 0..LANES {
            for (column, factor) in factor.into_iter().enumerate() {
                let x = from.offset(row as isize * from_stride).add(column).read() * factor;
                to.offset(column as isize * to_stride).add(row).write(x);
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn prefetch_far(_: *const u8) {}

    tile::products!(4 x 1, parts: [], tile::by_row::<Self, 4, 1>, tile::by_step::<Self, 4, 1>);
}
