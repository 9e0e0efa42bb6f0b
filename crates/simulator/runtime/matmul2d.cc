// matmul2d and what else the lanes of a scope do with cooperative tensors. The last thread to come works for all.
//
// The model of a product: fp32, fused, in the order of the inner index, starting from the destination's value where it
// accumulates; rounded once. Float operands keep 11 significant bits under relaxed precision, the rest is cut off
// (tf32; the error that mlx#3897 reports for an M5 fits no better one).
//
// Beyond the extents of a tensor: Apple's header promises zeros; kernels that work on Macs rely on it (xwen) and say
// that they cannot (mtlflashattn 0.2.0, for a static k). So nothing there may be trusted: it reads as NaN, unless the
// launch asks for zeros. Only beyond a dynamic k it is always 0, as both agree.

static float read_element(const void *from, unsigned kind, unsigned long i) {
  if (kind == MSL_FLOAT) return ((const float *)from)[i];
  if (kind == MSL_HALF) return (float)((const _Float16 *)from)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static void write_element(void *to, unsigned kind, unsigned long i, float value) {
  if (kind == MSL_FLOAT) {
    ((float *)to)[i] = value;
  } else if (kind == MSL_HALF) {
    ((_Float16 *)to)[i] = (_Float16)value;
  } else {
    value = rounded(value, MSL_BFLOAT);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
  }
}
static unsigned long bytes_of(unsigned element_kind) { return element_kind == MSL_FLOAT ? 4 : 2; }

static void cut_to_tf32(float *values, unsigned long count) {
  for (unsigned long i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, &values[i], 4);
    bits &= 0xffffe000;
    memcpy(&values[i], &bits, 4);
  }
}

// Every lane names the same memory.
static void require_same_memory(const Scope &scope, const msl_tensor_operand &first, const msl_tensor_operand &other,
                                const char *what) {
  bool equal = first.elements == other.elements && memcmp(first.extent, other.extent, sizeof first.extent) == 0 &&
               memcmp(first.stride, other.stride, sizeof first.stride) == 0;
  if (first.layout || equal) return;
  fail(scope.line, 0, "the %s of matmul2d differs between the threads of its scope", what);
}

// The tile's part of an operand, row after row of the product: at[row * width + column].
struct Tile2d {
  unsigned rows, columns;     // as the product sees them
  bool transposed;            // in memory and in a cooperative tensor's coordinates
  float outside_rows, outside_columns;
};

// Of an element that is outside in both directions.
static float worse(float first, float second) { return first != first ? first : second; }

static unsigned smaller(long extent, unsigned size) { return extent < (long)size ? (unsigned)extent : size; }

template <class T> static void read_row(const void *from, unsigned count, float *to, unsigned step) {
  for (unsigned i = 0; i < count; ++i) to[i * step] = (float)((const T *)from)[i];
}

static void read_memory(const Scope &scope, const msl_tensor_operand &operand, const Tile2d &tile, float *to,
                        bool overwrites = false) {
  unsigned outer_size = tile.transposed ? tile.columns : tile.rows;
  unsigned inner_size = tile.transposed ? tile.rows : tile.columns;
  unsigned outer_count = smaller(operand.extent[1], outer_size), inner_count = smaller(operand.extent[0], inner_size);
  unsigned outer_step = tile.transposed ? 1 : tile.columns, inner_step = tile.transposed ? tile.columns : 1;
  float outside_outer = tile.transposed ? tile.outside_columns : tile.outside_rows;
  float outside_inner = tile.transposed ? tile.outside_rows : tile.outside_columns;
  unsigned long bytes = bytes_of(operand.element_kind);
  auto read = operand.element_kind == MSL_FLOAT  ? read_row<float>
              : operand.element_kind == MSL_HALF ? read_row<_Float16>
                                                 : read_row<__bf16>;
  for (unsigned outer = 0; outer < outer_size; ++outer) {
    float *row_to = to + outer * outer_step;
    unsigned count = outer < outer_count ? inner_count : 0;
    char *row = (char *)operand.elements + (long)outer * operand.stride[1] * (long)bytes;
    if (count) collective_access(scope, row, count * bytes, false, !overwrites);
    read(row, count, row_to, inner_step);
    for (unsigned inner = count; inner < inner_size; ++inner)
      row_to[inner * inner_step] = outer < outer_count   ? outside_inner
                                   : inner < inner_count ? outside_outer
                                                         : worse(outside_inner, outside_outer);
  }
}

