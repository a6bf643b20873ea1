//! What is wrong in the folder of a VM, what that costs, and what may be done about it: a judgement of a [`Survey`], which
//! reads nothing but the facts of what is to be moved.
//!
//! | where                                        | nothing is moved but                             |
//! |----------------------------------------------|--------------------------------------------------|
//! | something cannot be read                     | nothing                                          |
//! | another program works on the VM              | nothing                                          |
//! | metadata of a backup is not understood       | nothing                                          |
//! | no backup is left                            | nothing                                          |
//! | a merge has begun in the folder of a disk    | nothing in that folder: the merge is finished    |
//! | a needed image there is lost or is there twice | leftovers in that folder                       |

use std::collections::{BTreeMap, BTreeSet};

use storage::{ObjectPath, Storage, UNPUBLISHED};
use uuid::Uuid;

use super::facts::{Fact, Facts};
use super::needed::{Needed, is_lost};
use super::plan::{Act, Action, Explanation, Include, Kind, VmPlan};
use super::survey::{CACHE, Health, Image, Lineage, Seen, Survey, is_metadata};
use super::unclaimed::{Unclaimed, is_there, paths_of};
use crate::merge::{Begun, disks_of, note_of};
use crate::repository::{Backup, BackupTime, Mode, Result, Vm, VmFolder};

/// Longest state file of a merge that is read (bytes).
const STATE_LIMIT: u64 = 1 << 20;

/// Judges what a survey found.
pub(super) fn diagnose(storage: &dyn Storage, vm: &Vm, survey: &Survey, include: Include) -> Result<VmPlan> {
    let mut diagnosis =
        Diagnosis { storage, survey, needed: Needed::of(survey), actions: Vec::new(), said: Vec::new() };
    diagnosis.backups();
    let is_judged = diagnosis.is_metadata_known();
    if is_judged {
        for lineage in &survey.lineages {
            diagnosis.lineage(lineage)?;
        }
        diagnosis.folder()?;
        if include.broken_backups {
            diagnosis.broken_backups()?;
        }
    }
    // Those that go on with something come last: what is moved rests on facts that a merge changes.
    diagnosis.actions.sort_by_key(|action| action.act == Act::FinishMerge);
    for (number, action) in diagnosis.actions.iter_mut().enumerate() {
        let digits: String = vm.id.as_str().chars().filter(|digit| *digit != '-').take(8).collect();
        action.id = format!("{digits}-{}", number + 1);
    }
    let is_good = |backup: &&std::sync::Arc<Backup>| matches!(survey.health.get(&backup.time), Some(Health::Good));
    Ok(VmPlan {
        uuid: vm.id.as_str().to_owned(),
        name: vm.name.clone(),
        good: survey.backups.iter().filter(is_good).map(|backup| backup.time.to_string()).collect(),
        facts: survey.facts.clone(),
        actions: diagnosis.actions,
        explanations: diagnosis.said,
    })
}

struct Diagnosis<'a> {
    storage: &'a dyn Storage,
    survey: &'a Survey,
    needed: Needed<'a>,
    actions: Vec<Action>,
    said: Vec<Explanation>,
}

impl<'a> Diagnosis<'a> {
    fn say(&mut self, kind: Kind, path: &ObjectPath, message: impl Into<String>, backups: Vec<String>) {
        self.said.push(Explanation { kind, path: path.to_string(), message: message.into(), backups });
    }

    /// Plans to move `paths` to the trash.
    fn trash(&mut self, kind: Kind, paths: Vec<ObjectPath>, reason: impl Into<String>) -> Result<()> {
        self.plan(kind, Act::Trash, paths, reason.into(), Vec::new())
    }

