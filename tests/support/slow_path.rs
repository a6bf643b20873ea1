//! A folder seen through a path that can be slow, stall or fail: the client of the program `passthrough`.
//!
//! ```ignore
//! let slow = SlowPath::mount(&repository);     // slow.path() shows what `repository` holds
//! slow.stall("xo-vm-backups/*.vhd ops=read");  // paths below it; `*` is any characters, `/` among them
//! slow.wait_for_stalled(1);
//! slow.release();
//! ```
//!
//! What a rule can say is at the top of `tests/passthrough/src/main.rs`.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long anything may take. Generous: the machines of CI are slow, not wrong.
const PATIENCE: Duration = Duration::from_secs(60);

/// The built program. Cargo builds it for tests of its own package only.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let ours = match (option_env!("CARGO_BIN_EXE_passthrough"), option_env!("CARGO_BIN_EXE_xofs")) {
            (Some(own), _) => return own.into(),
            (None, Some(ours)) => ours,
            (None, None) => panic!("neither a test of passthrough nor of xofs"),
        };
        let folder = Path::new(ours).parent().expect("a file lies in a folder");
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--quiet", "--package", "passthrough"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        command.arg("--target-dir").arg(folder.parent().expect("target/PROFILE"));
        if folder.file_name() == Some(OsStr::new("release")) {
            command.arg("--release");
        }
        let status = command.status().expect("cargo runs this test");
        assert!(status.success(), "{command:?} ended with {status}");
        folder.join("passthrough")
    })
}

/// A folder mounted by `passthrough`. Dropping it lets go what waits, unmounts, and ends the program.
pub struct SlowPath {
    /// Holds the mount point and the control socket. Never removed with what is in it: that could be the source.
    folder: PathBuf,
    mountpoint: PathBuf,
    /// Ends with its standard input, so also when this process is killed.
    program: Child,
}

impl SlowPath {
    /// Mounts `source` at a new place, without delay.
    pub fn mount(source: &Path) -> Self {
        let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = tempfile::Builder::new().prefix("slow-").tempdir_in(scratch).expect("a folder to mount in").keep();
        let folder = folder.canonicalize().expect("it was just made");
        let mountpoint = folder.join("mount");
        fs::create_dir(&mountpoint).expect("the folder is empty");
        let mut command = Command::new(program());
        command.arg(source).arg(&mountpoint).arg("--control").arg(folder.join("control")).arg("--until-stdin-ends");
        let program = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the built program starts");
        // From here on, a panic drops it.
        let mut mounted = Self { folder, mountpoint, program };
        let mut line = String::new();
        let output = mounted.program.stdout.as_mut().expect("it is piped");
        BufReader::new(output).read_line(&mut line).expect("it says text");
        assert_eq!(line, "ready\n", "{command:?} did not mount: see above");
        mounted
    }

    /// Where the source is seen through the slow path.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Each request for a path that matches begins so much later.
    pub fn delay(&self, delay: Duration, glob: &str) {
        self.command(&format!("delay {} {glob}", delay.as_millis()));
    }

    /// Requests for paths that match wait until [`SlowPath::release`]; also for files that are open already.
    pub fn stall(&self, glob: &str) {
        self.command(&format!("stall {glob}"));
    }

    /// Requests for paths that match fail with an error such as `ESTALE`.
    pub fn fail(&self, errno: &str, glob: &str) {
        self.command(&format!("fail {errno} {glob}"));
    }

    /// Reads of files that match find their end after so many bytes.
    pub fn cut(&self, glob: &str, bytes: u32) {
        self.command(&format!("cut {glob} {bytes}"));
    }

    /// Forgets all rules and lets go what waits.
    pub fn release(&self) {
        self.command("release");
    }

    /// How many requests are stalled now.
    pub fn stalled(&self) -> u64 {
        self.command("stalled").parse().expect("the answer is a number")
    }

    /// Waits until at least so many requests are stalled.
    pub fn wait_for_stalled(&self, wanted: u64) {
        let start = Instant::now();
        while self.stalled() < wanted {
            assert!(start.elapsed() < PATIENCE, "not {wanted} stalled within {PATIENCE:?}, but {}", self.stalled());
            sleep(Duration::from_millis(5));
        }
    }

    /// How many requests came since [`SlowPath::reset`], of one operation (`read`) or, if that is empty, of all.
    pub fn count(&self, operation: &str) -> u64 {
        self.command(&format!("count {operation}")).parse().expect("the answer is a number")
    }

    /// Counts from 0 again.
    pub fn reset(&self) {
        self.command("reset");
    }

    /// Kills the program, as a lost server: what waits fails, and the mount is dead until this is dropped.
    pub fn kill(&mut self) {
        self.program.kill().expect("it is our child");
        self.program.wait().expect("it is our child");
    }

    fn command(&self, line: &str) -> String {
        let mut control = UnixStream::connect(self.folder.join("control")).expect("the program listens");
        control.write_all(format!("{line}\n").as_bytes()).expect("the program listens");
        let mut answer = String::new();
        BufReader::new(control).read_line(&mut answer).expect("the program answers");
        assert!(answer.ends_with('\n') && !answer.starts_with("error"), "{line}: {answer}");
        answer.trim_end().to_owned()
    }
}

impl Drop for SlowPath {
    fn drop(&mut self) {
        // The program answers what waits, unmounts and ends.
        drop(self.program.stdin.take());
        let start = Instant::now();
        let mut status = self.program.try_wait();
        while matches!(status, Ok(None)) && start.elapsed() < PATIENCE {
            sleep(Duration::from_millis(5));
            status = self.program.try_wait();
        }
        let is_clean = matches!(status, Ok(Some(status)) if status.success());
        if !is_clean {
            let _ = self.program.kill();
            let _ = self.program.wait();
            let _ = Command::new("umount").arg("--lazy").arg(&self.mountpoint).stderr(Stdio::null()).status();
        }
        let _ = fs::remove_file(self.folder.join("control"));
        let removed = fs::remove_dir(&self.mountpoint).and_then(|()| fs::remove_dir(&self.folder));
        if let Err(error) = removed {
            let problem = format!("{} is left behind: {error}", self.folder.display());
            // A second panic would abort and hide the first.
            if std::thread::panicking() {
                eprintln!("{problem}");
            } else {
                panic!("{problem}");
            }
        }
    }
}
