//! A merge as Xen Orchestra makes it, each of its writes a step.
//!
//! Source: XO, `@xen-orchestra/backup-archive` (`MergeRemoteDisk.mjs`, `RemoteVhdDisk.mjs`), vhd-lib (`VhdFile.js`,
//! `VhdDirectory.js`).

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use storage::MemoryStorage;

use super::{Choices, Layer, Opened, World, stored};
use crate::builder::{Image, Kind, SECTOR};

/// One change of the repository.
enum Step {
    Put(String, Vec<u8>),
    /// In place: who has the file open sees it.
    Overwrite(String, Vec<u8>),
    Rename(String, String),
    Remove(String),
}

impl Step {
    fn apply(self, memory: &MemoryStorage) {
        match self {
            Self::Put(path, bytes) => memory.put(&path, bytes).unwrap(),
            Self::Overwrite(path, bytes) => memory.overwrite(&path, bytes).unwrap(),
            Self::Rename(from, to) => {
                memory.create_directory(to.rsplit_once('/').map_or("", |(folder, _)| folder)).unwrap();
                memory.rename(&from, &to).unwrap();
            }
            Self::Remove(path) => memory.remove(&path).unwrap(),
        }
    }
}

/// The table of an exploded VHD as XO writes it: a byte per block, of which a bit per block is used.
pub fn bits(image: &Image) -> Vec<u8> {
    let mut table = vec![0; usize::try_from(image.size.div_ceil(image.block as u64)).unwrap()];
    image.blocks.iter().for_each(|(index, _)| table[*index as usize / 8] |= 0x80 >> (index % 8));
    table
}

/// A VHD file that is being merged into, after each write.
struct File<'a> {
    bytes: Vec<u8>,
    path: String,
    table: Vec<u32>,
    full: usize,
    steps: &'a mut Vec<Step>,
}

const TABLE_AT: usize = 1536;

impl File<'_> {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(bytes);
        self.steps.push(Step::Overwrite(self.path.clone(), self.bytes.clone()));
    }

    fn table_len(entries: usize) -> usize {
        (entries * 4).next_multiple_of(SECTOR)
    }

    fn used(&self) -> impl Iterator<Item = usize> + '_ {
        self.table.iter().filter(|entry| **entry != u32::MAX).map(|entry| *entry as usize)
    }

    fn end_of_data(&self) -> usize {
        let table_end = TABLE_AT + Self::table_len(self.table.len());
        self.used().map(|sector| sector * SECTOR + self.full).max().unwrap_or(0).max(table_end)
    }

    fn set_entry(&mut self, block: usize, sector: usize) {
        self.table[block] = u32::try_from(sector).unwrap();
        self.write(TABLE_AT + block * 4, &u32::try_from(sector).unwrap().to_be_bytes());
    }

    fn write_footer(&mut self, footer: &[u8], only_end: bool) {
        let at = self.end_of_data().max(self.bytes.len() - SECTOR);
        if !only_end {
            self.write(0, footer);
        }
        self.write(at, footer);
    }

    /// `ensureBatSize`: moves the first blocks to the end until the table has room, and makes it longer.
    fn grow(&mut self, entries: usize, base: &Image, header: &[u8]) {
        let before = self.table.len();
        if before >= entries {
            return;
        }
        let mut needed = Self::table_len(entries) - Self::table_len(before);
        let table_end = TABLE_AT + Self::table_len(before);
        while let (Some(first), Some(last)) = (self.used().min(), self.used().max()) {
            if table_end + needed < first * SECTOR {
                break;
            }
            let target = (last + self.full / SECTOR).max((table_end + needed).div_ceil(SECTOR));
            let block = self.bytes[first * SECTOR..first * SECTOR + self.full].to_vec();
            self.write(target * SECTOR, &block);
            let index = self.table.iter().position(|entry| *entry as usize == first).unwrap();
            self.set_entry(index, target);
            self.write_footer(&base.footer(), true);
            match needed.checked_sub(self.full) {
                Some(left) if left > 0 => needed = left,
                _ => break,
            }
        }
        // As XO does it: a byte for each new entry, where there should be four.
        self.write(TABLE_AT + before * 4, &vec![0xff; entries - before]);
        self.table.resize(entries, u32::MAX);
        self.write(SECTOR, header);
    }
}

