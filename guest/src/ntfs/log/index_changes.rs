//! Changes of the entries of an index, in a record or in a block of its own.

use super::bytes::{Bytes, unfit};
use super::change::Operation;
use crate::{Fields, Result};

/// Bytes of what is said of a file with its name, which is what directories hold of it besides.
const NAME_COPY: usize = 0x38;

/// Bytes of an entry at least.
const MIN_ENTRY: usize = 0x10;

const HAS_CHILD: u16 = 1;
const LAST: u16 = 2;

/// Where the header of entries lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) at: usize,
    /// Whether there is only so much room as it says.
    pub(super) is_fixed: bool,
}

/// Does something to the entries of an index.
///
/// # Errors
/// [`Damaged`](crate::ErrorKind::Damaged) if they are not as the change expects them.
pub(super) fn apply(bytes: &mut Vec<u8>, header: Header, operation: Operation, at: usize, data: &[u8]) -> Result<()> {
    let entry_len = entry(bytes, header, at)?;
    let used_at = header.at + 4;
    let room = Bytes(bytes).le32(header.at + 8)?;
    let used = header.at + Bytes(bytes).le32(used_at)?;
    let entry_flags = Bytes(bytes).le16(at + 12)?;
    match operation {
        Operation::AddToRoot | Operation::AddToBlock => {
            let len = Fields(data).le16(8).map(usize::from);
            if len != Some(data.len()) || data.len() < MIN_ENTRY || !data.len().is_multiple_of(8) {
                return Err(unfit());
            }
            grow(bytes, header, room, data.len())?;
            let used = Bytes(bytes).splice(at, 0, used, data)?;
            Bytes(bytes).put_le32(used_at, used - header.at)
        }
        Operation::DeleteFromRoot | Operation::DeleteFromBlock => {
            if entry_flags & LAST != 0 {
                return Err(unfit());
            }
            let used = Bytes(bytes).splice(at, entry_len, used, &[])?;
            Bytes(bytes).put_le32(used_at, used - header.at)?;
            if !header.is_fixed {
                bytes.truncate(used);
                Bytes(bytes).put_le32(header.at + 8, room.checked_sub(entry_len).ok_or_else(unfit)?)?;
            }
            Ok(())
        }
        Operation::WriteEndOfBlock => {
            let used = (at - header.at).checked_add(data.len()).filter(|used| *used <= room).ok_or_else(unfit)?;
            Bytes(bytes).put(at, data)?;
            Bytes(bytes).put_le32(used_at, used)?;
            check(bytes, header)
        }
        Operation::SetVcnInRoot | Operation::SetVcnInBlock => {
            if entry_flags & HAS_CHILD == 0 || data.len() != 8 || entry_len < MIN_ENTRY + 8 {
                return Err(unfit());
            }
            Bytes(bytes).put(at + entry_len - 8, data)
        }
        Operation::UpdateNameInRoot | Operation::UpdateNameInBlock => {
            if data.len() != NAME_COPY || usize::from(Bytes(bytes).le16(at + 10)?) < 8 + NAME_COPY {
                return Err(unfit());
            }
            Bytes(bytes).put(at + MIN_ENTRY + 8, data)
        }
        Operation::UpdateDataInBlock => {
            let offset = usize::from(Bytes(bytes).le16(at)?);
            if offset < MIN_ENTRY || offset + data.len() > entry_len {
                return Err(unfit());
            }
            Bytes(bytes).put(at + offset, data)
        }
        _ => Err(unfit()),
    }
}

/// Makes room for an entry.
fn grow(bytes: &mut Vec<u8>, header: Header, room: usize, len: usize) -> Result<()> {
    if !header.is_fixed {
        bytes.resize(bytes.len() + len, 0);
        return Bytes(bytes).put_le32(header.at + 8, room + len);
    }
    let used = Bytes(bytes).le32(header.at + 4)?;
    if used + len > room || header.at + room > bytes.len() {
        return Err(unfit());
    }
    Ok(())
}

/// Returns the bytes of the entry that starts at `wanted`.
fn entry(bytes: &mut [u8], header: Header, wanted: usize) -> Result<usize> {
    let mut found = None;
    walk(bytes, header, |at, len, _| {
        if at == wanted {
            found = Some(len);
        }
        found.is_none()
    })?;
    found.ok_or_else(unfit)
}

/// Checks that the entries are a row that ends with the last.
pub(super) fn check(bytes: &mut [u8], header: Header) -> Result<()> {
    let mut last = None;
    let end = walk(bytes, header, |at, len, flags| {
        if flags & LAST != 0 {
            last = Some(at + len);
        }
        last.is_none()
    })?;
    if last == Some(end) { Ok(()) } else { Err(unfit()) }
}

