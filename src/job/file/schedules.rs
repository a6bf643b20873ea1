//! When a job runs, and what is kept of these runs.

use std::collections::BTreeSet;

use jiff::tz::TimeZone;

use super::{is_id, values};
use crate::job::schedule::Calendar;
use crate::job::table::Section;
use crate::pool::{MOST_REPLICAS, USUAL_REPLICAS};

/// When it runs, and what is kept of these runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Timed {
    /// What repositories call it.
    pub name: String,
    /// When.
    pub calendar: Calendar,
    /// The time zone as it was written, if it was.
    pub timezone: Option<String>,
    /// Whether what was missed is made up for, once.
    pub makes_up: bool,
    /// Whether all blocks are stored each time.
    pub is_full: bool,
    /// What is kept of its backups; all, if nothing is said.
    pub keep: Option<Keep>,
    /// How many states of a machine are kept in each replica, at least one.
    pub replicas: u32,
}

/// What is kept of the backups of a schedule; at least one rule keeps something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keep {
    /// The most recent ones.
    pub last: Option<u32>,
    /// Of days.
    pub daily: Option<u32>,
    /// Of weeks.
    pub weekly: Option<u32>,
    /// Of months.
    pub monthly: Option<u32>,
    /// Of years.
    pub yearly: Option<u32>,
    /// Those with one of these tags.
    pub tags: Vec<String>,
}

/// What of the rest of the job counts for its schedules.
pub(super) struct OfJob {
    /// Whether it makes increments.
    pub is_incremental: bool,
    /// Whether it has repositories.
    pub has_repositories: bool,
    /// Whether it has SRs.
    pub has_srs: bool,
}

/// Reads `[[schedules]]`.
pub(super) fn schedules(root: &Section, of_job: &OfJob) -> Vec<Timed> {
    let mut names = BTreeSet::new();
    let sections = root.sections("schedules");
    let timed = |section: Section| {
        let timed = schedule(&section, of_job, &mut names);
        section.finish();
        timed
    };
    sections.into_iter().filter_map(timed).collect()
}

fn schedule(section: &Section, of_job: &OfJob, names: &mut BTreeSet<String>) -> Option<Timed> {
    let name = section.text("name");
    match &name {
        None => {
            section.note_by(&["name"], "name is missing: repositories remember it with each backup of this schedule")
        }
        Some(name) if !is_id(&name.value) => {
            let shown = name.value.escape_debug();
            section.note_at(
                &name.span,
                format!("'{shown}' is no name of a schedule: expected up to 64 letters, digits, - and _"),
            );
        }
        Some(name) if !names.insert(name.value.clone()) => {
            section.note_at(&name.span, format!("there are two schedules called '{}'", name.value));
        }
        Some(_) => {}
    }
    let timezone = section.text("timezone");
    let zone = match &timezone {
        None => Some(TimeZone::system()),
        Some(zone) => {
            let found = TimeZone::get(&zone.value).ok();
            if found.is_none() {
                let shown = zone.value.escape_debug();
                section
                    .note_at(&zone.span, format!("'{shown}' is no time zone; expected one like Europe/Paris, or UTC"));
            }
            found
        }
    };
    let cron = section.text("cron");
    if cron.is_none() {
        section
            .note_by(&["cron"], "cron is missing: it says when, like cron = \"0 2 * * *\" for two o'clock each night");
    }
    let calendar = cron.and_then(|cron| {
        // Whether it is right is the same in each zone.
        let calendar = Calendar::new(&cron.value, zone.clone().unwrap_or(TimeZone::UTC));
        let expected = "expected minute, hour, day of month, month, day of week, like \"0 2 * * mon-fri\"";
        let wrong = |why| {
            let shown = cron.value.escape_debug();
            section.note_at(&cron.span, format!("'{shown}' is no pattern of cron: {why}; {expected}"));
        };
        calendar.map_err(wrong).ok()
    });
    let makes_up = section.choice("missed", &[("run", true), ("skip", false)]).is_none_or(|found| found.value);
    let is_full = section.flag("full").unwrap_or(false);
    if is_full && !of_job.is_incremental {
        section.note("full = true is for mode = \"incremental\": a full backup is always one");
    }
    let keep = section.section("keep").map(keep);
    if keep.is_some() && !of_job.has_repositories {
        section
            .note("keep is for repositories, and the job has none: replicas = NUMBER says how many states an SR keeps");
    }
    let replicas = section.number("replicas", 1..=MOST_REPLICAS);
    if replicas.is_some() && !of_job.has_srs {
        section.note("replicas is for SRs, and the job has none: keep says what repositories keep");
    }
    Some(Timed {
        name: name?.value,
        calendar: zone.and(calendar)?,
        timezone: timezone.map(|zone| zone.value),
        makes_up,
        is_full,
        keep,
        replicas: replicas.unwrap_or(USUAL_REPLICAS),
    })
}

fn keep(section: Section) -> Keep {
    let number = |key| section.number(key, 0..=1_000_000);
    let keep = Keep {
        last: number("last"),
        daily: number("daily"),
        weekly: number("weekly"),
        monthly: number("monthly"),
        yearly: number("yearly"),
        tags: values(section.texts("tags")),
    };
    let rules = [keep.last, keep.daily, keep.weekly, keep.monthly, keep.yearly];
    if rules.iter().all(|rule| rule.unwrap_or(0) == 0) {
        section.note_by(
            &["last", "daily", "weekly", "monthly", "yearly"],
            "keep keeps nothing: give last, daily, weekly, monthly or yearly; or leave keep out, to keep everything",
        );
    }
    section.finish();
    keep
}
