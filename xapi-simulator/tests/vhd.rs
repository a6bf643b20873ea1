//! VHD and raw streams, out and in.

use std::cell::RefCell;
use std::io::{self, Read as _};
use std::process::Command;

use xapi_simulator::content::{Content, OutOfRange};
use xapi_simulator::guest::Guest;
use xapi_simulator::random::fresh_uuid;
use xapi_simulator::raw;
use xapi_simulator::transfer::{Piece, unhindered};
use xapi_simulator::vhd::{Base, Export, ImportError, import};

const BLOCK: usize = 2 << 20;
const STORED: usize = BLOCK + 512;

/// Returns a disk of 20 MiB on which a guest wrote.
fn disk(seed: u64) -> Content {
    let mut disk = Content::new(fresh_uuid(), 20 << 20);
    Guest::new(seed).fill(&mut disk, 50).unwrap();
    disk
}

fn bytes_of(export: &Export<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    export.send(&mut bytes, &mut unhindered).unwrap();
    assert_eq!(bytes.len() as u64, export.length());
    bytes
}

fn all(disk: &Content) -> Vec<u8> {
    let mut bytes = Vec::new();
    raw::export(disk, &mut bytes, &mut unhindered).unwrap();
    bytes
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Imports into a disk.
fn put(disk: &mut Content, bytes: &[u8], length: usize) -> Result<(), ImportError> {
    import(&mut |offset, bytes| disk.write(offset, bytes), &mut &*bytes, length as u64, &mut unhindered)
}

#[test]
fn a_whole_disk_is_sent_as_the_blocks_that_are_present() {
    let mut disk = Content::new(fresh_uuid(), 5 << 20);
    disk.write(0, b"first").unwrap();
    disk.snapshot(fresh_uuid());
    disk.zero(4 << 20, 1).unwrap();
    let export = Export::new(&disk, None);
    assert_eq!(export.blocks(), [0, 2]);
    let stream = bytes_of(&export);
    assert_eq!(stream.len(), 2048 + 512 + 2 * STORED + 512);
    let footer = &stream[..512];
    assert_eq!(&footer[..8], b"conectix");
    assert_eq!((number(footer, 8), number(footer, 12)), (2, 0x0001_0000));
    assert_eq!(&footer[16..24], &512_u64.to_be_bytes());
    assert_eq!((number(footer, 24), &footer[28..32], number(footer, 32)), (0, &b"caml"[..], 1));
    // A disk that ends within a block is made longer.
    assert_eq!(&footer[48..56], &(6_u64 << 20).to_be_bytes());
    assert_eq!(number(footer, 60), 3);
    assert_eq!(&footer[68..84], export.uuid().as_bytes());
    assert_eq!(footer, &stream[stream.len() - 512..]);
    let header = &stream[512..1536];
    assert_eq!(&header[..16], b"cxsparse\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF");
    assert_eq!(&header[16..24], &2048_u64.to_be_bytes());
    assert_eq!((number(header, 28), number(header, 32)), (3, 0x0020_0000));
    assert!(header[40..1024].iter().all(|byte| *byte == 0));
    assert_eq!(stream[1536..2048], [0; 512]);
    assert_eq!([number(&stream, 2048), number(&stream, 2052), number(&stream, 2056)], [5, u32::MAX, 5 + 4097]);
    assert!(stream[2060..2560].iter().all(|byte| *byte == 0xFF));
    assert_eq!(stream[2560..3072], [0xFF; 512]);
    assert_eq!(&stream[3072..3077], b"first");
    assert_eq!(stream[2560 + STORED..2560 + STORED + 512], [0xFF; 512]);
    assert!(stream[2560 + STORED + 512..2560 + 2 * STORED].iter().all(|byte| *byte == 0));
    assert_ne!(Export::new(&disk, None).uuid(), export.uuid());
}

#[test]
fn qemu_reads_what_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let (image, flat) = (folder.path().join("disk.vhd"), folder.path().join("disk.raw"));
    let disk = disk(1);
    std::fs::write(&image, bytes_of(&Export::new(&disk, None))).unwrap();
    let options =
        format!("driver=vpc,force_size_calc=current_size,file.driver=file,file.filename={}", image.to_str().unwrap());
    let status = Command::new("qemu-img")
        .args(["convert", "-O", "raw", "--image-opts", &options])
        .arg(&flat)
        .status()
        .expect("qemu-img is installed");
    assert!(status.success());
    assert!(std::fs::read(&flat).unwrap() == all(&disk));
}

