//! `xofs cp`: files and folders of a guest, restored into a folder with all that belongs to them.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::fs::{FileType, makedev};
use rustix::io::Errno;

use super::find::{Files, Found};
use super::folder::{Folder, Handle, New, Unfinished};
use super::path::{GuestPath, split_names};
use super::walk::{Step, Walk};
use super::{Failures, content, stored_bytes, xattrs};
use crate::cli::Global;
use crate::cli::exit::{Exit, Failure};
use crate::cli::export::progress::Progress;
use crate::cli::text::count;
use crate::tree::{Attributes, GuestAttributes, Kind};

const EXAMPLES: &str = "\
SOURCE is VM/BACKUP/VOLUME:/path; without a path it is the whole volume. DEST is a folder that exists, or a new name in one.

Folders are copied with all that is in them. Holes, hard links, symbolic links (as they are), permissions, times and extended \
attributes are kept; as root also owners, by their numbers in the guest, and devices. A file appears under its name once it is \
whole. What exists is left alone, but for folders, to which what is missing is added.

Examples:
  xofs cp /srv/backups web01/latest/xvda1:/etc/fstab .
  xofs cp main web01/2026-11-20/vg0-home:anna web01/2026-11-20/vg0-home:bert /srv/restored
  xofs cp --no-preserve main web01/latest/xvda2:/EFI efi

Ends with 3 if some of it could not be copied, which is listed.";

/// Copies files and folders of a guest
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs cp [OPTIONS] [REPO] <SOURCE>... <DEST>")]
pub struct CpArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), what to copy, and where to
    #[arg(num_args = 2.., required = true, value_names = ["REPO", "SOURCE", "DEST"])]
    names: Vec<OsString>,
    /// Replaces files that exist, never folders
    #[arg(short, long)]
    force: bool,
    /// Makes files as new ones of who runs it: without owners, times and extended attributes
    #[arg(long)]
    no_preserve: bool,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long)]
    progress: bool,
}

/// Runs the command.
///
/// # Errors
/// If nothing could be copied.
pub fn run(global: &Global, arguments: &CpArgs) -> Result<Exit> {
    let unfinished = Unfinished::default();
    unfinished.watch_signals().context("take over the signals")?;
    let (address, names) = split_names(global, &arguments.names);
    let Some((destination, sources)) = names.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(Failure::usage("give what to copy, VM/BACKUP/VOLUME:/path, and where to").into());
    };
    let sources = sources.iter().map(|source| GuestPath::parse(source)).collect::<Result<Vec<_>>>()?;
    let (top, name) = open_destination(Path::new(destination), sources.len())?;
    let files = Files::open(global, address)?;
    let mut found = Vec::new();
    let mut failures = Failures::default();
    for source in &sources {
        match files.find(source, false) {
            Ok(source) => found.push(source),
            Err(error) => failures.add(error),
        }
    }
    let mut progress = Progress::new("copy", 0, arguments.progress);
    if progress.is_shown() {
        found.iter().for_each(|source| progress.expect(stored_bytes(&files, source)));
    }
    let mut copy = Copy {
        files: &files,
        force: arguments.force,
        keeps: !arguments.no_preserve,
        is_root: rustix::process::geteuid().is_root(),
        unfinished,
        progress,
        failures,
        linked: HashMap::new(),
        without_xattrs: 0,
    };
    for source in &found {
        copy.copy(source, &top, name.as_deref().unwrap_or(source.name()));
    }
    copy.end()
}

/// Returns the folder to copy into, and the new name in it, unless sources keep theirs.
fn open_destination(path: &Path, sources: usize) -> Result<(Folder, Option<OsString>)> {
    let shown = path.display();
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => {
            return Ok((Folder::open(path).with_context(|| format!("open '{shown}'"))?, None));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("look at '{shown}'"));
        }
        Ok(_) if sources > 1 => {
            return Err(Failure::usage(format!("'{shown}' is no folder to copy several files into")).into());
        }
        Err(_) if sources > 1 || path.as_os_str().as_bytes().ends_with(b"/") => {
            return Err(Failure::usage(format!("the folder '{shown}' does not exist: make it first")).into());
        }
        _ => {}
    }
    let Some(name) = path.file_name() else { bail!("'{shown}' is no name of a file") };
    let parent =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(PathBuf::from("."), Path::to_owned);
    let folder = Folder::open(&parent).with_context(|| format!("open the folder '{}'", parent.display()))?;
    Ok((folder, Some(name.to_owned())))
}

