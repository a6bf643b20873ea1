//! A disk as a loop device of this machine, and what the kernel reads on it, mounted.
//!
//! ```text
//! filesystem at a directory ─► /dev/loopN ─► file ─► overlay ─┬─► what was written: the recovery of a journal
//!          (the kernel's)                   (FUSE,            └─► the disk, which only reads
//!                                        mounted nowhere)
//! ```
//!
//! Each holds the next, and nothing else does: a device that is mounted ends with its mount, then the file is closed, the connection
//! ends, and with it the process. So `umount` undoes all of it, also after the process died.
//!
//! **The process that serves never waits for its own device**: killed while it does, it could not end, and nobody could end it. What
//! mounts and unmounts is a process of its own, which alone has the device open meanwhile. (Only partitions are looked for in this one,
//! as the kernel does when it makes a device: a signal ends that.)

mod device;
mod file;
mod overlay;
mod ranges;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use disk::Disk;
use rustix::fs::{Mode, OFlags};

use super::fuser::Connection;
use super::mounts::{self, Mount};
use super::requests::Requests;
use super::session::{Error, ErrorKind, PATIENCE, PAUSE, Result, STUCK, serve};
use super::{errno::Errno, kernel};
use device::{Device, Wanted};
use file::OneFile;
use overlay::Overlay;

/// Threads that take requests; reads are passed on.
const THREADS: usize = 4;

/// Longest name of the file, in bytes, so that the kernel can show it whole.
const NAME_LIMIT: usize = 200;

/// How a disk becomes a device.
#[derive(Debug, Clone)]
pub struct LoopOptions {
    /// What the device is called by those who list devices.
    pub name: String,
    /// Bytes that may be written, until the device ends; `None` if it is read-only.
    pub overlay: Option<u64>,
    /// How long a read may wait for the repository; `None` is for ever.
    pub timeout: Option<Duration>,
    /// Whether there are partitions on it, each to be a device.
    pub has_partitions: bool,
}

/// How a device is mounted.
#[derive(Debug, Clone, Default)]
pub struct LoopMount {
    /// The filesystem, as mount(8) calls it, which else finds out itself.
    pub kind: Option<OsString>,
    /// Options of mount(8) besides `ro`, `nodev` and `nosuid`.
    pub options: Vec<OsString>,
}

/// A device that is served; dropping it ends it.
pub struct Looped {
    server: Option<JoinHandle<io::Result<()>>>,
    overlay: Arc<Overlay>,
    ender: LoopEnder,
}

/// Ends a device of this process; may be used from any thread, more than once.
#[derive(Clone)]
pub struct LoopEnder {
    device: Device,
    /// Where it is mounted, or was, or was to be.
    directory: Option<PathBuf>,
    requests: Arc<Requests>,
}

/// Makes a device of a disk. It stays until it is ended, also by `losetup --detach`.
///
/// # Errors
/// `System`, with a sentence that says what to do.
pub fn attach(disk: Arc<dyn Disk>, options: &LoopOptions) -> Result<Looped> {
    Ok(make(disk, options, false)?.0)
}

/// Mounts what is on a disk, read-only, at an existing directory, by way of a device that ends with the mount.
///
/// # Errors
/// `Mountpoint` or `System`, with what mount(8) says.
pub fn mount_loop(disk: Arc<dyn Disk>, options: &LoopOptions, directory: &Path, how: &LoopMount) -> Result<Looped> {
    let directory = prepare(directory)?;
    let (mut looped, open) = make(disk, options, true)?;
    looped.ender.directory = Some(directory.clone());
    let mut command = Command::new("mount");
    if let Some(kind) = &how.kind {
        command.arg("-t").arg(kind);
    }
    let mut joined = how.options.join(",".as_ref());
    joined.push(if joined.is_empty() { "" } else { "," });
    // The last word is ours.
    joined.push("ro,nodev,nosuid");
    command.arg("-o").arg(&joined).arg("--").arg(looped.device()).arg(&directory);
    // It has the device open until it is mounted; we have not.
    command.stdin(Stdio::from(open)).stdout(Stdio::null()).stderr(Stdio::piped());
    let mounting = command.spawn();
    drop(command);
    let failed = |message: String| Error::new(ErrorKind::System, message);
    let output = mounting
        .and_then(std::process::Child::wait_with_output)
        .map_err(|error| failed(format!("run mount(8): {error}")))?;
    if !output.status.success() {
        let why = if looped.overlay.is_full() { "; its recovery takes more than may be written" } else { "" };
        return Err(failed(format!("{}{why}", String::from_utf8_lossy(&output.stderr).trim())));
    }
    Ok(looped)
}

