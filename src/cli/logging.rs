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
    /// Standard error, which is the journal.
    Journal,
    Syslog(UnixDatagram),
    Nowhere,
}

/// Starts the log. `XOFS_LOG` chooses what is logged (`debug`, `xofs=debug,vhd=info`), else `level`.
///
/// A process on its way to the background shows only warnings and errors to the terminal it will leave.
pub fn start(level: Level, is_background: bool) {
    let asked = std::env::var("XOFS_LOG").ok().filter(|asked| !asked.is_empty());
    let filter = asked.and_then(|asked| {
        let filter = EnvFilter::try_new(&asked);
        if let Err(error) = &filter {
            say!("xofs: warning: XOFS_LOG is ignored, 'debug' or 'xofs=debug,vhd=info' was expected: {error}");
        }
        filter.ok()
    });
    let filter = filter.unwrap_or_else(|| EnvFilter::new(level.as_str()));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Writer { is_background })
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .finish();
    // Fails only if one is set already, which then stays.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Sends the log to the journal from now on if standard error is that, else to syslog, or nowhere if nobody listens.
/// Returns whether standard error is still in use.
pub fn leave_terminal() -> bool {
    if is_journal() {
        let _ = DETACHED.set(Target::Journal);
        return true;
    }
    let socket = UnixDatagram::unbound().and_then(|socket| {
        socket.connect(SYSLOG)?;
        // A syslog that hangs must not hang the mount.
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    let _ = DETACHED.set(socket.map_or(Target::Nowhere, Target::Syslog));
    false
}

/// Whether standard error already leads to the journal. Source: systemd.exec(5), `$JOURNAL_STREAM`.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

struct Writer {
    is_background: bool,
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { severity: 6, is_background: self.is_background, bytes: Vec::new() }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line {
        let severity = match *metadata.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        Line { severity, is_background: self.is_background, bytes: Vec::new() }
    }
}

/// One line, written when it is complete.
struct Line {
    severity: u8,
    is_background: bool,
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
            None if self.is_background && self.severity > 4 => Ok(()),
            None | Some(Target::Journal) => io::stderr().lock().write_all(&self.bytes),
            Some(Target::Syslog(socket)) => {
                let mut line = format!("<{}>xofs[{}]: ", FACILITY | self.severity, std::process::id()).into_bytes();
                line.extend_from_slice(self.bytes.trim_ascii());
                socket.send(&line).map(drop)
            }
            Some(Target::Nowhere) => Ok(()),
        };
    }
}
