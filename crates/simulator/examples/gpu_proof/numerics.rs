//! Results against float64, on rows picked at random, and repeat launches against the first one.

use mtlflashattn_core::reference::bounds::{Arithmetic, Bounds, row_with_bounds};
use mtlflashattn_core::reference::{Forward, ReferenceInputs};
use mtlflashattn_core::{Dropout, Dtype, Options, Problem, TensorMeta};
use mtlflashattn_metal::{Kernel, Launch, LseStrides, Outputs, Tensors};
use mtlflashattn_simulator::nvidia::{Gpu, Memory, Program};

use crate::parallel::in_parallel;
use crate::programs::{self, Programs};
use crate::random::{Normals, Random, decode};
use crate::{Wanted, tiles};

/// Of the generator of dropout: every half of both has bits set.
const SEED: u64 = 0x5eed_0123_0000_4567;
const OFFSET: u64 = 0x0000_0009_0000_0400;

/// A problem, and how much of the results is checked.
pub struct Case {
    pub dtype: Dtype,
    /// Query and key length of each sequence; several are packed.
    pub lengths: Vec<(usize, usize)>,
    pub key_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub causal: bool,
    pub window: (i64, i64),
    pub softcap: f64,
    /// Probability that a weight is dropped.
    pub dropout: f64,
    /// Only the scalar kernel; otherwise only the others.
    pub scalar: bool,
    /// Rows that are compared with float64.
    pub samples: usize,
    /// Launches after the first one, whose results must be the same bit for bit.
    pub repeats: usize,
}

/// The least problem of a case: one sequence, one head.
pub fn case(dtype: Dtype, lengths: &[(usize, usize)], head_dim: usize) -> Case {
    Case {
        dtype,
        lengths: lengths.to_vec(),
        key_heads: 1,
        group: 1,
        head_dim,
        causal: false,
        window: (-1, -1),
        softcap: 0.0,
        dropout: 0.0,
        scalar: false,
        samples: 48,
        repeats: 4,
    }
}

/// Problems far beyond what a simulator can run.
pub fn large_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        for head_dim in [64, 128, 256] {
            cases.push(Case { group: 2, ..case(dtype, &[(4096, 4096)], head_dim) });
            cases.push(Case { causal: true, key_heads: 2, ..case(dtype, &[(2111, 3001)], head_dim) });
        }
        cases.push(Case { scalar: true, ..case(dtype, &[(1021, 2043)], 96) });
        cases.push(Case { causal: true, ..case(dtype, &[(32_768, 32_768)], 64) });
        cases.push(Case { window: (1000, 24), ..case(dtype, &[(32_768, 32_768)], 128) });
    }
    cases.push(case(Dtype::F16, &[(32_767, 32_765)], 128));
    cases.push(Case { causal: true, ..case(Dtype::F16, &[(16_384, 16_384)], 256) });
    let ragged = [(1, 1), (700, 700), (0, 5), (4097, 4097), (33, 1025), (2500, 1200)];
    cases.push(Case { causal: true, key_heads: 2, group: 3, ..case(Dtype::F16, &ragged, 64) });
    cases.push(Case { window: (300, 0), key_heads: 1, group: 4, ..case(Dtype::Bf16, &ragged, 128) });
    cases.push(Case { softcap: 5.0, ..case(Dtype::F16, &[(2048, 2048)], 80) });
    cases.push(Case { causal: true, ..case(Dtype::F16, &[(1500, 1500)], 40) });
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        cases.push(Case { dropout: 0.1, group: 2, ..case(dtype, &[(8192, 8192)], 64) });
    }
    cases.push(Case { dropout: 0.5, causal: true, ..case(Dtype::F16, &[(8192, 8192)], 128) });
    cases.push(Case { dropout: 0.25, causal: true, key_heads: 2, ..case(Dtype::F16, &ragged, 64) });
    cases.push(Case { dropout: 0.25, scalar: true, ..case(Dtype::F16, &[(1021, 2043)], 96) });
    cases
}

