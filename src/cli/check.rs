//! `xofs check`: what is damaged, which backups suffer from it and which stay good, and what lies around. Writes nothing but
//! digests, if asked to.
//!
//! Structure: every disk of every backup is opened, which verifies its chain; of every flat layer the last sector of
//! each stored block is read, which finds files cut short; of exploded layers the block files are listed. With
//! `--data` every stored byte is read, decompressed and authenticated instead, and compared with its digest where one is known.
//! What belongs to no backup or hinders Xen Orchestra is what [`doctor`] finds.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use crossbeam::channel;
use disk::Disk;
use serde_json::json;
use storage::{ObjectPath, WritableStorage};
use vhd::{BlockIndex, ChainDigests, Digest, Filter, Format, LayerInfo};

use super::exit::Exit;
use super::export::progress::Progress;
use super::text::{Shown, count, size};
use super::{Global, open, print};
use crate::ahead::{PIECE, THREADS, Times};
use crate::doctor::{self, Explanation, Include, Kind};
use crate::repository::{
    Backup, BackupDisk, DiskSource, ErrorKind, Layout, LooseDisk, MissingBlock, Mode, ProblemKind, Repository,
    Selection, Vm, VmId, VmLock,
};

const EXAMPLES: &str = "\
Examples:
  xofs check /srv/backups
  xofs check main web01/latest --data

--data also compares blocks with the digests (SHA-256) that 'xofs ingest' stored beside them: a block that differs is not \
what was written. --digest-missing makes the digests of what has none, as it is now; Xen Orchestra does not look at them.

What belongs to no backup, or is left over, is no damage: it is listed, and xofs repair says what can be done about it.

Ends with 13 if damage was found, else with 3 if something could not be checked. Writes nothing, but for --digest-missing.";

/// Checks the structure of backups, or every stored byte, and says what each fault costs
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs check [OPTIONS] [REPO] [WHAT]")]
pub struct CheckArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and VM[/BACKUP[/DISK]] to check only that
    #[arg(num_args = 0..=2, value_names = ["REPO", "WHAT"])]
    names: Vec<OsString>,
    /// Reads every stored byte
    #[arg(long)]
    data: bool,
    /// Stores the digests of blocks that have none, for later checks and ingests
    #[arg(long, requires = "data")]
    digest_missing: bool,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long)]
    progress: bool,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// What is wrong with what, and who suffers.
#[derive(Default)]
struct Findings {
    /// In the order they were found in: a parent's before those of its children.
    faults: Vec<Fault>,
    /// The paths that were told already, also those of children whose fault is that of a parent.
    told: BTreeSet<String>,
    /// How often something was added that costs a disk or a backup.
    costs: usize,
    /// The backups that nothing is wrong with, and how many there are, by VM.
    good: BTreeMap<String, (Vec<String>, usize)>,
    /// What is no damage, and whether it is planned to do something about it.
    others: Vec<(Explanation, bool)>,
    backups: usize,
    disks: usize,
    bytes: u64,
    digests: Digested,
}

/// One cause.
struct Fault {
    path: String,
    reason: String,
    /// The reason with its file.
    message: String,
    /// Else it could not be checked.
    is_damage: bool,
    disks: BTreeSet<String>,
    /// Backups that cannot be read as such, whatever their disks are.
    backups: BTreeSet<String>,
}

impl Fault {
    /// Whether a disk at `path` that fails with `reason` suffers from this. An error that came up through the children
    /// of a chain ends with what its parent said; all of a chain lie in one folder.
    fn explains(&self, path: &str, reason: &str, message: &str) -> bool {
        let folder = |path: &str| path.rsplit_once('/').map(|(folder, _)| folder.to_owned());
        let is_inherited = reason.len() > self.reason.len() && reason.ends_with(&self.reason);
        message == self.message || path != self.path && is_inherited && folder(path) == folder(&self.path)
    }

    /// Says who suffers; a thousand names say no more than the first ones.
    fn costs(&self) -> String {
        let of = |names: &BTreeSet<String>, what: &str| {
            let first = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = if names.len() > 8 { ", ..." } else { "" };
            (!names.is_empty()).then(|| format!("{}: {first}{more}", count(names.len(), what)))
        };
        let all: Vec<String> = [of(&self.backups, "backup"), of(&self.disks, "disk")].into_iter().flatten().collect();
        if all.is_empty() { String::new() } else { format!("; costs {}", all.join(", ")) }
    }
}

