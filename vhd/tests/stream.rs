//! A VHD that comes over a connection is taken whole and right, or refused at the byte where it is wrong.

use std::io::{self, Read};
use std::sync::Arc;

use disk::{Disk, Extent};
use uuid::Uuid;
use vhd::{
    BlockIndex, BlockSize, Chs, DiskType, Footer, Header, ParentLocator, StreamError, StreamErrorKind, StreamReader,
    VhdView,
};

const BLOCK: usize = 2 << 20;
/// What a block takes.
const FULL: usize = 512 + BLOCK;
const ABSENT: u32 = u32::MAX;

/// A stream to be made: its size, its blocks in the order they come, each with what its bytes are made of.
#[derive(Clone)]
struct Stream {
    size: u64,
    entries: u32,
    creator: [u8; 4],
    table_at: u64,
    is_differencing: bool,
    gap: usize,
    blocks: Vec<(u32, u8)>,
    bitmap: u8,
}

impl Stream {
    /// As XAPI makes one.
    fn of_xapi(size: u64, blocks: &[u32]) -> Self {
        let entries = u32::try_from(size.div_ceil(BLOCK as u64)).unwrap();
        let blocks = blocks.iter().map(|block| (*block, u8::try_from(block % 200 + 1).unwrap())).collect();
        let (creator, is_differencing) = (*b"caml", false);
        Self { size, entries, creator, table_at: 2048, is_differencing, gap: 0, blocks, bitmap: 0xff }
    }

    fn footer(&self) -> [u8; 512] {
        Footer {
            features: 2,
            data_offset: 512,
            timestamp: 0,
            creator: self.creator,
            creator_version: 1,
            creator_host_os: [0; 4],
            original_size: self.size,
            current_size: self.size,
            chs: Chs::of_size(self.size),
            disk_type: if self.is_differencing { DiskType::Differencing } else { DiskType::Dynamic },
            uuid: Uuid::from_u128(77),
        }
        .to_bytes()
    }

    fn header(&self) -> Header {
        let mut locators = [ParentLocator::default(); 8];
        if self.is_differencing {
            locators[0] = ParentLocator { platform_code: *b"MacX", space: 1, length: 20, offset: 1536 };
        }
        Header {
            table_offset: self.table_at,
            max_table_entries: self.entries,
            block_size: BlockSize::DEFAULT,
            parent_uuid: self.is_differencing.then(|| Uuid::from_u128(5)),
            parent_timestamp: 0,
            parent_name: if self.is_differencing { "/dev/sm/backend/a".to_owned() } else { String::new() },
            locators,
        }
    }

    fn table_end(&self) -> usize {
        usize::try_from(self.table_at).unwrap() + (usize::try_from(self.entries).unwrap() * 4).next_multiple_of(512)
    }

    /// Where the bitmap of the n-th block that comes is.
    fn place(&self, index: usize) -> usize {
        self.table_end() + index * (FULL + self.gap) + self.gap
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [&self.footer()[..], &self.header().to_bytes()].concat();
        bytes.resize(usize::try_from(self.table_at).unwrap(), 0);
        let mut table = vec![ABSENT; usize::try_from(self.entries).unwrap()];
        for (index, (block, _)) in self.blocks.iter().enumerate() {
            table[usize::try_from(*block).unwrap()] = u32::try_from(self.place(index) / 512).unwrap();
        }
        bytes.extend(table.iter().flat_map(|entry| entry.to_be_bytes()));
        bytes.resize(self.table_end(), 0xff);
        for (_, byte) in &self.blocks {
            bytes.extend(vec![0xee; self.gap]);
            bytes.extend([self.bitmap; 512]);
            bytes.extend(block(*byte));
        }
        bytes.extend(self.footer());
        bytes
    }
}

/// The content of a block: no two sectors are the same.
fn block(byte: u8) -> Vec<u8> {
    let mut block = vec![byte; BLOCK];
    for (number, sector) in (0_u16..).zip(block.chunks_mut(512)) {
        sector[..2].copy_from_slice(&number.to_be_bytes());
    }
    block
}

/// Numbers that look random and are the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(limit).unwrap()).unwrap()
    }
}

/// Bytes in pieces of all lengths, with interruptions.
struct Pieces<'a> {
    bytes: &'a [u8],
    random: Random,
    /// How it ends, if not well.
    end: Option<io::ErrorKind>,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            return self.end.map_or(Ok(0), |end| Err(end.into()));
        }
        let longest = [1, 100, 5000, 1 << 20][self.random.below(4)];
        match self.random.below(longest + 1).min(buffer.len()).min(self.bytes.len()) {
            0 => Err(io::ErrorKind::Interrupted.into()),
            len => {
                let (part, rest) = self.bytes.split_at(len);
                buffer[..len].copy_from_slice(part);
                self.bytes = rest;
                Ok(len)
            }
        }
    }
}

