//! Pages from the operating system, between pages that nobody may touch.

use std::ptr::{self, NonNull};

use mtlflashattn_metal::DeviceError;

/// A stretch of pages with untouchable stretches before and behind it.
#[derive(Debug)]
pub struct GuardedPages {
    mapping: NonNull<u8>,
    mapping_bytes: usize,
    pages: NonNull<u8>,
    page_bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and no thread is special to it.
unsafe impl Send for GuardedPages {}

/// Size of a page of this machine.
pub fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

impl GuardedPages {
    /// Readable and writable pages for `bytes` bytes, with at least `guard` untouchable bytes on both sides.
    /// The first usable byte is aligned to `alignment`, a power of two.
    pub fn new(bytes: usize, guard: usize, alignment: usize) -> Result<Self, DeviceError> {
        let page = page_size();
        let page_bytes = bytes.max(1).next_multiple_of(page);
        let guard = guard.next_multiple_of(page);
        let mapping_bytes = page_bytes + 2 * guard + alignment;
        // SAFETY: a fresh anonymous mapping at an address of the system's choice touches nothing that exists.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapping_bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let out_of_memory = || DeviceError::Memory(format!("{bytes} bytes: {}", std::io::Error::last_os_error()));
        if address == libc::MAP_FAILED {
            return Err(out_of_memory());
        }
        let mapping = NonNull::new(address.cast::<u8>()).ok_or_else(out_of_memory)?;
        let offset = guard + (mapping.as_ptr() as usize + guard).wrapping_neg() % alignment;
        // SAFETY: offset + page_bytes <= mapping_bytes.
        let pages = unsafe { mapping.add(offset) };
        let guarded = GuardedPages { mapping, mapping_bytes, pages, page_bytes };
        guarded.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(guarded)
    }

    /// The first usable byte.
    pub fn start(&self) -> NonNull<u8> {
        self.pages
    }

    /// Usable bytes: whole pages.
    pub fn bytes(&self) -> usize {
        self.page_bytes
    }

    /// Changes what may be done with the usable pages.
    pub fn protect(&self, protection: i32) -> Result<(), DeviceError> {
        // SAFETY: the range lies inside of this value's own mapping.
        let result = unsafe { libc::mprotect(self.pages.as_ptr().cast(), self.page_bytes, protection) };
        if result == 0 {
            Ok(())
        } else {
            Err(DeviceError::Memory(format!("mprotect: {}", std::io::Error::last_os_error())))
        }
    }
}

impl Drop for GuardedPages {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by mmap with this length and nobody else holds it.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapping_bytes) };
    }
}
