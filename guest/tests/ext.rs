//! ext2, ext3 and ext4 as the kernel shows them: clean, and as a machine leaves them that loses its power.

mod compare;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, Reflinks, make, scratch, sparse, succeed};
use compare::{Random, tree};
use disk::Disk;
use guest::ext::Ext;
use guest::{ErrorKind, Facts, GuestFs, Inode, Kind, Time};

/// How far the kernel's clock for files may lag.
const COARSE: Duration = Duration::from_millis(20);

/// Panics unless this crate reads of an image what the kernel showed.
fn compare(what: &str, image: &Path, kernel: &tree::Tree, mounted: Option<Time>) {
    let disk = Arc::new(FileDisk::open(image));
    let guest = Ext::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (shown, errors) = tree::of_guest(&guest, disk.as_ref());
    let differences = tree::differences(kernel, &shown, mounted);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", kernel.len(), lines.join("\n"));
}

/// Compares how this crate and the kernel read an image as it is at this moment.
fn compare_snapshot(what: &str, place: &Reflinks, image: &Path) -> Facts {
    let snapshot = place.copy(image, "snapshot");
    let recovered = place.copy(&snapshot, "recovered");
    // What recovery sets is told from what was set before by the time alone, and the kernel's clock is a coarse one.
    std::thread::sleep(2 * COARSE);
    let mounted = (SystemTime::now() - COARSE).duration_since(UNIX_EPOCH).expect("after 1970");
    let seconds = i64::try_from(mounted.as_secs()).expect("seconds");
    let mounted = Time { seconds, nanoseconds: mounted.subsec_nanos() };
    let kernel = tree::of_kernel(Mount::new(&recovered, "ext4", "noatime").path());
    compare(what, &snapshot, &kernel, Some(mounted));
    Ext::open(Arc::new(FileDisk::open(&snapshot))).expect("it was opened before").facts()
}

#[test]
fn every_kind_of_clean_volume_reads_as_the_kernel_shows_it() {
    let sets: [(&str, &[&str]); 15] = [
        ("ext4", &["mkfs.ext4", "-b", "4096"]),
        ("ext4", &["mkfs.ext4", "-b", "1024"]),
        ("ext4", &["mkfs.ext4", "-b", "2048"]),
        ("ext4", &["mkfs.ext4", "-O", "^metadata_csum,^64bit", "-b", "4096"]),
        ("ext4", &["mkfs.ext4", "-b", "4096", "-O", "inline_data,ea_inode"]),
        ("ext4", &["mkfs.ext4", "-O", "inline_data,large_dir", "-I", "512"]),
        ("ext4", &["mkfs.ext4", "-O", "bigalloc", "-C", "16384"]),
        ("ext4", &["mkfs.ext4", "-I", "128"]),
        ("ext4", &["mkfs.ext4", "-O", "metadata_csum_seed,orphan_file"]),
        ("ext4", &["mkfs.ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"]),
        ("ext4", &["mkfs.ext4", "-O", "mmp,encrypt,fast_commit", "-E", "mmp_update_interval=1"]),
        ("ext4", &["mkfs.ext4", "-O", "^has_journal"]),
        ("ext3", &["mkfs.ext3", "-b", "4096"]),
        ("ext2", &["mkfs.ext2", "-b", "4096"]),
        ("ext2", &["mkfs.ext2", "-b", "1024", "-O", "^filetype"]),
    ];
    for (kind, mkfs) in sets {
        let folder = scratch();
        let image = folder.path().join("image");
        make(&image, 64 << 20, mkfs);
        generator::fill(Mount::new(&image, "ext4", "noatime").path(), Amount { names: 2500, holes: 700 });
        let mount = Mount::new(&image, "ext4", "ro,noatime");
        compare(&mkfs.join(" "), &image, &tree::of_kernel(mount.path()), None);
        let facts = Ext::open(Arc::new(FileDisk::open(&image))).expect("it was opened before").facts();
        assert_eq!((facts.kind.as_str(), facts.is_replayed, facts.problems), (kind, false, vec![]), "{mkfs:?}");
    }
}

