//! ISO 9660 as the kernel of a machine shows it: Rock Ridge, Joliet and plain, of the programs that make it.

mod compare;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use compare::Random;
use compare::generator::{self, Amount};
use compare::image::{self, FileDisk, Mount, scratch, succeed};
use compare::machine::Machine;
use compare::tree::{self, Tree};
use disk::Disk;
use guest::iso::Iso;
use guest::{Attributes, ErrorKind, Extent, GuestFs, Source};

/// Makes and fills a filesystem that has all of what an ISO 9660 can hold.
fn source(folder: &Path) -> Mount {
    let image = folder.join("source");
    image::make(&image, 128 << 20, &["mkfs.ext4"]);
    let mount = Mount::new(&image, "ext4", "noatime");
    generator::fill(mount.path(), Amount { names: 900, holes: 60 });
    let at = |name: &str| mount.path().join(name);
    // What is written out takes room, and components or targets of that length are the end of those programs.
    fs::remove_file(at("contents/far")).expect("it was made");
    for len in [1000, 1023, 1024, 4000, 4095] {
        let _ = fs::remove_file(at(&format!("kinds/link-{len}")));
    }
    // Linux ends a name after 253 bytes.
    fs::rename(at("names").join("n".repeat(255)), at("names").join("n".repeat(253))).expect("it was made");
    let targets = ["/", "/abs/./x/..//y", ".", "..", "../..", "a/", "/a", "./a", "a//b", "...", "a/.b/..c"];
    for (number, target) in targets.into_iter().enumerate() {
        symlink(target, at(&format!("kinds/target-{number}"))).expect("a link");
    }
    symlink(format!("{}end", "component/".repeat(60)), at("kinds/components")).expect("a link");
    symlink(format!("{}/{}/x", "l".repeat(250), "m".repeat(255)), at("kinds/long-components")).expect("a link");
    mount
}

/// Panics unless this crate reads of an image what the kernel showed.
fn compare(what: &str, image: &Path, kernel: Tree) {
    let disk = Arc::new(FileDisk::open(image));
    let guest = Iso::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (mut shown, errors) = tree::of_guest(&guest, disk.as_ref());
    // The kernel numbers records by 32 bytes.
    tree::renumber(what, &kernel, &mut shown);
    for (_, file) in shown.iter_mut().filter(|(path, _)| kernel.contains_key(*path)) {
        let Attributes { accessed, modified, changed, .. } = &mut file.attributes;
        for time in [accessed, modified, changed] {
            // It has 32 bits for the seconds.
            time.seconds = (time.seconds + (1 << 31)).rem_euclid(1 << 32) - (1 << 31);
        }
    }
    let differences = tree::differences(&kernel, &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", kernel.len(), lines.join("\n"));
    println!("{what}: {} files", kernel.len());
}

/// Has the kernel of one machine show images, each mounted with options, and compares.
fn judge(images: &[(String, PathBuf, &str)]) {
    let paths: Vec<_> = images.iter().map(|(_, path, _)| path.as_path()).collect();
    let mount = |(letter, (_, _, options)): (char, &(_, _, &str))| {
        format!("mount -t iso9660 -o ro,{options} /dev/ubd{letter} /mnt; task tree /mnt $out/{letter}; umount /mnt\n")
    };
    let script: String = ('a'..).zip(images).map(mount).collect();
    let output = Machine::run(&["isofs", "nls_utf8"], &paths, &script);
    for (letter, (what, path, _)) in ('a'..).zip(images) {
        compare(what, path, output.tree(&letter.to_string()));
    }
}

/// Runs a program that makes images.
fn make(program: &str, options: &[&str], image: &Path, source: &Path) {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C.UTF-8").arg("-quiet").args(options).arg("-o").args([image, source]);
    succeed(&mut command);
}

#[test]
fn every_kind_of_names_reads_as_the_kernel_shows_it() {
    let folder = scratch();
    let source = source(folder.path());
    let sets: [(&str, &[&str]); 16] = [
        ("xorrisofs", &["-R", "-J", "-joliet-long"]),
        ("xorrisofs", &["-R", "-V", "a label"]),
        ("xorrisofs", &["-r", "-rr_reloc_dir", "/moved", "-no-pad"]),
        ("xorrisofs", &["--norock", "-J"]),
        ("xorrisofs", &["--norock", "-J", "-joliet-long", "-iso-level", "3"]),
        ("xorrisofs", &["--norock", "-iso-level", "1"]),
        ("xorrisofs", &["--norock", "-iso-level", "2", "-N"]),
        ("xorrisofs", &["--norock", "-iso-level", "3", "-U"]),
        ("genisoimage", &["-R", "-J", "-joliet-long", "-m", "\u{1f600}", "-m", "*components"]),
        ("genisoimage", &["-R", "-m", "*components"]),
        ("genisoimage", &["-r", "-hide-rr-moved", "-m", "*components"]),
        ("genisoimage", &["-J", "-D", "-m", "\u{1f600}"]),
        ("genisoimage", &["-iso-level", "1", "-D"]),
        ("genisoimage", &["-iso-level", "2", "-D", "-allow-lowercase"]),
        ("genisoimage", &["-iso-level", "3", "-D"]),
        ("genisoimage", &["-iso-level", "4", "-D", "-relaxed-filenames"]),
    ];
    let images = sets.into_iter().enumerate().map(|(number, (program, options))| {
        let image = folder.path().join(format!("image-{number}"));
        make(program, options, &image, source.path());
        (format!("{program} {}", options.join(" ")), image, "utf8")
    });
    judge(&images.collect::<Vec<_>>());
}

#[test]
fn a_name_of_255_bytes_is_whole() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    // Rock Ridge needs two fields for both, of which Linux leaves out the second of the longer one.
    for len in [254, 255] {
        fs::write(source.join("n".repeat(len)), format!("{len}")).expect("room");
    }
    make("xorrisofs", &["-R"], &image, &source);
    let guest = Iso::open(Arc::new(FileDisk::open(&image))).expect("it was just made");
    let mut names: Vec<_> =
        guest.list(guest.root()).expect("it is sound").into_iter().map(|entry| entry.name).collect();
    names.sort();
    assert_eq!(names, [vec![b'n'; 254], vec![b'n'; 255]]);
}

