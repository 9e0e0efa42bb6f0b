//! Scratch memory of one thread: one aligned block, carved into pieces.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};

use crate::Error;

/// Cache line and the widest vector.
const ALIGN: usize = 64;

/// Offsets of consecutive float32 pieces inside one block, each on a cache line.
#[derive(Clone, Copy, Default)]
pub(crate) struct Carver {
    len: usize,
}

impl Carver {
    /// Reserves `len` float32 values and returns their offset.
    pub(crate) const fn take(&mut self, len: usize) -> usize {
        let offset = self.len;
        self.len += len.next_multiple_of(ALIGN / 4);
        offset
    }

    /// Float32 values reserved so far.
    pub(crate) const fn len(self) -> usize {
        self.len
    }
}

/// An aligned block of float32 values.
pub(crate) struct Block {
    pointer: *mut f32,
    layout: Layout,
}

// SAFETY: the block is plain memory with one owner; who may write which part is decided by its users.
unsafe impl Send for Block {}
// SAFETY: as above; sharing the pointer is harmless.
unsafe impl Sync for Block {}

impl Block {
    /// Allocates `len` float32 values (at least one).
    pub(crate) fn new(len: usize) -> Result<Self, Error> {
        Self::allocate(len, alloc)
    }

    /// The same, all of them 0.
    pub(crate) fn zeroed(len: usize) -> Result<Self, Error> {
        Self::allocate(len, alloc_zeroed)
    }

    fn allocate(len: usize, allocate: unsafe fn(Layout) -> *mut u8) -> Result<Self, Error> {
        let bytes = len.max(1).saturating_mul(4);
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| Error::OutOfMemory { bytes })?;
        // SAFETY: the layout has a size of at least four bytes.
        let pointer = unsafe { allocate(layout) }.cast::<f32>();
        if pointer.is_null() { Err(Error::OutOfMemory { bytes }) } else { Ok(Self { pointer, layout }) }
    }

    /// The first value.
    pub(crate) const fn as_ptr(&self) -> *mut f32 {
        self.pointer
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.pointer.cast(), self.layout) }
    }
}
