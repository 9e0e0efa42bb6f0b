//! Speed of kernels that all took the same way, measured in turn: one launch of each, again and again, medians.

use mtlflashattn_core::plan::{MetalTile, QueryHome};
use mtlflashattn_core::{Dtype, Options, Problem, TensorMeta};
use mtlflashattn_metal::{Argument, Kernel, Launch, Outputs, Tensors};
use mtlflashattn_simulator::nvidia::{self, Gpu, Memory, Program};
use mtlflashattn_simulator::ptx::FloatProducts;

use crate::numerics::{direct, staged};
use crate::peer::{self, Peer, Shape};
use crate::programs::{self, Programs};
use crate::random::{Normals, Random, decode};

const ROUNDS: usize = 21;

/// The shapes of the table.
fn shapes() -> Vec<Shape> {
    let shape = |head_dim, causal| Shape { batch: 4, heads: 16, len: 2048, head_dim, causal };
    vec![shape(64, false), shape(64, true), shape(128, false), shape(128, true)]
}

/// What is timed.
#[derive(Clone)]
enum Candidate {
    Ours(Box<Kernel>),
    Peer(&'static str),
}

impl Candidate {
    fn name(&self) -> String {
        match self {
            Self::Ours(kernel) if kernel.head_dim.is_some() => kernel.tile.to_string(),
            Self::Ours(_) => "scalar".to_owned(),
            Self::Peer(entry) => format!("0.2.0 {entry}"),
        }
    }

    fn program(&self, peer: Option<&Peer>) -> programs::Kernel {
        let (source, entry) = match self {
            Self::Ours(kernel) => (kernel.source(), kernel.entry()),
            Self::Peer(entry) => (peer.map_or_else(String::new, |peer| peer.text.clone()), *entry),
        };
        programs::Kernel { source, entry, float_products: FloatProducts::Split }
    }

    /// The scalar kernel of 0.2.0 takes float32.
    fn dtype(&self) -> Dtype {
        if matches!(self, Self::Peer(Peer::SCALAR)) { Dtype::F32 } else { Dtype::F16 }
    }

    fn is_slow(&self) -> bool {
        match self {
            Self::Ours(kernel) => kernel.head_dim.is_none(),
            Self::Peer(entry) => *entry == Peer::SCALAR,
        }
    }
}

fn problem(shape: Shape) -> Problem {
    let [batch, heads, len, dim] = [shape.batch, shape.heads, shape.len, shape.head_dim].map(|size| size as i64);
    let (sizes, strides) = ([batch, len, heads, dim], [heads * len * dim, dim, len * dim, 1]);
    let meta = || TensorMeta { dtype: Dtype::F16, shape: &sizes, strides: &strides };
    let options = Options { causal: shape.causal, window: (-1, -1), ..Options::default() };
    Problem::dense(meta(), meta(), meta(), &options).expect("the shape is valid")
}

/// Tensors of a shape in both types.
struct Data {
    inputs: Vec<(Dtype, [Memory; 3])>,
    /// One output for all, as large as the largest.
    out: Memory,
}

impl Data {
    fn new(gpu: &Gpu, shape: Shape, dtypes: &[Dtype]) -> Result<Self, String> {
        let count = shape.batch * shape.heads * shape.len * shape.head_dim;
        let inputs = dtypes.iter().map(|&dtype| {
            let mut random = Random(1);
            let mut upload =
                || gpu.upload(&Normals::new(dtype, count, &mut random).bytes).map_err(|error| error.to_string());
            Ok((dtype, [upload()?, upload()?, upload()?]))
        });
        let inputs = inputs.collect::<Result<_, String>>()?;
        let out = gpu.poisoned(count * 4).map_err(|error| error.to_string())?;
        Ok(Self { inputs, out })
    }

