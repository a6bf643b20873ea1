//! The bytes of a guest's file, in order and without its holes.

use std::sync::Arc;

use anyhow::{Result, bail};
use disk::Disk;

use crate::ahead;
use crate::tree::{Attributes, Content, Kind, Tree};

/// Files from this size on (bytes) are read by several threads ahead of who writes them: a smaller one is read sooner than
/// those are started.
const LARGE: u64 = 8 << 20;

/// Bytes of a smaller file that are read at once.
const PIECE: u64 = 1 << 20;

/// Opens a file.
///
/// # Errors
/// As for [`Tree::open`]; that it is no file.
pub fn open(tree: &Tree, attributes: &Attributes) -> Result<Arc<dyn Disk>> {
    match attributes.kind {
        Kind::Directory => bail!("it is a folder"),
        Kind::File => match tree.open(attributes.inode)? {
            Content::File(file) => Ok(file),
            _ => bail!("it is no file of a guest"),
        },
        _ => bail!("it is no file with bytes"),
    }
}

/// Gives all that is no hole to `consume`, in order, with where it stands.
///
/// # Errors
/// The first that reading or `consume` has.
pub fn read(file: &Arc<dyn Disk>, mut consume: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let ranges = disk::data_ranges(file.as_ref());
    if file.size() >= LARGE {
        return ahead::read(file, ranges, None, |offset, bytes, _| consume(offset, bytes));
    }
    let mut buffer = Vec::new();
    for range in ranges {
        let range = range?;
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(PIECE);
            buffer.resize(usize::try_from(len).expect("at most PIECE"), 0);
            file.read_at(at, &mut buffer)?;
            consume(at, &buffer)?;
            at += len;
        }
    }
    Ok(())
}