/// Returns the directory without symbolic links, so that it is found in the table of mounts.
fn prepare(directory: &Path) -> Result<PathBuf> {
    let refuse = |reason: &str| {
        let message = format!("cannot mount at '{}': {reason}", directory.display());
        Error::new(ErrorKind::Mountpoint, message)
    };
    let resolved = directory.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => refuse("no such directory; create it first"),
        _ => refuse(&error.to_string()),
    })?;
    if !resolved.is_dir() {
        return Err(refuse("it is not a directory"));
    }
    // A second mount would hide the first, and one unmount would leave it.
    let mounted = mounts::at(&resolved).ok().flatten();
    if mounted.is_some_and(|mount| mount.is_ours() || is_loop(&mount)) {
        return Err(refuse("something of xofs is mounted there already; unmount it first (xofs unmount)"));
    }
    Ok(resolved)
}

fn make(disk: Arc<dyn Disk>, options: &LoopOptions, ends_unused: bool) -> Result<(Looped, File)> {
    let failed = |what: &str, error: io::Error| Error::new(ErrorKind::System, format!("{what}: {error}"));
    let overlay = Overlay::new(disk, options.overlay.unwrap_or(0))
        .map_err(|error| failed("make a file for what is written over the disk", error))?;
    let overlay = Arc::new(overlay);
    let name = file_name(&options.name);
    let filesystem = OneFile::new(name.clone(), overlay.clone(), options.timeout);
    let requests = filesystem.requests();
    let (connection, root) = kernel::mount_nowhere("xofs").map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => failed("open '/dev/fuse' (is the module 'fuse' loaded?)", error),
        _ => failed("make a filesystem for the disk", error),
    })?;
    let connection = Connection::new(filesystem, connection, false, false, THREADS)
        .map_err(|error| failed("serve the disk", error))?;
    let server = serve(connection)?;
    let access = if options.overlay.is_some() { OFlags::RDWR } else { OFlags::RDONLY };
    let file = rustix::fs::openat(&root, &name, access | OFlags::CLOEXEC, Mode::empty());
    let file = file.map_err(|error| failed("open the disk", error.into()))?.into();
    let wanted =
        Wanted { is_read_only: options.overlay.is_none(), ends_unused, has_partitions: options.has_partitions };
    let (device, open) = Device::new(&file, wanted).map_err(|error| failed("make a loop device", error))?;
    let ender = LoopEnder { device, directory: None, requests };
    Ok((Looped { server: Some(server), overlay, ender }, open))
}

/// Makes the name of the file: what the kernel shows of it has no blanks, and no `/` but the first.
fn file_name(name: &str) -> OsString {
    let plain = |character: char| character.is_alphanumeric() || "-_.~".contains(character);
    let name: String = name.chars().map(|character| if plain(character) { character } else { ':' }).collect();
    let end = (0..=NAME_LIMIT.min(name.len())).rfind(|end| name.is_char_boundary(*end)).unwrap_or(0);
    format!("{}{}", device::MARK, &name[..end]).into()
}

impl Looped {
    /// Returns the path of the device.
    #[must_use]
    pub fn device(&self) -> &Path {
        self.ender.device.path()
    }

    /// Returns where it is mounted; `None` if nobody mounted it here.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        self.ender.directory.as_deref()
    }

    /// Returns how many bytes were written over the disk.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.overlay.written()
    }

    /// Returns what ends it from another thread.
    #[must_use]
    pub fn ender(&self) -> LoopEnder {
        self.ender.clone()
    }

    /// Waits until nobody uses the device any more.
    ///
    /// # Errors
    /// What ended it before.
    pub fn wait(mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), super::session::join)
    }
}

