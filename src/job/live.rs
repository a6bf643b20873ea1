//! What a run is doing now: `live.json` beside the log of its job, which the process of the run replaces every second.
//!
//! It says nothing of whether the run lives: that is told by the lock. A file that an earlier run left names that run. Where the disk is
//! full it grows old, and says so by its time.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::whole;

/// The file, in the folder of a job.
const FILE: &str = "live.json";
/// No such file is longer (bytes).
const LONGEST: u64 = 8 << 20;

/// What a run is doing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Live {
    /// Which.
    pub run: Uuid,
    /// When that was so.
    pub time: Timestamp,
    /// The machines that are being backed up.
    pub vms: Vec<LiveVm>,
}

/// A machine that is being backed up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LiveVm {
    /// Its uuid.
    pub vm: String,
    /// Its name.
    pub name: String,
    /// Its pool, as the configuration calls it.
    pub pool: String,
    /// Since when.
    pub since: Timestamp,
    /// Bytes that were looked at.
    pub done_bytes: u64,
    /// Bytes that will be, as far as is known.
    pub expected_bytes: u64,
    /// How fast, lately.
    pub bytes_per_second: u64,
    /// What is waited for, in a word.
    pub waits_for: String,
    /// What its stages did lately, as `transfer` of `xofs backup --json`.
    pub recent: Value,
}

impl Live {
    /// Reads that of a job from its folder; `None` if there is none that can be understood.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(folder: &Path) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        match File::open(folder.join(FILE)) {
            Ok(file) => file.take(LONGEST).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(serde_json::from_slice(&bytes).ok())
    }

    /// Writes it in the place of what was there.
    ///
    /// # Errors
    /// What the system says; then what was there still is.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        whole::replace(&folder.join(FILE), ".live.new".as_ref(), &serde_json::to_vec(self)?, 0o600, false)
    }

    /// Removes it.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(folder: &Path) -> io::Result<()> {
        fs::remove_file(folder.join(FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written_and_not_at_all_if_that_is_torn() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(Live::read(folder.path()).expect("read"), None);
        let vm = LiveVm {
            vm: "1".into(),
            name: "web\u{1b}01".into(),
            pool: "lab".into(),
            since: Timestamp::UNIX_EPOCH,
            done_bytes: 1,
            expected_bytes: u64::MAX,
            bytes_per_second: 3,
            waits_for: "pool".into(),
            recent: serde_json::json!({ "seconds": 1.5 }),
        };
        let live = Live { run: Uuid::from_u128(7), time: Timestamp::UNIX_EPOCH, vms: vec![vm] };
        live.write(folder.path()).expect("written");
        assert_eq!(Live::read(folder.path()).expect("read"), Some(live));
        let path = folder.path().join(FILE);
        let bytes = fs::read(&path).expect("there");
        fs::write(&path, &bytes[..bytes.len() / 2]).expect("written");
        assert_eq!(Live::read(folder.path()).expect("read"), None);
        Live::remove(folder.path()).expect("there");
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 0);
    }
}
