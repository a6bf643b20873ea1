//! Which backups may be forgotten: backups in, decisions out; nothing is read and nothing is changed.
//!
//! The backups of one VM, one mode, one job and one schedule are a group, and each group is judged by itself. For XO that is the same,
//! whose schedules have ids that no other job's has; here jobs name them as they like.
//!
//!
//! | keeps | what |
//! |---|---|
//! | last N | the N most recent ones |
//! | daily, weekly, monthly, yearly N | of each of the N most recent periods that have any, the oldest one |
//! | protection | those with a tag, those that are immutable still, and what an immutable one may be built on |
//! | chain | the newest incremental one of a job of a VM: the next one is built on its disks |
//! | not readable | those of which nothing is known; they count for no rule either |
//!
//! The rules look at the `timestamp` of the metadata, as XO does; where there is none, at the time in the file's name.
//! Chains and immutability look at the name, as XO and its daemon do. A rule counts all backups of the group, whether
//! or not something else keeps them, so that another reason to keep one never costs another.
//!
//! Source: XO, `@xen-orchestra/backups/_getOldEntries.mjs`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use super::metadata::{DiskSource, has_tag};
use super::period::Period;
use super::{Backup, Mode, VmId};

/// How many backups of each group are kept; at least one rule keeps something.
#[derive(Debug, Clone)]
pub struct Rules {
    last: usize,
    periods: Vec<PeriodRule>,
    zone: TimeZone,
}

/// Keeps the oldest backup of each of the most recent periods that have any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeriodRule {
    /// How long the periods are.
    pub period: Period,
    /// Of how many of them one is kept.
    pub count: usize,
    /// Where they begin: see [`Period::bucket`].
    pub begins: u16,
}

/// What is kept whatever the rules say.
#[derive(Debug, Clone, Default)]
pub struct Protection {
    /// Tags of backups, or of their VMs when they were made, that keep them.
    pub tags: Vec<String>,
    /// How long a backup is immutable, from the time in its name.
    pub immutability: Option<SignedDuration>,
    /// The time now.
    pub now: Timestamp,
}

/// What is to become of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It is kept, for these reasons; there is at least one.
    Keep(Vec<Reason>),
    /// Nothing keeps it.
    Forget,
}

/// Why a backup is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It is one of so many most recent ones.
    Last(usize),
    /// It is the oldest one of a period, which is named.
    Period(Period, String),
    /// It, or its VM, has this tag.
    Tag(String),
    /// It may not be removed before this time.
    Immutable(Timestamp),
    /// The one after it, of the same job, may not be changed before this time: what is forgotten is merged into the next.
    BeforeImmutable(Timestamp),
    /// The next incremental backup of its job is built on it.
    NewestOfChain,
    /// Its metadata cannot be read, or names no disks that could be: nothing is known of it.
    Unreadable,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last(count) => write!(f, "last {count}"),
            Self::Period(period, bucket) => write!(f, "{} {bucket}", period.name()),
            Self::Tag(tag) => write!(f, "protected by tag '{}'", tag.escape_debug()),
            Self::Immutable(until) => write!(f, "immutable until {until:.0}"),
            Self::BeforeImmutable(until) => write!(f, "the next one is immutable until {until:.0}"),
            Self::NewestOfChain => f.write_str("newest of its chain"),
            Self::Unreadable => f.write_str("cannot be read, so nothing is known of it"),
        }
    }
}

impl Decision {
    /// Whether it is kept.
    #[must_use]
    pub fn is_keep(&self) -> bool {
        matches!(self, Self::Keep(_))
    }

    /// Returns why it is kept; nothing if it is not.
    #[must_use]
    pub fn reasons(&self) -> &[Reason] {
        match self {
            Self::Keep(reasons) => reasons,
            Self::Forget => &[],
        }
    }
}

impl Rules {
    /// Makes rules; `None` if they keep nothing at all, by which nothing may be decided.
    ///
    /// `zone` is the time zone of the periods.
    #[must_use]
    pub fn new(last: usize, mut periods: Vec<PeriodRule>, zone: TimeZone) -> Option<Self> {
        periods.retain(|rule| rule.count > 0);
        (last > 0 || !periods.is_empty()).then_some(Self { last, periods, zone })
    }

