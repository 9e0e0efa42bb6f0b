//! The simulator as a device: pipelines, launches, and their errors.

use std::ffi::{CStr, c_char, c_uint};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use mtlflashattn_core::plan::occupancy::THREADGROUP_MEMORY;
use mtlflashattn_metal::{Argument, Device, DeviceError, Grid};

use crate::buffer::Buffer;
use crate::compile::{SOURCE_NAME, compile};
use crate::fault::FaultScope;
use crate::library::{
    BoundBuffer, ERROR_BYTES, EntryRef, KernelLibrary, Launch as RawLaunch, Parameter, RawCounters, SOURCE_BUFFER,
};
use crate::options::Options;
use crate::report::{BufferTraffic, Counters, Report};
use crate::stacks::with_stacks;
use crate::symbols::line_at;
use crate::tensor_ops::{MemoryDestination, OutsideExtents};

/// Threadgroup memory of every Apple GPU, in bytes (Metal feature set tables).
const THREADGROUP_MEMORY_LIMIT: u64 = THREADGROUP_MEMORY as u64;

/// A device that runs MSL text on this machine's processor.
///
/// It may be used from several threads at once: a dispatch keeps its state to itself.
#[derive(Debug)]
pub struct Simulator {
    options: Options,
    totals: Mutex<Counters>,
}

/// A compiled entry point.
#[derive(Clone)]
pub struct Pipeline {
    entry: String,
    /// `None` in the type layer.
    code: Option<Arc<Code>>,
}

struct Code {
    library: KernelLibrary,
    path: PathBuf,
}

impl std::fmt::Debug for Pipeline {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pipeline").field("entry", &self.entry).finish_non_exhaustive()
    }
}

impl Pipeline {
    /// Name of the entry point.
    #[must_use]
    pub fn entry(&self) -> &str {
        &self.entry
    }

    /// The most threads that a threadgroup of it may have.
    #[must_use]
    pub fn max_threads_per_threadgroup(&self) -> u32 {
        self.entry_point().map_or(crate::library::MAX_THREADS, |entry| entry.max_threads())
    }

    /// Threadgroup memory that it declares, in bytes.
    #[must_use]
    pub fn threadgroup_memory_bytes(&self) -> u64 {
        self.entry_point().map_or(0, |entry| entry.declared_threadgroup_bytes())
    }

    fn entry_point(&self) -> Option<EntryRef<'_>> {
        self.code.as_ref().and_then(|code| code.library.entry(&self.entry))
    }

    fn error(&self, reason: impl Into<String>) -> DeviceError {
        DeviceError::Dispatch { entry: self.entry.clone(), reason: reason.into() }
    }
}

/// A launch in threads, as `dispatchThreads` counts them: threadgroups at the edges may be smaller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launch {
    /// Threads along x, y and z.
    pub threads: [u32; 3],
    /// Threads of one threadgroup along x, y and z.
    pub group: [u32; 3],
    /// Bytes of `[[threadgroup(n)]]`, by n.
    pub threadgroup_lengths: Vec<u32>,
    /// Indices of buffers of which every byte must be written. Checked in the check layer.
    pub must_write: Vec<u32>,
}

impl From<Grid> for Launch {
    fn from(grid: Grid) -> Self {
        let threads = std::array::from_fn(|axis| grid.threadgroups[axis].saturating_mul(grid.group[axis]));
        Launch { threads, group: grid.group, ..Launch::default() }
    }
}

impl Launch {
    /// The same, where these buffers must be written in full.
    #[must_use]
    pub fn with_must_write(self, indices: &[u32]) -> Self {
        Launch { must_write: indices.to_vec(), ..self }
    }
}

