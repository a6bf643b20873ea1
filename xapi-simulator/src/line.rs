//! A long line to a server: what is asked for through it comes later, and no slower.
//!
//! ```text
//! client ─► reader ─► queue: bytes, each with the time they are due ─► writer ─► server
//!        ◄──────────────────────────────── splice(2) ◄──────────────────────────
//! ```
//!
//! All of the round trip is on the way there: a client cannot tell that from half of it on either way, since it has no clock
//! at the server. So only requests are copied and kept, and what is answered costs next to nothing: who is measured shares the
//! machine with the line.
//!
//! Invariant: bytes leave in the order they came, none to the server before the round trip has passed.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// Bytes on their way to the server over a connection; who sends more waits.
const IN_FLIGHT: usize = 16 << 20;
/// Bytes taken from a client at once.
const PIECE_BYTES: usize = 64 << 10;
/// Bytes taken from a server at once: the most that a pipe may hold without privileges.
const PIPE_BYTES: usize = 1 << 20;

/// A running line; ends its connections, and waits for that, when it is dropped.
pub struct Line {
    entrance: SocketAddr,
    connections: Arc<Mutex<Connections>>,
    listener: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Connections {
    is_stopped: bool,
    next: u64,
    /// Both ends of each.
    open: BTreeMap<u64, [TcpStream; 2]>,
}

impl Line {
    /// Connects whoever comes to `entrance` with `server`, there and back in `round_trip` more than without it.
    ///
    /// # Errors
    /// If the socket has no address, or there is no thread.
    pub fn start(entrance: TcpListener, server: SocketAddr, round_trip: Duration) -> io::Result<Self> {
        let address = entrance.local_addr()?;
        let connections = Arc::new(Mutex::new(Connections::default()));
        let shared = connections.clone();
        let listen = move || listen(&entrance, server, round_trip, &shared);
        let listener = thread::Builder::new().name("line".into()).spawn(listen)?;
        Ok(Self { entrance: address, connections, listener: Some(listener) })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        {
            let mut connections = lock(&self.connections);
            connections.is_stopped = true;
            connections.open.values().flatten().for_each(cut);
        }
        // Wakes the listener; if nothing listens, it has ended.
        let _ = TcpStream::connect(self.entrance);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

fn listen(entrance: &TcpListener, server: SocketAddr, delay: Duration, connections: &Mutex<Connections>) {
    thread::scope(|scope| {
        for client in entrance.incoming() {
            if lock(connections).is_stopped {
                break;
            }
            // Such errors are about one connection, or pass.
            let Ok(ends) = client.and_then(|client| Ok([client, TcpStream::connect(server)?])) else { continue };
            let Some(number) = admit(connections, &ends) else { continue };
            scope.spawn(move || {
                carry(&ends, delay);
                lock(connections).open.remove(&number);
            });
        }
    });
}

/// Takes note of a connection; `None` if it is to be dropped.
fn admit(connections: &Mutex<Connections>, [client, server]: &[TcpStream; 2]) -> Option<u64> {
    client.set_nodelay(true).and_then(|()| server.set_nodelay(true)).ok()?;
    let ends = [client.try_clone().ok()?, server.try_clone().ok()?];
    let mut connections = lock(connections);
    if connections.is_stopped {
        return None;
    }
    connections.next += 1;
    let number = connections.next;
    connections.open.insert(number, ends);
    Some(number)
}

/// Carries both directions to their ends.
fn carry([client, server]: &[TcpStream; 2], delay: Duration) {
    let queue = Queue::default();
    // Of a direction that fails nothing can arrive any more: both sides are to see it.
    let over = || [client, server].into_iter().for_each(cut);
    thread::scope(|scope| {
        scope.spawn(|| queue.fill(client, delay));
        scope.spawn(|| {
            if queue.empty(server).is_err() {
                queue.end();
                over();
            }
        });
        scope.spawn(|| {
            if answer(server, client).is_err() {
                over();
            }
        });
    });
}

/// Passes on what a server answers, and its end; the bytes are not copied.
fn answer(server: &TcpStream, client: &TcpStream) -> io::Result<()> {
    let (take, give) = pipe_with(PipeFlags::CLOEXEC)?;
    // A smaller one is slower, that is all.
    let _ = fcntl_setpipe_size(&give, PIPE_BYTES);
    loop {
        let mut left = splice(server, None, &give, None, PIPE_BYTES, SpliceFlags::MOVE)?;
        if left == 0 {
            return client.shutdown(Shutdown::Write);
        }
        while left > 0 {
            left -= splice(&take, None, client, None, left, SpliceFlags::MOVE)?;
        }
    }
}

/// What is on its way to a server.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// Nothing more comes in.
    is_over: bool,
    /// When the end arrives.
    end: Option<Instant>,
}

impl Queue {
    /// Takes what comes, to its end.
    fn fill(&self, mut from: &TcpStream, delay: Duration) {
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            let read = from.read(&mut buffer).unwrap_or(0);
            let due = Instant::now() + delay;
            let mut state = lock(&self.state);
            while state.bytes >= IN_FLIGHT && !state.is_over {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if read == 0 || state.is_over {
                state.is_over = true;
                state.end = Some(due);
                self.changed.notify_all();
                return;
            }
            state.pieces.push_back((due, buffer[..read].to_vec()));
            state.bytes += read;
            self.changed.notify_all();
        }
    }

