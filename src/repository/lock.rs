//! The lock of a VM, which is XO's own: who changes what is in a VM's folder holds it.
//!
//! It is a folder beside the VM's, `xo-vm-backups/<vm>.lock`, as the library proper-lockfile makes it for XO: who made it
//! holds the lock, sets its time anew as long as that is so, and removes it in the end. Who died leaves it behind; it is
//! taken over after ten seconds without a sign.
//!
//! ```text
//!         made                 its time is set anew (4 s; XO: 5 s)
//!  free ─────────► held ◄───────────────┐
//!    ▲ ▲            │ │ └───────────────┘
//!    │ └── removed ─┘ │
//!    │                ▼ no sign for 10 s
//!    └─ moved aside, abandoned
//!       looked at, removed
//! ```
//!
//! Invariant: of all that were taken of one VM, [`VmLock::check`] says of at most one at a time that it is held.
//!
//! Whether a lock is abandoned is decided by watching it: its time must have stayed the same for ten seconds of our own,
//! steady clock. The age that its time seems to tell decides nothing, however great: XO writes that time by the clock of
//! its own machine, and one that is an hour slow would have each of its living locks look an hour old, whatever the
//! storage's clock says. So it takes a patience of more than ten seconds to take over what a dead program left.
//!
//! proper-lockfile removes an abandoned lock by its name, and so may remove the one that another has just made in its
//! place. Here it is renamed first, which only one can do to one folder, and then looked at: what turns out to be another's
//! is put back. Who took a lock over waits for a moment and looks again before it goes on, since others who found the lock
//! abandoned at the same time may not be done yet. What is left: XO takes over without such care, and a program that
//! stands still for ten seconds just between a check and what follows it is past any lock.
//!
//! Who was late with that rename may also move a lock aside that was made just now, and another make its own before the
//! maker looks at it: both would then take one folder for theirs. So who made a lock gives it a time of its own, up to a
//! second back and at random, and has it only if it finds that time again; of two the last to set it has it, and the other
//! finds it lost. Where times are whole seconds, or none but now can be set, this proves little or nothing.
//!
//! Who dies after the rename leaves what it moved aside, an empty folder `.<vm>.lock.<16 digits>`. Who takes the lock next
//! removes it, at once and whoever may still be at it, but for its own, which shows its own sign: while one lock is there,
//! no other is put back in its place, so what lies aside is nobody's any more, and must not become so again later.
//!
//! XO locks the place that a VM's folder really is at: one that is a symbolic link is locked elsewhere by XO, and must not
//! be changed while XO runs.
//!
//! Source: XO, `@xen-orchestra/fs/src/local.js`; proper-lockfile 4, `lib/lockfile.js`.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use storage::{Entry, ObjectPath, Storage, WritableStorage, create_directories};

use super::{Error, ErrorKind, Result, VM_FOLDER, VmId};

#[cfg(test)]
mod tests;

/// How long what takes.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// A lock that gives no sign for so long is abandoned.
    abandoned: Duration,
    /// The holder gives a sign each time that so much has passed.
    renewal: Duration,
    /// The same after a sign that failed.
    retry: Duration,
    /// Without having given a sign for so long, the holder takes its lock for lost.
    lost: Duration,
    /// How long who took a lock over waits for others that may have tried at the same time.
    settling: Duration,
    /// Who waits looks each time that so much has passed.
    poll: Duration,
}

impl Pace {
    /// proper-lockfile's `stale` is 10 s, its `update` 5 s; XO leaves both as they are.
    const XO: Self = Self {
        abandoned: Duration::from_secs(10),
        renewal: Duration::from_secs(4),
        retry: Duration::from_secs(1),
        lost: Duration::from_secs(10),
        settling: Duration::from_secs(2),
        poll: Duration::from_millis(500),
    };
}

/// What a lock shows of its holder: after a renewal, and with another holder, it is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sign {
    inode: u64,
    modified: SystemTime,
}

impl Sign {
    /// Returns how long ago it was given, as far as the clocks of the storage, its holder and this machine agree.
    fn age(self) -> Duration {
        SystemTime::now().duration_since(self.modified).unwrap_or_default()
    }
}

