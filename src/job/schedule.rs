//! When a job runs next: a cron pattern in a time zone. Pure: times in, times out.
//!
//! The pattern (minute, hour, day of month, month 1 to 12, day of week; a day matches if the one or the other day does, where both
//! are given) says times of a clock on a wall. Each of them is one run:
//!
//! | the clock | a time | runs |
//! |---|---|---|
//! | goes on | is there once | then |
//! | is put forward over it | is skipped | once, when the clock was put forward; all that were skipped together |
//! | is put back over it | is there twice | the first time |
//!
//! So runs are in the order of their times, and nothing is left out or done twice. Who runs every few minutes has a pause as long as
//! what is repeated.

use std::fmt;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};

/// How often a time is looked for again that lies in what a clock repeats: a day of minutes, more than any clock was put back.
const MOST_REPEATED: usize = 24 * 60;

/// The fields of a pattern, and what each may say.
const FIELDS: [(&str, &str); 5] = [
    ("minute", "0 to 59"),
    ("hour", "0 to 23"),
    ("day of month", "1 to 31, or L"),
    ("month", "1 to 12, or jan to dec"),
    ("day of week", "0 to 7, or sun to sat"),
];

/// When something runs, again and again.
#[derive(Clone)]
pub struct Calendar {
    cron: Cron,
    zone: TimeZone,
}

impl fmt::Debug for Calendar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Calendar({} {})", self.cron.as_str(), self.zone.iana_name().unwrap_or("local"))
    }
}

impl PartialEq for Calendar {
    fn eq(&self, other: &Self) -> bool {
        self.cron.as_str() == other.cron.as_str() && self.zone == other.zone
    }
}

impl Calendar {
    /// Reads a pattern of five fields, or one like `@daily`.
    ///
    /// # Errors
    /// Why it is none, or that it never comes.
    pub fn new(pattern: &str, zone: TimeZone) -> Result<Self, String> {
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(pattern).map_err(|_| fault(pattern, &parser))?;
        let calendar = Self { cron, zone };
        // A leap day is at most eight years away.
        let begin = DateTime::constant(2000, 1, 1, 0, 0, 0, 0);
        match calendar.cron.find_next_occurrence(&begin, true) {
            Ok(_) => Ok(calendar),
            Err(_) => Err("there is no such day".to_owned()),
        }
    }

    /// Returns the pattern as it was written.
    #[must_use]
    pub fn pattern(&self) -> &str {
        self.cron.as_str()
    }

    /// Returns the time zone.
    #[must_use]
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// Returns the first run later than `time`; `None` at the end of all calendars.
    #[must_use]
    pub fn after(&self, time: Timestamp) -> Option<Timestamp> {
        // A time of the clock before this one is a run no later than `time`: instants are in the order of the clock's times, if of
        // each the first is taken.
        let mut clock = self.zone.to_datetime(time);
        let mut is_first = true;
        for _ in 0..MOST_REPEATED {
            clock = self.cron.find_next_occurrence(&clock, is_first).ok()?;
            is_first = false;
            let instant = self.instant(clock)?;
            if instant > time {
                return Some(instant);
            }
        }
        None
    }

    /// Returns when the clock shows a time, first; when it was put forward, if it skips it.
    fn instant(&self, clock: DateTime) -> Option<Timestamp> {
        let ambiguous = self.zone.to_ambiguous_timestamp(clock);
        match ambiguous.offset() {
            // Before this instant the clock had the offset `before`, by which the time would lie past it.
            AmbiguousOffset::Gap { before, .. } => {
                let past = before.to_timestamp(clock).ok()?;
                self.zone
                    .preceding(past.checked_add(jiff::SignedDuration::from_nanos(1)).ok()?)
                    .next()
                    .map(|put| put.timestamp())
            }
            AmbiguousOffset::Unambiguous { .. } | AmbiguousOffset::Fold { .. } => ambiguous.earlier().ok(),
        }
    }
}

