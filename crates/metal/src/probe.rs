//! Small problems with known answers: what a kernel has to get right on a device before it serves there.
//!
//! They depend on the kernel alone, so that one verdict holds for all calls. Together they have every feature of the kernel
//! and the cases in which kernels go wrong: more rows than one threadgroup holds, and fewer; whole blocks of keys with a
//! tail, one tail alone; rows without keys; windows that hide whole blocks; shared key heads; sequences of no rows; both
//! alignments; rows, heads and sequences in either order of memory; broadcast and transposed biases; a sink that is none;
//! a negative scale. What lies between and behind the rows of the tensors is NaN, and so is what was never written.

use mtlflashattn_core::reference::{self, Forward, ReferenceInputs, bounds};
use mtlflashattn_core::{Alignment, BiasKind, Dtype, Error, Options, Problem, TensorMeta};

use crate::{Features, Kernel, Tensors};

/// Columns of q and k for a kernel that reads them at run time: no multiple of anything.
const ANY_HEAD_DIM: usize = 43;
/// Columns of v for such a kernel: more than one chunk.
const ANY_VALUE_DIM: usize = 75;
/// Elements behind each row of tensors whose heads come first, for a kernel that needs aligned rows, and for any other.
const GAPS: [usize; 2] = [8, 3];

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
        let pitch = if layout.heads_first { dim + layout.gap } else { dim };
        let [row, head] = if layout.heads_first { [pitch, rows * pitch] } else { [heads * pitch, pitch] };
        let strides = [rows * heads * pitch, row, head, 1];
        let shape = [batch, rows, heads, dim];
        let mut memory = vec![f64::NAN; batch * rows * heads * pitch + layout.gap];
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
    gap: usize,
}

/// Sizes and numbers of a small problem.
struct Case {
    /// Rows of q of each sequence.
    query_lens: &'static [Len],
    /// The same where sequences are not packed, and so are equally long.
    batch: usize,
    /// Rows of k and v of each sequence.
    key_lens: &'static [Len],
    key_heads: usize,
    group: usize,
    heads_first: bool,
    /// Bounds of the window, where the kernel has one.
    left: Len,
    right: i64,
    alignment: Alignment,
    /// About three times the largest scores: at 6 neither all keys are alike nor does one stand alone.
    scale: f64,
    /// Whether the ALiBi slopes differ between sequences.
    alibi_batch: bool,
    /// Dimensions of the bias that are not broadcast.
    bias: [bool; 4],
    /// Whether the queries of the bias are neighbours, and not its keys.
    bias_transposed: bool,
}

/// A length: so many rows of a threadgroup, so many blocks of keys, and a rest.
struct Len {
    rows: usize,
    blocks: usize,
    rest: usize,
}

const fn len(rows: usize, blocks: usize, rest: usize) -> Len {
    Len { rows, blocks, rest }
}

impl Len {
    const fn of(&self, kernel: &Kernel) -> usize {
        self.rows * kernel.rows() + self.blocks * kernel.tile.keys + self.rest
    }
}

const CASES: [Case; 3] = [
    // Two threadgroups of rows, the second nearly empty; whole blocks and a tail; causal, with blocks hidden on the
    // left. Scores differ so much that the maximum moves from block to block.
    Case {
        query_lens: &[len(1, 0, 5), len(0, 0, 0), len(0, 0, 2)],
        batch: 1,
        key_lens: &[len(0, 3, 37), len(0, 0, 4), len(0, 0, 1)],
        key_heads: 1,
        group: 2,
        heads_first: false,
        left: len(0, 1, 3),
        right: 0,
        alignment: Alignment::BottomRight,
        scale: 20.0,
        alibi_batch: true,
        bias: [true; 4],
        bias_transposed: false,
    },
    // A few rows against one block and one key more, in sequences whose heads lie apart.
    Case {
        query_lens: &[len(0, 0, 3), len(0, 0, 1)],
        batch: 2,
        key_lens: &[len(0, 1, 1), len(0, 2, 0)],
        key_heads: 2,
        group: 3,
        heads_first: true,
        left: len(0, 0, 5),
        right: 2,
        alignment: Alignment::TopLeft,
        scale: 6.0,
        alibi_batch: true,
        bias: [true, false, false, true],
        bias_transposed: false,
    },
    // More rows than keys, which are fewer than a block.
    Case {
        query_lens: &[len(0, 1, 6), len(0, 0, 4)],
        batch: 2,
        key_lens: &[len(0, 0, 3), len(0, 0, 5)],
        key_heads: 2,
        group: 1,
        heads_first: false,
        left: len(0, 0, 2),
        right: 1,
        alignment: Alignment::BottomRight,
        scale: -6.0,
        alibi_batch: false,
        bias: [false, true, true, true],
        bias_transposed: true,
    },
];

