//! Replicas beside repositories: both get the same of one reading, whatever fails, and a replica that lives holds what the disk did.
//!
//! The replica here is a folder: each disk comes as a real VHD file, which is then applied to a raw image, as a pool does with what is
//! imported.

mod pool_image;
#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use disk::{Disk, Extent};
use jiff::Timestamp;
use pool_image::{
    BLOCK, EXPLODED, FIRST, Live, PIECE, Seen, Way, differing, full, image, later, memory, read_only, records, runs,
    subject, sum, to, wanted,
};
use storage::WritableStorage;
use support::scratch;
use tempfile::TempDir;
use uuid::Uuid;
use vhd::{BlockIndex, FileLayout, StreamWriter};
use xofs::ingest::{
    self, Access, Destination, Error, ErrorKind, Extent as Stored, Opened, Origin, Place, PoolDisk, Replica,
    ReplicaArchive, ReplicaBase, ReplicaBlock, ReplicaDisk, ReplicaSink, Report, Source, Wanted, Watch,
};
use xofs::probe::{self, Subject};
use xofs::repository::BackupTime;

/// How long a run may take that does not hang.
const PATIENCE: Duration = Duration::from_secs(180);
/// Blocks that are read ahead of the slowest replica, at most.
const WINDOW: usize = 32;

/// What a replica does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    BaseOf,
    Open,
    /// When that many blocks or pieces came.
    Write(usize),
    Finish,
    Commit,
}

/// What was asked of a replica.
#[derive(Debug, Default)]
struct Asked {
    /// The bases and blocks of the disks that were begun.
    opened: Vec<(Option<Uuid>, Vec<u32>)>,
    commits: usize,
    undone: usize,
    /// Sinks that are open.
    open: usize,
    /// Bytes of an archive that came.
    archived: usize,
}

/// The newest state of disks, and what is to become it.
#[derive(Default)]
struct State {
    bases: BTreeMap<Uuid, ReplicaBase>,
    next: BTreeMap<Uuid, ReplicaBase>,
    asked: Asked,
}

/// A replica in a folder.
struct Folder {
    name: String,
    folder: TempDir,
    fault: Fault,
    state: Arc<Mutex<State>>,
    /// Told of each block.
    written: Arc<dyn Fn(usize) + Send + Sync>,
}

fn failed(what: &str) -> Error {
    Error::new(ErrorKind::Source, format!("the replica fails: {what}"))
}

fn of_io(error: std::io::Error) -> Error {
    failed(&error.to_string())
}

impl Folder {
    fn new(name: &str, fault: Fault) -> Self {
        let folder = tempfile::tempdir_in(scratch()).unwrap();
        Self { name: name.to_owned(), folder, fault, state: Arc::default(), written: Arc::new(|_| ()) }
    }

    fn fail_if(&self, fault: Fault) -> ingest::Result<()> {
        if self.fault == fault { Err(failed(&format!("{fault:?}"))) } else { Ok(()) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What it holds of a disk.
    fn holds(&self, vdi: Uuid) -> Vec<u8> {
        fs::read(self.path(&format!("{vdi}.raw"))).unwrap()
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The files that are not those of the newest state.
    fn left(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path()).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".new")).collect()
    }
}

struct Sink {
    vhd: StreamWriter<BufWriter<File>>,
    place: PathBuf,
    image: PathBuf,
    count: usize,
    fault: Fault,
    state: Arc<Mutex<State>>,
    written: Arc<dyn Fn(usize) + Send + Sync>,
    _open: Open,
}

/// Counts what is open.
struct Open(Arc<Mutex<State>>);

impl Open {
    fn new(state: &Arc<Mutex<State>>) -> Self {
        state.lock().unwrap().asked.open += 1;
        Self(state.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.lock().unwrap().asked.open -= 1;
    }
}

impl Replica for Folder {
    fn name(&self) -> &str {
        &self.name
    }

    fn base_of(&self, vdi: Uuid, _: u64) -> ingest::Result<Result<ReplicaBase, String>> {
        self.fail_if(Fault::BaseOf)?;
        Ok(self.asked().bases.get(&vdi).copied().ok_or_else(|| "it has none".to_owned()))
    }

