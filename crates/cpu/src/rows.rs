//! Rows of K or V in memory.

use crate::isa::Simd;

const CACHE_LINE: usize = 64;
/// How many rows ahead of the one in use are asked for.
const AHEAD: usize = 8;

/// Asks for the `bytes` at `pointer`, which need not be valid.
#[inline(always)]
pub(crate) unsafe fn prefetch<S: Simd>(pointer: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(CACHE_LINE) {
        S::prefetch(pointer.wrapping_add(line));
    }
}

/// Rows of equal distance.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    pointer: *const T,
    /// Elements from one row to the next.
    stride: isize,
    /// Elements of a row that are read.
    width: usize,
    /// How many rows ahead [`Rows::prefetch_far`] asks; 0 for not at all.
    ahead: usize,
}

impl<T> Rows<T> {
    pub(crate) const fn new(pointer: *const T, stride: isize, width: usize) -> Self {
        Self { pointer, stride, width, ahead: 0 }
    }

    /// The same rows, asked for `ahead` rows before they are read.
    pub(crate) const fn with_ahead(self, ahead: usize) -> Self {
        Self { ahead, ..self }
    }

    /// Whether each row follows its predecessor without a gap.
    pub(crate) const fn contiguous(&self) -> bool {
        self.stride == self.width as isize
    }

    /// Elements of a row that are read.
    pub(crate) const fn width(&self) -> usize {
        self.width
    }

    /// Row `index`.
    #[inline(always)]
    pub(crate) unsafe fn row(&self, index: usize) -> *const T {
        self.pointer.offset(index as isize * self.stride)
    }

    /// Asks for a row some way behind row `index`. Hardware prefetchers follow contiguous rows by themselves, but each
    /// row that lies apart would cost them a miss.
    #[inline(always)]
    pub(crate) unsafe fn prefetch_behind<S: Simd>(&self, index: usize) {
        if !self.contiguous() {
            let row = self.pointer.wrapping_offset((index + AHEAD) as isize * self.stride);
            prefetch::<S>(row.cast(), self.width * size_of::<T>());
        }
    }

    /// Asks for the row that `with_ahead` says, far from the processor: streams from memory need many requests in
    /// flight.
    #[inline(always)]
    pub(crate) unsafe fn prefetch_far<S: Simd>(&self, index: usize) {
        if self.ahead > 0 {
            let row = self.pointer.wrapping_offset((index + self.ahead) as isize * self.stride).cast::<u8>();
            for line in (0..self.width * size_of::<T>()).step_by(CACHE_LINE) {
                S::prefetch_far(row.wrapping_add(line));
            }
        }
    }
}
