//! How the disk of a snapshot is read: the first way that works, and why not those before it.
//!
//! | way | what is read of an increment | of a whole disk |
//! |---|---|---|
//! | files of the SR | blocks that come from another file than in the base | blocks that are there |
//! | NBD, changed block tracking | 64 KiB pieces that were written since the base | |
//! | NBD, the block list of an export | blocks that the export would send | blocks that are there |
//! | VHD stream | the same, in one stream | the same |
//!
//! An export of which only the list is wanted is broken off after it. Files that fail while they are read, as when the host
//! coalesces, are followed by NBD at the same place. What fails relative to a base is tried as a whole, in the
//! same run. A way that failed is not used again for the same disk but the last one, which
//! may have failed only because of the base.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use disk::Disk;
use uuid::Uuid;
use vhd::{StreamError, StreamReader};
use xapi::record::Vdi;
use xapi::{Changes, Export, ExportOptions, Format, NbdOptions, Pool, Record};

use super::base::Base;
use super::error::{Error, ErrorKind as PoolErrorKind};
use super::file_sr::{Expected, Image};
use super::limits::{Pace, PacedDisk, Transfer};
use super::nbd::{ElseDisk, NbdDisk};
use crate::ingest::{self, Access, Blocks, ErrorKind, Opened, PieceSet, PoolDisk, Turn};
use crate::probe::{self, Connections, Subject};

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;

/// A way to read a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// The files of its SR.
    Files,
    /// NBD, with what changed block tracking says.
    ChangedBlocks,
    /// NBD, with the blocks that an export of VHD lists.
    BlockList,
    /// A stream of VHD.
    Stream,
}

impl Way {
    /// In the order in which they are tried.
    pub const ALL: [Self; 4] = [Self::Files, Self::ChangedBlocks, Self::BlockList, Self::Stream];

    /// Returns its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Files => "files of the SR",
            Self::ChangedBlocks => "NBD + CBT",
            Self::BlockList => "NBD + block list",
            Self::Stream => "VHD stream",
        }
    }
}

/// The disk of a snapshot.
pub struct SnapshotDisk {
    /// The pool, whose token stops what waits.
    pub pool: Pool,
    /// The snapshot's disk.
    pub vdi: Record<Vdi>,
    /// What it is read relative to.
    pub base: Base,
    /// The snapshots of the same disk whose order is known, oldest first.
    pub history: Vec<Uuid>,
    /// The base's disk.
    pub base_vdi: Option<Record<Vdi>>,
    /// The folder of its SR on this machine.
    pub folder: Option<PathBuf>,
    /// The host that it is read from, or its SR if several hosts have that.
    pub source: Subject,
    /// How it is read by NBD, if that may be used.
    pub nbd: Option<NbdOptions>,
    /// What waits for its turn.
    pub transfer: Transfer,
    /// What slows it down.
    pub pace: Option<Arc<Pace>>,
    /// What is known of the ways.
    pub known: Known,
}

/// What was found out about the ways to one disk.
#[derive(Default)]
pub struct Known(Mutex<Tried>);

#[derive(Default)]
struct Tried {
    /// Why ways are not used.
    refused: BTreeMap<Way, String>,
    last: Option<Way>,
}

impl Known {
    /// Returns the way that was used last.
    #[must_use]
    pub fn last(&self) -> Option<Way> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last
    }

    fn refused(&self) -> BTreeMap<Way, String> {
        let mut tried = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = tried.last.take().filter(|last| *last != Way::Stream) {
            tried.refused.insert(last, "it failed before".to_owned());
        }
        tried.refused.clone()
    }

    fn use_way(&self, way: Way) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last = Some(way);
    }
}

impl PoolDisk for SnapshotDisk {
    fn size(&self) -> u64 {
        self.vdi.virtual_size
    }

    fn source(&self) -> Subject {
        self.source.clone()
    }

    fn history(&self) -> &[Uuid] {
        &self.history
    }

    fn turn(&self, say: &dyn Fn(&str)) -> ingest::Result<Turn> {
        Ok(Box::new(self.transfer.turn(say).map_err(of_limits)?))
    }

