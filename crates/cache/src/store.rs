//! The file of a record.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::{Error, Machine, Record, Result};

/// The format of the files. Another number for whatever an older version would misread.
pub const VERSION: u64 = 1;

/// Names the program that writes the files.
const PROGRAM: &str = "mtlflashattn-cache";
/// No record is as large as this.
const MAX_BYTES: u64 = 16 << 20;
/// How long to wait for another process, which holds the lock for milliseconds unless it was stopped meanwhile.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// What every version of the format begins with.
#[derive(Deserialize)]
struct Head {
    program: String,
    format: u64,
}

#[derive(Serialize, Deserialize)]
struct Contents {
    program: String,
    format: u64,
    machine: Machine,
    #[serde(flatten)]
    record: Record,
}

/// The record of a machine in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    path: PathBuf,
    machine: Machine,
}

impl Cache {
    /// The record of `machine` in `folder`, neither of which is touched yet.
    #[must_use]
    pub fn new(folder: &Path, machine: Machine) -> Self {
        Self { path: folder.join(file_name(&machine)), machine }
    }

    /// The machine.
    #[must_use]
    pub const fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file; the record is empty where there is none.
    ///
    /// # Errors
    /// Every [`enum@Error`]: the file cannot be used, and [`update`](Self::update) will replace it.
    pub fn load(&self) -> Result<Record> {
        let bytes = match self.read() {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Record::default()),
            read => read.map_err(|source| self.io("read", source))?,
        };
        let damaged = |error: serde_json::Error| Error::Damaged { path: self.path.clone(), reason: error.to_string() };
        let head: Head = serde_json::from_slice(&bytes).map_err(damaged)?;
        if head.program != PROGRAM {
            let reason = format!("its program is {:?}", head.program);
            return Err(Error::Damaged { path: self.path.clone(), reason });
        }
        if head.format != VERSION {
            return Err(Error::Format { path: self.path.clone(), found: head.format });
        }
        let contents: Contents = serde_json::from_slice(&bytes).map_err(damaged)?;
        if contents.machine != self.machine {
            return Err(Error::OtherMachine { path: self.path.clone(), found: contents.machine });
        }
        Ok(contents.record)
    }

    /// Applies `change` to what the file holds now and puts the result in its place; returns it. Makes the folder where
    /// there is none. A file that cannot be used counts as empty.
    ///
    /// Other processes' updates wait meanwhile, for a second at most: after that, and on file systems without locks, one
    /// of two updates at once may be lost. Whoever reads sees the file before or after, never something between.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written; it is as before then.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> Result<Record> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(|source| self.io("written", source))?;
        let lock = lock(&folder.join("lock"));
        let mut record = self.load().unwrap_or_default();
        change(&mut record);
        record.bound();
        let written = self.write(folder, record);
        drop(lock);
        written.map_err(|source| self.io("written", source))
    }

    fn read(&self) -> io::Result<Vec<u8>> {
        // Opening a pipe would wait for somebody to write to it.
        if !fs::metadata(&self.path)?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let mut bytes = Vec::new();
        File::open(&self.path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, folder: &Path, record: Record) -> io::Result<Record> {
        let contents = Contents { program: PROGRAM.into(), format: VERSION, machine: self.machine.clone(), record };
        let mut bytes = serde_json::to_vec_pretty(&contents)?;
        bytes.push(b'\n');
        let mut file = NamedTempFile::new_in(folder)?;
        file.write_all(&bytes)?;
        // Some file systems would rename before they write, and leave an empty file after a power cut.
        file.as_file().sync_all()?;
        file.persist(&self.path)?;
        Ok(contents.record)
    }

    fn io(&self, action: &'static str, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), action, source }
    }
}

/// The lock of a folder, held until it is dropped; `None` where it is not to be had. The file stays: removing it would let
/// two processes lock different files of one name.
fn lock(path: &Path) -> Option<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path).ok()?;
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(TryLockError::WouldBlock) if since.elapsed() < LOCK_PATIENCE => thread::sleep(LOCK_PAUSE),
            Err(_) => return None,
        }
    }
}

/// A name that people can read, and that no other machine of the same user has.
fn file_name(machine: &Machine) -> String {
    let Machine { gpu, os, torch, package } = machine;
    let text = format!("{gpu} {os} torch {torch} mtlflashattn {package}").to_ascii_lowercase();
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.').filter(|word| !word.is_empty());
    // File systems take names of 255 bytes.
    let name: String = words.collect::<Vec<_>>().join("-").chars().take(200).collect();
    format!("{name}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_say_what_they_are_for() {
        let machine = Machine {
            gpu: "Apple M3 Max, 40 cores".into(),
            os: "macOS 26.2 (25C56)".into(),
            torch: "2.15.0".into(),
            package: "1.0.0-dev.0".into(),
        };
        assert_eq!(
            file_name(&machine),
            "apple-m3-max-40-cores-macos-26.2-25c56-torch-2.15.0-mtlflashattn-1.0.0-dev.0.json"
        );
        let strange = Machine { gpu: "../\0/\u{e9}".repeat(200), ..machine };
        let name = file_name(&strange);
        assert!(name.len() < 255 && !name.contains(['/', '\0']), "{name}");
    }
}
