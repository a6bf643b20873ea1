//! What is sent into a pool that takes nothing any more is ended for real by whoever stops it: within seconds, and nothing of it is
//! left there, though the host itself notices nothing.

mod pool;
mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pool::{MIB, PATIENCE, World, wait_for};
use support::succeed;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::Reference;
use xapi_simulator::{Act, Class, Fault, Site};

/// How long the end may take, once in [`TRIES`]: on a machine that does other things it may take longer, but hardly each time.
const END: Duration = Duration::from_secs(5);
const TRIES: usize = 3;

/// A machine with a disk, and an SR for replicas.
fn world() -> World {
    World::new(|scene| {
        let sr = |name| Sr::new(name, Storage::Ext);
        let machine = Machine::new("web01").running().disk(Disk::new("system", 16 * MIB).filled(100));
        scene.sr(sr("storage")).sr(sr("spare")).vm(machine)
    })
}

/// Runs a command until its transfer stalls, stops it, and sees that nothing is left, at once.
fn stopped_when_it_stalls(world: &World, site: Site, mut command: Command) {
    let is_soon = (0..TRIES).any(|_| end_of_stalled(world, site.clone(), &mut command) < END);
    assert!(is_soon, "{site:?}: {TRIES} times over more than {END:?} after the signal");
}

fn end_of_stalled(world: &World, site: Site, command: &mut Command) -> Duration {
    let lab = &world.lab;
    let objects = || {
        lab.simulator.look(|store| {
            let is_managed = |vdi: &Reference| store.flag(Class::Vdi, vdi, "managed").expect("it says it");
            (store.count(Class::Vm), store.all(Class::Vdi).filter(|(vdi, _)| is_managed(vdi)).count())
        })
    };
    let before = objects();
    lab.simulator.fault(Fault::new(site.clone(), Act::Delay(PATIENCE)).after(4 * MIB));
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    wait_for("the stall", || lab.simulator.faults_left() == 0);
    let begun = Instant::now();
    succeed(Command::new("kill").arg("-TERM").arg(child.id().to_string()));
    assert_eq!(child.wait().expect("it is our child").code(), Some(130));
    let took = begun.elapsed();
    println!("{site:?}: over {:.1} s after the signal", took.as_secs_f64());
    assert_eq!((lab.tasks(), lab.control_domain_devices(), lab.journals()), (Vec::new(), 0, 0), "{site:?}");
    // What a host was making of an XVA it removes itself, once it notices.
    if site != Site::ImportVm {
        assert_eq!(objects(), before, "{site:?}");
    }
    took
}

#[test]
fn a_restore_that_stalls_is_ended() {
    let world = world();
    world.back_up(&[]);
    let restore = || {
        let mut command = world.lab.command("restore", &[]);
        command.arg(&world.repository).arg("web01");
        command
    };
    stopped_when_it_stalls(&world, Site::Import, restore());
    world.back_up(&["--mode", "full", "--xva-compression", "none"]);
    stopped_when_it_stalls(&world, Site::ImportVm, restore());
}

#[test]
fn a_replica_that_stalls_is_ended() {
    let world = world();
    stopped_when_it_stalls(&world, Site::Import, world.command(&["--to-sr", "spare"]));
    let full = ["--to-sr", "spare", "--mode", "full", "--xva-compression", "none"];
    stopped_when_it_stalls(&world, Site::ImportVm, world.command(&full));
}
