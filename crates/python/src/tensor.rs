//! Reading torch tensors: shape, strides, dtype, device and pointer.

use mtlflashattn_core::{Dtype, TensorMeta};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyTuple};

use crate::dlpack::{self, DlTensor, Exchange};

/// Most dimensions of any argument: qkv has five.
pub const MAX_DIMS: usize = 5;

/// Element types that some argument takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    Float(Dtype),
    Int32,
    Bool,
    /// Any other; the tensor itself knows the name.
    Other,
}

impl Element {
    fn of_dlpack(dtype: dlpack::DataType) -> Self {
        if dtype.lanes != 1 {
            return Self::Other;
        }
        match (dtype.code, dtype.bits) {
            (dlpack::code::FLOAT, 32) => Self::Float(Dtype::F32),
            (dlpack::code::FLOAT, 16) => Self::Float(Dtype::F16),
            (dlpack::code::BFLOAT, 16) => Self::Float(Dtype::Bf16),
            (dlpack::code::INT, 32) => Self::Int32,
            (dlpack::code::BOOL, 8) => Self::Bool,
            _ => Self::Other,
        }
    }

    fn of_name(name: &str) -> Self {
        match name {
            "torch.float32" => Self::Float(Dtype::F32),
            "torch.float16" => Self::Float(Dtype::F16),
            "torch.bfloat16" => Self::Float(Dtype::Bf16),
            "torch.int32" => Self::Int32,
            "torch.bool" => Self::Bool,
            _ => Self::Other,
        }
    }

    pub const fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.size(),
            Self::Int32 => 4,
            Self::Bool | Self::Other => 1,
        }
    }
}

/// Where a tensor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    Cpu,
    /// An Apple GPU, as torch's `mps` device.
    Mps,
    Other,
}

impl Place {
    const fn of_dlpack(device_type: i32) -> Self {
        match device_type {
            dlpack::DEVICE_CPU => Self::Cpu,
            dlpack::DEVICE_METAL => Self::Mps,
            _ => Self::Other,
        }
    }

    /// Where `tensor` lives, by its attributes.
    pub fn of(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        if tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return Ok(Self::Cpu);
        }
        let is_mps = tensor.getattr(intern!(py, "is_mps"))?.is_truthy()?;
        Ok(if is_mps { Self::Mps } else { Self::Other })
    }
}

/// A tensor at the time of the call. Sizes 0 and 1 have stride 0 (whatever torch says there is never used),
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// First element; null when the memory is not CPU memory or was not asked for.
    pub data: *mut u8,
    pub element: Element,
    pub place: Place,
    rank: usize,
    shape: [i64; MAX_DIMS],
    strides: [i64; MAX_DIMS],
}

impl View {
    pub fn shape(&self) -> &[i64] {
        &self.shape[..self.rank]
    }

    pub fn strides(&self) -> &[i64] {
        &self.strides[..self.rank]
    }

    /// The shape with zeros behind it.
    pub const fn padded_shape(&self) -> [i64; MAX_DIMS] {
        self.shape
    }

