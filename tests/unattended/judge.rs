//! What is compared after a run: what there is, what the log says was made, and what the rules let go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use xapi_simulator::content::Content;
use xofs::repository::{Backup, Mode};

use crate::jobs::{Job, Schedule};
use crate::pool::{self, Held};
use crate::site::{Ended, REPOSITORIES};
use crate::trouble::Trouble;
use crate::week::{Due, Made, Place, Week};

/// What is judged after a run.
pub struct Run<'a> {
    pub due: Due,
    pub trouble: &'a Trouble,
    pub ended: &'a Ended,
    pub lines: &'a [Value],
    /// By the uuids of machines.
    pub held: &'a BTreeMap<String, BTreeMap<String, Content>>,
    /// What the pool had of each machine and job before.
    pub bases: &'a BTreeMap<(String, String), BTreeSet<String>>,
}

impl Week {
    /// All backups that there are.
    fn listed(&self) -> BTreeMap<Place, Backup> {
        let mut listed = BTreeMap::new();
        for (number, name) in REPOSITORIES.iter().enumerate() {
            for (vm, backups) in self.site.backups(name) {
                for backup in backups {
                    listed.insert((number, vm.clone(), backup.metadata.as_str().to_owned()), backup);
                }
            }
        }
        listed
    }

    /// Compares a backup with what its disks held.
    pub fn compare(&self, place: &Place, made: &Made, when: &str) {
        let bytes = |content: &Content| {
            let mut bytes = vec![0; usize::try_from(content.size()).expect("small")];
            content.read(0, &mut bytes).expect("in range");
            bytes
        };
        let held: Held = made.held.iter().map(|(name, content)| (name.clone(), bytes(content))).collect();
        pool::compare_backup(&self.site.open(REPOSITORIES[place.0]), &made.backup, &held, when);
    }

    /// Which of these backups the rules of a schedule let go: they are the whole of what there is in a repository.
    fn expired(
        &self,
        there: &BTreeMap<Place, Backup>,
        repository: usize,
        job: &Job,
        schedule: &Schedule,
    ) -> BTreeSet<Place> {
        let mut groups: BTreeMap<(&String, bool), BTreeMap<Timestamp, &Place>> = BTreeMap::new();
        let mut newest: BTreeMap<&String, &Place> = BTreeMap::new();
        for (place, backup) in there.iter().filter(|(place, backup)| place.0 == repository && backup.job_id == job.name)
        {
            let is_full = backup.mode == Mode::Full;
            if !is_full {
                // They are in the order of their times.
                newest.insert(&place.1, place);
            }
            if backup.schedule_id == schedule.name {
                groups.entry((&place.1, is_full)).or_default().insert(backup.timestamp.expect("ours have one"), place);
            }
        }
        let mut expired = BTreeSet::new();
        for times in groups.values() {
            let kept = schedule.keep.kept(&times.keys().copied().collect(), &self.zone);
            let is_newest = |place: &Place| newest.get(&place.1) == Some(&place);
            let gone = times.iter().filter(|(time, place)| !kept.contains(*time) && !is_newest(place));
            expired.extend(gone.map(|(_, place)| (*place).clone()));
        }
        expired
    }

