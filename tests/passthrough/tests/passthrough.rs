//! The program through a real mount, driven by the client that other tests use.

#[path = "../../support/slow_path.rs"]
mod slow_path;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use slow_path::SlowPath;
use tempfile::TempDir;

/// `ESTALE`, which std has no stable name for.
const STALE: i32 = 116;

fn source() -> TempDir {
    tempfile::Builder::new().prefix("source-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for the source")
}

fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) {
    fs::write(folder.join(name), content).expect("the source is writable");
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("it is a folder");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("it can be listed").file_name().into_string().expect("names are text"))
        .collect();
    names.sort();
    names
}

#[test]
fn content_names_and_attributes_pass_through() {
    let source = source();
    let content: Vec<u8> = (0..3_000_001_u32).flat_map(|number| number.to_le_bytes()).collect();
    write(source.path(), "large", &content);
    fs::create_dir(source.path().join("folder")).expect("it is new");
    for number in 0..2000 {
        write(source.path(), &format!("folder/a name that is not short {number}"), []);
    }
    symlink("folder/x", source.path().join("link")).expect("it is new");
    let sparse = File::create(source.path().join("sparse")).expect("it is new");
    sparse.write_all_at(b"end", 10 << 20).expect("it is writable");

    let slow = SlowPath::mount(source.path());
    assert!(fs::read(slow.path().join("large")).expect("it is read") == content);
    assert_eq!(names(slow.path()), ["folder", "large", "link", "sparse"]);
    assert_eq!(names(&slow.path().join("folder")), names(&source.path().join("folder")));
    assert_eq!(fs::read_link(slow.path().join("link")).expect("it is a link"), Path::new("folder/x"));
    for name in ["folder", "large", "link", "sparse"] {
        let [below, through] = [source.path(), slow.path()].map(|folder| {
            let of = fs::symlink_metadata(folder.join(name)).expect("it is there");
            (of.ino(), of.mode(), of.nlink(), of.uid(), of.size(), of.blocks(), of.mtime(), of.mtime_nsec(), of.ctime())
        });
        assert_eq!(through, below, "{name}");
    }
    let hole = first_data(&slow.path().join("sparse"));
    assert_eq!(hole, first_data(&source.path().join("sparse")));
    assert!(hole > 0);
    assert_eq!(fs::read(slow.path().join("none")).expect_err("it is missing").kind(), ErrorKind::NotFound);
}

/// Where the first data of a file is.
fn first_data(path: &Path) -> i64 {
    let file = File::open(path).expect("it is there");
    nix::unistd::lseek(file, 0, nix::unistd::Whence::SeekData).expect("it has data")
}

#[test]
fn stalled_requests_hold_up_no_others() {
    let source = source();
    for number in 0..40 {
        write(source.path(), &format!("dead-{number}"), format!("{number}"));
    }
    write(source.path(), "alive", "alive");
    fs::create_dir(source.path().join("folder")).expect("it is new");
    let slow = SlowPath::mount(source.path());
    slow.stall("dead-?* ops=read");
    slow.stall("gone* ops=lookup");
    // No scoped threads: a panic here must drop `slow`, which lets go what waits.
    let mut readers = Vec::new();
    for number in 0..40 {
        let path = slow.path().join(format!("dead-{number}"));
        readers.push(thread::spawn(move || fs::read_to_string(path).expect("it was released")));
    }
    let gone = slow.path().join("gone");
    let looker = thread::spawn(move || gone.exists());
    slow.wait_for_stalled(41);
    assert_eq!(fs::read_to_string(slow.path().join("alive")).expect("nothing stalls it"), "alive");
    assert_eq!(names(slow.path()).len(), 42);
    // In another folder: a lookup that stalls keeps its folder from changing, in any filesystem of Linux.
    write(&slow.path().join("folder"), "new", "new");
    assert_eq!(fs::metadata(slow.path().join("dead-1")).expect("only reads stall").len(), 1);
    assert_eq!(slow.stalled(), 41);
    slow.release();
    for (number, reader) in readers.into_iter().enumerate() {
        assert_eq!(reader.join().expect("it does not panic"), number.to_string());
    }
    assert!(!looker.join().expect("it does not panic"));
    assert_eq!(slow.stalled(), 0);
}

