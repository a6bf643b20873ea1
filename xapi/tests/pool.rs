//! A simulated pool, with what goes wrong in real ones: each call ends right, or with an error that says what is known.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use xapi::record::{Sr, TaskObject, Vdi, Vm};
use xapi::{
    Address, Cancel, Compression, Error, ErrorKind, Event, ExportOptions, Fingerprint, Format, Operation, Pool, Ref,
    Settings, Subject, Trust,
};
use xapi_simulator::failure::Failure;
use xapi_simulator::scene::{Disk, Machine, Repository, Storage};
use xapi_simulator::{Act, Fault, Scene, Simulator, Site, Upset};
use zeroize::Zeroizing;

const MIB: u64 = 1 << 20;

/// Two hosts, and a machine with two small disks.
fn scene() -> Scene {
    let machine =
        Machine::new("web01").running().disk(Disk::new("system", 16 * MIB).filled(60)).disk(Disk::new("data", 8 * MIB));
    Scene::new(1).host("first").host("second").sr(Repository::new("shared", Storage::Nfs)).vm(machine)
}

fn settings(simulator: &Simulator, host: usize, trust: Trust) -> Settings {
    let address = format!("https://{}", simulator.address_of(host)).parse().unwrap();
    let password = Zeroizing::new(simulator.password());
    let settings = Settings::new(address, &simulator.user(), password, trust);
    Settings { pause: Duration::from_millis(50), ..settings }
}

fn pinned(simulator: &Simulator, host: usize) -> Trust {
    Trust::Pinned(vec![simulator.fingerprint_of(host).parse().unwrap()])
}

/// A token that ends a test that would wait for ever.
fn patience() -> Cancel {
    Cancel::within(Duration::from_secs(120))
}

fn connect(simulator: &Simulator) -> Pool {
    Pool::connect(settings(simulator, 0, pinned(simulator, 0)), &patience()).unwrap()
}

fn start(scene: Scene) -> (Simulator, Pool) {
    let simulator = Simulator::start(scene).unwrap();
    let pool = connect(&simulator);
    (simulator, pool)
}

fn machine(pool: &Pool) -> Ref<Vm> {
    let found = pool.by_name("web01").unwrap();
    assert_eq!(found.len(), 1);
    found[0].clone()
}

/// Makes a snapshot of the machine; returns it and those of its disks, the first of them of `system`.
fn snapshot(pool: &Pool) -> (Ref<Vm>, Vec<Ref<Vdi>>) {
    let snapshot = pool.snapshot_vm(&machine(pool), "snapshot", &[]).unwrap();
    let vbds = pool.record(&snapshot).unwrap().fields.vbds;
    let mut vbds = pool.records_of(&vbds).unwrap();
    vbds.sort_by_key(|vbd| vbd.userdevice.clone());
    (snapshot, vbds.into_iter().map(|vbd| vbd.fields.vdi).collect())
}

fn content(simulator: &Simulator, vdi: &Ref<Vdi>) -> Vec<u8> {
    let content = simulator.content(&vdi.as_str().into()).unwrap();
    let mut bytes = vec![0; usize::try_from(content.size()).unwrap()];
    content.read(0, &mut bytes).unwrap();
    bytes
}

/// Waits for what another thread does.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether nothing of ours is left in the pool.
fn assert_nothing_left(simulator: &Simulator, pool: Pool) {
    drop(pool);
    assert_eq!(simulator.objects()["task"], 0);
    assert_eq!(simulator.log().count("session.logout"), 1);
}

#[test]
fn a_host_is_recognised_by_its_certificate_alone() {
    let simulator = Simulator::start(scene()).unwrap();
    let seen: Fingerprint = simulator.fingerprint().parse().unwrap();
    let of_other = pinned(&simulator, 1);
    for trust in [Trust::Unknown, of_other, Trust::Certificate(simulator.certificate_of(1).to_owned())] {
        let error = Pool::connect(settings(&simulator, 0, trust), &patience()).unwrap_err();
        assert_eq!((error.kind(), error.fingerprint()), (ErrorKind::Untrusted, Some(&seen)), "{error}");
    }
    // Nobody was told the password.
    assert_eq!(simulator.log().count("session.login_with_password"), 0);
    let both = Trust::Pinned(vec![simulator.fingerprint_of(1).parse().unwrap(), seen]);
    for trust in [pinned(&simulator, 0), both, Trust::Certificate(simulator.certificate_of(0).to_owned())] {
        let pool = Pool::connect(settings(&simulator, 0, trust), &patience()).unwrap();
        assert_eq!(pool.fingerprint(), Some(seen));
    }
    assert_eq!(simulator.log().count("session.logout"), 3);
}

