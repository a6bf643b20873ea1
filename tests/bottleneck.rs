//! The closing line names what was slowed on purpose: each stage of a backup, an ingest, a restore and a merge, by so much that
//! nothing else comes near.
//!
//! What is slow waits, and takes no processor: the runs take place side by side. So does what a processor does, where the library is
//! told to make it slow.

mod job;
mod pool;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use disk::Extent;
use pool::{MIB, World};
use serde_json::{Value, json};
use storage::{LocalStorage, MemoryStorage, ObjectPath, WritableStorage};
use support::slow_path::SlowPath;
use support::{init, run, scratch, xofs};
use tempfile::TempDir;
use vhd::Filter;
use xapi::Slots;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::{Act, Class, Fault, Site};
use xofs::ingest::{self, Destination, Layout, RepositoryDestination, Source, Wanted, Watch};
use xofs::probe::{Kind, Stage, Transfer};
use xofs::repository::{OpenOptions, Repository, VmId, VmLock};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
/// What is slowed takes this long at least; the rest of a run, much less.
const LONG: Duration = Duration::from_secs(5);
/// What is held while a run begins, which may itself take a while, is held this long.
const HELD: Duration = Duration::from_secs(12);

/// Runs a command, which must succeed; returns its JSON, and what limited it.
fn told(command: &mut Command, transfer: &str) -> (Value, Value) {
    let (code, out, err) = run(command.arg("--json"));
    assert_eq!(code, 0, "{out}\n{err}");
    let said: Value = serde_json::from_str(&out).expect("JSON");
    let bottleneck = said.pointer(transfer).expect("it says where the time went")["bottleneck"].clone();
    (said, bottleneck)
}

/// Checks that a stage is named, with evidence and this advice; whatever else took time is shown if it is not.
fn named((said, bottleneck): &(Value, Value), stage: Stage, kind: &str, evidence: &str, advice: &str) {
    let shown = || format!("{bottleneck:#}\n{said:#}");
    assert_eq!((&bottleneck["stage"], &bottleneck["of"]["kind"]), (&json!(stage.name()), &json!(kind)), "{}", shown());
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

/// Returns the run in which a stage is slowed: there is one for each, or this does not compile.
fn shown_by(stage: Stage) -> fn() {
    match stage {
        Stage::Lock => a_lock_that_somebody_holds_is_named,
        Stage::Slot => limits_that_others_have_reached_are_named,
        Stage::Chain => a_host_that_coalesces_late_is_named,
        Stage::Snapshot | Stage::Survey | Stage::Open | Stage::Settle => {
            what_the_pool_does_before_and_after_the_bytes_is_named
        }
        Stage::Plan | Stage::Compare | Stage::Hash | Stage::Encode => what_a_slow_processor_does_is_named,
        Stage::Decode => slow_decoding_is_named,
        Stage::Bandwidth => the_limit_of_bandwidth_is_named,
        Stage::Read => a_slow_export_by_nbd_is_named_with_its_connections,
        Stage::Network => a_long_way_to_the_host_is_named,
        Stage::Base => slow_reads_of_the_backup_before_are_named,
        Stage::Write => a_slow_repository_is_named_among_several,
        Stage::Import | Stage::Verify | Stage::Prepare => slow_reads_imports_and_checks_of_a_restore_are_named,
        Stage::Move | Stage::Delete => the_slow_phase_of_a_merge_is_named,
        Stage::Sync => slow_syncs_are_named,
        Stage::Publish => slow_publishing_is_named,
    }
}

#[test]
fn each_stage_has_a_name_of_its_own_and_a_run_in_which_it_is_slowed() {
    let names: std::collections::BTreeSet<&str> = Stage::ALL.iter().map(|stage| stage.name()).collect();
    assert_eq!(names.len(), Stage::ALL.len());
    assert!(Stage::ALL.is_sorted(), "it is the order in which they are told");
    for stage in Stage::ALL {
        let _: fn() = shown_by(*stage);
    }
}

#[test]
fn a_slow_export_by_nbd_is_named_with_its_connections() {
    let world = world();
    // Four connections at most, each of which reads one after the other.
    world.slow(Fault::new(Site::Nbd, Act::Delay(LONG / 4)).times(16));
    let told = world.backup(&["--no-base"]);
    named(&told, Stage::Read, "host", "writing waited", "NBD connections");
    let line = told.1["line"].as_str().expect("text");
    assert!(line.starts_with("host ") && line.contains(" export: busy "), "{line}");
}

#[test]
fn a_long_way_to_the_host_is_named() {
    let machine = Machine::new("web01").disk(Disk::new("system", 32 * MIB).filled(100));
    let world = World::new(|scene| scene.nbd_round_trip(LONG / 8).vm(machine));
    world.backup(&["--cbt"]);
    // Eight pieces of each block, which are asked for one after the other.
    let disks = world.lab.simulator.disks_of(&world.machine()).expect("it is there");
    let write = |at| world.lab.simulator.write(&disks[0], |content| content.write(at, &[1]));
    (0..32 * MIB).step_by(256 << 10).for_each(|at| write(at).expect("it is there").expect("in range"));
    let told = world.backup(&["--cbt"]);
    named(&told, Stage::Network, "network", "busy", "nearer to the host");
    assert!(told.1["line"].as_str().is_some_and(|line| line.starts_with("network to host1: busy ")), "{:#}", told.1);
}

#[test]
fn limits_that_others_have_reached_are_named() {
    let world = world();
    let uuid = world.lab.simulator.look(|store| {
        let (pool, _) = store.all(Class::Pool).next().expect("there is one");
        store.text(Class::Pool, pool, "uuid").expect("it has one").to_owned()
    });
    // So that there is a state.
    world.backup(&[]);
    let slot = Slots::new(world.lab.state.join("locks")).take(&format!("snapshots-{uuid}"), [0]).expect("a file");
    let slot = slot.expect("nobody has it");
    let holder = std::thread::spawn(move || {
        std::thread::sleep(HELD);
        drop(slot);
    });
    let told = world.backup(&[]);
    holder.join().expect("it only waits");
    named(&told, Stage::Slot, "host", " of ", "limits of the job");
}

#[test]
fn a_host_that_coalesces_late_is_named() {
    let world = World::with_one_disk();
    world.lab.simulator.settings(|settings| settings.coalesce_interval = None);
    for round in 0..3 {
        world.guest_writes(round, 1);
        world.backup(&["--no-nbd", "--ignore-chain"]);
    }
    let told = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(HELD);
            world.lab.simulator.settings(|settings| settings.coalesce_interval = Some(Duration::from_millis(50)));
        });
        world.backup(&["--no-nbd"])
    });
    named(&told, Stage::Chain, "host", " of ", "coalesce faster");
}

