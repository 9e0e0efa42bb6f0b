//! The small problems of a kernel of the forward pass.

use mtlflashattn_core::reference::{self, Forward, bounds};
use mtlflashattn_core::{Error, Problem};

use super::Memory;
use super::cached::put_into_cache;
use super::cases::{CASES, Case, FLOAT, Given, Needs, Numbers};
use crate::{CacheTensors, Features, Kernel, Tensors};

/// Columns of q and k for a kernel that reads them at run time: no multiple of anything.
const ANY_HEAD_DIM: usize = 43;
/// Columns of v for such a kernel: more than one chunk.
const ANY_VALUE_DIM: usize = 75;

/// Splits of the cases, for the decode kernel: with and without merging, and more of them than there are blocks.
const SPLITS: [usize; CASES.len()] = [3, 1, 2];

/// A problem with its tensors and its answer.
pub struct SmallProblem {
    /// The problem.
    pub problem: Problem,
    /// Inputs, and outputs full of NaN. `out` has the strides of the layout, `lse` is contiguous.
    pub tensors: Tensors<Memory>,
    /// The buffers of the cache, for a kernel that reads one.
    pub cache: CacheTensors<Memory>,
    /// Into how many parts the keys of each sequence are split, for the decode kernel.
    pub splits: usize,
    exact: Forward,
    bounds: bounds::Bounds,
}

impl SmallProblem {
    /// The small problems of `kernel`.
    ///
    /// # Errors
    /// Those of [`Problem`], for a kernel with features that no problem has together.
    pub fn all(kernel: &Kernel) -> Result<Vec<Self>, Error> {
        CASES.iter().zip(SPLITS).map(|(case, splits)| Self::new(case, splits, kernel)).collect()
    }

    fn new(case: &Case, splits: usize, kernel: &Kernel) -> Result<Self, Error> {
        let Features { lse, aligned, .. } = kernel.features;
        let needs = Needs {
            dtype: kernel.dtype,
            head_dim: kernel.head_dim.unwrap_or(ANY_HEAD_DIM),
            value_dim: kernel.value_dim.unwrap_or(ANY_VALUE_DIM),
            features: kernel.features,
            rows: kernel.rows(),
            block: kernel.tile.keys,
            owns_keys: false,
            least_keys: if kernel.reads_whole_blocks() { kernel.tile.keys } else { 0 },
            aligned: aligned || kernel.reads_whole_blocks(),
        };
        let mut given = Given::new(case, &needs, &mut Numbers(1))?;
        let exact = reference::forward(&given.problem, &given.inputs());
        let bounds = bounds::error_bounds_of(kernel.arithmetic(), &given.problem, &given.inputs());
        let Features { cached, paged, .. } = kernel.features;
        let cache = if cached { put_into_cache(&mut given, paged) } else { CacheTensors::NONE };
        let has = Features { aligned, ..Features::of(&given.problem, lse) };
        debug_assert_eq!(has, kernel.features, "the kernel's features and no others");
        debug_assert!(!aligned || kernel.aligned(&given.problem, [0; 3]).features.aligned);
        let nans = |count: usize| vec![f64::NAN; count];
        let heads = given.problem.query_heads;
        // The other way round, so that nobody takes the strides of q for those of out.
        let layout = given.layout(!given.heads_first, if given.heads_first { 0 } else { given.gap });
        let unwritten = nans(given.queries.rows * heads * needs.value_dim);
        let out = given.queries.lay_out(needs.dtype, &unwritten, heads, needs.value_dim, &layout);
        let lse = lse.then(|| Memory::contiguous(FLOAT, nans(given.queries.rows * heads), given.lse_shape()));
        let Given { problem, q, k, v, offsets, alibi_slopes, bias, sinks, .. } = given;
        let tensors = Tensors { q, k, v, out, lse, offsets, alibi_slopes, bias, sinks };
        Ok(Self { problem, tensors, cache, splits, exact, bounds })
    }

    /// What is wrong with the memory of `out` and `lse` after the kernel has run; `None` where nothing is.
    #[must_use]
    pub fn judge(&self, out: &[f64], lse: Option<&[f64]>) -> Option<String> {
        let (out, nothing_else) = self.tensors.out.read(out);
        let got = Forward { out, lse: lse.map_or_else(|| self.exact.lse.clone(), <[f64]>::to_vec) };
        let missing = got.out.iter().chain(&got.lse).filter(|value| value.is_nan()).count();
        if missing > 0 {
            let all = got.out.len() + lse.map_or(0, <[f64]>::len);
            return Some(format!("{missing} of {all} results are NaN or were never written"));
        }
        let (out, lse) = self.bounds.worst(&self.exact, &got);
        if out > 1.0 || lse > 1.0 {
            return Some(format!("results are off by {:.1} times what rounding explains", out.max(lse)));
        }
        (!nothing_else).then(|| "the kernel wrote outside of its output".into())
    }
}