#[test]
fn a_pool_is_reached_in_the_clear_if_that_is_asked_for() {
    let simulator = Simulator::start(scene()).unwrap();
    let address: Address = format!("http://{}", simulator.http_address()).parse().unwrap();
    let pool = Pool::connect(Settings { address, ..settings(&simulator, 0, Trust::Unknown) }, &patience()).unwrap();
    assert_eq!(pool.fingerprint(), None);
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_label, "web01");
}

#[test]
fn a_wrong_password_is_refused() {
    let simulator = Simulator::start(scene()).unwrap();
    let password = Zeroizing::new("wrong".to_owned());
    let settings = Settings { password, ..settings(&simulator, 0, pinned(&simulator, 0)) };
    let error = Pool::connect(settings, &patience()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Credentials);
    assert_eq!(simulator.log().count("session.login_with_password"), 1);
}

#[test]
fn a_slave_leads_to_the_master_and_vouches_for_its_certificate() {
    let simulator = Simulator::start(scene()).unwrap();
    let pool = Pool::connect(settings(&simulator, 1, pinned(&simulator, 1)), &patience()).unwrap();
    assert_eq!(pool.fingerprint(), Some(simulator.fingerprint_of(0).parse().unwrap()));
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_label, "web01");
    assert_nothing_left(&simulator, pool);
}

#[test]
fn a_lost_session_is_made_anew() {
    let (simulator, pool) = start(scene());
    let before = pool.generation();
    simulator.happen(&Upset::LoseSessions);
    pool.set(&machine(&pool), "name_description", "changed").unwrap();
    assert_eq!(pool.generation(), before + 1);
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_description, "changed");
}

#[test]
fn another_master_is_found() {
    let (simulator, pool) = start(scene());
    simulator.happen(&Upset::ChangeMaster(1));
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_label, "web01");
    assert_eq!(pool.fingerprint(), Some(simulator.fingerprint_of(1).parse().unwrap()));
    simulator.happen(&Upset::ChangeMaster(0));
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_label, "web01");
}

#[test]
fn another_master_is_found_when_the_old_one_is_gone() {
    let (simulator, pool) = start(scene());
    simulator.happen(&Upset::ChangeMaster(1));
    simulator.happen(&Upset::Reboot(0, Duration::from_secs(600)));
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_label, "web01");
    assert_eq!(pool.fingerprint(), Some(simulator.fingerprint_of(1).parse().unwrap()));
}

#[test]
fn a_toolstack_that_restarts_is_waited_for() {
    let (simulator, pool) = start(scene());
    simulator.happen(&Upset::RestartToolstack);
    pool.set(&machine(&pool), "name_description", "changed").unwrap();
    simulator.happen(&Upset::Reboot(0, Duration::from_secs(1)));
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_description, "changed");
}

#[test]
fn what_was_done_before_the_connection_broke_is_of_unknown_outcome() {
    let (simulator, pool) = start(scene());
    let vm = machine(&pool);
    simulator.fault(Fault::call("VM.set_name_description", Act::Cut));
    let error = pool.set(&vm, "name_description", "changed").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    assert_eq!(simulator.log().count("VM.set_name_description"), 1);
    assert_eq!(pool.record(&vm).unwrap().name_description, "changed");
    simulator.fault(Fault::call("VM.get_record", Act::Cut).times(3));
    assert_eq!(pool.record(&vm).unwrap().name_description, "changed");
}

