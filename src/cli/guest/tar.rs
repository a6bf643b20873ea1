//! `xofs tar`: files and folders of a guest as an archive.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use disk::Disk;

use super::find::{Files, Found};
use super::path::{GuestPath, split_names};
use super::pax::{self, Archive, Member};
use super::walk::{Item, Step, Walk};
use super::{Failures, content, stored_bytes, xattrs};
use crate::cli::Global;
use crate::cli::exit::{Exit, Failure};
use crate::cli::export::output::{Leftover, Output};
use crate::cli::export::progress::Progress;
use crate::cli::text::{ShownBytes, count};
use crate::tree::{Attributes, Kind, Tree};

const EXAMPLES: &str = "\
SOURCE is VM/BACKUP/VOLUME:/path; without a path it is the whole volume. The names in the archive start at the root of the volume.

The archive is in the pax format: with holes, hard links, owners, exact times and extended attributes. GNU tar takes all of it \
with --xattrs --xattrs-include='*' --acls --numeric-owner.

Examples:
  xofs tar /srv/backups web01/latest/xvda1:/etc -o etc.tar
  xofs tar main web01/2026-11-20/vg0-home:/ | zstd > home.tar.zst
  xofs tar main web01/latest/vg0-www:/srv | ssh web01 tar -x -C / --numeric-owner

Ends with 3 if some of it could not be read, which is listed.";

/// Files with fewer bytes in holes are written with them.
const HOLES: u64 = 4096;

/// Most ranges of data of one file that are told apart (16 bytes each); one with more is written with its holes.
const RANGES: usize = 1 << 20;

/// Files up to this size (bytes) are in memory before anything is written of them.
const SMALL: u64 = 4 << 20;

/// Writes files and folders of a guest as an archive
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs tar [OPTIONS] [REPO] <SOURCE>...")]
pub struct TarArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and what to archive
    #[arg(num_args = 1.., required = true, value_names = ["REPO", "SOURCE"])]
    names: Vec<OsString>,
    /// A new file, a pipe, a device, or - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Replaces an existing file, or overwrites a device
    #[arg(long)]
    force: bool,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long)]
    progress: bool,
}

/// Runs the command.
///
/// # Errors
/// If nothing could be read, or the archive not be written; then no file is left.
pub fn run(global: &Global, arguments: &TarArgs) -> Result<Exit> {
    let (address, names) = split_names(global, &arguments.names);
    if names.is_empty() {
        return Err(Failure::usage("nothing is named: give VM/BACKUP/VOLUME:/path after the repository").into());
    }
    let sources = names.iter().map(|source| GuestPath::parse(source)).collect::<Result<Vec<_>>>()?;
    let volume =
        |source: &GuestPath| (source.backup.clone(), source.inside.as_ref().map(|inside| inside.volume.clone()));
    if sources.iter().any(|source| volume(source) != volume(&sources[0])) {
        return Err(Failure::usage("an archive is of one volume, since its names start at the root of that").into());
    }
    if arguments.output.as_os_str() == "-" && io::stdout().is_terminal() {
        return Err(Failure::usage("an archive is not for a terminal: give -o FILE, or pass it on to a command").into());
    }
    let leftover = Leftover::default();
    leftover.watch_signals().context("take over the signals")?;
    let files = Files::open(global, address)?;
    let mut failures = Failures::default();
    let mut found = Vec::new();
    for source in &sources {
        match files.find(source, false) {
            Ok(source) => found.push(source),
            Err(error) => failures.add(error),
        }
    }
    // Before there is an archive that would hold nothing.
    if found.is_empty() {
        return failures.end();
    }
    let mut progress = Progress::new("tar", 0, arguments.progress);
    if progress.is_shown() {
        found.iter().for_each(|source| progress.expect(stored_bytes(&files, source)));
    }
    failures.done();
    let output = Output::open(&arguments.output, 0, arguments.force, &leftover)?;
    let archive = Archive::new(io::BufWriter::with_capacity(1 << 20, Stream { output, written: 0 }));
    let mut tar = Tar { files: &files, archive, progress, failures, linked: HashMap::new(), sockets: 0 };
    let shown = arguments.output.display();
    found.iter().try_for_each(|source| tar.add(source)).with_context(|| format!("write '{shown}'"))?;
    let stream = tar.archive.finish().and_then(|buffer| buffer.into_inner().map_err(io::IntoInnerError::into_error));
    stream.with_context(|| format!("write '{shown}'"))?.finish()?;
    drop(tar.progress);
    if tar.sockets > 0 {
        say!("xofs: {} left out: an archive has none", count(tar.sockets, "socket"));
    }
    tar.failures.end()
}

