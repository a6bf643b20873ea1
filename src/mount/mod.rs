//! The tree as a mounted filesystem.
//!
//! ```text
//! session ─ mounts, waits, unmounts
//!   └─ filesystem ─ answers requests from the tree; open files and directories
//!        ├─ errno ─ the one place where an error becomes an error number
//!        └─ transport ─ the requests and the handles that answer them, whatever carries them
//!             └─ fuser ─ the one file that names the crate which talks to /dev/fuse
//! ```
//!
//! Nothing here writes: a mount is read-only.

mod errno;
mod filesystem;
mod fuser;
mod handles;
mod mounts;
mod session;
mod transport;

pub use session::{Error, ErrorKind, MountOptions, Result, Session, Unmounter, mount, unmount};
