//! `xofs loop`: a volume mounted by this machine's kernel, for what is not read here.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::find::{Files, Raw};
use super::path::GuestPath;
use crate::cli::exit::{Exit, Failure};
use crate::cli::serve::Serving;
use crate::cli::text::{Shown, size};
use crate::cli::{Global, daemon, mount as mount_command, open};
use crate::mount::{self, LoopMount, LoopOptions, Looped};
use crate::size::parse_size;

const EXAMPLES: &str = "\
WHAT is VM/BACKUP/VOLUME, or VM/BACKUP/DISK, of which with --device the partitions become devices, too. What is written, as the \
kernel does when it recovers a journal, is kept beside the backup and discarded in the end; the backup is never changed. \
The kernel's drivers are not made for disks of people who mean harm: of guests you do not trust, read files with 'xofs cp'.

Examples:
  xofs loop /srv/backups web01/latest/xvda1 /mnt
  xofs loop main web01/2026-11-20/xvda1 /mnt -o subvol=@home --daemon
  xofs loop main web01/latest/xvdb1 --device     for cryptsetup and others; prints the device
  xofs unmount /mnt                              ends it; or the device: xofs unmount /dev/loop0

In the foreground it ends with Ctrl-C or SIGTERM.";

/// Mounts a volume by a loop device, read-only, with the drivers of this machine; for root
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs loop [OPTIONS] [REPO] <WHAT> <DIR>\n       xofs loop [OPTIONS] [REPO] <WHAT> --device")]
pub struct LoopArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), a volume in it, and the folder to mount it at
    #[arg(num_args = 1..=3, required = true, value_names = ["REPO", "WHAT", "DIR"])]
    names: Vec<OsString>,
    /// Makes the device only, and mounts nothing
    #[arg(long, conflicts_with_all = ["kind", "options"])]
    device: bool,
    /// Goes to the background once it is there
    #[arg(short, long)]
    daemon: bool,
    /// The filesystem, as mount(8) calls it [default: what mount(8) finds]
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    kind: Option<OsString>,
    /// More options for mount(8)
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// Makes a device that cannot be written, and mounts without recovering the journal, where the driver can do that
    #[arg(long, conflicts_with = "overlay_size")]
    no_overlay: bool,
    /// Bytes that may be written, beside the backup
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    overlay_size: u64,
    /// Seconds that a read may wait for the repository before it fails; 0 waits for ever
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    timeout: u32,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If there is no such volume, the system does not mount it, or what ended it other than an unmount.
pub fn run(global: &Global, arguments: &LoopArgs) -> Result<Exit> {
    let (address, what, directory) = arguments.names()?;
    let path = GuestPath::parse(what)?;
    let Some(volume) = path.inside.as_ref().filter(|inside| inside.path.is_empty()).map(|inside| &*inside.volume)
    else {
        let shown = what.to_string_lossy();
        let message =
            format!("'{}' is no volume: expected VM/BACKUP/VOLUME, as in 'web01/latest/xvda1'", Shown(&shown));
        return Err(Failure::usage(message).into());
    };
    if !open::is_root() {
        let message = "xofs loop needs root, who alone may make loop devices and mount them; \
                       'xofs ls', 'xofs cp' and 'xofs mount' show files without";
        return Err(Failure::new(Exit::Failed, message).into());
    }
    let is_background = global.ready_on_stdout;
    if arguments.daemon && !is_background {
        return daemon::exit(daemon::start(std::env::args_os().skip(1))?);
    }
    let serving = Serving::start()?;
    if let Some(directory) = &directory {
        mount_command::refuse_inside(directory, &open::place(global, address)?.path)?;
    }
    let files = Files::open(global, address)?;
    let backup = files.backup(&path.backup)?;
    let name = format!("{}/{volume}", path.backup);
    let raw = files.raw(&backup, volume, arguments.device).with_context(|| format!("'{}'", Shown(&name)))?;
    let vm = path.backup.split('/').next().unwrap_or_default();
    let options = LoopOptions {
        name: format!("{vm}/{}/{volume}", backup.time),
        overlay: (!arguments.no_overlay).then_some(arguments.overlay_size),
        timeout: Some(Duration::from_secs(arguments.timeout.into())).filter(|timeout| !timeout.is_zero()),
        has_partitions: arguments.device && raw.content.is_none(),
    };
    // Nothing is read of the guest from here on but by the kernel.
    drop(files);
    serving.mounting();
    let mounted = match &directory {
        None => mount::attach(raw.disk.clone(), &options)?,
        Some(directory) => mount::mount_loop(raw.disk.clone(), &options, directory, &how(&raw, arguments))
            .with_context(|| explain(&name, &raw))?,
    };
    let ender = mounted.ender();
    if !serving.mounted(move || ender.end()) {
        drop(mounted);
        return Ok(Exit::Interrupted);
    }
    let facts = Facts { name: &name, time: backup.time.to_string(), raw: &raw, mounted: &mounted };
    let said = if arguments.json { facts.to_json() } else { facts.to_text(arguments.daemon) };
    if is_background {
        daemon::ready(&said)?;
    } else {
        // Nobody may listen any more; then it stays all the same.
        let _ = io::stdout().lock().write_all(said.as_bytes());
    }
    daemon::notify();
    mounted.wait()?;
    Ok(Exit::Done)
}

