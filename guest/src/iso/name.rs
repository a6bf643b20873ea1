//! Names where there is no Rock Ridge, as Linux shows them unless it is told otherwise.

use crate::utf16;

/// Returns a name of ISO 9660 itself: in lower case, without `;1` and a dot before that.
///
/// Linux ends it at a zero, and has a dot for `;` and `/`.
pub(super) fn plain(stored: &[u8]) -> Vec<u8> {
    let whole = stored.strip_suffix(b".;1").or_else(|| stored.strip_suffix(b";1")).unwrap_or(stored);
    let name = whole.split(|byte| *byte == 0).next().unwrap_or_default();
    let shown = |byte: &u8| match byte {
        b';' | b'/' => b'.',
        byte => byte.to_ascii_lowercase(),
    };
    name.iter().map(shown).collect()
}

/// Returns a name of Joliet, of big-endian units: without `;1`, and without dots at its end, which Windows has none of either.
pub(super) fn joliet(stored: &[u8]) -> Vec<u8> {
    let mut name = utf16::to_bytes(utf16::big_endian(stored).take_while(|unit| *unit != 0));
    if name.len() > 2 && name.ends_with(b";1") {
        name.truncate(name.len() - 2);
    }
    while name.len() > 1 && name.ends_with(b".") {
        name.pop();
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_linux_shows() {
        let cases: [(&[u8], &[u8]); 9] = [
            (b"README.TXT;1", b"readme.txt"),
            (b"README.;1", b"readme"),
            (b"README;1", b"readme"),
            (b"README.", b"readme."),
            (b"README.TXT;2", b"readme.txt.2"),
            (b"A/B", b"a.b"),
            (b"DIR", b"dir"),
            (b"NUL\0.;1", b"nul"),
            (b";1", b""),
        ];
        for (stored, shown) in cases {
            assert_eq!(plain(stored), shown, "{}", stored.escape_ascii());
        }
        let cases = [("Read Me.txt;1", "Read Me.txt"), ("日本...", "日本"), (";1", ";1"), ("..", "."), ("a\0b", "a")];
        for (stored, shown) in cases {
            let units: Vec<u8> = stored.encode_utf16().flat_map(u16::to_be_bytes).collect();
            assert_eq!(joliet(&units), shown.as_bytes(), "{stored:?}");
        }
    }
}
