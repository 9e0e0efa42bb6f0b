//! The keys of a run laid out in a cache.

use mtlflashattn_core::reference::{self, AppendInputs as ReferenceAppend};
use mtlflashattn_core::{
    Append, CacheBuffers, CacheOptions, CpuTile, Dtype, LengthsArgument, Options, Pairs, Problem, Rotary, Strides,
    TensorMeta,
};
use mtlflashattn_cpu::{AppendInputs, AppendOutputs, Inputs, Isa, append};

use super::{Case, Order, Random, Results, Run, decode, encode};

/// How a cache is cut.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// A slot for each sequence and some for nobody; `padded`: sequences start anywhere in theirs.
    Slots { padded: bool },
    /// Pages of this many rows, in any order.
    Pages(usize),
}

/// `[blocks, rows, heads, dim]` in any order; NaN where nothing was written.
#[derive(Clone)]
struct Laid {
    dtype: Dtype,
    shape: [usize; 4],
    strides: [usize; 4],
    bytes: Vec<u8>,
}

impl Laid {
    fn new(dtype: Dtype, order: Order, shape: [usize; 4]) -> Self {
        let [blocks, rows, heads, dim] = shape;
        let strides = match order {
            Order::RowMajor => [rows * heads * dim, heads * dim, dim, 1],
            Order::HeadMajor => [rows * heads * dim, dim, rows * dim, 1],
            Order::Sliced => [rows * heads * (dim + 3), heads * (dim + 3), dim + 3, 1],
        };
        let bytes = encode(dtype, f64::NAN).0.repeat((blocks * rows).max(1) * heads * (dim + 3));
        Self { dtype, shape, strides, bytes }
    }

    fn strides(&self) -> Strides {
        let [batch, row, head, _] = self.strides.map(|stride| stride as i64);
        Strides { batch, row, head }
    }

    /// The bytes of one row.
    fn row(&mut self, [block, row, head]: [usize; 3]) -> &mut [u8] {
        let first = block * self.strides[0] + row * self.strides[1] + head * self.strides[2];
        let size = self.dtype.size();
        &mut self.bytes[first * size..(first + self.shape[3]) * size]
    }

    fn write(&mut self, place: [usize; 3], values: &[f64]) {
        let bytes: Vec<u8> = values.iter().flat_map(|&x| encode(self.dtype, x).0).collect();
        self.row(place).copy_from_slice(&bytes);
    }

    fn read(&mut self, place: [usize; 3]) -> Vec<f64> {
        let dtype = self.dtype;
        self.row(place).chunks_exact(dtype.size()).map(|bytes| decode(dtype, bytes)).collect()
    }

    /// Every row, contiguous.
    fn exact(&mut self) -> Vec<f64> {
        let [blocks, rows, heads, _] = self.shape;
        let places = (0..blocks).flat_map(|b| (0..rows).flat_map(move |r| (0..heads).map(move |h| [b, r, h])));
        places.flat_map(|place| self.read(place)).collect()
    }
}

/// A packed run whose keys lie in a cache instead.
pub struct Cached<'a> {
    run: &'a Run,
    case: &'a Case,
    pub problem: Problem,
    k: Laid,
    v: Laid,
    lengths: Vec<i32>,
    slots: Vec<i32>,
    left_pad: Vec<i32>,
    pages: Vec<i32>,
}

/// Numbers below `count` in any order.
fn shuffled(count: usize, random: &mut Random) -> Vec<i32> {
    let mut numbers: Vec<i32> = (0..count as i32).collect();
    for i in (1..count).rev() {
        numbers.swap(i, random.next() as usize % (i + 1));
    }
    numbers
}

impl<'a> Cached<'a> {
    /// The last `new_len` keys of each sequence are those that the call appends. They lie in the cache already.
    pub fn new(run: &'a Run, case: &'a Case, layout: Layout, order: Order, new_len: usize) -> Self {
        let mut random = Random::new(case.seed ^ 0xcac4e);
        let batch = case.lengths.len();
        let longest = case.lengths.iter().map(|l| l.1).max().unwrap_or(0);
        let (mut slots, mut left_pad, mut pages) = (Vec::new(), Vec::new(), Vec::new());
        let (blocks, block_len, per_sequence) = match layout {
            Layout::Slots { padded } => {
                slots = shuffled(batch + 2, &mut random)[..batch].to_vec();
                if padded {
                    left_pad = case.lengths.iter().map(|_| (random.next() % 40) as i32).collect();
                }
                (batch + 2, longest + 45, 0)
            }
            Layout::Pages(len) => {
                let per_sequence = longest.div_ceil(len) + 1;
                pages = shuffled(batch * per_sequence + 3, &mut random)[..batch * per_sequence].to_vec();
                (batch * per_sequence + 3, len, per_sequence)
            }
        };
        let padding = |sequence: usize| left_pad.get(sequence).copied().unwrap_or(0);
        let filled = |(sequence, lengths): (usize, &(usize, usize))| (lengths.1 - new_len) as i32 + padding(sequence);
        let lengths: Vec<i32> = case.lengths.iter().enumerate().map(filled).collect();
        // Entries behind the last key of a sequence are never read.
        for (sequence, &len) in lengths.iter().enumerate() {
            let used = (len as usize + new_len).div_ceil(block_len);
            pages.iter_mut().skip(sequence * per_sequence).take(per_sequence).skip(used).for_each(|page| *page = -7);
        }
        let k = Laid::new(case.dtype, order, [blocks, block_len, case.key_heads, case.head_dim]);
        let v = Laid::new(case.dtype, order, [blocks, block_len, case.key_heads, case.value_dim]);
        let problem = described(run, case, [&k, &v], (&slots, &left_pad), per_sequence, new_len);
        let mut cached = Self { run, case, problem, k, v, lengths, slots, left_pad, pages };
        problem.check_cache(&cached.buffers()).expect("valid buffers");
        cached.each_key(|cached, place, token, head, _| {
            let (k, v) = (cached.key(token, head).to_vec(), cached.value(token, head).to_vec());
            cached.k.write(place, &k);
            cached.v.write(place, &v);
        });
        cached
    }

