//! Chains of which one file is damaged at random: what is read is the truth or an error, soon, and in little memory.
//!
//! Every sector of every block of a chain is unlike all others. Where a checksum covers what was changed (footer, header,
//! gzip, authenticated encryption), or nothing but a length changed, each sector read must be the true one or an error.
//! Where none does (tables, sector bitmaps, blocks stored as they are), a sector must at least be one that is stored.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use builder::{BLOCK, Image, Kind, SECTOR, id};
use disk::Disk;
use rustix::process::{Resource, Rlimit, setrlimit};
use storage::{EncryptedStorage, EncryptionKey, MemoryStorage, ObjectPath, Storage};
use vhd::{BlockCache, ChainDisk, Context};

const BLOCKS: usize = 6;
const SIZE: usize = BLOCKS * BLOCK;
/// Opening one chain and reading all of it takes milliseconds; nothing that waits for a change stays below this.
const LONGEST: Duration = Duration::from_secs(4);
/// Address space of the whole test: one allocation by an unchecked length exceeds it, and ends the process.
const ADDRESS_SPACE: u64 = 3 << 30;
const KEY: &str = "0123456789abcdef0123456789abcdef";

/// Numbers that look random and are the same in each run.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 11).unwrap() % limit.max(1)
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.next() >> 56).unwrap()
    }
}

/// What is done to the bytes of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    FlipOne,
    FlipSome,
    Fill,
    Huge,
    Truncate,
    Append,
    Insert,
    Remove,
    Exchange,
    Swap,
}

const ACTS: [Act; 10] = [
    Act::FlipOne,
    Act::FlipSome,
    Act::Fill,
    Act::Huge,
    Act::Truncate,
    Act::Append,
    Act::Insert,
    Act::Remove,
    Act::Exchange,
    Act::Swap,
];

/// A file that was changed.
#[derive(Debug)]
struct Mutation {
    act: Act,
    path: String,
    /// The bytes that were overwritten.
    range: std::ops::Range<usize>,
}

/// How a chain is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Plain(Kind),
    Encrypted(Kind),
}

/// The files of a chain, and what it holds.
struct Chain {
    style: Style,
    files: Vec<(String, Vec<u8>)>,
    /// Files that are there and never changed.
    fixed: Vec<(String, Vec<u8>)>,
    leaf: &'static str,
    truth: Vec<u8>,
    stored: HashSet<Vec<u8>>,
}

/// A block whose sectors say whose they are.
fn block(layer: u8, index: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK);
    let mut random = Random::new(u64::from(layer) * 1000 + u64::from(index));
    for sector in 0..u8::try_from(BLOCK / SECTOR).unwrap() {
        let start = bytes.len();
        bytes.extend([layer, u8::try_from(index).unwrap(), sector]);
        // Half of it compresses.
        bytes.extend((0..SECTOR / 2).map(|_| random.byte()));
        bytes.resize(start + SECTOR, layer);
    }
    bytes
}

fn files(storage: &MemoryStorage, folder: &ObjectPath, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in storage.list(folder).unwrap() {
        let path = folder.join(&entry.name).unwrap();
        if entry.is_directory {
            files(storage, &path, found);
        } else {
            found.push((path.as_str().to_owned(), storage.read(&path, 1 << 20).unwrap()));
        }
    }
}

fn seal(bytes: &[u8], number: usize) -> Vec<u8> {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, KEY.as_bytes()).unwrap());
    let mut nonce = [7; 12];
    nonce[..8].copy_from_slice(&number.to_be_bytes());
    let mut sealed = bytes.to_vec();
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut sealed).unwrap();
    [&nonce[..], &sealed].concat()
}

