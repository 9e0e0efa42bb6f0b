//! The keys of a small problem in a cache.

use mtlflashattn_core::cache::PAGE_MULTIPLE;
use mtlflashattn_core::{Cache, CacheLayout, CacheLengths, Lengths, Strides};

use super::cases::Given;
use super::{Element, Memory};
use crate::CacheTensors;

/// Rows of a slot that no key has.
const SPARE_ROWS: usize = 7;
/// Sequences begin at different positions of their slots, up to this one.
const MOST_PADDING: usize = 5;

fn integers(values: Vec<usize>, shape: &[usize]) -> Memory {
    let values = values.into_iter().map(|value| value as f64).collect();
    Memory::contiguous(Element::Int32, values, shape.iter().map(|&size| size as i64).collect())
}

/// Moves the keys and values of `given` into slots in another order, at different positions, or into pages in another
/// order. The last key of each sequence counts as new. Rows that no key has are NaN.
pub(super) fn put_into_cache(given: &mut Given, paged: bool) -> CacheTensors<Memory> {
    let lens: Vec<usize> = given.keys.offsets.windows(2).map(|ends| (ends[1] - ends[0]) as usize).collect();
    let batch = lens.len();
    let new_len = usize::from(lens.iter().all(|&len| len > 0));
    let longest = lens.iter().copied().max().unwrap_or(0);
    let mut tensors = CacheTensors::NONE;
    // Where the first key of each sequence lies, and how many rows there are for each.
    let (cache, blocks_of): (Cache, Vec<Vec<usize>>) = if paged {
        let per_sequence = longest.div_ceil(PAGE_MULTIPLE);
        let count = batch * per_sequence + 1;
        let table: Vec<usize> = (0..batch * per_sequence).map(|entry| count - 1 - entry).collect();
        tensors.pages = Some(integers(table.clone(), &[batch, per_sequence]));
        let is_packed = given.offsets.is_some();
        let lengths = if is_packed {
            let ends = lens.iter().scan(0, |end, len| {
                *end += len - new_len;
                Some(*end)
            });
            tensors.lengths = Some(integers(std::iter::once(0).chain(ends).collect(), &[batch + 1]));
            CacheLengths::Offsets
        } else {
            CacheLengths::Same(longest - new_len)
        };
        let layout = CacheLayout::Pages { count, len: PAGE_MULTIPLE, per_sequence, table_stride: per_sequence as i64 };
        let rows = table.chunks(per_sequence.max(1)).map(|pages| {
            pages.iter().flat_map(|page| (0..PAGE_MULTIPLE).map(move |row| page * PAGE_MULTIPLE + row)).collect()
        });
        (Cache { layout, lengths, new_len, left_padded: false }, rows.collect())
    } else {
        let len = longest + MOST_PADDING + SPARE_ROWS;
        let padding: Vec<usize> = (0..batch).map(|sequence| (2 * sequence + 3) % (MOST_PADDING + 1)).collect();
        let slots: Vec<usize> = (0..batch).map(|sequence| batch - sequence).collect();
        let ends = lens.iter().zip(&padding).map(|(len, padding)| len + padding - new_len);
        tensors.lengths = Some(integers(ends.collect(), &[batch]));
        let rows = slots.iter().zip(&padding).map(|(slot, padding)| (slot * len + padding..(slot + 1) * len).collect());
        let rows = rows.collect();
        (tensors.slots, tensors.left_pad) = (Some(integers(slots, &[batch])), Some(integers(padding, &[batch])));
        let layout = CacheLayout::Slots { count: batch + 1, len, indexed: true };
        (Cache { layout, lengths: CacheLengths::Each, new_len, left_padded: true }, rows)
    };
    let places: Vec<usize> = lens.iter().zip(&blocks_of).flat_map(|(&len, rows)| rows[..len].iter().copied()).collect();
    let heads = given.problem.key_heads;
    let [blocks, block_len] = [cache.blocks(), cache.block_len()];
    let scatter = |values: &[f64], dim: usize| {
        let mut memory = vec![f64::NAN; blocks * block_len * heads * dim];
        for (place, row) in places.iter().zip(values.chunks(heads * dim)) {
            memory[place * heads * dim..][..heads * dim].copy_from_slice(row);
        }
        let shape = [blocks, block_len, heads, dim].map(|size| size as i64);
        let strides = Strides { batch: shape[1] * shape[2] * shape[3], row: shape[2] * shape[3], head: shape[3] };
        (Memory::contiguous(Element::Float(given.problem.dtype), memory, shape.to_vec()), strides)
    };
    let [_, k, v] = &given.values;
    let (k, k_strides) = scatter(k, given.problem.head_dim);
    let (v, v_strides) = scatter(v, given.problem.value_dim);
    (given.k, given.v) = (k, v);
    (given.problem.k, given.problem.v) = (k_strides, v_strides);
    match &mut given.problem.lengths {
        Lengths::Dense { key_len, .. } => *key_len = cache.capacity(),
        Lengths::Packed { total_key, max_key_len, .. } => {
            (*total_key, *max_key_len) = (blocks * block_len, cache.capacity());
        }
    }
    given.problem.cache = Some(cache);
    // Nobody binds offsets of keys.
    if let Some((query, key)) = &mut given.offsets {
        key.clone_from(query);
    }
    tensors
}
