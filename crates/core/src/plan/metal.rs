//! How the tile of the simdgroup kernel is chosen for a problem and a GPU.

use std::cmp::Reverse;

use super::gpu::Gpu;
use super::occupancy::{KernelShape, Occupancy};
use super::tile::{FRAGMENT, MetalTile, QueryHome, Refusal, Traffic};
use crate::Problem;

/// Longest sequence and largest head dimension that a Metal kernel takes, so that sums of two lengths and a window bound
/// are an int32.
pub const MAX_LEN: usize = 1 << 29;

/// What a GPU generation prefers. None of it was measured by this project: the values make the planner choose the tiles
/// that published kernels ship (docs/planner.md has the sources).
#[derive(Clone, Copy, Debug)]
pub(super) struct Preference {
    /// Most 16-bit registers that leave enough threads on a core to hide loads.
    pub(super) most_halves: usize,
    /// What a byte from device memory costs, in bytes from threadgroup memory.
    device_cost: usize,
}

impl Preference {
    pub(super) const fn of(gpu: &Gpu) -> Self {
        if gpu.has_dynamic_caching() {
            // One pool holds registers, threadgroup memory and cache: staging would move each byte twice.
            Self { most_halves: 232, device_cost: 1 }
        } else {
            // 576 threads, with four registers to spare: wider blocks at head dimension 128 were slower on an M1.
            Self { most_halves: 180, device_cost: 4 }
        }
    }
}

/// What a byte from device memory costs on `gpu`, in bytes from threadgroup memory, when tiles are compared.
#[must_use]
pub const fn device_cost(gpu: &Gpu) -> usize {
    Preference::of(gpu).device_cost
}

/// Simdgroups of a threadgroup, the preferred number first: what published kernels have.
const SIMDGROUPS: [usize; 4] = [4, 8, 2, 1];
/// Row fragments of a simdgroup.
const ROW_FRAGMENTS: [usize; 2] = [1, 2];
/// Keys of a block.
pub(super) const KEYS: [usize; 3] = [32, 16, 8];
/// Numbers of passes to try, until one has a tile that is not near a spill.
pub(super) const PASSES: [usize; 10] = [1, 2, 3, 4, 5, 6, 8, 12, 16, 32];

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
    /// Quarters of the simdgroups that have no row.
    unused: usize,
    /// Bytes moved for a row and key, weighed.
    traffic: usize,
    /// Wider blocks pay less often for reductions and barriers.
    keys: Reverse<usize>,
    /// Place in [`SIMDGROUPS`].
    preference: usize,
}

impl Score {
    /// What decides between two tiles, in words that complete "chosen for".
    fn decides(&self, other: &Self) -> &'static str {
        [
            (self.near_spill == other.near_spill, "its distance from a spill"),
            (self.work == other.work, "fewer matrix products"),
            (self.idle == other.idle, "more cores with work"),
            (self.narrow == other.narrow, "more than one fragment of keys in a block"),
            (self.exposed == other.exposed, "more threads on a core"),
            (self.unused == other.unused, "fewer simdgroups without rows"),
            (self.traffic == other.traffic, "fewer bytes, weighed"),
            (self.keys == other.keys, "wider blocks of keys"),
        ]
        .into_iter()
        .find_map(|(equal, words)| (!equal).then_some(words))
        .unwrap_or("the number of simdgroups that published kernels have")
    }

    /// What a tile with the score `other` has that this one lacks at the sizes of the problem, whatever was measured at
    /// other sizes.
    fn suits_less_than(&self, other: &Self) -> Option<&'static str> {
        let worse = [
            (self.work > other.work, "fewer matrix products"),
            (self.idle > other.idle, "more cores with work"),
            (self.unused > other.unused, "fewer simdgroups without rows"),
        ];
        worse.into_iter().find_map(|(worse, words)| worse.then_some(words))
    }
}

/// A problem on a GPU, as the search for a tile sees it.
struct Search<'a> {
    problem: &'a Problem,
    gpu: &'a Gpu,
    shape: KernelShape,
    preference: Preference,
}

impl<'a> Search<'a> {
    fn new(problem: &'a Problem, gpu: &'a Gpu) -> Self {
        let shape = KernelShape::of(problem, gpu.has_bfloat());
        Self { problem, gpu, shape, preference: Preference::of(gpu) }
    }

    /// Judges every tile that is worth it.
    fn run(&self, mut visit: impl FnMut(MetalTile, Result<Score, Refusal>)) {
        let value_fragments = self.shape.value_dim.div_ceil(FRAGMENT);
        for passes in PASSES.into_iter().take_while(|&passes| passes <= value_fragments) {
            let value_chunk = value_fragments.div_ceil(passes) * FRAGMENT;
            let mut fits = false;
            self.tiles(value_chunk, |tile| {
                let score = tile.occupancy(&self.shape).map(|occupancy| self.score(&tile, &occupancy));
                fits = fits || score.is_ok_and(|score| !score.near_spill);
                visit(tile, score);
            });
            if fits {
                // More passes would only repeat more of S.
                return;
            }
        }
    }

    fn tiles(&self, value_chunk: usize, mut visit: impl FnMut(MetalTile)) {
        for keys in KEYS {
            for row_fragments in ROW_FRAGMENTS {
                for simdgroups in SIMDGROUPS {
                    // One simdgroup has nobody to share a staged block with.
                    for staged in if simdgroups == 1 { &[false][..] } else { &[false, true] } {
                        let query = QueryHome::Registers;
                        let tile = MetalTile { simdgroups, row_fragments, keys, staged: *staged, value_chunk, query };
                        visit(tile.with_nearest_query(&self.shape));
                    }
                }
            }
        }
    }

