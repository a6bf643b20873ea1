//! Tests of the repository as a whole, on a storage in memory.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use disk::{Disk, ErrorKind as DiskError, Extent};
use storage::{
    ErrorKind as StorageError, Fault, FaultyStorage, MemoryStorage, ObjectPath, Operation, Storage, WritableStorage,
};

use super::*;

pub(crate) const VM: &str = "e15d58c8-1c93-4ef2-b5b1-db33d6955ecb";
const OTHER: &str = "ea1365a8-89fa-4eca-b5d2-3919ce4c105e";

fn time(day: u32) -> String {
    format!("202608{day:02}T020003Z")
}

fn metadata(name: &str, day: u32) -> String {
    let path = format!("vdis/job/vdi/{}.vhd", time(day));
    format!(
        r#"{{"mode":"delta","jobId":"job","vhds":{{"OpaqueRef:1":"{path}"}},"vm":{{"name_label":"{name}"}},
        "vbds":{{"OpaqueRef:b":{{"VDI":"OpaqueRef:1","device":"xvda"}}}},"size":{day}}}"#
    )
}

fn put(memory: &MemoryStorage, vm: &str, name: &str, day: u32) {
    memory.put(&format!("{VM_FOLDER}/{vm}/{}.json", time(day)), metadata(name, day)).unwrap();
}

/// A repository that looks again at each access, with what lies under it.
fn repository(fill: impl FnOnce(&MemoryStorage)) -> (Arc<Repository>, Arc<MemoryStorage>, Arc<FaultyStorage>) {
    let memory = Arc::new(MemoryStorage::new());
    fill(&memory);
    let faulty = Arc::new(FaultyStorage::<dyn Storage>::new(memory.clone()));
    let mut repository = Repository::with_storage(faulty.clone(), OpenOptions::default()).unwrap();
    Arc::get_mut(&mut repository).unwrap().catalog.look_always();
    faulty.reset_counts();
    (repository, memory, faulty)
}

fn id(vm: &str) -> VmId {
    VmId::new(vm).unwrap()
}

fn sizes(backups: &[Arc<Backup>]) -> Vec<u64> {
    backups.iter().map(|backup| backup.size).collect()
}

#[test]
fn vms_are_the_folders_that_hold_backups() {
    let (repository, memory, _) = repository(|memory| {
        put(memory, VM, "old name", 1);
        put(memory, VM, "web01", 2);
        put(memory, OTHER, "db01", 1);
        for path in
            [".queue/clean-vm/x", "zombie/vdis/job/vdi/x.vhd", &format!("{VM}.lock/20260801T020003Z.json"), "file"]
        {
            memory.put(&format!("{VM_FOLDER}/{path}"), "{}").unwrap();
        }
        memory.put("1785549603123.test", "").unwrap();
    });
    let vms = repository.vms().unwrap();
    let vm = |vm: &str, name: &str| Vm { id: id(vm), name: name.to_owned() };
    assert_eq!(*vms, [vm(OTHER, "db01"), vm(VM, "web01")]);
    assert!(Arc::ptr_eq(&vms, &repository.vms().unwrap()));
    put(&memory, VM, "a new name", 3);
    memory.remove(&format!("{VM_FOLDER}/{OTHER}/{}.json", time(1))).unwrap();
    assert_eq!(*repository.vms().unwrap(), [vm(VM, "a new name")]);
}

#[test]
fn the_name_comes_from_the_newest_metadata_that_can_be_read() {
    let (repository, memory, faulty) = repository(|memory| {
        put(memory, VM, "web01", 1);
        let path = format!("{VM_FOLDER}/{VM}/{}.json", time(2));
        memory.put(&path, "{\"vm\":{\"name").unwrap();
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        memory.set_modified(&ObjectPath::new(&path).unwrap(), long_ago).unwrap();
    });
    assert_eq!(repository.vms().unwrap()[0].name, "web01");
    faulty.reset_counts();
    repository.vms().unwrap();
    assert_eq!(faulty.count(Operation::Read), 0);
    memory.overwrite(&format!("{VM_FOLDER}/{VM}/{}.json", time(2)), metadata("web02", 2)).unwrap();
    assert_eq!(repository.vms().unwrap()[0].name, "web02");
}