    /// Passes on what is due, and at last the end.
    fn empty(&self, mut to: &TcpStream) -> io::Result<()> {
        loop {
            let piece = {
                let mut state = lock(&self.state);
                while state.pieces.is_empty() && !state.is_over {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.pieces.pop_front().ok_or(state.end)
            };
            let due = piece.as_ref().map_or_else(|end| *end, |(due, _)| Some(*due));
            thread::sleep(due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now())));
            let Ok((_, bytes)) = piece else { return to.shutdown(Shutdown::Write) };
            to.write_all(&bytes)?;
            lock(&self.state).bytes -= bytes.len();
            self.changed.notify_all();
        }
    }

    fn end(&self) {
        lock(&self.state).is_over = true;
        self.changed.notify_all();
    }
}

fn cut(end: &TcpStream) {
    // Fails if the other side was faster.
    let _ = end.shutdown(Shutdown::Both);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND_TRIP: Duration = Duration::from_millis(100);

    /// A server that sends back what it gets, through a line.
    fn echo() -> (Line, SocketAddr, JoinHandle<()>) {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let entrance = TcpListener::bind("127.0.0.1:0").unwrap();
        let (there, here) = (server.local_addr().unwrap(), entrance.local_addr().unwrap());
        let echo = thread::spawn(move || {
            let (stream, _) = server.accept().unwrap();
            // A client that goes away ends it, too.
            let _ = io::copy(&mut &stream, &mut &stream);
        });
        (Line::start(entrance, there, ROUND_TRIP).unwrap(), here, echo)
    }

    #[test]
    fn all_bytes_arrive_in_order_none_before_the_round_trip_and_many_at_once() {
        const PIECES: u32 = 128;
        let (line, here, echo) = echo();
        let client = TcpStream::connect(here).unwrap();
        let begun = Instant::now();
        let sent: Vec<u8> = (0..PIECES).flat_map(|piece| vec![u8::try_from(piece).unwrap(); PIECE_BYTES]).collect();
        let mut came = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                sent.chunks(PIECE_BYTES).for_each(|piece| (&client).write_all(piece).unwrap());
                client.shutdown(Shutdown::Write).unwrap();
            });
            let mut first = [0; 1];
            (&client).read_exact(&mut first).unwrap();
            assert!(begun.elapsed() >= ROUND_TRIP);
            came.push(first[0]);
            (&client).read_to_end(&mut came).unwrap();
        });
        // One after the other they would have taken 12.8 s.
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(came == sent);
        echo.join().unwrap();
        drop(line);
    }

    #[test]
    fn a_line_that_is_dropped_ends_what_goes_through_it() {
        let (line, here, echo) = echo();
        let mut client = TcpStream::connect(here).unwrap();
        client.write_all(b"one").unwrap();
        client.read_exact(&mut [0; 3]).unwrap();
        drop(line);
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
        echo.join().unwrap();
    }
}
