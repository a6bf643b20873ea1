//! Files of guests without a mount: `xofs ls`, `cat`, `cp` and `tar`, against what the kernel shows of the same volume.
//!
//! Needs root and loop devices.

mod guest_world;
mod support;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use guest_world::compare::Random;
use guest_world::compare::tree::Tree;
use guest_world::{World, assert_same, of_mount, without_what_cannot_be_set, world};
use serde_json::Value;
use support::{copy_of, require_root, run, scratch, succeed, xofs};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("files-").tempdir_in(scratch()).unwrap()
}

/// A file of the guest as it is named on the command line.
fn at(path: &str) -> OsString {
    format!("web01/latest/xvda1:{path}").into()
}

fn command(world: &World, name: &str) -> Command {
    let mut command = xofs();
    command.arg(name).env("XOFS_REPOSITORY", &world.repository);
    command
}

/// What of a tree lies below a path, from there.
fn below(tree: &Tree, folder: &str) -> Tree {
    let prefix = folder.as_bytes();
    let files = tree.iter().filter_map(|(path, file)| {
        let rest = path.strip_prefix(prefix)?;
        let rest = if rest.is_empty() { rest } else { rest.strip_prefix(b"/")? };
        Some((rest.to_vec(), file.clone()))
    });
    files.collect()
}

fn without_sockets(tree: &Tree) -> Tree {
    let mut tree = tree.clone();
    tree.retain(|_, file| file.attributes.kind != guest::Kind::Socket);
    tree
}

#[test]
fn a_copy_is_what_the_kernel_shows() {
    let world = world();
    let copies = folder();
    succeed(command(&world, "cp").arg(at("")).arg(copies.path()));
    // Before it is read.
    for name in ["contents/size-60", "times"] {
        let stat = fs::metadata(copies.path().join("xvda1").join(name)).unwrap();
        assert_eq!(stat.atime(), world.truth[name.as_bytes()].attributes.accessed.seconds, "{name}");
    }
    let copy = of_mount(&copies.path().join("xvda1"));
    assert_same(&without_what_cannot_be_set(&world.truth), &without_what_cannot_be_set(&copy));
    let far = fs::metadata(copies.path().join("xvda1/contents/far")).unwrap();
    assert!(far.len() > 2 << 30 && far.blocks() * 512 < 1 << 20, "{} blocks of {}", far.blocks(), far.len());
}

#[test]
fn an_unpacked_archive_is_what_the_kernel_shows() {
    let world = world();
    let copies = folder();
    let archive = copies.path().join("all.tar");
    let said = command(&world, "tar").arg(at("/")).arg("-o").arg(&archive).output().unwrap();
    let said_text = String::from_utf8_lossy(&said.stderr);
    assert_eq!(said.status.code(), Some(0), "{said_text}");
    assert_eq!(said_text, "xofs: 1 socket left out: an archive has none\n");
    let unpacked = copies.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--same-owner", "-p", "-xf"])
        .arg(&archive);
    // Which takes text in records for UTF-8, if it can.
    let output = tar.env("LC_ALL", "C.UTF-8").arg("-C").arg(&unpacked).output().unwrap();
    let warnings = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{warnings}");
    assert!(
        warnings.lines().all(|line| line.starts_with("tar: times/") && line.contains(" time stamp ")),
        "{warnings}"
    );
    let copy = of_mount(&unpacked);
    assert_same(&without_what_cannot_be_set(&without_sockets(&world.truth)), &without_what_cannot_be_set(&copy));
    let far = fs::metadata(unpacked.join("contents/far")).unwrap();
    assert!(far.blocks() * 512 < 1 << 20 && fs::metadata(&archive).unwrap().len() < 100 << 20);
    // The same again, byte by byte, through a pipe.
    let mut again = Command::new("sh");
    again
        .args(["-c", "\"$0\" tar web01/latest/xvda1 2>/dev/null | cmp - \"$1\""])
        .arg(env!("CARGO_BIN_EXE_xofs"))
        .arg(&archive);
    succeed(again.env("XOFS_REPOSITORY", &world.repository));
    // Of a part, the names start at the root all the same.
    let mut listed = Command::new("sh");
    listed.args(["-c", "\"$0\" tar web01/latest/xvda1:links/../times | tar -t"]).arg(env!("CARGO_BIN_EXE_xofs"));
    let names = succeed(listed.env("XOFS_REPOSITORY", &world.repository));
    assert!(names.lines().count() > 1 && names.lines().all(|name| name.starts_with("times/")), "{names}");
}

