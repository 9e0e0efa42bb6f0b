//! What one attention call asks for, validated once.

#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;

use crate::cache::{self, Cache, CacheOptions, Queries};
use crate::{Alignment, Dropout, Dtype, Error, Mask, Result};

/// Shape and strides (in elements) of a tensor as the caller handed it over.
#[derive(Clone, Copy, Debug)]
pub struct TensorMeta<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Size of each dimension.
    pub shape: &'a [i64],
    /// Distance between neighbours along each dimension, in elements; may be 0 or negative.
    pub strides: &'a [i64],
}

/// Distances in elements between neighbouring sequences, rows (tokens) and heads. The head dimension has stride 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Strides {
    /// From one sequence to the next; 0 when sequences are packed along the rows.
    pub batch: i64,
    /// From one token to the next.
    pub row: i64,
    /// From one head to the next.
    pub head: i64,
}

impl Strides {
    /// Strides of a `[batch, row, head, dim]` (dense) or `[row, head, dim]` (packed) tensor.
    #[must_use]
    pub fn of(tensor: &TensorMeta<'_>) -> Self {
        match *tensor.strides {
            [batch, row, head, _] => Self { batch, row, head },
            [row, head, _] => Self { batch: 0, row, head },
            _ => Self::default(),
        }
    }
}

/// How tokens are grouped into sequences. Where keys lie in a cache, its buffers say how many a sequence has: the lengths
/// here are bounds, and `total_key` counts the rows of the whole cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lengths {
    /// `batch` sequences of equal length.
    Dense {
        /// Number of sequences.
        batch: usize,
        /// Queries in each.
        query_len: usize,
        /// Keys in each.
        key_len: usize,
    },
    /// Ragged sequences behind one another, delimited by `cu_seqlens` offsets that the engine receives as a buffer.
    Packed {
        /// Number of sequences.
        batch: usize,
        /// Rows of q.
        total_query: usize,
        /// Rows of k and v.
        total_key: usize,
        /// The caller's bound on the longest query sequence, at most `total_query`.
        max_query_len: usize,
        /// The caller's bound on the longest key sequence, at most `total_key`.
        max_key_len: usize,
    },
}

impl Lengths {
    /// Number of sequences.
    #[must_use]
    pub const fn batch(&self) -> usize {
        match *self {
            Self::Dense { batch, .. } | Self::Packed { batch, .. } => batch,
        }
    }

    /// Longest query sequence (for packed lengths: the caller's bound).
    #[must_use]
    pub const fn max_query_len(&self) -> usize {
        match *self {
            Self::Dense { query_len, .. } => query_len,
            Self::Packed { max_query_len, .. } => max_query_len,
        }
    }

    /// Longest key sequence (for packed lengths: the caller's bound).
    #[must_use]
    pub const fn max_key_len(&self) -> usize {
        match *self {
            Self::Dense { key_len, .. } => key_len,
            Self::Packed { max_key_len, .. } => max_key_len,
        }
    }

    /// Rows of q over all sequences.
    #[must_use]
    pub const fn query_rows(&self) -> usize {
        match *self {
            Self::Dense { batch, query_len, .. } => batch * query_len,
            Self::Packed { total_query, .. } => total_query,
        }
    }

    /// Checks the contents of `cu_seqlens_q` and `cu_seqlens_k`: `batch + 1` offsets that never decrease, stay inside
    /// the tensors and keep every sequence within `max_seqlen_*`. They need not end at the total.
    ///
    /// # Errors
    /// [`Error::Value`] names the first offending entry.
    pub fn check_offsets(&self, query_offsets: &[i32], key_offsets: &[i32]) -> Result<()> {
        let Self::Packed { batch, total_key, max_key_len, .. } = *self else { return Ok(()) };
        self.check_query_offsets(query_offsets)?;
        check_sequence_offsets("cu_seqlens_k", "max_seqlen_k", key_offsets, batch, total_key, max_key_len)
    }

