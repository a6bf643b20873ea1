//! Whatever a guest writes into ISO 9660: reading ends, soon, with an answer or an error.

mod compare;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use compare::image::{FileDisk, scratch, succeed};
use compare::{Random, hostile};
use guest::iso::Iso;
use guest::{ErrorKind, GuestFs, Inode};

/// Makes folders, long names and targets, and files.
fn fill(root: &Path) {
    let mut deep = root.join("deep");
    fs::create_dir_all(&deep).expect("a new folder");
    for level in 0..20 {
        deep = deep.join(format!("level-{level}"));
        fs::create_dir(&deep).expect("a new folder");
        fs::write(deep.join("file"), format!("{level}")).expect("room");
    }
    for folder in ["long", "short"] {
        fs::create_dir(root.join(folder)).expect("a new folder");
    }
    // The programs are wrong in what they make of long names and many targets, or long names and compression.
    for number in 0..600 {
        let text = format!("line {number}\n").repeat(number);
        fs::write(root.join(format!("long/{number}-{}", "n".repeat(number % 230))), &text).expect("room");
        fs::write(root.join(format!("short/{number}")), &text).expect("room");
    }
    for number in 0..14 {
        symlink(format!("{}end", "target/".repeat(number)), root.join(format!("link-{number}"))).expect("a link");
    }
    symlink(format!("{}end", "component/".repeat(60)), root.join("link")).expect("a link");
}

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let mut random = Random::new(Random::seed());
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fill(&source);
    let sets: [(&str, &[&str]); 5] = [
        ("xorrisofs", &["-quiet", "-R", "-rr_reloc_dir", "/moved", "-o", "image", "source"]),
        ("xorrisofs", &["-quiet", "-R", "-J", "-joliet-long", "-o", "image", "source"]),
        ("xorrisofs", &["-quiet", "--norock", "-J", "-joliet-long", "-o", "image", "source"]),
        ("xorrisofs", &["-quiet", "--norock", "-iso-level", "3", "-o", "image", "source"]),
        (
            "xorriso",
            &["-outdev", "image", "-map", "source/short", "/", "-set_filter_r", "--zisofs", "/", "--", "-commit"],
        ),
    ];
    for (program, options) in sets {
        let _ = fs::remove_file(&image);
        succeed(Command::new(program).args(options).current_dir(folder.path()));
        let bytes = fs::read(&image).expect("it was just made");
        let time = Duration::from_millis(1500 * compare::rounds(1));
        let what = format!("{program} {}", options.join(" "));
        hostile::change(&what, bytes, |disk| Ok(Box::new(Iso::open(disk)?)), |_, _, _| None, &mut random, time);
    }
}

#[test]
fn a_directory_in_itself_and_one_without_end_are_told_from_others() {
    let folder = scratch();
    let (source, path) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir_all(source.join("RING")).expect("a new folder");
    fs::create_dir(source.join("VAST")).expect("a new folder");
    fs::write(source.join("HUGE"), "text").expect("room");
    succeed(Command::new("xorrisofs").args(["-quiet", "--norock", "-o"]).args([&path, &source]));
    let mut bytes = fs::read(&path).expect("it was just made");
    // After the length of its name, which is not so in the table of paths.
    let record = |bytes: &[u8], name: &[u8]| {
        bytes.windows(name.len()).position(|found| found == name).expect("it is there") - 32
    };
    let root = bytes[16 * 2048 + 158..16 * 2048 + 162].to_vec();
    let (ring, vast, huge) = (record(&bytes, b"\x04RING"), record(&bytes, b"\x04VAST"), record(&bytes, b"\x07HUGE.;1"));
    let block = |at: usize| u32::from_le_bytes(bytes[at + 2..at + 6].try_into().expect("four"));
    let vast_at = usize::try_from(block(vast)).expect("it fits in memory") * 2048;
    bytes[ring + 2..ring + 6].copy_from_slice(&root);
    bytes[vast_at + 10..vast_at + 14].fill(0xff);
    bytes[huge + 10..huge + 14].fill(0xff);
    fs::write(&path, bytes).expect("room");
    let guest = Iso::open(Arc::new(FileDisk::open(&path))).expect("it is one");
    let entries = guest.list(guest.root()).expect("it is sound");
    let inode = |name: &[u8]| entries.iter().find(|entry| entry.name == name).expect("it is there").inode;
    assert_eq!(inode(b"ring"), guest.root());
    assert_eq!(guest.list(inode(b"vast")).map_err(|error| error.kind()), Err(ErrorKind::TooMuch));
    let huge = inode(b"huge");
    assert_eq!(guest.attributes(huge).map(|attributes| attributes.size), Ok(u64::from(u32::MAX)));
    let window = guest.extents(huge, 0, 1).expect("the start is there");
    assert_eq!(guest.extents(huge, window.until, 1).map_err(|error| error.kind()), Err(ErrorKind::Damaged));
    for number in [0, 40_000, u64::MAX, 1 << 40] {
        assert_eq!(guest.attributes(Inode(number)).map_err(|error| error.kind()), Err(ErrorKind::NotFound), "{number}");
    }
}
