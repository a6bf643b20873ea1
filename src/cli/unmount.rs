//! `xofs unmount`: ends a mount, also one whose process died.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use crate::mount;

/// Unmounts a repository, waits until it is gone, and cleans what a dead process left
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  xofs unmount /mnt/restore")]
pub struct UnmountArgs {
    /// The folder it is mounted at
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// If nothing of ours is mounted there, or the system refuses.
pub fn run(arguments: &UnmountArgs) -> Result<Exit> {
    mount::unmount(&arguments.directory)?;
    Ok(Exit::Done)
}
