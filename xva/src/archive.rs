//! An opened XVA and its disks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use disk::{Disk, Extent};
use storage::Object;

use crate::ova::{self, XvaDisk};
use crate::regular::{CHUNK, Place, Regular, last_disk};
use crate::tar;
use crate::walk::{Piece, Walk};
use crate::{Error, ErrorKind, Result};

/// How an XVA is compressed; its name does not say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all: a tar.
    None,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Bytes that tell it.
    pub const TOLD_BY: usize = 4;

    /// Returns how an XVA is compressed that begins with these bytes.
    ///
    /// Source: XO `@xen-orchestra/backups/_isValidXva.mjs`.
    #[must_use]
    pub fn of(beginning: &[u8]) -> Self {
        match beginning {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// Returns how an XVA is compressed, by its first bytes.
///
/// # Errors
/// What the storage says.
pub fn compression(object: &dyn Object) -> Result<Compression> {
    let mut beginning = [0; Compression::TOLD_BY];
    let len = object.read_at(0, &mut beginning)?;
    Ok(Compression::of(&beginning[..len]))
}

/// The bytes of the file.
pub(crate) struct Source {
    object: Arc<dyn Object>,
    /// Bytes of the file when it was opened.
    pub len: u64,
}

impl Source {
    /// Fills `buffer` from `offset`.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let found = self.object.read_at(offset, buffer)?;
        if found < buffer.len() {
            return Err(Error::damaged(format!(
                "at byte {offset}: {} bytes were expected, there are {found}: the file is cut off",
                buffer.len()
            )));
        }
        Ok(())
    }
}

/// An uncompressed XVA.
#[derive(Clone)]
pub struct Xva {
    archive: Arc<Archive>,
}

struct Archive {
    source: Source,
    ova_xml: Vec<u8>,
    disks: Vec<XvaDisk>,
    /// Whether the file is known to have all the bytes that were written.
    is_whole: AtomicBool,
    /// The disk that may be regular; empty until it is needed.
    last: OnceLock<Option<usize>>,
    /// That disk, if it is regular; empty until the first read of it.
    regular: OnceLock<Option<Regular>>,
    /// Set once the walk found something where `regular` could not be right.
    is_irregular: AtomicBool,
    walk: Walk,
}

impl Xva {
    /// Opens an XVA: reads `ova.xml`, and nothing after it.
    ///
    /// # Errors
    /// `Unsupported` if it is compressed, `Damaged` if it does not start with a sound `ova.xml` of at most 16 MiB.
    pub fn open(object: Arc<dyn Object>) -> Result<Self> {
        let compressed = match compression(object.as_ref())? {
            Compression::None => None,
            Compression::Gzip => Some(("gzip", "gzip -dc")),
            Compression::Zstd => Some(("zstd", "zstd -dc")),
        };
        if let Some((name, command)) = compressed {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "is an XVA compressed with {name}: its disks can be read only once it is decompressed ({command})"
                ),
            ));
        }
        let source = Source { len: object.stat()?.size, object };
        let mut block = [0; 512];
        source.read(0, &mut block)?;
        let size = ova::size(&block)?;
        let first = tar::room(size).filter(|first| *first <= source.len).ok_or_else(|| {
            ova::missing(&format!("it has {size} bytes, the file ends at byte {}: it is cut off", source.len))
        })?;
        let mut ova_xml = vec![0; usize::try_from(size).map_err(|_| ova::missing("it does not fit in memory"))?];
        source.read(tar::SECTOR, &mut ova_xml)?;
        let disks = ova::parse(&ova_xml)?;
        let walk = Walk::new(first, disks.len());
        let archive = Archive {
            source,
            ova_xml,
            disks,
            is_whole: AtomicBool::new(false),
            last: OnceLock::new(),
            regular: OnceLock::new(),
            is_irregular: AtomicBool::new(false),
            walk,
        };
        Ok(Self { archive: Arc::new(archive) })
    }

    /// Says how many bytes the archive had when it was written.
    ///
    /// If the file has as many, it was not cut off, and the chunks of its last disk can be found by bisection.
    pub fn believe_written(&self, bytes: u64) {
        self.archive.is_whole.store(bytes == self.archive.source.len, Ordering::Relaxed);
    }

    /// Returns the disks, in the order of `ova.xml`.
    #[must_use]
    pub fn disks(&self) -> &[XvaDisk] {
        &self.archive.disks
    }

    /// Returns `ova.xml` as stored.
    #[must_use]
    pub fn ova_xml(&self) -> &[u8] {
        &self.archive.ova_xml
    }

    /// Returns the content of the disk of that index in [`Xva::disks`].
    ///
    /// Holes are chunks that are not stored. The first question about holes follows the headers up to where it asks, in
    /// steps of 1 MiB; so does a plain read, except on the last disk of an archive known to be whole
    /// ([`Xva::believe_written`]): there it only follows them to where that disk begins.
    ///
    /// # Panics
    /// If there is no such disk.
    #[must_use]
    pub fn disk(&self, index: usize) -> Arc<dyn Disk> {
        assert!(index < self.archive.disks.len(), "disk {index} of {}", self.archive.disks.len());
        Arc::new(Content { archive: Arc::clone(&self.archive), index })
    }
}