#[test]
fn what_changed_is_what_only_one_of_both_chains_has() {
    let mut disk = Content::new(fresh_uuid(), 20 << 20);
    let block = BLOCK as u64;
    disk.write(0, b"both").unwrap();
    disk.write(9 * block, b"both").unwrap();
    let first = disk.snapshot(fresh_uuid());
    disk.write(3 * block, b"second").unwrap();
    disk.zero(9 * block, block).unwrap();
    let gone = disk.snapshot(fresh_uuid());
    disk.write(3 * block, b"third").unwrap();
    disk.write(5 * block, &[0]).unwrap();
    let second = disk.snapshot(fresh_uuid());
    drop(gone);

    let path = "/run/sr-mount/sr/first.vhd";
    let export = Export::new(&second, Some(Base { content: &first, path }));
    assert_eq!(export.blocks(), [3, 5, 9]);
    let stream = bytes_of(&export);
    assert_eq!(number(&stream, 60), 4);
    let header = &stream[512..1536];
    assert_eq!(&header[40..56], first.leaf().file_uuid().as_bytes());
    let name: Vec<u8> = path.encode_utf16().flat_map(u16::to_be_bytes).collect();
    assert_eq!(&header[64..64 + name.len()], name);
    assert_eq!(&header[576..580], b"MacX");
    assert_eq!((number(header, 580), number(header, 584)), (1, 33));
    assert_eq!(&header[592..600], &1536_u64.to_be_bytes());
    assert!(header[600..1024].iter().all(|byte| *byte == 0));
    assert_eq!(stream[1536..2048], [0; 512]);

    // Applied to the base it makes the second; the other way round, the first.
    let mut target = Content::new(fresh_uuid(), 20 << 20);
    let whole = bytes_of(&Export::new(&first, None));
    put(&mut target, &whole, whole.len()).unwrap();
    assert_eq!(target.digest(), first.digest());
    put(&mut target, &stream, stream.len()).unwrap();
    assert_eq!(target.digest(), second.digest());
    let back = bytes_of(&Export::new(&first, Some(Base { content: &second, path })));
    put(&mut target, &back, back.len()).unwrap();
    assert_eq!(target.digest(), first.digest());
}

#[test]
fn random_disks_come_back_through_streams() {
    for seed in 0..8 {
        let mut source = disk(seed);
        let mut target = Content::new(fresh_uuid(), source.size());
        let mut base: Option<Content> = None;
        for _ in 0..4 {
            Guest::new(seed + 100).work(&mut source, 20).unwrap();
            let snapshot = source.snapshot(fresh_uuid());
            let base_of = base.as_ref().map(|content| Base { content, path: "/base.vhd" });
            let stream = bytes_of(&Export::new(&snapshot, base_of));
            put(&mut target, &stream, stream.len()).unwrap();
            assert_eq!(target.digest(), snapshot.digest(), "seed {seed}");
            base = Some(snapshot);
        }
        let mut flat = Content::new(fresh_uuid(), source.size());
        let bytes = all(&source);
        let mut sink = |offset: u64, bytes: &[u8]| flat.write(offset, bytes);
        raw::import(&mut sink, &mut &*bytes, bytes.len() as u64, &mut unhindered).unwrap();
        assert_eq!(flat.digest(), source.digest(), "seed {seed}");
    }
}

#[test]
fn only_sectors_whose_bit_is_set_are_written() {
    let mut source = Content::new(fresh_uuid(), 2 << 20);
    source.write(0, &[7; 4 * 512]).unwrap();
    let mut stream = bytes_of(&Export::new(&source, None));
    let bitmap = 2048 + 512;
    stream[bitmap..bitmap + 512].fill(0);
    stream[bitmap] = 0b0101_0000;
    let mut target = Content::new(fresh_uuid(), 2 << 20);
    target.write(0, &[1; 4 * 512]).unwrap();
    put(&mut target, &stream, stream.len()).unwrap();
    let mut read = [0; 4 * 512];
    target.read(0, &mut read).unwrap();
    assert_eq!([read[0], read[512], read[1024], read[1536]], [1, 7, 1, 7]);
}

#[test]
fn blocks_are_read_in_the_order_in_which_they_lie() {
    let mut source = Content::new(fresh_uuid(), 4 << 20);
    source.write(0, b"a").unwrap();
    source.write(2 << 20, b"b").unwrap();
    let mut stream = bytes_of(&Export::new(&source, None));
    let (first, second) = (number(&stream, 2048), number(&stream, 2052));
    stream[2048..2052].copy_from_slice(&second.to_be_bytes());
    stream[2052..2056].copy_from_slice(&first.to_be_bytes());
    let mut target = Content::new(fresh_uuid(), 4 << 20);
    put(&mut target, &stream, stream.len()).unwrap();
    let mut read = [0; 1];
    target.read(0, &mut read).unwrap();
    assert_eq!(&read, b"b");
    // Both at one place is no order.
    stream[2048..2052].copy_from_slice(&first.to_be_bytes());
    assert!(matches!(put(&mut target, &stream, stream.len()), Err(ImportError::Backwards { what: "a block", .. })));
}

