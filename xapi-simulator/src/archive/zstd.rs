//! Zstandard: a writer that compresses into one frame, and a reader of any number of frames.
//!
//! The compressor pulls what it compresses, so that it has a thread; what it made is written by who writes to it.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use ruzstd::encoding::{CompressionLevel, compress};

/// What waits for the compressor at most, in writes.
const QUEUE: usize = 4;

/// Compresses what is written to it.
pub(super) struct ZstdWriter<W: Write> {
    to: W,
    input: Option<SyncSender<Vec<u8>>>,
    output: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl<W: Write> ZstdWriter<W> {
    pub(super) fn new(to: W) -> io::Result<Self> {
        let (input, pulled) = mpsc::sync_channel(QUEUE);
        // As long as what waits and one block of the compressor: each write empties it.
        let (made, output) = mpsc::channel();
        let source = Source { pulled, current: Vec::new(), position: 0 };
        let thread = thread::Builder::new()
            .name("zstd".into())
            .spawn(move || compress(source, Drain(made), CompressionLevel::Fastest))?;
        Ok(Self { to, input: Some(input), output, thread: Some(thread) })
    }

    /// Ends the frame, and returns what it was written to.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.input = None;
        while let Ok(made) = self.output.recv() {
            self.to.write_all(&made)?;
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(io::Error::other("the compressor failed")),
            _ => Ok(self.to),
        }
    }
}

impl<W: Write> Write for ZstdWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let input = self.input.as_ref().ok_or_else(|| io::Error::other("the frame has ended"))?;
        input.send(bytes.to_owned()).map_err(|_| io::Error::other("the compressor failed"))?;
        for made in self.output.try_iter() {
            self.to.write_all(&made)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// What the compressor pulls: ends when nothing more can come.
struct Source {
    pulled: Receiver<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.current.len() {
            let Ok(next) = self.pulled.recv() else { return Ok(0) };
            (self.current, self.position) = (next, 0);
        }
        let length = buffer.len().min(self.current.len() - self.position);
        buffer[..length].copy_from_slice(&self.current[self.position..self.position + length]);
        self.position += length;
        Ok(length)
    }
}

/// What the compressor writes to; never fails, since it panics if that does: nobody takes what is too late.
struct Drain(mpsc::Sender<Vec<u8>>);

impl Write for Drain {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(bytes.to_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Decompresses frame after frame.
pub(super) struct ZstdReader<R: BufRead> {
    /// `None` at the end, and after an error.
    state: Option<State<R>>,
}

enum State<R: BufRead> {
    Between(R),
    Within(Box<StreamingDecoder<R, FrameDecoder>>),
}

impl<R: BufRead> ZstdReader<R> {
    pub(super) fn new(from: R) -> Self {
        Self { state: Some(State::Between(from)) }
    }
}

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.state.take() {
                None => return Ok(0),
                Some(State::Between(mut from)) => {
                    if from.fill_buf()?.is_empty() {
                        return Ok(0);
                    }
                    let decoder = StreamingDecoder::new(from).map_err(io::Error::other)?;
                    self.state = Some(State::Within(Box::new(decoder)));
                }
                Some(State::Within(mut decoder)) => match decoder.read(buffer)? {
                    0 => self.state = Some(State::Between(decoder.into_inner())),
                    length => {
                        self.state = Some(State::Within(decoder));
                        return Ok(length);
                    }
                },
            }
        }
    }
}
