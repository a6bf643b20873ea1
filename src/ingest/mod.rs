//! New backups out of disk images, of other repositories and of pools, in one pass to one or several repositories and
//! replicas.
//!
//! ```text
//! wanted ─► run ─► target    one destination of either kind
//!                  ├► repository_target: lock, what a dead run left, commit                 ─► intent
//!                  └► replica_target: what is no repository, by a trait (replica)
//!               ─► plan      a key or an increment of each disk, and in which layout
//!               ─► room      whether it fits, before anything is written
//!               ─► pass      one disk: opened once, again as a whole if what changed cannot be had
//!                  └► copy   one pass over it: read, compare, encode, write  (block)         ◄─ intake ◄─ feed; watch
//!                     └► ordered   blocks for replicas, in the order of the disk
//!               ─► full      one pass over the XVA of a full backup           (xva_source)   ─► archive
//!     source ─► qemu ─► nbd  images that are neither raw nor VHD; what is known of their changes: changes
//!     pool                   what a pool gives, which is the caller's to ask for
//!               ─► record    the metadata of the backup, or origin: that of a mirror, or of a pool (pool_record)
//!               ─► report
//! ```
//!
//! [`begin`] takes the locks and [`Begun::store`] makes the backup, so that a snapshot can be taken in between; [`run()`] is both.
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
mod ordered;
mod origin;
mod pass;
mod plan;
mod pool;
mod pool_record;
mod qemu;
mod record;
mod replica;
mod replica_target;
mod report;
mod repository_target;
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
pub use pool::{Access, Bases, Blocks, Export, Opened, PoolDisk, PoolVm, Turn};
pub use pool_record::{PoolRecords, PoolVdi, PoolVif};
pub use replica::{Replica, ReplicaArchive, ReplicaBase, ReplicaBlock, ReplicaDisk, ReplicaSink};
pub use report::{Outcome, Pass, Place, ReadDisk, Report, Stored, StoredDisk, StoredXva};
pub use run::{Begun, begin, run};
pub use source::{ImageOptions, RawFile, Source};
pub use wanted::{Destination, Extent, JOB, Layout, RepositoryDestination, Reserve, SCHEDULE, Wanted};
pub use watch::Watch;
pub(crate) use xva_source::StoredArchive;
