//! From a problem to the arguments and the grid of its kernel: the parameter block and the buffer indices are decided
//! here and in `kernels/common.metal`, and nowhere else.
//!
//! | index | argument | bound |
//! | --- | --- | --- |
//! | 0, 1, 2 | q, k, v | always |
//! | 3 | out | always |
//! | 4 | lse, float32 | if wanted |
//! | 5, 6 | `cu_seqlens_q`, `cu_seqlens_k`, contiguous int32 | if packed |
//! | 7 | `ALiBi` slopes, float32 | if the problem has them |
//! | 8 | bias or boolean mask | if the problem has it |
//! | 9 | sinks, float32 | if the problem has them |
//! | 10 | sizes, int64 | always |
//! | 11 | factors, float32 | always |
//!
//! `cu_seqlens_*` are read on the device alone: kernels cut off what they claim beyond the tensors, and do not compute
//! rows of a sequence beyond `max_seqlen_q`.
//!
//! Every index is bound, as `torch.mps.compile_shader` takes arguments by position: q stands in for absent tensors, whose
//! parameters the kernel does not have.

use std::convert::Infallible;
use std::f32::consts::LOG2_E;

use mtlflashattn_core::{Alignment, Lengths, Problem, Strides};

use crate::{Argument, Grid, Kernel};

pub use mtlflashattn_core::plan::MAX_LEN;

/// Where the results go, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Outputs {
    /// Strides of out; its last stride is 1.
    pub out: Strides,
    /// Where the LSE goes, if it is wanted: batch and head strides of the float32 result, whose rows are neighbours.
    pub lse: Option<LseStrides>,
}

/// Distances between the LSE of neighbouring sequences (0 when packed) and heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LseStrides {
    /// From one sequence to the next.
    pub batch: i64,
    /// From one head to the next.
    pub head: i64,
}

impl LseStrides {
    /// Those of a contiguous `[batch, heads, query_len]`, or `[heads, total_query]` when packed.
    #[must_use]
    pub const fn contiguous(problem: &Problem) -> Self {
        match problem.lengths {
            Lengths::Dense { query_len, .. } => {
                Self { batch: (problem.query_heads * query_len) as i64, head: query_len as i64 }
            }
            Lengths::Packed { total_query, .. } => Self { batch: 0, head: total_query as i64 },
        }
    }
}

/// The tensors of a launch as their device binds them.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<T> {
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
    /// The output, written.
    pub out: T,
    /// The LSE, written; present iff wanted.
    pub lse: Option<T>,
    /// `cu_seqlens_q` and `cu_seqlens_k`; present iff packed.
    pub offsets: Option<(T, T)>,
    /// Present iff the problem has `ALiBi`.
    pub alibi_slopes: Option<T>,
    /// Present iff the problem has a bias.
    pub bias: Option<T>,
    /// Present iff the problem has sinks.
    pub sinks: Option<T>,
}

/// Number of tensors that come before the two parameter lists.
pub const TENSOR_COUNT: usize = 10;

impl<T: Clone> Tensors<T> {
    /// The tensors in the order of their buffer indices.
    #[must_use]
    pub fn in_order(&self) -> [T; TENSOR_COUNT] {
        let or_q = |tensor: &Option<T>| tensor.as_ref().unwrap_or(&self.q).clone();
        let (query_offsets, key_offsets) = self.offsets.clone().unwrap_or_else(|| (self.q.clone(), self.q.clone()));
        [
            self.q.clone(),
            self.k.clone(),
            self.v.clone(),
            self.out.clone(),
            or_q(&self.lse),
            query_offsets,
            key_offsets,
            or_q(&self.alibi_slopes),
            or_q(&self.bias),
            or_q(&self.sinks),
        ]
    }
}

impl<T> Tensors<T> {
    /// The same tensors in another form.
    pub fn map<'a, U>(&'a self, mut each: impl FnMut(&'a T) -> U) -> Tensors<U> {
        let Ok(mapped) = self.try_map(|tensor| Ok::<U, Infallible>(each(tensor)));
        mapped
    }

    /// The same tensors in another form.
    ///
    /// # Errors
    /// The first error of `each`.
    pub fn try_map<'a, U, E>(&'a self, mut each: impl FnMut(&'a T) -> Result<U, E>) -> Result<Tensors<U>, E> {
        let Self { q, k, v, out, lse, offsets, alibi_slopes, bias, sinks } = self;
        Ok(Tensors {
            q: each(q)?,
            k: each(k)?,
            v: each(v)?,
            out: each(out)?,
            lse: lse.as_ref().map(&mut each).transpose()?,
            offsets: match offsets {
                Some((query, key)) => Some((each(query)?, each(key)?)),
                None => None,
            },
            alibi_slopes: alibi_slopes.as_ref().map(&mut each).transpose()?,
            bias: bias.as_ref().map(&mut each).transpose()?,
            sinks: sinks.as_ref().map(&mut each).transpose()?,
        })
    }
}

/// Number of int64 sizes.
pub(crate) const SIZE_COUNT: usize = 36;
/// Number of float32 factors.
pub(crate) const FACTOR_COUNT: usize = 4;

/// One dispatch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch {
    /// The int64 list, `Sizes` in `common.metal`.
    pub sizes: [i64; SIZE_COUNT],
    /// The float32 list, `Factors` in `common.metal`.
    pub factors: [f32; FACTOR_COUNT],
    /// Threadgroups and threads.
    pub grid: Grid,
}