    fn open(&self, disk: &ReplicaDisk) -> ingest::Result<Box<dyn ReplicaSink>> {
        self.fail_if(Fault::Open)?;
        self.asked().asked.opened.push((disk.base, disk.blocks.to_vec()));
        let raw = self.path(&format!("{}.raw", disk.vdi));
        let image = self.path(&format!("{}.raw.new", disk.vdi));
        match disk.base {
            Some(base) => {
                assert_eq!(self.asked().bases[&disk.vdi].snapshot, base);
                fs::copy(raw, &image).unwrap();
            }
            None => drop(File::create(&image).unwrap()),
        }
        File::options().write(true).open(&image).unwrap().set_len(disk.size).unwrap();
        let layout = FileLayout::new(disk.size, disk.blocks.to_vec(), disk.base, disk.snapshot, 0).unwrap();
        let place = self.path(&format!("{}.vhd.new", disk.vdi));
        let output = BufWriter::new(File::create(&place).unwrap());
        self.asked().next.insert(disk.vdi, ReplicaBase { snapshot: disk.snapshot, size: disk.size });
        Ok(Box::new(Sink {
            vhd: StreamWriter::begin(Arc::new(layout), output).map_err(of_io)?,
            place,
            image,
            count: 0,
            fault: self.fault,
            state: self.state.clone(),
            written: self.written.clone(),
            _open: Open::new(&self.state),
        }))
    }

    fn open_archive(&self, _: Option<u64>) -> ingest::Result<Box<dyn ReplicaArchive>> {
        self.fail_if(Fault::Open)?;
        let file = File::create(self.path("archive.new")).unwrap();
        let (fault, state) = (self.fault, self.state.clone());
        Ok(Box::new(Archive { file, count: 0, fault, state, _open: Open::new(&self.state) }))
    }

    fn commit(&self, time: BackupTime) -> ingest::Result<String> {
        self.fail_if(Fault::Commit)?;
        let mut state = self.asked();
        assert_eq!(state.asked.open, 0);
        state.asked.commits += 1;
        for name in self.left() {
            fs::rename(self.path(&name), self.path(name.strip_suffix(".new").unwrap())).unwrap();
        }
        let next = std::mem::take(&mut state.next);
        state.bases.extend(next);
        Ok(format!("replica of {time}"))
    }

    fn undo(&self) -> ingest::Result<()> {
        let mut state = self.asked();
        assert_eq!(state.asked.open, 0, "what is open ends first");
        state.asked.undone += 1;
        state.next.clear();
        self.left().iter().for_each(|name| fs::remove_file(self.path(name)).unwrap());
        Ok(())
    }
}

impl ReplicaSink for Sink {
    fn write(&mut self, block: &ReplicaBlock) -> ingest::Result<()> {
        if self.fault == Fault::Write(self.count) {
            return Err(failed("a block"));
        }
        self.count += 1;
        self.vhd.write(BlockIndex(block.index), block.data, block.changed).map_err(of_io)?;
        (self.written)(self.count);
        Ok(())
    }

    fn finish(self: Box<Self>) -> ingest::Result<String> {
        if self.fault == Fault::Finish {
            return Err(failed("the end"));
        }
        assert!(self.state.lock().unwrap().asked.open > 0);
        self.vhd.finish().map_err(of_io)?.into_inner().map_err(|error| of_io(error.into_error()))?;
        apply(&fs::read(&self.place).unwrap(), &self.image);
        Ok(self.image.display().to_string())
    }
}

struct Archive {
    file: File,
    count: usize,
    fault: Fault,
    state: Arc<Mutex<State>>,
    _open: Open,
}

impl ReplicaArchive for Archive {
    fn append(&mut self, bytes: &[u8]) -> ingest::Result<()> {
        if self.fault == Fault::Write(self.count) {
            return Err(failed("a piece"));
        }
        self.count += 1;
        self.state.lock().unwrap().asked.archived += bytes.len();
        self.file.write_all(bytes).map_err(of_io)
    }