/// Who suffers from a fault.
enum Cost {
    Disk(String),
    Backup(String),
    Nobody,
}

impl Findings {
    fn add(&mut self, path: &str, reason: &str, is_damage: bool, cost: Cost) {
        // Errors name their file first; the line does so already.
        let message = if reason.starts_with('\'') { reason.to_owned() } else { format!("'{path}': {reason}") };
        let reason = reason.strip_prefix(&format!("'{path}': ")).unwrap_or(reason);
        self.told.insert(path.to_owned());
        // The nearest cause is the one that was found last.
        let known = self.faults.iter().rposition(|fault| fault.explains(path, reason, &message));
        let at = known.unwrap_or_else(|| {
            let (path, reason) = (path.to_owned(), reason.to_owned());
            let (disks, backups) = Default::default();
            self.faults.push(Fault { path, reason, message, is_damage, disks, backups });
            self.faults.len() - 1
        });
        self.costs += usize::from(!matches!(cost, Cost::Nobody));
        let fault = &mut self.faults[at];
        fault.is_damage |= is_damage;
        match cost {
            Cost::Disk(name) => drop(fault.disks.insert(name)),
            Cost::Backup(name) => drop(fault.backups.insert(name)),
            Cost::Nobody => {}
        }
    }

    fn add_disk_error(&mut self, path: &ObjectPath, error: &disk::Error, owner: &str) {
        // A backup that was removed meanwhile is no fault.
        if error.kind() != disk::ErrorKind::Stale {
            let is_damage = error.kind() == disk::ErrorKind::Damaged;
            self.add(&path.to_string(), &error.to_string(), is_damage, Cost::Disk(owner.to_owned()));
        }
    }

    /// Whether a disk fails for what is at `path`, or for what `message` says.
    fn has(&self, path: &str, message: &str) -> bool {
        self.told.contains(path) || self.faults.iter().any(|fault| fault.message == message)
    }
}

/// Runs the command.
///
/// # Errors
/// If the repository cannot be opened or listed.
pub fn run(global: &Global, arguments: &CheckArgs) -> Result<Exit> {
    let (address, what) = open::split_names(global, &arguments.names);
    let place = open::place(global, address)?;
    let (repository, storage) = if arguments.digest_missing {
        let (repository, storage) = open::both(global, &place, open::SMALL_CACHE)?;
        (repository, Some(storage))
    } else {
        (open::repository(global, &place, open::SMALL_CACHE)?, None)
    };
    let what = open::text_of(what)?;
    let progress = Progress::new("check", 0, arguments.progress);
    let mut check = Check {
        repository: &repository,
        is_data: arguments.data,
        storage,
        findings: Findings::default(),
        progress,
        all_disks: 1,
    };
    if what.is_empty() {
        check.everything()?;
    } else {
        match repository.select(&what)? {
            Selection::Vm(vm) => {
                let backups = repository.backups(&vm.id)?;
                check.all_disks = backups.iter().map(|backup| backup.disks.len()).sum();
                backups.iter().for_each(|backup| check.backup(&vm.name, backup));
                check.surroundings(&vm);
            }
            Selection::Backup(vm, backup) => {
                check.all_disks = backup.disks.len();
                check.backup(&vm.name, &backup);
            }
            Selection::Disk(vm, backup, disk) => {
                check.findings.backups += 1;
                check.backup_disk(&vm.name, &backup, &disk);
            }
            Selection::Loose(disk) => check.loose(&disk),
        }
    }
    // The bar goes before what was found is printed.
    let Check { mut findings, progress, .. } = check;
    drop(progress);
    report(&place.name, &mut findings, arguments)
}

