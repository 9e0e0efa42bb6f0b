//! Stacks of the fibers, kept by the operating system's thread that runs them.

use std::cell::RefCell;
use std::ops::Range;

use mtlflashattn_metal::DeviceError;

use crate::library::STACK_BYTES;
use crate::memory::{GuardedPages, page_size};

/// Fewer are not worth another mapping.
const FEWEST: usize = 128;

/// Aligned stacks, each with an untouchable page at its far end.
pub struct Stacks {
    pages: GuardedPages,
    count: usize,
}

thread_local! {
    static KEPT: RefCell<Option<Stacks>> = const { RefCell::new(None) };
}

impl Stacks {
    fn new(count: usize) -> Result<Self, DeviceError> {
        let pages = GuardedPages::new(count * STACK_BYTES, 0, STACK_BYTES)?;
        let stacks = Stacks { pages, count };
        for index in 0..count {
            // SAFETY: the page is the lowest one of a stack of this mapping, which nothing uses yet.
            let result = unsafe {
                let lowest = stacks.pages.start().add(index * STACK_BYTES);
                libc::mprotect(lowest.as_ptr().cast(), page_size(), libc::PROT_NONE)
            };
            if result != 0 {
                return Err(DeviceError::Memory(format!("stacks: {}", std::io::Error::last_os_error())));
            }
        }
        Ok(stacks)
    }

    /// The lowest address.
    pub fn start(&self) -> *mut u8 {
        self.pages.start().as_ptr()
    }

    /// Number of stacks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Addresses of all stacks.
    pub fn range(&self) -> Range<usize> {
        let start = self.start() as usize;
        start..start + self.count * STACK_BYTES
    }
}

/// Calls `use_stacks` with at least `count` stacks, which the thread keeps for the next time.
pub fn with_stacks<R>(count: usize, use_stacks: impl FnOnce(&Stacks) -> R) -> Result<R, DeviceError> {
    let kept = KEPT.take().filter(|stacks| stacks.count >= count);
    let stacks = match kept {
        Some(stacks) => stacks,
        None => Stacks::new(count.next_power_of_two().max(FEWEST))?,
    };
    let result = use_stacks(&stacks);
    KEPT.set(Some(stacks));
    Ok(result)
}
