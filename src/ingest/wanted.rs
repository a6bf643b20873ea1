//! What is asked for: of which VM a backup is to be made, of what, and where to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use storage::WritableStorage;
use uuid::Uuid;
use vhd::Filter;

use super::changes::Changes;
use super::error::{Error, ErrorKind, Result};
use super::origin::Origin;
use super::replica::Replica;
use super::source::Source;
use super::xva_source::Xva;
use crate::probe::Subject;
use crate::repository::{self, Repository, VmId, is_device_name};

/// The job that backups belong to unless it is said otherwise. Never one of Xen Orchestra's: it would put a second child on
/// the disk that it made last, and break one of them when it merges.
pub const JOB: &str = "78a0f5c1-0b5e-4d62-9a3b-6e1f0c7d2a94";
/// The schedule that they belong to.
pub const SCHEDULE: &str = "3c9e1d47-52f8-4a06-8b7d-f1a4c05e6b32";

/// Which blocks are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All, as a key.
    Full,
    /// Those that differ from the newest backup; an error if it cannot be had.
    Incremental,
}

/// How disks are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One VHD file each.
    File,
    /// A file for each block; through what is there already, if it is not said.
    Exploded(Option<Filter>),
}

/// What is left free in each destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reserve {
    /// So many bytes; a part of what is free, if nothing is said.
    pub bytes: Option<u64>,
    /// Whether who asks could have said less, by an option: what is refused for it says so.
    pub is_option: bool,
}

/// A backup that is to be made.
#[derive(Default)]
pub struct Wanted {
    /// The VM: its uuid, or its name if that is known and only one has it.
    pub vm: String,
    /// Its name, if it is new or has another now.
    pub name: Option<String>,
    /// Its disks, by the name that the guest has for them.
    pub disks: Vec<(String, Source)>,
    /// Increments where they are possible, if nothing is said.
    pub extent: Option<Extent>,
    /// As the newest backup, if nothing is said.
    pub layout: Option<Layout>,
    /// Its job; [`JOB`] if nothing is said.
    pub job: Option<String>,
    /// Its schedule; that of the newest backup of the job, else [`SCHEDULE`], if nothing is said.
    pub schedule: Option<String>,
    /// When it was made; now, if nothing is said.
    pub time: Option<Timestamp>,
    /// How long the lock of the VM is waited for.
    pub patience: Duration,
    /// How often a disk whose transfer broke is read again.
    pub disk_retries: u32,
    /// What is left free in each destination.
    pub reserve: Reserve,
    /// What changed since a backup, where that is known.
    pub changes: Option<Changes>,
    /// The backup that it is made from, if it is one: see [`Wanted::mirror`].
    pub origin: Option<Origin>,
    /// What it is read from, for who asks where the time goes; this machine, if nothing is said. A disk of a pool says it itself.
    pub from: Option<Subject>,
}

/// What is written to.
#[derive(Clone)]
pub enum Destination {
    /// A repository.
    Repository(RepositoryDestination),
    /// Anything else.
    Replica(Arc<dyn Replica>),
}

impl Destination {
    /// Returns its name as it was given.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Repository(repository) => &repository.name,
            Self::Replica(replica) => replica.name(),
        }
    }

    /// Returns the repository, if it is one.
    #[must_use]
    pub fn repository(&self) -> Option<&RepositoryDestination> {
        match self {
            Self::Repository(repository) => Some(repository),
            Self::Replica(_) => None,
        }
    }
}

/// A repository that is written to.
#[derive(Clone)]
pub struct RepositoryDestination {
    /// As it was named; holds no secret.
    pub name: String,
    /// To read what is there.
    pub repository: Arc<Repository>,
    /// To write.
    pub storage: Arc<dyn WritableStorage>,
    /// Bytes that all its files may have together.
    pub quota: Option<u64>,
}

impl Wanted {
    /// Returns what it is read from.
    pub(super) fn source(&self) -> Subject {
        self.from.clone().unwrap_or_else(Subject::machine)
    }

    /// Returns the XVA that is mirrored, if it is a full backup.
    pub(super) fn xva(&self) -> Option<&Xva> {
        self.origin.as_ref()?.xva()
    }
}

