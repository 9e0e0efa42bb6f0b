//! Attention of a few queries over long caches, against float64 on rows picked at random, and repeat launches against the
//! first ones.

use mtlflashattn_core::plan::{Chip, Gpu as Machine, Planner, decode as planner};
use mtlflashattn_core::reference::bounds::{Bounds, row_with_bounds};
use mtlflashattn_core::reference::{Forward, ReferenceInputs};
use mtlflashattn_core::{
    CacheBuffers, CacheOptions, Device, Dtype, LengthsArgument, MetalTile, Options, Problem, Settings, TensorMeta,
};
use mtlflashattn_metal::{
    CacheTensors, DecodeLaunch, DecodeTensors, DeviceError, Kernel, LseStrides, MergeKernel, Outputs, Tensors,
};
use mtlflashattn_simulator::nvidia::{Gpu, Launch, Memory, Program};

use crate::Wanted;
use crate::parallel::in_parallel;
use crate::programs::{self, Programs};
use crate::random::{Normals, Random, decode, encode};

/// Where keys lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// In k and v, which are no cache.
    Dense,
    /// In a slot for each sequence, filled so far.
    Slots,
    /// In pages of so many rows, in any order.
    Pages(usize),
}

/// A call of a few queries.
#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: Dtype,
    pub queries: usize,
    /// Keys of each sequence; as many in each where there is no cache.
    pub keys: Vec<usize>,
    pub key_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub causal: bool,
    pub form: Form,
    /// Whose tiles and splits the planner is asked for.
    pub chip: &'static str,
    /// Rows that are compared with float64.
    pub samples: usize,
    /// Launches after the first one, whose results must be the same bit for bit.
    pub repeats: usize,
}

/// One query for 32 heads over 8 key heads of 128.
pub fn case(dtype: Dtype, queries: usize, keys: &[usize], form: Form) -> Case {
    Case {
        dtype,
        queries,
        keys: keys.to_vec(),
        key_heads: 8,
        group: 4,
        head_dim: 128,
        causal: true,
        form,
        chip: "M1",
        samples: 32,
        repeats: 4,
    }
}

/// Caches far beyond what a simulator can read.
pub fn large_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for queries in [1, 4, 8, 32] {
        cases.push(case(Dtype::F16, queries, &[16_384, 16_384], Form::Dense));
        cases.push(case(Dtype::F16, queries, &[16_383, 4097, 40], Form::Slots));
        cases.push(case(Dtype::F16, queries, &[16_383, 4097, 40], Form::Pages(256)));
        cases.push(Case { chip: "M3", ..case(Dtype::F16, queries, &[9999, 16_000], Form::Pages(16)) });
        for dtype in [Dtype::Bf16, Dtype::F32] {
            cases.push(case(dtype, queries, &[8191, 33], Form::Pages(256)));
        }
    }
    cases.push(Case { causal: false, ..case(Dtype::F16, 4, &[65_536], Form::Dense) });
    cases.push(Case { head_dim: 64, chip: "M3", ..case(Dtype::F16, 1, &[65_535], Form::Slots) });
    cases.push(Case { head_dim: 256, key_heads: 1, group: 8, ..case(Dtype::Bf16, 8, &[20_000], Form::Slots) });
    cases
}

/// Problems that end soon under a tool that watches every access.
pub fn small_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        for (queries, form) in [(1, Form::Dense), (4, Form::Slots), (8, Form::Pages(16)), (32, Form::Pages(64))] {
            let keys: &[usize] = if form == Form::Dense { &[1100] } else { &[1100, 0, 77] };
            let case = case(dtype, queries, keys, form);
            cases.push(Case { key_heads: 2, head_dim: 64, samples: 16, repeats: 1, ..case });
        }
    }
    cases
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys: Vec<String> = self.keys.iter().map(usize::to_string).collect();
        let heads = self.key_heads * self.group;
        write!(f, "decode {} {}x[{}] H{heads}/{}", self.dtype, self.queries, keys.join(" "), self.key_heads)?;
        write!(f, " D{} {:?}{}", self.head_dim, self.form, if self.causal { " causal" } else { "" })
    }
}

/// A problem with what its launches need beside tensors.
#[derive(Clone, Debug)]
pub struct Plan {
    pub problem: Problem,
    pub tile: MetalTile,
    pub splits: usize,
}

