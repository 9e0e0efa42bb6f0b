// Vectors (specification, chapter 2.2): clang's ext_vector_type has the component names, swizzles and operators.
// Two things differ from MSL, and the driver rewrites both: a constructor of several parts, T(a, b, ..), becomes
// msl_make<T>(a, b, ..), and a cast, (T)x, becomes msl_cast<T>{} ->* x. Plain clang knows no such constructor, and
// its cast between vectors of one size keeps the bits where MSL converts the values.
#pragma once

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

#define MSL_VECTORS(T)                                                                                                 \
  typedef vec<T, 2> T##2;                                                                                              \
  typedef vec<T, 3> T##3;                                                                                              \
  typedef vec<T, 4> T##4;
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)

// A comparison of vectors gives -1 or 0 per component here; MSL's bool vectors take that as true or false.
template <int N> struct msl_bool_vector {
  bool components[N];
  msl_bool_vector() = default;
  MSL_INLINE constexpr msl_bool_vector(bool all) : components{} {
    for (int i = 0; i < N; ++i) components[i] = all;
  }
  template <class T> MSL_INLINE constexpr msl_bool_vector(vec<T, N> mask) : components{} {
    for (int i = 0; i < N; ++i) components[i] = mask[i] != 0;
  }
  MSL_INLINE constexpr bool &operator[](int i) { return components[i]; }
  MSL_INLINE constexpr bool operator[](int i) const { return components[i]; }
#define MSL_COMPONENT(name, index)                                                                                     \
  __declspec(property(get = get_##name, put = put_##name)) bool name;                                                  \
  MSL_INLINE constexpr bool get_##name() const { return components[index]; }                                           \
  MSL_INLINE constexpr void put_##name(bool v) { components[index] = v; }
  MSL_COMPONENT(x, 0)
  MSL_COMPONENT(y, 1)
  MSL_COMPONENT(z, 2)
  MSL_COMPONENT(w, 3)
#define MSL_BOOL_OPERATOR(op)                                                                                          \
  MSL_INLINE friend constexpr msl_bool_vector operator op(msl_bool_vector a, msl_bool_vector b) {                      \
    msl_bool_vector r;                                                                                                 \
    for (int i = 0; i < N; ++i) r[i] = a[i] op b[i];                                                                   \
    return r;                                                                                                          \
  }
  MSL_BOOL_OPERATOR(&)
  MSL_BOOL_OPERATOR(|)
  MSL_BOOL_OPERATOR(^)
  MSL_BOOL_OPERATOR(&&)
  MSL_BOOL_OPERATOR(||)
  MSL_BOOL_OPERATOR(==)
  MSL_BOOL_OPERATOR(!=)
  MSL_INLINE constexpr msl_bool_vector operator!() const { return *this == msl_bool_vector(false); }
};
typedef msl_bool_vector<2> bool2;
typedef msl_bool_vector<3> bool3;
typedef msl_bool_vector<4> bool4;
template <int N> struct msl_shape<msl_bool_vector<N>> {
  using scalar = bool;
  static constexpr int components = N;
};

// Between half and bfloat by way of float, which holds both.
template <class V, class W> constexpr constant bool msl_is_narrow_pair =
    (is_same_v<V, bfloat> && is_same_v<W, half>) || (is_same_v<V, half> && is_same_v<W, bfloat>);
template <class V, class W> MSL_INLINE constexpr V msl_convert_scalar(W value) {
  if constexpr (msl_is_narrow_pair<V, W>) return (V)(float)value;
  else return (V)value;
}

template <class V, class W> MSL_INLINE constexpr V msl_convert(W value) {
  using S = msl_scalar<V>;
  if constexpr (is_same_v<V, W>) {
    return value;
  } else if constexpr (msl_components<V> == 1) {
    return msl_convert_scalar<V>(value);
  } else if constexpr (msl_components<W> == 1) {
    V result{};
    for (int i = 0; i < msl_components<V>; ++i) result[i] = msl_convert_scalar<S>(value);
    return result;
  } else {
    static_assert(msl_components<V> == msl_components<W>, "a vector converts to one of as many components");
    V result{};
    for (int i = 0; i < msl_components<V>; ++i) result[i] = msl_convert_scalar<S>(value[i]);
    return result;
  }
}

template <class V, class W> MSL_INLINE constexpr void msl_append(V &vector, int &count, W part) {
  using S = msl_scalar<V>;
  if constexpr (msl_components<W> == 1) {
    vector[count++] = (S)part;
  } else {
    for (int i = 0; i < msl_components<W>; ++i) vector[count++] = (S)part[i];
  }
}

// Specification 2.2.1: a vector from one scalar (all components) or from parts that have as many components together.
template <class V, class... Parts> MSL_INLINE constexpr V msl_make(Parts... parts) {
  if constexpr (msl_components<V> == 1 && sizeof...(Parts) == 1) {
    return (msl_convert_scalar<V>(parts), ...);
  } else if constexpr (msl_components<V> == 1) {
    return V(parts...);
  } else if constexpr (sizeof...(Parts) == 0) {
    return V{};
  } else if constexpr (sizeof...(Parts) == 1) {
    return msl_convert<V>(parts...);
  } else {
    static_assert((msl_components<Parts> + ... + 0) == msl_components<V>,
                  "vector constructor: wrong number of components");
    V result{};
    int count = 0;
    (msl_append(result, count, parts), ...);
    return result;
  }
}

// Binds its operand as tightly as a cast does, but for a prefix operator before it, where it does not compile.
template <class V> struct msl_cast {};
template <class V, class W> struct msl_cast_twice {};
template <class V, class W> MSL_INLINE constexpr msl_cast_twice<V, W> operator->*(msl_cast<V>, msl_cast<W>) { return {}; }
template <class V, class T> MSL_INLINE constexpr V operator->*(msl_cast<V>, T value) {
  if constexpr (msl_components<V> == 1) return msl_convert_scalar<V>(value);
  else return msl_convert<V>(value);
}
template <class V, class W, class T> MSL_INLINE constexpr V operator->*(msl_cast_twice<V, W>, T value) {
  return msl_cast<V>{} ->* (msl_cast<W>{} ->* value);
}

template <class To, class From> MSL_INLINE constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes must be equal");
  return __builtin_bit_cast(To, value);
}

#define MSL_FOR_VECTORS(V) template <class V, class = enable_if_t<(msl_components<V> > 1)>> MSL_INLINE
} // namespace metal
using metal::msl_cast;
using metal::msl_make;
