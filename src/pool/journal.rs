//! What a run is about to make or change in a pool, on disk before it does: whoever comes after one that died undoes it.
//!
//! A journal is a file of lines of JSON, each durable before what it tells is done. The first names the pool, and whom the run said
//! in it to be of, which a machine that has another name since would not know; the others tell an act, or that one is over:
//!
//! ```text
//! {"pool":"...","keeper":"..."}                               which pool, and whose run
//! {"act":1,"snapshot":{"vm":"...","name":"..."}}              a snapshot of that name is about to be made
//! {"publishing":1}                                            a backup of it is about to exist somewhere
//! {"over":1}                                                  it is kept, or gone
//! ```
//!
//! A process that lives holds the lock of its journal. A line that was cut off by a crash tells of nothing that was done, and a
//! journal whose first line is not whole tells nothing at all: who finds one that nobody holds removes it. Journals are removed
//! under their lock only, so whoever has the lock looks whether the file still has its name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::error::{Error, Result};
use super::state::State;

/// No journal is longer (bytes); what is longer is none of ours.
const LONGEST: u64 = 16 << 20;

/// Something that a run makes or changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// A snapshot of a VM is made. It bears this name until its entries say that it is of this run.
    Snapshot {
        /// The uuid of the VM.
        vm: String,
        /// The name.
        name: String,
        /// Whether a backup of it may exist: then it is not for who finds this to destroy it.
        #[serde(skip)]
        is_published: bool,
    },
    /// A VM or disks are made of a backup. They have an entry with the run in it until they are whole, and these names, with a
    /// word before them or without.
    Restore {
        /// The name of the VM, unless it is of disks alone.
        vm: Option<String>,
        /// The names of the disks.
        disks: Vec<String>,
    },
    /// A replica is brought up to date on an SR. What is not whole has an entry with the run and that SR in it.
    Replica {
        /// The uuid of the SR.
        sr: String,
    },
    /// Disks are taken from a halted VM for the moment of its snapshot.
    Detached {
        /// The uuid of the VM.
        vm: String,
        /// The records of what connected them (`VBD`).
        devices: Vec<Map<String, Value>>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Pool {
        pool: String,
        keeper: String,
    },
    Act {
        act: u32,
        #[serde(flatten)]
        what: Act,
    },
    Publishing {
        publishing: u32,
    },
    Over {
        over: u32,
    },
}

/// The journal of a run that lives.
#[derive(Debug)]
pub struct Journal {
    run: Uuid,
    path: PathBuf,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    file: File,
    /// Of the last act.
    number: u32,
    /// Acts that are not over.
    open: u32,
}

/// An act that is not over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "what is not told to be over is undone by the next run"]
pub struct Begun(u32);

/// What a run left that died.
#[derive(Debug)]
pub struct Left {
    /// The run.
    pub run: Uuid,
    /// Whose it said to be, in the pool.
    pub keeper: String,
    /// What it had begun, oldest first.
    pub acts: Vec<Act>,
    path: PathBuf,
    /// Its lock keeps others from undoing the same.
    _file: File,
}

impl Journal {
    /// Begins the journal of a run that works on a pool.
    ///
    /// # Errors
    /// [`super::ErrorKind::State`] if it cannot be written.
    pub fn begin(state: &State, run: Uuid, pool: &str) -> Result<Self> {
        let path = state.runs().join(run.to_string());
        let begin = || -> io::Result<File> {
            loop {
                let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
                // Others look at it before it is held: they have the lock for a moment, and may have taken it for a dead run's.
                retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))?;
                if !has_name(&file)? {
                    continue;
                }
                append(&mut file, &Line::Pool { pool: pool.to_owned(), keeper: state.keeper() })?;
                File::open(state.runs())?.sync_all()?;
                return Ok(file);
            }
        };
        let file = begin().map_err(|error| Error::state("begin the journal", &path, &error))?;
        Ok(Self { run, written: Mutex::new(Written { file, number: 0, open: 0 }), path })
    }

    /// Returns the run.
    #[must_use]
    pub fn run(&self) -> Uuid {
        self.run
    }

    /// Tells, durably, what is about to be done.
    ///
    /// # Errors
    /// [`super::ErrorKind::State`] if it cannot be written: then it must not be done.
    pub fn tell(&self, act: Act) -> Result<Begun> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let number = written.number.wrapping_add(1);
        append(&mut written.file, &Line::Act { act: number, what: act })
            .map_err(|error| Error::state("write the journal", &self.path, &error))?;
        (written.number, written.open) = (number, written.open + 1);
        Ok(Begun(number))
    }

    /// Tells, durably, that a backup of the snapshot that an act made is about to exist.
    ///
    /// # Errors
    /// [`super::ErrorKind::State`] if it cannot be written: then it must not.
    pub fn publishing(&self, begun: &Begun) -> Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        append(&mut written.file, &Line::Publishing { publishing: begun.0 })
            .map_err(|error| Error::state("write the journal", &self.path, &error))
    }

    /// Tells that an act is over: what it made is gone, or is to stay. Where that cannot be written, the next run looks for it
    /// in vain.
    pub fn over(&self, begun: Begun) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        match append(&mut written.file, &Line::Over { over: begun.0 }) {
            Ok(()) => written.open = written.open.saturating_sub(1),
            Err(error) => tracing::warn!(journal = %self.path.display(), %error, "not written"),
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // What is left of a run that could not undo it stays told, for the next one.
        if self.written.get_mut().unwrap_or_else(PoisonError::into_inner).open == 0 {
            let _gone = fs::remove_file(&self.path);
        }
    }
}

