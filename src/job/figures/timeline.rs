//! Throughput over time: how many bytes passed a stage in each of so many equal parts of a run, over all its transfers.

use std::time::Duration;

use super::transfer::{Pace, Place, Stage, Times, Transfer, learn};

/// One stage over the time of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Strip {
    /// The stage.
    pub stage: String,
    /// Where it is.
    pub of: Place,
    /// The pool of that.
    pub pool: Option<String>,
    /// Bytes in each part of the time. Their sum is what was counted within that time.
    pub bytes: Vec<u64>,
    /// All bytes.
    pub total: u64,
    /// How its workers spent their time.
    pub times: Times,
    /// In how many transfers the others waited for it.
    pub limited: u64,
}

/// Puts the stages of transfers on one line of time that is `length` long and has `parts` parts. Of each transfer is said when it began.
///
/// Stages of the same name and place are one. Those of one name stand together, in the order that the names have in transfers.
#[must_use]
pub fn strips(transfers: &[(Duration, &Transfer)], length: Duration, parts: usize) -> Vec<Strip> {
    let (mut strips, mut order) = (Vec::<Strip>::new(), Vec::new());
    for (begun, transfer) in transfers {
        learn(&mut order, &transfer.stages);
        let slowest = transfer.slowest();
        for (number, stage) in transfer.stages.iter().enumerate() {
            let is_same =
                |strip: &&mut Strip| (&strip.stage, &strip.of, &strip.pool) == (&stage.name, &stage.of, &stage.pool);
            let at = match strips.iter_mut().find(is_same) {
                Some(known) => known,
                None => {
                    strips.push(empty(stage, parts));
                    let Some(new) = strips.last_mut() else { continue };
                    new
                }
            };
            at.total = at.total.saturating_add(stage.bytes);
            at.times.add(stage.times(transfer.took));
            at.limited += u64::from(slowest == Some(number));
            if let Some(pace) = &stage.history {
                spread(&mut at.bytes, pace, *begun, length);
            }
        }
    }
    strips.sort_by_key(|strip| order.iter().position(|name| *name == strip.stage));
    strips
}

fn empty(stage: &Stage, parts: usize) -> Strip {
    Strip {
        stage: stage.name.clone(),
        of: stage.of.clone(),
        pool: stage.pool.clone(),
        bytes: vec![0; parts],
        total: 0,
        times: Times::default(),
        limited: 0,
    }
}

/// Adds what passed to the parts of the time in which it did; what lies beyond the end goes to the last.
fn spread(parts: &mut [u64], pace: &Pace, begun: Duration, length: Duration) {
    let count = parts.len() as u128;
    let (begun, step, length) = (begun.as_nanos(), pace.step.as_nanos(), length.as_nanos().max(1));
    let part_of = |time: u128| usize::try_from(time * count / length).unwrap_or(usize::MAX);
    for (number, bytes) in pace.bytes.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
        let from = begun + step * number as u128;
        let (first, last) = (part_of(from), part_of((from + step).saturating_sub(1).max(from)));
        let (first, last) = (first.min(parts.len() - 1), last.min(parts.len() - 1));
        let mut left = *bytes;
        for (number, part) in parts.iter_mut().enumerate().take(last).skip(first) {
            // Where this part of the time ends, of this step.
            let end = (length * (number as u128 + 1)).div_ceil(count);
            let passed = u128::from(*bytes) * (end - from).min(step) / step.max(1);
            let here = u64::try_from(passed).unwrap_or(u64::MAX).saturating_sub(*bytes - left);
            *part = part.saturating_add(here);
            left -= here.min(left);
        }
        parts[last] = parts[last].saturating_add(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(step_ms: u64, bytes: &[u64]) -> Pace {
        Pace { step: Duration::from_millis(step_ms), bytes: bytes.to_vec() }
    }

    #[test]
    fn bytes_are_spread_over_the_parts_of_the_time_in_which_they_passed_and_none_is_lost() {
        let second = Duration::from_secs(1);
        for (step_ms, bytes, begun, length, expected) in [
            // The same grid.
            (1000, &[1, 2, 3][..], 0, 4, [1, 2, 3, 0]),
            // A finer one.
            (500, &[1, 2, 3, 4], 0, 4, [3, 7, 0, 0]),
            // A coarser one: 8 bytes in two seconds.
            (2000, &[8, 4], 0, 4, [4, 4, 2, 2]),
            // Later.
            (1000, &[5], 3, 4, [0, 0, 0, 5]),
            // Across a boundary: 10 bytes from 0.5 to 1.5 of parts of a second.
            (2000, &[10], 1, 8, [5, 5, 0, 0]),
            // Beyond the end of the line, and on a line that has none.
            (1000, &[7, 9], 3, 4, [0, 0, 0, 16]),
            (1000, &[7, 9], 0, 0, [0, 0, 0, 16]),
            // Steps of no length.
            (0, &[7, 9], 1, 4, [0, 16, 0, 0]),
            // As much as there can be.
            (1000, &[u64::MAX, u64::MAX], 0, 1, [u64::MAX / 4; 4]),
        ] {
            let mut parts = [0; 4];
            spread(&mut parts, &pace(step_ms, bytes), second * begun, second * length);
            if bytes[0] < u64::MAX {
                assert_eq!(parts, expected, "{step_ms} ms, {bytes:?} from {begun} of {length} s");
            } else {
                assert_eq!(parts[3], u64::MAX, "it ends at the greatest number");
            }
        }
    }

    #[test]
    fn the_stages_of_several_transfers_are_one_line_of_time_each() {
        let stage = |name: &str, repository: &str, bytes: &[u64]| Stage {
            name: name.to_owned(),
            of: Place { kind: crate::probe::Kind::Repository, name: repository.to_owned() },
            bytes: bytes.iter().sum(),
            busy: Duration::from_secs(1),
            input: Duration::from_secs(3),
            history: Some(pace(1000, bytes)),
            ..Stage::default()
        };
        let one =
            Transfer { stages: vec![stage("read", "a", &[1]), stage("write", "main", &[2, 2])], ..Transfer::default() };
        let two =
            Transfer { stages: vec![stage("read", "b", &[7]), stage("write", "main", &[4])], ..Transfer::default() };
        let strips = strips(&[(Duration::ZERO, &one), (Duration::from_secs(1), &two)], Duration::from_secs(3), 3);
        let shown: Vec<_> =
            strips.iter().map(|strip| (strip.of.name.as_str(), strip.bytes.as_slice(), strip.total)).collect();
        assert_eq!(shown, [("a", &[1, 0, 0][..], 1), ("b", &[0, 7, 0], 7), ("main", &[2, 6, 0], 8)]);
        assert_eq!((strips[2].times.busy, strips[2].times.all), (Duration::from_secs(2), Duration::from_secs(8)));
    }
}
