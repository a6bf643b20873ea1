//! Encrypted connections against servers of rustls: who is trusted, both ways at once, and connections that stop anywhere.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nbd::{Stream, Upgrade};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ResolvesServerCert;
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, ServerConnection, SupportedProtocolVersion};
use xapi::{Fingerprint, Tls, TlsStream, Trust, Untrusted};

const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];
/// Long enough for a busy machine, where nothing is waited for in vain.
const PATIENCE: Duration = Duration::from_secs(60);

/// A certificate and its private key, of a server.
struct Identity {
    certificate: CertificateDer<'static>,
    pem: String,
    key: Vec<u8>,
}

impl Identity {
    /// One as a host of a pool has it: self-signed, an authority of its own if `is_authority`.
    fn self_signed(is_authority: bool) -> Self {
        let mut parameters = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        if is_authority {
            parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        Self { certificate: certificate.der().clone(), pem: certificate.pem(), key: key.serialize_der() }
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    fn pinned(&self) -> Trust {
        Trust::Pinned(vec![self.fingerprint()])
    }

    fn config(&self, version: &'static SupportedProtocolVersion) -> Arc<ServerConfig> {
        self.config_with_key(version, &self.key)
    }

    fn config_with_key(&self, version: &'static SupportedProtocolVersion, key: &[u8]) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = provider.key_provider.load_private_key(PrivateKeyDer::Pkcs8(key.to_vec().into())).unwrap();
        let resolver = Always(Arc::new(CertifiedKey::new(vec![self.certificate.clone()], key)));
        let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
        Arc::new(builder.with_no_client_auth().with_cert_resolver(Arc::new(resolver)))
    }
}

/// Shows a certificate whether it fits the key or not.
#[derive(Debug)]
struct Always(Arc<CertifiedKey>);

impl ResolvesServerCert for Always {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

type Secured = rustls::StreamOwned<ServerConnection, TcpStream>;

/// Serves one connection; returns a stream that is connected to it.
fn serve<T: Send + 'static>(act: impl FnOnce(TcpStream) -> T + Send + 'static) -> (Box<dyn Stream>, JoinHandle<T>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let serving = thread::spawn(move || act(listener.accept().unwrap().0));
    let stream = TcpStream::connect(address).unwrap();
    Stream::set_timeout(&stream, PATIENCE).unwrap();
    (Box::new(stream), serving)
}

fn secured(config: Arc<ServerConfig>, socket: TcpStream) -> Secured {
    rustls::StreamOwned::new(ServerConnection::new(config).unwrap(), socket)
}

/// Connects to a server that greets and goes.
fn greeted(config: Arc<ServerConfig>, trust: &Trust, host: &str) -> io::Result<TlsStream> {
    let (stream, serving) = serve(move |socket| {
        let mut server = secured(config, socket);
        // Who was refused is gone.
        let _ = server.write_all(b"hello").and_then(|()| server.flush());
        server.conn.send_close_notify();
        let _ = server.conn.complete_io(&mut server.sock);
    });
    let connected = Tls::new(trust, host).unwrap().connect(stream);
    let said = connected.map(|mut stream| {
        let mut said = Vec::new();
        stream.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"hello");
        stream
    });
    serving.join().unwrap();
    said
}

fn connect(identity: &Identity, stream: Box<dyn Stream>) -> Box<dyn Stream> {
    Tls::new(&identity.pinned(), "127.0.0.1").unwrap().upgrade(stream).unwrap()
}

fn content(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 31 + at / 251 + seed) % 256).unwrap()).collect()
}

#[test]
fn who_has_the_pinned_or_the_exact_certificate_is_trusted_whatever_the_host_is_called() {
    let identity = Identity::self_signed(true);
    let other = Identity::self_signed(true).fingerprint();
    let trusts = [
        identity.pinned(),
        Trust::Pinned(vec![other, identity.fingerprint()]),
        Trust::Certificate(format!("A host's certificate:\n{}", identity.pem)),
    ];
    for version in VERSIONS {
        for trust in &trusts {
            for host in ["localhost", "pool_1", "192.0.2.1", "[2001:db8::1]"] {
                let stream = greeted(identity.config(version), trust, host).unwrap();
                assert_eq!(stream.fingerprint(), identity.fingerprint());
            }
        }
    }
}

#[test]
fn another_certificate_is_refused_and_both_fingerprints_are_told() {
    let (identity, expected) = (Identity::self_signed(false), Identity::self_signed(false));
    for version in VERSIONS {
        for trust in [expected.pinned(), Trust::Certificate(expected.pem.clone())] {
            let error = greeted(identity.config(version), &trust, "localhost").err().unwrap();
            assert_eq!(Untrusted::of(&error).unwrap().seen(), Some(identity.fingerprint()));
            for fingerprint in [identity.fingerprint(), expected.fingerprint()] {
                assert!(error.to_string().contains(&fingerprint.to_string()), "{error}");
            }
        }
        let error = greeted(identity.config(version), &Trust::Unknown, "localhost").err().unwrap();
        assert_eq!(Untrusted::of(&error).unwrap().seen(), Some(identity.fingerprint()));
        assert!(error.to_string().contains("none is trusted yet"), "{error}");
    }
}

