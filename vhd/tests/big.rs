//! Long chains and huge disks: what is asked of the storage, and how much at once.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::sync::Arc;
use std::time::Duration;

use builder::{BLOCK, Image, Kind, Remote};
use disk::Disk;
use storage::{Fault, FaultyStorage, MemoryStorage, ObjectPath, Operation};
use vhd::{BlockCache, Context};

#[test]
fn over_a_network_the_members_of_a_chain_are_opened_several_at_a_time() {
    let memory = Arc::new(MemoryStorage::new());
    let size = 20 * BLOCK as u64;
    for number in 0..20_u32 {
        let mut image = Image::new(u128::from(number) + 1, size, &[(number, 7)]).stored(Kind::Plain);
        if number > 0 {
            image = image.child_of(u128::from(number), &format!("l{:02}.alias.vhd", number - 1));
        }
        image.put(&memory, &format!("l{number:02}"));
    }
    let storage = Arc::new(FaultyStorage::new(memory));
    // Those after the leaf stay until four are asked for: one after the other, the opening would never end.
    storage.set_rule(|operation, path| {
        let number = path.as_str().split_once('l').and_then(|(_, rest)| rest.get(..2)?.parse::<u32>().ok());
        let is_header = operation == Operation::Read && path.file_name() == "header";
        (is_header && number.is_some_and(|number| (0..19).contains(&number))).then_some(Fault::Stall)
    });
    let releaser = storage.clone();
    let release = std::thread::spawn(move || {
        let four = releaser.wait_for_stalled(4, Duration::from_secs(30));
        releaser.release();
        four
    });
    let context = Context { storage: Arc::new(Remote(storage.clone())), cache: BlockCache::new(1 << 20) };
    let disk = vhd::open(&context, &ObjectPath::new("l19.alias.vhd").unwrap(), None).unwrap();
    assert!(release.join().unwrap(), "the members are opened one after the other");
    // None is opened twice.
    assert_eq!(storage.count(Operation::Read), 20 * 4);
    assert_eq!(disk.leaf().chain_length, 20);
    let mut content = vec![0; 20 * BLOCK];
    disk.read_at(0, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 7));
}

#[test]
fn a_disk_of_16_tib_is_opened_by_reading_a_bit_for_each_block() {
    let storage = Arc::new(FaultyStorage::new({
        let memory = Arc::new(MemoryStorage::new());
        let size = 16 << 40;
        Image { block: 2 << 20, ..Image::new(1, size, &[]).stored(Kind::Plain) }.put(&memory, "huge");
        memory
    }));
    let context = Context { storage: storage.clone(), cache: BlockCache::new(1 << 20) };
    let disk = vhd::open(&context, &ObjectPath::new("huge.alias.vhd").unwrap(), None).unwrap();
    assert_eq!((disk.size(), disk.allocated().unwrap()), (16 << 40, 0));
    // Its 8 MiB are not read whole, as other files are.
    assert_eq!((storage.count(Operation::Read), storage.count(Operation::ReadAt)), (4, 1));
}
