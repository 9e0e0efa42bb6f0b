//! New keys and values written into a cache, and queries rotated, in float64.

use super::block;
use crate::{Append, CacheBuffers, CacheRow, Problem, Rotary};

/// The tensors of an append as contiguous float64 values, whatever strides they have.
#[derive(Clone, Copy, Debug, Default)]
pub struct AppendInputs<'a> {
    /// `[batch, new_len, key_heads, head_dim]`.
    pub k: &'a [f64],
    /// `[batch, new_len, key_heads, value_dim]`.
    pub v: &'a [f64],
    /// `[positions, dim / 2]`, for rotary embeddings.
    pub cos: &'a [f64],
    /// `[positions, dim / 2]`, for rotary embeddings.
    pub sin: &'a [f64],
    /// `cu_seqlens_q` of packed queries.
    pub query_offsets: &'a [i32],
    /// What the cache consists of.
    pub cache: CacheBuffers<'a>,
}

/// Writes the new keys and values into the cache and rotates `q`: exact values, which an engine rounds once.
///
/// `q` is `[tokens, query_heads, head_dim]`, `k_cache` is `[blocks, block_len, key_heads, head_dim]`, `v_cache` the same
/// with `value_dim`.
///
/// # Panics
/// When `problem` has no cache, or a slice does not have the size that it should have.
pub fn append(
    problem: &Problem,
    append: &Append,
    inputs: &AppendInputs<'_>,
    q: &mut [f64],
    k_cache: &mut [f64],
    v_cache: &mut [f64],
) {
    let cache = problem.cache.as_ref().expect("keys are appended to a cache");
    problem.check_cache(&inputs.cache).expect("a valid cache");
    append.check_positions(problem, &inputs.cache).expect("enough positions");
    for sequence in 0..problem.lengths.batch() {
        let filled = cache.filled(&inputs.cache, sequence);
        let first_key = cache.key_len(&inputs.cache, sequence) - cache.new_len;
        for token in 0..cache.new_len {
            let CacheRow { block: cache_block, row } = cache.row(&inputs.cache, sequence, first_key + token);
            let from = (sequence * cache.new_len + token) * problem.key_heads;
            let to = (cache_block * cache.block_len() + row) * problem.key_heads;
            for head in 0..problem.key_heads {
                let key = &mut k_cache[block(to + head, problem.head_dim)];
                key.copy_from_slice(&inputs.k[block(from + head, problem.head_dim)]);
                if let Some(rotary) = &append.rotary {
                    rotate(rotary, inputs, filled + token, key);
                }
                v_cache[block(to + head, problem.value_dim)]
                    .copy_from_slice(&inputs.v[block(from + head, problem.value_dim)]);
            }
        }
        let Some(rotary) = &append.rotary else { continue };
        let (start, len) = queries(problem, inputs.query_offsets, sequence);
        for query in 0..len {
            let position = rotary.query_position(filled, query);
            for head in 0..problem.query_heads {
                let index = (start + query) * problem.query_heads + head;
                rotate(rotary, inputs, position, &mut q[block(index, problem.head_dim)]);
            }
        }
    }
}

/// First row of q of a sequence, and how many it has.
fn queries(problem: &Problem, offsets: &[i32], sequence: usize) -> (usize, usize) {
    match problem.lengths {
        crate::Lengths::Dense { query_len, .. } => (sequence * query_len, query_len),
        crate::Lengths::Packed { .. } => {
            (offsets[sequence] as usize, (offsets[sequence + 1] - offsets[sequence]) as usize)
        }
    }
}

fn rotate(rotary: &Rotary, inputs: &AppendInputs<'_>, position: usize, head: &mut [f64]) {
    let row = block(position, rotary.dim / 2);
    for (pair, (cos, sin)) in inputs.cos[row.clone()].iter().zip(&inputs.sin[row]).enumerate() {
        let (first, second) = rotary.pairs.places(pair, rotary.dim);
        let (x, y) = (head[first], head[second]);
        head[first] = x * cos - y * sin;
        head[second] = x * sin + y * cos;
    }
}
