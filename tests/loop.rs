//! Volumes mounted by the kernel of this machine: what it recovers, how it ends, and that nothing is left.
//!
//! The truth is the kernel's own mount of a copy that may be written; so these tests need root and loop devices.

#[path = "../guest/tests/compare/mod.rs"]
mod compare;
mod support;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use compare::Random;
use compare::churn::Churn;
use compare::image::{Loop, Mount, Reflinks, scratch, sparse};
use compare::tree::{self, Tree};
use guest::Time;
use serde_json::Value;
use support::slow_path::SlowPath;
use support::{init, is_mounted, run, succeed, xofs};
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// Makes a repository with one backup of a VM, whose disks are images.
fn repository(folder: &Path, vm: &str, disks: &[(&str, &Path)]) -> PathBuf {
    let repository = init(folder, "repository", &[]);
    let uuid = "1f2e3d4c-5b6a-4788-9900-aabbccddeeff";
    let mut ingest = xofs();
    ingest.args(["ingest", "--vm", uuid, "--name", vm, "--time", "20260801T020003Z", "--repository"]).arg(&repository);
    for (name, image) in disks {
        ingest.arg("--disk").arg(format!("{name}={}", image.display()));
    }
    succeed(&mut ingest);
    repository
}

/// An ext4 with one file.
fn ext4(folder: &Path) -> PathBuf {
    let image = folder.join("ext4");
    compare::image::make(&image, 32 * MIB, &["mkfs.ext4"]);
    fs::write(Mount::new(&image, "ext4", "noatime").path().join("file"), "bytes").unwrap();
    image
}

/// The loop devices of a VM of that name.
fn devices(vm: &str) -> Vec<PathBuf> {
    let names = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().file_name());
    let is_ours = |name: &OsString| {
        let file = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file"));
        file.is_ok_and(|file| file.starts_with(&format!("/xofs:{vm}:")))
    };
    names.filter(is_ours).map(|name| Path::new("/dev").join(name)).collect()
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(10));
    }
}

/// `xofs loop` in the foreground. Dropping it ends it.
struct Served {
    process: Child,
    facts: Value,
    vm: String,
}

impl Served {
    /// Starts it for `VM/BACKUP/VOLUME`, and returns when it says that the volume is mounted.
    fn new(repository: &Path, what: &str, arguments: &[&str]) -> Self {
        let mut command = xofs();
        command.args(["loop", "--json"]).arg(repository).arg(what).args(arguments);
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut said, mut byte) = (Vec::new(), [0]);
        let output = process.stdout.as_mut().unwrap();
        while !said.ends_with(b"}\n") && output.read(&mut byte).unwrap() == 1 {
            said.extend(byte);
        }
        let facts = serde_json::from_slice(&said).unwrap_or_else(|error| panic!("{command:?} did not mount: {error}"));
        Self { process, facts, vm: what.split('/').next().unwrap().to_owned() }
    }

    fn device(&self) -> PathBuf {
        PathBuf::from(self.facts["device"].as_str().unwrap())
    }

    fn signal(&self, name: &str) {
        succeed(Command::new("kill").arg(format!("-{name}")).arg(self.process.id().to_string()));
    }

    /// Waits until the process has ended well, and looks that nothing is left.
    fn ended(mut self) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < PATIENCE, "it still runs");
            sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "{status}");
        self.assert_gone();
    }

    fn assert_gone(&self) {
        let device = self.device();
        assert!(!devices(&self.vm).contains(&device), "{} is still there", device.display());
        if let Some(directory) = self.facts["directory"].as_str() {
            assert!(!is_mounted(Path::new(directory)), "{directory} is still mounted");
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.process.try_wait() {
            return;
        }
        // Leave nothing after a panic.
        let place = self.facts["directory"].as_str().or(self.facts["device"].as_str()).unwrap().to_owned();
        let _ = xofs().arg("unmount").arg(place).output();
        let _ = self.process.kill();
        let _ = self.process.wait();
        assert!(std::thread::panicking(), "it was not ended");
    }
}

fn directory() -> TempDir {
    tempfile::Builder::new().prefix("loop-").tempdir_in(support::scratch()).unwrap()
}

fn text(directory: &TempDir) -> &str {
    directory.path().to_str().unwrap()
}

/// Two shown trees are one, but for the times that their recovery, after `since`, set.
fn assert_same(what: &str, truth: &Tree, shown: &Tree, since: Time) {
    let differences = tree::differences(truth, shown, Some(since));
    assert!(
        differences.is_empty(),
        "{what}: {} differences\n{}",
        differences.len(),
        differences[..10.min(differences.len())].join("\n")
    );
}

