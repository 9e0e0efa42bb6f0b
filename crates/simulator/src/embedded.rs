//! The stand-in headers and the runtime, carried inside the program so that an installed package needs no source tree.

/// A file of this crate: path below the toolchain folder, and contents.
type File = (&'static str, &'static str);

macro_rules! files {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_str!(concat!("../", $path)))),*]
    };
}

/// Everything that a kernel or the runtime includes.
pub const FILES: &[File] = files![
    "include/MetalPerformancePrimitives/MetalPerformancePrimitives.h",
    "include/metal_cooperative_tensor",
    "include/metal_stdlib",
    "include/metal_tensor",
    "include/mpp/array.h",
    "include/mpp/cpu/cooperative_tensor.h",
    "include/mpp/cpu/matmul2d.h",
    "include/mpp/cpu/reduction.h",
    "include/mpp/cpu/runtime.h",
    "include/mpp/descriptor.h",
    "include/mpp/extents.h",
    "include/mpp/rules.h",
    "include/mpp/tensor.h",
    "include/msl/address_space.h",
    "include/msl/atomic.h",
    "include/msl/barrier.h",
    "include/msl/entry.h",
    "include/msl/math.h",
    "include/msl/runtime.h",
    "include/msl/scalar.h",
    "include/msl/simd.h",
    "include/msl/simdgroup_matrix.h",
    "include/msl/source.h",
    "include/msl/threadgroup_array.h",
    "include/msl/traits.h",
    "include/msl/vector.h",
    "include/nvptx/barrier.h",
    "include/nvptx/cooperative_tensor.h",
    "include/nvptx/elementary.h",
    "include/nvptx/entry.h",
    "include/nvptx/fragments.h",
    "include/nvptx/instructions.h",
    "include/nvptx/lane.h",
    "include/nvptx/matmul2d.h",
    "include/nvptx/metal_stdlib",
    "include/nvptx/simd.h",
    "include/nvptx/simdgroup_matrix.h",
    "include/nvptx/split.h",
    "include/nvptx/tensor_ops",
    "include/nvptx/threadgroup_array.h",
    "runtime/checker.cc",
    "runtime/compiler_rt.cc",
    "runtime/context.h",
    "runtime/fiber.cc",
    "runtime/launch.cc",
    "runtime/layout.cc",
    "runtime/matmul2d.cc",
    "runtime/matrix.cc",
    "runtime/operations.cc",
    "runtime/runtime.cc",
];

/// The header of `matmul2d`.
pub const TENSOR_OPS_HEADER: &str = "MetalPerformancePrimitives/MetalPerformancePrimitives.h";

/// Headers that a text may include. They are empty while it is preprocessed, so that its own tokens alone come out;
/// `metal_stdlib` as a whole is included afterwards, and `MetalPerformancePrimitives` as a whole if the text names it.
pub const HEADER_NAMES: &[&str] = &[
    TENSOR_OPS_HEADER,
    "metal_tensor",
    "metal_cooperative_tensor",
    "metal_stdlib",
    "metal_atomic",
    "metal_common",
    "metal_compute",
    "metal_geometric",
    "metal_integer",
    "metal_limits",
    "metal_math",
    "metal_matrix",
    "metal_numeric",
    "metal_relational",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "metal_type_traits",
    "metal_types",
];
