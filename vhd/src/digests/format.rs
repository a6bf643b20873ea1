//! The bytes of a sidecar. Numbers are big-endian, as in a VHD; times are nanoseconds since 1970, by the file system's clock.
//!
//! ```text
//! offset  bytes
//!      0      8  "xofsdig1"
//!      8     16  uuid of the layer's footer
//!     24      4  bytes of a block
//!     28      4  number of records, at most 2^20
//!     32      8  VHD file: its size in bytes; exploded VHD: 0
//!     40      8  not used, 0
//!     48  n * 56 records, ascending by block
//!              0   4  the block
//!              4   4  VHD file: sector of the block's bitmap; exploded VHD: size of the block's file in bytes
//!              8   8  when that file was last written
//!             16   8  inode of that file; 0 where the storage has none
//!             24  32  SHA-256 of the block's payload
//!    end     32  SHA-256 of all before
//! ```

use uuid::Uuid;

use crate::digest::{DIGEST_BYTES, Digest};
use crate::error::FormatError;
use crate::geometry::{BlockIndex, BlockSize};
use crate::layer::MAX_BLOCKS;

/// Records a sidecar has at most: those of a disk of 2 TiB. A larger one goes without for its other blocks. It is held in
/// memory, and in an encrypted repository decrypted as a whole, for which 64 MiB is the limit.
pub(crate) const MAX_RECORDS: usize = 1 << 20;
/// Longest sidecar (bytes).
pub(crate) const MAX_SIDECAR: usize = HEAD + MAX_RECORDS * RECORD + DIGEST_BYTES;

const MAGIC: [u8; 8] = *b"xofsdig1";
const HEAD: usize = 48;
const RECORD: usize = 56;

/// What was known of one block when its digest was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) block: BlockIndex,
    /// Of an exploded VHD the bytes of the block's file, of a VHD file the sector of its bitmap.
    pub(crate) size_or_sector: u32,
    /// When the file was last written, in nanoseconds since 1970.
    pub(crate) modified: u64,
    pub(crate) inode: u64,
    pub(crate) digest: Digest,
}

/// What a sidecar says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sidecar {
    pub(crate) uuid: Uuid,
    pub(crate) block_size: BlockSize,
    /// Bytes of the VHD file; `None` of an exploded VHD.
    pub(crate) file_size: Option<u64>,
    /// Ascending by block, each once.
    pub(crate) records: Vec<Record>,
}

impl Sidecar {
    /// Makes its bytes; of too many records those of the first blocks.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let records = &self.records[..self.records.len().min(MAX_RECORDS)];
        let mut bytes = Vec::with_capacity(HEAD + records.len() * RECORD + DIGEST_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.uuid.as_bytes());
        bytes.extend(u32::try_from(self.block_size.bytes()).expect("at most 256 MiB").to_be_bytes());
        bytes.extend(u32::try_from(records.len()).expect("at most MAX_RECORDS").to_be_bytes());
        bytes.extend(self.file_size.unwrap_or(0).to_be_bytes());
        bytes.extend([0; 8]);
        for record in records {
            bytes.extend(record.block.0.to_be_bytes());
            bytes.extend(record.size_or_sector.to_be_bytes());
            bytes.extend(record.modified.to_be_bytes());
            bytes.extend(record.inode.to_be_bytes());
            bytes.extend(record.digest.0);
        }
        let digest = Digest::of_bytes(&bytes);
        bytes.extend(digest.0);
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// `Unsupported` if it is none, or of another version; `Damaged` if its length, its checksum or a record is wrong.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let damaged = |reason: String| Err(FormatError::damaged(reason));
        if !bytes.starts_with(&MAGIC) {
            return Err(FormatError::unsupported("digests of the first version were expected"));
        }
        let Some(rest) = bytes.len().checked_sub(HEAD + DIGEST_BYTES) else {
            return damaged(format!(
                "digests of at least {} bytes were expected, not {}",
                HEAD + DIGEST_BYTES,
                bytes.len()
            ));
        };
        let (count, found) = (u64::from(u32_at(bytes, 28)), rest / RECORD);
        if rest % RECORD != 0 || count != found as u64 || found > MAX_RECORDS {
            return damaged(format!("{count} digests were expected, at most {MAX_RECORDS}, in {} bytes", bytes.len()));
        }
        let (body, checksum) = bytes.split_at(bytes.len() - DIGEST_BYTES);
        if Digest::of_bytes(body).0 != *checksum {
            return damaged("the checksum of the digests is wrong".to_owned());
        }
        let block_size = BlockSize::new(u32_at(bytes, 24))?;
        let records: Vec<Record> = body[HEAD..].chunks_exact(RECORD).map(record).collect();
        let is_ascending = records.windows(2).all(|pair| pair[0].block < pair[1].block);
        if !is_ascending || records.last().is_some_and(|last| u64::from(last.block.0) >= MAX_BLOCKS) {
            return damaged("digests in the order of their blocks were expected".to_owned());
        }
        let uuid = Uuid::from_bytes(bytes[8..24].try_into().expect("16 bytes"));
        let file_size = Some(u64_at(bytes, 32)).filter(|size| *size > 0);
        Ok(Self { uuid, block_size, file_size, records })
    }
}

