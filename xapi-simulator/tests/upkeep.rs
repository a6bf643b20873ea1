//! What happens in a pool by itself or all over it: time, TLS, NBD, files, and many clients at once.

#![allow(clippy::cloned_ref_to_slice_refs, reason = "lists of arguments look alike, however long they are")]

mod client;

use client::{Client, PATIENCE, pool, until};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;
use xapi_simulator::log::Activity;
use xapi_simulator::random::Random;
use xapi_simulator::scene::{Disk, Machine, Repository, Storage};
use xapi_simulator::simulator::Simulator;
use xapi_simulator::{Class, Scene, Upset};

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn tasks_and_sessions_go_when_their_time_has_come() {
    let mut client = pool();
    let create = || client.text("task.create", &[json!("x"), json!("")]);
    let (moving, stuck, ended) = (create(), create(), create());
    client.call("task.set_status", &[json!(ended), json!("success")]).unwrap();
    let alive = |client: &Client, task: &str| client.call("task.get_status", &[json!(task)]).is_ok();
    client.simulator.advance(Duration::from_secs(64 * 60));
    assert!(alive(&client, &ended));
    client.simulator.advance(Duration::from_secs(2 * 60));
    assert!(!alive(&client, &ended));
    client.simulator.advance(22 * HOUR);
    client.call("task.set_progress", &[json!(moving), json!(0.5)]).unwrap();
    client.simulator.collect();
    client.call("task.set_progress", &[json!(moving), json!(0.500_000_001)]).unwrap();
    client.simulator.advance(HOUR);
    assert!(alive(&client, &moving));
    assert!(!alive(&client, &stuck));
    // Its task keeps the session; without it, it ends a day after its last use.
    client.simulator.advance(30 * HOUR);
    client.simulator.collect();
    assert_eq!(client.code("pool.get_all", &[]), "SESSION_INVALID");
    client.login();
    client.simulator.advance(23 * HOUR);
    client.call("pool.get_all", &[]).unwrap();
    client.simulator.advance(23 * HOUR);
    client.call("pool.get_all", &[]).unwrap();
}

#[test]
fn a_pending_task_that_is_destroyed_goes_when_it_ends() {
    let client = pool();
    let task = client.text("task.create", &[json!("x"), json!("")]);
    client.call("task.destroy", &[json!(task)]).unwrap();
    assert_eq!(client.text("task.get_status", &[json!(task)]), "pending");
    client.call("task.set_status", &[json!(task), json!("success")]).unwrap();
    assert_eq!(client.code("task.get_status", &[json!(task)]), "HANDLE_INVALID");
}

#[test]
fn sessions_of_one_originator_are_limited() {
    let client = pool();
    let sessions: Vec<String> = (0..502).map(|_| client.login_as("many").unwrap()).collect();
    client.simulator.collect();
    assert_eq!(client.simulator.objects()["session"], 501, "500 of them, and the test's own");
    client.call("pool.get_all", &[]).unwrap();
    let last = json!([sessions[501]]);
    client::call_raw(client.http(), "pool.get_all", &last).unwrap();
}

/// Speaks TLS to the pool as somebody who trusts one certificate.
fn hello(
    simulator: &Simulator,
    pem: &str,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
    let config =
        ClientConfig::builder_with_protocol_versions(versions).with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from(simulator.address().ip().to_string()).unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(simulator.address())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut stream = StreamOwned::new(connection, socket);
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let suite = stream.conn.negotiated_cipher_suite().unwrap().suite();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    Ok(format!("{suite:?}"))
}

#[test]
fn tls_is_1_2_with_the_hosts_own_rsa_certificate() {
    let simulator = Simulator::start(Scene::new(1).host("a").host("b")).unwrap();
    let both = [&rustls::version::TLS13, &rustls::version::TLS12];
    let suite = hello(&simulator, simulator.certificate_of(0), &both).unwrap();
    assert_eq!(suite, "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384");
    assert!(hello(&simulator, simulator.certificate_of(0), &both[..1]).is_err());
    assert!(hello(&simulator, simulator.certificate_of(1), &both).is_err());
    assert_ne!(simulator.fingerprint_of(0), simulator.fingerprint_of(1));
}

