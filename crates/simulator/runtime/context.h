// The state of one dispatch. Every thread of the running threadgroup is a fiber; the fibers take turns on the
// operating system's thread that called msl_run, so that several dispatches may run side by side in one process.
#pragma once
#include "../include/mpp/cpu/runtime.h"
#include "../include/msl/runtime.h"
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Context;
struct Simdgroup;

struct Lane {
  void *stack_pointer;
  Context *context;
  Simdgroup *simdgroup;
  msl_position position;
  unsigned thread, lane;
  unsigned tile_offset;   // where this lane's first element lies in a tile
  unsigned passed;        // operations of the simdgroup that this lane has passed
  const char *waits_for;  // for messages
  int line;
};

enum OperationKind : unsigned {
  SIMD,
  SIMDGROUP_BARRIER,
  THREADGROUP_BARRIER,
  TENSOR,        // of one simdgroup
  TENSOR_OF_ALL, // of all simdgroups of a threadgroup
  MATRIX_IMPORT,
  MATRIX_LOAD,
  MATRIX_LOAD_WHOLE,
  MATRIX_MULTIPLY,
  MATRIX_STORE,
};

// What all lanes of a simdgroup do together. The first lane to come writes it down, the others must bring the same.
struct Operation {
  OperationKind kind;
  int line;
  unsigned a, b, c, flags;
  const void *address;
  unsigned long stride;
  // not compared
  unsigned element_kind;
  unsigned result;
  unsigned passed; // mask of lanes
  const char *name;
};

struct Tile {
  alignas(32) float at[64]; // row by row, in fp32 whatever the element type
  unsigned references, element_kind, born, last_use;
  bool ready;
  unsigned next_free;
};

// A tile that lane 0 has let go; the others have when they passed `after`.
struct Departure {
  unsigned tile, after;
};

// The window and its tiles fit the first-level cache.
enum { WINDOW = 64, MAX_SIMDGROUPS = MSL_MAX_THREADS / 32 };

// Counts of live fragments by operation, as differences.
struct Liveness {
  int *difference_fp32, *difference_16bit;
  int *difference_halves; // 16-bit registers of cooperative tensors
  unsigned capacity;
};

struct Simdgroup {
  unsigned alive, ready;      // masks of lanes
  unsigned waiting;           // lanes parked until an operation completes
  unsigned at_barrier;        // lanes parked in a threadgroup_barrier
  unsigned first, next;       // operations [first, next) were passed by some lanes, not by all
  unsigned segment[2];        // changes with every barrier that orders memory: [0] threadgroup, [1] device
  alignas(64) Operation window[WINDOW];
  void *slots[32];
  msl_combine combine; // of the one operation that lanes wait in with slots
  Tile *tiles; // tile 0 is none
  unsigned tile_capacity, tile_count, free_tiles;
  Departure *departures; // a queue: lane 0 lets go in order
  unsigned departure_capacity, first_departure, departure_count;
  Liveness liveness;
};

// The threads of a tensor operation, each with what it brought in its slot.
struct Scope {
  Context &context;
  Simdgroup *first;
  unsigned simdgroups;
  int line;

  const void *slot(unsigned thread) const { return first[thread / 32].slots[thread % 32]; }
  unsigned threads() const { return simdgroups * 32; }
};
typedef void (*ExecuteTensor)(const Scope &);

// Who touched a place: threadgroup << 32 | segment << 12 | accessor << 10 | thread. Of an operation that a whole scope
// executes nobody knows which lane touches what; its thread is the scope's first.
typedef uint64_t Record;
enum Accessor : unsigned { BY_THREAD, BY_ATOMIC, BY_SIMDGROUP, BY_THREADGROUP };
struct Cell {
  Record written;
  Record read;                // the last reader,
  Record read_by_other_group; // the last one of another simdgroup than that,
  Record read_by_neighbour;   // and the last other lane of the same one
};

// A piece of memory that a kernel may touch.
struct Region {
  char *base;
  unsigned long bytes;
  Cell *cells; // one per granule of 1 << shift bytes, or null: nothing writes here
  unsigned shift;
  msl_bound_buffer *buffer; // null: a threadgroup array
  unsigned slot;
};

enum { RED_ZONE = 2048, THREADGROUP_MEMORY_LIMIT = 32768 };
enum { MAX_REGIONS = MSL_MAX_ARRAYS + 64 };

// Where the text made an access: a line, or a place in the code.
struct Site {
  int line;
  uintptr_t pc;
};

struct PendingWrite {
  char *address;
  unsigned bytes;
  char before[16];
  Record other;
  Site site;
};

enum { MAX_LAYOUTS = 64 };

struct Context {
  msl_launch *launch;
  void *main_stack_pointer;
  Lane *current;
  Lane lanes[MSL_MAX_THREADS];
  Simdgroup simdgroups[MAX_SIMDGROUPS];
  unsigned threads, simdgroup_count, alive_threads;
  unsigned arrived_simdgroups, barrier_generation;
  Operation barrier;
  unsigned long random;
  bool failed;

  char *arena; // threadgroup memory: arrays with red zones around each
  unsigned long arena_bytes;
  void *array_address[MSL_MAX_ARRAYS];
  void *threadgroup_arguments[MSL_MAX_ARRAYS];
  void *buffer_addresses[32];

  Region regions[MAX_REGIONS];
  unsigned region_count;
  Region *last_region;
  uint64_t threadgroup_number;
  unsigned next_segment[2], group_segment[2]; // the newest segment, and the first one after the last threadgroup barrier
  PendingWrite pending;

  msl_layout *layouts[MAX_LAYOUTS]; // of the cooperative tensors that were asked for
  unsigned layout_count;
  float *scratch; // where a tensor operation puts its operands
  unsigned long scratch_floats;
};

static inline Lane *current_lane() { return *(Lane **)(msl_stack_top() - 16); }

// False while the library's own initialisers run, which the checker must not watch: there is no fiber yet.
static bool initialised;

[[noreturn]] static void fail(int line, uintptr_t pc, const char *format, ...) __attribute__((format(printf, 3, 4)));

#if MSL_CHECK_LAYER
static void check_pending(Context &context);
static void clear_threadgroup_shadow(Context &context);
static void collective_access(const Scope &scope, char *address, unsigned long bytes, bool write, bool remember);
#else
static inline void check_pending(Context &) {}
static inline void clear_threadgroup_shadow(Context &) {}
static inline void collective_access(const Scope &, char *, unsigned long, bool, bool) {}
#endif
