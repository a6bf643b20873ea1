//! NTFS as ntfs-3g shows it.

mod compare;

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use compare::generator::{self, Amount};
use compare::image::{FileDisk, Mount, scratch, sparse, succeed};
use compare::tree::{self, Tree};
use compare::{Random, rounds};
use guest::ntfs::Ntfs;
use guest::{ErrorKind, Extent, Fields, GuestFs, Inode, Kind, Source, Time};
use rustix::fs::XattrFlags;

const ATTRIBUTES: &[u8] = b"user.ntfs.attrib";

const COMPRESSED: u32 = 0x800;

/// Makes a volume of `bytes`.
fn make(image: &Path, bytes: u64, arguments: &[&str]) {
    sparse(image, bytes);
    let label = "M\u{e4}rz \u{1f600}";
    succeed(Command::new("mkntfs").args(["-q", "-F", "-Q", "-L", label]).args(arguments).arg(image));
}

fn mount(image: &Path, options: &str) -> Mount {
    Mount::new(image, "ntfs-3g", &format!("streams_interface=xattr,compression,noatime{options}"))
}

fn attributes(path: &Path) -> u32 {
    let mut bytes = [0; 4];
    rustix::fs::lgetxattr(path, "system.ntfs_attrib", &mut bytes[..]).expect("all files have them");
    u32::from_le_bytes(bytes)
}

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("{}: {name}: {error}", path.display()));
}

/// What NTFS has and other filesystems have not.
fn fill(root: &Path, amount: u64, random: &mut Random) {
    let folder = |name: &str| {
        let path = root.join(name);
        fs::create_dir(&path).expect("a new folder");
        path
    };
    let names = folder("utf-16");
    // 255 units are up to 765 bytes.
    for name in ["\u{20ac}".repeat(255), format!("{}x", "\u{1f600}".repeat(127)), "trail. ".to_owned()] {
        fs::write(names.join(name), "n").expect("a name");
    }
    for number in 0..40 {
        fs::hard_link(names.join("trail. "), names.join(format!("{}{number}", "l".repeat(200)))).expect("a name");
    }
    let streams = folder("streams");
    for (file, size) in [("small", 10), ("resident", 600), ("beside", 700), ("large", 65_536)] {
        let path = streams.join(file);
        fs::write(&path, random.bytes(100)).expect("room");
        set(&path, "user.stream", &random.bytes(size));
        set(&path, "user.\u{20ac} 2", b"another");
        set(&path, "user.empty", b"");
    }
    set(&streams, "user.of a folder", b"stream");
    for size in 400..800 {
        // From some size on it does not fit in the record.
        if size % 20 == 0 || (690..740).contains(&size) {
            fs::write(streams.join(format!("size-{size}")), random.bytes(size)).expect("room");
        }
    }
    // Written in no order, each piece is apart, and where they are does not fit in one record.
    let fragments = File::create(root.join("fragments")).expect("a new file");
    fragments.set_len(amount * 4096).expect("sparse");
    for number in 0..amount {
        let at = number * 607 % amount;
        fragments.write_all_at(&at.to_le_bytes().repeat(512), at * 4096).expect("room");
    }
}

/// What is compressed.
fn fill_compressed(root: &Path, random: &mut Random) {
    let folder = root.join("compressed");
    fs::create_dir(&folder).expect("a new folder");
    set(&folder, "system.ntfs_attrib", &(attributes(&folder) | COMPRESSED).to_le_bytes());
    let text: Vec<u8> = (0..60_000).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
    let make = |name: &str| File::create(folder.join(name)).expect("a new file");
    make("text").write_all(&text).expect("room");
    make("short").write_all(&text[..100]).expect("room");
    make("a unit").write_all(&text[..65_536]).expect("room");
    make("a unit and more").write_all(&text[..65_537]).expect("room");
    make("zeroes").write_all(&[0; 300_000]).expect("room");
    make("random").write_all(&random.bytes(300_000)).expect("room");
    let mixed = make("mixed");
    for number in 0..40 {
        let len = usize::try_from(random.below(60_000)).expect("small");
        let bytes = if number % 3 == 0 { random.bytes(len) } else { text[len..2 * len].to_vec() };
        mixed.write_all_at(&bytes, number * 50_000).expect("room");
    }
    let holes = make("holes");
    for number in 0..20 {
        holes.write_all_at(&text[..5000], number * 200_000 + 1234).expect("room");
    }
    holes.set_len(5_000_000).expect("sparse");
    assert_ne!(attributes(&folder.join("text")) & COMPRESSED, 0, "it is not compressed");
}

