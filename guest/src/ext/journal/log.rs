//! The ring of transactions: three passes over it.

use std::collections::HashMap;

use fs_ext4::jbd2::{JBD2_COMMIT_BLOCK, JBD2_DESCRIPTOR_BLOCK, JBD2_MAGIC_NUMBER, JBD2_REVOKE_BLOCK};

use super::super::content;
use super::super::map::{Blocks, Place, Run, Window};
use super::super::volume::Volume;
use super::form::{FLAG_ESCAPED, Form, crc32_be};
use super::{Change, Logged, Replay, fast_commit, without_fast_commits};
use crate::{Error, ErrorKind, Fields, Result};

/// Blocks of a journal at most, as mke2fs has it.
const MAX_BLOCKS: u64 = 10_240_000;

/// Runs of a journal at most; one that was made with the filesystem has a few.
const MAX_RUNS: usize = 65_536;

/// Blocks whose newer bytes are in the journal, at most: some 50 bytes each, and as many laid over the volume.
const MAX_LOGGED: usize = 2_000_000;

/// Revoked blocks at most: some 30 bytes each.
const MAX_REVOKED: usize = 4_000_000;

/// Descriptors and revoke blocks at most, 20 bytes each.
const MAX_RECORDS: usize = 4_000_000;

/// Bytes of fast commits at most, each of a dozen or more and some 100 in memory; Linux makes room for 256 blocks.
const MAX_FAST_COMMITS: u64 = 16 << 20;

/// A journal.
pub(super) struct Log<'a> {
    blocks: &'a dyn Blocks,
    runs: Vec<Run>,
    form: Form,
}

/// A block of the journal that says what to do, of a transaction that was committed.
enum Record {
    /// Names blocks; they follow from this place on.
    Descriptor { block: u32, first: u32 },
    /// Names blocks of which no earlier transaction is to be replayed.
    Revoke { block: u32 },
}

/// Records in ascending order, each with the sequence number of its transaction.
struct Records {
    found: Vec<(u32, Record)>,
    /// That of the first transaction that was not committed.
    end: u32,
    problems: Vec<String>,
}

impl<'a> Log<'a> {
    /// Opens the journal that is in an inode.
    pub(super) fn open(volume: &'a Volume, inode: u32) -> Result<Self> {
        let node = volume.own_node(inode)?;
        let blocks = node.inode.size / volume.block_size();
        if blocks > MAX_BLOCKS {
            return Err(Error::new(ErrorKind::TooMuch, format!("its journal has {blocks} blocks")));
        }
        let runs = content::runs(volume, &node, Window { from: 0, end: blocks, room: MAX_RUNS })?;
        if runs.until < blocks {
            return Err(Error::new(ErrorKind::TooMuch, format!("its journal lies in more than {MAX_RUNS} pieces")));
        }
        Self::new(volume, runs.found, blocks)
    }

    /// Makes one of `len` blocks that lie in runs of others.
    pub(super) fn new(blocks: &'a dyn Blocks, runs: Vec<Run>, len: u64) -> Result<Self> {
        let superblock = blocks.read(place(&runs, 0)?)?;
        let form = Form::parse(&superblock, blocks.block_size(), len)?;
        Ok(Self { blocks, runs, form })
    }

    /// Reads all of it that was committed.
    pub(super) fn replay(&self) -> Result<Replay> {
        let Some((start, sequence)) = self.form.start() else {
            return Ok(Replay { is_replayed: true, ..Replay::default() });
        };
        let records = self.scan(start, sequence)?;
        let mut replay = Replay { is_replayed: true, problems: records.problems, ..Replay::default() };
        let mut revoked = HashMap::new();
        for (sequence, record) in &records.found {
            if let Record::Revoke { block } = record {
                self.revoke(&self.read(*block)?, *sequence, &mut revoked)?;
            }
        }
        for (sequence, record) in &records.found {
            if let Record::Descriptor { block, first } = record {
                self.log(*block, *first, *sequence, &revoked, &mut replay)?;
            }
        }
        if replay.unnamed > 0 {
            replay.problems.push(format!("So it is with {} more blocks of its journal", replay.unnamed));
        }
        match self.fast_commits(records.end) {
            Ok(changes) => replay.changes = changes,
            Err(error) => replay.problems.push(without_fast_commits(error)?),
        }
        Ok(replay)
    }

