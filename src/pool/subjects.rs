//! What the stages of a transfer are of, as people call it. It is only for who asks where the time goes: what cannot be found out is
//! called by what is known, and nothing is asked twice in a run.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use xapi::record::{Host, Pbd, PoolObject, Sr};
use xapi::{Pool, Record, Ref};

use crate::probe::{Kind, Subject};

/// Returns who answers for a pool, which says `of` itself who its master is.
#[must_use]
pub fn master(pool: &Pool, of: Option<&Record<PoolObject>>) -> Subject {
    let name = of.and_then(|of| pool.field::<Host, String>(&of.master, "name_label").ok());
    Subject::new(Kind::Host, name.unwrap_or_else(|| pool.address().host.clone()))
}

/// Returns an SR.
#[must_use]
pub fn sr(sr: &Record<Sr>) -> Subject {
    Subject::new(Kind::Sr, &sr.name_label)
}

/// What disks are read from, as far as a run has asked.
pub struct Sources {
    hosts: Mutex<BTreeMap<Ref<Host>, Option<Subject>>>,
    storages: Mutex<BTreeMap<Ref<Sr>, Subject>>,
}

impl Sources {
    /// Begins with the master of a pool, which says it `of` itself.
    #[must_use]
    pub fn new(of: Option<&Record<PoolObject>>, master: &Subject) -> Self {
        let known = of.map(|of| (of.master.clone(), Some(master.clone())));
        Self { hosts: Mutex::new(known.into_iter().collect()), storages: Mutex::default() }
    }

    /// Returns what the disks of an SR are read from: the host that has it, or the SR itself if several do.
    pub fn of(&self, pool: &Pool, storage: &Record<Sr>) -> Subject {
        let mut storages = self.storages.lock().unwrap_or_else(PoisonError::into_inner);
        let find = || self.only_host(pool, storage).unwrap_or_else(|| sr(storage));
        storages.entry(storage.reference.clone()).or_insert_with(find).clone()
    }

    fn only_host(&self, pool: &Pool, storage: &Record<Sr>) -> Option<Subject> {
        let mut only = None;
        for pbd in storage.pbds.iter().filter_map(Ref::known) {
            let pbd: Record<Pbd> = pool.record(pbd).ok()?;
            if pbd.currently_attached && only.replace(pbd.host.clone()).is_some() {
                return None;
            }
        }
        let host = only?;
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let named = hosts.entry(host).or_insert_with_key(|host| {
            Some(Subject::new(Kind::Host, pool.field::<Host, String>(host, "name_label").ok()?))
        });
        named.clone()
    }
}
