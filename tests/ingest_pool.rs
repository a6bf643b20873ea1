//! What a pool gives: exactly what changed is asked for, each disk is read once for all destinations, and whatever the pool or a
//! repository does, a backup reads as the disk was, or there is none.

mod support;

use std::fs;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disk::{Disk, Extent};
use jiff::Timestamp;
use serde_json::{Value, json};
use storage::{
    Checksum, Fault, FaultyStorage, LocalStorage, MemoryStorage, ObjectPath, Operation, Summing, WritableStorage,
};
use support::{files, fixture, scratch};
use uuid::Uuid;
use vhd::Filter;
use xofs::ingest::{
    self, Access, Blocks, Destination, Error, ErrorKind, Export, Extent as Stored, Layout, Opened, Origin, Pass,
    PieceSet, PoolDisk, PoolRecords, PoolVdi, PoolVif, PoolVm, Report, Source, Wanted, Watch,
};
use xofs::repository::{self, Document, Mode, OpenOptions, Repository};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
const BLOCK: usize = 2 << 20;
const PIECE: usize = 64 << 10;
/// Bytes that may be read besides what changed: a piece of eight blocks.
const SPOTS: usize = 8 * PIECE;
const EXPLODED: Layout = Layout::Exploded(Some(Filter::None));
const FIRST: i64 = 1_785_549_600;

/// How a disk comes.
#[derive(Clone)]
enum Way {
    /// At any offset, with the pieces that differ from the base.
    Changes,
    /// The same, but it is said that nothing differs.
    NoChanges,
    /// At any offset.
    Anywhere,
    /// The blocks that differ from the base, in order.
    Delta,
    /// All blocks that are not zero, in order.
    Whole,
    /// A difference ends so after some blocks; what comes as a whole is in order.
    Breaks(usize, ErrorKind),
    /// Its end is not proven, of a difference or whatever comes.
    Unproven(ErrorKind),
    /// A difference, and other blocks are listed than come.
    Lies(fn(&mut Vec<u32>)),
}

/// What a pool did, to be looked at afterwards.
#[derive(Default)]
struct Seen {
    opened: Vec<Option<Uuid>>,
    reads: Vec<Range<usize>>,
}

/// The state of a disk at a snapshot.
struct PoolImage {
    bytes: Vec<u8>,
    /// The snapshots before it.
    older: Vec<(Uuid, Vec<u8>)>,
    way: Way,
    seen: Arc<Mutex<Seen>>,
}

struct Bytes(Vec<u8>, Arc<Mutex<Seen>>);

impl Disk for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let at = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
        self.1.lock().unwrap().reads.push(at..at + buffer.len());
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

/// Blocks in order.
struct InOrder {
    bytes: Vec<u8>,
    listed: Vec<u32>,
    left: std::vec::IntoIter<u32>,
    breaks: Option<(usize, ErrorKind)>,
    unproven: Option<ErrorKind>,
    seen: Arc<Mutex<Seen>>,
}

impl Blocks for InOrder {
    fn listed(&self) -> &[u32] {
        &self.listed
    }

    fn read(&mut self, buffer: &mut [u8]) -> ingest::Result<Option<u32>> {
        if let Some((left, kind)) = &mut self.breaks {
            *left = left.checked_sub(1).ok_or_else(|| Error::new(*kind, "the stream broke"))?;
        }
        let Some(block) = self.left.next() else { return Ok(None) };
        let at = usize::try_from(block).unwrap() * BLOCK;
        let end = (at + BLOCK).min(self.bytes.len());
        // Past the end of the disk is whatever.
        buffer.fill(0xee);
        buffer[..end - at].copy_from_slice(&self.bytes[at..end]);
        self.seen.lock().unwrap().reads.push(at..at + BLOCK);
        Ok(Some(block))
    }

    fn finish(self: Box<Self>) -> ingest::Result<()> {
        self.unproven.map_or(Ok(()), |kind| Err(Error::new(kind, "the task failed")))
    }
}

/// The numbers of the pieces of so many bytes that differ; past the end of the older one all do.
fn differing(old: &[u8], new: &[u8], size: usize) -> Vec<usize> {
    let is_same = |at: usize| {
        let end = (at + size).min(new.len());
        old.get(at..end).is_some_and(|old| *old == new[at..end])
    };
    (0..new.len().div_ceil(size)).filter(|piece| !is_same(piece * size)).collect()
}

impl PoolImage {
    fn in_order(&self, listed: Vec<usize>, breaks: Option<(usize, ErrorKind)>, unproven: Option<ErrorKind>) -> InOrder {
        let listed: Vec<u32> = listed.into_iter().map(|block| u32::try_from(block).unwrap()).collect();
        let left = listed.clone().into_iter();
        InOrder { bytes: self.bytes.clone(), listed, left, breaks, unproven, seen: self.seen.clone() }
    }
}

