//! From the sums of the splits to the gradients of k, v and the sinks.

use std::ops::Range;

use mtlflashattn_core::{Lengths, Strides};

use super::schedule::{Columns, Head, Schedule};
use super::{Backward, Gradient};
use crate::call::offset;
use crate::element::{Element, narrow};
use crate::isa::Simd;

/// Adds the `sums` of a head's splits up, one behind the other, and writes its rows.
///
/// # Safety
/// The gradients must be valid, and every split must hold the sums of its part.
#[inline(always)]
pub(super) unsafe fn run<S: Simd, T: Element>(backward: &Backward<'_>, head: &Head, sums: *const f32) {
    let (problem, columns) = (backward.call.problem, head.columns);
    let keys = (&backward.wanted.k, 0..columns.key_chunks, problem.head_dim, problem.scale);
    let value_chunks = columns.key_chunks..columns.key_chunks + columns.value_chunks;
    let values = (&backward.wanted.v, value_chunks, problem.value_dim, 1.0);
    for (gradient, chunks, width, factor) in [keys, values] {
        if !gradient.data.is_null() {
            write_rows::<S, T>(head, sums, gradient, chunks, width, factor);
        }
    }
}

#[inline(always)]
unsafe fn write_rows<S: Simd, T: Element>(
    head: &Head,
    sums: *const f32,
    gradient: &Gradient,
    chunks: Range<usize>,
    width: usize,
    factor: f32,
) {
    let sequence = &head.task.sequence;
    let chunk_len = head.columns.chunk(sequence.key_len);
    // At most 32 columns.
    let mut total = [0.0f32; 32];
    for key in 0..sequence.key_len {
        let token = sequence.key_start + key;
        let row = gradient.data.cast::<T>().offset(offset(&gradient.strides, sequence, token, head.task.key_head));
        for (chunk, columns) in chunks.clone().zip(Columns::of_width::<S>(width)) {
            let at = chunk * chunk_len + key * S::PANEL;
            for n in (0..columns.len()).step_by(S::LANES) {
                let mut sum = S::splat(0.0);
                for split in 0..head.splits {
                    sum = S::add(sum, S::load(sums.add(split * head.part_len + at + n)));
                }
                S::store(total.as_mut_ptr().add(n), S::mul(sum, S::splat(factor)));
            }
            narrow::<S, T>(total.as_ptr(), columns.len(), row.add(columns.start));
        }
    }
}

/// The gradient of the sinks.
pub(super) unsafe fn sinks(backward: &Backward<'_>, schedule: &Schedule) {
    let to = backward.wanted.sinks;
    if to.is_null() {
        return;
    }
    to.write_bytes(0, backward.call.problem.query_heads);
    // SAFETY: every part has written its values, and there is a gradient for each query head.
    schedule.each_sink(|head, value| unsafe { *to.add(head) += *value });
}

/// Rows of packed tensors outside all sequences have gradients of 0.
pub(super) unsafe fn clear_uncovered(backward: &Backward<'_>, schedule: &Schedule) {
    let problem = backward.call.problem;
    let Lengths::Packed { total_query, total_key, .. } = problem.lengths else { return };
    let queries = schedule.sequences().map(|s| s.query_start..s.query_start + s.query_len);
    let keys: Vec<_> = schedule.sequences().map(|s| s.key_start..s.key_start + s.key_len).collect();
    let size = problem.dtype.size();
    let wanted = backward.wanted;
    clear(&wanted.q, gaps(queries, total_query), problem.query_heads, problem.head_dim * size, size);
    for (gradient, dim) in [(&wanted.k, problem.head_dim), (&wanted.v, problem.value_dim)] {
        clear(gradient, gaps(keys.iter().cloned(), total_key), problem.key_heads, dim * size, size);
    }
}

unsafe fn clear(gradient: &Gradient, gaps: Vec<Range<usize>>, heads: usize, row_bytes: usize, size: usize) {
    let Strides { row, head: head_stride, .. } = gradient.strides;
    if gradient.data.is_null() {
        return;
    }
    for token in gaps.into_iter().flatten() {
        for head in 0..heads {
            let element = token as i64 * row + head as i64 * head_stride;
            gradient.data.offset(element as isize * size as isize).write_bytes(0, row_bytes);
        }
    }
}

/// What `covered`, in ascending order, leaves of `0..total`.
fn gaps(covered: impl Iterator<Item = Range<usize>>, total: usize) -> Vec<Range<usize>> {
    let mut gaps = Vec::new();
    let mut next = 0;
    for range in covered {
        if range.start > next {
            gaps.push(next..range.start);
        }
        next = next.max(range.end);
    }
    if next < total {
        gaps.push(next..total);
    }
    gaps
}
