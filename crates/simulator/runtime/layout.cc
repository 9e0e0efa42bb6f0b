// Which lane has which element of a cooperative tensor. Apple says only that a kernel must ask; the layouts here are
//
// contiguous quads: M5, and other GPUs of its class. A 16x16 fragment gives a lane four adjacent columns of two rows
//   that lie 8 apart. Measured by MNN, relied on by MLX (steel/attn/nax.h) and PyTorch (MppAttention.h).
// split pairs: what GPUs before are said to have (sonos/tract#2548): pairs of columns, 8 apart. The exact formula is
//   not public; this one has the lane map of simdgroup_matrix.
// shuffled: contiguous quads after random permutations of lanes, rows, columns and slots. Lanes have the same rows of
//   all tensors with as many rows, as they have in the layouts above.
// scattered: any lane may have any element, and some have none.
//
// A scope of several simdgroups deals out 16x16 fragments among them.

struct Coordinates {
  unsigned outer, inner;
};

static Coordinates place_in_fragment(unsigned layout, unsigned lane, unsigned element) {
  unsigned quad = lane / 4, row = (quad & 4) | (lane / 2 & 3);
  if (layout == MSL_SPLIT_PAIRS) {
    unsigned column = (quad & 2) * 2 + lane % 2 * 2;
    return {row + element / 4 * 8, column + (element & 1) + (element >> 1 & 1) * 8};
  }
  unsigned column = ((quad & 2) | (lane & 1)) * 4;
  return {row + element / 4 * 8, column + (element & 3)};
}

static unsigned long mixed(unsigned long value) { // splitmix64
  value += 0x9e3779b97f4a7c15ul;
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ul;
  value = (value ^ value >> 27) * 0x94d049bb133111ebul;
  return value ^ value >> 31;
}

static void permute(unsigned *values, unsigned count, unsigned long seed) {
  for (unsigned i = count; i > 1; --i) {
    unsigned j = (unsigned)(mixed(seed + i) % i), kept = values[i - 1];
    values[i - 1] = values[j];
    values[j] = kept;
  }
}
static void random_order(unsigned *values, unsigned count, unsigned long seed) {
  for (unsigned i = 0; i < count; ++i) values[i] = i;
  permute(values, count, seed);
}

// A number for what may differ between two tensors.
static unsigned long seed_of(const Context &context, const msl_tensor_shape &shape) {
  unsigned long seed = context.launch->tensor_layout_seed;
  const unsigned parts[] = {shape.role, shape.outer, shape.inner};
  for (unsigned part : parts) seed = mixed(seed ^ mixed(part + 1ul));
  return seed;
}

static void shuffle(const Context &context, msl_layout &layout) {
  const msl_tensor_shape &shape = layout.shape;
  unsigned long common = mixed(context.launch->tensor_layout_seed), own = seed_of(context, shape);
  unsigned lanes[32], rows[16], threads = shape.simdgroups * 32, capacity = layout.capacity;
  random_order(lanes, 32, common + 1000);
  random_order(rows, 16, common + 2000);
  unsigned *columns = (unsigned *)malloc(shape.inner * sizeof(unsigned));
  unsigned *slots = (unsigned *)malloc(capacity * sizeof(unsigned));
  int *shuffled = (int *)malloc(threads * capacity * sizeof(int));
  for (unsigned thread = 0; thread < threads; ++thread) {
    const int *from = layout.coordinates + (thread / 32 * 32 + lanes[thread % 32]) * capacity;
    random_order(slots, capacity, own + 3000 + thread * 1000ul);
    for (unsigned slot = 0; slot < capacity; ++slot) {
      int at = from[slots[slot]];
      if (at >= 0) {
        unsigned outer = (unsigned)at >> 16, inner = (unsigned)at & 0xffff;
        // A block of rows that the tensor does not fill keeps its order.
        if (outer / 16 * 16 + 16 <= shape.outer) outer = outer / 16 * 16 + rows[outer % 16];
        random_order(columns, shape.inner, own + outer * 1000000ul);
        at = (int)(outer << 16 | columns[inner]);
      }
      shuffled[thread * capacity + slot] = at;
    }
  }
  memcpy(layout.coordinates, shuffled, threads * capacity * sizeof(int));
  free(shuffled);
  free(slots);
  free(columns);
}

static void scatter(const Context &context, msl_layout &layout) {
  unsigned places = layout.shape.simdgroups * 32 * layout.capacity, elements = layout.shape.outer * layout.shape.inner;
  unsigned *order = (unsigned *)malloc(places * sizeof(unsigned));
  random_order(order, places, seed_of(context, layout.shape));
  for (unsigned place = 0; place < places; ++place) {
    unsigned element = order[place];
    layout.coordinates[place] =
        element < elements ? (int)(element / layout.shape.inner << 16 | element % layout.shape.inner) : -1;
  }
  free(order);
}

// Of a matrix.
static void share_matrix(const Context &context, msl_layout &layout) {
  const msl_tensor_shape &shape = layout.shape;
  unsigned rows = (shape.outer + 15) / 16, columns = (shape.inner + 15) / 16, kind = context.launch->tensor_layout;
  unsigned of_simdgroup = (rows * columns + shape.simdgroups - 1) / shape.simdgroups, threads = shape.simdgroups * 32;
  layout.capacity = of_simdgroup * 8 + (kind == MSL_SCATTERED ? 3 : 0);
  layout.coordinates = (int *)malloc(threads * layout.capacity * sizeof(int));
  if (kind == MSL_SCATTERED) return scatter(context, layout);
  for (unsigned thread = 0; thread < threads; ++thread)
    for (unsigned slot = 0; slot < layout.capacity; ++slot) {
      unsigned fragment = thread / 32 * of_simdgroup + slot / 8;
      Coordinates at = place_in_fragment(kind, thread % 32, slot % 8);
      at.outer += fragment / columns * 16;
      at.inner += fragment % columns * 16;
      bool is_owned = at.outer < shape.outer && at.inner < shape.inner;
      layout.coordinates[thread * layout.capacity + slot] = is_owned ? (int)(at.outer << 16 | at.inner) : -1;
    }
  if (kind == MSL_SHUFFLED) shuffle(context, layout);
}

