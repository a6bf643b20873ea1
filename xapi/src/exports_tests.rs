//! Against servers that do what the one of XAPI does, and nothing else (xen-api, `ocaml/nbd/src/main.ml`; nbd, `lib/server.ml`).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::*;

const SIZE: u64 = 24 << 20;
const NAME: &str = "/01234567-89ab-4cde-8f01-23456789abcd?session_id=OpaqueRef:secret";

/// What the disk holds: no two of its sectors are the same.
fn content(offset: u64, len: usize) -> &'static [u8] {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    let whole = CONTENT.get_or_init(|| (0..SIZE / 8).flat_map(u64::to_be_bytes).collect());
    &whole[usize::try_from(offset).unwrap()..][..len]
}

/// A host with its NBD server.
struct Host {
    address: SocketAddr,
    certificate: String,
    state: Arc<HostState>,
    listening: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct HostState {
    is_over: AtomicBool,
    open: AtomicUsize,
    most: AtomicUsize,
    accepted: AtomicUsize,
    /// How many connections are greeted.
    limit: AtomicUsize,
    /// After so many reads a connection is closed in the middle of one; 0: never.
    reads: AtomicUsize,
    is_silent: AtomicBool,
}

impl Host {
    fn start(limit: usize) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["host".to_owned()]).unwrap().self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
        let (config, state) = (Arc::new(config), Arc::new(HostState::default()));
        state.limit.store(limit, Ordering::Relaxed);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let of_thread = state.clone();
        let listening = thread::spawn(move || {
            thread::scope(|scope| {
                for stream in listener.incoming() {
                    if of_thread.is_over.load(Ordering::Acquire) {
                        return;
                    }
                    let (stream, state, config) = (stream.unwrap(), &of_thread, config.clone());
                    state.accepted.fetch_add(1, Ordering::Relaxed);
                    if state.open.load(Ordering::Acquire) >= state.limit.load(Ordering::Relaxed) {
                        continue;
                    }
                    let open = state.open.fetch_add(1, Ordering::AcqRel) + 1;
                    state.most.fetch_max(open, Ordering::AcqRel);
                    scope.spawn(move || {
                        let _ = serve(stream, config, state);
                        state.open.fetch_sub(1, Ordering::AcqRel);
                    });
                }
            });
        });
        Self { address, certificate: certificate.pem(), state, listening: Some(listening) }
    }

    fn place(&self) -> NbdPlace {
        let (address, port) = (self.address.ip().to_string(), self.address.port());
        NbdPlace { exportname: NAME.to_owned(), address, port, cert: self.certificate.clone() }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        self.listening.take().unwrap().join().unwrap();
    }
}

fn numbers<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map(|()| bytes)
}

fn option(stream: &mut (impl Read + Write)) -> io::Result<(u32, Vec<u8>)> {
    assert_eq!(&numbers::<8>(stream)?, b"IHAVEOPT");
    let (option, len) = (u32::from_be_bytes(numbers(stream)?), u32::from_be_bytes(numbers(stream)?));
    let mut data = vec![0; usize::try_from(len).unwrap()];
    stream.read_exact(&mut data).map(|()| (option, data))
}

fn answer(stream: &mut impl Write, option: u32, kind: u32) -> io::Result<()> {
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    stream.write_all(&[&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &[0; 4]].concat())
}

