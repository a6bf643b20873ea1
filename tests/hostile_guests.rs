//! Disks that a guest made to harm, by hand: each thing costs its own file an error, or is answered within bounds; all else on the
//! volume is read, by workers that stay in their memory and in time.
//!
//! `guest/tests/*_hostile.rs` change bytes at random; here stands what somebody would think of.

#[path = "../guest/tests/compare/mod.rs"]
mod compare;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use compare::Random;
use compare::image::{FileDisk, Mount, scratch, sparse};
use guest::{Attributes, Content, Inode, Source};
use rustix::fs::{SeekFrom, XattrFlags};
use support::{Mounted, init, succeed, xofs};
use xofs::worker::{Error, Volume, Workers};

const VM: &str = "1f2e3d4c-5b6a-4788-9900-aabbccddeeff";

/// What the workers may take of a processor for a request; any of these takes milliseconds of it. What passes meanwhile is
/// judged nowhere: others are at work, too.
const SOON: Duration = Duration::from_secs(15);

/// A deadline that is reached by what never ends alone.
const NEVER: Duration = Duration::from_secs(600);

/// What workers may read of a disk to look for volumes; the table that one of them pretends to have is of 512 GiB.
const LITTLE: u64 = 8 << 20;

/// Address space of a worker (MiB), and what it takes of memory besides what it reads.
const LIMIT: u64 = 1024;

/// Asks workers, and looks what they take of a processor.
struct Guest {
    volume: Volume,
}

impl Guest {
    fn new(content: Content, image: &Path) -> Self {
        let program = PathBuf::from(env!("CARGO_BIN_EXE_xofs"));
        let workers = Workers::of_program(program, 4, NEVER, None);
        Self { volume: Volume::new(workers, content, vec![Arc::new(FileDisk::open(image))]) }
    }

    fn soon<T>(&self, act: impl FnOnce(&Volume) -> Result<T, Error>) -> Result<T, String> {
        let before = processor_time(&workers());
        let done = act(&self.volume).map_err(|error| match error {
            Error::Guest(error) => error.to_string(),
            // Nothing here may end a worker.
            error => panic!("{error:?}"),
        });
        let taken = processor_time(&workers()).saturating_sub(before);
        assert!(taken < SOON, "{taken:?}");
        done
    }

    fn list(&self, directory: Inode) -> Result<BTreeMap<Vec<u8>, Inode>, String> {
        let listed = self.soon(|volume| Ok(volume.list(directory)?.0))?;
        Ok(listed.into_iter().map(|(entry, _)| (entry.name, entry.inode)).collect())
    }

    fn at(&self, path: &str) -> Inode {
        let mut inode = self.soon(|volume| Ok(volume.open()?.0)).unwrap();
        for name in path.split('/') {
            inode = self.list(inode).unwrap()[name.as_bytes()];
        }
        inode
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes, String> {
        self.soon(|volume| volume.attributes(inode))
    }

    /// Reads the first `len` bytes of a file, and returns how many of them are not zero.
    fn read(&self, path: &str, len: u64) -> Result<usize, String> {
        let inode = self.at(path);
        let (mut at, mut count) = (0, 0);
        while at < len {
            let window = self.soon(|volume| volume.extents(inode, at, &volume.patience()))?;
            for extent in window.found.iter().filter(|extent| extent.start < len) {
                let mut bytes = vec![0; usize::try_from(extent.len.min(len - extent.start)).unwrap()];
                match &extent.source {
                    Source::Member(member, at) => {
                        self.volume.members()[usize::from(*member)].read_at(*at, &mut bytes).unwrap();
                    }
                    Source::Bytes(found) => bytes = found.iter().copied().take(bytes.len()).collect(),
                    Source::Zeroes => {}
                    Source::Encoded => {
                        self.soon(|volume| volume.decode(inode, extent.start, &mut bytes, &volume.patience()))?;
                    }
                }
                count += bytes.iter().filter(|byte| **byte != 0).count();
            }
            at = window.until;
        }
        Ok(count)
    }
}

/// The numbers of the workers that live and that this thread, which a test has to itself, began.
fn workers() -> Vec<u32> {
    children("thread-self").into_iter().filter(|pid| status(*pid).starts_with("Name:\txofs-guest")).collect()
}

/// The processes that threads began: those of `/proc/PARENT`.
fn children(parent: &str) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/children")).unwrap_or_default();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// What the kernel says of a process; nothing of one that has ended.
fn status(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default()
}

/// What processes that live, and those of theirs that ended, have taken of processors so far, to a hundredth of a second. Source:
/// proc_pid_stat(5).
fn processor_time(pids: &[u32]) -> Duration {
    let taken = pids.iter().filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<_> = stat.rsplit(')').next()?.split_whitespace().collect();
        // Of the process and of the kernel for it, and of its children, in hundredths of a second (USER_HZ).
        let ticks: u64 = fields[11..15].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Some(Duration::from_millis(10 * ticks))
    });
    taken.sum()
}