/// Returns what ntfs-3g shows, with what is shown otherwise here as documented.
fn truth(mount: &Mount) -> Tree {
    let mut tree = tree::of_kernel(mount.path());
    // What is set a fraction of a second before 1970 ntfs-3g shows as the second itself.
    if let Some(shown) = tree.get_mut(&b"times/moment-2"[..]) {
        shown.attributes.modified = Time { seconds: -1, nanoseconds: 999_999_900 };
    }
    for (path, shown) in &mut tree {
        let path = mount.path().join(std::str::from_utf8(path).expect("names are UTF-8"));
        let attributes = attributes(&path);
        shown.xattrs.insert(ATTRIBUTES.to_vec(), format!("{attributes:#010x}").into_bytes());
        shown.attributes.mode = match shown.attributes.kind {
            Kind::Directory => 0o755,
            Kind::Symlink => 0o777,
            Kind::File if attributes & 1 != 0 => 0o444,
            _ => 0o644,
        };
        match shown.attributes.kind {
            Kind::Fifo | Kind::Socket => {
                shown.attributes.kind = Kind::File;
                shown.content = DefaultHasher::new().finish();
            }
            Kind::CharacterDevice | Kind::BlockDevice => shown.attributes.size = 0,
            _ => {}
        }
    }
    tree
}

fn compare(what: &str, image: &Path, truth: &Tree) -> Ntfs {
    let disk = Arc::new(FileDisk::open(image));
    let guest = Ntfs::open(disk.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (mut shown, errors) = tree::of_guest(&guest, disk.as_ref());
    for shown in shown.values_mut() {
        // Streams in which ntfs-3g keeps what it has no other place for, and does not list.
        shown.xattrs.retain(|name, _| !name.starts_with(b"user.ntfs-3g."));
    }
    let differences = tree::differences(truth, &shown, None);
    let count = errors.len() + differences.len();
    let lines: Vec<_> = errors.into_iter().chain(differences).take(10).collect();
    assert_eq!(count, 0, "{what}: {count} differences of {} files\n{}", truth.len(), lines.join("\n"));
    guest
}

#[test]
fn volumes_of_every_size_of_cluster_read_as_ntfs_3g_shows_them() {
    let sets: [&[&str]; 5] =
        [&["-c", "4096"], &["-c", "512"], &["-c", "65536"], &["-c", "2097152"], &["-s", "4096", "-c", "4096"]];
    let sets = if rounds(1) > 1 { &sets[..] } else { &sets[..3] };
    for set in sets {
        let what = set.join(" ");
        let mut random = Random::new(3);
        let folder = scratch();
        let image = folder.path().join("image");
        let is_huge = what.contains("2097152");
        make(&image, if is_huge { 4 << 30 } else { 96 << 20 }, set);
        {
            let mount = mount(&image, "");
            generator::fill(mount.path(), Amount { names: 700, holes: if is_huge { 20 } else { 100 } });
            // Reading two gigabytes of zeroes takes ntfs-3g too long.
            fs::remove_file(mount.path().join("contents/far")).expect("it was made");
            fill(mount.path(), if is_huge { 20 } else { 1500 }, &mut random);
            if what == "-c 4096" || what == "-c 512" {
                fill_compressed(mount.path(), &mut random);
            }
        }
        let guest = compare(&what, &image, &truth(&mount(&image, ",ro")));
        let facts = guest.facts();
        assert_eq!((facts.kind.as_str(), facts.label.as_str()), ("ntfs", "M\u{e4}rz \u{1f600}"), "{what}");
        assert_eq!((facts.is_replayed, facts.problems), (false, vec![]), "{what}");
        let blkid =
            Command::new("blkid").args(["-p", "-o", "value", "-s", "UUID"]).arg(&image).output().expect("blkid");
        assert_eq!(String::from_utf8_lossy(&blkid.stdout).trim(), facts.uuid);
    }
}

/// Returns where the record of a file stands in an image of which the table of files is not in pieces.
fn record(image: &Path, number: u64) -> u64 {
    let mut boot = [0; 512];
    File::open(image).and_then(|file| file.read_exact_at(&mut boot, 0)).expect("it has a boot sector");
    let fields = Fields(&boot);
    let cluster = u64::from(fields.le16(0x0b).expect("2 bytes")) * u64::from(boot[0x0d]);
    fields.le64(0x30).expect("8 bytes") * cluster + number * 1024
}

/// Returns where the attribute of a type stands in such a record.
fn attribute(image: &Path, number: u64, kind: u32) -> u64 {
    let start = record(image, number);
    let mut bytes = [0; 1024];
    File::open(image).and_then(|file| file.read_exact_at(&mut bytes, start)).expect("there is a record");
    let fields = Fields(&bytes);
    let mut at = usize::from(fields.le16(0x14).expect("2 bytes"));
    while fields.le32(at).expect("an attribute") != kind {
        at += usize::try_from(fields.le32(at + 4).expect("a length")).expect("small");
    }
    start + at as u64
}

fn write(image: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(image).and_then(|file| file.write_all_at(bytes, at)).expect("it is ours");
}

#[test]
fn what_was_never_written_reads_as_zeroes_whatever_stands_there() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, 16 << 20, &["-c", "4096"]);
    let random = Random::new(5).bytes(100_000);
    let inode = {
        let mount = mount(&image, "");
        let file = mount.path().join("file");
        fs::write(&file, &random).expect("room");
        fs::metadata(&file).expect("it was made").ino()
    };
    for initialized in [0_u64, 1, 50_000, 65_536, 99_999] {
        write(&image, attribute(&image, inode, 0x80) + 0x38, &initialized.to_le_bytes());
        let guest = compare(&format!("{initialized} bytes written"), &image, &truth(&mount(&image, ",ro")));
        let extents = guest.extents(Inode(inode), 0, 10).expect("a file").found;
        assert_eq!(extents.last().map(|last| (last.start, &last.source)), Some((initialized, &Source::Zeroes)));
    }
}

