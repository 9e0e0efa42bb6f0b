//! Reproducible tensors.

use half::{bf16, f16};
use mtlflashattn_core::Dtype;

use crate::parallel::in_parallel;

/// `SplitMix64`.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// Bytes of a number, and its value once rounded.
pub fn encode(dtype: Dtype, x: f64) -> (Vec<u8>, f64) {
    match dtype {
        Dtype::F32 => ((x as f32).to_ne_bytes().to_vec(), f64::from(x as f32)),
        Dtype::F16 => (f16::from_f64(x).to_ne_bytes().to_vec(), f16::from_f64(x).to_f64()),
        Dtype::Bf16 => (bf16::from_f64(x).to_ne_bytes().to_vec(), bf16::from_f64(x).to_f64()),
    }
}

/// The number in these bytes.
pub fn decode(dtype: Dtype, bytes: &[u8]) -> f64 {
    let fixed = "as many bytes as the type has";
    match dtype {
        Dtype::F32 => f64::from(f32::from_ne_bytes(bytes.try_into().expect(fixed))),
        Dtype::F16 => f16::from_ne_bytes(bytes.try_into().expect(fixed)).to_f64(),
        Dtype::Bf16 => bf16::from_ne_bytes(bytes.try_into().expect(fixed)).to_f64(),
    }
}

/// Normal numbers in memory, and as float64.
pub struct Normals {
    pub bytes: Vec<u8>,
    pub exact: Vec<f64>,
}

/// Normal numbers of one generator.
const CHUNK: usize = 1 << 16;

impl Normals {
    pub fn new(dtype: Dtype, count: usize, random: &mut Random) -> Self {
        let seed = random.next();
        let mut chunks = in_parallel(count.div_ceil(CHUNK), |at| {
            let mut random = Random(seed ^ (at as u64) << 32);
            let len = CHUNK.min(count - at * CHUNK);
            let (mut bytes, mut exact) = (Vec::with_capacity(len * dtype.size()), Vec::with_capacity(len));
            for _ in 0..len {
                let (encoded, value) = encode(dtype, random.normal());
                bytes.extend(encoded);
                exact.push(value);
            }
            (at, bytes, exact)
        });
        chunks.sort_unstable_by_key(|&(at, ..)| at);
        let mut normals = Self { bytes: Vec::with_capacity(count * dtype.size()), exact: Vec::with_capacity(count) };
        for (_, bytes, exact) in chunks {
            normals.bytes.extend(bytes);
            normals.exact.extend(exact);
        }
        normals
    }
}
