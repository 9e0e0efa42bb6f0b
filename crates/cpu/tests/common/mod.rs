//! Random problems with their data, run on the engine and on the float64 reference.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::float_cmp, reason = "infinities must be equal")]
#![allow(clippy::struct_excessive_bools, reason = "features are on or off")]

pub mod cached;
pub mod cases;

use std::cell::OnceCell;

use half::{bf16, f16};
use mtlflashattn_core::reference::bounds::{error_bounds, gradient_bounds};
use mtlflashattn_core::reference::{ReferenceInputs, backward as reference_gradients, forward as reference};
use mtlflashattn_core::{
    Alignment, BiasKind, CacheBuffers, CpuBackwardTile, CpuTile, Dropout, Dtype, Options, Problem, Strides, TensorMeta,
};
use mtlflashattn_cpu::{Error, Gradient, InputGradients, Inputs, Isa, OutputGradients, Outputs, backward, forward};

/// A small generator, so that a seed is all a failing case needs (`SplitMix64`).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// True with probability `p`.
    fn chance(&mut self, p: f64) -> bool {
        self.uniform() < 2.0 * p - 1.0
    }
}

/// Memory order of a tensor.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// `[batch, row, head, dim]`, as `flash_attn` has it.
    RowMajor,
    /// `[batch, head, row, dim]`, as SDPA has it.
    HeadMajor,
    /// Row-major inside wider rows, as a slice of packed projections has it.
    Sliced,
}

/// Which bias a problem has; the flags say which of batch, head, query are broadcast.
#[derive(Clone, Copy, Debug)]
pub enum BiasCase {
    None,
    Float32([bool; 3]),
    SameDtype([bool; 3]),
    Boolean([bool; 3]),
}

/// Everything that describes a random problem.
#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: Dtype,
    /// Query and key length of each sequence; all alike unless `packed`.
    pub lengths: Vec<(usize, usize)>,
    pub packed: bool,
    /// Rows of q and k behind the last sequence of a packed problem.
    pub slack: usize,
    pub key_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub causal: bool,
    pub window: (i64, i64),
    pub top_left: bool,
    pub softcap: f64,
    /// 0: none, 1: per head, 2: per batch and head.
    pub alibi: u8,
    pub bias: BiasCase,
    pub sinks: bool,
    /// Probability of dropout; with a softcap it is left out.
    pub dropout: f64,
    pub order: Order,
    /// Spread of q: large values make the softmax peaked.
    pub spread: f64,
    pub seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: Dtype::F32,
            lengths: vec![(16, 16)],
            packed: false,
            slack: 0,
            key_heads: 1,
            group: 1,
            head_dim: 16,
            value_dim: 16,
            causal: false,
            window: (-1, -1),
            top_left: false,
            softcap: 0.0,
            alibi: 0,
            bias: BiasCase::None,
            sinks: false,
            dropout: 0.0,
            order: Order::RowMajor,
            spread: 1.0,
            seed: 1,
        }
    }
}

impl Case {
    /// One that is worth several threads.
    pub fn large() -> Self {
        let (lengths, dim) = (vec![(700, 900)], 64);
        Self { lengths, key_heads: 2, group: 2, head_dim: dim, value_dim: dim, causal: true, ..Self::default() }
    }
}

/// Runs `check` for every small head dimension and each instruction set, in float32 and in a type that is converted.
pub fn for_each_head_dim(lengths: (usize, usize), check: impl Fn(&Run, Isa) -> Result<(), String>) {
    for head_dim in 1..72 {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let case = Case { dtype, lengths: vec![lengths], head_dim, value_dim: head_dim, ..Case::default() };
            let run = Run::new(&case);
            for isa in Isa::available() {
                check(&run, isa).unwrap_or_else(|e| panic!("{} D{head_dim}: {e}", isa.name()));
            }
        }
    }
}

/// All bits of results, to compare NaN and the sign of 0, too.
pub fn bits<'a>(results: impl IntoIterator<Item = &'a Vec<f64>>) -> Vec<u64> {
    results.into_iter().flatten().map(|x| x.to_bits()).collect()
}

