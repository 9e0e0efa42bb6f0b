//! From MSL text to a library: preprocess, rewrite, check types, drop the address spaces, generate code, link.
//!
//! The front end sees real address spaces. They are dropped from its output, because clang's checks pass over
//! accesses in any other space than the default one; names that were overloaded by address space stay distinct.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use mtlflashattn_metal::DeviceError;
use sha2::{Digest, Sha256};

use crate::clang::{self, Clang};
use crate::embedded::{FILES, HEADER_NAMES, TENSOR_OPS_HEADER};
use crate::options::{Layer, Options};
use crate::rewrite::{Entries, RewriteError, rewrite};

/// What Metal's compiler defines.
const DEFINITIONS: [&str; 3] = ["-D__METAL_MACOS__=1", "-D__METAL__=1", "-D__HAVE_BFLOAT__=1"];

/// Whether a text is one for MSL 4.0: it names `matmul2d`'s header.
pub fn uses_tensor_ops(source: &str) -> bool {
    source.contains(TENSOR_OPS_HEADER)
}

/// What is defined for a text. MSL 3.1 is what the oldest supported torch compiles for; a text for tensor operations is
/// never given to less than 4.0.
pub fn definitions(source: &str) -> Vec<OsString> {
    let language: &[&str] = if uses_tensor_ops(source) {
        &["-D__METAL_VERSION__=400", "-D__HAVE_TENSOR__=1"]
    } else {
        &["-D__METAL_VERSION__=310"]
    };
    language.iter().chain(&DEFINITIONS).map(OsString::from).collect()
}

/// The name that messages give to the text.
pub const SOURCE_NAME: &str = "kernel.metal";

/// Checks of undefined behaviour that the front end plants.
const UNDEFINED: &str = "array-bounds,signed-integer-overflow,shift,integer-divide-by-zero";

/// Compiles a text for the layer of `options`, or finds it compiled. `None` in the type layer.
///
/// # Errors
/// [`DeviceError::Compile`] with messages that name lines of the text.
pub fn compile(source: &str, options: &Options) -> Result<Option<PathBuf>, DeviceError> {
    if !cfg!(target_os = "linux") {
        return Err(DeviceError::Compile("the simulator runs on Linux only".to_owned()));
    }
    let clang = clang::find()?;
    if !source.is_ascii() {
        return Err(DeviceError::Compile("the text must be ASCII: torch hands it to an ASCII decoder".to_owned()));
    }
    let cache = cache_folder(options);
    let flags = Flags::new(source, options);
    let library = cache.join(format!("{}.so", key(&[source, &flags.identity(), toolchain_key(clang)])));
    if options.layer != Layer::Type && library.exists() {
        return Ok(Some(library));
    }
    let toolchain = unpack_toolchain(&cache, clang)?;
    let text = rewritten(clang, &toolchain, source, Entries::Table)?;
    let code = clang.run(&flags.front_end(&toolchain, &["-S", "-emit-llvm", "-o", "-"]), &text)?;
    refuse_casts_between_spaces(&code)?;
    refuse_cooperative_aggregates(&code)?;
    if options.layer == Layer::Type {
        return Ok(None);
    }
    let runtime = runtime_object(clang, &toolchain, options.layer)?;
    build_library(clang, &flags, &drop_address_spaces(&code), &runtime, &library)?;
    Ok(Some(library))
}

/// The command line of one build.
struct Flags {
    layer: Layer,
    arguments: Vec<String>,
    definitions: Vec<OsString>,
    includes: &'static [&'static str],
}

