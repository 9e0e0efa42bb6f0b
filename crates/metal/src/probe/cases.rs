//! Sizes, inputs and numbers of small problems.

use mtlflashattn_core::reference::ReferenceInputs;
use mtlflashattn_core::{Alignment, BiasKind, Dropout, Dtype, Error, Options, Problem};

use super::{Element, Layout, Memory, each_index};
use crate::Features;

/// Elements behind each row of tensors whose heads come first, for a kernel that needs aligned rows, and for any other.
const GAPS: [usize; 2] = [8, 3];
/// Elements of ALiBi slopes, sinks and LSE.
pub(super) const FLOAT: Element = Element::Float(Dtype::F32);

/// What small problems have to suit.
pub(super) struct Needs {
    pub(super) dtype: Dtype,
    pub(super) head_dim: usize,
    pub(super) value_dim: usize,
    pub(super) features: Features,
    /// Rows of a threadgroup.
    pub(super) rows: usize,
    /// Rows of the blocks that it walks over.
    pub(super) block: usize,
    /// Whether the rows of a threadgroup are keys, and those of blocks queries.
    pub(super) owns_keys: bool,
    /// Fewest keys of a sequence of a dense problem.
    pub(super) least_keys: usize,
    /// Whether rows must begin at multiples of four elements.
    pub(super) aligned: bool,
}

/// A small problem with its inputs.
pub(super) struct Given {
    pub(super) problem: Problem,
    pub(super) q: Memory,
    pub(super) k: Memory,
    pub(super) v: Memory,
    pub(super) offsets: Option<(Memory, Memory)>,
    pub(super) alibi_slopes: Option<Memory>,
    pub(super) bias: Option<Memory>,
    pub(super) sinks: Option<Memory>,
    pub(super) queries: Sequences,
    pub(super) keys: Sequences,
    /// Whether heads come before rows in q, k and v.
    pub(super) heads_first: bool,
    /// Elements behind rows of tensors whose heads come first.
    pub(super) gap: usize,
    /// The elements of q, k and v.
    pub(super) values: [Vec<f64>; 3],
    full_slopes: Option<Vec<f64>>,
    full_bias: Option<Vec<f64>>,
}

impl Given {
    /// The problem of `case` for a kernel with these `needs`.
    ///
    /// # Errors
    /// Those of [`Problem`], for features that no problem has together.
    pub(super) fn new(case: &Case, needs: &Needs, numbers: &mut Numbers) -> Result<Self, Error> {
        let Features { packed, window_left, window_right, softcap, alibi, bias, sinks, dropout, .. } = needs.features;
        let Needs { dtype, head_dim, value_dim, .. } = *needs;
        let least_keys = if packed { 0 } else { needs.least_keys };
        let (query_lens, key_lens) =
            if needs.owns_keys { (case.key_lens, case.query_lens) } else { (case.query_lens, case.key_lens) };
        let queries = Sequences::new(case, query_lens, needs, 0);
        let keys = Sequences::new(case, key_lens, needs, least_keys);
        let batch = queries.batch;
        let (key_heads, heads) = (case.key_heads, case.key_heads * case.group);
        let mut some = |dtype: Dtype, count: usize| numbers.take(dtype, count);
        let q = some(dtype, queries.rows * heads * head_dim);
        let k = some(dtype, keys.rows * key_heads * head_dim);
        let v = some(dtype, keys.rows * key_heads * value_dim);
        let gap = if needs.aligned { GAPS[0] } else { GAPS[1] };
        let layout = Layout { packed, heads_first: case.heads_first, gap: if case.heads_first { gap } else { 0 } };
        let bias_shape = [batch, heads, queries.longest, keys.longest];
        let stored_bias = bias.map(|kind| stored_bias(kind, case, bias_shape, &mut some));
        let slopes_shape = if case.alibi_batch { vec![batch as i64, heads as i64] } else { vec![heads as i64] };
        let slopes = alibi.then(|| {
            let values = some(Dtype::F32, slopes_shape.iter().product::<i64>() as usize);
            Memory::contiguous(FLOAT, values, slopes_shape)
        });
        let sinks = sinks.then(|| {
            let mut values = some(Dtype::F32, heads);
            // That is no sink.
            values[0] = f64::NEG_INFINITY;
            Memory::contiguous(FLOAT, values, vec![heads as i64])
        });
        let q_memory = queries.lay_out(dtype, &q, heads, head_dim, &layout);
        let k_memory = keys.lay_out(dtype, &k, key_heads, head_dim, &layout);
        let v_memory = keys.lay_out(dtype, &v, key_heads, value_dim, &layout);
        let window = |on: bool, bound: i64| if on { bound } else { -1 };
        let options = Options {
            softmax_scale: Some(case.scale / (head_dim as f64).sqrt()),
            causal: false,
            window: (window(window_left, case.left.of(needs) as i64), window(window_right, case.right)),
            alignment: case.alignment,
            softcap: if softcap { 3.0 } else { 0.0 },
            alibi_slopes: slopes.as_ref().map(|slopes| (&*slopes.shape, &*slopes.strides)),
            bias: bias.zip(stored_bias.as_ref()).map(|(kind, bias)| (kind, &*bias.shape, &*bias.strides)),
            sinks: sinks.as_ref().map(|sinks| (&*sinks.shape, &*sinks.strides)),
            // Seed and offset have bits in both halves.
            dropout: if dropout { Dropout::new(0.3, 0x9876_5432_1012_3456, 0x1234_5678_9abc_def0)? } else { None },
            splits: None,
        };
        let metas = [&q_memory, &k_memory, &v_memory].map(|memory| memory.meta(dtype));
        let problem = if packed {
            let longest = (queries.longest as i64, keys.longest as i64);
            Problem::packed(metas[0], metas[1], metas[2], batch, longest, &options)?
        } else {
            Problem::dense(metas[0], metas[1], metas[2], &options)?
        };
        let full_slopes = slopes.as_ref().map(|slopes| broadcast(slopes, [1, 1, batch, heads]));
        let full_bias = stored_bias.as_ref().map(|bias| broadcast(bias, bias_shape));
        let full_bias = full_bias.map(|values| match bias {
            Some(BiasKind::Boolean) => {
                values.into_iter().map(|x| if x == 0.0 { f64::NEG_INFINITY } else { 0.0 }).collect()
            }
            _ => values,
        });
        Ok(Self {
            problem,
            q: q_memory,
            k: k_memory,
            v: v_memory,
            offsets: packed.then(|| (queries.memory(), keys.memory())),
            alibi_slopes: slopes,
            bias: stored_bias,
            sinks,
            queries,
            keys,
            heads_first: case.heads_first,
            gap,
            values: [q, k, v],
            full_slopes,
            full_bias,
        })
    }

