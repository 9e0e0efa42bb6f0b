//! Sums for the gradients of k and v, which exist while the parts of a key head are under way.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::workspace::Block;

/// A key head of a sequence: its sums, and how many of its parts are not done.
struct Head {
    block: Option<Block>,
    parts: usize,
}

/// The sums of all heads. Parts are dealt out in order, so that there are never more blocks than threads and one more,
/// and the next head finds the block of the last one in the caches.
pub(super) struct Sums {
    heads: Vec<Mutex<Head>>,
    /// Blocks of heads that are done.
    free: Mutex<Vec<Block>>,
    /// Float32 values of a block.
    len: usize,
}

impl Sums {
    /// For heads of so many parts, whose sums have at most `len` float32 values.
    pub(super) fn new(heads: impl Iterator<Item = usize>, len: usize) -> Self {
        let heads = heads.map(|parts| Mutex::new(Head { block: None, parts })).collect();
        Self { heads, free: Mutex::default(), len }
    }

    /// The sums of head `index`, for one of its parts; they hold anything before that part has written them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(super) fn begin(&self, index: usize) -> Result<*mut f32, Error> {
        let mut head = lock(&self.heads[index]);
        if let Some(block) = &head.block {
            return Ok(block.as_ptr());
        }
        let free = lock(&self.free).pop();
        let block = head.block.insert(free.map_or_else(|| Block::new(self.len), Ok)?);
        Ok(block.as_ptr())
    }

    /// Ends a part of head `index`. The last one calls `add_up` with the sums of all.
    pub(super) fn end(&self, index: usize, add_up: impl FnOnce(*const f32)) {
        let mut head = lock(&self.heads[index]);
        head.parts -= 1;
        if head.parts == 0
            && let Some(block) = head.block.take()
        {
            drop(head);
            add_up(block.as_ptr());
            lock(&self.free).push(block);
        }
    }
}

/// Nothing that a thread could leave half done is behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