static const msl_layout *layout_of(Context &context, const msl_tensor_shape &shape);

// The row or column of an element of a destination.
static int along(const msl_layout &reduction, int at) {
  return at < 0 ? -1 : reduction.shape.role == MSL_ROW_REDUCTION ? at >> 16 : at & 0xffff;
}

static unsigned find_slot(const msl_layout &layout, unsigned thread, int at) {
  for (unsigned slot = 0; slot < layout.capacity; ++slot)
    if (layout.coordinates[thread * layout.capacity + slot] == at) return slot;
  return layout.capacity;
}

// A lane has one element for each row (column) of which it has a part, so that several lanes have the same one.
static void share_reduction(Context &context, msl_layout &layout) {
  const msl_layout &matrix = *layout_of(context, {MSL_DESTINATION, layout.shape.outer, layout.shape.inner, 1});
  int *found = (int *)malloc(32 * matrix.capacity * sizeof(int));
  unsigned count[32] = {}, capacity = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    int *own = found + lane * matrix.capacity;
    for (unsigned slot = 0; slot < matrix.capacity; ++slot) {
      int at = along(layout, matrix.coordinates[lane * matrix.capacity + slot]);
      bool is_new = at >= 0;
      for (unsigned i = 0; i < count[lane]; ++i) is_new = is_new && own[i] != at;
      if (is_new) own[count[lane]++] = at;
    }
    if (count[lane] > capacity) capacity = count[lane];
  }
  layout.capacity = capacity + (context.launch->tensor_layout == MSL_SCATTERED ? 1 : 0);
  layout.coordinates = (int *)malloc(32 * layout.capacity * sizeof(int));
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned slot = 0; slot < layout.capacity; ++slot)
      layout.coordinates[lane * layout.capacity + slot] =
          slot < count[lane] ? found[lane * matrix.capacity + slot] : -1;
  free(found);
}

static const msl_layout *layout_of(Context &context, const msl_tensor_shape &shape) {
  for (unsigned i = 0; i < context.layout_count; ++i)
    if (memcmp(&context.layouts[i]->shape, &shape, sizeof shape) == 0) return context.layouts[i];
  msl_layout *layout = (msl_layout *)calloc(1, sizeof(msl_layout));
  layout->shape = shape;
  if (shape.role <= MSL_DESTINATION) share_matrix(context, *layout);
  else share_reduction(context, *layout);
  if (context.layout_count == MAX_LAYOUTS) fail(0, 0, "more than %u kinds of cooperative tensors", MAX_LAYOUTS);
  return context.layouts[context.layout_count++] = layout;
}

// The thread within the scope of a tensor.
static unsigned thread_of_scope(const Lane &lane, const msl_layout &layout) {
  return layout.shape.simdgroups == 1 ? lane.lane : lane.thread;
}

extern "C" {
const msl_layout *msl_tensor_layout(const msl_tensor_shape *shape) {
  Lane &lane = *current_lane();
  if (shape->simdgroups != 1 && shape->simdgroups != lane.context->simdgroup_count)
    fail(lane.line, (uintptr_t)__builtin_return_address(0) - 1,
         "execution_simdgroups<%u> in a threadgroup of %u simdgroups: it must be all of them", shape->simdgroups,
         lane.context->simdgroup_count);
  return layout_of(*lane.context, *shape);
}

void msl_tensor_poison(void *elements, unsigned long bytes) {
  memset(elements, current_lane()->context->launch->poison ? 0xff : 0, bytes);
}

void msl_tensor_index_fails(unsigned slot, unsigned capacity) {
  fail(0, (uintptr_t)__builtin_return_address(0) - 1, "element %d of a cooperative tensor, of which a lane has %u",
       (int)slot, capacity);
}

int msl_tensor_coordinates(const msl_layout *layout, unsigned slot) {
  Lane &lane = *current_lane();
  if (slot >= layout->capacity)
    fail(lane.line, 0, "element %d of a cooperative tensor, of which a lane has %u", (int)slot, layout->capacity);
  return layout->coordinates[thread_of_scope(lane, *layout) * layout->capacity + slot];
}

unsigned msl_tensor_map(const msl_layout *from, unsigned slot, const msl_layout *to) {
  Lane &lane = *current_lane();
  int at = along(*to, msl_tensor_coordinates(from, slot));
  if (at < 0) return to->capacity;
  unsigned found = find_slot(*to, lane.lane, at);
  if (found == to->capacity)
    fail(lane.line, 0, "map_iterator: this lane has no element of row or column %d there; ask is_iterator_compatible",
         at);
  return found;
}

bool msl_tensor_maps(const msl_layout *from, const msl_layout *to) {
  bool between_roles = from->shape.role == MSL_DESTINATION && to->shape.role > MSL_DESTINATION;
  if (!between_roles || from->shape.simdgroups != 1) return false;
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned slot = 0; slot < from->capacity; ++slot) {
      int at = along(*to, from->coordinates[lane * from->capacity + slot]);
      if (at >= 0 && find_slot(*to, lane, at) == to->capacity) return false;
    }
  return true;
}
}
