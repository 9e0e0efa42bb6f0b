//! Random problems with their data, for one kernel variant at a time.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::struct_excessive_bools, reason = "features are on or off")]

pub mod append;
pub mod backward;
pub mod bench;
pub mod cached;
pub mod decode;
pub mod far;
pub mod far_backward;
pub mod peer;
pub mod small;
pub mod variants;

use cached::CacheData;
use half::{bf16, f16};
use mtlflashattn_core::reference::bounds::{Bounds, error_bounds_of};
use mtlflashattn_core::reference::{Forward, ReferenceInputs, forward as reference};
use mtlflashattn_core::{Alignment, BiasKind, Dropout, Dtype, Options, Problem, Strides, TensorMeta};
use mtlflashattn_metal::{CacheTensors, Kernel, LseStrides, Outputs, Tensors};

/// A small generator, so that a seed is all a failing case needs (`SplitMix64`).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
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
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < 2.0 * p - 1.0
    }
}

/// Memory order of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[batch, row, head, dim]`, as `flash_attn` has it.
    RowMajor,
    /// `[batch, head, row, dim]`, as SDPA has it.
    HeadMajor,
    /// Row-major inside wider rows, as a slice of packed projections has it.
    Sliced,
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
    /// How much the bounds on the packed lengths exceed the longest sequences.
    pub loose: usize,
    pub key_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    /// Factor on the default softmax scale; negative turns it round.
    pub scale: f64,
    /// Left and right; negative is open. Causal is a right window of 0.
    pub window: (i64, i64),
    pub top_left: bool,
    pub softcap: f64,
    /// 0: none, 1: per head, 2: per batch and head.
    pub alibi: u8,
    pub bias: Option<BiasKind>,
    /// Which of batch, head, query and key the bias is broadcast over.
    pub broadcast: [bool; 4],
    pub sinks: bool,
    /// Probability of dropout.
    pub dropout: f64,
    pub lse: bool,
    pub order: Order,
    /// Elements beside those of a tensor in a row of `Sliced`, times 3.
    pub beside: usize,
    /// Order of the output.
    pub out_order: Order,
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
            loose: 0,
            key_heads: 1,
            group: 1,
            head_dim: 16,
            value_dim: 16,
            scale: 1.0,
            window: (-1, -1),
            top_left: false,
            softcap: 0.0,
            alibi: 0,
            bias: None,
            broadcast: [false; 4],
            sinks: false,
            dropout: 0.0,
            lse: true,
            order: Order::RowMajor,
            beside: 5,
            out_order: Order::RowMajor,
            spread: 1.0,
            seed: 1,
        }
    }
}

