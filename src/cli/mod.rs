//! The commands of `xofs`: one file each, and the only place that prints.
//!
//! ```text
//! main ─► mount · unmount · list · info · export · check · repair · forget · ingest · backup · restore · job · repository · completions (and man)
//!      │  guest: ls · cat · cp · tar · loop
//!           └─► open ─► address, config, password        what is named, to an open repository
//!           └► pool, store                       a pool and its password; what those share that write backups
//! exit: how each ends      text, print, say: how values are written      logging, signals, serve, daemon: the process
//! ```

// First: what comes after knows its macro.
#[macro_use]
mod say;

mod address;
mod backup;
mod check;
mod completions;
mod config;
mod daemon;
mod exit;
mod export;
mod forget;
mod guest;
mod info;
mod ingest;
mod job;
mod list;
mod logging;
mod mount;
mod open;
mod password;
mod pool;
mod print;
mod repair;
mod replicas;
mod repository;
mod restore;
mod serve;
mod signals;
mod store;
mod text;
mod unfinished;
mod unmount;
mod zeroes;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use mount_xofs::Request;
use tracing::Level;

use crate::worker;
use exit::Exit;

const OVERVIEW: &str = "\
REPO is a path, file:///path, a name of the configuration (/etc/xofs/config.toml, ~/.config/xofs/config.toml), a \
single VHD, alias or exploded VHD, or a folder of VHDs; XOFS_REPOSITORY is the default.

The encryption key comes from --password-file, --password-command, XOFS_PASSWORD_FILE, XOFS_PASSWORD_COMMAND, \
XOFS_PASSWORD, the configuration, or is asked for on a terminal. One of the environment is ignored where nothing is \
encrypted.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some of it failed, 4 made, but what expired could not be \
forgotten, 10 no such repository, 11 locked, 12 wrong or missing key, 13 damage found, 32 mount failure, 130 interrupted.

Examples:
  xofs list /srv/backups
  xofs mount /srv/backups /mnt/restore
  xofs export /srv/backups web01/latest/xvda --format qcow2 -o xvda.qcow2
  xofs cp /srv/backups web01/latest/xvda1:/etc/fstab .";

/// Backup repositories of Xen Orchestra, mounted and read
#[derive(Debug, Parser)]
#[command(name = "xofs", version, after_help = OVERVIEW)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The repository, where a command is not given one
    #[arg(short, long, global = true, value_name = "REPO", env = "XOFS_REPOSITORY", hide_env_values = true)]
    repository: Option<OsString>,
    /// File that holds the encryption key
    #[arg(long, global = true, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Command that prints the encryption key
    #[arg(long, global = true, value_name = "COMMAND")]
    password_command: Option<String>,
    /// Whether several repositories are named: then a key that is given is for those that need one and have none of their own.
    #[arg(skip)]
    shares_key: bool,
    /// Logs more; XOFS_LOG says exactly what
    #[arg(short, long, global = true)]
    verbose: bool,
    /// How `--daemon` starts the process that stays.
    #[arg(long, global = true, hide = true)]
    ready_on_stdout: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(mount::MountArgs),
    #[command(visible_alias = "umount")]
    Unmount(unmount::UnmountArgs),
    List(list::ListArgs),
    Info(info::InfoArgs),
    Export(export::ExportArgs),
    Ls(guest::LsArgs),
    Cat(guest::CatArgs),
    Cp(guest::CpArgs),
    Tar(guest::TarArgs),
    Loop(guest::LoopArgs),

    Check(check::CheckArgs),
    Repair(repair::RepairArgs),
    Forget(forget::ForgetArgs),
    Ingest(Box<ingest::IngestArgs>),
    Backup(Box<backup::BackupArgs>),
    Restore(Box<restore::RestoreArgs>),
    Job(job::JobArgs),
    Repository(repository::RepositoryArgs),
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
}

/// Runs `xofs` with the arguments of the process.
#[must_use]
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments == [worker::ARGUMENT] {
        return if worker::run().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let is_command = |word: &str| Cli::command().find_subcommand(word).is_some() || word == "help";
    if Request::is_meant_by(&arguments, is_command) {
        return mount_as_helper(arguments);
    }
    // Ends the process itself for --help, --version and wrong usage (2).
    let cli = Cli::parse();
    let level = match (&cli.command, cli.global.verbose) {
        (_, true) => Level::DEBUG,
        (Command::Mount(_), false) => Level::INFO,
        // That somebody still uses the mount.
        (Command::Unmount(_) | Command::Loop(_), false) => Level::WARN,
        // Problems of a repository are part of what the commands print.
        (_, false) => Level::ERROR,
    };
    logging::start(level, cli.global.ready_on_stdout);
    let global = &cli.global;
    let result = match cli.command {
        Command::Mount(arguments) => mount::run(global, arguments),
        Command::Unmount(arguments) => unmount::run(&arguments),
        Command::List(arguments) => list::run(global, &arguments),
        Command::Info(arguments) => info::run(global, &arguments),
        Command::Export(arguments) => export::run(global, &arguments),
        Command::Ls(arguments) => guest::ls(global, &arguments),
        Command::Cat(arguments) => guest::cat(global, &arguments),
        Command::Cp(arguments) => guest::cp(global, &arguments),
        Command::Tar(arguments) => guest::tar(global, &arguments),
        Command::Loop(arguments) => guest::loop_mount(global, &arguments),
        Command::Check(arguments) => check::run(global, &arguments),
        Command::Repair(arguments) => repair::run(global, &arguments),
        Command::Forget(arguments) => forget::run(global, &arguments),
        Command::Ingest(arguments) => ingest::run(global, &arguments),
        Command::Backup(arguments) => backup::run(global, &arguments),
        Command::Restore(arguments) => restore::run(global, &arguments),
        Command::Job(arguments) => job::run(global, &arguments),
        Command::Repository(arguments) => repository::run(global, &arguments),
        Command::Completions(arguments) => completions::completions(Cli::command(), &arguments),
        Command::Man(arguments) => completions::man(Cli::command(), &arguments),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            report(&format!("{error:#}"));
            exit::of(&error).into()
        }
    }
}

/// Does what `mount.xofs` does, for `xofs REPO DIR -o options`, as `mount -t fuse.xofs` calls it.
fn mount_as_helper(arguments: Vec<OsString>) -> ExitCode {
    let code = Request::parse(arguments).map_err(anyhow::Error::from).and_then(|request| {
        for warning in &request.options.warnings {
            say!("xofs: warning: {warning}");
        }
        if request.is_fake { Ok(0) } else { daemon::start(request.arguments()) }
    });
    match code {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => Exit::Mount.into(),
        Err(error) => {
            report(&format!("{error:#}"));
            Exit::Mount.into()
        }
    }
}

/// Says in one line why it failed.
fn report(message: &str) {
    let line =
        message.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
    say!("xofs: {}", text::Shown(&line));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{}", command.get_name());
        }
    }
}
