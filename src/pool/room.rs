//! How much room a snapshot takes: pure, over what an SR says of itself.
//!
//! On a thick SR (VHDs in logical volumes) the disk goes on in a new volume that is as large as the whole disk, while the old one
//! shrinks to what it holds: so at most the size of the disk is needed. Elsewhere a snapshot takes next to nothing.
//!
//! Source: sm, `libs/sm/drivers/LVHDSR.py`.

/// What is asked of an SR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Its uuid.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// Its type, such as `lvm` or `nfs`.
    pub kind: String,
    /// Whether it says of itself that it is thin (`allocation` in `sm_config`).
    pub says_thin: bool,
    /// In bytes.
    pub size: u64,
    /// In bytes.
    pub used: u64,
}

impl Storage {
    /// Whether a disk takes its whole size there.
    #[must_use]
    pub fn is_thick(&self) -> bool {
        matches!(self.kind.as_str(), "lvm" | "lvmoiscsi" | "lvmohba" | "lvmofcoe") && !self.says_thin
    }

    /// Returns how many bytes are free.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.size.saturating_sub(self.used)
    }

    /// Returns how many bytes a snapshot of disks of these sizes takes at most; `None` if it is next to nothing.
    #[must_use]
    pub fn takes(&self, disks: &[u64]) -> Option<u64> {
        self.is_thick().then(|| disks.iter().fold(0_u64, |sum, size| sum.saturating_add(*size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_takes_the_size_of_the_disks_on_a_thick_storage_alone() {
        let storage = |kind: &str, says_thin| Storage {
            uuid: String::new(),
            name: String::new(),
            kind: kind.into(),
            says_thin,
            size: 100,
            used: 30,
        };
        assert_eq!(storage("lvmoiscsi", false).takes(&[20, 40]), Some(60));
        assert_eq!(storage("lvm", true).takes(&[20]), None);
        assert_eq!(storage("nfs", false).takes(&[20]), None);
        assert_eq!(storage("nfs", false).free(), 70);
    }
}