#[test]
fn a_snapshot_is_made_and_destroyed_and_no_task_remains() {
    let (simulator, pool) = start(scene());
    let (vm, vdis) = snapshot(&pool);
    let record = pool.record(&vm).unwrap();
    assert!(record.is_a_snapshot && record.snapshot_of == machine(&pool));
    assert_eq!(record.raw["name_label"], json!("snapshot"));
    pool.set_entry(&vm, "other_config", "xofs:test", "1").unwrap();
    pool.set_entry(&vm, "other_config", "xofs:test", "2").unwrap();
    assert_eq!(pool.record(&vm).unwrap().other_config["xofs:test"], "2");
    let uuid: String = pool.field(&vm, "uuid").unwrap();
    assert_eq!(pool.by_uuid::<Vm>(&uuid).unwrap(), vm);
    let (_, objects) = (vdis.len(), simulator.objects());
    assert_eq!(vdis.len(), 2);
    simulator
        .fault(Fault::call("VDI.destroy", Act::Fail(Failure::new("VDI_IN_USE", ["OpaqueRef:x", "destroy"]))).times(4));
    pool.destroy_vm(&vm).unwrap();
    for vdi in &vdis {
        pool.destroy_vdi(vdi).unwrap();
        // One that is gone is what was wanted.
        pool.destroy_vdi(vdi).unwrap();
    }
    pool.destroy_vm(&vm).unwrap();
    assert!(pool.by_uuid::<Vm>(&uuid).unwrap_err().is_gone());
    assert_eq!(simulator.objects()["VM"] + 1, objects["VM"]);
    assert_nothing_left(&simulator, pool);
}

#[test]
fn disks_are_left_out_of_a_snapshot_of_new_pools_and_of_old_ones() {
    for has_ignore_vdis in [true, false] {
        let (simulator, pool) = start(scene().settings(|settings| settings.has_ignore_vdis = has_ignore_vdis));
        let data: Vec<Ref<Vdi>> = pool.by_name("data").unwrap();
        let before = simulator.objects()["VDI"];
        let unwanted: Vec<&Ref<Vdi>> = data.iter().collect();
        let taken = pool.snapshot_vm(&machine(&pool), "snapshot", &unwanted);
        let snapshot = if has_ignore_vdis {
            taken.unwrap()
        } else {
            assert_eq!(taken.unwrap_err().code(), "MESSAGE_PARAMETER_COUNT_MISMATCH");
            let snapshot = pool.snapshot_vm(&machine(&pool), "snapshot", &[]).unwrap();
            pool.destroy_disks_of(&snapshot, &unwanted).unwrap();
            snapshot
        };
        let vbds = pool.record(&snapshot).unwrap().fields.vbds;
        let vdis: Vec<_> = pool.records_of(&vbds).unwrap().into_iter().map(|vbd| vbd.fields.vdi).collect();
        let names: Vec<_> = pool.records_of(&vdis).unwrap().into_iter().map(|vdi| vdi.fields.name_label).collect();
        assert_eq!(names, ["system"], "{has_ignore_vdis}");
        // The snapshot, and the layer that both are built on.
        assert!(simulator.objects()["VDI"] <= before + 3, "{has_ignore_vdis}");
        assert_nothing_left(&simulator, pool);
    }
}

#[test]
fn the_error_of_a_task_is_that_of_the_call() {
    let (simulator, pool) = start(scene().settings(|settings| settings.chain_limit = 1));
    let error = pool.snapshot_vm(&machine(&pool), "snapshot", &[]).unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Failed, "SR_BACKEND_FAILURE_109"), "{error}");
    assert!(error.to_string().contains("VM.snapshot"), "{error}");
    assert_nothing_left(&simulator, pool);
}

#[test]
fn a_task_that_vanishes_is_of_unknown_outcome() {
    for upset in [Upset::LoseTasks, Upset::RestartToolstack, Upset::ChangeMaster(1)] {
        let (simulator, pool) = start(scene().settings(|settings| settings.snapshot_time = Duration::from_secs(3)));
        let vm = machine(&pool);
        let of_thread = pool.clone();
        let waiting = std::thread::spawn(move || of_thread.snapshot_vm(&vm, "snapshot", &[]));
        until("the task is watched", || simulator.log().count("event.from") > 0);
        simulator.happen(&upset);
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unknown, "{upset:?}: {error}");
    }
}