#[test]
fn a_file_is_written_with_its_holes_as_zeroes() {
    let world = world();
    for name in ["holes", "all-hole", "tail-hole", "punched", "size-3000000", "size-0"] {
        let copies = folder();
        let path = format!("contents/{name}");
        let output = command(&world, "cat").arg(at(&path)).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::write(copies.path().join(name), output.stdout).unwrap();
        let copy = of_mount(copies.path());
        let (copy, truth) = (&copy[name.as_bytes()], &world.truth[path.as_bytes()]);
        assert_eq!((copy.attributes.size, copy.content), (truth.attributes.size, truth.content), "{name}");
    }
    let both = command(&world, "cat").args([at("kinds/linked"), at("kinds/linked")]).output().unwrap().stdout;
    assert_eq!(both, b"many namesmany names");
    // Who reads no further is no failure.
    let mut head = Command::new("sh");
    head.args(["-c", "set -o pipefail; \"$0\" cat web01/latest/xvda1:contents/size-3000000 | head -c 1 | wc -c"]);
    let mut head = {
        let mut bash = Command::new("bash");
        bash.args(head.get_args());
        bash
    };
    assert_eq!(succeed(head.arg(env!("CARGO_BIN_EXE_xofs")).env("XOFS_REPOSITORY", &world.repository)).trim(), "1");
}

fn entries(world: &World, arguments: &[&str], path: &str) -> Vec<Value> {
    let listed = succeed(command(world, "ls").arg("--json").args(arguments).arg(at(path)));
    let listed: Value = serde_json::from_str(&listed).unwrap();
    listed["entries"].as_array().unwrap().clone()
}

/// The bytes that a text of JSON stands for.
fn bytes(entry: &Value, key: &str) -> Vec<u8> {
    let text = entry[key].as_str().unwrap();
    if !entry["escaped"].as_array().unwrap().contains(&key.into()) {
        return text.as_bytes().to_vec();
    }
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = match (first, after) {
            (b'\\', [b'\\', after @ ..]) => {
                bytes.push(b'\\');
                after
            }
            (b'\\', [b'x', high, low, after @ ..]) => {
                let digits = [*high, *low];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap());
                after
            }
            _ => {
                bytes.push(*first);
                after
            }
        };
    }
    bytes
}

#[test]
fn every_file_is_listed_with_what_is_known_of_it() {
    let world = world();
    let listed = entries(&world, &["-R"], "/");
    assert_eq!(listed.len(), world.truth.len() - 1);
    for entry in &listed {
        let truth = &world.truth[&bytes(entry, "path")].attributes;
        assert_eq!(entry["size"], truth.size, "{entry}");
        assert_eq!(entry["allocated"], truth.allocated, "{entry}");
        assert_eq!(entry["mode"], format!("{:04o}", truth.mode), "{entry}");
        assert_eq!((&entry["uid"], &entry["gid"]), (&truth.uid.into(), &truth.gid.into()), "{entry}");
        assert_eq!(entry["links"], truth.links, "{entry}");
        if truth.kind == guest::Kind::Symlink {
            assert_eq!(bytes(entry, "target"), world.truth[&bytes(entry, "path")].target, "{entry}");
        }
    }
    let names: Vec<_> = entries(&world, &[], "names").iter().map(|entry| bytes(entry, "name")).collect();
    let truth: Vec<_> =
        below(&world.truth, "names").into_keys().filter(|path| !path.is_empty() && !path.contains(&b'/')).collect();
    assert_eq!(names, truth);
    let text = succeed(command(&world, "ls").arg("-lR").arg(at("/")));
    assert_eq!(text.lines().count(), world.truth.len() - 1);
    assert!(text.bytes().all(|byte| byte == b'\n' || byte >= b' ' && byte != 0x7f), "a control character");
    assert!(text.contains("names/new\\u{a}line\n") && text.contains("names/latin-\\xe9\n"), "{text}");
    assert!(text.contains(" links/absolute -> /contents/size-60\n"));
    assert!(text.lines().any(|line| line.starts_with("brw") && line.contains(" 8, 255 ")), "{text}");
}

