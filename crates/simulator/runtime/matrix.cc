// Tiles of simdgroup_matrix. A tile is a value: it is written once and then only read, so that a lane may note
// products of tiles that other lanes have not reached yet. Handles are equal in all lanes because all lanes perform
// the same operations in the same order. A tile goes back to the pool when no object and no noted operation names it.

static unsigned new_tile(Simdgroup &group, unsigned element_kind, unsigned born) {
  unsigned tile = group.free_tiles;
  if (tile) {
    group.free_tiles = group.tiles[tile].next_free;
  } else {
    if (group.tile_count == group.tile_capacity) {
      group.tile_capacity = group.tile_capacity ? 2 * group.tile_capacity : 64;
      Tile *larger = (Tile *)aligned_alloc(32, group.tile_capacity * sizeof(Tile));
      if (group.tiles) memcpy(larger, group.tiles, group.tile_count * sizeof(Tile));
      free(group.tiles);
      group.tiles = larger;
      if (!group.tile_count) group.tile_count = 1;
    }
    tile = group.tile_count++;
  }
  Tile &t = group.tiles[tile];
  t.references = 1; // of the operation that makes it
  t.element_kind = element_kind;
  t.born = t.last_use = born;
  t.ready = false;
  return tile;
}

#if MSL_CHECK_LAYER
static void use(Simdgroup &group, unsigned tile, unsigned ordinal) {
  Tile &t = group.tiles[tile];
  if (ordinal > t.last_use) t.last_use = ordinal;
}

static void note_interval(Liveness &l, int *Liveness::*difference, unsigned born, unsigned last_use, int amount) {
  unsigned end = last_use + 1;
  if (end >= l.capacity) {
    unsigned larger = end * 2 + 1024;
    int *Liveness::*const all[] = {&Liveness::difference_fp32, &Liveness::difference_16bit,
                                   &Liveness::difference_halves};
    for (int *Liveness::*counts : all) {
      l.*counts = (int *)realloc(l.*counts, larger * sizeof(int));
      memset(l.*counts + l.capacity, 0, (larger - l.capacity) * sizeof(int));
    }
    l.capacity = larger;
  }
  (l.*difference)[born] += amount;
  (l.*difference)[end] -= amount;
}

static void note_life(Simdgroup &group, const Tile &tile) {
  note_interval(group.liveness,
                tile.element_kind == MSL_FLOAT ? &Liveness::difference_fp32 : &Liveness::difference_16bit, tile.born,
                tile.last_use, 1);
}

// The values of a cooperative tensor, from `from` on if they were dead.
static void use_life(msl_life &life, unsigned from, unsigned until) {
  if (!life.live) {
    life.live = 1;
    life.born = life.last_use = from;
  }
  if (until > life.last_use) life.last_use = until;
}
static void end_life(Simdgroup &group, msl_life &life) {
  if (life.live) note_interval(group.liveness, &Liveness::difference_halves, life.born, life.last_use, (int)life.halves);
  life.live = 0;
}

// The most registers that values need at once: 4 halves a lane for an fp32 fragment, 2 for a 16-bit one, and what
// cooperative tensors hold.
static void count_live_fragments(Context &context, Simdgroup &group) {
  Liveness &l = group.liveness;
  msl_counters &c = context.launch->counters;
  long fp32 = 0, narrow = 0, halves = 0;
  long most = (long)(4 * c.live_fragments_fp32 + 2 * c.live_fragments_16bit + c.live_cooperative_halves);
  for (unsigned i = 0; i < l.capacity; ++i) {
    fp32 += l.difference_fp32[i];
    narrow += l.difference_16bit[i];
    halves += l.difference_halves[i];
    if (4 * fp32 + 2 * narrow + halves > most) {
      most = 4 * fp32 + 2 * narrow + halves;
      c.live_fragments_fp32 = (unsigned long)fp32;
      c.live_fragments_16bit = (unsigned long)narrow;
      c.live_cooperative_halves = (unsigned long)halves;
    }
  }
  memset(l.difference_fp32, 0, l.capacity * sizeof(int));
  memset(l.difference_16bit, 0, l.capacity * sizeof(int));
  memset(l.difference_halves, 0, l.capacity * sizeof(int));
}
#else
static inline void use(Simdgroup &, unsigned, unsigned) {}
static inline void note_life(Simdgroup &, const Tile &) {}
static inline void use_life(msl_life &, unsigned, unsigned) {}
static inline void end_life(Simdgroup &, msl_life &) {}
static inline void count_live_fragments(Context &, Simdgroup &) {}
#endif

static inline void release(Simdgroup &group, unsigned tile) {
  Tile &t = group.tiles[tile];
  if (--t.references) return;
  note_life(group, t);
  t.next_free = group.free_tiles;
  group.free_tiles = tile;
}