/// Refuses what can be seen to be wrong before anything is looked at.
pub(super) fn check(wanted: &Wanted) -> Result<()> {
    check_ids(wanted)?;
    let usage = |message: String| Err(Error::new(ErrorKind::Usage, message));
    if wanted.xva().is_some() && (wanted.layout.is_some() || wanted.extent == Some(Extent::Incremental)) {
        let message = "it is a full backup, an XVA, which is stored as it is: it has neither a format nor a compression to \
                       choose, and is never an increment; leave --format, --compression and --incremental out";
        return usage(message.to_owned());
    }
    if wanted.disks.is_empty() && wanted.xva().is_none() {
        return usage("no disk is named: give one with --disk xvda=IMAGE".to_owned());
    }
    let mut names = BTreeSet::new();
    for (name, _) in &wanted.disks {
        if wanted.origin.is_none() && !is_device_name(name) {
            let shown = name.escape_debug();
            return usage(format!("'{shown}' is no name of a disk: one like xvda was expected, of letters and digits"));
        }
        if !names.insert(name) {
            return usage(format!("disk {name} is named twice"));
        }
    }
    if let Some(origin) = &wanted.origin {
        let vdis: Vec<Uuid> = origin.identities().into_iter().map(|(vdi, _)| vdi).collect();
        if vdis.len() != wanted.disks.len() || vdis.iter().collect::<BTreeSet<_>>().len() != vdis.len() {
            let message =
                format!("{} disks are to be stored, and it is not said which each is: {vdis:?}", wanted.disks.len());
            return usage(message);
        }
    }
    let streams = wanted.disks.iter().filter(|(_, source)| matches!(source, Source::Stream(_))).count();
    if streams > 1 {
        return usage("only one disk can be read from a stream".to_owned());
    }
    Ok(())
}

/// Refuses what names no job or schedule.
pub(super) fn check_ids(wanted: &Wanted) -> Result<()> {
    for (what, id) in [("job", &wanted.job), ("schedule", &wanted.schedule)] {
        let is_plain = |id: &String| {
            let is_id = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=64).contains(&id.len()) && id.bytes().all(is_id)
        };
        if let Some(id) = id.as_ref().filter(|id| !is_plain(id)) {
            let message = format!("'{}' is no id of a {what}: a uuid was expected", id.escape_debug());
            return Err(Error::new(ErrorKind::Usage, message));
        }
    }
    Ok(())
}

/// Finds the VM: the same one in all repositories.
pub(super) fn resolve(wanted: &Wanted, destinations: &[Destination]) -> Result<VmId> {
    let mut known = Vec::new();
    let mut unlisted = None;
    for destination in destinations.iter().filter_map(Destination::repository) {
        match destination.repository.vms() {
            Ok(vms) => known.extend(vms.iter().cloned()),
            Err(error) => unlisted = Some(error),
        }
    }
    if let Ok(uuid) = Uuid::try_parse(&wanted.vm) {
        let uuid = uuid.to_string();
        let found = known.iter().find(|vm| vm.id.as_str().eq_ignore_ascii_case(&uuid));
        return match (found, &wanted.name) {
            (Some(vm), _) => Ok(vm.id.clone()),
            (None, Some(_)) => Ok(VmId::new(&uuid).expect("a uuid can name a folder")),
            (None, None) => {
                let message = format!("no backup of a VM {uuid} is there: give its name with --name to begin with it");
                Err(Error::new(ErrorKind::Usage, message))
            }
        };
    }
    let ids: BTreeSet<&VmId> = known.iter().filter(|vm| vm.name == wanted.vm).map(|vm| &vm.id).collect();
    let shown = wanted.vm.escape_debug();
    match (ids.len(), unlisted) {
        (1, _) => Ok((*ids.first().expect("there is one")).clone()),
        (0, Some(error)) => Err(error.into()),
        (0, None) => {
            let message = format!(
                "no backup of a VM '{shown}' is there; one that is new is named by its uuid, with --vm UUID --name NAME"
            );
            Err(Error::new(ErrorKind::Repository(repository::ErrorKind::NotFound), message))
        }
        _ => {
            let ids = ids.iter().map(|id| id.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("several VMs are called '{shown}': {ids}; say which by its uuid");
            Err(Error::new(ErrorKind::Repository(repository::ErrorKind::Ambiguous), message))
        }
    }
}
