//! Every disk of every fixture, read in each way that people read it, against the truth.
//!
//! The truth was taken from the raw disks before they were backed up. The tests of guest filesystems need root and loop
//! devices; without them they fail and say so.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use serde_json::Value;
use support::{Mounted, expected, fixture, folder_name, require_root, scratch, sha256, succeed, write_key, xofs};

/// A fixture, and what `check-mount` counts on it.
struct Repository {
    name: &'static str,
    /// Disks and filesystems that read right, and lost disks that read as errors.
    equal: u32,
    /// Disks whose data is there but which are refused: each for a reason that docs/semantics.md gives.
    not_recovered: u32,
}

const MAIN: Repository = Repository { name: "main", equal: 83, not_recovered: 4 };
const HARD: Repository = Repository { name: "hard", equal: 119, not_recovered: 21 };
const CHACHA20: Repository = Repository { name: "encrypted-chacha20-poly1305", equal: 10, not_recovered: 0 };
const AES: Repository = Repository { name: "encrypted-aes-256-gcm", equal: 10, not_recovered: 0 };

/// One mount of the fixture for one test, its truth, and its key.
struct Opened {
    truth: Value,
    key: Option<String>,
    folder: PathBuf,
    mounted: Mounted,
}

impl Repository {
    fn open(&self) -> Opened {
        let folder = fixture(self.name);
        let truth = expected(&folder);
        let key = truth["remote"]["encryptionKey"].as_str().map(str::to_owned);
        let mounted = Mounted::new(&folder.join("repo"), key.as_deref());
        Opened { truth, key, folder, mounted }
    }
}

impl Opened {
    /// (VM's uuid, backup of the truth) of every backup.
    fn backups(&self) -> impl Iterator<Item = (&str, &Value)> {
        let vms = self.truth["vms"].as_array().expect("vms is a list");
        vms.iter().flat_map(|vm| {
            let uuid = vm["uuid"].as_str().expect("a VM has a uuid");
            vm["backups"].as_array().expect("backups is a list").iter().map(move |backup| (uuid, backup))
        })
    }

    /// Every `disks/*.raw` of the mount, with the name that commands call the disk by.
    fn raw_files(&self) -> Vec<(String, PathBuf)> {
        let mut files = Vec::new();
        for (vm, backup) in self.backups() {
            let metadata = backup["metadata"].as_str().expect("a backup has a metadata file");
            let folder = self.mounted.backup(vm, metadata).join("disks");
            // A backup whose metadata cannot be read has no disks to list.
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            for entry in entries {
                let path = entry.expect("a listed folder goes on").path();
                if path.extension().is_some_and(|extension| extension == "raw") {
                    let disk = path.file_stem().expect("it has a name").to_string_lossy().into_owned();
                    files.push((format!("{vm}/{}/{disk}", folder_name(metadata)), path));
                }
            }
        }
        files.sort();
        files
    }
}

fn the_mount_shows_the_truth(repository: &Repository) {
    let opened = repository.open();
    let check_mount = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/check-mount");
    let output = Command::new("python3")
        .arg(check_mount)
        .args(["--jobs", "2", "--files"])
        .arg(opened.mounted.path())
        .arg(opened.folder.join("expected"))
        .output()
        .expect("python3 is installed by scripts/setup");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let counts = said.trim_end().rsplit('\n').next().unwrap_or_default();
    let wanted = format!("{} equal, 0 differ, {} not recovered", repository.equal, repository.not_recovered);
    assert_eq!(counts, wanted, "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
}

#[test]
fn the_mount_of_sound_backups_shows_the_truth() {
    the_mount_shows_the_truth(&MAIN);
}

// Promise 1: "Never other bytes"
#[test]
fn the_mount_of_odd_and_damaged_backups_shows_the_truth_or_an_error() {
    the_mount_shows_the_truth(&HARD);
}

#[test]
fn the_mount_of_a_repository_encrypted_with_chacha20_poly1305_shows_the_truth() {
    the_mount_shows_the_truth(&CHACHA20);
}

#[test]
fn the_mount_of_a_repository_encrypted_with_aes_256_gcm_shows_the_truth() {
    the_mount_shows_the_truth(&AES);
}

/// Each disk is exported and compared with its raw file; one that cannot be read must not be exported either.
fn export_gives_what_the_mount_shows(repository: &Repository) {
    let opened = repository.open();
    let work = tempfile::Builder::new().prefix("export-").tempdir_in(scratch()).expect("a folder for exports");
    let password_file = opened.key.as_deref().map(|key| write_key(work.path(), key));
    let files = opened.raw_files();
    assert!(!files.is_empty(), "the mount shows no disk");
    for (what, path) in files {
        let out = work.path().join("exported.raw");
        let mut command = xofs();
        command.env("XOFS_REPOSITORY", opened.folder.join("repo")).arg("export").arg(&what).arg("-o").arg(&out);
        if let Some(file) = &password_file {
            command.env("XOFS_PASSWORD_FILE", file);
        }
        let output = command.output().expect("the built binary starts");
        let said = String::from_utf8_lossy(&output.stderr);
        match sha256(&path) {
            Ok(sum) => {
                assert!(output.status.success(), "{what}: reads through the mount, but export says {said}");
                assert_eq!(sha256(&out), Ok(sum), "{what}: export differs from the mount");
                fs::remove_file(&out).expect("it was just exported");
            }
            Err(error) => {
                assert!(!output.status.success(), "{what}: exported, though the mount says {error}");
                assert!(!said.trim().is_empty(), "{what}: export failed and did not say why");
                assert!(!out.exists(), "{what}: a failed export left a file that looks whole");
            }
        }
    }
}

#[test]
fn every_sound_disk_exports_as_the_mount_shows_it() {
    export_gives_what_the_mount_shows(&MAIN);
}

#[test]
fn every_odd_or_damaged_disk_exports_as_the_mount_shows_it_or_fails() {
    export_gives_what_the_mount_shows(&HARD);
}

#[test]
fn every_encrypted_disk_exports_as_the_mount_shows_it() {
    export_gives_what_the_mount_shows(&CHACHA20);
    export_gives_what_the_mount_shows(&AES);
}

/// qemu reads the `.vhd` beside each readable `.raw`, and finds the same size and the same bytes.
fn qemu_reads_the_vhd_views(repository: &Repository) {
    let opened = repository.open();
    let mut compared = 0;
    for (what, raw) in opened.raw_files() {
        let size = fs::metadata(&raw).expect("a listed disk has a size").len();
        // A VHD holds whole sectors and at least one; a disk that is an error as raw is not compared.
        if size == 0 || sha256(&raw).is_err() {
            continue;
        }
        let vhd = raw.with_extension("vhd");
        let said = succeed(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "vpc"]).arg(&raw).arg(&vhd));
        // A size that differs would be a line before this one.
        assert_eq!(said.trim(), "Images are identical.", "{what}");
        compared += 1;
    }
    assert!(compared > 0, "no disk was compared");
}

