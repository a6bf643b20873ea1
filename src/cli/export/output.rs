//! Where an export goes: a new file that appears whole or not at all, a device, or a stream.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, RenameFlags};

use crate::cli::unfinished::{Remove, Unfinished};
use crate::cli::zeroes::zeroes;

/// A run of zeroes at least so long (and so aligned) is left a hole in a file: the block of most filesystems, times 16.
const HOLE: usize = 64 << 10;

/// The temporary file that must not stay behind.
pub type Leftover = Unfinished<PathBuf>;

impl Remove for PathBuf {
    fn remove(&self) {
        let _ = std::fs::remove_file(self);
    }
}

/// Something an export is written to, from its beginning to its end.
pub enum Output {
    /// A file that has no name yet, or a temporary one.
    File(NewFile),
    /// A block device: what was there before must go, so holes are written.
    Device(File),
    /// Takes bytes one after the other.
    Stream(Box<dyn Write>),
}

/// A file without a name, or beside its final place, until [`Output::finish`].
///
/// Without a name nothing is left of it however the process ends; not every filesystem can give it one later.
pub struct NewFile {
    file: File,
    place: PathBuf,
    replaces: bool,
    leftover: Leftover,
}

impl Output {
    /// Opens `-` or a path for an image of `size` bytes. Without `force`, what exists is left alone, but for pipes and
    /// character devices, which hold nothing.
    ///
    /// # Errors
    /// If it exists, cannot be made, or is too small a device.
    pub fn open(path: &Path, size: u64, force: bool, leftover: &Leftover) -> Result<Self> {
        if path.as_os_str() == "-" {
            // Not through the standard library, which would search every byte for line ends.
            let stdout = rustix::io::dup(io::stdout()).context("open standard output")?;
            return Ok(Self::Stream(Box::new(File::from(stdout))));
        }
        let shown = path.display();
        let existing = match std::fs::metadata(path) {
            Ok(found) => Some(found.file_type()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match path.read_link() {
                Ok(target) => {
                    let target = target.display();
                    bail!("'{shown}' is a link to '{target}', which does not exist: give that name, or remove the link")
                }
                Err(_) => None,
            },
            Err(error) => return Err(error).with_context(|| format!("look at '{shown}'")),
        };
        match existing {
            Some(kind) if kind.is_fifo() || kind.is_char_device() => {
                let file = File::options().write(true).open(path).with_context(|| format!("open '{shown}'"))?;
                Ok(Self::Stream(Box::new(file)))
            }
            Some(kind) if kind.is_dir() => bail!("'{shown}' is a folder: give the name of a file in it"),
            Some(_) if !force => bail!("'{shown}' exists already: give another name, or --force to replace it"),
            Some(kind) if kind.is_block_device() => {
                let file = File::options().write(true).open(path).with_context(|| format!("open '{shown}'"))?;
                let room =
                    rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).context("ask the device for its size")?;
                if room < size {
                    bail!("the device '{shown}' has {room} bytes, the image needs {size}");
                }
                Ok(Self::Device(file))
            }
            Some(kind) if !kind.is_file() => bail!("'{shown}' is neither a file, a pipe nor a device"),
            found => NewFile::create(path, size, found.is_some(), leftover.clone(), unnamed_file).map(Self::File),
        }
    }

    /// Whether only data needs to be given, because what is not written reads as zeroes.
    pub fn has_holes(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// Writes `bytes` at `offset`, which for a stream must be where the last write ended.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File(new) => write_sparsely(&new.file, offset, bytes),
            Self::Device(file) => file.write_all_at(bytes, offset),
            Self::Stream(stream) => stream.write_all(bytes),
        }
    }

    /// Makes a file so long (bytes), of which that was not known when it was opened.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_size(&self, size: u64) -> Result<()> {
        match self {
            Self::File(new) => {
                new.file.set_len(size).with_context(|| format!("make '{}' {size} bytes long", new.place.display()))
            }
            Self::Device(_) | Self::Stream(_) => Ok(()),
        }
    }

    /// Writes `len` zeroes at `offset`.
    ///
    /// # Errors
    /// What the system says.
    pub fn zero(&mut self, mut offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::File(_) => return Ok(()),
            Self::Device(file) => {
                if rustix::fs::fallocate(&*file, FallocateFlags::ZERO_RANGE, offset, len).is_ok() {
                    return Ok(());
                }
            }
            Self::Stream(_) => {}
        }
        for piece in zeroes(len) {
            self.write(offset, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes what was written durable and, for a file, gives it its name.
    ///
    /// # Errors
    /// What the system says; a file that appeared meanwhile is not replaced.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::File(new) => new.publish(),
            Self::Device(file) => file.sync_all().context("write to the device"),
            Self::Stream(mut stream) => stream.flush().context("write the last bytes"),
        }
    }
}

