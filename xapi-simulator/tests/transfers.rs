//! Disks and machines out and in, and what goes wrong on the way.

#![allow(clippy::cloned_ref_to_slice_refs, reason = "lists of arguments look alike, however long they are")]

mod client;

use client::{Client, call_raw, parse, pool, request, until};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::time::Duration;
use xapi_simulator::content::digest_of;
use xapi_simulator::log::Activity;
use xapi_simulator::scene::{Disk, Machine, Repository, Storage};
use xapi_simulator::{Class, Scene, Upset};

/// Where the glued page begins, if there is one.
fn page(body: &[u8]) -> Option<usize> {
    let start = b"HTTP/1.1 500 Internal Error\r\n";
    body.windows(start.len()).position(|window| window == start)
}

#[test]
fn a_disk_goes_out_and_into_another_one() {
    let client = pool();
    let disk = client.disk();
    for format in ["vhd", "raw"] {
        let (answer, task) = client.export(&disk, &format!("format={format}"));
        assert_eq!((answer.status, &task["status"], &task["result"]), (200, &json!("success"), &json!("")));
        assert_eq!(answer.header("content-length"), None);
        let kind = if format == "vhd" { "application/vhd" } else { "application/octet-stream" };
        assert_eq!(answer.header("content-type").as_deref(), Some(kind));
        if format == "raw" {
            assert_eq!(digest_of(&answer.body), client.digest(&disk));
        }
        let copy = client.like(&disk);
        let task = client.import(&copy, format, answer.body.len(), &answer.body);
        assert_eq!(task["status"], "success", "{task}");
        assert_eq!(task["result"], format!("<value>{}</value>", copy.as_str().unwrap()));
        assert_eq!(client.digest(&copy), client.digest(&disk));
    }
}

#[test]
fn only_what_changed_goes_out_where_a_base_is_named() {
    let client = pool();
    let (vm, disk) = (client.vm(), client.disk());
    let take = || client.disk_of(&json!(client.text("VM.snapshot", &[vm.clone(), json!("x")])));
    let first = take();
    client.write(&disk, 5 << 20, &[3; 1024]);
    let second = take();
    let base = client.text("VDI.get_uuid", &[first.clone()]);
    let (whole, _) = client.export(&first, "format=vhd");
    let (delta, task) = client.export(&second, &format!("format=vhd&base={base}"));
    assert_eq!(task["status"], "success");
    // Footer, header, a table of one sector, one block, footer.
    assert_eq!(delta.body.len(), 2048 + 512 + 512 + (2 << 20) + 512);
    let copy = client.like(&disk);
    for stream in [&whole, &delta] {
        assert_eq!(client.import(&copy, "vhd", stream.body.len(), &stream.body)["status"], "success");
        client.detached(&copy);
    }
    assert_eq!(client.digest(&copy), client.digest(&second));
    let uuid = client.text("VDI.get_uuid", &[second]).parse().unwrap();
    assert_eq!(client.simulator.log().blocks(uuid), [(2, 1)].into());
    assert_eq!(client.simulator.log().bytes(uuid), 2 << 20);
}

#[test]
fn what_fails_after_the_head_glues_a_page_into_the_data() {
    let client = pool();
    let disk = client.disk();
    let (whole, _) = client.export(&disk, "format=vhd");
    for (fault, least) in [("export page", 0), ("export after 3MiB page", 2 << 20)] {
        client.simulator.fault(fault.parse().unwrap());
        let (answer, task) = client.export(&disk, "format=vhd");
        assert_eq!(answer.status, 200);
        let start = page(&answer.body).unwrap();
        assert!(start >= least, "{fault}: {start}");
        assert_eq!(answer.body[2048..start], whole.body[2048..start], "{fault}");
        assert_eq!(task["status"], "failure");
        assert_eq!(task["error_info"], json!(["VDI_IO_ERROR", "Device I/O errors"]));
    }
    client.simulator.fault("export after 3MiB cut".parse().unwrap());
    let (answer, task) = client.export(&disk, "format=vhd");
    assert_eq!(page(&answer.body), None);
    assert!(answer.body.len() < whole.body.len());
    assert_eq!(task["status"], "failure");
    // A disk that a machine writes is never attached beside it: nothing but the page comes.
    client.detached(&disk);
    client.call("VM.start", &[client.vm(), json!(false), json!(false)]).unwrap();
    let (answer, task) = client.export(&disk, "format=vhd");
    assert_eq!((answer.status, page(&answer.body)), (200, Some(0)));
    assert_eq!(task["error_info"][0], "VDI_IN_USE");
}