    /// Decides about backups, of one VM or several: **all** there are of each, for a decision depends on the others.
    ///
    /// The decisions are in the order of `backups`, which does not matter otherwise.
    #[must_use]
    pub fn decide(&self, backups: &[Arc<Backup>], protection: &Protection) -> Vec<Decision> {
        let mut reasons: Vec<Vec<Reason>> = vec![Vec::new(); backups.len()];
        let mut groups: HashMap<(&VmId, Mode, &str, &str), Vec<usize>> = HashMap::new();
        let mut jobs: HashMap<(&VmId, &str), Vec<usize>> = HashMap::new();
        for (index, backup) in backups.iter().enumerate() {
            if !is_readable(backup) {
                reasons[index].push(Reason::Unreadable);
                continue;
            }
            let group = (&backup.vm, backup.mode, backup.job_id.as_str(), backup.schedule_id.as_str());
            groups.entry(group).or_default().push(index);
            if backup.mode == Mode::Incremental {
                jobs.entry((&backup.vm, &backup.job_id)).or_default().push(index);
            }
        }
        for mut group in groups.into_values() {
            // Two of one millisecond have an order all the same: that of their names.
            group.sort_by_key(|index| std::cmp::Reverse((time_of(&backups[*index]), backups[*index].time)));
            self.apply(&group, backups, &mut reasons);
        }
        for mut job in jobs.into_values() {
            job.sort_by_key(|index| backups[*index].time);
            for pair in job.windows(2) {
                let [until, next] = [pair[0], pair[1]].map(|index| protection.until(&backups[index]));
                reasons[pair[0]].extend(next.filter(|_| until.is_none()).map(Reason::BeforeImmutable));
            }
            reasons[job[job.len() - 1]].push(Reason::NewestOfChain);
        }
        for (backup, reasons) in backups.iter().zip(&mut reasons) {
            reasons.extend(protection.of(backup));
        }
        reasons.into_iter().map(|all| if all.is_empty() { Decision::Forget } else { Decision::Keep(all) }).collect()
    }

    /// Applies the rules to one group, the most recent backup first.
    fn apply(&self, group: &[usize], backups: &[Arc<Backup>], reasons: &mut [Vec<Reason>]) {
        for index in group.iter().take(self.last) {
            reasons[*index].push(Reason::Last(self.last));
        }
        for rule in &self.periods {
            let mut left = rule.count;
            let mut current = None;
            let mut oldest = BTreeMap::new();
            for index in group {
                let bucket = rule.period.bucket(time_of(&backups[*index]), &self.zone, rule.begins);
                if current.as_ref() != Some(&bucket) {
                    // No break: where a clock went back over midnight, XO comes to the last period once more.
                    if left == 0 {
                        continue;
                    }
                    left -= 1;
                    current = Some(bucket.clone());
                }
                oldest.insert(bucket, *index);
            }
            for (bucket, index) in oldest {
                reasons[index].push(Reason::Period(rule.period, bucket));
            }
        }
    }
}

impl Protection {
    fn of(&self, backup: &Backup) -> Vec<Reason> {
        let tags = self.tags.iter().filter(|tag| has_tag(backup, tag)).map(|tag| Reason::Tag(tag.clone()));
        tags.chain(self.until(backup).map(Reason::Immutable)).collect()
    }

    /// Returns until when a backup may not be changed, if that is so now.
    fn until(&self, backup: &Backup) -> Option<Timestamp> {
        // Past the end of time is for ever.
        let end = |duration| backup.time.timestamp().checked_add(duration).unwrap_or(Timestamp::MAX);
        self.immutability.map(end).filter(|until| *until > self.now)
    }
}

/// Returns the time that the rules look at.
fn time_of(backup: &Backup) -> Timestamp {
    backup.timestamp.unwrap_or_else(|| backup.time.timestamp())
}

/// Whether enough is known of a backup to count it: an incremental one without a usable disk is no backup for XO either.
fn is_readable(backup: &Backup) -> bool {
    let is_usable = !backup.disks.iter().any(|disk| matches!(disk.source, DiskSource::Unusable(_)));
    match backup.mode {
        Mode::Full => true,
        Mode::Incremental => !backup.disks.is_empty() && is_usable,
        Mode::Unreadable => false,
    }
}

