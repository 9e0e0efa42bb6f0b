//! The `MTLFLASHATTN_*` variables as the process holds them, in one pass over the environment.
//!
//! `std::env::var_os` walks the environment once a name; calls look at a dozen names, some of them in a microsecond.

use std::ffi::{CStr, c_char};

const PREFIX: &[u8] = b"MTLFLASHATTN_";

/// Every `NAME=value` with the prefix, in the order of the environment, each ended by a zero byte.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment(Vec<u8>);

impl Environment {
    /// Reads the environment of the process.
    pub fn read() -> Self {
        let mut bytes = Vec::new();
        for entry in entries() {
            bytes.extend_from_slice(entry.to_bytes_with_nul());
        }
        Self(bytes)
    }

    /// Whether reading again would give the same; allocates nothing.
    pub fn is_current(&self) -> bool {
        let mut rest = self.0.as_slice();
        for entry in entries() {
            match rest.strip_prefix(entry.to_bytes_with_nul()) {
                Some(after) => rest = after,
                None => return false,
            }
        }
        rest.is_empty()
    }

    /// The value of `name`.
    pub fn get(&self, name: &str) -> Option<String> {
        let value = |entry: &[u8]| Some(entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?.to_vec());
        self.0.split(|&byte| byte == 0).find_map(value).map(|value| String::from_utf8_lossy(&value).into_owned())
    }
}

/// The variables with the prefix. Python changes the environment only under the GIL, as our callers run.
fn entries() -> impl Iterator<Item = &'static CStr> {
    let mut next = first();
    std::iter::from_fn(move || {
        // SAFETY: the environment is an array of strings that ends with a null pointer, and nobody changes it now.
        unsafe {
            while !next.is_null() && !(*next).is_null() {
                let entry = *next;
                next = next.add(1);
                if has_prefix(entry) {
                    return Some(CStr::from_ptr(entry));
                }
            }
        }
        None
    })
}

/// Whether the string starts with the prefix, read no further than the first difference.
unsafe fn has_prefix(entry: *const c_char) -> bool {
    // SAFETY: the string ends with a zero byte, which differs from every byte of the prefix.
    PREFIX.iter().enumerate().all(|(i, &byte)| unsafe { *entry.add(i).cast::<u8>() == byte })
}

#[cfg(not(target_vendor = "apple"))]
fn first() -> *const *const c_char {
    unsafe extern "C" {
        static environ: *const *const c_char;
    }
    // SAFETY: defined by every C library.
    unsafe { environ }
}

/// Shared libraries cannot link against `environ` on Apple systems.
#[cfg(target_vendor = "apple")]
fn first() -> *const *const c_char {
    unsafe extern "C" {
        fn _NSGetEnviron() -> *const *const *const c_char;
    }
    // SAFETY: never null, see crt_externs.h.
    unsafe { *_NSGetEnviron() }
}
