//! What a pool sends: a disk, or a machine as an XVA.

use std::io::{self, Read};
use std::time::Duration;

use crate::record::{Vdi, Vm};
use crate::transfer::{Begun, END, Format, Request, outcome, value_of};
use crate::wire::{Length, Patience, Wire};
use crate::{Error, ErrorKind, Pool, Ref, Result, Task};

/// How long the first byte may take: the pool attaches the disk, or compresses first.
const FIRST: Duration = Duration::from_secs(1800);
/// What a page begins with that tells an error in place of the data.
const PAGE: &[u8] = b"HTTP/";
/// How much is read to find the end of what was read too early as complete (bytes): a page that tells an error is shorter.
const SURPLUS: usize = 64 << 10;

/// How the data of an XVA are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// Which disk is sent, and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// A snapshot: a disk that a machine writes to cannot be sent.
    pub vdi: Ref<Vdi>,
    /// Only what differs from this disk; only of VHD.
    pub base: Option<Ref<Vdi>>,
    /// In which form.
    pub format: Format,
}

/// A disk or a machine that is being sent.
///
/// Its end proves nothing: it is complete only if its structure is, and [`Export::conclude`] says so. A consumer that does not
/// read for minutes breaks it. Dropped, it is broken off.
pub struct Export {
    wire: Wire,
    task: Task,
    patience: Patience,
    subject: String,
    /// How many bytes are to come, if that was said.
    rest: Option<u64>,
    /// The first bytes, until they were read.
    first: Vec<u8>,
    is_begun: bool,
    is_ended: bool,
    received: u64,
    failed: Option<Error>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export")
            .field("subject", &self.subject)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Begins to send a disk.
    ///
    /// # Errors
    /// What the pool or the connection says. Most errors show only when it is read or concluded.
    pub fn export_vdi(&self, options: &ExportOptions) -> Result<Export> {
        let mut query = vec![("vdi", value_of(&options.vdi)), ("format", options.format.name().to_owned())];
        query.extend(options.base.as_ref().map(|base| ("base", value_of(base))));
        let request = Request { method: "GET", path: "/export_raw_vdi/", query, length: None };
        self.export("export of a disk", &request)
    }

    /// Begins to send a machine that is halted, or a snapshot, as an XVA.
    ///
    /// # Errors
    /// As [`Pool::export_vdi`]; `VM_BAD_POWER_STATE` shows when it is read.
    pub fn export_vm(&self, vm: &Ref<Vm>, compression: Compression) -> Result<Export> {
        let compression = match compression {
            Compression::None => "false",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        };
        let query = vec![("ref", value_of(vm)), ("use_compression", compression.to_owned())];
        self.export("export of a machine", &Request { method: "GET", path: "/export/", query, length: None })
    }

    fn export(&self, label: &str, request: &Request<'_>) -> Result<Export> {
        let Begun { wire, head, task, subject } = self.begin(label, request, None)?;
        let rest = match head.length {
            Length::Bytes(bytes) => Some(bytes),
            Length::UntilEnd => None,
        };
        Ok(Export {
            wire,
            task,
            patience: Patience { cancel: self.cancel.clone(), silence: self.core.settings.silence },
            subject,
            rest,
            first: Vec::new(),
            is_begun: false,
            is_ended: false,
            received: 0,
            failed: None,
        })
    }
}

