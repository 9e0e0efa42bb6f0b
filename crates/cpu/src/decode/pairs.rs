//! Scores of bfloat16 without conversion, where the processor has an instruction for pairs of products.
//!
//! Queries stay bfloat16: what is a power of two in their scale goes into them, which is exact, and the scores get the
//! rest. The instruction takes subnormal values for 0. So it serves calls whose queries are small enough for that to mean
//! nothing in a key, and normal themselves.

use mtlflashattn_core::Dtype;

use super::products::{ROW, SUMS, known, row_group, store_sums};
use crate::call::Call;
use crate::isa::{Job, Simd};
use crate::rows::Rows;
use crate::schedule::Schedule;
use crate::score;

/// Queries are below 2 to this power, and so is the scale. A subnormal key times such a query is below 2^-62.
const LARGEST_EXPONENT: i32 = 64;
const MANTISSA_BITS: u32 = 7;
const MAGNITUDE: u16 = 0x7fff;

/// The scale of the scores: `factor * 2^exponent`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pairs {
    pub factor: f32,
    exponent: i32,
}

impl Pairs {
    /// Whether the instruction serves `call`, decided by all of its queries: a row has the same bits in any task.
    pub(super) unsafe fn of<S: Simd>(call: &Call<'_>, schedule: &Schedule<'_>) -> Option<Self> {
        let problem = call.problem;
        let serves = problem.dtype == Dtype::Bf16 && problem.head_dim.is_multiple_of(2 * S::LANES);
        if !(serves && S::has_bf16_dot()) {
            return None;
        }
        let pairs = Self::of_scale(score::query_factor(problem))?;
        for task in (0..schedule.tasks()).map(|index| schedule.task(index)).filter(|task| task.first_split) {
            for head in (0..task.heads).map(|head| call.of_head(&task, head)) {
                for row in task.rows.clone() {
                    let q = std::slice::from_raw_parts(call.q_row::<u16>(&head, row), problem.head_dim);
                    if !pairs.takes(q) {
                        return None;
                    }
                }
            }
        }
        Some(pairs)
    }

    /// `factor` is at least 1 and less than 2, or their negatives.
    fn of_scale(scale: f32) -> Option<Self> {
        let exponent = (scale.to_bits() >> 23 & 0xff) as i32 - 127;
        let factor = f32::from_bits(scale.to_bits() & 0x807f_ffff | 0x3f80_0000);
        (exponent.abs() <= LARGEST_EXPONENT).then_some(Self { factor, exponent })
    }

    /// Whether a query is not too large, and its elements are 0 or normal before and after scaling.
    fn takes(self, q: &[u16]) -> bool {
        let smallest = (1 - self.exponent.min(0)) << MANTISSA_BITS;
        let largest = (127 + LARGEST_EXPONENT - self.exponent.max(0)) << MANTISSA_BITS;
        let (smallest, range) = (smallest as u16, (largest - smallest) as u16);
        q.iter().fold(true, |takes, x| {
            let magnitude = x & MAGNITUDE;
            takes & (magnitude == 0 || magnitude.wrapping_sub(smallest) < range)
        })
    }

    /// Writes query number `r` of a group of queries that meet keys together: pieces of two vectors, those of the group
    /// side by side.
    pub(super) unsafe fn pack<S: Simd>(self, q: &[u16], (r, group): (usize, usize), to: *mut u16) {
        let shift = (self.exponent << MANTISSA_BITS) as u16;
        for (piece, q) in q.chunks_exact(2 * S::LANES).enumerate() {
            let to = to.add((piece * group + r) * 2 * S::LANES);
            for (i, &x) in q.iter().enumerate() {
                to.add(i).write(if x & MAGNITUDE == 0 { x } else { x.wrapping_add(shift) });
            }
        }
    }
}

/// Scores of `rows` queries, packed by groups, against `keys` rows of `k`; a query's scores lie [`ROW`] values apart.
pub(super) struct PairDots {
    pub rows: usize,
    pub queries: *const u16,
    pub factor: f32,
    pub depth: usize,
    pub k: Rows<u16>,
    pub keys: usize,
    pub scores: *mut f32,
}

impl Job for PairDots {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { rows, factor, depth, k, keys, .. } = self;
        let mut row = 0;
        while row < rows {
            let (queries, scores) = (self.queries.add(row * depth), self.scores.add(row * ROW));
            row += match row_group(rows - row) {
                4 => known!(depth => dot_pairs::<S, 4>(queries, factor, depth, k.of(depth), keys, scores)),
                2 => dot_pairs::<S, 2>(queries, factor, depth, k, keys, scores),
                _ => dot_pairs::<S, 1>(queries, factor, depth, k, keys, scores),
            };
        }
    }
}

