//! The simulator as a device for CPU tensors.

use mtlflashattn_metal::{Argument, Device, DeviceError, Grid, Kernel};
use pyo3::prelude::*;

use crate::kernels::Kernels;
use crate::metal::{Home, Operand};

pub struct Simulated<'py>(Python<'py>);

impl<'py> Simulated<'py> {
    pub fn new(py: Python<'py>) -> PyResult<Self> {
        Ok(Self(py))
    }
}

impl Device for Simulated<'_> {
    type Buffer = ();
    type Pipeline = ();

    fn pipeline(&self, _source: &str, _entry: &str) -> Result<(), DeviceError> {
        Err(DeviceError::Compile("no simulator".into()))
    }

    fn dispatch(&self, _: &(), _: &[Argument<'_, ()>], _: Grid) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl<'py> Home<'py> for Simulated<'py> {
    fn kernels() -> &'static Kernels<Kernel, ()> {
        static KERNELS: Kernels<Kernel, ()> = Kernels::new();
        &KERNELS
    }

    fn buffer(&self, _: &Operand<'py>) {}

    fn interruption(&self) -> Option<PyErr> {
        None
    }
}
