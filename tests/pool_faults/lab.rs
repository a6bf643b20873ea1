//! A pool in which something goes wrong while a command works on it.

use std::fs;
use std::net::TcpStream;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xapi_simulator::store::Object;
use xapi_simulator::value::{Reference, Value};
use xapi_simulator::{Class, Scene, Upset};

use crate::pool;
use crate::support::scratch;
use crate::trouble::{Moment, Trouble};

/// How long anything may take, whatever goes wrong: what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often it is looked at what a run does.
const GLANCE: Duration = Duration::from_millis(3);
/// What a host serves at once by NBD.
const SERVED: usize = 16;

/// What became of a run.
#[derive(Debug)]
pub struct Ended {
    /// `None` if it was killed.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
    /// Whether what was to go wrong went wrong before it ended.
    pub is_struck: bool,
}

/// A pool that has trouble, and a folder for all that belongs to it.
pub struct Lab {
    pool: pool::Lab,
    pub folder: TempDir,
    /// What the pool's storage had room for before somebody filled it.
    room: u64,
}

impl Deref for Lab {
    type Target = pool::Lab;

    fn deref(&self) -> &pool::Lab {
        &self.pool
    }
}

impl Lab {
    /// Starts a pool whose SRs have this much room (bytes); one that keeps files has them in the folder that is given.
    pub fn new(prefix: &str, room: u64, scene: impl FnOnce(&Path) -> Scene) -> Self {
        let folder = tempfile::Builder::new().prefix(prefix).tempdir_in(scratch()).expect("a folder");
        fs::create_dir(folder.path().join("sr")).expect("a new folder");
        let pool = pool::Lab::new(folder.path(), "lab", scene(&folder.path().join("sr")));
        Self { pool, folder, room }
    }

    /// The machine that is backed up.
    pub fn machine(&self) -> Reference {
        self.simulator.only(Class::Vm, "web01")
    }

    /// Runs a command with what goes wrong; `glance` is done again and again while it runs, `repositories` are those it writes to.
    pub fn run(
        &self,
        mut command: Command,
        trouble: Option<&Trouble>,
        repositories: &[PathBuf],
        when: &str,
        mut glance: impl FnMut(),
    ) -> Ended {
        self.simulator.log().clear();
        let struck_before = self.simulator.faults_struck();
        if let Some(Trouble::Fault(fault) | Trouble::Stall(fault)) = trouble {
            self.simulator.fault(fault.clone());
        }
        let mut taken: Vec<TcpStream> = match trouble {
            Some(Trouble::Taken(_)) => {
                let hosts =
                    [0, 1].map(|host| (self.simulator.address_of(host).ip(), self.simulator.nbd_address().port()));
                let all = hosts.into_iter().flat_map(|host| std::iter::repeat_n(host, SERVED));
                all.map(|host| TcpStream::connect(host).expect("it listens")).collect()
            }
            _ => Vec::new(),
        };
        let published = listing(repositories);
        let [out, err] = ["out", "err"].map(|name| self.folder.path().join(name));
        let file = |path: &Path| Stdio::from(fs::File::create(path).expect("a new file"));
        let mut child = command.stdin(Stdio::null()).stdout(file(&out)).stderr(file(&err)).spawn().expect("it starts");
        let pid = Pid::from_child(&child);
        let (begun, mut is_over, mut is_struck) = (Instant::now(), trouble.is_none(), false);
        let status = loop {
            if let Some(status) = child.try_wait().expect("it is our child") {
                break status;
            }
            if begun.elapsed() > PATIENCE {
                child.kill().expect("it is our child");
                child.wait().expect("it is our child");
                panic!("{when}: it hangs\n{}", fs::read_to_string(&err).unwrap_or_default());
            }
            glance();
            match trouble {
                Some(Trouble::Signal(signal, moment, delay))
                    if !is_over && self.has_come(moment, repositories, &published) =>
                {
                    std::thread::sleep(*delay);
                    // It may have ended meanwhile.
                    is_struck = kill_process(pid, *signal).is_ok();
                    is_over = true;
                }
                Some(Trouble::NoBase(after)) if !is_over && self.simulator.log().requests().len() > *after => {
                    is_struck = self.remove_bases();
                    is_over = true;
                }
                Some(Trouble::Stall(_)) if !is_over && self.simulator.faults_left() == 0 => {
                    kill_process(pid, Signal::TERM).expect("it is our child");
                    is_over = true;
                }
                Some(Trouble::Taken(time)) if !is_over && self.simulator.log().count("VDI.get_nbd_info") > 0 => {
                    std::thread::sleep(*time);
                    taken.clear();
                    (is_struck, is_over) = (true, true);
                }
                _ => std::thread::sleep(GLANCE),
            }
        };
        self.simulator.clear_faults();
        is_struck |= self.simulator.faults_struck() > struck_before;
        if matches!(trouble, Some(Trouble::Signal(..))) {
            is_struck = matches!(status.code(), None | Some(130));
        }
        let text = |path: &Path| fs::read_to_string(path).expect("UTF-8");
        let ended = Ended { code: status.code(), out: text(&out), err: text(&err), is_struck };
        if ended.code.is_none() {
            // A dead program's lock is waited for ten seconds, which other tests do.
            for repository in repositories {
                let vms = fs::read_dir(repository.join("xo-vm-backups")).into_iter().flatten().flatten();
                vms.filter(|entry| entry.path().extension().is_some_and(|end| end == "lock"))
                    .for_each(|entry| drop(fs::remove_dir(entry.path())));
            }
        }
        let has_word = |word: &str| ended.err.contains(word) || ended.out.contains(word);
        assert!(!has_word("panicked") && !has_word(&self.simulator.password()), "{when}: {ended:?}");
        ended
    }

