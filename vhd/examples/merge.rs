//! Makes two images, one built on the other, and merges them: `benches/writing.py` compares how long that takes with others.
//!
//! ```text
//! merge make FOLDER exploded|file BLOCKS     makes them in FOLDER, which must be empty; both hold every block of the disk
//! merge run FOLDER                           merges them; prints the seconds until all of it is durable
//! merge count FOLDER                         merges them; prints how often that synced
//! ```
//!
//! The block files of exploded images are empty: a merge does not look into them.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use storage::{Existing, FaultyStorage, LocalStorage, ObjectPath, Operation, WritableStorage, create_directories};
use uuid::Uuid;
use vhd::{BlockIndex, BlockSize, Control, Filter, Format, Merge, NewLayer, WholeBlock, create_layer, write_alias};

type Failure = Box<dyn std::error::Error>;

const USAGE: &str = "usage: merge make FOLDER exploded|file BLOCKS, or merge run FOLDER, or merge count FOLDER";

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let open = |folder: &str| LocalStorage::open(Path::new(folder)).map(Arc::new);
    match arguments[..] {
        ["make", folder, "exploded", blocks] => make(open(folder)?, Format::Exploded(Filter::None), blocks.parse()?),
        ["make", folder, "file", blocks] => make(open(folder)?, Format::File, blocks.parse()?),
        ["run", folder] => {
            println!("{}", merge(&(open(folder)? as Arc<dyn WritableStorage>))?.as_secs_f64());
            Ok(())
        }
        ["count", folder] => {
            let counted = Arc::new(FaultyStorage::new(open(folder)? as Arc<dyn WritableStorage>));
            merge(&(counted.clone() as Arc<dyn WritableStorage>))?;
            println!("{}", counted.count(Operation::Sync));
            Ok(())
        }
        _ => Err(USAGE.into()),
    }
}

/// Merges all images of the folder into the youngest, with as many threads as `xofs forget --apply` has.
fn merge(storage: &Arc<dyn WritableStorage>) -> Result<Duration, Failure> {
    let root = ObjectPath::root();
    let mut chain: Vec<String> = storage.list(&root)?.into_iter().map(|entry| entry.name).collect();
    chain.retain(|name| name.ends_with(".vhd"));
    chain.sort();
    let threads = if storage.capabilities().is_remote { 16 } else { 4 };
    let start = Instant::now();
    let mut merge = Merge::new(storage, &root, &chain)?;
    merge.run(&Control { threads, barrier: &|| Ok(()), moved: &|_| {}, is_stopped: &|| false })?;
    merge.forget()?;
    Ok(start.elapsed())
}

fn make(storage: Arc<LocalStorage>, format: Format, blocks: u32) -> Result<(), Failure> {
    let storage: Arc<dyn WritableStorage> = storage;
    let uuid = |number: u128| Uuid::from_u128(0x1111_1111_1111_4111_8111_0000_0000_0000 + number);
    let layer = |number| {
        NewLayer::new(uuid(number), BlockSize::DEFAULT.bytes() * u64::from(blocks), 0).map_err(|error| error.reason)
    };
    let name = |number: u32| match format {
        Format::File => format!("{number}.vhd"),
        Format::Exploded(_) => format!("{number}.alias.vhd"),
    };
    let child = layer(2)?.child_of(uuid(1), &name(1)).map_err(|error| error.reason)?;
    for (number, layer) in (1..).zip([layer(1)?, child]) {
        let path = ObjectPath::new(&name(number))?;
        if let Format::Exploded(_) = format {
            let data = ObjectPath::new(&format!("data/{number}.vhd"))?;
            create_directories(&*storage, &data.parent())?;
            create_layer(storage.clone(), format, data.clone(), layer)?.finish()?;
            write_alias(&*storage, &path, &data)?;
            fill(&*storage, &data, blocks)?;
        } else {
            let sink = create_layer(storage.clone(), format, path, layer.clone())?;
            let data = vec![u8::try_from(number)?; BlockSize::DEFAULT.len()];
            let data = Arc::new(WholeBlock::copy_of(&data, BlockSize::DEFAULT).map_err(|error| error.reason)?);
            for block in (0..blocks).map(BlockIndex) {
                sink.store(&layer.encode(format, block, &data).map_err(|error| error.reason)?)?;
            }
            sink.finish()?;
        }
    }
    Ok(storage.sync_tree(&ObjectPath::root(), &storage.mark()?)?)
}

/// Has an empty exploded image hold every block, an empty file each.
fn fill(storage: &dyn WritableStorage, data: &ObjectPath, blocks: u32) -> Result<(), Failure> {
    for block in 0..blocks {
        let folder = data.resolve(&format!("blocks/{}", block / 1000))?;
        if block % 1000 == 0 {
            create_directories(storage, &folder)?;
        }
        storage.write(&folder.join(&(block % 1000).to_string())?, b"", Existing::Refuse)?;
    }
    // As Xen Orchestra does, a byte of room for each bit.
    let mut table = vec![0; usize::try_from(blocks)?];
    (0..table.len()).for_each(|block| table[block / 8] |= 0x80 >> (block % 8));
    Ok(storage.write(&data.join("bat")?, &table, Existing::Replace)?)
}
