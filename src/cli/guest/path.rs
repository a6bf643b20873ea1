//! What people call a file of a guest: `VM/BACKUP/VOLUME:/path`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use anyhow::Result;

use crate::cli::exit::Failure;
use crate::cli::text::ShownBytes;
use crate::cli::{Global, open};

/// A backup, or a file in one of its volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestPath {
    /// `VM/BACKUP`.
    pub backup: String,
    pub inside: Option<Inside>,
}

/// A place in a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    pub volume: String,
    /// From the root of the volume, with or without the `/` at its beginning; any bytes but zero.
    pub path: Vec<u8>,
}

impl GuestPath {
    /// Splits what was named. A name of a VM may have colons: only that after the third part ends it.
    ///
    /// # Errors
    /// `Usage` if no backup is named, or its name is not UTF-8.
    pub fn parse(what: &OsStr) -> Result<Self> {
        let shown = ShownBytes(what.as_bytes());
        let wrong = |expected: &str| Failure::usage(format!("'{shown}': expected {expected}"));
        let text = |bytes: &[u8]| match String::from_utf8(bytes.to_vec()) {
            Ok(text) => Ok(text),
            Err(_) => Err(Failure::usage(format!("'{shown}': the name of the VM, backup or volume is not UTF-8"))),
        };
        let mut parts = what.as_bytes().splitn(3, |byte| *byte == b'/');
        let (vm, backup) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        if vm.is_empty() || backup.is_empty() {
            return Err(wrong("VM/BACKUP/VOLUME:/path, as in 'web01/latest/xvda1:/etc/fstab'").into());
        }
        let backup = text(&[vm, b"/", backup].concat())?;
        let rest = parts.next().unwrap_or_default();
        if rest.is_empty() {
            return Ok(Self { backup, inside: None });
        }
        let colon = rest.iter().position(|byte| *byte == b':');
        let (volume, path) = rest.split_at(colon.unwrap_or(rest.len()));
        let volume = volume.strip_suffix(b"/").filter(|_| path.is_empty()).unwrap_or(volume);
        if volume.is_empty() || volume.contains(&b'/') {
            return Err(wrong("a ':' between the volume and the path, as in 'web01/latest/xvda1:/etc/fstab'").into());
        }
        let path = path.strip_prefix(b":").unwrap_or(path).to_vec();
        Ok(Self { backup, inside: Some(Inside { volume: text(volume)?, path }) })
    }
}

/// Splits `[REPO] WHAT...`: the first name is the repository where none is known by default, where it is clearly a path, or
/// where it has no `/`, which all others need.
pub fn split_names<'a>(global: &Global, names: &'a [OsString]) -> (Option<&'a OsStr>, &'a [OsString]) {
    match names.split_first() {
        Some((first, rest))
            if global.repository.is_none() || open::is_path(first) || !first.as_bytes().contains(&b'/') =>
        {
            (Some(first), rest)
        }
        _ => (None, names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(what: &[u8]) -> Result<GuestPath> {
        GuestPath::parse(OsStr::from_bytes(what))
    }

    #[test]
    fn what_is_named_is_split_at_the_colon_after_the_volume() {
        for (what, backup, volume, path) in [
            (&b"web01/latest/xvda1:/etc/fstab"[..], "web01/latest", "xvda1", &b"/etc/fstab"[..]),
            (b"web01/latest/xvda1", "web01/latest", "xvda1", b""),
            (b"web01/latest/xvda1/", "web01/latest", "xvda1", b""),
            (b"web01/latest/xvda1:", "web01/latest", "xvda1", b""),
            (b"a:b/2026-08/vg0-root:etc/a:b", "a:b/2026-08", "vg0-root", b"etc/a:b"),
            (b"web01/latest~2/xvda:/\xff\n", "web01/latest~2", "xvda", b"/\xff\n"),
        ] {
            let inside = Some(Inside { volume: volume.to_owned(), path: path.to_vec() });
            assert_eq!(parse(what).unwrap(), GuestPath { backup: backup.to_owned(), inside }, "{}", ShownBytes(what));
        }
        for what in [&b"web01/latest"[..], b"web01/latest/"] {
            assert_eq!(parse(what).unwrap(), GuestPath { backup: "web01/latest".to_owned(), inside: None });
        }
    }

    #[test]
    fn what_is_no_such_name_says_what_was_expected() {
        for (what, expected) in [
            (&b"web01"[..], "expected VM/BACKUP/VOLUME:/path"),
            (b"", "expected VM/BACKUP/VOLUME:/path"),
            (b"web01//xvda1", "expected VM/BACKUP/VOLUME:/path"),
            (b"web01/latest/xvda1/etc/fstab", "expected a ':' between the volume and the path"),
            (b"web01/latest/:/etc", "expected a ':' between the volume and the path"),
            (b"web\xff/latest/xvda1", "is not UTF-8"),
        ] {
            let error = parse(what).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
