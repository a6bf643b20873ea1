//! What can be done with machines, and when: reverting, copying, suspending, what is blocked, TPMs and BIOS strings.

#![allow(clippy::cloned_ref_to_slice_refs, reason = "lists of arguments look alike, however long they are")]

mod client;

use client::{Client, pool};
use serde_json::{Value, json};
use xapi_simulator::scene::{Disk, Machine, Repository, Storage};
use xapi_simulator::{Class, Scene, Upset};

fn snapshot(client: &Client, vm: &Value) -> Value {
    json!(client.text("VM.snapshot", &[vm.clone(), json!("snapshot")]))
}

fn allowed(client: &Client, vm: &Value) -> Vec<String> {
    let operations = client.call("VM.get_allowed_operations", &[vm.clone()]).unwrap();
    operations.as_array().unwrap().iter().map(|operation| operation.as_str().unwrap().to_owned()).collect()
}

fn start(client: &Client, vm: &Value) -> Result<Value, Vec<String>> {
    client.call("VM.start", &[vm.clone(), json!(false), json!(false)])
}

#[test]
fn a_machine_becomes_again_what_its_snapshot_is() {
    let machine = Machine::new("vm").running().cd().tpm("YQ==").disk(Disk::new("disk", 8 << 20).filled(50));
    let client = Client::start(Scene::new(1).network("lan", &[]).network("wan", &[]).vm(machine));
    let (vm, disk) = (client.vm(), client.disk());
    client.call("VM.add_to_other_config", &[vm.clone(), json!("key"), json!("old")]).unwrap();
    let before = client.digest(&disk);
    let first = snapshot(&client, &vm);
    client.write(&disk, 4096, &[9; 4096]);
    let second = snapshot(&client, &vm);
    // What is changed, added and taken away comes back or goes; tags stay.
    client.write(&disk, 0, &[7; 4096]);
    client.call("VM.set_name_label", &[vm.clone(), json!("renamed")]).unwrap();
    client.call("VM.set_tags", &[vm.clone(), json!(["kept"])]).unwrap();
    client.call("VM.remove_from_other_config", &[vm.clone(), json!("key")]).unwrap();
    let vif = client.call("VM.get_VIFs", &[vm.clone()]).unwrap()[0].clone();
    let mac = client.text("VIF.get_MAC", &[vif.clone()]);
    let wan = client.simulator.only(Class::Network, "wan").to_string();
    client.call("VIF.move", &[vif, json!(wan)]).unwrap();
    let vtpm = client.call("VM.get_VTPMs", &[vm.clone()]).unwrap()[0].clone();
    client.call("VTPM.set_contents", &[vtpm, json!("Yg==")]).unwrap();
    let extra = client.like(&disk);
    let extra_vbd = json!({"VM": vm, "VDI": extra, "userdevice": "5", "bootable": false, "mode": "RW", "type": "Disk",
        "empty": false, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {}});
    client.call("VBD.create", &[extra_vbd]).unwrap();

    client.call("VM.revert", &[first.clone()]).unwrap();
    let record = client.call("VM.get_record", &[vm.clone()]).unwrap();
    assert_eq!((&record["power_state"], &record["name_label"]), (&json!("Halted"), &json!("vm")));
    assert_eq!((&record["tags"], &record["other_config"]["key"]), (&json!(["kept"]), &json!("old")));
    assert_eq!((&record["is_a_snapshot"], &record["is_a_template"]), (&json!(false), &json!(false)));
    assert_eq!((&record["parent"], record["snapshots"].as_array().unwrap().len()), (&first, 2));
    let now = client.disk_of(&vm);
    assert_ne!(now, disk);
    assert_eq!(client.digest(&now), before);
    assert_eq!(client.code("VDI.get_record", &[disk]), "HANDLE_INVALID");
    assert_eq!(client.call("VDI.get_is_a_snapshot", &[now.clone()]), Ok(json!(false)));
    for snapshot in [&first, &second] {
        assert_eq!(client.text("VDI.get_snapshot_of", &[client.disk_of(snapshot)]), now.as_str().unwrap());
    }
    // A disk that the snapshot does not have is attached to nothing; the drive is there.
    assert_eq!(client.call("VDI.get_VBDs", &[extra]), Ok(json!([])));
    assert_eq!(record["VBDs"].as_array().unwrap().len(), 2);
    let vif = record["VIFs"][0].clone();
    let lan = client.simulator.only(Class::Network, "lan").to_string();
    assert_eq!((client.text("VIF.get_MAC", &[vif.clone()]), client.text("VIF.get_network", &[vif])), (mac, lan));
    assert_eq!(client.text("VTPM.get_contents", &[record["VTPMs"][0].clone()]), "YQ==");
    start(&client, &vm).unwrap();
    // As often as one likes, also forth.
    client.call("VM.revert", &[second.clone()]).unwrap();
    assert_eq!(client.digest(&client.disk_of(&vm)), client.digest(&client.disk_of(&second)));
    assert_eq!(client.text("VM.get_parent", &[vm]), second.as_str().unwrap());
}

