//! Whatever a guest writes into the metadata of Btrfs: reading ends, soon, with an answer or an error.

mod compare;

use std::fs;
use std::ops::Range;
use std::process::Command;
use std::time::Duration;

use compare::Random;
use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::hostile;
use compare::image::{Mount, Reflinks, sparse, succeed};
use fs_btrfs::superblock::ChecksumType;
use guest::btrfs::Btrfs;

/// Bytes of an image: no fewer are taken.
const SIZE: u64 = 128 << 20;

/// The first superblock.
const SUPERBLOCK: usize = 64 << 10;

/// Returns the checksum of a superblock or a block of a tree, which has the number of the filesystem at the same place.
fn checksum(bytes: &[u8], read: &Range<usize>, _: usize) -> Option<(usize, [u8; 4])> {
    let number = |at: usize| bytes.get(at + 32..at + 48);
    let block = &bytes[read.clone()];
    let is_metadata = block.len() >= 4096 && number(read.start) == number(SUPERBLOCK);
    is_metadata.then(|| {
        let digest = ChecksumType::Crc32c.digest(&block[32..]);
        (read.start, [digest[0], digest[1], digest[2], digest[3]])
    })
}

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let mut random = Random::new(Random::seed());
    let place = Reflinks::new(1 << 30);
    let sets: [(&[&str], &str); 3] = [
        (&[], "compress-force=zstd"),
        (&["-M", "-n", "4096"], "compress-force=lzo"),
        (&["-m", "single", "-O", "^no-holes"], "compress-force=zlib"),
    ];
    for (mkfs, options) in sets {
        let image = place.at("image");
        sparse(&image, SIZE);
        succeed(Command::new("mkfs.btrfs").args(["-q", "-f"]).args(mkfs).arg(&image));
        let bytes = {
            let mount = Mount::new(&image, "btrfs", &format!("noatime,{options}"));
            let folder = mount.path().join("subvolume");
            succeed(Command::new("btrfs").args(["subvolume", "create"]).arg(&folder));
            generator::fill(mount.path(), Amount { names: 300, holes: 100 });
            Churn::new(&folder, random.below(1000)).work(50);
            for number in 0..20 {
                fs::write(folder.join(format!("text-{number}")), "text ".repeat(number * 5000)).expect("room");
            }
            let snapshot = mount.path().join("snapshot");
            succeed(Command::new("btrfs").args(["subvolume", "snapshot"]).args([&folder, &snapshot]));
            drop(mount);
            fs::read(&image).expect("it was just made")
        };
        let time = Duration::from_millis(1500 * compare::rounds(1));
        let what = format!("{} {options}", mkfs.join(" "));
        hostile::change(&what, bytes, |disk| Ok(Box::new(Btrfs::open(vec![disk])?)), checksum, &mut random, time);
    }
}
