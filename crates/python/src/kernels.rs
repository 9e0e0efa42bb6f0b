//! Compiled kernels, and the ones that this device refused, kept between calls.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mtlflashattn_core::settings::Probe;

/// Most kernels that are kept: a process that meets ever new head dimensions must not grow without end.
pub const CAPACITY: usize = 256;

/// Why a kernel does not serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Arc<str>,
    pub scope: Scope,
    /// Whether this process found it out, rather than one before it that has told its user.
    pub is_news: bool,
}

/// For how long a kernel does not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Process,
    /// Until a probe is forced.
    Machine,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.reason, self.scope)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self {
            Self::Process => "in this process",
            Self::Machine => "on this machine",
        };
        write!(f, "this kernel serves no more {place} until MTLFLASHATTN_PROBE=force checks it again")
    }
}

/// What became of a kernel.
pub enum State<P> {
    /// It compiled, and proved itself where that was asked for.
    Ready(Arc<P>),
    /// It does not serve.
    Refused(Refusal),
}

impl<P> Clone for State<P> {
    fn clone(&self) -> Self {
        match self {
            Self::Ready(pipeline) => Self::Ready(Arc::clone(pipeline)),
            Self::Refused(refusal) => Self::Refused(refusal.clone()),
        }
    }
}

struct Entry<P> {
    state: State<P>,
    /// What was asked of it.
    asked: Probe,
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

    /// What became of `kernel`, if at least `asked` was asked of it.
    pub fn get(&self, kernel: &K, asked: Probe) -> Option<State<P>> {
        let mut entries = self.lock();
        let Entries { map, uses } = entries.as_mut()?;
        let entry = map.get_mut(kernel).filter(|entry| entry.asked >= asked)?;
        *uses += 1;
        entry.last_use = *uses;
        Some(entry.state.clone())
    }

    /// Keeps `state`. Where two threads compiled the same kernel at once, the later one stays.
    pub fn insert(&self, kernel: K, state: State<P>, asked: Probe) {
        let dropped = {
            let mut entries = self.lock();
            let Entries { map, uses } = entries.get_or_insert_with(|| Entries { map: HashMap::new(), uses: 0 });
            *uses += 1;
            let old = map.insert(kernel, Entry { state, asked, last_use: *uses });
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