/// A strided tensor of rounded values with the float64 copy that the reference reads.
struct Tensor {
    bytes: Vec<u8>,
    shape: Vec<i64>,
    strides: Vec<i64>,
    exact: Vec<f64>,
}

fn encode(dtype: Dtype, x: f64) -> (Vec<u8>, f64) {
    match dtype {
        Dtype::F32 => ((x as f32).to_ne_bytes().to_vec(), f64::from(x as f32)),
        Dtype::F16 => (f16::from_f64(x).to_ne_bytes().to_vec(), f16::from_f64(x).to_f64()),
        Dtype::Bf16 => (bf16::from_f64(x).to_ne_bytes().to_vec(), bf16::from_f64(x).to_f64()),
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(f32::from_ne_bytes(bytes.try_into().unwrap())),
        Dtype::F16 => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
        Dtype::Bf16 => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
    }
}

impl Tensor {
    /// `[batch, rows, heads, dim]`, or without the batch when it is packed.
    fn new(case: &Case, [batch, rows, heads, dim]: [usize; 4], mut value: impl FnMut() -> f64) -> Self {
        let (b, r, h, d) = (batch as i64, rows as i64, heads as i64, dim as i64);
        let mut strides = match case.order {
            Order::RowMajor => vec![r * h * d, h * d, d, 1],
            Order::HeadMajor => vec![r * h * d, d, r * d, 1],
            Order::Sliced => vec![r * 3 * (h * d + 5), 3 * (h * d + 5), d, 1],
        };
        let mut shape = vec![b, r, h, d];
        let size = case.dtype.size();
        // Holes hold NaN, so that reading one shows.
        let (hole, _) = encode(case.dtype, f64::NAN);
        let extent: i64 = shape.iter().zip(&strides).map(|(n, s)| (n - 1).max(0) * s).sum::<i64>() + 1;
        let mut bytes = hole.repeat(extent as usize);
        let mut exact = Vec::new();
        for i in 0..b {
            for j in 0..r {
                for k in 0..h {
                    for l in 0..d {
                        let at = (i * strides[0] + j * strides[1] + k * strides[2] + l) as usize * size;
                        let (encoded, rounded) = encode(case.dtype, value());
                        bytes[at..at + size].copy_from_slice(&encoded);
                        exact.push(rounded);
                    }
                }
            }
        }
        if case.packed {
            shape.remove(0);
            strides.remove(0);
        }
        Self { bytes, shape, strides, exact }
    }

    fn meta(&self, dtype: Dtype) -> TensorMeta<'_> {
        TensorMeta { dtype, shape: &self.shape, strides: &self.strides }
    }
}

/// Output of the engine as float64, in the layouts of the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    pub out: Vec<f64>,
    pub lse: Vec<f64>,
}

/// Gradients from the engine as float64, in the layouts of the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub sinks: Vec<f64>,
}

/// Which gradients are wanted: of q, k, v and the sinks.
pub type Wanted = [bool; 4];

/// A problem with its data.
pub struct Run {
    pub problem: Problem,
    dtype: Dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Vec<i32>,
    key_offsets: Vec<i32>,
    slopes: Vec<f32>,
    full_slopes: Vec<f64>,
    bias: Vec<u8>,
    full_bias: Vec<f64>,
    sinks: Vec<f32>,
    full_sinks: Vec<f64>,
    d_out: Tensor,
    d_lse: Vec<f32>,
    /// The float64 reference takes longer than every engine together.
    exact_results: OnceCell<Vec<Exact>>,
    exact_gradients: OnceCell<Vec<Exact>>,
}

/// What the reference says of one result, and how far off an engine may be.
struct Exact {
    name: &'static str,
    values: Vec<f64>,
    bounds: Vec<f64>,
}

impl Exact {
    /// The message names the first element out of bounds.
    fn check(&self, got: &[f64]) -> Result<(), String> {
        assert_eq!(got.len(), self.values.len());
        for (i, ((got, want), bound)) in got.iter().zip(&self.values).zip(&self.bounds).enumerate() {
            if !(got == want || (got - want).abs() <= *bound) {
                let name = self.name;
                return Err(format!("{name}[{i}] is {got:e}, the reference {want:e}, bound {bound:e}"));
            }
        }
        Ok(())
    }
}

