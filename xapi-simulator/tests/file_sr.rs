//! A repository of files, judged by the reader of VHDs and by qemu.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use disk::Disk as _;
use storage::{LocalStorage, ObjectPath};
use uuid::Uuid;
use vhd::{BlockCache, Context};
use xapi_simulator::coalesce::coalesce;
use xapi_simulator::content::{Content, digest_of};
use xapi_simulator::file_sr::FileSr;
use xapi_simulator::guest::Guest;
use xapi_simulator::random::{Random, fresh_uuid};
use xapi_simulator::transfer::unhindered;
use xapi_simulator::vhd::{Base, Export};

const BLOCK: u64 = 2 << 20;

/// Reads a disk through the chain of its files.
fn through_files(folder: &Path, name: &str) -> Vec<u8> {
    let storage = Arc::new(LocalStorage::open(folder).unwrap());
    let context = Context { storage, cache: BlockCache::new(1 << 20) };
    let disk = vhd::open(&context, &ObjectPath::new(name).unwrap(), None).unwrap();
    let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

fn check(folder: &Path, disk: &Content, seed: u64) {
    let bytes = through_files(folder, &format!("{}.vhd", disk.leaf().uuid()));
    assert_eq!(bytes.len() as u64, disk.size(), "seed {seed}");
    assert_eq!(digest_of(&bytes), disk.digest(), "seed {seed}");
}

/// Returns the names of the files and their inodes.
fn listing(folder: &Path) -> BTreeMap<String, u64> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().ino())
        })
        .collect()
}

fn names(uuids: &[Uuid]) -> Vec<String> {
    let mut names: Vec<String> = uuids.iter().map(|uuid| format!("{uuid}.vhd")).collect();
    names.sort();
    names
}

fn read(folder: &Path, uuid: Uuid) -> Vec<u8> {
    std::fs::read(folder.join(format!("{uuid}.vhd"))).unwrap()
}

#[test]
fn at_a_snapshot_the_leaf_is_renamed_and_two_leaves_are_made() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut sr = FileSr::new(folder);
    let (live, snapshot) = (fresh_uuid(), fresh_uuid());
    let mut disk = Content::new(live, 4 * BLOCK);
    disk.write(512, b"one sector").unwrap();
    sr.keep([&disk]).unwrap();
    let before = listing(folder);
    assert_eq!(before.keys().cloned().collect::<Vec<_>>(), names(&[live]));
    let file = read(folder, live);
    assert_eq!((&file[28..36], file[85]), (&b"tap\0\0\x01\0\x03"[..], 0));
    // The table at 1536, the batmap with its header, then the block, whose data begins at 4 KiB.
    assert_eq!(&file[1536..1540], &7_u32.to_be_bytes());
    assert_eq!(&file[2048..2056], b"tdbatmap");
    assert_eq!(&file[2056..2064], &2560_u64.to_be_bytes());
    assert_eq!(&file[7 * 512..7 * 512 + 2], &[0b0100_0000, 0]);
    assert_eq!(&file[4096 + 512..4096 + 522], b"one sector");
    assert_eq!(file.len(), 4096 + (2 << 20) + 512);
    assert_eq!(file[..512], file[file.len() - 512..]);

    let taken = disk.snapshot(snapshot);
    disk.write(3 * BLOCK, &[1; 2 << 20]).unwrap();
    sr.keep([&disk, &taken]).unwrap();
    let base = disk.parent().unwrap();
    let after = listing(folder);
    assert_eq!(after.keys().cloned().collect::<Vec<_>>(), names(&[live, snapshot, base]));
    assert_eq!(after[&names(&[base])[0]], before[&names(&[live])[0]]);
    let (base_file, leaf_file) = (read(folder, base), read(folder, live));
    assert_eq!((base_file[85], leaf_file[85]), (1, 0));
    assert_eq!(base_file[68..84], file[68..84]);
    assert_eq!(leaf_file[60..64], [0, 0, 0, 4]);
    // The uuid in the parent's footer, its name, and three more in locators of a sector each, which are given in bytes.
    assert_eq!(leaf_file[512 + 40..512 + 56], base_file[68..84]);
    let name = format!("{base}.vhd");
    let wide: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
    assert_eq!(leaf_file[576..576 + wide.len()], wide);
    for (number, (platform, text)) in [
        (b"MacX", format!("file://./{name}").into_bytes()),
        (b"W2ku", format!(".\\{name}").encode_utf16().flat_map(u16::to_le_bytes).collect()),
        (b"W2ru", format!(".\\{name}").encode_utf16().flat_map(u16::to_le_bytes).collect()),
    ]
    .into_iter()
    .enumerate()
    {
        let at = 512 + 576 + 24 * number;
        assert_eq!(&leaf_file[at..at + 4], platform);
        assert_eq!(leaf_file[at + 4..at + 8], [0, 0, 2, 0]);
        assert_eq!(leaf_file[at + 8..at + 12], u32::try_from(text.len()).unwrap().to_be_bytes());
        let offset = 3072 + 512 * number;
        assert_eq!(leaf_file[at + 16..at + 24], (offset as u64).to_be_bytes());
        assert_eq!(leaf_file[offset..offset + text.len()], text);
    }
    // Its only block is complete.
    assert_eq!(leaf_file[2560], 0b0001_0000);
    check(folder, &disk, 0);
    check(folder, &taken, 0);
}

