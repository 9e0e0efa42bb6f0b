//! An NVIDIA GPU as a device: kernels are translated to PTX, which the driver compiles.
//!
//! The driver's library is opened at run time; without it, or without a GPU, [`Gpu::open`] says so.

use std::ffi::{CStr, CString, c_char, c_float, c_int, c_uint, c_void};
use std::fmt;
use std::ptr::null_mut;
use std::sync::Arc;

use libloading::Library;
use mtlflashattn_metal::{Argument, Device, DeviceError, Grid};

use crate::buffer::Element;
use crate::ptx::{BUFFER_COUNT, FloatProducts, translate};

type Status = c_int;
type Handle = *mut c_void;

/// Declares the functions of the driver API that are used, under the names of its documentation.
macro_rules! driver {
    ($($name:ident = $symbol:literal ($($argument:ty),*);)*) => {
        #[allow(non_snake_case, reason = "names of the driver API")]
        struct Driver {
            $($name: unsafe extern "C" fn($($argument),*) -> Status,)*
            _library: Library,
        }

        impl Driver {
            fn load() -> Result<Self, libloading::Error> {
                // SAFETY: the library is NVIDIA's driver, whose functions have the documented types.
                unsafe {
                    let library = Library::new(if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" })?;
                    Ok(Self { $($name: *library.get($symbol)?,)* _library: library })
                }
            }
        }
    };
}

driver! {
    cuInit = b"cuInit\0" (c_uint);
    cuDriverGetVersion = b"cuDriverGetVersion\0" (*mut c_int);
    cuDeviceGetCount = b"cuDeviceGetCount\0" (*mut c_int);
    cuDeviceGet = b"cuDeviceGet\0" (*mut c_int, c_int);
    cuDeviceGetName = b"cuDeviceGetName\0" (*mut c_char, c_int, c_int);
    cuDevicePrimaryCtxRetain = b"cuDevicePrimaryCtxRetain\0" (*mut Handle, c_int);
    cuCtxSetCurrent = b"cuCtxSetCurrent\0" (Handle);
    cuCtxSynchronize = b"cuCtxSynchronize\0" ();
    cuModuleLoadData = b"cuModuleLoadData\0" (*mut Handle, *const c_void);
    cuModuleUnload = b"cuModuleUnload\0" (Handle);
    cuModuleGetFunction = b"cuModuleGetFunction\0" (*mut Handle, Handle, *const c_char);
    cuFuncGetAttribute = b"cuFuncGetAttribute\0" (*mut c_int, c_int, Handle);
    cuLaunchKernel = b"cuLaunchKernel\0" (Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    cuMemAlloc = b"cuMemAlloc_v2\0" (*mut u64, usize);
    cuMemFree = b"cuMemFree_v2\0" (u64);
    cuMemcpyHtoD = b"cuMemcpyHtoD_v2\0" (u64, *const c_void, usize);
    cuMemcpyDtoH = b"cuMemcpyDtoH_v2\0" (*mut c_void, u64, usize);
    cuMemcpyDtoD = b"cuMemcpyDtoD_v2\0" (u64, u64, usize);
    cuMemsetD8 = b"cuMemsetD8_v2\0" (u64, u8, usize);
    cuEventCreate = b"cuEventCreate\0" (*mut Handle, c_uint);
    cuEventRecord = b"cuEventRecord\0" (Handle, Handle);
    cuEventSynchronize = b"cuEventSynchronize\0" (Handle);
    cuEventElapsedTime = b"cuEventElapsedTime\0" (*mut c_float, Handle, Handle);
    cuEventDestroy = b"cuEventDestroy_v2\0" (Handle);
    cuGetErrorString = b"cuGetErrorString\0" (Status, *mut *const c_char);
}

/// `CU_FUNC_ATTRIBUTE_*`.
const SHARED_SIZE_BYTES: c_int = 1;
const LOCAL_SIZE_BYTES: c_int = 3;
const NUM_REGS: c_int = 4;

impl Driver {
    fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: the driver writes the address of a literal, or null for a number that it does not know.
        let text = unsafe {
            (self.cuGetErrorString)(status, &raw mut text);
            if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        Err(format!("{text} (CUDA error {status})"))
    }
}

/// The first NVIDIA GPU of this machine.
#[derive(Clone)]
pub struct Gpu {
    driver: Arc<Driver>,
    context: Context,
    name: String,
    float_products: FloatProducts,
}

#[derive(Clone, Copy)]
struct Context(Handle);

// SAFETY: the driver API may be called from any thread that made the context current; every call here does.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl fmt::Debug for Gpu {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Gpu").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Gpu {
    /// Opens the first GPU.
    ///
    /// # Errors
    /// A line that says what is missing.
    pub fn open(float_products: FloatProducts) -> Result<Self, String> {
        let driver = Driver::load().map_err(|error| format!("no NVIDIA driver: {error}"))?;
        let (mut count, mut device, mut version, mut context) = (0, 0, 0, null_mut());
        let mut name = [0_u8; 256];
        // SAFETY: every pointer is to a live variable of the documented type and size.
        unsafe {
            driver.check((driver.cuInit)(0)).map_err(|error| format!("no NVIDIA GPU: {error}"))?;
            driver.check((driver.cuDeviceGetCount)(&raw mut count))?;
            if count == 0 {
                return Err("no NVIDIA GPU".to_owned());
            }
            driver.check((driver.cuDriverGetVersion)(&raw mut version))?;
            driver.check((driver.cuDeviceGet)(&raw mut device, 0))?;
            driver.check((driver.cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as c_int, device))?;
            driver.check((driver.cuDevicePrimaryCtxRetain)(&raw mut context, device))?;
        }
        let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| "?".into(), CStr::to_string_lossy);
        let name = format!("{name}, CUDA {}.{}", version / 1000, version % 1000 / 10);
        Ok(Self { driver: Arc::new(driver), context: Context(context), name, float_products })
    }

    /// Name of the GPU and version of CUDA that its driver has.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn call(&self, status: impl FnOnce(&Driver) -> Status) -> Result<(), String> {
        // SAFETY: the context lives as long as the process.
        self.driver.check(unsafe { (self.driver.cuCtxSetCurrent)(self.context.0) })?;
        self.driver.check(status(&self.driver))
    }

    /// Memory with these values.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Memory, DeviceError> {
        let memory = self.allocate(size_of_val(values))?;
        // SAFETY: both sides have this many bytes.
        self.call(|driver| unsafe {
            (driver.cuMemcpyHtoD)(memory.0.address, values.as_ptr().cast(), size_of_val(values))
        })
        .map_err(DeviceError::Memory)?;
        Ok(memory)
    }

    /// Memory of so many bytes, all 0xff: NaN in every type of float.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn poisoned(&self, bytes: usize) -> Result<Memory, DeviceError> {
        let memory = self.allocate(bytes)?;
        memory.poison()?;
        Ok(memory)
    }

    /// Memory of so many bytes that holds `values` again and again.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn repeated<T: Element>(&self, values: &[T], bytes: usize) -> Result<Memory, DeviceError> {
        let (memory, once) = (self.allocate(bytes)?, self.upload(values)?);
        let len = size_of_val(values).max(1);
        for start in (0..bytes).step_by(len) {
            let (to, from) = (memory.0.address + start as u64, once.0.address);
            // SAFETY: both sides have as many bytes.
            self.call(|driver| unsafe { (driver.cuMemcpyDtoD)(to, from, len.min(bytes - start)) })
                .map_err(DeviceError::Memory)?;
        }
        // The copies are over before `once` is freed.
        self.synchronize().map_err(DeviceError::Memory)?;
        Ok(memory)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, DeviceError> {
        let mut address = 0;
        // SAFETY: the driver writes an address. It refuses to allocate nothing.
        self.call(|driver| unsafe { (driver.cuMemAlloc)(&raw mut address, bytes.max(1)) })
            .map_err(DeviceError::Memory)?;
        Ok(Memory(Arc::new(Allocation { gpu: self.clone(), address, bytes })))
    }

    /// Loads a PTX text and finds an entry point of it.
    ///
    /// # Errors
    /// [`DeviceError::Pipeline`].
    pub fn load(&self, ptx: &str, entry: &str) -> Result<Program, DeviceError> {
        let failed = |reason| DeviceError::Pipeline { entry: entry.to_owned(), reason };
        let text = CString::new(ptx).map_err(|error| failed(error.to_string()))?;
        let name = CString::new(entry).map_err(|error| failed(error.to_string()))?;
        let mut module = null_mut();
        // SAFETY: the text ends with a zero; the driver writes a handle.
        self.call(|driver| unsafe { (driver.cuModuleLoadData)(&raw mut module, text.as_ptr().cast()) })
            .map_err(failed)?;
        let mut program = Program { gpu: self.clone(), module, function: null_mut(), entry: entry.to_owned() };
        let function = &raw mut program.function;
        // SAFETY: the name ends with a zero; the driver writes a handle.
        self.call(|driver| unsafe { (driver.cuModuleGetFunction)(function, module, name.as_ptr()) }).map_err(failed)?;
        Ok(program)
    }

    /// Makes a launch that can be repeated. It keeps its buffers.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn prepare<'a>(
        &self,
        program: &'a Program,
        arguments: &[Argument<'_, Memory>],
        grid: Grid,
    ) -> Result<Launch<'a>, DeviceError> {
        let buffer = |argument: &Argument<'_, Memory>| match argument {
            Argument::Buffer(memory) => Ok((*memory).clone()),
            Argument::Ints(values) => self.upload(values),
            Argument::Floats(values) => self.upload(values),
        };
        let buffers = arguments.iter().map(buffer).collect::<Result<_, _>>()?;
        Ok(Launch { program, buffers, grid })
    }

    /// Waits for everything.
    ///
    /// # Errors
    /// What the driver says went wrong since the last call.
    pub fn synchronize(&self) -> Result<(), String> {
        // SAFETY: no arguments.
        self.call(|driver| unsafe { (driver.cuCtxSynchronize)() })
    }

    /// Milliseconds that the GPU takes for what `work` enqueues.
    ///
    /// # Errors
    /// Those of `work`, and what the driver says.
    pub fn time(&self, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<f32, DeviceError> {
        let failed = |reason| DeviceError::Dispatch { entry: "timer".to_owned(), reason };
        let mut events = [null_mut(); 2];
        for event in &mut events {
            let event: *mut Handle = event;
            // SAFETY: the driver writes a handle.
            self.call(|driver| unsafe { (driver.cuEventCreate)(event, 0) }).map_err(failed)?;
        }
        let mut milliseconds = 0.0;
        // SAFETY: the events are valid, and both were recorded when the time between them is asked for.
        let result = unsafe {
            self.call(|driver| (driver.cuEventRecord)(events[0], null_mut()))
                .map_err(failed)
                .and_then(|()| work())
                .and_then(|()| {
                    self.call(|driver| (driver.cuEventRecord)(events[1], null_mut())).map_err(failed)?;
                    self.call(|driver| (driver.cuEventSynchronize)(events[1])).map_err(failed)?;
                    self.call(|driver| (driver.cuEventElapsedTime)(&raw mut milliseconds, events[0], events[1]))
                        .map_err(failed)
                })
        };
        for event in events {
            // SAFETY: the event is not used any more.
            self.call(|driver| unsafe { (driver.cuEventDestroy)(event) }).map_err(failed)?;
        }
        result.map(|()| milliseconds)
    }
}

