//! The days, weeks, months and years that long-term retention counts, as XO names and bounds them.
//!
//! A moment is first told in a time zone, then moved back by where a period begins, and what is then on the calendar
//! names the period: a day that begins at 6 o'clock ends at 5:59 of the next one.
//!
//! Source: XO, `@xen-orchestra/backups/_getOldEntries.mjs`, with moment and moment-timezone.

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// How long a period is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Period {
    /// A day.
    Daily,
    /// A week from Sunday to Saturday; the week of 1 January is the first of its year.
    Weekly,
    /// A month.
    Monthly,
    /// A year.
    Yearly,
}

impl Period {
    /// All of them, the shortest first.
    pub const ALL: [Self; 4] = [Self::Daily, Self::Weekly, Self::Monthly, Self::Yearly];

    /// Returns how the period is called in options and reasons.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        }
    }

    /// Returns the name of the period that holds `at`: `2026-11-20`, `2026-47`, `2026-11` or `2026`, as in XO's tags.
    ///
    /// `begins` is how much later than midnight (hours, of a day), Sunday, the first of the month or 1 January (days) it
    /// begins: XO's `firstHourOfTheDay`, `firstDayOfWeek`, `firstDayOfMonth` and `firstDayOfYear`.
    #[must_use]
    pub fn bucket(self, at: Timestamp, zone: &TimeZone, begins: u16) -> String {
        let hours = i64::from(begins) * if self == Self::Daily { 1 } else { 24 };
        // On the calendar, not in time: to XO an hour or day that the clock left out is one like any other.
        let date = zone.to_datetime(at).saturating_sub(SignedDuration::from_hours(hours)).date();
        match self {
            Self::Daily => date.strftime("%Y-%m-%d").to_string(),
            Self::Weekly => {
                let days = 6 - date.weekday().to_sunday_zero_offset();
                let saturday = date.saturating_add(SignedDuration::from_hours(24 * i64::from(days)));
                format!("{:04}-{:02}", saturday.year(), (saturday.day_of_year() - 1) / 7 + 1)
            }
            Self::Monthly => date.strftime("%Y-%m").to_string(),
            Self::Yearly => date.strftime("%Y").to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_in_the_periods_of_its_time_zone() {
        use Period::{Daily, Monthly, Weekly, Yearly};
        for (at, zone, period, begins, bucket) in [
            ("2026-11-20T23:30:00Z", "UTC", Daily, 0, "2026-11-20"),
            ("2026-11-20T23:30:00Z", "Europe/Paris", Daily, 0, "2026-11-21"),
            ("2026-11-20T04:59:59Z", "America/New_York", Daily, 0, "2026-11-19"),
            ("2026-11-20T05:00:00Z", "America/New_York", Daily, 0, "2026-11-20"),
            ("2026-11-20T05:59:59Z", "UTC", Daily, 6, "2026-11-19"),
            ("2026-11-20T06:00:00Z", "UTC", Daily, 6, "2026-11-20"),
            // 2027 begins on a Friday: its first week begins on 27 December, a Sunday.
            ("2026-12-26T12:00:00Z", "UTC", Weekly, 0, "2026-52"),
            ("2026-12-27T00:00:00Z", "UTC", Weekly, 0, "2027-01"),
            ("2027-01-02T23:59:59Z", "UTC", Weekly, 0, "2027-01"),
            ("2027-01-03T00:00:00Z", "UTC", Weekly, 0, "2027-02"),
            ("2022-12-31T12:00:00Z", "UTC", Weekly, 0, "2022-53"),
            ("2026-12-27T12:00:00Z", "UTC", Weekly, 1, "2026-52"),
            ("2026-11-01T12:00:00Z", "UTC", Monthly, 0, "2026-11"),
            ("2026-11-01T12:00:00Z", "UTC", Monthly, 1, "2026-10"),
            ("2026-01-01T00:30:00Z", "America/New_York", Yearly, 0, "2025"),
            ("2026-03-31T12:00:00Z", "UTC", Yearly, 90, "2025"),
            ("2026-04-01T12:00:00Z", "UTC", Yearly, 90, "2026"),
        ] {
            let (moment, zone) = (at.parse().unwrap(), TimeZone::get(zone).unwrap());
            assert_eq!(period.bucket(moment, &zone, begins), bucket, "{at} {zone:?} {period:?} {begins}");
        }
    }

    #[test]
    fn moving_back_counts_hours_of_the_calendar() {
        for (at, zone, begins, bucket) in [
            // Samoa had no 30 December 2011.
            ("2011-12-30T09:59:59Z", "Pacific/Apia", 0, "2011-12-29"),
            ("2011-12-30T10:00:00Z", "Pacific/Apia", 0, "2011-12-31"),
            ("2011-12-30T14:43:30Z", "Pacific/Apia", 5, "2011-12-30"),
            ("2011-12-30T10:00:00Z", "Pacific/Apia", 25, "2011-12-29"),
            // Two hours after midnight for the second time, and three hours after it though only two passed.
            ("2025-10-26T01:00:00Z", "Europe/Paris", 2, "2025-10-26"),
            ("2025-03-30T01:00:00Z", "Europe/Paris", 3, "2025-03-30"),
        ] {
            let (moment, zone) = (at.parse().unwrap(), TimeZone::get(zone).unwrap());
            assert_eq!(Period::Daily.bucket(moment, &zone, begins), bucket, "{at} {begins}");
        }
    }

    #[test]
    fn the_ends_of_time_have_periods_too() {
        for at in [Timestamp::MIN, Timestamp::MAX] {
            for period in Period::ALL {
                for zone in ["UTC", "Pacific/Apia", "America/New_York"] {
                    assert!(!period.bucket(at, &TimeZone::get(zone).unwrap(), u16::MAX).is_empty());
                }
            }
        }
    }
}
