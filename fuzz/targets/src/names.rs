//! Files that say where disks are: aliases, states of merges, metadata of backups.

use std::collections::HashSet;
use std::sync::Arc;

use disk::Disk;
use storage::MemoryStorage;
use xofs::repository::{Backup, DiskSource, OpenOptions, Repository, VmId};

use crate::builder::{BLOCK, Image, Kind, gzip, id, open};

const SIZE: u64 = 4 * BLOCK as u64;

/// An alias: it leads to the disk whose name it holds, or nowhere.
pub fn alias(data: &[u8]) {
    let storage = Arc::new(MemoryStorage::new());
    let places = ["b.vhd", "vdis/c.vhd", "vdis/data/d.vhd", "x y\u{e9}.vhd", "vdis/.e.vhd"];
    for (number, place) in places.iter().enumerate() {
        let byte = u8::try_from(number + 1).expect("few");
        let image = Image::new(u128::from(byte), SIZE, &[(0, byte)]);
        storage.put(place, image.flat()).expect("the name is free");
    }
    storage.put("vdis/x.alias.vhd", data).expect("the name is free");
    let Ok(disk) = open(&storage, "vdis/x.alias.vhd") else { return };
    let mut found = [0; 1];
    disk.read_at(0, &mut found).expect("a sound disk");
    let text = std::str::from_utf8(data).expect("an alias is text");
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
    let mut parts = vec!["vdis"];
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => assert!(parts.pop().is_some(), "'{text}' leads outside"),
            part => parts.push(part),
        }
    }
    assert_eq!(places[usize::from(found[0]) - 1], parts.join("/"), "'{text}'");
}

/// A state of a merge, and a chain of which some blocks were moved.
///
/// A state that says the truth has each disk read right; another one still shows no byte that is not stored there.
pub fn merge_state(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let storage = Arc::new(MemoryStorage::new());
    let moved = u32::from(first % 6);
    let held: Vec<(u32, u8)> = vec![(0, 12), (1, 13), (3, 15)];
    let images = [
        Image::new(1, SIZE, &[(0, 2), (2, 4)]),
        Image::new(2, SIZE, &held).child_of(1, "a.alias.vhd"),
        Image::new(3, SIZE, &[(1, 23)]).child_of(2, "b.alias.vhd"),
    ];
    for (image, name) in images.into_iter().zip(["a", "b", "c"]) {
        image.stored(Kind::Plain).put(&storage, name);
    }
    for (block, _) in held.iter().filter(|(block, _)| *block < moved) {
        let path = |name: &str| format!("data/{name}.vhd/blocks/0/{block}");
        storage.rename(&path("b"), &path("a")).expect("it is there");
    }
    storage.put(".a.alias.vhd.merge.json", data).expect("the name is free");
    let is_true = is_true_state(data);
    for (name, truth) in [("b", [12, 13, 4, 15]), ("c", [12, 23, 4, 15])] {
        match open(&storage, &format!("{name}.alias.vhd")) {
            Err(error) => assert!(!is_true, "{name}: {error}"),
            Ok(disk) => {
                for (block, right) in truth.into_iter().enumerate() {
                    let mut found = vec![0xee; BLOCK];
                    match disk.read_at((block * BLOCK) as u64, &mut found) {
                        Err(error) => assert!(!is_true, "{name}, block {block}: {error}"),
                        Ok(()) if is_true => assert!(found == vec![right; BLOCK], "{name}, block {block}"),
                        Ok(()) => {
                            let byte = found[0];
                            assert!(found == vec![byte; BLOCK], "{name}, block {block} is of two");
                            let is_its = byte == 0 || usize::from(byte % 10) == block + 2;
                            assert!(is_its, "{name}, block {block}: {byte}");
                        }
                    }
                }
            }
        }
    }
}

/// Whether a state names this merge, and no other.
fn is_true_state(data: &[u8]) -> bool {
    let Ok(state) = serde_json::from_slice::<serde_json::Value>(data) else { return false };
    let is_uuid = |of: &str, number: u128| {
        let uuid = state.get(of).and_then(|of| of.get("uuid"));
        uuid.is_none_or(|uuid| uuid.as_str().is_some_and(|text| text == id(number).to_string()))
    };
    let step = state.get("step").is_none_or(|step| matches!(step.as_str(), Some("mergeBlocks" | "cleanup")));
    state.get("chain").is_some_and(|chain| *chain == serde_json::json!(["a.alias.vhd", "b.alias.vhd"]))
        && is_uuid("child", 2)
        && is_uuid("parent", 1)
        && step
}

const VM: &str = "e15d58c8-1c93-4ef2-b5b1-db33d6955ecb";

fn repository(data: &[u8], has_cache: bool) -> Arc<Repository> {
    let storage = Arc::new(MemoryStorage::new());
    let folder = format!("xo-vm-backups/{VM}");
    for (number, name) in [(1_u8, "vdis/j/v/a.vhd"), (2, "vdis/j/w/b.vhd")] {
        let image = Image::new(u128::from(number), SIZE, &[(0, number)]);
        storage.put(&format!("{folder}/{name}"), image.flat()).expect("the name is free");
    }
    storage.put("secret.vhd", Image::new(9, SIZE, &[(0, 9)]).flat()).expect("the name is free");
    let name = format!("{folder}/20260801T020003Z.json");
    storage.put(&name, data).expect("the name is free");
    if has_cache {
        let cache = [format!("{{\"/{name}\":").as_bytes(), data, b"}"].concat();
        storage.put(&format!("{folder}/cache.json.gz"), gzip(&cache)).expect("the name is free");
    }
    let options = OpenOptions { cache_bytes: 1 << 20, ..OpenOptions::default() };
    Repository::with_storage(storage, options).expect("it looks like a repository")
}

/// The metadata of a backup: it is shown the same from XO's cache, its disks have names of their own, and none of them is
/// outside the repository.
pub fn metadata(data: &[u8]) {
    let vm = VmId::new(VM).expect("a uuid");
    let mut found: Vec<Backup> = Vec::new();
    for has_cache in [false, true] {
        let repository = repository(data, has_cache);
        let vms = repository.vms().expect("it can be listed");
        assert!(vms.len() == 1 && vms[0].id == vm && vms[0].name.len() <= 256, "{vms:?}");
        let backups = repository.backups(&vm).expect("it can be listed");
        assert_eq!(backups.len(), 1);
        let backup = &backups[0];
        let names: HashSet<&str> = backup.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names.len(), backup.disks.len(), "two disks of one name: {:?}", backup.disks);
        for disk in backup.disks.iter().take(20) {
            let is_name = !disk.name.is_empty() && !disk.name.contains(['/', '\0']) && disk.name.len() <= 200;
            assert!(is_name && disk.name != "." && disk.name != "..", "'{}'", disk.name);
            assert!(disk.label.len() <= 256 && disk.description.len() <= 256);
            if let Ok(open) = repository.open_disk(backup, disk) {
                let mut byte = [0xee];
                let outcome = open.read_at(0, &mut byte);
                if let (DiskSource::Vhd(path), Ok(())) = (&disk.source, outcome) {
                    let number = if path.file_name() == "a.vhd" { 1 } else { 2 };
                    assert_eq!(byte, [if path.as_str() == "secret.vhd" { 9 } else { number }], "{path}");
                }
            }
            let _ = (repository.chain(backup, disk).is_ok(), repository.missing_blocks(backup, disk).is_ok());
        }
        let _ = (repository.select(VM).is_ok(), repository.problems());
        found.push((**backup).clone());
    }
    assert_eq!(found[0], found[1], "from the file, and from XO's cache");
}
