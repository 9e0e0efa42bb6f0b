//! Dropout: which weights a call drops. One rule, so that every tier, tile and pass drops the same ones.
//!
//! Random numbers come from Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
//! 2011), a function from a counter of four words and a key of two to four random words. A call of it serves
//! [`GROUP`] neighbouring keys of a row, 16 bits each:
//!
//! | word | of the counter | of the key |
//! | --- | --- | --- |
//! | 0 | `key / 8` | low half of the seed |
//! | 1 | query | high half of the seed, XOR the high half of the offset |
//! | 2 | `sequence * query_heads + head`, cut off to 32 bits | |
//! | 3 | low half of the offset | |
//!
//! Query and key are positions in their sequence, so that neither packing nor a window or a block moves them. Of the key
//! `8 g + i` counts word `i / 2`, of which an even `i` has the low and an odd one the high half. It is dropped if that half
//! is below the threshold, `65536 p` rounded. A kept weight is multiplied by `1 / (1 - threshold / 65536)`: what is dropped
//! has mean 1 whatever the rounding did to `p`.

use crate::{Error, Result};

/// Keys that one call of the generator serves.
pub const GROUP: usize = 8;
/// Values of the 16 bits that decide about a key.
const RANGE: u32 = 1 << 16;

/// Multipliers and key increments of Philox 4x32.
pub const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// What the key grows by from round to round: fractions of the golden ratio and of the square root of 3.
pub const INCREMENTS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
/// Rounds of Philox 4x32-10.
pub const ROUNDS: usize = 10;

/// Philox 4x32-10.
#[must_use]
pub const fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < ROUNDS {
        let (a, b) = (product(MULTIPLIERS[0], counter[0]), product(MULTIPLIERS[1], counter[2]));
        counter = [b.1 ^ counter[1] ^ key[0], b.0, a.1 ^ counter[3] ^ key[1], a.0];
        key = [key[0].wrapping_add(INCREMENTS[0]), key[1].wrapping_add(INCREMENTS[1])];
        round += 1;
    }
    counter
}

/// Low and high half of a product.
const fn product(a: u32, b: u32) -> (u32, u32) {
    let wide = a as u64 * b as u64;
    (wide as u32, (wide >> 32) as u32)
}

/// What a call drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropout {
    /// At least 1 and below [`RANGE`].
    threshold: u32,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Where in the sequence of calls with this seed the call stands: another one drops other weights.
    pub offset: u64,
}

impl Dropout {
    /// Drops each weight with probability `probability`, in steps of 2^-16; `None` where that drops nothing.
    ///
    /// # Errors
    /// [`Error::Value`] unless `0 <= probability < 1`.
    pub fn new(probability: f64, seed: u64, offset: u64) -> Result<Option<Self>> {
        if !(0.0..1.0).contains(&probability) {
            return Err(Error::Value {
                argument: "dropout_p",
                got: probability.to_string(),
                allowed: "a probability in [0, 1)".into(),
            });
        }
        // Something is kept whatever the rounding: the factor is finite.
        let threshold = ((probability * f64::from(RANGE)).round() as u32).min(RANGE - 1);
        Ok((threshold > 0).then_some(Self { threshold, seed, offset }))
    }

    /// The 16 bits of a dropped key are below this.
    #[must_use]
    pub const fn threshold(&self) -> u32 {
        self.threshold
    }

    /// The probability to be dropped, a multiple of 2^-16.
    #[must_use]
    pub fn probability(&self) -> f64 {
        f64::from(self.threshold) / f64::from(RANGE)
    }

    /// What kept weights are multiplied by: `1 / (1 - probability)`, rounded once.
    #[must_use]
    pub fn factor(&self) -> f32 {
        RANGE as f32 / (RANGE - self.threshold) as f32
    }