// Promise 3: "is the same disk as one dynamic VHD without a parent"
#[test]
fn qemu_reads_the_vhd_of_every_sound_disk() {
    qemu_reads_the_vhd_views(&MAIN);
}

#[test]
fn qemu_reads_the_vhd_of_every_odd_disk() {
    qemu_reads_the_vhd_views(&HARD);
}

#[test]
fn qemu_reads_the_vhd_of_every_encrypted_disk() {
    qemu_reads_the_vhd_views(&CHACHA20);
}

/// A filesystem that the kernel mounts, as the truth describes it; offsets and sizes in bytes.
struct GuestFilesystem<'a> {
    kind: &'a str,
    start: u64,
    size: u64,
    manifest: &'a str,
}

/// The ext4, xfs and btrfs filesystems that lie directly in a partition or fill the disk.
fn guest_filesystems(guest: &Value) -> Vec<GuestFilesystem<'_>> {
    let partitions = guest["partitions"].as_array().map_or(&[][..], Vec::as_slice);
    let described = partitions.iter().filter_map(|partition| {
        Some(GuestFilesystem {
            kind: partition["fs"].as_str()?,
            start: partition["start"].as_u64()?,
            size: partition["size"].as_u64()?,
            manifest: partition["manifest"].as_str()?,
        })
    });
    described.filter(|filesystem| matches!(filesystem.kind, "ext4" | "xfs" | "btrfs")).collect()
}

/// Path below the root of a filesystem → type, and what identifies its content.
type Listing = BTreeMap<String, (String, String)>;

/// Names that mkfs or a guest system makes, which are in no manifest.
fn is_ignored(path: &str) -> bool {
    let top = path.split('/').next().unwrap_or_default();
    matches!(top, "lost+found" | "System Volume Information") || top.starts_with('$')
}

fn listed(manifest: &Path) -> Listing {
    let entries: Vec<Value> =
        serde_json::from_slice(&fs::read(manifest).expect("the manifest is in the archive")).expect("it is JSON");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    entries
        .iter()
        .map(|entry| {
            let kind = text(&entry["type"]);
            let content = match kind.as_str() {
                "file" => format!("{} {}", entry["size"], text(&entry["sha256"])),
                "symlink" => text(&entry["target"]),
                _ => String::new(),
            };
            (text(&entry["path"]), (kind, content))
        })
        .filter(|(path, _)| !is_ignored(path))
        .collect()
}