#[test]
fn a_listing_that_fails_is_an_error_and_never_an_empty_list() {
    let (repository, _, faulty) = repository(|memory| put(memory, VM, "web01", 1));
    let failing = |folder: String| {
        faulty.set_rule(move |operation, path| {
            (operation == Operation::List && path.as_str() == folder).then_some(Fault::Error(StorageError::Io))
        });
    };
    failing(VM_FOLDER.to_owned());
    assert_eq!(repository.vms().unwrap_err().kind(), ErrorKind::Unavailable);
    failing(format!("{VM_FOLDER}/{VM}"));
    assert_eq!(repository.backups(&id(VM)).unwrap_err().kind(), ErrorKind::Unavailable);
    // The VM is shown, for what is in it is not known to be nothing.
    assert_eq!(repository.vms().unwrap().len(), 1);
    assert_eq!(repository.problems()[0].kind, ProblemKind::Listing);
    faulty.release();
    assert_eq!(repository.vms().unwrap()[0].name, "web01");
    assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [1]);
    assert_eq!(repository.problems(), []);
    assert_eq!(repository.backups(&id("nobody")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn backups_are_listed_oldest_first_and_those_that_did_not_change_stay_the_same() {
    let (repository, memory, faulty) = repository(|memory| {
        for day in [3, 1, 2] {
            put(memory, VM, "web01", day);
        }
        for name in [".20260801T020003Z.json", "20260801T020003Z.json.tmp", "other.json", "20260805T020003Z.xva"] {
            memory.put(&format!("{VM_FOLDER}/{VM}/{name}"), "").unwrap();
        }
    });
    let first = repository.backups(&id(VM)).unwrap();
    assert_eq!(sizes(&first), [1, 2, 3]);
    assert_eq!(first[0].time.to_string(), "2026-08-01T020003Z");
    faulty.reset_counts();
    assert!(Arc::ptr_eq(&first, &repository.backups(&id(VM)).unwrap()));
    assert_eq!(faulty.count(Operation::Read), 0);
    memory.overwrite(&format!("{VM_FOLDER}/{VM}/{}.json", time(2)), metadata("web01", 20)).unwrap();
    memory.remove(&format!("{VM_FOLDER}/{VM}/{}.json", time(1))).unwrap();
    put(&memory, VM, "web01", 4);
    let second = repository.backups(&id(VM)).unwrap();
    assert_eq!(sizes(&second), [20, 3, 4]);
    assert!(Arc::ptr_eq(&first[2], &second[1]));
    assert_eq!(faulty.count(Operation::Read), 2);
}

#[test]
fn a_listing_is_believed_for_a_moment() {
    let memory = Arc::new(MemoryStorage::new());
    put(&memory, VM, "web01", 1);
    let faulty = Arc::new(FaultyStorage::new(memory));
    let repository = Repository::with_storage(faulty.clone(), OpenOptions::default()).unwrap();
    let (vms, backups) = (repository.vms().unwrap(), repository.backups(&id(VM)).unwrap());
    faulty.reset_counts();
    assert!(Arc::ptr_eq(&vms, &repository.vms().unwrap()));
    assert!(Arc::ptr_eq(&backups, &repository.backups(&id(VM)).unwrap()));
    assert_eq!(faulty.total(), 0);
}

#[test]
fn metadata_that_does_not_parse_is_a_listed_problem_until_it_does() {
    let path = format!("{VM_FOLDER}/{VM}/{}.json", time(2));
    let (repository, memory, _) = repository(|memory| {
        put(memory, VM, "web01", 1);
        memory.put(&path, "{\"mode\":\"del").unwrap();
        memory.put(&format!("{VM_FOLDER}/{VM}/20261399T996099Z.json"), "{}").unwrap();
    });
    let backups = repository.backups(&id(VM)).unwrap();
    assert_eq!((backups.len(), backups[1].mode), (2, Mode::Unreadable));
    assert!(backups[1].problem.as_ref().unwrap().starts_with(&format!("'{path}': it is no JSON: ")));
    let problems = repository.problems();
    assert_eq!(problems.len(), 2);
    assert_eq!((problems[0].path.as_str(), problems[0].backup.clone()), (path.as_str(), Some(backups[1].id())));
    assert_eq!(problems[1].path.file_name(), "20261399T996099Z.json");
    memory.overwrite(&path, metadata("web01", 2)).unwrap();
    assert_eq!(repository.backups(&id(VM)).unwrap()[1].mode, Mode::Incremental);
    assert_eq!(repository.problems().len(), 1);
}

#[test]
fn metadata_that_is_being_written_in_place_is_waited_for() {
    let path = format!("{VM_FOLDER}/{VM}/{}.json", time(2));
    // Of an encrypted file a part is not authentic.
    for fault in [None, Some(StorageError::Authentication)] {
        let (repository, memory, faulty) = repository(|memory| {
            put(memory, VM, "web01", 1);
            memory.put(&path, "").unwrap();
        });
        let (writer, written, reads) = (memory.clone(), path.clone(), AtomicU32::new(0));
        faulty.set_rule(move |operation, path| {
            let is_read = operation == Operation::Read && path.as_str() == written;
            if !is_read || reads.fetch_add(1, Ordering::Relaxed) < 2 {
                return fault.filter(|_| is_read).map(Fault::Error);
            }
            writer.overwrite(&written, metadata("web01", 2)).unwrap();
            None
        });
        assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [1, 2]);
        assert_eq!(repository.problems(), []);
    }
}

#[test]
fn metadata_that_is_written_again_in_place_is_shown_as_it_was_until_it_is_old() {
    let (repository, memory, _) = repository(|memory| put(memory, VM, "web01", 1));
    assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [1]);
    let path = ObjectPath::new(&format!("{VM_FOLDER}/{VM}/{}.json", time(1))).unwrap();
    assert_eq!(repository.vms().unwrap()[0].name, "web01");
    memory.overwrite(path.as_str(), "{\"mode\":\"del").unwrap();
    assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [1]);
    assert_eq!(repository.vms().unwrap()[0].name, "web01");
    memory.set_modified(&path, SystemTime::now() - Duration::from_secs(11)).unwrap();
    assert_eq!(repository.backups(&id(VM)).unwrap()[0].mode, Mode::Unreadable);
    memory.overwrite(path.as_str(), metadata("web01", 3)).unwrap();
    assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [3]);
}