fn record(bytes: &[u8]) -> Record {
    Record {
        block: BlockIndex(u32_at(bytes, 0)),
        size_or_sector: u32_at(bytes, 4),
        modified: u64_at(bytes, 8),
        inode: u64_at(bytes, 16),
        digest: Digest(bytes[24..RECORD].try_into().expect("32 bytes")),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn sidecar(blocks: &[u32]) -> Sidecar {
        let record = |block: &u32| Record {
            block: BlockIndex(*block),
            size_or_sector: 0x0020_0200,
            modified: 0x1817_1615_1413_1211,
            inode: 0x2827_2625_2423_2221,
            digest: Digest([block.to_be_bytes()[3]; 32]),
        };
        Sidecar {
            uuid: Uuid::from_u128(0x0123_4567_89ab_4cde_8f01_2345_6789_abcd),
            block_size: BlockSize::DEFAULT,
            file_size: None,
            records: blocks.iter().map(record).collect(),
        }
    }

    /// The bytes with a right checksum, whatever else is wrong.
    fn sealed(mut body: Vec<u8>) -> Vec<u8> {
        let digest = Digest::of_bytes(&body);
        body.extend(digest.0);
        body
    }

    #[test]
    fn a_sidecar_has_the_bytes_that_are_written_down() {
        let bytes = Sidecar { file_size: Some(0x77), ..sidecar(&[5]) }.to_bytes();
        let hex: String = bytes[..72].iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = concat!(
            "786f667364696731",
            "0123456789ab4cde8f0123456789abcd",
            "00200000",
            "00000001",
            "0000000000000077",
            "0000000000000000",
            "00000005",
            "00200200",
            "1817161514131211",
            "2827262524232221",
        );
        assert_eq!((hex.as_str(), &bytes[72..104], bytes.len()), (expected, &[5; 32][..], 136));
        for blocks in [&[][..], &[0], &[0, 1, 7, (1 << 24) - 1]] {
            let sidecar = sidecar(blocks);
            assert_eq!(Sidecar::parse(&sidecar.to_bytes()), Ok(sidecar), "{blocks:?}");
        }
    }

    #[test]
    fn what_is_cut_changed_or_foreign_is_refused() {
        let good = sidecar(&[1, 2, 9]).to_bytes();
        for len in 0..good.len() {
            assert!(Sidecar::parse(&good[..len]).is_err(), "{len} bytes");
        }
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            assert!(Sidecar::parse(&bytes).is_err(), "byte {at}");
        }
        let body = good[..good.len() - 32].to_vec();
        let with = |at: usize, new: &[u8]| {
            let mut body = body.clone();
            body[at..at + new.len()].copy_from_slice(new);
            Sidecar::parse(&sealed(body)).unwrap_err().kind
        };
        for (what, at, new, kind) in [
            ("another version", 7, &b"2"[..], ErrorKind::Unsupported),
            ("a block of no bytes", 24, &[0; 4], ErrorKind::Damaged),
            ("a block of 4 GiB", 24, &[0x80, 0, 0, 0], ErrorKind::Unsupported),
            ("fewer records than there are", 28, &[0, 0, 0, 2], ErrorKind::Damaged),
            ("more records than there are", 28, &[0xff; 4], ErrorKind::Damaged),
            ("a block twice", HEAD, &[0, 0, 0, 2], ErrorKind::Damaged),
            ("blocks in no order", HEAD, &[0, 0, 0, 3], ErrorKind::Damaged),
            ("a block that no disk has", HEAD + 2 * RECORD, &[1, 0, 0, 0], ErrorKind::Damaged),
        ] {
            assert_eq!(with(at, new), kind, "{what}");
        }
    }

    #[test]
    fn a_sidecar_of_too_many_blocks_has_the_first_of_them() {
        let record = |block| Record { block: BlockIndex(block), ..sidecar(&[0]).records[0] };
        let count = u32::try_from(MAX_RECORDS).unwrap();
        let bytes = Sidecar { records: (0..count + 3).map(record).collect(), ..sidecar(&[]) }.to_bytes();
        assert_eq!(bytes.len(), MAX_SIDECAR);
        assert_eq!(Sidecar::parse(&bytes).unwrap().records.last().unwrap().block, BlockIndex(count - 1));
    }
}