#[test]
fn only_snapshots_are_reverted_to_and_a_machine_that_is_gone_comes_back() {
    let client = pool();
    let (vm, disk) = (client.vm(), client.disk());
    assert_eq!(client.code("VM.revert", &[vm.clone()]), "VM_REVERT_FAILED");
    let (uuid, digest) = (client.text("VM.get_uuid", &[vm.clone()]), client.digest(&disk));
    let taken = snapshot(&client, &vm);
    client.call("VM.add_to_blocked_operations", &[vm.clone(), json!("reverting"), json!("no")]).unwrap();
    assert_eq!(
        client.call("VM.revert", &[taken.clone()]).unwrap_err(),
        ["OPERATION_BLOCKED", vm.as_str().unwrap(), "no"]
    );
    client.call("VM.remove_from_blocked_operations", &[vm.clone(), json!("reverting")]).unwrap();
    client.call("VM.destroy", &[vm.clone()]).unwrap();
    client.call("VDI.destroy", &[disk]).unwrap();
    client.call("VM.revert", &[taken.clone()]).unwrap();
    let anew = json!(client.text("VM.get_by_uuid", &[json!(uuid)]));
    assert_ne!(anew, vm);
    assert_eq!(client.text("VM.get_name_label", &[anew.clone()]), "vm");
    assert_eq!(client.call("VM.get_snapshots", &[anew.clone()]), Ok(json!([taken])));
    assert_eq!(client.digest(&client.disk_of(&anew)), digest);
    start(&client, &anew).unwrap();
}

#[test]
fn a_revert_without_room_leaves_a_halted_machine_without_disks() {
    let client = pool();
    let (vm, disk) = (client.vm(), client.disk());
    let taken = snapshot(&client, &vm);
    client.write(&disk, 0, &[1; 512]);
    client.simulator.settings(|settings| settings.chain_limit = 1);
    assert_eq!(client.code("VM.revert", &[taken.clone()]), "SR_BACKEND_FAILURE_109");
    assert_eq!(client.call("VM.get_VBDs", &[vm.clone()]), Ok(json!([])));
    assert_eq!(client.code("VDI.get_record", &[disk]), "HANDLE_INVALID");
    client.simulator.settings(|settings| settings.chain_limit = 30);
    client.call("VM.revert", &[taken]).unwrap();
    assert_eq!(client.call("VM.get_VBDs", &[vm]).unwrap().as_array().unwrap().len(), 1);
}

#[test]
fn a_disk_that_is_cloned_can_be_written_and_belongs_to_nobody() {
    let client = pool();
    let (vm, disk) = (client.vm(), client.disk());
    let taken = client.disk_of(&snapshot(&client, &vm));
    client.call("VDI.add_to_other_config", &[taken.clone(), json!("key"), json!("value")]).unwrap();
    client.call("VDI.enable_cbt", &[disk.clone()]).unwrap();
    let digest = client.digest(&taken);
    for source in [&taken, &disk] {
        let clone = json!(client.text("VDI.clone", &[source.clone(), json!({})]));
        let record = client.call("VDI.get_record", &[clone.clone()]).unwrap();
        for (field, expected) in [
            ("is_a_snapshot", json!(false)),
            ("snapshot_of", json!("OpaqueRef:NULL")),
            ("VBDs", json!([])),
            ("cbt_enabled", json!(false)),
        ] {
            assert_eq!(record[field], expected, "{field}");
        }
        assert_eq!(record["other_config"], client.call("VDI.get_other_config", &[source.clone()]).unwrap());
        assert_eq!(client.digest(&clone), digest);
        client.write(&clone, 0, &[3; 512]);
        assert_ne!(client.digest(&clone), digest);
    }
    assert_eq!((client.digest(&taken), client.digest(&disk)), (digest, digest));
    // A machine that runs keeps none of it from being cloned.
    start(&client, &vm).unwrap();
    client.text("VDI.clone", &[disk]);
}