/// Says why a pattern is none: each field is tried among others that are right.
fn fault(pattern: &str, parser: &CronParser) -> String {
    let written: Vec<&str> = pattern.split_whitespace().collect();
    if pattern.contains('@') {
        return "there are @hourly, @daily, @weekly, @monthly and @yearly".to_owned();
    }
    if written.len() != FIELDS.len() {
        return format!("{} fields are needed, and it has {}", FIELDS.len(), written.len());
    }
    let is_wrong = |number: usize, text: &str| {
        let mut fields = ["*"; FIELDS.len()];
        fields[number] = text;
        parser.parse(&fields.join(" ")).is_err()
    };
    let wrong: Vec<String> = written
        .iter()
        .zip(FIELDS)
        .enumerate()
        .filter(|(number, (text, _))| is_wrong(*number, text))
        .map(|(_, (text, (name, range)))| format!("'{}' is no {name}, which is {range}", text.escape_debug()))
        .collect();
    if wrong.is_empty() { "its fields do not go together".to_owned() } else { wrong.join("; ") }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use proptest::prelude::*;

    use super::*;

    fn calendar(pattern: &str, zone: &str) -> Calendar {
        Calendar::new(pattern, TimeZone::get(zone).expect("known")).expect("a pattern")
    }

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    /// The next runs, as the clock of the zone shows them.
    fn runs(pattern: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
        let calendar = calendar(pattern, zone);
        let mut at = time(after);
        let next = |_| {
            at = calendar.after(at).expect("it goes on");
            at.to_zoned(calendar.zone().clone()).strftime("%m-%d %H:%M %Z").to_string()
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn a_time_that_is_skipped_is_one_run_when_the_clock_was_put_forward() {
        // 2026-03-29: from 02:00 to 03:00.
        for (pattern, expected) in [
            ("30 2 * * *", ["03-28 02:30 CET", "03-29 03:00 CEST", "03-30 02:30 CEST"]),
            ("0 3 * * *", ["03-28 03:00 CET", "03-29 03:00 CEST", "03-30 03:00 CEST"]),
            ("5,35 2 29 3 *", ["03-29 03:00 CEST", "03-29 02:05 CEST", "03-29 02:35 CEST"]),
            ("0 * 29 * *", ["03-29 00:00 CET", "03-29 01:00 CET", "03-29 03:00 CEST"]),
        ] {
            assert_eq!(runs(pattern, "Europe/Paris", "2026-03-28T00:00:00Z", 3), expected, "{pattern}");
        }
    }

    #[test]
    fn a_time_that_is_there_twice_is_one_run_the_first_time() {
        // 2026-10-25: from 03:00 back to 02:00.
        for (pattern, expected) in [
            ("30 2 * * *", ["10-25 02:30 CEST", "10-26 02:30 CET", "10-27 02:30 CET"]),
            ("0 * * * *", ["10-25 01:00 CEST", "10-25 02:00 CEST", "10-25 03:00 CET"]),
            ("0 3 * * *", ["10-25 03:00 CET", "10-26 03:00 CET", "10-27 03:00 CET"]),
        ] {
            assert_eq!(runs(pattern, "Europe/Paris", "2026-10-24T22:30:00Z", 3), expected, "{pattern}");
        }
        // From in what is repeated, the second time.
        let calendar = calendar("* * * * *", "Europe/Paris");
        assert_eq!(calendar.after(time("2026-10-25T01:10:00Z")), Some(time("2026-10-25T02:00:00Z")));
    }

    #[test]
    fn a_day_that_is_skipped_is_one_run() {
        // Samoa went over the date line: 2011-12-30 never was.
        assert_eq!(
            runs("15 6,18 * * *", "Pacific/Apia", "2011-12-29T20:00:00Z", 3),
            ["12-29 18:15 -10", "12-31 00:00 +14", "12-31 06:15 +14"]
        );
    }

    #[test]
    fn patterns_are_those_of_cron() {
        for (pattern, expected) in [
            ("0 2 * 1 *", "2027-01-01T02:00:00Z"),
            ("0 2 * * wed", "2026-11-25T02:00:00Z"),
            ("0 2 13 * fri", "2026-11-27T02:00:00Z"),
            ("@daily", "2026-11-24T00:00:00Z"),
            ("0 0 29 2 *", "2028-02-29T00:00:00Z"),
            ("0 2 * * sun#1", "2026-12-06T02:00:00Z"),
        ] {
            assert_eq!(calendar(pattern, "UTC").after(time("2026-11-23T12:00:00Z")), Some(time(expected)), "{pattern}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_told_with_each_field_that_is_wrong() {
        for (pattern, expected) in [
            ("", "5 fields are needed, and it has 0"),
            ("0 2 * *", "5 fields are needed, and it has 4"),
            ("0 0 2 * * *", "5 fields are needed, and it has 6"),
            ("61 * * * *", "'61' is no minute, which is 0 to 59"),
            (
                "*/0 24 0 * *",
                "'*/0' is no minute, which is 0 to 59; '24' is no hour, which is 0 to 23; '0' is no day of month, which is 1 to 31, or L",
            ),
            ("0 2 * 0 *", "'0' is no month, which is 1 to 12, or jan to dec"),
            ("0 2 * * wen", "'wen' is no day of week, which is 0 to 7, or sun to sat"),
            ("0 5-2 * * *", "'5-2' is no hour, which is 0 to 23"),
            ("0 0 30 2 *", "there is no such day"),
            ("every day", "5 fields are needed, and it has 2"),
            ("@nightly", "there are @hourly, @daily, @weekly, @monthly and @yearly"),
        ] {
            assert_eq!(Calendar::new(pattern, TimeZone::UTC).expect_err(pattern), expected, "{pattern}");
        }
    }

    /// All runs of a pattern of a minute and an hour, by looking at each minute of the clock.
    fn brute_force(
        minute: Option<i8>,
        hour: Option<i8>,
        zone: &TimeZone,
        from: Timestamp,
        until: Timestamp,
    ) -> Vec<Timestamp> {
        let step = SignedDuration::from_mins(1);
        let mut found: Vec<Timestamp> = Vec::new();
        let is_meant =
            |clock: DateTime| minute.is_none_or(|it| it == clock.minute()) && hour.is_none_or(|it| it == clock.hour());
        // The latest time that the clock has shown; what it shows again is no run.
        let begin = from.checked_sub(SignedDuration::from_hours(50)).expect("in range");
        let mut shown = zone.to_datetime(begin);
        let mut at = begin;
        while at <= until {
            let now = zone.to_datetime(at);
            let mut clock = shown.checked_add(step).expect("in range");
            // One minute on; or many, if it was put forward; or none, if it was put back.
            while clock <= now {
                if is_meant(clock) && found.last() != Some(&at) {
                    found.push(at);
                }
                shown = clock;
                clock = clock.checked_add(step).expect("in range");
            }
            at = at.checked_add(step).expect("in range");
        }
        found.retain(|run| *run > from);
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

        #[test]
        fn runs_are_those_that_a_look_at_each_minute_finds(
            zone in proptest::sample::select(vec![
                "Europe/Paris", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "America/St_Johns", "Asia/Kolkata",
            ]),
            change in 0_usize..8,
            minute in proptest::option::of(0_i8..60),
            hour in proptest::option::of(0_i8..24),
            ahead in 0_i64..48 * 60,
        ) {
            let zone = TimeZone::get(zone).expect("known");
            // Around one of the changes of the clock since 2020; where there is none, anywhere.
            let since = time("2020-01-01T00:00:00Z");
            let changes: Vec<Timestamp> = zone.following(since).take(8).map(|put| put.timestamp()).collect();
            let around = changes.get(change).copied().unwrap_or(since);
            let from = around.checked_sub(SignedDuration::from_mins(ahead)).expect("in range");
            let until = from.checked_add(SignedDuration::from_hours(72)).expect("in range");
            let written = |field: Option<i8>| field.map_or("*".to_owned(), |number| number.to_string());
            let pattern = format!("{} {} * * *", written(minute), written(hour));
            let calendar = Calendar::new(&pattern, zone.clone()).expect("a pattern");
            let runs: Vec<Timestamp> =
                std::iter::successors(calendar.after(from), |run| calendar.after(*run)).take_while(|run| *run <= until).collect();
            prop_assert_eq!(runs, brute_force(minute, hour, &zone, from, until), "{}", pattern);
        }
    }
}
