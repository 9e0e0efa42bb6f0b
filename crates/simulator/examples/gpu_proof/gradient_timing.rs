//! Speed of the backward pass beside our forward pass, all kernels launched in turn.
//!
//! Both passes count the products of the definition: 4 B H L^2 D operations forward and 2.5 times as many backward (Dao,
//! "FlashAttention-2", 2023, section 4.1), half of both where causal. The kernels make 3.5 times as many.

use mtlflashattn_core::Dtype;
use mtlflashattn_core::plan::{BackwardPass, BackwardTile, MetalTile, QueryHome};
use mtlflashattn_metal::{
    BackwardKernel, BackwardLaunch, BackwardTensors, DeviceError, Kernel, Launch, LseStrides, Outputs, Tensors,
};
use mtlflashattn_simulator::nvidia::{self, Gpu, Memory, Program};

use crate::gradients::{CHIPS, outputs, planned, program};
use crate::programs::{self, Programs};
use crate::random::{Normals, Random};
use crate::shape::Shape;
use crate::{Wanted, tiles};

/// Launches that count, and launches before them.
const ROUNDS: usize = 15;
const WARM_UP: usize = 2;
/// Operations of the backward pass in units of the forward pass.
const BACKWARD_WORK: f64 = 2.5;

/// What is timed.
#[derive(Clone, Copy)]
enum Timed {
    Forward(Kernel),
    Backward(BackwardKernel),
}

impl Timed {
    fn name(&self) -> String {
        match self {
            Self::Forward(kernel) => format!("forward, {}", tiles::name(kernel)),
            Self::Backward(kernel) => format!("{}: {}", kernel.pass.name(), kernel.tile),
        }
    }

    fn program(&self) -> programs::Kernel {
        match self {
            Self::Forward(kernel) => programs::Kernel { source: kernel.source(), entry: kernel.entry() },
            Self::Backward(kernel) => program(kernel),
        }
    }

    /// `None` for the forward pass.
    fn pass(&self) -> Option<BackwardPass> {
        if let Self::Backward(kernel) = self { Some(kernel.pass) } else { None }
    }
}

const fn tile(simdgroups: usize, row_fragments: usize, block: usize, staged: bool, chunk: usize) -> BackwardTile {
    BackwardTile { simdgroups, row_fragments, block, staged, chunk, own: QueryHome::Registers }
}

const fn parked(tile: BackwardTile) -> BackwardTile {
    BackwardTile { own: QueryHome::Threadgroup, ..tile }
}

/// The planner's kernels, and tiles that may suit this GPU better.
fn candidates(shape: Shape) -> Vec<Timed> {
    let (problem, dim) = (shape.problem(), shape.head_dim);
    let mut pairs: Vec<(BackwardPass, BackwardTile)> =
        CHIPS.into_iter().flat_map(|chip| planned(&problem, chip)).collect();
    let query =
        [tile(8, 2, 16, true, dim), tile(8, 2, 32, true, dim), tile(8, 1, 32, true, dim), tile(4, 2, 16, false, dim)];
    let keys = [
        tile(8, 1, 16, true, dim),
        tile(8, 1, 32, true, dim),
        tile(4, 1, 16, false, dim),
        parked(tile(8, 1, 16, true, dim)),
        parked(tile(4, 2, 16, true, dim)),
    ];
    pairs.extend(query.map(|tile| (BackwardPass::Query, tile)));
    pairs.extend(keys.map(|tile| (BackwardPass::KeysAndValues, tile)));
    let mut kernels: Vec<BackwardKernel> = Vec::new();
    for (pass, tile) in pairs {
        let kernel = BackwardKernel::new(pass, &problem, tile, false).aligned(&problem, &outputs(&problem), [0; 5]);
        if kernel.fits() && !kernels.contains(&kernel) {
            kernels.push(kernel);
        }
    }
    let forward = |simdgroups, row_fragments, keys, staged| {
        let tile = MetalTile { simdgroups, row_fragments, keys, staged, value_chunk: dim, query: QueryHome::Registers };
        Kernel::simdgroup(&problem, tile, true).aligned(&problem, [0; 3])
    };
    let forward = [forward(8, 2, 32, true), forward(4, 2, 16, false)].map(Timed::Forward);
    forward.into_iter().chain(kernels.into_iter().map(Timed::Backward)).collect()
}

/// Tensors of a shape.
struct Data {
    tensors: BackwardTensors<Memory>,
}

impl Data {
    fn new(gpu: &Gpu, shape: Shape) -> Result<Self, DeviceError> {
        let mut random = Random(1);
        let mut upload = || gpu.upload(&Normals::new(shape.dtype, shape.elements(), &mut random).bytes);
        let blank = || gpu.poisoned(shape.elements() * shape.dtype.size());
        let rows = shape.elements() / shape.head_dim;
        let tensors = BackwardTensors {
            q: upload()?,
            k: upload()?,
            v: upload()?,
            out: blank()?,
            lse: gpu.poisoned(rows * 4)?,
            offsets: None,
            alibi_slopes: None,
            bias: None,
            d_out: upload()?,
            d_lse: None,
            states: gpu.poisoned(rows * 8)?,
            d_query: Some(blank()?),
            d_key: Some(blank()?),
            d_value: Some(blank()?),
        };
        Ok(Self { tensors })
    }