/// A problem that is too large for any kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// A sequence is too long.
    #[error("a sequence of {len} rows; Metal kernels take at most {MAX_LEN}")]
    Length {
        /// Its length.
        len: usize,
    },
    /// A sequence is shorter than a block that `matmul2d` reads from memory.
    #[error("{key_len} keys; this kernel reads blocks of {keys}")]
    Keys {
        /// Length of the sequence.
        key_len: usize,
        /// Keys of a block.
        keys: usize,
    },
    /// There are more threadgroups along an axis than a grid holds.
    #[error("{count} threadgroups along one axis of the grid")]
    Grid {
        /// How many there would be.
        count: usize,
    },
}

impl Launch {
    /// The launch of `kernel`, which was made for `problem` or for one that differs only in sizes.
    ///
    /// # Errors
    /// [`LaunchError`] when a length or the grid is beyond what a kernel counts with.
    pub fn new(problem: &Problem, kernel: &Kernel, outputs: &Outputs) -> Result<Self, LaunchError> {
        let lengths = &problem.lengths;
        check_lengths(problem)?;
        let (query_len, key_len) = (lengths.max_query_len(), lengths.max_key_len());
        let keys = kernel.tile.keys;
        if kernel.reads_whole_blocks() && matches!(lengths, Lengths::Dense { .. }) && (1..keys).contains(&key_len) {
            return Err(LaunchError::Keys { key_len, keys });
        }
        let chunks = problem.value_dim.div_ceil(kernel.tile.value_chunk);
        // MSL counts threads with 32 bits.
        let row_groups = count(query_len.div_ceil(kernel.rows()) * 32)? / 32;
        let head_groups = count(problem.query_heads * chunks * kernel.tile.simdgroups)? / kernel.tile.simdgroups as u32;
        let grid = Grid {
            threadgroups: [row_groups, head_groups, count(lengths.batch())?],
            group: [32, kernel.tile.simdgroups as u32, 1],
        };
        Ok(Self { sizes: sizes(problem, chunks, outputs), factors: factors(problem), grid })
    }

    /// Whether there is nothing to compute: dispatching no threadgroups is an error on some devices.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.grid.threadgroups.contains(&0)
    }

    /// The arguments in the order of their buffer indices.
    #[must_use]
    pub fn arguments<'a, B>(&'a self, tensors: &Tensors<&'a B>) -> Vec<Argument<'a, B>> {
        let buffers = tensors.in_order().into_iter().map(Argument::Buffer);
        buffers.chain([Argument::Ints(&self.sizes), Argument::Floats(&self.factors)]).collect()
    }
}

/// Requires lengths that kernels can count with.
pub(crate) fn check_lengths(problem: &Problem) -> Result<(), LaunchError> {
    let lens = [problem.lengths.max_query_len(), problem.lengths.max_key_len()];
    lens.into_iter().find(|&len| len > MAX_LEN).map_or(Ok(()), |len| Err(LaunchError::Length { len }))
}

/// `count` as a grid holds it.
pub(crate) fn count(count: usize) -> Result<u32, LaunchError> {
    u32::try_from(count).map_err(|_| LaunchError::Grid { count })
}

pub(crate) fn sizes(problem: &Problem, chunks: usize, outputs: &Outputs) -> [i64; SIZE_COUNT] {
    let bias = problem.bias;
    let lse = outputs.lse.unwrap_or(LseStrides { batch: 0, head: 0 });
    // A bound beyond every length is open as well.
    let window = |bound: Option<usize>| bound.unwrap_or(0).min(MAX_LEN) as i64;
    let strides = |strides: Strides| [strides.batch, strides.row, strides.head];
    // Offsets of 32 bits reach no further.
    let countable = |rows: usize| rows.min(i32::MAX as usize) as i64;
    let key_rows = match problem.lengths {
        Lengths::Dense { batch, key_len, .. } => batch * key_len,
        Lengths::Packed { total_key, .. } => total_key,
    };
    let scalars = [
        problem.lengths.max_query_len() as i64,
        problem.lengths.max_key_len() as i64,
        countable(problem.lengths.query_rows()),
        countable(key_rows),
        problem.head_dim as i64,
        problem.value_dim as i64,
        problem.group() as i64,
        chunks as i64,
        window(problem.mask.left),
        window(problem.mask.right),
        i64::from(problem.mask.alignment == Alignment::TopLeft),
    ];
    let rows = [problem.q, problem.k, problem.v, outputs.out].map(strides);
    let alibi = problem.alibi.map_or([0; 2], |alibi| [alibi.batch, alibi.head]);
    let bias = bias.map_or([0; 4], |bias| [bias.batch, bias.head, bias.query, bias.key]);
    let dropout = problem.dropout.map_or([0; 3], |dropout| {
        [i64::from(dropout.threshold()), dropout.seed.cast_signed(), dropout.offset.cast_signed()]
    });
    let mut all = scalars
        .into_iter()
        .chain(rows.into_iter().flatten())
        .chain([lse.batch, lse.head])
        .chain(alibi)
        .chain(bias)
        .chain([problem.sinks.unwrap_or(0), problem.query_heads as i64])
        .chain(dropout);
    std::array::from_fn(|_| all.next().unwrap_or(0))
}

pub(crate) fn factors(problem: &Problem) -> [f32; FACTOR_COUNT] {
    let magnitude = problem.scale.abs();
    let score = if problem.softcap > 0.0 { magnitude / problem.softcap } else { magnitude * LOG2_E };
    // The sign goes into q, exactly, so that the largest product of a row has the largest score.
    let kept = problem.dropout.map_or(1.0, |dropout| dropout.factor());
    [if problem.scale < 0.0 { -1.0 } else { 1.0 }, score, problem.softcap * LOG2_E, kept]
}
