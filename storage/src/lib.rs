//! A repository at rest: a tree of named objects, and the places it can lie in.
//!
//! ```text
//! Storage ─ open, read, list, stat        what a reader needs of a place
//! WritableStorage ─ write, rename, remove, sync ...      and who changes it; publish, publish_rename
//!   ├─ LocalStorage      a folder (also one that NFS or SMB put there)
//!   ├─ MemoryStorage     for tests; also as it is after a power cut
//!   ├─ EncryptedStorage  a decorator: objects as a whole, or in order, decrypted and encrypted
//!   └─ FaultyStorage     a decorator: delays, errors and stalls on demand, for tests
//! Object, WritableObject ─ at any offset       Stream, WritableStream ─ from beginning to end
//! ObjectPath ─ a relative path that cannot leave its storage
//! with_decoded ─ how long a thread decoded what it was asked for
//! ```
//!
//! It never hears of VHD or backups.

mod checksum;
mod decoding;
mod digest;
mod direct;
mod encrypted;
mod error;
mod faulty;
mod local;
mod memory;
mod path;
mod power_cut;
mod sealed;
mod sealed_stream;
mod stream;
mod write;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::SystemTime;

pub use checksum::{Checksum, Summing};
pub use decoding::{Decoded, decoding, with_decoded};
pub use digest::sha256;
pub use encrypted::{EncryptedStorage, EncryptionKey};
pub use error::{Error, ErrorKind, Result};
pub use faulty::{Fault, FaultyStorage, Operation};
pub use local::LocalStorage;
pub use memory::MemoryStorage;
pub use path::ObjectPath;
pub use power_cut::Loss;
pub use stream::{Stream, WritableStream};
pub use write::{
    Existing, Mark, Moves, Room, Synced, UNPUBLISHED, WritableObject, WritableStorage, create_directories, publish,
    publish_rename, remove_tree, unless_gone,
};

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Bytes.
    File,
    /// Holds named objects.
    Directory,
    /// Neither: a device, a pipe, a socket.
    Other,
}

/// What is known of an object without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: Kind,
    /// Stored size in bytes (of an encrypted object: with nonce and tag).
    pub size: u64,
    /// Identity of the object for as long as it exists; 0 where the storage has none.
    pub inode: u64,
    /// Names it has; 0 once the last one was removed.
    pub links: u64,
    /// When its bytes were last written.
    pub modified: SystemTime,
    /// When its bytes, names or attributes last changed, which no program can set; `modified` where the storage has none.
    pub changed: SystemTime,
}

/// One name in a listing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The name, without folders. Names that are not UTF-8 are not listed: no program that writes repositories makes
    /// them.
    pub name: String,
    /// Whether it is known to be a directory.
    pub is_directory: bool,
}

/// What a storage can do, said instead of being asked its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// A part of an object can be read without reading all of it.
    pub ranged_reads: bool,
    /// Each operation crosses a network: caches of attributes lie, and latency counts.
    pub is_remote: bool,
}

/// A tree of named objects.
pub trait Storage: Send + Sync {
    /// Opens an object for positioned reads.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::IsDirectory`], or what the storage says.
    fn open(&self, path: &ObjectPath) -> Result<Arc<dyn Object>>;

    /// Opens an object to be read once, from its beginning to its end: also one that is encrypted and too long to be opened.
    ///
    /// # Errors
    /// As for [`Storage::open`]; [`ErrorKind::TooLarge`] if its encryption shows of none that long whether it is damaged.
    fn open_stream(&self, path: &ObjectPath) -> Result<Box<dyn Stream>> {
        stream::of_object(self.open(path)?)
    }

    /// Reads a whole object of at most `limit` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] if it is longer than `limit`; else as for [`Storage::open`].
    fn read(&self, path: &ObjectPath, limit: u64) -> Result<Vec<u8>>;

    /// Lists the names in a directory, in no order.
    ///
    /// # Errors
    /// Any failure, also in the middle, is an error: a listing is complete or not there.
    fn list(&self, path: &ObjectPath) -> Result<Vec<Entry>>;

    /// Returns what is known of an object.
    ///
    /// # Errors
    /// As for [`Storage::open`].
    fn stat(&self, path: &ObjectPath) -> Result<Stat>;

    /// Returns what the storage can do.
    fn capabilities(&self) -> Capabilities;

    /// Returns a name of the place for messages, without secrets.
    fn describe(&self) -> String;
}

/// An open object.
pub trait Object: Send + Sync {
    /// Fills `buffer` from `offset` (bytes); returns how many bytes there were, less than asked only at the end.
    ///
    /// # Errors
    /// What the storage says.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize>;

    /// Returns what is known of the object now, also after its name is gone. The size is that of the readable bytes.
    ///
    /// # Errors
    /// What the storage says.
    fn stat(&self) -> Result<Stat>;

    /// Returns the file of this machine whose bytes are the object's, if there is one: the system copies from it by itself.
    fn local_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
