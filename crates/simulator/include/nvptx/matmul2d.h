// matmul2d (header of MetalPerformancePrimitives: MPPTensorOpsMatMul2d.h) on the matrix instructions.
//
// Operands in memory are read where they lie, no element twice by a simdgroup: 16 bytes at a time if the whole tile is
// there and its rows are aligned, else one element at a time, with zeros for those past the extents. A scope of several
// simdgroups shares out the rows of the result, then its columns. A result in memory is overwritten by mode multiply.
//
// Float operands are split as in simdgroup_matrix.h; relaxed_precision cuts them off to tf32. Half and bfloat operands are
// exact beside them.
#pragma once

namespace mpp {
namespace tensor_ops {
using metal::cooperative_tensor;
using metal::extents;
using metal::msl_number;

// What run() takes: a tensor in memory, or a cooperative one.
template <class T> struct msl_operand_of : metal::false_type {};
template <class E, class X, class L> struct msl_operand_of<cooperative_tensor<E, X, L>> : metal::true_type {};
template <class T> constexpr constant bool msl_is_cooperative = msl_operand_of<T>::value;

MSL_INLINE int msl_least(int a, int b) { return a < b ? a : b; }

// Whether a tile lies in the tensor as a whole, at addresses that allow for reads of `Count` elements at once.
template <int Count, class Tensor> MSL_INLINE bool msl_is_whole(thread const Tensor &tensor, int inner, int outer) {
  constexpr int bytes = Count * (int)sizeof(typename Tensor::value_type);
  const ulong places = (ulong)tensor.msl_data() | (ulong)tensor.get_stride(1) * sizeof(typename Tensor::value_type);
  return places % (bytes < 16 ? bytes : 16) == 0 && inner <= (int)tensor.get_extent(0) && outer <= (int)tensor.get_extent(1);
}
// The most elements that a lane reads at once of a contraction of so many tiles, and of so many columns.
constexpr int msl_contracted_run(int tiles) { return tiles >= 4 ? 8 : tiles >= 2 ? 4 : 2; }
constexpr int msl_column_run(int tiles) { return tiles >= 8 ? 8 : tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1; }

template <matmul2d_descriptor Descriptor, class Scope> struct msl_product {
  static constexpr int m = Descriptor.m, n = Descriptor.n, k = Descriptor.msl_has_static_k() ? Descriptor.k : 0;
  static constexpr bool is_dynamic = k == 0;
  static constexpr int tiles_k = (k + 7) / 8;
  using map = metal::conditional_t<Descriptor.transpose_right, metal::msl_paired, metal::msl_spread>;
  using result_layout = metal::msl_matrix_layout<m, n, map, Scope::msl_simdgroups>;
  using left_layout = metal::msl_matrix_layout<m, k, metal::msl_paired, 1>;
  using right_layout = metal::msl_right_layout<k, n, map, Descriptor.transpose_right>;
  static constexpr int blocks = result_layout::blocks, tiles = result_layout::tiles;

  template <class T>
  static constexpr bool is_split =
      MSL_FLOAT_PRODUCTS == 2 && !Descriptor.relaxed_precision && metal::is_same_v<T, float>;

  // The columns first .. first + 8 Width of the left operand's rows.
  template <int Width, bool Whole, metal::msl_unit Unit, bool Split, class Left>
  static MSL_INLINE void read_left(thread const Left &left, int first,
                                   thread metal::msl_pair<Unit, Split> (&pairs)[blocks][Width][2]) {
#pragma clang loop unroll(full)
    for (int block = 0; block < blocks; ++block)
#pragma clang loop unroll(full)
      for (int h = 0; h < 2; ++h) {
        if constexpr (msl_is_cooperative<Left>) {
#pragma clang loop unroll(full)
          for (int i = 0; i < Width; ++i) {
            const int at = 4 * (block * left_layout::tiles + first / 8 + i) + 2 * h;
            pairs[block][i][h] =
                metal::msl_make_pair<Unit, Split>(left.m_elements[at], left.m_elements[at + 1]);
          }
        } else {
          metal::msl_run<typename Left::value_type, 2 * Width> run;
          read_contracted<Whole, Descriptor.transpose_left>(left, result_layout::row(block, h), m,
                                                           first + 2 * Width * metal::msl_member(), run);
#pragma clang loop unroll(full)
          for (int i = 0; i < Width; ++i) pairs[block][i][h] = metal::msl_pair_of<Unit, Split>(run, i);
        }
      }
  }

  // Neighbours along the contraction, from `from` on, of row `line` of an operand: of its column if it is `Turned`.
  template <bool Whole, bool Turned, class Tensor, class T, int Count>
  static MSL_INLINE void read_contracted(thread const Tensor &tensor, int line, int lines, int from,
                                         thread metal::msl_run<T, Count> &run) {
    const long stride = tensor.get_stride(1);
    if constexpr (Turned) {
      const int end = is_dynamic ? tensor.get_extent(1) : msl_least(k, tensor.get_extent(1));
      run.clear();
      if (line < msl_least(lines, tensor.get_extent(0)))
        run.read(tensor.msl_data() + (from * stride + line), stride, end - from);
    } else if constexpr (Whole) {
      run.read(tensor.msl_data() + (line * stride + from));
    } else {
      const int end = is_dynamic ? tensor.get_extent(0) : msl_least(k, tensor.get_extent(0));
      run.clear();
      if (line < msl_least(lines, tensor.get_extent(1)))
        run.read(tensor.msl_data() + (line * stride + from), 1, end - from);
    }
  }

  // Adds what the columns first .. first + 8 Width of left contribute.
  template <int Width, bool Whole, class Left, class Right>
  static MSL_INLINE void add_chunk(thread const Left &left, thread const Right &right, int first,
                                   thread float (&sums)[blocks][tiles][4]) {
    using left_scalar = typename Left::value_type;
    using right_scalar = typename Right::value_type;
    constexpr metal::msl_unit unit = metal::msl_unit_of<left_scalar, right_scalar>;
    constexpr bool split_left = is_split<left_scalar>, split_right = is_split<right_scalar>;
    metal::msl_pair<unit, split_left> rows[blocks][Width][2];
    read_left<Width, Whole>(left, first, rows);
    const auto multiply = [&](int tile, thread const metal::msl_pair<unit, split_right> (&columns)[Width]) {
#pragma clang loop unroll(full)
      for (int block = 0; block < blocks; ++block)
        metal::msl_multiply_tiles<unit, split_left, split_right>(sums[block][tile], rows[block], columns);
    };
    metal::msl_pair<unit, split_right> columns[Width];
    if constexpr (msl_is_cooperative<Right>) {
#pragma clang loop unroll(full)
      for (int tile = 0; tile < tiles; ++tile) {
#pragma clang loop unroll(full)
        for (int i = 0; i < Width; ++i) {
          const int at = 2 * (tile * tiles_k + first / 8 + i);
          columns[i] = metal::msl_make_pair<unit, split_right>(right.m_elements[at], right.m_elements[at + 1]);
        }
        multiply(tile, columns);
      }
    } else if constexpr (Descriptor.transpose_right) {
#pragma clang loop unroll(full)
      for (int tile = 0; tile < tiles; ++tile) {
        metal::msl_run<right_scalar, 2 * Width> run;
        read_contracted<Whole, false>(right, result_layout::column(tile, metal::msl_group()), n,
                                      first + 2 * Width * metal::msl_member(), run);
#pragma clang loop unroll(full)
        for (int i = 0; i < Width; ++i) columns[i] = metal::msl_pair_of<unit, split_right>(run, i);
        multiply(tile, columns);
      }
    } else {
      metal::msl_for_chunks<tiles, map::widest>([&](auto width, int tile) {
        constexpr int together = decltype(width)::value;
        metal::msl_run<right_scalar, together> runs[2 * Width];
        const int column = result_layout::first_column() + 8 * tile + together * metal::msl_group();
#pragma clang loop unroll(full)
        for (int i = 0; i < 2 * Width; ++i)
          read_row<Whole>(right, first + 2 * Width * metal::msl_member() + i, column, runs[i]);
#pragma clang loop unroll(full)
        for (int j = 0; j < together; ++j) {
#pragma clang loop unroll(full)
          for (int i = 0; i < Width; ++i)
            columns[i] = metal::msl_pair_of<unit, split_right>(runs[2 * i], runs[2 * i + 1], j);
          multiply(tile + j, columns);
        }
      });
    }
  }

  // Neighbouring columns of a row of a right operand.
  template <bool Whole, class Tensor, class T, int Count>
  static MSL_INLINE void read_row(thread const Tensor &tensor, int row, int column, thread metal::msl_run<T, Count> &run) {
    const auto from = tensor.msl_data() + (row * (long)tensor.get_stride(1) + column);
    if constexpr (Whole) {
      run.read(from);
    } else {
      run.clear();
      const int end = is_dynamic ? tensor.get_extent(1) : msl_least(k, tensor.get_extent(1));
      if (row < end) run.read(from, 1, msl_least(n, tensor.get_extent(0)) - column);
    }
  }

  // Whether everything that the contraction reads can be read in whole runs.
  template <class Left, class Right> static MSL_INLINE bool is_whole(thread const Left &left, thread const Right &right) {
    bool whole = result_layout::exact;
    constexpr int run = is_dynamic ? 8 : msl_contracted_run(tiles_k);
    if constexpr (!msl_is_cooperative<Left>) whole &= msl_is_whole<run>(left, k, m);
    if constexpr (!msl_is_cooperative<Right> && Descriptor.transpose_right) whole &= msl_is_whole<run>(right, k, n);
    if constexpr (!msl_is_cooperative<Right> && !Descriptor.transpose_right)
      whole &= msl_is_whole<msl_column_run(tiles)>(right, n, k);
    return whole;
  }

  template <bool Whole, class Left, class Right>
  static MSL_INLINE void add(thread const Left &left, thread const Right &right, thread float (&sums)[blocks][tiles][4]) {
    if constexpr (is_dynamic) {
      static_assert(!msl_is_cooperative<Left> && !msl_is_cooperative<Right>);
      const int end = left.get_extent(Descriptor.transpose_left ? 1 : 0);
      int first = 0;
      for (; first + 32 <= end; first += 32) add_chunk<4, Whole>(left, right, first, sums);
      if (first < end) add_chunk<4, false>(left, right, first, sums);
    } else {
      metal::msl_for_chunks<tiles_k, metal::msl_paired::widest>([&](auto width, int tile) {
        add_chunk<decltype(width)::value, Whole>(left, right, 8 * tile, sums);
      });
    }
  }

  // sums += left right
  template <class Left, class Right>
  static MSL_INLINE void add(thread const Left &left, thread const Right &right, thread float (&sums)[blocks][tiles][4]) {
    if (__builtin_expect(is_whole(left, right), true)) add<true>(left, right, sums);
    else add<false>(left, right, sums);
  }

  // Calls f(block, h, width, tile, column): the columns that a lane has of a chunk of tiles from `tile` on, side by side.
  template <class F> static MSL_INLINE void for_runs(F f) {
    metal::msl_for_chunks<tiles, map::widest>([&](auto width, int tile) {
      const int column =
          result_layout::first_column() + 8 * tile + 2 * decltype(width)::value * metal::msl_member();
#pragma clang loop unroll(full)
      for (int block = 0; block < blocks; ++block)
#pragma clang loop unroll(full)
        for (int h = 0; h < 2; ++h) f(block, h, width, tile, column);
    });
  }

  template <class Tensor>
  static MSL_INLINE void write(thread const Tensor &result, thread float (&sums)[blocks][tiles][4]) {
    using scalar = typename Tensor::value_type;
    constexpr bool accumulates = Descriptor.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate;
    const bool whole = result_layout::exact && msl_is_whole<8>(result, n, m);
    for_runs([&](int block, int h, auto width, int tile, int column) {
      constexpr int together = decltype(width)::value;
      const int row = result_layout::row(block, h);
      if (row >= msl_least(m, result.get_extent(1))) return;
      const auto at = result.msl_data() + (row * (long)result.get_stride(1) + column);
      const int end = msl_least(n, result.get_extent(0)) - column;
      metal::msl_run<scalar, 2 * together> run;
      if constexpr (accumulates) run.read(at, 1, end);
      metal::msl_run<scalar, 2 * together> sum;
      sum.clear();
#pragma clang loop unroll(full)
      for (int j = 0; j < together; ++j)
        for (int e = 0; e < 2; ++e) {
          const int i = map::element(j, e, together);
          sum.set(i, (scalar)(sums[block][tile + j][2 * h + e] + (accumulates ? (float)run.get(i) : 0.0f)));
        }
      if (whole) sum.write(at);
      else sum.write(at, end);
    });
  }
};

template <matmul2d_descriptor Descriptor, class Scope, class... Args> class matmul2d {
  using product = msl_product<Descriptor, Scope>;
  static constexpr int m = Descriptor.m, n = Descriptor.n, k = product::k;

public:
  static constexpr matmul2d_descriptor descriptor = Descriptor;
  using scope = Scope;

  template <class L, class R, class D, class Coordinate = int>
  using cooperative_tensor_left_input_t = cooperative_tensor<L, extents<Coordinate, k, m>, typename product::left_layout>;
  template <class L, class R, class D, class Coordinate = int>
  using cooperative_tensor_right_input_t =
      cooperative_tensor<R, extents<Coordinate, Descriptor.transpose_right ? k : n, Descriptor.transpose_right ? n : k>,
                         typename product::right_layout>;
  template <class Left, class Right, class D, class Coordinate = int>
  using cooperative_tensor_destination_t = cooperative_tensor<D, extents<Coordinate, n, m>, typename product::result_layout>;
  template <class Left, class Right, class D, class Coordinate = int>
  using cooperative_tensor_row_reduction_destination_t =
      cooperative_tensor<D, extents<Coordinate, m>, metal::msl_rows_layout<typename product::result_layout>>;
  template <class Left, class Right, class D, class Coordinate = int>
  using cooperative_tensor_column_reduction_destination_t =
      cooperative_tensor<D, extents<Coordinate, n>, metal::msl_columns_layout<typename product::result_layout>>;

  template <class L, class R, class D, class Coordinate = int>
  MSL_INLINE cooperative_tensor_left_input_t<L, R, D, Coordinate> get_left_input_cooperative_tensor() const {
    msl_require_input<Descriptor, Scope>();
    return {};
  }
  // The result of another product as it lies.
  template <class L, class R, class D, class Coordinate = int, class E, class Extents, class Layout>
  MSL_INLINE cooperative_tensor_left_input_t<L, R, D, Coordinate>
  get_left_input_cooperative_tensor(thread const cooperative_tensor<E, Extents, Layout> &source) const {
    msl_require_input<Descriptor, Scope>();
    static_assert(metal::is_same_v<E, L>, "the source's elements have another type than the left input's");
    static_assert(metal::is_same_v<Layout, typename product::left_layout>,
                  "only the result of a product of this size whose right operand is transposed becomes a left input here");
    cooperative_tensor_left_input_t<L, R, D, Coordinate> result;
#pragma clang loop unroll(full)
    for (int i = 0; i < Layout::capacity; ++i) result.m_elements[i] = source.m_elements[i];
    return result;
  }
  template <class L, class R, class D, class E, class Extents, class Layout>
  MSL_INLINE bool is_compatible_as_left_input(thread const cooperative_tensor<E, Extents, Layout> &) const {
    return metal::is_same_v<E, L> && metal::is_same_v<Layout, typename product::left_layout>;
  }
  template <class L, class R, class D, class Coordinate = int>
  MSL_INLINE cooperative_tensor_right_input_t<L, R, D, Coordinate> get_right_input_cooperative_tensor() const {
    msl_require_input<Descriptor, Scope>();
    return {};
  }
  template <class Left, class Right, class D, class Coordinate = int>
  MSL_INLINE cooperative_tensor_destination_t<Left, Right, D, Coordinate> get_destination_cooperative_tensor() const {
    return {};
  }
  template <class Left, class Right, class D, class Coordinate = int>
  MSL_INLINE cooperative_tensor_row_reduction_destination_t<Left, Right, D, Coordinate>
  get_row_reduction_destination_cooperative_tensor() const {
    static_assert(Scope::msl_simdgroups == 1, "reductions require a single simdgroup");
    return {};
  }
  template <class Left, class Right, class D, class Coordinate = int>
  MSL_INLINE cooperative_tensor_column_reduction_destination_t<Left, Right, D, Coordinate>
  get_column_reduction_destination_cooperative_tensor() const {
    static_assert(Scope::msl_simdgroups == 1, "reductions require a single simdgroup");
    return {};
  }

  template <class Left, class Right, class Result>
  MSL_INLINE void run(thread Left &left, thread Right &right, thread Result &result) const {
    msl_require_types<typename Left::value_type, typename Right::value_type, typename Result::value_type,
                      msl_is_cooperative<Left> || msl_is_cooperative<Right>>();
    msl_require_tile<Descriptor, Scope>();
    float sums[product::blocks][product::tiles][4];
    constexpr bool accumulates =
        msl_is_cooperative<Result> && Descriptor.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate;
    for_elements([&](int i, thread float &sum) {
      if constexpr (accumulates) sum = (float)result.m_elements[i];
      else sum = 0.0f;
    }, sums);
    product::add(left, right, sums);
    if constexpr (msl_is_cooperative<Result>)
      for_elements([&](int i, thread float &sum) { result.m_elements[i] = (typename Result::value_type)sum; }, sums);
    else product::write(result, sums);
  }

private:
  template <class F>
  static MSL_INLINE void for_elements(F f, thread float (&sums)[product::blocks][product::tiles][4]) {
#pragma clang loop unroll(full)
    for (int i = 0; i < 4 * product::blocks * product::tiles; ++i)
      f(i, sums[i / 4 / product::tiles][i / 4 % product::tiles][i % 4]);
  }
};

// The elements of a row, or of a column, in the order of their positions in a lane, then across the lanes that share it.
template <class Element, class Source, class Target>
MSL_INLINE void msl_reduce(thread const Source &source, thread Target &target, reduction_operation operation,
                           Element identity, uint across_lanes) {
  const auto combine = [=](float a, float b) {
    if (operation == reduction_operation::sum) return a + b;
    return operation == reduction_operation::max ? metal::max(a, b) : metal::min(a, b);
  };
  float results[Target::layout::capacity];
#pragma clang loop unroll(full)
  for (int i = 0; i < Target::layout::capacity; ++i)
    results[i] = operation == reduction_operation::sum ? 0.0f : (float)identity;
#pragma clang loop unroll(full)
  for (int i = 0; i < Source::layout::capacity; ++i)
    if (Source::layout::valid(i)) {
      thread float &result = results[Target::layout::of(i)];
      result = combine(result, (float)source.m_elements[i]);
    }
#pragma clang loop unroll(full)
  for (int i = 0; i < Target::layout::capacity; ++i) {
#pragma clang loop unroll(full)
    for (uint mask = 1; mask < 32; mask *= 2)
      if ((across_lanes & mask) != 0)
        results[i] = combine(results[i], metal::simd_shuffle_xor(results[i], (ushort)metal::msl_lane_of_hardware(mask)));
    target.m_elements[i] = (Element)(operation == reduction_operation::sum ? results[i] + (float)identity : results[i]);
  }
}
template <class Element, class X, class Layout, class TargetX, class TargetLayout>
MSL_INLINE void reduce_rows(thread cooperative_tensor<Element, X, Layout> &source,
                            thread cooperative_tensor<Element, TargetX, TargetLayout> &target,
                            reduction_operation operation = reduction_operation::sum,
                            Element identity = reduction_operation_identity<Element>::sum_identity) {
  msl_reduce(source, target, operation, identity, 3);
}
template <class Element, class X, class Layout, class TargetX, class TargetLayout>
MSL_INLINE void reduce_columns(thread cooperative_tensor<Element, X, Layout> &source,
                               thread cooperative_tensor<Element, TargetX, TargetLayout> &target,
                               reduction_operation operation = reduction_operation::sum,
                               Element identity = reduction_operation_identity<Element>::sum_identity) {
  msl_reduce(source, target, operation, identity, 28);
}
template <class Source, class Target>
MSL_INLINE bool is_iterator_compatible(thread const Source &, thread const Target &) {
  return true;
}
} // namespace tensor_ops
} // namespace mpp
