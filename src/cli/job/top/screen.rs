//! A text that is shown anew every second, on a screen of its own.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::termios::tcgetwinsize;

use crate::cli::signals;

/// How often it is shown.
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is looked whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// Begins a screen of its own without a cursor; the end of it, and what was there before; its beginning, and what is below a text.
const BEGIN: &str = "\x1b[?1049h\x1b[?25l";
const END: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const REST: &str = "\x1b[J";

/// The screen, until it is dropped.
struct Screen;

impl Screen {
    fn begin() -> io::Result<Self> {
        put(BEGIN)?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = put(END);
    }
}

fn put(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Shows what `text` returns, anew every second, until Ctrl-C.
///
/// # Errors
/// As `text`; if the terminal cannot be written to.
pub fn show(text: impl Fn() -> Result<String>) -> Result<()> {
    let is_stopped = signals::stop_on_signals()?;
    let _screen = Screen::begin().context("write to the terminal")?;
    while !is_stopped.load(Ordering::Relaxed) {
        let size = tcgetwinsize(io::stdout()).ok();
        let (rows, columns) = size.map_or((24, 80), |size| (usize::from(size.ws_row), usize::from(size.ws_col)));
        put(&frame(&text()?, rows, columns)).context("write to the terminal")?;
        pause(&is_stopped);
    }
    Ok(())
}

fn pause(is_stopped: &AtomicBool) {
    let mut left = PAUSE;
    while !left.is_zero() && !is_stopped.load(Ordering::Relaxed) {
        thread::sleep(TICK.min(left));
        left = left.saturating_sub(TICK);
    }
}

/// Returns what draws a text over the one before: no line longer than the terminal is wide, and no more of them than it has.
fn frame(text: &str, rows: usize, columns: usize) -> String {
    let mut frame = HOME.to_owned();
    let lines: Vec<&str> = text.lines().collect();
    let fits = lines.len() <= rows;
    let shown = if fits { lines.len() } else { rows.saturating_sub(1) };
    for (number, line) in lines.iter().take(shown).enumerate() {
        if number > 0 {
            frame.push_str("\r\n");
        }
        frame.extend(line.chars().take(columns));
        frame.push_str("\x1b[K");
    }
    if !fits {
        frame.push_str(
            &format!("\r\n({} more lines)", lines.len() - shown).chars().take(columns + 2).collect::<String>(),
        );
    }
    frame.push_str(REST);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_fits_the_terminal_and_leaves_nothing_of_the_one_before() {
        assert_eq!(frame("one\ntwo\n", 4, 80), "\x1b[Hone\x1b[K\r\ntwo\x1b[K\x1b[J");
        assert_eq!(frame("12345678\n", 4, 5), "\x1b[H12345\x1b[K\x1b[J");
        assert_eq!(frame("1\n2\n3\n4\n", 3, 80), "\x1b[H1\x1b[K\r\n2\x1b[K\r\n(2 more lines)\x1b[J");
        assert_eq!(frame("", 0, 0), "\x1b[H\x1b[J");
    }
}
