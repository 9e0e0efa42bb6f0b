//! What a machine has shown of the Metal kernels, kept between processes.
//!
//! A [`Machine`] (GPU, operating system, torch, package) has one JSON file, a [`Record`] of [`Verdict`]s of probes and of
//! [`TunedTile`]s. [`Cache::load`] reads it; [`Cache::update`] reads it again, changes it and puts it back as a whole, so
//! that processes that write at once lose nothing and nobody ever reads half a file. Everything in the file can be found
//! out anew: whoever cannot read or write it goes on without.
//!
//! ```
//! use mtlflashattn_cache::{Cache, Fields, Machine, Record, TunedTile};
//!
//! let folder = tempfile::tempdir()?;
//! let machine = Machine {
//!     gpu: "Apple M3 Max, 40 cores".into(),
//!     os: "macOS 26.2 (25C56)".into(),
//!     torch: "2.15.0".into(),
//!     package: "1.0.0".into(),
//! };
//! let cache = Cache::new(folder.path(), machine);
//! assert_eq!(cache.load()?, Record::default());
//! let mut tile = Fields::new();
//! tile.insert("keys".into(), 32.into());
//! let tuned = TunedTile { tile, cost: 1200, default_cost: 1500, unit: "nanoseconds".into(), tuned_at: 0 };
//! cache.update(|record| {
//!     record.tiles.insert("simdgroup float16 64/64 causal".into(), tuned);
//! })?;
//! assert_eq!(cache.load()?.tiles.len(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod folder;
mod record;
mod store;

pub use folder::default_folder;
pub use record::{
    Fields, Fingerprint, MAX_VERDICTS, Machine, Outcome, Record, TunedTile, Variant, Verdict, unix_seconds,
};
pub use store::{Cache, VERSION};

use std::io;
use std::path::PathBuf;

/// Why a file was not read or not written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system said no.
    #[error("{} cannot be {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: "read", for example.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is not what this crate writes: cut off, edited, or of another program.
    #[error("{} is damaged or of another program: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file has a later or an earlier format.
    #[error("{} has format {found}; this version of the package reads format {VERSION}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// The file is a copy of another machine's.
    #[error("{} is the record of another machine: {found}", path.display())]
    OtherMachine {
        /// The file.
        path: PathBuf,
        /// The machine that it names.
        found: Machine,
    },
}

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
