//! A repository behind a path that stalls, dies, answers with errors and comes back.
//!
//! Nothing here measures: a deadline that must not be what ends a wait is ten minutes, one that must be is two seconds.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use storage::{Fault, FaultyStorage, LocalStorage, Storage};
use support::slow_path::SlowPath;
use xofs::mount::{MountOptions, mount};
use xofs::repository::{OpenOptions, Repository};

use support::{Mounted, expected, fixture, folder_name, sha256, succeed, xofs};

/// How long anything may take that does not wait for the repository.
const PATIENCE: Duration = Duration::from_secs(60);
/// A deadline that no test reaches, and one that is waited for.
const NEVER: &str = "--timeout=600";
const SOON: &str = "--timeout=2";

/// Two VMs of the fixture `main`, one with a VHD file and one with an exploded VHD.
const FLAT: &str = "e15d58c8-1c93-4ef2-b5b1-db33d6955ecb";
const EXPLODED: &str = "ea1365a8-89fa-4eca-b5d2-3919ce4c105e";

/// The fixture `main` behind a slow path, mounted.
struct Place {
    truth: Value,
    // Dropped in this order: the mount before the path it lies on.
    mounted: Mounted,
    slow: SlowPath,
}

/// A disk, and the SHA-256 of its bytes.
struct Disk {
    path: PathBuf,
    sum: String,
}

impl Place {
    fn new(timeout: &str) -> Self {
        let fixture = fixture("main");
        let slow = SlowPath::mount(&fixture.join("repo"));
        let mounted = Mounted::with_arguments(slow.path(), None, &[timeout]);
        Self { truth: expected(&fixture), mounted, slow }
    }

    /// The first disk of a VM's first backup; its name was looked up already.
    fn disk(&self, vm: &str) -> Disk {
        let vms = self.truth["vms"].as_array().unwrap();
        let backup = &vms.iter().find(|found| found["uuid"] == vm).unwrap()["backups"][0];
        let folder = self.mounted.backup(vm, backup["metadata"].as_str().unwrap());
        let path = folder.join("disks/xvda.raw");
        assert_eq!(folder.file_name().unwrap().to_str().unwrap(), folder_name(backup["metadata"].as_str().unwrap()));
        fs::metadata(&path).unwrap();
        Disk { path, sum: backup["disks"][0]["sha256"].as_str().unwrap().to_owned() }
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&fs::read(self.mounted.path().join(".xofs/status.json")).unwrap()).unwrap()
    }

    fn stall(&self, vm: &str) {
        self.slow.stall(&format!("xo-vm-backups/{vm}/*"));
    }
}

impl Disk {
    fn is_right(&self) -> bool {
        sha256(&self.path) == Ok(self.sum.clone())
    }
}

/// A process that reads a file to its end.
struct Reader(Child);

impl Reader {
    fn of(path: &Path) -> Self {
        // Who is started in the background by a shell ignores SIGINT, and so would what it starts.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT", "cat"]).arg(path).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("env and cat are in coreutils"))
    }

    fn signal(&self, signal: &str) {
        succeed(Command::new("kill").arg(signal).arg(self.0.id().to_string()));
    }

    fn is_waiting(&mut self) -> bool {
        self.0.try_wait().expect("it is our child").is_none()
    }

