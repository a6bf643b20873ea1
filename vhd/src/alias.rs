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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn an_alias_is_recognised_by_its_name() {
        for (name, expected) in [
            ("20260801T000000Z.alias.vhd", true),
            ("vdis/x.alias.vhd", true),
            ("alias.vhd", false),
            ("x.vhd", false),
            ("x.alias.vhd.tmp", false),
            (".x.alias.vhd.merge.json", false),
        ] {
            assert_eq!(is_alias(name), expected, "{name}");
        }
    }

    #[test]
    fn white_space_around_the_path_is_ignored() {
        for content in ["data/x y.vhd", " data/x y.vhd\n", "\u{feff}\tdata/x y.vhd\r\n"] {
            assert_eq!(parse(content.as_bytes()), Ok("data/x y.vhd".to_owned()));
        }
    }

    #[test]
    fn an_alias_that_leads_to_no_vhd_is_damaged() {
        let bad: [&[u8]; 8] = [
            b"",
            b" \n\t",
            b"\xff.vhd",
            b"data/x.alias.vhd",
            b"data/x.vhd\0.vhd",
            b"data/x",
            b"/dev/zero",
            b"data/x.vhd/",
        ];
        for content in bad {
            assert_eq!(parse(content).unwrap_err().kind, ErrorKind::Damaged, "{content:?}");
        }
    }

    #[test]
    fn an_alias_of_1024_bytes_is_the_longest() {
        let longest = format!("{}.vhd", "a".repeat(1020));
        assert_eq!(parse(longest.as_bytes()), Ok(longest.clone()));
        assert_eq!(parse(format!("a{longest}").as_bytes()).unwrap_err().kind, ErrorKind::Damaged);
    }
}
