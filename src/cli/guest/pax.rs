//! Archives in the pax format, written from their beginning to their end.
//!
//! ```text
//! [pax header, its records]  header  content, padded to 512 bytes      for each file
//! two blocks of zeroes                                                 at the end
//! ```
//!
//! Records are written for what the header has no room for, or no field: long names, large numbers, times between two seconds,
//! extended attributes (`SCHILY.xattr.`, `SCHILY.acl.`), and holes (`GNU.sparse.`, version 1.0). Text is bytes as the guest has them.
//! Source: POSIX.1-2017, pax, "pax Interchange Format"; GNU tar manual, "Storing Sparse Files"; for the attributes star(5).

use std::ffi::OsString;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use super::acl;
use crate::cli::zeroes::zeroes;

/// Bytes of a block: of a header, and what content is padded to.
const BLOCK: u64 = 512;

/// Bytes of a name in a header.
const NAME: usize = 100;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    CharacterDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// A file in an archive.
pub struct Member<'a> {
    pub kind: Kind,
    /// From where it is unpacked; of a directory with a `/` at its end.
    pub path: &'a [u8],
    /// Of a link.
    pub target: &'a [u8],
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub modified: SystemTime,
    pub device: (u32, u32),
    pub xattrs: &'a [(OsString, Vec<u8>)],
    /// In bytes, holes included; zero of what has no content.
    pub size: u64,
    /// What is no hole, ascending, if the holes are to be left out.
    pub data: Option<&'a [Range<u64>]>,
}

/// An archive that is written.
pub struct Archive<W> {
    output: W,
    /// Content that is to come for the last member, and what pads it.
    missing: u64,
    padding: u64,
}

impl<W: Write> Archive<W> {
    /// Begins one.
    pub fn new(output: W) -> Self {
        Self { output, missing: 0, padding: 0 }
    }

    /// Begins a member, whose content has to follow: that of its `data`, if this was given, else all of it.
    ///
    /// # Errors
    /// What the output says.
    pub fn begin(&mut self, member: &Member<'_>) -> io::Result<()> {
        let mut records = Vec::new();
        let map = member.data.map(|data| sparse_map(data, member.size));
        let mut name = member.path.to_vec();
        if map.is_some() {
            record(&mut records, b"GNU.sparse.major", b"1");
            record(&mut records, b"GNU.sparse.minor", b"0");
            record(&mut records, b"GNU.sparse.name", member.path);
            record(&mut records, b"GNU.sparse.realsize", member.size.to_string().as_bytes());
            name = [b"GNUSparseFile.0/", last_part(member.path)].concat();
        } else if name.len() > NAME {
            record(&mut records, b"path", member.path);
        }
        if member.target.len() > NAME {
            record(&mut records, b"linkpath", member.target);
        }
        let content = match (&map, member.data) {
            (Some(map), Some(data)) => map.len() as u64 + data.iter().map(|range| range.end - range.start).sum::<u64>(),
            _ => member.size,
        };
        for (key, value, digits) in
            [("size", content, 11), ("uid", member.uid.into(), 7), ("gid", member.gid.into(), 7)]
        {
            if value >= 1 << (3 * digits) {
                record(&mut records, key.as_bytes(), value.to_string().as_bytes());
            }
        }
        let seconds = whole_seconds(member.modified);
        if seconds.is_none() {
            record(&mut records, b"mtime", decimal(member.modified).as_bytes());
        }
        for (name, value) in member.xattrs {
            let name = name.as_bytes();
            match acl::key(name).and_then(|key| Some((key, acl::text(value)?))) {
                // Who unpacks takes a list from nowhere else.
                Some((key, text)) => record(&mut records, key, text.as_bytes()),
                None => record(&mut records, &[b"SCHILY.xattr.", &*key_of(name)].concat(), value),
            }
        }
        if !records.is_empty() {
            let name = [b"PaxHeaders/", last_part(member.path)].concat();
            let size = records.len() as u64;
            self.output.write_all(&header(&Fields {
                kind: b'x',
                name: &name,
                size,
                mode: 0o644,
                ..Fields::default()
            }))?;
            self.output.write_all(&records)?;
            self.zeroes(size.next_multiple_of(BLOCK) - size)?;
        }
        let kind = match member.kind {
            Kind::File => b'0',
            Kind::HardLink => b'1',
            Kind::Symlink => b'2',
            Kind::CharacterDevice => b'3',
            Kind::BlockDevice => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        let fields = Fields {
            kind,
            name: &name,
            target: member.target,
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            size: content,
            seconds: seconds
                .unwrap_or_else(|| member.modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())),
            device: member.device,
        };
        self.output.write_all(&header(&fields))?;
        (self.missing, self.padding) = (content, content.next_multiple_of(BLOCK) - content);
        self.write(&map.unwrap_or_default())
    }