impl Flags {
    fn new(source: &str, options: &Options) -> Self {
        let mut arguments: Vec<String> = [
            "-fPIC",
            "-fstack-clash-protection",
            "-g1",
            "-fno-exceptions",
            "-fno-rtti",
            "-fvisibility=hidden",
            "-ffp-contract=off",
        ]
        .map(str::to_owned)
        .to_vec();
        arguments.extend(machine_flags().iter().map(|&flag| flag.to_owned()));
        arguments.push(if options.layer == Layer::Check { "-O1" } else { "-O2" }.to_owned());
        if options.layer == Layer::Check {
            // One access of the text stays one access of the code.
            arguments.extend(["-fno-vectorize", "-fno-slp-vectorize", "-fsanitize=thread"].map(str::to_owned));
        }
        if options.finite_math {
            arguments.push("-ffast-math".to_owned());
        }
        if options.poison {
            arguments.push("-ftrivial-auto-var-init=pattern".to_owned());
        }
        let mut definitions = definitions(source);
        let mut includes: &[&str] = &["metal_stdlib"];
        if uses_tensor_ops(source) {
            definitions.push(format!("-DMSL_MACOS={}", options.tensor_ops.macos.number()).into());
            includes = &["metal_stdlib", TENSOR_OPS_HEADER];
        }
        Flags { layer: options.layer, arguments, definitions, includes }
    }

    fn identity(&self) -> String {
        format!("{:?} {:?} {:?}", self.layer, self.arguments, self.definitions)
    }

    /// Arguments that read rewritten C++ from standard input.
    fn front_end(&self, toolchain: &Path, action: &[&str]) -> Vec<OsString> {
        let mut all: Vec<OsString> = self.arguments.iter().map(OsString::from).collect();
        all.extend(self.definitions.iter().cloned());
        all.push(format!("-DMSL_CHECK_LAYER={}", u8::from(self.layer == Layer::Check)).into());
        all.push("-I".into());
        all.push(toolchain.join("include").into());
        all.extend(self.includes.iter().flat_map(|header| ["-include", header]).map(OsString::from));
        all.extend(
            [
                "-std=c++20",
                "-nostdinc",
                "-nostdinc++",
                "-ferror-limit=5",
                "-fno-caret-diagnostics",
                "-Wno-everything",
                "-Werror=return-type",
                "-Werror=format",
                "-fdeclspec",
                // Half rounds after every operation; a literal without suffix is single precision.
                "-Xclang",
                "-ffloat16-excess-precision=none",
                "-Xclang",
                "-cl-single-precision-constant",
                "-Xclang",
                "-disable-llvm-passes",
            ]
            .map(OsString::from),
        );
        if self.layer == Layer::Check {
            all.push(format!("-fsanitize={UNDEFINED}").into());
        }
        all.extend(action.iter().map(OsString::from));
        all.extend(["-x", "c++", "-"].map(OsString::from));
        all
    }

    /// Arguments that read LLVM's intermediate text from standard input.
    fn back_end(&self, object: &Path) -> Vec<OsString> {
        let mut all: Vec<OsString> = self.arguments.iter().map(OsString::from).collect();
        if self.layer == Layer::Check {
            for option in [
                "-tsan-instrument-func-entry-exit=0",
                "-tsan-instrument-atomics=0",
                "-tsan-instrument-read-before-write=1",
            ] {
                all.extend(["-mllvm".into(), option.into()]);
            }
        }
        all.extend(["-c", "-o"].map(OsString::from));
        all.push(object.into());
        all.extend(["-x", "ir", "-"].map(OsString::from));
        all
    }
}

/// The instruction set: AVX2 where this processor has it, whatever the compiler's target is elsewhere.
fn machine_flags() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("f16c")
    {
        return &["-march=x86-64-v3"];
    }
    &[]
}

/// The text as the front end gets it.
pub fn rewritten(clang: &Clang, toolchain: &Path, source: &str, entries: Entries) -> Result<String, DeviceError> {
    let mut arguments = definitions(source);
    arguments.extend(["-E", "-std=c++20", "-nostdinc", "-nostdinc++", "-Wno-everything", "-I"].map(OsString::from));
    arguments.push(toolchain.join("preprocess").into());
    arguments.extend(["-x", "c++", "-"].map(OsString::from));
    let text = clang.run(&arguments, &format!("#line 1 \"{SOURCE_NAME}\"\n{source}"))?;
    let rewritten = rewrite(&text, entries).map_err(|error| located(&text, &error))?;
    if rewritten.entries.is_empty() {
        return Err(DeviceError::Compile(format!("{SOURCE_NAME}: error: the text has no kernel")));
    }
    Ok(rewritten.text)
}