#[test]
fn a_stream_that_is_not_a_vhd_to_its_declared_end_is_refused() {
    let source = disk(2);
    let good = bytes_of(&Export::new(&source, None));
    let length = good.len();
    let change = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let padded = [&good[..], &[0; 512]].concat();
    let headless = [&good[..length - 512], &[0; 512]].concat();
    // What it is, its bytes, its declared length, whether the data was written, what is said.
    let cases: [(&str, Vec<u8>, usize, bool, &str); 13] = [
        ("as it is", good.clone(), length, true, ""),
        ("a byte short, which rounding hides", good.clone(), length - 1, true, ""),
        ("footer damaged", change(100), length, false, "the first footer has a wrong checksum"),
        ("cookie damaged", change(0), length, false, "the first footer does not begin with its cookie"),
        ("header damaged", change(600), length, false, "the header has a wrong checksum"),
        ("last footer damaged", change(length - 1), length, true, "the last footer has a wrong checksum"),
        ("last footer missing", headless, length, true, "the last footer does not begin with its cookie"),
        ("cut in the last footer", good[..length - 1].into(), length, true, "the stream ended within the last footer"),
        ("cut in a block", good[..5000].into(), length, false, "the stream ended within a block"),
        ("empty", Vec::new(), 0, false, "the stream ended within the first footer"),
        ("declared longer", good.clone(), length + 512, true, "the stream ended within the last footer"),
        (
            "declared as long as its padding",
            padded,
            length + 512,
            true,
            "the last footer does not begin with its cookie",
        ),
        (
            "declared shorter",
            good.clone(),
            length - 512,
            true,
            &format!("the last sector at byte {}, of which {} were read already", length - 1024, length - 512),
        ),
    ];
    for (name, bytes, declared, is_written, expected) in cases {
        let mut target = Content::new(fresh_uuid(), source.size());
        let said = put(&mut target, &bytes, declared).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(said, expected, "{name}");
        assert_eq!(target.digest() == source.digest(), is_written, "{name}");
    }
}

#[test]
fn an_image_larger_than_the_disk_fails_where_it_writes_past_the_end() {
    let mut source = Content::new(fresh_uuid(), 4 << 20);
    source.write(0, b"a").unwrap();
    source.write(2 << 20, b"b").unwrap();
    let stream = bytes_of(&Export::new(&source, None));
    let mut target = Content::new(fresh_uuid(), 2 << 20);
    let error = put(&mut target, &stream, stream.len()).unwrap_err();
    let range = OutOfRange { range: 2 << 20..4 << 20, size: 2 << 20 };
    assert!(matches!(error, ImportError::OutOfRange(found) if found == range));
    let mut read = [0; 1];
    target.read(0, &mut read).unwrap();
    assert_eq!(&read, b"a");
    let mut sink = |offset: u64, bytes: &[u8]| target.write(offset, bytes);
    let longer = raw::import(&mut sink, &mut io::repeat(1), (2 << 20) + 1, &mut unhindered);
    assert!(matches!(longer, Err(ImportError::OutOfRange(_))));
    let cut = raw::import(&mut |_, _| Ok(()), &mut io::repeat(1).take(99), 100, &mut unhindered);
    assert!(matches!(cut, Err(ImportError::Truncated("the disk"))));
}

#[test]
fn a_hook_sees_each_block_before_it_and_can_end_the_stream_there() {
    let mut disk = Content::new(fresh_uuid(), 6 << 20);
    for block in 0..3 {
        disk.write(block * BLOCK as u64, b"x").unwrap();
    }
    let export = Export::new(&disk, None);
    let seen = RefCell::new(Vec::new());
    let mut stop = |piece: &Piece| {
        seen.borrow_mut().push(*piece);
        if piece.number == 2 { Err(io::Error::other("cut")) } else { Ok(()) }
    };
    let mut sent = Vec::new();
    assert_eq!(export.send(&mut sent, &mut stop).unwrap_err().to_string(), "cut");
    assert_eq!(sent.len(), 2560 + 2 * STORED);
    let (length, total) = (BLOCK as u64, Some(export.length()));
    let piece =
        |number: u64| Piece { number, offset: number * length, length, done: 2560 + number * STORED as u64, total };
    assert_eq!(*seen.borrow(), [piece(0), piece(1), piece(2)]);
}
