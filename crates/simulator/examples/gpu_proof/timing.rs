//! Speed of kernels that all took the same way, measured in turn: one launch of each, again and again, medians.

use mtlflashattn_core::{Dtype, Tier};
use mtlflashattn_metal::{Argument, DeviceError, Kernel, Launch, Outputs, Tensors};
use mtlflashattn_simulator::nvidia::{self, Gpu, Memory, Program};

use crate::Wanted;
use crate::peer::{self, Peer, PeerKernel, PeerTier};
use crate::programs::{self, Programs};
use crate::random::{Normals, Random, decode};
use crate::shape::Shape;
use crate::tiles;

/// Launches that count, and launches before them.
const ROUNDS: usize = 21;
const WARM_UP: usize = 2;
/// Launches that count of a scalar kernel.
const SLOW_ROUNDS: usize = 3;
/// Launches of a kernel that a profiler watches.
const PROFILED: usize = 3;

/// What is timed.
enum Candidate {
    /// And whether the planner chooses it on an M5.
    Ours(Box<Kernel>, bool),
    Peer(PeerKernel),
}

/// What the columns of the last table are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Ours(Tier),
    Peer(PeerTier),
}

impl Candidate {
    fn name(&self) -> String {
        match self {
            Self::Ours(kernel, true) => tiles::name(kernel) + " (the planner's choice)",
            Self::Ours(kernel, false) => tiles::name(kernel),
            Self::Peer(kernel) => format!("0.2.0 {}", kernel.tier.name()),
        }
    }

    fn group(&self) -> Group {
        match self {
            Self::Ours(kernel, _) => Group::Ours(kernel.tier),
            Self::Peer(kernel) => Group::Peer(kernel.tier),
        }
    }

    fn program(&self, peer: Option<&Peer>, shape: Shape) -> programs::Kernel {
        let (source, entry) = match self {
            Self::Ours(kernel, _) => (kernel.source(), kernel.entry()),
            Self::Peer(kernel) => {
                (peer.map_or_else(String::new, |peer| peer.source(*kernel, shape.head_dim)), kernel.entry())
            }
        };
        programs::Kernel { source, entry }
    }

    fn dtype(&self) -> Dtype {
        match self {
            Self::Ours(kernel, _) => kernel.dtype,
            Self::Peer(kernel) => kernel.dtype,
        }
    }

    fn is_scalar(&self) -> bool {
        matches!(self.group(), Group::Ours(Tier::Scalar) | Group::Peer(PeerTier::V0))
    }
}

/// Our kernels and those of 0.2.0 for a shape, as far as they are wanted.
fn candidates(ours: Vec<Kernel>, peer: Option<&Peer>, shape: Shape, wanted: &Wanted) -> Vec<Candidate> {
    let chosen = tiles::chosen(&shape.problem());
    let mut candidates: Vec<Candidate> =
        ours.into_iter().map(|kernel| Candidate::Ours(Box::new(kernel), kernel == chosen)).collect();
    if peer.is_some() {
        let kernels = PeerTier::ALL.into_iter().filter_map(|tier| PeerKernel::of(tier, shape.dtype));
        candidates.extend(kernels.map(Candidate::Peer));
    }
    candidates.retain(|candidate| wanted.includes(&format!("{shape} {}", candidate.name())));
    candidates
}

/// Tensors of a shape in the types in use.
struct Data {
    inputs: Vec<(Dtype, [Memory; 3])>,
    /// One output for all, as large as the largest.
    out: Memory,
}

impl Data {
    fn new(gpu: &Gpu, shape: Shape, candidates: &[&Candidate]) -> Result<Self, DeviceError> {
        let used = |dtype: &Dtype| candidates.iter().any(|candidate| candidate.dtype() == *dtype);
        let inputs = [Dtype::F16, Dtype::Bf16, Dtype::F32].into_iter().filter(used).map(|dtype| {
            let mut random = Random(1);
            let mut upload = || gpu.upload(&Normals::new(dtype, shape.elements(), &mut random).bytes);
            Ok((dtype, [upload()?, upload()?, upload()?]))
        });
        Ok(Self { inputs: inputs.collect::<Result<_, _>>()?, out: gpu.poisoned(shape.elements() * 4)? })
    }