// A use between the operations that were passed and the next one: live up to the last that was passed.
static inline void use_before_next(const Lane &lane, unsigned tile) {
  if (lane.passed) use(*lane.simdgroup, tile, lane.passed - 1);
}

// Lane 0 lets go of a tile at one place of the text; a lane that has passed the next operation is past that place.
static void let_go(Simdgroup &group, unsigned tile, unsigned after) {
  if (group.departure_count == group.departure_capacity) {
    unsigned larger = group.departure_capacity ? 2 * group.departure_capacity : 64;
    Departure *moved = (Departure *)malloc(larger * sizeof(Departure));
    for (unsigned i = 0; i < group.departure_count; ++i)
      moved[i] = group.departures[(group.first_departure + i) & (group.departure_capacity - 1)];
    free(group.departures);
    group.departures = moved;
    group.departure_capacity = larger;
    group.first_departure = 0;
  }
  unsigned at = (group.first_departure + group.departure_count++) & (group.departure_capacity - 1);
  group.departures[at] = {tile, after};
}
static void let_departed_tiles_go(Simdgroup &group) {
  while (group.departure_count) {
    const Departure &departure = group.departures[group.first_departure];
    if ((int)(group.first - departure.after) <= 0) return;
    release(group, departure.tile);
    group.first_departure = (group.first_departure + 1) & (group.departure_capacity - 1);
    group.departure_count--;
  }
}

static void let_all_tiles_go(Simdgroup &group) {
  for (; group.departure_count; group.departure_count--) {
    release(group, group.departures[group.first_departure].tile);
    group.first_departure = (group.first_departure + 1) & (group.departure_capacity - 1);
  }
}

static float rounded(float value, unsigned element_kind) {
  if (element_kind == MSL_HALF) return (float)(_Float16)value;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) bits |= 0x400000;
  else bits += 0x7fff + (bits >> 16 & 1); // to nearest, ties to even
  bits &= 0xffff0000;
  memcpy(&value, &bits, 4);
  return value;
}

typedef float Row __attribute__((ext_vector_type(8)));

static void multiply(Simdgroup &group, const Operation &operation) {
  const Tile &a = group.tiles[operation.a], &b = group.tiles[operation.b];
  Tile &d = group.tiles[operation.result];
  const Row *b_rows = (const Row *)b.at;
  for (int i = 0; i < 8; ++i) {
    Row sum = operation.c ? ((const Row *)group.tiles[operation.c].at)[i] : (Row)0.0f;
    for (int k = 0; k < 8; ++k) sum = __builtin_elementwise_fma((Row)a.at[i * 8 + k], b_rows[k], sum);
    ((Row *)d.at)[i] = sum;
  }
  if (operation.element_kind != MSL_FLOAT)
    for (float &element : d.at) element = rounded(element, operation.element_kind);
}

static void execute_matrix(Context &context, Simdgroup &group, Operation &operation) {
  msl_counters &counters = context.launch->counters;
  require_all_lanes(operation);
  if (operation.kind == MATRIX_MULTIPLY) {
    counters.matrix_multiplies++;
    multiply(group, operation);
    release(group, operation.a);
    release(group, operation.b);
    if (operation.c) release(group, operation.c);
  } else if (operation.kind == MATRIX_LOAD || operation.kind == MATRIX_LOAD_WHOLE) {
    counters.matrix_loads++;
  } else if (operation.kind == MATRIX_STORE) {
    counters.matrix_stores++;
    release(group, operation.a);
    return;
  }
  group.tiles[operation.result].ready = true;
  release(group, operation.result);
}

template <class T> static void read_tile_of(const Operation &operation, Tile &tile) {
  const T *source = (const T *)operation.address;
  unsigned long down = operation.flags ? 1 : operation.stride, right = operation.flags ? operation.stride : 1;
  for (unsigned row = 0; row < 8; ++row)
    for (unsigned column = 0; column < 8; ++column)
      tile.at[row * 8 + column] = (float)source[row * down + column * right];
}
static void read_tile(const Operation &operation, Tile &tile) {
  if (operation.element_kind == MSL_FLOAT) read_tile_of<float>(operation, tile);
  else if (operation.element_kind == MSL_HALF) read_tile_of<_Float16>(operation, tile);
  else read_tile_of<__bf16>(operation, tile);
}

