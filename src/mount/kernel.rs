//! Making a mount: a connection to the kernel, at a directory or nowhere.
//!
//! Root calls mount(2); anybody else has fusermount3 do it, which hands the connection over a socket. Whoever made the
//! mount knows only the connection: nothing unmounts by path but who checked what is mounted there.

use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// The options that every mount has, as fusermount3 takes them.
const OPTIONS: &str = "ro,nodev,nosuid,default_permissions";

/// What is asked of the kernel when mounting.
pub(super) struct Mounting<'a> {
    /// An existing directory.
    pub(super) mountpoint: &'a Path,
    /// Source in the table of mounts; without commas.
    pub(super) source: &'a str,
    /// What is shown after `fuse.` in the table of mounts.
    pub(super) subtype: &'a str,
    /// Users other than who mounts may enter.
    pub(super) allow_other: bool,
}

/// Mounts, read-only, and returns the connection.
///
/// # Errors
/// What mount(2) or fusermount3 says; `NotFound` if `/dev/fuse` or fusermount3 is missing.
pub(super) fn mount(mounting: &Mounting<'_>) -> io::Result<OwnedFd> {
    match mount_directly(mounting) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => mount_by_fusermount(mounting),
        other => other,
    }
}

fn mount_directly(mounting: &Mounting<'_>) -> io::Result<OwnedFd> {
    let connection = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},subtype={},default_permissions",
        connection.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        mounting.subtype,
    );
    if mounting.allow_other {
        options.push_str(",allow_other");
    }
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    let options = CString::new(options)?;
    rustix::mount::mount(mounting.source, mounting.mountpoint, "fuse", flags, options.as_c_str())?;
    Ok(connection)
}

/// Makes a mount that is nowhere: it has no path, and ends when nothing in it is open any more. Returns the connection and its
/// root, through which files in it are opened. Only root may.
///
/// # Errors
/// What the system says.
pub(super) fn mount_nowhere(source: &str) -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    };

    let connection = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let making = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let number = connection.as_raw_fd().to_string();
    let options = [("source", source), ("fd", &number), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")];
    for (name, value) in options {
        fsconfig_set_string(&making, name, value)?;
    }
    fsconfig_create(&making)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&making, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    Ok((connection, root))
}

fn mount_by_fusermount(mounting: &Mounting<'_>) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut options = format!("{OPTIONS},fsname={},subtype={}", mounting.source, mounting.subtype);
    if mounting.allow_other {
        options.push_str(",allow_other");
    }
    let helper = Command::new("fusermount3")
        .args(["-o", &options, "--"])
        .arg(std::ffi::OsStr::from_bytes(mounting.mountpoint.as_os_str().as_bytes()))
        // The number of the socket; standard input is one that a child keeps.
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    // Ends at the latest with the helper, whose side of the socket is the only one.
    let received = receive(&ours);
    let output = helper.wait_with_output()?;
    match received? {
        Some(connection) if output.status.success() => Ok(connection),
        _ => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}

/// Receives a file descriptor; `None` if the other side closed without sending one.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    rustix::io::retry_on_intr(|| recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC))?;
    let received = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(received)
}
