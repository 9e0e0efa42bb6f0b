//! The first use of a kernel: it compiles, proves itself, and the verdict is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mtlflashattn_cache::{Fingerprint, Outcome, Verdict, unix_seconds};
use mtlflashattn_core::Settings;
use mtlflashattn_core::settings::Probe;
use pyo3::prelude::*;

use crate::kernels::{Refusal, Scope, State};
use crate::metal::{Fault, Home, Objection, beginning};
use crate::probe;
use crate::variant::AnyKernel;

/// Longest part of a compiler's log that is kept.
const MAX_REASON: usize = 4000;

/// What the errors have in common that say nothing about the kernel: another program's work brought the GPU down, the
/// system was short of memory or refused work from the background (`IOKit`'s names for the errors of command buffers), or
/// the compiler's process went away (XPC).
const PASSING: [&str; 5] =
    ["InnocentVictim", "SubmissionsIgnored", "OutOfMemory", "NotPermitted", "XPC_ERROR_CONNECTION"];

/// The pipeline of `kernel`, which was not used in this process before, or not checked as `settings` ask for. `like` is a
/// tensor of the call.
pub fn prepare<'py, H: Home<'py>>(
    home: &H,
    kernel: &AnyKernel,
    like: &Bound<'py, PyAny>,
    settings: &Settings,
) -> Result<Arc<H::Pipeline>, Fault> {
    let mut first_use = FirstUse::new(home, kernel, settings);
    let result = match settings.probe {
        Probe::Off => first_use.compile().map_err(in_process),
        Probe::On | Probe::Force => first_use.prove(like),
    };
    let state = match &result {
        Ok(pipeline) => State::Ready(Arc::clone(pipeline)),
        Err(Fault::Refused(refusal)) => State::Refused(refusal.clone()),
        Err(_) => return result,
    };
    H::kernels().insert(*kernel, state, settings.probe);
    result
}

/// Why `kernel` will be refused under `settings`, as far as that is known before its first use in this process.
pub fn known_refusal<'py, H: Home<'py>>(
    home: &H,
    kernel: &AnyKernel,
    settings: &Settings,
) -> PyResult<Option<Refusal>> {
    let known = FirstUse::new(home, kernel, settings).known()?;
    Ok(known.and_then(|verdict| refusal_of(&verdict, Scope::Machine, false)))
}

/// A kernel on its way to its first launch.
struct FirstUse<'a, H> {
    home: &'a H,
    kernel: &'a AnyKernel,
    settings: &'a Settings,
    source: String,
    compile: Duration,
    probe: Duration,
    launches: u32,
    max_threads: Option<u32>,
}

impl<'a, 'py, H: Home<'py>> FirstUse<'a, H> {
    fn new(home: &'a H, kernel: &'a AnyKernel, settings: &'a Settings) -> Self {
        let (compile, probe) = (Duration::ZERO, Duration::ZERO);
        Self { home, kernel, settings, source: kernel.source(), compile, probe, launches: 0, max_threads: None }
    }

    fn compile(&mut self) -> Result<Arc<H::Pipeline>, Objection> {
        let since = Instant::now();
        let pipeline = self.home.pipeline(&self.source, self.kernel.entry());
        self.compile = since.elapsed();
        let pipeline = pipeline.map_err(|error| Objection::new(self.home, error))?;
        self.max_threads = self.home.max_threads(&pipeline);
        Ok(Arc::new(pipeline))
    }

    fn check(&mut self, pipeline: &H::Pipeline, like: &Bound<'py, PyAny>) -> Result<(), Objection> {
        // If the kernel brings the GPU down, nothing must be lost that was launched before, and no earlier error must
        // look like the kernel's.
        self.home.finish().map_err(|exception| Objection::Other(exception.into()))?;
        let since = Instant::now();
        let checked = probe::check(self.home, self.kernel, pipeline, like);
        self.probe = since.elapsed();
        self.launches = checked?;
        Ok(())
    }

    fn prove(&mut self, like: &Bound<'py, PyAny>) -> Result<Arc<H::Pipeline>, Fault> {
        let known = self.known()?;
        if let Some(refusal) = known.as_ref().and_then(|verdict| refusal_of(verdict, Scope::Machine, false)) {
            return Err(Fault::Refused(refusal));
        }
        let pipeline = self.compile().map_err(|objection| self.object(like.py(), objection))?;
        // Another number of threads: the compiler has made something else of the same text.
        if known.is_some_and(|verdict| verdict.max_threads_per_threadgroup == self.max_threads) {
            return Ok(pipeline);
        }
        self.check(&pipeline, like).map_err(|objection| self.object(like.py(), objection))?;
        match self.keep(like.py(), Outcome::Proved)? {
            Some(refusal) => Err(Fault::Refused(refusal)),
            None => Ok(pipeline),
        }
    }

    /// What an earlier process, or this one, found out, where that counts.
    fn known(&self) -> PyResult<Option<Verdict>> {
        if self.settings.probe != Probe::On {
            return Ok(None);
        }
        H::verdicts().find(self.settings, || self.home.machine(), &self.kernel.variant(), &self.fingerprint())
    }

    /// Keeps what an objection says of the kernel.
    fn object(&self, py: Python<'py>, objection: Objection) -> Fault {
        let Objection::Kernel(reason) = objection else { return in_process(objection) };
        if PASSING.iter().any(|word| reason.contains(word)) {
            return in_process(Objection::Kernel(reason));
        }
        match self.keep(py, Outcome::Failed(beginning(&reason, MAX_REASON).into_owned())) {
            Ok(Some(refusal)) => Fault::Refused(refusal),
            Ok(None) => in_process(Objection::Kernel(reason)),
            Err(exception) => exception.into(),
        }
    }

    /// Keeps the verdict; returns why the kernel does not serve, by this verdict or by one that holds in its place.
    fn keep(&self, py: Python<'py>, outcome: Outcome) -> PyResult<Option<Refusal>> {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let verdict = Verdict {
            variant: self.kernel.variant(),
            fingerprint: self.fingerprint(),
            outcome,
            max_threads_per_threadgroup: self.max_threads,
            launches: self.launches,
            compile_micros: micros(self.compile),
            probe_micros: micros(self.probe),
            checked_at: unix_seconds(),
        };
        let rewrite = self.settings.probe == Probe::Force;
        let kept = H::verdicts().keep(py, self.settings, || self.home.machine(), &verdict, rewrite)?;
        let scope = if kept.is_stored { Scope::Machine } else { Scope::Process };
        Ok(refusal_of(&kept.verdict, scope, true))
    }

    fn fingerprint(&self) -> Fingerprint {
        self.kernel.fingerprint(&self.source)
    }
}

/// What an objection means where nothing is kept.
fn in_process(objection: Objection) -> Fault {
    match objection {
        Objection::Kernel(reason) => {
            let reason = beginning(&reason, MAX_REASON).into();
            Fault::Refused(Refusal { reason, scope: Scope::Process, is_news: true })
        }
        Objection::Other(fault) => fault,
    }
}

fn refusal_of(verdict: &Verdict, scope: Scope, is_news: bool) -> Option<Refusal> {
    Some(Refusal { reason: verdict.failure()?.into(), scope, is_news })
}
