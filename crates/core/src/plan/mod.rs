//! The decision: which tier serves a problem, with which tile, and why the others were passed over.

mod cpu;
mod metal;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::{Error, Problem, Result, Settings, Tier};

pub use cpu::{CpuPath, CpuTile};
pub use metal::MetalTile;

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
    /// Its tile when it is [`Tier::Simdgroup`].
    pub metal: Option<MetalTile>,
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
        Ok(Self { tier, cpu, metal: None })
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
