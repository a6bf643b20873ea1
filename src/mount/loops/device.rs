//! Loop devices of the kernel: a file as a block device.
//!
//! The file of a device of ours has a name that begins with [`MARK`], in a filesystem that is mounted nowhere: so the kernel's own
//! account of its devices says which are ours, and nothing else has to be kept.
//!
//! Source: loop(4), and `include/uapi/linux/loop.h` for `LOOP_CONFIGURE`, which is newer than that page.

#![expect(unsafe_code, reason = "the calls of /dev/loop-control and of loop devices have no safe wrapper here")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::super::mounts::Mount;

/// How the name of a file begins that is served for a loop device.
pub(super) const MARK: &str = "xofs:";

const CONTROL: &str = "/dev/loop-control";
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;

/// How often a free device is asked for that others may take first.
const ATTEMPTS: u32 = 64;

/// `struct loop_config`, with the `struct loop_info64` that is in it.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    /// Bytes of a sector.
    block_size: u32,
    /// `lo_device`, `lo_inode`, `lo_rdevice`, `lo_offset`, `lo_sizelimit`.
    place: [u64; 5],
    /// `lo_number`, `lo_encrypt_type`, `lo_encrypt_key_size`.
    numbers: [u32; 3],
    flags: u32,
    /// `lo_file_name`, `lo_crypt_name`, `lo_encrypt_key`.
    names: [u8; 64 + 64 + 32],
    /// `lo_init`, and what is reserved.
    rest: [u64; 2 + 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304, "the size of the kernel's");

/// What a device is to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) is_read_only: bool,
    /// It ends when nobody has it open or mounted any more.
    pub(super) ends_unused: bool,
    /// Its partitions become devices, too.
    pub(super) has_partitions: bool,
}

/// A loop device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    number: u32,
    path: PathBuf,
}

impl Device {
    /// Makes a device of a file, and returns it and itself, open.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn new(file: &File, wanted: Wanted) -> io::Result<(Self, File)> {
        let named =
            |path: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let open = |path: &Path| File::options().read(true).write(true).open(path).map_err(|error| named(path, error));
        let control = open(Path::new(CONTROL))?;
        let mut last = io::Error::from_raw_os_error(libc::EBUSY);
        for _ in 0..ATTEMPTS {
            let number = call(control.as_raw_fd(), LOOP_CTL_GET_FREE)?;
            let number = u32::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
            let device = Self::of_number(number);
            let open = open(&device.path)?;
            match configure(&open, file, wanted) {
                Ok(()) => return Ok((device, open)),
                // Somebody else took it.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
                // What old kernels answer to a call that they do not know.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {
                    return Err(io::Error::other(format!("{error}; Linux 5.8 or later is needed")));
                }
                Err(error) => return Err(named(&device.path, error)),
            }
        }
        Err(last)
    }

    fn of_number(number: u32) -> Self {
        Self { number, path: format!("/dev/loop{number}").into() }
    }

    /// Returns the device of ours that is at this path; `None` if it is none.
    pub(super) fn at(path: &Path) -> Option<Self> {
        let is_device = fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        Self::named(path).filter(|device| is_device && device.is_ours())
    }

    /// Returns the device of ours that is mounted there; `None` if something else is.
    pub(super) fn of_mount(mount: &Mount) -> Option<Self> {
        Self::named(&mount.source).filter(Self::is_ours)
    }

    fn named(path: &Path) -> Option<Self> {
        Some(Self::of_number(path.to_str()?.strip_prefix("/dev/loop")?.parse().ok()?))
    }

    /// Returns where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether it is there, and one of ours.
    pub(super) fn is_ours(&self) -> bool {
        let file = fs::read(format!("/sys/block/loop{}/loop/backing_file", self.number)).unwrap_or_default();
        file.strip_prefix(b"/").is_some_and(|name| name.starts_with(MARK.as_bytes()))
    }

    /// Ends it; one that is in use ends when it is not any more.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn end(&self) -> io::Result<()> {
        let open = File::open(&self.path)?;
        match call(open.as_raw_fd(), LOOP_CLR_FD) {
            // It is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            ended => ended.map(drop),
        }
    }
}

/// Calls a device without an argument.
fn call(device: RawFd, what: libc::Ioctl) -> io::Result<libc::c_int> {
    // SAFETY: these calls take no argument and touch no memory of ours.
    let result = unsafe { libc::ioctl(device, what, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn configure(device: &File, file: &File, wanted: Wanted) -> io::Result<()> {
    let flags = [
        (wanted.is_read_only, LO_FLAGS_READ_ONLY),
        (wanted.ends_unused, LO_FLAGS_AUTOCLEAR),
        (wanted.has_partitions, LO_FLAGS_PARTSCAN),
    ];
    let config = LoopConfig {
        fd: u32::try_from(file.as_raw_fd()).expect("an open file has a number"),
        block_size: 512,
        place: [0; 5],
        numbers: [0; 3],
        flags: flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum(),
        names: [0; 160],
        rest: [0; 10],
    };
    // SAFETY: `config` has the kernel's layout and outlives the call, which only reads it.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
