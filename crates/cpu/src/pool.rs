//! The threads that share the tasks of a call with the calling thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

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
/// Nobody is waited for who has not begun: a call whose helpers are busy with another call simply does its work alone.
/// So does one for which no threads can be had.
pub(crate) fn run(workers: usize, worker: &(dyn Fn() + Sync), caller: impl FnOnce()) {
    let pool = if workers == 0 { None } else { shared(workers) };
    let Some(pool) = pool else { return caller() };
    // SAFETY: the reference is used only by helpers that `Team::enter` let in, and `Closing` below does not let this
    // function end, not even by a panic, before the last of them has left.
    let worker: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(worker) };
    let team = Arc::new(Team::default());
    let closing = Closing(&team);
    for _ in 0..workers {
        let team = Arc::clone(&team);
        pool.spawn(move || team.help(worker));
    }
    caller();
    drop(closing);
    if let Some(panic) = team.members().panic.take() {
        resume_unwind(panic);
    }
}

/// The helpers of one call.
#[derive(Default)]
struct Team {
    members: Mutex<Members>,
    left: Condvar,
}

#[derive(Default)]
struct Members {
    /// Set when the caller has finished: whoever has not begun need not.
    closed: bool,
    working: usize,
    panic: Option<Box<dyn Any + Send>>,
}

impl Team {
    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> bool {
        let mut members = self.members();
        if !members.closed {
            members.working += 1;
        }
        !members.closed
    }

    fn help(&self, work: &(dyn Fn() + Sync)) {
        if !self.enter() {
            return;
        }
        let result = catch_unwind(AssertUnwindSafe(work));
        let mut members = self.members();
        if let Err(panic) = result {
            members.panic = Some(panic);
        }
        members.working -= 1;
        self.left.notify_all();
    }
}

/// Lets nobody in any more and waits for those inside when it is dropped.
struct Closing<'a>(&'a Team);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut members = self.0.members();
        members.closed = true;
        while members.working > 0 {
            members = self.0.left.wait(members).unwrap_or_else(PoisonError::into_inner);
        }
    }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_call_does_not_wait_for_helpers_of_another() {
        let (release, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let (started, busy) = mpsc::channel();
        let long = thread::spawn(move || {
            let helper = move || {
                started.send(()).expect("the test listens");
                let _ = wait.lock().expect("one helper").recv();
            };
            run(1, &helper, || {});
        });
        // The caller may have finished before its helper began; then nothing is busy, and nothing is to be waited for.
        let _ = busy.recv();
        let done = AtomicUsize::new(0);
        run(1, &|| {}, || {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 1);
        drop(release);
        long.join().expect("the long call ends");
    }

    #[test]
    fn a_panic_of_a_helper_reaches_the_caller() {
        // A call may get no helper while another test looks for one; a few tries get one.
        let panicked = (0..20).any(|_| {
            let (entered, inside) = mpsc::channel();
            let result = catch_unwind(AssertUnwindSafe(|| {
                let helper = || {
                    entered.send(()).expect("the caller listens");
                    panic!("as planned");
                };
                run(1, &helper, || {
                    let _ = inside.recv_timeout(Duration::from_secs(1));
                });
            }));
            result.is_err_and(|panic| panic.downcast_ref() == Some(&"as planned"))
        });
        assert!(panicked, "no panic was passed on");
    }
}