// Promise 19: "A file of a guest is read as the guest's own system would show it after a start"
#[test]
fn a_volume_in_use_reads_as_the_kernel_shows_it_after_replaying_its_journal() {
    let seed = Random::seed();
    let variants: [(&[&str], &str); 7] = [
        (&["mkfs.ext4", "-b", "4096"], "noatime"),
        (&["mkfs.ext4", "-b", "4096"], "noatime,data=journal"),
        (&["mkfs.ext4", "-b", "1024", "-O", "^metadata_csum,^64bit"], "noatime"),
        (&["mkfs.ext4", "-b", "1024", "-O", "^metadata_csum,^64bit"], "noatime,data=journal,journal_checksum"),
        (&["mkfs.ext4", "-O", "inline_data,ea_inode,orphan_file,metadata_csum_seed"], "noatime"),
        (&["mkfs.ext3", "-b", "4096"], "noatime,data=journal"),
        (&["mkfs.ext3", "-b", "1024"], "noatime"),
    ];
    let place = Reflinks::new(1 << 30);
    for (number, (mkfs, options)) in (0..).zip(variants) {
        let what = format!("{} {options}", mkfs.join(" "));
        let image = place.at("image");
        make(&image, 40 << 20, mkfs);
        let mount = Mount::new(&image, "ext4", options);
        let mut churn = Churn::new(mount.path(), seed + number);
        for round in 0..compare::rounds(3) {
            churn.work(150);
            let what = format!("{what}, snapshot {round}");
            let facts = compare_snapshot(&what, &place, &image);
            assert_eq!((facts.is_replayed, facts.problems), (true, vec![]), "{what}");
        }
    }
}

#[test]
fn what_was_committed_fast_reads_as_the_kernel_shows_it() {
    let seed = Random::seed();
    let place = Reflinks::new(1 << 30);
    // With room for all: the kernel cannot recover a volume of which the area is full (JBD2: corrupted journal superblock).
    let room = ["mkfs.ext4", "-J", "size=8,fast_commit_size=2048"];
    let sets = [["-b", "4096", "-O", "fast_commit"], ["-b", "1024", "-O", "fast_commit,^metadata_csum"]];
    for (number, set) in (0..).zip(sets) {
        let mkfs = [&room[..], &set].concat();
        let image = place.at("image");
        make(&image, 64 << 20, &mkfs);
        // Transactions are far apart.
        let mount = Mount::new(&image, "ext4", "noatime,commit=300");
        let mut churn = Churn::new(mount.path(), seed + number);
        for round in 0..compare::rounds(4) {
            if round % 8 == 7 {
                churn.sync();
            }
            churn.work_fast(40);
            churn.new_folder();
            let what = format!("{}, snapshot {round}", mkfs.join(" "));
            let facts = compare_snapshot(&what, &place, &image);
            assert_eq!((facts.is_replayed, facts.problems), (true, vec![]), "{what}");
        }
    }
}

/// A disk that fails from some read on.
struct Failing {
    disk: FileDisk,
    left: AtomicU32,
}

impl Disk for Failing {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)) {
            Ok(_) => self.disk.read_at(offset, buffer),
            Err(_) => Err(disk::Error::new(disk::ErrorKind::Unavailable, "the storage does not answer")),
        }
    }

    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        self.disk.extent_at(offset)
    }
}

/// Makes a small ext4 of a folder; the kernel is not needed for it.
fn make_of(folder: &Path, image: &Path, options: &[&str]) {
    let folder = folder.to_str().expect("UTF-8");
    make(image, 16 << 20, &[&["mkfs.ext4", "-d", folder], options].concat());
}

fn find(guest: &Ext, name: &[u8]) -> Inode {
    let entries = guest.list(guest.root()).expect("the root is sound");
    entries.into_iter().find(|entry| entry.name == name).expect("it was made").inode
}

#[test]
fn an_error_of_the_disk_is_never_taken_for_damage() {
    let (folder, tree) = (scratch(), scratch());
    let image = folder.path().join("image");
    fs::write(tree.path().join("file"), vec![7; 100_000]).expect("room");
    fs::create_dir(tree.path().join("folder")).expect("room");
    std::os::unix::fs::symlink("t".repeat(100), tree.path().join("link")).expect("room");
    make_of(tree.path(), &image, &[]);
    let all = |guest: &Ext| -> guest::Result<()> {
        let names = guest.list(guest.root())?;
        assert_eq!(names.len(), 4, "with lost+found");
        for entry in names {
            match guest.attributes(entry.inode)?.kind {
                Kind::File => assert_eq!(guest.extents(entry.inode, 0, 9)?.found.len(), 1),
                Kind::Symlink => assert_eq!(guest.target(entry.inode)?.len(), 100),
                _ => assert_eq!(guest.list(entry.inode)?.len(), 0),
            }
            guest.xattrs(entry.inode)?;
        }
        Ok(())
    };
    let mut failures = 0;
    for left in 0.. {
        let disk = Arc::new(Failing { disk: FileDisk::open(&image), left: AtomicU32::new(left) });
        match Ext::open(disk).and_then(|guest| all(&guest)) {
            Ok(()) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Disk, "after {left} reads: {error}"),
        }
        failures += 1;
    }
    assert!(failures > 5, "{failures} reads");
}

