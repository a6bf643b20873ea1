//! Guests' filesystems with bytes changed: everything is asked for, which ends soon, with answers or errors.
//!
//! ```text
//! image (1) │ patch: range (2) │ offset in it (2) │ length (1) │ bytes │ patch ...        little-endian
//! ```
//!
//! The images are those of `fuzz/images`, made by the real programs (`guest/tests/fuzz_images.rs`). A range is one of those that are
//! read while the image is sound, so that each change is of something; checksums are made right after each.

use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::checksums;
use crate::subject::{Checksum, Open, Subject};

/// No image is larger (bytes).
const LARGEST: usize = 320 << 20;

/// Changes of one run at most: more hide each other.
const PATCHES: usize = 64;

pub(crate) struct Image {
    name: &'static str,
    open: Open,
    checksum: Checksum,
    subject: OnceLock<Mutex<Subject>>,
}

impl Image {
    pub(crate) const fn new(name: &'static str, open: Open, checksum: Checksum) -> Self {
        Self { name, open, checksum, subject: OnceLock::new() }
    }

    fn load(&self) -> Subject {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images").join(format!("{}.zst", self.name));
        let file = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut plain = ruzstd::decoding::StreamingDecoder::new(file).expect("it was made by zstd");
        // Zeroes are left alone, and so take no memory.
        let mut bytes = vec![0; LARGEST];
        let (mut at, mut piece) = (0, vec![0; 1 << 16]);
        loop {
            let count = plain.read(&mut piece).expect("it was made by zstd");
            if count == 0 {
                break;
            }
            if piece[..count].iter().any(|byte| *byte != 0) {
                bytes[at..at + count].copy_from_slice(&piece[..count]);
            }
            at += count;
        }
        bytes.truncate(at);
        let subject = Subject::new(bytes, self.open, self.checksum);
        // No more is kept of an image than its reader read of it.
        assert!(subject.files > 10, "{}: make it anew by guest/tests/fuzz_images.rs", self.name);
        subject
    }
}

/// Changes one of the images as the bytes say, and asks it for everything.
pub(crate) fn run(images: &[Image], data: &[u8]) {
    let Some((number, mut rest)) = data.split_first() else { return };
    let image = &images[usize::from(*number) % images.len()];
    let subject = image.subject.get_or_init(|| Mutex::new(image.load()));
    let subject = subject.lock().unwrap_or_else(PoisonError::into_inner);
    let read = subject.read();
    subject.try_with(|change| {
        for _ in 0..PATCHES {
            let Some((&[range_low, range_high, low, high, len], left)) = rest.split_first_chunk() else { return };
            let range = usize::from(u16::from_le_bytes([range_low, range_high])) % read.len();
            let at = usize::from(u16::from_le_bytes([low, high])) % read[range].len();
            let (bytes, left) = left.split_at(usize::from(len % 32).min(left.len()));
            rest = left;
            change(range, at, &|_| bytes.to_vec());
        }
    });
}

const EXT: Open = |disk| Ok(Box::new(guest::ext::Ext::open(disk)?));
const XFS: Open = |disk| Ok(Box::new(guest::xfs::Xfs::open(disk)?));
const BTRFS: Open = |disk| Ok(Box::new(guest::btrfs::Btrfs::open(vec![disk])?));
const NTFS: Open = |disk| Ok(Box::new(guest::ntfs::Ntfs::open(disk)?));
const FAT: Open = |disk| Ok(Box::new(guest::fat::Fat::open(disk)?));
const EXFAT: Open = |disk| Ok(Box::new(guest::exfat::ExFat::open(disk)?));
const SQUASHFS: Open = |disk| Ok(Box::new(guest::squashfs::Squashfs::open(disk)?));

/// ext2, ext4, and journals and fast commits to replay.
pub fn ext(data: &[u8]) {
    static IMAGES: [Image; 4] = [
        Image::new("ext4-fast-commits", EXT, checksums::fast_commits),
        Image::new("ext4-journal", EXT, checksums::none),
        Image::new("ext4", EXT, checksums::none),
        Image::new("ext2", EXT, checksums::none),
    ];
    run(&IMAGES, data);
}

/// XFS, and a log to replay.
pub fn xfs(data: &[u8]) {
    static IMAGES: [Image; 2] = [Image::new("xfs-log", XFS, checksums::xfs), Image::new("xfs", XFS, checksums::xfs)];
    run(&IMAGES, data);
}

/// Btrfs in each of its compressions.
pub fn btrfs(data: &[u8]) {
    static IMAGES: [Image; 3] = [
        Image::new("btrfs-zstd", BTRFS, checksums::btrfs),
        Image::new("btrfs-lzo", BTRFS, checksums::btrfs),
        Image::new("btrfs-zlib", BTRFS, checksums::btrfs),
    ];
    run(&IMAGES, data);
}

/// NTFS.
pub fn ntfs(data: &[u8]) {
    static IMAGES: [Image; 1] = [Image::new("ntfs", NTFS, checksums::none)];
    run(&IMAGES, data);
}

/// FAT in each of its widths, and exFAT.
pub fn fat(data: &[u8]) {
    static IMAGES: [Image; 4] = [
        Image::new("fat12", FAT, checksums::none),
        Image::new("fat16", FAT, checksums::none),
        Image::new("fat32", FAT, checksums::none),
        Image::new("exfat", EXFAT, checksums::exfat),
    ];
    run(&IMAGES, data);
}

/// squashfs, its metadata plain and compressed.
pub fn squashfs(data: &[u8]) {
    static IMAGES: [Image; 3] = [
        Image::new("squashfs-plain", SQUASHFS, checksums::none),
        Image::new("squashfs-gzip", SQUASHFS, checksums::none),
        Image::new("squashfs-xz", SQUASHFS, checksums::none),
    ];
    run(&IMAGES, data);
}
