//! The two products of the decode path: a few rows with every key, each loaded and converted once.
//!
//! Elements are read in pairs of vectors, in the order of [`Element::load_pair`]; queries and output keep it.
//!
//! Arrays are filled by loops: a closure may be compiled without the instruction set of the function around it, and then
//! becomes a call for each instruction (`tests/disassembly.rs` checks that).

use crate::element::Element;
use crate::isa::{Job, Simd};
use crate::rows::Rows;

/// Vectors whose lanes are summed together.
pub(super) const SUMS: usize = 4;
/// Scores from one row to the next: the longest block.
pub(super) const ROW: usize = 128;

/// How many of `rows` rows meet keys together.
pub(super) const fn row_group(rows: usize) -> usize {
    match rows {
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// `$body` apart for the head dimensions of most models: loops whose length the compiler knows take a tenth less time.
macro_rules! known {
    ($width:ident => $body:expr) => {
        match $width {
            64 => {
                let $width = 64;
                $body
            }
            128 => {
                let $width = 128;
                $body
            }
            $width => $body,
        }
    };
}

pub(super) use known;

/// Scores of `rows` queries, packed by groups, against `keys` rows of `k`; a query's scores lie [`ROW`] values apart.
pub(super) struct Dots<K> {
    pub rows: usize,
    pub queries: *const f32,
    pub depth: usize,
    pub k: Rows<K>,
    pub keys: usize,
    pub scores: *mut f32,
}

impl<K: Element> Job for Dots<K> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { rows, depth, k, keys, .. } = self;
        let mut row = 0;
        while row < rows {
            let (queries, scores) = (self.queries.add(row * depth), self.scores.add(row * ROW));
            // Eight accumulators hide the latency of the multiply-add, whatever the number of rows.
            row += match row_group(rows - row) {
                4 if S::REGISTERS >= 32 => {
                    known!(depth => dot::<S, K, 4, 4, 1>(queries, depth, k.of(depth), keys, scores))
                }
                4 => known!(depth => dot::<S, K, 4, 2, 1>(queries, depth, k.of(depth), keys, scores)),
                2 => dot::<S, K, 2, 2, 2>(queries, depth, k, keys, scores),
                _ => dot_one::<S, K>(queries, depth, k, keys, scores),
            };
        }
    }
}

/// Adds `keys` rows of `v`, weighted by the probabilities of each of `rows` rows ([`ROW`] values apart), to `out`.
pub(super) struct Sums<V> {
    pub rows: usize,
    pub probabilities: *const f32,
    pub v: Rows<V>,
    pub keys: usize,
    pub out: *mut f32,
    pub width: usize,
}

impl<V: Element> Job for Sums<V> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { rows, v, keys, width, .. } = self;
        let mut row = 0;
        while row < rows {
            let (p, out) = (self.probabilities.add(row * ROW), self.out.add(row * width));
            row += match row_group(rows - row) {
                4 if S::REGISTERS >= 32 => {
                    known!(width => accumulate::<S, V, 4, 2, 8>(p, v.of(width), keys, out, width))
                }
                4 => known!(width => accumulate::<S, V, 4, 1, 8>(p, v.of(width), keys, out, width)),
                2 => accumulate::<S, V, 2, 2, 8>(p, v, keys, out, width),
                _ => sum_one::<S, V>(p, v, keys, out, width),
            };
        }
    }
}

/// `scores[r][key] = queries[r] . k[key]` for `R` rows whose queries are packed together, `N` keys at a time with `U`
/// accumulators for each score. Returns `R`.
#[inline(always)]
unsafe fn dot<S: Simd, K: Element, const R: usize, const N: usize, const U: usize>(
    queries: *const f32,
    depth: usize,
    k: Rows<K>,
    keys: usize,
    scores: *mut f32,
) -> usize {
    let mut key = 0;
    while key + N <= keys {
        for n in 0..N {
            k.prefetch_far::<S>(key + n);
        }
        let lanes = dot_keys::<S, K, R, N, U>(queries, depth, k, key);
        store_sums::<S, R, N>(&lanes, 1.0, scores.add(key));
        key += N;
    }
    while key < keys {
        k.prefetch_far::<S>(key);
        let lanes = dot_keys::<S, K, R, 1, U>(queries, depth, k, key);
        store_sums::<S, R, 1>(&lanes, 1.0, scores.add(key));
        key += 1;
    }
    R
}

/// Sums of lanes, which are scores but for `factor`.
#[inline(always)]
fn scaled(mut sums: [f32; SUMS], factor: f32) -> [f32; SUMS] {
    for sum in &mut sums {
        *sum *= factor;
    }
    sums
}

