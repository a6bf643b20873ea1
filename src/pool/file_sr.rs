//! The fast path: the chain of a snapshot, read where the SR keeps it, if its folder can be reached from here.
//!
//! An SR of files (`nfs`, `ext`, `smb`) holds each image as `<uuid>.vhd` in one folder; a snapshot is a small image on the one
//! that holds what the disk had. Nothing is exported, converted or sent by a host then. What differs between two snapshots is
//! told by which file each block is read from in the one and in the other: the same file means the same bytes.
//!
//! The host goes on merging images meanwhile. Each read is checked after it was made, as in a repository that somebody merges
//! (`vhd::ChainDisk`): what changed underneath gives the right bytes or an error, and after an error another way is taken. That the
//! file is the snapshot's is told by its name, by its size, and by the image that the pool says it is built on.
//!
//! Source: sm, `libs/sm/drivers/FileSR.py`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use disk::Disk;
use vhd::{BlockIndex, BlockSize, ChainDigests};

use crate::ingest::PieceSet;
use crate::repository::{LooseDisk, OpenOptions, Repository};

/// Memory for decoded blocks; images of an SR are not compressed, so that nothing needs it (bytes).
const CACHE: u64 = 4 << 20;
/// Bytes of a block.
const BLOCK: u64 = 2 << 20;
/// Types of SRs that hold images as files.
const KINDS: [&str; 5] = ["nfs", "ext", "file", "smb", "cephfs"];

/// Whether an SR of this type holds images as files.
#[must_use]
pub fn is_of_files(kind: &str) -> bool {
    KINDS.contains(&kind)
}

/// What is to be found in the folder of an SR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// The uuid of the snapshot's disk.
    pub uuid: String,
    /// In bytes.
    pub size: u64,
    /// The uuid of the image that it is built on, as the pool says it.
    pub parent: Option<String>,
}

/// The chain of a snapshot.
pub struct Image {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    /// The files of the chain, leaf first.
    files: Vec<String>,
    blocks: ChainDigests,
    expected: Expected,
}

impl Image {
    /// Opens the chain of a snapshot in the folder of its SR.
    ///
    /// # Errors
    /// Why it cannot be read there, in words.
    pub fn open(folder: &Path, expected: &Expected) -> Result<Self, String> {
        let path = folder.join(format!("{}.vhd", expected.uuid));
        let failed = |reason: &dyn std::fmt::Display| format!("'{}' cannot be read: {reason}", path.display());
        let (repository, named) = open(&path)?;
        let disk = repository.open_loose(&named).map_err(|error| failed(&error))?;
        let blocks = repository.loose_digests(&named).map_err(|error| failed(&error))?;
        let blocks = blocks.ok_or_else(|| failed(&"it is no VHD"))?;
        if blocks.block_size() != BlockSize::DEFAULT {
            return Err(failed(&"its blocks have another size than 2 MiB"));
        }
        let files = files(&repository, &named)?;
        let image = Self { path, disk, files, blocks, expected: expected.clone() };
        match image.check() {
            Ok(()) => Ok(image),
            Err(reason) => Err(format!("'{}' is not what it should be: {reason}", image.path.display())),
        }
    }

    /// Sees whether it is the image that is meant.
    fn check(&self) -> Result<(), String> {
        let Expected { size, parent, .. } = &self.expected;
        if self.disk.size() != *size {
            return Err(format!("it has {} bytes, and the pool says {size}", self.disk.size()));
        }
        let found = self.files.get(1).map(|file| file.trim_end_matches(".vhd"));
        match parent {
            Some(parent) if found != Some(parent) => {
                Err(format!("it is built on {}, and the pool says on {parent}", found.unwrap_or("nothing")))
            }
            _ => Ok(()),
        }
    }

    /// Sees whether its chain still is the one that was opened.
    ///
    /// # Errors
    /// That it changed, or what keeps it from being looked at.
    pub fn check_again(&self) -> Result<(), String> {
        // Opened anew: what is open already stands for the files as they were.
        let (repository, disk) = open(&self.path)?;
        if files(&repository, &disk)? == self.files {
            return Ok(());
        }
        Err(format!("the chain of {} changed while it was looked at: the host coalesces", self.expected.uuid))
    }

    /// Returns the disk.
    #[must_use]
    pub fn disk(&self) -> Arc<dyn Disk> {
        self.disk.clone()
    }

    /// Returns what may differ from an older snapshot of the same disk.
    ///
    /// # Errors
    /// Why it cannot be told.
    pub fn changed_since(&self, base: &Self) -> Result<PieceSet, String> {
        let size = self.disk.size();
        let mut changed = PieceSet::new(size).ok_or_else(|| format!("no backup has a disk of {size} bytes"))?;
        for block in 0..BlockSize::DEFAULT.block_count(size) {
            let index = BlockIndex(u32::try_from(block).map_err(|_| format!("no VHD has {size} bytes"))?);
            let is_beyond = (block + 1) * BLOCK > base.disk.size();
            if is_beyond || self.blocks.holder(index) != base.blocks.holder(index) {
                changed.insert(block * BLOCK, BLOCK);
            }
        }
        self.check_again().and_then(|()| base.check_again())?;
        Ok(changed)
    }
}

