//! Gradients of random problems, by the kernels of the backward pass.

use mtlflashattn_core::plan::{BackwardPass, BackwardTile, QueryHome};
use mtlflashattn_core::reference::bounds::Bounds;
use mtlflashattn_core::reference::bounds::rounded_gradients::{GradientBounds, Upstream, gradient_bounds_of};
use mtlflashattn_core::reference::{Gradients, backward};
use mtlflashattn_core::{BiasKind, Dtype, Strides};
use mtlflashattn_metal::{BackwardKernel, BackwardLaunch, BackwardOutputs, BackwardTensors};
use mtlflashattn_simulator::{Buffer, Launch as Dispatch, Report};
use proptest::prelude::*;

use super::bench::Bench;
use super::variants::Variant;
use super::{Case, Random, Run, Tensor, decode, encode, extent, hole, positions, strides};

/// A gradient where a kernel writes it.
struct Result4 {
    name: &'static str,
    sizes: [usize; 4],
    strides: [i64; 4],
}

impl Result4 {
    fn new(name: &'static str, case: &Case, sizes: [usize; 4]) -> Self {
        Self { name, sizes, strides: strides(case.out_order, case.beside, sizes) }
    }

    fn of_problem(&self, packed: bool) -> Strides {
        let [batch, row, head, _] = self.strides;
        Strides { batch: if packed { 0 } else { batch }, row, head }
    }

    fn blank(&self, dtype: Dtype) -> Vec<u8> {
        hole(dtype).repeat(extent(self.sizes, self.strides))
    }

    /// The elements in the order of the reference.
    fn read(&self, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f64>, String> {
        let (size, hole) = (dtype.size(), hole(dtype));
        let mut rest = bytes.to_vec();
        let mut values = Vec::new();
        for at in positions(self.sizes, self.strides) {
            let range = at * size..(at + 1) * size;
            values.push(decode(dtype, &bytes[range.clone()]));
            rest[range].copy_from_slice(&hole);
        }
        match rest.chunks_exact(size).position(|bytes| bytes != hole) {
            Some(at) => Err(format!("element {at} of {} is outside the rows and was written", self.name)),
            None => Ok(values),
        }
    }
}

/// A problem with its data, the results of its forward pass, and their gradients.
pub struct BackwardRun {
    pub run: Run,
    pub d_out: Tensor,
    pub d_lse: Option<Vec<f32>>,
    out: Vec<u8>,
    lse: Vec<u8>,
    exact: Gradients,
    bounds: GradientBounds,
    results: [Result4; 3],
    outputs: BackwardOutputs,
}

impl BackwardRun {
    /// The results of the forward pass are the exact ones, rounded.
    pub fn new(case: &Case, lse_gradient: bool) -> Self {
        let run = Run::new(&Case { lse: true, ..case.clone() });
        let mut random = Random::new(case.seed ^ 0x5bd1_e995);
        let d_out = Tensor::new(case, run.out_sizes, || 2.0 * random.uniform());
        let forward = run.exact();
        let d_lse = lse_gradient.then(|| forward.lse.iter().map(|_| random.uniform() as f32).collect::<Vec<f32>>());
        let dtype = case.dtype;
        let mut out = hole(dtype).repeat(extent(run.out_sizes, run.out_strides));
        for (at, &value) in positions(run.out_sizes, run.out_strides).zip(&forward.out) {
            out[at * dtype.size()..][..dtype.size()].copy_from_slice(&encode(dtype, value).0);
        }
        let lse = forward.lse.iter().flat_map(|&lse| (lse as f32).to_ne_bytes()).collect();
        let exact_d_lse: Option<Vec<f64>> =
            d_lse.as_ref().map(|d_lse| d_lse.iter().map(|&value| f64::from(value)).collect());
        let upstream_forward = Bounds::of_rounding(&run.problem, &forward);
        let upstream = Upstream { d_out: &d_out.exact, d_lse: exact_d_lse.as_deref(), forward: &upstream_forward };
        let arithmetic = mtlflashattn_core::reference::bounds::Arithmetic::metal(dtype);
        let (exact, bounds) = run.with_inputs(|inputs| {
            (
                backward(&run.problem, inputs, upstream.d_out, upstream.d_lse),
                gradient_bounds_of(arithmetic, &run.problem, inputs, &upstream),
            )
        });
        let [outer, query_rows, query_heads, _] = run.out_sizes;
        let key_rows = if case.packed {
            case.lengths.iter().map(|lengths| lengths.1).sum::<usize>() + case.slack
        } else {
            case.lengths[0].1
        };
        let results = [
            ("dq", [outer, query_rows, query_heads, case.head_dim]),
            ("dk", [outer, key_rows, case.key_heads, case.head_dim]),
            ("dv", [outer, key_rows, case.key_heads, case.value_dim]),
        ]
        .map(|(name, sizes)| Result4::new(name, case, sizes));
        let [d_query, d_key, d_value] = [0, 1, 2].map(|i| results[i].of_problem(case.packed));
        let d_out_strides = strides(case.order, case.beside, run.out_sizes);
        let outputs = BackwardOutputs {
            out: run.outputs.out,
            d_out: Strides {
                batch: if case.packed { 0 } else { d_out_strides[0] },
                row: d_out_strides[1],
                head: d_out_strides[2],
            },
            d_query,
            d_key,
            d_value,
        };
        Self { run, d_out, d_lse, out, lse, exact, bounds, results, outputs }
    }