/// Problems that end soon under a tool that watches every access.
pub fn small_cases() -> Vec<Case> {
    let small = |case: Case| Case { samples: 16, repeats: 1, ..case };
    let mut cases = Vec::new();
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        cases.push(small(Case { scalar: true, causal: true, ..case(dtype, &[(70, 133)], 64) }));
        cases.push(small(Case { causal: true, group: 2, ..case(dtype, &[(133, 261)], 64) }));
        cases.push(small(case(dtype, &[(70, 99)], 128)));
        cases.push(small(case(dtype, &[(37, 70)], 256)));
        cases.push(small(Case { window: (40, 3), ..case(dtype, &[(1, 1), (0, 3), (90, 120)], 72) }));
        cases.push(small(Case { dropout: 0.3, causal: true, ..case(dtype, &[(133, 261)], 64) }));
    }
    cases
}

/// A case with its kernels.
struct Run<'a> {
    case: &'a Case,
    problem: Problem,
    kernels: Vec<Kernel>,
}

impl<'a> Run<'a> {
    fn new(case: &'a Case, wanted: &Wanted) -> Self {
        let problem = case.problem();
        let mut kernels =
            if case.scalar { vec![Kernel::scalar(&problem, true)] } else { tiles::proved(&problem, case.causal) };
        kernels.retain(|kernel| wanted.includes(&format!("{case} {}", tiles::name(kernel))));
        Self { case, problem, kernels }
    }
}

/// Runs the cases and prints a line for each kernel. Whether all of them are right.
pub fn run(programs: &Programs, cases: &[Case], wanted: &Wanted) -> Result<bool, String> {
    let runs: Vec<Run<'_>> = cases.iter().map(|case| Run::new(case, wanted)).collect();
    let kernels = || runs.iter().flat_map(|run| &run.kernels);
    if let Some(kernel) = kernels().find(|kernel| !kernel.fits()) {
        return Err(format!("{} does not fit in threadgroup memory", tiles::name(kernel)));
    }
    let texts: Vec<programs::Kernel> =
        kernels().map(|kernel| programs::Kernel { source: kernel.source(), entry: kernel.entry() }).collect();
    let (Some(loaded), Some(gpu)) = (programs.load(&texts)?, programs.gpu) else { return Ok(true) };
    let mut loaded = loaded.iter();
    println!("numbers on {}: error / bound on sampled rows, largest error of out", gpu.name());
    let mut all_right = true;
    for Run { case, problem, kernels } in runs.iter().filter(|run| !run.kernels.is_empty()) {
        let data = Data::new(case);
        let samples = data.samples(case, problem, kernels);
        for kernel in kernels {
            let program = loaded.next().ok_or("a program for every kernel")?;
            let verdict = check(gpu, program, kernel, case, problem, &data, &samples);
            let (right, text) = match verdict {
                Ok(Verdict { ratio, error }) => (ratio <= 1.0, format!("{ratio:.3}  {error:.1e}")),
                Err(message) => (false, message),
            };
            all_right &= right;
            println!("{} {case} {}: {text}", if right { "ok  " } else { "FAIL" }, tiles::name(kernel));
        }
    }
    Ok(all_right)
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lengths: Vec<String> = self.lengths.iter().map(|(query, key)| format!("{query}x{key}")).collect();
        let heads = self.key_heads * self.group;
        write!(f, "{} [{}] H{heads}/{} D{}", self.dtype, lengths.join(" "), self.key_heads, self.head_dim)?;
        if self.causal {
            write!(f, " causal")?;
        }
        if self.window != (-1, -1) {
            write!(f, " window {},{}", self.window.0, self.window.1)?;
        }
        if self.softcap > 0.0 {
            write!(f, " softcap {}", self.softcap)?;
        }
        if self.dropout > 0.0 {
            write!(f, " dropout {}", self.dropout)?;
        }
        Ok(())
    }
}

impl Case {
    pub fn total(&self) -> (usize, usize) {
        self.lengths.iter().fold((0, 0), |(query, key), length| (query + length.0, key + length.1))
    }

    pub fn packed(&self) -> bool {
        self.lengths.len() > 1
    }

    pub fn query_heads(&self) -> usize {
        self.key_heads * self.group
    }

