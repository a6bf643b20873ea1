//! The log: lines on standard error, which a daemon exchanges for syslog once its mount can be read.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Where syslog listens.
const SYSLOG: &str = "/dev/log";

/// Facility "daemon" of syslog (RFC 3164, section 4.1.1), in the place of the priority's upper bits.
const FACILITY: u8 = 3 << 3;

/// Set once, when the process leaves its terminal.
static DETACHED: OnceLock<Target> = OnceLock::new();

enum Target {
    Syslog(UnixDatagram),
    Nowhere,
}

/// Starts the log. `XOFS_LOG` chooses what is logged (`debug`, `xofs=debug,vhd=info`), else `level`.
pub fn start(level: Level) {
    let filter = EnvFilter::try_from_env("XOFS_LOG").unwrap_or_else(|_| EnvFilter::new(level.as_str()));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Writer)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .finish();
    // Fails only if one is set already, which then stays.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Sends the log to syslog from now on, or nowhere if nobody listens.
pub fn leave_terminal() {
    let socket = UnixDatagram::unbound().and_then(|socket| {
        socket.connect(SYSLOG)?;
        // A syslog that hangs must not hang the mount.
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    let _ = DETACHED.set(socket.map_or(Target::Nowhere, Target::Syslog));
}

/// Whether standard error already leads to the journal. Source: systemd.exec(5), `$JOURNAL_STREAM`.
pub fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

struct Writer;

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { severity: 6, bytes: Vec::new() }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line {
        let severity = match *metadata.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        Line { severity, bytes: Vec::new() }
    }
}

/// One line, written when it is complete.
struct Line {
    severity: u8,
    bytes: Vec<u8>,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // A log that cannot be written has nowhere to say so.
        let _ = match DETACHED.get() {
            None => io::stderr().lock().write_all(&self.bytes),
            Some(Target::Syslog(socket)) => {
                let mut line = format!("<{}>xofs[{}]: ", FACILITY | self.severity, std::process::id()).into_bytes();
                line.extend_from_slice(self.bytes.trim_ascii());
                socket.send(&line).map(drop)
            }
            Some(Target::Nowhere) => Ok(()),
        };
    }
}
