//! Hosts as machines: each has an address of its own and listens there, for HTTPS, HTTP and NBD, on the same three ports as
//! all others, and can be away for a while.
//!
//! Source: xen-api `ocaml/xapi/xapi_globs.ml` (how many connections).

use crate::certificate::Certificate;
use crate::random::fresh_uuid;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Connections of a host at once.
const CONNECTIONS: usize = 800;
/// How often to look for ports that are free at all addresses.
const TRIES: u32 = 50;

/// The ports of all hosts; 443, 80 and 10809 on real ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// HTTPS.
    pub https: u16,
    /// HTTP.
    pub http: u16,
    /// NBD.
    pub nbd: u16,
}

/// What a port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// RPC and transfers.
    Https,
    /// The same in the clear.
    Http,
    /// Disks.
    Nbd,
}

/// A host.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// What it proves itself with.
    pub certificate: Certificate,
    connections: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: BTreeMap<u64, (Service, TcpStream)>,
    away_until: Option<Instant>,
}

/// All hosts.
#[derive(Debug)]
pub struct Nodes {
    /// In the order of the scene.
    pub hosts: Vec<Node>,
    /// Their ports.
    pub ports: Ports,
}

/// A socket that a host listens on.
#[derive(Debug)]
pub struct Door {
    /// The host, by its position.
    pub host: usize,
    /// What is served.
    pub service: Service,
    /// The socket.
    pub listener: TcpListener,
}

impl Nodes {
    /// Gives each host an address and opens its ports; `listen` is where the first listens for HTTPS, any free loopback
    /// address and port otherwise.
    ///
    /// # Errors
    /// If the ports are taken, or there can be no second host beside that address.
    pub fn open(names: &[String], listen: Option<SocketAddr>) -> io::Result<(Nodes, Vec<Door>)> {
        let mut tries = 0;
        let (addresses, ports, doors) = loop {
            tries += 1;
            let first = listen.unwrap_or_else(|| SocketAddr::new(random_loopback(), 0));
            match bind(names.len(), first) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && listen.is_none() && tries < TRIES => {}
                other => break other?,
            }
        };
        let hosts = names.iter().zip(addresses).enumerate().map(|(position, (name, address))| {
            Ok(Node {
                name: name.clone(),
                address,
                certificate: Certificate::new(position, name, address)?,
                connections: Mutex::default(),
            })
        });
        Ok((Nodes { hosts: hosts.collect::<io::Result<_>>()?, ports }, doors))
    }

    /// Ends all connections, and wakes who waits for new ones.
    pub fn close(&self) {
        for node in &self.hosts {
            node.drop_connections(|_| true);
            for port in [self.ports.https, self.ports.http] {
                // Who listens takes it, and sees that the simulation ends.
                let _refused = TcpStream::connect_timeout(&SocketAddr::new(node.address, port), Duration::from_secs(1));
            }
        }
    }
}

impl Node {
    /// Takes note of a connection. `None` if it is to be dropped: the host is away, or has too many.
    pub fn admit(&self, service: Service, stream: &TcpStream) -> Option<u64> {
        let mut connections = self.connections();
        if connections.away_until.is_some_and(|until| Instant::now() < until) || connections.open.len() >= CONNECTIONS {
            return None;
        }
        let number = connections.next;
        connections.next += 1;
        connections.open.insert(number, (service, stream.try_clone().ok()?));
        Some(number)
    }

    /// Forgets a connection that ended.
    pub fn forget(&self, number: u64) {
        self.connections().open.remove(&number);
    }

    /// Ends connections at once, as a crash does.
    pub fn drop_connections(&self, which: impl Fn(Service) -> bool) {
        for (service, stream) in self.connections().open.values() {
            if which(*service) {
                // It may have ended by itself.
                let _ended = stream.shutdown(Shutdown::Both);
            }
        }
    }

    /// Returns whether the host is away.
    pub fn is_away(&self) -> bool {
        self.connections().away_until.is_some_and(|until| Instant::now() < until)
    }

    /// Makes the host unreachable for a while.
    pub fn leave(&self, duration: Duration) {
        self.connections().away_until = Instant::now().checked_add(duration);
        self.drop_connections(|_| true);
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns an address in 127.0.0.0/8 with room for hosts after it.
fn random_loopback() -> IpAddr {
    let [middle, low, ..] = *fresh_uuid().as_bytes();
    Ipv4Addr::new(127, middle.clamp(1, 254), low, 1).into()
}

type Bound = (Vec<IpAddr>, Ports, Vec<Door>);

fn bind(hosts: usize, first: SocketAddr) -> io::Result<Bound> {
    let addresses: Vec<IpAddr> = (0..hosts).map(|position| address(first.ip(), position)).collect::<io::Result<_>>()?;
    let mut doors = Vec::new();
    let mut open = |service, first_port: u16| -> io::Result<u16> {
        let mut port = first_port;
        for (host, address) in addresses.iter().enumerate() {
            let listener = TcpListener::bind((*address, port))?;
            port = listener.local_addr()?.port();
            doors.push(Door { host, service, listener });
        }
        Ok(port)
    };
    let ports = Ports {
        https: open(Service::Https, first.port())?,
        http: open(Service::Http, 0)?,
        nbd: open(Service::Nbd, 0)?,
    };
    Ok((addresses, ports, doors))
}

fn address(first: IpAddr, position: usize) -> io::Result<IpAddr> {
    if position == 0 {
        return Ok(first);
    }
    let next = match (first, u32::try_from(position)) {
        (IpAddr::V4(first), Ok(position)) if first.is_loopback() => {
            first.to_bits().checked_add(position).map(Ipv4Addr::from_bits).filter(Ipv4Addr::is_loopback)
        }
        _ => None,
    };
    next.map(IpAddr::V4).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a pool of several hosts needs loopback addresses (127.0.0.1:PORT), {first} has none beside it"),
        )
    })
}
