//! XFS as the kernel shows it: clean, and as a machine leaves it that loses its power.

mod compare;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, Reflinks, scratch, sparse, succeed};
use compare::machine::Machine;
use compare::{Random, tree};
use disk::Disk;
use guest::xfs::Xfs;
use guest::{ErrorKind, GuestFs, Inode};
use rustix::fs::FallocateFlags;

/// Bytes of an image; mkfs.xfs makes none below 300 MiB.
const SIZE: u64 = 320 << 20;

fn make(image: &Path, options: &[&str]) {
    sparse(image, SIZE);
    succeed(Command::new("mkfs.xfs").arg("-q").args(options).arg(image));
}

fn open(what: &str, image: &Path) -> Xfs {
    Xfs::open(Arc::new(FileDisk::open(image))).unwrap_or_else(|error| panic!("{what}: {error}"))
}

fn shown(what: &str, image: &Path) -> (tree::Tree, Vec<String>) {
    tree::of_guest(&open(what, image), &FileDisk::open(image))
}

/// Panics unless this crate reads of an image what the kernel showed.
fn compare(what: &str, image: &Path, kernel: &tree::Tree) {
    let (shown, errors) = shown(what, image);
    let differences = tree::differences(kernel, &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", kernel.len(), lines.join("\n"));
}

/// Returns where the log of an image lies, and how long it is (bytes).
fn log(image: &Path) -> (u64, u64) {
    let mut head = [0; 128];
    File::open(image).and_then(|file| file.read_exact_at(&mut head, 0)).expect("a superblock");
    let be32 = |at: usize| u64::from(u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes")));
    let start = be32(48) << 32 | be32(52);
    let (block_size, group, bits) = (be32(4), be32(84), head[124]);
    (((start >> bits) * group + (start & ((1 << bits) - 1))) * block_size, be32(96) * block_size)
}

/// Lets the log of an image be another one.
fn change_log(image: &Path, change: impl FnOnce(&mut [u8])) {
    let (start, len) = log(image);
    let file = File::options().read(true).write(true).open(image).expect("an image");
    let mut bytes = vec![0; usize::try_from(len).expect("it fits in memory")];
    file.read_exact_at(&mut bytes, start).expect("within the image");
    change(&mut bytes);
    file.write_all_at(&bytes, start).expect("room");
}

/// Returns how often the log of an image was begun anew.
fn passes(image: &Path) -> u32 {
    let mut passes = None;
    change_log(image, |log| {
        let records = (0..log.len()).step_by(512).filter(|at| log[*at..*at + 4] == [0xfe, 0xed, 0xba, 0xbe]);
        passes = records.map(|at| u32::from_be_bytes(log[at + 4..at + 8].try_into().expect("four"))).max();
    });
    passes.expect("a record")
}

fn said_by(program: &str, arguments: &[&str], image: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(image).output().expect("it is installed");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[test]
fn every_kind_of_clean_volume_reads_as_the_kernel_shows_it() {
    let sets: [&[&str]; 6] = [
        &[],
        &["-L", "a label", "-i", "nrext64=1", "-m", "rmapbt=1"],
        &["-b", "size=1024", "-n", "size=4096"],
        &["-m", "bigtime=0,reflink=0,finobt=0,inobtcount=0", "-i", "sparse=0"],
        &["-n", "size=65536", "-i", "size=2048"],
        &["-s", "size=4096", "-d", "agcount=3"],
    ];
    for (number, options) in sets.into_iter().enumerate() {
        let what = format!("mkfs.xfs {}", options.join(" "));
        let folder = scratch();
        let image = folder.path().join("image");
        make(&image, options);
        {
            let mount = Mount::new(&image, "xfs", "noatime");
            generator::fill(mount.path(), Amount { names: 2500, holes: 700 });
            let contents = mount.path().join("contents");
            if !options.iter().any(|option| option.contains("reflink=0")) {
                let copy = ["--reflink=always", "size-300000", "shared"];
                succeed(Command::new("cp").args(copy).current_dir(contents));
            }
        }
        if number % 2 == 0 {
            // What is not that of the metadata from then on.
            succeed(Command::new("xfs_admin").args(["-U", "generate"]).arg(&image));
        }
        let mount = Mount::new(&image, "xfs", "ro,noatime");
        compare(&what, &image, &tree::of_kernel(mount.path()));
        let facts = open(&what, &image).facts();
        let value = |of| said_by("blkid", &["-p", "-o", "value", "-s", of], &image);
        assert_eq!((facts.kind.as_str(), facts.is_replayed, facts.problems), ("xfs", false, vec![]), "{what}");
        assert_eq!((facts.uuid, facts.label), (value("UUID"), value("LABEL")), "{what}");
    }
}

#[test]
fn a_volume_in_use_reads_as_the_kernel_shows_it_after_replaying_its_log() {
    let seed = Random::seed();
    let variants: [(&[&str], &str); 5] = [
        (&[], "noatime"),
        (&["-b", "size=1024", "-m", "rmapbt=1"], "noatime,logbsize=256k"),
        (&["-m", "bigtime=0,reflink=0,finobt=0,inobtcount=0", "-i", "sparse=0"], "noatime"),
        (&["-l", "su=64k", "-i", "size=2048,nrext64=1", "-n", "size=16384"], "noatime"),
        // Which it goes through more than once.
        (&["--unsupported", "-l", "size=8m"], "noatime"),
    ];
    let place = Reflinks::new(4 << 30);
    let (mut replayed, mut needed) = (0, 0);
    for (number, (options, mounted)) in (0..).zip(variants) {
        let what = format!("mkfs.xfs {} {mounted}", options.join(" "));
        let image = place.at("image");
        make(&image, options);
        if number % 2 == 1 {
            succeed(Command::new("xfs_admin").args(["-U", "generate"]).arg(&image));
        }
        let mount = Mount::new(&image, "xfs", mounted);
        let mut churn = Churn::new(mount.path(), seed + number);
        // Lists of what has no name any more are in the headers of groups.
        let unnamed: Vec<_> = (0..5)
            .map(|number| {
                let path = mount.path().join(format!("unnamed-{number}"));
                let file = File::create(&path).expect("room");
                fs::remove_file(&path).expect("it is ours");
                file
            })
            .collect();
        let sync = || rustix::fs::syncfs(&unnamed[0]).expect("it is written");
        sync();
        if options.contains(&"size=8m") {
            for folder in 0..24 {
                let folder = mount.path().join(format!("{folder}"));
                fs::create_dir(&folder).expect("room");
                (0..1000).for_each(|name| drop(File::create(folder.join(format!("{name}"))).expect("room")));
                sync();
                fs::remove_dir_all(&folder).expect("it is ours");
                sync();
            }
        }
        for round in 0..compare::rounds(1) {
            let what = format!("{what}, snapshot {round}");
            churn.work(200);
            let snapshot = place.copy(&image, "snapshot");
            let recovered = place.copy(&snapshot, "recovered");
            let kernel = tree::of_kernel(Mount::new(&recovered, "xfs", "noatime,nouuid").path());
            compare(&what, &snapshot, &kernel);
            let facts = open(&what, &snapshot).facts();
            assert_eq!((facts.is_replayed, facts.problems), (true, vec![]), "{what}");
            replayed += 1;
            assert!(passes(&snapshot) > 1 || !options.contains(&"size=8m"), "{what}: the log is not full");
            change_log(&snapshot, |log| log.fill(0));
            let (unreplayed, errors) = shown(&what, &snapshot);
            let differences = tree::differences(&kernel, &unreplayed, None).len() + errors.len();
            needed += u64::from(differences > 0);
        }
    }
    println!("{needed} of {replayed} snapshots would read wrong without their logs");
    assert!(replayed == 5 * compare::rounds(1) && needed > replayed / 2, "{needed} of {replayed}");
}

#[test]
fn a_log_that_is_damaged_is_not_replayed_and_said_to_be_so() {
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    make(&image, &[]);
    let mount = Mount::new(&image, "xfs", "noatime");
    let mut churn = Churn::new(mount.path(), Random::seed());
    churn.work(300);
    let snapshot = place.copy(&image, "snapshot");
    // In each record, far behind its start.
    change_log(&snapshot, |log| {
        let records: Vec<_> =
            (0..log.len()).step_by(512).filter(|at| log[*at..*at + 4] == [0xfe, 0xed, 0xba, 0xbe]).collect();
        assert!(records.len() > 8, "{} records", records.len());
        records.into_iter().for_each(|at| log[at + 512 + 40] ^= 0xff);
    });
    let facts = open("a damaged log", &snapshot).facts();
    let [problem] = &facts.problems[..] else { panic!("{:?}", facts.problems) };
    let start = "the log could not be replayed (there is no whole record in its sector ";
    let end = "): what changed in the last seconds before the backup may be missing or damaged";
    assert!(!facts.is_replayed && problem.starts_with(start) && problem.ends_with(end), "{problem}");
}

/// No kernel replays this: it takes the inode to be damaged, whose checksum it makes later.
#[test]
fn files_that_exchanged_their_content_read_as_before_the_power_was_lost() {
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    make(&image, &["-m", "rmapbt=0,reflink=0"]);
    let mount = Mount::new(&image, "xfs", "noatime");
    let names = ["one", "other"].map(|name| mount.path().join(name));
    for (name, byte) in names.iter().zip([1, 2]) {
        let file = File::create(name).expect("a new file");
        // In so many pieces that these are in a tree.
        for piece in 0..600 {
            file.write_all_at(&[byte; 4096], piece * 8192).expect("room");
        }
        file.sync_all().expect("it is written");
    }
    // All is in its place then.
    for way in ["-f", "-u"] {
        succeed(Command::new("xfs_freeze").arg(way).arg(mount.path()));
    }
    let exchange = format!("swapext {}", names[1].display());
    succeed(Command::new("xfs_io").args(["-c", &exchange, "-c", "fsync"]).arg(&names[0]));
    let snapshot = place.copy(&image, "snapshot");
    compare("exchanged", &snapshot, &tree::of_kernel(mount.path()));
    assert!(open("exchanged", &snapshot).facts().is_replayed);
}

#[test]
fn blocks_of_a_directory_that_lie_apart_are_put_together() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, &["-b", "size=1024", "-n", "size=8192", "-m", "reflink=0,finobt=0,rmapbt=0,inobtcount=0"]);
    {
        let mount = Mount::new(&image, "xfs", "noatime");
        let root = mount.path();
        fs::create_dir(root.join("apart")).expect("room");
        let full = File::create(root.join("full")).expect("room");
        // What is kept for the superuser would lie together.
        succeed(Command::new("xfs_io").args(["-x", "-c", "resblks 0"]).arg(root));
        let mut len = 0;
        for step in [1_u64 << 24, 1 << 20, 1 << 14, 1 << 10] {
            while rustix::fs::fallocate(&full, FallocateFlags::KEEP_SIZE, len, step).is_ok() {
                len += step;
            }
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for hole in 0..3000 {
            rustix::fs::fallocate(&full, punch, hole * 4096, 1024).expect("a hole");
        }
        for name in 0..1500 {
            let name = format!("apart/{name}-{}", "n".repeat(150));
            fs::hard_link(root.join("full"), root.join(name)).expect("a name");
        }
        let map = said_by("xfs_io", &["-r", "-c", "bmap -v"], &root.join("apart"));
        assert!(map.lines().count() > 100, "the directory lies together:\n{map}");
    }
    let mount = Mount::new(&image, "xfs", "ro,noatime");
    compare("a directory in pieces", &image, &tree::of_kernel(mount.path()));
}

#[test]
fn the_content_of_a_file_of_the_realtime_section_is_not_read() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, &[]);
    let inode = {
        let mount = Mount::new(&image, "xfs", "noatime");
        fs::write(mount.path().join("file"), "content").expect("room");
        fs::metadata(mount.path().join("file")).expect("it is there").ino()
    };
    let inode_command = format!("inode {inode}");
    let commands = ["-x", "-c", &inode_command, "-c", "write core.realtime 1"];
    succeed(Command::new("xfs_db").args(commands).arg(&image));
    let error = open("realtime", &image).extents(Inode(inode), 0, 1).expect_err("it is elsewhere");
    let expected = format!("the content of inode {inode} is in the realtime section, which is on another device");
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Unsupported, expected));
}

