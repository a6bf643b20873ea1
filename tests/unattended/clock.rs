//! A clock on the wall that programs go by, and that a test sets: libfaketime shows it to them. How long something takes they measure
//! by the steady clock, which is the machine's, as are the times of files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;

/// A clock, which goes on by itself.
pub struct Clock {
    file: PathBuf,
    library: PathBuf,
    /// Those that were started by it; what they leave in shared memory when they are killed is removed in the end.
    processes: Mutex<Vec<u32>>,
}

impl Clock {
    /// Makes one whose file is in a folder.
    pub fn new(folder: &Path, at: Timestamp) -> Self {
        let machine = fs::read_dir("/usr/lib").expect("listed").flatten();
        let mut libraries = machine.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
        let library = libraries.find(|path| path.exists()).expect("libfaketime is installed; did scripts/setup run?");
        let clock = Self { file: folder.join("clock"), library, processes: Mutex::new(Vec::new()) };
        clock.set(at);
        clock
    }

    /// Sets it, for all programs at once.
    pub fn set(&self, at: Timestamp) {
        let ahead = at.as_second() - Timestamp::now().as_second();
        let fresh = self.file.with_extension("new");
        fs::write(&fresh, format!("{ahead:+}\n")).expect("a short file fits");
        fs::rename(&fresh, &self.file).expect("renamed");
    }

    /// Starts a program that goes by it.
    pub fn start(&self, command: &mut Command) -> Child {
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", &self.file);
        for setting in ["FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC", "NO_FAKE_STAT"] {
            command.env(setting, "1");
        }
        let child = command.spawn().expect("it starts");
        self.processes.lock().unwrap_or_else(PoisonError::into_inner).push(child.id());
        child
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        for process in self.processes.get_mut().unwrap_or_else(PoisonError::into_inner) {
            for name in [format!("faketime_shm_{process}"), format!("sem.faketime_sem_{process}")] {
                // Who ended by itself has removed its own.
                let _ = fs::remove_file(Path::new("/dev/shm").join(name));
            }
        }
    }
}
