//! Names: short ones in the code page of a PC, long ones in UTF-16 before them.
//!
//! Source: Microsoft, "FAT: General Overview of On-Disk Format" 1.03, "Long Directory Entries"; for the lower-case bits
//! Linux `fs/fat/dir.c`.

use crate::Fields;
use crate::clusters::RECORD;
use crate::utf16;

/// Bytes of a short name: eight, and three after the dot that is not stored.
const SHORT: usize = 11;
const BASE: usize = 8;

/// Characters from 128 on in code page 437, which Linux assumes, too. No volume says which one its short names are in. All
/// differ, so that no two names become one; where a guest had another code page (850 in Western Europe), a few letters of
/// short names that no long one goes with are others than it showed.
const CODE_PAGE: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// In a record, that the base or the extension is in lower case.
const LOWER_BASE: u8 = 0x08;
const LOWER_EXTENSION: u8 = 0x10;

/// Returns the name that eleven bytes are, nothing for one of blanks; `case` says what of it is in lower case.
pub(super) fn short(stored: &[u8; SHORT], case: u8) -> Vec<u8> {
    let (base, extension) = stored.split_at(BASE);
    let mut base = base.to_vec();
    // The first byte of what was deleted is 0xe5, so that a name that starts so is stored thus.
    if base[0] == 0x05 {
        base[0] = 0xe5;
    }
    let mut name = text(&base, case & LOWER_BASE != 0);
    let extension = text(extension, case & LOWER_EXTENSION != 0);
    if !extension.is_empty() {
        name.push('.');
        name.push_str(&extension);
    }
    name.into_bytes()
}

/// Returns the label that eleven bytes are.
pub(super) fn label(stored: &[u8; SHORT]) -> String {
    let mut stored = *stored;
    if stored[0] == 0x05 {
        stored[0] = 0xe5;
    }
    text(&stored, false)
}

/// Returns the characters of bytes but for blanks at their end.
fn text(bytes: &[u8], is_lower: bool) -> String {
    let len = bytes.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
    let characters = bytes[..len].iter().map(|byte| match byte.checked_sub(128) {
        Some(index) => CODE_PAGE.chars().nth(index.into()).unwrap_or(char::REPLACEMENT_CHARACTER),
        None => char::from(*byte),
    });
    if is_lower { characters.flat_map(char::to_lowercase).collect() } else { characters.collect() }
}

