//! Runs kernels' texts on the simulator.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use mtlflashattn_core::reference::Forward;
use mtlflashattn_metal::{Device, DeviceError, Kernel, Launch, Tensors};
use mtlflashattn_simulator::{Buffer, Launch as Dispatch, Options, Pipeline, Report, Simulator};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::{Case, Run};

/// A simulator with the kernels that it has compiled.
pub struct Bench {
    simulator: Simulator,
    pipelines: Mutex<HashMap<String, Arc<Pipeline>>>,
}

impl Bench {
    pub fn new(options: Options) -> Self {
        Self { simulator: Simulator::new(options), pipelines: Mutex::default() }
    }

    pub fn simulator(&self) -> &Simulator {
        &self.simulator
    }

    /// Compiles a text, or finds it compiled.
    pub fn pipeline(&self, source: &str, entry: &str) -> Result<Arc<Pipeline>, DeviceError> {
        let mut pipelines = self.pipelines.lock().unwrap();
        if let Some(pipeline) = pipelines.get(source) {
            return Ok(Arc::clone(pipeline));
        }
        let pipeline = Arc::new(self.simulator.pipeline(source, entry)?);
        pipelines.insert(source.to_owned(), Arc::clone(&pipeline));
        Ok(pipeline)
    }

    /// Runs `source`, the text of `kernel` or a change of it, and returns what it computed and did.
    ///
    /// # Errors
    /// Whatever the compiler or the simulator found wrong.
    pub fn launch(&self, kernel: &Kernel, source: &str, run: &Run) -> Result<(Forward, Report), String> {
        let pipeline = self.pipeline(source, kernel.entry()).map_err(|error| error.to_string())?;
        let launch = Launch::new(&run.problem, kernel, &run.outputs).expect("a small problem");
        let bytes = run.tensors();
        let tensors = buffers(&bytes).map_err(|error| error.to_string())?;
        let mut report = Report::default();
        if !launch.is_empty() {
            // Holes of out, and rows that belong to no sequence, stay unwritten: `Run::check` looks at them.
            let arguments = launch.arguments(&borrowed(&tensors));
            report = self
                .simulator
                .run(&pipeline, &arguments, &Dispatch::from(launch.grid))
                .map_err(|error| error.to_string())?;
        }
        let out = tensors.out.read::<u8>();
        let lse = tensors.lse.as_ref().map(Buffer::read::<u8>);
        Ok((run.read(&out, lse.as_deref())?, report))
    }

    /// Runs a text and returns its results.
    ///
    /// # Errors
    /// Whatever the compiler or the simulator found wrong.
    pub fn run(&self, kernel: &Kernel, source: &str, run: &Run) -> Result<Forward, String> {
        Ok(self.launch(kernel, source, run)?.0)
    }

    /// Runs a kernel, checks its results and returns what it did.
    ///
    /// # Errors
    /// Whatever is wrong.
    pub fn count(&self, kernel: &Kernel, run: &Run) -> Result<Report, String> {
        let (got, report) = self.launch(kernel, &kernel.source(), run)?;
        run.check(kernel, &got)?;
        Ok(report)
    }
}

pub fn buffers(bytes: &Tensors<Vec<u8>>) -> Result<Tensors<Buffer>, DeviceError> {
    let buffer = |bytes: &Vec<u8>| Buffer::from_slice(bytes);
    let optional = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(buffer).transpose();
    Ok(Tensors {
        q: buffer(&bytes.q)?,
        k: buffer(&bytes.k)?,
        v: buffer(&bytes.v)?,
        out: buffer(&bytes.out)?,
        lse: optional(&bytes.lse)?,
        offsets: match &bytes.offsets {
            Some((query, key)) => Some((buffer(query)?, buffer(key)?)),
            None => None,
        },
        alibi_slopes: optional(&bytes.alibi_slopes)?,
        bias: optional(&bytes.bias)?,
        sinks: optional(&bytes.sinks)?,
    })
}

pub fn borrowed(tensors: &Tensors<Buffer>) -> Tensors<&Buffer> {
    Tensors {
        q: &tensors.q,
        k: &tensors.k,
        v: &tensors.v,
        out: &tensors.out,
        lse: tensors.lse.as_ref(),
        offsets: tensors.offsets.as_ref().map(|(query, key)| (query, key)),
        alibi_slopes: tensors.alibi_slopes.as_ref(),
        bias: tensors.bias.as_ref(),
        sinks: tensors.sinks.as_ref(),
    }
}

/// Runs `cases` random problems; `check` says what is wrong with one on benches of the options.
pub fn agree(
    name: &str,
    problems: impl Strategy<Value = Case>,
    options: &[Options],
    cases: u32,
    check: impl Fn(&[Bench], &Case) -> Result<(), String>,
) {
    let benches: Vec<Bench> = options.iter().map(|options| Bench::new(options.clone())).collect();
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let result = runner.run(&problems, |case| check(&benches, &case).map_err(TestCaseError::fail));
    if let Err(error) = result {
        panic!("{name}: {error}");
    }
}