impl World {
    /// Merges some neighbours, while the later disks are read.
    pub(super) fn merge(&mut self, choices: &mut Choices) {
        let base = choices.below(self.layers.len() - 1);
        let target = (base + 1 + choices.below(2)).min(self.layers.len() - 1);
        let before: Vec<Opened> = self.layers.iter().map(|layer| self.open_sound(layer)).collect();
        if choices.below(2) == 0 {
            before[before.len() - 1].read(choices, false);
        }
        self.removed.lock().unwrap().extend(self.layers[base..target].iter().map(|layer| layer.name.clone()));
        let members = base..=target;
        let (steps, merged) = match self.layers[base].image.kind {
            Kind::Flat => self.merge_files(members, choices),
            _ => self.merge_folders(members, choices),
        };
        let (gone, living) = before.split_at(target);
        let read_gone = |choices: &mut Choices| {
            // Removed, and read on by who has it open.
            if !gone[base..].is_empty() && choices.one_in(4) {
                gone[base + choices.below(gone.len() - base)].read(choices, true);
            }
        };
        if choices.below(3) == 0 {
            self.race(steps, target, living, choices);
        } else {
            let pace = 1 + choices.below(1 + steps.len() / 3);
            for (number, step) in steps.into_iter().enumerate() {
                step.apply(&self.memory);
                if number % pace == 0 {
                    living[choices.below(living.len())].read(choices, false);
                    read_gone(choices);
                    if choices.one_in(4) {
                        let layer = &self.layers[target + choices.below(self.layers.len() - target)];
                        self.open_sound(layer).read(choices, false);
                    }
                }
            }
        }
        self.layers.splice(base..=target, [merged]);
        for opened in living {
            opened.read(choices, false);
        }
        read_gone(choices);
        for layer in &self.layers {
            self.open_sound(layer).read(choices, false);
        }
    }

    /// Has the steps happen in the middle of reads: one each time the storage was asked so many times.
    fn race(&self, steps: Vec<Step>, target: usize, living: &[Opened], choices: &mut Choices) {
        let left = Arc::new(Mutex::new(VecDeque::from(steps)));
        let (queue, memory, pace) = (left.clone(), self.memory.clone(), 1 + choices.below(12));
        let count = AtomicUsize::new(1);
        self.faulty.set_rule(move |_, _| {
            if count.fetch_add(1, Ordering::Relaxed).is_multiple_of(pace) {
                let step = queue.lock().unwrap().pop_front();
                step.into_iter().for_each(|step| step.apply(&memory));
            }
            None
        });
        loop {
            let before = left.lock().unwrap().len();
            if before == 0 {
                break;
            }
            living[choices.below(living.len())].read(choices, false);
            // What is a hole, or in memory, asks the storage for nothing.
            if choices.one_in(4) || left.lock().unwrap().len() == before {
                let layer = &self.layers[target + choices.below(self.layers.len() - target)];
                self.open_sound(layer).read(choices, false);
            }
        }
        self.faulty.release();
    }

    fn put_state(&self, members: &[Layer], block: u32, step: &str, is_first: bool) -> Step {
        let names: Vec<String> = members.iter().map(|layer| format!("\"{}\"", layer.name)).collect();
        let (base, target) = (&members[0], &members[members.len() - 1]);
        let state = format!(
            "{{\"child\":{{\"uuid\":\"{}\"}},\"parent\":{{\"uuid\":\"{}\"}},\"chain\":[{}],\"currentBlock\":{block},\
             \"mergedDataSize\":0,\"step\":\"{step}\",\"diskSize\":0}}",
            target.image.uuid,
            base.image.uuid,
            names.join(",")
        );
        let (path, bytes) = (state_path(base), stored(self.is_encrypted, state.as_bytes()));
        if is_first { Step::Put(path, bytes) } else { Step::Overwrite(path, bytes) }
    }

