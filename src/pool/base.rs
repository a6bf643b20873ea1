//! What a disk is read relative to: pure, over the snapshots that a VM has and what the repositories say.
//!
//! | the repositories' newest backup of the disk | in the pool | read | stored |
//! |---|---|---|---|
//! | none | | whole | all of it, a key |
//! | of a snapshot that is here, the same in each | the snapshot | what changed since | what differs |
//! | of one that is not | | whole | what differs, told by digests |
//!
//! A snapshot that is not known to be stored in each repository is never what something is relative to, whatever its uuid: it
//! may be of a run that failed. Whoever needs a reason for more than an increment finds it in the answer.

use uuid::Uuid;

use super::keys::Keys;

/// A snapshot of one disk, made by us for this VM and job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSnapshot {
    /// Its uuid.
    pub uuid: Uuid,
    /// The uuid of the disk that it was made of.
    pub of: Uuid,
    /// Where it lies.
    pub storage: String,
    /// What it says of itself.
    pub keys: Keys,
    /// Whether it still has what the disk held, or only what changed until it was made.
    pub has_data: bool,
}

/// What the repositories that are written to say of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// None has a backup that the new one can be built upon, for a reason of its own.
    Nothing(String),
    /// The newest backup is of this snapshot, in each.
    Of(Uuid),
    /// They have backups of it, but not of the same snapshot, or one has none.
    Differing,
}

/// How a disk is read, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// What changed since this snapshot.
    Snapshot {
        /// Its uuid.
        uuid: Uuid,
        /// Whether it has data; without, only changed block tracking can tell what changed.
        has_data: bool,
    },
    /// As a whole; what differs from the backup before is stored.
    Whole(String),
    /// As a whole, and all of it is stored.
    Key(String),
}

impl Base {
    /// Returns the snapshot, if it is one.
    #[must_use]
    pub fn snapshot(&self) -> Option<Uuid> {
        match self {
            Self::Snapshot { uuid, .. } => Some(*uuid),
            Self::Whole(_) | Self::Key(_) => None,
        }
    }
}

/// Chooses what a disk, which lies on `storage` now, is read relative to.
#[must_use]
pub fn choose(disk: Uuid, storage: &str, snapshots: &[DiskSnapshot], stored: &Stored, keeps_base: bool) -> Base {
    let wanted = match stored {
        Stored::Nothing(why) => return Base::Key(why.clone()),
        Stored::Differing => {
            return Base::Whole("the newest backups of the repositories are not of the same snapshot".to_owned());
        }
        Stored::Of(uuid) => *uuid,
    };
    if !keeps_base {
        return Base::Whole("no snapshot is kept between runs (--no-base)".to_owned());
    }
    let Some(snapshot) = snapshots.iter().find(|snapshot| snapshot.uuid == wanted) else {
        let why = match snapshots.iter().any(|snapshot| snapshot.of == disk) {
            true => "the snapshot that the newest backup was made of is gone from the pool; another one is there",
            false => "the snapshot that the newest backup was made of is gone from the pool",
        };
        return Base::Whole(why.to_owned());
    };
    if snapshot.of != disk {
        return Base::Whole("the snapshot that the newest backup was made of is of another disk".to_owned());
    }
    if snapshot.storage != storage {
        return Base::Whole("the disk moved to another storage since the newest backup".to_owned());
    }
    if !snapshot.keys.is_stored {
        return Base::Whole("it is not known whether the snapshot before was stored in each repository".to_owned());
    }
    Base::Snapshot { uuid: snapshot.uuid, has_data: snapshot.has_data }
}

/// Returns the snapshots of a disk of which it is certain in what order they were taken, oldest first: the one that is known to be stored,
/// and one of a run of the same machine and folder that died since, while it was published.
#[must_use]
pub fn history(disk: Uuid, snapshots: &[DiskSnapshot]) -> Vec<Uuid> {
    let of_disk = snapshots.iter().filter(|snapshot| snapshot.of == disk);
    let (stored, others): (Vec<_>, Vec<_>) = of_disk.partition(|snapshot| snapshot.keys.is_stored);
    match (stored.as_slice(), others.as_slice()) {
        // Those of one machine and folder come one after the other, and none is told to be stored while an older one is not settled.
        ([old], [new]) if old.keys.keeper == new.keys.keeper && old.keys.datetime <= new.keys.datetime => {
            vec![old.uuid, new.uuid]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_snapshots_is_known_of_the_base_and_one_that_came_after_it() {
        let disk = Uuid::from_u128(1);
        let snapshot = |number, datetime: &str, keeper: &str, is_stored| DiskSnapshot {
            uuid: Uuid::from_u128(number),
            of: disk,
            storage: "sr".into(),
            keys: Keys {
                job: "j".into(),
                vm: "v".into(),
                run: Uuid::nil(),
                keeper: keeper.into(),
                datetime: datetime.into(),
                is_stored,
            },
            has_data: true,
        };
        let base = snapshot(2, "20261120T03:00:07Z", "k", true);
        let new = snapshot(3, "20261121T03:00:07Z", "k", false);
        assert_eq!(history(disk, &[base.clone(), new.clone()]), [base.uuid, new.uuid]);
        for others in [
            vec![base.clone()],
            vec![base.clone(), snapshot(3, "20261121T03:00:07Z", "other", false)],
            vec![base.clone(), snapshot(3, "20261119T03:00:07Z", "k", false)],
            vec![base.clone(), snapshot(3, "20261121T03:00:07Z", "k", true)],
            vec![base.clone(), new.clone(), snapshot(4, "20261122T03:00:07Z", "k", false)],
            vec![DiskSnapshot { of: Uuid::from_u128(9), ..base }, new],
        ] {
            assert_eq!(history(disk, &others), [] as [Uuid; 0], "{others:?}");
        }
    }

    #[test]
    fn only_a_stored_snapshot_of_this_disk_on_this_storage_is_a_base() {
        let (disk, other, snapshot) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let keys = |is_stored| Keys {
            job: "j".into(),
            vm: "v".into(),
            run: Uuid::nil(),
            keeper: "k".into(),
            datetime: "20261120T03:00:07Z".into(),
            is_stored,
        };
        let of = |of, storage: &str, is_stored| {
            vec![DiskSnapshot { uuid: snapshot, of, storage: storage.into(), keys: keys(is_stored), has_data: true }]
        };
        let is_base = Base::Snapshot { uuid: snapshot, has_data: true };
        let stored = Stored::Of(snapshot);
        assert_eq!(choose(disk, "sr", &of(disk, "sr", true), &stored, true), is_base);
        for (snapshots, stored, keeps_base, part) in [
            (of(disk, "sr", true), Stored::Of(other), true, "another one is there"),
            (Vec::new(), stored.clone(), true, "gone from the pool"),
            (of(other, "sr", true), stored.clone(), true, "another disk"),
            (of(disk, "sr2", true), stored.clone(), true, "moved"),
            (of(disk, "sr", false), stored.clone(), true, "not known"),
            (of(disk, "sr", true), stored, false, "--no-base"),
            (of(disk, "sr", true), Stored::Differing, true, "not of the same"),
        ] {
            match choose(disk, "sr", &snapshots, &stored, keeps_base) {
                Base::Whole(why) => assert!(why.contains(part), "{why}"),
                base => panic!("{part}: {base:?}"),
            }
        }
        let nothing = Stored::Nothing("no backup yet".into());
        assert_eq!(choose(disk, "sr", &of(disk, "sr", true), &nothing, false), Base::Key("no backup yet".into()));
    }
}
