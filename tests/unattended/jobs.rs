//! The jobs of a week, as they are drawn and as their files have them.

use jiff::civil::Weekday;
use xapi_simulator::Site as Where;

use crate::rules::{Keep, Pattern};
use crate::seeds::Random;
use crate::site::REPOSITORIES;
use crate::trouble::{LIMIT, Trouble};

pub struct Schedule {
    pub name: &'static str,
    pub pattern: Pattern,
    pub is_full: bool,
    pub keep: Keep,
}

pub struct Job {
    pub name: &'static str,
    pub machines: Vec<&'static str>,
    /// Numbers of repositories.
    pub repositories: Vec<usize>,
    /// `None`: XVAs.
    pub increments: Option<Increments>,
    pub schedules: Vec<Schedule>,
}

/// How disks are read and stored.
#[derive(Clone, Copy)]
pub struct Increments {
    pub uses_nbd: bool,
    pub tracks_changes: bool,
    pub is_exploded: bool,
}

impl Job {
    /// Returns its file, for a night with this trouble.
    pub fn text(&self, trouble: &Trouble, retries: usize, zone: &str) -> String {
        let list = |names: &mut dyn Iterator<Item = &str>| {
            names.map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
        };
        let mut text = format!(
            "pools = ['lab']\nvms.names = [{}]\nto.repositories = [{}]\nretries.pause = '0s'\nretries.vm = {retries}\n",
            list(&mut self.machines.iter().copied()),
            list(&mut self.repositories.iter().map(|number| REPOSITORIES[*number])),
        );
        match self.increments {
            None => text.push_str("mode = 'full'\nfull.compression = 'none'\n"),
            Some(how) => {
                text.push_str(&format!(
                    "incremental.nbd = {}\nincremental.cbt = {}\n",
                    how.uses_nbd, how.tracks_changes
                ));
                let format = if how.is_exploded { "exploded'\nincremental.compression = 'none" } else { "vhd" };
                text.push_str(&format!("incremental.format = '{format}'\n"));
            }
        }
        match trouble {
            Trouble::Stall(_) => text.push_str(&format!("timeouts.vm = '{LIMIT}'\n")),
            Trouble::Locked(_) => text.push_str("timeouts.lock = '1s'\n"),
            _ => {}
        }
        for schedule in &self.schedules {
            let (name, cron) = (schedule.name, schedule.pattern.text());
            text.push_str(&format!("[[schedules]]\nname = '{name}'\ncron = '{cron}'\ntimezone = '{zone}'\n"));
            text.push_str(&format!("full = {}\n{}", schedule.is_full, schedule.keep.text().unwrap_or_default()));
        }
        text
    }

    /// Returns where bytes pass.
    pub fn transfers(&self) -> &'static [Where] {
        match self.increments {
            None => &[Where::ExportVm],
            Some(how) if how.uses_nbd => &[Where::Nbd, Where::Export],
            Some(_) => &[Where::Export],
        }
    }
}

/// Draws the jobs. Both mean one of the machines, and both have a schedule of the same name.
pub fn draw(random: &mut Random) -> Vec<Job> {
    let keep = |random: &mut Random| match random.below(5) {
        0 => Keep { last: 1 + random.below(4), daily: 0, weekly: 0 },
        1 => Keep { last: random.below(2), daily: 1 + random.below(3), weekly: 0 },
        2 => Keep { last: 1, daily: 0, weekly: 1 + random.below(2) },
        3 => Keep { last: random.below(3), daily: 1 + random.below(2), weekly: 1 },
        _ => Keep { last: 0, daily: 0, weekly: 0 },
    };
    let increments = |random: &mut Random| Increments {
        uses_nbd: random.below(2) == 0,
        tracks_changes: random.below(2) == 0,
        is_exploded: random.below(2) == 0,
    };
    let mut schedule = |name, hour, weekday, is_full| {
        // Among those that the clocks skip and repeat.
        let minute = i8::try_from(random.below(60)).expect("small");
        Schedule { name, pattern: Pattern { hour, minute, weekday }, is_full, keep: keep(random) }
    };
    let nightly = vec![
        schedule("night", 2, None, false),
        schedule("week", 4, Some(Weekday::Sunday), true),
        schedule("noon", 12, Some(Weekday::Friday), false),
    ];
    let other = vec![
        schedule("night", 3, Some(Weekday::Thursday), false),
        schedule("week", 2, Some(Weekday::Sunday), false),
        schedule("end", 23, Some(Weekday::Monday), false),
    ];
    let both = if random.below(2) == 0 { vec![0] } else { vec![0, 1] };
    let second = if random.below(3) > 0 { Some(increments(random)) } else { None };
    let first = Some(increments(random));
    vec![
        Job {
            name: "nightly",
            machines: vec!["db01", "web01"],
            repositories: both,
            increments: first,
            schedules: nightly,
        },
        Job {
            name: "second",
            machines: vec!["app01", "web01"],
            repositories: vec![0],
            increments: second,
            schedules: other,
        },
    ]
}
