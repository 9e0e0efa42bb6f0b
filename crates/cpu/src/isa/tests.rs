//! Every method of every instruction set against plain scalar code.
#![allow(clippy::float_cmp, reason = "inputs are chosen so that results are exact")]

use std::hint::black_box;

use super::portable::Portable;
use super::{Isa, Job, Simd};
use crate::math;
use crate::workspace::Block;

/// One test per check and instruction set. The checks are generic; each is entered through a function that enables the
/// features, as the kernels are.
macro_rules! checks {
    ($($check:ident)*) => {
        checks!(@set portable, Isa::Portable, Portable, inline(never), [$($check)*]);
        #[cfg(target_arch = "x86_64")]
        checks!(
            @set avx2, Isa::Avx2, crate::isa::avx2::Avx2, target_feature(enable = "avx2,fma,f16c"), [$($check)*]
        );
        #[cfg(target_arch = "x86_64")]
        checks!(
            @set avx512, Isa::Avx512, crate::isa::avx512::Avx512,
            target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"), [$($check)*]
        );
        #[cfg(target_arch = "aarch64")]
        checks!(@set neon, Isa::Neon, crate::isa::neon::Neon, target_feature(enable = "neon"), [$($check)*]);
    };
    (@set $module:ident, $isa:expr, $simd:ty, $attribute:meta, [$($check:ident)*]) => {
        mod $module {
            use super::*;

            $(
                #[test]
                fn $check() {
                    #[$attribute]
                    unsafe fn enter() {
                        super::$check::<$simd>();
                    }
                    if runs($isa) {
                        // SAFETY: the instruction set is available.
                        unsafe { enter() }
                    }
                }
            )*
        }
    };
}

checks! {
    loads_and_stores
    widens_every_f16
    widens_every_bf16
    widens_bf16_pairs
    dots_of_bf16
    rounds_to_f16
    rounds_to_bf16
    arithmetic
    multiply_add
    largest_and_smallest_of_two
    exponent_shift
    keeps_the_visible
    sum_of_lanes
    sums_of_vectors
    largest_lane
    transposes
    scores_tile
    scores_tile_spreads_nan
    values_tile
    accumulate_tile
    prefetches_anything
    exp2
    tanh
}

#[allow(clippy::print_stderr, reason = "says what was not tested")]
fn runs(isa: Isa) -> bool {
    let available = isa.is_available();
    if !available {
        eprintln!("skipped: this machine cannot run {}", isa.name());
    }
    available
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Any bit pattern.
    const fn bits(&mut self) -> f32 {
        f32::from_bits(self.next() as u32)
    }

    /// A whole number from -8 to 8: sums of products of these are exact in any order.
    const fn small(&mut self) -> f32 {
        (self.next() % 17) as f32 - 8.0
    }
}

const SPECIAL: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    -3.75,
    1e-38,
    f32::MIN_POSITIVE,
    -1.175_494_2e-38,
    1e-45,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    -f32::NAN,
];

/// Every combination of special values, random bit patterns and random values near one.
fn tuples<const N: usize>() -> Vec<[f32; N]> {
    let mut random = Random(N as u64);
    let combinations = SPECIAL.len().pow(N as u32);
    let special = |index: usize, place: usize| SPECIAL[index / SPECIAL.len().pow(place as u32) % SPECIAL.len()];
    let mut tuples: Vec<[f32; N]> =
        (0..combinations).map(|index| std::array::from_fn(|place| special(index, place))).collect();
    tuples.extend((0..20_000).map(|_| [(); N].map(|()| random.bits())));
    tuples.extend((0..20_000).map(|_| [(); N].map(|()| random.small() + random.next() as f32 * 2f32.powi(-65))));
    tuples
}

