//! New keys and values written into a cache, and rotary embeddings: the kernel, its arguments and its grid.
//! `kernels/append.metal` has the same order.
//!
//! | index | argument | bound |
//! | --- | --- | --- |
//! | 0, 8 | q, and where it goes rotated | with rotary embeddings |
//! | 1, 2 | new keys, new values | always |
//! | 3, 4 | the caches, written | always |
//! | 5 | `cu_seqlens_q`, contiguous int32 | with rotary embeddings, if packed |
//! | 6, 7 | cos, sin | with rotary embeddings |
//! | 9 | lengths of the cache | if it has them |
//! | 10, 11 | `block_table`; `cache_batch_idx` | if the cache has it |
//! | 12 | sizes, int64 | always |
//!
//! The new keys stand in for absent tensors. Contents of 5 and 9 to 11 are read on the device alone, and brought back into
//! the tensors there; what a wrong slot or page would get is dropped.

use std::convert::Infallible;
use std::fmt::Write as _;

use mtlflashattn_core::{Append, Cache, CacheLayout, Dtype, Lengths, Pairs, Problem, Strides};

use crate::cache::{CACHE_SIZE_COUNT, cache_sizes};
use crate::launch::{check_lengths, count};
use crate::source::{feature_defines, typedef_scalar};
use crate::{Argument, CacheTensors, Features, Grid, LaunchError};

/// Rows of a threadgroup, one a simdgroup.
const ROWS: usize = 4;

/// A variant of the append kernel. Equal variants have equal texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct AppendKernel {
    /// Element type of all tensors but the buffers of the cache.
    pub dtype: Dtype,
    /// New keys and queries are rotated.
    pub rotary: bool,
    /// Queries are packed and delimited by `cu_seqlens_q`.
    pub packed: bool,
    /// The cache has pages.
    pub paged: bool,
}

impl AppendKernel {
    /// The kernel that makes `append` before `problem`.
    #[must_use]
    pub const fn new(problem: &Problem, append: &Append) -> Self {
        let rotary = append.rotary.is_some();
        Self {
            dtype: problem.dtype,
            rotary,
            packed: rotary && matches!(problem.lengths, Lengths::Packed { .. }),
            paged: matches!(problem.cache, Some(Cache { layout: CacheLayout::Pages { .. }, .. })),
        }
    }

    /// Name of the entry point in [`source`](Self::source).
    #[must_use]
    pub const fn entry(&self) -> &'static str {
        "attention_append"
    }

    /// The text for the Metal compiler: pure ASCII, complete, with everything specialised by `#define`s.
    #[must_use]
    pub fn source(&self) -> String {
        let features = Features { packed: self.packed, cached: true, paged: self.paged, ..Features::NONE };
        let mut text = String::from("#include <metal_stdlib>\nusing namespace metal;\n\n");
        text.push_str(&feature_defines(&features));
        for (name, value) in [("ROTARY", usize::from(self.rotary)), ("SIMDGROUPS", ROWS)] {
            writeln!(text, "#define {name} {value}").expect("writes to a string");
        }
        text.push_str(&typedef_scalar(self.dtype));
        text.push_str(include_str!("../kernels/common.metal"));
        text.push_str(include_str!("../kernels/cache.metal"));
        text.push_str(include_str!("../kernels/append.metal"));
        text
    }
}

/// The tensors of a launch as their device binds them.
#[derive(Clone, Copy, Debug)]
pub struct AppendTensors<T> {
    /// The new keys, `[batch, new_len, key_heads, head_dim]`.
    pub new_keys: T,
    /// The new values, `[batch, new_len, key_heads, value_dim]`.
    pub new_values: T,
    /// The cache of keys, written.
    pub key_cache: T,
    /// The cache of values, written.
    pub value_cache: T,
    /// Present iff keys and queries are rotated.
    pub rotary: Option<RotaryTensors<T>>,
    /// What the cache consists of beside k and v; nobody reads where it is padded.
    pub cache: CacheTensors<T>,
}

/// What rotary embeddings need.
#[derive(Clone, Copy, Debug)]
pub struct RotaryTensors<T> {
    /// Queries.
    pub q: T,
    /// Rotated queries, written.
    pub rotated: T,
    /// `cu_seqlens_q`; present iff packed.
    pub query_offsets: Option<T>,
    /// `[positions, dim / 2]`.
    pub cos: T,
    /// `[positions, dim / 2]`.
    pub sin: T,
}

/// Number of tensors that come before the list of sizes.
pub const APPEND_TENSOR_COUNT: usize = 12;
const APPEND_SIZE_COUNT: usize = CACHE_SIZE_COUNT + 12 + 6 * 3;

