//! Finding chunks by bisection, in archives where arithmetic tells where every header stands.
//!
//! A disk holds what its guest wrote, which may be tar headers, whole XVAs, or a second chain of entries made to look
//! like those around it. So a header is never searched for, and none is believed for its looks: it is believed for its
//! place.
//!
//! A chunk of 1 MiB with its header and its checksum takes [`STRIDE`] bytes. If every chunk but the very last one is
//! that long, the headers are those at `first + n × STRIDE`, and a guest's bytes never stand there. What could break
//! this is a short chunk in between, or an empty one (XAPI writes them to keep a connection alive; they take
//! 3 sectors). Before anything is bisected, [`Regular::detect`] makes sure of all of this:
//!
//! 1. The file ends with a checksum entry and the end of the archive, and the chunk of that checksum stands before it.
//! 2. The number of that last chunk is the one its disk's virtual size gives: no number of that disk went to an empty
//!    chunk.
//! 3. The distance from the first header to that of the last chunk is a multiple of [`STRIDE`]. An empty chunk would
//!    make it 3 sectors more; a stride is 2051 sectors, which 3 does not divide.
//! 4. Every other disk found has a size in whole MiB and, as its last number, the one its size gives.
//!
//! With one disk, 1 and 2 are proof. With several, 3 leaves one case: the disks before the last one hold an exact
//! multiple of 2051 empty chunks (2051 of them are close to three hours without a byte of output); a guest that knows
//! this beforehand could then place headers. They would lead to other bytes of the same file, nowhere else.
//!
//! Whatever is not as expected, then or later, is left to [`crate::walk`].

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::archive::Source;
use crate::tar::{self, Header, Name};
use crate::{Result, XvaDisk};

/// Bytes of a chunk. Source: xen-api `ocaml/xapi/stream_vdi.ml` (`chunk_size`), XO `@xen-orchestra/xva/_writeDisk.mjs`.
pub(crate) const CHUNK: u64 = 1 << 20;

/// Bytes from one header of a chunk to the next: header, chunk, header of the checksum, checksum.
const STRIDE: u64 = CHUNK + 3 * tar::SECTOR;

/// Places remembered at most, some 5 MB.
const MAX_KNOWN: usize = 1 << 16;

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its bytes start there in the file.
    At(u64),
    /// It is not stored: zeroes.
    Absent,
    /// A header is not what it must be: the archive is damaged or not regular after all.
    Unclear,
}

/// The entries of one disk: slots `first..=last`, where slot n has its header at `Regular::first + n × STRIDE`.
#[derive(Debug)]
struct Slots {
    disk: usize,
    first: u64,
    last: u64,
    last_number: u64,
}

/// A chunk whose header was read.
#[derive(Debug, Clone, Copy)]
struct Seen {
    number: u64,
    slot: u64,
}

/// An archive whose headers stand at equal distances.
#[derive(Debug)]
pub(crate) struct Regular {
    first: u64,
    last: u64,
    /// Bytes of the last chunk of the archive.
    last_len: u64,
    runs: Vec<Slots>,
    /// (disk, number) → slot
    known: Mutex<BTreeMap<(usize, u64), u64>>,
}

impl Regular {
    /// Looks whether the archive is regular from the header at `first` (bytes) on; `None` if that is not certain.
    ///
    /// Reads a few headers, for several disks some twenty per disk.
    ///
    /// # Errors
    /// What the storage says.
    pub fn detect(source: &Source, disks: &[XvaDisk], first: u64) -> Result<Option<Self>> {
        let Some((disk, last_number)) = last_chunk(source, disks)? else { return Ok(None) };
        let exact = disks[disk].size - last_number * CHUNK;
        // XAPI stores the bytes there are, XO fills the chunk up.
        for last_len in [exact, CHUNK] {
            let back = last_len.next_multiple_of(tar::SECTOR) + 5 * tar::SECTOR;
            let Some(distance) = source.len.checked_sub(back).and_then(|at| at.checked_sub(first)) else { continue };
            if distance % STRIDE != 0 {
                continue;
            }
            let mut regular =
                Self { first, last: distance / STRIDE, last_len, runs: Vec::new(), known: Mutex::new(BTreeMap::new()) };
            if regular.find_runs(source, disks, disk, last_number)? {
                regular.remember_ends();
                return Ok(Some(regular));
            }
        }
        Ok(None)
    }

    /// Finds which slots belong to which disk; false if something is not regular.
    fn find_runs(&mut self, source: &Source, disks: &[XvaDisk], last: usize, last_number: u64) -> Result<bool> {
        let at_end = self.probe(source, disks, self.last)?;
        if at_end.map(|(disk, seen)| (disk, seen.number)) != Some((last, last_number)) {
            return Ok(false);
        }
        let mut first = 0;
        loop {
            let Some((disk, seen)) = self.probe(source, disks, first)? else { return Ok(false) };
            if seen.number != 0 || self.runs.iter().any(|run| run.disk == disk) {
                return Ok(false);
            }
            if disk == last {
                self.runs.push(Slots { disk, first, last: self.last, last_number });
                return Ok(self.last - first <= last_number);
            }
            // Invariant: `low` is of this disk, slot `high` of a later one.
            let (mut low, mut high) = (seen, self.last);
            while high - low.slot > 1 {
                let Some((found, seen)) = self.probe(source, disks, low.slot + (high - low.slot) / 2)? else {
                    return Ok(false);
                };
                if found != disk {
                    high = seen.slot;
                } else if seen.number < low.number + (seen.slot - low.slot) {
                    return Ok(false);
                } else {
                    low = seen;
                }
            }
            if disks[disk].size != (low.number + 1) * CHUNK {
                return Ok(false);
            }
            self.runs.push(Slots { disk, first, last: low.slot, last_number: low.number });
            first = high;
        }
    }