/// A problem with its tensors and its answer.
pub struct SmallProblem {
    /// The problem.
    pub problem: Problem,
    /// Inputs, and outputs full of NaN. `out` has the strides of the layout, `lse` is contiguous.
    pub tensors: Tensors<Memory>,
    exact: Forward,
    bounds: bounds::Bounds,
}

impl SmallProblem {
    /// The small problems of `kernel`.
    ///
    /// # Errors
    /// Those of [`Problem`], for a kernel with features that no problem has together.
    pub fn all(kernel: &Kernel) -> Result<Vec<Self>, Error> {
        CASES.iter().map(|case| Self::new(case, kernel)).collect()
    }

    fn new(case: &Case, kernel: &Kernel) -> Result<Self, Error> {
        let Features { packed, window_left, window_right, softcap, alibi, bias, sinks, lse, .. } = kernel.features;
        let dtype = kernel.dtype;
        let least_keys = if kernel.reads_whole_blocks() && !packed { kernel.tile.keys } else { 0 };
        let queries = Sequences::new(case, case.query_lens, kernel, 0);
        let keys = Sequences::new(case, case.key_lens, kernel, least_keys);
        let batch = queries.batch;
        let (key_heads, heads) = (case.key_heads, case.key_heads * case.group);
        let [head_dim, value_dim] =
            [kernel.head_dim.unwrap_or(ANY_HEAD_DIM), kernel.value_dim.unwrap_or(ANY_VALUE_DIM)];
        let mut numbers = Numbers(1);
        let mut some = |dtype: Dtype, count: usize| numbers.take(dtype, count);
        let q = some(dtype, queries.rows * heads * head_dim);
        let k = some(dtype, keys.rows * key_heads * head_dim);
        let v = some(dtype, keys.rows * key_heads * value_dim);
        let needs_aligned = kernel.features.aligned || kernel.reads_whole_blocks();
        let gap = if needs_aligned { GAPS[0] } else { GAPS[1] };
        let place = |values: &[f64], sequences: &Sequences, heads: usize, dim: usize, heads_first: bool| {
            let batch = if packed { 1 } else { batch };
            let layout = Layout { packed, heads_first, gap };
            Memory::laid_out(dtype, values, [batch, sequences.rows / batch, heads, dim], &layout)
        };
        let float = Element::Float(Dtype::F32);
        let bias_shape = [batch, heads, queries.longest, keys.longest];
        let stored_bias = bias.map(|kind| stored_bias(kind, case, bias_shape, &mut some));
        let slopes_shape = if case.alibi_batch { vec![batch as i64, heads as i64] } else { vec![heads as i64] };
        let slopes = alibi.then(|| {
            let values = some(Dtype::F32, slopes_shape.iter().product::<i64>() as usize);
            Memory::contiguous(float, values, slopes_shape)
        });
        let sinks = sinks.then(|| {
            let mut values = some(Dtype::F32, heads);
            // That is no sink.
            values[0] = f64::NEG_INFINITY;
            Memory::contiguous(float, values, vec![heads as i64])
        });
        let lse_shape = if packed { vec![heads, queries.rows] } else { vec![batch, heads, queries.longest] };
        let nans = |count: usize| vec![f64::NAN; count];
        let unwritten = |shape: &[usize]| {
            let signed = shape.iter().map(|&size| size as i64).collect();
            Memory::contiguous(float, nans(shape.iter().product()), signed)
        };
        let tensors = Tensors {
            q: place(&q, &queries, heads, head_dim, case.heads_first),
            k: place(&k, &keys, key_heads, head_dim, case.heads_first),
            v: place(&v, &keys, key_heads, value_dim, case.heads_first),
            // The other way round, so that nobody takes the strides of q for those of out.
            out: place(&nans(queries.rows * heads * value_dim), &queries, heads, value_dim, !case.heads_first),
            lse: lse.then(|| unwritten(&lse_shape)),
            offsets: packed.then(|| (queries.memory(), keys.memory())),
            alibi_slopes: slopes,
            bias: stored_bias,
            sinks,
        };
        let window = |on: bool, bound: i64| if on { bound } else { -1 };
        let options = Options {
            softmax_scale: Some(case.scale / (head_dim as f64).sqrt()),
            causal: false,
            window: (window(window_left, case.left.of(kernel) as i64), window(window_right, case.right)),
            alignment: case.alignment,
            softcap: if softcap { 3.0 } else { 0.0 },
            alibi_slopes: tensors.alibi_slopes.as_ref().map(|slopes| (&*slopes.shape, &*slopes.strides)),
            bias: bias.zip(tensors.bias.as_ref()).map(|(kind, bias)| (kind, &*bias.shape, &*bias.strides)),
            sinks: tensors.sinks.as_ref().map(|sinks| (&*sinks.shape, &*sinks.strides)),
            dropout: None,
        };
        let metas = [&tensors.q, &tensors.k, &tensors.v].map(|memory| memory.meta(dtype));
        let problem = if packed {
            let longest = (queries.longest as i64, keys.longest as i64);
            Problem::packed(metas[0], metas[1], metas[2], batch, longest, &options)?
        } else {
            Problem::dense(metas[0], metas[1], metas[2], &options)?
        };
        let has = Features { aligned: kernel.features.aligned, ..Features::of(&problem, lse) };
        debug_assert_eq!(has, kernel.features, "the kernel's features and no others");
        debug_assert!(!kernel.features.aligned || kernel.aligned(&problem, [0; 3]).features.aligned);
        let full_slopes = tensors.alibi_slopes.as_ref().map(|slopes| broadcast(slopes, [1, 1, batch, heads]));
        let full_bias = tensors.bias.as_ref().map(|bias| broadcast(bias, bias_shape));
        let full_bias = full_bias.map(|values| match bias {
            Some(BiasKind::Boolean) => {
                values.into_iter().map(|x| if x == 0.0 { f64::NEG_INFINITY } else { 0.0 }).collect()
            }
            _ => values,
        });
        let inputs = ReferenceInputs {
            q: &q,
            k: &k,
            v: &v,
            query_offsets: &queries.offsets,
            key_offsets: &keys.offsets,
            alibi_slopes: full_slopes.as_deref(),
            bias: full_bias.as_deref(),
            sinks: tensors.sinks.as_ref().map(|sinks| &*sinks.values),
            ..ReferenceInputs::default()
        };
        let exact = reference::forward(&problem, &inputs);
        let bounds = bounds::error_bounds_of(kernel.arithmetic(), &problem, &inputs);
        Ok(Self { problem, tensors, exact, bounds })
    }

