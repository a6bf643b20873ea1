//! ISO 9660, with Rock Ridge or Joliet.
//!
//! ```text
//! Iso ─┬─ descriptor     which trees of names there are
//!      ├─ record         what stands in a directory
//!      ├─ name           names of Joliet and of ISO 9660 itself
//!      ├─ rock           what Rock Ridge adds: names, owners, links ...
//!      ├─ node           a file, of all that
//!      └─ zisofs         content that is compressed
//! ```
//!
//! The tree that is shown is the one that Linux shows: that of Rock Ridge, or else of Joliet, or else the plain one. A file's number
//! is the place of its first record on the volume, of a directory that of the record of itself with which it starts. Names that
//! share their content are files of their own, as in Linux. Not read are interleaved files, which nobody writes on disks, sparse ones
//! of Rock Ridge, and zisofs of version 2.

mod descriptor;
mod name;
mod node;
mod record;
mod rock;
mod time;
mod zisofs;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use disk::Disk;

use crate::read::read_within;
use crate::{Attributes, Entry, Error, ErrorKind, Extent, Extents, Facts, GuestFs, Inode, Kind, Result, Source, Xattr};
use descriptor::{Descriptors, Tree};
use node::{Content, Node, Section};
use record::{MAX_RECORD, Record, Records};
use rock::Rock;

/// Bytes of a directory at most.
const MAX_DIRECTORY: u32 = 128 << 20;

/// Names of one directory at most.
const MAX_ENTRIES: usize = 1_000_000;

/// Areas in which fields of Rock Ridge go on that are read for one listing at most.
const MAX_AREAS: usize = 1_000_000;

/// Records of one file at most: as many as 8 TiB take, the largest volume.
const MAX_SECTIONS: usize = 2048;

/// An ISO 9660 volume.
pub struct Iso {
    disk: Arc<dyn Disk>,
    block_size: u64,
    /// The place of the root's record.
    root: u64,
    names: Names,
    facts: Facts,
    /// The file that was looked at last.
    last: RefCell<Option<(Inode, Rc<Node>)>>,
}

/// Whose names and attributes are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    /// Those of Rock Ridge, whose fields start after `skip` bytes, and in the record of the root after `first`.
    RockRidge { skip: usize, first: usize },
    /// Those of Joliet, and no attributes.
    Joliet,
    /// Those of ISO 9660 itself.
    Plain,
}

