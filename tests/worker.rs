//! Workers: what they may do, and what becomes of a mount when one dies, lies or spins.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use disk::{Disk, Extent};
use guest::Content;
use xofs::worker::{Error, Volume, Workers};

/// A disk of one byte over and over, which can be made to wait or to fail.
struct Plain {
    size: u64,
    act: Box<dyn Fn() -> disk::Result<()> + Send + Sync>,
}

impl Plain {
    fn of(size: u64) -> Arc<dyn Disk> {
        Self::with(size, || Ok(()))
    }

    fn with(size: u64, act: impl Fn() -> disk::Result<()> + Send + Sync + 'static) -> Arc<dyn Disk> {
        Arc::new(Self { size, act: Box::new(act) })
    }
}

impl Disk for Plain {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> disk::Result<()> {
        buffer.fill(7);
        (self.act)()
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size - offset, is_hole: false })
    }
}

fn workers(limit: u16) -> Arc<Workers> {
    Workers::of_program(PathBuf::from(env!("CARGO_BIN_EXE_xofs")), limit, Duration::from_secs(20), None)
}

fn field(text: &str, name: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in:\n{text}"));
    line[name.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The children of this process that are workers.
fn children() -> Vec<u32> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let children = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default());
    children.flat_map(|line| line.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect()
}

// Promise 22: "without files, network, rights or other processes, with 1 GiB of address space"
#[test]
fn a_worker_that_reads_has_no_rights_no_files_and_a_limit_of_memory() {
    let (asks, asked): (SyncSender<()>, Receiver<()>) = sync_channel(0);
    let (goes_on, may_go_on): (SyncSender<()>, Receiver<()>) = sync_channel(0);
    let may_go_on = std::sync::Mutex::new(may_go_on);
    let is_first = std::sync::atomic::AtomicBool::new(true);
    let disk = Plain::with(1 << 20, move || {
        if is_first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            asks.send(()).unwrap();
            may_go_on.lock().unwrap().recv().unwrap();
        }
        Ok(())
    });
    let looking = thread::spawn(move || workers(1).survey(&[("xvda".to_owned(), disk)]).map(drop));
    asked.recv_timeout(Duration::from_secs(20)).unwrap();
    // Others of this file may run at the same time.
    for pid in children() {
        let of = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
        let Ok(status) = of("status") else { continue };
        if field(&status, "Name:") != "xofs-guest" || field(&status, "Seccomp:") != "2" {
            continue;
        }
        assert_eq!(field(&status, "NoNewPrivs:"), "1");
        assert_eq!(field(&status, "Threads:"), "1");
        if rustix::process::geteuid().is_root() {
            assert_eq!(field(&status, "Uid:"), "65534 65534 65534 65534");
            assert_eq!(field(&status, "Gid:"), "65534 65534 65534 65534");
            assert_eq!(field(&status, "Groups:"), "");
        }
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
        if rustix::process::geteuid().is_root() {
            assert_eq!(field(&status, "CapBnd:"), "0000000000000000");
        }
        let limits = of("limits").unwrap();
        assert_eq!(field(&limits, "Max address space"), "1073741824 1073741824 bytes");
        for name in ["Max core file size", "Max file size"] {
            assert!(field(&limits, name).starts_with("0 0"), "{name}");
        }
        assert_eq!(field(&limits, "Max open files"), "0 0 files");
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let open: Vec<_> = open.map(|file| fs::read_link(file.unwrap().path()).unwrap()).collect();
        let is_own = |path: &PathBuf| path == Path::new("/dev/null") || path.to_string_lossy().starts_with("socket:");
        assert!(open.iter().all(is_own), "{open:?}");
        goes_on.send(()).unwrap();
        looking.join().unwrap().unwrap();
        return;
    }
    panic!("no confined worker among {:?}", children());
}