/// `scores[r][key] = factor * queries[r] . k[key]` for `R` rows whose queries are packed together. Returns `R`.
#[inline(always)]
unsafe fn dot_pairs<S: Simd, const R: usize>(
    queries: *const u16,
    factor: f32,
    depth: usize,
    k: Rows<u16>,
    keys: usize,
    scores: *mut f32,
) -> usize {
    let mut key = 0;
    while key + SUMS <= keys {
        for n in 0..SUMS {
            k.prefetch_far::<S>(key + n);
        }
        let mut lanes = [[S::splat(0.0); R]; SUMS];
        if R > 1 {
            lanes = dot_pair_keys::<S, R, SUMS>(queries, depth, k, key);
        } else {
            // A single query passes at the rate of memory, which likes one row after the other.
            for (n, lanes) in lanes.iter_mut().enumerate() {
                [*lanes] = dot_pair_keys::<S, R, 1>(queries, depth, k, key + n);
            }
        }
        store_sums::<S, R, SUMS>(&lanes, factor, scores.add(key));
        key += SUMS;
    }
    while key < keys {
        k.prefetch_far::<S>(key);
        let lanes = dot_pair_keys::<S, R, 1>(queries, depth, k, key);
        store_sums::<S, R, 1>(&lanes, factor, scores.add(key));
        key += 1;
    }
    R
}

/// [`dot_pairs`] without the factor for the `N` keys from `key` on, whose lanes are yet to be summed.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index for several arrays")]
unsafe fn dot_pair_keys<S: Simd, const R: usize, const N: usize>(
    queries: *const u16,
    depth: usize,
    k: Rows<u16>,
    key: usize,
) -> [[S::Vector; R]; N] {
    let mut rows = [k.row(key); N];
    for n in 1..N {
        rows[n] = k.row(key + n);
    }
    let mut acc = [[S::splat(0.0); R]; N];
    for i in (0..depth).step_by(2 * S::LANES) {
        for n in 0..N {
            for r in 0..R {
                let query = queries.add(R * i + 2 * r * S::LANES);
                acc[n][r] = S::dot_bf16(rows[n].add(i), query, acc[n][r]);
            }
        }
    }
    acc
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::isa::portable::Portable;

    #[test]
    fn a_scale_is_a_power_of_two_times_its_factor() {
        for scale in [0.125, 0.1275, 1.0, 3.7, -0.09, 1e-9, 5e18] {
            let Pairs { factor, exponent } = Pairs::of_scale(scale).unwrap();
            assert!((1.0..2.0).contains(&factor.abs()), "{scale} has factor {factor}");
            assert_eq!(factor * (exponent as f32).exp2(), scale);
        }
        for scale in [0.0, 1e-30, 1e30, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE / 4.0] {
            assert_eq!(Pairs::of_scale(scale), None, "{scale}");
        }
    }

    #[test]
    fn queries_that_the_instruction_would_take_for_zero_are_refused() {
        let normal = f32::MIN_POSITIVE;
        for (scale, good, bad) in [
            (1.0, [0.0, -0.0, normal, -3.0, 1.8e19], [normal / 2.0, -normal / 128.0, 1.9e19, f32::INFINITY, f32::NAN]),
            (0.125, [0.0, 8.0 * normal, -8.0 * normal, 0.1, -1.8e19], [7.9 * normal, -normal, 1e30, -1.9e19, f32::NAN]),
            (4.0, [0.0, normal, -normal, 1.0, 4.5e18], [normal / 2.0, 4.7e18, -4.7e18, f32::NEG_INFINITY, f32::NAN]),
        ] {
            let pairs = Pairs::of_scale(scale).unwrap();
            let takes = |x: f32| pairs.takes(&[0x3f80, bf16::from_f32(x).to_bits(), 0x3f80]);
            assert_eq!(good.map(takes), [true; 5], "scale {scale}: {good:?}");
            assert_eq!(bad.map(takes), [false; 5], "scale {scale}: {bad:?}");
        }
    }

    #[test]
    fn queries_are_scaled_exactly_and_lie_side_by_side() {
        const PIECE: usize = 2 * Portable::LANES;
        let pairs = Pairs::of_scale(0.125 * 1.5).unwrap();
        let query = |r: u8| [1.5, -0.0, 7.0].map(|x| bf16::from_f32(x + f32::from(r)).to_bits()).repeat(PIECE);
        let queries = [0, 1, 2].map(query);
        let mut packed = vec![0u16; 3 * queries[0].len()];
        for (r, q) in queries.iter().enumerate() {
            // SAFETY: there is room for three queries; the portable set is on every machine.
            unsafe { pairs.pack::<Portable>(q, (r, 3), packed.as_mut_ptr()) };
        }
        for (r, q) in queries.iter().enumerate() {
            for (i, &x) in q.iter().enumerate() {
                let at = (i / PIECE * 3 + r) * PIECE + i % PIECE;
                assert_eq!(bf16::from_bits(packed[at]).to_f32(), bf16::from_bits(x).to_f32() * 0.125);
            }
        }
    }
}
