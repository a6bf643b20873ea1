//! XVAs as XAPI and Xen Orchestra write them, damaged ones, and ones whose guests mean harm.

mod builder;

use std::io::Write;
use std::sync::Arc;

use builder::{CHUNK, File, Manner, chunks, content, entry, header, ova, read_all, xva};
use disk::{Disk, data_ranges};
use storage::Object;
use xva::{Compression, ErrorKind, Xva, compression, describe};

fn open(bytes: Vec<u8>) -> (Arc<File>, Xva) {
    let len = bytes.len() as u64;
    let file = File::new(bytes);
    let xva = Xva::open(file.clone()).unwrap();
    xva.believe_written(len);
    (file, xva)
}

fn ranges(disk: &dyn Disk) -> Vec<(usize, usize)> {
    let at = |offset| usize::try_from(offset).unwrap();
    data_ranges(disk).map(|range| range.map(|range| (at(range.start), at(range.end))).unwrap()).collect()
}

/// Reads the disk in every way and order: backwards by bisection, forwards, and with the index of holes.
fn assert_reads(bytes: &[u8], index: usize, expected: &[u8]) {
    let (_, xva) = open(bytes.to_vec());
    let disk = xva.disk(index);
    assert_eq!(disk.size(), expected.len() as u64);
    for start in (0..expected.len()).step_by(CHUNK / 2).rev() {
        let mut sector = [1; 1000];
        let sector = &mut sector[..1000.min(expected.len() - start)];
        disk.read_at(start as u64, sector).unwrap();
        assert!(*sector == expected[start..start + sector.len()], "byte {start}, backwards");
    }
    assert!(read_all(disk.as_ref()).unwrap() == expected, "after bisection");
    let (_, xva) = open(bytes.to_vec());
    assert!(read_all(xva.disk(index).as_ref()).unwrap() == expected, "forwards");
    let (_, xva) = open(bytes.to_vec());
    let disk = xva.disk(index);
    let (mut stored, mut hole) = (0, 0);
    for (start, end) in ranges(disk.as_ref()) {
        assert!(expected[hole..start].iter().all(|byte| *byte == 0), "hole at byte {hole}");
        stored += end - start;
        hole = end;
    }
    assert_eq!(disk.allocated().unwrap(), stored as u64);
    assert!(read_all(disk.as_ref()).unwrap() == expected, "by the index");
}

#[test]
fn every_way_of_writing_chunks_reads_the_same() {
    let patterns = [
        ("a", CHUNK),
        ("a", 512),
        ("a..b.c", 6 * CHUNK),
        ("a.b...", 5 * CHUNK + 1536),
        ("....", 4 * CHUNK),
        ("abcd", 3 * CHUNK + 700),
    ];
    for (pattern, len) in patterns {
        let first = content(pattern, 7, len);
        let second = content("x.y", 9, 3 * CHUNK);
        for empty in [vec![], vec![1], vec![1, 2, 3]] {
            for (is_filled_up, is_sha1) in [(false, false), (true, false), (false, true)] {
                let manner = Manner { is_filled_up, is_sha1, empty: empty.clone() };
                let bytes = xva(&[("Ref:12", &first), ("Ref:7", &second)], &manner);
                let mut shown = first.clone();
                if is_filled_up {
                    shown.resize(len.next_multiple_of(CHUNK), 0);
                }
                assert_reads(&bytes, 0, &shown);
                assert_reads(&bytes, 1, &second);
            }
        }
    }
}

#[test]
fn holes_are_the_chunks_that_are_not_stored() {
    let bytes = content("a..bc.d", 1, 6 * CHUNK + 512);
    for empty in [vec![], vec![1], vec![2, 3], vec![4]] {
        let (_, xva) = open(xva(&[("Ref:2", &bytes)], &Manner { empty, ..Manner::default() }));
        let disk = xva.disk(0);
        let expected = [(0, CHUNK), (3 * CHUNK, 5 * CHUNK), (6 * CHUNK, 6 * CHUNK + 512)];
        assert_eq!(ranges(disk.as_ref()), expected);
        assert_eq!(disk.allocated().unwrap(), 3 * CHUNK as u64 + 512);
    }
}