impl PoolDisk for PoolImage {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn open(&self, base: Option<Uuid>) -> ingest::Result<Opened> {
        self.seen.lock().unwrap().opened.push(base);
        let old = base.filter(|_| !matches!(self.way, Way::Anywhere));
        let old = old.map(|base| &self.older.iter().find(|(uuid, _)| *uuid == base).expect("a snapshot of it").1);
        let disk = || Arc::new(Bytes(self.bytes.clone(), self.seen.clone())) as Arc<dyn Disk>;
        let zero = vec![0; self.bytes.len()];
        let whole = || self.in_order(differing(&zero, &self.bytes, BLOCK), None, None);
        let sequential = |blocks: InOrder, since| Access::Sequential { blocks: Box::new(blocks), since };
        let access = match (&self.way, old) {
            (Way::Changes, Some(old)) => {
                let mut changed = PieceSet::new(self.size()).unwrap();
                for piece in differing(old, &self.bytes, PIECE) {
                    // What the base has not is not told.
                    if piece * PIECE < old.len() {
                        changed.insert((piece * PIECE) as u64, 1);
                    }
                }
                Access::Random { disk: disk(), changed: Some(changed) }
            }
            (Way::NoChanges, Some(_)) => {
                Access::Random { disk: disk(), changed: Some(PieceSet::new(self.size()).unwrap()) }
            }
            (Way::Changes | Way::NoChanges | Way::Anywhere, _) => Access::Random { disk: disk(), changed: None },
            (Way::Unproven(kind), None) if *kind == ErrorKind::Source => {
                sequential(InOrder { unproven: Some(*kind), ..whole() }, None)
            }
            (Way::Whole, _) | (_, None) => sequential(whole(), None),
            (way, Some(old)) => {
                // A block that was never written since the disk grew is not in a difference.
                let blocks = differing(old, &self.bytes, BLOCK).into_iter();
                let is_zero = |block: &usize| self.bytes[block * BLOCK..].iter().take(BLOCK).all(|byte| *byte == 0);
                let blocks = blocks.filter(|block| block * BLOCK < old.len() || !is_zero(block)).collect();
                let mut blocks = self.in_order(blocks, None, None);
                match way {
                    Way::Breaks(after, kind) => blocks.breaks = Some((*after, *kind)),
                    Way::Unproven(kind) => blocks.unproven = Some(*kind),
                    Way::Lies(lie) => lie(&mut blocks.listed),
                    _ => {}
                }
                sequential(blocks, base)
            }
        };
        Ok(Opened { way: "a way".to_owned(), access })
    }
}

/// A disk of a VM, and its snapshots.
struct Live {
    vdi: Uuid,
    snapshots: Vec<(Uuid, Vec<u8>)>,
}

impl Live {
    fn new(number: u128) -> Self {
        Self { vdi: Uuid::from_u128(0x4000_8000_0000_0000_0000 + number), snapshots: Vec::new() }
    }

    /// Takes a snapshot.
    fn snapshot(&mut self, bytes: &[u8], way: Way) -> (PoolImage, PoolVdi) {
        let uuid = Uuid::from_u128(self.vdi.as_u128() + (self.snapshots.len() as u128 + 1) * 0x1_0000);
        let image = PoolImage { bytes: bytes.to_vec(), older: self.snapshots.clone(), way, seen: Arc::default() };
        self.snapshots.push((uuid, bytes.to_vec()));
        let record = json!({ "uuid": uuid, "type": "user", "virtual_size": bytes.len(), "other_config": {} });
        let reference = format!("OpaqueRef:{uuid}");
        let vdi = PoolVdi { reference, record: document(&record), uuid, snapshot_of: Some(self.vdi), sr: Uuid::nil() };
        (image, vdi)
    }
}

fn document(value: &Value) -> Document {
    serde_json::from_str(&value.to_string()).unwrap()
}

fn subject(layout: Layout) -> Wanted {
    Wanted { vm: VM.to_owned(), name: Some("web01".to_owned()), layout: Some(layout), ..Wanted::default() }
}

fn records(vdis: Vec<PoolVdi>, names: &[&str]) -> PoolRecords {
    let vbds = vdis.iter().zip(names).map(|(vdi, name)| {
        let record = json!({ "VDI": vdi.reference, "device": name, "userdevice": "0", "type": "Disk" });
        (format!("OpaqueRef:vbd-{name}"), document(&record))
    });
    PoolRecords {
        vm: document(&json!({ "uuid": VM, "name_label": "web01", "is_a_template": false, "tags": [] })),
        snapshot: document(&json!({ "uuid": Uuid::max(), "suspend_VDI": "OpaqueRef:NULL" })),
        vbds: vbds.collect(),
        vdis,
        ..PoolRecords::default()
    }
}

/// What is stored of disks by name at the backup of that number.
fn wanted(layout: Layout, number: i64, disks: Vec<(&str, PoolImage, PoolVdi)>) -> (Wanted, Vec<Arc<Mutex<Seen>>>) {
    let (mut sources, mut vdis, mut seen, mut names) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (name, image, vdi) in disks {
        seen.push(image.seen.clone());
        sources.push((name.to_owned(), Source::Pool(Arc::new(image))));
        vdis.push(vdi);
        names.push(name);
    }
    let origin = Some(Origin::of_pool(records(vdis, &names)));
    let time = Some(Timestamp::from_second(FIRST + number).unwrap());
    (Wanted { disks: sources, origin, time, ..subject(layout) }, seen)
}

fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

fn memory() -> Arc<dyn WritableStorage> {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    memory
}

