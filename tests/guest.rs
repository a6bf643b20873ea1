//! What lies in the disks of a guest, seen through a mount as programs see it.
//!
//! The truth is the kernel's own mount of the same volume; so these tests need root and loop devices.

mod guest_world;
mod support;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest_world::compare::generator::{self, Amount};
use guest_world::compare::image::{Loop, Mount, sparse};
use guest_world::compare::tree::{Shown, Tree, content_of};
use guest_world::compare::{Random, rounds};
use guest_world::{MIB, VM, assert_same, of_mount, without_what_cannot_be_set, world};
use rustix::process::{Pid, Signal, kill_process};
use support::{Mounted, init, succeed, xofs};

fn backup(mounted: &Mounted) -> PathBuf {
    mounted.path().join("by-uuid").join(VM).join("latest")
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

fn xattr(path: &Path, name: &str) -> rustix::io::Result<String> {
    let mut buffer = vec![0; 4096];
    let len = rustix::fs::getxattr(path, name, &mut buffer[..])?;
    Ok(String::from_utf8(buffer[..len].to_vec()).unwrap())
}

// Promise 20: "Names, sizes, times (also before 1970 and after 2038, to the nanosecond where the guest keeps it), hard links"
#[test]
fn a_mount_shows_every_file_as_the_kernel_does() {
    let world = world();
    let mounted = Mounted::with_arguments(&world.repository, None, &["--owner", "guest"]);
    assert_same(&world.truth, &of_mount(&backup(&mounted).join("files/xvda1")));
}

#[test]
fn what_was_listed_of_a_guest_is_not_asked_for_again() {
    let world = world();
    let mounted = Mounted::new(&world.repository, None);
    let backup = backup(&mounted);
    let names = |folder: &str| fs::read_dir(backup.join(folder)).unwrap().count();
    // What is not known of a name when it is listed is asked for after that.
    let (files, volumes, disks) = (names("files"), names("volumes"), names("disks"));
    assert_eq!((files, volumes, disks, names("")), (3, 5, 2, 4));
    assert_eq!(fs::metadata(backup.join("volumes/xvda1.raw")).unwrap().len(), 96 * MIB);
    assert_eq!(fs::metadata(backup.join("disks/xvda.raw")).unwrap().len(), 128 * MIB);
    assert!(fs::metadata(backup.join("files/xvda1")).unwrap().is_dir());
    let prefix = b"names/large/";
    let below =
        world.truth.iter().filter(|(path, _)| path.starts_with(prefix) && !path[prefix.len()..].contains(&b'/'));
    let paths: Vec<_> = below.map(|(path, file)| (path[prefix.len()..].to_vec(), file.attributes.size)).collect();
    let folder = backup.join("files/xvda1/names/large");
    let found = fs::read_dir(&folder).unwrap().count();
    // More than come in one piece.
    assert_eq!((found, found > 2000), (paths.len(), true));
    // Of a mount that nobody serves only the kernel answers.
    let server = Pid::from_raw(i32::try_from(mounted.process()).unwrap()).unwrap();
    kill_process(server, Signal::STOP).unwrap();
    let (sends, looked) = std::sync::mpsc::channel();
    let looking = thread::spawn(move || {
        let size = |name: &[u8]| fs::symlink_metadata(folder.join(std::ffi::OsStr::from_bytes(name))).unwrap().len();
        sends.send(paths.iter().filter(|(name, expected)| size(name) != *expected).count()).unwrap();
    });
    let wrong = looked.recv_timeout(Duration::from_secs(10));
    kill_process(server, Signal::CONT).unwrap();
    looking.join().unwrap();
    assert_eq!(wrong, Ok(0));
}

#[test]
fn two_volumes_are_read_at_once_with_one_worker() {
    let world = world();
    let mounted = Mounted::with_arguments(&world.repository, None, &["--owner", "guest", "--guest-workers", "1"]);
    let files = backup(&mounted).join("files");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let other = files.join("xvda5/lost+found");
            while !is_over.load(Ordering::Relaxed) {
                // Of which nothing is kept.
                let found = rustix::fs::getxattr(&other, "user.none", &mut [0; 8][..]);
                assert_eq!(found, Err(rustix::io::Errno::NODATA));
                thread::sleep(Duration::from_millis(50));
            }
        });
        assert_same(&world.truth, &of_mount(&files.join("xvda1")));
        is_over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn what_is_copied_out_is_what_the_guest_had() {
    let world = world();
    let mounted = Mounted::with_arguments(&world.repository, None, &["--owner", "guest"]);
    let copies = tempfile::tempdir_in(support::scratch()).unwrap();
    let from = backup(&mounted).join("files/xvda1");
    succeed(Command::new("cp").args(["-a", "--sparse=auto"]).arg(&from).arg(copies.path().join("cp")));
    let mut rsync = Command::new("rsync");
    succeed(rsync.args(["-aHAXS", "--numeric-ids"]).arg(from.join("")).arg(copies.path().join("rsync")));
    for name in ["cp", "rsync"] {
        let copy = of_mount(&copies.path().join(name));
        assert_same(&without_what_cannot_be_set(&world.truth), &without_what_cannot_be_set(&copy));
    }
}