    fn has_come(&self, moment: &Moment, repositories: &[PathBuf], published: &[String]) -> bool {
        match moment {
            Moment::Requests(count) => self.simulator.log().requests().len() > *count,
            Moment::Request(method) => self.simulator.log().count(method) > 0,
            Moment::Publish => listing(repositories) != published,
        }
    }

    /// The snapshots of disks that are told to be stored, by uuid.
    pub fn bases(&self) -> Vec<(String, Reference)> {
        let is_stored = |object: &Object| match object.record.get("other_config") {
            Some(Value::Map(entries)) => entries.contains_key("xofs:stored"),
            _ => false,
        };
        let uuid = |object: &Object| Some(object.record.get("uuid")?.as_text()?.to_owned());
        self.simulator.look(|store| {
            let all = store.all(Class::Vdi).filter(|(_, object)| is_stored(object));
            all.filter_map(|(vdi, object)| Some((uuid(object)?, vdi.clone()))).collect()
        })
    }

    /// Destroys them, as somebody else would; returns whether any was there and free.
    fn remove_bases(&self) -> bool {
        let bases = self.bases();
        self.simulator.change(|state| bases.iter().filter(|(_, vdi)| state.destroy_vdi(vdi).is_ok()).count()) > 0
    }

    /// Waits for whatever the pool itself has to do.
    pub fn settle(&self) {
        self.simulator.change(|state| {
            let all: Vec<Reference> = state.store.all(Class::Sr).map(|(sr, _)| sr.clone()).collect();
            for sr in all {
                state.store.set(Class::Sr, &sr, "physical_size", Value::from(self.room)).expect("it is there");
            }
        });
        self.simulator.happen(&Upset::Coalesce);
        // A host that was started anew is back.
        let begun = Instant::now();
        while [0, 1].iter().any(|&host| TcpStream::connect(self.simulator.address_of(host)).is_err()) {
            assert!(begun.elapsed() < PATIENCE, "a host stays away");
            std::thread::sleep(GLANCE);
        }
    }

    /// Checks that the pool has no task, no device of a control domain and this machine no journal.
    pub fn is_at_rest(&self, when: &str, ended: &Ended) {
        let begun = Instant::now();
        loop {
            let left = self.simulator.look(|store| {
                let name = |object: &Object| format!("{:?}", object.record.get("name_label"));
                // Where the answer to a call was lost nobody knows its task, which the pool removes an hour after its end.
                let is_unknown = |object: &Object| {
                    name(object).contains("\"Async.") && object.record.get("status") != Some(&Value::from("pending"))
                };
                let tasks = store.all(Class::Task).filter(|(_, task)| !is_unknown(task));
                tasks.map(|(_, task)| name(task)).collect::<Vec<String>>()
            });
            let left = (left, self.control_domain_devices());
            if left == (Vec::new(), 0) {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{when}: tasks, and devices of hosts are left: {left:?}\n{ended:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(self.journals(), 0, "{when}: journals of runs\n{ended:?}");
    }
}

/// The backups that repositories have.
fn listing(repositories: &[PathBuf]) -> Vec<String> {
    let vms = repositories.iter().flat_map(|repository| fs::read_dir(repository.join("xo-vm-backups")));
    let of_vms = vms.flatten().flatten().flat_map(|vm| fs::read_dir(vm.path())).flatten().flatten();
    let names = of_vms.map(|entry| entry.path().display().to_string());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".json")).collect();
    names.sort();
    names
}
