//! What the buffers of a cache hold, copied to the host so that nobody can change it after the check.

use mtlflashattn_core::{CacheBuffers, CacheLayout, CacheLengths, Problem};
use pyo3::intern;
use pyo3::prelude::*;

use crate::call::{Slot, Tensors};
use crate::error::Result;
use crate::execute::{Offsets, read_plain, unreadable};
use crate::kvcache::call::{CacheCall, Names};
use crate::tensor::{Place, View};
use crate::torch::Torch;

/// The contents of the buffers of one call, checked.
#[derive(Debug, Default)]
pub struct Contents {
    lengths: Vec<i32>,
    slots: Vec<i32>,
    left_pad: Vec<i32>,
    pages: Vec<i32>,
    /// `cu_seqlens_q` of packed queries.
    pub offsets: Offsets,
}

impl Contents {
    /// Reads and checks the buffers of a call; those of another device are copied, which waits for it.
    pub fn read(
        torch: &Torch,
        names: Names,
        objects: &Tensors<Bound<'_, PyAny>>,
        views: &Tensors<View>,
        call: &CacheCall,
    ) -> Result<Self> {
        let problem = &call.described.problem;
        let cache = problem.cache.as_ref().expect("a call over a cache");
        let read = |slot| read_int32(torch, slot, objects, views);
        let lengths = match cache.lengths {
            CacheLengths::Same(_) => Vec::new(),
            CacheLengths::Each => read(Slot::CacheSeqlens)?,
            CacheLengths::Offsets => read(Slot::CuSeqlensK)?,
        };
        let mut contents = Self {
            lengths,
            slots: read(Slot::CacheBatchIdx)?,
            left_pad: read(Slot::CacheLeftpad)?,
            pages: Vec::new(),
            offsets: Offsets { query: read(Slot::CuSeqlensQ)?, key: Vec::new() },
        };
        contents.pages = contents.read_pages(torch, objects, views, problem)?;
        contents.check(problem, call).map_err(|error| names.translate(error))?;
        Ok(contents)
    }

    /// The entries of the block table that hold positions; 0 for the others, of which there may be many more.
    fn read_pages(
        &self,
        torch: &Torch,
        objects: &Tensors<Bound<'_, PyAny>>,
        views: &Tensors<View>,
        problem: &Problem,
    ) -> Result<Vec<i32>> {
        let cache = problem.cache.as_ref().expect("a call over a cache");
        let CacheLayout::Pages { len, per_sequence, .. } = cache.layout else { return Ok(Vec::new()) };
        let Some((_alive, table)) = on_host(torch, Slot::BlockTable, objects, views)? else { return Ok(Vec::new()) };
        let mut pages = vec![0; problem.lengths.batch() * per_sequence];
        for sequence in 0..problem.lengths.batch() {
            // Lengths are not checked yet.
            let filled = match cache.lengths {
                CacheLengths::Same(len) => len,
                CacheLengths::Each => usize::try_from(self.lengths[sequence]).unwrap_or(0),
                CacheLengths::Offsets => {
                    usize::try_from(self.lengths[sequence + 1].saturating_sub(self.lengths[sequence])).unwrap_or(0)
                }
            };
            let used = (filled + cache.new_len).div_ceil(len).min(per_sequence);
            let row = copy_int32(&table.select(0, sequence as i64), used as i64);
            pages[sequence * per_sequence..][..used].copy_from_slice(&row);
        }
        Ok(pages)
    }

    fn check(&self, problem: &Problem, call: &CacheCall) -> mtlflashattn_core::Result<()> {
        problem.lengths.check_query_offsets(&self.offsets.query)?;
        problem.check_cache(&self.buffers())?;
        call.append.map_or(Ok(()), |append| append.check_positions(problem, &self.buffers()))
    }

    /// As engines take them.
    pub fn buffers(&self) -> CacheBuffers<'_> {
        CacheBuffers { lengths: &self.lengths, slots: &self.slots, left_pad: &self.left_pad, pages: &self.pages }
    }
}

/// The elements of a vector of int32; nothing where there is no tensor.
fn read_int32(
    torch: &Torch,
    slot: Slot,
    objects: &Tensors<Bound<'_, PyAny>>,
    views: &Tensors<View>,
) -> Result<Vec<i32>> {
    let vector = on_host(torch, slot, objects, views)?;
    Ok(vector.map_or_else(Vec::new, |(_alive, view)| copy_int32(&view, view.shape()[0])))
}

/// A tensor in CPU memory, and its view: of what came, or of a copy.
fn on_host<'py>(
    torch: &Torch,
    slot: Slot,
    objects: &Tensors<Bound<'py, PyAny>>,
    views: &Tensors<View>,
) -> Result<Option<(Bound<'py, PyAny>, View)>> {
    let (Some(object), Some(view)) = (objects.get(slot), views.get(slot)) else { return Ok(None) };
    if view.place == Place::Cpu {
        return Ok(Some((object.clone(), *view)));
    }
    let here = object.call_method0(intern!(object.py(), "cpu"))?;
    let view = read_plain(torch, &here)?.ok_or_else(|| unreadable(slot.name()))?;
    Ok(Some((here, view)))
}

/// The first `count` elements of a vector of int32 in CPU memory.
fn copy_int32(vector: &View, count: i64) -> Vec<i32> {
    #[allow(clippy::cast_ptr_alignment, reason = "read unaligned")]
    let start = vector.data.cast_const().cast::<i32>();
    let stride = vector.strides()[0] as isize;
    // SAFETY: `count` elements with this stride are in CPU memory; unaligned reads take any address.
    (0..count as isize).map(|index| unsafe { start.offset(index * stride).read_unaligned() }).collect()
}
