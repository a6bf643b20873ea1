//! The NBD server: its limits, byte by byte, and the clients of libnbd.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, version};
use uuid::Uuid;
use xapi_simulator::content::Content;
use xapi_simulator::guest::Guest;
use xapi_simulator::nbd::{Export, Exports, MAX_CONNECTIONS, Security, Served, Server, parse_name};
use xapi_simulator::random::fresh_uuid;
use xapi_simulator::raw;
use xapi_simulator::transfer::unhindered;

const SESSION: &str = "OpaqueRef:1b7c";
const OPTION: &[u8] = b"IHAVEOPT";
const OPTION_REPLY: [u8; 8] = [0, 3, 0xE8, 0x89, 4, 0x55, 0x65, 0xA9];

/// A host that gives one disk to one session.
struct Host {
    disk: Content,
    security: Mutex<Security>,
    /// Where reads fail.
    fails: Range<u64>,
    /// VBDs in the control domain.
    plugged: Arc<AtomicUsize>,
    served: Arc<Served>,
}

struct Vbd(Arc<AtomicUsize>);

impl Drop for Vbd {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Exports for Host {
    fn security(&self) -> Security {
        self.security.lock().unwrap().clone()
    }

    fn open(&self, name: &str) -> Option<Export> {
        let (uuid, session) = parse_name(name)?;
        if uuid != self.disk.leaf().uuid() || session != SESSION {
            return None;
        }
        self.plugged.fetch_add(1, Ordering::SeqCst);
        let fails = self.fails.clone();
        Some(Export {
            content: self.disk.clone(),
            guard: Box::new(Vbd(self.plugged.clone())),
            before: Box::new(move |range| match range.start < fails.end && fails.start < range.end {
                true => Err(io::Error::other("the disk fails here")),
                false => Ok(()),
            }),
            served: self.served.clone(),
        })
    }
}

/// Starts a host whose disk fails within its fourth MiB.
fn host(security: Security) -> (Arc<Host>, Server) {
    failing_host(security, 3 << 20..(3 << 20) + 1)
}

fn failing_host(security: Security, fails: Range<u64>) -> (Arc<Host>, Server) {
    let mut disk = Content::new(fresh_uuid(), (9 << 20) + 512);
    Guest::new(5).fill(&mut disk, 70).unwrap();
    disk.write((9 << 20) + 500, b"the last one").unwrap();
    let host =
        Arc::new(Host { disk, security: Mutex::new(security), fails, plugged: Arc::default(), served: Arc::default() });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server::start(listener, host.clone()).unwrap();
    (host, server)
}

/// Waits, within bounds, until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

/// Reads the greeting and sends flags.
fn greeted(server: &Server, flags: u32) -> TcpStream {
    let mut stream = connect(server);
    assert_eq!(read::<18>(&mut stream), *b"NBDMAGICIHAVEOPT\x00\x01");
    stream.write_all(&flags.to_be_bytes()).unwrap();
    stream
}

fn read<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Reads to the end of the connection; one that is reset has ended, too.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("{error}"),
        _ => bytes,
    }
}

fn send_option(stream: &mut TcpStream, option: u32, data: &[u8]) {
    let mut bytes = Vec::from(OPTION);
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes).unwrap();
}

/// Sends an option and returns the kind of the reply, which has no data.
fn ask(stream: &mut TcpStream, option: u32) -> u32 {
    send_option(stream, option, b"xy");
    let reply: [u8; 20] = read(stream);
    assert_eq!(reply[..8], OPTION_REPLY);
    assert_eq!(reply[8..12], option.to_be_bytes());
    assert_eq!(reply[16..], [0; 4]);
    u32::from_be_bytes(reply[12..16].try_into().unwrap())
}

fn name(uuid: Uuid, session: &str) -> Vec<u8> {
    format!("/{uuid}?session_id={session}").into_bytes()
}

/// Returns a connection that has the disk.
fn opened(host: &Host, server: &Server) -> TcpStream {
    let mut stream = greeted(server, 1);
    send_option(&mut stream, 1, &name(host.disk.leaf().uuid(), SESSION));
    let reply: [u8; 134] = read(&mut stream);
    assert_eq!(reply[..8], host.disk.size().to_be_bytes());
    assert_eq!(reply[8..10], [0, 3]);
    assert_eq!(reply[10..], [0; 124]);
    stream
}