fn report(repository: &str, findings: &mut Findings, arguments: &CheckArgs) -> Result<Exit> {
    findings.faults.sort_by(|a, b| (&a.path, &a.reason).cmp(&(&b.path, &b.reason)));
    let damages = findings.faults.iter().filter(|fault| fault.is_damage).count();
    let unknown = findings.faults.len() - damages;
    if arguments.json {
        let faults = findings.faults.iter().map(|fault| {
            json!({
                "path": fault.path,
                "message": fault.reason,
                "isDamage": fault.is_damage,
                "disks": fault.disks,
                "backups": fault.backups,
            })
        });
        print::json(&json!({
            "repository": repository,
            "backups": findings.backups,
            "disks": findings.disks,
            "bytesRead": findings.bytes,
            "blocksCompared": findings.digests.compared,
            "digestsMade": arguments.digest_missing.then_some(findings.digests.made),
            "notes": findings.digests.notes.iter().map(|(path, message)| json!({"path": path, "message": message}))
                .collect::<Vec<_>>(),
            "faults": faults.collect::<Vec<_>>(),
            "good": findings.good.iter().flat_map(|(vm, (good, _))| good.iter().map(move |time| format!("{vm}/{time}")))
                .collect::<Vec<_>>(),
            "findings": findings.others.iter().map(|(found, is_planned)| json!({
                "kind": found.kind,
                "path": found.path,
                "message": found.message,
                "backups": found.backups,
                "isRepairable": is_planned,
            })).collect::<Vec<_>>(),
        }))?;
    } else {
        for fault in &findings.faults {
            let sort = if fault.is_damage { "damaged" } else { "unchecked" };
            let (path, reason, costs) = (Shown(&fault.path), Shown(&fault.reason), fault.costs());
            print::text(&format!("{sort}: {path}: {reason}{}\n", Shown(&costs)))?;
        }
        for (path, message) in &findings.digests.notes {
            print::text(&format!("note: {}: {}\n", Shown(path), Shown(message)))?;
        }
        for (vm, (good, all)) in findings.good.iter().filter(|(_, (good, all))| good.len() < *all) {
            let first = good.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = if good.len() > 8 { ", ..." } else { "" };
            let which = if good.is_empty() { String::new() } else { format!(": {first}{more}") };
            print::text(&format!("good: {}: {} of {}{which}\n", Shown(vm), good.len(), count(*all, "backup")))?;
        }
        for (found, _) in &findings.others {
            print::text(&format!("{}: {}: {}\n", found.kind, Shown(&found.path), Shown(&found.message)))?;
        }
        let repairable = findings.others.iter().filter(|(_, is_planned)| *is_planned).count();
        let others = match repairable {
            0 => String::new(),
            some => format!("; {some} to tidy up: xofs repair"),
        };
        let mut read = if arguments.data { format!(", {} read", size(findings.bytes)) } else { String::new() };
        read += &findings.digests.to_text(arguments.digest_missing);
        print::text(&format!(
            "{}, {}{read}: {}{}{others}\n",
            count(findings.backups, "backup"),
            count(findings.disks, "disk"),
            if damages == 0 { "no damage found".to_owned() } else { count(damages, "fault") },
            if unknown == 0 { String::new() } else { format!(", {unknown} could not be checked") },
        ))?;
    }
    Ok(match (damages, unknown) {
        (0, 0) => Exit::Done,
        (0, _) => Exit::Partial,
        _ => Exit::Damaged,
    })
}

struct Check<'a> {
    repository: &'a Repository,
    is_data: bool,
    /// To store digests in.
    storage: Option<Arc<dyn WritableStorage>>,
    findings: Findings,
    progress: Progress,
    /// How many disks there are to be checked.
    all_disks: usize,
}

