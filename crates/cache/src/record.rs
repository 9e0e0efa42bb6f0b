//! What is kept.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Most verdicts that a record keeps; a user who meets ever new head dimensions must not fill the disk.
pub const MAX_VERDICTS: usize = 1024;

/// Everything that decides whether a kernel works and how fast it is: what was found on one machine says nothing about
/// another.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the GPU and its number of cores.
    pub gpu: String,
    /// Operating system with its exact version, which brings the Metal compiler.
    pub os: String,
    /// Version of torch, whose compile options count.
    pub torch: String,
    /// Version of this package.
    pub package: String,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpu, os, torch, package } = self;
        write!(f, "{gpu}, {os}, torch {torch}, mtlflashattn {package}")
    }
}

/// Stands for the text of a kernel and whatever else its results depend on: 128 bits of SHA-256 in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint(String);

impl Fingerprint {
    /// The fingerprint of `parts`, which are kept apart.
    #[must_use]
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let hexadecimal = |text: String, byte: &u8| text + &format!("{byte:02x}");
        Self(hash.finalize().iter().take(16).fold(String::new(), hexadecimal))
    }
}

/// Whether a kernel got its probe right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It compiled and got every small problem right.
    Proved,
    /// It did not, and serves no more on this machine; the text says why.
    Failed(String),
}

/// What a kernel was specialised for, in words. The words are the same for an edited kernel, whose verdict so takes the
/// place of the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variant {
    /// Name of the tier.
    pub tier: String,
    /// Element type of q, k, v and the output, as torch names it.
    pub dtype: String,
    /// Columns of q and k; `None` where the kernel reads them at run time.
    pub head_dim: Option<usize>,
    /// Columns of v; as above.
    pub value_dim: Option<usize>,
    /// The tile.
    pub tile: String,
    /// Names of the features that are compiled in.
    pub features: Vec<String>,
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dim = |dim: Option<usize>| dim.map_or_else(|| "any".into(), |dim| dim.to_string());
        let Self { tier, dtype, head_dim, value_dim, tile, features } = self;
        let (head_dim, value_dim) = (dim(*head_dim), dim(*value_dim));
        write!(f, "{tier} {dtype} {head_dim}/{value_dim} [{}] {tile}", features.join(", "))
    }
}

/// What the probe of one kernel variant showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The variant.
    pub variant: Variant,
    /// The kernel that was probed. One with another fingerprint has to be probed anew.
    pub fingerprint: Fingerprint,
    /// The verdict.
    pub outcome: Outcome,
    /// What the pipeline says about itself. On an M1 or M2 it tells the class of registers that Apple's compiler chose, but
    /// for a kernel that declares how many threads a threadgroup has at most: then it is that number, or less.
    pub max_threads_per_threadgroup: Option<u32>,
    /// Launches of the probe.
    pub launches: u32,
    /// Microseconds that compiling and making the pipeline took.
    pub compile_micros: u64,
    /// Microseconds that the small problems took, with their inputs, the wait for the GPU and the comparison.
    pub probe_micros: u64,
    /// When, in seconds since 1970.
    pub checked_at: u64,
}

impl Verdict {
    /// What the first use of the kernel cost.
    #[must_use]
    pub const fn cost(&self) -> Duration {
        Duration::from_micros(self.compile_micros.saturating_add(self.probe_micros))
    }

    /// Why the kernel serves no more, if it failed.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Proved => None,
            Outcome::Failed(reason) => Some(reason),
        }
    }
}

/// Fields of a tile by name, as whoever tunes and plans agree on them; opaque here.
pub type Fields = serde_json::Map<String, serde_json::Value>;

/// The tile that was the best of those that were measured for a kind of problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunedTile {
    /// The tile.
    pub tile: Fields,
    /// What it cost, in `unit`; less is better.
    pub cost: u64,
    /// What the tile cost that the planner takes by itself.
    pub default_cost: u64,
    /// "nanoseconds", or what else was counted.
    pub unit: String,
    /// When, in seconds since 1970.
    pub tuned_at: u64,
}

/// What one machine has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Verdicts by the words for their variant.
    pub verdicts: BTreeMap<String, Verdict>,
    /// Tuned tiles by the name of their kind of problem.
    pub tiles: BTreeMap<String, TunedTile>,
}

impl Record {
    /// The verdict on `variant`, unless its kernel was another.
    #[must_use]
    pub fn verdict(&self, variant: &Variant, fingerprint: &Fingerprint) -> Option<&Verdict> {
        self.verdicts.get(&variant.to_string()).filter(|verdict| verdict.fingerprint == *fingerprint)
    }

    /// Keeps `verdict` in the place of an earlier one on its variant.
    pub fn insert(&mut self, verdict: Verdict) {
        self.verdicts.insert(verdict.variant.to_string(), verdict);
    }

    /// What the first uses of all kernels cost together.
    #[must_use]
    pub fn first_use_cost(&self) -> Duration {
        self.verdicts.values().fold(Duration::ZERO, |sum, verdict| sum.saturating_add(verdict.cost()))
    }

    /// Drops the oldest verdicts beyond [`MAX_VERDICTS`].
    pub(crate) fn bound(&mut self) {
        while self.verdicts.len() > MAX_VERDICTS {
            let oldest = self.verdicts.iter().min_by_key(|(_, verdict)| verdict.checked_at);
            let Some(name) = oldest.map(|(name, _)| name.clone()) else { return };
            self.verdicts.remove(&name);
        }
    }
}

/// Now, in seconds since 1970; 0 on a clock that is set before.
#[must_use]
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