type Blocks = Vec<(u32, Vec<u8>)>;

fn read(source: impl Read) -> Result<Blocks, StreamError> {
    let mut reader = StreamReader::open(source)?;
    let (mut blocks, mut buffer) = (Vec::new(), vec![0xaa; BLOCK]);
    let announced: Vec<_> = reader.blocks().map(|(block, _)| block).collect();
    while let Some(BlockIndex(index)) = reader.next_block(&mut buffer)? {
        assert_eq!(announced[blocks.len()], BlockIndex(index));
        blocks.push((index, buffer.clone()));
    }
    assert_eq!((announced.len(), reader.bytes_read()), (blocks.len(), reader.total_bytes()));
    assert_eq!(reader.next_block(&mut buffer).unwrap(), None);
    Ok(blocks)
}

fn error(bytes: &[u8]) -> StreamError {
    read(bytes).expect_err("it is wrong")
}

#[track_caller]
fn assert_refused(bytes: &[u8], at: usize, kind: StreamErrorKind, part: &str) {
    let error = error(bytes);
    assert!(error.kind() == kind && error.to_string().contains(part), "{:?} {error}", error.kind());
    assert_eq!(error.at(), at as u64, "{error}");
}

#[test]
fn a_stream_of_xapi_is_read_to_its_last_byte() {
    for is_differencing in [false, true] {
        let size = 200 * BLOCK as u64 + 512;
        let stream = Stream { is_differencing, ..Stream::of_xapi(size, &[0, 7, 8, 200]) };
        let bytes = stream.bytes();
        let reader = StreamReader::open(&bytes[..]).unwrap();
        assert_eq!((reader.virtual_size(), reader.is_differencing()), (size, is_differencing));
        assert_eq!((reader.footer().uuid, reader.header().max_table_entries), (Uuid::from_u128(77), 201));
        // 2048 + 201 entries in two sectors.
        let places =
            [0, 7, 8, 200].iter().zip(0..).map(|(block, index)| (BlockIndex(*block), 3072 + index * FULL as u64));
        assert!(reader.blocks().eq(places));
        assert_eq!((reader.bytes_read(), reader.total_bytes()), (3072, 3072 + 4 * FULL as u64 + 512));
        assert_eq!(reader.into_source().len(), bytes.len() - 3072);
        let expected: Blocks = [(0, block(1)), (7, block(8)), (8, block(9)), (200, block(1))].into();
        assert!(read(&bytes[..]).unwrap() == expected);
        // A connection that ends without a farewell ends all the same.
        for end in [None, Some(io::ErrorKind::UnexpectedEof)] {
            for seed in 1..4 {
                assert!(read(Pieces { bytes: &bytes, random: Random(seed), end }).unwrap() == expected, "{seed}");
            }
        }
    }
}

#[test]
fn a_disk_without_blocks_or_bytes_is_a_stream_too() {
    for size in [0, 1 << 40] {
        let bytes = Stream::of_xapi(size, &[]).bytes();
        assert_eq!(StreamReader::open(&bytes[..]).unwrap().total_bytes(), bytes.len() as u64);
        assert_eq!(read(&bytes[..]).unwrap(), []);
    }
}

#[test]
fn layouts_of_others_are_read_as_they_come() {
    let stream = Stream { creator: *b"qemu", table_at: 1536, ..Stream::of_xapi(9 * BLOCK as u64, &[8, 0, 3]) };
    let expected: Blocks = [(8, block(9)), (0, block(1)), (3, block(4))].into();
    assert!(read(&stream.bytes()[..]).unwrap() == expected);
    let with_gaps = Stream { gap: 3584, entries: 300, ..stream.clone() };
    assert!(read(&with_gaps.bytes()[..]).unwrap() == expected);
    // Sectors that are not there read as zeroes, where nothing is below.
    let halves = Stream { bitmap: 0xaa, ..stream.clone() };
    for (index, bytes) in read(&halves.bytes()[..]).unwrap() {
        let whole = block(u8::try_from(index + 1).unwrap());
        for (sector, (found, stored)) in bytes.chunks(512).zip(whole.chunks(512)).enumerate() {
            assert!(if sector % 2 == 0 { found == stored } else { found == [0; 512] }, "{index} {sector}");
        }
    }
    let halves = Stream { is_differencing: true, ..halves };
    assert_refused(
        &halves.bytes(),
        halves.place(0),
        StreamErrorKind::Unsupported,
        "sector 1 of block 8 is another disk's",
    );
    // What XAPI never does is no stream of it.
    let in_disorder = Stream { creator: *b"caml", ..stream };
    assert_refused(&in_disorder.bytes(), 1536, StreamErrorKind::Damaged, "block 0 was expected at byte");
    let with_gaps = Stream { gap: 512, ..Stream::of_xapi(9 * BLOCK as u64, &[2]) };
    assert_refused(&with_gaps.bytes(), 2056, StreamErrorKind::Damaged, "block 2 was expected at byte 2560");
}

