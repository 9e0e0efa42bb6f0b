//! Which tensors share memory: a cache is written in place, so that no element of it may have two places, and nothing
//! that the call reads may lie in it.

use mtlflashattn_core as core;
use pyo3::intern;
use pyo3::prelude::*;

use crate::call::{Slot, Tensors};
use crate::error::{Error, Result};
use crate::kvcache::call::Names;
use crate::tensor::{Place, View};

/// A tensor in memory: its first byte, and how its elements are spread.
#[derive(Clone, Copy)]
struct Spread<'a> {
    address: usize,
    view: &'a View,
}

/// Requires that the caches of a call that appends can be written in place.
pub fn check(names: Names, objects: &Tensors<Bound<'_, PyAny>>, views: &Tensors<View>) -> Result<()> {
    for slot in [Slot::K, Slot::V] {
        let (Some(object), Some(view)) = (objects.get(slot), views.get(slot)) else { continue };
        if overlaps_itself(view) {
            return Err(refuse(names.of(slot), "a tensor whose elements share memory", "caches with memory for each"));
        }
        if is_frozen(object)? {
            let got = "an inference tensor outside torch.inference_mode()";
            return Err(refuse(names.of(slot), got, "tensors that can be written in place"));
        }
        let cache = Spread { address: address(object, view)?, view };
        for (other_slot, other) in objects.present() {
            let Some(other_view) = views.get(other_slot) else { continue };
            // Each pair of caches once.
            if other_slot == slot || (slot, other_slot) == (Slot::V, Slot::K) {
                continue;
            }
            let other = Spread { address: address(other, other_view)?, view: other_view };
            if overlap(cache, other) {
                let got = format!("a tensor in the memory of {}", names.of(slot));
                return Err(refuse(names.of(other_slot), &got, "tensors apart from the caches, which are written"));
            }
        }
    }
    Ok(())
}

fn refuse(argument: &'static str, got: &str, allowed: &str) -> Error {
    Error::Problem(core::Error::Value { argument, got: got.into(), allowed: allowed.into() })
}

/// Whether torch forbids to write: what was made under inference mode is read-only outside.
fn is_frozen(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = tensor.py();
    Ok(tensor.call_method0(intern!(py, "is_inference"))?.is_truthy()?
        && !py.import(intern!(py, "torch"))?.call_method0(intern!(py, "is_inference_mode_enabled"))?.is_truthy()?)
}

/// The address of the first element; of another device the one that its storage calls so.
fn address(tensor: &Bound<'_, PyAny>, view: &View) -> PyResult<usize> {
    if view.place == Place::Cpu {
        return Ok(view.data.addr());
    }
    let py = tensor.py();
    let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
    let start: usize = storage.call_method0(intern!(py, "data_ptr"))?.extract()?;
    let offset: usize = tensor.call_method0(intern!(py, "storage_offset"))?.extract()?;
    Ok(start + offset * view.element.size())
}

/// Sizes above 1 with their strides, largest stride first.
fn dimensions(view: &View) -> Vec<(i64, i64)> {
    let mut all: Vec<_> = view.shape().iter().copied().zip(view.strides().iter().copied()).collect();
    all.retain(|&(size, _)| size > 1);
    all.sort_unstable_by_key(|&(_, stride)| std::cmp::Reverse(stride));
    all
}

/// Whether two elements may have one place: exact where the dimensions nest, as those of views of one tensor do.
fn overlaps_itself(view: &View) -> bool {
    if view.is_empty() {
        return false;
    }
    let mut reach = 0;
    dimensions(view).iter().rev().any(|&(size, stride)| {
        let overlaps = stride <= reach;
        reach += (size - 1) * stride;
        overlaps
    })
}

/// Whether two tensors share memory: exact for equal strides, which the two halves of one cache have; else whether the
/// ranges of their memory meet.
fn overlap(a: Spread<'_>, b: Spread<'_>) -> bool {
    let (a_end, b_end) = (a.address + a.view.extent(), b.address + b.view.extent());
    if a.view.is_empty() || b.view.is_empty() || a_end <= b.address || b_end <= a.address {
        return false;
    }
    let size = a.view.element.size() as i64;
    let apart = b.address as i64 - a.address as i64;
    let same = a.view.element == b.view.element && a.view.strides() == b.view.strides();
    if !same || a.view.shape() != b.view.shape() || apart % size != 0 {
        return true;
    }
    let mut tries = 1000;
    reaches(&dimensions(a.view), apart / size, &mut tries)
}

/// Whether `distance` is a sum of `step * stride` with `|step| < size` for each dimension; true after too many tries.
fn reaches(dimensions: &[(i64, i64)], distance: i64, tries: &mut u32) -> bool {
    let Some((&(size, stride), rest)) = dimensions.split_first() else { return distance == 0 };
    let within: i64 = rest.iter().map(|(size, stride)| (size - 1) * stride).sum();
    let least = (distance - within).div_euclid(stride).max(1 - size);
    let most = (distance + within).div_euclid(stride).min(size - 1);
    (least..=most).any(|step| {
        *tries = tries.saturating_sub(1);
        *tries == 0 || reaches(rest, distance - step * stride, tries)
    })
}