#[test]
fn the_right_certificate_without_its_private_key_is_refused() {
    let (identity, thief) = (Identity::self_signed(false), Identity::self_signed(false));
    for version in VERSIONS {
        let config = identity.config_with_key(version, &thief.key);
        let error = greeted(config, &identity.pinned(), "localhost").err().unwrap();
        assert!(error.to_string().contains("BadSignature"), "{error}");
    }
}

#[test]
fn an_authority_vouches_for_names_it_signed_and_for_nothing_self_signed() {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = vec!["pool.example".to_owned(), "192.0.2.1".to_owned()];
    let leaf = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
    let identity = Identity { certificate: leaf.der().clone(), pem: leaf.pem(), key: key.serialize_der() };
    let trust = Trust::Authority(authority.pem());
    let own = Identity::self_signed(true);
    for version in VERSIONS {
        for host in ["pool.example", "192.0.2.1"] {
            greeted(identity.config(version), &trust, host).unwrap();
        }
        let error = greeted(identity.config(version), &trust, "other.example").err().unwrap();
        assert_eq!(Untrusted::of(&error).unwrap().seen(), Some(identity.fingerprint()));
        let error = greeted(own.config(version), &Trust::Authority(own.pem.clone()), "localhost").err().unwrap();
        assert!(error.to_string().contains("can only be trusted by its fingerprint"), "{error}");
    }
    assert!(Tls::new(&trust, "pool_1 ").unwrap_err().to_string().contains("neither a name nor an address"));
}

#[test]
fn what_is_no_tls_or_stops_in_the_handshake_is_an_error_in_time() {
    let identity = Identity::self_signed(false);
    let said = |bytes: &'static [u8], is_closing: bool| {
        let (gone, wait) = mpsc::channel::<()>();
        let (stream, serving) = serve(move |mut socket| {
            socket.write_all(bytes).unwrap();
            // What the client says is taken, so that the end is no reset.
            let _ = socket.read(&mut [0; 4096]);
            if !is_closing {
                let _ = wait.recv();
            }
        });
        stream.set_timeout(Duration::from_millis(200)).unwrap();
        let error = Tls::new(&identity.pinned(), "localhost").unwrap().connect(stream).err().unwrap();
        drop(gone);
        serving.join().unwrap();
        error
    };
    let error = said(b"HTTP/1.1 400 Bad Request\r\n\r\n", true);
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    // The head of a record, and a part of a greeting in it.
    let half = b"\x16\x03\x03\x00\x5a\x02\x00\x00\x56\x03\x03";
    for bytes in [&b""[..], half] {
        assert_eq!(said(bytes, true).kind(), io::ErrorKind::UnexpectedEof);
        let error = said(bytes, false);
        assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
    }
}

#[test]
fn an_end_without_farewell_is_told_as_what_may_be_cut_off() {
    let identity = Identity::self_signed(false);
    for version in VERSIONS {
        for is_polite in [true, false] {
            let config = identity.config(version);
            let (stream, serving) = serve(move |socket| {
                let mut server = secured(config, socket);
                server.write_all(&content(0, 100_000)).unwrap();
                if is_polite {
                    server.conn.send_close_notify();
                }
                server.flush().unwrap();
                // The client's farewell, or its end.
                server.sock.shutdown(std::net::Shutdown::Write).unwrap();
                let _ = server.sock.read_to_end(&mut Vec::new());
            });
            let mut stream = connect(&identity, stream);
            let mut said = Vec::new();
            let read = stream.read_to_end(&mut said);
            assert!(said == content(0, 100_000));
            match read {
                Ok(_) => assert!(is_polite),
                Err(error) => assert_eq!((error.kind(), is_polite), (io::ErrorKind::UnexpectedEof, false), "{error}"),
            }
            drop(stream);
            serving.join().unwrap();
        }
    }
}

#[test]
fn a_record_that_somebody_changed_is_an_error_for_ever() {
    let identity = Identity::self_signed(false);
    for version in VERSIONS {
        let config = identity.config(version);
        let (stream, serving) = serve(move |mut socket| {
            let mut server = ServerConnection::new(config).unwrap();
            while server.is_handshaking() {
                server.complete_io(&mut socket).unwrap();
            }
            server.writer().write_all(&content(0, 40_000)).unwrap();
            let mut records = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut records).unwrap();
            }
            let last = records.len() - 1;
            records[last] ^= 1;
            socket.write_all(&records).unwrap();
            let _ = socket.read_to_end(&mut Vec::new());
        });
        let mut stream = connect(&identity, stream);
        let mut said = Vec::new();
        for _ in 0..2 {
            let error = stream.read_to_end(&mut said).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
        assert!(said.len() <= 40_000 && said == content(0, 40_000)[..said.len()]);
        drop(stream);
        serving.join().unwrap();
    }
}

/// How much goes each way: more than all buffers of a connection hold.
const MUCH: usize = 20 << 20;

