//! Images of disks in files, made by the programs that guests use, and loop devices over them.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use disk::{Disk, Error, ErrorKind, Extent};
use tempfile::TempDir;

/// Images in a folder that is gone when this is dropped.
pub struct Images(TempDir);

/// A file as a disk, without holes.
struct FileDisk {
    file: File,
    size: u64,
}

/// A loop device over an image, detached when this is dropped.
pub struct LoopDevice(String);

impl Images {
    /// Makes the folder, where Cargo has the files of tests.
    pub fn new() -> Self {
        let made = tempfile::Builder::new().prefix("volumes-").tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        Self(made.expect("a folder for images"))
    }

    /// Where files can be made.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes an image of zeroes, or gives one another size.
    pub fn sized(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path().join(name);
        let file = File::options().create(true).truncate(false).write(true).open(&path).expect("an image");
        file.set_len(bytes).expect("an image of that size");
        path
    }

    /// Writes into an image.
    pub fn write(&self, name: &str, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.path().join(name)).expect("the image");
        file.write_all_at(bytes, offset).expect("it can be written");
    }

    /// Returns images as the disks of a guest, called like the files.
    pub fn disks(&self, names: &[&str]) -> Vec<(String, Arc<dyn Disk>)> {
        let disk = |name: &&str| {
            let file = File::open(self.path().join(name)).expect("the image");
            let size = file.metadata().expect("its size").len();
            ((*name).to_owned(), Arc::new(FileDisk { file, size }) as Arc<dyn Disk>)
        };
        names.iter().map(disk).collect()
    }
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let kind = ErrorKind::Unavailable;
        self.file.read_exact_at(buffer, offset).map_err(|error| Error::new(kind, error.to_string()))
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size - offset, is_hole: false })
    }
}

impl LoopDevice {
    /// Attaches one. Panics without root.
    pub fn new(image: &Path) -> Self {
        Self::with_sectors(image, 512)
    }

    /// Attaches one whose sectors have so many bytes.
    pub fn with_sectors(image: &Path, bytes: u32) -> Self {
        let sectors = format!("--sector-size={bytes}");
        let device = run(Command::new("losetup").args(["--find", "--show", &sectors]).arg(image));
        Self(device.trim().to_owned())
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // In a test that fails already, the reason is elsewhere.
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Runs a program of the administrator and returns what it printed; panics with all that it said if it failed or is missing.
pub fn run(command: &mut Command) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let program = command.get_program().to_string_lossy().into_owned();
    let Output { status, stdout, stderr } = command
        .env("PATH", &path)
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}; scripts/setup installs it"));
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{out}{err}");
    out.into_owned()
}

/// Runs a program with a text as its standard input.
pub fn run_with_input(images: &Images, program: &str, arguments: &[&str], input: &str) -> String {
    let path = images.path().join("input");
    fs::write(&path, input).expect("a file for the input");
    run(Command::new(program)
        .args(arguments)
        .current_dir(images.path())
        .stdin(File::open(path).expect("it was written")))
}
