//! A tree with one of each thing that a reader can get wrong.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::Random;

/// How much of it to make.
#[derive(Debug, Clone, Copy)]
pub struct Amount {
    /// Names in the largest directory.
    pub names: u64,
    /// Holes in the file with the most.
    pub holes: u64,
}

/// Fills a mounted filesystem. What it has no place for (attributes, times, preallocation) is left out.
pub fn fill(root: &Path, amount: Amount) {
    let mut random = Random::new(7);
    contents(&root.join("contents"), amount, &mut random);
    names(&root.join("names"), amount);
    kinds(&root.join("kinds"));
    owners(&root.join("owners"));
    times(&root.join("times"));
    attributes(&root.join("attributes"), &mut random);
}

fn folder(path: &Path) {
    fs::create_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn contents(root: &Path, amount: Amount, random: &mut Random) {
    folder(root);
    let limits =
        [0, 1, 59, 60, 61, 100, 128, 150, 160, 200, 255, 512, 1023, 1024, 1025, 4095, 4096, 4097, 12_288, 12_289];
    for size in limits.into_iter().chain([65_535, 65_536, 65_537, 300_000, 3_000_000]) {
        fs::write(root.join(format!("size-{size}")), random.bytes(size)).expect("room");
    }
    let make = |name: &str| File::create(root.join(name)).expect("a new file");
    let holes = make("holes");
    for at in 0..amount.holes {
        holes.write_all_at(&random.bytes(700), at * 16_384 + 5000).expect("room");
    }
    let (mut left, mut right) = (make("left"), make("right"));
    for _ in 0..40 {
        for file in [&mut left, &mut right] {
            file.write_all(&random.bytes(5000)).expect("room");
            file.sync_data().expect("it is written");
        }
    }
    make("all-hole").set_len(5_000_000).expect("sparse");
    make("far").write_all_at(b"far", 2 << 30).expect("sparse");
    let tail = make("tail-hole");
    tail.write_all_at(&random.bytes(10_000), 0).expect("room");
    tail.set_len(9_000_001).expect("sparse");
    let cut = make("cut");
    cut.write_all_at(&random.bytes(100_000), 0).expect("room");
    cut.set_len(50_001).expect("shorter");
    let unwritten = make("unwritten");
    if rustix::fs::fallocate(&unwritten, FallocateFlags::empty(), 0, 400_000).is_ok() {
        unwritten.write_all_at(&random.bytes(5000), 100_001).expect("room");
        let beyond = make("beyond-end");
        beyond.write_all_at(&random.bytes(5000), 0).expect("room");
        rustix::fs::fallocate(&beyond, FallocateFlags::KEEP_SIZE, 0, 500_000).expect("room");
        let punched = make("punched");
        punched.write_all_at(&random.bytes(200_000), 0).expect("room");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&punched, punch, 10_000, 90_000).expect("a hole");
    }
}

fn names(root: &Path, amount: Amount) {
    folder(root);
    let odd: [&[u8]; 12] = [
        b"with space",
        b"new\nline",
        b"\x01\x02\x1b[31m",
        b"latin-\xe9",
        "composed-\u{e9}".as_bytes(),
        "decomposed-e\u{301}".as_bytes(),
        "\u{1f600}".as_bytes(),
        b"...",
        b"-rf",
        b"CON",
        b"back\\slash",
        &[b'n'; 255],
    ];
    for name in odd {
        match File::create(root.join(std::ffi::OsStr::from_bytes(name))) {
            // Names are UTF-16 there.
            Err(error) if rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::ILSEQ) => {}
            created => drop(created.expect("a name of bytes")),
        }
    }
    let mut deep = root.join("deep");
    folder(&deep);
    for level in 0..50 {
        deep = deep.join(format!("level-{level}"));
        folder(&deep);
    }
    let large = root.join("large");
    folder(&large);
    for number in 0..amount.names {
        File::create(large.join(format!("a-rather-long-name-of-number-{number}"))).expect("an inode");
    }
    for number in (0..amount.names).step_by(7) {
        fs::remove_file(large.join(format!("a-rather-long-name-of-number-{number}"))).expect("it was made");
    }
    let many = root.join("many");
    folder(&many);
    for number in 0..100 {
        folder(&many.join(format!("{number}")));
        fs::write(many.join(format!("{number}/file")), format!("{number}")).expect("room");
    }
    // As many blocks as an indirect pointer needs, most of them empty.
    let emptied = root.join("emptied");
    folder(&emptied);
    for number in 0..300 {
        File::create(emptied.join(format!("{number}-{}", "e".repeat(200)))).expect("an inode");
    }
    for number in 0..299 {
        fs::remove_file(emptied.join(format!("{number}-{}", "e".repeat(200)))).expect("it was made");
    }
}

