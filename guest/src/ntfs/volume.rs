//! The volume: its clusters, the table of files, and the attributes of a file wherever they are.
//!
//! ```text
//! record 0 ─ $DATA ─ runs ──▶ the table of files ─▶ record n ┬ attributes
//!                                                            └ a list: type, name, first cluster, which record ─▶ more of them
//! ```

use std::sync::Arc;

use disk::Disk;

use super::boot::{self, Boot};
use super::record::{self, ATTRIBUTE_LIST, Attribute, DATA, Form, Record, Reference};
use super::runs::Run;
use super::stream::{Stream, read_runs};
use crate::utf16;
use crate::{Error, ErrorKind, Fields, Inode, Result};

/// The root directory; numbers below the first of users are of the filesystem's own files.
pub(super) const ROOT: u64 = 5;
pub(super) const FIRST_USER: u64 = 16;

/// Bytes of a list of attributes at most; Windows makes none larger.
const MAX_LIST: u64 = 256 << 10;

/// A file: its record, and where its attributes are that have no room there.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) record: Record,
    /// All attributes, also those of its own record; none where all are in that.
    list: Option<Vec<Listed>>,
}

impl Node {
    pub(super) fn number(&self) -> u64 {
        self.record.number
    }
}

/// Where an attribute is, or a part of one.
#[derive(Debug, Clone)]
pub(super) struct Listed {
    kind: u32,
    name: Vec<u16>,
    /// Its first cluster.
    pub(super) first: u64,
    record: Reference,
    instance: u16,
}

/// A volume of which records can be read.
pub(super) struct Volume {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) boot: Boot,
    /// Clusters that there are: fewer than the boot sector says on a disk that was cut off.
    pub(super) clusters: u64,
    /// Where the table of files lies, and how many bytes of it were written.
    table: Vec<Run>,
    table_len: u64,
}

