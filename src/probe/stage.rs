//! What a stage is, and what it is of.

use std::mem::{self, Discriminant};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

/// Each stage once, with its name in JSON.
macro_rules! stages {
    ($($(#[$doc:meta])* $stage:ident $name:literal,)*) => {
        /// What is done, in the order in which it is told.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Stage {
            $($(#[$doc])* $stage,)*
        }

        impl Stage {
            /// All of them, in the order in which they are told.
            pub const ALL: &[Self] = &[$(Self::$stage,)*];

            /// Returns its name in JSON.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$stage => $name,)*
                }
            }
        }
    };
}

stages! {
    /// Somebody else works on the same VM.
    Lock "lock",
    /// The limits of the machine leave no place for now.
    Slot "slot",
    /// A host has to coalesce first.
    Chain "chain",
    /// What is there is looked at, before anything is made.
    Survey "survey",
    /// What is to be done is decided, and whether there is room.
    Plan "plan",
    /// A snapshot is taken.
    Snapshot "snapshot",
    /// What the bytes go into is made.
    Prepare "prepare",
    /// A disk of a pool is opened to be read.
    Open "open",
    /// Bytes wait for the limit of bandwidth.
    Bandwidth "bandwidth",
    /// The source is read.
    Read "read",
    /// The way to the source and back, where it can be told apart.
    Network "network",
    /// The backup before is read.
    Base "base",
    /// Bytes are compared.
    Compare "compare",
    /// What was read is decrypted and decompressed.
    Decode "decode",
    /// Digests are made.
    Hash "hash",
    /// Blocks are brought into the form in which they are stored.
    Encode "encode",
    /// Blocks are written into a repository.
    Write "write",
    /// Blocks are sent into a pool.
    Import "import",
    /// Blocks of merged disks are moved, or copied.
    Move "move",
    /// What was written is made durable.
    Sync "sync",
    /// What was written gets its name.
    Publish "publish",
    /// What was sent is read back.
    Verify "verify",
    /// What is not needed any more is removed.
    Delete "delete",
    /// A pool is left as it is to be.
    Settle "settle",
}

/// What kind of thing a stage is of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    /// A host of a pool.
    Host,
    /// A storage repository of a pool.
    Sr,
    /// The network to a pool.
    Network,
    /// A backup repository.
    Repository,
    /// The machine that xofs runs on, or what a log of another version calls otherwise.
    #[default]
    #[serde(other)]
    Machine,
}

impl Kind {
    /// Returns its name in JSON, and in labels of metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Sr => "sr",
            Self::Network => "network",
            Self::Repository => "repository",
            Self::Machine => "machine",
        }
    }

    /// Returns what people call it.
    #[must_use]
    pub fn shown(self) -> &'static str {
        match self {
            Self::Sr => "SR",
            Self::Machine => "this machine",
            Self::Host | Self::Network | Self::Repository => self.name(),
        }
    }
}

/// What a stage is of: what would have to be faster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    /// Of which kind.
    pub kind: Kind,
    /// As people call it.
    pub name: String,
    /// The pool that it is in, as the configuration calls it; that of the transfer, if nothing is said.
    pub pool: Option<String>,
}

impl Subject {
    /// Names something.
    #[must_use]
    pub fn new(kind: Kind, name: impl Into<String>) -> Self {
        Self { kind, name: name.into(), pool: None }
    }

    /// Names a backup repository.
    #[must_use]
    pub fn repository(name: impl Into<String>) -> Self {
        Self::new(Kind::Repository, name)
    }

    /// Names this machine.
    #[must_use]
    pub fn machine() -> Self {
        Self::new(Kind::Machine, rustix::system::uname().nodename().to_string_lossy())
    }
}

/// Who does a stage. The stages of readers are done by the same threads, one after the other, and so are those of workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crew {
    /// Threads that get blocks.
    Readers,
    /// Threads that work on them.
    Workers,
    /// Either, as it comes.
    Both,
    /// Threads that do nothing else.
    Own,
    /// One thread that does it before or after the blocks: all else waits meanwhile.
    Step,
}

/// How many connections something is read over: told by who reads, when it ends.
#[derive(Debug, Clone, Default)]
pub struct Connections(Arc<AtomicUsize>);

impl Connections {
    /// Tells how many there are.
    pub fn set(&self, count: usize) {
        self.0.store(count, Ordering::Relaxed);
    }

    /// Returns how many there are; 0 if nobody has told.
    #[must_use]
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a stage does it, as far as something else could be done instead.
#[derive(Debug, Clone)]
pub enum Way {
    /// There is one way.
    Only,
    /// Read by NBD.
    Nbd {
        /// As many as are wanted.
        wanted: usize,
        /// As many as there are.
        open: Connections,
    },
    /// Read as one stream of VHD.
    Stream,
    /// Read out of the files of an SR.
    Files,
    /// Read as one stream, an XVA.
    Xva,
    /// Compressed by brotli.
    Brotli,
    /// Compressed by gzip.
    Gzip,
}

/// What tells a stage from others: however many connections there are, it is the same.
pub(super) type Identity<'a> = (Stage, &'a Subject, Crew, Discriminant<Way>);

/// Returns what tells a stage from others.
pub(super) fn identity<'a>(stage: Stage, of: &'a Subject, crew: Crew, way: &Way) -> Identity<'a> {
    (stage, of, crew, mem::discriminant(way))
}
