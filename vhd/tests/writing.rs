//! New layers of every format: what they read as, what they are byte for byte, and what is left of them when the power goes,
//! the place is full, or nobody finishes them.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use builder::{BLOCK, Image, Kind, SECTOR, id, open};
use disk::Disk;
use storage::{Fault, FaultyStorage, Loss, MemoryStorage, ObjectPath, Operation, Storage, WritableStorage};
use vhd::{
    BlockIndex, BlockSink, BlockSize, EncodedBlock, ErrorKind, Filter, Format, NewLayer, WholeBlock, Written,
    create_layer, equivalent_size, write_alias,
};

const FORMATS: [Format; 4] =
    [Format::File, Format::Exploded(Filter::None), Format::Exploded(Filter::Gzip), Format::Exploded(Filter::Brotli)];

fn path(path: &str) -> ObjectPath {
    ObjectPath::new(path).unwrap()
}

fn layer_of_blocks(number: u128, size: u64, block: usize) -> NewLayer {
    let block_size = BlockSize::new(u32::try_from(block).unwrap()).unwrap();
    NewLayer::new(id(number), size, 0).unwrap().with_block_size(block_size).unwrap()
}

fn layer(number: u128, size: u64) -> NewLayer {
    layer_of_blocks(number, size, BLOCK)
}

fn encoded(layer: &NewLayer, format: Format, blocks: &[(u32, u8)]) -> Vec<EncodedBlock> {
    let size = layer.block_size();
    let whole = |byte| Arc::new(WholeBlock::copy_of(&vec![byte; size.len()], size).unwrap());
    blocks.iter().map(|(block, byte)| layer.encode(format, BlockIndex(*block), &whole(*byte)).unwrap()).collect()
}

/// The name of a disk and of its data.
fn names(format: Format, name: &str) -> (String, ObjectPath) {
    match format {
        Format::File => (format!("{name}.vhd"), path(&format!("{name}.vhd"))),
        Format::Exploded(_) => (format!("{name}.alias.vhd"), path(&format!("data/{name}.vhd"))),
    }
}

fn begin(storage: &Arc<MemoryStorage>, format: Format, layer: &NewLayer) -> Box<dyn BlockSink> {
    storage.create_directory("data").unwrap();
    create_layer(storage.clone(), format, names(format, "a").1, layer.clone()).unwrap()
}

/// Writes a layer, and the alias of an exploded one.
fn write(
    storage: Arc<dyn WritableStorage>,
    format: Format,
    name: &str,
    layer: &NewLayer,
    blocks: &[EncodedBlock],
) -> vhd::Result<Written> {
    let (name, data) = names(format, name);
    let sink = create_layer(storage.clone(), format, data.clone(), layer.clone())?;
    blocks.iter().try_for_each(|block| sink.store(block))?;
    let written = sink.finish()?;
    if format != Format::File {
        write_alias(&*storage, &path(&name), &data)?;
    }
    Ok(written)
}

fn whole(storage: &Arc<MemoryStorage>, name: &str) -> Vec<u8> {
    let disk = open(storage, name).unwrap();
    let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

/// What a disk of these blocks over `parent` reads as.
fn truth(mut parent: Vec<u8>, size: u64, block: usize, blocks: &[(u32, u8)]) -> Vec<u8> {
    parent.resize(usize::try_from(size).unwrap().next_multiple_of(block), 0);
    for (index, byte) in blocks {
        parent[*index as usize * block..][..block].fill(*byte);
    }
    parent.truncate(usize::try_from(size).unwrap());
    parent
}

/// All files, by their paths.
fn files(storage: &MemoryStorage) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![ObjectPath::root()];
    while let Some(folder) = folders.pop() {
        for entry in storage.list(&folder).unwrap() {
            let path = folder.join(&entry.name).unwrap();
            if entry.is_directory {
                folders.push(path);
            } else {
                files.insert(path.to_string(), storage.read(&path, u64::MAX).unwrap());
            }
        }
    }
    files
}