fn open(storage: &Arc<dyn WritableStorage>) -> Arc<Repository> {
    Repository::with_storage(storage.clone().reader(), OpenOptions { key: None, cache_bytes: 8 << 20 }).unwrap()
}

fn to(storages: &[&Arc<dyn WritableStorage>]) -> Vec<Destination> {
    let named = |(number, storage): (usize, &&Arc<dyn WritableStorage>)| Destination {
        name: format!("r{number}"),
        repository: open(storage),
        storage: (*storage).clone(),
        quota: None,
    };
    storages.iter().enumerate().map(named).collect()
}

fn run(wanted: &Wanted, storages: &[&Arc<dyn WritableStorage>]) -> ingest::Result<Report> {
    ingest::run(wanted, &to(storages), &Watch::new(|_| ()))
}

/// Stores one disk.
fn store(
    layout: Layout,
    live: &mut Live,
    bytes: &[u8],
    way: Way,
    storages: &[&Arc<dyn WritableStorage>],
) -> (ingest::Result<Report>, Arc<Mutex<Seen>>) {
    let number = i64::try_from(live.snapshots.len()).unwrap();
    let (image, vdi) = live.snapshot(bytes, way);
    let (wanted, seen) = wanted(layout, number, vec![("xvda", image, vdi)]);
    (run(&wanted, storages), seen[0].clone())
}

/// What each backup reads as, oldest first, by the names of the disks.
fn read_all(storage: &Arc<dyn WritableStorage>) -> Vec<Vec<(String, Vec<u8>)>> {
    let repository = open(storage);
    let Some(vm) = repository.vms().unwrap().first().cloned() else { return Vec::new() };
    let read = |backup: &Arc<repository::Backup>| {
        assert_eq!(backup.problem.as_deref(), None, "{}", backup.time);
        let read = |disk: &repository::BackupDisk| {
            let open = repository.open_disk(backup, disk).unwrap();
            let mut bytes = vec![0xee; usize::try_from(open.size()).unwrap()];
            open.read_at(0, &mut bytes).unwrap();
            (disk.name.clone(), bytes)
        };
        backup.disks.iter().map(read).collect()
    };
    repository.backups(&vm.id).unwrap().iter().map(read).collect()
}

/// What the only disk of each backup reads as.
fn read_only(storage: &Arc<dyn WritableStorage>) -> Vec<Vec<u8>> {
    read_all(storage).into_iter().map(|disks| disks.into_iter().next().unwrap().1).collect()
}

/// A disk of five blocks and a part of one.
fn image() -> Vec<u8> {
    let mut image = vec![0; 5 * BLOCK + 100 * 512];
    for (block, bytes) in image.chunks_mut(BLOCK).enumerate().filter(|(block, _)| block % 4 != 3) {
        bytes.iter_mut().zip(0_u32..).for_each(|(byte, at)| *byte = (at / 997).to_le_bytes()[0] | 1);
        bytes[0] = u8::try_from(block).unwrap();
    }
    image
}

/// It, after some time: pieces changed, a block became zero, another came, and the last one changed.
fn later(image: &[u8]) -> Vec<u8> {
    let mut later = image.to_vec();
    later[5 * PIECE + 7] ^= 1;
    later[6 * PIECE..8 * PIECE].fill(0x33);
    later[31 * PIECE] ^= 1;
    later[2 * BLOCK..3 * BLOCK].fill(0);
    later[3 * BLOCK + 9 * PIECE] = 1;
    let end = later.len();
    later[end - 1] ^= 1;
    later
}

fn pass(report: &Report) -> &Pass {
    let [pass] = report.disks[0].passes.as_slice() else { panic!("{:?}", report.disks) };
    pass
}

fn is_key(report: &Report, repository: usize) -> bool {
    report.outcomes[repository].stored.as_ref().unwrap().disks[0].is_key
}

/// The runs of pieces that differ, each within a block.
fn runs(old: &[u8], new: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for piece in differing(old, new, PIECE) {
        let range = piece * PIECE..(piece * PIECE + PIECE).min(new.len());
        match runs.last_mut().filter(|last| last.end == range.start && range.start % BLOCK != 0) {
            Some(last) => last.end = range.end,
            None => runs.push(range),
        }
    }
    runs
}

fn sum(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(Range::len).sum()
}

#[test]
fn of_an_increment_only_the_runs_that_changed_are_read_and_a_few_pieces_that_did_not() {
    for layout in [EXPLODED, Layout::File] {
        let (storage, mut live) = (memory(), Live::new(1));
        let states = [image(), later(&image()), later(&later(&image())), later(&image())];
        for (number, state) in states.iter().enumerate() {
            let (report, seen) = store(layout, &mut live, state, Way::Changes, &[&storage]);
            let (report, mut seen) = (report.unwrap(), std::mem::take(&mut *seen.lock().unwrap()));
            assert_eq!(is_key(&report, 0), number == 0);
            assert_eq!(pass(&report).bytes, sum(&seen.reads) as u64);
            let Some(old) = number.checked_sub(1).map(|number| &states[number]) else {
                assert_eq!((seen.opened, sum(&seen.reads)), (vec![None], state.len()));
                continue;
            };
            let base = live.snapshots[number - 1].0;
            assert_eq!((&seen.opened, pass(&report).base), (&vec![Some(base)], Some(base)));
            let changed = runs(old, state);
            for run in &changed {
                let found = seen.reads.iter().position(|read| read == run);
                seen.reads.swap_remove(found.unwrap_or_else(|| panic!("{run:?} was not read: {:?}", seen.reads)));
            }
            assert!(seen.reads.iter().all(|read| read.len() == PIECE && sum(&seen.reads) <= SPOTS), "{:?}", seen.reads);
            let touched = |range: &Range<usize>| (range.start / BLOCK * BLOCK..state.len()).len().min(BLOCK);
            let mut blocks: Vec<_> = changed.iter().map(|run| (run.start / BLOCK, touched(run))).collect();
            blocks.dedup();
            let whole: usize = blocks.iter().map(|(_, len)| len).sum();
            assert_eq!(pass(&report).base_bytes, (whole - sum(&changed)) as u64);
            assert_eq!(report.outcomes[0].stored.as_ref().unwrap().disks[0].blocks as usize, blocks.len());
        }
        assert!(read_only(&storage) == states, "{layout:?}");
    }
}

