//! What changed of a disk between two snapshots, as the pool has tracked it (CBT).
//!
//! A bit for each 64 KiB, the most significant bit of the first byte for the first; the bits behind the end of the disk mean
//! nothing. Where there is any doubt, there is no answer: then the disk is compared as a whole. That a block did not change
//! says something only to who has exactly what the older snapshot holds.
//! Sources: blktap, `include/cbt-util.h`; sm, `libs/sm/VDI.py`.

use std::fmt;
use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use crate::error::quoted;
use crate::record::Vdi;
use crate::{ErrorKind, Pool, Ref, Result};

/// What one bit tells of (bytes).
const GRANULE: u64 = 64 << 10;
/// The largest disk that is believed in (bytes): its bits take 128 MiB.
const LARGEST: u64 = 64 << 40;

/// The parts of a disk that may have changed, in granules of 64 KiB.
#[derive(Clone, PartialEq, Eq)]
pub struct ChangedBlocks {
    size: u64,
    bits: Vec<u8>,
}

/// What a pool can say about changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changes {
    /// These parts, and no others, may differ.
    Known(ChangedBlocks),
    /// It does not know; why, in a sentence for humans.
    Unknown(String),
}

impl Pool {
    /// Asks what changed from the snapshot `from` to the later one `to` of the same disk, of which `size` is the size in bytes.
    /// Nothing may read `to` meanwhile: changes come first, then [`Pool::nbd`].
    ///
    /// # Errors
    /// As [`Pool::call`], where that is no doubt about the changes but about the pool: it is not there, or was cancelled.
    pub fn changed_blocks(&self, from: &Ref<Vdi>, to: &Ref<Vdi>, size: u64) -> Result<Changes> {
        if from == to {
            return Ok(Changes::Unknown("a snapshot cannot be compared with itself".to_owned()));
        }
        for (vdi, which) in [(from, "older"), (to, "newer")] {
            if !self.field::<Vdi, bool>(vdi, "cbt_enabled")? {
                return Ok(Changes::Unknown(format!("changed blocks are not tracked for the {which} snapshot")));
            }
        }
        match self.call::<String>("VDI.list_changed_blocks", &[json!(from), json!(to)]) {
            Ok(text) => Ok(ChangedBlocks::decode(&text, size).map_or_else(Changes::Unknown, Changes::Known)),
            Err(error) => match error.kind() {
                ErrorKind::Api | ErrorKind::Denied | ErrorKind::Unsupported | ErrorKind::Protocol => {
                    Ok(Changes::Unknown(error.to_string()))
                }
                _ => Err(error),
            },
        }
    }
}

impl ChangedBlocks {
    /// Reads what the pool answered, of a disk of `size` bytes.
    ///
    /// # Errors
    /// Why it cannot be that of such a disk.
    pub fn decode(text: &str, size: u64) -> std::result::Result<Self, String> {
        if size > LARGEST {
            return Err(format!("a disk of {size} bytes is larger than any that is read"));
        }
        let expected = usize::try_from(size.div_ceil(GRANULE).div_ceil(8)).map_err(|error| error.to_string())?;
        // Base64 has four letters for three bytes, and may have been broken into lines.
        if text.len() / 2 > expected.saturating_add(1024) {
            return Err(format!("{expected} bytes of changed blocks were expected, the pool gave far more"));
        }
        let letters: Vec<u8> = text.bytes().filter(|letter| !letter.is_ascii_whitespace()).collect();
        let bits = STANDARD.decode(letters).map_err(|error| {
            format!("the pool gave changed blocks that are no base64: {}", quoted(&error.to_string()))
        })?;
        if bits.len() != expected {
            return Err(format!(
                "{expected} bytes of changed blocks were expected of a disk of {size} bytes, the pool gave {}",
                bits.len()
            ));
        }
        Ok(Self { size, bits })
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns how many bytes may have changed.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs().map(|run| run.end - run.start).sum()
    }

