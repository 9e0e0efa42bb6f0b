//! Memory that kernels read and write.

use std::ptr::NonNull;

use half::{bf16, f16};
use mtlflashattn_metal::DeviceError;

use crate::memory::GuardedPages;

/// Untouchable bytes before and behind a buffer: further than a wrong row or head reaches in small problems.
const GUARD_BYTES: usize = 64 << 20;
/// Metal aligns buffers for every type; the widest vector has 16 bytes.
const ALIGNMENT: usize = 16;
/// What lies between the end of a buffer and the guard behind it.
const SLACK: u8 = 0xA5;

mod private {
    pub trait Sealed {}
}

/// A type that a buffer may hold: plain numbers.
pub trait Element: Copy + private::Sealed {}

macro_rules! elements {
    ($($element:ty),*) => {
        $(impl private::Sealed for $element {} impl Element for $element {})*
    };
}
elements!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f16, bf16);

#[derive(Debug)]
enum Home {
    /// Own pages; the buffer ends where the untouchable ones begin.
    Own(GuardedPages),
    /// Memory of somebody else.
    Foreign { writable: bool },
}

/// Memory bound to a `[[buffer(n)]]`.
///
/// Own memory lies between pages that nobody may touch, and is read-only while a kernel runs that declares it
/// `const`. Buffers go from thread to thread, but two threads cannot share one.
#[derive(Debug)]
pub struct Buffer {
    home: Home,
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: own pages belong to the buffer alone; for foreign memory the caller of `from_raw` promises the same.
unsafe impl Send for Buffer {}

impl Buffer {
    /// A buffer with these values.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn from_slice<T: Element>(values: &[T]) -> Result<Self, DeviceError> {
        let mut buffer = Self::poisoned(size_of_val(values))?;
        buffer.write(values);
        Ok(buffer)
    }

    /// A buffer of `bytes` bytes, all bits set: NaN as half, bfloat and float.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn poisoned(bytes: usize) -> Result<Self, DeviceError> {
        let pages = GuardedPages::new(bytes.next_multiple_of(ALIGNMENT), GUARD_BYTES, ALIGNMENT)?;
        let slack = pages.bytes() - bytes.next_multiple_of(ALIGNMENT);
        // SAFETY: the pages hold at least slack + bytes bytes, and are writable.
        let address = unsafe {
            pages.start().as_ptr().write_bytes(SLACK, pages.bytes());
            let address = pages.start().add(slack);
            address.as_ptr().write_bytes(0xFF, bytes);
            address
        };
        Ok(Buffer { home: Home::Own(pages), address, bytes })
    }

    /// A buffer of `bytes` bytes, all 0.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn zeroed(bytes: usize) -> Result<Self, DeviceError> {
        let buffer = Self::poisoned(bytes)?;
        // SAFETY: the buffer holds `bytes` writable bytes.
        unsafe { buffer.address.as_ptr().write_bytes(0, bytes) };
        Ok(buffer)
    }

    /// Memory of somebody else, used where it lies: tensors of a program, or a sparse mapping of many gigabytes.
    /// The fast layer cannot see accesses just outside of it; the check layer does.
    ///
    /// # Safety
    /// `address` must be valid for reads of `bytes` bytes, and for writes if `writable`, as long as the buffer
    /// lives, and nobody else may write the memory while a kernel runs.
    ///
    /// # Panics
    /// If `address` is null.
    pub unsafe fn from_raw(address: *mut u8, bytes: usize, writable: bool) -> Self {
        let address = NonNull::new(address).expect("memory of a buffer is not null");
        Buffer { home: Home::Foreign { writable }, address, bytes }
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The values in the buffer.
    ///
    /// # Panics
    /// If the size is no multiple of the element's.
    #[must_use]
    pub fn read<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.bytes % size_of::<T>(), 0, "a buffer of {} bytes has no whole elements", self.bytes);
        let count = self.bytes / size_of::<T>();
        // SAFETY: the buffer holds `count` elements, and every bit pattern is one.
        (0..count).map(|index| unsafe { self.address.as_ptr().cast::<T>().add(index).read_unaligned() }).collect()
    }

    /// Replaces the values from the start of the buffer on.
    ///
    /// # Panics
    /// If there are more values than the buffer holds, or it is read-only.
    pub fn write<T: Element>(&mut self, values: &[T]) {
        assert!(size_of_val(values) <= self.bytes, "{} bytes do not fit {}", size_of_val(values), self.bytes);
        assert!(self.is_writable(), "the buffer is read-only");
        // SAFETY: the sizes were compared, and the caller's slice cannot overlap memory behind `&mut self`.
        unsafe {
            let source = values.as_ptr().cast::<u8>();
            self.address.as_ptr().copy_from_nonoverlapping(source, size_of_val(values));
        }
    }

    /// Where the memory lies.
    pub(crate) fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    pub(crate) fn is_writable(&self) -> bool {
        !matches!(self.home, Home::Foreign { writable: false })
    }

    /// Makes own memory read-only, or writable again.
    pub(crate) fn set_read_only(&self, read_only: bool) -> Result<(), DeviceError> {
        match &self.home {
            Home::Own(pages) if read_only => pages.protect(libc::PROT_READ),
            Home::Own(pages) => pages.protect(libc::PROT_READ | libc::PROT_WRITE),
            Home::Foreign { .. } => Ok(()),
        }
    }

    /// Whether the bytes around own memory are as they were.
    pub(crate) fn slack_is_intact(&self) -> bool {
        let Home::Own(pages) = &self.home else { return true };
        let before = self.address.as_ptr() as usize - pages.start().as_ptr() as usize;
        let behind = pages.bytes() - before - self.bytes;
        let intact = |start: *const u8, bytes: usize| {
            // SAFETY: both stretches lie inside of the buffer's own pages.
            (0..bytes).all(|index| unsafe { start.add(index).read() } == SLACK)
        };
        // SAFETY: the end of the buffer lies inside of its own pages.
        intact(pages.start().as_ptr(), before) && intact(unsafe { self.address.as_ptr().add(self.bytes) }, behind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_and_the_rest_is_poison() {
        let mut buffer = Buffer::poisoned(12).unwrap();
        buffer.write(&[1.5_f32]);
        let values = buffer.read::<f32>();
        assert_eq!(values[0].to_bits(), 1.5_f32.to_bits());
        assert!(values[1].is_nan() && values[2].is_nan());
        assert!(Buffer::from_slice(&[f16::ONE; 3]).unwrap().slack_is_intact());
    }

    #[test]
    fn slack_notices_a_byte() {
        let buffer = Buffer::zeroed(5).unwrap();
        assert!(buffer.slack_is_intact());
        // SAFETY: byte 5 lies in the slack, inside of the buffer's own pages.
        unsafe { buffer.address().add(5).write(0) };
        assert!(!buffer.slack_is_intact());
    }
}