#[test]
fn what_a_disk_grew_by_is_read_whatever_the_changes_say() {
    let old = image()[..4 * BLOCK + 512].to_vec();
    let mut new = image();
    new[0] ^= 1;
    for way in [Way::Changes, Way::Delta] {
        let (storage, mut live) = (memory(), Live::new(1));
        let (first, _) = store(Layout::File, &mut live, &old, way.clone(), &[&storage]);
        first.unwrap();
        let (report, seen) = store(Layout::File, &mut live, &new, way, &[&storage]);
        assert!(!is_key(&report.unwrap(), 0) && seen.lock().unwrap().opened[0].is_some());
        assert!(read_only(&storage) == [old.clone(), new.clone()]);
    }
    // Exploded, it starts anew: and is read as a whole.
    let (storage, mut live) = (memory(), Live::new(1));
    store(EXPLODED, &mut live, &old, Way::Changes, &[&storage]).0.unwrap();
    let destinations = to(&[&storage]);
    let watch = Watch::new(|_| ());
    let mut begun = ingest::begin(&subject(EXPLODED), &destinations, &watch).unwrap();
    let bases = begun.bases(&subject(EXPLODED), &[(live.vdi, new.len() as u64), (live.vdi, old.len() as u64)]);
    assert_eq!((bases[0].agreed(), bases[1].agreed()), (None, Some(live.snapshots[0].0)));
    assert!(bases[0].destinations[0].1.as_ref().unwrap_err().contains("the disk grew"), "{bases:?}");
    drop(begun);
    let (report, seen) = store(EXPLODED, &mut live, &new, Way::Changes, &[&storage]);
    assert!(is_key(&report.unwrap(), 0) && seen.lock().unwrap().opened == [None]);
    assert!(read_only(&storage) == [old, new]);
}

#[test]
fn a_disk_is_known_by_its_vdi_whatever_it_is_called_and_others_come_and_go() {
    let storage = memory();
    let (mut a, mut b, mut c) = (Live::new(1), Live::new(2), Live::new(3));
    let (state, next) = (image(), later(&image()));
    let first = a.snapshot(&state, Way::Changes);
    let second = b.snapshot(&next, Way::Changes);
    let (both, _) = wanted(EXPLODED, 0, vec![("xvda", first.0, first.1), ("xvdb", second.0, second.1)]);
    run(&both, &[&storage]).unwrap();
    let first = b.snapshot(&state, Way::Changes);
    let second = c.snapshot(&state, Way::Changes);
    let (swapped, seen) = wanted(EXPLODED, 1, vec![("xvda", first.0, first.1), ("xvdb", second.0, second.1)]);
    let report = run(&swapped, &[&storage]).unwrap();
    let disks = &report.outcomes[0].stored.as_ref().unwrap().disks;
    assert_eq!((disks[0].is_key, disks[0].vdi, disks[1].is_key, disks[1].vdi), (false, b.vdi, true, c.vdi));
    assert_eq!(seen[0].lock().unwrap().opened, [Some(b.snapshots[0].0)]);
    assert!(sum(&seen[0].lock().unwrap().reads) <= sum(&runs(&next, &state)) + SPOTS);
    assert_eq!(seen[1].lock().unwrap().opened, [None]);
    let named = |disks: [(&str, &Vec<u8>); 2]| disks.map(|(name, bytes)| (name.to_owned(), bytes.clone())).to_vec();
    let expected = [named([("xvda", &state), ("xvdb", &next)]), named([("xvda", &state), ("xvdb", &state)])];
    assert!(read_all(&storage) == expected);
}

#[test]
fn where_the_base_cannot_be_read_the_whole_block_comes_from_the_pool() {
    let (inner, mut live) = (memory(), Live::new(1));
    store(EXPLODED, &mut live, &image(), Way::Changes, &[&inner]).0.unwrap();
    let new = later(&image());
    let faulty = FaultyStorage::new(inner.clone());
    // Block 0 of the base: of the changed ones the first.
    faulty.set_rule(|operation, path| {
        let is_it = path.as_str().ends_with("/20260801T020000Z.vhd/blocks/0/0");
        (is_it && operation == Operation::ReadAt).then_some(Fault::Errno(5))
    });
    let faulty: Arc<dyn WritableStorage> = Arc::new(faulty);
    let (report, seen) = store(EXPLODED, &mut live, &new, Way::Changes, &[&faulty]);
    let report = report.unwrap();
    let reads = seen.lock().unwrap().reads.clone();
    assert!(reads.contains(&(0..BLOCK)), "{reads:?}");
    assert!(!is_key(&report, 0) && report.disks[0].passes.len() == 1);
    assert!(read_only(&inner) == [image(), new]);
}