/// Returns the checksum of a short name that its long one has.
pub(super) fn checksum(stored: &[u8; SHORT]) -> u8 {
    stored.iter().fold(0, |sum: u8, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// Units of UTF-16 in a record, and where they stand.
const UNITS: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];

/// Records of a name at most, and units: the last has some to spare.
const MAX_PARTS: u8 = 20;
const MAX_UNITS: usize = 255;

/// In the number of a part, that it is the last of a name; it stands first.
const LAST: u8 = 0x40;

/// A long name as far as it was read.
///
/// ```text
/// nothing ──last part, n──▶ n−1 are missing ──part n−1──▶ ... ──▶ complete ──its short name──▶ the name
///    ▲                              │                                 │
///    └───── anything else, which left parts without a short name ─────┘
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Long {
    /// From the last part to the first.
    parts: Vec<[u16; UNITS.len()]>,
    missing: u8,
    checksum: u8,
}

impl Long {
    /// Adds a record that is part of a long name.
    pub(super) fn add(&mut self, record: &[u8; RECORD]) {
        let fields = Fields(record);
        let (number, checksum) = (record[0], record[13]);
        if number & LAST != 0 && (1..=MAX_PARTS).contains(&(number & !LAST)) {
            *self = Self { parts: Vec::new(), missing: number & !LAST, checksum };
        } else if number == 0 || number != self.missing || checksum != self.checksum {
            *self = Self::default();
            return;
        }
        self.missing -= 1;
        self.parts.push(UNITS.map(|at| fields.le16(at).unwrap_or_default()));
    }

    /// Forgets what was read, and returns it if it is the whole name that goes with a short one.
    pub(super) fn take(&mut self, short: &[u8; SHORT]) -> Option<Vec<u8>> {
        let Self { parts, missing, checksum: sum } = std::mem::take(self);
        if parts.is_empty() || missing > 0 || sum != checksum(short) {
            return None;
        }
        let units: Vec<u16> = parts.into_iter().rev().flatten().take_while(|unit| *unit != 0).collect();
        (1..=MAX_UNITS).contains(&units.len()).then(|| utf16::to_bytes(units))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT_NAME: &[u8; SHORT] = b"ALONGE~1TXT";

    /// The records of a name in the order in which they stand.
    fn parts(name: &str) -> Vec<[u8; RECORD]> {
        let mut units: Vec<u16> = name.encode_utf16().collect();
        if !units.len().is_multiple_of(13) {
            units.push(0);
            units.resize(units.len().next_multiple_of(13), 0xffff);
        }
        let count = units.len() / 13;
        let part = |(index, units): (usize, &[u16])| {
            let mut record = [0; RECORD];
            record[0] = u8::try_from(index + 1).unwrap() | if index + 1 == count { LAST } else { 0 };
            record[11] = 0x0f;
            record[13] = checksum(SHORT_NAME);
            for (at, unit) in UNITS.iter().zip(units) {
                record[*at..at + 2].copy_from_slice(&unit.to_le_bytes());
            }
            record
        };
        let mut parts: Vec<_> = units.chunks(13).enumerate().map(part).collect();
        parts.reverse();
        parts
    }

    fn read(parts: &[[u8; RECORD]]) -> Option<String> {
        let mut long = Long::default();
        parts.iter().for_each(|part| long.add(part));
        long.take(SHORT_NAME).map(|name| String::from_utf8(name).unwrap())
    }

    #[test]
    fn short_names_are_in_code_page_437() {
        let cases: [(&[u8; 11], u8, &str); 9] = [
            (b"README  TXT", 0, "README.TXT"),
            (b"README  TXT", LOWER_BASE, "readme.TXT"),
            (b"README  TXT", LOWER_EXTENSION, "README.txt"),
            (b"README     ", LOWER_BASE | LOWER_EXTENSION, "readme"),
            (b"A B     C D", 0, "A B.C D"),
            (b"\x05\x80\xff\xe1\xf6   \xe1\x81 ", 0, "σÇ\u{a0}ß÷.ßü"),
            (b"\x9a\x8e      \x99  ", LOWER_BASE, "üä.Ö"),
            (b"        TXT", 0, ".TXT"),
            (b"           ", 0, ""),
        ];
        for (stored, case, name) in cases {
            assert_eq!(String::from_utf8(short(stored, case)).unwrap(), name);
        }
        assert_eq!(label(b"A B        "), "A B");
    }

    #[test]
    fn no_two_bytes_are_one_character() {
        let names: std::collections::HashSet<_> = (0..=255).map(|byte| text(&[byte, b'x'], false)).collect();
        assert_eq!((names.len(), CODE_PAGE.chars().count()), (256, 128));
    }

    #[test]
    fn a_long_name_is_put_together_from_its_parts() {
        let whole = "n".repeat(255);
        for name in ["a", "thirteen-char", "A long name.text", "日本語 – ñ – 😀", whole.as_str()] {
            assert_eq!(read(&parts(name)).as_deref(), Some(name));
        }
    }

    #[test]
    fn parts_that_do_not_fit_together_are_no_name() {
        let sound = parts("a name of three parts, not fewer");
        assert_eq!(sound.len(), 3);
        let changed = |part: usize, at: usize, byte: u8| {
            let mut parts = sound.clone();
            parts[part][at] = byte;
            parts
        };
        let cases = [
            vec![],
            sound[1..].to_vec(),
            sound[..2].to_vec(),
            vec![sound[0], sound[2], sound[1]],
            vec![sound[0], sound[2]],
            [&sound[..], &sound[2..]].concat(),
            changed(0, 0, LAST),
            changed(0, 0, LAST | 21),
            changed(0, 0, 3),
            changed(1, 0, 0),
            changed(1, 13, 7),
            parts(&"n".repeat(256)),
        ];
        for (number, case) in cases.iter().enumerate() {
            assert_eq!(read(case), None, "{number}");
        }
        let mut other = Long::default();
        sound.iter().for_each(|part| other.add(part));
        assert_eq!((other.take(b"ALONGE~2TXT"), other), (None, Long::default()));
        // A name that starts anew takes the place of one that was not complete.
        assert_eq!(read(&[&sound[..2], &parts("b")].concat()).as_deref(), Some("b"));
    }
}
