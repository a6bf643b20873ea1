//! How many merges run at a time, where nobody says it.
//!
//! A merge is renames and a few syncs. A disk that turns, or a server far away, does several of them no faster, and everything
//! else slower; an SSD does. So a few renames are timed where the merges would be.

use std::time::{Duration, Instant};

use storage::{Existing, ObjectPath, Result, WritableStorage, remove_tree};

/// Where the renames are timed; Xen Orchestra passes over hidden folders here.
const FOLDER: &str = ".xofs-probe";
/// How many are timed; the median counts.
const RENAMES: usize = 5;
/// Where a rename that is synced takes longer, merges run one after the other: a disk that turns needs about 8 ms.
const SLOW: Duration = Duration::from_millis(5);
/// Where it takes longer than that, two run at a time, else four.
const MIDDLING: Duration = Duration::from_millis(1);

/// How many merges run at a time, and why.
pub struct Jobs {
    /// At least one.
    pub count: usize,
    /// What a rename took, if that decided it.
    pub rename: Option<Duration>,
}

impl Jobs {
    /// As many as is said, else as many as suit the storage.
    pub fn new(said: Option<u32>, storage: &dyn WritableStorage) -> Self {
        if let Some(said) = said {
            return Self { count: usize::try_from(said).unwrap_or(usize::MAX).max(1), rename: None };
        }
        let rename = match probe(storage) {
            Ok(rename) => Some(rename),
            Err(error) => {
                // What keeps it from being timed keeps the merges from being made, which say it then.
                tracing::debug!(%error, "renames could not be timed");
                None
            }
        };
        Self { count: rename.map_or(1, suited), rename }
    }
}

fn suited(rename: Duration) -> usize {
    match rename {
        slow if slow > SLOW => 1,
        middling if middling > MIDDLING => 2,
        _ => 4,
    }
}

/// Returns how long it takes to rename a file from one folder to another, and to sync that.
fn probe(storage: &dyn WritableStorage) -> Result<Duration> {
    let folder = ObjectPath::new(FOLDER)?;
    // Of a run that was killed.
    remove_tree(storage, &folder)?;
    let timed = || -> Result<Duration> {
        let folders = [folder.join("1")?, folder.join("2")?];
        for folder in [&folder, &folders[0], &folders[1]] {
            storage.create_directory(folder)?;
        }
        storage.write(&folders[0].join("file")?, b"", Existing::Refuse)?;
        storage.sync_tree(&folder, &storage.mark()?)?;
        let mut times = [Duration::ZERO; RENAMES];
        for (number, time) in times.iter_mut().enumerate() {
            let (from, to) = (&folders[number % 2], &folders[(number + 1) % 2]);
            let start = Instant::now();
            storage.rename(&from.join("file")?, &to.join("file")?)?;
            storage.sync(to)?;
            *time = start.elapsed();
        }
        times.sort();
        Ok(times[RENAMES / 2])
    };
    let median = timed();
    remove_tree(storage, &folder)?;
    median
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use storage::{MemoryStorage, Storage};

    use super::*;

    #[test]
    fn a_slow_place_has_one_merge_at_a_time() {
        for (milliseconds, count) in [(0.2, 4), (1.0, 4), (2.0, 2), (5.0, 2), (8.0, 1), (90.0, 1)] {
            assert_eq!(suited(Duration::from_secs_f64(milliseconds / 1000.0)), count, "{milliseconds} ms");
        }
    }

    #[test]
    fn the_probe_leaves_nothing_behind_and_a_number_that_is_said_needs_none() {
        let storage = Arc::new(MemoryStorage::default());
        storage.put(&format!("{FOLDER}/1/of a run that was killed"), "").unwrap();
        assert_eq!(Jobs::new(Some(3), &*storage).count, 3);
        assert_eq!(storage.list(&ObjectPath::root()).unwrap().len(), 1);
        assert!(Jobs::new(None, &*storage).rename.is_some());
        assert_eq!(storage.list(&ObjectPath::root()).unwrap(), []);
    }
}