#[test]
fn what_is_blocked_is_not_done_and_not_allowed_once_that_is_looked_at() {
    let client = pool();
    let vm = client.vm();
    assert!(allowed(&client, &vm).iter().any(|operation| operation == "start"));
    client.call("VM.add_to_blocked_operations", &[vm.clone(), json!("start"), json!("a replica")]).unwrap();
    assert!(allowed(&client, &vm).iter().any(|operation| operation == "start"));
    client.call("VM.update_allowed_operations", &[vm.clone()]).unwrap();
    assert!(!allowed(&client, &vm).iter().any(|operation| operation == "start"));
    assert_eq!(start(&client, &vm).unwrap_err(), ["OPERATION_BLOCKED", vm.as_str().unwrap(), "a replica"]);
    let host = client.simulator.only(Class::Host, "host1").to_string();
    let start_on = [vm.clone(), json!(host), json!(false), json!(false)];
    client.call("VM.add_to_blocked_operations", &[vm.clone(), json!("start_on"), json!("too")]).unwrap();
    assert_eq!(client.code("VM.start_on", &start_on), "OPERATION_BLOCKED");
    // A snapshot has none of them, nor has a machine that is cloned.
    let clone = json!(client.text("VM.clone", &[vm.clone(), json!("clone")]));
    assert_eq!(client.call("VM.get_blocked_operations", &[clone.clone()]), Ok(json!({})));
    start(&client, &clone).unwrap();
    client.call("VM.remove_from_blocked_operations", &[vm.clone(), json!("start_on")]).unwrap();
    client.call("VM.start_on", &start_on).unwrap();
}

#[test]
fn each_power_state_allows_its_own() {
    let client = pool();
    let vm = client.vm();
    let error = client.call("VM.suspend", &[vm.clone()]).unwrap_err();
    assert_eq!(error, ["VM_BAD_POWER_STATE", vm.as_str().unwrap(), "running", "halted"]);
    start(&client, &vm).unwrap();
    for absent in ["start", "clone", "destroy", "export", "resume"] {
        assert!(!allowed(&client, &vm).iter().any(|operation| operation == absent), "{absent}");
    }
    let error = client.call("VM.destroy", &[vm.clone()]).unwrap_err();
    assert_eq!(error[2..], ["halted, suspended", "running"]);
    let taken = snapshot(&client, &vm);
    assert_eq!(allowed(&client, &taken), ["clone", "copy", "revert", "export", "metadata_export", "destroy"]);
    assert_eq!(client.code("VM.set_is_a_template", &[taken]), "MESSAGE_PARAMETER_COUNT_MISMATCH");
}

