// Sizes of a tensor (specification, chapter 2.21; the shape of C++23's std::extents). Dimension 0 is the fastest.
#pragma once

namespace metal {
constexpr constant size_t dynamic_extent = ~0ul;
// The other way to leave the inner dimension of a matmul2d open (header of MetalPerformancePrimitives).
template <class Index> constexpr constant Index dynamic_length_v = numeric_limits<Index>::max();

template <class Index, size_t... Extents> class extents {
public:
  using index_type = Index;
  using size_type = size_t;
  using rank_type = size_t;

  constexpr extents() : m_values{(Index)Extents...} {
    static_assert(((Extents != dynamic_extent) && ...), "extents: a dynamic extent needs a value");
  }
  template <class... Values>
  constexpr extents(Values... values)
    requires(sizeof...(Values) == sizeof...(Extents) && sizeof...(Values) > 0)
      : m_values{(Index)(Extents == dynamic_extent ? values : (Values)Extents)...} {}

  static constexpr size_t rank() { return sizeof...(Extents); }
  static constexpr size_t static_extent(size_t r) {
    constexpr size_t all[] = {Extents...};
    return all[r];
  }
  constexpr Index extent(size_t r) const { return m_values[r]; }

private:
  Index m_values[sizeof...(Extents)];
};

template <class Index, size_t Rank, size_t... Extents> struct msl_dynamic_extents {
  using type = typename msl_dynamic_extents<Index, Rank - 1, Extents..., dynamic_extent>::type;
};
template <class Index, size_t... Extents> struct msl_dynamic_extents<Index, 0, Extents...> {
  using type = extents<Index, Extents...>;
};
template <class Index, size_t Rank> using dextents = typename msl_dynamic_extents<Index, Rank>::type;
} // namespace metal
