// What the lanes of a simdgroup do together.
//
// A lane need not wait where it meets an operation whose result it does not see: loads and products of matrices,
// and barriers that order no memory. It notes the operation (or compares it with what an earlier lane noted) and
// goes on; the last lane to pass executes it. So a chain of products costs each lane a few comparisons, and the
// fibers are switched only where values come back to the lanes.

static void execute(Context &context, Simdgroup &group, Operation &operation);

static void park(Lane &lane, unsigned Simdgroup::*where, const char *name, int line) {
  Simdgroup &group = *lane.simdgroup;
  lane.waits_for = name;
  lane.line = line;
  group.ready &= ~(1u << lane.lane);
  group.*where |= 1u << lane.lane;
  yield_from(lane);
}

#define ALWAYS_INLINE inline __attribute__((always_inline))

static ALWAYS_INLINE bool same(const Operation &noted, const Operation &mine) {
  return ((noted.kind ^ mine.kind) | (unsigned)(noted.line ^ mine.line) | (noted.a ^ mine.a) | (noted.b ^ mine.b) |
          (noted.c ^ mine.c) | (noted.flags ^ mine.flags)) == 0 &&
         noted.address == mine.address && noted.stride == mine.stride;
}

[[noreturn]] static __attribute__((noinline)) void report_divergence(Lane &lane, const Operation mine) {
  const Operation &noted = lane.simdgroup->window[lane.passed % WINDOW];
  if (noted.kind == mine.kind && noted.line == mine.line)
    fail(mine.line, 0, "the arguments of %s differ between the lanes of a simdgroup", mine.name);
  fail(mine.line, 0, "divergence: this lane is in %s while lanes %08x passed %s at line %d", mine.name, noted.passed,
       noted.name, noted.line);
}

static void begin_matrix(Lane &lane, Operation &operation, unsigned born);

// The first lane notes the operation, unless others do while it waits for room.
static __attribute__((noinline)) void note(Lane &lane, const Operation mine, unsigned born) {
  Simdgroup &group = *lane.simdgroup;
  while (lane.passed - group.first >= WINDOW) park(lane, &Simdgroup::waiting, mine.name, mine.line);
  Operation &noted = group.window[lane.passed % WINDOW];
  if (lane.passed == group.next) {
    noted = mine;
    group.next++;
    if (mine.kind >= MATRIX_IMPORT) begin_matrix(lane, noted, born);
  } else if (!same(noted, mine)) {
    report_divergence(lane, mine);
  }
}

// The operation that this lane has come to, as the first lane noted it.
static ALWAYS_INLINE Operation &meet(Lane &lane, const Operation mine, unsigned born = 0) {
  check_pending(*lane.context);
  lane.line = mine.line;
  Operation &noted = lane.simdgroup->window[lane.passed % WINDOW];
  if (__builtin_expect(lane.passed == lane.simdgroup->next, 0)) note(lane, mine, born);
  else if (__builtin_expect(!same(noted, mine), 0)) report_divergence(lane, mine);
  return noted;
}

static void let_departed_tiles_go(Simdgroup &group);

static __attribute__((noinline)) void complete_first(Context &context, Simdgroup &group) {
  Operation &operation = group.window[group.first % WINDOW];
  execute(context, group, operation);
  group.first++;
  let_departed_tiles_go(group);
  group.ready |= group.waiting;
  group.waiting = 0;
}

static ALWAYS_INLINE void pass(Lane &lane, Operation &operation) {
  Simdgroup &group = *lane.simdgroup;
  operation.passed |= 1u << lane.lane;
  lane.passed++;
  if ((group.alive & ~operation.passed) == 0) complete_first(*lane.context, group);
}

static void wait_until_complete(Lane &lane, unsigned ordinal, const char *name, int line) {
  while ((int)(lane.simdgroup->first - ordinal) <= 0) park(lane, &Simdgroup::waiting, name, line);
  if (lane.context->launch->seed != 0) yield_from(lane);
}

// A lane returned: what waited only for it is complete now.
static void complete_without(Lane &lane) {
  Simdgroup &group = *lane.simdgroup;
  while (group.first != group.next && (group.alive & ~group.window[group.first % WINDOW].passed) == 0)
    complete_first(*lane.context, group);
}

static void new_segment(Context &context, Simdgroup &group, unsigned space) {
  group.segment[space] = ++context.next_segment[space];
  if (context.next_segment[space] >= 1u << 20) fail(0, 0, "too many barriers in one threadgroup for the checker");
}

static bool orders_memory(unsigned flags) { return (flags & 3) != 0; }

static void execute_simdgroup_barrier(Context &context, Simdgroup &group, const Operation &operation) {
  msl_counters &counters = context.launch->counters;
  ++(orders_memory(operation.flags) ? counters.simdgroup_barriers : counters.simdgroup_hints);
  if (operation.flags & 2) new_segment(context, group, 0);
  if (operation.flags & 1) new_segment(context, group, 1);
}

static void order_threadgroup_memory(Context &context) {
  msl_counters &counters = context.launch->counters;
  unsigned flags = context.barrier.flags;
  ++(orders_memory(flags) ? counters.threadgroup_barriers : counters.threadgroup_hints);
  for (unsigned space = 0; space < 2; ++space) {
    if (!(flags & (space == 0 ? 2u : 1u))) continue;
    context.group_segment[space] = context.next_segment[space] + 1;
    for (unsigned i = 0; i < context.simdgroup_count; ++i) new_segment(context, context.simdgroups[i], space);
  }
}