/// Whether the process of a run lives.
#[must_use]
pub fn is_alive(state: &State, run: Uuid) -> bool {
    let file = File::open(state.runs().join(run.to_string()));
    // Shared: who asks the same at the same time is not taken for the run.
    file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

impl Left {
    /// Finds what runs left that worked on a pool and died. One whose journal says nothing that can be read is told, not taken.
    ///
    /// # Errors
    /// [`super::ErrorKind::State`] if the journals cannot be listed.
    pub fn find(state: &State, pool: &str, mut unreadable: impl FnMut(&str)) -> Result<Vec<Self>> {
        let folder = state.runs();
        let failed = |error: io::Error| Error::state("list the journals in", &folder, &error);
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Some(run) = path.file_name().and_then(|name| Uuid::try_parse(name.to_str()?).ok()) else { continue };
            let Ok(file) = File::open(&path) else { continue };
            // Held by a process that lives.
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            // Another has undone it since it was listed.
            if !has_name(&file).map_err(failed)? {
                continue;
            }
            match read(&file) {
                Ok(Some((of, keeper, acts))) if of == pool => {
                    found.push(Self { run, keeper, acts, path, _file: file });
                }
                Ok(Some(_)) => {}
                Ok(None) => drop(fs::remove_file(&path)),
                Err(error) => unreadable(&format!("the journal '{}' cannot be read: {error}", path.display())),
            }
        }
        found.sort_by_key(|left| left.run);
        Ok(found)
    }

    /// Forgets it: all of it is undone.
    ///
    /// # Errors
    /// [`super::ErrorKind::State`] if the journal cannot be removed.
    pub fn undone(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(|error| Error::state("remove the journal", &self.path, &error))
    }
}

fn append(file: &mut File, line: &Line) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)?;
    file.sync_data()
}

/// Whether nobody has removed a file.
fn has_name(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.nlink() > 0)
}