    /// The tensors are `[rows, heads, dim]`, contiguous.
    pub fn problem(&self) -> Problem {
        let (query_rows, key_rows) = self.total();
        let dim = self.head_dim as i64;
        let options = Options {
            softmax_scale: None,
            causal: self.causal,
            window: self.window,
            softcap: self.softcap,
            dropout: Dropout::new(self.dropout, SEED, OFFSET).expect("a probability"),
            ..Options::default()
        };
        let shapes = [(query_rows, self.query_heads()), (key_rows, self.key_heads), (key_rows, self.key_heads)]
            .map(|(rows, heads)| [1, rows as i64, heads as i64, dim]);
        let strides = shapes.map(|[_, rows, heads, dim]| [rows * heads * dim, heads * dim, dim, 1]);
        let skip = usize::from(self.packed());
        let meta =
            |at: usize| TensorMeta { dtype: self.dtype, shape: &shapes[at][skip..], strides: &strides[at][skip..] };
        let longest = |pick: fn(&(usize, usize)) -> usize| self.lengths.iter().map(pick).max().unwrap_or(0) as i64;
        let problem = if self.packed() {
            let lengths = (longest(|length| length.0), longest(|length| length.1));
            Problem::packed(meta(0), meta(1), meta(2), self.lengths.len(), lengths, &options)
        } else {
            Problem::dense(meta(0), meta(1), meta(2), &options)
        };
        problem.expect("the case is valid")
    }
}

/// The inputs of a case.
pub struct Data {
    pub q: Normals,
    pub k: Normals,
    pub v: Normals,
    /// Where sequences start and end in q, and in k and v.
    pub offsets: [Vec<i32>; 2],
}

/// A row of q in a head, with its float64 result and bounds.
struct Sample {
    row: usize,
    head: usize,
    exact: Forward,
    bounds: Vec<(Arithmetic, Bounds)>,
}

impl Sample {
    fn bounds(&self, kernel: &Kernel) -> &Bounds {
        let bounds = self.bounds.iter().find(|(arithmetic, _)| *arithmetic == kernel.arithmetic());
        &bounds.expect("bounds for the arithmetic of every kernel").1
    }
}

impl Data {
    pub fn new(case: &Case) -> Self {
        let mut random = Random(0x5eed);
        let (query_rows, key_rows) = case.total();
        let mut normals =
            |rows: usize, heads: usize| Normals::new(case.dtype, rows * heads * case.head_dim, &mut random);
        let ends = |pick: fn(&(usize, usize)) -> usize| {
            std::iter::once(0)
                .chain(case.lengths.iter().scan(0, |end, length| {
                    *end += pick(length) as i32;
                    Some(*end)
                }))
                .collect()
        };
        Self {
            q: normals(query_rows, case.query_heads()),
            k: normals(key_rows, case.key_heads),
            v: normals(key_rows, case.key_heads),
            offsets: [ends(|length| length.0), ends(|length| length.1)],
        }
    }

    /// Rows of random sequences and heads, the first and the last among them, each computed as a problem of its own:
    /// one query, and the keys that it sees.
    fn samples(&self, case: &Case, problem: &Problem, kernels: &[Kernel]) -> Vec<Sample> {
        let mut arithmetics: Vec<Arithmetic> = Vec::new();
        for kernel in kernels {
            if !arithmetics.contains(&kernel.arithmetic()) {
                arithmetics.push(kernel.arithmetic());
            }
        }
        let mut random = Random(7);
        let rows = case.total().0;
        let picked: Vec<(usize, usize)> = (0..case.samples)
            .map(|i| {
                let row = match i {
                    0 => 0,
                    1 => rows - 1,
                    _ => random.next() as usize % rows,
                };
                (row, random.next() as usize % case.query_heads())
            })
            .collect();
        in_parallel(picked.len(), |at| self.sample(case, problem, &arithmetics, picked[at]))
    }

    fn sample(
        &self,
        case: &Case,
        problem: &Problem,
        arithmetics: &[Arithmetic],
        (row, head): (usize, usize),
    ) -> Sample {
        let (sequence, query) = self.place(case, row);
        let (exact, bounds) = row_with_bounds(arithmetics, problem, &self.inputs(), (sequence, head, query));
        Sample { row, head, exact, bounds: arithmetics.iter().copied().zip(bounds).collect() }
    }

    /// The sequence of a row of q, and which of its queries it is.
    pub fn place(&self, case: &Case, row: usize) -> (usize, usize) {
        let starts = &self.offsets[0];
        let sequence = (0..case.lengths.len()).find(|&at| row < starts[at + 1] as usize).expect("a row of a sequence");
        (sequence, row - starts[sequence] as usize)
    }

    pub fn inputs(&self) -> ReferenceInputs<'_> {
        ReferenceInputs {
            q: &self.q.exact,
            k: &self.k.exact,
            v: &self.v.exact,
            query_offsets: &self.offsets[0],
            key_offsets: &self.offsets[1],
            ..ReferenceInputs::default()
        }
    }
}