    /// The part of [`Self::check_offsets`] that is about `cu_seqlens_q`: all of it where keys lie in a cache.
    ///
    /// # Errors
    /// [`Error::Value`] names the first offending entry.
    pub fn check_query_offsets(&self, query_offsets: &[i32]) -> Result<()> {
        let Self::Packed { batch, total_query, max_query_len, .. } = *self else { return Ok(()) };
        check_sequence_offsets("cu_seqlens_q", "max_seqlen_q", query_offsets, batch, total_query, max_query_len)
    }
}

pub(crate) fn check_sequence_offsets(
    name: &'static str,
    max_name: &'static str,
    offsets: &[i32],
    batch: usize,
    total: usize,
    max_len: usize,
) -> Result<()> {
    if offsets.len() != batch + 1 {
        return Err(Error::Shape {
            argument: name,
            got: format!("({})", offsets.len()),
            allowed: format!("({}): one offset more than there are sequences", batch + 1),
        });
    }
    let mut previous = 0;
    for (index, &offset) in offsets.iter().enumerate() {
        if offset < previous || offset as usize > total {
            return Err(Error::Value {
                argument: name,
                got: format!("{offset} at index {index}"),
                allowed: format!("offsets that never decrease, from 0 to the {total} rows of the tensor"),
            });
        }
        let len = if index == 0 { 0 } else { (offset - previous) as usize };
        if len > max_len {
            return Err(Error::Value {
                argument: max_name,
                got: max_len.to_string(),
                allowed: format!("at least {len}, the length of sequence {} in {name}", index - 1),
            });
        }
        previous = offset;
    }
    Ok(())
}

/// What a bias element means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BiasKind {
    /// Added to the scaled score.
    Additive(Dtype),
    /// One byte: 0 hides the key, anything else shows it.
    Boolean,
}

/// Strides of a bias or boolean mask broadcast to `[batch, query_head, query, key]`; 0 where it is broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bias {
    /// What an element means.
    pub kind: BiasKind,
    /// From one sequence to the next.
    pub batch: i64,
    /// From one query head to the next.
    pub head: i64,
    /// From one query to the next.
    pub query: i64,
    /// From one key to the next.
    pub key: i64,
}

/// Strides of ALiBi slopes broadcast to `[batch, query_head]`, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AlibiStrides {
    /// 0 for slopes of shape `[query_heads]`.
    pub batch: i64,
    /// From one head to the next.
    pub head: i64,
}

/// Everything of a call that is not q, k or v.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Factor on `q . k`; `None` is `head_dim ** -0.5`.
    pub softmax_scale: Option<f64>,
    /// Causal attention.
    pub causal: bool,
    /// Sliding window `(left, right)`, inclusive; negative is open. The default `(0, 0)` is a real window:
    /// pass `(-1, -1)` for none.
    pub window: (i64, i64),
    /// Where the diagonal lies.
    pub alignment: Alignment,
    /// `softcap * tanh(score / softcap)`; 0 is off.
    pub softcap: f64,
    /// ALiBi slopes, float32, `[query_heads]` or `[batch, query_heads]`.
    pub alibi_slopes: Option<(&'a [i64], &'a [i64])>,
    /// Bias or mask: kind, shape, strides; broadcastable to `[batch, query_heads, query_len, key_len]`.
    pub bias: Option<(BiasKind, &'a [i64], &'a [i64])>,
    /// Attention sinks, float32: shape and strides of `[query_heads]`.
    pub sinks: Option<(&'a [i64], &'a [i64])>,
    /// What is dropped; not together with a softcap, as in `flash_attn`.
    pub dropout: Option<Dropout>,
    /// Into how many parts the keys of a sequence are split.
    pub splits: Option<NonZeroUsize>,
}

