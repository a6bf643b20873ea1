//! What happens to a pool as a whole.

use crate::methods::machine;
use crate::node::Service;
use crate::schema::Class;
use crate::store::Object;
use crate::value::{Reference, Value};
use crate::world::{State, World};
use std::time::Duration;

/// What can happen to a pool at any time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upset {
    /// All sessions end.
    LoseSessions,
    /// Sessions and tasks are gone, connections to the master end, and its `agent_start_time` is another.
    RestartToolstack,
    /// A host, by its position in the scene, is away for a while; its connections end. Sessions and tasks are gone with the master.
    Reboot(usize, Duration),
    /// Another host becomes the master. Sessions and tasks are gone.
    ChangeMaster(usize),
    /// Pending tasks are gone, without an event of theirs.
    LoseTasks,
    /// The garbage collectors of all SRs do all they can.
    Coalesce,
    /// Nothing more fits into any SR.
    FillStorage,
    /// All snapshots are destroyed, but for disks of theirs that something has attached.
    DropSnapshots,
}

/// Has it happen.
pub fn happen(world: &World, upset: &Upset) {
    match upset {
        Upset::LoseSessions => {
            let mut access = world.lock();
            let state = &mut *access;
            state.sessions.close_all(&mut state.store);
        }
        Upset::LoseTasks => {
            let mut access = world.lock();
            let state = &mut *access;
            state.tasks.forget(&mut state.store);
        }
        Upset::RestartToolstack => {
            let position = {
                let mut access = world.lock();
                let master = access.master();
                restart(&mut access, &master, false);
                access.position(&master)
            };
            if let Some(node) = position.and_then(|position| world.nodes.hosts.get(position)) {
                // NBD is served by another daemon, which goes on.
                node.drop_connections(|service| service != Service::Nbd);
            }
        }
        Upset::Reboot(position, duration) => {
            let Some(node) = world.nodes.hosts.get(*position) else { return };
            node.leave(*duration);
            world.cut_disks(*position);
            let mut access = world.lock();
            let Some(host) = access.hosts.get(*position).cloned() else { return };
            restart(&mut access, &host, true);
        }
        Upset::ChangeMaster(position) => {
            {
                let mut access = world.lock();
                let Some(host) = access.hosts.get(*position).cloned() else { return };
                let pool = access.pool();
                // There is a pool as long as there is a simulation.
                let _gone = access.store.set(Class::Pool, &pool, "master", &host);
                let hosts = access.hosts.clone();
                for host in &hosts {
                    restart(&mut access, host, false);
                }
                let state = &mut *access;
                state.sessions.close_all(&mut state.store);
                state.tasks.forget(&mut state.store);
            }
            for node in &world.nodes.hosts {
                node.drop_connections(|service| service != Service::Nbd);
            }
        }
        Upset::Coalesce => {
            let mut access = world.lock();
            let repositories: Vec<Reference> = access.store.all(Class::Sr).map(|(sr, _)| sr.clone()).collect();
            for sr in repositories {
                while access.coalesce(&sr) {}
            }
        }
        Upset::DropSnapshots => {
            let mut access = world.lock();
            let snapshots = |access: &State, class: Class| -> Vec<Reference> {
                let is_snapshot = |object: &Object| object.record["is_a_snapshot"] == Value::Bool(true);
                let found = access.store.all(class).filter(|(_, object)| is_snapshot(object));
                found.map(|(reference, _)| reference.clone()).collect()
            };
            for vm in snapshots(&access, Class::Vm) {
                // Listed a line ago, under the same lock.
                let _gone = machine::remove(&mut access, &vm);
            }
            for vdi in snapshots(&access, Class::Vdi) {
                // In use, it stays.
                let _kept = access.destroy_vdi(&vdi);
            }
        }
        Upset::FillStorage => {
            let mut access = world.lock();
            let repositories: Vec<Reference> = access.store.all(Class::Sr).map(|(sr, _)| sr.clone()).collect();
            for sr in repositories {
                let used = access.store.size(Class::Sr, &sr, "physical_utilisation").unwrap_or(0);
                // Listed a line ago, under the same lock.
                let _gone = access.store.set(Class::Sr, &sr, "physical_size", used);
            }
        }
    }
}

/// Changes what tells of a host's start; with the master sessions and tasks are gone, with a boot what its control domain had attached.
fn restart(state: &mut State, host: &Reference, with_boot: bool) {
    let started = format!("{:.6}", state.clock.now().as_secs_f64());
    // The hosts of a simulation stay.
    let _gone = state.store.edit(Class::Host, host, "other_config", |value| {
        if let Value::Map(entries) = value {
            entries.insert("agent_start_time".to_owned(), started.as_str().into());
            if with_boot {
                entries.insert("boot_time".to_owned(), started.as_str().into());
            }
        }
    });
    if with_boot {
        let domain = state.control_domain(host);
        for vbd in state.store.references(Class::Vm, &domain, "VBDs").unwrap_or_default() {
            state.store.destroy(Class::Vbd, &vbd);
        }
    }
    if *host == state.master() {
        state.sessions.close_all(&mut state.store);
        state.tasks.forget(&mut state.store);
    }
}
