//! Jobs that keep replicas on SRs, of their own pool and of another: what becomes of one is said and counted as of a repository.

mod job;
mod pool;
mod support;

use std::cell::OnceCell;

use job::{MIB, Pool, words};
use pool::{Lab, hosts};
use serde_json::{Value, json};
use support::run;
use xapi_simulator::scene::{Repository as Sr, Storage};
use xapi_simulator::store::Object;
use xapi_simulator::value::Reference;
use xapi_simulator::{Act, Class, Fault, Simulator, Site};

/// A pool with an SR `spare`, and another, which the configuration calls `dr`, with an SR `far`.
struct World {
    own: Pool,
    far: Lab,
}

impl World {
    fn new() -> Self {
        let far = OnceCell::new();
        let sr = |name| Sr::new(name, Storage::Ext);
        let own = Pool::with(
            |scene| scene.sr(sr("storage")).sr(sr("spare")),
            |folder| {
                let far = far.get_or_init(|| Lab::new(folder, "far", hosts(2).sr(sr("far"))));
                let (address, password) = (far.simulator.address(), far.password.display());
                let fingerprint = far.simulator.fingerprint();
                format!(
                    "[pools.dr]\naddress = '{address}'\nfingerprint = '{fingerprint}'\npassword_file = '{password}'\n"
                )
            },
        );
        Self { own, far: far.into_inner().expect("it was made") }
    }

    /// Compares each state of each machine, to which nobody wrote, with that.
    fn compare(&self) {
        let own = &self.own.simulator;
        for simulator in [own, &self.far.simulator] {
            for (name, _, state) in found(simulator) {
                let expected = bytes_of(own, &own.only(Class::Vm, &name));
                assert!(bytes_of(simulator, &state) == expected, "a state of {name} holds something else");
            }
        }
    }

    /// How the last try of a machine did in each destination: an error, or none.
    fn errors(&self, name: &str) -> Vec<(String, Option<String>)> {
        let lines = self.own.log();
        let of = |line: &&Value| line["event"] == "vmEnd" && line["name"] == name;
        let end = lines.iter().rev().find(of).expect("it was tried");
        let destinations = end["backup"]["repositories"].as_array().expect("it was made");
        let error = |destination: &Value| {
            let name = destination["repository"].as_str().expect("a name").to_owned();
            (name, destination["error"].as_str().map(str::to_owned))
        };
        destinations.iter().map(error).collect()
    }
}

/// The states that replicas in a pool have: the machine, the schedule and the object of each.
fn found(simulator: &Simulator) -> Vec<(String, String, Reference)> {
    let of = |(vm, object): (&Reference, &Object)| {
        let own = object.record["other_config"].to_json();
        let is_state = own["xofs:replica"] == object.record["uuid"].to_json() && own["xofs:replica-number"].is_string();
        let name = object.record["name_label"].as_text()?.split(" - ").next()?.to_owned();
        is_state.then(|| (name, own["xofs:replica-schedule"].as_str().unwrap_or_default().to_owned(), vm.clone()))
    };
    simulator.look(|store| store.all(Class::Vm).filter_map(of).collect())
}

/// The machine and the schedule of each state.
fn states(simulator: &Simulator) -> Vec<String> {
    let mut states: Vec<String> =
        found(simulator).into_iter().map(|(name, schedule, _)| format!("{name} {schedule}")).collect();
    states.sort();
    states
}

/// What the disk of a machine, or of a snapshot of one, holds.
fn bytes_of(simulator: &Simulator, vm: &Reference) -> Vec<u8> {
    let disks = simulator.disks_of(vm).expect("it is there");
    let content = simulator.content(&disks[0]).expect("it is there");
    let mut bytes = vec![0; usize::try_from(content.size()).expect("small")];
    content.read(0, &mut bytes).expect("in range");
    bytes
}

fn backups(count: usize) -> [(String, usize); 2] {
    ["web01", "web02"].map(|name| (name.to_owned(), count))
}

#[test]
fn a_job_keeps_replicas_on_srs_and_each_schedule_so_many_states_as_it_says() {
    let world = World::new();
    let schedules = "[[schedules]]\nname = 'night'\ncron = '0 2 * * *'\nkeep.last = 2\nreplicas = 2\n\
                     [[schedules]]\nname = 'month'\ncron = '0 4 1 * *'\nkeep.last = 1\nreplicas = 1\n";
    world.own.job_to("to = { repositories = ['main'], srs = ['spare', 'dr=far'] }", schedules);
    for (schedule, nights, months) in
        [("night", 1, 0), ("night", 2, 0), ("month", 2, 1), ("night", 2, 1), ("month", 2, 1)]
    {
        let report = world.own.run(&["--schedule", schedule], 0);
        assert_eq!(report["status"], "done", "{report:#}");
        // Merges are of repositories.
        let merged: Vec<&Value> =
            report["merges"].as_array().expect("a list").iter().map(|merge| &merge["repository"]).collect();
        assert_eq!(merged, [&json!("main")], "{report:#}");
        let expected: Vec<String> = ["web01", "web02"]
            .iter()
            .flat_map(|name| [vec![format!("{name} month"); months], vec![format!("{name} night"); nights]].concat())
            .collect();
        assert_eq!((states(&world.own.simulator), states(&world.far.simulator)), (expected.clone(), expected));
        assert_eq!(world.own.backups("main"), backups(nights + months));
    }
    assert_eq!(world.own.status(), "done");
    let none = ["main", "spare", "dr=far"].map(|name| (name.to_owned(), None));
    assert_eq!(world.errors("web01"), none);
}