    /// The key of the generator.
    #[must_use]
    pub const fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32 ^ (self.offset >> 32) as u32]
    }

    /// The counter for group `key / GROUP` of a query; `head` is `sequence * query_heads + head`.
    #[must_use]
    pub const fn counter(&self, head: usize, query: usize, group: usize) -> [u32; 4] {
        [group as u32, query as u32, head as u32, self.offset as u32]
    }

    /// Whether the weight of `key` is kept.
    #[must_use]
    pub fn keeps(&self, head: usize, query: usize, key: usize) -> bool {
        let words = philox(self.counter(head, query, key / GROUP), self.key());
        let half = words[key % GROUP / 2] >> (16 * (key % 2)) & (RANGE - 1);
        half >= self.threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn philox_gives_the_published_answers() {
        // `kat_vectors` of the Random123 distribution.
        let ones = u32::MAX;
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), want);
        }
    }

    fn dropout(probability: f64, seed: u64, offset: u64) -> Dropout {
        Dropout::new(probability, seed, offset).unwrap().unwrap()
    }

    /// How many of the first keys of the first queries of the first heads are kept.
    fn kept(dropout: &Dropout, heads: usize, queries: usize, keys: usize) -> usize {
        let all = (0..heads).flat_map(|h| (0..queries).flat_map(move |q| (0..keys).map(move |k| (h, q, k))));
        all.filter(|&(head, query, key)| dropout.keeps(head, query, key)).count()
    }

    /// Five standard deviations of a mean of `count` independent choices: exceeded once in 1.7 million.
    fn deviation(probability: f64, count: usize) -> f64 {
        5.0 * (probability * (1.0 - probability) / count as f64).sqrt()
    }

    #[test]
    fn as_many_are_kept_as_the_probability_says() {
        let (heads, queries, keys) = (4, 64, 256);
        let count = heads * queries * keys;
        for (index, probability) in [1e-3, 0.1, 0.25, 0.5, 0.9].into_iter().enumerate() {
            let dropout = dropout(probability, 7 + index as u64, 11);
            assert!((dropout.probability() - probability).abs() <= 2f64.powi(-17));
            let mean = kept(&dropout, heads, queries, keys) as f64 / count as f64;
            let off = mean - (1.0 - dropout.probability());
            assert!(off.abs() <= deviation(dropout.probability(), count), "{probability}: {mean} kept");
        }
    }

    /// With probability one half, two independent masks agree on half of their elements.
    #[test]
    fn neighbours_in_every_direction_are_independent() {
        let at = dropout(0.5, 3, 4);
        let others: [(&str, Dropout, [usize; 3]); 7] = [
            ("key", at, [0, 0, 1]),
            ("group", at, [0, 0, 8]),
            ("query", at, [0, 1, 0]),
            ("head", at, [1, 0, 0]),
            ("seed", dropout(0.5, 2, 4), [0; 3]),
            ("low offset", dropout(0.5, 3, 5), [0; 3]),
            ("high offset", dropout(0.5, 3, 4 + (1 << 32)), [0; 3]),
        ];
        let (heads, queries, keys) = (3, 64, 128);
        for (name, other, [head, query, key]) in others {
            let mut agree = 0usize;
            for h in 0..heads {
                for q in 0..queries {
                    for k in 0..keys {
                        agree += usize::from(at.keeps(h, q, k) == other.keeps(h + head, q + query, k + key));
                    }
                }
            }
            let count = heads * queries * keys;
            let off = agree as f64 / count as f64 - 0.5;
            assert!(off.abs() <= deviation(0.5, count), "{name}: {agree} of {count} agree");
        }
    }

    proptest! {
        #[test]
        fn a_lower_probability_keeps_what_a_higher_one_keeps(
            (low, high) in (1e-4..1.0f64, 1e-4..1.0f64), seed: u64, offset: u64, query in 0usize..100, key in 0usize..100,
        ) {
            let (low, high) = (low.min(high), low.max(high));
            let keeps = |p| dropout(p, seed, offset).keeps(5, query, key);
            prop_assert!(keeps(low) || !keeps(high));
        }
    }

    #[test]
    fn probabilities_are_rounded_but_never_to_one() {
        assert_eq!(Dropout::new(0.0, 1, 2), Ok(None));
        assert_eq!(Dropout::new(1e-30, 1, 2), Ok(None));
        let most = dropout(1.0 - f64::EPSILON, 1, 2);
        assert_eq!((most.threshold(), most.factor()), (65535, 65536.0));
        assert_eq!((dropout(0.25, 1, 2).threshold(), dropout(0.5, 1, 2).factor()), (16384, 2.0));
        for wrong in [-0.1, 1.0, f64::NAN] {
            let error = Dropout::new(wrong, 1, 2).unwrap_err().to_string();
            assert_eq!(error, format!("dropout_p is {wrong}; allowed: a probability in [0, 1)"));
        }
    }
}
