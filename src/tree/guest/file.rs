//! A file of a guest as a disk, or a layer of a volume: its bytes are read where its extents say they lie, by the mount itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use disk::{Disk, Error, ErrorKind};
use guest::{Extent, Extents, Inode, Layer, Source};

use crate::worker::{self, Patience, Volume};

/// Parts of the map of extents that are kept of an open file: some 3 MiB at most.
const PARTS: usize = 8;

/// The same of a layer, which is read here and there for as long as its volume is: some 12 MiB at most.
const LAYER_PARTS: usize = 32;

/// Pieces that a read may be of, besides one for each sector of it: more is what no filesystem makes, and each may lie elsewhere.
const FEW: usize = 64;
const SECTOR: usize = 512;

/// An open file of a guest.
pub(in crate::tree) struct GuestFile {
    volume: Arc<Volume>,
    inode: Inode,
    /// In bytes.
    size: u64,
    /// Whether it is a layer, so that holes of its members are holes of it.
    is_layer: bool,
    /// What was asked of its extents.
    parts: Mutex<Parts>,
}

/// Parts of a map of extents.
struct Parts {
    /// By where it starts, and when it was last used.
    known: BTreeMap<u64, (u64, Arc<Extents>)>,
    limit: usize,
    /// Counts uses.
    now: u64,
}

impl Parts {
    fn new(limit: usize) -> Self {
        Self { known: BTreeMap::new(), limit, now: 0 }
    }

    /// Returns the part that `offset` is in, if it is known.
    fn at(&mut self, offset: u64) -> Option<Arc<Extents>> {
        let (_, (used, part)) = self.known.range_mut(..=offset).next_back()?;
        if offset >= part.until {
            return None;
        }
        self.now += 1;
        *used = self.now;
        Some(part.clone())
    }

    /// Keeps a part, in place of the one that was not used for longest.
    fn keep(&mut self, offset: u64, part: Arc<Extents>) {
        if self.known.len() >= self.limit {
            let oldest = self.known.iter().min_by_key(|(_, (used, _))| *used).map(|(start, _)| *start);
            oldest.and_then(|start| self.known.remove(&start));
        }
        self.now += 1;
        self.known.insert(offset, (self.now, part));
    }
}

/// Bytes of a file that lie together, or a hole.
struct Piece {
    len: u64,
    /// `None` in a hole.
    source: Option<Source>,
}

impl GuestFile {
    pub(in crate::tree) fn new(volume: Arc<Volume>, inode: Inode, size: u64) -> Self {
        Self { volume, inode, size, is_layer: false, parts: Mutex::new(Parts::new(PARTS)) }
    }

    /// Makes a disk of a layer of `size` bytes.
    pub(in crate::tree) fn layer(volume: Arc<Volume>, size: u64) -> Self {
        let parts = Mutex::new(Parts::new(LAYER_PARTS));
        Self { volume, inode: Layer::VOLUME, size, is_layer: true, parts }
    }

    /// Returns the part of the map that `offset` is in, if it is known.
    fn known(&self, offset: u64) -> Option<Arc<Extents>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).at(offset)
    }

    fn part(&self, offset: u64, patience: &Patience) -> disk::Result<Arc<Extents>> {
        if let Some(part) = self.known(offset) {
            return Ok(part);
        }
        let part = Arc::new(self.volume.extents(self.inode, offset, patience).map_err(disk_error)?);
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).keep(offset, part.clone());
        Ok(part)
    }

    /// Says where the bytes from `offset` lie, at most `len` of them.
    fn piece(part: &Extents, offset: u64, len: u64) -> Piece {
        let next = part.found.partition_point(|extent| extent.start + extent.len <= offset);
        let len = len.min(part.until - offset);
        match part.found.get(next) {
            Some(Extent { start, len: there, source }) if *start <= offset => {
                let within = offset - start;
                let len = len.min(there - within);
                let source = match source {
                    Source::Member(member, at) => Source::Member(*member, at + within),
                    Source::Bytes(bytes) => {
                        let from = usize::try_from(within).expect("within bytes in memory");
                        let to = usize::try_from(within + len).expect("within bytes in memory");
                        Source::Bytes(bytes[from..to].to_vec())
                    }
                    Source::Zeroes => Source::Zeroes,
                    Source::Encoded => Source::Encoded,
                };
                Piece { len, source: Some(source) }
            }
            Some(extent) => Piece { len: len.min(extent.start - offset), source: None },
            None => Piece { len, source: None },
        }
    }

    fn check(&self, offset: u64, len: u64) -> disk::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => {
                let message = format!("{len} bytes at {offset} of a file of {} bytes", self.size);
                Err(Error::new(ErrorKind::OutOfRange, message))
            }
        }
    }
}

