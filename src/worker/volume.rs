//! A volume with a filesystem, as the tree asks it: through a worker that is started when needed and replaced when it fails.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use disk::Disk;
use guest::{Attributes, Content, Entry, Extents, Facts, Inode, Layer, Xattr};
use lru::LruCache;

use super::check;
use super::error::{Error, Result};
use super::pool::{Seat, Workers};
use super::process::{Failure, Patience, Process};
use super::protocol::{Frame, Message, PIECE_LIMIT, Request};

/// What workers of a volume may fail within [`PERIOD`] before it is left alone: one that cannot even open it counts as
/// [`FAILED_OPEN`] that failed at a file.
const FAILURES: usize = 50;
const FAILED_OPEN: usize = 10;
const PERIOD: Duration = Duration::from_secs(60);

/// After so many workers failed at the same question about the same file it is not asked for [`REST`].
const SAME: u32 = 2;
const REST: Duration = Duration::from_secs(600);

/// Files of a volume at which workers failed that are remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Files in a directory at which workers may fail before the others are not looked at.
const IN_DIRECTORY: usize = 5;

/// How much longer workers may take for a directory than for anything else: it comes in parts.
const LISTING: u32 = 3;

/// A directory: each name, and what is known of the file, or why that is not.
pub type Listed = Vec<(Entry, std::result::Result<Attributes, String>)>;

/// What is asked about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Question {
    List,
    Names,
    Attributes,
    Target,
    Xattrs,
    Extents,
    Decode,
}

/// What a worker is to read.
enum Subject {
    Filesystem(Content),
    /// A layer of so many bytes.
    Layer(Layer, u64),
}

/// A filesystem in a guest, or a layer that a volume is made by.
pub struct Volume {
    workers: Arc<Workers>,
    subject: Subject,
    members: Vec<Arc<dyn Disk>>,
    seat: Arc<Seat>,
    troubles: Mutex<Troubles>,
    /// Its root and what is said of it, or why no reader will ever open it.
    opened: OnceLock<guest::Result<(Inode, Facts)>>,
}

/// When workers failed, and at what.
struct Troubles {
    recent: VecDeque<Instant>,
    files: LruCache<(Question, Inode), (u32, Instant)>,
}

impl Volume {
    /// Makes a filesystem of its members; nothing is read yet.
    #[must_use]
    pub fn new(workers: Arc<Workers>, content: Content, members: Vec<Arc<dyn Disk>>) -> Self {
        Self::of(workers, Subject::Filesystem(content), members)
    }

    /// Makes a layer of `size` bytes of its members, of which the only file is [`Layer::VOLUME`]; nothing is read yet.
    ///
    /// `workers` are [others](Workers::below) than those of what stands on it.
    #[must_use]
    pub fn layer(workers: Arc<Workers>, layer: Layer, size: u64, members: Vec<Arc<dyn Disk>>) -> Self {
        Self::of(workers, Subject::Layer(layer, size), members)
    }

    fn of(workers: Arc<Workers>, subject: Subject, members: Vec<Arc<dyn Disk>>) -> Self {
        let seat = workers.seat();
        let troubles = Mutex::new(Troubles { recent: VecDeque::new(), files: LruCache::new(REMEMBERED) });
        Self { workers, subject, members, seat, troubles, opened: OnceLock::new() }
    }

    /// Returns the members, in the order in which [extents](Volume::extents) number them.
    #[must_use]
    pub fn members(&self) -> &[Arc<dyn Disk>] {
        &self.members
    }

    /// Returns its root directory, and what is said of it as a whole.
    ///
    /// # Errors
    /// If no reader can open it, a disk cannot be read, or a worker fails.
    pub fn open(&self) -> Result<(Inode, &Facts)> {
        if self.opened.get().is_none() {
            self.check_recent()?;
            self.seat.work(&self.workers, |process| self.prepare(process), |_, _| ((), true))?;
        }
        match self.opened.get().expect("a worker that was prepared said it") {
            Ok((root, facts)) => Ok((*root, facts)),
            Err(error) => Err(error.clone().into()),
        }
    }