// Promise 20: "who mounts may read everything"
// Promise 21: "`--inert-symlinks` shows them as small text files."
#[test]
fn who_mounts_may_read_all_and_links_can_be_made_inert() {
    let world = world();
    let mounted = Mounted::with_arguments(&world.repository, None, &["--inert-symlinks"]);
    let shown = of_mount(&backup(&mounted).join("files/xvda1"));
    let own = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    for (path, file) in &shown {
        let path = path.escape_ascii();
        let attributes = &file.attributes;
        assert_eq!((attributes.uid, attributes.gid), own, "{path}");
        let wanted = if attributes.kind == guest::Kind::Directory { 0o500 } else { 0o400 };
        assert_eq!(attributes.mode & (0o7077 | wanted), wanted, "{path}: {:o}", attributes.mode);
        assert_ne!(attributes.kind, guest::Kind::Symlink, "{path}");
    }
    let links = world.truth.iter().filter(|(_, file)| file.attributes.kind == guest::Kind::Symlink);
    let mut count = 0;
    for (path, file) in links {
        let path = backup(&mounted).join("files/xvda1").join(std::ffi::OsStr::from_bytes(path));
        assert_eq!(fs::read(&path).unwrap(), file.target, "{}", path.display());
        count += 1;
    }
    assert!(count > 3, "{count} links");
}

// Promise 18: "its attribute `user.xofs.problem` says why and what to do."
#[test]
fn volumes_are_disks_and_what_is_not_read_says_what_to_do() {
    let world = world();
    let mounted = Mounted::new(&world.repository, None);
    let backup = backup(&mounted);
    assert_eq!(names(&backup.join("volumes")), ["xvda1.raw", "xvda2.raw", "xvda3.raw", "xvda4.raw", "xvda5.raw"]);
    assert_eq!(names(&backup.join("files")), ["xvda1", "xvda4", "xvda5"]);
    // A root that is a link would lead out of the mount.
    assert!(fs::symlink_metadata(backup.join("files/xvda4")).unwrap().is_dir());
    let listed = fs::read_dir(backup.join("files/xvda4")).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    assert!(listed.is_err(), "{listed:?}");
    let xattr = |path: &str, name: &str| xattr(&backup.join(path), name);
    assert_eq!(xattr("volumes/xvda1.raw", "user.xofs.content").as_deref(), Ok("ext4"));
    assert_eq!(xattr("volumes/xvda2.raw", "user.xofs.content").as_deref(), Ok("LUKS1"));
    let advice = xattr("volumes/xvda2.raw", "user.xofs.problem").unwrap();
    assert!(advice.contains("volumes/xvda2.raw") && advice.contains("passphrase"), "{advice}");
    assert_eq!(xattr("volumes/xvda3.raw", "user.xofs.content").as_deref(), Ok("empty"));
    assert_eq!(xattr("files/xvda1", "user.xofs.replayed").as_deref(), Ok("false"));
    assert_eq!(fs::metadata(backup.join("volumes/xvda1.raw")).unwrap().len(), 96 * MIB);
    // The kernel mounts it, too.
    let shown = Mount::new(&backup.join("volumes/xvda1.raw"), "ext4", "ro,noload");
    assert_same(&world.truth, &of_mount(shown.path()));
}

