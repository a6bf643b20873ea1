//! What a pool is sent: a disk's content, or a machine as an XVA.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use crate::record::{Sr, Vdi};
use crate::transfer::{Begun, END, Format, Request, outcome, value_of};
use crate::wire::{Patience, Wire};
use crate::{Error, ErrorKind, Outcome, Pool, Ref, Result, Task};

/// What is said of a length that nobody knows (bytes): no stream is that long, and the pool reads an XVA until its end.
const UNKNOWN: u64 = 1 << 50;
/// What the name of the task ends with that makes a machine of an XVA.
pub const IMPORT_OF_A_MACHINE: &str = "import of a machine";
/// How often the task is looked at while the pool takes nothing.
const LOOK: Duration = Duration::from_secs(10);

/// What is being sent to a pool.
///
/// It is there only if [`Import::conclude`] says so. Dropped, it is broken off; what was written remains in the disk.
pub struct Import {
    wire: Wire,
    task: Task,
    patience: Patience,
    /// How long the task may take to end.
    end: Duration,
    subject: String,
    length: Option<u64>,
    makes_machine: bool,
    sent: u64,
    failed: Option<Error>,
}

impl std::fmt::Debug for Import {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Import").field("subject", &self.subject).field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl Pool {
    /// Begins to write to a disk, at a host that has its SR. A VHD with what differs is written over what is there.
    ///
    /// `length` is how many bytes are sent, exactly: the pool looks for the end of a VHD by it.
    ///
    /// # Errors
    /// What the pool or the connection says. Most errors show only when it is concluded.
    pub fn import_vdi(&self, vdi: &Ref<Vdi>, format: Format, length: u64) -> Result<Import> {
        let sr: Ref<Sr> = self.field(vdi, "SR")?;
        let query = vec![("vdi", value_of(vdi)), ("format", format.name().to_owned())];
        self.import("import of a disk", "/import_raw_vdi/", query, &sr, Some(length))
    }

    /// Begins to make a machine of an XVA, with its disks in `sr`; the outcome holds its reference. `length` in bytes, if it
    /// is known.
    ///
    /// # Errors
    /// As [`Pool::import_vdi`].
    pub fn import_vm(&self, sr: &Ref<Sr>, length: Option<u64>) -> Result<Import> {
        self.import(IMPORT_OF_A_MACHINE, "/import/", vec![("sr_id", value_of(sr))], sr, length)
    }

    fn import(
        &self,
        label: &str,
        path: &str,
        query: Vec<(&str, String)>,
        sr: &Ref<Sr>,
        length: Option<u64>,
    ) -> Result<Import> {
        let first = self.host_for(sr)?;
        let request = Request { method: "PUT", path, query, length: Some(length.unwrap_or(UNKNOWN)) };
        let Begun { wire, task, subject, .. } = self.begin(label, &request, first)?;
        let settings = &self.core.settings;
        let patience = Patience { cancel: self.cancel.clone(), silence: settings.silence };
        let makes_machine = label == IMPORT_OF_A_MACHINE;
        let end = settings.patience;
        Ok(Import { wire, task, patience, end, subject, length, makes_machine, sent: 0, failed: None })
    }
}

impl Import {
    /// Returns how many bytes were sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Ends it, and returns what the pool made of it.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] if fewer bytes were sent than were said; what the task failed with;
    /// [`ErrorKind::TimedOut`] if it does not end.
    pub fn conclude(self) -> Result<Outcome> {
        self.conclude_held().map(|(outcome, _)| outcome)
    }

    /// The same; the task goes only when it is dropped, and says until then what was made. Of a machine whose end nobody awaited any
    /// more it stays, so that who undoes it knows.
    ///
    /// # Errors
    /// As [`Import::conclude`].
    pub fn conclude_held(mut self) -> Result<(Outcome, Task)> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if let Some(length) = self.length.filter(|length| *length != self.sent) {
            self.wire.close();
            let reason = format!("{} of {length} bytes were sent", self.sent);
            return Err(Error::new(ErrorKind::OutOfRange, &self.subject, reason));
        }
        if let Err(error) = self.wire.flush(&self.patience) {
            return Err(self.why(error));
        }
        if self.length.is_none() {
            match outcome(&self.task, &self.subject, &self.patience.cancel, LOOK) {
                Err(error) if error.kind() == ErrorKind::TimedOut => {}
                ended => return self.told(ended),
            }
            // What decompresses waits for the end of the connection.
            self.wire.close();
        }
        let ended = outcome(&self.task, &self.subject, &self.patience.cancel, self.end);
        self.told(ended)
    }

    /// Returns the end of all that was sent: from here on the pool may make something of it, whoever waits.
    fn told(mut self, ended: Result<Outcome>) -> Result<(Outcome, Task)> {
        if ended.is_err() && self.makes_machine && !self.task.is_over() {
            self.task.leave();
        }
        Ok((ended?, self.task))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<usize> {
        let rest = self.length.map_or(u64::MAX, |length| length - self.sent);
        if rest == 0 && !bytes.is_empty() {
            let reason = format!("more is sent than the {} bytes that were said", self.sent);
            return Err(Error::new(ErrorKind::OutOfRange, &self.subject, reason));
        }
        let count = bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
        if count == 0 {
            return Ok(0);
        }
        let begun = Instant::now();
        let patience = Patience { silence: LOOK.min(self.patience.silence), ..self.patience.clone() };
        loop {
            match self.wire.send_some(&bytes[..count], &patience) {
                Err(error) if error.kind() == ErrorKind::TimedOut && begun.elapsed() < self.patience.silence => {
                    self.patience.cancel.check(&self.subject)?;
                    // A pool that gave up may take nothing and say nothing.
                    if let Some(failure) = self.task.failure() {
                        return Err(failure);
                    }
                }
                sent => return sent,
            }
        }
    }

    /// Returns why it broke: what the task says, if it failed, else what was seen.
    fn why(&mut self, seen: Error) -> Error {
        // Of one that we break off, the task would fail only because of that.
        if seen.kind() != ErrorKind::Unreachable {
            return seen;
        }
        self.wire.close();
        match outcome(&self.task, &self.subject, &self.patience.cancel, END) {
            Err(error) if !matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unreachable) => error,
            _ => seen,
        }
    }
}

impl Write for Import {
    /// Errors hold an [`Error`] of this crate.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(error) = &self.failed {
            return Err(error.clone().into());
        }
        match self.put(bytes) {
            Ok(sent) => {
                self.sent += sent as u64;
                Ok(sent)
            }
            Err(error) => {
                let error = self.why(error);
                self.failed = Some(error.clone());
                Err(error.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wire.flush(&self.patience).map_err(io::Error::from)
    }
}