/// Opens a disk over NBD in the clear and returns what comes after the greeting.
fn open_nbd(client: &Client, name: &str) -> (TcpStream, Vec<u8>) {
    let mut stream = TcpStream::connect(client.simulator.nbd_address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = [0; 18];
    if stream.read_exact(&mut greeting).is_err() {
        return (stream, Vec::new());
    }
    stream.write_all(&1_u32.to_be_bytes()).unwrap();
    stream.write_all(b"IHAVEOPT").unwrap();
    stream.write_all(&1_u32.to_be_bytes()).unwrap();
    stream.write_all(&u32::try_from(name.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(name.as_bytes()).unwrap();
    let mut answer = vec![0; 134];
    match stream.read_exact(&mut answer) {
        Ok(()) => (stream, answer),
        Err(_) => (stream, Vec::new()),
    }
}

fn read_nbd(stream: &mut TcpStream, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let mut request = [&0x2560_9513_u32.to_be_bytes()[..], &[0; 4], &[7; 8]].concat();
    request.extend_from_slice(&offset.to_be_bytes());
    request.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
    stream.write_all(&request)?;
    let mut answer = vec![0; 16 + length];
    stream.read_exact(&mut answer)?;
    Ok(answer.split_off(16))
}

#[test]
fn a_disk_is_read_over_nbd_by_who_is_logged_in_and_attached_meanwhile() {
    let client = Client::start(
        Scene::new(1)
            .network("storage", &["insecure_nbd"])
            .settings(|settings| settings.detach_delay = Duration::ZERO)
            .vm(Machine::new("vm").disk(Disk::new("disk", 8 << 20).filled(100))),
    );
    let disk = client.disk();
    let info = client.call("VDI.get_nbd_info", &[disk.clone()]).unwrap();
    let [info] = &info.as_array().unwrap()[..] else { panic!("{info}") };
    assert_eq!(info["port"], client.simulator.nbd_address().port());
    assert_eq!(info["address"], client.simulator.address().ip().to_string());
    assert_eq!(info["cert"], client.simulator.certificate_of(0));
    let name = info["exportname"].as_str().unwrap();
    let (mut stream, answer) = open_nbd(&client, name);
    assert_eq!(answer[..8], (8_u64 << 20).to_be_bytes());
    let expected = {
        let mut bytes = vec![0; 1 << 20];
        let vdi = xapi_simulator::value::Reference::from(disk.as_str().unwrap());
        client.simulator.content(&vdi).unwrap().read(2 << 20, &mut bytes).unwrap();
        bytes
    };
    assert_eq!(read_nbd(&mut stream, 2 << 20, 1 << 20).unwrap(), expected);
    assert_eq!(client.code("VDI.destroy", &[disk.clone()]), "VDI_IN_USE");
    client.simulator.fault("nbd of vm after 1MiB cut".parse().unwrap());
    assert!(read_nbd(&mut stream, 0, 4096).is_err());
    until("it is detached", || (client.simulator.log().now(Activity::Nbd(0)) == 0).then_some(()));
    client.detached(&disk);
    let uuid = client.text("VDI.get_uuid", &[disk.clone()]).parse().unwrap();
    assert_eq!(client.simulator.log().bytes(uuid), 1 << 20);

    let open: Vec<_> = (0..16).map(|_| open_nbd(&client, name)).collect();
    assert!(open.iter().all(|(_, answer)| answer.len() == 134));
    assert_eq!(open_nbd(&client, name).1, b"");
    assert_eq!(client.simulator.log().most(Activity::Nbd(0)), 16);
    drop(open);
    until("all are gone", || (client.simulator.log().now(Activity::Nbd(0)) == 0).then_some(()));
    client.simulator.happen(&Upset::LoseSessions);
    assert_eq!(open_nbd(&client, name).1, b"");
}

#[test]
fn an_sr_with_a_folder_has_a_file_for_each_layer() {
    let folder = std::env::temp_dir().join(format!("xapi-simulator-{}", xapi_simulator::random::fresh_uuid()));
    std::fs::create_dir(&folder).unwrap();
    let client = Client::start(
        Scene::new(1)
            .sr(Repository::new("files", Storage::Nfs).folder(&folder))
            .vm(Machine::new("vm").disk(Disk::new("disk", 4 << 20).filled(100))),
    );
    let (vm, disk) = (client.vm(), client.disk());
    let files = || {
        let names = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    let known = || {
        let records = client.call("VDI.get_all_records", &[]).unwrap();
        let vdis = records.as_object().unwrap().values().filter(|vdi| vdi["type"] != "cbt_metadata");
        let mut names: Vec<String> = vdis.map(|vdi| format!("{}.vhd", vdi["uuid"].as_str().unwrap())).collect();
        names.sort();
        names
    };
    assert_eq!((files(), files().len()), (known(), 1));
    client.call("VDI.enable_cbt", &[disk.clone()]).unwrap();
    let taken = json!(client.text("VM.snapshot", &[vm, json!("x")]));
    assert_eq!((files(), files().len()), (known(), 3));
    let copy = client.disk_of(&taken);
    client.call("VM.destroy", &[taken]).unwrap();
    client.call("VDI.data_destroy", &[copy]).unwrap();
    assert_eq!((files(), files().len()), (known(), 2));
    client.write(&disk, 0, &[1; 512]);
    client.simulator.happen(&Upset::Coalesce);
    assert_eq!((files(), files().len()), (known(), 1));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn snapshots_can_be_dropped_by_somebody_else() {
    let client = pool();
    client.text("VM.snapshot", &[client.vm(), json!("x")]);
    client.simulator.happen(&Upset::DropSnapshots);
    client.simulator.happen(&Upset::Coalesce);
    assert_eq!((client.simulator.objects()["VM"], client.simulator.objects()["VDI"]), (2, 1));
}

#[test]
fn the_same_seed_makes_the_same_disks() {
    let digests = |seed: u64| {
        let scene = Scene::new(seed).vm(Machine::new("vm").disk(Disk::new("a", 8 << 20)).disk(Disk::new("b", 8 << 20)));
        let simulator = Simulator::start(scene).unwrap();
        let vm = simulator.only(Class::Vm, "vm");
        simulator.guest_writes(&vm, seed, 20).unwrap();
        let disks = simulator.disks_of(&vm).unwrap();
        disks.iter().map(|vdi| simulator.content(vdi).unwrap().digest()).collect::<Vec<_>>()
    };
    assert_eq!(digests(1), digests(1));
    assert_ne!(digests(1), digests(2));
}

#[test]
fn a_pool_ends_at_once_while_clients_wait_and_transfers_stall() {
    let client = pool();
    client.simulator.fault("export after 1MiB stall".parse().unwrap());
    let task = client.text("task.create", &[json!("x"), json!("")]);
    let mut export = client::connect(client.http());
    write!(export, "{}\r\n\r\n", client.get("/export_raw_vdi/", &client.disk(), &task, "format=vhd")).unwrap();
    let mut events = client::connect(client.http());
    let body =
        json!({"jsonrpc": "2.0", "method": "event.from", "params": [client.session, ["task/x"], "", 3600.0], "id": 1})
            .to_string();
    write!(events, "POST /jsonrpc HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let _idle = client::connect(client.http());
    until("both wait", || {
        let log = client.simulator.log();
        (log.count("event.from") == 1 && log.now(Activity::Export) == 1).then_some(())
    });
    let address = client.http();
    // Returns when all threads have ended.
    drop(client);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn many_clients_and_faults_leave_a_pool_that_works() {
    let seed = std::env::var("XOFS_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("XOFS_SEED={seed}");
    let scene = Scene::new(seed).host("a").host("b").sr(Repository::new("sr", Storage::Nfs));
    let client = Client::start(scene.vm(Machine::new("vm").disk(Disk::new("disk", 8 << 20).filled(50))));
    let simulator = &client.simulator;
    let vm = client.vm();
    std::thread::scope(|scope| {
        for worker in 0..4_u64 {
            let (client, vm) = (&client, &vm);
            scope.spawn(move || {
                for round in 0..15 {
                    work(client, vm, &mut Random::new(seed ^ (worker << 32) ^ round));
                }
            });
        }
        let mut random = Random::new(seed);
        for _ in 0..30 {
            std::thread::sleep(Duration::from_millis(random.below(20)));
            match random.below(6) {
                0 => simulator.happen(&Upset::LoseSessions),
                1 => simulator.happen(&Upset::RestartToolstack),
                2 => simulator.happen(&Upset::Coalesce),
                3 => simulator.happen(&Upset::LoseTasks),
                4 => simulator.fault("export after 1MiB cut".parse().unwrap()),
                _ => simulator.happen(&Upset::DropSnapshots),
            }
            let vm = simulator.only(Class::Vm, "vm");
            simulator.guest_writes(&vm, random.number(), 5).unwrap();
        }
    });
    simulator.clear_faults();
    let digest = client.digest(&client.disk());
    // Disks that were attached then are free now.
    until("only the machine's disk is left", || {
        simulator.happen(&Upset::DropSnapshots);
        simulator.happen(&Upset::Coalesce);
        let objects = simulator.objects();
        (objects["VDI"] == 1 && objects["VBD"] == 1).then_some(())
    });
    assert_eq!(client.digest(&client.disk()), digest);
    assert_eq!(simulator.log().now(Activity::Export), 0);
}

/// A backup by somebody who gives up at the first error.
fn work(client: &Client, vm: &Value, random: &mut Random) -> Option<()> {
    let http = client.http();
    let login = post(client, "session.login_with_password", &json!(["root", "simulated", "1.1", "worker"]))?;
    let call = |method: &str, arguments: &[Value]| {
        let params: Vec<Value> = std::iter::once(login.clone()).chain(arguments.iter().cloned()).collect();
        post(client, method, &json!(params))
    };
    let taken = call("VM.snapshot", &[vm.clone(), json!("x")])?;
    let vbds = call("VM.get_VBDs", &[taken.clone()])?;
    let vdi = call("VBD.get_VDI", &[vbds[0].clone()])?;
    let session = login.as_str()?;
    let target = format!("/export_raw_vdi/?session_id={session}&vdi={}&format=vhd", vdi.as_str()?);
    client::send(http, format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes());
    if random.below(2) == 0 {
        call("VM.destroy", &[taken])?;
        call("VDI.destroy", &[vdi])?;
    }
    call("session.logout", &[])?;
    Some(())
}

/// Calls when connections may end at any time.
fn post(client: &Client, method: &str, params: &Value) -> Option<Value> {
    let body = json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).to_string();
    let mut stream = TcpStream::connect(client.http()).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(stream, "POST /jsonrpc HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let start = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let answer: Value = serde_json::from_slice(&answer[start + 4..]).ok()?;
    answer.get("result").cloned()
}
