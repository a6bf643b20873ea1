//! New backups out of disk images, in one pass to one or several repositories.
//!
//! ```text
//! wanted ─► run ─► target   one destination: lock, what a dead run left, commit       ─► intent
//!               ─► plan     a key or an increment of each disk, and in which layout
//!               ─► room     whether it fits, before anything is written
//!               ─► copy     one pass over a disk: read, compare, encode, write        ◄─ source, changes; probe, watch
//!               ─► full     one pass over the XVA of a full backup that is mirrored   ─► archive
//!     source ─► qemu ─► nbd   images that are neither raw nor VHD
//!               ─► record   the metadata of the backup, or mirror that of another repository
//!               ─► report
//! ```
//!
//! Invariants: a backup is there as a whole or not at all, whenever the program ends; nothing that was there before is changed or
//! removed; memory is bounded (`copy`). A destination that fails is given up, and the others go on.

mod archive;
mod block;
mod changes;
mod copy;
mod error;
mod feed;
mod full;
mod intake;
mod intent;
mod mirror;
mod nbd;
mod origin;
mod pass;
mod plan;
mod pool;
mod pool_record;
mod probe;
mod qemu;
mod record;
mod report;
mod room;
mod run;
mod source;
mod target;
mod wanted;
mod watch;
mod xva_source;

pub use changes::{Changes, PieceSet};
pub use error::{Error, ErrorKind, Result};
pub use nbd::NbdDisk;
pub use origin::Origin;
pub use pool::{Access, Bases, Blocks, Export, Opened, PoolDisk, PoolVm};
pub use pool_record::{PoolRecords, PoolVdi, PoolVif};
pub use probe::{Probe, Reading};
pub use report::{Outcome, Pass, ReadDisk, Report, Stored, StoredDisk, StoredXva};
pub use run::{Begun, begin, run};
pub use source::{ImageOptions, RawFile, Source};
pub use wanted::{Destination, Extent, JOB, Layout, SCHEDULE, Wanted};
pub use watch::Watch;
