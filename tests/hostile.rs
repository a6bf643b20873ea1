//! Repositories whose files lie, by chance or on purpose: each costs what it says itself, is told, and nothing else.

#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use seeds::Random;
use serde_json::{Value, json};
use storage::MemoryStorage;
use xofs::mount::{self, MountOptions};
use xofs::repository::{
    Mode, OpenOptions, ProblemKind, Repository, VmId, escape_name, unescape_name, vm_directory_names,
};

const VM: &str = "e15d58c8-1c93-4ef2-b5b1-db33d6955ecb";
const OTHER: &str = "ea1365a8-89fa-4eca-b5d2-3919ce4c105e";
const BLOCK: usize = 4096;
/// What is refused is refused at once.
const SOON: Duration = Duration::from_secs(5);

fn time(day: usize) -> String {
    format!("202608{day:02}T020003Z")
}

fn metadata(day: usize) -> Value {
    json!({
        "mode": "delta", "jobId": "job", "scheduleId": "schedule", "size": day, "tags": ["daily=2026-08-01"],
        "vm": {"name_label": "web01", "suspend_VDI": "OpaqueRef:NULL"},
        "vmSnapshot": {"name_label": "web01"},
        "vhds": {"OpaqueRef:1": "vdis/job/vdi/a.vhd", "OpaqueRef:2": "vdis/job/vdi/b.vhd"},
        "vdis": {"OpaqueRef:1": {"uuid": OTHER, "name_label": "system", "virtual_size": 4096, "type": "user"}},
        "vbds": {"OpaqueRef:b": {"VDI": "OpaqueRef:1", "device": "xvda", "userdevice": "0"}},
        "isVhdDifferencing": {"OpaqueRef:1": false, "OpaqueRef:2": true},
    })
}

fn path(vm: &str, day: usize) -> String {
    format!("xo-vm-backups/{vm}/{}.json", time(day))
}

fn open(storage: Arc<MemoryStorage>) -> Arc<Repository> {
    Repository::with_storage(storage, OpenOptions::default()).unwrap()
}

fn id(vm: &str) -> VmId {
    VmId::new(vm).unwrap()
}

/// A value that does not belong anywhere.
fn odd(random: &mut Random) -> Value {
    match random.below(16) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(-1),
        3 => json!(u64::MAX),
        4 => json!(1e300),
        5 => json!(0.5),
        6 => json!(""),
        7 => json!("../../../../etc/passwd"),
        8 => json!("/etc/passwd"),
        9 => json!("a\0b\n/\u{7f}\u{202e}"),
        10 => json!("x".repeat(70_000)),
        11 => json!([]),
        12 => json!({"": {"": [{}]}}),
        13 => (0..100).fold(Value::Null, |inner, _| json!([inner])),
        14 => Value::Object((0..2000).map(|number| (number.to_string(), json!("x.vhd"))).collect()),
        _ => json!(["a", 1, null, {"b": []}]),
    }
}

/// Puts an odd value somewhere, removes one, or doubles one under another name.
fn spoil(value: &mut Value, random: &mut Random) {
    let inner = match value {
        Value::Object(fields) if !fields.is_empty() && random.below(6) > 0 => {
            let key = fields.keys().nth(random.below(fields.len())).unwrap().clone();
            match random.below(8) {
                0 => return drop(fields.remove(&key)),
                1 => {
                    let copy = fields[&key].clone();
                    let names = ["", "..", "/", "a\n", "OpaqueRef:NULL", "OpaqueRef:1"];
                    return drop(fields.insert(names[random.below(names.len())].to_owned(), copy));
                }
                _ => fields.get_mut(&key),
            }
        }
        Value::Array(items) if !items.is_empty() && random.below(6) > 0 => {
            let index = random.below(items.len());
            items.get_mut(index)
        }
        _ => None,
    };
    match inner {
        Some(inner) => spoil(inner, random),
        None => *value = odd(random),
    }
}

/// The JSON of one backup, spoiled; now and then it is none any more.
fn spoiled(random: &mut Random) -> Vec<u8> {
    let mut value = metadata(2);
    (0..=random.below(3)).for_each(|_| spoil(&mut value, random));
    let mut bytes = serde_json::to_vec(&value).unwrap();
    let at = random.below(bytes.len());
    match random.below(8) {
        0 => bytes.truncate(at),
        1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes.extend(b"}{\0"),
        3 => drop(bytes.splice(at..at, b"[".repeat(1 << random.below(20)))),
        _ => {}
    }
    bytes
}

fn is_component(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains('/') && !name.chars().any(char::is_control)
}