#[test]
fn a_layer_whose_size_was_not_known_at_first_is_what_it_would_have_been() {
    let (large, small) = (layer(1, 4000 * BLOCK as u64), layer(1, 3 * BLOCK as u64 - 512));
    for format in FORMATS {
        let storage = Arc::new(MemoryStorage::new());
        let mut sink = begin(&storage, format, &large);
        encoded(&large, format, &[(0, 1), (1, 2)]).iter().for_each(|block| sink.store(block).unwrap());
        if format == Format::File {
            assert_eq!(sink.shrink(small.clone()).unwrap_err().kind(), ErrorKind::Unsupported);
            continue;
        }
        for wrong in [layer(2, 3 * BLOCK as u64), layer(1, BLOCK as u64), layer(1, 4001 * BLOCK as u64)] {
            assert_eq!(sink.shrink(wrong).unwrap_err().kind(), ErrorKind::Damaged, "{format:?}");
        }
        sink.shrink(small.clone()).unwrap();
        let written = sink.finish().unwrap();
        let other = Arc::new(MemoryStorage::new());
        other.create_directory("data").unwrap();
        let blocks = encoded(&small, format, &[(0, 1), (1, 2)]);
        assert_eq!(write(other.clone(), format, "a", &small, &blocks).unwrap(), written, "{format:?}");
        WritableStorage::remove(&*other, &path("a.alias.vhd")).unwrap();
        assert_eq!(files(&storage), files(&other), "{format:?}");
    }
}

#[test]
fn what_is_written_is_read_back() {
    let many: Vec<(u32, u8)> = [999, 0, 2049, 1000, 1999, 2000].map(|block| (block, 9)).to_vec();
    let table = [
        (4 * BLOCK as u64, BLOCK, &[(2, 1), (0, 2), (3, 0)][..]),
        (4 * BLOCK as u64 + 1024, BLOCK, &[(4, 5), (0, 1)]),
        (4 * BLOCK as u64 + 1, BLOCK, &[(4, 5)]),
        (4 * BLOCK as u64 - 1, BLOCK, &[]),
        (1, BLOCK, &[(0, 7)]),
        (1, BLOCK, &[]),
        (2050 * 512 - 100, 512, &many),
        ((4 << 20) + 512, 2 << 20, &[(2, 3), (0, 4)]),
    ];
    for format in FORMATS {
        for (size, block, blocks) in table {
            let storage = Arc::new(MemoryStorage::new());
            storage.create_directory("data").unwrap();
            let layer = layer_of_blocks(1, size, block);
            let written = write(storage.clone(), format, "a", &layer, &encoded(&layer, format, blocks)).unwrap();
            let what = format!("{format:?}, {size} in {block}");
            let name = names(format, "a").0;
            assert_eq!(whole(&storage, &name), truth(Vec::new(), size, block, blocks), "{what}");
            let layers = open(&storage, &name).unwrap().layers().unwrap();
            assert_eq!((layers.len(), layers[0].allocated_blocks), (1, blocks.len() as u64), "{what}");

            let mut files = files(&storage);
            files.remove("a.alias.vhd");
            let stored_bytes = files.values().map(|bytes| bytes.len() as u64).sum();
            let count = u32::try_from(blocks.len()).unwrap();
            let size = equivalent_size(layer.block_size(), layer.block_count(), count);
            assert_eq!(written, Written { blocks: count, size, stored_bytes }, "{what}");
            if format == Format::File {
                assert_eq!(stored_bytes, size, "{what}");
            }
        }
    }
}

#[test]
fn a_chain_of_written_layers_reads_as_one_disk() {
    for format in FORMATS {
        let storage = Arc::new(MemoryStorage::new());
        storage.create_directory("data").unwrap();
        let sizes = [4 * BLOCK as u64 + 512, 6 * BLOCK as u64];
        let blocks: [&[(u32, u8)]; 2] = [&[(0, 1), (1, 1), (4, 1)], &[(1, 2), (5, 2), (0, 0)]];
        let base = layer(1, sizes[0]);
        write(storage.clone(), format, "a", &base, &encoded(&base, format, blocks[0])).unwrap();
        let child = layer(2, sizes[1]).child_of(id(1), &names(format, "a").0).unwrap();
        write(storage.clone(), format, "b", &child, &encoded(&child, format, blocks[1])).unwrap();
        let expected = truth(truth(Vec::new(), sizes[0], BLOCK, blocks[0]), sizes[1], BLOCK, blocks[1]);
        let name = names(format, "b").0;
        assert_eq!(whole(&storage, &name), expected, "{format:?}");
        assert_eq!(open(&storage, &name).unwrap().layers().unwrap().len(), 2);
    }
}

