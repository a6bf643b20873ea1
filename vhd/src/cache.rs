//! Decoded blocks, shared by all readers: bounded in bytes, one decode however many readers wait.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use lru::LruCache;
use storage::ObjectPath;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockIndex, BlockSize};

/// What a layer is known by: the place of its data, its uuid, inode and time of the file that holds its footer, and the
/// size of its blocks.
///
/// Never the uuid alone: uuids repeat in real repositories, and a merge gives one to another file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct LayerIdentity {
    pub(crate) data: ObjectPath,
    pub(crate) uuid: Uuid,
    pub(crate) inode: u64,
    pub(crate) modified: SystemTime,
    /// Stands in another file, which may be changed alone.
    pub(crate) block_size: BlockSize,
}

/// The number that stands for a [`LayerIdentity`] in the keys of the cache; equal numbers, equal identities.
/// The reverse does not hold once identities were forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LayerId(u64);

/// Identities remembered at most, some 20 MB; beyond, all are forgotten, and what is cached under their numbers is
/// decoded again when it is asked for. Every merge makes new ones, and a mount lives for months.
const IDENTITIES_LIMIT: usize = 64 << 10;

type Key = (LayerId, BlockIndex);
type Loaded = Result<Arc<[u8]>>;

/// A load under way: its readers wait here for what the first of them brings.
#[derive(Default)]
struct Pending {
    result: Mutex<Option<Loaded>>,
    done: Condvar,
}

struct State {
    ready: LruCache<Key, Arc<[u8]>>,
    bytes: u64,
    pending: HashMap<Key, Arc<Pending>>,
}

/// A cache of decoded blocks.
///
/// Lock order: the state's lock and a pending load's lock are never held together, and neither across a load.
pub struct BlockCache {
    limit: u64,
    state: Mutex<State>,
    identities: Mutex<Identities>,
}

#[derive(Default)]
struct Identities {
    known: HashMap<LayerIdentity, LayerId>,
    /// The next number; none is given twice.
    next: u64,
}

