//! A small problem whose rows, heads and sequences lie billions of elements apart, in memory that exists only where it is
//! touched.

use half::f16;
use mtlflashattn_core::plan::{Matmul, Operands, QueryHome, Weights};
use mtlflashattn_core::reference::bounds::error_bounds_of;
use mtlflashattn_core::reference::{Forward, ReferenceInputs, forward as reference};
use mtlflashattn_core::{BiasKind, Dtype, MetalTile, Options, Problem, Strides, TensorMeta};
use mtlflashattn_metal::{Kernel, Launch, LseStrides, Outputs, Tensors};
use mtlflashattn_simulator::{Buffer, Launch as Dispatch};

use super::Random;
use super::bench::Bench;

/// Address space without memory.
pub(super) struct Sparse {
    start: *mut u8,
    bytes: usize,
}

impl Sparse {
    fn new(bytes: usize) -> Self {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: asks for fresh pages.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        assert!(start != libc::MAP_FAILED, "{bytes} bytes of address space");
        Self { start: start.cast(), bytes }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }

    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= self.bytes);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(at).cast::<[u8; N]>().read_unaligned() }
    }

    pub(super) fn buffer(&self, writable: bool) -> Buffer {
        // SAFETY: the mapping outlives the launch, and nobody else uses it meanwhile.
        unsafe { Buffer::from_raw(self.start, self.bytes, writable) }
    }
}

impl Drop for Sparse {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

/// A tensor of four dimensions in sparse memory.
pub(super) struct View {
    pub(super) memory: Sparse,
    shape: [i64; 4],
    strides: [i64; 4],
    size: usize,
}

impl View {
    pub(super) fn new(shape: [i64; 4], strides: [i64; 4], size: usize) -> Self {
        let last: i64 = shape.iter().zip(strides).map(|(size, stride)| (size - 1) * stride).sum();
        assert!(last > 1 << 32, "farther than 32 bits count");
        Self { memory: Sparse::new((last as usize + 1) * size), shape, strides, size }
    }

    /// Byte offset of each element, in order.
    fn places(&self) -> impl Iterator<Item = usize> + use<> {
        let ([a, b, c, d], strides, size) = (self.shape, self.strides, self.size);
        (0..a * b * c * d).map(move |i| {
            let index = [i / d / c / b, i / d / c % b, i / d % c, i % d];
            index.iter().zip(strides).map(|(index, stride)| index * stride).sum::<i64>() as usize * size
        })
    }

    /// Fills it with random numbers and returns them.
    pub(super) fn fill(&self, random: &mut Random) -> Vec<f64> {
        let fill = |place| {
            let value = 2.0 * random.uniform();
            if self.size == 2 {
                self.memory.write(place, &f16::from_f64(value).to_ne_bytes());
                f16::from_f64(value).to_f64()
            } else {
                self.memory.write(place, &(value as f32).to_ne_bytes());
                f64::from(value as f32)
            }
        };
        self.places().map(fill).collect()
    }

    /// Puts numbers into it, rounded.
    pub(super) fn store(&self, values: &[f64]) {
        self.places()
            .zip(values)
            .for_each(|(place, &value)| self.memory.write(place, &f16::from_f64(value).to_ne_bytes()));
    }

    pub(super) fn clear(&self) {
        self.places().for_each(|place| self.memory.write(place, &[0xff; 4][..self.size]));
    }

    pub(super) fn values(&self) -> Vec<f64> {
        let value = |place| match self.size {
            2 => f16::from_ne_bytes(self.memory.read(place)).to_f64(),
            _ => f64::from(f32::from_ne_bytes(self.memory.read(place))),
        };
        self.places().map(value).collect()
    }

    fn meta(&self) -> TensorMeta<'_> {
        TensorMeta { dtype: Dtype::F16, shape: &self.shape, strides: &self.strides }
    }

    pub(super) fn strides(&self) -> Strides {
        let [batch, row, head, _] = self.strides;
        Strides { batch, row, head }
    }
}

pub(super) const BATCH: i64 = 2;
pub(super) const HEADS: i64 = 2;
pub(super) const QUERIES: i64 = 9;
/// Two blocks of 16 and most of a third.
pub(super) const KEYS: i64 = 47;
pub(super) const DIM: i64 = 16;

/// The problem with its data.
pub struct Far {
    pub(super) problem: Problem,
    outputs: Outputs,
    pub(super) q: View,
    pub(super) k: View,
    pub(super) v: View,
    pub(super) bias: View,
    pub(super) out: View,
    lse: View,
    pub(super) exact: [Vec<f64>; 4],
}