#[test]
fn a_btrfs_on_two_disks_is_shown_once() {
    let folder = guest_world::compare::image::scratch();
    let images = ["xvda", "xvdb"].map(|name| folder.path().join(name));
    images.iter().for_each(|image| sparse(image, 256 * MIB));
    succeed(Command::new("mkfs.btrfs").args(["-q", "-d", "raid0", "-m", "raid1"]).args(&images));
    let mount = |options: &str, act: &dyn Fn(&Path) -> Tree| {
        let devices = images.each_ref().map(|image| Loop::new(image));
        let [first, second] = devices.each_ref().map(|device| device.path().display());
        let options = format!("noatime,device={first},device={second},{options}");
        act(Mount::of_device(devices[0].path(), "btrfs", &options).path())
    };
    mount("compress=zstd", &|root| {
        generator::fill(root, Amount { names: 2500, holes: 700 });
        fs::write(root.join("striped"), Random::new(11).bytes(3_000_000)).unwrap();
        Tree::new()
    });
    let truth = mount("ro", &of_mount);
    let repository = init(folder.path(), "repository", &[]);
    let mut ingest = xofs();
    ingest.args(["ingest", "--vm", VM, "--name", "web01", "--time", "20260801T020003Z"]);
    for (name, image) in ["xvda", "xvdb"].iter().zip(&images) {
        ingest.arg("--disk").arg(format!("{name}={}", image.display()));
    }
    succeed(ingest.arg("--repository").arg(&repository));

    let mounted = Mounted::with_arguments(&repository, None, &["--owner", "guest"]);
    let backup = backup(&mounted);
    assert_eq!(names(&backup.join("volumes")), ["xvda.raw", "xvdb.raw"]);
    assert_eq!(names(&backup.join("files")), ["xvda"]);
    assert_eq!(xattr(&backup.join("volumes/xvda.raw"), "user.xofs.content").as_deref(), Ok("Btrfs"));
    assert_eq!(xattr(&backup.join("volumes/xvdb.raw"), "user.xofs.content").as_deref(), Ok("Btrfs device of xvda"));
    let nothing = Err(rustix::io::Errno::NODATA);
    assert_eq!(xattr(&backup.join("volumes/xvdb.raw"), "user.xofs.problem"), nothing);
    assert_eq!(xattr(&backup.join("files/xvda"), "user.xofs.problem"), nothing);
    assert_same(&truth, &of_mount(&backup.join("files/xvda")));

    let listed = succeed(xofs().args(["ls", "--json"]).arg(&repository).arg(format!("{VM}/latest")));
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let facts = |volume: &serde_json::Value| ["name", "content", "isRead", "problem"].map(|key| volume[key].clone());
    let expected = serde_json::json!([["xvda", "Btrfs", true, null], ["xvdb", "Btrfs device of xvda", false, null]]);
    assert_eq!(
        serde_json::json!(listed["volumes"].as_array().unwrap().iter().map(facts).collect::<Vec<_>>()),
        expected
    );
    let read = xofs().arg("cat").arg(&repository).arg(format!("{VM}/latest/xvda:/striped")).output().unwrap();
    assert!(read.stdout == Random::new(11).bytes(3_000_000));
}

