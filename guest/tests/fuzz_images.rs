//! The images that the fuzzers start from (`fuzz/images`): small filesystems with one of each thing, of which no more is kept than
//! what a reader reads of them.
//!
//! ```text
//! XOFS_IMAGES=$PWD/fuzz/images cargo test -p guest --test fuzz_images       makes those of the repository anew
//! ```

#[path = "compare/checksums.rs"]
mod checksums;
mod compare;
#[path = "compare/volumes.rs"]
mod on_disks;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use compare::Random;
use compare::churn::Churn;
use compare::fat;
use compare::generator::{self, Amount};
use compare::image::{Loop, Mount, Reflinks, make, scratch, sparse, succeed};
use compare::subject::{Open, Subject};
use rustix::fs::XattrFlags;

const AMOUNT: Amount = Amount { names: 40, holes: 20 };

/// Bytes that are kept or dropped together.
const PIECE: usize = 512;

/// Longest image as it is stored (bytes): they are part of the repository. A journal of 1 MiB may be full of what does not compress.
const MOST: u64 = 1 << 20;

/// Stores what is read of an image under a name, and checks that it is as good as the whole.
fn store(name: &str, image: &Path, open: Open, files: usize) {
    let bytes = fs::read(image).expect("it was just made");
    let whole = Subject::new(bytes.clone(), open, checksums::none);
    let mut kept = vec![0; bytes.len()];
    for range in whole.read() {
        let range = range.start / PIECE * PIECE..range.end.next_multiple_of(PIECE).min(bytes.len());
        kept[range.clone()].copy_from_slice(&bytes[range]);
    }
    assert!(whole.files >= files, "{name}: {} files", whole.files);
    let again = Subject::new(kept.clone(), open, checksums::none);
    assert_eq!((again.files, again.read()), (whole.files, whole.read()), "{name}");
    put(name, &kept);
}

/// Stores bytes under a name.
fn put(name: &str, bytes: &[u8]) {
    let folder = std::env::var_os("XOFS_IMAGES").map(PathBuf::from);
    let temporary = scratch();
    let path = folder.as_deref().unwrap_or(temporary.path()).join(format!("{name}.zst"));
    let plain = temporary.path().join("plain");
    fs::write(&plain, bytes).expect("room");
    succeed(Command::new("zstd").args(["-q", "-f", "-19", "--no-check"]).arg(&plain).arg("-o").arg(&path));
    let len = fs::metadata(&path).expect("it was just made").len();
    println!("{name}: {len} bytes");
    assert!(len <= MOST, "{name}: {len} bytes");
}

