//! The commands, as people run them: the built binary on the fixtures.

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use storage::{LocalStorage, WritableStorage};
use support::{copy_of, expected, fixture, is_mounted, run, scratch, sha256, succeed, write_key, xofs};
use xofs::repository::{VmId, VmLock};

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("cli-").tempdir_in(scratch()).expect("a folder")
}

fn json(command: &mut Command) -> Value {
    serde_json::from_str(&succeed(command)).expect("--json writes JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} is text in {value}"))
}

/// The time of a backup as its metadata file is called.
fn time(backup: &Value) -> &str {
    let file = text(backup, "metadata").rsplit('/').next().expect("at least one part");
    file.trim_end_matches(".json")
}

#[test]
fn every_backup_is_listed_under_its_vm() {
    let fixture = fixture("main");
    let listed = json(xofs().arg("list").arg(fixture.join("repo")).arg("--json"));
    for vm in expected(&fixture)["vms"].as_array().expect("VMs") {
        let found = listed["vms"].as_array().expect("VMs").iter().find(|found| found["uuid"] == vm["uuid"]);
        let found = found.unwrap_or_else(|| panic!("{} is listed", vm["name"]));
        assert_eq!(found["name"], vm["name"]);
        let times = |backups: &Value, of: &dyn Fn(&Value) -> String| -> Vec<String> {
            backups.as_array().expect("backups").iter().map(of).collect()
        };
        let listed = times(&found["backups"], &|backup| text(backup, "time").replace('-', ""));
        assert_eq!(listed, times(&vm["backups"], &|backup| time(backup).to_owned()), "{}", vm["name"]);
    }
}

#[test]
fn an_export_has_the_bytes_of_the_disk_in_every_format() {
    let fixture = fixture("main");
    let repository = fixture.join("repo");
    let folder = folder();
    let (raw, qcow2, vhd) = (folder.path().join("raw"), folder.path().join("qcow2"), folder.path().join("vhd"));
    let mut count = 0;
    for vm in expected(&fixture)["vms"].as_array().expect("VMs") {
        let Some(backup) = vm["backups"].as_array().and_then(|backups| backups.last()) else { continue };
        let what = format!("{}/{}", text(vm, "uuid"), time(backup));
        let info = json(xofs().arg("info").arg(&repository).arg(&what).arg("--json"));
        // Its disks are listed, and cannot be read.
        if backup["compression"].as_str().is_some_and(|compression| compression != "none") {
            continue;
        }
        for (disk, truth) in
            info["disks"].as_array().expect("disks").iter().zip(backup["disks"].as_array().expect("disks"))
        {
            let what = format!("{what}/{}", text(disk, "name"));
            let export = |format: &str, path: &Path| {
                succeed(
                    xofs().args(["export", "--force", "--format", format, "-o"]).arg(path).arg(&repository).arg(&what),
                );
            };
            export("raw", &raw);
            assert_eq!(sha256(&raw).as_deref(), Ok(text(truth, "sha256")), "{what}");
            assert_eq!(Some(fs::metadata(&raw).expect("stat").len()), truth["virtualSize"].as_u64(), "{what}");
            export("qcow2", &qcow2);
            succeed(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&qcow2));
            succeed(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&raw).arg(&qcow2));
            export("vhd", &vhd);
            succeed(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "vpc"]).arg(&raw).arg(&vhd));
            count += 1;
        }
    }
    assert!(count >= 8, "{count} disks were compared");
    let names = fs::read_dir(folder.path()).expect("lists").count();
    assert_eq!(names, 3, "nothing else is left in the folder");
}

#[test]
fn a_pipe_gets_the_same_bytes_as_a_file() {
    let repository = fixture("main").join("repo");
    let folder = folder();
    for format in ["raw", "qcow2", "vhd"] {
        let file = folder.path().join(format);
        let export = |output: &Path| {
            let mut command = xofs();
            command
                .args(["export", "--format", format])
                .arg(&repository)
                .arg("web01/latest/xvda")
                .arg("-o")
                .arg(output);
            command.output().expect("the built binary starts")
        };
        assert!(export(&file).status.success(), "{format}");
        let piped = export(Path::new("-"));
        assert!(piped.status.success() && piped.stdout == fs::read(&file).expect("reads"), "{format}");
        let again = export(&file);
        assert_eq!(again.status.code(), Some(1), "{format}: an existing file is not replaced");
    }
}

