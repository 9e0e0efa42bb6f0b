// The check layer: clang's thread sanitizer pass calls __tsan_* at every access that may leave the thread, its
// undefined behaviour checks call __ubsan_*; both land here instead of in clang's libraries, which know nothing of
// threads made by hand, simdgroups or their barriers.

static Record record(const Context &context, const Simdgroup &simdgroup, unsigned space, Accessor accessor, unsigned thread) {
  return context.threadgroup_number << 32 | (Record)simdgroup.segment[space] << 12 | (Record)accessor << 10 | thread;
}
static unsigned thread_of(Record r) { return r & 0x3ff; }
static Accessor accessor_of(Record r) { return (Accessor)(r >> 10 & 3); }
static bool is_atomic(Record r) { return accessor_of(r) == BY_ATOMIC; }
static bool is_collective(Record r) { return accessor_of(r) >= BY_SIMDGROUP; }
static unsigned segment_of(Record r) { return r >> 12 & 0xfffff; }

// Happens-before: the same thread; a barrier of the simdgroup in between; a barrier of the threadgroup in between. What
// a simdgroup or a threadgroup does together, any of its threads may have done.
static bool ordered(const Context &context, unsigned space, Record earlier, Record now) {
  if (earlier == 0) return true;
  if (earlier >> 32 != now >> 32) return false;
  unsigned a = thread_of(earlier), b = thread_of(now);
  if (accessor_of(earlier) == BY_THREADGROUP || accessor_of(now) == BY_THREADGROUP)
    return segment_of(earlier) < context.group_segment[space];
  if (a == b && !is_collective(earlier) && !is_collective(now)) return true;
  if (a / 32 == b / 32) return segment_of(earlier) != segment_of(now);
  return segment_of(earlier) < context.group_segment[space];
}
static bool races(const Context &context, unsigned space, Record earlier, Record now) {
  return !(is_atomic(earlier) && is_atomic(now)) && !ordered(context, space, earlier, now);
}

static void describe_place(const Region &region, char *address, char *text, size_t size) {
  unsigned long offset = (unsigned long)(address - region.base);
  if (region.buffer) snprintf(text, size, "buffer %u at byte %lu", region.buffer->index, offset);
  else snprintf(text, size, "threadgroup array %u at byte %lu", region.slot, offset);
}

[[noreturn]] static void report_race(const Region &region, char *address, const char *what, Record other, Site site) {
  char place[80], who[80];
  describe_place(region, address, place, sizeof place);
  unsigned thread = thread_of(other);
  if (accessor_of(other) == BY_THREADGROUP) snprintf(who, sizeof who, "an operation of all simdgroups");
  else if (accessor_of(other) == BY_SIMDGROUP) snprintf(who, sizeof who, "an operation of simdgroup %u", thread / 32);
  else snprintf(who, sizeof who, "thread %u (simdgroup %u lane %u)", thread, thread / 32, thread % 32);
  fail(site.line, site.pc, "data race in %s: %s %s of threadgroup %lu without a barrier between", place, what, who,
       (unsigned long)(other >> 32) - 1);
}

// Several lanes may store the same value to one place: formally a race, but harmless, so it is counted. The value
// is known at this thread's next event only, because the pass calls before it stores.
static void check_pending(Context &context) {
  PendingWrite &pending = context.pending;
  if (!pending.address) return;
  char *address = pending.address;
  pending.address = nullptr;
  if (memcmp(address, pending.before, pending.bytes) == 0) {
    context.launch->counters.same_value_races++;
    return;
  }
  for (unsigned i = 0; i < context.region_count; ++i) {
    Region &region = context.regions[i];
    if (address >= region.base && address < region.base + region.bytes)
      report_race(region, address, "another value is written after a write by", pending.other, pending.site);
  }
}

// Cells become finer when something smaller than a cell is touched.
static void refine(Region &region, unsigned shift) {
  unsigned long count = (region.bytes >> region.shift) + 1, factor = 1ul << (region.shift - shift);
  Cell *finer = (Cell *)calloc(((region.bytes >> shift) + 1 + factor), sizeof(Cell));
  for (unsigned long i = 0; i < count; ++i)
    for (unsigned long j = 0; j < factor; ++j)
      if (i * factor + j <= region.bytes >> shift) finer[i * factor + j] = region.cells[i];
  free(region.cells);
  region.cells = finer;
  region.shift = shift;
}

static void check_write(Context &context, Region &region, Cell &cell, char *address, unsigned bytes, Record now,
                        Site site) {
  unsigned space = region.buffer ? 1 : 0;
  if (races(context, space, cell.written, now)) {
    bool other_threadgroup = cell.written >> 32 != now >> 32;
    if (accessor_of(now) != BY_THREAD || accessor_of(cell.written) != BY_THREAD || other_threadgroup ||
        bytes > sizeof context.pending.before)
      report_race(region, address, "write after write by", cell.written, site);
    if (!context.pending.address) {
      context.pending = {address, bytes, {}, cell.written, site};
      memcpy(context.pending.before, address, bytes);
    }
  }
  const Record readers[] = {cell.read, cell.read_by_other_group, cell.read_by_neighbour};
  for (Record earlier : readers)
    if (races(context, space, earlier, now)) report_race(region, address, "write after read by", earlier, site);
  cell.written = now;
}

