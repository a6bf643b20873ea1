//! What happens in a pool by itself: collections, heartbeats, garbage collectors.

use crate::schema::Class;
use crate::value::Reference;
use crate::world::{State, World};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often to look whether something is due.
const LOOK: Duration = Duration::from_millis(100);

/// Does what is due until the simulation ends.
pub fn keep(world: &Arc<World>) {
    let mut collected = world.lock().clock.now();
    let mut beaten = collected;
    let mut coalesced = Instant::now();
    while !world.is_stopping() {
        world.pause(LOOK);
        let (now, settings) = {
            let access = world.lock();
            (access.clock.now(), access.settings.clone())
        };
        if now.saturating_sub(collected) >= settings.collection_interval {
            collected = now;
            collect(&mut world.lock());
        }
        if now.saturating_sub(beaten) >= settings.heartbeat {
            beaten = now;
            let mut access = world.lock();
            let pool = access.pool();
            access.store.touch(Class::Pool, &pool);
        }
        if settings.coalesce_interval.is_some_and(|interval| coalesced.elapsed() >= interval) {
            coalesced = Instant::now();
            let mut access = world.lock();
            let repositories: Vec<Reference> = access.store.all(Class::Sr).map(|(sr, _)| sr.clone()).collect();
            for sr in repositories {
                access.coalesce(&sr);
            }
        }
    }
}

/// Removes the sessions and tasks whose time has come.
pub fn collect(state: &mut State) {
    let State { store, sessions, tasks, clock, .. } = state;
    sessions.collect(store, clock, |session| tasks.are_pending(session));
    tasks.collect(store, clock);
}
