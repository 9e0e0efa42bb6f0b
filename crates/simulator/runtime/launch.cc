// One dispatch: memory for the threadgroup, fibers for its threads, threadgroup after threadgroup.

extern "C" {
static msl_array registered_arrays[MSL_MAX_ARRAYS];

int msl_register_array(unsigned slot, unsigned bytes, unsigned alignment, unsigned element_bytes) {
  msl_array &array = registered_arrays[slot];
  if (bytes > array.bytes) array = {bytes, alignment, element_bytes};
  return 0;
}

// Bytes of threadgroup memory that an entry declares.
__attribute__((visibility("default"))) unsigned long msl_declared_threadgroup_bytes(const msl_entry *entry) {
  unsigned long bytes = 0;
  for (unsigned i = 0; i < entry->array_slot_count; ++i) bytes += registered_arrays[entry->array_slots[i]].bytes;
  return bytes;
}

__attribute__((visibility("default"))) void msl_library_range(unsigned long *start, unsigned long *end) {
  *start = (unsigned long)&__ehdr_start;
  *end = (unsigned long)&_end;
}

void *msl_threadgroup_array(unsigned slot) { return current_lane()->context->array_address[slot]; }

void msl_atomic(const void *address, unsigned bytes, bool reads, bool writes) {
  current_lane()->context->launch->counters.atomic_operations++;
#if MSL_CHECK_LAYER
  uintptr_t pc = (uintptr_t)__builtin_return_address(0) - 1;
  if (reads) access((char *)address, bytes, false, true, pc);
  if (writes) access((char *)address, bytes, true, true, pc);
#else
  (void)address, (void)bytes, (void)reads, (void)writes;
#endif
}

// The driver's signal handler continues here, on the stack of the lane that was interrupted.
[[noreturn]] __attribute__((visibility("default"))) void msl_fault(char *address, uintptr_t pc) {
  Context &context = *current_lane()->context;
  char *stacks = context.launch->stacks;
  if (address == (char *)MSL_TIME_IS_UP) fail(0, pc, "the kernel ran longer than its time limit");
  if (address >= stacks && address < stacks + context.launch->stack_count * MSL_STACK_BYTES)
    fail(0, pc, "the variables of a thread need more than %u KiB of stack", MSL_STACK_BYTES / 1024);
  // The processor names no address when only the alignment is wrong.
  if (!address) fail(0, pc, "an access through a pointer that is not aligned to its type");
  const char *where = "";
  char text[120];
  long nearest = 0;
  for (unsigned i = 0; i < context.launch->buffer_count; ++i) {
    msl_bound_buffer &buffer = context.launch->buffers[i];
    bool before = address < buffer.address;
    long away = before ? buffer.address - address : address - (buffer.address + buffer.bytes);
    if (*where && labs(away) >= nearest) continue;
    nearest = labs(away);
    if (away < 0) snprintf(text, sizeof text, "inside buffer %u, which is read-only", buffer.index);
    else snprintf(text, sizeof text, "%ld bytes %s buffer %u", away, before ? "before" : "past the end of", buffer.index);
    where = text;
  }
  fail(0, pc, "access to memory that is not the kernel's: %s", where);
}
}

static const char zone_pattern = (char)0xa5;

#if MSL_CHECK_LAYER
static void add_region(Context &context, char *base, unsigned long bytes, unsigned element_bytes, msl_bound_buffer *buffer,
                       unsigned slot, bool tracked) {
  Region &region = context.regions[context.region_count++];
  region = {base, bytes, nullptr, 0, buffer, slot};
  while ((1u << region.shift) < element_bytes && region.shift < 3) region.shift++;
  if (tracked) region.cells = (Cell *)calloc((bytes >> region.shift) + 1, sizeof(Cell));
}
#endif

// Arrays lie apart, with red zones before, between and behind them.
static char *place_array(Context &context, unsigned long &offset, unsigned long bytes, unsigned element_bytes, unsigned slot) {
  char *address = context.arena + offset;
  // The end of the array, rounded up to 16 bytes, touches the zone.
  offset += (bytes + 15) / 16 * 16 + RED_ZONE;
#if MSL_CHECK_LAYER
  add_region(context, address, bytes, element_bytes, nullptr, slot, true);
#else
  (void)element_bytes, (void)slot;
#endif
  context.launch->counters.threadgroup_memory_bytes += bytes;
  return address;
}

static void lay_out_threadgroup_memory(Context &context) {
  msl_launch &launch = *context.launch;
  unsigned long total = RED_ZONE;
  for (unsigned i = 0; i < launch.entry->array_slot_count; ++i)
    total += (registered_arrays[launch.entry->array_slots[i]].bytes + 15u) / 16 * 16 + RED_ZONE;
  for (unsigned i = 0; i < launch.threadgroup_length_count; ++i) total += launch.threadgroup_lengths[i] + 15u + RED_ZONE;
  context.arena_bytes = total;
  context.arena = (char *)aligned_alloc(256, (total + 255) / 256 * 256);
  memset(context.arena, zone_pattern, total);
  unsigned long offset = RED_ZONE;
  for (unsigned i = 0; i < launch.entry->array_slot_count; ++i) {
    unsigned slot = launch.entry->array_slots[i];
    const msl_array &array = registered_arrays[slot];
    context.array_address[slot] = place_array(context, offset, array.bytes, array.element_bytes, slot);
  }
  for (unsigned i = 0; i < launch.threadgroup_length_count; ++i)
    if (launch.threadgroup_lengths[i])
      context.threadgroup_arguments[i] = place_array(context, offset, launch.threadgroup_lengths[i], 1, i);
}