// Promise 12: "A backup that cannot be read is listed, with the reason in `.xofs/problems.json`."
#[test]
fn metadata_of_any_shape_costs_its_own_backup_at_most() {
    // Many at once: most of the time of each is for what has just been written and may not be whole.
    seeds::each(400, 32, |seed| {
        let bytes = spoiled(&mut Random::new(seed));
        let memory = Arc::new(MemoryStorage::new());
        memory.put(&path(OTHER, 1), metadata(1).to_string()).unwrap();
        for day in [1, 3] {
            memory.put(&path(VM, day), metadata(day).to_string()).unwrap();
        }
        memory.put(&path(VM, 2), bytes.clone()).unwrap();
        let repository = open(memory);
        let start = Instant::now();
        let vms = repository.vms().unwrap();
        assert_eq!(vms.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["web01", "web01"], "seed {seed}");
        let backups = repository.backups(&id(VM)).unwrap();
        assert_eq!(backups.len(), 3, "seed {seed}");
        assert_eq!((backups[0].size, backups[2].size), (1, 3), "seed {seed}");
        assert!(backups[0].problem.is_none() && backups[2].problem.is_none(), "seed {seed}");
        let backup = &backups[1];
        assert!(backup.mode == Mode::Incremental || backup.problem.is_some(), "seed {seed}");
        let problems = repository.problems();
        assert_eq!(problems.is_empty(), backup.problem.is_none(), "seed {seed}: {problems:?}");
        assert!(problems.iter().all(|problem| problem.path.as_str() == path(VM, 2)), "seed {seed}: {problems:?}");
        let names: HashSet<&str> = backup.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names.len(), backup.disks.len(), "seed {seed}");
        assert!(names.iter().all(|name| is_component(name)), "seed {seed}: {names:?}");
        assert!(backup.disks.len() <= 1024, "seed {seed}");
        for disk in backup.disks.iter().take(3) {
            // Nothing lies there.
            let error = repository.open_disk(backup, disk).err().unwrap();
            assert!(!error.to_string().contains('\n'), "seed {seed}: {error}");
        }
        assert_eq!(repository.backup_metadata(backup).unwrap(), bytes, "seed {seed}");
        assert!(start.elapsed() < SOON, "seed {seed}: {:?}", start.elapsed());
    });
}

#[test]
fn a_listing_cache_of_any_shape_hides_and_invents_no_backup() {
    for seed in 0..250 {
        let mut random = Random::new(seed);
        let memory = Arc::new(MemoryStorage::new());
        (1..=5).for_each(|day| memory.put(&path(VM, day), metadata(day).to_string()).unwrap());
        let mut cache = json!({});
        for day in 1..=5 {
            cache[format!("/{}", path(VM, day))] = metadata(day);
        }
        let is_spoiled = random.below(2) == 0;
        if is_spoiled {
            spoil(&mut cache, &mut random);
        }
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(cache.to_string().as_bytes()).unwrap();
        let mut bytes = encoder.finish().unwrap();
        if !is_spoiled {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << random.below(8),
                2 => bytes[at..].fill(0xff),
                _ => drop(bytes.splice(at..at, [0x1f, 0x8b])),
            }
        }
        let name = format!("xo-vm-backups/{VM}/cache.json.gz");
        memory.put(&name, "").unwrap();
        memory.overwrite(&name, bytes).unwrap();
        let backups = open(memory).backups(&id(VM)).unwrap();
        assert_eq!(backups.len(), 5, "seed {seed}");
        if !is_spoiled {
            let sizes: Vec<u64> = backups.iter().map(|backup| backup.size).collect();
            assert_eq!(sizes, [1, 2, 3, 4, 5], "seed {seed}");
        }
    }
}

