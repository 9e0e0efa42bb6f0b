//! From an offset in a library to a line of the MSL text.

use std::path::Path;

use crate::compile::SOURCE_NAME;

/// The innermost line of the text at `offset`, through inlined functions.
pub fn line_at(library: &Path, offset: u64) -> Option<u32> {
    let loader = addr2line::Loader::new(library).ok()?;
    let mut frames = loader.find_frames(offset).ok()?;
    while let Ok(Some(frame)) = frames.next() {
        if let Some(location) = frame.location
            && location.file.is_some_and(|file| file.ends_with(SOURCE_NAME))
        {
            return location.line;
        }
    }
    None
}
