//! What fast commits changed since the last transaction of the journal.
//!
//! Inodes are laid over the volume; names and ranges of blocks are kept beside what the volume says of them. Linux, which
//! has to write them, allocates blocks for new directories and sets times of directories to those of the mount; here
//! nothing is allocated, and directories keep their times.

use std::collections::{BTreeMap, HashMap, HashSet};

use fs_ext4::inode::{Inode as Stored, InodeFlags};

use super::journal::Change;
use super::map::{Blocks, Place, Run, Runs, Window};
use super::volume::Volume;
use crate::{Entry, Error, Fields, Inode, Result};

/// Where the map of an inode stands in it, and what follows.
const MAP: std::ops::Range<usize> = 0x28..0x64;

/// The header of a map without extents: its magic number, none of four, no depth.
const EMPTY_MAP: [u8; 12] = [0x0a, 0xf3, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0];

/// What is known of names and blocks besides what the volume says.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// By directory, in their order.
    names: HashMap<u32, Vec<Rename>>,
    /// Directories of which the volume has no blocks yet.
    made: HashSet<u32>,
    ranges: HashMap<u32, Ranges>,
    inodes: BTreeMap<u32, Vec<u8>>,
}

/// A name that comes or goes.
#[derive(Debug)]
struct Rename {
    name: Vec<u8>,
    inode: u32,
    is_gone: bool,
}

impl Changes {
    /// Takes changes in their order; the volume is the one that they are to be applied to.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) for what does not belong to the volume.
    pub(super) fn new(volume: &Volume, changes: Vec<Change>) -> Result<Self> {
        let mut all = Self::default();
        for change in changes {
            match change {
                Change::Inode { inode, raw } => {
                    let before = match all.inodes.remove(&inode) {
                        Some(before) => before,
                        None => volume.raw_inode(inode)?,
                    };
                    all.inodes.insert(inode, merged(before, &raw)?);
                }
                Change::Range { inode, start, len, place } => {
                    let end = match place {
                        Some(Place::At(block)) => block.saturating_add(len),
                        _ => 0,
                    };
                    if end > volume.count() || place == Some(Place::At(0)) {
                        return Err(Error::damaged(format!("a fast commit has blocks up to {end} of inode {inode}")));
                    }
                    all.ranges.entry(inode).or_default().lay(start, len, place);
                }
                Change::Create { directory, inode, name } => {
                    let is_directory = all.inodes.get(&inode).is_some_and(|raw| is_directory(raw));
                    if is_directory {
                        all.made.insert(inode);
                    }
                    all.rename(directory, inode, name, false)?;
                }
                Change::Link { directory, inode, name } => all.rename(directory, inode, name, false)?,
                Change::Unlink { directory, inode, name } => all.rename(directory, inode, name, true)?,
            }
        }
        Ok(all)
    }

    fn rename(&mut self, directory: u32, inode: u32, name: Vec<u8>, is_gone: bool) -> Result<()> {
        if matches!(&name[..], b"" | b"." | b"..") {
            return Err(Error::damaged(format!("a fast commit has no name of inode {inode}")));
        }
        self.names.entry(directory).or_default().push(Rename { name, inode, is_gone });
        Ok(())
    }

    /// Returns inodes as they are now, without their checksums.
    pub(super) fn inodes(&self) -> impl Iterator<Item = (u32, &[u8])> {
        self.inodes.iter().map(|(number, raw)| (*number, raw.as_slice()))
    }

    /// Returns whether a directory has no blocks yet.
    pub(super) fn is_made(&self, directory: u32) -> bool {
        self.made.contains(&directory)
    }