    fn plan(
        &mut self,
        kind: Kind,
        act: Act,
        paths: Vec<ObjectPath>,
        reason: String,
        backups: Vec<String>,
    ) -> Result<()> {
        let mut facts = Facts::new();
        for path in &paths {
            let fact = Fact::look(self.storage, path)?;
            let is_image = fact.names.as_ref().is_some_and(|names| names.iter().any(|name| name == "bat"));
            for name in ["footer", "header", "bat"].iter().filter(|_| is_image) {
                let part = path.join(name)?;
                match Fact::look(self.storage, &part) {
                    Ok(found) => drop(facts.insert(part.to_string(), found)),
                    Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            }
            facts.insert(path.to_string(), fact);
        }
        let paths = paths.iter().map(ToString::to_string).collect();
        self.actions.push(Action { id: String::new(), kind, act, paths, reason, backups, facts });
        Ok(())
    }

    /// Says which backups are lost, and which in part.
    fn backups(&mut self) {
        let unknown = self.survey.unknown_metadata().map(|(path, _)| path);
        // What is told of its metadata says enough.
        for backup in self.survey.backups.iter().filter(|backup| unknown.as_ref() != Some(&backup.metadata)) {
            let (kind, message) = match self.survey.health.get(&backup.time) {
                Some(Health::Lost(why)) if self.is_merging(backup) => {
                    let end = "It cannot be read before the merge in the folder of its disk is finished";
                    (Kind::DamagedBackup, format!("{why}. {end}"))
                }
                Some(Health::Lost(why)) if is_lost(self.survey, backup) => {
                    let end = "'xofs repair --include broken-backups' plans to move it to the trash";
                    (Kind::BrokenBackup, format!("nothing of this backup can be read: {why}. {end}"))
                }
                Some(Health::Lost(why)) => {
                    let end = "All of its images are there, and contradict each other: nothing is planned";
                    (Kind::DamagedBackup, format!("{why}. {end}"))
                }
                Some(Health::Partly(why)) => {
                    let end = "Xen Orchestra's cleaner may delete all of this backup for it: copy what you need with 'xofs export'";
                    (Kind::DamagedBackup, format!("{why}. {end}"))
                }
                _ => continue,
            };
            self.say(kind, &backup.metadata, message, vec![backup.time.to_string()]);
        }
    }

    /// Whether a merge has begun in a folder that a disk of it is in.
    fn is_merging(&self, backup: &Backup) -> bool {
        let in_merge = |disk: &ObjectPath| {
            self.survey.lineages.iter().any(|lineage| lineage.path == disk.parent() && !lineage.merges.is_empty())
        };
        disks_of(backup).any(in_merge)
    }

    /// Whether it is known of every backup which disks it needs; says why not.
    fn is_metadata_known(&mut self) -> bool {
        let has_disks = self.survey.lineages.iter().any(|lineage| !lineage.entries.is_empty());
        if let Some((path, why)) = self.survey.unknown_metadata() {
            let message = format!(
                "{why}. Nobody knows which disks it needs, so nothing of its VM is judged: restore the file, or move it out of \
                 the repository. Xen Orchestra's cleaner deletes it, and the disks with it"
            );
            let backup = BackupTime::of_metadata_name(path.file_name()).map(|time| time.to_string());
            self.say(Kind::UnknownMetadata, &path, message, backup.into_iter().collect());
            return false;
        }
        if self.survey.backups.is_empty() {
            if has_disks {
                let message = "no backup of this VM is left, and its disks are: they may be all that is left of it, so nothing \
                               is planned; 'xofs info' and 'xofs export' read a folder of disks without metadata";
                self.say(Kind::NoBackups, &self.survey.folder, message, Vec::new());
            }
            return false;
        }
        true
    }

    /// Judges what is in the folder of a disk.
    fn lineage(&mut self, lineage: &'a Lineage) -> Result<()> {
        if !lineage.merges.is_empty() {
            return self.merges(lineage);
        }
        self.leftovers(&lineage.entries)?;
        self.leftovers(lineage.data.as_deref().unwrap_or_default())?;
        self.branches(lineage);
        let mut unclaimed = Unclaimed::of(self.survey, &self.needed, lineage);
        if let Some(why) = self.needed.unjudged.get(&lineage.path).cloned() {
            if !unclaimed.is_empty() {
                let message = format!(
                    "{why}. What else is in its folder and belongs to no backup may be what is missing, and stays: {}",
                    first(unclaimed.paths().map(ObjectPath::file_name))
                );
                self.say(Kind::Unjudged, &lineage.path, message, Vec::new());
            }
            return Ok(());
        }
        if self.survey.images().any(|image| image.data.is_none()) {
            // An alias that says nothing may have led to it.
            unclaimed.dangling.clear();
        }
        self.dead_ingests(lineage, &mut unclaimed)?;
        for group in unclaimed.take_orphans() {
            let names = first(group.iter().map(|image| image.name.file_name()));
            let why = match &group[0].links {
                Err(error) => format!(", and it cannot be opened: {error}"),
                Ok(_) => String::new(),
            };
            let reason = format!("no backup names {names}, and nothing a backup needs is built on it{why}");
            let paths = group.iter().flat_map(|image| paths_of(image, lineage)).collect();
            self.trash(Kind::OrphanDisk, paths, reason)?;
        }
        for image in std::mem::take(&mut unclaimed.dead_aliases) {
            let why = image.links.as_ref().err().map_or_else(String::new, ToString::to_string);
            let empty = if image.data.is_none() {
                "; left there, Xen Orchestra may delete the whole folder for it"
            } else {
                ""
            };
            let reason = format!("the alias leads nowhere, and no backup names it: {why}{empty}");
            self.trash(Kind::DeadAlias, vec![image.name.clone()], reason)?;
        }
        for path in std::mem::take(&mut unclaimed.dangling) {
            let reason = "no alias leads to this data, so no backup has it".to_owned();
            self.trash(Kind::DanglingData, vec![path], reason)?;
        }
        Ok(())
    }

    /// Plans to finish the merges of a folder; nothing else in it is judged until they are, but what may keep them from it.
    fn merges(&mut self, lineage: &'a Lineage) -> Result<()> {
        if lineage.merges.iter().any(|(_, found)| matches!(found, Some(Err(_)))) {
            self.dead_aliases_beside_merges(lineage)?;
        }
        for (Begun { state, chain }, found) in &lineage.merges {
            let names = |backup: &&std::sync::Arc<Backup>| disks_of(backup).any(|disk| disk.parent() == lineage.path);
            let backups: Vec<String> =
                self.survey.backups.iter().filter(names).map(|backup| backup.time.to_string()).collect();
            match found {
                Some(Ok(blocks)) => {
                    let unsaid = match chain.as_slice() {
                        [] => String::new(),
                        chain => format!(
                            ". Its file is empty, as Xen Orchestra leaves it that is ended while it writes it; it can only be of {}",
                            first(chain.iter().map(String::as_str))
                        ),
                    };
                    let reason = format!(
                        "a merge has begun here and not ended: it is finished ({blocks} blocks at most), which keeps every \
                         backup, while Xen Orchestra may delete some{unsaid}"
                    );
                    let chain = chain.iter().map(|name| lineage.path.join(name));
                    let paths = std::iter::once(Ok(state.clone())).chain(chain).collect::<storage::Result<_>>()?;
                    self.plan(Kind::UnfinishedMerge, Act::FinishMerge, paths, reason, Vec::new())?;
                }
                Some(Err(error)) => {
                    let message = format!(
                        "a merge has begun here, and it cannot be said how to finish it: {error}. Nothing in its folder is \
                         touched. {}",
                        self.advice(lineage, state)
                    );
                    self.say(Kind::UnfinishedMerge, state, message, backups);
                }
                None => {
                    let message = "a merge has begun here and not ended; 'xofs repair' plans to finish it, and so does the next \
                                   'xofs forget --apply'";
                    self.say(Kind::UnfinishedMerge, state, message, backups);
                }
            }
        }
        Ok(())
    }

    /// Plans to move aliases that lead nowhere and that neither a backup nor a merge names: as long as they are there, nobody
    /// knows whether they are built on what the merge takes away.
    fn dead_aliases_beside_merges(&mut self, lineage: &'a Lineage) -> Result<()> {
        let mut states = String::new();
        for (Begun { state, .. }, _) in &lineage.merges {
            match self.storage.read(state, STATE_LIMIT) {
                Ok(bytes) => states.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) if error.kind().is_unavailable() => return Err(error.into()),
                // It says nothing, as below.
                Err(_) => {}
            }
        }
        let is_readable = lineage.merges.iter().all(|(begun, _)| states.contains(base_of(&begun.state)));
        for image in lineage.images.iter().filter(|_| is_readable) {
            let is_dead = vhd::is_alias(image.name.file_name())
                && image.links.as_ref().is_err_and(|error| error.kind() == vhd::ErrorKind::Missing)
                && image.data.as_ref().is_some_and(|data| !is_there(lineage, data));
            let is_named = self.needed.names.contains(&image.name) || states.contains(image.name.file_name());
            if is_dead && !is_named {
                let reason =
                    "the alias leads nowhere, no backup names it, and the merge beside it is not of it".to_owned();
                self.trash(Kind::DeadAlias, vec![image.name.clone()], reason)?;
            }
        }
        Ok(())
    }