    fn remember_ends(&self) {
        let mut known = self.lock();
        for run in &self.runs {
            known.insert((run.disk, 0), run.first);
            known.insert((run.disk, run.last_number), run.last);
        }
    }

    /// Reads the header of a slot; `None` if it is none of a whole chunk of one of the disks.
    fn probe(&self, source: &Source, disks: &[XvaDisk], slot: u64) -> Result<Option<(usize, Seen)>> {
        let at = self.first + slot * STRIDE;
        let mut block = [0; 512];
        source.read(at, &mut block)?;
        let Ok(Some(header)) = Header::parse(&block, at) else { return Ok(None) };
        let Name::Chunk { reference, number } = Name::parse(&header.name) else { return Ok(None) };
        let Some(disk) = disks.iter().position(|disk| disk.reference == reference) else { return Ok(None) };
        let expected = if slot == self.last { self.last_len } else { CHUNK };
        // No chunk of a disk lies past its end.
        let is_sound = header.size == expected && number <= disks[disk].size / CHUNK;
        Ok(is_sound.then_some((disk, Seen { number, slot })))
    }

    /// Finds the chunk of that number, one that its disk has room for.
    ///
    /// # Errors
    /// What the storage says.
    pub fn place(&self, source: &Source, disks: &[XvaDisk], disk: usize, number: u64) -> Result<Place> {
        let Some((mut low, mut high)) = self.around(disk, number) else { return Ok(Place::Unclear) };
        let mut is_first = true;
        loop {
            for seen in [low, high] {
                if seen.number == number {
                    return Ok(Place::At(self.first + seen.slot * STRIDE + tar::SECTOR));
                }
            }
            // Numbers ascend, so a chunk is at most as many slots away as there are numbers in between.
            let least = high.slot.saturating_sub(high.number - number).max(low.slot + 1);
            let most = low.slot.saturating_add(number - low.number).min(high.slot - 1);
            if least > most {
                return Ok(Place::Absent);
            }
            // Where no chunk is missing in between, the first guess is right.
            let slot = if is_first { most } else { least + (most - least) / 2 };
            is_first = false;
            let Some((found, seen)) = self.probe(source, disks, slot)? else { return Ok(Place::Unclear) };
            let has_room =
                seen.number >= low.number + (slot - low.slot) && seen.number + (high.slot - slot) <= high.number;
            if found != disk || !has_room {
                return Ok(Place::Unclear);
            }
            self.remember(disk, seen);
            if seen.number <= number {
                low = seen;
            } else {
                high = seen;
            }
        }
    }

    /// Returns the nearest known chunks at or before and at or after `number`.
    fn around(&self, disk: usize, number: u64) -> Option<(Seen, Seen)> {
        let known = self.lock();
        let seen = |((_, number), slot): (&(usize, u64), &u64)| Seen { number: *number, slot: *slot };
        let low = known.range((disk, 0)..=(disk, number)).next_back().map(seen)?;
        let high = known.range((disk, number)..=(disk, u64::MAX)).next().map(seen)?;
        Some((low, high))
    }

    fn remember(&self, disk: usize, seen: Seen) {
        let mut known = self.lock();
        if known.len() >= MAX_KNOWN {
            known.retain(|key, _| self.is_end(*key));
        }
        known.insert((disk, seen.number), seen.slot);
    }

    fn is_end(&self, (disk, number): (usize, u64)) -> bool {
        number == 0 || self.runs.iter().any(|run| run.disk == disk && run.last_number == number)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(usize, u64), u64>> {
        // Every change is one insertion or removal: there is nothing half done.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the end of the file: the disk and the number of the last chunk, if it is as its disk's size wants it.
fn last_chunk(source: &Source, disks: &[XvaDisk]) -> Result<Option<(usize, u64)>> {
    let mut bytes = [0; 2048];
    let Some(at) = source.len.checked_sub(2048).filter(|at| at % tar::SECTOR == 0) else { return Ok(None) };
    source.read(at, &mut bytes)?;
    if bytes[1024..].iter().any(|byte| *byte != 0) {
        return Ok(None);
    }
    let Some(block) = bytes.first_chunk::<512>() else { return Ok(None) };
    let Ok(Some(header)) = Header::parse(block, at) else { return Ok(None) };
    let Name::Checksum { reference, number } = Name::parse(&header.name) else { return Ok(None) };
    let Some(disk) = disks.iter().position(|disk| disk.reference == reference) else { return Ok(None) };
    let expected = disks[disk].size.checked_sub(1).map(|last| last / CHUNK);
    Ok((expected == Some(number)).then_some((disk, number)))
}
