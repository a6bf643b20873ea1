//! From a new connection to an export: what both sides can do, and how large it is.
//!
//! Structured replies and metadata contexts are asked for before the export. A server that does not know `NBD_OPT_GO` is asked
//! by `NBD_OPT_EXPORT_NAME`, where a wrong name shows as a closed connection.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::stream::{Stream, Upgrade};
use crate::wire::{self, u16_of, u32_of, u64_of};
use crate::{Error, ErrorKind, Result};

/// The metadata context that tells what reads as zeroes.
pub const ALLOCATION: &str = "base:allocation";
/// Longest reply to an option (bytes): names of contexts, and errors in words.
const OPTION_LIMIT: u32 = 64 << 10;
/// Most replies to one option.
const REPLIES: usize = 256;
/// Longest name of an export or a context, as the protocol says (bytes).
const NAME_LIMIT: usize = 4096;
/// What a request may ask for where the server says nothing: all servers take that much (bytes).
const DEFAULT_MAXIMUM: u32 = 32 << 20;
/// Zeroes after the reply to `NBD_OPT_EXPORT_NAME`.
const ZEROES: usize = 124;

/// What is asked of a server.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// How long it may take to answer.
    pub timeout: Duration,
    /// Metadata contexts, where it has them.
    pub contexts: Vec<String>,
    /// What encrypts the connection; a server that does not encrypt is refused then.
    pub encryption: Option<Arc<dyn Upgrade>>,
    /// Whether the server is known to know nothing else ([`Export::by_name_only`]): it is not asked again, which takes a round trip each
    /// time.
    pub by_name_only: bool,
}

/// Returns the metadata context of a dirty bitmap of QEMU.
#[must_use]
pub fn dirty_bitmap(name: &str) -> String {
    format!("qemu:dirty-bitmap:{name}")
}

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// In bytes.
    pub size: u64,
    /// Whether nobody may write to it.
    pub is_read_only: bool,
    /// Whether several connections see the same.
    pub can_multi_connect: bool,
    /// What offsets and lengths are multiples of (bytes).
    pub minimum: u32,
    /// What one request may ask for (bytes).
    pub maximum: u32,
    /// Whether replies are structured.
    pub is_structured: bool,
    /// Whether the server knows only `NBD_OPT_EXPORT_NAME`, as that of XAPI.
    pub by_name_only: bool,
    /// The contexts that it has of those asked for, and what it calls each.
    pub contexts: Vec<(String, u32)>,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

/// Characters of a server's own words that are told.
const SAID: usize = 200;

struct Handshake<'a> {
    stream: Box<dyn Stream>,
    name: &'a str,
    shown: &'a str,
    /// Of the option that was answered soonest: most ask for nothing that takes a server any time.
    round_trip: Duration,
}

/// Negotiates the export `name`; `shown` is what errors call it. Returns the stream, encrypted if that was asked for,
/// and how long the way to the server and back takes at most.
pub fn negotiate(
    stream: Box<dyn Stream>,
    name: &str,
    shown: &str,
    options: &Options,
) -> Result<(Box<dyn Stream>, Export, Duration)> {
    let mut handshake = Handshake { stream, name, shown, round_trip: Duration::MAX };
    let flags = handshake.greet()?;
    if let Some(encryption) = &options.encryption {
        handshake = handshake.encrypt(encryption.as_ref())?;
        handshake.stream.set_timeout(options.timeout).map_err(|error| handshake.io(&error))?;
    }
    let export = handshake.run(options, flags)?;
    if i64::try_from(export.size).is_err() {
        return Err(handshake.protocol(format!("{} bytes are more than an export can have", export.size)));
    }
    Ok((handshake.stream, export, handshake.round_trip))
}