impl Volume {
    /// Opens the volume that a disk is.
    pub(super) fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let boot = Boot::parse(&crate::read::read_within(disk.as_ref(), 0, boot::SIZE)?)?;
        let clusters = boot.clusters.min(disk.size() / boot.cluster_size);
        let (start, len) = (boot.table, boot.record_size.div_ceil(boot.cluster_size));
        if clusters < len || start > clusters - len {
            return Err(Error::damaged(format!(
                "the table of files starts in cluster {start}, which is not within the {clusters} of the volume"
            )));
        }
        let mut volume = Self {
            disk,
            boot,
            clusters,
            table: vec![Run { start: 0, len, at: Some(start) }],
            table_len: boot.record_size,
        };
        volume.open_table()?;
        Ok(volume)
    }

    /// Reads where the table of files lies, of which up to now only the first record is known.
    fn open_table(&mut self) -> Result<()> {
        let node = self.own_node(0)?;
        let stream = self.stream(&node, DATA, &[])?.ok_or_else(|| Error::damaged("the table of files has no data"))?;
        let Form::NonResident(head) = &stream.head.form else {
            return Err(Error::damaged("the table of files lies within itself"));
        };
        self.table_len = head.size.min(head.initialized);
        self.table = head.runs(self.clusters)?;
        // Each part says where the record of a later one lies.
        for part in &stream.rest {
            let more = self.part(&node, part)?;
            self.table.extend(more);
        }
        Ok(())
    }

    /// Returns how many records the table of files has.
    pub(super) fn records(&self) -> u64 {
        self.table_len / self.boot.record_size
    }

    /// Returns a record that is in use.
    pub(super) fn record(&self, number: u64) -> Result<Record> {
        if number >= self.records() {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no record {number}")));
        }
        let mut bytes = vec![0; usize::try_from(self.boot.record_size).expect("4 KiB at most")];
        read_runs(self, &self.table, number * self.boot.record_size, &mut bytes)
            .map_err(|error| record::of_record(number, &error))?;
        Record::parse(number, bytes)
    }

    /// Returns a file that a name can lead to.
    pub(super) fn node(&self, inode: Inode) -> Result<Node> {
        let missing = || Error::new(ErrorKind::NotFound, format!("no file has the number {}", inode.0));
        if inode.0 < FIRST_USER && inode.0 != ROOT {
            return Err(missing());
        }
        let node = self.own_node(inode.0)?;
        if node.record.base().is_some() {
            return Err(missing());
        }
        Ok(node)
    }

    /// Returns a file, even one of the filesystem itself.
    pub(super) fn own_node(&self, number: u64) -> Result<Node> {
        let mut node = Node { record: self.record(number)?, list: None };
        let list = node.record.attributes(|kind, _, _| kind == ATTRIBUTE_LIST)?;
        if let Some(head) = list.into_iter().next() {
            let bytes = Stream { head, rest: Vec::new() }
                .read(self, &node, MAX_LIST)
                .map_err(|error| record::of_record(number, &error))?;
            node.list = Some(listed(&bytes).map_err(|error| record::of_record(number, &error))?);
        }
        Ok(node)
    }

    /// Returns the attributes of a type for whose name `is_wanted` returns true, in the order of the volume.
    pub(super) fn streams(&self, node: &Node, kind: u32, is_wanted: impl Fn(&[u16]) -> bool) -> Result<Vec<Stream>> {
        let Some(list) = &node.list else {
            let heads = node.record.attributes(|of, name, _| of == kind && is_wanted(name))?;
            return Ok(heads.into_iter().map(|head| Stream { head, rest: Vec::new() }).collect());
        };
        let mut streams: Vec<Stream> = Vec::new();
        let mut last = None;
        for listed in list.iter().filter(|listed| listed.kind == kind && is_wanted(&listed.name)) {
            if listed.first == 0 {
                let head = self.listed(node, listed, &mut last)?;
                streams.push(Stream { head, rest: Vec::new() });
                continue;
            }
            match streams.last_mut() {
                Some(stream)
                    if stream.head.name == listed.name
                        && stream.rest.last().is_none_or(|before| before.first < listed.first) =>
                {
                    stream.rest.push(listed.clone());
                }
                _ => {
                    let number = node.number();
                    return Err(Error::damaged(format!("record {number}: an attribute is listed without its start")));
                }
            }
        }
        Ok(streams)
    }

    /// Returns the attribute of a type and a name.
    pub(super) fn stream(&self, node: &Node, kind: u32, name: &[u16]) -> Result<Option<Stream>> {
        Ok(self.streams(node, kind, |other| other == name)?.into_iter().next())
    }

    /// Returns the runs of a part of an attribute that is not its first.
    pub(super) fn part(&self, node: &Node, listed: &Listed) -> Result<Vec<Run>> {
        match self.listed(node, listed, &mut None)?.form {
            Form::NonResident(part) if part.first == listed.first => {
                part.runs(self.clusters).map_err(|error| record::of_record(node.number(), &error))
            }
            _ => Err(Error::damaged(format!("record {}: a part of an attribute is another one", node.number()))),
        }
    }

    /// Returns what a list leads to; `last` is the record that the one before was in.
    fn listed(&self, node: &Node, listed: &Listed, last: &mut Option<Record>) -> Result<Attribute> {
        let (base, number) = (node.record.reference(), listed.record.number);
        let record = if number == base.number {
            &node.record
        } else {
            if last.as_ref().is_none_or(|last| last.number != number) {
                *last = Some(self.record(number)?);
            }
            last.as_ref().expect("it was just read")
        };
        if record.reference() != listed.record || number != base.number && record.base() != Some(base) {
            return Err(Error::damaged(format!("record {number} holds nothing of record {}", base.number)));
        }
        let is_it = |kind, name: &[u16], instance| {
            kind == listed.kind && instance == listed.instance && name == listed.name.as_slice()
        };
        let found = record.attributes(is_it)?.into_iter().next();
        found.ok_or_else(|| {
            let kind = listed.kind;
            Error::damaged(format!(
                "record {number} has no attribute of type {kind:#x} that record {} lists",
                base.number
            ))
        })
    }
}

/// Parses a list of attributes.
fn listed(bytes: &[u8]) -> Result<Vec<Listed>> {
    let mut list = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let fields = Fields(rest);
        let entry = || {
            let len = usize::from(fields.le16(4)?);
            let name = fields.bytes(usize::from(fields.u8(7)?), usize::from(fields.u8(6)?) * 2)?;
            let listed = Listed {
                kind: fields.le32(0)?,
                name: utf16::units(name).collect(),
                first: fields.le64(8)?,
                record: fields.le64(0x10)?.into(),
                instance: fields.le16(0x18)?,
            };
            (len >= 0x1a && len <= rest.len()).then_some((len, listed))
        };
        let (len, listed) = entry().ok_or_else(|| Error::damaged("an entry of the list of attributes does not fit"))?;
        list.push(listed);
        rest = &rest[len..];
    }
    Ok(list)
}