#[test]
fn the_end_of_the_last_disk_is_read_without_walking_it() {
    let first = content(&"ab.".repeat(20), 1, 60 * CHUNK);
    let second = content(&"a..b".repeat(10), 2, 40 * CHUNK);
    // Of the disks before the last one every header is read: 41 chunks.
    for (disks, most) in [(&[("Ref:4", &second[..])][..], 12), (&[("Ref:2", &first[..]), ("Ref:4", &second)], 12 + 41)]
    {
        let (file, xva) = open(xva(disks, &Manner::default()));
        assert_eq!(file.reads(), 3, "magic, header, ova.xml");
        let mut byte = [0; 9];
        xva.disk(disks.len() - 1).read_at(39 * CHUNK as u64, &mut byte).unwrap();
        assert_eq!(byte[..], second[39 * CHUNK..][..9]);
        assert!(file.reads() <= 3 + most, "{} reads", file.reads());
    }
    let (file, xva) = open(xva(&[("Ref:2", &first)], &Manner::default()));
    read_all(xva.disk(0).as_ref()).unwrap();
    // 41 chunks in pieces of a third of that, and about one header for each.
    assert!(file.reads() < 41 * 5 + 60, "{} reads", file.reads());
    let before = file.reads();
    xva.disk(0).allocated().unwrap();
    assert!(file.reads() - before <= 42, "{} reads", file.reads() - before);
}

#[test]
fn an_archive_not_known_to_be_whole_is_walked() {
    let disk = content(&"ab.".repeat(20), 1, 60 * CHUNK);
    let file = File::new(xva(&[("Ref:2", &disk)], &Manner::default()));
    for written in [None, Some(file.stat().unwrap().size + 1)] {
        let xva = Xva::open(file.clone()).unwrap();
        if let Some(written) = written {
            xva.believe_written(written);
        }
        let before = file.reads();
        xva.disk(0).read_at(59 * CHUNK as u64, &mut [0]).unwrap();
        assert!(file.reads() - before > 40, "{} reads", file.reads() - before);
    }
}

/// A guest that knows where its chunks lie and writes a second chain of entries, `shift` sectors after the real one.
fn second_chain(reference: &str, chunks: usize, shift: usize) -> Vec<u8> {
    let mut disk = content(&"x".repeat(chunks), 3, chunks * CHUNK);
    for number in 0..chunks {
        let name = format!("{reference}/{number:08}");
        let at = number * CHUNK + shift * 512;
        disk[at..at + 512].copy_from_slice(&header(&name, CHUNK));
        let checksum = number * CHUNK + (shift.checked_sub(2).unwrap_or(2046)) * 512;
        disk[checksum..checksum + 512].copy_from_slice(&header(&format!("{name}.xxhash"), 16));
    }
    disk
}

#[test]
fn a_second_chain_written_by_the_guest_is_not_followed() {
    let other = content("a.b", 5, 3 * CHUNK);
    // An empty chunk shifts what follows by 3 sectors: then the guest's headers stand where regular ones would.
    for (shift, empty) in
        [(100, vec![]), (2045, vec![1]), (2045, vec![2]), (2042, vec![1, 3]), (3, vec![1]), (0, vec![])]
    {
        let disk = second_chain("Ref:2", 12, shift);
        let bytes = xva(&[("Ref:2", &disk), ("Ref:4", &other)], &Manner { empty: empty.clone(), ..Manner::default() });
        assert_reads(&bytes, 0, &disk);
        assert_reads(&bytes, 1, &other);
        let bytes = xva(&[("Ref:2", &disk)], &Manner { empty, is_filled_up: true, ..Manner::default() });
        assert_reads(&bytes, 0, &disk);
    }
}

/// Writes the header of a chunk into the content of a disk.
fn plant(disk: &mut [u8], chunk: usize, sector: usize, name: &str, size: usize) {
    disk[chunk * CHUNK + sector * 512..][..512].copy_from_slice(&header(name, size));
}

#[test]
fn headers_shifted_by_whole_strides_are_told_from_the_guests() {
    // One empty chunk shifts what follows by 3 sectors, 2051 by 3 strides: the second disk stands in step again, and
    // where headers in step would stand before it, there is the last sector of a chunk. The guest says what is there.
    let mut first = content(&"x".repeat(16), 3, 16 * CHUNK);
    for slot in 2..=8 {
        plant(&mut first, slot - 1, 2047, &format!("Ref:2/{:08}", slot + 7), CHUNK);
    }
    for slot in 9..16 {
        plant(&mut first, slot - 1, 2047, &format!("Ref:4/{:08}", slot - 9), CHUNK);
    }
    let second = content(&format!("{}{}a", "ab".repeat(5), ".".repeat(30)), 5, 41 * CHUNK);
    let mut bytes = entry("ova.xml", ova(&[("Ref:2", 16 * CHUNK), ("Ref:4", 41 * CHUNK)]).as_bytes());
    let empty = std::iter::once(1).chain(16..16 + 2050).collect();
    bytes.extend(chunks("Ref:2", &first, &Manner { empty, ..Manner::default() }));
    bytes.extend(chunks("Ref:4", &second, &Manner::default()));
    bytes.extend([0; 1024]);
    assert_reads(&bytes, 0, &first);
    assert_reads(&bytes, 1, &second);
}

