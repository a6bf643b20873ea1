//! `xofs export`: one disk as a raw, VHD or qcow2 image.
//!
//! ```text
//! Disk ─► raw: itself │ VhdView │ Qcow2View      all of them disks
//!            └─► ahead (several readers) ─► output (file, device, stream)
//! ```

pub mod output;
pub mod progress;
mod qcow2;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use disk::Disk;
use uuid::Uuid;

use super::exit::{Exit, Failure};
use super::text::Shown;
use super::{Global, open};
use crate::ahead;
use crate::repository::{Backup, BackupDisk, Repository, Selection, Vm};
use output::{Leftover, Output};
use progress::Progress;
use qcow2::Qcow2View;

const EXAMPLES: &str = "\
WHAT is VM/BACKUP/DISK: VM by name or by uuid or its first characters; BACKUP is latest, latest~2, or a time or its \
beginning (2026-11); DISK as it is named in the mount. The disk may be left out if there is only one.

Examples:
  xofs export /srv/backups web01/latest/xvda -o xvda.raw
  xofs export main web01/2026-11/xvda --format qcow2 -o xvda.qcow2
  xofs export /srv/backups/disk.vhd -o - | ssh host 'cat > /dev/vg0/restored'";

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The bytes of the disk, sparse in a file
    Raw,
    /// A dynamic VHD, complete without a parent; up to 2040 GiB
    Vhd,
    /// A qcow2 image, version 3, not compressed
    Qcow2,
}

/// Writes a disk as an image: raw, VHD or qcow2
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs export [OPTIONS] --output <FILE> [REPO] [WHAT]")]
pub struct ExportArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and the disk in it
    #[arg(num_args = 1..=2, required = true, value_names = ["REPO", "WHAT"])]
    names: Vec<OsString>,
    /// A new file, a pipe, a device, or - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Format of the image
    #[arg(short, long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long)]
    progress: bool,
    /// Replaces an existing file, or overwrites a device
    #[arg(long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the image from being complete; then no file is left.
pub fn run(global: &Global, arguments: &ExportArgs) -> Result<Exit> {
    let leftover = Leftover::default();
    leftover.watch_signals().context("take over the signals")?;
    let (address, what) = open::split_names(global, &arguments.names);
    let place = open::place(global, address)?;
    let repository = open::repository(global, &place, open::SMALL_CACHE)?;
    let source = find(&repository, &open::text_of(what)?)?;
    let name = source.name.clone();
    export(source, arguments, &leftover).with_context(|| format!("export {}", Shown(&name)))?;
    Ok(Exit::Done)
}

fn export(source: Source, arguments: &ExportArgs, leftover: &Leftover) -> Result<()> {
    let image: Arc<dyn Disk> = match arguments.format {
        Format::Raw => source.disk,
        Format::Vhd => Arc::new(vhd::VhdView::new(source.disk, source.uuid, source.timestamp)?),
        Format::Qcow2 => Arc::new(Qcow2View::new(source.disk)?),
    };
    let mut output = Output::open(&arguments.output, image.size(), arguments.force, leftover)?;
    let is_stdout = arguments.output.as_os_str() == "-";
    let shown = if is_stdout { "standard output".to_owned() } else { format!("'{}'", arguments.output.display()) };
    // What is written: all of it, or what is not a hole.
    let total = if output.has_holes() { image.allocated()? } else { image.size() };
    let mut progress = Progress::new("export", total, arguments.progress);
    let mut written = 0;
    let ranges = disk::data_ranges(image.as_ref());
    ahead::read::<anyhow::Error>(&image, ranges, None, |offset, bytes, times| {
        let len = u64::try_from(bytes.len()).expect("a usize has at most 64 bits");
        output
            .zero(written, offset - written)
            .and_then(|()| output.write(offset, bytes))
            .with_context(|| format!("write {shown}"))?;
        let gap = if output.has_holes() { 0 } else { offset - written };
        progress.advance(gap + len, times);
        written = offset + len;
        Ok(())
    })?;
    output.zero(written, image.size() - written).with_context(|| format!("write {shown}"))?;
    output.finish()
}

/// The disk to be exported.
struct Source {
    disk: Arc<dyn Disk>,
    name: String,
    /// Of the new VHD: the same for the same disk.
    uuid: Uuid,
    /// Of the new VHD: seconds since 2000, as the VHD specification counts.
    timestamp: u32,
}

/// Seconds from 1970 to 2000 (VHD specification 1.0, "Time Stamp").
const VHD_EPOCH: i64 = 946_684_800;

fn find(repository: &Repository, what: &str) -> Result<Source> {
    match repository.select(what)? {
        Selection::Vm(vm) => Err(Failure::usage(format!(
            "'{}' is a VM: name a disk of a backup of it, as in '{}/latest/xvda'",
            Shown(what),
            Shown(&vm.name)
        ))
        .into()),
        Selection::Backup(vm, backup) => {
            let [disk] = backup.disks.as_slice() else {
                if let (true, Some(problem)) = (backup.disks.is_empty(), &backup.problem) {
                    return Err(anyhow::anyhow!("'{}' has no disk that can be read: {problem}", Shown(what)));
                }
                let names = backup.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
                return Err(Failure::usage(format!(
                    "'{}' has {} disks: name one of them{}{}",
                    Shown(what),
                    backup.disks.len(),
                    if names.is_empty() { "" } else { ": " },
                    Shown(&names),
                ))
                .into());
            };
            of_backup(repository, &vm, &backup, disk)
        }
        Selection::Disk(vm, backup, disk) => of_backup(repository, &vm, &backup, &disk),
        Selection::Loose(loose) => {
            let layers = repository.loose_chain(&loose).unwrap_or_default();
            let uuid = layers.first().map_or(Uuid::nil(), |leaf| leaf.uuid);
            let disk = repository.open_loose(&loose)?;
            Ok(Source {
                disk,
                name: loose.name.clone(),
                uuid,
                timestamp: layers.first().map_or(0, |leaf| leaf.timestamp),
            })
        }
    }
}

fn of_backup(repository: &Repository, vm: &Vm, backup: &Backup, disk: &BackupDisk) -> Result<Source> {
    let vm = if vm.name.is_empty() { vm.id.as_str() } else { &vm.name };
    let name = format!("{vm}/{}/{}", backup.time, disk.name);
    let opened = repository.open_disk(backup, disk).with_context(|| format!("open {}", Shown(&name)))?;
    let leaf = repository.chain(backup, disk).ok().and_then(|layers| layers.first().map(|leaf| leaf.uuid));
    let timestamp = u32::try_from(backup.time.unix() - VHD_EPOCH).unwrap_or(0);
    Ok(Source { disk: opened, name, uuid: leaf.or(disk.vdi).unwrap_or_else(Uuid::nil), timestamp })
}
