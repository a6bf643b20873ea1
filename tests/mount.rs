//! A repository made here, mounted through the library, and looked at as programs do.
//!
//! Needs `/dev/fuse`, and `qemu-img` to make the VHDs: they are not written by what reads them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, SeekFrom, XattrFlags};
use serde_json::{Value, json};
use tempfile::TempDir;
use xofs::mount::{self, ErrorKind, MountOptions, Session};
use xofs::repository::{OpenOptions, Repository};

const VM: &str = "1f2e3d4c-5b6a-4788-9900-aabbccddeeff";
const OTHER_VM: &str = "1f2e3d4c-0000-4788-9900-aabbccddeeff";
const FIRST: &str = "20261119T030007Z";
const SECOND: &str = "20261120T030007Z";
const FIRST_SHOWN: &str = "2026-11-19T030007Z";
const SECOND_SHOWN: &str = "2026-11-20T030007Z";
const MIB: u64 = 1 << 20;
/// Three blocks of 2 MiB: data, a hole, data up to the middle.
const SIZE: u64 = 6 * MIB;

/// A repository and a mountpoint in one folder, gone when dropped.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("mount ,").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(folder.path().join("mnt")).unwrap();
        Self { folder }
    }

    fn mountpoint(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join("mnt")
    }

    fn repository(&self) -> PathBuf {
        self.folder.path().join("repo")
    }

    fn vm(&self, vm: &str) -> PathBuf {
        self.repository().join("xo-vm-backups").join(vm)
    }

    fn metadata(&self, vm: &str, time: &str) -> PathBuf {
        self.vm(vm).join(format!("{time}.json"))
    }

    fn vhd(&self, vm: &str, time: &str) -> PathBuf {
        self.vm(vm).join("vdis/job/vdi").join(format!("{time}.vhd"))
    }

    /// Adds a backup with one disk that holds [`content`].
    fn add_backup(&self, vm: &str, name: &str, time: &str) {
        let vhd = self.vhd(vm, time);
        fs::create_dir_all(vhd.parent().unwrap()).unwrap();
        let raw = self.folder.path().join("disk.raw");
        let file = File::create(&raw).unwrap();
        file.set_len(SIZE).unwrap();
        let bytes = content();
        file.write_all_at(&bytes[..1 << 20], 0).unwrap();
        file.write_all_at(&bytes[4 << 20..5 << 20], 4 * MIB).unwrap();
        let status = Command::new("qemu-img")
            .args(["convert", "-q", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on"])
            .args([&raw, &vhd])
            .status()
            .expect("qemu-img is installed; scripts/setup does it");
        assert!(status.success());
        let metadata = json!({
            "mode": "delta", "version": "2.0.0", "jobId": "job", "scheduleId": "schedule", "size": SIZE,
            "timestamp": 0, "vm": {"uuid": vm, "name_label": name}, "isVhdDifferencing": {"OpaqueRef:1": false},
            "vdis": {"OpaqueRef:1": {
                "uuid": "a67ec284-6e18-4649-8455-5cc3d9a848f3", "name_label": "system", "name_description": "of web",
                "virtual_size": SIZE,
            }},
            "vbds": {"OpaqueRef:2": {"VDI": "OpaqueRef:1", "device": "xvda", "userdevice": "0", "type": "Disk"}},
            "vhds": {"OpaqueRef:1": format!("vdis/job/vdi/{time}.vhd")},
        });
        fs::write(self.metadata(vm, time), metadata.to_string()).unwrap();
    }

    fn mount(&self) -> Session {
        self.mount_with(MountOptions::default())
    }

    fn mount_with(&self, options: MountOptions) -> Session {
        let repository = Repository::open(&self.repository(), OpenOptions::default()).unwrap();
        let fsname = self.repository().display().to_string();
        mount::mount(repository, &self.mountpoint(), MountOptions { fsname, ..options }).unwrap()
    }

    fn disks(&self, time: &str) -> PathBuf {
        self.mountpoint().join("by-uuid").join(VM).join(time).join("disks")
    }

    fn raw(&self) -> PathBuf {
        self.disks(SECOND_SHOWN).join("xvda.raw")
    }
}

/// The bytes of every disk.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    for range in [0..1 << 20, 4 << 20..5 << 20] {
        for index in range {
            bytes[index] = u8::try_from(index % 251).unwrap() | 1;
        }
    }
    bytes
}