#[test]
fn a_file_of_more_than_4_gib_is_all_of_its_sections() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    let size = (4 << 30) + 70_000;
    let file = File::create(source.join("large")).expect("a new file");
    let places = [0, (1 << 32) - 2048 - 5, (1 << 32) - 5, size - 9];
    for at in places {
        file.write_all_at(b"not empty", at).expect("sparse");
    }
    // Only what is not zero is to take room.
    let made = "xorrisofs -quiet -R -iso-level 3 \"$1\"";
    let script = format!("set -o pipefail; {made} | dd of=\"$2\" bs=64k iflag=fullblock conv=sparse");
    succeed(Command::new("bash").args(["-c", &script, "bash"]).args([&source, &image]));
    let taken = fs::metadata(&image).expect("it was made").blocks() * 512;
    assert!(taken < 8 << 20, "{taken}");
    let disk = Arc::new(FileDisk::open(&image));
    let guest = Iso::open(disk.clone()).expect("it was just made");
    let large = guest.list(guest.root()).expect("it is sound")[0].inode;
    assert_eq!(guest.attributes(large).map(|attributes| attributes.size), Ok(size));
    let extents = guest.extents(large, 0, 9).expect("it is sound");
    let window = guest.extents(large, size - 1, 1).expect("it is sound");
    assert_eq!((extents.found.len(), extents.until), (2, size));
    assert_eq!((&window.found[..], window.until), (&extents.found[1..], size));
    for at in places {
        let found = (at..at + 9).map(|at| {
            let extent = extents.found.iter().rfind(|extent| extent.start <= at).expect("the first starts at 0");
            let Source::Member(0, place) = extent.source else { panic!("{extent:?}") };
            let mut byte = [0];
            disk.read_at(place + at - extent.start, &mut byte).expect("within the image");
            byte[0]
        });
        assert_eq!(found.collect::<Vec<_>>(), b"not empty", "{at}");
    }
}

/// Returns where the records of files with these names stand in an image.
fn records(image: &[u8], names: &[&str]) -> Vec<usize> {
    let found = names.iter().map(|name| {
        let stored = [&[u8::try_from(name.len()).expect("a byte")], name.as_bytes()].concat();
        let at = image.windows(stored.len()).position(|bytes| bytes == stored).expect("it is there");
        at - 32
    });
    found.collect()
}

