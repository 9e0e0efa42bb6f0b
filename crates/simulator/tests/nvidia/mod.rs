//! The headers for NVIDIA GPUs as part of a text for the simulator: the headers themselves, in a namespace `nvidia`, with
//! the matrix instructions replaced by what the PTX ISA says of them. A lane of the simulator plays a lane of the hardware.

/// What stands for the hardware. Elements of fragments are read by shuffles, one product after the other. A launch has one
/// simdgroup; a kernel says which one of several it plays by `msl_played_simdgroup`.
const INSTRUCTIONS: &str = r"
#define __nvvm_read_ptx_sreg_laneid() ::msl_lane()
static uint msl_played_simdgroup = 0;
#define __nvvm_read_ptx_sreg_tid_x() (msl_played_simdgroup * 32 + ::msl_lane())
#define __nvvm_read_ptx_sreg_tid_y() 0
#define __nvvm_read_ptx_sreg_tid_z() 0
#define __nvvm_read_ptx_sreg_ntid_x() 1024
#define __nvvm_read_ptx_sreg_ntid_y() 1
#define MSL_FOR_READABLE(M) M(device)
#define MSL_FOR_MEMORY(M) M(device)
namespace nvidia {
using namespace metal;
template <class T> T from(T value, uint lane) { return metal::simd_shuffle(value, ushort(lane)); }
uint group() { return ::msl_lane() / 4; }
uint member() { return ::msl_lane() % 4; }
uint half_of(uint pair, uint i) { return i == 0 ? pair & 0xffffu : pair >> 16; }

uint msl_transposed(uint pair) {
  const uint g = group(), t = member();
  const uint first = half_of(from(pair, 2 * t * 4 + g / 2), g % 2);
  const uint second = half_of(from(pair, (2 * t + 1) * 4 + g / 2), g % 2);
  return first | second << 16;
}
template <class T> void mma_16bit(thread float (&c)[4], uint upper, uint lower, uint b) {
  for (uint k = 0; k < 8; ++k) {
    const float high = float(as_type<T>(ushort(half_of(from(upper, group() * 4 + k / 2), k % 2))));
    const float low = float(as_type<T>(ushort(half_of(from(lower, group() * 4 + k / 2), k % 2))));
    for (uint e = 0; e < 2; ++e) {
      const uint column = 2 * member() + e;
      const float right = float(as_type<T>(ushort(half_of(from(b, column * 4 + k / 2), k % 2))));
      c[e] += high * right;
      c[2 + e] += low * right;
    }
  }
}
#define MMA_16BIT(name, type) \
void name(thread float (&c)[4], uint upper, uint lower, uint b) { mma_16bit<type>(c, upper, lower, b); } \
void name(thread float (&c)[4], thread const uint (&upper)[2], thread const uint (&lower)[2], \
          thread const uint (&b)[2]) { \
  for (int i = 0; i < 2; ++i) mma_16bit<type>(c, upper[i], lower[i], b[i]); \
}
MMA_16BIT(msl_mma_half, half)
MMA_16BIT(msl_mma_bfloat, bfloat)
void msl_mma_tf32(thread float (&c)[4], thread const uint (&upper)[2], thread const uint (&lower)[2],
                  thread const uint (&b)[2]) {
  for (uint k = 0; k < 8; ++k) {
    // The unit ignores the bits that tf32 does not have.
    const uint high = from(upper[k / 4], group() * 4 + k % 4) & ~0x1fffu;
    const uint low = from(lower[k / 4], group() * 4 + k % 4) & ~0x1fffu;
    for (uint e = 0; e < 2; ++e) {
      const uint column = 2 * member() + e;
      const float right = as_type<float>(from(b[k / 4], column * 4 + k % 4) & ~0x1fffu);
      c[e] += as_type<float>(high) * right;
      c[2 + e] += as_type<float>(low) * right;
    }
  }
}
uint msl_tf32(float x) { return (as_type<uint>(x) + 0x1000u) & ~0x1fffu; }
uint msl_interleaved(uint first, uint second, bool upper) {
  return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
}
}
";

/// A shuffle whose mask speaks of MSL's lanes, as the headers have it.
const SHUFFLES: &str = r"
namespace nvidia {
template <class T> T simd_shuffle_xor(T value, ushort mask) {
  return metal::simd_shuffle_xor(value, ushort(msl_hardware_lane(mask)));
}
}
";

/// The beginning of a text: instructions and headers.
pub fn headers(files: &[&str], float_products: u8) -> String {
    let mut text = format!(
        "#include <metal_stdlib>\nusing namespace metal;\n#define MSL_FLOAT_PRODUCTS {float_products}\n{INSTRUCTIONS}"
    );
    text.push_str(&own(include_str!("../../include/nvptx/lane.h")));
    text.push_str(SHUFFLES);
    text.push_str(&own(include_str!("../../include/nvptx/split.h")));
    text.extend(files.iter().map(|file| own(file)));
    text
}

/// A header in namespaces of its own. The attribute keeps the simulator from giving its structs constructors.
fn own(header: &str) -> String {
    header
        .replace("#pragma once", "")
        .replace("namespace metal", "namespace nvidia")
        .replace("metal::", "nvidia::")
        .replace("namespace mpp", "namespace nvidia_mpp")
        .replace("struct ", "struct [[maybe_unused]] ")
}

/// Numbers without symmetry, in [-1, 1), with all the digits of a float.
pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let step = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(step).take(count).collect()
}
