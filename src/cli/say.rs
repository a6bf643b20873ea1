//! What a person is told beside the output: lines on standard error.

use std::fmt::Arguments;
use std::io::{self, Write};

/// Says a line on standard error. It takes what `format!` takes.
///
/// Unlike `eprintln!` it ends nothing where that cannot be written, because its disk is full or whoever read it is gone: the work
/// is worth more than what is said of it.
macro_rules! say {
    ($($what:tt)*) => { $crate::cli::say::line(::std::format_args!($($what)*)) };
}

/// Writes a line in one piece, so that those of several programs stay whole.
pub fn line(what: Arguments) {
    let _ = io::stderr().lock().write_all(format!("{what}\n").as_bytes());
}
