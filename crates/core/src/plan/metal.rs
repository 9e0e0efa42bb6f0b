//! How the simdgroup kernel cuts a problem.

/// Rows and columns of one `simdgroup_matrix`, the unit of every size of a [`MetalTile`].
pub const FRAGMENT: usize = 8;

/// The tile of the simdgroup kernel: what one threadgroup computes, and what its registers hold.
///
/// A threadgroup has `simdgroups` simdgroups of 32 threads. Each simdgroup owns `row_fragments` times 8 query rows and
/// walks over blocks of `keys` keys. Its registers hold Q (all of `head_dim`, in the input type), S and P of one block
/// (`keys` columns) and O (`value_chunk` columns, float32) with the running maximum and sum of its rows.
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
}