    pub fn outputs(&self) -> &BackwardOutputs {
        &self.outputs
    }

    /// Runs the texts that `edit` makes of those of `kernels`, one after the other.
    ///
    /// # Errors
    /// Whatever the compiler or the simulator found wrong.
    pub fn launch(
        &self,
        bench: &Bench,
        kernels: &[BackwardKernel],
        edit: &dyn Fn(&BackwardKernel) -> String,
    ) -> Result<(Gradients, Vec<Report>), String> {
        let dtype = self.run.problem.dtype;
        let forward = self.run.tensors();
        let buffer = |bytes: &Vec<u8>| Buffer::from_slice(bytes).expect("memory");
        let optional = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(buffer);
        let [q, k, v] = [&forward.q, &forward.k, &forward.v].map(buffer);
        let (alibi, bias) = (optional(&forward.alibi_slopes), optional(&forward.bias));
        let offsets = forward.offsets.as_ref().map(|(query, key)| (buffer(query), buffer(key)));
        let (out, lse, d_out) = (buffer(&self.out), buffer(&self.lse), buffer(&self.d_out.bytes));
        let d_lse =
            self.d_lse.as_ref().map(|d_lse| buffer(&d_lse.iter().flat_map(|value| value.to_ne_bytes()).collect()));
        let states = buffer(&hole(Dtype::F32).repeat(2 * self.lse.len() / 4));
        let gradients = [0, 1, 2].map(|i| buffer(&self.results[i].blank(dtype)));
        let tensors = BackwardTensors {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            lse: &lse,
            offsets: offsets.as_ref().map(|(query, key)| (query, key)),
            alibi_slopes: alibi.as_ref(),
            bias: bias.as_ref(),
            d_out: &d_out,
            d_lse: d_lse.as_ref(),
            states: &states,
            d_query: Some(&gradients[0]),
            d_key: Some(&gradients[1]),
            d_value: Some(&gradients[2]),
        };
        let mut reports = Vec::new();
        for kernel in kernels {
            let pipeline = bench.pipeline(&edit(kernel), kernel.entry()).map_err(|error| error.to_string())?;
            let launch = BackwardLaunch::new(&self.run.problem, kernel, &self.outputs).expect("a small problem");
            let mut report = Report::default();
            if !launch.is_empty() {
                let arguments = launch.arguments(&tensors);
                let dispatch = Dispatch::from(launch.grid);
                let run = bench.simulator().run(&pipeline, &arguments, &dispatch);
                report = run.map_err(|error| format!("{}: {error}", kernel.pass.name()))?;
            }
            reports.push(report);
        }
        let mut read = [0, 1, 2].map(|i| self.results[i].read(dtype, &gradients[i].read::<u8>())).into_iter();
        let mut next = || read.next().expect("three");
        Ok((Gradients { q: next()?, k: next()?, v: next()?, bias: None, sinks: None }, reports))
    }

