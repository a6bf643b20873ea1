//! Blocks in memory, shared by all readers: bounded in bytes, one load however many readers wait.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use lru::LruCache;
use storage::ObjectPath;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockIndex, BlockSize};
use crate::memory::Memory;
use crate::workers::Workers;

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

/// What a cached block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// As its layer holds it, decoded, sector bitmap included.
    Stored,
    /// As the disk whose leaf is that layer reads, verified; without bitmap.
    Whole,
}

/// What a cached block is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) layer: LayerId,
    pub(crate) block: BlockIndex,
    pub(crate) form: Form,
}

type Loaded = Result<Arc<Memory>>;

/// Threads that load blocks ahead of readers at most, over all disks, and blocks that wait for one; each takes the memory
/// of a block or two.
const AHEAD_THREADS: usize = 16;
const AHEAD_QUEUE: usize = 256;

/// Dropped blocks whose memory is kept, and the part of the cache they may take beside it.
const SPARES: usize = 8;
const SPARE_PART: u64 = 8;

/// A load under way: its readers wait here for what the first of them brings.
#[derive(Default)]
struct Pending {
    result: Mutex<Option<Loaded>>,
    done: Condvar,
}

impl Pending {
    fn wait(&self) -> Loaded {
        let mut result = lock(&self.result);
        loop {
            match &*result {
                Some(result) => return result.clone(),
                None => result = self.done.wait(result).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// A block in memory.
struct Ready {
    bytes: Arc<Memory>,
    stored: Instant,
    /// Whether its disk was seen alive after it was read: then these are its bytes whatever happens to the files.
    is_verified: bool,
}

struct State {
    ready: LruCache<Key, Ready>,
    bytes: u64,
    /// Memory of blocks that were dropped, for the next ones: to get it from the system, which clears it, takes a quarter of
    /// the time that decoding gzip does.
    spare: Vec<Arc<Memory>>,
    pending: HashMap<Key, Arc<Pending>>,
}

impl State {
    /// Keeps the memory of a block that nobody reads any more, and as many as fit into `limit` bytes with it.
    fn keep_memory(&mut self, mut bytes: Arc<Memory>, limit: u64) {
        if Arc::get_mut(&mut bytes).is_none() {
            return;
        }
        self.spare.push(bytes);
        let is_too_much = |spare: &[Arc<Memory>]| {
            spare.len() > SPARES || spare.iter().map(|bytes| bytes.len() as u64).sum::<u64>() > limit
        };
        // The oldest first: blocks of that size may not be needed any more.
        while is_too_much(&self.spare) {
            self.spare.remove(0);
        }
    }
}

/// A cache of blocks, and the threads that fill it ahead of readers.
///
/// Lock order: the state's lock and a pending load's lock are never held together, and neither across a load.
pub struct BlockCache {
    limit: u64,
    state: Mutex<State>,
    identities: Mutex<Identities>,
    ahead: Workers,
}

#[derive(Default)]
struct Identities {
    known: HashMap<LayerIdentity, LayerId>,
    /// The next number; none is given twice.
    next: u64,
}

impl BlockCache {
    /// Makes a cache that holds at most `limit_bytes` of blocks, beside those that are being loaded or read from, and an
    /// eighth of it for the next ones.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Arc<Self> {
        let state = State { ready: LruCache::unbounded(), bytes: 0, spare: Vec::new(), pending: HashMap::new() };
        let ahead = Workers::new(AHEAD_THREADS, AHEAD_QUEUE);
        Arc::new(Self { limit: limit_bytes, state: Mutex::new(state), identities: Mutex::default(), ahead })
    }

    /// Returns the bytes of blocks held now, without the memory kept for the next ones.
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

    /// Returns the most bytes it holds.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns the threads that load blocks ahead of readers.
    pub(crate) fn ahead(&self) -> &Workers {
        &self.ahead
    }

    /// Returns `len` bytes of memory for a block, which nobody else has. They may hold anything.
    pub(crate) fn memory(&self, len: usize) -> Arc<Memory> {
        let spare = {
            let mut state = self.state();
            let found = state.spare.iter().position(|spare| spare.len() == len);
            found.map(|at| state.spare.remove(at))
        };
        spare.unwrap_or_else(|| Arc::new(Memory::new(len)))
    }

    /// Returns the block of that key, from memory or from `load`, which at most one thread runs at a time per key.
    ///
    /// A failure is not remembered, and who waited for a load that failed loads for itself: it may have begun before a merge
    /// moved the block, or while the storage failed.
    pub(crate) fn get(&self, key: Key, load: impl FnOnce() -> Loaded) -> Loaded {
        let pending = {
            let mut state = self.state();
            if let Some(ready) = state.ready.get(&key) {
                return Ok(ready.bytes.clone());
            }
            match state.pending.get(&key) {
                Some(pending) => Err(pending.clone()),
                None => {
                    let pending = Arc::<Pending>::default();
                    state.pending.insert(key, pending.clone());
                    Ok(pending)
                }
            }
        };
        match pending {
            Ok(pending) => {
                let mut guard = Abandon { cache: self, key, pending: &pending, finished: false };
                let result = load();
                guard.finish(result.clone());
                result
            }
            Err(pending) => match pending.wait() {
                Err(_) => {
                    let result = load();
                    if let Ok(bytes) = &result {
                        self.store(key, bytes.clone());
                    }
                    result
                }
                result => result,
            },
        }
    }

    /// Returns the block of that key if it is in memory or being loaded; then waits for it.
    pub(crate) fn get_begun(&self, key: Key) -> Option<Loaded> {
        let pending = {
            let mut state = self.state();
            if let Some(ready) = state.ready.get(&key) {
                return Some(Ok(ready.bytes.clone()));
            }
            state.pending.get(&key)?.clone()
        };
        Some(pending.wait())
    }

    /// Returns the block of that key if it is in memory and [verified](BlockCache::verify).
    pub(crate) fn get_verified(&self, key: Key) -> Option<Arc<Memory>> {
        let mut state = self.state();
        state.ready.get(&key).filter(|ready| ready.is_verified).map(|ready| ready.bytes.clone())
    }

    /// Returns whether the block of that key is in memory or being loaded.
    pub(crate) fn has_begun(&self, key: Key) -> bool {
        let state = self.state();
        state.ready.contains(&key) || state.pending.contains_key(&key)
    }

    /// Notes that a disk with this block was alive at `seen`; says nothing of a block that was loaded later.
    pub(crate) fn verify(&self, key: Key, seen: Instant) {
        if let Some(ready) = self.state().ready.peek_mut(&key) {
            ready.is_verified |= ready.stored <= seen;
        }
    }

    fn store(&self, key: Key, bytes: Arc<Memory>) {
        let mut state = self.state();
        let len = bytes.len() as u64;
        if len > self.limit {
            return;
        }
        // What is whole was verified before it was stored.
        let ready = Ready { bytes, stored: Instant::now(), is_verified: key.form == Form::Whole };
        if let Some(old) = state.ready.put(key, ready) {
            state.bytes -= old.bytes.len() as u64;
        }
        state.bytes += len;
        while state.bytes > self.limit {
            let Some((_, old)) = state.ready.pop_lru() else { break };
            state.bytes -= old.bytes.len() as u64;
            state.keep_memory(old.bytes, self.limit / SPARE_PART);
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

    fn filled(byte: u8, len: usize) -> Loaded {
        let mut memory = Memory::new(len);
        memory.fill(byte);
        Ok(Arc::new(memory))
    }

    fn key(layer: LayerId, block: u32) -> Key {
        Key { layer, block: BlockIndex(block), form: Form::Stored }
    }

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
        let load = |n: u32| cache.get(key(id, n), || filled(0, 1000)).unwrap();
        (0..3).for_each(|n| drop(load(n)));
        load(0);
        load(3);
        assert_eq!(cache.bytes(), 3000);
        let is_cached = |n| {
            let mut loaded = false;
            cache
                .get(key(id, n), || {
                    loaded = true;
                    filled(0, 1000)
                })
                .unwrap();
            !loaded
        };
        assert!(is_cached(0) && !is_cached(1));
        cache.get(key(id, 9), || filled(0, 4000)).unwrap();
        assert_eq!(cache.bytes(), 3000);
    }

    #[test]
    fn the_memory_of_a_dropped_block_is_used_again_unless_somebody_still_reads_it() {
        let cache = BlockCache::new(8000);
        let id = layer(&cache, "a");
        let load = |n: u32, len| {
            let load = || {
                let mut bytes = cache.memory(len);
                Arc::get_mut(&mut bytes).expect("nobody else has it").fill(u8::try_from(n).unwrap());
                Ok(bytes)
            };
            cache.get(key(id, n), load).unwrap()
        };
        let spare = || cache.state().spare.iter().map(|spare| spare.len()).collect::<Vec<_>>();
        let held = load(0, 1000);
        (1..8).for_each(|n| drop(load(n, 1000)));
        assert!(spare().is_empty());
        // The first in line, 0, is still read; 1 is not.
        drop((load(8, 1000), load(9, 1000)));
        assert_eq!((spare(), &held[..]), (vec![1000], &[0; 1000][..]));
        drop(load(10, 1000));
        assert_eq!(spare(), [1000], "taken, and given back by the next");
        assert_eq!(load(10, 1000)[..], [10; 1000]);
        // Of another length it is of no use, and more than an eighth is not kept.
        drop(load(11, 500));
        assert_eq!(spare(), [1000]);
        drop(load(12, 3000));
        assert!(spare().iter().sum::<usize>() <= 1000, "{:?}", spare());
        assert!(cache.bytes() <= 8000);
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
                        filled(7, 10)
                    };
                    assert_eq!(cache.get(key(id, 0), load).unwrap()[..], [7; 10]);
                });
            }
        });
        assert_eq!(loads.load(Ordering::Relaxed), 1);
        let fail = || Err(Error::new(ErrorKind::Damaged, &ObjectPath::root(), "x"));
        assert!(cache.get(key(id, 1), fail).is_err());
        assert!(cache.get(key(id, 1), || filled(1, 1)).is_ok());
    }

    #[test]
    fn who_waits_for_a_load_that_fails_loads_itself() {
        for kind in [ErrorKind::Missing, ErrorKind::Unavailable] {
            let cache = BlockCache::new(1 << 20);
            let key = key(layer(&cache, "a"), 0);
            let begun = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| {
                    begun.wait();
                    cache.get(key, || filled(7, 1)).unwrap()
                });
                let failed = cache.get(key, || {
                    begun.wait();
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    Err(Error::new(kind, &ObjectPath::root(), "x"))
                });
                assert_eq!(failed.unwrap_err().kind(), kind);
                assert_eq!(waiter.join().unwrap()[..], [7]);
            });
            assert!(cache.has_begun(key));
        }
    }

    #[test]
    fn a_block_counts_as_right_without_a_look_only_once_its_disk_was_seen_alive() {
        let cache = BlockCache::new(1 << 20);
        let stored = key(layer(&cache, "a"), 0);
        assert!(!cache.has_begun(stored) && cache.get_begun(stored).is_none());
        let before = Instant::now();
        cache.get(stored, || filled(1, 1)).unwrap();
        cache.verify(stored, before);
        assert!(cache.has_begun(stored) && cache.get_verified(stored).is_none());
        cache.verify(stored, Instant::now());
        assert_eq!(cache.get_verified(stored).as_deref().map(|memory| memory[0]), Some(1));
        let whole = Key { form: Form::Whole, ..stored };
        assert!(cache.get_verified(whole).is_none());
        cache.get(whole, || filled(2, 1)).unwrap();
        assert_eq!(cache.get_verified(whole).as_deref().map(|memory| memory[0]), Some(2));
    }
}
