//! matmul2d of the NVIDIA headers, run on this processor: every way to bring operands and to take results, types, sizes that
//! end in chunks of every width, extents that end inside of a tile, rows that are not aligned, several simdgroups.

mod nvidia;

use std::fmt::Write as _;

use half::{bf16, f16};
use mtlflashattn_metal::{Argument, Device as _, Grid};
use mtlflashattn_simulator::{Buffer, Layer, Options, Simulator};
use nvidia::{headers, numbers};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scalar {
    Half,
    Bfloat,
    Float,
}
use Scalar::{Bfloat, Float, Half};

impl Scalar {
    const fn name(self) -> &'static str {
        match self {
            Half => "half",
            Bfloat => "bfloat",
            Float => "float",
        }
    }

    fn encode(self, x: f32) -> (Vec<u8>, f64) {
        match self {
            Half => (f16::from_f32(x).to_ne_bytes().to_vec(), f16::from_f32(x).to_f64()),
            Bfloat => (bf16::from_f32(x).to_ne_bytes().to_vec(), bf16::from_f32(x).to_f64()),
            Float => (x.to_ne_bytes().to_vec(), f64::from(x)),
        }
    }

    fn decode(self, bytes: &[u8]) -> f64 {
        match self {
            Half => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
            Bfloat => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
            Float => f64::from(f32::from_ne_bytes(bytes.try_into().unwrap())),
        }
    }

    /// Half a unit in the last place of 1.
    fn rounding(self) -> f64 {
        match self {
            Half => 2f64.powi(-11),
            Bfloat => 2f64.powi(-8),
            Float => 2f64.powi(-24),
        }
    }
}

/// One product: its descriptor, its types, and where everything lies.
#[derive(Clone, Copy, Debug)]
struct Case {
    types: [Scalar; 3],
    size: [usize; 3],
    dynamic_k: bool,
    transposed: [bool; 2],
    relaxed: bool,
    accumulates: bool,
    simdgroups: usize,
    /// Left operand, right operand, result in cooperative tensors.
    cooperative: [bool; 3],
    /// How much of m, n and k the operands have.
    there: [usize; 3],
    /// Elements before the operands and behind each of their rows.
    offset: usize,
    gap: usize,
}

/// Operands in memory, the right one transposed, the result in a cooperative tensor.
const fn case(types: [Scalar; 3], size: [usize; 3]) -> Case {
    Case {
        types,
        size,
        dynamic_k: false,
        transposed: [false, true],
        relaxed: false,
        accumulates: false,
        simdgroups: 1,
        cooperative: [false, false, true],
        there: size,
        offset: 0,
        gap: 8,
    }
}

/// A matrix in memory: NaN wherever an operand must not be read.
struct Matrix {
    bytes: Vec<u8>,
    values: Vec<f64>,
    pitch: usize,
}

impl Matrix {
    /// `lines` lines of `length`, of which only the first parts count.
    fn new(scalar: Scalar, lines: usize, length: usize, case: &Case, there: [usize; 2], seed: u64) -> Self {
        let pitch = length + case.gap;
        let hole = scalar.encode(f32::NAN).0;
        let mut bytes = hole.repeat(case.offset + lines * pitch);
        let mut values = vec![0.0; lines * length];
        for (i, number) in numbers(seed, lines * length).into_iter().enumerate() {
            let (line, at) = (i / length, i % length);
            if line < there[0] && at < there[1] {
                let (encoded, value) = scalar.encode(number);
                let size = encoded.len();
                bytes[(case.offset + line * pitch + at) * size..][..size].copy_from_slice(&encoded);
                values[i] = value;
            }
        }
        Self { bytes, values, pitch }
    }
}