template <class Operand>
static void read_lanes(const Scope &scope, Operand operand_of, const Tile2d &tile, float *to) {
  for (unsigned thread = 0; thread < scope.threads(); ++thread) {
    const msl_tensor_operand &operand = operand_of(scope.slot(thread));
    const msl_layout &layout = *operand.layout;
    for (unsigned slot = 0; slot < layout.capacity; ++slot) {
      int at = layout.coordinates[thread * layout.capacity + slot];
      if (at < 0) continue;
      unsigned outer = (unsigned)at >> 16, inner = (unsigned)at & 0xffff;
      to[tile.transposed ? inner * tile.columns + outer : outer * tile.columns + inner] =
          read_element(operand.elements, operand.element_kind, slot);
    }
  }
}

// What nobody owns is poison again, whatever the kernel had put there.
template <class Operand>
static void write_lanes(const Scope &scope, Operand operand_of, unsigned columns, const float *from) {
  for (unsigned thread = 0; thread < scope.threads(); ++thread) {
    const msl_tensor_operand &operand = operand_of(scope.slot(thread));
    const msl_layout &layout = *operand.layout;
    for (unsigned slot = 0; slot < layout.capacity; ++slot) {
      int at = layout.coordinates[thread * layout.capacity + slot];
      float value = at < 0 ? __builtin_nanf("") : from[((unsigned)at >> 16) * columns + ((unsigned)at & 0xffff)];
      write_element(operand.elements, operand.element_kind, slot, value);
    }
  }
}

static void write_memory(const Scope &scope, const msl_tensor_operand &operand, unsigned rows, unsigned columns,
                         const float *from) {
  unsigned outer_count = smaller(operand.extent[1], rows), inner_count = smaller(operand.extent[0], columns);
  unsigned long bytes = bytes_of(operand.element_kind);
  for (unsigned outer = 0; outer < outer_count; ++outer) {
    char *row = (char *)operand.elements + (long)outer * operand.stride[1] * (long)bytes;
    collective_access(scope, row, inner_count * bytes, true, true);
    for (unsigned inner = 0; inner < inner_count; ++inner)
      write_element(row, operand.element_kind, inner, from[outer * columns + inner]);
  }
}

static float *scratch(Context &context, unsigned long floats) {
  if (context.scratch_floats < floats) {
    free(context.scratch);
    context.scratch_floats = floats * 2;
    context.scratch = (float *)aligned_alloc(32, (context.scratch_floats * sizeof(float) + 31) / 32 * 32);
  }
  return context.scratch;
}

// c += a b, with rows and columns multiples of 8: tiles of 8x8, each sum in the order of k.
static void multiply_add(const float *a, const float *b, float *c, unsigned rows, unsigned columns, unsigned inner) {
  for (unsigned row = 0; row < rows; row += 8)
    for (unsigned column = 0; column < columns; column += 8) {
      Row sums[8];
      for (unsigned i = 0; i < 8; ++i) sums[i] = *(const Row *)(c + (row + i) * columns + column);
      for (unsigned k = 0; k < inner; ++k) {
        const Row right = *(const Row *)(b + k * columns + column);
#pragma clang loop unroll(full)
        for (unsigned i = 0; i < 8; ++i)
          sums[i] = __builtin_elementwise_fma((Row)a[(row + i) * inner + k], right, sums[i]);
      }
      for (unsigned i = 0; i < 8; ++i) *(Row *)(c + (row + i) * columns + column) = sums[i];
    }
}

static long extent_of_k(const msl_tensor_operand &operand, bool k_is_inner) {
  return operand.extent[k_is_inner ? 0 : 1];
}

