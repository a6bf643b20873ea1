//! A directory of a guest as it is shown: under names that a directory can have.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use guest::{Attributes, Entry, Inode};

use super::ROOT;
use super::name::shown;

/// Bytes that an entry takes besides its name.
const ENTRY: usize = size_of::<Listed>() + 16;

/// A name in a directory, and what is known of the file or why that is not.
pub(in crate::tree) struct Listed {
    pub(in crate::tree) name: OsString,
    pub(in crate::tree) inode: Inode,
    pub(in crate::tree) attributes: Result<Attributes, String>,
}

/// Memory that all listings may take, those kept and those of directories that are open (bytes): two of the largest that a worker
/// may say. Beyond, no other is made.
const LIVING: usize = 512 << 20;

/// What the listings that live take together (bytes).
#[derive(Clone, Default)]
pub(in crate::tree) struct Living(Arc<AtomicUsize>);

impl Living {
    /// Checks that there is room for another, however large.
    ///
    /// # Errors
    /// `TooMuch`.
    pub(in crate::tree) fn check(&self) -> guest::Result<()> {
        if self.0.load(Ordering::Relaxed) < LIVING {
            return Ok(());
        }
        let message = format!("the folders that are open hold more than {} MiB of names: close some", LIVING >> 20);
        Err(guest::Error::new(guest::ErrorKind::TooMuch, message))
    }
}

/// A directory, sorted by name.
pub(in crate::tree) struct Listing {
    listed: Vec<Listed>,
    /// In bytes; counted among those that live until it is dropped.
    memory: usize,
    living: Living,
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.living.0.fetch_sub(self.memory, Ordering::Relaxed);
    }
}

impl Listing {
    /// Makes one of what the worker says, for whom the root is `root`, to be counted among the `living`. Names that Linux has in no
    /// directory are escaped, and a name that comes again gets a number: `passwd~2`.
    pub(in crate::tree) fn new(found: Vec<(Entry, Result<Attributes, String>)>, root: Inode, living: Living) -> Self {
        let mut listed: Vec<_> = found
            .into_iter()
            .map(|(Entry { name, inode }, attributes)| {
                let name = match shown(&name) {
                    Cow::Borrowed(_) => name,
                    Cow::Owned(shown) => shown,
                };
                // The kernel sees a directory that is in itself by its number.
                let inode = if inode == root { ROOT } else { inode };
                Listed { name: OsString::from_vec(name), inode, attributes }
            })
            .collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        if listed.windows(2).any(|pair| pair[0].name == pair[1].name) {
            tell_apart(&mut listed);
        }
        let text = |listed: &Listed| listed.name.len() + listed.attributes.as_ref().err().map_or(0, String::len);
        let memory = listed.iter().map(|listed| ENTRY + text(listed)).sum();
        living.0.fetch_add(memory, Ordering::Relaxed);
        Self { listed, memory, living }
    }

    pub(in crate::tree) fn find(&self, name: &OsStr) -> Option<&Listed> {
        let index = self.listed.binary_search_by(|listed| listed.name.as_os_str().cmp(name)).ok()?;
        Some(&self.listed[index])
    }

    pub(in crate::tree) fn get(&self, index: usize) -> Option<&Listed> {
        self.listed.get(index)
    }

    pub(in crate::tree) fn inodes(&self) -> impl Iterator<Item = Inode> {
        self.listed.iter().map(|listed| listed.inode)
    }

    pub(in crate::tree) fn len(&self) -> usize {
        self.listed.len()
    }

    /// Returns how many bytes of memory it takes.
    pub(in crate::tree) fn memory(&self) -> usize {
        self.memory
    }
}

fn tell_apart(listed: &mut [Listed]) {
    let mut taken: HashSet<OsString> = listed.iter().map(|listed| listed.name.clone()).collect();
    let mut previous = OsString::new();
    let mut number = 2;
    for listed in listed.iter_mut() {
        if listed.name != previous {
            previous.clone_from(&listed.name);
            number = 2;
            continue;
        }
        loop {
            let name = OsStr::from_bytes(&[previous.as_bytes(), format!("~{number}").as_bytes()].concat()).to_owned();
            number += 1;
            if taken.insert(name.clone()) {
                listed.name = name;
                break;
            }
        }
    }
    listed.sort_by(|a, b| a.name.cmp(&b.name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_component_and_none_comes_twice() {
        let found = [&b"b"[..], b"a", b"..", b"../etc", b"b~2", b"b", b"x\0%", b"b", b"100%", b"caf\xe9", b"a"];
        let found = (0..)
            .zip(found)
            .map(|(inode, name)| (Entry { name: name.to_vec(), inode: Inode(inode) }, Err("not looked at".to_owned())));
        let listing = Listing::new(found.collect(), Inode(99), Living::default());
        let names: Vec<_> = listing.listed.iter().map(|listed| (listed.name.as_bytes(), listed.inode.0)).collect();
        let expected: [(&[u8], u64); 11] = [
            (b"%2E.", 2),
            (b"..%2Fetc", 3),
            (b"100%", 8),
            (b"a", 1),
            (b"a~2", 10),
            (b"b", 0),
            (b"b~2", 4),
            (b"b~3", 5),
            (b"b~4", 7),
            (b"caf\xe9", 9),
            (b"x%00%25", 6),
        ];
        assert_eq!(names, expected);
        assert_eq!(listing.find(OsStr::new("b~3")).unwrap().inode, Inode(5));
        assert!(listing.find(OsStr::new("c")).is_none());
    }

    #[test]
    fn all_listings_that_live_share_a_limit() {
        let living = Living::default();
        let listing = || {
            let entry = Entry { name: b"name".to_vec(), inode: Inode(1) };
            Listing::new(vec![(entry, Err("message".to_owned()))], Inode(2), living.clone())
        };
        let (first, second) = (listing(), listing());
        assert_eq!(first.memory(), ENTRY + 11);
        assert_eq!(living.0.load(Ordering::Relaxed), 2 * first.memory());
        living.0.fetch_add(LIVING - 2 * first.memory() - 1, Ordering::Relaxed);
        living.check().unwrap();
        let third = listing();
        assert_eq!(living.check().unwrap_err().kind(), guest::ErrorKind::TooMuch);
        drop(third);
        living.check().unwrap();
        drop((first, second));
        assert_eq!(living.0.load(Ordering::Relaxed), LIVING - 1 - 2 * (ENTRY + 11));
    }
}
