//! FAT12, FAT16 and FAT32 as mtools fills them: what went in is what is read.

mod compare;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use compare::image::{FileDisk, scratch, sparse, succeed};
use compare::tree::{self, Tree};
use compare::{Random, fat};
use guest::fat::Fat;
use guest::{ErrorKind, GuestFs, Kind};

/// A volume: bytes, and what makes it.
type Set<'a> = (&'a str, u64, &'a [&'a str]);

fn make((_, bytes, mkfs): Set, image: &Path) {
    sparse(image, bytes);
    succeed(Command::new(mkfs[0]).args(&mkfs[1..]).arg(image));
}

/// Runs a program of mtools on an image, in UTC.
fn mtools(image: &Path, program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.env("TZ", "UTC").env("LC_ALL", "C.UTF-8").env("MTOOLS_SKIP_CHECK", "1");
    command.arg("-i").arg(image).args(arguments);
    command
}

/// Copies what is in a folder to the root of a volume.
fn copy(image: &Path, folder: &Path) {
    let names = fs::read_dir(folder).expect("it was made").map(|entry| entry.expect("a name").path());
    let mut names: Vec<PathBuf> = names.collect();
    names.sort();
    succeed(mtools(image, "mcopy", &["-s", "-m", "-Q"]).args(names).arg("::/"));
}

/// Makes what FAT can hold.
fn fill(root: &Path, names: u64) {
    let mut random = Random::new(11);
    fat::contents(&root.join("contents"), &mut random);
    fat::names(&root.join("names"), names);
    fat::times(&root.join("times"), i64::MAX);
}

/// Turns a tree of the kernel into what FAT keeps of it; what it does not keep is taken from `shown`.
fn as_kept(mut kernel: Tree, shown: &Tree, cluster: u64) -> Tree {
    for (path, file) in &mut kernel {
        let Some(shown) = shown.get(path) else { continue };
        let (mut known, found) = (shown.attributes.clone(), &file.attributes);
        known.kind = found.kind;
        (known.mode, known.uid, known.gid, known.links) = (0o755, 0, 0, 1);
        if found.kind == Kind::File {
            known.mode = 0o644;
            known.size = found.size;
            known.allocated = found.size.next_multiple_of(cluster);
            known.modified.seconds = found.modified.seconds / 2 * 2;
            known.modified.nanoseconds = 0;
            known.changed = known.modified;
        }
        file.attributes = known;
        file.inode = shown.inode;
    }
    kernel
}

/// Returns the bytes of a cluster, as a boot sector says it.
fn cluster_size(image: &Path) -> u64 {
    let mut sector = [0; 512];
    File::open(image).and_then(|file| file.read_exact_at(&mut sector, 0)).expect("a boot sector");
    u64::from(u16::from_le_bytes([sector[11], sector[12]])) * u64::from(sector[13])
}

