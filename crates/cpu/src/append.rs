//! New keys and values written into a cache, and queries rotated, in one pass over the new tokens.
//!
//! A token's row of cos and sin is converted once for all of its heads. Every row is read, rotated in float32, rounded
//! and written where it belongs; there is no copy between.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use mtlflashattn_core::{Append, Cache, CacheBuffers, Dtype, Lengths, Pairs, Problem, Rotary, Strides};

use crate::element::{Element, narrow, widen};
use crate::isa::{Isa, Simd, portable::Portable};
use crate::run::with_scratch;
use crate::workspace::Carver;
use crate::{Error, pool};

/// Where the inputs of an append lie. Strides of the new keys and values are those of the [`Append`], those of q are
/// the [`Problem`]'s.
#[derive(Clone, Copy, Debug)]
pub struct AppendInputs<'a> {
    /// First element of the new keys, `[batch, new_len, key_heads, head_dim]`.
    pub k: *const u8,
    /// First element of the new values, `[batch, new_len, key_heads, value_dim]`.
    pub v: *const u8,
    /// First element of cos, `[positions, dim / 2]`; null without rotary embeddings.
    pub cos: *const u8,
    /// First element of sin; null without rotary embeddings.
    pub sin: *const u8,
    /// First element of q; not read without rotary embeddings.
    pub q: *const u8,
    /// `cu_seqlens_q` of packed queries, checked; else empty.
    pub query_offsets: &'a [i32],
    /// The buffers of the cache, checked by [`Problem::check_cache`] and [`Append::check_positions`].
    pub cache: CacheBuffers<'a>,
}

/// What an append writes. Strides of the caches are the [`Problem`]'s.
#[derive(Clone, Copy, Debug)]
pub struct AppendOutputs {
    /// First element of the cache of keys.
    pub k_cache: *mut u8,
    /// First element of the cache of values.
    pub v_cache: *mut u8,
    /// First element of the rotated queries, in the shape of q; null without rotary embeddings. Rows outside all packed
    /// sequences are not written.
    pub q: *mut u8,
    /// Strides of the rotated queries.
    pub q_strides: Strides,
}

/// Writes new keys, rotated, and new values into the cache of `problem`, and rotated queries to a tensor of their own
/// (Su et al., "`RoFormer`", 2021, in the two conventions of [`Pairs`]). Products are formed in float32 and each element is
/// rounded once. Results do not depend on the number of threads.
///
/// # Errors
/// [`Error::OutOfMemory`], before anything is written.
///
/// # Safety
/// All pointers must be valid for the shapes and strides of `problem` and `append`, the outputs must overlap nothing else,
/// and the buffers of the cache must have been checked.
///
/// # Panics
/// If `problem` has no cache, or this machine cannot run `isa`.
pub unsafe fn append(
    problem: &Problem,
    append: &Append,
    isa: Isa,
    threads: usize,
    inputs: &AppendInputs<'_>,
    outputs: &AppendOutputs,
) -> Result<(), Error> {
    assert!(isa.is_available(), "this machine cannot run {}", isa.name());
    let cache = problem.cache.as_ref().expect("keys are appended to a cache");
    let call = Call { problem, cache, append, inputs, outputs };
    // SAFETY: the caller's contract; the instruction set was just checked.
    unsafe { call.run(isa, threads) }
}

/// Bytes that repay waking another thread.
const PARALLEL_BYTES: usize = 256 * 1024;
/// Tokens that a thread takes at once.
const TOKENS: usize = 32;

struct Call<'a> {
    problem: &'a Problem,
    cache: &'a Cache,
    append: &'a Append,
    inputs: &'a AppendInputs<'a>,
    outputs: &'a AppendOutputs,
}

// SAFETY: inputs are only read, and every token is written by one thread.
unsafe impl Sync for Call<'_> {}

/// Offsets in a thread's scratch block, in float32 values.
#[derive(Clone, Copy)]
struct Scratch {
    cos: usize,
    sin: usize,
    row: usize,
    len: usize,
}