fn now() -> Time {
    // As coarse as the clock of files is.
    let coarse = Duration::from_millis(20);
    sleep(2 * coarse);
    let now = (SystemTime::now() - coarse).duration_since(UNIX_EPOCH).unwrap();
    Time { seconds: i64::try_from(now.as_secs()).unwrap(), nanoseconds: now.subsec_nanos() }
}

// Promise 24: "goes into a file of its own, never to the repository, and is gone when the device ends"
#[test]
fn a_volume_in_use_is_recovered_as_the_kernel_does_it_and_the_backup_stays() {
    let seed = Random::seed();
    let place = Reflinks::new(2 << 30);
    let kinds: [(&str, &[&str], u64, &str); 3] = [
        ("ext4", &["mkfs.ext4", "-q", "-F"], 64, "noload"),
        ("xfs", &["mkfs.xfs", "-q"], 320, "norecovery,nouuid"),
        ("btrfs", &["mkfs.btrfs", "-q"], 256, "rescue=nologreplay"),
    ];
    for (kind, mkfs, size, without) in kinds {
        let image = place.at(kind);
        sparse(&image, size * MIB);
        succeed(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image));
        let snapshot = {
            let mount = Mount::new(&image, kind, "noatime");
            let mut churn = Churn::new(mount.path(), seed);
            churn.work(300);
            // In the journal alone, for as long as the next seconds.
            fs::write(mount.path().join("late"), kind).unwrap();
            File::open(mount.path().join("late")).and_then(|late| late.sync_all()).unwrap();
            place.copy(&image, &format!("{kind}-snapshot"))
        };
        let folder = scratch();
        let vm = format!("in-use-{kind}");
        let repository = repository(folder.path(), &vm, &[("xvda", &snapshot)]);
        let since = now();
        let truth = {
            let recovered = place.copy(&snapshot, &format!("{kind}-recovered"));
            let device = Loop::new(&recovered);
            tree::of_kernel(Mount::of_device(device.path(), kind, "ro,noatime").path())
        };
        let as_stored = tree::of_kernel(Mount::new(&snapshot, kind, &format!("ro,{without}")).path());
        assert!(truth.contains_key(&b"late"[..]) && truth.len() > 50, "{kind}: {} files", truth.len());
        assert!(!tree::differences(&truth, &as_stored, Some(since)).is_empty(), "{kind}: nothing was to be recovered");

        let mounted = || {
            let at = directory();
            let served = Served::new(&repository, &format!("{vm}/latest/xvda"), &[text(&at)]);
            let written = served.facts["written"].as_u64().unwrap();
            assert!(written > 0, "{kind}: nothing was written");
            println!("{kind}: {} files, {written} bytes of recovery", truth.len());
            assert_same(kind, &truth, &tree::of_kernel(at.path()), since);
            assert!(fs::write(at.path().join("new"), "").is_err());
            (at, served)
        };
        // At once, though of two filesystems with one number; neither has what the other wrote. Linux tells two of Btrfs apart since
        // 6.7 only, and refuses that now and then where it remembers another one at the same device.
        let at_once = if kind == "btrfs" { vec![mounted()] } else { vec![mounted(), mounted()] };
        for (at, served) in at_once {
            succeed(xofs().arg("unmount").arg(at.path()));
            served.ended();
        }
        let at = directory();
        let served = Served::new(&repository, &format!("{vm}/latest/xvda"), &[text(&at), "--no-overlay"]);
        assert_eq!(served.facts["written"], 0);
        assert_same(&format!("{kind}, as stored"), &as_stored, &tree::of_kernel(at.path()), since);
        succeed(Command::new("umount").arg(at.path()));
        served.ended();
    }
}

// Promise 24: "`xofs loop` has the kernel mount a volume read-only, nodev and nosuid."
#[test]
fn what_is_not_read_here_is_mounted_by_the_kernel() {
    let folder = scratch();
    let (files, image) = (folder.path().join("files"), folder.path().join("erofs"));
    fs::create_dir(&files).unwrap();
    fs::write(files.join("file"), Random::new(3).bytes(300_000)).unwrap();
    succeed(Command::new("mkfs.erofs").arg(&image).arg(&files));
    let vm = "not-read";
    let repository = repository(folder.path(), vm, &[("xvda", &image)]);
    assert_eq!(run(xofs().arg("ls").arg(&repository).arg(format!("{vm}/latest/xvda:/"))).0, 1);

    let at = directory();
    let served = Served::new(&repository, &format!("{vm}/latest/xvda"), &[text(&at)]);
    assert_eq!(fs::read(at.path().join("file")).unwrap(), fs::read(files.join("file")).unwrap());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(text(&at))).unwrap();
    assert!(line.contains(" ro,nosuid,nodev"), "{line}");
    served.signal("INT");
    served.ended();
}

