//! A mount that passes everything through to a folder, and can be slow, stall or fail on command.
//!
//! It stands in for a network path that dies. It prints `ready` when it is mounted, and goes when it gets SIGTERM or
//! SIGINT: requests that wait are answered EIO, and the mount is detached if it is busy. Killed by SIGKILL, it leaves a
//! dead mount, as a lost server does; `umount --lazy` removes it.
//!
//! Each request is handled in a thread of its own (up to 256 at once), so that one that waits holds up no other. Names
//! and attributes are not kept by the kernel. Content is dropped at each open; while a file is open, what was read of it
//! is read again without a request. A stalled lookup keeps names from being made in its folder (Linux locks it).
//! A stalled caller can be killed by SIGKILL only, as on NFS.
//!
//! The control socket takes one command a line and answers each with one line: `ok`, a number, or `error: ...`.
//!
//! | command | from now on |
//! |---|---|
//! | `delay MS [GLOB]` | requests begin so many milliseconds later (the latest rule that matches counts) |
//! | `stall GLOB` | requests wait until `release` |
//! | `fail ERRNO GLOB` | requests fail, for example with `ESTALE` |
//! | `cut GLOB BYTES` | reads find the end of the file there, whatever its size is said to be |
//! | `release` | no rule holds, and what waits goes on |
//! | `stalled` | answers how many requests are stalled |
//! | `count [OP]` | answers how many requests came since `reset` |
//! | `reset` | counts start at 0 |
//!
//! `GLOB` is compared with the whole path below the source: `*` is any characters, `/` among them, and `?` one; `/` is
//! the root. A request whose file is open already has the path of that file; a rename has both its paths. Behind `GLOB`,
//! `ops=read,lookup` restricts a rule to some requests.

mod filesystem;
mod pool;
mod rules;
mod tree;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io, process, thread};

use anyhow::Context;
use clap::Parser;
use fuser::{Config, MountOption, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, geteuid};

use filesystem::Passthrough;
use pool::Pool;
use rules::Rules;
use tree::Tree;

/// Threads that take requests from the kernel; none of them ever waits.
const LOOP_THREADS: usize = 16;

/// How long requests that were let go may take to be answered before the mount is taken away.
const PATIENCE: Duration = Duration::from_secs(2);

/// Passes a folder through, slowly, never or with errors if told so.
#[derive(Parser)]
struct Arguments {
    source: PathBuf,
    mountpoint: PathBuf,
    /// Listen for commands on a unix socket here.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Delay every request from the start.
    #[arg(long, value_name = "MS")]
    delay: Option<u32>,
    /// How long the kernel may keep names and attributes.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    valid: u64,
    /// Unmount when standard input ends too: so with the process that holds its other end.
    #[arg(long)]
    until_stdin_ends: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // Before any thread starts, as each inherits it.
    let ending = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    ending.thread_block().context("block signals")?;
    // What is made has the mode its maker asks for.
    umask(Mode::empty());

    let (rules, pool) = (Arc::new(Rules::default()), Arc::new(Pool::default()));
    let tree = Tree::new(&arguments.source).with_context(|| format!("open {}", arguments.source.display()))?;
    if let Some(delay) = arguments.delay {
        rules.obey(&format!("delay {delay}"));
    }
    let filesystem = Passthrough {
        tree: Arc::new(tree),
        rules: Arc::clone(&rules),
        pool: Arc::clone(&pool),
        valid: Duration::from_millis(arguments.valid),
    };
    let mountpoint = arguments.mountpoint.canonicalize().context("find the mount point")?;
    if let Some(path) = &arguments.control {
        let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
        let rules = Arc::clone(&rules);
        thread::spawn(move || listen(&listener, &rules));
    }
    let session = mount(filesystem, &mountpoint).with_context(|| format!("mount at {}", mountpoint.display()))?;
    let control = arguments.control.clone();
    thread::spawn(move || {
        // Somebody else unmounted it, or we did below.
        let result = session.run();
        leave(control.as_deref(), result)
    });
    if arguments.until_stdin_ends {
        thread::spawn(|| {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            kill(Pid::this(), Signal::SIGTERM)
        });
    }
    println!("ready");

    ending.wait().context("wait for a signal")?;
    rules.end();
    pool.wait(PATIENCE);
    leave(arguments.control.as_deref(), unmount(&mountpoint))
}

fn mount(filesystem: Passthrough, mountpoint: &Path) -> io::Result<Session<Passthrough>> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("passthrough".to_owned()),
        MountOption::CUSTOM("subtype=passthrough".to_owned()),
        MountOption::DefaultPermissions,
    ];
    // As others than root, /etc/fuse.conf would have to allow it.
    config.acl = if geteuid().is_root() { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(LOOP_THREADS);
    Session::new(filesystem, mountpoint, &config)
}

fn unmount(mountpoint: &Path) -> io::Result<()> {
    match umount2(mountpoint, MntFlags::empty()) {
        // Gone already.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(Errno::EPERM) => {
            Command::new("fusermount3").args(["-u", "-q", "-z", "--"]).arg(mountpoint).status().map(drop)
        }
        Err(_) => Ok(umount2(mountpoint, MntFlags::MNT_DETACH)?),
    }
}

fn leave(control: Option<&Path>, result: io::Result<()>) -> ! {
    if let Some(path) = control {
        let _ = fs::remove_file(path);
    }
    match result {
        Ok(()) => process::exit(0),
        Err(error) => {
            eprintln!("passthrough: {error}");
            process::exit(1)
        }
    }
}

fn listen(listener: &UnixListener, rules: &Arc<Rules>) {
    for connection in listener.incoming().flatten() {
        let rules = Arc::clone(rules);
        // A client that goes away is its own affair.
        thread::spawn(move || converse(&connection, &rules));
    }
}

fn converse(mut connection: &UnixStream, rules: &Rules) -> io::Result<()> {
    for line in BufReader::new(connection).lines() {
        let answer = rules.obey(&line?);
        connection.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}