fn serve(mut stream: TcpStream, config: Arc<ServerConfig>, state: &HostState) -> io::Result<()> {
    if state.is_silent.load(Ordering::Relaxed) {
        return stream.read(&mut [0; 1]).map(|_| ());
    }
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x01")?;
    assert_eq!(numbers::<4>(&mut stream)?, [0, 0, 0, 1]);
    assert_eq!(option(&mut stream)?.0, 5, "nothing is said in plain");
    answer(&mut stream, 5, 1)?;
    let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), stream);
    loop {
        match option(&mut stream)? {
            (1, name) if name == NAME.as_bytes() => break,
            (1, _) => return Ok(()),
            (other, _) => answer(&mut stream, other, (1 << 31) + 1)?,
        }
    }
    stream.write_all(&[&SIZE.to_be_bytes()[..], &[0, 3], &[0; 124]].concat())?;
    for served in 1.. {
        let request = numbers::<28>(&mut stream)?;
        if state.is_silent.load(Ordering::Relaxed) {
            return io::copy(&mut stream, &mut io::sink()).map(|_| ());
        }
        if request[4..8] != [0; 4] {
            return Ok(());
        }
        let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
        let len = u32::from_be_bytes(request[24..].try_into().unwrap());
        assert!(offset.is_multiple_of(512) && len.is_multiple_of(512) && len <= 2 << 20);
        let bytes = content(offset, usize::try_from(len).unwrap());
        stream.write_all(&[&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &request[8..16]].concat())?;
        let is_last = served == state.reads.load(Ordering::Relaxed);
        stream.write_all(&bytes[..if is_last { bytes.len() / 2 } else { bytes.len() }])?;
        stream.flush()?;
        if is_last {
            return Ok(());
        }
    }
    Ok(())
}

fn options(folder: &tempfile::TempDir) -> NbdOptions {
    NbdOptions {
        pause: Duration::from_millis(1),
        patience: Duration::from_millis(200),
        connect: Duration::from_secs(1),
        ..NbdOptions::new(Budget::new(folder.path()))
    }
}

fn open(places: Vec<NbdPlace>, options: NbdOptions, cancel: &Cancel) -> Result<NbdExport> {
    NbdExport::open("the disk".to_owned(), Box::new(move || Ok(places.clone())), options, cancel)
}

fn read_all(export: &NbdExport, threads: u64) {
    thread::scope(|scope| {
        for number in 0..threads {
            scope.spawn(move || {
                for at in (number << 20..SIZE).step_by(usize::try_from(threads << 20).unwrap()) {
                    let mut buffer = vec![0; 1 << 20];
                    if at & 1 << 20 == 0 {
                        export.read_at(at, &mut buffer).unwrap();
                    } else {
                        export.read_into(at, &mut buffer, 0).unwrap();
                    }
                    assert!(buffer == content(at, 1 << 20), "{at}");
                }
            });
        }
    });
}

