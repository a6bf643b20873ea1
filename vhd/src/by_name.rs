//! Whether a disk that belongs to no backup still is what it was when it was opened.
//!
//! It lives as long as its name, and until a merge begins that makes it part of another disk: as its base, or between base
//! and target. XO writes the state of a merge before it touches a block, so who looks after reading cannot be too late. Nor
//! is it for who finds that nobody touched the files that were read, nor the one of that name, since it was alive.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use storage::{Error, ErrorKind, ObjectPath, Result, Stat, Storage};

use crate::chain::MERGE_STATE_LIMIT;
use crate::chain_disk::Liveness;
use crate::flat::is_settled;
use crate::merge_state::{self, MergeState};

/// XO writes a state in place; for so long at most half a state is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);

pub(crate) struct ByName {
    storage: Arc<dyn Storage>,
    name: ObjectPath,
    /// The states of merges in its folder, and whether they say that it becomes part of another disk. Those that were there
    /// when it was opened do not: it could not have been opened.
    states: Mutex<HashMap<String, bool>>,
    /// The folder as it was when the disk was last found alive, if an unchanged time proves that nothing came or went since.
    unchanged: Mutex<Option<Stat>>,
}

impl ByName {
    pub(crate) fn new(storage: Arc<dyn Storage>, name: ObjectPath) -> Result<Self> {
        let entries = storage.list(&name.parent())?;
        let names = entries.into_iter().map(|entry| entry.name);
        let states = names.filter(|name| merge_state::parent_of(name).is_some()).map(|name| (name, false)).collect();
        Ok(Self { storage, name, states: Mutex::new(states), unchanged: Mutex::default() })
    }

    /// Returns whether the state in the file of that name says that the disk becomes part of another one.
    fn is_merged_by(&self, state: &str) -> Result<bool> {
        let known = self.states.lock().unwrap_or_else(PoisonError::into_inner).get(state).copied();
        if let Some(known) = known {
            return Ok(known);
        }
        let path = self.name.parent().join(state)?;
        let own = self.name.file_name();
        let deadline = Instant::now() + PATIENCE;
        let is_merged = loop {
            if merge_state::parent_of(state) == Some(own) {
                break true;
            }
            let bytes = match self.storage.read(&path, MERGE_STATE_LIMIT) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                other => other?,
            };
            match MergeState::parse(&bytes) {
                Ok(state) => {
                    break state.chain.iter().any(|name| name == own)
                        && state.chain.last().is_some_and(|last| last != own);
                }
                Err(error) if Instant::now() >= deadline => {
                    return Err(Error::new(ErrorKind::Io, "read", &path, error.reason));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        self.states.lock().unwrap_or_else(PoisonError::into_inner).insert(state.to_owned(), is_merged);
        Ok(is_merged)
    }
}

impl Liveness for ByName {
    fn is_alive(&self) -> Result<bool> {
        // Over a network the time of a folder may be an old one.
        if self.storage.capabilities().is_remote {
            return self.is_listed_alive();
        }
        let folder = self.storage.stat(&self.name.parent())?;
        if *self.unchanged.lock().unwrap_or_else(PoisonError::into_inner) == Some(folder) {
            return Ok(true);
        }
        // A folder that was changed just now may be changed again in the same instant of its clock.
        let is_settled = is_settled(&folder);
        let is_alive = self.is_listed_alive()?;
        *self.unchanged.lock().unwrap_or_else(PoisonError::into_inner) = (is_alive && is_settled).then_some(folder);
        Ok(is_alive)
    }
}

impl ByName {
    fn is_listed_alive(&self) -> Result<bool> {
        let entries = self.storage.list(&self.name.parent())?;
        let states = || entries.iter().map(|entry| &entry.name).filter(|name| merge_state::parent_of(name).is_some());
        // Of the next merge of that name nothing is known yet.
        let mut known = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|name, _| states().any(|state| state == name));
        drop(known);
        for state in states() {
            if self.is_merged_by(state)? {
                return Ok(false);
            }
        }
        if entries.iter().any(|entry| entry.name == self.name.file_name()) {
            return Ok(true);
        }
        match self.storage.stat(&self.name) {
            Ok(_) => Ok(true),
            // A merge takes the name of its target away for an instant.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(states().next().is_some()),
            Err(error) => Err(error),
        }
    }
}