/// One valid attention call.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Problem {
    /// Element type of q, k, v and the output.
    pub dtype: Dtype,
    /// Sequences and their lengths.
    pub lengths: Lengths,
    /// The cache that k and v are, if they are one; else k and v hold the keys that `lengths` says.
    pub cache: Option<Cache>,
    /// Heads of q and of the output.
    pub query_heads: usize,
    /// Heads of k and v; query head `h` reads key head `h / group()`.
    pub key_heads: usize,
    /// Head dimension of q and k.
    pub head_dim: usize,
    /// Head dimension of v and the output.
    pub value_dim: usize,
    /// Factor on `q . k`.
    pub scale: f32,
    /// Softcap; 0 is off.
    pub softcap: f32,
    /// Visible band.
    pub mask: Mask,
    /// ALiBi: `-slope * |key - diagonal|` is added after the softcap.
    pub alibi: Option<AlibiStrides>,
    /// Additive bias or boolean mask, applied after ALiBi.
    pub bias: Option<Bias>,
    /// Stride of the sinks: one more logit per query head that takes probability and has no value.
    pub sinks: Option<i64>,
    /// Which weights are dropped, after the softmax. Of this only whether there is any may matter to plans and kernels.
    pub dropout: Option<Dropout>,
    /// Into how many parts the keys of a sequence are split, as far as there are keys for as many and the engine splits
    /// keys at all; `None` leaves it to the planner.
    pub splits: Option<NonZeroUsize>,
    /// Strides of q.
    pub q: Strides,
    /// Strides of k.
    pub k: Strides,
    /// Strides of v.
    pub v: Strides,
}

/// The dimension names of a dense and of a packed tensor, for messages.
const DENSE: &str = "(batch, seqlen, heads, head_dim)";
const PACKED: &str = "(total, heads, head_dim)";
const PAGED: &str = "(pages, page_size, heads, head_dim)";

impl Problem {
    /// A batch of equally long sequences: `q [batch, query_len, query_heads, head_dim]`,
    /// `k [batch, key_len, key_heads, head_dim]`, `v [batch, key_len, key_heads, value_dim]`.
    ///
    /// # Errors
    /// Names the argument, what came and what is allowed.
    pub fn dense(q: TensorMeta<'_>, k: TensorMeta<'_>, v: TensorMeta<'_>, options: &Options<'_>) -> Result<Self> {
        let [batch, query_len, query_heads, head_dim] = sizes("q", &q, DENSE)?;
        let [key_batch, key_len, key_heads, key_dim] = sizes("k", &k, DENSE)?;
        let [value_batch, value_len, value_heads, value_dim] = sizes("v", &v, DENSE)?;
        expect_size("k", &k, "batch", key_batch, batch, "q")?;
        expect_size("v", &v, "batch", value_batch, batch, "q")?;
        expect_size("v", &v, "seqlen", value_len, key_len, "k")?;
        let heads = [query_heads, key_heads, value_heads];
        let dims = [head_dim, key_dim, value_dim];
        Self::build([q, k, v], Lengths::Dense { batch, query_len, key_len }, heads, dims, options)
    }

    /// Ragged sequences packed along the rows: `q [total_query, query_heads, head_dim]`,
    /// `k [total_key, key_heads, head_dim]`, `v [total_key, key_heads, value_dim]`.
    ///
    /// # Errors
    /// Names the argument, what came and what is allowed.
    pub fn packed(
        q: TensorMeta<'_>,
        k: TensorMeta<'_>,
        v: TensorMeta<'_>,
        batch: usize,
        max_seqlen: (i64, i64),
        options: &Options<'_>,
    ) -> Result<Self> {
        let [total_query, query_heads, head_dim] = sizes("q", &q, PACKED)?;
        let [total_key, key_heads, key_dim] = sizes("k", &k, PACKED)?;
        let [total_value, value_heads, value_dim] = sizes("v", &v, PACKED)?;
        expect_size("v", &v, "total", total_value, total_key, "k")?;
        if options.bias.is_some() {
            return Err(Error::Unsupported {
                argument: "bias",
                got: "a bias over packed sequences".into(),
                instead: "pad the sequences into a batch, or call once per sequence".into(),
            });
        }
        let lengths = Lengths::Packed {
            batch,
            total_query,
            total_key,
            max_query_len: max_len("max_seqlen_q", max_seqlen.0)?.min(total_query),
            max_key_len: max_len("max_seqlen_k", max_seqlen.1)?.min(total_key),
        };
        let heads = [query_heads, key_heads, value_heads];
        Self::build([q, k, v], lengths, heads, [head_dim, key_dim, value_dim], options)
    }