/// Returns the pool of a journal, whose it is, and the acts that are not over; `None` if its run died before it did anything.
fn read(file: &File) -> io::Result<Option<(String, String, Vec<Act>)>> {
    let mut text = String::new();
    if file.take(LONGEST + 1).read_to_string(&mut text)? as u64 > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is longer than any journal"));
    }
    // What was cut off was not done.
    let Some((whole, _cut)) = text.rsplit_once('\n') else { return Ok(None) };
    let mut first: Option<(String, String)> = None;
    let mut acts: Vec<(u32, Act)> = Vec::new();
    for line in whole.lines() {
        match serde_json::from_str(line)? {
            Line::Pool { pool, keeper } => first = Some((pool, keeper)),
            Line::Act { act, what } => acts.push((act, what)),
            Line::Publishing { publishing } => {
                for (_, what) in acts.iter_mut().filter(|(number, _)| *number == publishing) {
                    if let Act::Snapshot { is_published, .. } = what {
                        *is_published = true;
                    }
                }
            }
            Line::Over { over } => acts.retain(|(number, _)| *number != over),
        }
    }
    let first = first.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it does not name its pool"));
    let (pool, keeper) = first?;
    Ok(Some((pool, keeper, acts.into_iter().map(|(_, act)| act).collect())))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    fn snapshot(name: &str) -> Act {
        Act::Snapshot { vm: "v".into(), name: name.into(), is_published: false }
    }

    fn left(state: &State) -> Vec<Left> {
        Left::find(state, "pool", |problem| panic!("{problem}")).expect("listed")
    }

    #[test]
    fn what_is_not_over_is_found_once_the_run_is_dead_and_not_before() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("is made");
        let run = Uuid::from_u128(7);
        let journal = Journal::begin(&state, run, "pool").expect("begins");
        let first = journal.tell(snapshot("one")).expect("told");
        let device: Map<String, Value> = serde_json::from_str(r#"{"userdevice":"1"}"#).expect("is JSON");
        let detached = Act::Detached { vm: "v".into(), devices: vec![device] };
        let _second = journal.tell(detached.clone()).expect("told");
        journal.over(first);
        assert!(left(&state).is_empty() && is_alive(&state, run), "it lives");
        drop(journal);
        let found = left(&state);
        assert_eq!((found[0].run, &found[0].acts), (run, &vec![detached]));
        assert!(left(&state).is_empty(), "another undoes it");
        assert!(!is_alive(&state, Uuid::from_u128(8)));
        found.into_iter().for_each(|left| left.undone().expect("removed"));
        assert!(left(&state).is_empty());
    }

    #[test]
    fn it_is_known_of_a_snapshot_that_a_backup_of_it_may_exist() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("is made");
        let journal = Journal::begin(&state, Uuid::from_u128(7), "pool").expect("begins");
        let [_first, second] = ["one", "two"].map(|name| journal.tell(snapshot(name)).expect("told"));
        journal.publishing(&second).expect("told");
        drop(journal);
        let published = Act::Snapshot { vm: "v".into(), name: "two".into(), is_published: true };
        assert_eq!(left(&state)[0].acts, [snapshot("one"), published]);
    }

    #[test]
    fn a_run_that_ended_well_leaves_no_journal_and_a_line_cut_off_tells_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("is made");
        let journal = Journal::begin(&state, Uuid::from_u128(1), "pool").expect("begins");
        let begun = journal.tell(snapshot("t")).expect("told");
        journal.over(begun);
        drop(journal);
        assert_eq!(fs::read_dir(state.runs()).expect("listed").count(), 0);
        let cut = "{\"pool\":\"pool\",\"keeper\":\"k\"}\n{\"act\":1,\"snapshot\":{\"vm\":\"v\",\"name\":\"a\"}}\n{\"act\":2,\"snapsh";
        fs::write(state.runs().join(Uuid::from_u128(2).to_string()), cut).expect("written");
        assert_eq!(left(&state)[0].acts, [snapshot("a")]);
        fs::write(state.runs().join(Uuid::from_u128(3).to_string()), "{\"pool\":\"other\",\"keeper\":\"k\"}\n")
            .expect("written");
        fs::write(state.runs().join(Uuid::from_u128(4).to_string()), "nonsense\n").expect("written");
        let mut problems = Vec::new();
        assert_eq!(Left::find(&state, "pool", |problem| problems.push(problem.to_owned())).expect("listed").len(), 1);
        assert!(problems[0].contains("cannot be read"), "{problems:?}");
    }

    #[test]
    fn a_run_that_died_before_its_first_line_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("is made");
        for (number, text) in [(1, ""), (2, "{\"pool\":\"po")] {
            fs::write(state.runs().join(Uuid::from_u128(number).to_string()), text).expect("written");
        }
        assert!(left(&state).is_empty());
        assert_eq!(fs::read_dir(state.runs()).expect("listed").count(), 0);
    }

    #[test]
    fn runs_begin_and_end_while_others_look_at_their_journals() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("is made");
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let lookers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        while !is_over.load(Ordering::Relaxed) {
                            let found = left(&state);
                            assert!(found.iter().all(|left| left.acts.is_empty()), "of a run that lived: {found:?}");
                        }
                    })
                })
                .collect();
            let runs = scope.spawn(|| {
                for number in 0..300 {
                    let run = Uuid::from_u128(number);
                    let journal = Journal::begin(&state, run, "pool").expect("begins");
                    let begun = journal.tell(snapshot("one")).expect("told");
                    assert!(is_alive(&state, run));
                    journal.over(begun);
                }
            });
            let ended = runs.join();
            is_over.store(true, Ordering::Relaxed);
            ended.expect("all runs began");
            lookers.into_iter().for_each(|looker| looker.join().expect("none saw a run that lived"));
        });
        assert_eq!(fs::read_dir(state.runs()).expect("listed").count(), 0);
    }
}
