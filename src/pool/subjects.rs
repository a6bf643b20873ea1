//! What the stages of a transfer are of, as people call it. It is only for who asks where the time goes: what cannot be found out is
//! called by what is known.

use std::collections::BTreeMap;

use xapi::record::{Host, PoolObject, Sr};
use xapi::{Pool, Record, Ref};

use crate::probe::{Kind, Subject};

/// Returns who answers for a pool: its master.
#[must_use]
pub fn master(pool: &Pool) -> Subject {
    let found = pool.records::<PoolObject>().ok().and_then(|pools| Some(pools.first()?.master.clone()));
    let name = found.and_then(|host| pool.field::<Host, String>(&host, "name_label").ok());
    Subject::new(Kind::Host, name.unwrap_or_else(|| pool.address().host.clone()))
}

/// Returns an SR.
#[must_use]
pub fn sr(sr: &Record<Sr>) -> Subject {
    Subject::new(Kind::Sr, &sr.name_label)
}

/// Returns what the disks of each SR are read from: the host that has it, or the SR itself if several do.
#[must_use]
pub fn read_from(pool: &Pool, srs: &BTreeMap<Ref<Sr>, Record<Sr>>) -> BTreeMap<Ref<Sr>, Subject> {
    let host_of = |reference: &Ref<Sr>| match pool.hosts_of_sr(reference).ok()?.as_slice() {
        [host] => pool.field::<Host, String>(host, "name_label").ok(),
        _ => None,
    };
    let subject = |(reference, record): (&Ref<Sr>, &Record<Sr>)| {
        let of_host = host_of(reference).map(|host| Subject::new(Kind::Host, host));
        (reference.clone(), of_host.unwrap_or_else(|| sr(record)))
    };
    srs.iter().map(subject).collect()
}