    /// Changes the names in a directory.
    pub(super) fn apply_names(&self, directory: u32, entries: &mut Vec<Entry>) {
        let Some(renames) = self.names.get(&directory) else { return };
        let mut names: BTreeMap<Vec<u8>, Inode> = entries.drain(..).map(|entry| (entry.name, entry.inode)).collect();
        for rename in renames {
            let inode = Inode(u64::from(rename.inode));
            if !rename.is_gone {
                // One that is there already was written before the power went.
                names.entry(rename.name.clone()).or_insert(inode);
            } else if names.get(&rename.name) == Some(&inode) {
                names.remove(&rename.name);
            }
        }
        entries.extend(names.into_iter().map(|(name, inode)| Entry { name, inode }));
    }

    /// Changes where the blocks of a file lie.
    pub(super) fn apply_ranges(&self, inode: u32, window: Window, runs: Runs) -> Runs {
        match self.ranges.get(&inode) {
            Some(ranges) => ranges.apply(window, runs),
            None => runs,
        }
    }
}

/// Returns an inode of which all but the map is another.
fn merged(mut before: Vec<u8>, after: &[u8]) -> Result<Vec<u8>> {
    if after.len() < MAP.end || after.len() > before.len() {
        return Err(Error::damaged(format!("a fast commit has an inode of {} bytes", after.len())));
    }
    before[..MAP.start].copy_from_slice(&after[..MAP.start]);
    before[MAP.end..after.len()].copy_from_slice(&after[MAP.end..]);
    let flags = Fields(after).le32(0x20).unwrap_or_default();
    if flags & InodeFlags::EXTENTS.bits() != 0 {
        if before[MAP.start..MAP.start + 2] != EMPTY_MAP[..2] {
            before[MAP].fill(0);
            before[MAP.start..MAP.start + EMPTY_MAP.len()].copy_from_slice(&EMPTY_MAP);
        }
    } else if flags & InodeFlags::INLINE_DATA.bits() != 0 {
        before[MAP].copy_from_slice(&after[MAP]);
    }
    Ok(before)
}

fn is_directory(raw: &[u8]) -> bool {
    Stored::parse(raw).is_ok_and(|inode| inode.is_dir())
}

/// Ranges of one file, none over another: by first block, how many, and where they lie if anywhere.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, (u64, Option<Place>)>);

impl Ranges {
    fn lay(&mut self, start: u64, len: u64, place: Option<Place>) {
        let end = start.saturating_add(len);
        if start == end {
            return;
        }
        self.cut(start);
        self.cut(end);
        let covered: Vec<u64> = self.0.range(start..end).map(|(first, _)| *first).collect();
        for first in covered {
            self.0.remove(&first);
        }
        self.0.insert(start, (end - start, place));
    }

    fn cut(&mut self, at: u64) {
        if let Some((&first, range)) = self.0.range_mut(..at).next_back()
            && first + range.0 > at
        {
            let rest = (first + range.0 - at, range.1.map(|place| after(place, at - first)));
            range.0 = at - first;
            self.0.insert(at, rest);
        }
    }

    /// Lays these over runs, of which none lie in the window past `runs.until`.
    fn apply(&self, window: Window, runs: Runs) -> Runs {
        let mut all = Self::default();
        for run in runs.found {
            all.lay(run.start, run.len, Some(run.place));
        }
        for (start, (len, place)) in &self.0 {
            let (from, end) = ((*start).max(window.from), (start + len).min(runs.until));
            if from < end {
                all.lay(from, end - from, place.map(|place| after(place, from - start)));
            }
        }
        let runs_of = |(start, (len, place)): (u64, (u64, Option<Place>))| Some(Run { start, len, place: place? });
        Runs { found: all.0.into_iter().filter_map(runs_of).collect(), until: runs.until }
    }
}