impl<T: Clone> AppendTensors<T> {
    /// The tensors in the order of their buffer indices.
    #[must_use]
    pub fn in_order(&self) -> [T; APPEND_TENSOR_COUNT] {
        let Self { new_keys, new_values, key_cache, value_cache, rotary, cache } = self;
        let rotary = rotary.as_ref();
        let or_new_keys = |tensor: Option<&T>| tensor.unwrap_or(new_keys).clone();
        [
            or_new_keys(rotary.map(|rotary| &rotary.q)),
            new_keys.clone(),
            new_values.clone(),
            key_cache.clone(),
            value_cache.clone(),
            or_new_keys(rotary.and_then(|rotary| rotary.query_offsets.as_ref())),
            or_new_keys(rotary.map(|rotary| &rotary.cos)),
            or_new_keys(rotary.map(|rotary| &rotary.sin)),
            or_new_keys(rotary.map(|rotary| &rotary.rotated)),
            or_new_keys(cache.lengths.as_ref()),
            or_new_keys(cache.pages.as_ref()),
            or_new_keys(cache.slots.as_ref()),
        ]
    }
}

impl<T> AppendTensors<T> {
    /// What the kernel writes: both caches, and the rotated queries if there are any.
    #[must_use]
    pub fn written(&self) -> Vec<&T> {
        let rotated = self.rotary.as_ref().map(|rotary| &rotary.rotated);
        [&self.key_cache, &self.value_cache].into_iter().chain(rotated).collect()
    }

    /// The same tensors in another form.
    pub fn map<'a, U>(&'a self, mut each: impl FnMut(&'a T) -> U) -> AppendTensors<U> {
        let Ok(mapped) = self.try_map(|tensor| Ok::<U, Infallible>(each(tensor)));
        mapped
    }

    /// The same tensors in another form.
    ///
    /// # Errors
    /// The first error of `each`.
    pub fn try_map<'a, U, E>(&'a self, mut each: impl FnMut(&'a T) -> Result<U, E>) -> Result<AppendTensors<U>, E> {
        let Self { new_keys, new_values, key_cache, value_cache, rotary, cache } = self;
        Ok(AppendTensors {
            new_keys: each(new_keys)?,
            new_values: each(new_values)?,
            key_cache: each(key_cache)?,
            value_cache: each(value_cache)?,
            rotary: match rotary {
                Some(RotaryTensors { q, rotated, query_offsets, cos, sin }) => Some(RotaryTensors {
                    q: each(q)?,
                    rotated: each(rotated)?,
                    query_offsets: query_offsets.as_ref().map(&mut each).transpose()?,
                    cos: each(cos)?,
                    sin: each(sin)?,
                }),
                None => None,
            },
            cache: cache.try_map(each)?,
        })
    }
}

/// One dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendLaunch {
    /// The int64 list, `AppendSizes` in `append.metal`.
    pub sizes: [i64; APPEND_SIZE_COUNT],
    /// Threadgroups and threads.
    pub grid: Grid,
}

impl AppendLaunch {
    /// The launch that makes `append` before `problem`; `rotated` has the strides of the rotated queries.
    ///
    /// # Errors
    /// [`LaunchError`] when a length or the grid is beyond what a kernel counts with.
    pub fn new(problem: &Problem, append: &Append, rotated: Strides) -> Result<Self, LaunchError> {
        check_lengths(problem)?;
        let Problem { lengths, query_heads, key_heads, head_dim, value_dim, .. } = *problem;
        let new_len = problem.cache.map_or(0, |cache| cache.new_len);
        let query_rows = append.rotary.map_or(0, |_| lengths.max_query_len() * query_heads);
        let rows = query_rows.max(new_len * key_heads);
        // Without positions there are no keys, and nobody looks at queries.
        let rotates = append.rotary.is_some_and(|rotary| rotary.positions > 0);
        let tensors = if rotates { 3 } else { 2 };
        let threadgroups = [
            // MSL counts threads with 32 bits.
            count(rows.div_ceil(ROWS) * 32)? / 32,
            tensors,
            count(lengths.batch())?,
        ];
        let scalars = [
            lengths.max_query_len() as i64,
            lengths.query_rows().min(i32::MAX as usize) as i64,
            query_heads as i64,
            key_heads as i64,
            head_dim as i64,
            value_dim as i64,
        ];
        let rotary = append.rotary.map_or([0; 6], |rotary| {
            [
                rotary.dim as i64,
                i64::from(rotary.pairs == Pairs::Neighbours),
                rotary.positions as i64,
                rotary.cos_stride,
                rotary.sin_stride,
                i64::from(rotary.queries_advance),
            ]
        });
        let strides = [problem.q, rotated, append.k, append.v, problem.k, problem.v];
        let strides = strides.into_iter().flat_map(|at| [at.batch, at.row, at.head]);
        let cache = cache_sizes(problem.cache.as_ref());
        let mut sizes = cache.into_iter().chain(scalars).chain(rotary).chain(strides);
        Ok(Self {
            sizes: std::array::from_fn(|_| sizes.next().unwrap_or(0)),
            grid: Grid { threadgroups, group: [32, ROWS as u32, 1] },
        })
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.grid.threadgroups.contains(&0)
    }

    /// The arguments in the order of their buffer indices.
    #[must_use]
    pub fn arguments<'a, B>(&'a self, tensors: &AppendTensors<&'a B>) -> Vec<Argument<'a, B>> {
        let buffers = tensors.in_order().into_iter().map(Argument::Buffer);
        buffers.chain([Argument::Ints(&self.sizes)]).collect()
    }
}