impl Iso {
    /// Opens the volume that a disk is.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is none, [`ErrorKind::Unsupported`] for blocks of other sizes, [`ErrorKind::Disk`].
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let Descriptors { primary, joliet, has_udf } = Descriptors::read(disk.as_ref())?;
        let plain = primary.as_ref().map(|tree| Self::of(disk.clone(), tree, Names::Plain));
        let rock_ridge = match &plain {
            Some(plain) => plain.rock_ridge(joliet.is_some())?,
            None => None,
        };
        let mut volume = match (plain, rock_ridge, joliet) {
            (Some(plain), Some(names), _) => Self { names, ..plain },
            (_, _, Some(tree)) => Self::of(disk, &tree, Names::Joliet),
            (Some(plain), None, None) => plain,
            (None, _, None) => return Err(Error::damaged("it has no descriptor of a volume")),
        };
        if has_udf {
            let problem = "it is of UDF at the same time, which is not read: files that only that has are missing";
            volume.facts.problems.push(problem.to_owned());
        }
        if volume.attributes(volume.root())?.kind != Kind::Directory {
            return Err(Error::damaged("its root is no directory"));
        }
        Ok(volume)
    }

    fn of(disk: Arc<dyn Disk>, tree: &Tree, names: Names) -> Self {
        let mut problems = Vec::new();
        if tree.size > disk.size() {
            let (size, there) = (tree.size, disk.size());
            problems.push(format!("it is of {size} bytes on a volume of {there}: what lies past the end is not there"));
        }
        let (label, uuid) = (tree.label.clone(), tree.uuid.clone());
        let facts = Facts { kind: "iso9660".to_owned(), label, uuid, is_replayed: false, problems };
        let (block_size, root) = (tree.block_size, tree.root * tree.block_size);
        Self { disk, block_size, root, names, facts, last: RefCell::default() }
    }

    /// Returns where the fields of Rock Ridge start, if its names are to be shown of a plain volume.
    ///
    /// Where there is Joliet, too, that is so only if a field says who extends it, and unless the plain tree is empty: there are
    /// volumes whose files are in the other one only.
    fn rock_ridge(&self, has_joliet: bool) -> Result<Option<Names>> {
        let bytes = read_within(self.disk.as_ref(), self.root, MAX_RECORD)?;
        let Some(root) = Record::parse(&bytes) else { return Ok(None) };
        let Some((skip, first)) = rock::begin(root.system_use()) else { return Ok(None) };
        let names = Names::RockRidge { skip, first };
        if has_joliet {
            let named = Rock::read(self.disk.as_ref(), self.block_size, &root.system_use()[first..])?.is_named;
            let content = self.directory(&root)?;
            if !named || Records::new(&content).take(3).count() < 3 {
                return Ok(None);
            }
        }
        Ok(Some(names))
    }

    /// Returns what Rock Ridge adds to the record at a place: nothing, if its names are not shown.
    fn rock(&self, place: u64, record: &Record) -> Result<Rock> {
        let Names::RockRidge { skip, first } = self.names else { return Ok(Rock::default()) };
        let skip = if place == self.root { first } else { skip };
        Rock::read(self.disk.as_ref(), self.block_size, record.system_use().get(skip..).unwrap_or_default())
    }

    /// Returns all bytes of a directory.
    fn directory(&self, record: &Record) -> Result<Vec<u8>> {
        if record.is_continued() {
            return Err(Error::unsupported("it is a directory in several sections"));
        }
        let len = record.size();
        if len > MAX_DIRECTORY {
            let message = format!("it takes {len} bytes where {MAX_DIRECTORY} are the most");
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        let len = usize::try_from(len).unwrap_or_default();
        let bytes = read_within(self.disk.as_ref(), record.block() * self.block_size, len)?;
        if bytes.len() < len {
            return Err(Error::damaged(format!("{} of its {len} bytes are past the end", len - bytes.len())));
        }
        Ok(bytes)
    }

    fn node(&self, inode: Inode) -> Result<Rc<Node>> {
        if let Some((last, node)) = &*self.last.borrow()
            && *last == inode
        {
            return Ok(node.clone());
        }
        let bytes = read_within(self.disk.as_ref(), inode.0, MAX_RECORD)?;
        let record = Record::parse(&bytes).ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no file"))?;
        let sections = self.sections(inode.0, &record)?;
        let node = Rc::new(Node::new(&record, sections, self.rock(inode.0, &record)?)?);
        *self.last.borrow_mut() = Some((inode, node.clone()));
        Ok(node)
    }

    /// Returns where the content of a file lies of which this is the first record.
    fn sections(&self, place: u64, first: &Record) -> Result<Vec<Section>> {
        let section = |record: &Record| Section { place: record.block() * self.block_size, len: record.size().into() };
        let mut sections = vec![section(first)];
        let mut is_continued = first.is_continued();
        let mut at = place + first.len() as u64;
        // A sector is of four blocks at most, all of which may be zeroes behind the last record.
        let mut zeroes = 0;
        while is_continued {
            let bytes = read_within(self.disk.as_ref(), at, MAX_RECORD)?;
            if bytes.first() == Some(&0) && zeroes < 4 {
                zeroes += 1;
                at = (at + 1).next_multiple_of(self.block_size);
                continue;
            }
            let next = Record::parse(&bytes)
                .ok_or_else(|| Error::damaged(format!("record {} of it is missing", sections.len() + 1)))?;
            if sections.len() == MAX_SECTIONS {
                return Err(Error::new(ErrorKind::TooMuch, format!("it has more than {MAX_SECTIONS} records")));
            }
            sections.push(section(&next));
            is_continued = next.is_continued();
            at += next.len() as u64;
            zeroes = 0;
        }
        Ok(sections)
    }

    fn list(&self, inode: Inode) -> Result<Vec<Entry>> {
        if self.node(inode)?.kind != Kind::Directory {
            return Err(Error::new(ErrorKind::WrongKind, "it is no directory"));
        }
        let bytes = read_within(self.disk.as_ref(), inode.0, MAX_RECORD)?;
        let record = Record::parse(&bytes).ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no file"))?;
        let (start, content) = (record.block() * self.block_size, self.directory(&record)?);
        let mut found = Vec::new();
        // The place of the first record of a file whose last is not met yet.
        let mut continued = None;
        let mut areas = 0;
        for record in Records::new(&content) {
            let (at, record) = record?;
            let place = continued.unwrap_or(start + at as u64);
            continued = record.is_continued().then_some(place);
            if record.is_continued() || record.is_dots() || record.is_associated() {
                continue;
            }
            let rock = self.rock(place, &record)?;
            areas += rock.areas;
            if areas > MAX_AREAS {
                let message = format!("the fields of its names go on in more than {MAX_AREAS} areas");
                return Err(Error::new(ErrorKind::TooMuch, message));
            }
            let child = rock.child;
            let Some(name) = self.name(&record, rock) else { continue };
            let inode = match child {
                Some(block) => Inode(u64::from(block) * self.block_size),
                None if record.is_directory() => Inode(record.block() * self.block_size),
                None => Inode(place),
            };
            if found.len() == MAX_ENTRIES {
                return Err(Error::new(ErrorKind::TooMuch, format!("it holds more than {MAX_ENTRIES} names")));
            }
            found.push(Entry { name, inode });
        }
        if continued.is_some() {
            return Err(Error::damaged("the last record of a file in it is missing"));
        }
        Ok(found)
    }

    /// Returns the name of a record; `None` of what has no name here.
    fn name(&self, record: &Record, rock: Rock) -> Option<Vec<u8>> {
        let name = match self.names {
            Names::RockRidge { .. } if rock.is_relocated => return None,
            Names::RockRidge { .. } => rock.name.unwrap_or_else(|| name::plain(record.name())),
            Names::Joliet => name::joliet(record.name()),
            Names::Plain => name::plain(record.name()),
        };
        // By some names nothing can be reached, as what is `...` in Joliet.
        Some(name).filter(|name| !matches!(name[..], [] | [b'.'] | [b'.', b'.']))
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        let node = self.node(inode)?;
        if node.kind != Kind::File {
            return Err(Error::new(ErrorKind::WrongKind, "it is no file"));
        }
        match &node.content {
            Content::Unread(error) => Err(error.clone()),
            Content::Compressed(compressed) => {
                let size = compressed.size();
                let whole = Extent { start: 0, len: size, source: Source::Encoded };
                Ok(Extents { found: (from < size).then_some(whole).into_iter().collect(), until: size.max(from) })
            }
            Content::Plain => self.plain_extents(&node, from, room),
        }
    }

    fn plain_extents(&self, node: &Node, from: u64, room: usize) -> Result<Extents> {
        let (mut found, mut until) = (Vec::new(), from);
        let mut end = 0;
        for Section { place, len } in &node.sections {
            let start = end;
            end += len;
            if end <= from || *len == 0 {
                continue;
            }
            let there = self.disk.size().saturating_sub(*place).min(*len);
            if start + there > from.max(start) {
                found.push(Extent { start, len: there, source: Source::Member(0, *place) });
                until = start + there;
            } else if found.is_empty() {
                return Err(Error::damaged(format!(
                    "{len} bytes of it at {place} are not on the volume, or not all of them"
                )));
            }
            if there < *len || found.len() >= room {
                break;
            }
        }
        Ok(Extents { found, until })
    }

    /// Fills a buffer with bytes from `offset` on of what is stored of a file.
    fn read_stored(&self, node: &Node, offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        let mut at = offset;
        while !buffer.is_empty() {
            let extents = self.plain_extents(node, at, 1)?;
            let [Extent { start, len, source: Source::Member(_, place) }] = extents.found[..] else {
                return Err(Error::damaged(format!("{at} is past the end of what is stored of it")));
            };
            let there = usize::try_from(start + len - at).unwrap_or(usize::MAX).min(buffer.len());
            let (now, later) = buffer.split_at_mut(there);
            self.disk.read_at(place + (at - start), now)?;
            at += there as u64;
            buffer = later;
        }
        Ok(())
    }
}

/// Returns an error that says of which file it is.
fn in_file(inode: Inode) -> impl Fn(Error) -> Error {
    move |error| Error::new(error.kind(), format!("the file of number {}: {error}", inode.0))
}

impl GuestFs for Iso {
    fn root(&self) -> Inode {
        Inode(self.root)
    }

    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        self.list(directory).map_err(in_file(directory))
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        Ok(self.node(inode).map_err(in_file(inode))?.attributes())
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        self.node(inode).and_then(|node| node.target()).map_err(in_file(inode))
    }

    fn xattrs(&self, _: Inode) -> Result<Vec<Xattr>> {
        Ok(Vec::new())
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        self.extents(inode, from, room).map_err(in_file(inode))
    }

    fn decode(&self, inode: Inode, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let node = self.node(inode).map_err(in_file(inode))?;
        let Content::Compressed(compressed) = &node.content else {
            return Err(in_file(inode)(Error::new(ErrorKind::WrongKind, "its content is not encoded")));
        };
        let read = |at, part: &mut [u8]| self.read_stored(&node, at, part);
        compressed.decode(offset, buffer, read).map_err(in_file(inode))
    }
}
