//! What is ingested other than raw images: backups of another repository, and images that qemu-nbd serves.

mod support;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use disk::Disk;
use serde_json::{Value, json};
use support::{KEY, fixture, init, run, scratch, succeed, xofs};
use tempfile::TempDir;
use xofs::repository::{Backup, Mode, OpenOptions, Repository, Vm};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
const MIB: u64 = 1 << 20;

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("sources-").tempdir_in(scratch()).expect("a folder")
}

fn open(place: &Path, is_encrypted: bool) -> Arc<Repository> {
    let key = is_encrypted.then(|| storage::EncryptionKey::from_text(KEY).unwrap());
    Repository::open(place, OpenOptions { key, cache_bytes: 32 << 20 }).unwrap()
}

fn vm_of(repository: &Repository, name: &str) -> (Vm, Arc<Vec<Arc<Backup>>>) {
    let vm = repository.vms().unwrap().iter().find(|vm| vm.name == name).cloned().unwrap();
    let backups = repository.backups(&vm.id).unwrap();
    (vm, backups)
}

fn bytes(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_mirrored_backup_is_the_same_but_for_where_and_how_it_lies() {
    let (main, folder) = (fixture("main").join("repo"), folder());
    let source = open(&main, false);
    let (vm, backups) = vm_of(&source, "web01");
    let backups: Vec<_> = backups.iter().filter(|it| it.mode == Mode::Incremental && it.problem.is_none()).collect();
    assert!(backups.len() > 1);
    for (name, arguments, format, is_encrypted) in [
        ("files", &[][..], "vhd", false),
        ("exploded", &[], "exploded", false),
        ("encrypted", &["--encrypted"], "exploded", true),
    ] {
        let place = init(folder.path(), name, arguments);
        for (number, backup) in backups.iter().enumerate() {
            let what = if number + 1 == backups.len() { vm.name.clone() } else { format!("{}/{}", vm.id, backup.time) };
            let mut command = xofs();
            command.arg("ingest").arg(&place).arg("--from").arg(&main).args(["--backup", &what, "--json"]);
            command.args(["--format", format]).env("XOFS_PASSWORD", KEY);
            let told: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
            let disks = told["repositories"][0]["disks"].as_array().unwrap();
            assert!(disks.iter().all(|disk| disk["isKey"] == (number == 0)), "{name}: {told}");
            // What is there is not mirrored again.
            let (code, out, err) = run(&mut command);
            assert!(code == 0 && err.contains("is there already"), "{name}: {code} {err}");
            let again: Value = serde_json::from_str(&out).unwrap();
            assert_eq!((&again["time"], &again["repositories"][0]["isPresent"]), (&told["time"], &json!(true)));
        }
        let mirrored = open(&place, is_encrypted);
        let (_, copies) = vm_of(&mirrored, "web01");
        assert_eq!(copies.len(), backups.len());
        for (backup, copy) in backups.iter().zip(copies.iter()) {
            assert_eq!((copy.time, copy.timestamp, &copy.vm), (backup.time, backup.timestamp, &backup.vm));
            assert_eq!(copy.disks.len(), backup.disks.len());
            for (disk, twin) in backup.disks.iter().zip(&copy.disks) {
                assert_eq!((&twin.name, twin.vdi, &twin.label), (&disk.name, disk.vdi, &disk.label));
                let (old, new) = (source.open_disk(backup, disk).unwrap(), mirrored.open_disk(copy, twin).unwrap());
                assert!(bytes(&*old) == bytes(&*new), "{name}: {} {}", backup.time, disk.name);
            }
            let document = |repository: &Repository, backup: &Backup| -> Value {
                serde_json::from_slice(&repository.backup_metadata(backup).unwrap()).unwrap()
            };
            let (old, mut new) = (document(&source, backup), document(&mirrored, copy));
            for (key, vdi) in new["vdis"].as_object_mut().unwrap() {
                let base = vdi["other_config"].as_object_mut().unwrap().remove("xo:base_delta_vdi");
                assert_eq!(base.is_some(), copy.time != copies[0].time, "{name}");
                if let Some(base) = old["vdis"][key]["other_config"].get("xo:base_delta_vdi") {
                    vdi["other_config"]["xo:base_delta_vdi"] = base.clone();
                }
            }
            for field in ["isVhdDifferencing", "jobId", "scheduleId", "vhds", "size"] {
                new[field] = old[field].clone();
            }
            assert_eq!(new, old, "{name}");
        }
        succeed(xofs().arg("check").arg(&place).arg("--data").env("XOFS_PASSWORD", KEY));
    }
}

#[test]
fn what_cannot_be_mirrored_is_refused_with_the_reason() {
    let (main, folder) = (fixture("main").join("repo"), folder());
    let place = init(folder.path(), "place", &[]);
    let source = open(&main, false);
    let (vm, backups) = vm_of(&source, "web01");
    let newest = backups.last().unwrap();
    let disk = format!("{}/{}/{}", vm.id, newest.time, newest.disks[0].name);
    let to_itself = main.to_str().unwrap();
    for (arguments, code, part) in [
        (&["--backup", &disk][..], 2, "a backup is mirrored as a whole"),
        (&["--backup", "nothing"], 1, "no VM has the name or uuid 'nothing'"),
        (&["--backup", "web01", "--to", to_itself], 2, "is named twice"),
        (&["--backup", "web01", "--vm", "web01"], 2, "cannot be used with"),
        (&[], 2, "--backup"),
    ] {
        let (found, _, err) = run(xofs().arg("ingest").arg(&place).arg("--from").arg(&main).args(arguments));
        assert!(found == code && err.contains(part), "{arguments:?}: {found} {err}");
    }
    // A newer one first: what is older cannot be put below it, but under another job.
    let mirror = |what: &str, arguments: &[&str]| {
        let mut command = xofs();
        command.arg("ingest").arg(&place).arg("--from").arg(&main).args(["--backup", what]).args(arguments);
        run(&mut command)
    };
    assert_eq!(mirror("web01/latest", &[]).0, 0);
    let (code, _, err) = mirror("web01/latest~1", &[]);
    assert!(code == 1 && err.contains("mirror the oldest first"), "{code} {err}");
    assert_eq!(mirror("web01/latest~1", &["--job", "another"]).0, 0);
    assert_eq!(fs::read_dir(place.join(format!("xo-vm-backups/{}/vdis", vm.id))).unwrap().count(), 2);
    assert_eq!(json!(open(&place, false).vms().unwrap().len()), json!(1));
}

/// Has QEMU do things to an image, as `write -P 7 4M 64k` does.
fn qemu_io(format: &str, image: &Path, acts: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format]);
    succeed(command.args(acts.iter().flat_map(|act| ["-c", act])).arg(image));
}