impl Run {
    pub fn new(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let batch = case.lengths.len();
        let query_heads = case.key_heads * case.group;
        let (query_rows, key_rows) = if case.packed {
            let total = |pick: fn(&(usize, usize)) -> usize| case.lengths.iter().map(pick).sum::<usize>() + case.slack;
            (total(|l| l.0), total(|l| l.1))
        } else {
            case.lengths[0]
        };
        let outer = if case.packed { 1 } else { batch };
        let spread = case.spread;
        let q = Tensor::new(case, [outer, query_rows, query_heads, case.head_dim], || spread * 2.0 * random.uniform());
        let k = Tensor::new(case, [outer, key_rows, case.key_heads, case.head_dim], || 2.0 * random.uniform());
        let v = Tensor::new(case, [outer, key_rows, case.key_heads, case.value_dim], || 2.0 * random.uniform());
        let mut other = Random::new(case.seed ^ 0x5eed);
        let d_out = Tensor::new(case, [outer, query_rows, query_heads, case.value_dim], || 2.0 * other.uniform());
        let d_lse = (0..outer * query_rows * query_heads).map(|_| other.uniform() as f32).collect();
        let offsets = |pick: fn(&(usize, usize)) -> usize| {
            let mut sum = 0;
            let ends = case.lengths.iter().map(|l| {
                sum += pick(l) as i32;
                sum
            });
            std::iter::once(0).chain(ends).collect::<Vec<i32>>()
        };
        let slope_rows = if case.alibi == 2 { batch } else { 1 };
        let slopes: Vec<f32> = (0..slope_rows * query_heads).map(|_| random.uniform().abs() as f32).collect();
        let full_slopes = (0..batch * query_heads).map(|i| f64::from(slopes[i % (slope_rows * query_heads)])).collect();
        let sinks: Vec<f32> = (0..query_heads)
            .map(|_| if random.chance(0.2) { f32::NEG_INFINITY } else { 3.0 * random.uniform() as f32 })
            .collect();
        let (query_len, key_len) = case.lengths[0];
        let full = [batch, query_heads, query_len, key_len];
        let (bias, full_bias, bias_shape, bias_strides, kind) = bias(case, full, &mut random);
        let slope_shape =
            if case.alibi == 2 { vec![batch as i64, query_heads as i64] } else { vec![query_heads as i64] };
        let slope_strides = if case.alibi == 2 { vec![query_heads as i64, 1] } else { vec![1] };
        let sink_shape = [query_heads as i64];
        let options = Options {
            softmax_scale: None,
            causal: case.causal,
            window: case.window,
            alignment: if case.top_left { Alignment::TopLeft } else { Alignment::BottomRight },
            softcap: case.softcap,
            alibi_slopes: (case.alibi > 0).then_some((&slope_shape, &slope_strides)),
            bias: kind.map(|kind| (kind, bias_shape.as_slice(), bias_strides.as_slice())),
            sinks: case.sinks.then_some((&sink_shape, &[1])),
            dropout: if case.softcap > 0.0 { None } else { Dropout::new(case.dropout, case.seed, !case.seed).unwrap() },
            splits: None,
        };
        let (qm, km, vm) = (q.meta(case.dtype), k.meta(case.dtype), v.meta(case.dtype));
        let max = |pick: fn(&(usize, usize)) -> usize| case.lengths.iter().map(pick).max().unwrap_or(0) as i64;
        let problem = if case.packed {
            Problem::packed(qm, km, vm, batch, (max(|l| l.0), max(|l| l.1)), &options)
        } else {
            Problem::dense(qm, km, vm, &options)
        };
        let problem = problem.expect("the case is valid");
        let (query_offsets, key_offsets) =
            if case.packed { (offsets(|l| l.0), offsets(|l| l.1)) } else { (Vec::new(), Vec::new()) };
        Self {
            problem,
            dtype: case.dtype,
            q,
            k,
            v,
            query_offsets,
            key_offsets,
            slopes,
            full_slopes,
            bias,
            full_bias,
            full_sinks: sinks.iter().map(|&sink| f64::from(sink)).collect(),
            sinks,
            d_out,
            d_lse,
            exact_results: OnceCell::new(),
            exact_gradients: OnceCell::new(),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q: self.q.bytes.as_ptr(),
            k: self.k.bytes.as_ptr(),
            v: self.v.bytes.as_ptr(),
            query_offsets: &self.query_offsets,
            key_offsets: &self.key_offsets,
            cache: CacheBuffers::default(),
            alibi_slopes: self.slopes.as_ptr(),
            bias: self.bias.as_ptr(),
            sinks: self.sinks.as_ptr(),
        }
    }