#[test]
fn an_archive_cut_off_where_the_guest_wrote_an_end_never_invents() {
    let mut disk = content(&"x".repeat(12), 3, 12 * CHUNK);
    // Two empty chunks: headers in step would stand in the last sectors of chunks.
    for slot in 3..=8 {
        plant(&mut disk, slot - 1, 2044, &format!("Ref:2/{:08}", slot + 3), CHUNK);
    }
    plant(&mut disk, 8, 2042, "Ref:2/00000011.xxhash", 16);
    disk[8 * CHUNK + 2044 * 512..][..1024].fill(0);
    let mut bytes = xva(&[("Ref:2", &disk)], &Manner { empty: vec![1, 2], ..Manner::default() });
    let written = bytes.len() as u64;
    let start = entry("ova.xml", ova(&[("Ref:2", 12 * CHUNK)]).as_bytes()).len();
    bytes.truncate(start + 8 * (CHUNK + 1536) + CHUNK + 5 * 512);
    let xva = Xva::open(File::new(bytes)).unwrap();
    xva.believe_written(written);
    for (number, expected) in disk.chunks(CHUNK).enumerate().rev() {
        let mut chunk = vec![1; CHUNK];
        match xva.disk(0).read_at((number * CHUNK) as u64, &mut chunk) {
            Ok(()) => assert!(chunk == expected && number < 8, "chunk {number}"),
            Err(error) => assert!(error.kind() == disk::ErrorKind::Damaged && number >= 8, "{error}"),
        }
    }
}

#[test]
fn headers_in_every_sector_of_a_disk_lead_nowhere() {
    let other = content("a.b", 5, 3 * CHUNK);
    let mut disk = vec![0; 8 * CHUNK + 1024];
    for (sector, bytes) in disk.chunks_mut(512).enumerate() {
        let name = if sector % 3 == 0 { "Ref:4/00000000" } else { &format!("Ref:2/{:08}", sector / 2048 + 1) };
        bytes.copy_from_slice(&header(name, CHUNK));
    }
    for empty in [vec![], vec![1], vec![3, 4, 5]] {
        for is_filled_up in [false, true] {
            let manner = Manner { empty: empty.clone(), is_filled_up, is_sha1: false };
            let bytes = xva(&[("Ref:2", &disk), ("Ref:4", &other)], &manner);
            let mut shown = disk.clone();
            if is_filled_up {
                shown.resize(9 * CHUNK, 0);
            }
            assert_reads(&bytes, 0, &shown);
            assert_reads(&bytes, 1, &other);
        }
    }
}

#[test]
fn a_disk_that_holds_an_xva_reads_as_it_is() {
    let inner = content("zyx", 8, 3 * CHUNK);
    let nested = xva(&[("Ref:2", &inner), ("Ref:4", &inner)], &Manner::default());
    for empty in [vec![], vec![1]] {
        for pad in [0, 512, 3 * 512] {
            let mut disk = vec![0; pad];
            disk.extend(&nested);
            let manner = Manner { empty: empty.clone(), ..Manner::default() };
            let bytes = xva(&[("Ref:2", &disk), ("Ref:4", &disk)], &manner);
            assert_reads(&bytes, 0, &disk);
            assert_reads(&bytes, 1, &disk);
        }
    }
}