    fn of(&self, dtype: Dtype) -> &[Memory; 3] {
        &self.inputs.iter().find(|(candidate, _)| *candidate == dtype).expect("tensors of every type in use").1
    }

    fn prepare<'a>(
        &self,
        gpu: &Gpu,
        shape: Shape,
        candidate: &Candidate,
        program: &'a Program,
    ) -> Result<nvidia::Launch<'a>, DeviceError> {
        let [q, k, v] = self.of(candidate.dtype());
        match candidate {
            Candidate::Ours(kernel, _) => {
                let problem = shape.problem();
                let outputs = Outputs { out: problem.q, lse: None };
                let launch = Launch::new(&problem, kernel, &outputs).expect("the shape is within the limits");
                let (out, lse) = (&self.out, None);
                let tensors = Tensors { q, k, v, out, lse, offsets: None, alibi_slopes: None, bias: None, sinks: None };
                gpu.prepare(program, &launch.arguments(&tensors), launch.grid)
            }
            Candidate::Peer(kernel) => {
                let (sizes, factors) = (gpu.upload(&kernel.sizes(shape))?, gpu.upload(&peer::factors(shape))?);
                let arguments = [q, k, v, &self.out, &sizes, &factors, &factors].map(Argument::Buffer);
                gpu.prepare(program, &arguments, kernel.grid(shape))
            }
        }
    }
}

/// A row of a table.
struct Timed {
    name: String,
    group: Group,
    milliseconds: f64,
    tflops: f64,
    registers: usize,
    stack: usize,
    threadgroup: usize,
}

/// Candidates with their programs.
type Loaded = Vec<(Candidate, Program)>;

/// Translates and loads the candidates of a shape. Without a GPU there is nothing more to do.
fn load(
    programs: &Programs,
    peer: Option<&Peer>,
    shape: Shape,
    candidates: Vec<Candidate>,
) -> Result<Option<Loaded>, String> {
    let texts: Vec<programs::Kernel> = candidates.iter().map(|candidate| candidate.program(peer, shape)).collect();
    let Some(loaded) = programs.load(&texts)? else {
        for (candidate, text) in candidates.iter().zip(&texts) {
            println!("{} {shape} {}", programs.path(text).display(), candidate.name());
        }
        return Ok(None);
    };
    Ok(Some(candidates.into_iter().zip(loaded).collect()))
}

/// Leaves out what spills: such a tile says something about this GPU's registers alone.
fn without_spills(loaded: Loaded) -> Result<Loaded, String> {
    let mut kept = Vec::new();
    for (candidate, program) in loaded {
        let stack = program.stack_bytes()?;
        if stack > 0 && !candidate.is_scalar() && matches!(candidate, Candidate::Ours(..)) {
            println!("left out, {stack} bytes of registers spilled: {}", candidate.name());
        } else {
            kept.push((candidate, program));
        }
    }
    Ok(kept)
}

/// Our best tiles beside the kernels of 0.2.0; every tile that has a chance if `every`.
pub fn compare(programs: &Programs, peer: Option<&Peer>, every: bool, wanted: &Wanted) -> Result<(), String> {
    let mut results = Vec::new();
    for shape in Shape::all() {
        let problem = shape.problem();
        let ours = if every { tiles::all(&problem) } else { tiles::best(&problem) };
        let Some(loaded) = load(programs, peer, shape, candidates(ours, peer, shape, wanted))? else { continue };
        let Some(gpu) = programs.gpu.filter(|_| !loaded.is_empty()) else { continue };
        println!("\n{}: {shape}; medians of {ROUNDS} interleaved launches", gpu.name());
        let loaded = without_spills(loaded)?;
        let timed = measure(gpu, shape, &loaded).map_err(|error| error.to_string())?;
        print_table(&timed);
        results.push((shape, timed));
    }
    if let Some(gpu) = programs.gpu {
        print_summary(gpu, &results);
    }
    Ok(())
}