impl Plan {
    pub fn kernel(&self) -> Kernel {
        Kernel::decode(&self.problem, self.tile, true).aligned(&self.problem, [0; 3])
    }

    /// The programs of a call: the kernel, and what merges its splits.
    pub fn programs(&self) -> Vec<programs::Kernel> {
        let kernel = self.kernel();
        let merge = MergeKernel::of(&kernel);
        let program = |source, entry| programs::Kernel { source, entry };
        let mut all = vec![program(kernel.source(), kernel.entry())];
        if self.splits > 1 {
            all.push(program(merge.source(), merge.entry()));
        }
        all
    }

    fn outputs(&self) -> Outputs {
        Outputs { out: self.problem.q, lse: Some(LseStrides::contiguous(&self.problem)) }
    }

    pub fn launch(&self) -> DecodeLaunch {
        DecodeLaunch::new(&self.problem, &self.kernel(), &self.outputs(), self.splits).expect("within the limits")
    }

    /// The launches of a call, one after the other.
    pub fn prepare<'a>(
        &self,
        gpu: &Gpu,
        programs: &[&'a Program],
        tensors: &DecodeTensors<&Memory>,
    ) -> Result<Vec<Launch<'a>>, DeviceError> {
        let launch = self.launch();
        let arguments = launch.arguments(tensors);
        let grids = [Some(launch.grid), launch.merge];
        grids
            .into_iter()
            .flatten()
            .zip(programs)
            .map(|(grid, program)| gpu.prepare(program, &arguments, grid))
            .collect()
    }
}

/// An Apple GPU of this generation with all its cores.
fn machine(chip: &str) -> Machine {
    let chip = Chip::from_name(chip);
    Machine { chip, cores: chip.most_cores(), ..Machine::SIMULATED }
}

impl Case {
    fn batch(&self) -> usize {
        self.keys.len()
    }

    pub fn query_heads(&self) -> usize {
        self.key_heads * self.group
    }

    /// Slots or pages, rows of each, and pages of a sequence. One page more than are used, and a few rows.
    fn blocks(&self) -> (usize, usize, usize) {
        let longest = self.keys.iter().copied().max().unwrap_or(0);
        match self.form {
            Form::Dense => (self.batch(), longest, 0),
            Form::Slots => (self.batch(), longest + 9, 0),
            Form::Pages(len) => {
                let per_sequence = longest.div_ceil(len);
                (self.batch() * per_sequence + 1, len, per_sequence)
            }
        }
    }

    /// Elements of k, and of v.
    pub fn cache_elements(&self) -> usize {
        let (blocks, block_len, _) = self.blocks();
        blocks * block_len * self.key_heads * self.head_dim
    }

    /// All tensors are contiguous `[batch, rows, heads, dim]`.
    pub fn problem(&self) -> Problem {
        let (blocks, block_len, per_sequence) = self.blocks();
        let shapes = [(self.batch(), self.queries, self.query_heads()), (blocks, block_len, self.key_heads)]
            .map(|(batch, rows, heads)| [batch as i64, rows as i64, heads as i64, self.head_dim as i64]);
        let strides = shapes.map(|[_, rows, heads, dim]| [rows * heads * dim, heads * dim, dim, 1]);
        let meta = |at: usize| TensorMeta { dtype: self.dtype, shape: &shapes[at], strides: &strides[at] };
        let options = Options { causal: self.causal, window: (-1, -1), ..Options::default() };
        let (batch, table) = ([self.batch() as i64], [self.batch() as i64, per_sequence as i64]);
        let table_strides = [per_sequence as i64, 1];
        let cache = CacheOptions {
            lengths: Some(LengthsArgument::Each(&batch)),
            block_table: (per_sequence > 0).then_some((&table, &table_strides)),
            ..CacheOptions::default()
        };
        let problem = match self.form {
            Form::Dense => Problem::dense(meta(0), meta(1), meta(1), &options),
            Form::Slots | Form::Pages(_) => Problem::cached(meta(0), meta(1), meta(1), &cache, &options),
        };
        problem.expect("the case is valid")
    }

