//! A round of restores: one that something goes wrong with, perhaps one that is killed, and the last, which must bring everything
//! back and leave nothing over of those before.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::Reference;
use xapi_simulator::{Class, Scene, Site};

use crate::lab::{Ended, Lab};
use crate::pool::MIB;
use crate::seeds::Random;
use crate::support::{init, run};
use crate::trouble::{Kind, Moment, Trouble};

/// What the SR has room for (bytes).
const ROOM: u64 = 1 << 30;

/// What is restored, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Machine,
    /// Its disks are made of a snapshot that the pool has.
    OntoSnapshot,
    Archive,
    /// One disk, for a machine that is there.
    Disk,
}

/// A pool with a machine, and its backup.
struct World {
    lab: Lab,
    repository: PathBuf,
    what: What,
    /// What the disks held when they were backed up, in their order.
    held: Vec<Vec<u8>>,
}

impl World {
    fn new(seed: u64, random: &mut Random) -> Self {
        let what = [What::Machine, What::OntoSnapshot, What::Archive, What::Disk][random.below(4)];
        let machine = (0..1 + random.below(3)).fold(Machine::new("web01"), |vm, number| {
            vm.disk(Disk::new(&format!("disk{number}"), (3 + random.below(6)) as u64 * MIB).filled(50))
        });
        let delay = Duration::from_millis(random.below(200) as u64);
        let lab = Lab::new("restore-faults-", ROOM, |_| {
            let sr = Sr::new("shared", Storage::Nfs).size(ROOM);
            Scene::new(seed)
                .host("one")
                .host("two")
                .sr(sr)
                .vm(machine)
                .settings(|settings| settings.detach_delay = delay)
        });
        let repository = init(lab.folder.path(), "main", &[]);
        let mut command = lab.command("backup", &[]);
        command.args(["--vm", "web01", "--no-nbd", "--to"]).arg(&repository);
        if what == What::Archive {
            command.args(["--mode", "full", "--xva-compression", "none"]);
        }
        let (code, out, err) = run(&mut command);
        assert_eq!(code, 0, "{out}{err}");
        let mut world = Self { lab, repository, what, held: Vec::new() };
        world.held = world.bytes_of(&world.lab.machine());
        world.lab.simulator.guest_writes(&world.lab.machine(), seed << 20, 3).expect("written");
        world
    }

    fn command(&self) -> Command {
        let mut command = self.lab.command("restore", &["--json"]);
        command.arg(&self.repository);
        match self.what {
            What::Machine => command.args(["web01", "--verify"]),
            What::OntoSnapshot => command.args(["web01", "--onto-snapshot"]),
            What::Archive => command.arg("web01"),
            What::Disk => command.args(["web01/latest/xvda", "--attach-to", "web01"]),
        };
        command
    }

    fn bytes_of(&self, machine: &Reference) -> Vec<Vec<u8>> {
        let disks = self.lab.simulator.disks_of(machine).expect("it is there");
        disks.iter().map(|vdi| self.lab.bytes_of(vdi)).collect()
    }

    /// Machines that a guest can run in, or could: neither snapshots nor control domains.
    fn machines(&self) -> BTreeSet<Reference> {
        self.lab.simulator.look(|store| {
            let is = |vm: &Reference, flag| store.flag(Class::Vm, vm, flag).expect("it has it");
            let all = store.all(Class::Vm).map(|(vm, _)| vm.clone());
            all.filter(|vm| !is(vm, "is_a_snapshot") && !is(vm, "is_control_domain") && !is(vm, "is_a_template"))
                .collect()
        })
    }

    /// Disks that are no snapshots.
    fn disks(&self) -> BTreeSet<Reference> {
        self.lab.simulator.look(|store| {
            let all = store.all(Class::Vdi).map(|(vdi, _)| vdi.clone());
            all.filter(|vdi| !store.flag(Class::Vdi, vdi, "is_a_snapshot").expect("it has it")).collect()
        })
    }

    fn is_marked(&self, class: Class, object: &Reference) -> bool {
        self.lab.simulator.look(|store| {
            let mark = store.entry(class, object, "other_config", "xofs:restoring").expect("it is there");
            let name = store.text(class, object, "name_label").expect("it has one");
            mark.is_some() || name.starts_with("[restoring]") || name.starts_with("[xofs")
        })
    }

    /// Whether the pool is making it of an XVA.
    fn is_being_made(&self, vm: &Reference) -> bool {
        self.lab.simulator.look(|store| {
            let operations = store.value(Class::Vm, vm, "current_operations").expect("it is there");
            operations.as_map().is_some_and(|operations| !operations.is_empty())
        })
    }

    /// Checks that whatever could be started is whole; returns what is.
    fn whole(&self, before: &BTreeSet<Reference>, when: &str, ended: &Ended) -> BTreeSet<Reference> {
        let new: BTreeSet<_> = self.machines().difference(before).cloned().collect();
        new.into_iter()
            .filter(|vm| {
                let is_blocked = self.is_being_made(vm)
                    || self.lab.simulator.look(|store| {
                        store.entry(Class::Vm, vm, "blocked_operations", "start").expect("it is there").is_some()
                    });
                assert!(
                    is_blocked || self.bytes_of(vm) == self.held,
                    "{when}: half a machine that can be started\n{ended:?}"
                );
                // What the pool has just made of an XVA says it only later.
                let says_from_where = self.lab.simulator.look(|store| {
                    store.entry(Class::Vm, vm, "other_config", "xofs:restored-from").expect("it is there").is_some()
                });
                !is_blocked && says_from_where
            })
            .collect()
    }

