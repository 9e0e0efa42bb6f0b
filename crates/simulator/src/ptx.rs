//! MSL text as PTX, so that kernels also run where thousands of threads really run at once: on an NVIDIA GPU.
//!
//! The way is the simulator's, with other headers (`include/nvptx`) and another back end. The speed of a translated
//! kernel says nothing about Apple GPUs by itself; kernels that took the same way may be compared.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;

use mtlflashattn_metal::DeviceError;

use crate::clang;
use crate::compile::{cache_folder, definitions, rewritten, unpack_toolchain, uses_tensor_ops};
use crate::options::{Layer, Options};
use crate::rewrite::{Entries, MAX_THREADS};

/// What becomes of a product of float matrices, as the matrix units of NVIDIA GPUs have none. Products of half and of
/// bfloat are exact in either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatProducts {
    /// Operands are sums of two tf32 numbers, which keeps 22 bits at least: for checking numbers.
    Split,
    /// Operands are rounded to tf32, 11 bits, one instruction a product: for comparing the speed of kernels that mix
    /// float and half operands, which Apple GPUs multiply at one rate.
    Rounded,
}

/// Entry points of a PTX text take one parameter: a table of 31 device addresses, by `[[buffer(n)]]`.
pub const BUFFER_COUNT: usize = 31;

/// Hopper, and the oldest PTX that has everything.
const TARGET: [&str; 5] = ["--target=nvptx64-nvidia-cuda", "-march=sm_90", "-Xclang", "-target-feature", "-Xclang"];
const PTX_VERSION: &str = "+ptx80";

/// Translates every kernel of a text.
///
/// # Errors
/// [`DeviceError::Compile`] with messages that name lines of the text.
pub fn translate(source: &str, float_products: FloatProducts) -> Result<String, DeviceError> {
    let clang = clang::find()?;
    let toolchain = unpack_toolchain(&cache_folder(&Options::new(Layer::Type)), clang)?;
    let text = rewritten(clang, &toolchain, source, Entries::Ptx)?;
    let code = clang.run(&front_end(&toolchain, source, float_products), &text)?;
    let (code, threads) = split_max_threads(&code);
    let ptx = clang.run(&back_end(), &inline_everything(&merge_constant_space(&code)))?;
    Ok(with_max_threads(&ptx, &threads))
}

/// Takes the definitions of how many threads an entry point has out of `code`.
fn split_max_threads(code: &str) -> (String, Vec<(String, u32)>) {
    let mut threads = Vec::new();
    let mut rest = String::with_capacity(code.len());
    for line in code.lines() {
        let defined = line.strip_prefix('@').and_then(|line| line.strip_prefix(MAX_THREADS));
        let Some((entry, value)) = defined.and_then(|line| line.split_once(" = ")) else {
            rest.push_str(line);
            rest.push('\n');
            continue;
        };
        let most =
            value.split_once("constant i32 ").and_then(|(_, value)| value.split([',', ' ']).next()?.parse().ok());
        // 0 stands for as many as the device has.
        threads.extend(most.filter(|&most| most > 0).map(|most| (entry.to_owned(), most)));
    }
    (rest, threads)
}

/// Says so at each entry point, so that the driver's compiler gives a thread no more registers than all can have.
fn with_max_threads(ptx: &str, threads: &[(String, u32)]) -> String {
    let mut result = String::with_capacity(ptx.len());
    let mut entry = None;
    for line in ptx.lines() {
        if let Some((_, name)) = line.split_once(".entry ") {
            entry = threads.iter().find(|(entry, _)| name.strip_suffix('(') == Some(entry));
        }
        if line == "{"
            && let Some((_, most)) = entry.take()
        {
            writeln!(result, ".maxntid {most}, 1, 1").expect("writing to a String does not fail");
        }
        result.push_str(line);
        result.push('\n');
    }
    result
}

fn front_end(toolchain: &Path, source: &str, float_products: FloatProducts) -> Vec<OsString> {
    let mut all: Vec<OsString> = TARGET.map(OsString::from).to_vec();
    all.push(PTX_VERSION.into());
    all.extend(definitions(source));
    let instructions = match float_products {
        FloatProducts::Split => 2,
        FloatProducts::Rounded => 1,
    };
    all.push(format!("-DMSL_FLOAT_PRODUCTS={instructions}").into());
    all.push("-I".into());
    all.push(toolchain.join("include").into());
    all.extend(["-include", "nvptx/metal_stdlib"].map(OsString::from));
    if uses_tensor_ops(source) {
        all.extend(["-include", "nvptx/tensor_ops"].map(OsString::from));
    }
    all.extend(
        [
            "-O3",
            "-std=c++20",
            "-nostdinc",
            "-nostdinc++",
            "-fdeclspec",
            "-fno-exceptions",
            "-fno-rtti",
            "-ferror-limit=5",
            "-fno-caret-diagnostics",
            "-Wno-everything",
            "-Werror=return-type",
            // Barriers, shuffles and matrix products stay where all lanes meet.
            "-fconvergent-functions",
            "-ffp-contract=fast",
            // Float denormals are 0, as on Apple GPUs.
            "-Xclang",
            "-fdenormal-fp-math-f32=preserve-sign",
            "-Xclang",
            "-ffloat16-excess-precision=none",
            "-Xclang",
            "-cl-single-precision-constant",
            "-Xclang",
            "-disable-llvm-passes",
            "-S",
            "-emit-llvm",
            "-o",
            "-",
            "-x",
            "c++",
            "-",
        ]
        .map(OsString::from),
    );
    all
}

