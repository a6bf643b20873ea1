//! What the commands share that write backups: options, destinations, what is said meanwhile and afterwards.

mod progress;
mod report;
mod retention;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use vhd::Filter;

use super::config::Entry;
use super::exit::Failure;
use super::forget::RetentionArgs;
use super::{Global, open};
use crate::ingest::{Destination, Extent, Layout, RepositoryDestination, Reserve};
use crate::repository::Rules;
use crate::size::parse_size;

pub use progress::with_progress;
pub use report::{exit, reads_to_text, say_failures, to_json, to_text};
pub use retention::Retention;

/// Formats of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A file for each block of 2 MiB
    Exploded,
    /// One VHD file for each disk
    Vhd,
}

/// Compressions of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compression {
    None,
    Gzip,
    Brotli,
}

/// How backups are written, and what is said of it.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Stores all blocks, not only those that changed
    #[arg(long, conflicts_with = "incremental")]
    full: bool,
    /// Fails where blocks that did not change would have to be stored
    #[arg(long)]
    incremental: bool,
    /// How disks are stored [default: as the newest backup, else exploded]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// How blocks of an exploded disk are compressed [default: as the newest backup, else brotli]
    #[arg(long, value_enum)]
    compression: Option<Compression>,
    /// The id of the job it belongs to [default: one of xofs]
    #[arg(long, value_name = "ID")]
    pub job: Option<String>,
    /// The id of its schedule [default: as the newest backup of the job, else one of xofs]
    #[arg(long, value_name = "ID")]
    pub schedule: Option<String>,
    /// How long to wait for another program that works on the VM, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
    /// How much is left free in each repository [default: 5 % of what is free, at most 1 GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    reserve: Option<u64>,
    /// What all files of each repository may have together [default: what the configuration says of it]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    quota: Option<u64>,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long)]
    pub progress: bool,
    /// Writes JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten, next_help_heading = "Retention, after the backup was made")]
    pub retention: RetentionArgs,
}

impl StoreArgs {
    /// Returns which blocks are stored, where it is said.
    pub fn extent(&self) -> Option<Extent> {
        match (self.full, self.incremental) {
            (true, _) => Some(Extent::Full),
            (_, true) => Some(Extent::Incremental),
            _ => None,
        }
    }

    /// Returns what is left free.
    pub fn reserve(&self) -> Reserve {
        Reserve { bytes: self.reserve, is_option: true }
    }

    /// Returns how long another program is waited for that works on the VM.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.wait)
    }

    /// Returns how disks are stored, where it is said.
    ///
    /// # Errors
    /// `Usage` if a VHD file is to be compressed.
    pub fn layout(&self) -> Result<Option<Layout>> {
        let filter = self.compression.map(|compression| match compression {
            Compression::None => Filter::None,
            Compression::Gzip => Filter::Gzip,
            Compression::Brotli => Filter::Brotli,
        });
        Ok(match (self.format, filter) {
            (None, None) => None,
            (Some(Format::Vhd), None | Some(Filter::None)) => Some(Layout::File),
            (Some(Format::Vhd), Some(_)) => {
                let message = "a VHD file is not compressed: leave --compression out, or use --format exploded";
                return Err(Failure::usage(message).into());
            }
            (Some(Format::Exploded) | None, filter) => Some(Layout::Exploded(filter)),
        })
    }

    /// Reads the rules of retention, where any are given.
    ///
    /// # Errors
    /// `Usage` if they keep nothing.
    pub fn rules(&self) -> Result<Option<Rules>> {
        Ok(if self.retention.is_given() { Some(self.retention.rules()?.0) } else { None })
    }

    /// As [`destinations`], with the quota that is given.
    ///
    /// # Errors
    /// As [`destinations`].
    pub fn destinations(
        &self,
        global: &Global,
        addresses: &[Option<&OsStr>],
        source: Option<&OsStr>,
    ) -> Result<Vec<Destination>> {
        destinations(global, addresses, source, self.quota)
    }
}

/// Opens the repositories that are written to, the default one where none is named; `source` is read meanwhile. `quota` is said of
/// each, whatever the configuration says.
///
/// # Errors
/// `Usage` if one is named twice; what keeps one from being opened.
pub fn destinations(
    global: &Global,
    addresses: &[Option<&OsStr>],
    source: Option<&OsStr>,
    quota: Option<u64>,
) -> Result<Vec<Destination>> {
    let mut known = BTreeSet::new();
    if let Some(source) = source {
        known.extend(open::place(global, Some(source))?.path.canonicalize());
    }
    let mut destinations = Vec::with_capacity(addresses.len());
    for address in addresses {
        let place = open::place(global, *address)?;
        if !known.insert(place.path.canonicalize().unwrap_or_else(|_| place.path.clone())) {
            return Err(Failure::usage(format!("the repository '{}' is named twice", place.name)).into());
        }
        let (repository, storage) = open::both(global, &place, open::SMALL_CACHE)?;
        let of_entry = place.entry.as_ref().map_or(Ok(None), Entry::quota)?;
        let (name, quota) = (place.name.clone(), quota.or(of_entry));
        destinations.push(Destination::Repository(RepositoryDestination { name, repository, storage, quota }));
    }
    Ok(destinations)
}