#[test]
fn what_a_disk_says_is_what_comes_back() {
    let error = disk::Error::new(disk::ErrorKind::Stale, "the backup was removed");
    let disk = Plain::with(1 << 20, move || Err(error.clone()));
    match workers(1).survey(&[("xvda".to_owned(), disk)]) {
        Err(Error::Disk(error)) => assert_eq!(error.kind(), disk::ErrorKind::Stale),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_lies_beside_something_unreadable_is_read() {
    /// Its second half cannot be read.
    struct Half;
    impl Disk for Half {
        fn size(&self) -> u64 {
            64 << 10
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
            if offset + buffer.len() as u64 > 32 << 10 {
                return Err(disk::Error::new(disk::ErrorKind::Damaged, "the second half"));
            }
            buffer.fill(0);
            // A partition table of one FAT, which lies in the second half.
            if offset == 0 && buffer.len() >= 512 {
                buffer[446..462].copy_from_slice(&[0, 0, 0, 0, 12, 0, 0, 0, 64, 0, 0, 0, 64, 0, 0, 0]);
                buffer[510..512].copy_from_slice(&[0x55, 0xaa]);
            }
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
            Ok(Extent { len: self.size() - offset, is_hole: false })
        }
    }
    let survey = workers(1).survey(&[("xvda".to_owned(), Arc::new(Half))]).unwrap();
    let found: Vec<_> = survey.volumes.iter().map(|volume| (volume.name.as_str(), volume.content)).collect();
    assert_eq!(found, [("xvda1", Content::Unread)]);
}

/// A program that says these bytes as a worker, as `printf(1)` writes them, and then does something.
fn liar(folder: &Path, says: &str, then: &str) -> PathBuf {
    let path = folder.join(format!("liar-{}", fs::read_dir(folder).unwrap().count()));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path).unwrap();
    // Of standard input, since that is the socket.
    write!(file, "#!/bin/sh\nprintf '{says}' >&0\n{then}\n").unwrap();
    path
}

/// `Ready`, of two bytes: the kind of the frame and the message.
const READY: &str = r"\002\000\000\000\000\000";

#[test]
fn a_worker_that_lies_spins_or_dies_costs_the_request_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("", "exit 3", "no worker could be started: it ended (exit status: 3)"),
        (r"\377\377\377\377\000", "sleep 9", "a frame of a length that none has"),
        (READY, "exit 0", "it ended (exit status: 0)"),
        (READY, "kill -SEGV $$", "it was ended by signal 11"),
        (READY, "while :; do :; done", "it took more than"),
        // Slowly, so that there is always something to be read.
        (READY, r"while :; do printf '\001' >&0; sleep 0.1; done", "it answered what no reader does"),
        (concat!(r"\002\000\000\000\000\000", r"\000\000\000\000\000"), "sleep 9", "a frame of a length that none has"),
        (concat!(r"\002\000\000\000\000\000", r"\377\377\077\000\000"), "sleep 9", "it took more than"),
        (concat!(r"\002\000\000\000\000\000", r"\002\000\000\000\000\377"), "sleep 9", "a message that is none"),
        (concat!(r"\002\000\000\000\000\000", r"\002\000\000\000\007\000"), "sleep 9", "a frame of a kind"),
        // Ready again; Read of disk 9; of byte 2^20; of none; an answer to another question; bytes.
        (concat!(r"\002\000\000\000\000\000", r"\002\000\000\000\000\000"), "sleep 9", "answered what was not asked"),
        (
            concat!(r"\002\000\000\000\000\000", r"\005\000\000\000\000\001\011\000\001"),
            "sleep 9",
            "a disk that there is not",
        ),
        (
            concat!(r"\002\000\000\000\000\000", r"\007\000\000\000\000\001\000\200\200\100\001"),
            "sleep 9",
            "bytes that its disk has not",
        ),
        (
            concat!(r"\002\000\000\000\000\000", r"\005\000\000\000\000\001\000\000\000"),
            "sleep 9",
            "bytes that its disk has not",
        ),
        (concat!(r"\002\000\000\000\000\000", r"\003\000\000\000\000\006\000"), "sleep 9", "something else"),
        (concat!(r"\002\000\000\000\000\000", r"\003\000\000\000\001\000\000"), "sleep 9", "something else"),
        // Failed for a disk, which could be read.
        (concat!(r"\002\000\000\000\000\000", r"\004\000\000\000\000\011\005\000"), "sleep 9", "blamed a disk"),
    ];
    for (says, then, expected) in cases {
        let workers = Workers::of_program(liar(folder.path(), says, then), 1, Duration::from_secs(2), None);
        let found = workers.survey(&[("xvda".to_owned(), Plain::of(1 << 20))]);
        match found {
            Err(Error::Worker(message)) => assert!(message.contains(expected), "{says} {then}: {message}"),
            other => panic!("{says} {then}: {other:?}"),
        }
        assert_eq!(workers.running(), 0, "{says} {then}");
    }
}

// Promise 22: "and a volume for a minute at which fifty died within one, or five that could not even open it."
#[test]
fn a_volume_whose_workers_keep_failing_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let workers = Workers::of_program(liar(folder.path(), READY, "exit 0"), 1, Duration::from_secs(5), None);
    let volume = Volume::new(workers, Content::Ext4, vec![Plain::of(1 << 20)]);
    let messages: Vec<String> = (0..7).map(|_| volume.open().unwrap_err().to_string()).collect();
    assert!(messages[..5].iter().all(|message| message.contains("it ended (exit status: 0)")), "{messages:?}");
    assert!(messages[5..].iter().all(|message| message.contains("left alone")), "{messages:?}");
}