    /// Compares what there is with what should be there after a run; returns what is new, and lets go of what went.
    pub fn judge(&mut self, run: &Run, when: &str) -> BTreeMap<Place, Made> {
        let there = self.listed();
        let is_known = |place: &Place| self.made.contains_key(place);
        let job = &self.jobs[run.due.job];
        let schedule = &job.schedules[run.due.schedule];
        let mut fresh = BTreeMap::new();
        for (place, backup) in there.iter().filter(|(place, _)| !is_known(place)) {
            let of = (backup.job_id.as_str(), backup.schedule_id.as_str());
            assert_eq!(of, (job.name, schedule.name), "{when}");
            let (held, snapshots) = (run.held[&place.1].clone(), self.snapshots(place));
            let made = Made { backup: backup.clone(), held, snapshots };
            self.compare(place, &made, when);
            fresh.insert(place.clone(), made);
        }
        self.judge_log(run, &fresh, when);
        if let Trouble::Nothing = run.trouble {
            self.judge_quiet(run, &fresh, when);
        }
        // As it was before anything was forgotten.
        let mut all: BTreeMap<Place, Backup> =
            self.made.iter().map(|(place, made)| (place.clone(), made.backup.clone())).collect();
        all.extend(fresh.iter().map(|(place, made)| (place.clone(), made.backup.clone())));
        for (number, name) in REPOSITORIES.iter().enumerate() {
            let gone: BTreeSet<Place> =
                all.keys().filter(|place| place.0 == number && !there.contains_key(*place)).cloned().collect();
            let of_merge =
                |event: &str| run.lines.iter().find(|line| line["event"] == event && line["repository"] == *name);
            let expired = self.expired(&all, number, job, schedule);
            match (of_merge("mergeStart"), of_merge("mergeEnd")) {
                (None, _) => assert_eq!(gone, BTreeSet::new(), "{when}: gone without a merge"),
                (Some(_), Some(end)) if end["isDone"] == true => {
                    assert_eq!(gone, expired, "{when}: gone, and what the rules let go of {name}");
                }
                _ => assert!(gone.is_subset(&expired), "{when}: {gone:?} are gone of {name}, of {expired:?}"),
            }
            self.made.retain(|place, _| !gone.contains(place));
        }
        fresh
    }

    /// Whether what the log says is so.
    fn judge_log(&self, run: &Run, fresh: &BTreeMap<Place, Made>, when: &str) {
        let job = &self.jobs[run.due.job];
        let first = &run.lines[0];
        assert_eq!(first["event"], "runStart", "{when}");
        assert_eq!(first["due"].as_str().and_then(|due| due.parse().ok()), Some(run.due.at), "{when}");
        let last = run.lines.last().expect("one at least");
        let status = (last["event"] == "runEnd").then(|| last["status"].as_str().expect("a word"));
        let shown = self.site.ask(&["list", "--json"]);
        let jobs = shown["jobs"].as_array().expect("a list");
        let shown = jobs.iter().find(|shown| shown["job"] == job.name).expect("it is listed");
        assert_eq!(shown["last"]["status"].as_str(), status.or(Some("interrupted")), "{when}");
        let now = run.due.at.checked_add(SignedDuration::from_secs(60)).expect("in range");
        let until = now.checked_add(SignedDuration::from_hours(24 * 8)).expect("in range");
        let next = job.schedules.iter().flat_map(|schedule| schedule.pattern.runs(&self.zone, now, until)).min();
        assert_eq!(shown["next"].as_str().and_then(|next| next.parse().ok()), next, "{when}");
        match run.ended.code {
            None => assert!(run.trouble.is_kill(), "{when}"),
            Some(code) => {
                let codes = [("done", 0), ("mergePending", 4), ("partial", 3), ("failed", 1), ("interrupted", 130)];
                assert!(codes.iter().any(|(name, of)| Some(*name) == status && *of == code), "{when}");
                assert!(code != 130 || matches!(run.trouble, Trouble::Terminated(_)), "{when}");
                assert!(code == 0 || !run.ended.err.is_empty(), "{when}: it says nothing");
            }
        }
        for vm in run.held.keys() {
            // Of the last try, if it has ended.
            let end = run.lines.iter().rev().find(|line| line["vm"] == vm.as_str());
            let end = end.filter(|line| line["event"] == "vmEnd");
            let status = end.and_then(|end| end["status"].as_str());
            assert!(status != Some("failed") || end.is_some_and(|end| end["reason"].is_string()), "{when}");
            for number in &job.repositories {
                let count = fresh.keys().filter(|place| place.0 == *number && place.1 == *vm).count();
                let stored = end.and_then(|end| end["backup"]["repositories"].as_array()).into_iter().flatten();
                let name = REPOSITORIES[*number];
                let is_stored =
                    stored.filter(|stored| stored["repository"] == name).any(|stored| stored["error"].is_null());
                match status {
                    Some("done" | "partial" | "failed") => {
                        assert_eq!(count, usize::from(is_stored), "{when}: new backups of {vm} in {name}");
                    }
                    // It was stopped or killed.
                    _ => assert!(count <= 1, "{when}: {count} new backups of {vm} in {name}"),
                }
            }
        }
    }