/// A message with the line of the original text, found by the preprocessor's line markers.
fn located(text: &str, error: &RewriteError) -> DeviceError {
    let mut line = 0;
    for row in text[..error.at].lines() {
        let marker = row.strip_prefix("# ").and_then(|rest| rest.split(' ').next()?.parse::<u32>().ok());
        line = marker.unwrap_or(line + 1);
        if marker.is_some() {
            line = line.saturating_sub(1);
        }
    }
    if text[..error.at].ends_with('\n') {
        line += 1;
    }
    DeviceError::Compile(format!("{SOURCE_NAME}:{line}: error: {}", error.message))
}

/// Removes ` addrspace(n)` everywhere. A cast between spaces has nothing left to do.
fn drop_address_spaces(code: &str) -> String {
    const MARK: &str = " addrspace(";
    let mut result = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        result.push_str(&rest[..at]);
        let after = &rest[at + MARK.len()..];
        rest = after.find(')').map_or("", |close| &after[close + 1..]);
    }
    result.push_str(rest);
    result.replace("addrspacecast", "bitcast")
}

/// What the mangled names of the headers' own functions begin with.
const HEADER_FUNCTIONS: [&str; 7] =
    ["_ZN5metal", "_ZNK5metal", "_ZZN5metal", "_ZZNK5metal", "_ZN3mpp", "_ZNK3mpp", "_ZN23msl_threadgroup_storage"];

/// Plain C++ lets a C cast turn a pointer of one address space into one of another; MSL does not. Only the headers
/// do it; anywhere else in the front end's output it is a cast of the text.
fn refuse_casts_between_spaces(code: &str) -> Result<(), DeviceError> {
    let mut in_header = false;
    for line in code.lines() {
        if line.starts_with("define ") {
            let name = line.split('@').nth(1).unwrap_or_default();
            in_header = HEADER_FUNCTIONS.iter().any(|prefix| name.starts_with(prefix));
        }
        if in_header || !line.contains("= addrspacecast ") {
            continue;
        }
        let location = line.rsplit("!dbg ").next().and_then(|reference| {
            let definition = format!("\n{} = !DILocation(line: ", reference.trim());
            let rest = &code[code.find(&definition)? + definition.len()..];
            rest.split(',').next()
        });
        return Err(DeviceError::Compile(format!(
            "{SOURCE_NAME}:{}: error: a cast between pointers of different address spaces",
            location.unwrap_or("?")
        )));
    }
    Ok(())
}

/// Metal's compiler keeps cooperative tensors out of structs and arrays.
fn refuse_cooperative_aggregates(code: &str) -> Result<(), DeviceError> {
    const TENSOR: &str = "%\"class.metal::cooperative_tensor";
    let refused = |what: &str| {
        let rule = "cooperative tensors are variables of their own: no members, no arrays";
        Err(DeviceError::Compile(format!("{SOURCE_NAME}: error: {what}: {rule}")))
    };
    for line in code.lines() {
        let Some(at) = line.find(TENSOR) else { continue };
        if let Some((name, _)) = line.split_once(" = type ")
            && !name.starts_with(TENSOR)
        {
            return refused(&format!("{} has a cooperative tensor", name.trim_start_matches('%')));
        }
        if line[..at].ends_with(" x ") {
            return refused("an array of cooperative tensors");
        }
    }
    Ok(())
}

fn build_library(clang: &Clang, flags: &Flags, code: &str, runtime: &Path, library: &Path) -> Result<(), DeviceError> {
    let object = temporary(library, "o");
    let linked = temporary(library, "so");
    let outcome = clang.run(&flags.back_end(&object), code).and_then(|_| {
        let mut arguments: Vec<OsString> = ["-shared", "-nostdlib++", "-o"].iter().map(OsString::from).collect();
        arguments.extend([linked.clone().into(), object.clone().into(), runtime.into(), "-lm".into()]);
        clang.run(&arguments, "")
    });
    fs::remove_file(&object).ok();
    outcome?;
    fs::rename(&linked, library).map_err(|error| cache_error(library, &error))
}