    /// Yields what may have changed as ranges of bytes, ascending, with something between each two; the last is cut off at
    /// the end of the disk.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let count = self.size.div_ceil(GRANULE);
        let mut at = 0;
        std::iter::from_fn(move || {
            let begin = self.next(at, count, true);
            let end = self.next(begin, count, false);
            at = end;
            (begin < count).then(|| begin * GRANULE..self.size.min(end * GRANULE))
        })
    }

    /// Returns the first granule from `at` on that has changed, or has not; `count` if there is none.
    fn next(&self, at: u64, count: u64, is_changed: bool) -> u64 {
        let whole = if is_changed { 0 } else { 0xff };
        let mut at = at;
        while at < count {
            let byte = usize::try_from(at / 8).ok().and_then(|index| self.bits.get(index)).copied().unwrap_or(0xff);
            if at.is_multiple_of(8) && byte == whole {
                at += 8;
            } else if (byte & (0x80 >> (at % 8)) != 0) == is_changed {
                return at;
            } else {
                at += 1;
            }
        }
        count
    }
}

impl fmt::Debug for ChangedBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChangedBlocks({} of {} bytes)", self.bytes(), self.size)
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bits: &[u8], size: u64) -> std::result::Result<ChangedBlocks, String> {
        ChangedBlocks::decode(&STANDARD.encode(bits), size)
    }

    fn runs(bits: &[u8], size: u64) -> Vec<Range<u64>> {
        decode(bits, size).unwrap().runs().collect()
    }

    #[test]
    fn the_first_bit_is_the_most_significant_one() {
        let (size, granule) = (16 * GRANULE, GRANULE);
        assert_eq!(runs(&[0x80, 0], size), [0..granule]);
        assert_eq!(runs(&[0x01, 0x80], size), [7 * granule..9 * granule]);
        assert_eq!(runs(&[0, 0x01], size), [15 * granule..16 * granule]);
        assert_eq!(runs(&[0xff, 0xff], size), [0..size]);
        assert_eq!(runs(&[0, 0], size), []);
        assert_eq!(runs(&[], 0), []);
    }

    #[test]
    fn what_lies_behind_the_end_of_the_disk_is_cut_off() {
        assert_eq!(runs(&[0xff], 512), [0..512]);
        assert_eq!(runs(&[0x7f], 512), []);
        assert_eq!(runs(&[0x3f], 3 * GRANULE - 512), [2 * GRANULE..3 * GRANULE - 512]);
    }

    #[test]
    fn any_other_length_is_a_doubt() {
        for (bytes, size) in [(0, 1), (2, 8 * GRANULE), (1, 8 * GRANULE + 1), (8, 2 << 20), (1, 0)] {
            let reason = decode(&vec![0; bytes], size).unwrap_err();
            assert!(reason.contains(&format!("the pool gave {bytes}")), "{reason}");
        }
        assert!(decode(&[0; 5000], 512).unwrap_err().contains("far more"));
        assert!(decode(&[], u64::MAX).unwrap_err().contains("larger than any"));
        for text in ["=", "AAA", "AA\u{e9}A", "<value/>"] {
            assert!(ChangedBlocks::decode(text, 3 * 8 * GRANULE).unwrap_err().contains("no base64"), "{text}");
        }
        assert_eq!(ChangedBlocks::decode("gA\r\n==\n", 512).unwrap().bytes(), 512);
    }

    proptest! {
        #[test]
        fn the_runs_are_the_bits(bits in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..(8 * GRANULE)) {
            let size = (bits.len() as u64 * 8 * GRANULE).saturating_sub(cut);
            let changed = decode(&bits, size).unwrap();
            let (mut last, mut found) = (None, vec![false; usize::try_from(size.div_ceil(GRANULE)).unwrap()]);
            for run in changed.runs() {
                prop_assert!(run.start < run.end && run.end <= size && run.start % GRANULE == 0);
                prop_assert!(last.is_none_or(|last| last < run.start), "with something between them");
                (run.start / GRANULE..run.end.div_ceil(GRANULE)).for_each(|at| found[usize::try_from(at).unwrap()] = true);
                last = Some(run.end);
            }
            for (at, is_changed) in found.into_iter().enumerate() {
                prop_assert_eq!(is_changed, bits[at / 8] >> (7 - at % 8) & 1 == 1);
            }
        }

        #[test]
        fn any_text_is_an_answer_or_a_reason(text in ".{0,200}", size in 0_u64..(1 << 40)) {
            if let Ok(changed) = ChangedBlocks::decode(&text, size) {
                prop_assert!(changed.bytes() <= size);
            }
        }
    }
}
