//! New keys for a cache, and rotary embeddings.

use mtlflashattn_core::reference::{AppendInputs, append as reference};
use mtlflashattn_core::{Append, Dtype, Pairs, Rotary, Strides};
use mtlflashattn_metal::probe::rotation_bound;
use mtlflashattn_metal::{AppendKernel, AppendLaunch, AppendTensors, RotaryTensors};
use mtlflashattn_simulator::{Buffer, Launch as Dispatch, Report};

use super::bench::Bench;
use super::cached::CacheForm;
use super::{Case, Order, Random, Run, Tensor, bytes_i32, decode, extent, hole, positions, strides};

/// What there is beside a case of attention.
#[derive(Clone, Copy, Debug)]
pub struct AppendForm {
    pub name: &'static str,
    pub cache: CacheForm,
    pub pairs: Option<Pairs>,
    pub queries_advance: bool,
}

/// A call that appends, with its data.
pub struct AppendRun {
    pub run: Run,
    pub append: Append,
    case: Case,
    new_keys: Tensor,
    new_values: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotated_strides: [i64; 4],
}

/// The caches and the rotated queries as bytes.
pub struct Appended {
    pub key_cache: Vec<u8>,
    pub value_cache: Vec<u8>,
    pub rotated: Vec<u8>,
}

fn of(strides: &[i64]) -> Strides {
    match *strides {
        [batch, row, head, _] => Strides { batch, row, head },
        _ => unreachable!("four dimensions"),
    }
}

impl AppendRun {
    pub fn new(case: &Case, form: AppendForm) -> Self {
        let run = Run::cached(case, form.cache);
        let mut random = Random::new(case.seed ^ 0x0a99_e4d5);
        let cache = run.problem.cache.expect("a cache");
        let apart = Case { packed: false, ..case.clone() };
        let mut tensor = |sizes: [usize; 4]| Tensor::new(&apart, sizes, || 2.0 * random.uniform());
        let batch = case.lengths.len();
        let new_keys = tensor([batch, cache.new_len, case.key_heads, case.head_dim]);
        let new_values = tensor([batch, cache.new_len, case.key_heads, case.value_dim]);
        let dim = case.head_dim / 2 / 2 * 2;
        let rows = cache.capacity() + run.problem.lengths.max_query_len();
        let [cos, sin] = [(); 2].map(|()| tensor([1, rows, 1, dim / 2]));
        let rotary = form.pairs.map(|pairs| Rotary {
            dim,
            pairs,
            positions: rows,
            cos_stride: cos.strides[1],
            sin_stride: sin.strides[1],
            queries_advance: form.queries_advance,
        });
        let append = Append { k: of(&new_keys.strides), v: of(&new_values.strides), rotary };
        let [outer, query_rows, heads, _] = run.out_sizes;
        // Not as q lies.
        let order = if case.order == Order::RowMajor { Order::HeadMajor } else { Order::RowMajor };
        let rotated_strides = strides(order, 0, [outer, query_rows, heads, case.head_dim]);
        Self { run, append, case: case.clone(), new_keys, new_values, cos, sin, rotated_strides }
    }

    fn query_sizes(&self) -> [usize; 4] {
        let [outer, rows, heads, _] = self.run.out_sizes;
        [outer, rows, heads, self.case.head_dim]
    }

    fn rotated(&self) -> Strides {
        Strides { batch: if self.case.packed { 0 } else { self.rotated_strides[0] }, ..of(&self.rotated_strides) }
    }

    pub fn kernel(&self) -> AppendKernel {
        AppendKernel::new(&self.run.problem, &self.append)
    }

    /// Runs `source`, the text of [`Self::kernel`] or a change of it.
    ///
    /// # Errors
    /// Whatever the compiler or the simulator found wrong.
    pub fn launch(&self, bench: &Bench, source: &str) -> Result<(Appended, Report), String> {
        let pipeline = bench.pipeline(source, self.kernel().entry()).map_err(|error| error.to_string())?;
        let launch = AppendLaunch::new(&self.run.problem, &self.append, self.rotated()).expect("a small problem");
        let buffer = |bytes: &Vec<u8>| Buffer::from_slice(bytes).expect("memory");
        let cache = self.run.cache_tensors().map(buffer);
        let [new_keys, new_values] = [&self.new_keys, &self.new_values].map(|tensor| buffer(&tensor.bytes));
        let [key_cache, value_cache] = [&self.run.k, &self.run.v].map(|tensor| buffer(&tensor.bytes));
        let [q, cos, sin] = [&self.run.q, &self.cos, &self.sin].map(|tensor| buffer(&tensor.bytes));
        let rotated = buffer(&hole(self.case.dtype).repeat(extent(self.query_sizes(), self.rotated_strides)));
        let offsets = buffer(&bytes_i32(&self.run.query_offsets));
        let tensors = AppendTensors {
            new_keys: &new_keys,
            new_values: &new_values,
            key_cache: &key_cache,
            value_cache: &value_cache,
            rotary: self.append.rotary.map(|_| RotaryTensors {
                q: &q,
                rotated: &rotated,
                query_offsets: self.case.packed.then_some(&offsets),
                cos: &cos,
                sin: &sin,
            }),
            cache: cache.map(|buffer| buffer),
        };
        let mut report = Report::default();
        if !launch.is_empty() {
            let run = bench.simulator().run(&pipeline, &launch.arguments(&tensors), &Dispatch::from(launch.grid));
            report = run.map_err(|error| error.to_string())?;
        }
        let [key_cache, value_cache, rotated] = [&key_cache, &value_cache, &rotated].map(Buffer::read::<u8>);
        Ok((Appended { key_cache, value_cache, rotated }, report))
    }