#[test]
fn qemu_reads_a_base() {
    let folder = tempfile::tempdir().unwrap();
    let mut sr = FileSr::new(folder.path());
    let mut disk = Content::new(fresh_uuid(), 12 << 20);
    for seed in 0..3 {
        Guest::new(seed).work(&mut disk, 6).unwrap();
        sr.keep([&disk]).unwrap();
    }
    let raw = folder.path().join("raw");
    let info = Command::new("qemu-img").arg("info").arg(sr.path(disk.leaf().uuid())).output().unwrap();
    let said = String::from_utf8(info.stdout).unwrap();
    assert!(said.contains("file format: vpc") && said.contains("virtual size: 12 MiB"), "{said}");
    let status = Command::new("qemu-img")
        .args(["convert", "-f", "vpc", "-O", "raw"])
        .args([sr.path(disk.leaf().uuid()), raw.clone()])
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(digest_of(&std::fs::read(raw).unwrap()), disk.digest());
}

#[test]
fn files_hold_what_disks_hold_whatever_happens_to_them() {
    for seed in 0..10 {
        let folder = tempfile::tempdir().unwrap();
        let mut sr = FileSr::new(folder.path());
        let mut random = Random::new(seed);
        let mut disks = vec![Content::new(fresh_uuid(), 3 * BLOCK)];
        for _ in 0..30 {
            match random.below(8) {
                0 | 1 => {
                    let chosen = usize::try_from(random.below(disks.len() as u64)).unwrap();
                    let taken = disks[chosen].snapshot(fresh_uuid());
                    disks.push(taken);
                }
                2 if disks.len() > 1 => {
                    let chosen = usize::try_from(random.below(disks.len() as u64)).unwrap();
                    disks.swap_remove(chosen);
                }
                3 => {
                    let mut all: Vec<&mut Content> = disks.iter_mut().collect();
                    coalesce(&mut all, true);
                }
                4 => {
                    let size = disks[0].size() + BLOCK * random.below(3);
                    if size < 12 * BLOCK {
                        disks[0].grow(size).unwrap();
                    }
                }
                _ => {
                    Guest::new(random.number()).work(&mut disks[0], 3).unwrap();
                }
            }
            if random.below(3) > 0 {
                sr.keep(&disks).unwrap();
                let chosen = usize::try_from(random.below(disks.len() as u64)).unwrap();
                check(folder.path(), &disks[chosen], seed);
            }
        }
        sr.keep(&disks).unwrap();
        let mut expected: Vec<Uuid> = disks.iter().flat_map(|disk| disk.layers()).map(|layer| layer.uuid()).collect();
        expected.sort();
        expected.dedup();
        assert_eq!(listing(folder.path()).into_keys().collect::<Vec<_>>(), names(&expected), "seed {seed}");
        for disk in &disks {
            check(folder.path(), disk, seed);
        }
    }
}

#[test]
fn a_streamed_difference_stands_on_the_file_of_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let mut sr = FileSr::new(folder.path());
    let mut disk = Content::new(fresh_uuid(), 12 << 20);
    Guest::new(1).fill(&mut disk, 50).unwrap();
    let first = disk.snapshot(fresh_uuid());
    Guest::new(2).work(&mut disk, 8).unwrap();
    let second = disk.snapshot(fresh_uuid());
    sr.keep([&first]).unwrap();
    let path = sr.path(first.leaf().uuid());
    let mut stream = Vec::new();
    Export::new(&second, Some(Base { content: &first, path: path.to_str().unwrap() }))
        .send(&mut stream, &mut unhindered)
        .unwrap();
    std::fs::write(folder.path().join("difference.vhd"), stream).unwrap();
    assert_eq!(digest_of(&through_files(folder.path(), "difference.vhd")), second.digest());
}
