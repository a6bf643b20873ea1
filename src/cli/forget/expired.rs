//! Retention as a part of another command: of one VM, the backups of one job, after a new one was stored.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::Value;
use storage::WritableStorage;

use super::apply::{self, Manner};
use super::{Named, decide};
use crate::cli::exit::Exit;
use crate::repository::{Backup, Backups, Protection, Repository, Rules, Vm};

/// Which backups are meant, and what keeps them.
pub struct Expired<'a> {
    /// What the repository is called.
    pub name: &'a str,
    /// The VM.
    pub vm: &'a Vm,
    /// Its job.
    pub job: &'a str,
    /// What keeps a backup.
    pub rules: &'a Rules,
    /// Tags that keep one, too.
    pub tags: &'a [String],
    /// How long another program that writes the VM is waited for.
    pub wait: Duration,
    /// Whether it says how far it is where there is no terminal.
    pub progress: bool,
}

/// Forgets what no rule keeps, as `xofs forget --apply` does; returns how that ended, and what is said of it.
///
/// # Errors
/// If it cannot be found out which backups are immutable.
pub fn forget_expired(
    expired: &Expired,
    repository: &Repository,
    storage: &Arc<dyn WritableStorage>,
    is_stopped: Arc<AtomicBool>,
) -> Result<(Exit, String, Value)> {
    let protection = Protection {
        tags: expired.tags.to_vec(),
        immutability: repository.immutability().context("find out which backups are immutable")?,
        now: Timestamp::now(),
    };
    let named = [Named { id: expired.job.to_owned(), of: |backup: &Backup| backup.job_id.clone() }];
    let choose = |backups: &Backups| {
        let decided = decide(backups, expired.rules, &protection, &named);
        decided.into_iter().filter(|row| !row.decision.is_keep()).map(|row| row.backup).collect()
    };
    // Of one VM there is little to be merged at a time.
    let manner =
        Manner { repository: expired.name.to_owned(), wait: expired.wait, progress: expired.progress, jobs: 1 };
    let applied = apply::run(&manner, storage, &[expired.vm], &choose, &is_stopped);
    Ok((applied.exit(), applied.to_text(), applied.to_json()))
}
