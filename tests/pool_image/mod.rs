//! A pool in memory, as an ingest sees it: disks of snapshots that come in one way or another, and what becomes of them in repositories
//! in memory. What it was asked for can be looked at afterwards.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::io::Read;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use disk::{Disk, Extent};
use jiff::Timestamp;
use serde_json::{Value, json};
use storage::{MemoryStorage, ObjectPath, WritableStorage};
use uuid::Uuid;
use vhd::Filter;
use xofs::ingest::{
    self, Access, Blocks, Destination, Error, ErrorKind, Export, Layout, Opened, Origin, Pass, PieceSet, PoolDisk,
    PoolRecords, PoolVdi, PoolVm, Report, RepositoryDestination, Source, Wanted, Watch,
};
use xofs::probe;
use xofs::repository::{self, Document, OpenOptions, Repository};
pub const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
pub const BLOCK: usize = 2 << 20;
pub const PIECE: usize = 64 << 10;
/// Bytes that may be read besides what changed: a piece of eight blocks.
pub const SPOTS: usize = 8 * PIECE;
pub const EXPLODED: Layout = Layout::Exploded(Some(Filter::None));
pub const FIRST: i64 = 1_785_549_600;

/// How a disk comes.
#[derive(Clone)]
pub enum Way {
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
pub struct Seen {
    pub opened: Vec<Option<Uuid>>,
    pub reads: Vec<Range<usize>>,
}

/// The state of a disk at a snapshot.
pub struct PoolImage {
    pub bytes: Vec<u8>,
    /// The snapshots before it.
    pub older: Vec<(Uuid, Vec<u8>)>,
    pub way: Way,
    pub seen: Arc<Mutex<Seen>>,
}

pub struct Bytes(Vec<u8>, Arc<Mutex<Seen>>);

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
pub struct InOrder {
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
pub fn differing(old: &[u8], new: &[u8], size: usize) -> Vec<usize> {
    let is_same = |at: usize| {
        let end = (at + size).min(new.len());
        old.get(at..end).is_some_and(|old| *old == new[at..end])
    };
    (0..new.len().div_ceil(size)).filter(|piece| !is_same(piece * size)).collect()
}

impl PoolImage {
    pub fn in_order(
        &self,
        listed: Vec<usize>,
        breaks: Option<(usize, ErrorKind)>,
        unproven: Option<ErrorKind>,
    ) -> InOrder {
        let listed: Vec<u32> = listed.into_iter().map(|block| u32::try_from(block).unwrap()).collect();
        let left = listed.clone().into_iter();
        InOrder { bytes: self.bytes.clone(), listed, left, breaks, unproven, seen: self.seen.clone() }
    }
}

impl PoolDisk for PoolImage {
    fn source(&self) -> probe::Subject {
        probe::Subject::new(probe::Kind::Host, "a host")
    }

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
        Ok(Opened { way: "a way".to_owned(), by: probe::Way::Only, access })
    }
}

/// A disk of a VM, and its snapshots.
pub struct Live {
    pub vdi: Uuid,
    pub snapshots: Vec<(Uuid, Vec<u8>)>,
}

impl Live {
    pub fn new(number: u128) -> Self {
        Self { vdi: Uuid::from_u128(0x4000_8000_0000_0000_0000 + number), snapshots: Vec::new() }
    }