impl Case {
    /// The kernel of this case.
    fn kernel(&self, name: &str) -> String {
        let [left, right, result] = self.types.map(Scalar::name);
        let ([m, n, k], [rows, columns, contracted]) = (self.size, self.there);
        let [left_turned, right_turned] = self.transposed;
        // Dimension 0 is the fastest.
        let left_extents = if left_turned { (rows, contracted, m) } else { (contracted, rows, k) };
        let right_extents = if right_turned { (contracted, columns, k) } else { (columns, contracted, n) };
        let (offset, gap) = (self.offset, self.gap);
        let view = |name: &str, (inner, outer, length): (usize, usize, usize)| {
            let pitch = length + gap;
            format!(
                "  auto {name} = nvidia::tensor({name}_data + {offset}, nvidia::dextents<int, 2>({inner}, {outer}), \
                 nvidia::array<int, 2>{{1, {pitch}}});\n"
            )
        };
        let mut text = format!(
            "kernel void {name}(device {left}* left_data [[buffer(0)]], device {right}* right_data [[buffer(1)]],\n\
             device const float* addend [[buffer(2)]], device {result}* result [[buffer(3)]],\n\
             device int* owners [[buffer(4)]], device const int* simdgroup [[buffer(5)]]) {{\n\
             using namespace nvidia_mpp::tensor_ops;\n  msl_played_simdgroup = uint(simdgroup[0]);\n{}{}",
            view("left", left_extents),
            view("right", right_extents)
        );
        let mode = if self.accumulates { "multiply_accumulate" } else { "multiply" };
        let k = if self.dynamic_k { -1 } else { k as i32 };
        writeln!(
            text,
            "  constexpr auto d = matmul2d_descriptor({m}, {n}, {k}, {left_turned}, {right_turned}, {}, \
             matmul2d_descriptor::mode::{mode});\n  matmul2d<d, execution_simdgroups<{}>> op;",
            self.relaxed, self.simdgroups
        )
        .unwrap();
        for (side, cooperative) in [("left", self.cooperative[0]), ("right", self.cooperative[1])] {
            if cooperative {
                writeln!(
                    text,
                    "  auto {side}_input = op.get_{side}_input_cooperative_tensor<{left}, {right}, {result}>();\n  \
                     {side}_input.load({side});"
                )
            } else {
                writeln!(text, "  thread auto& {side}_input = {side};")
            }
            .unwrap();
        }
        if self.cooperative[2] {
            writeln!(
                text,
                "  auto sums = op.get_destination_cooperative_tensor<decltype(left), decltype(right), {result}>();\n  \
                 for (ushort i = 0; i < sums.get_capacity(); ++i) {{\n    if (!sums.is_valid_element(i)) continue;\n    \
                 auto at = sums.get_multidimensional_index(i);\n    \
                 sums[i] = {result}(addend[at[1] * {n} + at[0]]);\n  }}\n  op.run(left_input, right_input, sums);\n  \
                 for (ushort i = 0; i < sums.get_capacity(); ++i) {{\n    if (!sums.is_valid_element(i)) continue;\n    \
                 auto at = sums.get_multidimensional_index(i);\n    result[at[1] * {n} + at[0]] = sums[i];\n    \
                 owners[at[1] * {n} + at[0]] += 1;\n  }}"
            )
        } else {
            writeln!(
                text,
                "  auto sums = nvidia::tensor(result, nvidia::dextents<int, 2>({columns}, {rows}), \
                 nvidia::array<int, 2>{{1, {n}}});\n  op.run(left_input, right_input, sums);"
            )
        }
        .unwrap();
        text.push_str("}\n");
        text
    }

