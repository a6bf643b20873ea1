//! What was committed to the journal and may not stand in its place yet (jbd2).
//!
//! ```text
//! block 0      1 ... a ring of transactions with ascending sequence numbers ... last   fast commits
//! superblock   ┌ revoked ┬ descriptor: tags ┬ as many blocks ┬ ... ┬ commit ┐ ...      (blocks that bypass the ring)
//! ```
//!
//! As Linux does, in three passes: find the last transaction that was committed, collect what later transactions revoke,
//! then let each block that a tag names be the one in the journal; the last wins. Nothing is copied: the result says where
//! in the volume the newer bytes stand. Sequence numbers wrap around, so they are compared by their distance.
//!
//! Unlike Linux, a block of the journal that is damaged is left out and said, and the volume is read as it stands if the
//! journal as a whole cannot be read.
//! Source: "Journal (jbd2)" of the kernel's documentation of ext4, and fs/jbd2/recovery.c of Linux for what it leaves open.

mod fast_commit;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use disk::Disk;
use fs_ext4::checksum::linux_crc32c;
use fs_ext4::features::{Compat, Incompat};
use fs_ext4::jbd2::{
    JBD2_COMMIT_BLOCK, JBD2_DESCRIPTOR_BLOCK, JBD2_FEATURE_COMPAT_CHECKSUM, JBD2_MAGIC_NUMBER, JBD2_REVOKE_BLOCK,
    JbdIncompat, JournalSuperblock, block_tail_checksum, commit_block_checksum, tag_checksum,
};

use super::content;
use super::map::{Blocks, Place, Run, Window};
use super::volume::Volume;
use crate::{Error, ErrorKind, Fields, Overlay, Result};
pub(super) use fast_commit::Change;

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

/// Sentences about blocks of the journal at most.
const MAX_PROBLEMS: usize = 8;

/// Bytes of the header of each block that is not one of the filesystem's.
const HEADER: usize = 12;

/// Bytes at the end of a descriptor that hold its checksum.
const TAIL: usize = 4;

/// Blocks of a ring at least, beside those of fast commits.
const MIN_RING: u32 = 1024;

/// Bytes of fast commits at most, each of a dozen or more and some 100 in memory; Linux makes room for 256 blocks.
const MAX_FAST_COMMITS: u64 = 16 << 20;

/// Blocks for fast commits where the superblock does not say.
const DEFAULT_FAST_COMMIT_BLOCKS: u32 = 256;

const FLAG_ESCAPED: u16 = 1;
const FLAG_SAME_UUID: u16 = 2;
const FLAG_LAST: u16 = 8;

/// What a journal holds.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// By block of the filesystem.
    logged: BTreeMap<u64, Logged>,
    /// What was committed fast after all of these.
    pub(super) changes: Vec<Change>,
    /// Whether there was one to take into account, and it was.
    pub(super) is_replayed: bool,
    /// What of it is not shown, a sentence each.
    pub(super) problems: Vec<String>,
    /// Blocks that are not shown and not named there.
    unnamed: u64,
}

/// A block in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Logged {
    /// Where it stands (bytes).
    place: u64,
    /// Its first four bytes are those of a header, and zeroes in the journal.
    is_escaped: bool,
}

impl Replay {
    /// Says that a block is not shown, and why.
    fn leave_out(&mut self, problem: String) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        } else {
            self.unnamed += 1;
        }
    }

    /// Returns a disk with what it holds, but for what was committed fast.
    pub(super) fn laid_over(&self, disk: Arc<dyn Disk>, block_size: u64) -> Result<Overlay> {
        let mut overlay = Overlay::new(disk);
        let mut logged = self.logged.iter().peekable();
        while let Some((&block, first)) = logged.next() {
            if first.is_escaped {
                let mut bytes = vec![0; usize::try_from(block_size).expect("64 KiB at most")];
                overlay.base().read_at(first.place, &mut bytes)?;
                bytes[..4].copy_from_slice(&JBD2_MAGIC_NUMBER.to_be_bytes());
                overlay.lay_bytes(block * block_size, bytes)?;
                continue;
            }
            let mut len = block_size;
            while logged
                .next_if(|(next, then)| {
                    !then.is_escaped
                        && **next * block_size == block * block_size + len
                        && then.place == first.place + len
                })
                .is_some()
            {
                len += block_size;
            }
            overlay.lay_elsewhere(block * block_size, len, first.place)?;
        }
        Ok(overlay)
    }
}