    /// Compares gradients with the float64 reference. Rows that belong to no sequence must be untouched.
    ///
    /// # Errors
    /// The message names the first element out of bounds.
    pub fn check(&self, got: &Gradients) -> Result<(), String> {
        let (exact, bounds) = (&self.exact, &self.bounds);
        let ends = [&self.run.query_offsets, &self.run.key_offsets, &self.run.key_offsets];
        let gradients = [
            (&got.q, &exact.q, &bounds.q, ends[0]),
            (&got.k, &exact.k, &bounds.k, ends[1]),
            (&got.v, &exact.v, &bounds.v, ends[2]),
        ];
        for (result, (got, want, bound, ends)) in self.results.iter().zip(gradients) {
            let [_, _, heads, dim] = result.sizes;
            for (i, ((got, want), bound)) in got.iter().zip(want).zip(bound).enumerate() {
                let name = result.name;
                if ends.last().is_some_and(|&end| i / dim / heads >= end as usize) {
                    if !got.is_nan() {
                        return Err(format!("{name}[{i}] belongs to no sequence and is {got:e}"));
                    }
                } else if (got - want).abs() > *bound || got.is_nan() != want.is_nan() {
                    return Err(format!("{name}[{i}] is {got:e}, the reference {want:e}, bound {bound:e}"));
                }
            }
        }
        Ok(())
    }

    /// Largest errors in units of their bounds.
    pub fn worst(&self, got: &Gradients) -> [f64; 3] {
        self.bounds.worst(&self.exact, got)
    }
}

/// Variants of the kernels that together compute all gradients.
#[derive(Clone, Debug)]
pub struct BackwardVariant {
    pub name: &'static str,
    pub case: Case,
    pub tiles: Vec<(BackwardPass, BackwardTile)>,
    pub aligned: bool,
    pub lse_gradient: bool,
}

impl BackwardVariant {
    pub fn kernels(&self, run: &BackwardRun) -> Vec<BackwardKernel> {
        let kernel = |&(pass, tile): &(BackwardPass, BackwardTile)| {
            let kernel = BackwardKernel::new(pass, &run.run.problem, tile, self.lse_gradient);
            let kernel = if self.aligned { kernel.aligned(&run.run.problem, run.outputs(), [0; 5]) } else { kernel };
            assert!(kernel.fits() && kernel.features.aligned == self.aligned, "{}: {tile}", self.name);
            kernel
        };
        self.tiles.iter().map(kernel).collect()
    }

