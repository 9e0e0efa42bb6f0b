//! Element types in memory: converted to float32 when they are read, rounded when they are written.

use half::{bf16, f16};

use crate::isa::Simd;

/// An element of q, k, v or out.
pub(crate) trait Element: Copy + 'static {
    /// Whether an element is a float32 already and can be used where it lies.
    const IS_F32: bool;
    unsafe fn load<S: Simd>(p: *const Self) -> S::Vector;
    /// `2 * LANES` elements, in whichever order they are cheapest to convert.
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const Self) -> [S::Vector; 2] {
        [Self::load::<S>(p), Self::load::<S>(p.add(S::LANES))]
    }
    /// A pair in the order of [`Self::load_pair`] becomes one in the order of memory.
    #[inline(always)]
    unsafe fn in_order<S: Simd>(pair: [S::Vector; 2]) -> [S::Vector; 2] {
        pair
    }
    unsafe fn store<S: Simd>(p: *mut Self, x: S::Vector);
    fn to_f32(self) -> f32;
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::Vector {
        S::load(p)
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, x: S::Vector) {
        S::store(p, x);
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const IS_F32: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::Vector {
        S::load_f16(p.cast())
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, x: S::Vector) {
        S::store_f16(p.cast(), x);
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Element for bf16 {
    const IS_F32: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::Vector {
        S::load_bf16(p.cast())
    }

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const Self) -> [S::Vector; 2] {
        S::load_bf16_pair(p.cast())
    }

    #[inline(always)]
    unsafe fn in_order<S: Simd>(pair: [S::Vector; 2]) -> [S::Vector; 2] {
        S::bf16_pair_in_order(pair)
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, x: S::Vector) {
        S::store_bf16(p.cast(), x);
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Reads `len` elements as float32, and writes them and zeros up to `padded` elements.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd, T: Element>(from: *const T, len: usize, padded: usize, to: *mut f32) {
    let mut i = 0;
    while i + S::LANES <= len {
        S::store(to.add(i), T::load::<S>(from.add(i)));
        i += S::LANES;
    }
    for j in i..len {
        to.add(j).write(from.add(j).read().to_f32());
    }
    for j in len..padded {
        to.add(j).write(0.0);
    }
}

/// Rounds `len` float32 values to elements.
#[inline(always)]
pub(crate) unsafe fn narrow<S: Simd, T: Element>(from: *const f32, len: usize, to: *mut T) {
    let mut i = 0;
    while i + S::LANES <= len {
        T::store::<S>(to.add(i), S::load(from.add(i)));
        i += S::LANES;
    }
    for j in i..len {
        to.add(j).write(T::from_f32(from.add(j).read()));
    }
}