static void check_read(Context &context, Region &region, Cell &cell, char *address, Record now, Site site,
                       bool remember) {
  if (!region.buffer && cell.written == 0) {
    char place[80];
    describe_place(region, address, place, sizeof place);
    fail(site.line, site.pc, "read of memory that this threadgroup has not written: %s", place);
  }
  if (races(context, region.buffer ? 1 : 0, cell.written, now))
    report_race(region, address, "read after write by", cell.written, site);
  if (cell.read == now || !remember) return;
  // A thread of the scope reads once more: the scope's read says more.
  bool of_scope = accessor_of(cell.read) == BY_THREADGROUP || thread_of(cell.read) / 32 == thread_of(now) / 32;
  if (is_collective(cell.read) && of_scope && !is_collective(now) &&
      !ordered(context, region.buffer ? 1 : 0, cell.read, now))
    return;
  if (cell.read && thread_of(cell.read) != thread_of(now)) {
    bool neighbour = cell.read >> 32 == now >> 32 && thread_of(cell.read) / 32 == thread_of(now) / 32;
    (neighbour ? cell.read_by_neighbour : cell.read_by_other_group) = cell.read;
  }
  cell.read = now;
}

[[noreturn]] static void report_out_of_bounds(Context &context, char *address, unsigned long bytes, bool write,
                                              Site site) {
  const char *verb = write ? "write" : "read";
  Region *nearest = nullptr;
  long distance = 0;
  for (unsigned i = 0; i < context.region_count; ++i) {
    Region &region = context.regions[i];
    long away = address < region.base ? address - region.base : address - (region.base + region.bytes) + 1;
    if (!nearest || labs(away) < labs(distance)) nearest = &region, distance = away;
  }
  if (!nearest) fail(site.line, site.pc, "out-of-bounds %s of %lu bytes: the kernel has no memory at all", verb, bytes);
  const char *name = nearest->buffer ? "buffer" : "threadgroup array";
  unsigned index = nearest->buffer ? nearest->buffer->index : nearest->slot;
  if (distance < 0) fail(site.line, site.pc, "out-of-bounds %s of %lu bytes, %ld bytes before %s %u", verb, bytes, -distance, name, index);
  fail(site.line, site.pc, "out-of-bounds %s of %lu bytes, %ld bytes past the end of %s %u", verb, bytes, distance - 1, name, index);
}

static bool holds(const Region &region, const char *address) {
  return address >= region.base && address < region.base + region.bytes;
}

// One memory may be bound twice, as const and not: a write goes to where it may.
static Region *find_region(Context &context, char *address, bool write) {
  Region *last = context.last_region;
  if (last && holds(*last, address) && !(write && !last->cells)) return last;
  Region *found = nullptr;
  for (unsigned i = 0; i < context.region_count; ++i) {
    Region &region = context.regions[i];
    if (!holds(region, address)) continue;
    found = &region;
    if (region.cells) break;
  }
  return context.last_region = found;
}

static void count(Context &context, const Region &region, unsigned long bytes, bool write) {
  msl_counters &counters = context.launch->counters;
  if (!region.buffer) {
    (write ? counters.threadgroup_written_bytes : counters.threadgroup_read_bytes) += bytes;
    return;
  }
  (write ? region.buffer->written_bytes : region.buffer->read_bytes) += bytes;
  if (region.buffer->constant_space) counters.constant_read_bytes += bytes;
  else (write ? counters.device_written_bytes : counters.device_read_bytes) += bytes;
}

static void touch(Context &context, const Simdgroup &simdgroup, char *address, unsigned long bytes, bool write,
                  Accessor accessor, unsigned thread, Site site, bool remember = true) {
  Region *region = find_region(context, address, write);
  if (!region) {
    if (!write && address >= &__ehdr_start && address < &_end) { // constants of the program
      context.launch->counters.constant_read_bytes += bytes;
      return;
    }
    report_out_of_bounds(context, address, bytes, write, site);
  }
  if (address + bytes > region->base + region->bytes)
    fail(site.line, site.pc, "out-of-bounds %s of %lu bytes, of which %lu are past the end of %s %u",
         write ? "write" : "read", bytes, (unsigned long)(address + bytes - (region->base + region->bytes)),
         region->buffer ? "buffer" : "threadgroup array", region->buffer ? region->buffer->index : region->slot);
  count(context, *region, bytes, write);
  if (write && region->buffer && !region->buffer->writable)
    fail(site.line, site.pc, "write to buffer %u, which the kernel declares const", region->buffer->index);
  if (!region->cells) return;
  unsigned long offset = (unsigned long)(address - region->base);
  unsigned shift = region->shift;
  while (shift && ((offset | bytes) & ((1ul << shift) - 1))) --shift;
  if (shift != region->shift) refine(*region, shift);
  Record now = record(context, simdgroup, region->buffer ? 1 : 0, accessor, thread);
  unsigned granule = 1u << shift;
  for (unsigned long at = offset; at < offset + bytes; at += granule) {
    Cell &cell = region->cells[at >> shift];
    if (write) check_write(context, *region, cell, region->base + at, granule, now, site);
    else check_read(context, *region, cell, region->base + at, now, site, remember);
  }
}

