//! Questions on the terminal, each answered by a line.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::cli::exit::{Exit, Failure};
use crate::cli::signals;

/// How often it is looked whether Ctrl-C was pressed.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// No answer is longer (bytes): no line of a terminal is.
const LONGEST: usize = 4096;

/// A terminal that somebody answers on. It edits lines itself.
pub(super) struct Terminal {
    is_interrupted: Arc<AtomicBool>,
}

impl Terminal {
    /// Whether there is one.
    pub fn is_there() -> bool {
        io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Takes the signals that end a program from now on: who asks says how that ends.
    ///
    /// # Errors
    /// What the system says.
    pub fn open() -> Result<Self> {
        Ok(Self { is_interrupted: signals::stop_on_signals()? })
    }

    /// Asks, until the answer is text.
    ///
    /// # Errors
    /// `Interrupted` by Ctrl-C and Ctrl-D; what the system says.
    pub fn ask(&self, question: &str) -> Result<String> {
        loop {
            // In one piece: a key that is pressed meanwhile is echoed before or after it.
            io::stderr().write_all(format!("{question}: ").as_bytes()).context("ask on the terminal")?;
            let Some(line) = self.line().context("ask on the terminal")? else {
                // Below the question.
                say!("");
                return Err(Failure::new(Exit::Interrupted, "interrupted; nothing was written").into());
            };
            match String::from_utf8(line) {
                Ok(line) if line.len() < LONGEST => return Ok(line.trim().to_owned()),
                Ok(_) => say!("that is longer than any answer"),
                Err(_) => say!("that is no text: UTF-8 was expected"),
            }
        }
    }

    /// Reads a line, or what there is of a long one; `None` if there is to be no more.
    fn line(&self) -> io::Result<Option<Vec<u8>>> {
        let stdin = io::stdin();
        let mut line = Vec::new();
        let mut part = [0; LONGEST];
        while !line.ends_with(b"\n") && line.len() < LONGEST {
            // A signal interrupts nothing: a thread of its own takes it.
            match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&TICK)) {
                _ if self.is_interrupted.load(Ordering::Relaxed) => return Ok(None),
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            match rustix::io::read(&stdin, &mut part) {
                Ok(0) => return Ok(None),
                Ok(count) => line.extend_from_slice(part.get(..count).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(line))
    }
}
