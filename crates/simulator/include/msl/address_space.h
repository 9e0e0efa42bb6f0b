// Address spaces (specification, chapter 4). Real ones while the text is checked; the driver drops them from the
// code afterwards, because clang's checks skip pointers that carry one.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel static
// Repeats a template for every address space that a pointer to memory may have.
#define MSL_FOR_MEMORY(M) M(device) M(threadgroup)
#define MSL_FOR_READABLE(M) M(device) M(threadgroup) M(constant)

namespace metal {
// Plain C++ copies objects of the thread's space only; the driver gives structs constructors for the others.
#define MSL_COPY_OBJECT(space)                                                                                         \
  template <class T> MSL_INLINE void msl_copy_object(T *to, space const T *from) {                                     \
    __builtin_memcpy((void *)to, (const void *)from, sizeof(T));                                                       \
  }
MSL_FOR_READABLE(MSL_COPY_OBJECT)
} // namespace metal
