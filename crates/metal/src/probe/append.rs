//! The small problems of an append kernel.

use mtlflashattn_core::reference::{self, AppendInputs};
use mtlflashattn_core::{Append, CacheBuffers, Dtype, Error, Pairs, Problem, Rotary, Strides, TensorMeta};

use super::cached::put_into_cache;
use super::cases::{CASES, Case, Given, Needs, Numbers};
use super::{Element, Memory};
use crate::{AppendKernel, AppendTensors, CacheTensors, Features, RotaryTensors};

/// Columns of keys and values: more than lanes, and of pairs too.
const HEAD_DIM: usize = 140;
const VALUE_DIM: usize = 75;
/// Columns that are rotated.
const ROTARY_DIM: usize = 136;

/// A call that appends, with its tensors and its answer.
pub struct SmallAppend {
    /// Attention over the cache.
    pub problem: Problem,
    /// What is appended.
    pub append: Append,
    /// Inputs, caches without the new keys, and rotated queries full of NaN.
    pub tensors: AppendTensors<Memory>,
    /// What both caches and the rotated queries shall be.
    exact: [Vec<f64>; 3],
}

/// How far a number that is rotated in float32 and rounded once to `dtype` may lie from the `exact` one, for factors of
/// magnitudes up to `most`: two products and a sum, each with half the last place of float32, of at most `2 most^2`.
#[must_use]
pub fn rotation_bound(dtype: Dtype, exact: f64, most: f64) -> f64 {
    let unit = Dtype::F32.unit_roundoff();
    let rotated = 6.0 * unit * most * most;
    // Half the distance of the smallest float16 numbers; those of the other types have smaller ones.
    let subnormal = 0.5 * f64::from(2f32.powi(-24));
    rotated + dtype.unit_roundoff() * (exact.abs() + rotated) + subnormal
}

impl SmallAppend {
    /// The small problems of `kernel`.
    ///
    /// # Errors
    /// Those of [`Problem`]; there are none.
    pub fn all(kernel: &AppendKernel) -> Result<Vec<Self>, Error> {
        CASES[..2]
            .iter()
            .zip([Pairs::Neighbours, Pairs::Halves])
            .map(|(case, pairs)| Self::new(case, pairs, *kernel))
            .collect()
    }