#[test]
fn a_folder_that_cannot_be_listed_keeps_nothing_else_from_being_listed() {
    let repository = copy_of(&fixture("main").join("repo"));
    // Root may list every folder, so that this one is none.
    let pools = repository.path().join("xo-pool-metadata-backups");
    fs::remove_dir_all(&pools).expect("a copy");
    fs::write(&pools, "").expect("writes");
    let (code, out, err) = run(xofs().arg("list").arg(repository.path()));
    assert!(code == 3 && out.contains("web01") && out.contains("XO configuration"), "{out}{err}");
    assert!(out.contains("problem: list 'xo-pool-metadata-backups'"), "{out}{err}");
    let (code, out, err) = run(xofs().arg("check").arg(repository.path()));
    assert!(
        code == 3 && out.contains("unchecked: xo-pool-metadata-backups: list 'xo-pool-metadata-backups'"),
        "{out}{err}"
    );
}

#[test]
fn a_single_vhd_is_exported_without_a_repository() {
    let folder = folder();
    let (raw, vhd, back) = (folder.path().join("a.raw"), folder.path().join("a.vhd"), folder.path().join("b.raw"));
    let bytes: Vec<u8> =
        (0..8_u32 << 20).map(|at| if at < 3 << 20 { u8::try_from(at % 251).unwrap_or(0) } else { 0 }).collect();
    fs::write(&raw, &bytes).expect("writes");
    succeed(
        Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on"]).arg(&raw).arg(&vhd),
    );
    succeed(xofs().arg("export").arg(&vhd).arg("-o").arg(&back));
    assert!(fs::read(&back).expect("reads") == bytes);
    let info = json(xofs().arg("info").arg(&vhd).arg("--json"));
    assert_eq!(info["virtualSize"], 8 << 20);
    assert_eq!(info["chain"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_sound_repository_has_no_damage_and_a_broken_one_says_what_it_costs() {
    let (code, out, err) = run(xofs().arg("check").arg(fixture("main").join("repo")).arg("--data"));
    assert!(out.contains("no damage found"), "{out}{err}");
    // Its compressed XVAs cannot be read.
    assert_eq!(code, 3, "{out}{err}");
    let (code, out, err) = run(xofs().arg("check").arg(fixture("hard").join("repo")));
    assert_eq!(code, 13, "{err}");
    for name in ["broken01/2026-08-02T020003Z/xvda", "broken06/2026-08-03T020003Z/xvda", "broken10/2026-08-02T020003Z"]
    {
        assert!(out.contains(name), "{name} is named in\n{out}");
    }
}

#[test]
fn one_cause_is_one_line_that_says_how_many_disks_it_costs() {
    for (name, data) in [("main", false), ("hard", false), ("hard", true)] {
        let repository = fixture(name).join("repo");
        let (_, out, _) = run(xofs().arg("check").arg(repository).args(data.then_some("--data")));
        let faults: Vec<&str> =
            out.lines().filter(|line| line.starts_with("damaged: ") || line.starts_with("unchecked: ")).collect();
        let path = |line: &str| line.split(": ").nth(1).expect("a path").to_owned();
        let paths: std::collections::BTreeSet<String> = faults.iter().map(|line| path(line)).collect();
        assert_eq!(paths.len(), faults.len(), "every path once in\n{out}");
        let disks = |vm: &str, days: &[u32]| {
            let of = |day| format!("{vm}/2026-08-0{day}T020003Z/xvda");
            days.iter().map(of).collect::<Vec<_>>().join(", ")
        };
        let costs = match name {
            "main" => vec!["costs 2 disks: full01/2026-08-02T020003Z/xvda, full01/2026-08-02T020003Z/xvdb".to_owned()],
            _ => vec![
                // A parent that is missing, parents in a loop, a name that leads out of the repository.
                format!("costs 2 disks: {}", disks("broken01", &[1, 2])),
                format!("costs 3 disks: {}", disks("broken04", &[1, 2, 3])),
                format!("costs 1 disk: {}", disks("evil04", &[2])),
            ],
        };
        for costs in costs {
            assert_eq!(faults.iter().filter(|line| line.ends_with(&costs)).count(), 1, "{costs} once in\n{out}");
        }
    }
}

// Promise 13: "a wrong or missing key of an encrypted repository"
#[test]
fn an_encrypted_repository_needs_its_key() {
    let fixture = fixture("encrypted-aes-256-gcm");
    let repository = fixture.join("repo");
    let truth = expected(&fixture);
    let key = truth["remote"]["encryptionKey"].as_str().unwrap_or_else(|| panic!("a key in {}", truth["remote"]));
    let folder = folder();
    let file = write_key(folder.path(), key);
    let listed = json(xofs().arg("list").arg(&repository).arg("--json").arg("--password-file").arg(&file));
    assert_eq!(listed["vms"].as_array().map(Vec::len), truth["vms"].as_array().map(Vec::len));
    succeed(xofs().arg("list").arg(&repository).env("XOFS_PASSWORD", key));
    succeed(xofs().arg("list").arg(&repository).env("XOFS_PASSWORD_COMMAND", format!("cat '{}'", file.display())));
    for (name, password) in [("missing", None), ("wrong", Some("0".repeat(32))), ("short", Some("secret".to_owned()))] {
        let mut command = xofs();
        command.arg("list").arg(&repository);
        if let Some(password) = &password {
            command.env("XOFS_PASSWORD", password);
        }
        let (code, _, err) = run(&mut command);
        assert_eq!(code, 12, "{name}: {err}");
        assert_eq!(err.lines().count(), 1, "{name}: {err}");
        assert!(password.is_none_or(|password| !err.contains(&password)), "{name}: {err}");
    }
}

#[test]
fn a_key_in_the_environment_is_ignored_where_nothing_is_encrypted() {
    let main = fixture("main").join("repo");
    let folder = folder();
    let key = "0".repeat(32);
    let file = write_key(folder.path(), &key);
    for (name, value) in [
        ("XOFS_PASSWORD", key.as_str()),
        ("XOFS_PASSWORD", "short"),
        ("XOFS_PASSWORD_FILE", "/nowhere"),
        ("XOFS_PASSWORD_COMMAND", "exit 3"),
    ] {
        assert!(succeed(xofs().arg("list").arg(&main).env(name, value)).contains("web01"), "{name}={value}");
    }
    let (code, _, err) = run(xofs().arg("list").arg(&main).arg("--password-file").arg(&file));
    assert_eq!(code, 12, "a key that was asked for by name is a mistake: {err}");
    assert!(err.contains("leave the key out") && err.lines().count() == 1, "{err}");
}

#[test]
fn every_failure_is_one_line_with_its_exit_code() {
    let main = fixture("main").join("repo");
    let main = main.to_str().expect("UTF-8");
    let folder = folder();
    let empty = folder.path().to_str().expect("UTF-8");
    let inside = format!("{main}/xo-vm-backups");
    for (arguments, code, part) in [
        (vec!["list", "/nowhere"], 10, "'/nowhere' does not exist"),
        (vec!["list", empty], 10, "is empty"),
        (vec!["list", "s3://key:hunter2@host/bucket"], 2, "not supported yet"),
        (vec!["list", "nfs://nas:/export"], 2, "mount -t nfs"),
        (vec!["info", main, "nobody"], 1, "nobody"),
        (vec!["info", main, "web01", "--chain"], 2, "only a disk has a chain"),
        (vec!["export", main, "web01/latest", "-o", "-"], 2, "has 2 disks"),
        (vec!["mount", main, "/nowhere"], 1, "/nowhere"),
        (vec!["mount", main, main], 2, "lies in the repository"),
        (vec!["mount", main, &inside], 2, "lies in the repository"),
        (vec!["mount", main], 2, "give the repository (or XOFS_REPOSITORY) and the folder"),
        (vec!["unmount", empty], 1, "nothing is mounted at"),
        (vec!["/nowhere", empty, "-o", "ro,dev,suid"], 32, "'/nowhere' does not exist"),
        (vec![main, empty, "-o", "colour=hunter2"], 32, "unknown mount option 'colour'"),
    ] {
        let (got, _, err) = run(xofs().args(&arguments).env("HOME", empty));
        assert_eq!(got, code, "{arguments:?}: {err}");
        assert!(err.contains(part), "{arguments:?}: {err}");
        assert!(err.starts_with("xofs: ") && err.lines().count() == 1, "{arguments:?}: {err}");
        assert!(!err.contains("hunter2"), "{err}");
    }
}

#[test]
fn configured_repositories_are_found_by_name_and_one_that_is_down_delays_nothing() {
    let folder = folder();
    fs::create_dir(folder.path().join("xofs")).expect("a new folder");
    let main = fixture("main").join("repo");
    let config = format!("[repositories.down]\npath = '/nowhere'\n[repositories.main]\npath = '{}'\n", main.display());
    fs::write(folder.path().join("xofs/config.toml"), config).expect("writes");
    let configured = || {
        let mut command = xofs();
        command.env("XDG_CONFIG_HOME", folder.path());
        command
    };
    assert!(succeed(configured().args(["list", "main"])).contains("web01"));
    assert!(succeed(configured().args(["list", "-r", "main"])).contains("web01"));
    assert!(succeed(configured().args(["info", "web01/latest", "-r", "main"])).starts_with("backup: web01/"));
    let (code, out, err) = run(configured().arg("list"));
    assert_eq!(code, 3, "{err}");
    assert!(out.contains("web01"), "{out}");
    assert!(err.starts_with("xofs: repository 'down': ") && err.lines().count() == 1, "{err}");
}

#[test]
fn a_repository_that_does_not_answer_keeps_no_other_waiting() {
    let folder = folder();
    fs::create_dir(folder.path().join("xofs")).expect("a new folder");
    let main = fixture("main").join("repo");
    let config = format!(
        "[repositories.hanging]\npath = '/nowhere'\npassword_command = 'sleep 4'\n\
         [repositories.main]\npath = '{}'\n",
        main.display()
    );
    fs::write(folder.path().join("xofs/config.toml"), config).expect("writes");
    let mut command = xofs();
    command.args(["list", "--timeout", "3"]).env("XDG_CONFIG_HOME", folder.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the built binary starts");
    let mut out = String::new();
    BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut out).expect("UTF-8");
    assert_eq!(out, "repository main\n");
    assert!(child.try_wait().expect("it is our child").is_none(), "it waits for the other one");
    let output = child.wait_with_output().expect("it is our child");
    let err = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(3), "{err}");
    assert!(err.starts_with("xofs: repository 'hanging': no answer within 3 s") && err.lines().count() == 1, "{err}");
}

#[test]
fn what_is_known_of_a_repository_counts_its_backups_and_problems() {
    let fixture = fixture("main");
    let info = json(xofs().arg("info").arg(fixture.join("repo")).arg("--json"));
    assert_eq!((&info["vms"], &info["backups"]), (&8.into(), &27.into()));
    let problems = info["problems"].as_array().expect("a list");
    assert_eq!(problems.len(), 2, "its compressed XVAs: {problems:?}");
}

#[test]
fn a_disk_that_cannot_be_read_is_shown_with_what_is_known_of_it_and_why() {
    let repository = fixture("main").join("repo");
    let what = "full01/2026-08-02T020003Z/xvda";
    let (code, out, err) = run(xofs().arg("info").arg(&repository).arg(what));
    assert!(code == 3 && err.is_empty(), "{code}: {err}");
    for part in ["disk: full01/2026-08-02T020003Z/xvda", "format: XVA", "virtual size: ", "problem: "] {
        assert!(out.lines().any(|line| line.starts_with(part)), "{part} in\n{out}");
    }
    let (code, out, _) = run(xofs().arg("info").arg(&repository).arg(what).arg("--json"));
    let info: Value = serde_json::from_str(&out).expect("JSON");
    assert!(code == 3 && info["virtualSize"].as_u64() > Some(0) && info["allocated"].is_null(), "{info}");
    assert!(text(&info, "problem").contains("is compressed with"), "{info}");
}

// Promise 16: "the process ends when it is closed"
#[test]
fn an_unmount_says_that_somebody_uses_the_mount_still() {
    let folder = folder();
    let place = folder.path().canonicalize().expect("exists");
    succeed(xofs().args(["mount", "--daemon"]).arg(fixture("main").join("repo")).arg(&place));
    let status = fs::File::open(place.join(".xofs/status.json")).expect("opens");
    let (code, _, err) = run(xofs().arg("unmount").arg(&place));
    assert!(!is_mounted(&place));
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("still in use") && err.lines().count() == 1, "{err}");
    // Its command line ends with the place.
    let is_running = || {
        let mut processes = fs::read_dir("/proc").expect("/proc is mounted").flatten();
        let name = [place.as_os_str().as_encoded_bytes(), b"\0"].concat();
        processes.any(|process| fs::read(process.path().join("cmdline")).is_ok_and(|line| line.ends_with(&name)))
    };
    assert!(is_running());
    drop(status);
    let start = Instant::now();
    while is_running() {
        assert!(start.elapsed() < Duration::from_secs(60), "it still runs");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_daemon_returns_when_the_mount_can_be_read() {
    let folder = folder();
    let main = fixture("main").join("repo");
    // As a person, and as mount(8) calls a FUSE program.
    for (name, arguments) in [("person", &["mount", "--daemon"][..]), ("mount", &[])] {
        let place = folder.path().canonicalize().expect("exists").join(name);
        fs::create_dir(&place).expect("a new folder");
        let mut command = xofs();
        command.args(arguments).arg(&main).arg(&place).args(["-o", "ro,_netdev"]);
        let (code, _, err) = run(&mut command);
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(is_mounted(&place));
        assert_eq!(names_of_processes_about(&place), ["xofs xofs"]);
        assert_eq!(fs::read_dir(place.join("vms")).expect("lists").count(), 8);
        succeed(xofs().arg("unmount").arg(&place));
        assert!(!is_mounted(&place));
        fs::remove_dir(&place).expect("empty");
    }
}

/// Returns the names that `ps` shows of the processes with that path in their arguments: the kernel's and their own.
fn names_of_processes_about(path: &Path) -> Vec<String> {
    let path = path.to_str().expect("UTF-8");
    let processes = fs::read_dir("/proc").expect("lists").map(|entry| entry.expect("lists").path());
    let text = |process: &Path, name: &str| fs::read_to_string(process.join(name)).unwrap_or_default();
    processes
        .filter_map(|process| {
            let arguments = text(&process, "cmdline");
            let own = arguments.split('\0').next().filter(|_| arguments.contains(path))?;
            Some(format!("{} {own}", text(&process, "comm").trim_end()))
        })
        .collect()
}

#[test]
fn a_log_filter_that_is_none_is_said_and_nothing_else_fails() {
    let (code, out, err) = run(xofs().arg("list").arg(fixture("main").join("repo")).env("XOFS_LOG", "a=b=c"));
    assert!(code == 0 && out.contains("web01"), "{err}");
    assert!(err.starts_with("xofs: warning: XOFS_LOG is ignored") && err.lines().count() == 1, "{err}");
}

#[test]
fn every_name_that_json_has_is_documented() {
    fn names(value: &Value, found: &mut std::collections::BTreeSet<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| {
                found.insert(name.clone());
                names(value, found);
            }),
            Value::Array(values) => values.iter().for_each(|value| names(value, found)),
            _ => {}
        }
    }
    let main = fixture("main").join("repo");
    let document = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/json.md")).expect("is there");
    let all_documented = |what: &dyn std::fmt::Debug, value: &Value| {
        let mut found = Default::default();
        names(value, &mut found);
        assert!(found.len() >= 4, "{what:?}: {found:?}");
        for name in found {
            assert!(document.contains(&format!("`{name}`")), "{what:?}: {name} is documented");
        }
    };
    for arguments in [
        &["list"][..],
        &["info"],
        &["info", "web01"],
        &["info", "web01/latest"],
        &["info", "web01/latest/xvda"],
        &["check"],
        &["repair"],
    ] {
        let Output { stdout, .. } = xofs()
            .arg(arguments[0])
            .arg(&main)
            .args(&arguments[1..])
            .arg("--json")
            .output()
            .expect("the built binary starts");
        all_documented(&arguments, &serde_json::from_slice(&stdout).expect("JSON"));
    }
    let folder = folder();
    let place = folder.path().canonicalize().expect("exists");
    succeed(xofs().args(["mount", "--daemon"]).arg(&main).arg(&place));
    // Looked into, so that its problems are known.
    for vm in fs::read_dir(place.join("vms")).expect("lists").flatten() {
        assert!(fs::read_dir(vm.path()).expect("lists").count() > 0);
    }
    let files = ["status.json", "problems.json"].map(|name| (name, fs::read(place.join(".xofs").join(name))));
    let metrics = fs::read_to_string(place.join(".xofs/metrics"));
    succeed(xofs().arg("unmount").arg(&place));
    for (name, bytes) in files {
        all_documented(&name, &serde_json::from_slice(&bytes.expect("reads")).expect("JSON"));
    }
    let metrics = metrics.expect("reads");
    assert!(metrics.contains("\nxofs_vms 8\n"), "{metrics}");
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        assert!(document.contains(&format!("`{name}`")), "{name} is documented");
    }
}