    fn finish(self: Box<Self>) -> ingest::Result<String> {
        if self.fault == Fault::Finish { Err(failed("the end")) } else { Ok("the archive".to_owned()) }
    }
}

/// Writes into a raw image what a VHD has, as a pool does: each sector whose bit is set, wherever the table says that it is.
fn apply(vhd: &[u8], image: &Path) {
    use std::os::unix::fs::FileExt;
    let number = |at: usize| usize::try_from(u32::from_be_bytes(vhd[at..at + 4].try_into().unwrap())).unwrap();
    assert_eq!((&vhd[..8], &vhd[512..520]), (&b"conectix"[..], &b"cxsparse"[..]));
    assert_eq!(vhd[..512], vhd[vhd.len() - 512..]);
    let (table, entries) = (number(512 + 20), number(512 + 28));
    let raw = File::options().write(true).open(image).unwrap();
    let size = raw.metadata().unwrap().len();
    for block in 0..entries {
        let sector = number(table + 4 * block);
        if sector == 0xffff_ffff {
            continue;
        }
        for index in 0..BLOCK / 512 {
            let (from, to) = (sector * 512 + 512 + index * 512, (block * BLOCK + index * 512) as u64);
            if vhd[sector * 512 + index / 8] & 0x80 >> (index % 8) != 0 && to < size {
                raw.write_all_at(&vhd[from..from + 512], to).unwrap();
            }
        }
    }
}

/// Does what ends soon, or panics.
fn soon<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = mpsc::channel();
    let thread = thread::spawn(move || done.send(act()).unwrap());
    let result = is_done.recv_timeout(PATIENCE);
    if let Err(mpsc::RecvTimeoutError::Timeout) = result {
        panic!("it hangs");
    }
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    result.unwrap()
}

fn destinations<'a>(
    storages: &[&Arc<dyn WritableStorage>],
    replicas: impl IntoIterator<Item = &'a Arc<Folder>>,
) -> Vec<Destination> {
    let mut all = to(storages);
    all.extend(replicas.into_iter().map(|replica| Destination::Replica(replica.clone())));
    all
}

/// Stores the next state of a disk.
fn store<'a>(
    live: &mut Live,
    bytes: &[u8],
    way: Way,
    storages: &[&Arc<dyn WritableStorage>],
    replicas: impl IntoIterator<Item = &'a Arc<Folder>>,
) -> (ingest::Result<Report>, Arc<Mutex<Seen>>) {
    let number = i64::try_from(live.snapshots.len()).unwrap();
    let (image, vdi) = live.snapshot(bytes, way);
    let (wanted, seen) = wanted(EXPLODED, number, vec![("xvda", image, vdi)]);
    let all = destinations(storages, replicas);
    (soon(move || ingest::run(&wanted, &all, &Watch::new(|_| ()))), seen[0].clone())
}

/// What became of the destination of that number.
fn outcome(report: &Report, number: usize) -> &ingest::Stored {
    report.outcomes[number].stored.as_ref().unwrap_or_else(|error| panic!("{number}: {error}"))
}

/// It, once more: a piece of each block but the last changed.
fn still_later(image: &[u8]) -> Vec<u8> {
    let mut later = image.to_vec();
    (0..5).for_each(|block| later[block * BLOCK + 3 * PIECE + 9] ^= 0x40);
    later
}

#[test]
fn repositories_and_replicas_get_the_same_of_one_reading() {
    let states = [image(), later(&image()), still_later(&later(&image()))];
    for (way, is_relative) in [(Way::Changes, true), (Way::Delta, true), (Way::Anywhere, false), (Way::Whole, false)] {
        let (storages, mut live) = ([memory(), memory()], Live::new(1));
        let replicas = ["first", "second"].map(|name| Arc::new(Folder::new(name, Fault::None)));
        for (number, state) in states.iter().enumerate() {
            let base = number.checked_sub(1).map(|number| live.snapshots[number].0);
            let (report, seen) = store(&mut live, state, way.clone(), &[&storages[0], &storages[1]], &replicas);
            let report = report.unwrap();
            assert!(sum(&seen.lock().unwrap().reads) <= state.len().next_multiple_of(BLOCK), "each byte is read once");
            for (place, replica) in replicas.iter().enumerate() {
                assert!(replica.holds(live.vdi) == *state, "{number}");
                let stored = outcome(&report, 2 + place);
                assert!(matches!(&stored.place, Place::Replica(name) if name.starts_with("replica of 2026-")));
                let is_whole = number == 0 || !is_relative;
                assert_eq!((stored.disks[0].is_key, stored.disks[0].format), (is_whole, "replica"));
                assert_eq!(stored.disks[0].why_full.is_some(), is_whole);
                let asked = &replica.asked().asked;
                let (relative_to, blocks) = asked.opened.last().unwrap();
                assert_eq!((*relative_to, asked.commits, asked.undone), (base.filter(|_| !is_whole), number + 1, 0));
                assert_eq!(stored.disks[0].blocks as usize, blocks.len());
                if !is_whole {
                    let changed: Vec<u32> = differing(&states[number - 1], state, BLOCK)
                        .into_iter()
                        .map(|block| u32::try_from(block).unwrap())
                        .collect();
                    assert_eq!(*blocks, changed);
                }
            }
        }
        assert!(storages.iter().all(|storage| read_only(storage) == states));
    }
}