    /// Visits every key of every head: where it lies in the cache, its token of the packed run, its head, and, if it is
    /// new, its sequence and number there.
    fn each_key(&mut self, mut visit: impl FnMut(&mut Self, [usize; 3], usize, usize, Option<(usize, usize)>)) {
        let cache = self.problem.cache.expect("a cache");
        let mut token = 0;
        for sequence in 0..self.case.lengths.len() {
            let len = self.case.lengths[sequence].1;
            for key in 0..len {
                let place = cache.row(&self.buffers(), sequence, key);
                let new = (key + cache.new_len).checked_sub(len).map(|new| (sequence, new));
                for head in 0..self.case.key_heads {
                    visit(self, [place.block, place.row, head], token, head, new);
                }
                token += 1;
            }
        }
    }

    fn key(&self, token: usize, head: usize) -> &[f64] {
        row(&self.run.k.exact, token * self.case.key_heads + head, self.case.head_dim)
    }

    fn value(&self, token: usize, head: usize) -> &[f64] {
        row(&self.run.v.exact, token * self.case.key_heads + head, self.case.value_dim)
    }

    fn buffers(&self) -> CacheBuffers<'_> {
        let Self { lengths, slots, left_pad, pages, .. } = self;
        CacheBuffers { lengths, slots, left_pad, pages }
    }

    /// Runs the engine.
    pub fn engine(&self, isa: Isa, tile: &CpuTile, threads: usize) -> Results {
        let (k, v) = (self.k.bytes.as_ptr(), self.v.bytes.as_ptr());
        let inputs = Inputs { k, v, key_offsets: &[], cache: self.buffers(), ..self.run.inputs() };
        self.run.compute(&self.problem, &inputs, isa, tile, threads)
    }

    /// Appends the new keys to a cache without them and compares every byte that should not change, every new element
    /// with the reference, and rotated queries.
    pub fn check_append(&mut self, isa: Isa, threads: usize, rotary: Option<(usize, Pairs)>, order: Order) {
        let (dtype, heads) = (self.case.dtype, self.case.key_heads);
        let new_len = self.problem.cache.expect("a cache").new_len;
        let new = |dim| Laid::new(dtype, order, [self.case.lengths.len(), new_len, heads, dim]);
        let (mut new_k, mut new_v) = (new(self.case.head_dim), new(self.case.value_dim));
        let (with_k, with_v) = (self.k.clone(), self.v.clone());
        let hole = |dim: usize| vec![f64::NAN; dim];
        self.each_key(|cached, place, token, head, new| {
            let Some((sequence, number)) = new else { return };
            new_k.write([sequence, number, head], cached.key(token, head));
            new_v.write([sequence, number, head], cached.value(token, head));
            cached.k.write(place, &hole(cached.case.head_dim));
            cached.v.write(place, &hole(cached.case.value_dim));
        });
        let positions = self.lengths.iter().max().map_or(0, |&len| len as usize) + 301;
        let half = rotary.map_or(0, |(dim, _)| dim / 2);
        let mut random = Random::new(self.case.seed ^ 0x707a);
        // Rows of tables may lie apart.
        let mut table = || {
            let mut laid = Laid::new(dtype, Order::Sliced, [1, positions, 1, half]);
            for position in 0..positions {
                let values: Vec<f64> = (0..half).map(|_| random.uniform()).collect();
                laid.write([0, position, 0], &values);
            }
            laid
        };
        let (mut cos, mut sin) = (table(), table());
        let description = Append {
            k: new_k.strides(),
            v: new_v.strides(),
            rotary: rotary.map(|(dim, pairs)| Rotary {
                dim,
                pairs,
                positions,
                cos_stride: cos.strides().row,
                sin_stride: sin.strides().row,
                queries_advance: self.case.causal,
            }),
        };
        let (mut q, mut k, mut v) = (self.run.q.exact.clone(), self.k.exact(), self.v.exact());
        let exact = [&mut new_k, &mut new_v, &mut cos, &mut sin].map(Laid::exact);
        let [exact_k, exact_v, exact_cos, exact_sin] = &exact;
        let query_offsets = &self.run.query_offsets;
        let inputs = ReferenceAppend {
            k: exact_k,
            v: exact_v,
            cos: exact_cos,
            sin: exact_sin,
            query_offsets,
            cache: self.buffers(),
        };
        reference::append(&self.problem, &description, &inputs, &mut q, &mut k, &mut v);

        let tokens = self.problem.lengths.query_rows();
        let query_heads = self.problem.query_heads;
        let mut turned = Laid::new(dtype, Order::RowMajor, [1, tokens, query_heads, self.case.head_dim]);
        let inputs = AppendInputs {
            k: new_k.bytes.as_ptr(),
            v: new_v.bytes.as_ptr(),
            cos: cos.bytes.as_ptr(),
            sin: sin.bytes.as_ptr(),
            q: self.run.q.bytes.as_ptr(),
            query_offsets,
            cache: self.buffers(),
        };
        let (mut k_cache, mut v_cache) = (self.k.clone(), self.v.clone());
        let outputs = AppendOutputs {
            k_cache: k_cache.bytes.as_mut_ptr(),
            v_cache: v_cache.bytes.as_mut_ptr(),
            q: turned.bytes.as_mut_ptr(),
            q_strides: turned.strides(),
        };
        // SAFETY: all buffers were made for this problem.
        unsafe { append(&self.problem, &description, isa, threads, &inputs, &outputs) }.expect("enough memory");

        close(dtype, &k_cache.exact(), &k, "k_cache");
        if rotary.is_some() {
            // Rows outside all sequences stay as they were.
            let covered = *query_offsets.last().expect("offsets") as usize * query_heads * self.case.head_dim;
            close(dtype, &turned.exact()[..covered], &q[..covered], "q");
            assert!(turned.exact()[covered..].iter().all(|x| x.is_nan()), "rows of no sequence were written");
        }
        // But for rotated keys the caches are now, byte for byte, what they are with all keys.
        self.k = with_k;
        self.v = with_v;
        let dim = rotary.map_or(0, |(dim, _)| dim) * dtype.size();
        self.each_key(|cached, place, _, _, new| {
            if new.is_some() {
                cached.k.row(place)[..dim].copy_from_slice(&k_cache.row(place)[..dim]);
            }
        });
        assert!(self.k.bytes == k_cache.bytes, "k_cache changed where it should not, or a copy is wrong");
        assert!(self.v.bytes == v_cache.bytes, "v_cache changed where it should not, or a copy is wrong");
    }
}