#[test]
fn completions_and_the_manual_come_from_the_parser() {
    let folder = folder();
    for shell in ["bash", "zsh", "fish"] {
        assert!(succeed(xofs().args(["completions", shell])).contains("export"), "{shell}");
    }
    succeed(xofs().arg("man").arg(folder.path()));
    for page in ["xofs", "xofs-mount", "xofs-export", "xofs-check", "xofs-repair", "xofs-forget"] {
        let page = fs::read_to_string(folder.path().join(format!("{page}.1"))).expect("a page");
        assert!(page.contains(".SH NAME") && page.contains("Example"));
    }
}

/// A repository of one VM whose backups are metadata alone, at these times.
fn repository_of(times: &[&str]) -> tempfile::TempDir {
    let folder = folder();
    let vm = folder.path().join("xo-vm-backups/e15d58c8-1c93-4ef2-b5b1-db33d6955ecb");
    fs::create_dir_all(&vm).expect("a folder");
    for time in times {
        let metadata = r#"{"mode":"delta","jobId":"job-1","scheduleId":"nightly","vhds":{"OpaqueRef:1":"vdis/a.vhd"},
            "vm":{"name_label":"web01","tags":["legal"]}}"#;
        fs::write(vm.join(format!("{time}.json")), metadata).expect("writes");
    }
    folder
}