#[test]
fn a_suspended_machine_has_its_memory_on_a_disk() {
    let client = pool();
    let vm = client.vm();
    start(&client, &vm).unwrap();
    let disks = client.simulator.objects()["VDI"];
    client.call("VM.suspend", &[vm.clone()]).unwrap();
    let image = json!(client.text("VM.get_suspend_VDI", &[vm.clone()]));
    assert_eq!(client.text("VDI.get_type", &[image.clone()]), "suspend");
    assert_eq!(client.text("VM.get_resident_on", &[vm.clone()]), "OpaqueRef:NULL");
    // A snapshot has nothing of it; a checkpoint has.
    let taken = snapshot(&client, &vm);
    assert_eq!(client.text("VM.get_power_state", &[taken.clone()]), "Halted");
    assert_eq!(client.text("VM.get_suspend_VDI", &[taken]), "OpaqueRef:NULL");
    let checkpoint = json!(client.text("VM.checkpoint", &[vm.clone(), json!("checkpoint")]));
    let copy = client.text("VM.get_suspend_VDI", &[checkpoint.clone()]);
    assert!(copy != image && client.text("VDI.get_type", &[json!(copy)]) == "suspend");
    client.call("VM.resume", &[vm.clone(), json!(false), json!(false)]).unwrap();
    assert_eq!(client.text("VM.get_power_state", &[vm.clone()]), "Running");
    assert_eq!(client.code("VDI.get_record", &[image]), "HANDLE_INVALID");
    // Back to the moment of the checkpoint, with its memory.
    client.call("VM.revert", &[checkpoint.clone()]).unwrap();
    assert_eq!(client.text("VM.get_power_state", &[vm.clone()]), "Suspended");
    let clone = client.text("VM.get_suspend_VDI", &[vm.clone()]);
    assert!(clone != "OpaqueRef:NULL" && clone != copy);
    client.call("VM.hard_shutdown", &[vm]).unwrap();
    assert_eq!(client.code("VDI.get_record", &[json!(clone)]), "HANDLE_INVALID");
    assert!(client.simulator.objects()["VDI"] > disks);
}

#[test]
fn copies_share_nothing() {
    let client = Client::start(
        Scene::new(1)
            .sr(Repository::new("thin", Storage::Nfs))
            .sr(Repository::new("small", Storage::Lvm).size(12 << 20))
            .vm(Machine::new("vm").disk(Disk::new("disk", 8 << 20).filled(50))),
    );
    let (vm, disk) = (client.vm(), client.disk());
    let small = json!(client.simulator.only(Class::Sr, "small").as_str());
    let copy = json!(client.text("VM.copy", &[vm.clone(), json!("copy"), small.clone()]));
    let copied = client.disk_of(&copy);
    assert_eq!(client.text("VDI.get_SR", &[copied.clone()]), small.as_str().unwrap());
    assert_eq!(client.digest(&copied), client.digest(&disk));
    assert_eq!(client.call("VDI.get_sm_config", &[disk.clone()]), Ok(json!({})));
    let macs: Vec<String> = [&vm, &copy]
        .map(|vm| client.text("VIF.get_MAC", &[client.call("VM.get_VIFs", &[vm.clone()]).unwrap()[0].clone()]))
        .into();
    assert_ne!(macs[0], macs[1]);
    let before = client.simulator.objects();
    assert_eq!(client.code("VM.copy", &[vm.clone(), json!("x"), small.clone()]), "SR_BACKEND_FAILURE_44");
    client.simulator.happen(&Upset::FillStorage);
    assert_eq!(
        client.code("VDI.copy", &[disk.clone(), json!(client.text("VDI.get_SR", &[disk.clone()]))]),
        "SR_BACKEND_FAILURE_44"
    );
    assert_eq!(client.simulator.objects(), before);
    start(&client, &vm).unwrap();
    assert_eq!(client.code("VDI.copy", &[disk.clone(), small]), "VDI_IN_USE");
    assert_eq!(client.code("VM.clone", &[vm, json!("x")]), "VM_BAD_POWER_STATE");
}

#[test]
fn a_disk_is_copied_into_one_that_is_there_and_what_differs_onto_its_base() {
    let client = pool();
    let (vm, disk) = (client.vm(), client.disk());
    let sr = json!(client.text("VDI.get_SR", &[disk.clone()]));
    let null = json!("OpaqueRef:NULL");
    let first = client.disk_of(&snapshot(&client, &vm));
    client.write(&disk, 5 << 20, &[9; 4096]);
    let into = client.like(&disk);
    let copy = |from: &Value, base: &Value, into: &Value| {
        client.call("VDI.copy", &[from.clone(), sr.clone(), base.clone(), into.clone()])
    };
    assert_eq!(copy(&first, &null, &into), Ok(into.clone()));
    assert_eq!(client.digest(&into), client.digest(&first));
    // Only what differs is written: what is elsewhere stays as it is.
    client.write(&into, 0, &[1; 512]);
    assert_eq!(copy(&disk, &first, &into), Ok(into.clone()));
    assert_ne!(client.digest(&into), client.digest(&disk));
    assert_eq!(copy(&first, &null, &into), Ok(into.clone()));
    assert_eq!(copy(&disk, &first, &into), Ok(into.clone()));
    assert_eq!(client.digest(&into), client.digest(&disk));
    let small = json!({"name_label": "small", "SR": sr, "virtual_size": 2 << 20, "type": "user", "sharable": false,
        "read_only": false, "other_config": {}});
    let small = json!(client.text("VDI.create", &[small]));
    assert_eq!(copy(&disk, &null, &small).unwrap_err()[0], "VDI_TOO_SMALL");
    client.call("VDI.set_read_only", &[into.clone(), json!(true)]).unwrap();
    assert_eq!(copy(&disk, &null, &into).unwrap_err(), ["VDI_READONLY", into.as_str().unwrap()]);
}