    /// Returns what is in a directory, and whether asking again would say the same. Where workers fail at a file in it, the others
    /// are there all the same.
    ///
    /// # Errors
    /// As for [`Volume::open`]; what the reader says. A listing is complete or not there.
    pub fn list(&self, directory: Inode) -> Result<(Listed, bool)> {
        let mut listed = match self.list_as(directory, Question::List) {
            Err(Error::Worker(_)) => self.list_as(directory, Question::Names)?,
            listed => return listed.map(|listed| (listed, true)),
        };
        let (mut failed, patience) = (0, self.listing_patience());
        for (entry, known) in &mut listed {
            *known = match self.attributes_within(entry.inode, &patience) {
                Ok(attributes) => Ok(attributes),
                Err(Error::Disk(error)) => return Err(Error::Disk(error)),
                Err(error) => {
                    failed += usize::from(matches!(error, Error::Worker(_)));
                    Err(error.to_string())
                }
            };
            if failed == IN_DIRECTORY {
                break;
            }
        }
        Ok((listed, failed == 0))
    }

    fn list_as(&self, directory: Inode, question: Question) -> Result<Listed> {
        self.ask(question, directory, |process| {
            let (mut listed, mut from) = (check::Directory::default(), 0);
            let patience = self.listing_patience();
            loop {
                let request = match question {
                    Question::Names => Request::Names(directory, from),
                    _ => Request::List(directory, from),
                };
                let Frame::Message(Message::List(page)) = process.ask(&request, &self.members, &patience)? else {
                    return Err(lied());
                };
                match listed.add(page, from)? {
                    Some(next) => from = next,
                    None => return Ok(listed.done()),
                }
            }
        })
    }

