//! A compiled kernel library, and the structures of `include/msl/runtime.h`.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::ops::Range;
use std::path::Path;

use libloading::Library;
use mtlflashattn_metal::DeviceError;

/// Threads that a threadgroup may have.
pub const MAX_THREADS: u32 = 1024;
/// Bytes of a fiber's stack; stacks are aligned to it.
pub const STACK_BYTES: usize = 1 << 18;
/// Room for a message.
pub const ERROR_BYTES: usize = 2048;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Source {
    pub kind: c_uint,
    pub index: c_uint,
}

/// The kinds of sources that the driver fills.
pub const SOURCE_BUFFER: c_uint = 0;
pub const SOURCE_THREADGROUP_MEMORY: c_uint = 1;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Parameter {
    pub source: Source,
    pub constant_space: c_uint,
    pub writable: c_uint,
    pub element_bytes: c_uint,
    pub minimum_bytes: c_uint,
}

#[repr(C)]
pub struct Entry {
    name: *const c_char,
    call: *const c_void,
    parameters: *const Parameter,
    parameter_count: c_uint,
    max_threads: c_uint,
    array_slots: *const c_uint,
    array_slot_count: c_uint,
}

#[repr(C)]
pub struct BoundBuffer {
    pub address: *mut c_char,
    pub bytes: c_ulong,
    pub index: c_uint,
    pub constant_space: c_uint,
    pub writable: c_uint,
    pub element_bytes: c_uint,
    pub read_bytes: c_ulong,
    pub written_bytes: c_ulong,
    pub unwritten_bytes: c_ulong,
    pub count_unwritten: c_uint,
    pub reserved: c_uint,
}

#[repr(C)]
#[derive(Default)]
pub struct RawCounters {
    pub device_read_bytes: c_ulong,
    pub device_written_bytes: c_ulong,
    pub constant_read_bytes: c_ulong,
    pub threadgroup_read_bytes: c_ulong,
    pub threadgroup_written_bytes: c_ulong,
    pub matrix_multiplies: c_ulong,
    pub matrix_loads: c_ulong,
    pub matrix_stores: c_ulong,
    pub simd_operations: c_ulong,
    pub simdgroup_barriers: c_ulong,
    pub simdgroup_hints: c_ulong,
    pub threadgroup_barriers: c_ulong,
    pub threadgroup_hints: c_ulong,
    pub atomic_operations: c_ulong,
    pub same_value_races: c_ulong,
    pub threadgroups: c_ulong,
    pub threadgroup_memory_bytes: c_ulong,
    pub live_fragments_fp32: c_ulong,
    pub live_fragments_16bit: c_ulong,
    pub live_cooperative_halves: c_ulong,
    pub tensor_operations: c_ulong,
    pub tensor_multiply_adds: c_ulong,
}

#[repr(C)]
pub struct Launch {
    pub entry: *const Entry,
    pub buffers: *mut BoundBuffer,
    pub buffer_count: c_uint,
    pub threads: [c_uint; 3],
    pub group: [c_uint; 3],
    pub threadgroup_lengths: *const c_uint,
    pub threadgroup_length_count: c_uint,
    pub poison: c_uint,
    pub seed: c_ulong,
    pub tensor_layout: c_uint,
    pub tensor_destination_accumulates: c_uint,
    pub tensor_zero_outside: c_uint,
    pub reserved: c_uint,
    pub tensor_layout_seed: c_ulong,
    pub stacks: *mut c_char,
    pub stack_count: c_ulong,
    pub counters: RawCounters,
    pub error: *mut c_char,
    pub error_line: c_int,
    pub error_pc: c_ulong,
    pub error_near_line: c_int,
}

/// What the landing gets in place of an address when the time limit has passed.
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "timers interrupt kernels on Linux only"))]
pub const TIME_IS_UP: usize = 1;

/// The runtime's landing for a memory fault.
pub type FaultFunction = unsafe extern "C" fn(*mut c_char, usize) -> !;

/// A library and what it exports. Entries stay valid as long as it lives.
pub struct KernelLibrary {
    run: unsafe extern "C" fn(*mut Launch) -> c_int,
    declared_threadgroup_bytes: unsafe extern "C" fn(*const Entry) -> c_ulong,
    fault: FaultFunction,
    range: Range<usize>,
    entries: *const Entry,
    _library: Library,
}

