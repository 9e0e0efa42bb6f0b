//! The threads that share the tasks of a call with the calling thread.

use std::process;
use std::sync::{Arc, Mutex, TryLockError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// The pool of this process, with at least `workers` threads.
struct Shared {
    process: u32,
    workers: usize,
    pool: Arc<ThreadPool>,
}

static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

/// Runs `caller` on this thread and `worker` on up to `workers` others, and returns when all have finished.
///
/// Without threads to be had, the caller's work simply is not shared.
pub(crate) fn run(workers: usize, worker: &(impl Fn() + Sync), caller: impl FnOnce()) {
    let pool = if workers == 0 { None } else { shared(workers) };
    let Some(pool) = pool else { return caller() };
    pool.in_place_scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|_| worker());
        }
        caller();
    });
}

fn shared(workers: usize) -> Option<Arc<ThreadPool>> {
    // Never waits: in a forked child the lock may be held by a thread that no longer exists.
    let mut shared = match SHARED.try_lock() {
        Ok(shared) => shared,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return None,
    };
    let process = process::id();
    if let Some(Shared { pool, .. }) =
        shared.as_ref().filter(|shared| shared.process == process && shared.workers >= workers)
    {
        return Some(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(workers)
        .thread_name(|index| format!("mtlflashattn-{index}"))
        .build()
        .ok()?;
    let pool = Arc::new(pool);
    let old = shared.replace(Shared { process, workers, pool: Arc::clone(&pool) });
    if let Some(old) = old.filter(|old| old.process != process) {
        // After a fork its threads do not exist; dropping it would wait for them.
        std::mem::forget(old);
    }
    Some(pool)
}
