//! A power cut takes what was not synced, and nothing else.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use places::path;
use storage::{ErrorKind, Existing, Loss, MemoryStorage, Storage, WritableStorage, publish};

/// What a file holds after everything that was not synced is lost; `None` if it is gone.
fn left(memory: &MemoryStorage, name: &str, loss: Loss) -> Option<Vec<u8>> {
    match memory.after_power_cut(|| loss).read(&path(name), 100) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
            None
        }
    }
}

fn write(memory: &MemoryStorage, name: &str, bytes: &[u8]) {
    memory.write(&path(name), bytes, Existing::Replace).unwrap();
}

#[test]
fn a_file_needs_its_bytes_and_its_name_synced() {
    let memory = MemoryStorage::with_power_cuts();
    write(&memory, "file", b"bytes");
    assert_eq!(left(&memory, "file", Loss::All), None);
    assert_eq!(left(&memory, "file", Loss::None).unwrap(), b"bytes");
    assert_eq!(left(&memory, "file", Loss::Half).unwrap(), b"by");
    memory.sync(&path("file")).unwrap();
    assert_eq!(left(&memory, "file", Loss::All), None, "nobody finds it");
    memory.sync(&path("")).unwrap();
    assert_eq!(left(&memory, "file", Loss::All).unwrap(), b"bytes");

    write(&memory, "other", b"bytes");
    memory.sync(&path("")).unwrap();
    assert_eq!(left(&memory, "other", Loss::All).unwrap(), b"", "its name alone");
    write(&memory, "file", b"changed");
    assert_eq!(left(&memory, "file", Loss::All).unwrap(), b"bytes");
    assert_eq!(left(&memory, "file", Loss::Half).unwrap(), b"cha");
    assert_eq!(memory.read(&path("file"), 100).unwrap(), b"changed", "the storage itself goes on");
}

#[test]
fn writes_in_place_are_lost_each_on_its_own() {
    let memory = MemoryStorage::with_power_cuts();
    let file = memory.create(&path("file")).unwrap();
    file.write_at(0, b"aaaa").unwrap();
    file.sync().unwrap();
    memory.sync(&path("")).unwrap();
    file.write_at(0, b"bb").unwrap();
    file.write_at(2, b"cc").unwrap();
    let mut turn = 0;
    let after = memory.after_power_cut(|| {
        turn += 1;
        if turn == 1 { Loss::All } else { Loss::None }
    });
    assert_eq!((turn, after.read(&path("file"), 9).unwrap()), (2, b"aacc".to_vec()));
}

#[test]
fn a_rename_is_all_or_nothing() {
    let memory = MemoryStorage::with_power_cuts();
    memory.create_directory("a").unwrap();
    memory.create_directory("b").unwrap();
    write(&memory, "a/file", b"moved");
    write(&memory, "b/file", b"replaced");
    memory.sync_tree(&path(""), &memory.mark().unwrap()).unwrap();
    WritableStorage::rename(&memory, &path("a/file"), &path("b/file")).unwrap();
    let both = |loss| (left(&memory, "a/file", loss), left(&memory, "b/file", loss).unwrap());
    assert_eq!(both(Loss::All), (Some(b"moved".to_vec()), b"replaced".to_vec()));
    assert_eq!(both(Loss::None), (None, b"moved".to_vec()));
    // Either folder will do.
    memory.sync(&path("a")).unwrap();
    assert_eq!(both(Loss::All), (None, b"moved".to_vec()));
}

#[test]
fn a_name_is_kept_with_what_it_came_from() {
    let memory = MemoryStorage::with_power_cuts();
    for folder in ["a", "b", "c"] {
        memory.create_directory(folder).unwrap();
    }
    write(&memory, "a/file", b"moved");
    memory.sync_tree(&path(""), &memory.mark().unwrap()).unwrap();
    WritableStorage::rename(&memory, &path("a/file"), &path("b/file")).unwrap();
    WritableStorage::rename(&memory, &path("b/file"), &path("c/file")).unwrap();
    memory.sync(&path("c")).unwrap();
    let names = |name| left(&memory, name, Loss::All);
    assert_eq!((names("a/file"), names("b/file"), names("c/file")), (None, None, Some(b"moved".to_vec())));
}

#[test]
fn what_is_published_is_the_old_or_the_new_at_any_moment_and_then_the_new() {
    let memory = MemoryStorage::with_power_cuts();
    publish(&memory, &path("file"), b"old").unwrap();
    assert_eq!(left(&memory, "file", Loss::All).unwrap(), b"old");
    publish(&memory, &path("file"), b"new").unwrap();
    assert_eq!(left(&memory, "file", Loss::All).unwrap(), b"new");
    WritableStorage::remove(&memory, &path("file")).unwrap();
    assert_eq!(left(&memory, "file", Loss::All).unwrap(), b"new");
    memory.sync(&path("")).unwrap();
    assert_eq!(left(&memory, "file", Loss::All), None);
}

#[test]
fn what_is_left_can_be_cut_off_again() {
    let memory = MemoryStorage::with_power_cuts();
    memory.create_directory("a").unwrap();
    write(&memory, "a/file", b"bytes");
    memory.sync_tree(&path(""), &memory.mark().unwrap()).unwrap();
    let after = memory.after_power_cut(|| Loss::All);
    write(&after, "a/file", b"again");
    write(&after, "a/new", b"new");
    assert_eq!(left(&after, "a/file", Loss::All).unwrap(), b"bytes");
    after.sync_tree(&path(""), &after.mark().unwrap()).unwrap();
    let again = after.after_power_cut(|| Loss::All);
    assert_eq!(again.read(&path("a/file"), 9).unwrap(), b"again");
    assert_eq!(again.list(&path("a")).unwrap().len(), 2);
}
