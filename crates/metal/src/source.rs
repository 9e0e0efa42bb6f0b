//! From a kernel variant to the exact text that a Metal compiler gets.

use std::fmt::Write as _;

use mtlflashattn_core::plan::occupancy::THREADGROUP_MEMORY;
use mtlflashattn_core::plan::{FRAGMENT, Matmul, MetalTile, Operands, QueryHome, Weights, decode};
use mtlflashattn_core::reference::bounds::Arithmetic;
use mtlflashattn_core::{BiasKind, Cache, CacheLayout, Dtype, Lengths, Problem, Strides, Tier};

/// The tile of the scalar kernel: 128 rows a threadgroup, and 64 columns of v in the registers or the stack of a thread.
const SCALAR_TILE: MetalTile = MetalTile {
    simdgroups: 4,
    row_fragments: 4,
    keys: FRAGMENT,
    staged: false,
    value_chunk: 64,
    query: QueryHome::Device,
};

/// Compile-time switches: a kernel contains the code of what its problem has, and nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools, reason = "features are on or off")]
pub struct Features {
    /// Sequences are packed and delimited by `cu_seqlens`.
    pub packed: bool,
    /// Keys lie in a cache.
    pub cached: bool,
    /// The cache has pages.
    pub paged: bool,
    /// Keys far before the diagonal are hidden.
    pub window_left: bool,
    /// Keys far behind the diagonal are hidden; causal attention is a right window of 0.
    pub window_right: bool,
    /// Scores pass through `softcap * tanh(score / softcap)`.
    pub softcap: bool,
    /// `ALiBi`.
    pub alibi: bool,
    /// Additive bias or boolean mask.
    pub bias: Option<BiasKind>,
    /// Attention sinks.
    pub sinks: bool,
    /// Weights are dropped.
    pub dropout: bool,
    /// The LSE is written.
    pub lse: bool,
    /// Rows of q, k and v can be read in pieces of four elements, see [`Kernel::aligned`].
    pub aligned: bool,
}

impl Features {
    /// Nothing.
    pub(crate) const NONE: Self = Self {
        packed: false,
        cached: false,
        paged: false,
        window_left: false,
        window_right: false,
        softcap: false,
        alibi: false,
        bias: None,
        sinks: false,
        dropout: false,
        lse: false,
        aligned: false,
    };

    /// What `problem` has.
    #[must_use]
    pub const fn of(problem: &Problem, lse: bool) -> Self {
        Self {
            packed: matches!(problem.lengths, Lengths::Packed { .. }),
            cached: problem.cache.is_some(),
            paged: matches!(problem.cache, Some(Cache { layout: CacheLayout::Pages { .. }, .. })),
            window_left: problem.mask.left.is_some(),
            window_right: problem.mask.right.is_some(),
            softcap: problem.softcap > 0.0,
            alibi: problem.alibi.is_some(),
            bias: match problem.bias {
                Some(bias) => Some(bias.kind),
                None => None,
            },
            sinks: problem.sinks.is_some(),
            dropout: problem.dropout.is_some(),
            lse,
            aligned: false,
        }
    }
}

impl Features {
    /// The names of those that are on.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let Self {
            packed,
            cached,
            paged,
            window_left,
            window_right,
            softcap,
            alibi,
            bias,
            sinks,
            dropout,
            lse,
            aligned,
        } = *self;
        let bias = bias.map(|kind| match kind {
            BiasKind::Boolean => "mask",
            BiasKind::Additive(Dtype::F32) => "float32 bias",
            BiasKind::Additive(Dtype::F16) => "float16 bias",
            BiasKind::Additive(Dtype::Bf16) => "bfloat16 bias",
        });
        let switches = [
            (packed, "packed"),
            (cached, "cached keys"),
            (paged, "pages"),
            (window_left, "window on the left"),
            (window_right, "causal or window on the right"),
            (softcap, "softcap"),
            (alibi, "ALiBi"),
            (sinks, "sinks"),
            (dropout, "dropout"),
            (lse, "LSE"),
            (aligned, "aligned rows"),
        ];
        switches.into_iter().filter_map(|(on, name)| on.then_some(name)).chain(bias).collect()
    }
}

