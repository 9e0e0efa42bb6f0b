//! Softcap, ALiBi, bias and visibility of the scores of one panel against a block of keys.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use crate::call::{Call, Task};
use crate::isa::Simd;
use crate::score;

/// Scores `[keys][PANEL]` of a panel, in units of log2. Tiles are ranges of keys relative to the block.
pub(crate) struct PanelScores<'a, 'b> {
    pub(crate) call: &'a Call<'b>,
    pub(crate) task: &'a Task,
    /// Rows of the panel.
    pub(crate) rows: &'a Range<usize>,
    /// Keys of the block.
    pub(crate) keys: &'a Range<usize>,
    pub(crate) scores: *mut f32,
    /// Room for four values of each row.
    pub(crate) lanes: *mut f32,
    /// With a bias: room for a vector's worth of rows of it.
    pub(crate) staged: *mut f32,
}

impl PanelScores<'_, '_> {
    /// The part of `tiles` whose scores are final: every row sees every key and no score is modified.
    #[inline(always)]
    pub(crate) fn final_tiles<S: Simd>(&self, tiles: &Range<usize>) -> Range<usize> {
        let problem = self.call.problem;
        if problem.softcap > 0.0 || problem.alibi.is_some() || problem.bias.is_some() {
            return tiles.start..tiles.start;
        }
        self.seen_by_all::<S>(tiles)
    }

    /// Whole tiles that every row sees.
    #[inline(always)]
    fn seen_by_all<S: Simd>(&self, tiles: &Range<usize>) -> Range<usize> {
        let first = self.call.visible(&self.task.sequence, self.rows.start);
        let last = self.call.visible(&self.task.sequence, self.rows.end - 1);
        let relative = |key: usize| key.clamp(self.keys.start, self.keys.end) - self.keys.start;
        let start = relative(last.start).next_multiple_of(S::TILE).max(tiles.start);
        let end = relative(first.end) / S::TILE * S::TILE;
        if start < end.min(tiles.end) { start..end.min(tiles.end) } else { tiles.start..tiles.start }
    }

    /// Makes the scores of `tiles` final.
    #[inline(always)]
    pub(crate) unsafe fn modify<S: Simd>(&self, tiles: &Range<usize>) {
        let softcap = self.call.problem.softcap;
        if softcap > 0.0 {
            let scores = self.scores.add(tiles.start * S::PANEL);
            score::softcap::<S>(scores, tiles.len() * S::PANEL, softcap);
        }
        self.shift::<S>(tiles);
    }

    /// Everything but the softcap.
    #[inline(always)]
    pub(crate) unsafe fn shift<S: Simd>(&self, tiles: &Range<usize>) {
        let problem = self.call.problem;
        if problem.alibi.is_some() {
            self.add_alibi::<S>(tiles);
        }
        if problem.bias.is_some() {
            self.add_bias::<S>(tiles);
        }
        let seen = self.seen_by_all::<S>(tiles);
        self.hide::<S>(&[tiles.start..seen.start, seen.end..tiles.end]);
    }

    #[inline(always)]
    unsafe fn add_alibi<S: Simd>(&self, tiles: &Range<usize>) {
        let sequence = &self.task.sequence;
        let (diagonals, slopes) = (self.lanes, self.lanes.add(S::PANEL));
        for lane in 0..S::PANEL {
            let row = (self.rows.start + lane).min(self.rows.end - 1);
            let query = self.call.query(row);
            let diagonal = self.call.problem.mask.diagonal(query, sequence.query_len, sequence.key_len);
            diagonals.add(lane).write((diagonal - self.keys.start as i64) as f32);
            let slope = self.call.alibi_slope(self.task, row).unwrap_or(0.0);
            slopes.add(lane).write(-slope * LOG2_E);
        }
        for n in (0..S::PANEL).step_by(S::LANES) {
            let (diagonal, slope) = (S::load(diagonals.add(n)), S::load(slopes.add(n)));
            for key in tiles.clone() {
                let p = self.scores.add(key * S::PANEL + n);
                let signed = S::sub(S::splat(key as f32), diagonal);
                let distance = S::max(signed, S::sub(S::splat(0.0), signed));
                S::store(p, S::fma(slope, distance, S::load(p)));
            }
        }
    }

    #[inline(always)]
    unsafe fn add_bias<S: Simd>(&self, tiles: &Range<usize>) {
        let (staged, keys) = (self.staged, self.keys);
        let width = tiles.len().next_multiple_of(S::LANES);
        let existing = (keys.start + tiles.start)..(keys.start + tiles.end).min(keys.end);
        for lane in (0..self.rows.len()).step_by(S::LANES) {
            staged.write_bytes(0, S::LANES * width);
            for i in 0..S::LANES.min(self.rows.len() - lane) {
                if let Some(bias) = score::BiasRow::of(self.call, self.task, self.rows.start + lane + i) {
                    bias.read(existing.clone(), staged.add(i * width));
                }
            }
            for key in (0..tiles.len()).step_by(S::LANES) {
                // At most sixteen by sixteen.
                let mut columns = [0.0f32; 256];
                let one = S::splat(1.0);
                S::transpose(staged.add(key), width as isize, one, columns.as_mut_ptr(), S::LANES as isize);
                for i in 0..S::LANES.min(tiles.len() - key) {
                    let p = self.scores.add((tiles.start + key + i) * S::PANEL + lane);
                    S::store(p, S::add(S::load(p), S::load(columns.as_ptr().add(i * S::LANES))));
                }
            }
        }
    }

    /// Scores of keys that a row does not see become negative infinity.
    #[inline(always)]
    unsafe fn hide<S: Simd>(&self, tiles: &[Range<usize>; 2]) {
        if tiles.iter().all(Range::is_empty) {
            return;
        }
        let keys = self.keys;
        let (low, high) = (self.lanes, self.lanes.add(S::PANEL));
        for lane in 0..S::PANEL {
            let row = (self.rows.start + lane).min(self.rows.end - 1);
            let visible = self.call.visible(&self.task.sequence, row);
            // Relative to the block, so that every value is a small whole number.
            let relative = |key: usize| (key.clamp(keys.start, keys.end) - keys.start) as f32;
            low.add(lane).write(relative(visible.start));
            high.add(lane).write(relative(visible.end));
        }
        for n in (0..S::PANEL).step_by(S::LANES) {
            let (low, high) = (S::load(low.add(n)), S::load(high.add(n)));
            for key in tiles.iter().cloned().flatten() {
                let p = self.scores.add(key * S::PANEL + n);
                S::store(p, S::keep_between(S::load(p), S::splat(key as f32), low, high));
            }
        }
    }
}