// Vectors from Xen Orchestra's own code.
#[test]
fn a_vhd_file_is_byte_for_byte_that_of_xen_orchestra() {
    let storage = Arc::new(MemoryStorage::new());
    let (size, block) = (5 * (2 << 20) + 512, 2 << 20);
    let layer = NewLayer::new(id(1), size, 0).unwrap();
    let blocks = [(0, 1), (3, 2), (5, 3)];
    write(storage.clone(), Format::File, "a", &layer, &encoded(&layer, Format::File, &blocks)).unwrap();
    let bytes = files(&storage).remove("a.vhd").unwrap();
    assert_eq!(bytes.len(), 6_295_552);
    let table = [4, u32::MAX, u32::MAX, 0x1005, u32::MAX, 0x2006].map(u32::to_be_bytes).concat();
    assert_eq!(bytes[1536..2048], [table, vec![0xff; 488]].concat());

    let mut image = Image { block, ..Image::new(1, size, &[]) };
    image.blocks = blocks.map(|(block, byte)| (block, vec![byte; 2 << 20])).to_vec();
    image.blocks[2].1[512..].fill(0);
    assert!(bytes == image.flat());
}

#[test]
fn an_exploded_vhd_is_file_for_file_that_of_xen_orchestra() {
    let kinds = [Kind::Plain, Kind::Gzip, Kind::Brotli];
    for (format, kind) in FORMATS[1..].iter().zip(kinds) {
        let Format::Exploded(filter) = *format else { unreachable!() };
        let (ours, theirs) = (Arc::new(MemoryStorage::new()), MemoryStorage::new());
        ours.create_directory("data").unwrap();
        let size = 2561 * BLOCK as u64;
        let blocks = [(0, 1), (5, 2), (999, 3), (1000, 4), (2560, 5)];
        let layer = layer(2, size).child_of(id(1), "z.alias.vhd").unwrap();
        write(ours.clone(), *format, "a", &layer, &encoded(&layer, *format, &blocks)).unwrap();
        Image::new(2, size, &blocks).child_of(1, "z.alias.vhd").stored(kind).put(&theirs, "a");
        let plain = |storage: &MemoryStorage| {
            let mut files = files(storage);
            for (name, bytes) in &mut files {
                if !name.ends_with(".alias.vhd") && !name.ends_with(".json") {
                    *bytes = filter.decode(bytes, 1 << 20).unwrap();
                }
            }
            files
        };
        let ours = plain(&ours);
        let mut table = vec![0; 2561];
        (table[0], table[124], table[125], table[320]) = (0x84, 0x01, 0x80, 0x80);
        assert_eq!(ours["data/a.vhd/bat"], table);
        assert_eq!(ours["a.alias.vhd"], b"data/a.vhd");
        assert!(ours.contains_key("data/a.vhd/blocks/0/5") && ours.contains_key("data/a.vhd/blocks/2/560"));
        assert!(ours == plain(&theirs), "{format:?}");
    }
}

