//! How the tensorops kernels make their products, and how their tiles are chosen.
//!
//! Nothing here was measured by this project. The choices are those of the published kernels that were measured on an
//! M5: 4 simdgroups of 16 rows, 32 keys, at most 128 columns of O a tensor (xwen, MLX, kvad, ccv; docs/planner.md).

use std::fmt;

use super::gpu::Gpu;
use super::occupancy::THREADGROUP_MEMORY;
use super::reason::Reason;
use super::tile::{FRAGMENT, MetalTile, QueryHome, ROW_PADDING};
use crate::settings::Switch;
use crate::{Dtype, Lengths, Problem, Settings, Strides, Tier};

/// Rows and columns that the sizes of a `matmul2d` are multiples of.
pub const MATRIX: usize = 16;
/// Row fragments of a simdgroup: 16 rows, what the matrix units take. 8 and 32 were reported to be far slower.
const ROW_FRAGMENTS: usize = MATRIX / FRAGMENT;
/// Keys of a block.
const KEYS: usize = 32;
/// Simdgroups of a threadgroup.
const SIMDGROUPS: usize = 4;
/// Most columns of O in registers: 64 floats of each thread.
const MOST_COLUMNS: usize = 128;
/// Most 16-bit registers of a thread that Q may take.
const MOST_QUERY_HALVES: usize = 64;
/// Alignment in bytes of rows that `matmul2d` reads itself; that of the packed rows of published kernels.
const ROW_ALIGNMENT: usize = 16;

/// How the products of a tensorops kernel are made by `matmul2d`. Its [`MetalTile`] says what a threadgroup computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    /// Columns of Q and K of one product, a multiple of 16: all of them, or fragments.
    pub head_step: usize,
    /// Columns of V and O of one product, a multiple of 16 that divides `value_chunk`.
    pub value_step: usize,
    /// How K and V come to the product.
    pub operands: Operands,
    /// Where P is.
    pub weights: Weights,
    /// Whether float32 operands may lose bits (TF32).
    pub relaxed: bool,
    /// Whether the simdgroups of a threadgroup wait for one another at each block, so that they find it in the cache.
    pub keep_step: bool,
}

/// How K and V come to a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operands {
    /// `matmul2d` reads them from memory.
    Memory,
    /// Lanes load them element by element: any head dimension, any strides, any alignment.
    Registers,
}

/// Where P is between the two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weights {
    /// In registers, in float32.
    Registers,
    /// In registers, in the type of V.
    Narrow,
    /// In threadgroup memory, in the type of V.
    Threadgroup,
}

impl Matmul {
    /// Threadgroup memory in bytes, as the kernel declares it.
    #[must_use]
    pub const fn threadgroup_bytes(&self, tile: &MetalTile, dtype: Dtype, head_dim: usize) -> usize {
        let head_row = head_dim.next_multiple_of(self.head_step) * dtype.size() + ROW_PADDING;
        let value_row = tile.value_chunk * dtype.size() + ROW_PADDING;
        let query = if matches!(tile.query, QueryHome::Threadgroup) { tile.rows() * head_row } else { 0 };
        let staged = if tile.staged { tile.keys * (head_row + value_row) } else { 0 };
        let weights = match self.weights {
            Weights::Registers | Weights::Narrow => 0,
            Weights::Threadgroup => tile.rows() * tile.keys * dtype.size(),
        };
        // One float for each row.
        4 * tile.rows() + query + staged + weights
    }

    /// Whether the kernel can have these sizes.
    #[must_use]
    pub fn fits(&self, tile: &MetalTile, dtype: Dtype, head_dim: usize, value_dim: usize) -> bool {
        let Self { head_step, value_step, operands, .. } = *self;
        let of_matrix = |size: usize| size > 0 && size.is_multiple_of(MATRIX);
        // What matmul2d reads from device memory is whole: nobody fills it up.
        let whole = tile.staged
            || operands == Operands::Registers
            || (head_dim.is_multiple_of(head_step) && value_dim.is_multiple_of(tile.value_chunk));
        let threads = (1..=32).contains(&tile.simdgroups);
        let steps = of_matrix(head_step) && of_matrix(value_step) && tile.value_chunk.is_multiple_of(value_step);
        let sizes = of_matrix(tile.simdgroup_rows()) && of_matrix(tile.keys);
        let staged_in_registers = tile.staged && operands == Operands::Registers;
        let bytes = self.threadgroup_bytes(tile, dtype, head_dim);
        threads && steps && sizes && whole && !staged_in_registers && bytes <= THREADGROUP_MEMORY
    }
}

impl fmt::Display for Matmul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { head_step, value_step, operands, weights, relaxed, keep_step } = self;
        let operands = match operands {
            Operands::Memory => "from memory",
            Operands::Registers => "through registers",
        };
        let weights = match weights {
            Weights::Registers => "registers",
            Weights::Narrow => "registers (narrow)",
            Weights::Threadgroup => "threadgroup memory",
        };
        write!(f, "products of {head_step} and {value_step} columns, k and v {operands}, p in {weights}")?;
        if *relaxed {
            f.write_str(", relaxed precision")?;
        }
        if *keep_step {
            f.write_str(", in step")?;
        }
        Ok(())
    }
}

