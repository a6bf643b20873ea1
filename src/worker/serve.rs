//! The worker itself: a process that reads one volume, and can do nothing else.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest::{Entry, Error, ErrorKind, GuestFs, Inode};

use super::inherited;
use super::protocol::{Frame, Message, PIECE_LIMIT, Page, Request, receive, send, send_bytes};
use super::remote::{Channel, Remote};
use super::sandbox;

/// About how many bytes of entries are answered at once.
const PAGE: usize = 512 << 10;

/// About how many bytes an entry takes besides its name.
const ENTRY: usize = 96;

/// Extents that are answered at once.
const EXTENTS: usize = 8192;

/// Serves the mount that is at the other end of standard input, until it is gone.
///
/// # Errors
/// If the process cannot be confined, or the mount says what it never says. Nothing of a disk was read if it cannot be confined.
pub fn run() -> io::Result<()> {
    let closed = inherited::close_all();
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // The kernel calls a program started through /proc "exe".
    let _ = rustix::thread::set_name(c"xofs-guest");
    // A backtrace would open files.
    let last_word = socket.try_clone()?;
    std::panic::set_hook(Box::new(move |info| {
        let _ = send(&mut &last_word, &Message::Panicked(info.to_string()));
        std::process::exit(101);
    }));
    if let Err(error) = closed.and_then(|()| sandbox::enter()) {
        let why = format!("it cannot be confined, and so reads nothing: {error}");
        return send(&mut &socket, &Message::Panicked(why));
    }
    let mut worker = Worker { channel: Arc::new(Mutex::new(Channel::new(socket))), reader: None, listing: None };
    worker.say(&Message::Ready)?;
    loop {
        let frame = receive(worker.channel().socket());
        match frame {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Frame::Message(request)) => {
                sandbox::begin_request()?;
                worker.answer(&request)?;
            }
            Ok(Frame::Bytes(_)) => return Err(io::ErrorKind::InvalidData.into()),
            Err(error) => return Err(error),
        }
    }
}

struct Worker {
    channel: Arc<Mutex<Channel>>,
    reader: Option<Box<dyn GuestFs>>,
    /// The directory that was listed last: what it holds is asked for in parts.
    listing: Option<(Inode, Vec<Entry>)>,
}

impl Worker {
    fn channel(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, message: &Message) -> io::Result<()> {
        send(self.channel().socket(), message)
    }

    fn answer(&mut self, request: &Request) -> io::Result<()> {
        let answer = match request {
            Request::Decode(inode, offset, len) => self.decode(*inode, *offset, *len).map(Frame::Bytes),
            request => self.act(request).map(Frame::Message),
        };
        // Whatever a reader made of a disk that could not be read, it rests on nothing. A survey says it of each volume.
        let unreadable = self.channel().take_unreadable();
        if let Some(message) = unreadable.filter(|_| !matches!(request, Request::Survey(_))) {
            self.listing = None;
            if matches!(request, Request::Open(..) | Request::OpenLayer(..)) {
                self.reader = None;
            }
            return self.say(&Message::Failed(ErrorKind::Disk, message));
        }
        match answer {
            Ok(Frame::Message(message)) => match self.say(&message) {
                // It was not sent: a frame is sent whole or not at all.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.say(&Message::Failed(ErrorKind::TooMuch, "there is more of it than can be told".to_owned()))
                }
                said => said,
            },
            Ok(Frame::Bytes(bytes)) => send_bytes(self.channel().socket(), &bytes),
            Err(error) => self.say(&Message::Failed(error.kind(), error.to_string())),
        }
    }

    fn act(&mut self, request: &Request) -> guest::Result<Message> {
        Ok(match request {
            Request::Survey(disks) => {
                let (names, sizes): (Vec<String>, Vec<u64>) = disks.iter().cloned().unzip();
                let disks: Vec<_> = names.into_iter().zip(Remote::all(&self.channel, &sizes)).collect();
                Message::Survey(guest::survey(&disks))
            }
            Request::Open(content, sizes) => self.open(guest::open(*content, Remote::all(&self.channel, sizes))?),
            Request::OpenLayer(layer, size, sizes) => self.open(layer.open(*size, Remote::all(&self.channel, sizes))?),
            Request::List(directory, from) => Message::List(self.list(*directory, *from, true)?),
            Request::Names(directory, from) => Message::List(self.list(*directory, *from, false)?),
            Request::Attributes(inode) => Message::Attributes(self.reader()?.attributes(*inode)?),
            Request::Target(inode) => Message::Target(self.reader()?.target(*inode)?),
            Request::Xattrs(inode) => Message::Xattrs(self.reader()?.xattrs(*inode)?),
            Request::Extents(inode, from) => Message::Extents(self.reader()?.extents(*inode, *from, EXTENTS)?),
            Request::Decode(..) | Request::Unreadable(_) => return Err(not_asked()),
        })
    }

    fn open(&mut self, reader: Box<dyn GuestFs>) -> Message {
        let opened = Message::Opened(reader.root(), reader.facts());
        self.reader = Some(reader);
        opened
    }

    fn reader(&self) -> guest::Result<&dyn GuestFs> {
        self.reader.as_deref().ok_or_else(not_asked)
    }

    fn list(&mut self, directory: Inode, from: u32, with_attributes: bool) -> guest::Result<Page> {
        let listed = match self.listing.take() {
            Some((listed, entries)) if listed == directory && from > 0 => entries,
            _ => self.reader()?.list(directory)?,
        };
        let reader = self.reader()?;
        let (mut entries, mut room) = (Vec::new(), PAGE);
        let mut next = from;
        for entry in listed.iter().skip(usize::try_from(from).unwrap_or(usize::MAX)) {
            let needed = ENTRY + entry.name.len();
            if needed > room && !entries.is_empty() {
                break;
            }
            room = room.saturating_sub(needed);
            let attributes = match with_attributes {
                true => reader.attributes(entry.inode).map_err(|error| error.to_string()),
                false => Err("it was not looked at, since what lies beside it cannot be".to_owned()),
            };
            entries.push((entry.clone(), attributes));
            next += 1;
        }
        let is_all = usize::try_from(next).unwrap_or(usize::MAX) >= listed.len();
        self.listing = (!is_all).then_some((directory, listed));
        Ok(Page { entries, next: (!is_all).then_some(next) })
    }

    fn decode(&self, inode: Inode, offset: u64, len: u32) -> guest::Result<Vec<u8>> {
        let len = usize::try_from(len).ok().filter(|len| *len <= PIECE_LIMIT).ok_or_else(not_asked)?;
        let mut bytes = vec![0; len];
        self.reader()?.decode(inode, offset, &mut bytes)?;
        Ok(bytes)
    }
}

fn not_asked() -> Error {
    Error::unsupported("no mount asks that")
}
