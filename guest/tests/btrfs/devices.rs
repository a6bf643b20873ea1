//! Filesystems on several devices: in any order, with some missing, damaged or left behind, and found by a survey.

use std::sync::{Mutex, PoisonError};

use guest::{Content, Mapped, Source, Stack, Survey, Volume, survey};

use super::*;
use compare::image::Loop;

/// Held from when the kernel forgets the devices of all tests until it has mounted those of one.
static FORGETTING: Mutex<()> = Mutex::new(());

/// Mounts a filesystem of several devices for as long as something is done with it.
fn mounted<T>(images: &[PathBuf], options: &str, act: impl FnOnce(&Path) -> T) -> T {
    let devices: Vec<_> = images.iter().map(|image| Loop::new(image)).collect();
    // The kernel remembers devices that were mounted before, and takes one that is not gone yet.
    let others = FORGETTING.lock().unwrap_or_else(PoisonError::into_inner);
    succeed(Command::new("btrfs").args(["device", "scan", "--forget"]));
    let names = devices.iter().map(|device| format!("device={}", device.path().display()));
    let options = names.chain([format!("{OPTIONS},{options}")]).collect::<Vec<_>>().join(",");
    let mount = Mount::of_device(devices[0].path(), "btrfs", &options);
    drop(others);
    act(mount.path())
}

fn numbered(folder: &Path, count: usize) -> Vec<PathBuf> {
    (0..count).map(|number| folder.join(format!("image-{number}"))).collect()
}