/// A strided tensor of rounded values with the float64 copy that the reference reads.
pub struct Tensor {
    pub bytes: Vec<u8>,
    shape: Vec<i64>,
    strides: Vec<i64>,
    pub exact: Vec<f64>,
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

fn bytes_i32(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// What holes are filled with, so that reading one shows, and writing one does too.
fn hole(dtype: Dtype) -> Vec<u8> {
    encode(dtype, f64::NAN).0
}

fn strides(order: Order, beside: usize, [_, rows, heads, dim]: [usize; 4]) -> [i64; 4] {
    let (r, h, d) = (rows as i64, heads as i64, dim as i64);
    let sliced = 3 * (h * d + beside as i64);
    match order {
        Order::RowMajor => [r * h * d, h * d, d, 1],
        Order::HeadMajor => [r * h * d, d, r * d, 1],
        Order::Sliced => [r * sliced, sliced, d, 1],
    }
}

/// Position of each element in memory, in the order of the reference.
fn positions(sizes: [usize; 4], strides: [i64; 4]) -> impl Iterator<Item = usize> {
    let [batch, rows, heads, dim] = sizes;
    (0..batch * rows * heads * dim).map(move |i| {
        let index = [i / dim / heads / rows, i / dim / heads % rows, i / dim % heads, i % dim];
        index.into_iter().zip(strides).map(|(index, stride)| index as i64 * stride).sum::<i64>() as usize
    })
}

fn extent(sizes: [usize; 4], strides: [i64; 4]) -> usize {
    if sizes.contains(&0) {
        return 0;
    }
    sizes.iter().zip(strides).map(|(&size, stride)| (size as i64 - 1) * stride).sum::<i64>() as usize + 1
}

impl Tensor {
    /// `[batch, rows, heads, dim]`, or without the batch when it is packed.
    fn new(case: &Case, sizes: [usize; 4], mut value: impl FnMut() -> f64) -> Self {
        let strides = strides(case.order, case.beside, sizes);
        let size = case.dtype.size();
        let mut bytes = hole(case.dtype).repeat(extent(sizes, strides));
        let mut exact = Vec::new();
        for at in positions(sizes, strides) {
            let (encoded, rounded) = encode(case.dtype, value());
            bytes[at * size..(at + 1) * size].copy_from_slice(&encoded);
            exact.push(rounded);
        }
        let skip = usize::from(case.packed);
        Self {
            bytes,
            shape: sizes[skip..].iter().map(|&size| size as i64).collect(),
            strides: strides[skip..].to_vec(),
            exact,
        }
    }

    fn meta(&self, dtype: Dtype) -> TensorMeta<'_> {
        TensorMeta { dtype, shape: &self.shape, strides: &self.strides }
    }
}

/// A problem with its data.
pub struct Run {
    pub problem: Problem,
    pub outputs: Outputs,
    case: Case,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub query_offsets: Vec<i32>,
    pub key_offsets: Vec<i32>,
    slopes: Vec<f32>,
    full_slopes: Vec<f64>,
    bias: Vec<u8>,
    pub full_bias: Vec<f64>,
    sinks: Vec<f32>,
    out_sizes: [usize; 4],
    out_strides: [i64; 4],
    /// Contents of the buffers of the cache, if keys lie in one.
    pub cache: CacheData,
}

impl Run {
    pub fn new(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let batch = case.lengths.len();
        let query_heads = case.key_heads * case.group;
        let total = |pick: fn(&(usize, usize)) -> usize| case.lengths.iter().map(pick).sum::<usize>() + case.slack;
        let (query_rows, key_rows) = if case.packed { (total(|l| l.0), total(|l| l.1)) } else { case.lengths[0] };
        let outer = if case.packed { 1 } else { batch };
        let spread = case.spread;
        let q = Tensor::new(case, [outer, query_rows, query_heads, case.head_dim], || spread * 2.0 * random.uniform());
        let k = Tensor::new(case, [outer, key_rows, case.key_heads, case.head_dim], || 2.0 * random.uniform());
        let v = Tensor::new(case, [outer, key_rows, case.key_heads, case.value_dim], || 2.0 * random.uniform());
        let slope_rows = if case.alibi == 2 { batch } else { 1 };
        let slopes: Vec<f32> = (0..slope_rows * query_heads).map(|_| random.uniform().abs() as f32).collect();
        let full_slopes = (0..batch * query_heads).map(|i| f64::from(slopes[i % slopes.len()])).collect();
        let sinks: Vec<f32> = (0..query_heads)
            .map(|_| if random.chance(0.2) { f32::NEG_INFINITY } else { 3.0 * random.uniform() as f32 })
            .collect();
        let full = [batch, query_heads, case.lengths[0].0, case.lengths[0].1];
        let (bias, full_bias, bias_shape, bias_strides) = bias(case, full, &mut random);
        let heads = query_heads as i64;
        let sink_shape = [heads];
        let (slope_shape, slope_strides): (&[i64], &[i64]) =
            if case.alibi == 2 { (&[batch as i64, heads], &[heads, 1]) } else { (&[heads], &[1]) };
        let options = Options {
            softmax_scale: Some(case.scale * (case.head_dim as f64).powf(-0.5)),
            causal: false,
            window: case.window,
            alignment: if case.top_left { Alignment::TopLeft } else { Alignment::BottomRight },
            softcap: case.softcap,
            alibi_slopes: (case.alibi > 0).then_some((slope_shape, slope_strides)),
            bias: case.bias.map(|kind| (kind, bias_shape.as_slice(), bias_strides.as_slice())),
            sinks: case.sinks.then_some((&sink_shape, &[1])),
            dropout: Dropout::new(case.dropout, case.seed, !case.seed).expect("a probability"),
            splits: None,
        };
        let (qm, km, vm) = (q.meta(case.dtype), k.meta(case.dtype), v.meta(case.dtype));
        let max =
            |pick: fn(&(usize, usize)) -> usize| (case.lengths.iter().map(pick).max().unwrap_or(0) + case.loose) as i64;
        let problem = if case.packed {
            Problem::packed(qm, km, vm, batch, (max(|l| l.0), max(|l| l.1)), &options)
        } else {
            Problem::dense(qm, km, vm, &options)
        };
        let problem = problem.expect("the case is valid");
        let out_sizes = [outer, query_rows, query_heads, case.value_dim];
        let out_strides = strides(case.out_order, case.beside, out_sizes);
        let batch_stride = if case.packed { 0 } else { out_strides[0] };
        let out = Strides { batch: batch_stride, row: out_strides[1], head: out_strides[2] };
        let outputs = Outputs { out, lse: case.lse.then(|| LseStrides::contiguous(&problem)) };
        let (query_offsets, key_offsets) = if case.packed {
            (offsets(&case.lengths, |l| l.0), offsets(&case.lengths, |l| l.1))
        } else {
            (Vec::new(), Vec::new())
        };
        Self {
            problem,
            outputs,
            case: case.clone(),
            q,
            k,
            v,
            query_offsets,
            key_offsets,
            slopes,
            full_slopes,
            bias,
            full_bias,
            sinks,
            out_sizes,
            out_strides,
            cache: CacheData::default(),
        }
    }