#[test]
fn a_task_is_watched_by_events_of_it_alone_and_ended_by_a_cancel() {
    let (simulator, pool) = start(scene().settings(|settings| settings.snapshot_time = Duration::from_secs(2)));
    let (cancel, vm) = (Cancel::new(), machine(&pool));
    let of_thread = pool.with(&cancel);
    let waiting = std::thread::spawn(move || of_thread.snapshot_vm(&vm, "snapshot", &[]));
    until("the task is watched", || simulator.log().count("event.from") > 0);
    let subscriptions = simulator.log().subscriptions();
    assert!(subscriptions.len() == 1 && subscriptions[0].starts_with("task/OpaqueRef:"), "{subscriptions:?}");
    cancel.cancel();
    assert_eq!(waiting.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!((simulator.log().count("task.cancel"), simulator.log().count("task.destroy")), (1, 1));
    // Another token is not stopped by it.
    assert_eq!(pool.record(&machine(&pool)).unwrap().name_label, "web01");
}

#[test]
fn tasks_of_a_run_that_died_are_found_by_their_mark_and_destroyed() {
    let (simulator, pool) = start(scene());
    // What a process that died leaves behind.
    pool.call::<Value>("task.create", &[json!("[run 7] export of a disk"), json!("")]).unwrap();
    let other = pool.marked("[run 8]").task("export of a disk").unwrap();
    let left = pool.records::<TaskObject>().unwrap();
    let of = |run: &str| left.iter().filter(|task| task.name_label.starts_with(run)).collect::<Vec<_>>();
    assert_eq!(of("[run 8]")[0].name_label, "[run 8] export of a disk");
    assert_eq!((of("[run 7]").len(), of("[run 8]").len()), (1, 1));
    for _ in 0..2 {
        pool.destroy_task(&of("[run 7]")[0].reference).unwrap();
    }
    assert_eq!(simulator.objects()["task"], 1);
    drop(other);
    assert_eq!(simulator.objects()["task"], 0);
}

#[test]
fn a_task_older_than_a_day_is_kept_alive_by_its_progress() {
    // The pool looks when the test says so.
    let scene = scene().settings(|settings| settings.collection_interval = Duration::from_secs(1 << 40));
    let simulator = Simulator::start(scene).unwrap();
    for is_kept in [true, false] {
        let keepalive = if is_kept { Duration::from_millis(50) } else { Duration::from_secs(3600) };
        let settings = Settings { keepalive, ..settings(&simulator, 0, pinned(&simulator, 0)) };
        let pool = Pool::connect(settings, &patience()).unwrap();
        simulator.log().clear();
        let task = pool.task("long").unwrap();
        for seconds in [30, 25 * 3600, 30, 30] {
            if is_kept {
                let before = simulator.log().count("task.set_progress");
                until("the progress is moved", || simulator.log().count("task.set_progress") > before);
            }
            simulator.advance(Duration::from_secs(seconds));
        }
        let found = pool.with(&patience()).record::<TaskObject>(task.reference());
        assert_eq!(found.is_ok(), is_kept, "{found:?}");
        if let Ok(task) = found {
            assert!(task.progress > 0.0 && task.progress < 0.001, "{}", task.progress);
        }
    }
}

fn options(vdi: &Ref<Vdi>, base: Option<&Ref<Vdi>>, format: Format) -> ExportOptions {
    ExportOptions { vdi: vdi.clone(), base: base.cloned(), format }
}

fn read(pool: &Pool, options: &ExportOptions) -> Result<Vec<u8>, Error> {
    let mut export = pool.export_vdi(options)?;
    let mut bytes = Vec::new();
    export.read_to_end(&mut bytes).map_err(|error| error.downcast::<Error>().unwrap())?;
    assert_eq!(export.received(), bytes.len() as u64);
    export.conclude().map(|()| bytes)
}

#[test]
fn a_disk_is_exported_and_imported_as_it_is() {
    let (simulator, pool) = start(scene());
    let (_, vdis) = snapshot(&pool);
    let expected = content(&simulator, &vdis[0]);
    assert_eq!(read(&pool, &options(&vdis[0], None, Format::Raw)).unwrap(), expected);
    let sr = pool.record(&vdis[0]).unwrap().fields.sr;
    for format in [Format::Raw, Format::Vhd] {
        let bytes = read(&pool, &options(&vdis[0], None, format)).unwrap();
        let fields = json!({
            "name_label": "copy", "name_description": "", "SR": sr, "virtual_size": 16 * MIB, "type": "user",
            "sharable": false, "read_only": false, "other_config": {},
        });
        let copy = pool.create_vdi(fields.as_object().unwrap()).unwrap();
        let mut import = pool.import_vdi(&copy, format, bytes.len() as u64).unwrap();
        import.write_all(&bytes).unwrap();
        let outcome = import.conclude().unwrap();
        assert_eq!(outcome.reference::<Vdi>().unwrap(), copy);
        assert!(content(&simulator, &copy) == expected, "{format:?}");
        pool.destroy_vdi(&copy).unwrap();
    }
    // A VHD with what differs, over what it differs from.
    let vm = machine(&pool);
    let copy = pool.clone_vdi(&vdis[0]).unwrap();
    simulator.guest_writes(&vm.as_str().into(), 7, 5).unwrap();
    let (_, later) = snapshot(&pool);
    let delta = read(&pool, &options(&later[0], Some(&vdis[0]), Format::Vhd)).unwrap();
    let mut import = pool.import_vdi(&copy, Format::Vhd, delta.len() as u64).unwrap();
    import.write_all(&delta).unwrap();
    import.conclude().unwrap();
    assert!(content(&simulator, &copy) == content(&simulator, &later[0]));
    assert_nothing_left(&simulator, pool);
}

#[test]
fn an_export_that_fails_says_why() {
    let failure = || Act::Fail(Failure::new("VDI_IO_ERROR", ["Device I/O errors"]));
    for (fault, code, kind) in [
        (Fault::new(Site::Export, failure()), "VDI_IO_ERROR", ErrorKind::Failed),
        (Fault::new(Site::Export, failure()).after(5 * MIB), "VDI_IO_ERROR", ErrorKind::Failed),
        (Fault::new(Site::Export, Act::Cut).after(5 * MIB), "VDI_IO_ERROR", ErrorKind::Failed),
        (Fault::new(Site::Export, Act::Upset(Upset::LoseTasks)).after(5 * MIB), "", ErrorKind::Unknown),
    ] {
        let (simulator, pool) = start(scene());
        let (_, vdis) = snapshot(&pool);
        simulator.fault(fault.clone());
        let mut export = pool.export_vdi(&options(&vdis[0], None, Format::Raw)).unwrap();
        // The bytes may look whole, or break off.
        let read = std::io::copy(&mut export, &mut std::io::sink());
        let error = export.conclude().unwrap_err();
        assert_eq!((error.kind(), error.code()), (kind, code), "{fault:?} {read:?}: {error}");
        assert_eq!(simulator.faults_left(), 0);
    }
}

#[test]
fn an_export_that_is_abandoned_lets_the_disk_go() {
    let (simulator, pool) = start(scene().settings(|settings| settings.export_rate = Some(|_| MIB)));
    let (vm, vdis) = snapshot(&pool);
    let mut export = pool.export_vdi(&options(&vdis[0], None, Format::Vhd)).unwrap();
    export.read_exact(&mut [0; 4096]).unwrap();
    export.abandon().unwrap();
    pool.destroy_vm(&vm).unwrap();
    for vdi in &vdis {
        pool.destroy_vdi(vdi).unwrap();
    }
    assert_nothing_left(&simulator, pool);
}

#[test]
fn an_import_that_fails_says_why() {
    let (simulator, pool) = start(scene());
    let (_, vdis) = snapshot(&pool);
    let bytes = read(&pool, &options(&vdis[0], None, Format::Vhd)).unwrap();
    let copy = pool.clone_vdi(&vdis[0]).unwrap();
    let import = |bytes: &[u8]| {
        let mut import = pool.import_vdi(&copy, Format::Vhd, bytes.len() as u64).unwrap();
        let written = import.write_all(bytes);
        let error = import.conclude().unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Failed, "VDI_IO_ERROR"), "{written:?}: {error}");
        until("the disk is let go", || pool.control_domain_vbds(&copy).unwrap().is_empty());
    };
    // A footer that is not at the end.
    import(&[&bytes[..], &[0; 512]].concat());
    let mut broken = bytes.clone();
    broken[8] ^= 1;
    import(&broken);
    simulator.fault(Fault::new(Site::Import, Act::Fail(Failure::new("VDI_IO_ERROR", ["x"]))).after(MIB));
    import(&bytes);
    assert_nothing_left(&simulator, pool);
}