#[test]
fn where_the_base_has_other_bytes_than_its_digest_says_the_whole_block_comes_from_the_pool() {
    let folder = tempfile::tempdir_in(scratch()).unwrap();
    fs::create_dir(folder.path().join("xo-vm-backups")).unwrap();
    let local: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(folder.path()).unwrap());
    let mut live = Live::new(1);
    store(EXPLODED, &mut live, &image(), Way::Changes, &[&local]).0.unwrap();
    // A byte that did not change, in a block that did, turns in its file.
    let block = files(&*local).into_iter().find(|file| file.ends_with("Z.vhd/blocks/0/0")).unwrap();
    let file = fs::File::options().read(true).write(true).open(folder.path().join(block)).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    let at = file.metadata().unwrap().len() - 2 * PIECE as u64;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    file.set_modified(time).unwrap();
    drop(file);
    let new = later(&image());
    let (report, seen) = store(EXPLODED, &mut live, &new, Way::Changes, &[&local]);
    let reads = seen.lock().unwrap().reads.clone();
    assert!(reads.contains(&(0..BLOCK)), "{reads:?}");
    let others: usize = runs(&image(), &new).iter().filter(|run| run.start >= BLOCK).map(Range::len).sum();
    assert!(sum(&reads) <= BLOCK + others + SPOTS, "{reads:?}");
    assert!(!is_key(&report.unwrap(), 0));
    assert!(read_only(&local)[1] == new);
}

#[test]
fn a_list_of_blocks_is_taken_as_what_differs_or_as_all_that_is_not_zero() {
    for layout in [EXPLODED, Layout::File] {
        for way in [Way::Delta, Way::Whole] {
            let (storage, mut live) = (memory(), Live::new(1));
            let states = [image(), later(&image()), image(), image()];
            for (number, state) in states.iter().enumerate() {
                let (report, seen) = store(layout, &mut live, state, way.clone(), &[&storage]);
                let (report, reads) = (report.unwrap(), seen.lock().unwrap().reads.clone());
                assert_eq!(is_key(&report, 0), number == 0);
                assert_eq!(pass(&report).bytes, sum(&reads) as u64);
                let zero = vec![0; state.len()];
                let old = if number > 0 && matches!(way, Way::Delta) { &states[number - 1] } else { &zero };
                let expected: Vec<_> =
                    differing(old, state, BLOCK).iter().map(|block| block * BLOCK..(block + 1) * BLOCK).collect();
                assert_eq!(reads, expected);
                if number > 0 {
                    let stored = report.outcomes[0].stored.as_ref().unwrap().disks[0].blocks;
                    assert_eq!(stored as usize, differing(&states[number - 1], state, BLOCK).len());
                }
            }
            assert!(read_only(&storage) == states, "{layout:?}");
        }
    }
}

#[test]
fn a_difference_that_cannot_be_had_is_followed_by_the_whole_disk_in_the_same_run_and_an_increment_is_stored() {
    type Lie = fn(&mut Vec<u32>);
    let lies: [Lie; 5] = [
        |listed| listed.truncate(2),
        |listed| listed.push(5),
        |listed| listed.reverse(),
        |listed| listed.push(1 << 20),
        |listed| listed[1] = 1,
    ];
    let mut ways: Vec<Way> = lies.into_iter().map(Way::Lies).collect();
    ways.extend((0..5).map(|after| Way::Breaks(after, ErrorKind::Difference)));
    ways.extend([Way::Unproven(ErrorKind::Difference), Way::NoChanges]);
    for layout in [EXPLODED, Layout::File] {
        for (case, way) in ways.iter().enumerate() {
            let (storage, mut live) = (memory(), Live::new(1));
            store(layout, &mut live, &image(), Way::Whole, &[&storage]).0.unwrap();
            let mut new = later(&image());
            if matches!(way, Way::NoChanges) {
                // Another disk than it is said to be: nearly all differs.
                new.iter_mut().for_each(|byte| *byte ^= 0x40);
            }
            let (report, seen) = store(layout, &mut live, &new, way.clone(), &[&storage]);
            let report = report.unwrap_or_else(|error| panic!("{layout:?}, {case}: {error}"));
            let passes = &report.disks[0].passes;
            assert_eq!(passes.len(), 2, "{layout:?}, {case}: {passes:?}");
            assert!(passes[0].given_up.is_some() && passes[1].given_up.is_none(), "{passes:?}");
            assert_eq!((passes[0].base, passes[1].base), (Some(live.snapshots[0].0), None));
            let seen = seen.lock().unwrap();
            assert_eq!(seen.opened, [passes[0].base, None]);
            assert_eq!(passes[0].bytes + passes[1].bytes, sum(&seen.reads) as u64, "{case}");
            assert!(!is_key(&report, 0));
            let stored = report.outcomes[0].stored.as_ref().unwrap().disks[0].blocks;
            assert_eq!(stored as usize, differing(&image(), &new, BLOCK).len());
            assert!(read_only(&storage) == [image(), new], "{layout:?}, {case}");
        }
    }
}