#[test]
fn a_disk_stays_attached_for_a_while_after_its_transfer() {
    let client = pool();
    let disk = client.disk();
    client.simulator.settings(|settings| settings.detach_delay = Duration::from_secs(3600));
    client.export(&disk, "format=raw");
    assert_eq!(client.call("VDI.destroy", &[disk.clone()]).unwrap_err()[0], "VDI_IN_USE");
    let vbds = client.call("VDI.get_VBDs", &[disk.clone()]).unwrap();
    for vbd in vbds.as_array().unwrap() {
        let vm = json!(client.text("VBD.get_VM", &[vbd.clone()]));
        if client.call("VM.get_is_control_domain", &[vm]) == Ok(json!(true)) {
            client.call("VBD.unplug_force", &[vbd.clone()]).unwrap();
            client.call("VBD.destroy", &[vbd.clone()]).unwrap();
        }
    }
    client.call("VDI.destroy", &[disk]).unwrap();
}

#[test]
fn who_is_not_logged_in_gets_nothing_and_the_task_says_so() {
    let client = pool();
    let task = client.text("task.create", &[json!("x"), json!("")]);
    let target = format!("/export_raw_vdi/?vdi={}&task_id={task}", client.disk().as_str().unwrap());
    let answer = request(client.http(), &format!("GET {target} HTTP/1.1"), b"");
    assert_eq!(answer.status, 401);
    assert_eq!(client.ended(&task)["error_info"][0], "SESSION_AUTHENTICATION_FAILED");
    // Or by name and password, in a session of its own.
    let sessions = client.simulator.objects()["session"];
    let target = format!("/export_raw_vdi/?vdi={}", client.disk().as_str().unwrap());
    let basic = "cm9vdDpzaW11bGF0ZWQ=";
    let answer = request(client.http(), &format!("GET {target} HTTP/1.1\r\nauthorization: Basic {basic}"), b"");
    assert_eq!((answer.status, answer.body.len()), (200, 8 << 20));
    assert!(answer.header("task-id").unwrap().starts_with("OpaqueRef:"));
    until("its session ends", || (client.simulator.objects()["session"] == sessions).then_some(()));
}

#[test]
fn what_another_host_sees_is_found_there_by_the_same_query() {
    let client = Client::start(
        Scene::new(1)
            .host("a")
            .host("b")
            .sr(Repository::new("far", Storage::Ext).on(&[1]))
            .vm(Machine::new("vm").disk(Disk::new("disk", 2 << 20))),
    );
    let task = client.text("task.create", &[json!("x"), json!("")]);
    let head = client.get("/export_raw_vdi/", &client.disk(), &task, "format=raw");
    let answer = request(client.http(), &head, b"");
    assert_eq!(answer.status, 302);
    let target = head.split(' ').nth(1).unwrap();
    let expected = format!("https://{}{target}", client.simulator.address_of(1));
    assert_eq!(answer.header("location"), Some(expected));
    assert_eq!(client.text("task.get_status", &[json!(task)]), "pending");
    let there = std::net::SocketAddr::new(client.simulator.address_of(1).ip(), client.http().port());
    assert_eq!(digest_of(&request(there, &head, b"").body), client.digest(&client.disk()));
    assert_eq!(client.ended(&task)["status"], "success");
}

#[test]
fn formats_and_bodies_that_are_not_known_are_refused() {
    let client = pool();
    let (answer, task) = client.export(&client.disk(), "format=vmdk");
    assert_eq!((answer.status, &task["status"]), (404, &json!("failure")));
    for (path, status) in [("/import_raw_vdi/", 404), ("/import/", 403)] {
        let target = format!("{path}?session_id={}&vdi={}", client.session, client.disk().as_str().unwrap());
        let head = format!("PUT {target} HTTP/1.1\r\ntransfer-encoding: chunked");
        assert_eq!(request(client.http(), &head, b"0\r\n\r\n").status, status, "{path}");
    }
}

#[test]
fn an_import_is_told_by_its_task_alone() {
    let client = pool();
    let disk = client.disk();
    let (whole, _) = client.export(&disk, "format=vhd");
    let length = whole.body.len();
    let broken = [whole.body.clone(), vec![0; 512]].concat();
    for (declared, body) in
        [(length + 512, &broken[..]), (length + 512, &whole.body[..]), (length, &whole.body[..length / 2])]
    {
        let copy = client.like(&disk);
        let task = client.import(&copy, "vhd", declared, body);
        assert_eq!(task["status"], "failure");
        assert_eq!(task["error_info"][0], "VDI_IO_ERROR");
    }
}