type Kernel = unsafe fn(&Call<'_>, usize, Scratch, *mut f32);

/// Instantiates [`Call::token`] inside a function that enables an instruction set.
macro_rules! kernel {
    ($isa:ty, $dtype:expr $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn float32(call: &Call<'_>, token: usize, scratch: Scratch, block: *mut f32) {
            call.token::<$isa, f32>(token, scratch, block);
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn float16(call: &Call<'_>, token: usize, scratch: Scratch, block: *mut f32) {
            call.token::<$isa, f16>(token, scratch, block);
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn bfloat16(call: &Call<'_>, token: usize, scratch: Scratch, block: *mut f32) {
            call.token::<$isa, bf16>(token, scratch, block);
        }
        match $dtype {
            Dtype::F32 => float32 as Kernel,
            Dtype::F16 => float16,
            Dtype::Bf16 => bfloat16,
        }
    }};
}

fn kernel(isa: Isa, dtype: Dtype) -> Kernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => kernel!(crate::isa::avx2::Avx2, dtype, "avx2,fma,f16c"),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => kernel!(crate::isa::avx512::Avx512, dtype, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => kernel!(crate::isa::neon::Neon, dtype, "neon"),
        _ => kernel!(Portable, dtype),
    }
}

impl Call<'_> {
    unsafe fn run(&self, isa: Isa, threads: usize) -> Result<(), Error> {
        let kernel = kernel(isa, self.problem.dtype);
        let tokens = self.new_tokens() + self.query_tokens();
        let scratch = self.scratch();
        let next = AtomicUsize::new(0);
        let work = |block: *mut f32| loop {
            let first = next.fetch_add(TOKENS, Ordering::Relaxed);
            if first >= tokens {
                return;
            }
            for token in first..(first + TOKENS).min(tokens) {
                // SAFETY: `append`'s contract; the scratch block has the size that the layout asks for.
                unsafe { kernel(self, token, scratch, block) }
            }
        };
        let row_bytes = self.problem.head_dim.max(self.problem.value_dim) * self.problem.dtype.size();
        let heads = self.problem.query_heads + self.problem.key_heads;
        let parallel = tokens * heads * row_bytes / PARALLEL_BYTES;
        let workers = parallel.min(tokens.div_ceil(TOKENS)).min(threads).saturating_sub(1);
        with_scratch(scratch.len, |block| {
            // A helper without memory leaves its share to the caller.
            let helper = || drop(with_scratch(scratch.len, work));
            pool::run(workers, &helper, || work(block));
        })
    }

    fn new_tokens(&self) -> usize {
        self.problem.lengths.batch() * self.cache.new_len
    }

    /// Rows of q that belong to a sequence, when they are rotated.
    fn query_tokens(&self) -> usize {
        match (self.append.rotary, self.problem.lengths) {
            (None, _) => 0,
            (Some(_), Lengths::Dense { batch, query_len, .. }) => batch * query_len,
            (Some(_), Lengths::Packed { batch, .. }) => {
                (self.inputs.query_offsets[batch] - self.inputs.query_offsets[0]) as usize
            }
        }
    }

    fn scratch(&self) -> Scratch {
        let dim = self.append.rotary.map_or(0, |rotary| rotary.dim);
        let mut carver = Carver::default();
        let (cos, sin, row) = (carver.take(dim / 2), carver.take(dim / 2), carver.take(dim));
        Scratch { cos, sin, row, len: carver.len() }
    }

    /// Appends new token number `token`, or rotates the query of that number behind them.
    #[inline(always)]
    unsafe fn token<S: Simd, T: Element>(&self, token: usize, scratch: Scratch, block: *mut f32) {
        match token.checked_sub(self.new_tokens()) {
            None => self.new_key::<S, T>(token / self.cache.new_len, token % self.cache.new_len, scratch, block),
            Some(query) => self.query::<S, T>(query, scratch, block),
        }
    }

    #[inline(always)]
    unsafe fn new_key<S: Simd, T: Element>(&self, sequence: usize, token: usize, scratch: Scratch, block: *mut f32) {
        let (problem, append, buffers) = (self.problem, self.append, &self.inputs.cache);
        let filled = self.cache.filled(buffers, sequence);
        let key = self.cache.key_len(buffers, sequence) - self.cache.new_len + token;
        let place = self.cache.row(buffers, sequence, key);
        let turn = append.rotary.map(|rotary| self.turn::<S, T>(rotary, filled + token, scratch, block));
        for head in 0..problem.key_heads {
            let k = self.inputs.k.cast::<T>().offset(offset(&append.k, sequence, token, head));
            let v = self.inputs.v.cast::<T>().offset(offset(&append.v, sequence, token, head));
            let k_to = self.outputs.k_cache.cast::<T>().offset(offset(&problem.k, place.block, place.row, head));
            let v_to = self.outputs.v_cache.cast::<T>().offset(offset(&problem.v, place.block, place.row, head));
            write::<S, T>(turn.as_ref(), k, problem.head_dim, k_to);
            v_to.copy_from_nonoverlapping(v, problem.value_dim);
        }
    }

    #[inline(always)]
    unsafe fn query<S: Simd, T: Element>(&self, query: usize, scratch: Scratch, block: *mut f32) {
        let Some(rotary) = self.append.rotary else { return };
        let Place { sequence, query, batch, row } = self.query_place(query);
        let position = rotary.query_position(self.cache.filled(&self.inputs.cache, sequence), query);
        let turn = self.turn::<S, T>(rotary, position, scratch, block);
        for head in 0..self.problem.query_heads {
            let from = self.inputs.q.cast::<T>().offset(offset(&self.problem.q, batch, row, head));
            let to = self.outputs.q.cast::<T>().offset(offset(&self.outputs.q_strides, batch, row, head));
            write::<S, T>(Some(&turn), from, self.problem.head_dim, to);
        }
    }

    /// The query of number `index` among those of all sequences.
    fn query_place(&self, index: usize) -> Place {
        match self.problem.lengths {
            Lengths::Dense { query_len, .. } => {
                let (sequence, query) = (index / query_len, index % query_len);
                Place { sequence, query, batch: sequence, row: query }
            }
            Lengths::Packed { .. } => {
                let offsets = self.inputs.query_offsets;
                let row = index + offsets[0] as usize;
                let sequence = offsets.partition_point(|&start| start as usize <= row) - 1;
                Place { sequence, query: row - offsets[sequence] as usize, batch: 0, row }
            }
        }
    }

    /// The rotation by `position`, its cos and sin converted to the scratch block.
    #[inline(always)]
    unsafe fn turn<S: Simd, T: Element>(
        &self,
        rotary: Rotary,
        position: usize,
        scratch: Scratch,
        block: *mut f32,
    ) -> Turn {
        let half = rotary.dim / 2;
        let (cos, sin) = (block.add(scratch.cos), block.add(scratch.sin));
        let row = |table: *const u8, stride: i64| table.cast::<T>().offset((position as i64 * stride) as isize);
        widen::<S, T>(row(self.inputs.cos, rotary.cos_stride), half, half, cos);
        widen::<S, T>(row(self.inputs.sin, rotary.sin_stride), half, half, sin);
        Turn { rotary, cos, sin, row: block.add(scratch.row) }
    }
}

