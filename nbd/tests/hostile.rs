//! Servers that do not keep to the protocol, and ones that use all of it: each answer is right, or an error that says why.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nbd::{ALLOCATION, Connection, Error, ErrorKind, Options, Status, Stream, Upgrade, dirty_bitmap};

const SIZE: u64 = 1 << 20;
const REPLY: u64 = 0x0003_e889_0455_65a9;
const STRUCTURED: u32 = 0x668e_33ef;
const SIMPLE: u32 = 0x6744_6698;

/// The other end of a connection.
struct Server(Box<dyn Stream>);

/// What a server does once the export is agreed on.
type Act = Box<dyn FnOnce(&mut Server) + Send>;

impl Server {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn number(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).try_into().unwrap())
    }

    fn send(&mut self, parts: &[&[u8]]) {
        // Who was refused is gone.
        let _ = self.0.write_all(&parts.concat());
    }

    fn greet(&mut self) {
        self.send(&[b"NBDMAGICIHAVEOPT", &3_u16.to_be_bytes()]);
        assert_eq!(self.number(), 3);
    }

    /// Takes an option; returns it with its data.
    fn option(&mut self) -> (u32, Vec<u8>) {
        assert_eq!(self.bytes(8), b"IHAVEOPT");
        let (option, len) = (self.number(), self.number());
        (option, self.bytes(usize::try_from(len).unwrap()))
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        self.send(&[&REPLY.to_be_bytes(), &option.to_be_bytes(), &kind.to_be_bytes(), &len.to_be_bytes(), data]);
    }

    /// Agrees on an export of [`SIZE`] bytes, with both contexts if replies are structured.
    fn agree(&mut self, is_structured: bool, minimum: u32) {
        self.greet();
        self.agree_after_greeting(is_structured, minimum);
    }

    fn agree_after_greeting(&mut self, is_structured: bool, minimum: u32) {
        loop {
            match self.option() {
                (8, _) if is_structured => self.answer(8, 1, &[]),
                (10, data) => {
                    assert!(data.ends_with(b"qemu:dirty-bitmap:b0"));
                    for (id, name) in [(7_u32, "base:allocation"), (8, "qemu:dirty-bitmap:b0")] {
                        self.answer(10, 4, &[&id.to_be_bytes(), name.as_bytes()].concat());
                    }
                    self.answer(10, 1, &[]);
                }
                (7, data) => {
                    assert_eq!(data, b"\0\0\0\x04disk\0\x01\0\x03");
                    let sizes = [&3_u16.to_be_bytes()[..], &minimum.to_be_bytes(), &4096_u32.to_be_bytes(), &[0xff; 4]];
                    self.answer(7, 3, &sizes.concat());
                    self.answer(7, 3, &[&[0, 0], &SIZE.to_be_bytes()[..], &0x103_u16.to_be_bytes()].concat());
                    self.answer(7, 1, &[]);
                    return;
                }
                (option, _) => self.answer(option, (1 << 31) + 1, b"no"),
            }
        }
    }

    /// Takes a request: its command, cookie, offset and length; `None` when the client goes.
    fn request(&mut self) -> Option<(u16, u64, u64, u32)> {
        let mut bytes = [0; 28];
        self.0.read_exact(&mut bytes).ok()?;
        assert_eq!(bytes[..4], 0x2560_9513_u32.to_be_bytes());
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let command = u16::from_be_bytes([bytes[6], bytes[7]]);
        let len = u32::from_be_bytes(bytes[24..].try_into().unwrap());
        (command != 2).then_some((command, number(8), number(16), len))
    }

    fn chunk(&mut self, is_last: bool, kind: u16, cookie: u64, parts: &[&[u8]]) {
        let len = u32::try_from(parts.concat().len()).unwrap();
        self.head(is_last, kind, cookie, len);
        self.send(parts);
    }

    fn head(&mut self, is_last: bool, kind: u16, cookie: u64, len: u32) {
        let flags = u16::from(is_last).to_be_bytes();
        self.send(&[&STRUCTURED.to_be_bytes(), &flags, &kind.to_be_bytes(), &cookie.to_be_bytes(), &len.to_be_bytes()]);
    }
}

