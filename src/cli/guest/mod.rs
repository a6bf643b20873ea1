//! `xofs ls`, `cat`, `cp` and `tar`: the files in the disks of guests, without a mount.
//!
//! ```text
//! path ─► find (follows links inside the volume) ─► walk ─► ls · cat · cp ─► folder · tar ─► pax
//!             └─► tree: as a mount shows it             └─► content
//! ```

mod cat;
mod content;
mod find;
mod ls;
mod path;
mod walk;

use anyhow::Result;

use super::exit::Exit;
use super::text::Shown;
pub use cat::{CatArgs, run as cat};
pub use ls::{LsArgs, run as ls};

/// Of files that are read one after the other, those that cannot be: each is said, and the others are read.
#[derive(Default)]
pub struct Failures {
    count: usize,
    first: Option<anyhow::Error>,
}

impl Failures {
    /// Says one; the first is kept, since it may be the only one.
    fn add(&mut self, error: anyhow::Error) {
        self.count += 1;
        if self.count == 1 {
            self.first = Some(error);
            return;
        }
        self.first.take().iter().chain([&error]).for_each(say);
    }

    /// Ends a command of which something was done, or not.
    ///
    /// # Errors
    /// The only failure, if nothing else was done.
    fn end(mut self, is_anything_done: bool) -> Result<Exit> {
        match (self.count, self.first.take()) {
            (0, _) => Ok(Exit::Done),
            (1, Some(only)) if !is_anything_done => Err(only),
            (_, first) => {
                first.iter().for_each(say);
                Ok(if is_anything_done { Exit::Partial } else { Exit::Failed })
            }
        }
    }
}

fn say(error: &anyhow::Error) {
    eprintln!("xofs: {}", Shown(&format!("{error:#}")));
}
