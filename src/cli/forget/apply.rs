//! `xofs forget --apply`: the VMs, a few at a time, each under its lock.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use storage::WritableStorage;

use crate::ahead::Times;
use crate::cli::exit::{self, Exit};
use crate::cli::export::progress::Progress;
use crate::cli::open;
use crate::cli::text::{Shown, count};
use crate::merge::{self, Forgotten, Watch};
use crate::probe::{self, CountedStorage, Probe, Reading, Stage, Subject, Transfer};
use crate::repository::{Backup, Backups, Error, ErrorKind, Vm};

/// Blocks that are moved at a time over a network, where each waits for the server, and on a disk of this machine.
const THREADS_REMOTE: usize = 16;
const THREADS_LOCAL: usize = 4;
/// What a block is shown as (bytes).
const BLOCK: u64 = 2 << 20;

/// How it goes about it.
pub struct Manner {
    /// What the repository is called.
    pub repository: String,
    /// How long another program that writes the VM is waited for.
    pub wait: Duration,
    /// Whether it says how far it is where there is no terminal.
    pub progress: bool,
    /// Merges at a time.
    pub jobs: usize,
}

/// Returns which of a VM's backups are to go.
pub type Choose<'a> = dyn Fn(&Backups) -> Vec<Arc<Backup>> + Sync + 'a;

/// What was done.
pub struct Applied {
    vms: Vec<(Vm, Result<Forgotten>)>,
    is_stopped: bool,
    /// Where the time went.
    transfer: Reading,
}