#[test]
fn qemu_img_reads_what_a_replica_was_sent_as_the_disk() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return;
    }
    let (mut live, replica) = (Live::new(1), Arc::new(Folder::new("replica", Fault::None)));
    store(&mut live, &image(), Way::Whole, &[], [&replica]).0.unwrap();
    let (raw, vhd) = (replica.path("disk.raw"), replica.path(&format!("{}.vhd", live.vdi)));
    fs::write(&raw, image()).unwrap();
    let compared =
        Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "vpc"]).args([raw, vhd]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&compared.stdout), "Images are identical.\n", "{compared:?}");
}

#[test]
fn without_a_repository_only_the_pieces_that_changed_are_read_and_sent() {
    let states = [image()[..4 * BLOCK + 512].to_vec(), image(), later(&image())];
    let (mut live, replica) = (Live::new(1), Arc::new(Folder::new("replica", Fault::None)));
    for (number, state) in states.iter().enumerate() {
        let (report, seen) = store(&mut live, state, Way::Changes, &[], [&replica]);
        let report = report.unwrap();
        assert!(replica.holds(live.vdi) == *state, "{number}");
        let mut reads = seen.lock().unwrap().reads.clone();
        reads.sort_by_key(|read| read.start);
        assert_eq!(outcome(&report, 0).disks[0].stored_bytes, sum(&reads) as u64);
        if let Some(old) = number.checked_sub(1).map(|number| &states[number]) {
            assert_eq!(replica.asked().asked.opened[number].0, Some(live.snapshots[number - 1].0));
            let expected: usize = sum(&runs(old, state));
            // The piece that the disk ended in comes whole.
            assert!((expected..expected + 2 * PIECE).contains(&sum(&reads)), "{} {expected}", sum(&reads));
        }
    }
}

#[test]
fn a_difference_that_breaks_midway_is_followed_by_the_whole_disk_for_replicas_too() {
    for breaks_after in 0..4 {
        let (storage, mut live) = (memory(), Live::new(1));
        let replica = Arc::new(Folder::new("replica", Fault::None));
        store(&mut live, &image(), Way::Delta, &[&storage], [&replica]).0.unwrap();
        let way = Way::Breaks(breaks_after, ErrorKind::Difference);
        let (report, _) = store(&mut live, &later(&image()), way, &[&storage], [&replica]);
        let report = report.unwrap();
        assert_eq!(report.disks[0].passes.len(), 2);
        assert!(!outcome(&report, 0).disks[0].is_key && outcome(&report, 1).disks[0].is_key);
        let bases: Vec<bool> = replica.asked().asked.opened.iter().map(|(base, _)| base.is_some()).collect();
        assert_eq!(bases, [false, true, false]);
        assert!(replica.holds(live.vdi) == later(&image()) && read_only(&storage)[1] == later(&image()));
        assert!(replica.left().is_empty());
    }
}

#[test]
fn bases_that_differ_are_told_and_everything_is_read_as_a_whole() {
    let (storage, mut live) = (memory(), Live::new(1));
    let [old, new] = ["old", "new"].map(|name| Arc::new(Folder::new(name, Fault::None)));
    store(&mut live, &image(), Way::Delta, &[&storage], [&old]).0.unwrap();
    let wanted = subject(EXPLODED);
    let (all, watch) = (destinations(&[&storage], [&old, &new]), Watch::new(|_| ()));
    let mut begun = ingest::begin(&wanted, &all, &watch).unwrap();
    let bases = begun.bases(&wanted, &[(live.vdi, image().len() as u64)]);
    let first = live.snapshots[0].0;
    let names: Vec<(&str, Option<Uuid>)> =
        bases[0].destinations.iter().map(|(name, base)| (name.as_str(), base.clone().ok())).collect();
    assert_eq!(names, [("r0", Some(first)), ("old", Some(first)), ("new", None)]);
    assert_eq!(bases[0].agreed(&[]), None);
    drop(begun);
    let (report, _) = store(&mut live, &later(&image()), Way::Delta, &[&storage], [&old, &new]);
    let report = report.unwrap();
    let are_keys = [0, 1, 2].map(|number| outcome(&report, number).disks[0].is_key);
    assert_eq!((are_keys, report.disks[0].passes[0].base), ([false, true, true], None));
    assert!([old, new].iter().all(|replica| replica.holds(live.vdi) == later(&image())));
}

