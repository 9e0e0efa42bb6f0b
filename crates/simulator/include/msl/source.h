// Where a parameter of a kernel comes from: what rewrite.rs names for every target, and the driver reads as numbers
// (src/library.rs).
#pragma once

enum msl_source_kind : unsigned {
  MSL_BUFFER,
  MSL_THREADGROUP_MEMORY,
  MSL_THREAD_POSITION_IN_GRID,
  MSL_THREADGROUP_POSITION_IN_GRID,
  MSL_THREAD_POSITION_IN_THREADGROUP,
  MSL_THREADS_PER_GRID,
  MSL_THREADS_PER_THREADGROUP,
  MSL_THREADGROUPS_PER_GRID,
  MSL_THREAD_INDEX_IN_THREADGROUP,
  MSL_SIMDGROUP_INDEX_IN_THREADGROUP,
  MSL_THREAD_INDEX_IN_SIMDGROUP,
  MSL_SIMDGROUPS_PER_THREADGROUP,
  MSL_THREADS_PER_SIMDGROUP,
};

// Where a parameter of a kernel comes from: its [[attribute(index)]].
struct msl_source {
  msl_source_kind kind;
  unsigned index;
};