#[test]
fn small_images_of_every_filesystem_are_whole_without_what_nobody_reads() {
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    let ext: Open = |disk| Ok(Box::new(guest::ext::Ext::open(disk)?));
    let sets: [(&str, &[&str], &str); 4] = [
        ("ext2", &["mkfs.ext2", "-b", "1024"], "noatime"),
        ("ext4", &["mkfs.ext4", "-O", "^metadata_csum,inline_data,ea_inode", "-b", "1024"], "noatime"),
        ("ext4-journal", &["mkfs.ext4", "-O", "^metadata_csum", "-b", "1024", "-J", "size=1"], "noatime,data=journal"),
        ("ext4-fast-commits", &["mkfs.ext4", "-O", "^metadata_csum,fast_commit", "-b", "1024"], "noatime,commit=300"),
    ];
    for (name, mkfs, options) in sets {
        make(&image, 16 << 20, mkfs);
        let copy = {
            let mount = Mount::new(&image, "ext4", options);
            generator::fill(mount.path(), AMOUNT);
            File::open(mount.path()).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
            let mut churn = Churn::new(mount.path(), 1);
            churn.work(10);
            churn.sync();
            churn.work_fast(5);
            if name == "ext2" {
                churn.sync();
            }
            place.copy(&image, "copy")
        };
        store(name, &copy, ext, 60);
    }
    for (name, is_in_use) in [("xfs", false), ("xfs-log", true)] {
        sparse(&image, 304 << 20);
        succeed(Command::new("mkfs.xfs").args(["-q", "-f", "-i", "nrext64=1"]).arg(&image));
        let copy = {
            let mount = Mount::new(&image, "xfs", "noatime");
            generator::fill(mount.path(), AMOUNT);
            File::open(mount.path()).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
            Churn::new(mount.path(), 1).work(10);
            is_in_use.then(|| place.copy(&image, "copy"))
        };
        store(name, copy.as_deref().unwrap_or(&image), |disk| Ok(Box::new(guest::xfs::Xfs::open(disk)?)), 60);
    }
    for (name, algorithm) in [("btrfs-zstd", "zstd"), ("btrfs-lzo", "lzo"), ("btrfs-zlib", "zlib")] {
        sparse(&image, 128 << 20);
        succeed(Command::new("mkfs.btrfs").args(["-q", "-f", "-m", "single", "-n", "4096"]).arg(&image));
        {
            let mount = Mount::new(&image, "btrfs", &format!("noatime,compress-force={algorithm}"));
            let folder = mount.path().join("subvolume");
            succeed(Command::new("btrfs").args(["subvolume", "create"]).arg(&folder));
            for number in 0..5 {
                fs::write(folder.join(format!("text-{number}")), "text ".repeat(number * 9000)).expect("room");
            }
            succeed(
                Command::new("btrfs").args(["subvolume", "snapshot"]).arg(&folder).arg(mount.path().join("snapshot")),
            );
            kinds(mount.path());
        }
        store(name, &image, |disk| Ok(Box::new(guest::btrfs::Btrfs::open(vec![disk])?)), 30);
    }
    sparse(&image, 8 << 20);
    succeed(Command::new("mkntfs").args(["-q", "-F", "-Q", "-c", "512"]).arg(&image));
    {
        let mount = Mount::new(&image, "ntfs-3g", "streams_interface=xattr,compression,noatime");
        kinds(mount.path());
        let packed = mount.path().join("packed");
        fs::create_dir(&packed).expect("a new folder");
        rustix::fs::lsetxattr(&packed, "system.ntfs_attrib", &0x810_u32.to_le_bytes(), XattrFlags::empty())
            .expect("it can be compressed");
        fs::write(packed.join("text"), "again and ".repeat(5000)).expect("room");
    }
    store("ntfs", &image, |disk| Ok(Box::new(guest::ntfs::Ntfs::open(disk)?)), 30);
    let files = scratch();
    fat::contents(&files.path().join("contents"), &mut Random::new(3));
    fat::names(&files.path().join("names"), 40);
    for (name, bits, bytes) in [("fat12", "12", 2 << 20), ("fat16", "16", 8 << 20), ("fat32", "32", 36 << 20)] {
        sparse(&image, bytes);
        succeed(Command::new("mkfs.vfat").args(["-F", bits, "-s", if bits == "12" { "2" } else { "1" }]).arg(&image));
        let mut copy = Command::new("mcopy");
        copy.env("TZ", "UTC")
            .env("LC_ALL", "C.UTF-8")
            .env("MTOOLS_SKIP_CHECK", "1")
            .args(["-s", "-Q", "-i"])
            .arg(&image);
        succeed(copy.args(["contents", "names"].map(|name| files.path().join(name))).arg("::/"));
        store(name, &image, |disk| Ok(Box::new(guest::fat::Fat::open(disk)?)), 50);
    }
    sparse(&image, 5 << 20);
    succeed(Command::new("mkfs.exfat").args(["-c", "512"]).arg(&image));
    {
        let mount = Mount::new(&image, "exfat-fuse", "rw");
        fat::contents(&mount.path().join("contents"), &mut Random::new(3));
        fat::names(&mount.path().join("names"), 40);
    }
    store("exfat", &image, |disk| Ok(Box::new(guest::exfat::ExFat::open(disk)?)), 50);
    let small = scratch();
    kinds(small.path());
    for (name, options) in [
        ("squashfs-plain", &["-noI", "-noX", "-comp", "zstd"][..]),
        ("squashfs-gzip", &["-comp", "gzip"]),
        ("squashfs-xz", &["-comp", "xz", "-b", "4096"]),
    ] {
        let _ = fs::remove_file(&image);
        succeed(
            Command::new("mksquashfs").arg(small.path()).arg(&image).args(["-quiet", "-no-progress"]).args(options),
        );
        store(name, &image, |disk| Ok(Box::new(guest::squashfs::Squashfs::open(disk)?)), 30);
    }
}

