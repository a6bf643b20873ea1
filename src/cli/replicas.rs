//! The pools that replicas are kept in, each logged in to once.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use xapi::{Cancel, Pool};

use crate::pool::{self, ReplicaWish, SrAddress};

/// The pools, by name, or why they cannot be used: one that does not answer keeps no other destination from its backup.
#[derive(Default)]
pub struct ReplicaPools(BTreeMap<String, pool::Result<Pool>>);

impl ReplicaPools {
    /// Logs in to the pools that these SRs are in, where that was not done.
    ///
    /// # Errors
    /// Those of `connect` that forbid all.
    pub fn connect(&mut self, srs: &[SrAddress], connect: impl Fn(&str) -> Result<pool::Result<Pool>>) -> Result<()> {
        self.missing(srs).into_iter().try_for_each(|name| {
            let pool = connect(&name)?;
            self.put(name, pool);
            Ok(())
        })
    }

    /// Returns the pools that these SRs are in and that are not logged in to.
    pub fn missing(&self, srs: &[SrAddress]) -> BTreeSet<String> {
        let is_missing = |name: &&String| !matches!(self.0.get(*name), Some(Ok(_)));
        srs.iter().filter_map(|sr| sr.pool.as_ref()).filter(is_missing).cloned().collect()
    }

    /// Takes a pool, or why it cannot be used.
    pub fn put(&mut self, name: String, pool: pool::Result<Pool>) {
        self.0.insert(name, pool);
    }

    /// Says where replicas are to be kept of a machine, whose pool is called `own`, until `cancel` stops it.
    pub fn wishes(&self, srs: &[SrAddress], own: &str, cancel: &Cancel) -> Vec<ReplicaWish> {
        let wish = |sr: &SrAddress| {
            let other = sr.pool.as_deref().filter(|name| *name != own).and_then(|name| self.0.get(name));
            let pool = other.map(|pool| pool.as_ref().map(|pool| pool.with(cancel)).map_err(Clone::clone));
            ReplicaWish { name: sr.to_string(), pool, sr: sr.sr.clone() }
        };
        srs.iter().map(wish).collect()
    }
}
