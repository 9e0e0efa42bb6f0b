//! What a dispatch did.

use mtlflashattn_core::plan::occupancy::{MOST_HALVES, threads_of_core};

use crate::library::RawCounters;

/// Traffic of one buffer, in requested bytes. Counted in the check layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BufferTraffic {
    /// The index of `[[buffer(n)]]`.
    pub index: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes that no thread wrote; only for buffers named in [`Launch::must_write`](crate::Launch).
    pub unwritten_bytes: u64,
}

/// Exact and reproducible counts of what a dispatch asked for.
///
/// Bytes and live fragments are counted in the check layer only, everything else in the fast layer too. One matrix
/// operation, simd operation or barrier is one per simdgroup (or threadgroup), not one per thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes read through `device` pointers.
    pub device_read_bytes: u64,
    /// Bytes written through `device` pointers.
    pub device_written_bytes: u64,
    /// Bytes read through `constant` pointers and from constants of the program.
    pub constant_read_bytes: u64,
    /// Bytes read from threadgroup memory.
    pub threadgroup_read_bytes: u64,
    /// Bytes written to threadgroup memory.
    pub threadgroup_written_bytes: u64,
    /// 8x8x8 products.
    pub matrix_multiplies: u64,
    /// `simdgroup_load`.
    pub matrix_loads: u64,
    /// `simdgroup_store`.
    pub matrix_stores: u64,
    /// Reductions, shuffles and votes.
    pub simd_operations: u64,
    /// `simdgroup_barrier` that orders memory.
    pub simdgroup_barriers: u64,
    /// `simdgroup_barrier(mem_none)`: a hint to the scheduler.
    pub simdgroup_hints: u64,
    /// `threadgroup_barrier` that orders memory.
    pub threadgroup_barriers: u64,
    /// `threadgroup_barrier(mem_none)`.
    pub threadgroup_hints: u64,
    /// Atomic operations, one per thread.
    pub atomic_operations: u64,
    /// Bytes-wide places that several threads wrote without order, with the same value.
    pub same_value_races: u64,
    /// Threadgroups that ran.
    pub threadgroups: u64,
    /// Threadgroup memory of one threadgroup, in bytes.
    pub threadgroup_memory_bytes: u64,
    /// At the point where fragments need most registers: live fp32 fragments of a lane.
    pub live_fragments_fp32: u64,
    /// At the same point: live fragments of 16-bit elements.
    pub live_fragments_16bit: u64,
    /// At the same point: 16-bit registers of a lane that live cooperative tensors fill.
    pub live_cooperative_halves: u64,
    /// `matmul2d`, one per scope.
    pub tensor_operations: u64,
    /// Multiply-adds of `matmul2d`: m n k of each. 512 are an 8x8x8 product.
    pub tensor_multiply_adds: u64,
}

impl From<&RawCounters> for Counters {
    fn from(raw: &RawCounters) -> Self {
        Counters {
            device_read_bytes: raw.device_read_bytes,
            device_written_bytes: raw.device_written_bytes,
            constant_read_bytes: raw.constant_read_bytes,
            threadgroup_read_bytes: raw.threadgroup_read_bytes,
            threadgroup_written_bytes: raw.threadgroup_written_bytes,
            matrix_multiplies: raw.matrix_multiplies,
            matrix_loads: raw.matrix_loads,
            matrix_stores: raw.matrix_stores,
            simd_operations: raw.simd_operations,
            simdgroup_barriers: raw.simdgroup_barriers,
            simdgroup_hints: raw.simdgroup_hints,
            threadgroup_barriers: raw.threadgroup_barriers,
            threadgroup_hints: raw.threadgroup_hints,
            atomic_operations: raw.atomic_operations,
            same_value_races: raw.same_value_races,
            threadgroups: raw.threadgroups,
            threadgroup_memory_bytes: raw.threadgroup_memory_bytes,
            live_fragments_fp32: raw.live_fragments_fp32,
            live_fragments_16bit: raw.live_fragments_16bit,
            live_cooperative_halves: raw.live_cooperative_halves,
            tensor_operations: raw.tensor_operations,
            tensor_multiply_adds: raw.tensor_multiply_adds,
        }
    }
}

impl Counters {
    /// Adds the counts of another dispatch; of sizes the larger one stays.
    pub fn add(&mut self, other: &Counters) {
        self.device_read_bytes += other.device_read_bytes;
        self.device_written_bytes += other.device_written_bytes;
        self.constant_read_bytes += other.constant_read_bytes;
        self.threadgroup_read_bytes += other.threadgroup_read_bytes;
        self.threadgroup_written_bytes += other.threadgroup_written_bytes;
        self.matrix_multiplies += other.matrix_multiplies;
        self.matrix_loads += other.matrix_loads;
        self.tensor_operations += other.tensor_operations;
        self.tensor_multiply_adds += other.tensor_multiply_adds;
        self.matrix_stores += other.matrix_stores;
        self.simd_operations += other.simd_operations;
        self.simdgroup_barriers += other.simdgroup_barriers;
        self.simdgroup_hints += other.simdgroup_hints;
        self.threadgroup_barriers += other.threadgroup_barriers;
        self.threadgroup_hints += other.threadgroup_hints;
        self.atomic_operations += other.atomic_operations;
        self.same_value_races += other.same_value_races;
        self.threadgroups += other.threadgroups;
        self.threadgroup_memory_bytes = self.threadgroup_memory_bytes.max(other.threadgroup_memory_bytes);
        if other.fragment_halves() > self.fragment_halves() {
            self.live_fragments_fp32 = other.live_fragments_fp32;
            self.live_fragments_16bit = other.live_fragments_16bit;
            self.live_cooperative_halves = other.live_cooperative_halves;
        }
    }

    /// 8x8x8 products of `simdgroup_matrix` and of `matmul2d` together: what tiers are compared by.
    #[must_use]
    pub fn products(&self) -> u64 {
        self.matrix_multiplies + self.tensor_multiply_adds / 512
    }

    /// 16-bit registers of a lane that live values of matrices fill: 4 for an fp32 fragment, 2 for another, and what
    /// cooperative tensors hold.
    #[must_use]
    pub fn fragment_halves(&self) -> u64 {
        4 * self.live_fragments_fp32 + 2 * self.live_fragments_16bit + self.live_cooperative_halves
    }
}

/// 16-bit registers that a kernel needs beside its fragments: measured on kernels compiled for the M1.
const OTHER_HALVES: u64 = 30;

/// What the model of M1 and M2 GPUs (`mtlflashattn_core::plan::occupancy`) says about a kernel that ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// 16-bit registers of a thread.
    pub halves: u64,
    /// Threads of a core that they allow.
    pub threads: u64,
    /// Whether the live fragments alone need more registers than a thread has, whatever the compiler does.
    pub must_spill: bool,
}

impl Counters {
    /// The registers that the live fragments predict. Needs the check layer, which counts fragments.
    #[must_use]
    pub fn registers(&self) -> Registers {
        let halves = OTHER_HALVES + self.fragment_halves();
        let most = MOST_HALVES as u64;
        let threads = threads_of_core(halves.min(most) as usize) as u64;
        Registers { halves, threads, must_spill: self.fragment_halves() >= most }
    }
}

/// What a dispatch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Totals.
    pub counters: Counters,
    /// Per `device` and `constant` buffer, by index.
    pub buffers: Vec<BufferTraffic>,
}

impl Report {
    /// Traffic of `[[buffer(index)]]`.
    #[must_use]
    pub fn buffer(&self, index: u32) -> Option<&BufferTraffic> {
        self.buffers.iter().find(|buffer| buffer.index == index)
    }
}