    /// Writes content of the last member, which has to be as much as was promised.
    ///
    /// # Errors
    /// What the output says; that it is more.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(missing) = self.missing.checked_sub(bytes.len() as u64) else {
            return Err(io::Error::other("more bytes of a file than its size"));
        };
        self.output.write_all(bytes)?;
        self.missing = missing;
        if missing == 0 {
            let padding = std::mem::take(&mut self.padding);
            self.zeroes(padding)?
        }
        Ok(())
    }

    /// Writes zeroes as content, or, without `len`, for all that is missing. Returns how many.
    ///
    /// # Errors
    /// As for [`Archive::write`].
    pub fn fill(&mut self, len: Option<u64>) -> io::Result<u64> {
        let filled = len.unwrap_or(self.missing);
        zeroes(filled).try_for_each(|piece| self.write(piece))?;
        Ok(filled)
    }

    /// Ends it, and returns what it was written to.
    ///
    /// # Errors
    /// What the output says.
    pub fn finish(mut self) -> io::Result<W> {
        self.zeroes(2 * BLOCK)?;
        Ok(self.output)
    }

    fn zeroes(&mut self, len: u64) -> io::Result<()> {
        zeroes(len).try_for_each(|piece| self.output.write_all(piece))
    }
}

/// The fields of a header.
#[derive(Default)]
struct Fields<'a> {
    kind: u8,
    name: &'a [u8],
    target: &'a [u8],
    mode: u16,
    uid: u32,
    gid: u32,
    size: u64,
    seconds: u64,
    device: (u32, u32),
}

/// Writes a header. What does not fit stands in a record, and here cut or as zero.
fn header(fields: &Fields<'_>) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &fields.name[..fields.name.len().min(NAME)]);
    put(157, &fields.target[..fields.target.len().min(NAME)]);
    for (at, digits, value) in [
        (100, 7, u64::from(fields.mode)),
        (108, 7, fields.uid.into()),
        (116, 7, fields.gid.into()),
        (124, 11, fields.size),
        (136, 11, fields.seconds),
        (329, 7, fields.device.0.into()),
        (337, 7, fields.device.1.into()),
    ] {
        let value = if value < 1 << (3 * digits) { value } else { 0 };
        put(at, format!("{value:0digits$o}").as_bytes());
    }
    put(148, b"        ");
    put(156, &[fields.kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Adds a record: `LENGTH KEY=VALUE\n`, where the length counts its own digits, too.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while rest + len.to_string().len() != len {
        len = rest + len.to_string().len();
    }
    records.extend_from_slice(format!("{len} ").as_bytes());
    for part in [key, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// The name of an attribute in the key of a record, which ends at the first `=`. Source: GNU tar, as it writes them.
fn key_of(name: &[u8]) -> Vec<u8> {
    let escaped = name.iter().map(|byte| match byte {
        b'=' => &b"%3D"[..],
        b'%' => b"%25",
        byte => std::slice::from_ref(byte),
    });
    escaped.collect::<Vec<_>>().concat()
}

/// Where the data of a file with holes stands, padded to a block. A hole at its end is told by an empty range there.
fn sparse_map(data: &[Range<u64>], size: u64) -> Vec<u8> {
    let end = data.last().map_or(0, |range| range.end);
    let last = (end < size).then_some(size..size);
    let mut map = format!("{}\n", data.len() + usize::from(last.is_some()));
    for range in data.iter().chain(&last) {
        map += &format!("{}\n{}\n", range.start, range.end - range.start);
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(512), 0);
    map
}

fn last_part(path: &[u8]) -> &[u8] {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    &name[..name.len().min(NAME - 20)]
}

/// Returns a time in seconds, if that is all of it and a header has room for it.
fn whole_seconds(time: SystemTime) -> Option<u64> {
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    (since.subsec_nanos() == 0 && since.as_secs() < 1 << 33).then_some(since.as_secs())
}

fn decimal(time: SystemTime) -> String {
    let (sign, distance) = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => ("", since),
        Err(before) => ("-", before.duration()),
    };
    format!("{sign}{}.{:09}", distance.as_secs(), distance.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_length_of_a_record_counts_itself() {
        for len in [1, 5, 80, 88, 89, 90, 91, 980, 985, 986, 987, 988, 989, 990, 9990] {
            let mut records = Vec::new();
            record(&mut records, b"path", &vec![b'x'; len]);
            let said: usize = String::from_utf8_lossy(&records).split(' ').next().unwrap().parse().unwrap();
            assert_eq!(said, records.len(), "{len}");
        }
        assert_eq!(key_of(b"user.a=b%3D"), b"user.a%3Db%253D");
    }

    #[test]
    fn times_are_exact_on_either_side_of_1970() {
        let half = Duration::new(1, 500_000_000);
        assert_eq!(decimal(UNIX_EPOCH + half), "1.500000000");
        assert_eq!(decimal(UNIX_EPOCH - half), "-1.500000000");
        assert_eq!(whole_seconds(UNIX_EPOCH + Duration::from_secs(7)), Some(7));
        for time in [UNIX_EPOCH + half, UNIX_EPOCH - Duration::from_secs(1), UNIX_EPOCH + Duration::from_secs(1 << 33)]
        {
            assert_eq!(whole_seconds(time), None);
        }
    }

    #[test]
    fn a_map_of_holes_says_where_the_data_and_the_end_are() {
        let data = [4096..4099, 8192..8200];
        for (size, text) in [(8200, "2\n4096\n3\n8192\n8\n"), (9000, "3\n4096\n3\n8192\n8\n9000\n0\n")] {
            let map = sparse_map(&data, size);
            assert_eq!((map.len(), &map[..text.len()]), (512, text.as_bytes()));
            assert!(map[text.len()..].iter().all(|byte| *byte == 0));
        }
    }
}
