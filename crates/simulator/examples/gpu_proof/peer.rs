//! Kernels of `mtlflashattn` 0.2.0, read from an installed copy. Their arguments are described there, beside each kernel.

use std::path::Path;

use mtlflashattn_core::Dtype;
use mtlflashattn_metal::Grid;

use crate::shape::Shape;

/// The texts as the file has them, with placeholders.
pub struct Peer {
    /// The scalar kernel and the simdgroup kernel.
    simdgroup: String,
    /// The float16 kernels on `matmul2d`.
    matmul: String,
    /// The kernel on `matmul2d` for other types.
    typed: String,
}

/// A tier of 0.2.0, by its name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerTier {
    /// One thread a row, float32.
    V0,
    /// `simdgroup_matrix`.
    V1,
    /// `matmul2d` over four simdgroups, S and P in threadgroup memory.
    V2,
    /// `matmul2d` in one simdgroup, S and P in registers.
    V2r,
}

/// A kernel of 0.2.0 for inputs of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerKernel {
    pub tier: PeerTier,
    pub dtype: Dtype,
}

impl PeerTier {
    pub const ALL: [Self; 4] = [Self::V0, Self::V1, Self::V2, Self::V2r];

    pub const fn name(self) -> &'static str {
        match self {
            Self::V0 => "v0",
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::V2r => "v2r",
        }
    }
}

impl PeerKernel {
    /// The kernel of a tier that computes for inputs of `dtype`: v0 works on copies in float32, v1 takes float16 only.
    pub fn of(tier: PeerTier, dtype: Dtype) -> Option<Self> {
        match tier {
            PeerTier::V0 => Some(Self { tier, dtype: Dtype::F32 }),
            PeerTier::V1 if dtype != Dtype::F16 => None,
            _ => Some(Self { tier, dtype }),
        }
    }

    pub const fn entry(self) -> &'static str {
        match (self.tier, self.dtype) {
            (PeerTier::V0, _) => "flash_attn_fwd",
            (PeerTier::V1, _) => "flash_attn_fwd_v1",
            (PeerTier::V2, Dtype::F16) => "flash_attn_fwd_v2",
            (PeerTier::V2, _) => "flash_attn_fwd_v2_dtype",
            (PeerTier::V2r, Dtype::F16) => "flash_attn_fwd_v2r",
            (PeerTier::V2r, _) => "flash_attn_fwd_v2r_dtype",
        }
    }

    /// Sizes; lengths are multiples of the block, so that nothing is padded.
    pub fn sizes(self, shape: Shape) -> Vec<i32> {
        let Shape { batch, heads, len, head_dim, causal, .. } = shape;
        let [batch, heads, len, head_dim] = [batch, heads, len, head_dim].map(|size| size as i32);
        let causal = i32::from(causal);
        match self.tier {
            PeerTier::V0 => vec![batch, heads, heads, len, len, head_dim, causal],
            PeerTier::V1 => vec![batch, heads, heads, len, len, len, len, head_dim, causal],
            PeerTier::V2 => vec![batch, heads, heads, len, len, causal],
            PeerTier::V2r => vec![batch, heads, heads, len, len, causal, len],
        }
    }

    pub fn grid(self, shape: Shape) -> Grid {
        let (rows, threads) = match self.tier {
            PeerTier::V0 => (64, 64),
            PeerTier::V1 | PeerTier::V2 => (32, 128),
            PeerTier::V2r => (64, 128),
        };
        Grid {
            threadgroups: [shape.len.div_ceil(rows) as u32, (shape.batch * shape.heads) as u32, 1],
            group: [threads, 1, 1],
        }
    }
}

/// Scale, softcap, window and the switch of `ALiBi`.
pub fn factors(shape: Shape) -> Vec<f32> {
    vec![(shape.head_dim as f32).powf(-0.5), 0.0, -1.0, -1.0, 0.0]
}

/// Where the part of the float16 text begins that the package makes its other v2r kernels from.
const REUSED: &str = "constant constexpr int SR";

impl Peer {
    /// Finds the texts among the raw strings of the Python file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let python = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let texts: Vec<&str> = python.split("r\"\"\"").skip(1).filter_map(|part| part.split("\"\"\"").next()).collect();
        let find = |kernel: &str| {
            let text = texts.iter().find(|text| text.contains(&format!("kernel void {kernel}(")));
            text.map(|&text| text.to_owned()).ok_or_else(|| format!("{}: no kernel {kernel}", path.display()))
        };
        let matmul = find("flash_attn_fwd_v2r")?;
        if !matmul.contains(REUSED) {
            return Err(format!("{}: the text of v2r has no '{REUSED}'", path.display()));
        }
        Ok(Self { simdgroup: find("flash_attn_fwd_v1")?, matmul, typed: find("flash_attn_fwd_v2_dtype")? })
    }

    /// The text of a kernel as the package gives it to the compiler.
    pub fn source(&self, kernel: PeerKernel, head_dim: usize) -> String {
        let scalar = match kernel.dtype {
            Dtype::F16 => "half",
            Dtype::Bf16 => "bfloat",
            Dtype::F32 => "float",
        };
        let text = match (kernel.tier, kernel.dtype) {
            (PeerTier::V0 | PeerTier::V1, _) => return self.simdgroup.clone(),
            (PeerTier::V2 | PeerTier::V2r, Dtype::F16) => self.matmul.clone(),
            (PeerTier::V2, _) => self.typed.replace("@MSL_T@", scalar).replace("@P_T@", scalar),
            (PeerTier::V2r, _) => {
                let head = self.matmul.split("kernel void").next().unwrap_or_default();
                let body = self.matmul.find(REUSED).map_or("", |at| &self.matmul[at..]);
                format!("{head}{body}")
                    .replace("flash_attn_fwd_v2r", "flash_attn_fwd_v2r_dtype")
                    .replace("half", scalar)
            }
        };
        // 16 rows a simdgroup, whatever the head dimension is.
        text.replace("@D@", &head_dim.to_string()).replace("@SR@", "16")
    }
}
