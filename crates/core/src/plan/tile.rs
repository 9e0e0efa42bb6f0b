//! How the simdgroup and tensorops kernels cut a problem.

use std::fmt;

use super::occupancy::{KernelShape, MOST_HALVES, Occupancy, THREADGROUP_MEMORY};
use crate::{Dtype, Lengths, Problem};

/// Rows and columns of one `simdgroup_matrix`, the unit of every size of a [`MetalTile`].
pub const FRAGMENT: usize = 8;
/// Fragments of Q whose elements a lane keeps side by side in threadgroup memory.
const DEAL: usize = 4;
/// Bytes by which a staged row is longer than its elements, so that the rows of a fragment lie in different banks.
pub(super) const ROW_PADDING: usize = 16;

/// The tile of the simdgroup kernel: what one threadgroup computes, and what its registers hold.
///
/// A threadgroup has `simdgroups` simdgroups of 32 threads. Each simdgroup owns `row_fragments` times 8 query rows and
/// walks over blocks of `keys` keys. Its registers hold S and P of one block (`keys` columns) and O (`value_chunk`
/// columns, float32) with the running maximum and sum of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MetalTile {
    /// Simdgroups of a threadgroup; each has rows of its own.
    pub simdgroups: usize,
    /// 8-row fragments that a simdgroup holds.
    pub row_fragments: usize,
    /// Keys of a block; a multiple of 8.
    pub keys: usize,
    /// Whether a block of K and of V is copied to threadgroup memory for all simdgroups, or read by each simdgroup from
    /// device memory.
    pub staged: bool,
    /// Columns of V and O that one pass over the keys computes; a multiple of 8. Where it is less than `value_dim`
    /// there are [`passes`](Self::passes), independent of one another, and each computes S anew.
    pub value_chunk: usize,
    /// Where Q lives.
    pub query: QueryHome,
}

/// Where a simdgroup keeps its rows of Q while it walks over the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueryHome {
    /// In registers.
    Registers,
    /// In threadgroup memory, each lane its own elements, so that nobody waits for anybody.
    Threadgroup,
    /// In device memory, read again for every block of keys.
    Device,
}

impl QueryHome {
    /// Nearest first.
    pub(super) const ALL: [Self; 3] = [Self::Registers, Self::Threadgroup, Self::Device];

    /// Name for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Registers => "registers",
            Self::Threadgroup => "threadgroup",
            Self::Device => "device",
        }
    }
}

impl MetalTile {
    /// Threads of a threadgroup.
    #[must_use]
    pub const fn threads(&self) -> usize {
        self.simdgroups * 32
    }

    /// Query rows of a simdgroup.
    #[must_use]
    pub const fn simdgroup_rows(&self) -> usize {
        self.row_fragments * FRAGMENT
    }

    /// Query rows of a threadgroup.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.simdgroups * self.simdgroup_rows()
    }

    /// Passes over the keys that `value_dim` columns take.
    #[must_use]
    pub const fn passes(&self, value_dim: usize) -> usize {
        value_dim.div_ceil(self.value_chunk)
    }

    /// Threadgroup memory in bytes, as the kernel declares it: a block of K and one of V if they are staged, and Q if it
    /// lives there.
    #[must_use]
    pub const fn threadgroup_bytes(&self, dtype: Dtype, head_dim: usize) -> usize {
        let key_row = head_dim.next_multiple_of(FRAGMENT) * dtype.size();
        let value_row = self.value_chunk.next_multiple_of(FRAGMENT) * dtype.size();
        let staged = if self.staged { self.keys * (key_row + value_row + 2 * ROW_PADDING) } else { 0 };
        let parked_row = head_dim.next_multiple_of(DEAL * FRAGMENT) * dtype.size();
        let query = if matches!(self.query, QueryHome::Threadgroup) { self.rows() * parked_row } else { 0 };
        staged + query
    }
}

impl fmt::Display for MetalTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { simdgroups, row_fragments, keys, staged, value_chunk, query } = self;
        let (source, query) = (if *staged { "staged" } else { "direct" }, query.name());
        write!(
            f,
            "{simdgroups} simdgroups of {row_fragments}x8 rows, {keys} keys ({source}), {value_chunk} value columns, \
             q in {query}"
        )
    }
}

