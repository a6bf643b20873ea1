//! Whether a disk that is opened is read through the kernel's page cache.
//!
//! | reader                               | without the page cache | with it                                   |
//! |--------------------------------------|------------------------|-------------------------------------------|
//! | asks for 64 KiB and more             | one copy less: fastest | a third to a half of that                 |
//! | the same, and writes or computes     | waits for each request | the kernel reads ahead meanwhile: faster  |
//! | asks for 4 KiB or 512 bytes          | a request each         | the kernel reads ahead: ten times as fast |
//!
//! How a program will read is not known when it opens. Programs that are known to read in large pieces, most because they
//! heed `st_blksize`, are taken to do so ([`LARGE_READERS`]); those that copy are not, although they do ([`COPIERS`]); `dd`
//! says its request size in its arguments; any other is given the page cache, since being wrong about a large reader costs
//! less. From then on a program, told by its name, is taken to read as it did last.

use std::fs;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use disk::Disk;
use lru::LruCache;

use super::transport::{Access, Caching};

/// Requests of fewer bytes are better served by the page cache. Programs that compute checksums ask for 32 KiB.
const SMALL: u64 = 64 << 10;

/// Reads after which it is known how a program reads.
const ENOUGH: u32 = 16;

/// Programs that read in large pieces unless they were seen not to, by the 15 characters that the kernel keeps of a name.
const LARGE_READERS: [&str; 16] = [
    "cat",
    "cmp",
    "fio",
    "losetup",
    "mount",
    "node",
    "pv",
    "python3",
    "qemu-img",
    "qemu-nbd",
    "qemu-storage-da",
    "qemu-system-x86",
    "vhd-util",
    "xe",
    "xofs",
    "zstd",
];

/// Those of them that map no file that they are given. Before 6.6 Linux shares no mapping of what is read without the page cache
/// (ENODEV); there any other program is given it.
const NEVER_MAP: [&str; 10] =
    ["cat", "cmp", "losetup", "mount", "pv", "qemu-img", "qemu-nbd", "qemu-storage-da", "xofs", "zstd"];

/// Programs that write each piece before they read the next. They are served from the page cache, which the kernel fills
/// while they write.
const COPIERS: [&str; 4] = ["cp", "install", "mv", "rsync"];

/// Programs remembered, and disks whose pages may still be in the page cache.
const PROGRAMS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
const DISKS: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Decides how disks are read.
pub(super) struct Habits {
    /// Whether each program read the last disk in small pieces.
    programs: Mutex<LruCache<String, bool>>,
    /// The disk behind each inode that was read through the page cache last.
    paged: Mutex<LruCache<u64, Weak<dyn Disk>>>,
}

/// How one opened disk is read.
pub(super) struct Watched {
    program: Option<String>,
    caching: Caching,
    /// Inode and disk, if the kernel drops what is in the page cache when it hears of the opening.
    fresh: Option<(u64, Weak<dyn Disk>)>,
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

    /// Decides how process `pid` reads a disk. With O_DIRECT it has decided itself.
    pub(super) fn open(&self, pid: u32, inode: u64, disk: &Arc<dyn Disk>, access: Access) -> Watched {
        let program = if access.is_direct { None } else { program_of(pid) };
        let reads_small = match &program {
            Some(program) if program == "dd" => dd_request(pid).is_some_and(|bytes| bytes < SMALL),
            Some(program) if COPIERS.contains(&program.as_str()) => true,
            // Whoever maps it is refused otherwise.
            Some(program) if !access.maps_direct && !NEVER_MAP.contains(&program.as_str()) => true,
            Some(program) => {
                let seen = lock(&self.programs).get(program).copied();
                seen.unwrap_or_else(|| !LARGE_READERS.contains(&program.as_str()))
            }
            None => false,
        };
        let caching = if reads_small { self.through_pages(inode, disk) } else { Caching::Direct };
        let fresh = (caching == Caching::Pages).then(|| (inode, Arc::downgrade(disk)));
        Watched { program, caching, fresh, reads: AtomicU32::new(0), bytes: AtomicU64::new(0) }
    }

    /// What is in the page cache is kept only if it is of this very disk: another may have come to the same name.
    fn through_pages(&self, inode: u64, disk: &Arc<dyn Disk>) -> Caching {
        let before = lock(&self.paged).get(&inode).and_then(Weak::upgrade);
        if before.is_some_and(|before| Arc::ptr_eq(&before, disk)) { Caching::KeptPages } else { Caching::Pages }
    }

    /// Notes a read of process `pid`.
    pub(super) fn read(&self, watched: &Watched, pid: u32, len: u32) {
        let Some(program) = &watched.program else { return };
        if watched.reads.load(Ordering::Relaxed) >= ENOUGH {
            return;
        }
        let bytes = watched.bytes.fetch_add(len.into(), Ordering::Relaxed) + u64::from(len);
        let reads = watched.reads.fetch_add(1, Ordering::Relaxed) + 1;
        if let (1, Some((inode, disk))) = (reads, &watched.fresh) {
            // Only now is it certain that the pages of another disk are gone.
            lock(&self.paged).put(*inode, disk.clone());
        }
        if reads != ENOUGH {
            return;
        }
        let is_small = match watched.caching {
            Caching::Direct => Some(bytes < SMALL * u64::from(ENOUGH)),
            // The kernel asks in pieces of its own; the program's request stands in its system call.
            Caching::Pages | Caching::KeptPages => read_request(pid).map(|bytes| bytes < SMALL),
        };
        if let Some(is_small) = is_small {
            lock(&self.programs).put(program.clone(), is_small);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the name of the program that a thread belongs to, if it is visible; threads may have names of their own.
///
/// Source: proc_pid_status(5), proc_pid_comm(5).
fn program_of(pid: u32) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let group = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim();
    let name = fs::read_to_string(format!("/proc/{group}/comm")).ok()?;
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
            "kB" => 1000,
            _ if unit.starts_with(['k', 'K']) => 1 << 10,
            // Larger units are large enough, however many.
            _ => 1 << 20,
        };
        size = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    }
    size
}