    /// Returns what is known of a file.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn attributes(&self, inode: Inode) -> Result<Attributes> {
        self.attributes_within(inode, &self.patience())
    }

    fn attributes_within(&self, inode: Inode, patience: &Patience) -> Result<Attributes> {
        self.ask(Question::Attributes, inode, |process| {
            match process.ask(&Request::Attributes(inode), &self.members, patience)? {
                Frame::Message(Message::Attributes(attributes)) => Ok(check::attributes(attributes)?),
                _ => Err(lied()),
            }
        })
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        self.ask(Question::Target, inode, |process| {
            match process.ask(&Request::Target(inode), &self.members, &self.patience())? {
                Frame::Message(Message::Target(target)) => Ok(check::target(target)?),
                _ => Err(lied()),
            }
        })
    }

    /// Returns the extended attributes of a file.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>> {
        self.ask(Question::Xattrs, inode, |process| {
            match process.ask(&Request::Xattrs(inode), &self.members, &self.patience())? {
                Frame::Message(Message::Xattrs(xattrs)) => Ok(check::xattrs(xattrs)?),
                _ => Err(lied()),
            }
        })
    }

    /// Returns how long workers may work for one read, in however many questions.
    #[must_use]
    pub fn patience(&self) -> Patience {
        self.workers.patience()
    }

    fn listing_patience(&self) -> Patience {
        self.workers.patience().times(LISTING)
    }

    /// Returns where bytes of a file lie, from `from` on: thousands of extents at a time.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn extents(&self, inode: Inode, from: u64, patience: &Patience) -> Result<Extents> {
        self.ask(Question::Extents, inode, |process| {
            match process.ask(&Request::Extents(inode, from), &self.members, patience)? {
                Frame::Message(Message::Extents(extents)) => Ok(check::extents(extents, from, &self.members)?),
                _ => Err(lied()),
            }
        })
    }

    /// Fills `buffer` with bytes of a file that are encoded.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn decode(&self, inode: Inode, offset: u64, buffer: &mut [u8], patience: &Patience) -> Result<()> {
        for (offset, piece) in (offset..).step_by(PIECE_LIMIT).zip(buffer.chunks_mut(PIECE_LIMIT)) {
            let len = u32::try_from(piece.len()).expect("at most PIECE_LIMIT");
            let request = Request::Decode(inode, offset, len);
            let bytes =
                self.ask(Question::Decode, inode, |process| match process.ask(&request, &self.members, patience)? {
                    Frame::Bytes(bytes) if bytes.len() == piece.len() => Ok(bytes),
                    _ => Err(lied()),
                })?;
            piece.copy_from_slice(&bytes);
        }
        Ok(())
    }

    /// Asks a worker; if one that rested turns out to be dead, another.
    fn ask<T>(
        &self,
        question: Question,
        inode: Inode,
        act: impl Fn(&mut Process) -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        let mut may_retry = true;
        loop {
            if let Some(Err(error)) = self.opened.get() {
                return Err(error.clone().into());
            }
            self.check_recent()?;
            self.check_file(question, inode)?;
            let asked = self.seat.work(
                &self.workers,
                |process| self.prepare(process),
                |process, is_new| match act(process) {
                    Ok(answer) => (Ok(answer), true),
                    Err(Failure::Answered(error)) => (Err((error, false)), true),
                    Err(Failure::Broken(why, was_dead)) => {
                        (Err((Error::Worker(format!("its worker failed: {why}")), was_dead && !is_new)), false)
                    }
                },
            )?;
            match asked {
                Ok(answer) => return Ok(answer),
                Err((_, true)) if may_retry => may_retry = false,
                Err((error, _)) => {
                    if matches!(error, Error::Worker(_)) {
                        self.note_file(question, inode);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Has a new worker open the volume.
    fn prepare(&self, process: &mut Process) -> Result<()> {
        let sizes = self.members.iter().map(|member| member.size()).collect();
        let request = match self.subject {
            Subject::Filesystem(content) => Request::Open(content, sizes),
            Subject::Layer(layer, size) => Request::OpenLayer(layer, size, sizes),
        };
        let why = match process.ask(&request, &self.members, &self.patience()) {
            Ok(Frame::Message(Message::Opened(root, facts))) => {
                let known = self.opened.get_or_init(|| Ok((root, check::facts(facts))));
                if known.as_ref().is_ok_and(|(known, _)| *known == root) {
                    return Ok(());
                }
                "it found another root than the one before".to_owned()
            }
            Ok(_) => "it answered something else than what was asked".to_owned(),
            Err(Failure::Answered(error)) => {
                if let Error::Guest(error) = &error {
                    let _ = self.opened.set(Err(error.clone()));
                }
                return Err(error);
            }
            Err(Failure::Broken(why, _)) => why,
        };
        self.troubles().note(FAILED_OPEN);
        Err(Error::Worker(format!("the worker that opened it failed: {why}")))
    }

    fn troubles(&self) -> MutexGuard<'_, Troubles> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_recent(&self) -> Result<()> {
        let mut troubles = self.troubles();
        while troubles.recent.front().is_some_and(|failure| failure.elapsed() >= PERIOD) {
            troubles.recent.pop_front();
        }
        if troubles.recent.len() < FAILURES {
            return Ok(());
        }
        let message =
            format!("too many workers of it failed within {} s: it is left alone for as long", PERIOD.as_secs());
        Err(Error::Worker(message))
    }

    fn check_file(&self, question: Question, inode: Inode) -> Result<()> {
        match self.troubles().files.peek(&(question, inode)) {
            Some((count, last)) if *count >= SAME && last.elapsed() < REST => {
                let message = format!("{SAME} workers failed at this file: it is left alone for {} s", REST.as_secs());
                Err(Error::Worker(message))
            }
            _ => Ok(()),
        }
    }

    fn note_file(&self, question: Question, inode: Inode) {
        let mut troubles = self.troubles();
        troubles.note(1);
        let count = troubles.files.get(&(question, inode)).map_or(0, |(count, _)| *count);
        troubles.files.put((question, inode), (count + 1, Instant::now()));
    }
}

impl Troubles {
    fn note(&mut self, count: usize) {
        self.recent.extend(std::iter::repeat_n(Instant::now(), count));
        while self.recent.len() > FAILURES {
            self.recent.pop_front();
        }
    }
}

fn lied() -> Failure {
    Failure::Broken("it answered something else than what was asked".to_owned(), false)
}
