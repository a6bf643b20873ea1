//! A repository with a truth: random chains of every kind, faults, and merges as Xen Orchestra makes them, against flat
//! arrays. Who reads it gets the right bytes, or an error where one is due.
//!
//! ```text
//! choices (a seed, or a fuzzer's bytes)
//!   ├─ layers    sizes, holes, codecs, sector bitmaps; the truth of each is the flat array it leaves
//!   ├─ faults    some operations fail: an error or the right bytes; all right once they are over
//!   └─ merges    XO's writes one by one, between reads or in the middle of one; later disks read right throughout
//! ```
//!
//! Two kinds of worlds: in a free one anything goes (disks shrink, kinds are mixed, blocks are partial, there is garbage
//! past the end); one of XO is as XO writes it, and only there it merges.

mod merge;

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use disk::{Disk, ErrorKind};
use storage::{EncryptedStorage, EncryptionKey, Fault, FaultyStorage, MemoryStorage, ObjectPath, Operation, Storage};
use vhd::{BlockCache, ChainDisk, Context, DiskType, Footer, Liveness};

use crate::builder::{Image, Kind, Remote, SECTOR};

/// While files change, a read is tried again for so long; on a machine that is busy with other things that may not do.
const PATIENCE: Duration = Duration::from_secs(5);
const KEY: &str = "0123456789abcdef0123456789abcdef";

/// Where a world comes from: numbers that look random and are the same for the same seed, or a fuzzer's bytes.
pub struct Choices {
    random: u64,
    bytes: Option<VecDeque<u8>>,
}

impl Choices {
    /// The choices of a seed.
    pub fn of_seed(seed: u64) -> Self {
        // Neighbouring seeds must not begin alike.
        let mut choices = Self { random: (seed ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, bytes: None };
        choices.below(2);
        choices.below(2);
        choices
    }

    /// The choices of bytes; where they end, each choice is the first.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self { random: 1, bytes: Some(bytes.iter().copied().collect()) }
    }

    fn below(&mut self, limit: usize) -> usize {
        if let Some(bytes) = &mut self.bytes {
            let mut number = usize::from(bytes.pop_front().unwrap_or(0));
            if limit > 256 {
                number = number << 8 | usize::from(bytes.pop_front().unwrap_or(0));
            }
            return number % limit;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random >> 11).unwrap() % limit
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == count - 1
    }
}

/// One disk image of a world.
struct Layer {
    image: Image,
    /// Its bytes, if it is a VHD file.
    file: Vec<u8>,
    /// What it is called: the VHD file or the alias.
    name: String,
    /// The folder of an exploded one.
    folder: String,
    /// What its disk reads as.
    truth: Vec<u8>,
}

struct World {
    memory: Arc<MemoryStorage>,
    faulty: Arc<FaultyStorage>,
    context: Context,
    is_encrypted: bool,
    /// Whether no metadata belongs to the disks.
    is_loose: bool,
    layers: Vec<Layer>,
    removed: Arc<Mutex<HashSet<String>>>,
}

/// A disk that somebody has open.
struct Opened {
    disk: ChainDisk,
    name: String,
    truth: Vec<u8>,
}

/// What a backup is to a disk: the metadata that XO removes first.
struct Backup {
    name: String,
    removed: Arc<Mutex<HashSet<String>>>,
}

impl Liveness for Backup {
    fn is_alive(&self) -> storage::Result<bool> {
        Ok(!self.removed.lock().unwrap().contains(&self.name))
    }
}

/// Encrypts what a file of an encrypted repository holds.
fn stored(is_encrypted: bool, bytes: &[u8]) -> Vec<u8> {
    if !is_encrypted {
        return bytes.to_vec();
    }
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, KEY.as_bytes()).unwrap());
    let nonce = *b"not a secret";
    let mut sealed = bytes.to_vec();
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut sealed).unwrap();
    [&nonce[..], &sealed].concat()
}

/// The content of a block; no two sectors of a world are alike, but some are empty.
fn content(layer: usize, block: u32, len: usize, choices: &mut Choices) -> Vec<u8> {
    let (seed, style) = (choices.below(256), choices.below(8));
    let mut bytes = vec![0; len];
    for (index, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        if style == 0 || (style == 1 && index % 2 == 0) {
            continue;
        }
        let mut state = (layer as u64) << 48 | u64::from(block) << 32 | (index as u64) << 16 | seed as u64 | 1 << 60;
        for word in sector.chunks_mut(8) {
            // Half of the blocks do not compress.
            if style >= 4 {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            }
            word.copy_from_slice(&state.to_be_bytes()[..word.len()]);
        }
    }
    bytes
}

