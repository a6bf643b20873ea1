//! A running pool, as tests hold it.

use crate::builder;
use crate::content::Content;
use crate::disk_server::Disks;
use crate::failure::Outcome;
use crate::fault::Fault;
use crate::guest::Guest;
use crate::http;
use crate::keeper;
use crate::line::Line;
use crate::log::Log;
use crate::nbd::Server;
use crate::node::{Door, Nodes, Service};
use crate::random::Random;
use crate::scene::{Scene, Settings};
use crate::schema::Class;
use crate::store::{Record, Store};
use crate::upset::{self, Upset};
use crate::value::{Reference, Value};
use crate::world::{State, World};
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

/// A running pool. Ends, with all its threads and connections, when it is dropped.
pub struct Simulator {
    world: Arc<World>,
}

impl Simulator {
    /// Starts a pool.
    ///
    /// # Errors
    /// If its ports are taken, or the scene contradicts itself.
    pub fn start(scene: Scene) -> io::Result<Simulator> {
        let scene = scene.completed();
        let (nodes, doors) = Nodes::open(&scene.hosts, scene.listen)?;
        let state = builder::build(&scene, &nodes).map_err(|failure| io::Error::other(failure.to_list().join(": ")))?;
        let world = Arc::new(World::new(state, nodes));
        for fault in scene.faults {
            world.faults.add(fault);
        }
        let simulator = Simulator { world };
        for door in doors {
            match door.service {
                Service::Nbd => {
                    let disks = Arc::new(Disks::new(&simulator.world, door.host));
                    let (listener, line) = match scene.nbd_round_trip {
                        None => (door.listener, None),
                        Some(round_trip) => {
                            let behind = TcpListener::bind((door.listener.local_addr()?.ip(), 0))?;
                            let there = behind.local_addr()?;
                            (behind, Some(Line::start(door.listener, there, round_trip)?))
                        }
                    };
                    simulator.world.add_server(Server::start(listener, disks)?, line);
                }
                Service::Http | Service::Https => simulator.world.spawn(move |world| listen(world, &door)),
            }
        }
        simulator.world.spawn(keeper::keep);
        Ok(simulator)
    }

    /// Returns where the first host of the scene, the master at first, serves HTTPS.
    pub fn address(&self) -> SocketAddr {
        self.address_of(0)
    }

    /// Returns where a host serves HTTPS.
    ///
    /// # Panics
    /// If the scene has no such host; so do the others that take one.
    pub fn address_of(&self, host: usize) -> SocketAddr {
        SocketAddr::new(self.world.nodes.hosts[host].address, self.world.nodes.ports.https)
    }

    /// Returns where the first host serves HTTP in the clear.
    pub fn http_address(&self) -> SocketAddr {
        SocketAddr::new(self.address().ip(), self.world.nodes.ports.http)
    }

    /// Returns where the first host serves NBD.
    pub fn nbd_address(&self) -> SocketAddr {
        SocketAddr::new(self.address().ip(), self.world.nodes.ports.nbd)
    }

    /// Returns the SHA-256 of the first host's certificate, as `AA:BB:...`.
    pub fn fingerprint(&self) -> &str {
        self.fingerprint_of(0)
    }

    /// Returns the SHA-256 of a host's certificate.
    pub fn fingerprint_of(&self, host: usize) -> &str {
        &self.world.nodes.hosts[host].certificate.sha256
    }

    /// Returns a host's certificate as PEM.
    pub fn certificate_of(&self, host: usize) -> &str {
        &self.world.nodes.hosts[host].certificate.pem
    }

    /// Returns who may log in.
    pub fn user(&self) -> String {
        self.world.lock().credentials.0.clone()
    }

    /// Returns with which password.
    pub fn password(&self) -> String {
        self.world.lock().credentials.1.clone()
    }

    /// Returns what was asked for and served.
    pub fn log(&self) -> &Log {
        &self.world.log
    }

    /// Adds something that goes wrong.
    pub fn fault(&self, fault: Fault) {
        self.world.faults.add(fault);
    }

    /// Returns how many faults have not struck as often as they should.
    pub fn faults_left(&self) -> usize {
        self.world.faults.count()
    }

    /// Returns how often faults have struck since the pool was started.
    pub fn faults_struck(&self) -> u64 {
        self.world.faults.struck()
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.world.faults.clear();
    }

    /// Has something happen to the pool now.
    pub fn happen(&self, upset: &Upset) {
        upset::happen(&self.world, upset);
    }