    /// What is wrong with the memory of `out` and `lse` after the kernel has run; `None` where nothing is.
    #[must_use]
    pub fn judge(&self, out: &[f64], lse: Option<&[f64]>) -> Option<String> {
        let (out, nothing_else) = self.tensors.out.read(out);
        let got = Forward { out, lse: lse.map_or_else(|| self.exact.lse.clone(), <[f64]>::to_vec) };
        let missing = got.out.iter().chain(&got.lse).filter(|value| value.is_nan()).count();
        if missing > 0 {
            let all = got.out.len() + lse.map_or(0, <[f64]>::len);
            return Some(format!("{missing} of {all} results are NaN or were never written"));
        }
        let (out, lse) = self.bounds.worst(&self.exact, &got);
        if out > 1.0 || lse > 1.0 {
            return Some(format!("results are off by {:.1} times what rounding explains", out.max(lse)));
        }
        (!nothing_else).then(|| "the kernel wrote outside of its output".into())
    }
}

/// The sequences of q, or of k and v.
struct Sequences {
    batch: usize,
    rows: usize,
    longest: usize,
    /// Where each begins, and where the last one ends.
    offsets: Vec<i32>,
}

impl Sequences {
    fn new(case: &Case, lens: &[Len], kernel: &Kernel, least: usize) -> Self {
        let packed: Vec<usize> = lens.iter().map(|len| len.of(kernel).max(least)).collect();
        let lens = if kernel.features.packed { packed } else { vec![packed[0]; case.batch] };
        let mut offsets = vec![0];
        for len in &lens {
            offsets.push(offsets[offsets.len() - 1] + *len as i32);
        }
        let longest = lens.iter().copied().max().unwrap_or(0);
        Self { batch: lens.len(), rows: lens.iter().sum(), longest, offsets }
    }

