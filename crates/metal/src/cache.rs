//! What kernels are told of a cache: `CacheSizes` in `kernels/cache.metal`, and the buffers that they read themselves.

use std::convert::Infallible;

use mtlflashattn_core::{Cache, CacheLayout, CacheLengths};

/// Number of int64 sizes of a cache.
pub(crate) const CACHE_SIZE_COUNT: usize = 9;

/// The buffers of a cache as their device binds them, all int32.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheTensors<T> {
    /// `cache_seqlens`, or `cu_seqlens_k`; present iff lengths are in a buffer.
    pub lengths: Option<T>,
    /// `cache_batch_idx`; present iff slots are indexed.
    pub slots: Option<T>,
    /// `cache_leftpad`; present iff the cache is left-padded.
    pub left_pad: Option<T>,
    /// `block_table`; present iff the cache has pages.
    pub pages: Option<T>,
}

impl<T> CacheTensors<T> {
    /// No buffers.
    pub const NONE: Self = Self { lengths: None, slots: None, left_pad: None, pages: None };

    /// The same tensors in another form.
    pub fn map<'a, U>(&'a self, mut each: impl FnMut(&'a T) -> U) -> CacheTensors<U> {
        let Ok(mapped) = self.try_map(|tensor| Ok::<U, Infallible>(each(tensor)));
        mapped
    }

    /// The same tensors in another form.
    ///
    /// # Errors
    /// The first error of `each`.
    pub fn try_map<'a, U, E>(&'a self, mut each: impl FnMut(&'a T) -> Result<U, E>) -> Result<CacheTensors<U>, E> {
        Ok(CacheTensors {
            lengths: self.lengths.as_ref().map(&mut each).transpose()?,
            slots: self.slots.as_ref().map(&mut each).transpose()?,
            left_pad: self.left_pad.as_ref().map(&mut each).transpose()?,
            pages: self.pages.as_ref().map(&mut each).transpose()?,
        })
    }
}

/// What kernels are told of `cache`; zeros where there is none.
pub(crate) fn cache_sizes(cache: Option<&Cache>) -> [i64; CACHE_SIZE_COUNT] {
    let Some(cache) = cache else { return [0; CACHE_SIZE_COUNT] };
    // A cache without blocks has no positions, whatever lengths claim.
    let capacity = if cache.blocks() == 0 { 0 } else { cache.capacity() };
    let (filled, filled_from) = match cache.lengths {
        CacheLengths::Same(filled) => (filled, 0),
        CacheLengths::Each => (0, 1),
        CacheLengths::Offsets => (0, 2),
    };
    let (indexed, table_stride) = match cache.layout {
        CacheLayout::Slots { indexed, .. } => (indexed, 0),
        CacheLayout::Pages { table_stride, .. } => (false, table_stride),
    };
    [
        cache.blocks() as i64,
        cache.block_len() as i64,
        capacity as i64,
        cache.new_len as i64,
        filled as i64,
        filled_from,
        i64::from(indexed),
        i64::from(cache.left_padded),
        table_stride,
    ]
}