/// Reads the journal of a volume that was not unmounted.
///
/// # Errors
/// [`ErrorKind::Disk`]; what else keeps a journal from being read is said in the result.
pub(super) fn replay(volume: &Volume, superblock: &fs_ext4::superblock::Superblock) -> Result<Replay> {
    if superblock.feature_incompat & Incompat::RECOVER.bits() == 0 {
        return Ok(Replay::default());
    }
    let is_elsewhere = superblock.feature_compat & Compat::HAS_JOURNAL.bits() == 0 || superblock.journal_inode == 0;
    let replay = if is_elsewhere {
        Err(Error::unsupported("it is on a disk of its own"))
    } else {
        Log::open(volume, superblock.journal_inode).and_then(|log| log.replay())
    };
    replay.or_else(impossible)
}

/// Returns what a journal comes to that cannot be replayed.
///
/// # Errors
/// The one that is given, if it is [`ErrorKind::Disk`].
pub(super) fn impossible(error: Error) -> Result<Replay> {
    if error.kind() == ErrorKind::Disk {
        return Err(error);
    }
    let problem = format!(
        "The filesystem was in use and its journal cannot be replayed ({error}): what was written last may be missing, old or \
         damaged"
    );
    Ok(Replay { problems: vec![problem], ..Replay::default() })
}

/// Returns what is said where fast commits cannot be replayed.
///
/// # Errors
/// The one that is given, if it is [`ErrorKind::Disk`].
pub(super) fn without_fast_commits(error: Error) -> Result<String> {
    if error.kind() == ErrorKind::Disk {
        return Err(error);
    }
    Ok(format!(
        "What programs synced last cannot be replayed ({error}): files that were written in the last seconds may be missing \
         or old"
    ))
}

/// A journal.
struct Log<'a> {
    blocks: &'a dyn Blocks,
    runs: Vec<Run>,
    superblock: JournalSuperblock,
    /// The block after the last of the ring.
    end: u32,
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

/// What a descriptor says of a block that follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag {
    /// Of the filesystem.
    block: u64,
    flags: u16,
    /// All 32 bits, or 16.
    checksum: u32,
}

