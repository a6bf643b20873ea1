//! A disk of a pool, read by NBD over several connections to its hosts, from any number of threads.
//!
//! ```text
//! read_at ─► one of the live connections, by turns
//!                 ▲
//! one thread: asks the pool where (get_nbd_info), takes a slot, connects: the first at once, the others once something is
//!             read, one after the other, since each plugs the disk into its host; anew where one broke
//! ```
//!
//! A server of XAPI that cannot read closes the connection, so a read is done again over another one, a few times with
//! growing pauses. Names of exports contain the session: they are asked for before each connection, and never shown.
//! Sources: xen-api, `ocaml/xapi/xapi_vdi.ml` (`get_nbd_info`), `ocaml/nbd/src/main.ml`.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nbd::{Connection, Stream};
use serde::Deserialize;
use serde_json::json;

use crate::budget::Budget;
use crate::cancel::TICK;
use crate::record::{Network, Pif, PoolObject, Vdi};
use crate::slots::Slot;
use crate::{Address, Cancel, Error, ErrorKind, Pool, Ref, Result, Tls, Trust};

/// How many times as often a read is tried while others succeed: a connection that ends, maybe because of one of them, fails
/// all that are asked for over it.
const BESIDE: u32 = 3;
/// The network that Xen Orchestra reads backups over, by its uuid, where it is told to: the others may not lead here.
const BACKUP_NETWORK: &str = "xo:backupNetwork";

/// How a disk is read.
#[derive(Debug, Clone)]
pub struct NbdOptions {
    /// Connections at once, if the budget has them.
    pub connections: usize,
    /// The slots of the hosts.
    pub budget: Budget,
    /// How long a host may take to accept a connection.
    pub connect: Duration,
    /// How long a server may take to answer.
    pub timeout: Duration,
    /// How long a slot is waited for by a disk that has none.
    pub patience: Duration,
    /// How often a read is tried, if nothing else can be read either.
    pub tries: u32,
    /// How long is paused before a read is tried again: an eighth of it first, twice as long each time.
    pub pause: Duration,
    /// Whether the network is one without encryption (`insecure_nbd`) and may be used all the same.
    pub is_plain: bool,
}

impl NbdOptions {
    /// Returns usual ones.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        Self {
            connections: 4,
            budget,
            connect: Duration::from_secs(10),
            timeout: Duration::from_secs(60),
            patience: Duration::from_secs(120),
            tries: 8,
            pause: Duration::from_secs(1),
            is_plain: false,
        }
    }
}

/// Where a disk can be read, as the pool says it.
#[derive(Clone, Deserialize)]
pub struct NbdPlace {
    /// The name of the export, which holds the session: a secret.
    pub exportname: String,
    /// An address of a host.
    pub address: String,
    /// The port there.
    pub port: u16,
    /// The certificate of the host (PEM).
    pub cert: String,
}

impl fmt::Debug for NbdPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NbdPlace({}:{})", self.address, self.port)
    }
}

/// Says where the disk can be read now.
type Locate = Box<dyn Fn() -> Result<Vec<NbdPlace>> + Send + Sync>;

/// A disk that is read by NBD.
pub struct NbdExport {
    shared: Arc<Shared>,
    size: u64,
    next: AtomicUsize,
    /// Reads that succeeded.
    done: AtomicU64,
    connector: Option<JoinHandle<()>>,
}

/// A connection in its slot; the slot is given back after it has ended.
struct Live {
    connection: Connection,
    address: String,
    _slot: Slot,
}

struct Shared {
    /// What errors call the disk.
    shown: String,
    locate: Locate,
    options: NbdOptions,
    cancel: Cancel,
    state: Mutex<State>,
    changed: Condvar,
    /// The least of all connections (nanoseconds).
    round_trip_ns: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The size of the disk (bytes) by the first connection, or why there is none.
    opened: Option<Result<u64>>,
    live: Vec<Arc<Live>>,
    /// Ends the handshake that is under way.
    connecting: Option<Box<dyn Stream>>,
    /// Addresses that did not answer at all, and what the system said.
    unreachable: HashMap<String, String>,
    /// Whether something is read, so that more connections are worth their while.
    is_read: bool,
    /// Readers without a connection.
    waiting: usize,
    /// Attempts that failed, and why the last one did.
    failures: u64,
    reason: Option<Error>,
    /// No further connections before this.
    not_before: Option<Instant>,
}