/// A disk that does not answer while it `is_away`.
struct Absent {
    disk: FileDisk,
    is_away: AtomicBool,
}

impl Disk for Absent {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        if self.is_away.load(Ordering::Relaxed) {
            return Err(disk::Error::new(disk::ErrorKind::Unavailable, "the storage did not answer"));
        }
        self.disk.read_at(offset, buffer)
    }

    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        self.disk.extent_at(offset)
    }
}

#[test]
fn errors_say_whether_it_is_the_disk_or_the_volume() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, &[]);
    let disk = Arc::new(Absent { disk: FileDisk::open(&image), is_away: AtomicBool::new(true) });
    let kind_of_open = |disk: Arc<dyn Disk>| Xfs::open(disk).err().map(|error| error.kind());
    assert_eq!(kind_of_open(disk.clone()), Some(ErrorKind::Disk));
    disk.is_away.store(false, Ordering::Relaxed);
    let guest = Xfs::open(disk.clone()).expect("it is there again");
    let root = guest.root();
    disk.is_away.store(true, Ordering::Relaxed);
    for error in [guest.list(root).err(), guest.attributes(root).err(), guest.xattrs(root).err()] {
        assert_eq!(
            error.map(|error| (error.kind(), error.to_string())),
            Some((ErrorKind::Disk, "the storage did not answer".to_owned()))
        );
    }
    disk.is_away.store(false, Ordering::Relaxed);
    assert_eq!(guest.list(root), Ok(vec![]));
    assert_eq!(guest.target(root).map_err(|error| error.kind()), Err(ErrorKind::WrongKind));
    assert_eq!(guest.extents(root, 0, 1).map_err(|error| error.kind()), Err(ErrorKind::WrongKind));
    // Of groups and of a block that are not there, and free.
    for number in [u64::MAX, 1 << 40, 25_000 * 8, root.0 + 40] {
        assert_eq!(guest.attributes(Inode(number)).map_err(|error| error.kind()), Err(ErrorKind::NotFound), "{number}");
    }
    let is = |kind, what: &str| assert_eq!(kind_of_open(Arc::new(FileDisk::open(&image))), Some(kind), "{what}");
    File::options().write(true).open(&image).and_then(|file| file.set_len(SIZE - 4096)).expect("an image");
    is(ErrorKind::Damaged, "cut off");
    File::options().write(true).open(&image).and_then(|file| file.write_all_at(&[1], 300)).expect("an image");
    is(ErrorKind::Damaged, "a wrong checksum");
    fs::remove_file(&image).expect("it is ours");
    let log = folder.path().join("log");
    sparse(&log, 128 << 20);
    make(&image, &["-l", &format!("logdev={},size=64m", log.display())]);
    is(ErrorKind::Unsupported, "a log on another device");
}

