//! How the simdgroup kernel cuts a problem, and how its tile is chosen.

use std::cmp::Reverse;
use std::fmt;

use super::gpu::Gpu;
use super::occupancy::{KernelShape, MOST_HALVES, Occupancy, THREADGROUP_MEMORY};
use crate::{Lengths, Problem};

/// Rows and columns of one `simdgroup_matrix`, the unit of every size of a [`MetalTile`].
pub const FRAGMENT: usize = 8;

/// The tile of the simdgroup kernel: what one threadgroup computes, and what its registers hold.
///
/// A threadgroup has `simdgroups` simdgroups of 32 threads. Each simdgroup owns `row_fragments` times 8 query rows and
/// walks over blocks of `keys` keys. Its registers hold S and P of one block (`keys` columns) and O (`value_chunk`
/// columns, float32) with the running maximum and sum of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MetalTile {
    /// Simdgroups of a threadgroup; each has rows of its own.
    pub simdgroups: usize,
    /// 8-row fragments that a simdgroup holds.
    pub row_fragments: usize,
    /// Keys of a block; a multiple of 8.
    pub keys: usize,
    /// Whether a block of K and of V is copied to threadgroup memory for all simdgroups, or read by each simdgroup from
    /// device memory.
    pub staged: bool,
    /// Columns of V and O that one pass over the keys computes; a multiple of 8. Where it is less than `value_dim`
    /// there are [`passes`](Self::passes), independent of one another, and each computes S anew.
    pub value_chunk: usize,
    /// Where Q lives.
    pub query: QueryHome,
}

/// Where a simdgroup keeps its rows of Q while it walks over the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueryHome {
    /// In registers.
    Registers,
    /// In threadgroup memory, each lane its own elements, so that nobody waits for anybody.
    Threadgroup,
    /// In device memory, read again for every block of keys.
    Device,
}

impl QueryHome {
    /// Nearest first.
    const ALL: [Self; 3] = [Self::Registers, Self::Threadgroup, Self::Device];

    /// Name for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Registers => "registers",
            Self::Threadgroup => "threadgroup",
            Self::Device => "device",
        }
    }
}

impl MetalTile {
    /// Threads of a threadgroup.
    #[must_use]
    pub const fn threads(&self) -> usize {
        self.simdgroups * 32
    }

    /// Query rows of a simdgroup.
    #[must_use]
    pub const fn simdgroup_rows(&self) -> usize {
        self.row_fragments * FRAGMENT
    }

    /// Query rows of a threadgroup.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.simdgroups * self.simdgroup_rows()
    }

    /// Passes over the keys that `value_dim` columns take.
    #[must_use]
    pub const fn passes(&self, value_dim: usize) -> usize {
        value_dim.div_ceil(self.value_chunk)
    }
}

impl fmt::Display for MetalTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { simdgroups, row_fragments, keys, staged, value_chunk, query } = self;
        let (source, query) = (if *staged { "staged" } else { "direct" }, query.name());
        write!(
            f,
            "{simdgroups} simdgroups of {row_fragments}x8 rows, {keys} keys ({source}), {value_chunk} value columns, \
             q in {query}"
        )
    }
}

/// Why a kernel cannot have a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its fragments alone fill more registers than a thread has.
    Spills {
        /// 16-bit registers needed.
        halves: usize,
    },
    /// Its blocks of K and V do not fit in threadgroup memory.
    ThreadgroupMemory {
        /// Bytes needed.
        bytes: usize,
    },
    /// Its threadgroup has more threads than a core can hold with their registers.
    Threads {
        /// Threads of the threadgroup.
        threads: usize,
        /// Threads that fit.
        most: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spills { halves } => write!(f, "{halves} 16-bit registers of {MOST_HALVES}"),
            Self::ThreadgroupMemory { bytes } => {
                write!(f, "{bytes} bytes of threadgroup memory of {THREADGROUP_MEMORY}")
            }
            Self::Threads { threads, most } => write!(f, "{threads} threads at once where {most} fit"),
        }
    }
}

impl MetalTile {
    /// This tile with Q as near as it can be without a spill, or more threadgroup memory than there is.
    #[must_use]
    pub fn with_nearest_query(self, shape: &KernelShape) -> Self {
        let at = |query| Self { query, ..self };
        let fits = |tile: &Self| {
            let occupancy = Occupancy::predict(tile, shape);
            !occupancy.is_near_spill() && occupancy.threadgroup_bytes <= THREADGROUP_MEMORY
        };
        QueryHome::ALL.into_iter().map(at).find(fits).unwrap_or(at(QueryHome::Device))
    }

