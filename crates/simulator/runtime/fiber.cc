// Switching between fibers, and the schedule.

extern "C" void msl_switch(void **save, void *load);
extern "C" char __ehdr_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

#if defined(__x86_64__)
asm(R"(
.text
.hidden msl_switch
.globl msl_switch
.p2align 4
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
)");
enum { SAVED_WORDS = 6 }; // then comes the return address
#elif defined(__aarch64__)
asm(R"(
.text
.hidden msl_switch
.globl msl_switch
.p2align 4
msl_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
)");
enum { SAVED_WORDS = 20 };
#else
#error the fibers need x86-64 or aarch64
#endif

static void fail(int line, uintptr_t pc, const char *format, ...) {
  Lane &lane = *current_lane();
  Context &context = *lane.context;
  msl_launch &launch = *context.launch;
  char text[1500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const unsigned *group = lane.position.threadgroup_position_in_grid;
  snprintf(launch.error, MSL_ERROR_BYTES, "%s [threadgroup (%u, %u, %u) simdgroup %u lane %u]", text, group[0], group[1],
           group[2], lane.position.simdgroup_index_in_threadgroup, lane.lane);
  launch.error_line = line;
  launch.error_near_line = lane.line;
  launch.error_pc = pc ? pc - (uintptr_t)&__ehdr_start : 0;
  context.failed = true;
  void *abandoned;
  msl_switch(&abandoned, context.main_stack_pointer);
  __builtin_unreachable();
}

static void to_main(Lane &lane) { msl_switch(&lane.stack_pointer, lane.context->main_stack_pointer); }

static unsigned long next_random(Context &context) { // Knuth's MMIX generator; the high bits are the good ones
  context.random = context.random * 6364136223846793005ul + 1442695040888963407ul;
  return context.random >> 33;
}

static unsigned nth_bit(unsigned mask, unsigned n) {
  while (n--) mask &= mask - 1;
  return (unsigned)__builtin_ctz(mask);
}

// The next lane to run: in order within the simdgroup and then the next simdgroup, or any one at random.
static Lane *pick(Context &context, Lane &from) {
  unsigned count = context.simdgroup_count;
  if (context.launch->seed != 0) {
    unsigned start = (unsigned)(next_random(context) % count);
    for (unsigned i = 0; i < count; ++i) {
      unsigned group = (start + i) % count, ready = context.simdgroups[group].ready;
      if (!ready) continue;
      unsigned lane = nth_bit(ready, (unsigned)(next_random(context) % (unsigned)__builtin_popcount(ready)));
      return &context.lanes[group * 32 + lane];
    }
    return nullptr;
  }
  unsigned group = from.thread / 32;
  unsigned after = from.lane == 31 ? 0 : context.simdgroups[group].ready & ~0u << (from.lane + 1);
  if (after) return &context.lanes[group * 32 + (unsigned)__builtin_ctz(after)];
  for (unsigned i = 0; i < count; ++i, group = group + 1 == count ? 0 : group + 1) {
    unsigned ready = context.simdgroups[group].ready;
    if (ready) return &context.lanes[group * 32 + (unsigned)__builtin_ctz(ready)];
  }
  return nullptr;
}

static void report_deadlock(Context &context, Lane &lane) {
  char text[1200];
  int used = snprintf(text, sizeof text, "divergence:");
  for (unsigned i = 0; i < context.simdgroup_count && used < 900; ++i) {
    Simdgroup &group = context.simdgroups[i];
    if (group.first == group.next) continue;
    Operation &operation = group.window[group.first % WINDOW];
    used += snprintf(text + used, sizeof text - (size_t)used, " simdgroup %u: lanes %08x wait in %s at line %d,", i,
                     operation.passed, operation.name, operation.line);
    unsigned others = group.alive & ~operation.passed;
    if (others) {
      Lane &other = context.lanes[i * 32 + (unsigned)__builtin_ctz(others)];
      used += snprintf(text + used, sizeof text - (size_t)used, " lanes %08x in %s at line %d;", others,
                       other.waits_for ? other.waits_for : "nothing", other.line);
    }
  }
  if (context.arrived_simdgroups)
    snprintf(text + used, sizeof text - (size_t)used, " %u of %u simdgroups wait in %s at line %d",
             context.arrived_simdgroups, context.simdgroup_count, context.barrier.name, context.barrier.line);
  fail(lane.line, 0, "%s", text);
}

static void yield_from(Lane &lane) {
  Context &context = *lane.context;
  Lane *next = pick(context, lane);
  if (!next) report_deadlock(context, lane);
  if (next == &lane) return;
  context.current = next;
  msl_switch(&lane.stack_pointer, next->stack_pointer);
}