#[test]
fn an_archive_cut_off_anywhere_never_invents() {
    let disks = [content("ab.c", 1, 4 * CHUNK), content("a..d", 2, 3 * CHUNK + 512)];
    let bytes = xva(&[("Ref:2", &disks[0]), ("Ref:4", &disks[1])], &Manner::default());
    let start = entry("ova.xml", ova(&[("Ref:2", 4 * CHUNK), ("Ref:4", 3 * CHUNK + 512)]).as_bytes()).len();
    for cut in (start..bytes.len()).step_by(CHUNK / 3 + 77).chain([bytes.len() - 1024, bytes.len() - 512]) {
        let (_, xva) = open(bytes[..cut].to_vec());
        let mut failed = 0;
        for (index, expected) in disks.iter().enumerate() {
            let disk = xva.disk(index);
            for (number, expected) in expected.chunks(CHUNK).enumerate() {
                let mut chunk = vec![1; expected.len()];
                match disk.read_at((number * CHUNK) as u64, &mut chunk) {
                    Ok(()) => assert!(chunk == expected, "cut at {cut}, chunk {number} of disk {index}"),
                    Err(error) => {
                        assert_eq!(error.kind(), disk::ErrorKind::Damaged, "{error}");
                        failed += 1;
                    }
                }
            }
        }
        assert!(failed > 0 || cut > bytes.len() - 2048 - 512, "cut at {cut}");
    }
}

