//! Reading a metadata file, whose writer may not be done with it: XO writes in place, also what is there for long.

use std::thread;
use std::time::{Duration, SystemTime};

use storage::{ErrorKind, ObjectPath, Storage};

use super::METADATA_LIMIT;
use super::metadata::Metadata;

/// For how long what is no metadata may be what somebody is writing, by its time.
const YOUNG: Duration = Duration::from_secs(10);
/// How long one waits between two looks at it (milliseconds).
pub(super) const PAUSES: &[u64] = &[5, 10, 20, 40, 80, 160];

/// Why there is no metadata.
pub(super) enum Unread {
    /// The file was removed.
    Gone,
    /// It cannot be read, or is no metadata.
    Broken {
        reason: String,
        /// Whether it may be read well later, though nobody changes it, or is being written.
        may_pass: bool,
    },
}

/// Reads and parses a metadata file; one that somebody may be writing is looked at again after each of the `pauses`.
pub(super) fn read(storage: &dyn Storage, path: &ObjectPath, pauses: &[u64]) -> Result<Metadata, Unread> {
    let mut pauses = pauses.iter().copied().map(Duration::from_millis);
    loop {
        let reason = match storage.read(path, METADATA_LIMIT) {
            Ok(bytes) => match Metadata::parse(&bytes) {
                Ok(metadata) => return Ok(metadata),
                Err(reason) => reason,
            },
            Err(error) => match error.kind() {
                ErrorKind::NotFound => return Err(Unread::Gone),
                // A part of what is encrypted.
                ErrorKind::Authentication => error.to_string(),
                kind => {
                    return Err(Unread::Broken { reason: error.to_string(), may_pass: kind.is_unavailable() });
                }
            },
        };
        // After it was opened, which is when NFS asks for its time.
        let may_pass = is_young(storage, path);
        match pauses.next().filter(|_| may_pass) {
            Some(pause) => thread::sleep(pause),
            None => return Err(Unread::Broken { reason, may_pass }),
        }
    }
}

/// Whether a file was written so lately that its writer may not be done, or is gone.
fn is_young(storage: &dyn Storage, path: &ObjectPath) -> bool {
    let modified = match storage.stat(path) {
        Ok(stat) => stat.modified,
        Err(error) => return error.kind() == ErrorKind::NotFound,
    };
    let now = SystemTime::now();
    now.duration_since(modified).or_else(|_| modified.duration_since(now)).is_ok_and(|age| age < YOUNG)
}