impl Drop for Looped {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else { return };
        if let Err(error) = self.ender.end() {
            tracing::warn!(%error, "the device stays");
        }
        let start = Instant::now();
        while !server.is_finished() && start.elapsed() < PATIENCE {
            thread::sleep(PAUSE);
        }
    }
}

impl LoopEnder {
    /// Unmounts what is mounted, and ends the device. A mount still in use after a while is detached from its place, and ends, as
    /// does a device in use, with its last user. Reads that are stuck are answered with EIO.
    ///
    /// # Errors
    /// `System` if the system refuses.
    pub fn end(&self) -> Result<()> {
        let fail_stuck = || {
            for waiting in self.requests.older_than(STUCK) {
                self.requests.fail(&waiting, Errno::IO, || {});
            }
        };
        match &self.directory {
            Some(directory) if is_mounted(&self.device, directory) => detach(&self.device, directory, fail_stuck),
            // It ends by itself, and another may have its number.
            Some(_) => Ok(()),
            None => end_device(&self.device),
        }
    }
}

/// Returns whether a mount is of a device of ours, of this process or another, living or dead.
pub(super) fn is_loop(mount: &Mount) -> bool {
    Device::of_mount(mount).is_some()
}

/// Unmounts a device of ours, of this process or another, living or dead, and waits until it is gone.
///
/// # Errors
/// `System` if the system refuses.
pub(super) fn unmount(mount: &Mount) -> Result<()> {
    Device::of_mount(mount).map_or(Ok(()), |device| detach(&device, &mount.mountpoint, || {}))
}

/// Ends the device of ours that is at this path, of this process or another, living or dead; `None` if there is none.
pub(super) fn unmount_device(path: &Path) -> Option<Result<()>> {
    Device::at(path).map(|device| end_device(&device))
}

fn is_mounted(device: &Device, directory: &Path) -> bool {
    mounts::at(directory).is_ok_and(|found| found.is_some_and(|mount| mount.source == device.path()))
}

fn end_device(device: &Device) -> Result<()> {
    if !device.is_ours() {
        return Ok(());
    }
    let path = device.path().display();
    device.end().map_err(|error| Error::new(ErrorKind::System, format!("end '{path}': {error}")))?;
    if !is_gone(device) {
        tracing::warn!(device = %path, "still in use, ends with its last user");
    }
    Ok(())
}

/// Waits a while for a device to end.
fn is_gone(device: &Device) -> bool {
    let start = Instant::now();
    while device.is_ours() {
        if start.elapsed() >= PATIENCE {
            return false;
        }
        thread::sleep(PAUSE);
    }
    true
}

/// Unmounts: at once if it is idle, lazily once patience is over. Before each attempt it does `prepare`.
fn detach(device: &Device, directory: &Path, prepare: impl Fn()) -> Result<()> {
    let start = Instant::now();
    loop {
        prepare();
        let is_last = start.elapsed() >= PATIENCE;
        let mut command = Command::new("umount");
        command.args(is_last.then_some("--lazy")).arg("--").arg(directory).stdin(Stdio::null());
        let said = match command.output() {
            Ok(output) if output.status.success() => {
                if is_last || !is_gone(device) {
                    let directory = directory.display();
                    tracing::warn!(%directory, "still in use, ends with its last open file");
                }
                return Ok(());
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        // Somebody else was faster.
        if !is_mounted(device, directory) {
            return Ok(());
        }
        if is_last {
            let message = format!("unmount '{}': {said}", directory.display());
            return Err(Error::new(ErrorKind::System, message));
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_file_is_one_that_the_kernel_shows_whole() {
        assert_eq!(file_name("web 01/2026-08-01T020003Z/vg0-root"), "xofs:web:01:2026-08-01T020003Z:vg0-root");
        assert_eq!(file_name("../\n\\é"), "xofs:..:::é");
        assert_eq!(file_name(&"é".repeat(150)).len(), 5 + 200);
    }
}
