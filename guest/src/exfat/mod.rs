//! exFAT.
//!
//! ```text
//! ExFat ─┬─ directory       sets of records
//!        ├─ boot            where everything lies
//!        └─ clusters        chains, by the allocation table, or in a row
//! ```
//!
//! Files have no numbers in exFAT, so the place of a file's first record on the volume is its number, with a bit that says
//! whether the directory it is in has its clusters in a row: the other records may be in the next one. There are no owners and
//! no permissions but "read-only", and no links. Times whose zone is not told are shown as if it had been UTC. A volume that
//! was not unmounted has no journal; it is shown as it stands, as the guest would see it before it repairs anything.

mod boot;
mod directory;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use disk::Disk;

use crate::clusters::{self, Chain, Length, RECORD, Records, Table, Width};
use crate::{Attributes, Entry, Error, ErrorKind, Extents, Facts, GuestFs, Inode, Kind, Result, Xattr};
use boot::Boot;
use directory::Node;

/// The number of the root, which has no record: it would stand in the boot sector.
const ROOT: Inode = Inode(1);

/// Bytes of a directory at most. Source: specification, section 7.4.
const MAX_DIRECTORY: u64 = 256 << 20;

/// Bytes of the records of one file at most, which take three of the smallest clusters.
const MAX_SET: u64 = 19 * RECORD as u64;

/// An exFAT volume.
pub struct ExFat {
    disk: Arc<dyn Disk>,
    boot: Boot,
    table: Table,
    facts: Facts,
    /// The chain that was followed last, which is that of a file that is read in windows.
    followed: RefCell<Option<(Inode, Rc<Chain>)>>,
}

/// Where a file's records stand.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Of the first (bytes).
    at: u64,
    is_in_a_row: bool,
}

impl Place {
    fn of(inode: Inode) -> Option<Self> {
        Some(Self { at: (inode.0 >> 1).checked_mul(RECORD as u64)?, is_in_a_row: inode.0 & 1 == 1 })
    }

    fn number(self) -> Inode {
        Inode(self.at / RECORD as u64 * 2 + u64::from(self.is_in_a_row))
    }
}