impl Chain {
    /// A chain of three layers of which each holds blocks that another one has too.
    fn new(style: Style) -> Self {
        let (Style::Plain(kind) | Style::Encrypted(kind)) = style;
        let ending = if kind == Kind::Flat { "vhd" } else { "alias.vhd" };
        let layers: [(&str, &[u32]); 3] = [("oldest", &[0, 1, 5]), ("middle", &[4, 1]), ("newest", &[2, 4])];
        let memory = MemoryStorage::new();
        let mut truth = vec![0; SIZE];
        let mut stored = HashSet::from([vec![0; SECTOR]]);
        for (number, (name, held)) in (1..).zip(layers) {
            let mut image = Image::new(number, SIZE as u64, &[]).stored(kind);
            image.blocks = held.iter().map(|index| (*index, block(u8::try_from(number).unwrap(), *index))).collect();
            for (index, bytes) in &image.blocks {
                truth[*index as usize * BLOCK..][..BLOCK].copy_from_slice(bytes);
                stored.extend(bytes.chunks(SECTOR).map(<[u8]>::to_vec));
            }
            if number > 1 {
                let below = layers[usize::try_from(number).unwrap() - 2].0;
                image = image.child_of(number - 1, &format!("{below}.{ending}"));
            }
            image.put(&memory, name);
        }
        let mut found = Vec::new();
        files(&memory, &ObjectPath::root(), &mut found);
        let mut fixed = Vec::new();
        if let Style::Encrypted(_) = style {
            for (number, (_, bytes)) in found.iter_mut().enumerate() {
                *bytes = seal(bytes, number);
            }
            fixed.push(("encryption.json".to_owned(), br#"{"algorithm":"chacha20-poly1305"}"#.to_vec()));
            fixed.push(("metadata.json".to_owned(), seal(br#"{"random":"x"}"#, 1 << 20)));
        }
        found.sort();
        let leaf = if kind == Kind::Flat { "newest.vhd" } else { "newest.alias.vhd" };
        Self { style, files: found, fixed, leaf, truth, stored }
    }

    /// Puts it into a storage with one file changed.
    fn mutated(&self, seed: u64) -> (Arc<MemoryStorage>, Mutation) {
        let mut random = Random::new(seed);
        let memory = MemoryStorage::new();
        let victim = random.below(self.files.len());
        let other = random.below(self.files.len());
        let (path, bytes) = &self.files[victim];
        let mut bytes = bytes.clone();
        let act = ACTS[random.below(ACTS.len())];
        let range = change(act, &mut bytes, &mut random);
        for (index, (name, content)) in self.fixed.iter().chain(&self.files).enumerate() {
            let index = index.checked_sub(self.fixed.len());
            let content = match index {
                Some(index) if index == victim && act == Act::Swap => &self.files[other].1,
                Some(index) if index == other && act == Act::Swap => &self.files[victim].1,
                Some(index) if index == victim && act == Act::Remove => continue,
                Some(index) if index == victim => &bytes,
                _ => content,
            };
            memory.put(name, content.clone()).unwrap();
        }
        (Arc::new(memory), Mutation { act, path: path.clone(), range })
    }

    fn open(&self, memory: &Arc<MemoryStorage>, cache_bytes: u64) -> Result<ChainDisk, String> {
        let storage: Arc<dyn Storage> = match self.style {
            Style::Plain(_) => memory.clone(),
            Style::Encrypted(_) => {
                EncryptedStorage::detect(memory.clone(), Some(EncryptionKey::from_text(KEY).unwrap())).unwrap()
            }
        };
        let context = Context { storage, cache: BlockCache::new(cache_bytes) };
        vhd::open(&context, &ObjectPath::new(self.leaf).unwrap(), None).map_err(|error| error.to_string())
    }

    /// Whether nothing but the truth may be read, because a checksum or the length tells.
    fn is_strict(&self, mutation: &Mutation) -> bool {
        let changes_only_length = matches!(mutation.act, Act::Truncate | Act::Append | Act::Remove);
        match (self.style, mutation.act) {
            // Files that are sound each for itself, at each other's places, only contradict each other at times.
            (_, Act::Swap) => false,
            (Style::Encrypted(_) | Style::Plain(Kind::Gzip), _) => true,
            (Style::Plain(Kind::Brotli), _) => changes_only_length,
            (Style::Plain(Kind::Plain), act) => {
                let is_sum = mutation.path.ends_with("/footer") || mutation.path.ends_with("/header");
                changes_only_length
                    || mutation.path.ends_with(".alias.vhd")
                    || (is_sum && matches!(act, Act::FlipOne | Act::Fill | Act::Huge))
            }
            (Style::Plain(Kind::Flat), act) => {
                // The sums of footer and header do not notice that bytes changed their places.
                let is_sum = mutation.range.end <= 1536 && matches!(act, Act::FlipOne | Act::Fill | Act::Huge);
                changes_only_length || is_sum
            }
        }
    }

    /// Reads all of a mutated chain, twice, and compares.
    fn check(&self, seed: u64) {
        let start = Instant::now();
        let (memory, mutation) = self.mutated(seed);
        let told = || format!("{:?}, seed {seed}: {mutation:?}", self.style);
        let mut stored = self.stored.clone();
        for (path, bytes) in &self.files {
            if self.style == Style::Plain(Kind::Flat) || *path == mutation.path {
                stored.extend(bytes.chunks_exact(SECTOR).map(<[u8]>::to_vec));
            }
        }
        if let Ok(bytes) = memory.read(&ObjectPath::new(&mutation.path).unwrap(), 1 << 20) {
            stored.extend(bytes.chunks_exact(SECTOR).map(<[u8]>::to_vec));
        }
        let is_strict = self.is_strict(&mutation);
        let is_block = mutation.path.contains("/blocks/") && mutation.act != Act::Swap;
        let hit = is_block.then(|| mutation.path.rsplit('/').next().unwrap().to_owned());
        let disk = match self.open(&memory, if seed.is_multiple_of(2) { 0 } else { 1 << 20 }) {
            Ok(disk) => disk,
            Err(error) => {
                assert!(hit.is_none(), "{}: a block must not keep the disk from opening: {error}", told());
                assert!(error.contains('\'') && error.len() < 4096, "{}: no object is named: {error}", told());
                assert!(start.elapsed() < LONGEST, "{}: took {:?}", told(), start.elapsed());
                return;
            }
        };
        if is_strict || hit.is_some() {
            assert_eq!(disk.size(), SIZE as u64, "{}", told());
        }
        let size = usize::try_from(disk.size()).unwrap();
        for round in 0..2 {
            for (index, at) in (0..size.min(2 * SIZE)).step_by(BLOCK).enumerate() {
                let mut bytes = vec![0xee; BLOCK.min(size - at)];
                let is_hit = hit.as_ref().is_some_and(|hit| *hit == index.to_string());
                if let Err(error) = disk.read_at(at as u64, &mut bytes) {
                    assert!(hit.is_none() || is_hit, "{}: block {index} is sound: {error}", told());
                    assert!(error.to_string().contains(".vhd"), "{}: no object is named: {error}", told());
                    continue;
                }
                let is_sound = hit.is_some() && !is_hit;
                if is_strict || is_sound {
                    assert!(bytes == self.truth[at..][..bytes.len()], "{}: block {index}, round {round}", told());
                } else if self.style != Style::Plain(Kind::Brotli) {
                    for sector in bytes.chunks_exact(SECTOR) {
                        assert!(stored.contains(sector), "{}: block {index} was invented: {sector:?}", told());
                    }
                }
            }
        }
        // Whatever they answer.
        let _ = (disk.layers().is_ok(), disk.missing_blocks().is_ok(), disk.allocated().is_ok());
        assert!(disk::data_ranges(&disk).take(1000).all(|range| range.is_ok()), "{}", told());
        assert!(start.elapsed() < LONGEST, "{}: took {:?}", told(), start.elapsed());
    }
}

/// Changes the bytes of a file; returns which were overwritten, for acts that keep the length.
fn change(act: Act, bytes: &mut Vec<u8>, random: &mut Random) -> std::ops::Range<usize> {
    let len = bytes.len();
    let at = random.below(len);
    let whole = 0..len;
    match act {
        Act::FlipOne => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
            at..at + 1
        }
        Act::FlipSome => {
            for _ in 0..2 + random.below(20) {
                let at = random.below(len);
                bytes[at] ^= 1 << random.below(8);
            }
            whole
        }
        Act::Fill | Act::Huge => {
            // Half of the fields of a footer or header are aligned.
            let width = [1, 2, 4, 8, 16][random.below(5)];
            let at = if random.below(2) == 0 { at } else { at / width * width };
            let end = (at + width).min(len);
            let fill = if random.below(2) == 0 { 0 } else { 0xff };
            bytes[at..end].fill(fill);
            if act == Act::Huge {
                bytes[at] = 0x7f;
            }
            at..end
        }
        Act::Truncate => {
            bytes.truncate(at);
            whole
        }
        Act::Append => {
            let zeroes = random.below(2) == 0;
            bytes.extend((0..1 + random.below(3000)).map(|_| if zeroes { 0 } else { 1 | random.byte() }));
            whole
        }
        Act::Insert => {
            let count = [1, 4, SECTOR, 1 + random.below(600)][random.below(4)];
            let noise: Vec<u8> = (0..count).map(|_| random.byte()).collect();
            bytes.splice(at..at, noise);
            whole
        }
        Act::Exchange => {
            let width = [1, 4, 16, SECTOR][random.below(4)].min(len / 2);
            let (first, second) = (random.below(len - 2 * width + 1), random.below(len - 2 * width + 1));
            let (first, second) = (first.min(second), first.max(second).max(first.min(second) + width));
            let (head, tail) = bytes.split_at_mut(second);
            head[first..first + width].swap_with_slice(&mut tail[..width]);
            whole
        }
        Act::Remove | Act::Swap => whole,
    }
}

/// Checks that many seeds, several at a time: a chain that does not open waits for a moment before it says so.
fn check_all(count: u64, check: impl Fn(u64) + Sync) {
    setrlimit(Resource::As, Rlimit { current: Some(ADDRESS_SPACE), maximum: None }).unwrap();
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        return;
                    }
                    check(seed);
                }
            });
        }
    });
}

