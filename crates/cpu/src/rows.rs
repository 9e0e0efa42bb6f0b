//! Rows of K or V in memory.

use crate::isa::Simd;

const CACHE_LINE: usize = 64;
/// How many rows ahead of the one in use are asked for where nobody says.
pub(crate) const AHEAD: usize = 8;

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
    /// What to ask for when row 0 is read; row 1 asks for what is a row behind, and so on. Null to ask for nothing.
    ahead: *const T,
}

impl<T> Rows<T> {
    /// Rows that ask for what is [`AHEAD`] rows behind them.
    pub(crate) const fn new(pointer: *const T, stride: isize, width: usize) -> Self {
        Self { pointer, stride, width, ahead: pointer.wrapping_offset(AHEAD as isize * stride) }
    }

    /// The same rows; row 0 asks for `ahead`.
    pub(crate) const fn with_ahead(self, ahead: *const T) -> Self {
        Self { ahead, ..self }
    }

    /// The same rows of a type of the same size.
    pub(crate) const fn cast<U>(self) -> Rows<U> {
        assert!(size_of::<T>() == size_of::<U>(), "rows keep the size of their elements");
        Rows { pointer: self.pointer.cast(), stride: self.stride, width: self.width, ahead: self.ahead.cast() }
    }

    /// The same rows, of which `width` elements are read.
    pub(crate) const fn of(self, width: usize) -> Self {
        Self { width, ..self }
    }

    /// Rows that lie `elements` behind these, and ask for what lies as far behind.
    pub(crate) fn shifted(self, elements: isize) -> Self {
        let ahead = if self.ahead.is_null() { self.ahead } else { self.ahead.wrapping_offset(elements) };
        Self { pointer: self.pointer.wrapping_offset(elements), ahead, ..self }
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

    /// The rows from row `index` on.
    pub(crate) fn from(self, index: usize) -> Self {
        let behind = index as isize * self.stride;
        self.shifted(behind)
    }

    /// What lies below `element` in the next row.
    pub(crate) const fn below(&self, element: *const T) -> *const T {
        element.wrapping_offset(self.stride)
    }

    /// Asks for a row some way behind row `index`. Hardware prefetchers follow contiguous rows by themselves, but each
    /// row that lies apart would cost them a miss.
    #[inline(always)]
    pub(crate) unsafe fn prefetch_behind<S: Simd>(&self, index: usize) {
        if !self.contiguous() && !self.ahead.is_null() {
            let row = self.ahead.wrapping_offset(index as isize * self.stride);
            prefetch::<S>(row.cast(), self.width * size_of::<T>());
        }
    }

    /// The same, far from the processor and for any rows: streams from memory need many requests in flight.
    #[inline(always)]
    pub(crate) unsafe fn prefetch_far<S: Simd>(&self, index: usize) {
        if !self.ahead.is_null() {
            let row = self.ahead.wrapping_offset(index as isize * self.stride).cast::<u8>();
            for line in (0..self.width * size_of::<T>()).step_by(CACHE_LINE) {
                S::prefetch_far(row.wrapping_add(line));
            }
        }
    }
}
