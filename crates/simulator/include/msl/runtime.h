// What the stand-in headers ask of the runtime, and what a compiled kernel library tells its driver.
// Plain C types and no address spaces: the runtime is compiled once and linked into every kernel library.
#pragma once

#include "source.h"

extern "C" {

// ---- the launch: filled by the driver (src/library.rs mirrors these structs) ----

struct msl_position {
  unsigned thread_position_in_grid[3];
  unsigned threadgroup_position_in_grid[3];
  unsigned thread_position_in_threadgroup[3];
  unsigned threads_per_grid[3];
  unsigned threads_per_threadgroup[3];
  unsigned threadgroups_per_grid[3];
  unsigned thread_index_in_threadgroup;
  unsigned simdgroup_index_in_threadgroup;
  unsigned thread_index_in_simdgroup;
  unsigned simdgroups_per_threadgroup;
  unsigned threads_per_simdgroup;
};

struct msl_parameter {
  msl_source source;
  unsigned constant_space; // constant T*: counted apart from device reads
  unsigned writable;
  unsigned element_bytes; // of one scalar: the granule of the shadow memory
  unsigned minimum_bytes; // a reference needs the whole object
};

struct msl_entry {
  const char *name;
  void (*call)(void *const *buffers, void *const *threadgroup_memory, const msl_position *);
  const msl_parameter *parameters;
  unsigned parameter_count;
  unsigned max_threads; // [[max_total_threads_per_threadgroup(n)]], or 0
  const unsigned *array_slots; // the threadgroup arrays that its body declares
  unsigned array_slot_count;
};

struct msl_bound_buffer {
  char *address;
  unsigned long bytes;
  unsigned index, constant_space, writable, element_bytes;
  unsigned long read_bytes, written_bytes; // out
  unsigned long unwritten_bytes;           // out, only where count_unwritten
  unsigned count_unwritten, reserved;
};

struct msl_array {
  unsigned bytes, alignment, element_bytes;
};

struct msl_counters {
  unsigned long device_read_bytes, device_written_bytes, constant_read_bytes;
  unsigned long threadgroup_read_bytes, threadgroup_written_bytes;
  unsigned long matrix_multiplies, matrix_loads, matrix_stores, simd_operations;
  unsigned long simdgroup_barriers, simdgroup_hints, threadgroup_barriers, threadgroup_hints;
  unsigned long atomic_operations, same_value_races, threadgroups, threadgroup_memory_bytes;
  unsigned long live_fragments_fp32, live_fragments_16bit, live_cooperative_halves;
  unsigned long tensor_operations, tensor_multiply_adds;
};

struct msl_launch {
  const msl_entry *entry;
  msl_bound_buffer *buffers;
  unsigned buffer_count;
  unsigned threads[3], group[3];
  const unsigned *threadgroup_lengths; // bytes of [[threadgroup(n)]], by n
  unsigned threadgroup_length_count;
  unsigned poison;        // fill threadgroup memory with NaN instead of 0
  unsigned long seed;     // 0: lane order
  unsigned tensor_layout; // msl_lane_layout of mpp/cpu/runtime.h
  unsigned tensor_destination_accumulates; // a destination in memory, where the operation only multiplies
  unsigned tensor_zero_outside;            // of a tensor's extents; otherwise NaN
  unsigned reserved;
  unsigned long tensor_layout_seed;
  char *stacks;           // aligned to MSL_STACK_BYTES
  unsigned long stack_count;
  msl_counters counters;  // out
  char *error;            // out, MSL_ERROR_BYTES
  int error_line;         // out: line of the MSL text, 0 when only error_pc is known
  unsigned long error_pc; // out: offset into this library
  int error_near_line;    // out: of the last operation of the lane, for a pc outside of the text
};

// What msl_fault gets in place of an address.
enum { MSL_TIME_IS_UP = 1 };

enum { MSL_MAX_THREADS = 1024, MSL_STACK_BYTES = 1 << 18, MSL_ERROR_BYTES = 2048, MSL_MAX_ARRAYS = 64 };

// ---- what the headers call ----

// The two words at the top of a fiber's stack: its lane in the runtime, and the lane's number. This takes the place
// of thread-local storage, which is scarce for libraries that are loaded at run time.
static inline __attribute__((always_inline)) char *msl_stack_top() {
  return (char *)(((unsigned long)__builtin_frame_address(0) | (MSL_STACK_BYTES - 1)) + 1);
}
static inline __attribute__((always_inline, no_sanitize("thread"))) unsigned msl_lane() {
  return *(unsigned *)(msl_stack_top() - 8);
}

typedef void (*msl_combine)(void **slots, unsigned active);

void msl_fail(int line, const char *text);

// Where every thread of the scope must arrive. flags: bits of metal::mem_flags.
void msl_simdgroup_barrier(unsigned flags, int line);
void msl_threadgroup_barrier(unsigned flags, int line);

// Parks this lane until every live lane of the simdgroup came; the last one calls combine over all slots.
void msl_simd(const char *name, int line, void *slot, msl_combine combine);

// 8x8 tiles of a simdgroup; see runtime/matrix.cc. A handle belongs to one simdgroup and is the same in all its lanes.
// Lane 0 keeps count of the objects that name a tile: msl_matrix_retain and msl_matrix_release are for it alone.
unsigned msl_matrix_import(unsigned element_bytes, float first, float second, unsigned born, int line);
unsigned msl_matrix_load(unsigned element_bytes, float first, float second, const void *source, unsigned long stride,
                         bool transpose, int line);
// The same without the checker: the first lane reads all 64 elements. The lanes' own reads could differ only after a
// lane wrote without a barrier.
unsigned msl_matrix_load_whole(unsigned element_kind, const void *source, unsigned long stride, bool transpose, int line);
unsigned msl_matrix_multiply(unsigned element_kind, unsigned a, unsigned b, unsigned c, int line);
void msl_matrix_store(unsigned tile, const void *destination, unsigned long stride, bool transpose, int line);
void msl_matrix_read(unsigned tile, float *elements, int line);
void msl_matrix_touch(unsigned tile);
void msl_matrix_retain(unsigned tile);
void msl_matrix_release(unsigned tile);
unsigned msl_matrix_now();

// An atomic access: bounds are checked and bytes counted, races between atomics are none.
void msl_atomic(const void *address, unsigned bytes, bool reads, bool writes);

void *msl_threadgroup_array(unsigned slot);
int msl_register_array(unsigned slot, unsigned bytes, unsigned alignment, unsigned element_bytes);
}

// Element kinds of a simdgroup_matrix.
enum : unsigned { MSL_FLOAT = 4, MSL_HALF = 2, MSL_BFLOAT = 3 };