/// A kernel variant. Equal variants have equal texts, so that this is the key of every cache of pipelines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Kernel {
    /// A Metal tier.
    pub tier: Tier,
    /// Element type of q, k, v and the output.
    pub dtype: Dtype,
    /// Head dimension of q and k; `None` where the kernel reads it at run time.
    pub head_dim: Option<usize>,
    /// Head dimension of v and the output; `None` where the kernel reads it at run time.
    pub value_dim: Option<usize>,
    /// Rows, keys and columns of a threadgroup.
    pub tile: MetalTile,
    /// How the products are made; present iff the tier is one of the tensorops tiers.
    pub matmul: Option<Matmul>,
    /// Code that is compiled in.
    pub features: Features,
}

impl Kernel {
    /// The scalar kernel for `problem`; `lse` says whether the LSE is wanted.
    #[must_use]
    pub const fn scalar(problem: &Problem, lse: bool) -> Self {
        let features = Features::of(problem, lse);
        Self {
            tier: Tier::Scalar,
            dtype: problem.dtype,
            head_dim: None,
            value_dim: None,
            tile: SCALAR_TILE,
            matmul: None,
            features,
        }
    }

    /// The simdgroup kernel for `problem` with a tile that [`fits`](Self::fits).
    #[must_use]
    pub const fn simdgroup(problem: &Problem, tile: MetalTile, lse: bool) -> Self {
        Self {
            tier: Tier::Simdgroup,
            dtype: problem.dtype,
            head_dim: Some(problem.head_dim),
            value_dim: Some(problem.value_dim),
            tile,
            matmul: None,
            features: Features::of(problem, lse),
        }
    }

    /// The decode kernel for `problem` with a tile that [`fits`](Self::fits).
    #[must_use]
    pub const fn decode(problem: &Problem, tile: MetalTile, lse: bool) -> Self {
        Self { tier: Tier::Decode, ..Self::simdgroup(problem, tile, lse) }
    }

    /// This kernel for tensors whose first elements lie `starts` bytes (q, k, v) behind an address that is a multiple of
    /// 16: it reads four elements at once if every row of `problem` lets it.
    #[must_use]
    pub fn aligned(mut self, problem: &Problem, starts: [usize; 3]) -> Self {
        let rows = [problem.q, problem.k, problem.v];
        let can = matches!(self.tier, Tier::Decode | Tier::Simdgroup | Tier::TensoropsStaged);
        self.features.aligned = can && is_aligned(problem, &rows, &starts);
        self
    }

    /// The tensorops kernel for `problem` with a tile and products that [`fit`](Self::fits).
    #[must_use]
    pub const fn tensorops(problem: &Problem, tile: MetalTile, matmul: Matmul, lse: bool) -> Self {
        let tier = if tile.staged { Tier::TensoropsStaged } else { Tier::Tensorops };
        Self { tier, matmul: Some(matmul), ..Self::simdgroup(problem, tile, lse) }
    }

