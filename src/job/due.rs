//! What schedules are to do now. Pure, but for the file that says since when a schedule is known.
//!
//! A schedule is due when it has a time between its last run and now. The last run is known from the log, where each says its schedule,
//! when it began and what time it was due at; a schedule without one counts from when it was first seen as it is now. So a run is
//! neither lost nor made twice, whoever asks, how often, and after whatever crash; many times that were missed are one run.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Starts;
use super::file::Timed;
use super::log::is_far_ahead;
use crate::whole;

/// Where nothing that was missed is made up for, a run may be as late as this all the same: the machine was busy, or just started.
const GRACE: Duration = Duration::from_secs(300);
/// The file, in the folder of a job.
const FILE: &str = "schedules.json";

/// Since when the schedules of a job are known, as they are now.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen(BTreeMap<String, Since>);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Since {
    cron: String,
    timezone: Option<String>,
    since: Timestamp,
}

impl Seen {
    /// Reads what is known, and adds what is new. It is written before anything relies on it.
    ///
    /// # Errors
    /// What the system says.
    pub fn update(folder: &Path, schedules: &[Timed], now: Timestamp) -> io::Result<Self> {
        let path = folder.join(FILE);
        let before: Self = match fs::read(&path) {
            // What cannot be understood is as if nothing were known: what was missed until now is not made up for.
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error),
        };
        let of = |timed: &Timed| {
            let (cron, timezone) = (timed.calendar.pattern().to_owned(), timed.timezone.clone());
            let is_same = |known: &&Since| {
                (&known.cron, &known.timezone) == (&cron, &timezone) && !is_far_ahead(known.since, now)
            };
            let since = before.0.get(&timed.name).filter(is_same).map_or(now, |known| known.since);
            (timed.name.clone(), Since { cron, timezone, since })
        };
        let seen = Self(schedules.iter().map(of).collect());
        if seen != before {
            whole::put(&path, ".schedules.new".as_ref(), &serde_json::to_vec(&seen)?, 0o600, true)?;
        }
        Ok(seen)
    }

    /// Returns when a schedule is due: a time that has passed, if it is due now. `None` if never.
    #[must_use]
    pub fn due(&self, timed: &Timed, starts: &Starts, now: Timestamp) -> Option<Timestamp> {
        let since = self.0.get(&timed.name).map_or(now, |known| known.since);
        let last = starts.last(&timed.name, now).map_or(since, |last| last.max(since));
        let from = match now.checked_sub(GRACE) {
            Ok(earliest) if !timed.makes_up => last.max(earliest),
            _ => last,
        };
        timed.calendar.after(from)
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;
    use uuid::Uuid;

    use super::super::log::{Event, History, Record, Run, RunStatus};
    use super::super::schedule::Calendar;
    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn timed(cron: &str, makes_up: bool) -> Timed {
        Timed {
            name: "night".into(),
            calendar: Calendar::new(cron, TimeZone::UTC).expect("a pattern"),
            timezone: None,
            makes_up,
            is_full: false,
            keep: None,
            replicas: 1,
        }
    }

    /// The start of a run of the schedule that began then, and was due at another time, if it was.
    fn began(at: &str, due: Option<&str>) -> Starts {
        let event = Event::RunStart {
            job: "job".into(),
            schedule: Some("night".into()),
            due: due.map(time),
            host: String::new(),
            process: 1,
        };
        let record = Record { version: 1, time: time(at), run: Uuid::nil(), event };
        let run = Run { id: Uuid::nil(), status: RunStatus::Done, records: vec![record] };
        Starts::of(&History { runs: vec![run], unread: 0 })
    }

    #[test]
    fn what_was_missed_is_one_run_or_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let nightly = timed("0 2 * * *", true);
        let seen =
            Seen::update(folder.path(), std::slice::from_ref(&nightly), time("2026-11-01T12:00:00Z")).expect("written");
        let nothing = Starts::default();
        let early = "2026-11-03T01:59:59.8Z";
        for (makes_up, starts, now, expected) in [
            // Known since noon: the first run is the next night's, and waits for it.
            (true, &nothing, "2026-11-01T12:00:01Z", "2026-11-02T02:00:00Z"),
            (true, &nothing, "2026-11-02T02:00:00Z", "2026-11-02T02:00:00Z"),
            // Three nights off.
            (true, &nothing, "2026-11-04T09:00:00Z", "2026-11-02T02:00:00Z"),
            (false, &nothing, "2026-11-04T09:00:00Z", "2026-11-05T02:00:00Z"),
            (false, &nothing, "2026-11-04T02:04:59Z", "2026-11-04T02:00:00Z"),
            // A run is for all times before it.
            (true, &began("2026-11-04T09:00:00Z", None), "2026-11-04T09:00:01Z", "2026-11-05T02:00:00Z"),
            // The clock was put back, by hand.
            (true, &began("2026-11-04T02:00:00Z", None), "2026-11-03T02:30:00Z", "2026-11-05T02:00:00Z"),
            // It had been years ahead.
            (true, &began("2029-11-04T02:00:00Z", None), "2026-11-03T01:30:00Z", "2026-11-02T02:00:00Z"),
            // It was put back between the look at what is due and the start.
            (true, &began(early, Some("2026-11-03T02:00:00Z")), "2026-11-03T02:00:05Z", "2026-11-04T02:00:00Z"),
            // What was due by a clock that was years ahead is no time of this one, now and when it will be.
            (true, &began(early, Some("2029-11-04T02:00:00Z")), "2026-11-03T02:00:05Z", "2026-11-03T02:00:00Z"),
            (true, &began(early, Some("2029-11-04T02:00:00Z")), "2029-11-03T12:00:00Z", "2026-11-03T02:00:00Z"),
        ] {
            let timed = timed("0 2 * * *", makes_up);
            assert_eq!(seen.due(&timed, starts, time(now)), Some(time(expected)), "{makes_up} {now}");
        }
    }

    #[test]
    fn a_schedule_counts_from_when_it_was_first_seen_as_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let (old, new) = ([timed("0 2 * * *", true)], [timed("0 3 * * *", true)]);
        let first = time("2026-11-01T12:00:00Z");
        let update = |schedules: &[Timed], now| Seen::update(folder.path(), schedules, now).expect("written");
        update(&old, first);
        let later = time("2026-11-09T12:00:00Z");
        assert_eq!(update(&old, later).due(&old[0], &Starts::default(), later), Some(time("2026-11-02T02:00:00Z")));
        assert_eq!(update(&new, later).due(&new[0], &Starts::default(), later), Some(time("2026-11-10T03:00:00Z")));
        // Seen by a clock that was years ahead.
        let earlier = time("2020-11-09T12:00:00Z");
        assert_eq!(update(&new, earlier).due(&new[0], &Starts::default(), earlier), Some(time("2020-11-10T03:00:00Z")));
        fs::write(folder.path().join(FILE), "{").expect("written");
        assert_eq!(update(&new, later).due(&new[0], &Starts::default(), later), Some(time("2026-11-10T03:00:00Z")));
    }
}