    /// What the model says about the kernel of this tile and `shape`.
    ///
    /// # Errors
    /// [`Refusal`] when no compiler could make it run well, or no pipeline could be made of it at all.
    pub fn occupancy(&self, shape: &KernelShape) -> Result<Occupancy, Refusal> {
        let occupancy = Occupancy::predict(self, shape);
        if occupancy.must_spill() {
            return Err(Refusal::Spills { halves: occupancy.halves });
        }
        if occupancy.threadgroup_bytes > THREADGROUP_MEMORY {
            return Err(Refusal::ThreadgroupMemory { bytes: occupancy.threadgroup_bytes });
        }
        if self.threads() > occupancy.threads {
            return Err(Refusal::Threads { threads: self.threads(), most: occupancy.threads });
        }
        Ok(occupancy)
    }

    /// Bytes that move for one query row and one key, times 1024: K and V, and Q where it is not in registers, which is
    /// then read for each fragment of keys.
    /// Rows beyond `query_len` do not count.
    #[must_use]
    pub fn traffic(&self, shape: &KernelShape, query_len: usize) -> Traffic {
        let size = shape.dtype.size();
        let query_columns = self.passes(shape.value_dim) * shape.head_dim.next_multiple_of(FRAGMENT);
        let bytes = 1024 * size * (query_columns + shape.value_dim.next_multiple_of(FRAGMENT));
        let by_simdgroup = bytes / self.simdgroup_rows().min(query_len.max(1));
        let by_threadgroup = bytes / self.rows().min(query_len.max(1));
        let mut traffic = if self.staged {
            Traffic { device: by_threadgroup, threadgroup: by_threadgroup + by_simdgroup }
        } else {
            Traffic { device: by_simdgroup, threadgroup: 0 }
        };
        let query_bytes = 1024 * size * query_columns / FRAGMENT;
        match self.query {
            QueryHome::Registers => {}
            QueryHome::Threadgroup => traffic.threadgroup += query_bytes,
            QueryHome::Device => traffic.device += query_bytes,
        }
        traffic
    }

    /// Threadgroups that the rows of `problem` make, not counting passes.
    #[must_use]
    pub fn threadgroups(&self, problem: &Problem) -> usize {
        let blocks = match problem.lengths {
            Lengths::Dense { batch, query_len, .. } => batch * query_len.div_ceil(self.rows()),
            // Sequences end inside a block: on average half a block each is empty.
            Lengths::Packed { batch, total_query, .. } => total_query.div_ceil(self.rows()) + batch / 2,
        };
        blocks * problem.query_heads
    }
}

/// Bytes moved for one query row and one key, times 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Read from device memory.
    pub device: usize,
    /// Read from and written to threadgroup memory.
    pub threadgroup: usize,
}

/// What a GPU generation prefers. None of it was measured by this project: the values make the planner choose the tiles
/// that published kernels ship (docs/planner.md has the sources).
#[derive(Clone, Copy, Debug)]
struct Preference {
    /// Widest block of keys.
    most_keys: usize,
    /// Fewest threads of a core that hide the latency of loads.
    enough_threads: usize,
    /// What a byte from device memory costs, in bytes from threadgroup memory.
    device_cost: usize,
}

impl Preference {
    const fn of(gpu: &Gpu) -> Self {
        if gpu.has_dynamic_caching() {
            // One pool holds registers, threadgroup memory and cache: staging would move each byte twice.
            Self { most_keys: 64, enough_threads: 448, device_cost: 1 }
        } else {
            Self { most_keys: 32, enough_threads: 576, device_cost: 4 }
        }
    }
}

const SIMDGROUPS: [usize; 4] = [4, 8, 2, 1];
const ROW_FRAGMENTS: [usize; 2] = [1, 2];
const KEYS: [usize; 4] = [64, 32, 16, 8];
/// Numbers of passes to try.
const PASSES: [usize; 10] = [1, 2, 3, 4, 5, 6, 8, 12, 16, 32];