fn one_vm() -> Place {
    let place = Place::new();
    place.add_backup(VM, "web01", FIRST);
    place.add_backup(VM, "web01", SECOND);
    place
}

fn is_mounted(path: &Path) -> bool {
    let escaped = path.display().to_string().replace(' ', "\\040");
    let table = fs::read_to_string("/proc/mounts").unwrap();
    table.lines().any(|line| line.split(' ').nth(1) == Some(&escaped))
}

fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn xattr(path: &Path, name: &str) -> rustix::io::Result<String> {
    let mut buffer = [0; 256];
    let len = rustix::fs::getxattr(path, name, &mut buffer[..])?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

/// Tries until it holds: what changes in a repository shows after the second in which it is believed unchanged.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn every_name_of_the_tree_leads_where_it_says() {
    let place = one_vm();
    place.add_backup(OTHER_VM, "../a/b", FIRST);
    let session = place.mount();
    let root = place.mountpoint();
    assert_eq!(names(&root), [".xofs", "by-date", "by-uuid", "config", "pools", "vms"]);
    let vms = names(root.join("vms"));
    assert_eq!(vms.len(), 2);
    let web = "web01~1f2e3d4c";
    let other = vms.iter().find(|name| *name != web).unwrap();
    assert!(!other.contains('/') && other.ends_with("~1f2e3d4c"), "{other}");
    assert_eq!(names(root.join("vms").join(other)), [FIRST_SHOWN, "latest"]);
    assert_eq!(names(root.join("vms").join(web)), [FIRST_SHOWN, SECOND_SHOWN, "latest"]);
    assert_eq!(fs::read_link(root.join("vms").join(web).join("latest")).unwrap(), Path::new(SECOND_SHOWN));
    assert_eq!(fs::read_link(root.join("by-uuid").join(VM)).unwrap(), Path::new("../vms").join(web));
    assert_eq!(names(root.join("by-date")), ["2026-11-19", "2026-11-20"]);
    assert_eq!(names(root.join("by-date/2026-11-20")), [format!("030007Z-{web}")]);
    let dated = root.join("by-date/2026-11-20").join(format!("030007Z-{web}"));
    assert_eq!(names(&dated), ["backup.json", "disks", "files", "volumes"]);
    assert_eq!(names(dated.join("disks")), ["xvda.raw", "xvda.vhd"]);
    assert_eq!(fs::read(dated.join("backup.json")).unwrap(), fs::read(place.metadata(VM, SECOND)).unwrap());
    let status: Value = serde_json::from_slice(&fs::read(root.join(".xofs/status.json")).unwrap()).unwrap();
    assert_eq!(status["vms"], json!(2));
    assert_eq!(fs::read(root.join(".xofs/problems.json")).unwrap(), b"[]\n");
    for missing in ["vms/web", "by-uuid/x", "by-date/2026-11-21", "by-date/2026-11-20/030008Z-web01", ".xofs/x", "x"] {
        assert_eq!(errno(fs::metadata(root.join(missing))), Some(libc::ENOENT), "{missing}");
    }
    drop(session);
    assert!(!is_mounted(&root));
}