    /// Whether a run that nothing disturbed did all, and as little as it may.
    fn judge_quiet(&self, run: &Run, fresh: &BTreeMap<Place, Made>, when: &str) {
        let job = &self.jobs[run.due.job];
        let schedule = &job.schedules[run.due.schedule];
        assert_eq!(run.ended.code, Some(0), "{when}");
        assert_eq!(fresh.len(), job.machines.len() * job.repositories.len(), "{when}");
        let merges = run.lines.iter().filter(|line| line["event"] == "mergeEnd").count();
        let has_rules = schedule.keep.text().is_some();
        assert_eq!(merges, if has_rules { job.repositories.len() } else { 0 }, "{when}: merges");
        let Some(how) = job.increments else { return };
        for vm in run.held.keys() {
            // Their newest backups of before, if all repositories had one.
            let newest = |number: usize| {
                let of_job = |(place, made): &(&Place, &Made)| {
                    (place.0, &place.1, made.backup.job_id.as_str()) == (number, vm, job.name)
                };
                self.made.iter().rfind(of_job)
            };
            let end = run.lines.iter().rev().find(|line| line["event"] == "vmEnd" && line["vm"] == vm.as_str());
            let backup = &end.expect("it was backed up")["backup"];
            let empty = BTreeSet::new();
            let bases = run.bases.get(&(vm.clone(), job.name.to_owned())).unwrap_or(&empty);
            for read in backup["reads"].as_array().expect("reads") {
                let name = read["name"].as_str().expect("a name");
                let (mut is_increment, mut has_base) = (true, true);
                for number in &job.repositories {
                    let of = fresh.iter().find(|(place, _)| (place.0, &place.1) == (*number, vm)).expect("there").1;
                    let disk =
                        |backup: &Backup| backup.disks.iter().find(|disk| disk.name == name).and_then(|disk| disk.vdi);
                    let before = newest(*number).filter(|(_, before)| {
                        let is_same = disk(&before.backup).is_some() && disk(&before.backup) == disk(&of.backup);
                        let has_size = || before.held[name].size() == of.held[name].size();
                        is_same && (!how.is_exploded || has_size())
                    });
                    let is_key = schedule.is_full || before.is_none();
                    let stored = backup["repositories"].as_array().expect("a list").iter();
                    let mut stored = stored.filter(|stored| stored["repository"] == REPOSITORIES[*number]);
                    let disks = stored.next().expect("told")["disks"].as_array().expect("disks");
                    let told = disks.iter().find(|told| told["name"] == name).expect("told");
                    assert_eq!(told["isKey"], is_key, "{when}: {vm} {name} in {}", REPOSITORIES[*number]);
                    is_increment &= !is_key;
                    has_base &= before.is_some_and(|(_, before)| before.snapshots.is_subset(bases));
                }
                let pass = read["passes"].as_array().and_then(|passes| passes.last()).expect("one at least");
                let is_relative = pass["base"].is_string();
                assert!(is_relative || !is_increment || !has_base, "{when}: {vm} {name} was read whole");
            }
        }
    }

    /// The uuids of the snapshots that a backup was read of; an XVA is of none that stays.
    fn snapshots(&self, place: &Place) -> BTreeSet<String> {
        let path = self.site.path(REPOSITORIES[place.0]).join(&place.2);
        let metadata: Value = serde_json::from_slice(&fs::read(path).expect("there")).expect("JSON");
        let vdis = metadata["vdis"].as_object().into_iter().flat_map(|vdis| vdis.values());
        vdis.map(|vdi| vdi["uuid"].as_str().expect("a uuid").to_owned()).collect()
    }
}
