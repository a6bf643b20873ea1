//! The volumes of backups that were looked at lately, with their disks open.
//!
//! They are looked for anew when the metadata of the backup is another, or after a while if something could not be read; and
//! let go when nobody needs them, since an open file of a removed backup takes room.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::volumes::Volumes;
use crate::repository::{Backup, BackupId};

/// Backups whose volumes are kept at a time.
const BACKUPS: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");

/// For how long they are kept without being needed.
const UNUSED: Duration = Duration::from_secs(60);

/// For how long it is believed that something cannot be read.
const RETRY: Duration = Duration::from_secs(30);

/// How often unused ones are looked for.
const ROUND: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct KeptVolumes(Arc<Mutex<State>>);

struct State {
    kept: LruCache<BackupId, Kept>,
    /// Whether a thread looks for those that are unused.
    is_watched: bool,
}

struct Kept {
    /// The repository makes another of it whenever the file of the metadata is another.
    backup: Arc<Backup>,
    volumes: Arc<Volumes>,
    found: Instant,
    used: Instant,
}

impl Default for State {
    fn default() -> Self {
        Self { kept: LruCache::new(BACKUPS), is_watched: false }
    }
}

impl KeptVolumes {
    /// Returns those of a backup if they are still what is there.
    pub(super) fn get(&self, backup: &Arc<Backup>) -> Option<Arc<Volumes>> {
        let mut state = state(&self.0);
        let kept = state.kept.get_mut(&backup.id())?;
        if !Arc::ptr_eq(&kept.backup, backup) || !kept.volumes.is_whole && kept.found.elapsed() >= RETRY {
            return None;
        }
        kept.used = Instant::now();
        Some(kept.volumes.clone())
    }

    /// Keeps those that were just found, and returns them; or those that were kept, if they are the same: who reads them goes on.
    pub(super) fn put(&self, backup: &Arc<Backup>, volumes: Arc<Volumes>) -> Arc<Volumes> {
        let now = Instant::now();
        let before = state(&self.0).kept.peek(&backup.id()).map(|kept| kept.volumes.clone());
        let volumes = before.filter(|before| before.is_same(&volumes)).unwrap_or(volumes);
        let found = volumes.clone();
        let kept = Kept { backup: backup.clone(), volumes, found: now, used: now };
        // What goes closes files and ends workers: not under the lock.
        let gone = state(&self.0).kept.push(backup.id(), kept);
        drop(gone);
        self.watch();
        found
    }

    pub(super) fn forget(&self, id: &BackupId) {
        let gone = state(&self.0).kept.pop(id);
        drop(gone);
    }

    /// Sees to it that those go that nobody needs.
    fn watch(&self) {
        if std::mem::replace(&mut state(&self.0).is_watched, true) {
            return;
        }
        let shared = Arc::downgrade(&self.0);
        let watch = move || {
            loop {
                thread::sleep(ROUND);
                let Some(shared) = shared.upgrade() else { return };
                let gone = state(&shared).take_unused();
                drop(gone);
                let mut state = state(&shared);
                if state.kept.is_empty() {
                    state.is_watched = false;
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("xofs-guests".to_owned()).spawn(watch) {
            tracing::warn!(%error, "no thread could be made that closes unused disks of guests: they stay open");
        }
    }
}

impl State {
    fn take_unused(&mut self) -> Vec<Kept> {
        let is_unused = |kept: &Kept| kept.used.elapsed() >= UNUSED;
        let unused: Vec<BackupId> =
            self.kept.iter().filter(|(_, kept)| is_unused(kept)).map(|(id, _)| id.clone()).collect();
        unused.iter().filter_map(|id| self.kept.pop(id)).collect()
    }
}

fn state(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