    /// Takes a snapshot.
    pub fn snapshot(&mut self, bytes: &[u8], way: Way) -> (PoolImage, PoolVdi) {
        let uuid = Uuid::from_u128(self.vdi.as_u128() + (self.snapshots.len() as u128 + 1) * 0x1_0000);
        let image = PoolImage { bytes: bytes.to_vec(), older: self.snapshots.clone(), way, seen: Arc::default() };
        self.snapshots.push((uuid, bytes.to_vec()));
        let record = json!({ "uuid": uuid, "type": "user", "virtual_size": bytes.len(), "other_config": {} });
        let reference = format!("OpaqueRef:{uuid}");
        let vdi = PoolVdi { reference, record: document(&record), uuid, snapshot_of: Some(self.vdi), sr: Uuid::nil() };
        (image, vdi)
    }
}

pub fn document(value: &Value) -> Document {
    serde_json::from_str(&value.to_string()).unwrap()
}

pub fn subject(layout: Layout) -> Wanted {
    Wanted { vm: VM.to_owned(), name: Some("web01".to_owned()), layout: Some(layout), ..Wanted::default() }
}

pub fn records(vdis: Vec<PoolVdi>, names: &[&str]) -> PoolRecords {
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
pub fn wanted(layout: Layout, number: i64, disks: Vec<(&str, PoolImage, PoolVdi)>) -> (Wanted, Vec<Arc<Mutex<Seen>>>) {
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

pub fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

pub fn memory() -> Arc<dyn WritableStorage> {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    memory
}

pub fn open(storage: &Arc<dyn WritableStorage>) -> Arc<Repository> {
    Repository::with_storage(storage.clone().reader(), OpenOptions { key: None, cache_bytes: 8 << 20 }).unwrap()
}

pub fn to(storages: &[&Arc<dyn WritableStorage>]) -> Vec<Destination> {
    let named = |(number, storage): (usize, &&Arc<dyn WritableStorage>)| {
        Destination::Repository(RepositoryDestination {
            name: format!("r{number}"),
            repository: open(storage),
            storage: (*storage).clone(),
            quota: None,
        })
    };
    storages.iter().enumerate().map(named).collect()
}

pub fn run(wanted: &Wanted, storages: &[&Arc<dyn WritableStorage>]) -> ingest::Result<Report> {
    ingest::run(wanted, &to(storages), &Watch::new(|_| ()))
}

/// Stores one disk.
pub fn store(
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
pub fn read_all(storage: &Arc<dyn WritableStorage>) -> Vec<Vec<(String, Vec<u8>)>> {
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
pub fn read_only(storage: &Arc<dyn WritableStorage>) -> Vec<Vec<u8>> {
    read_all(storage).into_iter().map(|disks| disks.into_iter().next().unwrap().1).collect()
}

/// A disk of five blocks and a part of one.
pub fn image() -> Vec<u8> {
    let mut image = vec![0; 5 * BLOCK + 100 * 512];
    for (block, bytes) in image.chunks_mut(BLOCK).enumerate().filter(|(block, _)| block % 4 != 3) {
        bytes.iter_mut().zip(0_u32..).for_each(|(byte, at)| *byte = (at / 997).to_le_bytes()[0] | 1);
        bytes[0] = u8::try_from(block).unwrap();
    }
    image
}

/// It, after some time: pieces changed, a block became zero, another came, and the last one changed.
pub fn later(image: &[u8]) -> Vec<u8> {
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

pub fn pass(report: &Report) -> &Pass {
    let [pass] = report.disks[0].passes.as_slice() else { panic!("{:?}", report.disks) };
    pass
}

pub fn is_key(report: &Report, repository: usize) -> bool {
    report.outcomes[repository].stored.as_ref().unwrap().disks[0].is_key
}

/// The runs of pieces that differ, each within a block.
pub fn runs(old: &[u8], new: &[u8]) -> Vec<Range<usize>> {
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

pub fn sum(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(Range::len).sum()
}

/// A VM whose XVA has these bytes, which come in odd pieces.
pub struct Exported {
    pub bytes: Vec<u8>,
    pub expected: u64,
    pub fails: bool,
}

pub struct Stream {
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

pub fn full(bytes: &[u8], number: i64, fails: bool) -> Wanted {
    let vm = Exported { bytes: bytes.to_vec(), expected: 2 * bytes.len() as u64, fails };
    let origin = Some(Origin::of_pool_export(records(Vec::new(), &[]), Box::new(vm)));
    let time = Some(Timestamp::from_second(FIRST + number).unwrap());
    Wanted { vm: VM.to_owned(), name: Some("web01".to_owned()), origin, time, ..Wanted::default() }
}
