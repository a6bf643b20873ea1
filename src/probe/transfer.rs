//! A transfer: its stages, which can be read while it runs.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::bottleneck::{self, Bottleneck};
use super::counter::{Parts, Probe};
use super::stage::{Crew, Identity, Kind, Stage, Subject, Way, identity};

/// What moves bytes from one place to others: a backup, an ingest, a restore, a merge.
#[derive(Debug)]
pub struct Transfer {
    begun: Instant,
    is_seen: bool,
    /// A stage that is made slow on purpose, and by how much each piece of its work.
    slowed: Option<(Stage, Duration)>,
    /// What the configuration calls the pool that it is of.
    pool: OnceLock<String>,
    /// In the order in which they were first used.
    probes: Mutex<Vec<Arc<Probe>>>,
}

impl Default for Transfer {
    fn default() -> Self {
        Self { begun: Instant::now(), is_seen: true, slowed: None, pool: OnceLock::new(), probes: Mutex::default() }
    }
}

impl Transfer {
    /// Makes one that counts nothing: of what is done to find out, or twice.
    #[must_use]
    pub fn unseen() -> Self {
        Self { is_seen: false, ..Self::default() }
    }

    /// Makes one in which each piece of a stage's work takes so much longer: it shows how a transfer looks that this stage limits.
    #[must_use]
    pub fn slowed(stage: Stage, by: Duration) -> Self {
        Self { slowed: Some((stage, by)), ..Self::default() }
    }

    /// Says which pool it is of, before its first stage; what was said first counts.
    pub fn is_of_pool(&self, name: &str) {
        self.pool.get_or_init(|| name.to_owned());
    }

    /// Returns the probe of a stage, the same one for the same stage of the same thing.
    pub fn stage(&self, stage: Stage, of: &Subject, crew: Crew, way: Way) -> Arc<Probe> {
        let mut of = of.clone();
        if matches!(of.kind, Kind::Host | Kind::Sr | Kind::Network) && of.pool.is_none() {
            of.pool = self.pool.get().cloned();
        }
        let mut probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
        self.find(&mut probes, stage, of, crew, way)
    }

    /// Finds a probe among those that there are, or adds it with those of what may happen within it.
    fn find(&self, probes: &mut Vec<Arc<Probe>>, stage: Stage, of: Subject, crew: Crew, way: Way) -> Arc<Probe> {
        let wanted = identity(stage, &of, crew, &way);
        if let Some(probe) = probes.iter().find(|probe| probe.identity() == wanted) {
            return probe.clone();
        }
        let parts = (!matches!(stage, Stage::Bandwidth | Stage::Network | Stage::Decode)).then(|| {
            let mut part = |stage, of| self.find(probes, stage, of, crew, Way::Only);
            Parts {
                bandwidth: part(Stage::Bandwidth, of.clone()),
                network: part(Stage::Network, Subject { kind: Kind::Network, ..of.clone() }),
                decode: part(Stage::Decode, Subject::machine()),
            }
        });
        let probe = Probe::new((stage, of, crew, way), self.is_seen.then_some(self.begun), parts);
        let probe = Arc::new(match self.slowed {
            Some((slowed, by)) if slowed == stage => probe.slowed(by),
            _ => probe,
        });
        probes.push(probe.clone());
        probe
    }

    /// Returns the probe of what one thread does before or after the bytes.
    pub fn step(&self, stage: Stage, of: &Subject) -> Arc<Probe> {
        self.stage(stage, of, Crew::Step, Way::Only)
    }

    /// Returns what was counted so far.
    #[must_use]
    pub fn reading(&self) -> Reading {
        let probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut stages: Vec<StageReading> = probes.iter().map(|probe| probe.reading()).collect();
        // What was never come to says nothing.
        stages.retain(|stage| stage.workers > 0 || stage.bytes > 0);
        stages.sort_by(|a, b| (a.stage, &a.of).cmp(&(b.stage, &b.of)));
        Reading { elapsed: self.begun.elapsed(), stages }
    }
}

/// What a transfer did so far.
#[derive(Debug, Clone)]
pub struct Reading {
    /// Since it began.
    pub elapsed: Duration,
    /// Its stages, in the order of [`Stage`].
    pub stages: Vec<StageReading>,
}

impl Reading {
    /// Returns the stage that the others waited for, and what would help.
    #[must_use]
    pub fn bottleneck(&self) -> Bottleneck {
        bottleneck::of(self)
    }

    /// Returns what was done since an earlier reading of the same transfer, without bytes over time.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let of = |stage: &StageReading| {
            let before = earlier.stages.iter().find(|before| before.identity() == stage.identity());
            let mut since = stage.clone();
            since.history.clear();
            if let Some(before) = before {
                since.pieces = stage.pieces.saturating_sub(before.pieces);
                since.bytes = stage.bytes.saturating_sub(before.bytes);
                since.busy = stage.busy.saturating_sub(before.busy);
                since.input = stage.input.saturating_sub(before.input);
                since.output = stage.output.saturating_sub(before.output);
            }
            since
        };
        let elapsed = self.elapsed.saturating_sub(earlier.elapsed);
        Self { elapsed, stages: self.stages.iter().map(of).collect() }
    }

    /// Returns the bytes that passed a stage, of all that it is of.
    #[must_use]
    pub fn bytes(&self, stage: Stage) -> u64 {
        self.stages.iter().filter(|reading| reading.stage == stage).map(|reading| reading.bytes).sum()
    }
}

/// What a stage did; times are sums over its threads.
#[derive(Debug, Clone)]
pub struct StageReading {
    /// Which.
    pub stage: Stage,
    /// What it is of.
    pub of: Subject,
    /// Who does it.
    pub crew: Crew,
    /// How.
    pub way: Way,
    /// The most threads that were at it at once, working or waiting.
    pub workers: usize,
    /// Pieces that passed.
    pub pieces: u64,
    /// Bytes that passed.
    pub bytes: u64,
    /// Time at work.
    pub busy: Duration,
    /// Time blocked on input.
    pub input: Duration,
    /// Time blocked on output.
    pub output: Duration,
    /// How long a step of the history is.
    pub step: Duration,
    /// Bytes that passed in each step since the transfer began, up to the last in which some did.
    pub history: Vec<u64>,
}

impl StageReading {
    fn identity(&self) -> Identity<'_> {
        identity(self.stage, &self.of, self.crew, &self.way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_since_is_the_difference_and_all_of_what_began_since() {
        let transfer = Transfer::default();
        let (main, other) = (Subject::repository("main"), Subject::repository("other"));
        let write = |of: &Subject, bytes| {
            let probe = transfer.stage(Stage::Write, of, Crew::Own, Way::Only);
            probe.work(|| std::thread::sleep(Duration::from_millis(2)));
            probe.add(bytes);
        };
        write(&main, 10);
        let before = transfer.reading();
        write(&main, 3);
        write(&other, 5);
        let (now, none) = (transfer.reading(), transfer.reading().since(&transfer.reading()));
        let since = now.since(&before);
        let bytes: Vec<_> =
            since.stages.iter().map(|stage| (stage.of.name.as_str(), stage.bytes, stage.pieces)).collect();
        assert_eq!(bytes, [("main", 3, 1), ("other", 5, 1)]);
        assert_eq!(since.stages[0].busy, now.stages[0].busy - before.stages[0].busy);
        assert_eq!(since.elapsed, now.elapsed - before.elapsed);
        assert!(none.stages.iter().all(|stage| stage.bytes == 0 && stage.busy.is_zero()));
    }
}
