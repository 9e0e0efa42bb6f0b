//! A few queries against many keys: the tile of the decode kernel, and into how many parts keys are split.
//!
//! Such a call is as fast as its keys are read, so that K and V are read once for all rows that share a key head (queries
//! times the heads of a group), by as many threadgroups as keep every core reading.

use std::cmp::Reverse;

use super::gpu::Gpu;
use super::metal::{KEYS, PASSES, Preference, lesser};
use super::occupancy::{KernelShape, Occupancy, THREADGROUP_MEMORY};
use super::reason::Reason;
use super::tile::{FRAGMENT, MetalTile, QueryHome, Refusal};
use crate::cache::PAGE_MULTIPLE;
use crate::{Cache, CacheLayout, Dtype, Lengths, Problem};

/// Most queries of a sequence that the kernel takes.
pub const MOST_QUERIES: usize = 32;
/// Fewest keys for which `auto` takes it: fewer are read in less time than a launch takes, whoever reads them.
pub const FEWEST_KEYS: usize = 128;
/// Most rows that share a key head for which `auto` prefers it to matrix units: more rows compute for longer than their
/// keys are read. An M5 reads about 0.6 TB/s and multiplies about 18 TFLOP/s outside of its matrix units, 30 operations in
/// the time of a byte, and one row takes one operation for each byte in a 16-bit type.
const MOST_ROWS_BESIDE_MATRIX_UNITS: usize = 32;
/// Simdgroups of a core that keep its memory requests coming: 512 threads, what fits beside the registers of most tiles.
const SIMDGROUPS_PER_CORE: usize = 16;
/// Fewest keys of a split: its threadgroup starts and its partial results are merged.
const FEWEST_SPLIT_KEYS: usize = 256;
/// How many times more bytes of keys than of partial results a split has at least.
const KEYS_PER_PARTIAL: usize = 8;
/// Most splits: merging reads the state of each, one after the other.
pub const MOST_SPLITS: usize = 256;
/// Simdgroups of a threadgroup in the direct form, the preferred number first. Powers of two: halves are added up.
const DIRECT_SIMDGROUPS: [usize; 3] = [4, 2, 1];
/// Most simdgroups of a threadgroup in the staged form.
const MOST_STAGED_SIMDGROUPS: usize = 16;
/// Most row fragments of a simdgroup.
const MOST_ROW_FRAGMENTS: usize = 2;

/// Rows that share a key head: queries times the heads of a group.
#[must_use]
pub fn packed_rows(problem: &Problem) -> usize {
    problem.lengths.max_query_len() * problem.group()
}

/// Rows that a threadgroup of the decode kernel has: those of one simdgroup, which all share, or of all where they share
/// staged keys.
#[must_use]
pub const fn group_rows(tile: &MetalTile) -> usize {
    if tile.staged { tile.rows() } else { tile.simdgroup_rows() }
}

/// Threadgroup memory of the decode kernel in bytes: that of the tile, and what half the simdgroups park where all have
/// the same rows (O, and maximum and sum for each lane).
#[must_use]
pub const fn threadgroup_bytes(tile: &MetalTile, dtype: Dtype, head_dim: usize) -> usize {
    let pairs = tile.row_fragments * (tile.value_chunk / FRAGMENT + 1);
    let parked = if tile.staged { 0 } else { tile.simdgroups / 2 * pairs * 32 * 2 * size_of::<f32>() };
    tile.threadgroup_bytes(dtype, head_dim) + parked
}

/// The judgement on a tile; the order of the fields is the order of their weight, and less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(clippy::struct_excessive_bools, reason = "criteria hold or do not")]
struct Score {
    /// In the last class of registers.
    near_spill: bool,
    /// Elements read from device memory for each key.
    reads: usize,
    /// A block of one fragment.
    narrow: bool,
    /// Too few threads to hide loads.
    exposed: bool,
    /// Row fragments, filled up.
    fragments: usize,
    /// Keys go through threadgroup memory.
    staged: bool,
    /// Wider blocks pay less often for reductions.
    keys: Reverse<usize>,
    /// Place in [`DIRECT_SIMDGROUPS`].
    preference: usize,
}

