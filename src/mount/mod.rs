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
//!   ├─ loops ─ a disk as a loop device, and what the kernel reads on it
//!   └─ transport ─ the requests and the handles that answer them, whatever carries them
//!        └─ fuser ─ the one file that names the crate which talks to /dev/fuse
//! ```
//!
//! Nothing here writes to a repository: a mount is read-only, and what is written to a loop device is kept beside it.

mod attributes;
mod caching;
mod dispatch;
mod errno;
mod filesystem;
mod fuser;
mod handles;
mod kernel;
mod loops;
mod mounts;
mod pool;
mod requests;
mod session;
mod transport;
mod watcher;

pub use loops::{LoopEnder, LoopMount, LoopOptions, Looped, attach, mount_loop};
pub use session::{DEFAULT_TIMEOUT, Error, ErrorKind, MountOptions, Result, Session, Unmounter, mount, unmount};
