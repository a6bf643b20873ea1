//! A client of nothing but sockets, which sees what libraries hide.

#![allow(dead_code, reason = "each test uses a part of it")]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};
use xapi_simulator::scene::{Disk, Machine};
use xapi_simulator::value::Reference;
use xapi_simulator::{Scene, Simulator};

/// What a test waits for at most: far longer than anything takes, so that only what never comes fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An answer of HTTP.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    /// Returns a header field, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<String> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends bytes and returns what comes until the connection ends.
pub fn send(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = connect(to);
    // The other side may have had enough before the end.
    let _enough = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    answer
}

pub fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends a request that is the last of its connection.
pub fn request(to: SocketAddr, head: &str, body: &[u8]) -> Answer {
    let head = format!("{head}\r\nhost: pool\r\nconnection: close\r\n\r\n");
    parse(&send(to, &[head.as_bytes(), body].concat()))
}

pub fn parse(bytes: &[u8]) -> Answer {
    let mut reader = BufReader::new(bytes);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).unwrap() > 0, "no head in {:?}", String::from_utf8_lossy(bytes));
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut body = Vec::new();
    reader.read_to_end(&mut body).unwrap();
    Answer { status, head, body }
}

/// A pool with a machine `vm` that has one disk, and a session.
pub fn pool() -> Client {
    Client::start(Scene::new(1).vm(Machine::new("vm").disk(Disk::new("disk", 8 << 20).filled(100))))
}

/// A pool, and somebody logged in.
pub struct Client {
    pub simulator: Simulator,
    pub session: String,
}

impl Client {
    pub fn start(scene: Scene) -> Client {
        let simulator = Simulator::start(scene).unwrap();
        let mut client = Client { simulator, session: String::new() };
        client.login();
        client
    }

    pub fn http(&self) -> SocketAddr {
        self.simulator.http_address()
    }

    pub fn login(&mut self) {
        self.session = self.login_as("test").unwrap();
    }

    pub fn login_as(&self, originator: &str) -> Result<String, Vec<String>> {
        let params = json!(["root", "simulated", "1.1", originator]);
        call_raw(self.http(), "session.login_with_password", &params)
            .map(|session| session.as_str().unwrap().to_owned())
    }

    /// Calls with the session before the arguments.
    pub fn call(&self, method: &str, arguments: &[Value]) -> Result<Value, Vec<String>> {
        let params: Vec<Value> = std::iter::once(json!(self.session)).chain(arguments.iter().cloned()).collect();
        call_raw(self.http(), method, &json!(params))
    }

    /// Calls what must succeed, and returns a text.
    pub fn text(&self, method: &str, arguments: &[Value]) -> String {
        let answer = self.call(method, arguments).unwrap_or_else(|failure| panic!("{method}: {failure:?}"));
        answer.as_str().unwrap_or_else(|| panic!("{method}: {answer}")).to_owned()
    }

    /// Calls what must fail, and returns the code.
    pub fn code(&self, method: &str, arguments: &[Value]) -> String {
        self.call(method, arguments).expect_err(method)[0].clone()
    }

    pub fn vm(&self) -> Value {
        json!(self.simulator.only(xapi_simulator::Class::Vm, "vm").as_str())
    }

    /// Returns the first disk of a machine.
    pub fn disk_of(&self, vm: &Value) -> Value {
        let disks = self.simulator.disks_of(&Reference::from(vm.as_str().unwrap())).unwrap();
        json!(disks[0].as_str())
    }

    pub fn disk(&self) -> Value {
        self.disk_of(&self.vm())
    }

    /// Waits until a task has ended and returns its record.
    pub fn ended(&self, task: &str) -> Value {
        until("the task ends", || {
            let record = self.call("task.get_record", &[json!(task)]).unwrap();
            (record["status"] != "pending").then_some(record)
        })
    }

    /// Exports with a task of its own and returns the answer and the task's record.
    pub fn export(&self, vdi: &Value, parameters: &str) -> (Answer, Value) {
        let task = self.text("task.create", &[json!("export"), json!("")]);
        let answer = request(self.http(), &self.get("/export_raw_vdi/", vdi, &task, parameters), b"");
        (answer, self.ended(&task))
    }

    pub fn get(&self, path: &str, vdi: &Value, task: &str, parameters: &str) -> String {
        let (session, vdi) = (&self.session, vdi.as_str().unwrap());
        format!("GET {path}?session_id={session}&task_id={task}&vdi={vdi}&{parameters} HTTP/1.1")
    }

    /// Imports with a task of its own and returns its record.
    pub fn import(&self, vdi: &Value, format: &str, length: usize, body: &[u8]) -> Value {
        let task = self.text("task.create", &[json!("import"), json!("")]);
        let (session, vdi) = (&self.session, vdi.as_str().unwrap());
        let head = format!(
            "PUT /import_raw_vdi/?session_id={session}&task_id={task}&vdi={vdi}&format={format} HTTP/1.1\r\ncontent-length: {length}"
        );
        let mut stream = connect(self.http());
        write!(stream, "{head}\r\n\r\n").unwrap();
        // It may be refused on the way.
        let _enough = stream.write_all(body);
        let _ended = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer);
        self.ended(&task)
    }

    /// Makes an empty disk as large as another.
    pub fn like(&self, vdi: &Value) -> Value {
        let record = self.call("VDI.get_record", &[vdi.clone()]).unwrap();
        json!(self.text(
            "VDI.create",
            &[json!({"name_label": "new", "SR": record["SR"], "virtual_size": record["virtual_size"], "type": "user",
                "sharable": false, "read_only": false, "other_config": {}})],
        ))
    }

    pub fn digest(&self, vdi: &Value) -> u64 {
        self.simulator.content(&Reference::from(vdi.as_str().unwrap())).unwrap().digest()
    }

    pub fn write(&self, vdi: &Value, offset: u64, bytes: &[u8]) {
        let vdi = Reference::from(vdi.as_str().unwrap());
        self.simulator.write(&vdi, |content| content.write(offset, bytes)).unwrap().unwrap();
    }

    /// Waits until nothing has a disk attached.
    pub fn detached(&self, vdi: &Value) {
        until("the disk is detached", || {
            (self
                .call("VDI.get_VBDs", &[vdi.clone()])
                .unwrap()
                .as_array()
                .unwrap()
                .iter()
                .all(|vbd| self.call("VBD.get_currently_attached", &[vbd.clone()]) != Ok(json!(true))))
            .then_some(())
        });
    }
}

/// Calls over a connection of its own.
pub fn call_raw(to: SocketAddr, method: &str, params: &Value) -> Result<Value, Vec<String>> {
    let body = json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).to_string();
    let answer = request(to, &format!("POST /jsonrpc HTTP/1.1\r\ncontent-length: {}", body.len()), body.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut answer: Value = serde_json::from_slice(&answer.body).unwrap();
    match answer.get("error") {
        None => Ok(answer["result"].take()),
        Some(error) => {
            let params = error["data"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned());
            Err(std::iter::once(error["message"].as_str().unwrap().to_owned()).chain(params).collect())
        }
    }
}

/// Asks again until there is an answer.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
