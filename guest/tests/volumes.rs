//! Volumes on images that are made by the programs that guests use. LVM needs root, for loop devices.

mod image;

use std::process::Command;

use guest::{Content, ErrorKind, Map, Mapped, Place, Stack, Survey, survey};
use image::{Images, LoopDevice, run, run_with_input};

const MIB: u64 = 1 << 20;

/// Name, start and length of each volume that lies together on the first disk.
fn ranges(survey: &Survey) -> Vec<(String, u64, u64)> {
    let range = |volume: &guest::Volume| {
        let map = volume.stack.as_ref().and_then(Stack::map).expect("it lies on the disk");
        let needs = map.segments().first().expect("it has bytes");
        let guest::SegmentSource::Disk(Place { disk: 0, offset }) = needs.source else { panic!("{map:?}") };
        assert_eq!(map.size(), needs.len);
        (volume.name.clone(), offset, needs.len)
    };
    survey.volumes.iter().map(range).collect()
}

/// The same of the partitions that sfdisk shows of an image or device, without those that hold others.
fn of_sfdisk(images: &Images, name: &str, sector_size: u64) -> Vec<(String, u64, u64)> {
    let dump = run(Command::new("sfdisk").args(["--dump", name]).current_dir(images.path()));
    let partition = |line: &str| {
        let (device, fields) = line.split_once(" : ")?;
        let field = |key: &str| {
            let (_, rest) = fields.split_once(&format!("{key}="))?;
            Some(rest.split(',').next()?.trim().to_owned())
        };
        let number = |key| field(key).and_then(|text| text.parse::<u64>().ok());
        let is_extended = matches!(field("type")?.as_str(), "5" | "f" | "85");
        (!is_extended).then_some((device.to_owned(), number("start")? * sector_size, number("size")? * sector_size))
    };
    dump.lines().filter_map(partition).collect()
}

#[test]
fn partitions_are_those_that_sfdisk_shows() {
    let images = Images::new();
    for (name, script, count) in [
        ("xvda", "label: dos\n,5M,c\n,7M,83,*\n,60M,5\n,9M,83\n,5M\n,6M,82\n,20M,fd\n", 6),
        ("xvdb", "label: gpt\n1 : size=3M\n5 : size=10M, name=\"a, b\"\n128 : size=1M\n3 : size=7M\n", 4),
        ("xvdd", "label: dos\n,40M\n,,\n", 2),
        ("xvde", "label: gpt\ntable-length: 256\n,10M\n,,\n", 2),
        ("nbd0", "label: gpt\n,10M\n,,\n", 2),
    ] {
        images.sized(name, 100 * MIB);
        run_with_input(&images, "sfdisk", &["--quiet", name], script);
        let expected = of_sfdisk(&images, name, 512);
        let found = survey(&images.disks(&[name]));
        assert_eq!((ranges(&found), found.problems), (expected.clone(), vec![]), "{name}");
        assert_eq!(expected.len(), count, "{expected:?}");
    }
}

#[test]
fn partitions_of_a_disk_with_sectors_of_4096_bytes_are_found() {
    let images = Images::new();
    for (label, sizes) in [("gpt", ["3M", "10M", "7M"]), ("dos", ["3M", "10M", "7M"])] {
        let image = images.sized("loop", 0);
        images.sized("loop", 64 * MIB);
        let device = LoopDevice::with_sectors(&image, 4096);
        let script = format!("label: {label}\n,{}\n,{}\n,{}\n", sizes[0], sizes[1], sizes[2]);
        run_with_input(&images, "sfdisk", &["--quiet", "--no-tell-kernel", device.path()], &script);
        let expected = of_sfdisk(&images, device.path(), 4096);
        drop(device);
        // An MBR does not say it: what stands there does.
        images.write("loop", expected[1].1 + 4086, b"SWAPSPACE2");
        let found = survey(&images.disks(&["loop"]));
        assert_eq!(found.problems, []);
        let places = |all: &[(String, u64, u64)]| all.iter().map(|(_, start, len)| (*start, *len)).collect::<Vec<_>>();
        assert_eq!(places(&ranges(&found)), places(&expected), "{label}");
        assert_eq!(expected.len(), 3);
    }
}

