//! What a pool gives: exactly what changed is asked for, each disk is read once for all destinations, and whatever the pool or a
//! repository does, a backup reads as the disk was, or there is none.

mod pool_image;
mod support;

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pool_image::{
    BLOCK, EXPLODED, Exported, Live, PIECE, PoolImage, SPOTS, Seen, VM, Way, differing, full, image, is_key, later,
    memory, open, pass, path, read_all, read_only, run, runs, store, subject, sum, to, wanted,
};
use serde_json::Value;
use storage::{Checksum, Fault, FaultyStorage, LocalStorage, Operation, Summing, WritableStorage};
use support::{files, fixture, scratch};
use uuid::Uuid;
use xofs::ingest::{
    self, ErrorKind, Extent as Stored, Layout, Origin, PoolDisk, PoolRecords, PoolVdi, PoolVif, Source, Wanted, Watch,
};
use xofs::repository::{self, Document, Mode, OpenOptions, Repository};

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
    assert_eq!((bases[0].agreed(&[]), bases[1].agreed(&[])), (None, Some(live.snapshots[0].0)));
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
    assert_eq!((bases[0].agreed(&[]), begun.failed().count(), begun.vm().as_str()), (None, 0, VM));
    let full = Wanted { extent: Some(Stored::Full), ..subject(EXPLODED) };
    assert!(begun.bases(&full, &[(live.vdi, image().len() as u64)])[0].destinations[0].1.is_err());
    // Only now a snapshot is taken.
    let (taken, vdi) = live.snapshot(&later(&image()), Way::Changes);
    let (wanted, _) = wanted(EXPLODED, 1, vec![("xvda", taken, vdi)]);
    begun.store(&wanted, &|| Ok(())).unwrap();
    assert!(read_only(&storage) == [image(), later(&image())] && read_only(&other) == [later(&image())]);
    drop(again().unwrap());
    drop(again().unwrap());
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