/// The runtime of a layer, compiled at first use.
fn runtime_object(clang: &Clang, toolchain: &Path, layer: Layer) -> Result<PathBuf, DeviceError> {
    let check = layer == Layer::Check;
    let object = toolchain.join(if check { "runtime-check.o" } else { "runtime-fast.o" });
    if object.exists() {
        return Ok(object);
    }
    let fresh = temporary(&object, "o");
    let mut arguments: Vec<OsString> =
        ["-std=c++20", "-O2", "-g1", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-c"]
            .map(OsString::from)
            .to_vec();
    arguments.extend(machine_flags().iter().map(OsString::from));
    arguments.push(format!("-DMSL_CHECK_LAYER={}", u8::from(check)).into());
    arguments.push("-o".into());
    arguments.push(fresh.clone().into());
    arguments.push(toolchain.join("runtime/runtime.cc").into());
    clang.run(&arguments, "")?;
    fs::rename(&fresh, &object).map_err(|error| cache_error(&object, &error))?;
    Ok(object)
}

/// Writes the headers and the runtime where clang can read them.
pub fn unpack_toolchain(cache: &Path, clang: &Clang) -> Result<PathBuf, DeviceError> {
    let folder = cache.join(format!("toolchain-{}", toolchain_key(clang)));
    if folder.exists() {
        return Ok(folder);
    }
    let fresh = temporary(&folder, "new");
    let unpack = || -> std::io::Result<()> {
        for (path, contents) in FILES {
            write_file(&fresh.join(path), contents)?;
        }
        for name in HEADER_NAMES {
            write_file(&fresh.join("preprocess").join(name), "")?;
        }
        // Somebody else may have been faster; theirs is the same.
        fs::rename(&fresh, &folder).or_else(|error| {
            fs::remove_dir_all(&fresh)?;
            if folder.exists() { Ok(()) } else { Err(error) }
        })
    };
    unpack().map_err(|error| cache_error(&folder, &error))?;
    Ok(folder)
}

fn write_file(path: &Path, contents: &str) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, contents)
}

/// A name beside `path` that no other process or thread uses.
fn temporary(path: &Path, extension: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_extension(format!("{}-{count}.{extension}", std::process::id()))
}

fn cache_error(path: &Path, error: &std::io::Error) -> DeviceError {
    DeviceError::Compile(format!(
        "{}: {error}; MTLFLASHATTN_SIMULATOR_CACHE names a folder that can be written",
        path.display()
    ))
}

pub fn cache_folder(options: &Options) -> PathBuf {
    if let Some(folder) = &options.cache {
        return folder.clone();
    }
    if let Some(folder) = std::env::var_os("MTLFLASHATTN_SIMULATOR_CACHE") {
        return PathBuf::from(folder);
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let user_cache = if cfg!(target_vendor = "apple") {
        home.map(|home| home.join("Library/Caches"))
    } else {
        std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| home.map(|home| home.join(".cache")))
    };
    user_cache.unwrap_or_else(std::env::temp_dir).join("mtlflashattn").join("simulator")
}

/// Changes with the compiler, the headers, the runtime and the processor.
fn toolchain_key(clang: &Clang) -> &'static str {
    static KEY: OnceLock<String> = OnceLock::new();
    KEY.get_or_init(|| {
        let mut parts = vec![clang.version.as_str(), identity()];
        parts.extend(machine_flags());
        key(&parts)
    })
}

/// Stands for this simulator: changes with the headers, the runtime and what becomes of a text before it is compiled.
#[must_use]
pub fn identity() -> &'static str {
    static KEY: OnceLock<String> = OnceLock::new();
    KEY.get_or_init(|| {
        let mut parts = vec![include_str!("rewrite.rs"), include_str!("token.rs"), include_str!("compile.rs")];
        parts.extend(FILES.iter().flat_map(|(path, contents)| [*path, *contents]));
        key(&parts)
    })
}

pub fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(12).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_spaces_vanish_and_nothing_else() {
        let code = "%1 = addrspacecast ptr addrspace(1) %0 to ptr\n@x = internal addrspace(2) constant i32 1\n";
        assert_eq!(drop_address_spaces(code), "%1 = bitcast ptr %0 to ptr\n@x = internal constant i32 1\n");
    }

    #[test]
    fn keys_tell_parts_apart() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&["ab"]), key(&["ab"]));
    }
}
