//! Runs the small problems of a kernel's probe on the simulator.

use half::{bf16, f16};
use mtlflashattn_core::{Dtype, Strides, TensorMeta};
use mtlflashattn_metal::probe::{Element, Memory, SmallAppend, SmallBackward, SmallProblem};
use mtlflashattn_metal::{
    AppendKernel, AppendLaunch, BackwardKernel, BackwardLaunch, BackwardOutputs, DecodeLaunch, Kernel, Launch,
    LseStrides, Outputs, Tensors,
};
use mtlflashattn_simulator::{Buffer, Launch as Dispatch};

use super::bench::{Bench, borrowed};
use super::decode::{self, Texts};

/// What is wrong with `source`, the text of `kernel` or a change of it, as its probe sees it.
pub fn probe(bench: &Bench, kernel: &Kernel, source: &str) -> Result<(), String> {
    let pipeline = bench.pipeline(source, kernel.entry()).map_err(|error| error.to_string())?;
    for small in SmallProblem::all(kernel).expect("problems for the kernel") {
        let SmallProblem { problem, tensors, .. } = &small;
        let out = TensorMeta { dtype: problem.dtype, shape: &tensors.out.shape, strides: &tensors.out.strides };
        let lse = tensors.lse.as_ref().map(|_| LseStrides::contiguous(problem));
        let outputs = Outputs { out: Strides::of(&out), lse };
        let launch = Launch::new(problem, kernel, &outputs).expect("a small problem");
        let buffers = buffers(tensors);
        let arguments = launch.arguments(&borrowed(&buffers));
        let run = bench.simulator().run(&pipeline, &arguments, &Dispatch::from(launch.grid));
        run.map_err(|error| error.to_string())?;
        let lse = buffers.lse.as_ref().map(|lse| decode(Dtype::F32, lse));
        if let Some(wrong) = small.judge(&decode(problem.dtype, &buffers.out), lse.as_deref()) {
            return Err(wrong);
        }
    }
    Ok(())
}

/// The same for the texts of a decode kernel and of its merge kernel.
pub fn probe_decode(bench: &Bench, kernel: &Kernel, texts: &Texts) -> Result<(), String> {
    for small in SmallProblem::all(kernel).expect("problems for the kernel") {
        let SmallProblem { problem, tensors, cache, splits, .. } = &small;
        let out = TensorMeta { dtype: problem.dtype, shape: &tensors.out.shape, strides: &tensors.out.strides };
        let lse = tensors.lse.as_ref().map(|_| LseStrides::contiguous(problem));
        let outputs = Outputs { out: Strides::of(&out), lse };
        let launch = DecodeLaunch::new(problem, kernel, &outputs, *splits).expect("a small problem");
        let (buffers, cache) = (buffers(tensors), cache.map(encode));
        decode::dispatch(bench, kernel, texts, &launch, borrowed(&buffers), cache.map(|buffer| buffer))?;
        let lse = buffers.lse.as_ref().map(|lse| decode(Dtype::F32, lse));
        if let Some(wrong) = small.judge(&decode(problem.dtype, &buffers.out), lse.as_deref()) {
            return Err(wrong);
        }
    }
    Ok(())
}

/// The same for an append kernel.
pub fn probe_append(bench: &Bench, kernel: AppendKernel, source: &str) -> Result<(), String> {
    let pipeline = bench.pipeline(source, kernel.entry()).map_err(|error| error.to_string())?;
    for small in SmallAppend::all(&kernel).expect("problems for the kernel") {
        let launch = AppendLaunch::new(&small.problem, &small.append, small.rotated()).expect("a small problem");
        let buffers = small.tensors.map(encode);
        let arguments = launch.arguments(&buffers.map(|buffer| buffer));
        let run = bench.simulator().run(&pipeline, &arguments, &Dispatch::from(launch.grid));
        run.map_err(|error| error.to_string())?;
        let results: Vec<Vec<f64>> =
            buffers.written().into_iter().map(|buffer| decode(small.problem.dtype, buffer)).collect();
        if let Some(wrong) = small.judge(&results) {
            return Err(wrong);
        }
    }
    Ok(())
}

