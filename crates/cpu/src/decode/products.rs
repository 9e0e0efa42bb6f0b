//! The two products of the decode path: a few rows with every key, each loaded and converted once.
//!
//! Elements are read in pairs of vectors, in the order of [`Element::load_pair`]; queries and output keep it.
//!
//! Arrays are filled by loops: a closure may be compiled without the instruction set of the function around it, and then
//! becomes a call for each instruction (`tests/disassembly.rs` checks that).

use crate::element::Element;
use crate::isa::Simd;
use crate::rows::Rows;

/// Vectors whose lanes are summed together.
const SUMS: usize = 4;
/// Keys whose values are summed in registers before the columns move on: few, to read about in the order of memory.
const VALUE_KEYS: usize = 8;

/// `scores[r][key] = queries[r] . k[key]` for `R` rows whose queries are packed together, `N` keys at a time with `U`
/// accumulators for each score. `R * N` is a multiple of [`SUMS`]. Returns `R`.
#[inline(always)]
pub(super) unsafe fn dot<S: Simd, K: Element, const R: usize, const N: usize, const U: usize>(
    queries: *const f32,
    depth: usize,
    k: Rows<K>,
    keys: usize,
    scores: *mut f32,
    stride: usize,
) -> usize {
    let mut key = 0;
    while key + N <= keys {
        for n in 0..N {
            k.prefetch_far::<S>(key + n);
        }
        let lanes = dot_keys::<S, K, R, N, U>(queries, depth, k, key);
        for at in (0..R * N).step_by(SUMS) {
            let mut four = [S::splat(0.0); SUMS];
            for (i, four) in four.iter_mut().enumerate() {
                *four = lanes[(at + i) / R][(at + i) % R];
            }
            for (i, sum) in S::sums(four).into_iter().enumerate() {
                scores.add((at + i) % R * stride + key + (at + i) / R).write(sum);
            }
        }
        key += N;
    }
    while key < keys {
        k.prefetch_far::<S>(key);
        let [lanes] = dot_keys::<S, K, R, 1, U>(queries, depth, k, key);
        let mut four = [S::splat(0.0); SUMS];
        for (i, four) in four.iter_mut().enumerate() {
            *four = lanes[i % R];
        }
        for (r, &sum) in S::sums(four)[..R].iter().enumerate() {
            scores.add(r * stride + key).write(sum);
        }
        key += 1;
    }
    R
}

/// [`dot`] for a single row, one key after the other: so close to the rate of memory, their order is what counts.
#[inline(always)]
pub(super) unsafe fn dot_one<S: Simd, K: Element>(
    query: *const f32,
    depth: usize,
    k: Rows<K>,
    keys: usize,
    scores: *mut f32,
) -> usize {
    let mut key = 0;
    while key < keys {
        let count = SUMS.min(keys - key);
        let mut lanes = [S::splat(0.0); SUMS];
        for (n, lanes) in lanes[..count].iter_mut().enumerate() {
            k.prefetch_far::<S>(key + n);
            [[*lanes]] = dot_keys::<S, K, 1, 1, 8>(query, depth, k, key + n);
        }
        for (n, &sum) in S::sums(lanes)[..count].iter().enumerate() {
            scores.add(key + n).write(sum);
        }
        key += count;
    }
    1
}

/// [`dot`] for the `N` keys from `key` on, whose lanes are yet to be summed. The order of additions depends on `U` alone.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index for several arrays")]
unsafe fn dot_keys<S: Simd, K: Element, const R: usize, const N: usize, const U: usize>(
    queries: *const f32,
    depth: usize,
    k: Rows<K>,
    key: usize,
) -> [[S::Vector; R]; N] {
    let rows: [*const K; N] = std::array::from_fn(|n| k.row(key + n));
    let mut acc = [[[S::splat(0.0); U]; R]; N];
    let (mut i, mut queries) = (0, queries);
    let pairs = U.div_ceil(2);
    while i + 2 * pairs * S::LANES <= depth {
        for pair in 0..pairs {
            let mut x = [[S::splat(0.0); 2]; N];
            for n in 0..N {
                x[n] = K::load_pair::<S>(rows[n].add(i));
            }
            for half in 0..2 {
                for r in 0..R {
                    let query = S::load(queries.add((2 * r + half) * S::LANES));
                    let u = (2 * pair + half) % U;
                    for n in 0..N {
                        acc[n][r][u] = S::fma(x[n][half], query, acc[n][r][u]);
                    }
                }
            }
            i += 2 * S::LANES;
            queries = queries.add(2 * R * S::LANES);
        }
    }
    while i + 2 * S::LANES <= depth {
        for n in 0..N {
            let x = K::load_pair::<S>(rows[n].add(i));
            for r in 0..R {
                for half in 0..2 {
                    let query = S::load(queries.add((2 * r + half) * S::LANES));
                    acc[n][r][half % U] = S::fma(x[half], query, acc[n][r][half % U]);
                }
            }
        }
        i += 2 * S::LANES;
        queries = queries.add(2 * R * S::LANES);
    }
    if i < depth {
        for n in 0..N {
            let x = K::load::<S>(rows[n].add(i));
            for r in 0..R {
                acc[n][r][0] = S::fma(x, S::load(queries.add(r * S::LANES)), acc[n][r][0]);
            }
        }
    }
    let mut lanes = [[S::splat(0.0); R]; N];
    for n in 0..N {
        for r in 0..R {
            lanes[n][r] = acc[n][r][0];
            for u in 1..U {
                lanes[n][r] = S::add(lanes[n][r], acc[n][r][u]);
            }
        }
    }
    lanes
}