#[test]
fn a_machine_is_exported_and_imported_as_an_xva() {
    for (compression, is_known) in [(Compression::None, true), (Compression::None, false), (Compression::Gzip, true)] {
        let (simulator, pool) = start(scene());
        let (vm, vdis) = snapshot(&pool);
        let mut export = pool.export_vm(&vm, compression).unwrap();
        let mut bytes = Vec::new();
        export.read_to_end(&mut bytes).unwrap();
        export.conclude().unwrap();
        let sr = pool.record(&vdis[0]).unwrap().fields.sr;
        let mut import = pool.import_vm(&sr, is_known.then_some(bytes.len() as u64)).unwrap();
        import.write_all(&bytes).unwrap();
        let made: Ref<Vm> = import.conclude().unwrap().reference().unwrap();
        let vbds = pool.record(&made).unwrap().fields.vbds;
        let mut vbds = pool.records_of(&vbds).unwrap();
        vbds.sort_by_key(|vbd| vbd.userdevice.clone());
        assert_eq!(vbds.len(), 2);
        for (vbd, vdi) in vbds.iter().zip(&vdis) {
            assert!(content(&simulator, &vbd.vdi) == content(&simulator, vdi), "{compression:?} {is_known}");
        }
        assert_nothing_left(&simulator, pool);
    }
}

