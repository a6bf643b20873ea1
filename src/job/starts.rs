//! When the runs of a job began, by its log: all that a schedule has to know of them.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use jiff::Timestamp;

use super::log::{self, Event, History, Record, is_far_ahead};

/// When runs began, oldest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Starts(Vec<Start>);

#[derive(Debug, Clone, PartialEq)]
struct Start {
    time: Timestamp,
    schedule: Option<String>,
    due: Option<Timestamp>,
    process: u32,
}

impl Starts {
    /// Takes them from what a log holds.
    #[must_use]
    pub fn of(history: &History) -> Self {
        let mut starts = Self::default();
        history.runs.iter().flat_map(|run| &run.records).for_each(|record| starts.add(record));
        starts
    }

    fn add(&mut self, record: &Record) {
        if let Event::RunStart { schedule, due, process, .. } = &record.event {
            self.0.push(Start { time: record.time, schedule: schedule.clone(), due: *due, process: *process });
        }
    }

    /// Returns when a run of a schedule was begun last, as seen from `now`; what began by a clock that was wrong does not count.
    ///
    /// A clock may be put back between the look that finds a run due and its start: it is for the time that it was due at, too.
    #[must_use]
    pub fn last(&self, schedule: &str, now: Timestamp) -> Option<Timestamp> {
        let counts = |start: &&Start| start.schedule.as_deref() == Some(schedule) && !is_far_ahead(start.time, now);
        let time = |start: &Start| {
            let due = start.due.filter(|due| !is_far_ahead(*due, start.time.min(now)));
            due.map_or(start.time, |due| due.max(start.time))
        };
        self.0.iter().filter(counts).map(time).max()
    }

    /// Whether a process has begun a run, the last one or the one before.
    #[must_use]
    pub fn has_begun(&self, process: u32) -> bool {
        self.0.iter().rev().take(2).any(|start| start.process == process)
    }
}

/// The starts of a job for who asks again and again: its log is read only where it has changed.
#[derive(Debug, Default)]
pub struct Kept {
    marks: Vec<Mark>,
    starts: Starts,
}

/// What tells a file of a log from what it was: it is appended to, and renamed.
#[derive(Debug, PartialEq)]
struct Mark {
    inode: u64,
    len: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl Mark {
    fn of(metadata: &Metadata) -> Self {
        Self { inode: metadata.ino(), len: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

impl Kept {
    /// Returns what the logs in a job's folder say now.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&mut self, folder: &Path) -> io::Result<&Starts> {
        let files: Vec<File> = log::files(folder).collect::<io::Result<_>>()?;
        // Before they are read: what is appended meanwhile is read again.
        let marks: Vec<Mark> = files.iter().map(|file| Ok(Mark::of(&file.metadata()?))).collect::<io::Result<_>>()?;
        if marks != self.marks {
            let mut starts = Starts::default();
            for file in files {
                log::records(file, |record| record.iter().for_each(|record| starts.add(record)))?;
            }
            (self.marks, self.starts) = (marks, starts);
        }
        Ok(&self.starts)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, FileTimes, OpenOptions};

    use uuid::Uuid;

    use super::super::log::{Log, RunStatus};
    use super::*;

    fn begin(folder: &Path, process: u32) {
        let (job, schedule) = ("nightly".into(), Some("night".into()));
        let start = Event::RunStart { job, schedule, due: None, host: "here".into(), process };
        let end = Event::RunEnd { status: RunStatus::Done, reason: None, seconds: 1.5 };
        let mut log = Log::open(folder).expect("opens");
        let record = |event| Record::now(Uuid::from_u128(process.into()), event);
        [start, end].into_iter().for_each(|event| log.append(&record(event)).expect("fits"));
    }

    #[test]
    fn what_is_kept_is_what_the_log_says_however_it_grows_and_is_put_aside() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log.jsonl");
        let mut kept = Kept::default();
        assert_eq!(kept.read(folder.path()).expect("read"), &Starts::default());
        for process in 0..20 {
            begin(folder.path(), process);
            let history = History::read(folder.path(), &|_| false).expect("read");
            let starts = kept.read(folder.path()).expect("read");
            assert_eq!(*starts, Starts::of(&history), "{process}");
            assert_eq!(starts.last("night", Timestamp::MAX), history.runs.last().map(|run| run.records[0].time));
            assert_eq!(starts.last("other", Timestamp::MAX), None);
            assert!(starts.has_begun(process) && !starts.has_begun(process + 1), "{process}");
            if process % 3 == 2 {
                // So long that the next run puts it aside.
                let mut text = fs::read(&path).expect("read");
                text.resize(9 << 20, b' ');
                fs::write(&path, text).expect("written");
            }
        }
    }

    #[test]
    fn a_log_that_has_not_changed_is_not_read_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log.jsonl");
        let mut kept = Kept::default();
        begin(folder.path(), 1);
        assert!(kept.read(folder.path()).expect("read").has_begun(1));
        // As long, and of the same time: who reads it finds nothing.
        let mut file = OpenOptions::new().write(true).open(&path).expect("opens");
        let metadata = file.metadata().expect("told");
        let text = vec![b' '; usize::try_from(metadata.len()).expect("small")];
        io::Write::write_all(&mut file, &text).expect("written");
        file.set_times(FileTimes::new().set_modified(metadata.modified().expect("told"))).expect("set");
        assert!(kept.read(folder.path()).expect("read").has_begun(1));
        begin(folder.path(), 2);
        let starts = kept.read(folder.path()).expect("read");
        assert!(starts.has_begun(2) && !starts.has_begun(1));
    }
}
