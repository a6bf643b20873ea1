//! What only a folder can meet: links, pipes, names and rights.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind as IoErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::sync::mpsc;
use std::time::Duration;

use places::{Local, Place, path};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use storage::{ErrorKind, Existing, Kind, LocalStorage, Storage as _, WritableStorage as _};

// Promise 6: "None leads out of it."
#[test]
fn a_link_that_leads_outside_is_refused() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "not part of the repository").unwrap();
    let place = Local::new();
    let root = place.folder.path();
    fs::create_dir(root.join("folder")).unwrap();
    symlink(outside.path().join("secret"), root.join("folder/absolute")).unwrap();
    symlink(outside.path(), root.join("folder/directory")).unwrap();
    let name = outside.path().file_name().unwrap().to_str().unwrap();
    symlink(format!("../../{name}/secret"), root.join("folder/relative")).unwrap();
    symlink("relative", root.join("folder/indirect")).unwrap();
    symlink("..", root.join("up")).unwrap();

    let storage = place.storage();
    let names =
        ["folder/absolute", "folder/relative", "folder/indirect", "folder/directory", "folder/directory/secret", "up"];
    for name in names.map(path) {
        assert_eq!(storage.open(&name).err().map(|error| error.kind()), Some(ErrorKind::Escape), "open {name}");
        assert_eq!(storage.read(&name, 100).unwrap_err().kind(), ErrorKind::Escape, "read {name}");
        assert_eq!(storage.stat(&name).unwrap_err().kind(), ErrorKind::Escape, "stat {name}");
        assert_eq!(storage.list(&name).unwrap_err().kind(), ErrorKind::Escape, "list {name}");
    }
    let error = storage.read(&path("folder/absolute"), 100).unwrap_err();
    assert_eq!(error.to_string(), "read 'folder/absolute': leads outside the repository");
    assert!(storage.list(&path("folder")).unwrap().iter().all(|entry| !entry.is_directory));
    assert_eq!(storage.list(&path("folder")).unwrap().len(), 4);
}

#[test]
fn nothing_outside_is_changed_through_a_link() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "not part of the repository").unwrap();
    let place = Local::new();
    let root = place.folder.path();
    symlink(outside.path(), root.join("folder")).unwrap();
    symlink(outside.path().join("file"), root.join("link")).unwrap();
    place.put("file", b"inside");
    let storage = LocalStorage::open(root).unwrap();
    for (act, changed) in [
        ("write", storage.write(&path("folder/new"), b"x", Existing::Replace)),
        ("write over", storage.write(&path("link"), b"x", Existing::Replace)),
        ("create", storage.create(&path("folder/new")).map(drop)),
        ("open", storage.open_to_write(&path("link")).map(drop)),
        ("make a folder", storage.create_directory(&path("folder/new"))),
        ("rename to", storage.rename(&path("file"), &path("folder/file"))),
        ("rename from", storage.rename(&path("folder/file"), &path("stolen"))),
        ("remove", storage.remove(&path("folder/file"))),
        ("touch", storage.touch(&path("link"))),
        ("set the time of", storage.set_modified(&path("link"), std::time::SystemTime::UNIX_EPOCH)),
        ("sync", storage.sync(&path("link"))),
    ] {
        assert_eq!(changed.unwrap_err().kind(), ErrorKind::Escape, "{act}");
    }
    assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"not part of the repository");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    // A link itself is a name in the repository.
    storage.remove(&path("link")).unwrap();
    assert!(outside.path().join("file").exists() && !root.join("link").is_symlink());
}

#[test]
fn a_pipe_and_a_full_place_are_errors_that_say_so() {
    let place = Local::new();
    mknodat(CWD, place.folder.path().join("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let storage = LocalStorage::open(place.folder.path()).unwrap();
    let (written, opened) =
        (storage.write(&path("pipe"), b"x", Existing::Replace), storage.open_to_write(&path("pipe")));
    assert_eq!((written.unwrap_err().kind(), opened.err().unwrap().kind()), (ErrorKind::Io, ErrorKind::Io));
    let full = LocalStorage::open(std::path::Path::new("/dev")).unwrap();
    let error = full.write(&path("full"), b"x", Existing::Replace).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::NoSpace, "write 'full': No space left on device (os error 28)")
    );
}

#[test]
fn a_link_that_stays_inside_is_followed() {
    let place = Local::new();
    place.put("real/file", b"bytes");
    let root = place.folder.path();
    symlink("real", root.join("link")).unwrap();
    symlink("../real/file", root.join("real/again")).unwrap();
    let storage = place.storage();
    assert_eq!(storage.read(&path("link/file"), 5).unwrap(), b"bytes");
    assert_eq!(storage.read(&path("link/again"), 5).unwrap(), b"bytes");
    let listed = storage.list(&path("")).unwrap();
    assert!(listed.iter().any(|entry| entry.name == "link" && entry.is_directory), "{listed:?}");
}

#[test]
fn a_link_that_leads_nowhere_is_not_found_and_hides_nothing() {
    let place = Local::new();
    let root = place.folder.path();
    symlink("missing", root.join("dangling")).unwrap();
    symlink("b", root.join("a")).unwrap();
    symlink("a", root.join("b")).unwrap();
    place.put("file", b"bytes");
    let storage = place.storage();
    for name in ["dangling", "a"].map(path) {
        assert_eq!(storage.stat(&name).unwrap_err().kind(), ErrorKind::NotFound, "{name}");
        assert_eq!(storage.read(&name, 1).unwrap_err().kind(), ErrorKind::NotFound, "{name}");
    }
    let mut names: Vec<_> = storage.list(&path("")).unwrap().into_iter().map(|entry| entry.name).collect();
    names.sort();
    assert_eq!(names, ["a", "b", "dangling", "file"]);
}

