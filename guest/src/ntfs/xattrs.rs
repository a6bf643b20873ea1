//! Extended attributes: the streams that a file has besides its content, as ntfs-3g shows them, and what Linux has no
//! other place for.
//!
//! | name | value |
//! |---|---|
//! | `user.NAME` | the stream `NAME`, where xattr(7) has room for it |
//! | `user.ntfs.attrib` | the attributes of Windows: `0x00000020` is `FILE_ATTRIBUTE_ARCHIVE` |
//! | `user.ntfs.reparse` | the tag of a reparse point that is not shown as a link or special file |
//! | `user.ntfs.left_out` | streams that are not shown, each on a line: its bytes, its name |

use super::attributes::{Information, What, what};
use super::record::DATA;
use super::reparse::Reparse;
use super::volume::{Node, Volume};
use super::wof;
use crate::utf16;
use crate::{Result, Xattr};

/// Bytes of a name and of a value at most, attributes of a file and bytes of all of their values. Source: xattr(7); what is
/// shown of a file is in memory at once.
const MAX_NAME: usize = 255;
const MAX_VALUE: u64 = 64 << 10;
const MAX_COUNT: usize = 1000;
const MAX_VALUES: usize = 1 << 20;

const ATTRIBUTES: &[u8] = b"user.ntfs.attrib";
const REPARSE: &[u8] = b"user.ntfs.reparse";
const LEFT_OUT: &[u8] = b"user.ntfs.left_out";

/// Returns those of a file.
pub(super) fn list(volume: &Volume, node: &Node) -> Result<Vec<Xattr>> {
    let information = Information::of(volume, node)?;
    let hex = |name: &[u8], value: u32| Xattr { name: name.to_vec(), value: format!("{value:#010x}").into_bytes() };
    let mut found = vec![hex(ATTRIBUTES, information.flags(node))];
    match what(volume, node, &information)? {
        What::Reparsed(Reparse::Unknown(tag)) => found.push(hex(REPARSE, tag)),
        What::Directory => {
            if let Some(Reparse::Unknown(tag)) = super::reparse::of(volume, node)? {
                found.push(hex(REPARSE, tag));
            }
        }
        _ => {}
    }
    let mut values = 0;
    let mut left_out = Vec::new();
    for stream in volume.streams(node, DATA, |name| !name.is_empty() && name != wof::STREAM)? {
        let stored = utf16::to_bytes(stream.head.name.iter().copied());
        let name = [b"user.", stored.as_slice()].concat();
        let size = stream.size()?;
        let has_room = name.len() <= MAX_NAME
            && size <= MAX_VALUE
            && found.len() < MAX_COUNT
            && values + usize::try_from(size).unwrap_or(usize::MAX) <= MAX_VALUES;
        let is_own = name == LEFT_OUT || found.iter().any(|xattr| xattr.name == name) || stored.contains(&0);
        if has_room && !is_own && !stream.head.is_encrypted() {
            let value = stream.read(volume, node, MAX_VALUE)?;
            values += value.len();
            found.push(Xattr { name, value });
        } else {
            left_out.extend(format!("{size} ").into_bytes());
            left_out.extend(stored);
            left_out.push(b'\n');
        }
    }
    if !left_out.is_empty() {
        left_out.truncate(usize::try_from(MAX_VALUE).expect("64 KiB"));
        found.push(Xattr { name: LEFT_OUT.to_vec(), value: left_out });
    }
    Ok(found)
}
