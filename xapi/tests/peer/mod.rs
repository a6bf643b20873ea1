//! A server that answers as a pool does, but for what a test says it answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use xapi::{Settings, Trust};
use zeroize::Zeroizing;

pub const SESSION: &str = "OpaqueRef:session-that-nobody-may-see";
pub const PASSWORD: &str = "password-that-nobody-may-see";

/// A call, or the request of a transfer.
#[derive(Debug, Clone)]
pub struct Request {
    /// `VM.get_all`, or `GET /export/`.
    pub method: String,
    pub params: Vec<Value>,
}

#[derive(Clone)]
pub enum Answer {
    Result(Value),
    /// The error of a reply.
    Error(Value),
    /// These bytes, then the end of the connection.
    Raw(Vec<u8>),
    /// These bytes, then zeroes for as long as somebody takes them.
    Endless(Vec<u8>),
    /// These bytes, then all is taken.
    Take(&'static str),
    /// Nothing, until the other side goes.
    Silence,
}

impl Answer {
    pub fn api(codes: &[&str]) -> Self {
        Self::Error(json!({"code": 1, "message": codes[0], "data": codes[1..]}))
    }
}

type Act = dyn Fn(&Request) -> Option<Answer> + Send + Sync;

struct Shared {
    act: Box<Act>,
    requests: Mutex<Vec<Request>>,
    connections: AtomicUsize,
    is_over: AtomicBool,
}

pub struct Peer {
    shared: Arc<Shared>,
    port: u16,
    acceptor: Option<JoinHandle<()>>,
}

impl Peer {
    pub fn start(act: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            act: Box::new(act),
            requests: Mutex::default(),
            connections: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
        });
        let of_acceptor = shared.clone();
        let acceptor = thread::spawn(move || {
            thread::scope(|scope| {
                for stream in listener.incoming() {
                    if of_acceptor.is_over.load(Ordering::SeqCst) {
                        break;
                    }
                    let shared = &of_acceptor;
                    shared.connections.fetch_add(1, Ordering::SeqCst);
                    scope.spawn(move || shared.serve(stream.unwrap()));
                }
            });
        });
        Self { shared, port, acceptor: Some(acceptor) }
    }

    /// Returns settings that connect to it, with short pauses.
    pub fn settings(&self) -> Settings {
        let address = format!("http://127.0.0.1:{}", self.port).parse().unwrap();
        let password = Zeroizing::new(PASSWORD.to_owned());
        let pause = Duration::from_millis(20);
        Settings { pause, ..Settings::new(address, "root", password, Trust::Unknown) }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    pub fn methods(&self) -> Vec<String> {
        self.requests().into_iter().map(|request| request.method).collect()
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.acceptor.take().unwrap().join();
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) {
        // A connection that is kept is left when the test is over.
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while let Some((request, id)) = self.request(&mut reader) {
            self.requests.lock().unwrap().push(request.clone());
            let answer = (self.act)(&request).unwrap_or_else(|| standard(&request));
            let reply = match answer {
                Answer::Result(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
                Answer::Error(error) => json!({"jsonrpc": "2.0", "id": id, "error": error}),
                Answer::Raw(bytes) => {
                    let _ = stream.write_all(&bytes);
                    return;
                }
                Answer::Endless(bytes) => {
                    let _ = stream.write_all(&bytes);
                    while !self.is_over.load(Ordering::SeqCst) {
                        if stream.write_all(&[0; 1 << 16]).is_err() {
                            break;
                        }
                    }
                    return;
                }
                Answer::Take(head) => {
                    let _ = stream.write_all(head.as_bytes());
                    return self.drain(&mut reader);
                }
                Answer::Silence => return self.drain(&mut reader),
            };
            let body = reply.to_string();
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
            if stream.write_all(format!("{head}{body}").as_bytes()).is_err() {
                return;
            }
        }
    }

    fn drain(&self, reader: &mut impl Read) {
        let mut bytes = vec![0; 1 << 16];
        while !self.is_over.load(Ordering::SeqCst) {
            match reader.read(&mut bytes) {
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {}
                Ok(read) if read > 0 => {}
                _ => return,
            }
        }
    }

    /// Reads some bytes, waiting for as long as the test goes on.
    fn read_line(&self, reader: &mut impl BufRead) -> Option<String> {
        let mut line = Vec::new();
        loop {
            match reader.read_until(b'\n', &mut line) {
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {
                    if self.is_over.load(Ordering::SeqCst) {
                        return None;
                    }
                }
                Ok(read) if read > 0 => return String::from_utf8(line).ok(),
                _ => return None,
            }
        }
    }

    fn request(&self, reader: &mut impl BufRead) -> Option<(Request, Value)> {
        let line = self.read_line(reader)?;
        let mut length = 0;
        loop {
            let header = self.read_line(reader)?.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
            assert!(!header.starts_with("transfer-encoding"), "{header}");
        }
        let mut words = line.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        if method != "POST" {
            let path = target.split('?').next()?;
            return Some((Request { method: format!("{method} {path}"), params: Vec::new() }, Value::Null));
        }
        assert_eq!(target, "/jsonrpc");
        let mut body = vec![0; length];
        let mut read = 0;
        while read < length {
            match reader.read(&mut body[read..]) {
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {}
                Ok(more) if more > 0 => read += more,
                _ => return None,
            }
        }
        let mut call: Value = serde_json::from_slice(&body).unwrap();
        let Value::Array(params) = call["params"].take() else { panic!("no list of arguments") };
        Some((Request { method: call["method"].as_str()?.to_owned(), params }, call["id"].take()))
    }
}

/// What a pool answers that has one host and nothing else.
fn standard(request: &Request) -> Answer {
    Answer::Result(match request.method.as_str() {
        "session.login_with_password" => json!(SESSION),
        "host.get_all_records" => json!({"OpaqueRef:host": {"address": "127.0.0.1"}}),
        "pool.get_all_records" => json!({"OpaqueRef:pool": {"master": "OpaqueRef:host"}}),
        "task.create" => json!("OpaqueRef:task"),
        "task.get_record" => json!({"status": "success"}),
        "VDI.get_SR" => json!("OpaqueRef:sr"),
        "SR.get_PBDs" => json!(["OpaqueRef:pbd"]),
        "PBD.get_record" => json!({"host": "OpaqueRef:host", "currently_attached": true}),
        "Async.VDI.destroy" => json!("OpaqueRef:task"),
        _ => json!(""),
    })
}