#[test]
fn links_are_followed_inside_the_volume_and_never_in_circles() {
    let world = world();
    for (path, truth) in [
        ("links/absolute", "contents/size-60"),
        ("/links/above", "contents/size-61"),
        ("links/twice/size-61", "contents/size-61"),
        ("../../links/../contents/./size-61", "contents/size-61"),
        ("links/folder/../links/folder/size-60", "contents/size-60"),
    ] {
        let output = command(&world, "cat").arg(at(path)).output().unwrap();
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout.len() as u64, world.truth[truth.as_bytes()].attributes.size, "{path}");
    }
    for (path, expected) in [
        ("links/outside", "there is no 'proc' in '/', to which a link leads"),
        ("links/loop-a", "more than 40 symbolic links on the way"),
        ("links/loop-a/x", "more than 40 symbolic links on the way"),
        ("contents/none/x", "there is no 'none' in '/contents'"),
        ("contents/size-60/x", "'/contents/size-60' is no folder"),
        ("contents/size-60/", "'/contents/size-60' is no folder"),
        ("contents", "xvda1:/contents: it is a folder"),
        ("kinds/fifo", "it is no file with bytes"),
    ] {
        let (code, stdout, stderr) = run(command(&world, "cat").arg(at(path)));
        assert_eq!((code, &*stdout), (1, ""), "{path}: {stderr}");
        assert!(stderr.contains(expected) && stderr.lines().count() == 1, "{path}: {stderr}");
    }
    // A link itself is copied as it is, and listed as what it leads to.
    let copies = folder();
    succeed(command(&world, "cp").arg(at("links/outside")).arg(copies.path()));
    assert_eq!(fs::read_link(copies.path().join("outside")).unwrap(), Path::new("/proc/self/status"));
    let listed = succeed(command(&world, "ls").arg(at("links/folder")));
    assert!(listed.lines().any(|line| line == "size-60"), "{listed}");
    assert_eq!(succeed(command(&world, "ls").arg(at("links/loop-a"))), "loop-a\n");
}