static void access(char *address, unsigned long bytes, bool write, bool atomic, uintptr_t pc) {
  if (bytes == 0 || !initialised) return;
  Lane &lane = *current_lane();
  Context &context = *lane.context;
  check_pending(context);
  char *stacks = context.launch->stacks;
  if (address >= stacks && address < stacks + context.launch->stack_count * MSL_STACK_BYTES) return; // thread space
  touch(context, *lane.simdgroup, address, bytes, write, atomic ? BY_ATOMIC : BY_THREAD, lane.thread, {0, pc});
}

// By an operation of a whole scope. A read that the same operation's write follows is not remembered: it would seem to
// race with it.
static void collective_access(const Scope &scope, char *address, unsigned long bytes, bool write, bool remember) {
  if (bytes == 0) return;
  unsigned thread = (unsigned)(scope.first - scope.context.simdgroups) * 32;
  touch(scope.context, *scope.first, address, bytes, write, scope.simdgroups == 1 ? BY_SIMDGROUP : BY_THREADGROUP, thread,
        {scope.line, 0}, remember);
}

static void clear_threadgroup_shadow(Context &context) {
  for (unsigned i = 0; i < context.region_count; ++i) {
    Region &region = context.regions[i];
    if (!region.buffer) memset(region.cells, 0, ((region.bytes >> region.shift) + 1) * sizeof(Cell));
  }
}

#define PC ((uintptr_t)__builtin_return_address(0) - 1)
// The pass promises this alignment, and 16 for no more than it knows to be 8.
static inline void check_alignment(void *p, unsigned bytes, uintptr_t pc) {
  if ((uintptr_t)p & ((bytes > 8 ? 8 : bytes) - 1)) fail(0, pc, "an access through a pointer that is not aligned to its type");
}
extern "C" {
#define ACCESS(name, bytes)                                                                                            \
  void __tsan_read##name(void *p) {                                                                                    \
    check_alignment(p, bytes, PC);                                                                                     \
    access((char *)p, bytes, false, false, PC);                                                                        \
  }                                                                                                                    \
  void __tsan_write##name(void *p) {                                                                                   \
    check_alignment(p, bytes, PC);                                                                                     \
    access((char *)p, bytes, true, false, PC);                                                                         \
  }                                                                                                                    \
  void __tsan_unaligned_read##name(void *p) { access((char *)p, bytes, false, false, PC); }                            \
  void __tsan_unaligned_write##name(void *p) { access((char *)p, bytes, true, false, PC); }                            \
  void __tsan_read_write##name(void *p) {                                                                              \
    access((char *)p, bytes, false, false, PC);                                                                        \
    access((char *)p, bytes, true, false, PC);                                                                         \
  }                                                                                                                    \
  void __tsan_unaligned_read_write##name(void *p) {                                                                    \
    access((char *)p, bytes, false, false, PC);                                                                        \
    access((char *)p, bytes, true, false, PC);                                                                         \
  }
ACCESS(1, 1)
ACCESS(2, 2)
ACCESS(4, 4)
ACCESS(8, 8)
ACCESS(16, 16)
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void *__tsan_memset(void *d, int value, unsigned long bytes) {
  access((char *)d, bytes, true, false, PC);
  return memset(d, value, bytes);
}
void *__tsan_memcpy(void *d, const void *s, unsigned long bytes) {
  access((char *)s, bytes, false, false, PC);
  access((char *)d, bytes, true, false, PC);
  return memcpy(d, s, bytes);
}
void *__tsan_memmove(void *d, const void *s, unsigned long bytes) {
  access((char *)s, bytes, false, false, PC);
  access((char *)d, bytes, true, false, PC);
  return memmove(d, s, bytes);
}

struct SourceLocation { // of compiler-rt's handlers
  const char *file;
  unsigned line, column;
};
#define UNDEFINED(name, text)                                                                                          \
  void __ubsan_handle_##name(SourceLocation *at, uintptr_t, uintptr_t) { fail((int)at->line, 0, text); }
UNDEFINED(add_overflow, "signed addition overflows")
UNDEFINED(sub_overflow, "signed subtraction overflows")
UNDEFINED(mul_overflow, "signed multiplication overflows")
UNDEFINED(negate_overflow, "signed negation overflows")
UNDEFINED(divrem_overflow, "integer division by zero, or its result overflows")
UNDEFINED(shift_out_of_bounds, "a shift by more than the width of the type, or by a negative number")
void __ubsan_handle_out_of_bounds(SourceLocation *at, uintptr_t index) {
  fail((int)at->line, 0, "array index %ld is out of range", (long)index);
}
}
