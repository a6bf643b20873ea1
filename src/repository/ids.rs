//! Identities, each a type of its own so that none can be taken for another.

use std::fmt;
use std::sync::Arc;

use super::BackupTime;

/// The identity of a VM: its uuid as the name of its folder spells it.
///
/// Invariant: one component of a path, not starting with `.`; that it is a uuid is not checked, as XO does not either.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmId(Arc<str>);

impl VmId {
    /// Makes an id of the name of a VM's folder; `None` if a VM's folder cannot have that name.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let is_folder =
            !name.is_empty() && !name.starts_with('.') && !name.ends_with(".lock") && !name.contains(['/', '\0']);
        is_folder.then(|| Self(Arc::from(name)))
    }

    /// Returns the id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The identity of one backup of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackupId {
    /// The VM.
    pub vm: VmId,
    /// The time in the name of the metadata file.
    pub time: BackupTime,
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vm, self.time)
    }
}

/// Makes a uuid of version 4.
///
/// # Errors
/// If the system has no random numbers.
pub(crate) fn random_uuid() -> rustix::io::Result<uuid::Uuid> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}
