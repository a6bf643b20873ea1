//! The bytes of a value: where they lie, and those that must be decoded.
//!
//! ```text
//! clusters │A A A A A A A A│A A A . . . . .│. . . . . . . .│     A: on the volume, .: a hole
//!          └── as it is ───┴── compressed ─┴─── a hole ────┘     in units of mostly 16
//! ```
//!
//! What lies past the initialized size was never written, and reads as zeroes whatever stands there.

use super::lznt1;
use super::record::{Form, NonResident};
use super::runs::Run;
use super::stream::{Runs, Stream, read_runs};
use super::volume::{Node, Volume};
use crate::{Error, Extent, Extents, Result, Source};

/// Clusters of a unit, as a power of two, at most; Windows makes none of another size.
const MAX_UNIT_SHIFT: u8 = 4;

/// Extents asked for at once where the bytes of a value are read: most are in one piece.
const ROOM: usize = 64;

/// Runs asked for at least, so that there is always one unit.
const UNIT_RUNS: usize = 1 << MAX_UNIT_SHIFT;

/// Returns extents of a value.
pub(super) fn extents(volume: &Volume, node: &Node, stream: &Stream, from: u64, room: usize) -> Result<Extents> {
    let size = stream.size()?;
    if from >= size {
        return Ok(Extents { found: Vec::new(), until: from });
    }
    let head = match &stream.head.form {
        Form::Resident(bytes) => {
            let extent = Extent { start: 0, len: size, source: Source::Bytes(bytes.clone()) };
            return Ok(Extents { found: vec![extent], until: size });
        }
        Form::NonResident(head) => head,
    };
    let number = node.number();
    if stream.head.is_encrypted() {
        return Err(Error::unsupported(format!(
            "file {number} is encrypted by Windows (EFS): the key is not in the volume"
        )));
    }
    let is_compressed = stream
        .head
        .compression()
        .filter(|is_compressed| !is_compressed || head.unit_shift <= MAX_UNIT_SHIFT)
        .ok_or_else(|| Error::unsupported(format!("file {number} is compressed in a way that is not known")))?;
    let cluster_size = volume.boot.cluster_size;
    let unit = if is_compressed { 1 << head.unit_shift } else { 1 };
    let first = from / cluster_size / unit * unit;
    let room = room.max(1);
    let runs = stream.runs(volume, node, first, if is_compressed { room.max(UNIT_RUNS) } else { room })?;
    let (found, until) = if is_compressed {
        pieces(&runs, first, unit, room).map_err(|error| super::record::of_record(number, &error))?
    } else {
        (runs.found.iter().filter_map(|run| Some((run.start, run.len, Piece::At(run.at?)))).collect(), runs.until)
    };
    let until = until.saturating_mul(cluster_size).min(size);
    let mut extents = Vec::with_capacity(found.len());
    for (start, len, piece) in found {
        let start = start * cluster_size;
        let end = (start + len * cluster_size).min(size);
        let written = end.min(head.initialized).max(start);
        let source = match piece {
            Piece::At(at) => Source::Member(0, at * cluster_size),
            Piece::Compressed => Source::Encoded,
        };
        for (start, end, source) in [(start, written, source), (written, end, Source::Zeroes)] {
            if end > start.max(from) {
                extents.push(Extent { start, len: end - start, source });
            }
        }
    }
    Ok(Extents { found: extents, until })
}

/// Clusters that lie together: the first, how many, and where.
type Pieces = Vec<(u64, u64, Piece)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    At(u64),
    Compressed,
}

/// Returns the pieces of units from cluster `from` on, some `room` of them at most, and the cluster up to which that
/// is all.
fn pieces(runs: &Runs, from: u64, unit: u64, room: usize) -> Result<(Pieces, u64)> {
    let mut found = Pieces::new();
    let mut at = from;
    let mut rest = runs.found.as_slice();
    while found.len() < room && at < runs.until {
        while rest.first().is_some_and(|run| run.end() <= at) {
            rest = &rest[1..];
        }
        let Some(run) = rest.first() else { break };
        let whole = (run.end() - at) / unit * unit;
        if whole > 0 {
            if let Some(place) = run.at {
                found.push((at, whole, Piece::At(place + (at - run.start))));
            }
            at += whole;
            continue;
        }
        if runs.until - at < unit && at > from {
            // The rest of this unit comes with the next part.
            break;
        }
        let parts = unit_parts(rest, at, unit)?;
        if parts.iter().map(|part| part.len).sum::<u64>() < unit.min(runs.until - at) {
            match found.last_mut() {
                Some((start, len, Piece::Compressed)) if *start + *len == at => *len += unit,
                _ => found.push((at, unit, Piece::Compressed)),
            }
        } else {
            found.extend(parts.iter().filter_map(|part| Some((part.start, part.len, Piece::At(part.at?)))));
        }
        at += unit;
    }
    Ok((found, at.min(runs.until)))
}

/// Returns what of a unit is on the volume, which is its start.
fn unit_parts(runs: &[Run], at: u64, unit: u64) -> Result<Vec<Run>> {
    let mut parts = Vec::new();
    let mut is_ended = false;
    for run in runs.iter().take_while(|run| run.start < at + unit) {
        let (start, end) = (run.start.max(at), run.end().min(at + unit));
        match run.at {
            Some(_) if is_ended => return Err(Error::damaged(format!("the unit at cluster {at} starts with a hole"))),
            Some(place) => {
                parts.push(Run { start, len: end - start, at: Some(place + (start - run.start)) });
            }
            None => is_ended = true,
        }
    }
    Ok(parts)
}

