//! From a call to the kernels of an instruction set and a dtype, on one thread or many.

use std::cell::RefCell;

use mtlflashattn_core::{CpuPath, Dtype, Lengths};

use crate::call::{Call, Task};
use crate::interrupt::Ticker;
use crate::isa::{Isa, instantiate};
use crate::queue::{self, Queue};
use crate::schedule::Schedule;
use crate::workspace::Block;
use crate::{Error, decode, merge, panels};

/// Below this much work (about 50 us on one core) waking other threads costs more than it saves.
pub(crate) const MIN_PARALLEL_FLOPS: f64 = 4e6;

/// Scratch memory up to this size stays with its thread between calls.
const KEPT_FLOATS: usize = 256 * 1024;

thread_local! {
    static KEPT: RefCell<Option<(usize, Block)>> = const { RefCell::new(None) };
}

/// The kernels of one instruction set and dtype.
#[derive(Clone, Copy)]
struct Kernels {
    panels: unsafe fn(&Call<'_>, &Task, panels::Scratch, *mut f32, &mut Ticker<'_>),
    panels_scratch: fn(&Call<'_>, usize, usize) -> panels::Scratch,
    decode: unsafe fn(&Call<'_>, &Task, decode::Scratch, *mut f32, &mut Ticker<'_>),
    decode_scratch: unsafe fn(&Call<'_>, &Schedule<'_>, usize) -> decode::Scratch,
    merge: unsafe fn(&Call<'_>, &Task, &[*const f32]),
}

/// Instantiates the generic paths inside functions that enable an instruction set.
macro_rules! kernels {
    ($isa:ty, $element:ty $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn run_panels(c: &Call<'_>, t: &Task, s: panels::Scratch, b: *mut f32, k: &mut Ticker<'_>) {
            panels::run::<$isa, $element>(c, t, s, b, k);
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn run_decode(c: &Call<'_>, t: &Task, s: decode::Scratch, b: *mut f32, k: &mut Ticker<'_>) {
            decode::run::<$isa, $element>(c, t, s, b, k);
        }
        Kernels {
            panels: run_panels,
            panels_scratch: panels::Scratch::new::<$isa>,
            decode: run_decode,
            decode_scratch: decode::Scratch::new::<$isa>,
            merge: merge::run::<$element>,
        }
    }};
}

fn kernels(isa: Isa, dtype: Dtype) -> Kernels {
    instantiate!(kernels, isa, dtype)
}

/// Executes a call.
///
/// # Safety
/// The contract of [`crate::forward`]; `isa` must be available.
pub(crate) unsafe fn forward(
    call: &Call<'_>,
    isa: Isa,
    threads: usize,
    interrupted: &mut dyn FnMut() -> bool,
) -> Result<(), Error> {
    let schedule = Schedule::new(call, threads)?;
    let kernels = kernels(isa, call.problem.dtype);
    clear_uncovered(call, &schedule);
    let workers = if call.problem.flops() >= MIN_PARALLEL_FLOPS { threads.saturating_sub(1) } else { 0 };
    let rows = call.tile.task_rows.min((call.problem.lengths.max_query_len() * call.group).max(1));
    let scratch = match call.tile.path {
        CpuPath::Panels => {
            let keys = call.tile.key_block.min(call.problem.lengths.max_key_len().max(1));
            Scratch::Panels((kernels.panels_scratch)(call, rows, keys))
        }
        CpuPath::Decode => Scratch::Decode((kernels.decode_scratch)(call, &schedule, rows)),
    };
    let run = Run { call, schedule: &schedule, kernels, scratch };
    let helpers = workers.min(schedule.tasks().saturating_sub(1));
    Queue::run(helpers, interrupted, |queue, ticker| run.tasks(queue, ticker))?;
    queue::for_each(helpers, schedule.merges(), |index| run.merge(index));
    Ok(())
}

/// The layout of a thread's scratch memory.
#[derive(Clone, Copy)]
enum Scratch {
    Panels(panels::Scratch),
    Decode(decode::Scratch),
}

struct Run<'a> {
    call: &'a Call<'a>,
    schedule: &'a Schedule<'a>,
    kernels: Kernels,
    scratch: Scratch,
}

// SAFETY: partial results are written by one task each, and merged after all tasks.
unsafe impl Sync for Run<'_> {}

impl Run<'_> {
    /// Takes tasks until there are none.
    fn tasks(&self, queue: &Queue, ticker: &mut Ticker<'_>) -> Result<(), Error> {
        let next =
            |ticker: &mut Ticker<'_>| queue.next(self.schedule.tasks(), ticker).map(|index| self.schedule.task(index));
        match self.scratch {
            Scratch::Panels(scratch) => with_scratch(scratch.len(), |block| {
                while let Some(task) = next(ticker) {
                    // SAFETY: `forward`'s contract; the scratch block has the size that the layout asks for.
                    unsafe { (self.kernels.panels)(self.call, &task, scratch, block, ticker) }
                }
            }),
            Scratch::Decode(scratch) => with_scratch(scratch.len(), |block| {
                while let Some(task) = next(ticker) {
                    // SAFETY: as above.
                    unsafe { (self.kernels.decode)(self.call, &task, scratch, block, ticker) }
                }
            }),
        }
    }

    fn merge(&self, index: usize) {
        let (task, splits) = self.schedule.merge(index);
        // SAFETY: all tasks have finished, so every partial result is written.
        unsafe { (self.kernels.merge)(self.call, &task, &splits) }
    }
}

/// Runs `work` with `len` float32 values of scratch memory, kept for the thread's next call when it is small.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(*mut f32) -> R) -> Result<R, Error> {
    let kept = KEPT.with(|kept| kept.borrow_mut().take()).filter(|(size, _)| *size >= len);
    let (size, block) = match kept {
        Some(kept) => kept,
        None => (len, Block::new(len)?),
    };
    let result = work(block.as_ptr());
    if size <= KEPT_FLOATS {
        KEPT.with(|kept| *kept.borrow_mut() = Some((size, block)));
    }
    Ok(result)
}

/// Rows of a packed q outside all sequences: output 0, LSE +inf.
unsafe fn clear_uncovered(call: &Call<'_>, schedule: &Schedule<'_>) {
    let Lengths::Packed { total_query, .. } = call.problem.lengths else { return };
    let (strides, row_bytes) = (&call.outputs.out_strides, call.problem.value_dim * call.problem.dtype.size());
    for token in schedule.uncovered(total_query).into_iter().flatten() {
        for head in 0..call.problem.query_heads {
            let element = token as i64 * strides.row + head as i64 * strides.head;
            call.outputs.out.offset(element as isize * call.problem.dtype.size() as isize).write_bytes(0, row_bytes);
            if !call.outputs.lse.is_null() {
                call.outputs.lse.add(head * total_query + token).write(f32::INFINITY);
            }
        }
    }
}