/// The most memory that a worker of this thread has taken so far (MiB), of those that live.
fn peak() -> u64 {
    let peaks = workers().into_iter().filter_map(|pid| {
        let line = status(pid).lines().find_map(|line| line.strip_prefix("VmHWM:").map(str::to_owned))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10)
    });
    peaks.max().expect("a worker rests")
}

/// Runs commands of debugfs(8), which write.
fn debugfs(image: &Path, commands: &[String]) {
    for command in commands {
        let mut debugfs = Command::new("debugfs");
        let output = debugfs.args(["-w", "-R", command]).arg(image).output().expect("e2fsprogs");
        let said = String::from_utf8_lossy(&output.stderr);
        // It says its version, and nothing else that is not wrong.
        assert!(output.status.success() && said.lines().count() == 1, "{command}: {said}");
    }
}

/// The first block of a file.
fn block(image: &Path, file: &str) -> u64 {
    let output = Command::new("debugfs").args(["-R", &format!("bmap {file} 0")]).arg(image).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

fn patch(image: &Path, at: u64, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(image).unwrap().write_all_at(bytes, at).unwrap();
}

/// The block of a file's attributes, where they do not fit into its inode.
fn attribute_block(image: &Path, file: &str) -> u64 {
    let output = Command::new("debugfs").args(["-R", &format!("stat {file}")]).arg(image).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    said.split("File ACL: ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap().parse().unwrap()
}

/// Where bytes stand in a block of an image, from the image's beginning.
fn places(image: &Path, block: u64, bytes: &[u8]) -> Vec<u64> {
    let mut held = [0; 4096];
    File::open(image).unwrap().read_exact_at(&mut held, block * 4096).unwrap();
    let found = held.windows(bytes.len()).enumerate().filter(|(_, window)| *window == bytes);
    found.map(|(at, _)| block * 4096 + at as u64).collect()
}

/// An ext4 of 64 MiB without checksums of metadata, with what debugfs puts into it.
fn ext4(folder: &Path) -> PathBuf {
    let (image, source) = (folder.join("image"), folder.join("source"));
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::create_dir(source.join("names")).unwrap();
    fs::create_dir(source.join("links")).unwrap();
    for name in ["sound", "cycle", "deep", "huge", "beyond", "victim", "attributes", "names/aXb", "names/aYb"] {
        fs::write(source.join(name), name.repeat(1000)).unwrap();
    }
    for name in ["names/twice1", "names/twice2", "a/b/deepest"] {
        fs::write(source.join(name), name).unwrap();
    }
    symlink("self", source.join("links/self")).unwrap();
    for number in 0..60 {
        symlink(format!("chain-{}", number + 1), source.join(format!("links/chain-{number}"))).unwrap();
        // Each is its next one twice: 2^60 steps.
        let next = format!("bomb-{}", number + 1);
        symlink(format!("{next}/../{next}"), source.join(format!("links/bomb-{number}"))).unwrap();
    }
    let value = vec![b'v'; 500];
    rustix::fs::setxattr(source.join("attributes"), "user.large", &value, XattrFlags::empty()).unwrap();
    // A directory of a million names, each sixteen bytes: it is a file until debugfs says otherwise.
    for (name, count) in [("million", 1_000_000_u32), ("millions", 1_000_001)] {
        let mut bytes = Vec::new();
        for number in 0..count {
            bytes.extend(12_u32.to_le_bytes());
            let is_last = number == count - 1;
            let left = 4096 - bytes.len() % 4096 + 4;
            let len = if is_last { left } else { 16 };
            bytes.extend(u16::try_from(len).unwrap().to_le_bytes());
            bytes.extend([8, 1]);
            bytes.extend(format!("{number:08}").bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        fs::write(source.join(name), bytes).unwrap();
    }
    sparse(&image, 64 << 20);
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-b", "4096", "-O", "^metadata_csum,^has_journal,^dir_index,^64bit", "-N", "1000", "-d"]);
    succeed(mkfs.arg(&source).arg(&image));
    let victim = block(&image, "/victim");
    let set = |file: &str, field: &str, value: u64| format!("set_inode_field /{file} {field} {value:#x}");
    let mut commands = vec![
        // A directory in itself, above itself and in two places.
        "link <2> /a/b/up".to_owned(),
        "link /a/b /a/b/here".to_owned(),
        "link /names /a/names".to_owned(),
        // A tree of extents whose only block leads to itself: a header (one entry of four, depth 1) and that entry.
        set("cycle", "block[0]", 0x1_f30a),
        set("cycle", "block[1]", 0x1_0004),
        set("cycle", "block[2]", 0),
        set("cycle", "block[3]", 0),
        set("cycle", "block[4]", victim),
        set("cycle", "block[5]", 0),
        // A tree of indirect blocks that all are one: 2^30 times the same block.
        set("deep", "flags", 0),
        set("deep", "block[TIND]", victim),
        set("deep", "size", 1 << 41),
        set("huge", "size", (1 << 63) - 1),
        set("beyond", "size", 1 << 63),
        set("million", "mode", 0o40755),
        set("millions", "mode", 0o40755),
    ];
    commands.extend((0..12).map(|index| set("deep", &format!("block[{index}]"), 0)));
    commands.extend(["IND", "DIND"].map(|level| set("deep", &format!("block[{level}]"), 0)));
    debugfs(&image, &commands);
    let mut index = Vec::new();
    for number in [0x1_f30a_u32, 0x1_0154, 0, 0, u32::try_from(victim).unwrap(), 0] {
        index.extend(number.to_le_bytes());
    }
    // Where it is a block of pointers, the others lead to it, too.
    index.resize(4096, 0);
    index[24..]
        .chunks_mut(4)
        .for_each(|pointer| pointer.copy_from_slice(&u32::try_from(victim).unwrap().to_le_bytes()));
    patch(&image, victim * 4096, &index);
    let names = block(&image, "/names");
    for (from, to) in [(&b"aXb"[..], &b"a/b"[..]), (b"aYb", b"a\0b"), (b"twice1", b"twice0"), (b"twice2", b"twice0")] {
        let found = places(&image, names, from);
        assert_eq!(found.len(), 1, "{from:?}");
        patch(&image, found[0], to);
    }
    // The size of the value, where its name stands behind it. Source: Linux, `struct ext4_xattr_entry`.
    let at = places(&image, attribute_block(&image, "/attributes"), b"large")[0];
    patch(&image, at - 8, &u32::MAX.to_le_bytes());
    image
}

#[test]
fn what_leads_astray_in_an_ext4_costs_its_own_file_alone() {
    let folder = scratch();
    let guest = Guest::new(Content::Ext4, &ext4(folder.path()));
    assert_eq!(guest.read("sound", 5000), Ok(5000));
    // Names lead in circles; whoever follows them sees it by the numbers.
    let (root, a, b) = (guest.at("a/b/up"), guest.at("a"), guest.at("a/b"));
    assert_eq!((root, guest.at("a/b/here"), guest.at("a/b/up/a")), (Inode(2), b, a));
    assert_eq!(guest.at("a/names"), guest.at("names"));
    // Bytes lead in circles, or nowhere.
    let fails = |found: Result<usize, String>, why: &str| {
        let error = found.unwrap_err();
        assert!(error.contains(why), "{error}");
    };
    fails(guest.read("cycle", 5000), "a node of extents has depth 1 instead of 0");
    fails(guest.read("deep", 64 << 20), "the map of the file leads to 1 blocks at");
    fails(guest.read("beyond", 5000), "is of 9223372036854775808 bytes");
    fails(guest.attributes(guest.at("beyond")).map(|_| 0), "is of 9223372036854775808 bytes");
    assert_eq!(guest.attributes(guest.at("huge")).unwrap().size, i64::MAX.unsigned_abs());
    assert_eq!(guest.read("huge", 64 << 20), Ok(4000));
    let xattrs = guest.soon(|volume| volume.xattrs(guest.at("attributes")));
    fails(xattrs.map(|found| found.len()), "an entry does not fit in its place");
    assert_eq!(guest.read("attributes", 9000), Ok(9000));
    let names = guest.list(guest.at("names")).unwrap();
    assert_eq!(names.keys().map(Vec::as_slice).collect::<Vec<_>>(), [&b"a\0b"[..], b"a/b", b"twice0"]);
    assert_eq!(guest.list(guest.at("million")).unwrap().len(), 1_000_000);
    fails(guest.list(guest.at("millions")).map(|names| names.len()), "a directory has more than 1000000 names");
    assert_eq!(guest.read("sound", 5000), Ok(5000));
    println!("{} MiB", peak());
    assert!(peak() < LIMIT);
}

/// Bytes of a repository with one backup of a disk.
fn repository(folder: &Path, image: &Path) -> PathBuf {
    let repository = init(folder, "repository", &[]);
    let mut ingest = xofs();
    ingest.args(["ingest", "--vm", VM, "--name", "web01", "--time", "20260801T020003Z", "--disk"]);
    succeed(ingest.arg(format!("xvda={}", image.display())).arg("--repository").arg(&repository));
    repository
}

#[test]
fn a_mount_of_it_can_be_searched_and_copied_and_all_else_is_there() {
    let folder = scratch();
    let repository = repository(folder.path(), &ext4(folder.path()));
    let timeout = format!("--timeout={}", NEVER.as_secs());
    let mounted = Mounted::with_arguments(&repository, None, &[&timeout]);
    let files = mounted.path().join("by-uuid").join(VM).join("latest/files/xvda");
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // The mount and its workers.
    let of_mount = || {
        let server = mounted.process();
        let threads = fs::read_dir(format!("/proc/{server}/task")).unwrap().map(|thread| thread.unwrap().file_name());
        let workers = threads.flat_map(|thread| children(&format!("{server}/task/{}", thread.display())));
        workers.chain([server]).collect::<Vec<_>>()
    };
    let is_sound = || assert_eq!(fs::read(files.join("sound")).unwrap(), b"sound".repeat(1000));
    is_sound();
    let (found, said) = run(Command::new("find").arg(&files).args(["-path", "*/million*", "-prune", "-o", "-print"]));
    assert_eq!(found.lines().filter(|line| line.ends_with("/deepest")).count(), 1, "{found}");
    for circle in ["a/b/here", "a/b/up"] {
        assert!(
            said.contains(&format!("{circle}’: Too many levels")) || said.contains(&format!("{circle}': Too many")),
            "{said}"
        );
    }
    let names = fs::read_dir(files.join("names")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["a%00b", "a%2Fb", "twice0", "twice0~2"]);
    for name in ["links/self", "links/chain-0", "links/bomb-0"] {
        assert_eq!(fs::read(files.join(name)).unwrap_err().raw_os_error(), Some(libc::ELOOP), "{name}");
    }
    for (name, expected) in
        [("cycle", Err(libc::EIO)), ("deep", Err(libc::EIO)), ("huge", Ok(1 << 20)), ("attributes", Ok(10_000))]
    {
        let before = processor_time(&of_mount());
        let file = File::open(files.join(name)).unwrap();
        let read = file.read_at(&mut vec![0; 1 << 20], 0).map_err(|error| error.raw_os_error().unwrap());
        assert_eq!(read, expected, "{name}");
        for place in [SeekFrom::Hole(0), SeekFrom::Data(1 << 30)] {
            let _ = rustix::fs::seek(&file, place);
        }
        let taken = processor_time(&of_mount()).saturating_sub(before);
        assert!(taken < SOON, "{name}: {taken:?}");
    }
    assert_eq!(File::open(files.join("beyond")).unwrap_err().raw_os_error(), Some(libc::EIO));
    let (count, _) =
        run(Command::new("sh").args(["-c", "ls -U million | wc -l; ls -U millions | wc -l"]).current_dir(&files));
    assert_eq!(count, "1000000\n0\n");
    let copy = folder.path().join("copy");
    fs::create_dir(&copy).unwrap();
    let (_, said) = run(xofs().args(["cp", "--repository"]).arg(&repository).arg("web01/latest/xvda:/a/b").arg(&copy));
    assert!(said.contains("the folder stands in another place, too"), "{said}");
    assert_eq!(fs::read(copy.join("b/deepest")).unwrap(), b"a/b/deepest");
    is_sound();
}

#[test]
fn what_unpacks_to_more_than_any_memory_is_read_piece_by_piece_or_refused() {
    let folder = scratch();
    let image = folder.path().join("btrfs");
    sparse(&image, 256 << 20);
    succeed(Command::new("mkfs.btrfs").args(["-q", "-f"]).arg(&image));
    {
        let mount = Mount::new(&image, "btrfs", "noatime,compress-force=zstd");
        fs::write(mount.path().join("bomb"), vec![b'b'; 64 << 20]).unwrap();
        fs::write(mount.path().join("patched"), vec![b'p'; 80_000]).unwrap();
        // It does not get smaller, and is stored as it is.
        fs::write(mount.path().join("other"), Random::new(3).bytes(18_000)).unwrap();
    }
    let guest = Guest::new(Content::Btrfs, &image);
    let other = guest.read("other", 18_000).unwrap();
    assert_eq!(guest.read("bomb", 64 << 20), Ok(64 << 20));
    println!("btrfs: {} MiB", peak());
    // A frame that says it has 2^62 bytes, and repeats one for ever: in place of that of the file that begins with that byte.
    let bytes = fs::read(&image).unwrap();
    let is_frame =
        |at: &usize| bytes[*at..].starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) && bytes[*at..*at + 32].contains(&b'p');
    let places: Vec<usize> = (0..bytes.len() - 32).step_by(4096).filter(is_frame).collect();
    assert!(!places.is_empty());
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
    frame.extend((1_u64 << 62).to_le_bytes());
    // Each block: not the last, of one byte repeated, 128 KiB.
    let block = (128_u32 << 10) << 3 | 2;
    (0..200).for_each(|_| frame.extend([&block.to_le_bytes()[..3], b"x"].concat()));
    places.iter().for_each(|place| patch(&image, *place as u64, &frame));
    // As much as the extent says is taken of it.
    assert_eq!(guest.read("patched", 80_000), Ok(80_000));
    assert_eq!(guest.read("other", 18_000), Ok(other));
    println!("btrfs: {} MiB", peak());

    let image = folder.path().join("ntfs");
    sparse(&image, 64 << 20);
    succeed(Command::new("mkntfs").args(["-q", "-F", "-Q", "-c", "4096"]).arg(&image));
    {
        let mount = Mount::new(&image, "ntfs-3g", "streams_interface=xattr,compression,noatime");
        let packed = mount.path().join("packed");
        fs::create_dir(&packed).unwrap();
        let compressed = 0x810_u32.to_le_bytes();
        rustix::fs::lsetxattr(&packed, "system.ntfs_attrib", &compressed, XattrFlags::empty()).unwrap();
        fs::write(packed.join("bomb"), vec![b'b'; 64 << 20]).unwrap();
    }
    let guest = Guest::new(Content::Ntfs, &image);
    assert_eq!(guest.read("packed/bomb", 64 << 20), Ok(64 << 20));
    println!("ntfs: {} MiB", peak());

    let (image, source) = (folder.path().join("squashfs"), folder.path().join("squashed"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("bomb"), vec![b'b'; 64 << 20]).unwrap();
    succeed(Command::new("mksquashfs").args([&source, &image]).args([
        "-quiet",
        "-no-progress",
        "-comp",
        "xz",
        "-b",
        "1M",
    ]));
    assert!(fs::metadata(&image).unwrap().len() < 64 << 10);
    let guest = Guest::new(Content::Squashfs, &image);
    assert_eq!(guest.read("bomb", 64 << 20), Ok(64 << 20));
    println!("squashfs: {} MiB", peak());
    assert!(peak() < LIMIT);
}

#[test]
fn a_partition_table_of_four_billion_entries_is_refused_and_the_other_disk_is_read() {
    let folder = scratch();
    let [hostile, sound] = ["hostile", "sound"].map(|name| {
        let image = folder.path().join(name);
        sparse(&image, 16 << 20);
        let script = format!("printf 'label: gpt\\n,4M\\n' | sfdisk -q {}", image.display());
        succeed(Command::new("sh").args(["-c", &script]));
        image
    });
    let bytes = fs::read(&hostile).unwrap();
    for at in [512, bytes.len() - 512] {
        let mut header = bytes[at..at + 92].to_vec();
        header[80..84].copy_from_slice(&u32::MAX.to_le_bytes());
        header[16..20].fill(0);
        let sum = crc32(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        patch(&hostile, at as u64, &header);
    }
    let workers = Workers::of_program(PathBuf::from(env!("CARGO_BIN_EXE_xofs")), 1, NEVER, None);
    let disks =
        [&hostile, &sound].map(|image| Arc::new(Counted { disk: FileDisk::open(image), read: AtomicU64::new(0) }));
    let named = [("xvda", &disks[0]), ("xvdb", &disks[1])];
    let named = named.map(|(name, disk)| (name.to_owned(), disk.clone() as Arc<dyn disk::Disk>));
    let found = workers.survey(&named).unwrap();
    for disk in disks {
        let read = disk.read.load(Ordering::Relaxed);
        assert!((1024..LITTLE).contains(&read), "{read} bytes were read");
    }
    let names: Vec<_> = found.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["xvdb1"]);
    assert!(found.problems[0].to_string().contains("neither that nor its backup is sound"), "{:?}", found.problems);
}

/// A disk, and how many bytes were read of it.
struct Counted {
    disk: FileDisk,
    read: AtomicU64,
}

impl disk::Disk for Counted {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.disk.read_at(offset, buffer)
    }

    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        self.disk.extent_at(offset)
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    })
}
