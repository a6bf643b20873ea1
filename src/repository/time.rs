//! The time of a backup, as its file name says it.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::DateTime;

/// What the name of an intent ends with.
const INTENT: &str = ".xofs-ingest";

/// The time of a backup: UTC, in whole seconds, taken from the *name* of its metadata file.
///
/// Very old repositories lack the final `Z`; both spellings of one second are different times here (they are different
/// files), ordered next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackupTime {
    at: DateTime,
    has_zone: bool,
}

impl BackupTime {
    /// Parses `20260801T020003Z` or `20260801T020003`; `None` for anything else, dates that do not exist included.
    #[must_use]
    pub fn parse(stored: &str) -> Option<Self> {
        let (digits, has_zone) = stored.strip_suffix('Z').map_or((stored, false), |digits| (digits, true));
        let (date, time) = digits.split_once('T')?;
        let all_digits = |text: &str, count| text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
        if !all_digits(date, 8) || !all_digits(time, 6) {
            return None;
        }
        let two = |text: &str, from: usize| text[from..from + 2].parse::<i8>().ok();
        let year = date[..4].parse::<i16>().ok()?;
        let at =
            DateTime::new(year, two(date, 4)?, two(date, 6)?, two(time, 0)?, two(time, 2)?, two(time, 4)?, 0).ok()?;
        Some(Self { at, has_zone })
    }

    /// Reads the time from the name of what `xofs ingest` puts beside files of that time before it writes them, and removes when
    /// their backup exists; `None` if it is none.
    pub(crate) fn of_intent_name(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix('.')?.strip_suffix(INTENT)?)
    }

    /// Returns that name.
    pub(crate) fn intent_name(self) -> String {
        format!(".{}{INTENT}", self.stored())
    }

    /// Returns the time of a metadata file's name, `20260801T020003Z.json`; `None` if it is not one.
    #[must_use]
    pub fn of_metadata_name(name: &str) -> Option<Self> {
        Self::parse(name.strip_suffix(".json")?)
    }

    /// Returns the seconds since 1970-01-01 UTC.
    #[must_use]
    pub fn unix(&self) -> i64 {
        self.timestamp().as_second()
    }

    /// Returns the moment; 1970-01-01 for one in the last hours of the year 9999, which cannot be told.
    pub(super) fn timestamp(self) -> Timestamp {
        self.at.to_zoned(jiff::tz::TimeZone::UTC).map_or(Timestamp::UNIX_EPOCH, |zoned| zoned.timestamp())
    }

    /// Returns the time as file names in the repository spell it: `20260801T020003Z`.
    #[must_use]
    pub fn stored(&self) -> String {
        format!("{}{}", self.at.strftime("%Y%m%dT%H%M%S"), self.zone())
    }

    fn zone(&self) -> &'static str {
        if self.has_zone { "Z" } else { "" }
    }
}

/// As people see it: `2026-08-01T020003Z`, which sorts and holds no colon.
impl fmt::Display for BackupTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}{}", self.at.strftime("%Y-%m-%dT%H%M%S"), self.zone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_from_a_file_name_and_written_back_the_same() {
        for (stored, shown, unix) in [
            ("20260801T020003Z", "2026-08-01T020003Z", 1_785_549_603),
            ("20260801T020003", "2026-08-01T020003", 1_785_549_603),
            ("19700101T000000Z", "1970-01-01T000000Z", 0),
            ("19691231T235959Z", "1969-12-31T235959Z", -1),
        ] {
            let time = BackupTime::parse(stored).unwrap();
            assert_eq!((time.stored().as_str(), time.to_string().as_str(), time.unix()), (stored, shown, unix));
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for stored in [
            "",
            "T",
            "Z",
            "20260801",
            "20261301T000000Z",
            "20260230T000000Z",
            "20260801T020003ZZ",
            "2026080１T02000Z",
            "+0260801T020003Z",
            "20260801T250003Z",
            "20260801T02000３",
        ] {
            assert_eq!(BackupTime::parse(stored), None, "{stored:?}");
        }
        assert_eq!(BackupTime::of_metadata_name("20260801T020003Z.json.tmp"), None);
        assert!(BackupTime::of_metadata_name("20260801T020003Z.json").is_some());
    }
}