/// The tiles that `problem` can have on `gpu`, the planner's own choice first.
///
/// # Errors
/// The refusal of the tile that needs the least, when every tile is refused.
pub(super) fn candidates(problem: &Problem, gpu: &Gpu) -> Result<Vec<MetalTile>, Refusal> {
    let shape = KernelShape::of(problem, gpu.has_bfloat());
    let most_halves = Preference::of(gpu).most_halves;
    let mut tiles: Vec<(Score, MetalTile)> = Vec::new();
    let mut least = Refusal::Spills { halves: usize::MAX };
    let value_fragments = shape.value_dim.div_ceil(FRAGMENT);
    let row_fragments = packed_rows(problem).div_ceil(FRAGMENT).max(1);
    // Blocks of keys lie in one page each.
    let most_keys = if has_pages(problem) { PAGE_MULTIPLE } else { usize::MAX };
    for passes in PASSES.into_iter().take_while(|&passes| passes <= value_fragments) {
        let value_chunk = value_fragments.div_ceil(passes) * FRAGMENT;
        for (tile, row_groups, preference) in forms(row_fragments, value_chunk, most_keys) {
            let tile = with_nearest_query(tile, &shape);
            match occupancy(&tile, &shape) {
                Err(refusal) => least = lesser(least, refusal),
                Ok(occupancy) => {
                    let score = Score {
                        near_spill: occupancy.is_near_spill(),
                        reads: reads(&tile, &shape, row_groups),
                        narrow: tile.keys == FRAGMENT,
                        exposed: occupancy.halves > most_halves,
                        fragments: row_groups * tile.row_fragments * if tile.staged { tile.simdgroups } else { 1 },
                        staged: tile.staged,
                        keys: Reverse(tile.keys),
                        preference,
                    };
                    tiles.push((score, tile));
                }
            }
        }
        if tiles.iter().any(|(score, _)| !score.near_spill) {
            break;
        }
    }
    // Equals stay in the order of the search.
    tiles.sort_by_key(|&(score, _)| score);
    if tiles.is_empty() { Err(least) } else { Ok(tiles.into_iter().map(|(_, tile)| tile).collect()) }
}

fn has_pages(problem: &Problem) -> bool {
    matches!(problem.cache, Some(Cache { layout: CacheLayout::Pages { .. }, .. }))
}

/// Elements that are read from device memory for each key: K for each pass over columns of V and each group of rows, V for
/// each group, and Q for each fragment of keys where it is not kept.
fn reads(tile: &MetalTile, shape: &KernelShape, row_groups: usize) -> usize {
    let keys = shape.head_dim * tile.passes(shape.value_dim) + shape.value_dim;
    let rows = if tile.query == QueryHome::Device { group_rows(tile) } else { 0 };
    row_groups * (keys + rows * shape.head_dim / FRAGMENT)
}

/// Tiles for `fragments` fragments of rows and blocks of at most `most_keys` keys, with the groups of rows that they make and their place among equals.
fn forms(fragments: usize, value_chunk: usize, most_keys: usize) -> Vec<(MetalTile, usize, usize)> {
    let mut forms = Vec::new();
    let query = QueryHome::Registers;
    for keys in KEYS.into_iter().filter(|&keys| keys <= most_keys) {
        if fragments <= MOST_ROW_FRAGMENTS {
            for (preference, simdgroups) in DIRECT_SIMDGROUPS.into_iter().enumerate() {
                let tile = MetalTile { simdgroups, row_fragments: fragments, keys, staged: false, value_chunk, query };
                forms.push((tile, 1, preference));
            }
        }
        for row_fragments in 1..=MOST_ROW_FRAGMENTS.min(fragments - 1) {
            let row_groups = fragments.div_ceil(row_fragments * MOST_STAGED_SIMDGROUPS);
            let simdgroups = fragments.div_ceil(row_fragments * row_groups);
            let tile = MetalTile { simdgroups, row_fragments, keys, staged: true, value_chunk, query };
            forms.push((tile, row_groups, 0));
        }
    }
    forms
}

