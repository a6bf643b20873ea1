//! New repositories, as people make them: which places are taken, where the key comes from, and what is written to them then.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use support::{scratch, succeed, write_key, xofs};

const KEY: &str = "0123456789abcdef0123456789abcdef";
const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("init-").tempdir_in(scratch()).expect("a folder")
}

/// Runs `xofs` without a terminal and returns its exit code and standard error.
fn run(command: &mut Command) -> (i32, String) {
    let Output { status, stderr, .. } = command.stdin(Stdio::null()).output().expect("the built binary starts");
    (status.code().expect("not ended by a signal"), String::from_utf8(stderr).expect("UTF-8"))
}

fn init(place: &Path) -> Command {
    let mut command = xofs();
    command.args(["repository", "init"]).arg(place);
    command
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("lists")
        .map(|entry| entry.expect("lists").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

#[test]
fn only_a_place_that_is_empty_becomes_a_repository() {
    let folder = folder();
    let place = folder.path().join("new");
    let said = succeed(&mut init(&place));
    assert!(said.contains("Next: 'xofs ingest'"), "{said}");
    assert_eq!(names(&place), ["xo-vm-backups"]);
    assert!(succeed(xofs().arg("list").arg(&place).arg("--json")).contains("\"vms\": []"));
    let (code, err) = run(&mut init(&place));
    assert!(code == 1 && err.contains("is a repository already: it holds 'xo-vm-backups'"), "{code} {err}");

    let there = folder.path().join("there");
    fs::create_dir(&there).expect("made");
    // As XO sees it, neither what begins with a dot nor a key check that was cut off is in the way.
    fs::write(there.join(".nfs0001"), "").expect("written");
    fs::write(there.join("metadata.json"), "cut off").expect("written");
    let key = write_key(folder.path(), KEY);
    succeed(init(&there).arg("--encrypted").arg("--password-file").arg(&key));
    assert_eq!(names(&there), [".nfs0001", "encryption.json", "metadata.json", "xo-vm-backups"]);
    assert_eq!(fs::read(there.join("metadata.json")).expect("reads").len(), 77);

    let taken = folder.path().join("taken");
    fs::create_dir(&taken).expect("made");
    fs::write(taken.join("notes.txt"), "mine").expect("written");
    let (code, err) = run(&mut init(&taken));
    assert!(code == 1 && err.contains("is not empty, it holds 'notes.txt'"), "{code} {err}");
    let (code, err) = run(&mut init(&folder.path().join("missing/deep")));
    assert!(code == 10 && err.contains("the share is mounted"), "{code} {err}");
    assert!(!folder.path().join("missing").exists());
}

#[test]
fn a_key_is_taken_as_by_other_commands_and_opens_what_was_made() {
    let folder = folder();
    let key = write_key(folder.path(), KEY);
    let file = ["--password-file", key.to_str().expect("UTF-8")];
    let command = format!("cat {}", key.display());
    for (name, arguments, environment) in [
        ("file", &file[..], None),
        ("command", &["--password-command", &command][..], None),
        ("variable", &[][..], Some(("XOFS_PASSWORD", KEY))),
    ] {
        let place = folder.path().join(name);
        succeed(init(&place).arg("--encrypted").args(arguments).envs(environment));
        succeed(xofs().arg("list").arg(&place).args(file));
        let (code, _) = run(xofs().arg("list").arg(&place).env("XOFS_PASSWORD", "x".repeat(32)));
        assert_eq!(code, 12, "{name}");
        // Empty or not: nobody replaces its key.
        let (code, err) = run(init(&place).arg("--encrypted").args(file));
        assert!(code == 1 && err.contains("is a repository already"), "{name}: {code} {err}");
    }
    for (arguments, environment, code, part) in [
        (&["--encrypted"][..], None, 12, "needs a key of 32 characters"),
        (&["--encrypted"], Some(("XOFS_PASSWORD", "short")), 12, "has 5 bytes, 32"),
        (&file, None, 2, "say --encrypted"),
    ] {
        let place = folder.path().join("refused");
        let (found, err) = run(init(&place).args(arguments).envs(environment));
        assert!(found == code && err.contains(part), "{arguments:?}: {found} {err}");
        assert!(!place.exists());
    }
    // One of the environment is meant for whatever needs it.
    succeed(init(&folder.path().join("plain")).env("XOFS_PASSWORD", KEY));
    assert_eq!(names(&folder.path().join("plain")), ["xo-vm-backups"]);
}

#[test]
fn what_is_ingested_into_an_encrypted_repository_comes_back_and_stands_nowhere_in_plain() {
    let folder = folder();
    let (plain, secret) = (folder.path().join("plain"), folder.path().join("secret"));
    let (image, key) = (folder.path().join("disk.raw"), write_key(folder.path(), KEY));
    succeed(&mut init(&plain));
    succeed(init(&secret).arg("--encrypted").env("XOFS_PASSWORD", KEY));
    for round in 0..2_u8 {
        let mut bytes = vec![0; 5 << 20];
        bytes[..1000].copy_from_slice(&b"visible!".repeat(125));
        bytes[4 << 20] = round;
        fs::write(&image, &bytes).expect("written");
        let mut command = xofs();
        command.arg("ingest").arg(&plain).arg("--to").arg(&secret).args(["--vm", VM, "--name", "web01", "--json"]);
        command.args(["--compression", "none", "--disk"]).arg(format!("xvda={}", image.display()));
        // It is for the one that needs it.
        command.arg("--password-file").arg(&key);
        let told: Value = serde_json::from_str(&succeed(&mut command)).expect("JSON");
        for repository in told["repositories"].as_array().expect("repositories") {
            assert_eq!(repository["disks"][0]["isKey"], round == 0, "{told}");
        }
        let back = folder.path().join(format!("back{round}.raw"));
        succeed(xofs().arg("export").arg(&secret).args(["web01/latest", "-o"]).arg(&back).env("XOFS_PASSWORD", KEY));
        assert!(fs::read(&back).expect("reads") == bytes, "round {round}");
    }
    let holds = |place: &Path| Command::new("grep").args(["-rqa", "visible!"]).arg(place).status().expect("grep");
    assert_eq!((holds(&plain).code(), holds(&secret).code()), (Some(0), Some(1)));
    let (code, err) =
        run(xofs().arg("ingest").arg(&secret).args(["--vm", VM, "--disk"]).arg(format!("xvda={}", image.display())));
    assert!(code == 12 && err.contains("is encrypted"), "{code} {err}");
    succeed(xofs().arg("check").arg(&secret).arg("--data").env("XOFS_PASSWORD", KEY));
}