#[test]
fn an_sr_that_is_full_ends_an_import() {
    let machine = Machine::new("vm").disk(Disk::new("disk", 64 << 20).filled(100));
    let client = Client::start(Scene::new(1).sr(Repository::new("sr", Storage::Nfs).size(100 << 20)).vm(machine));
    let (whole, _) = client.export(&client.disk(), "format=vhd");
    let copy = client.like(&client.disk());
    assert_eq!(client.import(&copy, "vhd", whole.body.len(), &whole.body)["error_info"][0], "VDI_IO_ERROR");
    client.detached(&copy);
    client.call("VDI.destroy", &[copy]).unwrap();
    let copy = client.like(&client.disk());
    client.simulator.fault("import after 4MiB full".parse().unwrap());
    let task = client.import(&copy, "vhd", whole.body.len(), &whole.body);
    assert_eq!(task["error_info"][0], "SR_BACKEND_FAILURE_44");
}

#[test]
fn a_thick_sr_takes_vhds_unless_it_is_so_old_that_it_has_none() {
    let machine = Machine::new("vm").disk(Disk::new("disk", 4 << 20).filled(100));
    let client = Client::start(Scene::new(1).sr(Repository::new("sr", Storage::Lvm).size(9 << 20)).vm(machine));
    let copy = client.like(&client.disk());
    let (stream, _) = client.export(&client.disk(), "format=vhd");
    assert_eq!(client.import(&copy, "vhd", stream.body.len(), &stream.body)["status"], "success");
    client.detached(&copy);
    let sr = client.simulator.only(Class::Sr, "sr");
    client.call("SR.remove_from_sm_config", &[json!(sr.as_str()), json!("use_vhd")]).unwrap();
    for (format, status) in [("vhd", "failure"), ("raw", "success")] {
        let (stream, _) = client.export(&client.disk(), &format!("format={format}"));
        let task = client.import(&copy, format, stream.body.len(), &stream.body);
        assert_eq!(task["status"], status, "{task}");
        client.detached(&copy);
    }
    assert_eq!(client.digest(&copy), client.digest(&client.disk()));
    let record = client.call("VDI.get_record", &[copy]).unwrap();
    let no_room = json!({"SR": record["SR"], "virtual_size": 4 << 20, "type": "user", "sharable": false,
        "read_only": false, "other_config": {}});
    assert_eq!(client.code("VDI.create", &[no_room]), "SR_BACKEND_FAILURE_44");
}

#[test]
fn a_machine_goes_out_and_in_again() {
    let machine = Machine::new("vm").cd().disk(Disk::new("a", 4 << 20).filled(50)).disk(Disk::new("b", 2 << 20));
    let client = Client::start(Scene::new(1).vm(machine));
    for compression in ["", "zstd"] {
        let vm = client.vm();
        let (session, vm) = (&client.session, vm.as_str().unwrap());
        let target = format!("/export/?session_id={session}&ref={vm}&use_compression={compression}");
        let answer = request(client.http(), &format!("GET {target} HTTP/1.1"), b"");
        assert!(answer.head.starts_with("HTTP/1.0 200 OK"), "{}", answer.head);
        let sr = client.simulator.only(Class::Sr, "storage");
        let task = client.text("task.create", &[json!("import"), json!("")]);
        let head = format!("PUT /import/?session_id={session}&task_id={task}&sr_id={sr} HTTP/1.1");
        let head = format!("{head}\r\ncontent-length: {}", answer.body.len());
        request(client.http(), &head, &answer.body);
        let record = client.ended(&task);
        assert_eq!(record["status"], "success", "{record}");
        let result = record["result"].as_str().unwrap();
        let expected = ["<value><array><data><value>", "</value></data></array></value>"];
        let new = json!(result.strip_prefix(expected[0]).unwrap().strip_suffix(expected[1]).unwrap());
        let digests = |vm: &Value| -> Vec<u64> {
            let vm = xapi_simulator::value::Reference::from(vm.as_str().unwrap());
            let disks = client.simulator.disks_of(&vm).unwrap();
            disks.iter().map(|vdi| client.simulator.content(vdi).unwrap().digest()).collect()
        };
        assert_eq!(digests(&new), digests(&json!(vm)));
        let old = client.call("VM.get_record", &[json!(vm)]).unwrap();
        let record = client.call("VM.get_record", &[new.clone()]).unwrap();
        for field in ["name_label", "memory_static_max", "platform", "HVM_boot_params", "other_config"] {
            assert_eq!(record[field], old[field], "{field}");
        }
        assert_eq!(record["current_operations"], json!({}));
        assert_eq!(record["VBDs"].as_array().unwrap().len(), 3);
        client.call("VM.set_name_label", &[new, json!("new")]).unwrap();
    }
    until("it starts", || client.call("VM.start", &[client.vm(), json!(false), json!(false)]).ok());
    let target = format!("/export/?session_id={}&ref={}", client.session, client.vm().as_str().unwrap());
    assert_eq!(request(client.http(), &format!("GET {target} HTTP/1.1"), b"").status, 500);
}

