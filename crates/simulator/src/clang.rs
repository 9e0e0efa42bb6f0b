//! Finds clang and runs it.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use mtlflashattn_metal::DeviceError;

/// The oldest major version that knows `bfloat` arithmetic and the flags used here.
const OLDEST: u32 = 18;
/// The version that the project is tested with.
const PREFERRED: u32 = 19;
/// The newest versioned name that is looked for.
const NEWEST: u32 = 40;

/// A C++ compiler that fits.
#[derive(Clone, Debug)]
pub struct Clang {
    /// The program.
    pub path: PathBuf,
    /// The first line of `--version`: part of the key of everything compiled.
    pub version: String,
}

/// The compiler of this machine, looked for once.
///
/// # Errors
/// One line that says what to install.
pub fn find() -> Result<&'static Clang, DeviceError> {
    static FOUND: OnceLock<Result<Clang, String>> = OnceLock::new();
    FOUND.get_or_init(look_for).as_ref().map_err(|reason| DeviceError::Compile(reason.clone()))
}

fn look_for() -> Result<Clang, String> {
    if let Some(path) = std::env::var_os("MTLFLASHATTN_CLANG") {
        return probe(Path::new(&path)).ok_or_else(|| {
            format!("MTLFLASHATTN_CLANG={}: not a clang++ of version {OLDEST} or newer", path.display())
        });
    }
    let versioned = (OLDEST..=NEWEST).rev().filter(|&version| version != PREFERRED);
    let names = std::iter::once(PREFERRED).chain(versioned).map(|version| format!("clang++-{version}"));
    names.chain(["clang++".to_owned()]).find_map(|name| probe(Path::new(&name))).ok_or_else(|| {
        format!(
            "the simulator needs clang++ {OLDEST} or newer: install it (Debian: apt-get install clang-{PREFERRED}) \
             or set MTLFLASHATTN_CLANG"
        )
    })
}

fn probe(path: &Path) -> Option<Clang> {
    let output = Command::new(path).arg("--version").stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().next()?.to_owned();
    is_new_enough(&version).then(|| Clang { path: path.to_owned(), version })
}

/// Whether the first line of `--version` is that of a clang that fits.
fn is_new_enough(version: &str) -> bool {
    // Apple's numbers run ahead of LLVM's: Apple clang 17 is built on LLVM 19.
    let oldest = if version.contains("Apple") { OLDEST - 2 } else { OLDEST };
    let number = version.split("clang version ").nth(1).and_then(|rest| rest.split('.').next());
    number.and_then(|number| number.parse().ok()).is_some_and(|major: u32| major >= oldest)
}

impl Clang {
    /// Runs the compiler over `input` and returns what it wrote to standard output.
    ///
    /// # Errors
    /// [`DeviceError::Compile`] with the compiler's messages.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S], input: &str) -> Result<String, DeviceError> {
        let failed = |error: std::io::Error| DeviceError::Compile(format!("{}: {error}", self.path.display()));
        let mut child = Command::new(&self.path)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut stdin = child.stdin.take().expect("standard input is piped");
        let output = std::thread::scope(|scope| {
            // The compiler may write before it has read everything. A compiler that stops early says why itself.
            scope.spawn(move || stdin.write_all(input.as_bytes()).ok());
            child.wait_with_output()
        })
        .map_err(failed)?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(DeviceError::Compile(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_new_clang_fits() {
        for version in [
            "Debian clang version 19.1.7 (3~deb12u1)",
            "clang version 18.1.0",
            "Apple clang version 16.0.0 (clang-1600)",
        ] {
            assert!(is_new_enough(version), "{version}");
        }
        for version in ["clang version 17.0.6", "Apple clang version 15.0.0", "g++ (Debian 12.2.0-14) 12.2.0", ""] {
            assert!(!is_new_enough(version), "{version}");
        }
        assert!(probe(Path::new("no-such-compiler")).is_none());
    }
}
