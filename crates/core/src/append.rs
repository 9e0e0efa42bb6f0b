//! What happens before attention over a cache: new keys and values are written into it, and new keys and queries are
//! rotated by their positions (Su et al., 2021, arXiv 2104.09864).
//!
//! New key `t` of sequence `b` goes to the row of key `key_len - new_len + t` ([`Cache::row`](crate::Cache::row)), which
//! is position `filled + t`. With rotary embeddings a head of `head_dim` values has `dim / 2` pairs in front; pair `p` at
//! position `n`, with `c = cos[n][p]` and `s = sin[n][p]`, becomes
//!
//! ```text
//! (x, y) -> (x * c - y * s, x * s + y * c)
//! ```
//!
//! computed in float32 and rounded once to the dtype of the tensors. Everything behind the pairs, and v, is copied.

use crate::cache::expect_shape;
use crate::problem::{check_extent, expect_size, shape_error, sizes};
use crate::{CacheBuffers, Error, Lengths, Problem, Result, Strides, TensorMeta};

/// Which values of a head are a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// `(2 p, 2 p + 1)`: `rotary_interleaved`, as GPT-J.
    Neighbours,
    /// `(p, p + dim / 2)`, as GPT-NeoX.
    Halves,
}

impl Pairs {
    /// Where the two values of pair `pair` stand in a head.
    #[must_use]
    pub const fn places(self, pair: usize, dim: usize) -> (usize, usize) {
        match self {
            Self::Neighbours => (2 * pair, 2 * pair + 1),
            Self::Halves => (pair, pair + dim / 2),
        }
    }
}

/// Rotary embeddings of new keys and of queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rotary {
    /// Leading values of a head that are rotated; even, at most `head_dim`.
    pub dim: usize,
    /// Which of them are a pair.
    pub pairs: Pairs,
    /// Rows of cos and sin: positions `0..positions`.
    pub positions: usize,
    /// From one row of cos to the next; neighbouring pairs are neighbours.
    pub cos_stride: i64,
    /// From one row of sin to the next.
    pub sin_stride: i64,
    /// Whether query `i` stands at position `filled + i`; else all stand at `filled`. `flash_attn` 2.8 lets the mask
    /// decide: causal or with a window that bounds something.
    pub queries_advance: bool,
}

impl Rotary {
    /// The position of query `query` of a sequence.
    #[must_use]
    pub const fn query_position(&self, filled: usize, query: usize) -> usize {
        if self.queries_advance { filled + query } else { filled }
    }
}

/// The new keys and values of a call. As many for each sequence as [`Cache::new_len`](crate::Cache::new_len) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Append {
    /// Strides of the new keys, `[batch, new_len, key_heads, head_dim]`.
    pub k: Strides,
    /// Strides of the new values, `[batch, new_len, key_heads, value_dim]`.
    pub v: Strides,
    /// How new keys and queries are rotated, if they are.
    pub rotary: Option<Rotary>,
}

/// What the caller says about rotary embeddings.
#[derive(Clone, Copy, Debug)]
pub struct RotaryOptions<'a> {
    /// `rotary_cos`, `[positions, dim / 2]`.
    pub cos: TensorMeta<'a>,
    /// `rotary_sin`, the same.
    pub sin: TensorMeta<'a>,
    /// Which values are a pair.
    pub pairs: Pairs,
}

const NEW_KEYS: &str = "(batch, new_seqlen, heads, head_dim)";