    fn open(&self, base: Option<Uuid>) -> ingest::Result<Opened> {
        let open = Connections::default();
        let mut refused = self.known.refused();
        if base.is_some() && base != self.base.snapshot() {
            let why = match &self.base {
                Base::Whole(why) | Base::Key(why) => why.as_str(),
                Base::Snapshot { .. } => "the repositories' newest backup is of another snapshot",
            };
            return Err(ingest::Error::new(ErrorKind::Difference, why));
        }
        let base = self.base_vdi.as_ref().filter(|_| base.is_some());
        for way in Way::ALL {
            if refused.contains_key(&way) {
                continue;
            }
            match self.open_by(way, base, &open) {
                Ok(access) => {
                    self.known.use_way(way);
                    let by = match way {
                        Way::Files => probe::Way::Files,
                        Way::ChangedBlocks | Way::BlockList => {
                            let wanted = self.nbd.as_ref().map_or(1, |options| options.connections);
                            probe::Way::Nbd { wanted, open }
                        }
                        Way::Stream => probe::Way::Stream,
                    };
                    return Ok(Opened { way: describe(way, &refused), by, access: self.paced(access) });
                }
                Err(Refusal::Stop) => return Err(ingest::Error::new(ErrorKind::Interrupted, "interrupted")),
                Err(Refusal::Because(why)) => {
                    tracing::info!(disk = %self.vdi.uuid, way = way.name(), why, "is not used");
                    refused.insert(way, why);
                }
                Err(Refusal::NotMeant) => {}
            }
        }
        let kind = if base.is_some() { ErrorKind::Difference } else { ErrorKind::Source };
        let reasons: Vec<String> = refused.iter().map(|(way, why)| format!("{}: {why}", way.name())).collect();
        Err(ingest::Error::new(kind, format!("the disk can be read in no way ({})", reasons.join("; "))))
    }
}

/// Why a way is not used.
enum Refusal {
    /// It is not for this.
    NotMeant,
    Because(String),
    Stop,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMeant => f.write_str("it is not for this"),
            Self::Because(why) => f.write_str(why),
            Self::Stop => f.write_str("interrupted"),
        }
    }
}

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self::Because(why)
    }
}

impl From<xapi::Error> for Refusal {
    fn from(error: xapi::Error) -> Self {
        if error.kind() == xapi::ErrorKind::Cancelled { Self::Stop } else { Self::Because(error.to_string()) }
    }
}

impl From<StreamError> for Refusal {
    fn from(error: StreamError) -> Self {
        Self::Because(error.to_string())
    }
}

impl SnapshotDisk {
    /// Slows down what is read, if it is to be.
    fn paced(&self, access: Access) -> Access {
        match access {
            Access::Random { disk, changed } => {
                Access::Random { disk: PacedDisk::of(disk, self.pace.clone()), changed }
            }
            sequential @ Access::Sequential { .. } => sequential,
        }
    }

    /// Opens it in some way; how many connections it has is told by `open`, if it is by NBD.
    fn open_by(&self, way: Way, base: Option<&Record<Vdi>>, open: &Connections) -> Result<Access, Refusal> {
        let has_data = matches!(self.base, Base::Snapshot { has_data: true, .. });
        if way != Way::ChangedBlocks && base.is_some() && !has_data {
            return Err(Refusal::Because("the snapshot before has no data any more".to_owned()));
        }
        match way {
            Way::Files => self.open_files(base),
            Way::ChangedBlocks => self.open_changed(base, open),
            Way::BlockList => self.open_listed(base, open),
            Way::Stream => self.open_stream(base),
        }
    }

    fn open_files(&self, base: Option<&Record<Vdi>>) -> Result<Access, Refusal> {
        let folder = self.folder.as_deref().ok_or(Refusal::NotMeant)?;
        let expected = |vdi: &Vdi| Expected {
            uuid: vdi.uuid.clone(),
            size: vdi.virtual_size,
            parent: vdi.parent().map(str::to_owned),
        };
        // Asked anew: the host may have coalesced since.
        let now: Record<Vdi> = self.pool.record(&self.vdi.reference)?;
        let image = Image::open(folder, &expected(&now))?;
        let changed = match base {
            None => None,
            Some(base) => {
                let base: Record<Vdi> = self.pool.record(&base.reference)?;
                let base = Image::open(folder, &expected(&base))?;
                Some(image.changed_since(&base)?)
            }
        };
        let disk = match self.nbd.clone() {
            None => image.disk(),
            Some(options) => {
                let (pool, vdi) = (self.pool.clone(), self.vdi.clone());
                let open = move || -> Result<Arc<dyn Disk>, String> {
                    let open = Connections::default();
                    Ok(Arc::new(connect(&pool, &vdi, options.clone(), &open).map_err(|refusal| refusal.to_string())?))
                };
                Arc::new(ElseDisk::new(image.disk(), Box::new(open)))
            }
        };
        Ok(Access::Random { disk, changed })
    }

    fn open_changed(&self, base: Option<&Record<Vdi>>, open: &Connections) -> Result<Access, Refusal> {
        let (Some(base), Some(options)) = (base, self.nbd.clone()) else { return Err(Refusal::NotMeant) };
        let size = self.vdi.virtual_size;
        let known = match self.pool.changed_blocks(&base.reference, &self.vdi.reference, size)? {
            Changes::Known(known) => known,
            Changes::Unknown(why) => return Err(Refusal::Because(why)),
        };
        let mut changed = PieceSet::new(size).ok_or_else(|| too_large(size))?;
        known.runs().for_each(|run| changed.insert(run.start, run.end - run.start));
        // What a disk grew by is new, whatever was tracked of it.
        changed.insert(base.virtual_size.min(size), size.saturating_sub(base.virtual_size));
        let disk = connect(&self.pool, &self.vdi, options, open)?;
        Ok(Access::Random { disk: Arc::new(disk), changed: Some(changed) })
    }

