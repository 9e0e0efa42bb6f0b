//! Stopping a long call from outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the calling thread asks.
const INTERVAL: Duration = Duration::from_millis(50);

/// Set once when the call shall end.
#[derive(Default)]
pub(crate) struct Stop(AtomicBool);

impl Stop {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One thread's view of [`Stop`]; the calling thread also asks its callback.
pub(crate) struct Ticker<'a> {
    stop: &'a Stop,
    caller: Option<(&'a mut dyn FnMut() -> bool, Instant)>,
}

impl<'a> Ticker<'a> {
    pub(crate) const fn worker(stop: &'a Stop) -> Self {
        Self { stop, caller: None }
    }

    pub(crate) fn caller(stop: &'a Stop, interrupted: &'a mut dyn FnMut() -> bool) -> Self {
        Self { stop, caller: Some((interrupted, Instant::now())) }
    }

    /// Whether to stop now; cheap enough for every block of keys.
    pub(crate) fn should_stop(&mut self) -> bool {
        if let Some((interrupted, last)) = &mut self.caller
            && last.elapsed() >= INTERVAL
        {
            *last = Instant::now();
            if interrupted() {
                self.stop.set();
            }
        }
        self.stop.is_set()
    }
}
