//! What is ingested other than raw images: backups of another repository, and images that qemu-nbd serves.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use disk::Disk;
use serde_json::{Value, json};
use support::{fixture, scratch, succeed, xofs};
use tempfile::TempDir;
use xofs::repository::{Backup, Mode, OpenOptions, Repository, Vm};

const KEY: &str = "0123456789abcdef0123456789abcdef";

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("sources-").tempdir_in(scratch()).expect("a folder")
}

/// Runs `xofs` without a terminal and returns its exit code, standard output and standard error.
fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().expect("the built binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("not ended by a signal"), text(stdout), text(stderr))
}

fn init(folder: &Path, name: &str, arguments: &[&str]) -> PathBuf {
    let place = folder.join(name);
    succeed(xofs().args(["repository", "init"]).arg(&place).args(arguments).env("XOFS_PASSWORD", KEY));
    place
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
            let (code, _, err) = run(&mut command);
            assert!(code == 1 && err.contains("is there already"), "{name}: {code} {err}");
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
    let full = source.all_backups().unwrap().into_iter().find_map(|(vm, backups)| {
        let backups = backups.ok()?;
        let full = backups.iter().find(|backup| backup.mode == Mode::Full)?;
        Some(format!("{}/{}", vm.id, full.time))
    });
    let disk = format!("{}/{}/{}", vm.id, newest.time, newest.disks[0].name);
    let to_itself = main.to_str().unwrap();
    for (arguments, code, part) in [
        (&["--backup", full.as_deref().unwrap()][..], 2, "only incremental ones are mirrored"),
        (&["--backup", &disk], 2, "a backup is mirrored as a whole"),
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