/// Whether `matmul2d` can read the rows of k and v of `problem` where they lie: strides that fit its 32-bit index, and
/// rows that are aligned as those of published kernels are.
#[must_use]
pub fn has_plain_rows(problem: &Problem) -> bool {
    let plain = |strides: Strides, dim: usize| {
        let Strides { batch, row, head } = strides;
        let aligned = |stride: i64| (stride * problem.dtype.size() as i64) % ROW_ALIGNMENT as i64 == 0;
        [batch, row, head].into_iter().all(aligned) && (dim as i64..=i64::from(i32::MAX)).contains(&row)
    };
    plain(problem.k, problem.head_dim) && plain(problem.v, problem.value_dim)
}

/// The tiles of `tier` for `problem`, the planner's own choice first.
///
/// # Errors
/// [`Reason::NoMatmulTile`] when no block of K and V fits in threadgroup memory.
pub(super) fn candidates(
    problem: &Problem,
    tier: Tier,
    settings: &Settings,
) -> Result<Vec<(MetalTile, Matmul)>, Reason> {
    let Problem { dtype, lengths, head_dim, value_dim, .. } = *problem;
    let staged = tier == Tier::TensoropsStaged;
    let key_len = lengths.max_key_len();
    let passes = value_dim.div_ceil(MOST_COLUMNS);
    let value_chunk = value_dim.div_ceil(passes).next_multiple_of(MATRIX);
    let whole = head_dim.is_multiple_of(MATRIX) && value_dim.is_multiple_of(value_chunk);
    let short = matches!(lengths, Lengths::Dense { .. }) && key_len < KEYS;
    let from_memory = staged || (whole && !short && has_plain_rows(problem));
    let operands = if from_memory { Operands::Memory } else { Operands::Registers };
    let (head_step, value_step) = match operands {
        Operands::Memory => (head_dim.next_multiple_of(MATRIX), value_chunk),
        Operands::Registers if value_chunk.is_multiple_of(2 * MATRIX) => (MATRIX, 2 * MATRIX),
        Operands::Registers => (MATRIX, MATRIX),
    };
    let weights = if staged && settings.v2_preuse == Switch::Off { Weights::Threadgroup } else { Weights::Registers };
    let relaxed = dtype != Dtype::F32 || settings.tf32;
    let query_halves = head_dim.next_multiple_of(MATRIX) * dtype.size() / 4;
    let nearest = if (from_memory && !staged) || weights == Weights::Threadgroup {
        // One large product with Q in registers was reported to be several times slower; who keeps P out of cooperative
        // operands does not want Q there either.
        &[QueryHome::Threadgroup, QueryHome::Device][..]
    } else if query_halves <= MOST_QUERY_HALVES {
        &[QueryHome::Registers][..]
    } else {
        &[QueryHome::Threadgroup, QueryHome::Device][..]
    };
    let most_simdgroups = lengths.max_query_len().div_ceil(MATRIX).next_power_of_two().min(SIMDGROUPS);
    let (mut in_step, mut out_of_step) = (Vec::new(), Vec::new());
    let mut bytes = usize::MAX;
    for keys in [KEYS, MATRIX] {
        for &query in nearest {
            for simdgroups in [4, 2, 1].into_iter().filter(|&simdgroups| simdgroups <= most_simdgroups) {
                let tile = MetalTile { simdgroups, row_fragments: ROW_FRAGMENTS, keys, staged, value_chunk, query };
                let keep_step = !staged && simdgroups > 1;
                let matmul = Matmul { head_step, value_step, operands, weights, relaxed, keep_step };
                if matmul.fits(&tile, dtype, head_dim, value_dim) {
                    in_step.push((tile, matmul));
                    if keep_step {
                        out_of_step.push((tile, Matmul { keep_step: false, ..matmul }));
                    }
                }
                bytes = bytes.min(matmul.threadgroup_bytes(&tile, dtype, head_dim));
            }
        }
    }
    in_step.append(&mut out_of_step);
    if in_step.is_empty() { Err(Reason::NoMatmulTile { head_dim, value_dim, dtype, bytes }) } else { Ok(in_step) }
}

/// Why `tier` does not serve `problem` on `gpu` although its kernels could; `forced` says that the user asked for it.
pub(super) fn refuses(problem: &Problem, gpu: &Gpu, tier: Tier, settings: &Settings, forced: bool) -> Option<Reason> {
    // The simulator stands for a GPU that has what was asked for.
    let simulated = forced && settings.device == crate::settings::Device::Simulator;
    if let Some(missing) = gpu.lacks_for_tensorops().filter(|_| !simulated) {
        return Some(Reason::Lacks(missing));
    }
    if forced {
        return settings
            .kernel
            .dtype()
            .filter(|&dtype| dtype != problem.dtype)
            .map(|needs| Reason::NeedsDtype { needs, found: problem.dtype });
    }
    let longest = problem.lengths.max_query_len().max(problem.lengths.max_key_len());
    if problem.dtype == Dtype::F32 && longest < settings.v2_fp32_min_seq {
        return Some(Reason::Short { longest, least: settings.v2_fp32_min_seq });
    }
    (tier == Tier::Tensorops && settings.v2_preuse == Switch::Off).then_some(Reason::WithoutPreuse)
}