    fn merge_files(&self, members: RangeInclusive<usize>, choices: &mut Choices) -> (Vec<Step>, Layer) {
        let members = &self.layers[members];
        let (base, target) = (&members[0], &members[members.len() - 1]);
        let mut steps = Vec::new();
        let mut merged = merged(members);
        let entries = usize::try_from(merged.size.div_ceil(merged.block as u64)).unwrap();
        let table = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        let before = u32::from_be_bytes(base.file[SECTOR + 28..SECTOR + 32].try_into().unwrap()) as usize;
        let mut file = File {
            bytes: base.file.clone(),
            path: base.name.clone(),
            table: base.file[TABLE_AT..TABLE_AT + before * 4].chunks_exact(4).map(table).collect(),
            full: base.image.bitmap().len() + base.image.block,
            steps: &mut steps,
        };
        file.grow(entries, &base.image, &merged.header());
        file.steps.push(self.put_state(members, 0, "mergeBlocks", true));
        for (block, bytes) in taken(members) {
            let index = block as usize;
            if file.table[index] == u32::MAX {
                let sector = file.end_of_data().div_ceil(SECTOR);
                file.set_entry(index, sector);
            }
            let at = file.table[index] as usize * SECTOR;
            file.write(at, &[base.image.bitmap(), bytes].concat());
            if choices.one_in(5) {
                file.steps.push(self.put_state(members, block, "mergeBlocks", false));
            }
        }
        let table: Vec<u8> = file.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        file.write(TABLE_AT, &table);
        file.write_footer(&merged.footer(), false);
        merged.parent.clone_from(&base.image.parent);
        let bytes = std::mem::take(&mut file.bytes);
        steps.push(self.put_state(members, 0, "cleanup", false));
        steps.extend(members[1..].iter().rev().map(|layer| Step::Remove(layer.name.clone())));
        steps.push(Step::Rename(base.name.clone(), target.name.clone()));
        steps.push(Step::Remove(state_path(base)));
        let (name, truth) = (target.name.clone(), target.truth.clone());
        (steps, Layer { image: merged, file: bytes, name, folder: String::new(), truth })
    }

    fn merge_folders(&self, members: RangeInclusive<usize>, choices: &mut Choices) -> (Vec<Step>, Layer) {
        let members = &self.layers[members];
        let (base, target) = (&members[0], &members[members.len() - 1]);
        let block_path =
            |layer: &Layer, block: u32| format!("{}/blocks/{}/{}", layer.folder, block / 1000, block % 1000);
        let mut steps = vec![self.put_state(members, 0, "mergeBlocks", true)];
        let mut blocks: Vec<u32> = taken(members).keys().copied().collect();
        // Several are in flight: they overtake each other.
        for index in 1..blocks.len() {
            if choices.one_in(4) {
                blocks.swap(index - 1, index);
            }
        }
        for block in blocks {
            let holder =
                members[1..].iter().rev().find(|layer| layer.image.blocks.iter().any(|(held, _)| *held == block));
            let from = block_path(holder.expect("it was taken from one of them"), block);
            steps.push(Step::Rename(from, block_path(base, block)));
            if choices.one_in(5) {
                steps.push(self.put_state(members, block, "mergeBlocks", false));
            }
        }
        let merged = merged(members);
        let filtered = |bytes: &[u8]| stored(self.is_encrypted, &base.image.filtered(bytes));
        steps.push(Step::Overwrite(format!("{}/bat", base.folder), filtered(&bits(&merged))));
        steps.push(Step::Overwrite(format!("{}/footer", base.folder), filtered(&merged.footer())));
        steps.push(self.put_state(members, 0, "cleanup", false));
        for layer in members[1..].iter().rev() {
            // The files of a folder go one by one.
            let files = ["footer", "bat", "header"];
            let first = choices.below(4);
            steps.extend(files.iter().take(first).map(|file| Step::Remove(format!("{}/{file}", layer.folder))));
            steps.push(Step::Remove(layer.folder.clone()));
            steps.push(Step::Remove(layer.name.clone()));
        }
        let alias = |bytes: &[u8]| stored(self.is_encrypted, bytes);
        if !self.is_encrypted {
            steps.push(Step::Put(target.name.clone(), Vec::new()));
            steps.push(Step::Overwrite(target.name.clone(), alias(base.folder.as_bytes())));
        } else {
            steps.push(Step::Put(target.name.clone(), alias(base.folder.as_bytes())));
        }
        steps.push(Step::Remove(base.name.clone()));
        steps.push(Step::Remove(state_path(base)));
        let (name, folder, truth) = (target.name.clone(), base.folder.clone(), target.truth.clone());
        (steps, Layer { image: merged, file: Vec::new(), name, folder, truth })
    }
}

fn state_path(base: &Layer) -> String {
    format!(".{}.merge.json", base.name)
}

/// The blocks that the base gets, each from the topmost layer that holds it.
fn taken(members: &[Layer]) -> BTreeMap<u32, Vec<u8>> {
    members[1..].iter().flat_map(|layer| layer.image.blocks.iter().cloned()).collect()
}

/// What the base is once it is the target.
fn merged(members: &[Layer]) -> Image {
    let (base, target) = (&members[0].image, &members[members.len() - 1].image);
    let mut blocks: BTreeMap<u32, Vec<u8>> = base.blocks.iter().cloned().collect();
    blocks.extend(taken(members));
    Image {
        kind: base.kind,
        uuid: target.uuid,
        parent: base.parent.clone(),
        size: target.size,
        block: base.block,
        blocks: blocks.into_iter().collect(),
    }
}