    /// The inputs as the reference reads them.
    pub(super) fn inputs(&self) -> ReferenceInputs<'_> {
        let [q, k, v] = &self.values;
        ReferenceInputs {
            q,
            k,
            v,
            query_offsets: &self.queries.offsets,
            key_offsets: &self.keys.offsets,
            alibi_slopes: self.full_slopes.as_deref(),
            bias: self.full_bias.as_deref(),
            sinks: self.sinks.as_ref().map(|sinks| &*sinks.values),
            ..ReferenceInputs::default()
        }
    }

    /// A layout of its own for another tensor.
    pub(super) const fn layout(&self, heads_first: bool, gap: usize) -> Layout {
        Layout { packed: self.offsets.is_some(), heads_first, gap }
    }

    /// Sizes of the LSE.
    pub(super) fn lse_shape(&self) -> Vec<i64> {
        let heads = self.problem.query_heads as i64;
        if self.offsets.is_some() {
            vec![heads, self.queries.rows as i64]
        } else {
            vec![self.queries.batch as i64, heads, self.queries.longest as i64]
        }
    }
}

/// Sizes and numbers of a small problem.
pub(super) struct Case {
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

/// A length: so many rows of a threadgroup, so many blocks of the rows that it walks over, and a rest.
pub(super) struct Len {
    rows: usize,
    blocks: usize,
    rest: usize,
}

const fn len(rows: usize, blocks: usize, rest: usize) -> Len {
    Len { rows, blocks, rest }
}

impl Len {
    const fn of(&self, needs: &Needs) -> usize {
        self.rows * needs.rows + self.blocks * needs.block + self.rest
    }
}

pub(super) const CASES: [Case; 3] = [
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

/// The sequences of q, or of k and v.
pub(super) struct Sequences {
    pub(super) batch: usize,
    pub(super) rows: usize,
    pub(super) longest: usize,
    /// Where each begins, and where the last one ends.
    pub(super) offsets: Vec<i32>,
}

impl Sequences {
    fn new(case: &Case, lens: &[Len], needs: &Needs, least: usize) -> Self {
        let packed: Vec<usize> = lens.iter().map(|len| len.of(needs).max(least)).collect();
        let lens = if needs.features.packed { packed } else { vec![packed[0]; case.batch] };
        let mut offsets = vec![0];
        for len in &lens {
            offsets.push(offsets[offsets.len() - 1] + *len as i32);
        }
        let longest = lens.iter().copied().max().unwrap_or(0);
        Self { batch: lens.len(), rows: lens.iter().sum(), longest, offsets }
    }

    pub(super) fn memory(&self) -> Memory {
        let values: Vec<f64> = self.offsets.iter().copied().map(f64::from).collect();
        let shape = vec![values.len() as i64];
        Memory::contiguous(Element::Int32, values, shape)
    }

    /// `values` of rows of `heads` by `dim` of these sequences, in memory.
    pub(super) fn lay_out(&self, dtype: Dtype, values: &[f64], heads: usize, dim: usize, layout: &Layout) -> Memory {
        let batch = if layout.packed { 1 } else { self.batch };
        Memory::laid_out(dtype, values, [batch, self.rows / batch, heads, dim], layout)
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
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn take(&mut self, dtype: Dtype, count: usize) -> Vec<f64> {
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