/// `operation` on all of `inputs`, a vector at a time.
#[inline(always)]
unsafe fn apply<S: Simd, const N: usize>(
    inputs: &[[f32; N]],
    operation: impl Fn([S::Vector; N]) -> S::Vector,
) -> Vec<f32> {
    let mut results = Vec::with_capacity(inputs.len());
    for chunk in inputs.chunks(S::LANES) {
        let mut lanes = [[0.0f32; 16]; N];
        for (lane, input) in chunk.iter().enumerate() {
            for (operand, &x) in lanes.iter_mut().zip(input) {
                operand[lane] = x;
            }
        }
        let lanes = black_box(lanes);
        let mut result = [0.0f32; 16];
        S::store(result.as_mut_ptr(), operation(lanes.map(|operand| S::load(operand.as_ptr()))));
        results.extend_from_slice(&result[..chunk.len()]);
    }
    results
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Asserts that `results` are what `expected` says, bit for bit but for the payload of a NaN.
fn assert_same<const N: usize>(name: &str, inputs: &[[f32; N]], results: &[f32], expected: impl Fn([f32; N]) -> f32) {
    for (&input, &result) in inputs.iter().zip(results) {
        let expected = expected(input);
        assert!(same(result, expected), "{name} of {input:?} is {result:?}, not {expected:?}");
    }
}

/// Uninitialised floats on a cache line, filled by `value`.
fn block(len: usize, mut value: impl FnMut(usize) -> f32) -> Block {
    let block = Block::new(len).expect("a small allocation");
    for i in 0..len {
        // SAFETY: inside the block.
        unsafe { block.as_ptr().add(i).write(value(i)) }
    }
    black_box(block)
}

/// The first `len` values of a block.
unsafe fn contents(block: &Block, len: usize) -> &[f32] {
    std::slice::from_raw_parts(block.as_ptr(), len)
}

/// What stands where nothing may be written.
const UNTOUCHED: f32 = 12_345.0;

#[inline(always)]
unsafe fn loads_and_stores<S: Simd>() {
    let inputs = tuples::<1>();
    for bits in inputs.as_flattened().chunks_exact(S::LANES) {
        // Off every alignment but that of an element.
        let mut from = [UNTOUCHED; 17];
        from[1..=S::LANES].copy_from_slice(bits);
        let from = black_box(from);
        let mut to = [UNTOUCHED; 19];
        S::store(to.as_mut_ptr().add(1), S::load(from.as_ptr().add(1)));
        let expected = |i: usize| if (1..=S::LANES).contains(&i) { from[i] } else { UNTOUCHED };
        assert!((0..to.len()).all(|i| to[i].to_bits() == expected(i).to_bits()), "{to:?} from {from:?}");
    }
    for &[x] in &inputs {
        let mut lanes = [UNTOUCHED; 17];
        S::store(lanes.as_mut_ptr(), S::splat(black_box(x)));
        assert!(lanes[..S::LANES].iter().all(|lane| lane.to_bits() == x.to_bits()), "splat of {x:?}: {lanes:?}");
    }
}

/// A format of `digits` binary digits after the point and exponents from `min_exponent` on.
struct Format {
    digits: i32,
    min_exponent: i32,
    largest: f64,
}

const F16: Format = Format { digits: 10, min_exponent: -14, largest: 65_504.0 };
const BF16: Format = Format { digits: 7, min_exponent: -126, largest: 3.389_531_389_251_535_5e38 };

impl Format {
    /// The value of a bit pattern.
    fn decode(&self, bits: u16) -> f32 {
        let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
        let fraction = f64::from(bits & ((1 << self.digits) - 1)) * 2f64.powi(-self.digits);
        let exponent = i32::from(bits & 0x7fff) >> self.digits;
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(self.min_exponent),
            _ if exponent == 0x7fff >> self.digits => {
                return if fraction == 0.0 { sign as f32 / 0.0 } else { f32::NAN };
            }
            _ => (1.0 + fraction) * 2f64.powi(self.min_exponent + exponent - 1),
        };
        (sign * magnitude) as f32
    }

    /// The nearest value, even where two are.
    fn round(&self, x: f32) -> f32 {
        if !x.is_finite() {
            return x;
        }
        let exponent = ((f64::from(x).to_bits() >> 52) & 0x7ff) as i32 - 1023;
        let unit = 2f64.powi(exponent.max(self.min_exponent) - self.digits);
        let rounded = (f64::from(x) / unit).round_ties_even() * unit;
        if rounded.abs() > self.largest { f32::INFINITY.copysign(x) } else { rounded as f32 }
    }

    /// Every value, the midpoints on both sides of it, their neighbours, and a sweep of all float32 bit patterns.
    fn rounding_inputs(&self) -> Vec<f32> {
        let mut inputs: Vec<f32> = tuples::<1>().as_flattened().to_vec();
        for bits in 0..=u16::MAX {
            let value = f64::from(self.decode(bits));
            let unit = value - f64::from(self.decode(bits.wrapping_sub(1)));
            // Above a power of two the unit doubles: the midpoint is a whole unit away.
            for x in [value, value - unit / 2.0, value + unit / 2.0, value + unit].map(|x| x as f32) {
                inputs.extend([x.next_down(), x, x.next_up()]);
            }
        }
        inputs.extend((0..=u32::MAX).step_by(4093).map(f32::from_bits));
        inputs
    }
}