/// Goes through the entries while `is_more` returns true of where one lies, its length and flags; returns where they end.
fn walk(bytes: &mut [u8], header: Header, mut is_more: impl FnMut(usize, usize, u16) -> bool) -> Result<usize> {
    let bytes = Bytes(bytes);
    let mut at = header.at.checked_add(bytes.le32(header.at)?).ok_or_else(unfit)?;
    let end = header.at.checked_add(bytes.le32(header.at + 4)?).ok_or_else(unfit)?;
    if end > bytes.0.len() {
        return Err(unfit());
    }
    while at < end {
        let len = usize::from(bytes.le16(at + 8)?);
        if len < MIN_ENTRY || !len.is_multiple_of(8) || len > end - at {
            return Err(unfit());
        }
        if !is_more(at, len, bytes.le16(at + 12)?) {
            break;
        }
        at += len;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { at: 0, is_fixed: true };

    /// An entry of a file of this number with a child, of which what it holds follows its name.
    fn entry(number: u8, flags: u16, len: u16) -> Vec<u8> {
        let mut bytes = vec![number; usize::from(len)];
        bytes[..2].copy_from_slice(&0x10_u16.to_le_bytes());
        bytes[8..10].copy_from_slice(&len.to_le_bytes());
        bytes[10..12].copy_from_slice(&(len - 0x18).to_le_bytes());
        bytes[12..14].copy_from_slice(&(flags | HAS_CHILD).to_le_bytes());
        bytes
    }

    /// Entries after a header, with room for some bytes more.
    fn index(entries: &[Vec<u8>], room: usize) -> Vec<u8> {
        let entries = entries.concat();
        let mut bytes = vec![0; 0x10];
        bytes.extend(&entries);
        let used = bytes.len();
        bytes.resize(used + room, 0);
        for (at, number) in [(0, 0x10), (4, used), (8, used + room)] {
            bytes[at..at + 4].copy_from_slice(&u32::try_from(number).expect("small").to_le_bytes());
        }
        bytes
    }

    #[test]
    fn entries_come_go_and_change() {
        let (a, b, last) = (entry(1, 0, 0x20), entry(2, 0, 0x60), entry(9, LAST, 0x18));
        let before = index(&[a.clone(), last.clone()], 0x60);
        let mut bytes = before.clone();
        let mut act = |operation, at, data: &[u8]| {
            apply(&mut bytes, HEADER, operation, at, data).expect("it fits");
            check(&mut bytes, HEADER).expect("a row of entries");
            bytes.clone()
        };
        let added = act(Operation::AddToBlock, 0x30, &b);
        assert_eq!(added, index(&[a.clone(), b.clone(), last.clone()], 0));
        let changed = act(Operation::UpdateNameInBlock, 0x30, &[7; NAME_COPY]);
        assert_eq!(
            (&changed[..0x48], &changed[0x48..0x80], &changed[0x80..]),
            (&added[..0x48], &[7; 0x38][..], &added[0x80..])
        );
        let changed = act(Operation::SetVcnInBlock, 0x10, &[5; 8]);
        assert_eq!((changed[0x27], &changed[0x28..0x30]), (1, &[5; 8][..]));
        let changed = act(Operation::UpdateDataInBlock, 0x10, &[6; 8]);
        assert_eq!((changed[0x1f], &changed[0x20..0x28]), (1, &[6; 8][..]));
        let ended = act(Operation::WriteEndOfBlock, 0x10, &[b.clone(), last.clone()].concat());
        assert_eq!(ended[..0x88], index(&[b, last.clone()], 0x20)[..0x88]);
        let deleted = act(Operation::DeleteFromBlock, 0x10, &[]);
        assert_eq!(deleted[..0x28], index(&[last], 0x80)[..0x28]);
    }

    #[test]
    fn what_does_not_fit_is_damage() {
        let (a, last) = (entry(1, 0, 0x20), entry(9, LAST, 0x18));
        let full = index(&[a.clone(), last.clone()], 0);
        for (operation, at, data) in [
            (Operation::AddToBlock, 0x10, &a[..]),
            (Operation::AddToBlock, 0x10, &a[..0x18]),
            (Operation::DeleteFromBlock, 0x18, &[]),
            (Operation::DeleteFromBlock, 0x30, &[]),
            (Operation::DeleteFromBlock, 0x48, &[]),
            (Operation::SetVcnInBlock, 0x10, &[1; 4]),
            (Operation::UpdateNameInBlock, 0x10, &[1; NAME_COPY]),
            (Operation::UpdateDataInBlock, 0x10, &[1; 0x18]),
            (Operation::WriteEndOfBlock, 0x10, &[&a[..], &last[..], &last[..]].concat()),
            (Operation::SetBits, 0x10, &[]),
        ] {
            let mut bytes = full.clone();
            apply(&mut bytes, HEADER, operation, at, data).expect_err("it does not fit");
        }
    }
}
