//! `xofs repair --list`, `--undo` and `--purge`: what was moved, and what becomes of it.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use serde_json::{Value, json};
use storage::WritableStorage;

use super::{RepairArgs, apply};
use crate::cli::exit::{Exit, Failure};
use crate::cli::print;
use crate::cli::text::{Shown, count, size};
use crate::doctor::{self, Set, State};

/// Lists what is in the trash.
///
/// # Errors
/// If it cannot be read.
pub fn list(arguments: &RepairArgs, storage: &Arc<dyn WritableStorage>) -> Result<Exit> {
    let sets = doctor::list(&**storage)?;
    if arguments.json {
        print::json(&json!({ "sets": sets.iter().map(to_json).collect::<Vec<_>>() }))?;
        return Ok(Exit::Done);
    }
    let mut text = String::new();
    for set in &sets {
        let state = match set.state {
            State::Moved => "",
            State::Moving => "  ended midway: --undo puts it back",
            State::Purging => "  being purged: --purge goes on",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}  {}  {}{state}", Shown(&set.id), Shown(set.vm.as_str()), size(set.size));
        for step in &set.moves {
            let _ = writeln!(text, "  {}: {}", step.kind, Shown(&step.path));
        }
    }
    let all: u64 = sets.iter().map(|set| set.size).sum();
    let _ = writeln!(text, "{} in the trash, {}", count(sets.len(), "set"), size(all));
    print::text(&text)?;
    Ok(Exit::Done)
}

/// Puts a set back, the newest one if none is named.
///
/// # Errors
/// If something has taken a place, and as the storage says.
pub fn undo(arguments: &RepairArgs, storage: &Arc<dyn WritableStorage>, id: Option<&str>) -> Result<Exit> {
    let set = match id {
        Some(id) => doctor::find(&**storage, id)?,
        None => match doctor::list(&**storage)?.pop() {
            Some(newest) => newest,
            None => return Err(Failure::new(Exit::Failed, "nothing is in the trash").into()),
        },
    };
    let lock = apply::lock(arguments, storage, &set.vm, &AtomicBool::new(false))?;
    let done = doctor::put_back(&lock, &set.id)?;
    if arguments.json {
        print::json(&json!({ "set": set.id, "uuid": set.vm.as_str(), "paths": done.paths, "missing": done.missing }))?;
    } else {
        let mut text = String::new();
        for path in &done.missing {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "neither in the trash nor in its place: {}", Shown(path));
        }
        let _ = writeln!(text, "{} of {} back in place", count(done.paths.len(), "thing"), Shown(&set.id));
        print::text(&text)?;
    }
    Ok(if done.missing.is_empty() { Exit::Done } else { Exit::Partial })
}

/// Deletes a set.
///
/// # Errors
/// If there is none of that name, and as the storage says.
pub fn purge(arguments: &RepairArgs, storage: &Arc<dyn WritableStorage>, id: &str) -> Result<Exit> {
    let set = doctor::find(&**storage, id)?;
    let lock = apply::lock(arguments, storage, &set.vm, &AtomicBool::new(false))?;
    doctor::purge(&lock, &set.id)?;
    if arguments.json {
        print::json(&json!({ "set": set.id, "uuid": set.vm.as_str(), "size": set.size }))?;
    } else {
        print::text(&format!("{} deleted, {}\n", Shown(&set.id), size(set.size)))?;
    }
    Ok(Exit::Done)
}

fn to_json(set: &Set) -> Value {
    json!({
        "id": set.id,
        "uuid": set.vm.as_str(),
        "state": set.state,
        "size": set.size,
        "moves": set.moves,
    })
}