static unsigned inner_size(const msl_matmul2d_call &call) {
  if (call.k >= 0) return (unsigned)call.k;
  long left = extent_of_k(call.left, !call.transpose_left), right = extent_of_k(call.right, call.transpose_right);
  return (unsigned)(left < right ? right : left);
}

static const msl_tensor_operand &left_of(const void *slot) { return ((const msl_matmul2d_call *)slot)->left; }
static const msl_tensor_operand &right_of(const void *slot) { return ((const msl_matmul2d_call *)slot)->right; }
static const msl_tensor_operand &destination_of(const void *slot) {
  return ((const msl_matmul2d_call *)slot)->destination;
}

static void require_same_operands(const Scope &scope) {
  const void *first = scope.slot(0);
  for (unsigned thread = 1; thread < scope.threads(); ++thread) {
    const void *other = scope.slot(thread);
    require_same_memory(scope, left_of(first), left_of(other), "left operand");
    require_same_memory(scope, right_of(first), right_of(other), "right operand");
    require_same_memory(scope, destination_of(first), destination_of(other), "destination");
  }
}

template <class Operand>
static void read_input(const Scope &scope, Operand operand_of, const Tile2d &tile, bool relaxed, float *to) {
  const msl_tensor_operand &operand = operand_of(scope.slot(0));
  if (operand.layout) read_lanes(scope, operand_of, tile, to);
  else read_memory(scope, operand, tile, to);
  if (relaxed && operand.element_kind == MSL_FLOAT) cut_to_tf32(to, (unsigned long)tile.rows * tile.columns);
}

static void execute_matmul2d(const Scope &scope) {
  require_same_operands(scope);
  Context &context = scope.context;
  const msl_matmul2d_call &call = *(const msl_matmul2d_call *)scope.slot(0);
  const msl_tensor_operand &destination = call.destination;
  unsigned m = (unsigned)call.m, n = (unsigned)call.n, k = inner_size(call);
  unsigned long a_size = (m * (unsigned long)k + 7) / 8 * 8, b_size = (unsigned long)k * n; // the parts stay aligned
  float *a = scratch(context, a_size + b_size + m * n), *b = a + a_size, *c = b + b_size;
  float outside = msl_tensor_outside(), outside_k = call.k < 0 ? 0.0f : outside;
  Tile2d c_tile{m, n, false, outside, outside};
  read_input(scope, left_of, {m, k, call.transpose_left != 0, outside, outside_k}, call.relaxed, a);
  read_input(scope, right_of, {k, n, call.transpose_right != 0, outside_k, outside}, call.relaxed, b);
  bool accumulates = call.accumulate || (!destination.layout && context.launch->tensor_destination_accumulates);
  if (!accumulates) memset(c, 0, m * n * sizeof(float));
  else if (destination.layout) read_lanes(scope, destination_of, c_tile, c);
  else read_memory(scope, destination, c_tile, c, true);
  multiply_add(a, b, c, m, n, k);
  if (destination.layout) write_lanes(scope, destination_of, n, c);
  else write_memory(scope, destination, m, n, c);
  context.launch->counters.tensor_operations++;
  context.launch->counters.tensor_multiply_adds += (unsigned long)m * n * k;
}

