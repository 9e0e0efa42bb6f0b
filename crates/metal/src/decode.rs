//! Attention of a few queries: the arguments and grids of the decode kernel, and the kernel that merges its splits.
//! `kernels/splits.metal` has the same order.
//!
//! | index | argument | bound |
//! | --- | --- | --- |
//! | 0 to 9 | those of the forward kernels, see `launch.rs` | as there |
//! | 10 | partial results, float32, written by the first kernel | if keys are split |
//! | 11 | lengths of the cache: `cache_seqlens`, or `cu_seqlens_k` | if the cache has them |
//! | 12 | `cache_batch_idx` | if the cache has it |
//! | 13 | `cache_leftpad` | if the cache has it |
//! | 14 | `block_table` | if the cache has pages |
//! | 15 | sizes, int64 | always |
//! | 16 | factors, float32 | always |
//!
//! Contents of 11 to 14, int32, are read on the device alone, and brought back into the cache there. `cu_seqlens_k` is
//! not bound as such where keys lie in a cache.
//!
//! Both kernels take the whole list, in which q stands in for absent tensors.

use std::fmt::Write as _;

use mtlflashattn_core::plan::decode::{group_rows, packed_rows};
use mtlflashattn_core::{Dtype, Problem};

use crate::CacheTensors;
use crate::cache::{CACHE_SIZE_COUNT, cache_sizes};
use crate::launch::{FACTOR_COUNT, SIZE_COUNT, check_lengths, count, factors, sizes};
use crate::source::typedef_scalar;
use crate::{Argument, Features, Grid, Kernel, LaunchError, Outputs, Tensors};

/// Rows of a threadgroup of the merge kernel, one a simdgroup.
const MERGE_ROWS: usize = 4;
/// Columns of a threadgroup of the merge kernel: 32 times `COLUMNS` in `merge.metal`.
const MERGE_COLUMNS: usize = 128;

/// A variant of the kernel that merges the splits of the decode kernel. Equal variants have equal texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MergeKernel {
    /// Element type of the output.
    pub dtype: Dtype,
    /// Sequences are packed and delimited by `cu_seqlens`.
    pub packed: bool,
    /// The LSE is written.
    pub lse: bool,
}

impl MergeKernel {
    /// The kernel that merges what `kernel` leaves.
    #[must_use]
    pub const fn of(kernel: &Kernel) -> Self {
        let Features { packed, lse, .. } = kernel.features;
        Self { dtype: kernel.dtype, packed, lse }
    }

    /// Name of the entry point in [`source`](Self::source).
    #[must_use]
    pub const fn entry(&self) -> &'static str {
        "attention_merge"
    }

    /// The text for the Metal compiler: pure ASCII, complete, with everything specialised by `#define`s.
    #[must_use]
    pub fn source(&self) -> String {
        let features = Features { packed: self.packed, lse: self.lse, ..Features::NONE };
        let mut text = String::from("#include <metal_stdlib>\nusing namespace metal;\n\n");
        text.push_str(&crate::source::feature_defines(&features));
        writeln!(text, "#define SIMDGROUPS {MERGE_ROWS}").expect("writes to a string");
        text.push_str(&typedef_scalar(self.dtype));
        text.push_str(include_str!("../kernels/common.metal"));
        text.push_str(include_str!("../kernels/cache.metal"));
        text.push_str(include_str!("../kernels/splits.metal"));
        text.push_str(include_str!("../kernels/merge.metal"));
        text
    }
}

/// The tensors of a launch as their device binds them.
#[derive(Clone, Copy, Debug)]
pub struct DecodeTensors<T> {
    /// Those of the forward kernels.
    pub forward: Tensors<T>,
    /// [`DecodeLaunch::partial_floats`] float32, aligned to 8 bytes: scratch of the launches; present iff that is not 0.
    pub partials: Option<T>,
    /// What the cache consists of beside k and v, if keys lie in one.
    pub cache: CacheTensors<T>,
}

