//! VHD files read literally, byte by byte, as the specification says, to compare with.

use std::sync::Arc;

use disk::Disk;
use storage::MemoryStorage;
use vhd::ChainDisk;

use crate::builder::{Image, Kind, open};

const SECTOR: usize = 512;

/// The sectors of the disk in a VHD file; `None` where the file does not have what it promises.
struct Literal {
    sectors: Vec<Option<Vec<u8>>>,
    /// Whether all of the sector's block is in the file.
    is_block_whole: Vec<bool>,
}

fn number(file: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = file.get(at..at.checked_add(len)?)?;
    Some(bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

fn place(value: u64) -> usize {
    usize::try_from(value).expect("64 bits")
}

impl Literal {
    /// Reads a sound file of which footer and header stand at the start; `below` is the disk of its parent.
    fn of(file: &[u8], below: &[u8]) -> Self {
        let size = place(number(file, 48, 8).expect("a footer"));
        let table = place(number(file, 512 + 16, 8).expect("a header"));
        let block = place(number(file, 512 + 32, 4).expect("a header"));
        let bitmap = (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
        let (mut sectors, mut is_block_whole) = (Vec::new(), Vec::new());
        for at in (0..size).step_by(SECTOR) {
            let len = SECTOR.min(size - at);
            let entry = number(file, table + at / block * 4, 4).expect("the table was checked");
            let own = || {
                let start = place(entry) * SECTOR;
                let inside = at % block / SECTOR;
                file.get(start..start + bitmap)?;
                if file[start + inside / 8] & (0x80 >> (inside % 8)) == 0 {
                    return Some(None);
                }
                let data = start + bitmap + at % block;
                Some(Some(file.get(data..data + len)?.to_vec()))
            };
            let parents = || {
                let mut bytes = vec![0; len];
                let there = below.get(at..).unwrap_or_default();
                let there = &there[..len.min(there.len())];
                bytes[..there.len()].copy_from_slice(there);
                bytes
            };
            let sector = if entry == 0xffff_ffff { Some(None) } else { own() };
            sectors.push(sector.map(|own| own.unwrap_or_else(parents)));
            is_block_whole.push(entry == 0xffff_ffff || place(entry) * SECTOR + bitmap + block <= file.len());
        }
        Self { sectors, is_block_whole }
    }
}

/// Compares each sector of a disk, and all of it at once, with the file it is in.
pub fn check(disk: &ChainDisk, file: &[u8], below: &[u8]) {
    let literal = Literal::of(file, below);
    for (index, expected) in literal.sectors.iter().enumerate() {
        let at = (index * SECTOR) as u64;
        let mut found = vec![0xee; SECTOR.min(place(disk.size() - at))];
        match (disk.read_at(at, &mut found), expected) {
            (Ok(()), Some(expected)) => assert!(found == *expected, "sector {index}"),
            (Ok(()), None) => panic!("sector {index} is not in the file, but was read"),
            (Err(error), Some(_)) => assert!(!literal.is_block_whole[index], "sector {index}: {error}"),
            (Err(_), None) => {}
        }
        if disk.extent_at(at).expect("within the disk").is_hole {
            assert!(expected.as_ref().is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0)), "no hole: {index}");
        }
    }
    if literal.is_block_whole.iter().all(|is_whole| *is_whole) {
        let mut found = vec![0xee; place(disk.size())];
        disk.read_at(0, &mut found).expect("all of it is there");
        let expected: Vec<u8> = literal.sectors.iter().flatten().flatten().copied().collect();
        assert!(found == expected, "all at once");
    }
}

/// The number of blocks of the images below.
const BLOCKS: usize = 24;

/// A table of any content: of a VHD file, and of an exploded VHD.
pub fn bat(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let block = SECTOR << (first % 3);
    let size = (BLOCKS * block - usize::from(first / 3 % 4) * 300) as u64;
    let storage = Arc::new(MemoryStorage::new());
    let mut parent = Image::new(1, size, &[]);
    parent.block = block;
    parent.blocks = (0..8_u32).map(|index| (index * 3, vec![0x70 + index.to_be_bytes()[3]; block])).collect();
    parent.put(&storage, "a");
    let mut below = vec![0; place(size)];
    for (index, bytes) in &parent.blocks {
        let start = *index as usize * block;
        let end = (start + block).min(below.len());
        below[start..end].copy_from_slice(&bytes[..end - start]);
    }

    let mut image = Image::new(2, size, &[]).child_of(1, "a.vhd");
    image.block = block;
    let mut file = [&image.footer()[..], &image.header()].concat();
    let mut table = vec![0xff; (BLOCKS * 4).next_multiple_of(SECTOR)];
    for (index, entry) in data.chunks_exact(2).take(BLOCKS).enumerate() {
        let low = u16::from_be_bytes([entry[0], entry[1]]);
        // Mostly places in the file; the highest values stand for those far outside.
        let entry = match low {
            0xff00..=0xffff => u32::from(low) << 16 | 0xfffe,
            0x8000.. => u32::MAX,
            _ => u32::from(low) % 160,
        };
        table[index * 4..index * 4 + 4].copy_from_slice(&entry.to_be_bytes());
    }
    file.extend(&table);
    for index in 0..100_u8 {
        // Bitmaps and data alike: whatever the table calls which.
        file.extend((0..128).flat_map(|word: u8| [index, word, index ^ 0xa5, word.wrapping_mul(index)]));
    }
    file.extend(image.footer());
    storage.put("x.vhd", file.clone()).expect("the name is free");
    let mut used: Vec<usize> = table.chunks_exact(4).map(|entry| place(number(entry, 0, 4).expect("four"))).collect();
    used.truncate(BLOCKS);
    used.retain(|entry| *entry != 0xffff_ffff);
    used.sort_unstable();
    let full = 1 + block / SECTOR;
    let is_sound = used.windows(2).all(|pair| pair[1] - pair[0] >= full)
        && used.first().is_none_or(|first| first * SECTOR >= 1536 + BLOCKS * 4);
    match open(&storage, "x.vhd") {
        Ok(disk) => {
            assert!(is_sound, "blocks overlap");
            check(&disk, &file, &below);
        }
        Err(error) => assert!(!is_sound, "{error}"),
    }

    exploded_bat(*first, data);
}

/// An exploded VHD whose table is `data`, and of which the files of each block but every fifth are there.
fn exploded_bat(first: u8, data: &[u8]) {
    let block = SECTOR << (first % 3);
    let size = (BLOCKS * block) as u64;
    let storage = Arc::new(MemoryStorage::new());
    let kind = [Kind::Plain, Kind::Gzip, Kind::Brotli][usize::from(first / 12 % 3)];
    let mut image = Image::new(2, size, &[]).stored(kind);
    image.block = block;
    image.blocks =
        (0..24).filter(|index| index % 5 != 4).map(|index: u8| (index.into(), vec![index + 1; block])).collect();
    image.put(&storage, "a");
    let is_raw = first & 0x80 != 0;
    let stored = if is_raw { data.to_vec() } else { image.filtered(data) };
    storage.overwrite("data/a.vhd/bat", stored).expect("it was put there");
    let Ok(disk) = open(&storage, "a.alias.vhd") else {
        assert!(is_raw && kind != Kind::Plain || data.len() < BLOCKS / 8 || data.len() > 10_000, "a sound table");
        return;
    };
    for index in 0..BLOCKS {
        let mut found = vec![0xee; block];
        let outcome = disk.read_at((index * block) as u64, &mut found).is_ok();
        // What a compressed table decodes to is not said again here: it is one or the other.
        let is_listed = (!is_raw || kind == Kind::Plain).then(|| data[index / 8] & (0x80 >> (index % 8)) != 0);
        let is_hole = disk.extent_at((index * block) as u64).expect("within the disk").is_hole;
        assert!(is_listed.is_none_or(|is_listed| is_listed != is_hole), "block {index}");
        let number = u8::try_from(index).expect("few blocks");
        let expected = if is_hole { Some(0) } else { (number % 5 != 4).then_some(number + 1) };
        assert_eq!(outcome.then_some(found), expected.map(|byte| vec![byte; block]), "block {index}");
    }
}

/// The bitmaps of a chain of three VHD files, of any content, and reads anywhere.
pub fn bitmap(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let block = SECTOR << (first % 7);
    let (blocks, odd) = (3, usize::from(first / 7 % 4) * 333);
    let size = (blocks * block).saturating_sub(odd).max(1);
    let storage = Arc::new(MemoryStorage::new());
    let mut data = data.iter().copied();
    let mut below = Vec::new();
    let mut last = None;
    for layer in 0..3_u8 {
        let mut image = Image::new(u128::from(layer) + 1, size as u64, &[]);
        image.block = block;
        if layer > 0 {
            image = image.child_of(u128::from(layer), &format!("l{}.vhd", layer - 1));
        }
        let count = size.div_ceil(block);
        let held = data.next().unwrap_or(0xff);
        for index in (0..count).filter(|index| held >> index & 1 == 1) {
            let index = u8::try_from(index).expect("three blocks");
            let content =
                (0..block).map(|at| layer << 6 | index << 4 | u8::try_from(at / SECTOR % 16).expect("below 16"));
            image.blocks.push((index.into(), content.collect()));
        }
        let mut file = image.flat();
        let bitmap_len = image.bitmap().len();
        let used = (block / SECTOR).div_ceil(8);
        for number in 0..image.blocks.len() {
            let at = 2048 + number * (bitmap_len + block);
            for byte in &mut file[at..at + used] {
                *byte = data.next().unwrap_or(0xff);
            }
        }
        storage.put(&format!("l{layer}.vhd"), file.clone()).expect("the name is free");
        let disk = open(&storage, &format!("l{layer}.vhd")).expect("a sound chain");
        check(&disk, &file, &below);
        below = vec![0; size];
        disk.read_at(0, &mut below).expect("compared above");
        last = Some(disk);
    }
    let disk = last.expect("three layers");
    while let (Some(a), Some(b), Some(c)) = (data.next(), data.next(), data.next()) {
        let start = usize::from(u16::from_be_bytes([a, b])) % size;
        let len = (usize::from(c) * 37 + 1).min(size - start);
        let mut found = vec![0xee; len];
        disk.read_at(start as u64, &mut found).expect("a sound chain");
        assert!(found == below[start..start + len], "{len} bytes at {start}");
    }
}
