//! A mount from its beginning to its end.
//!
//! A mount ends when somebody unmounts it: this process ([`Unmounter`], or dropping the [`Session`]), [`unmount`] in
//! another, or an administrator. What a process that died left behind is removed by [`unmount`], and by [`mount`] at the
//! same place.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::attributes::Owner;
use super::dispatch::Dispatcher;
use super::errno::Errno;
use super::filesystem::TreeFilesystem;
use super::fuser::Connection;
use super::kernel::{self, Mounting};
use super::loops;
use super::mounts;
use super::requests::Requests;
use super::transport::Handler;
use crate::repository::Repository;
use crate::tree::Tree;
use crate::worker::{WORKERS, Workers};

/// For how long an unmount is tried before the mount is detached from its place while still in use, and for how long a
/// dropped session waits for its last answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// How long a request may wait for the repository unless it is said otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Age from which a request counts as stuck when the mount is to end.
pub(super) const STUCK: Duration = Duration::from_millis(500);

/// Pause between two attempts.
pub(super) const PAUSE: Duration = Duration::from_millis(50);

/// The result of mounting or unmounting.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The place is no directory, or something that is not ours is in the way.
    Mountpoint,
    /// Nothing of ours is mounted there.
    NotMounted,
    /// The repository cannot be listed.
    Repository,
    /// The system refuses to mount or unmount.
    System,
}

/// Why a mount could not be made or ended.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// How a repository is mounted.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Other users may enter, as far as modes let them.
    pub allow_other: bool,
    /// Owner of everything; `None` is who mounts.
    pub uid: Option<u32>,
    /// Group of everything; `None` is that of who mounts.
    pub gid: Option<u32>,
    /// Permission bits to take away from 0500 (directories) and 0400 (files), or, if given, from 0555 and 0444.
    pub umask: Option<u32>,
    /// Files of guests belong to the guest's users, by number, with the permissions that they have there.
    pub is_guest_owner: bool,
    /// Source in the table of mounts; must hold no secret.
    pub fsname: String,
    /// How long a request may wait for the repository before it is answered with EIO; `None` is for ever.
    pub timeout: Option<Duration>,
    /// Threads that take requests; 0 is the larger of 8 and twice the number of cores.
    pub threads: usize,
    /// Shows symbolic links of guests as small text files. The links of the tree itself stay links.
    pub inert_symlinks: bool,
    /// Who reads the disks of guests.
    pub workers: Arc<Workers>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            allow_other: false,
            uid: None,
            gid: None,
            umask: None,
            is_guest_owner: false,
            timeout: Some(DEFAULT_TIMEOUT),
            fsname: "xofs".to_owned(),
            threads: 0,
            inert_symlinks: false,
            workers: Workers::new(WORKERS, Some(DEFAULT_TIMEOUT)),
        }
    }
}

impl MountOptions {
    fn thread_count(&self) -> usize {
        match self.threads {
            0 => thread::available_parallelism().map_or(8, |cores| (2 * cores.get()).max(8)),
            threads => threads,
        }
    }
}

/// A mount that is served; dropping it unmounts.
pub struct Session {
    server: Option<JoinHandle<io::Result<()>>>,
    unmounter: Unmounter,
}

/// Mounts a repository; returns once the tree can be read.
///
/// `mountpoint` must be an existing directory. A mount there whose process died is removed first.
///
/// # Errors
/// `Mountpoint`, `Repository` or `System`, with a sentence that says what to do.
pub fn mount(repository: Arc<Repository>, mountpoint: &Path, options: MountOptions) -> Result<Session> {
    let mountpoint = prepare(mountpoint)?;
    let tree = Tree::new(repository.clone(), options.workers.clone(), options.inert_symlinks);
    // The top level is listed before the mount exists: a repository that cannot be listed is not mounted.
    tree.warm_up().map_err(|error| Error::new(ErrorKind::Repository, error.to_string()))?;
    let filesystem =
        TreeFilesystem::new(tree, Owner::new(options.uid, options.gid, options.umask, options.is_guest_owner));
    let dispatcher = Dispatcher::new(filesystem, options.thread_count(), options.timeout);
    let requests = dispatcher.requests();
    let mounting = Mounting {
        mountpoint: &mountpoint,
        source: &mounts::escape_source(&options.fsname),
        subtype: "xofs",
        allow_other: options.allow_other,
    };
    let failed = |error: io::Error| Error::new(ErrorKind::System, explain_mount(&mountpoint, &error));
    let connection = kernel::mount(&mounting).map_err(failed)?;
    let connection = Connection::new(
        dispatcher,
        connection,
        options.allow_other,
        // Else the bits of a mode are all there is.
        options.is_guest_owner,
        options.thread_count(),
    );
    // What cannot be served is not left mounted: its connection is closed, or will be.
    let removed = |error: Error| {
        let _ = unmount(&mountpoint);
        error
    };
    let connection = connection.map_err(|error| removed(failed(error)))?;
    let server = serve(connection).map_err(removed)?;
    // Asks the mount itself: this returns when its threads answer.
    let device = mounts::device_of(&mountpoint).map_err(|error| {
        removed(Error::new(ErrorKind::System, format!("read the new mount at '{}': {error}", mountpoint.display())))
    })?;
    tracing::info!(mountpoint = %mountpoint.display(), repository = %repository.storage().describe(), "mounted");
    Ok(Session {
        server: Some(server),
        unmounter: Unmounter { mountpoint: Arc::from(mountpoint), device: Arc::from(device), requests },
    })
}

