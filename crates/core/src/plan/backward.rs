//! Which tier computes the gradients of a problem.

use super::{Device, Planner, Reason};
use crate::{Problem, Tier, settings};

/// Which tier serves the gradients of a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackwardPlan {
    /// The tier that serves.
    pub tier: Tier,
    /// Every other tier, with the reason why it does not.
    pub passed_over: Vec<(Tier, Reason)>,
}

impl Planner<'_> {
    /// Chooses the tier for the gradients of `problem`, of its additive bias too where `bias_gradient` says so: the
    /// forced tier where it has a backward pass, else the first in the order of [`Tier::ALL`] that can serve. The
    /// forward pass leaves nothing behind but its output and LSE, so any tier can follow any other.
    #[must_use]
    pub fn plan_backward(&self, _problem: &Problem, bias_gradient: bool) -> BackwardPlan {
        let can = |tier| self.serve_backward(tier, bias_gradient);
        let forced = self.settings.kernel.tier().filter(|&tier| can(tier).is_ok());
        let tier = forced.or_else(|| Tier::ALL.into_iter().find(|&tier| can(tier).is_ok())).unwrap_or(Tier::Torch);
        let why = |other| match can(other) {
            Err(reason) => reason,
            Ok(()) if forced.is_some() => Reason::NotForced(self.settings.kernel.name()),
            Ok(()) => Reason::After(tier),
        };
        let passed_over = Tier::ALL.into_iter().filter(|&other| other != tier).map(|other| (other, why(other)));
        BackwardPlan { tier, passed_over: passed_over.collect() }
    }

    fn serve_backward(&self, tier: Tier, _bias_gradient: bool) -> Result<(), Reason> {
        match (tier, self.device) {
            (Tier::Torch, _) => Ok(()),
            (Tier::Cpu, Device::Metal(_)) if self.settings.device == settings::Device::Simulator => {
                Err(Reason::Simulated)
            }
            (Tier::Cpu, Device::Metal(_) | Device::Torch) => Err(Reason::NeedsCpu),
            (Tier::Cpu, Device::Cpu { .. }) => Err(Reason::NoBackward),
            (_, Device::Metal(_)) => Err(Reason::NoBackward),
            (_, Device::Cpu { .. } | Device::Torch) => Err(Reason::NeedsMetal),
        }
    }
}