#[test]
fn an_archive_without_its_end_says_so() {
    let disk = content("a", 1, CHUNK);
    let whole = xva(&[("Ref:2", &disk)], &Manner::default());
    for (cut, expected) in [(1024, "the file ends at byte"), (512, "there is only one")] {
        let mut bytes = whole[..whole.len() - cut].to_vec();
        // A second disk that never comes makes the walk look at the end.
        let start = entry("ova.xml", ova(&[("Ref:2", CHUNK)]).as_bytes()).len();
        bytes.splice(..start, entry("ova.xml", ova(&[("Ref:2", CHUNK), ("Ref:4", CHUNK)]).as_bytes()));
        let (_, xva) = open(bytes);
        assert_eq!(read_all(xva.disk(0).as_ref()).unwrap(), disk);
        let error = read_all(xva.disk(1).as_ref()).unwrap_err();
        assert!(error.kind() == disk::ErrorKind::Damaged && error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_damaged_header_costs_its_own_chunk_where_headers_stand_at_equal_distances() {
    let disk = content("abcdef", 1, 6 * CHUNK);
    let mut bytes = xva(&[("Ref:2", &disk)], &Manner::default());
    let start = entry("ova.xml", ova(&[("Ref:2", 6 * CHUNK)]).as_bytes()).len();
    bytes[start + 2 * (CHUNK + 1536) + 3] ^= 1;
    let (_, xva) = open(bytes);
    for (number, expected) in disk.chunks(CHUNK).enumerate() {
        let mut chunk = vec![0; CHUNK];
        let result = xva.disk(0).read_at((number * CHUNK) as u64, &mut chunk);
        if number == 2 {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), disk::ErrorKind::Damaged);
            assert!(error.to_string().contains(&format!("at byte {}", start + 2 * (CHUNK + 1536))), "{error}");
        } else {
            result.unwrap();
            assert!(chunk == expected, "chunk {number}");
        }
    }
}

#[test]
fn chunks_that_contradict_each_other_are_damage() {
    let chunk = vec![5; CHUNK];
    let one = |name: &str| entry(name, &chunk);
    let cases: [(&str, Vec<Vec<u8>>); 9] = [
        ("no chunk", vec![]),
        ("the first missing", vec![one("Ref:2/00000001")]),
        ("twice", vec![one("Ref:2/00000000"), one("Ref:2/00000000"), one("Ref:2/00000003")]),
        ("descending", vec![one("Ref:2/00000000"), one("Ref:2/00000002"), one("Ref:2/00000001")]),
        ("past the end", vec![one("Ref:2/00000000"), one("Ref:2/00000004")]),
        ("far past the end", vec![one("Ref:2/00000000"), one("Ref:2/999999999999999")]),
        ("the last missing", vec![one("Ref:2/00000000"), one("Ref:2/00000002")]),
        (
            "a checksum of another",
            vec![one("Ref:2/00000000"), entry("Ref:2/00000001.xxhash", b"0"), one("Ref:2/00000003")],
        ),
        ("in two parts", vec![one("Ref:2/00000000"), one("Ref:4/00000000"), one("Ref:2/00000003")]),
    ];
    for (name, entries) in cases {
        let mut bytes = entry("ova.xml", ova(&[("Ref:2", 4 * CHUNK), ("Ref:4", CHUNK)]).as_bytes());
        bytes.extend(entries.concat());
        bytes.extend([0; 1024]);
        let (_, xva) = open(bytes);
        let disk = xva.disk(0);
        let error = disk.read_at(4 * CHUNK as u64 - 1, &mut [0]).expect_err(name);
        assert_eq!(error.kind(), disk::ErrorKind::Damaged, "{name}: {error}");
        assert_eq!(disk.extent_at(4 * CHUNK as u64 - 1).expect_err(name).kind(), disk::ErrorKind::Damaged, "{name}");
        assert_eq!(disk.allocated().expect_err(name).kind(), disk::ErrorKind::Damaged, "{name}");
    }
}

#[test]
fn other_entries_are_skipped_and_disks_come_in_any_order() {
    let disks = [content("a.b", 1, 3 * CHUNK), content("c..d", 2, 4 * CHUNK), content("e", 3, CHUNK)];
    let sizes = [("Ref:2", 3 * CHUNK), ("Ref:30", 4 * CHUNK), ("Ref:4", CHUNK)];
    for extra in [vec![], entry("checksum.xml", &[b'x'; 700]), entry("Ref:9/00000000", &[b'x'; 700])] {
        let mut bytes = entry("ova.xml", ova(&sizes).as_bytes());
        for index in [1, 2, 0] {
            bytes.extend(&extra);
            bytes.extend(chunks(sizes[index].0, &disks[index], &Manner::default()));
        }
        bytes.extend([0; 10240]);
        for (index, expected) in disks.iter().enumerate() {
            assert_reads(&bytes, index, expected);
        }
    }
}

#[test]
fn reads_past_the_end_are_out_of_range() {
    let (_, xva) = open(xva(&[("Ref:2", &content("a", 1, 1536))], &Manner::default()));
    let disk = xva.disk(0);
    for (offset, len) in [(1536, 1), (1535, 2), (u64::MAX, 1), (0, 1537)] {
        let error = disk.read_at(offset, &mut vec![0; len]).unwrap_err();
        assert_eq!(error.kind(), disk::ErrorKind::OutOfRange, "{offset} + {len}");
    }
    disk.read_at(1536, &mut []).unwrap();
    assert_eq!(disk.extent_at(1536).unwrap_err().kind(), disk::ErrorKind::OutOfRange);
}

#[test]
fn what_is_no_uncompressed_xva_is_refused_with_the_reason() {
    let huge = header("ova.xml", (16 << 20) + 1).to_vec();
    let cases: [(&[u8], Compression, ErrorKind, &str); 8] = [
        (b"\x1f\x8b\x08\x00abc", Compression::Gzip, ErrorKind::Unsupported, "gzip"),
        (b"\x28\xb5\x2f\xfdabc", Compression::Zstd, ErrorKind::Unsupported, "zstd"),
        (b"", Compression::None, ErrorKind::Damaged, "there are 0"),
        (b"not an xva", Compression::None, ErrorKind::Damaged, "there are 10"),
        (&[0; 1024], Compression::None, ErrorKind::Damaged, "there are zeroes"),
        (&[b'a'; 1024], Compression::None, ErrorKind::Damaged, "a tar header was expected"),
        (&entry("other.xml", b"x"), Compression::None, ErrorKind::Damaged, "'other.xml'"),
        (&huge, Compression::None, ErrorKind::Damaged, "more than 16777216"),
    ];
    for (bytes, expected, kind, words) in cases {
        let file = File::new(bytes.to_vec());
        assert_eq!(compression(file.as_ref()).unwrap(), expected);
        let error = Xva::open(file).err().expect(words);
        assert!(error.kind() == kind && error.to_string().contains(words), "{words}: {error}");
    }
    let cut = header("ova.xml", 1 << 20).to_vec();
    assert!(Xva::open(File::new(cut)).is_err_and(|error| error.to_string().contains("it is cut off")));
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// One frame of zstd of a window of 1 KiB × 2^`exponent`, whose blocks are stored as they are.
fn zstd_stored(bytes: &[u8], exponent: u8) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, exponent << 3];
    for block in bytes.chunks(1024) {
        frame.extend(&u32::try_from(block.len() << 3).unwrap().to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame.extend([1, 0, 0]);
    frame
}

#[test]
fn the_disks_of_a_compressed_xva_are_known_by_its_beginning() {
    let (first, second) = (content("ab.c", 1, 4 * CHUNK), content("d", 2, 700));
    let plain = xva(&[("Ref:2", &first), ("Ref:4", &second)], &Manner::default());
    let cases = [
        (Compression::None, plain.clone()),
        (Compression::Gzip, gzip(&plain)),
        (Compression::Gzip, [gzip(&plain[..100]), gzip(&plain[100..])].concat()),
        (Compression::Zstd, zstd(&plain)),
        (Compression::Zstd, zstd_stored(&plain, 0)),
        (Compression::Zstd, zstd_stored(&plain, 13)),
    ];
    for (compression, bytes) in cases {
        let (found, disks) = describe(File::new(bytes)).unwrap();
        assert_eq!(found, compression);
        assert_eq!(disks, Xva::open(File::new(plain.clone())).unwrap().disks(), "{compression:?}");
        assert_eq!((disks[0].size, disks[1].size), (4 * CHUNK as u64, 700));
    }
}

#[test]
fn only_the_beginning_of_a_compressed_xva_is_read() {
    // Without patterns, so that it takes room when it is compressed.
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    })
    .take(8 * CHUNK)
    .collect();
    let plain = xva(&[("Ref:2", &noise)], &Manner::default());
    // The magic, and for zstd the window too; then pieces of 64 KiB.
    for (bytes, most) in [(gzip(&plain), 2), (zstd_stored(&plain, 10), 2 + 17)] {
        let file = File::new(bytes);
        describe(file.clone()).unwrap();
        assert!(file.reads() <= most, "{} reads, at most {most} were expected", file.reads());
    }
}