/// A disk of which each second block has data.
struct Striped(Vec<u8>);

impl Disk for Striped {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let at = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        let (within, is_hole) = (offset % BLOCK as u64, offset / BLOCK as u64 % 2 == 1);
        Ok(Extent { len: (BLOCK as u64 - within).min(self.size() - offset), is_hole })
    }
}

#[test]
fn the_view_of_a_disk_is_such_a_stream() {
    let mut content = [block(1), vec![0; BLOCK], block(3), vec![0; BLOCK]].concat();
    content.extend(&block(5)[..1536]);
    let view = VhdView::new(Arc::new(Striped(content)), Uuid::from_u128(9), 0).unwrap();
    let mut bytes = vec![0; usize::try_from(view.size()).unwrap()];
    view.read_at(0, &mut bytes).unwrap();
    let last = [&block(5)[..1536], &vec![0; BLOCK - 1536]].concat();
    assert!(read(&bytes[..]).unwrap() == [(0, block(1)), (2, block(3)), (4, last)]);
    assert_eq!(StreamReader::open(&bytes[..]).unwrap().virtual_size(), 4 * BLOCK as u64 + 1536);
}

#[test]
fn a_stream_that_is_cut_off_anywhere_says_where() {
    let stream = Stream::of_xapi(3 * BLOCK as u64, &[0, 2]);
    let bytes = stream.bytes();
    let structure =
        (0..2560 + 520).step_by(29).chain([2560 + 511, 2560 + 512, 2560 + FULL - 1, 2560 + FULL, 2560 + FULL + 1]);
    for len in structure.chain((bytes.len() - 520..bytes.len()).step_by(13)) {
        let error = error(&bytes[..len]);
        assert_eq!((error.kind(), error.at()), (StreamErrorKind::Damaged, len as u64), "{error}");
        assert!(error.to_string().contains("cut off"), "{error}");
    }
    let mut longer = bytes.clone();
    for more in [1, 511, 512, 4096] {
        longer.resize(bytes.len() + more, 0);
        assert_refused(&longer, bytes.len(), StreamErrorKind::Damaged, "there is more");
    }
}

#[test]
fn a_page_of_an_error_is_told_wherever_it_is_glued_in() {
    let page = b"HTTP/1.1 500 Internal Error\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<html><body><h1>HTTP 500 internal \
        server error</h1>An unexpected error occurred: <pre>VDI_IO_ERROR:\x1b[2J [ Device I/O errors ]</pre></body></html>";
    let long = [&page[..], &[b' '; 3000]].concat();
    let bytes = Stream::of_xapi(3 * BLOCK as u64, &[0, 2]).bytes();
    let ends =
        [0, 512, 1536, 2048, 2560, 3072, 3073, 500_000, 2560 + FULL - 1, 2560 + FULL, bytes.len() - 512, bytes.len()];
    for end in ends.into_iter().chain([1, 600, 1600, 2050]) {
        for len in [40, page.len(), page.len() + 300, page.len() + 3000] {
            let glued = [&bytes[..end], &long[..len]].concat();
            assert_refused(
                &glued,
                end,
                StreamErrorKind::Page,
                "the server failed, and says 'HTTP/1.1 500 Internal Error: ",
            );
            if len >= page.len() {
                let error = error(&glued).to_string();
                assert!(
                    error.contains("An unexpected error occurred: VDI_IO_ERROR:\\u{1b}[2J [ Device I/O errors ]'"),
                    "{error}"
                );
            }
        }
    }
    // A disk may hold such a page.
    let mut on_disk = bytes.clone();
    on_disk[3072..3072 + page.len()].copy_from_slice(page);
    assert_eq!(read(&on_disk[..]).unwrap().len(), 2);
}