    /// The tile of the gradients that the planner gives.
    pub fn backward_tile(&self, isa: Isa) -> CpuBackwardTile {
        CpuBackwardTile::new(&self.problem, isa.panel_rows())
    }

    /// The gradients from the engine, after a forward pass of the same instruction set.
    pub fn gradients(&self, isa: Isa, tile: &CpuBackwardTile, threads: usize, wanted: Wanted) -> Gradients {
        let problem = &self.problem;
        let results = self.engine(isa, &self.tile(isa, 1), 1);
        let size = self.dtype.size();
        let out: Vec<u8> = results.out.iter().flat_map(|&x| encode(self.dtype, x).0).collect();
        let mut lse: Vec<f32> = results.lse.iter().map(|&x| x as f32).collect();
        let (hole, _) = encode(self.dtype, f64::NAN);
        let guard = 64;
        let tensor = |like: &Tensor, heads: usize, dim: usize| {
            let mut shape = like.shape.clone();
            *shape.last_mut().unwrap() = dim as i64;
            let elements = shape.iter().product::<i64>() as usize;
            let (heads, dim) = (heads as i64, dim as i64);
            let batch = if shape.len() == 4 { shape[1] * heads * dim } else { 0 };
            (hole.repeat(elements + guard), Strides { batch, row: heads * dim, head: dim })
        };
        let out_strides = tensor(&self.q, problem.query_heads, problem.value_dim).1;
        let mut grads = [
            tensor(&self.q, problem.query_heads, problem.head_dim),
            tensor(&self.k, problem.key_heads, problem.head_dim),
            tensor(&self.v, problem.key_heads, problem.value_dim),
        ];
        let mut sinks = vec![f32::NAN; problem.query_heads + 1];
        let outputs = Outputs { out: out.as_ptr().cast_mut(), out_strides, lse: lse.as_mut_ptr() };
        let d_out_strides = Strides::of(&self.d_out.meta(self.dtype));
        let given =
            OutputGradients { out: self.d_out.bytes.as_ptr(), out_strides: d_out_strides, lse: self.d_lse.as_ptr() };
        let mut gradient = |index: usize| {
            let (bytes, strides) = &mut grads[index];
            let data = if wanted[index] { bytes.as_mut_ptr() } else { std::ptr::null_mut() };
            Gradient { data, strides: *strides }
        };
        let has_sinks = wanted[3] && problem.sinks.is_some();
        let to = InputGradients {
            q: gradient(0),
            k: gradient(1),
            v: gradient(2),
            sinks: if has_sinks { sinks.as_mut_ptr() } else { std::ptr::null_mut() },
        };
        // SAFETY: all buffers were made for this problem.
        unsafe { backward(problem, tile, isa, threads, &self.inputs(), &outputs, &given, &to, &mut || false) }
            .expect("the call finishes");
        assert!(sinks.pop().unwrap().is_nan(), "{} wrote behind the gradient of the sinks", isa.name());
        let [q, k, v] = grads.map(|(mut bytes, _)| {
            let end = bytes.len() - guard * size;
            assert!(bytes[end..] == hole.repeat(guard), "{} wrote behind a gradient", isa.name());
            bytes.truncate(end);
            bytes.chunks_exact(size).map(|bytes| decode(self.dtype, bytes)).collect()
        });
        Gradients { q, k, v, sinks: sinks.into_iter().map(f64::from).collect() }
    }

