//! What a checkpoint says: which attributes are open, which pages are not written yet, which transactions are not over.
//!
//! ```text
//! restart page ─▶ restart record ─┬▶ open attributes
//!                                 └▶ dirty pages
//! ```
//!
//! A table has entries of one size, which others mean by their place in it in bytes.
//! Source: "$LogFile" of the Linux-NTFS documentation; journals that Windows wrote.

use std::collections::BTreeMap;

use super::super::record::Reference;
use super::change::{Change, Operation};
use super::journal::Journal;
use crate::{Error, ErrorKind, Fields, Result};

/// Bytes of a table before its entries.
const HEADER: usize = 0x18;

/// What an entry starts with that is in use.
const IN_USE: u32 = u32::MAX;

/// Clusters of a page at most: 4 KiB in clusters of 512 bytes, and four times as much.
const MAX_CLUSTERS: usize = 32;

/// Entries of a table at most; more is an error.
const MAX_ENTRIES: usize = 1 << 20;

/// An attribute of a file, not resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpenAttribute {
    pub(super) kind: u32,
    /// Number of the record of the file.
    pub(super) file: u64,
    /// Bytes of a block, if it is an index.
    pub(super) block_size: usize,
}

impl OpenAttribute {
    /// Parses what is said of an attribute that is opened.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let fields = Fields(bytes);
        Some(Self {
            kind: fields.le32(8)?,
            file: Reference::from(fields.le64(0x10)?).number,
            block_size: usize::try_from(fields.le32(4)?).ok()?,
        })
    }
}

/// Clusters that are written together.
#[derive(Debug, Clone)]
pub(super) struct DirtyPage {
    /// The first change that may not be on the volume.
    pub(super) oldest: u64,
    /// Where each cluster lies; 0 of those that nothing was about.
    pub(super) lcns: Vec<u64>,
}

impl DirtyPage {
    /// Parses an entry: of which attribute, from which cluster on, and the page.
    fn parse(bytes: &[u8]) -> Option<((u32, u64), Self)> {
        let fields = Fields(bytes);
        let count = usize::try_from(fields.le32(0x0c)?).ok().filter(|count| (1..=MAX_CLUSTERS).contains(count))?;
        let lcns = (0..count).map(|index| fields.le64(0x20 + index * 8)).collect::<Option<_>>()?;
        Some(((fields.le32(4)?, fields.le64(0x10)?), Self { oldest: fields.le64(0x18)?, lcns }))
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Transaction {
    pub(super) first: u64,
    pub(super) undo_next: u64,
}

/// The tables of a checkpoint.
#[derive(Debug)]
pub(super) struct Tables {
    /// The last record before the checkpoint was begun.
    pub(super) start: u64,
    pub(super) attributes: BTreeMap<u16, OpenAttribute>,
    /// By the attribute and the first cluster.
    pub(super) pages: BTreeMap<(u32, u64), DirtyPage>,
    pub(super) transactions: BTreeMap<u32, Transaction>,
    /// Clusters of a page.
    pub(super) page_clusters: u64,
}

impl Tables {
    /// Reads the tables that a restart record leads to.
    pub(super) fn read(journal: &Journal, lsn: u64, cluster_size: u64) -> Result<Self> {
        let record = journal.record(lsn)?;
        let fields = Fields(&record.data);
        let damaged = || Error::damaged("the start of a checkpoint does not fit");
        let version = fields.le32(0).filter(|_| record.is_restart).ok_or_else(damaged)?;
        // Of version 0, entries have another form.
        if version != 1 {
            return Err(Error::unsupported(format!("the checkpoint is of version {version}")));
        }
        let start = match fields.le64(8).ok_or_else(damaged)? {
            0 => lsn,
            start => start,
        };
        let table = |lsn_at, len_at| {
            let lsn = fields.le64(lsn_at).ok_or_else(damaged)?;
            let len = fields.le32(len_at).and_then(|len| usize::try_from(len).ok()).ok_or_else(damaged)?;
            if len == 0 {
                return Ok(Vec::new());
            }
            let change = Change::parse(&journal.record(lsn)?)?;
            match change.redo_data.get(..len) {
                Some(bytes) if change.redo == Operation::Dump => entries(bytes),
                _ => Err(damaged()),
            }
        };
        let mut tables = Self {
            start,
            attributes: BTreeMap::new(),
            pages: BTreeMap::new(),
            transactions: BTreeMap::new(),
            page_clusters: (4096 / cluster_size).max(1),
        };
        for (at, bytes) in table(0x10, 0x30)? {
            let at = u16::try_from(at).map_err(|_| damaged())?;
            let attribute = OpenAttribute::parse(&bytes).ok_or_else(damaged)?;
            tables.attributes.insert(at, attribute);
        }
        for (_, bytes) in table(0x20, 0x38)? {
            let (key, page) = DirtyPage::parse(&bytes).ok_or_else(damaged)?;
            // Where a cluster is larger than a page, there are several of one.
            let known = tables.pages.entry(key).or_insert_with(|| page.clone());
            known.oldest = known.oldest.min(page.oldest);
        }
        if fields.le32(0x3c) != Some(0) {
            return Err(Error::unsupported("the checkpoint was made while transactions were not over"));
        }
        Ok(tables)
    }

    /// Returns the page in which a cluster of an attribute lies, and which of the page it is.
    pub(super) fn page_mut(&mut self, attribute: u16, vcn: u64) -> Option<(&mut DirtyPage, usize)> {
        let attribute = u32::from(attribute);
        let (&(_, first), page) = self.pages.range_mut((attribute, 0)..=(attribute, vcn)).next_back()?;
        let index = usize::try_from(vcn - first).ok().filter(|index| *index < page.lcns.len())?;
        Some((page, index))
    }

    /// Lets the page that a change is about be a dirty one.
    pub(super) fn touch(&mut self, change: &Change) -> Result<()> {
        if self.page_mut(change.attribute, change.vcn).is_none() {
            let first = change.vcn - change.vcn % self.page_clusters;
            let count = usize::try_from(self.page_clusters).expect("a few");
            let page = DirtyPage { oldest: change.lsn, lcns: vec![0; count] };
            if self.pages.len() >= MAX_ENTRIES {
                return Err(Error::new(ErrorKind::TooMuch, "the journal is about more pages than are kept in memory"));
            }
            self.pages.insert((u32::from(change.attribute), first), page);
        }
        let (page, index) = self.page_mut(change.attribute, change.vcn).expect("it was just put there");
        let places = index.checked_add(change.lcns.len()).and_then(|end| page.lcns.get_mut(index..end));
        let places = places.ok_or_else(|| {
            Error::unsupported(format!("record {:#x} of the journal is about more than a page", change.lsn))
        })?;
        places.copy_from_slice(&change.lcns);
        Ok(())
    }
}

/// Returns the entries of a table that are in use, and where they are.
fn entries(table: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
    let fields = Fields(table);
    let damaged = || Error::damaged("a table of the checkpoint does not fit");
    let size = usize::from(fields.le16(0).ok_or_else(damaged)?);
    let count = usize::from(fields.le16(2).ok_or_else(damaged)?);
    if size < 4 || HEADER + size * count > table.len() {
        return Err(damaged());
    }
    let entries = table[HEADER..].chunks_exact(size).take(count).enumerate();
    let used = entries.filter(|(_, bytes)| Fields(bytes).le32(0) == Some(IN_USE));
    Ok(used.map(|(index, bytes)| (HEADER + index * size, bytes.to_vec())).collect())
}