// What the first lane does for all.
static void begin_matrix(Lane &lane, Operation &operation, unsigned born) {
  Simdgroup &group = *lane.simdgroup;
  if (operation.kind == MATRIX_STORE) {
    group.tiles[operation.a].references++;
    use(group, operation.a, lane.passed);
    return;
  }
  operation.result = new_tile(group, operation.element_kind, born);
  if (operation.kind == MATRIX_LOAD_WHOLE) read_tile(operation, group.tiles[operation.result]);
  if (operation.kind != MATRIX_MULTIPLY) return;
  group.tiles[operation.a].references++;
  group.tiles[operation.b].references++;
  use(group, operation.a, lane.passed);
  use(group, operation.b, lane.passed);
  if (!operation.c) return;
  group.tiles[operation.c].references++;
  use_before_next(lane, operation.c); // the sum may take the place of what it adds to
}

// The tile that the operation makes; one more object of lane 0 names it.
static ALWAYS_INLINE Tile &named_result(Lane &lane, const Operation &noted) {
  Tile &tile = lane.simdgroup->tiles[noted.result];
  if (lane.lane == 0) tile.references++;
  return tile;
}

extern "C" {
unsigned msl_matrix_import(unsigned element_kind, float first, float second, unsigned born, int line) {
  Lane &lane = *current_lane();
  Operation mine = plain(MATRIX_IMPORT, "a simdgroup_matrix operation", line);
  mine.element_kind = element_kind;
  Operation &noted = meet(lane, mine, born);
  unsigned result = noted.result;
  float *at = named_result(lane, noted).at + lane.tile_offset;
  at[0] = first;
  at[1] = second;
  pass(lane, noted);
  return result;
}

unsigned msl_matrix_load(unsigned element_kind, float first, float second, const void *source, unsigned long stride,
                         bool transpose, int line) {
  Lane &lane = *current_lane();
  Operation mine = plain(MATRIX_LOAD, "simdgroup_load", line);
  mine.element_kind = element_kind;
  mine.address = source;
  mine.stride = stride;
  mine.flags = transpose;
  Operation &noted = meet(lane, mine, lane.passed);
  unsigned result = noted.result;
  float *at = named_result(lane, noted).at + lane.tile_offset;
  at[0] = first;
  at[1] = second;
  pass(lane, noted);
  return result;
}

unsigned msl_matrix_load_whole(unsigned element_kind, const void *source, unsigned long stride, bool transpose, int line) {
  Lane &lane = *current_lane();
  Operation mine = plain(MATRIX_LOAD_WHOLE, "simdgroup_load", line);
  mine.element_kind = element_kind;
  mine.address = source;
  mine.stride = stride;
  mine.flags = transpose;
  Operation &noted = meet(lane, mine, lane.passed);
  unsigned result = noted.result;
  named_result(lane, noted);
  pass(lane, noted);
  return result;
}

unsigned msl_matrix_multiply(unsigned element_kind, unsigned a, unsigned b, unsigned c, int line) {
  Lane &lane = *current_lane();
  Operation mine = plain(MATRIX_MULTIPLY, "simdgroup_multiply_accumulate", line);
  mine.element_kind = element_kind;
  mine.a = a;
  mine.b = b;
  mine.c = c;
  Operation &noted = meet(lane, mine, lane.passed);
  unsigned result = noted.result;
  named_result(lane, noted);
  pass(lane, noted);
  return result;
}

void msl_matrix_store(unsigned tile, const void *destination, unsigned long stride, bool transpose, int line) {
  Lane &lane = *current_lane();
  Operation mine = plain(MATRIX_STORE, "simdgroup_store", line);
  mine.a = tile;
  mine.address = destination;
  mine.stride = stride;
  mine.flags = transpose;
  Operation &noted = meet(lane, mine);
  pass(lane, noted);
}

void msl_matrix_read(unsigned tile, float *elements, int line) {
  Lane &lane = *current_lane();
  check_pending(*lane.context);
  Simdgroup &group = *lane.simdgroup;
  while (!group.tiles[tile].ready) park(lane, &Simdgroup::waiting, "a read of matrix elements", line);
  use_before_next(lane, tile);
  elements[0] = group.tiles[tile].at[lane.tile_offset];
  elements[1] = group.tiles[tile].at[lane.tile_offset + 1];
}

void msl_matrix_retain(unsigned tile) { current_lane()->simdgroup->tiles[tile].references++; }
void msl_matrix_release(unsigned tile) {
  Lane &lane = *current_lane();
  let_go(*lane.simdgroup, tile, lane.passed);
}
unsigned msl_matrix_now() { return current_lane()->passed; }
void msl_matrix_touch(unsigned tile) {
  use_before_next(*current_lane(), tile);
}

void msl_life_touch(msl_life *life) {
  unsigned passed = current_lane()->passed;
  use_life(*life, passed, passed ? passed - 1 : 0);
}
void msl_life_define(msl_life *life) {
  Lane &lane = *current_lane();
  end_life(*lane.simdgroup, *life);
  use_life(*life, lane.passed, lane.passed);
}
void msl_life_end(msl_life *life) { end_life(*current_lane()->simdgroup, *life); }
}