#[test]
fn the_limit_of_bandwidth_is_named() {
    let pool = job::Pool::with(
        |scene| scene.vm(Machine::new("slow").disk(Disk::new("system", 16 * MIB).filled(100))),
        |_| String::new(),
    );
    let text = "pools = ['lab']\nvms.names = ['slow']\nto.repositories = ['main']\nlimits.bandwidth = '2 MiB/s'\n";
    pool.world.write("nightly.toml", text);
    pool.run(&[], 0);
    let (code, out, err) = run(&mut pool.command(&["report", "--json"]));
    assert_eq!(code, 0, "{out}{err}");
    let said: Value = serde_json::from_str(&out).expect("JSON");
    let bottleneck = &said["runs"][0]["vms"][0]["transfer"]["bottleneck"];
    assert_eq!((&bottleneck["stage"], &bottleneck["of"]["kind"]), (&json!("bandwidth"), &json!("host")), "{said:#}");
    let line = bottleneck["line"].as_str().expect("text");
    assert!(line.starts_with("the limit of bandwidth: reading waited for it "), "{line}");
    assert!(line.ends_with(" % of the time; raise it (limits.bandwidth of the job)"), "{line}");
}

#[test]
fn a_slow_stream_is_named_with_nbd_as_the_way_out() {
    let world = world();
    world.slow(delay(Site::Export).after(8 * MIB));
    named(&world.backup(&["--no-nbd"]), Stage::Read, "host", "writing waited", "let it be read by NBD");
}

#[test]
fn a_slow_xva_is_named_with_increments_as_the_way_out() {
    let world = world();
    world.slow(delay(Site::ExportVm).after(8 * MIB));
    named(&world.backup(&["--mode", "full"]), Stage::Read, "host", "writing waited", "back up incrementally");
}

