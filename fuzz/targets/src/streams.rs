//! A VHD that comes over a connection, with bytes changed.

use std::sync::OnceLock;

use uuid::Uuid;
use vhd::{BlockIndex, BlockSize, Chs, DiskType, Footer, Header, ParentLocator, StreamReader};

const BLOCK: usize = 2 << 20;
const TABLE_AT: usize = 2048;
/// The blocks of the sound stream, and its size in blocks.
const BLOCKS: [(usize, u8); 2] = [(1, 7), (4, 9)];
const COUNT: u32 = 5;
/// Where its first block begins.
const FIRST: usize = TABLE_AT + 512;

/// A sound stream of another writer than XAPI, whose structure may vary more.
fn sound() -> &'static [u8] {
    static SOUND: OnceLock<Vec<u8>> = OnceLock::new();
    SOUND.get_or_init(|| {
        let size = u64::from(COUNT) * BLOCK as u64;
        let footer = Footer {
            features: 2,
            data_offset: 512,
            timestamp: 0,
            creator: *b"fuzz",
            creator_version: 1,
            creator_host_os: [0; 4],
            original_size: size,
            current_size: size,
            chs: Chs::of_size(size),
            disk_type: DiskType::Dynamic,
            uuid: Uuid::from_u128(1),
        }
        .to_bytes();
        let header = Header {
            table_offset: TABLE_AT as u64,
            max_table_entries: COUNT,
            block_size: BlockSize::DEFAULT,
            parent_uuid: None,
            parent_timestamp: 0,
            parent_name: String::new(),
            locators: [ParentLocator::default(); 8],
        }
        .to_bytes();
        let mut bytes = [&footer[..], &header, &[0; 512], &[0xff; 512]].concat();
        for (index, byte) in BLOCKS {
            let sector = u32::try_from(bytes.len() / 512).expect("small");
            bytes[TABLE_AT + index * 4..][..4].copy_from_slice(&sector.to_be_bytes());
            bytes.extend([0xff; 512]);
            bytes.extend(vec![byte; BLOCK]);
        }
        bytes.extend(footer);
        bytes
    })
}

/// Makes the sum of a structure right, which a fuzzer does not find.
fn mend(bytes: &mut [u8], sum_at: usize) {
    bytes[sum_at..sum_at + 4].fill(0);
    let sum = !bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Any bytes as a stream; then the bytes as changes of a sound one, of which what is read to its end has the length that was
/// announced, and each block as it stands in the stream.
pub fn vhd_stream(data: &[u8]) {
    check(data);
    let Some((kind, data)) = data.split_first() else { return };
    let mut bytes = sound().to_vec();
    let places = [0, 512, 1536, TABLE_AT, FIRST, FIRST + 512 + BLOCK, bytes.len() - 512];
    for change in data.chunks_exact(4).take(600) {
        let at =
            places[usize::from(change[0]) % places.len()] + usize::from(u16::from_be_bytes([change[1], change[2]]));
        if let Some(byte) = bytes.get_mut(at) {
            *byte = change[3];
        }
    }
    if kind & 1 != 0 {
        mend(&mut bytes[..512], 64);
        mend(&mut bytes[512..1536], 36);
    }
    let end = bytes.len() - 512;
    if kind & 2 != 0 {
        bytes.copy_within(..512, end);
    }
    if kind & 4 != 0 {
        bytes.truncate(bytes.len() - usize::from(*kind) * 64);
    }
    check(&bytes);
}

fn check(bytes: &[u8]) {
    let Ok(mut reader) = StreamReader::open(bytes) else { return };
    let places: Vec<_> = reader.blocks().collect();
    let (mut index, mut buffer) = (0, vec![0xa5; BLOCK]);
    loop {
        match reader.next_block(&mut buffer) {
            Ok(Some(block)) => {
                let (expected, place) = places[index];
                assert_eq!(block, expected, "blocks come as announced");
                assert!(u64::from(block.0) * (BLOCK as u64) < reader.virtual_size(), "it lies in the disk");
                let place = usize::try_from(place).expect("it was read");
                for (sector, found) in buffer.chunks(512).enumerate() {
                    let is_there = bytes[place + sector / 8] & 0x80 >> (sector % 8) != 0;
                    let stored = &bytes[place + 512 + sector * 512..][..512];
                    assert!(if is_there { found == stored } else { found == [0; 512] }, "{block:?}, sector {sector}");
                }
                index += 1;
            }
            Ok(None) => {
                assert_eq!(index, places.len(), "all blocks have come");
                assert_eq!(reader.total_bytes(), bytes.len() as u64, "the length is the one announced");
                assert_eq!(bytes[..512], bytes[bytes.len() - 512..], "the footers are the same");
                assert_eq!(reader.next_block(&mut buffer).ok(), Some(None::<BlockIndex>));
                return;
            }
            Err(_) => {
                assert!(reader.next_block(&mut buffer).is_err(), "what is broken stays so");
                return;
            }
        }
    }
}