#[test]
fn a_compressed_file_that_is_damaged_or_means_harm_is_refused() {
    let noisy: String = (0..20_000_u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_string()).collect();
    let plain = entry("ova.xml", noisy.as_bytes());
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    let mut broken = gzip(&plain);
    broken[10..60].fill(0xff);
    let window = |bytes: &[u8]| [&[0x28, 0xb5, 0x2f, 0xfd][..], bytes, &[0; 64]].concat();
    // A stored block of deflate, and a raw one of zstd, of no bytes at all: they could go on for ever.
    let empty_gzip = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3][..], &[0, 0, 0, 0xff, 0xff].repeat(7 << 20)].concat();
    let empty_zstd = [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0][..], &[0; 36 << 20]].concat();
    let cases: [(&str, Vec<u8>, ErrorKind, &str); 14] = [
        ("gzip cut off", half(gzip(&plain)), ErrorKind::Damaged, "gzip"),
        ("zstd cut off", half(zstd(&plain)), ErrorKind::Damaged, "zstd"),
        ("gzip of little", gzip(b"ova"), ErrorKind::Damaged, "gzip"),
        ("zstd of little", zstd(b"ova"), ErrorKind::Damaged, "zstd"),
        ("cut off before it was compressed", gzip(&plain[..5000]), ErrorKind::Damaged, "4488 could be decompressed"),
        ("gzip, damaged", broken, ErrorKind::Damaged, "gzip"),
        ("only a magic", vec![0x28, 0xb5, 0x2f, 0xfd], ErrorKind::Damaged, "zstd"),
        ("no XML", gzip(&plain), ErrorKind::Damaged, "ova.xml: "),
        ("another entry", gzip(&entry("other", b"x")), ErrorKind::Damaged, "there is 'other'"),
        ("a long ova.xml", zstd(&header("ova.xml", (16 << 20) + 1)), ErrorKind::Damaged, "more than 16777216"),
        ("a wide window", window(&[0, 14 << 3]), ErrorKind::Unsupported, "a window of 16777216 bytes"),
        ("the widest window", window(&[0, 0xff]), ErrorKind::Unsupported, "a window of"),
        ("one long segment", window(&[0xe0, 0, 0, 0, 0, 1]), ErrorKind::Unsupported, "a window of 4294967296 bytes"),
        ("gzip that never begins", empty_gzip, ErrorKind::Damaged, "within the first 33554432 bytes"),
    ];
    for (name, bytes, kind, words) in cases {
        let error = describe(File::new(bytes)).expect_err(name);
        assert!(error.kind() == kind && error.to_string().contains(words), "{name}: {error}");
    }
    let error = describe(File::new(empty_zstd)).unwrap_err();
    assert!(error.to_string().contains("within the first 33554432 bytes"), "{error}");
    // 16 MiB of spaces, in next to nothing.
    let mut bomb = header("ova.xml", 16 << 20).to_vec();
    bomb.resize(40 << 20, b' ');
    for bytes in [gzip(&bomb), zstd(&bomb)] {
        let error = describe(File::new(bytes)).unwrap_err();
        assert!(error.to_string().starts_with("ova.xml: "), "{error}");
    }
}
