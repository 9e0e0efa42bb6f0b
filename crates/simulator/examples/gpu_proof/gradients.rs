//! The backward pass against float64, on queries and keys picked at random, and repeat launches against the first ones.

use mtlflashattn_core::plan::{BackwardPass, BackwardTile, Chip, Gpu as Machine, Wanted as Gradients, backward_passes};
use mtlflashattn_core::reference::bounds::rounded_gradients::{
    KeyGradients, QueryGradient, Upstream, key_gradients_of, query_gradient_of,
};
use mtlflashattn_core::reference::bounds::{Arithmetic, Bounds};
use mtlflashattn_core::reference::{Forward, ReferenceInputs, forward_part};
use mtlflashattn_core::{Dtype, Problem};
use mtlflashattn_metal::{BackwardKernel, BackwardLaunch, BackwardOutputs, BackwardTensors, DeviceError};
use mtlflashattn_simulator::nvidia::{Gpu, Memory, Program};

use crate::Wanted;
use crate::numerics::{Case, Data, case};
use crate::parallel::in_parallel;
use crate::programs::{self, Programs};
use crate::random::{Normals, Random, decode, encode};

/// Problems far beyond what a simulator can run.
pub fn large_cases() -> Vec<Case> {
    let large = |case: Case| Case { samples: 24, repeats: 2, ..case };
    let mut cases = Vec::new();
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        cases.push(large(Case { causal: true, group: 2, ..case(dtype, &[(8192, 8192)], 64) }));
    }
    for dtype in [Dtype::F16, Dtype::F32] {
        cases.push(large(case(dtype, &[(4097, 8191)], 128)));
    }
    cases.push(large(Case { window: (1000, 24), ..case(Dtype::F16, &[(8192, 8192)], 128) }));
    cases.push(large(Case { causal: true, ..case(Dtype::F16, &[(4096, 4096)], 256) }));
    cases.push(large(Case { softcap: 5.0, ..case(Dtype::Bf16, &[(2048, 2048)], 80) }));
    let ragged = [(1, 1), (700, 700), (0, 5), (4097, 4097), (33, 1025), (5, 0), (2500, 1200)];
    cases.push(large(Case { causal: true, key_heads: 2, group: 3, ..case(Dtype::F16, &ragged, 64) }));
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        cases.push(large(Case { dropout: 0.1, causal: true, ..case(dtype, &[(8192, 8192)], 64) }));
    }
    cases.push(large(Case { dropout: 0.5, group: 2, ..case(Dtype::F16, &[(4097, 8191)], 128) }));
    cases.push(large(Case { dropout: 0.25, causal: true, key_heads: 2, ..case(Dtype::F16, &ragged, 64) }));
    cases
}

/// Problems that end soon under a tool that watches every access.
pub fn small_cases() -> Vec<Case> {
    let small = |case: Case| Case { samples: 16, repeats: 1, ..case };
    let mut cases = Vec::new();
    for dtype in [Dtype::F16, Dtype::F32] {
        cases.push(small(Case { causal: true, group: 2, ..case(dtype, &[(133, 261)], 64) }));
        cases.push(small(case(dtype, &[(150, 99)], 128)));
    }
    cases.push(small(case(Dtype::F16, &[(70, 133)], 256)));
    for dtype in [Dtype::F16, Dtype::F32] {
        cases.push(small(Case { dropout: 0.3, causal: true, group: 2, ..case(dtype, &[(133, 261)], 64) }));
    }
    cases.push(small(Case { window: (40, 3), ..case(Dtype::Bf16, &[(1, 1), (0, 3), (5, 0), (90, 120)], 72) }));
    cases
}

/// The kernels that the planner chooses for a chip.
pub struct Kernels {
    pub chip: &'static str,
    pub kernels: Vec<BackwardKernel>,
}

/// Chips of the two kinds: blocks in threadgroup memory, and blocks in device memory.
pub const CHIPS: [&str; 2] = ["M1", "M3"];

