//! Verdicts on kernels: in memory, and in the cache of the user where that can be had.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mtlflashattn_cache::{Cache, Fingerprint, Machine, Record, Variant, Verdict, default_folder};
use mtlflashattn_core::Settings;
use pyo3::prelude::*;

/// What is known of the kernels of one device. Without a folder that can be read and written it lasts as long as the
/// process.
pub struct Verdicts(Mutex<Option<Open>>);

/// The record as far as this process knows it.
struct Open {
    /// The setting that placed it.
    place: Option<PathBuf>,
    machine: Machine,
    cache: Option<Cache>,
    record: Record,
    unread: Option<String>,
    unwritten: Option<String>,
}

/// A verdict, as it holds from now on.
pub struct Kept {
    pub verdict: Verdict,
    /// Whether later processes will know it.
    pub is_stored: bool,
}

/// Everything that is known, and what became of its file.
pub struct Known {
    pub machine: Machine,
    pub record: Record,
    /// The file; `None` for a user without a folder for caches.
    pub path: Option<PathBuf>,
    /// Why it was not read or not written at the last attempt.
    pub trouble: Option<String>,
}

impl Open {
    fn new(settings: &Settings, machine: Machine) -> Self {
        let place = settings.cache.clone();
        let folder = place.clone().or_else(default_folder);
        let cache = folder.map(|folder| Cache::new(&folder, machine.clone()));
        let mut open = Self { place, machine, cache, record: Record::default(), unread: None, unwritten: None };
        open.read();
        open
    }

    /// Reads the file again: other processes have written to it, perhaps.
    fn read(&mut self) {
        if let Some(cache) = &self.cache {
            let read = cache.load();
            self.unread = self.take(read);
        }
    }

    /// Takes over what the file holds, or returns why that is not known.
    fn take(&mut self, file: mtlflashattn_cache::Result<Record>) -> Option<String> {
        match file {
            Ok(record) => {
                let old = std::mem::replace(&mut self.record, record);
                for (name, verdict) in old.verdicts {
                    // What could not be written is known here alone.
                    self.record.verdicts.entry(name).or_insert(verdict);
                }
                None
            }
            Err(error) => Some(error.to_string()),
        }
    }
}

impl Verdicts {
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `visit` on the record that `settings` place. No Python code runs while the lock is held.
    fn with<T>(
        &self,
        settings: &Settings,
        machine: impl FnOnce() -> PyResult<Machine>,
        visit: impl FnOnce(&mut Open) -> T,
    ) -> PyResult<T> {
        {
            let mut open = self.lock();
            if let Some(open) = open.as_mut().filter(|open| open.place == settings.cache) {
                return Ok(visit(open));
            }
        }
        let machine = machine()?;
        Ok(visit(self.lock().insert(Open::new(settings, machine))))
    }

    /// The verdict on a kernel, from this process or another.
    pub fn find(
        &self,
        settings: &Settings,
        machine: impl FnOnce() -> PyResult<Machine>,
        variant: &Variant,
        fingerprint: &Fingerprint,
    ) -> PyResult<Option<Verdict>> {
        self.with(settings, machine, |open| {
            if open.record.verdict(variant, fingerprint).is_none() {
                open.read();
            }
            open.record.verdict(variant, fingerprint).cloned()
        })
    }

    /// Keeps `verdict` and returns the one that holds from now on: a failure that another process found meanwhile stays,
    /// unless `rewrite`.
    pub fn keep(
        &self,
        py: Python<'_>,
        settings: &Settings,
        machine: impl FnOnce() -> PyResult<Machine>,
        verdict: &Verdict,
        rewrite: bool,
    ) -> PyResult<Kept> {
        let change = |record: &mut Record| {
            let known = record.verdict(&verdict.variant, &verdict.fingerprint);
            if rewrite || known.is_none_or(|known| known.failure().is_none()) {
                record.insert(verdict.clone());
            }
        };
        let cache = self.with(settings, machine, |open| {
            change(&mut open.record);
            open.cache.clone()
        })?;
        let mut is_stored = false;
        if let Some(cache) = cache {
            // Writing may wait for a disk or for another process.
            let written = py.detach(|| cache.update(change));
            is_stored = written.is_ok();
            if let Some(open) = self.lock().as_mut().filter(|open| open.cache.as_ref() == Some(&cache)) {
                open.unwritten = open.take(written);
            }
        }
        let open = self.lock();
        let known = open.as_ref().and_then(|open| open.record.verdict(&verdict.variant, &verdict.fingerprint));
        Ok(Kept { verdict: known.unwrap_or(verdict).clone(), is_stored })
    }

    /// Everything that is known, read again.
    pub fn all(&self, settings: &Settings, machine: impl FnOnce() -> PyResult<Machine>) -> PyResult<Known> {
        self.with(settings, machine, |open| {
            open.read();
            Known {
                machine: open.machine.clone(),
                record: open.record.clone(),
                path: open.cache.as_ref().map(|cache| cache.path().to_owned()),
                trouble: open.unwritten.clone().or_else(|| open.unread.clone()),
            }
        })
    }

    /// Forgets what is in memory.
    pub fn clear(&self) {
        *self.lock() = None;
    }
}
