//! Journals of every form, written as Linux does.

use fs_ext4::checksum::linux_crc32c;
use fs_ext4::jbd2::{
    JBD2_COMMIT_BLOCK, JBD2_DESCRIPTOR_BLOCK, JBD2_FEATURE_COMPAT_CHECKSUM, JBD2_REVOKE_BLOCK, JbdIncompat,
    block_tail_checksum, commit_block_checksum, tag_checksum,
};

use super::super::map::{Blocks, Place, Run};
use super::form::{FLAG_ESCAPED, FLAG_LAST, FLAG_SAME_UUID, TAIL, crc32_be};
use super::log::is_after;
use super::*;

const BLOCK: usize = 1024;
/// Where the journal starts; it ends with the volume.
const START: u64 = 100;
const LEN: u32 = 20;

/// A volume that is a journal from some block on, in which transactions are written as Linux does.
struct Written {
    bytes: Vec<u8>,
    incompat: JbdIncompat,
    compat: u32,
    at: u32,
    sequence: u32,
    sum: u32,
    time: u64,
}

impl Blocks for Written {
    fn block_size(&self) -> u64 {
        BLOCK as u64
    }

    fn count(&self) -> u64 {
        (self.bytes.len() / BLOCK) as u64
    }

    fn read(&self, block: u64) -> Result<Vec<u8>> {
        let at = usize::try_from(block).unwrap() * BLOCK;
        Ok(self.bytes[at..at + BLOCK].to_vec())
    }
}

impl Written {
    /// One of which the first transaction starts at block `at` of the journal.
    fn new(incompat: JbdIncompat, compat: u32, at: u32, sequence: u32) -> Self {
        let bytes = vec![0; (usize::try_from(START).unwrap() + LEN as usize) * BLOCK];
        let mut written = Self { bytes, incompat, compat, at, sequence, sum: !0, time: 1000 };
        let mut superblock = vec![0; BLOCK];
        let block_size = u32::try_from(BLOCK).unwrap();
        let fields = [JBD2_MAGIC_NUMBER, 4, 0, block_size, LEN, 1, sequence, at, 0, compat, incompat.bits()];
        for (field, value) in superblock.chunks_mut(4).zip(fields) {
            field.copy_from_slice(&value.to_be_bytes());
        }
        superblock[0x30..0x40].copy_from_slice(b"0123456789abcdef");
        superblock[0x50] = 4;
        let sum = linux_crc32c(!0, &superblock);
        superblock[0xfc..0x100].copy_from_slice(&sum.to_be_bytes());
        written.put(0, &superblock);
        written
    }

    fn has(&self, feature: JbdIncompat) -> bool {
        self.incompat.contains(feature)
    }

    fn has_sums(&self) -> bool {
        self.has(JbdIncompat::CSUM_V2) || self.has(JbdIncompat::CSUM_V3)
    }

    fn seed() -> u32 {
        linux_crc32c(!0, b"0123456789abcdef")
    }

    fn put(&mut self, block: u32, bytes: &[u8]) {
        let at = (usize::try_from(START).unwrap() + block as usize) * BLOCK;
        self.bytes[at..at + BLOCK].copy_from_slice(bytes);
    }

    fn append(&mut self, bytes: &[u8]) -> u32 {
        let at = self.at;
        self.put(at, bytes);
        self.at = if at + 1 == LEN { 1 } else { at + 1 };
        at
    }