impl World {
    fn new(choices: &mut Choices) -> (Self, bool) {
        let is_of_xo = choices.below(2) == 0;
        let is_encrypted = choices.one_in(5);
        let is_remote = choices.one_in(3);
        let is_loose = choices.one_in(4);
        let memory = Arc::new(MemoryStorage::new());
        let faulty = Arc::new(FaultyStorage::<dyn storage::Storage>::new(memory.clone()));
        let mut storage: Arc<dyn Storage> = faulty.clone();
        if is_remote {
            storage = Arc::new(Remote(storage));
        }
        if is_encrypted {
            memory.put("encryption.json", r#"{"algorithm":"chacha20-poly1305"}"#).unwrap();
            memory.put("metadata.json", stored(true, br#"{"random":"x"}"#)).unwrap();
            storage = EncryptedStorage::detect(storage, Some(EncryptionKey::from_text(KEY).unwrap())).unwrap();
        }
        // Sometimes too small for what is read.
        let cache = BlockCache::new([1 << 20, 1 << 20, 6000, 0][choices.below(4)]);
        let context = Context { storage, cache };
        let mut world =
            Self { memory, faulty, context, is_encrypted, is_loose, layers: Vec::new(), removed: Arc::default() };
        world.fill(is_of_xo, choices);
        (world, is_of_xo)
    }

    fn fill(&mut self, is_of_xo: bool, choices: &mut Choices) {
        let block = SECTOR << choices.below(5);
        let kinds = [Kind::Plain, Kind::Flat, Kind::Gzip, Kind::Brotli];
        let pick = |choices: &mut Choices, is_encrypted: bool| match kinds[choices.below(4)] {
            // XO writes no VHD file into an encrypted repository.
            Kind::Flat if is_encrypted => Kind::Plain,
            kind => kind,
        };
        let kind_of_all = pick(choices, self.is_encrypted);
        let mut size = SECTOR * (1 + choices.below(40));
        for number in 0..1 + choices.below(6) {
            let kind = if is_of_xo { kind_of_all } else { pick(choices, self.is_encrypted) };
            if !is_of_xo {
                size = SECTOR * (1 + choices.below(40)) + choices.below(2) * 5 * block;
                // Tools other than XO do not count in sectors.
                size += if choices.one_in(4) { choices.below(SECTOR) } else { 0 };
            } else if number > 0 && kind == Kind::Flat && choices.one_in(3) {
                // Past a sector of the table at times; an exploded one must not grow, XO destroys it when it merges.
                size += SECTOR * choices.below(12) + if choices.one_in(4) { 130 * block } else { 0 };
            }
            let is_fixed = !is_of_xo && number == 0 && kind == Kind::Flat && choices.one_in(4);
            self.add(number, kind, size, block, is_of_xo, is_fixed, choices);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "each is a choice")]
    fn add(
        &mut self,
        number: usize,
        kind: Kind,
        size: usize,
        block: usize,
        is_of_xo: bool,
        is_fixed: bool,
        choices: &mut Choices,
    ) {
        let mut image = Image::new(number as u128 + 1, size as u64, &[]).stored(kind);
        image.block = block;
        let mut truth = Vec::new();
        if let Some(below) = self.layers.last() {
            image = image.child_of(number as u128, &below.name);
            truth.clone_from(&below.truth);
        }
        truth.resize(size, 0);
        let name = format!("l{number}.{}", if kind == Kind::Flat { "vhd" } else { "alias.vhd" });
        let folder = format!("data/l{number}.vhd");
        if is_fixed {
            truth = content(number, 0, size, choices);
            let mut footer = Footer::parse(&image.footer()).unwrap();
            (footer.disk_type, footer.data_offset) = (DiskType::Fixed, u64::MAX);
            let file = [&truth[..], &footer.to_bytes()].concat();
            self.memory.put(&name, file).unwrap();
            self.layers.push(Layer { image, file: Vec::new(), name, folder, truth });
            return;
        }
        let density = 1 + choices.below(5);
        let mut bitmaps = Vec::new();
        for index in 0..size.div_ceil(block) {
            if choices.below(density) != 0 {
                continue;
            }
            let number_of_block = u32::try_from(index).unwrap();
            let start = index * block;
            let end = size.min(start + block);
            let mut bytes = content(number, number_of_block, block, choices);
            let mut bitmap = image.bitmap();
            let is_partial = !is_of_xo && choices.one_in(4);
            if is_partial {
                bitmap
                    .iter_mut()
                    .take(block.div_ceil(8 * SECTOR))
                    .for_each(|byte| *byte = low_byte(choices.below(256)));
            }
            for (sector, bytes) in bytes.chunks_mut(SECTOR).enumerate() {
                // XO ignores the bitmaps of exploded VHDs, and so does who reads them.
                let is_own = kind != Kind::Flat || bitmap[sector / 8] & (0x80 >> (sector % 8)) != 0;
                let at = start + sector * SECTOR;
                if is_own && at < end {
                    let len = SECTOR.min(end - at);
                    truth[at..at + len].copy_from_slice(&bytes[..len]);
                }
            }
            if is_of_xo {
                bytes[end - start..].fill(0);
            }
            let place = if choices.one_in(3) { choices.below(image.blocks.len() + 1) } else { image.blocks.len() };
            image.blocks.insert(place, (number_of_block, bytes));
            bitmaps.insert(place, bitmap);
        }
        let mut file = Vec::new();
        if kind == Kind::Flat {
            file = image.flat();
            let (full, table) = (bitmaps.first().map_or(0, Vec::len) + block, size.div_ceil(block) * 4);
            for (place, bitmap) in bitmaps.iter().enumerate() {
                let at = 1536 + table.next_multiple_of(SECTOR) + place * full;
                file[at..at + bitmap.len()].copy_from_slice(bitmap);
            }
            self.memory.put(&name, file.clone()).unwrap();
        } else {
            self.put_exploded(&image, &bitmaps, &name, &folder);
        }
        self.layers.push(Layer { image, file, name, folder, truth });
    }

    /// As `Image::put`, encrypted if need be.
    fn put_exploded(&self, image: &Image, bitmaps: &[Vec<u8>], name: &str, folder: &str) {
        let put = |path: &str, bytes: &[u8]| self.memory.put(path, stored(self.is_encrypted, bytes)).unwrap();
        match image.kind {
            Kind::Gzip => put(&format!("{folder}/chunk-filters.json"), br#"["gzip"]"#),
            Kind::Brotli => put(&format!("{folder}/chunk-filters.json"), br#"["brotli"]"#),
            Kind::Flat | Kind::Plain => {}
        }
        for ((index, bytes), bitmap) in image.blocks.iter().zip(bitmaps) {
            let path = format!("{folder}/blocks/{}/{}", index / 1000, index % 1000);
            put(&path, &image.filtered(&[&bitmap[..], bytes].concat()));
        }
        put(&format!("{folder}/footer"), &image.filtered(&image.footer()));
        put(&format!("{folder}/header"), &image.filtered(&image.header()));
        put(&format!("{folder}/bat"), &image.filtered(&merge::bits(image)));
        put(name, folder.as_bytes());
    }

    fn open(&self, layer: &Layer) -> vhd::Result<Opened> {
        let backup = Backup { name: layer.name.clone(), removed: self.removed.clone() };
        let liveness = (!self.is_loose).then(|| -> Arc<dyn Liveness> { Arc::new(backup) });
        let disk = vhd::open(&self.context, &ObjectPath::new(&layer.name).unwrap(), liveness)?;
        Ok(Opened { disk, name: layer.name.clone(), truth: layer.truth.clone() })
    }

    /// Opens a disk that must open.
    fn open_sound(&self, layer: &Layer) -> Opened {
        loop {
            let start = Instant::now();
            match self.open(layer) {
                Ok(opened) => return opened,
                Err(error) => assert!(start.elapsed() >= PATIENCE, "{}: {error}", layer.name),
            }
        }
    }
}

impl Opened {
    /// Reads somewhere; whatever is read is right, and it is an error only if one `may` be.
    fn read(&self, choices: &mut Choices, may_fail: bool) {
        let size = self.truth.len();
        assert_eq!(self.disk.size(), size as u64, "{}", self.name);
        let (mut start, mut len) = (0, size);
        match choices.below(6) {
            0 => {}
            1 => {
                start = choices.below(size);
                len = size - start;
            }
            _ => {
                start = choices.below(size);
                len = (1 + choices.below(3000)).min(size - start);
            }
        }
        if choices.one_in(6) {
            self.disk.prefetch(start as u64, len as u64);
        }
        let is_right = |found: &[u8], how: &str| {
            let right = &self.truth[start..start + len];
            if found != right {
                let at = (0..len).find(|at| found[*at] != right[*at]).unwrap();
                panic!("{}: {len} bytes at {start}, {how}: wrong from {} on", self.name, start + at);
            }
        };
        let mut found = vec![0xee; len];
        if self.disk.read_in_memory(start as u64, &mut found) {
            is_right(&found, "from memory");
        }
        let begun = Instant::now();
        match self.disk.read_at(start as u64, &mut found) {
            Ok(()) => is_right(&found, "read"),
            Err(error) => {
                let may_fail = may_fail || begun.elapsed() >= PATIENCE;
                assert!(may_fail, "{}: {len} bytes at {start}: {error}", self.name);
            }
        }
        if self.disk.read_in_memory(start as u64, &mut found) {
            is_right(&found, "from memory afterwards");
        }
    }

    /// Checks its holes, and that nothing is read past its end.
    fn check_form(&self, choices: &mut Choices) {
        let mut at = 0;
        while at < self.truth.len() {
            let extent = self.disk.extent_at(at as u64).unwrap();
            let end = at + usize::try_from(extent.len).unwrap();
            assert!(extent.len > 0 && end <= self.truth.len(), "{}: {extent:?} at {at}", self.name);
            let is_empty = self.truth[at..end].iter().all(|byte| *byte == 0);
            assert!(is_empty || !extent.is_hole, "{}: no hole: {extent:?} at {at}", self.name);
            at = end;
        }
        let start = self.truth.len() - choices.below(2);
        let mut buffer = vec![0; 1 + choices.below(2000) + self.truth.len() - start];
        let error = self.disk.read_at(start as u64, &mut buffer).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{}: {error}", self.name);
        assert!(!self.disk.read_in_memory(start as u64, &mut buffer), "{}", self.name);
        assert_eq!(self.disk.extent_at(self.truth.len() as u64).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
}

fn low_byte(number: usize) -> u8 {
    number.to_be_bytes()[7]
}

/// Makes some operations fail: those of a kind, or on some paths, or now and then.
fn set_faults(faulty: &FaultyStorage, choices: &mut Choices) {
    let fault = [
        Fault::Error(storage::ErrorKind::Io),
        Fault::Error(storage::ErrorKind::PermissionDenied),
        Fault::Errno(116),
        Fault::Errno(5),
    ][choices.below(4)];
    let (manner, modulus, phase) = (choices.below(3), 2 + choices.below(9), choices.below(9));
    let operation =
        [Operation::Open, Operation::Read, Operation::List, Operation::Stat, Operation::ReadAt, Operation::StatOpen]
            [choices.below(6)];
    let count = AtomicUsize::new(phase);
    faulty.set_rule(move |this, path| {
        let fails = match manner {
            0 => this == operation,
            1 => path.as_str().bytes().map(usize::from).sum::<usize>() % modulus == phase % modulus,
            _ => count.fetch_add(1, Ordering::Relaxed).is_multiple_of(modulus),
        };
        fails.then_some(fault)
    });
}

/// Makes a world and reads it. Panics where it is not read right.
pub fn run(mut choices: Choices) {
    let choices = &mut choices;
    let (mut world, is_of_xo) = World::new(choices);
    let disks: Vec<Opened> = world.layers.iter().map(|layer| world.open_sound(layer)).collect();
    for _ in 0..4 + choices.below(6) {
        disks[disks.len() - 1 - choices.below(disks.len())].read(choices, false);
    }
    disks[choices.below(disks.len())].check_form(choices);

    if choices.one_in(3) {
        set_faults(&world.faulty, choices);
        for _ in 0..2 + choices.below(4) {
            disks[choices.below(disks.len())].read(choices, true);
        }
        // An error while the chain is resolved costs a pause.
        if choices.one_in(4) {
            if let Ok(disk) = world.open(&world.layers[choices.below(world.layers.len())]) {
                disk.read(choices, true);
            }
        }
        world.faulty.release();
        disks[choices.below(disks.len())].read(choices, false);
        disks[disks.len() - 1].read(choices, false);
    }

    if is_of_xo && world.layers.len() > 1 && choices.below(2) == 0 {
        drop(disks);
        world.merge(choices);
        if world.layers.len() > 1 && choices.one_in(3) {
            world.merge(choices);
        }
    }
}
