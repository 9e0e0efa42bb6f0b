//! The two products of the decode path: a few rows with every key, each loaded and converted once.

use crate::element::Element;
use crate::isa::Simd;
use crate::rows::Rows;

/// Most keys that [`dot`] takes at once: it may write that many scores, less one, behind the last.
pub(super) const SLACK: usize = 16;

/// `scores[r][key] = queries[r] . k[key]` for `R` rows, `N` keys at a time. Returns `R`.
///
/// Every sum has one accumulator, so that it is the same for any `R` and `N`.
#[inline(always)]
pub(super) unsafe fn dot<S: Simd, K: Element, const R: usize, const N: usize>(
    queries: *const f32,
    depth: usize,
    k: Rows<K>,
    keys: usize,
    scores: *mut f32,
    stride: usize,
) -> usize {
    for key in (0..keys).step_by(N) {
        // Behind the last key it is taken again, and its score forgotten.
        let from: [*const K; N] = std::array::from_fn(|n| k.row((key + n).min(keys - 1)));
        for n in 0..N {
            k.prefetch_far::<S>(key + n);
        }
        let mut acc = [[S::splat(0.0); N]; R];
        for i in (0..depth).step_by(S::LANES) {
            let x: [S::Vector; N] = std::array::from_fn(|n| K::load::<S>(from[n].add(i)));
            for (r, acc) in acc.iter_mut().enumerate() {
                let query = S::load(queries.add(r * depth + i));
                for (n, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(x[n], query, *acc);
                }
            }
        }
        let to = scores.add(key);
        match N {
            2 => {
                for r in (0..R).step_by(2) {
                    let [a, b, c, d] = S::sum_four([acc[r][0], acc[r][1], acc[r + 1][0], acc[r + 1][1]]);
                    to.add(r * stride).cast::<[f32; 2]>().write_unaligned([a, b]);
                    to.add((r + 1) * stride).cast::<[f32; 2]>().write_unaligned([c, d]);
                }
            }
            _ => {
                for (r, acc) in acc.iter().enumerate() {
                    for n in (0..N).step_by(4) {
                        let sums = S::sum_four([acc[n], acc[n + 1], acc[n + 2], acc[n + 3]]);
                        to.add(r * stride + n).cast::<[f32; 4]>().write_unaligned(sums);
                    }
                }
            }
        }
    }
    R
}

/// `out[r] += sum over keys of probabilities[r][key] * v[key]` for `R` rows, `N` keys at a time. Returns `R`.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, V: Element, const R: usize, const N: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut key = 0;
    while key + N <= keys {
        accumulate_keys::<S, V, R, N>(probabilities.add(key), stride, v, key, out, width);
        key += N;
    }
    while key < keys {
        accumulate_keys::<S, V, R, 1>(probabilities.add(key), stride, v, key, out, width);
        key += 1;
    }
    R
}

/// [`accumulate`] for the `N` keys from `key` on.
#[inline(always)]
unsafe fn accumulate_keys<S: Simd, V: Element, const R: usize, const N: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    key: usize,
    out: *mut f32,
    width: usize,
) {
    let p: [[S::Vector; N]; R] =
        std::array::from_fn(|r| std::array::from_fn(|n| S::splat(probabilities.add(r * stride + n).read())));
    let rows: [*const V; N] = std::array::from_fn(|n| v.row(key + n));
    for n in 0..N {
        v.prefetch_far::<S>(key + n);
    }
    for column in (0..width).step_by(S::LANES) {
        let x: [S::Vector; N] = std::array::from_fn(|n| V::load::<S>(rows[n].add(column)));
        for (r, p) in p.iter().enumerate() {
            let to = out.add(r * width + column);
            let mut sum = S::load(to);
            for (n, &p) in p.iter().enumerate() {
                sum = S::fma(p, x[n], sum);
            }
            S::store(to, sum);
        }
    }
}

/// [`accumulate`] for a single row, `N` vectors of columns at a time: with one probability a key, the sums fit in
/// registers and nothing but `v` is read.
#[inline(always)]
pub(super) unsafe fn accumulate_one<S: Simd, V: Element, const N: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut column = 0;
    while column + N * S::LANES <= width {
        accumulate_columns::<S, V, N>(probabilities, v, column, keys, out.add(column));
        column += N * S::LANES;
    }
    while column < width {
        accumulate_columns::<S, V, 1>(probabilities, v, column, keys, out.add(column));
        column += S::LANES;
    }
    1
}

/// [`accumulate_one`] for the `N` vectors of columns from `column` on.
#[inline(always)]
unsafe fn accumulate_columns<S: Simd, V: Element, const N: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    column: usize,
    keys: usize,
    out: *mut f32,
) {
    let mut acc: [S::Vector; N] = std::array::from_fn(|n| S::load(out.add(n * S::LANES)));
    for key in 0..keys {
        if column == 0 {
            v.prefetch_far::<S>(key);
        }
        let from = v.row(key).add(column);
        let p = S::splat(probabilities.add(key).read());
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = S::fma(p, V::load::<S>(from.add(n * S::LANES)), *acc);
        }
    }
    for (n, &acc) in acc.iter().enumerate() {
        S::store(out.add(n * S::LANES), acc);
    }
}
