//! Bytes of a disk, as far as it has them.

use disk::Disk;

/// Returns what lies on `disk` of the `len` bytes at `offset`: fewer than those, or none, at its end.
///
/// `len` is a constant of a format or was checked before: it is allocated at once.
pub(crate) fn read_within(disk: &dyn Disk, offset: u64, len: usize) -> disk::Result<Vec<u8>> {
    let there = usize::try_from(disk.size().saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len.min(there)];
    if !bytes.is_empty() {
        disk.read_at(offset, &mut bytes)?;
    }
    Ok(bytes)
}
