//! `xofs cat`: the bytes of guests' files on standard output.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Args;

use super::find::Files;
use super::path::{GuestPath, split_names};
use super::{Failures, content};
use crate::cli::Global;
use crate::cli::exit::{Exit, Failure};
use crate::cli::zeroes::zeroes;

const EXAMPLES: &str = "\
WHAT is VM/BACKUP/VOLUME:/path. Symbolic links are followed as in the guest, and never lead out of the volume.

Examples:
  xofs cat /srv/backups web01/latest/xvda1:/etc/fstab
  xofs cat main web01/2026-11-20/vg0-var:log/syslog | less

Ends with 3 if one of several files could not be read.";

/// Writes files of a guest to standard output
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs cat [OPTIONS] [REPO] <WHAT>...")]
pub struct CatArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and files in it
    #[arg(num_args = 1.., required = true, value_names = ["REPO", "WHAT"])]
    names: Vec<OsString>,
}

/// Runs the command.
///
/// # Errors
/// If the one file that was named cannot be read, or standard output not be written.
pub fn run(global: &Global, arguments: &CatArgs) -> Result<Exit> {
    let (address, names) = split_names(global, &arguments.names);
    if names.is_empty() {
        return Err(Failure::usage("no file is named: give VM/BACKUP/VOLUME:/path after the repository").into());
    }
    let paths = names.iter().map(|name| GuestPath::parse(name)).collect::<Result<Vec<_>>>()?;
    let files = Files::open(global, address)?;
    // Not through the standard library, which would search every byte for line ends.
    let mut output = Output { stdout: File::from(rustix::io::dup(io::stdout()).context("open standard output")?) };
    let mut failures = Failures::default();
    for path in &paths {
        failures.count(cat(&files, path, &mut output));
    }
    failures.end()
}

fn cat(files: &Files, path: &GuestPath, output: &mut Output) -> Result<()> {
    let found = files.find(path, true)?;
    let place = || found.place(b"");
    let file = content::open(&files.tree, &found.attributes).with_context(place)?;
    let mut end = 0;
    content::read(&file, |offset, bytes| {
        output.zeroes(offset - end)?;
        output.write(bytes)?;
        end = offset + bytes.len() as u64;
        Ok(())
    })
    .with_context(place)?;
    output.zeroes(file.size() - end)
}

struct Output {
    stdout: File,
}

impl Output {
    /// Writes bytes. A reader that went away (`xofs cat ... | head`) is no failure of ours: the process ends.
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self.stdout.write_all(bytes) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            written => written
                .map_err(|error| Failure::new(Exit::Failed, error.to_string()))
                .context("write to standard output"),
        }
    }

    fn zeroes(&mut self, len: u64) -> Result<()> {
        zeroes(len).try_for_each(|piece| self.write(piece))
    }
}
