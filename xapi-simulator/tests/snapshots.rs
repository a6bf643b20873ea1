//! Snapshots of machines, the chains of their disks, and room in SRs.

#![allow(clippy::cloned_ref_to_slice_refs, reason = "lists of arguments look alike, however long they are")]

mod client;

use client::{Client, pool};
use serde_json::{Value, json};
use xapi_simulator::failure::Failure;
use xapi_simulator::scene::{Disk, Machine, Repository, Storage};
use xapi_simulator::{Act, Class, Fault, Scene, Upset};

fn snapshot(client: &Client, vm: &Value) -> Value {
    json!(client.text("VM.snapshot", &[vm.clone(), json!("snapshot")]))
}

fn chained(client: &Client, vdi: &Value) -> usize {
    let mut length = 0;
    let mut config = client.call("VDI.get_sm_config", &[vdi.clone()]).unwrap();
    while let Some(parent) = config.get("vhd-parent").cloned() {
        let base = client.text("VDI.get_by_uuid", &[parent]);
        assert_eq!(client.call("VDI.get_managed", &[json!(base)]), Ok(json!(false)));
        config = client.call("VDI.get_sm_config", &[json!(base)]).unwrap();
        length += 1;
    }
    length
}

#[test]
fn a_snapshot_is_a_copy_of_the_machine_that_is_changed_where_snapshots_are() {
    let machine = Machine::new("vm").running().cd().tag("t").disk(Disk::new("disk", 8 << 20).filled(50));
    let client = Client::start(Scene::new(1).vm(machine));
    let (vm, disk) = (client.vm(), client.disk());
    client.call("VM.add_to_other_config", &[vm.clone(), json!("default_template"), json!("true")]).unwrap();
    client.call("VM.add_to_other_config", &[vm.clone(), json!("key"), json!("value")]).unwrap();
    client.call("VM.add_to_blocked_operations", &[vm.clone(), json!("migrate_send"), json!("no")]).unwrap();
    client.call("VDI.add_to_other_config", &[disk.clone(), json!("disk"), json!("value")]).unwrap();
    let taken = snapshot(&client, &vm);
    let record = client.call("VM.get_record", &[taken.clone()]).unwrap();
    assert_eq!(record["is_a_snapshot"], true);
    assert_eq!(record["is_a_template"], true);
    assert_eq!(record["snapshot_of"], vm);
    assert_eq!(record["power_state"], "Halted");
    assert_eq!(record["blocked_operations"], json!({}));
    assert_eq!(record["tags"], json!(["t"]));
    assert_eq!(record["other_config"]["key"], "value");
    assert_eq!(record["other_config"].get("default_template"), None);
    assert_eq!(
        record["snapshot_info"],
        json!({"power-state-at-snapshot": "Running", "disk-snapshot-type": "crash_consistent"})
    );
    assert_eq!(record["VIFs"].as_array().unwrap().len(), 1);
    assert_eq!(client.call("VM.get_parent", &[vm.clone()]), Ok(taken.clone()));
    assert_eq!(client.call("VM.get_snapshots", &[vm.clone()]), Ok(json!([taken])));
    let copy = client.disk_of(&taken);
    let record = client.call("VDI.get_record", &[copy.clone()]).unwrap();
    assert_eq!(record["snapshot_of"], disk);
    assert_eq!(record["other_config"], json!({"disk": "value"}));
    assert_eq!(client.digest(&copy), client.digest(&disk));
    assert_eq!((chained(&client, &disk), chained(&client, &copy)), (1, 1));
    // Both have the CD, which is no copy.
    let cds = |vm: &Value| {
        let vbds = client.call("VM.get_VBDs", &[vm.clone()]).unwrap();
        let vdis = vbds.as_array().unwrap().iter().map(|vbd| client.call("VBD.get_record", &[vbd.clone()]).unwrap());
        vdis.filter(|vbd| vbd["type"] == "CD").map(|vbd| vbd["VDI"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(cds(&vm), cds(&taken));
    assert_eq!(client.code("VM.start", &[taken.clone(), json!(false), json!(false)]), "VM_IS_SNAPSHOT");

    // What the guest writes is its own.
    client.write(&disk, 0, &[7; 512]);
    assert_ne!(client.digest(&copy), client.digest(&disk));
    client.call("VM.destroy", &[taken]).unwrap();
    client.call("VDI.destroy", &[copy]).unwrap();
    assert_eq!(client.call("VM.get_snapshots", &[vm]), Ok(json!([])));
}

#[test]
fn disks_can_be_left_out_only_where_the_version_knows_it() {
    let machine = Machine::new("vm").disk(Disk::new("a", 2 << 20)).disk(Disk::new("[NOBAK] b", 2 << 20));
    let client = Client::start(Scene::new(1).vm(machine));
    let vm = client.vm();
    let without = json!([client.simulator.only(Class::Vdi, "[NOBAK] b").as_str()]);
    let taken = client.text("VM.snapshot", &[vm.clone(), json!("x"), without.clone()]);
    assert_eq!(client.call("VM.get_VBDs", &[json!(taken)]).unwrap().as_array().unwrap().len(), 1);
    client.simulator.settings(|settings| settings.has_ignore_vdis = false);
    let error = client.call("VM.snapshot", &[vm, json!("x"), without]).unwrap_err();
    assert_eq!(error, ["MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.snapshot", "2", "3"]);
}

#[test]
fn a_snapshot_that_fails_leaves_nothing() {
    let client = Client::start(
        Scene::new(1)
            .sr(Repository::new("thin", Storage::Nfs))
            .sr(Repository::new("thick", Storage::Lvm).size(100 << 20))
            .vm(Machine::new("vm").disk(Disk::new("a", 2 << 20)).disk(Disk::new("b", 80 << 20).filled(50).on("thick"))),
    );
    let before = client.simulator.objects();
    client.simulator.happen(&Upset::FillStorage);
    assert_eq!(client.code("VM.snapshot", &[client.vm(), json!("x")]), "SR_BACKEND_FAILURE_44");
    let thin = client.simulator.only(Class::Sr, "thin");
    while client.simulator.coalesce(&thin) {}
    assert_eq!(client.simulator.objects(), before);
}

#[test]
fn an_asynchronous_call_has_a_task_whose_result_is_xml() {
    let client = pool();
    let task = client.text("Async.VM.snapshot", &[client.vm(), json!("x")]);
    let record = client.ended(&task);
    assert_eq!(record["status"], "success");
    assert_eq!(record["progress"], 1.0);
    let result = record["result"].as_str().unwrap();
    assert!(result.starts_with("<value>OpaqueRef:") && result.ends_with("</value>"), "{result}");
    let task = client.text("Async.VM.destroy", &[json!("OpaqueRef:x")]);
    let record = client.ended(&task);
    assert_eq!(record["status"], "failure");
    assert_eq!(record["error_info"], json!(["HANDLE_INVALID", "VM", "OpaqueRef:x"]));
    client.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::new("TOO_MANY_STORAGE_MIGRATES", ["3"]))));
    let failed = client.text("Async.VM.snapshot", &[client.vm(), json!("x")]);
    assert_eq!(client.ended(&failed)["error_info"], json!(["TOO_MANY_STORAGE_MIGRATES", "3"]));
    client.call("task.destroy", &[json!(task)]).unwrap();
    assert_eq!(client.code("task.get_status", &[json!(task)]), "HANDLE_INVALID");
}