#[test]
fn a_table_of_files_in_many_pieces_is_read() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, 12 << 20, &["-c", "512"]);
    {
        let mount = mount(&image, "");
        let path = |name: &str, number: u32| mount.path().join(format!("{name}-{number}"));
        // Of three clusters each, where a record needs two.
        for number in 0..3000 {
            fs::write(path("cluster", number), [7; 1400]).expect("room");
        }
        let mut rest = File::create(mount.path().join("rest")).expect("a new file");
        while rest.write_all(&[8; 4096]).is_ok() {}
        for number in (0..3000).step_by(2) {
            fs::remove_file(path("cluster", number)).expect("it was made");
        }
        let made =
            (0..6000).take_while(|number| fs::write(path("small", *number), format!("{number}")).is_ok()).count();
        assert!(made > 1000, "{made} files");
    }
    let said = Command::new("ntfsinfo").args(["-i", "0", "-v"]).arg(&image).output().expect("ntfsinfo");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("$ATTRIBUTE_LIST"), "the table is in too few pieces\n{said}");
    compare("in pieces", &image, &truth(&mount(&image, ",ro")));
}

#[test]
fn what_is_wrong_with_a_volume_is_said() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, 16 << 20, &[]);
    let inode = {
        let mount = mount(&image, "");
        fs::write(mount.path().join("file"), "content").expect("room");
        fs::metadata(mount.path().join("file")).expect("it was made").ino()
    };
    let problems = || Ntfs::open(Arc::new(FileDisk::open(&image))).expect("NTFS").facts().problems;
    assert_eq!(problems(), Vec::<String>::new());
    let flags = attribute(&image, 3, 0x70) + 24 + 0x0a;
    write(&image, flags, &[1]);
    assert_eq!(problems(), ["Windows marked the volume to be checked (chkdsk)"]);
    // The record of a file was given to another one, and the name is not removed yet.
    let names = || {
        Ntfs::open(Arc::new(FileDisk::open(&image))).and_then(|guest| guest.list(guest.root())).map(|list| list.len())
    };
    assert_eq!(names(), Ok(1));
    write(&image, record(&image, inode) + 0x10, &[77]);
    assert_eq!(names(), Ok(0));
    write(&image, flags, &[0]);
    File::options().write(true).open(&image).and_then(|file| file.set_len(12 << 20)).expect("it is ours");
    assert_eq!(problems(), ["the volume has 4095 clusters of 4096 bytes, and only 3072 are there"]);
}

