//! Btrfs as the kernel shows it: clean, of several devices, and as a machine leaves it that loses its power.

#[path = "../compare/mod.rs"]
mod compare;
mod devices;
mod log;
mod synced;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use compare::Random;
use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, Reflinks, scratch, sparse, succeed};
use compare::tree::{self, Tree};
use disk::Disk;
use guest::btrfs::Btrfs;
use guest::{ErrorKind, GuestFs, Inode, Time};

/// Bytes of an image; fewer give other chunks.
const SIZE: u64 = 256 << 20;

/// The top level, whatever the default subvolume is.
const OPTIONS: &str = "subvolid=5,noatime";

/// Makes a filesystem on images of that size.
fn make(images: &[PathBuf], size: u64, options: &[&str]) {
    for image in images {
        sparse(image, size);
    }
    succeed(Command::new("mkfs.btrfs").args(["-q", "-f"]).args(options).args(images));
}

/// What the kernel shows, and the device that it gives each file: one for each subvolume.
#[derive(Clone)]
struct Kernel {
    tree: Tree,
    devices: BTreeMap<Vec<u8>, u64>,
    /// When it was recovered: some of what the kernel does then changes times.
    recovered: Option<Time>,
}

fn of_kernel(root: &Path) -> Kernel {
    let tree = tree::of_kernel(root);
    let device = |path: &Vec<u8>| {
        let path = root.join(std::ffi::OsStr::from_bytes(path));
        fs::symlink_metadata(&path).expect("it was just there").dev()
    };
    let devices = tree.keys().map(|path| (path.clone(), device(path))).collect();
    Kernel { tree, devices, recovered: None }
}

fn open(images: &[PathBuf]) -> (Vec<Arc<dyn Disk>>, guest::Result<Btrfs>) {
    let disks = images.iter().map(|image| Arc::new(FileDisk::open(image)) as Arc<dyn Disk>);
    let disks: Vec<_> = disks.collect();
    (disks.clone(), Btrfs::open(disks))
}

/// Panics unless this crate reads of images what the kernel showed.
fn compare(what: &str, images: &[PathBuf], kernel: Kernel) {
    let (disks, guest) = open(images);
    compare_opened(what, &disks, guest, kernel);
}