impl Disk for GuestFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> disk::Result<()> {
        self.check(offset, buffer.len() as u64)?;
        let (patience, mut room) = (self.volume.patience(), FEW + buffer.len() / SECTOR);
        while !buffer.is_empty() {
            let scattered = || Error::new(ErrorKind::Damaged, "its bytes lie in more pieces than any filesystem makes");
            room = room.checked_sub(1).ok_or_else(scattered)?;
            let Piece { len, source } = Self::piece(&*self.part(offset, &patience)?, offset, buffer.len() as u64);
            let len = usize::try_from(len).expect("at most the length of the buffer");
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(len);
            match source {
                None | Some(Source::Zeroes) => part.fill(0),
                Some(Source::Member(member, at)) => self.volume.members()[usize::from(member)].read_at(at, part)?,
                Some(Source::Bytes(bytes)) => part.copy_from_slice(&bytes),
                Some(Source::Encoded) => self.volume.decode(self.inode, offset, part, &patience).map_err(disk_error)?,
            }
            buffer = rest;
            offset += len as u64;
        }
        Ok(())
    }

    /// What was never written is a hole, whether it takes room on the volume or not: so `lseek(2)` says it in the guest.
    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        self.check(offset, 1)?;
        let piece = Self::piece(&*self.part(offset, &self.volume.patience())?, offset, self.size - offset);
        if let (true, Some(Source::Member(member, at))) = (self.is_layer, &piece.source) {
            let below = self.volume.members()[usize::from(*member)].extent_at(*at)?;
            return Ok(disk::Extent { len: below.len.min(piece.len), ..below });
        }
        Ok(disk::Extent { len: piece.len, is_hole: matches!(piece.source, None | Some(Source::Zeroes)) })
    }

    fn read_in_memory(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let Some(part) = self.known(offset) else { return false };
        match Self::piece(&part, offset, buffer.len() as u64) {
            Piece { len, source: Some(Source::Member(member, at)) } if len == buffer.len() as u64 => {
                self.volume.members()[usize::from(member)].read_in_memory(at, buffer)
            }
            _ => false,
        }
    }

    fn prefetch_window(&self) -> u64 {
        self.volume.members().iter().map(|member| member.prefetch_window()).max().unwrap_or(0)
    }

    fn prefetch(&self, mut offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        while offset < end {
            let Some(part) = self.known(offset) else { return };
            let Piece { len, source } = Self::piece(&part, offset, end - offset);
            if let Some(Source::Member(member, at)) = source {
                self.volume.members()[usize::from(member)].prefetch(at, len);
            }
            offset += len;
        }
    }
}

/// What a reader says of a file, in the words of disks.
fn disk_error(error: worker::Error) -> Error {
    match error {
        worker::Error::Disk(error) => error,
        worker::Error::Guest(error) if error.kind() == guest::ErrorKind::Unsupported => {
            Error::new(ErrorKind::Unsupported, error.to_string())
        }
        worker::Error::Guest(error) => Error::new(ErrorKind::Damaged, error.to_string()),
        worker::Error::Worker(message) => Error::new(ErrorKind::Damaged, message),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::worker::liars::Liar;

    fn window(from: u64, step: u64) -> Extents {
        let extent = Extent { start: from, len: step, source: Source::Member(0, from * 7 % 1000) };
        Extents { found: vec![extent], until: from + step }
    }

    #[test]
    fn a_map_that_leads_nowhere_slowly_is_an_error_after_a_bounded_number_of_questions() {
        let mut liar = Liar::opened();
        // Exactly as many as are asked for: were it one more, its patience would end instead.
        liar.say_extents((0..320).map(|at| window(at, 1)), Duration::ZERO);
        let file = GuestFile::new(Arc::new(liar.volume(Duration::from_secs(10))), Inode(12), 1 << 40);
        let error = file.read_at(0, &mut vec![0; 128 << 10]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert!(error.to_string().contains("in more pieces than any filesystem makes"), "{error}");
        // What a filesystem makes is read: pieces of a sector.
        let mut liar = Liar::opened();
        liar.say_extents((0..256).map(|at| window(at * 512, 512)), Duration::ZERO);
        let file = GuestFile::new(Arc::new(liar.volume(Duration::from_secs(10))), Inode(12), 1 << 40);
        file.read_at(0, &mut vec![1; 128 << 10]).unwrap();
    }

    #[test]
    fn one_read_takes_the_patience_for_one_request_however_often_it_asks() {
        let mut liar = Liar::opened();
        liar.say_extents((0..100).map(|at| window(at * 512, 512)), Duration::from_millis(200));
        let file = GuestFile::new(Arc::new(liar.volume(Duration::from_secs(1))), Inode(12), 1 << 40);
        let began = Instant::now();
        let error = file.read_at(0, &mut vec![0; 50 << 10]).unwrap_err();
        assert!(error.to_string().contains("it took more than 1 s"), "{error}");
        // All of them would take 20 seconds.
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    }
}
