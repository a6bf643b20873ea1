//! What logical volumes are made of that have metadata of their own: thin volumes, snapshots, volumes with a cache.
//!
//! | shown | is |
//! |---|---|
//! | thin volume | layer over metadata and data of its pool, and its external origin |
//! | snapshot, under the name of its store | layer over its store and the origin |
//! | origin of snapshots | itself |
//! | origin into which a snapshot is merged | layer over that snapshot's store and the origin: what it becomes |
//! | volume with a cache | layer over metadata and data of the cache, and the origin |
//!
//! Pools and caches are not shown.

use std::collections::{HashMap, HashSet};

use super::group::{Kind, Logical, Thin, Within};
use super::map::Resolver;
use super::mapper_name;
use crate::layer::Layer;
use crate::map::Map;
use crate::stack::{MAX_PARTS, Part};
use crate::{Error, ErrorKind, Result, Stack};

/// What a group says of snapshots.
#[derive(Default)]
struct Snapshots<'a> {
    /// The origin of each store, and the size of the snapshot in extents.
    by_store: HashMap<&'a str, (&'a str, u64)>,
    /// The store that is merged into an origin.
    merging: HashMap<&'a str, &'a str>,
    /// The thin volume that an origin becomes.
    becoming: HashMap<&'a str, &'a str>,
}

/// Returns the volumes of a group that its guest sees, and what is to be said of them.
pub(super) fn volumes(mut resolver: Resolver) -> (Vec<(String, Result<Stack>)>, Vec<Error>) {
    let group = resolver.group;
    let mut snapshots = Snapshots::default();
    // What is shown, each by the name that the guest has for it.
    let mut shown: Vec<&str> = vec![];
    for logical in &group.logical {
        let segment = logical.segments.as_ref().ok().and_then(|segments| segments.first());
        match segment.map(|segment| (&segment.kind, segment.count)) {
            Some((Kind::Snapshot { origin, store, is_merging: false }, count)) => {
                snapshots.by_store.insert(store, (origin, count));
                shown.push(store);
            }
            Some((Kind::Snapshot { origin, store, is_merging: true }, _)) => {
                snapshots.merging.insert(origin, store);
            }
            Some((Kind::Thin(Thin { becomes: Some(origin), .. }), _)) => {
                snapshots.becoming.insert(origin, &logical.name);
            }
            // They hold no files, but those of volumes that are shown.
            Some((Kind::ThinPool { .. } | Kind::CachePool { .. }, _)) => {}
            _ if logical.is_visible => shown.push(&logical.name),
            _ => {}
        }
    }
    // Older versions of LVM may have called a store visible, too.
    let mut seen = HashSet::new();
    shown.retain(|name| seen.insert(*name));
    let (mut volumes, mut problems) = (vec![], vec![]);
    for name in shown {
        let mut builder = Builder { resolver: &mut resolver, snapshots: &snapshots, parts: vec![] };
        let stack = builder.seen(name, 0).and_then(|last| {
            builder.parts.truncate(usize::from(last) + 1);
            Stack::new(builder.parts)
        });
        let name_shown = mapper_name(&group.name, name);
        if stack.is_ok() && (snapshots.merging.contains_key(name) || snapshots.becoming.contains_key(name)) {
            problems.push(Error::unsupported(format!(
                "LVM volume {name_shown}: a snapshot of it is being merged into it: it is shown as it will be then"
            )));
        }
        volumes.push((name_shown, stack));
    }
    (volumes, problems)
}

/// Puts together the parts of a volume.
struct Builder<'a, 'b> {
    resolver: &'a mut Resolver<'b>,
    snapshots: &'a Snapshots<'b>,
    parts: Vec<Part>,
}

