//! The kernel's table of mounts, as far as unmounting needs it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Where the kernel lists the mounts that this process sees. Format: proc_pid_mountinfo(5).
const TABLE: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Device number as the table writes it, `major:minor`; a FUSE mount has its own.
    pub(super) device: String,
    pub(super) mountpoint: PathBuf,
    /// Such as `fuse.xofs`.
    pub(super) kind: String,
    /// What is mounted: a device, or what a filesystem without one calls it.
    pub(super) source: PathBuf,
}

impl Mount {
    /// Returns whether it is a mount of ours, by its subtype.
    pub(super) fn is_ours(&self) -> bool {
        self.kind == "fuse.xofs"
    }
}

/// Returns the topmost mount at `mountpoint`, an absolute path without symbolic links.
///
/// # Errors
/// What reading the table says.
pub(super) fn at(mountpoint: &Path) -> io::Result<Option<Mount>> {
    Ok(parse(&fs::read(TABLE)?).into_iter().rfind(|mount| mount.mountpoint == mountpoint))
}

/// Parses the table; lines that are not understood are left out.
fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mountpoint options optional... - kind source options`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let mountpoint = PathBuf::from(unescape(fields.nth(1)?));
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let source = PathBuf::from(unescape(fields.next()?));
    Some(Mount { device, mountpoint, kind, source })
}

/// Undoes the kernel's `\ooo` (three octal digits) for blanks, line ends and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes)
}

/// Resolves symbolic links of a mountpoint, also when what is mounted there is dead and answers nothing.
///
/// # Errors
/// What looking at it, or at the directory it lies in, says.
pub(super) fn resolve(mountpoint: &Path) -> io::Result<PathBuf> {
    match mountpoint.canonicalize() {
        Err(error) if is_dead(&error) => {
            let absolute = std::path::absolute(mountpoint)?;
            match (absolute.parent(), absolute.file_name()) {
                (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
                _ => Err(error),
            }
        }
        resolved => resolved,
    }
}

/// Returns whether an error means that the process which served a mount is gone.
pub(super) fn is_dead(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// Makes a source name that no reader of mount options takes apart: commas, percent signs, backslashes and control
/// characters become `%XX`.
pub(super) fn escape_source(source: &str) -> String {
    let mut escaped = Vec::with_capacity(source.len());
    for byte in source.bytes() {
        match byte {
            b',' | b'%' | b'\\' | 0..=31 | 127 => escaped.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            byte => escaped.push(byte),
        }
    }
    String::from_utf8(escaped).expect("only ASCII was replaced")
}

/// Returns the device number of a mounted path as the table writes it.
///
/// # Errors
/// What looking at it says.
pub(super) fn device_of(path: &Path) -> io::Result<String> {
    let device = rustix::fs::stat(path)?.st_dev;
    Ok(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_mounts_gives_device_path_kind_and_source() {
        let table = b"22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
            90 22 0:47 / /mnt/a\\040b\\134c ro,nosuid,nodev - fuse.xofs /srv/backups ro,user_id=0\n\
            garbage\n";
        let mounts = parse(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[1].device, "0:47");
        assert_eq!(mounts[1].mountpoint, Path::new("/mnt/a b\\c"));
        assert_eq!(mounts[0].source, Path::new("/dev/vda1"));
        assert!(mounts[1].is_ours() && !mounts[0].is_ours());
    }

    #[test]
    fn a_source_name_holds_nothing_that_separates_options() {
        assert_eq!(escape_source("/srv/a,b%c\\d e\n"), "/srv/a%2Cb%25c%5Cd e%0A");
    }
}
