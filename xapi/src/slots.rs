//! Slots that all processes of this machine share: who has one holds a lock on a file, which the system gives back however its
//! process ends.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

/// The longest name of a file of slots, without its number (bytes).
const NAME: usize = 200;

/// The slots in a folder, by name and number. Clones share them, as does whoever uses the same folder.
#[derive(Debug, Clone)]
pub struct Slots {
    folder: PathBuf,
}

/// The right to one of something, until it is dropped.
#[derive(Debug)]
pub struct Slot {
    /// Open for its lock.
    file: File,
}

impl Slot {
    /// Returns the file of the slot, empty at first: who has the slot may leave something there for who has it next.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Slots {
    /// Takes those of a folder, which is made when it is needed and should be the same for all processes.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Takes the first slot of `name` that is free, of those with these numbers, in their order; `None` if all are taken.
    ///
    /// # Errors
    /// What the system says of the folder or the files.
    pub fn take(&self, name: &str, numbers: impl IntoIterator<Item = usize>) -> io::Result<Option<Slot>> {
        fs::create_dir_all(&self.folder)?;
        let plain = |letter: char| if letter.is_ascii_alphanumeric() || ".-".contains(letter) { letter } else { '_' };
        let name: String = name.chars().map(plain).take(NAME).collect();
        for number in numbers {
            let path = self.folder.join(format!("{name}-{number}"));
            let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(Slot { file })),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_slot_of_those_that_are_meant_is_taken_and_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (Slots::new(folder.path().join("slots")), Slots::new(folder.path().join("slots")));
        let last = one.take("../a b", (0..3).rev()).unwrap().unwrap();
        assert!(other.take("../a b", 2..3).unwrap().is_none());
        assert!(other.take("c", 2..3).unwrap().is_some());
        let taken: Vec<_> = (0..2).map(|_| other.take("../a b", 0..3).unwrap().unwrap()).collect();
        assert!(one.take("../a b", 0..3).unwrap().is_none());
        drop(last);
        assert!(one.take("../a b", 0..2).unwrap().is_none());
        assert!(one.take("../a b", 0..3).unwrap().is_some());
        drop(taken);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
