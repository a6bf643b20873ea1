//! Moments as ISO 9660 writes them: in local time, with how far that is ahead of UTC.
//!
//! Source: ECMA-119, 8.4.26.1 and 9.1.5.

use crate::Time;

/// Seconds of the steps in which a zone is told.
const ZONE_STEP: i64 = 15 * 60;

/// Steps that a zone is away from UTC at most, 13 hours; what says more is shown as if it were UTC, as Linux does.
const MAX_ZONE: i64 = 52;

/// Bytes of the long form.
pub(super) const LONG: usize = 17;

/// Returns the moment that seven bytes are: years since 1900, month, day, hour, minute, second, zone.
pub(super) fn short(bytes: [u8; 7]) -> Time {
    let [year, month, day, hour, minute, second, zone] = bytes;
    let date = (1900 + i64::from(year), i64::from(month), i64::from(day));
    moment(date, (i64::from(hour), i64::from(minute), i64::from(second)), 0, zone)
}

/// Returns the moment that sixteen digits and a zone are: year, month, day, hour, minute, second, hundredths. `None` if they are
/// no digits, or all zero, which says that there is none.
pub(super) fn long(bytes: [u8; LONG]) -> Option<Time> {
    let (digits, zone) = bytes.split_at(LONG - 1);
    if digits.iter().all(|digit| *digit == b'0') {
        return None;
    }
    let number = |from: usize, to: usize| {
        digits[from..to]
            .iter()
            .try_fold(0, |number: i64, digit| digit.is_ascii_digit().then(|| number * 10 + i64::from(digit - b'0')))
    };
    let date = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
    let time = (number(8, 10)?, number(10, 12)?, number(12, 14)?);
    Some(moment(date, time, u32::try_from(number(14, 16)?).ok()?, zone[0]))
}

fn moment(date: (i64, i64, i64), (hour, minute, second): (i64, i64, i64), hundredths: u32, zone: u8) -> Time {
    let zone = i64::from(i8::from_ne_bytes([zone]));
    let zone = if zone.abs() <= MAX_ZONE { zone } else { 0 };
    let seconds = ((days(date) * 24 + hour) * 60 + minute) * 60 + second - zone * ZONE_STEP;
    Time { seconds, nanoseconds: hundredths * 10_000_000 }
}

/// Returns the days from 1970 to a date, which may be any numbers: the month before January is that of December.
fn days((year, month, day): (i64, i64, i64)) -> i64 {
    // Counted from March on, a leap day is the last of its year.
    let months = year * 12 + month - 3;
    let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
    let before_year = year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let before_month = (153 * month + 2) / 5;
    // From March of the year 0 to 1970.
    before_year + before_month + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_calendar_in_their_zone() {
        let cases = [
            ([70, 1, 1, 0, 0, 0, 0], 0),
            ([0, 1, 1, 0, 0, 0, 0], -2_208_988_800),
            ([100, 2, 29, 23, 59, 59, 0], 951_868_799),
            ([100, 3, 1, 0, 0, 0, 0], 951_868_800),
            ([126, 11, 22, 13, 7, 52, 4], 1_795_352_872 - 3600),
            ([126, 11, 22, 13, 7, 52, 0xd0], 1_795_352_872 + 12 * 3600),
            ([126, 11, 22, 13, 7, 52, 53], 1_795_352_872),
            ([255, 12, 31, 23, 59, 59, 0], 5_869_583_999),
            // The month before January, and the day before the first.
            ([0, 0, 0, 0, 0, 0, 0], -2_208_988_800 - 32 * 86_400),
        ];
        for (bytes, seconds) in cases {
            assert_eq!(short(bytes), Time { seconds, nanoseconds: 0 }, "{bytes:?}");
        }
    }

    #[test]
    fn the_long_form_has_hundredths_or_says_nothing() {
        let with_zone = |digits: &[u8; 16], zone| {
            let mut bytes = [zone; LONG];
            bytes[..16].copy_from_slice(digits);
            long(bytes)
        };
        let expected = Time { seconds: 1_795_352_872 - 3600, nanoseconds: 990_000_000 };
        assert_eq!(with_zone(b"2026112213075299", 4), Some(expected));
        assert_eq!(with_zone(b"0000000000000000", 0), None);
        assert_eq!(with_zone(b"2026-11-22130752", 0), None);
    }
}
