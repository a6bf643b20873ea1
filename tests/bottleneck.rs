//! The closing line names what was slowed on purpose: each stage of a backup, an ingest, a restore and a merge, by so much that
//! nothing else comes near.
//!
//! What is slow waits, and takes no processor: the runs take place side by side.

mod pool;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pool::{MIB, World};
use serde_json::{Value, json};
use storage::{LocalStorage, WritableStorage};
use support::slow_path::SlowPath;
use support::{init, run, scratch, xofs};
use tempfile::TempDir;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::{Act, Fault, Site};
use xofs::repository::{VmId, VmLock};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
/// What is slowed takes this long at least; the rest of a run, much less.
const LONG: Duration = Duration::from_secs(5);

/// Runs a command, which must succeed; returns its JSON, and what limited it.
fn told(command: &mut Command, transfer: &str) -> (Value, Value) {
    let (code, out, err) = run(command.arg("--json"));
    assert_eq!(code, 0, "{out}\n{err}");
    let said: Value = serde_json::from_str(&out).expect("JSON");
    let bottleneck = said.pointer(transfer).expect("it says where the time went")["bottleneck"].clone();
    (said, bottleneck)
}

/// Checks that a stage is named, with evidence and this advice; whatever else took time is shown if it is not.
fn named((said, bottleneck): &(Value, Value), stage: &str, kind: &str, evidence: &str, advice: &str) {
    let shown = || format!("{bottleneck:#}\n{said:#}");
    assert_eq!((&bottleneck["stage"], &bottleneck["of"]["kind"]), (&json!(stage), &json!(kind)), "{}", shown());
    let text = |key: &str| bottleneck[key].as_str().unwrap_or_default().to_owned();
    assert!(text("evidence").contains(evidence), "{}", shown());
    assert!(text("advice").contains(advice), "{}", shown());
    let all = format!("{}; {}", text("evidence"), text("advice"));
    assert!(text("line").ends_with(&all), "{}", shown());
}

/// A pool with a machine of 16 blocks, and an SR `spare`.
fn world() -> World {
    let machine = Machine::new("web01").disk(Disk::new("system", 32 * MIB).filled(100));
    let sr = |name| Sr::new(name, Storage::Ext);
    World::new(|scene| scene.sr(sr("storage")).sr(sr("spare")).vm(machine))
}

impl World {
    fn backup(&self, arguments: &[&str]) -> (Value, Value) {
        told(&mut self.command(arguments), "/vms/0/backup/transfer")
    }

    fn restore(&self, from: &Path, arguments: &[&str]) -> (Value, Value) {
        let mut command = self.lab.command("restore", &[]);
        told(command.arg(from).arg("web01/latest").args(arguments), "/restores/0/transfer")
    }

    fn slow(&self, fault: Fault) {
        self.lab.simulator.fault(fault);
    }
}

/// Runs cases at the same time, since they only wait.
fn side_by_side<C: Send, const N: usize>(cases: [C; N], run: impl Fn(C) + Sync) {
    std::thread::scope(|scope| {
        for case in cases {
            scope.spawn(|| run(case));
        }
    });
}

fn delay(site: Site) -> Fault {
    Fault::new(site, Act::Delay(LONG))
}

#[test]
fn a_slow_export_by_nbd_is_named_with_its_connections() {
    let world = world();
    // Four connections at most, each of which reads one after the other.
    world.slow(Fault::new(Site::Nbd, Act::Delay(LONG / 4)).times(16));
    let told = world.backup(&["--no-base"]);
    named(&told, "read", "host", "writing waited", "NBD connections");
    let line = told.1["line"].as_str().expect("text");
    assert!(line.starts_with("host ") && line.contains(" export: busy "), "{line}");
}

#[test]
fn a_slow_stream_is_named_with_nbd_as_the_way_out() {
    let world = world();
    world.slow(delay(Site::Export).after(8 * MIB));
    named(&world.backup(&["--no-nbd"]), "read", "host", "writing waited", "let it be read by NBD");
}

#[test]
fn a_slow_xva_is_named_with_increments_as_the_way_out() {
    let world = world();
    world.slow(delay(Site::ExportVm).after(8 * MIB));
    named(&world.backup(&["--mode", "full"]), "read", "host", "writing waited", "back up incrementally");
}

#[test]
fn what_the_pool_does_before_and_after_the_bytes_is_named() {
    side_by_side(
        [
            ("VM.snapshot", "snapshot", &[][..]),
            ("SR.get_record", "survey", &[]),
            ("VDI.get_nbd_info", "open", &[]),
            ("VDI.destroy", "settle", &["--no-base"]),
        ],
        |(method, stage, arguments)| {
            let world = world();
            world.slow(Fault::call(method, Act::Delay(LONG)));
            named(&world.backup(arguments), stage, "host", " of ", "fewer machines at once");
        },
    );
}

#[test]
fn a_slow_replica_is_named() {
    let world = world();
    world.slow(delay(Site::Import).after(8 * MIB));
    let told = world.backup(&["--no-nbd", "--to-sr", "spare"]);
    named(&told, "import", "sr", "busy", "fewer transfers into it");
    assert_eq!(told.1["of"]["name"], "spare", "{:#}", told.1);
}

