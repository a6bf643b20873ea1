//! A guest at work: files made, changed, renamed and removed, so that a journal always holds some of it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;

use super::Random;

/// Work in a mounted filesystem.
pub struct Churn {
    root: PathBuf,
    random: Random,
    made: u64,
    folders: u64,
    one_synced_in: u64,
    files: Vec<PathBuf>,
    /// Removed, and still open.
    orphans: Vec<File>,
}

impl Churn {
    /// Starts with a seed, in a filesystem with some 30 MiB of room.
    pub fn new(root: &Path, seed: u64) -> Self {
        let mut churn = Self {
            root: root.to_owned(),
            random: Random::new(seed),
            made: 0,
            folders: 0,
            one_synced_in: 10,
            files: Vec::new(),
            orphans: Vec::new(),
        };
        for _ in 0..8 {
            churn.new_folder();
        }
        for _ in 0..100 {
            churn.create();
        }
        churn
    }

    /// Does so many things that Linux commits fast, and syncs every other: afterwards not all is in transactions.
    pub fn work_fast(&mut self, steps: u64) {
        self.one_synced_in = 2;
        for _ in 0..steps {
            match self.random.below(100) {
                0..35 => self.create(),
                35..50 => self.append(),
                50..60 => self.truncate(),
                60..65 => self.overwrite(),
                65..75 => self.rename(),
                75..85 => self.link(),
                _ => self.remove(),
            }
        }
    }

    /// Makes a folder in which later files are.
    pub fn new_folder(&mut self) {
        fs::create_dir(self.folder(self.folders)).expect("a new folder");
        self.folders += 1;
    }

    /// Does so many things.
    pub fn work(&mut self, steps: u64) {
        for _ in 0..steps {
            match self.random.below(100) {
                0..25 => self.create(),
                25..40 => self.append(),
                40..50 => self.truncate(),
                50..60 => self.rename(),
                60..65 => self.link(),
                65..70 => self.attribute(),
                70..75 => self.mode(),
                75..92 => self.remove(),
                92..97 => self.remove_open(),
                97 => self.make_and_remove_many(),
                _ => self.overwrite(),
            }
        }
        while self.files.len() > 400 {
            self.remove();
        }
    }

    fn folder(&self, number: u64) -> PathBuf {
        self.root.join(format!("folder-{number}"))
    }

    fn new_name(&mut self) -> PathBuf {
        self.made += 1;
        let folder = self.random.below(self.folders);
        self.folder(folder).join(format!("file-{}", self.made))
    }

    fn any(&mut self) -> Option<PathBuf> {
        let count = self.files.len() as u64;
        (count > 0).then(|| self.files[usize::try_from(self.random.below(count)).expect("an index")].clone())
    }

    /// Syncs one in some.
    fn maybe_sync(&mut self, file: &File) {
        if self.random.below(self.one_synced_in) == 0 {
            file.sync_all().expect("it is written");
        }
    }

    fn create(&mut self) {
        let path = self.new_name();
        if self.random.below(12) == 0 {
            let len = usize::try_from(1 + self.random.below(200)).expect("small");
            symlink("t".repeat(len), &path).expect("a new link");
        } else {
            let file = File::create(&path).expect("a new file");
            let len = [0, 10, 100, 5000, 40_000, 100_000][usize::try_from(self.random.below(6)).expect("an index")];
            // What looks like a block of a journal must be escaped in one.
            let mut bytes = self.random.bytes(len);
            if self.random.below(3) == 0 {
                for block in bytes.chunks_mut(1024).filter(|block| block.len() >= 4) {
                    block[..4].copy_from_slice(&[0xc0, 0x3b, 0x39, 0x98]);
                }
            }
            file.write_all_at(&bytes, 0).expect("room");
            self.maybe_sync(&file);
        }
        self.files.push(path);
    }

    fn open(&mut self) -> Option<File> {
        let path = self.any()?;
        let is_file = fs::symlink_metadata(&path).is_ok_and(|stat| stat.is_file());
        is_file.then(|| File::options().read(true).write(true).open(&path).expect("it is ours"))
    }

    fn append(&mut self) {
        if let Some(file) = self.open() {
            let end = file.metadata().expect("it is open").len().min(300_000);
            let len = usize::try_from(self.random.below(20_000)).expect("small");
            let gap = self.random.below(3) * 10_000;
            file.write_all_at(&self.random.bytes(len), end + gap).expect("room");
            self.maybe_sync(&file);
        }
    }

    fn overwrite(&mut self) {
        if let Some(file) = self.open() {
            file.write_all_at(&self.random.bytes(3000), 1000).expect("room");
            self.maybe_sync(&file);
        }
    }

    fn truncate(&mut self) {
        if let Some(file) = self.open() {
            let len = file.metadata().expect("it is open").len();
            let to = self.random.below(len + 5000);
            file.set_len(to).expect("room");
            self.maybe_sync(&file);
        }
    }

    fn rename(&mut self) {
        if let Some(path) = self.any() {
            let to = self.new_name();
            fs::rename(&path, &to).expect("it is ours");
            self.files.retain(|other| *other != path);
            self.files.push(to);
        }
    }

    fn link(&mut self) {
        if let Some(path) = self.any() {
            let to = self.new_name();
            fs::hard_link(&path, &to).expect("it is ours");
            self.files.push(to);
        }
    }

    fn attribute(&mut self) {
        if let Some(path) = self.any() {
            let len = usize::try_from(self.random.below(800)).expect("small");
            let value = self.random.bytes(len);
            // Links have no attributes of users.
            let _ = rustix::fs::lsetxattr(&path, "trusted.churn", &value, XattrFlags::empty());
        }
    }

    fn mode(&mut self) {
        if let Some(path) = self.any()
            && fs::symlink_metadata(&path).is_ok_and(|stat| stat.is_file())
        {
            let mode = u32::try_from(self.random.below(0o1000)).expect("nine bits") | 0o600;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
        }
    }

    fn remove(&mut self) {
        if let Some(path) = self.any() {
            fs::remove_file(&path).expect("it is ours");
            self.files.retain(|other| *other != path);
        }
    }

    /// Removes a file that stays open.
    fn remove_open(&mut self) {
        if let Some(path) = self.any()
            && fs::symlink_metadata(&path).is_ok_and(|stat| stat.is_file())
        {
            self.orphans.truncate(5);
            self.orphans.push(File::open(&path).expect("it is ours"));
            fs::remove_file(&path).expect("it is ours");
            self.files.retain(|other| *other != path);
        }
    }

    /// Gives blocks of a directory, which are in the journal, to contents of files, which may not be: they are revoked.
    fn make_and_remove_many(&mut self) {
        self.made += 1;
        let folder = self.root.join(format!("many-{}", self.made));
        fs::create_dir(&folder).expect("a new folder");
        let count = 100 + self.random.below(400);
        for number in 0..count {
            File::create(folder.join(format!("{number}-{}", "n".repeat(100)))).expect("an inode");
        }
        self.sync();
        fs::remove_dir_all(&folder).expect("it is ours");
        // What was freed can be had again once that is committed.
        self.sync();
        for size in [4096, 40_000, 1_000_000] {
            let path = self.new_name();
            let bytes = self.random.bytes(size);
            File::create(&path).and_then(|file| file.write_all_at(&bytes, 0)).expect("room");
            self.files.push(path);
        }
        if self.random.below(2) == 0 {
            self.sync();
        }
    }

    /// Lets all that was done be written.
    pub fn sync(&self) {
        File::open(&self.root).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
    }
}