// Promise 3: "has exactly the virtual size of the disk"
#[test]
fn a_disk_reads_as_it_was_in_every_size_of_request() {
    let place = one_vm();
    let session = place.mount();
    let expected = content();
    assert!(fs::read(place.raw()).unwrap() == expected);
    let file = File::open(place.raw()).unwrap();
    for (offset, len) in [(0, 1), (1 << 20, 1), ((1 << 20) - 1, 2), (4 << 20, 3 << 20), (511, 513), (0, 6 << 20)] {
        let mut buffer = vec![0xAA; len];
        let end = (offset + len).min(expected.len());
        let count = file.read_at(&mut buffer, offset as u64).unwrap();
        assert_eq!((count, buffer[..count] == expected[offset..end]), (end - offset, true), "{offset} {len}");
    }
    assert_eq!(file.read_at(&mut [0; 8], SIZE).unwrap(), 0);
    // The same disk as one VHD, read back by another program.
    let copy = place.folder.path().join("copy.raw");
    let vhd = place.disks(SECOND_SHOWN).join("xvda.vhd");
    let status = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "vpc", "-O", "raw"])
        .args([&vhd, &copy])
        .status()
        .unwrap();
    assert!(status.success());
    assert!(fs::read(&copy).unwrap() == expected);
    drop((file, session));
    assert!(!is_mounted(&place.mountpoint()));
}

// Promise 5: "`mtime` is the time of the backup."
// Promise 14: "owned by who mounted it: folders `0500`, files `0400`"
#[test]
fn stat_tells_size_allocation_time_and_owner() {
    let place = one_vm();
    let session = place.mount_with(MountOptions { uid: Some(12), gid: Some(34), ..MountOptions::default() });
    let disk = fs::metadata(place.raw()).unwrap();
    // Two of three blocks of 2 MiB are stored.
    assert_eq!((disk.len(), disk.blocks() * 512), (SIZE, 4 * MIB));
    assert_eq!((disk.uid(), disk.gid(), disk.permissions().mode() & 0o777), (12, 34, 0o400));
    // 2026-11-20 03:00:07 UTC.
    assert_eq!(disk.mtime(), 1_795_143_607);
    let directory = fs::metadata(place.disks(SECOND_SHOWN)).unwrap();
    assert_eq!((directory.mtime(), directory.permissions().mode() & 0o777), (1_795_143_607, 0o500));
    assert_eq!(fs::metadata(place.raw()).unwrap().ino(), disk.ino());
    assert_ne!(fs::metadata(place.disks(FIRST_SHOWN).join("xvda.raw")).unwrap().ino(), disk.ino());
    assert_eq!(errno(fs::write(place.raw(), "x")), Some(libc::EROFS));
    drop(session);
}

// Promise 4: "What no layer holds is a hole"
#[test]
fn holes_are_found_without_reading_them() {
    let place = one_vm();
    let session = place.mount();
    let file = File::open(place.raw()).unwrap();
    for (from, to) in [
        (SeekFrom::Data(0), Ok(0)),
        (SeekFrom::Hole(0), Ok(2 * MIB)),
        (SeekFrom::Data(2 * MIB), Ok(4 * MIB)),
        (SeekFrom::Hole(3 * MIB), Ok(3 * MIB)),
        (SeekFrom::Hole(4 * MIB), Ok(SIZE)),
        (SeekFrom::Data(SIZE), Err(rustix::io::Errno::NXIO)),
        (SeekFrom::Hole(SIZE), Err(rustix::io::Errno::NXIO)),
    ] {
        assert_eq!(rustix::fs::seek(&file, from), to, "{from:?}");
    }
    drop((file, session));
}

#[test]
#[expect(unsafe_code, reason = "mapping a file is a system call")]
fn a_disk_can_be_mapped_into_memory() {
    use std::os::fd::AsRawFd;

    let place = one_vm();
    let session = place.mount();
    let file = File::open(place.raw()).unwrap();
    let len = usize::try_from(SIZE).unwrap();
    for sharing in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        // SAFETY: a new mapping at a place of the kernel's choice, checked before it is used, and unmapped after.
        unsafe {
            let address = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, sharing, file.as_raw_fd(), 0);
            assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            let is_equal = std::slice::from_raw_parts(address.cast::<u8>(), len) == content();
            libc::munmap(address, len);
            assert!(is_equal);
        }
    }
    drop((file, session));
}