fn row(values: &[f64], index: usize, len: usize) -> &[f64] {
    &values[index * len..(index + 1) * len]
}

/// Values of magnitude up to 8 times tables of up to 1: products and their sum are rounded in float32, the result once more.
fn close(dtype: Dtype, got: &[f64], want: &[f64], name: &str) {
    let unit = match dtype {
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
    };
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let bound = 3.0 * 2f64.powi(-24) * 16.0 + unit * want.abs() + 2f64.powi(-25);
        let same = got.is_nan() && want.is_nan() || (got - want).abs() <= bound;
        assert!(same, "{name}[{i}] is {got:e}, the reference {want:e}, bound {bound:e}");
    }
}

/// The problem of `run` over the caches.
fn described(
    run: &Run,
    case: &Case,
    [k, v]: [&Laid; 2],
    (slots, left_pad): (&[i32], &[i32]),
    per_sequence: usize,
    new_len: usize,
) -> Problem {
    let batch = case.lengths.len();
    let (batch_shape, table_shape) = ([batch as i64], [batch as i64, per_sequence as i64]);
    let table_strides = [per_sequence as i64, 1];
    let options = CacheOptions {
        lengths: Some(LengthsArgument::Each(&batch_shape)),
        batch_index: (!slots.is_empty()).then_some(&batch_shape),
        left_pad: (!left_pad.is_empty()).then_some(&batch_shape),
        block_table: (per_sequence > 0).then_some((&table_shape, &table_strides)),
        new_len,
    };
    let longest_query = run.problem.lengths.max_query_len() as i64;
    let wide = |laid: &Laid| [laid.shape, laid.strides].map(|sizes| sizes.map(|size| size as i64));
    let ([k_shape, k_strides], [v_shape, v_strides]) = (wide(k), wide(v));
    let meta = |shape, strides| TensorMeta { dtype: case.dtype, shape, strides };
    let described = Problem::packed_cached(
        run.q.meta(case.dtype),
        meta(&k_shape, &k_strides),
        meta(&v_shape, &v_strides),
        batch,
        (longest_query, None),
        &options,
        &Options::default(),
    )
    .expect("the cache is valid");
    // What the scores are is the run's.
    let mut problem = run.problem;
    (problem.cache, problem.lengths) = (described.cache, described.lengths);
    (problem.k, problem.v) = (described.k, described.v);
    problem
}