/// Starts a thread that answers the requests of a mount.
pub(super) fn serve<H: Handler>(connection: Connection<H>) -> Result<JoinHandle<io::Result<()>>> {
    let thread = thread::Builder::new().name("xofs-mount".to_owned());
    let failed = |error| Error::new(ErrorKind::System, format!("start a thread for the mount: {error}"));
    thread.spawn(move || connection.run()).map_err(failed)
}

/// Waits until such a thread ends.
pub(super) fn join(server: JoinHandle<io::Result<()>>) -> Result<()> {
    match server.join() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::new(ErrorKind::System, format!("serve the mount: {error}"))),
        Err(_) => Err(Error::new(ErrorKind::System, "a thread that serves the mount panicked")),
    }
}

/// Checks the place of a mount, and removes what a dead process left there.
fn prepare(mountpoint: &Path) -> Result<PathBuf> {
    let refuse = |reason: String| {
        Error::new(ErrorKind::Mountpoint, format!("cannot mount at '{}': {reason}", mountpoint.display()))
    };
    let resolved = mounts::resolve(mountpoint).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => refuse("no such directory; create it first".to_owned()),
        _ => refuse(error.to_string()),
    })?;
    let mut metadata = std::fs::metadata(&resolved);
    if metadata.as_ref().is_err_and(mounts::is_dead) {
        let ours = mounts::at(&resolved).is_ok_and(|found| found.is_some_and(|mount| mount.is_ours()));
        if !ours {
            return Err(refuse("a dead mount of another program is there; unmount it first".to_owned()));
        }
        tracing::warn!(mountpoint = %resolved.display(), "removing a mount whose process died");
        unmount(&resolved)?;
        metadata = std::fs::metadata(&resolved);
    }
    let metadata = metadata.map_err(|error| refuse(error.to_string()))?;
    if !metadata.is_dir() {
        return Err(refuse("it is not a directory".to_owned()));
    }
    // A second mount would hide the first, and one unmount would leave it.
    if mounts::at(&resolved).is_ok_and(|found| found.is_some_and(|mount| mount.is_ours())) {
        return Err(refuse("a repository is mounted there already; unmount it first (xofs unmount)".to_owned()));
    }
    Ok(resolved)
}

fn explain_mount(mountpoint: &Path, error: &io::Error) -> String {
    let said = error.to_string();
    let said = said.trim();
    let place = mountpoint.display();
    if said.contains("user_allow_other") {
        return format!(
            "mount at '{place}': other users may be let in only if /etc/fuse.conf says 'user_allow_other'; \
             add that line, or mount without allow_other"
        );
    }
    match error.kind() {
        io::ErrorKind::NotFound if !Path::new("/dev/fuse").exists() => {
            format!("mount at '{place}': /dev/fuse is missing; load the kernel module 'fuse'")
        }
        io::ErrorKind::PermissionDenied if error.raw_os_error() == Some(libc::EACCES) => {
            format!(
                "mount at '{place}': /dev/fuse may not be opened; ask for mode 0666 on it, as systems set it up, or mount as root"
            )
        }
        io::ErrorKind::NotFound => format!("mount at '{place}': fusermount3 was not found; install the package fuse3"),
        _ => format!("mount at '{place}': {said}"),
    }
}

