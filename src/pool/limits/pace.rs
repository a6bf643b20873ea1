//! How fast a pool is read, over all processes of this machine: what is read is let through at a steady rate.
//!
//! A small file, the boot of this machine and a time since then, says when the pool may be read next; whoever reads moves it on by what
//! its bytes take at its rate. Who finds a time that is not yet come waits, and has changed nothing: so nothing is left of who dies
//! meanwhile, and a time that is far ahead is none of ours. This is the generic cell rate algorithm (ITU-T I.371), with a burst of
//! [`BURST`].

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use disk::{Disk, Extent};
use rustix::time::{ClockId, clock_gettime};
use xapi::{Cancel, Slots};

use crate::pool::error::{Error, Result};
use crate::probe;

/// How much of the time that nobody used may be made up for: also for who was woken late.
const BURST: Duration = Duration::from_millis(100);
/// No read takes longer, whatever its rate; a time that is further ahead is not believed.
const LONGEST: Duration = Duration::from_secs(60);
/// How long is waited for who looks at the file just now.
const LOOK: Duration = Duration::from_millis(1);
/// The longest content of the file (bytes).
const CONTENT: usize = 100;

/// What lets bytes of a pool through.
#[derive(Debug)]
pub struct Pace {
    slots: Slots,
    /// What the file is called.
    name: String,
    /// Bytes a second.
    rate: u64,
    cancel: Cancel,
    /// Which boot of this machine this is.
    boot: String,
    /// Held by the only thread that waits for the file: the others wait for it.
    next: Mutex<()>,
}

impl Pace {
    pub(super) fn new(slots: Slots, name: String, rate: u64, cancel: Cancel) -> Self {
        // Where there is none, two boots are told apart by their times: what is far ahead is not believed.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let boot = boot.trim().chars().filter(char::is_ascii_graphic).take(CONTENT / 2).collect();
        Self { slots, name, rate: rate.max(1), cancel, boot, next: Mutex::new(()) }
    }

    /// Waits until so many bytes may be read, and counts them.
    ///
    /// # Errors
    /// [`crate::pool::ErrorKind::Interrupted`]; [`crate::pool::ErrorKind::State`] if the file cannot be used.
    pub fn wait(&self, bytes: u64) -> Result<()> {
        let cost = cost(bytes, self.rate);
        probe::held_back(usize::try_from(bytes).unwrap_or(usize::MAX), || {
            let _next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                self.cancel.check("wait for the bandwidth")?;
                let pause = self.try_once(cost).map_err(|error| Error::state("use", self.name.as_ref(), &error))?;
                if pause.is_zero() {
                    return Ok(());
                }
                self.cancel.sleep(pause, "wait for the bandwidth")?;
            }
        })
    }

    /// Counts a read, if it may be made now; else returns for how long to wait.
    fn try_once(&self, cost: Duration) -> io::Result<Duration> {
        let Some(slot) = self.slots.take(&self.name, [0])? else { return Ok(LOOK) };
        let mut content = [0; CONTENT];
        let len = slot.file().read_at(&mut content, 0)?;
        let known = std::str::from_utf8(&content[..len]).ok().and_then(|text| text.split_once(' '));
        let free_at = known.filter(|(boot, _)| *boot == self.boot).and_then(|(_, time)| time.trim().parse().ok());
        let now = since_boot();
        match admit(Duration::from_nanos(free_at.unwrap_or(0)), now, cost) {
            Err(pause) => Ok(pause),
            Ok(free_at) => {
                // All of it is written at once, and of one length.
                let text = format!("{} {:020}\n", self.boot, free_at.as_nanos());
                slot.file().write_all_at(text.as_bytes(), 0)?;
                Ok(Duration::ZERO)
            }
        }
    }
}

/// Returns how long bytes take at a rate, in bytes a second.
fn cost(bytes: u64, rate: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)).min(LONGEST)
}

