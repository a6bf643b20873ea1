//! Whether a disk that is opened is read through the kernel's page cache.
//!
//! | reader asks for       | without the page cache | with it                                       |
//! |-----------------------|------------------------|-----------------------------------------------|
//! | 64 KiB and more       | one copy less: fastest | a third to a half of that                     |
//! | 4 KiB or 512 bytes    | a request each         | the kernel reads ahead: ten times as fast     |
//!
//! How a program will read is not known when it opens. So it is taken to read in large pieces, as those that heed
//! `st_blksize` do (`cp`, `cat`, `qemu-img`), until the last two disks it read were read in small ones; and again once one
//! of its reads is seen to be large. Programs are told apart by name. `dd` says its request size in its arguments.

use std::fs;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use disk::Disk;
use lru::LruCache;

use super::transport::Caching;

/// Requests of fewer bytes are better served by the page cache.
const SMALL: u64 = 16 << 10;

/// Reads after which it is known how a program reads.
const ENOUGH: u32 = 16;

/// Disks read in small pieces, one after the other, that make a habit.
const HABIT: u8 = 2;

/// Programs remembered, and disks whose pages may still be in the page cache.
const PROGRAMS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
const DISKS: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Decides how disks are read.
pub(super) struct Habits {
    /// How many of the last disks each program read in small pieces.
    programs: Mutex<LruCache<String, u8>>,
    /// The disk behind each inode that was opened through the page cache last.
    paged: Mutex<LruCache<u64, Weak<dyn Disk>>>,
}

/// How one opened disk is read.
pub(super) struct Watched {
    program: Option<String>,
    caching: Caching,
    reads: AtomicU32,
    bytes: AtomicU64,
}

impl Watched {
    /// Returns how it was opened.
    pub(super) fn caching(&self) -> Caching {
        self.caching
    }
}

impl Habits {
    pub(super) fn new() -> Self {
        Self { programs: Mutex::new(LruCache::new(PROGRAMS)), paged: Mutex::new(LruCache::new(DISKS)) }
    }

    /// Decides how process `pid` reads a disk. With `is_direct` (O_DIRECT) it has decided itself.
    pub(super) fn open(&self, pid: u32, inode: u64, disk: &Arc<dyn Disk>, is_direct: bool) -> Watched {
        let program = if is_direct { None } else { program_of(pid) };
        let reads_small = match &program {
            Some(program) if program == "dd" => dd_request(pid).is_some_and(|bytes| bytes < SMALL),
            Some(program) => lock(&self.programs).get(program).is_some_and(|count| *count >= HABIT),
            None => false,
        };
        let caching = if reads_small { self.through_pages(inode, disk) } else { Caching::Direct };
        Watched { program, caching, reads: AtomicU32::new(0), bytes: AtomicU64::new(0) }
    }

    /// What is in the page cache is kept only if it is of this very disk: another may have come to the same name.
    fn through_pages(&self, inode: u64, disk: &Arc<dyn Disk>) -> Caching {
        let before = lock(&self.paged).put(inode, Arc::downgrade(disk)).and_then(|before| before.upgrade());
        if before.is_some_and(|before| Arc::ptr_eq(&before, disk)) { Caching::KeptPages } else { Caching::Pages }
    }

