//! `/immutability.json`: for how long the file server keeps backups from being changed.
//!
//! XO's daemon `immutable-backups` writes it, never encrypted: `{"since":MS,"immutable":true,"duration":MS}`. A backup is
//! immutable from the time in its name for `duration`.
//!
//! Source: XO, `@xen-orchestra/immutable-backups/src/remote.mts` and `liftProtection.mts`.

use jiff::SignedDuration;
use serde::de::{IgnoredAny, MapAccess};
use storage::{ObjectPath, Storage};

use super::fields::{Fields, Record, Scalar};
use super::{Error, ErrorKind, Result};

/// The name of the file at the root.
const NAME: &str = "immutability.json";
/// Longest file read (bytes); a longer one is damaged.
const LIMIT: u64 = 64 << 10;

#[derive(Default)]
struct Immutability {
    is_immutable: Option<bool>,
    duration_ms: Option<u64>,
}

impl Record for Immutability {
    fn take<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> std::result::Result<(), A::Error> {
        match field {
            "immutable" => self.is_immutable = map.next_value::<Scalar>()?.flag(),
            "duration" => self.duration_ms = map.next_value::<Scalar>()?.number(),
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

/// Reads for how long a backup is immutable; `None` if none is. `raw` is the storage under the encryption.
///
/// # Errors
/// [`ErrorKind::Damaged`] if the file does not say so: what may be removed is then unknown. Else what the storage says.
pub(super) fn read(raw: &dyn Storage) -> Result<Option<SignedDuration>> {
    let bytes = match raw.read(&ObjectPath::new(NAME)?, LIMIT) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |reason: &str| {
        let message = format!(
            "'{NAME}': {reason}; {{\"immutable\":true,\"duration\":MILLISECONDS}} was expected, as XO's daemon \
             immutable-backups writes it"
        );
        Error::new(ErrorKind::Damaged, message)
    };
    let Fields(found) =
        serde_json::from_slice::<Fields<Immutability>>(&bytes).map_err(|error| damaged(&error.to_string()))?;
    match (found.is_immutable, found.duration_ms.map(i64::try_from)) {
        (Some(false), _) => Ok(None),
        (_, Some(Ok(duration_ms))) => Ok(Some(SignedDuration::from_millis(duration_ms))),
        _ => Err(damaged("it does not say for how long")),
    }
}

#[cfg(test)]
mod tests {
    use storage::MemoryStorage;

    use super::*;

    #[test]
    fn the_duration_is_read_or_it_is_an_error() {
        let of = |content: &str| {
            let memory = MemoryStorage::new();
            memory.put(NAME, content.to_owned()).unwrap();
            read(&memory).map_err(|error| error.kind())
        };
        assert_eq!(read(&MemoryStorage::new()).unwrap(), None);
        let day = Ok(Some(SignedDuration::from_hours(24)));
        assert_eq!(of(r#"{"since":1785587696789,"immutable":true,"duration":86400000}"#), day);
        assert_eq!(of(r#"{"duration":86400000}"#), day);
        assert_eq!(of(r#"{"immutable":false,"duration":86400000}"#), Ok(None));
        for content in ["", "{", "[]", "{}", r#"{"immutable":true}"#, r#"{"duration":-1}"#, r#"{"duration":1e19}"#] {
            assert_eq!(of(content), Err(ErrorKind::Damaged), "{content}");
        }
    }
}
