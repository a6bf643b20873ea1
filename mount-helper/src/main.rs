//! `mount.xofs`, run by mount(8) for `mount -t xofs` and for lines of fstab: says it to `xofs mount --daemon`, waits until
//! the mount can be read, and passes on what came of it.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use mount_xofs::{MOUNT_FAILURE, Request};

const HELP: &str = "\
Mounts a backup repository of Xen Orchestra, read-only; mount(8) runs it for 'mount -t xofs' and for lines of /etc/fstab

Usage: mount.xofs REPOSITORY DIRECTORY [-sfnv] [-o OPTIONS]

  -o OPTIONS  allow_other, uid=, gid=, umask=, password_file=, ..., separated by commas, and those of mount(8)
  -s          takes options it does not know
  -f          checks the command line and mounts nothing
  -v          says what is run

Examples:
  mount -t xofs -o allow_other,umask=022 /srv/backups /mnt/restore

In /etc/fstab:
  /srv/backups /mnt/restore xofs ro,_netdev,nofail,noauto,x-systemd.automount 0 0

Ends with 0 when the mount can be read, else with 32.";

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|first| first == "--help" || first == "-h") {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            if !message.is_empty() {
                eprintln!("mount.xofs: {message}");
            }
            ExitCode::from(MOUNT_FAILURE)
        }
    }
}

/// Mounts; an error without text was already reported by `xofs`.
fn run() -> Result<(), String> {
    let request = Request::parse(std::env::args_os().skip(1)).map_err(|error| error.to_string())?;
    for warning in &request.options.warnings {
        eprintln!("mount.xofs: warning: {warning}");
    }
    let program = find_xofs().ok_or("'xofs' is neither beside mount.xofs nor in PATH: install both together")?;
    if request.is_verbose {
        eprintln!("mount.xofs: runs {} {:?}", program.display(), request.arguments());
    }
    if request.is_fake {
        return Ok(());
    }
    let status = Command::new(&program)
        .args(request.arguments())
        .status()
        .map_err(|error| format!("run '{}': {error}", program.display()))?;
    match (status.success(), status.code()) {
        (true, _) => Ok(()),
        (false, Some(_)) => Err(String::new()),
        (false, None) => Err(format!("'{}' was ended: {status}", program.display())),
    }
}

/// Returns the `xofs` beside this program, else the first in PATH, else in the places where mount(8), which may clear
/// PATH, finds programs.
fn find_xofs() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_path_buf));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(OsStr::new(&path)).filter(|folder| folder.is_absolute()))
        .chain(["/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin"].map(PathBuf::from))
        .map(|folder| folder.join("xofs"))
        .find(|path| path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0))
}