/// Memory of a GPU; a clone names the same.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Allocation>);

#[derive(Debug)]
struct Allocation {
    gpu: Gpu,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Copies the contents after everything dispatched before.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], also when a kernel dispatched before failed.
    pub fn download(&self) -> Result<Vec<u8>, DeviceError> {
        let Allocation { gpu, address, bytes } = &*self.0;
        let mut values = vec![0; *bytes];
        let target = values.as_mut_ptr().cast();
        // SAFETY: both sides have this many bytes.
        gpu.call(|driver| unsafe { (driver.cuMemcpyDtoH)(target, *address, *bytes) }).map_err(DeviceError::Memory)?;
        Ok(values)
    }

    /// Fills the memory with 0xff.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn poison(&self) -> Result<(), DeviceError> {
        let Allocation { gpu, address, bytes } = &*self.0;
        // SAFETY: the memory has this many bytes.
        gpu.call(|driver| unsafe { (driver.cuMemsetD8)(*address, 0xff, *bytes) }).map_err(DeviceError::Memory)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the driver waits for kernels that are running. An error has been reported by then.
        self.gpu.call(|driver| unsafe { (driver.cuMemFree)(self.address) }).ok();
    }
}

/// A compiled entry point.
#[derive(Debug)]
pub struct Program {
    gpu: Gpu,
    module: Handle,
    function: Handle,
    entry: String,
}