impl Check<'_> {
    fn everything(&mut self) -> Result<()> {
        let vms = self.repository.vms()?;
        let listed = vms.iter().filter_map(|vm| self.repository.backups(&vm.id).ok());
        let of_backups: usize =
            listed.map(|backups| backups.iter().map(|backup| backup.disks.len()).sum::<usize>()).sum();
        self.all_disks = of_backups + self.repository.loose_disks()?.len();
        for vm in vms.iter() {
            match self.repository.backups(&vm.id) {
                Ok(backups) => backups.iter().for_each(|backup| self.backup(&vm.name, backup)),
                Err(error) => {
                    let folder = format!("xo-vm-backups/{}", vm.id);
                    self.findings.add(&folder, &error.to_string(), false, Cost::Nobody);
                }
            }
        }
        if self.repository.layout() == Layout::Repository {
            doctor::vms(self.repository)?.iter().for_each(|vm| self.surroundings(vm));
        }
        for disk in self.repository.loose_disks()?.iter() {
            self.loose(disk);
        }
        if self.repository.layout() == Layout::Repository {
            let mut all = Vec::new();
            for (folder, listed) in [
                ("xo-config-backups", self.repository.config_backups()),
                ("xo-pool-metadata-backups", self.repository.pool_backups()),
            ] {
                match listed {
                    Ok(backups) => all.extend(backups),
                    Err(error) => self.findings.add(folder, &error.to_string(), false, Cost::Nobody),
                }
            }
            for stored in &all {
                self.findings.backups += 1;
                for (name, _) in stored.files.iter().filter(|_| self.is_data) {
                    let read = stored
                        .directory
                        .join(name)
                        .map_err(Into::into)
                        .and_then(|path| self.repository.read_stored(&path));
                    match read {
                        Ok(bytes) => self.findings.bytes += u64::try_from(bytes.len()).unwrap_or(u64::MAX),
                        Err(error) => {
                            let path = format!("{}/{name}", stored.directory);
                            let is_damage = error.kind() == ErrorKind::Damaged;
                            let owner = Cost::Backup(stored.directory.to_string());
                            self.findings.add(&path, &error.to_string(), is_damage, owner);
                        }
                    }
                }
            }
        }
        for problem in self.repository.problems() {
            // What was found while opening disks is in the findings already, with what it costs.
            let path = problem.path.to_string();
            if !self.findings.has(&path, &problem.message) {
                let is_damage = problem.kind == ProblemKind::Metadata;
                let cost = problem.backup.map_or(Cost::Nobody, |id| Cost::Backup(id.to_string()));
                self.findings.add(&path, &problem.message, is_damage, cost);
            }
        }
        Ok(())
    }

    /// Notes what the doctor finds in the folder of a VM, unless it is told with the backups that suffer from it.
    fn surroundings(&mut self, vm: &Vm) {
        let plan = doctor::examine(self.repository, None, vm, Include::default());
        for said in plan.explanations {
            match said.kind {
                Kind::BrokenBackup | Kind::DamagedBackup | Kind::UnknownMetadata => {}
                Kind::Unread if self.findings.has(&said.path, &said.message) => {}
                Kind::Unread => self.findings.add(&said.path, &said.message, false, Cost::Nobody),
                _ => self.findings.others.push((said, false)),
            }
        }
        for action in plan.actions {
            let path = action.paths.into_iter().next().unwrap_or_default();
            let (kind, message, backups) = (action.kind, action.reason, action.backups);
            self.findings.others.push((Explanation { kind, path, message, backups }, true));
        }
    }

    fn backup(&mut self, vm: &str, backup: &Backup) {
        self.findings.backups += 1;
        let costs = self.findings.costs;
        self.backup_and_disks(vm, backup);
        let is_good = self.findings.costs == costs && backup.problem.is_none();
        let (good, all) = self.findings.good.entry(vm.to_owned()).or_default();
        *all += 1;
        good.extend(is_good.then(|| backup.time.to_string()));
    }

    fn backup_and_disks(&mut self, vm: &str, backup: &Backup) {
        for disk in &backup.disks {
            self.backup_disk(vm, backup, disk);
        }
        // What keeps its disks from being read was told with them.
        let metadata = backup.metadata.to_string();
        if let Some(problem) = backup.problem.as_ref().filter(|problem| !self.findings.has(&metadata, problem)) {
            let is_damage = backup.mode == Mode::Unreadable;
            self.findings.add(&metadata, problem, is_damage, Cost::Backup(format!("{vm}/{}", backup.time)));
        }
    }

    fn backup_disk(&mut self, vm: &str, backup: &Backup, disk: &BackupDisk) {
        let owner = format!("{vm}/{}/{}", backup.time, disk.name);
        let path = match &disk.source {
            DiskSource::Vhd(path) | DiskSource::Xva { path, .. } => path,
            DiskSource::Unusable(_) => &backup.metadata,
        };
        self.findings.disks += 1;
        self.begin(&owner, 0);
        let opened = self.repository.open_disk(backup, disk);
        let repository = self.repository;
        let layers = opened.as_ref().map_or(Ok(Vec::new()), |_| repository.chain(backup, disk));
        let digests = self.digests(&opened, || repository.digests(backup, disk), Some(&backup.vm));
        self.disk(path, &owner, opened, layers, digests, || repository.missing_blocks(backup, disk));
    }

    fn loose(&mut self, disk: &LooseDisk) {
        self.findings.disks += 1;
        self.begin(&disk.name, 0);
        let opened = self.repository.open_loose(disk);
        let repository = self.repository;
        let layers = opened.as_ref().map_or(Ok(Vec::new()), |_| repository.loose_chain(disk));
        let digests = self.digests(&opened, || repository.loose_digests(disk), None);
        self.disk(&disk.path, &disk.name, opened, layers, digests, || repository.missing_loose_blocks(disk));
    }

    /// Says which disk comes now, and how many of its bytes are read.
    fn begin(&mut self, owner: &str, total: u64) {
        let what = format!("check of disk {} of {}, {}", self.findings.disks, self.all_disks, Shown(owner));
        self.progress.next(&what, total);
    }

    fn disk(
        &mut self,
        path: &ObjectPath,
        owner: &str,
        opened: disk::Result<Arc<dyn Disk>>,
        layers: disk::Result<Vec<LayerInfo>>,
        digests: Option<DiskDigests>,
        missing: impl FnOnce() -> disk::Result<Vec<MissingBlock>>,
    ) {
        let (opened, layers) = match (opened, layers) {
            (Ok(opened), Ok(layers)) => (opened, layers),
            (Err(error), _) | (_, Err(error)) => return self.findings.add_disk_error(path, &error, owner),
        };
        if self.is_data {
            self.read(path, owner, &opened, &pieces(opened.as_ref(), PIECE, false), digests.as_ref());
            return self.end_digests(path, digests);
        }
        self.missing(path, missing(), owner);
        let is_encoded =
            layers.iter().any(|layer| matches!(layer.format, Format::Exploded(filter) if filter != Filter::None));
        if !is_encoded {
            let block = layers.iter().map(|layer| layer.block_size).min().unwrap_or(PIECE).max(512);
            self.read(path, owner, &opened, &pieces(opened.as_ref(), block, true), None);
        }
    }

    /// Notes the blocks whose files are missing, per folder.
    fn missing(&mut self, path: &ObjectPath, missing: disk::Result<Vec<MissingBlock>>, owner: &str) {
        let missing = match missing {
            Ok(missing) => missing,
            Err(error) => return self.findings.add_disk_error(path, &error, owner),
        };
        let mut folders: BTreeMap<ObjectPath, Vec<u32>> = BTreeMap::new();
        for (folder, block) in missing {
            folders.entry(folder).or_default().push(block.0);
        }
        for (folder, blocks) in folders {
            // A thousand numbers say no more than the first ones.
            let first: Vec<String> = blocks.iter().take(8).map(u32::to_string).collect();
            let more = if blocks.len() > first.len() { ", ..." } else { "" };
            let reason = format!(
                "{} listed in its table and missing: {}{more}",
                count(blocks.len(), "block file"),
                first.join(", ")
            );
            self.findings.add(&folder.to_string(), &reason, true, Cost::Disk(owner.to_owned()));
        }
    }

    /// Reads pieces with several threads; every piece is tried, the first fault of each kind is kept.
    fn read(
        &mut self,
        path: &ObjectPath,
        owner: &str,
        disk: &Arc<dyn Disk>,
        pieces: &disk::Result<Vec<std::ops::Range<u64>>>,
        digests: Option<&DiskDigests>,
    ) {
        let pieces = match pieces {
            Ok(pieces) => pieces,
            Err(error) => return self.findings.add_disk_error(path, error, owner),
        };
        let total = pieces.iter().map(|piece| piece.end - piece.start).sum();
        self.begin(owner, total);
        let (next, lost) = (AtomicU64::new(0), AtomicU64::new(0));
        let (tell, told) = channel::bounded::<Result<u64, disk::Error>>(4 * THREADS);
        let mut errors: BTreeMap<String, disk::Error> = BTreeMap::new();
        // Reads the next piece; `None` when there is none left.
        let read_next = |buffer: &mut Vec<u8>| {
            let at = usize::try_from(next.fetch_add(1, Ordering::Relaxed)).ok()?;
            let piece = pieces.get(at)?;
            let len = piece.end - piece.start;
            buffer.resize(usize::try_from(len).expect("at most one piece"), 0);
            let read = match digests {
                Some(digests) => digests.read(disk.as_ref(), piece.start, buffer),
                None => disk.read_at(piece.start, buffer),
            };
            let read = read.map(|()| len);
            if read.is_err() {
                lost.fetch_add(len, Ordering::Relaxed);
            }
            Some(read)
        };
        let read_next = &read_next;
        thread::scope(|scope| {
            for _ in 0..THREADS {
                let tell = tell.clone();
                let work = move || {
                    let mut buffer = Vec::new();
                    while let Some(read) = read_next(&mut buffer) {
                        if tell.send(read).is_err() {
                            return;
                        }
                    }
                };
                // Where the system refuses another thread, there are fewer.
                if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            drop(tell);
            // With no thread at all, everything is left to be read here.
            let mut buffer = Vec::new();
            for read in told.into_iter().chain(std::iter::from_fn(|| read_next(&mut buffer))) {
                match read {
                    Ok(len) => {
                        self.findings.bytes += len;
                        self.progress.advance(len, Times { reading: Duration::MAX, ..Times::default() });
                    }
                    // A thousand lost blocks are a thousand lines; the kinds and the first ones say enough.
                    Err(error) if errors.len() < 8 => drop(errors.insert(error.to_string(), error)),
                    Err(_) => {}
                }
            }
        });
        for error in errors.values() {
            self.findings.add_disk_error(path, error, owner);
        }
        let lost = lost.into_inner();
        if lost > 0 && errors.len() == 8 {
            let reason = format!("more of the same: {} cannot be read in all", size(lost));
            self.findings.add(&path.to_string(), &reason, true, Cost::Disk(owner.to_owned()));
        }
    }
}