    /// Checks what a run says that succeeded.
    fn compare(&self, ended: &Ended, when: &str) {
        let said: Value = serde_json::from_str(&ended.out).expect("JSON");
        let restored = &said["restores"][0];
        if self.what == What::Disk {
            let vdi = self.lab.by_uuid(Class::Vdi, &restored["disks"][0]["uuid"]);
            assert!(self.lab.bytes_of(&vdi) == self.held[0], "{when}: another content");
            assert!(!self.is_marked(Class::Vdi, &vdi), "{when}: it says to be restored still");
        } else {
            let vm = self.lab.by_uuid(Class::Vm, &restored["vm"]);
            assert!(self.bytes_of(&vm) == self.held, "{when}: another content");
            assert!(!self.is_marked(Class::Vm, &vm), "{when}: it says to be restored still");
        }
    }
}

/// One world, one thing of a kind that goes wrong. Returns whether it did.
pub fn round(seed: u64, kind: Kind) -> bool {
    let random = &mut Random::new(seed);
    let world = World::new(seed, random);
    let site = if world.what == What::Archive { Site::ImportVm } else { Site::Import };
    let trouble = Trouble::of(kind, random, &[site]);
    let when = format!("seed {seed}: {:?} of {} disks, {trouble:?}", world.what, world.held.len());
    let begun = Instant::now();
    let (machines, disks) = (world.machines(), world.disks());
    let ended = world.lab.run(world.command(), Some(&trouble), &[], &when, || {});
    let disturbed = begun.elapsed();
    let mut is_killed = ended.code.is_none();
    match ended.code {
        Some(0) => world.compare(&ended, &when),
        Some(130) => assert!(kind.is_termination(), "{when}: {ended:?}"),
        Some(1) => assert!(!ended.err.is_empty(), "{when}: {ended:?}"),
        None => assert!(kind.is_kill() || kind.is_termination(), "{when}: {ended:?}"),
        Some(_) => panic!("{when}: {ended:?}"),
    }
    world.lab.settle();
    let mut whole = world.whole(&machines, &when, &ended);
    if world.what != What::Disk && !is_killed {
        // One that is interrupted at the very end has said so already.
        let said: Value = serde_json::from_str(&ended.out).unwrap_or_default();
        let is_told = said["restores"][0]["vm"].is_string() || ended.err.contains("which is restored");
        let is_unknown = world.what == What::Archive && ended.err.contains("nobody can say");
        assert!(
            whole.len() == usize::from(is_told) || is_unknown,
            "{when}: {} machines are there, and told is {is_told}\n{ended:?}",
            whole.len()
        );
    }
    // What undoes what is left may die, too.
    if random.below(3) == 0 {
        let delay = Duration::from_millis(random.below(30) as u64);
        let kill = Trouble::Signal(Signal::KILL, Moment::Requests(random.below(60)), delay);
        let when = format!("{when}, then {kill:?}");
        is_killed |= world.lab.run(world.command(), Some(&kill), &[], &when, || {}).code.is_none();
        whole = world.whole(&machines, &when, &ended);
    }
    let ended_well = world.lab.run(world.command(), None, &[], &when, || {});
    assert_eq!(ended_well.code, Some(0), "{when}: the run after: {ended_well:?}\nbefore: {ended:?}");
    world.compare(&ended_well, &when);
    world.lab.is_at_rest(&when, &ended_well);
    // Nobody knows what an import has made whose task vanished, and one that stalls is the pool's until it ends.
    let is_unknown = world.what == What::Archive && ended.err.contains("nobody can say");
    let left: BTreeSet<Reference> = world.machines().into_iter().filter(|vm| !world.is_being_made(vm)).collect();
    let (found, expected) = (left.difference(&machines).count(), whole.len() + usize::from(world.what != What::Disk));
    assert!(found == expected || is_unknown, "{when}: {found} machines, {expected} expected\n{ended:?}");
    let attached: BTreeSet<Reference> =
        world.machines().iter().flat_map(|vm| world.lab.simulator.disks_of(vm).expect("it is there")).collect();
    for vdi in world.disks().difference(&disks).filter(|vdi| !attached.contains(*vdi)) {
        // What was cloned in the moment of its death, and a disk alone that was whole and not attached yet.
        let is_excused = is_killed && world.what == What::OntoSnapshot
            || world.what == What::Disk && world.lab.bytes_of(vdi) == world.held[0];
        assert!(is_excused && !world.is_marked(Class::Vdi, vdi), "{when}: a disk is left\n{ended:?}");
    }
    for (class, objects) in [(Class::Vm, left), (Class::Vdi, world.disks())] {
        assert!(
            is_unknown || objects.iter().all(|object| !world.is_marked(class, object)),
            "{when}: something says to be restored still"
        );
    }
    println!(
        "{when}: {} {:?}; {disturbed:.1?}, {:.1?} in all: {}",
        if ended.is_struck { "struck" } else { "missed" },
        ended.code,
        begun.elapsed(),
        ended.err.lines().last().unwrap_or_default()
    );
    ended.is_struck
}