/// The tiles that the planner chooses for a chip.
pub fn planned(problem: &Problem, chip: &str) -> Vec<(BackwardPass, BackwardTile)> {
    let chip = Chip::from_name(chip);
    let machine = Machine { chip, cores: chip.most_cores(), ..Machine::SIMULATED };
    backward_passes(problem, &machine, Gradients::INPUTS).expect("tiles for head dimensions up to 256")
}

/// Where gradients lie: as what they are gradients of.
pub const fn outputs(problem: &Problem) -> BackwardOutputs {
    BackwardOutputs { out: problem.q, d_out: problem.q, d_query: problem.q, d_key: problem.k, d_value: problem.v }
}

/// A kernel as a program.
pub fn program(kernel: &BackwardKernel) -> programs::Kernel {
    programs::Kernel { source: kernel.source(), entry: kernel.entry() }
}

/// A case with its kernels: the planner's. Causal problems take the kernels for tensors that may lie anywhere, so that both
/// forms run.
struct Run<'a> {
    case: &'a Case,
    problem: Problem,
    sets: Vec<Kernels>,
}

impl<'a> Run<'a> {
    fn new(case: &'a Case, wanted: &Wanted) -> Self {
        let problem = case.problem();
        let kernel = |(pass, tile)| {
            let kernel = BackwardKernel::new(pass, &problem, tile, case.packed());
            if case.causal { kernel } else { kernel.aligned(&problem, &outputs(&problem), [0; 5]) }
        };
        let kernels = |chip| Kernels { chip, kernels: planned(&problem, chip).into_iter().map(kernel).collect() };
        let mut sets: Vec<Kernels> = CHIPS.into_iter().map(kernels).collect();
        sets.retain(|set| wanted.includes(&format!("{case} {}", set.chip)));
        Self { case, problem, sets }
    }
}

/// Runs the cases and prints a line for each set of kernels. Whether all of them are right.
pub fn run(programs: &Programs, cases: &[Case], wanted: &Wanted) -> Result<bool, String> {
    let runs: Vec<Run<'_>> = cases.iter().map(|case| Run::new(case, wanted)).collect();
    let kernels = || runs.iter().flat_map(|run| &run.sets).flat_map(|set| &set.kernels);
    let texts: Vec<programs::Kernel> = kernels().map(program).collect();
    let (Some(loaded), Some(gpu)) = (programs.load(&texts)?, programs.gpu) else { return Ok(true) };
    let mut loaded = loaded.iter();
    println!("gradients on {}: error / bound of dq, dk and dv on sampled rows", gpu.name());
    let mut all_right = true;
    for Run { case, problem, sets } in runs.iter().filter(|run| !run.sets.is_empty()) {
        let exact = Exact::new(case, problem);
        for set in sets {
            let set_programs: Vec<&Program> = loaded.by_ref().take(set.kernels.len()).collect();
            let (right, text) = match check(gpu, &set_programs, &set.kernels, &exact) {
                Ok(ratios) => {
                    let text: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.3}")).collect();
                    (ratios.iter().all(|&ratio| ratio <= 1.0), text.join(" "))
                }
                Err(message) => (false, message),
            };
            all_right &= right;
            println!("{} {case} tiles of an {}: {text}", if right { "ok  " } else { "FAIL" }, set.chip);
        }
    }
    Ok(all_right)
}

/// A case with the results of its forward pass, their gradients, and what comes of them in float64.
struct Exact<'a> {
    case: &'a Case,
    problem: &'a Problem,
    data: Data,
    d_out: Normals,
    d_lse: Option<Normals>,
    forward: Forward,
    queries: Vec<Query>,
    keys: Vec<Key>,
}

/// A row of q in a head, with its gradient.
struct Query {
    row: usize,
    head: usize,
    exact: Vec<f64>,
    bounds: Vec<f64>,
}

