//! Small problems with known answers: what a kernel has to get right on a device before it serves there.
//!
//! They depend on the kernel alone, so that one verdict holds for all calls. Together they have every feature of the kernel
//! and the cases in which kernels go wrong: more rows than one threadgroup holds, and fewer; whole blocks of keys with a
//! tail, one tail alone; rows without keys; windows that hide whole blocks; shared key heads; sequences of no rows; both
//! alignments; rows, heads and sequences in either order of memory; broadcast and transposed biases; a sink that is none;
//! a negative scale. What lies between and behind the rows of the tensors is NaN, and so is what was never written.

mod append;
mod backward;
mod cached;
mod cases;
mod forward;

use mtlflashattn_core::{Dtype, TensorMeta};

pub use append::{SmallAppend, rotation_bound};
pub use backward::SmallBackward;
pub use forward::SmallProblem;

/// Elements behind the last row of a tensor.
const TAIL: usize = 8;

/// What the elements of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Numbers.
    Float(Dtype),
    /// 32-bit offsets.
    Int32,
    /// Bytes that are 0 or 1.
    Bool,
}

/// A tensor in memory; every value can be represented exactly.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    /// What its elements are.
    pub element: Element,
    /// All elements in the order of memory, with what lies between and behind those of the tensor.
    pub values: Vec<f64>,
    /// Its sizes.
    pub shape: Vec<i64>,
    /// Its strides in elements; the first element of the tensor is the first of the memory.
    pub strides: Vec<i64>,
}

impl Memory {
    fn contiguous(element: Element, values: Vec<f64>, shape: Vec<i64>) -> Self {
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        Self { element, values, shape, strides }
    }

    /// Lays out `[tokens, heads, dim]` for `batch` sequences of equal length, or for one where they are packed. Memory
    /// outside of the tensor is NaN.
    fn laid_out(dtype: Dtype, values: &[f64], [batch, rows, heads, dim]: [usize; 4], layout: &Layout) -> Self {
        let pitch = dim + layout.gap;
        let [row, head] = if layout.heads_first { [pitch, rows * pitch] } else { [heads * pitch, pitch] };
        let strides = [rows * heads * pitch, row, head, 1];
        let shape = [batch, rows, heads, dim];
        let mut memory = vec![f64::NAN; batch * rows * heads * pitch + TAIL];
        let mut values = values.iter();
        each_index(&shape, &strides, |index| memory[index] = *values.next().expect("as many values as elements"));
        let axes = if layout.packed { 1.. } else { 0.. };
        let signed = |sizes: [usize; 4]| sizes[axes.clone()].iter().map(|&size| size as i64).collect();
        Self { element: Element::Float(dtype), values: memory, shape: signed(shape), strides: signed(strides) }
    }

    fn meta(&self, dtype: Dtype) -> TensorMeta<'_> {
        TensorMeta { dtype, shape: &self.shape, strides: &self.strides }
    }

    /// The elements of the tensor in `memory`, and whether everything else there still is what it was: NaN.
    fn read(&self, memory: &[f64]) -> (Vec<f64>, bool) {
        let [shape, strides] = [&self.shape, &self.strides].map(|sizes| {
            let mut all = [1; 4];
            for (to, &from) in all[4 - sizes.len()..].iter_mut().zip(sizes) {
                *to = from as usize;
            }
            all
        });
        let mut rest = memory.to_vec();
        let mut elements = Vec::new();
        each_index(&shape, &strides, |index| {
            elements.push(memory[index]);
            rest[index] = f64::NAN;
        });
        (elements, rest.iter().all(|value| value.is_nan()))
    }
}

/// Visits the elements of a tensor in order, by their index in memory.
fn each_index(shape: &[usize; 4], strides: &[usize; 4], mut visit: impl FnMut(usize)) {
    for element in 0..shape.iter().product() {
        let (mut rest, mut index) = (element, 0);
        for axis in (0..4).rev() {
            index += rest % shape[axis] * strides[axis];
            rest /= shape[axis];
        }
        visit(index);
    }
}

struct Layout {
    packed: bool,
    heads_first: bool,
    /// Elements behind each row.
    gap: usize,
}