#[test]
fn operations_that_are_blocked_are_not_done() {
    let client = pool();
    let vm = client.vm();
    for (operation, method, rest) in [
        ("snapshot", "VM.snapshot", vec![json!("x")]),
        ("start", "VM.start", vec![json!(false), json!(false)]),
        ("destroy", "VM.destroy", vec![]),
    ] {
        client.call("VM.add_to_blocked_operations", &[vm.clone(), json!(operation), json!("why")]).unwrap();
        let arguments: Vec<Value> = std::iter::once(vm.clone()).chain(rest).collect();
        let error = client.call(method, &arguments).unwrap_err();
        assert_eq!(error, ["OPERATION_BLOCKED", vm.as_str().unwrap(), "why"]);
    }
}

#[test]
fn chains_grow_to_their_limit_and_are_coalesced() {
    let client = pool();
    client.simulator.settings(|settings| settings.chain_limit = 4);
    let (vm, disk) = (client.vm(), client.disk());
    let mut taken = Vec::new();
    for round in 0..3 {
        client.write(&disk, round * 4096, &[1; 4096]);
        taken.push(snapshot(&client, &vm));
    }
    assert_eq!(chained(&client, &disk), 3);
    client.write(&disk, 0, &[2; 4096]);
    let digest = client.digest(&disk);
    assert_eq!(client.code("VM.snapshot", &[vm, json!("x")]), "SR_BACKEND_FAILURE_109");
    for taken in taken {
        let copy = client.disk_of(&taken);
        client.call("VM.destroy", &[taken]).unwrap();
        client.call("VDI.destroy", &[copy]).unwrap();
    }
    assert_eq!(chained(&client, &disk), 3);
    let unmanaged = || {
        let records = client.call("VDI.get_all_records", &[]).unwrap();
        records.as_object().unwrap().values().filter(|vdi| vdi["managed"] == false).count()
    };
    let sr = client.simulator.only(Class::Sr, "storage");
    assert!(client.simulator.coalesce(&sr));
    assert_eq!((chained(&client, &disk), unmanaged()), (2, 2));
    client.simulator.happen(&Upset::Coalesce);
    assert_eq!((chained(&client, &disk), unmanaged()), (0, 0));
    assert_eq!(client.digest(&disk), digest);
}