/// What `--data` did with digests.
#[derive(Default)]
struct Digested {
    compared: u64,
    made: u64,
    /// What is no fault: sidecars that say nothing.
    notes: BTreeSet<(String, String)>,
}

impl Digested {
    fn to_text(&self, is_making: bool) -> String {
        let blocks = |number: u64| count(usize::try_from(number).unwrap_or(usize::MAX), "block");
        let mut text = String::new();
        if self.compared > 0 {
            text += &format!(", {} compared with their digests", blocks(self.compared));
        }
        if is_making {
            text += &format!(", digests of {} made", blocks(self.made));
        }
        text
    }
}

/// The digests of a disk that is read.
struct DiskDigests {
    chain: ChainDigests,
    /// The VM, if those that are missing are made.
    vm: Option<VmId>,
    compared: AtomicU64,
}

impl DiskDigests {
    /// Reads a piece; a block of which the digest is known must have it.
    fn read(&self, disk: &dyn Disk, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let block_size = self.chain.block_size();
        let index = u32::try_from(offset / block_size.bytes()).ok().map(BlockIndex);
        let is_block = offset.is_multiple_of(block_size.bytes()) && buffer.len() == block_size.len();
        let Some(index) = index.filter(|_| is_block) else { return disk.read_at(offset, buffer) };
        let unread = if self.vm.is_some() { self.chain.look(index) } else { None };
        disk.read_at(offset, buffer)?;
        let known = self.chain.of_copy(index);
        if known.is_none() && unread.is_none() {
            return Ok(());
        }
        let found = Digest::of(buffer, block_size);
        if let Some(known) = known {
            self.compared.fetch_add(1, Ordering::Relaxed);
            if known != found {
                let holder = self.chain.holder(index).map(ToString::to_string).unwrap_or_default();
                let message = format!("'{holder}': block {}: its bytes are not those that were written", index.0);
                return Err(disk::Error::new(disk::ErrorKind::Damaged, message));
            }
        }
        if let Some(unread) = unread {
            self.chain.note(&unread, found);
        }
        Ok(())
    }
}

