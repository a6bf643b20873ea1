//! `xofs completions` and `xofs man`: from the same parser as the commands themselves.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;

use super::exit::Exit;
use super::print;

/// Writes the completions of a shell to standard output
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  xofs completions bash > /usr/share/bash-completion/completions/xofs")]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Writes the manual: one page per command into a folder, or that of xofs to standard output
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  xofs man | man -l -\n  xofs man /usr/share/man/man1")]
pub struct ManArgs {
    /// The folder
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// Runs `xofs completions`.
///
/// # Errors
/// If standard output cannot be written.
pub fn completions(mut command: Command, arguments: &CompletionsArgs) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "xofs", &mut script);
    print::text(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

/// Runs `xofs man`.
///
/// # Errors
/// If a page cannot be written.
pub fn man(mut command: Command, arguments: &ManArgs) -> Result<Exit> {
    command.build();
    match &arguments.folder {
        Some(folder) => write_pages(&command, "", folder)?,
        None => print::text(&String::from_utf8_lossy(&page(&command)?))?,
    }
    Ok(Exit::Done)
}

fn page(command: &Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).context("write a page of the manual")?;
    Ok(page)
}

fn write_pages(command: &Command, parent: &str, folder: &Path) -> Result<()> {
    let name =
        if parent.is_empty() { command.get_name().to_owned() } else { format!("{parent}-{}", command.get_name()) };
    let path = folder.join(format!("{name}.1"));
    std::fs::write(&path, page(command)?).with_context(|| format!("write '{}'", path.display()))?;
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
        write_pages(sub, &name, folder)?;
    }
    Ok(())
}