#[test]
fn reparse_points_are_shown_as_what_they_mean() {
    const SYMLINK: u32 = 0xa000_000c;
    const JUNCTION: u32 = 0xa000_0003;
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, 16 << 20, &[]);
    let link = |tag: u32, target: &str, is_relative: u32| {
        let target: Vec<_> = target.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let len = u16::try_from(target.len()).expect("short");
        let mut data = [[0, 0], len.to_le_bytes(), (len + 2).to_le_bytes(), len.to_le_bytes()].concat();
        if tag == SYMLINK {
            data.extend(is_relative.to_le_bytes());
        }
        data.extend([target.as_slice(), &[0; 2], &target, &[0; 2]].concat());
        let len = u16::try_from(data.len()).expect("short");
        [tag.to_le_bytes().as_slice(), &len.to_le_bytes(), &[0; 2], &data].concat()
    };
    let dedup = [0x8000_0013_u32.to_le_bytes().as_slice(), &[8, 0, 0, 0], &[1; 8]].concat();
    let unknown = [0x8000_001b_u32.to_le_bytes().as_slice(), &[8, 0, 0, 0], &[1; 8]].concat();
    {
        let mount = mount(&image, "");
        let path = |name: &str| mount.path().join(name);
        fs::create_dir(path("folder")).expect("a new folder");
        fs::write(path("folder/file"), "content").expect("room");
        for (name, reparse) in [
            ("relative", link(SYMLINK, "folder\\file", 1)),
            ("absolute", link(SYMLINK, "\\??\\C:\\folder\\file", 0)),
            ("elsewhere", dedup),
            ("cloud", [0x9000_601a_u32.to_le_bytes().as_slice(), &[8, 0, 0, 0], &[1; 8]].concat()),
            ("unknown", unknown),
        ] {
            fs::write(path(name), if reparse[2..4] == [0, 0xa0] { "" } else { "something" }).expect("room");
            set(&path(name), "system.ntfs_reparse_data", &reparse);
        }
        fs::create_dir(path("junction")).expect("a new folder");
        set(&path("junction"), "system.ntfs_reparse_data", &link(JUNCTION, "\\??\\C:\\folder\\", 0));
    }
    let shown = fs::read_link(mount(&image, ",ro").path().join("relative")).expect("ntfs-3g shows a link");
    let guest = Ntfs::open(Arc::new(FileDisk::open(&image))).expect("NTFS");
    let entries = guest.list(guest.root()).expect("the root");
    let find = |name: &str| entries.iter().find(|entry| entry.name == name.as_bytes()).expect("it was made").inode;
    let target = |name| guest.target(find(name)).map(|target| String::from_utf8(target).expect("UTF-8"));
    assert_eq!(target("relative").map(Into::into), Ok(shown));
    assert_eq!(target("absolute"), Ok("/??/C:/folder/file".to_owned()));
    assert_eq!(target("junction"), Ok("/??/C:/folder/".to_owned()));
    for name in ["relative", "absolute", "junction"] {
        let attributes = guest.attributes(find(name)).expect("a link");
        assert_eq!((attributes.kind, attributes.size), (Kind::Symlink, target(name).expect("a link").len() as u64));
        assert_eq!(guest.list(find(name)).map_err(|error| error.kind()), Err(ErrorKind::WrongKind));
    }
    let error = guest.extents(find("elsewhere"), 0, 1).expect_err("its content is not there");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().ends_with("is in the store of Windows' data deduplication"), "{error}");
    for name in ["unknown", "cloud"] {
        let extents = guest.extents(find(name), 0, 1).expect("a file").found;
        assert_eq!(extents, [Extent { start: 0, len: 9, source: Source::Bytes(b"something".to_vec()) }], "{name}");
    }
    // As of a file that was not fetched.
    write(&image, attribute(&image, find("cloud").0, 0x10) + 24 + 0x20, &0x1020_u32.to_le_bytes());
    let guest = Ntfs::open(Arc::new(FileDisk::open(&image))).expect("NTFS");
    let error = guest.extents(find("cloud"), 0, 1).expect_err("it is marked as offline");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let xattrs = guest.xattrs(find("unknown")).expect("a file");
    let tag = xattrs.iter().find(|xattr| xattr.name == b"user.ntfs.reparse").map(|xattr| xattr.value.as_slice());
    assert_eq!(tag, Some(&b"0x8000001b"[..]));
}