#[test]
fn what_was_reported_of_a_backup_is_forgotten_with_it() {
    let (repository, memory, _) = repository(|memory| {
        put(memory, VM, "web01", 1);
        put(memory, VM, "web01", 2);
        put(memory, OTHER, "db01", 1);
    });
    for (vm, day) in [(VM, 1), (VM, 2), (OTHER, 1)] {
        let path = ObjectPath::new(&format!("{VM_FOLDER}/{vm}/{day}.vhd")).unwrap();
        let backup = Some(BackupId { vm: id(vm), time: BackupTime::parse(&time(day)).unwrap() });
        repository.report_problem(Problem { path, backup, kind: ProblemKind::Read, message: "lost".to_owned() });
    }
    let reported = || {
        repository.vms().unwrap().iter().for_each(|vm| drop(repository.backups(&vm.id).unwrap()));
        repository.problems().iter().map(|problem| problem.path.file_name().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(reported(), ["1.vhd", "2.vhd", "1.vhd"]);
    memory.remove(&format!("{VM_FOLDER}/{VM}/{}.json", time(1))).unwrap();
    assert_eq!(reported(), ["2.vhd", "1.vhd"]);
    memory.remove(&format!("{VM_FOLDER}/{OTHER}/{}.json", time(1))).unwrap();
    assert_eq!(reported(), ["2.vhd"]);
}

#[test]
fn the_size_of_metadata_is_known_without_reading_it() {
    let (repository, memory, faulty) = repository(|memory| put(memory, VM, "web01", 1));
    let backup = repository.backups(&id(VM)).unwrap()[0].clone();
    faulty.reset_counts();
    assert_eq!(repository.metadata_size(&backup).unwrap(), metadata("web01", 1).len() as u64);
    assert_eq!((faulty.count(Operation::Read), faulty.count(Operation::Open)), (0, 0));
    memory.remove(backup.metadata.as_str()).unwrap();
    assert_eq!(repository.metadata_size(&backup).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_backup_that_was_read_is_shown_as_it_was_while_the_storage_fails() {
    let path = format!("{VM_FOLDER}/{VM}/{}.json", time(1));
    let (repository, memory, faulty) = repository(|memory| put(memory, VM, "web01", 1));
    let first = repository.backups(&id(VM)).unwrap();
    memory.overwrite(&path, metadata("web01", 7)).unwrap();
    faulty.set_rule(|operation, _| (operation == Operation::Read).then_some(Fault::Error(StorageError::Io)));
    for _ in 0..2 {
        assert!(Arc::ptr_eq(&first, &repository.backups(&id(VM)).unwrap()));
    }
    put(&memory, VM, "web01", 2);
    let modes: Vec<Mode> = repository.backups(&id(VM)).unwrap().iter().map(|backup| backup.mode).collect();
    assert_eq!(modes, [Mode::Incremental, Mode::Unreadable]);
    faulty.release();
    assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [7, 2]);
    assert_eq!(repository.problems(), []);
}

/// Writes XO's cache of `days`, as XO does: in place, after all else. It says another size than the files do.
fn write_cache(memory: &MemoryStorage, days: &[u32]) {
    let entry = |day: &u32| format!("\"/{VM_FOLDER}/{VM}/{}.json\":{}", time(*day), metadata("cached", day + 100));
    let entries: Vec<String> = days.iter().map(entry).collect();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(format!("{{{}}}", entries.join(",")).as_bytes()).unwrap();
    let path = format!("{VM_FOLDER}/{VM}/cache.json.gz");
    memory.put(&path, "").unwrap();
    memory.overwrite(&path, encoder.finish().unwrap()).unwrap();
}

#[test]
fn the_listing_cache_is_believed_if_it_agrees_with_the_folder() {
    let (repository, memory, faulty) = repository(|memory| {
        for day in 1..=5 {
            put(memory, VM, "web01", day);
        }
        write_cache(memory, &[1, 2, 3, 4, 5]);
    });
    assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [101, 102, 103, 104, 105]);
    assert_eq!(faulty.count(Operation::Read), 1);
    // What is written after it is read from its file.
    memory.overwrite(&format!("{VM_FOLDER}/{VM}/{}.json", time(3)), metadata("web01", 33)).unwrap();
    assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [101, 102, 33, 104, 105]);
}

#[test]
fn a_listing_cache_that_disagrees_with_the_folder_is_not_believed() {
    let path = format!("{VM_FOLDER}/{VM}/cache.json.gz");
    type Spoil<'a> = &'a dyn Fn(&MemoryStorage);
    let spoil: [(&str, Spoil<'_>); 6] = [
        ("one is missing", &|memory| write_cache(memory, &[1, 2, 3, 4])),
        ("one is too many", &|memory| write_cache(memory, &[1, 2, 3, 4, 5, 6])),
        ("one is another", &|memory| write_cache(memory, &[1, 2, 3, 4, 6])),
        ("a file is younger", &|memory| {
            write_cache(memory, &[1, 2, 3, 4, 5]);
            memory.overwrite(&format!("{VM_FOLDER}/{VM}/{}.json", time(2)), metadata("web01", 2)).unwrap();
        }),
        ("the folder is younger", &|memory| {
            write_cache(memory, &[1, 2, 3, 4, 5]);
            memory.put(&format!("{VM_FOLDER}/{VM}/new"), "").unwrap();
        }),
        ("it is no gzip", &|memory| {
            memory.put(&path, "").unwrap();
            memory.overwrite(&path, "{}").unwrap();
        }),
    ];
    for (why, spoil) in spoil {
        let (repository, ..) = repository(|memory| {
            for day in 1..=5 {
                put(memory, VM, "web01", day);
            }
            spoil(memory);
        });
        assert_eq!(sizes(&repository.backups(&id(VM)).unwrap()), [1, 2, 3, 4, 5], "{why}");
    }
}

/// A disk of one repeated byte.
struct Flat(u64, u8);

impl Disk for Flat {
    fn size(&self) -> u64 {
        self.0
    }
    fn read_at(&self, _: u64, buffer: &mut [u8]) -> disk::Result<()> {
        buffer.fill(self.1);
        Ok(())
    }
    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.0 - offset, is_hole: self.1 == 0 })
    }
}

fn vhd(byte: u8) -> Vec<u8> {
    let view =
        vhd::VhdView::new(Arc::new(Flat(4 << 20, byte)), uuid::Uuid::from_u128(u128::from(byte) + 1), 0).unwrap();
    let mut bytes = vec![0; usize::try_from(view.size()).unwrap()];
    view.read_at(0, &mut bytes).unwrap();
    bytes
}

/// An empty child of the VHD made by `vhd(0)`, which calls it `parent`.
fn child(parent: &str) -> Vec<u8> {
    let mut bytes = vhd(0);
    let end = bytes.len() - 512;
    let mut footer = vhd::Footer::parse(bytes[..512].try_into().unwrap()).unwrap();
    let mut header = vhd::Header::parse(bytes[512..1536].try_into().unwrap()).unwrap();
    header.parent_uuid = Some(footer.uuid);
    header.parent_name = parent.to_owned();
    footer.uuid = uuid::Uuid::from_u128(99);
    footer.disk_type = vhd::DiskType::Differencing;
    bytes[..512].copy_from_slice(&footer.to_bytes());
    bytes[512..1536].copy_from_slice(&header.to_bytes());
    bytes[end..].copy_from_slice(&footer.to_bytes());
    bytes
}

