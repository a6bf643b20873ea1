//! Images of filesystems in files, and their mounts by the kernel. Dropping them leaves nothing.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use disk::{Disk, Error, ErrorKind, Extent, Result};
use tempfile::TempDir;

/// Runs a command, and panics with all it said unless it succeeds.
pub fn succeed(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (said(&output.stdout), said(&output.stderr));
    assert!(output.status.success(), "{command:?} ended with {}\n{stdout}\n{stderr}", output.status);
}

/// Returns a folder for what a test writes.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("guest-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder of Cargo")
}

/// Makes a sparse file of `bytes`.
pub fn sparse(path: &Path, bytes: u64) {
    File::create(path).and_then(|file| file.set_len(bytes)).expect("a sparse file takes no room");
}

/// Makes an ext2, ext3 or ext4 of `bytes` with room for 8,000 files; `mkfs` is what makes it, and its arguments.
pub fn make(image: &Path, bytes: u64, mkfs: &[&str]) {
    sparse(image, bytes);
    succeed(Command::new(mkfs[0]).args(["-q", "-F", "-N", "8000"]).args(&mkfs[1..]).arg(image));
}

/// An image mounted by the kernel until this is dropped.
pub struct Mount(TempDir);

impl Mount {
    /// Mounts an image as `kind` with options besides `loop`.
    pub fn new(image: &Path, kind: &str, options: &str) -> Self {
        Self::of_device(image, kind, &format!("loop,{options}"))
    }

    /// Mounts a device.
    pub fn of_device(device: &Path, kind: &str, options: &str) -> Self {
        let uid = fs::metadata("/proc/self").expect("/proc is mounted").uid();
        assert_eq!(uid, 0, "this test mounts filesystems and needs root: sudo -E scripts/test");
        let folder = scratch();
        succeed(Command::new("mount").args(["-t", kind, "-o", options]).arg(device).arg(folder.path()));
        Self(folder)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        for _ in 0..50 {
            if Command::new("umount").arg(self.path()).output().is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let lazy = Command::new("umount").arg("--lazy").arg(self.path()).status();
        assert!(std::thread::panicking(), "{} was busy, unmounting lazily: {lazy:?}", self.path().display());
    }
}

/// An image as a device until this is dropped, which is after its mount.
pub struct Loop(PathBuf);

impl Loop {
    /// Makes a device of an image.
    pub fn new(image: &Path) -> Self {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(image).output().expect("losetup runs");
        let device = String::from_utf8(output.stdout).expect("a path of ASCII");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}\nthis test needs root: sudo -E scripts/test", image.display());
        Self(PathBuf::from(device.trim()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let ended = Command::new("losetup").arg("--detach").arg(&self.0).status();
        assert!(std::thread::panicking() || ended.is_ok_and(|status| status.success()), "{}", self.0.display());
    }
}

/// A filesystem whose files can share blocks, so that a copy of a file is of one moment.
pub struct Reflinks {
    mount: Mount,
    _folder: TempDir,
}

impl Reflinks {
    /// Makes one of `bytes`.
    pub fn new(bytes: u64) -> Self {
        let folder = scratch();
        let image = folder.path().join("reflinks");
        sparse(&image, bytes);
        succeed(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image));
        Self { mount: Mount::new(&image, "xfs", "noatime"), _folder: folder }
    }

    /// Returns a path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.mount.path().join(name)
    }

    /// Copies a file as it is at one moment.
    pub fn copy(&self, from: &Path, name: &str) -> PathBuf {
        let to = self.at(name);
        succeed(Command::new("cp").arg("--reflink=always").arg(from).arg(&to));
        to
    }
}

/// A file as a disk.
pub struct FileDisk {
    file: File,
    size: u64,
}

impl FileDisk {
    /// Opens a file.
    pub fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let size = file.metadata().expect("it is open").len();
        Self { file, size }
    }
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|error| Error::new(ErrorKind::OutOfRange, format!("{} bytes at {offset}: {error}", buffer.len())))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { len: self.size - offset, is_hole: false })
    }
}
