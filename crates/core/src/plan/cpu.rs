//! How the CPU engine cuts a problem.

use std::num::NonZeroUsize;

use crate::{Lengths, Problem};

/// Loop structure of the CPU engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuPath {
    /// Panels of query rows against blocks of keys: both products run at the rate of the FMA units.
    Panels,
    /// A few rows against each key: runs at the rate of memory.
    Decode,
}

/// Tile of the CPU engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTile {
    /// Loop structure.
    pub path: CpuPath,
    /// Query rows (times the heads of a group) that one task holds.
    pub task_rows: usize,
    /// Keys whose scores are held at once.
    pub key_block: usize,
    /// Keys of one split; splits are merged afterwards. At least the longest sequence when nothing is split.
    pub split_keys: usize,
}

/// Tasks that keep any CPU of today busy; more splits than this only cost merging.
pub(super) const TARGET_TASKS: usize = 64;
/// Fewest keys that repay the merge of a split.
pub(super) const MIN_SPLIT_KEYS: usize = 1024;
/// Keys of a score tile: 128 keys by 24 rows are 12 KiB of a 32 KiB first-level cache.
const KEY_BLOCK: usize = 128;
/// Bytes of packed Q and of O that one task may hold, a good part of a 512 KiB second-level cache.
const TASK_BYTES: usize = 256 * 1024;
/// Most panels a task holds: beyond this the packing of K and V is already amortised.
pub(super) const MAX_PANELS: usize = 16;

impl CpuTile {
    /// The tile for `problem`. Only `task_rows` may depend on `threads`: it changes no rounding, whereas the key split
    /// does, and results must not depend on the number of threads.
    #[must_use]
    pub fn new(problem: &Problem, panel_rows: usize, decode_rows: usize, threads: usize) -> Self {
        let rows = problem.lengths.max_query_len() * problem.group();
        let path = if rows <= decode_rows { CpuPath::Decode } else { CpuPath::Panels };
        let task_rows = match path {
            CpuPath::Decode => rows.max(1),
            CpuPath::Panels => task_rows(problem, panel_rows, threads),
        };
        Self { path, task_rows, key_block: KEY_BLOCK, split_keys: split_keys(problem, panel_rows) }
    }
}

fn task_rows(problem: &Problem, panel_rows: usize, threads: usize) -> usize {
    let panel_bytes = panel_rows * (problem.head_dim + problem.value_dim) * 4;
    let mut panels = (TASK_BYTES / panel_bytes).clamp(1, MAX_PANELS);
    let rows = problem.lengths.query_rows() * problem.query_heads;
    // Causal blocks differ in length: more of them even out the load.
    let tasks_wanted = threads * if problem.mask.is_full() { 4 } else { 8 };
    while panels > 4 && threads > 1 && rows < tasks_wanted * panels * panel_rows {
        panels /= 2;
    }
    if !problem.mask.is_full() {
        panels = panels.min(8);
    }
    panels * panel_rows
}

fn split_keys(problem: &Problem, panel_rows: usize) -> usize {
    let key_len = problem.lengths.max_key_len();
    let rows = problem.lengths.max_query_len() * problem.group();
    let sequences = match problem.lengths {
        Lengths::Dense { batch, .. } => batch,
        // Ragged batches are usually long in only some sequences.
        Lengths::Packed { batch, .. } => batch.min(8),
    };
    let tasks = sequences * problem.key_heads * rows.div_ceil(4 * panel_rows);
    let worthwhile = || TARGET_TASKS.div_ceil(tasks.max(1)).min(key_len / MIN_SPLIT_KEYS).max(1);
    let splits = problem.splits.map_or_else(worthwhile, NonZeroUsize::get);
    key_len.div_ceil(splits).next_multiple_of(KEY_BLOCK).max(KEY_BLOCK)
}
