//! New keys and values written into long caches, and rotary embeddings, against float64: every element of both caches and
//! of the rotated queries, and what must not change bit by bit.

use mtlflashattn_core::reference::{AppendInputs, append as reference};
use mtlflashattn_core::{Append, Dtype, Pairs, Problem, Rotary, Strides};
use mtlflashattn_metal::probe::rotation_bound;
use mtlflashattn_metal::{AppendKernel, AppendLaunch, AppendTensors, DeviceError, RotaryTensors};
use mtlflashattn_simulator::nvidia::{Gpu, Memory, Program};

use crate::Wanted;
use crate::caches::{self, Buffers, Form, cache_with_holes};
use crate::programs::{self, Programs};
use crate::random::{Normals, Random, decode, encode};

/// A call that appends.
struct Case {
    /// The caches, with the new keys counted, and as many queries as there are new keys.
    caches: caches::Case,
    pairs: Option<Pairs>,
    repeats: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let caches::Case { dtype, queries, key_heads, head_dim, form, .. } = &self.caches;
        write!(
            f,
            "append {dtype} {queries} to {:?} H{}/{key_heads} D{head_dim} {form:?}",
            self.caches.keys,
            self.caches.query_heads()
        )?;
        if let Some(pairs) = self.pairs { write!(f, " rotary {pairs:?}") } else { Ok(()) }
    }
}

/// Lengths with the new keys.
fn cases(lengths: impl Fn(usize) -> Vec<usize>, repeats: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        for (new_len, form, pairs) in [
            (1, Form::Slots, None),
            (1, Form::Pages(256), Some(Pairs::Halves)),
            (32, Form::Pages(16), Some(Pairs::Neighbours)),
            (77, Form::Slots, Some(Pairs::Neighbours)),
        ] {
            cases.push(Case { caches: caches::case(dtype, new_len, &lengths(new_len), form), pairs, repeats });
        }
    }
    cases
}

/// What an append needs beside a device.
struct Run<'a> {
    case: &'a Case,
    problem: Problem,
    append: Append,
}

impl<'a> Run<'a> {
    fn new(case: &'a Case) -> Self {
        let caches::Case { queries: new_len, key_heads, head_dim, .. } = case.caches;
        let mut problem = case.caches.problem();
        let cache = problem.cache.as_mut().expect("a cache");
        cache.new_len = new_len;
        let (positions, heads) = ((cache.capacity() + new_len), key_heads as i64);
        let [dim, rows] = [head_dim, new_len].map(|size| size as i64);
        let strides = Strides { batch: rows * heads * dim, row: heads * dim, head: dim };
        let rotary = case.pairs.map(|pairs| Rotary {
            dim: head_dim / 2,
            pairs,
            positions,
            cos_stride: dim / 4,
            sin_stride: dim / 4,
            queries_advance: new_len > 1,
        });
        Self { case, problem, append: Append { k: strides, v: strides, rotary } }
    }

    fn kernel(&self) -> AppendKernel {
        AppendKernel::new(&self.problem, &self.append)
    }

    /// Positions that are filled before the call.
    fn buffers(&self) -> Buffers {
        let mut buffers = self.case.caches.buffers();
        for length in &mut buffers.lengths {
            *length -= self.case.caches.queries as i32;
        }
        buffers
    }
}

/// Runs appends to long caches, or to short ones; prints a line for each. Whether all of them are right.
pub fn run(programs: &Programs, long: bool, wanted: &Wanted) -> Result<bool, String> {
    let mut cases = if long {
        cases(|new_len| vec![16_000 + new_len, new_len, 4097 + new_len], 3)
    } else {
        cases(|new_len| vec![300 + new_len, new_len], 1)
    };
    cases.retain(|case| wanted.includes(&case.to_string()));
    let runs: Vec<Run<'_>> = cases.iter().map(Run::new).collect();
    let program = |run: &Run<'_>| programs::Kernel { source: run.kernel().source(), entry: run.kernel().entry() };
    let texts: Vec<programs::Kernel> = runs.iter().map(program).collect();
    let (Some(loaded), Some(gpu)) = (programs.load(&texts)?, programs.gpu) else { return Ok(true) };
    println!("append on {}: error / bound of all rotated elements; everything else must be equal", gpu.name());
    let mut all_right = true;
    for (run, program) in runs.iter().zip(&loaded) {
        let (right, text) = match check(gpu, program, run) {
            Ok(ratio) => (ratio <= 1.0, format!("{ratio:.3}")),
            Err(message) => (false, message),
        };
        all_right &= right;
        println!("{} {}: {text}", if right { "ok  " } else { "FAIL" }, run.case);
    }
    Ok(all_right)
}

