//! Members of arrays of Linux md: where their superblocks lie.
//!
//! Source: Linux `include/uapi/linux/raid/md_p.h`, `drivers/md/md.c`.

/// What every superblock starts with.
pub(crate) const MAGIC: u32 = 0xa92b_4efc;

/// Returns where a superblock of version 0.90 lies on a device of `size` bytes: at the start of the last 64 KiB
/// that start at a multiple of them and lie on it as a whole.
pub(crate) fn old_superblock_at(size: u64) -> Option<u64> {
    (size / 65536).checked_sub(1).map(|block| block * 65536)
}

/// Returns where a superblock of version 1.0 lies on a device of `size` bytes: at least 8 KiB before its
/// end, at a multiple of 4 KiB.
pub(crate) fn last_superblock_at(size: u64) -> Option<u64> {
    size.checked_sub(8192).map(|at| at / 4096 * 4096)
}
