//! What Apple leaves open about `matmul2d`, and so a kernel must not rely on: every choice is some GPU's or some system's.

/// Which lane has which element of a cooperative tensor. `runtime/layout.cc` has the formulas and their sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LaneLayout {
    /// Four adjacent columns of two rows that lie 8 apart, in every 16x16 fragment: M5.
    #[default]
    ContiguousQuads,
    /// Pairs of columns that lie 8 apart: in the style of the GPUs before.
    SplitPairs,
    /// The M5's after random permutations of lanes, rows, columns and slots. A lane has the same rows of all tensors of
    /// as many rows, which kernels may ask for with `is_iterator_compatible`.
    Shuffled(u64),
    /// Any lane may have any element, and some slots have none. Nothing but coordinates helps.
    Scattered(u64),
}

/// What a product in mode `multiply` does with a destination in memory. Cooperative destinations are overwritten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MemoryDestination {
    /// The product takes the place of what was there, as the mode's name says.
    #[default]
    Overwritten,
    /// The product is added, as `mtlflashattn` 0.2.0 observed on macOS 27.
    Accumulated,
}

/// What `matmul2d` reads beyond the extents of a tensor. Beyond a dynamic inner dimension it is always 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OutsideExtents {
    /// NaN: nothing there may be trusted.
    #[default]
    Poison,
    /// 0, as Apple's header promises.
    Zero,
}

/// The oldest version of macOS whose rules apply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MacOs {
    /// The first with `matmul2d`; without bfloat.
    V26_0,
    /// With bfloat.
    V26_1,
    /// What MLX and PyTorch ask for: static inner dimensions of 16 with operands in memory.
    #[default]
    V26_2,
}

impl MacOs {
    /// As `MSL_MACOS` of the headers.
    #[must_use]
    pub(crate) fn number(self) -> u32 {
        match self {
            MacOs::V26_0 => 2600,
            MacOs::V26_1 => 2601,
            MacOs::V26_2 => 2602,
        }
    }
}

/// How `matmul2d` behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TensorOps {
    /// Who has which element of a cooperative tensor.
    pub layout: LaneLayout,
    /// What becomes of a destination in memory.
    pub destination: MemoryDestination,
    /// What lies beyond the extents of a tensor.
    pub outside: OutsideExtents,
    /// Whose rules the compiler applies.
    pub macos: MacOs,
}

impl TensorOps {
    /// The layout as the runtime numbers it, and its seed.
    pub(crate) fn raw_layout(self) -> (u32, u64) {
        match self.layout {
            LaneLayout::ContiguousQuads => (0, 0),
            LaneLayout::SplitPairs => (1, 0),
            LaneLayout::Shuffled(seed) => (2, seed),
            LaneLayout::Scattered(seed) => (3, seed),
        }
    }
}