#[test]
fn a_disk_that_cannot_be_read_in_any_way_leaves_nothing() {
    for layout in [EXPLODED, Layout::File] {
        for way in [Way::Breaks(2, ErrorKind::Source), Way::Unproven(ErrorKind::Source)] {
            let (storage, mut live, mut other) = (memory(), Live::new(1), Live::new(2));
            store(layout, &mut live, &image(), Way::Whole, &[&storage]).0.unwrap();
            let before = files(&*storage);
            // The disk before it was stored already.
            let (first, second) = (other.snapshot(&image(), Way::Whole), live.snapshot(&later(&image()), way));
            let (wanted, _) = wanted(layout, 1, vec![("xvda", first.0, first.1), ("xvdb", second.0, second.1)]);
            let error = run(&wanted, &[&storage]).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Source, "{error}");
            assert_eq!(files(&*storage), before);
            assert!(read_only(&storage) == [image()]);
        }
    }
}

#[test]
fn each_disk_is_read_once_for_all_destinations_relative_to_what_all_of_them_have() {
    let (a, b, c, mut live) = (memory(), memory(), memory(), Live::new(1));
    let states = [image(), later(&image()), later(&later(&image())), image()];
    store(EXPLODED, &mut live, &states[0], Way::Changes, &[&a, &b]).0.unwrap();
    store(EXPLODED, &mut live, &states[1], Way::Changes, &[&a]).0.unwrap();
    // Bases differ, and one has none: all is read, once, and compared with what each has.
    let (report, seen) = store(EXPLODED, &mut live, &states[2], Way::Changes, &[&a, &b, &c]);
    let report = report.unwrap();
    let Seen { opened, reads } = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!((opened, sum(&reads)), (vec![None], states[2].len()));
    assert_eq!([0, 1, 2].map(|number| is_key(&report, number)), [false, false, true]);
    let (report, seen) = store(EXPLODED, &mut live, &states[3], Way::Changes, &[&c, &a, &b]);
    assert_eq!([0, 1, 2].map(|number| is_key(report.as_ref().unwrap(), number)), [false; 3]);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.opened, [Some(live.snapshots[2].0)]);
    assert!(sum(&seen.reads) <= sum(&runs(&states[2], &states[3])) + SPOTS);
    assert!(read_only(&a) == states);
    assert!(read_only(&b) == [states[0].clone(), states[2].clone(), states[3].clone()]);
    assert!(read_only(&c) == states[2..]);
}

#[test]
fn a_destination_that_fails_midway_is_given_up_and_the_pool_is_not_asked_again() {
    for way in [Way::Changes, Way::Delta] {
        let (good, inner, mut live) = (memory(), memory(), Live::new(1));
        store(EXPLODED, &mut live, &image(), Way::Whole, &[&good, &inner]).0.unwrap();
        let before = files(&*inner);
        let bad = FaultyStorage::new(inner.clone());
        bad.set_rule(|operation, path| {
            let is_block = path.as_str().contains("/blocks/") && operation == Operation::Write;
            is_block.then_some(Fault::Error(storage::ErrorKind::NoSpace))
        });
        let bad: Arc<dyn WritableStorage> = Arc::new(bad);
        let new = later(&image());
        let (report, seen) = store(EXPLODED, &mut live, &new, way, &[&bad, &good]);
        let report = report.unwrap();
        assert!(report.outcomes[0].stored.is_err() && report.outcomes[1].stored.is_ok());
        assert_eq!(seen.lock().unwrap().opened.len(), 1);
        assert!(read_only(&good) == [image(), new]);
        assert_eq!(files(&*inner), before);
    }
}

#[test]
fn the_lock_is_held_from_the_beginning_until_it_is_stored_or_dropped() {
    let (storage, other, mut live) = (memory(), memory(), Live::new(1));
    store(EXPLODED, &mut live, &image(), Way::Whole, &[&storage]).0.unwrap();
    let watch = Watch::new(|_| ());
    let destinations = to(&[&storage, &other]);
    let begun = ingest::begin(&subject(EXPLODED), &destinations, &watch);
    let mut begun = begun.unwrap();
    let again = || ingest::begin(&Wanted { patience: Duration::ZERO, ..subject(EXPLODED) }, &destinations[..1], &watch);
    let locked = ErrorKind::Repository(repository::ErrorKind::Locked);
    assert_eq!(again().err().map(|error| error.kind()), Some(locked));
    let bases = begun.bases(&subject(EXPLODED), &[(live.vdi, image().len() as u64)]);
    let [(first, base), (second, none)] = bases[0].destinations.as_slice() else { panic!("{bases:?}") };
    assert_eq!((first.as_str(), base, second.as_str()), ("r0", &Ok(live.snapshots[0].0), "r1"));
    assert!(none.as_ref().unwrap_err().contains("has no backup of this VM yet"), "{none:?}");
    assert_eq!((bases[0].agreed(), begun.failed().count(), begun.vm().as_str()), (None, 0, VM));
    let full = Wanted { extent: Some(Stored::Full), ..subject(EXPLODED) };
    assert!(begun.bases(&full, &[(live.vdi, image().len() as u64)])[0].destinations[0].1.is_err());
    // Only now a snapshot is taken.
    let (taken, vdi) = live.snapshot(&later(&image()), Way::Changes);
    let (wanted, _) = wanted(EXPLODED, 1, vec![("xvda", taken, vdi)]);
    begun.store(&wanted).unwrap();
    assert!(read_only(&storage) == [image(), later(&image())] && read_only(&other) == [later(&image())]);
    drop(again().unwrap());
    drop(again().unwrap());
}