/// The right to change what is in a VM's folder, until it is dropped.
pub struct VmLock {
    vm: VmId,
    held: Arc<Held>,
    renewal: Option<JoinHandle<()>>,
}

impl VmLock {
    /// Takes the lock of a VM, waiting up to `patience` for who has it; `storage` is that of the repository, encrypting if
    /// it does.
    ///
    /// While it waits, `waiting` is told again and again how old the holder's last sign looks, and returns whether to wait on.
    /// A lock that was left behind is taken over once it gave no sign for ten seconds, so with less patience never.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another has it still; else what the storage says.
    pub fn take(
        storage: Arc<dyn WritableStorage>,
        vm: &VmId,
        patience: Duration,
        waiting: impl FnMut(Duration) -> bool,
    ) -> Result<Self> {
        Self::take_at(Pace::XO, storage, vm, patience, waiting)
    }

    fn take_at(
        pace: Pace,
        storage: Arc<dyn WritableStorage>,
        vm: &VmId,
        patience: Duration,
        waiting: impl FnMut(Duration) -> bool,
    ) -> Result<Self> {
        let folder = ObjectPath::new(VM_FOLDER)?;
        create_directories(&*storage, &folder)?;
        let place = Place { path: Self::path(vm)?, storage };
        let lock = Self::take_place(pace, &place, vm, patience, waiting)?;
        let own = lock.held.state().sign;
        for path in Self::set_aside(&*place.storage, vm)? {
            match place.look_at(&path) {
                Ok(Some(sign)) if sign == own => continue,
                looked => match looked.and_then(|_| place.remove_aside(&path)) {
                    Ok(()) => tracing::info!(%path, "removed a lock that was moved aside and left there"),
                    Err(error) => tracing::warn!(%error, "a lock that was moved aside and left there stays"),
                },
            }
        }
        Ok(lock)
    }

    fn take_place(
        pace: Pace,
        place: &Place,
        vm: &VmId,
        patience: Duration,
        mut waiting: impl FnMut(Duration) -> bool,
    ) -> Result<Self> {
        let start = Instant::now();
        let mut watched: Option<(Sign, Instant)> = None;
        let mut is_taken_over = false;
        loop {
            let asked = Instant::now();
            if let Some(sign) = place.make()? {
                let lock = Self::hold(pace, place.clone(), vm, sign, asked)?;
                if !is_taken_over {
                    return Ok(lock);
                }
                std::thread::sleep(pace.settling);
                match lock.check() {
                    Err(error) if error.kind() == ErrorKind::Locked => {}
                    other => return other.map(|()| lock),
                }
            }
            // Before the look: for so long at least it was as it is.
            let asked = Instant::now();
            let seen = place.look()?;
            watched = seen.map(|sign| match watched {
                Some((before, since)) if before == sign => (sign, since),
                _ => (sign, Instant::now()),
            });
            if let Some((sign, since)) = watched {
                if asked.saturating_duration_since(since) >= pace.abandoned && place.remove_what_shows(sign)? {
                    tracing::warn!(lock = %place.path, age = ?sign.age(), "took over the lock of a program that is gone");
                    is_taken_over = true;
                    continue;
                }
            }
            let age = seen.map_or(Duration::ZERO, Sign::age);
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() || !waiting(age) {
                return Err(locked_by_another(pace, &place.path, age));
            }
            std::thread::sleep(pace.poll.min(left));
        }
    }

    /// Returns where the lock of a VM is.
    ///
    /// # Errors
    /// None that a [`VmId`] allows.
    pub(crate) fn path(vm: &VmId) -> Result<ObjectPath> {
        Ok(ObjectPath::new(VM_FOLDER)?.join(&format!("{vm}.lock"))?)
    }

    /// Returns the locks of a VM that somebody moved aside to remove them, and is about to, or has died.
    ///
    /// # Errors
    /// What the storage says if the folder of all VMs cannot be listed.
    pub(crate) fn set_aside(storage: &(impl Storage + ?Sized), vm: &VmId) -> Result<Vec<ObjectPath>> {
        let folder = ObjectPath::new(VM_FOLDER)?;
        let mut aside = Vec::new();
        let is_aside = |entry: &&Entry| entry.is_directory && vm_of_aside(&entry.name).as_ref() == Some(vm);
        for entry in storage.list(&folder)?.iter().filter(is_aside) {
            aside.push(folder.join(&entry.name)?);
        }
        aside.sort();
        Ok(aside)
    }