/// What the test export holds at an offset.
fn byte(offset: u64) -> u8 {
    u8::try_from(offset % 251).unwrap()
}

fn content(offset: u64, len: u32) -> Vec<u8> {
    (offset..offset + u64::from(len)).map(byte).collect()
}

fn options() -> Options {
    let contexts = vec![ALLOCATION.to_owned(), dirty_bitmap("b0")];
    Options { timeout: Duration::from_millis(300), contexts, encryption: None, by_name_only: false }
}

fn connect(act: Act) -> (Result<Connection, Error>, JoinHandle<()>) {
    connect_with(&options(), act)
}

fn connect_with(options: &Options, act: Act) -> (Result<Connection, Error>, JoinHandle<()>) {
    let (client, server) = UnixStream::pair().unwrap();
    let serving = thread::spawn(move || act(&mut Server(Box::new(server))));
    (Connection::over(Box::new(client), "disk", "'disk' of the test", options), serving)
}

/// The error of a client whose server does `act`, in the handshake or when it reads 8 bytes at 4096.
fn error_of(act: Act) -> Error {
    let (connection, serving) = connect(act);
    let failed = connection.and_then(|connection| connection.read(4096, &mut [0; 8])).unwrap_err();
    serving.join().unwrap();
    assert!(failed.to_string().starts_with("the NBD export 'disk' of the test: "), "{failed}");
    failed
}

