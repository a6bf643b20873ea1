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

use xapi::Budget;

use super::stage::{Crew, Kind, Stage, Subject, Way};
use super::transfer::{Reading, StageReading};
use crate::pool::USUAL_CONNECTIONS;

/// Below this a run says nothing of its stages.
const SHORTEST: Duration = Duration::from_millis(500);
/// A stage that is at work and has finished nothing in such a time is not slow: it stands still.
const STILL: Duration = Duration::from_secs(5);
/// Less of a run (percent) explains nothing.
const LEAST: u128 = 25;

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
    crew: Crew,
    stages: Vec<&'a StageReading>,
    /// The threads that had something to do.
    workers: u32,
}

impl<'a> Group<'a> {
    /// Returns those of a crew that share its threads.
    fn of_crew(reading: &'a Reading, crew: Crew) -> Self {
        let is_one = |stage: &&StageReading| stage.crew == crew || stage.crew == Crew::Both;
        Self::of(crew, reading.stages.iter().filter(is_one).collect())
    }

    fn of(crew: Crew, stages: Vec<&'a StageReading>) -> Self {
        let most = |number: fn(&StageReading) -> u64| stages.iter().map(|stage| number(stage)).max().unwrap_or(0);
        let threads = most(|stage| u64::try_from(stage.workers).unwrap_or(u64::MAX));
        // A thread that never got a piece waited for nothing that matters.
        let workers = match most(|stage| stage.pieces) {
            0 => threads,
            pieces => threads.min(pieces),
        };
        Self { crew, stages, workers: u32::try_from(workers).unwrap_or(u32::MAX).max(1) }
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

/// Returns what of a stage counts: waiting, too, if nothing is done meanwhile, or if it is nothing but that.
fn took(stage: &StageReading) -> Duration {
    let is_waiting = stage.crew == Crew::Step || stage.stage == Stage::Bandwidth;
    if is_waiting { stage.busy + stage.input } else { stage.busy }
}

/// Names the bottleneck of what was counted.
pub(super) fn of(reading: &Reading) -> Bottleneck {
    let elapsed = reading.elapsed;
    if elapsed < SHORTEST {
        return Bottleneck::none(format!("over in {}: too short to say what limited it", seconds(elapsed)));
    }
    let alone = reading.stages.iter().filter(|stage| matches!(stage.crew, Crew::Own | Crew::Step));
    let crews = [Crew::Readers, Crew::Workers].map(|crew| Group::of_crew(reading, crew));
    let groups = alone.map(|stage| Group::of(stage.crew, vec![stage])).chain(crews);
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
    let named = Some((stage.stage, stage.of.clone()));
    if stage.crew != Crew::Step && stage.pieces == 0 && stage.bytes == 0 && elapsed >= STILL {
        let evidence = format!("nothing came of it in {}", seconds(elapsed));
        let advice = "see whether it answers at all; timeouts of the job end what never does";
        return Bottleneck { stage: named, title, evidence, advice: Some(advice.to_owned()) };
    }
    let evidence = if stage.crew == Crew::Step {
        format!("{} of {}", seconds(length), seconds(elapsed))
    } else if stage.stage == Stage::Bandwidth {
        format!("reading waited for it {} % of the time", percent(took(stage) / group.workers, elapsed))
    } else {
        let own = took(stage) / group.workers;
        let mut evidence = format!("busy {} %", percent(own, elapsed));
        let waited = waiting(reading, group.crew);
        let waited: Vec<String> = waited.iter().map(|(who, part)| format!("{who} waited {part} %")).collect();
        if !waited.is_empty() {
            // Writing to a String cannot fail.
            let _ = write!(evidence, "; {} of the time", waited.join(", "));
        }
        evidence
    };
    Bottleneck { stage: named, title, evidence, advice: advice(stage) }
}

/// Returns who waited for a crew before and behind it, and for which part of the run (percent); not who hardly did.
fn waiting(reading: &Reading, crew: Crew) -> Vec<(&'static str, u128)> {
    let (readers, workers) = (Group::of_crew(reading, Crew::Readers), Group::of_crew(reading, Crew::Workers));
    let behind = |group: &Group| group.part(|stage| stage.output);
    let before = |group: &Group| group.part(|stage| stage.input);
    let writers = reading.stages.iter().filter(|stage| stage.crew == Crew::Own);
    let writers = writers.map(|stage| (verb(stage.stage), before(&Group::of(Crew::Own, vec![stage]))));
    let writers = writers.max_by_key(|(_, waited)| *waited);
    let all = match crew {
        Crew::Readers => {
            let last = workers.stages.iter().map(|stage| stage.stage).max().map_or("working", verb);
            vec![writers.unwrap_or((last, before(&workers)))]
        }
        Crew::Workers => [Some(("reading", behind(&readers))), writers].into_iter().flatten().collect(),
        Crew::Own => vec![("reading", behind(&readers)), ("working", behind(&workers))],
        Crew::Both | Crew::Step => Vec::new(),
    };
    let parts = all.into_iter().map(|(who, waited)| (who, percent(waited, reading.elapsed)));
    parts.filter(|(_, part)| *part >= 10).collect()
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
        (Stage::Bandwidth, _) => return "the limit of bandwidth".to_owned(),
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
        (Stage::Bandwidth, _) => "raise it (limits.bandwidth of the job)",
        (Stage::Network, _) => {
            "each block waits until its request got there and back: let xofs run nearer to the host, or back up more machines at once"
        }
        (Stage::Encode, Way::Brotli) => {
            "compress by gzip or not at all (new chains only), or give it more or faster cores"
        }
        (Stage::Encode, Way::Gzip) => "do not compress (new chains only), or give it more or faster cores",
        (Stage::Decode, _) => {
            "give it more or faster cores, or do less at once; what is stored by gzip or uncompressed is sooner decoded (new chains only)"
        }
        (Stage::Encode | Stage::Compare | Stage::Hash, _) => cores,
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
    let usual = usize::from(USUAL_CONNECTIONS);
    let more = if wanted < usual { usual } else { (wanted * 2).min(Budget::MOST.into()) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Connections;

    /// Seconds at work, and waiting for those before and behind.
    type Seconds = (u64, u64, u64);

    fn stage(stage: Stage, of: &Subject, crew: Crew, way: Way, workers: usize, seconds: Seconds) -> StageReading {
        let (busy, input, output) = seconds;
        StageReading {
            stage,
            of: of.clone(),
            crew,
            way,
            workers,
            pieces: 1000,
            bytes: 1000 << 21,
            busy: Duration::from_secs(busy),
            input: Duration::from_secs(input),
            output: Duration::from_secs(output),
            step: Duration::from_secs(1),
            history: Vec::new(),
        }
    }

    /// A backup of 100 s by NBD, read by 16 threads over so many connections, worked on by 2, written by 4 to each of 2 places.
    fn backup(connections: usize, read: Seconds, work: [Seconds; 4], writes: [Seconds; 2]) -> Reading {
        let open = Connections::default();
        open.set(connections);
        let (host, machine) = (Subject::new(Kind::Host, "xcp1"), Subject::new(Kind::Machine, "here"));
        let places = ["near", "far"].map(Subject::repository);
        let by = Way::Nbd { wanted: connections, open };
        let [base, compare, hash, encode] = work;
        let mut stages = vec![
            stage(Stage::Snapshot, &host, Crew::Step, Way::Only, 1, (2, 0, 0)),
            stage(Stage::Read, &host, Crew::Readers, by, 16, read),
            stage(Stage::Base, &places[0], Crew::Both, Way::Only, 2, base),
            stage(Stage::Compare, &machine, Crew::Workers, Way::Only, 2, compare),
            stage(Stage::Hash, &machine, Crew::Workers, Way::Only, 2, hash),
            stage(Stage::Encode, &machine, Crew::Workers, Way::Brotli, 2, encode),
        ];
        let written = places.iter().zip(writes);
        stages.extend(written.map(|(of, seconds)| stage(Stage::Write, of, Crew::Own, Way::Only, 4, seconds)));
        Reading { elapsed: Duration::from_secs(100), stages }
    }

    #[test]
    fn a_stage_that_finished_nothing_is_said_to_stand_still() {
        let reading = |pieces: u64, elapsed: u64| {
            let read = (16 * elapsed - 3, 0, 0);
            let host = Subject::new(Kind::Host, "xcp1");
            let by = Way::Nbd { wanted: 4, open: Connections::default() };
            let mut stage = stage(Stage::Read, &host, Crew::Readers, by, 16, read);
            (stage.pieces, stage.bytes) = (pieces, pieces << 21);
            Reading { elapsed: Duration::from_secs(elapsed), stages: vec![stage] }
        };
        let still = of(&reading(0, 10));
        assert_eq!(still.stage, Some((Stage::Read, Subject::new(Kind::Host, "xcp1"))));
        assert_eq!(
            still.line(),
            "host xcp1 export: nothing came of it in 10.0 s; see whether it answers at all; timeouts of the job end what never does"
        );
        for slow in [reading(1, 10), reading(0, 4)] {
            assert!(of(&slow).line().ends_with("raise NBD connections from 4 to 8"), "{}", of(&slow).line());
        }
    }

    #[test]
    fn the_line_names_what_the_others_wait_for_with_evidence_and_advice() {
        let idle = [(20, 380, 0), (30, 370, 0)];
        let cases = [
            (
                backup(1, (1504, 0, 0), [(0, 0, 0), (2, 180, 0), (5, 0, 0), (10, 0, 0)], [(20, 352, 0), (30, 340, 0)]),
                "host xcp1 export: busy 94 %; writing waited 88 % of the time; raise NBD connections from 1 to 4",
            ),
            (
                backup(4, (160, 0, 1440), [(160, 0, 0), (2, 20, 0), (5, 0, 0), (10, 0, 0)], idle),
                "repository near reading the backup before: busy 80 %; reading waited 90 %, writing waited 95 % of the time; \
                 a faster disk, or a faster network to it, would help",
            ),
            (
                backup(4, (160, 0, 1440), [(0, 0, 0), (170, 10, 0), (5, 0, 0), (10, 0, 0)], idle),
                "machine here comparing: busy 85 %; reading waited 90 %, writing waited 95 % of the time; \
                 give it more or faster cores, or do less at once",
            ),
            (
                backup(4, (160, 0, 1440), [(0, 0, 0), (5, 10, 0), (170, 0, 0), (10, 0, 0)], idle),
                "machine here making digests: busy 85 %; reading waited 90 %, writing waited 95 % of the time; \
                 give it more or faster cores, or do less at once",
            ),
            (
                // Of threads that do several the longest is named, though reading took longer than each.
                backup(4, (960, 0, 640), [(0, 0, 0), (50, 10, 0), (60, 0, 0), (80, 0, 0)], idle),
                "machine here compressing by brotli: busy 40 %; reading waited 40 %, writing waited 95 % of the time; \
                 compress by gzip or not at all (new chains only), or give it more or faster cores",
            ),
            (
                backup(
                    4,
                    (160, 0, 1440),
                    [(0, 0, 0), (5, 0, 0), (10, 0, 0), (10, 0, 170)],
                    [(20, 380, 0), (390, 0, 0)],
                ),
                "repository far writing: busy 97 %; reading waited 90 %, working waited 85 % of the time; \
                 a faster disk, or a faster network to it, would help",
            ),
        ];
        for (reading, line) in cases {
            assert_eq!(reading.bottleneck().line(), line, "{reading:?}");
        }
    }

    #[test]
    fn what_is_done_before_the_bytes_is_named_with_its_seconds() {
        let host = Subject::new(Kind::Host, "xcp1");
        let taken = StageReading {
            busy: Duration::from_millis(1100),
            ..stage(Stage::Snapshot, &host, Crew::Step, Way::Only, 1, (0, 0, 0))
        };
        let read = stage(Stage::Read, &host, Crew::Readers, Way::Stream, 1, (0, 0, 0));
        let reading = Reading { elapsed: Duration::from_millis(1400), stages: vec![taken, read] };
        let expected = "taking the snapshot, host xcp1: 1.1 s of 1.4 s; the pool answers slowly: back up fewer machines at once, or \
                        when it has less to do";
        assert_eq!(reading.bottleneck().line(), expected);
        // Waiting for a lock is all that is done meanwhile.
        let lock = stage(Stage::Lock, &host, Crew::Step, Way::Only, 1, (0, 60, 0));
        let reading = Reading { elapsed: Duration::from_secs(100), stages: vec![lock] };
        assert_eq!(reading.bottleneck().stage.map(|(stage, _)| stage), Some(Stage::Lock));
    }

    #[test]
    fn what_happens_within_reading_is_told_from_a_slow_source() {
        let of = |kind| Subject::new(kind, "xcp1");
        let parts = [
            (Stage::Bandwidth, of(Kind::Host), (0, 1280, 0)),
            (Stage::Network, of(Kind::Network), (1280, 0, 0)),
            (Stage::Decode, of(Kind::Machine), (1280, 0, 0)),
        ];
        let lines = parts.map(|(part, of, seconds)| {
            let mut reading =
                backup(4, (160, 0, 0), [(0, 0, 0), (5, 100, 0), (10, 0, 0), (10, 0, 0)], [(20, 240, 0); 2]);
            reading.stages.push(stage(part, &of, Crew::Readers, Way::Only, 16, seconds));
            let bottleneck = reading.bottleneck();
            assert_eq!(bottleneck.stage, Some((part, of)));
            bottleneck.line()
        });
        assert_eq!(
            lines,
            [
                "the limit of bandwidth: reading waited for it 80 % of the time; raise it (limits.bandwidth of the job)",
                "network to xcp1: busy 80 %; writing waited 60 % of the time; each block waits until its request got there and back: let \
                 xofs run nearer to the host, or back up more machines at once",
                "machine xcp1 decoding: busy 80 %; writing waited 60 % of the time; give it more or faster cores, or do less at once; what \
                 is stored by gzip or uncompressed is sooner decoded (new chains only)",
            ]
        );
    }

    #[test]
    fn what_says_nothing_is_not_made_up() {
        let short =
            Reading { elapsed: Duration::from_millis(499), ..backup(4, (1504, 0, 0), [(0, 0, 0); 4], [(0, 0, 0); 2]) };
        assert_eq!(short.bottleneck().line(), "over in 0.5 s: too short to say what limited it");
        let even = backup(4, (384, 0, 0), [(0, 0, 0), (5, 0, 0), (10, 0, 0), (15, 0, 0)], [(80, 0, 0), (60, 0, 0)]);
        let line = "no stage stands out in 100.0 s: the longest, host xcp1 export, took 24.0 s";
        assert_eq!((even.bottleneck().line().as_str(), even.bottleneck().stage), (line, None));
        let nothing = Reading { elapsed: Duration::from_secs(100), stages: Vec::new() };
        assert_eq!(nothing.bottleneck().stage, None);
    }

    #[test]
    fn more_connections_are_advised_only_where_they_are_to_be_had() {
        let said =
            [(1, 1), (3, 3), (4, 4), (8, 8), (12, 12), (4, 2)].map(|(wanted, open)| more_connections(wanted, open));
        assert_eq!(
            said,
            [
                "raise NBD connections from 1 to 4",
                "raise NBD connections from 3 to 4",
                "raise NBD connections from 4 to 8",
                "raise NBD connections from 8 to 12",
                "it has all connections that a host gives: its storage, or its network, is what is slow",
                "2 of 4 NBD connections were to be had: read fewer disks of the host at once",
            ]
        );
    }
}