fn disk_path(day: u32) -> String {
    format!("{VM_FOLDER}/{VM}/vdis/job/vdi/{}.vhd", time(day))
}

#[test]
fn a_disk_is_opened_once_and_is_stale_when_its_backup_is_gone() {
    let (repository, memory, _) = repository(|memory| {
        put(memory, VM, "web01", 1);
        memory.put(&disk_path(1), vhd(7)).unwrap();
    });
    let backup = repository.backups(&id(VM)).unwrap()[0].clone();
    let open = || repository.open_disk(&backup, &backup.disks[0]);
    let disk = open().unwrap();
    assert!(Arc::ptr_eq(&disk, &open().unwrap()));
    let mut byte = [0];
    disk.read_at(4_000_000, &mut byte).unwrap();
    assert_eq!((disk.size(), byte), (4 << 20, [7]));
    assert_eq!(repository.chain(&backup, &backup.disks[0]).unwrap().len(), 1);
    let path = backup.metadata.as_str();
    // Written again: what was open stays good, but is not handed out any more.
    memory.overwrite(path, metadata("web01", 1)).unwrap();
    assert!(!Arc::ptr_eq(&disk, &open().unwrap()));
    disk.read_at(0, &mut byte).unwrap();
    // Replaced by a rename: the file that was open has no name, but the backup is there.
    memory.put(path, metadata("web01", 1)).unwrap();
    disk.read_at(0, &mut byte).unwrap();
    memory.remove(path).unwrap();
    assert_eq!(disk.read_at(0, &mut byte).unwrap_err().kind(), DiskError::Stale);
    assert_eq!(open().err().unwrap().kind(), DiskError::Stale);
    assert_eq!(repository.problems(), []);
}

#[test]
fn a_disk_that_cannot_be_opened_is_a_problem_until_it_can() {
    let (repository, memory, _) = repository(|memory| put(memory, VM, "web01", 1));
    let backup = repository.backups(&id(VM)).unwrap()[0].clone();
    let open = || repository.open_disk(&backup, &backup.disks[0]);
    assert_eq!(open().err().unwrap().kind(), DiskError::Damaged);
    assert_eq!(open().err().unwrap().kind(), DiskError::Damaged);
    let problems = repository.problems();
    assert_eq!(problems.len(), 1);
    assert_eq!((problems[0].kind, problems[0].path.as_str()), (ProblemKind::Disk, disk_path(1).as_str()));
    memory.put(&disk_path(1), vhd(0)).unwrap();
    open().unwrap();
    assert_eq!(repository.problems(), []);
}

#[test]
fn a_disk_whose_path_leads_outside_is_listed_and_refused() {
    let (repository, ..) = repository(|memory| {
        let json = r#"{"mode":"delta","vhds":{"OpaqueRef:1":"../../../../etc/passwd"}}"#;
        memory.put(&format!("{VM_FOLDER}/{VM}/{}.json", time(1)), json).unwrap();
    });
    let backup = repository.backups(&id(VM)).unwrap()[0].clone();
    assert_eq!((backup.mode, backup.disks[0].name.as_str()), (Mode::Incremental, "disk0"));
    let error = repository.open_disk(&backup, &backup.disks[0]).err().unwrap();
    assert_eq!(error.kind(), DiskError::Damaged);
    assert!(error.to_string().contains("outside the repository"), "{error}");
    assert_eq!(repository.problems().len(), 1);
}

