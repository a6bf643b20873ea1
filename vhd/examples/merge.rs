//! How fast a merge moves blocks, beside a loop of rename(2) over as many files that ends with as many syncs.
//!
//! usage: merge FOLDER [BLOCKS] [THREADS]      makes and removes its files in FOLDER; prints blocks per second
//!
//! The block files are empty: a merge does not look into them.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use storage::{
    Existing, FaultyStorage, LocalStorage, ObjectPath, Operation, WritableStorage, create_directories, remove_tree,
};
use uuid::Uuid;
use vhd::{Control, Filter, Format, Merge, NewLayer, create_layer, write_alias};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = arguments.first().ok_or("usage: merge FOLDER [BLOCKS] [THREADS]")?;
    let number = |at: usize, otherwise: u32| arguments.get(at).map_or(Ok(otherwise), |text| text.parse::<u32>());
    let (blocks, threads) = (number(1, 20_000)?, number(2, 4)?);
    let local: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(Path::new(folder))?);
    let counted = Arc::new(FaultyStorage::new(local.clone()));
    let storage: Arc<dyn WritableStorage> = counted.clone();
    let root = ObjectPath::new("merge")?;
    remove_tree(&*storage, &root)?;

    let lineage = root.join("lineage")?;
    make(&storage, &lineage, blocks)?;
    let mut merge = Merge::new(&storage, &lineage, &["1.alias.vhd".to_owned(), "2.alias.vhd".to_owned()])?;
    counted.reset_counts();
    let start = Instant::now();
    let control = Control { threads: threads as usize, barrier: &|| Ok(()), moved: &|_| {}, is_stopped: &|| false };
    merge.run(&control)?;
    merge.forget()?;
    let merged = start.elapsed();
    let syncs = counted.count(Operation::Sync);

    let plain = root.join("plain")?;
    make(&storage, &plain, blocks)?;
    let (from, to) = (plain.join("data")?.join("2.vhd")?, plain.join("data")?.join("1.vhd")?);
    for thousand in 0..blocks.div_ceil(1000) {
        create_directories(&*local, &to.resolve(&format!("blocks/{thousand}"))?)?;
    }
    let root_path = Path::new(folder);
    let start = Instant::now();
    for block in 0..blocks {
        let name = format!("blocks/{}/{}", block / 1000, block % 1000);
        std::fs::rename(root_path.join(from.resolve(&name)?.as_str()), root_path.join(to.resolve(&name)?.as_str()))?;
    }
    for _ in 0..syncs {
        local.write(&plain.join("file")?, b"1", Existing::Replace)?;
        local.sync(&plain.join("file")?)?;
    }
    remove_tree(&*local, &from)?;
    let renamed = start.elapsed();
    remove_tree(&*storage, &root)?;
    let rate = |elapsed: std::time::Duration| f64::from(blocks) / elapsed.as_secs_f64();
    println!(
        "{blocks} blocks, {syncs} syncs: merged {:.0}/s, rename(2) and as many syncs {:.0}/s, {:.2} of it",
        rate(merged),
        rate(renamed),
        rate(merged) / rate(renamed)
    );
    Ok(())
}

/// Makes an empty image and a child of it that holds every block.
fn make(storage: &Arc<dyn WritableStorage>, lineage: &ObjectPath, blocks: u32) -> Result<(), Error> {
    create_directories(&**storage, &lineage.join("data")?)?;
    let format = Format::Exploded(Filter::None);
    let size = u64::from(blocks) << 21;
    let uuid = |number: u128| Uuid::from_u128(0x1111_1111_1111_4111_8111_0000_0000_0000 + number);
    let layer = |number| NewLayer::new(uuid(number), size, 0).map_err(|error| error.reason);
    let child = layer(2)?.child_of(uuid(1), "1.alias.vhd").map_err(|error| error.reason)?;
    let layers = [layer(1)?, child];
    for (number, layer) in (1..).zip(layers) {
        let data = lineage.join("data")?.join(&format!("{number}.vhd"))?;
        create_layer(storage.clone(), format, data.clone(), layer)?.finish()?;
        write_alias(&**storage, &lineage.join(&format!("{number}.alias.vhd"))?, &data)?;
    }
    let child = lineage.join("data")?.join("2.vhd")?;
    for block in 0..blocks {
        let folder = child.join("blocks")?.join(&(block / 1000).to_string())?;
        if block % 1000 == 0 {
            create_directories(&**storage, &folder)?;
        }
        storage.write(&folder.join(&(block % 1000).to_string())?, b"", Existing::Refuse)?;
    }
    let bits = vec![0xff; usize::try_from(blocks / 8)?];
    let table = [bits, vec![0; usize::try_from(blocks - blocks / 8)?]].concat();
    storage.write(&child.join("bat")?, &table, Existing::Replace)?;
    Ok(storage.sync_tree(lineage)?)
}
