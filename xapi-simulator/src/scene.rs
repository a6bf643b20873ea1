//! What a simulated pool is made of, before it starts.

use crate::fault::Fault;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A pool to be.
#[derive(Clone, Debug)]
pub struct Scene {
    pub(crate) seed: u64,
    pub(crate) user: String,
    pub(crate) password: String,
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) hosts: Vec<String>,
    pub(crate) networks: Vec<Network>,
    pub(crate) repositories: Vec<Repository>,
    pub(crate) machines: Vec<Machine>,
    pub(crate) settings: Settings,
    pub(crate) nbd_round_trip: Option<Duration>,
    pub(crate) faults: Vec<Fault>,
}

/// A network; each host has an interface on it.
#[derive(Clone, Debug)]
pub struct Network {
    pub(crate) name: String,
    pub(crate) purpose: Vec<String>,
}

/// What an SR keeps disks in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Files on a disk of a host: thin.
    Ext,
    /// Files on a share: thin, seen by all hosts.
    Nfs,
    /// Volumes on a disk of a host: thick.
    Lvm,
    /// Images of CDs.
    Iso,
}

/// An SR.
#[derive(Clone, Debug)]
pub struct Repository {
    pub(crate) name: String,
    pub(crate) storage: Storage,
    pub(crate) size: u64,
    /// By position in the scene; `None` is what the storage's kind means: all for shares, the first for disks.
    pub(crate) hosts: Option<Vec<usize>>,
    pub(crate) folder: Option<PathBuf>,
}

/// A machine.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(crate) name: String,
    pub(crate) is_running: bool,
    pub(crate) tags: Vec<String>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) has_cd: bool,
    pub(crate) tpm: Option<String>,
    pub(crate) bios_strings: Vec<(String, String)>,
}

/// A disk of a machine.
#[derive(Clone, Debug)]
pub struct Disk {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) repository: Option<String>,
    pub(crate) filled: u64,
}

/// What a pool is like; what a real one is like where nothing else is said. Can be changed while it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a wrong password takes; five seconds on a real one, nothing here.
    pub login_delay: Duration,
    /// How long a disk stays attached to the control domain after its transfer.
    pub detach_delay: Duration,
    /// How long to wait for more events; 50 ms.
    pub event_batching: Duration,
    /// How long a snapshot of a machine takes at least.
    pub snapshot_time: Duration,
    /// How often tasks and sessions are collected, in the pool's time; 30 s.
    pub collection_interval: Duration,
    /// How often the pool object is touched; 60 s.
    pub heartbeat: Duration,
    /// Whether `VM.snapshot` knows `ignore_vdis` (XCP-ng 8.3 does).
    pub has_ignore_vdis: bool,
    /// How many layers a disk may have.
    pub chain_limit: usize,
    /// Bytes a second of each export, by how many there are at once; none go while it is 0, and `None` is as fast as they go.
    pub export_rate: Option<fn(usize) -> u64>,
    /// How long attaching a disk for an NBD connection takes.
    pub plug_time: Duration,
    /// How often the garbage collectors merge a pair of layers; `None` is only when a test wants it.
    pub coalesce_interval: Option<Duration>,
    /// Whether they merge leaves, too.
    pub has_leaf_coalesce: bool,
    /// How long after its start a machine's tools are seen.
    pub tools_delay: Duration,
    /// How long an idle connection stays open.
    pub idle_timeout: Duration,
    /// How long `VDI.data_destroy` waits for VBDs to go; 4 s.
    pub data_destroy_wait: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            login_delay: Duration::ZERO,
            detach_delay: Duration::from_millis(100),
            event_batching: Duration::from_millis(50),
            snapshot_time: Duration::ZERO,
            collection_interval: Duration::from_secs(30),
            heartbeat: Duration::from_secs(60),
            has_ignore_vdis: true,
            chain_limit: 30,
            export_rate: None,
            plug_time: Duration::ZERO,
            coalesce_interval: None,
            has_leaf_coalesce: true,
            tools_delay: Duration::from_millis(100),
            idle_timeout: Duration::from_secs(60),
            data_destroy_wait: Duration::from_secs(4),
        }
    }
}

impl Settings {
    /// Returns what exports were measured at on real pools, in bytes a second of each: 30 MiB/s alone, 20 each beside others. So all
    /// together are the faster the more there are.
    pub fn measured_export_rate(exports: usize) -> u64 {
        if exports > 1 { 20 << 20 } else { 30 << 20 }
    }
}

impl Scene {
    /// Starts with a pool of one host, an SR of type ext, a network for NBD, and no machine; `seed` makes what disks hold.
    pub fn new(seed: u64) -> Scene {
        Scene {
            seed,
            user: "root".to_owned(),
            password: "simulated".to_owned(),
            listen: None,
            hosts: Vec::new(),
            networks: Vec::new(),
            repositories: Vec::new(),
            machines: Vec::new(),
            settings: Settings::default(),
            nbd_round_trip: None,
            faults: Vec::new(),
        }
    }

    /// Sets where the first host listens for HTTPS.
    pub fn listen(mut self, address: SocketAddr) -> Scene {
        self.listen = Some(address);
        self
    }

    /// Sets who may log in.
    pub fn credentials(mut self, user: &str, password: &str) -> Scene {
        self.user = user.to_owned();
        self.password = password.to_owned();
        self
    }

    /// Adds a host; the first is the master. Without any there is `host1`.
    pub fn host(mut self, name: &str) -> Scene {
        self.hosts.push(name.to_owned());
        self
    }