/// A few of everything, for filesystems of which each walk costs more.
fn kinds(root: &Path) {
    for number in 0..30 {
        fs::write(root.join(format!("file-{number:02}")), "x".repeat(number * 50)).expect("room");
    }
    let folder = root.join("folder");
    fs::create_dir(&folder).expect("a new folder");
    fs::write(folder.join("large"), "line of text\n".repeat(10_000)).expect("room");
    fs::hard_link(folder.join("large"), root.join("linked")).expect("room");
    std::os::unix::fs::symlink("folder/large", root.join("link")).expect("room");
    rustix::fs::setxattr(root.join("file-07"), "user.name", b"value", XattrFlags::empty()).expect("room");
    File::create(root.join("sparse")).and_then(|file| file.set_len(1 << 30)).expect("sparse");
}

#[test]
fn disks_with_every_kind_of_volume_are_whole_without_what_nobody_reads() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let tables = [
        ("gpt", "label: gpt\n1 : size=1M\n5 : size=2M, name=\"a, b\"\n128 : size=1M\n"),
        ("mbr", "label: dos\n,1M,c\n,1M,83,*\n,5M,5\n,1M,83\n,1M\n"),
    ];
    for (name, script) in tables {
        sparse(&at(name), on_disks::DISK);
        fs::write(at("script"), script).expect("room");
        let shell = format!("sfdisk -q {} < {}", at(name).display(), at("script").display());
        succeed(Command::new("sh").args(["-c", &shell]));
    }
    let [one, two] = ["one", "two"].map(|name| {
        sparse(&at(name), on_disks::DISK);
        Loop::new(&at(name))
    });
    let (one_path, two_path) = (one.path().display().to_string(), two.path().display().to_string());
    let settings = format!(
        "devices {{ use_devicesfile = 0 hints = \"none\" filter = [ \"a|^({one_path}|{two_path})$|\", \"r|.*|\" ] }}\n\
         global {{ locking_dir = \"{0}/lock\" use_lvmpolld = 0 event_activation = 0 }}\n\
         backup {{ backup = 0 archive = 0 }}\nactivation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 }}\n",
        folder.path().display()
    );
    fs::write(at("lvm.conf"), settings).expect("room");
    // Without the device mapper.
    let lvm = |arguments: &[&str]| {
        let mut lvm = Command::new("lvm");
        lvm.env("LVM_SYSTEM_DIR", folder.path()).arg(arguments[0]).args(["--driverloaded", "n"]);
        succeed(lvm.args(&arguments[1..]));
    };
    lvm(&["pvcreate", "-q", "--metadatasize", "60k", &one_path, &two_path]);
    lvm(&["vgcreate", "-q", "--setautoactivation=n", "-s", "256k", "fuzz0", &one_path, &two_path]);
    for (name, options) in
        [("linear", &["-l", "3"][..]), ("striped", &["-l", "4", "-i", "2"]), ("second", &["-l", "2"])]
    {
        lvm(&[&["lvcreate", "-q", "-n", name, "-an", "-Zn", "-Wn"], options, &["fuzz0"]].concat());
    }
    drop((one, two));
    let bytes = ["gpt", "mbr", "one", "two"].map(|name| fs::read(at(name)).expect("it was just made"));
    fs::write(at("all"), bytes.concat()).expect("room");
    store("disks", &at("all"), on_disks::open, 10);
}