#[test]
fn a_block_is_taken_once_and_only_if_it_belongs_there() {
    for format in FORMATS {
        let storage = Arc::new(MemoryStorage::new());
        let layer = layer(1, 3 * BLOCK as u64);
        let sink = begin(&storage, format, &layer);
        assert_eq!(sink.format(), format);
        let first = &encoded(&layer, format, &[(1, 1)])[0];
        sink.store(first).unwrap();
        let other_format = FORMATS.into_iter().find(|other| *other != format).unwrap();
        let larger = self::layer(1, 9 * BLOCK as u64);
        let other_size = layer_of_blocks(1, 3 * BLOCK as u64, 2 * BLOCK);
        for refused in [
            first,
            &encoded(&layer, format, &[(1, 2)])[0],
            &encoded(&layer, other_format, &[(0, 1)])[0],
            &encoded(&larger, format, &[(3, 1)])[0],
            &encoded(&other_size, format, &[(0, 1)])[0],
        ] {
            let error = sink.store(refused).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
            assert_eq!(error.path(), &names(format, "a").1);
        }
        // What was refused changed nothing.
        assert_eq!(sink.finish().unwrap().blocks, 1);
        let (name, data) = names(format, "a");
        if format != Format::File {
            write_alias(&*storage, &path(&name), &data).unwrap();
        }
        assert_eq!(whole(&storage, &name), truth(Vec::new(), layer.virtual_size(), BLOCK, &[(1, 1)]), "{format:?}");
    }
}