fn compare_opened(what: &str, disks: &[Arc<dyn Disk>], guest: guest::Result<Btrfs>, mut kernel: Kernel) {
    let guest = guest.unwrap_or_else(|error| panic!("{what}: {error}"));
    let disks: Vec<_> = disks.iter().map(|disk| &**disk as &dyn Disk).collect();
    let (mut shown, errors) = tree::of_members(&guest, &disks);
    let mut subvolumes = BTreeSet::new();
    for (path, file) in &mut shown {
        let (subvolume, inode) = split(Inode(file.inode));
        file.inode = inode;
        if let Some(device) = kernel.devices.get(path).filter(|_| inode != 2) {
            subvolumes.insert((subvolume, *device));
        }
        if let (Some(recovered), Some(truth)) = (kernel.recovered, kernel.tree.get_mut(path)) {
            let (truth, shown) = (&mut truth.attributes, &file.attributes);
            for (truth, shown) in [(&mut truth.modified, shown.modified), (&mut truth.changed, shown.changed)] {
                if *truth >= recovered {
                    *truth = shown;
                }
            }
        }
        // The kernel gives a subvolume that is not there the time of looking.
        if let Some(truth) = kernel.tree.get_mut(path).filter(|truth| truth.inode == 2) {
            truth.attributes.accessed = file.attributes.accessed;
            truth.attributes.modified = file.attributes.modified;
            truth.attributes.changed = file.attributes.changed;
            truth.attributes.created = file.attributes.created;
        }
    }
    let differences = tree::differences(&kernel.tree, &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", kernel.tree.len(), lines.join("\n"));
    let distinct = |values: BTreeSet<u64>| values.len();
    let ours = distinct(subvolumes.iter().map(|(ours, _)| *ours).collect());
    let theirs = distinct(subvolumes.iter().map(|(_, theirs)| *theirs).collect());
    assert_eq!((ours, theirs), (subvolumes.len(), subvolumes.len()), "{what}: {subvolumes:?}");
}

/// Returns the two numbers that one is made of, small ones.
fn split(Inode(number): Inode) -> (u64, u64) {
    (number >> 32, number & 0xffff_ffff)
}

/// Files that compress well or partly, written in pieces, changed, cut and shared.
fn compressible(root: &Path, random: &mut Random) {
    fs::create_dir(root).expect("a new folder");
    let text =
        |len: usize| -> Vec<u8> { (0..).flat_map(|line| format!("line {line}\n").into_bytes()).take(len).collect() };
    for size in
        [10, 100, 1000, 2000, 2048, 2049, 3000, 4095, 4096, 4097, 5000, 65_536, 131_071, 131_072, 131_073, 1_000_000]
    {
        fs::write(root.join(format!("text-{size}")), text(size)).expect("room");
        fs::write(root.join(format!("zeroes-{size}")), vec![0; size]).expect("room");
    }
    let make = |name: &str| {
        let path = root.join(name);
        File::options().create(true).truncate(true).read(true).write(true).open(path).expect("a new file")
    };
    let mixed = make("mixed");
    for at in 0..20_u64 {
        let bytes = if at % 3 == 0 { random.bytes(50_000) } else { text(50_000) };
        mixed.write_all_at(&bytes, at * 70_000).expect("room");
    }
    let changed = make("changed");
    changed.write_all_at(&text(800_000), 0).expect("room");
    changed.sync_all().expect("it is written");
    for at in 0..40_u64 {
        changed.write_all_at(&random.bytes(3000), at * 19_000).expect("room");
    }
    changed.sync_all().expect("it is written");
    changed.set_len(700_001).expect("shorter");
    changed.sync_all().expect("it is written");
    changed.set_len(750_000).expect("longer");
    let appended = make("appended");
    for at in 0..30_u64 {
        appended.write_all_at(&text(1000), at * 1000).expect("room");
        appended.sync_all().expect("it is written");
    }
    // Inline, and then not at its start alone.
    let inline = make("inline-and-more");
    inline.write_all_at(&text(500), 0).expect("room");
    inline.sync_all().expect("it is written");
    inline.set_len(100_000).expect("longer");
    inline.write_all_at(&text(9000), 50_000).expect("room");
    inline.sync_all().expect("it is written");
    inline.set_len(300_000).expect("longer");
    succeed(Command::new("cp").arg("--reflink=always").arg(root.join("changed")).arg(root.join("shared")));
    let shared = File::options().write(true).open(root.join("shared")).expect("it was made");
    shared.write_all_at(&random.bytes(10), 300_000).expect("room");
}

fn btrfs(args: &[&str], paths: &[&Path]) {
    succeed(Command::new("btrfs").args(args).args(paths));
}

/// Subvolumes in subvolumes, and snapshots of them, in which those are not.
fn subvolumes(root: &Path) {
    let at = |name: &str| root.join(name);
    btrfs(&["subvolume", "create"], &[&at("outer")]);
    fs::create_dir(at("outer/folder")).expect("a new folder");
    btrfs(&["subvolume", "create"], &[&at("outer/folder/inner")]);
    for name in ["top", "outer/a", "outer/folder/b", "outer/folder/inner/c"] {
        fs::write(at(name), name.repeat(3000)).expect("room");
    }
    btrfs(&["subvolume", "snapshot"], &[&at("outer"), &at("writable")]);
    btrfs(&["subvolume", "snapshot", "-r"], &[&at("outer"), &at("folder-of-snapshots")]);
    fs::write(at("outer/a"), "changed since").expect("room");
    fs::write(at("writable/a"), "changed otherwise").expect("room");
    fs::rename(at("outer/folder"), at("outer/renamed")).expect("it is ours");
    btrfs(&["subvolume", "snapshot"], &[&at("writable"), &at("outer/renamed/inner/again")]);
    btrfs(&["subvolume", "create"], &[&at("gone")]);
    fs::write(at("gone/file"), "gone").expect("room");
    btrfs(&["subvolume", "delete"], &[&at("gone")]);
    btrfs(&["subvolume", "set-default"], &[&at("outer")]);
}

#[test]
fn every_kind_of_clean_volume_reads_as_the_kernel_shows_it() {
    let sets: [(&[&str], &str); 8] = [
        (&[], "compress=no"),
        (&["--csum", "crc32c", "-n", "16384"], "compress-force=zstd"),
        (&["--csum", "xxhash", "-m", "single"], "compress-force=lzo"),
        (&["--csum", "sha256", "-n", "4096"], "compress-force=zlib"),
        (&["--csum", "blake2", "-n", "65536"], "compress-force=zstd:15"),
        (&["-M", "-O", "^no-holes"], "compress=lzo"),
        (&["-O", "^no-holes,^extref,^skinny-metadata"], "max_inline=0"),
        (&["-R", "free-space-tree"], "nodatacow"),
    ];
    for (mkfs, options) in sets {
        let what = format!("{} {options}", mkfs.join(" "));
        let folder = scratch();
        let images = [folder.path().join("image")];
        make(&images, SIZE, mkfs);
        {
            let mount = Mount::new(&images[0], "btrfs", &format!("{OPTIONS},{options}"));
            generator::fill(mount.path(), Amount { names: 1200, holes: 300 });
            compressible(&mount.path().join("compressible"), &mut Random::new(3));
            subvolumes(mount.path());
        }
        let kernel = of_kernel(Mount::new(&images[0], "btrfs", &format!("{OPTIONS},ro")).path());
        assert!(kernel.tree.values().any(|file| file.inode == 2), "{what}: no subvolume is missing");
        compare(&what, &images, kernel);
        let facts = open(&images).1.expect("it was opened before").facts();
        assert_eq!((facts.kind.as_str(), facts.is_replayed, facts.problems), ("btrfs", false, vec![]), "{what}");
    }
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    compare::machine::task();
}