#[test]
fn a_pipe_or_a_socket_is_refused_without_waiting() {
    let place = Local::new();
    mknodat(CWD, place.folder.path().join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(place.folder.path().join("socket")).unwrap();
    for name in ["pipe", "socket"] {
        let (sender, receiver) = mpsc::channel();
        let storage = place.storage();
        std::thread::spawn(move || {
            let opened = storage.open(&path(name)).err().map(|error| error.kind());
            let read = storage.read(&path(name), 100).err().map(|error| error.kind());
            sender.send((opened, read, storage.stat(&path(name)).unwrap().kind)).unwrap();
        });
        let answer = receiver.recv_timeout(Duration::from_secs(10)).expect("it blocked");
        assert_eq!(answer, (Some(ErrorKind::Io), Some(ErrorKind::Io), Kind::Other), "{name}");
    }
    assert!(place.storage().list(&path("")).unwrap().iter().all(|entry| !entry.is_directory));
}

#[test]
fn a_name_that_is_not_utf8_is_not_listed() {
    let place = Local::new();
    fs::write(place.folder.path().join(OsStr::from_bytes(b"\xff\xfe")), "bytes").unwrap();
    place.put("file", b"bytes");
    let names: Vec<_> = place.storage().list(&path("")).unwrap().into_iter().map(|entry| entry.name).collect();
    assert_eq!(names, ["file"]);
}

#[test]
fn a_read_stops_at_its_limit_even_if_the_size_says_less() {
    // Files of procfs have bytes but no size, as a file has that grows after its size was asked.
    let storage = LocalStorage::open("/proc/self".as_ref()).unwrap();
    let storage: &dyn storage::Storage = &storage;
    assert_eq!(storage.stat(&path("status")).unwrap().size, 0);
    assert_eq!(storage.read(&path("status"), 10).unwrap_err().kind(), ErrorKind::TooLarge);
    assert!(storage.read(&path("status"), 1 << 20).unwrap().starts_with(b"Name:"));
}

#[test]
fn a_sparse_file_of_a_tebibyte_is_refused_without_memory_for_it() {
    let place = Local::new();
    let length = 1 << 40;
    fs::File::create(place.folder.path().join("file")).unwrap().set_len(length).unwrap();
    let storage = place.storage();
    assert_eq!(storage.read(&path("file"), length - 1).unwrap_err().kind(), ErrorKind::TooLarge);
    let object = storage.open(&path("file")).unwrap();
    assert_eq!(object.read_at(length - 3, &mut [1; 8]).unwrap(), 3);
}

#[test]
fn what_may_not_be_read_is_refused_as_such() {
    let place = Local::new();
    place.put("file", b"bytes");
    fs::set_permissions(place.folder.path().join("file"), fs::Permissions::from_mode(0o000)).unwrap();
    // To root nothing is forbidden.
    let expected = (!rustix::process::geteuid().is_root()).then_some(ErrorKind::PermissionDenied);
    assert_eq!(place.storage().open(&path("file")).err().map(|error| error.kind()), expected);
    assert_eq!(place.storage().stat(&path("file")).unwrap().size, 5);
}

#[test]
fn a_root_that_is_moved_stays_the_root() {
    let parent = tempfile::tempdir().unwrap();
    fs::create_dir(parent.path().join("before")).unwrap();
    fs::write(parent.path().join("before/file"), "bytes").unwrap();
    let storage = LocalStorage::open(&parent.path().join("before")).unwrap();
    fs::rename(parent.path().join("before"), parent.path().join("after")).unwrap();
    let storage: &dyn storage::Storage = &storage;
    assert_eq!(storage.read(&path("file"), 5).unwrap(), b"bytes");
    assert_eq!(storage.describe(), parent.path().join("before").display().to_string());
}

#[test]
fn a_root_that_is_no_folder_is_refused() {
    let place = Local::new();
    place.put("file", b"bytes");
    for (name, expected) in [("file", IoErrorKind::NotADirectory), ("missing", IoErrorKind::NotFound)] {
        let error = LocalStorage::open(&place.folder.path().join(name)).err().unwrap();
        assert_eq!(error.kind(), expected, "{name}");
    }
}

// Promise 11: "Nothing is written to the repository"
#[test]
fn reading_and_listing_leave_access_times_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    fs::write(folder.path().join("d/a"), "x").unwrap();
    let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let set = |name: &str| {
        let times = fs::FileTimes::new().set_accessed(long_ago);
        fs::File::open(folder.path().join(name)).unwrap().set_times(times).unwrap();
    };
    set("d");
    set("d/a");
    let storage = LocalStorage::open(folder.path()).unwrap();
    storage.list(&path("d")).unwrap();
    assert_eq!(storage.read(&path("d/a"), 10).unwrap(), b"x");
    for name in ["d", "d/a"] {
        assert_eq!(fs::metadata(folder.path().join(name)).unwrap().accessed().unwrap(), long_ago, "{name}");
    }
}