/// Opens a VHD and those it is built on.
fn open(path: &Path) -> Result<(Arc<Repository>, Arc<LooseDisk>), String> {
    let failed = |reason: &dyn std::fmt::Display| format!("'{}' cannot be read: {reason}", path.display());
    let options = OpenOptions { cache_bytes: CACHE, ..OpenOptions::default() };
    let repository = Repository::open(path, options).map_err(|error| failed(&error))?;
    let loose = repository.loose_disks().map_err(|error| failed(&error))?;
    match loose.as_slice() {
        [disk] => Ok((repository.clone(), disk.clone())),
        _ => Err(failed(&"one VHD was expected")),
    }
}

/// Returns the files of a chain, leaf first.
fn files(repository: &Repository, disk: &LooseDisk) -> Result<Vec<String>, String> {
    let layers = repository.loose_chain(disk);
    let layers = layers.map_err(|error| format!("the chain of {} cannot be read: {error}", disk.path))?;
    Ok(layers.iter().map(|layer| layer.data.file_name().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use xapi_simulator::coalesce::coalesce;
    use xapi_simulator::content::Content;
    use xapi_simulator::file_sr::FileSr;
    use xapi_simulator::guest::Guest;
    use xapi_simulator::random::fresh_uuid;

    use super::*;

    const SIZE: u64 = 12 * BLOCK;

    fn expected(content: &Content) -> Expected {
        Expected {
            uuid: content.leaf().uuid().to_string(),
            size: content.size(),
            parent: content.parent().map(|parent| parent.to_string()),
        }
    }

    fn bytes(disk: &dyn Disk) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(disk.size()).expect("small")];
        disk.read_at(0, &mut bytes).expect("readable");
        bytes
    }

    fn held(content: &Content) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(content.size()).expect("small")];
        content.read(0, &mut bytes).expect("in range");
        bytes
    }

    /// A disk with two snapshots, between which a guest wrote to three blocks.
    fn disk(guest: &mut Guest) -> (Content, Content, Content) {
        let mut live = Content::new(fresh_uuid(), SIZE);
        guest.fill(&mut live, 60).expect("in range");
        let base = live.snapshot(fresh_uuid());
        for block in [1, 5, 11] {
            live.write(block * BLOCK + 4096, &[7; 512]).expect("in range");
        }
        let new = live.snapshot(fresh_uuid());
        (live, base, new)
    }

    #[test]
    fn a_snapshot_reads_as_it_was_and_tells_what_differs_from_the_one_before() {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut live, base, new) = disk(&mut Guest::new(3));
        live.write(0, &[9; 512]).expect("in range");
        FileSr::new(folder.path()).keep([&live, &base, &new]).expect("written");
        let new_image = Image::open(folder.path(), &expected(&new)).expect("there");
        let base_image = Image::open(folder.path(), &expected(&base)).expect("there");
        assert!(bytes(new_image.disk().as_ref()) == held(&new));
        assert!(bytes(base_image.disk().as_ref()) == held(&base));
        let changed = new_image.changed_since(&base_image).expect("told");
        let blocks: Vec<u64> = (0..12).filter(|block| changed.touches(*block)).collect();
        assert_eq!(blocks, [1, 5, 11]);
    }

    #[test]
    fn what_is_not_the_snapshot_is_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let (live, base, new) = disk(&mut Guest::new(4));
        FileSr::new(folder.path()).keep([&live, &base, &new]).expect("written");
        let right = expected(&new);
        for (wrong, part) in [
            (Expected { size: SIZE + 512, ..right.clone() }, "bytes"),
            (Expected { parent: base.parent().map(|parent| parent.to_string()), ..right.clone() }, "is built on"),
            (Expected { uuid: fresh_uuid().to_string(), ..right.clone() }, "cannot be read"),
        ] {
            let why = Image::open(folder.path(), &wrong).map(drop).expect_err(part);
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn a_chain_that_the_host_coalesced_is_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut live, base, mut new) = disk(&mut Guest::new(5));
        let mut sr = FileSr::new(folder.path());
        sr.keep([&live, &base, &new]).expect("written");
        let image = Image::open(folder.path(), &expected(&new)).expect("there");
        let before = held(&new);
        drop(base);
        assert!(coalesce(&mut [&mut live, &mut new], false).is_some(), "the images of the base are merged");
        sr.keep([&live, &new]).expect("written");
        let why = image.check_again().expect_err("the chain is shorter");
        assert!(why.contains("coalesces"), "{why}");
        let again = Image::open(folder.path(), &expected(&new)).expect("there");
        assert!(bytes(again.disk().as_ref()) == before);
    }
}