// SAFETY: modules and functions may be used from any thread that made their context current; every call here does.
unsafe impl Send for Program {}

impl Program {
    fn attribute(&self, attribute: c_int) -> Result<usize, String> {
        let mut value = 0;
        // SAFETY: the driver writes a number.
        self.gpu.call(|driver| unsafe { (driver.cuFuncGetAttribute)(&raw mut value, attribute, self.function) })?;
        Ok(value as usize)
    }

    /// 32-bit registers of a thread.
    ///
    /// # Errors
    /// What the driver says.
    pub fn registers(&self) -> Result<usize, String> {
        self.attribute(NUM_REGS)
    }

    /// Bytes of a thread's stack: arrays with run-time indices and spilled registers.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stack_bytes(&self) -> Result<usize, String> {
        self.attribute(LOCAL_SIZE_BYTES)
    }

    /// Threadgroup memory in bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn threadgroup_bytes(&self) -> Result<usize, String> {
        self.attribute(SHARED_SIZE_BYTES)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: nothing of the module is used any more once the GPU has finished.
        self.gpu
            .synchronize()
            .and_then(|()| self.gpu.call(|driver| unsafe { (driver.cuModuleUnload)(self.module) }))
            .ok();
    }
}

/// A kernel with its arguments, ready to be enqueued any number of times.
#[derive(Debug)]
pub struct Launch<'a> {
    program: &'a Program,
    buffers: Vec<Memory>,
    grid: Grid,
}