#[test]
fn an_import_of_nothing_is_answered_before_a_body_comes() {
    let client = pool();
    let target = format!("/import_raw_vdi/?session_id={}&vdi={}", client.session, client.disk().as_str().unwrap());
    let mut stream = client::connect(client.http());
    write!(stream, "PUT {target}&format=vhd HTTP/1.1\r\ncontent-length: 1125899906842624\r\n\r\n").unwrap();
    let mut start = [0; 15];
    stream.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 200 OK");
}

#[test]
fn a_stalled_export_ends_when_its_client_goes() {
    let client = pool();
    let disk = client.disk();
    client.simulator.fault("export after 1MiB stall".parse().unwrap());
    let task = client.text("task.create", &[json!("x"), json!("")]);
    let mut stream = client::connect(client.http());
    write!(stream, "{}\r\n\r\n", client.get("/export_raw_vdi/", &disk, &task, "format=vhd")).unwrap();
    until("it is attached", || (client.simulator.log().now(Activity::Export) == 1).then_some(()));
    drop(stream);
    assert_eq!(client.ended(&task)["status"], "failure");
    client.detached(&disk);
}

#[test]
fn exports_are_no_faster_than_is_set() {
    let client = pool();
    client.simulator.settings(|settings| settings.export_rate = Some(|_| 16 << 20));
    let start = std::time::Instant::now();
    client.export(&client.disk(), "format=raw");
    // 7 of 8 MiB pass before the last piece: at 16 MiB a second, nearly half of one.
    assert!(start.elapsed() >= Duration::from_millis(400), "{:?}", start.elapsed());
    assert_eq!(client.simulator.log().most(Activity::Export), 1);
}

#[test]
fn a_restart_of_the_toolstack_ends_transfers_and_forgets_tasks() {
    let mut client = pool();
    let started = client.call("host.get_all_records", &[]).unwrap();
    client.simulator.fault("export after 3MiB restart".parse().unwrap());
    let task = client.text("task.create", &[json!("x"), json!("")]);
    let head = client.get("/export_raw_vdi/", &client.disk(), &task, "format=vhd");
    let answer = client::send(client.http(), format!("{head}\r\n\r\n").as_bytes());
    assert!(parse(&answer).body.len() < 8 << 20);
    assert_eq!(client.code("pool.get_all", &[]), "SESSION_INVALID");
    client.login();
    assert_eq!(client.code("task.get_record", &[json!(task)]), "HANDLE_INVALID");
    let now = client.call("host.get_all_records", &[]).unwrap();
    let time =
        |hosts: &Value| hosts.as_object().unwrap().values().next().unwrap()["other_config"]["agent_start_time"].clone();
    assert_ne!(time(&started), time(&now));
}

#[test]
fn another_master_is_found_through_the_old_one() {
    let mut client = Client::start(Scene::new(1).host("a").host("b"));
    client.simulator.happen(&Upset::ChangeMaster(1));
    let error = client.login_as("test").unwrap_err();
    let there = client.simulator.address_of(1).ip();
    assert_eq!(error, ["HOST_IS_SLAVE".to_owned(), there.to_string()]);
    let there = std::net::SocketAddr::new(there, client.http().port());
    let session = call_raw(there, "session.login_with_password", &json!(["root", "simulated"])).unwrap();
    client.session = session.as_str().unwrap().to_owned();
    let pools = call_raw(there, "pool.get_all", &json!([client.session])).unwrap();
    let master = call_raw(there, "pool.get_master", &json!([client.session, pools[0]])).unwrap();
    assert_eq!(call_raw(there, "host.get_name_label", &json!([client.session, master])).unwrap(), "b");
}

#[test]
fn a_host_that_reboots_is_away_for_a_while() {
    let mut client = pool();
    client.simulator.happen(&Upset::Reboot(0, Duration::from_millis(300)));
    assert_eq!(client::send(client.http(), b"GET / HTTP/1.0\r\n\r\n"), b"");
    until("it is back", || (!client::send(client.http(), b"GET / HTTP/1.0\r\n\r\n").is_empty()).then_some(()));
    assert_eq!(client.code("pool.get_all", &[]), "SESSION_INVALID");
    client.login();
}
