//! Where the clusters of a value lie: pairs of a length and a distance, as few bytes as each needs.
//!
//! ```text
//! 0x21  18  34 56   a length of 1 byte: 0x18 clusters; a distance of 2: 0x5634 after where the one before starts
//! 0x01  20          no distance: 0x20 clusters that are a hole
//! 0x00              the end
//! ```
//!
//! Source: "Data Runs" of the Linux-NTFS documentation.

use std::ops::Range;

use crate::{Error, Result};

/// Clusters of a value that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first, counted in the value.
    pub(super) start: u64,
    /// How many, never 0.
    pub(super) len: u64,
    /// The first, counted on the volume; none of a hole.
    pub(super) at: Option<u64>,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Parses the pairs of the clusters `range` of a value on a volume of so many clusters.
///
/// # Errors
/// [`Damaged`](crate::ErrorKind::Damaged) unless they map each of these clusters to one of the volume, or a hole.
pub(super) fn parse(mut pairs: &[u8], range: Range<u64>, clusters: u64) -> Result<Vec<Run>> {
    let damaged = |what: &str| Error::damaged(format!("clusters {} to {}: {what}", range.start, range.end));
    let mut runs = Vec::new();
    let (mut start, mut place) = (range.start, 0_i64);
    while let Some((head, rest)) = pairs.split_first().filter(|(head, _)| **head != 0) {
        let (len_size, place_size) = (usize::from(head & 0x0f), usize::from(head >> 4));
        let (Some(len), Some(distance)) =
            (rest.get(..len_size).and_then(number), rest.get(len_size..len_size + place_size).and_then(number))
        else {
            return Err(damaged("a run does not fit"));
        };
        pairs = &rest[len_size + place_size..];
        let len = u64::try_from(len).ok().filter(|len| (1..=range.end - start).contains(len));
        let len = len.ok_or_else(|| damaged("a run is longer than what it is a part of"))?;
        let at = if place_size == 0 {
            None
        } else {
            place = place.checked_add(distance).ok_or_else(|| damaged("a run lies nowhere"))?;
            // A hole of old versions.
            (place != -1).then(|| u64::try_from(place)).transpose().map_err(|_| damaged("a run lies nowhere"))?
        };
        if at.is_some_and(|at| at >= clusters || len > clusters - at) {
            return Err(damaged(&format!("a run of {len} at {place} is not within the {clusters} of the volume")));
        }
        runs.push(Run { start, len, at });
        start += len;
    }
    if start != range.end {
        return Err(damaged(&format!("nothing says where those from {start} on lie")));
    }
    Ok(runs)
}

/// Returns the cluster of the value after the last that pairs map, of which the first is `first`.
pub(super) fn end(mut pairs: &[u8], first: u64) -> Option<u64> {
    let mut end = first;
    while let Some((head, rest)) = pairs.split_first().filter(|(head, _)| **head != 0) {
        let (len_size, place_size) = (usize::from(head & 0x0f), usize::from(head >> 4));
        let len = rest.get(..len_size).and_then(number)?;
        end = end.checked_add(u64::try_from(len).ok()?)?;
        pairs = rest.get(len_size + place_size..)?;
    }
    Some(end)
}

/// Returns a number of 0 to 8 bytes with its sign.
fn number(bytes: &[u8]) -> Option<i64> {
    let mut all = match bytes.last() {
        Some(last) if *last >= 0x80 => [0xff; 8],
        _ => [0; 8],
    };
    all.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(i64::from_le_bytes(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_of_any_size_and_in_any_order() {
        let pairs = [0x21, 0x18, 0x34, 0x56, 0x01, 0x20, 0x11, 0x03, 0xf0, 0x22, 0x00, 0x01, 0x00, 0xb0, 0x00, 0xff];
        let run = |start, len, at| Run { start, len, at };
        let expected = vec![
            run(5, 0x18, Some(0x5634)),
            run(0x1d, 0x20, None),
            run(0x3d, 3, Some(0x5624)),
            run(0x40, 0x100, Some(0x624)),
        ];
        assert_eq!(parse(&pairs, 5..0x140, 0x564c), Ok(expected));
        assert_eq!(parse(&[0x11, 4, 0xff, 0], 0..4, 10), Ok(vec![run(0, 4, None)]));
        assert_eq!(parse(&[], 0..0, 10), Ok(vec![]));
    }

    #[test]
    fn runs_that_map_something_else_are_damage() {
        let cases: [(&[u8], u64); 9] = [
            (&[0x11, 4, 7, 0], 4),
            (&[0x11, 4, 0xfe, 0], 4),
            (&[0x11, 4, 2, 0], 3),
            (&[0x11, 4, 2, 0], 5),
            (&[0x11, 0, 2, 0], 0),
            (&[0x11, 0xff, 2, 0], 4),
            (&[0x10, 2], 4),
            (&[0x1f, 4, 2], 4),
            (&[0x18, 1, 0, 0, 0, 0, 0, 0, 0x7f, 2], 1 << 63),
        ];
        for (pairs, end) in cases {
            parse(pairs, 0..end, 10).expect_err("not these clusters");
        }
    }
}