#[test]
fn a_stall_concerns_files_that_are_open_already() {
    let source = source();
    write(source.path(), "file", "content");
    let slow = SlowPath::mount(source.path());
    let mut file = File::open(slow.path().join("file")).expect("nothing stalls yet");
    let same = file.try_clone().expect("it is open");
    slow.stall("file");
    let size = thread::spawn(move || same.metadata().expect("it was released").len());
    slow.wait_for_stalled(1);
    slow.release();
    assert_eq!(size.join().expect("it does not panic"), 7);
    slow.stall("file");
    let mut content = String::new();
    let read = thread::spawn(move || file.read_to_string(&mut content).map(|_| content));
    slow.wait_for_stalled(1);
    slow.release();
    assert_eq!(read.join().expect("it does not panic").expect("it was released"), "content");
}

#[test]
fn a_delay_is_applied_and_requests_are_counted() {
    let source = source();
    write(source.path(), "slow", "slow");
    write(source.path(), "fast", "fast");
    let slow = SlowPath::mount(source.path());
    slow.delay(Duration::from_millis(400), "slow ops=open,read");
    slow.reset();
    let start = Instant::now();
    assert_eq!(fs::read(slow.path().join("slow")).expect("it is read"), b"slow");
    assert!(start.elapsed() >= Duration::from_millis(800), "{:?}", start.elapsed());
    assert_eq!((slow.count("open"), slow.count("read")), (1, 1));
    assert!(slow.count("") > 2);
    let start = Instant::now();
    assert_eq!(fs::read(slow.path().join("fast")).expect("it is read"), b"fast");
    assert!(start.elapsed() < Duration::from_millis(400), "{:?}", start.elapsed());
    slow.delay(Duration::ZERO, "slow");
    slow.reset();
    assert_eq!(slow.count(""), 0);
}

#[test]
fn errors_and_short_reads_come_on_demand() {
    let source = source();
    write(source.path(), "file", vec![7; 100_000]);
    let slow = SlowPath::mount(source.path());
    let file = File::open(slow.path().join("file")).expect("nothing fails yet");
    let mut bytes = vec![0; 50_000];
    slow.fail("ESTALE", "file ops=read");
    assert_eq!(file.read_at(&mut bytes, 0).expect_err("it is stale").raw_os_error(), Some(STALE));
    slow.fail("EACCES", "* ops=open");
    assert_eq!(File::open(slow.path().join("file")).expect_err("refused").kind(), ErrorKind::PermissionDenied);
    slow.fail("ENOENT", "file");
    assert_eq!(fs::metadata(slow.path().join("file")).expect_err("refused").kind(), ErrorKind::NotFound);
    slow.release();
    slow.cut("file", 5000);
    assert_eq!(file.read_at(&mut bytes, 0).expect("it is short"), 5000);
    slow.release();
    let content = fs::read(slow.path().join("file")).expect("it is whole again");
    assert!(content == vec![7; 100_000]);
}

#[test]
fn a_file_is_copied_below_unless_that_is_refused() {
    let source = source();
    let content: Vec<u8> = (0..500_001_u32).flat_map(|number| number.to_le_bytes()).collect();
    write(source.path(), "from", &content);
    let slow = SlowPath::mount(source.path());
    for (errno, reads) in [(None, false), (Some("EOPNOTSUPP"), true)] {
        if let Some(errno) = errno {
            slow.fail(errno, "* ops=copy_file_range");
        }
        slow.reset();
        fs::copy(slow.path().join("from"), slow.path().join("to")).expect("it is copied");
        assert!(fs::read(source.path().join("to")).expect("it is there") == content);
        assert!(slow.count("copy_file_range") > 0);
        assert_eq!(slow.count("read") > 0, reads, "{errno:?}");
    }
}

