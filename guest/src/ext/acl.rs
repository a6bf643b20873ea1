//! POSIX access control lists: ext keeps them shorter than the kernel gives them.
//!
//! ```text
//! on the volume   u32 1, then u16 tag, u16 permissions, and u32 id of a user or group
//! getxattr        u32 2, then u16 tag, u16 permissions, u32 id or all ones
//! ```
//!
//! Source: include/uapi/linux/posix_acl_xattr.h of Linux, and what it makes of volumes.

use crate::{Error, Fields, Result};

const STORED_VERSION: u32 = 1;
const XATTR_VERSION: u32 = 2;

/// Returns the form in which `getxattr(2)` gives a list.
///
/// # Errors
/// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) if it is no list.
pub(super) fn to_xattr(stored: &[u8]) -> Result<Vec<u8>> {
    let fields = Fields(stored);
    let broken = || Error::damaged("an access control list is none");
    if fields.le32(0) != Some(STORED_VERSION) {
        return Err(broken());
    }
    let mut converted = XATTR_VERSION.to_le_bytes().to_vec();
    let mut at = 4;
    while at < stored.len() {
        let tag = fields.le16(at).ok_or_else(broken)?;
        let head = fields.bytes(at, 4).ok_or_else(broken)?;
        let id = match tag {
            // The owner, the owning group, the mask, all others.
            0x01 | 0x04 | 0x10 | 0x20 => None,
            0x02 | 0x08 => Some(fields.le32(at + 4).ok_or_else(broken)?),
            _ => return Err(broken()),
        };
        converted.extend(head);
        converted.extend(id.unwrap_or(u32::MAX).to_le_bytes());
        at += if id.is_some() { 8 } else { 4 };
    }
    Ok(converted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_has_an_id_afterwards() {
        let stored = [&[1, 0, 0, 0][..], &[1, 0, 7, 0], &[2, 0, 5, 0, 0xe8, 3, 0, 0], &[0x20, 0, 4, 0]].concat();
        let given = [
            &[2, 0, 0, 0][..],
            &[1, 0, 7, 0, 255, 255, 255, 255],
            &[2, 0, 5, 0, 0xe8, 3, 0, 0],
            &[0x20, 0, 4, 0, 255, 255, 255, 255],
        ]
        .concat();
        assert_eq!(to_xattr(&stored), Ok(given));
        for broken in [&stored[..3], &stored[..6], &stored[..14], &[2, 0, 0, 0], &[1, 0, 0, 0, 3, 0, 0, 0]] {
            assert!(to_xattr(broken).is_err(), "{broken:?}");
        }
    }
}