#[test]
fn a_machine_has_one_tpm_and_only_where_that_is_allowed() {
    let client = pool();
    let vm = client.vm();
    let create = || client.call("VTPM.create", &[vm.clone(), json!(false)]);
    let vtpm = create().unwrap();
    assert_eq!(create().unwrap_err(), ["VTPM_MAX_AMOUNT_REACHED", "1"]);
    assert_eq!(client.text("VTPM.get_contents", &[vtpm.clone()]), "");
    client.call("VTPM.set_contents", &[vtpm.clone(), json!("c2VjcmV0")]).unwrap();
    assert_eq!(client.text("VTPM.get_contents", &[vtpm.clone()]), "c2VjcmV0");
    assert_eq!(client.code("VTPM.set_contents", &[vtpm.clone(), json!("?")]), "INTERNAL_ERROR");
    let logged = client.simulator.log().requests();
    assert!(!logged.iter().any(|request| request.arguments.iter().any(|argument| argument.contains("c2VjcmV0"))));
    // What is copied holds the same, unless it is unique.
    let clone = json!(client.text("VM.clone", &[vm.clone(), json!("clone")]));
    let copy = client.call("VM.get_VTPMs", &[clone.clone()]).unwrap()[0].clone();
    assert_eq!(client.text("VTPM.get_contents", &[copy.clone()]), "c2VjcmV0");
    start(&client, &clone).unwrap();
    assert_eq!(client.code("VTPM.destroy", &[copy]), "VM_BAD_POWER_STATE");
    client.call("VTPM.destroy", &[vtpm.clone()]).unwrap();
    assert_eq!(client.code("VTPM.get_contents", &[vtpm]), "HANDLE_INVALID");
    let unique = client.call("VTPM.create", &[vm.clone(), json!(true)]).unwrap();
    client.call("VTPM.set_contents", &[unique, json!("c2VjcmV0")]).unwrap();
    let taken = snapshot(&client, &vm);
    let copy = client.call("VM.get_VTPMs", &[taken]).unwrap()[0].clone();
    assert_eq!(client.text("VTPM.get_contents", &[copy]), "");
    let other = json!(client.text("VM.clone", &[vm.clone(), json!("other")]));
    client.call("VTPM.destroy", &[client.call("VM.get_VTPMs", &[other.clone()]).unwrap()[0].clone()]).unwrap();
    let pool = client.call("pool.get_all", &[]).unwrap()[0].clone();
    client
        .simulator
        .change(|state| {
            let pool = xapi_simulator::value::Reference::from(pool.as_str().unwrap());
            state.store.set(Class::Pool, &pool, "restrictions", xapi_simulator::value::map([("restrict_vtpm", "true")]))
        })
        .unwrap();
    assert_eq!(
        client.call("VTPM.create", &[other, json!(false)]).unwrap_err(),
        ["FEATURE_RESTRICTED", "restrict_vtpm"]
    );
}

