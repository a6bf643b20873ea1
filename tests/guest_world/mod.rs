//! A repository with a backup of a guest: a disk with an ext4, something encrypted, nothing, an ext2 whose root is a link, and a
//! small ext4.
//!
//! The truth is the kernel's own mount of the same volume; so these tests need root and loop devices.

#![allow(dead_code, reason = "every test binary uses a part of this")]

#[path = "../../guest/tests/compare/mod.rs"]
pub mod compare;

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use compare::Random;
use compare::generator::{self, Amount};
use compare::image::{Mount, sparse};
use compare::tree::{self, Tree};
use tempfile::TempDir;

use crate::support::{init, succeed, xofs};

/// The VM.
pub const VM: &str = "1f2e3d4c-5b6a-4788-9900-aabbccddeeff";
/// Bytes.
pub const MIB: u64 = 1 << 20;

/// That backup.
pub struct World {
    _folder: TempDir,
    /// The disk, with the ext4 at 1 MiB.
    pub image: PathBuf,
    pub repository: PathBuf,
    /// What the kernel shows of the ext4.
    pub truth: Tree,
}

/// The one that a test has already, or a new one: the last of them that ends removes it.
pub fn world() -> Arc<World> {
    static WORLD: Mutex<Weak<World>> = Mutex::new(Weak::new());
    let mut made = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    made.upgrade().unwrap_or_else(|| {
        let folder = compare::image::scratch();
        let image = folder.path().join("xvda");
        sparse(&image, 128 * MIB);
        let table = "label: gpt\nstart=2048, size=196608\nsize=16384\nsize=4096\nsize=16384\nsize=16384\n";
        fs::write(folder.path().join("table"), table).unwrap();
        let script = format!("sfdisk -q {} < {}", image.display(), folder.path().join("table").display());
        succeed(Command::new("sh").args(["-c", &script]));
        succeed(
            Command::new("mkfs.ext4").args(["-q", "-F", "-N", "8000", "-E", "offset=1048576"]).arg(&image).arg("96M"),
        );
        generator::fill(
            Mount::new(&image, "ext4", "noatime,offset=1048576,sizelimit=100663296").path(),
            Amount { names: 2500, holes: 700 },
        );
        add_more(Mount::new(&image, "ext4", "noatime,offset=1048576,sizelimit=100663296").path());
        // LUKS, by its first bytes. Source: LUKS1 on-disk format specification 1.2.3.
        let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"LUKS\xba\xbe\x00\x01", (2048 + 196_608) * 512).unwrap();
        let (hostile, small) = ((2048 + 196_608 + 16_384 + 4096) * 512, (2048 + 196_608 + 2 * 16_384 + 4096) * 512);
        for (kind, offset) in [("mkfs.ext2", hostile), ("mkfs.ext4", small)] {
            let place = ["-q".to_owned(), "-F".to_owned(), "-E".to_owned(), format!("offset={offset}")];
            succeed(Command::new(kind).args(place).args(["-O", "^metadata_csum"]).arg(&image).arg("8M"));
        }
        let hostile = format!("{}?offset={hostile}", image.display());
        succeed(Command::new("debugfs").args(["-w", "-R", "set_inode_field <2> mode 0120777"]).arg(hostile));
        let truth = of_mount(Mount::new(&image, "ext4", "ro,noatime,offset=1048576,sizelimit=100663296").path());
        let repository = init(folder.path(), "repository", &[]);
        let disk = format!("xvda={}", image.display());
        let mut ingest = xofs();
        ingest.args(["ingest", "--vm", VM, "--name", "web01", "--time", "20260801T020003Z", "--disk", &disk]);
        succeed(ingest.arg("--repository").arg(&repository));
        let world = Arc::new(World { _folder: folder, image, repository, truth });
        *made = Arc::downgrade(&world);
        world
    })
}

/// Makes a file of several blocks of the backup, and links that lead to other places, to nothing, out of the filesystem, and in
/// circles.
fn add_more(root: &Path) {
    fs::write(root.join("big"), Random::new(11).bytes(12_000_000)).unwrap();
    let links = root.join("links");
    fs::create_dir(&links).unwrap();
    // Longer than a field of an archive.
    let odd = std::ffi::OsString::from_vec(vec![0xe9; 120]);
    fs::write(links.join(&odd), "odd").unwrap();
    symlink(&odd, links.join("odd")).unwrap();
    for (name, target) in [
        ("absolute", "/contents/size-60"),
        ("above", "../../../../contents/size-61"),
        ("folder", "../contents"),
        ("twice", "/links/folder"),
        ("outside", "/proc/self/status"),
        ("loop-a", "loop-b"),
        ("loop-b", "/links/loop-a"),
    ] {
        symlink(target, links.join(name)).unwrap();
    }
}

/// What is shown, but for what no program sets.
pub fn without_what_cannot_be_set(tree: &Tree) -> Tree {
    let mut tree = tree.clone();
    for file in tree.values_mut() {
        file.attributes.changed = file.attributes.modified;
        file.attributes.accessed = file.attributes.modified;
        file.attributes.allocated = 0;
        // Of a directory this is the other filesystem's.
        if file.attributes.kind == guest::Kind::Directory {
            file.attributes.size = 0;
        }
    }
    tree
}

/// What is shown below a folder, but for what a mount cannot show: numbers of its own, and when files were made.
pub fn of_mount(folder: &Path) -> Tree {
    as_of_mount(tree::of_kernel(folder))
}

/// The same of what a kernel showed.
pub fn as_of_mount(mut tree: Tree) -> Tree {
    for file in tree.values_mut() {
        file.inode = 0;
        file.attributes.created = None;
        // Of the filesystem below, and of what is said of a volume.
        file.xattrs.retain(|name, _| !name.starts_with(b"user.xofs."));
    }
    tree
}

pub fn assert_same(truth: &Tree, shown: &Tree) {
    let differences = tree::differences(truth, shown, None);
    let count = differences.len();
    let lines: Vec<_> = differences.into_iter().take(10).collect();
    assert_eq!(count, 0, "{count} differences of {} files\n{}", truth.len(), lines.join("\n"));
    assert!(truth.len() > 2000, "{} files", truth.len());
}