/// A row of k and v in a head, with its gradients.
struct Key {
    row: usize,
    head: usize,
    exact: KeyGradients,
}

impl<'a> Exact<'a> {
    fn new(case: &'a Case, problem: &'a Problem) -> Self {
        let data = Data::new(case);
        let mut random = Random(0xd0);
        let rows = case.total().0 * case.query_heads();
        let d_out = Normals::new(case.dtype, rows * case.head_dim, &mut random);
        let d_lse = case.packed().then(|| Normals::new(Dtype::F32, rows, &mut random));
        let forward = all_rows(problem, &data.inputs());
        let mut exact = Self { case, problem, data, d_out, d_lse, forward, queries: vec![], keys: vec![] };
        let mut pick = |count: usize, heads: usize| -> Vec<(usize, usize)> {
            let mut below = |most: usize| random.next() as usize % most;
            (0..case.samples)
                .map(|i| match i {
                    0 => (0, below(heads)),
                    1 => (count - 1, below(heads)),
                    _ => (below(count), below(heads)),
                })
                .collect()
        };
        let (picked_queries, picked_keys) =
            (pick(case.total().0, case.query_heads()), pick(case.total().1, case.key_heads));
        let rounding = Bounds::of_rounding(problem, &exact.forward);
        exact.queries = in_parallel(picked_queries.len(), |at| exact.query(picked_queries[at], &rounding));
        exact.keys = in_parallel(picked_keys.len(), |at| exact.key(picked_keys[at], &rounding));
        exact
    }

    fn arithmetic(&self) -> Arithmetic {
        Arithmetic::metal(self.case.dtype)
    }

    fn query(&self, (row, head): (usize, usize), rounding: &Bounds) -> Query {
        let (sequence, query) = self.data.place(self.case, row);
        let (inputs, place) = (self.data.inputs(), (sequence, head, query));
        let QueryGradient { query, bounds } =
            query_gradient_of(self.arithmetic(), self.problem, &inputs, &self.upstream(rounding), &self.forward, place);
        Query { row, head, exact: query, bounds }
    }

    fn upstream<'b>(&'b self, rounding: &'b Bounds) -> Upstream<'b> {
        let d_lse = self.d_lse.as_ref().map(|d_lse| &*d_lse.exact);
        Upstream { d_out: &self.d_out.exact, d_lse, forward: rounding }
    }

    fn key(&self, (row, head): (usize, usize), rounding: &Bounds) -> Key {
        let starts = &self.data.offsets[1];
        let sequence =
            (0..self.case.lengths.len()).find(|&at| row < starts[at + 1] as usize).expect("a key's sequence");
        let key = row - starts[sequence] as usize;
        let (inputs, place) = (self.data.inputs(), (sequence, head, key));
        let upstream = self.upstream(rounding);
        let exact = key_gradients_of(self.arithmetic(), self.problem, &inputs, &upstream, &self.forward, place);
        Key { row, head, exact }
    }
}

/// The forward pass in float64, on all cores.
fn all_rows(problem: &Problem, inputs: &ReferenceInputs<'_>) -> Forward {
    let parts = std::thread::available_parallelism().map_or(1, usize::from);
    let mut results = in_parallel(parts, |part| forward_part(problem, inputs, part, parts)).into_iter();
    let mut all = results.next().expect("at least one part");
    for part in results {
        all.out.iter_mut().zip(part.out).for_each(|(all, part)| *all += part);
        all.lse.iter_mut().zip(part.lse).for_each(|(all, part)| *all = all.min(part));
    }
    all
}

