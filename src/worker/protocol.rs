//! What a mount and a worker say to each other, over a local socket.
//!
//! ```text
//! worker ─► Ready                                  once, when it can do no harm any more
//! mount  ─► a request                              one at a time
//!     worker ─► Read ◄─ bytes, or Unreadable       as often as it needs some of a disk
//! worker ─► an answer, Failed, or Panicked (its last word)
//!
//! frame = length of what follows (4, little-endian) | kind (1): 0 a message, 1 plain bytes | postcard, or the bytes
//! ```
//!
//! The mount trusts nothing of what comes: a frame that is too long, of the wrong kind or out of turn ends the worker.

use std::io::{self, Read, Write};

use guest::{Attributes, Entry, ErrorKind, Extents, Facts, Inode, Survey, Xattr};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest frame (bytes): what a directory says at once, or a piece of a disk.
const FRAME_LIMIT: usize = 4 << 20;

/// Most bytes of a disk that are asked for at once, and that are decoded at once.
pub(super) const PIECE_LIMIT: usize = 1 << 20;

/// What a mount asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Which volumes are on these disks, each a name and its size in bytes?
    Survey(Vec<(String, u64)>),
    /// Read the filesystem on a volume of members of these sizes (bytes), from now on.
    Open(guest::Content, Vec<u64>),
    /// Read a layer of so many bytes over members of these sizes, from now on: a filesystem of one file.
    OpenLayer(guest::Layer, u64, Vec<u64>),
    /// What is in a directory, from the entry of that number on?
    List(Inode, u32),
    /// The same without what is known of the files.
    Names(Inode, u32),
    Attributes(Inode),
    Target(Inode),
    Xattrs(Inode),
    /// Where do the bytes of a file lie, from that one on?
    Extents(Inode, u64),
    /// What are the bytes of a file at that offset, so many of them?
    Decode(Inode, u64, u32),
    /// The answer to [`Message::Read`] if the disk could not be read.
    Unreadable(String),
}

/// What a worker says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    Ready,
    /// Give me bytes of a disk or member: its number, from where, how many.
    Read(u16, u64, u32),
    Survey(Survey),
    Opened(Inode, Facts),
    List(Page),
    Attributes(Attributes),
    Target(Vec<u8>),
    Xattrs(Vec<Xattr>),
    Extents(Extents),
    Failed(ErrorKind, String),
    Panicked(String),
}

/// A part of a directory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Page {
    pub entries: Vec<(Entry, Result<Attributes, String>)>,
    /// The number of the first entry that is not here, if there are more.
    pub next: Option<u32>,
}

/// A frame that came.
pub(super) enum Frame<M> {
    Message(M),
    Bytes(Vec<u8>),
}

const MESSAGE: u8 = 0;
const BYTES: u8 = 1;

/// Sends a message.
///
/// # Errors
/// If it is longer than a frame may be, or the other side is gone.
pub(super) fn send(socket: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut frame = vec![0, 0, 0, 0, MESSAGE];
    frame = postcard::to_extend(message, frame).map_err(io::Error::other)?;
    send_frame(socket, frame)
}

/// Sends plain bytes.
///
/// # Errors
/// As for [`send`].
pub(super) fn send_bytes(socket: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(5 + bytes.len());
    frame.extend([0, 0, 0, 0, BYTES]);
    frame.extend(bytes);
    send_frame(socket, frame)
}

fn send_frame(socket: &mut impl Write, mut frame: Vec<u8>) -> io::Result<()> {
    let len = u32::try_from(frame.len() - 4).ok().filter(|_| frame.len() - 4 <= FRAME_LIMIT);
    let len = len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a frame is too long"))?;
    frame[..4].copy_from_slice(&len.to_le_bytes());
    socket.write_all(&frame)
}

/// Waits for a frame.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] if the other side is gone, [`io::ErrorKind::InvalidData`] if what comes is no frame.
pub(super) fn receive<M: DeserializeOwned>(socket: &mut impl Read) -> io::Result<Frame<M>> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut head = [0; 5];
    socket.read_exact(&mut head)?;
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let len = usize::try_from(len).ok().filter(|len| (1..=FRAME_LIMIT).contains(len));
    let mut body = vec![0; len.ok_or_else(|| invalid("a frame of a length that none has"))? - 1];
    socket.read_exact(&mut body)?;
    match head[4] {
        BYTES => Ok(Frame::Bytes(body)),
        MESSAGE => match postcard::take_from_bytes(&body) {
            Ok((message, [])) => Ok(Frame::Message(message)),
            _ => Err(invalid("a message that is none")),
        },
        _ => Err(invalid("a frame of a kind that there is not")),
    }
}