/// Why a kernel cannot have a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its fragments alone fill more registers than a thread has.
    Spills {
        /// 16-bit registers needed.
        halves: usize,
    },
    /// Its blocks of K and V do not fit in threadgroup memory.
    ThreadgroupMemory {
        /// Bytes needed.
        bytes: usize,
    },
    /// Its threadgroup has more threads than a core can hold with their registers.
    Threads {
        /// Threads of the threadgroup.
        threads: usize,
        /// Threads that fit.
        most: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spills { halves } => write!(f, "{halves} 16-bit registers of {MOST_HALVES}"),
            Self::ThreadgroupMemory { bytes } => {
                write!(f, "{bytes} bytes of threadgroup memory of {THREADGROUP_MEMORY}")
            }
            Self::Threads { threads, most } => write!(f, "{threads} threads at once where {most} fit"),
        }
    }
}

impl MetalTile {
    /// This tile with Q as near as it can be without a spill, or more threadgroup memory than there is.
    #[must_use]
    pub fn with_nearest_query(self, shape: &KernelShape) -> Self {
        let at = |query| Self { query, ..self };
        let fits = |tile: &Self| {
            let occupancy = Occupancy::predict(tile, shape);
            !occupancy.is_near_spill() && occupancy.threadgroup_bytes <= THREADGROUP_MEMORY
        };
        QueryHome::ALL.into_iter().map(at).find(fits).unwrap_or(at(QueryHome::Device))
    }

    /// What the model says about the kernel of this tile and `shape`.
    ///
    /// # Errors
    /// [`Refusal`] when no compiler could make it run well, or no pipeline could be made of it at all.
    pub fn occupancy(&self, shape: &KernelShape) -> Result<Occupancy, Refusal> {
        let occupancy = Occupancy::predict(self, shape);
        if occupancy.must_spill() {
            return Err(Refusal::Spills { halves: occupancy.halves });
        }
        if occupancy.threadgroup_bytes > THREADGROUP_MEMORY {
            return Err(Refusal::ThreadgroupMemory { bytes: occupancy.threadgroup_bytes });
        }
        if self.threads() > occupancy.threads {
            return Err(Refusal::Threads { threads: self.threads(), most: occupancy.threads });
        }
        Ok(occupancy)
    }

    /// Bytes that move for one query row and one key, times 1024: K and V, and Q where it is not in registers, which is
    /// then read for each fragment of keys. Rows beyond `query_len` do not count.
    #[must_use]
    pub fn traffic(&self, shape: &KernelShape, query_len: usize) -> Traffic {
        let size = shape.dtype.size();
        let query_columns = self.passes(shape.value_dim) * shape.head_dim.next_multiple_of(FRAGMENT);
        let bytes = 1024 * size * (query_columns + shape.value_dim.next_multiple_of(FRAGMENT));
        let by_simdgroup = bytes / self.simdgroup_rows().min(query_len.max(1));
        let by_threadgroup = bytes / self.rows().min(query_len.max(1));
        let mut traffic = if self.staged {
            Traffic { device: by_threadgroup, threadgroup: by_threadgroup + by_simdgroup }
        } else {
            Traffic { device: by_simdgroup, threadgroup: 0 }
        };
        let query_bytes = 1024 * size * query_columns / FRAGMENT;
        match self.query {
            QueryHome::Registers => {}
            QueryHome::Threadgroup => traffic.threadgroup += query_bytes,
            QueryHome::Device => traffic.device += query_bytes,
        }
        traffic
    }

    /// Threadgroups that the rows of `problem` make, not counting passes.
    #[must_use]
    pub fn threadgroups(&self, problem: &Problem) -> usize {
        let blocks = match problem.lengths {
            Lengths::Dense { batch, query_len, .. } => batch * query_len.div_ceil(self.rows()),
            // Sequences end inside a block: on average half a block each is empty.
            Lengths::Packed { batch, total_query, .. } => total_query.div_ceil(self.rows()) + batch / 2,
        };
        blocks * problem.query_heads
    }
}

/// Bytes moved for one query row and one key, times 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Read from device memory.
    pub device: usize,
    /// Read from and written to threadgroup memory.
    pub threadgroup: usize,
}