    fn memory(&self) -> Memory {
        let values: Vec<f64> = self.offsets.iter().copied().map(f64::from).collect();
        let shape = vec![values.len() as i64];
        Memory::contiguous(Element::Int32, values, shape)
    }
}

/// A bias with some dimensions of size 1; a quarter of its elements hide their key.
fn stored_bias(
    kind: BiasKind,
    case: &Case,
    full: [usize; 4],
    some: &mut impl FnMut(Dtype, usize) -> Vec<f64>,
) -> Memory {
    let shape: Vec<i64> = full.iter().zip(case.bias).map(|(&size, kept)| if kept { size as i64 } else { 1 }).collect();
    let count = shape.iter().product::<i64>() as usize;
    let (element, hidden, shown): (_, f64, fn(f64) -> f64) = match kind {
        BiasKind::Additive(dtype) => (Element::Float(dtype), f64::NEG_INFINITY, |x| x),
        BiasKind::Boolean => (Element::Bool, 0.0, |_| 1.0),
    };
    let dtype = if let BiasKind::Additive(dtype) = kind { dtype } else { Dtype::F32 };
    let values = some(dtype, count).into_iter().map(|x| if x < -0.5 { hidden } else { shown(x) });
    let mut memory = Memory::contiguous(element, values.collect(), shape);
    if case.bias_transposed {
        (memory.strides[2], memory.strides[3]) = (1, memory.shape[2]);
    }
    memory
}

/// The elements of a tensor broadcast to `full`.
fn broadcast(memory: &Memory, full: [usize; 4]) -> Vec<f64> {
    let missing = 4 - memory.shape.len();
    let strides = std::array::from_fn(|axis| match axis.checked_sub(missing) {
        Some(own) if memory.shape[own] > 1 => memory.strides[own] as usize,
        _ => 0,
    });
    let mut values = Vec::new();
    each_index(&full, &strides, |index| values.push(memory.values[index]));
    values
}

/// Numbers from -1 to 1 in no apparent order (a linear congruential generator; Knuth, The Art of Computer Programming,
/// volume 2, section 3.3.4, line 26), with as many digits as their type holds.
struct Numbers(u64);

impl Numbers {
    fn take(&mut self, dtype: Dtype, count: usize) -> Vec<f64> {
        // The distance of the numbers below 1.
        let step = dtype.unit_roundoff();
        let next = |_| {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let uniform = (self.0 >> 11) as f64 / (1u64 << 53) as f64;
            ((2.0 * uniform - 1.0) / step).round() * step
        };
        (0..count).map(next).collect()
    }
}