#[test]
fn a_slow_repository_is_named_among_several() {
    let world = world();
    let second = init(world.folder.path(), "second", &[]);
    let slow = SlowPath::mount(&second);
    // Four threads write.
    slow.delay(LONG / 4, "*/blocks/* ops=create");
    let to = slow.path().to_str().expect("text");
    let told = world.backup(&["--to", to, "--to", world.repository.to_str().expect("text")]);
    named(&told, "write", "repository", "waited", "a faster disk");
    assert_eq!(told.1["of"]["name"], to, "{:#}", told.1);
}

#[test]
fn slow_reads_imports_and_checks_of_a_restore_are_named() {
    let world = world();
    world.backup(&[]);
    let slow = SlowPath::mount(&world.repository);
    slow.delay(LONG / 4, "*/blocks/* ops=open");
    named(&world.restore(slow.path(), &[]), "read", "repository", "sending waited", "a faster disk");
    slow.release();
    for (fault, stage, kind, advice) in [
        (delay(Site::Import).after(8 * MIB), "import", "sr", "faster storage in the pool"),
        (delay(Site::Export).after(8 * MIB), "verify", "sr", "--verify"),
        (Fault::call("VDI.create", Act::Delay(LONG)), "prepare", "host", "fewer machines at once"),
    ] {
        world.slow(fault);
        named(&world.restore(slow.path(), &["--verify"]), stage, kind, "", advice);
    }
}

/// A repository, and an image of 16 blocks of which each begins with its number and `round`.
struct Place {
    folder: TempDir,
    repository: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("slow-stage-").tempdir_in(scratch()).expect("a folder");
        let repository = init(folder.path(), "main", &[]);
        Self { folder, repository }
    }

    fn ingest(&self, to: &Path, round: u8) -> (Value, Value) {
        let mut bytes = vec![0xa5; 32 << 20];
        (0_u8..)
            .zip(bytes.chunks_mut(2 << 20))
            .for_each(|(number, block)| block[..2].copy_from_slice(&[number, round]));
        let image = self.folder.path().join("image.raw");
        fs::write(&image, bytes).expect("there is room");
        let disk = format!("xvda={}", image.display());
        let mut command = xofs();
        command.arg("ingest").arg(to).args(["--vm", VM, "--name", "web01", "--compression", "none", "--disk", &disk]);
        told(&mut command, "/transfer")
    }

    /// Forgets all but the newest backup, through a path on which these requests are slow.
    fn merge(&self, rule: &str, delay: Duration) -> (Value, Value) {
        let slow = SlowPath::mount(&self.repository);
        slow.delay(delay, rule);
        let mut command = xofs();
        command.args(["forget", "--all", "--apply", "--keep-last", "1", "--jobs", "1"]).arg(slow.path());
        told(&mut command, "/applied/transfer")
    }
}

#[test]
fn slow_syncs_are_named() {
    let place = Place::new();
    let slow = SlowPath::mount(&place.repository);
    slow.delay(LONG / 8, "*/blocks/* ops=fsync,fsyncdir");
    named(&place.ingest(slow.path(), 0), "sync", "repository", " of ", "a faster disk");
}

#[test]
fn slow_publishing_is_named() {
    let place = Place::new();
    let slow = SlowPath::mount(&place.repository);
    slow.delay(LONG / 4, "*.alias.vhd* ops=create,write,rename");
    named(&place.ingest(slow.path(), 0), "publish", "repository", " of ", "a faster disk");
}

#[test]
fn slow_reads_of_the_backup_before_are_named() {
    let place = Place::new();
    place.ingest(&place.repository, 0);
    // Without digests its blocks have to be read.
    let digests = files_called(&place.repository, ".xofs-digests");
    assert_eq!(digests.len(), 1, "{digests:?}");
    digests.iter().for_each(|path| fs::remove_file(path).expect("removed"));
    let slow = SlowPath::mount(&place.repository);
    slow.delay(LONG / 8, "*/blocks/* ops=open");
    let told = place.ingest(slow.path(), 1);
    named(&told, "base", "repository", "reading waited", "a faster disk");
}

#[test]
fn a_lock_that_somebody_holds_is_named() {
    let place = Place::new();
    let storage: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(&place.repository).expect("opened"));
    let vm = VmId::new(VM).expect("a uuid");
    let lock = VmLock::take(storage, &vm, Duration::ZERO, |_| true).expect("nobody has it");
    let holder = std::thread::spawn(move || {
        std::thread::sleep(LONG);
        drop(lock);
    });
    let told = place.ingest(&place.repository, 0);
    holder.join().expect("it only waits");
    named(&told, "lock", "repository", " of ", "at other times");
}

#[test]
fn the_slow_phase_of_a_merge_is_named() {
    side_by_side(
        [
            ("*/blocks/* ops=rename", LONG / 2, "move"),
            ("*/blocks/* ops=fsync,fsyncdir", LONG / 4, "sync"),
            ("*/data/* ops=unlink", LONG / 4, "delete"),
            ("*/bat ops=open", LONG / 4, "read"),
        ],
        |(rule, delay, stage)| {
            let place = Place::new();
            place.ingest(&place.repository, 0);
            place.ingest(&place.repository, 1);
            let told = place.merge(rule, delay);
            assert_eq!(told.0["applied"]["vms"][0]["mergedDisks"], 1, "{:#}", told.0);
            named(&told, stage, "repository", "busy", "a faster disk");
        },
    );
}

/// The files below a folder of this name, or that end with it.
fn files_called(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("listed") {
        let path = entry.expect("listed").path();
        if path.is_dir() {
            found.extend(files_called(&path, name));
        } else if path.to_string_lossy().ends_with(name) {
            found.push(path);
        }
    }
    found
}
