//! Whatever a guest writes into the metadata of Btrfs: reading ends, soon, with an answer or an error.

#[path = "compare/checksums.rs"]
mod checksums;
mod compare;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use compare::Random;
use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::hostile;
use compare::image::{Mount, Reflinks, sparse, succeed};
use guest::btrfs::Btrfs;

/// Bytes of an image: no fewer are taken.
const SIZE: u64 = 128 << 20;

/// The first superblock.
const SUPERBLOCK: usize = 64 << 10;

/// Whether that is a block of a log.
fn is_of_log(bytes: &[u8]) -> bool {
    bytes.get(88..96) == Some(&6_u64.wrapping_neg().to_le_bytes())
}

fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
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
        let mount = Mount::new(&image, "btrfs", &format!("noatime,commit=300,{options}"));
        let folder = mount.path().join("subvolume");
        succeed(Command::new("btrfs").args(["subvolume", "create"]).arg(&folder));
        generator::fill(mount.path(), Amount { names: 300, holes: 100 });
        let mut churn = Churn::new(&folder, random.below(1000));
        churn.work(50);
        for number in 0..20 {
            fs::write(folder.join(format!("text-{number}")), "text ".repeat(number * 5000)).expect("room");
        }
        let snapshot = mount.path().join("snapshot");
        succeed(Command::new("btrfs").args(["subvolume", "snapshot"]).args([&folder, &snapshot]));
        churn.sync();
        let logged = place.at("logged");
        // What a sync does not let stay in the log is committed, and then there is none.
        let bytes = loop {
            churn.work_fast(20);
            fs::write(folder.join("synced"), "synced").and_then(|()| sync(&folder.join("synced"))).expect("room");
            let bytes = fs::read(place.copy(&image, "logged")).expect("it was just made");
            fs::remove_file(&logged).expect("it is ours");
            if bytes[SUPERBLOCK + 0x60..][..8] != [0; 8] {
                break bytes;
            }
        };
        drop((churn, mount));
        let time = Duration::from_millis(1500 * compare::rounds(1));
        let what = format!("{} {options}", mkfs.join(" "));
        let open: hostile::Open = |disk| Ok(Box::new(Btrfs::open(vec![disk])?));
        hostile::change(&what, bytes.clone(), open, checksums::btrfs, &mut random, time);
        hostile::change_where(&format!("{what}, log"), bytes, open, checksums::btrfs, &mut random, time, is_of_log);
    }
}