    /// Compares what was written with the float64 reference, and everything else with what was there, bit by bit.
    ///
    /// # Errors
    /// The message names the first element that is wrong.
    pub fn check(&self, got: &Appended) -> Result<(), String> {
        let (problem, dtype) = (&self.run.problem, self.case.dtype);
        let [mut q, mut keys, mut values] = [&self.run.q, &self.run.k, &self.run.v].map(|tensor| tensor.exact.clone());
        let inputs = AppendInputs {
            k: &self.new_keys.exact,
            v: &self.new_values.exact,
            cos: &self.cos.exact,
            sin: &self.sin.exact,
            query_offsets: &self.run.query_offsets,
            cache: self.run.cache.buffers(),
        };
        reference(problem, &self.append, &inputs, &mut q, &mut keys, &mut values);
        let cache = problem.cache.expect("a cache");
        let sizes = |dim| [cache.blocks(), cache.block_len(), self.case.key_heads, dim];
        let turn = largest(&self.cos.exact).max(largest(&self.sin.exact));
        compare(
            dtype,
            "k_cache",
            &self.run.k.bytes,
            &got.key_cache,
            sizes(self.case.head_dim),
            &self.run.k.strides,
            &keys,
            (largest(&self.new_keys.exact) * turn).sqrt(),
        )?;
        compare(
            dtype,
            "v_cache",
            &self.run.v.bytes,
            &got.value_cache,
            sizes(self.case.value_dim),
            &self.run.v.strides,
            &values,
            0.0,
        )?;
        if self.append.rotary.is_none() {
            return Ok(());
        }
        if let Some(&end) = self.run.query_offsets.last() {
            // Rows of no sequence are nobody's.
            q[end as usize * problem.query_heads * problem.head_dim..].fill(f64::NAN);
        }
        let before = hole(dtype).repeat(extent(self.query_sizes(), self.rotated_strides));
        let most = (largest(&self.run.q.exact) * turn).sqrt();
        compare(dtype, "q", &before, &got.rotated, self.query_sizes(), &self.rotated_strides, &q, most)
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, value| value.abs().max(most))
}

/// Requires the elements of a tensor to be `exact` but for rounding, and all other memory to be what it was. Products of
/// its rotation have a magnitude of up to `most^2`.
#[expect(clippy::too_many_arguments, reason = "two tensors of one layout, and their names")]
fn compare(
    dtype: Dtype,
    name: &str,
    before: &[u8],
    got: &[u8],
    sizes: [usize; 4],
    tensor_strides: &[i64],
    exact: &[f64],
    most: f64,
) -> Result<(), String> {
    let size = dtype.size();
    let strides: [i64; 4] = tensor_strides.try_into().expect("four dimensions");
    let mut rest = got.to_vec();
    for (i, (at, &exact)) in positions(sizes, strides).zip(exact).enumerate() {
        let range = at * size..(at + 1) * size;
        let value = decode(dtype, &got[range.clone()]);
        let bound = rotation_bound(dtype, exact, most);
        let is_same = got[range.clone()] == before[range.clone()];
        let is_right = (value - exact).abs() <= bound || exact.is_nan() && is_same;
        if !is_right {
            return Err(format!("{name}[{i}] is {value:e}, the reference {exact:e}"));
        }
        rest[range.clone()].copy_from_slice(&before[range]);
    }
    if rest == before { Ok(()) } else { Err(format!("memory between the rows of {name} was written")) }
}

/// Forms that together have every layout and kind of rotary embedding.
pub fn forms() -> Vec<(AppendForm, Case)> {
    let case = |dtype, head_dim, value_dim, packed| Case { dtype, packed, head_dim, value_dim, ..Case::default() };
    let form = |name, cache, pairs, queries_advance| AppendForm { name, cache, pairs, queries_advance };
    vec![
        (form("append f16 to slots", CacheForm::Slots, None, false), case(Dtype::F16, 40, 72, false)),
        (
            form("append f32 neighbours to padded slots", CacheForm::PaddedSlots, Some(Pairs::Neighbours), true),
            case(Dtype::F32, 22, 8, false),
        ),
        (
            form("append bf16 halves to pages", CacheForm::Pages(16), Some(Pairs::Halves), false),
            case(Dtype::Bf16, 136, 20, false),
        ),
        (
            form("append f16 halves to pages, packed", CacheForm::Pages(32), Some(Pairs::Halves), true),
            case(Dtype::F16, 64, 64, true),
        ),
    ]
}