#[test]
fn a_volume_that_is_not_read_says_what_to_do_and_exit_codes_are_those_of_the_others() {
    let world = world();
    let text = succeed(command(&world, "ls").arg("web01/latest"));
    let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines[0], "xvda1 96 MiB ext4");
    assert!(lines[1].starts_with("xvda2 8 MiB LUKS1 problem: LUKS1: encrypted"), "{text}");
    assert_eq!(lines[2..], ["xvda3 2 MiB empty", "xvda4 8 MiB ext2", "xvda5 8 MiB ext4"]);
    let json: Value = serde_json::from_str(&succeed(command(&world, "ls").args(["--json", "web01/latest/"]))).unwrap();
    let volumes: Vec<_> =
        json["volumes"].as_array().unwrap().iter().map(|volume| (&volume["name"], &volume["isRead"])).collect();
    assert_eq!(
        volumes,
        [
            (&"xvda1".into(), &true.into()),
            (&"xvda2".into(), &false.into()),
            (&"xvda3".into(), &false.into()),
            // Its root is no folder.
            (&"xvda4".into(), &false.into()),
            (&"xvda5".into(), &true.into()),
        ]
    );
    let copies = folder();
    let destination = copies.path().to_str().unwrap();
    for (arguments, code, expected) in [
        (&["ls", "web01/latest/xvda2:/"][..], 1, "its files cannot be shown: LUKS1: encrypted; map volumes/xvda2.raw"),
        (&["ls", "web01/latest/xvda3"], 1, "its files cannot be shown: empty"),
        (&["ls", "web01/latest/xvda9"], 1, "there are 'xvda1' (ext4), 'xvda2' (LUKS1), 'xvda3' (empty)"),
        (&["ls", "web01/2025/xvda1"], 1, "has no backup '2025'"),
        (&["ls", "web02/latest/xvda1"], 1, "no VM has the name or uuid 'web02'"),
        (&["ls", "web01/latest/xvda1/etc"], 2, "expected a ':' between the volume and the path"),
        (&["cat", "web01/latest"], 2, "is a backup: name a volume of it"),
        (&["cat", "web01/latest/xvda1:none", "web01/latest/xvda1:kinds/linked"], 3, "there is no 'none' in '/'"),
        (&["cat", "web01/latest/xvda1:none", "web01/latest/xvda1:neither"], 1, "there is no 'neither' in '/'"),
        (&["cp", "web01/latest/xvda1:none", destination], 1, "there is no 'none' in '/'"),
        (&["cp", "web01/latest/xvda1:none", "web01/latest/xvda1:kinds/linked", destination], 3, "there is no 'none'"),
        (&["cp", "web01/latest/xvda1:kinds/linked", destination], 1, "linked: it exists already"),
        (&["cp", "web01/latest/xvda1:kinds/linked", "/nonexistent/folder/"], 2, "does not exist: make it first"),
        (&["cp", destination], 2, "SOURCE"),
        (&["tar", "web01/latest/xvda1", "web01/latest/xvda2"], 2, "an archive is of one volume"),
        (&["tar", "-o", "/nonexistent/a.tar", "web01/latest/xvda1:none"], 1, "there is no 'none' in '/'"),
        (&["ls", "/nonexistent/repository", "web01/latest"], 10, "'/nonexistent/repository' does not exist"),
    ] {
        let (found, _, stderr) = run(xofs().args(arguments).env("XOFS_REPOSITORY", &world.repository));
        assert_eq!(found, code, "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}

#[test]
fn what_exists_is_left_alone_and_nothing_leads_out_of_the_destination() {
    let world = world();
    let copies = folder();
    let place = |name: &str| copies.path().join(name);
    fs::create_dir_all(place("into")).unwrap();
    fs::create_dir(place("elsewhere")).unwrap();
    symlink(place("elsewhere"), place("into/contents")).unwrap();
    symlink(place("elsewhere/made"), place("into/linked")).unwrap();
    fs::create_dir(place("into/links")).unwrap();
    fs::write(place("into/links/above"), "mine").unwrap();
    let into = place("into");
    let copy = |arguments: &[&str], sources: &[&str]| {
        run(command(&world, "cp").args(arguments).args(sources.iter().map(|path| at(path))).arg(&into))
    };
    let (code, _, stderr) = copy(&[], &["contents", "kinds/linked", "links"]);
    assert_eq!(code, 3, "{stderr}");
    assert_eq!(stderr.lines().count(), 3, "{stderr}");
    assert!(stderr.contains("xvda1:/contents: something that is no folder has that name already"), "{stderr}");
    assert_eq!(fs::read_dir(place("elsewhere")).unwrap().count(), 0);
    assert_eq!(fs::read(place("into/links/above")).unwrap(), b"mine");
    assert_eq!(fs::read_link(place("into/links/absolute")).unwrap(), Path::new("/contents/size-60"));
    // Replaced are files and links, themselves; a link that stands for a folder is not.
    let (code, _, stderr) = copy(&["--force"], &["contents", "kinds/linked", "links"]);
    assert_eq!((code, stderr.lines().count()), (3, 1), "{stderr}");
    assert_eq!(fs::read_dir(place("elsewhere")).unwrap().count(), 0);
    assert_eq!(fs::read(place("into/linked")).unwrap(), b"many names");
    assert!(fs::symlink_metadata(place("into/linked")).unwrap().is_file());
    assert_eq!(fs::read_link(place("into/links/above")).unwrap(), Path::new("../../../../contents/size-61"));
    // As new files: of who runs it, now.
    succeed(command(&world, "cp").args(["--no-preserve"]).arg(at("owners")).arg(place("new")));
    for (path, file) in of_mount(&place("new")) {
        assert_eq!((file.attributes.uid, file.attributes.mode & 0o7022), (0, 0), "{}", path.escape_ascii());
        assert!(file.xattrs.is_empty());
    }
}

/// A copy of the repository in which the block of the backup is damaged that holds the middle of `/big`.
fn damaged(world: &World) -> TempDir {
    let debugfs = |request: &str| {
        let image = format!("{}?offset=1048576", world.image.display());
        succeed(Command::new("debugfs").args(["-R", request]).arg(image))
    };
    let stats = debugfs("stats -h");
    let size = stats.lines().find_map(|line| line.strip_prefix("Block size:")).unwrap();
    let size: u64 = size.trim().parse().unwrap();
    let block: u64 = debugfs(&format!("bmap /big {}", 6_000_000 / size)).trim().parse().unwrap();
    let number = ((1 << 20) + block * size) / (2 << 20);
    let copy = copy_of(&world.repository);
    let mut all = Vec::new();
    walk(copy.path(), &mut all);
    let ends = format!("blocks/{}/{}", number / 1000, number % 1000);
    let path = all.iter().find(|path| path.ends_with(&ends)).unwrap();
    fs::write(path, "no brotli").unwrap();
    copy
}

#[test]
fn what_cannot_be_read_is_said_and_the_rest_is_whole() {
    let world = world();
    let repository = damaged(&world);
    let copies = folder();
    let xofs = |name: &str| {
        let mut command = command(&world, name);
        command.env("XOFS_REPOSITORY", repository.path());
        command
    };
    let (code, _, stderr) = run(xofs("cp").arg(at("")).arg(copies.path().join("copy")));
    assert_eq!(code, 3, "{stderr}");
    let mut lost: Vec<&str> = stderr.lines().map(|line| line.split(": ").nth(1).unwrap()).collect();
    assert!(lost.contains(&"web01/latest/xvda1:/big"), "{stderr}");
    let mut truth = without_what_cannot_be_set(&world.truth);
    lost.retain(|place| truth.remove(place.strip_prefix("web01/latest/xvda1:/").unwrap().as_bytes()).is_some());
    assert_eq!(lost.len(), stderr.lines().count(), "{stderr}");
    assert_same(&truth, &without_what_cannot_be_set(&of_mount(&copies.path().join("copy"))));
    // In an archive it is not whole, which stands there, too.
    let archive = copies.path().join("big.tar");
    let (code, _, stderr) = run(xofs("tar").args([at("big"), at("times")]).arg("-o").arg(&archive));
    assert_eq!((code, stderr.lines().count()), (3, 1), "{stderr}");
    assert!(stderr.contains("web01/latest/xvda1:/big: ") && stderr.contains("the rest of it as zeroes"), "{stderr}");
    let names = succeed(Command::new("tar").arg("-tf").arg(&archive));
    assert!(names.starts_with("big\nbig.xofs-damaged\ntimes/\n"), "{names}");
    let note = succeed(Command::new("tar").arg("-xOf").arg(&archive).arg("big.xofs-damaged"));
    assert!(note.starts_with("big is not whole: "), "{note}");
    // Of one file it is the exit code of damage.
    for arguments in [&["cat"][..], &["cp"]] {
        let mut command = xofs(arguments[0]);
        command.arg(at("big"));
        if arguments == ["cp"] {
            command.arg(copies.path().join("one"));
        }
        let output = command.stdout(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(13), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!copies.path().join("one").exists());
    }
}

/// Runs a command as nobody.
fn as_nobody(command: &Command) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            setpriv.env(name, value);
        }
    }
    setpriv
}