    fn new(case: &Case, pairs: Pairs, kernel: AppendKernel) -> Result<Self, Error> {
        let AppendKernel { dtype, rotary, packed, paged } = kernel;
        let needs = Needs {
            dtype,
            head_dim: HEAD_DIM,
            value_dim: VALUE_DIM,
            features: Features { packed, ..Features::NONE },
            rows: 8,
            block: 16,
            owns_keys: false,
            least_keys: 0,
            aligned: false,
        };
        let mut numbers = Numbers(1);
        let mut given = Given::new(case, &needs, &mut numbers)?;
        let cache_tensors = put_into_cache(&mut given, paged);
        let problem = given.problem;
        let cache = problem.cache.expect("keys in a cache");
        let (batch, heads) = (problem.lengths.batch(), problem.key_heads);
        let float = Element::Float(dtype);
        let mut contiguous = |shape: [usize; 4]| {
            let values = numbers.take(dtype, shape.iter().product());
            Memory::contiguous(float, values, shape.map(|size| size as i64).to_vec())
        };
        let [new_keys, new_values] = [HEAD_DIM, VALUE_DIM].map(|dim| contiguous([batch, cache.new_len, heads, dim]));
        let positions = cache.capacity() + problem.lengths.max_query_len();
        let [cos, sin] = [(); 2].map(|()| contiguous([1, 1, positions, ROTARY_DIM / 2]));
        let rotation = Rotary {
            dim: ROTARY_DIM,
            pairs,
            positions,
            cos_stride: (ROTARY_DIM / 2) as i64,
            sin_stride: (ROTARY_DIM / 2) as i64,
            queries_advance: pairs == Pairs::Neighbours,
        };
        let strides = |memory: &Memory| Strides::of(&memory.meta(dtype));
        let append = Append { k: strides(&new_keys), v: strides(&new_values), rotary: rotary.then_some(rotation) };
        let layout = given.layout(!given.heads_first, 0);
        let unwritten = vec![f64::NAN; given.queries.rows * problem.query_heads * HEAD_DIM];
        let rotated = given.queries.lay_out(dtype, &unwritten, problem.query_heads, HEAD_DIM, &layout);
        let Given { mut k, mut v, q, offsets, values: [mut exact_q, ..], queries, .. } = given;
        let integers = |memory: &Option<Memory>| -> Vec<i32> {
            memory.as_ref().map_or_else(Vec::new, |memory| memory.values.iter().map(|&value| value as i32).collect())
        };
        let CacheTensors { lengths, slots, left_pad, pages } = &cache_tensors;
        let [lengths, slots, left_pad, pages] = [lengths, slots, left_pad, pages].map(integers);
        let buffers = CacheBuffers { lengths: &lengths, slots: &slots, left_pad: &left_pad, pages: &pages };
        // Where new keys go there is nothing yet.
        for sequence in 0..batch {
            let key_len = cache.key_len(&buffers, sequence);
            for key in key_len - cache.new_len..key_len {
                let at = cache.row(&buffers, sequence, key);
                let row = (at.block * cache.block_len() + at.row) * heads;
                k.values[row * HEAD_DIM..][..heads * HEAD_DIM].fill(f64::NAN);
                v.values[row * VALUE_DIM..][..heads * VALUE_DIM].fill(f64::NAN);
            }
        }
        let (mut exact_k, mut exact_v) = (k.values.clone(), v.values.clone());
        let inputs = AppendInputs {
            k: &new_keys.values,
            v: &new_values.values,
            cos: &cos.values,
            sin: &sin.values,
            query_offsets: &queries.offsets,
            cache: buffers,
        };
        reference::append(&problem, &append, &inputs, &mut exact_q, &mut exact_k, &mut exact_v);
        let query_offsets = offsets.map(|(query, _)| query);
        let rotary = rotary.then_some(RotaryTensors { q, rotated, query_offsets, cos, sin });
        let tensors =
            AppendTensors { new_keys, new_values, key_cache: k, value_cache: v, rotary, cache: cache_tensors };
        Ok(Self { problem, append, tensors, exact: [exact_k, exact_v, exact_q] })
    }

    /// Strides of the rotated queries.
    #[must_use]
    pub fn rotated(&self) -> Strides {
        let meta = |memory: &Memory| {
            let TensorMeta { dtype, shape, strides } = memory.meta(self.problem.dtype);
            Strides::of(&TensorMeta { dtype, shape, strides })
        };
        self.tensors.rotary.as_ref().map_or_else(Strides::default, |rotary| meta(&rotary.rotated))
    }

    /// What is wrong with the memory of the caches and, where there are any, of the rotated queries after the kernel has
    /// run; `None` where nothing is.
    #[must_use]
    pub fn judge(&self, results: &[Vec<f64>]) -> Option<String> {
        let [exact_k, exact_v, exact_q] = &self.exact;
        let written = self.tensors.written();
        let exact = [exact_k, exact_v, exact_q];
        for ((name, memory), (exact, got)) in
            ["k_cache", "v_cache", "q"].iter().zip(written).zip(exact.iter().zip(results))
        {
            let (got, nothing_else) = memory.read(got);
            let wrong = exact.iter().zip(&got).any(|(&exact, &got)| {
                let bound = rotation_bound(self.problem.dtype, exact, 1.0);
                if exact.is_nan() { !got.is_nan() } else { got.is_nan() || (got - exact).abs() > bound }
            });
            if wrong || !nothing_else {
                return Some(format!("{name} is not what it should be"));
            }
        }
        None
    }
}