/// Launches each wanted kernel a few times, for a profiler to watch.
pub fn profile(programs: &Programs, peer: Option<&Peer>, wanted: &Wanted) -> Result<(), String> {
    let text = |error: DeviceError| error.to_string();
    for shape in Shape::all() {
        let ours = tiles::best(&shape.problem());
        let Some(loaded) = load(programs, peer, shape, candidates(ours, peer, shape, wanted))? else { continue };
        let Some(gpu) = programs.gpu.filter(|_| !loaded.is_empty()) else { continue };
        let candidates: Vec<&Candidate> = loaded.iter().map(|(candidate, _)| candidate).collect();
        let data = Data::new(gpu, shape, &candidates).map_err(text)?;
        for (candidate, program) in &loaded {
            println!("{shape} {}", candidate.name());
            let launch = data.prepare(gpu, shape, candidate, program).map_err(text)?;
            for _ in 0..PROFILED {
                launch.enqueue().map_err(text)?;
            }
            gpu.synchronize()?;
        }
    }
    Ok(())
}

fn measure(gpu: &Gpu, shape: Shape, loaded: &Loaded) -> Result<Vec<Timed>, DeviceError> {
    let failed = |reason| DeviceError::Dispatch { entry: "timing".to_owned(), reason };
    let candidates: Vec<&Candidate> = loaded.iter().map(|(candidate, _)| candidate).collect();
    let data = Data::new(gpu, shape, &candidates)?;
    let launches: Vec<nvidia::Launch<'_>> = loaded
        .iter()
        .map(|(candidate, program)| data.prepare(gpu, shape, candidate, program))
        .collect::<Result<_, _>>()?;
    agree(shape, &candidates, &launches, &data)?;
    let mut times = vec![Vec::new(); launches.len()];
    for round in 0..WARM_UP + ROUNDS {
        for ((launch, candidate), times) in launches.iter().zip(&candidates).zip(&mut times) {
            if candidate.is_scalar() && round >= WARM_UP + SLOW_ROUNDS {
                continue;
            }
            let milliseconds = gpu.time(|| launch.enqueue())?;
            if round >= WARM_UP {
                times.push(f64::from(milliseconds));
            }
        }
    }
    let timed = loaded.iter().zip(&mut times).map(|((candidate, program), times)| {
        times.sort_by(f64::total_cmp);
        let milliseconds = times[times.len() / 2];
        Ok(Timed {
            name: candidate.name(),
            group: candidate.group(),
            milliseconds,
            tflops: shape.flops() / milliseconds / 1e9,
            registers: program.registers().map_err(failed)?,
            stack: program.stack_bytes().map_err(failed)?,
            threadgroup: program.threadgroup_bytes().map_err(failed)?,
        })
    });
    timed.collect()
}

