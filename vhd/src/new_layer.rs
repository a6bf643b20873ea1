//! What a layer that is about to be written is: its identity, size and parent, and what its files say of that.
//!
//! Constructors refuse what Xen Orchestra would refuse, or worse: a disk whose uuid it cannot print has, to its cleaner, no
//! parent, and a parent without children is removed. No byte is written here.

use std::sync::Arc;

use uuid::{Uuid, Variant};

use crate::digest::Digest;
use crate::error::FormatError;
use crate::filter::Filter;
use crate::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::geometry::{BlockIndex, BlockSize, Chs, SECTOR};
use crate::header::{HEADER_BYTES, Header, PARENT_NAME_UNITS, ParentLocator};
use crate::layer::{Format, MAX_BLOCKS};
use crate::whole_block::WholeBlock;

/// Where Xen Orchestra puts the table of a VHD file: right behind footer and header. Exploded VHDs say the same.
pub(crate) const TABLE_OFFSET: u64 = (FOOTER_BYTES + HEADER_BYTES) as u64;

/// A layer to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLayer {
    uuid: Uuid,
    virtual_size: u64,
    timestamp: u32,
    parent: Option<(Uuid, String)>,
    block_size: BlockSize,
    block_count: u32,
}

/// A block as it is stored in one format: sector bitmap and data, through the filter.
#[derive(Debug, Clone)]
pub struct EncodedBlock {
    pub(crate) index: BlockIndex,
    pub(crate) format: Format,
    pub(crate) block_size: BlockSize,
    bytes: Bytes,
    pub(crate) digest: Option<Digest>,
}

/// The bytes of a block to be stored.
#[derive(Debug, Clone)]
enum Bytes {
    /// As they were read.
    Plain(Arc<WholeBlock>),
    Encoded(Vec<u8>),
}

impl EncodedBlock {
    /// Returns which block it is.
    #[must_use]
    pub fn index(&self) -> BlockIndex {
        self.index
    }

    /// Returns the format it can be stored in.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Has the digest of its data stored with it, from which it is known later without being read.
    #[must_use]
    pub fn with_digest(self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self }
    }

    /// Returns the bytes to be stored.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Plain(block) => block.bytes(),
            Bytes::Encoded(bytes) => bytes,
        }
    }

    /// Returns what it was made of, if it is stored as that.
    #[must_use]
    pub fn into_plain(self) -> Option<Arc<WholeBlock>> {
        match self.bytes {
            Bytes::Plain(block) => Some(block),
            Bytes::Encoded(_) => None,
        }
    }
}

impl NewLayer {
    /// Describes a disk without a parent, in blocks of 2 MiB.
    ///
    /// `uuid` is that of the snapshot whose bytes it will hold: the next backup finds its parent by it. `virtual_size` is in
    /// bytes, `timestamp` in seconds since 1970, as Xen Orchestra counts.
    ///
    /// # Errors
    /// `Unsupported` if the uuid is not of RFC 4122, version 1 to 5, or the size is 0 or more than 2^24 blocks.
    pub fn new(uuid: Uuid, virtual_size: u64, timestamp: u32) -> Result<Self, FormatError> {
        check_uuid("disk", uuid)?;
        if virtual_size == 0 {
            return Err(FormatError::unsupported("a disk of at least one byte was expected, this one has none"));
        }
        let layer =
            Self { uuid, virtual_size, timestamp, parent: None, block_size: BlockSize::DEFAULT, block_count: 0 };
        layer.with_block_size(BlockSize::DEFAULT)
    }

