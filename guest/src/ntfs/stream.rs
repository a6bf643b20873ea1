//! The value of an attribute, all parts of it: a few bytes in a record, or runs of clusters.

use super::content;
use super::record::{Attribute, Form};
use super::runs::Run;
use super::volume::{Listed, Node, Volume};
use crate::{Error, ErrorKind, Result};

/// Runs of one value that are in memory at most, some 40 bytes each.
const MAX_RUNS: usize = 1_000_000;

/// A value, which may be in parts.
pub(super) struct Stream {
    pub(super) head: Attribute,
    /// The further parts, in ascending order.
    pub(super) rest: Vec<Listed>,
}

/// Runs that follow each other.
pub(super) struct Runs {
    pub(super) found: Vec<Run>,
    /// Cluster of the value up to which they reach.
    pub(super) until: u64,
}

impl Stream {
    /// Returns the size in bytes.
    pub(super) fn size(&self) -> Result<u64> {
        let size = match &self.head.form {
            Form::Resident(bytes) => bytes.len() as u64,
            Form::NonResident(head) => head.size,
        };
        if i64::try_from(size).is_err() {
            return Err(Error::damaged(format!("an attribute says that it is of {size} bytes")));
        }
        Ok(size)
    }

    /// Returns the bytes that it takes.
    pub(super) fn allocated(&self) -> u64 {
        match &self.head.form {
            Form::Resident(bytes) => bytes.len().next_multiple_of(8) as u64,
            Form::NonResident(head) => head.allocated,
        }
    }

    /// Returns where the clusters of a value that is not resident lie, from the one that holds `from` on: `room` runs at
    /// least, or all.
    pub(super) fn runs(&self, volume: &Volume, node: &Node, from: u64, room: usize) -> Result<Runs> {
        let damaged = |what: &str| Error::damaged(format!("record {}: {what}", node.number()));
        let Form::NonResident(head) = &self.head.form else {
            return Err(damaged("an attribute lies in the record where it cannot"));
        };
        let mut next = self.rest.partition_point(|part| part.first <= from);
        let mut found = Vec::new();
        loop {
            let (first, runs) = match next.checked_sub(1).map(|part| &self.rest[part]) {
                None => {
                    (0, head.runs(volume.clusters).map_err(|error| super::record::of_record(node.number(), &error))?)
                }
                Some(part) => (part.first, volume.part(node, part)?),
            };
            let until = runs.last().map_or(first, Run::end);
            found.extend(runs.into_iter().filter(|run| run.end() > from));
            match self.rest.get(next) {
                Some(part) if part.first != until => return Err(damaged("a part of an attribute is missing")),
                None if until.saturating_mul(volume.boot.cluster_size) < head.size => {
                    return Err(damaged("nothing says where the end of an attribute lies"));
                }
                Some(_) if found.len() < room => next += 1,
                _ => return Ok(Runs { found, until }),
            }
        }
    }

    /// Returns where all clusters of a value lie that is not resident.
    pub(super) fn all_runs(&self, volume: &Volume, node: &Node) -> Result<Vec<Run>> {
        let runs = self.runs(volume, node, 0, MAX_RUNS)?;
        if runs.found.len() > MAX_RUNS {
            let message = format!("record {}: an attribute is in more than {MAX_RUNS} pieces", node.number());
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        Ok(runs.found)
    }

    /// Returns all bytes of a small value.
    ///
    /// # Errors
    /// [`ErrorKind::TooMuch`] if there are more than `most`.
    pub(super) fn read(&self, volume: &Volume, node: &Node, most: u64) -> Result<Vec<u8>> {
        let size = self.size()?;
        let len = usize::try_from(size).ok().filter(|_| size <= most).ok_or_else(|| {
            let message = format!("record {}: an attribute of {size} bytes where {most} are the most", node.number());
            Error::new(ErrorKind::TooMuch, message)
        })?;
        let mut bytes = vec![0; len];
        content::read(volume, node, self, 0, &mut bytes)?;
        Ok(bytes)
    }
}

/// Fills a buffer with what lies `offset` bytes after the start of the value that runs are of, all of which they map.
pub(super) fn read_runs(volume: &Volume, runs: &[Run], offset: u64, buffer: &mut [u8]) -> Result<()> {
    let cluster_size = volume.boot.cluster_size;
    let mut index = runs.partition_point(|run| run.end() <= offset / cluster_size);
    let (mut offset, mut rest) = (offset, buffer);
    while !rest.is_empty() {
        let run = runs.get(index).filter(|run| run.start <= offset / cluster_size);
        let run =
            run.ok_or_else(|| Error::damaged(format!("nothing is {offset} bytes after the start of an attribute")))?;
        let within = offset - run.start * cluster_size;
        let there = (run.len * cluster_size - within).min(rest.len() as u64);
        let (here, after) = rest.split_at_mut(usize::try_from(there).expect("at most the buffer"));
        match run.at {
            Some(at) => volume.disk.read_at(at * cluster_size + within, here)?,
            None => here.fill(0),
        }
        rest = after;
        offset += there;
        index += 1;
    }
    Ok(())
}
