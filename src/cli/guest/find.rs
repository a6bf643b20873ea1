//! From what was named to a place in the tree, with the guest's symbolic links followed inside its volume.
//!
//! A link means what it means in the guest: a target that begins with `/` starts at the root of the volume, and `..` never
//! leads above it. What other volumes were mounted where in the guest nobody knows here.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use disk::Disk;

use super::path::{GuestPath, Inside};
use crate::cli::exit::Failure;
use crate::cli::text::{Shown, ShownBytes};
use crate::cli::{Global, open};
use crate::repository::{Backup, Layout, ProblemKind, Repository, Selection};
use crate::tree::{Attributes, Content, Error, Kind, Tree};
use crate::worker::Workers;

/// Memory for decoded blocks (bytes): those that hold names are needed again and again.
const CACHE: u64 = 256 << 20;

/// Workers that read volumes at a time; one more for those of an earlier argument.
const WORKERS: u16 = 2;

/// Symbolic links that are followed on the way to a file. Source: path_resolution(7).
const LINKS: usize = 40;

/// How the names of volumes end in the tree.
const RAW: &str = ".raw";

/// The files of the guests in a repository.
pub struct Files {
    pub tree: Tree,
    repository: Arc<Repository>,
}

/// A volume of a backup.
pub struct Volume {
    pub name: String,
    /// In bytes, if it can be had.
    pub size: Option<u64>,
    pub content: String,
    pub label: Option<String>,
    /// Whether its files are shown.
    pub is_read: bool,
    pub problem: Option<String>,
}

/// The bytes of a volume, or of a whole disk.
pub struct Raw {
    pub disk: Arc<dyn Disk>,
    /// What is on a volume; `None` for a disk, on which there may be partitions.
    pub content: Option<String>,
    /// Why the files of a volume are not shown, or not all.
    pub problem: Option<String>,
}

/// A file of a guest that was found.
pub struct Found {
    /// `VM/BACKUP/VOLUME`, as it was named.
    pub volume: String,
    pub attributes: Attributes,
    /// The names that lead to it from the root of the volume, none of them a link.
    pub names: Vec<OsString>,
}

impl Found {
    /// Returns its own name; that of the volume, if it is its root.
    pub fn name(&self) -> &OsStr {
        let volume = || OsStr::new(self.volume.rsplit('/').next().unwrap_or_default());
        self.names.last().map_or_else(volume, OsString::as_os_str)
    }

    /// Returns what something below it is called, `path` from here, in messages.
    pub fn place(&self, path: &[u8]) -> String {
        let below: Vec<&[u8]> = self.names.iter().map(|name| name.as_bytes()).chain([path]).collect();
        let below = below.into_iter().filter(|name| !name.is_empty()).collect::<Vec<_>>().join(&b'/');
        format!("{}:/{}", Shown(&self.volume), ShownBytes(&below))
    }
}

impl Files {
    /// Opens the repository that is named, or the default one.
    ///
    /// # Errors
    /// As for [`open::repository`]; a folder of VHDs has no backups.
    pub fn open(global: &Global, address: Option<&OsStr>) -> Result<Self> {
        let place = open::place(global, address)?;
        let repository = open::repository(global, &place, CACHE)?;
        if repository.layout() == Layout::Disks {
            let message = "it is no repository with backups: of other disks only xofs mount and xofs export read";
            bail!("{}: {message}", Shown(&place.name));
        }
        Ok(Self { tree: Tree::new(repository.clone(), Workers::new(WORKERS, None), false), repository })
    }

