//! The decision: which tier serves a problem, with which tile, and why the others were passed over.

#[cfg(test)]
mod tests;

use std::fmt;

use crate::{Error, Lengths, Problem, Result, Settings, Tier};

/// Where the tensors live, with what the planner needs to know about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Main memory, computed by the engine in `mtlflashattn-cpu`.
    Cpu {
        /// Query rows that one panel of the chosen instruction set holds.
        panel_rows: usize,
        /// Largest number of rows for which the decode path is the faster one.
        decode_rows: usize,
        /// Threads that will share the work.
        threads: usize,
    },
    /// Any other torch device: only tensor operations can serve it.
    Torch,
}

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

/// Why a tier does not serve a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The tier needs tensors on another kind of device.
    NeedsMps,
    /// The tier's kernels are not part of this version.
    NotBuilt,
    /// The tier serves CPU tensors only.
    NeedsCpu,
    /// A tier before it in the order serves the call.
    Slower,
    /// `MTLFLASHATTN_KERNEL` names another tier.
    NotForced,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NeedsMps => "needs tensors on an MPS device",
            Self::NotBuilt => "this version contains no Metal kernels",
            Self::NeedsCpu => "needs CPU tensors",
            Self::Slower => "a faster tier serves this call",
            Self::NotForced => "MTLFLASHATTN_KERNEL names another tier",
        })
    }
}

/// Which tier serves a problem, with which tile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The tier that serves.
    pub tier: Tier,
    /// Its tile when it is [`Tier::Cpu`].
    pub cpu: Option<CpuTile>,
}

impl Plan {
    /// Chooses the tier for `problem` on `device`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when `MTLFLASHATTN_KERNEL` forces a tier that cannot serve.
    pub fn new(problem: &Problem, device: Device, settings: &Settings) -> Result<Self> {
        let tier = match settings.kernel.tier() {
            Some(forced) => match cannot_serve(forced, device) {
                None => forced,
                Some(reason) => {
                    return Err(Error::Unsupported {
                        argument: "MTLFLASHATTN_KERNEL",
                        got: format!("{} for this call ({forced}: {reason})", settings.kernel.name()),
                        instead: "unset the variable, or set it to auto".into(),
                    });
                }
            },
            None => serving_tier(device),
        };
        let cpu = match (tier, device) {
            (Tier::Cpu, Device::Cpu { panel_rows, decode_rows, threads }) => {
                Some(CpuTile::new(problem, panel_rows, decode_rows, threads))
            }
            _ => None,
        };
        Ok(Self { tier, cpu })
    }

    /// Every other tier with the reason why it does not serve.
    #[must_use]
    pub fn passed_over(&self, device: Device, settings: &Settings) -> Vec<(Tier, Reason)> {
        let why = |tier| match cannot_serve(tier, device) {
            Some(reason) => reason,
            None if settings.kernel.tier().is_some() => Reason::NotForced,
            None => Reason::Slower,
        };
        Tier::ALL.into_iter().filter(|&tier| tier != self.tier).map(|tier| (tier, why(tier))).collect()
    }
}

const fn serving_tier(device: Device) -> Tier {
    match device {
        Device::Cpu { .. } => Tier::Cpu,
        Device::Torch => Tier::Torch,
    }
}

const fn cannot_serve(tier: Tier, device: Device) -> Option<Reason> {
    match (tier, device) {
        (Tier::Torch, _) | (Tier::Cpu, Device::Cpu { .. }) => None,
        (Tier::Cpu, Device::Torch) => Some(Reason::NeedsCpu),
        (_, Device::Cpu { .. }) => Some(Reason::NeedsMps),
        (_, Device::Torch) => Some(Reason::NotBuilt),
    }
}

/// Tasks that keep any CPU of today busy; more splits than this only cost merging.
const TARGET_TASKS: usize = 64;
/// Fewest keys that repay the merge of a split.
const MIN_SPLIT_KEYS: usize = 1024;
/// Keys of a score tile: 128 keys by 24 rows are 12 KiB of a 32 KiB first-level cache.
const KEY_BLOCK: usize = 128;
/// Bytes of packed Q and of O that one task may hold, a good part of a 512 KiB second-level cache.
const TASK_BYTES: usize = 256 * 1024;
/// Most panels a task holds: beyond this the packing of K and V is already amortised.
const MAX_PANELS: usize = 16;

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
    let splits = TARGET_TASKS.div_ceil(tasks.max(1)).min(key_len / MIN_SPLIT_KEYS).max(1);
    key_len.div_ceil(splits).next_multiple_of(KEY_BLOCK).max(KEY_BLOCK)
}
