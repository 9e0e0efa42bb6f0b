//! Every kernel variant becomes PTX that keeps what a lane owns in registers, and that NVIDIA's assembler accepts.

use std::io::Write as _;
use std::process::{Command, Stdio};

use mtlflashattn_core::plan::{MetalTile, QueryHome};
use mtlflashattn_core::{Dtype, Options, Problem, TensorMeta};
use mtlflashattn_metal::Kernel;
use mtlflashattn_simulator::ptx::{FloatProducts, translate};

const TILE: MetalTile = MetalTile {
    simdgroups: 2,
    row_fragments: 1,
    keys: 16,
    staged: false,
    value_chunk: 64,
    query: QueryHome::Registers,
};

fn problem(dtype: Dtype) -> Problem {
    let meta = || TensorMeta { dtype, shape: &[1, 40, 2, 64], strides: &[5120, 128, 64, 1] };
    let options = Options { causal: true, window: (-1, -1), ..Options::default() };
    Problem::dense(meta(), meta(), meta(), &options).unwrap()
}

fn simdgroup(dtype: Dtype, tile: MetalTile) -> Kernel {
    Kernel::simdgroup(&problem(dtype), tile, true)
}

fn ptx(kernel: &Kernel, float_products: FloatProducts) -> String {
    translate(&kernel.source(), float_products).unwrap_or_else(|error| panic!("{kernel:?}: {error}"))
}

fn count(text: &str, part: &str) -> usize {
    text.matches(part).count()
}

/// Runs NVIDIA's assembler if there is one, and returns what it says about registers and spills.
fn assemble(ptx: &str) -> Option<String> {
    let path = std::env::var_os("PTXAS").unwrap_or_else(|| "ptxas".into());
    let mut child = Command::new(path)
        .args(["-arch=sm_90", "-v", "-o", "/dev/null", "/dev/stdin"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    child.stdin.take().unwrap().write_all(ptx.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    Some(said)
}

fn check_registers(kernel: &Kernel, ptx: &str) {
    assert!(!ptx.contains(".local"), "{kernel:?} keeps an array in memory");
    assert_eq!(count(ptx, ".func"), 0, "{kernel:?} calls a function");
    assert_eq!(count(ptx, ".extern"), 0, "{kernel:?} needs a library");
    if let Some(said) = assemble(ptx) {
        assert!(said.contains("0 bytes spill stores, 0 bytes spill loads"), "{kernel:?}: {said}");
    }
}

#[test]
fn simdgroup_kernels_become_matrix_instructions() {
    let types =
        [(Dtype::F16, "f32.f16.f16.f32"), (Dtype::Bf16, "f32.bf16.bf16.f32"), (Dtype::F32, "f32.tf32.tf32.f32")];
    let tiles = [
        TILE,
        MetalTile { staged: true, row_fragments: 2, ..TILE },
        MetalTile { staged: true, query: QueryHome::Threadgroup, ..TILE },
    ];
    for (dtype, types) in types {
        for tile in tiles {
            let kernel = simdgroup(dtype, tile);
            let ptx = ptx(&kernel, FloatProducts::Rounded);
            check_registers(&kernel, &ptx);
            assert!(ptx.contains(".visible .entry attention_simdgroup("), "{kernel:?}");
            // Two products for each pair of fragments, S and O, in the blocks at the edge and in the others. Loops over
            // fragments may stay loops where q is not in registers.
            let all = 2 * 2 * tile.row_fragments * (tile.keys / 8) * (64 / 8);
            let products = count(&ptx, "mma.sync");
            assert_eq!(products, count(&ptx, &format!("mma.sync.aligned.m16n8k8.row.col.{types}")), "{kernel:?}");
            if tile.query == QueryHome::Registers {
                assert_eq!(products, all, "{kernel:?}");
            } else {
                assert!((all / 2..=all).contains(&products), "{kernel:?}: {products} products");
            }
            assert_eq!(ptx.contains("bar.sync"), tile.staged, "{kernel:?}");
        }
    }
}

#[test]
fn split_floats_take_two_instructions_and_keep_the_rest() {
    let kernel = simdgroup(Dtype::F32, TILE);
    let [rounded, split] = [FloatProducts::Rounded, FloatProducts::Split].map(|products| ptx(&kernel, products));
    assert_eq!(count(&split, "mma.sync"), 2 * count(&rounded, "mma.sync"));
    assert!(rounded.contains("cvt.rna.tf32") && !split.contains("cvt.rna.tf32"));
    // The high part has 13 bits less.
    assert!(split.contains(", -8192;") && !rounded.contains(", -8192;"));
    check_registers(&kernel, &split);
}

#[test]
fn scalar_kernels_become_fused_multiply_adds() {
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        let ptx = ptx(&Kernel::scalar(&problem(dtype), true), FloatProducts::Split);
        assert!(ptx.contains(".visible .entry attention_scalar(") && ptx.contains("fma.rn"), "{dtype}");
        assert_eq!((count(&ptx, "mma.sync"), count(&ptx, ".extern")), (0, 0), "{dtype}");
        assert!(ptx.contains("ex2.approx.ftz"), "{dtype}: fast::exp2 is one instruction");
        assemble(&ptx);
    }
}

#[test]
fn lanes_and_positions_reach_the_kernel() {
    let text = "#include <metal_stdlib>\nusing namespace metal;\n\
        kernel void k(device uint* out [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],\n\
                      uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {\n\
          threadgroup uint shared[64];\n\
          shared[thread_index] = simd_shuffle_xor(lane, 8);\n\
          threadgroup_barrier(mem_flags::mem_threadgroup);\n\
          out[group.y * 64 + thread_index] = simd_sum(shared[63 - thread_index]);\n\
        }\n";
    let ptx = translate(text, FloatProducts::Split).unwrap();
    for part in [".entry k(", "k_param_0+24]", "%laneid", "%ctaid.y", "st.shared.u32", "bar.sync", "shfl.sync.bfly.b32"]
    {
        assert!(ptx.contains(part), "{part} is missing in\n{ptx}");
    }
    // Lane bit 3 is bit 1 of the hardware's lane: the mask of the first exchange.
    let masks: Vec<&str> = ptx.lines().filter(|line| line.contains("shfl.sync.bfly")).collect();
    assert!(masks[0].contains(", 2, 31"), "{masks:?}");
    assert_eq!(masks.len(), 1 + 5);
    assemble(&ptx);
}

#[test]
fn what_cannot_be_translated_is_refused_with_its_line() {
    let text = "#include <metal_stdlib>\nusing namespace metal;\nkernel void k(device float* x [[buffer(0)]],\n\
                uint i [[thread_position_in_grid]]) { x[i] = y; }\n";
    let error = translate(text, FloatProducts::Split).unwrap_err().to_string();
    assert!(error.contains("kernel.metal:4:") && error.contains("undeclared identifier 'y'"), "{error}");
}
