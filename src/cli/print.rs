//! Standard output.

use std::io::{self, Write};

use anyhow::{Context, Result};

/// Writes text. A reader that went away (`xofs list | head`) is no failure of ours, and ends nothing that is being done.
///
/// # Errors
/// What the system says, such as a full disk.
pub fn text(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write to standard output"),
    }
}

/// Writes JSON and a line end.
///
/// # Errors
/// As for [`text`].
pub fn json(value: &serde_json::Value) -> Result<()> {
    text(&format!("{value:#}\n"))
}
