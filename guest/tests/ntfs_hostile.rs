//! Whatever a guest writes into its metadata: reading ends, soon, with an answer or an error.

#[path = "compare/checksums.rs"]
mod checksums;
mod compare;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use compare::generator::{self, Amount};
use compare::image::{Mount, scratch, sparse, succeed};
use compare::journal::{self, Crash};
use compare::{Random, hostile};
use guest::ntfs::Ntfs;
use rustix::fs::XattrFlags;

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let folder = scratch();
    let image = folder.path().join("image");
    for cluster_size in ["512", "4096"] {
        sparse(&image, 24 << 20);
        succeed(Command::new("mkntfs").args(["-q", "-F", "-Q", "-c", cluster_size]).arg(&image));
        {
            let mount = Mount::new(&image, "ntfs-3g", "streams_interface=xattr,compression,noatime");
            generator::fill(mount.path(), Amount { names: 200, holes: 300 });
            let packed = mount.path().join("packed");
            fs::create_dir(&packed).expect("a new folder");
            rustix::fs::lsetxattr(&packed, "system.ntfs_attrib", &0x810_u32.to_le_bytes(), XattrFlags::empty())
                .expect("it can be compressed");
            for number in 0..3 {
                let file = File::create(packed.join(format!("{number}"))).expect("a new file");
                file.write_all_at(b"again and ".repeat(9000).as_slice(), number * 30_000).expect("room");
            }
        }
        let bytes = fs::read(&image).expect("it was just made");
        let time = Duration::from_millis(2500 * compare::rounds(1));
        // What a sector ends with is left as it is, mostly, so that records and blocks of indexes are looked into.
        let open: hostile::Open = |disk| Ok(Box::new(Ntfs::open(disk)?));
        hostile::change(cluster_size, bytes, open, checksums::none, &mut random, time);
    }
}

#[test]
fn reading_ends_whatever_is_in_the_journal() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let folder = scratch();
    let image = folder.path().join("image");
    sparse(&image, 16 << 20);
    succeed(Command::new("mkntfs").args(["-q", "-F", "-Q", "-c", "4096"]).arg(&image));
    let mount = || Mount::new(&image, "ntfs-3g", "streams_interface=xattr,noatime");
    generator::fill(mount().path(), Amount { names: 200, holes: 30 });
    let before = fs::read(&image).expect("it was just made");
    {
        let mount = mount();
        for number in 0..60 {
            fs::write(mount.path().join(format!("{number}")), vec![7; number * 90]).expect("room");
        }
        fs::rename(mount.path().join("names"), mount.path().join("renamed")).expect("it was made");
    }
    let after = fs::read(&image).expect("it was just changed");
    for (version, is_ended) in [(1, true), (2, false)] {
        let crash = Crash { is_ended, written: 30, version, is_copied: true, is_unknown: false };
        let (bytes, _) = journal::crashed(&before, &after, crash, &mut random);
        let time = Duration::from_millis(2500 * compare::rounds(1));
        let open: hostile::Open = |disk| Ok(Box::new(Ntfs::open(disk)?));
        let what = format!("version {version}");
        hostile::change(&what, bytes, open, |_, _, _| None, &mut random, time);
    }
}