    /// The same as the core describes it.
    pub fn meta(&self, dtype: Dtype) -> TensorMeta<'_> {
        TensorMeta { dtype, shape: self.shape(), strides: self.strides() }
    }

    /// The shape as Python writes a tuple, for messages.
    pub fn shape_text(&self) -> String {
        let sizes: Vec<String> = self.shape().iter().map(ToString::to_string).collect();
        format!("({})", sizes.join(", "))
    }

    pub fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }

    /// Whether neighbours along the last dimension lie side by side.
    pub fn has_contiguous_rows(&self) -> bool {
        let last = self.rank.wrapping_sub(1);
        self.rank == 0 || self.shape[last] <= 1 || self.strides[last] == 1
    }

    /// `tensor.is_contiguous()`.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.is_empty()
            || self.shape().iter().zip(self.strides()).rev().all(|(&size, &stride)| {
                let here = expected;
                expected *= size;
                size == 1 || stride == here
            })
    }

    /// The same, as `.contiguous()` would lay it out if rows are not contiguous.
    pub fn with_contiguous_rows(mut self) -> Self {
        if !self.has_contiguous_rows() {
            let mut stride = 1;
            for axis in (0..self.rank).rev() {
                self.strides[axis] = if self.shape[axis] > 1 { stride } else { 0 };
                stride = stride.saturating_mul(self.shape[axis].max(1));
            }
        }
        self
    }

    /// Bytes from the first element to the end of the last one; strides of torch are never negative.
    pub fn extent(&self) -> usize {
        if self.is_empty() {
            return 0;
        }
        let last: i64 = self.shape().iter().zip(self.strides()).map(|(size, stride)| (size - 1) * stride).sum();
        (last as usize + 1) * self.element.size()
    }

    /// Whether elements lie at multiples of their size, as typed loads require.
    pub fn is_aligned(&self) -> bool {
        self.data.addr().is_multiple_of(self.element.size())
    }

    /// The part at `index` of dimension `axis`, without that dimension. The axis must have more than `index` entries.
    pub fn select(&self, axis: usize, index: i64) -> Self {
        let mut part = *self;
        let skipped = index as isize * self.strides[axis] as isize * self.element.size() as isize;
        part.data = self.data.wrapping_offset(skipped);
        part.shape.copy_within(axis + 1.., axis);
        part.strides.copy_within(axis + 1.., axis);
        part.rank -= 1;
        part
    }

    /// The same with the second and the third of four dimensions in the other order.
    pub const fn with_middle_swapped(mut self) -> Self {
        if self.rank == 4 {
            self.shape.swap(1, 2);
            self.strides.swap(1, 2);
        }
        self
    }

    fn new(data: *mut u8, element: Element, place: Place, sizes: impl Iterator<Item = (i64, i64)>) -> Option<Self> {
        let mut view = Self { data, element, place, rank: 0, shape: [0; MAX_DIMS], strides: [0; MAX_DIMS] };
        for (size, stride) in sizes {
            *view.shape.get_mut(view.rank)? = size;
            view.strides[view.rank] = if size > 1 { stride } else { 0 };
            view.rank += 1;
        }
        Some(view)
    }

    fn of_dlpack(tensor: &DlTensor) -> Option<Self> {
        let rank = usize::try_from(tensor.ndim).ok()?;
        // Before DLPack 1.2 null strides meant a contiguous tensor; torch always fills them in.
        if rank > 0 && (tensor.shape.is_null() || tensor.strides.is_null()) {
            return None;
        }
        // SAFETY: shape and strides hold `ndim` entries each, and no Python code has run since they were handed over.
        let sizes = (0..rank).map(|axis| unsafe { (*tensor.shape.add(axis), *tensor.strides.add(axis)) });
        let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        Self::new(data, Element::of_dlpack(tensor.dtype), Place::of_dlpack(tensor.device_type), sizes)
    }

    /// Reads a tensor through the exchange function; `None` where that needs a closer look: neither CPU nor MPS, no
    /// memory behind it (functorch wrappers, freed storage).
    ///
    /// # Safety
    /// `tensor` must be an instance of the type that `exchange` was found on.
    pub unsafe fn read_exchange(exchange: Exchange, tensor: &Bound<'_, PyAny>) -> Option<Self> {
        // SAFETY: the caller's contract.
        Self::of_dlpack(unsafe { exchange.read(tensor) }.as_ref()?)?.with_memory()
    }

    /// Reads a tensor through its attributes, with the same `None` as [`Self::read_exchange`].
    pub fn read_attributes(tensor: &Bound<'_, PyAny>) -> Option<Self> {
        // What has no strides or no memory raises; the slow path knows what to say about it.
        let mut view = Self::describe(tensor).ok()??;
        let address: usize = tensor.call_method0(intern!(tensor.py(), "data_ptr")).ok()?.extract().ok()?;
        view.data = std::ptr::with_exposed_provenance_mut(address);
        view.with_memory()
    }

    /// The view, if it is one of memory that some engine reads directly.
    fn with_memory(mut self) -> Option<Self> {
        let has_memory = !self.data.is_null() || self.is_empty();
        match self.place {
            Place::Cpu => has_memory.then_some(self),
            Place::Mps => {
                // What torch calls the pointer of a view on MPS is an object's address plus an offset: it points nowhere.
                self.data = std::ptr::null_mut();
                has_memory.then_some(self)
            }
            Place::Other => None,
        }
    }

    /// Everything but the pointer, for tensors of any device; `None` when a size is symbolic or there are too many.
    pub fn describe(tensor: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let py = tensor.py();
        let shape = tensor.getattr(intern!(py, "shape"))?.cast_into::<PyTuple>()?;
        let strides = tensor.call_method0(intern!(py, "stride"))?.cast_into::<PyTuple>()?;
        let element = Element::of_name(&tensor.getattr(intern!(py, "dtype"))?.str()?.to_string_lossy());
        let place = Place::of(tensor)?;
        let mut sizes = Vec::with_capacity(shape.len());
        for (size, stride) in shape.iter().zip(strides.iter()) {
            // Converting a SymInt would make torch.compile specialise on it.
            let (Ok(size), Ok(stride)) = (size.cast_exact::<PyInt>(), stride.cast_exact::<PyInt>()) else {
                return Ok(None);
            };
            sizes.push((size.extract()?, stride.extract()?));
        }
        Ok(Self::new(std::ptr::null_mut(), element, place, sizes.into_iter()))
    }
}