    /// Puts `value` into element `[batch, row, head, dim]` of a tensor, for the kernel and for the reference.
    pub fn plant(&mut self, pick: fn(&mut Self) -> &mut Tensor, index: [usize; 4], value: f64) {
        let dtype = self.case.dtype;
        let tensor = pick(self);
        let skip = 4 - tensor.shape.len();
        let axes = || index[skip..].iter().zip(&tensor.strides).zip(&tensor.shape);
        let at: i64 = axes().map(|((&index, stride), _)| index as i64 * stride).sum();
        let order = axes().fold(0, |order, ((index, _), &size)| order * size as usize + index);
        let (encoded, rounded) = encode(dtype, value);
        tensor.bytes[at as usize * dtype.size()..][..dtype.size()].copy_from_slice(&encoded);
        tensor.exact[order] = rounded;
    }

    /// The bytes of the buffers of the cache.
    pub fn cache_tensors(&self) -> CacheTensors<Vec<u8>> {
        let CacheData { lengths, slots, left_pad, table, .. } = &self.cache;
        let present = |values: &Vec<i32>| (!values.is_empty()).then(|| bytes_i32(values));
        let [lengths, slots, left_pad, pages] = [lengths, slots, left_pad, table].map(present);
        CacheTensors { lengths, slots, left_pad, pages }
    }

    /// The tensors' bytes. Outputs are full of NaN, and so is `lse` when nobody wants it.
    pub fn tensors(&self) -> Tensors<Vec<u8>> {
        // Nobody binds offsets of keys where these lie in a cache.
        let key_offsets = if self.problem.cache.is_some() { &self.query_offsets } else { &self.key_offsets };
        let bytes_f32 = |values: &[f32]| values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>();
        let case = &self.case;
        Tensors {
            q: self.q.bytes.clone(),
            k: self.k.bytes.clone(),
            v: self.v.bytes.clone(),
            out: hole(case.dtype).repeat(extent(self.out_sizes, self.out_strides)),
            lse: case
                .lse
                .then(|| hole(Dtype::F32).repeat(self.problem.lengths.query_rows() * self.problem.query_heads)),
            offsets: case.packed.then(|| (bytes_i32(&self.query_offsets), bytes_i32(key_offsets))),
            alibi_slopes: (case.alibi > 0).then(|| bytes_f32(&self.slopes)),
            bias: case.bias.map(|_| self.bias.clone()),
            sinks: case.sinks.then(|| bytes_f32(&self.sinks)),
        }
    }