#[test]
fn what_the_pool_does_before_and_after_the_bytes_is_named() {
    side_by_side(
        [
            ("VM.snapshot", Stage::Snapshot, &[][..]),
            ("SR.get_record", Stage::Survey, &[]),
            ("VDI.get_nbd_info", Stage::Open, &[]),
            ("VDI.destroy", Stage::Settle, &["--no-base"]),
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
    named(&told, Stage::Import, "sr", "busy", "fewer transfers into it");
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
    named(&told, Stage::Write, "repository", "waited", "a faster disk");
    assert_eq!(told.1["of"]["name"], to, "{:#}", told.1);
}

#[test]
fn slow_reads_imports_and_checks_of_a_restore_are_named() {
    let world = world();
    world.backup(&[]);
    let slow = SlowPath::mount(&world.repository);
    slow.delay(LONG / 4, "*/blocks/* ops=open");
    named(&world.restore(slow.path(), &[]), Stage::Read, "repository", "sending waited", "a faster disk");
    slow.release();
    for (fault, stage, kind, advice) in [
        (delay(Site::Import).after(8 * MIB), Stage::Import, "sr", "faster storage in the pool"),
        (delay(Site::Export).after(8 * MIB), Stage::Verify, "sr", "--verify"),
        (Fault::call("VDI.create", Act::Delay(LONG)), Stage::Prepare, "host", "fewer machines at once"),
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
    named(&place.ingest(slow.path(), 0), Stage::Sync, "repository", " of ", "a faster disk");
}

#[test]
fn slow_publishing_is_named() {
    let place = Place::new();
    let slow = SlowPath::mount(&place.repository);
    slow.delay(LONG / 4, "*.alias.vhd* ops=create,write,rename");
    named(&place.ingest(slow.path(), 0), Stage::Publish, "repository", " of ", "a faster disk");
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
    named(&told, Stage::Base, "repository", "reading waited", "a faster disk");
}

#[test]
fn a_lock_that_somebody_holds_is_named() {
    let place = Place::new();
    let storage: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(&place.repository).expect("opened"));
    let vm = VmId::new(VM).expect("a uuid");
    let lock = VmLock::take(storage, &vm, Duration::ZERO, |_| true).expect("nobody has it");
    let holder = std::thread::spawn(move || {
        std::thread::sleep(HELD);
        drop(lock);
    });
    let told = place.ingest(&place.repository, 0);
    holder.join().expect("it only waits");
    named(&told, Stage::Lock, "repository", " of ", "at other times");
}

#[test]
fn the_slow_phase_of_a_merge_is_named() {
    side_by_side(
        [
            ("*/blocks/* ops=rename", LONG / 2, Stage::Move),
            ("*/blocks/* ops=fsync,fsyncdir", LONG / 4, Stage::Sync),
            ("*/data/* ops=unlink", LONG / 4, Stage::Delete),
            ("*/bat ops=open", LONG / 4, Stage::Read),
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

/// 16 blocks, each of which is not as the others.
struct Image;

impl disk::Disk for Image {
    fn size(&self) -> u64 {
        32 * MIB
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        buffer.fill(u8::try_from(1 + offset / (2 * MIB)).expect("16 blocks"));
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

/// Stores a disk in a repository in memory, while a stage is slow; checks that it is named, and returns the repository.
fn stored(disk: Arc<dyn disk::Disk>, filter: Filter, slow: Option<Stage>) -> Arc<Repository> {
    let storage: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    storage.create_directory(&ObjectPath::new("xo-vm-backups").expect("a name")).expect("it is empty");
    let open = || Repository::with_storage(storage.clone().reader(), OpenOptions::default()).expect("a repository");
    let (name, repository) = ("memory".to_owned(), open());
    let destination = RepositoryDestination { name, repository, storage: storage.clone(), quota: None };
    let wanted = Wanted {
        vm: VM.to_owned(),
        name: Some("web01".to_owned()),
        disks: vec![("xvda".to_owned(), Source::Disk(disk))],
        layout: Some(Layout::Exploded(Some(filter))),
        ..Wanted::default()
    };
    // What is planned is so once; of pieces there are 16, for several threads.
    let transfer = slow.map_or_else(Transfer::default, |stage| {
        Transfer::slowed(stage, if stage == Stage::Plan { LONG } else { LONG / 4 })
    });
    let watch = Watch::new(|_| ()).counted_by(transfer);
    let report = ingest::run(&wanted, &[Destination::Repository(destination)], &watch).expect("there is memory");
    if let Some(stage) = slow {
        let bottleneck = report.transfer.bottleneck();
        let named = bottleneck.stage.as_ref().map(|(stage, of)| (*stage, of.kind));
        assert_eq!(named, Some((stage, Kind::Machine)), "{bottleneck:#?}\n{:#?}", report.transfer);
        assert!(bottleneck.advice.is_some() != (stage == Stage::Plan), "{bottleneck:#?}");
    }
    open()
}

#[test]
fn what_a_slow_processor_does_is_named() {
    side_by_side([Stage::Plan, Stage::Compare, Stage::Hash, Stage::Encode], |stage| {
        stored(Arc::new(Image), Filter::None, Some(stage));
    });
}

#[test]
fn slow_decoding_is_named() {
    side_by_side([Filter::Gzip, Filter::Brotli], |filter| {
        let repository = stored(Arc::new(Image), filter, None);
        let backups = repository.backups(&VmId::new(VM).expect("a uuid")).expect("listed");
        let disk = repository.open_disk(&backups[0], &backups[0].disks[0]).expect("opened");
        stored(disk, Filter::None, Some(Stage::Decode));
    });
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