/// The kernel of the host mounts neither any more.
#[test]
fn volumes_of_version_4_and_those_that_ignore_case_read_as_a_kernel_that_mounts_them_shows_them() {
    let sets: [&[&str]; 4] = [
        &["-m", "crc=0,finobt=0", "-n", "ftype=0"],
        &["-m", "crc=0,finobt=0", "-n", "ftype=1", "-i", "size=512"],
        &["-m", "crc=0,finobt=0", "-b", "size=512", "-n", "size=4096"],
        &["-n", "version=ci"],
    ];
    for options in sets {
        let what = format!("mkfs.xfs {}", options.join(" "));
        let folder = scratch();
        let image = folder.path().join("image");
        make(&image, options);
        let script = "mount -o noatime /dev/ubda /mnt; task fill /mnt; umount /mnt\n\
                      mount -o ro,noatime /dev/ubda /mnt; task tree /mnt $out/tree; umount /mnt";
        let kernel = Machine::run(&[], &[&image], script).tree("tree");
        compare(&what, &image, &kernel);
        assert_eq!(open(&what, &image).facts().problems, Vec::<String>::new(), "{what}");
    }
}

#[test]
fn those_in_use_read_as_a_kernel_that_mounts_them_shows_them_after_replaying_their_logs() {
    let seed = Random::seed();
    let variants: [(&[&str], &str); 9] = [
        (&["-m", "crc=0,finobt=0", "-n", "ftype=0"], "noatime"),
        (&["-m", "crc=0,finobt=0", "-b", "size=1024", "-n", "ftype=1"], "noatime,logbsize=256k"),
        (&["-m", "crc=0,finobt=0", "-b", "size=512", "-l", "version=1"], "noatime"),
        // Which they go through many times.
        (&["--unsupported", "-m", "crc=0,finobt=0", "-l", "size=4m"], "noatime"),
        (&["--unsupported", "-m", "crc=0,finobt=0", "-l", "size=5m,version=1"], "noatime,logbsize=16k"),
        (&["-m", "crc=0,finobt=0", "-i", "attr=1,projid32bit=0"], "noatime,noattr2"),
        (&["-m", "crc=0,finobt=0", "-i", "size=1024,projid32bit=1", "-l", "su=64k"], "noatime"),
        (&["-n", "version=ci"], "noatime"),
        (&["-m", "crc=0,finobt=0", "-n", "version=ci,size=16384"], "noatime"),
    ];
    let place = Reflinks::new(8 << 30);
    let letters = || 'a'..;
    let mut work = "pids=\n".to_owned();
    let mut images = Vec::new();
    for ((number, letter), (options, mounted)) in (0..).zip(letters()).zip(variants) {
        let image = place.at(&format!("image-{number}"));
        make(&image, options);
        images.push(image);
        work += &format!("mkdir /mnt/{letter}; mount -o {mounted} /dev/ubd{letter} /mnt/{letter}\n");
        work += &format!("task churn /mnt/{letter} {} $out/stop & pids+=\" $!\"\n", seed + number);
    }
    // Something of each is in its log, once its first folders are.
    work += "for root in /mnt/?; do until [ -e $root/folder-7 ]; do sleep 0.1; done; sync -f $root; done\n\
             touch $out/working; for pid in $pids; do wait $pid; done; umount /mnt/?";
    let mut machine = Machine::start(&[], &images.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &work);
    machine.wait_for("working");
    let mut snapshots = Vec::new();
    for round in 0..compare::rounds(1) {
        std::thread::sleep(Duration::from_secs(4));
        for (image, (options, mounted)) in images.iter().zip(variants) {
            let what = format!("mkfs.xfs {} {mounted}, snapshot {round}", options.join(" "));
            let snapshot = place.copy(image, &format!("snapshot-{}", snapshots.len()));
            snapshots.push((what, snapshot));
        }
    }
    File::create(machine.out().join("stop")).expect("room");
    machine.finish();
    let mut needed = 0;
    for snapshots in snapshots.chunks(variants.len()) {
        let mut recovery = String::new();
        let mut recovered = Vec::new();
        for ((_, snapshot), letter) in snapshots.iter().zip(letters()) {
            recovered.push(place.copy(snapshot, &format!("recovered-{letter}")));
            // Writable, this kernel frees what is allocated past the end of a file that is read.
            recovery += &format!("mount -o ro /dev/ubd{letter} /mnt; task tree /mnt $out/{letter}; umount /mnt\n");
        }
        let output = Machine::run(&[], &recovered.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &recovery);
        for ((what, snapshot), letter) in snapshots.iter().zip(letters()) {
            let kernel = output.tree(&letter.to_string());
            compare(what, snapshot, &kernel);
            let facts = open(what, snapshot).facts();
            assert_eq!((facts.is_replayed, facts.problems), (true, vec![]), "{what}");
            let records = passes(snapshot);
            println!("{what}: {} files, {} passes", kernel.len(), records);
            change_log(snapshot, |log| log.fill(0));
            let (unreplayed, errors) = shown(what, snapshot);
            needed += usize::from(!errors.is_empty() || !tree::differences(&kernel, &unreplayed, None).is_empty());
        }
    }
    println!("{needed} of {} snapshots would read wrong without their logs", snapshots.len());
    assert!(needed > snapshots.len() / 2, "{needed} of {}", snapshots.len());
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    compare::machine::task();
}
