//! FAT12, FAT16 and FAT32.
//!
//! ```text
//! Fat ─┬─ directory ─ name      records, their long and short names
//!      ├─ boot                  where everything lies
//!      └─ clusters              chains, by the allocation table
//! ```
//!
//! Files have no numbers in FAT, so the place of a file's record on the volume is its number. There are no owners and no
//! permissions but "read-only", and no links. Times are those of the guest's clock, in a zone that nothing tells: they are
//! shown as if it had been UTC. A volume that was not unmounted has no journal; it is shown as it stands, as the guest would
//! see it before it repairs anything.

mod boot;
mod directory;
mod name;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use disk::Disk;

use crate::clusters::{self, Chain, DosTime, Length, RECORD, Records, Table};
use crate::{Attributes, Entry, Error, ErrorKind, Extents, Facts, GuestFs, Inode, Kind, Result, Xattr};
use boot::{Boot, Root};
use directory::Node;

/// The number of the root, which has no record: it would stand in the boot sector.
const ROOT: Inode = Inode(1);

/// Bytes of a directory at most; the format has 2 MiB, which no reader checks.
const MAX_DIRECTORY: u64 = 64 << 20;

/// A FAT volume.
pub struct Fat {
    disk: Arc<dyn Disk>,
    boot: Boot,
    table: Table,
    facts: Facts,
    /// The chain that was followed last, which is that of a file that is read in windows.
    followed: RefCell<Option<(Inode, Rc<Chain>)>>,
}

impl Fat {
    /// Opens the volume that a disk is.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if its boot sector is none of FAT, [`ErrorKind::Unsupported`] of a later version,
    /// [`ErrorKind::Disk`].
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let boot = Boot::read(disk.as_ref())?;
        let mut problems = Vec::new();
        if boot.size > disk.size() {
            problems.push(format!(
                "it is of {} bytes on a volume of {}: what lies past the end is not there",
                boot.size,
                disk.size()
            ));
        }
        let (table, copy) = table(&disk, &boot)?;
        if copy > 0 {
            problems.push(format!("allocation table 1 is damaged, and number {} is used", copy + 1));
        }
        let facts = Facts {
            kind: boot.kind().to_owned(),
            label: boot.label.clone(),
            uuid: boot
                .serial
                .map_or_else(String::new, |serial| format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff)),
            is_replayed: false,
            problems,
        };
        let mut fat = Self { disk, boot, table, facts, followed: RefCell::default() };
        // A damaged root is told by whoever lists it.
        match fat.records(ROOT).and_then(directory::label) {
            Ok(Some(label)) => fat.facts.label = label,
            Err(error) if error.kind() == ErrorKind::Disk => return Err(error),
            Ok(None) | Err(_) => {}
        }
        Ok(fat)
    }

    /// Returns the record of a file.
    fn node(&self, inode: Inode) -> Result<Node> {
        let missing = || Error::new(ErrorKind::NotFound, format!("there is no file at record {}", inode.0));
        let place = inode.0.checked_mul(RECORD as u64).ok_or_else(missing)?;
        let is_of_root = matches!(self.boot.root, Root::Fixed(start, end) if (start..end).contains(&place));
        if !is_of_root && self.boot.heap.cluster_at(place).is_none() {
            return Err(missing());
        }
        let mut record = [0; RECORD];
        self.disk.read_at(place, &mut record)?;
        let mut node = Node::parse(&record).ok_or_else(missing)?;
        // The upper half was put to other uses before FAT32.
        if matches!(self.boot.root, Root::Fixed(..)) {
            node.first &= 0xffff;
        }
        Ok(node)
    }

    fn chain(&self, first: u32, most: u64) -> Result<Chain> {
        Chain::follow(&self.table, first, self.boot.heap.clusters_of(most))
    }

    fn records(&self, inode: Inode) -> Result<Records<'_>> {
        let first = match (inode, self.boot.root) {
            (ROOT, Root::Fixed(start, end)) => {
                let ranges = vec![(start, end.min(self.disk.size()))];
                return Ok(Records::new(self.disk.as_ref(), ranges, None));
            }
            (ROOT, Root::Chain(first)) => first,
            (_, root) => {
                let node = self.node(inode)?;
                if !node.is_directory() {
                    return Err(Error::new(ErrorKind::WrongKind, "it is no directory"));
                }
                // As the parent of a directory, 0 is the root; as a directory, neither is any.
                if node.first == 0 || root == Root::Chain(node.first) {
                    return Err(Error::damaged(format!("it starts at cluster {}, which is the root's", node.first)));
                }
                node.first
            }
        };
        let chain = self.chain(first, MAX_DIRECTORY)?;
        Ok(Records::of_chain(self.disk.as_ref(), &self.boot.heap, &chain))
    }

    /// Returns how many bytes a directory takes; 0 if it is damaged, which is told when it is listed.
    fn directory_size(&self, first: u32) -> Result<u64> {
        match self.chain(first, MAX_DIRECTORY) {
            Ok(chain) => Ok(chain.len() * self.boot.heap.cluster_size()),
            Err(error) if error.kind() == ErrorKind::Disk => Err(error),
            Err(_) => Ok(0),
        }
    }

    fn file_chain(&self, inode: Inode, node: &Node) -> Result<Rc<Chain>> {
        let mut followed = self.followed.borrow_mut();
        match followed.as_ref() {
            Some((known, chain)) if *known == inode => Ok(chain.clone()),
            _ => {
                *followed = None;
                let chain = Rc::new(self.chain(node.first, node.size.into())?);
                *followed = Some((inode, chain.clone()));
                Ok(chain)
            }
        }
    }
}