/// Returns how many bytes a process asks for in the system call it is in, if that is a read and we may look.
///
/// Source: proc_pid_syscall(5); the numbers of bytes are the third argument of read(2) and pread(2), the fourth of
/// sendfile(2), and the fifth of copy_file_range(2) and splice(2).
fn read_request(pid: u32) -> Option<u64> {
    parse_syscall(&fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?)
}

fn parse_syscall(line: &str) -> Option<u64> {
    let mut fields = line.split_ascii_whitespace();
    let number: libc::c_long = fields.next()?.parse().ok()?;
    let argument = match number {
        libc::SYS_read | libc::SYS_pread64 => 2,
        libc::SYS_sendfile => 3,
        libc::SYS_copy_file_range | libc::SYS_splice => 4,
        _ => return None,
    };
    u64::from_str_radix(fields.nth(argument)?.strip_prefix("0x")?, 16).ok()
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

    const READ: Access = Access { is_writable: false, is_direct: false, maps_direct: true };

    #[test]
    fn a_program_is_taken_to_read_as_it_did_last() {
        let habits = Habits::new();
        let disk: Arc<dyn Disk> = Arc::new(Nothing);
        let own = std::process::id();
        let program = program_of(own).unwrap();
        assert!(!LARGE_READERS.contains(&program.as_str()), "{program}");
        let open = || habits.open(own, 1, &disk, READ);
        assert_eq!(open().caching(), Caching::Pages);
        // The kernel may not have heard of the first opening yet.
        let watched = open();
        assert_eq!(watched.caching(), Caching::Pages);
        habits.read(&watched, own, 4096);
        assert_eq!(open().caching(), Caching::KeptPages);
        lock(&habits.programs).put(program, false);
        for (len, next) in [(1 << 20, Caching::Direct), (4096, Caching::KeptPages)] {
            let watched = open();
            assert_eq!(watched.caching(), Caching::Direct);
            (0..ENOUGH).for_each(|_| habits.read(&watched, own, len));
            assert_eq!(open().caching(), next);
        }
        let other: Arc<dyn Disk> = Arc::new(Nothing);
        assert_eq!(habits.open(own, 1, &other, READ).caching(), Caching::Pages);
        assert_eq!(habits.open(own, 1, &disk, Access { is_direct: true, ..READ }).caching(), Caching::Direct);
    }

    #[test]
    fn where_only_the_page_cache_can_be_mapped_it_is_given_to_who_might() {
        let (habits, own) = (Habits::new(), std::process::id());
        let disk: Arc<dyn Disk> = Arc::new(Nothing);
        let older = Access { maps_direct: false, ..READ };
        lock(&habits.programs).put(program_of(own).unwrap(), false);
        assert_eq!(habits.open(own, 1, &disk, READ).caching(), Caching::Direct);
        assert_eq!(habits.open(own, 1, &disk, older).caching(), Caching::Pages);
        assert_eq!(habits.open(own, 1, &disk, Access { is_direct: true, ..older }).caching(), Caching::Direct);
        assert!(NEVER_MAP.iter().all(|program| LARGE_READERS.contains(program)));
    }

    #[test]
    fn a_copier_reads_through_the_page_cache_whatever_it_did_before() {
        let folder = tempfile::tempdir().unwrap();
        let cp = folder.path().join("cp");
        // The kernel calls a program as it was started.
        std::os::unix::fs::symlink("/bin/sleep", &cp).unwrap();
        let mut copier = std::process::Command::new(&cp).arg("60").spawn().unwrap();
        let (habits, pid) = (Habits::new(), copier.id());
        let disk: Arc<dyn Disk> = Arc::new(Nothing);
        lock(&habits.programs).put("cp".to_owned(), false);
        // It is called so once it was started.
        let is_called_so = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            program_of(pid).as_deref() == Some("cp")
        });
        let caching = habits.open(pid, 1, &disk, READ).caching();
        copier.kill().and_then(|()| copier.wait()).unwrap();
        assert!(is_called_so);
        assert_eq!(caching, Caching::Pages);
    }

    #[test]
    fn requests_are_read_from_arguments_and_system_calls() {
        assert_eq!(parse_dd(b"dd\0if=x\0"), Some(512));
        assert_eq!(parse_dd(b"dd\0if=x\0bs=64k\0"), Some(65536));
        assert_eq!(parse_dd(b"dd\0if=x\0bs=4kB\0"), Some(4000));
        assert_eq!(parse_dd(b"dd\0ibs=4096\0obs=1M\0"), Some(4096));
        assert_eq!(parse_dd(b"dd\0bs=1M\0"), Some(1 << 20));
        assert_eq!(parse_dd(b"dd\0bs=x\0"), None);
        assert_eq!(parse_syscall("0 0x3 0x7f00 0x20000 0x0 0x0 0x0 0x7ffd 0x7f11\n"), Some(0x20000));
        assert_eq!(parse_syscall("1 0x3 0x7f00 0x20000 0x0 0x0 0x0 0x7ffd 0x7f11\n"), None);
        let sendfile = format!("{} 0x1 0x3 0x0 0x7ffff000 0x0 0x0 0x7ffd 0x7f11\n", libc::SYS_sendfile);
        assert_eq!(parse_syscall(&sendfile), Some(0x7fff_f000));
        assert_eq!(parse_syscall("running\n"), None);
    }
}