#[test]
fn a_running_machine_is_not_exported_and_its_task_says_so() {
    let (simulator, pool) = start(scene());
    let error = match pool.export_vm(&machine(&pool), Compression::None) {
        Err(error) => error,
        Ok(mut export) => {
            let _ = std::io::copy(&mut export, &mut std::io::sink());
            export.conclude().unwrap_err()
        }
    };
    assert_eq!((error.kind(), error.code()), (ErrorKind::Failed, "VM_BAD_POWER_STATE"), "{error}");
    assert_nothing_left(&simulator, pool);
}

#[test]
fn transfers_go_to_the_host_that_has_the_sr() {
    let machine = Machine::new("web01").disk(Disk::new("system", 8 * MIB));
    let scene =
        Scene::new(2).host("first").host("second").sr(Repository::new("local", Storage::Ext).on(&[1])).vm(machine);
    let (simulator, pool) = start(scene);
    let (vm, vdis) = snapshot(&pool);
    let expected = content(&simulator, &vdis[0]);
    assert!(read(&pool, &options(&vdis[0], None, Format::Raw)).unwrap() == expected);
    let asked = |verb: &str| -> Vec<usize> {
        let requests = simulator.log().requests().into_iter();
        requests.filter(|request| request.method.starts_with(verb)).map(|request| request.host).collect()
    };
    // The master sent it on.
    assert_eq!(asked("GET"), [0, 1]);
    let copy = pool.clone_vdi(&vdis[0]).unwrap();
    let mut import = pool.import_vdi(&copy, Format::Raw, 8 * MIB).unwrap();
    import.write_all(&vec![7; expected.len()]).unwrap();
    import.conclude().unwrap();
    assert_eq!(asked("PUT"), [1]);
    assert!(content(&simulator, &copy) == vec![7; expected.len()]);
    // Without the certificate of that host nothing is sent to it.
    simulator.fault(Fault::call("host.get_server_certificate", Act::Fail(Failure::new("INTERNAL_ERROR", ["no"]))));
    assert_eq!(pool.export_vm(&vm, Compression::None).unwrap_err().code(), "INTERNAL_ERROR");
    assert_nothing_left(&simulator, pool);
}

/// What a listener was told: the operation and the name.
fn told(receiver: &Receiver<Event>) -> (Operation, String) {
    let event = receiver.recv_timeout(Duration::from_secs(60)).expect("an event comes");
    let name = event.snapshot.as_ref().and_then(|snapshot| snapshot["name_label"].as_str()).unwrap_or_default();
    (event.operation, name.to_owned())
}

