//! The visible key range of a query row: the one place that knows causal, window and lengths.

use std::ops::Range;

/// Which corner of the score matrix the causal diagonal and the window start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Alignment {
    /// The last query sees the last key: `flash_attn` since 2.1.
    #[default]
    BottomRight,
    /// The first query sees the first key: `torch.nn.functional.scaled_dot_product_attention`.
    TopLeft,
}

/// Band of keys that a query may see, relative to its own position. `None` means unbounded.
///
/// With `offset = key_len - query_len` (0 under [`Alignment::TopLeft`]), key `j` is visible to query `i` iff
/// `i + offset - left <= j <= i + offset + right`: the inclusive window of `flash_attn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mask {
    /// Keys visible before the diagonal.
    pub left: Option<usize>,
    /// Keys visible after the diagonal; causal attention is `Some(0)`.
    pub right: Option<usize>,
    /// Where the diagonal lies when `query_len != key_len`.
    pub alignment: Alignment,
}

impl Mask {
    /// Reads `flash_attn`'s arguments: any negative window bound is open, `causal` overrides the right bound.
    #[must_use]
    pub fn new(causal: bool, window: (i64, i64), alignment: Alignment) -> Self {
        let bound = |b: i64| usize::try_from(b).ok();
        Self { left: bound(window.0), right: if causal { Some(0) } else { bound(window.1) }, alignment }
    }

    /// Whether every query sees every key.
    #[must_use]
    pub const fn is_full(self) -> bool {
        self.left.is_none() && self.right.is_none()
    }

    /// Position of query `query` on the key axis; negative when it lies before the first key.
    #[must_use]
    pub const fn diagonal(self, query: usize, query_len: usize, key_len: usize) -> i64 {
        match self.alignment {
            Alignment::BottomRight => query as i64 + key_len as i64 - query_len as i64,
            Alignment::TopLeft => query as i64,
        }
    }

    /// Keys that query `query` of a sequence sees; empty when there are none.
    #[must_use]
    pub fn visible_keys(self, query: usize, query_len: usize, key_len: usize) -> Range<usize> {
        let diagonal = self.diagonal(query, query_len, key_len);
        let bound = |b: usize| i64::try_from(b).unwrap_or(i64::MAX);
        let start = self.left.map_or(0, |left| diagonal.saturating_sub(bound(left)));
        let end = self.right.map_or(i64::MAX, |right| diagonal.saturating_add(bound(right)).saturating_add(1));
        let clamp = |key: i64| key.clamp(0, key_len as i64) as usize;
        let (start, end) = (clamp(start), clamp(end));
        start..end.max(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn visible_by_definition(mask: Mask, query: usize, query_len: usize, key_len: usize) -> Vec<usize> {
        let diagonal = mask.diagonal(query, query_len, key_len);
        (0..key_len)
            .filter(|&key| {
                let distance = key as i64 - diagonal;
                mask.left.is_none_or(|left| distance >= -(left as i64))
                    && mask.right.is_none_or(|right| distance <= right as i64)
            })
            .collect()
    }

    proptest! {
        #[test]
        fn range_is_the_definition(
            query_len in 1usize..40,
            key_len in 0usize..40,
            causal: bool,
            window in (-3i64..40, -3i64..40),
            top_left: bool,
        ) {
            let alignment = if top_left { Alignment::TopLeft } else { Alignment::BottomRight };
            let mask = Mask::new(causal, window, alignment);
            for query in 0..query_len {
                let range: Vec<usize> = mask.visible_keys(query, query_len, key_len).collect();
                prop_assert_eq!(range, visible_by_definition(mask, query, query_len, key_len));
            }
        }
    }

    #[test]
    fn bounds_beyond_every_length_are_open() {
        let mask = Mask::new(false, (i64::MAX, i64::MAX), Alignment::BottomRight);
        assert_eq!(mask.visible_keys(3, 5, 7), 0..7);
    }

    #[test]
    fn causal_overrides_the_right_bound() {
        assert_eq!(Mask::new(true, (-1, 9), Alignment::BottomRight).right, Some(0));
    }
}
