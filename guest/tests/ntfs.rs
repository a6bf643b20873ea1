//! NTFS as ntfs-3g shows it.

mod compare;

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, scratch, sparse, succeed};
use compare::tree::{self, Tree};
use compare::{Random, rounds};
use guest::ntfs::Ntfs;
use guest::{GuestFs, Kind, Time};
use rustix::fs::XattrFlags;

const ATTRIBUTES: &[u8] = b"user.ntfs.attrib";

const COMPRESSED: u32 = 0x800;

/// Makes a volume of `bytes`.
fn make(image: &Path, bytes: u64, arguments: &[&str]) {
    sparse(image, bytes);
    let label = "M\u{e4}rz \u{1f600}";
    succeed(Command::new("mkntfs").args(["-q", "-F", "-Q", "-L", label]).args(arguments).arg(image));
}

fn mount(image: &Path, options: &str) -> Mount {
    Mount::new(image, "ntfs-3g", &format!("streams_interface=xattr,compression,noatime{options}"))
}

fn attributes(path: &Path) -> u32 {
    let mut bytes = [0; 4];
    rustix::fs::lgetxattr(path, "system.ntfs_attrib", &mut bytes[..]).expect("all files have them");
    u32::from_le_bytes(bytes)
}

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("{}: {name}: {error}", path.display()));
}

/// What NTFS has and other filesystems have not.
fn fill(root: &Path, amount: u64, random: &mut Random) {
    let folder = |name: &str| {
        let path = root.join(name);
        fs::create_dir(&path).expect("a new folder");
        path
    };
    let names = folder("utf-16");
    // 255 units are up to 765 bytes.
    for name in ["\u{20ac}".repeat(255), format!("{}x", "\u{1f600}".repeat(127)), "trail. ".to_owned()] {
        fs::write(names.join(name), "n").expect("a name");
    }
    for number in 0..40 {
        fs::hard_link(names.join("trail. "), names.join(format!("{}{number}", "l".repeat(200)))).expect("a name");
    }
    let streams = folder("streams");
    for (file, size) in [("small", 10), ("resident", 600), ("beside", 700), ("large", 65_536)] {
        let path = streams.join(file);
        fs::write(&path, random.bytes(100)).expect("room");
        set(&path, "user.stream", &random.bytes(size));
        set(&path, "user.\u{20ac} 2", b"another");
        set(&path, "user.empty", b"");
    }
    set(&streams, "user.of a folder", b"stream");
    for size in 400..800 {
        // From some size on it does not fit in the record.
        if size % 20 == 0 || (690..740).contains(&size) {
            fs::write(streams.join(format!("size-{size}")), random.bytes(size)).expect("room");
        }
    }
    // Written alternately, each piece is apart.
    let fragments = folder("fragments");
    let (mut left, mut right) =
        (File::create(fragments.join("left")).expect("new"), File::create(fragments.join("right")).expect("new"));
    for _ in 0..amount {
        for file in [&mut left, &mut right] {
            file.write_all(&random.bytes(4096)).expect("room");
        }
    }
}

/// What is compressed.
fn fill_compressed(root: &Path, random: &mut Random) {
    let folder = root.join("compressed");
    fs::create_dir(&folder).expect("a new folder");
    set(&folder, "system.ntfs_attrib", &(attributes(&folder) | COMPRESSED).to_le_bytes());
    let text: Vec<u8> = (0..60_000).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
    let make = |name: &str| File::create(folder.join(name)).expect("a new file");
    make("text").write_all(&text).expect("room");
    make("short").write_all(&text[..100]).expect("room");
    make("a unit").write_all(&text[..65_536]).expect("room");
    make("a unit and more").write_all(&text[..65_537]).expect("room");
    make("zeroes").write_all(&[0; 300_000]).expect("room");
    make("random").write_all(&random.bytes(300_000)).expect("room");
    let mixed = make("mixed");
    for number in 0..40 {
        let len = usize::try_from(random.below(60_000)).expect("small");
        let bytes = if number % 3 == 0 { random.bytes(len) } else { text[len..2 * len].to_vec() };
        mixed.write_all_at(&bytes, number * 50_000).expect("room");
    }
    let holes = make("holes");
    for number in 0..20 {
        holes.write_all_at(&text[..5000], number * 200_000 + 1234).expect("room");
    }
    holes.set_len(5_000_000).expect("sparse");
    assert_ne!(attributes(&folder.join("text")) & COMPRESSED, 0, "it is not compressed");
}

