//! The `MTLFLASHATTN_*` variables, read into one value.

use crate::Tier;

/// What `MTLFLASHATTN_KERNEL` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    name: &'static str,
    tier: Option<Tier>,
}

impl Kernel {
    /// Let the planner choose.
    pub const AUTO: Self = Self { name: "auto", tier: None };

    /// The name that was set, in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// The forced tier; `None` lets the planner choose.
    #[must_use]
    pub const fn tier(self) -> Option<Tier> {
        self.tier
    }
}

/// The value of every variable.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `MTLFLASHATTN_KERNEL`.
    pub kernel: Kernel,
}

impl Default for Settings {
    fn default() -> Self {
        Self { kernel: Kernel::AUTO }
    }
}
