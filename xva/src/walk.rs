//! Finding chunks by following the headers of the tar from the first one on.
//!
//! Always right, whatever the disks hold, since nothing but headers is looked at; and slow the first time, since a
//! header stands before every chunk. What was learned is kept as runs, so that every header is read once.
//!
//! Invariants: `frontier` is the place of a header that was not looked at yet, and everything before it is in `disks`.
//! The lock is never held while something is read: threads that need the same header both read it, one enters it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::archive::Source;
use crate::tar::{self, Header, Name};
use crate::{Error, ErrorKind, Result, XvaDisk};

/// Runs of all disks at most, some 600 MB of memory; a real archive has one per hole or keep-alive.
const MAX_RUNS: usize = 1 << 24;

/// What stands at an offset of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Bytes of the file: `len` at `file`; the data goes on for `run` bytes, elsewhere in the file.
    Data { file: u64, len: u64, run: u64 },
    /// Zeroes that are not stored, `len` of them at least.
    Hole { len: u64 },
}

/// Chunks of one length that follow each other on the disk and, at equal distances, in the file.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Offset on the disk of the first chunk.
    disk: u64,
    /// Where its bytes stand in the file.
    file: u64,
    /// Bytes of one chunk.
    len: u64,
    /// Bytes of the file from one chunk to the next; 0 while there is only one.
    stride: u64,
    count: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.disk + self.len * self.count
    }
}

/// What is known of the chunks of one disk.
#[derive(Debug, Default)]
struct Chunks {
    /// Where its first header stands in the file.
    start: Option<u64>,
    runs: Vec<Run>,
    last_number: Option<u64>,
    /// Length of the first chunk that holds something: what a missing number stands for.
    first_len: u64,
    /// How far the disk is known.
    end: u64,
    /// Bytes stored.
    stored: u64,
    /// Whether all its chunks are known.
    is_complete: bool,
}

impl Chunks {
    fn find(&self, offset: u64, size: u64) -> Option<Piece> {
        if offset >= self.end {
            return None;
        }
        let after = self.runs.partition_point(|run| run.disk <= offset);
        if let Some(run) = after.checked_sub(1).map(|at| &self.runs[at]).filter(|run| offset < run.end()) {
            let (index, skip) = ((offset - run.disk) / run.len, (offset - run.disk) % run.len);
            return Some(Piece::Data {
                file: run.file + index * run.stride + skip,
                len: (run.len - skip).min(size - offset),
                run: run.end().min(size) - offset,
            });
        }
        let next = self.runs.get(after).map_or(self.end, |run| run.disk);
        Some(Piece::Hole { len: next.min(size) - offset })
    }

    /// Enters a chunk; returns how many runs were added, or what is wrong with it.
    fn push(&mut self, number: u64, len: u64, file: u64, size: u64) -> std::result::Result<usize, String> {
        if self.is_complete {
            return Err("comes after chunks of another disk".to_owned());
        }
        let expected = self.last_number.map_or(0, |last| last + 1);
        if number < expected || (self.last_number.is_none() && number != 0) {
            return Err(format!("{expected:08} was expected there"));
        }
        let missing = number - expected;
        if missing > 0 && self.first_len == 0 {
            return Err("follows missing chunks of unknown length".to_owned());
        }
        let past_end = || format!("lies past the end of its disk of {size} bytes");
        let start = missing.checked_mul(self.first_len).and_then(|gap| gap.checked_add(self.end));
        let start = start.filter(|start| *start < size || (*start == size && len == 0)).ok_or_else(past_end)?;
        // A last chunk may be filled up, by less than its length. What lies past the end is not shown.
        let end = start.checked_add(len).ok_or_else(past_end)?;
        self.last_number = Some(number);
        if len == 0 {
            self.end = self.end.max(start);
            return Ok(0);
        }
        if self.first_len == 0 {
            self.first_len = len;
        }
        self.end = end;
        self.stored += len.min(size - start);
        if let Some(run) = self.runs.last_mut() {
            let stride = if run.count == 1 { file - run.file } else { run.stride };
            if run.end() == start && run.len == len && file == run.file + run.count * stride {
                run.stride = stride;
                run.count += 1;
                return Ok(0);
            }
        }
        self.runs.push(Run { disk: start, file, len, stride: 0, count: 1 });
        Ok(1)
    }
}