/// Returns when a pool may be read next, if a read of this cost is made now, or for how long that has to wait.
fn admit(free_at: Duration, now: Duration, cost: Duration) -> std::result::Result<Duration, Duration> {
    match free_at.checked_sub(now).filter(|ahead| !ahead.is_zero()) {
        Some(ahead) if ahead <= LONGEST => Err(ahead),
        Some(_) => Ok(now + cost),
        None => Ok(free_at.max(now.saturating_sub(BURST)) + cost),
    }
}

/// Returns the time since this machine was started, also of when it slept; the same for all processes.
fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

/// A disk whose bytes are let through.
pub struct PacedDisk {
    disk: Arc<dyn Disk>,
    pace: Arc<Pace>,
}

impl PacedDisk {
    /// Takes a disk, and what it is slowed down by, if anything.
    #[must_use]
    pub fn of(disk: Arc<dyn Disk>, pace: Option<Arc<Pace>>) -> Arc<dyn Disk> {
        match pace {
            None => disk,
            Some(pace) => Arc::new(Self { disk, pace }),
        }
    }

    fn wait(&self, bytes: usize) -> disk::Result<()> {
        let waited = self.pace.wait(bytes as u64);
        waited.map_err(|error| disk::Error::new(disk::ErrorKind::Unavailable, error.to_string()))
    }
}

impl Disk for PacedDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.wait(buffer.len())?;
        self.disk.read_at(offset, buffer)
    }

    fn read_into(&self, offset: u64, buffer: &mut Vec<u8>, head: usize) -> disk::Result<()> {
        self.wait(buffer.len().saturating_sub(head))?;
        self.disk.read_into(offset, buffer, head)
    }

    fn reads_at_once(&self) -> usize {
        self.disk.reads_at_once()
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.disk.extent_at(offset)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;
    use crate::pool::error::ErrorKind;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn reads_are_admitted_at_the_rate_and_what_was_not_used_is_soon_lost() {
        assert_eq!(cost(2 << 20, 100 << 20), 20 * MS);
        assert_eq!(cost(u64::MAX, 1), LONGEST);
        let (now, each) = (10_000 * MS, 20 * MS);
        // Nothing was read for long: a burst.
        let mut free_at = Duration::ZERO;
        let mut count = 0;
        let wait = loop {
            match admit(free_at, now, each) {
                Ok(next) => (free_at, count) = (next, count + 1),
                Err(wait) => break wait,
            }
        };
        assert_eq!((count, wait, free_at), (6, 20 * MS, now + 20 * MS));
        // Late by a little: made up for.
        assert_eq!(admit(free_at, now + 30 * MS, each), Ok(now + 40 * MS));
        // Late by much: not all of it.
        assert_eq!(admit(free_at, now + 500 * MS, each), Ok(now + 420 * MS));
        // That of another time.
        assert_eq!(admit(now + LONGEST + MS, now, each), Ok(now + each));
        assert_eq!(admit(now + LONGEST, now, each), Err(LONGEST));
    }

    #[test]
    fn all_who_read_a_pool_share_its_rate_and_stop_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let slots = Slots::new(folder.path());
        let pace = |cancel: &Cancel| Pace::new(slots.clone(), "pace-x".into(), 32 << 20, cancel.clone());
        fs::write(folder.path().join("pace-x-0"), "of another boot 99999999999999999999\n").expect("written");
        let (cancel, begun) = (Cancel::new(), Instant::now());
        let (one, other) = (pace(&cancel), pace(&cancel));
        std::thread::scope(|scope| {
            for pace in [&one, &one, &other, &other] {
                scope.spawn(move || (0..4).for_each(|_| pace.wait(1 << 20).expect("let through")));
            }
        });
        // 16 MiB, less what a burst and the last read are ahead: no machine can be faster, and slow ones are not wrong.
        let least = cost(15 << 20, 32 << 20).checked_sub(BURST).expect("longer");
        assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
        let slow = Pace::new(slots, "pace-x".into(), 1, cancel.clone());
        slow.wait(1 << 20).expect("let through");
        cancel.cancel();
        assert_eq!(slow.wait(1).expect_err("stopped").kind(), ErrorKind::Interrupted);
    }
}