static void release_threadgroup(Context &context) {
  context.arrived_simdgroups = 0;
  context.barrier_generation++;
  for (unsigned i = 0; i < context.simdgroup_count; ++i) {
    Simdgroup &group = context.simdgroups[i];
    group.ready |= group.at_barrier;
    group.at_barrier = 0;
  }
}

static void execute_tensor(Context &context, Simdgroup &first, unsigned simdgroups, const Operation &operation) {
  ((ExecuteTensor)operation.address)({context, &first, simdgroups, operation.line});
}

static void require_all_lanes(const Operation &operation) {
  if (operation.passed != ~0u)
    fail(operation.line, 0, "%s needs all 32 lanes of the simdgroup, lanes %08x came", operation.name, operation.passed);
}

// All lanes of one simdgroup have come to what all simdgroups do together.
static void arrive_with_threadgroup(Context &context, const Operation &operation) {
  if (context.alive_threads != context.threads)
    fail(operation.line, 0, "%s after %u threads of the threadgroup returned", operation.name,
         context.threads - context.alive_threads);
  if (context.arrived_simdgroups != 0 &&
      (context.barrier.kind != operation.kind || context.barrier.line != operation.line ||
       context.barrier.flags != operation.flags || context.barrier.address != operation.address))
    fail(operation.line, 0, "divergence: this simdgroup is in another %s than %u others, which are in %s at line %d",
         operation.name, context.arrived_simdgroups, context.barrier.name, context.barrier.line);
  context.barrier = operation;
  if (++context.arrived_simdgroups != context.simdgroup_count) return;
  if (operation.kind == TENSOR_OF_ALL) execute_tensor(context, context.simdgroups[0], context.simdgroup_count, operation);
  else order_threadgroup_memory(context);
  release_threadgroup(context);
}

static void execute_matrix(Context &context, Simdgroup &group, Operation &operation);

static void execute(Context &context, Simdgroup &group, Operation &operation) {
  switch (operation.kind) {
  case SIMD:
    context.launch->counters.simd_operations++;
    group.combine(group.slots, operation.passed & group.alive);
    break;
  case SIMDGROUP_BARRIER: execute_simdgroup_barrier(context, group, operation); break;
  case THREADGROUP_BARRIER: arrive_with_threadgroup(context, operation); break;
  case TENSOR:
    require_all_lanes(operation);
    execute_tensor(context, group, 1, operation);
    break;
  case TENSOR_OF_ALL:
    require_all_lanes(operation);
    arrive_with_threadgroup(context, operation);
    break;
  default: execute_matrix(context, group, operation);
  }
}

static ALWAYS_INLINE Operation plain(OperationKind kind, const char *name, int line) {
  Operation operation{};
  operation.kind = kind;
  operation.name = name;
  operation.line = line;
  return operation;
}

// A tensor operation: every thread of the scope comes with a slot, the last one executes for all.
static void collective(unsigned simdgroups, const char *name, int line, const void *slot, ExecuteTensor execute) {
  Lane &lane = *current_lane();
  Context &context = *lane.context;
  Operation mine = plain(simdgroups == 1 ? TENSOR : TENSOR_OF_ALL, name, line);
  mine.address = (const void *)execute;
  Operation &noted = meet(lane, mine);
  lane.simdgroup->slots[lane.lane] = (void *)slot;
  unsigned ordinal = lane.passed, generation = context.barrier_generation;
  pass(lane, noted);
  if (simdgroups == 1) {
    wait_until_complete(lane, ordinal, name, line);
    return;
  }
  while (context.barrier_generation == generation) park(lane, &Simdgroup::at_barrier, name, line);
  if (context.launch->seed != 0) yield_from(lane);
}

extern "C" {
void msl_fail(int line, const char *text) { fail(line ? line : current_lane()->line, 0, "%s", text); }

void msl_simd(const char *name, int line, void *slot, msl_combine combine) {
  Lane &lane = *current_lane();
  Operation mine = plain(SIMD, name, line);
  Operation &noted = meet(lane, mine);
  lane.simdgroup->combine = combine;
  lane.simdgroup->slots[lane.lane] = slot;
  unsigned ordinal = lane.passed;
  pass(lane, noted);
  wait_until_complete(lane, ordinal, name, line);
}

void msl_simdgroup_barrier(unsigned flags, int line) {
  Lane &lane = *current_lane();
  Operation mine = plain(SIMDGROUP_BARRIER, "simdgroup_barrier", line);
  mine.flags = flags;
  Operation &noted = meet(lane, mine);
  unsigned ordinal = lane.passed;
  pass(lane, noted);
  if (orders_memory(flags)) wait_until_complete(lane, ordinal, "simdgroup_barrier", line);
}

void msl_threadgroup_barrier(unsigned flags, int line) {
  Lane &lane = *current_lane();
  Context &context = *lane.context;
  Operation mine = plain(THREADGROUP_BARRIER, "threadgroup_barrier", line);
  mine.flags = flags;
  Operation &noted = meet(lane, mine);
  unsigned generation = context.barrier_generation;
  pass(lane, noted);
  while (context.barrier_generation == generation) park(lane, &Simdgroup::at_barrier, "threadgroup_barrier", line);
  if (context.launch->seed != 0) yield_from(lane);
}
}