/// The judgement on a tile; the order of the fields is the order of their weight, and less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    /// In the last class of registers: within the model's error of a spill.
    near_spill: bool,
    /// Matrix products, in eighths of what the problem needs: passes repeat S, and rows are filled up to fragments.
    work: usize,
    /// Quarters of the GPU that stay without a threadgroup.
    idle: usize,
    /// A block of one fragment: each fragment of S pays for the reductions of a whole block.
    narrow: bool,
    /// Too few threads to hide loads, or a staged threadgroup alone on its core while it waits at barriers.
    exposed: bool,
    /// Bytes moved for a row and key, weighed.
    traffic: usize,
    /// Wider blocks pay less often for reductions and barriers.
    keys: Reverse<usize>,
    /// Place in [`SIMDGROUPS`].
    preference: usize,
}

/// Every tile of the search for `shape`.
fn candidates(shape: &KernelShape, most_keys: usize) -> impl Iterator<Item = MetalTile> + use<> {
    let value_fragments = shape.value_dim.div_ceil(FRAGMENT);
    let chunks = PASSES.into_iter().map(move |passes| value_fragments.div_ceil(passes) * FRAGMENT);
    let mut previous = 0;
    let chunks = chunks.filter(move |&chunk| std::mem::replace(&mut previous, chunk) != chunk);
    chunks.flat_map(move |value_chunk| {
        KEYS.into_iter().filter(move |&keys| keys <= most_keys).flat_map(move |keys| {
            ROW_FRAGMENTS.into_iter().flat_map(move |row_fragments| {
                SIMDGROUPS.into_iter().flat_map(move |simdgroups| {
                    // One simdgroup has nobody to share a staged block with.
                    let staged = if simdgroups == 1 { &[false][..] } else { &[false, true] };
                    staged.iter().map(move |&staged| MetalTile {
                        simdgroups,
                        row_fragments,
                        keys,
                        staged,
                        value_chunk,
                        query: QueryHome::Registers,
                    })
                })
            })
        })
    })
}

fn score(tile: &MetalTile, shape: &KernelShape, occupancy: &Occupancy, problem: &Problem, gpu: &Gpu) -> Score {
    let preference = Preference::of(gpu);
    let query_len = problem.lengths.max_query_len().max(1);
    let fragments = |columns: usize| columns.div_ceil(FRAGMENT);
    let [query, value] = [fragments(shape.head_dim), fragments(shape.value_dim)];
    let products = (tile.passes(shape.value_dim) * query + tile.passes(shape.value_dim) * fragments(tile.value_chunk))
        * query_len.div_ceil(tile.simdgroup_rows())
        * tile.row_fragments;
    // Two threadgroups for each core: one can compute while the other loads.
    let wanted = 2 * gpu.cores.max(1);
    let alone = tile.staged && occupancy.threadgroups < 2;
    let traffic = tile.traffic(shape, query_len);
    Score {
        near_spill: occupancy.is_near_spill(),
        work: 8 * products / ((query + value) * fragments(query_len)),
        idle: 4 - 4 * tile.threadgroups(problem).min(wanted) / wanted,
        narrow: tile.keys == FRAGMENT,
        exposed: occupancy.threads < preference.enough_threads || alone,
        traffic: preference.device_cost * traffic.device + traffic.threadgroup,
        keys: Reverse(tile.keys),
        preference: SIMDGROUPS.iter().position(|&count| count == tile.simdgroups).unwrap_or(SIMDGROUPS.len()),
    }
}

/// The best tile for `problem` on `gpu`.
///
/// # Errors
/// The refusal of the tile that needs the least, when every tile is refused.
pub(super) fn choose(problem: &Problem, gpu: &Gpu) -> Result<MetalTile, Refusal> {
    let shape = KernelShape::of(problem, gpu.has_bfloat());
    let mut best: Option<(Score, MetalTile)> = None;
    let mut least = Refusal::Spills { halves: usize::MAX };
    for tile in candidates(&shape, Preference::of(gpu).most_keys) {
        let tile = tile.with_nearest_query(&shape);
        match tile.occupancy(&shape) {
            Ok(occupancy) => {
                let score = score(&tile, &shape, &occupancy, problem, gpu);
                if best.is_none_or(|(best, _)| score < best) {
                    best = Some((score, tile));
                }
            }
            Err(refusal) => least = lesser(least, refusal),
        }
    }
    best.map(|(_, tile)| tile).ok_or(least)
}

/// The refusal that is closer to a tile that runs. Only registers can refuse all tiles: small direct ones need no
/// threadgroup memory and few threads.
fn lesser(left: Refusal, right: Refusal) -> Refusal {
    match (left, right) {
        (Refusal::Spills { halves: a }, Refusal::Spills { halves: b }) if b < a => right,
        _ => left,
    }
}
