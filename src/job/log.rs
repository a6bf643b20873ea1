//! The log of a job: what its runs did, one JSON object a line, only ever appended to.
//!
//! ```text
//! <state>/jobs/<job>/log.jsonl       and log.1.jsonl to log.4.jsonl, older ones
//! <state>/jobs/<job>/lock            see `lock`
//! <state>/jobs/<job>/totals.json     see `figures`; live.json, see `live`; keys.json, see `keys`
//! ```
//!
//! Only who holds the job's lock writes. A line is whole or not there: what was cut off by a crash is closed by whoever writes next,
//! and passed over by whoever reads; a line that does not fit any more is taken back, and written with the next one that fits. Room
//! for how runs begin and end is set aside, and no other line takes it: it stays behind the last line, for the next run, to which the
//! disk may be full. The schema is docs/job-log.schema.json.
//!
//! How a run stands is computed: one without an end is running as long as a process holds the lock of its job, else interrupted.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::waiting::Waiting;

/// By more than this no clock is put back that was right (hours).
const FAR_H: i64 = 25;
/// The version of the schema.
pub const VERSION: u32 = 1;
/// A log that is longer when a run begins becomes an older one (bytes).
const LONGEST: u64 = 8 << 20;
/// Older logs that are kept.
const OLDER: usize = 4;
/// No line is longer (bytes); one that is was not written by us.
const LONGEST_LINE: u64 = 4 << 20;
/// What is set aside for the end of a run, and the beginning of the next one (bytes).
const RESERVE: u64 = 256 << 10;
/// Lines that wait for room (bytes); of more, only the first of the run and the newest are kept.
const WAITING: usize = 1 << 20;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The version of the schema.
    pub version: u32,
    /// When.
    pub time: Timestamp,
    /// In which run.
    pub run: Uuid,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

impl Record {
    /// Makes the line of what happens now.
    #[must_use]
    pub fn now(run: Uuid, event: Event) -> Self {
        Self { version: VERSION, time: Timestamp::now(), run, event }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Event {
    /// A run begins.
    RunStart {
        /// The job.
        job: String,
        /// The schedule, if it is of one.
        schedule: Option<String>,
        /// Since when it was due, if a schedule started it.
        due: Option<Timestamp>,
        /// The machine.
        host: String,
        /// The process.
        process: u32,
    },
    /// A machine is begun with.
    VmStart {
        /// Its uuid.
        vm: String,
        /// Its name.
        name: String,
        /// Its pool, as the configuration calls it.
        pool: String,
        /// Which try it is, from 1.
        attempt: u32,
    },
    /// A machine is done with, for this try.
    VmEnd {
        /// Its uuid; empty if it was not found.
        vm: String,
        /// Its name.
        name: String,
        /// Its pool.
        pool: String,
        /// Which try it was; 0 if it never was its turn.
        attempt: u32,
        /// How it ended.
        status: VmStatus,
        /// Why, unless it is good.
        reason: Option<String>,
        /// What happens next, unless it is good.
        next: Option<String>,
        /// How long it took.
        seconds: f64,
        /// What was made, as `xofs backup --json` says it.
        backup: Option<Value>,
    },
    /// What expired begins to be forgotten, and merged.
    MergeStart {
        /// Where.
        repository: String,
    },
    /// That is over.
    MergeEnd {
        /// Where.
        repository: String,
        /// Whether all of it was done.
        is_done: bool,
        /// Why not.
        reason: Option<String>,
        /// What happens next, if not.
        next: Option<String>,
        /// How long it took.
        seconds: f64,
        /// What was done, as `xofs forget --json` says it.
        result: Option<Value>,
    },
    /// Who was to be told of the run, after its end, was told, or not.
    ReportEnd {
        /// Whether all was right.
        is_done: bool,
        /// Why not.
        reason: Option<String>,
        /// How long it took.
        seconds: f64,
    },
    /// The run is over.
    RunEnd {
        /// How it ended.
        status: RunStatus,
        /// Why, unless it is good.
        reason: Option<String>,
        /// How long it took.
        seconds: f64,
    },
}

/// How a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum VmStatus {
    /// There is a new backup in each repository, and on each SR.
    Done,
    /// There is one in some of them.
    Partial,
    /// There is none.
    Failed,
    /// A tag of it says that there is to be none.
    LeftOut,
    /// The run was stopped.
    Interrupted,
}

/// How a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RunStatus {
    /// It has not ended, and its process lives. Never written.
    Running,
    /// All was done.
    Done,
    /// All backups were made, but what expired is not all forgotten.
    MergePending,
    /// Some of the machines or repositories have no new backup.
    Partial,
    /// None has.
    Failed,
    /// It was stopped, or its process died.
    Interrupted,
}

