//! Moments as DOS wrote them.

use crate::Time;

/// Seconds of a day.
const DAY: i64 = 86_400;

/// Days from 1970 to 1980, where they begin.
const FIRST_DAY: i64 = 3652;

/// A moment in local time: a date, a time in steps of two seconds, and hundredths of a second past that (0 to 199).
///
/// Source: Microsoft, "FAT: General Overview of On-Disk Format" 1.03, "FAT Directory Structure".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct DosTime {
    /// Years since 1980 (7 bits), month (4), day (5).
    pub(crate) date: u16,
    /// Hours (5 bits), minutes (6), pairs of seconds (5).
    pub(crate) time: u16,
    pub(crate) hundredths: u8,
}

impl DosTime {
    /// Returns the moment as if it were UTC: no volume says of FAT where it was written.
    ///
    /// Month and day count from one; a zero, which is written where nothing is known, is taken for the first, as Linux does.
    pub(crate) fn as_utc(self) -> Time {
        let year = i64::from(self.date >> 9);
        let month = usize::from((self.date >> 5 & 0xf).clamp(1, 12));
        let day = i64::from((self.date & 0x1f).max(1));
        const BEFORE: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        // Years are 1980 to 2107, of which those divisible by four are leap years, but 2100.
        let is_leap = year % 4 == 0 && year != 120;
        let leap_days = (year + 3) / 4 - i64::from(year > 120) + i64::from(is_leap && month > 2);
        let days = FIRST_DAY + year * 365 + leap_days + BEFORE[month - 1] + day - 1;
        let time = i64::from(self.time);
        let seconds =
            (time >> 11) * 3600 + (time >> 5 & 0x3f) * 60 + (time & 0x1f) * 2 + i64::from(self.hundredths / 100);
        Time { seconds: days * DAY + seconds, nanoseconds: u32::from(self.hundredths % 100) * 10_000_000 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_calendar() {
        let cases = [
            ((0, 1, 1), (0, 0, 0), 0, 315_532_800, 0),
            ((0, 0, 0), (0, 0, 0), 0, 315_532_800, 0),
            ((20, 2, 29), (23, 59, 58), 199, 951_868_799, 990_000_000),
            ((20, 3, 1), (0, 0, 0), 0, 951_868_800, 0),
            ((46, 11, 22), (13, 7, 52), 50, 1_795_352_872, 500_000_000),
            ((120, 2, 28), (0, 0, 0), 0, 4_107_456_000, 0),
            ((120, 3, 1), (0, 0, 0), 0, 4_107_542_400, 0),
            ((121, 1, 1), (0, 0, 0), 0, 4_133_980_800, 0),
            ((127, 12, 31), (23, 59, 58), 0, 4_354_819_198, 0),
        ];
        for ((year, month, day), (hour, minute, second), hundredths, seconds, nanoseconds) in cases {
            let (date, time) = (year << 9 | month << 5 | day, hour << 11 | minute << 5 | (second / 2));
            let found = DosTime { date, time, hundredths }.as_utc();
            assert_eq!(found, Time { seconds, nanoseconds }, "{year} {month} {day}");
        }
    }
}
