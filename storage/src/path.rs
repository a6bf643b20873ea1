//! A relative path that cannot leave its storage.

use std::fmt;
use std::sync::Arc;

use crate::{Error, ErrorKind, Result};

/// The path of an object, relative to the root of its storage.
///
/// Invariants: no component is empty, `.` or `..`; none holds `/` or NUL; the root is the path without components.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectPath(Arc<str>);

impl ObjectPath {
    /// Returns the path of the root.
    #[must_use]
    pub fn root() -> Self {
        Self(Arc::from(""))
    }

    /// Makes a path of slash-separated components.
    ///
    /// # Errors
    /// [`ErrorKind::Escape`] if a component is empty, `.`, `..` or holds NUL, or the path is absolute.
    pub fn new(path: &str) -> Result<Self> {
        if path.is_empty() || path.split('/').all(is_name) {
            Ok(Self(Arc::from(path)))
        } else {
            let shown = Self(Arc::from(path.escape_debug().to_string()));
            Err(Error::new(ErrorKind::Escape, "resolve", &shown, "a path inside the repository was expected"))
        }
    }

    /// Returns the path of `name` (one component) below this one.
    ///
    /// # Errors
    /// As for [`ObjectPath::new`]; also if `name` has several components.
    pub fn join(&self, name: &str) -> Result<Self> {
        if !is_name(name) || name.contains('/') {
            let reason = format!("'{}' is no name", name.escape_debug());
            return Err(Error::new(ErrorKind::Escape, "resolve in", self, reason));
        }
        let parent = if self.0.is_empty() { String::new() } else { format!("{}/", self.0) };
        Ok(Self(Arc::from(parent + name)))
    }

    /// Resolves a relative path found inside a file against this directory; `.` and `..` are followed.
    ///
    /// # Errors
    /// [`ErrorKind::Escape`] if it is absolute, empty, holds NUL, or climbs above the root.
    pub fn resolve(&self, relative: &str) -> Result<Self> {
        let refuse = |why: &str| {
            let reason = format!("'{}' {why}", relative.escape_debug());
            Err(Error::new(ErrorKind::Escape, "resolve in", self, reason))
        };
        if relative.is_empty() {
            return refuse("is empty, a path was expected");
        }
        if relative.starts_with('/') {
            return refuse("is absolute and would leave the repository");
        }
        if relative.contains('\0') {
            return refuse("holds a NUL byte");
        }
        let mut components: Vec<&str> = self.components().collect();
        for component in relative.split('/') {
            match component {
                "" | "." => {}
                ".." => {
                    if components.pop().is_none() {
                        return refuse("leads outside the repository");
                    }
                }
                name => components.push(name),
            }
        }
        Ok(Self(Arc::from(components.join("/"))))
    }

    /// Returns the directory of the object; the root is its own.
    #[must_use]
    pub fn parent(&self) -> Self {
        Self(Arc::from(self.0.rsplit_once('/').map_or("", |(parent, _)| parent)))
    }

    /// Returns the last component, empty for the root.
    #[must_use]
    pub fn file_name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&self.0, |(_, name)| name)
    }

    /// Returns the components.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }

    /// Whether it is in the directory, at any depth.
    #[must_use]
    pub fn is_beneath(&self, directory: &Self) -> bool {
        let mut components = self.components();
        directory.components().all(|name| components.next() == Some(name)) && components.next().is_some()
    }

    /// Returns the path as text, empty for the root.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a component of a path, which holds no slash, names something.
fn is_name(component: &str) -> bool {
    !matches!(component, "" | "." | "..") && !component.contains('\0')
}

impl fmt::Display for ObjectPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "." } else { &self.0 })
    }
}

impl fmt::Debug for ObjectPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_found_in_a_file_never_leaves_the_storage() {
        let directory = ObjectPath::new("a/b").unwrap();
        for (relative, expected) in [
            ("c", Some("a/b/c")),
            ("data/x.vhd", Some("a/b/data/x.vhd")),
            ("../c", Some("a/c")),
            ("../../c", Some("c")),
            ("./c//d/.", Some("a/b/c/d")),
            ("../../../c", None),
            ("/etc/passwd", None),
            ("", None),
            ("a\0b", None),
        ] {
            assert_eq!(directory.resolve(relative).ok().as_ref().map(ObjectPath::as_str), expected, "{relative:?}");
        }
    }

    #[test]
    fn a_path_has_only_plain_components() {
        for path in ["/a", "a/", "a//b", "..", "a/../b", ".", "a\0"] {
            assert_eq!(ObjectPath::new(path).unwrap_err().kind(), ErrorKind::Escape, "{path:?}");
        }
        let path = ObjectPath::new("a/b.vhd").unwrap();
        assert_eq!((path.parent().as_str(), path.file_name()), ("a", "b.vhd"));
        assert_eq!((path.parent().parent(), path.parent().parent().parent()), (ObjectPath::root(), ObjectPath::root()));
        for name in ["c/d", "..", ".", "", "/", "c/", "a\0"] {
            assert_eq!(path.join(name).unwrap_err().kind(), ErrorKind::Escape, "{name:?}");
        }
        assert_eq!(path.join("c").unwrap().as_str(), "a/b.vhd/c");
        assert_eq!(ObjectPath::root().join("c").unwrap().as_str(), "c");
        for (directory, expected) in [("a", true), ("", true), ("a/b.vhd", false), ("a/b", false), ("b", false)] {
            assert_eq!(path.is_beneath(&ObjectPath::new(directory).unwrap()), expected, "{directory}");
        }
        assert_eq!(ObjectPath::root().to_string(), ".");
    }
}