impl VmStatus {
    /// All of them, best first.
    pub const ALL: [Self; 5] = [Self::Done, Self::LeftOut, Self::Partial, Self::Failed, Self::Interrupted];
}

impl RunStatus {
    /// All of them, best first.
    pub const ALL: [Self; 6] =
        [Self::Running, Self::Done, Self::MergePending, Self::Partial, Self::Failed, Self::Interrupted];
}

/// A log that is written to. The lock of the job must be held as long.
pub struct Log {
    path: PathBuf,
    file: File,
    /// Where the last whole line ends.
    end: u64,
    /// Lines that did not fit.
    waiting: Waiting,
}

/// One run, as its lines tell it.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Which.
    pub id: Uuid,
    /// How it stands.
    pub status: RunStatus,
    /// All its lines, as they were written.
    pub records: Vec<Record>,
}

/// What a log holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// The runs, oldest first.
    pub runs: Vec<Run>,
    /// Lines that could not be understood: cut off by a crash, or of another version.
    pub unread: usize,
}

/// Returns where the folder of a job is below that of the state.
#[must_use]
pub fn path(state: &Path, job: &str) -> PathBuf {
    state.join("jobs").join(job)
}

/// Returns the folder of a job below that of the state, and makes it.
///
/// # Errors
/// What the system says.
pub fn folder(state: &Path, job: &str) -> io::Result<PathBuf> {
    let folder = path(state, job);
    DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    Ok(folder)
}

impl Log {
    /// Opens the log in a job's folder for a run, and puts it aside if it has become long.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join("log.jsonl");
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > LONGEST) {
            rotate(folder)?;
        }
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        let end = file.seek(SeekFrom::End(0))?;
        // What is left of a line stands alone, and is passed over.
        let waiting = Waiting::behind(!ends_with_line(&mut file, end)?);
        let log = Self { path, file, end, waiting };
        // A disk that was full already at the first run has none; then the first lines wait, as all others.
        let _ = log.set_aside(0);
        Ok(log)
    }

    /// Sees to it that there is room for `len` bytes, and for the end of the run, or the next one, behind them. Not every filesystem can do that; then a
    /// full one shows a run that ended as interrupted.
    fn set_aside(&self, len: usize) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, self.end, len as u64 + RESERVE) {
            Err(error @ (Errno::NOSPC | Errno::DQUOT)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Appends a line, and everything that found no room before.
    ///
    /// # Errors
    /// What the system says; then it is written with the next line that fits.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.waiting.push(line, matches!(record.event, Event::RunStart { .. }));
        self.waiting.limit(WAITING);
        let mut bytes = self.waiting.bytes();
        let mut room = self.set_aside(bytes.len());
        let is_edge = matches!(record.event, Event::RunStart { .. } | Event::RunEnd { .. } | Event::ReportEnd { .. });
        if room.is_err() && is_edge {
            // It was set aside for this: the newest lines that fit there.
            self.waiting.limit(usize::try_from(RESERVE).unwrap_or(usize::MAX));
            bytes = self.waiting.bytes();
            room = Ok(());
        }
        self.file.seek(SeekFrom::Start(self.end))?;
        let write = |()| (&self.file).write_all(&bytes).and_then(|()| self.file.sync_data());
        if let Err(error) = room.and_then(write) {
            // A part of a line may be there; what is behind it goes, too.
            if self.file.metadata()?.len() > self.end {
                self.file.set_len(self.end)?;
                let _ = self.set_aside(0);
            }
            let shown = self.path.display();
            return Err(io::Error::new(error.kind(), format!("write the log '{shown}': {error}")));
        }
        self.end += bytes.len() as u64;
        self.waiting.clear();
        Ok(())
    }
}