#[test]
fn what_has_no_place_is_left_out_and_named() {
    let folder = scratch();
    let image = folder.path().join("image");
    make(&image, 16 << 20, &["-c", "4096"]);
    let inode = {
        let mount = Mount::new(&image, "ntfs-3g", "streams_interface=windows,noatime");
        let path = |name: &str| mount.path().join(name);
        fs::write(path("file"), [1; 10_000]).expect("room");
        fs::write(path("file:long"), [2; 65_537]).expect("room");
        fs::write(path("file:fits"), [3; 65_536]).expect("room");
        fs::write(path("file:ntfs.attrib"), "not what it says").expect("room");
        fs::write(path(&format!("file:{}", "\u{20ac}".repeat(100))), "a long name").expect("room");
        fs::metadata(path("file")).expect("it was made").ino()
    };
    let guest = Ntfs::open(Arc::new(FileDisk::open(&image))).expect("NTFS");
    let xattrs = guest.xattrs(Inode(inode)).expect("a file");
    let value = |name: &[u8]| xattrs.iter().find(|xattr| xattr.name == name).map(|xattr| xattr.value.clone());
    assert_eq!(value(b"user.fits"), Some(vec![3; 65_536]));
    assert_eq!(value(ATTRIBUTES), Some(b"0x00000020".to_vec()));
    let left_out = String::from_utf8(value(b"user.ntfs.left_out").expect("some are")).expect("UTF-8");
    let mut lines: Vec<_> = left_out.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, [&format!("11 {}", "\u{20ac}".repeat(100)), "16 ntfs.attrib", "65537 long"]);
    assert_eq!(xattrs.len(), 3);
    // As Windows encrypts.
    write(&image, attribute(&image, inode, 0x80) + 0x0c, &0x4000_u16.to_le_bytes());
    let guest = Ntfs::open(Arc::new(FileDisk::open(&image))).expect("NTFS");
    let error = guest.extents(Inode(inode), 0, 1).expect_err("nobody has the key");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// An image of Windows holds files in the same form, which is how they are made here.