impl Pool {
    /// Opens a disk to be read by NBD, if the pool offers that: networks with the purpose `nbd`. It must be a snapshot, or not
    /// in use.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the pool has no such network (the disk has to be exported by HTTP then),
    /// [`ErrorKind::Unreachable`] if no host can be reached that way, or none of those has a connection to spare.
    pub fn nbd(&self, vdi: &Ref<Vdi>, options: NbdOptions) -> Result<NbdExport> {
        let networks = self.backup_addresses()?;
        let (pool, vdi) = (self.clone(), vdi.clone());
        let locate = move || {
            let mut places: Vec<NbdPlace> = pool.call("VDI.get_nbd_info", &[json!(vdi)])?;
            let offered = places.len();
            if let Some(networks) = &networks {
                places.retain(|place| networks.contains(&place.address));
            }
            if places.is_empty() {
                let reason = match offered {
                    0 => "no network that its hosts have has the purpose 'nbd'",
                    _ => {
                        "no network with the purpose 'nbd' is the one that the pool sets apart for backups (xo:backupNetwork)"
                    }
                };
                return Err(Error::new(ErrorKind::Unsupported, pool.subject("reading a disk by NBD"), reason));
            }
            Ok(places)
        };
        NbdExport::open(self.subject("reading a disk by NBD"), Box::new(locate), options, self.cancel())
    }

    /// Returns the addresses of the network that is set apart for backups, if there is one.
    fn backup_addresses(&self) -> Result<Option<HashSet<String>>> {
        let pools = self.records::<PoolObject>()?;
        let Some(uuid) = pools.iter().find_map(|pool| pool.other_config.get(BACKUP_NETWORK)) else { return Ok(None) };
        let network = match self.by_uuid::<Network>(uuid) {
            Ok(network) => self.record(&network)?,
            // It was destroyed: nothing is set apart any more.
            Err(error) if error.is_gone() => return Ok(None),
            Err(error) => return Err(error),
        };
        let pifs = self.records_of::<Pif>(&network.pifs)?;
        let bare = |address: &str| address.split('/').next().unwrap_or_default().to_owned();
        let addresses = pifs.iter().flat_map(|pif| std::iter::once(&pif.ip).chain(&pif.ipv6)).map(|it| bare(it));
        Ok(Some(addresses.filter(|address| !address.is_empty()).collect()))
    }
}

impl NbdExport {
    /// Opens what `locate` finds, of which errors say that it is `shown`.
    fn open(shown: String, locate: Locate, options: NbdOptions, cancel: &Cancel) -> Result<Self> {
        let shared = Arc::new(Shared {
            shown,
            locate,
            options,
            // Without a deadline of its own: it is stopped when the export is dropped.
            cancel: cancel.part(Duration::MAX),
            state: Mutex::default(),
            changed: Condvar::new(),
            round_trip_ns: AtomicU64::new(u64::MAX),
        });
        let of_thread = shared.clone();
        let connector = thread::Builder::new().name("nbd-connector".to_owned()).spawn(move || of_thread.run());
        let connector = Some(connector.map_err(|error| shared.error(ErrorKind::Unreachable, error))?);
        // From here on an error ends the thread.
        let mut export = Self { shared, size: 0, next: AtomicUsize::new(0), done: AtomicU64::new(0), connector };
        let mut state = export.shared.state();
        let size = loop {
            if let Some(opened) = state.opened.take() {
                break opened?;
            }
            cancel.check(&export.shared.shown)?;
            state = export.shared.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(state);
        export.size = size;
        Ok(export)
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns how many connections there are now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.state().live.len()
    }

    /// Returns how long the way to a host and back takes at most: the least that was seen when its connections were made.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        Duration::from_nanos(self.shared.round_trip_ns.load(Ordering::Relaxed))
    }