/// Largest error in units of its bound.
fn check(gpu: &Gpu, program: &Program, run: &Run<'_>) -> Result<f64, String> {
    let text = |error: DeviceError| error.to_string();
    let caches::Case { dtype, queries: new_len, key_heads, head_dim, .. } = run.case.caches;
    let (batch, heads) = (run.case.caches.keys.len(), run.case.caches.query_heads());
    let buffers = run.buffers();
    let mut random = Random(0xadd);
    let [new_keys, new_values] =
        [(); 2].map(|()| Normals::new(dtype, batch * new_len * key_heads * head_dim, &mut random));
    let q = Normals::new(dtype, batch * new_len * heads * head_dim, &mut random);
    // New keys go where nothing is yet.
    let [keys, values] =
        [(); 2].map(|()| cache_with_holes(&run.case.caches, &run.problem, &buffers, new_len, &mut random));
    let angles = run.append.rotary.map_or(0, |rotary| rotary.positions * rotary.dim / 2);
    let [cos, sin] = [f64::cos, f64::sin].map(|turn| Numbers::new(dtype, (0..angles).map(|at| turn(at as f64 * 0.37))));
    let upload = |bytes: &[u8]| gpu.upload(bytes).map_err(text);
    let [key_memory, value_memory] = [upload(&keys.bytes)?, upload(&values.bytes)?];
    let tensors = AppendTensors {
        new_keys: upload(&new_keys.bytes)?,
        new_values: upload(&new_values.bytes)?,
        key_cache: key_memory,
        value_cache: value_memory,
        rotary: match run.append.rotary {
            Some(_) => Some(RotaryTensors {
                q: upload(&q.bytes)?,
                rotated: gpu.poisoned(q.bytes.len()).map_err(text)?,
                query_offsets: None,
                cos: upload(&cos.bytes)?,
                sin: upload(&sin.bytes)?,
            }),
            None => None,
        },
        cache: buffers.upload(gpu).map_err(text)?,
    };
    let launch = AppendLaunch::new(&run.problem, &run.append, run.problem.q).expect("within the limits");
    let launched = || -> Result<Vec<Vec<u8>>, DeviceError> {
        let arguments = tensors.map(|memory| memory);
        gpu.prepare(program, &launch.arguments(&arguments), launch.grid)?.enqueue()?;
        tensors.written().into_iter().map(Memory::download).collect()
    };
    let results = launched().map_err(text)?;
    for repeat in 0..run.case.repeats {
        if launched().map_err(text)? != results {
            return Err(format!("launch {} differs from the first", repeat + 2));
        }
    }
    let [mut exact_q, mut exact_keys, mut exact_values] = [&q, &keys, &values].map(|tensor| tensor.exact.clone());
    let inputs = AppendInputs {
        k: &new_keys.exact,
        v: &new_values.exact,
        cos: &cos.exact,
        sin: &sin.exact,
        query_offsets: &[],
        cache: buffers.host(),
    };
    reference(&run.problem, &run.append, &inputs, &mut exact_q, &mut exact_keys, &mut exact_values);
    // cos and sin are at most 1.
    let largest = |values: &[f64]| values.iter().fold(0.0, |most: f64, value| value.abs().max(most)).sqrt();
    let mut worst = compare(dtype, "k_cache", &keys.bytes, &results[0], &exact_keys, largest(&new_keys.exact))?;
    worst = worst.max(compare(dtype, "v_cache", &values.bytes, &results[1], &exact_values, 0.0)?);
    if let Some(rotated) = results.get(2) {
        let before = encode(dtype, f64::NAN).0.repeat(q.exact.len());
        worst = worst.max(compare(dtype, "q", &before, rotated, &exact_q, largest(&q.exact))?);
    }
    Ok(worst)
}

/// Numbers in memory, and as float64.
struct Numbers {
    bytes: Vec<u8>,
    exact: Vec<f64>,
}

impl Numbers {
    fn new(dtype: Dtype, values: impl Iterator<Item = f64>) -> Self {
        let (bytes, exact): (Vec<Vec<u8>>, Vec<f64>) = values.map(|value| encode(dtype, value)).unzip();
        Self { bytes: bytes.concat(), exact }
    }
}

/// Largest error in units of its bound of the elements that changed; elements whose exact value is that from before must
/// have the same bits.
fn compare(dtype: Dtype, name: &str, before: &[u8], got: &[u8], exact: &[f64], most: f64) -> Result<f64, String> {
    let size = dtype.size();
    let mut worst: f64 = 0.0;
    for (at, ((before, got), &exact)) in before.chunks_exact(size).zip(got.chunks_exact(size)).zip(exact).enumerate() {
        let (old, new) = (decode(dtype, before), decode(dtype, got));
        let is_untouched = exact.is_nan() || old.total_cmp(&exact).is_eq();
        let error = (new - exact).abs();
        let is_wrong = if is_untouched { before != got } else { error.is_nan() };
        if is_wrong {
            return Err(format!("{name}[{at}] is {new:e}, was {old:e}, and should be {exact:e}"));
        }
        if !is_untouched && error > 0.0 {
            worst = worst.max(error / rotation_bound(dtype, exact, most));
        }
    }
    Ok(worst)
}
