//! A file system of its own, in a sparse file or in memory. Dropping it leaves nothing.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::{require_root, scratch, succeed};

/// The file systems that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// With no blocks reserved for root.
    Ext4,
    /// Of which files can share blocks.
    Xfs,
    Btrfs,
    Tmpfs,
}

impl FileSystem {
    /// Returns what makes it; `None` if mounting does.
    fn maker(self) -> Option<(&'static str, &'static [&'static str])> {
        match self {
            Self::Ext4 => Some(("mkfs.ext4", &["-q", "-F", "-m", "0"])),
            Self::Xfs => Some(("mkfs.xfs", &["-q", "-m", "reflink=1"])),
            Self::Btrfs => Some(("mkfs.btrfs", &["-q"])),
            Self::Tmpfs => None,
        }
    }
}

/// A mounted file system of its own.
pub struct LoopMount {
    folder: TempDir,
    /// Whether its image is on a tmpfs of its own.
    is_over_tmpfs: bool,
}

impl LoopMount {
    /// Makes one of `bytes`.
    pub fn new(file_system: FileSystem, bytes: u64) -> Self {
        let made = Self::folder(bytes);
        let Some((program, options)) = file_system.maker() else {
            let size = format!("size={bytes}");
            succeed(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(made.path()));
            return made;
        };
        succeed(Command::new(program).args(options).arg(made.image()));
        made.mounted()
    }

    /// Makes an ext4 that has room for about `inodes` files and folders; small files take no room besides their inode.
    pub fn with_inodes(bytes: u64, inodes: u64) -> Self {
        let made = Self::folder(bytes);
        let options = ["-q", "-F", "-I", "256", "-O", "inline_data", "-m", "0", "-N"];
        succeed(Command::new("mkfs.ext4").args(options).arg(inodes.to_string()).arg(made.image()));
        made.mounted()
    }

    /// Makes an ext4 of `bytes` on a device that has room for `room` of them.
    pub fn over_full(bytes: u64, room: u64) -> Self {
        require_root();
        let (folder, size) = (Self::empty(), format!("size={room}"));
        let below = folder.path().join("below");
        fs::create_dir(&below).expect("the folder is empty");
        succeed(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&below));
        let made = Self { folder, is_over_tmpfs: true };
        File::create(made.image()).and_then(|file| file.set_len(bytes)).expect("a sparse file takes no room");
        fs::create_dir(made.path()).expect("the folder is empty");
        succeed(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-O", "^has_journal"]).arg(made.image()));
        made.mounted()
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mount")
    }

    /// Lets it be written, or only read.
    pub fn remount(&self, is_read_only: bool) {
        let how = if is_read_only { "remount,ro" } else { "remount,rw" };
        succeed(Command::new("mount").args(["-o", how]).arg(self.path()));
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join(if self.is_over_tmpfs { "below/image" } else { "image" })
    }

    fn folder(bytes: u64) -> Self {
        require_root();
        let made = Self { folder: Self::empty(), is_over_tmpfs: false };
        File::create(made.image()).and_then(|file| file.set_len(bytes)).expect("a sparse file takes no room");
        fs::create_dir(made.path()).expect("the folder is empty");
        made
    }

    fn empty() -> TempDir {
        tempfile::Builder::new().prefix("place-").tempdir_in(scratch()).expect("a folder to mount at")
    }

    fn mounted(self) -> Self {
        // The loop device goes with its mount.
        succeed(Command::new("mount").args(["-o", "loop,noatime"]).arg(self.image()).arg(self.path()));
        self
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let below = self.is_over_tmpfs.then(|| self.folder.path().join("below"));
        for place in [Some(self.path()), below].into_iter().flatten() {
            let unmount = |options: &[&str]| {
                Command::new("umount").args(options).arg(&place).output().is_ok_and(|output| output.status.success())
            };
            if super::is_mounted(&place.canonicalize().expect("it was made")) && !unmount(&[]) {
                // Leave nothing even then: what has a file open keeps it until it ends.
                unmount(&["--lazy"]);
                assert!(std::thread::panicking(), "{} cannot be unmounted", place.display());
            }
        }
    }
}
