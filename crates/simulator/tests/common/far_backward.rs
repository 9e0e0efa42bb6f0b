//! The backward pass of the problem whose rows lie far apart.

use mtlflashattn_core::Dtype;
use mtlflashattn_core::plan::{BackwardPass, BackwardTile, QueryHome};
use mtlflashattn_core::reference::bounds::rounded_gradients::{Upstream, gradient_bounds_of};
use mtlflashattn_core::reference::bounds::{Arithmetic, Bounds};
use mtlflashattn_core::reference::{Gradients, ReferenceInputs, backward, forward};
use mtlflashattn_metal::{BackwardKernel, BackwardLaunch, BackwardOutputs, BackwardTensors};
use mtlflashattn_simulator::{Buffer, Launch as Dispatch};

use super::Random;
use super::bench::Bench;
use super::far::{BATCH, DIM, Far, HEADS, KEYS, QUERIES, View};

/// The problem with the tensors of its backward pass.
pub struct FarBackward {
    far: Far,
    d_out: View,
    exact_d_out: Vec<f64>,
    /// Of q, k and v.
    gradients: [View; 3],
}

impl FarBackward {
    pub fn new() -> Self {
        let giga = 1i64 << 30;
        let queries = [BATCH, QUERIES, HEADS, DIM];
        let keys = [BATCH, KEYS, HEADS, DIM];
        let d_out = View::new(queries, [11 * giga + 160, giga / 2 + 48, 5 * giga + 24, 1], 2);
        let exact_d_out = d_out.fill(&mut Random::new(11));
        let gradients = [
            View::new(queries, [12 * giga + 320, giga / 2 + 80, 6 * giga + 8, 1], 2),
            View::new(keys, [26 * giga + 160, giga / 4 + 96, 12 * giga + 40, 1], 2),
            View::new(keys, [28 * giga + 640, giga / 4 + 48, 13 * giga + 56, 1], 2),
        ];
        Self { far: Far::new(), d_out, exact_d_out, gradients }
    }

    /// Kernels for all gradients.
    pub fn kernels(&self, staged: bool) -> Vec<BackwardKernel> {
        let own = if staged { QueryHome::Device } else { QueryHome::Registers };
        let tile = |block| BackwardTile { simdgroups: 1, row_fragments: 1, block, staged, chunk: 16, own };
        // More than one block of keys, and of queries.
        [(BackwardPass::Delta, 8), (BackwardPass::Query, 16), (BackwardPass::KeysAndValues, 8)]
            .map(|(pass, block)| BackwardKernel::new(pass, &self.far.problem, tile(block), false))
            .into()
    }

    /// Runs the texts that `edit` makes of those of `kernels` and compares with the reference.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn judge(
        &self,
        bench: &Bench,
        kernels: &[BackwardKernel],
        edit: &dyn Fn(&BackwardKernel) -> String,
    ) -> Result<(), String> {
        let Self { far, d_out, exact_d_out, gradients } = self;
        let [q, k, v, bias] = &far.exact;
        let inputs = ReferenceInputs { q, k, v, bias: Some(bias), ..ReferenceInputs::default() };
        let results = forward(&far.problem, &inputs);
        far.out.store(&results.out);
        gradients.iter().for_each(View::clear);
        let lse: Vec<f32> = results.lse.iter().map(|&lse| lse as f32).collect();
        let lse = Buffer::from_slice(&lse).expect("memory");
        let states = Buffer::from_slice(&vec![f32::NAN; 2 * results.lse.len()]).expect("memory");
        let read = |view: &View| view.memory.buffer(false);
        let (q, k, v, bias) = (read(&far.q), read(&far.k), read(&far.v), read(&far.bias));
        let (out, d_out_buffer) = (read(&far.out), read(d_out));
        let written = gradients.each_ref().map(|view| view.memory.buffer(true));
        let tensors = BackwardTensors {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            lse: &lse,
            offsets: None,
            alibi_slopes: None,
            bias: Some(&bias),
            d_out: &d_out_buffer,
            d_lse: None,
            states: &states,
            d_query: Some(&written[0]),
            d_key: Some(&written[1]),
            d_value: Some(&written[2]),
        };
        let [d_query, d_key, d_value] = gradients.each_ref().map(View::strides);
        let outputs = BackwardOutputs { out: far.out.strides(), d_out: d_out.strides(), d_query, d_key, d_value };
        for kernel in kernels {
            let pipeline = bench.pipeline(&edit(kernel), kernel.entry()).map_err(|error| error.to_string())?;
            let launch = BackwardLaunch::new(&far.problem, kernel, &outputs).expect("a small problem");
            let run = bench.simulator().run(&pipeline, &launch.arguments(&tensors), &Dispatch::from(launch.grid));
            run.map_err(|error| format!("{}: {error}", kernel.pass.name()))?;
        }
        let rounding = Bounds::of_rounding(&far.problem, &results);
        let upstream = Upstream { d_out: exact_d_out, d_lse: None, forward: &rounding };
        let bounds = gradient_bounds_of(Arithmetic::metal(Dtype::F16), &far.problem, &inputs, &upstream);
        let exact = backward(&far.problem, &inputs, exact_d_out, None);
        let [q, k, v] = gradients.each_ref().map(View::values);
        let worst = bounds.worst(&exact, &Gradients { q, k, v, bias: None, sinks: None });
        if worst.iter().all(|&ratio| ratio <= 1.0) {
            return Ok(());
        }
        Err(format!("dq, dk, dv are {worst:?} times as far from the reference as allowed"))
    }
}