/// Returns what ntfs-3g shows, with what is shown otherwise here as documented.
fn truth(mount: &Mount) -> Tree {
    let mut tree = tree::of_kernel(mount.path());
    // What is set a fraction of a second before 1970 ntfs-3g shows as the second itself.
    if let Some(shown) = tree.get_mut(&b"times/moment-2"[..]) {
        shown.attributes.modified = Time { seconds: -1, nanoseconds: 999_999_900 };
    }
    for (path, shown) in &mut tree {
        let path = mount.path().join(std::str::from_utf8(path).expect("names are UTF-8"));
        let attributes = attributes(&path);
        shown.xattrs.insert(ATTRIBUTES.to_vec(), format!("{attributes:#010x}").into_bytes());
        shown.attributes.mode = match shown.attributes.kind {
            Kind::Directory => 0o755,
            Kind::Symlink => 0o777,
            Kind::File if attributes & 1 != 0 => 0o444,
            _ => 0o644,
        };
        match shown.attributes.kind {
            Kind::Fifo | Kind::Socket => {
                shown.attributes.kind = Kind::File;
                shown.content = DefaultHasher::new().finish();
            }
            Kind::CharacterDevice | Kind::BlockDevice => shown.attributes.size = 0,
            _ => {}
        }
    }
    tree
}

fn compare(what: &str, image: &Path, truth: &Tree) -> Ntfs {
    let disk = Arc::new(FileDisk::open(image));
    let guest = Ntfs::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (mut shown, errors) = tree::of_guest(&guest, disk.as_ref());
    for shown in shown.values_mut() {
        // Streams in which ntfs-3g keeps what it has no other place for, and does not list.
        shown.xattrs.retain(|name, _| !name.starts_with(b"user.ntfs-3g."));
    }
    let differences = tree::differences(truth, &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", truth.len(), lines.join("\n"));
    guest
}

#[test]
fn volumes_of_every_size_of_cluster_read_as_ntfs_3g_shows_them() {
    let sets: [&[&str]; 5] =
        [&["-c", "4096"], &["-c", "512"], &["-c", "65536"], &["-c", "2097152"], &["-s", "4096", "-c", "4096"]];
    let sets = if rounds(1) > 1 { &sets[..] } else { &sets[..4] };
    for set in sets {
        let what = set.join(" ");
        let mut random = Random::new(3);
        let folder = scratch();
        let image = folder.path().join("image");
        let is_huge = what.contains("2097152");
        make(&image, if is_huge { 4 << 30 } else { 96 << 20 }, set);
        {
            let mount = mount(&image, "");
            generator::fill(mount.path(), Amount { names: 1500, holes: if is_huge { 20 } else { 300 } });
            // Reading two gigabytes of zeroes takes ntfs-3g too long.
            fs::remove_file(mount.path().join("contents/far")).expect("it was made");
            fill(mount.path(), if is_huge { 20 } else { 1500 }, &mut random);
            if what == "-c 4096" || what == "-c 512" {
                fill_compressed(mount.path(), &mut random);
            }
        }
        let guest = compare(&what, &image, &truth(&mount(&image, ",ro")));
        let facts = guest.facts();
        assert_eq!((facts.kind.as_str(), facts.label.as_str()), ("ntfs", "M\u{e4}rz \u{1f600}"), "{what}");
        assert_eq!((facts.is_replayed, facts.problems), (false, vec![]), "{what}");
        let blkid =
            Command::new("blkid").args(["-p", "-o", "value", "-s", "UUID"]).arg(&image).output().expect("blkid");
        assert_eq!(String::from_utf8_lossy(&blkid.stdout).trim(), facts.uuid);
    }
}
