//! Counting calls: `trace()` blocks and `MTLFLASHATTN_TRACE`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mtlflashattn_core::plan::Reason;
use mtlflashattn_core::{BackwardPlan, Plan, Planner, Problem, Tier, Trace, trace};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCFunction, PyTuple};

type Shared = Arc<Mutex<Trace>>;

/// The `trace()` blocks that are open; they count the calls of all threads.
static OPEN: Mutex<Vec<Shared>> = Mutex::new(Vec::new());
/// Length of `OPEN`, so that calls outside every block take no lock.
static OPEN_COUNT: AtomicUsize = AtomicUsize::new(0);
/// The counts that `MTLFLASHATTN_TRACE` prints at exit.
static AT_EXIT: PyOnceLock<Shared> = PyOnceLock::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts one call that `plan` of `planner` served, wherever somebody asked for it.
pub fn record(py: Python<'_>, planner: &Planner<'_>, problem: &Problem, plan: &Plan) -> PyResult<()> {
    count(py, planner, || trace::Key::of(problem, plan.tier), || planner.passed_over(problem, plan))
}

/// Counts the gradients of one call that `plan` of `planner` served.
pub fn record_backward(py: Python<'_>, planner: &Planner<'_>, problem: &Problem, plan: &BackwardPlan) -> PyResult<()> {
    count(py, planner, || trace::Key::of_backward(problem, plan.tier), || plan.passed_over.clone())
}

fn count(
    py: Python<'_>,
    planner: &Planner<'_>,
    key: impl Fn() -> trace::Key,
    passed_over: impl Fn() -> Vec<(Tier, Reason)>,
) -> PyResult<()> {
    if planner.settings.trace {
        lock(AT_EXIT.get_or_try_init(py, || report_at_exit(py))?).record(key(), &passed_over);
    }
    if OPEN_COUNT.load(Ordering::Relaxed) > 0 {
        for open in &*lock(&OPEN) {
            lock(open).record(key(), &passed_over);
        }
    }
    Ok(())
}

/// Registers the report; it is printed even when the variable is gone by then.
fn report_at_exit(py: Python<'_>) -> PyResult<Shared> {
    let counts = Shared::default();
    let printed = Arc::clone(&counts);
    let print = PyCFunction::new_closure(py, None, None, move |arguments: &Bound<'_, PyTuple>, _| {
        let summary = lock(&printed).summary();
        let stderr = arguments.py().import("sys")?.getattr("stderr")?;
        if !summary.is_empty() && !stderr.is_none() {
            stderr.call_method1("write", (format!("{summary}\n"),))?;
        }
        PyResult::Ok(())
    })?;
    py.import("atexit")?.call_method1("register", (print,))?;
    Ok(counts)
}

/// Calls of one shape that one tier served.
#[pyclass(frozen, module = "metal_flash_attn", get_all, eq)]
#[derive(PartialEq)]
pub struct TraceEntry {
    /// How many there were.
    calls: u64,
    /// Element type of q, k and v, as torch names it.
    dtype: &'static str,
    /// Head dimension of q and k.
    head_dim: usize,
    /// Head dimension of v and the output.
    value_dim: usize,
    /// Queries of the longest sequence.
    query_len: usize,
    /// Keys of the longest sequence.
    key_len: usize,
    /// Whether keys after the diagonal were hidden.
    causal: bool,
    /// The tier that served.
    tier: &'static str,
    /// Whether it served gradients.
    backward: bool,
}

#[pymethods]
impl TraceEntry {
    fn __repr__(&self) -> String {
        let Self { calls, dtype, head_dim, value_dim, query_len, key_len, causal, tier, backward } = self;
        let [causal, backward] = [causal, backward].map(|flag| if *flag { "True" } else { "False" });
        format!(
            "TraceEntry(calls={calls}, dtype='{dtype}', head_dim={head_dim}, value_dim={value_dim}, \
             query_len={query_len}, key_len={key_len}, causal={causal}, tier='{tier}', \
             backward={backward})"
        )
    }
}

impl From<trace::Entry> for TraceEntry {
    fn from(trace::Entry { calls, key }: trace::Entry) -> Self {
        let trace::Key { dtype, head_dim, value_dim, query_len, key_len, causal, tier, backward } = key;
        let (dtype, tier) = (dtype.name(), tier.name());
        Self { calls, dtype, head_dim, value_dim, query_len, key_len, causal, tier, backward }
    }
}

/// Counts the attention calls of the process while its `with` block is open.
#[pyclass(frozen, module = "metal_flash_attn", name = "Trace")]
pub struct TraceBlock {
    counts: Shared,
}

#[pymethods]
impl TraceBlock {
    #[new]
    fn new() -> Self {
        Self { counts: Shared::default() }
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        let mut open = lock(&OPEN);
        open.push(Arc::clone(&slf.get().counts));
        OPEN_COUNT.store(open.len(), Ordering::Relaxed);
        drop(open);
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyTuple>) {
        let mut open = lock(&OPEN);
        if let Some(position) = open.iter().rposition(|counts| Arc::ptr_eq(counts, &self.counts)) {
            open.remove(position);
        }
        OPEN_COUNT.store(open.len(), Ordering::Relaxed);
    }

    /// What was counted so far, most frequent first.
    #[getter]
    fn calls(&self) -> Vec<TraceEntry> {
        lock(&self.counts).entries().into_iter().map(TraceEntry::from).collect()
    }

    /// The same as a table; empty when there were no calls.
    fn summary(&self) -> String {
        lock(&self.counts).summary()
    }
}