#[test]
fn of_a_gpt_either_copy_is_enough() {
    let images = Images::new();
    let all_of = |name: &str| {
        images.sized(name, 64 * MIB);
        let options = ["--set-alignment=1", "--new=1:34:99", "--new=2:100:199", "--new=9:0:0", "--hybrid=2"];
        run(Command::new("sgdisk").args(options).arg(name).current_dir(images.path()));
        let expected = of_sfdisk(&images, name, 512);
        assert_eq!(expected.len(), 3, "sfdisk shows the GPT of a hybrid");
        expected
    };
    type Change = fn(&Images, &str);
    let changes: [(&str, Change, Option<&str>); 6] = [
        ("good", |_, _| {}, None),
        ("header", |images, name| images.write(name, 512, &[0; 512]), Some("sector 131071 is used")),
        ("entries", |images, name| images.write(name, 1024, &[9; 20]), Some("sector 131071 is used")),
        (
            "grown",
            |images, name| {
                images.sized(name, 65 * MIB);
                images.write(name, 512, &[0; 512])
            },
            Some("sector 131071 is used"),
        ),
        (
            "much",
            |images, name| {
                images.sized(name, 999 * MIB);
                images.write(name, 570, &[9; 9])
            },
            Some("sector 131071 is used"),
        ),
        ("unprotected", |images, name| images.write(name, 0, &[0; 512]), None),
    ];
    for (name, change, said) in changes {
        let expected = all_of(name);
        change(&images, name);
        let found = survey(&images.disks(&[name]));
        assert_eq!(ranges(&found), expected, "{name}: {:?}", found.problems);
        match said {
            None => assert_eq!(found.problems, [], "{name}"),
            Some(text) => assert!(found.problems[0].to_string().ends_with(text), "{name}: {:?}", found.problems),
        }
    }

    let expected = all_of("cut");
    images.sized("cut", 10 * MIB);
    let found = survey(&images.disks(&["cut"]));
    let (_, start, len) = &expected[2];
    assert_eq!(ranges(&found)[2], (expected[2].0.clone(), *start, 10 * MIB - start));
    let problem = found.volumes[2].problem.as_ref().expect("it is cut off").to_string();
    let missing = start + len - 10 * MIB;
    assert_eq!(problem, format!("its last {missing} bytes are past the end of the disk: it is shown without them"));
}