/// Where a row of q lies, and whose it is.
struct Place {
    sequence: usize,
    query: usize,
    batch: usize,
    row: usize,
}

/// The rotation of one token.
struct Turn {
    rotary: Rotary,
    cos: *const f32,
    sin: *const f32,
    /// Room for the values of a row that are rotated.
    row: *mut f32,
}

impl Turn {
    /// Rotates what is in `row`.
    #[inline(always)]
    unsafe fn apply<S: Simd>(&self) {
        let (dim, half) = (self.rotary.dim, self.rotary.dim / 2);
        let mut pair = 0;
        while self.rotary.pairs == Pairs::Halves && pair + S::LANES <= half {
            let (x, y) = (S::load(self.row.add(pair)), S::load(self.row.add(half + pair)));
            let (cos, sin) = (S::load(self.cos.add(pair)), S::load(self.sin.add(pair)));
            S::store(self.row.add(pair), S::sub(S::mul(x, cos), S::mul(y, sin)));
            S::store(self.row.add(half + pair), S::add(S::mul(x, sin), S::mul(y, cos)));
            pair += S::LANES;
        }
        for pair in pair..half {
            let (first, second) = self.rotary.pairs.places(pair, dim);
            let (x, y) = (self.row.add(first).read(), self.row.add(second).read());
            let (cos, sin) = (self.cos.add(pair).read(), self.sin.add(pair).read());
            self.row.add(first).write(x * cos - y * sin);
            self.row.add(second).write(x * sin + y * cos);
        }
    }
}

/// Writes a row of `width` elements, its first ones turned.
#[inline(always)]
unsafe fn write<S: Simd, T: Element>(turn: Option<&Turn>, from: *const T, width: usize, to: *mut T) {
    let mut dim = 0;
    if let Some(turn) = turn {
        dim = turn.rotary.dim;
        widen::<S, T>(from, dim, dim, turn.row);
        turn.apply::<S>();
        narrow::<S, T>(turn.row, dim, to);
    }
    to.add(dim).copy_from_nonoverlapping(from.add(dim), width - dim);
}

fn offset(strides: &Strides, batch: usize, row: usize, head: usize) -> isize {
    (batch as i64 * strides.batch + row as i64 * strides.row + head as i64 * strides.head) as isize
}