/// Waits for what a thread of the other side does.
fn eventually(is_true: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_true() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never came to be");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_disk_is_read_by_many_threads_over_connections_that_are_made_when_it_is_read() {
    let (host, folder) = (Host::start(16), tempfile::tempdir().unwrap());
    let export = open(vec![host.place()], options(&folder), &Cancel::new()).unwrap();
    assert_eq!((export.size(), export.connections()), (SIZE, 1));
    read_all(&export, 6);
    eventually(|| export.connections() == 4);
    assert_eq!(host.state.most.load(Ordering::Acquire), 4);
    assert_eq!(export.block_status(0).unwrap(), None);
    assert_eq!(export.read_at(SIZE - 1, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
    drop(export);
    eventually(|| host.state.open.load(Ordering::Acquire) == 0);
}

#[test]
fn connections_that_break_within_a_read_are_made_anew_and_the_read_is_done_again() {
    let (host, folder) = (Host::start(16), tempfile::tempdir().unwrap());
    host.state.reads.store(5, Ordering::Relaxed);
    let options = NbdOptions { tries: 50, connections: 2, ..options(&folder) };
    let export = open(vec![host.place()], options, &Cancel::new()).unwrap();
    read_all(&export, 3);
    assert!(host.state.accepted.load(Ordering::Relaxed) >= 24 / 5);
}

#[test]
fn a_read_that_never_succeeds_is_given_up() {
    let (host, folder) = (Host::start(16), tempfile::tempdir().unwrap());
    host.state.reads.store(1, Ordering::Relaxed);
    let export = open(vec![host.place()], options(&folder), &Cancel::new()).unwrap();
    let error = export.read_at(0, &mut [0; 512]).unwrap_err();
    assert!(error.kind() == ErrorKind::Unreachable && error.to_string().contains("closed the connection"), "{error}");
    assert!(!error.to_string().contains("OpaqueRef"), "{error}");
}

#[test]
fn a_host_that_is_full_or_not_there_or_another_is_left_for_one_that_serves() {
    let (full, host, folder) = (Host::start(0), Host::start(16), tempfile::tempdir().unwrap());
    let impostor = NbdPlace { cert: full.certificate.clone(), ..host.place() };
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let nowhere = NbdPlace { port: closed, address: "127.0.0.2".to_owned(), ..host.place() };
    let refused = vec![full.place(), impostor.clone(), nowhere];
    let places = [refused.clone(), vec![host.place()]].concat();
    let export = open(places, options(&folder), &Cancel::new()).unwrap();
    read_all(&export, 2);
    drop(export);
    let error = open(refused, options(&folder), &Cancel::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    for part in ["all the connections it takes", "the fingerprint", "cannot be reached"] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert!(!error.to_string().contains("OpaqueRef"), "{error}");
}

#[test]
fn disks_share_the_slots_of_a_host_and_each_gets_one() {
    let (host, folder) = (Host::start(16), tempfile::tempdir().unwrap());
    let options = || NbdOptions { connections: 8, budget: Budget::new(folder.path()).of(3), ..options(&folder) };
    let exports: Vec<_> = (0..5).map(|_| open(vec![host.place()], options(), &Cancel::new()).unwrap()).collect();
    exports.iter().for_each(|export| read_all(export, 2));
    assert!(exports.iter().all(|export| export.connections() == 1));
    let rest: Vec<_> = (5..12).map(|_| open(vec![host.place()], options(), &Cancel::new()).unwrap()).collect();
    let error = open(vec![host.place()], options(), &Cancel::new()).unwrap_err();
    assert!(error.to_string().contains("as many of our connections as are allowed"), "{error}");
    drop((exports, rest));
    let export = open(vec![host.place()], options(), &Cancel::new()).unwrap();
    read_all(&export, 2);
    eventually(|| export.connections() == 3);
    assert!(host.state.most.load(Ordering::Acquire) <= 16);
}

#[test]
fn a_cancel_ends_a_handshake_and_a_read_that_nobody_answers() {
    let (host, folder) = (Host::start(16), tempfile::tempdir().unwrap());
    let canceller = |cancel: &Cancel, host: &Host, accepted: usize| {
        let (cancel, state) = (cancel.clone(), host.state.clone());
        thread::spawn(move || {
            eventually(|| state.accepted.load(Ordering::Relaxed) >= accepted);
            cancel.cancel();
        })
    };
    host.state.is_silent.store(true, Ordering::Relaxed);
    let cancel = Cancel::new();
    let cancelling = canceller(&cancel, &host, 1);
    let error = open(vec![host.place()], options(&folder), &cancel).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    cancelling.join().unwrap();
    host.state.is_silent.store(false, Ordering::Relaxed);
    let cancel = Cancel::new();
    let export = open(vec![host.place()], options(&folder), &cancel).unwrap();
    cancel.cancel();
    assert_eq!(export.read_at(0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn a_cancel_ends_a_read_also_while_another_connection_is_not_greeted() {
    let (host, folder) = (Host::start(16), tempfile::tempdir().unwrap());
    let cancel = Cancel::new();
    // Nothing else ends it.
    let options = NbdOptions { timeout: Duration::from_secs(3600), ..options(&folder) };
    let export = open(vec![host.place()], options, &cancel).unwrap();
    host.state.is_silent.store(true, Ordering::Relaxed);
    thread::scope(|scope| {
        let reading = scope.spawn(|| export.read_at(0, &mut [0; 512]));
        eventually(|| host.state.accepted.load(Ordering::Relaxed) >= 2);
        cancel.cancel();
        assert_eq!(reading.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    });
}