impl ExFat {
    /// Opens the volume that a disk is.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if neither of its boot regions is sound, [`ErrorKind::Unsupported`] of a later version,
    /// [`ErrorKind::Disk`].
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let boot = Boot::read(disk.as_ref())?;
        let mut problems = Vec::new();
        if boot.is_backup {
            problems.push("its boot region is damaged, and the backup is used".to_owned());
        }
        if boot.size > disk.size() {
            problems.push(format!(
                "it is of {} bytes on a volume of {}: what lies past the end is not there",
                boot.size,
                disk.size()
            ));
        }
        let facts = Facts {
            kind: "exfat".to_owned(),
            label: String::new(),
            uuid: format!("{:04X}-{:04X}", boot.serial >> 16, boot.serial & 0xffff),
            is_replayed: false,
            problems,
        };
        let table = Table::new(disk.clone(), boot.table, Width::ThirtyTwo, boot.heap);
        let mut volume = Self { disk, boot, table, facts, followed: RefCell::default() };
        // A damaged root is told by whoever lists it.
        match volume.root_chain().and_then(|chain| directory::label(volume.records(&chain))) {
            Ok(label) => volume.facts.label = label.unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Disk => return Err(error),
            Err(_) => {}
        }
        Ok(volume)
    }

    fn root_chain(&self) -> Result<Chain> {
        Chain::follow(&self.table, self.boot.root, self.boot.heap.clusters_of(MAX_DIRECTORY))
    }

    fn records(&self, chain: &Chain) -> Records<'_> {
        Records::of_chain(self.disk.as_ref(), &self.boot.heap, chain)
    }

    /// Returns the file or directory of a number; the root has none.
    fn node(&self, inode: Inode) -> Result<Node> {
        let missing = || Error::new(ErrorKind::NotFound, "there is no file");
        let place = Place::of(inode).ok_or_else(missing)?;
        let heap = &self.boot.heap;
        let mut cluster = heap.cluster_at(place.at).ok_or_else(missing)?;
        let (mut ranges, mut at, mut rest) = (Vec::new(), place.at, MAX_SET);
        loop {
            let end = (heap.place(cluster) + heap.cluster_size()).min(at + rest);
            ranges.push((at, end));
            rest -= end - at;
            let next = match place.is_in_a_row {
                _ if rest == 0 => None,
                true => cluster.checked_add(1).filter(|next| heap.contains(*next)),
                false => Chain::after(&self.table, cluster)?,
            };
            let Some(next) = next else { break };
            (cluster, at) = (next, heap.place(next));
        }
        let mut records = Records::new(self.disk.as_ref(), ranges, None);
        Node::read(&mut records)?.ok_or_else(missing)
    }

    fn chain(&self, node: &Node) -> Result<Chain> {
        let count = self.boot.heap.clusters_of(node.size);
        match node.first {
            None => Ok(Chain::empty()),
            Some(first) if node.is_in_a_row => Ok(Chain::contiguous(&self.boot.heap, first, count)),
            Some(first) => Chain::follow(&self.table, first, count),
        }
    }

    fn file_chain(&self, inode: Inode, node: &Node) -> Result<Rc<Chain>> {
        let mut followed = self.followed.borrow_mut();
        match followed.as_ref() {
            Some((known, chain)) if *known == inode => Ok(chain.clone()),
            _ => {
                *followed = None;
                let chain = Rc::new(self.chain(node)?);
                *followed = Some((inode, chain.clone()));
                Ok(chain)
            }
        }
    }

    fn list(&self, inode: Inode) -> Result<Vec<Entry>> {
        let (chain, is_in_a_row) = if inode == ROOT {
            (self.root_chain()?, false)
        } else {
            let node = self.node(inode)?;
            if !node.is_directory {
                return Err(Error::new(ErrorKind::WrongKind, "it is no directory"));
            }
            if node.size > MAX_DIRECTORY {
                let message = format!("it is of {} bytes where {MAX_DIRECTORY} are the most", node.size);
                return Err(Error::new(ErrorKind::TooMuch, message));
            }
            if node.first == Some(self.boot.root) {
                return Err(Error::damaged("it starts at the first cluster of the root"));
            }
            let (chain, needed) = (self.chain(&node)?, self.boot.heap.clusters_of(node.size));
            if chain.len() < needed && chain.damage().is_none() {
                return Err(Error::damaged(format!("it has {} of {needed} clusters", chain.len())));
            }
            (chain, node.is_in_a_row)
        };
        directory::list(self.records(&chain), |at| Place { at, is_in_a_row }.number())
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        let node = if inode == ROOT { None } else { Some(self.node(inode)?) };
        let Some(node) = node.filter(|node| !node.is_directory) else {
            return Err(Error::new(ErrorKind::WrongKind, "it is no file"));
        };
        if from >= node.size {
            return Ok(Extents { found: Vec::new(), until: from });
        }
        let chain = self.file_chain(inode, &node)?;
        let length = Length { size: node.size, valid: node.valid };
        clusters::extents(&self.boot.heap, &chain, length, from, room)
    }
}

/// Returns an error that says of which file it is.
fn in_file(inode: Inode) -> impl Fn(Error) -> Error {
    move |error| Error::new(error.kind(), format!("the file of number {}: {error}", inode.0))
}

impl GuestFs for ExFat {
    fn root(&self) -> Inode {
        ROOT
    }

    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        self.list(directory).map_err(in_file(directory))
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        let cluster_size = self.boot.heap.cluster_size();
        let known = |kind, mode, size: u64| {
            // Clusters of 32 MiB at most, and 63 bits.
            let allocated = self.boot.heap.clusters_of(size) * cluster_size;
            clusters::attributes(kind, mode, (size, allocated))
        };
        if inode == ROOT {
            // A damaged one is told by whoever lists it.
            let clusters = match self.root_chain() {
                Ok(chain) => chain.len(),
                Err(error) if error.kind() == ErrorKind::Disk => return Err(error),
                Err(_) => 0,
            };
            return Ok(known(Kind::Directory, 0o755, clusters * cluster_size));
        }
        let node = self.node(inode).map_err(in_file(inode))?;
        let read_only = if node.is_read_only { 0o222 } else { 0 };
        let (kind, mode) = if node.is_directory { (Kind::Directory, 0o755) } else { (Kind::File, 0o644) };
        Ok(Attributes {
            accessed: node.accessed,
            modified: node.modified,
            changed: node.modified,
            created: Some(node.created),
            ..known(kind, mode & !read_only, node.size)
        })
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        Err(in_file(inode)(Error::new(ErrorKind::WrongKind, "it is no symbolic link")))
    }

    fn xattrs(&self, _: Inode) -> Result<Vec<Xattr>> {
        Ok(Vec::new())
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        self.extents(inode, from, room).map_err(in_file(inode))
    }
}