    /// Runs the kernel and compares.
    fn check(&self, simulator: &Simulator, text: &str, name: &str) {
        let ([m, n, k], [rows, columns, contracted]) = (self.size, self.there);
        let turned = |turn: bool, shape: [usize; 2]| if turn { [shape[1], shape[0]] } else { shape };
        let matrix = |scalar, lines: [usize; 2], there: [usize; 2], seed| {
            Matrix::new(scalar, lines[0], lines[1], self, there, seed)
        };
        let (turn_left, turn_right) = (self.transposed[0], self.transposed[1]);
        let left = matrix(self.types[0], turned(turn_left, [m, k]), turned(turn_left, [rows, contracted]), 1);
        let right = matrix(self.types[1], turned(!turn_right, [n, k]), turned(!turn_right, [columns, contracted]), 2);
        let addend = numbers(3, m * n);
        let size = self.types[2].encode(0.0).0.len();
        let before: Vec<u8> = if self.cooperative[2] {
            self.types[2].encode(f32::NAN).0.repeat(m * n)
        } else {
            addend.iter().flat_map(|&value| self.types[2].encode(value).0).collect()
        };
        let pipeline = simulator.pipeline(text, name).unwrap();
        let result = Buffer::from_slice(&before).unwrap();
        let owners = Buffer::from_slice(&vec![0_i32; m * n]).unwrap();
        for simdgroup in 0..self.simdgroups {
            let buffers = [
                &Buffer::from_slice(&left.bytes).unwrap(),
                &Buffer::from_slice(&right.bytes).unwrap(),
                &Buffer::from_slice(&addend).unwrap(),
                &result,
                &owners,
                &Buffer::from_slice(&[simdgroup as i32]).unwrap(),
            ];
            let grid = Grid { threadgroups: [1, 1, 1], group: [32, 1, 1] };
            simulator.dispatch(&pipeline, &buffers.map(Argument::Buffer), grid).unwrap();
        }
        if self.cooperative[2] {
            assert!(owners.read::<i32>().iter().all(|&owners| owners == 1), "{self:?}: elements without one owner");
        }
        let got = result.read::<u8>();
        let element = |matrix: &Matrix, turn: bool, line: usize, at: usize| {
            let length = matrix.pitch - self.gap;
            if turn { matrix.values[at * length + line] } else { matrix.values[line * length + at] }
        };
        for (i, (bytes, &addend)) in got.chunks_exact(size).zip(&addend).enumerate() {
            let (row, column) = (i / n, i % n);
            let inside = row < rows && column < columns;
            let addend = self.types[2].encode(addend).1;
            let products: Vec<f64> = (0..k)
                .map(|at| element(&left, turn_left, row, at) * element(&right, !turn_right, column, at))
                .collect();
            let start = if self.accumulates { addend } else { 0.0 };
            let want = if self.cooperative[2] || inside { start + products.iter().sum::<f64>() } else { addend };
            let sizes = products.iter().map(|product| product.abs()).sum::<f64>() + start.abs();
            let bound = self.error(sizes, k) + self.types[2].rounding() * (want.abs() + 1e-6);
            let error = (self.types[2].decode(bytes) - want).abs();
            assert!(error <= bound, "{self:?}: ({row}, {column}) is off by {error:e}, bound {bound:e}");
        }
    }

    /// How far a sum in float may be off, whose products have these sizes: each of the additions by half a unit in the
    /// last place, and the products by what the operands lose as tf32 numbers.
    fn error(&self, sizes: f64, k: usize) -> f64 {
        let floats = self.types[..2].iter().filter(|&&scalar| scalar == Float).count() as f64;
        let lost = if self.relaxed { 2f64.powi(-10) } else { 2f64.powi(-23) };
        // Split floats take four products for one.
        sizes * ((4 * k + 1) as f64 * 2f64.powi(-24) + 1.01 * lost * floats)
    }
}

const HEADERS: [&str; 8] = [
    include_str!("../include/mpp/array.h"),
    include_str!("../include/mpp/extents.h"),
    include_str!("../include/mpp/tensor.h"),
    include_str!("../include/mpp/descriptor.h"),
    include_str!("../include/mpp/rules.h"),
    include_str!("../include/nvptx/cooperative_tensor.h"),
    include_str!("../include/nvptx/fragments.h"),
    include_str!("../include/nvptx/matmul2d.h"),
];

fn check(cases: &[Case]) {
    let mut text = headers(&HEADERS, 2);
    for (i, case) in cases.iter().enumerate() {
        text.push_str(&case.kernel(&format!("case_{i}")));
    }
    let simulator = Simulator::new(Options::new(Layer::Fast));
    for (i, case) in cases.iter().enumerate() {
        case.check(&simulator, &text, &format!("case_{i}"));
    }
}

#[test]
fn products_of_every_type() {
    let types = [[Half, Half, Float], [Half, Half, Half], [Bfloat, Bfloat, Float], [Bfloat, Bfloat, Bfloat]];
    let mixed = [[Float, Half, Float], [Half, Float, Float], [Float, Bfloat, Float], [Float, Float, Float]];
    let mut cases: Vec<Case> = types.iter().chain(&mixed).map(|&types| case(types, [16, 32, 64])).collect();
    cases.extend(mixed.iter().map(|&types| Case { relaxed: true, ..case(types, [16, 16, 32]) }));
    check(&cases);
}

#[test]
fn rows_of_values_as_they_lie() {
    let plain = |types, size| Case { transposed: [false, false], accumulates: true, ..case(types, size) };
    check(&[
        plain([Half, Half, Float], [16, 64, 32]),
        plain([Half, Half, Float], [16, 120, 32]),
        plain([Float, Half, Float], [16, 80, 16]),
        plain([Bfloat, Bfloat, Float], [32, 64, 48]),
        Case { relaxed: true, ..plain([Float, Bfloat, Float], [16, 72, 32]) },
        plain([Float, Float, Float], [16, 32, 16]),
    ]);
}

