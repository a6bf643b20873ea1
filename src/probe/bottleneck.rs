//! The closing line: which stage the others waited for, how that is known, and what would help. A pure function of a reading.
//!
//! A stage is measured by the part of the run that it took all for itself: its work, divided by the threads that did it. Stages
//! that the same threads do are added up, since one of them keeps the others from work; of these the longest is named. What one
//! thread does before or after the bytes took its time as it is, waiting too.
//!
//! Nothing is named of a run shorter than [`SHORTEST`], in which a pause of the system is as long as a stage, nor if the longest
//! stage took less than a quarter of the run: then no stage explains its length.

use std::fmt::Write as _;
use std::time::Duration;

use super::stage::{Crew, Kind, Stage, Subject, Way};
use super::transfer::{Reading, StageReading};

/// Below this a run says nothing of its stages.
const SHORTEST: Duration = Duration::from_millis(500);
/// Less of a run (percent) explains nothing.
const LEAST: u128 = 25;
/// Connections that one host is asked for at most: it takes 16 of anybody.
const MOST_CONNECTIONS: usize = 12;

/// Which stage the others waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bottleneck {
    /// The stage, unless nothing can be said.
    pub stage: Option<(Stage, Subject)>,
    /// What it is called, for people; empty if nothing can be said.
    pub title: String,
    /// How it is known, or why it is not.
    pub evidence: String,
    /// What to change, if there is something.
    pub advice: Option<String>,
}

impl Bottleneck {
    fn none(evidence: String) -> Self {
        Self { stage: None, title: String::new(), evidence, advice: None }
    }

    /// Returns all of it in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = if self.title.is_empty() { String::new() } else { format!("{}: ", self.title) };
        line.push_str(&self.evidence);
        if let Some(advice) = &self.advice {
            // Writing to a String cannot fail.
            let _ = write!(line, "; {advice}");
        }
        line
    }
}

/// Stages that the same threads did.
struct Group<'a> {
    stages: Vec<&'a StageReading>,
    /// The threads that had something to do.
    workers: u32,
}

impl<'a> Group<'a> {
    fn of(stages: Vec<&'a StageReading>) -> Self {
        let most = |number: fn(&StageReading) -> u64| stages.iter().map(|stage| number(stage)).max().unwrap_or(0);
        let threads = most(|stage| u64::try_from(stage.workers).unwrap_or(u64::MAX));
        // A thread that never got a piece waited for nothing that matters.
        let workers = match most(|stage| stage.pieces) {
            0 => threads,
            pieces => threads.min(pieces),
        };
        Self { stages, workers: u32::try_from(workers).unwrap_or(u32::MAX).max(1) }
    }

    /// Returns the part of the run that a sum over its threads took.
    fn part(&self, time: fn(&StageReading) -> Duration) -> Duration {
        self.stages.iter().map(|stage| time(stage)).sum::<Duration>() / self.workers
    }

    /// Returns how long the run would have been with nothing else in it.
    fn length(&self) -> Duration {
        self.part(took)
    }
}

/// Returns what of a stage counts: waiting, too, if nothing is done meanwhile.
fn took(stage: &StageReading) -> Duration {
    if stage.crew == Crew::Step { stage.busy + stage.input } else { stage.busy }
}