    /// Returns the backup that `VM/BACKUP` names.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn backup(&self, what: &str) -> Result<Arc<Backup>> {
        match self.repository.select(what)? {
            Selection::Backup(_, backup) => Ok(backup),
            _ => Err(Failure::usage(format!("'{}' is no backup: expected VM/BACKUP", Shown(what))).into()),
        }
    }

    /// Returns the volumes on the disks of a backup, and what kept others from being found.
    ///
    /// # Errors
    /// If a disk cannot be read.
    pub fn volumes(&self, backup: &Backup) -> Result<(Vec<Volume>, Vec<String>)> {
        let tree = &self.tree;
        let folder = tree.backup_folder(&backup.id());
        let volumes = tree.lookup(folder, "volumes".as_ref())?.inode;
        let files = tree.lookup(folder, "files".as_ref())?.inode;
        let roots: Vec<_> = tree.entries(&tree.list(files)?).collect();
        let mut found = Vec::new();
        for entry in tree.entries(&tree.list(volumes)?) {
            let name = entry.name.to_string_lossy();
            let name = name.strip_suffix(RAW).unwrap_or(&name).to_owned();
            let xattr = |inode, name: &str| match tree.xattr(inode, name.as_ref()) {
                Ok(value) => value.map(|value| String::from_utf8_lossy(&value).into_owned()),
                Err(error) => Some(error.to_string()).filter(|_| name == "user.xofs.problem"),
            };
            let root = roots.iter().find(|root| root.name.as_os_str() == name.as_str());
            let of_root = |name| root.and_then(|root| xattr(root.inode, name));
            found.push(Volume {
                size: tree.attributes(entry.inode).ok().map(|attributes| attributes.size),
                content: xattr(entry.inode, "user.xofs.content").unwrap_or_default(),
                label: of_root("user.xofs.label"),
                is_read: root.is_some_and(|root| tree.list(root.inode).is_ok()),
                problem: xattr(entry.inode, "user.xofs.problem").or_else(|| of_root("user.xofs.problem")),
                name,
            });
        }
        let of_disks = self.repository.problems().into_iter();
        let of_disks =
            of_disks.filter(|problem| problem.kind == ProblemKind::Guest && problem.backup == Some(backup.id()));
        // Those of a volume stand beside it.
        let of_disks = of_disks.map(|problem| problem.message).filter(|message| !message.starts_with("volume "));
        Ok((found, of_disks.collect()))
    }

    /// Finds a file. A link at the end of the path is followed only if it is `to_follow`, or a `/` comes after it.
    ///
    /// # Errors
    /// If there is none, saying which part of the path is at fault; if the volume is not there or not read, why.
    pub fn find(&self, path: &GuestPath, to_follow: bool) -> Result<Found> {
        let Some(Inside { volume, path: inside }) = &path.inside else {
            let name = Shown(&path.backup);
            return Err(Failure::usage(format!(
                "'{name}' is a backup: name a volume of it, as in '{name}/xvda1:/etc'"
            ))
            .into());
        };
        let backup = self.backup(&path.backup)?;
        let name = format!("{}/{volume}", path.backup);
        let root = self.root(&backup, volume).with_context(|| format!("'{}'", Shown(&name)))?;
        let mut way = Way { tree: &self.tree, root, names: Vec::new() };
        way.go(inside, to_follow).with_context(|| format!("{}:{}", Shown(&name), ShownBytes(inside)))?;
        let attributes = *way.here();
        Ok(Found { volume: name, attributes, names: way.names.into_iter().map(|(name, _)| name).collect() })
    }

    /// Returns the bytes of a volume, or else of a disk; if `is_disk_first`, of a disk, of which then nothing is read for it.
    ///
    /// # Errors
    /// If there is none of that name, or its bytes cannot be had.
    pub fn raw(&self, backup: &Backup, name: &str, is_disk_first: bool) -> Result<Raw> {
        let tree = &self.tree;
        let find = |folder: &str| {
            let folder = tree.lookup(tree.backup_folder(&backup.id()), folder.as_ref())?;
            match tree.lookup(folder.inode, format!("{name}{RAW}").as_ref()) {
                Ok(found) => Ok(Some(found.inode)),
                Err(Error::NotFound) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let open = |inode| match tree.open(inode)? {
            Content::Disk(disk) => Ok(disk),
            _ => bail!("it is no disk"),
        };
        let disk = find("disks")?;
        let volume = if is_disk_first && disk.is_some() { None } else { find("volumes")? };
        if let Some(inode) = volume {
            let xattr = |name: &str| {
                let value = tree.xattr(inode, name.as_ref()).ok().flatten();
                value.map(|value| String::from_utf8_lossy(&value).into_owned())
            };
            let (content, problem) = (xattr("user.xofs.content"), xattr("user.xofs.problem"));
            return Ok(Raw { disk: open(inode)?, content, problem });
        }
        if let Some(inode) = disk {
            return Ok(Raw { disk: open(inode)?, content: None, problem: None });
        }
        let (volumes, problems) = self.volumes(backup)?;
        Err(no_such_volume(&volumes, &problems))
    }

    /// Returns the root of a volume.
    fn root(&self, backup: &Backup, volume: &str) -> Result<Attributes> {
        let folder = self.tree.backup_folder(&backup.id());
        let files = self.tree.lookup(folder, "files".as_ref())?.inode;
        match self.tree.lookup(files, volume.as_ref()) {
            Ok(root) => {
                self.tree.list(root.inode)?;
                // Now that it was opened, its own.
                return Ok(self.tree.attributes(root.inode)?);
            }
            Err(Error::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
        let (volumes, problems) = self.volumes(backup)?;
        let Some(found) = volumes.iter().find(|found| found.name == volume) else {
            return Err(no_such_volume(&volumes, &problems));
        };
        let why = found.problem.clone().unwrap_or_else(|| format!("{}: no files that are read here", found.content));
        Err(anyhow!("its files cannot be shown: {}", Shown(&why)))
    }
}

fn no_such_volume(volumes: &[Volume], problems: &[String]) -> anyhow::Error {
    let names = volumes.iter().map(|found| format!("'{}' ({})", Shown(&found.name), found.content));
    let names = if volumes.is_empty() { "none".to_owned() } else { names.collect::<Vec<_>>().join(", ") };
    let why = problems.iter().map(|problem| format!("; {problem}")).collect::<String>();
    anyhow!("there is no such volume in this backup; there are {names}{}", Shown(&why))
}

/// The way from the root of a volume to a file.
struct Way<'a> {
    tree: &'a Tree,
    root: Attributes,
    names: Vec<(OsString, Attributes)>,
}

impl Way<'_> {
    fn here(&self) -> &Attributes {
        self.names.last().map_or(&self.root, |(_, attributes)| attributes)
    }

    fn shown(&self) -> String {
        let names: Vec<&[u8]> = self.names.iter().map(|(name, _)| name.as_bytes()).collect();
        format!("'/{}'", ShownBytes(&names.join(&b'/')))
    }

    fn go(&mut self, path: &[u8], to_follow: bool) -> Result<()> {
        let components = |path: &[u8]| path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect::<VecDeque<_>>();
        let mut pending = components(path);
        let mut links = 0;
        while let Some(name) = pending.pop_front() {
            if self.here().kind != Kind::Directory {
                bail!("{} is no folder", self.shown());
            }
            match &*name {
                b"" | b"." => continue,
                b".." => {
                    self.names.pop();
                    continue;
                }
                _ => {}
            }
            let attributes = match self.tree.lookup(self.here().inode, OsStr::from_bytes(&name)) {
                Ok(attributes) => attributes,
                Err(Error::NotFound) => {
                    let after = if links > 0 { ", to which a link leads" } else { "" };
                    bail!("there is no '{}' in {}{after}", ShownBytes(&name), self.shown());
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("look up '{}' in {}", ShownBytes(&name), self.shown()));
                }
            };
            if attributes.kind == Kind::Symlink && (to_follow || !pending.is_empty()) {
                links += 1;
                let shown = ShownBytes(&name);
                if links > LINKS {
                    bail!("more than {LINKS} symbolic links on the way, at '{shown}' in {} (ELOOP)", self.shown());
                }
                let target = self.tree.target(attributes.inode).with_context(|| format!("read the link '{shown}'"))?;
                if target.as_bytes().first() == Some(&b'/') {
                    self.names.clear();
                }
                for component in components(target.as_bytes()).into_iter().rev() {
                    pending.push_front(component);
                }
                continue;
            }
            self.names.push((OsString::from_vec(name), attributes));
        }
        Ok(())
    }
}