    fn header(&self, kind: u32) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [JBD2_MAGIC_NUMBER, kind, self.sequence].iter().flat_map(|v| v.to_be_bytes()).collect();
        bytes.reserve(BLOCK);
        bytes
    }

    fn with_tail(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.resize(BLOCK, 0);
        if self.has_sums() {
            let sum = block_tail_checksum(Self::seed(), &bytes);
            bytes[BLOCK - TAIL..].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    /// Writes a descriptor and blocks full of a byte; returns where the first of them is.
    fn blocks(&mut self, blocks: &[(u64, u8, bool)]) -> u32 {
        let mut descriptor = self.header(JBD2_DESCRIPTOR_BLOCK);
        let mut contents = Vec::new();
        for (number, &(block, byte, is_escaped)) in blocks.iter().enumerate() {
            let mut content = vec![byte; BLOCK];
            if is_escaped {
                content[..4].fill(0);
            }
            let mut flags = if number == 0 { 0 } else { FLAG_SAME_UUID };
            flags |= if is_escaped { FLAG_ESCAPED } else { 0 };
            flags |= if number + 1 == blocks.len() { FLAG_LAST } else { 0 };
            let sum = tag_checksum(Self::seed(), self.sequence, &content);
            let (high, low) = (u32::try_from(block >> 32).unwrap(), u32::try_from(block & 0xffff_ffff).unwrap());
            descriptor.extend(low.to_be_bytes());
            if self.has(JbdIncompat::CSUM_V3) {
                descriptor.extend([u32::from(flags), high, sum].iter().flat_map(|field| field.to_be_bytes()));
            } else {
                let half = if self.has(JbdIncompat::CSUM_V2) { u16::try_from(sum & 0xffff).unwrap() } else { 0 };
                descriptor.extend(half.to_be_bytes());
                descriptor.extend(flags.to_be_bytes());
                if self.has(JbdIncompat::BIT64) {
                    descriptor.extend(high.to_be_bytes());
                }
                if self.has(JbdIncompat::CSUM_V2) {
                    descriptor.extend([0; 2]);
                }
            }
            if number == 0 {
                descriptor.extend(b"0123456789abcdef");
            }
            contents.push(content);
        }
        let descriptor = self.with_tail(descriptor);
        self.sum = crc32_be(self.sum, &descriptor);
        self.append(&descriptor);
        let first = self.at;
        for content in contents {
            self.sum = crc32_be(self.sum, &content);
            self.append(&content);
        }
        first
    }

    fn revoke(&mut self, blocks: &[u64]) {
        let mut bytes = self.header(JBD2_REVOKE_BLOCK);
        let width = if self.has(JbdIncompat::BIT64) { 8 } else { 4 };
        bytes.extend(u32::try_from(16 + width * blocks.len()).unwrap().to_be_bytes());
        for block in blocks {
            bytes.extend(&block.to_be_bytes()[8 - width..]);
        }
        let bytes = self.with_tail(bytes);
        self.append(&bytes);
    }

    /// Writes a commit; returns where.
    fn commit(&mut self) -> u32 {
        let mut bytes = self.header(JBD2_COMMIT_BLOCK);
        bytes.resize(BLOCK, 0);
        self.time += 5;
        bytes[48..56].copy_from_slice(&self.time.to_be_bytes());
        if self.compat != 0 {
            bytes[12..14].copy_from_slice(&[1, 4]);
            bytes[16..20].copy_from_slice(&self.sum.to_be_bytes());
        }
        if self.has_sums() {
            let sum = commit_block_checksum(Self::seed(), &bytes);
            bytes[16..20].copy_from_slice(&sum.to_be_bytes());
        }
        self.sequence = self.sequence.wrapping_add(1);
        self.sum = !0;
        self.append(&bytes)
    }

    fn replay(&self) -> Result<Replay> {
        let runs = vec![Run { start: 0, len: u64::from(LEN), place: Place::At(START) }];
        Log::new(self, runs, u64::from(LEN))?.replay()
    }

    /// Flips a bit of a block of the journal.
    fn damage(&mut self, block: u32, at: usize) {
        self.bytes[(usize::try_from(START).unwrap() + block as usize) * BLOCK + at] ^= 1;
    }
}

fn logged(replay: &Replay) -> Vec<(u64, u64, bool)> {
    let block = |place: u64| place / BLOCK as u64 - START;
    replay.logged.iter().map(|(number, logged)| (*number, block(logged.place), logged.is_escaped)).collect()
}

const NONE: JbdIncompat = JbdIncompat::empty();

#[test]
fn every_form_of_a_journal_is_replayed() {
    use JbdIncompat as Bits;
    let forms = [
        (NONE, 0),
        (NONE, JBD2_FEATURE_COMPAT_CHECKSUM),
        (Bits::BIT64, 0),
        (Bits::CSUM_V2, 0),
        (Bits::CSUM_V2 | Bits::BIT64, 0),
        (Bits::CSUM_V3, 0),
        (Bits::CSUM_V3 | Bits::BIT64, 0),
    ];
    // From the middle, so that it wraps around; so do the sequence numbers.
    for (incompat, compat) in forms {
        let mut written = Written::new(incompat | Bits::REVOKE, compat, 15, u32::MAX);
        written.blocks(&[(7, 1, false), (8, 2, true), (9, 3, false)]);
        written.commit();
        let first = written.blocks(&[(7, 4, false)]);
        assert_eq!(first, 2, "past the end");
        written.revoke(&[9]);
        written.commit();
        written.blocks(&[(8, 5, false)]);
        let replay = written.replay().expect("a journal");
        assert_eq!(logged(&replay), [(7, 2, false), (8, 17, true)], "{incompat:?} {compat}");
        assert_eq!((replay.problems, replay.is_replayed), (vec![], true), "{incompat:?} {compat}");
    }
}

#[test]
fn a_block_is_revoked_up_to_the_transaction_that_did() {
    let mut written = Written::new(JbdIncompat::REVOKE, 0, 1, 10);
    written.blocks(&[(7, 1, false), (8, 1, false)]);
    written.commit();
    written.blocks(&[(7, 2, false), (9, 2, false)]);
    written.revoke(&[7, 8, 9]);
    written.commit();
    let third = written.blocks(&[(9, 3, false)]);
    written.commit();
    assert_eq!(logged(&written.replay().expect("a journal")), [(9, u64::from(third), false)]);
}

#[test]
fn what_was_not_committed_or_is_older_is_not_replayed() {
    let mut written = Written::new(NONE, 0, 1, 10);
    written.blocks(&[(7, 1, false)]);
    written.commit();
    written.sequence = 9;
    written.blocks(&[(8, 1, false)]);
    written.commit();
    assert_eq!(logged(&written.replay().expect("a journal")), [(7, 2, false)]);
}

#[test]
fn a_damaged_commit_ends_the_journal_and_is_said() {
    for (incompat, compat) in [(JbdIncompat::CSUM_V3, 0), (NONE, JBD2_FEATURE_COMPAT_CHECKSUM)] {
        let mut written = Written::new(incompat, compat, 1, 10);
        written.blocks(&[(7, 1, false)]);
        written.commit();
        written.blocks(&[(8, 1, false)]);
        let commit = written.commit();
        written.blocks(&[(9, 1, false)]);
        written.commit();
        written.damage(commit, 17);
        let replay = written.replay().expect("a journal");
        assert_eq!(logged(&replay), [(7, 2, false)], "{incompat:?}");
        let said = "Transaction 11 of its journal is damaged: it and all later ones are missing";
        assert_eq!(replay.problems, [said], "{incompat:?}");
    }
}

#[test]
fn a_damaged_descriptor_ends_the_journal() {
    let mut written = Written::new(JbdIncompat::CSUM_V2, 0, 1, 10);
    written.blocks(&[(7, 1, false)]);
    written.commit();
    written.damage(1, 500);
    let replay = written.replay().expect("a journal");
    assert_eq!((logged(&replay), replay.problems.len()), (vec![], 1));
}

#[test]
fn a_damaged_block_is_left_out_and_said() {
    for incompat in [JbdIncompat::CSUM_V2, JbdIncompat::CSUM_V3] {
        let mut written = Written::new(incompat, 0, 1, 10);
        let first = written.blocks(&[(7, 1, false), (8, 1, false)]);
        written.commit();
        written.damage(first, 100);
        let replay = written.replay().expect("a journal");
        assert_eq!(logged(&replay), [(8, 3, false)], "{incompat:?}");
        let said = "The journal's newer block 7 is damaged: the older one is read";
        assert_eq!(replay.problems, [said], "{incompat:?}");
    }
}

#[test]
fn a_block_that_does_not_exist_is_left_out_and_said() {
    let mut written = Written::new(JbdIncompat::BIT64, 0, 1, 10);
    written.blocks(&[(1 << 40, 1, false), (119, 1, false), (120, 1, false)]);
    written.commit();
    let replay = written.replay().expect("a journal");
    assert_eq!((logged(&replay), replay.problems.len()), (vec![(119, 3, false)], 2));
}

#[test]
fn of_many_problems_some_are_said_and_the_rest_counted() {
    let mut written = Written::new(NONE, 0, 1, 10);
    written.blocks(&[(1000, 1, false); 11]);
    written.commit();
    let problems = written.replay().expect("a journal").problems;
    assert_eq!((problems.len(), problems[8].as_str()), (9, "So it is with 3 more blocks of its journal"));
}

#[test]
fn a_journal_that_never_ends_is_read_once_around() {
    let mut written = Written::new(NONE, 0, 1, 10);
    for _ in 1..LEN {
        written.revoke(&[]);
    }
    assert_eq!(logged(&written.replay().expect("a journal")), []);
    let mut written = Written::new(NONE, 0, 1, 10);
    written.blocks(&[(7, 1, false); 10]);
    // Its blocks would reach past where the transaction starts.
    written.blocks(&[(7, 1, false); 10]);
    written.commit();
    assert_eq!(logged(&written.replay().expect("a journal")), []);
}

#[test]
fn a_superblock_that_contradicts_itself_is_refused() {
    let broken = |at: usize, value: u32, incompat| {
        let mut written = Written::new(incompat, 0, 1, 10);
        let place = usize::try_from(START).unwrap() * BLOCK + at;
        written.bytes[place..place + 4].copy_from_slice(&value.to_be_bytes());
        written.replay().expect_err("broken").kind()
    };
    for (at, value) in [(0, 1), (4, 1), (12, 2048), (16, LEN + 1), (20, 0), (20, LEN), (28, LEN), (28, 1 << 31)] {
        assert_eq!(broken(at, value, NONE), ErrorKind::Damaged, "{at} {value}");
    }
    assert_eq!(broken(24, 11, JbdIncompat::CSUM_V3), ErrorKind::Damaged, "a wrong checksum");
    assert_eq!(broken(40, 1 << 20, NONE), ErrorKind::Unsupported, "a feature");
}

#[test]
fn sequence_numbers_wrap_around() {
    for (sequence, other, expected) in
        [(2, 1, true), (1, 1, false), (1, 2, false), (0, u32::MAX, true), (u32::MAX, 0, false)]
    {
        assert_eq!(is_after(sequence, other), expected, "{sequence} {other}");
    }
}

#[test]
fn the_sum_of_a_transaction_is_the_one_of_the_kernel() {
    // CRC-32/MPEG-2 of the usual digits.
    assert_eq!(crc32_be(!0, b"123456789"), 0x0376_e6e7);
}