/// `tile` with Q as near as it can be without a spill, or more threadgroup memory than there is.
fn with_nearest_query(tile: MetalTile, shape: &KernelShape) -> MetalTile {
    let at = |query| MetalTile { query, ..tile };
    let suits = |tile: &MetalTile| occupancy(tile, shape).is_ok_and(|occupancy| !occupancy.is_near_spill());
    QueryHome::ALL.into_iter().map(at).find(suits).unwrap_or(at(QueryHome::Device))
}

fn occupancy(tile: &MetalTile, shape: &KernelShape) -> Result<Occupancy, Refusal> {
    let bytes = threadgroup_bytes(tile, shape.dtype, shape.head_dim);
    if bytes > THREADGROUP_MEMORY {
        return Err(Refusal::ThreadgroupMemory { bytes });
    }
    tile.occupancy(shape)
}

/// Why the decode kernel does not serve `problem` on `gpu` although it could; `forced` says that the user asked for it.
pub(super) fn refuses(problem: &Problem, gpu: &Gpu, forced: bool) -> Option<Reason> {
    if problem.lengths.max_query_len() > MOST_QUERIES {
        return Some(Reason::ManyQueries);
    }
    if problem.dropout.is_some() {
        return Some(Reason::NoDropout);
    }
    // No other kernel reads keys in a cache.
    if forced || problem.cache.is_some() {
        return None;
    }
    if problem.lengths.max_key_len() < FEWEST_KEYS {
        return Some(Reason::FewKeys);
    }
    let beside = packed_rows(problem) > MOST_ROWS_BESIDE_MATRIX_UNITS && gpu.lacks_for_tensorops().is_none();
    beside.then_some(Reason::ManyRows(MOST_ROWS_BESIDE_MATRIX_UNITS))
}

/// Into how many parts the keys of each sequence of `problem` are split on a GPU with `cores` cores: enough to fill it,
/// unless a part would have too few keys; where the problem says how many, as many as have keys.
#[must_use]
pub fn splits(problem: &Problem, tile: &MetalTile, cores: usize) -> usize {
    let Problem { dtype, head_dim, value_dim, key_heads, lengths, .. } = *problem;
    let turn = if tile.staged { tile.keys } else { tile.keys * tile.simdgroups };
    if let Some(splits) = problem.splits {
        return splits.get().min(visible_span(problem).div_ceil(turn)).clamp(1, MOST_SPLITS);
    }
    let row_groups = packed_rows(problem).div_ceil(group_rows(tile)).max(1);
    let sequences = match lengths {
        Lengths::Dense { batch, .. } => batch,
        // Ragged batches are usually long in only some sequences.
        Lengths::Packed { batch, .. } => batch.min(8),
    };
    let simdgroups = sequences * key_heads * tile.passes(value_dim) * row_groups * tile.simdgroups;
    let wanted = (SIMDGROUPS_PER_CORE * cores.max(1)).div_ceil(simdgroups.max(1));
    // Written once and read once: values, maximum and sum.
    let partial = 2 * packed_rows(problem) * (value_dim + 2) * size_of::<f32>();
    let repays = (KEYS_PER_PARTIAL * partial).div_ceil((head_dim + value_dim) * dtype.size());
    let fewest = repays.max(FEWEST_SPLIT_KEYS).next_multiple_of(turn);
    wanted.min(visible_span(problem) / fewest).clamp(1, MOST_SPLITS)
}

/// Most keys that some query of a sequence sees.
fn visible_span(problem: &Problem) -> usize {
    let (queries, keys) = (problem.lengths.max_query_len(), problem.lengths.max_key_len());
    match (problem.mask.left, problem.mask.right) {
        (Some(left), Some(right)) => left.saturating_add(right).saturating_add(queries).min(keys),
        _ => keys,
    }
}

#[cfg(test)]
mod tests;