    /// Name of the entry point in [`source`](Self::source).
    #[must_use]
    pub const fn entry(&self) -> &'static str {
        match self.tier {
            Tier::Decode => "attention_decode",
            Tier::Simdgroup => "attention_simdgroup",
            Tier::Tensorops | Tier::TensoropsStaged => "attention_tensorops",
            _ => "attention_scalar",
        }
    }

    /// The text for the Metal compiler: pure ASCII, complete, with everything specialised by `#define`s.
    #[must_use]
    pub fn source(&self) -> String {
        // Before the definitions, which could otherwise change its meaning.
        let mut text = String::from("#include <metal_stdlib>\n");
        if self.matmul.is_some() {
            text.push_str("#include <metal_tensor>\n");
            text.push_str("#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n");
            text.push_str("using namespace mpp::tensor_ops;\n");
        }
        text.push_str("using namespace metal;\n\n");
        text.push_str(&self.defines());
        text.push_str(include_str!("../kernels/common.metal"));
        text.push_str(match self.tier {
            Tier::Decode => {
                concat!(
                    include_str!("../kernels/cache.metal"),
                    include_str!("../kernels/splits.metal"),
                    include_str!("../kernels/fragments.metal"),
                    include_str!("../kernels/rows.metal"),
                    include_str!("../kernels/decode.metal")
                )
            }
            Tier::Simdgroup => {
                concat!(
                    include_str!("../kernels/fragments.metal"),
                    include_str!("../kernels/rows.metal"),
                    include_str!("../kernels/simdgroup.metal")
                )
            }
            Tier::Tensorops | Tier::TensoropsStaged => {
                concat!(
                    include_str!("../kernels/tensorops_task.metal"),
                    include_str!("../kernels/tensorops_scores.metal"),
                    include_str!("../kernels/tensorops.metal")
                )
            }
            _ => include_str!("../kernels/scalar.metal"),
        });
        text
    }

    fn defines(&self) -> String {
        let mut text = feature_defines(&self.features);
        let mut define =
            |name: &str, value: usize| writeln!(text, "#define {name} {value}").expect("writes to a string");
        define("SIMDGROUPS", self.tile.simdgroups);
        define("VALUE_CHUNK", self.tile.value_chunk);
        if let (Some(head_dim), Some(value_dim)) = (self.head_dim, self.value_dim) {
            define("HEAD_DIM", head_dim);
            define("VALUE_DIM", value_dim);
            define("ROW_FRAGMENTS", self.tile.row_fragments);
            define("KEYS", self.tile.keys);
            define("STAGED", usize::from(self.tile.staged));
            define("ALIGNED", usize::from(self.features.aligned));
            define("QUERY_IN_REGISTERS", usize::from(self.tile.query == QueryHome::Registers));
            define("QUERY_IN_THREADGROUP", usize::from(self.tile.query == QueryHome::Threadgroup));
            define("QUERY_IN_DEVICE", usize::from(self.tile.query == QueryHome::Device));
        }
        if let Some(Matmul { head_step, value_step, operands, weights, relaxed, keep_step }) = self.matmul {
            define("HEAD_STEP", head_step);
            define("VALUE_STEP", value_step);
            define("OPERANDS_IN_REGISTERS", usize::from(operands == Operands::Registers));
            define("WEIGHTS_IN_THREADGROUP", usize::from(weights == Weights::Threadgroup));
            define("WEIGHTS_NARROW", usize::from(weights == Weights::Narrow));
            define("RELAXED", usize::from(relaxed));
            define("KEEP_STEP", usize::from(keep_step));
        }
        text.push_str(&typedef_scalar(self.dtype));
        text
    }

    /// Query rows of a threadgroup; of [`Tier::Decode`] queries and heads of a group together.
    #[must_use]
    pub const fn rows(&self) -> usize {
        match self.tier {
            Tier::Decode => decode::group_rows(&self.tile),
            Tier::Simdgroup | Tier::Tensorops | Tier::TensoropsStaged => self.tile.rows(),
            _ => self.tile.threads(),
        }
    }

    /// The arithmetic that bounds the errors of the kernel.
    #[must_use]
    pub const fn arithmetic(&self) -> Arithmetic {
        match self.tier {
            Tier::Decode => Arithmetic::decode(self.dtype),
            Tier::Simdgroup => Arithmetic::metal(self.dtype),
            Tier::Tensorops | Tier::TensoropsStaged => {
                Arithmetic::matmul2d(self.dtype, matches!(self.matmul, Some(Matmul { relaxed: true, .. })))
            }
            _ => Arithmetic::metal(Dtype::F32),
        }
    }

    /// Whether `matmul2d` reads blocks of keys from device memory: sequences of a dense problem must have as many.
    #[must_use]
    pub const fn reads_whole_blocks(&self) -> bool {
        matches!(self.matmul, Some(Matmul { operands: Operands::Memory, .. })) && !self.tile.staged
    }

    /// Static threadgroup memory in bytes.
    #[must_use]
    pub const fn threadgroup_bytes(&self) -> usize {
        match (self.matmul, self.head_dim) {
            (Some(matmul), Some(head_dim)) => matmul.threadgroup_bytes(&self.tile, self.dtype, head_dim),
            (None, Some(head_dim)) if matches!(self.tier, Tier::Decode) => {
                decode::threadgroup_bytes(&self.tile, self.dtype, head_dim)
            }
            (None, Some(head_dim)) => self.tile.threadgroup_bytes(self.dtype, head_dim),
            (_, None) => 0,
        }
    }

    /// Whether the tile is one that the kernel can have: sizes in whole fragments, threads and threadgroup memory
    /// within every Apple GPU's limits.
    #[must_use]
    pub fn fits(&self) -> bool {
        if let (Some(matmul), Some(head_dim), Some(value_dim)) = (self.matmul, self.head_dim, self.value_dim) {
            return matmul.fits(&self.tile, self.dtype, head_dim, value_dim);
        }
        let MetalTile { simdgroups, row_fragments, keys, value_chunk, .. } = self.tile;
        (1..=32).contains(&simdgroups)
            && (self.tier != Tier::Decode || self.tile.staged || simdgroups.is_power_of_two())
            && row_fragments >= 1
            && keys >= FRAGMENT
            && keys.is_multiple_of(FRAGMENT)
            && value_chunk >= 1
            && value_chunk.is_multiple_of(FRAGMENT)
            && self.threadgroup_bytes() <= THREADGROUP_MEMORY
    }
}