fn write_sparsely(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut start = 0;
    let mut at = 0;
    while at < bytes.len() {
        // Pieces end at multiples of HOLE in the file.
        let position = offset + u64::try_from(at).expect("a usize has at most 64 bits");
        let into = usize::try_from(position % HOLE as u64).expect("below 64 KiB");
        let end = (at + HOLE - into).min(bytes.len());
        if is_zero(&bytes[at..end]) {
            write_at(file, offset, bytes, start..at)?;
            start = end;
        }
        at = end;
    }
    write_at(file, offset, bytes, start..at)
}

fn write_at(file: &File, offset: u64, bytes: &[u8], range: std::ops::Range<usize>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    file.write_all_at(&bytes[range.clone()], offset + u64::try_from(range.start).expect("a usize has at most 64 bits"))
}

fn is_zero(bytes: &[u8]) -> bool {
    // Most data is told from zeroes by its first bytes.
    let (head, tail) = bytes.split_at(bytes.len().min(16));
    head.iter().all(|byte| *byte == 0) && tail.chunks(4096).all(|page| page.iter().fold(0, |or, byte| or | byte) == 0)
}

impl NewFile {
    /// `unnamed` makes a file without a name in a folder, if that can be.
    fn create(
        place: &Path,
        size: u64,
        replaces: bool,
        leftover: Leftover,
        unnamed: impl FnOnce(&Path) -> Option<File>,
    ) -> Result<Self> {
        // The file that a link names is replaced, not the link.
        let place = if replaces { place.canonicalize().unwrap_or_else(|_| place.to_path_buf()) } else { place.into() };
        let name = place.file_name().with_context(|| format!("'{}' is no name of a file", place.display()))?;
        let file = match unnamed(folder_of(&place)) {
            Some(file) => file,
            None => {
                let temporary = temporary_name(&place, name);
                let mut leftover = leftover.lock();
                let file = File::options()
                    .write(true)
                    .create_new(true)
                    .open(&temporary)
                    .with_context(|| format!("create '{}'", temporary.display()))?;
                *leftover = Some(temporary);
                file
            }
        };
        let new = Self { file, place, replaces, leftover };
        new.file.set_len(size).with_context(|| format!("make '{}' {size} bytes long", new.place.display()))?;
        Ok(new)
    }

    fn publish(self) -> Result<()> {
        let place = self.place.display();
        self.file.sync_all().with_context(|| format!("write '{place}'"))?;
        let mut leftover = self.leftover.lock();
        if leftover.is_none() {
            if !self.replaces {
                return name_file(&self.file, &self.place).with_context(|| format!("give '{place}' its name"));
            }
            // Only a name can replace another.
            let temporary = temporary_name(&self.place, self.place.file_name().unwrap_or_default());
            name_file(&self.file, &temporary).with_context(|| format!("create '{}'", temporary.display()))?;
            *leftover = Some(temporary);
        }
        let Some(temporary) = leftover.as_deref() else { bail!("'{place}' has no file to be made of") };
        if self.replaces {
            std::fs::rename(temporary, &self.place).with_context(|| format!("replace '{place}'"))?;
        } else {
            rename_new(temporary, &self.place).with_context(|| format!("give '{place}' its name"))?;
        }
        *leftover = None;
        Ok(())
    }
}

fn temporary_name(place: &Path, name: &OsStr) -> PathBuf {
    place.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()))
}

/// Returns the folder that a file is in; the name of a file alone is one in the current folder.
fn folder_of(place: &Path) -> &Path {
    place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a file without a name; `None` where the filesystem has none (NFS, SMB), or it could not get one later.
fn unnamed_file(folder: &Path) -> Option<File> {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(folder, flags, Mode::from_raw_mode(0o666)).ok()?);
    open_file_path(&file).exists().then_some(file)
}

/// Gives a file its name; it is an error if something has it.
fn name_file(file: &File, place: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, linkat};
    Ok(linkat(CWD, open_file_path(file), CWD, place, AtFlags::SYMLINK_FOLLOW)?)
}

