//! Independent work on every core.

use std::num::NonZero;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

/// Runs independent jobs, as many at a time as there are cores, and returns their results in order.
///
/// A dispatch of the simulator keeps its state to itself, so that jobs need neither processes nor locks of their own;
/// each makes its own buffers.
///
/// # Panics
/// If a job panics.
pub fn run_many<T: Send, J: FnOnce() -> T + Send>(jobs: Vec<J>) -> Vec<T> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get).min(jobs.len());
    let waiting = Mutex::new(jobs.into_iter().enumerate());
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..cores {
            let sender = sender.clone();
            let waiting = &waiting;
            scope.spawn(move || {
                let take = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
                while let Some((index, job)) = take() {
                    // The receiver lives until every job has run.
                    sender.send((index, job())).ok();
                }
            });
        }
    });
    drop(sender);
    let mut results: Vec<(usize, T)> = receiver.into_iter().collect();
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_jobs() {
        let jobs = (0..50).map(|number| move || number * 2).collect();
        assert_eq!(run_many(jobs), (0..50).map(|number| number * 2).collect::<Vec<_>>());
        assert!(run_many(Vec::<fn() -> u8>::new()).is_empty());
    }
}