/// Number of tensors that come before the two parameter lists.
pub const DECODE_TENSOR_COUNT: usize = 15;
const DECODE_SIZE_COUNT: usize = SIZE_COUNT + 2 + CACHE_SIZE_COUNT;

impl<T: Clone> DecodeTensors<T> {
    /// The tensors in the order of their buffer indices.
    #[must_use]
    pub fn in_order(&self) -> [T; DECODE_TENSOR_COUNT] {
        let forward = self.forward.in_order();
        let CacheTensors { lengths, slots, left_pad, pages } = &self.cache;
        let others = [&self.partials, lengths, slots, left_pad, pages];
        let mut all =
            forward.into_iter().chain(others.map(|tensor| tensor.as_ref().unwrap_or(&self.forward.q).clone()));
        std::array::from_fn(|_| all.next().expect("a tensor for each index"))
    }
}

/// The dispatches of one call: the decode kernel, and the merge kernel where keys are split.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeLaunch {
    /// The int64 list, `DecodeSizes` in `splits.metal`.
    pub sizes: [i64; DECODE_SIZE_COUNT],
    /// The float32 list, `Factors` in `common.metal`.
    pub factors: [f32; FACTOR_COUNT],
    /// Of the decode kernel.
    pub grid: Grid,
    /// Of the merge kernel; `None` where keys are not split.
    pub merge: Option<Grid>,
    /// Float32 values of the partial results.
    pub partial_floats: usize,
}

impl DecodeLaunch {
    /// The launch of `kernel`, which was made for `problem` or for one that differs only in sizes, with the keys of each
    /// sequence in `splits` parts.
    ///
    /// # Errors
    /// [`LaunchError`] when a length or the grid is beyond what a kernel counts with.
    pub fn new(problem: &Problem, kernel: &Kernel, outputs: &Outputs, splits: usize) -> Result<Self, LaunchError> {
        check_lengths(problem)?;
        let Problem { query_heads, key_heads, value_dim, lengths, .. } = *problem;
        let splits = splits.max(1);
        let tile = &kernel.tile;
        let chunks = tile.passes(value_dim);
        let row_groups = packed_rows(problem).div_ceil(group_rows(tile));
        let simdgroups = tile.simdgroups as u32;
        let batch = count(lengths.batch())?;
        let grid = Grid {
            // MSL counts threads with 32 bits.
            threadgroups: [
                count(splits * row_groups * 32)? / 32,
                count(key_heads * chunks * tile.simdgroups)? / simdgroups,
                batch,
            ],
            group: [32, simdgroups, 1],
        };
        let rows = lengths.max_query_len() * query_heads;
        let merge = Grid {
            threadgroups: [
                count(rows.div_ceil(MERGE_ROWS) * 32)? / 32,
                count(value_dim.div_ceil(MERGE_COLUMNS) * MERGE_ROWS)? / MERGE_ROWS as u32,
                batch,
            ],
            group: [32, MERGE_ROWS as u32, 1],
        };
        let is_split = splits > 1;
        let states = splits * lengths.query_rows() * query_heads;
        let sizes = sizes(problem, chunks, outputs).into_iter().chain([query_heads as i64, splits as i64]);
        let mut sizes = sizes.chain(cache_sizes(problem.cache.as_ref()));
        Ok(Self {
            sizes: std::array::from_fn(|_| sizes.next().unwrap_or(0)),
            factors: factors(problem),
            grid,
            merge: is_split.then_some(merge),
            partial_floats: if is_split { states * (2 + value_dim) } else { 0 },
        })
    }

    /// Whether there is nothing to compute.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.grid.threadgroups.contains(&0)
    }

    /// The arguments of both kernels in the order of their buffer indices.
    #[must_use]
    pub fn arguments<'a, B>(&'a self, tensors: &DecodeTensors<&'a B>) -> Vec<Argument<'a, B>> {
        let buffers = tensors.in_order().into_iter().map(Argument::Buffer);
        buffers.chain([Argument::Ints(&self.sizes), Argument::Floats(&self.factors)]).collect()
    }
}