/// Whether a file of `len` bytes ends with a whole line.
fn ends_with_line(file: &mut File, len: u64) -> io::Result<bool> {
    let Some(last) = len.checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.seek(SeekFrom::Start(last))?;
    file.read_exact(&mut byte)?;
    Ok(byte == *b"\n")
}

/// Returns the path of an older log.
fn older(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("log.{number}.jsonl"))
}

/// Puts the log aside; the oldest one goes.
fn rotate(folder: &Path) -> io::Result<()> {
    // Gives back what was set aside.
    let file = OpenOptions::new().write(true).open(folder.join("log.jsonl"))?;
    file.set_len(file.metadata()?.len())?;
    for number in (1..OLDER).rev() {
        match fs::rename(older(folder, number), older(folder, number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::rename(folder.join("log.jsonl"), older(folder, 1))?;
    File::open(folder)?.sync_all()
}

/// Opens the logs in a job's folder, oldest first.
pub(super) fn files(folder: &Path) -> impl Iterator<Item = io::Result<File>> + use<> {
    let open = |path: PathBuf| match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        opened => Some(opened),
    };
    let older = (1..=OLDER).rev().map(|number| older(folder, number));
    older.chain([folder.join("log.jsonl")]).collect::<Vec<_>>().into_iter().filter_map(open)
}

/// Reads the lines of a log; `None` is one that cannot be understood.
pub(super) fn records(file: File, mut each: impl FnMut(Option<Record>)) -> io::Result<()> {
    let (mut file, mut line) = (BufReader::new(file), Vec::new());
    loop {
        line.clear();
        if file.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line != b"\n" {
            each(serde_json::from_slice(&line).ok().filter(|record: &Record| record.version == VERSION));
        }
    }
}

impl History {
    /// Reads the logs in a job's folder. `runs` says whether the process of a number runs the job; it was asked before.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(folder: &Path, runs: &dyn Fn(u32) -> bool) -> io::Result<Self> {
        let mut history = Self::default();
        for file in files(folder) {
            records(file?, |record| match record {
                Some(record) => history.add(record),
                None => history.unread += 1,
            })?;
        }
        for (number, run) in history.runs.iter_mut().rev().enumerate() {
            // Only the last one can be running: it has the lock.
            run.status = status(&run.records, &|process| number == 0 && runs(process));
        }
        Ok(history)
    }

    fn add(&mut self, record: Record) {
        match self.runs.iter_mut().rev().find(|run| run.id == record.run) {
            Some(run) => run.records.push(record),
            None => self.runs.push(Run { id: record.run, status: RunStatus::Interrupted, records: vec![record] }),
        }
    }
}

/// Whether a time that was noted is so far ahead that the clock was wrong then: who waits for it waits in vain. Less may be a clock
/// that was put back, which shows some times twice.
#[must_use]
pub fn is_far_ahead(noted: Timestamp, now: Timestamp) -> bool {
    noted.duration_since(now) > SignedDuration::from_hours(FAR_H)
}

/// Says how a run stands, by its lines.
fn status(records: &[Record], runs: &dyn Fn(u32) -> bool) -> RunStatus {
    let end = records.iter().rev().find_map(|record| match &record.event {
        Event::RunEnd { status, .. } => Some(*status),
        _ => None,
    });
    let process = records.iter().find_map(|record| match &record.event {
        Event::RunStart { process, .. } => Some(*process),
        _ => None,
    });
    match (end, process) {
        (Some(status), _) => status,
        (None, Some(process)) if runs(process) => RunStatus::Running,
        (None, _) => RunStatus::Interrupted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Event {
        Event::RunStart {
            job: "nightly".into(),
            schedule: Some("night".into()),
            due: None,
            host: "here".into(),
            process: 7,
        }
    }

    fn end(status: RunStatus) -> Event {
        Event::RunEnd { status, reason: None, seconds: 1.5 }
    }

    fn vm(vm: &str, is_key: bool) -> Event {
        let backup = serde_json::json!({ "repositories": [{ "disks": [{ "isKey": is_key }, { "isKey": is_key }] }] });
        Event::VmEnd {
            vm: vm.into(),
            name: "web01".into(),
            pool: "lab".into(),
            attempt: 1,
            status: VmStatus::Done,
            reason: None,
            next: None,
            seconds: 2.0,
            backup: Some(backup),
        }
    }

    fn write(folder: &Path, run: u128, events: &[Event]) {
        let mut log = Log::open(folder).expect("opens");
        let record = |event: &Event| Record::now(Uuid::from_u128(run), event.clone());
        events.iter().for_each(|event| log.append(&record(event)).expect("fits"));
    }

    fn statuses(folder: &Path, runs: bool) -> Vec<RunStatus> {
        History::read(folder, &|process| runs && process == 7)
            .expect("read")
            .runs
            .iter()
            .map(|run| run.status)
            .collect()
    }

    #[test]
    fn a_run_without_an_end_runs_as_long_as_the_lock_is_held_and_only_the_last_one() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(statuses(folder.path(), false), []);
        write(folder.path(), 1, &[start(), end(RunStatus::Partial)]);
        write(folder.path(), 2, &[start(), vm("a", true)]);
        write(folder.path(), 3, &[start()]);
        assert_eq!(statuses(folder.path(), true), [RunStatus::Partial, RunStatus::Interrupted, RunStatus::Running]);
        assert_eq!(
            statuses(folder.path(), false),
            [RunStatus::Partial, RunStatus::Interrupted, RunStatus::Interrupted]
        );
    }

    #[test]
    fn a_line_that_was_cut_off_anywhere_costs_only_itself() {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), 1, &[start(), end(RunStatus::Done)]);
        let path = folder.path().join("log.jsonl");
        let whole = fs::read(&path).expect("read");
        let first = whole.iter().position(|byte| *byte == b'\n').expect("a line") + 1;
        for cut in first..=whole.len() {
            fs::write(&path, &whole[..cut]).expect("written");
            // The end of a line that lacks only its line feed is whole.
            let is_whole = cut + 1 >= whole.len();
            let expected = if is_whole { RunStatus::Done } else { RunStatus::Interrupted };
            assert_eq!(statuses(folder.path(), false), [expected], "{cut}");
            write(folder.path(), 2, &[start(), end(RunStatus::Failed)]);
            let history = History::read(folder.path(), &|_| false).expect("read");
            let found: Vec<RunStatus> = history.runs.iter().map(|run| run.status).collect();
            assert_eq!(found, [expected, RunStatus::Failed], "{cut}");
            assert_eq!(history.unread, usize::from(!is_whole && cut > first), "{cut}");
        }
    }

    #[test]
    fn a_long_log_becomes_an_older_one_and_the_oldest_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log.jsonl");
        for run in 0..7 {
            write(folder.path(), run, &[start(), end(RunStatus::Done)]);
            let mut text = fs::read(&path).expect("read");
            text.resize(usize::try_from(LONGEST).expect("small") + 1, b' ');
            fs::write(&path, text).expect("written");
        }
        let history = History::read(folder.path(), &|_| false).expect("read");
        let runs: Vec<u128> = history.runs.iter().map(|run| run.id.as_u128()).collect();
        assert_eq!(runs, [2, 3, 4, 5, 6]);
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 5);
    }
}
