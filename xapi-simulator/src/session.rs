//! Sessions: who is logged in, and when a session ends.
//!
//! Source: xen-api `ocaml/xapi/db_gc_util.ml` (lifetime and limits), `xapi_globs.ml` (numbers).

use crate::clock::{Clock, date};
use crate::schema::Class;
use crate::store::Store;
use crate::value::{Reference, Value};
use std::collections::BTreeMap;
use std::time::Duration;

/// A session that was not used for so long ends, unless it has pending tasks.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// `last_active` is not refreshed more often.
const REFRESH: Duration = Duration::from_secs(600);
/// Sessions of root without an originator, all together.
const ANONYMOUS: usize = 400;
/// Sessions of one originator, or of one other user.
const NAMED: usize = 500;

#[derive(Clone, Debug)]
struct Session {
    user: String,
    originator: String,
    last_active: Duration,
}

/// All sessions.
#[derive(Clone, Debug, Default)]
pub struct Sessions(BTreeMap<Reference, Session>);

impl Sessions {
    /// Returns whether a session lives.
    pub fn has(&self, session: &Reference) -> bool {
        self.0.contains_key(session)
    }

    /// Makes a session.
    pub fn open(
        &mut self,
        store: &mut Store,
        clock: &Clock,
        host: &Reference,
        user: &str,
        originator: &str,
    ) -> Reference {
        let now = clock.now();
        let session = store.create(
            Class::Session,
            [
                ("this_host", Value::from(host)),
                ("auth_user_name", user.into()),
                ("originator", originator.into()),
                ("last_active", Value::Date(date(now))),
                ("validation_time", Value::Date(date(now))),
            ],
        );
        self.0.insert(
            session.clone(),
            Session { user: user.to_owned(), originator: originator.to_owned(), last_active: now },
        );
        session
    }

    /// Notes that a session is used. Returns whether it lives.
    pub fn note_use(&mut self, store: &mut Store, clock: &Clock, session: &Reference) -> bool {
        let Some(known) = self.0.get_mut(session) else { return false };
        let now = clock.now();
        if now.saturating_sub(known.last_active) >= REFRESH {
            known.last_active = now;
            let _gone = store.set(Class::Session, session, "last_active", Value::Date(date(now)));
        }
        true
    }

    /// Ends a session. Returns whether it lived.
    pub fn close(&mut self, store: &mut Store, session: &Reference) -> bool {
        store.destroy(Class::Session, session);
        self.0.remove(session).is_some()
    }

    /// Ends all sessions. Returns how many.
    pub fn close_all(&mut self, store: &mut Store) -> usize {
        let sessions = std::mem::take(&mut self.0);
        for session in sessions.keys() {
            store.destroy(Class::Session, session);
        }
        sessions.len()
    }

    /// Ends those that are too old or too many, but for those that `is_busy`.
    pub fn collect(&mut self, store: &mut Store, clock: &Clock, is_busy: impl Fn(&Reference) -> bool) {
        let now = clock.now();
        let mut idle: Vec<_> = self.0.iter().filter(|(session, _)| !is_busy(session)).collect();
        idle.sort_by_key(|(_, session)| std::cmp::Reverse(session.last_active));
        let mut group_sizes: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let mut ended = Vec::new();
        for (reference, session) in idle {
            let (group, limit) = match (session.user.as_str(), session.originator.as_str()) {
                ("root", "") => (("root", ""), ANONYMOUS),
                ("root", originator) => (("root", originator), NAMED),
                (user, _) => ((user, ""), NAMED),
            };
            let size = group_sizes.entry(group).or_default();
            *size += 1;
            if *size > limit || now.saturating_sub(session.last_active) > LIFETIME {
                ended.push(reference.clone());
            }
        }
        for session in ended {
            self.close(store, &session);
        }
    }
}