#[test]
fn a_filesystem_of_several_devices_reads_as_the_kernel_shows_it_in_any_order() {
    let sets: [(usize, &[&str]); 5] = [
        (2, &["-d", "raid0", "-m", "raid1"]),
        (2, &["-d", "raid1", "-m", "raid1", "--csum", "xxhash"]),
        (3, &["-d", "single", "-m", "raid1c3"]),
        (4, &["-d", "raid10", "-m", "raid10"]),
        (2, &["-d", "dup", "-m", "dup"]),
    ];
    for (count, mkfs) in sets {
        let what = format!("{count} devices {}", mkfs.join(" "));
        let folder = scratch();
        let mut images = numbered(folder.path(), count);
        make(&images, SIZE, mkfs);
        mounted(&images, "compress=zstd", |root| {
            generator::fill(root, Amount { names: 300, holes: 50 });
            compressible(&root.join("compressible"), &mut Random::new(3));
            subvolumes(root);
        });
        let kernel = mounted(&images, "ro", of_kernel);
        for _ in 0..2 {
            compare(&what, &images, kernel.clone());
            images.reverse();
        }
        let twice = [images[0].clone(), images[0].clone()];
        assert_eq!(open(&twice).1.err().expect("it is one device").kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn a_missing_device_costs_what_lies_only_there() {
    let folder = scratch();
    let images = numbered(folder.path(), 3);
    make(&images, SIZE, &["-d", "raid0", "-m", "raid1c3"]);
    mounted(&images, "noatime", |root| {
        fs::write(root.join("large"), Random::new(3).bytes(1 << 20)).expect("room");
        fs::write(root.join("small"), "it stands in the tree").expect("room");
        File::create(root.join("late")).and_then(|file| file.write_all_at(b"late", 5 << 20)).expect("room");
    });
    for missing in 0..3 {
        let mut here = images.clone();
        here.remove(missing);
        let (disks, guest) = open(&here);
        let guest = guest.expect("all trees are on each device");
        let number = missing + 1;
        let problem = format!(
            "the filesystem is on 3 devices, and device {number} is missing: what lies only there cannot be read"
        );
        assert_eq!(guest.facts().problems, [problem]);
        let (mut read, mut lost) = (0, 0);
        mounted(&here, "ro,degraded", |root| {
            for entry in guest.list(guest.root()).expect("it is there") {
                let file = File::open(root.join(std::ffi::OsStr::from_bytes(&entry.name))).expect("the kernel has it");
                let size = file.metadata().expect("it is open").len();
                for at in (0..size).step_by(4096) {
                    let mut piece = vec![0; usize::try_from(4096.min(size - at)).expect("small")];
                    let truth = file.read_exact_at(&mut piece, at).map(|()| piece).ok();
                    let shown = read_at(&guest, &disks, entry.inode, at, size);
                    assert_eq!(
                        shown.as_ref().err().map(guest::Error::to_string),
                        truth.is_none().then(|| { format!("device {number} of the filesystem is missing") })
                    );
                    assert!(shown.ok() == truth, "{} at {at}", entry.name.escape_ascii());
                    *(if truth.is_some() { &mut read } else { &mut lost }) += 1;
                }
            }
        });
        assert!(lost >= 64 && read > 1200, "{lost} lost, {read} read");
    }
}

/// Reads up to 4 KiB of a file of `size` bytes.
fn read_at(guest: &Btrfs, disks: &[Arc<dyn Disk>], inode: Inode, at: u64, size: u64) -> guest::Result<Vec<u8>> {
    let len = 4096.min(size - at);
    let extents = guest.extents(inode, at, 1)?;
    assert!(extents.until >= at + len, "a page lies in one piece");
    let found = extents.found.iter().find(|extent| extent.start <= at && extent.start + extent.len > at);
    let mut piece = vec![0; usize::try_from(len).expect("small")];
    match found.map(|extent| (extent.start, &extent.source)) {
        None | Some((_, Source::Zeroes)) => {}
        Some((_, Source::Bytes(bytes))) => piece.copy_from_slice(bytes),
        Some((start, Source::Member(member, place))) => {
            disks[usize::from(*member)].read_at(place + (at - start), &mut piece)?;
        }
        Some((_, Source::Encoded)) => panic!("nothing is compressed"),
    }
    Ok(piece)
}

#[test]
fn a_missing_device_without_which_nothing_is_found_is_named() {
    let folder = scratch();
    let images = numbered(folder.path(), 2);
    make(&images, SIZE, &["-d", "single", "-m", "single"]);
    let alone: Vec<_> = images.iter().map(|image| open(std::slice::from_ref(image)).1.err()).collect();
    let errors: Vec<_> = alone.into_iter().flatten().map(|error| (error.kind(), error.to_string())).collect();
    let [(ErrorKind::Unsupported, text)] = &errors[..] else { panic!("{errors:?}") };
    assert!(text.starts_with("the filesystem is on 2 devices, and only 1 of them can be read: "), "{text}");
}

#[test]
fn what_is_mirrored_lacks_nothing_without_a_device() {
    for (count, profile) in [(2, "raid1"), (4, "raid10")] {
        let folder = scratch();
        let images = numbered(folder.path(), count);
        make(&images, SIZE, &["-d", profile, "-m", profile]);
        let kernel = mounted(&images, "compress=zstd", |root| {
            generator::fill(root, Amount { names: 300, holes: 50 });
            compressible(&root.join("compressible"), &mut Random::new(3));
            sync(root);
            of_kernel(root)
        });
        for missing in 0..count {
            let mut here = images.clone();
            here.remove(missing);
            compare(&format!("{profile} without {missing}"), &here, kernel.clone());
        }
    }
}

fn surveyed(images: &[&PathBuf]) -> (Survey, Vec<Arc<dyn Disk>>) {
    let disk =
        |(image, name): (&&PathBuf, char)| (format!("xvd{name}"), Arc::new(FileDisk::open(image)) as Arc<dyn Disk>);
    let disks: Vec<_> = images.iter().zip('a'..).map(disk).collect();
    (survey(&disks), disks.into_iter().map(|(_, disk)| disk).collect())
}

/// Name, content, the others and what is wrong, of each volume.
fn told(survey: &Survey) -> Vec<(&str, Content, String, String)> {
    let mut found = Vec::new();
    for Volume { name, content, others, problem, .. } in &survey.volumes {
        let problem = problem.as_ref().map(ToString::to_string).unwrap_or_default();
        found.push((&**name, *content, others.join(" "), problem));
    }
    found
}

#[test]
fn a_survey_puts_the_devices_of_each_filesystem_together() {
    let folder = scratch();
    let images = numbered(folder.path(), 5);
    let [first, other, second, single, copy] = &images[..] else { panic!("five") };
    make(&[first.clone(), second.clone()], SIZE, &["-d", "raid0", "-m", "raid0"]);
    make(std::slice::from_ref(other), SIZE, &[]);
    make(std::slice::from_ref(single), SIZE, &[]);
    fs::copy(single, copy).expect("room");
    let kernel = mounted(&[first.clone(), second.clone()], "compress=zstd", |root| {
        generator::fill(root, Amount { names: 300, holes: 50 });
        sync(root);
        of_kernel(root)
    });
    let none = String::new;
    let is_alone = |name: &'static str| (name, Content::Btrfs, none(), none());

    // Copies of what is on one device are as many filesystems.
    let (survey, disks) = surveyed(&[second, other, single, copy, first]);
    let expected = [
        ("xvda", Content::Btrfs, "xvde".to_owned(), none()),
        is_alone("xvdb"),
        is_alone("xvdc"),
        is_alone("xvdd"),
        ("xvde", Content::BtrfsDevice, none(), none()),
    ];
    assert_eq!((told(&survey), &survey.problems[..]), (expected.to_vec(), &[][..]));
    let member = |name: &str| {
        let volume = survey.volumes.iter().find(|volume| volume.name == name).expect("it was found");
        let map = volume.stack.as_ref().and_then(Stack::map).cloned().expect("it is a disk");
        Arc::new(Mapped::new(map, disks.clone()).expect("it is sound")) as Arc<dyn Disk>
    };
    let members: Vec<_> = ["xvda", "xvde"].into_iter().map(member).collect();
    let guest = Btrfs::open(members.clone());
    compare_opened("surveyed", &members, guest, kernel);

    assert_eq!(told(&surveyed(&[other, second]).0), [is_alone("xvda"), is_alone("xvdb")]);

    fs::copy(second, copy).expect("room");
    let (survey, _) = surveyed(&[first, second, copy, other]);
    let text = "xvdb, xvdc are all device 2 of one Btrfs, of which some are copies: which belong together is not known, so its \
                files are not shown; mount those that do with -o device=";
    let device = |name: &'static str| (name, Content::BtrfsDevice, none(), text.to_owned());
    assert_eq!(told(&survey), [device("xvda"), device("xvdb"), device("xvdc"), is_alone("xvdd")]);
}

#[test]
fn what_is_damaged_is_read_from_its_copy() {
    let folder = scratch();
    let images = numbered(folder.path(), 2);
    make(&images, SIZE, &["-d", "raid1", "-m", "raid1"]);
    let kernel = mounted(&images, "noatime", |root| {
        // All of it stands in the trees: nobody checks what does not.
        for number in 0..3000 {
            fs::write(root.join(format!("file-{number}")), number.to_string().repeat(100)).expect("room");
        }
        of_kernel(root)
    });
    for image in &images {
        let bytes = fs::read(image).expect("it was made");
        let file = File::options().write(true).open(image).expect("it was made");
        // Only the superblocks are left, and of these the second.
        file.set_len(0).and_then(|()| file.set_len(SIZE)).expect("sparse");
        file.write_all_at(&bytes[64 << 20..][..4096], 64 << 20).expect("room");
        compare(&image.display().to_string(), &images, kernel.clone());
        file.write_all_at(&bytes, 0).expect("room");
    }
    for image in &images {
        let file = File::options().write(true).open(image).expect("it was made");
        file.write_all_at(&[0xff; 4096], 64 << 10).expect("room");
        file.write_all_at(&[0xff; 4096], 64 << 20).expect("room");
    }
    assert_eq!(open(&images).1.err().expect("it has no superblock").kind(), ErrorKind::Damaged);
}

#[test]
fn of_a_device_that_was_left_behind_nothing_is_read_that_has_a_newer_copy() {
    let place = Reflinks::new(2 << 30);
    let mut images = vec![place.at("first"), place.at("second")];
    make(&images, SIZE, &["-d", "raid1", "-m", "raid1"]);
    let write = |root: &Path, text: &str| {
        for number in 0..50 {
            fs::write(root.join(format!("file-{number}")), text.repeat(2000)).expect("room");
        }
    };
    mounted(&images, "nodatacow", |root| write(root, "old"));
    let old = place.copy(&images[0], "old");
    mounted(&images, "nodatacow", |root| write(root, "new"));
    let kernel = mounted(&images, "ro", of_kernel);
    compare("both", &images, kernel.clone());
    images[0] = old;
    compare("one left behind", &images, kernel);
    let problems = open(&images).1.expect("it was opened before").facts().problems;
    assert!(problems.len() == 1 && problems[0].starts_with("device 1 is older than the others"), "{problems:?}");
}

/// Lets all that was done be written.
fn sync(root: &Path) {
    File::open(root).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
}
