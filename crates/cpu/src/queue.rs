//! The numbered pieces of a call, dealt out to its threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::interrupt::{Stop, Ticker};
use crate::{Error, pool};

/// What the threads of one phase of a call share: the next piece, and why the phase ends early.
#[derive(Default)]
pub(crate) struct Queue {
    next: AtomicUsize,
    stop: Stop,
    failure: Mutex<Option<Error>>,
}

impl Queue {
    /// Runs `work` on this thread and on up to `workers` others. It takes pieces with [`Self::next`] until there are none.
    ///
    /// # Errors
    /// The error of one of the threads, which ends the others early; [`Error::Interrupted`] when `interrupted`, asked on
    /// this thread, returned true.
    pub(crate) fn run(
        workers: usize,
        interrupted: &mut dyn FnMut() -> bool,
        work: impl Fn(&Self, &mut Ticker<'_>) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        let queue = Self::default();
        let attempt = |ticker: &mut Ticker<'_>| {
            if let Err(error) = work(&queue, ticker) {
                queue.stop.set();
                if let Ok(mut failure) = queue.failure.lock() {
                    *failure = Some(error);
                }
            }
        };
        let mut answered = false;
        let mut ask = || {
            answered |= interrupted();
            answered
        };
        let mut ticker = Ticker::caller(&queue.stop, &mut ask);
        pool::run(workers, &|| attempt(&mut Ticker::worker(&queue.stop)), || attempt(&mut ticker));
        if let Some(error) = queue.failure.lock().ok().and_then(|mut failure| failure.take()) {
            return Err(error);
        }
        if answered { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// The next of `count` pieces; none when all are taken or the call shall end.
    pub(crate) fn next(&self, count: usize, ticker: &mut Ticker<'_>) -> Option<usize> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < count && !ticker.should_stop()).then_some(index)
    }
}

/// Calls `work` for `count` short pieces on this thread and on up to `workers` others.
pub(crate) fn for_each(workers: usize, count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let all = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            work(index);
        }
    };
    pool::run(workers.min(count.saturating_sub(1)), &all, all);
}