// Promise 24: "leave nothing, also of a process that was killed."
#[test]
fn what_a_killed_process_leaves_is_undone_by_unmount() {
    let folder = scratch();
    let vm = "killed";
    let repository = repository(folder.path(), vm, &[("xvda", &ext4(folder.path()))]);
    let what = format!("{vm}/latest/xvda");
    for by_name in [true, false] {
        let at = directory();
        let mut served = Served::new(&repository, &what, &[text(&at)]);
        assert_eq!(fs::read(at.path().join("file")).unwrap(), b"bytes");
        served.process.kill().unwrap();
        served.process.wait().unwrap();
        assert!(is_mounted(at.path()));
        let mut unmount = if by_name { xofs() } else { Command::new("umount") };
        succeed(unmount.args(by_name.then_some("unmount")).arg(at.path()));
        served.assert_gone();
    }
    let mut served = Served::new(&repository, &what, &["--device"]);
    served.process.kill().unwrap();
    served.process.wait().unwrap();
    assert_eq!(devices(vm), [served.device()]);
    succeed(xofs().arg("unmount").arg(served.device()));
    served.assert_gone();
}

#[test]
fn a_device_has_the_partitions_of_a_disk_and_is_written_beside_it() {
    let folder = scratch();
    let (image, vm) = (folder.path().join("disk"), "device");
    let whole = ext4(folder.path());
    sparse(&image, 64 * MIB);
    let script = format!("printf 'label: gpt\\nstart=2048, size=65536\\n' | sfdisk -q '{}'", image.display());
    succeed(Command::new("sh").args(["-c", &script]));
    File::options().write(true).open(&image).unwrap().write_all_at(&fs::read(&whole).unwrap(), MIB).unwrap();
    let repository = repository(folder.path(), vm, &[("xvda", &image)]);
    let what = format!("{vm}/latest/xvda");

    for arguments in [&["--device"][..], &["--device", "--no-overlay"]] {
        let served = Served::new(&repository, &what, arguments);
        assert_eq!((&served.facts["size"], &served.facts["directory"]), (&(64 * MIB).into(), &Value::Null));
        // A kernel that knows partitions makes devices of them; one that does not is told the same.
        let number = served.device().file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(fs::read_to_string(format!("/sys/block/{number}/loop/partscan")).unwrap(), "1\n");
        let partition =
            |how: &str| Mount::new(&served.device(), "ext4", &format!("{how},offset={MIB},sizelimit={}", 32 * MIB));
        let wanted: &[u8] = if arguments.len() == 1 {
            fs::write(partition("noatime").path().join("file"), "other bytes").unwrap();
            b"other bytes"
        } else {
            assert!(
                File::options()
                    .write(true)
                    .open(served.device())
                    .and_then(|device| device.write_all_at(&[1; 512], 0))
                    .is_err()
            );
            b"bytes"
        };
        assert_eq!(fs::read(partition("ro").path().join("file")).unwrap(), wanted);
        succeed(Command::new("losetup").arg("--detach").arg(served.device()));
        served.ended();
    }
    // In the background, and named by what it prints.
    let device = succeed(xofs().args(["loop", "--daemon", "--device"]).arg(&repository).arg(format!("{what}1")));
    assert_eq!(
        fs::read(Mount::of_device(Path::new(device.trim()), "ext4", "ro").path().join("file")).unwrap(),
        b"bytes"
    );
    assert_eq!(devices(vm), [PathBuf::from(device.trim())]);
    succeed(xofs().arg("unmount").arg(device.trim()));
    assert!(devices(vm).is_empty());
}

#[test]
fn a_mount_in_use_goes_from_its_place_and_ends_with_its_last_file() {
    let folder = scratch();
    let vm = "busy";
    let repository = repository(folder.path(), vm, &[("xvda", &ext4(folder.path()))]);
    let at = directory();
    let mut served =
        Served::new(&repository, &format!("{vm}/latest/xvda"), &[text(&at), "-t", "ext4", "-o", "noatime"]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(text(&at))).unwrap();
    assert!(line.contains(" ro,nosuid,nodev,noatime "), "{line}");
    let open = File::open(at.path().join("file")).unwrap();
    served.signal("TERM");
    wait_for("it is unmounted", || !is_mounted(at.path()));
    let mut bytes = [0; 5];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"bytes");
    assert!(served.process.try_wait().unwrap().is_none());
    drop(open);
    served.ended();
}