impl Launch<'_> {
    /// Enqueues the kernel once.
    ///
    /// # Errors
    /// [`DeviceError::Dispatch`].
    pub fn enqueue(&self) -> Result<(), DeviceError> {
        let ([x, y, z], [group_x, group_y, group_z]) = (self.grid.threadgroups, self.grid.group);
        let mut addresses = [0_u64; BUFFER_COUNT];
        for (address, buffer) in addresses.iter_mut().zip(&self.buffers) {
            *address = buffer.0.address;
        }
        let mut parameters: [*mut c_void; 1] = [addresses.as_mut_ptr().cast()];
        let parameters = parameters.as_mut_ptr();
        // SAFETY: the kernel takes one parameter, a table of this size, which the driver copies.
        self.program
            .gpu
            .call(|driver| unsafe {
                (driver.cuLaunchKernel)(
                    self.program.function,
                    x,
                    y,
                    z,
                    group_x,
                    group_y,
                    group_z,
                    0,
                    null_mut(),
                    parameters,
                    null_mut(),
                )
            })
            .map_err(|reason| DeviceError::Dispatch { entry: self.program.entry.clone(), reason })
    }
}

impl Device for Gpu {
    type Buffer = Memory;
    type Pipeline = Program;

    fn pipeline(&self, source: &str, entry: &str) -> Result<Program, DeviceError> {
        self.load(&translate(source, self.float_products)?, entry)
    }

    fn dispatch(&self, pipeline: &Program, arguments: &[Argument<'_, Memory>], grid: Grid) -> Result<(), DeviceError> {
        let failed = |reason| DeviceError::Dispatch { entry: pipeline.entry.clone(), reason };
        self.prepare(pipeline, arguments, grid)?.enqueue()?;
        self.synchronize().map_err(failed)
    }
}