#[test]
fn a_cache_that_is_a_bomb_costs_no_more_than_its_limit() {
    let memory = Arc::new(MemoryStorage::new());
    (1..=5).for_each(|day| memory.put(&path(VM, day), metadata(day).to_string()).unwrap());
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    // Ever more entries, each of which would be kept.
    encoder.write_all(b"{").unwrap();
    for number in 0..200_000 {
        write!(encoder, "\"/xo-vm-backups/{VM}/{number}\":{{}},").unwrap();
    }
    let name = format!("xo-vm-backups/{VM}/cache.json.gz");
    memory.put(&name, "").unwrap();
    memory.overwrite(&name, encoder.finish().unwrap()).unwrap();
    let start = Instant::now();
    assert_eq!(open(memory).backups(&id(VM)).unwrap().len(), 5);
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

// Promise 15: "Names that a filesystem cannot hold, or that would lead elsewhere (`/`, `..`, control characters), are escaped"
#[test]
fn names_that_people_or_guests_chose_are_one_component_each() {
    let long = "é".repeat(150);
    let names = ["", ".", "..", "/", "a/b", "../../etc", "a\nb", "a\0b", "\u{1b}[31m", "%2F", " ", &long, ".hidden"];
    let memory = Arc::new(MemoryStorage::new());
    for (number, name) in names.iter().enumerate() {
        let mut value = metadata(1);
        value["vm"]["name_label"] = json!(name);
        value["vdis"]["OpaqueRef:1"]["name_label"] = json!(name);
        value["vbds"]["OpaqueRef:b"]["device"] = json!(name);
        value["vbds"]["OpaqueRef:b"]["userdevice"] = json!(name);
        memory.put(&path(&format!("{number:08}-{VM}"), 1), value.to_string()).unwrap();
        assert!(is_component(&escape_name(name)), "{name:?}");
        assert!(name.len() > 255 || unescape_name(&escape_name(name)).as_deref() == Some(name), "{name:?}");
    }
    let repository = open(memory);
    let vms = repository.vms().unwrap();
    let folders = vm_directory_names(&vms);
    assert!(folders.iter().all(|name| is_component(name)), "{folders:?}");
    assert_eq!(folders.iter().collect::<HashSet<_>>().len(), names.len(), "{folders:?}");
    for vm in vms.iter() {
        for disk in &repository.backups(&vm.id).unwrap()[0].disks {
            assert!(is_component(&disk.name), "{:?}: {:?}", vm.name, disk.name);
        }
    }
}

fn fill(root: &Path) {
    for (vm, day) in [(VM, 1), (VM, 3), (OTHER, 1)] {
        let file = root.join(path(vm, day));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, metadata(day).to_string()).unwrap();
    }
    for file in
        ["xo-config-backups/schedule/20260801T000000Z/data.json", "xo-pool-metadata-backups/s/p/20260801T000000Z/data"]
    {
        fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
        fs::write(root.join(file), "dump").unwrap();
    }
}

#[test]
fn what_is_no_file_where_one_is_expected_costs_its_own_backup_and_never_waits() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), metadata(9).to_string()).unwrap();
    for kind in ["pipe", "socket", "folder", "loop", "outside", "outside folder"] {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fill(root);
        let make = |file: &str| {
            let file = root.join(file);
            match kind {
                "pipe" => {
                    let mode = rustix::fs::Mode::RUSR;
                    rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, mode, 0).unwrap();
                }
                "socket" => drop(std::os::unix::net::UnixListener::bind(&file).unwrap()),
                "folder" => fs::create_dir(&file).unwrap(),
                "loop" => std::os::unix::fs::symlink(&file, &file).unwrap(),
                "outside" => std::os::unix::fs::symlink(outside.path().join("secret"), &file).unwrap(),
                _ => std::os::unix::fs::symlink(outside.path(), &file).unwrap(),
            }
        };
        make(&path(VM, 2));
        make(&format!("xo-vm-backups/{VM}/cache.json.gz"));
        make("xo-vm-backups/ffffffff-1c93-4ef2-b5b1-db33d6955ecb");
        make("xo-config-backups/schedule/20260801T000000Z/other");
        make("xo-config-backups/schedule/20260802T000000Z");
        make("xo-pool-metadata-backups/s/p/20260801T000000Z/other");
        fs::write(root.join(path(VM, 4)), json!({"mode": "full", "xva": "x.xva"}).to_string()).unwrap();
        make(&format!("xo-vm-backups/{VM}/x.xva"));
        let start = Instant::now();
        let repository = Repository::open(root, OpenOptions::default()).unwrap();
        let vms: Vec<_> = repository.vms().unwrap().iter().map(|vm| vm.id.to_string()).collect();
        assert_eq!(vms, [VM, OTHER], "{kind}");
        let backups = repository.backups(&id(VM)).unwrap();
        let sizes: Vec<u64> =
            backups.iter().filter(|backup| backup.mode == Mode::Incremental).map(|backup| backup.size).collect();
        assert_eq!(sizes, [1, 3], "{kind}");
        assert!(backups.last().unwrap().problem.is_some(), "{kind}: the XVA");
        for backup in backups.iter().filter(|backup| backup.mode == Mode::Unreadable) {
            let problems = repository.problems();
            assert!(problems.iter().any(|problem| problem.path == backup.metadata), "{kind}: {problems:?}");
        }
        for stored in [repository.config_backups(), repository.pool_backups()] {
            let stored = stored.unwrap_or_else(|error| panic!("{kind}: {error}"));
            assert!(stored[0].files.iter().any(|(name, _)| name.starts_with("data")), "{kind}: {stored:?}");
            for (name, _) in &stored[0].files {
                let read = repository.read_stored(&stored[0].directory.join(name).unwrap());
                assert!(read.is_err() || read.unwrap() == b"dump", "{kind}: {name}");
            }
        }
        assert!(start.elapsed() < SOON, "{kind}: {:?}", start.elapsed());
    }
}

