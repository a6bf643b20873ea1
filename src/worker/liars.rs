//! Workers that lie: programs that say what a test wrote down, for tests of what the mount makes of it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use guest::{Content, Extents, Facts, Inode};
use tempfile::TempDir;

use super::protocol::{Message, send};
use super::{Volume, Workers};

/// A disk of zeroes.
pub(crate) struct Zeroes(pub(crate) u64);

impl disk::Disk for Zeroes {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> disk::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        Ok(disk::Extent { len: self.0 - offset, is_hole: false })
    }
}

/// A program that is no worker.
pub(crate) struct Liar {
    folder: TempDir,
    script: String,
    said: usize,
}

impl Liar {
    /// One that says nothing yet.
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder for what it says");
        Self { folder, script: "#!/bin/sh\n".to_owned(), said: 0 }
    }

    /// One that says what every worker says of a volume before it is asked more.
    pub(crate) fn opened() -> Self {
        let mut liar = Self::new();
        liar.say(&bytes(&[Message::Ready, Message::Opened(Inode(2), Facts::default())]));
        liar
    }

    /// Lets it say bytes next. It says all before it is asked: the mount reads it when it asks.
    pub(super) fn say(&mut self, bytes: &[u8]) {
        let path = self.folder.path().join(self.said.to_string());
        fs::write(&path, bytes).expect("room");
        // Of standard input, since that is the socket.
        self.act(&format!("cat {} >&0", path.display()));
        self.said += 1;
    }

    /// Lets it answer where bytes of a file lie, again and again, `after` that long.
    pub(crate) fn say_extents(&mut self, answers: impl IntoIterator<Item = Extents>, after: Duration) {
        let answers: Vec<_> = answers.into_iter().map(Message::Extents).collect();
        // It takes what it is asked, which would fill the socket; in the background standard input is another.
        self.act("exec 3<&0; cat <&3 > /dev/null &");
        if after.is_zero() {
            return self.say(&bytes(&answers));
        }
        for answer in answers {
            self.act(&format!("sleep {}", after.as_secs_f64()));
            self.say(&bytes(&[answer]));
        }
    }

    /// Lets it do something next, as sh(1) takes it.
    pub(super) fn act(&mut self, command: &str) {
        self.script += command;
        self.script.push('\n');
    }

    /// Makes workers of it: at most `limit`, each with `patience` for a request, which waits for `wait`.
    pub(super) fn workers(&mut self, limit: u16, patience: Duration, wait: Option<Duration>) -> Arc<Workers> {
        // Until the mount is gone; it ends what it started.
        self.act("exec sleep 60");
        Workers::of_program(self.program(), limit, patience, wait)
    }

    /// Makes a volume of it, of 1 MiB.
    pub(crate) fn volume(&mut self, patience: Duration) -> Volume {
        Volume::new(self.workers(1, patience, None), Content::Ext4, vec![Arc::new(Zeroes(1 << 20))])
    }

    fn program(&self) -> PathBuf {
        let path = self.folder.path().join("liar");
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path).expect("a new file");
        file.write_all(self.script.as_bytes()).expect("room");
        path
    }
}

/// Returns messages as they come through the socket.
pub(super) fn bytes(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        send(&mut bytes, message).expect("it is no longer than a frame may be");
    }
    bytes
}