fn kinds(root: &Path) {
    folder(root);
    for len in [1, 58, 59, 60, 61, 100, 150, 1000, 1023] {
        symlink("t".repeat(len), root.join(format!("link-{len}"))).expect("a link");
    }
    for len in [1024, 4000, 4095] {
        // Only where a block has room for it.
        let _ = symlink("t".repeat(len), root.join(format!("link-{len}")));
    }
    match symlink(std::ffi::OsStr::from_bytes(b"../\xff\xfe/x"), root.join("link-bytes")) {
        Err(error) if rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::ILSEQ) => {}
        made => made.expect("a link"),
    }
    let linked = root.join("linked");
    fs::write(&linked, "many names").expect("room");
    for number in 0..100 {
        fs::hard_link(&linked, root.join(format!("name-{number}"))).expect("a name");
    }
    let nodes = [
        ("fifo", FileType::Fifo, 0, 0),
        ("socket", FileType::Socket, 0, 0),
        ("null", FileType::CharacterDevice, 1, 3),
        ("disk", FileType::BlockDevice, 8, 255),
        ("large-minor", FileType::BlockDevice, 8, 256),
        ("larger-minor", FileType::CharacterDevice, 511, 262_143),
        ("large", FileType::CharacterDevice, 4095, 1_048_575),
    ];
    for (name, kind, major, minor) in nodes {
        let device = rustix::fs::makedev(major, minor);
        let made = rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), device);
        // XFS has room for 9 and 18 bits.
        assert!(made.is_ok() || minor >= 1 << 18, "{name}: {made:?}");
    }
}

fn owners(root: &Path) {
    folder(root);
    for mode in [0, 0o1, 0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o7777] {
        let file = root.join(format!("mode-{mode:o}"));
        fs::write(&file, "m").expect("room");
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("it is ours");
        let folder_ = root.join(format!("folder-{mode:o}"));
        folder(&folder_);
        fs::set_permissions(&folder_, fs::Permissions::from_mode(mode)).expect("it is ours");
    }
    for id in [1, 65_534, 65_535, 65_536, 4_294_967_294] {
        let file = root.join(format!("owner-{id}"));
        fs::write(&file, "o").expect("room");
        lchown(&file, Some(id), Some(id / 2)).expect("root may");
    }
}

fn times(root: &Path) {
    folder(root);
    let moments = [
        (-2_147_483_648, 0),
        (-631_152_000, 1),
        (-1, 999_999_999),
        (0, 0),
        (1_700_000_000, 123_456_789),
        (2_147_483_647, 5),
        (2_147_483_648, 6),
        (4_102_444_800, 7),
        (13_569_465_600, 999_999_999),
        (15_032_385_535, 0),
    ];
    for (number, (tv_sec, tv_nsec)) in moments.into_iter().enumerate() {
        let file = root.join(format!("moment-{number}"));
        fs::write(&file, "t").expect("room");
        let times = Timestamps {
            last_access: Timespec { tv_sec: tv_sec / 2, tv_nsec },
            last_modification: Timespec { tv_sec, tv_nsec },
        };
        rustix::fs::utimensat(CWD, &file, &times, AtFlags::SYMLINK_NOFOLLOW).expect("clamped if need be");
    }
}

fn attributes(root: &Path, random: &mut Random) {
    folder(root);
    let entry = |tag: u16, permissions: u16, id: u32| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes
    };
    let list = [
        vec![2, 0, 0, 0],
        entry(1, 6, u32::MAX),
        entry(2, 4, 1000),
        entry(2, 7, 4_000_000_000),
        entry(4, 4, u32::MAX),
        entry(8, 5, 100),
        entry(0x10, 7, u32::MAX),
        entry(0x20, 0, u32::MAX),
    ]
    .concat();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let values: [(&str, &str, Vec<u8>); 11] = [
        ("one", "user.name", b"value".to_vec()),
        ("empty", "user.empty", Vec::new()),
        ("block", "user.large", random.bytes(900)),
        ("larger", "user.larger", random.bytes(3000)),
        ("apart", "user.apart", random.bytes(30_000)),
        ("namespaces", "trusted.t", b"t".to_vec()),
        ("namespaces", "security.s", b"s".to_vec()),
        ("program", "security.capability", capability.to_vec()),
        ("acl", "system.posix_acl_access", list.clone()),
        ("folder", "system.posix_acl_access", list.clone()),
        ("folder", "system.posix_acl_default", list),
    ];
    let set = |file: &Path, name: &str, value: &[u8]| {
        // Not every filesystem has room for all of them.
        let _ = rustix::fs::lsetxattr(file, name, value, XattrFlags::empty());
    };
    for (file, name, value) in values {
        let path = root.join(file);
        match file {
            "folder" if !path.exists() => folder(&path),
            "folder" => {}
            _ => drop(File::options().create(true).append(true).open(&path).expect("a file")),
        }
        set(&path, name, &value);
    }
    let many = root.join("many");
    fs::write(&many, "m").expect("room");
    for number in 0..30 {
        set(&many, &format!("user.number-{number}"), format!("{number}").as_bytes());
    }
    let both = root.join("both");
    fs::write(&both, random.bytes(100)).expect("room");
    set(&both, "user.short", b"s");
    set(&both, "user.long", &random.bytes(500));
    let link = root.join("link");
    symlink("t", &link).expect("a link");
    set(&link, "trusted.link", b"l");
    set(&link, "security.link", b"l");
    // Names are bytes.
    let bytes = root.join("bytes");
    fs::write(&bytes, "b").expect("room");
    let _ = rustix::fs::lsetxattr(&bytes, &b"user.\xff\xfe"[..], b"v", XattrFlags::empty());
}
