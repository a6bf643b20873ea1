//! What a log says of a transfer or a merge: its stages, and which one the others waited for.
//!
//! Older logs have none of it, and what is missing is as if nothing had been counted. What is no number, or none that there can be, is
//! zero; sums of these values end at the greatest number instead of going beyond.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::probe::Kind;

/// A transfer, or the merges of a repository.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Transfer {
    /// How long it took.
    #[serde(rename = "seconds", deserialize_with = "seconds")]
    pub took: Duration,
    /// What it consisted of, in the order in which bytes go through them.
    pub stages: Vec<Stage>,
    /// The stage that the others waited for.
    pub bottleneck: Option<Bottleneck>,
}

/// A part of a transfer; times are sums over its workers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Stage {
    /// What it does: `read`, `hash`, `write`.
    #[serde(rename = "stage")]
    pub name: String,
    /// Where that happens.
    pub of: Place,
    /// The pool that this is in, as the configuration calls it.
    pub pool: Option<String>,
    /// The most threads that were at it at once.
    pub workers: u64,
    /// Bytes that passed.
    pub bytes: u64,
    /// Time at work.
    #[serde(rename = "busySeconds", deserialize_with = "seconds")]
    pub busy: Duration,
    /// Time blocked on what is before it.
    #[serde(rename = "inputSeconds", deserialize_with = "seconds")]
    pub input: Duration,
    /// Time blocked on what is behind it.
    #[serde(rename = "outputSeconds", deserialize_with = "seconds")]
    pub output: Duration,
    /// How many bytes passed when.
    pub history: Option<Pace>,
}

/// How many bytes passed in each of several times of equal length, from the beginning of the transfer.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Pace {
    /// How long each of them is.
    #[serde(rename = "stepSeconds", deserialize_with = "seconds")]
    pub step: Duration,
    /// Bytes in each.
    pub bytes: Vec<u64>,
}

/// What the others waited for.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Bottleneck {
    /// The stage; `None` if none of them explains how long it took.
    pub stage: Option<String>,
    /// Where it is.
    pub of: Option<Place>,
    /// All of it in a line: what it is, the evidence, what to change; or why nothing can be said.
    pub line: String,
}

/// Where a stage happens.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Place {
    /// What it is.
    pub kind: Kind,
    /// What it is called.
    pub name: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.name.as_str()) {
            (kind, "") | (kind @ Kind::Machine, _) => f.write_str(kind.shown()),
            (kind, name) => write!(f, "{} {name}", kind.shown()),
        }
    }
}

impl Transfer {
    /// Reads what stands under the key `transfer` of what a command wrote; `None` if there is nothing, or nothing that can be understood.
    #[must_use]
    pub fn of(written: &Value) -> Option<Self> {
        Self::deserialize(written.get("transfer").filter(|transfer| transfer.is_object())?).ok()
    }

    /// Returns the number of the stage that the others waited for.
    #[must_use]
    pub fn slowest(&self) -> Option<usize> {
        let bottleneck = self.bottleneck.as_ref()?;
        let (name, of) = bottleneck.stage.as_ref().zip(bottleneck.of.as_ref())?;
        self.stages.iter().position(|stage| stage.name == *name && stage.of == *of)
    }
}

impl Bottleneck {
    /// Says it in a sentence; empty if nothing was said.
    #[must_use]
    pub fn sentence(&self) -> String {
        if self.stage.is_some() { format!("limited by {}", self.line) } else { self.line.clone() }
    }
}

impl Stage {
    /// Returns its times in a transfer that took so long.
    #[must_use]
    pub fn times(&self, took: Duration) -> Times {
        let counted = self.busy.saturating_add(self.input).saturating_add(self.output);
        let workers = u32::try_from(self.workers).unwrap_or(u32::MAX);
        Times {
            busy: self.busy,
            input: self.input,
            output: self.output,
            all: took.saturating_mul(workers).max(counted),
        }
    }
}

/// Adds the names of stages to an order of names: a new one stands behind the one that is before it here.
pub(super) fn learn(order: &mut Vec<String>, stages: &[Stage]) {
    let mut next = 0;
    for stage in stages {
        let known = order.iter().position(|name| *name == stage.name);
        let at = known.unwrap_or(next);
        if known.is_none() {
            order.insert(at, stage.name.clone());
        }
        next = at + 1;
    }
}

/// How the workers of a stage spent their time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// At work.
    pub busy: Duration,
    /// Waiting for input.
    pub input: Duration,
    /// Waiting for output.
    pub output: Duration,
    /// As long as there were transfers, of each worker: also what it did for other stages, and before and after.
    pub all: Duration,
}

/// What part of its workers' time a stage worked and waited, in thousandths; all zero if there was no time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shares {
    /// At work.
    pub busy: u32,
    /// Waiting for input.
    pub input: u32,
    /// Waiting for output.
    pub output: u32,
}

impl Times {
    /// Adds those of another transfer.
    pub fn add(&mut self, other: Self) {
        let sums = [&mut self.busy, &mut self.input, &mut self.output, &mut self.all];
        for (sum, time) in sums.into_iter().zip([other.busy, other.input, other.output, other.all]) {
            *sum = sum.saturating_add(time);
        }
    }

