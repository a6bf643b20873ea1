//! The names by which a differencing VHD calls its parent.
//!
//! XO writes the parent's name, relative to the child's folder, into the header and nothing else. Hyper-V, XenServer
//! and older XO add parent locators, and absolute paths of the machine they ran on, which mean nothing here: of those
//! only the last component is looked for, beside the child. Which candidate is right is decided by its uuid.

use storage::Object;

use crate::error::Result;
use crate::header::{Header, ParentLocator};

/// A path is never longer; what claims to be is not read.
pub(crate) const MAX_NAME_BYTES: u32 = 64 << 10;

/// Reads the names in the parent locators, in their order; locators that are no text are passed over.
pub(crate) fn names(object: &dyn Object, header: &Header) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for locator in &header.locators {
        if locator.length == 0 || locator.length > MAX_NAME_BYTES {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(locator.length).expect("bounded by MAX_NAME_BYTES")];
        let read = object.read_at(locator.offset, &mut bytes)?;
        bytes.truncate(read);
        names.extend(decode(locator, &bytes));
    }
    Ok(names)
}

/// Decodes the text of a locator: UTF-16LE for Windows' kinds, a UTF-8 URL for the Macintosh's.
///
/// Source: VHD specification 1.0, "Parent Locator Entry".
fn decode(locator: &ParentLocator, bytes: &[u8]) -> Option<String> {
    let text = match &locator.platform_code {
        b"W2ru" | b"W2ku" => {
            let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
            char::decode_utf16(units).collect::<std::result::Result<String, _>>().ok()?
        }
        b"MacX" => String::from_utf8(bytes.to_vec()).ok()?.strip_prefix("file://")?.to_owned(),
        _ => return None,
    };
    let text = text.trim_end_matches('\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// Returns the relative paths at which the parent may be, best first, each once.
pub(crate) fn candidates(parent_name: &str, located: &[String]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        if !name.is_empty() && !found.iter().any(|known| known == name) {
            found.push(name.to_owned());
        }
    };
    add(parent_name);
    for name in std::iter::once(parent_name).chain(located.iter().map(String::as_str)) {
        let with_slashes = name.replace('\\', "/");
        let is_absolute = with_slashes.starts_with('/') || name.get(1..2) == Some(":");
        if !is_absolute {
            add(&with_slashes);
        }
        add(with_slashes.rsplit('/').next().unwrap_or_default());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_looked_for_where_it_is_named_then_beside_its_child() {
        for (name, located, expected) in [
            ("a.alias.vhd", vec![], vec!["a.alias.vhd"]),
            (
                "C:\\disks\\base.vhd",
                vec![".\\sub\\base.vhd"],
                vec!["C:\\disks\\base.vhd", "base.vhd", "./sub/base.vhd"],
            ),
            ("", vec!["./a.vhd"], vec!["./a.vhd", "a.vhd"]),
            ("../../x.vhd", vec![], vec!["../../x.vhd", "x.vhd"]),
        ] {
            let located: Vec<String> = located.into_iter().map(str::to_owned).collect();
            assert_eq!(candidates(name, &located), expected);
        }
    }

    #[test]
    fn locators_are_decoded_by_their_kind() {
        let locator = |code: &[u8; 4]| ParentLocator { platform_code: *code, space: 0, length: 0, offset: 0 };
        assert_eq!(decode(&locator(b"W2ru"), b".\0\\\0a\0"), Some(".\\a".to_owned()));
        assert_eq!(decode(&locator(b"W2ku"), b"a\0\0\0"), Some("a".to_owned()));
        assert_eq!(decode(&locator(b"MacX"), b"file://./a.vhd"), Some("./a.vhd".to_owned()));
        assert_eq!(decode(&locator(b"MacX"), b"\xff"), None);
        assert_eq!(decode(&locator(b"Wi2k"), b"a"), None);
    }
}