#[derive(Debug)]
struct State {
    frontier: u64,
    /// Whether the end of the archive was reached.
    is_ended: bool,
    /// The disk of the last chunk.
    current: Option<usize>,
    disks: Vec<Chunks>,
    runs: usize,
}

/// What stands at the frontier.
enum Step {
    Entry { header: Header, at: u64, next: u64 },
    End,
}

/// The chunks found so far, by following the headers.
#[derive(Debug)]
pub(crate) struct Walk {
    state: Mutex<State>,
}

impl Walk {
    /// Begins at the header at `first` (bytes), that after `ova.xml`.
    pub fn new(first: u64, disks: usize) -> Self {
        let disks = std::iter::repeat_with(Chunks::default).take(disks).collect();
        Self { state: Mutex::new(State { frontier: first, is_ended: false, current: None, disks, runs: 0 }) }
    }

    /// Returns what stands at an offset, if the walk was there already.
    pub fn known(&self, disks: &[XvaDisk], disk: usize, offset: u64) -> Option<Piece> {
        self.lock().disks[disk].find(offset, disks[disk].size)
    }

    /// Returns what stands at an offset; walks as far as needed.
    ///
    /// # Errors
    /// `Damaged` if the archive does not hold that part of the disk, or is damaged before it.
    pub fn piece(&self, source: &Source, disks: &[XvaDisk], disk: usize, offset: u64) -> Result<Piece> {
        let size = disks[disk].size;
        loop {
            {
                let state = self.lock();
                let chunks = &state.disks[disk];
                if let Some(piece) = chunks.find(offset, size) {
                    return Ok(piece);
                }
                if chunks.is_complete || state.is_ended {
                    return Err(Error::damaged(format!(
                        "the chunks of '{}' end at byte {} of {size}: the archive is incomplete",
                        disks[disk].reference.escape_debug(),
                        chunks.end
                    )));
                }
            }
            self.step(source, disks)?;
        }
    }

    /// Returns the place of the first header of a disk, in bytes; walks there. `None` if the archive does not hold it.
    ///
    /// # Errors
    /// `Damaged` if the archive is damaged before it; else what the storage says.
    pub fn start(&self, source: &Source, disks: &[XvaDisk], disk: usize) -> Result<Option<u64>> {
        loop {
            {
                let state = self.lock();
                if let Some(start) = state.disks[disk].start {
                    return Ok(Some(start));
                }
                if state.is_ended {
                    return Ok(None);
                }
            }
            self.step(source, disks)?;
        }
    }

