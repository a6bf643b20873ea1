//! LVM2.
use crate::Fields;
pub(crate) fn label_offset(head: &[u8]) -> Option<usize> {
    (0..4).map(|sector| sector * 512).find(|at| {
        Fields(head).bytes(*at, 8) == Some(b"LABELONE") && Fields(head).bytes(at + 24, 8) == Some(b"LVM2 001")
    })
}