#[inline(always)]
unsafe fn check_widening<S: Simd>(format: &Format, load: impl Fn(*const u16) -> S::Vector) {
    let patterns: Vec<u16> = (0..=u16::MAX).collect();
    // Off every alignment but that of an element.
    let patterns = black_box([&[0][..], &patterns[..]].concat());
    for chunk in patterns[1..].chunks_exact(S::LANES) {
        let mut lanes = [0.0f32; 16];
        S::store(lanes.as_mut_ptr(), load(chunk.as_ptr()));
        for (&bits, &lane) in chunk.iter().zip(&lanes) {
            assert!(same(lane, format.decode(bits)), "{bits:#06x} became {lane:?}, not {:?}", format.decode(bits));
        }
    }
}

#[inline(always)]
unsafe fn check_rounding<S: Simd>(format: &Format, store: impl Fn(*mut u16, S::Vector)) {
    let inputs = black_box(format.rounding_inputs());
    for chunk in inputs.chunks_exact(S::LANES) {
        let mut stored = [0xdead_u16; 18];
        store(stored.as_mut_ptr().add(1), S::load(chunk.as_ptr()));
        assert!(stored[0] == 0xdead && stored[S::LANES + 1] == 0xdead, "wrote outside of the vector");
        for (&x, &bits) in chunk.iter().zip(&stored[1..]) {
            let (result, expected) = (format.decode(bits), format.round(x));
            assert!(same(result, expected), "{x:?} became {bits:#06x} = {result:?}, not {expected:?}");
        }
    }
}

#[inline(always)]
unsafe fn widens_every_f16<S: Simd>() {
    check_widening::<S>(&F16, |p| S::load_f16(p));
}

#[inline(always)]
unsafe fn widens_every_bf16<S: Simd>() {
    check_widening::<S>(&BF16, |p| S::load_bf16(p));
}

#[inline(always)]
unsafe fn widens_bf16_pairs<S: Simd>() {
    let bits: Vec<u16> = (0..=u16::MAX).collect();
    for chunk in bits.chunks_exact(2 * S::LANES) {
        let mut widened = [0.0f32; 32];
        let [a, b] = S::bf16_pair_in_order(S::load_bf16_pair(black_box(chunk).as_ptr()));
        S::store(widened.as_mut_ptr(), a);
        S::store(widened.as_mut_ptr().add(S::LANES), b);
        for (&bits, &x) in chunk.iter().zip(&widened) {
            let expected = f32::from_bits(u32::from(bits) << 16);
            assert!(same(x, expected), "{bits:#06x} becomes {x:?}, not {expected:?}");
        }
    }
}

/// The sum over the lanes of [`Simd::dot_bf16`].
struct Dot<'a> {
    a: &'a [u16],
    b: &'a [u16],
    sum: &'a mut f32,
}

impl Job for Dot<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        *self.sum = S::sum(S::dot_bf16(self.a.as_ptr(), self.b.as_ptr(), S::splat(1.0)));
    }
}

#[inline(always)]
unsafe fn dots_of_bf16<S: Simd>() {
    if S::BF16_DOT && !S::has_bf16_dot() {
        return;
    }
    let value = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
    let (len, mut random) = (2 * S::LANES, Random(3));
    for _ in 0..1000 {
        // Exponents from -8 to 7: no product leaves the normal range.
        let mut draw = || (random.next() as u16 & 0x87ff) + (119 << 7);
        let (a, b): (Vec<u16>, Vec<u16>) = (0..len).map(|_| (draw(), draw())).unzip();
        let terms = || a.iter().zip(&b).map(|(&a, &b)| value(a) * value(b));
        let (want, size) = (terms().sum::<f64>() + S::LANES as f64, terms().map(f64::abs).sum::<f64>() + len as f64);
        let mut got = f32::NAN;
        S::apart_bf16(Dot { a: &a, b: &b, sum: &mut got });
        // Each of the products and the lanes is added once, and every sum rounded.
        let bound = (2 * len) as f64 * f64::from(f32::EPSILON) * size;
        assert!((f64::from(got) - want).abs() <= bound, "{got} for {want}, bound {bound:e}");
    }
}

