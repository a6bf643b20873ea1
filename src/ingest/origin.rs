//! What a backup is made from that has an identity and metadata of its own: a backup of another repository, or a VM of a pool.

use uuid::Uuid;

use super::mirror::Mirror;
use super::pool::PoolVm;
use super::pool_record::PoolRecords;
use super::record::Record;
use super::xva_source::Xva;
use crate::repository::Document;

/// Where a backup comes from, and what its metadata says of that.
pub struct Origin {
    metadata: Metadata,
    /// Of a full backup.
    xva: Option<Xva>,
}

enum Metadata {
    Mirror(Mirror),
    Pool(PoolRecords),
}

impl Origin {
    /// Makes that of disks of a pool: those of [`Wanted::disks`](super::Wanted::disks).
    #[must_use]
    pub fn of_pool(records: PoolRecords) -> Self {
        Self { metadata: Metadata::Pool(records), xva: None }
    }

    /// Makes that of a full backup of a VM of a pool, an XVA.
    #[must_use]
    pub fn of_pool_export(records: PoolRecords, vm: Box<dyn PoolVm>) -> Self {
        Self { metadata: Metadata::Pool(records), xva: Some(Xva::Exported(vm)) }
    }

    /// Makes that of a backup of another repository.
    pub(super) fn of_mirror(mirror: Mirror, xva: Option<Xva>) -> Self {
        Self { metadata: Metadata::Mirror(mirror), xva }
    }

    /// Whether it is a backup of another repository: it keeps its time.
    pub(super) fn is_mirror(&self) -> bool {
        matches!(self.metadata, Metadata::Mirror(_))
    }

    /// Returns the uuids of each disk and of its snapshot.
    pub(super) fn identities(&self) -> Vec<(Uuid, Uuid)> {
        match &self.metadata {
            Metadata::Mirror(mirror) => mirror.identities(),
            Metadata::Pool(records) => records.identities(),
        }
    }

    /// Returns the XVA, if it is a full backup.
    pub(super) fn xva(&self) -> Option<&Xva> {
        self.xva.as_ref()
    }

    /// Returns the metadata, with what `record` says of the repository that it is for.
    pub(super) fn to_document(&self, record: &Record) -> Document {
        match &self.metadata {
            Metadata::Mirror(mirror) => mirror.to_document(record),
            Metadata::Pool(records) => records.to_document(record),
        }
    }
}