impl Handshake<'_> {
    fn error(&self, kind: ErrorKind, reason: impl std::fmt::Display) -> Error {
        Error::new(kind, self.shown, reason)
    }

    fn io(&self, error: &io::Error) -> Error {
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the server closed the connection while it was agreed on".to_owned(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "the server does not answer".to_owned(),
            _ => format!("it cannot be agreed on: {error}"),
        };
        self.error(ErrorKind::Unavailable, reason)
    }

    fn protocol(&self, reason: impl std::fmt::Display) -> Error {
        self.error(ErrorKind::Protocol, reason)
    }

    /// Goes on encrypted, or not at all.
    fn encrypt(mut self, encryption: &dyn Upgrade) -> Result<Self> {
        let reply = self.ask(wire::OPTION_START_TLS, &[])?.pop();
        if reply.is_none_or(|reply| reply.kind != wire::REPLY_ACK) {
            return Err(self.error(ErrorKind::Refused, "the server does not encrypt (TLS), which is wanted"));
        }
        let Self { stream, name, shown, round_trip } = self;
        let refused =
            |error| Error::new(ErrorKind::Refused, shown, format!("the connection cannot be encrypted: {error}"));
        Ok(Self { stream: encryption.upgrade(stream).map_err(refused)?, name, shown, round_trip })
    }

    fn run(&mut self, options: &Options, flags: u16) -> Result<Export> {
        if self.name.len() > NAME_LIMIT {
            return Err(self.error(ErrorKind::Refused, format!("its name is longer than {NAME_LIMIT} bytes")));
        }
        if options.by_name_only {
            return self.export_name(flags);
        }
        let is_structured = match self.ask(wire::OPTION_STRUCTURED_REPLY, &[])?.pop() {
            Some(reply) if reply.kind == wire::REPLY_ACK => true,
            Some(reply) if reply.kind == wire::REPLY_TLS_REQUIRED => return Err(self.refused(&reply)),
            _ => false,
        };
        let contexts =
            if is_structured && !options.contexts.is_empty() { self.contexts(&options.contexts)? } else { Vec::new() };
        let export = match self.go()? {
            Some(export) => export,
            None => Export { by_name_only: !is_structured, ..self.export_name(flags)? },
        };
        Ok(Export { is_structured, contexts, ..export })
    }

    /// Reads what the server greets with, and answers; returns the flags of both.
    fn greet(&mut self) -> Result<u16> {
        // Source of what a server with too many connections does: xen-api, `ocaml/nbd/src/main.ml`.
        let first = wire::bytes::<1>(&mut *self.stream);
        let [first] = first.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => self.error(
                ErrorKind::Busy,
                "the server closed the connection at once, as one does that has all the connections it takes",
            ),
            _ => self.io(&error),
        })?;
        let greeting =
            (|| Ok((wire::bytes::<7>(&mut *self.stream)?, u64_of(&mut *self.stream)?, u16_of(&mut *self.stream)?)))();
        let (rest, magic, flags) = greeting.map_err(|error| self.io(&error))?;
        let greeting = u64::from_be_bytes(std::array::from_fn(|at| if at == 0 { first } else { rest[at - 1] }));
        if greeting != wire::GREETING {
            return Err(self.protocol("what answers is no NBD server: the greeting 'NBDMAGIC' was expected"));
        }
        if magic != wire::OPTIONS_MAGIC || flags & wire::FIXED_NEWSTYLE == 0 {
            return Err(self.protocol("the server speaks an old form of NBD, the fixed newstyle was expected"));
        }
        let flags = flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        self.stream.write_all(&u32::from(flags).to_be_bytes()).map_err(|error| self.io(&error))?;
        Ok(flags)
    }

    fn send(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len()).expect("names and numbers of a few kilobytes");
        let header = [&wire::OPTIONS_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat();
        self.stream.write_all(&header).and_then(|()| self.stream.flush()).map_err(|error| self.io(&error))
    }

    /// Asks for an option; returns its replies, the last of which is an acknowledgement or an error.
    fn ask(&mut self, option: u32, data: &[u8]) -> Result<Vec<Reply>> {
        let asked = Instant::now();
        self.send(option, data)?;
        let mut replies = Vec::new();
        while replies.len() < REPLIES {
            let reply = self.reply(option)?;
            self.round_trip = self.round_trip.min(asked.elapsed());
            let is_last = reply.kind == wire::REPLY_ACK || reply.kind & wire::REPLY_ERROR != 0;
            replies.push(reply);
            if is_last {
                return Ok(replies);
            }
        }
        Err(self.protocol(format!("the server does not end its answers to option {option}")))
    }

    fn reply(&mut self, option: u32) -> Result<Reply> {
        let header = (|| {
            Ok((
                u64_of(&mut *self.stream)?,
                u32_of(&mut *self.stream)?,
                u32_of(&mut *self.stream)?,
                u32_of(&mut *self.stream)?,
            ))
        })();
        let (magic, of, kind, len) = header.map_err(|error| self.io(&error))?;
        if magic != wire::OPTION_REPLY_MAGIC || of != option {
            return Err(
                self.protocol(format!("an answer to option {option} was expected, {magic:#x} of {of} was found"))
            );
        }
        if len > OPTION_LIMIT {
            return Err(self.protocol(format!("an answer of {len} bytes, at most {OPTION_LIMIT} were expected")));
        }
        let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
        self.stream.read_exact(&mut data).map_err(|error| self.io(&error))?;
        Ok(Reply { kind, data })
    }

    /// Asks for metadata contexts; returns those that the server has.
    fn contexts(&mut self, wanted: &[String]) -> Result<Vec<(String, u32)>> {
        let mut data = text(self.name);
        data.extend(u32::try_from(wanted.len()).unwrap_or(0).to_be_bytes());
        wanted.iter().for_each(|context| data.extend(text(context)));
        let mut contexts = Vec::new();
        for reply in self.ask(wire::OPTION_SET_META_CONTEXT, &data)? {
            match reply.kind {
                wire::REPLY_META_CONTEXT => {
                    let Some((id, name)) = reply.data.split_first_chunk::<4>() else {
                        return Err(self.protocol("a metadata context without a number"));
                    };
                    let name = String::from_utf8_lossy(name).into_owned();
                    if wanted.contains(&name) && !contexts.iter().any(|(known, _)| *known == name) {
                        contexts.push((name, u32::from_be_bytes(*id)));
                    }
                }
                wire::REPLY_ACK => return Ok(contexts),
                // It has none.
                _ => return Ok(Vec::new()),
            }
        }
        Ok(contexts)
    }

    /// Begins with the export; `None` if the server does not know how.
    fn go(&mut self) -> Result<Option<Export>> {
        let mut data = text(self.name);
        data.extend(1_u16.to_be_bytes());
        data.extend(wire::INFO_BLOCK_SIZE.to_be_bytes());
        let (mut export, mut sizes) = (None, (1, DEFAULT_MAXIMUM));
        for reply in self.ask(wire::OPTION_GO, &data)? {
            match reply.kind {
                wire::REPLY_INFO => {
                    let mut data = reply.data.as_slice();
                    let too_short = |_| Error::new(ErrorKind::Protocol, self.shown, "an information that is too short");
                    match u16_of(&mut data).map_err(too_short)? {
                        wire::INFO_EXPORT => export = Some(info(&mut data).map_err(too_short)?),
                        wire::INFO_BLOCK_SIZE => {
                            let found = (|| Ok((u32_of(&mut data)?, u32_of(&mut data)?, u32_of(&mut data)?)))();
                            let (minimum, _, maximum) = found.map_err(too_short)?;
                            sizes = (minimum, maximum);
                        }
                        _ => {}
                    }
                }
                wire::REPLY_ACK => {}
                wire::REPLY_UNSUPPORTED => return Ok(None),
                _ => return Err(self.refused(&reply)),
            }
        }
        let export: Export = export.ok_or_else(|| self.protocol("the server does not say how large it is"))?;
        let (minimum, maximum) = sizes;
        if !minimum.is_power_of_two() || minimum > 64 << 10 || maximum < minimum.max(4096) {
            return Err(self.protocol(format!("blocks of {minimum} to {maximum} bytes are no sizes of requests")));
        }
        Ok(Some(Export { minimum, maximum: maximum.min(DEFAULT_MAXIMUM), ..export }))
    }

    fn export_name(&mut self, flags: u16) -> Result<Export> {
        let asked = Instant::now();
        self.send(wire::OPTION_EXPORT_NAME, self.name.as_bytes())?;
        let export = info(&mut *self.stream).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                self.error(ErrorKind::Refused, "the server closed the connection: it may have no export of this name")
            }
            _ => self.io(&error),
        })?;
        self.round_trip = self.round_trip.min(asked.elapsed());
        if flags & wire::NO_ZEROES == 0 {
            wire::bytes::<ZEROES>(&mut *self.stream).map_err(|error| self.io(&error))?;
        }
        // The protocol knows no other size without `NBD_OPT_GO`.
        Ok(Export { minimum: 512, by_name_only: true, ..export })
    }

    fn refused(&self, reply: &Reply) -> Error {
        let mut said = String::from_utf8_lossy(&reply.data).into_owned();
        if !self.name.is_empty() {
            // Servers repeat it, and a name may be all that is asked of who wants in.
            said = said.replace(self.name, "(its name)");
        }
        let said: String = said.chars().take(SAID).collect::<String>().escape_debug().collect();
        let said = if said.is_empty() { String::new() } else { format!(" ({said})") };
        let reason = match reply.kind {
            wire::REPLY_UNKNOWN => "the server has no export of this name".to_owned(),
            wire::REPLY_TLS_REQUIRED => "the server wants encryption (TLS), and none was agreed on".to_owned(),
            wire::REPLY_POLICY => "the server does not allow it".to_owned(),
            kind => format!("the server refuses it with error {:#x}", kind),
        };
        self.error(ErrorKind::Refused, format!("{reason}{said}"))
    }
}

fn info(from: &mut (impl Read + ?Sized)) -> io::Result<Export> {
    let (size, flags) = (u64_of(from)?, u16_of(from)?);
    let has = |flag| flags & wire::HAS_FLAGS != 0 && flags & flag != 0;
    Ok(Export {
        size,
        is_read_only: has(wire::READ_ONLY),
        can_multi_connect: has(wire::CAN_MULTI_CONN),
        minimum: 1,
        maximum: DEFAULT_MAXIMUM,
        is_structured: false,
        by_name_only: false,
        contexts: Vec::new(),
    })
}

/// A text as the protocol has it: its length, then its bytes.
fn text(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes(), text.as_bytes()].concat()
}