#[test]
fn a_replica_that_fails_anywhere_is_undone_and_the_others_go_on() {
    let faults = [Fault::BaseOf, Fault::Open, Fault::Finish, Fault::Commit].into_iter();
    for fault in faults.chain((0..5).map(Fault::Write)) {
        for is_alone in [false, true] {
            let (storage, mut live) = (memory(), Live::new(1));
            let [good, bad] =
                [("good", Fault::None), ("bad", fault)].map(|(name, fault)| Arc::new(Folder::new(name, fault)));
            let (storages, replicas) = match is_alone {
                true => (vec![], vec![bad.clone()]),
                false => (vec![&storage], vec![bad.clone(), good.clone()]),
            };
            let (report, _) = store(&mut live, &image(), Way::Changes, &storages, &replicas);
            match report {
                Err(error) => assert!(is_alone && error.to_string().contains("the replica fails"), "{error}"),
                Ok(report) => {
                    let error = report.outcomes[1].stored.as_ref().unwrap_err();
                    assert!(error.to_string().contains("the replica fails"), "{error}");
                    outcome(&report, 2);
                    assert!(read_only(&storage) == [image()] && good.holds(live.vdi) == image(), "{fault:?}");
                }
            }
            let asked = &bad.asked().asked;
            assert_eq!((asked.commits, asked.undone, asked.open), (0, 1, 0), "{fault:?}");
            assert!(bad.left().is_empty(), "{fault:?}");
        }
    }
}

/// A disk of many blocks that is made as it is read, and counts that.
struct Patterned {
    blocks: u64,
    read: Arc<AtomicUsize>,
    /// The blocks that the slowest replica has written.
    written: Arc<AtomicUsize>,
    most_ahead: Arc<AtomicUsize>,
}

impl Disk for Patterned {
    fn size(&self) -> u64 {
        self.blocks * BLOCK as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let block = offset / BLOCK as u64;
        // Some are late, so that others are read before them.
        if block % 7 == 3 {
            thread::sleep(Duration::from_millis(block % 5));
        }
        buffer.fill(u8::try_from(block % 251 + 1).unwrap());
        let read = self.read.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_ahead.fetch_max(read.saturating_sub(self.written.load(Ordering::SeqCst)), Ordering::SeqCst);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

struct Whole(Arc<Patterned>);

impl PoolDisk for Whole {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn source(&self) -> Subject {
        Subject::machine()
    }

    fn open(&self, _: Option<Uuid>) -> ingest::Result<Opened> {
        let access = Access::Random { disk: self.0.clone(), changed: None };
        Ok(Opened { way: "as a whole".to_owned(), by: probe::Way::Only, access })
    }
}

/// What is stored of such a disk.
fn patterned(disk: Arc<Patterned>) -> (Wanted, Uuid) {
    let mut live = Live::new(1);
    let (_, vdi) = live.snapshot(&[], Way::Whole);
    let disks = vec![("xvda".to_owned(), Source::Pool(Arc::new(Whole(disk)) as Arc<dyn PoolDisk>))];
    let origin = Some(Origin::of_pool(records(vec![vdi], &["xvda"])));
    let time = Some(Timestamp::from_second(FIRST).unwrap());
    (Wanted { disks, origin, time, ..subject(EXPLODED) }, live.vdi)
}

#[test]
fn no_more_than_a_window_is_read_ahead_of_the_slowest_replica() {
    const BLOCKS: u64 = 80;
    let [read, written, most_ahead] = [(); 3].map(|()| Arc::new(AtomicUsize::new(0)));
    let disk = Patterned { blocks: BLOCKS, read, written: written.clone(), most_ahead: most_ahead.clone() };
    let (wanted, vdi) = patterned(Arc::new(disk));
    let mut slow = Folder::new("slow", Fault::None);
    slow.written = Arc::new(move |count| {
        thread::sleep(Duration::from_millis(2));
        written.store(count, Ordering::SeqCst);
    });
    let replicas = [Arc::new(Folder::new("fast", Fault::None)), Arc::new(slow)];
    let all = destinations(&[], &replicas);
    soon(move || ingest::run(&wanted, &all, &Watch::new(|_| ())).unwrap());
    let most_ahead = most_ahead.load(Ordering::SeqCst);
    println!("at most {most_ahead} blocks were ahead");
    assert!(most_ahead <= WINDOW, "{most_ahead}");
    for replica in replicas {
        let expected = |(block, bytes): (usize, &[u8])| bytes.iter().all(|byte| usize::from(*byte) == block % 251 + 1);
        assert!(replica.holds(vdi).chunks(BLOCK).enumerate().all(expected));
    }
}

#[test]
fn cancelled_at_any_moment_nothing_is_left_and_the_next_run_succeeds() {
    seeds::each(12, 2, |seed| {
        soon(move || {
            let mut random = seeds::Random::new(seed);
            let (blocks, at) = (20, 1 + random.below(20));
            let disk = || {
                let [read, written, most_ahead] = [(); 3].map(|()| Arc::new(AtomicUsize::new(0)));
                Arc::new(Patterned { blocks, read, written, most_ahead })
            };
            let (storage, watch) = (memory(), Arc::new(Watch::new(|_| ())));
            let mut cancels = Folder::new("cancels", Fault::None);
            let canceller = watch.clone();
            cancels.written = Arc::new(move |count| {
                if count == at {
                    canceller.cancel();
                }
            });
            let replicas = [Arc::new(cancels), Arc::new(Folder::new("other", Fault::None))];
            let storages: Vec<&Arc<dyn WritableStorage>> = if random.below(2) == 0 { vec![] } else { vec![&storage] };
            let (wanted, _) = patterned(disk());
            let error = ingest::run(&wanted, &destinations(&storages, &replicas), &watch).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Interrupted, "{at}: {error}");
            assert!(read_only(&storage).is_empty());
            for replica in &replicas {
                assert!(replica.left().is_empty() && replica.asked().asked.undone == 1);
            }
            // The count of a new run passes that number, too: it is cancelled again, to no effect on a watch of its own.
            let (wanted, vdi) = patterned(disk());
            ingest::run(&wanted, &destinations(&storages, &replicas), &Watch::new(|_| ())).unwrap();
            assert!(replicas[0].holds(vdi) == replicas[1].holds(vdi));
            assert_eq!(read_only(&storage).len(), storages.len());
        });
    });
}

#[test]
fn a_run_that_must_be_an_increment_is_refused_where_a_replica_has_no_base() {
    let (mut live, replica) = (Live::new(1), Arc::new(Folder::new("replica", Fault::None)));
    let (image, vdi) = live.snapshot(&image(), Way::Changes);
    let (mut wanted, _) = wanted(EXPLODED, 0, vec![("xvda", image, vdi)]);
    wanted.extent = Some(Stored::Incremental);
    let error = ingest::run(&wanted, &destinations(&[], [&replica]), &Watch::new(|_| ())).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.to_string().contains("cannot be stored as an increment: it has none"), "{error}");
}