#[test]
fn a_chain_without_damage_reads_as_it_was_written() {
    for kind in [Kind::Flat, Kind::Plain, Kind::Gzip, Kind::Brotli] {
        for style in [Style::Plain(kind), Style::Encrypted(kind)] {
            let chain = Chain::new(style);
            let memory = Arc::new(MemoryStorage::new());
            chain.fixed.iter().chain(&chain.files).for_each(|(path, bytes)| memory.put(path, bytes.clone()).unwrap());
            let disk = match chain.open(&memory, 1 << 20) {
                Err(error) if style == Style::Encrypted(Kind::Flat) => {
                    assert!(error.contains("encrypted"), "{error}");
                    continue;
                }
                disk => disk.unwrap(),
            };
            let mut bytes = vec![0xee; SIZE];
            disk.read_at(0, &mut bytes).unwrap();
            assert!(bytes == chain.truth, "{style:?}");
        }
    }
}

#[test]
fn one_damaged_vhd_file_of_a_chain_is_read_right_or_refused() {
    let chain = Chain::new(Style::Plain(Kind::Flat));
    check_all(1200, |seed| chain.check(seed));
}

#[test]
fn one_damaged_file_of_exploded_vhds_is_read_right_or_refused() {
    let chain = Chain::new(Style::Plain(Kind::Plain));
    check_all(800, |seed| chain.check(seed));
}