#[test]
fn edges_and_rows_that_are_not_aligned() {
    let ends = |types, size: [usize; 3], there| Case { there, ..case(types, size) };
    let plain = |case: Case| Case { transposed: [case.transposed[0], false], ..case };
    check(&[
        ends([Half, Half, Float], [16, 32, 64], [16, 19, 64]),
        ends([Half, Half, Float], [16, 32, 64], [5, 32, 53]),
        plain(ends([Half, Half, Float], [16, 64, 32], [16, 64, 21])),
        plain(ends([Half, Half, Float], [32, 48, 32], [27, 41, 32])),
        Case { offset: 3, ..case([Half, Half, Float], [16, 16, 64]) },
        Case { gap: 5, ..plain(case([Bfloat, Bfloat, Float], [16, 64, 16])) },
        Case { gap: 1, offset: 1, relaxed: true, ..plain(case([Float, Float, Float], [16, 16, 16])) },
        Case { transposed: [true, true], ..case([Half, Half, Float], [16, 16, 32]) },
        Case { transposed: [true, false], ..ends([Bfloat, Bfloat, Float], [16, 32, 16], [11, 30, 13]) },
    ]);
}

#[test]
fn inner_dimensions_of_the_operands() {
    let open = |types, size: [usize; 3]| Case { dynamic_k: true, ..case(types, size) };
    check(&[
        open([Half, Half, Half], [16, 32, 64]),
        open([Half, Half, Float], [16, 16, 72]),
        open([Float, Float, Float], [16, 16, 19]),
        Case { transposed: [false, false], ..open([Half, Half, Float], [16, 64, 32]) },
        Case { transposed: [false, false], there: [16, 64, 27], ..open([Half, Half, Float], [16, 64, 27]) },
    ]);
}

#[test]
fn results_in_memory_and_of_several_simdgroups() {
    let memory = |case: Case| Case { cooperative: [false; 3], ..case };
    let plain = |case: Case| Case { transposed: [false, false], accumulates: true, ..case };
    check(&[
        memory(case([Half, Half, Float], [16, 32, 32])),
        memory(Case { accumulates: true, there: [13, 27, 32], ..case([Half, Half, Float], [16, 32, 32]) }),
        memory(plain(case([Bfloat, Bfloat, Bfloat], [16, 72, 16]))),
        memory(Case { simdgroups: 4, ..case([Half, Half, Float], [32, 32, 64]) }),
        Case { simdgroups: 4, ..plain(case([Half, Half, Float], [32, 64, 32])) },
        Case { simdgroups: 4, ..plain(case([Half, Half, Float], [32, 80, 32])) },
        Case { simdgroups: 4, ..plain(case([Half, Half, Float], [16, 72, 16])) },
        Case { simdgroups: 2, dynamic_k: true, ..plain(case([Float, Float, Float], [64, 16, 16])) },
    ]);
}

#[test]
fn operands_in_registers() {
    let inputs = |left, right, case: Case| Case { cooperative: [left, right, true], ..case };
    let plain = |case: Case| Case { transposed: [false, false], ..case };
    check(&[
        inputs(true, false, case([Half, Half, Float], [16, 32, 80])),
        inputs(true, false, plain(case([Float, Half, Float], [16, 64, 32]))),
        inputs(false, true, case([Half, Half, Float], [16, 32, 16])),
        inputs(true, true, plain(case([Bfloat, Bfloat, Float], [16, 32, 16]))),
        inputs(true, true, Case { there: [9, 32, 16], ..case([Float, Float, Float], [16, 32, 16]) }),
        inputs(true, true, Case { relaxed: true, ..plain(case([Float, Half, Float], [32, 16, 16])) }),
    ]);
}