#[test]
fn a_job_may_have_only_srs() {
    let world = World::new();
    world.own.job_to("to.srs = ['lab=spare']", "[[schedules]]\nname = 'night'\ncron = '0 2 * * *'\nreplicas = 1\n");
    for _ in 0..2 {
        let report = world.own.run(&[], 0);
        assert_eq!((&report["status"], &report["merges"]), (&json!("done"), &json!([])), "{report:#}");
        assert_eq!(states(&world.own.simulator), ["web01 night", "web02 night"]);
    }
    let report = world.own.run(&["--full"], 0);
    assert_eq!(words(&report, "status"), ["web01 \"done\"", "web02 \"done\""]);
    world.own.job_to("to.srs = ['nowhere']", "retries.vm = 0\n");
    let report = world.own.run(&[], 1);
    assert_eq!(report["status"], "failed", "{report:#}");
    assert!(report["vms"][0]["reason"].as_str().is_some_and(|why| why.contains("no SR 'nowhere'")), "{report:#}");
}

#[test]
fn an_sr_that_fails_is_said_and_the_others_are_right() {
    let world = World::new();
    let to = |srs: &str| {
        let to = format!("to = {{ repositories = ['main'], srs = {srs} }}");
        world.own.job_to(&to, "limits.vms = 1\nretries.vm = 0\nincremental.nbd = false\n");
    };
    to("['spare', 'dr=far']");
    world.far.simulator.fault(Fault::new(Site::Import, Act::Cut).after(MIB));
    let report = world.own.run(&[], 3);
    assert_eq!(report["status"], "partial", "{report:#}");
    assert_eq!(words(&report, "status"), ["web01 \"partial\"", "web02 \"done\""], "{report:#}");
    let vm = &report["vms"][0];
    assert!(vm["reason"].as_str().is_some_and(|why| why.starts_with("dr=far: ")), "{report:#}");
    assert_eq!(vm["next"], "the next run stores in each repository and SR what it needs");
    let has_failed: Vec<bool> = world.errors("web01").iter().map(|(_, error)| error.is_some()).collect();
    assert_eq!(has_failed, [false, false, true]);
    assert_eq!(world.own.status(), "partial");
    let own = ["web01 by-hand", "web02 by-hand"];
    assert_eq!(
        (states(&world.own.simulator), states(&world.far.simulator)),
        (own.map(str::to_owned).to_vec(), vec!["web02 by-hand".to_owned()])
    );
    assert_eq!(world.own.backups("main"), backups(1));
    // It gets what it needs.
    world.own.run(&[], 0);
    assert_eq!(states(&world.far.simulator), ["web01 by-hand", "web02 by-hand", "web02 by-hand"]);

    // What breaks at the source is no failure of theirs: it comes once more, to all.
    world.own.simulator.fault(Fault::new(Site::Export, Act::Cut).after(MIB));
    world.own.run(&["--full"], 0);
    assert_eq!(world.own.simulator.faults_left(), 0);
    assert_eq!(world.own.backups("main"), backups(3));
    world.compare();

    // What is there no more, or is another by now.
    to("['nowhere', 'dr=far']");
    let report = world.own.run(&[], 3);
    assert_eq!(words(&report, "status"), ["web01 \"partial\"", "web02 \"partial\""], "{report:#}");
    assert_eq!(world.own.backups("main"), backups(4));
    assert_eq!(states(&world.far.simulator).len(), 6);
    to("['spare', 'dr=far']");
    let World { own, far } = world;
    drop(far);
    let report = own.run(&[], 3);
    assert_eq!(words(&report, "status"), ["web01 \"partial\"", "web02 \"partial\""], "{report:#}");
    assert_eq!(own.backups("main"), backups(5));
    assert_eq!(states(&own.simulator).len(), 6);
    let (code, out, err) = run(&mut own.command(&["log", "--last", "1"]));
    assert!(code == 0 && out.contains("web01  partly failed") && out.contains("dr=far: "), "{out}\n{err}");
}