    /// Compares with the float64 reference; the message names the first element out of bounds.
    pub fn check_gradients(&self, got: &Gradients) -> Result<(), String> {
        let exact = self.exact_gradients.get_or_init(|| {
            let inputs = self.reference_inputs();
            let d_lse: Vec<f64> = self.d_lse.iter().map(|&x| f64::from(x)).collect();
            let exact = reference_gradients(&self.problem, &inputs, &self.d_out.exact, Some(&d_lse));
            let bounds = gradient_bounds(&self.problem, &inputs, &self.d_out.exact, Some(&d_lse));
            let mut all = vec![
                Exact { name: "dq", values: exact.q, bounds: bounds.q },
                Exact { name: "dk", values: exact.k, bounds: bounds.k },
                Exact { name: "dv", values: exact.v, bounds: bounds.v },
            ];
            if let (Some(values), Some(bounds)) = (exact.sinks, bounds.sinks) {
                all.push(Exact { name: "dsinks", values, bounds });
            }
            all
        });
        exact.iter().zip([&got.q, &got.k, &got.v, &got.sinks]).try_for_each(|(exact, got)| exact.check(got))
    }

    /// Asks for gradients with an `interrupted` callback.
    pub fn interrupted_gradients(
        &self,
        isa: Isa,
        threads: usize,
        asked: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let problem = &self.problem;
        let (tile, mut dq) = (self.backward_tile(isa), vec![0u8; self.q.bytes.len()]);
        let lse = vec![0.0f32; problem.lengths.query_rows() * problem.query_heads];
        let outputs =
            Outputs { out: self.q.bytes.as_ptr().cast_mut(), out_strides: problem.q, lse: lse.as_ptr().cast_mut() };
        let given = OutputGradients { out: self.q.bytes.as_ptr(), out_strides: problem.q, lse: std::ptr::null() };
        let none = Gradient { data: std::ptr::null_mut(), strides: problem.q };
        let to = InputGradients {
            q: Gradient { data: dq.as_mut_ptr(), strides: problem.q },
            k: none,
            v: none,
            sinks: std::ptr::null_mut(),
        };
        // SAFETY: all buffers were made for this problem; q stands in for what has its layout.
        unsafe { backward(problem, &tile, isa, threads, &self.inputs(), &outputs, &given, &to, asked) }
    }