/// Panics unless what is read of an image is what the kernel showed of the folder.
fn compare(what: &str, image: &Path, kernel: Tree) {
    let disk = Arc::new(FileDisk::open(image));
    let guest = Fat::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (shown, errors) = tree::of_guest(&guest, disk.as_ref());
    let differences = tree::differences(&as_kept(kernel, &shown, cluster_size(image)), &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", shown.len(), lines.join("\n"));
    let numbers: std::collections::HashSet<_> = shown.values().map(|file| file.inode).collect();
    assert_eq!(numbers.len(), shown.len(), "{what}: a number of two files");
}

#[test]
fn every_kind_of_volume_reads_as_it_was_filled() {
    let sets: [Set; 9] = [
        ("fat12", 8 << 20, &["mkfs.vfat", "-F", "12", "-n", "TWELVE"]),
        ("fat12", 30 << 20, &["mkfs.vfat", "-F", "12", "-s", "64", "-f", "1", "-r", "112"]),
        ("fat16", 16 << 20, &["mkfs.vfat", "-F", "16", "-s", "1", "-f", "1"]),
        ("fat16", 64 << 20, &["mkfs.vfat", "-F", "16"]),
        ("fat16", 64 << 20, &["mkfs.vfat", "-F", "16", "-S", "4096", "-s", "1"]),
        ("fat32", 40 << 20, &["mkfs.vfat", "-F", "32", "-s", "1"]),
        ("fat32", 300 << 20, &["mkfs.vfat", "-F", "32", "-s", "8", "-R", "64", "-h", "2048"]),
        ("fat32", 160 << 20, &["mkfs.vfat", "-F", "32", "-S", "2048", "-s", "1"]),
        ("fat32", 600 << 20, &["mkfs.vfat"]),
    ];
    let folder = scratch();
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("a new folder");
    fill(&source, 120 * compare::rounds(1));
    let kernel = tree::of_kernel(&source);
    for set in sets {
        let what = set.2.join(" ");
        let image = folder.path().join("image");
        let _ = fs::remove_file(&image);
        make(set, &image);
        copy(&image, &source);
        compare(&what, &image, kernel.clone());
        let facts = Fat::open(Arc::new(FileDisk::open(&image))).expect("it was opened before").facts();
        assert_eq!((facts.kind.as_str(), facts.is_replayed, facts.problems), (set.0, false, vec![]), "{what}");
        let told = |field: &str| {
            let output = Command::new("blkid").args(["-p", "-o", "value", "-s", field]).arg(&image).output();
            String::from_utf8(output.expect("blkid is there").stdout).expect("text").trim().to_owned()
        };
        assert_eq!((facts.label, facts.uuid), (told("LABEL"), told("UUID")), "{what}");
    }
}

#[test]
fn files_in_many_pieces_on_a_full_volume_are_read() {
    let sets: [Set; 3] = [
        ("fat12", 2 << 20, &["mkfs.vfat", "-F", "12", "-s", "1"]),
        ("fat16", 3 << 20, &["mkfs.vfat", "-F", "16", "-s", "1"]),
        ("fat32", 34 << 20, &["mkfs.vfat", "-F", "32", "-s", "1"]),
    ];
    for set in sets {
        let (folder, mut random) = (scratch(), Random::new(5));
        let (source, image) = (folder.path().join("source"), folder.path().join("image"));
        make(set, &image);
        fs::create_dir_all(source.join("pieces")).expect("a new folder");
        for number in 0..200 {
            fs::write(source.join(format!("pieces/piece {number}")), random.bytes(1500)).expect("room");
        }
        copy(&image, &source);
        for number in (0..200).step_by(2) {
            fs::remove_file(source.join(format!("pieces/piece {number}"))).expect("it was made");
        }
        let removed: Vec<_> = (0..200).step_by(2).map(|number| format!("::pieces/piece {number}")).collect();
        succeed(mtools(&image, "mdel", &[]).args(removed));
        for size in [set.1 / 3, set.1 / 8, 4000] {
            // As long as there is room.
            for number in 0.. {
                let name = format!("{number} of {size}");
                let (from, to) = (source.join(&name), format!("::/{name}"));
                fs::write(&from, random.bytes(usize::try_from(size).expect("small"))).expect("room");
                let output = mtools(&image, "mcopy", &["-m", "-Q"]).arg(&from).arg(&to).output().expect("mtools");
                if !output.status.success() {
                    fs::remove_file(&from).expect("it was made");
                    // What was copied of it stays.
                    let _ = mtools(&image, "mdel", &[&to]).output();
                    break;
                }
            }
        }
        compare(set.0, &image, tree::of_kernel(&source));
    }
}

#[test]
fn attributes_and_floppies_are_read_as_mtools_makes_them() {
    let folder = scratch();
    let image = folder.path().join("image");
    succeed(&mut mtools(&image, "mformat", &["-C", "-f", "1440", "-v", "FLOPPY", "-N", "12345678", "::"]));
    let file = folder.path().join("file.txt");
    fs::write(&file, "text").expect("room");
    succeed(mtools(&image, "mcopy", &["-m"]).arg(&file).arg("::/readonly.txt"));
    succeed(mtools(&image, "mcopy", &["-m"]).arg(&file).arg("::/UPPER.TXT"));
    succeed(mtools(&image, "mcopy", &["-m"]).arg(&file).arg("::/gone"));
    succeed(&mut mtools(&image, "mmd", &["::/hidden"]));
    succeed(&mut mtools(&image, "mattrib", &["+r", "::/readonly.txt"]));
    succeed(&mut mtools(&image, "mattrib", &["+h", "+s", "::/hidden"]));
    succeed(&mut mtools(&image, "mdel", &["::/gone"]));
    let fat = Fat::open(Arc::new(FileDisk::open(&image))).expect("it is a floppy");
    let facts = fat.facts();
    assert_eq!((facts.kind.as_str(), facts.label.as_str(), facts.uuid.as_str()), ("fat12", "FLOPPY", "1234-5678"));
    let found: BTreeMap<_, _> =
        fat.list(fat.root()).unwrap().into_iter().map(|entry| (entry.name, entry.inode)).collect();
    let names: Vec<_> = found.keys().map(|name| String::from_utf8(name.clone()).unwrap()).collect();
    assert_eq!(names, ["UPPER.TXT", "hidden", "readonly.txt"]);
    let attributes = |name: &str| fat.attributes(found[name.as_bytes()]).unwrap();
    let known = |name| (attributes(name).kind, attributes(name).mode, attributes(name).size);
    assert_eq!(known("readonly.txt"), (Kind::File, 0o444, 4));
    assert_eq!(known("UPPER.TXT"), (Kind::File, 0o644, 4));
    assert_eq!(known("hidden"), (Kind::Directory, 0o755, 512));
    let of = |name: &str| found[name.as_bytes()];
    assert_eq!(fat.list(of("UPPER.TXT")).unwrap_err().kind(), ErrorKind::WrongKind);
    assert_eq!(fat.extents(of("hidden"), 0, 1).unwrap_err().kind(), ErrorKind::WrongKind);
    assert_eq!(fat.target(of("UPPER.TXT")).unwrap_err().kind(), ErrorKind::WrongKind);
    for inode in [0, 2, 16, u64::MAX, u64::MAX / 32] {
        assert_eq!(fat.attributes(guest::Inode(inode)).unwrap_err().kind(), ErrorKind::NotFound, "{inode}");
    }
}

#[test]
fn a_volume_cut_short_shows_what_is_there() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    make(("fat16", 16 << 20, &["mkfs.vfat", "-F", "16", "-s", "4"]), &image);
    fs::create_dir(&source).expect("a new folder");
    fs::write(source.join("there"), Random::new(1).bytes(100_000)).expect("room");
    fs::write(source.join("cut"), Random::new(2).bytes(1_000_000)).expect("room");
    // "cut" is the first in order.
    copy(&image, &source);
    File::options().write(true).open(&image).and_then(|file| file.set_len(600_000)).expect("shorter");
    let fat = Fat::open(Arc::new(FileDisk::open(&image))).expect("its start is there");
    let problem = "it is of 16777216 bytes on a volume of 600000: what lies past the end is not there";
    assert_eq!(fat.facts().problems, [problem]);
    let find = |name: &[u8]| fat.list(fat.root()).unwrap().into_iter().find(|entry| entry.name == name).unwrap().inode;
    let window = fat.extents(find(b"cut"), 0, 1000).unwrap();
    assert!((400_000..600_000).contains(&window.until), "{window:?}");
    assert_eq!(fat.extents(find(b"cut"), window.until, 1000).unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(fat.extents(find(b"there"), 0, 1000).unwrap_err().kind(), ErrorKind::Damaged);
}
