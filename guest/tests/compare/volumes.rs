//! Volumes instead of files, so that what is done to a filesystem can be done to what lies around it.

#![allow(dead_code, reason = "not every test binary surveys")]

use std::sync::Arc;

use disk::{Disk, Error, ErrorKind, Extent, Result};
use guest::{Attributes, Entry, Extents, Facts, GuestFs, Inode, Kind, Mapped, Time, Xattr, survey};

/// Bytes of a disk; several lie after each other.
pub const DISK: u64 = 8 << 20;

/// One of them.
struct Part {
    all: Arc<dyn Disk>,
    start: u64,
}

impl Disk for Part {
    fn size(&self) -> u64 {
        DISK
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= DISK);
        end.ok_or_else(|| Error::new(ErrorKind::OutOfRange, "past the end"))?;
        self.all.read_at(self.start + offset, buffer)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { len: DISK - offset, is_hole: false })
    }
}

/// What was found on the disks: each volume is a file.
struct Found(Vec<Attributes>);

/// Surveys the disks in an image, and reads a few bytes of each volume, which all are there.
pub fn open(all: Arc<dyn Disk>) -> guest::Result<Box<dyn GuestFs>> {
    let part = |start| Arc::new(Part { all: all.clone(), start }) as Arc<dyn Disk>;
    let disks: Vec<_> = (0..all.size() / DISK).map(|number| part(number * DISK)).collect();
    let named: Vec<_> = disks.iter().zip('a'..).map(|(disk, letter)| (format!("xvd{letter}"), disk.clone())).collect();
    let found = survey(&named);
    assert!(found.volumes.len() <= 1024, "{} volumes", found.volumes.len());
    let files = found.volumes.into_iter().map(|volume| {
        assert!(!volume.name.is_empty() && !volume.name.contains('/'), "{volume:?}");
        let Some(stack) = volume.stack else {
            assert!(volume.problem.is_some(), "{}", volume.name);
            return 0;
        };
        // What has layers is opened by whoever reads it.
        let Some(map) = stack.map() else { return stack.size() };
        let mapped = Mapped::new(map.clone(), disks.clone()).expect("a survey maps what is there");
        for at in [0, mapped.size() / 2, mapped.size() - 1] {
            mapped.read_at(at, &mut [0]).expect("it is there");
            assert!(mapped.extent_at(at).expect("it is there").len <= mapped.size() - at);
        }
        mapped.size()
    });
    Ok(Box::new(Found(files.map(file).collect())))
}

fn file(size: u64) -> Attributes {
    let time = Time::default();
    Attributes {
        kind: Kind::Fifo,
        mode: 0,
        uid: 0,
        gid: 0,
        links: 1,
        size,
        allocated: 0,
        device: (0, 0),
        accessed: time,
        modified: time,
        changed: time,
        created: None,
    }
}

impl GuestFs for Found {
    fn root(&self) -> Inode {
        Inode(0)
    }

    fn facts(&self) -> Facts {
        Facts::default()
    }

    fn list(&self, _: Inode) -> guest::Result<Vec<Entry>> {
        Ok((1..=self.0.len() as u64).map(|number| Entry { name: vec![b'v'], inode: Inode(number) }).collect())
    }

    fn attributes(&self, Inode(number): Inode) -> guest::Result<Attributes> {
        let index = usize::try_from(number).expect("a number that was listed").checked_sub(1);
        Ok(index.map_or(Attributes { kind: Kind::Directory, ..file(0) }, |index| self.0[index].clone()))
    }

    fn target(&self, _: Inode) -> guest::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn xattrs(&self, _: Inode) -> guest::Result<Vec<Xattr>> {
        Ok(Vec::new())
    }

    fn extents(&self, _: Inode, from: u64, _: usize) -> guest::Result<Extents> {
        Ok(Extents { found: Vec::new(), until: from + 1 })
    }
}
