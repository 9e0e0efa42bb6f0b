//! Which tier computes the gradients of a problem.

use super::cpu::{CpuPath, CpuTile};
use super::{BackwardPass, BackwardTile, Device, Gpu, Planner, Reason, Wanted, backward_passes};
use crate::{Lengths, Problem, Tier, settings};

/// How the CPU engine cuts the gradients of a problem. Nothing here depends on the number of threads: splits are added
/// up afterwards, and results must not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuBackwardTile {
    /// Rows that meet a block of keys together, and the keys of that block.
    pub block: CpuTile,
    /// Rows of one task, a multiple of those of a block.
    pub split_rows: usize,
}

/// Tasks that keep most CPUs busy. Each has sums for all of its keys, so that more of them cost memory.
const TARGET_TASKS: usize = 32;
/// Most splits of the rows of one key head, for the same reason.
const MAX_SPLITS: usize = 8;
/// Fewest rows that repay the sums of a split.
const MIN_SPLIT_ROWS: usize = 512;
/// Keys of a block: with two score tiles of 64 keys by 32 rows its work fits in a 32 KiB first-level cache.
const KEY_BLOCK: usize = 64;
/// Bytes of a block's rows: Q, dO and dQ with their transposes. Smaller blocks would stage every key more often, which
/// costs more than what a small second-level cache loses.
const BLOCK_BYTES: usize = 512 * 1024;
/// Most panels of a block.
const MAX_PANELS: usize = 16;

impl CpuBackwardTile {
    /// The tile for `problem` with panels of `panel_rows`.
    #[must_use]
    pub fn new(problem: &Problem, panel_rows: usize) -> Self {
        let row_bytes = (3 * problem.head_dim + 2 * problem.value_dim) * 4;
        let rows = (problem.lengths.max_query_len() * problem.group()).max(1);
        let panels = (BLOCK_BYTES / (panel_rows * row_bytes)).clamp(1, MAX_PANELS).min(rows.div_ceil(panel_rows));
        let block_rows = panels * panel_rows;
        let sequences = match problem.lengths {
            Lengths::Dense { batch, .. } => batch,
            // Ragged batches are usually long in only some sequences.
            Lengths::Packed { batch, .. } => batch.min(8),
        };
        let tasks = (sequences * problem.key_heads).max(1);
        let splits = TARGET_TASKS.div_ceil(tasks).min(rows / MIN_SPLIT_ROWS).clamp(1, MAX_SPLITS);
        Self {
            block: CpuTile {
                path: CpuPath::Panels,
                task_rows: block_rows,
                key_block: KEY_BLOCK,
                split_keys: problem.lengths.max_key_len().max(1),
            },
            split_rows: rows.div_ceil(splits).next_multiple_of(block_rows),
        }
    }
}

/// Which tier serves the gradients of a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackwardPlan {
    /// The tier that serves.
    pub tier: Tier,
    /// Its tile when it is [`Tier::Cpu`].
    pub cpu: Option<CpuBackwardTile>,
    /// Its kernels in the order in which they run, with their tiles, when it is [`Tier::Simdgroup`].
    pub metal: Vec<(BackwardPass, BackwardTile)>,
    /// Every other tier, with the reason why it does not.
    pub passed_over: Vec<(Tier, Reason)>,
}

/// The tile or the kernels of a tier.
#[derive(Default)]
struct Served {
    cpu: Option<CpuBackwardTile>,
    metal: Vec<(BackwardPass, BackwardTile)>,
}

impl Planner<'_> {
    /// Chooses the tier for the `wanted` gradients of `problem`: the forced tier where it can serve, else the first in the
    /// order of [`Tier::ALL`] that can. The forward pass leaves nothing behind but its output and LSE, so any tier can
    /// follow any other.
    #[must_use]
    pub fn plan_backward(&self, problem: &Problem, wanted: Wanted) -> BackwardPlan {
        let mut served: Vec<_> = Tier::ALL.map(|tier| (tier, self.serve_backward(problem, tier, wanted))).into();
        let forced = self.settings.kernel.tier();
        let forced = forced.filter(|&forced| served.iter().any(|(tier, served)| *tier == forced && served.is_ok()));
        let first =
            served.iter().position(|(tier, served)| served.is_ok() && forced.is_none_or(|forced| forced == *tier));
        let (tier, Ok(Served { cpu, metal })) = served.swap_remove(first.expect("the torch tier serves everything"))
        else {
            unreachable!("only tiers that can serve are chosen")
        };
        let why = |served| match served {
            Err(reason) => reason,
            Ok(_) if forced.is_some() => Reason::NotForced(self.settings.kernel.name()),
            Ok(_) => Reason::After(tier),
        };
        let mut passed_over: Vec<_> = served.into_iter().map(|(other, served)| (other, why(served))).collect();
        passed_over.sort_by_key(|(other, _)| Tier::ALL.iter().position(|tier| tier == other));
        BackwardPlan { tier, cpu, metal, passed_over }
    }

    fn serve_backward(&self, problem: &Problem, tier: Tier, wanted: Wanted) -> Result<Served, Reason> {
        match (tier, self.device) {
            (Tier::Torch, _) => Ok(Served::default()),
            (Tier::Cpu, Device::Metal(_)) if self.settings.device == settings::Device::Simulator => {
                Err(Reason::Simulated)
            }
            (Tier::Cpu, Device::Metal(_) | Device::Torch) => Err(Reason::NeedsCpu),
            (Tier::Cpu, Device::Cpu { .. }) if wanted.bias => Err(Reason::NoBiasGradient),
            (Tier::Cpu, Device::Cpu { panel_rows, .. }) => {
                Ok(Served { cpu: Some(CpuBackwardTile::new(problem, panel_rows)), ..Served::default() })
            }
            (Tier::Simdgroup, Device::Metal(gpu)) => {
                Ok(Served { metal: self.metal_passes(problem, &gpu, wanted)?, ..Served::default() })
            }
            (_, Device::Metal(_)) => Err(Reason::NoBackward),
            (_, Device::Cpu { .. } | Device::Torch) => Err(Reason::NeedsMetal),
        }
    }

    fn metal_passes(
        &self,
        problem: &Problem,
        gpu: &Gpu,
        wanted: Wanted,
    ) -> Result<Vec<(BackwardPass, BackwardTile)>, Reason> {
        self.check_metal(problem, Tier::Simdgroup, gpu)?;
        if wanted.bias {
            return Err(Reason::NoBiasGradient);
        }
        let Problem { head_dim, value_dim, dtype, .. } = *problem;
        backward_passes(problem, gpu, wanted).ok_or(Reason::NoBackwardTile { head_dim, value_dim, dtype })
    }
}
