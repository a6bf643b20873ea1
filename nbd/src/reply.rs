//! What a server answers to a request, chunk by chunk, checked against what was asked.

use std::io::{self, Read};
use std::ops::Range;

use crate::connection::Status;
use crate::wire::{self, u16_of, u32_of, u64_of};

/// Longest message in an error (bytes), as the protocol says.
const MESSAGE_LIMIT: u32 = 4096 + 32;
/// Most extents of one answer: a server is to stop at 2^20.
const EXTENTS: u32 = 1 << 20;

/// Most pieces of one answer, each of which is compared with all others: of 2 MiB, each sector may come alone.
const PIECES: usize = 4096;

/// What was asked for, and what came of it so far.
pub struct Pending {
    pub offset: u64,
    pub len: u32,
    pub kind: Kind,
    /// What the server said that went wrong.
    pub failed: Option<String>,
}

pub enum Kind {
    /// Bytes, which follow the first `head`, and which ranges of them have come (relative, in the order they came).
    Read { buffer: Vec<u8>, head: usize, came: Vec<(u32, u32)> },
    /// What the contexts say, by their numbers.
    Status(Vec<(u32, Vec<Status>)>),
}

/// Why a reply cannot be taken; the connection is over then.
pub enum Broken {
    Io(io::Error),
    Protocol(String),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn protocol<T>(reason: impl Into<String>) -> Result<T, Broken> {
    Err(Broken::Protocol(reason.into()))
}

impl Pending {
    pub fn read(offset: u64, buffer: Vec<u8>, head: usize) -> Self {
        let len = u32::try_from(buffer.len() - head).expect("a request is at most 32 MiB");
        Self { offset, len, kind: Kind::Read { buffer, head, came: Vec::new() }, failed: None }
    }

    pub fn status(offset: u64, len: u32) -> Self {
        Self { offset, len, kind: Kind::Status(Vec::new()), failed: None }
    }

    /// Returns how many bytes are asked for with it.
    pub fn cost(&self) -> u64 {
        match &self.kind {
            Kind::Read { .. } => u64::from(self.len),
            Kind::Status(_) => 0,
        }
    }

    /// Takes the rest of a simple reply.
    pub fn simple(&mut self, error: u32, from: &mut dyn Read) -> Result<(), Broken> {
        if error != 0 {
            self.fail(error, "");
            return Ok(());
        }
        match &mut self.kind {
            Kind::Read { buffer, head, came } => {
                from.read_exact(&mut buffer[*head..])?;
                came.push((0, self.len));
                Ok(())
            }
            Kind::Status(_) => protocol("a simple reply, where an account of blocks was asked for"),
        }
    }

    /// Takes a chunk of `len` bytes.
    pub fn chunk(&mut self, kind: u16, len: u32, from: &mut dyn Read) -> Result<(), Broken> {
        if kind & wire::CHUNK_ERROR != 0 {
            return self.error_chunk(len, from);
        }
        match (kind, &mut self.kind) {
            (wire::CHUNK_NONE, _) if len == 0 => Ok(()),
            (wire::CHUNK_DATA, Kind::Read { buffer, head, came }) if len > 8 => {
                let start = place(self.offset, self.len, u64_of(from)?, len - 8, came)?;
                from.read_exact(&mut buffer[*head..][indices(start, len - 8)])?;
                came.push((start, len - 8));
                Ok(())
            }
            (wire::CHUNK_HOLE, Kind::Read { buffer, head, came }) if len == 12 => {
                let (offset, len) = (u64_of(from)?, u32_of(from)?);
                let start = place(self.offset, self.len, offset, len, came)?;
                buffer[*head..][indices(start, len)].fill(0);
                came.push((start, len));
                Ok(())
            }
            (wire::CHUNK_BLOCK_STATUS, Kind::Status(contexts)) if len >= 12 && (len - 4).is_multiple_of(8) => {
                let count = (len - 4) / 8;
                if count > EXTENTS {
                    return protocol(format!("an account of {count} extents, at most {EXTENTS} were expected"));
                }
                let id = u32_of(from)?;
                if contexts.iter().any(|(known, _)| *known == id) {
                    return protocol("two accounts of one metadata context");
                }
                // Grows with what comes, not by what is announced.
                let mut extents = Vec::new();
                for _ in 0..count {
                    let status = Status { len: u64::from(u32_of(from)?), flags: u32_of(from)? };
                    if status.len == 0 {
                        return protocol("an extent without length");
                    }
                    extents.push(status);
                }
                contexts.push((id, extents));
                Ok(())
            }
            _ => protocol(format!("a chunk of type {kind} with {len} bytes, which nothing asked for")),
        }
    }

    fn error_chunk(&mut self, len: u32, from: &mut dyn Read) -> Result<(), Broken> {
        if !(6..=MESSAGE_LIMIT).contains(&len) {
            return protocol(format!("an error of {len} bytes, 6 to {MESSAGE_LIMIT} were expected"));
        }
        let (error, said) = (u32_of(from)?, u16_of(from)?);
        let mut rest = vec![0; usize::try_from(len - 6).unwrap_or(0)];
        from.read_exact(&mut rest)?;
        let Some(said) = rest.get(..usize::from(said)) else { return protocol("an error longer than its chunk") };
        self.fail(error, &String::from_utf8_lossy(said));
        Ok(())
    }

    /// Whether all that was asked for has come, else what is missing.
    pub fn check(&self) -> Result<(), Broken> {
        match &self.kind {
            _ if self.failed.is_some() => Ok(()),
            // No two of them overlap.
            Kind::Read { came, .. }
                if came.iter().map(|(_, len)| u64::from(*len)).sum::<u64>() != u64::from(self.len) =>
            {
                protocol(format!("an answer without all of the {} bytes at {}", self.len, self.offset))
            }
            _ => Ok(()),
        }
    }

    /// The first error counts.
    fn fail(&mut self, number: u32, said: &str) {
        let name = match number {
            1 => "not permitted",
            5 => "input/output error",
            12 => "out of memory",
            22 => "invalid argument",
            28 => "no space left",
            75 => "too much at once",
            95 => "not supported",
            108 => "the server shuts down",
            _ => "unknown error",
        };
        let said = if said.is_empty() { String::new() } else { format!(", '{}'", said.escape_debug()) };
        let what = match self.kind {
            Kind::Read { .. } => "read",
            Kind::Status(_) => "tell what is allocated of",
        };
        let (len, offset) = (self.len, self.offset);
        self.failed.get_or_insert_with(|| {
            format!("the server cannot {what} {len} bytes at {offset}: {name} ({number}){said}")
        });
    }
}

/// Returns where in the buffer a piece begins; it must lie in what was asked for, where nothing came yet.
fn place(begin: u64, asked: u32, offset: u64, len: u32, came: &[(u32, u32)]) -> Result<u32, Broken> {
    if came.len() >= PIECES {
        return protocol(format!("an answer in more than {PIECES} pieces"));
    }
    let start = offset.checked_sub(begin).and_then(|start| u32::try_from(start).ok());
    let piece = start.and_then(|start| Some((start, start.checked_add(len)?)));
    let Some((start, end)) = piece.filter(|(start, end)| start < end && *end <= asked) else {
        return protocol(format!("{len} bytes at {offset}, which were not asked for"));
    };
    if came.iter().any(|(known, len)| *known < end && start < *known + len) {
        return protocol(format!("the bytes at {offset} came twice"));
    }
    Ok(start)
}

fn indices(start: u32, len: u32) -> Range<usize> {
    let index = |at: u32| usize::try_from(at).expect("pointers have 32 bits or more");
    index(start)..index(start) + index(len)
}