    /// Equally many queries for each sequence, with keys in a cache: `q [batch, query_len, query_heads, head_dim]`,
    /// `k_cache [slots or pages, slot_len or page_len, key_heads, head_dim]`, and `v_cache` the same with `value_dim`.
    ///
    /// # Errors
    /// Names the argument, what came and what is allowed.
    pub fn cached(
        q: TensorMeta<'_>,
        k_cache: TensorMeta<'_>,
        v_cache: TensorMeta<'_>,
        cache: &CacheOptions<'_>,
        options: &Options<'_>,
    ) -> Result<Self> {
        let [batch, query_len, query_heads, head_dim] = sizes("q", &q, DENSE)?;
        let queries = Queries::Dense { batch, query_len };
        Self::over_cache([q, k_cache, v_cache], queries, (query_heads, head_dim), cache, options)
    }

    /// Ragged queries packed along the rows, `q [total_query, query_heads, head_dim]`, with keys in a cache as in
    /// [`Self::cached`].
    ///
    /// # Errors
    /// Names the argument, what came and what is allowed.
    pub fn packed_cached(
        q: TensorMeta<'_>,
        k_cache: TensorMeta<'_>,
        v_cache: TensorMeta<'_>,
        batch: usize,
        max_seqlen: (i64, Option<i64>),
        cache: &CacheOptions<'_>,
        options: &Options<'_>,
    ) -> Result<Self> {
        let [total_query, query_heads, head_dim] = sizes("q", &q, PACKED)?;
        let max_query_len = max_len("max_seqlen_q", max_seqlen.0)?;
        let max_key_len = max_seqlen.1.map(|len| max_len("max_seqlen_k", len)).transpose()?;
        let queries = Queries::Packed { batch, total_query, max_query_len, max_key_len };
        Self::over_cache([q, k_cache, v_cache], queries, (query_heads, head_dim), cache, options)
    }