#[test]
fn machines_start_and_stop_with_their_disks() {
    let client = pool();
    let (vm, disk) = (client.vm(), client.disk());
    client.call("VM.start", &[vm.clone(), json!(false), json!(false)]).unwrap();
    assert_eq!(client.code("VM.destroy", &[vm.clone()]), "VM_BAD_POWER_STATE");
    assert_eq!(client.code("VDI.destroy", &[disk.clone()]), "VDI_IN_USE");
    let metrics = client.text("VM.get_guest_metrics", &[vm.clone()]);
    client::until("the tools are seen", || {
        let seen = client.call("VM_guest_metrics.get_PV_drivers_detected", &[json!(metrics)]);
        (seen == Ok(json!(true))).then_some(())
    });
    client.call("VM.hard_shutdown", &[vm.clone()]).unwrap();
    client.call("VM.destroy", &[vm]).unwrap();
    client.call("VDI.destroy", &[disk]).unwrap();
}

#[test]
fn memory_limits_are_in_order() {
    let client = pool();
    let limits = |numbers: [i64; 4]| {
        let arguments: Vec<Value> = std::iter::once(client.vm()).chain(numbers.into_iter().map(Value::from)).collect();
        client.call("VM.set_memory_limits", &arguments)
    };
    limits([1 << 20, 8 << 20, 2 << 20, 4 << 20]).unwrap();
    assert_eq!(limits([1 << 20, 2 << 20, 2 << 20, 4 << 20]).unwrap_err()[0], "MEMORY_CONSTRAINT_VIOLATION");
}

#[test]
fn data_is_destroyed_only_where_the_log_stays_and_nothing_holds_it() {
    let client = pool();
    client.simulator.settings(|settings| settings.data_destroy_wait = std::time::Duration::from_millis(10));
    let (vm, disk) = (client.vm(), client.disk());
    let plain = client.disk_of(&snapshot(&client, &vm));
    assert_eq!(client.code("VDI.data_destroy", &[plain]), "VDI_NO_CBT_METADATA");
    client.call("VDI.enable_cbt", &[disk.clone()]).unwrap();
    let first_vm = snapshot(&client, &vm);
    let first = client.disk_of(&first_vm);
    assert_eq!(client.code("VDI.data_destroy", &[first.clone()]), "VDI_IN_USE");
    client.call("VM.destroy", &[first_vm]).unwrap();
    client.call("VDI.data_destroy", &[first.clone()]).unwrap();
    assert_eq!(client.text("VDI.get_type", &[first.clone()]), "cbt_metadata");
    assert_eq!(client.code("VDI.get_nbd_info", &[first.clone()]), "VDI_INCOMPATIBLE_TYPE");

    // Of 8 MiB in runs of 64 KiB, runs 1 and 127 are written.
    client.write(&disk, 64 << 10, &[1; 512]);
    client.write(&disk, (8 << 20) - 512, &[1; 512]);
    let second = client.disk_of(&snapshot(&client, &vm));
    let bitmap = client.text("VDI.list_changed_blocks", &[first.clone(), second.clone()]);
    let mut expected = [0; 16];
    (expected[0], expected[15]) = (0b0100_0000, 1);
    assert_eq!(bitmap, xapi_simulator::methods::cbt::encode(&expected));
    assert_eq!(client.code("VDI.list_changed_blocks", &[second.clone(), first.clone()]), "SR_BACKEND_FAILURE_460");

    client.simulator.fault(Fault::call("VDI.list_changed_blocks", Act::Bitmap(3)));
    assert_eq!(client.text("VDI.list_changed_blocks", &[first.clone(), second.clone()]), "////");
    let refused = Failure::storage(459, "logs contradict each other");
    client.simulator.fault(Fault::call("VDI.list_changed_blocks", Act::Fail(refused)));
    assert_eq!(client.code("VDI.list_changed_blocks", &[first, second]), "SR_BACKEND_FAILURE_459");
}