#[test]
fn names_that_are_not_utf8_hide_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe.json");
    fs::write(folder.path().join("xo-vm-backups").join(VM).join(odd), "{}").unwrap();
    fs::create_dir(folder.path().join("xo-vm-backups").join(odd)).unwrap();
    fs::write(folder.path().join(odd), "").unwrap();
    fs::write(folder.path().join("xo-vm-backups").join(VM).join("a\nb.json"), "{}").unwrap();
    let repository = Repository::open(folder.path(), OpenOptions::default()).unwrap();
    assert_eq!(repository.vms().unwrap().len(), 2);
    assert_eq!(repository.backups(&id(VM)).unwrap().len(), 2);
}

/// Writes an exploded VHD of `held` blocks of 4096 bytes, block n filled with n + 1.
fn exploded(folder: &Path, blocks: u32) {
    let size = u64::from(blocks) * BLOCK as u64;
    let footer = vhd::Footer {
        features: 2,
        data_offset: 512,
        timestamp: 0,
        creator: *b"xo  ",
        creator_version: 0,
        creator_host_os: *b"Wi2k",
        original_size: size,
        current_size: size,
        chs: vhd::Chs::of_size(size),
        disk_type: vhd::DiskType::Dynamic,
        uuid: uuid::Uuid::from_u128(7),
    };
    let header = vhd::Header {
        table_offset: 1536,
        max_table_entries: blocks,
        block_size: vhd::BlockSize::new(u32::try_from(BLOCK).unwrap()).unwrap(),
        parent_uuid: None,
        parent_timestamp: 0,
        parent_name: String::new(),
        locators: Default::default(),
    };
    fs::create_dir_all(folder.join("blocks/0")).unwrap();
    fs::write(folder.join("footer"), footer.to_bytes()).unwrap();
    fs::write(folder.join("header"), header.to_bytes()).unwrap();
    fs::write(folder.join("bat"), vec![0xff; usize::try_from(blocks).unwrap()]).unwrap();
    for block in 0..blocks {
        let data = vec![u8::try_from(block).unwrap() + 1; BLOCK];
        fs::write(folder.join(format!("blocks/0/{block}")), [vec![0xff; 512], data].concat()).unwrap();
    }
}

// Promise 1: "what the repository does not give, or gives damaged, is `EIO`, and never zeroes"
#[test]
fn a_missing_block_file_is_eio_for_that_block_alone_and_told_once() {
    let folder = tempfile::Builder::new().prefix("hostile").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (root, mountpoint) = (folder.path().join("repo"), folder.path().canonicalize().unwrap().join("mnt"));
    fs::create_dir(&mountpoint).unwrap();
    let vm = root.join("xo-vm-backups").join(VM);
    exploded(&vm.join("vdis/job/vdi/data/a.vhd"), 100);
    fs::write(vm.join("vdis/job/vdi/a.alias.vhd"), "data/a.vhd").unwrap();
    let mut value = metadata(1);
    value["vhds"] = json!({"OpaqueRef:1": "vdis/job/vdi/a.alias.vhd"});
    fs::write(root.join(path(VM, 1)), value.to_string()).unwrap();
    fs::remove_file(vm.join("vdis/job/vdi/data/a.vhd/blocks/0/50")).unwrap();
    let repository = Repository::open(&root, OpenOptions::default()).unwrap();
    let session = mount::mount(repository.clone(), &mountpoint, MountOptions::default()).unwrap();
    let raw = mountpoint.join("by-uuid").join(VM).join("2026-08-01T020003Z/disks/xvda.raw");
    let file = fs::File::open(raw).unwrap();
    for _ in 0..3 {
        for block in (0..100).rev() {
            let mut bytes = vec![0xee; BLOCK];
            match file.read_exact_at(&mut bytes, block * BLOCK as u64) {
                Ok(()) => {
                    assert_ne!(block, 50);
                    assert!(bytes.iter().all(|byte| u64::from(*byte) == block + 1), "block {block}");
                }
                Err(error) => assert_eq!((block, error.raw_os_error()), (50, Some(libc::EIO)), "{error}"),
            }
        }
    }
    let problems = repository.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert_eq!(problems[0].kind, ProblemKind::Read);
    assert!(problems[0].message.contains("block 50") && problems[0].message.contains("missing"), "{problems:?}");
    drop((file, session));
}