#[test]
fn much_goes_both_ways_at_once_also_while_keys_are_renewed() {
    let identity = Identity::self_signed(false);
    for version in VERSIONS {
        let config = identity.config(version);
        let is_renewing = version.version == rustls::ProtocolVersion::TLSv1_3;
        // Reads and writes by turns what it has, so each side must go on while the other waits.
        let (stream, serving) = serve(move |mut socket| {
            let mut server = ServerConnection::new(config).unwrap();
            while server.is_handshaking() {
                server.complete_io(&mut socket).unwrap();
            }
            let (mut received, sent) = (Vec::new(), content(2, MUCH));
            let mut at = 0;
            let mut buffer = vec![0; 64 << 10];
            while received.len() < MUCH {
                if at < MUCH {
                    at += server.writer().write(&sent[at..MUCH.min(at + (128 << 10))]).unwrap();
                    if is_renewing && (at >> 17).is_multiple_of(16) {
                        server.refresh_traffic_keys().unwrap();
                    }
                    while server.wants_write() {
                        server.write_tls(&mut socket).unwrap();
                    }
                }
                server.read_tls(&mut socket).unwrap();
                server.process_new_packets().unwrap();
                while let Ok(read) = server.reader().read(&mut buffer) {
                    assert!(read > 0);
                    received.extend_from_slice(&buffer[..read]);
                }
            }
            server.writer().write_all(&sent[at..]).unwrap();
            while server.wants_write() {
                server.write_tls(&mut socket).unwrap();
            }
            received
        });
        let mut stream = connect(&identity, stream);
        let mut writer = stream.another().unwrap();
        let writing = thread::spawn(move || {
            // Pieces of all kinds of lengths.
            let (sent, mut at, mut len) = (content(1, MUCH), 0, 1);
            while at < MUCH {
                let end = MUCH.min(at + len);
                writer.write_all(&sent[at..end]).unwrap();
                (at, len) = (end, if len < 1 << 20 { len * 3 } else { 28 });
            }
            writer.flush().unwrap();
        });
        let mut received = vec![0; MUCH];
        stream.read_exact(&mut received).unwrap();
        assert!(received == content(2, MUCH));
        writing.join().unwrap();
        assert!(serving.join().unwrap() == content(1, MUCH));
    }
}

#[test]
fn a_write_that_times_out_within_a_record_loses_and_repeats_nothing() {
    let identity = Identity::self_signed(false);
    for version in VERSIONS {
        let config = identity.config(version);
        let (go, wait) = mpsc::channel::<()>();
        let (stream, serving) = serve(move |socket| {
            let mut server = secured(config, socket);
            server.conn.complete_io(&mut server.sock).unwrap();
            wait.recv().unwrap();
            let mut received = vec![0; MUCH];
            server.read_exact(&mut received).unwrap();
            received
        });
        let mut stream = connect(&identity, stream);
        stream.set_timeout(Duration::from_millis(20)).unwrap();
        let (sent, mut taken, mut timeouts) = (content(3, MUCH), 0, 0);
        while taken < MUCH {
            match stream.write(&sent[taken..]) {
                Ok(more) => taken += more,
                Err(error) => {
                    assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
                    timeouts += 1;
                    if timeouts == 3 {
                        go.send(()).unwrap();
                    }
                }
            }
        }
        assert!(timeouts >= 3);
        while stream.flush().is_err() {}
        assert!(serving.join().unwrap() == sent);
        drop(stream);
    }
}

#[test]
fn a_read_that_times_out_goes_on_where_it_was_and_a_closed_connection_ends_it() {
    let identity = Identity::self_signed(false);
    let config = identity.config(&TLS12);
    let (go, wait) = mpsc::channel::<()>();
    let (stream, serving) = serve(move |mut socket| {
        let mut server = ServerConnection::new(config).unwrap();
        while server.is_handshaking() {
            server.complete_io(&mut socket).unwrap();
        }
        server.writer().write_all(b"one record in two parts").unwrap();
        let mut records = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut records).unwrap();
        }
        for part in records.chunks(7) {
            wait.recv().unwrap();
            socket.write_all(part).unwrap();
        }
        // The farewell of the client comes before its end.
        let mut server = rustls::StreamOwned::new(server, socket);
        server.read_to_end(&mut Vec::new()).unwrap();
    });
    let mut stream = connect(&identity, stream);
    stream.set_timeout(Duration::from_millis(10)).unwrap();
    let (mut said, mut timeouts) = ([0; 23], 0);
    let read = loop {
        match stream.read(&mut said) {
            Ok(read) => break read,
            Err(error) => {
                assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
                timeouts += 1;
                go.send(()).unwrap();
            }
        }
    };
    assert_eq!((&said[..read], timeouts >= 4), (&b"one record in two parts"[..], true));
    stream.set_timeout(PATIENCE).unwrap();
    let mut reader = stream.another().unwrap();
    let reading = thread::spawn(move || reader.read(&mut [0; 1]).unwrap());
    stream.close();
    assert_eq!(reading.join().unwrap(), 0);
    serving.join().unwrap();
}
