//! Memory that CPU and GPU share.

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use bytemuck::Pod;
use objc2::msg_send;
use objc2::rc::autoreleasepool;
use objc2_metal::{MTLBuffer, MTLDevice, MTLResourceOptions};

use super::queue::Queue;
use super::{NativeDevice, Object};
use crate::DeviceError;

/// Memory of a [`NativeDevice`], in shared storage.
pub struct Buffer {
    object: Object<dyn MTLBuffer>,
    contents: NonNull<u8>,
    length: usize,
    queue: Arc<Queue>,
}

// SAFETY: reference counts of Objective-C objects are atomic, nothing here changes after creation, and the memory
// behind `contents` is read under the lock of the queue while nothing runs.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Memory of `length` bytes, all 0.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn zeroed(device: &NativeDevice, length: usize) -> Result<Self, DeviceError> {
        let allowed = device.device.maxBufferLength();
        if length > allowed {
            return Err(DeviceError::Memory(format!("a buffer of {length} bytes; this GPU allows {allowed}")));
        }
        autoreleasepool(|_| {
            // Metal makes no buffer of length 0, and fills a new one with zeros (Apple's documentation of
            // newBufferWithLength).
            let object = device
                .device
                .newBufferWithLength_options(length.max(1), MTLResourceOptions::StorageModeShared)
                .ok_or_else(|| DeviceError::Memory(format!("a buffer of {length} bytes")))?;
            // SAFETY: the method takes no arguments and returns a plain pointer. The generated wrapper takes for
            // granted that it is not null.
            let contents: *mut c_void = unsafe { msg_send![&*object, contents] };
            let contents = NonNull::new(contents.cast())
                .ok_or_else(|| DeviceError::Memory(format!("{length} bytes that the CPU can reach")))?;
            Ok(Self { object, contents, length, queue: Arc::clone(&device.queue) })
        })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn from_slice<T: Pod>(device: &NativeDevice, values: &[T]) -> Result<Self, DeviceError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = Self::zeroed(device, bytes.len())?;
        // SAFETY: both sides have `bytes.len()` bytes. The buffer is new: neither the GPU nor `bytes` refers to it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.contents.as_ptr(), bytes.len()) };
        Ok(buffer)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it was made with no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Waits for everything dispatched so far, and copies the first values to `out`.
    ///
    /// # Errors
    /// [`DeviceError::Dispatch`] or [`DeviceError::Memory`]: the first failure of a launch since the last report.
    ///
    /// # Panics
    /// If `out` is longer than the buffer.
    pub fn read_into<T: Pod>(&self, out: &mut [T]) -> Result<(), DeviceError> {
        let out: &mut [u8] = bytemuck::cast_slice_mut(out);
        assert!(out.len() <= self.length, "{} bytes are read from a buffer of {}", out.len(), self.length);
        let mut in_flight = self.queue.lock();
        in_flight.wait()?;
        // SAFETY: `contents` has `length >= out.len()` bytes and lives as long as `object`. Nothing runs on the GPU,
        // and nothing is committed before the lock is released.
        unsafe { ptr::copy_nonoverlapping(self.contents.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    pub(super) fn object(&self) -> &Object<dyn MTLBuffer> {
        &self.object
    }

    /// Whether [`Self::read_into`] waits for the launches of this queue.
    pub(super) fn is_of(&self, queue: &Arc<Queue>) -> bool {
        Arc::ptr_eq(&self.queue, queue)
    }
}