template <class F> static void for_each_array(Context &context, F each) {
  msl_launch &launch = *context.launch;
  for (unsigned i = 0; i < launch.entry->array_slot_count; ++i) {
    unsigned slot = launch.entry->array_slots[i];
    each((char *)context.array_address[slot], registered_arrays[slot].bytes, slot);
  }
  for (unsigned i = 0; i < launch.threadgroup_length_count; ++i)
    if (launch.threadgroup_lengths[i]) each((char *)context.threadgroup_arguments[i], launch.threadgroup_lengths[i], i);
}

// All bits set: a NaN as half, bfloat and float.
static void fill_threadgroup_memory(Context &context) {
  int value = context.launch->poison ? 0xff : 0;
  for_each_array(context, [&](char *address, unsigned bytes, unsigned) { memset(address, value, bytes); });
  clear_threadgroup_shadow(context);
}

static bool zone_intact(const char *from, unsigned long bytes) {
  for (unsigned long i = 0; i < bytes; ++i)
    if (from[i] != zone_pattern) return false;
  return true;
}

static bool report_broken_zones(Context &context) {
  msl_launch &launch = *context.launch;
  bool broken = false;
  for_each_array(context, [&](char *address, unsigned bytes, unsigned slot) {
    // A zone between two arrays belongs to the nearer one.
    bool before = !zone_intact(address - RED_ZONE / 2, RED_ZONE / 2), behind = !zone_intact(address + bytes, RED_ZONE / 2);
    if (broken || (!before && !behind)) return;
    broken = true;
    snprintf(launch.error, MSL_ERROR_BYTES, "threadgroup array %u was written %s", slot,
             behind ? "past its end" : "before its start");
  });
  return broken;
}

static void run_fiber() {
  Lane &lane = *current_lane();
  Context &context = *lane.context;
  context.launch->entry->call(context.buffer_addresses, context.threadgroup_arguments, &lane.position);
  check_pending(context);
  Simdgroup &group = *lane.simdgroup;
  group.alive &= ~(1u << lane.lane);
  group.ready &= ~(1u << lane.lane);
  context.alive_threads--;
  lane.waits_for = "the end of the kernel";
  complete_without(lane);
  if (context.arrived_simdgroups)
    fail(context.barrier.line, 0, "%s after %u threads of the threadgroup returned", context.barrier.name,
         context.threads - context.alive_threads);
  if (context.alive_threads == 0) to_main(lane);
  yield_from(lane);
  __builtin_unreachable();
}

static void place_thread(Context &context, Lane &lane, const unsigned *group, const unsigned *size) {
  msl_launch &launch = *context.launch;
  unsigned thread = lane.thread;
  msl_position &p = lane.position;
  const unsigned inside[3] = {thread % size[0], thread / size[0] % size[1], thread / (size[0] * size[1])};
  for (int i = 0; i < 3; ++i) {
    p.thread_position_in_threadgroup[i] = inside[i];
    p.threadgroup_position_in_grid[i] = group[i];
    p.thread_position_in_grid[i] = group[i] * launch.group[i] + inside[i];
    p.threads_per_grid[i] = launch.threads[i];
    p.threads_per_threadgroup[i] = size[i];
    p.threadgroups_per_grid[i] = (launch.threads[i] + launch.group[i] - 1) / launch.group[i];
  }
  p.thread_index_in_threadgroup = thread;
  p.simdgroup_index_in_threadgroup = thread / 32;
  p.thread_index_in_simdgroup = thread % 32;
  p.simdgroups_per_threadgroup = context.simdgroup_count;
  p.threads_per_simdgroup = 32;
}

// A stack whose first switch enters run_fiber.
static void prepare_stack(Context &context, Lane &lane) {
  char *top = context.launch->stacks + (lane.thread + 1ul) * MSL_STACK_BYTES;
  *(Lane **)(top - 16) = &lane;
  *(unsigned long *)(top - 8) = lane.lane;
  // Equal depths would compete for the same lines of the first-level cache.
  uintptr_t *words = (uintptr_t *)(top - 64 - (lane.thread & 127) * 448);
#if defined(__x86_64__)
  *--words = 0; // where run_fiber would return to; keeps the alignment of a call
  *--words = (uintptr_t)run_fiber;
  words -= SAVED_WORDS;
  memset(words, 0, SAVED_WORDS * sizeof *words);
#else
  words -= SAVED_WORDS;
  memset(words, 0, SAVED_WORDS * sizeof *words);
  words[11] = (uintptr_t)run_fiber; // x30
#endif
  lane.stack_pointer = words;
}

