//! A footer or a header of any bytes, and images that have it.

use std::sync::Arc;

use disk::Disk;
use storage::MemoryStorage;
use vhd::{DiskType, Footer, Header};

use crate::builder::{BLOCK, Image, Kind, id, open};
use crate::flat;

const SIZE: u64 = 3 * BLOCK as u64 - 700;

/// Makes the cookie, the version and the sum right, which a fuzzer does not find.
fn mend<const N: usize>(bytes: &mut [u8; N], cookie: &[u8; 8], version_at: usize, sum_at: usize) {
    bytes[..8].copy_from_slice(cookie);
    bytes[version_at..version_at + 4].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
    bytes[sum_at..sum_at + 4].fill(0);
    let sum = !bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
}

/// A footer: parsed, written and parsed again it is the same, and what opens with it has the size it says.
pub fn footer(data: &[u8]) {
    let Some((raw, _)) = data.split_first_chunk::<512>() else { return };
    let mut mended = *raw;
    mend(&mut mended, b"conectix", 12, 64);
    for bytes in [*raw, mended] {
        let parsed = Footer::parse(&bytes);
        if let Ok(footer) = parsed {
            assert_eq!(Footer::parse(&footer.to_bytes()), Ok(footer));
            assert_eq!(footer.virtual_size().to_be_bytes(), bytes[48..56]);
        }
        let image = Image::new(1, SIZE, &[(0, 1), (2, 3)]);
        let sound = image.flat();
        let end = sound.len() - 512;
        for (first, last) in [(true, true), (true, false), (false, true)] {
            let mut file = sound.clone();
            if first {
                file[..512].copy_from_slice(&bytes);
            }
            if last {
                file[end..].copy_from_slice(&bytes);
            }
            let storage = Arc::new(MemoryStorage::new());
            storage.put("a.vhd", file.clone()).expect("the name is free");
            // A parent it might name.
            Image::new(0, SIZE, &[(1, 9)]).put(&storage, "b");
            let Ok(disk) = open(&storage, "a.vhd") else { continue };
            let footers = [Footer::parse(&image.footer()).ok(), parsed.clone().ok()];
            let own = footers.into_iter().flatten().find(|footer| footer.virtual_size() == disk.size());
            let own = own.expect("the size is that of one of the footers");
            if own.disk_type == DiskType::Fixed && parsed.as_ref().is_ok_and(|parsed| *parsed == own) {
                let size = usize::try_from(own.virtual_size()).expect("no more than the file");
                let mut content = vec![0; size];
                disk.read_at(0, &mut content).expect("a fixed disk is there");
                assert!(content == file[..size], "a fixed disk is its file");
            } else {
                for at in [0, BLOCK as u64, disk.size().saturating_sub(1)] {
                    let _ = disk.read_at(at, &mut [0; 1]);
                }
            }
        }
        let storage = Arc::new(MemoryStorage::new());
        Image::new(1, SIZE, &[(0, 1), (2, 3)]).stored(Kind::Plain).put(&storage, "a");
        storage.overwrite("data/a.vhd/footer", bytes).expect("it was put there");
        if let Ok(disk) = open(&storage, "a.alias.vhd") {
            let footer = parsed.as_ref().expect("an exploded VHD has no other footer");
            assert!(footer.disk_type == DiskType::Dynamic, "its parent is nowhere");
            assert_eq!(disk.size(), footer.virtual_size());
            assert_eq!(disk.leaf().uuid, footer.uuid);
            let mut content = [0xee; 1];
            if disk.size() > 0 {
                disk.read_at(0, &mut content).expect("its block is there");
                assert_eq!(content, [1]);
            }
        }
    }
}

/// A header, and behind it the rest of a VHD file, which is read as the specification says, or not at all.
pub fn header(data: &[u8]) {
    let Some((raw, rest)) = data.split_first_chunk::<1024>() else { return };
    let mut mended = *raw;
    mend(&mut mended, b"cxsparse", 24, 36);
    for bytes in [*raw, mended] {
        let parsed = Header::parse(&bytes);
        if let Ok(header) = &parsed {
            assert_eq!(Header::parse(&header.to_bytes()).as_ref(), Ok(header));
        }
        let size = SIZE + u64::from(raw[0] % 2) * (8 << 10);
        for is_child in [false, true] {
            let storage = Arc::new(MemoryStorage::new());
            let mut image = Image::new(1, size, &[]);
            if is_child {
                image = image.child_of(2, "ignored");
            }
            let below = Image::new(2, SIZE, &[(0, 1), (1, 2)]);
            let mut content = Vec::new();
            for (name, number) in [("a", 1_u8), ("b", 2), ("data/c", 3)] {
                let mut image = Image::new(u128::from(number), SIZE, &[(0, number), (1, 7)]);
                if let Ok(header) = &parsed {
                    // The uuid it asks for is there three times, with its block size.
                    image.uuid = header.parent_uuid.unwrap_or_default();
                    let block = header.block_size.len();
                    if block <= 64 << 10 {
                        image.blocks = vec![(0, vec![number; block])];
                        image.block = block;
                    }
                }
                let mut own = vec![0; usize::try_from(SIZE).expect("small")];
                own.iter_mut().take(image.blocks[0].1.len()).for_each(|byte| *byte = number);
                content.push(own);
                image.put(&storage, name);
            }
            drop(below);
            let footer = image.footer();
            let file = [&footer[..], &bytes, rest, &footer].concat();
            storage.put("x.vhd", file.clone()).expect("the name is free");
            let Ok(disk) = open(&storage, "x.vhd") else { continue };
            let header = parsed.as_ref().expect("it has no other header");
            assert_eq!(disk.size(), size);
            assert_eq!(disk.block_size(), header.block_size.bytes());
            let layers = disk.layers().expect("it opened");
            let below = match layers.get(1).map(|layer| layer.data.as_str()) {
                None => {
                    assert!(!is_child, "a child has a parent");
                    Vec::new()
                }
                Some("a.vhd") => content[0].clone(),
                Some("b.vhd") => content[1].clone(),
                Some("data/c.vhd") => content[2].clone(),
                Some(other) => panic!("a parent that is not there: {other}"),
            };
            flat::check(&disk, &file, &below);
        }
    }
    let _ = id(0);
}