/// The same for a kernel of the backward pass.
pub fn probe_backward(bench: &Bench, kernel: &BackwardKernel, source: &str) -> Result<(), String> {
    let pipeline = bench.pipeline(source, kernel.entry()).map_err(|error| error.to_string())?;
    for small in SmallBackward::all(kernel).expect("problems for the kernel") {
        let SmallBackward { problem, tensors, .. } = &small;
        let dtype = problem.dtype;
        let strides =
            |memory: &Memory| Strides::of(&TensorMeta { dtype, shape: &memory.shape, strides: &memory.strides });
        let outputs = BackwardOutputs::of(&tensors.map(strides));
        let launch = BackwardLaunch::new(problem, kernel, &outputs).expect("a small problem");
        let buffers = tensors.map(encode);
        let arguments = launch.arguments(&buffers.map(|buffer| buffer));
        let run = bench.simulator().run(&pipeline, &arguments, &Dispatch::from(launch.grid));
        run.map_err(|error| error.to_string())?;
        let dtype_of = |memory: &&Memory| if let Element::Float(dtype) = memory.element { dtype } else { Dtype::F32 };
        let dtypes = tensors.written(kernel.pass);
        let results: Vec<Vec<f64>> = dtypes
            .iter()
            .map(dtype_of)
            .zip(buffers.written(kernel.pass))
            .map(|(dtype, buffer)| decode(dtype, buffer))
            .collect();
        if let Some(wrong) = small.judge(&results) {
            return Err(wrong);
        }
    }
    Ok(())
}

fn buffers(tensors: &Tensors<Memory>) -> Tensors<Buffer> {
    let Tensors { q, k, v, out, lse, offsets, alibi_slopes, bias, sinks } = tensors;
    let optional = |memory: &Option<Memory>| memory.as_ref().map(encode);
    Tensors {
        q: encode(q),
        k: encode(k),
        v: encode(v),
        out: encode(out),
        lse: optional(lse),
        offsets: offsets.as_ref().map(|(query, key)| (encode(query), encode(key))),
        alibi_slopes: optional(alibi_slopes),
        bias: optional(bias),
        sinks: optional(sinks),
    }
}

/// The values in memory. Each must survive the conversion: answers are computed from the values themselves.
fn encode(memory: &Memory) -> Buffer {
    let values = &memory.values;
    let same = |x: f64, stored: f64| assert!(x.total_cmp(&stored).is_eq() || x.is_nan(), "{x} became {stored}");
    let buffer = match memory.element {
        Element::Float(Dtype::F32) => Buffer::from_slice(&converted(values, |x| x as f32, f64::from, same)),
        Element::Float(Dtype::F16) => Buffer::from_slice(&converted(values, f16::from_f64, f16::to_f64, same)),
        Element::Float(Dtype::Bf16) => Buffer::from_slice(&converted(values, bf16::from_f64, bf16::to_f64, same)),
        Element::Int32 => Buffer::from_slice(&converted(values, |x| x as i32, f64::from, same)),
        Element::Bool => Buffer::from_slice(&converted(values, |x| x as u8, f64::from, same)),
    };
    buffer.expect("memory")
}

fn converted<T: Copy>(
    values: &[f64],
    store: impl Fn(f64) -> T,
    load: impl Fn(T) -> f64,
    check: impl Fn(f64, f64),
) -> Vec<T> {
    let convert = |&x: &f64| {
        let stored = store(x);
        check(x, load(stored));
        stored
    };
    values.iter().map(convert).collect()
}

fn decode(dtype: Dtype, buffer: &Buffer) -> Vec<f64> {
    match dtype {
        Dtype::F32 => buffer.read::<f32>().into_iter().map(f64::from).collect(),
        Dtype::F16 => buffer.read::<f16>().into_iter().map(f16::to_f64).collect(),
        Dtype::Bf16 => buffer.read::<bf16>().into_iter().map(bf16::to_f64).collect(),
    }
}