impl<'b> Builder<'_, 'b> {
    fn add(&mut self, part: Part) -> Result<u16> {
        if self.parts.len() == MAX_PARTS {
            return Err(Error::new(ErrorKind::TooMuch, format!("it is made of more than {MAX_PARTS} others")));
        }
        if let Part::Map(map) = &part {
            self.resolver.count(map.segments())?;
        }
        self.parts.push(part);
        u16::try_from(self.parts.len() - 1).map_err(|_| Error::damaged("it has too many parts"))
    }

    fn logical(&self, name: &str) -> Result<&'b Logical> {
        let logical = self.resolver.group.logical(name);
        logical.ok_or_else(|| Error::damaged(format!("needs {name}, which does not exist")))
    }

    /// Adds a volume as the guest sees it; `depth` says of how many others it is a part.
    fn seen(&mut self, name: &str, depth: usize) -> Result<u16> {
        let snapshots = self.snapshots;
        if let Some((origin, count)) = snapshots.by_store.get(name) {
            let size = self.resolver.bytes(*count)?;
            return self.snapshot(name, origin, size, depth);
        }
        if let Some(store) = snapshots.merging.get(name) {
            let segments = self.logical(name)?.segments.as_ref().map_err(Clone::clone)?;
            let count = segments.iter().try_fold(0_u64, |sum, segment| sum.checked_add(segment.count));
            let size = self.resolver.bytes(count.unwrap_or(u64::MAX))?;
            return self.snapshot(store, name, size, depth);
        }
        self.own(snapshots.becoming.get(name).copied().unwrap_or(name), depth)
    }

    fn snapshot(&mut self, store: &str, origin: &str, size: u64, depth: usize) -> Result<u16> {
        let members = vec![self.own(store, depth + 1)?, self.own(origin, depth + 1)?];
        self.add(Part::Layer { layer: Layer::Snapshot, size, members })
    }

    /// Adds a volume as it is without snapshots.
    fn own(&mut self, name: &str, depth: usize) -> Result<u16> {
        if depth > MAX_PARTS {
            return Err(Error::damaged("it is part of itself"));
        }
        let logical = self.logical(name)?;
        let segments = logical.segments.as_ref().map_err(Clone::clone)?;
        match &segments[..] {
            [segment] => match &segment.kind {
                Kind::Thin(thin) => {
                    let size = self.resolver.bytes(segment.count)?;
                    self.thin(thin, size, depth)
                }
                Kind::Cache { origin, pool, within } => {
                    let size = self.resolver.bytes(segment.count)?;
                    self.cache(origin, pool, within.as_ref(), size, depth)
                }
                _ => self.map(logical),
            },
            _ => self.map(logical),
        }
    }

    fn map(&mut self, logical: &Logical) -> Result<u16> {
        let map = self.resolver.logical(logical, 0)?;
        self.add(Part::Map(map))
    }

    fn thin(&mut self, thin: &Thin, size: u64, depth: usize) -> Result<u16> {
        let Some(Kind::ThinPool { metadata, data }) = self.only(&thin.pool)? else {
            return Err(Error::damaged(format!("needs {}, which is no pool of thin volumes", thin.pool)));
        };
        let mut members = vec![self.own(metadata, depth + 1)?, self.own(data, depth + 1)?];
        if let Some(origin) = &thin.origin {
            members.push(self.own(origin, depth + 1)?);
        }
        self.add(Part::Layer { layer: Layer::Thin { device: thin.device }, size, members })
    }

    fn cache(&mut self, origin: &str, pool: &str, within: Option<&Within>, size: u64, depth: usize) -> Result<u16> {
        let (metadata, data) = match (within, self.only(pool)?) {
            (Some(Within { is_passed_through: true, .. }), _) => return self.own(origin, depth + 1),
            (None, Some(Kind::CachePool { is_passed_through: true, .. })) => return self.own(origin, depth + 1),
            (Some(within), _) => {
                let map = self.resolver.logical(self.logical(pool)?, 0)?;
                let mut part = |(start, len)| {
                    let pieces = map.slice(start, len);
                    let pieces = pieces.ok_or_else(|| Error::damaged(format!("needs more of {pool} than it has")))?;
                    self.add(Part::Map(Map::new(pieces)?))
                };
                (part(within.metadata)?, part(within.data)?)
            }
            (None, Some(Kind::CachePool { metadata, data, .. })) => {
                (self.own(metadata, depth + 1)?, self.own(data, depth + 1)?)
            }
            _ => return Err(Error::damaged(format!("needs {pool}, which is no cache"))),
        };
        let members = vec![metadata, data, self.own(origin, depth + 1)?];
        self.add(Part::Layer { layer: Layer::Cache, size, members })
    }

    /// Returns how a volume lies that has one segment.
    fn only(&self, name: &str) -> Result<Option<&'b Kind>> {
        match &self.logical(name)?.segments.as_ref().map_err(Clone::clone)?[..] {
            [segment] => Ok(Some(&segment.kind)),
            _ => Ok(None),
        }
    }
}