    /// Returns what part of the time that is.
    #[must_use]
    pub fn shares(&self) -> Shares {
        let all = self.all.as_nanos().max(1);
        let part = |time: Duration| u32::try_from((time.as_nanos() * 1000 + all / 2) / all).unwrap_or(1000).min(1000);
        Shares { busy: part(self.busy), input: part(self.input), output: part(self.output) }
    }
}

/// Returns how many bytes a second that is; zero in no time.
#[must_use]
pub fn rate(bytes: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos();
    let rate = (u128::from(bytes) * 1_000_000_000).checked_div(nanos).unwrap_or(0);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Nothing takes longer: a century.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// Makes a time of seconds; of what is no time that there can be, none.
pub(super) fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).ok().filter(|time| *time <= LONGEST).unwrap_or_default()
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    Ok(duration(Option::<f64>::deserialize(deserializer)?.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_transfer_is_read_as_it_was_written() {
        let written = json!({ "transfer": {
            "seconds": 9.5,
            "stages": [{
                "stage": "read", "of": { "kind": "host", "name": "xcp1" }, "pool": "lab", "workers": 16, "bytes": 148_000_000,
                "busySeconds": 70.5, "inputSeconds": 0.25, "outputSeconds": 61.75,
                "history": { "stepSeconds": 1.0, "bytes": [120, 130] },
            }],
            "bottleneck": {
                "stage": "read", "of": { "kind": "host", "name": "xcp1" }, "evidence": "busy 94 %", "advice": "more", "line": "host xcp1: more",
            },
        } });
        let transfer = Transfer::of(&written).expect("it is one");
        let stage = &transfer.stages[0];
        assert_eq!((transfer.took, transfer.slowest()), (Duration::from_millis(9500), Some(0)));
        assert_eq!((stage.of.to_string().as_str(), stage.pool.as_deref()), ("host xcp1", Some("lab")));
        // Of 16 workers for 9.5 s each.
        assert_eq!(stage.times(transfer.took).shares(), Shares { busy: 464, input: 2, output: 406 });
        assert_eq!(
            stage.history.as_ref().map(|pace| (pace.step.as_secs(), pace.bytes.as_slice())),
            Some((1, &[120, 130][..]))
        );
        assert_eq!(transfer.bottleneck.expect("said").sentence(), "limited by host xcp1: more");
    }

    #[test]
    fn what_is_missing_or_no_number_is_nothing() {
        for (written, expected) in [
            (json!({}), None),
            (json!({ "transfer": null }), None),
            (json!({ "transfer": "9 s" }), None),
            (json!({ "transfer": { "stages": [{ "bytes": -1 }] } }), None),
            (json!({ "transfer": {} }), Some(Transfer::default())),
            (json!({ "transfer": { "seconds": -3.0, "later": [] } }), Some(Transfer::default())),
            (json!({ "transfer": { "seconds": 1e300, "bottleneck": null } }), Some(Transfer::default())),
        ] {
            assert_eq!(Transfer::of(&written), expected, "{written}");
        }
        let of = |of: Value| Transfer::of(&json!({ "transfer": { "stages": [{ "of": of }] } })).expect("one");
        assert_eq!(of(json!({ "kind": "moon", "name": "x" })).stages[0].of.to_string(), "this machine");
        assert_eq!(of(json!({ "kind": "sr" })).stages[0].of.to_string(), "SR");
        let short =
            json!({ "transfer": { "bottleneck": { "stage": null, "of": null, "advice": null, "line": "too short" } } });
        let short = Transfer::of(&short).expect("one");
        assert_eq!((short.slowest(), short.bottleneck.expect("said").sentence()), (None, "too short".to_owned()));
        assert_eq!(Transfer::default().slowest(), None);
    }

    #[test]
    fn a_stage_that_only_later_transfers_have_stands_where_they_have_it() {
        let mut order = Vec::new();
        for names in
            [&["read", "hash", "write", "write", "sync"][..], &["lock", "read", "base", "hash"], &["sync", "publish"]]
        {
            let stage = |name: &&str| Stage { name: (*name).to_owned(), ..Stage::default() };
            learn(&mut order, &names.iter().map(stage).collect::<Vec<_>>());
        }
        assert_eq!(order, ["lock", "read", "base", "hash", "write", "sync", "publish"]);
    }

    #[test]
    fn rates_and_shares_have_no_time_that_breaks_them() {
        assert_eq!(rate(3 << 20, Duration::from_millis(1500)), 2 << 20);
        assert_eq!((rate(7, Duration::ZERO), rate(u64::MAX, Duration::from_nanos(1))), (0, u64::MAX));
        assert_eq!(Times::default().shares(), Shares::default());
        let times = |busy, input| Stage { busy, input, ..Stage::default() }.times(Duration::from_secs(9)).shares();
        // Where nobody said how many workers there were, by what was counted.
        assert_eq!(times(Duration::from_secs(1), Duration::from_secs(3)), Shares { busy: 250, input: 750, output: 0 });
        assert_eq!(times(Duration::MAX, Duration::MAX).busy, 1000);
    }
}