/// Sums the lanes of the scores of `N` keys and `R` rows, [`SUMS`] at a time, and multiplies them by `factor`.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index for several arrays")]
pub(super) unsafe fn store_sums<S: Simd, const R: usize, const N: usize>(
    lanes: &[[S::Vector; R]; N],
    factor: f32,
    scores: *mut f32,
) {
    if N == SUMS {
        // The keys of a row lie side by side.
        for r in 0..R {
            let mut four = [S::splat(0.0); SUMS];
            for n in 0..SUMS {
                four[n] = lanes[n % N][r];
            }
            scores.add(r * ROW).cast::<[f32; SUMS]>().write_unaligned(scaled(S::sums(four), factor));
        }
        return;
    }
    for at in (0..R * N).step_by(SUMS) {
        let mut four = [S::splat(0.0); SUMS];
        for i in 0..SUMS {
            four[i] = lanes[(at + i) % (R * N) / R][(at + i) % R];
        }
        let sums = scaled(S::sums(four), factor);
        for i in 0..SUMS.min(R * N - at) {
            scores.add((at + i) % R * ROW + (at + i) / R).write(sums[i]);
        }
    }
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

/// `out[r] += sum over keys of probabilities[r][key] * v[key]` for `R` rows, `P` pairs of columns at a time: their sums
/// stay in registers for `N` keys, few enough that memory is read about in its order. Returns `R`.
#[inline(always)]
unsafe fn accumulate<S: Simd, V: Element, const R: usize, const P: usize, const N: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut key = 0;
    while key + N <= keys {
        accumulate_run::<S, V, R, P, N>(probabilities.add(key), v.from(key), out, width);
        key += N;
    }
    while key < keys {
        accumulate_run::<S, V, R, P, 1>(probabilities.add(key), v.from(key), out, width);
        key += 1;
    }
    R
}

/// [`accumulate`] for `N` keys.
#[inline(always)]
unsafe fn accumulate_run<S: Simd, V: Element, const R: usize, const P: usize, const N: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    out: *mut f32,
    width: usize,
) {
    let (mut asked, mut column) = (0, 0);
    while column < width {
        // Requests are spread over the columns: a burst of them would make the processor wait.
        while asked < N && asked * width <= column * N {
            v.prefetch_far::<S>(asked);
            asked += 1;
        }
        let (from, to) = (v.shifted(column as isize), out.add(column));
        column += accumulate_next::<S, V, R, P>(probabilities, from, N, to, width, width - column);
    }
    for row in asked..N {
        v.prefetch_far::<S>(row);
    }
}

/// [`accumulate`] for a single row.
#[inline(always)]
pub(super) unsafe fn sum_one<S: Simd, V: Element>(
    p: *const f32,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    match width / S::LANES {
        // Long rows that follow one another would be read twice, in halves.
        9.. if V::IS_F32 && v.contiguous() => accumulate::<S, V, 1, 2, 2>(p, v, keys, out, width),
        8.. => accumulate_one::<S, V, 4>(p, v, keys, out, width),
        2.. => accumulate_one::<S, V, 1>(p, v, keys, out, width),
        _ => accumulate::<S, V, 1, 1, 2>(p, v, keys, out, width),
    }
}

/// [`accumulate`] for a single row, all keys in one go: its sums fit in registers, and nothing but `v` is read.
#[inline(always)]
unsafe fn accumulate_one<S: Simd, V: Element, const P: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    let mut column = accumulate_columns::<S, V, 1, P, true>(probabilities, v, keys, out, width);
    while column < width {
        let (from, to) = (v.shifted(column as isize), out.add(column));
        column += accumulate_next::<S, V, 1, P>(probabilities, from, keys, to, width, width - column);
    }
    1
}

/// [`accumulate`] for the first of `left` columns, up to `P` pairs. Returns the number of columns.
#[inline(always)]
unsafe fn accumulate_next<S: Simd, V: Element, const R: usize, const P: usize>(
    probabilities: *const f32,
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
    left: usize,
) -> usize {
    match left / S::LANES {
        vectors if vectors >= 2 * P => accumulate_columns::<S, V, R, P, false>(probabilities, v, keys, out, width),
        2.. => accumulate_columns::<S, V, R, 1, false>(probabilities, v, keys, out, width),
        _ => accumulate_vector::<S, V, R>(probabilities, v, keys, out, width),
    }
}

/// [`accumulate`] for the first `P` pairs of columns; may `ASK` for the rows ahead. Returns the number of columns.
#[inline(always)]
unsafe fn accumulate_columns<S: Simd, V: Element, const R: usize, const P: usize, const ASK: bool>(
    probabilities: *const f32,
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
            let p = S::splat(p.add(r * ROW).read());
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
    v: Rows<V>,
    keys: usize,
    out: *mut f32,
    width: usize,
) -> usize {
    for r in 0..R {
        let mut acc = S::load(out.add(r * width));
        for key in 0..keys {
            let p = S::splat(probabilities.add(r * ROW + key).read());
            acc = S::fma(p, V::load::<S>(v.row(key)), acc);
        }
        S::store(out.add(r * width), acc);
    }
    S::LANES
}