    /// What a person can do about a merge that cannot be gone on with.
    fn advice(&self, lineage: &Lineage, state: &ObjectPath) -> &'static str {
        let is_empty =
            lineage.entries.iter().any(|seen| seen.path == *state && seen.stat.is_some_and(|stat| stat.size == 0));
        if is_empty {
            "The file is empty: Xen Orchestra was ended while it wrote it. How far the merge had come is known by nobody, so \
             copy the folder before anything else is tried, and keep Xen Orchestra's jobs of this VM from running"
        } else {
            "Keep Xen Orchestra's jobs of this VM from running until it is understood"
        }
    }

    /// Says where two images are built on one.
    fn branches(&mut self, lineage: &Lineage) {
        let mut children: BTreeMap<Uuid, Vec<&ObjectPath>> = BTreeMap::new();
        for image in &lineage.images {
            if let Some(parent) = image.links.as_ref().ok().and_then(|links| links.parent) {
                children.entry(parent).or_default().push(&image.name);
            }
        }
        let needed: Vec<_> = children
            .into_iter()
            .map(|(parent, children)| {
                let is_needed = |name: &&ObjectPath| self.needed.names.contains(*name);
                (parent, children.into_iter().filter(is_needed).collect::<Vec<_>>())
            })
            .filter(|(_, children)| children.len() > 1)
            .collect();
        for (parent, children) in needed {
            let is_parent = |image: &&Image| image.links.as_ref().is_ok_and(|links| links.uuid == parent);
            let path = lineage.images.iter().find(is_parent).map_or(&lineage.path, |image| &image.name);
            let touched = |backup: &&std::sync::Arc<Backup>| disks_of(backup).any(|disk| children.contains(&disk));
            let backups = self.survey.backups.iter().filter(touched).map(|backup| backup.time.to_string()).collect();
            let message = format!(
                "{} are both built on it. All of them read right, and it will not be merged into either. Xen Orchestra knows \
                 only one and breaks the other when it merges: forget the backups of one side before theirs ('xofs forget'), \
                 or keep them all by keeping the backup they are built on",
                first(children.iter().map(|name| name.file_name()))
            );
            self.say(Kind::Branch, path, message, backups);
        }
    }

    /// Plans to move what was being written and was not published.
    fn leftovers(&mut self, entries: &[Seen]) -> Result<()> {
        for seen in entries.iter().filter(|seen| seen.is_file() && is_temporary(&seen.name)) {
            let reason = "it was being written, and who did is gone: nobody holds the lock of the VM";
            self.trash(Kind::Leftover, vec![seen.path.clone()], reason)?;
        }
        Ok(())
    }

    /// Plans to move what runs of ingest left.
    fn dead_ingests(&mut self, lineage: &Lineage, unclaimed: &mut Unclaimed<'a>) -> Result<()> {
        for seen in &lineage.entries {
            let Some(time) = BackupTime::of_intent_name(&seen.name) else { continue };
            let is_named =
                |disk: &ObjectPath| disk.parent() == lineage.path && disk.file_name().starts_with(&time.stored());
            let is_complete = self.survey.backups.iter().any(|backup| disks_of(backup).any(is_named));
            let is_used = self.needed.names.iter().any(|name| is_named(name));
            let has_metadata = self.survey.backups.iter().any(|backup| backup.time.stored() == time.stored());
            let mut paths = if is_complete { Vec::new() } else { unclaimed.take_of_time(&time.stored(), lineage) };
            if !is_complete && (is_used || has_metadata) {
                // A merge has put what it names to another use, or its backup is another one: all of it stays.
                continue;
            }
            let reason = reason_of_intent(time, is_complete);
            paths.push(seen.path.clone());
            self.trash(Kind::DeadIngest, paths, reason)?;
        }
        Ok(())
    }

    /// Judges what is in the folder of the VM itself.
    fn folder(&mut self) -> Result<()> {
        let survey = self.survey;
        self.leftovers(&survey.entries)?;
        for seen in survey.entries.iter().filter(|seen| seen.is_file()) {
            let Some(time) = BackupTime::of_intent_name(&seen.name) else { continue };
            let reason = reason_of_intent(time, survey.xvas.contains_key(&time));
            self.trash(Kind::DeadIngest, vec![seen.path.clone()], reason)?;
        }
        let note = note_of(&survey.folder);
        match self.storage.stat(&note) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {
                let reason = "a forget noted here what was to go with its backups, and did not end; the next 'xofs forget --apply' of \
                              this VM removes that, and what no backup needs of it is planned for here, too";
                self.trash(Kind::DeadForget, vec![note], reason)?;
            }
        }
        let by_time = survey.backups.iter().map(|backup| format!("{}.xva", backup.time.stored()));
        let named = survey.xvas.values().map(|path| path.file_name().to_owned());
        let claimed: BTreeSet<String> = by_time.chain(named).collect();
        for seen in survey.entries.iter().filter(|seen| seen.is_file() && !seen.name.starts_with('.')) {
            let xva = seen.name.strip_suffix(".checksum").unwrap_or(&seen.name);
            if xva.ends_with(".xva") && !claimed.contains(xva) {
                let reason = "no backup has this name in its metadata, and a full backup is its metadata's alone";
                self.trash(Kind::OrphanXva, vec![seen.path.clone()], reason)?;
            }
        }
        let is_archive = |seen: &&Seen| is_metadata(&seen.name) && !seen.is_folder();
        let names = survey.entries.iter().filter(is_archive).map(|seen| seen.name.clone()).collect();
        if let Some(cache) = survey.entries.iter().find(|seen| seen.name == CACHE && seen.is_file()) {
            if let Some(why) = VmFolder::fault_of_cache(self.storage, &survey.folder, &names)? {
                let reason =
                    format!("the listing cache {why}, and Xen Orchestra believes it; without it, it makes it anew");
                self.trash(Kind::StaleCache, vec![cache.path.clone()], reason)?;
            }
        }
        Ok(())
    }

    /// Plans to move backups of which nothing can be read, each with what is its own.
    fn broken_backups(&mut self) -> Result<()> {
        let survey = self.survey;
        let others = Needed::by(survey, |backup| !is_lost(survey, backup));
        let mut planned = BTreeSet::new();
        // The newest first: what is built on others before these.
        for backup in survey.backups.iter().rev().filter(|backup| is_lost(survey, backup)) {
            if self.is_merging(backup) {
                continue;
            }
            let mut paths = vec![backup.metadata.clone()];
            for name in disks_of(backup).filter(|name| !others.names.contains(name)) {
                let lineage = survey.lineages.iter().find(|lineage| lineage.path == name.parent());
                let image = survey.images().find(|image| image.name == *name);
                if let Some((lineage, image)) = lineage.zip(image) {
                    paths.extend(paths_of(image, lineage).filter(|path| !others.leads_to(survey, path)));
                }
            }
            for seen in survey.entries.iter().filter(|_| backup.mode == Mode::Full) {
                if seen.name == format!("{}.xva.checksum", backup.time.stored()) {
                    paths.push(seen.path.clone());
                }
            }
            let reason =
                "nothing of this backup can be read; it is moved with the disks that no other backup needs".to_owned();
            paths.retain(|path| planned.insert(path.clone()));
            self.plan(Kind::BrokenBackup, Act::Trash, paths, reason, vec![backup.time.to_string()])?;
        }
        Ok(())
    }
}

