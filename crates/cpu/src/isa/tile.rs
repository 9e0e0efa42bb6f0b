//! The register tile for instruction sets whose registers outnumber it, and for panels that are only partly filled:
//! written with vectors, kept in registers by the compiler (`tests/disassembly.rs` checks that).

use super::Simd;

/// `acc[r][n] += a[r * row_stride + step * step_stride] * b[step][n]` over `steps`.
#[inline(always)]
unsafe fn outer_products<S: Simd, const ROWS: usize, const VECTORS: usize>(
    mut a: *const f32,
    row_stride: usize,
    step_stride: usize,
    mut b: *const f32,
    steps: usize,
    acc: &mut [[S::Vector; VECTORS]; ROWS],
) {
    for _ in 0..steps {
        let row: [S::Vector; VECTORS] = std::array::from_fn(|n| S::load(b.add(n * S::LANES)));
        for (r, acc) in acc.iter_mut().enumerate() {
            let x = S::splat(*a.add(r * row_stride));
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::fma(x, row[n], *acc);
            }
        }
        a = a.add(step_stride);
        b = b.add(S::PANEL);
    }
}

/// [`Simd::scores`] with a tile of `ROWS` keys by `VECTORS` vectors of queries.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, const ROWS: usize, const VECTORS: usize>(
    keys: *const f32,
    key_stride: usize,
    queries: *const f32,
    depth: usize,
    scores: *mut f32,
    row_max: &mut S::Row,
) {
    let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
    outer_products::<S, ROWS, VECTORS>(keys, key_stride, 1, queries, depth, &mut acc);
    for (r, acc) in acc.iter().enumerate() {
        for (n, &score) in acc.iter().enumerate() {
            S::store(scores.add(r * S::PANEL + n * S::LANES), score);
            let max = &mut row_max.as_mut()[n];
            *max = S::max(score, *max);
        }
    }
}

/// [`Simd::values`] with a tile of `ROWS` value columns by `VECTORS` vectors of queries.
#[inline(always)]
pub(super) unsafe fn values<S: Simd, const ROWS: usize, const VECTORS: usize>(
    values: *const f32,
    probabilities: *const f32,
    keys: usize,
    out: *mut f32,
    rescale: Option<&S::Row>,
) {
    let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
    if let Some(rescale) = rescale {
        for (r, acc) in acc.iter_mut().enumerate() {
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = S::mul(S::load(out.add(r * S::PANEL + n * S::LANES)), rescale.as_ref()[n]);
            }
        }
    }
    outer_products::<S, ROWS, VECTORS>(values, 1, ROWS, probabilities, keys, &mut acc);
    for (r, acc) in acc.iter().enumerate() {
        for (n, &o) in acc.iter().enumerate() {
            S::store(out.add(r * S::PANEL + n * S::LANES), o);
        }
    }
}

/// [`Simd::accumulate`] with a tile of `ROWS` keys by `VECTORS` vectors of columns.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, const ROWS: usize, const VECTORS: usize>(
    weights: *const f32,
    weights_stride: usize,
    rows: *const f32,
    panels: usize,
    out: *mut f32,
) {
    let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
    for (r, acc) in acc.iter_mut().enumerate() {
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = S::load(out.add(r * S::PANEL + n * S::LANES));
        }
    }
    for panel in 0..panels {
        let (weights, rows) = (weights.add(panel * weights_stride), rows.add(panel * S::PANEL * S::PANEL));
        outer_products::<S, ROWS, VECTORS>(weights, S::PANEL, 1, rows, S::PANEL, &mut acc);
    }
    for (r, acc) in acc.iter().enumerate() {
        for (n, &o) in acc.iter().enumerate() {
            S::store(out.add(r * S::PANEL + n * S::LANES), o);
        }
    }
}
