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
    use mtlflashattn_core::plan::{Device, Planner};
    use mtlflashattn_core::{Settings, Tier};
    use mtlflashattn_metal::Kernel;
    use mtlflashattn_metal::native::NativeDevice;

    let Some(device) = NativeDevice::system_default() else {
        return Err("Metal offers no GPU to this process".into());
    };
    let gpu = device.gpu();
    let settings = Settings::DEFAULT;
    let planner = Planner::new(Device::Metal(gpu), &settings);
    println!("{}, macOS {}: {}", device.name(), gpu.macos, attention::DESCRIPTION);
    println!("errors are in units of their bounds, which are derived from float32 and these inputs: 1 is allowed");
    let mut failed = 0;
    for head_dim in [40, 64, 128] {
        let case = attention::Case::new(head_dim)?;
        let tile = planner.plan(case.problem())?.metal.ok_or("the planner chose no simdgroup tile")?;
        for kernel in [Kernel::scalar(case.problem(), true), Kernel::simdgroup(case.problem(), tile, true)] {
            let tile = if kernel.tier == Tier::Simdgroup { format!(", {tile}") } else { String::new() };
            print!("head dimension {head_dim}, {}{tile}: ", kernel.tier);
            match case.worst_errors(&device, &kernel) {
                Ok((out, lse)) => {
                    println!("out {out:.3}, lse {lse:.3}");
                    failed += u32::from(out > 1.0 || lse > 1.0);
                }
                Err(error) => {
                    println!("{error}");
                    failed += 1;
                }
            }
        }
    }
    if failed == 0 { Ok(()) } else { Err(format!("{failed} of 6 kernels failed").into()) }
}

/// One problem, its data, and what must come out.
#[cfg(target_vendor = "apple")]
mod attention {
    use std::error::Error;

    use mtlflashattn_core::reference::bounds::error_bounds_of;
    use mtlflashattn_core::reference::{Forward, ReferenceInputs, forward};
    use mtlflashattn_core::{Dtype, Options, Problem, TensorMeta};
    use mtlflashattn_metal::native::{Buffer, NativeDevice};
    use mtlflashattn_metal::{Device, DeviceError, Kernel, Launch, LseStrides, Outputs, Tensors};

    pub const DESCRIPTION: &str = "batch 2, 77 queries, 141 keys, 4 heads over 2 key heads, float32, causal";
    const BATCH: usize = 2;
    const QUERY_LEN: usize = 77;
    const KEY_LEN: usize = 141;
    const QUERY_HEADS: usize = 4;
    const KEY_HEADS: usize = 2;

    pub struct Case {
        problem: Problem,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
    }

    impl Case {
        pub fn new(head_dim: usize) -> Result<Self, Box<dyn Error>> {
            let (q_shape, q_strides) = layout(QUERY_LEN, QUERY_HEADS, head_dim);
            let (k_shape, k_strides) = layout(KEY_LEN, KEY_HEADS, head_dim);
            let q = TensorMeta { dtype: Dtype::F32, shape: &q_shape, strides: &q_strides };
            let k = TensorMeta { dtype: Dtype::F32, shape: &k_shape, strides: &k_strides };
            let options = Options { causal: true, window: (-1, -1), ..Options::default() };
            let problem = Problem::dense(q, k, k, &options)?;

            let mut random = uniform(1);
            let mut values = |shape: [i64; 4]| -> Vec<f32> {
                random.by_ref().take(shape.iter().product::<i64>() as usize).collect()
            };
            Ok(Self { problem, q: values(q_shape), k: values(k_shape), v: values(k_shape) })
        }

        pub fn problem(&self) -> &Problem {
            &self.problem
        }

        /// Runs the kernel, and returns its largest errors in out and in the LSE, in units of their bounds.
        pub fn worst_errors(&self, device: &NativeDevice, kernel: &Kernel) -> Result<(f64, f64), Box<dyn Error>> {
            let [q, k, v] = [&self.q, &self.k, &self.v].map(|values| wide(values));
            let inputs = ReferenceInputs { q: &q, k: &k, v: &v, ..ReferenceInputs::default() };
            let exact = forward(&self.problem, &inputs);
            let bounds = error_bounds_of(kernel.arithmetic(), &self.problem, &inputs);

            // What no kernel writes must not look right.
            let unwritten = |length| Buffer::from_slice(device, &vec![f32::NAN; length]);
            let [q, k, v] = [&self.q, &self.k, &self.v].map(|values| Buffer::from_slice(device, values));
            let (q, k, v) = (q?, k?, v?);
            let (out, lse) = (unwritten(exact.out.len())?, unwritten(exact.lse.len())?);
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
            // The output has the shape of q.
            let lse_strides = LseStrides::contiguous(&self.problem);
            let strides = Outputs { out: self.problem.q, lse: Some(lse_strides) };
            let launch = Launch::new(&self.problem, kernel, &strides)?;
            let pipeline = device.pipeline(&kernel.source(), kernel.entry())?;
            device.dispatch(&pipeline, &launch.arguments(&tensors), launch.grid)?;
            let got = Forward { out: read(&out)?, lse: read(&lse)? };
            Ok(bounds.worst(&exact, &got))
        }
    }

    /// Shape and strides of a contiguous `[batch, len, heads, head_dim]`.
    fn layout(len: usize, heads: usize, head_dim: usize) -> ([i64; 4], [i64; 4]) {
        let shape = [BATCH, len, heads, head_dim].map(|size| size as i64);
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

    fn read(buffer: &Buffer) -> Result<Vec<f64>, DeviceError> {
        let mut values = vec![0.0_f32; buffer.len() / size_of::<f32>()];
        buffer.read_into(&mut values)?;
        Ok(wide(&values))
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().copied().map(f64::from).collect()
    }
}