    /// Makes it hold only what differs from a parent, which lies in the same folder and is called `name` there: the alias of
    /// an exploded VHD, the VHD file else.
    ///
    /// # Errors
    /// `Unsupported` if the parent's uuid is the layer's own or none that the layer could have, or the name is not that of a
    /// VHD in the same folder or longer than 256 UTF-16 code units.
    pub fn child_of(self, uuid: Uuid, name: &str) -> Result<Self, FormatError> {
        check_uuid("parent", uuid)?;
        if uuid == self.uuid {
            let reason = format!("a parent of another identity was expected, both the disk and its parent are {uuid}");
            return Err(FormatError::unsupported(reason));
        }
        let shown = name.escape_debug();
        if name.contains(['/', '\0']) || !name.ends_with(".vhd") {
            let reason = format!("the name of a VHD in the same folder was expected for the parent, not '{shown}'");
            return Err(FormatError::unsupported(reason));
        }
        let units = name.encode_utf16().count();
        if units > PARENT_NAME_UNITS {
            return Err(FormatError::unsupported(format!(
                "the name of a parent has at most {PARENT_NAME_UNITS} UTF-16 code units, '{shown}' has {units}"
            )));
        }
        Ok(Self { parent: Some((uuid, name.to_owned())), ..self })
    }

    /// Gives it blocks of another size, which Xen Orchestra cannot read: for tests.
    ///
    /// # Errors
    /// `Unsupported` if the disk has more than 2^24 of them.
    pub fn with_block_size(self, block_size: BlockSize) -> Result<Self, FormatError> {
        let count = block_size.block_count(self.virtual_size);
        let block_count = u32::try_from(count).ok().filter(|_| count <= MAX_BLOCKS).ok_or_else(|| {
            let (size, block) = (self.virtual_size, block_size.bytes());
            FormatError::unsupported(format!(
                "a disk of at most {MAX_BLOCKS} blocks of {block} bytes was expected, this one has {size} bytes"
            ))
        })?;
        Ok(Self { block_size, block_count, ..self })
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Returns the number of blocks that cover the disk.
    #[must_use]
    pub fn block_count(&self) -> u32 {
        self.block_count
    }

    /// Returns the size of a block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Returns the footer, as Xen Orchestra writes it (vhd-lib, `_createFooterHeader.js`).
    #[must_use]
    pub fn footer(&self) -> Footer {
        Footer {
            features: 2,
            data_offset: FOOTER_BYTES as u64,
            timestamp: self.timestamp,
            creator: *b"xo  ",
            creator_version: 0,
            creator_host_os: *b"Wi2k",
            original_size: self.virtual_size,
            current_size: self.virtual_size,
            chs: Chs::of_size(self.virtual_size),
            disk_type: if self.parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic },
            uuid: self.uuid,
        }
    }

    /// Returns the header, as Xen Orchestra writes it: an entry for each block, and no locators.
    #[must_use]
    pub fn header(&self) -> Header {
        Header {
            table_offset: TABLE_OFFSET,
            max_table_entries: self.block_count,
            block_size: self.block_size,
            parent_uuid: self.parent.as_ref().map(|(uuid, _)| *uuid),
            parent_timestamp: 0,
            parent_name: self.parent.as_ref().map(|(_, name)| name.clone()).unwrap_or_default(),
            locators: [ParentLocator::default(); 8],
        }
    }

    /// Makes the bytes of a block as they are stored in `format`; what lies past the end of the disk is stored as zeroes. Nothing is
    /// copied where they are those of the block.
    ///
    /// # Errors
    /// `Damaged` if the disk has no such block, blocks of another size, or less than a whole block was given; of the last one, what
    /// lies past the end may be left out.
    pub fn encode(
        &self,
        format: Format,
        index: BlockIndex,
        block: &Arc<WholeBlock>,
    ) -> Result<EncodedBlock, FormatError> {
        if index.0 >= self.block_count {
            let (index, count) = (index.0, self.block_count);
            return Err(FormatError::damaged(format!("a disk of {count} blocks was expected to hold block {index}")));
        }
        let block_size = self.block_size;
        let left = self.virtual_size - u64::from(index.0) * block_size.bytes();
        let used = usize::try_from(left).unwrap_or(usize::MAX).min(block_size.len());
        let given = block.given();
        if block.block_size() != block_size || given != used && given != block_size.len() {
            let index = index.0;
            return Err(FormatError::damaged(format!("block {index}: {used} bytes were expected, {given} were given")));
        }
        let clipped = match block.data()[used..].iter().any(|byte| *byte != 0) {
            true => Some(Arc::new(WholeBlock::copy_of(&block.data()[..used], block_size)?)),
            false => None,
        };
        let block = clipped.as_ref().unwrap_or(block);
        let bytes = match format {
            Format::File | Format::Exploded(Filter::None) => Bytes::Plain(block.clone()),
            Format::Exploded(filter) => Bytes::Encoded(filter.encode(block.bytes())),
        };
        Ok(EncodedBlock { index, format, block_size, bytes, digest: None })
    }
}