#[test]
fn changes_pass_through() {
    let source = source();
    let slow = SlowPath::mount(source.path());
    let at = |name: &str| slow.path().join(name);
    fs::create_dir_all(at("a/b")).expect("mkdir passes");
    let mut file = File::create_new(at("a/b/file")).expect("create passes");
    file.write_all(&vec![1; 300_000]).expect("write passes");
    file.sync_all().expect("fsync passes");
    File::open(at("a/b")).expect("it is there").sync_all().expect("fsyncdir passes");
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    file.set_modified(time).expect("utimes passes");
    assert_eq!(fs::metadata(source.path().join("a/b/file")).and_then(|of| of.modified()).expect("it is there"), time);

    // The names of open files follow their folders.
    fs::rename(at("a"), at("c")).expect("rename passes");
    slow.fail("EIO", "c/b/file ops=write");
    file.write_all(b"lost").expect_err("its path is c/b/file now");
    slow.release();
    file.seek(SeekFrom::Start(0)).expect("it is a file");
    file.write_all(b"kept").expect("write passes");
    file.set_len(6).expect("truncate passes");
    assert_eq!(fs::read(source.path().join("c/b/file")).expect("it moved"), b"kept\x01\x01");
    let mut appended = File::options().append(true).open(at("c/b/file")).expect("it is there");
    appended.write_all(b"!").expect("write passes");
    assert_eq!(fs::read(at("c/b/file")).expect("it is there"), b"kept\x01\x01!");

    // A file that lost its name still has attributes, as XO's merge expects.
    fs::write(at("new"), "other").expect("create passes");
    fs::rename(at("new"), at("c/b/file")).expect("rename replaces");
    assert_eq!(file.metadata().expect("it is open").len(), 7);
    assert_eq!(fs::read(at("c/b/file")).expect("it is there"), b"other");
    fs::hard_link(at("c/b/file"), at("second")).expect("link passes");
    assert_eq!(fs::metadata(at("second")).expect("it is there").nlink(), 2);
    for name in ["second", "c/b/file"] {
        fs::remove_file(at(name)).expect("unlink passes");
    }
    assert_eq!(fs::remove_dir(at("c")).expect_err("it is not empty").kind(), ErrorKind::DirectoryNotEmpty);
    fs::remove_dir_all(at("c")).expect("rmdir passes");
    assert_eq!(names(source.path()), Vec::<String>::new());
}

#[test]
fn a_stalled_reader_can_be_killed() {
    let source = source();
    write(source.path(), "file", "content");
    let slow = SlowPath::mount(source.path());
    slow.stall("file ops=open");
    let mut reader = Command::new("cat").arg(slow.path().join("file")).spawn().expect("cat is in coreutils");
    slow.wait_for_stalled(1);
    reader.kill().expect("it is our child");
    assert!(!reader.wait().expect("it is our child").success());
    assert_eq!(slow.stalled(), 0);
}

#[test]
fn the_end_answers_what_is_stalled() {
    let source = source();
    write(source.path(), "file", "content");
    let slow = SlowPath::mount(source.path());
    slow.stall("file ops=read");
    let path = slow.path().join("file");
    let reader = thread::spawn(move || fs::read(path));
    slow.wait_for_stalled(1);
    // Panics if anything is left, so also if it is still mounted.
    drop(slow);
    let error = reader.join().expect("it does not panic").expect_err("nothing was read");
    // The kernel asks again for the one page; by then the mount may be gone.
    let ended = [nix::errno::Errno::EIO, nix::errno::Errno::ECONNABORTED].map(|errno| Some(errno as i32));
    assert!(ended.contains(&error.raw_os_error()), "{error}");
    assert_eq!(names(source.path()), ["file"]);
}

#[test]
fn a_killed_program_leaves_a_dead_mount_that_goes() {
    let source = source();
    write(source.path(), "file", "content");
    let mut slow = SlowPath::mount(source.path());
    slow.kill();
    let error = fs::metadata(slow.path().join("file")).expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    drop(slow);
    assert_eq!(names(source.path()), ["file"]);
}

#[test]
fn a_folder_that_is_missing_is_refused() {
    let source = source();
    let mut command = Command::new(env!("CARGO_BIN_EXE_passthrough"));
    let output = command.arg(source.path().join("none")).arg(source.path()).stdin(Stdio::null()).output();
    let output = output.expect("the built program starts");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("open "), "{output:?}");
}
