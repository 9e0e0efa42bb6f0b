// The part of <metal_type_traits> that kernels use (specification, chapter 2.21).
#pragma once

namespace metal {
template <class T, T v> struct integral_constant {
  static constexpr constant T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr constant bool is_same_v = is_same<A, B>::value;

template <class T> struct is_const : false_type {};
template <class T> struct is_const<const T> : true_type {};
template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> struct remove_cv { using type = T; };
template <class T> struct remove_cv<const T> { using type = T; };
template <class T> struct remove_cv<volatile T> { using type = T; };
template <class T> struct remove_cv<const volatile T> { using type = T; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T &> { using type = T; };
template <class T> struct remove_reference<T &&> { using type = T; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;

template <class T> struct msl_remove_space { using type = T; };
template <class T> struct msl_remove_space<device T> { using type = T; };
template <class T> struct msl_remove_space<threadgroup T> { using type = T; };
template <class T> struct msl_remove_space<constant T> { using type = T; };
template <class T> using remove_addrspace_t = remove_cv_t<typename msl_remove_space<remove_cv_t<T>>::type>;

template <class T> struct is_integral : false_type {};
template <class T> struct is_floating_point : false_type {};
#define MSL_TRAIT(trait, T) template <> struct trait<T> : true_type {};
MSL_TRAIT(is_integral, bool)
MSL_TRAIT(is_integral, char)
MSL_TRAIT(is_integral, int8_t)
MSL_TRAIT(is_integral, uchar)
MSL_TRAIT(is_integral, short)
MSL_TRAIT(is_integral, ushort)
MSL_TRAIT(is_integral, int)
MSL_TRAIT(is_integral, uint)
MSL_TRAIT(is_integral, long)
MSL_TRAIT(is_integral, ulong)
MSL_TRAIT(is_floating_point, float)
MSL_TRAIT(is_floating_point, half)
MSL_TRAIT(is_floating_point, bfloat)
template <class T> constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T> constexpr constant bool is_floating_point_v = is_floating_point<T>::value;

template <class T> T &&declval();

// Scalar type and number of components of a scalar or a vector.
template <class T> struct msl_shape { using scalar = T; static constexpr int components = 1; };
#define MSL_SHAPE(N)                                                                                                   \
  template <class T> struct msl_shape<T __attribute__((ext_vector_type(N)))> {                                         \
    using scalar = T;                                                                                                  \
    static constexpr int components = N;                                                                               \
  };
MSL_SHAPE(2)
MSL_SHAPE(3)
MSL_SHAPE(4)
template <class T> constexpr constant int msl_components = msl_shape<T>::components;
template <class T> using msl_scalar = typename msl_shape<T>::scalar;
} // namespace metal
