//! A file: what its record and Rock Ridge say of it, together.

use super::record::Record;
use super::rock::Rock;
use super::time;
use super::zisofs::Compressed;
use crate::{Attributes, Error, ErrorKind, Kind, Result, Time};

/// Bytes in which Linux counts what a file takes.
const SECTOR: u64 = 512;

/// What everybody may do with what has no permissions: Linux lets each file be run.
const MODE: u16 = 0o555;

/// Part of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Section {
    /// Where it starts on the volume (bytes).
    pub(super) place: u64,
    pub(super) len: u64,
}

/// How the content of a file is stored.
#[derive(Debug)]
pub(super) enum Content {
    /// As it is, in all sections.
    Plain,
    Compressed(Compressed),
    /// In a way that is not read.
    Unread(Error),
}

/// A file or directory.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) sections: Vec<Section>,
    pub(super) content: Content,
    /// Bytes, if it is neither a link nor compressed.
    stored: u64,
    date: Time,
    rock: Rock,
}

impl Node {
    /// Makes a file of the first of its records, where its content lies, and what Rock Ridge adds.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is of no kind.
    pub(super) fn new(record: &Record, sections: Vec<Section>, rock: Rock) -> Result<Self> {
        let kind = match rock.posix {
            None if record.is_directory() => Kind::Directory,
            None => Kind::File,
            Some(posix) => kind(posix.mode).ok_or_else(|| Error::damaged(format!("its mode is {:o}", posix.mode)))?,
        };
        let content = match rock.compression.map(Compressed::new) {
            _ if record.is_interleaved() => {
                Content::Unread(Error::unsupported("its content lies between that of others, which is not read"))
            }
            _ if rock.is_sparse => Content::Unread(Error::unsupported("its content is sparse, which is not read")),
            None => Content::Plain,
            Some(Ok(compressed)) => Content::Compressed(compressed),
            Some(Err(error)) => Content::Unread(error),
        };
        let stored = sections.iter().map(|section| section.len).sum();
        Ok(Self { kind, sections, content, stored, date: time::short(record.date()), rock })
    }

    pub(super) fn attributes(&self) -> Attributes {
        let Rock { posix, device, created, modified, accessed, changed, .. } = &self.rock;
        let size = match (self.kind, self.rock.compression) {
            (Kind::Symlink, _) => self.rock.target.bytes.len() as u64,
            (Kind::File, Some(compression)) => compression.size.into(),
            _ => self.stored,
        };
        Attributes {
            kind: self.kind,
            mode: posix.map_or(MODE, |posix| u16::try_from(posix.mode & 0o7777).unwrap_or(MODE)),
            uid: posix.map_or(0, |posix| posix.uid),
            gid: posix.map_or(0, |posix| posix.gid),
            // Also of directories: two would tell programs that there are none below.
            links: posix.map_or(1, |posix| posix.links),
            size,
            allocated: self.stored.next_multiple_of(SECTOR),
            device: if matches!(self.kind, Kind::CharacterDevice | Kind::BlockDevice) { *device } else { (0, 0) },
            accessed: accessed.unwrap_or(self.date),
            modified: modified.unwrap_or(self.date),
            // Some write it as the other.
            changed: changed.or(*created).unwrap_or(self.date),
            created: *created,
        }
    }

    /// Returns the target of a symbolic link.
    pub(super) fn target(&self) -> Result<Vec<u8>> {
        if self.kind != Kind::Symlink {
            return Err(Error::new(ErrorKind::WrongKind, "it is no symbolic link"));
        }
        if self.rock.target.is_unknown {
            return Err(Error::unsupported("its target is the root of the volume or the name of the host"));
        }
        if self.rock.target.bytes.is_empty() {
            return Err(Error::damaged("its target is missing"));
        }
        Ok(self.rock.target.bytes.clone())
    }
}

fn kind(mode: u32) -> Option<Kind> {
    match mode >> 12 & 0xf {
        0o01 => Some(Kind::Fifo),
        0o02 => Some(Kind::CharacterDevice),
        0o04 => Some(Kind::Directory),
        0o06 => Some(Kind::BlockDevice),
        0o10 => Some(Kind::File),
        0o12 => Some(Kind::Symlink),
        0o14 => Some(Kind::Socket),
        _ => None,
    }
}