/// Returns the name of the image that a merge goes into, by the name of its state file.
fn base_of(state: &ObjectPath) -> &str {
    state.file_name().trim_start_matches('.').trim_end_matches(".merge.json")
}

fn reason_of_intent(time: BackupTime, is_complete: bool) -> String {
    if is_complete {
        "an ingest noted here that it began; its backup is complete".to_owned()
    } else {
        format!("an ingest of {time} began here and died before its backup existed")
    }
}

/// Whether a file has the name of one that is being written: `.<name>.xofs-new`, XO's `.<milliseconds>.<name>`, `<name>.tmp`.
fn is_temporary(name: &str) -> bool {
    let is_upload = |hidden: &str| {
        hidden.split_once('.').is_some_and(|(milliseconds, name)| {
            milliseconds.len() >= 10 && milliseconds.bytes().all(|byte| byte.is_ascii_digit()) && !name.is_empty()
        })
    };
    name.ends_with(".tmp")
        || name.strip_prefix('.').is_some_and(|hidden| hidden.ends_with(UNPUBLISHED) || is_upload(hidden))
}

/// Lists the first few names.
fn first<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let shown: Vec<String> = names.iter().take(8).map(|name| format!("'{name}'")).collect();
    let more = if names.len() > shown.len() { ", ..." } else { "" };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_being_written_are_known_by_their_names() {
        for name in [".a.alias.vhd.xofs-new", ".1785587696789.20260801T123456Z.vhd", "x.json.tmp", ".x.tmp"] {
            assert!(is_temporary(name), "{name}");
        }
        for name in
            [".a.alias.vhd.merge.json", ".20260801T123456Z.xofs-ingest", "a.vhd", ".hidden", ".1.a", "notes.txt"]
        {
            assert!(!is_temporary(name), "{name}");
        }
    }
}