    fn prepare<'a>(
        &self,
        gpu: &Gpu,
        shape: Shape,
        timed: &Timed,
        program: &'a Program,
    ) -> Result<nvidia::Launch<'a>, DeviceError> {
        let (problem, tensors) = (shape.problem(), &self.tensors);
        match timed {
            Timed::Forward(kernel) => {
                let outputs = Outputs { out: problem.q, lse: Some(LseStrides::contiguous(&problem)) };
                let launch = Launch::new(&problem, kernel, &outputs).expect("the shape is within the limits");
                let BackwardTensors { q, k, v, out, lse, .. } = tensors;
                let (offsets, lse) = (None, Some(lse));
                let tensors = Tensors { q, k, v, out, lse, offsets, alibi_slopes: None, bias: None, sinks: None };
                gpu.prepare(program, &launch.arguments(&tensors), launch.grid)
            }
            Timed::Backward(kernel) => {
                let launch = BackwardLaunch::new(&problem, kernel, &outputs(&problem)).expect("within the limits");
                gpu.prepare(program, &launch.arguments(&tensors.map(|memory| memory)), launch.grid)
            }
        }
    }
}

/// Shapes of the tables: those of the forward pass in half precision, one longer sequence, and two with dropout.
fn shapes() -> Vec<Shape> {
    let mut shapes: Vec<Shape> = Shape::all().into_iter().filter(|shape| shape.dtype == Dtype::F16).collect();
    let whole = |batch, len, head_dim, dropout| Shape {
        batch,
        heads: 16,
        len,
        head_dim,
        dtype: Dtype::F16,
        causal: false,
        dropout,
    };
    shapes.push(whole(1, 8192, 64, 0.0));
    shapes.extend([whole(4, 2048, 64, 0.1), whole(4, 2048, 128, 0.1)]);
    shapes
}

/// Times the kernels of each shape and prints a table; without a GPU they are only translated.
pub fn compare(programs: &Programs, wanted: &Wanted) -> Result<(), String> {
    let mut summary = Vec::new();
    for shape in shapes() {
        let mut candidates = candidates(shape);
        candidates.retain(|timed| wanted.includes(&format!("{shape} {}", timed.name())));
        let texts: Vec<programs::Kernel> = candidates.iter().map(Timed::program).collect();
        let (Some(loaded), Some(gpu)) = (programs.load(&texts)?, programs.gpu) else { continue };
        println!("\n{}: {shape}; medians of {ROUNDS} interleaved launches", gpu.name());
        let times = measure(gpu, shape, &candidates, &loaded).map_err(|error| error.to_string())?;
        println!("| kernel | ms | registers | stack | threadgroup |\n| --- | --- | --- | --- | --- |");
        let mut rows = Vec::new();
        for ((timed, program), milliseconds) in candidates.iter().zip(&loaded).zip(times) {
            let (registers, stack) = (program.registers()?, program.stack_bytes()?);
            let threadgroup = program.threadgroup_bytes()?;
            println!("| {} | {milliseconds:.3} | {registers} | {stack} | {threadgroup} |", timed.name());
            rows.push((*timed, milliseconds));
        }
        summary.push((shape, rows));
    }
    print_summary(&summary);
    Ok(())
}

fn measure(gpu: &Gpu, shape: Shape, candidates: &[Timed], loaded: &[Program]) -> Result<Vec<f64>, DeviceError> {
    let data = Data::new(gpu, shape)?;
    let launches: Vec<nvidia::Launch<'_>> = candidates
        .iter()
        .zip(loaded)
        .map(|(timed, program)| data.prepare(gpu, shape, timed, program))
        .collect::<Result<_, _>>()?;
    let mut times = vec![Vec::new(); launches.len()];
    // The forward kernels come first and delta before what reads it, so that every launch has real inputs.
    for round in 0..WARM_UP + ROUNDS {
        for (launch, times) in launches.iter().zip(&mut times) {
            let milliseconds = gpu.time(|| launch.enqueue())?;
            if round >= WARM_UP {
                times.push(f64::from(milliseconds));
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(times.into_iter().map(median).collect())
}

/// A line for each shape: the forward pass, the backward pass with the tiles of each chip and with the best ones here.
fn print_summary(results: &[(Shape, Vec<(Timed, f64)>)]) {
    if results.is_empty() {
        return;
    }
    println!(
        "\nbackward relative to forward; TFLOP/s by the products of the definition, {BACKWARD_WORK} times as many\n"
    );
    println!("| shape | forward, ms | TFLOP/s | backward, tiles of | ms | TFLOP/s | of the forward's |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (shape, rows) in results {
        let best = |pass: Option<BackwardPass>| {
            rows.iter().filter(|(timed, _)| timed.pass() == pass).map(|&(_, time)| time).min_by(f64::total_cmp)
        };
        let Some(forward) = best(None) else { continue };
        let of_chip = |chip| -> Option<f64> {
            let time = |(pass, tile): (BackwardPass, BackwardTile)| {
                let is_it = |timed: &Timed| matches!(timed, Timed::Backward(kernel) if (kernel.pass, kernel.tile) == (pass, tile));
                rows.iter().find(|(timed, _)| is_it(timed)).map(|&(_, time)| time)
            };
            planned(&shape.problem(), chip).into_iter().map(time).sum()
        };
        let passes = [BackwardPass::Delta, BackwardPass::Query, BackwardPass::KeysAndValues];
        let best_of_all = passes.into_iter().map(|pass| best(Some(pass))).sum::<Option<f64>>();
        let speed = |work: f64, time: f64| work * shape.flops() / time / 1e9;
        let columns = CHIPS.into_iter().map(|chip| (chip, of_chip(chip))).chain([("the best here", best_of_all)]);
        for (tiles, time) in columns {
            let Some(time) = time else { continue };
            let (ours, of_forward) = (speed(BACKWARD_WORK, time), speed(1.0, forward));
            println!(
                "| {shape} | {forward:.3} | {of_forward:.1} | {tiles} | {time:.3} | {ours:.1} | {:.2} |",
                ours / of_forward
            );
        }
    }
}
