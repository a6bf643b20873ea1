//! The state file of a merge, `.<parent>.merge.json`: which disks are being merged, and how far that has got.

use serde_json::Value;
use uuid::Uuid;

use crate::error::FormatError;

/// What a merge is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Blocks of the children are being moved into the parent.
    MergeBlocks,
    /// All blocks are in the parent; the children are being removed and names changed.
    Cleanup,
}

/// The state, as much of it as says how to read the disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeState {
    /// The names of the disks, relative to the state file's directory, oldest first; empty from versions before 2022.
    pub chain: Vec<String>,
    /// All blocks below this one are already in the parent.
    pub current_block: u64,
    /// The step.
    pub step: Step,
    /// The footer's UUID of the newest disk; `None` from older versions.
    pub child_uuid: Option<Uuid>,
    /// The footer's UUID of the oldest disk; `None` from older versions.
    pub parent_uuid: Option<Uuid>,
}

impl MergeState {
    /// Parses the JSON of either generation: that of backup-archive and that of vhd-lib before 6.2.
    ///
    /// `currentBlock` missing, null or negative (as old versions wrote it) is 0: no block is taken for moved.
    ///
    /// # Errors
    /// `Damaged` if it is not a JSON object or the chain is not a list of names, `Unsupported` for an unknown step.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let state: Value = serde_json::from_slice(bytes)
            .map_err(|error| FormatError::damaged(format!("the state of a merge must be JSON: {error}")))?;
        let Value::Object(state) = state else {
            return Err(FormatError::damaged("the state of a merge must be a JSON object, but is another value"));
        };
        let step = match state.get("step") {
            None | Some(Value::Null) => Step::MergeBlocks,
            Some(Value::String(step)) if step == "mergeBlocks" => Step::MergeBlocks,
            Some(Value::String(step)) if step == "cleanup" || step == "cleanupVhds" => Step::Cleanup,
            Some(other) => {
                return Err(FormatError::unsupported(format!(
                    "the step of a merge must be 'mergeBlocks' or 'cleanup', but is {other}"
                )));
            }
        };
        let chain = match state.get("chain") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(names)) => names
                .iter()
                .map(|name| name.as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .ok_or_else(|| FormatError::damaged("the chain of a merge must be a list of file names"))?,
            Some(_) => return Err(FormatError::damaged("the chain of a merge must be a list of file names")),
        };
        let uuid = |of: &str| state.get(of)?.get("uuid")?.as_str().and_then(|text| Uuid::try_parse(text).ok());
        Ok(Self {
            chain,
            current_block: state.get("currentBlock").and_then(Value::as_u64).unwrap_or(0),
            step,
            child_uuid: uuid("child"),
            parent_uuid: uuid("parent"),
        })
    }
}

/// Returns the name of the state file of a merge into `parent`, a file name; both lie in the same directory.
#[must_use]
pub fn file_name(parent: &str) -> String {
    format!(".{parent}.merge.json")
}

/// Returns the name of the parent whose merge a file of this name describes; `None` if it is no such file.
#[must_use]
pub fn parent_of(file_name: &str) -> Option<&str> {
    file_name.strip_prefix('.')?.strip_suffix(".merge.json").filter(|parent| !parent.is_empty())
}