#[inline(always)]
unsafe fn rounds_to_f16<S: Simd>() {
    check_rounding::<S>(&F16, |p, x| S::store_f16(p, x));
}

#[inline(always)]
unsafe fn rounds_to_bf16<S: Simd>() {
    check_rounding::<S>(&BF16, |p, x| S::store_bf16(p, x));
}

#[inline(always)]
unsafe fn arithmetic<S: Simd>() {
    let inputs = tuples::<2>();
    assert_same("sum", &inputs, &apply::<S, 2>(&inputs, |[a, b]| S::add(a, b)), |[a, b]| a + b);
    assert_same("difference", &inputs, &apply::<S, 2>(&inputs, |[a, b]| S::sub(a, b)), |[a, b]| a - b);
    assert_same("product", &inputs, &apply::<S, 2>(&inputs, |[a, b]| S::mul(a, b)), |[a, b]| a * b);
    assert_same("quotient", &inputs, &apply::<S, 2>(&inputs, |[a, b]| S::div(a, b)), |[a, b]| a / b);
}

/// Rounded once or twice: which one is the choice of the instruction set.
#[inline(always)]
unsafe fn multiply_add<S: Simd>() {
    let inputs = tuples::<3>();
    let results = apply::<S, 3>(&inputs, |[a, b, c]| S::fma(a, b, c));
    for (&[a, b, c], &result) in inputs.iter().zip(&results) {
        let (once, twice) = (a.mul_add(b, c), a * b + c);
        assert!(same(result, once) || same(result, twice), "{a:?} * {b:?} + {c:?} is {result:?}, not {once:?}");
    }
}

#[inline(always)]
unsafe fn largest_and_smallest_of_two<S: Simd>() {
    let inputs = tuples::<2>();
    let largest = apply::<S, 2>(&inputs, |[a, b]| S::max(a, b));
    let smallest = apply::<S, 2>(&inputs, |[a, b]| S::min(a, b));
    for ((&[a, b], &max), &min) in inputs.iter().zip(&largest).zip(&smallest) {
        let right = |result: f32, choice: f32| match (a.is_nan(), b.is_nan()) {
            (_, true) => result.is_nan(),
            (true, false) => result.is_nan() || result == b,
            // Zeros of either sign are equal.
            (false, false) => result == choice,
        };
        assert!(right(max, a.max(b)), "the larger of {a:?} and {b:?} is {max:?}");
        assert!(right(min, a.min(b)), "the smaller of {a:?} and {b:?} is {min:?}");
    }
}

#[inline(always)]
unsafe fn exponent_shift<S: Simd>() {
    let inputs = tuples::<1>();
    let results = apply::<S, 1>(&inputs, |[x]| S::shift_to_exponent(x));
    for (&[x], &result) in inputs.iter().zip(&results) {
        assert_eq!(result.to_bits(), x.to_bits() << 23, "of {x:?}");
    }
}

#[inline(always)]
unsafe fn keeps_the_visible<S: Simd>() {
    let inputs = tuples::<4>();
    let results = apply::<S, 4>(&inputs, |[x, key, low, high]| S::keep_between(x, key, low, high));
    let expected = |[x, key, low, high]: [f32; 4]| if low <= key && key < high { x } else { f32::NEG_INFINITY };
    assert_same("keep_between", &inputs, &results, expected);
    assert!(results.iter().any(|x| x.is_finite()), "something must be visible");
}

#[inline(always)]
unsafe fn sum_of_lanes<S: Simd>() {
    let mut random = Random(5);
    for _ in 0..10_000 {
        let mut lanes = [0.0f32; 16];
        lanes[..S::LANES].fill_with(|| random.small());
        let lanes = black_box(lanes);
        assert_eq!(S::sum(S::load(lanes.as_ptr())), lanes.iter().sum(), "sum of {lanes:?}");
    }
    for lane in 0..S::LANES {
        for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let mut lanes = [1.0f32; 16];
            lanes[lane] = special;
            let sum = S::sum(S::load(black_box(lanes).as_ptr()));
            assert!(same(sum, special), "sum of {lanes:?} is {sum:?}");
        }
    }
}