struct Verdict {
    /// Largest error in units of its bound.
    ratio: f64,
    /// Largest error of the output.
    error: f64,
}

fn check(
    gpu: &Gpu,
    program: &Program,
    kernel: &Kernel,
    case: &Case,
    problem: &Problem,
    data: &Data,
    samples: &[Sample],
) -> Result<Verdict, String> {
    let text = |error: mtlflashattn_metal::DeviceError| error.to_string();
    let rows = case.total().0 * case.query_heads();
    let [q, k, v] = [&data.q, &data.k, &data.v].map(|normals| gpu.upload(&normals.bytes).map_err(text));
    let tensors = Tensors {
        q: q?,
        k: k?,
        v: v?,
        out: gpu.poisoned(rows * case.head_dim * case.dtype.size()).map_err(text)?,
        lse: Some(gpu.poisoned(rows * 4).map_err(text)?),
        offsets: if case.packed() {
            Some((gpu.upload(&data.offsets[0]).map_err(text)?, gpu.upload(&data.offsets[1]).map_err(text)?))
        } else {
            None
        },
        alibi_slopes: None,
        bias: None,
        sinks: None,
    };
    let lse = tensors.lse.as_ref().ok_or("lse")?;
    let outputs = Outputs { out: problem.q, lse: Some(LseStrides::contiguous(problem)) };
    let launch = Launch::new(problem, kernel, &outputs).map_err(|error| error.to_string())?;
    let prepared = gpu.prepare(program, &launch.arguments(&borrowed(&tensors)), launch.grid).map_err(text)?;
    prepared.enqueue().map_err(text)?;
    let results = (tensors.out.download().map_err(text)?, lse.download().map_err(text)?);
    for repeat in 0..case.repeats {
        tensors.out.poison().map_err(text)?;
        lse.poison().map_err(text)?;
        prepared.enqueue().map_err(text)?;
        if (tensors.out.download().map_err(text)?, lse.download().map_err(text)?) != results {
            return Err(format!("launch {} differs from the first", repeat + 2));
        }
    }
    judge(case, kernel, &results.0, &results.1, samples)
}

fn borrowed(tensors: &Tensors<Memory>) -> Tensors<&Memory> {
    Tensors {
        q: &tensors.q,
        k: &tensors.k,
        v: &tensors.v,
        out: &tensors.out,
        lse: tensors.lse.as_ref(),
        offsets: tensors.offsets.as_ref().map(|(query, key)| (query, key)),
        alibi_slopes: None,
        bias: None,
        sinks: None,
    }
}

fn judge(case: &Case, kernel: &Kernel, out: &[u8], lse: &[u8], samples: &[Sample]) -> Result<Verdict, String> {
    let (size, dim, heads) = (case.dtype.size(), case.head_dim, case.query_heads());
    let unwritten = out.chunks_exact(size).filter(|bytes| decode(case.dtype, bytes).is_nan()).count()
        + lse.chunks_exact(4).filter(|bytes| decode(Dtype::F32, bytes).is_nan()).count();
    if unwritten > 0 {
        return Err(format!("{unwritten} elements are NaN or were not written"));
    }
    let mut verdict = Verdict { ratio: 0.0, error: 0.0 };
    let mut compare = |got: f64, want: f64, bound: f64| {
        let error = if got.total_cmp(&want).is_eq() { 0.0 } else { (got - want).abs() };
        let ratio = if error == 0.0 { 0.0 } else { error / bound };
        verdict.ratio = verdict.ratio.max(if ratio.is_nan() { f64::INFINITY } else { ratio });
        error
    };
    let (mut largest, total) = (0.0_f64, case.total().0);
    for sample in samples {
        let at = (sample.row * heads + sample.head) * dim;
        let bounds = sample.bounds(kernel);
        for ((bytes, &want), &bound) in
            out[at * size..(at + dim) * size].chunks_exact(size).zip(&sample.exact.out).zip(&bounds.out)
        {
            largest = largest.max(compare(decode(case.dtype, bytes), want, bound));
        }
        // Of one dense sequence as of packed ones: [heads, rows].
        let at = (sample.head * total + sample.row) * 4;
        compare(decode(Dtype::F32, &lse[at..at + 4]), sample.exact.lse[0], bounds.lse[0]);
    }
    verdict.error = largest;
    Ok(verdict)
}
