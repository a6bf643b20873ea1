//! `xofs repair`, as people run it: on copies of the fixtures that Xen Orchestra broke.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{copy_of, expected, fixture, run, scratch, write_key, xofs};
use xofs::repository::{OpenOptions, Repository};

/// Bytes read at a time.
const PIECE: usize = 1 << 20;

fn repair(repository: &Path, arguments: &[&str]) -> (i32, String, String) {
    run(xofs().arg("repair").arg(repository).args(arguments))
}

fn json(repository: &Path, arguments: &[&str]) -> Value {
    let (code, out, err) = repair(repository, &[arguments, &["--json"]].concat());
    assert_eq!(code, 0, "{out}{err}");
    serde_json::from_str(&out).expect("--json writes JSON")
}

/// What every disk of every backup reads as, by backup and disk; what cannot be read is left out.
fn contents(repository: &Path) -> BTreeMap<String, String> {
    let repository = Repository::open(repository, OpenOptions { key: None, cache_bytes: 0 }).expect("a repository");
    let mut contents = BTreeMap::new();
    for (_, backups) in repository.all_backups().expect("its VMs are listed") {
        for backup in backups.expect("its backups are listed").iter() {
            for disk in &backup.disks {
                if let Some(digest) = repository.open_disk(backup, disk).ok().and_then(|disk| digest(disk.as_ref())) {
                    contents.insert(format!("{}/{}", backup.id(), disk.name), digest);
                }
            }
        }
    }
    contents
}

fn digest(disk: &dyn disk::Disk) -> Option<String> {
    let (mut digest, mut buffer, mut at) = (String::new(), vec![0; PIECE], 0);
    while at < disk.size() {
        let len = usize::try_from(disk.size() - at).unwrap_or(PIECE).min(PIECE);
        disk.read_at(at, &mut buffer[..len]).ok()?;
        digest = storage::sha256(&[digest.as_bytes(), &buffer[..len]].concat());
        at += len as u64;
    }
    Some(digest)
}

/// Every file below a folder, with what it holds, but listing caches and the trash.
fn tree(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("it can be listed") {
            let path = entry.expect("a listed folder goes on").path();
            let is_left_out = path.ends_with("cache.json.gz") || path.ends_with(".xofs-trash");
            if is_left_out {
                continue;
            }
            let kind = fs::symlink_metadata(&path).expect("it is there").file_type();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                let bytes = fs::read(&path).expect("it can be read");
                files.insert(path, bytes);
            }
        }
    }
    files
}

/// A copy of the fixture `hard` in which no lock is left behind, which would be watched for ten seconds each.
fn hard() -> tempfile::TempDir {
    let copy = copy_of(&fixture("hard").join("repo"));
    for entry in fs::read_dir(copy.path().join("xo-vm-backups")).expect("VMs") {
        let path = entry.expect("a VM").path();
        if path.extension().is_some_and(|extension| extension == "lock") {
            fs::remove_dir(path).expect("a lock is an empty folder");
        }
    }
    copy
}

/// A folder for a plan, and the plan's path.
fn plan_file() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::Builder::new().prefix("plan-").tempdir_in(scratch()).expect("a folder");
    let plan = folder.path().join("plan.json");
    (folder, plan)
}