/// S = Q K^T, the maximum and the sum of each row of it, O = (S - maximum) V, with S in registers.
const CHAIN: &str = r"
kernel void chain(device half* q [[buffer(0)]], device half* k [[buffer(1)]], device half* v [[buffer(2)]],
                  device float* out [[buffer(3)]], device float* sums [[buffer(4)]]) {
  using namespace nvidia_mpp::tensor_ops;
  typedef nvidia::dextents<int, 2> Sizes;
  auto left = nvidia::tensor(q, Sizes(64, 32));
  auto right = nvidia::tensor(k, Sizes(64, 48));
  auto values = nvidia::tensor(v, Sizes(72, 48));
  constexpr auto scores_d = matmul2d_descriptor(32, 48, 64, false, true, false);
  constexpr auto out_d = matmul2d_descriptor(32, 72, 48, false, false, false);
  matmul2d<scores_d, execution_simdgroup> scores_op;
  matmul2d<out_d, execution_simdgroup> out_op;
  auto s = scores_op.get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  auto greatest = scores_op.get_row_reduction_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  auto total = scores_op.get_row_reduction_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  scores_op.run(left, right, s);
  reduce_rows(s, greatest, reduction_operation::max, metal::numeric_limits<float>::lowest());
  for (auto it = s.begin(); it != s.end(); ++it) *it = *it - *greatest.map_iterator(it);
  reduce_rows(s, total);
  auto p = out_op.get_left_input_cooperative_tensor<float, half, float>(s);
  auto o = out_op.get_destination_cooperative_tensor<decltype(p), decltype(values), float>();
  out_op.run(p, values, o);
  for (ushort i = 0; i < o.get_capacity(); ++i) {
    auto at = o.get_multidimensional_index(i);
    out[at[1] * 72 + at[0]] = o[i];
  }
  for (ushort i = 0; i < total.get_capacity(); ++i) sums[total.get_multidimensional_index(i)[0]] = total[i];
  auto columns = scores_op.get_column_reduction_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  reduce_columns(s, columns, reduction_operation::min, metal::numeric_limits<float>::max());
  for (ushort i = 0; i < columns.get_capacity(); ++i)
    sums[32 + columns.get_multidimensional_index(i)[0]] = columns[i];
}
";

#[test]
fn a_result_is_the_next_left_operand() {
    const M: usize = 32;
    const N: usize = 48;
    const K: usize = 64;
    const D: usize = 72;
    let halves = |seed, count| -> (Vec<f16>, Vec<f64>) {
        numbers(seed, count).into_iter().map(|x| (f16::from_f32(x), f16::from_f32(x).to_f64())).unzip()
    };
    let ((q, exact_q), (k, exact_k), (v, exact_v)) = (halves(1, M * K), halves(2, N * K), halves(3, N * D));
    let simulator = Simulator::new(Options::new(Layer::Fast));
    let pipeline = simulator.pipeline(&format!("{}{CHAIN}", headers(&HEADERS, 2)), "chain").unwrap();
    let (out, sums) = (Buffer::poisoned(M * D * 4).unwrap(), Buffer::poisoned((M + N) * 4).unwrap());
    let inputs = [q, k, v].map(|values| Buffer::from_slice(&values).unwrap());
    let [q, k, v] = &inputs;
    let grid = Grid { threadgroups: [1, 1, 1], group: [32, 1, 1] };
    simulator.dispatch(&pipeline, &[q, k, v, &out, &sums].map(Argument::Buffer), grid).unwrap();
    let (out, sums) = (out.read::<f32>(), sums.read::<f32>());
    let mut least = [f64::INFINITY; N];
    for row in 0..M {
        let mut scores: Vec<f64> =
            (0..N).map(|key| (0..K).map(|i| exact_q[row * K + i] * exact_k[key * K + i]).sum()).collect();
        let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for (score, least) in scores.iter_mut().zip(&mut least) {
            *score -= greatest;
            *least = least.min(*score);
        }
        let near = |got: f32, want: f64, what: &str| {
            // Scores below 64, each good for 2^-16, and 48 of them in a sum; tf32 pairs lose 2^-23 of each.
            assert!((f64::from(got) - want).abs() <= 48.0 * 2f64.powi(-15), "{what} of row {row}: {got} is not {want}");
        };
        near(sums[row], scores.iter().sum(), "sum");
        for column in 0..D {
            let want = scores.iter().enumerate().map(|(key, score)| score * exact_v[key * D + column]).sum();
            near(out[row * D + column], want, "out");
        }
    }
    for (got, want) in sums[M..].iter().zip(least) {
        assert!((f64::from(*got) - want).abs() <= 2f64.powi(-15), "minimum of a column: {got} is not {want}");
    }
}
