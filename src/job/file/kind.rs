//! What a job makes of each machine: increments of its disks, or one XVA.

use vhd::Filter;
use xapi::Budget;

use crate::ingest::Layout;
use crate::job::table::{Placed, Section};
use crate::pool::USUAL_CONNECTIONS;

/// What is made of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Its disks, as chains.
    Incremental(Incremental),
    /// One XVA.
    Full(Full),
}

/// How increments are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incremental {
    /// So many backups, from one key to the next; `None` for no end.
    pub key_every: Option<u32>,
    /// How disks are stored, where it is said.
    pub layout: Option<Layout>,
    /// Connections to read a disk by NBD over, if its hosts have so many to spare; `None` not to use NBD.
    pub nbd_connections: Option<u32>,
    /// Whether changed block tracking is switched on.
    pub tracks_changes: bool,
    /// Whether the data of a kept snapshot is destroyed.
    pub purges_data: bool,
    /// Whether a snapshot is kept for the next increment.
    pub keeps_base: bool,
}

/// How XVAs are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// How the pool compresses them.
    pub compression: xapi::Compression,
}

impl Default for Incremental {
    fn default() -> Self {
        Self {
            key_every: None,
            layout: None,
            nbd_connections: Some(USUAL_CONNECTIONS.into()),
            tracks_changes: false,
            purges_data: false,
            keeps_base: true,
        }
    }
}

impl Default for Full {
    fn default() -> Self {
        Self { compression: xapi::Compression::Zstd }
    }
}

/// Reads `mode`, and the table of that.
pub(super) fn kind(root: &Section) -> Kind {
    let is_full = root.choice("mode", &[("incremental", false), ("full", true)]).is_some_and(|mode| mode.value);
    let incremental = root.section("incremental");
    let full = root.section("full");
    for (section, other) in
        [(incremental.as_ref().filter(|_| is_full), "full"), (full.as_ref().filter(|_| !is_full), "incremental")]
    {
        if let Some(section) = section.filter(|_| !root.is_wrong("mode")) {
            section.note(format!("the job has mode = \"{other}\", to which this does not apply"));
        }
    }
    let incremental = incremental.map_or_else(Incremental::default, of_incremental);
    let full = full.map_or_else(Full::default, of_full);
    if is_full { Kind::Full(full) } else { Kind::Incremental(incremental) }
}

fn of_incremental(section: Section) -> Incremental {
    let usual = Incremental::default();
    let is_file = section.choice("format", &[("exploded", false), ("vhd", true)]).map(|format| format.value);
    let compressions = [("none", Filter::None), ("gzip", Filter::Gzip), ("brotli", Filter::Brotli)];
    let compression = section.choice("compression", &compressions);
    let layout = match (is_file, compression) {
        (Some(true), Some(Placed { value: Filter::Gzip | Filter::Brotli, span })) => {
            section.note_at(&span, "a VHD file is not compressed: leave compression out, or use format = \"exploded\"");
            None
        }
        (Some(true), _) => Some(Layout::File),
        (Some(false), compression) => Some(Layout::Exploded(compression.map(|found| found.value))),
        (None, compression) => compression.map(|found| Layout::Exploded(Some(found.value))),
    };
    let (nbd, connections) = (section.flag("nbd"), section.number("nbd_connections", 1..=Budget::MOST.into()));
    if nbd == Some(false) && connections.is_some() {
        section.note("nbd_connections are of no use with nbd = false: leave one of them out");
    }
    let incremental = Incremental {
        key_every: section.number("key_every", 1..=10_000),
        layout,
        nbd_connections: connections.or(usual.nbd_connections).filter(|_| nbd != Some(false)),
        tracks_changes: section.flag("cbt").unwrap_or(usual.tracks_changes),
        purges_data: section.flag("purge_snapshot_data").unwrap_or(usual.purges_data),
        keeps_base: section.flag("keep_snapshot").unwrap_or(usual.keeps_base),
    };
    if incremental.purges_data && !(incremental.tracks_changes && incremental.keeps_base) {
        section.note_by(&["cbt", "keep_snapshot"], "purge_snapshot_data needs cbt = true, and a snapshot that is kept");
    }
    section.finish();
    incremental
}

fn of_full(section: Section) -> Full {
    let choices =
        [("none", xapi::Compression::None), ("gzip", xapi::Compression::Gzip), ("zstd", xapi::Compression::Zstd)];
    let compression = section.choice("compression", &choices).map(|found| found.value);
    section.finish();
    Full { compression: compression.unwrap_or(Full::default().compression) }
}