impl Archive {
    /// Returns what stands at an offset below the size of the disk, by whichever way is the shortest.
    fn piece(&self, disk: usize, offset: u64) -> Result<Piece> {
        if let Some(piece) = self.walk.known(&self.disks, disk, offset) {
            return Ok(piece);
        }
        let regular = self.regular(disk)?;
        if let Some(regular) = regular {
            let (number, skip) = (offset / CHUNK, offset % CHUNK);
            let len = (CHUNK - skip).min(self.disks[disk].size - offset);
            match regular.place(&self.source, &self.disks, number)? {
                Place::At(file) => return Ok(Piece::Data { file: file + skip, len, run: len }),
                Place::Absent => return Ok(Piece::Hole { len }),
                Place::Unclear => {}
            }
        }
        // If a header is damaged, the walk stops there, and what can be reached otherwise still is.
        let piece = self.walk.piece(&self.source, &self.disks, disk, offset)?;
        if regular.is_some() {
            self.is_irregular.store(true, Ordering::Relaxed);
        }
        Ok(piece)
    }

    /// Returns how to find chunks of that disk by bisection, if it is the last one and that is certain.
    fn regular(&self, disk: usize) -> Result<Option<&Regular>> {
        if !self.is_whole.load(Ordering::Relaxed) || self.is_irregular.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if once(&self.last, || last_disk(&self.source, &self.disks))? != &Some(disk) {
            return Ok(None);
        }
        let regular = once(&self.regular, || {
            let start = self.walk.start(&self.source, &self.disks, disk)?;
            start.map_or(Ok(None), |start| Regular::detect(&self.source, &self.disks, disk, start))
        })?;
        Ok(regular.as_ref())
    }
}

/// Finds out once. Not `get_or_init`, which would lock while it reads: two threads may find out the same.
fn once<T>(cell: &OnceLock<T>, find: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(found) = cell.get() {
        return Ok(found);
    }
    let found = find()?;
    Ok(cell.get_or_init(|| found))
}

struct Content {
    archive: Arc<Archive>,
    index: usize,
}

impl Content {
    fn out_of_range(&self, offset: u64, len: usize) -> disk::Error {
        let XvaDisk { reference, size, .. } = &self.archive.disks[self.index];
        disk::Error::new(
            disk::ErrorKind::OutOfRange,
            format!("{len} bytes at byte {offset} of '{}', which has {size} bytes", reference.escape_debug()),
        )
    }
}

impl Disk for Content {
    fn size(&self) -> u64 {
        self.archive.disks[self.index].size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let asked = u64::try_from(buffer.len()).ok().and_then(|len| offset.checked_add(len));
        if asked.is_none_or(|end| end > self.size()) {
            return Err(self.out_of_range(offset, buffer.len()));
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let piece = self.archive.piece(self.index, at)?;
            let (Piece::Data { len, .. } | Piece::Hole { len }) = piece;
            let taken = usize::try_from(len).map_or(rest.len(), |len| len.min(rest.len()));
            let (now, later) = rest.split_at_mut(taken);
            match piece {
                Piece::Data { file, .. } => self.archive.source.read(file, now)?,
                Piece::Hole { .. } => now.fill(0),
            }
            at += len;
            rest = later;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        if offset >= self.size() {
            return Err(self.out_of_range(offset, 1));
        }
        let Archive { walk, source, disks, .. } = self.archive.as_ref();
        Ok(match walk.piece(source, disks, self.index, offset)? {
            Piece::Data { run, .. } => Extent { len: run, is_hole: false },
            Piece::Hole { len } => Extent { len, is_hole: true },
        })
    }

    fn allocated(&self) -> disk::Result<u64> {
        let Archive { walk, source, disks, .. } = self.archive.as_ref();
        Ok(walk.stored(source, disks, self.index)?)
    }
}
