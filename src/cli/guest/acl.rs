//! Access control lists, as archives have them: in words.
//!
//! ```text
//! version 2 (u32) │ tag (u16) permissions (u16) id (u32) │ ...      as an extended attribute, little-endian
//! user::rw-,user:1000:r--,group::r--,mask::rw-,other::---           in an archive
//! ```
//!
//! Source: acl(5), and the kernel's `include/uapi/linux/posix_acl_xattr.h`; for archives star(5).

/// Returns the key under which an archive has an extended attribute that is a list.
pub fn key(xattr: &[u8]) -> Option<&'static [u8]> {
    match xattr {
        b"system.posix_acl_access" => Some(b"SCHILY.acl.access"),
        b"system.posix_acl_default" => Some(b"SCHILY.acl.default"),
        _ => None,
    }
}

/// Writes a list in words; `None` if it is none. Users and groups are numbers, which are those of the guest.
pub fn text(value: &[u8]) -> Option<String> {
    let entries = value.strip_prefix(&2_u32.to_le_bytes())?.chunks(8).map(|entry| {
        let [tag, 0, permissions @ 0..=7, 0, id @ ..] = entry else { return None };
        let id = u32::from_le_bytes(id.try_into().ok()?);
        let (who, id) = match tag {
            0x01 => ("user", String::new()),
            0x02 => ("user", id.to_string()),
            0x04 => ("group", String::new()),
            0x08 => ("group", id.to_string()),
            0x10 => ("mask", String::new()),
            0x20 => ("other", String::new()),
            _ => return None,
        };
        let letter = |bit, letter| if permissions & bit != 0 { letter } else { '-' };
        Some(format!("{who}:{id}:{}{}{}", letter(4, 'r'), letter(2, 'w'), letter(1, 'x')))
    });
    entries.collect::<Option<Vec<_>>>().map(|entries| entries.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_written_in_words_and_anything_else_is_none() {
        let entry = |tag: u8, permissions: u8, id: u32| [&[tag, 0, permissions, 0], &id.to_le_bytes()[..]].concat();
        let list = [
            2_u32.to_le_bytes().to_vec(),
            entry(1, 6, u32::MAX),
            entry(2, 4, 1000),
            entry(4, 5, u32::MAX),
            entry(8, 7, 4_000_000_000),
            entry(16, 7, u32::MAX),
            entry(32, 0, u32::MAX),
        ]
        .concat();
        let expected = "user::rw-,user:1000:r--,group::r-x,group:4000000000:rwx,mask::rwx,other::---";
        assert_eq!(text(&list).as_deref(), Some(expected));
        for wrong in [&list[..list.len() - 1], &list[4..], b"", &[&list[..], &entry(3, 0, 0)].concat()] {
            assert_eq!(text(wrong), None, "{wrong:?}");
        }
    }
}