impl Simulator {
    /// A simulator with these settings. Nothing is compiled or looked for yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Simulator { options, totals: Mutex::default() }
    }

    /// Its settings.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Sums over all dispatches since the last call: counts are added, memory and live fragments are the largest.
    pub fn take_totals(&self) -> Counters {
        std::mem::take(&mut self.totals.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs a kernel and reports what it did.
    ///
    /// # Errors
    /// [`DeviceError::Dispatch`] with the line of the text where a rule was broken.
    pub fn run(
        &self,
        pipeline: &Pipeline,
        arguments: &[Argument<'_, Buffer>],
        launch: &Launch,
    ) -> Result<Report, DeviceError> {
        let (Some(code), Some(entry)) = (&pipeline.code, pipeline.entry_point()) else {
            return Err(pipeline.error("the type layer compiles only; use the fast or the check layer"));
        };
        check_launch(pipeline, entry, launch)?;
        let bindings = Bindings::new(pipeline, entry, arguments, launch)?;
        let threads = launch.group.iter().product::<u32>() as usize;
        let outcome: Result<Result<_, Failure>, DeviceError> = with_stacks(threads, |stacks| {
            let _scope = FaultScope::enter(&stacks.range(), &code.library, self.options.time_limit)?;
            Ok(self.run_on(code, entry, &bindings, launch, stacks))
        })
        .flatten();
        bindings.restore()?;
        let (raw, bound) = outcome?.map_err(|failure| pipeline.error(failure.describe(code)))?;
        bindings.check_slack(pipeline)?;
        let report = report(&raw, &bound);
        check_written(pipeline, &report)?;
        check_registers(pipeline, entry, launch, &report)?;
        self.totals.lock().unwrap_or_else(PoisonError::into_inner).add(&report.counters);
        Ok(report)
    }

    fn run_on(
        &self,
        code: &Code,
        entry: EntryRef<'_>,
        bindings: &Bindings<'_>,
        launch: &Launch,
        stacks: &crate::stacks::Stacks,
    ) -> Result<(RawCounters, Vec<BoundBuffer>), Failure> {
        let mut bound = bindings.bound(launch);
        let mut error = [0 as c_char; ERROR_BYTES];
        let tensor_ops = self.options.tensor_ops;
        let (tensor_layout, tensor_layout_seed) = tensor_ops.raw_layout();
        let mut raw = RawLaunch {
            entry: entry.as_ptr(),
            buffers: bound.as_mut_ptr(),
            buffer_count: bound.len() as c_uint,
            threads: launch.threads,
            group: launch.group,
            threadgroup_lengths: launch.threadgroup_lengths.as_ptr(),
            threadgroup_length_count: launch.threadgroup_lengths.len() as c_uint,
            poison: c_uint::from(self.options.poison),
            seed: self.options.seed,
            tensor_layout,
            tensor_destination_accumulates: c_uint::from(tensor_ops.destination == MemoryDestination::Accumulated),
            tensor_zero_outside: c_uint::from(tensor_ops.outside == OutsideExtents::Zero),
            reserved: 0,
            tensor_layout_seed,
            stacks: stacks.start().cast(),
            stack_count: stacks.count() as u64,
            counters: RawCounters::default(),
            error: error.as_mut_ptr(),
            error_line: 0,
            error_pc: 0,
            error_near_line: 0,
        };
        // SAFETY: every pointer was made from a live value above; sizes of the buffers were compared with what the
        // parameters need, and the runtime stops a kernel that leaves them.
        let succeeded = unsafe { code.library.run(&mut raw) };
        if succeeded {
            return Ok((raw.counters, bound));
        }
        // SAFETY: the runtime ends its message with 0 inside of the array.
        let message = unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy().into_owned();
        Err(Failure { message, line: raw.error_line, pc: raw.error_pc, near_line: raw.error_near_line })
    }
}

impl Device for Simulator {
    type Buffer = Buffer;
    type Pipeline = Pipeline;

    fn pipeline(&self, source: &str, entry: &str) -> Result<Pipeline, DeviceError> {
        let Some(path) = compile(source, &self.options)? else {
            return Ok(Pipeline { entry: entry.to_owned(), code: None });
        };
        let library = KernelLibrary::load(&path)?;
        let refused = |reason: String| DeviceError::Pipeline { entry: entry.to_owned(), reason };
        let Some(found) = library.entry(entry) else {
            let names: Vec<&str> = library.entries().map(|entry| entry.name()).collect();
            return Err(refused(format!("the text has the kernels {}", names.join(", "))));
        };
        let bytes = found.declared_threadgroup_bytes();
        if bytes > THREADGROUP_MEMORY_LIMIT {
            return Err(refused(format!(
                "Threadgroup memory size ({bytes}) exceeds the maximum threadgroup memory allowed \
                 ({THREADGROUP_MEMORY_LIMIT})"
            )));
        }
        Ok(Pipeline { entry: entry.to_owned(), code: Some(Arc::new(Code { library, path })) })
    }

    fn dispatch(&self, pipeline: &Pipeline, arguments: &[Argument<'_, Buffer>], grid: Grid) -> Result<(), DeviceError> {
        self.run(pipeline, arguments, &grid.into()).map(|_| ())
    }
}

/// A rule that a kernel broke.
struct Failure {
    message: String,
    line: i32,
    pc: u64,
    near_line: i32,
}

impl Failure {
    fn describe(&self, code: &Code) -> String {
        let positive = |line: i32| u32::try_from(line).ok().filter(|&line| line > 0);
        let by_pc = || line_at(&code.path, self.pc).or(positive(self.near_line));
        let line = positive(self.line).or_else(|| if self.pc == 0 { None } else { by_pc() });
        match line {
            Some(line) => format!("{SOURCE_NAME}:{line}: {}", self.message),
            None => self.message.clone(),
        }
    }
}

fn check_launch(pipeline: &Pipeline, entry: EntryRef<'_>, launch: &Launch) -> Result<(), DeviceError> {
    let group: u64 = launch.group.iter().map(|&threads| u64::from(threads)).product();
    if group == 0 || launch.threads.contains(&0) {
        return Err(pipeline.error(format!("no threads: {:?} in groups of {:?}", launch.threads, launch.group)));
    }
    let limit = entry.max_threads();
    if group > u64::from(limit) {
        return Err(pipeline.error(format!("Threadgroup size ({group}) exceeds {limit} limit")));
    }
    let lengths: u64 = launch.threadgroup_lengths.iter().map(|&bytes| u64::from(bytes)).sum();
    let bytes = entry.declared_threadgroup_bytes() + lengths;
    if bytes > THREADGROUP_MEMORY_LIMIT {
        return Err(pipeline
            .error(format!("{bytes} bytes of threadgroup memory exceed the limit of {THREADGROUP_MEMORY_LIMIT}")));
    }
    Ok(())
}

fn report(raw: &RawCounters, bound: &[BoundBuffer]) -> Report {
    let buffers = bound
        .iter()
        .map(|buffer| BufferTraffic {
            index: buffer.index,
            read_bytes: buffer.read_bytes,
            written_bytes: buffer.written_bytes,
            unwritten_bytes: buffer.unwritten_bytes,
        })
        .collect();
    Report { counters: raw.into(), buffers }
}

fn check_written(pipeline: &Pipeline, report: &Report) -> Result<(), DeviceError> {
    match report.buffers.iter().find(|buffer| buffer.unwritten_bytes > 0) {
        Some(buffer) => {
            Err(pipeline
                .error(format!("{} bytes of buffer {} were never written", buffer.unwritten_bytes, buffer.index)))
        }
        None => Ok(()),
    }
}

/// A Mac refuses a threadgroup whose registers do not fit a core, unless the kernel said how many threads to expect:
/// then its compiler spills.
fn check_registers(
    pipeline: &Pipeline,
    entry: EntryRef<'_>,
    launch: &Launch,
    report: &Report,
) -> Result<(), DeviceError> {
    let group: u64 = launch.group.iter().map(|&threads| u64::from(threads)).product();
    let registers = report.counters.registers();
    if entry.declares_max_threads() || group <= registers.threads {
        return Ok(());
    }
    Err(pipeline.error(format!(
        "Threadgroup size ({group}) exceeds {} limit: about {} 16-bit registers a thread",
        registers.threads, registers.halves
    )))
}

/// What is bound to a parameter.
enum Memory<'a> {
    Tensor(&'a Buffer),
    Block(Buffer),
}

impl Memory<'_> {
    fn buffer(&self) -> &Buffer {
        match self {
            Memory::Tensor(buffer) => buffer,
            Memory::Block(buffer) => buffer,
        }
    }
}

struct Bindings<'a> {
    bound: Vec<(Parameter, Memory<'a>)>,
}

impl<'a> Bindings<'a> {
    fn new(
        pipeline: &Pipeline,
        entry: EntryRef<'_>,
        arguments: &[Argument<'a, Buffer>],
        launch: &Launch,
    ) -> Result<Self, DeviceError> {
        let mut bound = Vec::new();
        for parameter in entry.parameters() {
            let index = parameter.source.index as usize;
            if parameter.source.kind != SOURCE_BUFFER {
                check_threadgroup_argument(pipeline, parameter, launch)?;
                continue;
            }
            let Some(argument) = arguments.get(index) else {
                return Err(
                    pipeline.error(format!("[[buffer({index})]] is missing: {} arguments were given", arguments.len()))
                );
            };
            let memory = match argument {
                Argument::Buffer(buffer) => Memory::Tensor(buffer),
                Argument::Ints(values) => Memory::Block(Buffer::from_slice(values)?),
                Argument::Floats(values) => Memory::Block(Buffer::from_slice(values)?),
            };
            check_binding(pipeline, parameter, &memory)?;
            bound.push((*parameter, memory));
        }
        let bindings = Bindings { bound };
        bindings.protect()?;
        Ok(bindings)
    }

    /// Makes read-only what no parameter may write.
    fn protect(&self) -> Result<(), DeviceError> {
        for (_, memory) in &self.bound {
            let address = memory.buffer().address();
            let written = self
                .bound
                .iter()
                .any(|(parameter, other)| parameter.writable != 0 && other.buffer().address() == address);
            if !written {
                memory.buffer().set_read_only(true)?;
            }
        }
        Ok(())
    }

    fn restore(&self) -> Result<(), DeviceError> {
        self.bound.iter().try_for_each(|(_, memory)| memory.buffer().set_read_only(false))
    }

    fn check_slack(&self, pipeline: &Pipeline) -> Result<(), DeviceError> {
        match self
            .bound
            .iter()
            .find(|(parameter, memory)| parameter.writable != 0 && !memory.buffer().slack_is_intact())
        {
            Some((parameter, _)) => {
                Err(pipeline.error(format!("the kernel wrote just outside of buffer {}", parameter.source.index)))
            }
            None => Ok(()),
        }
    }

    fn bound(&self, launch: &Launch) -> Vec<BoundBuffer> {
        self.bound
            .iter()
            .map(|(parameter, memory)| BoundBuffer {
                address: memory.buffer().address().cast(),
                bytes: memory.buffer().bytes() as u64,
                index: parameter.source.index,
                constant_space: parameter.constant_space,
                writable: parameter.writable,
                element_bytes: parameter.element_bytes,
                read_bytes: 0,
                written_bytes: 0,
                unwritten_bytes: 0,
                count_unwritten: c_uint::from(launch.must_write.contains(&parameter.source.index)),
                reserved: 0,
            })
            .collect()
    }
}

fn check_threadgroup_argument(pipeline: &Pipeline, parameter: &Parameter, launch: &Launch) -> Result<(), DeviceError> {
    let index = parameter.source.index as usize;
    let length = launch.threadgroup_lengths.get(index).copied().unwrap_or(0);
    if parameter.source.kind != crate::library::SOURCE_THREADGROUP_MEMORY {
        return Ok(());
    }
    // Metal's setThreadgroupMemoryLength asks for a multiple of 16.
    if length == 0 || length % 16 != 0 {
        return Err(
            pipeline.error(format!("[[threadgroup({index})]] needs a length, a multiple of 16; it is {length}"))
        );
    }
    Ok(())
}

fn check_binding(pipeline: &Pipeline, parameter: &Parameter, memory: &Memory<'_>) -> Result<(), DeviceError> {
    let index = parameter.source.index;
    let writes = parameter.writable != 0;
    match memory {
        Memory::Block(_) if writes => {
            return Err(pipeline.error(format!("[[buffer({index})]] is a parameter block, which no kernel may write")));
        }
        Memory::Tensor(buffer) if writes && !buffer.is_writable() => {
            return Err(pipeline.error(format!("[[buffer({index})]] is written, and its memory is read-only")));
        }
        _ => {}
    }
    let (bytes, needed) = (memory.buffer().bytes() as u64, u64::from(parameter.minimum_bytes));
    if bytes < needed {
        return Err(pipeline.error(format!("[[buffer({index})]] holds {bytes} bytes, the parameter needs {needed}")));
    }
    Ok(())
}
