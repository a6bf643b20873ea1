//! What the probes of a transfer cost: the time of one act that is counted, by as many threads as there are cores on one probe,
//! and the part of an ingest that all its acts take together. Prints JSON; run by `benches/probes.py`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use disk::{Disk, Extent};
use serde_json::json;
use storage::{MemoryStorage, ObjectPath, WritableStorage};
use vhd::Filter;
use xofs::ingest::{self, Destination, Layout, RepositoryDestination, Source, Wanted, Watch};
use xofs::probe::{Crew, Probe, Small, Stage, Subject, Transfer, Way};
use xofs::repository::{OpenOptions, Repository};

const ACTS: u32 = 500_000;
const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 256;
/// Acts of a piece in a stage at most: it is taken, worked on, given, and something is timed within.
const ACTS_OF_PIECE: u64 = 4;

/// Blocks that differ in their first byte: as little work as there is beside what an ingest does.
struct Image;

impl Disk for Image {
    fn size(&self) -> u64 {
        BLOCKS * BLOCK
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        buffer.fill(0xa5);
        if let Some(first) = buffer.first_mut() {
            *first = u8::try_from(offset / BLOCK % 251).unwrap_or(0);
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

/// Returns how long what is counted takes a thread.
fn each(act: impl Fn(&Probe) + Sync) -> Duration {
    let transfer = Transfer::default();
    let probe = transfer.stage(Stage::Read, &Subject::machine(), Crew::Own, Way::Only);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| act(&probe));
        }
    });
    begun.elapsed() / ACTS
}

/// An act on bytes.
fn act(probe: &Probe) {
    for _ in 0..ACTS {
        probe.work(|| ());
        probe.add(1);
    }
}

/// An act as small as a rename.
fn small_act(probe: &Probe) {
    let small = Small::new(probe);
    (0..ACTS).for_each(|_| small.work(|| ()));
}

fn main() {
    let (act, small_act) = (each(act), each(small_act));
    let storage: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    let folder = ObjectPath::new("xo-vm-backups").expect("a name");
    storage.create_directory(&folder).expect("it is empty");
    let repository = Repository::with_storage(storage.clone().reader(), OpenOptions::default()).expect("a repository");
    let destination = RepositoryDestination { name: "memory".to_owned(), repository, storage, quota: None };
    let wanted = Wanted {
        vm: "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b".to_owned(),
        name: Some("web01".to_owned()),
        disks: vec![("xvda".to_owned(), Source::Disk(Arc::new(Image)))],
        layout: Some(Layout::Exploded(Some(Filter::None))),
        ..Wanted::default()
    };
    let report =
        ingest::run(&wanted, &[Destination::Repository(destination)], &Watch::new(|_| ())).expect("there is memory");
    let pieces: u64 = report.transfer.stages.iter().map(|stage| stage.pieces).sum();
    let acts = pieces * ACTS_OF_PIECE;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let spent = act.as_secs_f64() * f64::from(u32::try_from(acts).expect("few"));
    let all = report.elapsed.as_secs_f64() * f64::from(u32::try_from(cores).expect("few"));
    println!(
        "{}",
        json!({
            "actNanoseconds": act.as_nanos(),
            "smallActNanoseconds": small_act.as_nanos(),
            "ingestActs": acts,
            "ingestSeconds": report.elapsed.as_secs_f64(),
            "ingestPart": spent / all,
        })
    );
}
