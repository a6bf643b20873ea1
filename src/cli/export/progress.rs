//! How far a long command is: a bar on a terminal, else lines now and then.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::ahead::Times;
use crate::cli::text;

/// A command that is done sooner shows nothing.
const DELAY: Duration = Duration::from_secs(2);
/// Pause between two lines where there is no terminal.
const LINE_PAUSE: Duration = Duration::from_secs(10);

/// Shows on standard error how far a command is.
pub struct Progress {
    what: String,
    /// Of the command.
    start: Instant,
    /// Of what is being done now.
    begin: Instant,
    total: u64,
    done: u64,
    shown: Shown,
}

enum Shown {
    /// A bar that appears after [`DELAY`].
    Bar(Option<ProgressBar>),
    /// The time of the last line.
    Lines(Instant),
    Nothing,
}

impl Progress {
    /// Starts; `total` is in bytes. Without a terminal, lines are written only if `is_asked`.
    pub fn new(what: &str, total: u64, is_asked: bool) -> Self {
        let start = Instant::now();
        let shown = match (std::io::stderr().is_terminal(), is_asked) {
            (true, _) => Shown::Bar(None),
            (false, true) => Shown::Lines(start),
            (false, false) => Shown::Nothing,
        };
        Self { what: what.to_owned(), start, begin: start, total, done: 0, shown }
    }

    /// Returns whether anybody sees it.
    pub fn is_shown(&self) -> bool {
        !matches!(self.shown, Shown::Nothing)
    }

    /// Goes on to the next of several things that the command does one after the other.
    pub fn next(&mut self, what: &str, total: u64) {
        (self.what, self.begin, self.total, self.done) = (what.to_owned(), Instant::now(), total, 0);
        if let Shown::Bar(Some(bar)) = &self.shown {
            bar.reset();
            bar.set_length(total);
        }
        self.advance(0, Times { reading: Duration::MAX, ..Times::default() });
    }

    /// Says that `bytes` more are to be done than was known.
    pub fn expect(&mut self, bytes: u64) {
        self.total += bytes;
        if let Shown::Bar(Some(bar)) = &self.shown {
            bar.set_length(self.total);
        }
    }

    /// Says that `bytes` more are done.
    pub fn advance(&mut self, bytes: u64, times: Times) {
        self.advance_waiting(bytes, if times.reading > times.writing { "repository" } else { "output" });
    }

    /// The same, with what is waited for.
    pub fn advance_waiting(&mut self, bytes: u64, waits_for: &str) {
        self.done += bytes;
        match &mut self.shown {
            Shown::Bar(bar) => {
                if bar.is_none() && self.start.elapsed() >= DELAY {
                    *bar = Some(new_bar(self.total, self.begin));
                }
                if let Some(bar) = bar {
                    bar.set_message(format!("{}, waiting for the {waits_for}", self.what));
                    bar.set_position(self.done);
                }
            }
            Shown::Lines(last) if last.elapsed() >= LINE_PAUSE => {
                *last = Instant::now();
                let rate = u128::from(self.done) * 1000 / self.begin.elapsed().as_millis().max(1);
                say!(
                    "xofs: {}: {} of {}, {}/s, waiting for the {waits_for}",
                    self.what,
                    text::size(self.done),
                    text::size(self.total),
                    text::size(u64::try_from(rate).unwrap_or(u64::MAX)),
                );
            }
            Shown::Lines(_) | Shown::Nothing => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(Some(bar)) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(total: u64, start: Instant) -> ProgressBar {
    let template = "{bar:30} {percent:>3}% {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, \
                    {eta} left: {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_elapsed(start.elapsed())
}