/// Kernels that read keys from device memory, stage them, or know nothing of tiles; `matmul2d` that reads keys itself, has
/// them loaded by lanes or staged.
#[derive(Clone, Copy, Debug)]
pub enum Form {
    Direct,
    Staged,
    Scalar,
    Tensor,
    TensorLoaded,
    TensorStaged,
}

impl Far {
    pub fn new() -> Self {
        let giga = 1i64 << 30;
        // Steps along each dimension are beyond 32 bits by themselves or together, and their low halves differ.
        let q = View::new([BATCH, QUERIES, HEADS, DIM], [9 * giga + 640, giga / 2 + 64, 5 * giga + 8, 1], 2);
        let k = View::new([BATCH, KEYS, HEADS, DIM], [27 * giga + 640, giga / 4 + 64, 13 * giga + 16, 1], 2);
        let v = View::new([BATCH, KEYS, HEADS, DIM], [29 * giga + 320, giga / 4 + 32, 14 * giga + 24, 1], 2);
        let out = View::new([BATCH, QUERIES, HEADS, DIM], [10 * giga + 64, giga / 2 + 96, 5 * giga + 40, 1], 2);
        let bias = View::new([BATCH, HEADS, QUERIES, KEYS], [20 * giga + 9, 10 * giga + 5, giga + 3, giga / 8 + 1], 4);
        let lse = View::new([BATCH, HEADS, QUERIES, 1], [10 * giga + 32, 5 * giga + 16, 1, 1], 4);
        let mut random = Random::new(7);
        let exact = [&q, &k, &v, &bias].map(|view| view.fill(&mut random));
        let options = Options {
            window: (-1, -1),
            bias: Some((BiasKind::Additive(Dtype::F32), &bias.shape, &bias.strides)),
            ..Options::default()
        };
        let problem = Problem::dense(q.meta(), k.meta(), v.meta(), &options).expect("a valid problem");
        let lse_strides = LseStrides { batch: lse.strides[0], head: lse.strides[1] };
        let outputs = Outputs { out: out.strides(), lse: Some(lse_strides) };
        Self { problem, outputs, q, k, v, bias, out, lse, exact }
    }

    pub fn kernel(&self, form: Form) -> Kernel {
        let staged = matches!(form, Form::Staged | Form::TensorStaged);
        let tile = MetalTile {
            simdgroups: 1,
            row_fragments: 1,
            keys: 16,
            staged,
            value_chunk: 16,
            query: QueryHome::Registers,
        };
        let operands = if matches!(form, Form::TensorLoaded) { Operands::Registers } else { Operands::Memory };
        let matmul = Matmul {
            head_step: 16,
            value_step: 16,
            operands,
            weights: Weights::Registers,
            relaxed: true,
            keep_step: false,
        };
        match form {
            Form::Scalar => Kernel::scalar(&self.problem, true),
            Form::Tensor | Form::TensorLoaded | Form::TensorStaged => {
                Kernel::tensorops(&self.problem, MetalTile { row_fragments: 2, ..tile }, matmul, true)
            }
            _ => Kernel::simdgroup(&self.problem, tile, true),
        }
    }

    /// Runs a text of `kernel` and compares with the reference.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn judge(&self, bench: &Bench, kernel: &Kernel, source: &str) -> Result<(), String> {
        let pipeline = bench.pipeline(source, kernel.entry()).map_err(|error| error.to_string())?;
        self.out.clear();
        self.lse.clear();
        let [q, k, v, bias] = [&self.q, &self.k, &self.v, &self.bias].map(|view| view.memory.buffer(false));
        let [out, lse] = [&self.out, &self.lse].map(|view| view.memory.buffer(true));
        let tensors = Tensors {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            lse: Some(&lse),
            offsets: None,
            alibi_slopes: None,
            bias: Some(&bias),
            sinks: None,
        };
        let launch = Launch::new(&self.problem, kernel, &self.outputs).expect("a small problem");
        let dispatch = Dispatch::from(launch.grid);
        bench.simulator().run(&pipeline, &launch.arguments(&tensors), &dispatch).map_err(|error| error.to_string())?;
        let [q, k, v, bias] = &self.exact;
        let inputs = ReferenceInputs { q, k, v, bias: Some(bias), ..ReferenceInputs::default() };
        let exact = reference(&self.problem, &inputs);
        let bounds = error_bounds_of(kernel.arithmetic(), &self.problem, &inputs);
        let got = Forward { out: self.out.values(), lse: self.lse.values() };
        let (out, lse) = bounds.worst(&exact, &got);
        if out <= 1.0 && lse <= 1.0 {
            return Ok(());
        }
        Err(format!("out is {out} and lse {lse} times as far from the reference as allowed"))
    }
}
