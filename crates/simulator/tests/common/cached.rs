//! Problems whose keys lie in a cache.

use mtlflashattn_core::{Cache, CacheBuffers, CacheLayout, CacheLengths, Lengths, Strides};

use super::{Case, Random, Run, Tensor};

/// How the cache of a problem is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheForm {
    /// Slot `b` for sequence `b`.
    Slots,
    /// Any slot for a sequence, whose keys begin anywhere.
    PaddedSlots,
    /// Pages of so many rows.
    Pages(usize),
}

/// Contents of the buffers of a cache.
#[derive(Clone, Debug, Default)]
pub struct CacheData {
    pub lengths: Vec<i32>,
    pub slots: Vec<i32>,
    pub left_pad: Vec<i32>,
    /// As the reference reads it: contiguous.
    pub pages: Vec<i32>,
    /// As the caller has it: rows longer than that.
    pub table: Vec<i32>,
}

impl CacheData {
    pub fn buffers(&self) -> CacheBuffers<'_> {
        CacheBuffers { lengths: &self.lengths, slots: &self.slots, left_pad: &self.left_pad, pages: &self.pages }
    }
}

/// What entries of a table that no position of a sequence needs may hold.
const GARBAGE: [i32; 3] = [-1, i32::MAX, i32::MIN];

impl Run {
    /// A problem like that of `case`, whose sequences have up to as many keys as there, in a cache. Rows of the cache that
    /// no key has are NaN.
    pub fn cached(case: &Case, form: CacheForm) -> Self {
        let mut run = Self::new(&Case { bias: None, ..case.clone() });
        let mut random = Random::new(case.seed ^ 0x0c0f_fee0);
        let mut below = |end: usize| (random.uniform().abs() * end as f64) as usize;
        let batch = case.lengths.len();
        let mut key_len = |len: usize| {
            let most_less = len * below(3) / 2;
            if case.packed { len } else { len - below(most_less + 1) }
        };
        let key_lens: Vec<usize> = case.lengths.iter().map(|&(_, len)| key_len(len)).collect();
        let new_len = below(1 + key_lens.iter().copied().min().unwrap_or(0).min(3));
        let left_pad: Vec<usize> =
            key_lens.iter().map(|_| if form == CacheForm::PaddedSlots { below(9) } else { 0 }).collect();
        let ends: Vec<usize> = key_lens.iter().zip(&left_pad).map(|(len, pad)| len + pad).collect();
        let longest = ends.iter().copied().max().unwrap_or(0);
        let filled: Vec<i32> = ends.iter().map(|&end| (end - new_len) as i32).collect();
        let mut data = CacheData { lengths: filled.clone(), ..CacheData::default() };
        let mut lengths = CacheLengths::Each;
        let layout = match form {
            CacheForm::Slots => CacheLayout::Slots { count: batch, len: longest + below(5), indexed: false },
            CacheForm::PaddedSlots => {
                let count = batch + 2;
                data.slots = shuffled(count, &mut below)[..batch].to_vec();
                data.left_pad = left_pad.iter().map(|&pad| pad as i32).collect();
                CacheLayout::Slots { count, len: longest + below(5), indexed: true }
            }
            CacheForm::Pages(len) => {
                let per_sequence = longest.div_ceil(len) + below(2);
                let count = batch * per_sequence + 2;
                let pages = shuffled(count, &mut below);
                let table_stride = per_sequence + below(3);
                for (sequence, &end) in ends.iter().enumerate() {
                    let used = end.div_ceil(len);
                    let page = |i: usize| {
                        if i < used { pages[sequence * per_sequence + i] } else { GARBAGE[(i + sequence) % 3] }
                    };
                    data.pages.extend((0..per_sequence).map(page));
                    data.table.extend((0..table_stride).map(page));
                }
                if case.packed {
                    lengths = CacheLengths::Offsets;
                    data.lengths =
                        std::iter::once(&3).chain(&filled).scan(0, |sum, len| Some(add(sum, *len))).collect();
                }
                CacheLayout::Pages { count, len, per_sequence, table_stride: table_stride as i64 }
            }
        };
        let cache = Cache { layout, lengths, new_len, left_padded: form == CacheForm::PaddedSlots };
        let mut used = vec![false; cache.blocks() * cache.block_len()];
        for (sequence, &len) in key_lens.iter().enumerate() {
            for key in 0..len {
                let at = cache.row(&data.buffers(), sequence, key);
                used[at.block * cache.block_len() + at.row] = true;
            }
        }
        let mut tensor = |dim: usize| {
            let sizes = [cache.blocks(), cache.block_len(), case.key_heads, dim];
            let mut index = 0;
            let value = || {
                index += 1;
                if used[(index - 1) / dim / case.key_heads] { 2.0 * random.uniform() } else { f64::NAN }
            };
            Tensor::new(&Case { packed: false, ..case.clone() }, sizes, value)
        };
        (run.k, run.v) = (tensor(case.head_dim), tensor(case.value_dim));
        let strides =
            |tensor: &Tensor| Strides { batch: tensor.strides[0], row: tensor.strides[1], head: tensor.strides[2] };
        (run.problem.k, run.problem.v) = (strides(&run.k), strides(&run.v));
        run.problem.cache = Some(cache);
        match &mut run.problem.lengths {
            Lengths::Dense { key_len, .. } => *key_len = cache.capacity(),
            Lengths::Packed { total_key, max_key_len, .. } => {
                *total_key = cache.blocks() * cache.block_len();
                *max_key_len = cache.capacity();
            }
        }
        run.key_offsets.clear();
        run.cache = data;
        run
    }
}

fn add(sum: &mut i32, len: i32) -> i32 {
    *sum += len;
    *sum
}

/// The numbers below `count` in some order.
fn shuffled(count: usize, below: &mut impl FnMut(usize) -> usize) -> Vec<i32> {
    let mut numbers: Vec<i32> = (0..count as i32).collect();
    for i in (1..count).rev() {
        numbers.swap(i, below(i + 1));
    }
    numbers
}
