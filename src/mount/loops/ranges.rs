//! Ranges of bytes: which were written.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges that neither overlap nor touch: start → end.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    ends: BTreeMap<u64, u64>,
    len: u64,
}

impl Ranges {
    /// Returns how many bytes are in them.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Adds a range.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        while let Some((&from, &to)) = self.ends.range(..=end).next_back().filter(|(_, to)| **to >= start) {
            self.ends.remove(&from);
            self.len -= to - from;
            (start, end) = (start.min(from), end.max(to));
        }
        if start < end {
            self.ends.insert(start, end);
            self.len += end - start;
        }
    }

    /// Splits a range into pieces that are in these ranges (true) and such that are not, in order.
    pub(super) fn pieces(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        let before = self.ends.range(..range.start).next_back();
        for (&from, &to) in before.into_iter().chain(self.ends.range(range.start..range.end)) {
            let (from, to) = (from.max(at), to.min(range.end));
            if from >= to {
                continue;
            }
            if at < from {
                pieces.push((at..from, false));
            }
            pieces.push((from..to, true));
            at = to;
        }
        if at < range.end {
            pieces.push((at..range.end, false));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_become_one_and_pieces_cover_what_is_asked() {
        let mut ranges = Ranges::default();
        for range in [10..20, 30..40, 50..60, 40..45, 5..5, 15..18] {
            ranges.insert(range);
        }
        assert_eq!((ranges.len(), ranges.ends.len()), (35, 3));
        assert_eq!(
            ranges.pieces(12..55),
            [(12..20, true), (20..30, false), (30..45, true), (45..50, false), (50..55, true)]
        );
        assert_eq!(ranges.pieces(0..10), [(0..10, false)]);
        assert_eq!(ranges.pieces(20..31), [(20..30, false), (30..31, true)]);
        ranges.insert(19..51);
        assert_eq!((ranges.len(), ranges.ends.len()), (50, 1));
        assert_eq!(ranges.pieces(0..70), [(0..10, false), (10..60, true), (60..70, false)]);
    }

    #[test]
    fn any_ranges_are_as_a_flat_array_has_them() {
        // A generator of numbers that does not repeat soon.
        let mut state = 7_u64;
        let mut random = move |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        for _ in 0..200 {
            let (mut ranges, mut flat) = (Ranges::default(), [false; 64]);
            for _ in 0..12 {
                let start = random(60);
                let end = start + random(65 - start);
                ranges.insert(start..end);
                (start..end).for_each(|at| flat[usize::try_from(at).unwrap()] = true);
                let (start, mut at) = (random(60), 0);
                let end = start + random(65 - start);
                for (piece, is_in) in ranges.pieces(start..end) {
                    assert!(piece.start == if at == 0 { start } else { at } && piece.start < piece.end, "{piece:?}");
                    assert!(piece.clone().all(|at| flat[usize::try_from(at).unwrap()] == is_in), "{piece:?}");
                    at = piece.end;
                }
                assert!(at == end || start == end);
                assert_eq!(ranges.len(), flat.iter().map(|is_in| u64::from(*is_in)).sum::<u64>());
            }
        }
    }
}