/// Names the bottleneck of what was counted.
pub(super) fn of(reading: &Reading) -> Bottleneck {
    let elapsed = reading.elapsed;
    if elapsed < SHORTEST {
        return Bottleneck::none(format!("over in {}: too short to say what limited it", seconds(elapsed)));
    }
    let of_crew = |crew: Crew| {
        let is_one = |stage: &&StageReading| stage.crew == crew || stage.crew == Crew::Both;
        Group::of(reading.stages.iter().filter(is_one).collect())
    };
    let alone = reading.stages.iter().filter(|stage| matches!(stage.crew, Crew::Own | Crew::Step));
    let groups = alone.map(|stage| Group::of(vec![stage])).chain([of_crew(Crew::Readers), of_crew(Crew::Workers)]);
    let longest = groups.max_by_key(Group::length);
    let leading =
        longest.as_ref().and_then(|group| Some((group, *group.stages.iter().max_by_key(|stage| took(stage))?)));
    let Some((group, stage)) = leading else {
        return Bottleneck::none("nothing was counted".to_owned());
    };
    let (length, title) = (group.length(), title(stage));
    if percent(length, elapsed) < LEAST {
        let evidence = format!(
            "no stage stands out in {}: the longest, {title}, took {}",
            seconds(elapsed),
            seconds(took(stage) / group.workers)
        );
        return Bottleneck::none(evidence);
    }
    let evidence = if stage.crew == Crew::Step {
        format!("{} of {}", seconds(length), seconds(elapsed))
    } else {
        let own = took(stage) / group.workers;
        let mut evidence = format!("busy {} %", percent(own, elapsed));
        for (who, waited) in waiting(reading, stage.crew) {
            let _ = write!(evidence, "; {who} waited {} % of the time", percent(waited, elapsed));
        }
        evidence
    };
    Bottleneck { stage: Some((stage.stage, stage.of.clone())), title, evidence, advice: advice(stage) }
}

/// Returns who waited for a crew before and behind it, and for how long; not who hardly did.
fn waiting(reading: &Reading, crew: Crew) -> Vec<(&'static str, Duration)> {
    let alone = |stage: &&StageReading| stage.crew == Crew::Own;
    let of = |which: Crew| {
        let is_one = |stage: &&StageReading| stage.crew == which || stage.crew == Crew::Both;
        Group::of(reading.stages.iter().filter(is_one).collect())
    };
    let reading_waited = || ("reading", of(Crew::Readers).part(|stage| stage.output));
    let working_waited = || ("encoding", of(Crew::Workers).part(|stage| stage.output));
    let writing_waited = || {
        let own = reading.stages.iter().filter(alone).map(|stage| (stage, Group::of(vec![stage])));
        let longest = own.map(|(stage, group)| (verb(stage.stage), group.part(|stage| stage.input)));
        longest.max_by_key(|(_, waited)| *waited).unwrap_or(("working", of(Crew::Workers).part(|stage| stage.input)))
    };
    let all = match crew {
        Crew::Readers | Crew::Both => vec![writing_waited()],
        Crew::Workers => vec![reading_waited(), writing_waited()],
        Crew::Own => vec![reading_waited(), working_waited()],
        Crew::Step => Vec::new(),
    };
    let most = all.into_iter().filter(|(_, waited)| percent(*waited, reading.elapsed) >= 10);
    most.max_by_key(|(_, waited)| *waited).into_iter().collect()
}

/// Returns what who does a stage is doing.
fn verb(stage: Stage) -> &'static str {
    match stage {
        Stage::Write => "writing",
        Stage::Import => "sending",
        _ => "working",
    }
}

/// Returns what a stage is called, for people.
fn title(stage: &StageReading) -> String {
    let name = stage.of.name.escape_debug();
    let of = match stage.of.kind {
        Kind::Host => format!("host {name}"),
        Kind::Sr => format!("SR {name}"),
        Kind::Network => format!("network to {name}"),
        Kind::Repository => format!("repository {name}"),
        Kind::Machine => format!("machine {name}"),
    };
    let what = match (stage.stage, stage.of.kind) {
        (Stage::Read, Kind::Host) => return format!("{of} export"),
        (Stage::Network, _) => return of,
        (Stage::Lock, _) => "waiting for the lock of the VM",
        (Stage::Slot, _) => "waiting for a place within the limits",
        (Stage::Chain, _) => "waiting for the host to coalesce",
        (Stage::Survey, _) => "looking at what is there",
        (Stage::Plan, _) => "planning",
        (Stage::Snapshot, _) => "taking the snapshot",
        (Stage::Prepare, _) => "making what the bytes go into",
        (Stage::Open, _) => "opening a disk",
        (Stage::Read, _) => "reading",
        (Stage::Base, _) => "reading the backup before",
        (Stage::Compare, _) => "comparing",
        (Stage::Decode, _) => "decoding",
        (Stage::Hash, _) => "making digests",
        (Stage::Encode, _) => match stage.way {
            Way::Brotli => "compressing by brotli",
            Way::Gzip => "compressing by gzip",
            _ => "encoding",
        },
        (Stage::Write, _) => "writing",
        (Stage::Import, _) => "import",
        (Stage::Move, _) => "moving blocks",
        (Stage::Sync, _) => "making durable",
        (Stage::Publish, _) => "publishing",
        (Stage::Verify, _) => "reading back",
        (Stage::Delete, _) => "removing",
        (Stage::Settle, _) => "tidying up the pool",
    };
    // What a thread does with what it is of, or waits for, reads better the other way round.
    if stage.crew == Crew::Step { format!("{what}, {of}") } else { format!("{of} {what}") }
}