    /// Returns the VM of a lock, also of one that was moved aside, by its name in the folder of all VMs.
    pub(crate) fn vm_of(name: &str) -> Option<VmId> {
        name.strip_suffix(".lock").and_then(VmId::new).or_else(|| vm_of_aside(name))
    }

    /// Begins to renew a lock that was made, at `renewed` or later.
    fn hold(pace: Pace, place: Place, vm: &VmId, sign: Sign, renewed: Instant) -> Result<Self> {
        if sign.age() > pace.abandoned / 2 {
            tracing::warn!(
                lock = %place.path, behind = ?sign.age(),
                "the storage's clock is slow: XO may take what is locked for abandoned; set the clocks by NTP"
            );
        }
        let state = State { sign, is_sign_certain: true, renewed, lost: None, is_released: false };
        let held = Arc::new(Held { pace, place, state: Mutex::new(state), released: Condvar::new() });
        let renewed = held.clone();
        let mut lock = Self { vm: vm.clone(), held, renewal: None };
        let renewal =
            std::thread::Builder::new().name("vm-lock".to_owned()).spawn(move || renewed.renew_until_released());
        // If there is none, it is dropped and so released.
        lock.renewal = Some(renewal.map_err(|error| {
            let message = format!("cannot start the thread that renews '{}': {error}", lock.held.place.path);
            Error::new(ErrorKind::Unavailable, message)
        })?);
        Ok(lock)
    }

    /// Asks the storage whether the lock is still held: to be called before each step that must not be taken otherwise.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] from then on if it is lost: another program took it over or removed it, or it could not be
    /// renewed for ten seconds. What the storage says if it cannot be asked, which may pass.
    pub fn check(&self) -> Result<()> {
        self.held.check()
    }

    /// Returns the VM whose lock it is.
    #[must_use]
    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    /// Returns the storage that the VM's folder is on.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn WritableStorage> {
        &self.held.place.storage
    }
}

impl Drop for VmLock {
    fn drop(&mut self) {
        self.held.release();
        if let Some(renewal) = self.renewal.take() {
            // It panicked at worst; the lock is released all the same.
            let _ = renewal.join();
        }
    }
}

fn locked_by_another(pace: Pace, path: &ObjectPath, age: Duration) -> Error {
    let message = format!(
        "'{path}' is held: another program works on this VM (its last sign seems {} s old); wait until its backup or merge \
         is done. What a program left behind that is gone is taken over after {} s without a sign",
        age.as_secs(),
        pace.abandoned.as_secs()
    );
    Error::new(ErrorKind::Locked, message)
}

/// Returns a time that nobody else gives a lock, less than a second before `seen`, which is the storage's: XO believes a
/// lock for ten seconds. In microseconds, which all storages keep whose grain is not coarser; `None` before 1970.
fn own_time(seen: SystemTime) -> Option<SystemTime> {
    let seen = microseconds(seen)?;
    let back = 1 + random() % 999_999;
    Some(SystemTime::UNIX_EPOCH + Duration::from_micros(seen.checked_sub(back)?))
}

/// Whether a storage that was asked to keep the time `own`, of whole microseconds, may show `shown` for it: that, or one of
/// the two next to it which its grain leaves.
///
/// SMB keeps 100 ns, a storage that counts in floating point somewhat more, others 1 µs, 1 ms, 10 ms (exFAT), 1 s (SFTP) or 2 s (FAT).
fn is_kept_as(own: SystemTime, shown: SystemTime) -> bool {
    const GRAINS: [u64; 6] = [1, 1_000, 10_000, 100_000, 1_000_000, 2_000_000];
    let rounded = shown.checked_add(Duration::from_nanos(500)).and_then(microseconds);
    let Some((own, shown)) = microseconds(own).zip(rounded) else { return false };
    GRAINS.iter().any(|grain| shown % grain == 0 && shown.abs_diff(own) < *grain)
}

