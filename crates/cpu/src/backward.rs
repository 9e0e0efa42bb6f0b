//! Gradients: probabilities are computed anew from the LSE of the forward pass, as in FlashAttention-2.
//!
//! A task holds the rows of one key head, or a split of them, block by block, while all keys that they see stream past:
//! the gradient of q is finished with the block, and those of k and v gather in sums of the split. Splits are added up
//! in their order when the last one of a head is done. So every product is computed once, nobody writes what another
//! one writes, and no bit depends on the number of threads.

mod block;
mod reduce;
mod schedule;
mod sums;

use mtlflashattn_core::{CpuBackwardTile, Dtype, Problem, Strides};

use crate::call::Call;
use crate::interrupt::Ticker;
use crate::isa::{Isa, instantiate};
use crate::queue::Queue;
use crate::run::{MIN_PARALLEL_FLOPS, with_scratch};
use crate::{Error, Inputs, Outputs};
use block::{Part, Scratch};
use schedule::{Head, Schedule};
use sums::Sums;

/// Gradients of the results of a forward pass.
#[derive(Clone, Copy, Debug)]
pub struct OutputGradients {
    /// First element of the gradient of the output.
    pub out: *const u8,
    /// Its strides.
    pub out_strides: Strides,
    /// First element of the gradient of the LSE, laid out like the LSE; null when there is none.
    pub lse: *const f32,
}

/// Where a gradient goes.
#[derive(Clone, Copy, Debug)]
pub struct Gradient {
    /// First element; null when it is not wanted.
    pub data: *mut u8,
    /// Strides; the last one is 1.
    pub strides: Strides,
}

/// Where the gradients go, in the dtype of the inputs. Every row is written; rows of no sequence get 0.
#[derive(Clone, Copy, Debug)]
pub struct InputGradients {
    /// Of q.
    pub q: Gradient,
    /// Of k.
    pub k: Gradient,
    /// Of v.
    pub v: Gradient,
    /// First element of the contiguous float32 gradient of the sinks; null when it is not wanted.
    pub sinks: *mut f32,
}

/// One call for gradients as the kernels see it; the outputs of `call` are read.
struct Backward<'a> {
    call: Call<'a>,
    given: &'a OutputGradients,
    wanted: &'a InputGradients,
}

// SAFETY: inputs are only read, and parts and spans write disjoint rows of the gradients.
unsafe impl Sync for Backward<'_> {}

#[derive(Clone, Copy)]
struct Kernels {
    part: unsafe fn(&Backward<'_>, &Part, *mut f32, Scratch, *mut f32, &mut Ticker<'_>),
    scratch: fn(&Backward<'_>) -> Scratch,
    sums: fn(&Problem) -> schedule::Columns,
    reduce: unsafe fn(&Backward<'_>, &Head, *const f32),
}

/// Instantiates the generic code inside functions that enable an instruction set.
macro_rules! kernels {
    ($isa:ty, $element:ty $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn run_part(
            c: &Backward<'_>,
            p: &Part,
            sums: *mut f32,
            s: Scratch,
            b: *mut f32,
            k: &mut Ticker<'_>,
        ) {
            block::run::<$isa, $element>(c, p, sums, s, b, k);
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn run_reduce(c: &Backward<'_>, head: &Head, sums: *const f32) {
            reduce::run::<$isa, $element>(c, head, sums);
        }
        Kernels {
            part: run_part,
            scratch: Scratch::new::<$isa>,
            sums: schedule::Columns::of::<$isa>,
            reduce: run_reduce,
        }
    }};
}

fn kernels(isa: Isa, dtype: Dtype) -> Kernels {
    instantiate!(kernels, isa, dtype)
}

/// Computes the gradients of a call from its inputs, its results and their gradients.
///
/// Rows whose LSE is infinite have no gradient. The LSE may be that of more keys than there are in k: then the gradients
/// are what these keys contribute. `interrupted` is asked on the calling thread about every 50 ms; when it returns true
/// the call ends early.
///
/// # Errors
/// [`Error::Interrupted`] and [`Error::OutOfMemory`]; the gradients are incomplete in both cases.
///
/// # Safety
/// All pointers must be valid for the shapes and strides of `problem` (writes for gradients, reads for all else), the
/// gradients must overlap nothing else, and the offsets must have been checked.
///
/// # Panics
/// If this machine cannot run `isa`.
#[allow(clippy::too_many_arguments, reason = "what a forward call has, and as much again")]
pub unsafe fn backward(
    problem: &Problem,
    tile: &CpuBackwardTile,
    isa: Isa,
    threads: usize,
    inputs: &Inputs<'_>,
    outputs: &Outputs,
    given: &OutputGradients,
    wanted: &InputGradients,
    interrupted: &mut dyn FnMut() -> bool,
) -> Result<(), Error> {
    assert!(isa.is_available(), "this machine cannot run {}", isa.name());
    let backward = Backward { call: Call::new(problem, &tile.block, inputs, outputs), given, wanted };
    let kernels = kernels(isa, problem.dtype);
    let columns = (kernels.sums)(problem).only(!wanted.k.data.is_null(), !wanted.v.data.is_null());
    let schedule = Schedule::new(&backward.call, tile.split_rows, columns)?;
    // SAFETY: the caller's contract.
    unsafe { reduce::clear_uncovered(&backward, &schedule) };
    let workers = if problem.flops() >= MIN_PARALLEL_FLOPS { threads.saturating_sub(1) } else { 0 };
    let run = Run { backward: &backward, schedule: &schedule, sums: schedule.sums(), kernels };
    let helpers = workers.min(schedule.parts().saturating_sub(1));
    Queue::run(helpers, interrupted, |queue, ticker| run.parts(queue, ticker))?;
    // SAFETY: all parts have finished.
    unsafe { reduce::sinks(&backward, &schedule) };
    Ok(())
}

struct Run<'a> {
    backward: &'a Backward<'a>,
    schedule: &'a Schedule,
    sums: Sums,
    kernels: Kernels,
}

// SAFETY: the sums of a part are written by one task, and read after all tasks of their head.
unsafe impl Sync for Run<'_> {}

impl Run<'_> {
    /// Takes parts until there are none.
    fn parts(&self, queue: &Queue, ticker: &mut Ticker<'_>) -> Result<(), Error> {
        let scratch = (self.kernels.scratch)(self.backward);
        with_scratch(scratch.len(), |block| {
            while let Some(index) = queue.next(self.schedule.parts(), ticker) {
                let part = self.schedule.part(&self.backward.call, index);
                let sums = self.sums.begin(part.head.index)?.wrapping_add(part.sums);
                // SAFETY: `backward`'s contract; both blocks have the sizes that the schedule and the layout ask for.
                unsafe {
                    sums.write_bytes(0, part.head.part_len);
                    (self.kernels.part)(self.backward, &part, sums, scratch, block, ticker);
                }
                // SAFETY: all parts of the head have ended, so that its sums are complete.
                self.sums.end(part.head.index, |sums| unsafe {
                    (self.kernels.reduce)(self.backward, &part.head, sums);
                });
            }
            Ok(())
        })?
    }
}
