//! The tree as a mounted filesystem.
//!
//! ```text
//! session ─ mounts, waits, unmounts
//!   ├─ dispatch ─ which thread works on a request, and whether it is tried at all
//!   │    ├─ requests ─ those under way, each with its reply
//!   │    ├─ watcher ─ answers in place of work that is stuck: deadlines and signals
//!   │    ├─ pool ─ threads for work that may wait
//!   │    └─ filesystem ─ answers requests from the tree; open files and directories
//!   │         ├─ attributes ─ what stat(2) shows, and for how long that is believed
//!   │         ├─ caching ─ whether a disk is read through the page cache
//!   │         └─ errno ─ the one place where an error becomes an error number
//!   ├─ kernel ─ mount(2) or fusermount3; mounts, what is mounted where
//!   └─ transport ─ the requests and the handles that answer them, whatever carries them
//!        └─ fuser ─ the one file that names the crate which talks to /dev/fuse
//! ```
//!
//! Nothing here writes: a mount is read-only.

mod attributes;
mod caching;
mod dispatch;
mod errno;
mod filesystem;
mod fuser;
mod handles;
mod kernel;
mod mounts;
mod pool;
mod requests;
mod session;
mod transport;
mod watcher;

pub use session::{DEFAULT_TIMEOUT, Error, ErrorKind, MountOptions, Result, Session, Unmounter, mount, unmount};
