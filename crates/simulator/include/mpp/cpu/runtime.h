// What the tensor headers ask of the runtime: plain C types, as in msl/runtime.h.
#pragma once

#include "../../msl/runtime.h"

extern "C" {

// What the elements of a cooperative tensor are, by the outer and the inner dimension of its coordinates: left (m, k)
// or (k, m) if transposed, right (k, n) or (n, k), destination (m, n). A reduction has one element for each row or
// column of a destination that the lane has a part of.
enum msl_tensor_role : unsigned { MSL_LEFT, MSL_RIGHT, MSL_DESTINATION, MSL_ROW_REDUCTION, MSL_COLUMN_REDUCTION };

struct msl_tensor_shape {
  msl_tensor_role role;
  unsigned outer, inner, simdgroups;
};

// Who has which element. Coordinates are outer << 16 | inner, -1 for an element that nobody has; a reduction's are
// rows or columns.
struct msl_layout {
  msl_tensor_shape shape;
  unsigned capacity;
  int *coordinates; // of every thread of the scope, capacity each
};

// How lanes share the elements; see runtime/layout.cc.
enum msl_lane_layout : unsigned { MSL_CONTIGUOUS_QUADS, MSL_SPLIT_PAIRS, MSL_SHUFFLED, MSL_SCATTERED };

// The life of the values of one cooperative tensor, for the count of live registers.
struct msl_life {
  unsigned halves, live, born, last_use;
};

// One operand of this lane.
struct msl_tensor_operand {
  unsigned element_kind;
  const msl_layout *layout; // of a cooperative tensor; null: memory
  void *elements;           // the lane's own, or the memory
  msl_life *life;
  long extent[2], stride[2];
};

struct msl_matmul2d_call {
  int m, n, k; // k: negative if dynamic
  unsigned transpose_left, transpose_right, relaxed, accumulate, simdgroups;
  msl_tensor_operand left, right, destination;
};

// dst = operation over the rows (or columns) of src, and identity.
struct msl_reduction_call {
  unsigned operation, by_column;
  float identity;
  msl_tensor_operand source, destination;
};

const msl_layout *msl_tensor_layout(const msl_tensor_shape *shape);
// Fills elements with what uninitialised memory holds.
void msl_tensor_poison(void *elements, unsigned long bytes);
// The coordinates of a slot of this lane.
int msl_tensor_coordinates(const msl_layout *layout, unsigned slot);
// The slot of a reduction that holds the row or column of a slot of `from`; the capacity if the slot is nobody's.
unsigned msl_tensor_map(const msl_layout *from, unsigned slot, const msl_layout *to);
// Whether every lane finds all its elements of `from` in `to`.
bool msl_tensor_maps(const msl_layout *from, const msl_layout *to);
[[noreturn]] void msl_tensor_index_fails(unsigned slot, unsigned capacity);

void msl_matmul2d(const msl_matmul2d_call *mine, int line);
void msl_tensor_reduce(const msl_reduction_call *mine, int line);
void msl_tensor_convert(const msl_tensor_operand *source, const msl_tensor_operand *destination, int line);
// What is read beyond the extents of a tensor, as a number.
float msl_tensor_outside();
// All lanes load from or store to one tensor.
void msl_tensor_transfer(const char *name, const msl_tensor_operand *memory, unsigned simdgroups, int line);

// An element is touched between two operations; the tensor ends.
void msl_life_touch(msl_life *life);
void msl_life_define(msl_life *life);
void msl_life_end(msl_life *life);
}