/// Whether rows at `starts` bytes behind a multiple of 16 all begin at multiples of four elements and have as many.
pub(crate) fn is_aligned(problem: &Problem, rows: &[Strides], starts: &[usize]) -> bool {
    let is_four = |elements: i64| elements % 4 == 0;
    rows.iter().all(|at| [at.batch, at.row, at.head].into_iter().all(is_four))
        && [problem.head_dim, problem.value_dim].into_iter().all(|width| width.is_multiple_of(4))
        && starts.iter().all(|start| start.is_multiple_of(4 * problem.dtype.size()))
}

/// Definitions of what a kernel's problem has.
pub(crate) fn feature_defines(features: &Features) -> String {
    let Features {
        packed, cached, paged, window_left, window_right, softcap, alibi, bias, sinks, dropout, lse, ..
    } = *features;
    let bias_is = |kind| bias == Some(kind);
    let mut text = String::new();
    let mut define = |name: &str, value: usize| writeln!(text, "#define {name} {value}").expect("writes to a string");
    for (name, on) in [
        ("PACKED", packed),
        ("CACHED", cached),
        ("PAGED", paged),
        ("WINDOW_LEFT", window_left),
        ("WINDOW_RIGHT", window_right),
        ("SOFTCAP", softcap),
        ("ALIBI", alibi),
        ("BIAS", bias.is_some()),
        ("BIAS_BOOLEAN", bias_is(BiasKind::Boolean)),
        ("BIAS_FLOAT", bias_is(BiasKind::Additive(Dtype::F32))),
        ("BIAS_HALF", bias_is(BiasKind::Additive(Dtype::F16))),
        ("BIAS_BFLOAT", bias_is(BiasKind::Additive(Dtype::Bf16))),
        ("SINKS", sinks),
        ("DROPOUT", dropout),
        ("LSE", lse),
        ("SCORE_MODIFIED", softcap || alibi || bias.is_some()),
    ] {
        define(name, usize::from(on));
    }
    text
}

/// The element type of the tensors.
pub(crate) fn typedef_scalar(dtype: Dtype) -> String {
    let scalar = match dtype {
        Dtype::F32 => "float",
        Dtype::F16 => "half",
        Dtype::Bf16 => "bfloat",
    };
    format!("typedef {scalar} scalar;  // of q, k, v and out\n\n")
}
