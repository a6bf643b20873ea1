//! The conventions of mount(8) and fstab(5): what they pass, and what of it means something to xofs.
//!
//! ```text
//! mount.xofs SOURCE DIRECTORY [-sfnv] [-N namespace] [-o options] [-t type]
//! ```
//!
//! [`Request::parse`] reads such a command line, [`Request::arguments`] says it as arguments of `xofs mount`. The table of
//! options stands here and nowhere else. It does not mount, and it knows nothing of repositories.

mod options;
mod request;

pub use options::{IGNORED, Options};
pub use request::{Error, Request};

/// The exit code of a failed mount. Source: mount(8), "EXIT STATUS".
pub const MOUNT_FAILURE: u8 = 32;