/// Forgets what `choose` names of each VM's backups.
pub fn run(
    manner: &Manner,
    storage: &Arc<dyn WritableStorage>,
    vms: &[&Vm],
    choose: &Choose,
    is_stopped: &AtomicBool,
) -> Applied {
    let transfer = Transfer::default();
    let of = Subject::repository(&manner.repository);
    let counted: Arc<dyn WritableStorage> = Arc::new(CountedStorage::new(storage.clone(), &transfer, &of));
    let waits = transfer.step(Stage::Lock, &of);
    let progress = Mutex::new(Progress::new("merge", 0, manner.progress));
    let at_a_time = manner.jobs.clamp(1, vms.len().max(1));
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || {
        while let Some((number, vm)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, vms.get(at)?)))
        {
            if is_stopped.load(Ordering::Relaxed) {
                return;
            }
            let forgotten =
                forget(manner, manner.jobs / at_a_time, &counted, vm, choose, is_stopped, (&progress, &waits));
            let forgotten = forgotten.map_err(|error| explain(&**storage, error));
            done.lock().unwrap_or_else(PoisonError::into_inner).insert(number, ((*vm).clone(), forgotten));
        }
    };
    thread::scope(|scope| {
        for _ in 1..at_a_time {
            // Where the system refuses another thread, there are fewer.
            if thread::Builder::new().name("xofs-forget".to_owned()).spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let vms = done.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect();
    Applied { vms, is_stopped: is_stopped.load(Ordering::Relaxed), transfer: transfer.reading() }
}

fn forget(
    manner: &Manner,
    jobs: usize,
    storage: &Arc<dyn WritableStorage>,
    vm: &Vm,
    choose: &Choose,
    is_stopped: &AtomicBool,
    (progress, waits): (&Mutex<Progress>, &Probe),
) -> Result<Forgotten> {
    let name = if vm.name.is_empty() { vm.id.as_str() } else { &vm.name };
    let lock = waits.take(|| open::lock(storage, &vm.id, name, manner.wait, is_stopped))?;
    let threads = if storage.capabilities().is_remote { THREADS_REMOTE } else { THREADS_LOCAL };
    let with_progress = |act: &dyn Fn(&mut Progress)| act(&mut progress.lock().unwrap_or_else(PoisonError::into_inner));
    let watch = Watch {
        threads,
        jobs,
        planned: &|blocks| with_progress(&|progress| progress.expect(blocks * BLOCK)),
        moved: &|blocks| {
            let times = Times { reading: Duration::MAX, ..Times::default() };
            with_progress(&|progress| progress.advance(blocks * BLOCK, times));
        },
        is_stopped: &|| is_stopped.load(Ordering::Relaxed),
    };
    Ok(merge::forget(&lock, choose, &watch)?)
}

/// Says what to do, if the place is full.
fn explain(storage: &dyn WritableStorage, error: anyhow::Error) -> anyhow::Error {
    match (error.downcast_ref::<Error>(), storage.room()) {
        (Some(failed), Ok(room)) if failed.kind() == ErrorKind::Unavailable && room.is_full() => {
            let message = format!("{failed}; the place is full: make room, and run it again, which goes on from here");
            Error::new(ErrorKind::Unavailable, message).into()
        }
        _ => error,
    }
}

impl Applied {
    /// Returns, if there is one VM and nothing could be done to it, why.
    pub fn or_its_error(mut self) -> Result<Self> {
        if let [(_, Err(_))] = self.vms.as_slice() {
            if let Some((_, Err(error))) = self.vms.pop() {
                return Err(error);
            }
        }
        Ok(self)
    }

    /// Returns how the command ends.
    pub fn exit(&self) -> Exit {
        if self.is_stopped {
            return Exit::Interrupted;
        }
        let is_whole = |done: &Result<Forgotten>| {
            done.as_ref().is_ok_and(|done| done.refused.is_empty() && done.problems.is_empty())
        };
        if self.vms.iter().all(|(_, done)| is_whole(done)) { Exit::Done } else { Exit::Partial }
    }

    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let (mut backups, mut merged, mut blocks) = (0, 0, 0);
        for (vm, done) in &self.vms {
            let name = if vm.name.is_empty() { vm.id.as_str() } else { &vm.name };
            // Writing to a String cannot fail.
            match done {
                Ok(done) => {
                    for (time, reason) in &done.refused {
                        let _ = writeln!(text, "not forgotten: {}/{time}: {}", Shown(name), Shown(reason));
                    }
                    for (path, reason) in &done.problems {
                        let _ = writeln!(text, "left as it is: {}: {}", Shown(path.as_str()), Shown(reason));
                    }
                    backups += done.backups.len();
                    merged += done.merged;
                    blocks += done.blocks;
                }
                Err(error) => {
                    let _ = writeln!(text, "not forgotten: {}: {}", Shown(name), Shown(&format!("{error:#}")));
                }
            }
        }
        let merged = count(usize::try_from(merged).unwrap_or(usize::MAX), "disk");
        let end = if self.is_stopped { "; interrupted: run it again to go on" } else { "" };
        let _ = writeln!(text, "{} forgotten, {merged} merged ({blocks} blocks){end}", count(backups, "backup"));
        if backups > 0 || blocks > 0 {
            let _ = writeln!(text, "{}", Shown(&self.transfer.bottleneck().line()));
        }
        text
    }

    pub fn to_json(&self) -> Value {
        let of_vm = |(vm, done): &(Vm, Result<Forgotten>)| match done {
            Ok(done) => json!({
                "uuid": vm.id.as_str(),
                "name": vm.name,
                "forgotten": done.backups.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "mergedDisks": done.merged,
                "movedBlocks": done.blocks,
                "refused": done.refused.iter().map(|(time, reason)| json!({ "time": time.to_string(), "reason": reason }))
                    .collect::<Vec<_>>(),
                "problems": done.problems.iter().map(|(path, reason)| json!({ "path": path.as_str(), "reason": reason }))
                    .collect::<Vec<_>>(),
                "error": null,
            }),
            Err(error) => json!({
                "uuid": vm.id.as_str(),
                "name": vm.name,
                "error": format!("{error:#}"),
                "exitCode": exit::of(error) as u8,
            }),
        };
        json!({ "vms": self.vms.iter().map(of_vm).collect::<Vec<_>>(), "interrupted": self.is_stopped, "transfer": probe::transfer_to_json(&self.transfer) })
    }
}
