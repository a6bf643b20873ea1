//! `xofs repository`: what concerns a repository as a whole; so far, making one.

use std::ffi::OsString;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::json;

use super::exit::Exit;
use super::text::Shown;
use super::{Global, open, print};

const EXAMPLES: &str = "\
Examples:
  xofs repository init /srv/backups
  xofs repository init /srv/backups --encrypted --password-file /etc/xofs/main.key";

const INIT_EXAMPLES: &str = "\
The place must be empty; a folder that is missing is made. Where it is encrypted, the key is taken as by all commands: 32 \
characters, from --password-file, --password-command, XOFS_PASSWORD_FILE, XOFS_PASSWORD_COMMAND, XOFS_PASSWORD, the \
configuration, or asked for on a terminal. Keep it: without it, nothing can be read again.

Examples:
  xofs repository init /srv/backups
  openssl rand -hex 16 > main.key && xofs repository init /srv/backups --encrypted --password-file main.key";

/// Makes repositories
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RepositoryArgs {
    #[command(subcommand)]
    command: RepositoryCommand,
}

#[derive(Debug, Subcommand)]
enum RepositoryCommand {
    Init(InitArgs),
}

/// Makes an empty repository, which Xen Orchestra can use too
#[derive(Debug, Args)]
#[command(after_help = INIT_EXAMPLES)]
struct InitArgs {
    /// Where: a path, file:///path, or a name of the configuration [default: XOFS_REPOSITORY]
    #[arg(value_name = "REPO")]
    address: Option<OsString>,
    /// Encrypts all that will be written to it
    #[arg(long)]
    encrypted: bool,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If the place is not empty, the key cannot be had, or nothing can be written there.
pub fn run(global: &Global, arguments: &RepositoryArgs) -> Result<Exit> {
    match &arguments.command {
        RepositoryCommand::Init(arguments) => init(global, arguments),
    }
}

fn init(global: &Global, arguments: &InitArgs) -> Result<Exit> {
    let place = open::place(global, arguments.address.as_deref())?;
    open::initialize(global, &place, arguments.encrypted)?;
    if arguments.json {
        print::json(&json!({
            "repository": place.name,
            "path": place.path.to_string_lossy(),
            "isEncrypted": arguments.encrypted,
        }))?;
        return Ok(Exit::Done);
    }
    let (kind, rest) = if arguments.encrypted {
        (
            "encrypted repository",
            ", with the same key and 'Store backup as multiple data blocks'. Keep the key in a safe place",
        )
    } else {
        ("repository", "")
    };
    print::text(&format!(
        "{}: an empty {kind} was made. Next: 'xofs ingest' writes backups to it; in Xen Orchestra, add it as a backup \
         repository{rest}.\n",
        Shown(&place.name)
    ))?;
    Ok(Exit::Done)
}
