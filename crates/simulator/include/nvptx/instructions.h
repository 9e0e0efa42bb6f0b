// The matrix instructions (PTX ISA, chapter 9.7.14): operands and results as they lie in the registers of a warp.
//
// Hardware lane 4 g + t; "pair" is two 16-bit elements.
//   movmatrix       pair (row g, columns 2 t and 2 t + 1) -> pair (rows 2 t and 2 t + 1, column g)
//   m16n8k8, 16-bit a: pair (row g, columns 2 t, 2 t + 1), then that of row g + 8; b: pair (rows 2 t, 2 t + 1, column g)
//   m16n8k16        a: the same for columns 0 to 7, then for columns 8 to 15; b: rows 0 to 7, then rows 8 to 15
//   m16n8k8, tf32   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g)
//   all             c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1), float
#pragma once

namespace metal {
// They are functions of their operands alone, hence not volatile: equal ones are computed once.
MSL_INLINE uint msl_transposed(uint pair) {
  uint result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

#define MSL_PAIR_PRODUCTS(name, type)                                                                                  \
  MSL_INLINE void name(thread float (&c)[4], uint upper, uint lower, uint b) {                                         \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"      \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                               \
        : "r"(upper), "r"(lower), "r"(b));                                                                             \
  }                                                                                                                    \
  MSL_INLINE void name(thread float (&c)[4], thread const uint (&upper)[2], thread const uint (&lower)[2],             \
                       thread const uint (&b)[2]) {                                                                    \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                         \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                   \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                               \
        : "r"(upper[0]), "r"(lower[0]), "r"(upper[1]), "r"(lower[1]), "r"(b[0]), "r"(b[1]));                           \
  }
MSL_PAIR_PRODUCTS(msl_mma_half, "f16")
MSL_PAIR_PRODUCTS(msl_mma_bfloat, "bf16")

MSL_INLINE void msl_mma_tf32(thread float (&c)[4], thread const uint (&upper)[2], thread const uint (&lower)[2],
                             thread const uint (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(upper[0]), "r"(lower[0]), "r"(upper[1]), "r"(lower[1]), "r"(b[0]), "r"(b[1]));
}
MSL_INLINE uint msl_tf32(float x) {
  uint result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}
// The lower or the upper 16 bits of two words as a pair.
MSL_INLINE uint msl_interleaved(uint first, uint second, bool upper) {
  return __nvvm_prmt(first, second, upper ? 0x7632 : 0x5410);
}
} // namespace metal
