//! Dropout by the rule of [`mtlflashattn_core::dropout`]: what weights are multiplied by, for the rows of a panel or the
//! keys of a row.
//!
//! Random words are plain Rust over arrays of one vector's lanes, which compilers vectorise with the instructions that the
//! kernel around them enables.

use std::ops::Range;

use mtlflashattn_core::dropout::{Dropout, GROUP, INCREMENTS, MULTIPLIERS, ROUNDS};

use crate::call::{Call, Task};
use crate::isa::Simd;

/// Most lanes of a vector.
const MAX_LANES: usize = 16;
/// Most rows of a panel.
const MAX_PANEL: usize = 32;

type Words = [u32; MAX_LANES];

/// The rows of a panel as the generator counts them; lanes without a row repeat the last one.
pub(crate) struct PanelDropout {
    dropout: Dropout,
    heads: [u32; MAX_PANEL],
    queries: [u32; MAX_PANEL],
}

impl PanelDropout {
    /// `None` where nothing is dropped.
    pub(crate) fn new<S: Simd>(call: &Call<'_>, task: &Task, rows: &Range<usize>) -> Option<Self> {
        const { assert!(S::PANEL <= MAX_PANEL && S::LANES <= MAX_LANES) };
        let dropout = call.problem.dropout?;
        let (mut heads, mut queries) = ([0; MAX_PANEL], [0; MAX_PANEL]);
        for lane in 0..S::PANEL {
            let row = (rows.start + lane).min(rows.end - 1);
            heads[lane] = head_counter(call, task, row) as u32;
            queries[lane] = call.query(row) as u32;
        }
        Some(Self { dropout, heads, queries })
    }

    /// Calls `apply` with each key of `tiles` (relative to the key `first`), a lane of the panel, and what the weights of
    /// the vector that begins there are multiplied by.
    #[inline(always)]
    pub(crate) unsafe fn each<S: Simd>(
        &self,
        first: usize,
        tiles: &Range<usize>,
        mut apply: impl FnMut(usize, usize, S::Vector),
    ) {
        let keys = first + tiles.start..first + tiles.end;
        for group in keys.start / GROUP..keys.end.div_ceil(GROUP) {
            let in_group = keys.start.max(group * GROUP)..keys.end.min((group + 1) * GROUP);
            for lane in (0..S::PANEL).step_by(S::LANES) {
                let counter = self.dropout.counter(0, 0, group);
                let (mut queries, mut heads) = ([0; MAX_LANES], [0; MAX_LANES]);
                queries[..S::LANES].copy_from_slice(&self.queries[lane..lane + S::LANES]);
                heads[..S::LANES].copy_from_slice(&self.heads[lane..lane + S::LANES]);
                let counter = [[counter[0]; MAX_LANES], queries, heads, [counter[3]; MAX_LANES]];
                let factors = factors::<S>(&self.dropout, counter);
                for key in in_group.clone() {
                    apply(key - first, lane, S::load(factors[key % GROUP].as_ptr()));
                }
            }
        }
    }
}

/// Multiplies the weights of row `row` for `keys`.
#[inline(always)]
pub(crate) unsafe fn drop_row<S: Simd>(
    call: &Call<'_>,
    task: &Task,
    row: usize,
    keys: &Range<usize>,
    weights: *mut f32,
) {
    let Some(dropout) = call.problem.dropout else { return };
    let counter = dropout.counter(head_counter(call, task, row), call.query(row), 0).map(|word| [word; MAX_LANES]);
    for first in (keys.start / GROUP..keys.end.div_ceil(GROUP)).step_by(S::LANES) {
        let groups = std::array::from_fn(|lane| (first + lane) as u32);
        let factors = factors::<S>(&dropout, [groups, counter[1], counter[2], counter[3]]);
        let end = keys.end.min((first + S::LANES) * GROUP);
        for key in keys.start.max(first * GROUP)..end {
            *weights.add(key - keys.start) *= factors[key % GROUP][key / GROUP - first];
        }
    }
}

/// How the generator counts the head of a row.
fn head_counter(call: &Call<'_>, task: &Task, row: usize) -> usize {
    task.sequence.index * call.problem.query_heads + call.head(task, row)
}

/// What the keys of a group are multiplied by, for each lane's counter.
#[inline(always)]
fn factors<S: Simd>(dropout: &Dropout, counter: [Words; 4]) -> [[f32; MAX_LANES]; GROUP] {
    let words = philox::<S>(counter, dropout.key());
    let (threshold, factor) = (dropout.threshold(), dropout.factor());
    let mut factors = [[0.0; MAX_LANES]; GROUP];
    for (pair, words) in words.iter().enumerate() {
        for lane in 0..S::LANES {
            let (even, odd) = (words[lane] & 0xffff, words[lane] >> 16);
            factors[2 * pair][lane] = if even >= threshold { factor } else { 0.0 };
            factors[2 * pair + 1][lane] = if odd >= threshold { factor } else { 0.0 };
        }
    }
    factors
}

/// [`mtlflashattn_core::dropout::philox`] for a vector of counters.
#[inline(always)]
fn philox<S: Simd>(mut counter: [Words; 4], mut key: [u32; 2]) -> [Words; 4] {
    for _ in 0..ROUNDS {
        let [a, b, c, d] = &counter;
        let mut next = [[0; MAX_LANES]; 4];
        for lane in 0..S::LANES {
            let (left, right) =
                (u64::from(MULTIPLIERS[0]) * u64::from(a[lane]), u64::from(MULTIPLIERS[1]) * u64::from(c[lane]));
            next[0][lane] = (right >> 32) as u32 ^ b[lane] ^ key[0];
            next[1][lane] = right as u32;
            next[2][lane] = (left >> 32) as u32 ^ d[lane] ^ key[1];
            next[3][lane] = left as u32;
        }
        counter = next;
        key = [key[0].wrapping_add(INCREMENTS[0]), key[1].wrapping_add(INCREMENTS[1])];
    }
    counter
}