#[test]
fn what_the_guest_encrypted_is_refused_with_the_reason() {
    let (folder, tree) = (scratch(), scratch());
    let image = folder.path().join("image");
    fs::write(tree.path().join("file"), vec![7; 10_000]).expect("room");
    fs::create_dir(tree.path().join("folder")).expect("room");
    std::os::unix::fs::symlink("target", tree.path().join("link")).expect("room");
    make_of(tree.path(), &image, &["-O", "encrypt"]);
    for (name, flags) in [("file", "0x80800"), ("folder", "0x80800"), ("link", "0x800")] {
        let command = format!("set_inode_field /{name} flags {flags}");
        succeed(Command::new("debugfs").args(["-w", "-R", &command]).arg(&image));
    }
    let guest = Ext::open(Arc::new(FileDisk::open(&image))).expect("it can be read");
    let refused = |error: guest::Error| (error.kind(), error.to_string().contains("is encrypted by the guest"));
    let (file, folder, link) = (find(&guest, b"file"), find(&guest, b"folder"), find(&guest, b"link"));
    assert_eq!(guest.extents(file, 0, 1).map_err(refused), Err((ErrorKind::Unsupported, true)));
    assert_eq!(guest.list(folder).map_err(refused), Err((ErrorKind::Unsupported, true)));
    assert_eq!(guest.target(link).map_err(refused), Err((ErrorKind::Unsupported, true)));
    assert_eq!(guest.attributes(file).map(|attributes| attributes.size), Ok(10_000));
}

#[test]
fn what_is_asked_of_the_wrong_kind_or_of_nothing_is_an_error() {
    let (folder, tree) = (scratch(), scratch());
    let image = folder.path().join("image");
    fs::write(tree.path().join("file"), "f").expect("room");
    make_of(tree.path(), &image, &["-L", "a label", "-U", "12345678-9abc-def0-1234-56789abcdef0"]);
    let guest = Ext::open(Arc::new(FileDisk::open(&image))).expect("it can be read");
    let file = find(&guest, b"file");
    let kind = |error: guest::Error| error.kind();
    assert_eq!(guest.list(file).map_err(kind), Err(ErrorKind::WrongKind));
    assert_eq!(guest.target(file).map_err(kind), Err(ErrorKind::WrongKind));
    assert_eq!(guest.extents(guest.root(), 0, 1).map_err(kind), Err(ErrorKind::WrongKind));
    // None, the journal, one that is free, one past the last, and one that no inode has.
    for number in [0, 8, 5000, 1 << 20, u64::MAX] {
        assert_eq!(guest.attributes(Inode(number)).map_err(kind), Err(ErrorKind::NotFound), "{number}");
    }
    let facts = guest.facts();
    let said = (facts.kind.as_str(), facts.label.as_str(), facts.uuid.as_str());
    assert_eq!(said, ("ext4", "a label", "12345678-9abc-def0-1234-56789abcdef0"));
    sparse(&image, 1 << 20);
    assert_eq!(Ext::open(Arc::new(FileDisk::open(&image))).err().map(kind), Some(ErrorKind::Damaged));
}

#[test]
fn a_journal_that_cannot_be_replayed_is_said_and_the_volume_read_as_it_stands() {
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    make(&image, 16 << 20, &["mkfs.ext4"]);
    let mount = Mount::new(&image, "ext4", "noatime");
    fs::write(mount.path().join("file"), "f").and_then(|()| File::open(mount.path())?.sync_all()).expect("room");
    let snapshot = place.copy(&image, "snapshot");
    drop(mount);
    let mut bytes = fs::read(&snapshot).expect("it was just made");
    let superblock = [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 4];
    let at = bytes.chunks(1024).position(|block| block.starts_with(&superblock)).expect("a journal") * 1024;
    bytes[at + 0xfc] ^= 1;
    fs::write(&snapshot, bytes).expect("room");
    let guest = Ext::open(Arc::new(FileDisk::open(&snapshot))).expect("it can be read");
    let facts = guest.facts();
    let said = "The filesystem was in use and its journal cannot be replayed (the superblock of its journal has a wrong \
                checksum): what was written last may be missing, old or damaged";
    assert_eq!((facts.is_replayed, facts.problems), (false, vec![said.to_owned()]));
    assert_eq!(guest.list(guest.root()).map(|entries| entries.len()), Ok(1), "lost+found");
}

#[test]
fn a_volume_in_use_without_a_journal_is_said() {
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    make(&image, 16 << 20, &["mkfs.ext2"]);
    let mount = Mount::new(&image, "ext4", "noatime");
    File::open(mount.path()).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
    let snapshot = place.copy(&image, "snapshot");
    let said = "The filesystem was in use and has no journal: what was written last may be missing, old or damaged";
    let guest = Ext::open(Arc::new(FileDisk::open(&snapshot))).expect("it can be read");
    assert_eq!(guest.facts().problems, [said]);
}