/// What QEMU reads of an image.
fn raw_of(format: &str, image: &Path) -> Vec<u8> {
    let raw = image.with_extension("read");
    succeed(Command::new("qemu-img").args(["convert", "-f", format, "-O", "raw"]).arg(image).arg(&raw));
    fs::read(&raw).unwrap()
}

fn ingest(place: &Path, image: &str) -> Command {
    let mut command = xofs();
    command.arg("ingest").arg(place).args(["--vm", VM, "--name", "web01", "--json", "--compression", "none"]);
    command.arg("--disk").arg(format!("xvda={image}"));
    command
}

fn told(command: &mut Command) -> Value {
    serde_json::from_str(&succeed(command)).unwrap()
}

/// How many bytes of its source an ingest read.
fn bytes_read(told: &Value) -> u64 {
    let stages = told["transfer"]["stages"].as_array().unwrap();
    stages.iter().filter(|stage| stage["stage"] == "read").map(|stage| stage["bytes"].as_u64().unwrap()).sum()
}

/// What the newest backup reads as.
fn newest(place: &Path) -> Vec<u8> {
    let repository = open(place, false);
    let (_, backups) = vm_of(&repository, "web01");
    let backup = backups.last().unwrap();
    bytes(&*repository.open_disk(backup, &backup.disks[0]).unwrap())
}

fn backups(place: &Path) -> usize {
    let repository = open(place, false);
    repository.vms().unwrap().first().map_or(0, |vm| repository.backups(&vm.id).unwrap().len())
}