impl Session {
    /// Waits until the mount has ended.
    ///
    /// # Errors
    /// What ended it, unless it was an unmount.
    pub fn wait(mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), join)
    }

    /// Returns what ends the mount from another thread.
    #[must_use]
    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else { return };
        if !server.is_finished() {
            if let Err(error) = self.unmounter.unmount() {
                tracing::warn!(%error, "the mount stays");
            }
            // Files still open keep a detached mount alive: they are not waited for.
            let start = Instant::now();
            while !server.is_finished() && start.elapsed() < PATIENCE {
                thread::sleep(PAUSE);
            }
        }
    }
}

/// Ends a mount of this process; may be used from any thread, more than once.
#[derive(Clone)]
pub struct Unmounter {
    mountpoint: Arc<Path>,
    device: Arc<str>,
    requests: Arc<Requests>,
}

impl Unmounter {
    /// Unmounts; a mount still in use after a while is detached from its place and ends with its last open file.
    /// Requests that are stuck are answered with EIO, so that who waits for them lets go.
    ///
    /// Does nothing if the mount is gone, also if another one has taken its place.
    ///
    /// # Errors
    /// `System` if the system refuses.
    pub fn unmount(&self) -> Result<()> {
        let found = mounts::at(&self.mountpoint)
            .map_err(|error| Error::new(ErrorKind::System, format!("read the table of mounts: {error}")))?;
        match found {
            Some(mount) if *mount.device == *self.device => detach(&self.mountpoint, || {
                for waiting in self.requests.older_than(STUCK) {
                    self.requests.fail(&waiting, Errno::IO, || {});
                }
            }),
            _ => Ok(()),
        }
    }
}

/// Unmounts what is mounted at `mountpoint`, by this process or another, living or dead: a repository, or a volume by way of a loop
/// device, which may be named itself.
///
/// Works as root and as the user who mounted. A mount still in use after a while is detached from its place and ends
/// with its last open file.
///
/// # Errors
/// `NotMounted` if nothing of ours is mounted there, `System` if the system refuses.
pub fn unmount(mountpoint: &Path) -> Result<()> {
    let resolved = mounts::resolve(mountpoint).map_err(|error| {
        Error::new(ErrorKind::NotMounted, format!("cannot unmount '{}': {error}", mountpoint.display()))
    })?;
    let found = mounts::at(&resolved)
        .map_err(|error| Error::new(ErrorKind::System, format!("read the table of mounts: {error}")))?;
    if let Some(ended) = loops::unmount_device(&resolved) {
        return ended;
    }
    match found {
        Some(mount) if mount.is_ours() => detach(&resolved, || {}),
        Some(mount) if loops::is_loop(&mount) => loops::unmount(&mount),
        Some(mount) => Err(Error::new(
            ErrorKind::NotMounted,
            format!("'{}' is a mount of kind {}, not of xofs; use umount", resolved.display(), mount.kind),
        )),
        None => Err(Error::new(ErrorKind::NotMounted, format!("nothing is mounted at '{}'", resolved.display()))),
    }
}

/// Unmounts a path: at once if it is idle, lazily once patience is over. Before each attempt it does `prepare`.
fn detach(mountpoint: &Path, prepare: impl Fn()) -> Result<()> {
    let start = Instant::now();
    loop {
        prepare();
        let is_last = start.elapsed() >= PATIENCE;
        match unmount_once(mountpoint, is_last) {
            Ok(()) => {
                if is_last {
                    tracing::warn!(mountpoint = %mountpoint.display(), "still in use, ends with its last open file");
                }
                return Ok(());
            }
            // Somebody else was faster.
            Err(_) if matches!(mounts::at(mountpoint), Ok(found) if !found.as_ref().is_some_and(mounts::Mount::is_ours)) =>
            {
                return Ok(());
            }
            Err(error) if is_last => {
                return Err(Error::new(
                    ErrorKind::System,
                    format!("unmount '{}': {}", mountpoint.display(), error.to_string().trim()),
                ));
            }
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

fn unmount_once(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    use rustix::mount::UnmountFlags;

    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(mountpoint, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) => return Ok(()),
        // Only root may; fusermount3 has the right to end the mounts of who calls it.
        Err(rustix::io::Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let output = Command::new("fusermount3")
        .args(if lazy { &["-u", "-z"][..] } else { &["-u"] })
        .arg("--")
        .arg(mountpoint)
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
}
