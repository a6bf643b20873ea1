//! Sizes and rates as people write them.

/// Reads bytes as people write them: `256MiB`, `1g`, `65536`. Units are binary, with or without `iB`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|character: char| character.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("'{text}' is not a size; expected one like 256MiB"))?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("'{text}' has an unknown unit; expected one of KiB, MiB, GiB, TiB")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

/// Reads bytes a second as people write them: a size, and `/s`.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let size = text.trim().strip_suffix("/s");
    parse_size(size.ok_or_else(|| format!("'{text}' is not a rate; expected one like 100 MiB/s"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_usual_spelling() {
        for (text, bytes) in [("0", 0), ("65536", 65536), ("1k", 1024), ("256MiB", 256 << 20), ("2 GB", 2 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "1.5G", "1x", "99999999999999999999", "18446744073709551615k"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_are_sizes_a_second() {
        for (text, bytes) in [("100 MiB/s", 100 << 20), (" 1GiB /s ", 1 << 30), ("65536/s", 65536)] {
            assert_eq!(parse_rate(text), Ok(bytes), "{text}");
        }
        for text in ["100 MiB", "/s", "1 MiB/m", "1.5 MiB/s", "-1 MiB/s"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
