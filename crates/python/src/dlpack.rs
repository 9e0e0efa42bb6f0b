//! The part of `DLPack` that reads a tensor's pointer, shape and strides in one C call.
//!
//! Layouts follow `dlpack.h` 1.3; `torch.Tensor.__dlpack_c_exchange_api__` exists since torch 2.10.

use std::ffi::{c_int, c_void};

use pyo3::ffi::{PyErr_Clear, PyObject};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// The layout of `ExchangeApi` is fixed within this major version.
const MAJOR_VERSION: u32 = 1;

/// `kDLCPU`.
pub const DEVICE_CPU: i32 = 1;
/// `kDLMetal`, which torch uses for its `mps` device since 2.9.
pub const DEVICE_METAL: i32 = 8;

/// `kDLInt`, `kDLFloat`, `kDLBfloat`, `kDLBool` of `DLDataTypeCode`.
pub mod code {
    pub const INT: u8 = 0;
    pub const FLOAT: u8 = 2;
    pub const BFLOAT: u8 = 4;
    pub const BOOL: u8 = 6;
}

#[repr(C)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

/// `DLTensor`; what it points to stays valid until Python code runs again.
#[repr(C)]
pub struct DlTensor {
    pub data: *mut c_void,
    pub device_type: i32,
    pub device_id: i32,
    pub ndim: i32,
    pub dtype: DataType,
    pub shape: *const i64,
    pub strides: *const i64,
    pub byte_offset: u64,
}

impl DlTensor {
    const EMPTY: Self = Self {
        data: std::ptr::null_mut(),
        device_type: 0,
        device_id: 0,
        ndim: 0,
        dtype: DataType { code: 0, bits: 0, lanes: 0 },
        shape: std::ptr::null(),
        strides: std::ptr::null(),
        byte_offset: 0,
    };
}

type ReadTensor = unsafe extern "C" fn(*mut PyObject, *mut DlTensor) -> c_int;

#[repr(C)]
struct ExchangeApi {
    version: Version,
    previous: *const ExchangeApi,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object_no_sync: *const c_void,
    managed_tensor_to_py_object_no_sync: *const c_void,
    dltensor_from_py_object_no_sync: Option<ReadTensor>,
    current_work_stream: *const c_void,
}

/// The exchange function of one tensor type.
#[derive(Clone, Copy)]
pub struct Exchange(ReadTensor);

impl Exchange {
    /// Looks the function up on `tensor_type`; `None` where torch has no (compatible) one.
    pub fn of(tensor_type: &Bound<'_, PyAny>) -> Option<Self> {
        let attribute = tensor_type.getattr("__dlpack_c_exchange_api__").ok()?;
        let capsule = attribute.cast_into::<PyCapsule>().ok()?;
        let pointer = capsule.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
        let mut api = pointer.as_ptr().cast_const().cast::<ExchangeApi>();
        while !api.is_null() {
            // SAFETY: a capsule of this name holds an `ExchangeApi` that lives as long as the process. Version and
            // `previous` come first in every version; the rest is read only where the major version fixes it.
            unsafe {
                if (*api).version.major == MAJOR_VERSION {
                    return (*api).dltensor_from_py_object_no_sync.map(Self);
                }
                api = (*api).previous;
            }
        }
        None
    }

    /// Describes `tensor`, or says `None` where `DLPack` cannot (no storage, meta device, exotic dtype).
    ///
    /// # Safety
    /// `tensor` must be an instance of the type the function was found on.
    pub unsafe fn read(self, tensor: &Bound<'_, PyAny>) -> Option<DlTensor> {
        let mut description = DlTensor::EMPTY;
        // SAFETY: the caller vouches for the type; `description` is writable; the GIL is held through `tensor`.
        if unsafe { (self.0)(tensor.as_ptr(), &raw mut description) } == 0 {
            return Some(description);
        }
        // SAFETY: the GIL is held. The failure is answered by the caller's slow path, which finds the precise reason.
        unsafe { PyErr_Clear() };
        None
    }
}
