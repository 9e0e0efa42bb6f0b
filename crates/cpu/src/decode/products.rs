//! The two products of the decode path: a few rows with every key, each loaded and converted once.

use crate::element::Element;
use crate::isa::Simd;
use crate::rows::Rows;

/// `scores[r][key] = queries[r] . k[key]` for `R` rows, with `U` accumulators for each. Returns `R`.
#[inline(always)]
pub(super) unsafe fn dot<S: Simd, K: Element, const R: usize, const U: usize>(
    queries: *const f32,
    depth: usize,
    k: Rows<K>,
    keys: usize,
    scores: *mut f32,
    stride: usize,
) -> usize {
    for key in 0..keys {
        let from = k.row(key);
        k.prefetch_far::<S>(key);
        let mut acc = [[S::splat(0.0); U]; R];
        let mut i = 0;
        while i + U * S::LANES <= depth {
            for u in 0..U {
                let x = K::load::<S>(from.add(i + u * S::LANES));
                for (r, acc) in acc.iter_mut().enumerate() {
                    acc[u] = S::fma(x, S::load(queries.add(r * depth + i + u * S::LANES)), acc[u]);
                }
            }
            i += U * S::LANES;
        }
        while i < depth {
            let x = K::load::<S>(from.add(i));
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[0] = S::fma(x, S::load(queries.add(r * depth + i)), acc[0]);
            }
            i += S::LANES;
        }
        for (r, acc) in acc.iter().enumerate() {
            let mut total = acc[0];
            for &part in &acc[1..] {
                total = S::add(total, part);
            }
            scores.add(r * stride + key).write(S::sum(total));
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