/// The bytes of what is taken for an XVA, of some pieces and a part of one.
fn archive() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..5 * BLOCK + 4096).map(|at| (at / 4096).to_le_bytes()[0] | 1).collect();
    let end = bytes.len();
    bytes[end - 1024..].fill(0);
    bytes
}

#[test]
fn a_full_backup_goes_to_repositories_and_replicas_in_one_pass_whatever_fails() {
    for fault in
        [Fault::None, Fault::Open, Fault::Write(0), Fault::Write(2), Fault::Write(5), Fault::Finish, Fault::Commit]
    {
        let storage = memory();
        let [good, bad] =
            [("good", Fault::None), ("bad", fault)].map(|(name, fault)| Arc::new(Folder::new(name, fault)));
        let all = destinations(&[&storage], [&bad, &good]);
        let report = soon(move || ingest::run(&full(&archive(), 0, false), &all, &Watch::new(|_| ()))).unwrap();
        assert_eq!(report.outcomes[1].stored.is_ok(), fault == Fault::None, "{fault:?}");
        let xva =
            |number: usize| outcome(&report, number).xva.as_ref().map(|xva| (xva.bytes, xva.checksum.to_string()));
        assert_eq!(xva(0), xva(2));
        assert!(fs::read(good.path("archive")).unwrap() == archive());
        assert_eq!(bad.path("archive").exists(), fault == Fault::None);
        assert_eq!((bad.left().len(), bad.asked().asked.open), (0, 0));
    }
}

#[test]
fn a_replica_never_gets_the_last_piece_of_an_export_whose_end_is_not_proven() {
    let replica = Arc::new(Folder::new("replica", Fault::None));
    let all = destinations(&[], [&replica]);
    let error = soon(move || ingest::run(&full(&archive(), 0, true), &all, &Watch::new(|_| ())).map(drop)).unwrap_err();
    assert!(error.to_string().contains("the export failed"), "{error}");
    let asked = &replica.asked().asked;
    assert_eq!((asked.undone, asked.commits, asked.archived), (1, 0, 5 * BLOCK));
}
