//! The backward pass: its kernels, their arguments and grids. `kernels/backward*.metal` have the same order.
//!
//! | index | argument | bound |
//! | --- | --- | --- |
//! | 0, 1, 2 | q, k, v | always |
//! | 3, 4 | out and lse of the forward pass | always |
//! | 5, 6 | `cu_seqlens_q`, `cu_seqlens_k`, contiguous int32 | if packed |
//! | 7 | `ALiBi` slopes, float32 | if the problem has them |
//! | 8 | bias or boolean mask | if the problem has it |
//! | 9 | gradient of out | always |
//! | 10 | gradient of lse, float32 | if there is one |
//! | 11 | LSE and delta of every query, two float32 each, written by the first kernel | always |
//! | 12, 13, 14 | gradients of q, k, v | those that are wanted |
//! | 15 | sizes, int64 | always |
//! | 16 | factors, float32 | always |
//!
//! Every kernel takes the whole list, in which q stands in for absent tensors. Sinks are in the LSE.

use std::convert::Infallible;
use std::fmt::Write as _;

use mtlflashattn_core::plan::{BackwardPass, BackwardTile, QueryHome};
use mtlflashattn_core::reference::bounds::Arithmetic;
use mtlflashattn_core::{Dtype, Problem, Strides};

use crate::launch::{FACTOR_COUNT, SIZE_COUNT, check_lengths, count, factors, sizes};
use crate::source::{feature_defines, is_aligned, typedef_scalar};
use crate::{Argument, Features, Grid, LaunchError, LseStrides, Outputs};

/// A variant of a kernel of the backward pass. Equal variants have equal texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct BackwardKernel {
    /// What it computes.
    pub pass: BackwardPass,
    /// Element type of all tensors but the LSE and what is made of it.
    pub dtype: Dtype,
    /// Head dimension of q and k.
    pub head_dim: usize,
    /// Head dimension of v and the output.
    pub value_dim: usize,
    /// Rows, blocks and columns.
    pub tile: BackwardTile,
    /// Code that is compiled in; `lse` says that the LSE has a gradient.
    pub features: Features,
}

impl BackwardKernel {
    /// The kernel of `pass` for `problem` with a tile that [`fits`](Self::fits).
    #[must_use]
    pub const fn new(pass: BackwardPass, problem: &Problem, tile: BackwardTile, lse_gradient: bool) -> Self {
        let Problem { dtype, head_dim, value_dim, .. } = *problem;
        let mut features = Features::of(problem, lse_gradient);
        // They are part of the LSE.
        features.sinks = false;
        if matches!(pass, BackwardPass::Delta) {
            features = Features { packed: features.packed, lse: lse_gradient, ..Features::NONE };
        } else {
            features.lse = false;
        }
        Self { pass, dtype, head_dim, value_dim, tile, features }
    }

    /// This kernel for tensors whose first elements lie `starts` bytes (q, k, v, out, gradient of out) behind an address
    /// that is a multiple of 16: it reads four elements at once if every row lets it.
    #[must_use]
    pub fn aligned(mut self, problem: &Problem, outputs: &BackwardOutputs, starts: [usize; 5]) -> Self {
        let rows = [problem.q, problem.k, problem.v, outputs.out, outputs.d_out];
        self.features.aligned = is_aligned(problem, &rows, &starts);
        self
    }