    /// Problems that this variant serves, with lengths up to `most`.
    pub fn cases(&self, most: usize) -> impl Strategy<Value = Case> + use<> {
        Variant { name: self.name, case: self.case.clone(), tile: None, aligned: false, matmul: None }.cases(most)
    }
}

/// 2 simdgroups a threadgroup, rows in registers, all columns.
const fn tile(row_fragments: usize, block: usize, chunk: usize) -> BackwardTile {
    BackwardTile { simdgroups: 2, row_fragments, block, staged: false, chunk, own: QueryHome::Registers }
}

const fn staged(tile: BackwardTile) -> BackwardTile {
    BackwardTile { staged: true, ..tile }
}

const fn parked(tile: BackwardTile) -> BackwardTile {
    BackwardTile { own: QueryHome::Threadgroup, ..tile }
}

const fn from_device(tile: BackwardTile) -> BackwardTile {
    BackwardTile { own: QueryHome::Device, ..tile }
}

fn dims(dtype: Dtype, head_dim: usize, value_dim: usize) -> Case {
    Case { dtype, head_dim, value_dim, ..Case::default() }
}

/// One kernel for dQ, and one for both gradients of keys.
fn fused(query: BackwardTile, keys: BackwardTile) -> Vec<(BackwardPass, BackwardTile)> {
    let delta = (BackwardPass::Delta, tile(1, 8, 8));
    vec![delta, (BackwardPass::Query, query), (BackwardPass::KeysAndValues, keys)]
}

/// One kernel for each gradient.
fn apart(query: BackwardTile, keys: BackwardTile, values: BackwardTile) -> Vec<(BackwardPass, BackwardTile)> {
    let delta = (BackwardPass::Delta, tile(1, 8, 8));
    vec![delta, (BackwardPass::Query, query), (BackwardPass::Values, values), (BackwardPass::Keys, keys)]
}

/// A window bound of the template that becomes a random one.
const RANDOM: i64 = i64::MAX;

/// Variants that have every feature, dtype, class of head dimension and form of tile.
#[allow(clippy::too_many_lines, reason = "a list")]
pub fn variants() -> Vec<BackwardVariant> {
    use Dtype::{Bf16, F16, F32};
    let additive = |dtype| Some(BiasKind::Additive(dtype));
    let list = [
        ("backward f32 16", dims(F32, 16, 16), fused(tile(1, 16, 16), tile(1, 16, 16)), false, false),
        (
            "backward f16 64 causal",
            Case { window: (-1, 0), ..dims(F16, 64, 64) },
            fused(tile(2, 16, 64), tile(1, 16, 64)),
            true,
            true,
        ),
        (
            "backward f16 64 staged causal",
            Case { window: (-1, 0), ..dims(F16, 64, 64) },
            fused(staged(tile(1, 32, 64)), staged(tile(2, 16, 64))),
            true,
            false,
        ),
        (
            "backward bf16 128 packed window",
            Case { window: (RANDOM, RANDOM), packed: true, dropout: 0.3, ..dims(Bf16, 128, 128) },
            fused(tile(1, 16, 128), parked(tile(1, 8, 128))),
            true,
            true,
        ),
        (
            "backward f32 32/48 softcap alibi",
            Case { softcap: 3.0, alibi: 1, window: (-1, RANDOM), ..dims(F32, 32, 48) },
            fused(tile(1, 32, 32), tile(1, 16, 48)),
            false,
            false,
        ),
        (
            "backward f16 72 boolean mask",
            Case {
                bias: Some(BiasKind::Boolean),
                window: (RANDOM, -1),
                sinks: true,
                dropout: 0.3,
                ..dims(F16, 72, 72)
            },
            fused(from_device(tile(1, 16, 72)), tile(1, 16, 72)),
            false,
            true,
        ),
        (
            "backward bf16 20/12 float bias",
            Case { bias: additive(F32), sinks: true, ..dims(Bf16, 20, 12) },
            fused(tile(2, 16, 24), from_device(tile(2, 8, 24))),
            true,
            false,
        ),
        (
            "backward f32 61 parked in chunks",
            Case { window: (-1, 0), dropout: 0.6, ..dims(F32, 61, 61) },
            apart(parked(tile(1, 8, 32)), parked(tile(1, 8, 24)), tile(1, 16, 40)),
            false,
            false,
        ),
        (
            "backward f16 256 staged in chunks",
            Case { window: (-1, 0), ..dims(F16, 256, 256) },
            apart(parked(tile(1, 16, 256)), staged(parked(tile(1, 8, 128))), staged(tile(1, 8, 128))),
            true,
            false,
        ),
        (
            "backward f16 40/24 everything packed",
            Case { packed: true, window: (RANDOM, RANDOM), softcap: 2.0, alibi: 2, sinks: true, ..dims(F16, 40, 24) },
            fused(staged(parked(tile(1, 16, 40))), staged(parked(tile(2, 16, 40)))),
            false,
            true,
        ),
        (
            "backward bf16 96 bias softcap window",
            Case { bias: additive(Bf16), softcap: 4.0, window: (RANDOM, RANDOM), ..dims(Bf16, 96, 96) },
            fused(tile(1, 32, 96), from_device(staged(tile(1, 16, 96)))),
            false,
            false,
        ),
        (
            "backward f16 1",
            Case { window: (RANDOM, RANDOM), ..dims(F16, 1, 1) },
            fused(tile(1, 8, 8), tile(1, 8, 8)),
            false,
            false,
        ),
        (
            "backward f32 44/28 staged in chunks",
            Case { window: (RANDOM, RANDOM), packed: true, dropout: 0.3, ..dims(F32, 44, 28) },
            apart(staged(tile(1, 16, 32)), staged(from_device(tile(1, 16, 40))), staged(tile(2, 16, 24))),
            true,
            true,
        ),
    ];
    let variant = |(name, case, tiles, aligned, lse_gradient)| BackwardVariant {
        name,
        case: Case { beside: if aligned { 4 } else { 5 }, ..case },
        tiles,
        aligned,
        lse_gradient,
    };
    list.into_iter().map(variant).collect()
}
