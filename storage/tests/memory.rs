//! What the storage in memory does beyond what every storage does.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use places::path;
use storage::{ErrorKind, MemoryStorage, Storage};

#[test]
fn a_directory_is_renamed_and_removed_with_all_it_holds() {
    let memory = MemoryStorage::new();
    memory.put("a/b/file", "1").unwrap();
    memory.put("a/other", "2").unwrap();
    memory.put("ab", "3").unwrap();
    memory.put("target/old", "4").unwrap();
    let inode = memory.stat(&path("a/b/file")).unwrap().inode;
    let old = memory.open(&path("target/old")).unwrap();
    memory.rename("a", "target").unwrap();
    assert_eq!(memory.stat(&path("target/b/file")).unwrap().inode, inode);
    assert_eq!(memory.read(&path("target/other"), 1).unwrap(), b"2");
    for gone in ["a", "a/b/file", "target/old"] {
        assert_eq!(memory.stat(&path(gone)).unwrap_err().kind(), ErrorKind::NotFound, "{gone}");
    }
    assert_eq!(old.stat().unwrap().links, 0);
    memory.remove("target").unwrap();
    let names: Vec<_> = memory.list(&path("")).unwrap().into_iter().map(|entry| entry.name).collect();
    assert_eq!(names, ["ab"]);
    memory.remove("").unwrap();
    assert_eq!(memory.list(&path("")).unwrap(), []);
}

#[test]
fn changes_that_make_no_sense_are_refused() {
    let memory = MemoryStorage::new();
    memory.put("folder/file", "1").unwrap();
    let kind = |result: storage::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(memory.put("folder", "")), ErrorKind::IsDirectory);
    assert_eq!(kind(memory.put("", "")), ErrorKind::IsDirectory);
    assert_eq!(kind(memory.put("folder/file/x", "")), ErrorKind::NotDirectory);
    assert_eq!(kind(memory.put("../x", "")), ErrorKind::Escape);
    assert_eq!(kind(memory.create_directory("folder/file")), ErrorKind::NotDirectory);
    assert_eq!(kind(memory.overwrite("missing", "")), ErrorKind::NotFound);
    assert_eq!(kind(memory.remove("missing")), ErrorKind::NotFound);
    assert_eq!(kind(memory.rename("missing", "x")), ErrorKind::NotFound);
    assert_eq!(kind(memory.rename("folder", "folder/x")), ErrorKind::Escape);
    assert_eq!(kind(memory.rename("folder", "nowhere/x")), ErrorKind::NotFound);
    memory.rename("folder", "folder").unwrap();
    assert_eq!(memory.read(&path("folder/file"), 1).unwrap(), b"1");
}