/// A VM whose XVA has these bytes, which come in odd pieces.
struct Exported {
    bytes: Vec<u8>,
    expected: u64,
    fails: bool,
}

struct Stream {
    bytes: Vec<u8>,
    at: usize,
    fails: bool,
}

impl PoolVm for Exported {
    fn expected_size(&self) -> u64 {
        self.expected
    }

    fn open(&self) -> ingest::Result<Box<dyn Export>> {
        Ok(Box::new(Stream { bytes: self.bytes.clone(), at: 0, fails: self.fails }))
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = buffer.len().min(99_991).min(self.bytes.len() - self.at);
        buffer[..len].copy_from_slice(&self.bytes[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

impl Export for Stream {
    fn finish(self: Box<Self>) -> ingest::Result<()> {
        assert_eq!(self.at, self.bytes.len(), "the end is proven when all was read");
        if self.fails { Err(Error::new(ErrorKind::Source, "the export failed")) } else { Ok(()) }
    }
}

fn full(bytes: &[u8], number: i64, fails: bool) -> Wanted {
    let vm = Exported { bytes: bytes.to_vec(), expected: 2 * bytes.len() as u64, fails };
    let origin = Some(Origin::of_pool_export(records(Vec::new(), &[]), Box::new(vm)));
    let time = Some(Timestamp::from_second(FIRST + number).unwrap());
    Wanted { vm: VM.to_owned(), name: Some("web01".to_owned()), origin, time, ..Wanted::default() }
}

fn checksum(bytes: &[u8]) -> Checksum {
    let mut summing = Summing::default();
    summing.add(bytes);
    summing.finish()
}

#[test]
fn an_export_whose_end_is_proven_is_a_full_backup_and_any_other_is_nothing() {
    let (a, b) = (memory(), memory());
    let mut tar = vec![7; 5 * BLOCK + 512];
    tar.extend([0; 1024]);
    let mut gzip = vec![9; 3 * BLOCK];
    gzip[..2].copy_from_slice(&[0x1f, 0x8b]);
    for (number, bytes) in [&tar, &gzip].into_iter().enumerate() {
        let report = run(&full(bytes, i64::try_from(number).unwrap(), false), &[&a, &b]).unwrap();
        assert!(report.disks.is_empty());
        for (outcome, storage) in report.outcomes.iter().zip([&a, &b]) {
            let stored = outcome.stored.as_ref().unwrap();
            let xva = stored.xva.as_ref().unwrap();
            assert_eq!((xva.bytes, xva.checksum), (bytes.len() as u64, checksum(bytes)));
            let file = format!("xo-vm-backups/{VM}/{}", xva.path.strip_prefix("./").unwrap());
            assert!(storage.read(&path(&file), u64::MAX).unwrap() == *bytes);
            let repository = open(storage);
            let vm = repository.vms().unwrap()[0].clone();
            let backup = repository.backups(&vm.id).unwrap().last().cloned().unwrap();
            assert_eq!((backup.mode, backup.size, vm.name.as_str()), (Mode::Full, bytes.len() as u64, "web01"));
        }
    }
    let before = files(&*a);
    let cut = |bytes: &[u8]| bytes[..bytes.len() - 512].to_vec();
    for (bytes, fails) in
        [(tar.clone(), true), (gzip, true), (cut(&tar), false), (Vec::new(), false), (vec![0x1f; 3], false)]
    {
        let error = run(&full(&bytes, 2, fails), &[&a, &b]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Source, "{error}");
        assert_eq!((&files(&*a), &files(&*b)), (&before, &before));
    }
}

/// The records of a pool that Xen Orchestra made this metadata of.
fn records_of(stored: &Document) -> PoolRecords {
    let value = |name: &str| stored.get(name).map_or(Value::Null, |value| serde_json::from_str(value.get()).unwrap());
    let map = |name: &str| -> indexmap::IndexMap<String, Document> {
        stored.get(name).map_or_else(Default::default, |value| serde_json::from_str(value.get()).unwrap())
    };
    let text =
        |record: &Document, field: &str| -> Option<String> { serde_json::from_str(record.get(field)?.get()).unwrap() };
    let uuid = |record: &Document, field: &str| text(record, field).map(|uuid| Uuid::parse_str(&uuid).unwrap());
    let without = |mut record: Document, fields: &[&str]| {
        fields.iter().for_each(|field| drop(record.shift_remove(*field)));
        record
    };
    let vdis = map("vdis").into_iter().map(|(reference, mut record)| {
        let snapshot_of = uuid(&record, "$snapshot_of$uuid");
        if snapshot_of.is_some() {
            let config: Document = serde_json::from_str(record["other_config"].get()).unwrap();
            let config = without(config, &["xo:base_delta_vdi"]);
            record.insert("other_config".to_owned(), serde_json::value::to_raw_value(&config).unwrap());
        }
        let (own, sr) = (uuid(&record, "uuid").unwrap(), uuid(&record, "$SR$uuid").unwrap());
        let record = without(record, &["$snapshot_of$uuid", "$SR$uuid"]);
        PoolVdi { reference, record, uuid: own, snapshot_of, sr }
    });
    let vifs = map("vifs").into_iter().map(|(reference, record)| PoolVif {
        reference,
        network: uuid(&record, "$network$uuid").unwrap(),
        network_name: text(&record, "$network$name_label").unwrap(),
        vlan: record.get("$network$VLAN").map(|vlan| vlan.get().parse().unwrap()),
        record: without(record, &["$network$uuid", "$network$name_label", "$network$VLAN"]),
    });
    PoolRecords {
        vm: document_of(stored, "vm"),
        snapshot: document_of(stored, "vmSnapshot"),
        vdis: vdis.collect(),
        vbds: map("vbds").into_iter().collect(),
        vifs: vifs.collect(),
        vtpms: value("vtpms")
            .as_array()
            .map_or_else(Vec::new, |list| list.iter().map(|contents| contents.as_str().map(str::to_owned)).collect()),
        tags: serde_json::from_value(value("tags")).unwrap(),
    }
}

fn document_of(stored: &Document, field: &str) -> Document {
    serde_json::from_str(stored[field].get()).unwrap()
}

#[test]
fn the_metadata_is_letter_by_letter_what_xen_orchestra_makes_of_the_same_records() {
    let origin =
        Repository::open(&fixture("main").join("repo"), OpenOptions { key: None, cache_bytes: 8 << 20 }).unwrap();
    let mut compared = [0; 2];
    for vm in origin.vms().unwrap().iter() {
        let storage = memory();
        for backup in origin.backups(&vm.id).unwrap().iter() {
            let stored: Document = serde_json::from_slice(&origin.backup_metadata(backup).unwrap()).unwrap();
            let records = records_of(&stored);
            let text = |field: &str| -> String { serde_json::from_str(stored[field].get()).unwrap() };
            let layout = match stored.get("vhds").is_some_and(|vhds| vhds.get().contains(".alias.vhd")) {
                true => EXPLODED,
                false => Layout::File,
            };
            let mut wanted = Wanted {
                vm: vm.id.as_str().to_owned(),
                name: Some(vm.name.clone()),
                job: Some(text("jobId")),
                schedule: Some(text("scheduleId")),
                time: Some(Timestamp::from_millisecond(stored["timestamp"].get().parse().unwrap()).unwrap()),
                ..Wanted::default()
            };
            if backup.mode == Mode::Full {
                let mut bytes = vec![0; 1 << 20];
                bytes[..6].copy_from_slice(b"ova.xm");
                let vm = Exported { bytes, expected: 1 << 20, fails: false };
                wanted.origin = Some(Origin::of_pool_export(records, Box::new(vm)));
            } else {
                // How a disk is stored does not matter, nor what is in it.
                let disk = |vdi: &PoolVdi| {
                    let size = usize::try_from(document_size(&vdi.record)).unwrap();
                    let older = Vec::new();
                    let image = PoolImage { bytes: vec![0; size], older, way: Way::Anywhere, seen: Arc::default() };
                    (vdi.reference.clone(), Source::Pool(Arc::new(image) as Arc<dyn PoolDisk>))
                };
                wanted.disks = records.vdis.iter().map(disk).collect();
                wanted.layout = Some(layout);
                wanted.origin = Some(Origin::of_pool(records));
            }
            run(&wanted, &[&storage]).unwrap();
            let made = storage.read(&path(&backup.metadata.to_string()), u64::MAX).unwrap();
            let made: Document = serde_json::from_slice(&made).unwrap();
            let fields = |document: &Document| document.keys().cloned().collect::<Vec<_>>();
            assert_eq!(fields(&made), fields(&stored), "{}", backup.metadata);
            // A chain that was merged since, or that begins anew where it changes its format, has other bases than at first.
            let bases = |document: &Document| {
                document.get("vdis").map_or(0, |vdis| vdis.get().matches("xo:base_delta_vdi").count())
            };
            let is_same = |field: &str| made.get(field).map(|it| it.get()) == stored.get(field).map(|it| it.get());
            let is_as_then = is_same("isVhdDifferencing") && is_same("vhds") && bases(&made) == bases(&stored);
            let of_chain = |field: &str| ["isVhdDifferencing", "vdis", "vhds"].contains(&field);
            let fields = stored.keys().filter(|field| *field != "size" && (is_as_then || !of_chain(field)));
            for field in fields {
                assert_eq!(made[field].get(), stored[field].get(), "{}: {field}", backup.metadata);
                if field == "vdis" || field == "xva" {
                    compared[usize::from(field == "xva")] += 1;
                }
            }
        }
    }
    println!("{compared:?} documents were the same to the letter");
    assert!(compared[0] >= 15 && compared[1] >= 3, "{compared:?}");
}

fn document_size(record: &Document) -> u64 {
    record["virtual_size"].get().parse().unwrap()
}