static void execute_reduction(const Scope &scope) {
  const msl_reduction_call &call = *(const msl_reduction_call *)scope.slot(0);
  const msl_layout &from = *call.source.layout, &to = *call.destination.layout;
  unsigned count = call.by_column ? to.shape.inner : to.shape.outer, kind = call.source.element_kind;
  float *total = scratch(scope.context, count);
  for (unsigned i = 0; i < count; ++i) total[i] = call.identity;
  for (unsigned thread = 0; thread < 32; ++thread) {
    const msl_reduction_call &mine = *(const msl_reduction_call *)scope.slot(thread);
    if (mine.operation != call.operation || memcmp(&mine.identity, &call.identity, sizeof(float)) != 0)
      fail(scope.line, 0, "the arguments of a reduction differ between the lanes of a simdgroup");
    for (unsigned slot = 0; slot < from.capacity; ++slot) {
      int at = along(to, from.coordinates[thread * from.capacity + slot]);
      if (at < 0) continue;
      float value = read_element(mine.source.elements, kind, slot), &sum = total[at];
      // 0 adds, 1 takes the larger, 2 the smaller; NaN stays.
      if (call.operation == 0) sum = kind == MSL_FLOAT ? sum + value : rounded(sum + value, kind);
      else if (value != value || (call.operation == 1 ? sum < value : value < sum)) sum = value;
    }
  }
  for (unsigned thread = 0; thread < 32; ++thread) {
    const msl_tensor_operand &destination = ((const msl_reduction_call *)scope.slot(thread))->destination;
    for (unsigned slot = 0; slot < to.capacity; ++slot) {
      int at = to.coordinates[thread * to.capacity + slot];
      write_element(destination.elements, kind, slot, at < 0 ? __builtin_nanf("") : total[at]);
    }
  }
}

struct Conversion {
  const msl_tensor_operand *source, *destination;
};
static void execute_conversion(const Scope &scope) {
  auto source = [](const void *slot) -> const msl_tensor_operand & { return *((const Conversion *)slot)->source; };
  auto destination = [](const void *slot) -> const msl_tensor_operand & {
    return *((const Conversion *)slot)->destination;
  };
  const msl_tensor_shape &shape = source(scope.slot(0)).layout->shape;
  float *values = scratch(scope.context, shape.outer * shape.inner);
  read_lanes(scope, source, {shape.outer, shape.inner, false, 0, 0}, values);
  write_lanes(scope, destination, shape.inner, values);
}

static void execute_transfer(const Scope &scope) {
  const msl_tensor_operand &first = *(const msl_tensor_operand *)scope.slot(0);
  for (unsigned thread = 1; thread < scope.threads(); ++thread)
    require_same_memory(scope, first, *(const msl_tensor_operand *)scope.slot(thread), "tensor");
}

// Lane 0 keeps count of the values that live.
static void note_lives(const msl_tensor_operand &used, const msl_tensor_operand &also_used,
                       const msl_tensor_operand &destination, bool keeps_destination) {
#if MSL_CHECK_LAYER
  Lane &lane = *current_lane();
  if (lane.lane != 0) return;
  if (used.life) use_life(*used.life, lane.passed, lane.passed);
  if (also_used.life) use_life(*also_used.life, lane.passed, lane.passed);
  if (!destination.life) return;
  if (keeps_destination) use_life(*destination.life, lane.passed, lane.passed);
  else msl_life_define(destination.life);
#else
  (void)used, (void)also_used, (void)destination, (void)keeps_destination;
#endif
}

extern "C" {
float msl_tensor_outside() { return current_lane()->context->launch->tensor_zero_outside ? 0.0f : __builtin_nanf(""); }

void msl_matmul2d(const msl_matmul2d_call *mine, int line) {
  note_lives(mine->left, mine->right, mine->destination, mine->accumulate);
  collective(mine->simdgroups, "matmul2d", line, mine, execute_matmul2d);
}
void msl_tensor_reduce(const msl_reduction_call *mine, int line) {
  note_lives(mine->source, mine->source, mine->destination, false);
  collective(1, mine->by_column ? "reduce_columns" : "reduce_rows", line, mine, execute_reduction);
}
void msl_tensor_convert(const msl_tensor_operand *source, const msl_tensor_operand *destination, int line) {
  Conversion mine{source, destination};
  // The source's last use was before: the copy may take its place.
  if (current_lane()->lane == 0) {
    msl_life_touch(source->life);
    msl_life_define(destination->life);
  }
  collective(1, "get_left_input_cooperative_tensor", line, &mine, execute_conversion);
}
void msl_tensor_transfer(const char *name, const msl_tensor_operand *memory, unsigned simdgroups, int line) {
  collective(simdgroups, name, line, memory, execute_transfer);
}
}