impl LoopArgs {
    /// Returns the repository, what is in it, and where it is to be mounted.
    fn names(&self) -> Result<(Option<&OsStr>, &OsStr, Option<PathBuf>)> {
        let directory = |name: &OsString| Some(PathBuf::from(name));
        match (&*self.names, self.device) {
            ([repository, what, at], false) => Ok((Some(repository), what, directory(at))),
            ([what, at], false) => Ok((None, what, directory(at))),
            ([repository, what], true) => Ok((Some(repository), what, None)),
            ([what], true) => Ok((None, what, None)),
            (_, false) => Err(Failure::usage("a volume and a folder to mount it at are needed; or --device").into()),
            (_, true) => Err(Failure::usage("with --device nothing is mounted: leave the folder out").into()),
        }
    }
}

/// Returns how a volume is mounted: whatever its driver must be told so that it is content with a copy, and with no recovery.
///
/// Sources: Documentation/filesystems/ext4.rst, xfs(5), btrfs(5), Documentation/filesystems/f2fs.rst.
fn how(raw: &Raw, arguments: &LoopArgs) -> LoopMount {
    let (always, without_recovery) = match raw.content.as_deref().unwrap_or_default() {
        "ext3" | "ext4" => (None, Some("noload")),
        // It refuses a second filesystem with the number of one that is mounted, as another backup of it has.
        "XFS" => (Some("nouuid"), Some("norecovery")),
        "Btrfs" => (None, Some("rescue=nologreplay")),
        "F2FS" => (None, Some("norecovery")),
        _ => (None, None),
    };
    let own = always.into_iter().chain(without_recovery.filter(|_| arguments.no_overlay)).map(OsString::from);
    LoopMount { kind: arguments.kind.clone(), options: own.chain(arguments.options.iter().cloned()).collect() }
}

/// Says what is known of a volume that was not mounted.
fn explain(name: &str, raw: &Raw) -> String {
    let name = Shown(name);
    match (&raw.content, &raw.problem) {
        (None, _) => format!("'{name}' is a whole disk; 'xofs ls' lists the volumes, if it has any"),
        (Some(content), None) => format!("'{name}' ({content})"),
        (Some(content), Some(problem)) => {
            format!("'{name}' ({content}; {problem}; with --device it becomes a device alone)")
        }
    }
}

/// What is said of a device that is there.
struct Facts<'a> {
    name: &'a str,
    time: String,
    raw: &'a Raw,
    mounted: &'a Looped,
}

impl Facts<'_> {
    fn to_text(&self, is_daemon: bool) -> String {
        let device = self.mounted.device().display();
        let Some(directory) = self.mounted.directory() else { return format!("{device}\n") };
        let content = self.raw.content.as_deref().unwrap_or("whole disk");
        let (name, bytes) = (Shown(self.name), size(self.raw.disk.size()));
        let directory = directory.display();
        let mut text = format!("{name} ({content}, {bytes}) is mounted at {directory} by way of {device}\n");
        let written = self.mounted.written();
        if written > 0 {
            text += &format!("recovered: {} were written beside the backup, until it is unmounted\n", size(written));
        }
        let how = if is_daemon { "" } else { "Ctrl-C or " };
        text + &format!("{how}'xofs unmount {directory}' ends it\n")
    }

    fn to_json(&self) -> String {
        let facts = json!({
            "backup": self.time,
            "volume": self.name.rsplit('/').next(),
            "size": self.raw.disk.size(),
            "content": self.raw.content,
            "device": self.mounted.device(),
            "directory": self.mounted.directory(),
            "written": self.mounted.written(),
        });
        format!("{facts:#}\n")
    }
}
