//! The `matmul2d` kernels of `mtlflashattn` 0.2.0, read from an installed copy: kernels that real Macs take.
//!
//! `PEER` names the `_kernel.py` of that package. Nothing of it is copied here; each kernel's arguments are described
//! there, beside it.

use std::env;
use std::fs;

use mtlflashattn_core::Dtype;
use mtlflashattn_metal::{Argument, Device, Grid};
use mtlflashattn_simulator::{Buffer, Launch, Report, Simulator};

/// A kernel of the package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerKernel {
    /// 32 rows a threadgroup, S and P through threadgroup memory, float16.
    V2,
    /// 16 rows a simdgroup, P in registers, float16.
    V2r,
    /// V2 for float32 and bfloat16.
    V2Dtype,
    /// V2r for float32 and bfloat16, which the package derives from its text.
    V2rDtype,
}

/// Where the part of the float16 text begins that V2r is derived from.
const REUSED: &str = "constant constexpr int SR";

/// Dense tensors `[1, heads, rows, dim]`.
#[derive(Clone, Copy, Debug)]
pub struct PeerShape {
    pub heads: usize,
    pub key_heads: usize,
    pub query_len: usize,
    pub key_len: usize,
    pub dim: usize,
    pub causal: bool,
}

/// The file that `PEER` names.
pub fn read() -> Option<String> {
    let path = env::var_os("PEER").filter(|path| !path.is_empty())?;
    Some(fs::read_to_string(&path).unwrap_or_else(|error| panic!("PEER={}: {error}", path.display())))
}

impl PeerKernel {
    pub fn entry(self) -> &'static str {
        match self {
            PeerKernel::V2 => "flash_attn_fwd_v2",
            PeerKernel::V2r => "flash_attn_fwd_v2r",
            PeerKernel::V2Dtype => "flash_attn_fwd_v2_dtype",
            PeerKernel::V2rDtype => "flash_attn_fwd_v2r_dtype",
        }
    }

    /// Whether S and P stay in registers, in the element type.
    pub fn keeps_scores(self) -> bool {
        matches!(self, PeerKernel::V2r | PeerKernel::V2rDtype)
    }

    /// Rows of a threadgroup.
    fn rows(self) -> usize {
        if self.keeps_scores() { 64 } else { 32 }
    }

    /// The text, specialised as the package does.
    pub fn source(self, python: &str, dim: usize, dtype: Dtype) -> String {
        let written = if self == PeerKernel::V2rDtype { PeerKernel::V2r } else { self };
        let signature = format!("kernel void {}(", written.entry());
        let text = python.split("r\"\"\"").skip(1).filter_map(|part| part.split("\"\"\"").next());
        let text = text.filter(|text| text.contains(&signature)).map(str::to_owned).next();
        let element = match dtype {
            Dtype::F16 => "half",
            Dtype::Bf16 => "bfloat",
            Dtype::F32 => "float",
        };
        let text = text.unwrap_or_else(|| panic!("PEER has no kernel {}", self.entry()));
        let text = if self == PeerKernel::V2rDtype { derived(&text, element) } else { text };
        let text = text.replace("@D@", &dim.to_string()).replace("@SR@", "16");
        // Its comments have dashes that are not ASCII.
        text.replace("@MSL_T@", element).replace("@P_T@", element).replace(|letter: char| !letter.is_ascii(), "-")
    }

    fn padded_key_len(self, shape: &PeerShape) -> usize {
        if self.keeps_scores() { shape.key_len.next_multiple_of(32) } else { shape.key_len }
    }

    fn sizes(self, shape: &PeerShape) -> Vec<i32> {
        let PeerShape { heads, key_heads, query_len, key_len, causal, .. } = *shape;
        let mut sizes = vec![1, heads, key_heads, query_len, key_len, usize::from(causal)];
        if self.keeps_scores() {
            sizes.push(self.padded_key_len(shape));
        }
        sizes.into_iter().map(|size| size as i32).collect()
    }

    /// Runs the kernel on bytes of its dtype and returns those of the output.
    ///
    /// # Errors
    /// What the simulator found.
    pub fn run(
        self,
        simulator: &Simulator,
        source: &str,
        shape: &PeerShape,
        element_bytes: usize,
        [q, k, v]: [&[u8]; 3],
    ) -> Result<(Vec<u8>, Report), String> {
        let text = |error: mtlflashattn_metal::DeviceError| error.to_string();
        let pipeline = simulator.pipeline(source, self.entry()).map_err(text)?;
        let row_bytes = shape.dim * element_bytes;
        let padded = |bytes: &[u8]| -> Vec<u8> {
            let heads = bytes.chunks(shape.key_len * row_bytes);
            let mut all = Vec::new();
            for head in heads {
                all.extend_from_slice(head);
                all.resize(all.len() + (self.padded_key_len(shape) - shape.key_len) * row_bytes, 0);
            }
            all
        };
        let factors = [(shape.dim as f32).powf(-0.5), 0.0, -1.0, -1.0, 0.0];
        let buffers = [
            Buffer::from_slice(q).map_err(text)?,
            Buffer::from_slice(&padded(k)).map_err(text)?,
            Buffer::from_slice(&padded(v)).map_err(text)?,
            Buffer::poisoned(shape.heads * shape.query_len * row_bytes).map_err(text)?,
            Buffer::from_slice(&self.sizes(shape)).map_err(text)?,
            Buffer::from_slice(&factors).map_err(text)?,
            Buffer::from_slice(&[0.0_f32]).map_err(text)?,
        ];
        let arguments: Vec<Argument<'_, Buffer>> = buffers.iter().map(Argument::Buffer).collect();
        let grid = Grid {
            threadgroups: [shape.query_len.div_ceil(self.rows()) as u32, shape.heads as u32, 1],
            group: [128, 1, 1],
        };
        let report = simulator.run(&pipeline, &arguments, &Launch::from(grid).with_must_write(&[3])).map_err(text)?;
        Ok((buffers[3].read(), report))
    }
}

/// V2r for another element type, as the package makes it.
fn derived(text: &str, element: &str) -> String {
    let head = text.split("kernel void").next().unwrap_or_default();
    let reused = text.find(REUSED).unwrap_or_else(|| panic!("PEER: v2r has no '{REUSED}'"));
    let head = &head[..head.find(REUSED).unwrap_or(head.len())];
    format!("{head}{}", &text[reused..])
        .replace("flash_attn_fwd_v2r", "flash_attn_fwd_v2r_dtype")
        .replace("half", element)
}