/// One tar entry, padded.
fn entry(name: &str, content: &[u8]) -> Vec<u8> {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[124..136].copy_from_slice(format!("{:011o} ", content.len()).as_bytes());
    block[148..156].fill(b' ');
    block[156] = b'0';
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut bytes = [&block[..], content].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// An XVA of two small disks, `xvda` of 1024 bytes and `xvdc` of 512.
fn xva_of_two() -> Vec<u8> {
    let chunks = [("Ref:2", 1024), ("Ref:4", 512)].map(|(id, len)| (format!("{id}/00000000"), vec![7; len]));
    xva_of(&[("Ref:2", 1024, "0"), ("Ref:4", 512, "2")], &chunks)
}

/// An XVA of disks (id, size, device), and what is stored of them by name.
pub(crate) fn xva_of(disks: &[(&str, u64, &str)], chunks: &[(String, Vec<u8>)]) -> Vec<u8> {
    let member = |name: &str, value: &str| format!("<member><name>{name}</name><value>{value}</value></member>");
    let object = |class: &str, id: &str, fields: &str| {
        let fields = member("snapshot", &format!("<struct>{fields}</struct>"));
        format!("<value><struct>{}{}{fields}</struct></value>", member("class", class), member("id", id))
    };
    let mut objects = String::new();
    for (id, size, device) in disks {
        let size = size.to_string();
        objects += &object("VDI", id, &(member("virtual_size", &size) + &member("name_label", "a disk")));
        objects += &object("VBD", "", &(member("VDI", id) + &member("userdevice", device) + &member("type", "Disk")));
    }
    let ova = member("objects", &format!("<array><data>{objects}</data></array>"));
    let mut bytes = entry("ova.xml", format!("<value><struct>{ova}</struct></value>").as_bytes());
    for (name, bytes_of_chunk) in chunks {
        bytes.extend(entry(name, bytes_of_chunk));
        bytes.extend(entry(&format!("{name}.xxhash"), &[b'0'; 16]));
    }
    bytes.extend([0; 1024]);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One frame of zstd, its blocks stored as they are.
fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0];
    for block in bytes.chunks(1024) {
        frame.extend(&u32::try_from(block.len() << 3).unwrap().to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame.extend([1, 0, 0]);
    frame
}

pub(crate) fn put_full(memory: &MemoryStorage, day: u32, xva: Vec<u8>) {
    let json = format!(r#"{{"mode":"full","xva":"./{}.xva","size":99}}"#, time(day));
    memory.put(&format!("{VM_FOLDER}/{VM}/{}.json", time(day)), json).unwrap();
    memory.put(&format!("{VM_FOLDER}/{VM}/{}.xva", time(day)), xva).unwrap();
}

/// Name and size of each disk.
fn shown(backup: &Backup) -> Vec<(&str, Option<u64>)> {
    backup.disks.iter().map(|disk| (disk.name.as_str(), disk.virtual_size)).collect()
}

#[test]
fn a_compressed_xva_is_listed_with_its_disks_and_the_reason_they_cannot_be_read() {
    let (repository, _, faulty) = repository(|memory| {
        put_full(memory, 1, xva_of_two());
        put_full(memory, 2, gzip(&xva_of_two()));
        put_full(memory, 3, zstd(&xva_of_two()));
    });
    let backups = repository.backups(&id(VM)).unwrap();
    for backup in backups.iter() {
        assert_eq!(shown(backup), [("xvda", Some(1024)), ("xvdc", Some(512))]);
        assert_eq!((backup.mode, backup.disks[1].label.as_str()), (Mode::Full, "a disk"));
    }
    assert_eq!(backups[0].problem, None);
    repository.open_disk(&backups[0], &backups[0].disks[0]).unwrap().read_at(1023, &mut [0]).unwrap();
    for (backup, name) in [(&backups[1], "gzip"), (&backups[2], "zstd")] {
        let reason = format!("this XVA is compressed with {name}; reading its disks is not supported yet: ");
        assert!(backup.problem.as_ref().unwrap().contains(&reason), "{:?}", backup.problem);
        for disk in &backup.disks {
            let error = repository.open_disk(backup, disk).err().unwrap();
            assert_eq!((error.kind(), Some(error.to_string())), (DiskError::Unsupported, backup.problem.clone()));
        }
    }
    let problems: Vec<_> = repository.problems().into_iter().map(|problem| Some(problem.message)).collect();
    assert_eq!(problems, [backups[1].problem.clone(), backups[2].problem.clone()], "each is said once");
    faulty.reset_counts();
    assert!(Arc::ptr_eq(&backups[1], &repository.backups(&id(VM)).unwrap()[1]));
    assert_eq!(faulty.count(Operation::Open), 0, "what did not change is not looked into again");
}

/// Like an encrypted storage: objects are read as a whole, and only small ones.
struct Whole(MemoryStorage);

impl Storage for Whole {
    fn open(&self, path: &ObjectPath) -> storage::Result<Arc<dyn storage::Object>> {
        const LIMIT: u64 = 16 << 10;
        self.0.read(path, LIMIT)?;
        self.0.open(path)
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> storage::Result<Vec<u8>> {
        self.0.read(path, limit)
    }

    fn list(&self, path: &ObjectPath) -> storage::Result<Vec<storage::Entry>> {
        self.0.list(path)
    }

    fn stat(&self, path: &ObjectPath) -> storage::Result<storage::Stat> {
        self.0.stat(path)
    }

    fn capabilities(&self) -> storage::Capabilities {
        storage::Capabilities { ranged_reads: false, ..self.0.capabilities() }
    }

    fn describe(&self) -> String {
        self.0.describe()
    }
}

#[test]
fn an_encrypted_xva_is_listed_with_its_disks_if_it_is_small() {
    let memory = MemoryStorage::new();
    put_full(&memory, 1, xva_of_two());
    put_full(&memory, 2, gzip(&xva_of_two()));
    put_full(&memory, 3, [xva_of_two(), vec![0; 16 << 10]].concat());
    put_full(&memory, 4, b"no XVA".to_vec());
    let repository = Repository::with_storage(Arc::new(Whole(memory)), OpenOptions::default()).unwrap();
    let backups = repository.backups(&id(VM)).unwrap();
    for backup in &backups[..2] {
        assert_eq!(shown(backup), [("xvda", Some(1024)), ("xvdc", Some(512))]);
        let error = repository.open_disk(backup, &backup.disks[0]).err().unwrap();
        assert_eq!((error.kind(), Some(error.to_string())), (DiskError::Unsupported, backup.problem.clone()));
    }
    for backup in &backups[..3] {
        let problem = backup.problem.as_ref().unwrap();
        assert!(
            problem.contains("lies in an encrypted repository; reading its disks is not supported yet"),
            "{problem}"
        );
    }
    assert_eq!((backups[2].disks.len(), backups[3].disks.len()), (0, 0));
    assert!(
        backups[3].problem.as_ref().unwrap().contains("there are 6: the file is cut off"),
        "{:?}",
        backups[3].problem
    );
    assert_eq!(repository.problems().len(), 4);
}

#[test]
fn an_xva_of_which_not_even_the_beginning_can_be_read_is_listed_with_the_reason() {
    let (repository, memory, _) = repository(|memory| {
        let json = r#"{"mode":"full","xva":"./20260801T020003Z.xva","size":99}"#;
        memory.put(&format!("{VM_FOLDER}/{VM}/{}.json", time(1)), json).unwrap();
        memory.put(&format!("{VM_FOLDER}/{VM}/{}.xva", time(1)), [&[0x1f, 0x8b][..], &[0; 98]].concat()).unwrap();
        memory.put(&format!("{VM_FOLDER}/{VM}/{}.json", time(2)), r#"{"mode":"full"}"#).unwrap();
        memory.put(&format!("{VM_FOLDER}/{VM}/{}.json", time(3)), r#"{"mode":"full","xva":"no.xva"}"#).unwrap();
    });
    let backups = repository.backups(&id(VM)).unwrap();
    let found: Vec<_> = backups.iter().map(|backup| (backup.mode, backup.size, backup.disks.len())).collect();
    assert_eq!(found, [(Mode::Full, 99, 0), (Mode::Full, 0, 0), (Mode::Full, 0, 0)]);
    let problem = |index: usize| backups[index].problem.clone().unwrap();
    assert!(problem(0).contains("its beginning does not decompress with gzip"), "{}", problem(0));
    assert!(problem(1).contains("'xva'"), "{}", problem(1));
    assert!(problem(2).contains("no.xva"), "{}", problem(2));
    drop(memory);
}

#[test]
fn backups_of_configuration_and_pools_are_listed_with_their_files() {
    let (repository, ..) = repository(|memory| {
        for day in [2, 1] {
            memory.put(&format!("{CONFIG_FOLDER}/schedule/{}/data.json", time(day)), "{}").unwrap();
            memory.put(&format!("{CONFIG_FOLDER}/schedule/{}/metadata.json", time(day)), "{ }").unwrap();
        }
        memory.put(&format!("{CONFIG_FOLDER}/schedule/other/data.json"), "").unwrap();
        memory.put(&format!("{POOL_FOLDER}/schedule/pool/{}/data", time(1)), "dump").unwrap();
    });
    let configs = repository.config_backups().unwrap();
    let files = vec![("data.json".to_owned(), 2), ("metadata.json".to_owned(), 3)];
    let found: Vec<_> = configs.iter().map(|backup| (backup.group.as_str(), backup.time.stored())).collect();
    assert_eq!(found, [("schedule", time(1)), ("schedule", time(2))]);
    assert_eq!(configs[0].files, files);
    let pools = repository.pool_backups().unwrap();
    assert_eq!((pools.len(), pools[0].group.as_str()), (1, "pool"));
    assert_eq!(repository.read_stored(&pools[0].directory.join("data").unwrap()).unwrap(), b"dump");
    assert_eq!(*repository.vms().unwrap(), []);
}

#[test]
fn people_name_vms_backups_and_disks_in_several_ways() {
    let (repository, ..) = repository(|memory| {
        for day in [1, 2, 20] {
            put(memory, VM, "web/01", day);
        }
        put(memory, OTHER, "web", 1);
        put(memory, "ea1365a8-0000-4eca-b5d2-3919ce4c105e", "web", 1);
    });
    let name = |what: &str| match repository.select(what) {
        Ok(Selection::Vm(vm)) => vm.id.to_string(),
        Ok(Selection::Backup(_, backup)) => backup.time.to_string(),
        Ok(Selection::Disk(_, backup, disk)) => format!("{} {}", backup.time, disk.name),
        Ok(Selection::Loose(disk)) => disk.name.clone(),
        Err(error) => format!("{:?}", error.kind()),
    };
    for (what, expected) in [
        ("web%2F01", VM),
        (VM, VM),
        ("e15", VM),
        ("E15D58C81C93", VM),
        ("web%2F01~e15d58c8", VM),
        ("web~ea1365a88", OTHER),
        ("web~EA1365A889", OTHER),
        ("web~ea13", "Ambiguous"),
        ("web01~e15d58c8", "NotFound"),
        ("ea1365a8-8", OTHER),
        ("web", "Ambiguous"),
        ("ea1365a8", "Ambiguous"),
        ("nobody", "NotFound"),
        ("", "NotFound"),
        ("e15/latest", "2026-08-20T020003Z"),
        ("e15/latest~2", "2026-08-01T020003Z"),
        ("e15/latest~3", "NotFound"),
        ("e15/latest~", "NotFound"),
        ("e15/latest1", "NotFound"),
        ("e15/2026-08-2", "2026-08-20T020003Z"),
        ("e15/20260820T02", "2026-08-20T020003Z"),
        ("e15/2026-08-02T020003Z", "2026-08-02T020003Z"),
        ("e15/2026-08", "Ambiguous"),
        ("e15/2027", "NotFound"),
        ("e15/", VM),
        ("e15/é", "NotFound"),
        ("e15/latest/xvda", "2026-08-20T020003Z xvda"),
        ("e15/latest/disks/xvda.raw", "2026-08-20T020003Z xvda"),
        ("e15/latest/xvdb", "NotFound"),
    ] {
        assert_eq!(name(what), expected, "{what:?}");
    }
    let message = repository.select("web").unwrap_err().to_string();
    assert_eq!(message, "'web' names several VMs: 'web~ea1365a80', 'web~ea1365a88'; say which");
    let message = repository.select("e15/latest/xvdb").unwrap_err().to_string();
    assert_eq!(message, "backup 2026-08-20T020003Z of VM 'web/01' has no disk 'xvdb'; there are 'xvda'");
}

#[test]
fn an_error_names_the_first_of_many_and_says_how_many_more_there_are() {
    let (repository, ..) = repository(|memory| {
        for day in 1..=20 {
            put(memory, VM, "web01", day);
            put(memory, &VM.replace("e15d58c8", &format!("{day:08}")), &format!("vm{day:02}"), 1);
        }
    });
    let message = |what: &str| repository.select(what).unwrap_err().to_string();
    let shown: Vec<String> = (1..=8).map(|day| format!("'vm{day:02}~{day:08}'")).collect();
    let expected = format!("no VM has the name or uuid 'nobody'; there are {} and 13 more", shown.join(", "));
    assert_eq!(message("nobody"), expected);
    let shown: Vec<String> = (13..=20).rev().map(|day| format!("2026-08-{day}T020003Z")).collect();
    let shown = shown.join(", ");
    assert_eq!(message("web01/2027"), format!("VM 'web01' has no backup '2027'; there are {shown} and 12 more"));
    let expected = format!("'2026' names several backups of VM 'web01': {shown} and 12 more; say which");
    assert_eq!(message("web01/2026"), expected);
}

#[test]
fn a_folder_of_vhds_shows_those_that_are_no_parents() {
    let memory = Arc::new(MemoryStorage::new());
    memory.put("base.vhd", vhd(0)).unwrap();
    memory.put("leaf.vhd", child("base.vhd")).unwrap();
    memory.put("other.alias.vhd", "data/x.vhd\n").unwrap();
    memory.put("data/x.vhd", vhd(3)).unwrap();
    memory.put("odd.vhd", "no vhd").unwrap();
    memory.put(".hidden.vhd", vhd(0)).unwrap();
    let repository = Repository::with_storage(memory, OpenOptions::default()).unwrap();
    assert_eq!((repository.layout(), repository.vms().unwrap().len()), (Layout::Disks, 0));
    let disks = repository.loose_disks().unwrap();
    let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["leaf", "odd", "other"]);
    assert_eq!(repository.loose_chain(&disks[0]).unwrap().len(), 2);
    assert_eq!(repository.open_loose(&disks[1]).err().unwrap().kind(), DiskError::Damaged);
    let mut byte = [0];
    repository.open_loose(&disks[2]).unwrap().read_at(0, &mut byte).unwrap();
    assert_eq!(byte, [3]);
    assert!(matches!(repository.select("leaf"), Ok(Selection::Loose(disk)) if disk.name == "leaf"));
    assert_eq!(repository.select("base").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_path_may_lead_to_one_vhd_an_alias_or_an_exploded_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(path("data/x.vhd")).unwrap();
    for part in ["bat", "footer", "header"] {
        std::fs::write(path("data/x.vhd").join(part), "").unwrap();
    }
    std::fs::write(path("one.vhd"), vhd(5)).unwrap();
    std::fs::write(path("other.vhd"), vhd(6)).unwrap();
    std::fs::write(path("two.alias.vhd"), "data/x.vhd").unwrap();
    std::fs::write(path("note.txt"), "").unwrap();
    let open = |name: &str| Repository::open(&path(name), OpenOptions::default());
    let shown = |name: &str| {
        let repository = open(name).unwrap();
        assert_eq!(repository.layout(), Layout::Disks);
        let disks = repository.loose_disks().unwrap();
        disks.iter().map(|disk| format!("{} {}", disk.name, disk.path)).collect::<Vec<_>>()
    };
    assert_eq!(shown("one.vhd"), ["one one.vhd"]);
    assert_eq!(shown("two.alias.vhd"), ["two two.alias.vhd"]);
    assert_eq!(shown("data/x.vhd"), ["two two.alias.vhd"]);
    assert_eq!(shown(""), ["one one.vhd", "other other.vhd", "two two.alias.vhd"]);
    std::fs::remove_file(path("two.alias.vhd")).unwrap();
    assert_eq!(shown("data/x.vhd"), ["x x.vhd"]);
    assert_eq!(open("note.txt").err().unwrap().kind(), ErrorKind::NoSuchRepository);
    assert_eq!(open("nothing").err().unwrap().kind(), ErrorKind::NoSuchRepository);
}

#[test]
fn what_is_no_repository_is_refused_with_what_was_expected() {
    let open = |fill: &dyn Fn(&MemoryStorage)| {
        let memory = Arc::new(MemoryStorage::new());
        fill(&memory);
        Repository::with_storage(memory, OpenOptions::default()).err().unwrap()
    };
    let error = open(&|_| {});
    assert_eq!(error.kind(), ErrorKind::NoSuchRepository);
    assert!(error.to_string().contains("is empty: a backup repository (a folder with 'xo-vm-backups')"), "{error}");
    assert_eq!(open(&|memory| memory.put("a.txt", "").unwrap()).kind(), ErrorKind::NoSuchRepository);
    let encrypted = |memory: &MemoryStorage| {
        memory.put("encryption.json", r#"{"algorithm":"chacha20-poly1305"}"#).unwrap();
        memory.put("metadata.json", [0; 77]).unwrap();
    };
    assert_eq!(open(&encrypted).kind(), ErrorKind::Key);
    let gone = ObjectPath::root();
    let faulty = FaultyStorage::new(Arc::new(MemoryStorage::new()));
    faulty.set_rule(|_, _| Some(Fault::Error(StorageError::Io)));
    assert!(faulty.list(&gone).is_err());
    let error = Repository::with_storage(Arc::new(faulty), OpenOptions::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[test]
fn disks_that_nobody_holds_are_closed_when_they_keep_too_many_files_open() {
    let memory = Arc::new(MemoryStorage::new());
    for number in 0..4 {
        memory.put(&format!("{number}.vhd"), vhd(number)).unwrap();
    }
    let faulty = Arc::new(FaultyStorage::new(memory));
    let repository = Repository::with_storage(faulty.clone(), OpenOptions::default()).unwrap();
    let disks = repository.loose_disks().unwrap();
    let opened = |number: usize| {
        faulty.reset_counts();
        repository.open_loose(&disks[number]).unwrap();
        faulty.count(Operation::Open)
    };
    // Each counts as two: itself and a metadata file.
    repository.disks.keep_files(6);
    assert_eq!([0, 1, 2, 0, 3, 0, 2].map(opened), [1, 1, 1, 0, 1, 0, 0]);
    assert_eq!(opened(1), 1);
    repository.disks.keep_files(0);
    assert_eq!([1, 0, 0, 1].map(opened), [0, 0, 0, 0]);
    assert_eq!([3, 3, 0].map(opened), [1, 0, 1]);
}

#[test]
fn one_file_that_cannot_be_read_hides_no_other_backup_of_configuration() {
    let (repository, _, faulty) = repository(|memory| {
        for name in ["data.json", "link", "secret"] {
            memory.put(&format!("{CONFIG_FOLDER}/job/{}/{name}", time(1)), "123").unwrap();
        }
    });
    faulty.set_rule(|operation, path| match path.file_name() {
        "link" if operation == Operation::Stat => Some(Fault::Error(StorageError::Escape)),
        _ => None,
    });
    let files = || repository.config_backups().map(|backups| backups[0].files.clone());
    let file = |name: &str| (name.to_owned(), 3);
    assert_eq!(files().unwrap(), [file("data.json"), file("secret")]);
    faulty.set_rule(|_, path| (path.file_name() == "secret").then_some(Fault::Error(StorageError::Io)));
    assert_eq!(files().unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn a_disk_counts_for_the_blocks_it_has_whatever_their_size() {
    let memory = Arc::new(MemoryStorage::new());
    let mut file = vhd(0);
    let mut header = vhd::Header::parse(file[512..1536].try_into().unwrap()).unwrap();
    header.block_size = vhd::BlockSize::MIN;
    header.max_table_entries = 8192;
    file[512..1536].copy_from_slice(&header.to_bytes());
    file.truncate(1536);
    file.resize(1536 + 4 * 8192, 0xff);
    memory.put("a.vhd", file).unwrap();
    let repository = Repository::with_storage(memory, OpenOptions::default()).unwrap();
    let disk = repository.loose_disks().unwrap()[0].clone();
    assert_eq!(repository.open_loose(&disk).unwrap().size(), 8192 * 512);
    assert_eq!(repository.disks.kept_bytes(), 8192 * 8 + (64 << 10));
    // Nobody holds it, so it is closed in time; one that somebody holds is not.
    repository.disks.close_unused(Duration::from_secs(3600));
    assert_eq!(repository.open_disks(), 1);
    repository.disks.close_unused(Duration::ZERO);
    assert_eq!((repository.open_disks(), repository.disks.kept_bytes()), (0, 0));
    let held = repository.open_loose(&disk).unwrap();
    repository.disks.close_unused(Duration::ZERO);
    assert_eq!((repository.open_disks(), held.size()), (1, 8192 * 512));
}

/// A repository of many VMs with many backups each.
fn many(vms: u32, days: u32, cached: bool) -> (Arc<Repository>, Arc<FaultyStorage>) {
    let (repository, _, faulty) = repository(|memory| {
        for vm in 0..vms {
            let vm = format!("{vm:08x}-0000-4000-8000-000000000000");
            (1..=days).for_each(|day| put(memory, &vm, "web", day));
            if cached {
                let entry = |day| format!("\"/{VM_FOLDER}/{vm}/{}.json\":{}", time(day), metadata("web", day));
                let entries: Vec<String> = (1..=days).map(entry).collect();
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(format!("{{{}}}", entries.join(",")).as_bytes()).unwrap();
                let path = format!("{VM_FOLDER}/{vm}/cache.json.gz");
                // XO makes the file, which changes the folder, then writes it.
                memory.put(&path, "").unwrap();
                memory.overwrite(&path, encoder.finish().unwrap()).unwrap();
            }
        }
    });
    (repository, faulty)
}

fn counts(faulty: &FaultyStorage) -> (u64, u64, u64) {
    let counts = (faulty.count(Operation::List), faulty.count(Operation::Stat), faulty.count(Operation::Read));
    assert_eq!(counts.0 + counts.1 + counts.2, faulty.total(), "nothing is opened to be listed");
    faulty.reset_counts();
    counts
}

#[test]
fn the_vms_are_named_by_one_listing_and_one_metadata_file_each() {
    let (repository, faulty) = many(50, 20, false);
    assert_eq!(repository.vms().unwrap().len(), 50);
    assert_eq!(counts(&faulty), (1 + 50, 50, 50));
    // Looked at again, nothing is read again.
    repository.vms().unwrap();
    assert_eq!(counts(&faulty), (1 + 50, 50, 0));
}

#[test]
fn the_backups_of_a_vm_are_listed_by_one_look_at_each_file_and_one_reading_of_all() {
    let (repository, faulty) = many(3, 28, true);
    let vm = repository.vms().unwrap()[1].id.clone();
    counts(&faulty);
    assert_eq!(repository.backups(&vm).unwrap().len(), 28);
    // Of the folder and the cache: the folder once, the cache before and after it was read.
    assert_eq!(counts(&faulty), (1, 28 + 3, 1));
    repository.backups(&vm).unwrap();
    assert_eq!(counts(&faulty), (1, 28, 0));
    let (repository, faulty) = many(3, 28, false);
    assert_eq!(repository.backups(&vm).unwrap().len(), 28);
    assert_eq!(counts(&faulty), (1, 28, 28));
}

#[test]
fn all_backups_are_listed_several_vms_at_a_time() {
    let (repository, faulty) = many(8, 3, false);
    repository.vms().unwrap();
    // Each VM's oldest metadata file stays until those of four VMs are asked for.
    let oldest = format!("{}.json", time(1));
    faulty.set_rule(move |operation, path| {
        (operation == Operation::Read && path.file_name() == oldest).then_some(Fault::Stall)
    });
    let all = std::thread::scope(|scope| {
        let listing = scope.spawn(|| repository.all_backups().unwrap());
        assert!(
            faulty.wait_for_stalled(4, std::time::Duration::from_secs(30)),
            "the VMs are listed one after the other"
        );
        faulty.release();
        listing.join().unwrap()
    });
    let found: Vec<_> = all.iter().map(|(vm, backups)| (&vm.id, backups.as_ref().unwrap().len())).collect();
    let expected: Vec<_> = repository.vms().unwrap().iter().map(|vm| (vm.id.clone(), 3)).collect();
    assert_eq!(found, expected.iter().map(|(id, count)| (id, *count)).collect::<Vec<_>>());
}

#[test]
fn disks_kept_open_after_a_look_at_all_of_them_take_no_more_than_they_may() {
    const DISKS: u32 = 28;
    let (repository, _, _) = repository(|memory| {
        for vm in 0..40 {
            let vm = format!("{vm:08x}-0000-4000-8000-000000000000");
            for day in 1..=DISKS {
                put(memory, &vm, "web", day);
                memory.put(&format!("{VM_FOLDER}/{vm}/vdis/job/vdi/{}.vhd", time(day)), vhd(7)).unwrap();
            }
        }
    });
    repository.disks.keep_files(60);
    for (_, backups) in repository.all_backups().unwrap() {
        for backup in backups.unwrap().iter() {
            repository.open_disk(backup, &backup.disks[0]).unwrap().allocated().unwrap();
        }
    }
    // Each takes the file of the disk and that of the metadata.
    assert_eq!(repository.open_disks(), 30);
    assert!(repository.disks.kept_bytes() < 30 * (65 << 10), "{} bytes", repository.disks.kept_bytes());
}