#[inline(always)]
unsafe fn sums_of_vectors<S: Simd>() {
    let mut random = Random(9);
    for _ in 0..10_000 {
        let lanes: [[f32; 16]; 4] = black_box([(); 4].map(|()| [(); 16].map(|()| random.small())));
        let expected = lanes.map(|lanes| lanes[..S::LANES].iter().sum());
        assert_eq!(S::sums(lanes.map(|lanes| S::load(lanes.as_ptr()))), expected, "sums of {lanes:?}");
    }
    // Rounding shows the order of additions: it must depend neither on the place nor on the other vectors.
    for _ in 0..10_000 {
        let lanes: [f32; 16] = black_box([(); 16].map(|()| random.small() + random.next() as f32 * 2f32.powi(-65)));
        let other = S::splat(random.small());
        let x = S::load(lanes.as_ptr());
        let [expected, ..] = S::sums([x; 4]);
        for place in 0..4 {
            let sums = S::sums(std::array::from_fn(|i| if i == place { x } else { other }));
            assert_eq!(sums[place], expected, "sum number {place} of {lanes:?}");
        }
    }
}

#[inline(always)]
unsafe fn largest_lane<S: Simd>() {
    let mut random = Random(6);
    for round in 0..10_000 {
        let mut lanes = [f32::INFINITY; 16];
        // Negative values too: a zero that slips in would show.
        lanes[..S::LANES].fill_with(|| -1e-3 - (random.next() % 1000) as f32);
        lanes[round % S::LANES] = [random.small(), -0.5e-3, f32::INFINITY, f32::NEG_INFINITY][round / S::LANES % 4];
        let lanes = black_box(lanes);
        let expected = lanes[..S::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(S::largest(S::load(lanes.as_ptr())), expected, "largest of {lanes:?}");
    }
    let nothing = S::largest(S::splat(black_box(f32::NEG_INFINITY)));
    assert_eq!(nothing, f32::NEG_INFINITY);
}

#[inline(always)]
unsafe fn transposes<S: Simd>() {
    for (from_stride, to_stride) in [(S::LANES, S::LANES), (S::LANES + 3, 24), (40, S::LANES + 1)] {
        let from = black_box((0..S::LANES * from_stride).map(|i| i as f32).collect::<Vec<_>>());
        let mut to = black_box(vec![UNTOUCHED; S::LANES * to_stride + 1]);
        let factors = black_box((0..S::LANES).map(|i| i as f32 - 2.5).collect::<Vec<_>>());
        // One element in, so that rows lie on no vector boundary.
        let (target, factor) = (to.as_mut_ptr().add(1), S::load(factors.as_ptr()));
        S::transpose(from.as_ptr(), from_stride as isize, factor, target, to_stride as isize);
        for (i, &x) in to.iter().enumerate() {
            let expected = match i.checked_sub(1).map(|i| (i / to_stride, i % to_stride)) {
                Some((column, row)) if row < S::LANES => factors[column] * from[row * from_stride + column],
                _ => UNTOUCHED,
            };
            assert_eq!(x, expected, "element {i}, strides {from_stride} and {to_stride}");
        }
    }
}

#[inline(always)]
unsafe fn scores_tile<S: Simd>() {
    let mut random = Random(7);
    for vectors in 1..=S::PANEL / S::LANES {
        for (depth, key_stride) in [(4, 4), (8, 11), (64, 64), (68, 100), (256, 512)] {
            let keys = black_box((0..S::TILE * key_stride).map(|_| random.small()).collect::<Vec<_>>());
            let queries = block(depth * S::PANEL, |_| random.small());
            let scores = block(S::TILE * S::PANEL, |_| UNTOUCHED);
            // Some maxima lie above every score, some below.
            let mut max = [UNTOUCHED; 64];
            max[..S::PANEL].fill_with(|| if random.small() > 0.0 { 1e9 } else { -1e9 });
            let before = max;
            let mut row_max = max.as_ptr().cast::<S::Row>().read_unaligned();
            S::scores(vectors, keys.as_ptr(), key_stride, queries.as_ptr(), depth, scores.as_ptr(), &mut row_max);
            max.as_mut_ptr().cast::<S::Row>().write_unaligned(row_max);
            let (queries, scores) = (contents(&queries, depth * S::PANEL), contents(&scores, S::TILE * S::PANEL));
            let expected = |key: usize, lane: usize| -> f32 {
                (0..depth).map(|d| keys[key * key_stride + d] * queries[d * S::PANEL + lane]).sum()
            };
            for lane in 0..S::PANEL {
                let computed = lane < vectors * S::LANES;
                let mut largest = before[lane];
                for key in 0..S::TILE {
                    let expected = if computed { expected(key, lane) } else { UNTOUCHED };
                    assert_eq!(scores[key * S::PANEL + lane], expected, "key {key}, query {lane}, depth {depth}");
                    largest = if computed { largest.max(expected) } else { largest };
                }
                assert_eq!(max[lane], largest, "maximum of query {lane}");
            }
        }
    }
}

/// A NaN in one key reaches the scores of that key and of no other; a NaN in one query likewise.
#[inline(always)]
unsafe fn scores_tile_spreads_nan<S: Simd>() {
    const DEPTH: usize = 8;
    let vectors = S::PANEL / S::LANES;
    for poisoned in 0..DEPTH {
        let (bad_key, bad_query) = (poisoned % S::TILE, poisoned * 3 % S::PANEL);
        let mut keys = vec![1.0f32; S::TILE * DEPTH];
        keys[bad_key * DEPTH + poisoned] = f32::NAN;
        let keys = black_box(keys);
        let bad = poisoned * S::PANEL + bad_query;
        let queries = block(DEPTH * S::PANEL, |i| if i == bad { f32::NAN } else { 1.0 });
        let scores = block(S::TILE * S::PANEL, |_| UNTOUCHED);
        let lowest = block(S::PANEL, |_| f32::MIN);
        let mut row_max = lowest.as_ptr().cast::<S::Row>().read_unaligned();
        S::scores(vectors, keys.as_ptr(), DEPTH, queries.as_ptr(), DEPTH, scores.as_ptr(), &mut row_max);
        for (i, &score) in contents(&scores, S::TILE * S::PANEL).iter().enumerate() {
            let expected = i / S::PANEL == bad_key || i % S::PANEL == bad_query;
            assert_eq!(score.is_nan(), expected, "score {score} of key {} and query {}", i / S::PANEL, i % S::PANEL);
        }
    }
}

#[inline(always)]
unsafe fn values_tile<S: Simd>() {
    let mut random = Random(8);
    for vectors in 1..=S::PANEL / S::LANES {
        for (keys, first) in [(S::TILE, false), (2 * S::TILE, true), (5 * S::TILE, false), (128, false), (128, true)] {
            let values = block(keys * S::TILE, |_| random.small());
            let probabilities = block(keys * S::PANEL, |_| random.small());
            let mut before: Vec<f32> = (0..S::TILE * S::PANEL).map(|_| random.small()).collect();
            if first {
                before.fill(f32::NAN);
            }
            let out = block(S::TILE * S::PANEL, |i| before[i]);
            let factors = block(S::PANEL, |lane| lane as f32 * 0.5);
            let rescale = factors.as_ptr().cast::<S::Row>().read_unaligned();
            S::values(
                vectors,
                values.as_ptr(),
                probabilities.as_ptr(),
                keys,
                out.as_ptr(),
                (!first).then_some(&rescale),
            );
            let (values, weights) = (contents(&values, keys * S::TILE), contents(&probabilities, keys * S::PANEL));
            for (i, (&o, &before)) in contents(&out, S::TILE * S::PANEL).iter().zip(&before).enumerate() {
                let (column, lane) = (i / S::PANEL, i % S::PANEL);
                let product = |key: usize| values[key * S::TILE + column] * weights[key * S::PANEL + lane];
                let rescaled = if first { 0.0 } else { before * (lane as f32 * 0.5) };
                let sum = rescaled + (0..keys).map(product).sum::<f32>();
                let expected = if lane < vectors * S::LANES { sum } else { before };
                assert!(
                    o == expected || o.is_nan() && expected.is_nan(),
                    "{o}, not {expected}: column {column}, query {lane}, {keys} keys"
                );
            }
        }
    }
}

#[inline(always)]
unsafe fn accumulate_tile<S: Simd>() {
    let mut random = Random(9);
    for vectors in 1..=S::PANEL / S::LANES {
        for panels in [1, 2, 5] {
            // The weights of a panel belong to more keys than those of the tile.
            let stride = 3 * S::TILE * S::PANEL;
            let weights = block(panels * stride, |_| random.small());
            let rows = block(panels * S::PANEL * S::PANEL, |_| random.small());
            let before: Vec<f32> = (0..S::TILE * S::PANEL).map(|_| random.small()).collect();
            let out = block(S::TILE * S::PANEL, |i| before[i]);
            S::accumulate(vectors, weights.as_ptr(), stride, rows.as_ptr(), panels, out.as_ptr());
            let weights = contents(&weights, panels * stride);
            let rows = contents(&rows, panels * S::PANEL * S::PANEL);
            for (i, (&o, &before)) in contents(&out, S::TILE * S::PANEL).iter().zip(&before).enumerate() {
                let (key, column) = (i / S::PANEL, i % S::PANEL);
                let product = |row: usize| {
                    let weight = weights[row / S::PANEL * stride + key * S::PANEL + row % S::PANEL];
                    weight * rows[row * S::PANEL + column]
                };
                let sum = before + (0..panels * S::PANEL).map(product).sum::<f32>();
                let expected = if column < vectors * S::LANES { sum } else { before };
                assert_eq!(o, expected, "key {key}, column {column}, {panels} panels");
            }
        }
    }
}

/// Invalid addresses too: a prefetch never faults.
#[inline(always)]
unsafe fn prefetches_anything<S: Simd>() {
    for address in [0, 1, 64, usize::MAX, usize::MAX / 2] {
        S::prefetch(black_box(std::ptr::without_provenance(address)));
        S::prefetch_far(black_box(std::ptr::without_provenance(address)));
    }
}

/// `count` steps from `from` to `to`, and every magnitude down to the subnormal ones with the sign of `to`.
fn sweep(from: f32, to: f32, count: usize) -> Vec<[f32; 1]> {
    let linear = (0..=count).map(|i| from + (to - from) * (i as f32 / count as f32));
    let magnitudes = (0..to.abs().to_bits()).step_by(10_007).map(|bits| f32::from_bits(bits).copysign(to));
    linear.chain(magnitudes).map(|x| [x]).collect()
}

#[inline(always)]
unsafe fn exp2<S: Simd>() {
    let mut inputs = sweep(0.0, -150.0, 1 << 20);
    // A score that was computed anew may exceed its LSE by a rounding error.
    inputs.extend(sweep(0.0, 1.0, 1 << 10));
    let results = apply::<S, 1>(&inputs, |[x]| math::exp2::<S>(x));
    for (&[x], &result) in inputs.iter().zip(&results) {
        let (result, expected) = (f64::from(result), f64::from(x).exp2());
        if x < -126.5 {
            assert_eq!(result, 0.0, "2^{x}");
        } else {
            // Results below the normal numbers are multiples of 2^-149.
            let bound = (expected * 2f64.powi(-22)).max(2f64.powi(-149));
            assert!((result - expected).abs() <= bound, "2^{x} is {result:e}, not {expected:e}");
        }
    }
    assert!(apply::<S, 1>(&[[0.0], [-0.0]], |[x]| math::exp2::<S>(x)).iter().all(|&result| result == 1.0));
    let beyond = [f32::NEG_INFINITY, f32::MIN, -1e9, -127.5, -127.0].map(|x| [x]);
    assert!(apply::<S, 1>(&beyond, |[x]| math::exp2::<S>(x)).iter().all(|&result| result == 0.0));
    let nan = [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)].map(|x| [x]);
    assert!(apply::<S, 1>(&nan, |[x]| math::exp2::<S>(x)).iter().all(|result| result.is_nan()));
}

#[inline(always)]
unsafe fn tanh<S: Simd>() {
    let mut inputs = sweep(-12.0, 12.0, 1 << 20);
    inputs.extend(sweep(0.0, -12.0, 1 << 10));
    inputs.extend([1e9, f32::MAX, f32::INFINITY].iter().flat_map(|&x| [[x], [-x]]));
    let results = apply::<S, 1>(&inputs, |[x]| math::tanh::<S>(x));
    for (&[x], &result) in inputs.iter().zip(&results) {
        let expected = f64::from(x).tanh();
        let exponent = ((expected.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        // Below 2^-116 the numerator of the approximation is a subnormal number.
        let unit = 2f64.powi(exponent.max(-116) - 23);
        let error = (f64::from(result) - expected).abs() / unit;
        assert!(error <= 7.0, "tanh({x:e}) is {result:e}, {error:.2} units from {expected:e}");
    }
    let nan = apply::<S, 1>(&[[f32::NAN], [-f32::NAN]], |[x]| math::tanh::<S>(x));
    assert!(nan.iter().all(|result| result.is_nan()));
}
