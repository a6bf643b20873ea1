//! Archives damaged at random: what is read is the truth or an error, soon, and in little memory.
//!
//! The headers of a tar have a sum, the chunks none that a reader looks at; so a chunk whose own bytes were changed reads
//! as it is stored, and everything else is the truth or an error.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::io::Write;
use std::ops::Range;
use std::time::{Duration, Instant};

use builder::{CHUNK, File, Manner, chunks, content, entry, ova};
use xva::{Xva, describe};

/// Reading a megabyte or two takes far less.
const LONGEST: Duration = Duration::from_secs(5);

/// Numbers that look random and are the same in each run.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % limit.max(1)
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }
}

/// An archive of two disks, and where its headers stand.
struct Archive {
    bytes: Vec<u8>,
    disks: [Vec<u8>; 2],
    headers: Vec<usize>,
}

fn archive() -> Archive {
    // Short last chunks, so that there is little to read.
    let disks = [content("a.b", 1, 2 * CHUNK + 3000), content("c", 2, 70_000)];
    let names = ["Ref:3", "Ref:9"];
    let mut bytes = entry("ova.xml", ova(&[(names[0], disks[0].len()), (names[1], disks[1].len())]).as_bytes());
    let mut headers = vec![0];
    for (name, disk) in names.iter().zip(&disks) {
        let part = chunks(name, disk, &Manner::default());
        let is_header = |at: &usize| &part[*at + 257..*at + 262] == b"ustar";
        headers.extend((0..part.len()).step_by(512).filter(is_header).map(|at| bytes.len() + at));
        bytes.extend(part);
    }
    headers.push(bytes.len());
    bytes.extend([0; 1024]);
    Archive { bytes, disks, headers }
}

