//! Runs the attention kernels on this Mac's GPU, without torch, and compares them with attention in float64.
//!
//!     cargo run -p mtlflashattn-metal --example native
#![expect(clippy::print_stdout, reason = "an example talks to its user")]

#[cfg(not(target_vendor = "apple"))]
fn main() {
    println!("this example runs kernels on a Mac's GPU: start it on a Mac");
}

#[cfg(target_vendor = "apple")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use mtlflashattn_core::plan::{MetalTile, QueryHome};
    use mtlflashattn_metal::Kernel;
    use mtlflashattn_metal::native::NativeDevice;

    let Some(device) = NativeDevice::system_default() else {
        return Err("Metal offers no GPU to this process".into());
    };
    let case = attention::Case::new()?;
    println!("{}: {}", device.name(), attention::DESCRIPTION);
    println!("errors in units of their bounds, which are derived from float32 and these inputs: 1 is allowed");
    let direct = MetalTile {
        simdgroups: 4,
        row_fragments: 1,
        keys: 32,
        staged: false,
        value_chunk: 64,
        query: QueryHome::Registers,
    };
    let staged = MetalTile { staged: true, ..direct };
    let mut wrong = 0;
    for (name, kernel) in [
        ("scalar", Kernel::scalar(case.problem(), true)),
        ("simdgroup, direct", Kernel::simdgroup(case.problem(), direct, true)),
        ("simdgroup, staged", Kernel::simdgroup(case.problem(), staged, true)),
    ] {
        match case.worst_errors(&device, &kernel) {
            Ok((out, lse)) => {
                println!("{name:18} out {out:.3}  lse {lse:.3}");
                wrong += usize::from(out > 1.0 || lse > 1.0);
            }
            Err(error) => {
                println!("{name:18} {error}");
                wrong += 1;
            }
        }
    }
    if wrong == 0 { Ok(()) } else { Err(format!("{wrong} of 3 kernels failed").into()) }
}

/// One problem, its data, and what must come out.
#[cfg(target_vendor = "apple")]
mod attention {
    use std::error::Error;

    use mtlflashattn_core::reference::bounds::{Bounds, error_bounds};
    use mtlflashattn_core::reference::{Forward, ReferenceInputs, forward};
    use mtlflashattn_core::{Dtype, Options, Problem, Strides, TensorMeta};
    use mtlflashattn_metal::native::{Buffer, NativeDevice};
    use mtlflashattn_metal::{Device, Kernel, Launch, LseStrides, Outputs, Tensors};

    pub const DESCRIPTION: &str = "batch 2, 77 queries, 141 keys, 4 heads over 2 key heads, head dimension 64, causal";
    const BATCH: usize = 2;
    const QUERY_LEN: usize = 77;
    const KEY_LEN: usize = 141;
    const QUERY_HEADS: usize = 4;
    const KEY_HEADS: usize = 2;
    const HEAD_DIM: usize = 64;

    pub struct Case {
        problem: Problem,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        exact: Forward,
        bounds: Bounds,
    }

    impl Case {
        pub fn new() -> Result<Self, Box<dyn Error>> {
            let (q_shape, q_strides) = layout(QUERY_LEN, QUERY_HEADS);
            let (k_shape, k_strides) = layout(KEY_LEN, KEY_HEADS);
            let q = TensorMeta { dtype: Dtype::F32, shape: &q_shape, strides: &q_strides };
            let k = TensorMeta { dtype: Dtype::F32, shape: &k_shape, strides: &k_strides };
            let options = Options { causal: true, window: (-1, -1), ..Options::default() };
            let problem = Problem::dense(q, k, k, &options)?;

            let mut random = uniform(1);
            let mut values = |shape: [i64; 4]| -> Vec<f32> {
                random.by_ref().take(shape.iter().product::<i64>() as usize).collect()
            };
            let (q, k, v) = (values(q_shape), values(k_shape), values(k_shape));
            let [q64, k64, v64] = [&q, &k, &v].map(|values| values.iter().copied().map(f64::from).collect::<Vec<_>>());
            let inputs = ReferenceInputs { q: &q64, k: &k64, v: &v64, ..ReferenceInputs::default() };
            let (exact, bounds) = (forward(&problem, &inputs), error_bounds(&problem, &inputs));
            Ok(Self { problem, q, k, v, exact, bounds })
        }

        pub fn problem(&self) -> &Problem {
            &self.problem
        }

        /// Runs the kernel, and returns its largest errors in out and in the LSE, in units of their bounds.
        pub fn worst_errors(&self, device: &NativeDevice, kernel: &Kernel) -> Result<(f64, f64), Box<dyn Error>> {
            // What no kernel writes must not look right.
            let unwritten = |length| Buffer::from_slice(device, &vec![f32::NAN; length]);
            let [q, k, v] = [&self.q, &self.k, &self.v].map(|values| Buffer::from_slice(device, values));
            let (q, k, v) = (q?, k?, v?);
            let (out, lse) = (unwritten(self.exact.out.len())?, unwritten(self.exact.lse.len())?);
            let tensors = Tensors {
                q: &q,
                k: &k,
                v: &v,
                out: &out,
                lse: Some(&lse),
                offsets: None,
                alibi_slopes: None,
                bias: None,
                sinks: None,
            };
            let [batch, row, head, _] = layout(QUERY_LEN, QUERY_HEADS).1;
            let strides =
                Outputs { out: Strides { batch, row, head }, lse: Some(LseStrides::contiguous(&self.problem)) };
            let launch = Launch::new(&self.problem, kernel, &strides)?;
            let pipeline = device.pipeline(&kernel.source(), kernel.entry())?;
            device.dispatch(&pipeline, &launch.arguments(&tensors), launch.grid)?;
            let got = Forward { out: read(&out)?, lse: read(&lse)? };
            Ok(self.bounds.worst(&self.exact, &got))
        }
    }

    /// Shape and strides of a contiguous `[batch, len, heads, head_dim]`.
    fn layout(len: usize, heads: usize) -> ([i64; 4], [i64; 4]) {
        let shape = [BATCH, len, heads, HEAD_DIM].map(|size| size as i64);
        (shape, [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1])
    }

    /// Numbers in -1..1 (`SplitMix64`).
    fn uniform(seed: u64) -> impl Iterator<Item = f32> {
        let mut state = seed;
        std::iter::repeat_with(move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        })
    }

    fn read(buffer: &Buffer) -> Result<Vec<f64>, mtlflashattn_metal::DeviceError> {
        let mut values = vec![0.0_f32; buffer.len() / size_of::<f32>()];
        buffer.read_into(&mut values)?;
        Ok(values.into_iter().map(f64::from).collect())
    }
}
