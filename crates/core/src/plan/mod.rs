//! The decision: which tier serves a problem, with which tile, and why the others were passed over.

mod backward;
mod backward_tile;
mod cpu;
pub mod decode;
mod gpu;
mod matmul;
mod metal;
pub mod occupancy;
mod reason;
#[cfg(test)]
mod tests;
mod tile;
mod tuned;

use crate::{Error, Problem, Result, Settings, Tier, settings};

pub use backward::{BackwardPlan, CpuBackwardTile};
pub use backward_tile::{BackwardPass, BackwardTile, Wanted, backward_passes};
pub use cpu::{CpuPath, CpuTile};
pub use gpu::{Chip, Gpu, Missing, Size, Version};
pub use matmul::{MATRIX, Matmul, Operands, Weights, has_plain_rows};
pub use metal::{Explanation, MAX_LEN, candidates, device_cost, explain};
pub use reason::{Demotions, Reason};
pub use tile::{FRAGMENT, MetalTile, QueryHome, Refusal, Traffic};
pub use tuned::{Candidate, TileChoice, TilePattern, TileSource, TunedTiles, TuningKey};

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
    /// An Apple GPU, or the simulator that stands for one.
    Metal(Gpu),
    /// Any other torch device: only tensor operations can serve it.
    Torch,
}

/// Which tier serves a problem, with which tile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The tier that serves.
    pub tier: Tier,
    /// Its tile when it is [`Tier::Cpu`].
    pub cpu: Option<CpuTile>,
    /// Its tile when it is [`Tier::Decode`], [`Tier::Simdgroup`] or one of the tensorops tiers.
    pub metal: Option<MetalTile>,
    /// Into how many parts the keys of each sequence are split, for [`Tier::Decode`]; 1 for others.
    pub splits: usize,
    /// How its products are made when it is one of the tensorops tiers.
    pub matmul: Option<Matmul>,
}

impl Plan {
    /// The plan of a tier that has no tile.
    #[must_use]
    pub const fn of(tier: Tier) -> Self {
        Self { tier, cpu: None, metal: None, splits: 1, matmul: None }
    }

    fn with(self, Candidate { tile, matmul }: Candidate) -> Self {
        Self { metal: Some(tile), matmul, ..self }
    }
}

/// Makes plans for one device.
#[derive(Clone, Copy, Debug)]
pub struct Planner<'a> {
    /// Where the tensors live.
    pub device: Device,
    /// What the user asks for.
    pub settings: &'a Settings,
    /// The tiers that have failed on this machine.
    pub demotions: &'a Demotions,
    /// The tiles that were measured on this machine.
    pub tuned: &'a TunedTiles,
}

impl<'a> Planner<'a> {
    /// A planner for a machine on which nothing failed and nothing was measured.
    #[must_use]
    pub const fn new(device: Device, settings: &'a Settings) -> Self {
        Self { device, settings, demotions: Demotions::NONE, tuned: TunedTiles::NONE }
    }

    /// Chooses the tier for `problem`: the forced one, or the first in the order of [`Tier::ALL`] that can serve.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when `MTLFLASHATTN_KERNEL` forces a tier that cannot serve, and when no tile is what
    /// `MTLFLASHATTN_TILE` asks for.
    pub fn plan(&self, problem: &Problem) -> Result<Plan> {
        let kernel = self.settings.kernel;
        let Some(forced) = kernel.tier() else {
            return self.first_of_all(problem);
        };
        self.serve(problem, forced).map_err(|reason| Error::Unsupported {
            argument: "MTLFLASHATTN_KERNEL",
            got: format!("{} for this call ({forced}: {reason})", kernel.name()),
            instead: "unset the variable, or set it to auto".into(),
        })
    }

    fn first_of_all(&self, problem: &Problem) -> Result<Plan> {
        let mut no_such_tile = None;
        for tier in Tier::ALL {
            match self.serve(problem, tier) {
                // What is asked for is not given up silently: a tier without tiles would serve otherwise.
                Ok(plan) if plan.metal.is_some() || no_such_tile.is_none() => return Ok(plan),
                Err(Reason::NoSuchTile { wanted, offered }) => {
                    no_such_tile = no_such_tile.or(Some((wanted, offered)));
                }
                Ok(_) | Err(_) => {}
            }
        }
        match no_such_tile {
            None => Ok(Plan::of(Tier::Torch)),
            Some((wanted, offered)) => Err(Error::Unsupported {
                argument: "MTLFLASHATTN_TILE",
                got: format!("{wanted} for this call"),
                instead: format!("unset the variable, or ask for what tiles for this call have: {offered}"),
            }),
        }
    }

    /// Every tier but that of `plan`, with the reason why it does not serve `problem`.
    #[must_use]
    pub fn passed_over(&self, problem: &Problem, plan: &Plan) -> Vec<(Tier, Reason)> {
        let kernel = self.settings.kernel;
        let why = |tier| match self.serve(problem, tier) {
            Err(reason) => reason,
            Ok(_) if kernel.tier().is_some() => Reason::NotForced(kernel.name()),
            Ok(_) => Reason::After(plan.tier),
        };
        Tier::ALL.into_iter().filter(|&tier| tier != plan.tier).map(|tier| (tier, why(tier))).collect()
    }

