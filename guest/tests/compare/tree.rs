//! A tree of files as the kernel shows it, and as a reader does; and in what they differ.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use disk::Disk;
use guest::{Attributes, GuestFs, Inode, Kind, Source, Time};
use rustix::fs::{AtFlags, SeekFrom, StatxFlags};
use serde::{Deserialize, Serialize};

/// Bytes that are hashed at once; those that are all zero are not hashed, so that holes and zeroes are the same.
const PIECE: u64 = 64 << 10;

/// Extents asked for at once: few, so that windows are met.
const ROOM: usize = 37;

/// All that is compared of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// Its number.
    pub inode: u64,
    /// What is known without reading it.
    pub attributes: Attributes,
    /// The target of a symbolic link.
    pub target: Vec<u8>,
    /// By name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// A hash of the content and where it stands.
    pub content: u64,
}

/// Files by path; the root is the empty one.
pub type Tree = BTreeMap<Vec<u8>, Shown>;

/// Returns what the kernel shows below `root`, which is not on another filesystem.
pub fn of_kernel(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let file = kernel_file(&path);
        if file.attributes.kind == Kind::Directory {
            let names = fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            pending.extend(names.map(|entry| entry.expect("a name").path()));
        }
        let below = path.strip_prefix(root).expect("it lies below");
        tree.insert(below.as_os_str().as_bytes().to_vec(), file);
    }
    tree
}

fn kernel_file(path: &Path) -> Shown {
    let stat = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let extended =
        rustix::fs::statx(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BTIME).expect("statx");
    let created = (extended.stx_mask & StatxFlags::BTIME.bits() != 0)
        .then_some(Time { seconds: extended.stx_btime.tv_sec, nanoseconds: extended.stx_btime.tv_nsec });
    let kind = match stat.file_type() {
        kind if kind.is_dir() => Kind::Directory,
        kind if kind.is_file() => Kind::File,
        kind if kind.is_symlink() => Kind::Symlink,
        kind if kind.is_fifo() => Kind::Fifo,
        kind if kind.is_socket() => Kind::Socket,
        kind if kind.is_char_device() => Kind::CharacterDevice,
        kind if kind.is_block_device() => Kind::BlockDevice,
        kind => panic!("{}: {kind:?}", path.display()),
    };
    let time = |seconds, nanoseconds: i64| Time { seconds, nanoseconds: nanoseconds.try_into().expect("nanoseconds") };
    let attributes = Attributes {
        kind,
        mode: u16::try_from(stat.mode() & 0o7777).expect("twelve bits"),
        uid: stat.uid(),
        gid: stat.gid(),
        links: stat.nlink().try_into().expect("32 bits"),
        size: stat.size(),
        allocated: stat.blocks() * 512,
        device: (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev())),
        accessed: time(stat.atime(), stat.atime_nsec()),
        modified: time(stat.mtime(), stat.mtime_nsec()),
        changed: time(stat.ctime(), stat.ctime_nsec()),
        created,
    };
    let target = if kind == Kind::Symlink {
        fs::read_link(path).expect("it is a link").as_os_str().as_bytes().to_vec()
    } else {
        Vec::new()
    };
    let content = if kind == Kind::File { kernel_content(path) } else { 0 };
    Shown { inode: stat.ino(), attributes, target, xattrs: kernel_xattrs(path), content }
}

fn kernel_xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        // Not every driver has any.
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        listed => listed.unwrap_or_else(|error| panic!("{}: {error}", path.display())),
    };
    names.truncate(len);
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 64 << 10];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..])
                .unwrap_or_else(|error| panic!("{}: {}: {error}", path.display(), name.escape_ascii()));
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect()
}

fn kernel_content(path: &Path) -> u64 {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let size = file.metadata().expect("it is open").len();
    let mut content = Content::new(size);
    let mut at = 0;
    while at < size {
        match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(data) => at = data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => panic!("{}: {error}", path.display()),
        }
        let end = rustix::fs::seek(&file, SeekFrom::Hole(at)).expect("there is data before it");
        at = content.add(at, end, |offset, piece| file.read_exact_at(piece, offset).expect("within the file"));
    }
    content.hasher.finish()
}

/// Returns what stands for the bytes of a file in [`Shown::content`].
pub fn content_of(bytes: &[u8]) -> u64 {
    let mut content = Content::new(bytes.len() as u64);
    content.add(0, bytes.len() as u64, |offset, piece| {
        let start = usize::try_from(offset).expect("within the bytes");
        piece.copy_from_slice(&bytes[start..start + piece.len()]);
    });
    content.hasher.finish()
}

/// Hashes pieces that hold anything.
struct Content {
    hasher: DefaultHasher,
    size: u64,
    next: u64,
}

impl Content {
    fn new(size: u64) -> Self {
        Self { hasher: DefaultHasher::new(), size, next: 0 }
    }

    /// Adds the pieces that `start..end` lies in, and were not added yet; returns the end of the last.
    fn add(&mut self, start: u64, end: u64, mut read: impl FnMut(u64, &mut [u8])) -> u64 {
        let mut at = (start / PIECE * PIECE).max(self.next);
        let end = end.min(self.size);
        while at < end {
            let mut piece = vec![0; length(PIECE.min(self.size - at))];
            read(at, &mut piece);
            if piece.iter().any(|byte| *byte != 0) {
                self.hasher.write_u64(at);
                self.hasher.write(&piece);
            }
            at += PIECE;
        }
        self.next = self.next.max(at);
        at.max(end)
    }
}

fn length(len: u64) -> usize {
    usize::try_from(len).expect("it is in memory")
}

/// Returns what a reader shows of a volume. Errors are in the list.
pub fn of_guest(guest: &dyn GuestFs, disk: &dyn Disk) -> (Tree, Vec<String>) {
    of_members(guest, &[disk])
}