impl BlockCache {
    /// Makes a cache that holds at most `limit_bytes` of decoded blocks, beside those that readers are using.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Arc<Self> {
        let state = State { ready: LruCache::unbounded(), bytes: 0, pending: HashMap::new() };
        Arc::new(Self { limit: limit_bytes, state: Mutex::new(state), identities: Mutex::default() })
    }

    /// Returns the bytes held now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.state().bytes
    }

    pub(crate) fn layer_id(&self, identity: LayerIdentity) -> LayerId {
        let mut identities = lock(&self.identities);
        if let Some(id) = identities.known.get(&identity) {
            return *id;
        }
        if identities.known.len() >= IDENTITIES_LIMIT {
            identities.known.clear();
        }
        let id = LayerId(identities.next);
        identities.next += 1;
        identities.known.insert(identity, id);
        id
    }

    /// Returns the block of that key, from memory or from `load`, which at most one thread runs at a time per key.
    ///
    /// A failure is given to all who waited for that load and is not remembered.
    pub(crate) fn get(&self, layer: LayerId, block: BlockIndex, load: impl FnOnce() -> Loaded) -> Loaded {
        let key = (layer, block);
        let (pending, is_first) = {
            let mut state = self.state();
            if let Some(bytes) = state.ready.get(&key) {
                return Ok(bytes.clone());
            }
            match state.pending.get(&key) {
                Some(pending) => (pending.clone(), false),
                None => {
                    let pending = Arc::<Pending>::default();
                    state.pending.insert(key, pending.clone());
                    (pending, true)
                }
            }
        };
        if is_first {
            let mut guard = Abandon { cache: self, key, pending: &pending, finished: false };
            let result = load();
            guard.finish(result.clone());
            return result;
        }
        let mut result = lock(&pending.result);
        loop {
            match &*result {
                Some(result) => return result.clone(),
                None => result = pending.done.wait(result).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn store(&self, key: Key, bytes: Arc<[u8]>) {
        let mut state = self.state();
        let len = bytes.len() as u64;
        if len > self.limit {
            return;
        }
        if let Some(old) = state.ready.put(key, bytes) {
            state.bytes -= old.len() as u64;
        }
        state.bytes += len;
        while state.bytes > self.limit {
            let Some((_, old)) = state.ready.pop_lru() else { break };
            state.bytes -= old.len() as u64;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Sees to it that those who wait are answered, even if the load panics.
struct Abandon<'a> {
    cache: &'a BlockCache,
    key: Key,
    pending: &'a Pending,
    finished: bool,
}

impl Abandon<'_> {
    fn finish(&mut self, result: Loaded) {
        if let Ok(bytes) = &result {
            self.cache.store(self.key, bytes.clone());
        }
        self.cache.state().pending.remove(&self.key);
        *lock(&self.pending.result) = Some(result);
        self.pending.done.notify_all();
        self.finished = true;
    }
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        if !self.finished {
            let reason = "the load of a block was abandoned";
            self.finish(Err(Error::new(ErrorKind::Unavailable, &ObjectPath::root(), reason)));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn layer(cache: &BlockCache, name: &str) -> LayerId {
        let data = ObjectPath::new(name).unwrap();
        cache.layer_id(LayerIdentity {
            data,
            uuid: Uuid::nil(),
            inode: 1,
            modified: SystemTime::UNIX_EPOCH,
            block_size: BlockSize::DEFAULT,
        })
    }

    #[test]
    fn the_cache_keeps_its_bound_and_drops_the_least_recently_used() {
        let cache = BlockCache::new(3000);
        let id = layer(&cache, "a");
        assert_eq!(id, layer(&cache, "a"));
        assert_ne!(id, layer(&cache, "b"));
        let load = |n: u32| cache.get(id, BlockIndex(n), || Ok(Arc::from(vec![0; 1000]))).unwrap();
        (0..3).for_each(|n| drop(load(n)));
        load(0);
        load(3);
        assert_eq!(cache.bytes(), 3000);
        let is_cached = |n| {
            let mut loaded = false;
            cache
                .get(id, BlockIndex(n), || {
                    loaded = true;
                    Ok(Arc::from(vec![0; 1000]))
                })
                .unwrap();
            !loaded
        };
        assert!(is_cached(0) && !is_cached(1));
        cache.get(id, BlockIndex(9), || Ok(Arc::from(vec![0; 4000]))).unwrap();
        assert_eq!(cache.bytes(), 3000);
    }

    #[test]
    fn identities_are_forgotten_but_no_number_is_given_twice() {
        let cache = BlockCache::new(0);
        let first = layer(&cache, "a");
        let others: Vec<_> = (0..=IDENTITIES_LIMIT).map(|number| layer(&cache, &format!("{number}"))).collect();
        assert!(lock(&cache.identities).known.len() <= IDENTITIES_LIMIT);
        let again = layer(&cache, "a");
        assert!(again != first && !others.contains(&again), "{first:?} {again:?}");
        assert_eq!(again, layer(&cache, "a"));
    }

    #[test]
    fn a_block_is_loaded_once_however_many_wait_and_a_failure_is_not_remembered() {
        let cache = BlockCache::new(1 << 20);
        let id = layer(&cache, "a");
        let loads = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let load = || {
                        loads.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(50));
                        Ok(Arc::from(vec![7; 10]))
                    };
                    assert_eq!(&*cache.get(id, BlockIndex(0), load).unwrap(), [7; 10]);
                });
            }
        });
        assert_eq!(loads.load(Ordering::Relaxed), 1);
        let fail = || Err(Error::new(ErrorKind::Damaged, &ObjectPath::root(), "x"));
        assert!(cache.get(id, BlockIndex(1), fail).is_err());
        assert!(cache.get(id, BlockIndex(1), || Ok(Arc::from(vec![1]))).is_ok());
    }
}
