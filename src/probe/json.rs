//! Readings as JSON: what `--json` and the log of a job say.

use serde_json::{Value, json};

use super::bottleneck::Bottleneck;
use super::stage::Subject;
use super::transfer::{Reading, StageReading};

/// Returns all of a reading.
#[must_use]
pub fn transfer_to_json(reading: &Reading) -> Value {
    json!({
        "seconds": reading.elapsed.as_secs_f64(),
        "stages": stages_to_json(reading, true),
        "bottleneck": bottleneck_to_json(&reading.bottleneck()),
    })
}

/// Returns the stages, with their bytes over time if these are asked for. One that two crews do is told once.
#[must_use]
pub fn stages_to_json(reading: &Reading, has_history: bool) -> Value {
    let is_same = |a: &StageReading, b: &StageReading| a.stage == b.stage && a.of == b.of;
    reading.stages.chunk_by(is_same).map(|same| stage_to_json(same, has_history)).collect()
}

fn stage_to_json(same: &[StageReading], has_history: bool) -> Value {
    let seconds = |time: fn(&StageReading) -> std::time::Duration| -> f64 {
        same.iter().map(|stage| time(stage).as_secs_f64()).sum()
    };
    let first = &same[0];
    let mut json = json!({
        "stage": first.stage.name(),
        "of": subject_to_json(&first.of),
        "pool": first.of.pool,
        "workers": same.iter().map(|stage| stage.workers).sum::<usize>(),
        "bytes": same.iter().map(|stage| stage.bytes).sum::<u64>(),
        "busySeconds": seconds(|stage| stage.busy),
        "inputSeconds": seconds(|stage| stage.input),
        "outputSeconds": seconds(|stage| stage.output),
    });
    if has_history {
        // Their steps are of one length only by chance: each is a power of two of the others.
        let step = same.iter().map(|stage| stage.step).max().unwrap_or_default();
        let mut bytes: Vec<u64> = Vec::new();
        for stage in same {
            let many = usize::try_from(step.as_nanos() / stage.step.as_nanos().max(1)).unwrap_or(usize::MAX).max(1);
            let steps = stage.history.chunks(many).map(|steps| steps.iter().sum::<u64>());
            bytes.resize(bytes.len().max(stage.history.len().div_ceil(many)), 0);
            bytes.iter_mut().zip(steps).for_each(|(sum, bytes)| *sum += bytes);
        }
        json["history"] = json!({ "stepSeconds": step.as_secs_f64(), "bytes": bytes });
    }
    json
}

fn subject_to_json(of: &Subject) -> Value {
    json!({ "kind": of.kind.name(), "name": of.name })
}

fn bottleneck_to_json(bottleneck: &Bottleneck) -> Value {
    json!({
        "stage": bottleneck.stage.as_ref().map(|(stage, _)| stage.name()),
        "of": bottleneck.stage.as_ref().map(|(_, of)| subject_to_json(of)),
        "evidence": bottleneck.evidence,
        "advice": bottleneck.advice,
        "line": bottleneck.line(),
    })
}