    /// Adds a network with its purpose (`nbd`, `insecure_nbd`). Without any there is one with `nbd`.
    pub fn network(mut self, name: &str, purpose: &[&str]) -> Scene {
        let purpose = purpose.iter().map(|&one| one.to_owned()).collect();
        self.networks.push(Network { name: name.to_owned(), purpose });
        self
    }

    /// Adds an SR; the first is the default one. Without any there is `storage` of type ext and 1 TiB.
    pub fn sr(mut self, repository: Repository) -> Scene {
        self.repositories.push(repository);
        self
    }

    /// Adds a machine.
    pub fn vm(mut self, machine: Machine) -> Scene {
        self.machines.push(machine);
        self
    }

    /// Changes what the pool is like.
    pub fn settings(mut self, change: impl FnOnce(&mut Settings)) -> Scene {
        change(&mut self.settings);
        self
    }

    /// Has bytes to the NBD servers and back take so long.
    pub fn nbd_round_trip(mut self, round_trip: Duration) -> Scene {
        self.nbd_round_trip = Some(round_trip);
        self
    }

    /// Adds something that goes wrong.
    pub fn fault(mut self, fault: Fault) -> Scene {
        self.faults.push(fault);
        self
    }

    /// Fills in what every pool has.
    pub(crate) fn completed(mut self) -> Scene {
        if self.hosts.is_empty() {
            self = self.host("host1");
        }
        if self.networks.is_empty() {
            self = self.network("Pool-wide network associated with eth0", &["nbd"]);
        }
        if self.repositories.iter().all(|repository| repository.storage == Storage::Iso) {
            self.repositories.insert(0, Repository::new("storage", Storage::Ext));
        }
        let has_images = self.repositories.iter().any(|repository| repository.storage == Storage::Iso);
        if !has_images && self.machines.iter().any(|machine| machine.has_cd) {
            self = self.sr(Repository::new("images", Storage::Iso));
        }
        self
    }
}

impl Storage {
    /// Returns the SR's type.
    pub fn name(self) -> &'static str {
        match self {
            Storage::Ext => "ext",
            Storage::Nfs => "nfs",
            Storage::Lvm => "lvm",
            Storage::Iso => "iso",
        }
    }

    /// Returns what its storage manager notes of it: that volumes hold VHDs, which only those of old SRs do not.
    pub(crate) fn config(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Storage::Lvm => &[("allocation", "thick"), ("use_vhd", "true")],
            Storage::Ext | Storage::Nfs | Storage::Iso => &[],
        }
    }

    /// Returns what it allows while it is attached.
    pub(crate) fn operations(self) -> &'static [&'static str] {
        match self {
            Storage::Iso => &["scan", "update", "plug", "unplug", "pbd_create"],
            Storage::Ext | Storage::Nfs | Storage::Lvm => &[
                "scan",
                "update",
                "plug",
                "unplug",
                "pbd_create",
                "vdi_create",
                "vdi_introduce",
                "vdi_destroy",
                "vdi_resize",
                "vdi_clone",
                "vdi_snapshot",
                "vdi_enable_cbt",
                "vdi_disable_cbt",
                "vdi_data_destroy",
                "vdi_list_changed_blocks",
            ],
        }
    }
}

impl Repository {
    /// Starts with 1 TiB.
    pub fn new(name: &str, storage: Storage) -> Repository {
        Repository { name: name.to_owned(), storage, size: 1 << 40, hosts: None, folder: None }
    }

    /// Sets its size in bytes.
    pub fn size(mut self, size: u64) -> Repository {
        self.size = size;
        self
    }

    /// Has it keep its layers as VHD files in a folder that exists, as hosts see them where the SR is mounted.
    pub fn folder(mut self, folder: &Path) -> Repository {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Sets which hosts see it, by their positions in the scene.
    pub fn on(mut self, hosts: &[usize]) -> Repository {
        self.hosts = Some(hosts.to_vec());
        self
    }
}

impl Machine {
    /// Starts with one that is halted and has no disk.
    pub fn new(name: &str) -> Machine {
        Machine {
            name: name.to_owned(),
            is_running: false,
            tags: Vec::new(),
            disks: Vec::new(),
            has_cd: false,
            tpm: None,
            bios_strings: Vec::new(),
        }
    }

    /// Has it run.
    pub fn running(mut self) -> Machine {
        self.is_running = true;
        self
    }

    /// Adds a tag.
    pub fn tag(mut self, tag: &str) -> Machine {
        self.tags.push(tag.to_owned());
        self
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: Disk) -> Machine {
        self.disks.push(disk);
        self
    }

    /// Adds a virtual TPM that holds this, in base64.
    pub fn tpm(mut self, contents: &str) -> Machine {
        self.tpm = Some(contents.to_owned());
        self
    }

    /// Adds one of the strings that its firmware tells.
    pub fn bios_string(mut self, key: &str, value: &str) -> Machine {
        self.bios_strings.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Adds a CD drive with an image in it.
    pub fn cd(mut self) -> Machine {
        self.has_cd = true;
        self
    }
}

impl Disk {
    /// Starts with a disk of so many bytes, a fifth of whose blocks hold random bytes, on the default SR.
    pub fn new(name: &str, size: u64) -> Disk {
        Disk { name: name.to_owned(), size, repository: None, filled: 20 }
    }

    /// Sets how many of a hundred blocks hold random bytes.
    pub fn filled(mut self, percent: u64) -> Disk {
        self.filled = percent;
        self
    }

    /// Sets its SR by name.
    pub fn on(mut self, repository: &str) -> Disk {
        self.repository = Some(repository.to_owned());
        self
    }
}