    /// Name of the entry point in [`source`](Self::source).
    #[must_use]
    pub const fn entry(&self) -> &'static str {
        match self.pass {
            BackwardPass::Delta => "attention_backward_delta",
            BackwardPass::Query => "attention_backward_query",
            BackwardPass::KeysAndValues | BackwardPass::Keys | BackwardPass::Values => "attention_backward_keys",
        }
    }

    /// The text for the Metal compiler: pure ASCII, complete, with everything specialised by `#define`s.
    #[must_use]
    pub fn source(&self) -> String {
        let mut text = String::from("#include <metal_stdlib>\nusing namespace metal;\n\n");
        text.push_str(&self.defines());
        text.push_str(include_str!("../kernels/common.metal"));
        text.push_str(include_str!("../kernels/fragments.metal"));
        text.push_str(include_str!("../kernels/backward.metal"));
        text.push_str(match self.pass {
            BackwardPass::Delta => include_str!("../kernels/backward_delta.metal"),
            BackwardPass::Query => include_str!("../kernels/backward_query.metal"),
            BackwardPass::KeysAndValues | BackwardPass::Keys | BackwardPass::Values => {
                include_str!("../kernels/backward_keys.metal")
            }
        });
        text
    }

    fn defines(&self) -> String {
        let mut text = feature_defines(&Features { lse: false, ..self.features });
        let mut define =
            |name: &str, value: usize| writeln!(text, "#define {name} {value}").expect("writes to a string");
        let [head_chunk, value_chunk] = self.tile.chunk_columns(self.pass, self.head_dim, self.value_dim);
        for (name, value) in [
            ("LSE_GRADIENT", usize::from(self.features.lse)),
            ("ALIGNED", usize::from(self.features.aligned)),
            ("KEY_GRADIENT", usize::from(self.pass.sums_head())),
            ("VALUE_GRADIENT", usize::from(self.pass.sums_value())),
            ("HEAD_DIM", self.head_dim),
            ("VALUE_DIM", self.value_dim),
            ("HEAD_CHUNK", head_chunk),
            ("VALUE_CHUNK", value_chunk),
            ("SIMDGROUPS", self.tile.simdgroups),
            ("ROW_FRAGMENTS", self.tile.row_fragments),
            ("BLOCK", self.tile.block),
            ("STAGED", usize::from(self.tile.staged)),
            ("OWN_IN_REGISTERS", usize::from(self.tile.own == QueryHome::Registers)),
            ("OWN_IN_THREADGROUP", usize::from(self.tile.own == QueryHome::Threadgroup)),
        ] {
            define(name, value);
        }
        text.push_str(&typedef_scalar(self.dtype));
        text
    }

    /// Rows of a threadgroup: queries, or keys where it sums over queries.
    #[must_use]
    pub const fn rows(&self) -> usize {
        match self.pass {
            BackwardPass::Delta => 8 * self.tile.simdgroups,
            _ => self.tile.rows(),
        }
    }

    /// The arithmetic that bounds the errors of the kernel.
    #[must_use]
    pub const fn arithmetic(&self) -> Arithmetic {
        Arithmetic::metal(self.dtype)
    }

    /// Static threadgroup memory in bytes.
    #[must_use]
    pub const fn threadgroup_bytes(&self) -> usize {
        self.tile.threadgroup_bytes(self.pass, self.dtype, self.head_dim, self.value_dim)
    }

    /// Whether the tile is one that the kernel can have.
    #[must_use]
    pub const fn fits(&self) -> bool {
        self.tile.fits(self.pass, self.dtype, self.head_dim, self.value_dim)
    }
}

/// Where the tensors of the backward pass lie that the problem does not describe, in elements. LSE, its gradient and what
/// is made of it are contiguous ([`LseStrides::contiguous`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackwardOutputs {
    /// The output of the forward pass.
    pub out: Strides,
    /// Its gradient.
    pub d_out: Strides,
    /// The gradient of q.
    pub d_query: Strides,
    /// The gradient of k.
    pub d_key: Strides,
    /// The gradient of v.
    pub d_value: Strides,
}

impl BackwardOutputs {
    /// The strides of `tensors`; zeros for absent ones, which nobody writes.
    #[must_use]
    pub fn of(tensors: &BackwardTensors<Strides>) -> Self {
        let BackwardTensors { out, d_out, d_query, d_key, d_value, .. } = *tensors;
        let [d_query, d_key, d_value] = [d_query, d_key, d_value].map(Option::unwrap_or_default);
        Self { out, d_out, d_query, d_key, d_value }
    }
}

/// The tensors of the backward pass as their device binds them.
#[derive(Clone, Copy, Debug)]
pub struct BackwardTensors<T> {
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
    /// The output of the forward pass.
    pub out: T,
    /// Its LSE, float32.
    pub lse: T,
    /// `cu_seqlens_q` and `cu_seqlens_k`; present iff packed.
    pub offsets: Option<(T, T)>,
    /// Present iff the problem has `ALiBi`.
    pub alibi_slopes: Option<T>,
    /// Present iff the problem has a bias.
    pub bias: Option<T>,
    /// The gradient of out.
    pub d_out: T,
    /// The gradient of lse, if there is one.
    pub d_lse: Option<T>,
    /// Two float32 for each LSE, aligned to 8 bytes: scratch of the launches.
    pub states: T,
    /// The gradient of q, written, if wanted.
    pub d_query: Option<T>,
    /// The gradient of k, written, if wanted.
    pub d_key: Option<T>,
    /// The gradient of v, written, if wanted.
    pub d_value: Option<T>,
}

/// Number of tensors that come before the two parameter lists.
pub const BACKWARD_TENSOR_COUNT: usize = 15;

impl<T: Clone> BackwardTensors<T> {
    /// The tensors in the order of their buffer indices.
    #[must_use]
    pub fn in_order(&self) -> [T; BACKWARD_TENSOR_COUNT] {
        let or_q = |tensor: &Option<T>| tensor.as_ref().unwrap_or(&self.q).clone();
        let (query_offsets, key_offsets) = self.offsets.clone().unwrap_or_else(|| (self.q.clone(), self.q.clone()));
        [
            self.q.clone(),
            self.k.clone(),
            self.v.clone(),
            self.out.clone(),
            self.lse.clone(),
            query_offsets,
            key_offsets,
            or_q(&self.alibi_slopes),
            or_q(&self.bias),
            self.d_out.clone(),
            or_q(&self.d_lse),
            self.states.clone(),
            or_q(&self.d_query),
            or_q(&self.d_key),
            or_q(&self.d_value),
        ]
    }
}