    /// Finds the records of all transactions that were committed; the first has this number and starts at block `at`.
    fn scan(&self, mut at: u32, sequence: u32) -> Result<Records> {
        let mut records = Records { found: Vec::new(), end: sequence, problems: Vec::new() };
        let mut pending = Vec::new();
        let mut left = self.form.len();
        // Blocks of an earlier round through the ring are no damage, and only older than the last commit.
        let (mut is_suspect, mut committed) = (false, 0);
        let mut sum = !0;
        while left > 0 {
            let (block, bytes) = (at, self.read(at)?);
            (at, left) = (self.form.after(at, 1), left - 1);
            let fields = Fields(&bytes);
            if fields.be32(0) != Some(JBD2_MAGIC_NUMBER) || fields.be32(8) != Some(records.end) {
                break;
            }
            match fields.be32(4) {
                Some(JBD2_DESCRIPTOR_BLOCK) => {
                    is_suspect |= !self.form.has_genuine_tail(&bytes);
                    let count = u32::try_from(self.form.tags(&bytes).len()).expect("a block has thousands at most");
                    if count > left {
                        break;
                    }
                    if self.form.sums_transactions() {
                        sum = crc32_be(sum, &bytes);
                        for following in 0..count {
                            sum = crc32_be(sum, &self.read(self.form.after(at, following))?);
                        }
                    }
                    pending.push((records.end, Record::Descriptor { block, first: at }));
                    (at, left) = (self.form.after(at, count), left - count);
                }
                Some(JBD2_REVOKE_BLOCK) => {
                    is_suspect |= !self.form.has_genuine_tail(&bytes);
                    pending.push((records.end, Record::Revoke { block }));
                }
                Some(JBD2_COMMIT_BLOCK) => {
                    let time = fields.be64(48).unwrap_or_default();
                    if is_suspect || !self.form.is_genuine_commit(&bytes, sum) {
                        if time >= committed {
                            records.problems.push(format!(
                                "Transaction {} of its journal is damaged: it and all later ones are missing",
                                records.end
                            ));
                        }
                        break;
                    }
                    committed = time;
                    records.found.append(&mut pending);
                    records.end = records.end.wrapping_add(1);
                    sum = !0;
                }
                _ => break,
            }
            if records.found.len() + pending.len() > MAX_RECORDS {
                return Err(Error::new(ErrorKind::TooMuch, "its journal has millions of records"));
            }
        }
        Ok(records)
    }

    /// Adds the blocks that a revoke block names, each with the last transaction that did.
    fn revoke(&self, bytes: &[u8], sequence: u32, revoked: &mut HashMap<u64, u32>) -> Result<()> {
        for block in self.form.revoked(bytes)? {
            let last = revoked.entry(block).or_insert(sequence);
            if is_after(sequence, *last) {
                *last = sequence;
            }
        }
        if revoked.len() > MAX_REVOKED {
            return Err(Error::new(ErrorKind::TooMuch, "its journal revokes millions of blocks"));
        }
        Ok(())
    }

    /// Adds the blocks that a descriptor names.
    fn log(
        &self,
        descriptor: u32,
        first: u32,
        sequence: u32,
        revoked: &HashMap<u64, u32>,
        replay: &mut Replay,
    ) -> Result<()> {
        let block_size = self.blocks.block_size();
        for (number, tag) in (0..).zip(self.form.tags(&self.read(descriptor)?)) {
            if revoked.get(&tag.block).is_some_and(|last| !is_after(sequence, *last)) {
                continue;
            }
            let at = self.form.after(first, number);
            if self.form.has_checksums() && !self.form.is_genuine(tag, sequence, &self.read(at)?) {
                replay.leave_out(format!("The journal's newer block {} is damaged: the older one is read", tag.block));
                continue;
            }
            if tag.block >= self.blocks.count() {
                replay.leave_out(format!("The journal has a block {}, which does not exist", tag.block));
                continue;
            }
            let is_escaped = tag.flags & FLAG_ESCAPED != 0;
            let logged = Logged { place: self.place(at)? * block_size, is_escaped };
            replay.logged.insert(tag.block, logged);
            if replay.logged.len() > MAX_LOGGED {
                return Err(Error::new(ErrorKind::TooMuch, "its journal holds millions of blocks"));
            }
        }
        Ok(())
    }

    /// Returns what was committed fast after the transaction before `sequence`.
    fn fast_commits(&self, sequence: u32) -> Result<Vec<Change>> {
        let mut area = fast_commit::Area::new(sequence);
        for (number, block) in (0..).zip(self.form.fast_commits()) {
            if !area.add(&self.read(block)?) {
                break;
            }
            if number * self.blocks.block_size() > MAX_FAST_COMMITS {
                return Err(Error::new(ErrorKind::TooMuch, format!("they take more than {MAX_FAST_COMMITS} bytes")));
            }
        }
        Ok(area.changes())
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        self.blocks.read(self.place(block)?)
    }

    fn place(&self, block: u32) -> Result<u64> {
        place(&self.runs, block)
    }
}

/// Returns the block of the volume in which one of the journal is.
fn place(runs: &[Run], block: u32) -> Result<u64> {
    let block = u64::from(block);
    let next = runs.partition_point(|run| run.start <= block);
    let run = next.checked_sub(1).map(|at| runs[at]).filter(|run| block - run.start < run.len);
    match run {
        Some(Run { start, place: Place::At(first), .. }) => Ok(first + (block - start)),
        _ => Err(Error::damaged(format!("block {block} of its journal is missing"))),
    }
}

/// Returns whether one sequence number comes after another.
pub(super) fn is_after(sequence: u32, other: u32) -> bool {
    sequence != other && sequence.wrapping_sub(other) < 1 << 31
}