#[test]
fn listeners_are_told_of_their_class_alone_and_nothing_is_asked_without_one() {
    use Operation::{Add, Delete, Modify};
    let (simulator, pool) = start(scene());
    let vm = machine(&pool);
    simulator.log().clear();
    let events = pool.events().unwrap();
    assert_eq!(simulator.log().count("event.from"), 0);

    let (sender, of_class) = channel();
    let sender = Arc::new(Mutex::new(sender));
    let listener = events.listen(Subject::class::<Sr>(), &[Add, Modify, Delete], move |event| {
        let _ = sender.lock().unwrap().send(event.clone());
    });
    assert_eq!(told(&of_class), (Add, "shared".to_owned()));
    assert_eq!(simulator.log().subscriptions(), ["sr"]);

    let (sender, of_object) = channel();
    let sender = Arc::new(Mutex::new(sender));
    let other = events.listen(Subject::object(&vm), &[Modify], move |event| {
        let _ = sender.lock().unwrap().send(event.clone());
    });
    // Both, from now on; what is there is not told to who does not listen to what is added.
    let both = [format!("\"vm/{vm}\""), "\"sr\"".to_owned()];
    let asks_both = || {
        let requests = simulator.log().requests();
        let last = requests.iter().rfind(|request| request.method == "event.from").unwrap().arguments[0].clone();
        both.iter().all(|name| last.contains(name))
    };
    until("both are asked for", asks_both);
    pool.set(&vm, "name_label", "renamed").unwrap();
    assert_eq!(told(&of_object), (Modify, "renamed".to_owned()));
    assert!(of_class.try_recv().is_err());

    // Another session, another master: what is there is told as changed.
    simulator.happen(&Upset::ChangeMaster(1));
    assert_eq!(told(&of_class), (Modify, "shared".to_owned()));
    assert_eq!(told(&of_object), (Modify, "renamed".to_owned()));

    drop(other);
    let last = || simulator.log().requests().into_iter().rfind(|request| request.method == "event.from").unwrap();
    until("only the class is asked for", || last().arguments[0] == "[\"sr\"]");
    drop(listener);
    drop(events);
    let count = simulator.log().count("event.from");
    pool.set(&vm, "name_label", "web01").unwrap();
    assert_eq!(simulator.log().count("event.from"), count);
    drop(pool);
}

#[test]
fn listeners_are_told_what_comes_and_goes() {
    use Operation::{Add, Delete};
    let (_simulator, pool) = start(scene());
    let events = pool.events().unwrap();
    let (sender, receiver) = channel();
    let sender = Arc::new(Mutex::new(sender));
    let _listener = events.listen(Subject::class::<Vm>(), &[Add, Delete], move |event| {
        let name = event.snapshot.as_ref().map_or(Value::Null, |snapshot| snapshot["name_label"].clone());
        if event.operation == Delete || name == json!("web01") || name == json!("snapshot") {
            let _ = sender.lock().unwrap().send(event.clone());
        }
    });
    assert_eq!(told(&receiver), (Add, "web01".to_owned()));
    let vm = pool.snapshot_vm(&machine(&pool), "snapshot", &[]).unwrap();
    assert_eq!(told(&receiver), (Add, "snapshot".to_owned()));
    pool.destroy_vm(&vm).unwrap();
    let event = receiver.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!((event.operation, event.reference.as_str()), (Delete, vm.as_str()));
}

#[test]
fn a_deletion_that_no_event_told_of_shows_in_the_number_of_objects() {
    let (simulator, pool) = start(scene());
    let events = pool.events().unwrap();
    let (sender, receiver) = channel();
    let sender = Arc::new(Mutex::new(sender));
    let task = pool.task("lost").unwrap();
    let _listener = events.listen(Subject::class::<TaskObject>(), &[Operation::Add, Operation::Delete], move |event| {
        let _ = sender.lock().unwrap().send(event.clone());
    });
    assert_eq!(told(&receiver), (Operation::Add, "lost".to_owned()));
    simulator.happen(&Upset::LoseTasks);
    let event = receiver.recv_timeout(Duration::from_secs(180)).unwrap();
    assert_eq!((event.operation, event.reference.as_str()), (Operation::Delete, task.reference().as_str()));
}

#[test]
fn many_calls_at_once_share_the_session() {
    let (simulator, pool) = start(scene());
    let vm = machine(&pool);
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| (0..5).for_each(|_| assert_eq!(pool.record(&vm).unwrap().name_label, "web01")));
        }
        simulator.happen(&Upset::LoseSessions);
    });
    let logins = simulator.log().count("session.login_with_password");
    assert!(logins <= 2, "{logins}");
    assert_nothing_left(&simulator, pool);
}
