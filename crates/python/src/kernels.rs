//! Compiled kernels, and the ones that this device refused, kept between calls.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most kernels that are kept: a process that meets ever new head dimensions must not grow without end.
pub const CAPACITY: usize = 256;

/// What became of a kernel.
pub enum State<P> {
    /// It compiled, and proved itself where that was asked for.
    Ready(Arc<P>),
    /// It never serves in this process again, for this reason.
    Refused(Arc<str>),
}

impl<P> State<P> {
    pub fn refusal(self) -> Option<Arc<str>> {
        match self {
            Self::Ready(_) => None,
            Self::Refused(reason) => Some(reason),
        }
    }
}

impl<P> Clone for State<P> {
    fn clone(&self) -> Self {
        match self {
            Self::Ready(pipeline) => Self::Ready(Arc::clone(pipeline)),
            Self::Refused(reason) => Self::Refused(Arc::clone(reason)),
        }
    }
}

struct Entry<P> {
    state: State<P>,
    last_use: u64,
}

struct Entries<K, P> {
    map: HashMap<K, Entry<P>>,
    uses: u64,
}

/// Kernels by what they are specialised for; the least recently used one makes room for a new one.
pub struct Kernels<K, P>(Mutex<Option<Entries<K, P>>>);

impl<K: Copy + Eq + Hash, P> Kernels<K, P> {
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Entries<K, P>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, kernel: &K) -> Option<State<P>> {
        let mut entries = self.lock();
        let Entries { map, uses } = entries.as_mut()?;
        let entry = map.get_mut(kernel)?;
        *uses += 1;
        entry.last_use = *uses;
        Some(entry.state.clone())
    }

    /// Keeps `state`. Where two threads compiled the same kernel at once, the later one stays.
    pub fn insert(&self, kernel: K, state: State<P>) {
        let dropped = {
            let mut entries = self.lock();
            let Entries { map, uses } = entries.get_or_insert_with(|| Entries { map: HashMap::new(), uses: 0 });
            *uses += 1;
            let old = map.insert(kernel, Entry { state, last_use: *uses });
            let oldest = map.iter().min_by_key(|(_, entry)| entry.last_use).map(|(&kernel, _)| kernel);
            let evicted = oldest.filter(|_| map.len() > CAPACITY).and_then(|oldest| map.remove(&oldest));
            (old, evicted)
        };
        // Dropping a pipeline may run Python code, which must not find the lock held.
        drop(dropped);
    }

    pub fn clear(&self) {
        let entries = self.lock().take();
        drop(entries);
    }
}