#[test]
fn files_in_sections_and_after_attributes_read_as_the_kernel_shows_them() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    let mut random = Random::new(6);
    // So many that the records of some files are in several sectors.
    let names: Vec<_> = (0..90).map(|number| format!("FILE{number:03}.;1")).collect();
    for (name, size) in names.iter().zip([4096, 2048, 3000, 0, 5000, 2048].into_iter().cycle()) {
        fs::write(source.join(name.trim_end_matches(".;1")), random.bytes(size)).expect("room");
    }
    for (options, number) in [(&["--norock"][..], 0), (&["-R"], 1)] {
        make("xorrisofs", options, &image, &source);
        let mut bytes = fs::read(&image).expect("it was just made");
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        for (index, at) in records(&bytes, &names).into_iter().enumerate() {
            let (first, record) = (format!("FILE{:03}", index / 6 * 6), at..at + usize::from(bytes[at]));
            if matches!(index % 6, 1 | 2) {
                // All sections have the same name, in Rock Ridge as well.
                for at in record.clone().filter(|at| at + first.len() <= record.end) {
                    if bytes[at..].starts_with(&first.as_bytes()[..4]) {
                        bytes[at..at + first.len()].copy_from_slice(first.as_bytes());
                    }
                }
            }
            match index % 6 {
                0 | 1 => bytes[at + 25] |= 0x80,
                // The first block is another kind of attributes.
                4 => {
                    bytes[at + 1] = 1;
                    bytes[at + 10..at + 14].copy_from_slice(&2952_u32.to_le_bytes());
                }
                // It belongs to another.
                5 if number == 0 => bytes[at + 25] |= 0x04,
                _ => {}
            }
        }
        fs::write(&image, bytes).expect("room");
        judge(&[(format!("sections and {options:?}"), image.clone(), "utf8")]);
        let guest = Iso::open(Arc::new(FileDisk::open(&image))).expect("it was just made");
        let entries = guest.list(guest.root()).expect("it is sound");
        let sizes = entries.iter().map(|entry| guest.attributes(entry.inode).expect("it is sound").size);
        let in_sections = sizes.filter(|size| *size == 4096 + 2048 + 3000).count();
        assert_eq!((entries.len(), in_sections), (90 - 30 - [15, 0][number], 15));
    }
}

/// Multiplies a number that stands in both byte orders.
fn multiply(bytes: &mut [u8], at: usize, factor: u32) -> u32 {
    let number = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
    bytes[at..at + 4].copy_from_slice(&(number * factor).to_le_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&(number * factor).to_be_bytes());
    number
}

/// Counts the blocks of an image in smaller ones from a record on, which is that of a directory.
fn count_in_smaller(bytes: &mut [u8], record: usize, factor: u32) {
    let block = multiply(bytes, record + 2, factor);
    let start = usize::try_from(block).expect("it fits in memory") * 2048;
    let mut at = start;
    let end = start + le32(bytes, start + 10);
    while at < end {
        let len = usize::from(bytes[at]);
        if len == 0 {
            at = (at + 1).next_multiple_of(2048);
            continue;
        }
        if let Some(more) = bytes[at..at + len].windows(4).position(|field| field == b"CE\x1c\x01") {
            multiply(bytes, at + more + 4, factor);
        }
        let is_dots = bytes[at + 32] == 1 && bytes[at + 33] < 2;
        match bytes[at + 25] & 2 != 0 && !is_dots {
            true => count_in_smaller(bytes, at, factor),
            false => drop(multiply(bytes, at + 2, factor)),
        }
        at += len;
    }
}

fn le32(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))).expect("it fits in memory")
}

#[test]
fn blocks_of_other_sizes_read_as_the_kernel_shows_them() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir_all(source.join("folder/below")).expect("a new folder");
    for number in 0..200 {
        fs::write(source.join(format!("folder/below/file-{number}")), "x".repeat(number * 20)).expect("room");
    }
    symlink("target/".repeat(40), source.join("folder/link")).expect("a link");
    // No program makes such images, so the blocks of one with the usual size are counted anew.
    for (mount, block_size) in [("block=512", 512_u16), ("block=1024", 1024)] {
        make("xorrisofs", &["-R"], &image, &source);
        let mut bytes = fs::read(&image).expect("it was just made");
        let primary = 16 * 2048;
        let factor = u32::from(2048 / block_size);
        multiply(&mut bytes, primary + 80, factor);
        bytes[primary + 128..primary + 130].copy_from_slice(&block_size.to_le_bytes());
        bytes[primary + 130..primary + 132].copy_from_slice(&block_size.to_be_bytes());
        count_in_smaller(&mut bytes, primary + 156, factor);
        fs::write(&image, bytes).expect("room");
        judge(&[(mount.to_owned(), image.clone(), mount)]);
    }
}

#[test]
fn a_volume_is_called_as_blkid_calls_it() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    fs::write(source.join("file"), "text").expect("room");
    for options in [&["-R", "-J", "-V", "a label"], &["-J", "-R", "-V", "OTHER"]] {
        make("xorrisofs", options, &image, &source);
        let facts = Iso::open(Arc::new(FileDisk::open(&image))).expect("it was just made").facts();
        let value = |of| {
            let output = Command::new("blkid").args(["-p", "-o", "value", "-s", of]).arg(&image).output();
            String::from_utf8(output.expect("it is installed").stdout).expect("text").trim().to_owned()
        };
        assert_eq!((facts.kind.as_str(), facts.is_replayed, facts.problems), ("iso9660", false, vec![]));
        assert_eq!((facts.label, facts.uuid), (value("LABEL"), value("UUID")));
    }
}