#[test]
fn extended_attributes_say_what_a_disk_is() {
    let place = one_vm();
    let session = place.mount();
    let raw = place.raw();
    let mut buffer = [0; 1024];
    let len = rustix::fs::listxattr(&raw, &mut buffer[..]).unwrap();
    let mut listed: Vec<&str> =
        std::str::from_utf8(&buffer[..len]).unwrap().split('\0').filter(|name| !name.is_empty()).collect();
    listed.sort_unstable();
    let expected = ["allocated", "chain", "description", "name", "uuid"].map(|name| format!("user.xofs.{name}"));
    assert_eq!(listed, expected);
    assert_eq!(rustix::fs::listxattr(&raw, &mut buffer[..len - 1]), Err(rustix::io::Errno::RANGE));
    assert_eq!(xattr(&raw, "user.xofs.allocated"), Ok((4 * MIB).to_string()));
    assert_eq!(xattr(&raw, "user.xofs.chain"), Ok("1".to_owned()));
    assert_eq!(xattr(&raw, "user.xofs.name"), Ok("system".to_owned()));
    assert_eq!(xattr(&raw, "user.xofs.description"), Ok("of web".to_owned()));
    for absent in ["user.xofs.parent", "user.xofs.problem", "user.other"] {
        assert_eq!(xattr(&raw, absent), Err(rustix::io::Errno::NODATA), "{absent}");
    }
    assert_eq!(xattr(&place.disks(SECOND_SHOWN), "user.xofs.uuid"), Err(rustix::io::Errno::NODATA));
    let set = rustix::fs::setxattr(&raw, "user.xofs.name", b"x", XattrFlags::empty());
    assert_eq!(set, Err(rustix::io::Errno::ROFS));
    drop(session);
}

// Promise 7: "A backup that appears in the repository appears in the mount, and one that is removed disappears, without a remount"
// Promise 9: "A file open on a backup that has been removed gives right bytes or an error"
#[test]
fn what_appears_and_leaves_shows_and_a_removed_backup_is_stale() {
    let place = one_vm();
    let session = place.mount();
    let vm = place.mountpoint().join("by-uuid").join(VM);
    // Without the page cache, which would answer what was read before.
    let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap();
    let mut first = File::options();
    let first = first.read(true).custom_flags(direct).open(place.disks(FIRST_SHOWN).join("xvda.raw")).unwrap();
    let mut buffer = [0; 512];
    first.read_exact_at(&mut buffer, 0).unwrap();
    place.add_backup(VM, "web01", "20261121T030007Z");
    eventually("a new backup", || names(&vm).contains(&"2026-11-21T030007Z".to_owned()));
    eventually("latest follows", || fs::read_link(vm.join("latest")).unwrap() == Path::new("2026-11-21T030007Z"));
    fs::remove_file(place.metadata(VM, FIRST)).unwrap();
    fs::remove_file(place.vhd(VM, FIRST)).unwrap();
    eventually("the removed backup is gone", || !names(&vm).contains(&FIRST_SHOWN.to_owned()));
    eventually("its name too", || errno(fs::metadata(vm.join(FIRST_SHOWN))) == Some(libc::ENOENT));
    eventually("its handle is stale", || errno(first.read_exact_at(&mut [0; 512], 0)) == Some(libc::ESTALE));
    assert!(fs::read(place.raw()).unwrap() == content());
    drop((first, session));
}

