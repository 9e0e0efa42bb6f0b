//! Instruction sets: one [`Simd`] implementation each, and the choice at run time.

#![allow(clippy::wildcard_imports, reason = "intrinsics carry their origin in their names")]

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;
#[cfg(test)]
mod tests;
mod tile;

use std::sync::OnceLock;

/// Instruction set of the microkernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, vectorised by the compiler for the target's baseline.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// aarch64 with the base vector instructions.
    Neon,
}

impl Isa {
    /// Every instruction set, best last.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512];

    /// The best set of this machine, detected once.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().unwrap_or(Self::Portable))
    }

    /// The sets that this machine can run, best last.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            _ => false,
        }
    }

    /// Name in `MTLFLASHATTN_CPU_ISA` and in plans.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// The set of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// Query rows in one panel.
    pub const fn panel_rows(self) -> usize {
        match self {
            Self::Portable => portable::Portable::PANEL,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::PANEL,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::PANEL,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::Neon::PANEL,
            #[allow(unreachable_patterns, reason = "the sets of other architectures")]
            _ => portable::Portable::PANEL,
        }
    }

    /// Most query rows for which reading K and V once per four rows beats a mostly empty panel.
    pub const fn decode_rows(self) -> usize {
        8
    }
}

/// `$kernels!(simd, element[, features])` for an instruction set and a dtype that are known at run time: code that is
/// generic over [`Simd`] must be instantiated inside functions that enable `features`.
macro_rules! instantiate {
    ($kernels:ident, $isa:expr, $dtype:expr) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Isa::Avx2 => {
                $crate::isa::instantiate!($kernels, $dtype => $crate::isa::avx2::Avx2, "avx2,fma,f16c")
            }
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Isa::Avx512 => $crate::isa::instantiate!(
                $kernels, $dtype => $crate::isa::avx512::Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
            ),
            #[cfg(target_arch = "aarch64")]
            $crate::isa::Isa::Neon => $crate::isa::instantiate!($kernels, $dtype => $crate::isa::neon::Neon, "neon"),
            _ => $crate::isa::instantiate!($kernels, $dtype => $crate::isa::portable::Portable),
        }
    };
    ($kernels:ident, $dtype:expr => $simd:ty $(, $features:literal)?) => {
        match $dtype {
            mtlflashattn_core::Dtype::F32 => $kernels!($simd, f32 $(, $features)?),
            mtlflashattn_core::Dtype::F16 => $kernels!($simd, half::f16 $(, $features)?),
            mtlflashattn_core::Dtype::Bf16 => $kernels!($simd, half::bf16 $(, $features)?),
        }
    };
}
pub(crate) use instantiate;

/// Work for whichever instruction set.
pub(crate) trait Job {
    /// # Safety
    /// As for the methods of [`Simd`]. To be inlined always, into the function that enables the set.
    unsafe fn run<S: Simd>(self);
}

/// Calls a function whose body the compiler shall not see: `inline(never)` does not keep it from inlining one that enables
/// instructions.
unsafe fn call<J: Job>(function: unsafe fn(J), job: J) {
    std::hint::black_box(function)(job);
}

