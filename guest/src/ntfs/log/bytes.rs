//! A record or a block of an index that is changed: numbers that are put, and parts that grow and shrink.

use super::super::record::SECTOR;
use crate::{Error, Fields, Result};

/// Bytes with a part in use at the start, whose length they say themselves.
pub(super) struct Bytes<'a>(pub(super) &'a mut [u8]);

/// What is said where a change does not fit what is there.
pub(super) fn unfit() -> Error {
    Error::damaged("a change does not fit what it is about")
}

impl Bytes<'_> {
    pub(super) fn le16(&self, at: usize) -> Result<u16> {
        Fields(self.0).le16(at).ok_or_else(unfit)
    }

    pub(super) fn le32(&self, at: usize) -> Result<usize> {
        Fields(self.0).le32(at).and_then(|number| usize::try_from(number).ok()).ok_or_else(unfit)
    }

    pub(super) fn le64(&self, at: usize) -> Result<u64> {
        Fields(self.0).le64(at).ok_or_else(unfit)
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let end = at.checked_add(bytes.len()).ok_or_else(unfit)?;
        self.0.get_mut(at..end).ok_or_else(unfit)?.copy_from_slice(bytes);
        Ok(())
    }

    pub(super) fn put_le16(&mut self, at: usize, number: u16) -> Result<()> {
        self.put(at, &number.to_le_bytes())
    }

    pub(super) fn put_le32(&mut self, at: usize, number: usize) -> Result<()> {
        self.put(at, &u32::try_from(number).map_err(|_| unfit())?.to_le_bytes())
    }

    /// Lets `len` bytes at `at` be `bytes`, moving what follows up to `used`; returns what is then used.
    pub(super) fn splice(&mut self, at: usize, len: usize, used: usize, bytes: &[u8]) -> Result<usize> {
        let rest = at.checked_add(len).filter(|rest| *rest <= used).ok_or_else(unfit)?;
        let after = at + bytes.len();
        let end = (used - rest).checked_add(after).filter(|end| *end <= self.0.len()).ok_or_else(unfit)?;
        if used > self.0.len() {
            return Err(unfit());
        }
        self.0.copy_within(rest..used, after);
        self.0[at..after].copy_from_slice(bytes);
        if end < used {
            self.0[end..used].fill(0);
        }
        Ok(end)
    }
}

/// Replaces the ends of all sectors with the number of the next write, as they stand on the volume.
pub(super) fn protect(bytes: &mut [u8]) -> Result<()> {
    let fields = Fields(bytes);
    let at = usize::from(fields.le16(4).ok_or_else(unfit)?);
    let count = usize::from(fields.le16(6).ok_or_else(unfit)?);
    // The originals must not lie where one of them is.
    let end = at.checked_add(count * 2).filter(|end| *end <= SECTOR - 2).ok_or_else(unfit)?;
    if count != bytes.len() / SECTOR + 1 || !at.is_multiple_of(2) || at < 8 {
        return Err(unfit());
    }
    let number = match fields.le16(at).ok_or_else(unfit)? {
        // All ones and zero mean something else.
        0xfffe.. => 1,
        number => number + 1,
    };
    let mut originals = number.to_le_bytes().to_vec();
    for sector in bytes.chunks_exact_mut(SECTOR) {
        originals.extend_from_slice(&sector[SECTOR - 2..]);
        sector[SECTOR - 2..].copy_from_slice(&number.to_le_bytes());
    }
    bytes[at..end].copy_from_slice(&originals);
    Ok(())
}
