//! What the integration tests share: unpacked fixtures, and a mount by the built binary that is gone when dropped.
//!
//! Everything is made below Cargo's folder for the files of tests. A fixture is unpacked once and is then read-only by
//! agreement: a test that writes into a repository takes [`copy_of`] it.

#![allow(dead_code, reason = "every test binary uses a part of this")]

pub mod loop_mount;
pub mod slow_path;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use storage::{ObjectPath, Storage};
use tempfile::TempDir;

/// How long a mount may take to be readable, or to be gone. Generous: the machines of CI are slow, not wrong.
const PATIENCE: Duration = Duration::from_secs(60);

/// The key of repositories that tests make.
pub const KEY: &str = "0123456789abcdef0123456789abcdef";

/// What is random begins with this number, which `XOFS_SEED` says and the test prints.
pub fn seed() -> u64 {
    let seed = std::env::var("XOFS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("XOFS_SEED={seed}");
    seed
}

/// The folder of Cargo for what tests write.
pub fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Unpacks the fixture `name` if nobody did, and returns its folder, which holds `repo` and `expected`.
///
/// Unpacked beside its place and renamed there, so that of several processes one wins and none sees a half.
pub fn fixture(name: &str) -> PathBuf {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("{name}.tar.zst"));
    let changed = fs::metadata(&archive).unwrap_or_else(|error| panic!("{}: {error}", archive.display()));
    // Another archive of the same name gets another folder.
    let place = scratch().join(format!("fixture-{name}-{}-{}", changed.len(), changed.mtime()));
    if !place.exists() {
        let fresh = tempfile::Builder::new().prefix(".unpack-").tempdir_in(scratch()).expect("a folder to unpack into");
        succeed(Command::new("tar").arg("-C").arg(fresh.path()).args(["--zstd", "-xf"]).arg(&archive));
        match fs::rename(fresh.path().join(name), &place) {
            Ok(()) => {}
            // Another process was first, and its copy is whole.
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {}
            Err(error) => panic!("cannot rename the unpacked fixture to {}: {error}", place.display()),
        }
    }
    place
}

/// The `expected/index.json` of an unpacked fixture.
pub fn expected(fixture: &Path) -> Value {
    let path = fixture.join("expected/index.json");
    serde_json::from_slice(&fs::read(&path).expect("the truth is in the archive")).expect("the truth is JSON")
}

/// Copies a repository, holes kept, so that a test may change it.
pub fn copy_of(repository: &Path) -> TempDir {
    let copy = tempfile::Builder::new().prefix("repository-").tempdir_in(scratch()).expect("a folder for the copy");
    succeed(Command::new("cp").args(["-a", "--sparse=always"]).arg(repository.join(".")).arg(copy.path()));
    copy
}