    fn over_cache(
        [q, k, v]: [TensorMeta<'_>; 3],
        queries: Queries,
        (query_heads, head_dim): (usize, usize),
        cache_options: &CacheOptions<'_>,
        options: &Options<'_>,
    ) -> Result<Self> {
        let (Queries::Dense { batch, .. } | Queries::Packed { batch, .. }) = queries;
        let names = if cache_options.block_table.is_some() { PAGED } else { DENSE };
        let [_, len, key_heads, key_dim] = sizes("k_cache", &k, names)?;
        let [blocks, value_len, value_heads, value_dim] = sizes("v_cache", &v, names)?;
        expect_size("v_cache", &v, "dimension 0", blocks, k.shape[0] as usize, "k_cache")?;
        expect_size("v_cache", &v, "dimension 1", value_len, len, "k_cache")?;
        if options.bias.is_some() {
            return Err(Error::Unsupported {
                argument: "bias",
                got: "a bias over keys in a cache".into(),
                instead: "gather the keys into a batch".into(),
            });
        }
        if options.dropout.is_some() {
            return Err(Error::Unsupported {
                argument: "dropout_p",
                got: "dropout over keys in a cache".into(),
                instead: "pass dropout_p=0.0".into(),
            });
        }
        let cache = Cache::new(&k, batch, cache_options)?;
        let lengths = cache::lengths(&cache, queries);
        let (heads, dims) = ([query_heads, key_heads, value_heads], [head_dim, key_dim, value_dim]);
        let problem = Self::build([q, k, v], lengths, heads, dims, options).map_err(cache::name_caches)?;
        Ok(Self { cache: Some(cache), ..problem })
    }

    fn build(
        [q, k, v]: [TensorMeta<'_>; 3],
        lengths: Lengths,
        [query_heads, key_heads, value_heads]: [usize; 3],
        [head_dim, key_dim, value_dim]: [usize; 3],
        options: &Options<'_>,
    ) -> Result<Self> {
        for (argument, tensor) in [("k", &k), ("v", &v)] {
            if tensor.dtype != q.dtype {
                return Err(Error::Dtype {
                    argument,
                    got: tensor.dtype.to_string(),
                    allowed: format!("{}, the dtype of q", q.dtype),
                });
            }
        }
        check_heads(&q, &k, query_heads, key_heads)?;
        expect_size("v", &v, "heads", value_heads, key_heads, "k")?;
        expect_size("k", &k, "head_dim", key_dim, head_dim, "q")?;
        for (argument, tensor, dim) in [("q", &q, head_dim), ("v", &v, value_dim)] {
            if dim == 0 {
                return Err(shape_error(argument, tensor, "a head_dim of at least 1"));
            }
        }
        for (argument, tensor) in [("q", &q), ("k", &k), ("v", &v)] {
            check_extent(argument, tensor.shape, tensor.strides, tensor.dtype.size())?;
        }
        let out = [lengths.query_rows(), query_heads, value_dim].map(|size| size as i64);
        check_extent("out", &out, &[0; 3], q.dtype.size())?;
        let batch = lengths.batch();
        let softcap = softcap(options.softcap)?;
        if options.dropout.is_some() && softcap > 0.0 {
            return Err(Error::Unsupported {
                argument: "softcap",
                got: "softcap together with dropout".into(),
                instead: "pass dropout_p=0.0 or softcap=0.0".into(),
            });
        }
        Ok(Self {
            dtype: q.dtype,
            lengths,
            cache: None,
            query_heads,
            key_heads,
            head_dim,
            value_dim,
            scale: finite("softmax_scale", options.softmax_scale.unwrap_or((head_dim as f64).powf(-0.5)))?,
            softcap,
            mask: Mask::new(options.causal, options.window, options.alignment),
            alibi: options.alibi_slopes.map(|slopes| alibi(slopes, batch, query_heads)).transpose()?,
            bias: options.bias.map(|b| bias(b, query_heads, &lengths)).transpose()?,
            sinks: options.sinks.map(|s| sinks(s, query_heads)).transpose()?,
            dropout: options.dropout,
            splits: options.splits,
            q: Strides::of(&q),
            k: Strides::of(&k),
            v: Strides::of(&v),
        })
    }

    /// Query heads that share one key head.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.query_heads / self.key_heads
    }

    /// Multiply-adds times two of both matrix products, counting every key of every query (no mask).
    #[must_use]
    pub fn flops(&self) -> f64 {
        let rows = self.lengths.query_rows() as f64 * self.query_heads as f64;
        2.0 * rows * self.lengths.max_key_len() as f64 * (self.head_dim + self.value_dim) as f64
    }
}

pub(crate) fn shape_text(shape: &[i64]) -> String {
    let sizes: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("({})", sizes.join(", "))
}

pub(crate) fn shape_error(argument: &'static str, tensor: &TensorMeta<'_>, allowed: impl Into<String>) -> Error {
    Error::Shape { argument, got: shape_text(tensor.shape), allowed: allowed.into() }
}

pub(crate) fn sizes<const N: usize>(
    argument: &'static str,
    tensor: &TensorMeta<'_>,
    names: &str,
) -> Result<[usize; N]> {
    let allowed = || format!("{N} dimensions {names}");
    let shape: [i64; N] = tensor.shape.try_into().map_err(|_| shape_error(argument, tensor, allowed()))?;
    if tensor.strides.len() != N || shape.iter().any(|&size| size < 0) {
        return Err(shape_error(argument, tensor, allowed()));
    }
    if tensor.strides[N - 1] != 1 && shape[N - 1] > 1 {
        return Err(Error::Value {
            argument,
            got: format!("a tensor with last stride {}", tensor.strides[N - 1]),
            allowed: "tensors whose last dimension is contiguous".into(),
        });
    }
    Ok(shape.map(|size| size as usize))
}

pub(crate) fn expect_size(
    argument: &'static str,
    tensor: &TensorMeta<'_>,
    dimension: &str,
    got: usize,
    want: usize,
    like: &str,
) -> Result<()> {
    if got == want {
        return Ok(());
    }
    Err(shape_error(argument, tensor, format!("{dimension} = {want}, as in {like}")))
}

fn check_heads(q: &TensorMeta<'_>, k: &TensorMeta<'_>, query_heads: usize, key_heads: usize) -> Result<()> {
    if query_heads == 0 {
        return Err(shape_error("q", q, "at least one head"));
    }
    if key_heads == 0 || !query_heads.is_multiple_of(key_heads) {
        return Err(shape_error("k", k, format!("a number of heads that divides the {query_heads} heads of q")));
    }
    Ok(())
}

/// Most bytes between the first and the last element of a tensor, and most bytes of a contiguous copy of it: as much as
/// today's widest user address space, so that no product of sizes and strides overflows an i64.
const MAX_BYTES: i64 = 1 << 56;

pub(crate) fn check_extent(argument: &'static str, shape: &[i64], strides: &[i64], element_size: usize) -> Result<()> {
    let element_size = element_size as i64;
    let mut count = element_size;
    let mut span = 0i64;
    for (&size, &stride) in shape.iter().zip(strides) {
        count = count.saturating_mul(size.max(1));
        span = span.saturating_add((size.max(1) - 1).saturating_mul(stride.saturating_abs()));
    }
    if count <= MAX_BYTES && span.saturating_mul(element_size) <= MAX_BYTES {
        return Ok(());
    }
    Err(Error::Value {
        argument,
        got: format!("a tensor of shape {} with strides {}", shape_text(shape), shape_text(strides)),
        allowed: "tensors that span at most 2**56 bytes".into(),
    })
}

fn max_len(argument: &'static str, value: i64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::Value {
        argument,
        got: value.to_string(),
        allowed: "the length of the longest sequence, at least 0".into(),
    })
}