#[test]
fn files_that_windows_compressed_are_decoded() {
    let folder = scratch();
    let (image, files) = (folder.path().join("image"), folder.path().join("files"));
    make(&image, 32 << 20, &[]);
    fs::create_dir(&files).expect("a new folder");
    let mut random = Random::new(11);
    let program = fs::read("/proc/self/exe").expect("this program");
    let text: Vec<u8> = (0..20_000).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
    let contents = [
        ("program", program[..400_000.min(program.len())].to_vec()),
        ("mixed", [&text[..30_000], &random.bytes(40_000), &program[5000..60_000], &[0; 50_000], &text].concat()),
        ("text", text),
        ("chunk", program[..32_768].to_vec()),
        ("short", b"short, short, short, short".to_vec()),
    ];
    for (number, (method, chunk)) in
        (0_u32..).zip([("XPRESS", "4K"), ("LZX", "32K"), ("XPRESS", "8K"), ("XPRESS", "16K")])
    {
        let mut expected = Vec::new();
        let mount = Mount::new(&image, "ntfs-3g", "streams_interface=windows,noatime");
        for (name, content) in &contents {
            let (single, archive) = (files.join("single"), files.join("archive"));
            let _ = (fs::remove_dir_all(&single), fs::remove_file(&archive));
            fs::create_dir(&single).expect("a new folder");
            fs::write(single.join("file"), content).expect("room");
            succeed(
                Command::new("wimcapture")
                    .args([single.as_os_str(), archive.as_os_str()])
                    .args([format!("--compress={method}"), format!("--chunk-size={chunk}")]),
            );
            let listed = Command::new("wiminfo").arg(&archive).arg("--blobs").output().expect("wiminfo");
            let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
            let size = format!("Uncompressed size = {} bytes", content.len());
            let blob = listed.split("\n\n").find(|blob| blob.contains(&size)).unwrap_or_else(|| panic!("{listed}"));
            let field = |key: &str| {
                let line = blob.lines().find_map(|line| line.strip_prefix(key)).expect("it says so");
                line.trim_start_matches([' ', '='])
                    .split(' ')
                    .next()
                    .and_then(|text| text.parse().ok())
                    .expect("a number")
            };
            let (start, len): (usize, usize) = (field("Offset in WIM"), field("Compressed size"));
            if !blob.contains("COMPRESSED") {
                continue;
            }
            let archive = fs::read(&archive).expect("it was just made");
            let stored = &archive[start..start + len];
            let file = mount.path().join(format!("{name}-{number}"));
            File::create(&file).and_then(|made| made.set_len(content.len() as u64)).expect("sparse");
            let stream = mount.path().join(format!("{name}-{number}:WofCompressedData"));
            fs::write(stream, stored).expect("room");
            let words = [1, 2, 1, number].map(u32::to_le_bytes).concat();
            let reparse = [0x8000_0017_u32.to_le_bytes().as_slice(), &[16, 0, 0, 0], &words].concat();
            set(&file, "system.ntfs_reparse_data", &reparse);
            expected.push((format!("{name}-{number}"), content, stored.to_vec()));
        }
        drop(mount);
        assert!(expected.len() >= 3, "{method}");
        let guest = Ntfs::open(Arc::new(FileDisk::open(&image))).expect("NTFS");
        let entries = guest.list(guest.root()).expect("the root");
        for (name, content, stored) in expected {
            let entry = entries.iter().find(|entry| entry.name == name.as_bytes()).expect("it was made");
            let attributes = guest.attributes(entry.inode).expect("a file");
            assert_eq!((attributes.kind, attributes.size), (Kind::File, content.len() as u64), "{name}");
            let extents = guest.extents(entry.inode, 0, 1).expect("a file").found;
            assert_eq!(extents, [Extent { start: 0, len: attributes.size, source: Source::Encoded }]);
            let mut bytes = vec![0; content.len()];
            guest.decode(entry.inode, 0, &mut bytes).unwrap_or_else(|error| panic!("{name} ({method}): {error}"));
            assert!(bytes == *content, "{name} ({method}, {chunk}) decodes to something else");
            let (from, to) = (content.len() / 3, content.len() / 2);
            guest.decode(entry.inode, from as u64, &mut bytes[from..to]).expect("a part");
            assert!(bytes == *content, "a part of {name} ({method}, {chunk}) decodes to something else");
            let xattrs = guest.xattrs(entry.inode).expect("a file");
            assert_eq!(xattrs.len(), 1, "only the attributes of Windows are left");
            if !name.starts_with("chunk") {
                continue;
            }
            let volume = fs::read(&image).expect("it was just made");
            let place = volume.windows(512).position(|bytes| *bytes == stored[..512]).expect("it is in the volume");
            for _ in 0..rounds(1) * 40 {
                let at = place + usize::try_from(random.below(stored.len() as u64)).expect("an index");
                write(&image, at as u64, &random.bytes(1));
                // Whatever it says now, with an answer or an error.
                let guest = Ntfs::open(Arc::new(FileDisk::open(&image))).expect("NTFS");
                let _ = guest.decode(entry.inode, 0, &mut bytes);
                write(&image, at as u64, &volume[at..=at]);
            }
        }
    }
}