/// Changes a few bytes, mostly of headers; returns the range in which bytes differ or moved.
fn change(archive: &Archive, random: &mut Random) -> (Vec<u8>, Range<usize>) {
    let mut bytes = archive.bytes.clone();
    let len = bytes.len();
    let header = archive.headers[random.below(archive.headers.len())];
    let at = if random.below(8) == 0 { random.below(len) } else { (header + random.below(512)).min(len - 1) };
    match random.below(8) {
        0 | 1 => {
            bytes[at] ^= 1 << random.below(8);
            (bytes, at..at + 1)
        }
        2 => {
            // A field of the header: size, checksum, name, kind, prefix.
            let (start, width) = [(124, 12), (148, 8), (0, 20), (156, 1), (345, 10), (257, 8)][random.below(6)];
            let fill = [0, 0xff, b'7', b'0', b' ', 0x80][random.below(6)];
            let range = (header + start).min(len)..(header + start + width).min(len);
            bytes[range.clone()].fill(fill);
            (bytes, range)
        }
        3 => {
            // A size that lies, with the right sum.
            let size = [0, 1, 511, CHUNK - 1, CHUNK + 1, 1 << 32, (1 << 33) - 1][random.below(7)];
            let end = (header + 512).min(len);
            if end - header == 512 && bytes[header + 257] == b'u' {
                bytes[header + 124..header + 136].copy_from_slice(format!("{size:011o} ").as_bytes());
                bytes[header + 148..header + 156].fill(b' ');
                let sum: u64 = bytes[header..end].iter().map(|byte| u64::from(*byte)).sum();
                bytes[header + 148..header + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            (bytes, 0..len)
        }
        4 => {
            bytes.truncate(at);
            (bytes, at..len)
        }
        5 => {
            let count = [1, 512, 1024, random.below(3000)][random.below(4)];
            bytes.splice(at..at, std::iter::repeat_n(random.byte(), count));
            (bytes, at..len + count)
        }
        6 => {
            let other = archive.headers[random.below(archive.headers.len())];
            let block = archive.bytes[other..other + 512].to_vec();
            bytes[header..header + 512].copy_from_slice(&block);
            (bytes, header..header + 512)
        }
        _ => {
            // A piece is missing, as after a write that was lost.
            let end = (at + [1, 512, 1 << 20][random.below(3)]).min(len);
            bytes.drain(at..end);
            (bytes, at..len)
        }
    }
}

/// Whether `found` is a piece of the archive or zeroes, which nobody made up.
fn is_stored(found: &[u8], bytes: &[u8]) -> bool {
    found.iter().all(|byte| *byte == 0) || bytes.windows(found.len()).any(|window| window == found)
}

#[test]
fn a_damaged_archive_is_read_right_or_refused() {
    let archive = archive();
    for seed in 0..700 {
        let mut random = Random::new(seed);
        let (bytes, range) = change(&archive, &mut random);
        let start = Instant::now();
        let keeps_places = bytes.len() == archive.bytes.len() && range.len() <= 512;
        let file = File::new(bytes.clone());
        let told = format!("seed {seed}: bytes {range:?}");
        let Ok(xva) = Xva::open(file) else {
            assert!(range.start < archive.headers[1], "{told}: ova.xml is sound");
            continue;
        };
        // Whether the archive is known to be whole may be a lie too.
        match random.below(3) {
            0 => xva.believe_written(bytes.len() as u64),
            1 => xva.believe_written(archive.bytes.len() as u64),
            _ => {}
        }
        for (index, disk) in xva.disks().iter().enumerate() {
            let size = usize::try_from(disk.size.min(4 << 20)).unwrap();
            let content = xva.disk(index);
            let mut order: Vec<usize> = (0..size).step_by(CHUNK / 2).collect();
            if random.below(2) == 0 {
                order.reverse();
            }
            for at in order {
                let mut part = vec![0xee; 1000.min(size - at)];
                if content.read_at(at as u64, &mut part).is_err() {
                    continue;
                }
                let truth = archive.disks[index].get(at..at + part.len());
                if truth != Some(&part[..]) {
                    let is_own = keeps_places && range.start >= archive.headers[1];
                    assert!(!is_own || is_stored(&part, &bytes), "{told}: byte {at} of disk {index} was invented");
                    // A chunk whose header was changed to say less, or to be of another disk, is what that header says.
                    assert!(is_stored(&part[..part.len().min(64)], &bytes), "{told}: byte {at} of disk {index}");
                }
            }
            let _ = (content.allocated().is_ok(), content.extent_at(0).is_ok());
            assert!(disk::data_ranges(content.as_ref()).take(100).count() <= 100, "{told}");
        }
        assert!(start.elapsed() < LONGEST, "{told}: {:?}", start.elapsed());
    }
}

#[test]
fn a_flipped_bit_in_a_header_never_moves_a_disk() {
    let archive = archive();
    for seed in 0..400 {
        let mut random = Random::new(seed);
        let header = archive.headers[1 + random.below(archive.headers.len() - 2)];
        let at = header + random.below(512);
        let mut bytes = archive.bytes.clone();
        bytes[at] ^= 1 << random.below(8);
        let xva = Xva::open(File::new(bytes)).unwrap();
        xva.believe_written(archive.bytes.len() as u64);
        for (index, truth) in archive.disks.iter().enumerate() {
            let disk = xva.disk(index);
            for at in (0..truth.len()).step_by(CHUNK / 4) {
                let mut part = vec![0xee; 600.min(truth.len() - at)];
                if disk.read_at(at as u64, &mut part).is_ok() {
                    assert!(part == truth[at..at + part.len()], "seed {seed}: byte {at} of disk {index}");
                }
            }
        }
    }
}

#[test]
fn an_ova_xml_damaged_at_random_never_panics() {
    let text = ova(&[("Ref:3", 5000), ("Ref:9", 70_000)]).into_bytes();
    for seed in 0..4000 {
        let mut random = Random::new(seed);
        let mut xml = text.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(xml.len());
            match random.below(5) {
                0 => xml[at] ^= 1 << random.below(8),
                1 => xml[at] = b"<>&\"'0-9/\0"[random.below(10)],
                2 => xml.truncate(at.max(1)),
                3 => {
                    let end = (at + random.below(200)).min(xml.len());
                    let piece = xml[at..end].to_vec();
                    let to = random.below(xml.len());
                    xml.splice(to..to, piece);
                }
                _ => drop(xml.drain(at..(at + random.below(50)).min(xml.len()))),
            }
            if xml.is_empty() {
                break;
            }
        }
        let bytes = [entry("ova.xml", &xml), vec![0; 1024]].concat();
        let Ok(xva) = Xva::open(File::new(bytes)) else { continue };
        for index in 0..xva.disks().len() {
            let disk = xva.disk(index);
            assert!(disk.size() == 0 || disk.read_at(disk.size() - 1, &mut [0]).is_err(), "seed {seed}");
            assert!(disk.extent_at(0).is_err() && (disk.size() == 0 || disk.allocated().is_err()), "seed {seed}");
        }
    }
}

#[test]
fn the_beginning_of_a_compressed_archive_damaged_at_random_never_panics() {
    let archive = archive();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&archive.bytes[..archive.headers[1] + 2048]).unwrap();
    let gzip = encoder.finish().unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(
        &archive.bytes[..archive.headers[1] + 2048],
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    for stored in [gzip, zstd] {
        assert_eq!(describe(File::new(stored.clone())).unwrap().1.len(), 2);
        for seed in 0..700 {
            let mut random = Random::new(seed);
            let mut bytes = stored.clone();
            // The magic stays.
            let at = 4 + random.below(bytes.len() - 4);
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = 0xff,
                2 => bytes.truncate(at),
                _ => {
                    let head = 4 + random.below(14);
                    bytes[head] = random.byte();
                }
            }
            let start = Instant::now();
            drop(describe(File::new(bytes)));
            assert!(start.elapsed() < LONGEST, "seed {seed}: {:?}", start.elapsed());
        }
    }
}
