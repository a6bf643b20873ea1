//! What was seen of a path when a plan was made, to be seen again before anything is changed.
//!
//! A time of a folder is no fact: moving something out of it and back changes it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use storage::{Kind, ObjectPath, Stat, Storage};
use uuid::Uuid;

/// Files up to so many bytes are read, and known by their contents too.
const DIGESTED: u64 = 8 << 20;

/// What was seen, by path.
pub type Facts = BTreeMap<String, Fact>;

/// What something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Bytes.
    File,
    /// Holds names.
    Folder,
    /// Neither.
    Other,
}

/// What was seen of one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Fact {
    /// What it is.
    pub what: What,
    /// Stored size of a file in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// When a file was last written, to the nanosecond.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<String>,
    /// SHA-256 of what a small file holds, decrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The names in a folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<Vec<String>>,
    /// Who an image is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// What an image is built on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Uuid>,
    /// Why an image cannot be opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Fact {
    /// Says what is known without reading.
    pub(super) fn of(stat: &Stat) -> Self {
        let what = match stat.kind {
            Kind::File => What::File,
            Kind::Directory => What::Folder,
            Kind::Other => What::Other,
        };
        let is_file = what == What::File;
        let modified =
            Timestamp::try_from(stat.modified).map_or_else(|_| "unknown".to_owned(), |time| time.to_string());
        Self {
            what,
            size: is_file.then_some(stat.size),
            modified: is_file.then_some(modified),
            sha256: None,
            names: None,
            uuid: None,
            parent: None,
            error: None,
        }
    }

    /// Looks at what is to be moved: a small file's contents, and of a folder the names in it.
    pub(super) fn look(storage: &dyn Storage, path: &ObjectPath) -> storage::Result<Self> {
        let stat = storage.stat(path)?;
        let mut fact = Self::of(&stat);
        match fact.what {
            What::File if stat.size <= DIGESTED => fact.sha256 = digest(storage, path)?,
            What::Folder => fact.names = Some(names(storage, path)?),
            What::File | What::Other => {}
        }
        Ok(fact)
    }
}

/// Returns the digest of a file; `None` of one that is positively damaged.
fn digest(storage: &dyn Storage, path: &ObjectPath) -> storage::Result<Option<String>> {
    match storage.read(path, DIGESTED) {
        Ok(bytes) => Ok(Some(storage::sha256(&bytes))),
        Err(error) if error.kind().is_unavailable() || error.kind() == storage::ErrorKind::NotFound => Err(error),
        Err(_) => Ok(None),
    }
}

/// Returns the names in a folder, sorted.
fn names(storage: &dyn Storage, path: &ObjectPath) -> storage::Result<Vec<String>> {
    let mut names: Vec<String> = storage.list(path)?.into_iter().map(|entry| entry.name).collect();
    names.sort();
    Ok(names)
}

/// Says in a sentence where `now` is not as `before`; `None` if it is.
pub(super) fn difference(before: &Facts, now: &Facts) -> Option<String> {
    let path = before.keys().chain(now.keys()).find(|path| before.get(*path) != now.get(*path))?;
    let shown = |fact: Option<&Fact>| {
        fact.map_or_else(|| "nothing".to_owned(), |fact| serde_json::to_string(fact).unwrap_or_default())
    };
    let cut = |text: String| {
        if text.chars().count() > 200 { text.chars().take(200).collect::<String>() + " ..." } else { text }
    };
    Some(format!("'{path}' was {} and is {}", cut(shown(before.get(path))), cut(shown(now.get(path)))))
}