    fn open_listed(&self, base: Option<&Record<Vdi>>, open: &Connections) -> Result<Access, Refusal> {
        let options = self.nbd.clone().ok_or(Refusal::NotMeant)?;
        let size = self.vdi.virtual_size;
        // Asked first: without a network for it no export has to be begun.
        let export = self.pool.nbd(&self.vdi.reference, options)?;
        let stream = self.export(base)?;
        let listed: BTreeSet<u64> = stream.blocks().map(|(block, _)| u64::from(block.0)).collect();
        stream.into_source().abandon()?;
        if base.is_none() {
            let disk = NbdDisk::new(export, size, Some(listed), open)?;
            return Ok(Access::Random { disk: Arc::new(disk), changed: None });
        }
        let mut changed = PieceSet::new(size).ok_or_else(|| too_large(size))?;
        listed.iter().for_each(|block| changed.insert(block * BLOCK, BLOCK));
        Ok(Access::Random { disk: Arc::new(NbdDisk::new(export, size, None, open)?), changed: Some(changed) })
    }

    fn open_stream(&self, base: Option<&Record<Vdi>>) -> Result<Access, Refusal> {
        let stream = self.export(base)?;
        let listed = stream.blocks().map(|(block, _)| block.0).collect();
        let since = base.and_then(|_| self.base.snapshot());
        let blocks = Box::new(StreamBlocks { stream, listed, pace: self.pace.clone() });
        Ok(Access::Sequential { blocks, since })
    }

    /// Begins an export, and reads the list of its blocks.
    fn export(&self, base: Option<&Record<Vdi>>) -> Result<StreamReader<Export>, Refusal> {
        let export = self.pool.export_vdi(&ExportOptions {
            vdi: self.vdi.reference.clone(),
            base: base.map(|base| base.reference.clone()),
            format: Format::Vhd,
        })?;
        let stream = StreamReader::open(export)?;
        // The size of a stream may be rounded up to whole blocks, and is never less.
        if stream.virtual_size() < self.vdi.virtual_size || stream.virtual_size() >= self.vdi.virtual_size + BLOCK {
            let (found, expected) = (stream.virtual_size(), self.vdi.virtual_size);
            return Err(Refusal::Because(format!(
                "the export is of a disk of {found} bytes, {expected} were expected"
            )));
        }
        if stream.is_differencing() != base.is_some() {
            return Err(Refusal::Because(
                "the export is not what was asked for, a difference or a whole disk".to_owned(),
            ));
        }
        Ok(stream)
    }
}

/// Opens a disk by NBD.
fn connect(pool: &Pool, vdi: &Record<Vdi>, options: NbdOptions, open: &Connections) -> Result<NbdDisk, Refusal> {
    Ok(NbdDisk::new(pool.nbd(&vdi.reference, options)?, vdi.virtual_size, None, open)?)
}

fn too_large(size: u64) -> String {
    format!("no backup has a disk of {size} bytes")
}

/// Says how a disk is read, and why not better.
fn describe(way: Way, refused: &BTreeMap<Way, String>) -> String {
    let reasons: Vec<String> = refused.iter().map(|(way, why)| format!("not {}: {why}", way.name())).collect();
    if reasons.is_empty() { way.name().to_owned() } else { format!("{} ({})", way.name(), reasons.join("; ")) }
}

/// Makes the error of a disk whose turn does not come.
pub fn of_limits(error: Error) -> ingest::Error {
    let kind = match error.kind() {
        PoolErrorKind::Interrupted => ErrorKind::Interrupted,
        _ => ErrorKind::Source,
    };
    ingest::Error::new(kind, error.to_string())
}

/// The blocks of a stream of VHD.
struct StreamBlocks {
    stream: StreamReader<Export>,
    listed: Vec<u32>,
    pace: Option<Arc<Pace>>,
}

impl Blocks for StreamBlocks {
    fn listed(&self) -> &[u32] {
        &self.listed
    }

    fn read(&mut self, buffer: &mut [u8]) -> ingest::Result<Option<u32>> {
        let block = self.stream.next_block(buffer);
        let broke = |error| ingest::Error::new(ErrorKind::Broken, format!("the export broke: {error}"));
        let block = block.map_err(broke)?;
        if let Some(pace) = self.pace.as_ref().filter(|_| block.is_some()) {
            pace.wait(BLOCK).map_err(of_limits)?;
        }
        Ok(block.map(|block| block.0))
    }

    fn finish(self: Box<Self>) -> ingest::Result<()> {
        let concluded = self.stream.into_source().conclude();
        concluded.map_err(|error| ingest::Error::new(ErrorKind::Broken, format!("the export did not succeed: {error}")))
    }
}
