//! An ext4 in a sparse file, with as many inodes as asked for. Dropping it leaves nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::{require_root, scratch, succeed};

/// A mounted file system of its own.
pub struct LoopExt4 {
    folder: TempDir,
}

impl LoopExt4 {
    /// Makes one of `bytes` that has room for about `inodes` files and folders; small files take no room besides their inode.
    pub fn new(bytes: u64, inodes: u64) -> Self {
        require_root();
        let folder = tempfile::Builder::new().prefix("ext4-").tempdir_in(scratch()).expect("a folder to mount at");
        let image = folder.path().join("image");
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("a sparse file takes no room");
        let options = ["-q", "-F", "-I", "256", "-O", "inline_data", "-m", "0", "-N"];
        succeed(Command::new("mkfs.ext4").args(options).arg(inodes.to_string()).arg(&image));
        let made = Self { folder };
        fs::create_dir(made.path()).expect("the folder is empty");
        // The loop device goes with its mount.
        succeed(Command::new("mount").args(["-t", "ext4", "-o", "loop,noatime"]).arg(&image).arg(made.path()));
        made
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mount")
    }
}

impl Drop for LoopExt4 {
    fn drop(&mut self) {
        let path = self.path();
        let is_gone = |path: &Path| Command::new("umount").arg(path).status().is_ok_and(|status| status.success());
        if !is_gone(&path) && !std::thread::panicking() {
            panic!("{} cannot be unmounted", path.display());
        }
    }
}