fn back_end() -> Vec<OsString> {
    let mut all: Vec<OsString> = TARGET.map(OsString::from).to_vec();
    all.extend([PTX_VERSION, "-O3", "-ffp-contract=fast"].map(OsString::from));
    for option in [
        // What a parameter is a reference to may be read before a loop, also once its function is inlined.
        "-enable-knowledge-retention",
        // It would take wide loads apart.
        "-disable-vector-combine",
    ] {
        all.extend(["-mllvm", option].map(OsString::from));
    }
    all.extend(["-S", "-o", "-", "-x", "ir", "-"].map(OsString::from));
    all
}

/// Metal's `constant` is global memory that no launch changes; NVIDIA's is a small bank of its own. Pointers to the one
/// become pointers to global memory, and what is read through them is marked as invariant.
fn merge_constant_space(code: &str) -> String {
    const CONSTANT: &str = "addrspace(2)";
    let mut result = String::with_capacity(code.len());
    for line in code.lines() {
        result.push_str(line);
        if line.contains(" = load ") && line.contains(CONSTANT) {
            result.push_str(", !invariant.load !99999");
        }
        result.push('\n');
    }
    writeln!(result, "!99999 = !{{}}").expect("writing to a String does not fail");
    result.replace(CONSTANT, "addrspace(1)")
}

/// As Metal's compiler does: what a function takes by reference stays in registers. Functions of the text have mangled
/// names, entry points have not.
fn inline_everything(code: &str) -> String {
    let mut result = String::with_capacity(code.len());
    for line in code.lines() {
        if line.starts_with("attributes #") && line.contains("\"target-cpu\"") {
            result.push_str(&line.replacen("{ ", "{ alwaysinline ", 1));
        } else if line.starts_with("define dso_local ") && line.contains(" @_Z") {
            result.push_str(&line.replacen("define dso_local ", "define internal ", 1));
        } else {
            result.push_str(line);
        }
        result.push('\n');
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_stated_at_entry_points() {
        let code = "@msl_max_threads_one = dso_local constant i32 512, align 4\n\
                    @msl_max_threads_two = dso_local constant i32 0, align 4\n@other = constant i32 3\n";
        let (rest, threads) = split_max_threads(code);
        assert_eq!((rest.as_str(), &threads), ("@other = constant i32 3\n", &vec![("one".to_owned(), 512)]));
        let ptx = ".visible .entry one(\n\t.param .u64 x\n)\n{\n}\n.visible .entry two(\n)\n{\n}\n";
        let expected =
            ".visible .entry one(\n\t.param .u64 x\n)\n.maxntid 512, 1, 1\n{\n}\n.visible .entry two(\n)\n{\n}\n";
        assert_eq!(with_max_threads(ptx, &threads), expected);
    }

    #[test]
    fn functions_are_inlined_and_entry_points_stay() {
        let code = "define dso_local void @_Z1fv() #0 {\ndefine dso_local void @kernel() #0 {\n\
                    attributes #0 = { nounwind \"target-cpu\"=\"sm_90\" }\nattributes #1 = { nounwind }\n";
        let expected = "define internal void @_Z1fv() #0 {\ndefine dso_local void @kernel() #0 {\n\
                        attributes #0 = { alwaysinline nounwind \"target-cpu\"=\"sm_90\" }\nattributes #1 = { nounwind }\n";
        assert_eq!(inline_everything(code), expected);
    }

    #[test]
    fn reads_of_constant_memory_become_invariant_reads_of_global_memory() {
        let code = "%2 = load i64, ptr addrspace(2) %1, align 8\n%3 = load i64, ptr addrspace(3) %1, align 8\n";
        let expected = "%2 = load i64, ptr addrspace(1) %1, align 8, !invariant.load !99999\n\
                        %3 = load i64, ptr addrspace(3) %1, align 8\n!99999 = !{}\n";
        assert_eq!(merge_constant_space(code), expected);
    }
}
