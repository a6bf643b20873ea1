//! A guest that syncs much of what it does, in few names that are used again and again: what a log of Btrfs has to tell apart.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, XattrFlags};

use super::compare::Random;

/// Folders that names are in, and names in each.
const FOLDERS: u64 = 4;
const NAMES: u64 = 12;

/// Work in a folder.
pub struct Synced {
    root: PathBuf,
    random: Random,
}

impl Synced {
    /// Starts with a seed.
    pub fn new(root: &Path, seed: u64) -> Self {
        for folder in 0..FOLDERS {
            fs::create_dir(root.join(format!("folder-{folder}"))).expect("a new folder");
        }
        Self { root: root.to_owned(), random: Random::new(seed) }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    fn bytes(&mut self, bound: u64) -> Vec<u8> {
        let len = usize::try_from(self.below(bound)).expect("small");
        // Some of it can be compressed.
        if self.below(2) == 0 { vec![b'a'; len] } else { self.random.bytes(len) }
    }

    fn any(&mut self) -> PathBuf {
        let (folder, name) = (self.below(FOLDERS), self.below(NAMES));
        // A folder may be in one of these names, and have some itself.
        let path = self.root.join(format!("folder-{folder}")).join(format!("name-{name}"));
        if path.is_dir() && !path.is_symlink() && self.below(2) == 0 {
            let name = self.below(NAMES);
            return path.join(format!("name-{name}"));
        }
        path
    }

    fn sync(path: &Path) {
        if fs::symlink_metadata(path).is_ok_and(|stat| stat.is_file() || stat.is_dir()) {
            File::open(path).and_then(|file| file.sync_all()).expect("it is written");
        }
    }

    /// Syncs a file, the folder that it is in, or neither.
    fn maybe_sync(&mut self, path: &Path) {
        match self.below(5) {
            0..2 => Self::sync(path),
            2 => Self::sync(path.parent().expect("it is in a folder")),
            _ => {}
        }
    }

    fn open(&mut self) -> Option<(PathBuf, File)> {
        let path = self.any();
        let is_file = fs::symlink_metadata(&path).is_ok_and(|stat| stat.is_file());
        is_file.then(|| (path.clone(), File::options().read(true).write(true).open(&path).expect("it is ours")))
    }

    /// Does so many things. Many fail, since a name is in use or is not: then nothing is done.
    pub fn work(&mut self, steps: u64) {
        for _ in 0..steps {
            match self.below(100) {
                0..22 => self.create(),
                22..48 => self.change(),
                48..52 => self.share(),
                52..60 => self.link(),
                60..74 => self.rename(),
                74..84 => self.remove(),
                84..87 => self.folder(),
                87..93 => self.attribute(),
                93..95 => self.unnamed(),
                95..99 => {
                    let path = self.any();
                    self.maybe_sync(&path);
                }
                _ if self.below(6) == 0 => {
                    File::open(&self.root).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
                }
                _ => {}
            }
        }
    }

    fn create(&mut self) {
        let path = self.any();
        let is_done = match self.below(14) {
            0 => symlink("t".repeat(usize::try_from(1 + self.below(200)).expect("small")), &path).is_ok(),
            1 => rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::RWXU, 0).is_ok(),
            _ => {
                let len = [0, 100, 3000, 60_000][usize::try_from(self.below(4)).expect("an index")];
                let bytes = self.bytes(len + 1);
                File::create_new(&path).and_then(|file| file.write_all_at(&bytes, 0)).is_ok()
            }
        };
        if is_done {
            self.maybe_sync(&path);
        }
    }

    fn change(&mut self) {
        let Some((path, file)) = self.open() else { return };
        let size = file.metadata().expect("it is open").len();
        let at = self.below(size + 20_000);
        let len = 1 + self.below(30_000);
        match self.below(9) {
            0..3 => {
                let bytes = self.bytes(20_000);
                file.write_all_at(&bytes, at).expect("room");
            }
            3 => {
                let bytes = self.bytes(3000);
                file.write_all_at(&bytes, size).expect("room");
            }
            4 => file.set_len(at).expect("room"),
            5 => file.set_len(at & !4095).expect("room"),
            kind => {
                let flags = match kind {
                    6 => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    7 => FallocateFlags::KEEP_SIZE,
                    _ => FallocateFlags::ZERO_RANGE,
                };
                rustix::fs::fallocate(&file, flags, at, len).expect("room");
            }
        }
        self.maybe_sync(&path);
    }

    /// Has a file share blocks of another, or of itself.
    fn share(&mut self) {
        let (Some((_, from)), Some((path, to))) = (self.open(), self.open()) else { return };
        if self.below(2) == 0 {
            let _ = rustix::fs::ioctl_ficlone(&to, &from);
        } else {
            let (mut source, mut target) = (self.below(4) * 4096, self.below(8) * 4096);
            let _ = rustix::fs::copy_file_range(&from, Some(&mut source), &to, Some(&mut target), 16384);
        }
        self.maybe_sync(&path);
    }

    fn link(&mut self) {
        let (from, to) = (self.any(), self.any());
        if fs::hard_link(&from, &to).is_ok() {
            let path = if self.below(2) == 0 { from } else { to };
            self.maybe_sync(&path);
        }
    }

    fn rename(&mut self) {
        let (from, to) = (self.any(), self.any());
        let flags = [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE];
        let flags = flags[usize::try_from(self.below(3)).expect("an index")];
        if rustix::fs::renameat_with(CWD, &from, CWD, &to, flags).is_ok() {
            self.maybe_sync(&to);
            self.maybe_sync(&from);
        }
    }

    fn remove(&mut self) {
        let path = self.any();
        let is_done = match self.below(4) {
            0 if path.is_dir() && !path.is_symlink() => fs::remove_dir_all(&path).is_ok(),
            _ => fs::remove_file(&path).is_ok() || fs::remove_dir(&path).is_ok(),
        };
        if is_done {
            self.maybe_sync(&path);
        }
    }

    fn folder(&mut self) {
        let path = self.any();
        if fs::create_dir(&path).is_ok() {
            for _ in 0..self.below(3) {
                let name = self.below(NAMES);
                let _ = File::create(path.join(format!("name-{name}")));
            }
            self.maybe_sync(&path);
        }
    }

    fn attribute(&mut self) {
        let path = self.any();
        for number in 0..4 {
            let name = format!("trusted.name-{number}");
            let _ = match self.below(4) {
                0 => rustix::fs::lremovexattr(&path, &name),
                1 => rustix::fs::lsetxattr(&path, &name, &self.bytes(300), XattrFlags::empty()),
                _ => continue,
            };
        }
        if fs::symlink_metadata(&path).is_ok_and(|stat| stat.is_file() || stat.is_dir()) {
            let mode = u32::try_from(self.below(0o1000)).expect("nine bits") | 0o700;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
        }
        self.maybe_sync(&path);
    }

    /// Makes a file that gets its name later, or none.
    fn unnamed(&mut self) {
        let path = self.any();
        let Ok(file) = rustix::fs::open(&self.root, OFlags::TMPFILE | OFlags::RDWR, Mode::RWXU) else { return };
        let file = File::from(file);
        file.write_all_at(&self.bytes(9000), 0).expect("room");
        if self.below(2) == 0 {
            file.sync_all().expect("it is written");
        }
        if rustix::fs::linkat(&file, "", CWD, &path, AtFlags::EMPTY_PATH).is_ok() {
            self.maybe_sync(&path);
        }
    }
}
