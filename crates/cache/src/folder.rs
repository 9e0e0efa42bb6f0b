//! Where caches of a user belong.

use std::env;
use std::path::{Path, PathBuf};

const NAME: &str = "mtlflashattn";

/// `~/Library/Caches/mtlflashattn` on macOS; elsewhere `mtlflashattn` in `XDG_CACHE_HOME`, or in `~/.cache` where that is
/// not set to an absolute path (XDG Base Directory Specification 0.8). `None` for a user without a home.
#[must_use]
pub fn default_folder() -> Option<PathBuf> {
    let home = env::home_dir().filter(|home| home.is_absolute());
    if cfg!(target_os = "macos") {
        return Some(home?.join("Library/Caches").join(NAME));
    }
    let caches = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    Some(caches.or_else(|| home.as_deref().map(|home: &Path| home.join(".cache")))?.join(NAME))
}