/// Nothing is timed that does not compute the same: outputs differ by rounding alone.
fn agree(
    shape: Shape,
    candidates: &[&Candidate],
    launches: &[nvidia::Launch<'_>],
    data: &Data,
) -> Result<(), DeviceError> {
    // The half and bfloat scores of 0.2.0 are good for about 2e-3 on these inputs.
    let tolerance = if shape.dtype == Dtype::F32 { 1e-4 } else { 1e-2 };
    let mut first: Option<Vec<f64>> = None;
    for (candidate, launch) in candidates.iter().zip(launches) {
        if candidate.dtype() != shape.dtype {
            continue;
        }
        data.out.poison()?;
        launch.enqueue()?;
        let bytes = data.out.download()?;
        let size = shape.dtype.size();
        // Every 1009th element: a prime, so that all columns take part.
        let values: Vec<f64> = bytes[..shape.elements() * size]
            .chunks_exact(size)
            .step_by(1009)
            .map(|bytes| decode(shape.dtype, bytes))
            .collect();
        let first = first.get_or_insert_with(|| values.clone());
        let difference = first.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        if difference > tolerance || values.iter().any(|value| !value.is_finite()) {
            let reason = format!("{}: differs by {difference:e} from {}", candidate.name(), candidates[0].name());
            return Err(DeviceError::Dispatch { entry: shape.to_string(), reason });
        }
    }
    Ok(())
}

/// The kernels of a shape, the fastest first, with their speed in units of that of each kernel of 0.2.0.
fn print_table(timed: &[Timed]) {
    let peers: Vec<(PeerTier, f64)> =
        PeerTier::ALL.iter().filter_map(|&tier| Some((tier, best_of(timed, Group::Peer(tier))?))).collect();
    let over = peers.iter().fold(String::new(), |text, (tier, _)| text + " over " + tier.name() + " |");
    println!("| kernel | ms | TFLOP/s |{over} registers | stack | threadgroup |");
    println!("| --- | --- | --- |{} --- | --- | --- |", " --- |".repeat(peers.len()));
    let mut order: Vec<&Timed> = timed.iter().collect();
    order.sort_by(|a, b| b.tflops.total_cmp(&a.tflops));
    for Timed { name, milliseconds, tflops, registers, stack, threadgroup, .. } in order {
        let over = peers.iter().fold(String::new(), |text, (_, peer)| text + &format!(" {:.2} |", tflops / peer));
        println!("| {name} | {milliseconds:.3} | {tflops:.2} |{over} {registers} | {stack} | {threadgroup} |");
    }
}

/// The largest TFLOP/s of a tier.
fn best_of(timed: &[Timed], group: Group) -> Option<f64> {
    timed.iter().filter(|timed| timed.group == group).map(|timed| timed.tflops).max_by(f64::total_cmp)
}

/// One line for each shape: the best of every tier, and the ratios that the goals are about.
fn print_summary(gpu: &Gpu, results: &[(Shape, Vec<Timed>)]) {
    const OURS: [Tier; 4] = [Tier::Tensorops, Tier::TensoropsStaged, Tier::Simdgroup, Tier::Scalar];
    let columns: Vec<(String, Group)> = OURS
        .map(|tier| (tier.name().to_owned(), Group::Ours(tier)))
        .into_iter()
        .chain(PeerTier::ALL.map(|tier| (tier.name().to_owned(), Group::Peer(tier))))
        .collect();
    let ratios = [
        (Group::Ours(Tier::Simdgroup), Group::Peer(PeerTier::V1)),
        (Group::Ours(Tier::Tensorops), Group::Peer(PeerTier::V2r)),
        (Group::Ours(Tier::Tensorops), Group::Peer(PeerTier::V2)),
        (Group::Ours(Tier::Tensorops), Group::Ours(Tier::Simdgroup)),
    ];
    let name_of = |group: Group| columns.iter().find(|column| column.1 == group).map_or("", |column| &column.0);
    println!("\n{}: TFLOP/s of the best kernel of each tier, and ratios\n", gpu.name());
    let heads = columns.iter().map(|(name, _)| name.clone());
    let heads = heads.chain(ratios.iter().map(|&(ours, other)| format!("{} / {}", name_of(ours), name_of(other))));
    println!("| shape | {} |", heads.collect::<Vec<_>>().join(" | "));
    println!("| --- |{}", " --- |".repeat(columns.len() + ratios.len()));
    for (shape, timed) in results {
        let speeds = columns.iter().map(|&(_, group)| best_of(timed, group));
        let quotients = ratios.iter().map(|&(ours, other)| Some(best_of(timed, ours)? / best_of(timed, other)?));
        let cell = |value: Option<f64>, digits| value.map_or_else(String::new, |value| format!("{value:.digits$}"));
        let cells: Vec<String> =
            speeds.map(|speed| cell(speed, 1)).chain(quotients.map(|quotient| cell(quotient, 2))).collect();
        println!("| {shape} | {} |", cells.join(" | "));
    }
}