/// `out[r] += sum over keys of probabilities[r][key] * v[key]` for `R` rows, `P` pairs of columns at a time.
/// Returns `R`.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, V: Element, const R: usize, const P: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    // A single row passes so fast that it has to read them in turn.
    let step = if R == 1 { 2 } else { VALUE_KEYS };
    for key in (0..keys).step_by(step) {
        let count = step.min(keys - key);
        let (rows, p) = (v.from(key), probabilities.add(key));
        let (mut asked, mut column) = (0, 0);
        while column < width {
            // Requests are spread over the columns: a burst of them would make the processor wait.
            while asked < count && asked * width <= column * count {
                rows.prefetch_far::<S>(asked);
                asked += 1;
            }
            let (from, to) = (rows.shifted(column as isize), out.add(column));
            column += accumulate_next::<S, V, R, P>(p, stride, from, count, to, width, width - column);
        }
        for row in asked..count {
            rows.prefetch_far::<S>(row);
        }
    }
    R
}

/// [`accumulate`] for a single row, all keys in one go: its sums fit in registers, and nothing but `v` is read.
#[inline(always)]
pub(super) unsafe fn accumulate_one<S: Simd, V: Element, const P: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut column = accumulate_columns::<S, V, 1, P, true>(probabilities, 0, v, keys, out, width);
    while column < width {
        let (from, to) = (v.shifted(column as isize), out.add(column));
        column += accumulate_next::<S, V, 1, P>(probabilities, 0, from, keys, to, width, width - column);
    }
    1
}

/// [`accumulate`] for the first of `left` columns, up to `P` pairs. Returns the number of columns.
#[inline(always)]
unsafe fn accumulate_next<S: Simd, V: Element, const R: usize, const P: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
    left: usize,
) -> usize {
    match left / S::LANES {
        vectors if vectors >= 2 * P => {
            accumulate_columns::<S, V, R, P, false>(probabilities, stride, v, keys, out, width)
        }
        2.. => accumulate_columns::<S, V, R, 1, false>(probabilities, stride, v, keys, out, width),
        _ => accumulate_vector::<S, V, R>(probabilities, stride, v, keys, out, width),
    }
}

/// [`accumulate`] for the first `P` pairs of columns; may `ASK` for the rows ahead. Returns the number of columns.
#[inline(always)]
unsafe fn accumulate_columns<S: Simd, V: Element, const R: usize, const P: usize, const ASK: bool>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut acc = [[[S::splat(0.0); 2]; P]; R];
    for (r, acc) in acc.iter_mut().enumerate() {
        for (n, acc) in acc.as_flattened_mut().iter_mut().enumerate() {
            *acc = S::load(out.add(r * width + n * S::LANES));
        }
    }
    let (mut from, mut p) = (v.row(0), probabilities);
    for key in 0..keys {
        if ASK {
            v.prefetch_far::<S>(key);
        }
        let mut x = [[S::splat(0.0); 2]; P];
        for (pair, x) in x.iter_mut().enumerate() {
            *x = V::load_pair::<S>(from.add(2 * pair * S::LANES));
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            let p = S::splat(p.add(r * stride).read());
            for (acc, x) in acc.iter_mut().zip(&x) {
                for half in 0..2 {
                    acc[half] = S::fma(p, x[half], acc[half]);
                }
            }
        }
        (from, p) = (v.below(from), p.add(1));
    }
    for (r, acc) in acc.iter().enumerate() {
        for (n, &acc) in acc.as_flattened().iter().enumerate() {
            S::store(out.add(r * width + n * S::LANES), acc);
        }
    }
    2 * P * S::LANES
}

/// [`accumulate`] for the first vector of columns. Returns the number of columns.
#[inline(always)]
unsafe fn accumulate_vector<S: Simd, V: Element, const R: usize>(
    probabilities: *const f32,
    stride: usize,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    for r in 0..R {
        let mut acc = S::load(out.add(r * width));
        for key in 0..keys {
            let p = S::splat(probabilities.add(r * stride + key).read());
            acc = S::fma(p, V::load::<S>(v.row(key)), acc);
        }
        S::store(out.add(r * width), acc);
    }
    S::LANES
}
