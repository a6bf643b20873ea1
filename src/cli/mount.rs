//! `xofs mount`: a repository as a folder.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::exit::{Exit, Failure};
use super::serve::Serving;
use super::{Global, daemon, open};
use crate::mount::{self, MountOptions};
use crate::size;
use crate::worker::{WORKERS, Workers};

const EXAMPLES: &str = "\
Examples:
  xofs mount /srv/backups /mnt/restore
  xofs mount main /mnt/restore --daemon --allow-other --umask 022
  xofs mount /srv/backups/disk.vhd /mnt/disk

In /etc/fstab:
  /srv/backups /mnt/restore xofs ro,_netdev,nofail,noauto,x-systemd.automount 0 0

A mount in the foreground ends, and is unmounted, with Ctrl-C or SIGTERM.";

/// Mounts a repository read-only; returns (or serves on, in the foreground) when it can be read
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs mount [OPTIONS] [REPO] <DIR>")]
pub struct MountArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and the folder to mount it at
    #[arg(num_args = 1..=2, required = true, value_names = ["REPO", "DIR"])]
    names: Vec<OsString>,
    /// Goes to the background once the mount can be read
    #[arg(short, long)]
    daemon: bool,
    /// Lets other users in, as far as the modes do (see --umask)
    #[arg(long)]
    allow_other: bool,
    /// Owner of everything, by number [default: who mounts]
    #[arg(long, value_name = "NUMBER")]
    uid: Option<u32>,
    /// Group of everything, by number [default: that of who mounts]
    #[arg(long, value_name = "NUMBER")]
    gid: Option<u32>,
    /// Permissions taken from 0555 and 0444, in octal [default: 0500 and 0400 are left]
    #[arg(long, value_name = "OCTAL", value_parser = parse_umask)]
    umask: Option<u32>,
    /// To whom guests' files belong: who mounts (or --uid, --gid), or the guest's own users, by number, with their permissions
    /// [default: mounter]
    #[arg(long, value_name = "WHO")]
    owner: Option<Whose>,
    /// Shows symbolic links of guests as small text files
    #[arg(long)]
    inert_symlinks: bool,
    /// Memory for decoded blocks
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size::parse_size)]
    cache: u64,
    /// Seconds that a read or a listing may wait for the repository before it fails; 0 waits for ever
    /// [default: 30]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Threads that take requests [default: twice the number of cores, at least 8]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Processes that read the disks of guests, at most [default: 16]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    guest_workers: Option<u16>,
    /// Options as mount(8) gives them, separated by commas: allow_other, uid=, gid=, umask=, timeout=, ...
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Whose numbers guests' files have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Whose {
    Mounter,
    Guest,
}

fn parse_umask(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(umask) if umask <= 0o777 => Ok(umask),
        _ => Err("expected three octal digits, as in 077".to_owned()),
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the repository from being mounted, or what ended the mount other than an unmount.
pub fn run(global: &Global, mut arguments: MountArgs) -> Result<Exit> {
    let mut global = global.clone();
    arguments.take_options(&mut global)?;
    let is_background = global.ready_on_stdout;
    if arguments.daemon && !is_background {
        return daemon::exit(daemon::start(std::env::args_os().skip(1))?);
    }
    let serving = Serving::start()?;

    let directory = PathBuf::from(arguments.names.pop().unwrap_or_default());
    let address = arguments.names.pop();
    if address.is_none() && global.repository.is_none() {
        let only = directory.display();
        return Err(Failure::usage(format!(
            "only '{only}' is named: give the repository (or XOFS_REPOSITORY) and the folder to mount it at"
        ))
        .into());
    }
    let place = open::place(&global, address.as_deref())?;
    refuse_inside(&directory, &place.path)?;
    let repository = open::repository(&global, &place, arguments.cache)?;
    let timeout = match arguments.timeout {
        Some(0) => None,
        Some(seconds) => Some(Duration::from_secs(seconds.into())),
        None => Some(mount::DEFAULT_TIMEOUT),
    };
    let options = MountOptions {
        allow_other: arguments.allow_other,
        uid: arguments.uid,
        gid: arguments.gid,
        umask: arguments.umask,
        fsname: place.name.clone(),
        timeout,
        threads: arguments.threads.map_or(0, usize::from),
        inert_symlinks: arguments.inert_symlinks,
        is_guest_owner: arguments.owner == Some(Whose::Guest),
        workers: Workers::new(arguments.guest_workers.unwrap_or(WORKERS), timeout),
    };
    serving.mounting();
    let session = mount::mount(repository, &directory, options)?;
    let unmounter = session.unmounter();
    if !serving.mounted(move || unmounter.unmount()) {
        drop(session);
        return Ok(Exit::Interrupted);
    }
    if is_background {
        daemon::ready("")?;
        // Where the log goes from here on, nobody has read it yet.
        tracing::info!(mountpoint = %directory.display(), repository = %place.name, "mounted");
    }
    daemon::notify();
    session.wait()?;
    tracing::info!(mountpoint = %directory.display(), "unmounted");
    Ok(Exit::Done)
}

/// Refuses a folder in the repository or it itself: there the mount would hide backups, from xofs and from XO.
///
/// # Errors
/// `Usage` if it is one.
pub fn refuse_inside(directory: &Path, repository: &Path) -> Result<()> {
    match (directory.canonicalize(), repository.canonicalize()) {
        (Ok(place), Ok(repository)) if place.starts_with(&repository) => Err(Failure::usage(format!(
            "'{}' lies in the repository, whose backups the mount would hide: mount at a folder elsewhere",
            directory.display()
        ))
        .into()),
        // What does not exist is said by those who need it.
        _ => Ok(()),
    }
}

impl MountArgs {
    /// Takes what `-o` says where the options of its own name do not say otherwise.
    fn take_options(&mut self, global: &mut Global) -> Result<()> {
        let mut given = mount_xofs::Options::default();
        for options in &self.options {
            given.add(options, false).map_err(|error| Failure::usage(error.to_string()))?;
        }
        for warning in &given.warnings {
            tracing::warn!("{warning}");
        }
        self.allow_other |= given.allow_other;
        self.inert_symlinks |= given.inert_symlinks;
        self.uid = self.uid.or(given.uid);
        self.gid = self.gid.or(given.gid);
        self.umask = self.umask.or(given.umask);
        self.timeout = self.timeout.or(given.timeout);
        self.guest_workers = self.guest_workers.or(given.guest_workers);
        if let (None, Some(owner)) = (self.owner, &given.owner) {
            self.owner = Whose::from_str(owner, false).ok();
        }
        if let Some(cache) = given.cache {
            self.cache =
                size::parse_size(&cache).map_err(|reason| Failure::usage(format!("option 'cache': {reason}")))?;
        }
        if global.password_file.is_none() && global.password_command.is_none() {
            global.password_file = given.password_file.map(PathBuf::from);
            global.password_command = given.password_command;
        }
        Ok(())
    }
}