impl Check<'_> {
    /// Returns the digests of a disk that is about to be read.
    fn digests(
        &mut self,
        opened: &disk::Result<Arc<dyn Disk>>,
        load: impl FnOnce() -> disk::Result<Option<ChainDigests>>,
        vm: Option<&VmId>,
    ) -> Option<DiskDigests> {
        if !self.is_data || opened.is_err() {
            return None;
        }
        // Why it cannot be opened is told with the disk. The pieces that are read are blocks of the usual size.
        let chain = load().ok().flatten()?;
        let notes = chain.problems().iter().map(|(path, message)| (path.to_string(), message.clone()));
        self.findings.digests.notes.extend(notes);
        let vm = vm.filter(|_| self.storage.is_some()).cloned();
        Some(DiskDigests { chain, vm, compared: AtomicU64::new(0) })
    }

    /// Stores what was made while a disk was read.
    fn end_digests(&mut self, path: &ObjectPath, digests: Option<DiskDigests>) {
        /// How long who works on the VM is waited for: as an ingest does.
        const PATIENCE: Duration = Duration::from_secs(60);
        let Some(digests) = digests else { return };
        self.findings.digests.compared += digests.compared.into_inner();
        let (Some(storage), Some(vm)) = (&self.storage, digests.vm.filter(|_| digests.chain.has_made())) else {
            return;
        };
        let stored = VmLock::take(storage.clone(), &vm, PATIENCE, |_| true).and_then(|lock| {
            lock.check()?;
            Ok(digests.chain.publish(storage).map_err(disk::Error::from)?)
        });
        match stored {
            Ok(made) => self.findings.digests.made += made,
            Err(error) => {
                let message = format!("the digests of its blocks were not stored: {error}");
                self.findings.add(&path.to_string(), &message, false, Cost::Nobody);
            }
        }
    }
}