#[test]
fn forget_says_what_is_kept_and_why_and_changes_nothing() {
    let repository = repository_of(&["20261119T020003Z", "20261120T020003Z", "20261121T020003Z"]);
    let forget = |arguments: &[&str]| run(xofs().arg("forget").arg(repository.path()).args(arguments));
    let (code, out, err) = forget(&["--all", "--keep-daily", "2", "--timezone", "Europe/Paris"]);
    let expected = "\
web01  e15d58c8-1c93-4ef2-b5b1-db33d6955ecb
  incremental, schedule nightly: 3 backups
    2026-11-19T020003Z forget  no rule keeps it
    2026-11-20T020003Z keep    daily 2026-11-20
    2026-11-21T020003Z keep    daily 2026-11-21, newest of its chain
3 backups: 2 to keep, 1 to forget (time zone Europe/Paris); nothing was changed
";
    assert_eq!((code, out.as_str(), err.as_str()), (0, expected, ""));

    for scope in [["--vm", "web01"], ["--job", "job-1"], ["--schedule", "night"]] {
        let value: Value = serde_json::from_str(&forget(&[&scope[..], &["--keep-last=1", "--json"]].concat()).1)
            .expect("--json writes JSON");
        assert_eq!((value["keep"].as_u64(), value["forget"].as_u64()), (Some(1), Some(2)), "{value}");
        assert_eq!(value["timeZone"], Value::Null);
        let newest = &value["vms"][0]["backups"][2];
        let reasons = serde_json::json!([{"kind": "last", "count": 1}, {"kind": "newestOfChain"}]);
        assert_eq!((text(newest, "decision"), &newest["reasons"]), ("keep", &reasons));
    }
    let (_, out, _) = forget(&["--all", "--keep-last=1", "--keep-tag=legal"]);
    assert!(out.contains("3 backups: 3 to keep, 0 to forget; nothing was changed"), "{out}");

    fs::write(repository.path().join("immutability.json"), r#"{"immutable":true,"duration":9000000000000}"#)
        .expect("writes");
    let (code, out, _) = forget(&["--all", "--keep-last=1"]);
    assert!(code == 0 && out.contains("keep    immutable until 2312-01-31T18:00:03Z"), "{out}");
    fs::write(repository.path().join("immutability.json"), "{").expect("writes");
    let (code, out, err) = forget(&["--all", "--keep-last=1"]);
    assert!(code == 13 && out.is_empty() && err.contains("'immutability.json'"), "{code} {out}{err}");
}

#[test]
fn forget_wants_a_rule_a_scope_and_a_time_zone_that_exists() {
    let repository = repository_of(&["20261119T020003Z"]);
    for (arguments, expected, reason) in [
        (&["--keep-last=1"][..], 2, "give --vm, --job, --schedule or --all"),
        (&["--all"], 2, "no rule keeps anything"),
        (&["--all", "--keep-last=0"], 2, "no rule keeps anything"),
        (&["--all", "--keep-daily=1", "--timezone=Europe/Nowhere"], 2, "'Europe/Nowhere' is unknown"),
        (&["--all", "--vm=web01", "--keep-last=1"], 2, "cannot be used with"),
        (&["--vm=web01/latest", "--keep-last=1"], 2, "--vm takes a VM"),
        (&["--job=nothing", "--keep-last=1"], 1, "no backup is of a job 'nothing'; there are 'job-1'"),
    ] {
        let (code, out, err) = run(xofs().arg("forget").arg(repository.path()).args(arguments));
        assert!(code == expected && out.is_empty() && err.contains(reason), "{arguments:?}: {code} {out}{err}");
    }
}

#[test]
fn forget_keeps_what_a_kept_backup_is_built_on_by_name_alone() {
    let fixture = fixture("hard");
    let repository = copy_of(&fixture.join("repo"));
    let mut forget = xofs();
    forget.arg("forget").arg(repository.path()).args(["--vm=broken03", "--keep-last=1", "--apply", "--json"]);
    let (code, out, err) = run(&mut forget);
    assert_eq!(code, 3, "{out}{err}");
    let value: Value = serde_json::from_str(&out).expect("--json writes JSON");
    let done = &value["applied"]["vms"][0];
    assert_eq!(done["forgotten"], serde_json::json!([]), "{value}");
    let refused = done["refused"].as_array().expect("a list");
    let times: Vec<&str> = refused.iter().map(|refused| text(refused, "time")).collect();
    assert_eq!(times, ["2026-08-01T020003Z", "2026-08-02T020003Z"]);
    for refused in refused {
        let reason = text(refused, "reason");
        assert!(reason.contains("20260803T020003Z.alias.vhd': a parent with uuid"), "{reason}");
        assert!(reason.contains("20260802T020003Z.alias.vhd', was expected in its folder"), "{reason}");
    }
    let truth = expected(&fixture);
    let vms = truth["vms"].as_array().expect("VMs");
    let vm = vms.iter().find(|vm| vm["name"] == "broken03").expect("it is in the fixture");
    let folder = folder();
    for backup in &vm["backups"].as_array().expect("backups")[..2] {
        let output = folder.path().join(time(backup));
        let selector = format!("broken03/{}", support::folder_name(text(backup, "metadata")));
        succeed(xofs().arg("export").arg(repository.path()).arg(selector).arg("--output").arg(&output));
        assert_eq!(sha256(&output).expect("it can be read"), text(&backup["disks"][0], "sha256"), "{backup}");
    }
}

#[test]
fn forget_merges_the_disks_of_several_vms_at_a_time() {
    let folder = folder();
    let repository = folder.path().join("repository");
    let (code, _, err) = run(xofs().args(["repository", "init"]).arg(&repository));
    assert_eq!(code, 0, "{err}");
    let vms = ["1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a51", "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a52"];
    let make = |vms: &[&str], disks: &[&str], days: &[&str]| {
        for day in days {
            for vm in vms {
                let mut ingest = xofs();
                ingest.arg("ingest").arg(&repository).args(["--vm", vm, "--name", "web"]);
                ingest.args(["--time", &format!("2026-08-{day}T02:00:00Z"), "--compression", "none"]);
                for disk in disks {
                    let image = folder.path().join(format!("{vm}-{disk}.raw"));
                    fs::write(&image, format!("{vm} {disk} {day}").repeat(100_000)).expect("writes");
                    ingest.arg("--disk").arg(format!("{disk}={}", image.display()));
                }
                let (code, _, err) = run(&mut ingest);
                assert_eq!(code, 0, "{err}");
            }
        }
    };
    let forget = |arguments: &[&str]| -> Value {
        let mut forget = xofs();
        forget.arg("forget").arg(&repository).args(["--all", "--keep-last=1", "--apply", "--json"]).args(arguments);
        let (code, out, err) = run(&mut forget);
        assert_eq!((code, err.as_str()), (0, ""));
        serde_json::from_str::<Value>(&out).expect("--json writes JSON")["applied"].clone()
    };
    let disks = ["xvda", "xvdb"];
    make(&vms, &disks, &["01", "02", "03"]);
    let said = forget(&["--jobs", "3"]);
    assert_eq!((&said["jobs"], &said["renameSeconds"]), (&Value::from(3), &Value::Null), "{said}");
    make(&vms, &disks, &["04"]);
    let probed = forget(&[]);
    assert!(probed["renameSeconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{probed}");
    for (applied, merged) in [(&said, 4), (&probed, 2)] {
        let found: Vec<_> = applied["vms"].as_array().expect("VMs").iter().map(|vm| text(vm, "uuid")).collect();
        assert_eq!(found, vms, "{applied}");
        for vm in applied["vms"].as_array().expect("VMs") {
            assert_eq!((&vm["mergedDisks"], &vm["problems"]), (&Value::from(merged), &Value::from(Vec::<u8>::new())));
        }
    }
    make(&["1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a53"], &disks[..1], &["01", "02"]);
    let alone = forget(&[]);
    assert_eq!((&alone["jobs"], &alone["renameSeconds"]), (&Value::from(1), &Value::Null), "one disk goes: {alone}");
    let mut left: Vec<_> =
        fs::read_dir(&repository).expect("lists").map(|entry| entry.expect("lists").file_name()).collect();
    left.sort();
    assert_eq!(left, ["xo-vm-backups"]);
    for vm in vms {
        for disk in disks {
            let copy = folder.path().join("copy.raw");
            let (code, _, err) = run(xofs()
                .arg("export")
                .arg(&repository)
                .arg(format!("{vm}/latest/{disk}"))
                .arg("-o")
                .arg(&copy)
                .arg("--force"));
            assert_eq!(code, 0, "{err}");
            let expected = fs::read(folder.path().join(format!("{vm}-{disk}.raw"))).expect("reads");
            assert!(fs::read(&copy).expect("reads")[..expected.len()] == expected, "{vm} {disk}");
        }
    }
}

#[test]
fn who_waits_for_another_program_stops_when_told_to() {
    let repository = copy_of(&fixture("main").join("repo"));
    let listed = json(xofs().arg("list").arg(repository.path()).arg("--json"));
    let vm = text(&listed["vms"][0], "uuid");
    let storage: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(repository.path()).expect("a folder"));
    let lock = VmLock::take(storage, &VmId::new(vm).expect("a VM"), Duration::ZERO, |_| true).expect("the lock");
    let image = repository.path().join("image.raw");
    fs::write(&image, "an image").expect("writes");
    let disk = format!("xvda={}", image.display());
    let forget: &[&str] = &["forget", "--vm", vm, "--keep-last=1", "--apply", "--wait=3600"];
    let ingest: &[&str] = &["ingest", "--vm", vm, "--disk", &disk, "--wait=3600"];
    for arguments in [forget, ingest] {
        let mut command = xofs();
        command.arg(arguments[0]).arg(repository.path()).args(&arguments[1..]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the built binary starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map(|line| line.expect("UTF-8"));
        assert!(lines.any(|line| line.contains("for another program that w")), "{arguments:?} waits");
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
            .expect("it runs");
        let said: Vec<String> = lines.collect();
        assert_eq!(child.wait().expect("it ends").code(), Some(130), "{arguments:?}: {said:?}");
    }
    lock.check().expect("nobody took it");
}