/// Largest errors of dq, dk and dv in units of their bounds.
fn check(gpu: &Gpu, programs: &[&Program], kernels: &[BackwardKernel], exact: &Exact<'_>) -> Result<[f64; 3], String> {
    let text = |error: DeviceError| error.to_string();
    let Exact { case, problem, data, .. } = exact;
    let bytes = |dtype, values: &[f64]| values.iter().flat_map(|&value| encode(dtype, value).0).collect::<Vec<u8>>();
    let upload = |bytes: &[u8]| gpu.upload(bytes).map_err(text);
    let offsets =
        || Ok::<_, String>((gpu.upload(&data.offsets[0]).map_err(text)?, gpu.upload(&data.offsets[1]).map_err(text)?));
    let blank = |normals: &Normals| gpu.poisoned(normals.bytes.len()).map_err(text);
    let tensors = BackwardTensors {
        q: upload(&data.q.bytes)?,
        k: upload(&data.k.bytes)?,
        v: upload(&data.v.bytes)?,
        out: upload(&bytes(case.dtype, &exact.forward.out))?,
        lse: upload(&bytes(Dtype::F32, &exact.forward.lse))?,
        offsets: if case.packed() { Some(offsets()?) } else { None },
        alibi_slopes: None,
        bias: None,
        d_out: upload(&exact.d_out.bytes)?,
        d_lse: exact.d_lse.as_ref().map(|d_lse| upload(&d_lse.bytes)).transpose()?,
        states: gpu.poisoned(8 * exact.forward.lse.len()).map_err(text)?,
        d_query: Some(blank(&data.q)?),
        d_key: Some(blank(&data.k)?),
        d_value: Some(blank(&data.v)?),
    };
    let gradients: Vec<&Memory> = [&tensors.d_query, &tensors.d_key, &tensors.d_value].into_iter().flatten().collect();
    let run = || -> Result<Vec<Vec<u8>>, String> {
        tensors.states.poison().map_err(text)?;
        for gradient in &gradients {
            gradient.poison().map_err(text)?;
        }
        for (kernel, program) in kernels.iter().zip(programs) {
            let launch = BackwardLaunch::new(problem, kernel, &outputs(problem)).map_err(|error| error.to_string())?;
            let arguments = launch.arguments(&tensors.map(|memory| memory));
            gpu.prepare(program, &arguments, launch.grid).map_err(text)?.enqueue().map_err(text)?;
            gpu.synchronize()?;
        }
        gradients.iter().map(|gradient| gradient.download().map_err(text)).collect()
    };
    let results = run()?;
    for repeat in 0..case.repeats {
        if run()? != results {
            return Err(format!("launch {} differs from the first", repeat + 2));
        }
    }
    judge(exact, &results)
}

fn judge(exact: &Exact<'_>, results: &[Vec<u8>]) -> Result<[f64; 3], String> {
    let Exact { case, .. } = exact;
    let (size, dim) = (case.dtype.size(), case.head_dim);
    let unwritten =
        results.iter().flat_map(|result| result.chunks_exact(size)).filter(|bytes| decode(case.dtype, bytes).is_nan());
    let unwritten = unwritten.count();
    if unwritten > 0 {
        return Err(format!("{unwritten} elements are NaN or were not written"));
    }
    let worst = |result: &[u8], at: usize, want: &[f64], bounds: &[f64]| {
        let got = result[at * dim * size..][..dim * size].chunks_exact(size).map(|bytes| decode(case.dtype, bytes));
        let ratio = |((got, want), bound): ((f64, &f64), &f64)| {
            let error = (got - want).abs();
            if error == 0.0 { 0.0 } else { error / bound }
        };
        got.zip(want).zip(bounds).map(ratio).fold(0.0, f64::max)
    };
    let mut ratios = [0.0_f64; 3];
    for Query { row, head, exact, bounds } in &exact.queries {
        ratios[0] = ratios[0].max(worst(&results[0], row * case.query_heads() + head, exact, bounds));
    }
    for Key { row, head, exact } in &exact.keys {
        let at = row * case.key_heads + head;
        ratios[1] = ratios[1].max(worst(&results[1], at, &exact.key, &exact.key_bounds));
        ratios[2] = ratios[2].max(worst(&results[2], at, &exact.value, &exact.value_bounds));
    }
    Ok(ratios)
}