/// An output that is written from its beginning to its end.
struct Stream {
    output: Output,
    written: u64,
}

impl Stream {
    fn finish(self) -> Result<()> {
        // The last bytes are zeroes, which are holes in a file.
        self.output.set_size(self.written)?;
        self.output.finish()
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write(self.written, bytes)?;
        self.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Tar<'a> {
    files: &'a Files,
    archive: Archive<io::BufWriter<Stream>>,
    progress: Progress,
    failures: Failures,
    /// Files with several names, by their number in the guest: the first that was written.
    linked: HashMap<u64, Vec<u8>>,
    sockets: usize,
}

impl Tar<'_> {
    /// Adds a file, or a folder with all that is in it.
    ///
    /// # Errors
    /// What the output says. What cannot be read is among the failures.
    fn add(&mut self, found: &Found) -> io::Result<()> {
        for step in Walk::new(&self.files.tree, found.attributes, true) {
            match step {
                Step::Leave => {}
                Step::Failed(path, error) => self.failures.add(error.context(found.place(&path))),
                Step::Enter(Item { path, attributes }) | Step::Other(Item { path, attributes }) => {
                    match self.prepare(found, &path, &attributes) {
                        Ok(Some(prepared)) => self.write(found, &path, &attributes, prepared)?,
                        Ok(None) => self.sockets += 1,
                        Err(error) => self.failures.add(error.context(found.place(&path))),
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads all of a file but its bytes; nothing is written of what fails here. `None` for a socket.
    fn prepare(&self, found: &Found, path: &[u8], attributes: &Attributes) -> Result<Option<Prepared>> {
        let tree = &self.files.tree;
        let mut name: Vec<u8> = found.names.iter().map(|name| name.as_bytes()).collect::<Vec<_>>().join(&b'/');
        if !name.is_empty() && !path.is_empty() {
            name.push(b'/');
        }
        name.extend_from_slice(path);
        if attributes.kind == Kind::Directory {
            name = if name.is_empty() { b"./".to_vec() } else { [&*name, b"/"].concat() };
        }
        let kind = match attributes.kind {
            Kind::File => pax::Kind::File,
            Kind::Symlink => pax::Kind::Symlink,
            Kind::CharacterDevice => pax::Kind::CharacterDevice,
            Kind::BlockDevice => pax::Kind::BlockDevice,
            Kind::Directory => pax::Kind::Directory,
            Kind::Fifo => pax::Kind::Fifo,
            Kind::Socket => return Ok(None),
        };
        if let Some(first) = self.linked.get(&attributes.inode) {
            let target = first.clone();
            return Ok(Some(Prepared { kind: pax::Kind::HardLink, name, target, xattrs: Vec::new(), file: None }));
        }
        let target = match kind {
            pax::Kind::Symlink => tree.target(attributes.inode)?.as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let xattrs = xattrs(tree, attributes.inode)?;
        let file = (kind == pax::Kind::File).then(|| Source::open(tree, attributes)).transpose()?;
        Ok(Some(Prepared { kind, name, target, xattrs, file }))
    }

    /// Writes a file. Of what cannot be read after all, zeroes take the place, and a member after it says so.
    fn write(&mut self, found: &Found, path: &[u8], from: &Attributes, prepared: Prepared) -> io::Result<()> {
        let Prepared { kind, name, target, xattrs, file } = prepared;
        let guest = from.guest.as_ref();
        let member = Member {
            kind,
            path: &name,
            target: &target,
            mode: guest.map_or(0o700, |guest| guest.mode),
            uid: guest.map_or(0, |guest| guest.uid),
            gid: guest.map_or(0, |guest| guest.gid),
            modified: from.modified,
            device: guest.map_or((0, 0), |guest| guest.device),
            xattrs: &xattrs,
            size: file.as_ref().map_or(0, |file| file.disk.size()),
            data: file.as_ref().and_then(|file| file.data.as_deref()),
        };
        self.archive.begin(&member)?;
        if let Some(file) = &file {
            // Only what is read may fail: an archive that cannot be written is none.
            let mut broken = Ok(());
            let mut end = 0;
            let read = file.read(|offset, bytes| {
                let hole = if file.data.is_some() { 0 } else { offset - end };
                broken = self.archive.fill(Some(hole)).and_then(|_| self.archive.write(bytes));
                self.progress.advance_waiting(bytes.len() as u64, "repository");
                end = offset + bytes.len() as u64;
                if broken.is_err() {
                    bail!("the archive cannot be written")
                }
                Ok(())
            });
            broken?;
            self.archive.fill(None)?;
            if let Err(error) = read {
                self.note_damage(&member, &error)?;
                self.failures
                    .add(error.context(found.place(path)).context("in the archive in part, the rest of it as zeroes"));
                return Ok(());
            }
        }
        if guest.is_some_and(|guest| guest.links > 1) && from.kind != Kind::Directory {
            self.linked.entry(from.inode).or_insert(name);
        }
        Ok(())
    }

    /// Says of the last member, in the archive itself, that it is not whole.
    fn note_damage(&mut self, member: &Member<'_>, error: &anyhow::Error) -> io::Result<()> {
        let text = format!("{} is not whole: {error:#}\n", ShownBytes(member.path));
        let path = [member.path, b".xofs-damaged"].concat();
        let note = Member { path: &path, size: text.len() as u64, data: None, xattrs: &[], ..*member };
        self.archive.begin(&note)?;
        self.archive.write(text.as_bytes())
    }
}

/// What is written of a file.
struct Prepared {
    kind: pax::Kind,
    name: Vec<u8>,
    target: Vec<u8>,
    xattrs: Vec<(OsString, Vec<u8>)>,
    file: Option<Source>,
}

/// The content of a file.
struct Source {
    disk: Arc<dyn Disk>,
    /// What is no hole, if the holes are left out.
    data: Option<Vec<Range<u64>>>,
    /// Pieces of a file that is small, read already: if that fails nothing was written yet.
    pieces: Option<Vec<(u64, Vec<u8>)>>,
}

impl Source {
    fn open(tree: &Tree, attributes: &Attributes) -> Result<Self> {
        let disk = content::open(tree, attributes)?;
        let mut source = Self { data: None, pieces: None, disk };
        let ranges = disk::data_ranges(source.disk.as_ref()).take(RANGES + 1).collect::<disk::Result<Vec<_>>>()?;
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        if ranges.len() <= RANGES && source.disk.size() - bytes >= HOLES {
            source.data = Some(ranges);
        }
        if bytes <= SMALL {
            let mut pieces = Vec::new();
            content::read(&source.disk, |offset, bytes| {
                pieces.push((offset, bytes.to_vec()));
                Ok(())
            })?;
            source.pieces = Some(pieces);
        }
        Ok(source)
    }

    /// Gives what is no hole to `consume`, in order.
    fn read(&self, mut consume: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        match &self.pieces {
            Some(pieces) => pieces.iter().try_for_each(|(offset, bytes)| consume(*offset, bytes)),
            None => content::read(&self.disk, consume),
        }
    }
}