#[test]
fn without_root_all_but_owners_and_devices_is_copied() {
    let world = world();
    let copies = tempfile::tempdir().unwrap();
    fs::set_permissions(copies.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let binary = copies.path().join("xofs");
    fs::copy(env!("CARGO_BIN_EXE_xofs"), &binary).unwrap();
    let repository = copies.path().join("repository");
    succeed(Command::new("cp").arg("-r").arg(&world.repository).arg(&repository));
    succeed(Command::new("chmod").args(["-R", "a+rX"]).arg(&repository));
    let mut copy = Command::new(&binary);
    copy.arg("cp")
        .arg(at("kinds"))
        .arg(at("attributes"))
        .arg(copies.path())
        .env("XOFS_REPOSITORY", &repository)
        .env("HOME", "/");
    let (code, _, stderr) = run(&mut as_nobody(&copy));
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.lines().all(|line| line.ends_with("it is a device, which only root can make")), "{stderr}");
    assert_eq!(stderr.lines().count(), 5, "{stderr}");
    for name in ["kinds", "attributes"] {
        let mut truth = without_what_cannot_be_set(&below(&world.truth, name));
        let mut shown = without_what_cannot_be_set(&of_mount(&copies.path().join(name)));
        truth
            .retain(|_, file| !matches!(file.attributes.kind, guest::Kind::BlockDevice | guest::Kind::CharacterDevice));
        for file in truth.values_mut().chain(shown.values_mut()) {
            (file.attributes.uid, file.attributes.gid) = (0, 0);
            file.attributes.mode &= 0o1777;
            file.xattrs.retain(|name, _| name.starts_with(b"user.") || name.starts_with(b"system."));
        }
        let differences = guest_world::compare::tree::differences(&truth, &shown, None);
        assert!(differences.is_empty(), "{}", differences.join("\n"));
    }
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            walk(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn a_copy_that_is_killed_leaves_no_half_file() {
    require_root();
    let world = world();
    let mut random = Random::new(Random::seed());
    let mut cut = 0;
    for round in 0..12 {
        let copies = folder();
        let mut child =
            command(&world, "cp").arg(at("contents")).arg(copies.path()).stderr(Stdio::null()).spawn().unwrap();
        let is_asked = round % 2 == 0;
        // From when there is something.
        while child.try_wait().unwrap().is_none() && !copies.path().join("contents").exists() {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_micros(random.below(300_000)));
        succeed(Command::new("sh").arg("-c").arg(format!(
            "kill -{} {} || true",
            if is_asked { "TERM" } else { "KILL" },
            child.id()
        )));
        let status = child.wait().unwrap();
        cut += usize::from(!status.success());
        assert!(!is_asked || matches!(status.code(), Some(0 | 130)), "{status}");
        let mut left = Vec::new();
        walk(copies.path(), &mut left);
        let shown = of_mount(copies.path());
        for path in left {
            let path = path.strip_prefix(copies.path()).unwrap();
            if path.file_name().unwrap().as_bytes().ends_with(b".part") {
                assert!(!is_asked, "{} is left", path.display());
                continue;
            }
            let bytes = path.as_os_str().as_bytes();
            let (copy, truth) = (&shown[bytes], &world.truth[bytes]);
            assert_eq!(
                (copy.content, copy.attributes.size),
                (truth.content, truth.attributes.size),
                "{}",
                path.display()
            );
            assert_eq!(
                (copy.attributes.mode, copy.attributes.modified),
                (truth.attributes.mode, truth.attributes.modified)
            );
        }
    }
    assert!(cut > 0, "all were done before they were killed");
}

#[test]
fn a_name_that_is_not_utf_8_is_named_as_it_is() {
    let world = world();
    let copies = folder();
    let name = OsStr::from_bytes(b"latin-\xe9");
    let path = OsString::from_vec([at("/names/").as_bytes(), name.as_bytes()].concat());
    succeed(command(&world, "cp").arg(path).arg(copies.path()));
    assert!(copies.path().join(name).is_file());
}
