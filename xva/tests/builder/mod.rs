//! Makes XVAs, in the ways of XAPI and of Xen Orchestra, and keeps count of what is read of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use disk::Disk;
use storage::{Kind, Object, Stat};

/// Bytes of a chunk.
pub const CHUNK: usize = 1 << 20;

/// A file in memory that counts the reads.
pub struct File {
    bytes: Vec<u8>,
    reads: AtomicU64,
}

impl File {
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes, reads: AtomicU64::new(0) })
    }

    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }
}

impl Object for File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> storage::Result<usize> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let rest = usize::try_from(offset).ok().and_then(|at| self.bytes.get(at..)).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn stat(&self) -> storage::Result<Stat> {
        let size = self.bytes.len() as u64;
        let (modified, changed) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        Ok(Stat { kind: Kind::File, size, inode: 0, links: 1, modified, changed })
    }
}

/// One tar entry, padded.
pub fn entry(name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, content.len()).to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub fn header(name: &str, size: usize) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"000644 \0");
    block[124..136].copy_from_slice(format!("{size:011o} ").as_bytes());
    block[148..156].fill(b' ');
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// `ova.xml` for disks of these references and sizes.
pub fn ova(disks: &[(&str, usize)]) -> String {
    let member = |name: &str, value: &str| format!("<member><name>{name}</name><value>{value}</value></member>");
    let object = |class: &str, id: &str, fields: &str| {
        let (class, id) = (member("class", class), member("id", id));
        let snapshot = member("snapshot", &format!("<struct>{fields}</struct>"));
        format!("<value><struct>{class}{id}{snapshot}</struct></value>")
    };
    let mut objects = String::new();
    for (index, (reference, size)) in disks.iter().enumerate() {
        objects += &object("VDI", reference, &member("virtual_size", &size.to_string()));
        let vbd = [member("VDI", reference), member("userdevice", &index.to_string()), member("type", "Disk")];
        objects += &object("VBD", &format!("{reference}-vbd"), &vbd.concat());
    }
    let objects = member("objects", &format!("<array><data>{objects}</data></array>"));
    format!("<value><struct>{objects}</struct></value>")
}

/// How chunks are written.
#[derive(Clone, Default)]
pub struct Manner {
    /// As Xen Orchestra: the last chunk is filled up.
    pub is_filled_up: bool,
    /// As older XAPI: SHA-1 instead of XXH64.
    pub is_sha1: bool,
    /// Numbers that an empty chunk takes.
    pub empty: Vec<usize>,
}

/// The chunks of a disk with their checksums, chunks of zeroes left out where the format allows it.
pub fn chunks(reference: &str, content: &[u8], manner: &Manner) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut number = 0;
    let count = content.len().div_ceil(CHUNK);
    let mut add = |number: usize, chunk: &[u8]| {
        let name = format!("{reference}/{number:08}");
        bytes.extend(entry(&name, chunk));
        let (suffix, len) = if manner.is_sha1 { ("checksum", 40) } else { ("xxhash", 16) };
        // No reader looks at it.
        bytes.extend(entry(&format!("{name}.{suffix}"), &vec![b'0'; len]));
    };
    for (index, chunk) in content.chunks(CHUNK).enumerate() {
        while manner.empty.contains(&number) {
            add(number, &[]);
            number += 1;
        }
        if index == 0 || index == count - 1 || chunk.iter().any(|byte| *byte != 0) {
            let mut chunk = chunk.to_vec();
            if manner.is_filled_up {
                chunk.resize(CHUNK, 0);
            }
            add(number, &chunk);
        }
        number += 1;
    }
    bytes
}

/// A whole XVA.
pub fn xva(disks: &[(&str, &[u8])], manner: &Manner) -> Vec<u8> {
    let sizes: Vec<_> = disks
        .iter()
        .map(|(reference, content)| {
            let len = content.len();
            (*reference, if manner.is_filled_up { len.next_multiple_of(CHUNK) } else { len })
        })
        .collect();
    let mut bytes = entry("ova.xml", ova(&sizes).as_bytes());
    for (reference, content) in disks {
        bytes.extend(chunks(reference, content, manner));
    }
    bytes.extend([0; 1024]);
    bytes
}

/// Content in which every sector is different, chunks of zeroes where `pattern` has a dot.
pub fn content(pattern: &str, seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for ((index, chunk), mark) in bytes.chunks_mut(CHUNK).enumerate().zip(pattern.chars()) {
        if mark != '.' {
            for (sector, bytes) in chunk.chunks_mut(512).enumerate() {
                bytes.fill(seed);
                let id = (index * CHUNK / 512 + sector) as u64;
                bytes[..8].copy_from_slice(&id.to_be_bytes());
            }
        }
    }
    bytes
}

/// All bytes of a disk, read in pieces of an odd length.
pub fn read_all(disk: &dyn Disk) -> disk::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
    let mut at = 0;
    for piece in bytes.chunks_mut(300_007) {
        disk.read_at(at, piece)?;
        at += piece.len() as u64;
    }
    Ok(bytes)
}