#[test]
fn what_cannot_be_is_refused_before_memory_is_taken_for_it() {
    let sound = Stream::of_xapi(9 * BLOCK as u64, &[0, 3]);
    let header = |change: fn(&mut Header)| {
        let (mut bytes, mut header) = (sound.bytes(), sound.header());
        change(&mut header);
        bytes[512..1536].copy_from_slice(&header.to_bytes());
        bytes
    };
    let (damaged, unsupported) = (StreamErrorKind::Damaged, StreamErrorKind::Unsupported);
    assert_refused(&header(|it| it.max_table_entries = 8), 512, damaged, "a table of 9 to 4194304 entries");
    assert_refused(&header(|it| it.max_table_entries = u32::MAX), 512, damaged, "the header says 4294967295");
    assert_refused(&header(|it| it.table_offset = 1024), 512, damaged, "the table was expected at 1536");
    assert_refused(&header(|it| it.table_offset = 2049), 512, damaged, "the header says 2049");
    assert_refused(&header(|it| it.table_offset = (1 << 63) - 512), 512, damaged, "the table was expected");
    assert_refused(&header(|it| it.block_size = BlockSize::MIN), 512, unsupported, "blocks of 2097152 bytes");
    let footer = |change: fn(&mut Footer)| {
        let (mut bytes, end) = (sound.bytes(), sound.bytes().len() - 512);
        let mut footer = Footer::parse(bytes[..512].try_into().unwrap()).unwrap();
        change(&mut footer);
        bytes[..512].copy_from_slice(&footer.to_bytes());
        bytes[end..].copy_from_slice(&footer.to_bytes());
        bytes
    };
    assert_refused(&footer(|it| it.disk_type = DiskType::Fixed), 0, unsupported, "this one is fixed");
    assert_refused(&footer(|it| it.data_offset = 1024), 0, unsupported, "the footer says 1024");
    assert_refused(&footer(|it| it.current_size = (1 << 63) - 1), 512, damaged, "a table of");
    // A disk that ends in front of one of its blocks.
    assert_refused(
        &footer(|it| it.current_size = 3 * BLOCK as u64),
        2060,
        damaged,
        "the disk has 3 blocks, and the table something for a block 3",
    );
    assert_eq!(read(&footer(|it| it.current_size = 3 * BLOCK as u64 + 1)[..]).unwrap().len(), 2);
    let error = read(Pieces { bytes: &[], random: Random(1), end: Some(io::ErrorKind::TimedOut) }).unwrap_err();
    assert_eq!((error.kind(), error.at()), (StreamErrorKind::Read, 0));
}

#[test]
fn each_byte_of_structure_counts_in_a_stream_of_xapi() {
    for is_differencing in [false, true] {
        let stream = Stream { is_differencing, ..Stream::of_xapi(3 * BLOCK as u64 - 512, &[0, 2]) };
        let mut bytes = stream.bytes();
        let bitmaps = (0..2).flat_map(|index| stream.place(index)..stream.place(index) + 512);
        for at in (0..2560).chain(bitmaps).chain(bytes.len() - 512..bytes.len()).step_by(13) {
            let (sound, bit) = (bytes[at], 1 << (at % 8));
            bytes[at] ^= bit;
            let error = error(&bytes);
            assert!(error.at().abs_diff(at as u64) <= 1024, "byte {at}: {error}");
            bytes[at] = sound;
        }
        assert_eq!(read(&bytes[..]).unwrap().len(), 2);
    }
}

#[test]
fn pieces_that_are_lost_doubled_or_moved_never_pass() {
    let stream = Stream::of_xapi(4 * BLOCK as u64, &[0, 1, 3]);
    let bytes = stream.bytes();
    for seed in 1..60 {
        let mut random = Random(seed * 0x9e37_79b9);
        let longest = [8, 700, FULL][random.below(3)];
        let (from, len) = (random.below(bytes.len()), 1 + random.below(longest));
        let (from, len) =
            if random.below(2) == 0 { (from, len) } else { (from / 512 * 512, len.next_multiple_of(512)) };
        let end = bytes.len().min(from + len);
        let changed = match random.below(3) {
            0 => [&bytes[..from], &bytes[end..]].concat(),
            1 => [&bytes[..end], &bytes[from..]].concat(),
            _ => [&bytes[end..], &bytes[..end]].concat(),
        };
        if changed != bytes {
            assert!(read(&changed[..]).is_err(), "seed {seed}: {from} {len}");
        }
    }
}

#[test]
fn any_set_of_blocks_comes_back() {
    for seed in 1..40_u64 {
        let mut random = Random(seed * 0x2545_f491);
        let count = 1 + random.below(300);
        let size = count as u64 * BLOCK as u64 - random.below(BLOCK / 512) as u64 * 512;
        let mut blocks: Vec<u32> = (0..6).map(|_| u32::try_from(random.below(count)).unwrap()).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut stream = Stream::of_xapi(size, &blocks);
        if random.below(2) == 0 {
            stream = Stream { creator: *b"tap\0", table_at: 1536, gap: 512 * random.below(9), ..stream };
            let turn = random.below(stream.blocks.len());
            stream.blocks.rotate_left(turn);
            stream.entries += u32::try_from(random.below(500)).unwrap();
        }
        let expected: Blocks = stream.blocks.iter().map(|(index, byte)| (*index, block(*byte))).collect();
        let bytes = stream.bytes();
        let found = read(Pieces { bytes: &bytes, random, end: None }).unwrap();
        assert!(found == expected, "seed {seed}");
    }
}