/// Returns the size in bytes of a VHD file of `entries` table entries that holds `blocks` blocks: what Xen Orchestra calls
/// the size of a layer in either format (vhd-lib, `VhdAbstract.js`, `streamSize`).
#[must_use]
pub fn equivalent_size(block_size: BlockSize, entries: u32, blocks: u32) -> u64 {
    let full_bytes = block_size.bytes() + block_size.bitmap_bytes() as u64;
    TABLE_OFFSET + table_bytes(entries) + u64::from(blocks) * full_bytes + FOOTER_BYTES as u64
}

/// Returns the room of a table in a VHD file: whole sectors, at least one.
pub(crate) fn table_bytes(entries: u32) -> u64 {
    (u64::from(entries) * 4).next_multiple_of(SECTOR).max(SECTOR)
}

/// Refuses what Xen Orchestra cannot print: then the links of a chain are ignored, and what looks unused is removed.
fn check_uuid(whose: &str, uuid: Uuid) -> Result<(), FormatError> {
    if uuid.get_variant() == Variant::RFC4122 && (1..=5).contains(&uuid.get_version_num()) {
        return Ok(());
    }
    let reason = format!("a uuid of RFC 4122, version 1 to 5, was expected for the {whose}, not {uuid}");
    Err(FormatError::unsupported(reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const UUID: Uuid = Uuid::from_u128(0x0123_4567_89ab_4cde_8f01_2345_6789_abcd);
    const PARENT: Uuid = Uuid::from_u128(0xfedc_ba98_7654_4321_8fed_cba9_8765_4321);

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    // What vhd-lib writes for these disks.
    #[test]
    fn footer_and_header_are_those_of_xen_orchestra() {
        let layer = NewLayer::new(UUID, 10 << 20, 0x6a6d_3700).unwrap();
        let expected = concat!(
            "636f6e6563746978000000020001000000000000000002006a6d3700786f2020",
            "000000005769326b0000000000a000000000000000a00000012e041100000003",
            "fffff0f60123456789ab4cde8f0123456789abcd00000000"
        );
        let footer = layer.footer().to_bytes();
        assert_eq!((hex(&footer[..88]).as_str(), &footer[88..]), (expected, &[0; 424][..]));
        assert_eq!(layer.header().parent_uuid, None);

        let child = layer.child_of(PARENT, "20260801T000000Z.alias.vhd").unwrap();
        let expected = concat!(
            "6378737061727365ffffffffffffffff00000000000006000001000000000005",
            "00200000ffffe4cffedcba98765443218fedcba9876543210000000000000000",
            "0032003000320036003000380030003100540030003000300030003000300",
            "05a002e0061006c006900610073002e0076006800640000"
        );
        let header = child.header().to_bytes();
        assert_eq!((hex(&header[..118]).as_str(), &header[118..]), (expected, &[0; 906][..]));
        assert_eq!(child.footer().disk_type, DiskType::Differencing);
    }

    #[test]
    fn a_uuid_that_xen_orchestra_cannot_print_is_refused() {
        let good = 0x0123_4567_89ab_4cde_8f01_2345_6789_abcd_u128;
        for (uuid, is_good) in [
            (good, true),
            (good & !(0xf << 76) | 1 << 76, true),
            (good & !(0xf << 76) | 5 << 76, true),
            (good & !(0xf << 76), false),
            (good & !(0xf << 76) | 6 << 76, false),
            (good & !(0xf << 76) | 7 << 76, false),
            (good & !(0xf << 60) | 0xb << 60, true),
            (good & !(0xf << 60) | 0xc << 60, false),
            (good & !(0xf << 60) | 0x7 << 60, false),
            (0, false),
            (u128::MAX, false),
        ] {
            let uuid = Uuid::from_u128(uuid);
            assert_eq!(NewLayer::new(uuid, 512, 0).is_ok(), is_good, "{uuid}");
            let layer = NewLayer::new(PARENT, 512, 0).unwrap();
            assert_eq!(layer.child_of(uuid, "a.vhd").is_ok(), is_good, "{uuid}");
        }
    }

    #[test]
    fn sizes_and_parents_that_cannot_be_are_refused() {
        let kind = |result: Result<NewLayer, FormatError>| result.unwrap_err().kind;
        let layer = NewLayer::new(UUID, MAX_BLOCKS << 21, 0).unwrap();
        assert_eq!(layer.block_count(), 1 << 24);
        for size in [0, (MAX_BLOCKS << 21) + 1, u64::MAX] {
            assert_eq!(kind(NewLayer::new(UUID, size, 0)), ErrorKind::Unsupported, "{size}");
        }
        assert_eq!(kind(layer.clone().with_block_size(BlockSize::MIN)), ErrorKind::Unsupported);
        let longest = format!("😀{}.vhd", "a".repeat(250));
        assert_eq!(layer.clone().child_of(PARENT, &longest).unwrap().header().parent_name, longest);
        for name in [format!("a{longest}"), "../a.vhd".into(), "/a.vhd".into(), "a\0.vhd".into(), "a".into(), "".into()]
        {
            assert_eq!(kind(layer.clone().child_of(PARENT, &name)), ErrorKind::Unsupported, "{name:?}");
        }
        assert_eq!(kind(layer.child_of(UUID, "a.vhd")), ErrorKind::Unsupported);
    }

    #[test]
    fn the_size_is_that_of_the_file_xen_orchestra_would_write() {
        for ((entries, blocks), size) in
            [((2561, 5), 10_501_120), ((6, 3), 6_295_552), ((1, 0), 2560), ((128, 0), 2560)]
        {
            assert_eq!(equivalent_size(BlockSize::DEFAULT, entries, blocks), size, "{entries}, {blocks}");
        }
        assert_eq!(equivalent_size(BlockSize::DEFAULT, 129, 0), 3072);
    }

    #[test]
    fn a_block_is_stored_with_a_bitmap_of_ones_and_zeroes_past_the_end() {
        let block_size = BlockSize::new(4096).unwrap();
        let layer = NewLayer::new(UUID, 5000, 0).unwrap().with_block_size(block_size).unwrap();
        let last = [&[0xff; 512][..], &[7; 904], &[0; 3192]].concat();
        for format in [Format::File, Format::Exploded(Filter::None), Format::Exploded(Filter::Gzip)] {
            for data in [vec![7; 904], vec![7; 4096]] {
                let block = Arc::new(WholeBlock::copy_of(&data, block_size).unwrap());
                let encoded = layer.encode(format, BlockIndex(1), &block).unwrap();
                let plain = match format {
                    Format::Exploded(filter) => filter.decode(encoded.bytes(), 4608).unwrap(),
                    Format::File => encoded.bytes().to_vec(),
                };
                assert_eq!((plain, encoded.format()), (last.clone(), format));
            }
            for (index, len) in [(0, 4095), (0, 904), (0, 4097), (1, 903), (1, 905), (1, 0), (2, 4096)] {
                let block = WholeBlock::copy_of(&vec![7; len], block_size);
                let refused = block.and_then(|block| layer.encode(format, BlockIndex(index), &Arc::new(block)));
                assert_eq!(refused.unwrap_err().kind, ErrorKind::Damaged, "{index}: {len}");
            }
        }
    }
}