/// Returns what a reader shows of several volumes. Errors are in the list.
pub fn of_members(guest: &dyn GuestFs, members: &[&dyn Disk]) -> (Tree, Vec<String>) {
    let (mut tree, mut errors) = (Tree::new(), Vec::new());
    let mut pending = vec![(Vec::new(), guest.root())];
    while let Some((path, inode)) = pending.pop() {
        let name = path.escape_ascii().to_string();
        let mut note = |what: &str, error: guest::Error| errors.push(format!("/{name}: {what}: {error}"));
        let attributes = match guest.attributes(inode) {
            Ok(attributes) => attributes,
            Err(error) => {
                note("attributes", error);
                continue;
            }
        };
        let mut file = Shown { inode: inode.0, attributes, target: Vec::new(), xattrs: BTreeMap::new(), content: 0 };
        match guest.xattrs(inode) {
            Ok(xattrs) => {
                let count = xattrs.len();
                file.xattrs = xattrs.into_iter().map(|xattr| (xattr.name, xattr.value)).collect();
                assert_eq!(count, file.xattrs.len(), "{name}: an attribute twice");
            }
            Err(error) => note("xattrs", error),
        }
        match file.attributes.kind {
            Kind::Directory => match guest.list(inode) {
                Ok(entries) => pending.extend(entries.into_iter().map(|entry| {
                    let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                    ([&path, slash, &entry.name].concat(), entry.inode)
                })),
                Err(error) => note("list", error),
            },
            Kind::Symlink => match guest.target(inode) {
                Ok(target) => file.target = target,
                Err(error) => note("target", error),
            },
            Kind::File => match guest_content(guest, members, inode, file.attributes.size) {
                Ok(content) => file.content = content,
                Err(error) => note("content", error),
            },
            _ => {}
        }
        if tree.insert(path, file).is_some() {
            errors.push(format!("/{name}: twice"));
        }
    }
    (tree, errors)
}

fn guest_content(guest: &dyn GuestFs, members: &[&dyn Disk], inode: Inode, size: u64) -> guest::Result<u64> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let window = guest.extents(inode, at, ROOM)?;
        assert!(window.until > at, "inode {}: no further than {at}", inode.0);
        at = window.until;
        extents.extend(window.found);
    }
    let mut end = 0;
    for extent in &extents {
        assert!(extent.start >= end && extent.len > 0, "inode {}: {extent:?} over what ends at {end}", inode.0);
        end = extent.start + extent.len;
    }
    let mut content = Content::new(size);
    for (index, extent) in extents.iter().enumerate() {
        if extent.source == Source::Zeroes {
            continue;
        }
        let mut result = Ok(());
        content.add(extent.start, extent.start + extent.len, |offset, piece| {
            // A piece may reach into what follows.
            let last = offset + piece.len() as u64;
            for extent in extents[index..].iter().take_while(|extent| extent.start < last) {
                let start = extent.start.max(offset);
                let end = (extent.start + extent.len).min(last);
                let here = &mut piece[length(start - offset)..length(end.max(start) - offset)];
                let within = start - extent.start;
                result = match &extent.source {
                    Source::Member(member, place) => {
                        members[usize::from(*member)].read_at(place + within, here).map_err(Into::into)
                    }
                    Source::Bytes(bytes) => {
                        here.copy_from_slice(&bytes[length(within)..][..here.len()]);
                        Ok(())
                    }
                    Source::Zeroes => Ok(()),
                    Source::Encoded => guest.decode(inode, start, here),
                };
                if result.is_err() {
                    return;
                }
            }
        });
        result?;
    }
    Ok(content.hasher.finish())
}

/// Gives the files of a reader the numbers that the kernel has for them, and panics unless those that are one file here are one there.
pub fn renumber(what: &str, kernel: &Tree, guest: &mut Tree) {
    let mut numbers = BTreeMap::new();
    for (path, file) in guest {
        let Some(truth) = kernel.get(path) else { continue };
        let number = *numbers.entry(file.inode).or_insert(truth.inode);
        assert_eq!(number, truth.inode, "{what}: {} is not the same file", path.escape_ascii());
        file.inode = number;
    }
}

/// Returns in what two trees differ, a line each.
///
/// Of what the kernel changed itself at or after `mounted` the times of that are not compared, nor the room it
/// takes: recovery ends truncations, and adds names to directories.
pub fn differences(kernel: &Tree, guest: &Tree, mounted: Option<Time>) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |path: &[u8], what: String| lines.push(format!("/{}: {what}", path.escape_ascii()));
    for path in kernel.keys().filter(|path| !guest.contains_key(*path)) {
        line(path, "missing".to_owned());
    }
    for (path, shown) in guest {
        let Some(truth) = kernel.get(path) else {
            line(path, "extra".to_owned());
            continue;
        };
        let mut truth = truth.clone();
        if truth.attributes.created.is_none() || shown.attributes.created.is_none() {
            truth.attributes.created = shown.attributes.created;
        }
        if mounted.is_some_and(|mounted| truth.attributes.changed >= mounted) {
            truth.attributes.changed = shown.attributes.changed;
            truth.attributes.modified = shown.attributes.modified;
            truth.attributes.allocated = shown.attributes.allocated;
            if truth.attributes.kind == Kind::Directory {
                truth.attributes.size = shown.attributes.size;
            }
        }
        let was_made = truth.attributes.kind == Kind::Directory && truth.attributes.links == 1;
        if mounted.is_some() && was_made {
            // So it makes directories that were committed fast; the guest had two.
            truth.attributes.links = shown.attributes.links;
        }
        if truth != *shown {
            line(path, format!("\n  kernel {truth:?}\n  guest  {shown:?}"));
        }
    }
    lines
}