impl<T> BackwardTensors<T> {
    /// What the kernel of `pass` writes, in the order of the arguments.
    #[must_use]
    pub fn written(&self, pass: BackwardPass) -> Vec<&T> {
        let (query, key, value) = (self.d_query.as_ref(), self.d_key.as_ref(), self.d_value.as_ref());
        let tensors = match pass {
            BackwardPass::Delta => [Some(&self.states), None],
            BackwardPass::Query => [query, None],
            BackwardPass::KeysAndValues => [key, value],
            BackwardPass::Keys => [key, None],
            BackwardPass::Values => [value, None],
        };
        tensors.into_iter().flatten().collect()
    }

    /// The same tensors in another form.
    pub fn map<'a, U>(&'a self, mut each: impl FnMut(&'a T) -> U) -> BackwardTensors<U> {
        let Ok(mapped) = self.try_map(|tensor| Ok::<U, Infallible>(each(tensor)));
        mapped
    }

    /// The same tensors in another form.
    ///
    /// # Errors
    /// The first error of `each`.
    pub fn try_map<'a, U, E>(&'a self, mut each: impl FnMut(&'a T) -> Result<U, E>) -> Result<BackwardTensors<U>, E> {
        let Self { q, k, v, out, lse, offsets, alibi_slopes, bias, d_out, d_lse, states, d_query, d_key, d_value } =
            self;
        Ok(BackwardTensors {
            q: each(q)?,
            k: each(k)?,
            v: each(v)?,
            out: each(out)?,
            lse: each(lse)?,
            offsets: match offsets {
                Some((query, key)) => Some((each(query)?, each(key)?)),
                None => None,
            },
            alibi_slopes: alibi_slopes.as_ref().map(&mut each).transpose()?,
            bias: bias.as_ref().map(&mut each).transpose()?,
            d_out: each(d_out)?,
            d_lse: d_lse.as_ref().map(&mut each).transpose()?,
            states: each(states)?,
            d_query: d_query.as_ref().map(&mut each).transpose()?,
            d_key: d_key.as_ref().map(&mut each).transpose()?,
            d_value: d_value.as_ref().map(&mut each).transpose()?,
        })
    }
}

const BACKWARD_SIZE_COUNT: usize = SIZE_COUNT + 4 * 3;
const BACKWARD_FACTOR_COUNT: usize = FACTOR_COUNT + 1;

/// One dispatch of the backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardLaunch {
    /// The int64 list, `BackwardSizes` in `backward.metal`.
    pub sizes: [i64; BACKWARD_SIZE_COUNT],
    /// The float32 list, `BackwardFactors` in `backward.metal`.
    pub factors: [f32; BACKWARD_FACTOR_COUNT],
    /// Threadgroups and threads.
    pub grid: Grid,
}

impl BackwardLaunch {
    /// The launch of `kernel`, which was made for `problem` or for one that differs only in sizes.
    ///
    /// # Errors
    /// [`LaunchError`] when a length or the grid is beyond what a kernel counts with.
    pub fn new(problem: &Problem, kernel: &BackwardKernel, outputs: &BackwardOutputs) -> Result<Self, LaunchError> {
        check_lengths(problem)?;
        let BackwardKernel { pass, tile, .. } = *kernel;
        let lengths = &problem.lengths;
        let (owned, heads) = if pass.owns_keys() {
            (lengths.max_key_len(), problem.key_heads)
        } else {
            (lengths.max_query_len(), problem.query_heads)
        };
        let chunks = tile.chunks(pass, problem.head_dim, problem.value_dim);
        let simdgroups = tile.simdgroups as u32;
        let grid = Grid {
            threadgroups: [
                // MSL counts threads with 32 bits.
                count(owned.div_ceil(kernel.rows()) * 32)? / 32,
                count(heads * chunks * tile.simdgroups)? / simdgroups,
                count(lengths.batch())?,
            ],
            group: [32, simdgroups, 1],
        };
        let forward = Outputs { out: outputs.out, lse: Some(LseStrides::contiguous(problem)) };
        let BackwardOutputs { d_out, d_query, d_key, d_value, .. } = *outputs;
        let gradients = [d_out, d_query, d_key, d_value].map(|at| [at.batch, at.row, at.head]);
        let mut sizes = sizes(problem, chunks, &forward).into_iter().chain(gradients.into_iter().flatten());
        let mut factors = factors(problem).into_iter().chain([problem.scale]);
        Ok(Self {
            sizes: std::array::from_fn(|_| sizes.next().unwrap_or(0)),
            factors: std::array::from_fn(|_| factors.next().unwrap_or(0.0)),
            grid,
        })
    }

    /// Whether there is nothing to compute.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.grid.threadgroups.contains(&0)
    }

    /// The arguments in the order of their buffer indices.
    #[must_use]
    pub fn arguments<'a, B>(&'a self, tensors: &BackwardTensors<&'a B>) -> Vec<Argument<'a, B>> {
        let buffers = tensors.in_order().into_iter().map(Argument::Buffer);
        buffers.chain([Argument::Ints(&self.sizes), Argument::Floats(&self.factors)]).collect()
    }
}
