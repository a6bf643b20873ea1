//! How values are written for people.

use std::fmt;

/// Writes bytes with a binary unit: `512 B`, `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    let mut scale = 1024_u64;
    while unit + 1 < UNITS.len() && bytes / scale >= 1024 {
        unit += 1;
        scale *= 1024;
    }
    let tenths = u128::from(bytes) * 10 / u128::from(scale);
    if tenths % 10 == 0 || tenths >= 1000 {
        format!("{} {}", tenths / 10, UNITS[unit])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

/// Shows text that came from a repository on a terminal: control characters are escaped, everything else is as it is.
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.chars().any(is_dangerous) {
            return f.pad(self.0);
        }
        let escaped: String = self
            .0
            .chars()
            .flat_map(|character| {
                if is_dangerous(character) { character.escape_unicode().collect::<Vec<_>>() } else { vec![character] }
            })
            .collect();
        f.pad(&escaped)
    }
}

/// Shows bytes of a guest, a name or a target, in the same way; what is not UTF-8 as `\xNN`.
pub struct ShownBytes<'a>(pub &'a [u8]);

impl fmt::Display for ShownBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            write!(f, "{}{}", Shown(chunk.valid()), chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

/// Control characters, and the invisible ones that turn the direction of a line around.
fn is_dangerous(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Says how many: `1 disk`, `3 disks`.
pub fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_with_at_most_one_decimal() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (67_108_864, "64 MiB"),
            (1 << 40, "1 TiB"),
            (123_456_789, "117 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(Shown("wéb 01").to_string(), "wéb 01");
        assert_eq!(Shown("a\u{1b}[2Jb\u{202e}").to_string(), "a\\u{1b}[2Jb\\u{202e}");
        assert_eq!(format!("{:6}|", Shown("ab")), "ab    |");
        assert_eq!(ShownBytes(b"w\xc3\xa9b \xff\x1b[2J").to_string(), "w\u{e9}b \\xff\\u{1b}[2J");
    }
}
