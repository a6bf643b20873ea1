//! The state file of a merge, `.<parent>.merge.json`: which disks are being merged, and how far that has got.
//!
//! It is XO's, in XO's words. What a merge of ours adds stands in a field of its own, which XO keeps and does not look at.

use serde_json::{Value, json};
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
    /// Of each disk of the chain the VHD file or folder, as its name led to it when the merge began; relative to the state
    /// file's directory. Only our merges say it, and they begin only when every block that a table lists is there: one that
    /// is gone from its child has been moved.
    pub data: Option<Vec<String>>,
}

/// What is written of a merge of ours, and how; another number is of a later version.
const OWN_VERSION: u64 = 1;

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
        let data = match state.get("xofs") {
            None => None,
            Some(own) if own.get("version").and_then(Value::as_u64) == Some(OWN_VERSION) => {
                let names = own.get("data").and_then(Value::as_array).into_iter().flatten();
                let data: Vec<String> = names.filter_map(|name| name.as_str().map(str::to_owned)).collect();
                if data.len() != chain.len() {
                    return Err(FormatError::damaged("a merge must say where each disk of its chain is"));
                }
                Some(data)
            }
            Some(_) => {
                return Err(FormatError::unsupported("the merge was begun by a later version, which is to finish it"));
            }
        };
        let uuid = |of: &str| state.get(of)?.get("uuid")?.as_str().and_then(|text| Uuid::try_parse(text).ok());
        Ok(Self {
            chain,
            current_block: state.get("currentBlock").and_then(Value::as_u64).unwrap_or(0),
            step,
            child_uuid: uuid("child"),
            parent_uuid: uuid("parent"),
            data,
        })
    }

    /// Returns the JSON of the state, as XO's merger goes on from it.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let uuid = |uuid: Option<Uuid>| json!({ "uuid": uuid.unwrap_or_default() });
        let step = match self.step {
            Step::MergeBlocks => "mergeBlocks",
            Step::Cleanup => "cleanup",
        };
        let mut state = json!({
            "child": uuid(self.child_uuid),
            "parent": uuid(self.parent_uuid),
            "chain": self.chain,
            "currentBlock": self.current_block,
            "mergedDataSize": 0,
            "step": step,
            "diskSize": 0,
        });
        if let Some(data) = &self.data {
            state["xofs"] = json!({ "version": OWN_VERSION, "data": data });
        }
        state.to_string().into_bytes()
    }
}

/// Returns the name of the state file of a merge into `parent`.
#[must_use]
pub fn name_of(parent: &str) -> String {
    format!(".{parent}.merge.json")
}

/// Returns the name of the parent whose merge a file of this name describes; `None` if it is no such file.
///
/// Both lie in the same directory.
#[must_use]
pub fn parent_of(file_name: &str) -> Option<&str> {
    file_name.strip_prefix('.')?.strip_suffix(".merge.json").filter(|parent| !parent.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn parse(json: &str) -> Result<MergeState, ErrorKind> {
        MergeState::parse(json.as_bytes()).map_err(|error| error.kind)
    }

    fn state(chain: &[&str], current_block: u64, step: Step) -> MergeState {
        let chain = chain.iter().map(|name| (*name).to_owned()).collect();
        MergeState { chain, current_block, step, child_uuid: None, parent_uuid: None, data: None }
    }

    #[test]
    fn the_current_generation_names_the_disks_by_uuid() {
        let json = r#"{"child":{"uuid":"01234567-89ab-4cde-8f01-23456789abcd"},
            "parent":{"uuid":"fedcba98-7654-4321-8fed-cba987654321"},"chain":["a.alias.vhd","b.alias.vhd"],
            "currentBlock":8,"mergedDataSize":8388608,"step":"mergeBlocks","diskSize":0}"#;
        let expected = MergeState {
            child_uuid: Some(Uuid::parse_str("01234567-89ab-4cde-8f01-23456789abcd").unwrap()),
            parent_uuid: Some(Uuid::parse_str("fedcba98-7654-4321-8fed-cba987654321").unwrap()),
            ..state(&["a.alias.vhd", "b.alias.vhd"], 8, Step::MergeBlocks)
        };
        assert_eq!(parse(json), Ok(expected));
    }

    #[test]
    fn what_a_merge_of_ours_adds_is_read_again() {
        let own = MergeState {
            child_uuid: Some(Uuid::from_u128(1)),
            parent_uuid: Some(Uuid::from_u128(2)),
            data: Some(vec!["data/a.vhd".to_owned(), "data/b.vhd".to_owned()]),
            ..state(&["a.alias.vhd", "b.alias.vhd"], 0, Step::MergeBlocks)
        };
        let json = String::from_utf8(own.to_json()).unwrap();
        assert_eq!(parse(&json), Ok(own.clone()));
        assert!(json.contains(r#""currentBlock":0"#), "XO merges nothing without a number: {json}");
        let alone = MergeState { data: None, ..own };
        assert_eq!(parse(&String::from_utf8(alone.to_json()).unwrap()), Ok(alone));
        assert_eq!(parse(&json.replace("\"version\":1", "\"version\":2")), Err(ErrorKind::Unsupported));
        assert_eq!(parse(&json.replace(",\"data/b.vhd\"", "")), Err(ErrorKind::Damaged));
    }

    #[test]
    fn older_generations_name_the_disks_by_checksum_or_not_at_all() {
        let vhd_lib = r#"{"child":{"header":4294961359},"parent":{"header":1},"currentBlock":3,"mergedDataSize":0,
            "step":"cleanupVhds","chain":["a.vhd","b.vhd"],"vhdSize":7}"#;
        assert_eq!(parse(vhd_lib), Ok(state(&["a.vhd", "b.vhd"], 3, Step::Cleanup)));
        let oldest = r#"{"child":{"header":1},"parent":{"header":2},"currentBlock":5}"#;
        assert_eq!(parse(oldest), Ok(state(&[], 5, Step::MergeBlocks)));
        assert_eq!(parse(r#"{"step":"cleanup"}"#), Ok(state(&[], 0, Step::Cleanup)));
    }

    #[test]
    fn a_current_block_that_is_no_number_of_a_block_takes_nothing_for_moved() {
        for block in ["null", "-1", "\"7\"", "[]"] {
            let json = format!(r#"{{"currentBlock":{block},"step":"mergeBlocks"}}"#);
            assert_eq!(parse(&json), Ok(state(&[], 0, Step::MergeBlocks)), "{block}");
        }
    }

    #[test]
    fn a_state_that_says_something_else_is_refused() {
        for json in ["", "{", "[]", "null", "7", r#"{"chain":"a"}"#, r#"{"chain":["a",1]}"#] {
            assert_eq!(parse(json), Err(ErrorKind::Damaged), "{json}");
        }
        for json in [r#"{"step":"rename"}"#, r#"{"step":1}"#] {
            assert_eq!(parse(json), Err(ErrorKind::Unsupported), "{json}");
        }
    }

    #[test]
    fn the_name_of_the_file_says_the_parent() {
        let name = ".20260801T000000Z.alias.vhd.merge.json";
        assert_eq!(parent_of(name), Some("20260801T000000Z.alias.vhd"));
        for other in ["20260801T000000Z.alias.vhd.merge.json", "..merge.json", ".merge.json", ".a.vhd"] {
            assert_eq!(parent_of(other), None, "{other}");
        }
        assert_eq!(name_of("20260801T000000Z.alias.vhd"), name);
    }
}
