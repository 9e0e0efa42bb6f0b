//! Launches in the order of their dispatch, and what became of them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use objc2::rc::autoreleasepool;
use objc2_metal::{
    MTLCommandBuffer, MTLCommandBufferError, MTLCommandBufferErrorDomain, MTLCommandBufferStatus, MTLCommandQueue,
};

use super::Object;
use super::compiler::describe;
use crate::DeviceError;

/// A Metal queue. It runs command buffers in the order in which they were committed, and keeps a kernel from starting
/// before earlier ones have written what it reads (tracked hazards, the default of buffers made by a device).
pub(super) struct Queue(Mutex<InFlight>);

/// What was committed and not yet looked at.
pub(super) struct InFlight {
    queue: Object<dyn MTLCommandQueue>,
    launches: VecDeque<Launch>,
    failure: Option<DeviceError>,
}

/// A committed command buffer.
pub(super) struct Launch {
    commands: Object<dyn MTLCommandBuffer>,
    entry: String,
}

// SAFETY: reference counts of Objective-C objects are atomic, and one thread at a time uses a command buffer: whoever
// holds the lock of its queue.
unsafe impl Send for Launch {}

impl Queue {
    pub(super) fn new(queue: Object<dyn MTLCommandQueue>) -> Self {
        Self(Mutex::new(InFlight { queue, launches: VecDeque::new(), failure: None }))
    }

    /// Nothing is committed by others until the guard is dropped.
    pub(super) fn lock(&self) -> MutexGuard<'_, InFlight> {
        // Every state between two statements of `InFlight` is a valid one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InFlight {
    /// An empty command buffer, which will keep its arguments alive; none where Metal gives none.
    pub(super) fn command_buffer(&mut self) -> Option<Object<dyn MTLCommandBuffer>> {
        while let Some(launch) = self.launches.pop_front() {
            if !launch.is_over() {
                self.launches.push_front(launch);
                break;
            }
            self.settle(&launch);
        }
        // Waits while 64 are in flight (Apple's documentation of newCommandQueue).
        self.queue.commandBuffer()
    }

    pub(super) fn commit(&mut self, launch: Launch) {
        launch.commands.commit();
        self.launches.push_back(launch);
    }

    /// Waits for all launches, and returns the first failure since the last report.
    pub(super) fn wait(&mut self) -> Result<(), DeviceError> {
        while let Some(launch) = self.launches.pop_front() {
            launch.commands.waitUntilCompleted();
            self.settle(&launch);
        }
        self.failure.take().map_or(Ok(()), Err)
    }

    fn settle(&mut self, launch: &Launch) {
        if self.failure.is_none() {
            self.failure = launch.failure();
        }
    }
}

impl Launch {
    pub(super) fn new(commands: Object<dyn MTLCommandBuffer>, entry: &str) -> Self {
        Self { commands, entry: entry.to_owned() }
    }

    fn is_over(&self) -> bool {
        matches!(self.commands.status(), MTLCommandBufferStatus::Completed | MTLCommandBufferStatus::Error)
    }

    /// Why the launch failed, once it is over.
    fn failure(&self) -> Option<DeviceError> {
        if self.commands.status() == MTLCommandBufferStatus::Completed {
            return None;
        }
        autoreleasepool(|_| {
            let Some(error) = self.commands.error() else {
                let reason = "Metal gave no reason".to_owned();
                return Some(DeviceError::Dispatch { entry: self.entry.clone(), reason });
            };
            let reason = describe(&error);
            // SAFETY: a constant string of the framework, set when it was loaded.
            let domain = unsafe { MTLCommandBufferErrorDomain };
            let out_of_memory = MTLCommandBufferError::OutOfMemory.0.cast_signed();
            if error.code() == out_of_memory && *error.domain() == *domain {
                return Some(DeviceError::Memory(format!("kernel {}: {reason}", self.entry)));
            }
            Some(DeviceError::Dispatch { entry: self.entry.clone(), reason })
        })
    }
}