// SAFETY: what the library exports is immutable after loading, and `msl_run` keeps its state to itself.
unsafe impl Send for KernelLibrary {}
// SAFETY: as above.
unsafe impl Sync for KernelLibrary {}

impl KernelLibrary {
    /// Loads what [`compile`](crate::compile) built.
    pub fn load(path: &Path) -> Result<Self, DeviceError> {
        let failed = |error: libloading::Error| DeviceError::Compile(format!("{}: {error}", path.display()));
        // SAFETY: the library was linked by this crate; its initialisers only note threadgroup arrays. The types of
        // the symbols are those of include/msl/runtime.h, which was compiled into it.
        unsafe {
            let library = Library::new(path).map_err(failed)?;
            let run = *library.get(b"msl_run\0").map_err(failed)?;
            let declared_threadgroup_bytes = *library.get(b"msl_declared_threadgroup_bytes\0").map_err(failed)?;
            let fault = *library.get(b"msl_fault\0").map_err(failed)?;
            let addresses: unsafe extern "C" fn(*mut usize, *mut usize) =
                *library.get(b"msl_library_range\0").map_err(failed)?;
            let mut range = 0..0;
            addresses(&raw mut range.start, &raw mut range.end);
            let entries = *library.get::<*const Entry>(b"msl_entries\0").map_err(failed)?;
            Ok(KernelLibrary { run, declared_threadgroup_bytes, fault, range, entries, _library: library })
        }
    }

    /// The entry point of this name.
    pub fn entry(&self, name: &str) -> Option<EntryRef<'_>> {
        self.entries().find(|entry| entry.name() == name)
    }

    /// All entry points.
    pub fn entries(&self) -> impl Iterator<Item = EntryRef<'_>> {
        (0..).map_while(|index| {
            // SAFETY: the table ends with an entry without a name, where the iteration stops, and lives as long as
            // the library.
            let entry = unsafe { &*self.entries.add(index) };
            (!entry.name.is_null()).then_some(EntryRef { entry, library: self })
        })
    }

    /// Where its code and data lie.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Where a fault inside of a fiber continues.
    pub fn fault_function(&self) -> FaultFunction {
        self.fault
    }

    /// Runs a dispatch; false if a rule was broken, with the message in the launch.
    ///
    /// # Safety
    /// The pointers of the launch are valid, and the buffers hold what the entry's parameters need.
    pub unsafe fn run(&self, launch: &mut Launch) -> bool {
        // SAFETY: the caller's promise.
        unsafe { (self.run)(launch) == 0 }
    }
}

/// An entry point of a library.
#[derive(Clone, Copy)]
pub struct EntryRef<'a> {
    entry: &'a Entry,
    library: &'a KernelLibrary,
}

impl<'a> EntryRef<'a> {
    /// The name that a pipeline asks for.
    pub fn name(&self) -> &'a str {
        // SAFETY: the name is a literal of the library.
        unsafe { CStr::from_ptr(self.entry.name) }.to_str().unwrap_or_default()
    }

    /// Its parameters in order.
    pub fn parameters(&self) -> &'a [Parameter] {
        // SAFETY: the table holds as many parameters as the count says.
        unsafe { std::slice::from_raw_parts(self.entry.parameters, self.entry.parameter_count as usize) }
    }

    /// `[[max_total_threads_per_threadgroup(n)]]`, or the most that Metal has.
    pub fn max_threads(&self) -> u32 {
        if self.entry.max_threads == 0 { MAX_THREADS } else { self.entry.max_threads.min(MAX_THREADS) }
    }

    /// Whether it says how many threads to expect.
    pub fn declares_max_threads(&self) -> bool {
        self.entry.max_threads != 0
    }

    /// Bytes of the threadgroup arrays that its body declares.
    pub fn declared_threadgroup_bytes(&self) -> u64 {
        // SAFETY: the entry belongs to this library.
        unsafe { (self.library.declared_threadgroup_bytes)(self.entry) }
    }

    /// For a launch.
    pub fn as_ptr(&self) -> *const Entry {
        self.entry
    }
}
