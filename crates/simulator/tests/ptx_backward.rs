//! The kernels of the backward pass become PTX that keeps what a lane owns in registers.

use std::io::Write as _;
use std::process::{Command, Stdio};

use mtlflashattn_core::plan::{BackwardPass, BackwardTile, QueryHome};
use mtlflashattn_core::{Dtype, Options, Problem, TensorMeta};
use mtlflashattn_metal::BackwardKernel;
use mtlflashattn_simulator::ptx::{FloatProducts, translate};

const TILE: BackwardTile =
    BackwardTile { simdgroups: 2, row_fragments: 1, block: 16, staged: false, chunk: 64, own: QueryHome::Registers };

fn problem(dtype: Dtype) -> Problem {
    let meta = || TensorMeta { dtype, shape: &[1, 40, 2, 64], strides: &[5120, 128, 64, 1] };
    let options = Options { causal: true, window: (-1, -1), ..Options::default() };
    Problem::dense(meta(), meta(), meta(), &options).unwrap()
}

/// Runs NVIDIA's assembler if there is one, and requires that nothing spills.
fn assemble(ptx: &str) {
    let path = std::env::var_os("PTXAS").unwrap_or_else(|| "ptxas".into());
    let child = Command::new(path)
        .args(["-arch=sm_90", "-v", "-o", "/dev/null", "/dev/stdin"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else { return };
    child.stdin.take().unwrap().write_all(ptx.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("0 bytes spill stores, 0 bytes spill loads"), "{said}");
}

#[test]
fn every_pass_becomes_matrix_instructions() {
    // Products of 8 rows with a block, in units of 64 columns.
    let passes = [
        (BackwardPass::Delta, 0),
        (BackwardPass::Query, 3),
        (BackwardPass::KeysAndValues, 4),
        (BackwardPass::Keys, 3),
        (BackwardPass::Values, 2),
    ];
    let types = [(Dtype::F16, "f16"), (Dtype::Bf16, "bf16"), (Dtype::F32, "tf32")];
    for (dtype, operand) in types {
        for (pass, products) in passes {
            for &staged in if dtype == Dtype::F16 { &[false, true][..] } else { &[false] } {
                let tile = BackwardTile { staged, ..TILE };
                let kernel = BackwardKernel::new(pass, &problem(dtype), tile, false);
                let ptx =
                    translate(&kernel.source(), FloatProducts::Rounded).unwrap_or_else(|e| panic!("{kernel:?}: {e}"));
                assert!(ptx.contains(&format!(".visible .entry {}(", kernel.entry())), "{kernel:?}");
                assert!(!ptx.contains(".local"), "{kernel:?} keeps an array in memory");
                for forbidden in [".func", ".extern"] {
                    assert!(!ptx.contains(forbidden), "{kernel:?} has {forbidden}");
                }
                // In blocks at the edge and in the others.
                let all = 2 * products * (16 / 8) * (64 / 8);
                let instruction = format!("mma.sync.aligned.m16n8k8.row.col.f32.{operand}.{operand}.f32");
                assert_eq!(ptx.matches(&instruction).count(), all, "{kernel:?}");
                assert_eq!(ptx.contains("bar.sync"), staged && pass != BackwardPass::Delta, "{kernel:?}");
                assemble(&ptx);
            }
        }
    }
}

#[test]
fn parked_rows_stay_out_of_local_memory() {
    let (pass, tile) = (BackwardPass::KeysAndValues, BackwardTile { own: QueryHome::Threadgroup, ..TILE });
    let kernel = BackwardKernel::new(pass, &problem(Dtype::F16), tile, false);
    let ptx = translate(&kernel.source(), FloatProducts::Rounded).unwrap();
    assert!(!ptx.contains(".local") && ptx.contains("st.shared"));
    assemble(&ptx);
}