/// Fills a buffer with bytes of a value from `offset` on, all of which are within it.
pub(super) fn read(volume: &Volume, node: &Node, stream: &Stream, offset: u64, buffer: &mut [u8]) -> Result<()> {
    buffer.fill(0);
    let end = offset + buffer.len() as u64;
    let mut at = offset;
    while at < end {
        let extents = extents(volume, node, stream, at, ROOM)?;
        for extent in extents.found {
            let (start, last) = (extent.start.max(at), (extent.start + extent.len).min(end));
            if start >= last {
                continue;
            }
            let within = |place: u64| usize::try_from(place - offset).expect("within the buffer");
            let here = &mut buffer[within(start)..within(last)];
            match extent.source {
                Source::Member(_, place) => volume.disk.read_at(place + (start - extent.start), here)?,
                Source::Bytes(bytes) => {
                    let from = usize::try_from(start - extent.start).expect("within bytes in memory");
                    here.copy_from_slice(&bytes[from..from + here.len()]);
                }
                Source::Zeroes => {}
                Source::Encoded => decode(volume, node, stream, start, here, &mut Unit::default())?,
            }
        }
        if extents.until <= at {
            return Err(Error::damaged(format!("record {}: {at} bytes are read of a value of fewer", node.number())));
        }
        at = extents.until;
    }
    Ok(())
}

/// A unit that was decoded.
#[derive(Debug, Default)]
pub(super) struct Unit {
    /// The file, and where in it the unit starts (bytes).
    pub(super) key: Option<(u64, u64)>,
    pub(super) bytes: Vec<u8>,
}

/// Fills a buffer with bytes of compressed units; `last` is the one that was decoded last.
pub(super) fn decode(
    volume: &Volume,
    node: &Node,
    stream: &Stream,
    offset: u64,
    buffer: &mut [u8],
    last: &mut Unit,
) -> Result<()> {
    let Form::NonResident(head) = &stream.head.form else {
        return Err(Error::damaged(format!("record {}: nothing of it is compressed", node.number())));
    };
    if stream.head.compression() != Some(true) || head.unit_shift > MAX_UNIT_SHIFT {
        return Err(Error::damaged(format!("record {}: nothing of it is compressed", node.number())));
    }
    let unit_size = volume.boot.cluster_size << head.unit_shift;
    let (mut at, mut rest) = (offset, buffer);
    while !rest.is_empty() {
        let start = at / unit_size * unit_size;
        let key = Some((node.number(), start));
        if last.key != key {
            last.key = None;
            decode_unit(volume, node, stream, head, start, &mut last.bytes)?;
            last.key = key;
        }
        let from = usize::try_from(at - start).expect("within a unit");
        let len = rest.len().min(last.bytes.len() - from);
        let (here, after) = rest.split_at_mut(len);
        here.copy_from_slice(&last.bytes[from..from + len]);
        rest = after;
        at += len as u64;
    }
    Ok(())
}

fn decode_unit(
    volume: &Volume,
    node: &Node,
    stream: &Stream,
    head: &NonResident,
    start: u64,
    bytes: &mut Vec<u8>,
) -> Result<()> {
    let (cluster_size, unit) = (volume.boot.cluster_size, 1 << head.unit_shift);
    let within = |error: Error| Error::new(error.kind(), format!("record {}, at {start}: {error}", node.number()));
    let first = start / cluster_size;
    let runs = stream.runs(volume, node, first, UNIT_RUNS)?;
    let parts = unit_parts(&runs.found, first, unit).map_err(within)?;
    let stored = parts.iter().map(|part| part.len).sum::<u64>() * cluster_size;
    let mut packed = vec![0; usize::try_from(stored).expect("at most a unit")];
    read_runs(volume, &parts, start, &mut packed).map_err(within)?;
    bytes.clear();
    bytes.resize(usize::try_from(unit * cluster_size).expect("at most 16 times 2 MiB"), 0);
    lznt1::decode(&packed, bytes).map_err(within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_as_it_is_or_compressed_or_a_hole() {
        let run = |start, len, at| Run { start, len, at };
        let runs = Runs {
            found: vec![
                run(0, 8, Some(100)),
                run(8, 3, Some(200)),
                run(11, 21, None),
                run(32, 4, Some(300)),
                run(36, 4, Some(400)),
                run(40, 1, Some(500)),
                run(41, 7, None),
                run(48, 7, Some(600)),
                run(55, 1, None),
            ],
            until: 56,
        };
        let all = vec![
            (0, 8, Piece::At(100)),
            (8, 8, Piece::Compressed),
            (32, 4, Piece::At(300)),
            (36, 4, Piece::At(400)),
            (40, 16, Piece::Compressed),
        ];
        assert_eq!(pieces(&runs, 0, 8, 100), Ok((all.clone(), 56)));
        assert_eq!(pieces(&runs, 16, 8, 1), Ok((all[2..4].to_vec(), 40)));
        assert_eq!(pieces(&runs, 16, 8, 3), Ok((vec![all[2], all[3], (40, 8, Piece::Compressed)], 48)));
        let odd = Runs { found: vec![run(0, 2, None), run(2, 6, Some(7))], until: 8 };
        pieces(&odd, 0, 8, 100).expect_err("a hole first");
    }
}
