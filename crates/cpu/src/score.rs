//! What happens to a score between the two products: softcap, ALiBi, bias, visibility.
//!
//! Scores are kept in units of log2, so that the softmax needs no further factor.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use half::{bf16, f16};
use mtlflashattn_core::{BiasKind, Dtype, Problem};

use crate::call::{Call, Task};
use crate::isa::Simd;
use crate::math;

/// The factor folded into Q. With a softcap the scores must first pass through `tanh`.
pub(crate) fn query_factor(problem: &Problem) -> f32 {
    if problem.softcap > 0.0 { problem.scale / problem.softcap } else { problem.scale * LOG2_E }
}

/// `score = softcap * tanh(score)` over `len` scores, a multiple of the vector length.
#[inline(always)]
pub(crate) unsafe fn softcap<S: Simd>(scores: *mut f32, len: usize, softcap: f32) {
    let factor = S::splat(softcap * LOG2_E);
    for i in (0..len).step_by(S::LANES) {
        let p = scores.add(i);
        S::store(p, S::mul(factor, math::tanh::<S>(S::load(p))));
    }
}

/// The bias of one row against a range of keys, in units of log2; a hidden key is negative infinity.
pub(crate) struct BiasRow {
    pointer: *const u8,
    key_stride: isize,
    kind: BiasKind,
}

impl BiasRow {
    /// The bias of row `row`, when the problem has one.
    pub(crate) unsafe fn of(call: &Call<'_>, task: &Task, row: usize) -> Option<Self> {
        let bias = call.problem.bias?;
        let offset = task.sequence.index as i64 * bias.batch
            + call.head(task, row) as i64 * bias.head
            + call.query(row) as i64 * bias.query;
        let size = match bias.kind {
            BiasKind::Additive(dtype) => dtype.size() as isize,
            BiasKind::Boolean => 1,
        };
        let pointer = call.inputs.bias.offset(offset as isize * size);
        Some(Self { pointer, key_stride: bias.key as isize * size, kind: bias.kind })
    }

    /// Writes the bias of `keys` to `to`.
    #[inline(always)]
    pub(crate) unsafe fn read(&self, keys: Range<usize>, to: *mut f32) {
        match self.kind {
            BiasKind::Additive(Dtype::F32) => {
                self.each(keys, to, |p| p.cast::<f32>().read_unaligned() * LOG2_E);
            }
            BiasKind::Additive(Dtype::F16) => {
                self.each(keys, to, |p| p.cast::<f16>().read_unaligned().to_f32() * LOG2_E);
            }
            BiasKind::Additive(Dtype::Bf16) => {
                self.each(keys, to, |p| p.cast::<bf16>().read_unaligned().to_f32() * LOG2_E);
            }
            BiasKind::Boolean => self.each(keys, to, |p| if p.read() == 0 { f32::NEG_INFINITY } else { 0.0 }),
        }
    }

    #[inline(always)]
    unsafe fn each(&self, keys: Range<usize>, to: *mut f32, value: impl Fn(*const u8) -> f32) {
        let mut pointer = self.pointer.offset(keys.start as isize * self.key_stride);
        for i in 0..keys.len() {
            to.add(i).write(value(pointer));
            pointer = pointer.offset(self.key_stride);
        }
    }
}