    /// The planner's choice for the chip.
    pub fn plan(&self) -> Plan {
        let problem = self.problem();
        let settings = Settings::parse(|name| (name == "MTLFLASHATTN_KERNEL").then(|| "decode".into())).0;
        let plan = Planner::new(Device::Metal(machine(self.chip)), &settings).plan(&problem);
        let tile = plan.expect("the decode kernel").metal.expect("a tile");
        let splits = planner::splits(&problem, &tile, machine(self.chip).cores);
        Plan { problem, tile, splits }
    }

    /// What the buffers of the cache hold.
    pub fn buffers(&self) -> Buffers {
        let (blocks, _, per_sequence) = self.blocks();
        let mut random = Random(0xb10c);
        let mut pages: Vec<i32> = (0..blocks as i32).collect();
        for at in (1..blocks).rev() {
            pages.swap(at, random.next() as usize % (at + 1));
        }
        pages.truncate(self.batch() * per_sequence);
        let is_cache = self.form != Form::Dense;
        let lengths = if is_cache { self.keys.iter().map(|&keys| keys as i32).collect() } else { Vec::new() };
        Buffers { lengths, pages }
    }
}

/// Contents of the buffers of a cache; empty where there is none.
pub struct Buffers {
    pub lengths: Vec<i32>,
    pages: Vec<i32>,
}

impl Buffers {
    pub fn host(&self) -> CacheBuffers<'_> {
        CacheBuffers { lengths: &self.lengths, pages: &self.pages, ..CacheBuffers::default() }
    }

    pub fn upload(&self, gpu: &Gpu) -> Result<CacheTensors<Memory>, DeviceError> {
        let upload = |values: &Vec<i32>| if values.is_empty() { Ok(None) } else { gpu.upload(values).map(Some) };
        Ok(CacheTensors { lengths: upload(&self.lengths)?, pages: upload(&self.pages)?, ..CacheTensors::NONE })
    }
}

/// Runs the cases and prints a line for each. Whether all of them are right.
pub fn run(programs: &Programs, cases: &[Case], wanted: &Wanted) -> Result<bool, String> {
    let mut cases: Vec<(&Case, Plan)> = cases.iter().map(|case| (case, case.plan())).collect();
    cases.retain(|(case, plan)| wanted.includes(&format!("{case} {}", plan.tile)));
    let texts: Vec<programs::Kernel> = cases.iter().flat_map(|(_, plan)| plan.programs()).collect();
    let (Some(loaded), Some(gpu)) = (programs.load(&texts)?, programs.gpu) else { return Ok(true) };
    println!("decode on {}: error / bound of out and LSE on sampled rows", gpu.name());
    let (mut loaded, mut all_right) = (loaded.iter(), true);
    for (case, plan) in &cases {
        let call: Vec<&Program> = loaded.by_ref().take(plan.programs().len()).collect();
        let (right, text) = match check(gpu, &call, case, plan) {
            Ok((out, lse)) => (out <= 1.0 && lse <= 1.0, format!("{out:.3} {lse:.3}")),
            Err(message) => (false, message),
        };
        all_right &= right;
        let (verdict, Plan { tile, splits, .. }) = (if right { "ok  " } else { "FAIL" }, plan);
        println!("{verdict} {case}, {tile}, {splits} splits, of an {}: {text}", case.chip);
    }
    Ok(all_right)
}

/// A cache whose rows hold numbers where a key lies, and NaN elsewhere, also where one of the last `new_len` keys of each
/// sequence goes.
pub fn cache_with_holes(
    case: &Case,
    problem: &Problem,
    buffers: &Buffers,
    new_len: usize,
    random: &mut Random,
) -> Normals {
    let (blocks, block_len, _) = case.blocks();
    let row_len = case.key_heads * case.head_dim;
    let mut all = Normals::new(case.dtype, blocks * block_len * row_len, random);
    let Some(cache) = problem.cache else { return all };
    let mut used = vec![false; blocks * block_len];
    for (sequence, &keys) in case.keys.iter().enumerate() {
        for key in 0..keys - new_len {
            let at = cache.row(&buffers.host(), sequence, key);
            used[at.block * block_len + at.row] = true;
        }
    }
    let hole = encode(case.dtype, f64::NAN).0.repeat(row_len);
    for row in (0..used.len()).filter(|&row| !used[row]) {
        all.bytes[row * hole.len()..][..hole.len()].copy_from_slice(&hole);
        all.exact[row * row_len..][..row_len].fill(f64::NAN);
    }
    all
}