#[test]
fn a_repository_that_does_not_answer_is_an_error_at_the_deadline() {
    let folder = scratch();
    let (image, vm) = (ext4(folder.path()), "silent");
    fs::write(Mount::new(&image, "ext4", "noatime").path().join("large"), Random::new(5).bytes(8_000_000)).unwrap();
    let repository = repository(folder.path(), vm, &[("xvda", &image)]);
    let slow = SlowPath::mount(&repository);
    let at = directory();
    let served = Served::new(slow.path(), &format!("{vm}/latest/xvda"), &[text(&at), "--timeout=1"]);
    slow.stall("xo-vm-backups/* ops=read");
    let start = Instant::now();
    assert_eq!(fs::read(at.path().join("large")).err().and_then(|error| error.raw_os_error()), Some(5));
    assert!(start.elapsed() < PATIENCE);
    slow.release();
    wait_for("it is read again", || fs::read(at.path().join("large")).is_ok_and(|bytes| bytes.len() == 8_000_000));
    served.signal("TERM");
    served.ended();
}

// Promise 24: "what has no room there is an error."
#[test]
fn what_cannot_be_mounted_says_why_and_leaves_nothing() {
    let folder = scratch();
    let place = Reflinks::new(1 << 30);
    let image = place.at("dirty");
    compare::image::make(&image, 64 * MIB, &["mkfs.ext4"]);
    let dirty = {
        let mount = Mount::new(&image, "ext4", "noatime");
        Churn::new(mount.path(), 7).work(100);
        let late = File::create(mount.path().join("late")).unwrap();
        late.sync_all().unwrap();
        place.copy(&image, "snapshot")
    };
    let (luks, key, vm) = (folder.path().join("luks"), folder.path().join("key"), "refused");
    fs::write(&key, "key").unwrap();
    sparse(&luks, 32 * MIB);
    let mut format = Command::new("cryptsetup");
    format.args([
        "luksFormat",
        "--batch-mode",
        "--type",
        "luks1",
        "--pbkdf-force-iterations",
        "1000",
        "--key-file",
        key.to_str().unwrap(),
    ]);
    succeed(format.arg(&luks));
    let disk = folder.path().join("disk");
    sparse(&disk, 64 * MIB);
    let script = format!("printf 'label: gpt\\nstart=2048, size=65536\\n' | sfdisk -q '{}'", disk.display());
    succeed(Command::new("sh").args(["-c", &script]));
    let disks: [(&str, &Path); 3] = [("xvda", &dirty), ("xvdb", &luks), ("xvdc", &disk)];
    let repository = repository(folder.path(), vm, &disks);
    let at = directory();
    let inside = repository.join("inside");
    fs::create_dir(&inside).unwrap();
    let of = |volume: &str| format!("{vm}/latest/{volume}");
    let (a, b, c, d) = (of("xvda"), of("xvdb"), of("xvdc"), of("xvdz"));
    let at = text(&at);
    let table: [(&[&str], i32, &[&str]); 10] = [
        (&[&a, at, "--overlay-size=4KiB"], 1, &["the overlay is full", "recovery takes more than may be written"]),
        (&[&b, at], 1, &["LUKS1", "with --device"]),
        (&[&c, at], 1, &["is a whole disk", "'xofs ls'"]),
        (&[&d, at], 1, &["there is no such volume", "'xvda' (ext4)"]),
        (&[&a, "/nonexistent"], 1, &["no such directory"]),
        (&[&a, inside.to_str().unwrap()], 2, &["lies in the repository"]),
        (&[&format!("{a}:/etc"), at], 2, &["is no volume"]),
        (&[&a, at, "--device"], 2, &["leave the folder out"]),
        (&[&a], 2, &["VM/BACKUP/VOLUME"]),
        (&[&a, at, "-o", "nonsense"], 1, &["mount:"]),
    ];
    for (arguments, wanted, parts) in table {
        let (code, output, error) = run(xofs().arg("loop").arg(&repository).args(arguments));
        assert_eq!((code, &*output), (wanted, ""), "{arguments:?}: {error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{arguments:?}: {error}");
        let (code, output, again) = run(xofs().args(["loop", "--daemon"]).arg(&repository).args(arguments));
        assert_eq!((code, &*output), (wanted, ""), "{arguments:?}: {again}");
        assert!(parts.iter().all(|part| again.contains(part)), "{arguments:?}: {again}");
        wait_for("the device is gone", || devices(vm).is_empty());
        assert!(!is_mounted(Path::new(at)));
    }
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(env!("CARGO_BIN_EXE_xofs"));
    let (code, output, error) = run(nobody.arg("loop").arg(&repository).args([&a, at]));
    assert_eq!((code, &*output), (1, ""));
    assert!(error.starts_with("xofs: xofs loop needs root"), "{error}");
    // What is mounted by somebody else is not ended.
    let other = Mount::new(&ext4(folder.path()), "ext4", "ro");
    let (code, _, error) = run(xofs().arg("unmount").arg(other.path()));
    assert!(code == 1 && error.contains("is a mount of kind ext4, not of xofs"), "{error}");
    let device = Loop::new(&luks);
    assert_eq!(run(xofs().arg("unmount").arg(device.path())).0, 1);
}