#[test]
fn what_was_made_on_a_disk_is_what_stands_there() {
    let images = Images::new();
    std::fs::create_dir(images.path().join("files")).unwrap();
    std::fs::write(images.path().join("files/a"), "text").unwrap();
    std::fs::write(images.path().join("key"), "secret").unwrap();
    let cases: [(Content, u64, &[&str]); 19] = [
        (Content::Ext2, 16, &["mkfs.ext2", "-q", "-F", "image"]),
        (Content::Ext3, 16, &["mkfs.ext3", "-q", "-F", "image"]),
        (Content::Ext4, 16, &["mkfs.ext4", "-q", "-F", "image"]),
        (Content::Ext4, 16, &["mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "^has_journal", "image"]),
        (Content::ExtJournal, 16, &["mke2fs", "-q", "-F", "-O", "journal_dev", "image"]),
        (Content::Xfs, 320, &["mkfs.xfs", "-q", "image"]),
        (Content::Btrfs, 128, &["mkfs.btrfs", "-q", "image"]),
        (Content::Ntfs, 16, &["mkntfs", "-q", "-F", "-Q", "image"]),
        (Content::Fat12, 4, &["mkfs.vfat", "image"]),
        (Content::Fat16, 32, &["mkfs.vfat", "image"]),
        (Content::Fat32, 64, &["mkfs.vfat", "-F", "32", "image"]),
        (Content::Fat32, 64, &["mkfs.vfat", "-F", "32", "-S", "4096", "-s", "1", "image"]),
        (Content::ExFat, 16, &["mkfs.exfat", "image"]),
        (Content::Squashfs, 0, &["mksquashfs", "files", "image", "-quiet", "-no-progress", "-noappend"]),
        (Content::Iso9660, 0, &["xorrisofs", "-quiet", "-o", "image", "files"]),
        (Content::Swap, 16, &["mkswap", "image"]),
        (Content::Swap, 16, &["mkswap", "-p", "65536", "image"]),
        (
            Content::Luks1,
            16,
            &["cryptsetup", "luksFormat", "-q", "--type=luks1", "--pbkdf-force-iterations=1000", "image", "key"],
        ),
        (
            Content::Luks2,
            32,
            &["cryptsetup", "luksFormat", "-q", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "image", "key"],
        ),
    ];
    for (content, mib, command) in cases {
        let _ = std::fs::remove_file(images.path().join("image"));
        if mib > 0 {
            images.sized("image", mib * MIB);
        }
        run(Command::new(command[0]).args(&command[1..]).current_dir(images.path()));
        let found = survey(&images.disks(&["image"]));
        assert_eq!(found.problems, [], "{command:?}");
        let [volume] = &found.volumes[..] else { panic!("{command:?}: {:?}", found.volumes) };
        let size = std::fs::metadata(images.path().join("image")).unwrap().len();
        assert_eq!(
            (&*volume.name, volume.content, volume.stack.as_ref().map(Stack::size)),
            ("image", content, Some(size))
        );
        assert_eq!(volume.problem, None);
    }
}

#[test]
fn an_iso_9660_that_machines_start_from_as_from_a_disk_is_shown() {
    let images = Images::new();
    std::fs::create_dir(images.path().join("files")).unwrap();
    std::fs::write(images.path().join("files/a"), "text").unwrap();
    images.sized("efi", 4 * MIB);
    run(Command::new("mkfs.vfat").arg("efi").current_dir(images.path()));
    let (whole, first) = (("image", Content::Iso9660), ("image1", Content::Iso9660));
    let cases = [
        (&["--protective-msdos-label"][..], vec![("image1", Content::Unknown), whole]),
        // Whose first partition is all of it.
        (&["-append_partition", "2", "0xef", "efi"], vec![first, ("image2", Content::Fat12)]),
        (&["-partition_offset", "16"], vec![first]),
    ];
    for (options, expected) in cases {
        let command = ["-quiet", "-R", "-o", "image"];
        run(Command::new("xorrisofs").args(command).args(options).arg("files").current_dir(images.path()));
        let found = survey(&images.disks(&["image"]));
        let volumes: Vec<_> = found.volumes.iter().map(|volume| (&*volume.name, volume.content)).collect();
        assert_eq!(volumes, expected, "{options:?}: {:?}", found.problems);
    }
}

/// Runs lvm on these devices and no others, without the device mapper, and with its own files beside the images.
fn lvm(images: &Images, devices: &[&LoopDevice], arguments: &[&str]) -> String {
    let accepted: String = devices.iter().map(|device| format!("\"a|^{}$|\", ", device.path())).collect();
    let folder = images.path().display();
    let settings = format!(
        "devices {{ filter = [{accepted}\"r|.*|\"] use_devicesfile = 0 hints = \"none\" }}\n\
         global {{ locking_dir = \"{folder}/lock\" use_lvmpolld = 0 event_activation = 0 }}\n\
         activation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 }}\n\
         backup {{ backup = 0 archive = 0 }}\n"
    );
    std::fs::write(images.path().join("lvm.conf"), settings).unwrap();
    let mut command = Command::new("lvm");
    command.arg(arguments[0]).args(["--driverloaded", "n"]).args(&arguments[1..]);
    run(command.env("LVM_SYSTEM_DIR", images.path()).env("LVM_SUPPRESS_FD_WARNINGS", "1"))
}

/// Pieces of this size get their number in their volume.
const PIECE: u64 = 64 << 10;

/// Writes the number of each piece of a logical volume to where LVM says that it lies; returns how many there are.
///
/// `ranges` are those that LVM shows for each segment: a device and its first and last extent, for each column.
fn number_pieces(
    images: &Images,
    names: &[(&str, &LoopDevice)],
    segments: &[(u64, &str)],
    extent: u64,
    start: u64,
) -> u64 {
    let mut piece: u64 = 0;
    for (stripe_size, ranges) in segments {
        let columns: Vec<(&str, u64, u64)> = ranges
            .split_whitespace()
            .map(|range| {
                let (device, extents) = range.rsplit_once(':').expect("a device and extents");
                let (first, last) = extents.split_once('-').expect("a first and a last extent");
                let name = names.iter().find(|(_, other)| other.path() == device).expect("one of ours").0;
                (name, first.parse().unwrap(), last.parse().unwrap())
            })
            .collect();
        let each = (columns[0].2 - columns[0].1 + 1) * extent;
        let step = if columns.len() == 1 { each } else { *stripe_size };
        for row in 0..each / step {
            for (name, first, _) in &columns {
                let at = start + first * extent + row * step;
                for within in (0..step).step_by(usize::try_from(PIECE).unwrap()) {
                    images.write(name, at + within, &piece.to_le_bytes());
                    piece += 1;
                }
            }
        }
    }
    piece
}

#[test]
fn logical_volumes_are_read_where_lvm_says_that_they_lie() {
    let images = Images::new();
    let paths = ["xvda", "xvdb", "xvdc"].map(|name| images.sized(name, 48 * MIB));
    let [a, b, c] = paths.each_ref().map(|path| LoopDevice::new(path));
    let run = |arguments: &[&str]| lvm(&images, &[&a, &b, &c], arguments);
    run(&["pvcreate", "-q", "--metadatasize", "60k", a.path(), b.path(), c.path()]);
    run(&["vgcreate", "-q", "--setautoactivation=n", "-s", "1M", "vg-0", a.path(), b.path(), c.path()]);
    let create = |name: &str, options: &[&str]| {
        run(&[&["lvcreate", "-q", "-n", name, "-an", "-Zn", "-Wn"], options, &["vg-0"]].concat());
    };
    create("root", &["-l", "10"]);
    create("striped", &["-l", "18", "-i", "3", "-I", "128k"]);
    create("my-data", &["-l", "80"]);
    run(&["lvextend", "-q", "-l", "+5", "vg-0/root"]);
    // The text becomes so long that the next one goes on at the start of its area.
    for tag in 0..4 {
        let tags: Vec<_> = (0..16).map(|index| format!("--addtag={}{tag}{index}", "t".repeat(900))).collect();
        let tags: Vec<_> = tags.iter().map(String::as_str).collect();
        run(&[&["vgchange", "-q"], &tags[..], &["vg-0"]].concat());
        let removed: Vec<_> = tags.iter().map(|tag| tag.replace("--add", "--del")).collect();
        let removed: Vec<_> = removed.iter().map(String::as_str).collect();
        run(&[&["vgchange", "-q"], &removed[..], &["vg-0"]].concat());
    }
    let report = run(&[
        "lvs",
        "--segments",
        "--noheadings",
        "--units=b",
        "--nosuffix",
        "--separator=;",
        "--sort=lv_name,seg_start",
        "-o",
        "lv_name,stripe_size,vg_extent_size,seg_pe_ranges",
    ]);
    let starts = run(&["pvs", "--noheadings", "--units=b", "--nosuffix", "-o", "pe_start"]);
    let mut starts: Vec<u64> = starts.split_whitespace().map(|start| start.parse().unwrap()).collect();
    starts.dedup();
    let [start] = starts[..] else { panic!("all physical volumes begin at one place: {starts:?}") };
    let names = [("xvda", &a), ("xvdb", &b), ("xvdc", &c)];
    let rows: Vec<Vec<&str>> = report.lines().map(|line| line.trim().split(';').collect()).collect();
    let mut numbered = vec![];
    for (lv, shown) in [("my-data", "vg--0-my--data"), ("root", "vg--0-root"), ("striped", "vg--0-striped")] {
        let segments: Vec<_> =
            rows.iter().filter(|row| row[0] == lv).map(|row| (row[1].parse().unwrap(), row[3])).collect();
        assert!(!segments.is_empty(), "{report}");
        numbered.push((shown, number_pieces(&images, &names, &segments, MIB, start)));
    }
    assert_eq!(numbered.iter().map(|(_, pieces)| pieces * PIECE / MIB).collect::<Vec<_>>(), [80, 15, 18]);
    drop([a, b, c]);

    let disks = images.disks(&["xvdb", "xvdc", "xvda"]);
    let found = survey(&disks);
    assert_eq!(found.problems, []);
    let mut seen: Vec<_> = found.volumes.iter().map(|volume| (&*volume.name, volume.content)).collect();
    seen.sort_by_key(|(name, _)| *name);
    let pv = Content::LvmPhysicalVolume;
    assert_eq!(
        seen,
        [
            ("vg--0-my--data", Content::Unknown),
            ("vg--0-root", Content::Unknown),
            ("vg--0-striped", Content::Unknown),
            ("xvda", pv),
            ("xvdb", pv),
            ("xvdc", pv),
        ]
    );
    let bare: Vec<_> = disks.iter().map(|(_, disk)| disk.clone()).collect();
    for (name, pieces) in &numbered {
        let volume = found.volumes.iter().find(|volume| volume.name == *name).unwrap();
        let map = volume.stack.as_ref().unwrap().map().unwrap().clone();
        assert_eq!(map.size(), pieces * PIECE, "{name}");
        let mapped = Mapped::new(map, bare.clone()).unwrap();
        for piece in 0..*pieces {
            let mut number = [0; 8];
            disk::Disk::read_at(&mapped, piece * PIECE, &mut number).unwrap();
            assert_eq!(u64::from_le_bytes(number), piece, "{name}");
        }
    }

    // Without one of the disks, what does not lie on it is still there.
    let found = survey(&images.disks(&["xvda"]));
    let missing: Vec<_> = found.volumes.iter().filter(|volume| volume.stack.is_none()).collect();
    assert!(missing.iter().any(|volume| volume.name == "vg--0-striped"), "{missing:?}");
    for volume in missing {
        let problem = volume.problem.as_ref().unwrap();
        assert_eq!(problem.kind(), ErrorKind::NotFound);
        assert!(problem.to_string().ends_with("which is on no disk of this backup"), "{problem}");
    }
}

#[test]
fn a_physical_volume_on_a_partition_is_shown_beside_what_it_holds() {
    let images = Images::new();
    let image = images.sized("pv", 32 * MIB);
    let device = LoopDevice::new(&image);
    let run = |arguments: &[&str]| lvm(&images, &[&device], arguments);
    run(&["pvcreate", "-q", device.path()]);
    run(&["vgcreate", "-q", "--setautoactivation=n", "vg0", device.path()]);
    run(&["lvcreate", "-q", "-n", "swap", "-an", "-Zn", "-Wn", "-l", "100%FREE", "vg0"]);
    drop(device);
    images.sized("xvda", 64 * MIB);
    run_with_input(&images, "sfdisk", &["--quiet", "xvda"], "label: gpt\n2 : start=8M, size=32M\n");
    images.write("xvda", 8 * MIB, &std::fs::read(&image).unwrap());
    // The first extent of a physical volume of lvm's own making is at 1 MiB.
    images.write("xvda", 9 * MIB + 4086, b"SWAPSPACE2");

    let found = survey(&images.disks(&["xvda"]));
    assert_eq!(found.problems, []);
    let seen: Vec<_> = found.volumes.iter().map(|volume| (&*volume.name, volume.content)).collect();
    assert_eq!(seen, [("xvda2", Content::LvmPhysicalVolume), ("vg0-swap", Content::Swap)]);
    assert_eq!(
        found.volumes[1].stack,
        Some(Map::of_range(Place { disk: 0, offset: 9 * MIB }, 28 * MIB).unwrap().into())
    );
}