/// Returns the first copy of the table that starts as tables do, and its number; the first one if none does.
fn table(disk: &Arc<dyn Disk>, boot: &Boot) -> Result<(Table, usize)> {
    let copy = |start| Table::new(disk.clone(), start, boot.width, boot.heap);
    let first_entry = (boot.width.mask() & !0xff) | u32::from(boot.media);
    for (number, start) in boot.tables.iter().enumerate() {
        let table = copy(*start);
        if table.entry(0)? == first_entry {
            return Ok((table, number));
        }
    }
    Ok((copy(boot.tables[0]), 0))
}

/// Returns an error that says of which file it is.
fn in_file(inode: Inode) -> impl Fn(Error) -> Error {
    move |error| Error::new(error.kind(), format!("the file at record {}: {error}", inode.0))
}

impl GuestFs for Fat {
    fn root(&self) -> Inode {
        ROOT
    }

    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        self.records(directory).and_then(directory::list).map_err(in_file(directory))
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        if inode == ROOT {
            let size = match self.boot.root {
                Root::Fixed(start, end) => end - start,
                Root::Chain(first) => self.directory_size(first)?,
            };
            return Ok(clusters::attributes(Kind::Directory, 0o755, (size, size)));
        }
        let node = self.node(inode)?;
        let read_only = if node.is_read_only() { 0o222 } else { 0 };
        let known = if node.is_directory() {
            let size = self.directory_size(node.first)?;
            clusters::attributes(Kind::Directory, 0o755 & !read_only, (size, size))
        } else {
            let size = u64::from(node.size);
            let taken = self.boot.heap.clusters_of(size) * self.boot.heap.cluster_size();
            clusters::attributes(Kind::File, 0o644 & !read_only, (size, taken))
        };
        let modified = node.modified.as_utc();
        Ok(Attributes {
            accessed: node.accessed.as_utc(),
            modified,
            changed: modified,
            created: (node.created != DosTime::default()).then(|| node.created.as_utc()),
            ..known
        })
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        Err(Error::new(ErrorKind::WrongKind, format!("the file at record {} is no symbolic link", inode.0)))
    }

    fn xattrs(&self, _: Inode) -> Result<Vec<Xattr>> {
        Ok(Vec::new())
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        let node = if inode == ROOT { None } else { Some(self.node(inode)?) };
        let Some(node) = node.filter(|node| !node.is_directory()) else {
            return Err(Error::new(ErrorKind::WrongKind, format!("what is at record {} is no file", inode.0)));
        };
        let size = u64::from(node.size);
        if from >= size {
            return Ok(Extents { found: Vec::new(), until: from });
        }
        let chain = self.file_chain(inode, &node).map_err(in_file(inode))?;
        let length = Length { size, valid: size };
        clusters::extents(&self.boot.heap, &chain, length, from, room).map_err(in_file(inode))
    }
}