#[test]
fn damage_in_a_gzip_stream_never_becomes_other_bytes() {
    let chain = Chain::new(Style::Plain(Kind::Gzip));
    check_all(1500, |seed| chain.check(seed));
}

#[test]
fn damage_in_a_brotli_stream_costs_its_own_block_at_most() {
    let chain = Chain::new(Style::Plain(Kind::Brotli));
    check_all(800, |seed| chain.check(seed));
}

#[test]
fn damage_in_an_encrypted_file_never_becomes_other_bytes() {
    for kind in [Kind::Plain, Kind::Brotli] {
        let chain = Chain::new(Style::Encrypted(kind));
        check_all(500, |seed| chain.check(seed));
    }
}

/// Target `newest` over base `middle`, half of whose merge is done, and `later` above both.
fn interrupted() -> (Arc<MemoryStorage>, Vec<u8>) {
    let storage = Arc::new(MemoryStorage::new());
    let image = |number: u8, held: &[u32]| {
        let mut image = Image::new(number.into(), SIZE as u64, &[]).stored(Kind::Plain);
        image.blocks = held.iter().map(|index| (*index, block(number, *index))).collect();
        image
    };
    image(1, &[0, 3, 5]).put(&storage, "middle");
    image(2, &[0, 1, 2, 3]).child_of(1, "middle.alias.vhd").put(&storage, "newest");
    image(3, &[4]).child_of(2, "newest.alias.vhd").put(&storage, "later");
    let mut truth = vec![0; SIZE];
    for (layer, index) in [(1, 5), (2, 0), (2, 1), (2, 2), (2, 3), (3, 4)] {
        truth[index as usize * BLOCK..][..BLOCK].copy_from_slice(&block(layer, index));
    }
    for index in 0..2 {
        let path = |name: &str| format!("data/{name}.vhd/blocks/0/{index}");
        storage.rename(&path("newest"), &path("middle")).unwrap();
    }
    (storage, truth)
}

#[test]
fn a_damaged_state_of_a_merge_never_gives_bytes_of_another_backup() {
    let state = format!(
        "{{\"child\":{{\"uuid\":\"{}\"}},\"parent\":{{\"uuid\":\"{}\"}},\"chain\":[\"middle.alias.vhd\",\
         \"newest.alias.vhd\"],\"currentBlock\":1,\"mergedDataSize\":0,\"step\":\"mergeBlocks\",\"diskSize\":0}}",
        id(2),
        id(1)
    );
    let (_, truth) = interrupted();
    let name = ObjectPath::new("later.alias.vhd").unwrap();
    let read = |state: &[u8], seed: u64| {
        let (storage, _) = interrupted();
        storage.put(".middle.alias.vhd.merge.json", state).unwrap();
        let start = Instant::now();
        let mut right = 0;
        if let Ok(disk) = vhd::open(&Context { storage, cache: BlockCache::new(1 << 20) }, &name, None) {
            for at in (0..SIZE).step_by(BLOCK) {
                let mut bytes = vec![0xee; BLOCK];
                if disk.read_at(at as u64, &mut bytes).is_ok() {
                    assert!(bytes == truth[at..at + BLOCK], "seed {seed}: block {}", at / BLOCK);
                    right += 1;
                }
            }
        }
        assert!(start.elapsed() < LONGEST, "seed {seed}: {:?}", start.elapsed());
        right
    };
    assert_eq!(read(state.as_bytes(), 0), BLOCKS);
    check_all(600, |seed| {
        let mut random = Random::new(seed);
        let mut bytes = state.clone().into_bytes();
        let act = ACTS[random.below(7)];
        change(act, &mut bytes, &mut random);
        read(&bytes, seed);
    });
}