fn request(flags: u16, kind: u16, handle: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(handle.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

fn reply(error: u32, handle: u64) -> Vec<u8> {
    let mut bytes = vec![0x67, 0x44, 0x66, 0x98];
    bytes.extend(error.to_be_bytes());
    bytes.extend(handle.to_be_bytes());
    bytes
}

/// Makes a certificate for `localhost` in a folder, as clients of libnbd want it, and the server's side.
fn tls(folder: &Path) -> Security {
    let key = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let certificate = rcgen::CertificateParams::new(["localhost".into()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(folder.join("ca-cert.pem"), certificate.pem()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .unwrap();
    Security::Tls(Arc::new(config))
}

#[test]
fn in_cleartext_it_knows_the_name_of_a_disk_and_refuses_what_is_newer() {
    let (host, server) = host(Security::Cleartext);
    let mut stream = greeted(&server, 1);
    let said: Vec<u32> = [5, 3, 6, 7, 8, 9, 10, 11, 99].map(|option| ask(&mut stream, option)).into();
    let (unsupported, policy) = (0x8000_0001, 0x8000_0002);
    let expected = [vec![policy; 2], vec![unsupported; 7]].concat();
    assert_eq!(said, expected);
    send_option(&mut stream, 1, &name(host.disk.leaf().uuid(), SESSION));
    assert_eq!(read::<134>(&mut stream)[..8], host.disk.size().to_be_bytes());
    assert_eq!(host.plugged.load(Ordering::SeqCst), 1);
    drop(stream);
    until("the VBD is gone", || host.plugged.load(Ordering::SeqCst) == 0);

    let mut stream = greeted(&server, 1);
    assert_eq!(ask(&mut stream, 2), 1);
    assert_eq!(rest(&mut stream), b"");
    // What was not offered: no zeroes.
    assert_eq!(rest(&mut greeted(&server, 3)), b"");
}

#[test]
fn where_tls_is_a_must_nothing_goes_without() {
    let folder = tempfile::tempdir().unwrap();
    let (host, server) = host(tls(folder.path()));
    let mut stream = greeted(&server, 1);
    assert_eq!([3, 6, 7, 8, 10].map(|option| ask(&mut stream, option)), [0x8000_0005; 5]);
    send_option(&mut stream, 1, &name(host.disk.leaf().uuid(), SESSION));
    assert_eq!(rest(&mut stream), b"");
    let mut stream = greeted(&server, 1);
    send_option(&mut stream, 2, &[]);
    assert_eq!(rest(&mut stream), b"");
    assert_eq!(rest(&mut greeted(&server, 0)), b"");
    assert_eq!(host.plugged.load(Ordering::SeqCst), 0);
    // It is decided for each connection anew.
    *host.security.lock().unwrap() = Security::Refused;
    assert_eq!(rest(&mut connect(&server)), b"");
}

#[test]
fn a_name_that_is_not_valid_ends_the_connection() {
    let (host, server) = host(Security::Cleartext);
    let disk = host.disk.leaf().uuid();
    for name in [name(disk, "OpaqueRef:other"), name(fresh_uuid(), SESSION), Vec::new(), vec![0xFF; 5], vec![b'/'; 9]] {
        let mut stream = greeted(&server, 1);
        send_option(&mut stream, 1, &name);
        assert_eq!(rest(&mut stream), b"");
    }
    let mut stream = greeted(&server, 1);
    stream.write_all(&[OPTION, &[0, 0, 0, 6], &[0xFF; 4]].concat()).unwrap();
    assert_eq!(rest(&mut stream), b"");
}

#[test]
fn reads_are_answered_in_their_order_and_counted() {
    let (host, server) = host(Security::Cleartext);
    let mut stream = opened(&host, &server);
    let size = host.disk.size();
    let reads = [(7_u64, 0_u64, 2_u32 << 20), (8, size - 512, 512), (9, 4 << 20, 0), (10, 512, 1024)];
    let requests: Vec<u8> =
        reads.iter().flat_map(|(handle, offset, length)| request(0, 0, *handle, *offset, *length)).collect();
    stream.write_all(&requests).unwrap();
    for (handle, offset, length) in reads {
        let mut data = vec![0; usize::try_from(length).unwrap()];
        host.disk.read(offset, &mut data).unwrap();
        let mut answer = vec![0; 16 + data.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..16], reply(0, handle));
        assert!(answer[16..] == data, "read {handle}");
    }
    stream.write_all(&request(0, 2, 11, 0, 0)).unwrap();
    assert_eq!(rest(&mut stream), b"");
    until("the VBD is gone", || host.plugged.load(Ordering::SeqCst) == 0);
    let mut expected: BTreeMap<u64, u64> = (0..32).map(|run| (run, 65536)).collect();
    expected.insert(0, 65536 + 1024);
    expected.insert((size - 512) / 65536, 512);
    assert_eq!(host.served.runs(), expected);
    assert_eq!(host.served.bytes(), (2 << 20) + 512 + 1024);
}

#[test]
fn what_is_not_a_read_of_sectors_ends_the_connection() {
    let (host, server) = host(Security::Cleartext);
    let (refused, invalid) = (1, 22);
    for (flags, kind, offset, length, error) in [
        (0, 1, 0, 512, refused),
        (0, 3, 0, 0, invalid),
        (0, 4, 0, 512, invalid),
        (0, 7, 0, 512, invalid),
        (1, 0, 0, 512, invalid),
        (1, 2, 0, 0, invalid),
        (0, 0, 1, 512, invalid),
        (0, 0, 512, 511, invalid),
        (0, 0, 0, 0x8000_0000, invalid),
    ] {
        let mut stream = opened(&host, &server);
        stream.write_all(&request(flags, kind, 3, offset, length)).unwrap();
        assert_eq!(rest(&mut stream), reply(error, 3), "{flags} {kind} {offset} {length}");
    }
    let mut stream = opened(&host, &server);
    stream.write_all(&[0; 28]).unwrap();
    assert_eq!(rest(&mut stream), b"");
}

#[test]
fn a_read_that_fails_has_begun_well() {
    let (host, server) = host(Security::Cleartext);
    // The third piece fails; past the end, the last one.
    for (offset, length, sent) in [(2 << 20, 4 << 20, 1 << 20), (9 << 20, 1024, 0), (u64::MAX - 511, 1024, 0)] {
        let mut stream = opened(&host, &server);
        stream.write_all(&request(0, 0, 5, offset, length)).unwrap();
        let answer = rest(&mut stream);
        assert_eq!(answer[..16], reply(0, 5));
        assert_eq!(answer.len() - 16, sent, "{offset}");
    }
    until("the VBDs are gone", || host.plugged.load(Ordering::SeqCst) == 0);
}

#[test]
fn the_seventeenth_connection_is_closed_without_a_byte() {
    let (host, server) = host(Security::Cleartext);
    let mut streams: Vec<TcpStream> = (0..MAX_CONNECTIONS).map(|_| greeted(&server, 1)).collect();
    assert_eq!(rest(&mut connect(&server)), b"");
    drop(streams.pop());
    until("a place is free", || server.connections() < MAX_CONNECTIONS);
    streams.push(opened(&host, &server));
    assert_eq!((server.connections(), host.plugged.load(Ordering::SeqCst)), (16, 1));

    // A restart of the daemon; a stop waits for the ends.
    server.cut();
    for stream in &mut streams {
        assert_eq!(rest(stream), b"");
    }
    until("all have ended", || server.connections() == 0);
    let mut last = opened(&host, &server);
    let address = server.address();
    drop(server);
    assert_eq!(host.plugged.load(Ordering::SeqCst), 0);
    assert_eq!(rest(&mut last), b"");
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn clients_of_libnbd_read_all_bytes_with_and_without_tls() {
    let folder = tempfile::tempdir().unwrap();
    let (mut disk, copy) = (Vec::new(), folder.path().join("copy"));
    for security in [Security::Cleartext, tls(folder.path())] {
        let scheme = if matches!(security, Security::Cleartext) { "nbd" } else { "nbds" };
        let (host, server) = failing_host(security, 0..0);
        let uri = format!(
            "{scheme}://localhost:{}/%2F{}%3Fsession_id%3D{SESSION}?tls-certificates={}",
            server.address().port(),
            host.disk.leaf().uuid(),
            folder.path().display()
        );
        let info = Command::new("nbdinfo").arg(&uri).output().expect("nbdinfo is installed");
        let said = String::from_utf8(info.stdout).unwrap();
        assert!(info.status.success(), "{}", String::from_utf8_lossy(&info.stderr));
        for part in [&format!("export-size: {}", host.disk.size()), "is_read_only: true", "can_multi_conn: false"] {
            assert!(said.contains(part), "{part} in {said}");
        }
        assert!(
            said.contains(&format!(
                "protocol: newstyle-fixed with{} TLS, using simple packets",
                if scheme == "nbd" { "out" } else { "" }
            )),
            "{said}"
        );
        let status = Command::new("nbdcopy").args([&uri, copy.to_str().unwrap()]).status().unwrap();
        assert!(status.success());
        disk.clear();
        raw::export(&host.disk, &mut disk, &mut unhindered).unwrap();
        assert!(std::fs::read(&copy).unwrap() == disk, "{scheme}");
        assert!(host.served.bytes() >= host.disk.size());
        drop(server);
        assert_eq!(host.plugged.load(Ordering::SeqCst), 0);
    }
}