// Promise 19: "What cannot be is said in `user.xofs.problem` of the folder and in `.xofs/problems.json`"
#[test]
fn what_is_wrong_with_a_filesystem_is_said_once_for_as_long_as_its_backup_is_there() {
    let place = tempfile::tempdir_in(support::scratch()).unwrap();
    let disk = place.path().join("xvda");
    sparse(&disk, 8 * MIB);
    succeed(Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^metadata_csum"]).arg(&disk));
    // Features that no reader knows. Source: Linux, `s_feature_incompat` in `fs/ext4/ext4.h`.
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    file.write_all_at(&0x8000_0000_u32.to_le_bytes(), 1024 + 0x60).unwrap();
    let repository = init(place.path(), "repository", &[]);
    let mut ingest = xofs();
    ingest.args(["ingest", "--vm", VM, "--name", "web01", "--time", "20260801T020003Z", "--disk"]);
    succeed(ingest.arg(format!("xvda={}", disk.display())).arg("--repository").arg(&repository));
    let (_, listed, _) = support::run(xofs().arg("ls").arg(&repository).arg("web01/latest"));
    let mounted = Mounted::new(&repository, None);
    let root = backup(&mounted).join("files/xvda");
    let problems = || {
        let text = fs::read_to_string(mounted.path().join(".xofs/problems.json")).unwrap();
        text.lines().filter(|line| line.contains("volume xvda: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let folder = repository.join("xo-vm-backups").join(VM);
    let (metadata, away) = (folder.join("20260801T020003Z.json"), place.path().join("away"));
    let waits = |until: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !until() {
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}", problems());
            thread::sleep(Duration::from_millis(100));
        }
    };
    for _ in 0..2 {
        assert!(fs::read_dir(&root).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).is_err());
        let (said, found) = (xattr(&root, "user.xofs.problem").unwrap(), problems());
        assert_eq!((found.len(), found.iter().all(|line| line.contains(&said))), (1, true), "{said}: {found:?}");
        assert_eq!(listed.matches(&said).count(), 1, "{said}: {listed}");
        fs::rename(&metadata, &away).unwrap();
        waits(&|| !root.exists() && problems().is_empty());
        fs::rename(&away, &metadata).unwrap();
        waits(&|| root.exists());
    }
}

/// The workers of a mount, which is served by the process `server`.
fn workers(server: u32) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{server}/task")).unwrap();
    let children = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    let pids: Vec<i32> =
        children.flat_map(|line| line.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect();
    pids.into_iter().filter_map(Pid::from_raw).collect()
}

/// Looks at a file and reads it: returns whether it is what it was, or false after an EIO. Other bytes, a name that comes or goes, or a
/// mount that is gone are no answers.
fn is_right_or_fails(path: &Path, file: &Shown) -> bool {
    let answer = fs::symlink_metadata(path).and_then(|found| {
        if file.attributes.kind == guest::Kind::File {
            assert_eq!(found.len(), file.attributes.size, "{}", path.display());
            if found.len() < 8 * MIB {
                assert_eq!(content_of(&fs::read(path)?), file.content, "{}", path.display());
            }
        }
        Ok(())
    });
    match answer {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(5), "{}: {error}", path.display());
            false
        }
    }
}

// Promise 22: "One that dies, lies or does not end costs the request"
#[test]
fn a_mount_lives_on_when_its_workers_are_killed_at_any_moment() {
    let world = world();
    let mounted = Mounted::with_arguments(&world.repository, None, &["--owner", "guest"]);
    let folder = backup(&mounted).join("files/xvda1");
    let server = mounted.process();
    let is_over = AtomicBool::new(false);
    let seed = Random::seed();
    let read = AtomicU64::new(0);
    let failed = AtomicU64::new(0);
    thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut random = Random::new(seed);
            let mut killed = 0;
            while !is_over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(random.below(60_000)));
                killed += workers(server).into_iter().filter(|pid| kill_process(*pid, Signal::KILL).is_ok()).count();
            }
            killed
        });
        let readers: Vec<_> = (1..=4)
            .map(|reader| {
                let (folder, truth, read, failed) = (&folder, &world.truth, &read, &failed);
                scope.spawn(move || {
                    let mut random = Random::new(seed + reader);
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_secs(4 * rounds(1)) {
                        let skipped = usize::try_from(random.below(truth.len() as u64)).unwrap();
                        for (path, file) in truth.iter().skip(skipped).take(100) {
                            let done = is_right_or_fails(&folder.join(std::ffi::OsStr::from_bytes(path)), file);
                            let counter = if done { read } else { failed };
                            counter.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        let ended: Vec<_> = readers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        is_over.store(true, Ordering::Relaxed);
        let killed = killer.join().unwrap();
        println!("{killed} workers killed, {read:?} files right, {failed:?} errors");
        ended.into_iter().for_each(|ended| ended.unwrap());
        assert!(killed > 0, "no worker was there to be killed");
    });
    assert!(read.into_inner() > 0, "nothing could be read");
    // A volume whose workers failed so often is left alone for a minute; a mount anew is not.
    drop(mounted);
    let mounted = Mounted::with_arguments(&world.repository, None, &["--owner", "guest"]);
    assert_same(&world.truth, &of_mount(&backup(&mounted).join("files/xvda1")));
}
