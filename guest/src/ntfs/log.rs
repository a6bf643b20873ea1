//! Whether a volume was left as it should be: what Windows says of it, and its journal.
//!
//! Windows writes what it is about to do into `$LogFile`, and ends or undoes that when it mounts a volume that was not
//! unmounted. Here this is only said. Source: "$LogFile" and "$Volume" of the Linux-NTFS documentation.

use super::record::{self, DATA, VOLUME_INFORMATION};
use super::volume::{Node, Volume};
use crate::{Error, Fields, Result};

/// The journal, and what is said of the volume.
const LOG: u64 = 2;
pub(super) const VOLUME: u64 = 3;

/// Bytes of the start of the journal where the two pages lie that say where it is to be read from.
const MAX_PAGE: usize = 64 << 10;

/// Bytes that the smallest page of them may have.
const MIN_PAGE: usize = 512;

const DIRTY: u16 = 1;
const CLEAN: u16 = 2;
const NO_CLIENT: u16 = 0xffff;

/// Returns what is wrong, a sentence each.
pub(super) fn problems(volume: &Volume) -> Vec<String> {
    let mut problems = Vec::new();
    match is_clean(volume) {
        Ok(true) => {}
        Ok(false) => problems.push(
            "Windows did not unmount the volume, and its journal ($LogFile) is not replayed: \
             what was changed last may be missing or half done"
                .to_owned(),
        ),
        Err(error) => problems.push(format!("whether the volume was unmounted cannot be read: {error}")),
    }
    match is_marked_dirty(volume) {
        Ok(false) => {}
        Ok(true) => problems.push("Windows marked the volume to be checked (chkdsk)".to_owned()),
        Err(error) => problems.push(format!("whether the volume is to be checked cannot be read: {error}")),
    }
    problems
}

fn is_marked_dirty(volume: &Volume) -> Result<bool> {
    let node = volume.own_node(VOLUME)?;
    let stream = volume.stream(&node, VOLUME_INFORMATION, &[])?;
    let bytes = stream.map(|stream| stream.read(volume, &node, 4096)).transpose()?.unwrap_or_default();
    let flags = Fields(&bytes).le16(0x0a).ok_or_else(|| Error::damaged("it says nothing of that"))?;
    Ok(flags & DIRTY != 0)
}

fn is_clean(volume: &Volume) -> Result<bool> {
    let node: Node = volume.own_node(LOG)?;
    let stream = volume.stream(&node, DATA, &[])?.ok_or_else(|| Error::damaged("the journal is empty"))?;
    let len = usize::try_from(stream.size()?).unwrap_or(usize::MAX).min(2 * MAX_PAGE);
    let mut bytes = vec![0; len];
    super::content::read(volume, &node, &stream, 0, &mut bytes)?;
    Ok(is_clean_log(&bytes))
}

/// Returns whether nothing is to be done for the journal that starts so: the later of two pages counts.
fn is_clean_log(bytes: &[u8]) -> bool {
    // So it is made, and so ntfs-3g leaves it.
    if bytes.iter().all(|byte| *byte == 0xff) {
        return true;
    }
    let first = restart(bytes);
    // The second follows, wherever the first ends; of one that is torn that is not known.
    let size = first.map_or(4096, |first| first.page_size);
    let second = bytes.get(size..).and_then(restart);
    let later = [first, second].into_iter().flatten().max_by_key(|restart| restart.sequence);
    later.is_some_and(|restart| restart.is_clean)
}

#[derive(Debug, Clone, Copy)]
struct Restart {
    sequence: u64,
    page_size: usize,
    is_clean: bool,
}

fn restart(bytes: &[u8]) -> Option<Restart> {
    let fields = Fields(bytes);
    let page_size = usize::try_from(fields.le32(0x10)?)
        .ok()
        .filter(|size| size.is_power_of_two() && (MIN_PAGE..=MAX_PAGE).contains(size))?;
    let mut page = fields.bytes(0, page_size)?.to_vec();
    // CHKD: chkdsk wrote it.
    let magic = if page.starts_with(b"CHKD") { b"CHKD" } else { b"RSTR" };
    record::restore(&mut page, magic).ok()?;
    let area = Fields(page.get(usize::from(fields.le16(0x18)?)..)?);
    Some(Restart {
        sequence: area.le64(0)?,
        page_size,
        is_clean: area.le16(0x0c)? == NO_CLIENT || area.le16(0x0e)? & CLEAN != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(sequence: u64, client: u16, flags: u16) -> Vec<u8> {
        let mut page = vec![0; 4096];
        page[..8].copy_from_slice(b"RSTR\x1e\0\x09\0");
        page[0x10..0x14].copy_from_slice(&4096_u32.to_le_bytes());
        page[0x18] = 0x30;
        page[0x30..0x38].copy_from_slice(&sequence.to_le_bytes());
        page[0x3c..0x3e].copy_from_slice(&client.to_le_bytes());
        page[0x3e..0x40].copy_from_slice(&flags.to_le_bytes());
        page[0x1e] = 1;
        for sector in page.chunks_exact_mut(512) {
            sector[510] = 1;
        }
        page
    }

    #[test]
    fn the_later_page_says_whether_the_volume_was_unmounted() {
        let (clean, closed, open) = (page(5, 0, 2), page(6, NO_CLIENT, 0), page(7, 0, 0));
        let torn = [&open[..600], &[9; 3496]].concat();
        for (pages, expected) in [
            ([&clean, &closed], true),
            ([&closed, &open], false),
            ([&open, &closed], false),
            ([&clean, &clean], true),
            ([&torn, &clean], true),
            ([&clean, &torn], true),
            ([&torn, &torn], false),
        ] {
            assert_eq!(is_clean_log(&pages.map(Vec::as_slice).concat()), expected);
        }
        assert!(is_clean_log(&[0xff; 8192]));
    }
}