    fn of(&self, dtype: Dtype) -> &[Memory; 3] {
        &self.inputs.iter().find(|(candidate, _)| *candidate == dtype).expect("tensors of every type in use").1
    }
}

struct Timed {
    name: String,
    milliseconds: f64,
    tflops: f64,
    registers: usize,
    stack: usize,
    threadgroup: usize,
}

/// Our best tiles beside the kernels of 0.2.0.
pub fn compare(programs: &Programs, peer: Option<&Peer>) -> Result<(), String> {
    for shape in shapes() {
        let problem = problem(shape);
        let dim = shape.head_dim;
        let tiles = [staged(4, 1, 32, dim), staged(4, 2, 16, dim), direct(4, 1, 16, dim), direct(4, 2, 16, dim)];
        let mut candidates = vec![Candidate::Ours(Box::new(Kernel::scalar(&problem, false)))];
        candidates.extend(
            tiles.map(|tile| {
                Candidate::Ours(Box::new(Kernel::simdgroup(&problem, tile, false).aligned(&problem, [0; 3])))
            }),
        );
        if peer.is_some() {
            candidates.extend([Candidate::Peer(Peer::SCALAR), Candidate::Peer(Peer::SIMDGROUP)]);
        }
        report(programs, peer, shape, &candidates)?;
    }
    Ok(())
}

/// Every tile that has a chance.
pub fn tiles(programs: &Programs, peer: Option<&Peer>) -> Result<(), String> {
    for shape in shapes() {
        let problem = problem(shape);
        let mut candidates: Vec<Candidate> = candidate_tiles(shape.head_dim)
            .into_iter()
            .map(|tile| Kernel::simdgroup(&problem, tile, false).aligned(&problem, [0; 3]))
            .filter(Kernel::fits)
            .map(|kernel| Candidate::Ours(Box::new(kernel)))
            .collect();
        if peer.is_some() {
            candidates.push(Candidate::Peer(Peer::SIMDGROUP));
        }
        report(programs, peer, shape, &candidates)?;
    }
    Ok(())
}

fn candidate_tiles(head_dim: usize) -> Vec<MetalTile> {
    let mut tiles = Vec::new();
    for row_fragments in [1, 2] {
        for keys in [8, 16, 32, 64] {
            if keys * row_fragments <= 64 {
                tiles.push(direct(4, row_fragments, keys, head_dim));
                tiles.push(staged(4, row_fragments, keys, head_dim));
            }
        }
    }
    for simdgroups in [1, 2, 8] {
        tiles.push(direct(simdgroups, 1, 16, head_dim));
        tiles.push(staged(simdgroups, 1, 32, head_dim));
    }
    tiles.push(staged(8, 2, 32, head_dim));
    for tile in [direct(4, 1, 16, head_dim), staged(4, 1, 32, head_dim), staged(4, 2, 32, head_dim)] {
        tiles.push(MetalTile { query: QueryHome::Threadgroup, ..tile });
    }
    tiles
}

fn report(programs: &Programs, peer: Option<&Peer>, shape: Shape, candidates: &[Candidate]) -> Result<(), String> {
    let texts: Vec<programs::Kernel> = candidates.iter().map(|candidate| candidate.program(peer)).collect();
    let loaded = programs.load(&texts)?;
    let (Some(loaded), Some(gpu)) = (loaded, programs.gpu) else {
        for (candidate, text) in candidates.iter().zip(&texts) {
            println!("{} D{} {}", programs.path(text).display(), shape.head_dim, candidate.name());
        }
        return Ok(());
    };
    let mut timed = measure(gpu, shape, candidates, &loaded)?;
    let Shape { batch, heads, len, head_dim, causal } = shape;
    println!(
        "\n{}: B{batch} H{heads} L{len} D{head_dim} fp16{}; medians of {ROUNDS} interleaved launches",
        gpu.name(),
        if causal { " causal" } else { "" }
    );
    let baseline = timed.iter().find(|timed| timed.name.ends_with(Peer::SIMDGROUP)).map(|timed| timed.tflops);
    timed.sort_by(|a, b| b.tflops.total_cmp(&a.tflops));
    println!("| kernel | ms | TFLOP/s | over {} | registers | stack | threadgroup |", Peer::SIMDGROUP);
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for Timed { name, milliseconds, tflops, registers, stack, threadgroup } in timed {
        let over = baseline.map_or_else(String::new, |baseline| format!("{:.2}", tflops / baseline));
        println!("| {name} | {milliseconds:.3} | {tflops:.2} | {over} | {registers} | {stack} | {threadgroup} |");
    }
    Ok(())
}

fn measure(gpu: &Gpu, shape: Shape, candidates: &[Candidate], loaded: &[Program]) -> Result<Vec<Timed>, String> {
    let text = |error: mtlflashattn_metal::DeviceError| error.to_string();
    let problem = problem(shape);
    let dtypes: Vec<Dtype> =
        [Dtype::F16, Dtype::F32].into_iter().filter(|&dtype| candidates.iter().any(|it| it.dtype() == dtype)).collect();
    let data = Data::new(gpu, shape, &dtypes)?;
    let [sizes, factors] = [Peer::SCALAR, Peer::SIMDGROUP]
        .map(|entry| (gpu.upload(&peer::sizes(entry, shape)), gpu.upload(&peer::factors(shape))))
        .map(|(sizes, factors)| sizes.and_then(|sizes| factors.map(|factors| (sizes, factors))).map_err(text));
    let lists = [sizes?, factors?];
    let mut launches: Vec<nvidia::Launch<'_>> = Vec::new();
    for (candidate, program) in candidates.iter().zip(loaded) {
        let [q, k, v] = data.of(candidate.dtype());
        launches.push(match candidate {
            Candidate::Ours(kernel) => {
                let outputs = Outputs { out: problem.q, lse: None };
                let launch = Launch::new(&problem, kernel, &outputs).map_err(|error| error.to_string())?;
                let tensors = Tensors {
                    q,
                    k,
                    v,
                    out: &data.out,
                    lse: None,
                    offsets: None,
                    alibi_slopes: None,
                    bias: None,
                    sinks: None,
                };
                gpu.prepare(program, &launch.arguments(&tensors), launch.grid).map_err(text)?
            }
            Candidate::Peer(entry) => {
                let (sizes, factors) = &lists[usize::from(*entry == Peer::SIMDGROUP)];
                let arguments = [q, k, v, &data.out, sizes, factors, factors].map(Argument::Buffer);
                gpu.prepare(program, &arguments, peer::grid(entry, shape)).map_err(text)?
            }
        });
    }
    agree(candidates, &launches, &data)?;
    let mut times = vec![Vec::new(); launches.len()];
    for round in 0..ROUNDS + 2 {
        for ((launch, candidate), times) in launches.iter().zip(candidates).zip(&mut times) {
            if candidate.is_slow() && round > 4 {
                continue;
            }
            let milliseconds = gpu.time(|| launch.enqueue()).map_err(text)?;
            if round >= 2 {
                times.push(f64::from(milliseconds));
            }
        }
    }
    let pairs = (shape.len * shape.len) as f64 * if shape.causal { 0.5 } else { 1.0 };
    let flops = 4.0 * (shape.batch * shape.heads * shape.head_dim) as f64 * pairs;
    candidates
        .iter()
        .zip(loaded)
        .zip(&mut times)
        .map(|((candidate, program), times)| {
            times.sort_by(f64::total_cmp);
            let milliseconds = times[times.len() / 2];
            Ok(Timed {
                name: candidate.name(),
                milliseconds,
                tflops: flops / milliseconds / 1e9,
                registers: program.registers()?,
                stack: program.stack_bytes()?,
                threadgroup: program.threadgroup_bytes()?,
            })
        })
        .collect()
}

/// Nothing is timed that does not compute the same: outputs differ by rounding alone.
fn agree(candidates: &[Candidate], launches: &[nvidia::Launch<'_>], data: &Data) -> Result<(), String> {
    let mut first: Option<Vec<f64>> = None;
    for (candidate, launch) in candidates.iter().zip(launches) {
        if candidate.dtype() == Dtype::F32 {
            continue;
        }
        data.out.poison().map_err(|error| error.to_string())?;
        launch.enqueue().map_err(|error| error.to_string())?;
        let bytes = data.out.download().map_err(|error| error.to_string())?;
        // Every 1009th element: a prime, so that all columns take part.
        let half = bytes.len() / 2;
        let values: Vec<f64> =
            bytes[..half].chunks_exact(2).step_by(1009).map(|bytes| decode(Dtype::F16, bytes)).collect();
        let first = first.get_or_insert_with(|| values.clone());
        let difference = first.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let finite = values.iter().all(|value| value.is_finite());
        // The half accumulators of 0.2.0 are good for about 2e-3 on these inputs.
        if difference > 1e-2 || !finite {
            return Err(format!("{}: differs by {difference:e} from {}", candidate.name(), candidates[0].name()));
        }
    }
    Ok(())
}