    fn end(&mut self) -> ExitStatus {
        wait_for("the reader ends", || self.0.try_wait().expect("it is our child"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = get() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a command that must not wait for the repository.
fn at_once(command: &mut Command) -> String {
    let program = command.get_program().to_owned();
    let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    succeed(Command::new("timeout").arg(PATIENCE.as_secs().to_string()).arg(program).args(arguments))
}

// Promise 17: "What needs no storage goes on: the root, `.xofs`, links, and what is open and in memory."
#[test]
fn five_stalled_reads_hold_up_nothing_else_and_end_right_when_the_path_is_back() {
    let place = Place::new(NEVER);
    let (stalled, other) = (place.disk(FLAT), place.disk(EXPLODED));
    place.stall(FLAT);
    let mut readers: Vec<Reader> = (0..5).map(|_| Reader::of(&stalled.path)).collect();
    place.slow.wait_for_stalled(5);
    let listed = at_once(Command::new("ls").arg(place.mounted.path().join("vms")));
    assert!(listed.contains("web01~") && listed.contains("db01~"), "{listed}");
    at_once(Command::new("ls").arg("-l").arg(other.path.parent().unwrap()));
    assert!(other.is_right());
    assert!(readers.iter_mut().all(Reader::is_waiting));
    place.slow.release();
    assert!(readers.iter_mut().all(|reader| reader.end().success()));
    assert!(stalled.is_right());
}

// Promise 17: "SIGINT and SIGKILL end a reader that waits"
#[test]
fn a_signal_ends_who_waits_for_a_stalled_read_or_lookup() {
    let place = Place::new(NEVER);
    let disk = place.disk(FLAT);
    let dump = place.mounted.path().join("config");
    let dump = first_below(&first_below(&first_below(&dump)));
    place.slow.stall("xo-*");
    // Direct (a disk), through the page cache (a dump as stored), and a name.
    let unseen = disk.path.ancestors().nth(3).unwrap().join("2026-08-02T020003Z/disks/xvda.raw");
    for path in [&disk.path, &dump, &unseen] {
        for signal in ["-INT", "-KILL"] {
            let before = place.slow.stalled();
            let mut reader = Reader::of(path);
            place.slow.wait_for_stalled(before + 1);
            assert!(reader.is_waiting(), "{}", path.display());
            reader.signal(signal);
            assert!(!reader.end().success(), "{signal} {}", path.display());
        }
    }
    assert!(place.status()["interrupted"].as_u64().unwrap() >= 3, "{}", place.status());
    place.slow.release();
    assert!(disk.is_right());
}

/// The first name in a folder, which is waited for.
fn first_below(folder: &Path) -> PathBuf {
    let mut names: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names.swap_remove(0)
}

// Promise 17: "A storage that does not answer gives `EIO` at the deadline"
#[test]
fn what_does_not_answer_by_the_deadline_is_an_error_and_then_refused_until_it_answers() {
    let place = Place::new(SOON);
    let (stalled, other) = (place.disk(FLAT), place.disk(EXPLODED));
    place.stall(FLAT);
    let file = fs::File::open(&stalled.path);
    // The open may be what waits, or the read after it.
    let read = file.and_then(|file| file.read_at(&mut [0; 512], 1 << 20));
    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
    let status = place.status();
    assert!(status["timedOut"].as_u64().unwrap() >= 1, "{status}");
    assert_eq!(status["answers"], true, "{status}");
    assert!(status["silentFiles"][0]["file"].as_str().unwrap().contains(FLAT), "{status}");
    assert!(other.is_right());
    place.slow.release();
    wait_for("the disk answers again", || stalled.is_right().then_some(()));
    wait_for("the status says so", || place.status()["silentFiles"].as_array().unwrap().is_empty().then_some(()));
}

// Promise 17: "When the storage answers again, so does the mount."
#[test]
fn a_repository_that_is_dead_is_said_to_be_and_refused_at_once_and_read_on_when_it_is_back() {
    let place = Place::new(SOON);
    let disk = place.disk(FLAT);
    place.slow.stall("*");
    assert!(sha256(&disk.path).is_err());
    // Asked for its root then, it does not answer either.
    wait_for("the status says so", || (place.status()["answers"] == false).then_some(()));
    let stalled = place.slow.stalled();
    for _ in 0..20 {
        assert_eq!(fs::File::open(&disk.path).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    assert_eq!(place.slow.stalled(), stalled, "refused without asking the repository");
    assert!(fs::read_dir(place.mounted.path()).unwrap().count() > 3);
    place.slow.release();
    wait_for("the status says that it is back", || (place.status()["answers"] == true).then_some(()));
    wait_for("the disk reads right", || disk.is_right().then_some(()));
}

#[test]
fn a_mount_ends_although_a_read_is_stalled() {
    for ended_by in ["xofs", "umount -l", "SIGTERM"] {
        let place = Place::new(NEVER);
        let disk = place.disk(FLAT);
        place.stall(FLAT);
        let mut reader = Reader::of(&disk.path);
        place.slow.wait_for_stalled(1);
        let mountpoint = place.mounted.path();
        match ended_by {
            "xofs" => drop(at_once(Command::new(xofs().get_program()).arg("unmount").arg(mountpoint))),
            "umount -l" => drop(at_once(Command::new("umount").arg("--lazy").arg(mountpoint))),
            _ => place.mounted.terminate(),
        }
        wait_for("the mount is gone", || (!support::is_mounted(mountpoint)).then_some(()));
        if ended_by != "SIGTERM" {
            // Somebody else's unmount does not reach the process while a file is open.
            assert!(reader.is_waiting());
            reader.signal("-KILL");
        }
        reader.end();
        // The path is still stalled: the process ends although a thread of it waits.
        place.mounted.ended();
    }
}

#[test]
fn a_local_disk_that_stalls_leaves_threads_for_what_needs_none() {
    let fixture = fixture("main");
    let local = Arc::new(LocalStorage::open(&fixture.join("repo")).unwrap());
    let storage = Arc::new(FaultyStorage::new(local));
    assert!(!storage.capabilities().is_remote);
    let repository = Repository::with_storage(storage.clone(), OpenOptions::default()).unwrap();
    let folder = tempfile::Builder::new().prefix("local-").tempdir_in(support::scratch()).unwrap();
    let options = MountOptions { timeout: Some(Duration::from_secs(600)), threads: 8, ..MountOptions::default() };
    let session = mount(repository, folder.path(), options).unwrap();
    let [stalled, other] =
        [FLAT, EXPLODED].map(|vm| folder.path().join("by-uuid").join(vm).join("2026-08-01T020003Z/disks/xvda.raw"));
    let content = [&stalled, &other].map(|path| sha256(path).unwrap());
    storage.set_rule(|_, path| path.as_str().contains(FLAT).then_some(Fault::Stall));
    // More than the threads that take requests.
    let mut readers: Vec<Reader> = (0..20).map(|_| Reader::of(&stalled)).collect();
    assert!(storage.wait_for_stalled(16, PATIENCE));
    at_once(Command::new("ls").arg(folder.path().join(".xofs")));
    assert_eq!(sha256(&other).unwrap(), content[1]);
    for reader in &mut readers[..10] {
        reader.signal("-KILL");
        reader.end();
    }
    storage.release();
    assert!(readers[10..].iter_mut().all(|reader| reader.end().success()));
    assert_eq!(sha256(&stalled).unwrap(), content[0]);
    session.unmounter().unmount().unwrap();
    session.wait().unwrap();
}

#[test]
fn errors_of_the_path_are_errors_of_the_read_and_pass_with_it() {
    let place = Place::new(NEVER);
    let (disk, other) = (place.disk(EXPLODED), place.disk(FLAT));
    for errno in ["EIO", "ESTALE"] {
        place.slow.fail(errno, &format!("xo-vm-backups/{EXPLODED}/*"));
        let error = fs::read(&disk.path).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::ESTALE)), "{errno}: {error}");
        assert!(other.is_right());
        place.slow.release();
        wait_for("the disk reads right", || disk.is_right().then_some(()));
    }
}

#[test]
fn a_slow_path_is_read_right() {
    let place = Place::new(NEVER);
    let disks = [place.disk(FLAT), place.disk(EXPLODED)];
    place.slow.delay(Duration::from_millis(3), "*");
    assert!(disks.iter().all(Disk::is_right));
}