#[test]
fn a_volume_that_is_of_udf_as_well_says_so() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    make("genisoimage", &["-udf", "-R"], &image, &source);
    let facts = Iso::open(Arc::new(FileDisk::open(&image))).expect("it was just made").facts();
    let expected = "it is of UDF at the same time, which is not read: files that only that has are missing";
    assert_eq!(facts.problems, [expected]);
}

#[test]
fn rock_ridge_is_shown_unless_its_tree_is_empty_and_that_of_joliet_is_not() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    fs::write(source.join("A Name"), "text").expect("room");
    let names = |hidden: &[&str]| {
        make("xorrisofs", &[&["-R", "-J"], hidden].concat(), &image, &source);
        let guest = Iso::open(Arc::new(FileDisk::open(&image))).expect("it was just made");
        let file = guest.list(guest.root()).expect("it is sound").first().map(|entry| entry.inode);
        judge(&[(format!("{hidden:?}"), image.clone(), "utf8")]);
        file.map(|file| guest.attributes(file).expect("it is sound").mode)
    };
    assert_eq!(names(&[]), Some(0o644));
    assert_eq!(names(&["-hide", "A Name"]), Some(0o555));
    assert_eq!(names(&["-hide-joliet", "A Name"]), Some(0o644));
}

#[test]
fn what_is_stored_in_ways_that_are_not_read_is_an_error_for_its_content() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    fs::write(source.join("FILE"), [1; 5000]).expect("room");
    make("xorrisofs", &["-R"], &image, &source);
    let mut bytes = fs::read(&image).expect("it was just made");
    let at = records(&bytes, &["FILE.;1"])[0];
    bytes[at + 26..at + 28].copy_from_slice(&[1, 1]);
    fs::write(&image, &bytes).expect("room");
    let open = || Iso::open(Arc::new(FileDisk::open(&image))).expect("it was just made");
    let guest = open();
    let file = guest.list(guest.root()).expect("it is sound")[0].inode;
    let error = guest.extents(file, 0, 1).expect_err("it is interleaved");
    let expected = format!("the file of number {at}: its content lies between that of others, which is not read");
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Unsupported, expected));
    assert_eq!(guest.attributes(file).map(|attributes| attributes.size), Ok(5000));
    bytes[at + 26..at + 28].fill(0);
    bytes[at + 13] = 1;
    fs::write(&image, &bytes).expect("room");
    let guest = open();
    let window = guest.extents(file, 0, 1).expect("the start is there");
    let error = guest.extents(file, window.until, 1).expect_err("the end is not");
    assert_eq!((error.kind(), window.until > 5000), (ErrorKind::Damaged, true));
}

#[test]
fn compressed_files_read_as_the_kernel_shows_them() {
    let folder = scratch();
    let (source, image) = (folder.path().join("source"), folder.path().join("image"));
    fs::create_dir(&source).expect("a new folder");
    let mut random = Random::new(5);
    for size in [0, 1, 100, 32_767, 32_768, 32_769, 300_000, 2_000_000] {
        let text: Vec<u8> = (0..).flat_map(|line| format!("line {line}\n").into_bytes()).take(size).collect();
        fs::write(source.join(format!("text-{size}")), text).expect("room");
        // Of which no block gets shorter.
        fs::write(source.join(format!("random-{size}")), random.bytes(size)).expect("room");
        fs::write(source.join(format!("zeroes-{size}")), vec![0; size]).expect("room");
    }
    let holes = File::create(source.join("holes")).expect("a new file");
    holes.write_all_at(&random.bytes(70_000), 1_000_000).expect("room");
    holes.set_len(3_000_000).expect("room");
    let mut command = Command::new("xorriso");
    command.args(["-abort_on", "FAILURE", "-outdev"]).arg(&image).arg("-map").arg(&source).arg("/");
    succeed(command.args(["-set_filter_r", "--zisofs", "/", "--", "-commit"]));
    let guest = Iso::open(Arc::new(FileDisk::open(&image))).expect("it was just made");
    let entries = guest.list(guest.root()).expect("it is sound");
    let text = entries.iter().find(|entry| entry.name == b"text-2000000").expect("it is there");
    let extents = guest.extents(text.inode, 0, 9).expect("it is sound").found;
    assert_eq!(extents, [Extent { start: 0, len: 2_000_000, source: Source::Encoded }]);
    judge(&[("zisofs".to_owned(), image, "utf8")]);
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    compare::machine::task();
}