    /// The plan of `tier` for `problem`, whatever the settings ask for.
    ///
    /// # Errors
    /// [`Reason`] when the tier cannot serve it.
    pub fn serve(&self, problem: &Problem, tier: Tier) -> std::result::Result<Plan, Reason> {
        let plan = Plan::of(tier);
        match (tier, self.device) {
            (Tier::Torch, _) => Ok(plan),
            (Tier::Tensorops | Tier::TensoropsStaged | Tier::Simdgroup | Tier::Scalar, Device::Metal(_))
                if problem.cache.is_some() =>
            {
                Err(Reason::NoCache)
            }
            (Tier::Cpu, Device::Cpu { panel_rows, decode_rows, threads }) => {
                Ok(Plan { cpu: Some(CpuTile::new(problem, panel_rows, decode_rows, threads)), ..plan })
            }
            (Tier::Cpu, Device::Metal(_)) if self.settings.device == settings::Device::Simulator => {
                Err(Reason::Simulated)
            }
            (Tier::Cpu, _) => Err(Reason::NeedsCpu),
            (_, Device::Metal(gpu)) => self.serve_on_metal(problem, plan, gpu),
            (_, Device::Cpu { .. } | Device::Torch) => Err(Reason::NeedsMetal),
        }
    }

    /// What keeps Metal kernels of `tier` from any problem like this.
    fn check_metal(&self, problem: &Problem, tier: Tier, gpu: &Gpu) -> std::result::Result<(), Reason> {
        if let Some(missing) = gpu.lacks_for_kernels(problem.dtype) {
            return Err(Reason::Lacks(missing));
        }
        if let Some(failure) = self.demotions.failure(tier) {
            return Err(Reason::Demoted(failure.to_owned()));
        }
        let Problem { lengths, head_dim, value_dim, .. } = *problem;
        let largest = lengths.max_query_len().max(lengths.max_key_len()).max(head_dim).max(value_dim);
        if largest > MAX_LEN { Err(Reason::TooLong(largest)) } else { Ok(()) }
    }

    fn serve_on_metal(&self, problem: &Problem, plan: Plan, gpu: Gpu) -> std::result::Result<Plan, Reason> {
        let tier = plan.tier;
        self.check_metal(problem, tier, &gpu)?;
        match tier {
            Tier::Tensorops | Tier::TensoropsStaged => {
                let forced = self.settings.kernel.tier() == Some(plan.tier);
                if let Some(reason) = matmul::refuses(problem, &gpu, plan.tier, self.settings, forced) {
                    return Err(reason);
                }
                Ok(plan.with(self.choose_tile(problem, tier, &gpu)?.candidate))
            }
            Tier::Decode => {
                let forced = self.settings.kernel.tier() == Some(tier);
                if let Some(reason) = decode::refuses(problem, &gpu, forced) {
                    return Err(reason);
                }
                let candidate = self.choose_tile(problem, tier, &gpu)?.candidate;
                let splits = decode::splits(problem, &candidate.tile, gpu.cores);
                Ok(Plan { splits, ..plan.with(candidate) })
            }
            Tier::Simdgroup => Ok(plan.with(self.choose_tile(problem, tier, &gpu)?.candidate)),
            Tier::Scalar | Tier::Torch | Tier::Cpu => Ok(plan),
        }
    }

    /// The tile of `tier` for `problem`, where it is a tier of this device that has tiles and can serve.
    #[must_use]
    pub fn tile_choice(&self, problem: &Problem, tier: Tier) -> Option<TileChoice> {
        let Device::Metal(gpu) = self.device else { return None };
        self.serve(problem, tier).ok()?.metal?;
        self.choose_tile(problem, tier, &gpu).ok()
    }

    /// The tiles that `tier` can have for `problem`, the planner's own choice first, whatever was measured or is asked
    /// for.
    ///
    /// # Errors
    /// [`Reason`] when the tier cannot serve the problem, or has no tiles.
    pub fn candidates(&self, problem: &Problem, tier: Tier) -> std::result::Result<Vec<Candidate>, Reason> {
        let plan = self.serve(problem, tier)?;
        match (self.device, plan.metal) {
            (Device::Metal(gpu), Some(_)) => self.tiles(problem, tier, &gpu),
            _ => Err(Reason::NoTiles),
        }
    }

    fn tiles(&self, problem: &Problem, tier: Tier, gpu: &Gpu) -> std::result::Result<Vec<Candidate>, Reason> {
        if let Tier::Decode | Tier::Simdgroup = tier {
            let Problem { head_dim, value_dim, dtype, .. } = *problem;
            let tiles = if tier == Tier::Decode { decode::candidates(problem, gpu) } else { candidates(problem, gpu) };
            let tiles = tiles.map_err(|refusal| Reason::NoTile { head_dim, value_dim, dtype, refusal })?;
            return Ok(tiles.into_iter().map(|tile| Candidate { tile, matmul: None }).collect());
        }
        let tiles = matmul::candidates(problem, tier, self.settings)?;
        Ok(tiles.into_iter().map(|(tile, matmul)| Candidate { tile, matmul: Some(matmul) }).collect())
    }

    fn choose_tile(&self, problem: &Problem, tier: Tier, gpu: &Gpu) -> std::result::Result<TileChoice, Reason> {
        let wanted = self.settings.tile.as_ref();
        let tuned = self.tuned.get(&TuningKey::of(tier, problem));
        let tiles = self.tiles(problem, tier, gpu)?;
        let objection = |tuned: &Candidate| match tier {
            Tier::Simdgroup => metal::objection(problem, gpu, &tiles[0].tile, &tuned.tile),
            // The other tiers have no candidates that do not suit the sizes.
            _ => None,
        };
        TileChoice::new(&tiles, wanted, tuned, objection).map_err(|offered| Reason::NoSuchTile {
            wanted: wanted.map(ToString::to_string).unwrap_or_default(),
            offered,
        })
    }
}