    /// Notes a read of process `pid`.
    pub(super) fn read(&self, watched: &Watched, pid: u32, len: u32) {
        let Some(program) = &watched.program else { return };
        if watched.reads.load(Ordering::Relaxed) >= ENOUGH {
            return;
        }
        let bytes = watched.bytes.fetch_add(len.into(), Ordering::Relaxed) + u64::from(len);
        if watched.reads.fetch_add(1, Ordering::Relaxed) + 1 != ENOUGH {
            return;
        }
        let is_small = match watched.caching {
            Caching::Direct => bytes < SMALL * u64::from(ENOUGH),
            // The kernel asks in pieces of its own; the program's request stands in its system call.
            Caching::Pages | Caching::KeptPages => read_request(pid).is_none_or(|bytes| bytes < SMALL),
        };
        let mut programs = lock(&self.programs);
        if is_small {
            let count = programs.get_or_insert_mut(program.clone(), || 0);
            *count = count.saturating_add(1);
        } else {
            programs.pop(program);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the name of a process, if it is visible. Source: proc_pid_comm(5).
fn program_of(pid: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

/// Returns how many bytes `dd` reads at once.
fn dd_request(pid: u32) -> Option<u64> {
    parse_dd(&fs::read(format!("/proc/{pid}/cmdline")).ok()?)
}

/// Finds `ibs=` or `bs=` among arguments that each end with a zero byte; the last one counts. Source: dd(1).
fn parse_dd(arguments: &[u8]) -> Option<u64> {
    let mut size = Some(512);
    for argument in arguments.split(|byte| *byte == 0) {
        let argument = std::str::from_utf8(argument).unwrap_or_default();
        let Some(value) = argument.strip_prefix("bs=").or_else(|| argument.strip_prefix("ibs=")) else { continue };
        let digits = value.len() - value.trim_start_matches(|character: char| character.is_ascii_digit()).len();
        let (number, unit) = value.split_at(digits);
        let unit = match unit {
            "" | "c" => 1,
            "w" => 2,
            "b" => 512,
            // Whatever is larger than a kilobyte a few times over reads in large pieces.
            _ if unit.starts_with(['k', 'K']) => 1000,
            _ => 1_000_000,
        };
        size = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    }
    size
}

/// Returns how many bytes a process asks for in the system call it is in, if that is a read and we may look.
///
/// Source: proc_pid_syscall(5); the third argument of read(2) and pread(2) is a number of bytes.
fn read_request(pid: u32) -> Option<u64> {
    parse_syscall(&fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?)
}

fn parse_syscall(line: &str) -> Option<u64> {
    let mut fields = line.split_ascii_whitespace();
    let number: libc::c_long = fields.next()?.parse().ok()?;
    if number != libc::SYS_read && number != libc::SYS_pread64 {
        return None;
    }
    u64::from_str_radix(fields.nth(2)?.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Disk for Nothing {
        fn size(&self) -> u64 {
            0
        }

        fn read_at(&self, _offset: u64, _buffer: &mut [u8]) -> disk::Result<()> {
            Ok(())
        }

        fn extent_at(&self, _offset: u64) -> disk::Result<disk::Extent> {
            Err(disk::Error::new(disk::ErrorKind::OutOfRange, "empty"))
        }
    }

    #[test]
    fn a_program_that_reads_in_small_pieces_gets_the_page_cache_from_its_third_disk_on() {
        let habits = Habits::new();
        let disk: Arc<dyn Disk> = Arc::new(Nothing);
        let own = std::process::id();
        let read = |len: u32| {
            let watched = habits.open(own, 1, &disk, false);
            (0..ENOUGH).for_each(|_| habits.read(&watched, own, len));
            watched.caching()
        };
        assert_eq!(
            [read(4096), read(512), read(4096), read(4096)].map(|caching| caching == Caching::Direct),
            [true, true, false, false]
        );
        assert_eq!(habits.open(own, 1, &disk, false).caching(), Caching::KeptPages);
        let other: Arc<dyn Disk> = Arc::new(Nothing);
        assert_eq!(habits.open(own, 1, &other, false).caching(), Caching::Pages);
        assert_eq!(habits.open(own, 1, &disk, true).caching(), Caching::Direct);
    }

    #[test]
    fn one_read_in_large_pieces_ends_the_habit() {
        let habits = Habits::new();
        let disk: Arc<dyn Disk> = Arc::new(Nothing);
        let own = std::process::id();
        for len in [4096, 1 << 20, 4096] {
            let watched = habits.open(own, 1, &disk, false);
            (0..ENOUGH).for_each(|_| habits.read(&watched, own, len));
            assert_eq!(watched.caching(), Caching::Direct);
        }
        assert_eq!(habits.open(own, 1, &disk, false).caching(), Caching::Direct);
    }

    #[test]
    fn requests_are_read_from_arguments_and_system_calls() {
        assert_eq!(parse_dd(b"dd\0if=x\0"), Some(512));
        assert_eq!(parse_dd(b"dd\0if=x\0bs=4k\0"), Some(4000));
        assert_eq!(parse_dd(b"dd\0ibs=4096\0obs=1M\0"), Some(4096));
        assert_eq!(parse_dd(b"dd\0bs=1M\0"), Some(1_000_000));
        assert_eq!(parse_dd(b"dd\0bs=x\0"), None);
        assert_eq!(parse_syscall("0 0x3 0x7f00 0x20000 0x0 0x0 0x0 0x7ffd 0x7f11\n"), Some(0x20000));
        assert_eq!(parse_syscall("1 0x3 0x7f00 0x20000 0x0 0x0 0x0 0x7ffd 0x7f11\n"), None);
        assert_eq!(parse_syscall("running\n"), None);
    }
}
