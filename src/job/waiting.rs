//! Lines of a log that wait for room. Where they become too many the oldest go, but the one that a run begins with: without it nobody
//! knows which run the others are of, nor that its schedule was served.

use std::collections::VecDeque;

/// Lines, oldest first, each with its end.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// Whether the log ends within a line, which is closed before the first of these.
    is_torn: bool,
    lines: VecDeque<Line>,
    /// What is to be written (bytes).
    len: usize,
}

#[derive(Debug)]
struct Line {
    bytes: Vec<u8>,
    is_start: bool,
}

impl Waiting {
    /// Begins behind what a log has: a part of a line, if `is_torn`.
    pub fn behind(is_torn: bool) -> Self {
        Self { is_torn, lines: VecDeque::new(), len: usize::from(is_torn) }
    }

    /// Takes the next line; `is_start` if it is that which a run begins with.
    pub fn push(&mut self, bytes: Vec<u8>, is_start: bool) {
        self.len += bytes.len();
        self.lines.push_back(Line { bytes, is_start });
    }

    /// Drops the oldest lines beyond `most` bytes; the start of a run and the newest line stay.
    pub fn limit(&mut self, most: usize) {
        while self.len > most {
            let others = self.lines.len().saturating_sub(1);
            let Some(oldest) = self.lines.iter().take(others).position(|line| !line.is_start) else { return };
            self.len -= self.lines.remove(oldest).map_or(0, |line| line.bytes.len());
        }
    }

    /// Returns what is to be written.
    pub fn bytes(&self) -> Vec<u8> {
        let closing = if self.is_torn { &b"\n"[..] } else { &[] };
        [closing].into_iter().chain(self.lines.iter().map(|line| line.bytes.as_slice())).collect::<Vec<_>>().concat()
    }

    /// Lets go of all: it was written.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
