//! Dropout by the rule of [`mtlflashattn_core::dropout`]: what weights are multiplied by, for the rows of a panel or the
//! keys of a row.
//!
//! Random words are plain Rust over arrays, which compilers vectorise with the instructions that the kernel around them
//! enables, unless they know how short the loops are: then they unroll them first, and find nothing left to vectorise.

use std::hint::black_box;
use std::ops::Range;

use mtlflashattn_core::dropout::{Dropout, GROUP, INCREMENTS, MULTIPLIERS, ROUNDS};

use crate::call::{Call, Task};
use crate::isa::Simd;

/// Most counters that are computed together, at least the rows of a panel.
const MAX_LANES: usize = 32;
/// Their number is a multiple of this: whole vectors in every instruction set.
const LANES: usize = 16;

/// A word of each counter.
type Words = [u32; MAX_LANES];
/// What weights are multiplied by: for each key of a group, one number a counter.
pub(crate) type Factors = [[f32; MAX_LANES]; GROUP];

/// The rows of a panel as the generator counts them; lanes without a row repeat the last one.
pub(crate) struct PanelDropout {
    dropout: Dropout,
    lanes: usize,
    heads: Words,
    queries: Words,
}

impl PanelDropout {
    /// `None` where nothing is dropped.
    pub(crate) fn new<S: Simd>(call: &Call<'_>, task: &Task, rows: &Range<usize>) -> Option<Self> {
        const { assert!(S::PANEL <= MAX_LANES) };
        let dropout = call.problem.dropout?;
        let (mut heads, mut queries) = ([0; MAX_LANES], [0; MAX_LANES]);
        for lane in 0..S::PANEL {
            let row = (rows.start + lane).min(rows.end - 1);
            heads[lane] = head_counter(call, task, row) as u32;
            queries[lane] = call.query(row) as u32;
        }
        Some(Self { dropout, lanes: black_box(S::PANEL.next_multiple_of(LANES)), heads, queries })
    }

    /// The groups that keys belong to, each with those of its keys. `tiles` and the keys count from the key `first`.
    pub(crate) fn groups(first: usize, tiles: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let keys = first + tiles.start..first + tiles.end;
        (keys.start / GROUP..keys.end.div_ceil(GROUP)).map(move |group| {
            let in_group = keys.start.max(group * GROUP)..keys.end.min((group + 1) * GROUP);
            (group, in_group.start - first..in_group.end - first)
        })
    }

    /// What the weights of a group are multiplied by in each lane of the panel.
    #[inline(always)]
    pub(crate) fn factors(&self, group: usize) -> Factors {
        let [group, .., offset] = self.dropout.counter(0, 0, group);
        let counter = [[group; MAX_LANES], self.queries, self.heads, [offset; MAX_LANES]];
        factors(&self.dropout, counter, self.lanes)
    }
}

/// Multiplies the weights of row `row` for `keys`.
#[inline(always)]
pub(crate) unsafe fn drop_row(call: &Call<'_>, task: &Task, row: usize, keys: &Range<usize>, weights: *mut f32) {
    let Some(dropout) = call.problem.dropout else { return };
    let counter = dropout.counter(head_counter(call, task, row), call.query(row), 0).map(|word| [word; MAX_LANES]);
    for first in (keys.start / GROUP..keys.end.div_ceil(GROUP)).step_by(LANES) {
        let groups = std::array::from_fn(|lane| (first + lane) as u32);
        let factors = factors(&dropout, [groups, counter[1], counter[2], counter[3]], black_box(LANES));
        let end = keys.end.min((first + LANES) * GROUP);
        for key in keys.start.max(first * GROUP)..end {
            *weights.add(key - keys.start) *= factors[key % GROUP][key / GROUP - first];
        }
    }
}

/// How the generator counts the head of a row.
fn head_counter(call: &Call<'_>, task: &Task, row: usize) -> usize {
    task.sequence.index * call.problem.query_heads + call.head(task, row)
}

/// What the keys of a group are multiplied by, for each of the first `lanes` counters.
#[inline(always)]
fn factors(dropout: &Dropout, mut counter: [Words; 4], lanes: usize) -> Factors {
    philox(&mut counter, dropout.key(), lanes);
    let (threshold, factor) = (dropout.threshold(), dropout.factor());
    let mut factors = [[0.0; MAX_LANES]; GROUP];
    for (words, pair) in counter.iter().zip(factors.chunks_exact_mut(2)) {
        let (even, odd) = pair.split_at_mut(1);
        for ((word, even), odd) in words[..lanes].iter().zip(&mut even[0][..lanes]).zip(&mut odd[0][..lanes]) {
            *even = if word & 0xffff >= threshold { factor } else { 0.0 };
            *odd = if word >> 16 >= threshold { factor } else { 0.0 };
        }
    }
    factors
}

/// [`mtlflashattn_core::dropout::philox`] for the first `lanes` counters.
#[inline(always)]
fn philox(counter: &mut [Words; 4], mut key: [u32; 2], lanes: usize) {
    let [a, b, c, d] = counter;
    let (a, b, c, d) = (&mut a[..lanes], &mut b[..lanes], &mut c[..lanes], &mut d[..lanes]);
    for _ in 0..ROUNDS {
        for lane in 0..lanes {
            let left = u64::from(MULTIPLIERS[0]) * u64::from(a[lane]);
            let right = u64::from(MULTIPLIERS[1]) * u64::from(c[lane]);
            a[lane] = (right >> 32) as u32 ^ b[lane] ^ key[0];
            b[lane] = right as u32;
            c[lane] = (left >> 32) as u32 ^ d[lane] ^ key[1];
            d[lane] = left as u32;
        }
        key = [key[0].wrapping_add(INCREMENTS[0]), key[1].wrapping_add(INCREMENTS[1])];
    }
}