impl<'a> Log<'a> {
    fn open(volume: &'a Volume, inode: u32) -> Result<Self> {
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
    fn new(blocks: &'a dyn Blocks, runs: Vec<Run>, len: u64) -> Result<Self> {
        let mut log = Self { blocks, runs, superblock: NO_SUPERBLOCK, end: u32::MAX };
        log.superblock = superblock(&log.read(0)?, blocks.block_size(), len)?;
        log.end = log.superblock.max_len;
        if log.has(JbdIncompat::FAST_COMMIT)
            && let Some(end) = log.end.checked_sub(log.fast_commit_blocks()).filter(|end| *end >= MIN_RING)
        {
            log.end = end;
        }
        let start = log.superblock.start;
        if start != 0 && !(log.superblock.first..log.end).contains(&start) {
            return Err(Error::damaged(format!("its journal starts at block {start} of {}", log.end)));
        }
        Ok(log)
    }

    fn replay(&self) -> Result<Replay> {
        if self.superblock.start == 0 {
            return Ok(Replay { is_replayed: true, ..Replay::default() });
        }
        let records = self.scan()?;
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
        if self.has(JbdIncompat::FAST_COMMIT) {
            match self.fast_commits(records.end) {
                Ok(changes) => replay.changes = changes,
                Err(error) => replay.problems.push(without_fast_commits(error)?),
            }
        }
        Ok(replay)
    }

    /// Finds the records of all transactions that were committed.
    fn scan(&self) -> Result<Records> {
        let mut records = Records { found: Vec::new(), end: self.superblock.sequence, problems: Vec::new() };
        let mut pending = Vec::new();
        let mut at = self.superblock.start;
        let mut left = self.end - self.superblock.first;
        // Blocks of an earlier round through the ring are no damage, and only older than the last commit.
        let (mut is_suspect, mut committed) = (false, 0);
        let mut sum = !0;
        while left > 0 {
            let (block, bytes) = (at, self.read(at)?);
            (at, left) = (self.after(at, 1), left - 1);
            let fields = Fields(&bytes);
            if fields.be32(0) != Some(JBD2_MAGIC_NUMBER) || fields.be32(8) != Some(records.end) {
                break;
            }
            match fields.be32(4) {
                Some(JBD2_DESCRIPTOR_BLOCK) => {
                    is_suspect |= !self.has_genuine_tail(&bytes);
                    let count = u32::try_from(self.tags(&bytes).len()).expect("a block has thousands at most");
                    if count > left {
                        break;
                    }
                    if self.sums_transactions() {
                        sum = crc32_be(sum, &bytes);
                        for following in 0..count {
                            sum = crc32_be(sum, &self.read(self.after(at, following))?);
                        }
                    }
                    pending.push((records.end, Record::Descriptor { block, first: at }));
                    (at, left) = (self.after(at, count), left - count);
                }
                Some(JBD2_REVOKE_BLOCK) => {
                    is_suspect |= !self.has_genuine_tail(&bytes);
                    pending.push((records.end, Record::Revoke { block }));
                }
                Some(JBD2_COMMIT_BLOCK) => {
                    let time = fields.be64(48).unwrap_or_default();
                    if is_suspect || !self.is_genuine_commit(&bytes, sum) {
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
                    if records.found.len() > MAX_RECORDS {
                        return Err(Error::new(ErrorKind::TooMuch, "its journal has millions of records"));
                    }
                    records.end = records.end.wrapping_add(1);
                    sum = !0;
                }
                _ => break,
            }
        }
        Ok(records)
    }

    /// Adds the blocks that a revoke block names, each with the last transaction that did.
    fn revoke(&self, bytes: &[u8], sequence: u32, revoked: &mut HashMap<u64, u32>) -> Result<()> {
        let fields = Fields(bytes);
        let used = fields.be32(HEADER).and_then(|used| usize::try_from(used).ok()).unwrap_or(usize::MAX);
        let room = bytes.len() - self.tail();
        let records = bytes.get(HEADER + 4..used.max(HEADER + 4)).filter(|_| used <= room);
        let records = records.ok_or_else(|| Error::damaged("a revoke block of its journal is longer than a block"))?;
        let width = if self.has(JbdIncompat::BIT64) { 8 } else { 4 };
        for record in records.chunks_exact(width) {
            let fields = Fields(record);
            let block = if width == 8 { fields.be64(0) } else { fields.be32(0).map(u64::from) };
            let last = revoked.entry(block.unwrap_or_default()).or_insert(sequence);
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
        for (number, tag) in (0..).zip(self.tags(&self.read(descriptor)?)) {
            if revoked.get(&tag.block).is_some_and(|last| !is_after(sequence, *last)) {
                continue;
            }
            let at = self.after(first, number);
            if !self.is_genuine(tag, sequence, at)? {
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

    /// Returns the tags of a descriptor.
    fn tags(&self, bytes: &[u8]) -> Vec<Tag> {
        let len = self.superblock.tag_bytes();
        let (is_v3, is_64) = (self.has(JbdIncompat::CSUM_V3), self.has(JbdIncompat::BIT64));
        let mut tags = Vec::new();
        let mut at = HEADER;
        while let Some(tag) = bytes[..bytes.len() - self.tail()].get(at..at + len) {
            let fields = Fields(tag);
            let number = |value: Option<u32>| u64::from(value.unwrap_or_default());
            let high = if is_64 { number(fields.be32(8)) } else { 0 };
            let checksum = if is_v3 { fields.be32(12) } else { fields.be16(4).map(u32::from) };
            // The last two bytes of four where there are as many.
            let flags = fields.be16(6).unwrap_or_default();
            tags.push(Tag {
                block: high << 32 | number(fields.be32(0)),
                flags,
                checksum: checksum.unwrap_or_default(),
            });
            at += len + if flags & FLAG_SAME_UUID == 0 { 16 } else { 0 };
            if flags & FLAG_LAST != 0 {
                break;
            }
        }
        tags
    }

    fn is_genuine(&self, tag: Tag, sequence: u32, at: u32) -> Result<bool> {
        if !self.superblock.uses_csum_v2_or_v3() {
            return Ok(true);
        }
        let sum = tag_checksum(self.superblock.csum_seed(), sequence, &self.read(at)?);
        Ok(tag.checksum == if self.has(JbdIncompat::CSUM_V3) { sum } else { sum & 0xffff })
    }

    fn has_genuine_tail(&self, bytes: &[u8]) -> bool {
        !self.superblock.uses_csum_v2_or_v3()
            || Fields(bytes).be32(bytes.len() - TAIL) == Some(block_tail_checksum(self.superblock.csum_seed(), bytes))
    }

    /// Checks a commit; `sum` is that of all blocks of its transaction.
    fn is_genuine_commit(&self, bytes: &[u8], sum: u32) -> bool {
        let fields = Fields(bytes);
        let stored = fields.be32(16);
        if self.sums_transactions() {
            // Of CRC-32 in four bytes, or none.
            let kind = fields.be16(12);
            return kind == Some(0x0104) && stored == Some(sum) || kind == Some(0) && stored == Some(0);
        }
        if !self.superblock.uses_csum_v2_or_v3() {
            return true;
        }
        let seed = self.superblock.csum_seed();
        // Older bytes may follow what it has.
        let mut alone = bytes[..60].to_vec();
        alone.resize(bytes.len(), 0);
        stored == Some(commit_block_checksum(seed, bytes)) || stored == Some(commit_block_checksum(seed, &alone))
    }

    /// Returns whether commits hold a sum over the blocks of their transaction (version 1).
    fn sums_transactions(&self) -> bool {
        self.superblock.feature_compat & JBD2_FEATURE_COMPAT_CHECKSUM != 0
    }

    /// Returns what was committed fast after the transaction before `sequence`.
    fn fast_commits(&self, sequence: u32) -> Result<Vec<Change>> {
        let mut area = fast_commit::Area::new(sequence);
        // The first block after the ring stays free.
        for (number, block) in (0..).zip(self.end + 1..self.superblock.max_len) {
            if !area.add(&self.read(block)?) {
                break;
            }
            if number * self.blocks.block_size() > MAX_FAST_COMMITS {
                return Err(Error::new(ErrorKind::TooMuch, format!("they take more than {MAX_FAST_COMMITS} bytes")));
            }
        }
        Ok(area.changes())
    }

    fn fast_commit_blocks(&self) -> u32 {
        match self.superblock.num_fc_blocks {
            0 => DEFAULT_FAST_COMMIT_BLOCKS,
            blocks => blocks,
        }
    }

    fn has(&self, feature: JbdIncompat) -> bool {
        self.superblock.feature_incompat & feature.bits() != 0
    }

    /// Bytes at the end of a descriptor that are no tags.
    fn tail(&self) -> usize {
        if self.superblock.uses_csum_v2_or_v3() { TAIL } else { 0 }
    }

    /// Returns the block of the ring that comes `count` (less than there are) after another.
    fn after(&self, block: u32, count: u32) -> u32 {
        let to_end = self.end - block;
        if count < to_end { block + count } else { self.superblock.first + (count - to_end) }
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        self.blocks.read(self.place(block)?)
    }

    /// Returns the block of the volume in which one of the journal is.
    fn place(&self, block: u32) -> Result<u64> {
        let block = u64::from(block);
        let next = self.runs.partition_point(|run| run.start <= block);
        let run = next.checked_sub(1).map(|at| self.runs[at]).filter(|run| block - run.start < run.len);
        match run {
            Some(Run { start, place: Place::At(first), .. }) => Ok(first + (block - start)),
            _ => Err(Error::damaged(format!("block {block} of its journal is missing"))),
        }
    }
}

/// Returns whether one sequence number comes after another.
fn is_after(sequence: u32, other: u32) -> bool {
    sequence != other && sequence.wrapping_sub(other) < 1 << 31
}

/// What stands in the place of the superblock until it is read.
const NO_SUPERBLOCK: JournalSuperblock = JournalSuperblock {
    block_type: 0,
    header_sequence: 0,
    block_size: 0,
    max_len: 0,
    first: 0,
    sequence: 0,
    start: 0,
    errno: 0,
    feature_compat: 0,
    feature_incompat: 0,
    feature_ro_compat: 0,
    uuid: [0; 16],
    nr_users: 0,
    checksum_type: 0,
    num_fc_blocks: 0,
    checksum: 0,
};

/// Returns the superblock in a block, checked; the journal has `blocks`.
fn superblock(bytes: &[u8], block_size: u64, blocks: u64) -> Result<JournalSuperblock> {
    let superblock = JournalSuperblock::parse(bytes).map_err(|error| Error::damaged(error.to_string()))?;
    if let Some(problem) = superblock.checksum_declaration_error() {
        return Err(Error::damaged(problem));
    }
    let known = JbdIncompat::all().bits();
    if superblock.feature_incompat & !known != 0 {
        return Err(Error::unsupported(format!(
            "its journal has features that are not read ({:#x})",
            superblock.feature_incompat & !known
        )));
    }
    if u64::from(superblock.block_size) != block_size
        || superblock.first == 0
        || superblock.first >= superblock.max_len
        || u64::from(superblock.max_len) > blocks
    {
        return Err(Error::damaged("the superblock of its journal contradicts itself"));
    }
    let stored = 0xfc..0x100;
    if superblock.uses_csum_v2_or_v3() {
        let mut alone = bytes[..1024].to_vec();
        alone[stored].fill(0);
        if linux_crc32c(!0, &alone) != superblock.checksum {
            return Err(Error::damaged("the superblock of its journal has a wrong checksum"));
        }
    }
    Ok(superblock)
}

/// Continues the CRC-32 of which the first bit is the highest (that of Ethernet is mirrored), not inverted at the end.
fn crc32_be(sum: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(sum, |sum, byte| {
        let [high, ..] = sum.to_be_bytes();
        sum << 8 ^ CRC32_BE[usize::from(high ^ byte)]
    })
}

/// What each highest byte adds to a sum.
const CRC32_BE: [u32; 256] = {
    let mut table = [0; 256];
    let (mut at, mut byte) = (0, 0_u32);
    while at < table.len() {
        let mut sum = byte << 24;
        let mut bit = 0;
        while bit < 8 {
            sum = sum << 1 ^ if sum >> 31 == 0 { 0 } else { 0x04c1_1db7 };
            bit += 1;
        }
        table[at] = sum;
        (at, byte) = (at + 1, byte + 1);
    }
    table
};