    /// Fills `buffer` with the bytes that start at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`], [`ErrorKind::Cancelled`]; [`ErrorKind::Failed`] or [`ErrorKind::Unreachable`] after all tries.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.with_connection(|connection| connection.read(offset, buffer))
    }

    /// Does the same as [`NbdExport::read_at`] with what follows the first `head` bytes of `buffer`, which is filled by who receives:
    /// nothing is copied. After an error it has the same length, and what it holds is of no meaning.
    ///
    /// # Errors
    /// As [`NbdExport::read_at`].
    pub fn read_into(&self, offset: u64, buffer: &mut Vec<u8>, head: usize) -> Result<()> {
        let len = buffer.len();
        let done = self.with_connection(|connection| {
            // One that failed took it along.
            buffer.resize(len, 0);
            connection.read_into(offset, buffer, head)
        });
        buffer.resize(len, 0);
        done
    }

    /// Returns what is said of the bytes from `offset` on ([`nbd::ALLOCATION`]), at least of one; `None` from a server that
    /// does not tell, as that of XAPI up to now.
    ///
    /// # Errors
    /// As [`NbdExport::read_at`].
    pub fn block_status(&self, offset: u64) -> Result<Option<Vec<nbd::Status>>> {
        self.with_connection(|connection| connection.block_status(nbd::ALLOCATION, offset))
    }

    fn with_connection<T>(&self, mut act: impl FnMut(&Connection) -> nbd::Result<T>) -> Result<T> {
        let shared = &self.shared;
        let (mut tried, mut in_vain) = (0, 0);
        loop {
            let done = self.done.load(Ordering::Relaxed);
            let failed = match shared.wait(&self.next) {
                Ok(live) => match act(&live.connection) {
                    Ok(found) => {
                        self.done.fetch_add(1, Ordering::Relaxed);
                        return Ok(found);
                    }
                    Err(error) if error.kind() == nbd::ErrorKind::OutOfRange => {
                        return Err(shared.error(ErrorKind::OutOfRange, error));
                    }
                    // The connection goes on.
                    Err(error) if error.kind() == nbd::ErrorKind::Failed => shared.error(ErrorKind::Failed, error),
                    Err(error) => {
                        shared.retire(&live);
                        shared.error(ErrorKind::Unreachable, error)
                    }
                },
                Err(error) => error,
            };
            shared.cancel.check(&shared.shown)?;
            tried += 1;
            in_vain += u32::from(self.done.load(Ordering::Relaxed) == done);
            let is_enough = in_vain >= shared.options.tries || tried >= shared.options.tries.saturating_mul(BESIDE);
            if is_enough || matches!(failed.kind(), ErrorKind::Cancelled | ErrorKind::Gone) {
                return Err(failed);
            }
            tracing::debug!(error = %failed, tried, "a read by NBD is tried again");
            shared.cancel.sleep(shared.options.pause * (1 << in_vain.min(7)) / 8, &shared.shown)?;
        }
    }
}

impl Drop for NbdExport {
    fn drop(&mut self) {
        self.shared.end();
        if let Some(connector) = self.connector.take() {
            let _ = connector.join();
        }
        self.shared.state().live.clear();
    }
}

