//! exFAT as exfat-fuse shows it, another program than the one that is tested.

mod compare;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use compare::image::{FileDisk, Mount, scratch, sparse, succeed};
use compare::tree::{self, Tree};
use compare::{Random, fat};
use guest::exfat::ExFat;
use guest::{ErrorKind, GuestFs, Inode, Kind};

fn make(image: &Path, bytes: u64, options: &[&str]) {
    let _ = fs::remove_file(image);
    sparse(image, bytes);
    succeed(Command::new("mkfs.exfat").args(options).arg(image));
}

/// Makes what exFAT can hold, and files in many pieces.
fn fill(root: &Path) {
    let mut random = Random::new(13);
    fat::contents(&root.join("contents"), &mut random);
    fat::names(&root.join("names"), 300 * compare::rounds(1));
    // For exfat-fuse 2100 is a leap year.
    fat::times(&root.join("times"), 4_107_456_000);
    let pieces = root.join("pieces");
    fs::create_dir(&pieces).expect("a new folder");
    for number in 0..40 {
        fs::write(pieces.join(format!("piece {number}")), random.bytes(70_000)).expect("room");
    }
    for number in (0..40).step_by(2) {
        fs::remove_file(pieces.join(format!("piece {number}"))).expect("it was made");
    }
    let (left, right) = (pieces.join("left"), pieces.join("right"));
    let (left, right) = (File::create(left).expect("room"), File::create(right).expect("room"));
    for number in 0..30 {
        left.write_all_at(&random.bytes(40_000), number * 40_000).expect("room");
        right.write_all_at(&random.bytes(40_000), number * 40_000).expect("room");
    }
    left.set_len(700_001).expect("shorter");
    right.set_len(2_000_000).expect("longer");
}

/// Turns what exfat-fuse shows into what is kept: it has no owners and modes.
fn as_kept(mut kernel: Tree, shown: &Tree) -> Tree {
    for (path, file) in &mut kernel {
        let Some(shown) = shown.get(path) else { continue };
        let found = &mut file.attributes;
        (found.mode, found.links) = (if found.kind == Kind::Directory { 0o755 } else { 0o644 }, 1);
        found.created = shown.attributes.created;
        // It shows whole seconds; the root has no times.
        assert_eq!(shown.attributes.changed, shown.attributes.modified);
        if !path.is_empty() {
            found.modified.nanoseconds = shown.attributes.modified.nanoseconds;
        } else {
            (found.modified, found.accessed) = (shown.attributes.modified, shown.attributes.accessed);
        }
        found.changed = found.modified;
        file.inode = shown.inode;
    }
    kernel
}

#[test]
fn volumes_read_as_another_driver_shows_them() {
    let sets: [(u64, &[&str]); 4] = [
        (48 << 20, &["-L", "Größe 日本"]),
        (48 << 20, &["-c", "512"]),
        (100 << 20, &["-c", "128K"]),
        (400 << 20, &["-c", "1M", "-L", "large"]),
    ];
    let folder = scratch();
    let image = folder.path().join("image");
    for (bytes, options) in sets {
        let what = options.join(" ");
        make(&image, bytes, options);
        fill(Mount::new(&image, "exfat-fuse", "rw").path());
        succeed(Command::new("fsck.exfat").arg("-n").arg(&image));
        let kernel = tree::of_kernel(Mount::new(&image, "exfat-fuse", "ro").path());
        let disk = Arc::new(FileDisk::open(&image));
        let guest = ExFat::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let (shown, errors) = tree::of_guest(&guest, disk.as_ref());
        let differences = tree::differences(&as_kept(kernel, &shown), &shown, None);
        let count = errors.len() + differences.len();
        let lines: Vec<_> = errors.into_iter().chain(differences).take(6).collect();
        assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", shown.len(), lines.join("\n"));
        let facts = guest.facts();
        let told = |field: &str| {
            let output = Command::new("blkid").args(["-p", "-o", "value", "-s", field]).arg(&image).output();
            String::from_utf8(output.expect("blkid is there").stdout).expect("text").trim().to_owned()
        };
        assert_eq!((facts.label, facts.uuid, facts.problems), (told("LABEL"), told("UUID"), vec![]), "{what}");
        for inode in [0, 2, 4096, u64::MAX] {
            assert_eq!(guest.attributes(Inode(inode)).unwrap_err().kind(), ErrorKind::NotFound, "{inode}");
        }
    }
}

#[test]
fn a_damaged_boot_region_leaves_the_backup() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, 16 << 20, &["-L", "backup"]);
    let file = File::options().write(true).open(&image).expect("it was made");
    file.write_all_at(&[7], 2 * 512 + 100).expect("it is ours");
    let open = || ExFat::open(Arc::new(FileDisk::open(&image)));
    let facts = open().expect("the backup is sound").facts();
    assert_eq!(facts.label, "backup");
    assert_eq!(facts.problems, ["its boot region is damaged, and the backup is used"]);
    file.write_all_at(&[7], 14 * 512 + 100).expect("it is ours");
    let error = open().err().expect("nothing is sound");
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(error.to_string(), "both boot regions are damaged; the first: its checksum is wrong");
}