#[test]
fn several_threads_store_at_once() {
    let blocks: Vec<(u32, u8)> = (0..2100).map(|block| (block, u8::try_from(block % 251).unwrap())).collect();
    for format in FORMATS {
        let storage = Arc::new(MemoryStorage::new());
        let layer = layer_of_blocks(1, 2100 * SECTOR as u64, SECTOR);
        let sink = begin(&storage, format, &layer);
        let next = AtomicU64::new(0);
        let refused = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        // Every block is offered twice, by whichever threads.
                        let at = usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap();
                        let Some(block) = blocks.get(at / 2) else { break };
                        if sink.store(&encoded(&layer, format, &[*block])[0]).is_err() {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!((refused.into_inner(), sink.finish().unwrap().blocks), (2100, 2100));
        let (name, data) = names(format, "a");
        if format != Format::File {
            write_alias(&*storage, &path(&name), &data).unwrap();
        }
        assert!(whole(&storage, &name) == truth(Vec::new(), layer.virtual_size(), SECTOR, &blocks), "{format:?}");
    }
}

#[test]
fn nothing_is_left_of_what_was_not_finished() {
    for format in FORMATS {
        let storage = Arc::new(MemoryStorage::new());
        let layer = layer_of_blocks(1, 1001 * SECTOR as u64, SECTOR);
        let blocks = encoded(&layer, format, &[(0, 1), (1000, 1)]);
        for is_dropped in [true, false] {
            let sink = begin(&storage, format, &layer);
            blocks.iter().for_each(|block| sink.store(block).unwrap());
            assert!(files(&storage).keys().all(|name| format != Format::File || !name.ends_with(".vhd")));
            if is_dropped {
                drop(sink)
            } else {
                sink.discard().unwrap()
            }
            assert!(files(&storage).is_empty());
            assert!(storage.list(&path("data")).unwrap().is_empty());
        }
    }
}

#[test]
fn a_name_that_is_taken_or_no_disk_is_refused_and_nothing_is_removed() {
    for format in FORMATS {
        let storage = Arc::new(MemoryStorage::new());
        storage.create_directory("data").unwrap();
        let layer = layer(1, BLOCK as u64);
        write(storage.clone(), format, "a", &layer, &encoded(&layer, format, &[(0, 1)])).unwrap();
        let before = files(&storage);
        let data = names(format, "a").1;
        assert!(create_layer(storage.clone(), format, data.clone(), layer.clone()).is_err());
        for name in ["b", "b.alias.vhd", ".xofs-new"] {
            let refused = create_layer(storage.clone(), format, path(name), layer.clone());
            assert_eq!(refused.err().unwrap().kind(), ErrorKind::Unsupported, "{name}");
        }
        assert!(create_layer(storage.clone(), format, path("nowhere/b.vhd"), layer.clone()).is_err());
        assert_eq!(files(&storage), before);
    }
}

#[test]
fn a_disk_whose_file_could_be_larger_than_2_tib_is_stored_in_blocks() {
    let storage = Arc::new(MemoryStorage::new());
    storage.create_directory("data").unwrap();
    // The largest disk of a VHD in XAPI is of 2040 GiB.
    for (gib, is_file) in [(2040, true), (2047, true), (2048, false), (3000, false)] {
        let layer = NewLayer::new(id(1), gib << 30, 0).unwrap();
        let file = create_layer(storage.clone(), Format::File, path("a.vhd"), layer.clone());
        assert_eq!(file.err().map(|error| error.kind()), (!is_file).then_some(ErrorKind::Unsupported), "{gib}");
        create_layer(storage.clone(), Format::Exploded(Filter::Brotli), path("data/a.vhd"), layer).unwrap();
    }
}

/// Whether all of the layer is there as it should be; false if it is not there at all.
fn is_there(storage: &Arc<MemoryStorage>, format: Format, expected: &[u8]) -> bool {
    let name = names(format, "a").0;
    if storage.stat(&path(&name)).is_err() {
        return false;
    }
    assert!(whole(storage, &name) == expected, "{format:?}: it opens, but reads wrong");
    true
}

#[test]
fn a_power_cut_at_any_moment_leaves_all_of_a_layer_or_nothing_that_opens() {
    let blocks = [(3, 1), (0, 2), (1000, 3)];
    for format in FORMATS {
        let layer = layer_of_blocks(1, 1001 * SECTOR as u64 - 10, SECTOR);
        let encoded = encoded(&layer, format, &blocks);
        let expected = truth(Vec::new(), layer.virtual_size(), SECTOR, &blocks);
        let mut cut_after = 0;
        loop {
            let memory = Arc::new(MemoryStorage::with_power_cuts());
            memory.create_directory("data").unwrap();
            memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
            let faulty = Arc::new(FaultyStorage::new(memory.clone()));
            let changes = AtomicU64::new(0);
            // The last write is half done; then nothing is.
            faulty.set_rule(move |operation, _| {
                let is_cut = operation.is_change() && changes.fetch_add(1, Ordering::Relaxed) >= cut_after;
                is_cut.then_some(Fault::Half(5))
            });
            let data = names(format, "a").1;
            let finished = create_layer(faulty.clone(), format, data.clone(), layer.clone()).and_then(|sink| {
                encoded.iter().try_for_each(|block| sink.store(block))?;
                sink.finish()
            });
            let is_aliased = finished.is_ok()
                && (format == Format::File || write_alias(&*faulty, &path("a.alias.vhd"), &data).is_ok());
            for seed in 1..=30 {
                let mut random: u64 = (seed ^ cut_after << 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let mut below = |limit| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random % limit
                };
                let left = Arc::new(memory.after_power_cut(|| match (seed, below(3)) {
                    (1, _) | (3.., 0) => Loss::All,
                    (2, _) | (3.., 1) => Loss::None,
                    _ => Loss::Half,
                }));
                println!("{format:?}, cut after {cut_after} changes, seed {seed}");
                assert!(is_there(&left, format, &expected) || !is_aliased);
                if finished.is_ok() && format != Format::File {
                    left.put("a.alias.vhd", "data/a.vhd").unwrap();
                    assert!(is_there(&left, format, &expected));
                }
            }
            if is_aliased {
                break;
            }
            cut_after += 1;
        }
        // All blocks, the other files, and what makes them durable.
        assert!(cut_after >= 8, "{format:?}: {cut_after} changes");
    }
}

#[test]
fn a_full_place_leaves_an_error_that_names_the_file_and_nothing_else() {
    const NO_SPACE: i32 = 28;
    for format in FORMATS {
        let layer = layer_of_blocks(1, 1001 * SECTOR as u64, SECTOR);
        let encoded = encoded(&layer, format, &[(0, 1), (1000, 2)]);
        let is_write = |operation| {
            matches!(
                operation,
                Operation::Write
                    | Operation::WriteAt
                    | Operation::Create
                    | Operation::CreateDirectory
                    | Operation::Sync
            )
        };
        let mut full_after = 0;
        loop {
            let memory = Arc::new(MemoryStorage::new());
            memory.create_directory("data").unwrap();
            let faulty = Arc::new(FaultyStorage::new(memory.clone()));
            let writes = AtomicU64::new(0);
            faulty.set_rule(move |operation, _| {
                let is_full = is_write(operation) && writes.fetch_add(1, Ordering::Relaxed) >= full_after;
                is_full.then_some(Fault::Half(NO_SPACE))
            });
            let data = names(format, "a").1;
            let mut is_stored = true;
            let result = create_layer(faulty.clone(), format, data.clone(), layer.clone()).and_then(|sink| {
                if let Err(error) = encoded.iter().try_for_each(|block| sink.store(block)) {
                    is_stored = false;
                    // With room again it would be a layer that lacks a block.
                    faulty.release();
                    let refused = sink.finish().unwrap_err();
                    assert_eq!((refused.kind(), refused.path()), (ErrorKind::Unavailable, &data));
                    return Err(error);
                }
                sink.finish()
            });
            let Err(error) = result else { break };
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            let names_it = ["a.vhd", "data"].iter().any(|name| error.path().as_str().contains(name))
                || error.path() == &data.parent();
            assert!(names_it && error.to_string().contains("No space left"), "{error}");
            assert_eq!(files(&memory), BTreeMap::new(), "{format:?}, full after {full_after}, stored: {is_stored}");
            assert!(memory.list(&path("data")).unwrap().is_empty(), "{format:?}, full after {full_after}");
            full_after += 1;
        }
        assert!(full_after >= 6, "{format:?}: {full_after} writes");
    }
}

#[test]
fn what_cannot_be_removed_is_said() {
    for format in FORMATS {
        let memory = Arc::new(MemoryStorage::new());
        memory.create_directory("data").unwrap();
        let faulty = Arc::new(FaultyStorage::new(memory.clone()));
        let layer = layer(1, BLOCK as u64);
        let sink = create_layer(faulty.clone(), format, names(format, "a").1, layer.clone()).unwrap();
        sink.store(&encoded(&layer, format, &[(0, 1)])[0]).unwrap();
        faulty.set_rule(|operation, _| (operation == Operation::Remove).then_some(Fault::Errno(5)));
        assert_eq!(sink.discard().unwrap_err().kind(), ErrorKind::Unavailable);
    }
}

#[test]
fn an_alias_leads_to_a_vhd_below_its_folder() {
    let long = |len: usize| format!("v/{}.vhd", "a".repeat(len - 4));
    let (longest, too_long) = (long(1024), long(1025));
    let table = [
        ("v/a.alias.vhd", "v/data/x.vhd", Ok("data/x.vhd")),
        ("a.alias.vhd", "v/x.vhd", Ok("v/x.vhd")),
        ("v/a.alias.vhd", &longest, Ok(&longest[2..])),
        ("v/a.alias.vhd", &too_long, Err(ErrorKind::Unsupported)),
        ("v/a.alias.vhd", "v/data/x", Err(ErrorKind::Unsupported)),
        ("v/a.alias.vhd", "v/data/x.alias.vhd", Err(ErrorKind::Unsupported)),
        ("v/a.alias.vhd", "v/ x.vhd", Err(ErrorKind::Unsupported)),
        ("v/a.alias.vhd", "v", Err(ErrorKind::Unsupported)),
        ("v/a.alias.vhd", "", Err(ErrorKind::Escape)),
        ("v/a.alias.vhd", "w/x.vhd", Err(ErrorKind::Escape)),
        ("v/a.alias.vhd", "vv/x.vhd", Err(ErrorKind::Escape)),
        ("v/a.vhd", "v/x.vhd", Err(ErrorKind::Unsupported)),
        ("v/alias.vhd", "v/x.vhd", Err(ErrorKind::Unsupported)),
    ];
    for (alias, data, expected) in table {
        let storage = MemoryStorage::new();
        storage.create_directory("v").unwrap();
        let written = write_alias(&storage, &path(alias), &path(data)).map_err(|error| error.kind());
        assert_eq!(written, expected.map(|_| ()), "{alias}: {data}");
        let expected = expected.ok().map(|text| (alias.to_owned(), text.as_bytes().to_vec()));
        assert_eq!(files(&storage), expected.into_iter().collect(), "{alias}: {data}");
    }
}