#[test]
fn a_server_that_breaks_the_handshake_is_refused_with_the_reason() {
    let wait = |server: &mut Server| drop(server.0.read(&mut [0; 1]));
    let cases: Vec<(&str, ErrorKind, Act)> = vec![
        ("no NBD server", ErrorKind::Protocol, Box::new(|it| it.send(&[b"HTTP/1.1 400 Bad Request\r\n\r\n"]))),
        (
            "an old form of NBD",
            ErrorKind::Protocol,
            Box::new(|it| it.send(&[b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53", &[0; 152]])),
        ),
        ("an old form of NBD", ErrorKind::Protocol, Box::new(|it| it.send(&[b"NBDMAGICIHAVEOPT\0\0"]))),
        ("all the connections it takes", ErrorKind::Busy, Box::new(|_| {})),
        ("closed the connection", ErrorKind::Unavailable, Box::new(|it| it.send(&[b"N"]))),
        ("closed the connection", ErrorKind::Unavailable, Box::new(|it| it.send(&[b"NBDMAGICIH"]))),
        ("does not answer", ErrorKind::Unavailable, Box::new(move |it| wait(it))),
        (
            "an answer to option 8 was expected",
            ErrorKind::Protocol,
            Box::new(|it| {
                it.greet();
                it.option();
                it.answer(9, 1, &[]);
            }),
        ),
        (
            "an answer of 4294967295 bytes",
            ErrorKind::Protocol,
            Box::new(|it| {
                it.greet();
                it.option();
                it.send(&[&REPLY.to_be_bytes(), &8_u32.to_be_bytes(), &1_u32.to_be_bytes(), &[0xff; 4]]);
            }),
        ),
        (
            "does not end its answers",
            ErrorKind::Protocol,
            Box::new(|it| {
                it.greet();
                it.option();
                (0..300).for_each(|_| it.answer(8, 4, &[0; 4]));
            }),
        ),
        (
            "wants encryption",
            ErrorKind::Refused,
            Box::new(|it| {
                it.greet();
                it.option();
                it.answer(8, (1 << 31) + 5, &[]);
            }),
        ),
        (
            // Its name may be a secret.
            "has no export of this name (no (its name)\\u{1b}[2J)",
            ErrorKind::Refused,
            Box::new(|it| {
                it.greet();
                for option in [8, 7] {
                    it.option();
                    it.answer(option, if option == 8 { (1 << 31) + 1 } else { (1 << 31) + 6 }, b"no disk\x1b[2J");
                }
            }),
        ),
        (
            "does not say how large it is",
            ErrorKind::Protocol,
            Box::new(|it| {
                it.greet();
                for _ in 0..3 {
                    let (option, _) = it.option();
                    it.answer(option, 1, &[]);
                }
            }),
        ),
        (
            "more than an export can have",
            ErrorKind::Protocol,
            Box::new(|it| {
                it.greet();
                for _ in 0..3 {
                    let (option, _) = it.option();
                    if option == 7 {
                        it.answer(7, 3, &[&[0, 0], &[0xff_u8; 8][..], &[0, 3]].concat());
                    }
                    it.answer(option, 1, &[]);
                }
            }),
        ),
        ("no sizes of requests", ErrorKind::Protocol, Box::new(|it| it.agree(true, 3))),
    ];
    for (part, kind, act) in cases {
        let error = error_of(act);
        assert!(error.kind() == kind && error.to_string().contains(part), "{part}: {:?} {error}", error.kind());
    }
}

#[test]
fn a_reply_that_does_not_fit_what_was_asked_ends_the_connection() {
    type Answer = fn(&mut Server, u64);
    let cases: Vec<(&str, Answer)> = vec![
        ("begins with 0xdeadbeef", |it, _| it.send(&[&0xdead_beef_u32.to_be_bytes()])),
        ("a request that was not made", |it, cookie| it.chunk(true, 0, cookie + 9, &[])),
        ("where structured ones were agreed on", |it, cookie| {
            it.send(&[&SIMPLE.to_be_bytes(), &[0; 4], &cookie.to_be_bytes(), &[0; 8]]);
        }),
        ("4294967287 bytes at 4096, which were not asked for", |it, cookie| {
            it.head(true, 1, cookie, u32::MAX);
            it.send(&[&4096_u64.to_be_bytes()]);
        }),
        ("8 bytes at 4095, which were", |it, cookie| it.chunk(true, 1, cookie, &[&4095_u64.to_be_bytes(), &[0; 8]])),
        ("1 bytes at 4104, which were", |it, cookie| it.chunk(true, 1, cookie, &[&4104_u64.to_be_bytes(), &[0; 1]])),
        ("0 bytes at 4096, which were", |it, cookie| it.chunk(true, 2, cookie, &[&4096_u64.to_be_bytes(), &[0; 4]])),
        ("a chunk of type 1 with 8 bytes", |it, cookie| it.chunk(true, 1, cookie, &[&4096_u64.to_be_bytes()])),
        ("a chunk of type 6 with 3 bytes", |it, cookie| it.chunk(true, 6, cookie, &[&[0; 3]])),
        ("a chunk of type 5 with 12 bytes", |it, cookie| it.chunk(true, 5, cookie, &[&[0; 12]])),
        ("a chunk of type 0 with 1 bytes", |it, cookie| it.chunk(true, 0, cookie, &[&[0; 1]])),
        ("came twice", |it, cookie| {
            (0..2).for_each(|_| it.chunk(false, 1, cookie, &[&4096_u64.to_be_bytes(), &[0; 5]]));
        }),
        ("without all of the 8 bytes", |it, cookie| it.chunk(true, 0, cookie, &[])),
        ("without all of the 8 bytes", |it, cookie| it.chunk(true, 1, cookie, &[&4097_u64.to_be_bytes(), &[0; 7]])),
        ("an error of 5 bytes", |it, cookie| it.chunk(true, 0x8001, cookie, &[&[0; 5]])),
        ("an error of 1000000000 bytes", |it, cookie| it.head(true, 0x8001, cookie, 1_000_000_000)),
        ("longer than its chunk", |it, cookie| it.chunk(true, 0x8001, cookie, &[&[0, 0, 0, 5, 0xff, 0xff]])),
        ("closed the connection", |it, cookie| it.head(true, 1, cookie, 16)),
        ("does not answer", |it, _| drop(it.0.read(&mut [0; 1]))),
    ];
    for (part, answer) in cases {
        let error = error_of(Box::new(move |it| {
            it.agree(true, 1);
            let (_, cookie, offset, len) = it.request().unwrap();
            assert_eq!((offset, len), (4096, 8));
            answer(it, cookie);
        }));
        assert!(error.to_string().contains(part), "{part}: {error}");
        assert!(matches!(error.kind(), ErrorKind::Protocol | ErrorKind::Unavailable), "{part}");
    }
}

#[test]
fn an_answer_in_countless_pieces_is_given_up() {
    let (connection, serving) = connect(Box::new(|it| {
        it.agree(true, 1);
        let (_, cookie, offset, len) = it.request().unwrap();
        for at in offset..offset + u64::from(len) {
            it.chunk(false, 1, cookie, &[&at.to_be_bytes(), &[byte(at)]]);
        }
    }));
    let error = connection.unwrap().read(0, &mut vec![0; 8192]).unwrap_err();
    assert!(error.to_string().contains("more than 4096 pieces"), "{error}");
    serving.join().unwrap();
}

#[test]
fn an_error_of_one_request_is_told_and_the_connection_goes_on() {
    for is_structured in [true, false] {
        let (connection, serving) = connect(Box::new(move |it| {
            it.agree(is_structured, 1);
            for number in 0.. {
                let Some((_, cookie, offset, len)) = it.request() else { return };
                let (error, bytes) = (if number == 0 { 5_u32 } else { 0 }, content(offset, len));
                match (is_structured, number) {
                    (true, 0) => {
                        // A part of it came, and an error about the rest.
                        it.chunk(false, 1, cookie, &[&offset.to_be_bytes(), &bytes[..3]]);
                        it.chunk(
                            true,
                            0x8002,
                            cookie,
                            &[&error.to_be_bytes(), &[0, 3], b"bad", &(offset + 3).to_be_bytes()],
                        );
                    }
                    (true, _) => it.chunk(true, 1, cookie, &[&offset.to_be_bytes(), &bytes]),
                    (false, 0) => it.send(&[&SIMPLE.to_be_bytes(), &error.to_be_bytes(), &cookie.to_be_bytes()]),
                    (false, _) => it.send(&[&SIMPLE.to_be_bytes(), &[0; 4], &cookie.to_be_bytes(), &bytes]),
                }
            }
        }));
        let connection = connection.unwrap();
        let error = connection.read(4096, &mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Failed, "{error}");
        let said = "cannot read 8 bytes at 4096: input/output error (5)";
        assert!(error.to_string().contains(said) && error.to_string().contains("bad") == is_structured, "{error}");
        let mut buffer = [0; 8];
        connection.read(4096, &mut buffer).unwrap();
        assert_eq!(buffer.to_vec(), content(4096, 8));
        drop(connection);
        serving.join().unwrap();
    }
}

#[test]
fn replies_in_another_order_and_in_pieces_reach_who_asked() {
    // Waits for all four, and answers the last one first, its end before its beginning, the pieces mixed.
    let (connection, serving) = connect(Box::new(|it| {
        it.agree(true, 1);
        let mut requests: Vec<_> = (0..4).map(|_| it.request().unwrap()).collect();
        requests.sort();
        for part in [1, 0] {
            for (_, cookie, offset, len) in requests.iter().rev() {
                let (at, half) = (offset + u64::from(len / 2 * part), len / 2);
                it.chunk(part == 0, 1, *cookie, &[&at.to_be_bytes(), &content(at, half)]);
            }
        }
        assert_eq!(it.request(), None);
    }));
    let connection = connection.unwrap();
    thread::scope(|scope| {
        for reader in 0..4_u64 {
            let connection = &connection;
            scope.spawn(move || {
                let mut buffer = vec![0; 1000];
                connection.read(reader * 5000, &mut buffer).unwrap();
                assert!(buffer == content(reader * 5000, 1000), "{reader}");
            });
        }
    });
    drop(connection);
    serving.join().unwrap();
}

#[test]
fn a_range_is_asked_for_in_whole_blocks_of_the_server_and_holes_are_zeroes() {
    let (connection, serving) = connect(Box::new(|it| {
        it.agree(true, 4096);
        let (_, cookie, offset, len) = it.request().unwrap();
        assert_eq!((offset, len), (4096, 12288));
        it.chunk(false, 1, cookie, &[&4096_u64.to_be_bytes(), &content(4096, 4096)]);
        it.chunk(false, 2, cookie, &[&8192_u64.to_be_bytes(), &8192_u32.to_be_bytes()]);
        it.chunk(true, 0, cookie, &[]);
        assert_eq!(it.request(), None);
    }));
    let connection = connection.unwrap();
    let mut buffer = vec![0xee; 5000];
    connection.read(8000, &mut buffer).unwrap();
    assert_eq!(buffer[..192], content(8000, 192));
    assert!(buffer[192..].iter().all(|byte| *byte == 0));
    for (offset, len) in [(SIZE - 1, 2), (u64::MAX, 1), (SIZE + 1, 0)] {
        let error = connection.read(offset, &mut vec![0; len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{offset}");
    }
    drop(connection);
    serving.join().unwrap();
}

#[test]
fn a_buffer_that_is_given_away_comes_back_with_what_was_asked_for_behind_its_head() {
    let (connection, serving) = connect(Box::new(|it| {
        it.agree(true, 4096);
        for expected in [(8192, 8192), (SIZE - 4096, 4096), (4096, 8192)].into_iter().flat_map(|range| [range; 2]) {
            let (_, cookie, offset, len) = it.request().unwrap();
            assert_eq!((offset, len), expected);
            it.chunk(true, 1, cookie, &[&offset.to_be_bytes(), &content(offset, len)]);
        }
        let (_, cookie, ..) = it.request().unwrap();
        it.chunk(true, 0x8001, cookie, &[&5_u32.to_be_bytes(), &[0, 0]]);
        assert_eq!(it.request(), None);
    }));
    let connection = connection.unwrap();
    // What is no whole blocks is read as ever.
    for (offset, len) in [(8192, 8192), (SIZE - 4096, 4096), (8000, 400)] {
        for head in [0, 512] {
            let mut buffer = vec![0xee; head + usize::try_from(len).unwrap()];
            connection.read_into(offset, &mut buffer, head).unwrap();
            assert!(buffer[..head] == vec![0xee; head] && buffer[head..] == content(offset, len), "{len} at {offset}");
        }
    }
    let error = connection.read_into(0, &mut vec![0; 4096], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Failed, "{error}");
    let error = connection.read_into(SIZE, &mut vec![0; 1], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    drop(connection);
    serving.join().unwrap();
}

#[test]
fn what_is_allocated_and_dirty_is_told_from_the_byte_asked_for_to_the_end() {
    let extents = |parts: &[(u32, u32)]| -> Vec<u8> {
        parts.iter().flat_map(|(len, flags)| [len.to_be_bytes(), flags.to_be_bytes()].concat()).collect()
    };
    let (connection, serving) = connect(Box::new(move |it| {
        it.agree(true, 512);
        while let Some((command, cookie, offset, len)) = it.request() {
            assert_eq!((command, offset, u64::from(len)), (7, 512, SIZE - 512));
            it.chunk(false, 5, cookie, &[&8_u32.to_be_bytes(), &extents(&[(1000, 1), (u32::MAX, 0), (1, 1)])]);
            it.chunk(true, 5, cookie, &[&7_u32.to_be_bytes(), &extents(&[(100, 0), (512, 3), (1000, 0)])]);
        }
    }));
    let connection = connection.unwrap();
    assert!(connection.export().can_multi_connect && connection.export().is_read_only);
    let status = |context: &str| connection.block_status(context, 700).unwrap();
    let allocated = [(424, 3), (1000, 0)].map(|(len, flags)| Status { len, flags });
    assert_eq!(status(ALLOCATION), Some(allocated.to_vec()));
    let dirty = [(812, 1), (SIZE - 1512, 0)].map(|(len, flags)| Status { len, flags });
    assert_eq!(status(&dirty_bitmap("b0")), Some(dirty.to_vec()));
    assert_eq!(status("other"), None);
    drop(connection);
    serving.join().unwrap();
}

#[test]
fn an_account_of_blocks_that_cannot_be_is_refused() {
    for (part, body) in [
        ("nothing is told", &[0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0][..]),
        ("an extent without length", &[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("a chunk of type 5 with 13 bytes", &[0; 13]),
    ] {
        let (connection, serving) = connect(Box::new(move |it| {
            it.agree(true, 1);
            let (_, cookie, ..) = it.request().unwrap();
            it.chunk(true, 5, cookie, &[body]);
        }));
        let error = connection.unwrap().block_status(ALLOCATION, 0).unwrap_err();
        assert!(error.kind() == ErrorKind::Protocol && error.to_string().contains(part), "{part}: {error}");
        serving.join().unwrap();
    }
}

#[test]
fn a_server_that_knows_only_the_name_of_an_export_is_read_from() {
    // As the one of XAPI: no structured replies, no NBD_OPT_GO, always the zeroes. Where that is known it is not asked for them.
    for is_known in [false, true] {
        let act: Act = Box::new(move |it| {
            it.send(&[b"NBDMAGICIHAVEOPT", &1_u16.to_be_bytes()]);
            assert_eq!(it.number(), 1);
            for option in if is_known { &[][..] } else { &[8, 7] } {
                assert_eq!(it.option().0, *option);
                it.answer(*option, (1 << 31) + 1, &[]);
            }
            assert_eq!(it.option(), (1, b"disk".to_vec()));
            it.send(&[&SIZE.to_be_bytes(), &3_u16.to_be_bytes(), &[0; 124]]);
            while let Some((_, cookie, offset, len)) = it.request() {
                assert_eq!((offset % 512, len % 512), (0, 0));
                it.send(&[&SIMPLE.to_be_bytes(), &[0; 4], &cookie.to_be_bytes(), &content(offset, len)]);
            }
        });
        let (connection, serving) = connect_with(&Options { by_name_only: is_known, ..options() }, act);
        let connection = connection.unwrap();
        let export = connection.export();
        assert_eq!((export.size, export.is_read_only, export.by_name_only), (SIZE, true, true));
        let mut buffer = vec![0; 100_000];
        connection.read(777, &mut buffer).unwrap();
        assert!(buffer == content(777, 100_000));
        assert_eq!(connection.block_status(ALLOCATION, 0).unwrap(), None);
        drop(connection);
        serving.join().unwrap();
    }
}

/// Bytes with all bits turned around: an encryption that anybody sees through, but that is not plain.
struct Turned(Box<dyn Stream>);

impl Read for Turned {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        buffer[..read].iter_mut().for_each(|byte| *byte = !*byte);
        Ok(read)
    }
}

impl Write for Turned {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(&bytes.iter().map(|byte| !byte).collect::<Vec<_>>())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Stream for Turned {
    fn another(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Self(self.0.another()?)))
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.0.set_timeout(timeout)
    }

    fn set_waiting(&self, waits: bool) -> io::Result<()> {
        self.0.set_waiting(waits)
    }

    fn close(&self) {
        self.0.close();
    }
}

/// Turns a connection around, or refuses to.
#[derive(Debug)]
struct Turn(bool);

impl Upgrade for Turn {
    fn upgrade(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        if self.0 { Ok(Box::new(Turned(stream))) } else { Err(io::Error::other("another certificate")) }
    }
}

#[test]
fn where_encryption_is_wanted_nothing_but_its_beginning_is_said_in_plain() {
    for (answer, is_right, expected) in [
        (1_u32, true, None),
        (1, false, Some("cannot be encrypted: another certificate")),
        ((1 << 31) + 1, true, Some("does not encrypt (TLS)")),
        ((1 << 31) + 2, true, Some("does not encrypt (TLS)")),
    ] {
        let (client, server) = UnixStream::pair().unwrap();
        let serving = thread::spawn(move || {
            let mut it = Server(Box::new(server));
            it.greet();
            assert_eq!(it.option(), (5, Vec::new()));
            it.answer(5, answer, &[]);
            if expected.is_some() {
                // No other word.
                assert_eq!(it.0.read(&mut [0; 1]).unwrap(), 0);
                return;
            }
            let mut it = Server(Box::new(Turned(it.0)));
            it.agree_after_greeting(true, 1);
            let (_, cookie, offset, len) = it.request().unwrap();
            it.chunk(true, 1, cookie, &[&offset.to_be_bytes(), &content(offset, len)]);
            assert_eq!(it.request(), None);
        });
        let options = Options { encryption: Some(Arc::new(Turn(is_right))), ..options() };
        let connection = Connection::over(Box::new(client), "disk", "'disk' of the test", &options);
        match (connection, expected) {
            (Ok(connection), None) => {
                let mut buffer = [0; 100];
                connection.read(5, &mut buffer).unwrap();
                assert_eq!(buffer.to_vec(), content(5, 100));
            }
            (Err(error), Some(part)) => {
                assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(part), "{error}");
            }
            (connection, _) => panic!("{:?} {expected:?}", connection.err()),
        }
        serving.join().unwrap();
    }
}