impl Export {
    /// Returns how many bytes were read.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Ends it, once it was read to its end, and returns whether all of it was right as far as the pool knows.
    ///
    /// # Errors
    /// What the task failed with: of a stream whose structure is wrong, the reason. [`ErrorKind::Protocol`] if more came,
    /// [`ErrorKind::TimedOut`] if the task has not ended in a minute.
    pub fn conclude(mut self) -> Result<()> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let mut surplus = vec![0; SURPLUS];
        let mut more = 0;
        while !self.is_ended && more < SURPLUS {
            match self.fetch(&mut surplus[more..]) {
                Ok(read) => more += read,
                Err(error) => return Err(self.why(error)),
            }
        }
        self.wire.close();
        let ended = outcome(&self.task, &self.subject, &self.patience.cancel, END);
        // Of one that is closed too early the task fails for that alone.
        if more > 0 && (!self.is_ended || ended.is_ok()) {
            let reason = format!("it goes on after {} bytes, where its end was expected", self.received);
            return Err(Error::new(ErrorKind::Protocol, &self.subject, reason));
        }
        ended.map(|_| ())
    }

    /// Breaks it off and waits until the pool has noticed, so that the disk is free soon.
    ///
    /// # Errors
    /// What the token says; [`ErrorKind::TimedOut`] if the task has not ended in a minute.
    pub fn abandon(self) -> Result<()> {
        let Self { wire, task, subject, patience, .. } = self;
        wire.close();
        // Only a socket that is gone resets the connection: the host may wait for room in a window that nobody empties.
        drop(wire);
        match outcome(&task, &subject, &patience.cancel, END) {
            Err(error) if matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::TimedOut) => Err(error),
            // That it was broken off.
            _ => Ok(()),
        }
    }

    /// Reads some bytes; 0 at the end.
    fn fetch(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if buffer.is_empty() || self.is_ended {
            return Ok(0);
        }
        if !self.is_begun {
            self.begin()?;
        }
        if !self.first.is_empty() {
            let count = self.first.len().min(buffer.len());
            buffer[..count].copy_from_slice(&self.first[..count]);
            self.first.drain(..count);
            return Ok(count);
        }
        self.receive(buffer)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let wanted =
            self.rest.map_or(buffer.len(), |rest| buffer.len().min(usize::try_from(rest).unwrap_or(usize::MAX)));
        let read = if wanted == 0 { 0 } else { self.wire.read(&mut buffer[..wanted], &self.patience)? };
        if read == 0 && self.rest.is_some_and(|rest| rest > 0) {
            let reason = format!("it was cut off, {} bytes are missing", self.rest.unwrap_or(0));
            return Err(Error::new(ErrorKind::Unreachable, &self.subject, reason));
        }
        self.rest = self.rest.map(|rest| rest - read as u64);
        self.is_ended = read == 0;
        Ok(read)
    }

    /// Reads the first bytes, which tell whether there is data at all.
    fn begin(&mut self) -> Result<()> {
        let mut first = [0; PAGE.len()];
        let mut len = 0;
        let silence = std::mem::replace(&mut self.patience.silence, FIRST);
        while len < first.len() && !self.is_ended {
            len += self.receive(&mut first[len..])?;
        }
        self.patience.silence = silence;
        self.is_begun = true;
        if len == PAGE.len() && first == PAGE {
            let reason = "a page that tells an error came in place of the data";
            return Err(Error::new(ErrorKind::Protocol, &self.subject, reason));
        }
        self.first = first[..len].to_vec();
        // Those that came are to be read before the end is.
        self.is_ended = self.is_ended && len == 0;
        Ok(())
    }

    /// Returns why it broke: what the task says, if it failed, else what was seen.
    fn why(&mut self, seen: Error) -> Error {
        self.wire.close();
        // The task would fail only because it is broken off.
        if matches!(seen.kind(), ErrorKind::Cancelled | ErrorKind::TimedOut) {
            return seen;
        }
        match outcome(&self.task, &self.subject, &self.patience.cancel, END) {
            Err(error) if !matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unreachable) => error,
            _ => seen,
        }
    }
}

impl Read for Export {
    /// Errors hold an [`Error`] of this crate.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(error) = &self.failed {
            return Err(error.clone().into());
        }
        match self.fetch(buffer) {
            Ok(read) => {
                self.received += read as u64;
                Ok(read)
            }
            Err(error) => {
                let error = self.why(error);
                self.failed = Some(error.clone());
                Err(error.into())
            }
        }
    }
}
