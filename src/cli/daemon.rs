//! Going to the background: the command runs itself again, and waits until that one says that it is ready.
//!
//! ```text
//! xofs mount --daemon ──starts──► xofs --ready-on-stdout mount --daemon
//!        │                          opens, asks for the key, mounts (same terminal: Ctrl-C ends both,
//!        │                          errors are seen)
//!        │◄──── one byte ────────── leaves the terminal, answers on its standard output; after the byte
//!        │                          comes what is to be printed
//!        └─ ends with 0             serves until it is unmounted
//! ```
//!
//! Nothing is forked: a process with threads cannot be. If the new process ends without the byte, its exit code is passed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::exit::Exit;
use super::{logging, print};

/// The hidden option by which the new process knows its part.
pub const READY_OPTION: &str = "--ready-on-stdout";

const READY: &[u8] = b"R";

/// Starts this program with `arguments` in the background, and returns its exit code if it failed before it was ready,
/// else 0.
///
/// # Errors
/// What the system says when the program cannot be started.
pub fn start(arguments: impl IntoIterator<Item = OsString>) -> Result<u8> {
    // Not by a name: the program may have been exchanged meanwhile.
    let mut child = Command::new("/proc/self/exe")
        .arg0("xofs")
        .arg(READY_OPTION)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start xofs in the background")?;
    let mut answer = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_end(&mut answer).context("wait for xofs in the background")?;
    }
    if let Some(text) = answer.strip_prefix(READY) {
        print::text(&String::from_utf8_lossy(text))?;
        return Ok(0);
    }
    let status = child.wait().context("wait for xofs in the background")?;
    // Ended by a signal, or done without having been ready: a failure either way.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1))
}

/// Ends with the exit code of [`start`]; of a failure, the new process said why.
pub fn exit(code: u8) -> Result<Exit> {
    if code == 0 { Ok(Exit::Done) } else { std::process::exit(i32::from(code)) }
}

/// Leaves the terminal and says to the process that waits in [`start`] that all is ready, and what it is to print.
///
/// # Errors
/// What the system says.
pub fn ready(text: &str) -> Result<()> {
    let keeps_log = logging::leave_terminal();
    // The kernel calls a program started so "exe"; nobody would find that in a list of processes.
    let _ = rustix::thread::set_name(c"xofs");
    // Refused only to the leader of a process group, which has no need of it.
    let _ = rustix::process::setsid();
    std::env::set_current_dir("/").context("leave the current folder")?;
    let null = File::options().read(true).write(true).open("/dev/null").context("open '/dev/null'")?;
    let mut stdout = io::stdout().lock();
    // Nobody may wait any more; then the mount stays all the same.
    let _ = stdout.write_all(READY).and_then(|()| stdout.write_all(text.as_bytes())).and_then(|()| stdout.flush());
    rustix::stdio::dup2_stdin(&null).context("leave standard input")?;
    rustix::stdio::dup2_stdout(&null).context("leave standard output")?;
    if !keeps_log {
        rustix::stdio::dup2_stderr(&null).context("leave standard error")?;
    }
    Ok(())
}

/// Says to systemd that the service is ready, if it asked. Source: sd_notify(3).
pub fn notify() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let bytes = name.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1\n", &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd was not told that the mount is ready");
    }
}
