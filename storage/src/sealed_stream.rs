//! Objects of an encrypted repository that are read or written in order, a piece at a time.

use aws_lc_rs::cipher::StreamingEncryptingKey;

use crate::sealed::{NONCE_LENGTH, PIECE, Sealing, TAG_LENGTH};
use crate::{Error, ErrorKind, ObjectPath, Result, Stream, WritableStream, decoding};

/// Decrypts what it reads.
pub(crate) struct Opening {
    /// As it is stored.
    inner: Box<dyn Stream>,
    path: ObjectPath,
    state: State,
    size: u64,
    /// Bytes of ciphertext that were not read.
    left: u64,
    stored: Vec<u8>,
    plain: Vec<u8>,
    /// How many of `plain` were handed out.
    given: usize,
}

enum State {
    /// In the middle.
    Open(Box<Sealing>),
    /// The end was read, and all of it is right.
    Proven,
    /// Something went wrong: the end is never reached.
    Failed,
}

impl Opening {
    /// Begins to read `inner`; `begin` is given the nonce.
    pub fn new(
        mut inner: Box<dyn Stream>,
        path: &ObjectPath,
        longest: u64,
        begin: impl FnOnce(&[u8; NONCE_LENGTH]) -> Sealing,
    ) -> Result<Self> {
        const OVERHEAD: u64 = (NONCE_LENGTH + TAG_LENGTH) as u64;
        let stored = inner.size();
        let Some(size) = stored.checked_sub(OVERHEAD) else {
            return Err(damaged("open", path, &format!("{stored} bytes, at least {OVERHEAD} were expected")));
        };
        if size > longest {
            let reason = format!("it has {size} bytes, and its encryption protects at most {longest} at once");
            return Err(Error::new(ErrorKind::TooLarge, "open", path, reason));
        }
        let mut nonce = [0; NONCE_LENGTH];
        if inner.read(&mut nonce)? < NONCE_LENGTH {
            return Err(damaged("open", path, "it was cut off while it was read"));
        }
        let state = State::Open(Box::new(begin(&nonce)));
        let path = path.clone();
        Ok(Self { inner, path, state, size, left: size, stored: Vec::new(), plain: Vec::new(), given: 0 })
    }

    /// Decrypts the piece that comes next, and with the last one compares the tag before any of it is handed out; whether there
    /// was one.
    fn next_piece(&mut self) -> Result<bool> {
        let mut sealing = match std::mem::replace(&mut self.state, State::Failed) {
            State::Open(sealing) => sealing,
            State::Proven => {
                self.state = State::Proven;
                return Ok(false);
            }
            State::Failed => return Err(damaged("read", &self.path, "it failed before")),
        };
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(PIECE);
        self.left -= len as u64;
        let is_last = self.left == 0;
        self.stored.resize(if is_last { len + TAG_LENGTH } else { len }, 0);
        if self.inner.read(&mut self.stored)? < self.stored.len() {
            return Err(damaged("read", &self.path, "it was cut off while it was read"));
        }
        let (piece, tag) = self.stored.split_at(len);
        self.plain.clear();
        self.given = 0;
        decoding(len, || sealing.decrypt(piece, &mut self.plain));
        if !is_last {
            self.state = State::Open(sealing);
        } else if sealing.matches(tag) {
            self.state = State::Proven;
        } else {
            self.plain.clear();
            return Err(damaged("read", &self.path, "its authentication tag does not match"));
        }
        Ok(true)
    }
}

/// Makes the error of an object that does not decrypt.
pub(crate) fn damaged(act: &'static str, path: &ObjectPath, reason: &str) -> Error {
    let reason = format!("does not decrypt, it is damaged or not encrypted with this key: {reason}");
    Error::new(ErrorKind::Authentication, act, path, reason)
}

impl Stream for Opening {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            if self.given == self.plain.len() && !self.next_piece()? {
                break;
            }
            let count = (buffer.len() - done).min(self.plain.len() - self.given);
            buffer[done..done + count].copy_from_slice(&self.plain[self.given..self.given + count]);
            self.given += count;
            done += count;
        }
        Ok(done)
    }
}

/// What encrypts an object that is written.
pub(crate) enum Encrypting {
    Sealing(Sealing),
    Cbc(StreamingEncryptingKey),
}

impl Encrypting {
    /// Appends what is stored of the piece that comes next.
    fn piece(&mut self, plain: &[u8], stored: &mut Vec<u8>) {
        match self {
            Self::Sealing(sealing) => sealing.encrypt(plain, stored),
            Self::Cbc(key) => {
                let start = stored.len();
                // It asks for room for a block more, and keeps back what is not whole.
                stored.resize(start + plain.len() + key.algorithm().block_len(), 0);
                let done = key.update(plain, &mut stored[start..]).expect("there is room for a block more");
                let done = done.written().len();
                stored.truncate(start + done);
            }
        }
    }

    /// Appends the tag, or the padding.
    fn end(self, stored: &mut Vec<u8>) {
        match self {
            Self::Sealing(sealing) => stored.extend_from_slice(&sealing.tag()),
            Self::Cbc(key) => {
                let mut last = vec![0; key.algorithm().block_len()];
                let (_, done) = key.finish(&mut last).expect("there is room for a block");
                stored.extend_from_slice(done.written());
            }
        }
    }
}

/// Encrypts what is written.
pub(crate) struct Closing {
    inner: Box<dyn WritableStream>,
    path: ObjectPath,
    encrypting: Encrypting,
    /// Bytes that may still come.
    room: u64,
    /// Less than a piece that was not encrypted.
    plain: Vec<u8>,
    /// What is to be written: at first the nonce, else nothing between two calls.
    stored: Vec<u8>,
}

impl Closing {
    /// Begins to write at most `longest` bytes to `inner`, after `nonce`.
    pub fn new(
        inner: Box<dyn WritableStream>,
        path: &ObjectPath,
        longest: u64,
        nonce: &[u8],
        encrypting: Encrypting,
    ) -> Self {
        let (path, stored) = (path.clone(), nonce.to_vec());
        Self { inner, path, encrypting, room: longest, plain: Vec::with_capacity(PIECE), stored }
    }
}

impl WritableStream for Closing {
    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        let Some(room) = self.room.checked_sub(bytes.len() as u64) else {
            let reason = "it has more bytes than its encryption protects at once";
            return Err(Error::new(ErrorKind::TooLarge, "write", &self.path, reason));
        };
        self.room = room;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.plain.len()));
            self.plain.extend_from_slice(now);
            bytes = later;
            if self.plain.len() == PIECE {
                self.encrypting.piece(&self.plain, &mut self.stored);
                self.plain.clear();
                self.inner.append(&self.stored)?;
                self.stored.clear();
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.encrypting.piece(&self.plain, &mut self.stored);
        self.encrypting.end(&mut self.stored);
        self.inner.append(&self.stored)?;
        self.inner.finish()
    }
}
