//! Alias files: small files that hold the path of a VHD, relative to their own directory.
//!
//! Only the text is handled here; where it leads is for the storage's path type, which never leaves the repository.

use crate::error::FormatError;

/// The longest content an alias may have, in bytes. Source: vhd-lib, `ALIAS_MAX_PATH_LENGTH`.
pub const MAX_BYTES: usize = 1024;

const SUFFIX: &str = ".alias.vhd";

/// Tells whether a file of this name is an alias; its content has no say.
#[must_use]
pub fn is_alias(name: &str) -> bool {
    name.ends_with(SUFFIX)
}

/// Returns the path an alias holds, without the white space around it.
///
/// # Errors
/// `Damaged` if the content is empty, longer than [`MAX_BYTES`], not text, names another alias, or does not name a
/// VHD. An empty alias would lead to its own directory.
pub fn parse(bytes: &[u8]) -> Result<String, FormatError> {
    if bytes.len() > MAX_BYTES {
        return Err(FormatError::damaged(format!(
            "an alias holds at most {MAX_BYTES} bytes, but this one has {}",
            bytes.len()
        )));
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return Err(FormatError::damaged("an alias must hold a path in UTF-8, but this one holds other bytes"));
    };
    let target = text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
    if target.is_empty() {
        return Err(FormatError::damaged("an alias must hold the path of a VHD, but this one is empty"));
    }
    if target.contains('\0') {
        return Err(FormatError::damaged("an alias must hold the path of a VHD, but this one holds NUL bytes"));
    }
    if is_alias(target) {
        return Err(FormatError::damaged(format!("an alias must not lead to another alias, but leads to '{target}'")));
    }
    if !target.ends_with(".vhd") {
        return Err(FormatError::damaged(format!("an alias must lead to a '.vhd', but leads to '{target}'")));
    }
    Ok(target.to_owned())
}