#[test]
fn what_xen_orchestra_broke_is_repaired_without_changing_what_any_backup_reads_as() {
    let copy = hard();
    let (repository, (_folder, plan)) = (copy.path(), plan_file());
    let before = (contents(repository), tree(repository));
    let (code, out, err) = repair(repository, &["--include", "broken-backups", "-o", plan.to_str().unwrap()]);
    assert!(code == 0 && out.ends_with(&format!("--apply {}\n", plan.display())), "{code}: {out}{err}");
    assert!(tree(repository) == before.1, "a plan changes nothing");
    let planned: Value = serde_json::from_slice(&fs::read(&plan).unwrap()).unwrap();
    let actions = planned["vms"].as_array().unwrap().iter().flat_map(|vm| vm["actions"].as_array().unwrap());
    let mut kinds = BTreeMap::new();
    for action in actions {
        *kinds.entry(action["kind"].as_str().unwrap()).or_insert(0) += 1;
    }
    let expected = [
        ("broken-backup", 18),
        ("dangling-data", 1),
        ("dead-alias", 1),
        ("leftover", 2),
        ("orphan-disk", 3),
        ("orphan-xva", 2),
        ("stale-cache", 2),
        ("unfinished-merge", 5),
    ];
    assert_eq!(kinds, BTreeMap::from(expected));
    let file = plan.to_str().unwrap();
    let (code, out, err) = repair(repository, &["--apply", file]);
    assert!(code == 0 && out.ends_with(" moved, 5 merges finished\n"), "{code}: {out}{err}");
    assert!(contents(repository) == before.0);
    // Data that damaged aliases may have led to is nobody's now; then nothing is left to do.
    let left = |plan: &Value| -> Vec<String> {
        let actions = plan["vms"].as_array().unwrap().iter().flat_map(|vm| vm["actions"].as_array().unwrap());
        actions.map(|action| action["kind"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(left(&json(repository, &["--output", file])), ["dangling-data"; 5]);
    let (code, out, err) = repair(repository, &["--apply", file]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(contents(repository) == before.0);
    assert_eq!(left(&json(repository, &["--include", "broken-backups"])), [""; 0]);
}

#[test]
fn what_was_moved_is_listed_put_back_and_purged() {
    let copy = hard();
    let (repository, (_folder, plan)) = (copy.path(), plan_file());
    let before = tree(repository);
    let file = plan.to_str().unwrap();
    for vm in ["orphan01", "orphan02", "broken01", "cache01"] {
        let (code, out, err) = repair(repository, &[vm, "--include", "broken-backups", "--output", file]);
        assert_eq!(code, 0, "{out}{err}");
        let applied = json(repository, &["--apply", file]);
        let set = applied["vms"][0]["set"].as_str().unwrap().to_owned();
        let (code, out, err) = repair(repository, &["--list"]);
        assert!(code == 0 && out.contains(&set) && out.contains("1 set in the trash"), "{out}{err}");
        let sets = json(repository, &["--list"]);
        assert_eq!((&sets["sets"][0]["state"], sets["sets"].as_array().unwrap().len()), (&Value::from("moved"), 1));
        let (code, out, err) = repair(repository, &["--undo", &set]);
        assert_eq!(code, 0, "{vm}: {out}{err}");
        assert!(tree(repository) == before, "{vm}");
        assert!(fs::read_dir(repository.join(".xofs-trash")).unwrap().next().is_none(), "{vm}");
    }
    let (code, _, err) = repair(repository, &["--undo"]);
    assert!(code == 1 && err.contains("nothing is in the trash"), "{code}: {err}");
    repair(repository, &["orphan01", "--output", file]);
    let set = json(repository, &["--apply", file])["vms"][0]["set"].as_str().unwrap().to_owned();
    let (code, _, err) = repair(repository, &["--purge", "20260101T000000Z-00000000"]);
    assert!(code == 1 && err.contains(&set), "{code}: {err}");
    assert_eq!(json(repository, &["--purge", &set])["set"], Value::from(set.as_str()));
    assert!(fs::read_dir(repository.join(".xofs-trash")).unwrap().next().is_none());
}

#[test]
fn a_plan_is_refused_once_anything_changed() {
    let copy = hard();
    let (repository, (_folder, plan)) = (copy.path(), plan_file());
    let file = plan.to_str().unwrap();
    assert_eq!(repair(repository, &["orphan01", "--output", file]).0, 0);
    let planned: Value = serde_json::from_slice(&fs::read(&plan).unwrap()).unwrap();
    let orphan = planned["vms"][0]["actions"][0]["paths"][0].as_str().unwrap();
    // As if another program had begun to use it.
    fs::File::open(repository.join(orphan)).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    let before = tree(repository);
    let (code, _, err) = repair(repository, &["--apply", file]);
    assert!(code == 1 && err.contains(orphan) && err.contains("nothing was changed"), "{code}: {err}");
    assert!(tree(repository) == before);
}

#[test]
fn a_lock_that_was_left_behind_is_watched_and_released() {
    let copy = hard();
    let (repository, (_folder, plan)) = (copy.path(), plan_file());
    let lock = repository.join("xo-vm-backups/ed039cde-9999-4c84-a204-87e95e49d6c0.lock");
    fs::create_dir(&lock).unwrap();
    let (code, out, _) = repair(repository, &["orphan01"]);
    assert!(code == 3 && out.contains("busy: ") && out.contains("0 actions planned"), "{code}: {out}");
    let hour = std::time::Duration::from_secs(3600);
    fs::File::open(&lock).unwrap().set_modified(std::time::SystemTime::now() - hour).unwrap();
    let file = plan.to_str().unwrap();
    let (code, out, _) = repair(repository, &["orphan01", "--output", file]);
    assert!(code == 0 && out.contains("stale-lock: ") && out.contains("5 actions planned"), "{code}: {out}");
    let (code, _, err) = repair(repository, &["--apply", file, "--wait", "1"]);
    assert_eq!(code, 11, "{err}");
    let (code, out, err) = repair(repository, &["--apply", file, "--wait", "30"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(!lock.exists());
}

#[test]
fn a_lock_of_a_vm_that_is_gone_is_found_by_check_and_released() {
    let copy = hard();
    let (repository, (_folder, plan)) = (copy.path(), plan_file());
    let gone = "00000000-9999-4c84-a204-87e95e49d6c0";
    let lock = repository.join(format!("xo-vm-backups/{gone}.lock"));
    let aside = repository.join(format!("xo-vm-backups/.{gone}.lock.0123456789abcdef"));
    for folder in [&lock, &aside] {
        fs::create_dir(folder).unwrap();
    }
    let hour = std::time::Duration::from_secs(3600);
    fs::File::open(&lock).unwrap().set_modified(std::time::SystemTime::now() - hour).unwrap();
    let (_, out, err) = run(xofs().arg("check").arg(repository));
    assert!(out.contains(&format!("{gone}.lock")) && out.contains("no folder any more"), "{out}{err}");
    let mut planned = json(repository, &[]);
    planned["vms"].as_array_mut().unwrap().retain(|vm| vm["uuid"] == gone);
    assert_eq!(planned["vms"][0]["actions"][0]["kind"], "stale-lock", "{planned:#}");
    fs::write(&plan, planned.to_string()).unwrap();
    let (code, out, err) = repair(repository, &["--apply", plan.to_str().unwrap(), "--wait", "30"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(!lock.exists() && !aside.exists());
}

#[test]
fn an_encrypted_repository_is_repaired_with_its_key_and_its_trash_is_encrypted() {
    let fixture = fixture("encrypted-chacha20-poly1305");
    let copy = copy_of(&fixture.join("repo"));
    let (repository, (folder, plan)) = (copy.path(), plan_file());
    let file = plan.to_str().unwrap();
    let key = write_key(folder.path(), expected(&fixture)["remote"]["encryptionKey"].as_str().unwrap());
    let repair = |arguments: &[&str]| {
        let (code, out, err) =
            run(xofs().args(["repair", "--password-file"]).arg(&key).arg(repository).args(arguments).arg("--json"));
        assert_eq!(code, 0, "{arguments:?}: {out}{err}");
        serde_json::from_str::<Value>(&out).unwrap()
    };
    // The newest incremental backup loses its metadata.
    let vm = expected(&fixture)["vms"].as_array().unwrap().iter().find_map(|vm| {
        let newest = vm["backups"].as_array()?.iter().rfind(|backup| backup["mode"] == "delta")?;
        newest["metadata"].as_str().map(str::to_owned)
    });
    fs::remove_file(repository.join(vm.expect("an incremental backup"))).unwrap();
    let before = tree(repository);
    let planned = repair(&["--output", file]);
    let kinds: Vec<&str> = planned["vms"][0]["actions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|action| action["kind"].as_str().unwrap())
        .collect();
    assert!(kinds.contains(&"orphan-disk") && kinds.contains(&"stale-cache"), "{kinds:?}");
    let set = repair(&["--apply", file])["vms"][0]["set"].as_str().unwrap().to_owned();
    let journal = fs::read(repository.join(".xofs-trash").join(&set).join("journal.json")).unwrap();
    assert!(
        !journal.windows(8).any(|bytes| bytes == b"orphan-d"),
        "names are no secret, reasons are stored like metadata"
    );
    assert_eq!(repair(&["--list"])["sets"][0]["id"], Value::from(set.as_str()));
    assert_eq!(repair(&["--undo"])["set"], Value::from(set));
    assert!(tree(repository) == before);
}

#[test]
fn what_cannot_be_meant_is_wrong_usage() {
    let repository = fixture("main").join("repo");
    for (arguments, code) in [
        (vec!["--apply", "p.json", "--undo", "x"], 2),
        (vec!["--list", "--include", "broken-backups"], 2),
        (vec!["web01", "--list"], 2),
        (vec!["--include", "everything"], 2),
        (vec!["--apply", "/nowhere/plan.json"], 1),
        (vec!["nobody"], 1),
        (vec![], 0),
    ] {
        let (found, out, err) = repair(&repository, &arguments);
        assert_eq!(found, code, "{arguments:?}: {out}{err}");
    }
}