/// The processes that have `part` in their arguments.
fn processes(part: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let arguments = all.map(|process| fs::read_to_string(process.join("cmdline")).unwrap_or_default());
    arguments.filter(|arguments| arguments.contains(part)).map(|it| it.replace('\0', " ")).collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..600 {
        if is_so() {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("{what}, not within 30 seconds");
}

#[test]
fn images_of_qemu_are_stored_as_what_qemu_reads() {
    let folder = folder();
    // Of VHDX, QEMU does not tell what reads as zeroes.
    for (format, has_holes) in
        [("qcow2", true), ("vmdk", true), ("vhdx", false), ("vdi", true), ("qed", true), ("parallels", true)]
    {
        let (place, image) = (init(folder.path(), format, &[]), folder.path().join(format!("a, \"b\":c=d.{format}")));
        succeed(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg("40M"));
        qemu_io(format, &image, &["write -P 7 0 1M", "write -P 8 9M 3M", "write -P 9 40959k 1k"]);
        let first = told(&mut ingest(&place, image.to_str().unwrap()));
        let disk = &first["repositories"][0]["disks"][0];
        assert_eq!((&disk["blocks"], &disk["virtualSize"]), (&json!(4), &json!(40 * MIB)), "{format}: {first}");
        let read = if has_holes { 8 * MIB } else { 40 * MIB };
        assert_eq!(bytes_read(&first), read, "{format}");
        assert!(newest(&place) == raw_of(format, &image), "{format}");
        qemu_io(format, &image, &["write -P 1 10M 1k", "write -P 2 30M 1k", "write -z 0 1M"]);
        let second = told(&mut ingest(&place, image.to_str().unwrap()));
        let disk = &second["repositories"][0]["disks"][0];
        assert_eq!((&disk["isKey"], &disk["blocks"]), (&json!(false), &json!(3)), "{format}: {second}");
        assert!(newest(&place) == raw_of(format, &image), "{format}");
        succeed(xofs().arg("check").arg(&place).arg("--data"));
        assert_eq!(processes(folder.path().to_str().unwrap()), Vec::<String>::new());
    }
}

#[test]
fn an_image_that_names_other_files_is_refused_unless_that_is_allowed() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let create = |arguments: &[&str]| drop(succeed(Command::new("qemu-img").args(["create", "-q"]).args(arguments)));
    create(&["-f", "qcow2", &path("base.qcow2"), "4M"]);
    qemu_io("qcow2", Path::new(&path("base.qcow2")), &["write -P 5 1M 64k"]);
    create(&["-f", "qcow2", "-F", "qcow2", "-b", &path("base.qcow2"), &path("overlay.qcow2")]);
    create(&["-f", "qcow2", "-o", &format!("data_file={}", path("data.raw")), &path("split.qcow2"), "4M"]);
    create(&["-f", "vmdk", "-o", "subformat=monolithicFlat", &path("flat.vmdk"), "4M"]);
    for (image, format, named) in [
        ("overlay.qcow2", "qcow2", "names the backing file"),
        ("split.qcow2", "qcow2", "names the data file"),
        ("flat.vmdk", "vmdk", "names the part"),
    ] {
        let place = init(folder.path(), &format!("{image}.repository"), &[]);
        qemu_io(format, Path::new(&path(image)), &["write -P 6 3M 64k"]);
        let (code, _, err) = run(&mut ingest(&place, &path(image)));
        assert!(code == 1 && err.contains(named) && err.contains("--allow-backing"), "{image}: {code} {err}");
        assert_eq!(backups(&place), 0, "{image}");
        succeed(ingest(&place, &path(image)).arg("--allow-backing"));
        assert!(newest(&place) == raw_of(format, Path::new(&path(image))), "{image}");
    }
    // What is no image of QEMU but begins like one, and what is encrypted.
    let place = init(folder.path(), "place", &[]);
    fs::write(path("broken.qcow2"), [&b"QFI\xfb"[..], &[0; 600]].concat()).unwrap();
    let (code, _, err) = run(&mut ingest(&place, &path("broken.qcow2")));
    assert!(code == 1 && err.contains("broken.qcow2"), "{code} {err}");
    // Somebody writes to it.
    let socket = path("writable");
    let mut writer = Served(
        Command::new("qemu-nbd").args(["-f", "qcow2", "-t", "-k", &socket, &path("base.qcow2")]).spawn().unwrap(),
    );
    wait_until("the server answers", || Path::new(&socket).exists());
    let (code, _, err) = run(&mut ingest(&place, &path("base.qcow2")));
    assert!(code == 1 && err.contains("Is another process using the image"), "{code} {err}");
    writer.0.kill().unwrap();
    let (code, _, err) = run(ingest(&place, &path("base.qcow2")).env("PATH", "/nowhere"));
    assert!(code == 1 && err.contains("install the package qemu-utils"), "{code} {err}");
}

#[test]
fn a_dirty_bitmap_limits_what_is_compared_and_is_not_believed_where_it_cannot_be_right() {
    let folder = folder();
    let (place, image) = (init(folder.path(), "place", &[]), folder.path().join("disk.qcow2"));
    let shown = image.to_str().unwrap();
    succeed(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M"));
    qemu_io("qcow2", &image, &["write -P 7 0 32M"]);
    succeed(ingest(&place, shown).args(["--time", "2026-08-01T02:00:00Z"]));
    let add = |name: &str| drop(succeed(Command::new("qemu-img").args(["bitmap", "--add"]).arg(&image).arg(name)));
    add("b0");
    qemu_io("qcow2", &image, &["write -P 8 4M 64k", "write -P 7 10M 64k"]);
    let bitmap = ["--bitmap", "b0", "--bitmap-since", "2026-08-01T020000Z"];
    let limited = told(ingest(&place, shown).args(bitmap).args(["--time", "2026-08-02T02:00:00Z"]));
    // Two blocks are dirty, one of them has other bytes.
    let compared = |told: &Value| {
        let disk = &told["repositories"][0]["disks"][0];
        disk["comparedByDigest"].as_u64().unwrap() + disk["comparedByBytes"].as_u64().unwrap()
    };
    assert_eq!(compared(&limited), 2, "{limited}");
    assert_eq!(limited["repositories"][0]["disks"][0]["blocks"], json!(1), "{limited}");
    assert!(newest(&place) == raw_of("qcow2", &image));
    // Of another backup than the newest: all is compared.
    qemu_io("qcow2", &image, &["write -P 9 6M 64k"]);
    let (code, out, err) = run(ingest(&place, shown).args(bitmap).args(["--time", "2026-08-03T02:00:00Z"]));
    assert!(
        code == 0 && err.contains("is compared as a whole: the newest backup is of 2026-08-02T020000Z"),
        "{code} {err}"
    );
    let whole: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(compared(&whole), 16, "{whole}");
    assert!(newest(&place) == raw_of("qcow2", &image));
    // Begun too late: what it calls clean is not.
    qemu_io("qcow2", &image, &["write -P 1 0 32M"]);
    add("late");
    let since = ["--bitmap-since", "2026-08-03T020000Z"];
    let (code, _, err) = run(ingest(&place, shown).args(["--bitmap", "late"]).args(since));
    assert!(code == 2 && err.contains("where the bitmap says that it did not"), "{code} {err}");
    assert_eq!(backups(&place), 3);
    succeed(Command::new("qemu-img").args(["bitmap", "--disable"]).arg(&image).arg("b0"));
    for (name, image, code, part) in [
        ("none", shown, 1, "no dirty bitmap 'none'; there are 'b0', 'late'"),
        ("b0", shown, 1, "may lack changes"),
        ("b0", "-", 2, "standard input has no dirty bitmaps"),
        ("b0", "/dev/null", 2, "has no dirty bitmaps"),
    ] {
        let (found, _, err) = run(ingest(&place, image).args(["--bitmap", name]).args(since));
        assert!(found == code && err.contains(part), "{name} {image}: {found} {err}");
    }
    let (code, _, err) = run(ingest(&place, shown).args(["--bitmap", "b0"]));
    assert!(code == 2 && err.contains("--bitmap-since"), "{code} {err}");
}

/// A `qemu-nbd` of our own, ended with the test.
struct Served(Child);

impl Served {
    fn start(arguments: &[&str]) -> Self {
        Self(
            Command::new("qemu-nbd")
                .args(["--persistent", "--read-only", "--shared=8"])
                .args(arguments)
                .spawn()
                .unwrap(),
        )
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn exports_of_a_socket_and_of_a_port_are_read() {
    let folder = folder();
    let image = folder.path().join("disk.qcow2");
    succeed(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("16M"));
    qemu_io("qcow2", &image, &["write -P 7 3M 5M"]);
    let expected = raw_of("qcow2", &image);
    let socket = folder.path().join("nbd socket");
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (shown, port) = (image.to_str().unwrap(), free.to_string());
    let _unix = Served::start(&["-f", "qcow2", "-x", "a disk", "-k", socket.to_str().unwrap(), shown]);
    let _tcp = Served::start(&["-f", "qcow2", "-x", "a disk", "-b", "127.0.0.1", "-p", &port, shown]);
    let of_unix = format!("socket={}", socket.to_str().unwrap().replace(' ', "%20"));
    wait_until("the servers answer", || socket.exists() && std::net::TcpStream::connect(("127.0.0.1", free)).is_ok());
    for (number, address) in
        [format!("nbd+unix:///a%20disk?{of_unix}"), format!("nbd://127.0.0.1:{port}/a%20disk")].iter().enumerate()
    {
        let place = init(folder.path(), &format!("place{number}"), &[]);
        let told = told(&mut ingest(&place, address));
        assert_eq!(told["repositories"][0]["disks"][0]["blocks"], 3, "{told}");
        assert_eq!(bytes_read(&told), 6 * MIB, "{told}");
        assert!(newest(&place) == expected, "{address}");
    }
    let place = init(folder.path(), "place", &[]);
    for (address, code, part) in [
        (format!("nbd+unix:///other?{of_unix}"), 1, "'other' of"),
        (format!("nbd://127.0.0.1:{port}"), 1, "no export of this name"),
        ("nbd+unix:///x?socket=/nowhere".to_owned(), 1, "cannot be reached"),
        ("nbd+unix:///x".to_owned(), 2, "socket=/path was expected"),
        ("nbds://127.0.0.1/x".to_owned(), 2, "TLS"),
    ] {
        let (found, _, err) = run(&mut ingest(&place, &address));
        assert!(found == code && err.contains(part), "{address}: {found} {err}");
    }
    assert_eq!(backups(&place), 0);
}

#[test]
fn an_ingest_of_a_stream_that_says_nothing_stops_when_it_is_told_to() {
    let folder = folder();
    let place = init(folder.path(), "place", &[]);
    let mut command = ingest(&place, "-");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let lineages = place.join(format!("xo-vm-backups/{VM}/vdis"));
    wait_until("it begins to write", || lineages.exists());
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    wait_until("it ends", || child.try_wait().unwrap().is_some());
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(130) && err.contains("stops, and removes what was written"), "{err}");
    let left = succeed(Command::new("find").arg(place.join("xo-vm-backups")).args(["-type", "f"]));
    assert_eq!((backups(&place), left), (0, String::new()));
}

#[test]
fn a_server_that_dies_leaves_no_backup() {
    let folder = folder();
    let (place, image) = (init(folder.path(), "place", &[]), folder.path().join("disk.qcow2"));
    succeed(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M"));
    qemu_io("qcow2", &image, &["write -P 7 0 64M"]);
    let socket = folder.path().join("nbd");
    let slow = format!("driver=throttle,throttle-group=slow,file.driver=qcow2,file.file.filename={}", image.display());
    let group = "throttle-group,id=slow,x-bps-total=16777216";
    let server = Served::start(&["-k", socket.to_str().unwrap(), "--object", group, "--image-opts", &slow]);
    wait_until("the server answers", || socket.exists());
    let address = format!("nbd+unix:///?socket={}", socket.display());
    let mut command = ingest(&place, &address);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let lineages = place.join(format!("xo-vm-backups/{VM}/vdis"));
    wait_until("it begins to write", || lineages.exists());
    drop(server);
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && err.contains("the NBD export '' of"), "{} {err}", output.status);
    assert_eq!(backups(&place), 0);
    let left = succeed(Command::new("find").arg(place.join("xo-vm-backups")).args(["-type", "f"]));
    assert_eq!(left, "");
}

#[test]
fn whenever_an_ingest_is_killed_its_server_ends_and_nothing_is_left_of_it() {
    let folder = folder();
    let (place, image) = (init(folder.path(), "place", &[]), folder.path().join("disk.qcow2"));
    // Longer than the path of a socket may be.
    let temporary = folder.path().join("temporary".repeat(12));
    fs::create_dir(&temporary).unwrap();
    succeed(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("256M"));
    qemu_io("qcow2", &image, &["write -P 7 0 256M"]);
    let shown = image.to_str().unwrap();
    for round in 0..6_u64 {
        let mut command = ingest(&place, shown);
        command.arg("--full").env("TMPDIR", &temporary).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let is_server = |process: &String| process.starts_with("qemu-nbd");
        wait_until("the server runs", || processes(shown).iter().any(is_server));
        thread::sleep(Duration::from_millis(round * 15));
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until("the server ends", || processes(shown).is_empty());
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "round {round}");
        let _ = fs::remove_dir(place.join(format!("xo-vm-backups/{VM}.lock")));
    }
    succeed(ingest(&place, shown).env("TMPDIR", &temporary));
    assert!(newest(&place) == vec![7; 256 << 20]);
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
}