#[cfg(test)]
mod tests {
    use storage::ObjectPath;

    use super::super::{BackupDisk, BackupTime, VmId};
    use super::*;

    /// A small generator; the seed is in every message.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        fn count(&mut self, bound: u64) -> usize {
            usize::try_from(self.below(bound)).unwrap()
        }
    }

    /// A readable backup of the VM `vm` and the schedule `schedule`.
    fn backup(stored: &str, mode: Mode) -> Backup {
        let path = ObjectPath::new(&format!("xo-vm-backups/vm/{stored}.json")).unwrap();
        let mut backup =
            Backup::unreadable(&VmId::new("vm").unwrap(), BackupTime::parse(stored).unwrap(), path, String::new());
        (backup.mode, backup.problem) = (mode, None);
        backup.job_id = "job".to_owned();
        backup.schedule_id = "schedule".to_owned();
        if mode == Mode::Incremental {
            backup.disks = vec![BackupDisk {
                name: "xvda".to_owned(),
                source: DiskSource::Vhd(ObjectPath::new("a.vhd").unwrap()),
                vdi: None,
                label: String::new(),
                description: String::new(),
                virtual_size: None,
            }];
        }
        backup
    }

    fn fulls(times: &[&str]) -> Vec<Backup> {
        times.iter().map(|time| backup(time, Mode::Full)).collect()
    }

    fn rule(period: Period, count: usize) -> PeriodRule {
        PeriodRule { period, count, begins: 0 }
    }

    fn rules(last: usize, periods: &[PeriodRule]) -> Rules {
        Rules::new(last, periods.to_vec(), TimeZone::UTC).expect("keeps something")
    }

    /// The decisions with their reasons in words; empty to forget.
    fn said(backups: &[Backup], rules: &Rules, protection: &Protection) -> Vec<String> {
        let backups: Vec<_> = backups.iter().cloned().map(Arc::new).collect();
        let words =
            |decision: &Decision| decision.reasons().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        rules.decide(&backups, protection).iter().map(words).collect()
    }

    #[test]
    fn each_rule_keeps_what_it_names_and_all_reasons_are_told() {
        let backups = fulls(&[
            "20261030T020000Z", // a Friday
            "20261101T020000Z", // a Sunday
            "20261119T020000Z",
            "20261119T140000Z",
            "20261120T020000Z",
            "20261120T140000Z",
        ]);
        for (rules, expected) in [
            (rules(1, &[]), ["", "", "", "", "", "last 1"]),
            (rules(9, &[]), ["last 9"; 6]),
            (rules(0, &[rule(Period::Daily, 2)]), ["", "", "daily 2026-11-19", "", "daily 2026-11-20", ""]),
            // Days without a backup do not count.
            (
                rules(0, &[rule(Period::Daily, 3)]),
                ["", "daily 2026-11-01", "daily 2026-11-19", "", "daily 2026-11-20", ""],
            ),
            (rules(0, &[rule(Period::Weekly, 2)]), ["", "weekly 2026-45", "weekly 2026-47", "", "", ""]),
            (rules(0, &[rule(Period::Monthly, 5)]), ["monthly 2026-10", "monthly 2026-11", "", "", "", ""]),
            (
                rules(2, &[rule(Period::Daily, 1), rule(Period::Yearly, 1)]),
                ["yearly 2026", "", "", "", "last 2, daily 2026-11-20", "last 2"],
            ),
        ] {
            assert_eq!(said(&backups, &rules, &Protection::default()), expected, "{rules:?}");
        }
    }

    #[test]
    fn rules_that_keep_nothing_are_no_rules() {
        assert!(Rules::new(0, vec![rule(Period::Daily, 0), rule(Period::Yearly, 0)], TimeZone::UTC).is_none());
    }

    #[test]
    fn each_vm_mode_job_and_schedule_is_judged_by_itself() {
        let mut backups = fulls(&["20261118T020000Z", "20261119T020000Z", "20261120T020000Z", "20261121T020000Z"]);
        backups[0].vm = VmId::new("other").unwrap();
        backups[1].schedule_id = "other".to_owned();
        // Two jobs may both have a nightly schedule.
        backups[2].job_id = "other".to_owned();
        backups.extend([backup("20261122T020000Z", Mode::Incremental), backup("20261123T020000Z", Mode::Full)]);
        let expected = ["last 1", "last 1", "last 1", "", "last 1, newest of its chain", "last 1"];
        assert_eq!(said(&backups, &rules(1, &[]), &Protection::default()), expected);
    }

    #[test]
    fn the_newest_of_a_chain_is_kept_for_each_job_of_a_vm() {
        let mut backups: Vec<_> = ["20261119T020000Z", "20261120T020000Z", "20261120T030000Z", "20261120T040000Z"]
            .iter()
            .map(|time| backup(time, Mode::Incremental))
            .collect();
        backups[3].job_id = "other".to_owned();
        let expected = ["", "daily 2026-11-20", "newest of its chain", "daily 2026-11-20, newest of its chain"];
        assert_eq!(said(&backups, &rules(0, &[rule(Period::Daily, 1)]), &Protection::default()), expected);
        // Two schedules of one job share its chain.
        backups.truncate(3);
        backups[1].schedule_id = "other".to_owned();
        let expected = ["", "last 1", "last 1, newest of its chain"];
        assert_eq!(said(&backups, &rules(1, &[]), &Protection::default()), expected);
    }

    #[test]
    fn what_cannot_be_read_is_kept_and_counts_for_nothing() {
        let mut backups = fulls(&["20261118T020000Z", "20261119T020000Z"]);
        backups.push(backup("20261120T020000Z", Mode::Unreadable));
        backups.push(backup("20261121T020000Z", Mode::Incremental));
        backups.push(backup("20261122T020000Z", Mode::Incremental));
        backups.push(backup("20261123T020000Z", Mode::Incremental));
        backups[4].disks.clear();
        backups[5].disks[0].source = DiskSource::Unusable("why".to_owned());
        let unknown = "cannot be read, so nothing is known of it";
        let expected = ["", "last 1", unknown, "last 1, newest of its chain", unknown, unknown];
        assert_eq!(said(&backups, &rules(1, &[]), &Protection::default()), expected);
    }

    #[test]
    fn tags_and_immutability_protect() {
        let mut backups = fulls(&[
            "20261117T020000Z",
            "20261118T020000Z",
            "20261119T020000Z",
            "20261119T020001Z",
            "20261120T020000Z",
        ]);
        backups[0].tags = vec!["a".to_owned(), "keep".to_owned()];
        backups[1].vm_tags = vec!["legal".to_owned()];
        let protection = Protection {
            tags: vec!["legal".to_owned(), "keep".to_owned()],
            immutability: Some(SignedDuration::from_hours(24)),
            now: "2026-11-20T02:00:00Z".parse().unwrap(),
        };
        let expected = [
            "protected by tag 'keep'",
            "protected by tag 'legal'",
            "",
            "immutable until 2026-11-20T02:00:01Z",
            "last 1, immutable until 2026-11-21T02:00:00Z",
        ];
        assert_eq!(said(&backups, &rules(1, &[]), &protection), expected);
        let for_ever = Protection { immutability: Some(SignedDuration::MAX), ..protection };
        assert!(
            said(&backups, &rules(1, &[]), &for_ever).iter().all(|reasons| reasons.contains("immutable until 9999"))
        );
    }

    #[test]
    fn what_would_be_merged_into_an_immutable_backup_is_kept() {
        let times = ["20261117T020000Z", "20261118T020000Z", "20261119T020000Z", "20261120T020000Z"];
        let mut backups: Vec<Backup> = times.iter().map(|time| backup(time, Mode::Incremental)).collect();
        let protection = Protection {
            immutability: Some(SignedDuration::from_hours(36)),
            now: "2026-11-20T03:00:00Z".parse().unwrap(),
            ..Protection::default()
        };
        let until = "immutable until 2026-11-20T14:00:00Z";
        let newest = "newest of its chain, immutable until 2026-11-21T14:00:00Z";
        let before = format!("the next one is {until}");
        let expected = ["", &before, until, &format!("last 1, {newest}")];
        assert_eq!(said(&backups, &rules(1, &[]), &protection), expected);
        // What another job made is built on others.
        backups[2].job_id = "other".to_owned();
        let other = format!("last 1, newest of its chain, {until}");
        let expected = ["", &format!("the next one is {}", &newest[21..]), &other];
        assert_eq!(said(&backups, &rules(1, &[]), &protection)[..3], expected);
    }

    #[test]
    fn the_timestamp_of_the_metadata_counts_and_else_the_name() {
        let mut backups = fulls(&["20261119T235959Z", "20261120T235959Z"]);
        let daily = rules(0, &[rule(Period::Daily, 1)]);
        assert_eq!(said(&backups, &daily, &Protection::default()), ["", "daily 2026-11-20"]);
        backups[0].timestamp = Some("2026-11-21T00:00:00.5Z".parse().unwrap());
        assert_eq!(said(&backups, &daily, &Protection::default()), ["daily 2026-11-21", ""]);
    }

    /// Backups of two VMs, schedules and jobs, some of them unreadable, some at the same time.
    fn random_backups(random: &mut Random) -> Vec<Arc<Backup>> {
        let many = random.count(40);
        let one = |random: &mut Random| {
            let (month, day, hour) = (10 + random.below(3), 1 + random.below(30), random.below(24));
            let mode = [Mode::Full, Mode::Incremental, Mode::Incremental, Mode::Unreadable][random.count(4)];
            let mut backup = backup(&format!("2026{month}{day:02}T{hour:02}0000Z"), mode);
            backup.vm = VmId::new(["one", "two"][random.count(2)]).unwrap();
            backup.schedule_id = ["hourly", "nightly"][random.count(2)].to_owned();
            backup.job_id = ["job", "other"][random.count(2)].to_owned();
            backup
        };
        let mut backups: Vec<Backup> = (0..many).map(|_| one(random)).collect();
        // A file name is there once.
        backups.sort_by_key(Backup::id);
        backups.dedup_by_key(|backup| backup.id());
        backups.into_iter().map(Arc::new).collect()
    }

    #[test]
    fn whatever_the_rules_newest_are_kept_more_rules_keep_no_less_and_order_does_not_matter() {
        for seed in 1..=500_u64 {
            let random = &mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let backups = random_backups(random);
            let mut counts: Vec<usize> = (0..5).map(|_| random.count(4)).collect();
            counts[0] = counts[0].max(1);
            let zone = TimeZone::get(["UTC", "Europe/Paris", "Pacific/Apia"][random.count(3)]).unwrap();
            let make = |counts: &[usize]| {
                let periods = Period::ALL.into_iter().zip(&counts[1..]).map(|(period, count)| rule(period, *count));
                Rules::new(counts[0], periods.collect(), zone.clone()).expect("keeps something")
            };
            let decisions = make(&counts).decide(&backups, &Protection::default());
            for (backup, decision) in backups.iter().zip(&decisions) {
                let is_older = |other: &Arc<Backup>| {
                    let of_job = (&other.vm, &other.job_id) == (&backup.vm, &backup.job_id);
                    of_job && other.mode == Mode::Incremental && other.time > backup.time
                };
                if backup.mode == Mode::Unreadable || backup.mode == Mode::Incremental && !backups.iter().any(is_older)
                {
                    assert!(decision.is_keep(), "seed {seed}: {} {counts:?}", backup.id());
                }
            }

            let mut more = counts.clone();
            more[random.count(5)] += 1 + random.count(3);
            for ((backup, few), many) in
                backups.iter().zip(&decisions).zip(make(&more).decide(&backups, &Protection::default()))
            {
                assert!(!few.is_keep() || many.is_keep(), "seed {seed}: {} {counts:?} {more:?}", backup.id());
            }

            let mut order: Vec<usize> = (0..backups.len()).collect();
            for last in (1..order.len()).rev() {
                order.swap(last, random.count(last as u64 + 1));
            }
            let shuffled: Vec<_> = order.iter().map(|index| backups[*index].clone()).collect();
            for (index, decision) in order.iter().zip(make(&counts).decide(&shuffled, &Protection::default())) {
                assert_eq!(decision, decisions[*index], "seed {seed}: {}", backups[*index].id());
            }
        }
    }
}
