//! Whatever a guest writes into its metadata, with checksums that are right: reading ends, soon, with an answer or an error.

mod compare;

use std::fs::{self, File};
use std::ops::Range;
use std::process::Command;
use std::time::Duration;

use compare::Random;
use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::hostile;
use compare::image::{Mount, Reflinks, sparse, succeed};
use fs_ext4::checksum::linux_crc32c;
use guest::Fields;
use guest::xfs::Xfs;

/// Bytes of an image; mkfs.xfs makes none below 300 MiB.
const SIZE: u64 = 304 << 20;

/// Bytes of an inode in these images.
const INODE: usize = 512;

/// Returns the checksum of a structure, and where it stands.
fn checksum(disk: &[u8], read: &Range<usize>, changed: usize) -> Option<(usize, [u8; 4])> {
    of_log(disk, changed).or_else(|| {
        let (mut start, mut end) = (read.start, read.end);
        let fields = Fields(&disk[read.clone()]);
        let at = match (fields.bytes(0, 4)?, fields.be16(8)?) {
            (b"XFSB", _) => {
                end = start + 512;
                224
            }
            ([b'I', b'N', ..], _) => {
                // Several are read at once when the log changes one.
                start += (changed - start) / INODE * INODE;
                end = start + INODE;
                100
            }
            (b"BMA3", _) => 64,
            (b"XDB3" | b"XDD3" | b"XDF3", _) => 4,
            (b"XSLM" | b"XARM", _) | (_, 0x3df1 | 0x3dff | 0x3ebe | 0x3bee) => 12,
            (b"XAGI", _) => 312,
            (b"XAGF", _) => 216,
            (b"AB3B" | b"AB3C" | b"IAB3" | b"FIB3" | b"RMB3" | b"R3FC", _) => 52,
            _ => return None,
        };
        let place = start + at;
        let parts = [disk.get(start..place)?, &[0; 4], disk.get(place + 4..end)?];
        Some((place, sum(&parts)))
    })
}

/// Of the record of the log that a byte is in.
fn of_log(disk: &[u8], changed: usize) -> Option<(usize, [u8; 4])> {
    let superblock = Fields(disk);
    let start = superblock.be64(48)?;
    let (bits, group) = (superblock.u8(124)?, u64::from(superblock.be32(84)?));
    let block = (start >> (bits & 31)) * group + (start & ((1 << (bits & 31)) - 1));
    let start = usize::try_from(block * 4096).ok()?;
    let log = start..start + usize::try_from(superblock.be32(96)?).ok()? * 4096;
    if !log.contains(&changed) {
        return None;
    }
    let mut at = changed / 512 * 512;
    while disk.get(at..at + 4)? != [0xfe, 0xed, 0xba, 0xbe] {
        at = at.checked_sub(512).filter(|at| log.contains(at))?;
    }
    let record = Fields(&disk[at..log.end.min(disk.len())]);
    let len = usize::try_from(record.be32(12)?).ok()?;
    let headers = usize::try_from(record.be32(320)?).ok()?.div_ceil(32 << 10).max(1);
    let mut parts = vec![record.bytes(0, 32)?, &[0; 4], record.bytes(36, 328 - 36)?];
    for header in 1..len.div_ceil(32 << 10) {
        parts.push(record.bytes(header * 512, 260)?);
    }
    parts.push(record.bytes(headers * 512, len)?);
    Some((at + 32, sum(&parts)))
}

fn sum(parts: &[&[u8]]) -> [u8; 4] {
    (!parts.iter().fold(!0, |sum, part| linux_crc32c(sum, part))).to_le_bytes()
}

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let place = Reflinks::new(2 << 30);
    let image = place.at("image");
    for is_in_use in [false, true] {
        sparse(&image, SIZE);
        succeed(Command::new("mkfs.xfs").args(["-q", "-f", "-i", "nrext64=1"]).arg(&image));
        let bytes = {
            let mount = Mount::new(&image, "xfs", "noatime");
            generator::fill(mount.path(), Amount { names: 400, holes: 200 });
            File::open(mount.path()).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
            Churn::new(mount.path(), seed).work(50);
            if is_in_use { Some(fs::read(place.copy(&image, "snapshot")).expect("it was just made")) } else { None }
        };
        let bytes = bytes.unwrap_or_else(|| fs::read(&image).expect("it was just made"));
        let time = Duration::from_millis(2000 * compare::rounds(1));
        let what = if is_in_use { "in use" } else { "clean" };
        let open: hostile::Open = |disk| Ok(Box::new(Xfs::open(disk)?));
        hostile::change(what, bytes, open, checksum, &mut random, time);
    }
}