impl fmt::Debug for NbdExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdExport").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, kind: ErrorKind, reason: impl fmt::Display) -> Error {
        Error::new(kind, &self.shown, reason)
    }

    /// Ends all that is waited for.
    fn end(&self) {
        self.cancel.cancel();
        let state = self.state();
        if let Some(stream) = &state.connecting {
            stream.close();
        }
        self.changed.notify_all();
    }

    /// Returns a connection; waits if there is none.
    fn wait(&self, next: &AtomicUsize) -> Result<Arc<Live>> {
        let mut state = self.state();
        state.is_read = true;
        let failures = state.failures;
        let mut is_told = false;
        loop {
            self.cancel.check(&self.shown)?;
            // A host that restarts ends all at once: no try is wasted on each.
            state.live.retain(|live| !live.connection.is_over());
            let turn = next.fetch_add(1, Ordering::Relaxed).checked_rem(state.live.len());
            if let Some(live) = turn.and_then(|turn| state.live.get(turn)) {
                return Ok(live.clone());
            }
            if let Some(reason) = state.reason.as_ref().filter(|_| state.failures > failures) {
                return Err(reason.clone());
            }
            state.waiting += 1;
            if !std::mem::replace(&mut is_told, true) {
                self.changed.notify_all();
            }
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= 1;
        }
    }

    /// Takes a connection out of use that is over.
    fn retire(&self, live: &Arc<Live>) {
        let mut state = self.state();
        state.live.retain(|other| !Arc::ptr_eq(other, live));
        self.changed.notify_all();
    }

    /// Makes connections until the export is dropped or cancelled, and closes all then.
    fn run(&self) {
        let first = self.connect_first();
        let opened = first.as_ref().map(|live| live.connection.export().size).map_err(Clone::clone);
        let mut state = self.state();
        state.opened = Some(opened.clone());
        state.live.extend(first.ok());
        drop(state);
        self.changed.notify_all();
        let Ok(size) = opened else { return };
        loop {
            {
                if self.cancel.check("").is_err() {
                    self.close();
                    return;
                }
                let state = self.state();
                let is_due = state.not_before.is_none_or(|time| Instant::now() >= time);
                let is_wanted = state.is_read && state.live.len() < self.options.connections.max(1);
                if !(is_wanted && is_due || state.waiting > 0 && state.live.is_empty()) {
                    let _ = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            }
            let is_first = self.state().live.is_empty();
            let connected = self.connect_beside(is_first).map_err(Refused::into_error).and_then(|live| {
                let found = live.connection.export().size;
                if found == size {
                    return Ok(live);
                }
                Err(self.error(ErrorKind::Protocol, format!("it has {found} bytes now, {size} before")))
            });
            let mut state = self.state();
            match connected {
                Ok(live) => {
                    state.not_before = None;
                    state.live.push(live);
                }
                Err(error) => {
                    tracing::debug!(%error, "fewer connections than wanted");
                    state.failures += 1;
                    state.reason = Some(error);
                    state.not_before = Instant::now().checked_add(self.options.pause * 30);
                }
            }
            self.changed.notify_all();
        }
    }

    /// Makes a connection in a thread of its own: a host that does not answer any more must not keep the others from being closed.
    fn connect_beside(&self, is_first: bool) -> std::result::Result<Arc<Live>, Refused> {
        let (told, is_done) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let connecting = scope.spawn(move || {
                let connected = self.connect(is_first);
                drop(told);
                connected
            });
            while let Err(mpsc::RecvTimeoutError::Timeout) = is_done.recv_timeout(TICK) {
                if self.cancel.check("").is_err() {
                    self.close();
                }
            }
            connecting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Ends all connections, also one that is being made.
    fn close(&self) {
        let state = self.state();
        state.connecting.iter().for_each(|stream| stream.close());
        state.live.iter().for_each(|live| live.connection.close());
    }

    /// Makes the first connection; waits for a slot.
    fn connect_first(&self) -> Result<Arc<Live>> {
        let begun = Instant::now();
        loop {
            match self.connect(true) {
                Err(Refused::Busy(_)) if begun.elapsed() < self.options.patience => {
                    self.cancel.sleep(self.options.pause, &self.shown)?;
                }
                connected => return connected.map_err(Refused::into_error),
            }
        }
    }

    /// Makes one connection to any of the hosts.
    fn connect(&self, is_first: bool) -> std::result::Result<Arc<Live>, Refused> {
        let mut places = (self.locate)()?;
        let known: Vec<String> = self.state().live.iter().map(|live| live.address.clone()).collect();
        // They cost time, so they are tried again only if no other is left.
        let unreachable = self.state().unreachable.clone();
        let is_left_out = |place: &NbdPlace| unreachable.contains_key(&place.address);
        let mut reasons = Vec::new();
        if !places.iter().all(is_left_out) {
            reasons.extend(places.iter().filter_map(|place| unreachable.get(&place.address).cloned()));
            places.retain(|place| !is_left_out(place));
        }
        // Those that have the fewest of our connections first.
        places.sort_by_key(|place| known.iter().filter(|address| **address == place.address).count());
        let mut is_busy = false;
        for place in &places {
            self.cancel.check(&self.shown)?;
            let slot = self.options.budget.take(&place.address, is_first);
            let slot = slot.map_err(|error| self.error(ErrorKind::OutOfRange, format!("its lock files: {error}")))?;
            let Some(slot) = slot else {
                is_busy = true;
                reasons.push(format!("{} has as many of our connections as are allowed", place.address));
                continue;
            };
            match self.connect_to(place) {
                Ok(connection) => {
                    return Ok(Arc::new(Live { connection, address: place.address.clone(), _slot: slot }));
                }
                Err(refused) => {
                    is_busy |= matches!(refused, Refused::Busy(_));
                    reasons.push(refused.into_error().to_string());
                }
            }
        }
        self.cancel.check(&self.shown)?;
        let error = self.error(ErrorKind::Unreachable, reasons.join("; "));
        Err(if is_busy { Refused::Busy(error) } else { Refused::Because(error) })
    }

    fn connect_to(&self, place: &NbdPlace) -> std::result::Result<Connection, Refused> {
        let address = Address { is_encrypted: !self.options.is_plain, host: place.address.clone(), port: place.port };
        let stream = address.connect(&self.cancel.part(self.options.connect)).map_err(|error| {
            self.state().unreachable.insert(place.address.clone(), error.to_string());
            Refused::Because(error)
        })?;
        let shown = format!("at {}:{}", place.address, place.port);
        let because = |error: &dyn fmt::Display| Refused::Because(Error::new(ErrorKind::Unreachable, &shown, error));
        let encryption: Option<Arc<dyn nbd::Upgrade>> = if self.options.is_plain {
            None
        } else {
            let tls = Tls::new(&Trust::Certificate(place.cert.clone()), &place.address);
            Some(Arc::new(tls.map_err(|error| because(&error))?))
        };
        let mut options = nbd::Options {
            timeout: self.options.timeout,
            contexts: vec![nbd::ALLOCATION.to_owned()],
            encryption,
            by_name_only: false,
        };
        {
            let mut state = self.state();
            let known = state.live.iter().find(|live| live.address == place.address);
            options.by_name_only = known.is_some_and(|live| live.connection.export().by_name_only);
            if self.cancel.is_cancelled() {
                return Err(because(&"cancelled"));
            }
            state.connecting = Some(Stream::another(&stream).map_err(|error| because(&error))?);
        }
        let connected = Connection::over(Box::new(stream), &place.exportname, &shown, &options);
        self.state().connecting = None;
        if let Ok(connection) = &connected {
            let round_trip = u64::try_from(connection.round_trip().as_nanos()).unwrap_or(u64::MAX);
            self.round_trip_ns.fetch_min(round_trip, Ordering::Relaxed);
        }
        connected.map_err(|error| match error.kind() {
            nbd::ErrorKind::Busy => Refused::Busy(Error::new(ErrorKind::Unreachable, &shown, error)),
            _ => because(&error),
        })
    }
}

/// Why there is no connection.
enum Refused {
    /// Ones that end make room.
    Busy(Error),
    Because(Error),
}

impl Refused {
    fn into_error(self) -> Error {
        match self {
            Self::Busy(error) | Self::Because(error) => error,
        }
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Because(error)
    }
}

#[cfg(test)]
#[path = "exports_tests.rs"]
mod tests;