/// Returns the whole microseconds since 1970.
fn microseconds(time: SystemTime) -> Option<u64> {
    time.duration_since(SystemTime::UNIX_EPOCH).ok().and_then(|since| u64::try_from(since.as_micros()).ok())
}

/// Returns the name that a lock is moved to, of the file name of the lock; no other one has it.
fn name_aside(lock: &str) -> String {
    format!(".{lock}.{:016x}", random())
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Returns the VM of a lock that was moved aside, by its name.
fn vm_of_aside(name: &str) -> Option<VmId> {
    let (lock, random) = name.strip_prefix('.')?.rsplit_once('.')?;
    let is_random = random.len() == 16 && random.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    lock.strip_suffix(".lock").filter(|_| is_random).and_then(VmId::new)
}

/// Where a lock is.
#[derive(Clone)]
struct Place {
    storage: Arc<dyn WritableStorage>,
    path: ObjectPath,
}

impl Place {
    /// Makes the lock and returns the sign it shows; `None` if it is there, or is another's by now.
    fn make(&self) -> storage::Result<Option<Sign>> {
        match self.storage.create_directory(&self.path) {
            Err(error) if error.kind() == storage::ErrorKind::Exists => return Ok(None),
            made => made?,
        }
        // If it cannot be asked, it is left behind, and taken over after ten seconds: what has its name may be another's.
        let Some(made) = self.look()? else { return Ok(None) };
        let sign = self.mark(made);
        if sign.is_err() {
            let _ = self.remove_what_shows(made);
        }
        sign
    }

    /// Gives the lock, which was made and looked at, a time of its own, and returns the sign it shows then; `None` if it is
    /// another's.
    fn mark(&self, made: Sign) -> storage::Result<Option<Sign>> {
        let own = own_time(made.modified).filter(|own| self.storage.set_modified(&self.path, *own).is_ok());
        if own.is_none() {
            // Who may not set a time may still set it to now; what fails otherwise fails again.
            match self.storage.touch(&self.path) {
                Err(error) if error.kind() == storage::ErrorKind::NotFound || error.is_gone() => return Ok(None),
                touched => touched?,
            }
        }
        // Some storages say that they set a time, and do not.
        let is_own = |sign: &Sign| own.is_none_or(|own| *sign == made || is_kept_as(own, sign.modified));
        Ok(self.look()?.filter(|sign| sign.inode == made.inode && is_own(sign)))
    }

    /// Returns the sign that the lock shows; `None` if there is none.
    fn look(&self) -> storage::Result<Option<Sign>> {
        self.look_at(&self.path)
    }

    fn look_at(&self, path: &ObjectPath) -> storage::Result<Option<Sign>> {
        // NFS answers a question for the time alone by what it knew up to a minute ago; a listing asks the server.
        match self.storage.list(path).and_then(|_| self.storage.stat(path)) {
            Ok(stat) => Ok(Some(Sign { inode: stat.inode, modified: stat.modified })),
            Err(error) if error.kind() == storage::ErrorKind::NotFound || error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the lock if it shows `sign`; returns whether it did.
    ///
    /// 1. It is renamed, to a name that no other one has: of several who try only one gets it.
    /// 2. What was renamed is looked at: another may have removed and made the lock since it was looked at last.
    /// 3. It is removed; what is not the right one is put back, unless a third one made the lock meanwhile.
    ///
    /// What a crash leaves in between, who takes the lock next removes; it may be gone here too, therefore, at any time.
    fn remove_what_shows(&self, sign: Sign) -> storage::Result<bool> {
        if self.look()? != Some(sign) {
            return Ok(false);
        }
        let aside = self.path.parent().join(&name_aside(self.path.file_name()))?;
        match self.storage.rename(&self.path, &aside) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(false),
            renamed => renamed?,
        }
        let removed = match self.look_at(&aside) {
            Ok(Some(found)) if found == sign => self.remove_aside(&aside).map(|()| true),
            // Who removed it has the lock now, or had it since.
            Ok(None) => return Ok(false),
            other => other.map(|_| false),
        };
        if !matches!(removed, Ok(true)) {
            match self.look() {
                Ok(None) => match self.storage.rename(&aside, &self.path) {
                    // A third one made it since.
                    Err(error) if error.kind() == storage::ErrorKind::Exists => drop(self.remove_aside(&aside)),
                    Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                    renamed => renamed?,
                },
                // Whose lock it was finds it lost.
                _ => drop(self.remove_aside(&aside)),
            }
        }
        removed
    }

    fn remove_aside(&self, aside: &ObjectPath) -> storage::Result<()> {
        match self.storage.remove_directory(aside) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

/// A lock that was taken.
///
/// The state is locked also while the storage is asked: a check must not fall between a renewal and the look at what it
/// set, and nothing may be renewed that is released.
struct Held {
    pace: Pace,
    place: Place,
    state: Mutex<State>,
    released: Condvar,
}

struct State {
    /// The sign given last.
    sign: Sign,
    /// False if one was given since that could not be looked at.
    is_sign_certain: bool,
    /// When the last sign was given, or earlier.
    renewed: Instant,
    /// Why it is lost.
    lost: Option<&'static str>,
    is_released: bool,
}

impl Held {
    fn check(&self) -> Result<()> {
        let mut state = self.state();
        let asked = self.verify(&mut state);
        let Some(reason) = state.lost else { return Ok(asked?) };
        let message = format!(
            "the lock '{}' is lost: {reason}. What was begun is left as it is: look which other program works on this VM, \
             and start again",
            self.place.path
        );
        Err(Error::new(ErrorKind::Locked, message))
    }

    fn renew_until_released(&self) {
        let mut pause = self.pace.renewal;
        let mut state = self.state();
        while !state.is_released && state.lost.is_none() {
            let wait = self.released.wait_timeout_while(state, pause, |state| !state.is_released);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
            if state.is_released {
                return;
            }
            pause = match self.renew(&mut state) {
                Ok(()) => self.pace.renewal,
                Err(error) => {
                    tracing::warn!(%error, "the lock of a VM is not renewed yet");
                    self.pace.retry
                }
            };
        }
        if let Some(reason) = state.lost {
            tracing::error!(lock = %self.place.path, reason, "the lock of a VM is lost");
        }
    }

    /// Gives a sign, unless the lock is lost.
    fn renew(&self, state: &mut State) -> storage::Result<()> {
        let asked = Instant::now();
        self.verify(state)?;
        if state.lost.is_some() {
            return Ok(());
        }
        state.is_sign_certain = false;
        self.place.storage.touch(&self.place.path)?;
        self.verify(state)?;
        if state.lost.is_none() {
            state.renewed = asked;
        }
        Ok(())
    }

    /// Looks whether the lock is ours still.
    ///
    /// A sign of which it is not known whether it was given is told from another's by the time: within ten seconds of the
    /// last that is known, nobody takes over.
    fn verify(&self, state: &mut State) -> storage::Result<()> {
        if state.lost.is_some() {
            return Ok(());
        }
        match self.place.look() {
            Ok(Some(seen)) if seen == state.sign => {}
            Ok(Some(seen)) if !state.is_sign_certain && seen.inode == state.sign.inode => state.sign = seen,
            Ok(Some(_)) => state.lost = Some("another program took it over"),
            Ok(None) => state.lost = Some("it was removed"),
            Err(error) => {
                self.lose_what_is_old(state);
                return Err(error);
            }
        }
        self.lose_what_is_old(state);
        if state.lost.is_none() {
            state.is_sign_certain = true;
        }
        Ok(())
    }

    fn lose_what_is_old(&self, state: &mut State) {
        // After the look: that may have taken long.
        if state.lost.is_none() && state.renewed.elapsed() >= self.pace.lost {
            state.lost = Some("it could not be renewed in time, so others may take it over");
        }
    }

    /// Removes the lock, if it is ours still.
    fn release(&self) {
        let mut state = self.state();
        state.is_released = true;
        let asked = self.verify(&mut state);
        if let Err(error) = asked.and_then(|()| self.place.remove_what_shows(state.sign)) {
            tracing::warn!(%error, "the lock of a VM is left behind; others take it over after a while");
        }
        drop(state);
        self.released.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