/// Cuts the data of a disk into pieces of `block` bytes; only the last sector of each if `is_probe`.
fn pieces(disk: &dyn Disk, block: u64, is_probe: bool) -> disk::Result<Vec<std::ops::Range<u64>>> {
    let mut pieces = Vec::new();
    for range in disk::data_ranges(disk) {
        let range = range?;
        let mut at = range.start;
        while at < range.end {
            let end = (at / block + 1).saturating_mul(block).min(range.end);
            pieces.push(if is_probe { at.max(end.saturating_sub(512))..end } else { at..end });
            at = end;
        }
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_suffer_from_the_fault_of_their_parent_and_have_their_own() {
        let mut findings = Findings::default();
        for (path, message) in [
            ("vdis/1.vhd", "'vdis/1.vhd': cannot open it"),
            ("vdis/2.vhd", "'vdis/2.vhd': its parent '1.vhd' cannot be opened: cannot open it"),
            ("vdis/3.vhd", "'vdis/2.vhd': its parent '1.vhd' cannot be opened: cannot open it"),
            ("vdis/4.vhd", "'vdis/4.vhd': cannot open it"),
            ("vdis/5.vhd", "'vdis/5.vhd': its parent '4.vhd' cannot be opened: cannot open it"),
            ("other/6.vhd", "'other/6.vhd': its parent '5.vhd' cannot be opened: cannot open it"),
            ("vdis/7.vhd", "'vdis/data/7.vhd': block 1: its file is missing"),
            ("vdis/8.vhd", "'vdis/data/7.vhd': block 1: its file is missing"),
        ] {
            findings.add(path, message, true, Cost::Disk(path.to_owned()));
        }
        let costs: Vec<(&str, String)> =
            findings.faults.iter().map(|fault| (fault.path.as_str(), fault.costs())).collect();
        let expected = [
            ("vdis/1.vhd", "; costs 3 disks: vdis/1.vhd, vdis/2.vhd, vdis/3.vhd"),
            ("vdis/4.vhd", "; costs 2 disks: vdis/4.vhd, vdis/5.vhd"),
            ("other/6.vhd", "; costs 1 disk: other/6.vhd"),
            ("vdis/7.vhd", "; costs 2 disks: vdis/7.vhd, vdis/8.vhd"),
        ];
        assert_eq!(costs, expected.map(|(path, costs)| (path, costs.to_owned())));
    }
}