fn found(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("a listed folder goes on").path();
            let name = path.strip_prefix(root).expect("it is below").to_string_lossy().into_owned();
            if is_ignored(&name) {
                continue;
            }
            let metadata = fs::symlink_metadata(&path).expect("a listed name exists");
            if metadata.is_dir() {
                listing.insert(name, ("directory".to_owned(), String::new()));
                folders.push(path);
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).expect("it is a symlink").to_string_lossy().into_owned();
                listing.insert(name, ("symlink".to_owned(), target));
            } else if metadata.is_file() {
                files.push((name, metadata.size(), path));
            } else {
                listing.insert(name, ("other".to_owned(), String::new()));
            }
        }
    }
    if !files.is_empty() {
        let sums = succeed(Command::new("sha256sum").args(["--zero", "--"]).args(files.iter().map(|file| &file.2)));
        let sums: Vec<&str> = sums.split_terminator('\0').collect();
        assert_eq!(sums.len(), files.len(), "one sum a file");
        for ((name, size, _), line) in files.into_iter().zip(sums) {
            let sum = line.split(' ').next().unwrap_or_default();
            listing.insert(name, ("file".to_owned(), format!("{size} {sum}")));
        }
    }
    listing
}

/// A guest filesystem mounted by the kernel through a loop device, which is gone when this is dropped.
struct LoopMount {
    mountpoint: tempfile::TempDir,
    /// The loop device of a btrfs.
    btrfs: Option<String>,
}

impl LoopMount {
    fn new(image: &Path, filesystem: &GuestFilesystem<'_>) -> Self {
        let mountpoint = tempfile::Builder::new().prefix("guest-").tempdir_in(scratch()).expect("a folder to mount at");
        // The journal of a disk that was copied while running is not replayed: the disk is read-only.
        let recovery = match filesystem.kind {
            "ext4" => "noload",
            "xfs" => "norecovery,nouuid",
            _ => "rescue=nologreplay",
        };
        let options = format!("ro,loop,offset={},sizelimit={},{recovery}", filesystem.start, filesystem.size);
        succeed(Command::new("mount").args(["-t", filesystem.kind, "-o", &options]).arg(image).arg(mountpoint.path()));
        let device = || succeed(Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(mountpoint.path()));
        let btrfs = (filesystem.kind == "btrfs").then(|| device().trim().to_owned());
        Self { mountpoint, btrfs }
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let output = Command::new("umount").arg(self.mountpoint.path()).output();
        let unmounted = output.is_ok_and(|output| output.status.success());
        if let Some(device) = &self.btrfs {
            // The kernel remembers the devices of a btrfs by its id, and the same disk of the next backup has the same. Others,
            // which another test may be about to mount, are left alone.
            let _ = Command::new("btrfs").args(["device", "scan", "--forget", device]).output();
        }
        if !unmounted && !std::thread::panicking() {
            panic!("cannot unmount the guest filesystem at {}", self.mountpoint.path().display());
        }
    }
}

/// One at a time: loop devices are few, and the kernel refuses two mounts of one btrfs id.
static LOOP_MOUNTS: Mutex<()> = Mutex::new(());

/// Mounts each guest filesystem from its raw file, which is found by its content: the truth names disks, the mount devices.
fn guest_files_are_those_of_the_manifests(repository: &Repository, filesystems: usize) {
    require_root();
    let opened = repository.open();
    let mut compared = 0;
    for (vm, backup) in opened.backups() {
        let folder = opened.mounted.backup(vm, backup["metadata"].as_str().expect("a backup has a metadata file"));
        for disk in backup["disks"].as_array().expect("disks is a list") {
            let filesystems = guest_filesystems(&disk["guest"]);
            if disk["state"] != "ok"
                || filesystems.is_empty()
                || backup["compression"].as_str().is_some_and(|it| it != "none")
            {
                continue;
            }
            let sum = disk.get("xvaSha256").unwrap_or(&disk["sha256"]).as_str().expect("a disk has a sum");
            let image = fs::read_dir(folder.join("disks"))
                .expect("a backup with sound disks lists them")
                .map(|entry| entry.expect("a listed folder goes on").path())
                .find(|path| {
                    path.extension().is_some_and(|extension| extension == "raw")
                        && sha256(path).is_ok_and(|found| found == sum)
                })
                .unwrap_or_else(|| panic!("{}: no disk with the content of {}", folder.display(), disk["name"]));
            for filesystem in filesystems {
                let _one_at_a_time = LOOP_MOUNTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let guest = LoopMount::new(&image, &filesystem);
                let wanted = listed(&opened.folder.join("expected").join(filesystem.manifest));
                assert!(!wanted.is_empty(), "{} lists nothing", filesystem.manifest);
                assert_eq!(found(guest.mountpoint.path()), wanted, "{} of {}", filesystem.kind, image.display());
                compared += 1;
            }
        }
    }
    assert_eq!(compared, filesystems, "filesystems compared");
}

#[test]
fn the_kernel_mounts_the_guest_filesystems_of_sound_disks() {
    guest_files_are_those_of_the_manifests(&MAIN, 26);
}

#[test]
fn the_kernel_mounts_the_guest_filesystems_of_odd_disks() {
    guest_files_are_those_of_the_manifests(&HARD, 11);
}

#[test]
fn the_kernel_mounts_the_guest_filesystems_of_encrypted_disks() {
    guest_files_are_those_of_the_manifests(&CHACHA20, 3);
    guest_files_are_those_of_the_manifests(&AES, 3);
}
