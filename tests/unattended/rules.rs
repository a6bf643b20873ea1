//! Which backups rules keep, by docs/forget.md alone, and when schedules are due, by docs/jobs.md alone.

use std::collections::BTreeSet;

use jiff::civil::{Date, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// What is kept of a schedule's backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    pub last: usize,
    pub daily: usize,
    pub weekly: usize,
}

impl Keep {
    /// The rules as a job's file has them; `None` if there are none: then all is kept.
    pub fn text(self) -> Option<String> {
        let rules = [("last", self.last), ("daily", self.daily), ("weekly", self.weekly)];
        let some = rules.iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{name} = {count}"));
        let text = some.collect::<Vec<_>>().join(", ");
        (!text.is_empty()).then(|| format!("keep = {{ {text} }}\n"))
    }

    /// Returns those of the times that are kept; of one VM, mode, job and schedule.
    pub fn kept(self, times: &BTreeSet<Timestamp>, zone: &TimeZone) -> BTreeSet<Timestamp> {
        if self.text().is_none() {
            return times.clone();
        }
        let mut kept: BTreeSet<Timestamp> = times.iter().rev().take(self.last).copied().collect();
        let date = |time: Timestamp| zone.to_datetime(time).date();
        for (count, period) in [(self.daily, day as fn(Date) -> (i16, i16)), (self.weekly, week)] {
            let periods: BTreeSet<_> = times.iter().map(|time| period(date(*time))).collect();
            let oldest = |of: &(i16, i16)| times.iter().find(|time| period(date(**time)) == *of).copied();
            kept.extend(periods.iter().rev().take(count).filter_map(oldest));
        }
        kept
    }
}

fn day(date: Date) -> (i16, i16) {
    (date.year(), date.day_of_year())
}

/// The week of a day, by its year and number: from Sunday on, and the first of a year is the one with 1 January in it.
fn week(date: Date) -> (i16, i16) {
    let mut saturday = date;
    while saturday.weekday() != Weekday::Saturday {
        saturday = saturday.tomorrow().expect("in range");
    }
    (saturday.year(), (saturday.day_of_year() - 1) / 7)
}

/// When something runs.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    pub hour: i8,
    pub minute: i8,
    /// Only on this day of the week.
    pub weekday: Option<Weekday>,
}

impl Pattern {
    /// As a job's file has it.
    pub fn text(self) -> String {
        let weekday = self.weekday.map_or("*".to_owned(), |day| day.to_sunday_zero_offset().to_string());
        format!("{} {} * * {weekday}", self.minute, self.hour)
    }

    /// Returns the runs after a time and not after another one: each when the clock on the wall first shows its time or a later one.
    pub fn runs(self, zone: &TimeZone, after: Timestamp, until: Timestamp) -> Vec<Timestamp> {
        let (first, last) = (zone.to_datetime(after).date(), zone.to_datetime(until).date());
        let days = first.series(jiff::Span::new().days(1)).take_while(|day| *day <= last);
        let meant = days.filter(|day| self.weekday.is_none_or(|weekday| weekday == day.weekday()));
        let time = Time::constant(self.hour, self.minute, 0, 0);
        let runs = meant.filter_map(|day| {
            let clock = day.to_datetime(time);
            // No zone is farther from that of Greenwich.
            let begin = TimeZone::UTC.to_timestamp(clock).ok()?.checked_sub(SignedDuration::from_hours(15)).ok()?;
            let minutes = (0..30 * 60).map(SignedDuration::from_mins);
            minutes.filter_map(|minutes| begin.checked_add(minutes).ok()).find(|at| zone.to_datetime(*at) >= clock)
        });
        runs.filter(|run| *run > after && *run <= until).collect()
    }
}