    /// Returns the bytes stored of a disk; walks past its last chunk.
    ///
    /// # Errors
    /// As for [`Walk::piece`].
    pub fn stored(&self, source: &Source, disks: &[XvaDisk], disk: usize) -> Result<u64> {
        // Also learns whether the disk ends too early.
        if let Some(last) = disks[disk].size.checked_sub(1) {
            self.piece(source, disks, disk, last)?;
        }
        Ok(self.lock().disks[disk].stored)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the headers at the frontier and enters them.
    fn step(&self, source: &Source, disks: &[XvaDisk]) -> Result<()> {
        let from = self.lock().frontier;
        let steps = read_steps(source, from)?;
        let mut state = self.lock();
        if state.frontier != from || state.is_ended {
            return Ok(());
        }
        for step in steps {
            state.enter(step, disks)?;
        }
        Ok(())
    }
}

impl State {
    fn enter(&mut self, step: Step, disks: &[XvaDisk]) -> Result<()> {
        let Step::Entry { header, at, next } = step else {
            self.is_ended = true;
            self.disks.iter_mut().for_each(|chunks| chunks.is_complete = true);
            return Ok(());
        };
        let wrong = |why: &str| Error::damaged(format!("at byte {at}: '{}' {why}", header.name.escape_debug()));
        let find = |reference: &str| disks.iter().position(|disk| disk.reference == reference);
        match Name::parse(&header.name) {
            Name::Chunk { reference, number } => {
                if let Some(disk) = find(reference) {
                    if let Some(done) = self.current.filter(|current| *current != disk) {
                        self.disks[done].is_complete = true;
                    }
                    self.current = Some(disk);
                    self.disks[disk].start.get_or_insert(at);
                    let file = at + tar::SECTOR;
                    self.runs += self.disks[disk]
                        .push(number, header.size, file, disks[disk].size)
                        .map_err(|why| wrong(&why))?;
                    if self.runs > MAX_RUNS {
                        return Err(Error::new(
                            ErrorKind::Unsupported,
                            format!("at byte {at}: more than {MAX_RUNS} runs of chunks, no disk is in so many pieces"),
                        ));
                    }
                }
            }
            Name::Checksum { reference, number } => {
                if let Some(disk) = find(reference) {
                    let is_of_last = self.current == Some(disk) && self.disks[disk].last_number == Some(number);
                    if !is_of_last {
                        return Err(wrong("does not follow its chunk"));
                    }
                }
            }
            Name::Other => {}
        }
        self.frontier = next;
        Ok(())
    }
}

/// Reads the entry at `from` and those right after it: a checksum and the header that follows come in one read.
fn read_steps(source: &Source, from: u64) -> Result<Vec<Step>> {
    const WINDOW: usize = 2048;
    let mut bytes = [0; WINDOW];
    let missing = || {
        Error::damaged(format!(
            "at byte {from}: a tar header or the end of the archive was expected, the file ends at byte {}: it is cut off",
            source.len
        ))
    };
    let left = source.len.checked_sub(from).ok_or_else(missing)?;
    let window = &mut bytes[..usize::try_from(left).map_or(WINDOW, |left| left.min(WINDOW))];
    source.read(from, window)?;

    let mut steps = Vec::new();
    let mut at = from;
    loop {
        let start = usize::try_from(at - from).unwrap_or(usize::MAX);
        let block = window.get(start..).and_then(<[u8]>::first_chunk::<512>);
        let result = match block {
            None if steps.is_empty() => Err(missing()),
            None => return Ok(steps),
            Some(block) => parse_step(source, block, window.get(start + 512..), at),
        };
        match result {
            Ok(Some(Step::Entry { header, at: here, next })) => {
                steps.push(Step::Entry { header, at: here, next });
                at = next;
            }
            Ok(Some(Step::End)) => {
                steps.push(Step::End);
                return Ok(steps);
            }
            // Whatever is unclear past the first entry is looked at again when the frontier is there.
            Ok(None) => return Ok(steps),
            Err(_) if !steps.is_empty() => return Ok(steps),
            Err(error) => return Err(error),
        }
    }
}

/// Parses one entry; `None` if the second block of the end does not lie in `rest`, though it does in the file.
fn parse_step(source: &Source, block: &[u8; 512], rest: Option<&[u8]>, at: u64) -> Result<Option<Step>> {
    let Some(header) = Header::parse(block, at)? else {
        let second = rest.and_then(|rest| rest.first_chunk::<512>());
        return match second {
            Some(second) if second.iter().all(|byte| *byte == 0) => Ok(Some(Step::End)),
            None if source.len - at >= 2 * tar::SECTOR => Ok(None),
            _ => Err(Error::damaged(format!(
                "at byte {at}: the archive ends with two blocks of zeroes, there is only one: it is cut off"
            ))),
        };
    };
    let next = tar::room(header.size).and_then(|room| at.checked_add(room)).filter(|next| *next <= source.len);
    let Some(next) = next else {
        return Err(Error::damaged(format!(
            "at byte {at}: '{}' has {} bytes, the file ends at byte {}: it is cut off",
            header.name.escape_debug(),
            header.size,
            source.len
        )));
    };
    Ok(Some(Step::Entry { header, at, next }))
}