impl Append {
    /// New keys `k` and values `v` for the cache of `problem`.
    ///
    /// # Errors
    /// Names the argument, what came and what is allowed.
    ///
    /// # Panics
    /// When `problem` has no cache.
    pub fn new(
        problem: &Problem,
        k: TensorMeta<'_>,
        v: TensorMeta<'_>,
        rotary: Option<&RotaryOptions<'_>>,
    ) -> Result<Self> {
        let cache = problem.cache.as_ref().expect("keys are appended to a cache");
        let batch = problem.lengths.batch();
        for (argument, tensor, dim, like) in
            [("k", &k, problem.head_dim, "k_cache"), ("v", &v, problem.value_dim, "v_cache")]
        {
            expect_dtype(argument, tensor, problem)?;
            let [sequences, new_len, heads, width] = sizes(argument, tensor, NEW_KEYS)?;
            expect_size(argument, tensor, "batch", sequences, batch, "q")?;
            expect_size(argument, tensor, "new_seqlen", new_len, cache.new_len, "k")?;
            expect_size(argument, tensor, "heads", heads, problem.key_heads, "k_cache")?;
            expect_size(argument, tensor, "head_dim", width, dim, like)?;
            check_extent(argument, tensor.shape, tensor.strides, tensor.dtype.size())?;
        }
        if cache.new_len > cache.capacity() {
            let allowed = format!("at most {} new keys, the positions of a sequence in the cache", cache.capacity());
            return Err(shape_error("k", &k, allowed));
        }
        let rotary = rotary.map(|rotary| self::rotary(problem, cache.capacity(), rotary)).transpose()?;
        Ok(Self { k: Strides::of(&k), v: Strides::of(&v), rotary })
    }

    /// Checks what [`Problem::check_cache`] cannot know: that every query has a row of cos and sin.
    ///
    /// # Errors
    /// [`Error::Value`] names the sequence.
    ///
    /// # Panics
    /// When `problem` has no cache.
    pub fn check_positions(&self, problem: &Problem, buffers: &CacheBuffers<'_>) -> Result<()> {
        let cache = problem.cache.as_ref().expect("keys are appended to a cache");
        let Some(rotary) = &self.rotary else { return Ok(()) };
        let last_query = problem.lengths.max_query_len().saturating_sub(1);
        let last = |sequence| rotary.query_position(cache.filled(buffers, sequence), last_query);
        match (0..problem.lengths.batch()).find(|&sequence| last(sequence) >= rotary.positions) {
            None => Ok(()),
            Some(sequence) => Err(Error::Value {
                argument: "rotary_cos",
                got: format!("a tensor of {} positions", rotary.positions),
                allowed: format!("more than {}, the position of the last query of sequence {sequence}", last(sequence)),
            }),
        }
    }
}

fn expect_dtype(argument: &'static str, tensor: &TensorMeta<'_>, problem: &Problem) -> Result<()> {
    if tensor.dtype == problem.dtype {
        return Ok(());
    }
    let allowed = format!("{}, the dtype of q", problem.dtype);
    Err(Error::Dtype { argument, got: tensor.dtype.to_string(), allowed })
}

fn rotary(problem: &Problem, capacity: usize, options: &RotaryOptions<'_>) -> Result<Rotary> {
    let RotaryOptions { cos, sin, pairs } = options;
    let [positions, half] = sizes("rotary_cos", cos, "(positions, rotary_dim / 2)")?;
    expect_dtype("rotary_cos", cos, problem)?;
    expect_dtype("rotary_sin", sin, problem)?;
    expect_shape("rotary_sin", sin.shape, &[positions, half], "the shape of rotary_cos")?;
    sizes::<2>("rotary_sin", sin, "(positions, rotary_dim / 2)")?;
    if half == 0 || 2 * half > problem.head_dim {
        let allowed = format!("(positions, rotary_dim / 2) with rotary_dim from 2 to head_dim = {}", problem.head_dim);
        return Err(shape_error("rotary_cos", cos, allowed));
    }
    if positions < capacity {
        let allowed = format!("at least {capacity} positions, as many as a sequence has in the cache");
        return Err(shape_error("rotary_cos", cos, allowed));
    }
    for (argument, tensor) in [("rotary_cos", cos), ("rotary_sin", sin)] {
        check_extent(argument, tensor.shape, tensor.strides, tensor.dtype.size())?;
    }
    let bounds = |bound: Option<usize>| bound.is_some_and(|bound| bound < capacity);
    let bounded = bounds(problem.mask.left) || bounds(problem.mask.right);
    let queries_advance = match problem.lengths {
        Lengths::Dense { query_len: 1, .. } => false,
        _ => bounded,
    };
    Ok(Rotary {
        dim: 2 * half,
        pairs: *pairs,
        positions,
        cos_stride: cos.strides[0],
        sin_stride: sin.strides[0],
        queries_advance,
    })
}
