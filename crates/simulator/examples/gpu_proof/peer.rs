//! Kernels of `mtlflashattn` 0.2.0, read from an installed copy. Their arguments are described there, beside each kernel.

use std::path::Path;

use mtlflashattn_metal::Grid;

/// The text of the scalar kernel and of the simdgroup kernel.
pub struct Peer {
    pub text: String,
}

/// Sizes of a dense problem with as many key heads as query heads, tensors `[batch, heads, rows, dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub len: usize,
    pub head_dim: usize,
    pub causal: bool,
}

impl Peer {
    pub const SCALAR: &str = "flash_attn_fwd";
    pub const SIMDGROUP: &str = "flash_attn_fwd_v1";

    /// Reads the first raw string of the Python file that has the simdgroup kernel.
    pub fn read(path: &Path) -> Result<Self, String> {
        let python = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let text = python.split("r\"\"\"").skip(1).filter_map(|part| part.split("\"\"\"").next());
        let text = text.filter(|text| text.contains(Self::SIMDGROUP)).map(str::to_owned).next();
        text.map(|text| Self { text }).ok_or_else(|| format!("{}: no kernel {}", path.display(), Self::SIMDGROUP))
    }
}

/// Sizes for either kernel; lengths are multiples of the block, so that nothing is padded.
pub fn sizes(entry: &str, shape: Shape) -> Vec<i32> {
    let Shape { batch, heads, len, head_dim, causal } = shape;
    let [batch, heads, len, head_dim] = [batch, heads, len, head_dim].map(|size| size as i32);
    let causal = i32::from(causal);
    if entry == Peer::SCALAR {
        vec![batch, heads, heads, len, len, head_dim, causal]
    } else {
        vec![batch, heads, heads, len, len, len, len, head_dim, causal]
    }
}

/// Scale, softcap, window and the switch of `ALiBi`.
pub fn factors(shape: Shape) -> Vec<f32> {
    vec![(shape.head_dim as f32).powf(-0.5), 0.0, -1.0, -1.0, 0.0]
}

pub fn grid(entry: &str, shape: Shape) -> Grid {
    let (rows, threads) = if entry == Peer::SCALAR { (64, 64) } else { (32, 128) };
    Grid {
        threadgroups: [shape.len.div_ceil(rows) as u32, (shape.batch * shape.heads) as u32, 1],
        group: [threads, 1, 1],
    }
}