/// The built `xofs`, without any setting of the person who runs the tests.
pub fn xofs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xofs"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("XOFS_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command, and panics with all it said unless it succeeds. Returns its standard output.
pub fn succeed(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}; did scripts/setup run?"));
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?} ended with {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// Runs `xofs` without a terminal and returns its exit code, standard output and standard error.
pub fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().expect("the built binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("not ended by a signal"), text(stdout), text(stderr))
}

/// Makes a repository of that name in a folder, with [`KEY`] if it is to be encrypted.
pub fn init(folder: &Path, name: &str, arguments: &[&str]) -> PathBuf {
    let place = folder.join(name);
    succeed(xofs().args(["repository", "init"]).arg(&place).args(arguments).env("XOFS_PASSWORD", KEY));
    place
}

/// All files of a storage, without the listing caches.
pub fn files<S: Storage + ?Sized>(storage: &S) -> Vec<String> {
    let (mut files, mut folders) = (Vec::new(), vec![ObjectPath::root()]);
    while let Some(folder) = folders.pop() {
        for entry in storage.list(&folder).expect("it can be listed") {
            let path = folder.join(&entry.name).expect("a name");
            if entry.is_directory { folders.push(path) } else { files.push(path.to_string()) }
        }
    }
    files.retain(|file| !file.ends_with("cache.json.gz"));
    files.sort();
    files
}

/// The SHA-256 of a file's content in hexadecimal, or what reading it failed with.
///
/// By openssl, which takes a fifth of the time of sha256sum where the processor has instructions for it.
pub fn sha256(path: &Path) -> Result<String, String> {
    let output =
        Command::new("openssl").args(["dgst", "-sha256", "-r"]).arg(path).output().expect("openssl is installed");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

/// Panics, saying why, unless root runs this: loop devices and guest filesystems need it.
pub fn require_root() {
    let uid = fs::metadata("/proc/self").expect("/proc is mounted").uid();
    assert_eq!(uid, 0, "this test mounts guest filesystems and needs root: sudo -E scripts/test");
}

/// Whether something is mounted exactly at `path`, by the kernel's own list, without touching the mount.
pub fn is_mounted(path: &Path) -> bool {
    let list = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    // The fifth field; a space in it is written \040, and no name of a test has one.
    list.lines().any(|line| line.split(' ').nth(4).is_some_and(|field| Path::new(field) == path))
}

/// A repository mounted by `xofs mount` in the foreground. Dropping it unmounts and checks that nothing is left.
pub struct Mounted {
    folder: Option<TempDir>,
    mountpoint: PathBuf,
    server: Mutex<Child>,
}

impl Mounted {
    /// Mounts `repository`, with its encryption key if it has one.
    pub fn new(repository: &Path, key: Option<&str>) -> Self {
        Self::with_arguments(repository, key, &[])
    }

    /// As [`Mounted::new`], with more arguments of `xofs mount`.
    pub fn with_arguments(repository: &Path, key: Option<&str>, arguments: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("mount-").tempdir_in(scratch()).expect("a folder to mount at");
        // The kernel lists mounts by their real path.
        let folder_path = folder.path().canonicalize().expect("it was just made");
        let mountpoint = folder_path.join("mount");
        fs::create_dir(&mountpoint).expect("the folder is empty");
        let mut command = xofs();
        command.arg("mount").arg(repository).arg(&mountpoint).args(arguments).stdin(Stdio::null());
        if let Some(key) = key {
            command.arg("--password-file").arg(write_key(&folder_path, key));
        }
        let mut server = command.spawn().expect("the built binary starts");
        let start = Instant::now();
        while !is_mounted(&mountpoint) {
            if let Some(status) = server.try_wait().expect("it is our child") {
                panic!("{command:?} ended with {status} before it mounted");
            }
            if start.elapsed() > PATIENCE {
                server.kill().expect("it is our child");
                panic!("{command:?} did not mount within {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { folder: Some(folder), mountpoint, server: Mutex::new(server) }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// The number of the process that serves it.
    pub fn process(&self) -> u32 {
        self.server().id()
    }

    /// The folder of one backup; `metadata` is the name of its metadata file, as the truth gives it.
    pub fn backup(&self, vm: &str, metadata: &str) -> PathBuf {
        self.mountpoint.join("by-uuid").join(vm).join(folder_name(metadata))
    }

    /// Asks the process to end, which unmounts.
    pub fn terminate(&self) {
        succeed(Command::new("kill").arg("-TERM").arg(self.server().id().to_string()));
    }

    /// Waits until the process has ended by itself, and panics if it does not or not well.
    pub fn ended(&self) {
        if let Err(problem) = self.wait() {
            panic!("{problem}");
        }
    }

    fn server(&self) -> MutexGuard<'_, Child> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmount(&self) -> Result<(), String> {
        if !is_mounted(&self.mountpoint) {
            return self.wait();
        }
        let output =
            xofs().arg("unmount").arg(&self.mountpoint).output().map_err(|error| format!("xofs unmount: {error}"))?;
        if !output.status.success() {
            return Err(format!("xofs unmount: {}", String::from_utf8_lossy(&output.stderr)));
        }
        if is_mounted(&self.mountpoint) {
            return Err(format!("{} is still mounted after xofs unmount", self.mountpoint.display()));
        }
        self.wait()
    }

    fn wait(&self) -> Result<(), String> {
        let start = Instant::now();
        loop {
            let status = self.server().try_wait();
            match status {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(format!("xofs mount ended with {status}")),
                Ok(None) if start.elapsed() > PATIENCE => {
                    return Err(format!("xofs mount still runs {PATIENCE:?} after the unmount"));
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(format!("cannot wait for xofs mount: {error}")),
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = self.unmount();
        if unmounted.is_err() {
            // Leave nothing even then: detach, end our child, and only then let the folder go.
            let _ = Command::new("umount").arg("--lazy").arg(&self.mountpoint).output();
            let mut server = self.server();
            let _ = server.kill();
            let _ = server.wait();
        }
        if is_mounted(&self.mountpoint) {
            // Removing a folder with a live mount in it would reach into the mount.
            if let Some(folder) = self.folder.take() {
                let _ = folder.keep();
            }
        }
        if let Err(problem) = unmounted {
            // A second panic would abort and hide the first.
            if std::thread::panicking() {
                eprintln!("{problem}");
            } else {
                panic!("{problem}");
            }
        }
    }
}

/// Writes an encryption key to a file only its owner reads, and returns its path.
pub fn write_key(folder: &Path, key: &str) -> PathBuf {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let path = folder.join("key");
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).expect("a new folder is writable");
    file.write_all(key.as_bytes()).expect("a short file fits");
    path
}

/// `.../20260801T020003Z.json` is shown as `2026-08-01T020003Z`.
pub fn folder_name(metadata: &str) -> String {
    let file = metadata.rsplit('/').next().expect("rsplit yields at least one");
    let time = file.split('.').next().expect("split yields at least one");
    format!("{}-{}-{}T{}", &time[0..4], &time[4..6], &time[6..8], &time[9..])
}