/// Vectors of float32 and the matrix products built on them.
///
/// A panel is `PANEL` query rows, one per lane: scores are `S^T = K Q^T` and values `O^T += V^T P^T`, so that the row
/// maximum, sum and rescaling are lane-wise and need no horizontal operation.
///
/// # Safety
/// Every method requires the instruction set to be available and pointers valid for what it names.
pub(crate) trait Simd: Copy + 'static {
    /// `LANES` float32 values.
    type Vector: Copy;
    /// The vectors of one row of a panel.
    type Row: Copy + AsRef<[Self::Vector]> + AsMut<[Self::Vector]>;
    /// Float32 values in a vector.
    const LANES: usize;
    /// Vectors that the registers hold.
    const REGISTERS: usize;
    /// Query rows in a panel: a whole number of vectors.
    const PANEL: usize;
    /// Keys of one scores tile and value columns of one values tile.
    const TILE: usize;
    /// Whether machines with this set may have an instruction for [`Self::dot_bf16`].
    const BF16_DOT: bool = false;

    /// Runs a job in a function of its own, which has all registers to itself.
    unsafe fn apart<J: Job>(job: J);
    /// [`Self::apart`] for jobs that call [`Self::dot_bf16`].
    #[inline(always)]
    unsafe fn apart_bf16<J: Job>(job: J) {
        Self::apart(job);
    }
    /// Whether this machine has it.
    fn has_bf16_dot() -> bool {
        false
    }
    /// `c` plus the products of `2 * LANES` bfloat16 values, in lanes of any order. Subnormal values count as 0.
    #[inline(always)]
    unsafe fn dot_bf16(a: *const u16, b: *const u16, c: Self::Vector) -> Self::Vector {
        let ([a0, a1], [b0, b1]) = (Self::load_bf16_pair(a), Self::load_bf16_pair(b));
        Self::fma(a1, b1, Self::fma(a0, b0, c))
    }

    unsafe fn splat(x: f32) -> Self::Vector;
    unsafe fn load(p: *const f32) -> Self::Vector;
    unsafe fn store(p: *mut f32, x: Self::Vector);
    unsafe fn load_f16(p: *const u16) -> Self::Vector;
    unsafe fn load_bf16(p: *const u16) -> Self::Vector;
    /// `2 * LANES` values, in whichever order they are cheapest to convert.
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const u16) -> [Self::Vector; 2] {
        [Self::load_bf16(p), Self::load_bf16(p.add(Self::LANES))]
    }
    /// A pair in the order of [`Self::load_bf16_pair`] becomes one in the order of memory.
    #[inline(always)]
    unsafe fn bf16_pair_in_order(pair: [Self::Vector; 2]) -> [Self::Vector; 2] {
        pair
    }
    /// Rounds to nearest even.
    unsafe fn store_f16(p: *mut u16, x: Self::Vector);
    /// Rounds to nearest even; a NaN stays a NaN.
    unsafe fn store_bf16(p: *mut u16, x: Self::Vector);
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn sub(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn div(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`.
    unsafe fn fma(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger; a NaN in `b` is returned, a NaN in `a` may be dropped.
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The smaller; a NaN in `b` is returned, a NaN in `a` may be dropped.
    unsafe fn min(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The low 9 bits of each lane moved to sign and exponent: builds powers of two.
    unsafe fn shift_to_exponent(x: Self::Vector) -> Self::Vector;
    /// `x` where `low <= key < high`, negative infinity elsewhere.
    unsafe fn keep_between(x: Self::Vector, key: Self::Vector, low: Self::Vector, high: Self::Vector) -> Self::Vector;
    unsafe fn sum(x: Self::Vector) -> f32;
    /// The sum of each vector: its lanes are added in the same order wherever it stands and whatever the others are.
    unsafe fn sums(x: [Self::Vector; 4]) -> [f32; 4];
    /// The largest lane.
    unsafe fn largest(x: Self::Vector) -> f32;
    /// `LANES` rows of `LANES` values, each times `factor`, become columns. Strides in elements.
    unsafe fn transpose(from: *const f32, from_stride: isize, factor: Self::Vector, to: *mut f32, to_stride: isize);

    /// Asks for a cache line that will be read soon; any address will do.
    unsafe fn prefetch(p: *const u8);
    /// Asks for a cache line in the second-level cache, which has room for more requests than the first has.
    unsafe fn prefetch_far(p: *const u8);

    /// `scores[TILE][PANEL] = keys[TILE][depth] x queries[depth][PANEL]`; `row_max` gains the column maxima.
    /// `depth` is a multiple of 4; `key_stride` in elements. Only the first `vectors` vectors of a row are computed.
    #[allow(clippy::too_many_arguments, reason = "two operands, their sizes, a result and its maximum")]
    unsafe fn scores(
        vectors: usize,
        keys: *const f32,
        key_stride: usize,
        queries: *const f32,
        depth: usize,
        scores: *mut f32,
        row_max: &mut Self::Row,
    );
    /// `out[TILE][PANEL] = out * rescale + values[keys][TILE]^T x probabilities[keys][PANEL]`; without `rescale` what is
    /// in `out` is not read. `keys` is a multiple of `TILE`. Only the first `vectors` vectors of a row are computed.
    unsafe fn values(
        vectors: usize,
        values: *const f32,
        probabilities: *const f32,
        keys: usize,
        out: *mut f32,
        rescale: Option<&Self::Row>,
    );
    /// `out[TILE][PANEL] += sum of weights[TILE][PANEL] x rows[PANEL][PANEL]` over `panels`: the weights of a panel lie
    /// `weights_stride` values behind those of the one before, its rows right behind them. Only the first `vectors`
    /// vectors of a row are computed.
    unsafe fn accumulate(
        vectors: usize,
        weights: *const f32,
        weights_stride: usize,
        rows: *const f32,
        panels: usize,
        out: *mut f32,
    );
}

/// The vectors of one row of a panel.
#[inline(always)]
pub(crate) unsafe fn load_row<S: Simd>(p: *const f32) -> S::Row {
    // SAFETY: a row is an array of vectors without padding, exactly `PANEL` floats.
    p.cast::<S::Row>().read_unaligned()
}

#[inline(always)]
pub(crate) unsafe fn store_row<S: Simd>(p: *mut f32, row: &S::Row) {
    p.cast::<S::Row>().write_unaligned(*row);
}