    fn reference_inputs(&self) -> ReferenceInputs<'_> {
        ReferenceInputs {
            q: &self.q.exact,
            k: &self.k.exact,
            v: &self.v.exact,
            query_offsets: &self.query_offsets,
            key_offsets: &self.key_offsets,
            alibi_slopes: self.problem.alibi.map(|_| self.full_slopes.as_slice()),
            bias: self.problem.bias.map(|_| self.full_bias.as_slice()),
            sinks: self.problem.sinks.map(|_| self.full_sinks.as_slice()),
            ..ReferenceInputs::default()
        }
    }

    /// The tile that the planner gives.
    pub fn tile(&self, isa: Isa, threads: usize) -> CpuTile {
        CpuTile::new(&self.problem, isa.panel_rows(), isa.decode_rows(), threads)
    }

    /// Runs the engine.
    pub fn engine(&self, isa: Isa, tile: &CpuTile, threads: usize) -> Results {
        self.problem.lengths.check_offsets(&self.query_offsets, &self.key_offsets).expect("valid offsets");
        self.compute(&self.problem, &self.inputs(), isa, tile, threads)
    }

    fn compute(&self, problem: &Problem, inputs: &Inputs<'_>, isa: Isa, tile: &CpuTile, threads: usize) -> Results {
        let size = self.dtype.size();
        let mut shape = self.q.shape.clone();
        *shape.last_mut().unwrap() = problem.value_dim as i64;
        let elements = shape.iter().product::<i64>() as usize;
        let (hole, _) = encode(self.dtype, f64::NAN);
        // Memory behind the output that belongs to somebody else.
        let guard = 64;
        let mut out = hole.repeat(elements + guard);
        let mut lse = vec![f32::NAN; problem.lengths.query_rows() * problem.query_heads];
        let (heads, dim) = (problem.query_heads as i64, problem.value_dim as i64);
        let out_strides =
            Strides { batch: if shape.len() == 4 { shape[1] * heads * dim } else { 0 }, row: heads * dim, head: dim };
        let outputs = Outputs { out: out.as_mut_ptr(), out_strides, lse: lse.as_mut_ptr() };
        // SAFETY: all buffers were made for this problem.
        unsafe { forward(problem, tile, isa, threads, inputs, &outputs, &mut || false) }.expect("the call finishes");
        assert!(out[elements * size..] == hole.repeat(guard), "{} wrote behind the output", isa.name());
        out.truncate(elements * size);
        Results {
            out: out.chunks_exact(size).map(|bytes| decode(self.dtype, bytes)).collect(),
            lse: lse.into_iter().map(f64::from).collect(),
        }
    }

    /// Compares with the float64 reference; the message names the first element out of bounds.
    pub fn check(&self, results: &Results) -> Result<(), String> {
        let exact = self.exact_results.get_or_init(|| {
            let inputs = self.reference_inputs();
            let exact = reference(&self.problem, &inputs);
            let bounds = error_bounds(&self.problem, &inputs);
            vec![
                Exact { name: "out", values: exact.out, bounds: bounds.out },
                Exact { name: "lse", values: exact.lse, bounds: bounds.lse },
            ]
        });
        exact.iter().zip([&results.out, &results.lse]).try_for_each(|(exact, got)| exact.check(got))
    }

    /// Calls with an `interrupted` callback.
    pub fn interrupted(&self, isa: Isa, threads: usize, interrupted: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        let tile = self.tile(isa, threads);
        let problem = &self.problem;
        let mut out = vec![0u8; self.q.bytes.len()];
        let inputs = self.inputs();
        let outputs = Outputs { out: out.as_mut_ptr(), out_strides: problem.q, lse: std::ptr::null_mut() };
        // SAFETY: all buffers were made for this problem; the output has the layout of q.
        unsafe { forward(problem, &tile, isa, threads, &inputs, &outputs, interrupted) }
    }
}

type BiasData = (Vec<u8>, Vec<f64>, Vec<i64>, Vec<i64>, Option<BiasKind>);

fn bias(case: &Case, full: [usize; 4], random: &mut Random) -> BiasData {
    let (kind, broadcast) = match case.bias {
        BiasCase::None => return (Vec::new(), Vec::new(), Vec::new(), Vec::new(), None),
        BiasCase::Float32(broadcast) => (BiasKind::Additive(Dtype::F32), broadcast),
        BiasCase::SameDtype(broadcast) => (BiasKind::Additive(case.dtype), broadcast),
        BiasCase::Boolean(broadcast) => (BiasKind::Boolean, broadcast),
    };
    let mut shape = full;
    for (size, broadcast) in shape.iter_mut().zip(broadcast) {
        if broadcast {
            *size = 1;
        }
    }
    let strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1];
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for _ in 0..shape.iter().product() {
        match kind {
            BiasKind::Boolean => {
                let shown = random.chance(0.7);
                bytes.push(u8::from(shown));
                values.push(if shown { 0.0 } else { f64::NEG_INFINITY });
            }
            BiasKind::Additive(dtype) => {
                let x = if random.chance(0.1) { f64::NEG_INFINITY } else { 2.0 * random.uniform() };
                let (encoded, rounded) = encode(dtype, x);
                bytes.extend(encoded);
                values.push(rounded);
            }
        }
    }
    let mut full_values = Vec::with_capacity(full.iter().product());
    for b in 0..full[0] {
        for h in 0..full[1] {
            for q in 0..full[2] {
                for k in 0..full[3] {
                    let index = [b, h, q, k].into_iter().zip(shape).zip(strides);
                    full_values.push(values[index.map(|((i, n), s)| i.min(n - 1) * s).sum::<usize>()]);
                }
            }
        }
    }
    let as_i64 = |values: [usize; 4]| values.map(|x| x as i64).to_vec();
    (bytes, full_values, as_i64(shape), as_i64(strides), Some(kind))
}