fn finite(argument: &'static str, value: f64) -> Result<f32> {
    // Engines fold log2(e) into it, which must not overflow.
    const LIMIT: f32 = 8e37;
    let single = value as f32;
    if single.abs() <= LIMIT {
        return Ok(single);
    }
    Err(Error::Value { argument, got: value.to_string(), allowed: format!("a number from -{LIMIT:e} to {LIMIT:e}") })
}

fn softcap(value: f64) -> Result<f32> {
    let single = finite("softcap", value)?;
    // Below the smallest normal number 1 / softcap overflows.
    if single == 0.0 || single >= f32::MIN_POSITIVE {
        return Ok(single);
    }
    Err(Error::Value { argument: "softcap", got: value.to_string(), allowed: "0 (off) or a positive number".into() })
}

fn alibi((shape, strides): (&[i64], &[i64]), batch: usize, heads: usize) -> Result<AlibiStrides> {
    check_extent("alibi_slopes", shape, strides, size_of::<f32>())?;
    let (batch_size, head_size) = (batch as i64, heads as i64);
    match (shape, strides) {
        ([h], [head]) if *h == head_size => Ok(AlibiStrides { batch: 0, head: *head }),
        ([b, h], [batch, head]) if *b == batch_size && *h == head_size => {
            Ok(AlibiStrides { batch: *batch, head: *head })
        }
        _ => Err(Error::Shape {
            argument: "alibi_slopes",
            got: shape_text(shape),
            allowed: format!("({heads}) or ({batch}, {heads}): (heads) or (batch, heads) of q"),
        }),
    }
}

fn bias((kind, shape, strides): (BiasKind, &[i64], &[i64]), heads: usize, lengths: &Lengths) -> Result<Bias> {
    let full = [lengths.batch(), heads, lengths.max_query_len(), lengths.max_key_len()];
    let mut broadcast = [0i64; 4];
    let error = || Error::Shape {
        argument: "bias",
        got: shape_text(shape),
        allowed: format!("a shape that broadcasts to {}", shape_text(&full.map(|size| size as i64))),
    };
    if shape.len() > 4 || shape.len() != strides.len() {
        return Err(error());
    }
    check_extent("bias", shape, strides, size_of::<f32>())?;
    let skip = 4 - shape.len();
    for (axis, (&size, &stride)) in shape.iter().zip(strides).enumerate() {
        broadcast[skip + axis] = match size {
            1 => 0,
            size if size == full[skip + axis] as i64 => stride,
            _ => return Err(error()),
        };
    }
    let [batch, head, query, key] = broadcast;
    Ok(Bias { kind, batch, head, query, key })
}

fn sinks((shape, strides): (&[i64], &[i64]), heads: usize) -> Result<i64> {
    check_extent("sinks", shape, strides, size_of::<f32>())?;
    match (shape, strides) {
        ([size], [stride]) if *size == heads as i64 => Ok(*stride),
        _ => Err(Error::Shape {
            argument: "sinks",
            got: shape_text(shape),
            allowed: format!("({heads}): one logit per head of q"),
        }),
    }
}
