//! A volume with a filesystem, as the tree asks it: through a worker that is started when needed and replaced when it fails.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use disk::Disk;
use guest::{Attributes, Content, Entry, Extents, Facts, Inode, Xattr};

use super::check;
use super::error::{Error, Result};
use super::pool::{Seat, Workers};
use super::process::{Failure, Process};
use super::protocol::{Frame, Message, PIECE_LIMIT, Request};

/// So many workers may fail within [`PERIOD`] before the volume is left alone for as long.
const FAILURES: usize = 5;
const PERIOD: Duration = Duration::from_secs(60);

/// A filesystem in a guest.
pub struct Volume {
    workers: Arc<Workers>,
    content: Content,
    members: Vec<Arc<dyn Disk>>,
    seat: Arc<Seat>,
    /// When workers of it failed.
    failures: Mutex<VecDeque<Instant>>,
    /// Its root and what is said of it, or why no reader will ever open it.
    opened: OnceLock<guest::Result<(Inode, Facts)>>,
}

impl Volume {
    /// Makes one of its members; nothing is read yet.
    #[must_use]
    pub fn new(workers: Arc<Workers>, content: Content, members: Vec<Arc<dyn Disk>>) -> Self {
        let seat = workers.seat();
        Self { workers, content, members, seat, failures: Mutex::default(), opened: OnceLock::new() }
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
            self.check_failures()?;
            self.seat.work(&self.workers, |process| self.prepare(process), |_, _| ((), true))?;
        }
        match self.opened.get().expect("a worker that was prepared said it") {
            Ok((root, facts)) => Ok((*root, facts)),
            Err(error) => Err(error.clone().into()),
        }
    }

    /// Returns what is in a directory: each name, and what is known of the file, or why that is not.
    ///
    /// # Errors
    /// As for [`Volume::open`]; what the reader says. A listing is complete or not there.
    pub fn list(&self, directory: Inode) -> Result<Vec<(Entry, std::result::Result<Attributes, String>)>> {
        let mut listed = Vec::new();
        let mut from = 0;
        loop {
            let answer = self.ask(&Request::List(directory, from))?;
            let Frame::Message(Message::List(page)) = answer else { return Err(self.lied()) };
            let next = check::page(page, from, &mut listed)?;
            match next {
                Some(next) => from = next,
                None => return Ok(listed),
            }
        }
    }

    /// Returns what is known of a file.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn attributes(&self, inode: Inode) -> Result<Attributes> {
        match self.ask(&Request::Attributes(inode))? {
            Frame::Message(Message::Attributes(attributes)) => check::attributes(attributes),
            _ => Err(self.lied()),
        }
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        match self.ask(&Request::Target(inode))? {
            Frame::Message(Message::Target(target)) => check::target(target),
            _ => Err(self.lied()),
        }
    }

    /// Returns the extended attributes of a file.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>> {
        match self.ask(&Request::Xattrs(inode))? {
            Frame::Message(Message::Xattrs(xattrs)) => check::xattrs(xattrs),
            _ => Err(self.lied()),
        }
    }

    /// Returns where bytes of a file lie, from `from` on: thousands of extents at a time.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn extents(&self, inode: Inode, from: u64) -> Result<Extents> {
        match self.ask(&Request::Extents(inode, from))? {
            Frame::Message(Message::Extents(extents)) => check::extents(extents, from, &self.members),
            _ => Err(self.lied()),
        }
    }

    /// Fills `buffer` with bytes of a file that are encoded.
    ///
    /// # Errors
    /// As for [`Volume::list`].
    pub fn decode(&self, inode: Inode, offset: u64, buffer: &mut [u8]) -> Result<()> {
        for (offset, piece) in (offset..).step_by(PIECE_LIMIT).zip(buffer.chunks_mut(PIECE_LIMIT)) {
            let len = u32::try_from(piece.len()).expect("at most PIECE_LIMIT");
            match self.ask(&Request::Decode(inode, offset, len))? {
                Frame::Bytes(bytes) if bytes.len() == piece.len() => piece.copy_from_slice(&bytes),
                _ => return Err(self.lied()),
            }
        }
        Ok(())
    }

    /// Asks a worker; if one that rested turns out to be dead, another.
    fn ask(&self, request: &Request) -> Result<Frame<Message>> {
        let mut may_retry = true;
        loop {
            if let Some(Err(error)) = self.opened.get() {
                return Err(error.clone().into());
            }
            self.check_failures()?;
            let asked = self.seat.work(
                &self.workers,
                |process| self.prepare(process),
                |process, is_new| match process.ask(request, &self.members) {
                    Ok(frame) => (Ok(frame), true),
                    Err(Failure::Answered(error)) => (Err((error, false)), true),
                    Err(Failure::Broken(why, is_silent)) => {
                        (Err((Error::Worker(format!("its worker failed: {why}")), is_silent && !is_new)), false)
                    }
                },
            )?;
            match asked {
                Ok(frame) => return Ok(frame),
                Err((_, true)) if may_retry => may_retry = false,
                Err((error, _)) => {
                    if matches!(error, Error::Worker(_)) {
                        self.note_failure();
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Has a new worker open the volume.
    fn prepare(&self, process: &mut Process) -> Result<()> {
        let sizes = self.members.iter().map(|member| member.size()).collect();
        let error = match process.ask(&Request::Open(self.content, sizes), &self.members) {
            Ok(Frame::Message(Message::Opened(root, facts))) => {
                let facts = check::facts(facts)?;
                let known = self.opened.get_or_init(|| Ok((root, facts)));
                let is_same = known.as_ref().is_ok_and(|(known, _)| *known == root);
                return if is_same { Ok(()) } else { Err(self.lied()) };
            }
            Ok(_) => return Err(self.lied()),
            Err(Failure::Answered(error)) => {
                if let Error::Guest(error) = &error {
                    let _ = self.opened.set(Err(error.clone()));
                }
                return Err(error);
            }
            Err(Failure::Broken(why, _)) => Error::Worker(format!("the worker that opened it failed: {why}")),
        };
        self.note_failure();
        Err(error)
    }

    fn lied(&self) -> Error {
        self.note_failure();
        check::lie("it answered something else than what was asked")
    }

    fn note_failure(&self) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push_back(Instant::now());
        if failures.len() > FAILURES {
            failures.pop_front();
        }
    }

    fn check_failures(&self) -> Result<()> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match (failures.front(), failures.back()) {
            (Some(first), Some(last)) if failures.len() == FAILURES => {
                if last.duration_since(*first) < PERIOD && last.elapsed() < PERIOD {
                    let message = format!(
                        "{FAILURES} workers of it failed within {} s: it is left alone for as long",
                        PERIOD.as_secs()
                    );
                    return Err(Error::Worker(message));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
