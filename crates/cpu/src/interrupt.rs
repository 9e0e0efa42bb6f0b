//! Stopping a long call from outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the calling thread asks.
const INTERVAL: Duration = Duration::from_millis(50);
/// Blocks of keys between two looks at the clock, which takes as long as a small block.
const BLOCKS: u32 = 8;

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
    caller: Option<Caller<'a>>,
}

struct Caller<'a> {
    interrupted: &'a mut dyn FnMut() -> bool,
    blocks: u32,
    last: Option<Instant>,
}

impl Caller<'_> {
    fn ask(&mut self) -> bool {
        self.blocks += 1;
        if !self.blocks.is_multiple_of(BLOCKS) {
            return false;
        }
        let last = *self.last.get_or_insert_with(Instant::now);
        if last.elapsed() < INTERVAL {
            return false;
        }
        self.last = Some(Instant::now());
        (self.interrupted)()
    }
}

impl<'a> Ticker<'a> {
    pub(crate) const fn worker(stop: &'a Stop) -> Self {
        Self { stop, caller: None }
    }

    pub(crate) fn caller(stop: &'a Stop, interrupted: &'a mut dyn FnMut() -> bool) -> Self {
        Self { stop, caller: Some(Caller { interrupted, blocks: 0, last: None }) }
    }

    /// Whether to stop now; cheap enough for every block of keys.
    pub(crate) fn should_stop(&mut self) -> bool {
        if self.caller.as_mut().is_some_and(Caller::ask) {
            self.stop.set();
        }
        self.stop.is_set()
    }
}