    fn score(&self, tile: &MetalTile, occupancy: &Occupancy) -> Score {
        let Self { problem, gpu, shape, preference } = self;
        let query_len = problem.lengths.max_query_len().max(1);
        let fragments = |size: usize| size.div_ceil(FRAGMENT);
        let [query, value] = [shape.head_dim, shape.value_dim].map(fragments);
        let products = tile.passes(shape.value_dim)
            * (query + fragments(tile.value_chunk))
            * (query_len.div_ceil(tile.simdgroup_rows()) * tile.row_fragments);
        // Two threadgroups for each core: one can compute while the other loads.
        let wanted = 2 * gpu.cores.max(1);
        let simdgroups = query_len.div_ceil(tile.rows()) * tile.simdgroups;
        let alone = tile.staged && occupancy.threadgroups < 2;
        let traffic = tile.traffic(shape, query_len);
        Score {
            near_spill: occupancy.is_near_spill(),
            work: 8 * products / ((query + value) * fragments(query_len)),
            idle: 4 - 4 * tile.threadgroups(problem).min(wanted) / wanted,
            narrow: tile.keys == FRAGMENT,
            exposed: occupancy.halves > preference.most_halves || alone,
            unused: 4 * (simdgroups - query_len.div_ceil(tile.simdgroup_rows())) / simdgroups,
            traffic: preference.device_cost * traffic.device + traffic.threadgroup,
            keys: Reverse(tile.keys),
            preference: SIMDGROUPS.iter().position(|&count| count == tile.simdgroups).unwrap_or(SIMDGROUPS.len()),
        }
    }
}

/// The tiles that `problem` can have on `gpu`, the planner's own choice first.
///
/// # Errors
/// The refusal of the tile that needs the least, when every tile is refused.
pub fn candidates(problem: &Problem, gpu: &Gpu) -> Result<Vec<MetalTile>, Refusal> {
    let mut tiles: Vec<(Score, MetalTile)> = Vec::new();
    let mut least = Refusal::Spills { halves: usize::MAX };
    Search::new(problem, gpu).run(|tile, score| match score {
        Ok(score) => tiles.push((score, tile)),
        Err(refusal) => least = lesser(least, refusal),
    });
    // Equals stay in the order of the search.
    tiles.sort_by_key(|&(score, _)| score);
    if tiles.is_empty() { Err(least) } else { Ok(tiles.into_iter().map(|(_, tile)| tile).collect()) }
}

/// What the planner's own choice for `problem` has and `tile` lacks at these sizes, if anything.
pub(super) fn objection(problem: &Problem, gpu: &Gpu, default: &MetalTile, tile: &MetalTile) -> Option<&'static str> {
    let search = Search::new(problem, gpu);
    let score = |tile: &MetalTile| Some(search.score(tile, &tile.occupancy(&search.shape).ok()?));
    score(tile)?.suits_less_than(&score(default)?)
}

/// The refusal that is closer to a tile that runs. Only registers can refuse all tiles: small direct ones need no
/// threadgroup memory and few threads.
pub(super) fn lesser(left: Refusal, right: Refusal) -> Refusal {
    match (left, right) {
        (Refusal::Spills { halves: a }, Refusal::Spills { halves: b }) if b < a => right,
        _ => left,
    }
}

/// Why a tile was chosen, and what the model says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What the tile was chosen for.
    pub shape: KernelShape,
    /// Registers and threads, as predicted.
    pub occupancy: Occupancy,
    /// Bytes moved for one query row and one key, times 1024.
    pub traffic: Traffic,
    /// Tiles that were judged.
    pub judged: usize,
    /// Those of them that must spill.
    pub spilling: usize,
    /// Those of them that need more threadgroup memory than there is.
    pub oversized: usize,
    /// The best tile that reads K and V the other way (direct instead of staged, or the reverse), with what decided
    /// against it.
    pub rival: Option<(MetalTile, &'static str)>,
}

/// Explains the choice of `tile` for `problem` on `gpu`; `None` for a tile that the GPU cannot have.
#[must_use]
pub fn explain(problem: &Problem, gpu: &Gpu, tile: &MetalTile) -> Option<Explanation> {
    let search = Search::new(problem, gpu);
    let shape = search.shape;
    let occupancy = tile.occupancy(&shape).ok()?;
    let chosen = search.score(tile, &occupancy);
    let [mut judged, mut spilling, mut oversized] = [0; 3];
    let mut rival: Option<(Score, MetalTile)> = None;
    search.run(|other, score| {
        judged += 1;
        match score {
            Ok(score) if other.staged != tile.staged && rival.is_none_or(|(best, _)| score < best) => {
                rival = Some((score, other));
            }
            Ok(_) => {}
            Err(Refusal::Spills { .. }) => spilling += 1,
            Err(Refusal::ThreadgroupMemory { .. } | Refusal::Threads { .. }) => oversized += 1,
        }
    });
    let traffic = tile.traffic(&shape, problem.lengths.max_query_len());
    let rival = rival.map(|(score, tile)| (tile, chosen.decides(&score)));
    Some(Explanation { shape, occupancy, traffic, judged, spilling, oversized, rival })
}