    /// Changes what the pool is like.
    pub fn settings(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.world.lock().settings);
    }

    /// Lets the pool's time pass, and collects once what is too old then.
    pub fn advance(&self, by: Duration) {
        self.world.lock().clock.advance(by);
        self.collect();
    }

    /// Removes the sessions and tasks whose time has come.
    pub fn collect(&self) {
        keeper::collect(&mut self.world.lock());
    }

    /// Has the garbage collector of an SR merge one pair of layers. Returns whether there was one.
    pub fn coalesce(&self, sr: &Reference) -> bool {
        self.world.lock().coalesce(sr)
    }

    /// Looks at the objects.
    pub fn look<T>(&self, look: impl FnOnce(&Store) -> T) -> T {
        look(&self.world.lock().store)
    }

    /// Changes anything, as no client could.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.world.lock())
    }

    /// Returns the objects of a class with this name that are no snapshots.
    pub fn named(&self, class: Class, name: &str) -> Vec<Reference> {
        let is_snapshot = |record: &Record| record.get("is_a_snapshot") == Some(&Value::Bool(true));
        self.look(|store| {
            let all = store.all(class).filter(|(_, object)| {
                object.record.get("name_label").and_then(Value::as_text) == Some(name) && !is_snapshot(&object.record)
            });
            all.map(|(reference, _)| reference.clone()).collect()
        })
    }

    /// Returns the only such object.
    ///
    /// # Panics
    /// If there is none, or several.
    pub fn only(&self, class: Class, name: &str) -> Reference {
        match &self.named(class, name)[..] {
            [only] => only.clone(),
            other => panic!("{} objects of class {} are called {name}", other.len(), class.name()),
        }
    }

    /// Returns the disks of a machine in the order of their positions.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn disks_of(&self, vm: &Reference) -> Outcome<Vec<Reference>> {
        self.look(|store| {
            let mut disks = Vec::new();
            for vbd in store.references(Class::Vm, vm, "VBDs")? {
                if store.text(Class::Vbd, &vbd, "type")? == "Disk" {
                    let position = store.text(Class::Vbd, &vbd, "userdevice")?.parse::<u32>().unwrap_or(u32::MAX);
                    disks.push((position, store.reference(Class::Vbd, &vbd, "VDI")?));
                }
            }
            disks.sort();
            Ok(disks.into_iter().map(|(_, vdi)| vdi).collect())
        })
    }

    /// Returns how many objects of each class there are, by the class's name.
    pub fn objects(&self) -> BTreeMap<&'static str, usize> {
        self.look(|store| Class::ALL.into_iter().map(|class| (class.name(), store.count(class))).collect())
    }

    /// Returns what a VDI holds now.
    ///
    /// # Errors
    /// `HANDLE_INVALID`, `VDI_INCOMPATIBLE_TYPE`.
    pub fn content(&self, vdi: &Reference) -> Outcome<Content> {
        self.world.lock().content(vdi)
    }

    /// Changes what a VDI holds, as its guest does.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn write<T>(&self, vdi: &Reference, write: impl FnOnce(&mut Content) -> T) -> Outcome<T> {
        let mut access = self.world.lock();
        let sr = access.store.reference(Class::Vdi, vdi, "SR")?;
        let gone = || crate::failure::Failure::gone(Class::Vdi, vdi.as_str());
        let result = write(access.disks.get_mut(vdi).ok_or_else(gone)?);
        access.settle(&sr);
        Ok(result)
    }

    /// Has a machine write to each of its disks: `writes` pieces of up to 256 KiB, of which the seed says what and where.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn guest_writes(&self, vm: &Reference, seed: u64, writes: u64) -> Outcome<()> {
        let mut random = Random::new(seed);
        for vdi in self.disks_of(vm)? {
            let mut guest = Guest::new(random.number());
            self.write(&vdi, |content| guest.work(content, writes))?
                .map_err(|error| crate::failure::Failure::internal(&error.to_string()))?;
        }
        Ok(())
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.world.stop();
    }
}

fn listen(world: &Arc<World>, door: &Door) {
    for stream in door.listener.incoming() {
        if world.is_stopping() {
            return;
        }
        // Too many open files, or a client that went before it was met.
        let Ok(stream) = stream else {
            world.pause(Duration::from_millis(10));
            continue;
        };
        let (host, service) = (door.host, door.service);
        let node = &world.nodes.hosts[host];
        let Some(number) = node.admit(service, &stream) else { continue };
        world.spawn(move |world| {
            http::serve(world, host, service, stream);
            world.nodes.hosts[host].forget(number);
        });
    }
}