#[test]
fn bios_strings_are_set_once_and_are_printable() {
    let client = pool();
    let vm = client.vm();
    let set = |strings: Value| client.call("VM.set_bios_strings", &[vm.clone(), strings]);
    for (strings, reason) in [
        (json!({"oem-1": "x"}), "Unknown key"),
        (json!({"bios-vendor": ""}), "Value provided is empty"),
        (json!({"bios-vendor": "\u{e9}"}), "\u{e9} has non-printable ASCII characters"),
    ] {
        let error = set(strings).unwrap_err();
        assert_eq!((error[0].as_str(), error[2].as_str()), ("INVALID_VALUE", reason));
    }
    assert_eq!(set(json!({"bios-vendor": "x".repeat(513)})).unwrap_err()[0], "INVALID_VALUE");
    set(json!({"bios-vendor": "Maker"})).unwrap();
    let strings = client.call("VM.get_bios_strings", &[vm.clone()]).unwrap();
    assert_eq!((&strings["bios-vendor"], &strings["system-product-name"]), (&json!("Maker"), &json!("HVM domU")));
    assert_eq!(set(json!({"bios-vendor": "Other"})).unwrap_err(), ["VM_BIOS_STRINGS_ALREADY_SET"]);
}

#[test]
fn interfaces_move_between_networks_also_of_a_machine_that_runs() {
    let client = Client::start(Scene::new(1).network("lan", &[]).network("wan", &[]).vm(Machine::new("vm").running()));
    let vif = client.call("VM.get_VIFs", &[client.vm()]).unwrap()[0].clone();
    let (mac, wan) =
        (client.text("VIF.get_MAC", &[vif.clone()]), json!(client.simulator.only(Class::Network, "wan").as_str()));
    client.call("VIF.move", &[vif.clone(), wan.clone()]).unwrap();
    assert_eq!(client.call("network.get_VIFs", &[wan]), Ok(json!([vif])));
    assert_eq!(client.text("VIF.get_MAC", &[vif.clone()]), mac);
    assert_eq!(client.call("VIF.get_currently_attached", &[vif.clone()]), Ok(json!(true)));
    let error = client.call("VIF.move", &[vif, json!("OpaqueRef:x")]).unwrap_err();
    assert_eq!(error, ["HANDLE_INVALID", "network", "OpaqueRef:x"]);
}

#[test]
fn pools_stand_side_by_side_and_a_machine_runs_where_its_disks_are() {
    let scene = || {
        let local = Repository::new("local", Storage::Ext).on(&[1]);
        let vm = Machine::new("vm").disk(Disk::new("disk", 4 << 20).on("local"));
        Scene::new(1).host("a").host("b").sr(Repository::new("shared", Storage::Nfs)).sr(local).vm(vm)
    };
    let pools = [Client::start(scene()), Client::start(scene())];
    assert_ne!(pools[0].simulator.address(), pools[1].simulator.address());
    assert_ne!(pools[0].simulator.fingerprint(), pools[1].simulator.fingerprint());
    for client in &pools {
        let vm = client.vm();
        let served = client.call("VDI.get_nbd_info", &[client.disk()]).unwrap();
        assert_eq!(served.as_array().unwrap().len(), 1);
        assert_eq!(served[0]["address"], client.simulator.address_of(1).ip().to_string());
        let host = |name: &str| json!(client.simulator.only(Class::Host, name).as_str());
        let on_a = [vm.clone(), host("a"), json!(false), json!(false)];
        let sr = client.simulator.only(Class::Sr, "local").to_string();
        assert_eq!(client.call("VM.start_on", &on_a).unwrap_err(), ["VM_REQUIRES_SR", vm.as_str().unwrap(), &sr]);
        start(client, &vm).unwrap();
        assert_eq!(client.call("VM.get_resident_on", &[vm]), Ok(host("b")));
    }
    // Objects of one are nothing to the other.
    assert_eq!(pools[0].code("VM.get_record", &[pools[1].vm()]), "HANDLE_INVALID");
    let vdi = pools[0].disk();
    pools[0].simulator.change(|state| {
        let pbds: Vec<_> = state.store.all(Class::Pbd).map(|(pbd, _)| pbd.clone()).collect();
        pbds.iter().for_each(|pbd| state.store.set(Class::Pbd, pbd, "currently_attached", false).unwrap());
    });
    pools[0].call("VM.hard_shutdown", &[pools[0].vm()]).unwrap();
    assert_eq!(start(&pools[0], &pools[0].vm()).unwrap_err(), ["NO_HOSTS_AVAILABLE"]);
    assert_eq!(pools[0].code("VDI.clone", &[vdi]), "SR_HAS_NO_PBDS");
}
