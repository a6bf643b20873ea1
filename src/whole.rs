//! Files that are replaced as a whole: who reads one sees what was there before, or what is there now.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

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
    use super::*;

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