    /// Calls `judge` with the float64 inputs.
    fn with_inputs<R>(&self, judge: impl FnOnce(&ReferenceInputs<'_>) -> R) -> R {
        let sinks: Vec<f64> = self.sinks.iter().map(|&sink| f64::from(sink)).collect();
        judge(&ReferenceInputs {
            q: &self.q.exact,
            k: &self.k.exact,
            v: &self.v.exact,
            query_offsets: &self.query_offsets,
            key_offsets: &self.key_offsets,
            alibi_slopes: self.problem.alibi.map(|_| self.full_slopes.as_slice()),
            bias: self.problem.bias.map(|_| self.full_bias.as_slice()),
            sinks: self.problem.sinks.map(|_| sinks.as_slice()),
            cache: self.cache.buffers(),
        })
    }

    pub fn exact(&self) -> Forward {
        self.with_inputs(|inputs| reference(&self.problem, inputs))
    }

    pub fn bounds(&self, kernel: &Kernel) -> Bounds {
        self.with_inputs(|inputs| error_bounds_of(kernel.arithmetic(), &self.problem, inputs))
    }

    /// The results in the layouts of the reference.
    ///
    /// # Errors
    /// When a byte between the rows of `out` was written.
    pub fn read(&self, out: &[u8], lse: Option<&[u8]>) -> Result<Forward, String> {
        let size = self.case.dtype.size();
        let mut rest = out.to_vec();
        let hole = hole(self.case.dtype);
        let mut values = Vec::new();
        for at in positions(self.out_sizes, self.out_strides) {
            let range = at * size..(at + 1) * size;
            values.push(decode(self.case.dtype, &out[range.clone()]));
            rest[range].copy_from_slice(&hole);
        }
        if let Some(at) = rest.chunks_exact(size).position(|bytes| bytes != hole) {
            return Err(format!("element {at} of out is outside the rows and was written"));
        }
        let lse = lse.map_or_else(Vec::new, |lse| lse.chunks_exact(4).map(|bytes| decode(Dtype::F32, bytes)).collect());
        Ok(Forward { out: values, lse })
    }

    /// Compares results with the float64 reference. Rows that belong to no sequence must be untouched.
    ///
    /// # Errors
    /// The message names the first element out of bounds.
    pub fn check(&self, kernel: &Kernel, got: &Forward) -> Result<(), String> {
        let (exact, bounds) = (self.exact(), self.bounds(kernel));
        let mut pairs = vec![("out", &got.out, &exact.out, &bounds.out)];
        if self.case.lse {
            pairs.push(("lse", &got.lse, &exact.lse, &bounds.lse));
        }
        for (name, got, want, bound) in pairs {
            assert_eq!(got.len(), want.len());
            for (i, ((got, want), bound)) in got.iter().zip(want).zip(bound).enumerate() {
                if self.is_slack(name, i) {
                    if !got.is_nan() {
                        return Err(format!("{name}[{i}] belongs to no sequence and is {got:e}"));
                    }
                } else if !(got.total_cmp(want).is_eq() || (got - want).abs() <= *bound) {
                    return Err(format!("{name}[{i}] is {got:e}, the reference {want:e}, bound {bound:e}"));
                }
            }
        }
        Ok(())
    }

    /// Whether an element of a result is in a row behind the last sequence.
    fn is_slack(&self, name: &str, index: usize) -> bool {
        let Some(&end) = self.query_offsets.last() else { return false };
        let token = match name {
            "out" => index / self.problem.value_dim / self.problem.query_heads,
            _ => index % self.problem.lengths.query_rows(),
        };
        token >= end as usize
    }
}

fn offsets(lengths: &[(usize, usize)], pick: fn(&(usize, usize)) -> usize) -> Vec<i32> {
    let mut sum = 0;
    let ends = lengths.iter().map(|length| {
        sum += pick(length) as i32;
        sum
    });
    std::iter::once(0).chain(ends).collect()
}

type BiasData = (Vec<u8>, Vec<f64>, Vec<i64>, Vec<i64>);

fn bias(case: &Case, full: [usize; 4], random: &mut Random) -> BiasData {
    let Some(kind) = case.bias else { return (Vec::new(), Vec::new(), Vec::new(), Vec::new()) };
    let mut shape = full;
    for (size, broadcast) in shape.iter_mut().zip(case.broadcast) {
        if broadcast {
            *size = 1;
        }
    }
    let strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1];
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for _ in 0..shape.iter().product() {
        let hidden = random.chance(0.2);
        let additive = 2.0 * random.uniform();
        let (encoded, value) = match kind {
            BiasKind::Boolean => (vec![u8::from(!hidden)], if hidden { f64::NEG_INFINITY } else { 0.0 }),
            BiasKind::Additive(dtype) => encode(dtype, if hidden { f64::NEG_INFINITY } else { additive }),
        };
        bytes.extend(encoded);
        values.push(value);
    }
    let full_strides = strides.map(|stride| stride as i64);
    let broadcast: [i64; 4] =
        std::array::from_fn(|axis| if shape[axis] == 1 && full[axis] != 1 { 0 } else { full_strides[axis] });
    let full_values = positions(full, broadcast).map(|at| values[at]).collect();
    (bytes, full_values, shape.map(|size| size as i64).to_vec(), full_strides.to_vec())
}