// Promise 12: "A backup that cannot be read is listed, with the reason in `.xofs/problems.json`."
#[test]
fn a_damaged_backup_is_listed_and_says_why_it_cannot_be_read() {
    let place = one_vm();
    fs::write(place.vhd(VM, FIRST), b"no VHD").unwrap();
    fs::write(place.metadata(VM, "20261118T030007Z"), b"{ no JSON").unwrap();
    let session = place.mount();
    let vm = place.mountpoint().join("by-uuid").join(VM);
    assert_eq!(names(&vm), ["2026-11-18T030007Z", FIRST_SHOWN, SECOND_SHOWN, "latest"]);
    assert_eq!(fs::read(vm.join("2026-11-18T030007Z/backup.json")).unwrap(), b"{ no JSON");
    assert_eq!(names(vm.join("2026-11-18T030007Z/disks")), Vec::<String>::new());
    let broken = place.disks(FIRST_SHOWN).join("xvda.raw");
    // The size is what the metadata says.
    assert_eq!(fs::metadata(&broken).unwrap().len(), SIZE);
    assert_eq!(errno(File::open(&broken)), Some(libc::EIO));
    assert!(!xattr(&broken, "user.xofs.problem").unwrap().is_empty());
    let problems: Value =
        serde_json::from_slice(&fs::read(place.mountpoint().join(".xofs/problems.json")).unwrap()).unwrap();
    let backups: Vec<&str> = problems.as_array().unwrap().iter().filter_map(|found| found["backup"].as_str()).collect();
    assert_eq!(backups, ["2026-11-18T030007Z", FIRST_SHOWN].map(|time| format!("{VM}/{time}")));
    assert!(fs::read(place.raw()).unwrap() == content());
    drop(session);
}

#[test]
fn a_folder_of_vhds_shows_its_disks_in_the_root() {
    let place = one_vm();
    let folder = place.folder.path().join("loose");
    fs::create_dir(&folder).unwrap();
    fs::copy(place.vhd(VM, FIRST), folder.join("server.vhd")).unwrap();
    let repository = Repository::open(&folder, OpenOptions::default()).unwrap();
    let session = mount::mount(repository, &place.mountpoint(), MountOptions::default()).unwrap();
    assert_eq!(names(place.mountpoint()), [".xofs", "server.raw", "server.vhd"]);
    assert!(fs::read(place.mountpoint().join("server.raw")).unwrap() == content());
    drop(session);
}

// Promise 16: "end the mount and leave nothing"
#[test]
fn a_mount_ends_when_told_and_leaves_nothing() {
    let place = one_vm();
    let session = place.mount();
    assert!(is_mounted(&place.mountpoint()));
    // A comma in the source would be read as another option.
    let table = fs::read_to_string("/proc/mounts").unwrap();
    assert!(table.lines().any(|line| line.contains("%2C") && line.contains(" fuse.xofs ro,nosuid,nodev")));
    let unmounter = session.unmounter();
    let waiting = std::thread::spawn(move || session.wait());
    unmounter.unmount().unwrap();
    waiting.join().unwrap().unwrap();
    assert!(!is_mounted(&place.mountpoint()));
    unmounter.unmount().unwrap();
    assert_eq!(mount::unmount(&place.mountpoint()).unwrap_err().kind(), ErrorKind::NotMounted);
    // Again, ended from outside.
    let session = place.mount();
    mount::unmount(&place.mountpoint()).unwrap();
    session.wait().unwrap();
    assert!(!is_mounted(&place.mountpoint()));
}

#[test]
fn a_mount_in_use_is_detached_and_its_open_file_reads_on() {
    let place = one_vm();
    let session = place.mount();
    let file = File::open(place.raw()).unwrap();
    session.unmounter().unmount().unwrap();
    assert!(!is_mounted(&place.mountpoint()));
    let mut buffer = vec![0; 4096];
    file.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(buffer, content()[..4096]);
    drop(file);
    session.wait().unwrap();
}

#[test]
fn a_mount_that_took_the_place_of_another_is_left_alone_by_it() {
    let place = one_vm();
    for _ in 0..20 {
        let first = place.mount();
        mount::unmount(&place.mountpoint()).unwrap();
        let second = place.mount();
        first.wait().unwrap();
        assert!(is_mounted(&place.mountpoint()));
        assert!(place.raw().exists());
        drop(second);
        assert!(!is_mounted(&place.mountpoint()));
    }
}

#[test]
fn a_place_that_is_no_directory_is_refused() {
    let place = one_vm();
    let file = place.folder.path().join("file");
    fs::write(&file, "").unwrap();
    for mountpoint in [place.folder.path().join("absent"), file] {
        let repository = Repository::open(&place.repository(), OpenOptions::default()).unwrap();
        let error = mount::mount(repository, &mountpoint, MountOptions::default()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Mountpoint, "{error}");
    }
}