/// Returns where what comes `blocks` later lies.
fn after(place: Place, blocks: u64) -> Place {
    match place {
        Place::At(block) => Place::At(block + blocks),
        Place::Unwritten => Place::Unwritten,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use disk::Disk;
    use fs_ext4::block_io::BlockDevice;

    use super::super::{attributes, content, directory, xattrs};
    use super::*;
    use crate::memory::Memory;
    use crate::{ErrorKind, Overlay};

    /// What rust-fs-ext4 makes a volume on.
    struct Device(Mutex<Vec<u8>>);

    impl BlockDevice for Device {
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> fs_ext4::Result<()> {
            let at = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.0.lock().unwrap()[at..at + buffer.len()]);
            Ok(())
        }

        fn size_bytes(&self) -> u64 {
            self.0.lock().unwrap().len() as u64
        }

        fn write_at(&self, offset: u64, bytes: &[u8]) -> fs_ext4::Result<()> {
            let at = usize::try_from(offset).unwrap();
            self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn is_writable(&self) -> bool {
            true
        }
    }

    #[test]
    fn whatever_is_committed_fast_is_read_or_refused() {
        const SIZE: u64 = 4 << 20;
        let device = Device(Mutex::new(vec![0; usize::try_from(SIZE).unwrap()]));
        fs_ext4::mkfs::format_filesystem(&device, None, None, SIZE, 1024).expect("a volume");
        let mut disk = Memory::new(SIZE);
        disk.write(0, &device.0.into_inner().unwrap());
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let seed = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
        println!("seed {seed}");
        let mut state = u64::from(seed) << 1 | 1;
        let mut random = move |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        let (mut applied, mut refused) = (0, 0);
        for _ in 0..600 {
            let changes = (0..random(20)).map(|_| change(&mut random)).collect();
            let before = Volume::open(Overlay::new(disk.clone())).expect("a volume");
            let changed = Changes::new(&before, changes).and_then(|changes| {
                let mut overlay = Overlay::new(disk.clone());
                before.lay_inodes(&changes, &mut overlay)?;
                Ok(Volume::open(overlay)?.with_changes(changes))
            });
            let volume = match changed {
                Ok(volume) => volume,
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::Damaged | ErrorKind::NotFound), "{error}");
                    refused += 1;
                    continue;
                }
            };
            applied += 1;
            for number in [2, 11, 12, 13] {
                let Ok(node) = volume.node(Inode(number)) else { continue };
                let _ = (attributes::of(&volume, &node), xattrs::list(&volume, &node), directory::list(&volume, &node));
                for from in [0, 5000, u64::MAX >> 1] {
                    if let Ok(extents) = content::extents(&volume, &node, from, 3) {
                        let ends = extents.found.iter().map(|extent| (extent.start, extent.start + extent.len));
                        assert!(ends.collect::<Vec<_>>().windows(2).all(|pair| pair[0].1 <= pair[1].0), "{extents:?}");
                    }
                }
            }
        }
        assert!(applied > 50 && refused > 50, "{applied} {refused}");
    }

    fn change(random: &mut impl FnMut(u64) -> u64) -> Change {
        let inode = u32::try_from([2, 11, 12, 13, random(5000)][usize::try_from(random(5)).unwrap()]).unwrap();
        let directory = u32::try_from([2, 11, 12, 13][usize::try_from(random(4)).unwrap()]).unwrap();
        let name = vec![b'a'; usize::try_from(random(40).min(3)).unwrap()];
        match random(5) {
            0 => {
                let mut raw = vec![0; [128, 160, 256, 100, 300][usize::try_from(random(20).min(4)).unwrap()]];
                let mode = [0x81a4_u16, 0x41ed, 0xa1ff, 0][usize::try_from(random(4)).unwrap()];
                raw[..2].copy_from_slice(&mode.to_le_bytes());
                raw[4..8].copy_from_slice(&u32::try_from(random(1 << 31)).unwrap().to_le_bytes());
                raw[26] = 1;
                let flags = [0x8_0000_u32, 0x1000_0000, 0, 0x1000][usize::try_from(random(4)).unwrap()];
                raw[0x20..0x24].copy_from_slice(&flags.to_le_bytes());
                Change::Inode { inode, raw }
            }
            1 => {
                let place = [None, Some(Place::Unwritten), Some(Place::At(1 + random(4095)))];
                let place = place[usize::try_from(random(3)).unwrap()];
                let (start, len) = (random(1 << 32) >> random(32), random(1 << 32) >> random(32));
                Change::Range { inode, start, len, place }
            }
            2 => Change::Create { directory, inode, name },
            3 => Change::Link { directory, inode, name },
            _ => Change::Unlink { directory, inode, name },
        }
    }

    #[test]
    fn later_ranges_cover_earlier_ones_and_the_map() {
        let mut ranges = Ranges::default();
        ranges.lay(2, 6, Some(Place::At(100)));
        ranges.lay(4, 2, None);
        ranges.lay(7, 3, Some(Place::Unwritten));
        let map = |start, len, block| Run { start, len, place: Place::At(block) };
        let runs = Runs { found: vec![map(0, 5, 10), map(5, 10, 50)], until: 20 };
        let window = Window { from: 0, end: 20, room: 9 };
        let unwritten = Run { start: 7, len: 3, place: Place::Unwritten };
        let found = vec![map(0, 2, 10), map(2, 2, 100), map(6, 1, 104), unwritten, map(10, 5, 55)];
        assert_eq!(ranges.apply(window, runs), Runs { found, until: 20 });
        let runs = Runs { found: vec![map(0, 5, 10)], until: 5 };
        let window = Window { from: 3, end: 20, room: 1 };
        let found = vec![map(0, 3, 10), map(3, 1, 101)];
        assert_eq!(ranges.apply(window, runs), Runs { found, until: 5 });
    }

    #[test]
    fn an_inode_keeps_its_map_but_where_it_had_none() {
        let inode = |flags: u32, map: u8, rest: u8| {
            let mut raw = vec![rest; 256];
            raw[0x20..0x24].copy_from_slice(&flags.to_le_bytes());
            raw[MAP].fill(map);
            raw
        };
        let (extents, inline) = (InodeFlags::EXTENTS.bits(), InodeFlags::INLINE_DATA.bits());
        let mut before = inode(extents, 3, 1);
        before[MAP.start..MAP.start + 2].copy_from_slice(&[0x0a, 0xf3]);
        let after = inode(extents, 9, 2);
        let merged_ = merged(before.clone(), &after[..160]).expect("an inode");
        assert_eq!(merged_[..MAP.start], after[..MAP.start]);
        assert_eq!(merged_[MAP], before[MAP]);
        assert_eq!(merged_[MAP.end..160], after[MAP.end..160]);
        assert_eq!(merged_[160..], before[160..]);
        let empty = merged(inode(0, 7, 1), &after).expect("an inode");
        assert_eq!((&empty[MAP][..12], &empty[MAP][12..]), (&EMPTY_MAP[..], &[0; 48][..]));
        assert_eq!(merged(before.clone(), &inode(inline, 9, 2)).expect("an inode")[MAP], [9; 60]);
        for len in [MAP.end - 1, 257] {
            assert!(merged(before.clone(), &vec![0; len]).is_err(), "{len}");
        }
    }

    #[test]
    fn names_come_and_go_in_their_order() {
        let mut changes = Changes::default();
        let entry = |name: &str, inode| Entry { name: name.into(), inode: Inode(inode) };
        for (name, inode, is_gone) in
            [("a", 9, true), ("a", 12, true), ("b", 20, false), ("c", 21, false), ("c", 21, true)]
        {
            changes.rename(2, inode, name.into(), is_gone).expect("a name");
        }
        let mut entries = vec![entry("a", 12), entry("b", 13)];
        changes.apply_names(2, &mut entries);
        assert_eq!(entries, [entry("b", 13)]);
        for name in ["", ".", ".."] {
            assert!(changes.rename(2, 9, name.into(), false).is_err(), "{name}");
        }
        let mut others = vec![entry("a", 12)];
        changes.apply_names(3, &mut others);
        assert_eq!(others, [entry("a", 12)]);
    }
}