static void reset_simdgroup(Context &context, Simdgroup &group, unsigned threads) {
  group.alive = group.ready = threads >= 32 ? ~0u : (1u << threads) - 1;
  group.waiting = group.at_barrier = group.first = group.next = 0;
  group.free_tiles = 0;
  group.first_departure = group.departure_count = 0;
  group.tile_count = group.tile_capacity ? 1 : 0;
  for (unsigned space = 0; space < 2; ++space) group.segment[space] = ++context.next_segment[space];
}

static void run_threadgroup(Context &context, const unsigned *group) {
  msl_launch &launch = *context.launch;
  unsigned size[3];
  for (int i = 0; i < 3; ++i) {
    unsigned left = launch.threads[i] - group[i] * launch.group[i];
    size[i] = left < launch.group[i] ? left : launch.group[i];
  }
  context.threads = context.alive_threads = size[0] * size[1] * size[2];
  context.simdgroup_count = (context.threads + 31) / 32;
  context.arrived_simdgroups = 0;
  context.threadgroup_number++;
  launch.counters.threadgroups++;
  fill_threadgroup_memory(context);
  for (unsigned space = 0; space < 2; ++space) {
    context.next_segment[space] = 0;
    context.group_segment[space] = 1;
  }
  for (unsigned i = 0; i < context.simdgroup_count; ++i)
    reset_simdgroup(context, context.simdgroups[i], context.threads - i * 32);
  for (unsigned thread = 0; thread < context.threads; ++thread) {
    Lane &lane = context.lanes[thread];
    lane.passed = 0;
    lane.waits_for = nullptr;
    lane.line = 0;
    place_thread(context, lane, group, size);
    prepare_stack(context, lane);
  }
  context.current = &context.lanes[0];
  msl_switch(&context.main_stack_pointer, context.current->stack_pointer);
  for (unsigned i = 0; !context.failed && i < context.simdgroup_count; ++i) {
    let_all_tiles_go(context.simdgroups[i]);
    count_live_fragments(context, context.simdgroups[i]);
  }
}

static Context *new_context(msl_launch *launch) {
  Context *context = (Context *)aligned_alloc(alignof(Context), sizeof(Context));
  memset((void *)context, 0, sizeof *context);
  context->launch = launch;
  context->random = launch->seed;
  for (unsigned thread = 0; thread < MSL_MAX_THREADS; ++thread) {
    Lane &lane = context->lanes[thread];
    lane.context = context;
    lane.thread = thread;
    lane.lane = thread % 32;
    lane.simdgroup = &context->simdgroups[thread / 32];
    unsigned row = (lane.lane / 4 & 4) + lane.lane / 2 % 4, column = (lane.lane / 4 & 2) * 2 + lane.lane % 2 * 2;
    lane.tile_offset = row * 8 + column;
  }
  for (unsigned i = 0; i < launch->buffer_count; ++i) {
    msl_bound_buffer &buffer = launch->buffers[i];
    context->buffer_addresses[buffer.index] = buffer.address;
#if MSL_CHECK_LAYER
    add_region(*context, buffer.address, buffer.bytes, buffer.element_bytes, &buffer, 0, buffer.writable);
#endif
  }
  lay_out_threadgroup_memory(*context);
  return context;
}

static void count_unwritten(Context &context) {
  for (unsigned i = 0; i < context.region_count; ++i) {
    Region &region = context.regions[i];
    if (!region.buffer || !region.cells || !region.buffer->count_unwritten) continue;
    for (unsigned long at = 0; at < region.bytes; at += 1ul << region.shift)
      if (!region.cells[at >> region.shift].written) region.buffer->unwritten_bytes += 1ul << region.shift;
  }
}

static void delete_context(Context *context) {
  for (Simdgroup &group : context->simdgroups) {
    free(group.tiles);
    free(group.departures);
    free(group.liveness.difference_fp32);
    free(group.liveness.difference_16bit);
    free(group.liveness.difference_halves);
  }
  for (unsigned i = 0; i < context->region_count; ++i) free(context->regions[i].cells);
  for (unsigned i = 0; i < context->layout_count; ++i) {
    free(context->layouts[i]->coordinates);
    free(context->layouts[i]);
  }
  free(context->scratch);
  free(context->arena);
  free(context);
}

// 0, or 1 with the error in the launch. The grid is that of dispatchThreads: threadgroups at the edge may be smaller.
extern "C" __attribute__((visibility("default"))) int msl_run(msl_launch *launch) {
  Context *context = new_context(launch);
  initialised = true;
  unsigned count[3];
  for (int i = 0; i < 3; ++i) count[i] = (launch->threads[i] + launch->group[i] - 1) / launch->group[i];
  unsigned group[3];
  for (group[2] = 0; group[2] < count[2] && !context->failed; ++group[2])
    for (group[1] = 0; group[1] < count[1] && !context->failed; ++group[1])
      for (group[0] = 0; group[0] < count[0] && !context->failed; ++group[0]) {
        run_threadgroup(*context, group);
        if (!context->failed && report_broken_zones(*context)) context->failed = true;
      }
  bool failed = context->failed;
  if (!failed) count_unwritten(*context);
  delete_context(context);
  return failed;
}
