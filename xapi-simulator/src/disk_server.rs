//! What a host's NBD server gives: VDIs of who is logged in, each attached to the control domain for its connection.

use crate::attach::{Attachment, attach};
use crate::fault::{Act, Site};
use crate::log::{Activity, Log};
use crate::nbd::{Export, Exports, Security, parse_name};
use crate::schema::Class;
use crate::upset;
use crate::value::{Reference, Value};
use crate::world::World;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

/// The disks of a host.
pub struct Disks {
    world: Weak<World>,
    host: usize,
}

/// What lasts as long as a connection.
struct Guard {
    _attachment: Attachment,
    world: Arc<World>,
    host: usize,
}

impl Disks {
    /// Returns the disks that a host gives.
    pub fn new(world: &Arc<World>, host: usize) -> Disks {
        Disks { world: Arc::downgrade(world), host }
    }
}

impl Exports for Disks {
    fn security(&self) -> Security {
        let Some(world) = self.world.upgrade() else { return Security::Refused };
        let node = &world.nodes.hosts[self.host];
        let has =
            |wanted: &str| {
                world.lock().store.all(Class::Network).any(|(_, network)| {
                    network.record["purpose"].as_set().unwrap_or(&[]).contains(&Value::from(wanted))
                })
            };
        match (has("nbd"), has("insecure_nbd")) {
            _ if node.is_away() => Security::Refused,
            (true, false) => Security::Tls(Arc::clone(&node.certificate.tls)),
            (false, true) => Security::Cleartext,
            _ => Security::Refused,
        }
    }

    fn open(&self, name: &str) -> Option<Export> {
        let world = self.world.upgrade()?;
        let (uuid, session) = parse_name(name)?;
        let (vdi, plug_time) = {
            let access = world.lock();
            if !access.sessions.has(&Reference::from(session)) {
                return None;
            }
            (access.store.by_uuid(Class::Vdi, &uuid.to_string()).ok()?, access.settings.plug_time)
        };
        world.pause(plug_time);
        let attachment = attach(&world, self.host, &vdi, false).ok()?;
        let content = world.lock().content(&vdi).ok()?;
        let names = crate::http::names(&world, &vdi);
        world.log.add(Activity::Nbd(self.host));
        let guard = Guard { _attachment: attachment, world: Arc::clone(&world), host: self.host };
        let (host, mut done) = (self.host, 0_u64);
        let before = move |bytes: &Range<u64>| {
            if world.is_stopping() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            match world.faults.at_transfer(&Site::Nbd, &names, done) {
                None | Some(Act::Bitmap(_)) => {}
                Some(Act::Fail(_) | Act::Cut | Act::Refuse) => return Err(io::ErrorKind::ConnectionAborted.into()),
                Some(Act::Delay(duration)) => world.pause(duration),
                Some(Act::Upset(upset)) => upset::happen(&world, &upset),
            }
            let length = bytes.end.saturating_sub(bytes.start);
            world.log.served(Activity::Nbd(host), uuid, bytes.start, length);
            done = done.saturating_add(length);
            Ok(())
        };
        Some(Export { content, guard: Box::new(guard), before: Box::new(before), served: Arc::default() })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let log: &Log = &self.world.log;
        log.remove(Activity::Nbd(self.host));
    }
}
