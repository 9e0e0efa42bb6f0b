//! What the three products do around their tile of accumulators, and the tile of instruction sets whose registers
//! outnumber it and of panels that are only partly filled: written with vectors, kept in registers by the compiler
//! (`tests/disassembly.rs` checks that).
//!
//! Nothing here is a closure: one that the compiler does not inline lacks the instruction set of the function around it,
//! and calls a function for each vector instruction.

use super::Simd;

/// The products of [`Simd`] for tiles of `$rows` rows. Full panels have `$full` vectors; `$by_row` computes
/// `acc[r][n] += a[r * stride + step] * b[step][n]` for them from `(a, stride, b, steps, acc)`, and `$by_step`
/// `acc[r][n] += a[step * $rows + r] * b[step][n]` from `(a, b, steps, acc)`. Panels of `$part` vectors take the tile of
/// this file.
macro_rules! products {
    ($rows:literal x $full:literal, parts: [$($part:literal),*], $by_row:path, $by_step:path) => {
        #[inline(always)]
        unsafe fn scores(
            vectors: usize,
            keys: *const f32,
            key_stride: usize,
            queries: *const f32,
            depth: usize,
            scores: *mut f32,
            row_max: &mut Self::Row,
        ) {
            macro_rules! tile {
                ($n:literal, $product:path) => {{
                    let mut acc = [[Self::splat(0.0); $n]; $rows];
                    $product(keys, key_stride, queries, depth, &mut acc);
                    $crate::isa::tile::store_scores::<Self, $rows, $n>(&acc, scores, row_max)
                }};
            }
            match vectors {
                $($part => tile!($part, $crate::isa::tile::by_row::<Self, $rows, $part>),)*
                _ => tile!($full, $by_row),
            }
        }

        #[inline(always)]
        unsafe fn values(
            vectors: usize,
            values: *const f32,
            probabilities: *const f32,
            keys: usize,
            out: *mut f32,
            rescale: Option<&Self::Row>,
        ) {
            macro_rules! tile {
                ($n:literal, $product:path) => {{
                    let mut acc = $crate::isa::tile::rescaled::<Self, $rows, $n>(out, rescale);
                    $product(values, probabilities, keys, &mut acc);
                    $crate::isa::tile::store::<Self, $rows, $n>(&acc, out)
                }};
            }
            match vectors {
                $($part => tile!($part, $crate::isa::tile::by_step::<Self, $rows, $part>),)*
                _ => tile!($full, $by_step),
            }
        }

        #[inline(always)]
        unsafe fn accumulate(
            vectors: usize,
            weights: *const f32,
            weights_stride: usize,
            rows: *const f32,
            panels: usize,
            out: *mut f32,
        ) {
            macro_rules! tile {
                ($n:literal, $product:path) => {{
                    let mut acc = $crate::isa::tile::load::<Self, $rows, $n>(out);
                    for panel in 0..panels {
                        let (a, b) = (weights.add(panel * weights_stride), rows.add(panel * Self::PANEL * Self::PANEL));
                        $product(a, Self::PANEL, b, Self::PANEL, &mut acc);
                    }
                    $crate::isa::tile::store::<Self, $rows, $n>(&acc, out)
                }};
            }
            match vectors {
                $($part => tile!($part, $crate::isa::tile::by_row::<Self, $rows, $part>),)*
                _ => tile!($full, $by_row),
            }
        }
    };
}
pub(super) use products;

type Tile<S, const ROWS: usize, const VECTORS: usize> = [[<S as Simd>::Vector; VECTORS]; ROWS];

/// `acc[r][n] += a[r * row_stride + step * step_stride] * b[step][n]` over `steps`.
#[inline(always)]
unsafe fn outer_products<S: Simd, const ROWS: usize, const VECTORS: usize>(
    mut a: *const f32,
    row_stride: usize,
    step_stride: usize,
    mut b: *const f32,
    steps: usize,
    acc: &mut Tile<S, ROWS, VECTORS>,
) {
    for _ in 0..steps {
        let mut row = [S::splat(0.0); VECTORS];
        for (n, x) in row.iter_mut().enumerate() {
            *x = S::load(b.add(n * S::LANES));
        }
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

/// The tile with the rows of `a` `stride` values apart.
#[inline(always)]
pub(super) unsafe fn by_row<S: Simd, const ROWS: usize, const VECTORS: usize>(
    a: *const f32,
    stride: usize,
    b: *const f32,
    steps: usize,
    acc: &mut Tile<S, ROWS, VECTORS>,
) {
    outer_products::<S, ROWS, VECTORS>(a, stride, 1, b, steps, acc);
}

/// The tile with the `ROWS` values of a step side by side in `a`.
#[inline(always)]
pub(super) unsafe fn by_step<S: Simd, const ROWS: usize, const VECTORS: usize>(
    a: *const f32,
    b: *const f32,
    steps: usize,
    acc: &mut Tile<S, ROWS, VECTORS>,
) {
    outer_products::<S, ROWS, VECTORS>(a, 1, ROWS, b, steps, acc);
}

/// Writes a tile of scores, `ROWS` keys by `VECTORS` vectors of queries, and raises the maxima of the queries.
#[inline(always)]
pub(super) unsafe fn store_scores<S: Simd, const ROWS: usize, const VECTORS: usize>(
    acc: &Tile<S, ROWS, VECTORS>,
    scores: *mut f32,
    row_max: &mut S::Row,
) {
    store::<S, ROWS, VECTORS>(acc, scores);
    for row in acc {
        for (max, &score) in row_max.as_mut().iter_mut().zip(row) {
            *max = S::max(score, *max);
        }
    }
}

/// A tile of `ROWS` value columns by `VECTORS` vectors of queries, times the factors of the queries; 0 without.
#[inline(always)]
pub(super) unsafe fn rescaled<S: Simd, const ROWS: usize, const VECTORS: usize>(
    out: *const f32,
    rescale: Option<&S::Row>,
) -> Tile<S, ROWS, VECTORS> {
    let Some(rescale) = rescale else { return [[S::splat(0.0); VECTORS]; ROWS] };
    let mut acc = load::<S, ROWS, VECTORS>(out);
    for row in &mut acc {
        for (o, &factor) in row.iter_mut().zip(rescale.as_ref()) {
            *o = S::mul(*o, factor);
        }
    }
    acc
}

#[inline(always)]
pub(super) unsafe fn load<S: Simd, const ROWS: usize, const VECTORS: usize>(
    from: *const f32,
) -> Tile<S, ROWS, VECTORS> {
    let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
    for (r, row) in acc.iter_mut().enumerate() {
        for (n, x) in row.iter_mut().enumerate() {
            *x = S::load(from.add(r * S::PANEL + n * S::LANES));
        }
    }
    acc
}

#[inline(always)]
pub(super) unsafe fn store<S: Simd, const ROWS: usize, const VECTORS: usize>(
    acc: &Tile<S, ROWS, VECTORS>,
    to: *mut f32,
) {
    for (r, row) in acc.iter().enumerate() {
        for (n, &x) in row.iter().enumerate() {
            S::store(to.add(r * S::PANEL + n * S::LANES), x);
        }
    }
}