/// Where the system shows an open file. Source: open(2), "O_TMPFILE".
fn open_file_path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Renames without replacing; where the filesystem cannot promise that (NFS), it is looked for before.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            if to.symlink_metadata().is_ok() {
                return Err(rustix::io::Errno::EXIST.into());
            }
            std::fs::rename(from, to)
        }
        renamed => Ok(renamed?),
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let mut leftover = self.leftover.lock();
        if let Some(path) = leftover.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeroes_become_holes_and_every_byte_is_right() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.raw");
        for offset in [0_usize, 1, HOLE - 1, HOLE] {
            let file = File::create(&path).expect("a new file");
            file.set_len(2 << 20).expect("room");
            let mut bytes = vec![0; 10 * HOLE + 7];
            bytes[3 * HOLE + 5] = 1;
            bytes[10 * HOLE + 6] = 2;
            write_sparsely(&file, u64::try_from(offset).expect("small"), &bytes).expect("writes");
            let mut expected = vec![0; 2 << 20];
            expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
            assert!(std::fs::read(&path).expect("reads") == expected, "{offset}");
            use std::os::unix::fs::MetadataExt;
            assert!(file.metadata().expect("stat").blocks() * 512 <= 4 * HOLE as u64, "{offset}");
        }
    }

    #[test]
    fn a_file_that_was_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.raw");
        let mut output = Output::open(&path, 100, false, &Leftover::default()).expect("a new file");
        output.write(0, b"abc").expect("writes");
        drop(output);
        assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 0);
    }

    #[test]
    fn an_existing_file_is_replaced_only_if_asked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, "before").expect("writes");
        let error = Output::open(&path, 3, false, &Leftover::default()).err().expect("exists").to_string();
        assert!(error.contains("exists already"), "{error}");
        let mut output = Output::open(&path, 3, true, &Leftover::default()).expect("forced");
        output.write(0, b"new").expect("writes");
        assert_eq!(std::fs::read(&path).expect("reads"), b"before", "until it is finished");
        output.finish().expect("published");
        assert_eq!(std::fs::read(&path).expect("reads"), b"new");
    }

    #[test]
    fn a_link_to_nothing_is_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).expect("links");
        for force in [false, true] {
            let error = Output::open(&link, 3, force, &Leftover::default()).err().expect("refused").to_string();
            assert!(error.contains("is a link to 'nowhere', which does not exist"), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 1);
    }

    #[test]
    fn a_file_has_no_name_before_it_is_finished_where_that_can_be_and_then_the_usual_modes() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, usual) = (folder.path().join("disk.raw"), folder.path().join("usual"));
        if unnamed_file(folder.path()).is_none() {
            eprintln!("not tested: the filesystem of {} has no files without a name", folder.path().display());
            return;
        }
        for force in [false, true] {
            let before = std::fs::read_dir(folder.path()).expect("lists").count();
            let mut output = Output::open(&path, 3, force, &Leftover::default()).expect("a new file");
            assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), before);
            output.write(0, b"new").expect("writes");
            output.finish().expect("published");
            assert_eq!(std::fs::read(&path).expect("reads"), b"new");
        }
        File::create(&usual).expect("a new file");
        use std::os::unix::fs::MetadataExt;
        let mode = |path: &Path| std::fs::metadata(path).expect("stat").mode();
        assert_eq!(mode(&path), mode(&usual));
        assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 2, "nothing else is left");
    }

    #[test]
    fn without_such_files_a_name_is_taken_that_goes_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.raw");
        let names = || std::fs::read_dir(folder.path()).expect("lists").count();
        let create = |replaces| NewFile::create(&path, 3, replaces, Leftover::default(), |_| None).expect("a new file");
        let new = create(false);
        assert_eq!(names(), 1);
        drop(new);
        assert_eq!(names(), 0);
        create(false).publish().expect("published");
        assert!(create(false).publish().is_err(), "it is there");
        create(true).publish().expect("replaced");
        assert_eq!((names(), std::fs::read(&path).expect("reads")), (1, vec![0; 3]));
    }

    #[test]
    fn a_file_that_appeared_meanwhile_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.raw");
        let output = Output::open(&path, 3, false, &Leftover::default()).expect("a new file");
        std::fs::write(&path, "other").expect("writes");
        assert!(output.finish().is_err());
        assert_eq!(std::fs::read(&path).expect("reads"), b"other");
        assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 1);
    }
}