/// Says what to change, for a stage that the others wait for.
fn advice(stage: &StageReading) -> Option<String> {
    let cores = "give it more or faster cores, or do less at once";
    let disk = "a faster disk, or a faster network to it, would help";
    let said = match (stage.stage, &stage.way) {
        (Stage::Read, Way::Nbd { wanted, open }) => return Some(more_connections(*wanted, open.get())),
        (Stage::Read, Way::Stream) => "let it be read by NBD: give a network of the pool the purpose 'nbd'",
        (Stage::Read, Way::Files) => "the folder of the SR is slow to read from here; without it NBD is used",
        (Stage::Read, Way::Xva) => {
            "a full backup comes as one stream that its host makes: back up incrementally, or let the host not compress it"
        }
        (Stage::Read | Stage::Base, _) if stage.of.kind == Kind::Repository => disk,
        (Stage::Read, _) => "a faster disk under the source would help",
        (Stage::Base, _) => disk,
        (Stage::Network, _) => "a faster or nearer network, or more connections, would help",
        (Stage::Encode, Way::Brotli) => {
            "compress by gzip or not at all (new chains only), or give it more or faster cores"
        }
        (Stage::Encode, Way::Gzip) => "do not compress (new chains only), or give it more or faster cores",
        (Stage::Encode | Stage::Compare | Stage::Decode | Stage::Hash, _) => cores,
        (Stage::Write | Stage::Sync | Stage::Publish | Stage::Move | Stage::Delete, _) => disk,
        (Stage::Import, _) => "faster storage in the pool would help, or fewer transfers into it at once",
        (Stage::Verify, _) => "it was asked for (--verify); NBD or faster storage would help",
        (Stage::Lock, _) => "let the programs that work on the VM run at other times",
        (Stage::Slot, _) => "raise the limits of the job, or let jobs run at other times",
        (Stage::Chain, _) => "let backups be further apart, or the host coalesce faster",
        (Stage::Survey | Stage::Snapshot | Stage::Prepare | Stage::Open | Stage::Settle, _)
            if !matches!(stage.of.kind, Kind::Repository | Kind::Machine) =>
        {
            "the pool answers slowly: back up fewer machines at once, or when it has less to do"
        }
        (Stage::Survey | Stage::Plan | Stage::Snapshot | Stage::Prepare | Stage::Open | Stage::Settle, _) => {
            return None;
        }
    };
    Some(said.to_owned())
}

fn more_connections(wanted: usize, open: usize) -> String {
    if open > 0 && open < wanted {
        return format!("{open} of {wanted} NBD connections were to be had: read fewer disks of the host at once");
    }
    let more = if wanted < 4 { 4 } else { (wanted * 2).min(MOST_CONNECTIONS) };
    if more > wanted {
        format!("raise NBD connections from {wanted} to {more}")
    } else {
        "it has all connections that a host gives: its storage, or its network, is what is slow".to_owned()
    }
}

/// Returns a part of a whole in percent; at most 100, since what is timed by several threads may overlap.
fn percent(part: Duration, whole: Duration) -> u128 {
    (part.as_nanos() * 100 / whole.as_nanos().max(1)).min(100)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
