//! Files that are read and replaced as a whole: who reads one sees what was there before, or what is there now.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Reads the text of a regular file of at most `longest` bytes, that anybody may have named: it never waits, as the opening of a pipe does.
///
/// # Errors
/// What the system says, and `InvalidData` for what is no regular file, too long, or not UTF-8.
pub fn text(path: &Path, longest: u64) -> io::Result<String> {
    let wrong = |message: String| io::Error::new(io::ErrorKind::InvalidData, message);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(wrong("it is no regular file".to_owned()));
    }
    let mut bytes = Vec::new();
    // Its length may change meanwhile.
    file.take(longest.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        return Err(wrong(format!("it is longer than {longest} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| wrong("it is no text: UTF-8 was expected".to_owned()))
}

/// Does the same as [`put`] for a path that anybody may have named.
///
/// # Errors
/// What the system says, and `AlreadyExists` for what is no regular file: devices and links are not replaced. Nothing is changed then.
pub fn replace(path: &Path, fresh: &OsStr, bytes: &[u8], mode: u32, is_durable: bool) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is there already, and is no regular file"));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    put(path, fresh, bytes, mode, is_durable)
}

/// Writes a file with these permissions in the place of what was there. Until it is whole it is called `fresh`, beside it; nobody else
/// may write that meanwhile. `is_durable`: whether it outlives a power cut by then.
///
/// # Errors
/// What the system says. Nothing is changed then.
pub fn put(path: &Path, fresh: &OsStr, bytes: &[u8], mode: u32, is_durable: bool) -> io::Result<()> {
    let fresh = path.with_file_name(fresh);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&fresh)?;
        // Whatever the mask of this process takes away.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        if is_durable {
            file.sync_all()?;
        }
        fs::rename(&fresh, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&fresh)))?;
    let folder = path.parent().filter(|folder| is_durable && !folder.as_os_str().is_empty());
    folder.map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FileType, Mode};

    use super::*;

    #[test]
    fn the_text_of_a_file_is_read_and_what_is_none_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        fs::write(path("text"), "four").expect("written");
        fs::write(path("bytes"), b"\xff").expect("written");
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), FileType::Fifo, Mode::RWXU, 0).expect("made");
        assert_eq!(text(&path("text"), 4).expect("read"), "four");
        for (name, longest, expected) in [
            ("text", 3, "it is longer than 3 bytes"),
            ("bytes", 3, "it is no text: UTF-8 was expected"),
            ("pipe", 3, "it is no regular file"),
            ("", 3, "it is no regular file"),
            ("absent", 3, "No such file or directory (os error 2)"),
        ] {
            assert_eq!(text(&path(name), longest).expect_err("wrong").to_string(), expected, "{name}");
        }
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_nothing_else_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.prom");
        let replace = |path: &Path, text: &str| replace(path, ".new".as_ref(), text.as_bytes(), 0o644, true);
        for text in ["longer than what follows", "short"] {
            replace(&path, text).expect("written");
            assert_eq!(fs::read_to_string(&path).expect("there"), text);
        }
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o644);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("made");
        for other in [&link, Path::new("/dev/null"), folder.path()] {
            let error = replace(other, "x").expect_err("no file");
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{}", other.display());
        }
        replace(&folder.path().join("absent/file"), "x").expect_err("no such folder");
        // No half of one is left.
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 2);
    }
}