struct Copy<'a> {
    files: &'a Files,
    force: bool,
    /// Whether what belongs to a file is kept.
    keeps: bool,
    is_root: bool,
    unfinished: Unfinished,
    progress: Progress,
    failures: Failures,
    /// Files with several names, by their number in the guest: the first that was made, from the top, and how the system knows it.
    linked: HashMap<u64, (Vec<OsString>, (u64, u64))>,
    without_xattrs: usize,
}

/// A folder that was made; `None` if it could not be.
struct Made {
    name: OsString,
    folder: Option<(Folder, Attributes)>,
    /// From where the walk began.
    path: Vec<u8>,
}

impl Copy<'_> {
    /// Copies a file or folder as `name` into the top.
    fn copy(&mut self, found: &Found, top: &Folder, name: &OsStr) {
        let mut folders = Vec::<Made>::new();
        let mut walk = Walk::new(&self.files.tree, found.attributes, true);
        while let Some(step) = walk.next() {
            let item = match step {
                Step::Failed(path, error) => {
                    self.failures.add(error.context(found.place(&path)));
                    continue;
                }
                Step::Leave => {
                    if let Some(Made { folder: Some((folder, attributes)), path, .. }) = folders.pop() {
                        let completed = self.complete(folder.handle(), &attributes);
                        self.failures.count(completed.with_context(|| found.place(&path)));
                    }
                    continue;
                }
                Step::Enter(item) | Step::Other(item) => item,
            };
            let own_name = item.path.rsplit(|byte| *byte == b'/').next().filter(|name| !name.is_empty());
            let name = own_name.map_or(name, OsStr::from_bytes);
            let parent = match folders.last() {
                Some(Made { folder: Some((folder, _)), .. }) => folder,
                Some(_) => continue,
                None => top,
            };
            if item.attributes.kind == Kind::Directory {
                let made = parent.make(name, self.mode_of_folder(&item.attributes));
                let made = made.with_context(|| found.place(&item.path));
                let folder = made.map_err(|error| self.failures.add(error)).ok().map(|made| (made, item.attributes));
                if folder.is_none() {
                    walk.turn_back();
                }
                folders.push(Made { name: name.to_owned(), folder, path: item.path });
                continue;
            }
            let above = folders.iter().map(|made| made.name.clone()).collect();
            let put = self.put(top, parent, above, name, &item.attributes).with_context(|| found.place(&item.path));
            self.failures.count(put);
        }
    }

    fn end(self) -> Result<Exit> {
        drop(self.progress);
        let mut failures = self.failures;
        if self.without_xattrs > 0 {
            let files = count(self.without_xattrs, "file");
            failures.add(anyhow::anyhow!(
                "extended attributes of {files} could not be set here: copy to another filesystem, or give --no-preserve"
            ));
        }
        failures.end()
    }

    /// The permissions of a folder while files are made in it.
    fn mode_of_folder(&self, attributes: &Attributes) -> u16 {
        match &attributes.guest {
            Some(guest) if !self.keeps => guest.mode & 0o777 | 0o700,
            _ => 0o700,
        }
    }

    /// Makes anything but a folder in `parent`, which stands `above` from the top.
    fn put(
        &mut self,
        top: &Folder,
        parent: &Folder,
        above: Vec<OsString>,
        name: &OsStr,
        from: &Attributes,
    ) -> Result<()> {
        let has_names = from.guest.as_ref().is_some_and(|guest| guest.links > 1);
        if has_names && self.link(top, parent, name, from.inode)? {
            return Ok(());
        }
        let target;
        let mode = if self.keeps { 0o600 } else { from.guest.as_ref().map_or(0o600, |guest| guest.mode & 0o777) };
        let device = from.guest.as_ref().map_or((0, 0), |guest| guest.device);
        let device = makedev(device.0, device.1);
        let new = match from.kind {
            Kind::File => New::File(mode),
            Kind::Symlink => {
                target = self.files.tree.target(from.inode)?;
                New::Symlink(&target)
            }
            Kind::Fifo => New::Node(FileType::Fifo, device, mode),
            Kind::Socket => New::Node(FileType::Socket, device, mode),
            Kind::CharacterDevice | Kind::BlockDevice if !self.is_root => {
                bail!("it is a device, which only root can make")
            }
            Kind::CharacterDevice => New::Node(FileType::CharacterDevice, device, mode),
            Kind::BlockDevice => New::Node(FileType::BlockDevice, device, mode),
            Kind::Directory => bail!("it is a folder"),
        };
        let (force, unfinished) = (self.force, self.unfinished.clone());
        let identity = parent.put(name, &new, force, &unfinished, |handle| {
            if from.kind == Kind::File {
                self.fill(handle, from)?;
            }
            self.complete(handle, from)
        })?;
        if has_names {
            let path = above.into_iter().chain([name.to_owned()]).collect();
            self.linked.insert(from.inode, (path, identity));
        }
        Ok(())
    }

    /// Gives another name to a file that was made already; says whether it did.
    fn link(&self, top: &Folder, parent: &Folder, name: &OsStr, inode: u64) -> Result<bool> {
        let Some((path, identity)) = self.linked.get(&inode) else { return Ok(false) };
        let Some((first, above)) = path.split_last() else { return Ok(false) };
        // Somebody else may have changed what stands there.
        let Ok(folder) = top.descend(above) else { return Ok(false) };
        if folder.identity(first) != Some(*identity) {
            return Ok(false);
        }
        let put = parent.put(name, &New::Link(&folder, first, *identity), self.force, &self.unfinished, |_| Ok(()));
        match put {
            Ok(_) => Ok(true),
            // Not every filesystem has links, or so many: then it is copied again.
            Err(error) => match error.downcast_ref::<Errno>() {
                Some(&(Errno::PERM | Errno::MLINK | Errno::NOTSUP | Errno::XDEV | Errno::NOSYS)) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Writes the bytes of a file.
    fn fill(&mut self, handle: Handle<'_>, from: &Attributes) -> Result<()> {
        let file = content::open(&self.files.tree, from)?;
        handle.set_size(file.size()).context("make it as long")?;
        content::read(&file, |offset, bytes| {
            handle.write(offset, bytes).context("write it")?;
            self.progress.advance_waiting(bytes.len() as u64, "repository");
            Ok(())
        })
    }

    /// Gives what was made all that belongs to it but its bytes, in the order in which nothing undoes what was set before.
    fn complete(&mut self, handle: Handle<'_>, from: &Attributes) -> Result<()> {
        let Some(guest) = from.guest.as_ref().filter(|_| self.keeps) else { return Ok(()) };
        if self.is_root {
            handle.set_owner(guest.uid, guest.gid).context("set its owner")?;
        }
        if from.kind != Kind::Symlink {
            handle.remove_acls().context("take away the access control lists of the folder it is in")?;
        }
        let mut are_all_set = true;
        for (name, value) in xattrs(&self.files.tree, from.inode)? {
            if self.is_root || is_settable(&name) {
                are_all_set &= handle.set_xattr(&name, &value).is_ok();
            }
        }
        self.without_xattrs += usize::from(!are_all_set);
        if from.kind != Kind::Symlink {
            handle.set_mode(self.mode(guest)).context("set its permissions")?;
        }
        handle.set_times(guest.accessed, from.modified).context("set its times")
    }

    /// The permissions of what was made; those that give the rights of its owner only to what has the same.
    fn mode(&self, guest: &GuestAttributes) -> u16 {
        if self.is_root { guest.mode } else { guest.mode & 0o1777 }
    }
}

/// Returns whether others than root may set an extended attribute of their files. Source: xattr(7).
fn is_settable(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"user.") || name.as_bytes().starts_with(b"system.posix_acl_")
}
