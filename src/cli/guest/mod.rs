//! `xofs ls`, `cat`, `cp` and `tar`: the files in the disks of guests, without a mount; `xofs loop`: with the kernel's.
//!
//! ```text
//! path ─► find (follows links inside the volume) ─► walk ─► ls · cat · cp ─► folder · tar ─► pax, acl
//!             ├─► tree: as a mount shows it             └─► content
//!             └─► loop
//! ```

mod acl;
mod cat;
mod content;
mod cp;
mod find;
mod folder;
mod loop_mount;
mod ls;
mod path;
mod pax;
mod tar;
mod walk;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use anyhow::Result;

use super::exit::Exit;
use super::text::Shown;
use crate::tree::{self, Kind, Tree};
pub use cat::{CatArgs, run as cat};
pub use cp::{CpArgs, run as cp};
use find::{Files, Found};
pub use loop_mount::{LoopArgs, run as loop_mount};
pub use ls::{LsArgs, run as ls};
pub use tar::{TarArgs, run as tar};
use walk::{Item, Step, Walk};

/// Of files that are read one after the other, those that cannot be: each is said, and the others are read.
#[derive(Default)]
pub struct Failures {
    count: usize,
    /// The only one, as long as nothing was done.
    first: Option<anyhow::Error>,
    is_anything_done: bool,
}

impl Failures {
    fn add(&mut self, error: anyhow::Error) {
        self.count += 1;
        if self.count == 1 && !self.is_anything_done {
            self.first = Some(error);
            return;
        }
        self.first.take().iter().chain([&error]).for_each(say);
    }

    /// Says that something was done.
    fn done(&mut self) {
        self.is_anything_done = true;
        self.first.take().iter().for_each(say);
    }

    fn count(&mut self, result: Result<()>) {
        match result {
            Ok(()) => self.done(),
            Err(error) => self.add(error),
        }
    }

    /// Ends the command.
    ///
    /// # Errors
    /// The only failure, if nothing else was done.
    fn end(self) -> Result<Exit> {
        match (self.first, self.count) {
            (Some(only), _) => Err(only),
            (None, 0) => Ok(Exit::Done),
            (None, _) if self.is_anything_done => Ok(Exit::Partial),
            (None, _) => Ok(Exit::Failed),
        }
    }
}

fn say(error: &anyhow::Error) {
    say!("xofs: {}", Shown(&format!("{error:#}")));
}

/// Returns the extended attributes of a file, without those that only a mount has.
fn xattrs(tree: &Tree, inode: u64) -> tree::Result<Vec<(OsString, Vec<u8>)>> {
    let mut found = tree.xattrs(inode)?;
    found.retain(|(name, _)| !name.as_bytes().starts_with(b"user.xofs."));
    Ok(found)
}

/// What is to be read of a file or folder, for whoever looks how far it is.
fn stored_bytes(files: &Files, found: &Found) -> u64 {
    let bytes = |step| match step {
        Step::Other(Item { attributes, .. }) if attributes.kind == Kind::File => {
            attributes.size.min(attributes.allocated)
        }
        _ => 0,
    };
    Walk::new(&files.tree, found.attributes, true).map(bytes).fold(0, u64::saturating_add)
}