/// Largest errors of the output and of the LSE in units of their bounds.
fn check(gpu: &Gpu, programs: &[&Program], case: &Case, plan: &Plan) -> Result<(f64, f64), String> {
    let text = |error: DeviceError| error.to_string();
    let mut random = Random(0xcac4e);
    let rows = case.batch() * case.queries * case.query_heads();
    let buffers = case.buffers();
    let q = Normals::new(case.dtype, rows * case.head_dim, &mut random);
    let [k, v] = [(); 2].map(|()| cache_with_holes(case, &plan.problem, &buffers, 0, &mut random));
    let upload = |bytes: &[u8]| gpu.upload(bytes).map_err(text);
    let [query_memory, key_memory, value_memory] = [upload(&q.bytes)?, upload(&k.bytes)?, upload(&v.bytes)?];
    let out = gpu.poisoned(q.bytes.len()).map_err(text)?;
    let lse = gpu.poisoned(4 * rows).map_err(text)?;
    let partials = gpu.poisoned(4 * plan.launch().partial_floats).map_err(text)?;
    let cache = buffers.upload(gpu).map_err(text)?;
    let tensors = DecodeTensors {
        forward: Tensors {
            q: &query_memory,
            k: &key_memory,
            v: &value_memory,
            out: &out,
            lse: Some(&lse),
            offsets: None,
            alibi_slopes: None,
            bias: None,
            sinks: None,
        },
        partials: (plan.splits > 1).then_some(&partials),
        cache: cache.map(|memory| memory),
    };
    let launches = plan.prepare(gpu, programs, &tensors).map_err(text)?;
    let run = || -> Result<_, DeviceError> {
        for memory in [&out, &lse, &partials] {
            memory.poison()?;
        }
        launches.iter().try_for_each(Launch::enqueue)?;
        Ok((out.download()?, lse.download()?))
    };
    let results = run().map_err(text)?;
    for repeat in 0..case.repeats {
        if run().map_err(text)? != results {
            return Err(format!("launch {} differs from the first", repeat + 2));
        }
    }
    let inputs = ReferenceInputs { q: &q.exact, k: &k.exact, v: &v.exact, cache: buffers.host(), ..Default::default() };
    judge(case, plan, &inputs, &results)
}

fn judge(
    case: &Case,
    plan: &Plan,
    inputs: &ReferenceInputs<'_>,
    (out, lse): &(Vec<u8>, Vec<u8>),
) -> Result<(f64, f64), String> {
    let read = |dtype: Dtype, bytes: &[u8]| -> Vec<f64> {
        bytes.chunks_exact(dtype.size()).map(|bytes| decode(dtype, bytes)).collect()
    };
    let got = Forward { out: read(case.dtype, out), lse: read(Dtype::F32, lse) };
    let unwritten = got.out.iter().chain(&got.lse).filter(|value| value.is_nan()).count();
    if unwritten > 0 {
        return Err(format!("{unwritten} elements are NaN or were not written"));
    }
    let arithmetic = [plan.kernel().arithmetic()];
    let heads = case.query_heads();
    let mut random = Random(11);
    let mut below = |end: usize| random.next() as usize % end;
    // Every sequence takes part.
    let places: Vec<_> = (0..case.samples).map(|at| (at % case.batch(), below(heads), below(case.queries))).collect();
    let ratios = in_parallel(places.len(), |at| {
        let (batch, head, query) = places[at];
        let (exact, bounds): (Forward, Vec<Bounds>) = row_with_bounds(&arithmetic, &plan.problem, inputs, places[at]);
        let row = (batch * case.queries + query) * heads + head;
        let lse = (batch * heads + head) * case.queries + query;
        let out = got.out[row * case.head_dim..][..case.head_dim].to_vec();
        bounds[0].worst(&exact, &Forward { out, lse: vec![got.lse[lse]] })
    });
    Ok(ratios.into_iter().fold((0.0, 0.0), |worst, ratio| (f64::max(worst.0, ratio.0), f64::max(worst.1, ratio.1))))
}
